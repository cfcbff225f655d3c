"""The recurrent form of the focus operator: one token from a state of constant size.

`pack_state` and `unpack_state` convert between the state of `focus_mixing` and the tensor in a cache. `state_of_rows` comes
first for rows with pads or packed sequences. A token is processed by `prepare_step`, then `step_global_mean` or
`step_window_mean`, then `gate_output`.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from .focus_functions import WEIGHT_FUNCTIONS, FocusSettings, gate_value, log_weight, rotate
from .focus_tiles import standardize_forward
from .running_mean import EMPTY, FocusState


def state_of_rows(
    state: FocusState,
    past: FocusState | None,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None,
    seq: int,
    lengths: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    tokens: Callable[[torch.Tensor], FocusState],
) -> FocusState:
    """The state after the last real token of each row, of its sequence alone.

    Args:
        state (`FocusState`): state of the mixing step after the last of `seq` tokens.
        past (`FocusState`, *optional*): state before the first token. Not together with `segment_ids`.
        settings, alibi_slopes, segment_ids: as in `focus_mixing`; pads behind the last real token are in its segment.
        lengths (`torch.LongTensor` of shape `[batch]`, *optional*): number of real tokens of each row, which pads follow.
            `None` if the last token of each row with any real token is real.
        tokens (`Callable`): places `[batch, count]` -> log weights and values of the tokens there, as `token_state` does.
    """
    if settings.window is None:
        if lengths is None or alibi_slopes is None:
            return state
        return state._replace(log_weights=state.log_weights + alibi_slopes * (seq - lengths).unsqueeze(1))
    if lengths is None and segment_ids is None:
        return state
    batch, kept = state.values.shape[0], settings.window - 1
    ends = torch.full((batch,), seq, device=state.values.device) if lengths is None else lengths
    places = ends.unsqueeze(1) - kept + torch.arange(kept, device=ends.device)
    here = places.clamp_min(0)
    logs, values = tokens(here)[:2]
    is_new = (places >= 0).unsqueeze(1)  # [batch, 1, kept]
    if segment_ids is not None:
        last = segment_ids.gather(1, (ends - 1).clamp_min(0).unsqueeze(1))
        is_new = is_new & (segment_ids.gather(1, here) == last).unsqueeze(1)
    if past is None:
        return FocusState(logs.masked_fill(~is_new, -math.inf), values)
    old = (places + past.values.shape[2]).unsqueeze(1).expand_as(logs)  # [batch, heads, kept]
    exists, old = old >= 0, old.clamp(0, past.values.shape[2] - 1)
    old_logs = past.log_weights.gather(2, old).masked_fill(~exists, -math.inf)
    old_values = past.values.gather(2, old.unsqueeze(-1).expand_as(values))
    return FocusState(torch.where(is_new, logs, old_logs), torch.where(is_new.unsqueeze(-1), values, old_values))


def pack_state(
    state: FocusState, settings: FocusSettings, head_dim: int, seen_tokens: int | torch.Tensor
) -> torch.Tensor:
    """The state as one tensor for a cache, float32 or wider, in the layout of the steps below.

    `parts` are keys and values, or values alone.

    Global: `[batch, heads * (2 + parts * head_dim)]`: a reference log weight `m`, the sum of weights `z = sum exp(l - m)`
    and the means of each part. If log weights are bounded, `m` is 0. Otherwise `z` is about the number of tokens, so that
    one more token is not lost to rounding.
    Windowed: `[batch, heads * (1 + parts * head_dim), past]`: log weights and parts of the last `past = max(window - 1,
    1)` tokens, oldest first, with a log weight of `-inf` for missing tokens.
    """
    logs, values = state.log_weights, state.values
    if settings.window is None:
        reference = torch.zeros_like(logs)
        if not settings.bounded(head_dim):
            if not isinstance(seen_tokens, torch.Tensor):  # `as_tensor` would fix a length that is dynamic in a graph
                seen_tokens = logs.new_full((), seen_tokens)
            reference = logs - seen_tokens.to(logs).log()
        parts = values.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [batch, parts, heads, head_dim]
        return torch.cat((reference, (logs - reference).exp(), parts.flatten(1)), dim=1)
    missing = max(settings.window - 1, 1) - logs.shape[2]
    logs = nn.functional.pad(logs, (missing, 0), value=-math.inf)
    values = nn.functional.pad(values, (0, 0, missing, 0))
    parts = values.unflatten(-1, (-1, head_dim)).permute(0, 3, 1, 4, 2)  # [batch, parts, heads, head_dim, past]
    return torch.cat((logs, parts.flatten(1, 3)), dim=1)


def packed_shape(window: int | None, heads: int, parts: int, head_dim: int) -> tuple[int, ...]:
    """Shape of the result of `pack_state`, without the batch."""
    if window is None:
        return (heads * (2 + parts * head_dim),)
    return heads * (1 + parts * head_dim), max(window - 1, 1)


def unpack_state(packed: torch.Tensor, settings: FocusSettings, heads: int, head_dim: int) -> FocusState:
    """The inverse of `pack_state`."""
    if settings.window is None:
        m, z, parts = packed[:, :heads], packed[:, heads : 2 * heads], packed[:, 2 * heads :]
        values = parts.unflatten(1, (-1, heads, head_dim)).transpose(1, 2).flatten(2)
        return FocusState((m + z.log()).clamp_min(EMPTY), values)
    packed = packed[..., packed.shape[-1] - (settings.window - 1) :]
    values = packed[:, heads:].unflatten(1, (-1, heads, head_dim)).permute(0, 2, 4, 1, 3).flatten(3)
    return FocusState(packed[:, :heads], values)


def step_global_mean(
    logits: torch.Tensor,
    token: torch.Tensor,
    packed: torch.Tensor,
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add one token to a packed global state in place, in few operations, which each generated token waits for.

    Args:
        logits (`torch.Tensor` of shape `[batch, heads]`): focus logits of the token.
        token (`torch.Tensor` of shape `[batch, parts, heads, head_dim]`): its key and value, or its value alone.
        packed (`torch.Tensor`): result of `pack_state`, changed in place.
        settings, alibi_slopes: as in `focus_mixing`.

    Returns:
        `torch.Tensor` of shape `[batch, parts, heads, head_dim]`: the means, the new token included.
    """
    batch, parts, heads, head_dim = token.shape
    m, z = packed[:, :heads], packed[:, heads : 2 * heads]
    means = packed[:, 2 * heads :].view(batch, parts, heads, head_dim)
    if settings.bounded(head_dim):
        weights = WEIGHT_FUNCTIONS[settings.weight_function].weight(logits)
        if alibi_slopes is not None:
            z.mul_(torch.exp(-alibi_slopes))
    else:
        logs = log_weight(logits, settings.weight_function)
        past = m if alibi_slopes is None else m - alibi_slopes
        top = torch.maximum(past, logs)
        z.mul_((past - top).exp_())
        weights = (logs - top).exp_()
        m.copy_(top)
    z.add_(weights)
    means.lerp_(token, (weights / z).view(batch, 1, heads, 1))
    if settings.sink_weight:
        seen = z / (z + settings.sink_weight * torch.exp(-m))
        return means * seen.view(batch, 1, heads, 1)
    return means


def step_window_mean(
    logits: torch.Tensor,
    token: torch.Tensor,
    push: Callable[[torch.Tensor], torch.Tensor],
    settings: FocusSettings,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add one token to a packed window.

    Args:
        logits, token, settings, alibi_slopes: as in `step_global_mean`.
        push (`Callable`): appends a packed token `[batch, size, 1]` to the state and returns both, as `update_conv_state`
            of a cache does.

    Returns:
        `torch.Tensor` of shape `[batch, parts, heads, head_dim]`: the means, the new token included.
    """
    assert settings.window is not None  # for type checkers
    heads = token.shape[2]
    logs = log_weight(logits, settings.weight_function)
    recent = push(torch.cat((logs, token.flatten(1)), dim=1).unsqueeze(-1))[..., -settings.window :]
    logs = recent[:, :heads]  # [batch, heads, window]
    if alibi_slopes is not None:
        distance = torch.arange(logs.shape[-1] - 1, -1, -1, device=logs.device)
        logs = logs - alibi_slopes.unsqueeze(-1) * distance
    if settings.sink_weight:
        logs = nn.functional.pad(logs, (1, 0), value=math.log(settings.sink_weight))
    weights = torch.softmax(logs, dim=-1)
    if settings.sink_weight:
        weights = weights[..., 1:]
    return (recent[:, heads:].unflatten(1, token.shape[1:]) * weights.unsqueeze(1).unsqueeze(3)).sum(-1)


def prepare_step(
    qfkv: torch.Tensor, settings: FocusSettings, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised and rotated parts of one token and its focus logits, in float32. `qfkv` may be overwritten.

    Args:
        qfkv, rotary: as in `focus_mixing`, for one token.

    Returns:
        Parts `[batch, parts, heads, head_dim]`, standardised and rotated, and focus logits `[batch, heads]`.
    """
    parts = qfkv[:, 0]
    if parts.dtype in (torch.bfloat16, torch.float16):
        parts = parts.float()
    if settings.normalize:
        parts = standardize_forward(parts)[0]
    logits = (parts[:, -3] * parts[:, -2]).sum(-1).mul_(settings.scale)
    if rotary is not None:
        turning = parts[:, 0::2]  # queries and keys
        turning.copy_(rotate(turning, *rotary))
    return parts, logits


def gate_output(query: torch.Tensor, kbar: torch.Tensor, vbar: torch.Tensor, settings: FocusSettings) -> torch.Tensor:
    """Means of values, gated by queries and means of keys; all are `[..., head_dim]`."""
    gate = gate_value((query * kbar).sum(-1).mul_(settings.scale), settings.output_gate)
    return gate.unsqueeze(-1) * vbar
