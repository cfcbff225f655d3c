"""How many milliseconds does one more token take, against GPT-2 of equal shape with its cache?

Batch 1. Both models are called directly, one given token at a time, without the bookkeeping of `generate` (which is
timed beside it). GPT-2's cache is filled with random keys and values of the right shape instead of by a prefill of
32,000 tokens: its arithmetic takes as long for any numbers. The prototype has no cache and is left out.
"""

import copy
import time

import harness
import torch
from transformers import DynamicCache, StaticCache

from modeling_heptapod import StaticRecurrentCache


TARGETS = {1_024: 2.0, 8_192: 9.0, 32_768: 70.0}


def random_cache(model, length, steps, static=False):
    """GPT-2's cache as `length` tokens leave it."""
    config = model.config
    shape = (1, config.n_head, length, config.n_embd // config.n_head)
    cache = StaticCache(config, max_cache_len=length + steps) if static else DynamicCache(config=config)
    for layer in range(config.n_layer):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


class Stepper:
    """Feeds given tokens one at a time; calling it returns seconds per token and leaves the cache as it was."""

    def __init__(self, run, cache, tokens):
        self.run, self.cache, self.tokens = run, cache, tokens.split(1, dim=1)

    @torch.inference_mode()
    def logits(self):
        cache = copy.deepcopy(self.cache)
        return torch.cat(
            [self.run(token, past_key_values=cache, use_cache=True).logits for token in self.tokens], dim=1
        )

    @torch.inference_mode()
    def __call__(self):
        cache = copy.deepcopy(self.cache)
        began = time.perf_counter()
        for token in self.tokens:
            self.run(token, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - began) / len(self.tokens)


class CompiledStepper(Stepper):
    """The same on a compiled forward, whose graph knows the addresses in the cache: it runs on in the same one."""

    @torch.inference_mode()
    def __call__(self):
        began = time.perf_counter()
        for token in self.tokens:
            self.run(token, past_key_values=self.cache, use_cache=True)
        return (time.perf_counter() - began) / len(self.tokens)


@torch.no_grad()
def fill(model, ids, cache=None):
    for chunk in ids.split(4_096, dim=1):
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def generation(model, prompt, new_tokens):
    """A timer for `generate` that leaves the prefill out: seconds per token beyond the first."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run():
        marks = []
        for count in (1, 1 + new_tokens):
            began = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
            marks.append(time.perf_counter() - began)
        return (marks[1] - marks[0]) / new_tokens

    return run


def check_steps(model, cache=None):
    """One token at a time from a cache gives the logits of the whole sequence."""
    ids = torch.randint(0, 256, (1, 96))
    with torch.no_grad():
        expected = model(ids).logits[:, 64:]
    stepper = Stepper(model, fill(model, ids[:, :64], cache), ids[:, 64:])
    difference = (stepper.logits() - expected).abs().max().item()
    harness.require(difference < 1e-4, f"{type(model).__name__}: steps differ from the whole by {difference:.1e}")


def main():
    report, quick = harness.start("Decoding against GPT-2 with its cache")
    contexts = (64, 128) if quick else tuple(TARGETS)
    steps, rounds, new_tokens = (4, 2, 4) if quick else (32, 15, 128)

    # Positions as GPT-2 has them, to be of equal shape; the rotary ones of the default take a row of their own.
    ours = harness.leap(
        position_embedding_type="absolute", max_position_embeddings=contexts[-1] + 2 * steps + new_tokens
    )
    ours, default, peer = (
        ours.eval(),
        harness.leap().eval(),
        harness.gpt2(contexts[-1] + 2 * steps + new_tokens).eval(),
    )
    check_steps(ours)
    check_steps(default)
    check_steps(ours, StaticRecurrentCache(ours.config))
    check_steps(peer)

    ids = torch.randint(0, 256, (1, contexts[-1]))
    tokens = torch.randint(0, 256, (1, steps))
    disturbed = 0
    for context, target in zip(contexts, TARGETS.values()):
        contestants = {
            "ours": Stepper(ours, fill(ours, ids[:, :context]), tokens),
            "default": Stepper(default, fill(default, ids[:, :context]), tokens),
            "GPT2": Stepper(peer, random_cache(peer, context, steps), tokens),
            "GPT2 static": Stepper(peer, random_cache(peer, context, steps, static=True), tokens),
        }
        seconds, noisy = harness.in_turns(contestants, rounds)
        disturbed += noisy
        report.row(
            how="eager forward",
            context=context,
            ours_ms=seconds["ours"] * 1e3,
            ours_default_ms=seconds["default"] * 1e3,
            GPT2_ms=seconds["GPT2"] * 1e3,
            GPT2_static_cache_ms=seconds["GPT2 static"] * 1e3,
            GPT2_over_ours=seconds["GPT2"] / seconds["ours"],
        )
        ratio = seconds["GPT2"] / seconds["ours"]
        report.check(f"GPT-2 over ours, {context:,} tokens of context", ratio, ">=", target)

    prompt = ids[:, : contexts[0]]
    models = {"ours": ours, "default": default, "GPT2": peer}
    contestants = {name: generation(model, prompt, new_tokens) for name, model in models.items()}
    seconds, noisy = harness.in_turns(contestants, max(2, rounds // 3))
    report.row(
        how="generate, greedy",
        context=contexts[0],
        ours_ms=seconds["ours"] * 1e3,
        ours_default_ms=seconds["default"] * 1e3,
        GPT2_ms=seconds["GPT2"] * 1e3,
        GPT2_static_cache_ms=None,
        GPT2_over_ours=seconds["GPT2"] / seconds["ours"],
    )

    compiled = torch.compile(ours)
    cache = fill(ours, prompt, StaticRecurrentCache(ours.config))
    with torch.no_grad():
        expected = Stepper(ours, fill(ours, prompt), tokens).logits()
        got = torch.cat([compiled(x, past_key_values=cache, use_cache=True).logits for x in tokens.split(1, 1)], dim=1)
    difference = (got - expected).abs().max().item()
    harness.require(difference < 1e-4, f"compiled steps differ from eager ones by {difference:.1e}")
    seconds, more = harness.in_turns({"ours": CompiledStepper(compiled, cache, tokens)}, rounds)
    report.row(
        how="compiled forward",
        context=contexts[0],
        ours_ms=seconds["ours"] * 1e3,
        ours_default_ms=None,
        GPT2_ms=None,
        GPT2_static_cache_ms=None,
        GPT2_over_ours=None,
    )
    disturbed += noisy + more
    report.note("4 layers of width 256, float32, batch 1; milliseconds per token; GPT-2's cache holds random numbers.")
    report.note("Forwards are called in inference mode, both models alike; `generate` runs under no_grad.")
    report.note("GPT-2's default cache is copied at each step; its static one is not, but has to be sized in advance.")
    report.note(f"Medians of up to {rounds} rounds of {steps} tokens; disturbed by other processes: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
