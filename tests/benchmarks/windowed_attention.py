"""How fast is causal attention with a window, forward and backward? Kernels where there are any: C on CPUs.

One layer's attention, without projections: 4,096 tokens, 8 heads, float32. Peers: the same windows by torch's scaled dot
product attention, in chunks of keys and over all keys with a mask made beforehand; and causal attention to all keys.
"""

import harness
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_heptapod.hierarchical_lm.windowed_attention import visible, window_reach, windowed_attention
from modeling_heptapod.hierarchical_lm.windowed_attention_operator import has_kernel, kernel_attention


TOKENS, HEADS = 4096, 8
# Length of a row, channels of a head, window, dilation, blocks; the first is that of the configurations in `configs/`.
CASES = [
    (1024, 64, 64, 1, False),
    (1024, 64, 64, 4, False),
    (1024, 64, 64, 1, True),
    (1024, 32, 16, 1, False),
    (1024, 32, 64, 1, False),
    (4096, 64, 256, 1, False),
    (4096, 64, 512, 1, False),
    (4096, 64, 1024, 1, False),
]
QUICK_CASES = [(40, 8, 5, 2, False), (40, 8, 5, 1, True)]


def torch_attention(query, key, value, mask, is_causal):
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal).transpose(1, 2)


def contestants(length, head_dim, window, dilation, block, tokens):
    """Functions of queries, keys and values `[batch, length, heads, head_dim]`, and the inputs."""
    batch, places = max(1, tokens // length), torch.arange(length)
    span, scale = 2 * window if block else window, head_dim**-0.5
    inputs = [torch.randn(batch, length, HEADS, head_dim, requires_grad=True) for _ in range(3)]
    reach, mask = window_reach(places[None], window, dilation, block), visible(places, length, window, dilation, block)
    harness.require(has_kernel(inputs[0], span), "there is no kernel on this machine")

    def over_all(mask, is_causal):
        return lambda *qkv: torch_attention(*(x.transpose(1, 2) for x in qkv), mask, is_causal)

    return {
        "kernel": lambda *qkv: kernel_attention(*qkv, reach, span, dilation, scale),
        "chunks": lambda *qkv: windowed_attention(torch_attention, *qkv, window, dilation, block),
        "mask": over_all(mask, False),
        "all keys": over_all(None, True),
    }, inputs


def check_equal(functions, inputs):
    grad, results = torch.randn_like(inputs[0]), []
    for name in ("kernel", "chunks", "mask"):
        out = functions[name](*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for other in results[1:]:
        error = max((one - two).abs().max().item() for one, two in zip(results[0], other))
        harness.require(error < 1e-4, f"results differ by {error:.1e}")


def main():
    report, quick = harness.start("Causal attention with a window against scaled dot product attention")
    disturbed, rounds, tokens = 0, 1 if quick else 9, 80 if quick else TOKENS
    cases = QUICK_CASES if quick else CASES
    for case in cases:
        length, head_dim, window, dilation, block = case
        functions, inputs = contestants(*case, tokens)
        check_equal(functions, inputs)
        grad = torch.randn_like(inputs[0])

        def forth(attend, inputs=inputs):
            with torch.no_grad():
                attend(*inputs)

        def back(attend, inputs=inputs, grad=grad):
            torch.autograd.grad(attend(*inputs), inputs, grad)

        for passes, run in (("forward", forth), ("forward + backward", back)):
            chosen = {name: lambda run=run, attend=attend: run(attend) for name, attend in functions.items()}
            seconds, noisy = harness.in_turns(chosen, rounds)
            disturbed += noisy
            report.row(
                length=length,
                head_dim=head_dim,
                window=f"{window}{', blocks' if block else ''}",
                dilation=dilation,
                passes=passes,
                kernel_ms=seconds["kernel"] * 1e3,
                **{
                    f"{name.replace(' ', '_')}_over_it": x / seconds["kernel"]
                    for name, x in seconds.items()
                    if name != "kernel"
                },
            )
            if case == cases[0]:
                report.check(f"chunks over the kernel, {passes}", seconds["chunks"] / seconds["kernel"], ">=", 1.0)
    report.note(f"{TOKENS} tokens, {HEADS} heads, float32, no projections; masks are made beforehand.")
    report.note(f"Medians of {rounds} rounds; disturbed by other processes: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
