"""Local attention by kernels: C on CPUs, Triton on GPUs, as the registered operator `heptapod::local_attention`.

Attention to adapted windows is `heptapod::adaptive_local_attention`, with gradients of spans and biases.
"""

from typing import Any

import torch

from ..common.attention_operator import kernels_run, register_attention
from ..common.registered_operators import in_full_precision, in_graph, operator_namespace
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


# ---------------------------------------------------------------------------------------------------------------------
# Adapted windows
# ---------------------------------------------------------------------------------------------------------------------


def adaptive_kernel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    span: torch.Tensor | None,
    bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
) -> torch.Tensor:
    """Local attention to adapted windows, of checked inputs for which `has_kernel` is true."""
    span, bias = (None if x is None else x.float() for x in (span, bias))
    arguments = q, k, v, span, bias, padding_mask, radius, dilation, scale
    return _adaptive_operator(*arguments)[0] if in_graph() else _AdaptiveAttention.apply(*arguments)


def _attend_adapted(q, k, v, span, bias, padding_mask, radius, dilation, scale):
    forward = triton_forward if triton_takes(q, radius) else cpu_forward
    return forward(q, k, v, radius, dilation, scale, padding_mask, span, bias)


class _AdaptiveAttention(torch.autograd.Function):
    """For eager mode, where a registered operator takes longer to call."""

    @staticmethod
    @in_full_precision
    def forward(ctx: Any, q, k, v, span, bias, padding_mask, radius, dilation, scale):
        out, totals = _attend_adapted(q, k, v, span, bias, padding_mask, radius, dilation, scale)
        ctx.save_for_backward(q, k, v, totals, span, bias, padding_mask)
        ctx.numbers = radius, dilation, scale
        return out

    @staticmethod
    @in_full_precision
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out):
        return *_adaptive_gradients(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 4


def _adaptive_gradients(grad_out, q, k, v, totals, span, bias, padding_mask, radius, dilation, scale):
    """Gradients of `q`, `k`, `v`, `span` and `bias`, `None` of what is not given."""
    backward = triton_backward if triton_takes(q, radius) else cpu_backward
    grads = backward(grad_out, q, k, v, totals, radius, dilation, scale, padding_mask, span, bias)
    return _with_gaps(grads, span, bias)


def _with_gaps(grads, span, bias):
    """Gradients of `q`, `k` and `v`, then of those of `span` and `bias` that are given, with `None` for the others."""
    left = list(grads[3:])
    return *grads[:3], *(None if x is None else left.pop(0) for x in (span, bias))


@torch.library.custom_op(f"{NAMESPACE}::adaptive_local_attention", mutates_args=())
@in_full_precision
def _adaptive_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    span: torch.Tensor | None,
    bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend_adapted(q, k, v, span, bias, padding_mask, radius, dilation, scale)


@_adaptive_operator.register_fake
def _(q, *_):
    return new_cells(q), new_totals(q)


@torch.library.custom_op(f"{NAMESPACE}::adaptive_local_attention_backward", mutates_args=())
@in_full_precision
def _adaptive_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    totals: torch.Tensor,
    span: torch.Tensor | None,
    bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
) -> list[torch.Tensor]:
    arguments = grad_out, q, k, v, totals, span, bias, padding_mask, radius, dilation, scale
    return [x for x in _adaptive_gradients(*arguments) if x is not None]


@_adaptive_backward.register_fake
def _(grad_out, q, k, v, totals, span, bias, *_):
    adapted = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (span, bias) if x is not None]
    return [*(new_cells(q) for _ in "qkv"), *adapted]


def _keep(ctx, inputs, output):
    q, k, v, span, bias, padding_mask, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, output[1], span, bias, padding_mask)
    ctx.mark_non_differentiable(output[1])


def _differentiate_adaptive(ctx, grad_out, _):
    span, bias = ctx.saved_tensors[4:6]
    grads = _adaptive_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
    return *_with_gaps(grads, span, bias), *(None,) * 4


_adaptive_operator.register_autograd(_differentiate_adaptive, setup_context=_keep)


__all__ = ["NAMESPACE", "adaptive_kernel_attention", "has_kernel", "kernel_attention"]
