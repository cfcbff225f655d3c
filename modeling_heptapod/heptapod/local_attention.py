"""Local attention on a grid: every cell attends to the cells around it, in two dimensions.

Cell `(y, x)` sees the cells `(y + dilation * a, x + dilation * b)` with `-radius <= a, b <= radius` that lie on the
grid and that the padding mask keeps:

    out[y, x] = sum_n softmax_n(scale * q[y, x] . k[n]) v[n]

Windows are clipped at the border of the grid. They do not move inwards as those of neighbourhood attention do (arXiv
2204.07143), so that a page looks the same wherever it lies in a larger padded grid. With `q = k = v` and one head this
is `Local2DAttention` of the prototype `nonlinear-transformer`.

Read in this order: `naive_local_attention` (the specification), `_TiledAttention` (the fast path: tiles of queries,
each with the halo of keys around it, computed again in the backward pass), `_dense_attention` (strips of whole rows:
small and narrow grids, and windows as large as the grid), `local_attention` (what the model calls).
`attention_weights` is for looking at; `grid_rotary` and `rotate` are the positions.

Memory: between forward and backward the tiled path holds its inputs and nothing else, and what it works with at a time
is bounded whatever the size of the grid. Numerics: it accumulates in float32 (float64 for float64 inputs).
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn


_TILE = 4  # cells along a side of a tile of queries
_WHOLE = 32  # longer axes are cut into tiles even where a halo would cover them: one tile is a step's least work
# Grids that are not worth cutting up: up to so many cells, or where a strip of rows sees no more cells than so many
# halos hold, but never more than the limit.
_STRIP = 8  # rows of queries
_DENSE_CELLS = 256
_DENSE_HALOS = 4
_DENSE_LIMIT = 4096
# Numbers to work with at a time: what the caches of a few cores hold, or enough to keep a GPU busy.
_CPU_STEP = 2**21
_GPU_STEP = 2**26
# Stands for minus infinity among the logits: finite, so that no difference is NaN, and exp() of it is exactly zero.
_OUT_OF_SIGHT = -1e30


# ---------------------------------------------------------------------------------------------------------------------
# The specification
# ---------------------------------------------------------------------------------------------------------------------


def naive_local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int | None,
    dilation: int = 1,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
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
            if padding_mask is not None:
                real = padding_mask.bool()[:, None][seen[0]][seen[1]].flatten(2)
                some = real.any(-1, keepdim=True)  # a cell that sees nothing gives zeros
                logits, values = logits.masked_fill(~real & some, -math.inf), values * some.unsqueeze(-1)
            out.append(torch.einsum("bhn,bhnc->bhc", logits.softmax(-1), values))
    return torch.stack(out, dim=2).unflatten(2, (height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Tiles with a halo
# ---------------------------------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """How one axis of the grid is cut: `count` tiles of `tile` queries, each of which sees `keys` keys.

    Queries are padded at the end, keys by `before` and `after`, so that all halos have one size. A short axis that a
    halo would cover stays whole, without padding.
    """

    tile: int
    count: int
    keys: int
    before: int
    after: int

    @classmethod
    def cut(cls, length, radius):
        if length <= min(_TILE + 2 * radius, _WHOLE):
            return cls(length, 1, length, 0, 0)
        count = -(-length // _TILE)
        return cls(_TILE, count, _TILE + 2 * radius, radius, radius + count * _TILE - length)

    def near(self, radius, device):
        """Which keys of its halo each query of a tile may see, `[tile, keys]`."""
        query, key = torch.arange(self.tile, device=device), torch.arange(self.keys, device=device)
        return (query[:, None] + self.before - key[None, :]).abs() <= radius


class _Tiling:
    """A grid cut into tiles of queries with halos of keys, and the way of tensors into tiles and back.

    Tiles and halos are views `[batch, heads, rows, columns, cells down, cells across, channels]` of padded grids. The
    arithmetic works on copies of some of them at a time, `[tiles, cells, channels]`.

    Args:
        q: the queries, `[batch, heads, height, width, head_dim]`.
        radius (`int`): of the window.
        padding_mask: `[batch, height, width]`, or `None`.
    """

    def __init__(self, q, radius, padding_mask):
        self.batch, self.heads, self.height, self.width, self.head_dim = q.shape
        self.dtype, self.device = torch.promote_types(q.dtype, torch.float32), q.device
        self.down, self.across = _Axis.cut(self.height, radius), _Axis.cut(self.width, radius)
        down, across = (axis.near(radius, q.device) for axis in (self.down, self.across))
        self.near = (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)  # [queries, keys]
        if padding_mask is None:
            padding_mask = torch.ones(1, self.height, self.width, dtype=torch.bool, device=q.device)
        self.real = self.halos(self.pad_keys(padding_mask[:, None, :, :, None]))  # nothing is, beyond the border

    def steps(self):
        """Indices into views of tiles and halos: how many of them to work with at a time."""
        in_cache = self.device.type == "cpu" and not torch.compiler.is_compiling()
        queries, keys = self.near.shape
        row = self.heads * self.across.count * keys * (queries + 2 * self.head_dim)
        budget = max(1, (_CPU_STEP if in_cache else _GPU_STEP) // row)
        if budget >= self.batch * self.down.count:  # without a loop a compiled graph serves grids of other sizes, too
            yield slice(0, self.batch), slice(None), slice(0, self.down.count)
            return
        pages, rows = min(budget, self.batch), max(1, budget // self.batch)
        for page in range(0, self.batch, pages):
            for start in range(0, self.down.count, rows):
                yield slice(page, page + pages), slice(None), slice(start, start + rows)

    def pad_queries(self, x):
        """`[batch, heads, height, width, channels]`, filled up to whole tiles."""
        below = self.down.count * self.down.tile - self.height
        right = self.across.count * self.across.tile - self.width
        return _pad(x, (0, 0, 0, right, 0, below))

    def pad_keys(self, x):
        """`[batch, heads, height, width, channels]`, with what the halos reach beyond the border."""
        sides = (0, 0, self.across.before, self.across.after, self.down.before, self.down.after)
        return _pad(x, sides)

    def crop(self, x, top=0, left=0):
        """The grid itself out of a padded one, as a view."""
        return x[:, :, top : top + self.height, left : left + self.width]

    def tiles(self, x):
        """Padded queries as a view of tiles."""
        across = x.unflatten(3, (self.across.count, self.across.tile))
        return across.unflatten(2, (self.down.count, self.down.tile)).transpose(3, 4)

    def halos(self, x, tall=None, wide=None):
        """Padded keys as a view of halos, which overlap, or of so many cells of each."""
        for place, axis, size in ((2, self.down, tall), (3, self.across, wide)):
            # A whole axis needs no `unfold`, which takes no size that a compiled graph leaves open.
            whole = axis.count == 1
            x = x.unsqueeze(place).movedim(place + 1, -1) if whole else x.unfold(place, size or axis.keys, axis.tile)
        return x.permute(0, 1, 2, 3, 5, 6, 4)

    def gather(self, view):
        """A copy of tiles or halos in the dtype of the arithmetic, `[tiles, cells, channels]`."""
        view = view.to(self.dtype, memory_format=torch.contiguous_format)
        return view.reshape(-1, view.shape[4] * view.shape[5], view.shape[6])

    def add_halos(self, total, step, gathered):
        """Add `[tiles, cells, channels]` to padded keys, where they were gathered.

        One and the same piece of every halo, no larger than a tile, overlaps with no other and is added at once.
        """
        pages, _, rows = step
        count = min(rows.stop, self.down.count) - rows.start
        gathered = gathered.view(
            -1, self.heads, count, self.across.count, self.down.keys, self.across.keys, self.head_dim
        )
        high = self.down.keys if count == 1 else self.down.tile
        broad = self.across.keys if self.across.count == 1 else self.across.tile
        for y in (0,) if count == 1 else range(0, self.down.keys, high):
            for x in (0,) if self.across.count == 1 else range(0, self.across.keys, broad):
                piece = gathered[..., y : y + high, x : x + broad, :]
                tall, wide = piece.shape[4:6]
                top, left = rows.start * self.down.tile + y, x
                bottom, right = top + (count - 1) * self.down.tile, left + (self.across.count - 1) * self.across.tile
                place = total[pages, :, top : bottom + tall, left : right + wide]
                self.halos(place, tall, wide).add_(piece)

    def weights(self, queries, keys, step, scale):
        """Attention weights `[tiles, queries, keys]` of gathered queries and keys."""
        pages, _, rows = step
        real = self.real[pages if self.real.shape[0] > 1 else slice(None), :, rows]
        visible = real.flatten(4).flatten(2, 3).unsqueeze(3) & self.near  # [1 or pages, 1, tiles, queries, keys]
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, _OUT_OF_SIGHT)
        pages = queries.shape[0] // (self.heads * bias.shape[2])
        logits = bias.expand(pages, self.heads, -1, -1, -1).flatten(0, 2).contiguous()
        return torch.softmax(logits.baddbmm_(queries, keys.transpose(1, 2), alpha=scale), dim=-1)


def _pad(x, sides):
    """`pad`, which copies, where there is something to add. A compiled graph serves sizes with and without it."""
    return nn.functional.pad(x, sides) if torch.compiler.is_compiling() or any(sides) else x


class _Dropout:
    """Dropout whose masks can be drawn again, in the same order, from the seed."""

    def __init__(self, rate, seed, device):
        self.rate = rate
        self.generator = torch.Generator(device).manual_seed(seed) if rate else None

    def factors(self, weights):
        """What to multiply the weights by."""
        return torch.empty_like(weights).bernoulli_(1 - self.rate, generator=self.generator).div_(1 - self.rate)


class _TiledAttention(torch.autograd.Function):
    """Local attention, tile by tile. Between forward and backward it holds its inputs, nothing else."""

    @staticmethod
    def forward(ctx, q, k, v, radius, scale, padding_mask, dropout, seed):
        tiling, drop = _Tiling(q, radius, padding_mask), _Dropout(dropout, seed, q.device)
        padded = tiling.pad_queries(q)
        out = torch.empty_like(padded)
        tiles, outs = tiling.tiles(padded), tiling.tiles(out)
        keys, values = (tiling.halos(tiling.pad_keys(x)) for x in (k, v))
        for step in tiling.steps():
            weights = tiling.weights(tiling.gather(tiles[step]), tiling.gather(keys[step]), step, scale)
            if dropout:
                weights = weights.mul_(drop.factors(weights))
            part = torch.bmm(weights, tiling.gather(values[step]))
            outs[step] = part.view(outs[step].shape)
        ctx.save_for_backward(q, k, v, padding_mask)
        ctx.arguments = radius, scale, dropout, seed
        return tiling.crop(out).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, padding_mask = ctx.saved_tensors
        radius, scale, dropout, seed = ctx.arguments
        with torch.autocast(q.device.type, enabled=False):
            tiling, drop = _Tiling(q, radius, padding_mask), _Dropout(dropout, seed, q.device)
            padded = tiling.pad_queries(q)
            grad_q = torch.empty_like(padded)
            tiles, grads, grads_q = (tiling.tiles(x) for x in (padded, tiling.pad_queries(grad_out), grad_q))
            k, v = tiling.pad_keys(k), tiling.pad_keys(v)
            grad_k, grad_v = (torch.zeros(k.shape, dtype=tiling.dtype, device=k.device) for _ in (k, v))
            keys, values = tiling.halos(k), tiling.halos(v)
            for step in tiling.steps():
                queries, halo, grad = (tiling.gather(x[step]) for x in (tiles, keys, grads))
                weights = tiling.weights(queries, halo, step, scale)
                grad_weights = torch.bmm(grad, tiling.gather(values[step]).transpose(1, 2))
                dropped = weights
                if dropout:
                    factors = drop.factors(weights)
                    dropped, grad_weights = weights * factors, grad_weights.mul_(factors)
                tiling.add_halos(grad_v, step, torch.bmm(dropped.transpose(1, 2), grad))
                # weights * (grad_weights - (weights * grad_weights).sum(-1)), in one pass over them
                grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, tiling.dtype).mul_(scale)
                tiling.add_halos(grad_k, step, torch.bmm(grad_logits.transpose(1, 2), queries))
                grads_q[step] = torch.bmm(grad_logits, halo).view(grads_q[step].shape)
            border = tiling.down.before, tiling.across.before
            grad_k, grad_v = (tiling.crop(x, *border).to(q.dtype) for x in (grad_k, grad_v))
        return tiling.crop(grad_q), grad_k, grad_v, *(None,) * 5


# ---------------------------------------------------------------------------------------------------------------------
# Rows at once
# ---------------------------------------------------------------------------------------------------------------------


def _visible(height, width, radius, dilation, padding_mask, device, queries=slice(None), keys=slice(None)):
    """Which cells of the rows `keys` each cell of the rows `queries` sees, `[1 or batch, 1, 1 or cells, cells]`.

    `None` where every cell sees every other.
    """
    visible = None
    open_sizes = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)  # which a comparison would bound
    if radius is not None and (dilation > 1 or open_sizes or radius < max(height, width) - 1):
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
@torch.inference_mode(False)  # it is kept, and may next be part of a graph
def _window_bias(height, width, radius, dtype, device, queries, keys):
    """What is added to the logits of a strip of a small grid, made once: making it took a twentieth of the whole."""
    visible = _visible(height, width, radius, 1, None, device, slice(*queries), slice(*keys))
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)


def _in_strips(height, radius):
    """Whether strips of rows see no more than three quarters of all rows."""
    return radius is not None and _STRIP + radius <= 0.75 * height


@lru_cache(maxsize=64)
def _strips(height, radius):
    """Rows of queries and the rows that they see, `((top, bottom), (first, last))`, from the top of the grid down."""
    if not _in_strips(height, radius):
        return [((0, height), (0, height))]
    tops = range(0, height, _STRIP)
    bottoms = [min(top + _STRIP, height) for top in tops]
    return [
        ((top, bottom), (max(0, top - radius), min(height, bottom + radius))) for top, bottom in zip(tops, bottoms)
    ]


def _strips_at_once(q, k, v, radius, scale, padding_mask, dropout):
    """As `_dense_attention`, all strips in one call: compiled, it serves grids of any height."""
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
    sees = visible.any(-1, keepdim=True)  # a row of masked keys only has no softmax
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
    """Strips of rows against all cells of the rows that they see, through torch's scaled dot product attention."""
    height, width = q.shape[2:4]
    if torch.compiler.is_compiling() and _in_strips(height, radius):
        return _strips_at_once(q, k, v, radius, scale, padding_mask, dropout)
    # What a fake tensor leaves behind serves no real one, and a comparison would bind the sizes of a compiled graph.
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
        if padding_mask is not None:  # a row of masked keys only has no softmax: it sees all, and counts for nothing
            sees = visible.any(-1, keepdim=True)
            visible = visible | ~sees
        # Cutting all rows out of a grid would change nothing and cost small grids 2% of their time.
        parts = (q, k, v) if len(strips) == 1 else (q[:, :, rows], k[:, :, seen], v[:, :, seen])
        out = nn.functional.scaled_dot_product_attention(
            *(x.flatten(2, 3) for x in parts), attn_mask=visible, dropout_p=dropout, scale=scale
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
) -> torch.Tensor:
    """The weights of `local_attention` as a matrix: quadratic in cells, for looking at. Arguments as there.

    Returns:
        `torch.Tensor` of shape `[batch, heads, height * width, height * width]`: how much each cell sees of each other.
    """
    _check_inputs(q, k, k, radius, dilation, padding_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if padding_mask is None else padding_mask.bool()
    visible = _visible(*q.shape[2:4], radius, dilation, mask, q.device)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (x.flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k))
        logits = scale * (queries @ keys.transpose(2, 3))
    if visible is not None:
        logits = logits.masked_fill(~visible, _OUT_OF_SIGHT)
    weights = logits.softmax(-1)
    return (weights if visible is None else weights * visible.any(-1, keepdim=True)).to(q.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    radius: int | None,
    dilation: int = 1,
    padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every cell of a grid to the cells around it.

    Args:
        q, k, v (`torch.Tensor` of shape `[batch, heads, height, width, head_dim]`): queries, keys and values.
        radius (`int`, *optional*): the window reaches this many neighbours in each direction: `0` is the cell alone,
            `1` the 3 x 3 cells around it. `None` is the whole grid.
        dilation (`int`): distance in cells from one neighbour to the next; of no meaning for the whole grid.
        padding_mask (`torch.Tensor` of shape `[batch, height, width]`, *optional*): zero or `False` at cells that
            nobody sees.
        scale (`float`, *optional*): factor of the dot products, `head_dim ** -0.5` when not given.
        dropout (`float`): share of weights that are set to zero, the others growing accordingly; less than 1.

    Returns:
        `torch.Tensor` of the shape and dtype of `q`; zero where a cell sees nothing.

    Raises:
        TypeError, ValueError: for tensors of another dtype or shape, or a radius, dilation or dropout out of range.
    """
    _check_inputs(q, k, v, radius, dilation, padding_mask, dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if padding_mask is None else padding_mask.bool()
    if radius is None or dilation == 1:
        return _attention(q, k, v, radius, scale, mask, dropout)
    # Cells a multiple of the dilation apart form a grid of their own, a page of its own in the batch.
    batch, _, height, width, _ = q.shape
    phases = min(dilation, height), min(dilation, width)
    # One compiled graph serves sizes that the dilation divides and others.
    if mask is None and (torch.compiler.is_compiling() or height % phases[0] or width % phases[1]):
        mask = q.new_ones(1, height, width, dtype=torch.bool).expand(batch, -1, -1)
    parts = (_split_phases(x, phases) for x in (q, k, v))
    mask = None if mask is None else _split_phases(mask[:, None, :, :, None], phases)[:, 0, :, :, 0]
    return _join_phases(_attention(*parts, radius, scale, mask, dropout), phases, height, width)


def _split_phases(x, phases):
    """`[batch, heads, height, width, channels]` -> `[batch * phases, heads, ...]`, padded to grids of one size."""
    sides = (-x.shape[3] % phases[1], -x.shape[2] % phases[0])
    x = _pad(x, (0, 0, 0, sides[0], 0, sides[1]))
    x = x.unflatten(3, (-1, phases[1])).unflatten(2, (-1, phases[0]))
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)


def _join_phases(x, phases, height, width):
    x = x.unflatten(0, (-1, *phases)).permute(0, 3, 4, 1, 5, 2, 6)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def _attention(q, k, v, radius, scale, mask, dropout):
    """Without dilation: by tiles, or by strips of whole rows where that is less work."""
    height, width = q.shape[2:4]
    with _full_precision(q.device.type):
        if radius is None or radius >= max(height, width) - 1 or _is_small(height, width, radius):
            return _dense_attention(q, k, v, radius, scale, mask, dropout)
        seed = int(torch.randint(2**31, ())) if dropout else 0
        out = _TiledAttention.apply(q, k, v, radius, scale, mask, dropout, seed)
        return out if mask is None else torch.where(_sees_any(mask, radius)[:, None, :, :, None], out, 0.0)


def _full_precision(device_type):
    """No autocast inside. Where there is none, its context would only cost time, which small grids notice."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _is_small(height, width, radius):
    """Whether a cell that looks at the rows around its strip is less work than a tile that looks at its halo.

    A logit of a tile costs about as much as four of torch's own attention, forward and backward.
    """
    halo = min(height, _TILE + 2 * radius) * min(width, _TILE + 2 * radius)
    strip = min(height, _STRIP + 2 * radius) * width
    return strip <= min(_DENSE_HALOS * halo, _DENSE_LIMIT) or height * width <= _DENSE_CELLS


def _sees_any(mask, radius):
    """Whether the window of each cell holds a real one, `[batch, height, width]`."""
    near = mask.float().unsqueeze(1)
    for window, border in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        near = nn.functional.max_pool2d(near, window, stride=1, padding=border)
    return near.squeeze(1) > 0


def _check_inputs(q, k, v, radius, dilation, padding_mask, dropout=0.0):
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


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def grid_rotary(
    height: int, width: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions (arXiv 2104.09864) in two dimensions.

    The first half of a head's channels turns with the row, the second half with the column. In each half of size
    `head_dim / 2`, channel `c` turns together with channel `c + head_dim / 4`, by `place * theta ** (-4 c / head_dim)`.

    Returns:
        Cosines and sines, two float32 tensors of shape `[height, width, head_dim]`.

    Raises:
        ValueError: where `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"Rotary positions on a grid need a `head_dim` that is a multiple of 4, got {head_dim}.")
    frequencies = theta ** (-4 / head_dim * torch.arange(head_dim // 4, dtype=torch.float32, device=device))
    down, across = (torch.arange(length, dtype=torch.float32, device=device) for length in (height, width))
    down = (down[:, None] * frequencies).unsqueeze(1).expand(-1, width, -1)
    across = (across[:, None] * frequencies).expand(height, -1, -1)
    angles = torch.cat((down, down, across, across), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn `[batch, heads, height, width, head_dim]` by `grid_rotary`; in float32 at least, and back to its dtype."""
    row_a, row_b, column_a, column_b = x.chunk(4, dim=-1)
    turned = torch.cat((-row_b, row_a, -column_b, column_a), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
