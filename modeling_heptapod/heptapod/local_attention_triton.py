"""Local attention on a grid on GPUs: launches of the Triton kernels, which read and write each tensor where it lies.

A program attends from a tile of queries to the halo of keys around it with a softmax that is carried from chunk to chunk
of the halo. For each query the largest logit and one over the sum of the exponentials relative to it are kept, from which
the backward pass computes the weights again: once for the gradients of a tile of queries, once for those of a tile of
keys. All sums are in float32 and in a fixed order, so results do not depend on timing.

Without Triton or a CUDA device, `takes` is false and torch does it.
"""

import torch

from .local_attention_layout import WIDEST, new_cells, with_channels_together


try:
    import triton
except ImportError:
    triton = None
if triton is not None:
    from .local_attention_triton_kernels import backward_keys_kernel, backward_queries_kernel, forward_kernel

_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_DIM = 128


def takes(q: torch.Tensor, radius: int) -> bool:
    """Whether the kernels support this call: CUDA devices, float32 and half precision, 128 channels, a radius of 32."""
    return (
        triton is not None
        and q.device.type in _DEVICES
        and q.dtype in _DTYPES
        and q.numel() > 0
        and q.shape[-1] <= _MOST_DIM
        and radius <= WIDEST
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int,
    dilation: int,
    scale: float,
    padding_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local attention where `takes` is true. The arguments are those of `local_attention`, checked.

    Returns:
        Output `[batch, heads, height, width, head_dim]`, zero for queries that see nothing, stored with the heads of a
        cell side by side; and, in float32, `[2, batch, heads, height, width]`: the largest logit that each query sees,
        and one over the sum of `exp(logit - largest)`, both zero for queries that see nothing.
    """
    q, k, v = (with_channels_together(x) for x in (q, k, v))
    mask = _bytes(padding_mask)
    out = new_cells(q)
    tops, shares = totals = q.new_empty(2, *q.shape[:4], dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[_programs(q, dilation)](
            q,
            k,
            v,
            mask,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values from that of the output and the second result of `forward`.

    Padding has none as keys and values. As queries, pads that are infinite or NaN, or whose output has such a gradient, add
    nothing to those of keys and values.
    """
    grad_out, q, k, v = (with_channels_together(x) for x in (grad_out, q, k, v))
    mask = _bytes(padding_mask)
    grad_q, grad_k, grad_v = (new_cells(q) for _ in range(3))
    tops, shares = totals
    deltas = torch.empty_like(tops)  # go from queries to keys, as does `sent`
    sent = None if mask is None else torch.empty_like(tops, dtype=torch.uint8)
    maps = mask, tops, shares, deltas, sent
    strides = [x.stride()[:4] for x in (grad_out, q, k, v, grad_q)]
    numbers = *q.shape[1:4], radius, dilation, float(scale)
    with torch.cuda.device_of(q):
        programs, constants = _programs(q, dilation), _constants(q)
        backward_queries_kernel[programs](grad_out, q, k, v, *maps, grad_q, *strides, *numbers, **constants)
        backward_keys_kernel[programs](grad_out, q, k, v, *maps, grad_k, grad_v, *strides, *numbers, **constants)
    return grad_q, grad_k, grad_v


def _tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, cells of a chunk of its halo, and warps of a program.

    As many as the registers of sm_90 hold, by the reports of ptxas. Never 64 cells with 4 warps or more: Triton then uses
    wgmma with an operand in registers, which ptxas up to CUDA 13.0 miscompiles (illegal addresses, wrong sums).
    """
    size = _padded(head_dim) * dtype.itemsize
    if size <= 128:
        return 8, 8, 32 if size <= 64 else 16, 2
    return 4, 8, 16, 2 if size <= 256 else 4


def _padded(head_dim):
    """Channels of a cell in the kernels, a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _constants(q):
    tall, wide, chunk, warps = _tile(q.shape[-1], q.dtype)
    return {
        "D": q.shape[-1],
        "DP": _padded(q.shape[-1]),
        "TALL": tall,
        "WIDE": wide,
        "CHUNK": chunk,
        "num_warps": warps,
    }


def _programs(q, dilation):
    """One for each tile of each phase of each head."""
    batch, heads, height, width, head_dim = q.shape
    tall, wide, *_ = _tile(head_dim, q.dtype)
    tiles = triton.cdiv(triton.cdiv(height, dilation), tall) * triton.cdiv(triton.cdiv(width, dilation), wide)
    return (batch * heads * min(dilation, height) * min(dilation, width) * tiles,)


def _bytes(padding_mask):
    return None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
