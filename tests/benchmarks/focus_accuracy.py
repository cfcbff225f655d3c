"""How far is the focus operator from a float64 sum at 131,072 tokens, and how far the prototype's formulation?

Focus logits are uniform in +-30. The reference is written here and shares no code with the package: windowed sums over
explicit windows, global ones as float64 cumulative sums (nothing is subtracted; the exponents fit float64), gradients
by autograd. bf16 is held against the float64 result rounded to bf16, which nothing can beat.
"""

import harness
import torch

from modeling_heptapod.leap import focus_operator
from modeling_heptapod.leap.focus import FocusSettings, focus_mean, focus_mixing, naive_focus_mixing


HEADS, HEAD_DIM = 2, 16
SCALE = HEAD_DIM**-0.5
CHUNK = 2048


def reference_means(logs, values, window, sink_weight):
    """Weighted means in float64. `logs [n, heads]`, `values [n, heads, channels]`; differentiable."""
    logs, values = logs.unsqueeze(-1), values
    if window is None:
        weights = torch.exp(logs - 30)
        total = weights.cumsum(0) + sink_weight * torch.exp(torch.tensor(-30.0, dtype=logs.dtype))
        return (weights * values).cumsum(0) / total
    pad = torch.nn.functional.pad
    logs = pad(logs, (0, 0, 0, 0, window - 1, 0), value=-torch.inf).unfold(0, window, 1)
    values = pad(values, (0, 0, 0, 0, window - 1, 0)).unfold(0, window, 1)  # [n, heads, channels, window]
    weights = torch.exp(logs)
    return (weights * values).sum(-1) / (weights.sum(-1) + sink_weight)


def reference(qfkv, grad, weight_function, window, sink_weight):
    """Output and gradient of the mixing step in float64, in chunks of tokens where windows allow it."""
    qfkv, grad = qfkv[0].double(), grad[0].double()
    n = qfkv.shape[0]
    out, grad_in = torch.empty_like(grad), torch.zeros_like(qfkv)
    step, past = (n, 0) if window is None else (CHUNK, window - 1)
    for start in range(0, n, step):
        first = max(0, start - past)
        part = qfkv[first : start + step].clone().requires_grad_()
        q, f, k, v = part.unbind(1)
        logs = SCALE * (f * k).sum(-1)
        if weight_function == "elu":
            logs = torch.log(torch.nn.functional.elu(logs) + 1)
        means = reference_means(logs, torch.cat((k, v), dim=-1), window, sink_weight)
        kbar, vbar = means.chunk(2, dim=-1)
        result = (torch.sigmoid(SCALE * (q * kbar).sum(-1, keepdim=True)) * vbar)[start - first :]
        result.backward(grad[start : start + step])
        out[start : start + step] = result.detach()
        grad_in[first : start + step] += part.grad
    return out.unsqueeze(0), grad_in.unsqueeze(0)


def make_inputs(n, reach, dtype=torch.float32):
    """Inputs whose focus logits `SCALE * f . k` are uniform in +-reach, and a gradient of the output."""
    q, k, v = (torch.randn(1, n, HEADS, HEAD_DIM) for _ in range(3))
    logits = torch.empty(1, n, HEADS, 1).uniform_(-reach, reach)
    f = k * logits / (SCALE * k.square().sum(-1, keepdim=True))
    return torch.stack((q, f, k, v), dim=2).to(dtype), torch.randn(1, n, HEADS, HEAD_DIM).to(dtype)


def run(function, qfkv, grad, *arguments):
    """Output and input gradient of `function(qfkv, *arguments)`."""
    leaf = qfkv.clone().requires_grad_()
    out = function(leaf, *arguments)
    out.backward(grad)
    return out.detach(), leaf.grad


def mix(qfkv, settings):
    return focus_mixing(qfkv, settings)[0]


def mix_as_prototype(qfkv, peer):
    return peer(*qfkv.flatten(3).unbind(2)).view_as(qfkv[:, :, 0])


def settings_of(weight_function, window, sink_weight=0.0):
    return FocusSettings(scale=SCALE, weight_function=weight_function, window=window, sink_weight=sink_weight)


def errors(got, expected):
    """Relative RMS forward, and the worst of the gradients of q, f, k and v."""
    forward = harness.relative_rms(got[0], expected[0])
    return forward, max(harness.relative_rms(got[1][:, :, i], expected[1][:, :, i]) for i in range(4))


def nan_share(got):
    return torch.cat([x.flatten() for x in got]).isnan().float().mean().item()


def rounding_ratio(got, expected):
    """Errors over those of the float64 result rounded to bf16: forward, worst gradient."""
    rounded = tuple(x.bfloat16() for x in expected)
    (forward, _), (best, _) = errors(got, expected), errors(rounded, expected)
    worst = max(
        harness.relative_rms(got[1][:, :, i], expected[1][:, :, i])
        / harness.relative_rms(rounded[1][:, :, i], expected[1][:, :, i])
        for i in range(4)
    )
    return forward / best, worst


def mean_errors(logs, values, grad, window):
    """The same for `focus_mean`, weights and values given directly."""
    got = [x.clone().requires_grad_() for x in (logs, values)]
    out, _ = focus_mean(*got, settings_of("exp", window))
    out.backward(grad)
    expected = [x.double() for x in (logs, values)]
    n = logs.shape[1]
    expected_out, expected_grads = (
        torch.empty(grad.shape, dtype=torch.float64),
        [torch.zeros_like(x) for x in expected],
    )
    step, past = (n, 0) if window is None else (CHUNK, window - 1)
    for start in range(0, n, step):
        first = max(0, start - past)
        parts = [x[0, first : start + step].clone().requires_grad_() for x in expected]
        result = reference_means(*parts, window, 0.0)[start - first :]
        result.backward(grad[0, start : start + step].double())
        expected_out[0, start : start + step] = result.detach()
        for total, part in zip(expected_grads, parts):
            total[0, first : start + step] += part.grad
    backward = max(harness.relative_rms(a.grad, b) for a, b in zip(got, expected_grads))
    return harness.relative_rms(out.detach(), expected_out), backward


def main():
    report, quick = harness.start("Focus operator against a float64 sum")
    n = 4_096 if quick else 131_072
    windows = (4, 8, 16, 64, None)
    multihead = harness.prototype_module().MultiheadLeap

    for window in windows:
        for weight_function in ("exp", "elu"):
            qfkv, grad = make_inputs(150, 5, torch.float64)
            settings = settings_of(weight_function, window, 1e-5)
            naive = run(naive_focus_mixing, qfkv, grad, settings)
            worst = max(errors(reference(qfkv, grad, weight_function, window, 1e-5), naive))
            harness.require(worst < 1e-12, f"reference and naive loop differ by {worst:.1e}, window {window}")

    forms = {"C": focus_operator.native_is_supported, "torch": lambda *_: False}
    worst_forward = worst_backward = worst_bf16 = 0.0
    for window in windows:
        name = "global" if window is None else window
        for weight_function in ("exp", "elu"):
            qfkv, grad = make_inputs(n, 30)
            low, low_grad = make_inputs(n, 30, torch.bfloat16)
            settings = settings_of(weight_function, window)
            expected = reference(qfkv, grad, weight_function, window, 0.0)
            low_expected = reference(low, low_grad, weight_function, window, 0.0)
            for form, is_supported in forms.items():
                focus_operator.native_is_supported = is_supported
                got = run(mix, qfkv, grad, settings)
                forward, backward = errors(got, expected)
                ratios = rounding_ratio(run(mix, low, low_grad, settings), low_expected)
                report.row(
                    what=f"mixing in {form}, {weight_function}",
                    window=name,
                    logits="+-30",
                    forward=forward,
                    worst_gradient=backward,
                    bf16_forward_over_rounding=ratios[0],
                    bf16_gradient_over_rounding=ratios[1],
                    NaN=nan_share(got),
                )
                worst_forward, worst_backward = max(worst_forward, forward), max(worst_backward, backward)
                worst_bf16 = max(worst_bf16, *ratios)
        logs = torch.empty(1, n, HEADS).uniform_(-30, 30)
        values, grad = (torch.randn(1, n, HEADS, HEAD_DIM) for _ in range(2))
        forward, backward = mean_errors(logs, values, grad, window)
        report.row(what="means alone, exp", window=name, logits="+-30", forward=forward, worst_gradient=backward)
        worst_forward, worst_backward = max(worst_forward, forward), max(worst_backward, backward)

    for reach in (30, 10):
        for window in windows:
            qfkv, grad = make_inputs(n, reach)
            peer = multihead(HEADS * HEAD_DIM, HEADS, window or n, rescale=None, dropout=0.0)
            got = run(mix_as_prototype, qfkv, grad, peer)
            expected = reference(qfkv, grad, "exp", window, 1e-5)  # its denominator's own epsilon included
            forward, backward = errors(got, expected)
            report.row(
                what="prototype, exp",
                window="global" if window is None else window,
                logits=f"+-{reach}",
                forward=forward,
                worst_gradient=backward,
                NaN=nan_share(got),
            )

    report.check("float32 forward, relative RMS, worst", worst_forward, "<=", 2e-6)
    report.check("float32 gradients, relative RMS, worst", worst_backward, "<=", 5e-6)
    report.check("bf16 over rounding the float64 result, forward and gradients, worst", worst_bf16, "<=", 1.1)
    report.note(f"{n:,} tokens, {HEADS} heads of {HEAD_DIM}; relative RMS against float64 sums over the same inputs.")
    report.note("The prototype subtracts prefix sums; its reference includes the 1e-5 in its denominators.")
    report.finish()


if __name__ == "__main__":
    main()
