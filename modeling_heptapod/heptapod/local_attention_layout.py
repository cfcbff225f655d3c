"""How the kernels of local attention lay out cells, on CPUs and GPUs."""

import torch


WIDEST = 32  # radius


def new_cells(like: torch.Tensor) -> torch.Tensor:
    """Memory for a result `[batch, heads, height, width, head_dim]`, heads side by side, as linear layers take them."""
    batch, heads, height, width, dim = like.shape
    return like.new_empty(batch, height, width, heads, dim).permute(0, 3, 1, 2, 4)


def new_totals(like: torch.Tensor) -> torch.Tensor:
    """Memory for two numbers of each query, `[2, batch, heads, height, width]` in float32."""
    return like.new_empty(2, *like.shape[:4], dtype=torch.float32)


def with_channels_together(cells: torch.Tensor) -> torch.Tensor:
    """The same cells with the channels of each side by side."""
    return cells if cells.stride(-1) == 1 or cells.shape[-1] == 1 else cells.contiguous()


__all__ = ["WIDEST", "new_cells", "new_totals", "with_channels_together"]
