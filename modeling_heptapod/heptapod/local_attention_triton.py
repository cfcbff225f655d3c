"""Local attention on a grid on GPUs: launches of the Triton kernels, which read and write each tensor where it lies.

A program attends from a tile of queries to the halo of keys around it with a softmax that is carried from chunk to chunk
of the halo. For each query the largest logit and one over the sum of the exponentials relative to it are kept, from which
the backward pass computes the weights again: once for the gradients of a tile of queries, once for those of a tile of
keys. All sums are in float32 and in a fixed order, so results do not depend on timing.

Without Triton or a CUDA device, `takes` is false and torch does it.
"""

import torch

from ..common.triton_attention import fits, padded, tile, triton
from .local_attention_layout import WIDEST, new_cells, new_totals, with_channels_together


if triton is not None:
    from .local_attention_triton_kernels import (
        backward_bias_kernel,
        backward_keys_kernel,
        backward_queries_kernel,
        forward_kernel,
    )

_WIDE = 8  # columns of a tile
_BIAS_CELLS = 64  # queries of a program that sums gradients of a bias


def takes(q: torch.Tensor, radius: int) -> bool:
    """Whether the kernels support this call: see `fits`, and a radius up to 32."""
    return fits(q) and radius <= WIDEST


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int,
    dilation: int,
    scale: float,
    padding_mask: torch.Tensor | None,
    span: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local attention where `takes` is true. The arguments are those of `local_attention`, checked.

    Returns:
        Output `[batch, heads, height, width, head_dim]`, zero for queries that see nothing, stored with the heads of a
        cell side by side; and, in float32, `[2, batch, heads, height, width]`: the largest logit that each query sees,
        and one over the sum of `exp(logit - largest)`, both zero for queries that see nothing.
    """
    q, k, v = (with_channels_together(x) for x in (q, k, v))
    mask = _bytes(padding_mask)
    span, bias = _contiguous(span), _contiguous(bias)
    out = new_cells(q)
    tops, shares = totals = new_totals(q)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[_programs(q, dilation)](
            q,
            k,
            v,
            mask,
            span,
            bias,
            out,
            tops,
            shares,
            *(x.stride()[:4] for x in (q, k, v, out)),
            *q.shape[1:4],
            radius,
            dilation,
            float(scale),
            **_constants(q),
        )
    return out, totals


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    totals: torch.Tensor,
    radius: int,
    dilation: int,
    scale: float,
    padding_mask: torch.Tensor | None,
    span: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, keys and values from that of the output and the second result of `forward`, then of `span` and
    `bias` where given.

    Padding has none as keys and values. As queries, pads that are infinite or NaN, or whose output has such a gradient, add
    nothing to those of keys and values.
    """
    grad_out, q, k, v = (with_channels_together(x) for x in (grad_out, q, k, v))
    mask = _bytes(padding_mask)
    span, bias = _contiguous(span), _contiguous(bias)
    grad_q, grad_k, grad_v = (new_cells(q) for _ in range(3))
    tops, shares = totals
    deltas = torch.empty_like(tops)  # go from queries to keys, as does `sent`
    sent = None if mask is None else torch.empty_like(tops, dtype=torch.uint8)
    grad_span = None if span is None else torch.empty_like(span)
    adapted, kept = (mask, span, bias), (tops, shares, deltas, sent)
    strides = [x.stride()[:4] for x in (grad_out, q, k, v, grad_q)]
    numbers = *q.shape[1:4], radius, dilation, float(scale)
    with torch.cuda.device_of(q):
        programs, constants = _programs(q, dilation), _constants(q)
        given = grad_out, q, k, v, *adapted
        backward_queries_kernel[programs](*given, grad_span, *kept, grad_q, *strides, *numbers, **constants)
        backward_keys_kernel[programs](*given, *kept, grad_k, grad_v, *strides, *numbers, **constants)
        grad_bias = None if bias is None else _grad_bias(given, kept[:3], strides[:4], numbers)
    return grad_q, grad_k, grad_v, *(x for x in (grad_span, grad_bias) if x is not None)


def _grad_bias(given, totals, strides, numbers):
    """Summed in parts, in a fixed order."""
    q, bias = given[1], given[-1]
    batch, heads, height, width, dim = q.shape
    blocks = triton.cdiv(height * width, _BIAS_CELLS)
    parts = bias.new_empty(blocks, batch, *bias.shape)
    sizes = {"D": dim, "DP": padded(dim), "CELLS": _BIAS_CELLS}
    programs = blocks, bias[0].numel(), batch * heads
    backward_bias_kernel[programs](*given, *totals, parts, *strides, *numbers, **sizes)
    return parts.sum((0, 1))


def _constants(q):
    cells, chunk, warps = tile(q.shape[-1], q.dtype)
    return {
        "D": q.shape[-1],
        "DP": padded(q.shape[-1]),
        "TALL": cells // _WIDE,
        "WIDE": _WIDE,
        "CHUNK": chunk,
        "num_warps": warps,
    }


def _programs(q, dilation):
    """One for each tile of each phase of each head."""
    batch, heads, height, width, head_dim = q.shape
    tall = tile(head_dim, q.dtype)[0] // _WIDE
    tiles = triton.cdiv(triton.cdiv(height, dilation), tall) * triton.cdiv(triton.cdiv(width, dilation), _WIDE)
    return (batch * heads * min(dilation, height) * min(dilation, width) * tiles,)


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


def _bytes(padding_mask):
    return None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
