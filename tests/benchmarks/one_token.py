"""How long does one more token take in each causal family, over its linear layers alone and over GPT-2?

Batch 1, float32. The limit is the time of the model's own linear layers, called in turn on single tokens: of all streams of the
hierarchical LM that have a step at a token, on average. `eager` is a forward pass with the dynamic cache, `static` one with the
static cache, `compiled` the same compiled. `generate` is a token of greedy generation with the dynamic cache, and `generate,
compiled` one with the static cache and compiled steps. Contestants of a model take turns.
"""

import copy
import time

import harness
import torch
from decode_speed import generation, random_cache
from multigrid_step import AXIS_VOCABULARIES, LIGHT, make_ours
from torch import nn

from modeling_heptapod import (
    HierarchicalLMConfig,
    HierarchicalLMForCausalLM,
    StaticHierarchicalCache,
    StaticMultiGridCache,
    StaticRecurrentCache,
)


STREAMS = {
    "vocab_size": 256,
    "compression_factors": [1, 2, 8],
    "hidden_sizes": 224,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 56,
    "window_sizes": [32, 64, None],
    "next_latent_loss_weight": 0.0,
}


TAGS = "compiled, dict tags"


class Steps:
    """Feeds given tokens one at a time into a copy of a cache, or into the cache itself where `in_place`.

    Calling it returns seconds per token.
    """

    def __init__(self, model, cache, tokens, run=None, in_place=False):
        self.cache, self.run, self.in_place = cache, model if run is None else run, in_place
        self.tokens = tokens

    @torch.inference_mode()
    def __call__(self):
        cache = self.cache if self.in_place else copy.deepcopy(self.cache)
        began = time.perf_counter()
        self.feed(cache)
        return (time.perf_counter() - began) / len(self.tokens)

    def feed(self, cache):
        logits = []
        for inputs in self.tokens:
            getattr(cache, "prepare_step", lambda: None)()
            logits.append(self.run(**inputs, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, dim=1)


class LinearLayers:
    """Seconds of a token's linear layers: a call of each on one token, weighted by how often it is called for one."""

    def __init__(self, model, tokens):
        self.tokens, self.calls = tokens, []
        config = model.config
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or "auxiliary_losses" in name:
                continue
            stride = 1
            parts = name.split(".")
            if isinstance(model, HierarchicalLMForCausalLM) and ("blocks" in parts or "compressors" in parts):
                stride = config.strides[int(parts[parts.index("blocks" if "blocks" in parts else "compressors") + 1])]
            self.calls.append((module, torch.randn(1, 1, module.in_features), stride))

    @torch.inference_mode()
    def __call__(self):
        began = time.perf_counter()
        for token in range(self.tokens):
            for module, x, stride in self.calls:
                if token % stride == 0:
                    module(x)
        return (time.perf_counter() - began) / self.tokens


def given(ids, axis_ids, start, end):
    """Arguments of a forward pass of some tokens."""
    tracks = {} if axis_ids is None else {"axis_ids": axis_ids[:, :, start:end]}
    return {"input_ids": ids[:, start:end], **tracks}


@torch.no_grad()
def filled(model, cache, ids, axis_ids, length):
    for start in range(0, length, 4_096):
        cache = model(
            **given(ids, axis_ids, start, min(start + 4_096, length)), past_key_values=cache, use_cache=True
        ).past_key_values
    return cache


def measure(report, name, model, static_class, context, steps, rounds, peers=(), axes=0):
    """Rows of one model after `context` tokens, and the seconds of all contestants."""
    model = model.eval()
    total = context + (2 + 4 * rounds) * steps  # the compiled contestant goes on in one cache
    ids = torch.randint(0, 256, (1, total))
    axis_ids = None
    if axes:
        axis_ids = torch.stack([torch.randint(0, size, (1, total)) for size in AXIS_VOCABULARIES[:axes]], dim=1)
    tokens = [given(ids, axis_ids, at, at + 1) for at in range(context, context + steps)]
    dynamic = filled(model, None, ids, axis_ids, context)
    static = filled(model, static_class(model.config, total), ids, axis_ids, context)
    contestants = {
        "linear layers": LinearLayers(model, steps),
        "eager": Steps(model, dynamic, tokens),
        "static": Steps(model, static, tokens),
        "compiled": Steps(model, copy.deepcopy(static), tokens, torch.compile(model), in_place=True),
    }
    with torch.inference_mode():
        expected = contestants["eager"].feed(copy.deepcopy(dynamic))
    for how in ("static", "compiled"):
        require_equal(name, how, contestants[how], expected)
    contestants.update({peer: Steps(other, cache, tokens) for peer, (other, cache) in dict(peers).items()})
    seconds, disturbed = harness.in_turns(contestants, rounds)
    for how, each in seconds.items():
        report.row(
            model=name,
            how=how,
            context=context,
            ms=each * 1e3,
            over_linear_layers=None if how in dict(peers) else each / seconds["linear layers"],
        )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        tagged = Steps(model, copy.deepcopy(static), tokens, torch.compile(model), in_place=True)
        require_equal(name, TAGS, tagged, expected)
        again, noisy = harness.in_turns({"eager": contestants["eager"], TAGS: tagged}, rounds)
    seconds[TAGS] = again[TAGS] * seconds["eager"] / again["eager"]
    report.row(
        model=name,
        how=TAGS,
        context=context,
        ms=seconds[TAGS] * 1e3,
        over_linear_layers=seconds[TAGS] / seconds["linear layers"],
    )
    report.check(f"{name}: compiled with dict tags over eager", again[TAGS] / again["eager"], "<=", 1.0)
    return seconds, disturbed + noisy


@torch.inference_mode()
def require_equal(name, how, contestant, expected):
    """Require the logits of eager steps."""
    cache = contestant.cache if contestant.in_place else copy.deepcopy(contestant.cache)
    error = (contestant.feed(cache) - expected).abs().max().item()
    harness.require(error < 1e-4, f"{name}: {how} steps differ from eager ones by {error:.1e}")


def main():
    report, quick = harness.start("One token over its linear layers")
    steps, rounds, contexts = (4, 2, (8, 16)) if quick else (32, 9, (64, 1_024))
    disturbed = 0

    positions = contexts[1] + (4 + 4 * rounds) * steps
    leap = harness.leap()
    seconds, noisy = measure(report, "LEAP", leap, StaticRecurrentCache, contexts[1], steps, rounds)
    disturbed += noisy
    best = min(seconds["eager"], seconds["compiled"], seconds[TAGS])
    report.check("LEAP: one token, forward, over its linear layers alone", best / seconds["linear layers"], "<=", 1.5)

    gpt2 = harness.gpt2(positions).eval()
    for context, target in zip(contexts, (2.0, 3.5)):
        ids = torch.randint(0, 256, (1, context))
        timers = {name: generation(model, ids, steps) for name, model in (("LEAP", leap), ("GPT-2", gpt2))}
        seconds, noisy = harness.in_turns(timers, rounds)
        disturbed += noisy
        for name, each in seconds.items():
            report.row(model=name, how="generate", context=context, ms=each * 1e3, over_linear_layers=None)
        ratio = seconds["GPT-2"] / seconds["LEAP"]
        report.check(f"LEAP: generate per token, {context:,} tokens of prompt: GPT-2 over it", ratio, ">=", target)

    for strides in ([1, 1, 1], [1, 2, 8]):
        shape = {**STREAMS, **({"num_hidden_layers": 1} if quick else {})}
        config = HierarchicalLMConfig(**shape, strides=strides, max_position_embeddings=2 * contexts[1])
        name = f"hierarchical LM, strides {', '.join(map(str, strides))}"
        model = HierarchicalLMForCausalLM(config)
        seconds, noisy = measure(report, name, model, StaticHierarchicalCache, contexts[1], steps, rounds)
        disturbed += noisy
        best = min(seconds["eager"], seconds["compiled"], seconds[TAGS])
        report.check(f"{name}: one token over its linear layers alone", best / seconds["linear layers"], "<=", 1.3)

    plain = make_ours(harness.SHAPE, positions, 0).eval()
    peer = (gpt2, random_cache(gpt2, contexts[1], steps))
    seconds, noisy = measure(
        report, "MultiGrid, no axes", plain, StaticMultiGridCache, contexts[1], steps, rounds, {"GPT-2": peer}
    )
    disturbed += noisy
    ratio = seconds["eager"] / seconds["GPT-2"]
    report.check("MultiGrid without axes over GPT-2, one token at 1,024", ratio, "<=", 1.0)
    light = make_ours(harness.SHAPE, positions, 4, axis_hidden_size=harness.SHAPE["hidden_size"] // 4, **LIGHT)
    name = "MultiGrid, four light axes"
    seconds, noisy = measure(report, name, light, StaticMultiGridCache, contexts[1], steps, rounds, axes=4)
    disturbed += noisy
    best = min(seconds["eager"], seconds["compiled"], seconds[TAGS])
    report.check("MultiGrid: four light axes over its linear layers", best / seconds["linear layers"], "<=", 1.5)

    report.note(
        "LEAP, GPT-2 and MultiGrid have 4 layers of width 256; the hierarchical LM 6 layers of 224, factors 1, 2, 8."
    )
    report.note(f"Batch 1, float32. Medians of {rounds} rounds of {steps} tokens; disturbed: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
