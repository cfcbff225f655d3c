"""Small LEAP models for tests: large random weights, so that a wrong state shows in the logits."""

import modeling_heptapod
from tests.tiny import build_tiny, random_ids


# One entry a way in which models differ; every test that is about all of them runs over these.
VARIANTS = {
    "default": {},
    "exp": {"weight_function": "exp", "output_gate": "gelu", "sink_weight": 0.3},
    "plain-scale": {"rescale": None, "position_embedding_type": "none", "window_sizes": [3, None, 1, 40]},
    "alibi": {"position_embedding_type": "alibi", "output_gate": "none", "window_sizes": [None, 70, 5, None]},
    "alibi-null": {"position_embedding_type": "alibi", "sink_weight": 1e-2},
    "absolute": {"position_embedding_type": "absolute", "num_attention_heads": 2},
    "additive": {"mixer": "additive"},
    "additive-alibi": {"mixer": "additive", "position_embedding_type": "alibi", "sink_weight": 0.1, "rescale": None},
}


def tiny_config(**overrides):
    """A configuration of four layers, one of them global, width 32."""
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return modeling_heptapod.LeapConfig(**{**values, **overrides})


def tiny_leap(head="LeapForCausalLM", seed=0, **overrides):
    """As `build_tiny`."""
    return build_tiny(head, tiny_config(**overrides), seed)


__all__ = ["VARIANTS", "random_ids", "tiny_config", "tiny_leap"]
