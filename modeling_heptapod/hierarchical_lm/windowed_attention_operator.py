"""Windowed attention by kernels: C on CPUs, Triton on GPUs, as the registered operator `heptapod::windowed_attention`."""

import torch

from ..common.attention_operator import kernels_run, register_attention
from ..common.registered_operators import operator_namespace
from .windowed_attention_cpu import backward as cpu_backward
from .windowed_attention_cpu import forward as cpu_forward
from .windowed_attention_cpu import takes as cpu_takes
from .windowed_attention_layout import new_steps, new_totals
from .windowed_attention_triton import backward as triton_backward
from .windowed_attention_triton import forward as triton_forward
from .windowed_attention_triton import takes as triton_takes


NAMESPACE = operator_namespace(__name__)


def has_kernel(q: torch.Tensor, span: int) -> bool:
    """Whether a kernel computes the attention of queries `q [batch, length, heads, head_dim]` to windows of `span` keys."""
    q = _at_precision_of_autocast(q)
    return kernels_run(q) and (triton_takes(q, span) or cpu_takes(q, span))


def kernel_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: torch.Tensor, span: int, dilation: int, scale: float
) -> torch.Tensor:
    """Windowed attention for which `has_kernel` is true, at the precision of autocast.

    Args:
        q, k, v (`torch.Tensor` of shape `[batch, length, heads, head_dim]`): queries, keys and values.
        reach (`torch.IntTensor` of shape `[1 or batch, length]`): number of keys of its phase that each query sees, itself
            the last, see `window_reach`.
        span (`int`): the largest reach.
        dilation (`int`): number of phases.
        scale (`float`): factor of the logits.
    """
    q, k, v = (_at_precision_of_autocast(x) for x in (q, k, v))
    return _attention(q, k, v, reach, span, dilation, scale)


def _at_precision_of_autocast(x):
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _attend(q, k, v, reach, span, *numbers):
    forward = triton_forward if triton_takes(q, span) else cpu_forward
    return forward(q, k, v, reach, span, *numbers)


def _differentiate(grad_out, q, k, v, totals, reach, span, *numbers):
    backward = triton_backward if triton_takes(q, span) else cpu_backward
    return backward(grad_out, q, k, v, totals, reach, span, *numbers)


_attention = register_attention(f"{NAMESPACE}::windowed_attention", _attend, _differentiate, new_steps, new_totals)


__all__ = ["NAMESPACE", "has_kernel", "kernel_attention"]
