"""What takes how long: a training step and one more token of each family, by kind of operator.

Shares are of the wall time of profiled calls, which are somewhat slower than others; milliseconds are the medians of calls
without the profiler. `between operators` is what no operator accounts for: Python, dispatch and waiting for threads.
"""

import time

import harness
import torch
from multigrid_step import AXIS_VOCABULARIES, LIGHT, make_ours
from one_token import STREAMS, given
from torch.profiler import ProfilerActivity, profile, record_function

from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM, HierarchicalLMConfig, HierarchicalLMForCausalLM
from modeling_heptapod.common.step_program import StepProgram
from modeling_heptapod.heptapod import local_attention_cpu
from modeling_heptapod.hierarchical_lm import windowed_attention_cpu
from modeling_heptapod.leap.focus_cpu import NativeMixing


OURS = "kernels in C"
PARTS = {
    "linear layers": ("mm", "addmm", "bmm", "baddbmm", "linear", "_addmm_activation"),
    "attention": ("scaled_dot_product", "_scaled_dot_product", "_flash_attention", "_softmax", "softmax"),
    "norms": ("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"),
    "activations": ("gelu", "silu", "sigmoid", "relu"),
    "loss and embedding": ("nll_loss", "_log_softmax", "log_softmax", "embedding", "index_select"),
    "optimizer": ("_fused_adamw", "_foreach", "lerp", "addcdiv", "addcmul"),
    "copies": ("copy_", "cat", "clone", "contiguous", "stack"),
}


def part_of(name: str) -> str:
    """The part that an operator belongs to, by its name."""
    if name == OURS:
        return name
    if name.startswith("Optimizer."):
        return "optimizer"
    plain = name.removeprefix("aten::").removesuffix("_backward")
    for part, starts in PARTS.items():
        if any(plain == start or (len(start) > 4 and plain.startswith(start)) for start in starts):
            return part
    return "other operators"


def count_kernels_in_c():
    """Let the profiler see calls of our C, which are no operators in eager mode."""

    def seen(function):
        def call(*args, **kwargs):
            with record_function(OURS):
                return function(*args, **kwargs)

        return call

    NativeMixing.call = seen(NativeMixing.call)
    for module in (local_attention_cpu, windowed_attention_cpu):
        module._call = seen(module._call)
    StepProgram.run = seen(StepProgram.run)  # with the linear layers of a token


def shares(run, calls: int) -> dict[str, float]:
    """Share of wall time of each part, over `calls` calls of `run`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        for _ in range(calls):
            run()
        wall = time.perf_counter() - began
    parts: dict[str, float] = {}
    for event in profiled.key_averages():
        part = part_of(event.key)
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total / 1e6 / wall
    parts["between operators"] = max(0.0, 1.0 - sum(parts.values()))
    return parts


def training_step(model, inputs):
    """A function that takes one step with AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def token(model, inputs):
    """A function that feeds one more token, always the same one, into a dynamic cache."""
    model.eval()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    one = {name: x[..., -1:] for name, x in inputs.items()}

    @torch.inference_mode()
    def step():
        model(**one, past_key_values=cache, use_cache=True)

    return step


def families(length):
    """Names, models, arguments of a training step, and of a prompt where there is a token to add."""
    ids = torch.randint(0, 256, (4, length))
    axis_ids = torch.stack([torch.randint(0, size, (4, length)) for size in AXIS_VOCABULARIES], dim=1)
    yield "LEAP", harness.leap(), {"input_ids": ids, "labels": ids}, given(ids[:1], None, 0, length)
    config = HierarchicalLMConfig(**STREAMS, max_position_embeddings=2 * length)
    streams = HierarchicalLMForCausalLM(config)
    yield "hierarchical LM", streams, {"input_ids": ids, "labels": ids}, given(ids[:1], None, 0, length)
    light = make_ours(harness.SHAPE, 4 * length, 4, axis_hidden_size=harness.SHAPE["hidden_size"] // 4, **LIGHT)
    tracks = {"input_ids": ids, "labels": ids, "axis_ids": axis_ids}
    yield "MultiGrid, four light axes", light, tracks, given(ids[:1], axis_ids[:1], 0, length)
    side = int(length**0.5)
    pages = torch.randint(0, 256, (4, side, side))
    grid = HeptapodForMaskedLM(
        HeptapodConfig(vocab_size=257, mask_token_id=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    )
    yield "grid", grid, {"input_ids": pages, "labels": pages}, None


def main():
    report, quick = harness.start("What takes how long")
    length, calls = (64, 2) if quick else (1_024, 20)
    count_kernels_in_c()
    disturbed, sums = 0, []
    for name, model, batch, prompt in families(length):
        runs = {"training step": training_step(model, batch)}
        if prompt is not None:
            runs["token"] = token(model, prompt)
        for what, run in runs.items():
            model.train(what == "training step")
            few = max(2, calls // 4) if what == "training step" else calls
            seconds, noisy = harness.in_turns({what: run}, few if what == "training step" else 4 * few)
            disturbed += noisy
            parts = shares(run, few)
            sums.append(sum(parts.values()))
            for part, share in sorted(parts.items(), key=lambda item: -item[1]):
                report.row(model=name, what=what, ms=seconds[what] * 1e3, part=part, share=share)
    report.check("no time counts twice: largest sum of the parts over the whole", max(sums), "<=", 1.02)
    report.note(
        f"Batches of 4 rows of {length:,} tokens, or of 4 pages of as many cells; tokens after {length:,}. float32."
    )
    report.note(f"Disturbed rounds: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
