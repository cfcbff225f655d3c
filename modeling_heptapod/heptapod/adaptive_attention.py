"""Attention to adapted windows in torch: with a bias for each offset, and with spans that depend on the cell.

The kernels of `local_attention_operator.py` compute the same in less memory. See `local_attention` for the arguments.
"""

import torch
from torch import nn

from .tiled_attention import MASKED_LOGIT


def adaptive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    span: torch.Tensor | None,
    bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attention of checked inputs. Time and memory are those of the window times the grid."""
    dtype, height, width = torch.promote_types(q.dtype, torch.float32), *q.shape[2:4]
    real = q.new_ones(1, 1, height, width, 1, dtype=torch.bool)
    if padding_mask is not None:
        real = padding_mask[:, None, :, :, None]
    with torch.autocast(q.device.type, enabled=False):
        keys, values = (_windows(x.to(dtype), radius, dilation) for x in (k, v))
        logits = scale * torch.einsum("bhyxc,bhyxcij->bhyxij", q.to(dtype), keys)
        visible = _windows(real, radius, dilation).squeeze(4)
        if bias is not None:
            logits = logits + bias.to(dtype)[:, None, None]
        if span is None:
            share = visible.to(dtype)
        else:
            share = (span.to(dtype)[..., None, None] + 1 - distances(radius, q.device)).clamp(0, 1) * visible
        logits = logits.masked_fill(share == 0, MASKED_LOGIT)
        weights = normalise(logits.flatten(-2), share.flatten(-2))
        weights = nn.functional.dropout(weights, dropout).unflatten(-1, (2 * radius + 1, 2 * radius + 1))
        return torch.einsum("bhyxij,bhyxcij->bhyxc", weights, values).to(q.dtype)


def normalise(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Weights `[..., keys]` in proportion to `share * exp(logits)`; zeros where no key has a share."""
    weights = share * (logits - logits.detach().amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def distances(radius: int, device: torch.device) -> torch.Tensor:
    """Distance in neighbours of each offset of a window, `[side, side]`: down or across, whichever is larger."""
    offset = torch.arange(-radius, radius + 1, device=device).abs()
    return torch.maximum(offset[:, None], offset[None, :])


def span_matrix(span: torch.Tensor, dilation: int) -> torch.Tensor:
    """Share `[batch, heads, cells, cells]` with which each cell counts for each query, from spans."""
    height, width = span.shape[2:]
    down, across = (_offsets(length, span.device).abs() for length in (height, width))
    distance = torch.maximum(down[:, None, :, None], across[None, :, None, :]) / dilation
    return (span[..., None, None] + 1 - distance).clamp(0, 1).flatten(4).flatten(2, 3)


def bias_matrix(bias: torch.Tensor, height: int, width: int, dilation: int) -> torch.Tensor:
    """Bias `[heads, cells, cells]` of each cell for each query. Of cells outside of a window it is that of another offset."""
    radius = bias.shape[-1] // 2
    down, across = (
        (_offsets(length, bias.device) // dilation + radius).clamp(0, 2 * radius) for length in (height, width)
    )
    by_row = bias[:, down]  # [heads, height, height, side]
    return by_row[..., across].permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def _offsets(length, device):
    """Distance from each query to each key along an axis, `[length, length]`."""
    place = torch.arange(length, device=device)
    return place[None, :] - place[:, None]


def _windows(x, radius, dilation):
    """`[batch, heads, height, width, channels]` -> `[batch, heads, height, width, channels, side, side]`, a view."""
    border = radius * dilation
    x = nn.functional.pad(x, (0, 0, border, border, border, border))
    x = x.unfold(2, 2 * border + 1, 1).unfold(3, 2 * border + 1, 1)
    return x[..., ::dilation, ::dilation]


__all__ = ["adaptive_attention", "bias_matrix", "distances", "normalise", "span_matrix"]
