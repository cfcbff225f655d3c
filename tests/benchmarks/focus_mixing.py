"""How far is LEAP's mixing step from the time that it takes to copy its input once?

4 rows of 4,096 tokens, 8 heads of 32 channels, with the options of a default model but for the window: global, of 4 and of 16
tokens. Forward, and forward and backward.
"""

import dataclasses

import harness
import torch

from modeling_heptapod.leap.focus import focus_mixing, naive_focus_mixing


WINDOWS = {"global": None, "window 4": 4, "window 16": 16}
TARGETS = {"forward": 2.0, "forward and backward": 4.5}


def main():
    report, quick = harness.start("Focus mixing over one copy of its input")
    batch, seq, rounds = (1, 32, 2) if quick else (4, 4_096, 15)
    default = harness.leap(num_attention_heads=8).model.layers[0].mixer.settings
    qfkv = torch.randn(batch, seq, 4, 8, 32)
    few = qfkv[:1, : min(seq, 64)]
    differentiable, target = qfkv.clone().requires_grad_(), torch.empty_like(qfkv)
    grad = torch.randn(batch, seq, 8, 32)
    contestants = {("copy", "forward"): lambda: target.copy_(qfkv)}
    for name, window in WINDOWS.items():
        settings = dataclasses.replace(default, window=window)
        error = (focus_mixing(few, settings)[0] - naive_focus_mixing(few, settings)).abs().max().item()
        harness.require(error < 1e-4, f"{name} differs from the loop by {error:.1e}")
        contestants[name, "forward"] = _forward(qfkv, settings)
        contestants[name, "forward and backward"] = _both(differentiable, settings, grad)
    seconds, disturbed = harness.in_turns(contestants, rounds)
    copy = seconds["copy", "forward"]
    for (name, passes), each in seconds.items():
        report.row(how=name, passes=passes, ms=each * 1e3, over_a_copy=each / copy)
        if name != "copy":
            report.check(
                f"focus mixing, {passes}, {name}, over one copy of its input", each / copy, "<=", TARGETS[passes]
            )
    report.note(f"{batch} x {seq:,} tokens, 8 heads of 32, float32: an input of {qfkv.nbytes / 1e6:.0f} MB.")
    report.note(f"Medians of {rounds} rounds; disturbed by other processes: {disturbed}.")
    report.finish()


def _forward(qfkv, settings):
    @torch.no_grad()
    def run():
        focus_mixing(qfkv, settings)

    return run


def _both(qfkv, settings, grad):
    def run():
        torch.autograd.grad(focus_mixing(qfkv, settings)[0], qfkv, grad)

    return run


if __name__ == "__main__":
    main()
