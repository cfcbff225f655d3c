"""How many bytes does the mixing step hold between its forward and its backward pass?

Every storage that any operation of the forward pass makes is watched through a weak reference; those that are still
alive once it has returned are held: by autograd, by a context object or by whoever else. What a training step holds is
these plus the step's input, the output of the projection before it.
"""

import gc
import weakref

import harness
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_heptapod.leap.focus import FocusSettings, focus_mixing


HEADS, HEAD_DIM = 4, 64


class StorageWatch(TorchDispatchMode):
    """Remembers, weakly, the storages of all tensors that operations inside it return."""

    def __init__(self):
        super().__init__()
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: self.seen.add(x.untyped_storage()), result)
        return result

    def bytes_alive(self, *known: torch.Tensor) -> int:
        """Bytes of the storages still alive, without those of `known` tensors."""
        gc.collect()
        own = {x.untyped_storage().data_ptr() for x in known}
        alive = {storage.data_ptr(): storage.nbytes() for storage in self.seen}
        return sum(size for place, size in alive.items() if place not in own)


def held(function, x, *arguments, known=()):
    """`function(x, *arguments)`, and the bytes held beside that, the input and `known` tensors after the forward pass."""
    with StorageWatch() as watch:
        out = function(x, *arguments)
    return out, watch.bytes_alive(x, out, *known)


def mix(qfkv, settings, rotary=None):
    return focus_mixing(qfkv, settings, rotary=rotary)[0]


def mix_as_prototype(qfkv, peer):
    return peer(*qfkv.flatten(3).unbind(2)).view_as(qfkv[:, :, 0])


class _Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x * 2, x[:4] + 1]
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad


def check_the_watch():
    x = torch.randn(1000, requires_grad=True)
    cases = {"saved by autograd": (lambda x: x.exp().sin(), 4000), "kept by a context": (_Hoarder.apply, 4016)}
    for name, (function, expected) in cases.items():
        _, got = held(function, x)
        harness.require(got == expected, f"{expected} bytes {name} were counted as {got}")


def settings(window, **options):
    options = {"weight_function": "exp", "sink_weight": 1e-5, **options}
    return FocusSettings(scale=10 / HEAD_DIM, normalize=True, window=window, **options)


def main():
    report, quick = harness.start("Memory held between forward and backward of the mixing step")
    tokens = 1_024 if quick else 16_384
    multihead = harness.prototype_module().MultiheadLeap
    check_the_watch()

    worst = 0.0
    for seq in (tokens // 64, tokens):
        batch = tokens // seq
        angles = torch.arange(seq)[None, :, None] / torch.logspace(0, 4, HEAD_DIM // 2).repeat(2)
        rotary = angles.cos(), angles.sin()
        for window in (None, 4, 16, 64):
            qfkv = torch.randn(batch, seq, 4, HEADS, HEAD_DIM, requires_grad=True)
            low = qfkv.detach().bfloat16().requires_grad_()
            peer = multihead(HEADS * HEAD_DIM, HEADS, window or seq, rescale=10, dropout=0.0)
            same, default = settings(window), settings(window, weight_function="elu", sink_weight=0.0)

            peer_out, peer_extra = held(mix_as_prototype, qfkv, peer)
            out, extra = held(mix, qfkv, same)
            _, default_extra = held(mix, qfkv, default, rotary, known=rotary)
            low_out, low_extra = held(mix, low, same)
            error = harness.relative_rms(out, peer_out)
            # In narrow windows of long sequences the prototype itself is no nearer to the truth.
            harness.require(error < 1e-2, f"ours and the prototype differ by {error:.1e}, window {window}")

            both = qfkv.nbytes + out.nbytes
            shares = extra / both, default_extra / both, low_extra / (low.nbytes + low_out.nbytes)
            worst = max(worst, *shares)
            report.row(
                length=seq,
                batch=batch,
                window="global" if window is None else window,
                input_and_output_MB=both / 1e6,
                prototype_holds_MB=(both + peer_extra) / 1e6,
                ours_holds_MB=(both + extra) / 1e6,
                prototype_over_ours=(both + peer_extra) / (both + extra),
                ours_beyond_both=f"{shares[0]:.2%}",
                with_elu_and_rotary=f"{shares[1]:.2%}",
                in_bf16=f"{shares[2]:.2%}",
            )

    report.check("held beside input and output, share of both, worst", worst, "<=", 0.05)
    report.note(f"float32 unless said, {tokens:,} tokens, {HEADS} heads of {HEAD_DIM}; rotary tables are not counted.")
    report.finish()


if __name__ == "__main__":
    main()
