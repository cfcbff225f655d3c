"""Windowed attention on GPUs: launches of the Triton kernels, which read and write each tensor where it lies.

A program attends from a tile of queries to the keys in their windows with a softmax that is carried from chunk to chunk. For
each query the largest logit and one over the sum of the exponentials relative to it are kept, from which the backward pass
computes the weights again: once for the gradients of a tile of queries, once for those of a tile of keys. All sums are in
float32 and in a fixed order, so results do not depend on timing.

Without Triton or a CUDA device, `takes` is false and torch does it.
"""

import torch

from ..common.triton_attention import fits, padded, tile, triton
from .windowed_attention_layout import LONGEST, new_steps, new_totals, with_channels_together


if triton is not None:
    from .windowed_attention_triton_kernels import backward_keys_kernel, backward_queries_kernel, forward_kernel


def takes(q: torch.Tensor, span: int) -> bool:
    """Whether the kernels support this call: see `fits`, and up to 1024 keys in a window."""
    return fits(q) and span <= LONGEST


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: torch.Tensor, span: int, dilation: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windowed attention where `takes` is true. The arguments are those of `kernel_attention`.

    Returns:
        Output `[batch, length, heads, head_dim]`, and in float32 `[2, batch, heads, length]`: the largest logit that each query
        sees, and one over the sum of `exp(logit - largest)`, both zero for queries that see nothing.
    """
    q, k, v = (with_channels_together(x) for x in (q, k, v))
    out = new_steps(q)
    tops, shares = totals = new_totals(q)
    strides = [x.stride()[:3] for x in (q, k, v, out)]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[_programs(q, dilation)](
            q,
            k,
            v,
            reach.contiguous(),
            out,
            tops,
            shares,
            *strides,
            *_numbers(q, reach, span, dilation, scale),
            **_constants(q),
        )
    return out, totals


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    totals: torch.Tensor,
    reach: torch.Tensor,
    span: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values from that of the output and the second result of `forward`."""
    grad_out, q, k, v = (with_channels_together(x) for x in (grad_out, q, k, v))
    grad_q, grad_k, grad_v = (new_steps(q) for _ in range(3))
    tops, shares = totals
    deltas = torch.empty_like(tops)  # go from queries to keys
    read = grad_out, q, k, v, reach.contiguous(), tops, shares, deltas
    strides = [x.stride()[:3] for x in (grad_out, q, k, v, grad_q)]
    numbers = _numbers(q, reach, span, dilation, scale)
    with torch.cuda.device_of(q):
        programs, constants = _programs(q, dilation), _constants(q)
        backward_queries_kernel[programs](*read, grad_q, *strides, *numbers, **constants)
        backward_keys_kernel[programs](*read, grad_k, grad_v, *strides, *numbers, **constants)
    return grad_q, grad_k, grad_v


def _numbers(q, reach, span, dilation, scale):
    _, length, heads, _ = q.shape
    return heads, length, length if len(reach) > 1 else 0, span, dilation, float(scale)


def _constants(q):
    steps, chunk, warps = tile(q.shape[-1], q.dtype)
    return {
        "D": q.shape[-1],
        "DP": padded(q.shape[-1]),
        "TILE": steps,
        "CHUNK": chunk,
        "num_warps": warps,
    }


def _programs(q, dilation):
    """One for each tile of each phase of each head."""
    batch, length, heads, head_dim = q.shape
    steps, *_ = tile(head_dim, q.dtype)
    return (batch * heads * min(dilation, length) * triton.cdiv(triton.cdiv(length, dilation), steps),)


__all__ = ["backward", "forward", "takes"]
