"""Windowed attention on CPUs, in C that is compiled on first use. Without a C compiler it runs in torch, which is slower.

Shape, dtype, device and memory of every tensor are checked before it is passed to C.
"""

import ctypes
from functools import cache

import torch

from ..common.cpu_attention_source import SOURCE as ATTENTION_SOURCE
from ..common.cpu_kernels import FLAGS, address, check_status, include, load_kernels
from .windowed_attention_cpu_source import SOURCE
from .windowed_attention_layout import LONGEST, new_steps, new_totals, with_channels_together


_INTEGERS = "batch length heads dim span dilation bf16 threads".split()
_TENSORS = "q k v out grad_out grad_q grad_k grad_v".split()
_PARALLEL = 2**18  # products of queries and keys times channels below which a second thread costs more than it saves


class _Steps(ctypes.Structure):
    """`Steps` of the source."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "step", "head"))]


class _WindowedAttention(ctypes.Structure):
    """`WindowedAttention` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, _Steps) for name in _TENSORS),
        ("reach", ctypes.c_void_p),
        ("reach_batch", ctypes.c_int64),
        ("totals", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bands", "next", "failed")),
    ]


@cache
def _library():
    functions = dict.fromkeys(("windowed_attention_forward", "windowed_attention_backward"), _WindowedAttention)
    source = include(SOURCE, "cpu_attention_source.c", ATTENTION_SOURCE)
    return load_kernels("windowed_attention", "Windowed attention runs", source, functions, FLAGS)


@torch.compiler.assume_constant_result  # so that a graph is not broken by the compilation of C
def _is_compiled():
    return _library() is not None


def takes(q: torch.Tensor, span: int) -> bool:
    """Whether the C source supports this call: on a CPU, float32 or bfloat16, up to 1024 keys in a window."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and span <= LONGEST and _is_compiled()


def _call(function, reach, span, dilation, scale, totals, **tensors):
    """Call a function of the library with tensors of one shape and dtype, some of which it writes to."""
    q = tensors["q"]
    batch, length, heads, dim = q.shape
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`q` must be a torch.float32 or torch.bfloat16, got {q.dtype}.")
    call = _WindowedAttention(
        batch=batch,
        length=length,
        heads=heads,
        dim=dim,
        span=span,
        dilation=dilation,
        bf16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads() if q.numel() * span >= _PARALLEL else 1,
        scale=scale,
    )
    kept = []  # alive until the call is done
    for name, tensor in tensors.items():
        if not name.startswith("grad_") or name == "grad_out":
            tensor = with_channels_together(tensor.resolve_neg())
        kept.append(tensor)
        place = address(name, tensor, q.shape, q.dtype, dense=False)
        setattr(call, name, _Steps(place, *tensor.stride()[:3]))
    reach = reach.contiguous()
    call.reach = address("reach", reach, (len(reach) if len(reach) == 1 else batch, length), torch.int32)
    call.reach_batch = length if len(reach) > 1 else 0
    call.totals = address("totals", totals, (2, batch, heads, length), torch.float32)
    check_status(getattr(_library(), function)(call), "windowed attention")


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: torch.Tensor, span: int, dilation: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windowed attention.

    Args:
        q, k, v (`torch.Tensor` of shape `[batch, length, heads, head_dim]`): queries, keys and values.
        reach (`torch.IntTensor` of shape `[1 or batch, length]`): number of keys of its phase that each query sees, itself
            the last.
        span (`int`): the largest reach, up to 1024.
        dilation (`int`): number of phases, at least 1.
        scale (`float`): factor of the logits.

    Returns:
        The output, of the shape and dtype of `q`, and totals `[2, batch, heads, length]` in float32: the largest logit of
        each query and `1 / sum(exp(logit - largest))`, or twice 0 where it sees nothing. A log of the sum would be imprecise
        for large logits.

    Raises:
        ValueError: for tensors of other shapes, dtypes or devices, and for other spans.
        MemoryError: if there is no memory for a block of keys.
    """
    out, totals = new_steps(q), new_totals(q)
    _call("windowed_attention_forward", reach, span, dilation, scale, totals, q=q, k=k, v=v, out=out)
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
    """Gradients of `q`, `k` and `v` from that of the output and the totals of `forward`. Raises the same errors."""
    grads = {name: new_steps(q) for name in ("grad_q", "grad_k", "grad_v")}
    tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out, **grads}
    _call("windowed_attention_backward", reach, span, dilation, scale, totals.contiguous(), **tensors)
    return grads["grad_q"], grads["grad_k"], grads["grad_v"]


__all__ = ["backward", "forward", "takes"]
