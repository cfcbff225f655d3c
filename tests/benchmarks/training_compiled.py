"""Is a compiled training step no slower than an eager one, in any family, and how do both compare with GPT-2 and Llama?

4,096 tokens a step, AdamW, no dropout, float32. LEAP, GPT-2, Llama and MultiGrid have 4 layers of width 256, the hierarchical LM
6 of 224. `without mixing` is LEAP with the values in place of its mixing step: the time of everything else.
"""

import time
from contextlib import contextmanager

import harness
import torch
from multigrid_step import AXIS_VOCABULARIES, LIGHT, make_ours
from one_token import STREAMS
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM, HierarchicalLMConfig, HierarchicalLMForCausalLM
from modeling_heptapod.leap import leap_mixing


PEERS = {"GPT-2": (1.98, 3.06), "Llama": (1.52, 2.73)}  # over LEAP at both lengths


def llama(positions):
    """As many parameters in a layer as GPT-2 has."""
    return LlamaForCausalLM(LlamaConfig(**harness.SHAPE, intermediate_size=688, max_position_embeddings=positions))


class Step:
    """A model with its optimizer and the arguments of a step; calling it takes one and returns its seconds."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model.train(), inputs
        self.optimizer = torch.optim.AdamW(model.parameters())

    def __call__(self):
        began = time.perf_counter()
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


@contextmanager
def without_mixing():
    """The values in place of LEAP's mixing step."""
    mix, leap_mixing.focus_mixing = leap_mixing.focus_mixing, lambda qfkv, *_: (qfkv[:, :, -1], None)
    try:
        yield
    finally:
        leap_mixing.focus_mixing = mix


class WithoutMixing(Step):
    def __call__(self):
        with without_mixing():
            return super().__call__()


def make(name, length, positions):
    """A model and the arguments of its training step, of `positions` tokens in rows of `length`."""
    ids = torch.randint(0, 256, (max(1, positions // length), length))
    inputs = {"input_ids": ids, "labels": ids}
    if name == "LEAP":
        return harness.leap(), inputs
    if name == "GPT-2":
        return harness.gpt2(length), inputs
    if name == "Llama":
        return llama(length), inputs
    if name == "hierarchical LM, strides 1, 2, 8":
        config = HierarchicalLMConfig(**STREAMS, strides=[1, 2, 8], max_position_embeddings=length)
        return HierarchicalLMForCausalLM(config), inputs
    if name == "MultiGrid, no axes":
        return make_ours(harness.SHAPE, length, 0), inputs
    if name == "MultiGrid, four light axes":
        model = make_ours(harness.SHAPE, length, 4, axis_hidden_size=harness.SHAPE["hidden_size"] // 4, **LIGHT)
        axis_ids = torch.stack([torch.randint(0, size, ids.shape) for size in AXIS_VOCABULARIES], dim=1)
        return model, {**inputs, "axis_ids": axis_ids}
    side = int(length**0.5)
    pages = ids.view(-1, side, side)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return HeptapodForMaskedLM(HeptapodConfig(vocab_size=257, mask_token_id=256, **shape)), {
        "input_ids": pages,
        "labels": pages,
    }


FAMILIES = ("hierarchical LM, strides 1, 2, 8", "MultiGrid, no axes", "MultiGrid, four light axes", "grid")


def main():
    report, quick = harness.start("Compiled training steps over eager ones, and over those of GPT-2 and Llama")
    lengths, tokens, rounds = ((16,), 64, 2) if quick else ((1_024, 4_096), 4_096, 7)
    peers = {"GPT-2": PEERS["GPT-2"]} if quick else PEERS
    disturbed = 0
    for index, length in enumerate(lengths):
        names = ("LEAP", *peers, *(FAMILIES[-1:] if quick else FAMILIES if index == 0 else ()))
        contestants = {}
        for name in names:
            model, inputs = make(name, length, tokens)
            contestants[name, "eager"] = Step(model, inputs)
            contestants[name, "compiled"] = Step(torch.compile(make(name, length, tokens)[0]), inputs)
        contestants["LEAP", "without mixing"] = WithoutMixing(*make("LEAP", length, tokens))
        seconds, noisy = harness.in_turns(contestants, rounds, warmup=2)
        disturbed += noisy
        for (name, how), each in seconds.items():
            report.row(
                model=name,
                how=how,
                length=length,
                ms=each * 1e3,
                over_eager=each / seconds[name, "eager"],
                over_LEAP=each / seconds["LEAP", how] if name in peers else None,
            )
        for name in names:
            ratio = seconds[name, "compiled"] / seconds[name, "eager"]
            if name not in peers:
                report.check(f"{name}, {length:,} tokens: compiled over eager", ratio, "<=", 1.0)
        for name, targets in peers.items():
            for how in ("eager", "compiled"):
                ratio = seconds[name, how] / seconds["LEAP", how]
                report.check(f"{name} over LEAP, {length:,} tokens, {how}", ratio, ">=", targets[index])
        ratio = seconds["LEAP", "eager"] / seconds["LEAP", "without mixing"]
        report.check(f"LEAP training step, {length:,} tokens, over the same step without mixing", ratio, "<=", 1.08)
    report.note(f"{tokens:,} tokens a step, AdamW, float32. Medians of {rounds} rounds; disturbed: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
