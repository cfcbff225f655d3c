"""What the Triton kernels of attention to windows share: what they take, and sizes of tiles."""

import torch


try:
    import triton
except ImportError:
    triton = None

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_DIM = 128


def fits(q: torch.Tensor) -> bool:
    """Whether kernels take queries `q [..., head_dim]`: CUDA devices, float32 and half precision, up to 128 channels."""
    is_there = triton is not None and q.device.type in DEVICES
    return is_there and q.dtype in DTYPES and q.numel() > 0 and q.shape[-1] <= MOST_DIM


def tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Queries of a tile, keys of a chunk that it meets at once, and warps of a program.

    As many as the registers of sm_90 hold, by the reports of ptxas. Never 64 queries with 4 warps or more: Triton then uses
    wgmma with an operand in registers, which ptxas up to CUDA 13.0 miscompiles (illegal addresses, wrong sums).
    """
    size = padded(head_dim) * dtype.itemsize
    if size <= 128:
        return 64, 32 if size <= 64 else 16, 2
    return 32, 16, 2 if size <= 256 else 4


def padded(head_dim: int) -> int:
    """Channels in the kernels, a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


__all__ = ["fits", "padded", "tile", "triton"]
