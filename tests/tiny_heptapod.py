"""Small grid models for tests: large random weights, so that a wrong neighbour shows in the logits."""

import torch

import modeling_heptapod
from tests.tiny import build_tiny


MASK, PAD = 18, 19

# One entry a way in which models differ; every test that is about all of them runs over these.
VARIANTS = {
    "default": {},
    "local": {"attention_types": ["local", "local"], "local_radius": [1, 2]},
    "dilated": {"attention_types": ["dilated", "dilated"], "local_radius": 1, "dilation": [2, 3]},
    "global": {"attention_types": ["global", "global"], "rope_theta": 1000.0},
    "no borders": {"use_absolute_position_embeddings": False, "local_radius": [1, 2], "dilation": 3},
    "split": {"attention_types": ["local", "dilated"], "local_radius": 1, "num_global_heads": 1},
    "feedback": {"self_conditioning": True, "tie_word_embeddings": True, "intermediate_size": 24},
    "adaptive": {
        "adaptive_span": True,
        "span_loss_weight": 0.5,
        "use_relative_position_bias": True,
        "num_global_heads": 1,
        "dilation": 2,
    },
    "neighbors": {"neighbor_loss_weight": 0.5, "attention_types": ["local", "global"], "local_radius": 1},
}


def tiny_config(**overrides):
    """A configuration of two layers, one of them dilated, width 32, 20 tokens, the last two of them mask and pad."""
    values = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_types": ["local", "dilated"],
        "local_radius": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    }
    return modeling_heptapod.HeptapodConfig(**{**values, **overrides})


def tiny_heptapod(head="HeptapodForMaskedLM", seed=0, **overrides):
    """As `build_tiny`, with random feedback, which starts at zero."""
    return build_tiny(head, tiny_config(**overrides), seed, also="self_conditioning")


def random_page(batch, height, width, seed=1):
    """Tokens `[batch, height, width]`, none of them mask or pad."""
    return torch.randint(MASK, (batch, height, width), generator=torch.Generator().manual_seed(seed))
