"""Does generation from a LEAP model cost the same after 1,000 tokens of context and after 100,000?

Bytes of state, and milliseconds per token in turns from one process.
"""

import time

import harness
import torch


PREFILL_CHUNK = 4_096


@torch.no_grad()
def fill(model, ids, cache=None):
    """State after `ids`, fed in chunks."""
    for chunk in ids.split(PREFILL_CHUNK, dim=1):
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def state_bytes(cache):
    """Bytes of all storages that the cache's layers refer to."""
    storages = {}
    for layer in cache.layers:
        found = [x for x in torch.utils._pytree.tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
        storages.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found})
    return sum(storages.values())


@torch.no_grad()
def time_steps(model, cache, ids):
    """Seconds per token, feeding `ids` one at a time."""
    tokens = ids.split(1, dim=1)
    began = time.perf_counter()
    for token in tokens:
        model(token, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - began) / len(tokens)


def main():
    report, quick = harness.start("State and speed of generation against the length of the context")
    contexts = (64, 640) if quick else (1_000, 32_000, 100_000)
    steps, rounds = (4, 2) if quick else (64, 15)

    model = harness.leap().eval()
    ids = torch.randint(0, 256, (1, contexts[-1]))
    with torch.no_grad():
        short = ids[:, : contexts[0]]
        parallel = model(short).logits[:, -1]
        got = model(short[:, -1:], past_key_values=fill(model, short[:, :-1]), use_cache=True).logits[:, -1]
    difference = (got - parallel).abs().max().item()
    harness.require(difference < 1e-4, f"a step from the state differs from the parallel forward by {difference:.1e}")

    caches = {n: fill(model, ids[:, :n]) for n in contexts}
    seconds, disturbed = harness.in_turns(
        {n: lambda cache=cache: time_steps(model, cache, ids[:, :steps]) for n, cache in caches.items()}, rounds
    )
    config = model.config
    for n, cache in caches.items():
        report.row(
            context=n,
            state_bytes=state_bytes(cache),
            GPT2_cache_bytes=2 * 4 * config.num_hidden_layers * config.hidden_size * n,
            ms_per_token=seconds[n] * 1e3,
            over_the_shortest=seconds[n] / seconds[contexts[0]],
        )
    growth = state_bytes(caches[contexts[-1]]) - state_bytes(caches[contexts[0]])
    report.check(f"bytes of state at {contexts[-1]:,} tokens less those at {contexts[0]:,}", growth, "==", 0)
    middle = contexts[1]
    report.check(
        f"time per token at {middle:,} over {contexts[0]:,}", seconds[middle] / seconds[contexts[0]], "<=", 1.1
    )
    report.note("4 layers of width 256, batch 1, eager, float32; GPT-2's keys and values are computed, not measured.")
    report.note(
        f"Medians of {rounds} rounds of {steps} tokens each; rounds disturbed by other processes: {disturbed}."
    )
    report.finish()


if __name__ == "__main__":
    main()
