"""How many milliseconds does the hierarchical LM take for one more token, and does that grow with the context?

The peer is the prototype's `generate` with the same weights: the first configuration of its README in a smaller width. It
computes everything again for every token, ours goes on from its cache. GPT-2 with its cache has as many layers of the same
width, but one stream where these have three. All are timed in `generate`, greedy, batch 1, without the prefill.
"""

import copy
import time

import harness
import torch


SHAPE = {"num_tokens": 256, "dim": 224, "depth": 6, "heads": 4, "dim_head": 56, "hierarchies": (1, 2, 8)}
NO_LOSSES = {"recon_loss_weight": 0.0, "next_latent_loss_weight": 0.0}
CONTEXT = 1_024
CONTEXTS = (1_024, 2_048, 4_096, 8_192)


class Generation:
    """`generate` from a cache of all but the last token of the prompt; calling it returns seconds per token."""

    def __init__(self, model, prompt, new_tokens):
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        self.cache = None
        with torch.no_grad():
            for chunk in prompt[:, :-1].split(4_096, dim=1):
                self.cache = model(chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1).past_key_values

    def written(self, cache):
        return self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            past_key_values=cache,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    def __call__(self):
        cache = copy.deepcopy(self.cache)
        began = time.perf_counter()
        self.written(cache)
        return (time.perf_counter() - began) / self.new_tokens


def prototype_generation(model, prompt, new_tokens):
    """The same for the prototype, which has neither cache nor prefill."""

    def run():
        began = time.perf_counter()
        model.generate(prompt, new_tokens)
        return (time.perf_counter() - began) / new_tokens

    return run


@torch.no_grad()
def check_same_model(peer, model, ids):
    """Ours has the prototype's logits, whole and one token at a time, and writes without a cache what it writes with it."""
    expected = peer(ids)
    difference = (model(ids).logits - expected).abs().max().item()
    harness.require(difference < 1e-4, f"logits differ from the prototype's by {difference:.1e}")
    half = ids.shape[1] // 2
    cache = model(ids[:, :half], use_cache=True).past_key_values
    steps = torch.cat([model(x, past_key_values=cache).logits for x in ids[:, half:].split(1, 1)], dim=1)
    difference = (steps - expected[:, half:]).abs().max().item()
    harness.require(difference < 1e-4, f"steps differ from the whole by {difference:.1e}")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = [model.generate(ids[:, :half], use_cache=use_cache, **options) for use_cache in (True, False)]
    harness.require(torch.equal(*written), "greedy tokens differ with and without a cache")


def main():
    report, quick = harness.start("Decoding the hierarchical LM against the prototype")
    shape = {**SHAPE, **({"dim": 32, "depth": 2, "dim_head": 8} if quick else {})}
    context, contexts = (48, (48, 96)) if quick else (CONTEXT, CONTEXTS)
    new_tokens, rounds = (4, 2) if quick else (48, 9)

    peer, ours = harness.hierarchical_pair(**shape, **NO_LOSSES, seq_len=2 * context, window_sizes=(32, 64, None))
    ids = torch.randint(0, 256, (1, contexts[-1]))
    prompt = ids[:, :context]
    check_same_model(peer, ours, ids[:, : min(context, 96)])
    width, layers = shape["dim"], shape["depth"]
    gpt2 = harness.gpt2(
        context + new_tokens, hidden_size=width, num_hidden_layers=layers, num_attention_heads=shape["heads"]
    ).eval()
    contestants = {
        "ours": Generation(ours, prompt, new_tokens),
        "prototype": prototype_generation(peer, prompt, 1 if quick else 2),
        "GPT2": Generation(gpt2, prompt, new_tokens),
    }
    seconds, disturbed = harness.in_turns(contestants, rounds)
    ratio = seconds["prototype"] / seconds["ours"]
    report.row(
        model="windows 32, 64, none",
        context=context,
        ours_ms=seconds["ours"] * 1e3,
        prototype_ms=seconds["prototype"] * 1e3,
        prototype_over_ours=ratio,
        GPT2_ms=seconds["GPT2"] * 1e3,
    )
    report.check(f"prototype over ours, {context:,} tokens of context", ratio, ">=", 15.0)

    _, windowed = harness.hierarchical_pair(**shape, **NO_LOSSES, seq_len=2 * contexts[-1], window_sizes=(32, 64, 64))
    contestants = {each: Generation(windowed, ids[:, :each], new_tokens) for each in contexts}
    seconds, more = harness.in_turns(contestants, rounds)
    disturbed += more
    for each in contexts:
        report.row(model="windows 32, 64, 64", context=each, ours_ms=seconds[each] * 1e3)
    growth = max(seconds.values()) / min(seconds.values())
    report.check("slowest over fastest context where every hierarchy has a window", growth, "<=", 1.15)

    millions = ours.num_parameters() / 1e6
    report.note(
        f"{millions:.1f} million parameters: {layers} layers, hierarchies 1, 2 and 8 of width {width}, over bytes; "
        f"GPT-2: {gpt2.num_parameters() / 1e6:.1f} million, {layers} layers of width {width}. float32, batch 1."
    )
    report.note(f"Medians of {rounds} rounds of {new_tokens} tokens (prototype: 2); disturbed: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
