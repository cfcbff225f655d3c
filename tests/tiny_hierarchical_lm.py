"""Small hierarchical LMs for tests: large random weights, so that a wrong state shows in the logits."""

import modeling_heptapod
from tests.tiny import build_tiny, mostly_slow, random_ids


# One entry a way in which models differ; every test that is about all of them runs over these.
VARIANTS = {
    "plain": {"compression_factors": 1, "window_sizes": None},
    "two": {"compression_factors": [1, 2], "window_sizes": [5, None]},
    "widths": {"compression_factors": [1, 2, 4], "hidden_sizes": [16, 24, 32], "window_sizes": [4, 0, 3]},
    "stride": {
        "compression_factors": [1, 2, 8],
        "strides": [1, 1, 4],
        "window_sizes": [5, 4, 3],
        "hidden_sizes": [16, 24, 32],
    },
    "hourglass": {"compression_factors": [1, 4, 16], "strides": [1, 1, 16], "window_sizes": [6, None, None]},
    "predict-all": {
        "compression_factors": [1, 2, 4],
        "strides": [1, 2, 4],
        "window_sizes": None,
        "predict_from_all": True,
    },
    "merge-all": {
        "compression_factors": [4, 1, 2],
        "strides": [2, 1, 2],
        "window_sizes": [2, 3, None],
        "merge_into": "all",
        "predict_hierarchy": 2,
    },
    "blocks": {
        "compression_factors": [1, 2, 4],
        "strides": [1, 1, 2],
        "window_sizes": [4, 3, 2],
        "window_type": "block",
        "attention_norm": "layer_norm",
        "use_xpos": [True, False, True],
    },
    "cross": {
        "compression_factors": [1, 2, 8],
        "strides": [1, 1, 4],
        "window_sizes": [5, None, 1],
        "merge": "cross_attention",
        "hidden_sizes": [16, 24, 32],
    },
    "cross-all": {
        "compression_factors": [1, 4],
        "strides": [1, 4],
        "window_sizes": [1, None],
        "window_type": "block",
        "merge": "cross_attention",
        "merge_into": "all",
        "merge_direction": "coarse_to_fine",
        "shared_attention": True,
    },
    "attention-compressor": {
        "compression_factors": [1, 4, 8],
        "strides": [1, 1, 4],
        "compressor": ["conv", "attention", "attention"],
        "window_sizes": [0, 4, None],
        "shared_attention": True,
    },
    "no-attention": {"compression_factors": [1, 2], "strides": [1, 2], "window_sizes": 0},
}
# The same for tests that take long.
SOME_FAST = mostly_slow(VARIANTS, ("plain", "two", "stride", "predict-all", "blocks", "cross-all"))


def tiny_config(**overrides):
    """A configuration of two layers, width 16."""
    values = {
        "vocab_size": 50,
        "compression_factors": [1, 2],
        "hidden_sizes": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "mlp_ratio": 2,
        "window_sizes": [5, None],
        "xpos_scale_base": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return modeling_heptapod.HierarchicalLMConfig(**{**values, **overrides})


def tiny_hierarchical_lm(head="HierarchicalLMForCausalLM", seed=0, **overrides):
    """As `build_tiny`."""
    return build_tiny(head, tiny_config(**overrides), seed)


__all__ = ["SOME_FAST", "VARIANTS", "random_ids", "tiny_config", "tiny_hierarchical_lm"]
