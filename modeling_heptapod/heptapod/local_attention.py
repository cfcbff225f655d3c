"""Local attention on a grid: every cell attends to the cells around it, in two dimensions.

Cell `(y, x)` attends to the cells `(y + dilation * a, x + dilation * b)` with `-radius <= a, b <= radius` that are on the
grid and kept by the padding mask:

    out[y, x] = sum_n softmax_n(scale * q[y, x] . k[n]) v[n]

Windows may be adapted. A bias for each offset is added to the logits. With a span, weights are multiplied before they are
normalised by `clamp(span[y, x] + 1 - distance, 0, 1)`, the soft edge of adaptive spans (arXiv 1905.07799) in two dimensions:
`distance` is the number of neighbours down or across, whichever is larger.

Windows are clipped at the border of the grid. Unlike in neighbourhood attention (arXiv 2204.07143), they do not move
inwards, so that a page gives the same result anywhere in a larger padded grid. With `q = k = v` and one head this is
`Local2DAttention` of the prototype `nonlinear-transformer`.

Read in this order: `naive_local_attention` (the specification), `_dense_attention` and, compiled, `_strips_at_once`
(strips of whole rows, for small and narrow grids and for windows as large as the grid), `attention_weights` (the matrix
of eager attention), `local_attention` (the operator). All other grids take `TiledAttention` in `tiled_attention.py`, adapted
windows `adaptive_attention` in `adaptive_attention.py`.
"""

import math
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import nn

from .adaptive_attention import adaptive_attention, bias_matrix, normalise, span_matrix
from .local_attention_operator import adaptive_kernel_attention, has_kernel, kernel_attention
from .tiled_attention import MASKED_LOGIT, TILE, TiledAttention, pad


# Grids that are not cut into tiles: up to so many cells, or where a strip of rows attends to no more cells than so many
# halos hold, but never more than the limit.
_STRIP = 8  # rows of queries
_DENSE_CELLS = 256
_DENSE_HALOS = 4
_DENSE_LIMIT = 4096


def naive_local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int | None,
    dilation: int = 1,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    span: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Local attention by a loop over cells: the executable specification of `local_attention`, with its arguments."""
    _, _, height, width, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale

    def near(place, length):
        if radius is None:
            return list(range(length))
        window = range(place - radius * dilation, place + radius * dilation + 1, dilation)
        return [neighbour for neighbour in window if 0 <= neighbour < length]

    out = []
    for y in range(height):
        for x in range(width):
            seen = (slice(None), slice(None), near(y, height)), (slice(None), slice(None), slice(None), near(x, width))
            keys, values = (part[seen[0]][seen[1]].flatten(2, 3) for part in (k, v))
            logits = scale * torch.einsum("bhc,bhnc->bhn", q[:, :, y, x], keys)
            share = torch.ones_like(logits)
            if span is not None or bias is not None:
                down, across = (
                    (torch.tensor(near(place, length)) - place) // dilation
                    for place, length in ((y, height), (x, width))
                )
            if bias is not None:
                assert radius is not None  # for type checkers
                logits = logits + bias[:, down + radius][:, :, across + radius].flatten(1)
            if span is not None:
                distance = torch.maximum(down.abs()[:, None], across.abs()[None, :]).flatten()
                share = (span[:, :, y, x, None] + 1 - distance).clamp(0, 1)
            if padding_mask is not None:
                share = share * padding_mask.bool()[:, None][seen[0]][seen[1]].flatten(2)
            logits = logits.masked_fill(share == 0, -math.inf)
            largest = logits.detach().amax(-1, keepdim=True)
            weights = share * (logits - largest.masked_fill(largest == -math.inf, 0)).exp()
            total = weights.sum(-1, keepdim=True)  # 0 for a cell that attends to nothing
            out.append(torch.einsum("bhn,bhnc->bhc", weights / torch.where(total == 0, 1, total), values))
    return torch.stack(out, dim=2).unflatten(2, (height, width))


def _visible(height, width, radius, dilation, padding_mask, device, queries=slice(None), keys=slice(None)):
    """Cells of the rows `keys` that each cell of the rows `queries` attends to, `[1 or batch, 1, 1 or cells, cells]`.

    `None` if every cell attends to every other.
    """
    visible = None
    symbolic = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)  # a comparison would add a guard
    if radius is not None and (dilation > 1 or symbolic or radius < max(height, width) - 1):
        down, across = (torch.arange(length, device=device) for length in (height, width))
        down, across = ((place[:, None] - place[None, :]).abs() for place in (down, across))
        down, across = ((x <= radius * dilation) & (x % dilation == 0) for x in (down, across))
        down = down[queries, keys]
        visible = (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)[None, None]
    if padding_mask is not None:
        real = padding_mask[:, keys].flatten(1)[:, None, None, :]
        visible = real if visible is None else visible & real
    return visible


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor may later be part of an autograd graph
def _window_bias(height, width, radius, dtype, device, queries, keys):
    """Mask that is added to the logits of a strip of a small grid. Cached, as it took a twentieth of the time."""
    visible = _visible(height, width, radius, 1, None, device, slice(*queries), slice(*keys))
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)


def _in_strips(height, radius):
    """Whether strips of rows attend to no more than three quarters of all rows."""
    return radius is not None and _STRIP + radius <= 0.75 * height


@lru_cache(maxsize=64)
def _strips(height, radius):
    """Rows of queries and the rows that they attend to, `((top, bottom), (first, last))`, from the top of the grid down."""
    if not _in_strips(height, radius):
        return [((0, height), (0, height))]
    tops = range(0, height, _STRIP)
    bottoms = [min(top + _STRIP, height) for top in tops]
    return [
        ((top, bottom), (max(0, top - radius), min(height, bottom + radius))) for top, bottom in zip(tops, bottoms)
    ]


def _strips_at_once(q, k, v, radius, scale, padding_mask, dropout):
    """As `_dense_attention`, but all strips in one call, so that one compiled graph takes grids of any height."""
    batch, _, height, width, _ = q.shape
    count = -(-height // _STRIP)
    below = count * _STRIP - height
    real = q.new_ones(batch, height, width, dtype=torch.bool) if padding_mask is None else padding_mask

    def strips(x, above, below):
        """`[batch, heads, height, width, channels]` -> `[batch * strips, heads, cells, channels]`"""
        rows = nn.functional.pad(x, (0, 0, 0, 0, above, below)).unfold(2, _STRIP + 2 * above, _STRIP)
        return rows.permute(0, 2, 1, 5, 3, 4).flatten(3, 4).flatten(0, 1)

    near = _visible(_STRIP + 2 * radius, width, radius, 1, None, q.device, slice(radius, radius + _STRIP))
    visible = near & strips(real[:, None, :, :, None], radius, radius + below).squeeze(-1).unsqueeze(2)
    sees = visible.any(-1, keepdim=True)  # the softmax of a row without keys is undefined
    out = nn.functional.scaled_dot_product_attention(
        strips(q, 0, below),
        strips(k, radius, radius + below),
        strips(v, radius, radius + below),
        attn_mask=visible | ~sees,
        dropout_p=dropout,
        scale=scale,
    )
    out = torch.where(sees, out, 0.0).unflatten(2, (_STRIP, width)).unflatten(0, (batch, count))
    return out.transpose(1, 2).flatten(2, 3)[:, :, :height]


def _dense_attention(q, k, v, radius, scale, padding_mask, dropout):
    """Attention of strips of rows to all cells of the rows in reach, by torch's scaled dot product attention."""
    height, width = q.shape[2:4]
    if torch.compiler.is_compiling() and _in_strips(height, radius):
        return _strips_at_once(q, k, v, radius, scale, padding_mask, dropout)
    # A cached fake tensor would break later calls, and under compilation a comparison would guard the sizes.
    keep = not torch.compiler.is_compiling() and type(q) is torch.Tensor
    keep = keep and padding_mask is None and height * width <= _DENSE_CELLS
    strips = _strips(height, radius)
    outs = []
    for queries, keys in strips:
        rows, seen = slice(*queries), slice(*keys)
        if keep:
            visible = _window_bias(height, width, radius, q.dtype, q.device, queries, keys)
        else:
            visible = _visible(height, width, radius, 1, padding_mask, q.device, rows, seen)
        if (
            padding_mask is not None
        ):  # the softmax of a row without keys is undefined: it gets all, and is zeroed below
            sees = visible.any(-1, keepdim=True)
            visible = visible | ~sees
        # Slicing out all rows would cost small grids 2% of their time.
        parts = (q, k, v) if len(strips) == 1 else (q[:, :, rows], k[:, :, seen], v[:, :, seen])
        query, key, value = (x.flatten(2, 3) for x in parts)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scale
        )
        outs.append(out if padding_mask is None else torch.where(sees, out, 0.0))
    return (torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]).view(q.shape)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    radius: int | None,
    dilation: int = 1,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    span: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of `local_attention` as a matrix, quadratic in cells: eager attention. The arguments are the same.

    Returns:
        `torch.Tensor` of shape `[batch, heads, height * width, height * width]`: weight of each cell for each query.
    """
    _check_inputs(q, k, k, radius, dilation, padding_mask, 0.0, span, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if padding_mask is None else padding_mask.bool()
    height, width = q.shape[2:4]
    visible = _visible(height, width, radius, dilation, mask, q.device)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (x.flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k))
        logits = scale * (queries @ keys.transpose(2, 3))
    if bias is not None:
        logits = logits + bias_matrix(bias, height, width, dilation)
    share = None if span is None else span_matrix(span, dilation)
    if share is not None:
        visible = share > 0 if visible is None else visible & (share > 0)
    if visible is not None:
        logits = logits.masked_fill(~visible, MASKED_LOGIT)
    weights = logits.softmax(-1) if share is None else normalise(logits, share)
    return (weights if visible is None else weights * visible.any(-1, keepdim=True)).to(q.dtype)


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int | None,
    dilation: int = 1,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    span: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every cell of a grid to the cells around it.

    Args:
        q, k, v (`torch.Tensor` of shape `[batch, heads, height, width, head_dim]`): queries, keys and values.
        radius (`int`, *optional*): number of neighbours in each direction: `0` is the cell alone, `1` the 3 x 3 cells
            around it, `None` the whole grid.
        dilation (`int`): distance in cells from one neighbour to the next; not used for the whole grid.
        padding_mask (`torch.Tensor` of shape `[batch, height, width]`, *optional*): zero or `False` at cells that are
            not attended to.
        scale (`float`, *optional*): factor of the dot products, `head_dim ** -0.5` when not given.
        dropout (`float`): share of weights that are set to zero, less than 1; the others are scaled up.
        span (`torch.Tensor` of shape `[batch, heads, height, width]`, *optional*): number of neighbours that each cell attends
            to in each direction, up to `radius`, which is required. Between two numbers the outer neighbours count in part.
        bias (`torch.Tensor` of shape `[heads, 2 * radius + 1, 2 * radius + 1]`, *optional*): added to the logits of each offset,
            down and across.

    Returns:
        `torch.Tensor` of the shape and dtype of `q`; zero for cells that attend to nothing.

    Raises:
        TypeError, ValueError: for tensors of another dtype or shape, or a radius, dilation or dropout out of range.
    """
    _check_inputs(q, k, v, radius, dilation, padding_mask, dropout, span, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if padding_mask is None else padding_mask.bool()
    if span is not None or bias is not None:
        assert radius is not None  # for type checkers
        if not dropout and has_kernel(q, radius):
            return adaptive_kernel_attention(q, k, v, span, bias, mask, radius, dilation, scale)
        return adaptive_attention(q, k, v, span, bias, mask, radius, dilation, scale, dropout)
    if radius is not None and not dropout and has_kernel(q, radius):
        return kernel_attention(q, k, v, radius, dilation, scale, mask)
    if radius is None or dilation == 1:
        return _attention(q, k, v, radius, scale, mask, dropout)
    # Cells a multiple of the dilation apart form a grid of their own, another row of the batch.
    batch, _, height, width, _ = q.shape
    phases = min(dilation, height), min(dilation, width)
    # A compiled graph always has a mask, so that it takes sizes that the dilation does not divide.
    if mask is None and (torch.compiler.is_compiling() or height % phases[0] or width % phases[1]):
        mask = q.new_ones(1, height, width, dtype=torch.bool).expand(batch, -1, -1)
    q, k, v = (_split_phases(x, phases) for x in (q, k, v))
    mask = None if mask is None else _split_phases(mask[:, None, :, :, None], phases)[:, 0, :, :, 0]
    return _join_phases(_attention(q, k, v, radius, scale, mask, dropout), phases, height, width)


def _split_phases(x, phases):
    """`[batch, heads, height, width, channels]` -> `[batch * phases, heads, ...]`, padded to grids of one size."""
    sides = (-x.shape[3] % phases[1], -x.shape[2] % phases[0])
    x = pad(x, (0, 0, 0, sides[0], 0, sides[1]))
    x = x.unflatten(3, (-1, phases[1])).unflatten(2, (-1, phases[0]))
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)


def _join_phases(x, phases, height, width):
    x = x.unflatten(0, (-1, *phases)).permute(0, 3, 4, 1, 5, 2, 6)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def _attention(q, k, v, radius, scale, mask, dropout):
    """Attention without dilation, by tiles, or by strips of whole rows where that is less work."""
    height, width = q.shape[2:4]
    with _full_precision(q.device.type):
        if radius is None or radius >= max(height, width) - 1 or _is_small(height, width, radius):
            return _dense_attention(q, k, v, radius, scale, mask, dropout)
        seed = int(torch.randint(2**31, ())) if dropout else 0
        out = TiledAttention.apply(q, k, v, radius, scale, mask, dropout, seed)
        return out if mask is None else torch.where(_sees_any(mask, radius)[:, None, :, :, None], out, 0.0)


def _full_precision(device_type):
    """Disables autocast. Without autocast a context would only cost time, which is noticeable on small grids."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _is_small(height, width, radius):
    """Whether attention of a cell to the rows around its strip is less work than of a tile to its halo.

    A logit of a tile takes about as long as four of torch's attention, forward and backward.
    """
    halo = min(height, TILE + 2 * radius) * min(width, TILE + 2 * radius)
    strip = min(height, _STRIP + 2 * radius) * width
    return strip <= min(_DENSE_HALOS * halo, _DENSE_LIMIT) or height * width <= _DENSE_CELLS


def _sees_any(mask, radius):
    """Whether the window of each cell has a cell that is not padding, `[batch, height, width]`."""
    near = mask.float().unsqueeze(1)
    for window, border in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        near = nn.functional.max_pool2d(near, window, stride=1, padding=border)
    return near.squeeze(1) > 0


def _check_inputs(q, k, v, radius, dilation, padding_mask, dropout=0.0, span=None, bias=None):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"`q`, `k` and `v` must share a floating point dtype, got {tensor.dtype} for `{name}`.")
        if tensor.dim() != 5 or tensor.shape != q.shape or 0 in tensor.shape:
            raise ValueError(
                "`q`, `k` and `v` must have one shape [batch, heads, height, width, head_dim], none of them 0, got "
                f"{list(tensor.shape)} for `{name}`."
            )
    if radius is not None and radius < 0:
        raise ValueError(f"`radius` must be at least 0 or None (the whole grid), got {radius}.")
    if dilation < 1:
        raise ValueError(f"`dilation` must be at least 1, got {dilation}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
    grid = [q.shape[0], *q.shape[2:4]]
    if padding_mask is not None and list(padding_mask.shape) != grid:
        raise ValueError(
            f"`padding_mask` must be [batch, height, width], here {grid}, got {list(padding_mask.shape)}."
        )
    if radius is None and not (span is None and bias is None):
        raise ValueError("`span` and `bias` need a `radius`, got None (the whole grid).")
    side = None if radius is None else 2 * radius + 1
    for name, tensor, shape in (("span", span, list(q.shape[:4])), ("bias", bias, [q.shape[1], side, side])):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be floating point, got {tensor.dtype}.")
        if list(tensor.shape) != shape:
            raise ValueError(f"`{name}` must be {shape}, got {list(tensor.shape)}.")


__all__ = ["attention_weights", "local_attention", "naive_local_attention"]
