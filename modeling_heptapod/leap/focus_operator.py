"""The mixing step and the means alone as one differentiable call each, in eager mode and in the graphs of `torch.compile`.

Eager mode uses autograd functions. A graph uses the registered operators `heptapod::focus_mixing` and `heptapod::focus_mean`,
so it runs the kernels (C on CPUs, Triton on GPUs, torch elsewhere) at all lengths. Programs of `torch.export` run without
this package, so they contain plain operations.
"""

from typing import Any

import torch

from ..common.registered_operators import in_full_precision, in_graph, operator_namespace
from .focus_cpu import NativeMixing
from .focus_cpu import is_supported as native_is_supported
from .focus_cpu import takes as native_takes
from .focus_functions import FocusSettings
from .focus_tiles import TiledMixing, enter_state, means, means_backward
from .focus_triton import TritonMixing
from .focus_triton import is_supported as triton_is_supported
from .focus_triton import takes as triton_takes
from .running_mean import FocusState


NAMESPACE = operator_namespace(__name__)


def focus_mixing_step(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    padding_mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, FocusState | None]:
    """The mixing step of checked inputs, and the state after it. The arguments are those of `TiledMixing`."""
    cos, sin = rotary or (None, None)
    tensors = alibi_slopes, cos, sin, padding_mask, segments
    if in_graph():
        for_backward = torch.is_grad_enabled() and qfkv.requires_grad
        past_tensors = _kept(past, for_backward) or (None, None)
        out, *final, _ = _mixing_operator(qfkv, *tensors, *past_tensors, *_values(settings), for_backward)
    else:
        out, *final = _FocusMixing.apply(qfkv, settings, *tensors, *(past or (None, None)))
    return out, FocusState(*final) if settings.causal else None


def focus_mean_step(
    logs: torch.Tensor,
    values: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None,
    segments: torch.Tensor | None,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, FocusState | None]:
    """Means of checked inputs `logs [batch, heads, seq]`, `values [batch, heads, seq, channels]`, and the state after them."""
    arguments = alibi_slopes, segments, *(past or (None, None))
    if in_graph():
        numbers = settings.window, settings.sink_weight, settings.causal
        out, _, *final = _mean_operator(logs, values, *arguments, *numbers)
    else:
        out, *final = _FocusMean.apply(logs, values, settings, *arguments)
    return out, FocusState(*final) if settings.causal else None


def _kept(past, for_backward):
    """A copy of the past for the backward pass, because a cache may overwrite it before."""
    return tuple(x.clone() for x in past) if past is not None and for_backward else past


# ---------------------------------------------------------------------------------------------------------------------
# Eager mode
# ---------------------------------------------------------------------------------------------------------------------


def _choose_mixing(qfkv, settings, rotary):
    if triton_is_supported(qfkv, settings, rotary):
        return TritonMixing
    return NativeMixing if native_is_supported(qfkv, settings, rotary) else TiledMixing


class _FocusMixing(torch.autograd.Function):
    """The mixing step. It saves its input and one carry per block for the backward pass."""

    @staticmethod
    @in_full_precision
    def forward(ctx, qfkv, settings, alibi_slopes, cos, sin, padding_mask, segments, state_logs, state_values):
        rotary, for_backward = None if cos is None else (cos, sin), ctx.needs_input_grad[0]
        past = _kept(None if state_logs is None else (state_logs, state_values), for_backward)
        mixing = _choose_mixing(qfkv, settings, rotary)
        ctx.mixing = mixing(qfkv, settings, alibi_slopes, rotary, padding_mask, segments, past)
        ctx.save_for_backward(qfkv)
        out, *final = ctx.mixing.forward(qfkv, for_backward)
        if settings.causal:
            ctx.mark_non_differentiable(*final)
        return out, *final

    @staticmethod
    @in_full_precision
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *_):
        (qfkv,) = ctx.saved_tensors
        return ctx.mixing.backward(qfkv, grad_out), *(None,) * 8


class _FocusMean(torch.autograd.Function):
    """Means alone. It saves inputs, outputs and the logs of the summed weights for the backward pass."""

    @staticmethod
    @in_full_precision
    def forward(ctx, logs, values, settings, alibi_slopes, segments, state_logs, state_values):
        out, log_total, *final = _mean(logs, values, settings, alibi_slopes, segments, state_logs, state_values)
        ctx.settings, ctx.alibi_slopes, ctx.segments = settings, alibi_slopes, segments
        ctx.save_for_backward(logs, values, out, log_total)
        if settings.causal:
            ctx.mark_non_differentiable(*final)
        return out, *final

    @staticmethod
    @in_full_precision
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *_):
        logs, values, out, log_total = ctx.saved_tensors
        grads = _mean_backward(grad_out, logs, values, out, log_total, ctx.settings, ctx.alibi_slopes, ctx.segments)
        return *grads, *(None,) * 5


def _mean(logs, values, settings, alibi_slopes, segments, state_logs, state_values):
    """Means, logs of the summed weights, and log weights and values of the state after them (`None` when bidirectional)."""
    carry = None if state_logs is None else FocusState(state_logs, state_values)
    out, log_total, final = means(
        logs, values, settings, alibi_slopes, segments, enter_state(carry, settings, segments)
    )
    return out, log_total, *((x.clone() for x in final[:2]) if settings.causal else (None, None))


def _mean_backward(grad_out, logs, values, out, log_total, settings, alibi_slopes, segments):
    grads = torch.cat((grad_out, (grad_out * out).sum(-1, keepdim=True)), dim=-1)
    grad_logs, grad_values, factor, _ = means_backward(
        grads, log_total, logs, values, settings, alibi_slopes, segments, None
    )
    return grad_logs, grad_values * factor


# ---------------------------------------------------------------------------------------------------------------------
# Operators of a graph: each with the shapes of its results, and with its backward pass as another operator
# ---------------------------------------------------------------------------------------------------------------------

_SETTINGS = "scale normalize weight_function output_gate window sink_weight causal".split()


def _values(settings):
    return (getattr(settings, name) for name in _SETTINGS)


def _form(qfkv, settings, rotary):
    """The form of the mixing step on this machine, also for the tensors without memory that graphs are built with."""
    if triton_takes(qfkv, settings, rotary):
        return TritonMixing
    return NativeMixing if native_takes(qfkv, settings, rotary) else TiledMixing


def _mixing(qfkv, alibi_slopes, cos, sin, padding_mask, segments, past_logs, past_values, *values):
    rotary, past = None if cos is None else (cos, sin), None if past_logs is None else (past_logs, past_values)
    settings = FocusSettings(**dict(zip(_SETTINGS, values)))
    return _form(qfkv, settings, rotary)(qfkv, settings, alibi_slopes, rotary, padding_mask, segments, past)


def _state_like(values, batch, heads, channels, seq, past_logs, window, causal):
    """Memory for log weights and values of a state, in the dtype of `values` or wider. Empty if there is no state."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not causal:
        return values.new_empty(0, dtype=dtype), values.new_empty(0, dtype=dtype)
    past = 0 if past_logs is None or window is None else past_logs.shape[2]
    kept = () if window is None else (torch.sym_min(window - 1, past + seq),)
    shape = batch, heads, *kept
    return values.new_empty(*shape, dtype=dtype), values.new_empty(*shape, channels, dtype=dtype)


def _present(tensors, like):
    """Results as tensors, because those of an operator cannot be optional."""
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in tensors)


@torch.library.custom_op(f"{NAMESPACE}::focus_mixing", mutates_args=())
@in_full_precision
def _mixing_operator(
    qfkv: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    past_logs: torch.Tensor | None,
    past_values: torch.Tensor | None,
    scale: float,
    normalize: bool,
    weight_function: str,
    output_gate: str,
    window: int | None,
    sink_weight: float,
    causal: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values = scale, normalize, weight_function, output_gate, window, sink_weight, causal
    mixing = _mixing(qfkv, alibi_slopes, cos, sin, padding_mask, segments, past_logs, past_values, *values)
    # Carries of tiles are not a tensor, so their backward pass computes them again.
    out, *state = mixing.forward(qfkv, for_backward and not isinstance(mixing, TiledMixing))
    return out, *_present((*state, mixing.carries), qfkv)


@_mixing_operator.register_fake
def _(qfkv, alibi_slopes, cos, sin, padding_mask, segments, past_logs, past_values, *values_and_purpose):
    *values, for_backward = values_and_purpose
    options: dict[str, Any] = dict(zip(_SETTINGS, values))
    window = None if options["window"] is None else int(options["window"])
    # Shapes do not depend on the last two, which may be dynamic in a graph.
    settings = FocusSettings(**{**options, "window": window, "scale": 1.0, "sink_weight": 0.0})
    batch, seq, parts, heads, dim = qfkv.shape
    state = _state_like(qfkv, batch, heads, dim if parts == 3 else 2 * dim, seq, past_logs, window, settings.causal)
    form = _form(qfkv, settings, None if cos is None else (cos, sin))
    carries = form.new_carries(qfkv, window) if for_backward else None
    return qfkv.new_empty(batch, seq, heads, dim), *state, *_present((carries,), qfkv)


@torch.library.custom_op(f"{NAMESPACE}::focus_mixing_backward", mutates_args=())
@in_full_precision
def _mixing_backward_operator(
    grad_out: torch.Tensor,
    carries: torch.Tensor,
    qfkv: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    past_logs: torch.Tensor | None,
    past_values: torch.Tensor | None,
    scale: float,
    normalize: bool,
    weight_function: str,
    output_gate: str,
    window: int | None,
    sink_weight: float,
    causal: bool,
) -> torch.Tensor:
    values = scale, normalize, weight_function, output_gate, window, sink_weight, causal
    mixing = _mixing(qfkv, alibi_slopes, cos, sin, padding_mask, segments, past_logs, past_values, *values)
    if carries.numel():
        mixing.carries = carries
    return mixing.backward(qfkv, grad_out).contiguous()


@_mixing_backward_operator.register_fake
def _(grad_out, carries, qfkv, *_):
    return qfkv.new_empty(qfkv.shape)


def _keep_mixing(ctx, inputs, output):
    tensors, ctx.values = inputs[:8], inputs[8:-1]
    ctx.save_for_backward(output[3], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _mixing_gradients(ctx, grad_out, *_):
    carries, *tensors = ctx.saved_tensors
    return _mixing_backward_operator(grad_out, carries, *tensors, *ctx.values), *(None,) * 15


_mixing_operator.register_autograd(_mixing_gradients, setup_context=_keep_mixing)


@torch.library.custom_op(f"{NAMESPACE}::focus_mean", mutates_args=())
@in_full_precision
def _mean_operator(
    logs: torch.Tensor,
    values: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    segments: torch.Tensor | None,
    past_logs: torch.Tensor | None,
    past_values: torch.Tensor | None,
    window: int | None,
    sink_weight: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = FocusSettings(scale=1.0, window=window, sink_weight=sink_weight, causal=causal)
    return _present(_mean(logs, values, settings, alibi_slopes, segments, past_logs, past_values), logs)


@_mean_operator.register_fake
def _(logs, values, alibi_slopes, segments, past_logs, past_values, window, sink_weight, causal):
    batch, heads, seq, channels = values.shape
    state = _state_like(logs, batch, heads, channels, seq, past_logs, window, causal)
    return values.new_empty(values.shape), logs.new_empty(logs.shape), *state


@torch.library.custom_op(f"{NAMESPACE}::focus_mean_backward", mutates_args=())
@in_full_precision
def _mean_backward_operator(
    grad_out: torch.Tensor,
    logs: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    log_total: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    segments: torch.Tensor | None,
    window: int | None,
    sink_weight: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = FocusSettings(scale=1.0, window=window, sink_weight=sink_weight, causal=causal)
    return _present(_mean_backward(grad_out, logs, values, out, log_total, settings, alibi_slopes, segments), logs)


@_mean_backward_operator.register_fake
def _(grad_out, logs, values, *_):
    return logs.new_empty(logs.shape), values.new_empty(values.shape)


def _keep_mean(ctx, inputs, output):
    logs, values, alibi_slopes, segments, *_ = inputs
    ctx.settings = inputs[6:]
    ctx.save_for_backward(logs, values, *output[:2], alibi_slopes, segments)
    ctx.mark_non_differentiable(*output[1:])


def _mean_gradients(ctx, grad_out, *_):
    return *_mean_backward_operator(grad_out, *ctx.saved_tensors, *ctx.settings), *(None,) * 7


_mean_operator.register_autograd(_mean_gradients, setup_context=_keep_mean)


__all__ = ["NAMESPACE", "focus_mean_step", "focus_mixing_step"]
