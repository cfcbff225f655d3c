"""How fast is local attention on a grid, and does it stay linear? Kernels where there are any: C on CPUs.

One layer's attention, without projections: batch 4, 8 heads of 32, float32. Peers: torch's scaled dot product attention
over all cells with a mask made beforehand, and the prototype's loop over cells, which has one head of the same width
and one tensor for queries, keys and values. Peak memory is what the resident set of a process of its own grows by.
"""

import subprocess
import sys
from pathlib import Path

import harness
import torch
from training_step import memory_field

from modeling_heptapod.heptapod.local_attention import local_attention, naive_local_attention


BATCH, HEADS, HEAD_DIM = 4, 8, 32
OVER_SDPA = {1: 50.0, 3: 35.0, 5: 20.0}  # radius: how many times as fast, forward and backward
SMALL_OVER_SDPA = {32: 8.0, 16: 1.5}  # side of a smaller grid: the same, at RADIUS
RADIUS = 3
SHORT_ROUNDS = 100  # of what takes milliseconds


def prototype_attention(radius, width):
    try:
        from heptapod.model import Local2DAttention
    except ImportError as error:
        raise SystemExit("The peer is missing: pip install nonlinear-transformer==0.0.3 (extra `parity`).") from error
    return Local2DAttention(width, window_size=radius)


def make_inputs(side, batch=BATCH, heads=HEADS, head_dim=HEAD_DIM):
    return [torch.randn(batch, heads, side, side, head_dim, requires_grad=True) for _ in range(3)]


def window_mask(side, radius):
    """What scaled dot product attention adds to its logits, `[cells, cells]`."""
    place = torch.arange(side)
    near = (place[:, None] - place[None, :]).abs() <= radius
    near = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.zeros(near.shape).masked_fill_(~near, -torch.inf)


class Contestant:
    """Attention on its inputs; calling it runs a forward pass, with `backward` also the pass back to all inputs."""

    def __init__(self, attend, inputs, backward):
        self.attend, self.inputs, self.backward = attend, inputs, backward
        self.grad = torch.randn_like(inputs[0])

    def __call__(self):
        if self.backward:
            torch.autograd.grad(self.attend(*self.inputs), self.inputs, self.grad)
        else:
            with torch.no_grad():
                self.attend(*self.inputs)


def contestants(side, radius, backward, with_prototype=False, **shape):
    inputs, mask = make_inputs(side, **shape), window_mask(side, radius)

    def ours(q, k, v):
        return local_attention(q, k, v, radius)

    def masked_sdpa(q, k, v):
        parts = (x.flatten(2, 3) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask).view(q.shape)

    chosen = {"ours": Contestant(ours, inputs, backward), "masked SDPA": Contestant(masked_sdpa, inputs, backward)}
    if with_prototype:
        batch, heads, _, _, head_dim = inputs[0].shape
        page = torch.randn(batch, side, side, heads * head_dim, requires_grad=True)
        chosen["prototype"] = Contestant(prototype_attention(radius, heads * head_dim), [page], backward)
    return chosen


def check_equal(radius):
    """Ours, masked SDPA and the loop agree in values and gradients; ours and the prototype where they can."""
    shape = {"batch": 2, "heads": 2, "head_dim": 8}
    chosen = contestants(30, radius, True, **shape)
    ours, sdpa = chosen["ours"], chosen["masked SDPA"]
    naive = Contestant(lambda q, k, v: naive_local_attention(q, k, v, radius), ours.inputs, True)
    results = [[each.attend(*ours.inputs)] for each in (ours, sdpa, naive)]
    for result in results:
        result += torch.autograd.grad(result[0], ours.inputs, ours.grad)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            error = (a - b).abs().max().item()
            harness.require(error < 1e-5, f"results differ by {error:.1e} at radius {radius}")
    page = torch.randn(2, 30, 30, 8)
    cells = page.unsqueeze(1)
    error = (local_attention(cells, cells, cells, radius)[:, 0] - prototype_attention(radius, 8)(page)).abs().max()
    harness.require(error < 1e-5, f"ours and the prototype differ by {error:.1e} at radius {radius}")


def print_peak(side, **shape):
    """For a process of its own: print the bytes by which the resident set grows during a forward and backward pass."""
    torch.set_num_threads(harness.THREADS)

    def run(side):
        inputs = make_inputs(side, **shape)
        return Contestant(lambda q, k, v: local_attention(q, k, v, RADIUS), inputs, True)

    run(24)()  # loads every library
    measured = run(side)
    before = memory_field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
    measured()
    print(memory_field("VmHWM") - before)


def peak(side, quick):
    command = [sys.executable, __file__, "--peak", str(side), str(int(quick))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    report, quick = harness.start("Local attention on a grid against masked full attention and the prototype's loop")
    shape = {"batch": 1, "heads": 2, "head_dim": 8} if quick else {}
    side, smaller = (30, {8: 0.0, 4: 0.0}) if quick else (64, SMALL_OVER_SDPA)
    rounds = 1 if quick else 5
    disturbed = 0
    for radius in OVER_SDPA:
        check_equal(radius)

    def add(side, radius, backward, rounds=rounds, **options):
        nonlocal disturbed
        seconds, noisy = harness.in_turns(contestants(side, radius, backward, **options, **shape), rounds)
        disturbed += noisy
        report.row(
            grid=f"{side} x {side}",
            radius=radius,
            passes="forward + backward" if backward else "forward",
            ours_ms=seconds["ours"] * 1e3,
            masked_SDPA_ms=seconds["masked SDPA"] * 1e3,
            masked_SDPA_over_ours=seconds["masked SDPA"] / seconds["ours"],
            prototype_ms=seconds["prototype"] * 1e3 if "prototype" in seconds else None,
            prototype_over_ours=seconds["prototype"] / seconds["ours"] if "prototype" in seconds else None,
        )
        return seconds

    for radius, target in OVER_SDPA.items():
        for backward in (False, True):
            seconds = add(side, radius, backward, with_prototype=radius == RADIUS)
            if backward:
                ratio = seconds["masked SDPA"] / seconds["ours"]
                report.check(f"masked SDPA over ours, {side} x {side}, radius {radius}", ratio, ">=", target)
            if radius == RADIUS:
                passes, least = ("forward + backward", 12.0) if backward else ("forward", 1.5)
                ratio = seconds["prototype"] / seconds["ours"]
                report.check(f"prototype over ours, {side} x {side}, radius {radius}, {passes}", ratio, ">=", least)
    for small, target in smaller.items():
        for radius in OVER_SDPA:
            seconds = add(small, radius, True, rounds=1 if quick else SHORT_ROUNDS)
            ratio, least = seconds["masked SDPA"] / seconds["ours"], target if radius == RADIUS else 0.98
            report.check(f"masked SDPA over ours, {small} x {small}, radius {radius}", ratio, ">=", least)

    sides = (30, 34) if quick else (32, 64, 96, 128)
    runners = {each: contestants_alone(each, shape) for each in sides}
    seconds, noisy = harness.in_turns(runners, rounds)
    disturbed += noisy
    peaks = {each: peak(each, quick) for each in sides}
    for each in sides:
        report.row(
            grid=f"{each} x {each}",
            radius=RADIUS,
            passes="forward + backward",
            ours_ms=seconds[each] * 1e3,
            ours_ns_per_cell=seconds[each] * 1e9 / each**2,
            ours_peak_MB=peaks[each] / 1e6,
            ours_peak_bytes_per_cell=peaks[each] / each**2,
        )
    first, last = sides[0], sides[-1]
    growth = seconds[last] / last**2 / (seconds[first] / first**2)
    report.check(f"time per cell, {last} x {last} over {first} x {first}", growth, "<=", 1.3)
    growth = peaks[last] / last**2 / (peaks[sides[1]] / sides[1] ** 2) if not quick else 1.0
    report.check(f"peak memory per cell, {last} x {last} over {sides[1]} x {sides[1]}", growth, "<=", 1.1)

    report.note(
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, float32, no projections; SDPA's mask is made beforehand."
    )
    report.note("The prototype has one head and one tensor for queries, keys and values.")
    report.note(f"On grids smaller than {side} x {side} medians of {SHORT_ROUNDS} rounds.")
    report.note("Peak MB is the growth of the resident set of a process of its own, inputs not included.")
    report.note(f"Medians of {rounds} rounds otherwise; disturbed by other processes: {disturbed}.")
    report.finish()


def contestants_alone(side, shape):
    return Contestant(lambda q, k, v: local_attention(q, k, v, RADIUS), make_inputs(side, **shape), True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        tiny = {"batch": 1, "heads": 2, "head_dim": 8} if int(sys.argv[3]) else {}
        print_peak(int(sys.argv[2]), **tiny)
    else:
        main()
