"""Weighted running means in tiles: the core of the focus operator, forward and, in reverse, backward.

Means over the past of every position, or over a window of it, with weights given by their logs. The weights of a tile form a
dense triangle or band, applied as a batched product. All that precedes a tile is one more token, whose log weight is the log
of the summed weights and whose value is their mean. So nothing is subtracted, and no exponent is positive. Read bottom-up
from `two_sided_mean` and `weighted_mean`. All functions run inside autograd functions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn


# In place of log(0), and finite, so that no difference is NaN. A weight out of reach is 0 even relative to an empty sum.
EMPTY = -1e29
_OUT_OF_REACH = -1e30
_TILE = 16  # tokens whose weights form one dense triangle
_DENSE = 160  # sequences up to this length need no second level
_WIDEST_BAND = 65  # wider windows are merged from running means of their two halves


class FocusState(NamedTuple):
    """State of the means after a token, in float32.

    Global: `log_weights` `[batch, heads]` is the log of the summed weights, `values` `[batch, heads, channels]` their
    mean. Windowed: the last `window - 1` tokens, `[batch, heads, past]` and `[batch, heads, past, channels]`, with a log
    weight of `-inf` for missing tokens. `segments` (`[batch]` or `[batch, past]`) are their segment ids.
    """

    log_weights: torch.Tensor
    values: torch.Tensor
    segments: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FocusState":
        """The state with `function` applied to each of its tensors."""
        segments = None if self.segments is None else function(self.segments)
        return FocusState(function(self.log_weights), function(self.values), segments)


def join_tokens(states: Sequence[FocusState]) -> FocusState:
    """Windowed states of consecutive tokens as one."""
    segments = [state.segments for state in states if state.segments is not None]
    return FocusState(
        torch.cat([state.log_weights for state in states], dim=2),
        torch.cat([state.values for state in states], dim=2),
        torch.cat(segments, dim=1) if segments else None,
    )


def _merge(log_a, mean_a, log_b, mean_b):
    """Weighted mean of two disjoint sets from their log weights `[...]` and means `[..., channels]`."""
    share = torch.sigmoid(log_b - log_a)
    return torch.logaddexp(log_a, log_b), torch.lerp(mean_a, mean_b, share.unsqueeze(-1))


def _dense_mean(logs, values, allowed, alibi_slopes, distance, out):
    """Means by explicit weights: `logs [..., keys]`, `values [rows, keys, channels]`, `out [rows, queries, channels]`.

    `allowed` and `distance` broadcast against `[..., queries, keys]`. Returns the logs of the summed weights.
    """
    logits = logs.unsqueeze(-2)  # [..., 1, keys]
    if alibi_slopes is not None:
        logits = logits - alibi_slopes * distance
    logits = torch.where(allowed, logits, -math.inf)  # [..., queries, keys]
    top = logits.amax(-1, keepdim=True).clamp_min_(EMPTY)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True).clamp_min_(1e-37)
    weights = weights.div_(total)
    torch.bmm(weights.flatten(0, -3), values, out=out)
    return (top + total.log()).squeeze(-1)


def _pad_segments(segments, side):
    if segments is None:
        return None
    first, last = segments[:, :1].expand(-1, side[0]), segments[:, -1:].expand(-1, side[1])
    return torch.cat((first, segments, last), dim=1)


def same_segment(segments_a, segments_b):
    """`[batch, ..., a]` and `[batch, ..., b]` -> `[batch, 1 (heads), ..., a, b]`: whether two tokens share a segment."""
    return (segments_a.unsqueeze(-1) == segments_b.unsqueeze(-2)).unsqueeze(1)


def _running_mean(logs, values, alibi_slopes, segments, carry, reverse):
    """Inclusive running means. `logs [batch, heads, n]`, `values [batch, heads, n, channels]`, `alibi_slopes [heads]`.

    `carry` is the state before the first token (after the last when `reverse`), one step away from it.
    """
    batch, heads, n, channels = values.shape
    tile = n if n <= _DENSE and carry is None else _TILE
    tiles = -(-n // tile)
    padding = tiles * tile - n
    if padding:
        side = (padding, 0) if reverse else (0, padding)
        logs = nn.functional.pad(logs, side, value=-math.inf)
        values = nn.functional.pad(values, (0, 0, *side))
        segments = _pad_segments(segments, side)
    logs, values = logs.reshape(batch, heads, tiles, tile), values.reshape(-1, tile, channels)

    place = torch.arange(tile, device=logs.device)
    distance = place[:, None] - place[None, :]
    distance = -distance if reverse else distance
    allowed = distance >= 0
    if segments is not None:
        segments = segments.view(batch, tiles, tile)
        allowed = allowed & same_segment(segments, segments)
    local_slopes = None if alibi_slopes is None else alibi_slopes.view(heads, 1, 1, 1)
    means = torch.empty_like(values)
    log_total = _dense_mean(logs, values, allowed, local_slopes, distance, means)
    means = means.view(batch, heads, tiles, tile, channels)

    if tiles > 1 or carry is not None:
        before = _means_before_tiles(log_total, means, alibi_slopes, segments, carry, reverse)
        before_logs = before.log_weights.unsqueeze(-1)
        if alibi_slopes is not None:
            before_logs = before_logs - alibi_slopes.view(heads, 1, 1) * (tile - place if reverse else place + 1)
        if segments is not None:
            connected = (segments == before.segments.unsqueeze(-1)).unsqueeze(1)
            before_logs = torch.where(connected, before_logs, _OUT_OF_REACH)
        log_total, means = _merge(before_logs, before.values.unsqueeze(3), log_total, means)

    log_total, means = log_total.view(batch, heads, -1), means.view(batch, heads, -1, channels)
    kept = slice(padding, None) if reverse else slice(0, n)
    return log_total[:, :, kept], means[:, :, kept]


def _means_before_tiles(log_total, means, alibi_slopes, segments, carry, reverse):
    """Means over all that precedes each tile (follows it when `reverse`), `[batch, heads, tiles]` and `[..., channels]`.

    `log_total [batch, heads, tiles, tile]` and `means` are the running means within tiles. The last one of each tile is
    the mean of the tile, and a running mean over these is the result, shifted by one tile.
    """
    batch, heads, _, tile, channels = means.shape
    end, step = (0, slice(1, None)) if reverse else (-1, slice(None, -1))
    logs, values = log_total[..., end], means[..., end, :]
    segments = None if segments is None else segments[..., end]
    if carry is not None:
        pairs = [(carry.log_weights.unsqueeze(2), logs), (carry.values.unsqueeze(2), values)]
        if segments is not None:
            pairs.append((carry.segments.unsqueeze(1), segments))
        joined = [torch.cat(pair[::-1] if reverse else pair, dim=2 if pair[0].ndim > 2 else 1) for pair in pairs]
        logs, values = joined[:2]
        segments = joined[2] if segments is not None else None
    tile_slopes = None if alibi_slopes is None else alibi_slopes * tile
    logs, values = (x[:, :, step] for x in _running_mean(logs, values, tile_slopes, segments, None, reverse))
    if carry is not None:
        return FocusState(logs, values, None if segments is None else segments[:, step])
    # Nothing precedes the first tile.
    parts = (
        (logs, logs.new_full((batch, heads, 1), _OUT_OF_REACH)),
        (values, values.new_zeros(batch, heads, 1, channels)),
    )
    logs, values = (torch.cat(part if reverse else part[::-1], dim=2) for part in parts)
    if segments is not None:
        part = segments[:, step], segments[:, -1:] if reverse else segments[:, :1]
        segments = torch.cat(part if reverse else part[::-1], dim=1)
    return FocusState(logs, values, segments)


def _band_mean(logs, values, window, alibi_slopes, segments, reverse):
    """Means over narrow windows. The inputs begin with one tile of past (end with one of future when `reverse`)."""
    batch, heads, length, channels = values.shape
    tile = _band_tile(window)
    tiles = length // tile  # per head, with that of the past
    pairs = batch * heads * tiles - 1
    # Pairs of neighbouring tiles are views of the same memory. Pairs that span two heads are computed, but not used.
    logs = logs.contiguous().view(-1).as_strided((pairs, 2 * tile), (tile, 1))
    values = values.contiguous().view(-1).as_strided((pairs, 2 * tile, channels), (tile * channels, channels, 1))

    place, key = (torch.arange(size, device=logs.device) for size in (tile, 2 * tile))
    distance = key[None, :] - place[:, None] if reverse else place[:, None] + tile - key[None, :]
    allowed = (distance >= 0) & (distance < window)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.view(1, heads, 1).expand(batch, heads, tiles).reshape(-1)[:-1].view(-1, 1, 1)
    if segments is not None:
        flat = segments.unsqueeze(1).expand(batch, heads, length).reshape(-1)
        both = flat.as_strided((pairs, 2 * tile), (tile, 1))
        own = both[:, :tile] if reverse else both[:, tile:]
        allowed = allowed & (own.unsqueeze(-1) == both.unsqueeze(-2))
    means = values.new_empty(pairs + 1, tile, channels)
    kept = slice(None, -tile) if reverse else slice(tile, None)  # without the tile that has no neighbour
    log_total = _dense_mean(logs, values, allowed, alibi_slopes, distance, means[:-1] if reverse else means[1:])
    log_total = nn.functional.pad(log_total, (0, 0, 0, 1) if reverse else (0, 0, 1, 0))
    means = means.view(batch, heads, length, channels)
    return log_total.view(batch, heads, length)[:, :, kept], means[:, :, kept]


def _band_tile(window):
    return max(_TILE, -(-(window - 1) // _TILE) * _TILE)


def _wide_mean(logs, values, window, alibi_slopes, segments):
    """Causal means over wide windows, each a suffix of one block and a prefix of the next. The inputs begin with the past.

    Blocks are as long as the window, as in van Herk's and Gil-Werman's running maximum. Nothing is subtracted, and the work
    does not depend on the window.
    """
    batch, heads, length, _ = values.shape
    place = torch.arange(length, device=logs.device)
    block = place // window
    starts = place.new_zeros(1, length)
    parts = block.unsqueeze(0)
    if segments is not None:
        changes = nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        starts = torch.where(changes, place, 0).cummax(1).values
        parts = changes.cumsum(1) * length + parts
    parts = parts.expand(batch, length)
    prefix_logs, prefix_means = _running_mean(logs, values, alibi_slopes, parts, None, reverse=False)
    backwards = None if alibi_slopes is None else -alibi_slopes
    suffix_logs, suffix_means = _running_mean(logs, values, backwards, parts, None, reverse=True)

    first = torch.maximum((place - window + 1).clamp_min(0), starts).expand(batch, length)  # of what position i sees
    index = first.unsqueeze(1).expand(batch, heads, length)
    suffix_logs = suffix_logs.gather(2, index)
    suffix_means = suffix_means.gather(2, index.unsqueeze(-1).expand_as(suffix_means))
    if alibi_slopes is not None:
        suffix_logs = suffix_logs - alibi_slopes.view(-1, 1) * (place - index)
    separate = (first < block * window).unsqueeze(1)
    suffix_logs = torch.where(separate, suffix_logs, _OUT_OF_REACH)
    return _merge(suffix_logs, suffix_means, prefix_logs, prefix_means)


def weighted_mean(logs, values, window, alibi_slopes, segments, carry=None, reverse=False):
    """Inclusive means in one direction, in tiles.

    Args:
        logs (`torch.Tensor` of shape `[batch, heads, n]`), values (`[batch, heads, n, channels]`).
        window (`int`, *optional*), alibi_slopes (`[heads]`, *optional*), segments (`[batch, n]`, *optional*).
        carry (`FocusState`, *optional*): state before the first token (after the last when `reverse`).

    Returns:
        Log of the summed weights `[batch, heads, n]` and means `[batch, heads, n, channels]`.
    """
    if window is None:
        return _running_mean(logs, values, alibi_slopes, segments, carry, reverse)
    if window > _WIDEST_BAND and reverse:
        flipped = None if carry is None else carry.map(_flip)
        backwards = None if segments is None else _flip(segments)
        log_total, means = weighted_mean(_flip(logs), _flip(values), window, alibi_slopes, backwards, flipped)
        return _flip(log_total), _flip(means)

    n = logs.shape[2]
    past = 0 if carry is None else carry.log_weights.shape[2]
    front, back = past, 0
    if window <= _WIDEST_BAND:
        front = _band_tile(window)
        back = -n % front
    before = [] if carry is None else [carry]
    missing = _no_tokens(logs, values, segments, front - past, -1 if reverse else 0)
    after = _no_tokens(logs, values, segments, back, 0 if reverse else -1)
    tokens = [missing, *before, FocusState(logs, values, segments), after]
    tokens = [part for part in tokens if part.log_weights.shape[2]]
    if len(tokens) > 1:
        logs, values, segments = join_tokens(tokens[::-1] if reverse else tokens)
    if window <= _WIDEST_BAND:
        log_total, means = _band_mean(logs, values, window, alibi_slopes, segments, reverse)
        kept = slice(back, None) if reverse else slice(0, n)
    else:
        log_total, means = _wide_mean(logs, values, window, alibi_slopes, segments)
        kept = slice(front, None)
    return log_total[:, :, kept], means[:, :, kept]


def _no_tokens(logs, values, segments, count, neighbour):
    """`count` tokens without weight, in the segment of the token at index `neighbour`."""
    batch, heads, _, channels = values.shape
    return FocusState(
        logs.new_full((batch, heads, count), -math.inf),
        values.new_zeros(batch, heads, count, channels),
        None if segments is None else segments[:, neighbour].unsqueeze(1).expand(-1, count),
    )


def _flip(x):
    return x.flip(2) if x.dim() > 2 else x.flip(1)


def two_sided_mean(logs, values, window, alibi_slopes, segments):
    """Means over `(i - window, i + window)`: the inclusive past merged with the exclusive future."""
    past_logs, past_means = weighted_mean(logs, values, window, alibi_slopes, segments)
    rest = None if window is None else window - 1
    if logs.shape[2] == 1 or rest == 0:
        return past_logs, past_means
    following = None if segments is None else segments[:, 1:]
    next_logs, next_means = weighted_mean(
        logs[:, :, 1:], values[:, :, 1:], rest, alibi_slopes, following, reverse=True
    )
    if alibi_slopes is not None:
        next_logs = next_logs - alibi_slopes.view(-1, 1)
    if segments is not None:
        next_logs = torch.where((following == segments[:, :-1]).unsqueeze(1), next_logs, _OUT_OF_REACH)
    next_logs = nn.functional.pad(next_logs, (0, 1), value=_OUT_OF_REACH)
    next_means = nn.functional.pad(next_means, (0, 0, 0, 1))
    return _merge(next_logs, next_means, past_logs, past_means)
