"""Causal attention with a window and a dilation.

A step at position `i` of its sequence attends to steps `j <= i` of the same sequence with `(i - j) % dilation == 0`. So the
sequence consists of `dilation` independent phases. With the position `i' = i // dilation` in a phase, the window is

    none       every j'
    sliding    i' - j' < window
    block      j' // window >= i' // window - 1        (its own block up to itself, and the whole block before it)

`naive_windowed_attention` is the definition in loops. `windowed_attention` folds phases into the batch, so that a full window
is plain causal attention, and cuts other windows into chunks that attend to themselves and the chunk before. `step_attention`
is for one step after cached keys, which are read with a stride. `visible` makes the mask for all other cases. All call an
`attend` function on `[batch, heads, length, channels]`, in the model transformers' attention interface.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..common.model_inputs import is_dynamic


# Minimum length of a chunk: with shorter ones, their number costs more than the keys they save.
_SHORTEST_CHUNK = 32


def naive_windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    window: int | None = None,
    dilation: int = 1,
    block: bool = False,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in loops.

    Args:
        query (`torch.Tensor` of shape `[batch, steps, heads, channels]`): of the last steps of the keys.
        key, value (`torch.Tensor` of shape `[batch, length, heads, channels]`): `length >= steps`.
        positions (`torch.LongTensor` of shape `[batch, length]`): of each key in its sequence; below 0 where there is no key.
        window (`int`, *optional*): at least 1; `None` for all keys.
        dilation (`int`): at least 1.
        block (`bool`): whether the window is of blocks.
        segments (`torch.LongTensor` of shape `[batch, length]`, *optional*): which sequence each key belongs to.

    Returns:
        `torch.Tensor` of the shape of `query`.
    """
    batch, steps, heads, channels = query.shape
    length = key.shape[1]
    out = torch.zeros_like(query)
    for b in range(batch):
        for i in range(steps):
            at = length - steps + i
            here = int(positions[b, at])
            seen = []
            for j in range(at + 1):
                there = int(positions[b, j])
                same = segments is None or segments[b, j] == segments[b, at]
                if not same or there < 0 or there > here or (here - there) % dilation:
                    continue
                later, earlier = here // dilation, there // dilation
                if window is not None and block and earlier // window < later // window - 1:
                    continue
                if window is not None and not block and later - earlier >= window:
                    continue
                seen.append(j)
            for h in range(heads):
                logits = torch.stack([query[b, i, h] @ key[b, j, h] for j in seen]) * channels**-0.5
                weights = torch.softmax(logits, dim=0)
                out[b, i, h] = sum(weight * value[b, j, h] for weight, j in zip(weights, seen))
    return out


def visible(
    positions: torch.Tensor,
    steps: int,
    window: int | None = None,
    dilation: int = 1,
    block: bool = False,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys each of the last `steps` steps attends to.

    Args:
        positions (`torch.LongTensor` of shape `[..., length]`): of each key in its sequence; below 0 where there is no key.
        steps (`int`): number of queries, which belong to the last keys.
        window, dilation, block: see the top of this file.
        segments (`torch.LongTensor` of shape `[..., length]`, *optional*): which sequence each key belongs to.

    Returns:
        `torch.BoolTensor` of shape `[..., steps, length]`.
    """
    queries, keys = positions[..., -steps:, None], positions[..., None, :]
    seen = (keys >= 0) & (keys <= queries)
    if segments is not None:
        seen = seen & (segments[..., -steps:, None] == segments[..., None, :])
    if dilation > 1:
        seen = seen & ((queries - keys) % dilation == 0)
        queries, keys = queries // dilation, keys.div(dilation, rounding_mode="floor")
    if window is None:
        return seen
    return seen & (keys >= (queries // window - 1) * window if block else queries - keys < window)


def window_reach(positions: torch.Tensor, window: int, dilation: int = 1, block: bool = False) -> torch.Tensor:
    """Number of keys in the window of each step, itself included, all of them in a row of its phase.

    Args:
        positions (`torch.LongTensor` of shape `[..., length]`): of each step in its sequence, which begins at position 0.
        window, dilation, block: see the top of this file.

    Returns:
        `torch.IntTensor` of the shape of `positions`.
    """
    places = positions // dilation
    longest = places % window + window + 1 if block else torch.full_like(places, window)
    return torch.minimum(places + 1, longest).int()


def windowed_attention(
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None = None,
    dilation: int = 1,
    block: bool = False,
    positions: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of whole sequences to themselves.

    Args:
        attend (`Callable`): `attend(query, key, value, mask, is_causal)` on `[batch, heads, length, channels]`, with a
            boolean mask `[1 or batch, 1, queries, keys]` or `None`, returns `[batch, queries, heads, channels]`.
        query, key, value (`torch.Tensor` of shape `[batch, length, heads, channels]`).
        window, dilation, block: see the top of this file.
        positions, segments (`torch.LongTensor` of shape `[batch, length]`, *optional*): of packed rows, in which every
            sequence begins at a multiple of the dilation. Without them a row is one sequence from position 0.

    Returns:
        `torch.Tensor` of the shape of `query`.
    """
    length = query.shape[1]
    phase_length = -(-length // dilation)
    # With dynamic lengths one program serves all: empty steps at the end and, in small windows, no case for short texts.
    length_is_dynamic = segments is None and is_dynamic(length)
    if length_is_dynamic and (window is not None or dilation > 1):
        phase_length = length // dilation + 2
    packed = None
    if positions is not None and segments is not None:
        packed = _fold_positions(positions // dilation, dilation), _fold_positions(segments, dilation)
    if window is not None:
        reach = 2 * window if block else window
        for_any_length = length_is_dynamic and reach <= _SHORTEST_CHUNK
        if for_any_length or window < phase_length:
            # Without segments the blocks of the window are the chunks; packed sequences begin anywhere in a chunk.
            shortest = _SHORTEST_CHUNK if length_is_dynamic else min(_SHORTEST_CHUNK, phase_length)
            chunk = window if block and packed is None else max(reach - 1, shortest)
            chunks = phase_length // chunk + 2 if length_is_dynamic else -(-phase_length // chunk)
            return _attend_in_chunks(attend, query, key, value, window, dilation, block, packed, chunk, chunks)
    return _attend_to_all(attend, query, key, value, dilation, packed, phase_length)


def _attend_to_all(attend, query, key, value, dilation, packed, phase_length):
    """Attention without a window. `packed`: positions and segments `[batch * dilation, phase_length]` of packed rows."""
    batch, length = query.shape[:2]
    query, key, value = (_fold(x, dilation, phase_length) for x in (query, key, value))
    mask = None
    if packed is not None:
        positions, segments = packed
        mask = visible(positions, phase_length, segments=segments).unsqueeze(1)
    out = attend(query, key, value, mask, mask is None)
    return out.unflatten(0, (batch, dilation)).transpose(1, 2).flatten(1, 2)[:, :length]


def _attend_in_chunks(attend, query, key, value, window, dilation, block, packed, chunk, chunks):
    """Attention with a window, in `chunks` of `chunk` steps. `packed`: as for `_attend_to_all`."""
    batch, length, heads, channels = query.shape
    query = _cut(_pad(query, 0, chunks * chunk * dilation), chunks, dilation)
    key, value = (
        _cut(_pad(x, chunk * dilation, chunks * chunk * dilation), chunks + 1, dilation) for x in (key, value)
    )
    key, value = (torch.cat((x[:-1], x[1:]), dim=-2) for x in (key, value))
    if packed is None:  # the mask of a chunk is the same for all rows
        places = _look_back(torch.arange(-chunk, chunks * chunk, device=query.device), chunk)
        mask = visible(places, chunk, window, block=block).unsqueeze(1)
        out = attend(*(x.flatten(1, 3) for x in (query, key, value)), mask, False)
        out = out.unflatten(2, (batch, dilation, heads)).permute(2, 0, 1, 3, 4, 5)
    else:
        positions, segments = packed
        mask = _mask_of_packed_chunks(positions, segments, chunk, chunks, window, block)
        out = attend(*(x.flatten(1, 2).flatten(0, 1) for x in (query, key, value)), mask, False)
        out = out.unflatten(0, (chunks, batch, dilation)).permute(1, 0, 3, 2, 4, 5)
    return out.reshape(batch, -1, heads, channels)[:, :length]


def _mask_of_packed_chunks(positions, segments, chunk, chunks, window, block):
    """Mask `[chunks * rows, 1, chunk, 2 * chunk]`, from positions and segments `[rows, phase_length]`."""
    # Steps after the end attend to each other; there are no keys before the beginning.
    after = chunks * chunk - positions.shape[1]
    positions = nn.functional.pad(nn.functional.pad(positions, (0, after)), (chunk, 0), value=-1)
    segments = nn.functional.pad(segments, (chunk, after), value=-1)
    positions, segments = (_look_back(x, chunk) for x in (positions, segments))
    mask = visible(positions, chunk, window, block=block, segments=segments)
    return mask.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def step_attention(
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys_seen: int | None = None,
    dilation: int = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one step to every `dilation`-th cached key.

    Args:
        attend (`Callable`): as for `windowed_attention`.
        query (`torch.Tensor` of shape `[batch, heads, 1, channels]`): of the step of the last key.
        key, value (`torch.Tensor` of shape `[batch, heads, length, channels]`).
        keys_seen (`int`, *optional*): number of keys in the window; `None` for all.
        dilation (`int`): at least 1.
        mask (`torch.BoolTensor` of shape `[batch, 1, 1, keys]`, *optional*): which of the keys read exist.

    Returns:
        `torch.Tensor` of shape `[batch, 1, heads, channels]`.
    """
    first = first_key(key.shape[2], keys_seen, dilation)
    if first or dilation > 1:
        key, value = key[:, :, first::dilation], value[:, :, first::dilation]
    return attend(query, key, value, mask, False)


def first_key(length: int, keys_seen: int | None, dilation: int) -> int:
    """Index of the first of `length` keys that a step reads. Its own key is the last; it reads every `dilation`-th."""
    first = (length - 1) % dilation
    return first if keys_seen is None else max(first, length - 1 - (keys_seen - 1) * dilation)


def _pad(x, before, length):
    """`[batch, length', ...]` with zeros before, and after up to `before + length`."""
    return nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (before, length - x.shape[1]))


def _fold(x, dilation, phase_length):
    """`[batch, length, heads, channels]` -> `[batch * dilation, heads, phase_length, channels]`."""
    x = _pad(x, 0, phase_length * dilation) if x.shape[1] < phase_length * dilation else x
    return x.unflatten(1, (phase_length, dilation)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _fold_positions(x, dilation):
    """`[batch, length]` -> `[batch * dilation, phase_length]`, padded by repeating the last entry."""
    missing = -x.shape[1] % dilation
    x = torch.cat((x, x[:, -1:].expand(-1, missing)), dim=1)
    return x.unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)


def _cut(x, chunks, dilation):
    """`[batch, chunks * chunk * dilation, heads, channels]` -> `[chunks, batch, dilation, heads, chunk, channels]`."""
    return x.unflatten(1, (chunks, -1, dilation)).permute(1, 0, 3, 4, 2, 5)


def _look_back(x, chunk):
    """`[..., (chunks + 1) * chunk]` -> `[..., chunks, 2 * chunk]`: each chunk after the one before it."""
    x = x.unflatten(-1, (-1, chunk))
    return torch.cat((x[..., :-1, :], x[..., 1:, :]), dim=-1)


__all__ = ["first_key", "naive_windowed_attention", "step_attention", "visible", "window_reach", "windowed_attention"]
