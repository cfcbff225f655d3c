"""Small LEAP models for tests: large random weights, so that a wrong state shows in the logits."""

import torch

import modeling_heptapod


# One entry a way in which models differ; every test that is about all of them runs over these.
VARIANTS = {
    "default": {},
    "exp": {"weight_function": "exp", "query_gate": "gelu", "null_weight": 0.3},
    "plain-scale": {"rescale": None, "position_embedding_type": "none", "window_sizes": [3, None, 1, 40]},
    "decay": {"position_embedding_type": "decay", "query_gate": "none", "window_sizes": [None, 70, 5, None]},
    "decay-null": {"position_embedding_type": "decay", "null_weight": 1e-2},
    "learned": {"position_embedding_type": "learned", "num_attention_heads": 2},
    "additive": {"mixer": "additive"},
    "additive-decay": {"mixer": "additive", "position_embedding_type": "decay", "null_weight": 0.1, "rescale": None},
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
    """A model in evaluation mode. Biases and norms are random as well, so that none of them can be forgotten."""
    torch.manual_seed(seed)
    model = getattr(modeling_heptapod, head)(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_ids(batch, seq, vocab_size=50, seed=1):
    """Token ids `[batch, seq]` from the whole vocabulary."""
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
