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
    dtype, device, height, width = torch.promote_types(q.dtype, torch.float32), q.device, *q.shape[2:4]
    (rows, down), (columns, across) = (_neighbours(length, radius, dilation, device) for length in (height, width))
    visible = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[
        None, :, None, :
    ]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    if padding_mask is not None:
        visible = visible & padding_mask[:, None, rows][:, :, :, :, columns].transpose(3, 4)

    def windows(x):
        """`[batch, heads, height, width, channels]` -> `[batch, heads, height, width, side, side, channels]`"""
        return x.to(dtype)[:, :, rows][:, :, :, :, columns].transpose(3, 4)

    with torch.autocast(device.type, enabled=False):
        logits = scale * torch.einsum("bhyxc,bhyxijc->bhyxij", q.to(dtype), windows(k))
        if bias is not None:
            logits = logits + bias.to(dtype)[:, down + radius][:, :, across + radius][:, None, None]
        share = visible.to(dtype)
        if span is not None:
            distance = torch.maximum(down.abs()[:, None], across.abs()[None, :])
            share = share * (span.to(dtype)[..., None, None] + 1 - distance).clamp(0, 1)
        logits = logits.masked_fill(share == 0, MASKED_LOGIT)
        weights = normalise(logits.flatten(-2), share.flatten(-2))
        weights = nn.functional.dropout(weights, dropout).view(logits.shape)
        return torch.einsum("bhyxij,bhyxijc->bhyxc", weights, windows(v)).to(q.dtype)


def _neighbours(length, radius, dilation, device):
    """Places of the neighbours of each cell along an axis, `[length, side]`, and their offsets `[side]`.

    Offsets that lead beyond the grid from every cell are left out, except in compiled graphs, which then take other sizes.
    """
    reach = radius if torch.compiler.is_compiling() else min(radius, (length - 1) // dilation)
    offset = torch.arange(-reach, reach + 1, device=device)
    return torch.arange(length, device=device)[:, None] + dilation * offset, offset


def normalise(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Weights `[..., keys]` in proportion to `share * exp(logits)`; zeros where no key has a share."""
    weights = share * (logits - logits.detach().amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


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


__all__ = ["adaptive_attention", "bias_matrix", "normalise", "span_matrix"]
