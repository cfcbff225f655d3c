"""Local attention by kernels: C on CPUs, Triton on GPUs, as the registered operator `heptapod::local_attention`.

`torch.compile` keeps it as one call, in one graph for grids of all sizes. Programs of `torch.export` run without this package,
and transforms of `torch.func` need plain operations, so both use torch's forms in `local_attention.py`.
"""

import torch

from ..common.model_inputs import is_eager, is_torch_func_active
from ..common.registered_operators import in_full_precision, in_graph, operator_namespace
from .local_attention_cpu import backward as cpu_backward
from .local_attention_cpu import forward as cpu_forward
from .local_attention_cpu import takes as cpu_takes
from .local_attention_layout import new_cells
from .local_attention_triton import backward as triton_backward
from .local_attention_triton import forward as triton_forward
from .local_attention_triton import takes as triton_takes


NAMESPACE = operator_namespace(__name__)


def has_kernel(q: torch.Tensor, radius: int) -> bool:
    """Whether a kernel computes the attention of queries `q [batch, heads, height, width, head_dim]` to windows."""
    plain = in_graph() or (is_eager(q) and not is_torch_func_active())
    return plain and (triton_takes(q, radius) or cpu_takes(q, radius))


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
    arguments = q, k, v, padding_mask, radius, dilation, scale
    return _operator(*arguments)[0] if in_graph() else _LocalAttention.apply(*arguments)


def _forward(q, k, v, padding_mask, radius, dilation, scale):
    forward = triton_forward if triton_takes(q, radius) else cpu_forward
    return forward(q, k, v, radius, dilation, scale, padding_mask)


def _backward(grad_out, q, k, v, totals, padding_mask, radius, dilation, scale):
    backward = triton_backward if triton_takes(q, radius) else cpu_backward
    return backward(grad_out, q, k, v, totals, radius, dilation, scale, padding_mask)


class _LocalAttention(torch.autograd.Function):
    """Eager mode, where a registered operator takes longer to call."""

    @staticmethod
    @in_full_precision
    def forward(ctx, q, k, v, padding_mask, radius, dilation, scale):
        out, totals = _forward(q, k, v, padding_mask, radius, dilation, scale)
        ctx.save_for_backward(q, k, v, totals, padding_mask)
        ctx.numbers = radius, dilation, scale
        return out

    @staticmethod
    @in_full_precision
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        return *_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 4


@torch.library.custom_op(f"{NAMESPACE}::local_attention", mutates_args=())
@in_full_precision
def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v, padding_mask, radius, dilation, scale)


@_operator.register_fake
def _(q, k, v, padding_mask, radius, dilation, scale):
    return new_cells(q), q.new_empty(2, *q.shape[:4], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::local_attention_backward", mutates_args=())
@in_full_precision
def _backward_operator(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    totals: torch.Tensor,
    padding_mask: torch.Tensor | None,
    radius: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad_out, q, k, v, totals, padding_mask, radius, dilation, scale)


@_backward_operator.register_fake
def _(grad_out, q, *_):
    return new_cells(q), new_cells(q), new_cells(q)


def _keep(ctx, inputs, output):
    q, k, v, padding_mask, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, output[1], padding_mask)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_out, _):
    q, k, v, totals, padding_mask = ctx.saved_tensors
    return *_backward_operator(grad_out, q, k, v, totals, padding_mask, *ctx.numbers), *(None,) * 4


_operator.register_autograd(_gradients, setup_context=_keep)


__all__ = ["NAMESPACE", "has_kernel", "kernel_attention"]
