"""How the kernels of windowed attention lay out steps, on CPUs and GPUs."""

import torch


LONGEST = 1024  # keys of a window


def new_steps(like: torch.Tensor) -> torch.Tensor:
    """Memory for a result `[batch, length, heads, head_dim]`, contiguous, as linear layers take it."""
    return like.new_empty(like.shape)


def new_totals(like: torch.Tensor) -> torch.Tensor:
    """Memory for two numbers of each query, `[2, batch, heads, length]` in float32."""
    batch, length, heads, _ = like.shape
    return like.new_empty(2, batch, heads, length, dtype=torch.float32)


def with_channels_together(steps: torch.Tensor) -> torch.Tensor:
    """The same steps with the channels of each side by side."""
    return steps if steps.stride(-1) == 1 or steps.shape[-1] == 1 else steps.contiguous()


__all__ = ["LONGEST", "new_steps", "new_totals", "with_channels_together"]
