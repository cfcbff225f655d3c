"""What the tiny models of all families have in common."""

import torch

import modeling_heptapod


def build_tiny(head: str, config, seed: int, also: str = "norm"):
    """A model in evaluation mode. Biases, norms and what has `also` in its name are random, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = getattr(modeling_heptapod, head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or also in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_ids(batch, seq, vocab_size=50, seed=1):
    """Token ids `[batch, seq]` from the whole vocabulary."""
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
