"""How long does a training step take, and how much memory, against the prototype and GPT-2 of equal shape?

4 layers of width 256 with 4 heads over bytes, 16,384 tokens a step, AdamW, no dropout. Ours runs with the prototype's
options (and its weights) and with its own defaults. Peak memory is what the resident set of a process of its own grows
by during steps, after a first small step has made the optimizer's state and loaded every library.
"""

import subprocess
import sys
import time
from pathlib import Path

import harness
import torch


LENGTHS = (256, 1_024, 4_096, 16_384)
TARGETS = {  # over the prototype, over GPT-2
    256: (1.15, 1.1),
    1_024: (1.3, 1.4),
    4_096: (1.35, 2.4),
    16_384: (1.4, 7.0),
}
ROUNDS = {256: 3, 1_024: 3, 4_096: 3, 16_384: 3}
NAMES = ("ours", "ours_default", "prototype", "GPT2")


def make_model(name, length):
    if name == "ours":
        return harness.leap(max_position_embeddings=length, **harness.PROTOTYPE_OPTIONS)
    if name == "ours_default":
        return harness.leap()
    return harness.prototype(length) if name == "prototype" else harness.gpt2(length)


class Trainee:
    """A model with its optimizer; calling it takes one step and returns its seconds."""

    def __init__(self, model, ids, autocast=False):
        self.model, self.ids, self.autocast = model.train(), ids, autocast
        self.optimizer = torch.optim.AdamW(model.parameters())

    def __call__(self):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids.clone()).loss  # the prototype writes into its labels
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def check_equal(length):
    """Ours with the prototype's weights has the prototype's loss and gradients."""
    peer, model = make_model("prototype", length), make_model("ours", length)
    harness.copy_prototype(peer, model)
    ids = torch.randint(0, 256, (2, min(length, 512)))
    losses = []
    for each in (peer, model):
        losses.append(each(input_ids=ids, labels=ids.clone()).loss)
        losses[-1].backward()
    harness.require(abs(losses[0] - losses[1]) < 1e-5, f"losses are {losses[0].item()} and {losses[1].item()}")
    error = harness.relative_rms(
        model.model.layers[0].mixer.qfkv_proj.weight.grad, peer.leap_model.decoders[0].projections.weight.grad
    )
    harness.require(error < 1e-3, f"gradients of the first projection differ by {error:.1e}")


def memory_field(name):
    line = next(
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(f"{name}:")
    )
    return int(line.split()[1]) * 1024


def print_peak(name, length, tokens):
    """For a process of its own: print the bytes by which the resident set grows during two steps."""
    torch.set_num_threads(harness.THREADS)
    ids = torch.randint(0, 256, (tokens // length, length))
    trainee = Trainee(make_model(name, length), ids[:1, : min(length, 64)])
    trainee()
    trainee.ids = ids
    before = memory_field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
    trainee()
    trainee()
    print(memory_field("VmHWM") - before)


def peak(name, length, tokens):
    command = [sys.executable, __file__, "--peak", name, str(length), str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def has_bf16_matrix_units():
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def main():
    report, quick = harness.start("Training step against the prototype and GPT-2 of equal shape")
    lengths, tokens = ((32, 64), 128) if quick else (LENGTHS, 16_384)
    rounds = dict.fromkeys(lengths, 2) if quick else ROUNDS
    disturbed = 0

    def add(how, length, seconds):
        ours = seconds["ours"]
        report.row(
            how=how,
            length=length,
            ours_ms=ours * 1e3,
            ours_default_ms=seconds["ours_default"] * 1e3 if "ours_default" in seconds else None,
            prototype_ms=seconds["prototype"] * 1e3,
            GPT2_ms=seconds["GPT2"] * 1e3 if "GPT2" in seconds else None,
            prototype_over_ours=seconds["prototype"] / ours,
            GPT2_over_ours=seconds["GPT2"] / ours if "GPT2" in seconds else None,
            **peaks.get((how, length), {}),
        )

    eager, peaks = {}, {}
    for length in lengths:
        check_equal(length)
        sizes = {name: peak(name, length, tokens) for name in NAMES} if length == lengths[1] else {}
        peaks["eager, float32", length] = {f"{name}_peak_MB": size / 1e6 for name, size in sizes.items()}
        ids = torch.randint(0, 256, (tokens // length, length))
        contestants = {name: Trainee(make_model(name, length), ids) for name in NAMES}
        eager[length], noisy = harness.in_turns(contestants, rounds[length])
        disturbed += noisy
        add("eager, float32", length, eager[length])
        for index, peer in enumerate(("prototype", "GPT2")):
            if not quick:
                ratio = eager[length][peer] / eager[length]["ours"]
                report.check(f"{peer} over ours, length {length:,}", ratio, ">=", TARGETS[length][index])
        for name in NAMES[:2] if sizes else ():
            ratio = sizes[name] / sizes["prototype"]
            report.check(f"peak memory of {name} over the prototype's, length {length:,}", ratio, "<", 1.0)

    for length in lengths[1:2]:
        ids = torch.randint(0, 256, (tokens // length, length))
        low, noisy = harness.in_turns(
            {name: Trainee(make_model(name, length), ids, autocast=True) for name in NAMES}, rounds[length]
        )
        disturbed += noisy
        add("eager, bf16 autocast", length, low)
        if has_bf16_matrix_units():
            for name in NAMES[:2]:
                ratio = eager[length][name] / low[name]
                report.check(f"float32 over bf16, {name}, length {length:,}", ratio, ">=", 2.5)

        names = [name for name in NAMES if name != "ours_default"]
        contestants = {name: Trainee(torch.compile(make_model(name, length)), ids) for name in names}
        compiled, noisy = harness.in_turns(contestants, rounds[length])
        disturbed += noisy
        add("compiled, float32", length, compiled)

    report.note(
        f"Float32 weights, {tokens:,} tokens a step, AdamW, no dropout; ours has the prototype's options, ours default its own."
    )
    report.note(
        "Peak MB is the growth of the resident set of a process of its own during steps, weights not included."
    )
    report.note(
        f"Medians of {min(rounds.values())} to {max(rounds.values())} rounds; disturbed by other processes: {disturbed}."
    )
    report.note("bf16 matrix units (amx_bf16): " + ("yes." if has_bf16_matrix_units() else "no."))
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
