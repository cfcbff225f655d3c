"""Local attention by kernels: C on CPUs, Triton on GPUs, as the registered operator `heptapod::local_attention`."""

import torch

from ..common.attention_operator import kernels_run, register_attention
from ..common.registered_operators import operator_namespace
from .local_attention_cpu import backward as cpu_backward
from .local_attention_cpu import forward as cpu_forward
from .local_attention_cpu import takes as cpu_takes
from .local_attention_layout import new_cells, new_totals
from .local_attention_triton import backward as triton_backward
from .local_attention_triton import forward as triton_forward
from .local_attention_triton import takes as triton_takes


NAMESPACE = operator_namespace(__name__)


def has_kernel(q: torch.Tensor, radius: int) -> bool:
    """Whether a kernel computes the attention of queries `q [batch, heads, height, width, head_dim]` to windows."""
    return kernels_run(q) and (triton_takes(q, radius) or cpu_takes(q, radius))


def kernel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int,
    dilation: int,
    scale: float,
    padding_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Local attention of checked inputs for which `has_kernel` is true. The arguments are those of `local_attention`."""
    return _attention(q, k, v, padding_mask, radius, dilation, scale)


def _attend(q, k, v, padding_mask, radius, dilation, scale):
    forward = triton_forward if triton_takes(q, radius) else cpu_forward
    return forward(q, k, v, radius, dilation, scale, padding_mask)


def _differentiate(grad_out, q, k, v, totals, padding_mask, radius, dilation, scale):
    backward = triton_backward if triton_takes(q, radius) else cpu_backward
    return backward(grad_out, q, k, v, totals, radius, dilation, scale, padding_mask)


_attention = register_attention(f"{NAMESPACE}::local_attention", _attend, _differentiate, new_cells, new_totals)


__all__ = ["NAMESPACE", "has_kernel", "kernel_attention"]
