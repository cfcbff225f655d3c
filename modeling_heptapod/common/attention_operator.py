"""Attention by kernels as one differentiable call: an autograd function in eager mode, a registered operator in graphs.

`torch.compile` keeps the operator as one call, in one graph for all sizes. Programs of `torch.export` run without this package,
and transforms of `torch.func` need plain operations, so both use the forms in torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .model_inputs import is_eager, is_torch_func_active
from .registered_operators import in_full_precision, in_graph


class AttentionOperator(NamedTuple):
    """Attention to windows, by one kernel, in two forms.

    Attributes:
        function (`type`): for eager mode, where a registered operator takes longer to call.
        operator (`Callable`): for graphs; returns the output, and the totals that the backward pass needs.
    """

    function: type[torch.autograd.Function]
    operator: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, *arguments) -> torch.Tensor:
        """The output, for the arguments of the operator."""
        return self.operator(*arguments)[0] if in_graph() else self.function.apply(*arguments)


def kernels_run(q: torch.Tensor) -> bool:
    """Whether kernels may compute the attention of queries."""
    return in_graph() or (is_eager(q) and not is_torch_func_active())


def register_attention(
    name: str,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    differentiate: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    new_output: Callable[[torch.Tensor], torch.Tensor],
    new_totals: Callable[[torch.Tensor], torch.Tensor],
) -> AttentionOperator:
    """Register the attention that a kernel computes.

    Args:
        name (`str`): of the operator, with its namespace.
        attend (`Callable`): `attend(q, k, v, seen, size, dilation, scale)` returns the output and totals. `seen` is an optional
            tensor that says what is attended to, `size` that of the window.
        differentiate (`Callable`): `differentiate(grad_out, q, k, v, totals, seen, size, dilation, scale)` returns the
            gradients of `q`, `k` and `v`.
        new_output, new_totals (`Callable`): memory for each, from `q`.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        @in_full_precision
        def forward(ctx: Any, q, k, v, seen, *numbers):
            out, totals = attend(q, k, v, seen, *numbers)
            ctx.save_for_backward(q, k, v, totals, seen)
            ctx.numbers = numbers
            return out

        @staticmethod
        @in_full_precision
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_out):
            return *differentiate(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 4

    @torch.library.custom_op(name, mutates_args=())
    @in_full_precision
    def operator(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor | None,
        size: int,
        dilation: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(q, k, v, seen, size, dilation, scale)

    @operator.register_fake
    def _(q, k, v, seen, size, dilation, scale):
        return new_output(q), new_totals(q)

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    @in_full_precision
    def backward_operator(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        totals: torch.Tensor,
        seen: torch.Tensor | None,
        size: int,
        dilation: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return differentiate(grad_out, q, k, v, totals, seen, size, dilation, scale)

    @backward_operator.register_fake
    def _(grad_out, q, *_):
        return new_output(q), new_output(q), new_output(q)

    def keep(ctx, inputs, output):
        q, k, v, seen, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, output[1], seen)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx, grad_out, _):
        return *backward_operator(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 4

    operator.register_autograd(gradients, setup_context=keep)
    return AttentionOperator(Attention, operator)


__all__ = ["AttentionOperator", "kernels_run", "register_attention"]
