"""Local attention on CPUs, in C that is compiled on first use. Without a C compiler it runs in torch, which is slower.

Shape, dtype, device and memory of every tensor are checked before it is passed to C.
"""

import ctypes
from functools import cache

import torch

from ..common.cpu_attention_source import SOURCE as ATTENTION_SOURCE
from ..common.cpu_kernels import FLAGS, address, check_status, include, load_kernels
from .local_attention_cpu_source import SOURCE
from .local_attention_layout import WIDEST, new_cells, new_totals, with_channels_together


_INTEGERS = "batch heads height width dim radius dilation bf16 threads".split()
_TENSORS = "q k v out grad_out grad_q grad_k grad_v".split()
_PARALLEL = 2**18  # products of queries and keys times channels below which a second thread costs more than it saves


class _Cells(ctypes.Structure):
    """`Cells` of the source."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row", "column"))]


class _LocalAttention(ctypes.Structure):
    """`LocalAttention` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, _Cells) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in "mask span bias grad_span grad_bias totals".split()),
        *((name, ctypes.c_int64) for name in ("bands", "strips", "next", "failed")),
        ("bias_parts", ctypes.c_void_p),
    ]


@cache
def _library():
    functions = dict.fromkeys(("local_attention_forward", "local_attention_backward"), _LocalAttention)
    source = include(SOURCE, "cpu_attention_source.c", ATTENTION_SOURCE)
    return load_kernels("local_attention", "Local attention runs", source, functions, FLAGS)


@torch.compiler.assume_constant_result  # so that a graph is not broken by the compilation of C
def _is_compiled():
    return _library() is not None


def takes(q: torch.Tensor, radius: int) -> bool:
    """Whether the C source supports this call: on a CPU, float32 or bfloat16, radius up to 32."""
    return (
        q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and radius <= WIDEST and _is_compiled()
    )


def _call(function, radius, dilation, scale, padding_mask, totals, adapted, **tensors):
    """Call a function of the library with tensors of one shape and dtype, some of which it writes to.

    `adapted` are the span, the bias and their gradients by the names of the fields, those that there are.
    """
    q = tensors["q"]
    batch, heads, height, width, dim = q.shape
    pairs = q.numel() * min(2 * radius + 1, height) * min(2 * radius + 1, width)
    call = _LocalAttention(
        batch=batch,
        heads=heads,
        height=height,
        width=width,
        dim=dim,
        radius=radius,
        dilation=dilation,
        bf16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads() if pairs >= _PARALLEL else 1,
        scale=scale,
    )
    kept = []  # alive until the call is done
    for name, tensor in tensors.items():
        if not name.startswith("grad_") or name == "grad_out":
            tensor = with_channels_together(tensor.resolve_neg())
        kept.append(tensor)
        place = address(name, tensor, q.shape, q.dtype, dense=False)
        setattr(call, name, _Cells(place, *tensor.stride()[:4]))
    if padding_mask is not None:
        padding_mask = padding_mask.contiguous()
        call.mask = address("padding_mask", padding_mask, (batch, height, width), torch.bool)
    shapes = {"span": (batch, heads, height, width), "bias": (heads, 2 * radius + 1, 2 * radius + 1)}
    for name, tensor in adapted.items():
        setattr(call, name, address(name, tensor, shapes[name.removeprefix("grad_")], torch.float32))
    call.totals = address("totals", totals, (2, batch, heads, height, width), torch.float32)
    check_status(getattr(_library(), function)(call), "local attention")


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
    """Local attention.

    Args:
        q, k, v (`torch.Tensor` of shape `[batch, heads, height, width, head_dim]`): queries, keys and values.
        radius, dilation, scale, padding_mask: as in `local_attention`, the mask of dtype `torch.bool`.
        span, bias: as in `local_attention`, in float32.

    Returns:
        The output, of the shape and dtype of `q`, and totals `[2, batch, heads, height, width]` in float32: the largest logit
        of each query and `1 / sum(exp(logit - largest))`, or twice 0 where it attends to nothing. A log of the sum would be
        imprecise for large logits.

    Raises:
        ValueError: for tensors of other shapes, dtypes or devices, and for other radii.
        MemoryError: if there is no memory for a row of windows.
    """
    out, totals, adapted = new_cells(q), new_totals(q), _adapted(span, bias)
    _call("local_attention_forward", radius, dilation, scale, padding_mask, totals, adapted, q=q, k=k, v=v, out=out)
    return out, totals


def _adapted(span, bias):
    given = {"span": span, "bias": bias}
    return {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}


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
    """Gradients of `q`, `k` and `v` from that of the output and the totals of `forward`, then of `span` and `bias` where given.

    Raises the same errors.
    """
    grads = {name: new_cells(q) for name in ("grad_q", "grad_k", "grad_v")}
    tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out, **grads}
    adapted = _adapted(span, bias)
    grads_adapted = {f"grad_{name}": torch.zeros_like(tensor) for name, tensor in adapted.items()}
    numbers = radius, dilation, scale, padding_mask, totals.contiguous()
    _call("local_attention_backward", *numbers, {**adapted, **grads_adapted}, **tensors)
    return *grads.values(), *grads_adapted.values()


__all__ = ["backward", "forward", "takes"]
