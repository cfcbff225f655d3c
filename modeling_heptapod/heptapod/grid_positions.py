"""Positions on a grid: rotary ones in two dimensions, and the distances to the borders of the page."""

import torch
from torch import nn

from .configuration_heptapod import HeptapodConfig


def grid_rotary(
    height: int, width: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions (arXiv 2104.09864) in two dimensions.

    The first half of a head's channels is rotated by the row, the second half by the column. In each half of size
    `head_dim / 2`, channel `c` is paired with channel `c + head_dim / 4`; the angle is `index * theta ** (-4 c / head_dim)`.

    Returns:
        Cosines and sines, two float32 tensors of shape `[height, width, head_dim]`.

    Raises:
        ValueError: if `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"Rotary positions on a grid need a `head_dim` that is a multiple of 4, got {head_dim}.")
    frequencies = theta ** (-4 / head_dim * torch.arange(head_dim // 4, dtype=torch.float32, device=device))
    down, across = (torch.arange(length, dtype=torch.float32, device=device) for length in (height, width))
    down = (down[:, None] * frequencies).unsqueeze(1).expand(-1, width, -1)
    across = (across[:, None] * frequencies).expand(height, -1, -1)
    angles = torch.cat((down, down, across, across), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[batch, heads, height, width, head_dim]` by `grid_rotary`, in float32 at least, and casts back."""
    row_a, row_b, column_a, column_b = x.chunk(4, dim=-1)
    rotated = torch.cat((-row_b, row_a, -column_b, column_a), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


class HeptapodSinePositionEmbedding(nn.Module):
    """Absolute positions: a cell's distances to the four borders of its page, as sines and cosines of eight frequencies.

    Rotary positions are relative. On an empty page, where all cells hold the mask token, attention averages equal
    vectors, and all cells would get the same prediction.
    """

    num_frequencies = 8

    def __init__(self, config: HeptapodConfig):
        super().__init__()
        self.theta = config.rope_theta
        self.proj = nn.Linear(8 * self.num_frequencies, config.hidden_size, bias=False)

    def forward(
        self, grid_size: tuple[int, int], like: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings `[1 or batch, cells, hidden_size]` on the device and in the dtype of the tensor `like`.

        With a padding mask, a page extends from its first to its last cell that is not padding.
        """
        device = like.device  # not that of the weight, which may be offloaded
        distances = []
        for axis, length in enumerate(grid_size):
            place = torch.arange(length, device=device)[None]
            first, last = place[:, :1], place[:, -1:]
            if padding_mask is not None:
                real = padding_mask.any(2 - axis).int()
                first, last = real.argmax(1, keepdim=True), length - 1 - real.flip(1).argmax(1, keepdim=True)
            shape = (-1, length, 1) if axis == 0 else (-1, 1, length)
            distances += [x.view(shape).expand(-1, *grid_size) for x in (place - first, last - place)]
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=device) / self.num_frequencies
        angles = (torch.stack(distances, dim=-1).unsqueeze(-1) * self.theta**-steps).flatten(-2)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1) / (4 * self.num_frequencies) ** 0.5
        embeddings = self.proj(features.to(like.dtype).flatten(1, 2))
        return embeddings.to(like.dtype)  # which is another one under autocast


__all__ = ["HeptapodSinePositionEmbedding", "grid_rotary", "rotate"]
