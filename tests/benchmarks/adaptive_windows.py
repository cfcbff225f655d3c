"""What do spans and biases cost local attention on a grid, forward and backward?"""

import harness
import torch

from modeling_heptapod.heptapod.local_attention import local_attention, naive_local_attention


SIZES = ((1, 64, 1), (1, 64, 3), (1, 64, 5), (16, 16, 3))  # batch, side, radius


def main():
    report, quick = harness.start("Local attention to adapted windows over the same without spans and biases")
    rounds, disturbed = 2 if quick else 15, 0
    for batch, side, radius in ((1, 8, 1),) if quick else SIZES:
        q, k, v = (torch.randn(batch, 8, side, side, 32, requires_grad=True) for _ in range(3))
        span = (radius * torch.rand(batch, 8, side, side)).requires_grad_()
        bias = torch.randn(8, 2 * radius + 1, 2 * radius + 1, requires_grad=True)
        _check(q, k, v, radius, span, bias)
        ways = {"plain": {}, "spans": {"span": span}, "biases": {"bias": bias}, "both": {"span": span, "bias": bias}}
        grad = torch.randn(q.shape)
        contestants = {name: _both(q, k, v, radius, grad, adapted) for name, adapted in ways.items()}
        seconds, noisy = harness.in_turns(contestants, rounds)
        disturbed += noisy
        for name, each in seconds.items():
            over = each / seconds["plain"]
            report.row(pages=batch, side=side, radius=radius, how=name, ms=each * 1e3, over_plain=over)
        ratio = seconds["both"] / seconds["plain"]
        report.check(f"spans and biases over neither, {batch} x {side} x {side}, radius {radius}", ratio, "<=", 1.3)
    report.note(f"8 heads of 32 channels, float32. Medians of {rounds} rounds; disturbed: {disturbed}.")
    report.finish()


def _check(q, k, v, radius, span, bias):
    few = [x[:1, :, :8, :8] for x in (q, k, v)]
    adapted = {"span": span[:1, :, :8, :8], "bias": bias}
    error = (local_attention(*few, radius, **adapted) - naive_local_attention(*few, radius, **adapted)).abs().max()
    harness.require(error < 1e-4, f"radius {radius} differs from the loop by {error:.1e}")


def _both(q, k, v, radius, grad, adapted):
    def run():
        out = local_attention(q, k, v, radius, **adapted)
        torch.autograd.grad(out, [q, k, v, *adapted.values()], grad)

    return run


if __name__ == "__main__":
    main()
