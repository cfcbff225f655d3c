"""The focus operator: windowed, positively weighted running means instead of attention.

In every head, token `j` has a focus logit `s_j = scale * (f_j . k_j)`. A weight function maps it to a log weight `l_j`
(`exp`: `l = s`; `elu`: `l = log(elu(s) + 1)`). Position `i` averages over its window:

    P_ij = exp(l_j - alibi_slopes * |i - j|) / (sink_weight + sum_j' exp(l_j' - alibi_slopes * |i - j'|))
    kbar_i = sum_j P_ij k_j,    vbar_i = sum_j P_ij v_j,    out_i = gate(scale * q_i . kbar_i) * vbar_i

The window is `(i - w, i]` (causal) or `(i - w, i + w)` (bidirectional). A global mean is over all positions that causality
allows. The method is that of the prototype `leap-transformer`, after Fastformer (arXiv 2108.09084) and "Transformers are
RNNs" (arXiv 2006.16236). Logits do not depend on the query, so time is linear and the state has a constant size.

Read in this order: `naive_focus_mean` and `naive_focus_mixing` (the specification), then `focus_mixing`, which models call.
`focus_mixing` checks its inputs and calls `focus_operator.py`, which runs one of three forms: torch in tiles (`focus_tiles.py`,
`running_mean.py`), C for CPUs (`focus_cpu.py`), Triton for GPUs (`focus_triton.py`). The recurrent form is in `focus_recurrent.py`.

Numerics: sums are in float32 (float64 for float64 inputs), relative to the largest log weight among those that are summed.
No exponent is positive, and prefix sums are never subtracted from each other.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from ..common.model_inputs import has_dynamic_shapes, is_torch_func_active
from .focus_functions import FocusSettings, gate_value, log_weight, rotate, standardize
from .focus_operator import focus_mean_step, focus_mixing_step
from .focus_tiles import Block
from .running_mean import EMPTY, FocusState, same_segment


def _runs(segment_ids):
    """Number the runs of equal ids `[batch, seq]`, so that two runs of one id are two sequences."""
    if segment_ids is None:
        return None
    return nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)).cumsum(1)


# ---------------------------------------------------------------------------------------------------------------------
# The specification
# ---------------------------------------------------------------------------------------------------------------------


def naive_focus_mean(
    log_weights: torch.Tensor,
    values: torch.Tensor,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_weight: float = 0.0,
    causal: bool = True,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted means by a loop over positions: the executable specification of `focus_mean`.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, seq, heads]`): `-inf` for tokens to leave out.
        values (`torch.Tensor` of shape `[batch, seq, heads, channels]`): values to average.
        window (`int`, *optional*): window size, `None` for global means.
        alibi_slopes (`torch.Tensor` of shape `[heads]`, *optional*): subtracted from the log weight per token of distance.
        sink_weight (`float`): weight of an additional token of value zero.
        causal (`bool`): whether a position sees only itself and its past.
        segment_ids (`torch.Tensor` of shape `[batch, seq]`, *optional*): each run of equal ids is a sequence of its own.

    Returns:
        `torch.Tensor` of shape `[batch, seq, heads, channels]`: the means, zero for windows without tokens.
    """
    segment_ids = _runs(segment_ids)
    seq = log_weights.shape[1]
    reach = seq if window is None else window
    means = []
    for i in range(seq):
        first, last = max(0, i - reach + 1), i if causal else min(seq - 1, i + reach - 1)
        logs = log_weights[:, first : last + 1]  # [batch, seen, heads]
        if alibi_slopes is not None:
            distance = (torch.arange(first, last + 1, device=logs.device) - i).abs()
            logs = logs - distance[:, None] * alibi_slopes
        if segment_ids is not None:
            other = segment_ids[:, first : last + 1] != segment_ids[:, i : i + 1]
            logs = logs.masked_fill(other[..., None], -math.inf)
        top = logs.amax(1, keepdim=True).clamp_min(EMPTY).detach()
        weights = (logs - top).exp()
        total = weights.sum(1) + sink_weight * (-top[:, 0]).exp() if sink_weight else weights.sum(1)
        seen = torch.einsum("bjh,bjhc->bhc", weights, values[:, first : last + 1])
        means.append(torch.where(total[..., None] == 0, 0.0, seen / total.clamp_min(1e-37)[..., None]))
    return torch.stack(means, 1)


def naive_focus_mixing(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    means: Callable = naive_focus_mean,
) -> torch.Tensor:
    """The mixing step in plain differentiable operations: the executable specification of `focus_mixing`.

    `means` is any function of the arguments of `naive_focus_mean`.
    """
    mask = None
    if padding_mask is not None:
        mask = padding_mask.bool()
        qfkv = torch.where(mask[..., None, None, None], qfkv, 0.0)

    def mean(logs, values):
        return means(logs, values, settings.window, alibi_slopes, settings.sink_weight, settings.causal, segment_ids)

    return mix_with_means(qfkv, settings, mean, rotary, mask)[0]


def mix_with_means(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    means: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
    dropout: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixing step around any function of means.

    Args:
        qfkv, settings, rotary, padding_mask: as in `focus_mixing`.
        means (`Callable`): log weights `[batch, seq, heads]` and values `[batch, seq, heads, channels]` -> means of values.
        dropout (`Callable`): applied to focus, values, focus logits and queries.

    Returns:
        Output `[batch, seq, heads, head_dim]`, log weights and gates, both `[batch, seq, heads]`.
    """
    parts = (standardize(qfkv) if settings.normalize else qfkv).unbind(2)
    f, k, v = dropout(parts[-3]), parts[-2], dropout(parts[-1])
    logs = log_weight(dropout(settings.scale * (f * k).sum(-1)), settings.weight_function)
    if padding_mask is not None:
        logs = logs.masked_fill(~padding_mask[..., None], -math.inf)
    if settings.output_gate == "none":
        return means(logs, v), logs, torch.ones_like(logs)
    q = dropout(parts[0])
    if rotary is not None:
        q, k = (rotate(x, *rotary) for x in (q, k))
    kbar, vbar = means(logs, torch.cat((k, v), dim=-1)).chunk(2, dim=-1)
    gate = gate_value(settings.scale * (q * kbar).sum(-1), settings.output_gate)
    return gate.unsqueeze(-1) * vbar, logs, gate


def focus_mixing(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: FocusState | None = None,
) -> tuple[torch.Tensor, FocusState | None]:
    """The whole mixing step of LEAP, `[q, f, k, v] -> gate(q . kbar) * vbar`, in linear time.

    Args:
        qfkv (`torch.Tensor` of shape `[batch, seq, 4, heads, head_dim]`): queries, focus, keys, values; with
            `output_gate="none"` `[batch, seq, 3, heads, head_dim]` (no queries).
        settings (`FocusSettings`): see there.
        alibi_slopes (`torch.Tensor` of shape `[heads]`, *optional*): subtracted from log weights per token of distance.
        rotary (`tuple` of cos and sin `[1 or batch, seq, head_dim]`, *optional*): positions of queries and keys.
        padding_mask (`torch.Tensor` of shape `[batch, seq]`, *optional*): zero or `False` at pads, which have no weight
            and are replaced by zeros. They take places in windows and steps of the ALiBi bias, so models move them behind
            the real tokens first (`mixing_rows.py`).
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed rows; each run of equal ids is a
            sequence of its own.
        initial_state (`FocusState`, *optional*): state before the first token (causal only). No gradient flows into it.

    Returns:
        The output `[batch, seq, heads, head_dim]` in the dtype of `qfkv`, and the `FocusState` after the last token. There is
        no state when bidirectional, in `torch.export` with dynamic sizes, and under `torch.func`. In the last two cases time
        is quadratic.

    Raises:
        TypeError, ValueError: for inputs of another dtype or shape, or a state in a bidirectional step.
    """
    parts = 3 if settings.output_gate == "none" else 4
    _check_inputs("qfkv", qfkv, [None, None, parts, None, None], settings, initial_state)
    batch, seq, _, heads, head_dim = qfkv.shape
    channels = head_dim if parts == 3 else 2 * head_dim
    _check_companions(
        qfkv, (batch, seq, heads, channels), settings, alibi_slopes, padding_mask, segment_ids, initial_state
    )
    qfkv, mask = _blank_pads(qfkv, padding_mask)
    if initial_state is None and _must_be_plain(qfkv):
        precise = qfkv.to(torch.promote_types(qfkv.dtype, torch.float32))
        out = naive_focus_mixing(precise, settings, alibi_slopes, rotary, mask, segment_ids, _means_by_matrix)
        return out.to(qfkv.dtype), None
    if rotary is not None:
        _check_rotary(*rotary, qfkv)
    past = None if initial_state is None else (initial_state.log_weights, initial_state.values)
    return focus_mixing_step(qfkv, settings, alibi_slopes, rotary, mask, _runs(segment_ids), past)


def focus_mean(
    log_weights: torch.Tensor,
    values: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: FocusState | None = None,
) -> tuple[torch.Tensor, FocusState | None]:
    """Weighted means alone, without the gate.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, seq, heads]`): `-inf` for tokens to leave out.
        values (`torch.Tensor` of shape `[batch, seq, heads, channels]`): values to average.
        settings (`FocusSettings`): only `window`, `sink_weight` and `causal` are read.
        alibi_slopes, padding_mask, segment_ids, initial_state: as in `focus_mixing`.

    Returns:
        Means of shape `[batch, seq, heads, channels]` in the dtype of `values`, and the `FocusState` after the last
        token, or `None` as in `focus_mixing`.

    Raises:
        TypeError, ValueError: for inputs of another dtype or shape, or a state in a bidirectional step.
    """
    _check_inputs("values", values, [*log_weights.shape, None], settings, initial_state)
    _check_tensor("log_weights", log_weights, values, values.shape[:3], floating=True)
    _check_companions(values, values.shape, settings, alibi_slopes, padding_mask, segment_ids, initial_state)
    dtype = torch.promote_types(values.dtype, torch.float32)
    logs = log_weights.to(dtype)
    if padding_mask is not None:
        mask = padding_mask.bool().unsqueeze(-1)
        logs, values = logs.masked_fill(~mask, -math.inf), values.masked_fill(~mask.unsqueeze(-1), 0)
    if initial_state is None and _must_be_plain(values):
        arguments = settings.window, alibi_slopes, settings.sink_weight, settings.causal, segment_ids
        return _means_by_matrix(logs, values.to(dtype), *arguments).to(values.dtype), None
    past = None if initial_state is None else (initial_state.log_weights, initial_state.values)
    rows = logs.transpose(1, 2).contiguous(), values.to(dtype).transpose(1, 2).contiguous()
    means, state = focus_mean_step(*rows, settings, alibi_slopes, _runs(segment_ids), past)
    return means.transpose(1, 2).to(values.dtype), state


@torch.no_grad()
def token_state(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
) -> FocusState:
    """Log weights and values of tokens, as in a windowed state. The arguments are those of `focus_mixing`."""
    qfkv, mask = _blank_pads(qfkv, padding_mask)
    logs, values, *_ = Block(qfkv, settings, None, rotary, mask, None).tokens
    return FocusState(logs, values)


def _must_be_plain(x):
    """Whether plain operations are required: in an export with dynamic sizes, and under `torch.func.grad` and `vmap`."""
    return has_dynamic_shapes(x) or is_torch_func_active()


def _blank_pads(qfkv, padding_mask):
    """`qfkv` with zeros at pads, because a weight of 0 times NaN is NaN, and the mask as booleans."""
    if padding_mask is None:
        return qfkv, None
    mask = padding_mask.bool()
    return qfkv.masked_fill(~mask[..., None, None, None], 0), mask


def _check_inputs(name, tensor, shape, settings, initial_state):
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {tensor.dtype}.")
    wrong = len(shape) != tensor.dim() or any(
        size is not None and size != got for size, got in zip(shape, tensor.shape)
    )
    if wrong or 0 in tensor.shape:
        expected = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` must have shape [{expected}] with at least one token, got {list(tensor.shape)}.")
    if initial_state is not None and not settings.causal:
        raise ValueError("`initial_state` was given, but a bidirectional step has no past to continue from.")


def _check_rotary(cos, sin, qfkv):
    batch, seq, _, _, head_dim = qfkv.shape
    for name, table in (("rotary[0]", cos), ("rotary[1]", sin)):
        rows = batch if isinstance(table, torch.Tensor) and table.shape[:1] == (batch,) else 1
        _check_tensor(name, table, qfkv, (rows, seq, head_dim), floating=True)
    if head_dim % 2:
        raise ValueError(f"`rotary` needs an even head dimension, got {head_dim}.")
    if cos.shape != sin.shape:
        raise ValueError(f"`rotary` must be two tensors of one shape, got {list(cos.shape)} and {list(sin.shape)}.")


def _check_companions(tensor, shape, settings, alibi_slopes, padding_mask, segment_ids, initial_state):
    """Check the tensors given with `tensor` against the shape `[batch, seq, heads, channels]` of the means."""
    batch, seq, heads, channels = shape
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, tensor, (heads,), floating=True)
    if padding_mask is not None:
        _check_tensor("padding_mask", padding_mask, tensor, (batch, seq))
    if segment_ids is not None:
        _check_tensor("segment_ids", segment_ids, tensor, (batch, seq), floating=False)
    if initial_state is None:
        return
    past = ()
    if settings.window is not None:
        past = tuple(initial_state.log_weights.shape[2:3])
        if len(past) != 1 or past[0] >= settings.window:
            raise ValueError(
                f"`initial_state.log_weights` must be [batch, heads, past] of at most {settings.window - 1} tokens for a "
                f"window of {settings.window}, got {list(initial_state.log_weights.shape)}."
            )
    _check_tensor("initial_state.log_weights", initial_state.log_weights, tensor, (batch, heads, *past), floating=True)
    _check_tensor("initial_state.values", initial_state.values, tensor, (batch, heads, *past, channels), floating=True)


def _check_tensor(name, tensor, like, shape, floating=None):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    if floating is not None and tensor.is_floating_point() != floating:
        raise TypeError(f"`{name}` must be {'floating point' if floating else 'integers'}, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {list(shape)}, got {list(tensor.shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device}, as the tokens are, got {tensor.device}.")


def _means_by_matrix(logs, values, window, alibi_slopes, sink_weight, causal, segment_ids):
    """The result of `naive_focus_mean` as one matrix product, quadratic in length."""
    settings = FocusSettings(scale=1.0, window=window, sink_weight=sink_weight, causal=causal)
    place, runs = torch.arange(logs.shape[1], device=logs.device), _runs(segment_ids)
    weights = _weight_matrix(logs.transpose(1, 2), settings, alibi_slopes, place, place, runs, runs)
    return (weights @ values.transpose(1, 2)).transpose(1, 2)


def attention_matrix(
    log_weights: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    positions: torch.LongTensor | None = None,
) -> torch.Tensor:
    """The weights `P` of the module's docstring as a matrix, for inspection. Quadratic in length.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, heads, seq]`): `-inf` at pads, which take no place in windows and no
            step of the ALiBi bias.
        settings, alibi_slopes, segment_ids: as in `focus_mixing`.
        positions (`torch.LongTensor` of shape `[rows]`, *optional*): positions whose rows to compute, all when not given.

    Returns:
        `torch.Tensor` of shape `[batch, heads, rows, seq]`: row `i` holds the weights of all tokens at position `i`.
    """
    place = (log_weights[:, :1] != -math.inf).long().cumsum(-1)  # [batch, 1, seq]
    runs = _runs(segment_ids)
    rows = slice(None) if positions is None else positions
    here, own_runs = place[..., rows], None if runs is None else runs[:, rows]
    return _weight_matrix(log_weights, settings, alibi_slopes, here, place, own_runs, runs)


def _weight_matrix(log_weights, settings, alibi_slopes, here, place, own_runs, runs):
    """With the places and runs of the rows (`here`, `own_runs`) and of all positions."""
    distance = here.unsqueeze(-1) - place.unsqueeze(-2)
    allowed = distance >= 0 if settings.causal else torch.ones_like(distance, dtype=torch.bool)
    if settings.window is not None:
        allowed = allowed & (distance.abs() < settings.window)
    if runs is not None:
        allowed = allowed & same_segment(own_runs, runs)
    logits = log_weights.unsqueeze(-2)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.view(-1, 1, 1) * distance.abs()
    logits = torch.where(allowed, logits, -math.inf)
    if settings.sink_weight:
        logits = nn.functional.pad(logits, (0, 1), value=math.log(settings.sink_weight))
    weights = torch.softmax(logits, dim=-1)
    weights = torch.where((logits == -math.inf).all(-1, keepdim=True), 0.0, weights)  # a pad may have an empty window
    return weights[..., :-1] if settings.sink_weight else weights
