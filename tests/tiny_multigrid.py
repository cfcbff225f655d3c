"""Small MultiGrid models for tests: large random weights, so that a wrong state shows in the logits."""

import torch

import modeling_heptapod
from tests.tiny import build_tiny, mostly_slow, random_ids


TWO_AXES = {"axis_names": ["kind", "bracket"], "axis_vocab_sizes": [7, 5]}
# One entry a way in which models differ; every test that is about all of them runs over these.
VARIANTS = {
    "plain": {},
    "axis": {"axis_names": ["kind"], "axis_vocab_sizes": [7]},
    "axes": TWO_AXES,
    "weights": {
        "axis_names": ["kind", "bracket", "depth"],
        "axis_vocab_sizes": [7, 5, 3],
        "axis_weights": [0.5, 0.3, 0.4],
    },
    "light": {**TWO_AXES, "axis_hidden_size": 8, "cross_feed_forward": False},
    "factored": {**TWO_AXES, "axis_order": "factored"},
    "leap": {**TWO_AXES, "core": "leap", "window_sizes": [None, 3]},
    "leap-factored": {**TWO_AXES, "core": "leap", "window_sizes": [4, None], "axis_order": "factored"},
    "leap-light": {**TWO_AXES, "core": "leap", "axis_hidden_size": 8},
    "lstm": {**TWO_AXES, "core": "lstm"},
    "lstm-factored": {**TWO_AXES, "core": "lstm", "axis_order": "factored", "axis_hidden_size": 8},
    "leap-plain": {"core": "leap"},
    "lstm-plain": {"core": "lstm"},
}
# The same for tests that take long.
SOME_FAST = mostly_slow(VARIANTS, ("plain", "light", "factored", "leap-factored", "lstm"))


def tiny_config(**overrides):
    """A configuration of two layers, width 16, two heads."""
    values = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return modeling_heptapod.MultiGridConfig(**{**values, **overrides})


def tiny_multigrid(head="MultiGridForCausalLM", seed=0, **overrides):
    """As `build_tiny`."""
    return build_tiny(head, tiny_config(**overrides), seed)


def random_grid(model, batch, seq, seed=1):
    """`input_ids` and `axis_ids` for a model, from its whole vocabularies."""
    config = model.config
    tracks = [random_ids(batch, seq, size, seed + 1 + i) for i, size in enumerate(config.axis_vocab_sizes)]
    axis_ids = torch.stack(tracks, dim=1) if tracks else torch.zeros(batch, 0, seq, dtype=torch.long)
    return {"input_ids": random_ids(batch, seq, config.vocab_size, seed), "axis_ids": axis_ids}


__all__ = ["SOME_FAST", "TWO_AXES", "VARIANTS", "random_grid", "random_ids", "tiny_config", "tiny_multigrid"]
