"""Local attention in tiles: tiles of queries, each with the halo of keys around it.

Weights are computed again in the backward pass. Between forward and backward only the inputs are stored, and the memory
for intermediate results is bounded whatever the size of the grid. It accumulates in float32 (float64 for float64 inputs).
"""

from typing import NamedTuple

import torch
from torch import nn


TILE = 4  # cells along a side of a tile of queries
_WHOLE = 32  # longer axes are cut into tiles even if a halo would cover them: a tile is the least work of a step
# Elements of intermediate results: as many as the caches of a few cores hold, or enough for a GPU.
_CPU_STEP = 2**21
_GPU_STEP = 2**26
# In place of minus infinity among the logits: finite, so that no difference is NaN, and exp() of it is exactly zero.
MASKED_LOGIT = -1e30


class _Axis(NamedTuple):
    """Tiles along one axis of the grid: `num_tiles` tiles of `tile` queries, each with a halo of `keys` keys.

    Queries are padded at the end, keys by `before` and `after`, so that all halos have one size. A short axis that a
    halo would cover is one tile without padding.
    """

    tile: int
    num_tiles: int
    keys: int
    before: int
    after: int

    @classmethod
    def cut(cls, length, radius):
        if length <= min(TILE + 2 * radius, _WHOLE):
            return cls(length, 1, length, 0, 0)
        count = -(-length // TILE)
        return cls(TILE, count, TILE + 2 * radius, radius, radius + count * TILE - length)

    def near(self, radius, device):
        """Keys of the halo that each query of a tile attends to, `[tile, keys]`."""
        query, key = torch.arange(self.tile, device=device), torch.arange(self.keys, device=device)
        return (query[:, None] + self.before - key[None, :]).abs() <= radius


class _Tiling:
    """A grid in tiles of queries with halos of keys, and the conversion of tensors to tiles and back.

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
        self.real = self.halos(self.pad_keys(padding_mask[:, None, :, :, None]))  # False beyond the border

    def steps(self):
        """Indices into views of tiles and halos, for one step after the other."""
        in_cache = self.device.type == "cpu" and not torch.compiler.is_compiling()
        queries, keys = self.near.shape
        row = self.heads * self.across.num_tiles * keys * (queries + 2 * self.head_dim)
        budget = max(1, (_CPU_STEP if in_cache else _GPU_STEP) // row)
        if budget >= self.batch * self.down.num_tiles:  # no loop, so a compiled graph takes other sizes
            yield slice(0, self.batch), slice(None), slice(0, self.down.num_tiles)
            return
        pages, rows = min(budget, self.batch), max(1, budget // self.batch)
        for page in range(0, self.batch, pages):
            for start in range(0, self.down.num_tiles, rows):
                yield slice(page, page + pages), slice(None), slice(start, start + rows)

    def pad_queries(self, x):
        """`[batch, heads, height, width, channels]`, padded to complete tiles."""
        below = self.down.num_tiles * self.down.tile - self.height
        right = self.across.num_tiles * self.across.tile - self.width
        return pad(x, (0, 0, 0, right, 0, below))

    def pad_keys(self, x):
        """`[batch, heads, height, width, channels]`, padded by the halos beyond the border."""
        sides = (0, 0, self.across.before, self.across.after, self.down.before, self.down.after)
        return pad(x, sides)

    def crop(self, x, top=0, left=0):
        """View of the grid without padding."""
        return x[:, :, top : top + self.height, left : left + self.width]

    def tiles(self, x):
        """Padded queries as a view of tiles."""
        across = x.unflatten(3, (self.across.num_tiles, self.across.tile))
        return across.unflatten(2, (self.down.num_tiles, self.down.tile)).transpose(3, 4)

    def halos(self, x, tall=None, wide=None):
        """Padded keys as a view of halos, which overlap, or of the first `tall` by `wide` cells of each."""
        for place, axis, size in ((2, self.down, tall), (3, self.across, wide)):
            # An axis of one tile needs no `unfold`, which does not take symbolic sizes.
            whole = axis.num_tiles == 1
            x = x.unsqueeze(place).movedim(place + 1, -1) if whole else x.unfold(place, size or axis.keys, axis.tile)
        return x.permute(0, 1, 2, 3, 5, 6, 4)

    def gather(self, view):
        """A copy of tiles or halos in the dtype of the arithmetic, `[tiles, cells, channels]`."""
        view = view.to(self.dtype, memory_format=torch.contiguous_format)
        return view.reshape(-1, view.shape[4] * view.shape[5], view.shape[6])

    def add_halos(self, total, step, gathered):
        """Adds `[tiles, cells, channels]` to the padded keys that they were gathered from.

        The same piece of every halo, no larger than a tile, does not overlap with the others and is added at once.
        """
        pages, _, rows = step
        count = min(rows.stop, self.down.num_tiles) - rows.start
        gathered = gathered.view(
            -1, self.heads, count, self.across.num_tiles, self.down.keys, self.across.keys, self.head_dim
        )
        high = self.down.keys if count == 1 else self.down.tile
        broad = self.across.keys if self.across.num_tiles == 1 else self.across.tile
        for y in (0,) if count == 1 else range(0, self.down.keys, high):
            for x in (0,) if self.across.num_tiles == 1 else range(0, self.across.keys, broad):
                piece = gathered[..., y : y + high, x : x + broad, :]
                tall, wide = piece.shape[4:6]
                top, left = rows.start * self.down.tile + y, x
                bottom, right = (
                    top + (count - 1) * self.down.tile,
                    left + (self.across.num_tiles - 1) * self.across.tile,
                )
                place = total[pages, :, top : bottom + tall, left : right + wide]
                self.halos(place, tall, wide).add_(piece)

    def weights(self, queries, keys, step, scale):
        """Attention weights `[tiles, queries, keys]` of gathered queries and keys."""
        pages, _, rows = step
        real = self.real[pages if self.real.shape[0] > 1 else slice(None), :, rows]
        visible = real.flatten(4).flatten(2, 3).unsqueeze(3) & self.near  # [1 or pages, 1, tiles, queries, keys]
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, MASKED_LOGIT)
        pages = queries.shape[0] // (self.heads * bias.shape[2])
        logits = bias.expand(pages, self.heads, -1, -1, -1).flatten(0, 2).contiguous()
        return torch.softmax(logits.baddbmm_(queries, keys.transpose(1, 2), alpha=scale), dim=-1)


def pad(x, sides):
    """`nn.functional.pad`, left out if nothing is added, except in compiled graphs, which then take other sizes."""
    return nn.functional.pad(x, sides) if torch.compiler.is_compiling() or any(sides) else x


class _Dropout:
    """Dropout whose masks are drawn again in the backward pass, in the same order, from the seed."""

    def __init__(self, rate, seed, device):
        self.rate = rate
        self.generator = torch.Generator(device).manual_seed(seed) if rate else None

    def factors(self, weights):
        """Factors of the weights: 0, or `1 / (1 - rate)`."""
        return torch.empty_like(weights).bernoulli_(1 - self.rate, generator=self.generator).div_(1 - self.rate)


class TiledAttention(torch.autograd.Function):
    """Local attention tile by tile. Stores nothing but its inputs for the backward pass."""

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
                # weights * (grad_weights - (weights * grad_weights).sum(-1)) in one pass
                grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, tiling.dtype).mul_(scale)
                tiling.add_halos(grad_k, step, torch.bmm(grad_logits.transpose(1, 2), queries))
                grads_q[step] = torch.bmm(grad_logits, halo).view(grads_q[step].shape)
            border = tiling.down.before, tiling.across.before
            grad_k, grad_v = (tiling.crop(x, *border).to(q.dtype) for x in (grad_k, grad_v))
        return tiling.crop(grad_q), grad_k, grad_v, *(None,) * 5


__all__ = ["MASKED_LOGIT", "TILE", "TiledAttention", "pad"]
