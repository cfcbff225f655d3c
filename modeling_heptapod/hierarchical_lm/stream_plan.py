"""The context of a forward pass of the hierarchical LM, with a plan for the stream of each hierarchy."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.forward_context import ForwardContext
from ..common.model_inputs import has_dynamic_shapes, is_dynamic
from ..common.token_layout import TokenLayout, packed_layout, pad_layout
from .configuration_hierarchical_lm import HierarchicalLMConfig
from .hierarchical_cache import HierarchicalCache
from .windowed_attention import first_key, visible, window_reach


# xPos multiplies queries and keys by powers of a base of at least 0.4 / 1.4. The exponent is the distance to a centre divided
# by `xpos_scale_base`. With exponents up to 30, products, of masked keys too, are in the range of float32 and bfloat16; up to 8
# the factors are in that of float16.
_FARTHEST_FROM_CENTER = 30
_FARTHEST_FROM_CENTER_IN_FLOAT16 = 8


@dataclass
class StreamPlan:
    """What one forward pass does to the stream of one hierarchy, the same in every layer.

    Attributes:
        stride, dilation (`int`), window (`int`, *optional*), block (`bool`): of the hierarchy.
        steps (`int`): number of new steps, of the row with the most.
        fresh (`bool`): whether they are the first steps.
        tokens (`int`): number of new tokens.
        rotary (`tuple[torch.Tensor, torch.Tensor]`, *optional*): of the new steps, see `_rotate` in `hierarchical_block.py`.
        pick (`slice` or `torch.LongTensor` of shape `[batch, steps]`): index of the token of each step, at strides above 1.
        spread (`torch.LongTensor` of shape `[tokens]` or `[batch, tokens]`, *optional*): step that each token reads: 0 for
            the last cached one, from 1 on for new ones.
        counts (`torch.LongTensor` of shape `[batch]`, *optional*): new steps of each row, where their numbers differ.
        order (`torch.LongTensor` of shape `[batch, length]`, *optional*): which cached and new steps to keep then.
        positions, segments (`torch.LongTensor` of shape `[batch, steps]`, *optional*): of packed rows.
        shift_mask (`torch.BoolTensor` of shape `[batch, steps, 1]`, *optional*): which steps of packed rows have a step
            before them for the token shift.
        keys_seen (`int`, *optional*): number of keys in the window of a single step, `None` for all.
        mask (`torch.BoolTensor` of shape `[1 or batch, 1, queries, keys]`, *optional*): attention mask, where it does not
            follow from the window.
        reach (`torch.IntTensor` of shape `[1 or batch, steps]`, *optional*): number of keys in the window of each step, where
            whole sequences attend to themselves.
        token_positions (`torch.LongTensor` of shape `[1 or batch, steps]`, *optional*): position of the token of each step.
        slots (`torch.LongTensor` of shape `[1 or batch]`, *optional*): place of the step in the memory of a static cache.
        rows (`torch.BoolTensor` of shape `[1 or batch, 1, 1]`, *optional*): which rows have the step, in a step of a static
            cache. `None` for all.
        output_attentions (`bool`): whether to return attention weights, which needs the mask.
    """

    stride: int
    dilation: int
    window: int | None
    block: bool
    steps: int
    fresh: bool
    tokens: int
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    pick: slice | torch.Tensor | None = None
    spread: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    order: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    shift_mask: torch.Tensor | None = None
    keys_seen: int | None = None
    mask: torch.Tensor | None = None
    reach: torch.Tensor | None = None
    token_positions: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    output_attentions: bool = False

    @property
    def span(self) -> int | None:
        """Largest number of keys in a window, `None` for all."""
        return 2 * self.window if self.block and self.window else self.window

    def at_steps(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, width]` -> `[batch, steps, width]`: the token of each step."""
        if self.pick is None:
            return x
        return x[:, self.pick] if isinstance(self.pick, slice) else gather_steps(x, self.pick)

    def to_read(self, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The steps that tokens read, from new steps `x [batch, steps, width]` and the step before, `last [batch, 1, width]`."""
        if self.stride == 1 or self.fresh:
            return x
        if self.tokens == 1 and self.spread is None:
            if self.rows is not None:
                return torch.where(self.rows, x, last)
            return x if self.steps else last
        return torch.cat((last, x), dim=1)

    def at_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, width]`, the step that each token reads, from the output of `to_read`."""
        if self.stride == 1:
            return x
        if self.fresh:
            if is_dynamic(self.tokens):  # one step more than is read, so that lengths are not compared
                x = nn.functional.pad(x, (0, 0, 0, 1))
            return x.repeat_interleave(self.stride, dim=1)[:, : self.tokens]
        if self.spread is None:
            return x
        return x[:, self.spread] if self.spread.dim() == 1 else gather_steps(x, self.spread)

    def last_of(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The last `number` of cached and new steps `[batch, number + steps, width]`, as a state for a cache."""
        if self.counts is not None:
            places = self.counts.unsqueeze(1) + torch.arange(number, device=x.device)
            return gather_steps(x, places)
        if self.rows is not None:
            return torch.where(self.rows, x[:, -number:], x[:, :number])
        last = x[:, x.shape[1] - number :]
        return last.clone() if self.fresh or x.shape[1] > 2 * number else last  # a copy, so that a long row is freed


def gather_steps(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`[batch, steps, width]` at `places [batch, chosen]` of each row -> `[batch, chosen, width]`."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class HierarchicalLMContext(ForwardContext):
    """What all layers of one forward pass read about its rows. Positions are those of each hierarchy's steps, in `streams`.

    Attributes:
        past_lengths, new_lengths (`list[int]`): past and new real tokens of each row, or of all rows if there is one entry. In
            a static step `past_lengths` is a tensor `[]` or `[batch]`.
        layout (`TokenLayout`, *optional*): how padded or packed rows are laid out in the streams.
        is_first (`bool`): whether no cached tokens come before the new ones.
        streams (`list[StreamPlan]`): what happens to the stream of each hierarchy.
    """

    past_lengths: Any = field(default_factory=list)
    layout: TokenLayout | None = None
    new_lengths: list[int] = field(default_factory=list)
    is_first: bool = True
    streams: list[StreamPlan] = field(default_factory=list)

    @property
    def is_static_step(self) -> bool:
        """Whether the pass is of one token that continues a static cache, whose lengths are in a tensor."""
        return isinstance(self.past_lengths, torch.Tensor)

    def add_empty_slots(self, embeds: torch.Tensor, strides: list[int]) -> torch.Tensor:
        """Embeddings, and masks of the context, with masked slots at the end, for an export to programs of any length.

        The length becomes a multiple of all strides, at least two steps. Otherwise the program would be limited to lengths
        whose last step is as full as that of the example.
        """
        multiple = math.lcm(*strides)
        seq = embeds.shape[1]
        more = (seq // multiple + 2) * multiple - seq
        if self.padding_mask is not None:
            self.padding_mask = nn.functional.pad(self.padding_mask, (0, more), value=False)
        if self.segment_ids is not None:
            last = self.segment_ids[:, -1:].expand(-1, more)
            self.segment_ids = torch.cat((self.segment_ids, last), dim=1)
        return nn.functional.pad(embeds, (0, 0, 0, more))

    def lay_out(self, embeds: torch.Tensor, cache: HierarchicalCache | None, factor: int) -> torch.Tensor:
        """Set the layout and the lengths of the rows.

        Args:
            embeds (`torch.Tensor` of shape `[batch, seq, width]`): embeddings of the new tokens.
            cache (`HierarchicalCache`, *optional*): cache that the pass continues or fills.
            factor (`int`): coarsest compression factor.

        Returns:
            The embeddings as they are laid out, `[batch, slots, width]`.
        """
        batch, seq, _ = embeds.shape
        mask = self.padding_mask
        if self.is_static_step:  # of one slot
            return embeds
        # Without a cache one number stands for all rows, and a compiled program serves batches of any size.
        past = [0] if self.is_first else self.past_lengths
        if self.segment_ids is not None:
            self.layout = packed_layout(self.segment_ids, mask, factor)
        elif mask is not None:
            self.layout = pad_layout(mask)
        if mask is None or cache is None:
            self.new_lengths = [seq] * len(past)
        else:
            self.new_lengths = mask.sum(1).tolist()
            past = past * batch if len(past) == 1 else past
        self.past_lengths = past
        return embeds if self.layout is None else self.layout.align(embeds)

    def last_of(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The last `number` of `[batch, number + tokens, width]`, as `StreamPlan.last_of`."""
        tokens = x.shape[1] - number
        if self.is_static_step:
            rows = None if self.padding_mask is None else self.padding_mask.unsqueeze(-1)
            return StreamPlan(1, 1, None, False, tokens, False, tokens, rows=rows).last_of(x, number)
        counts = None if min(self.new_lengths) == tokens else torch.tensor(self.new_lengths, device=x.device)
        return StreamPlan(1, 1, None, False, tokens, self.is_first, tokens, counts=counts).last_of(x, number)


def make_plan(
    config: HierarchicalLMConfig,
    hierarchy: int,
    context: HierarchicalLMContext,
    embeds: torch.Tensor,
    cache: HierarchicalCache | None,
    rotary_emb: nn.Module,
    dtype: torch.dtype,
) -> StreamPlan:
    """The plan of one hierarchy.

    Args:
        config (`HierarchicalLMConfig`): of the model.
        hierarchy (`int`): index of the hierarchy.
        context (`HierarchicalLMContext`): of the forward pass, laid out.
        embeds (`torch.Tensor` of shape `[batch, slots, width]`): embeddings as they are laid out.
        cache (`HierarchicalCache`, *optional*): cache that the pass continues or fills.
        rotary_emb (`nn.Module`): rotary embedding of the hierarchy.
        dtype (`torch.dtype`): of the cosines and sines.

    Raises:
        ValueError: with xPos, for more steps than `dtype` can hold the decay of.
    """
    stride, dilation = config.strides[hierarchy], config.dilations[hierarchy]
    window = config.window_sizes[hierarchy]
    block = config.window_type == "block" and window is not None
    tokens, past, device = embeds.shape[1], context.past_lengths, embeds.device
    before = [-(-x // stride) for x in past]  # steps of each row so far
    steps = max(-(-(x + tokens) // stride) - k for x, k in zip(past, before))
    plan = StreamPlan(stride, dilation, window, block, steps, context.is_first, tokens)
    if stride > 1:
        _pick_tokens(plan, past, before, device)
    if steps == 0:
        return plan
    new = [-(-(x + more) // stride) - k for x, more, k in zip(past, context.new_lengths, before)]
    if cache is not None and min(new) < steps:
        plan.counts = torch.tensor(new, device=device)
    one_start = min(past) == max(past)
    first = torch.tensor(before[:1] if one_start else before, device=device).unsqueeze(1)
    positions = first + torch.arange(steps, device=device)
    layout = context.layout
    if layout is not None and layout.positions is not None and layout.segments is not None:  # packed rows
        positions = plan.positions = layout.positions[:, ::stride] // stride
        plan.segments = layout.segments[:, ::stride]
        plan.shift_mask = (positions >= dilation).unsqueeze(-1)
    plan.token_positions = positions * stride
    if window == 0:
        return plan
    newest = (max(before) + steps) // dilation
    center = None
    if config.use_xpos[hierarchy]:
        center = _center(config, hierarchy, newest, -(-steps // dilation), cache, dtype, device)
    plan.rotary = _rotary(config, hierarchy, positions // dilation, center, rotary_emb, dtype)
    cached = 0 if cache is None else cache.steps_cached(hierarchy)
    if plan.counts is not None:
        places = torch.arange(cached + max(new), device=device) + plan.counts.unsqueeze(1) - max(new)
        plan.order = places.clamp_min(0)
    plan.output_attentions = context.output_attentions
    _add_mask(plan, positions, first, before, cached, has_dynamic_shapes(embeds))
    return plan


def make_step_plan(
    config: HierarchicalLMConfig,
    hierarchy: int,
    context: HierarchicalLMContext,
    cache,
    rotary_emb: nn.Module,
    dtype: torch.dtype,
) -> StreamPlan:
    """The plan of one hierarchy for one token that continues a static cache. Lengths of rows are in tensors.

    Args:
        config, hierarchy, context, rotary_emb, dtype: as in `make_plan`.
        cache (`StaticHierarchicalCache`): the cache.
    """
    stride, dilation = config.strides[hierarchy], config.dilations[hierarchy]
    window = config.window_sizes[hierarchy]
    block = config.window_type == "block" and window is not None
    plan = StreamPlan(
        stride, dilation, window, block, int(cache.has_step is None or cache.has_step[hierarchy]), False, 1
    )
    if stride > 1:
        plan.pick = slice(0, None, stride)
    if not plan.steps:
        return plan
    past, real = context.past_lengths.reshape(-1), context.padding_mask  # [1 or batch], [batch, 1]
    if stride > 1 and (len(past) > 1 or cache.has_step is None):  # else all rows have the step
        has_step = (past % stride == 0).unsqueeze(1)
        real = has_step if real is None else has_step & real
    plan.rows = None if real is None else real.unsqueeze(-1)
    step = past // stride
    plan.token_positions = (step * stride).unsqueeze(1)
    if window == 0:
        return plan
    reach, position = cache.ring_sizes[hierarchy], step // dilation
    center = cache.centers[hierarchy] if config.use_xpos[hierarchy] else None
    plan.rotary = _rotary(config, hierarchy, position.unsqueeze(1), center, rotary_emb, dtype)
    plan.slots = step % dilation * reach + position % reach
    position = position.unsqueeze(1)
    held = position - (position - torch.arange(reach, device=past.device)) % reach  # position of the key in each slot
    seen = held >= 0
    if block:
        seen = seen & (held // window >= position // window - 1)
    plan.mask = seen[:, None, None]
    plan.output_attentions = context.output_attentions
    return plan


def _pick_tokens(plan, past, before, device):
    """Set `pick` and `spread`, for `past` tokens and `before` steps of each row so far."""
    stride, steps, tokens = plan.stride, plan.steps, plan.tokens
    if min(past) == max(past):
        plan.pick = slice(before[0] * stride - past[0], None, stride)
        if not plan.fresh and tokens > 1:
            plan.spread = (past[0] + torch.arange(tokens, device=device)) // stride - (before[0] - 1)
        return
    starts, firsts = (torch.tensor(x, device=device).unsqueeze(1) for x in (past, before))
    pick = (firsts + torch.arange(steps, device=device)) * stride - starts
    plan.pick = pick.clamp_max(tokens - 1)
    plan.spread = (starts + torch.arange(tokens, device=device)) // stride - (firsts - 1)


def _add_mask(plan, positions, first, before, cached, has_dynamic_shapes):
    """Set what attention reads of where keys are: `mask`, `keys_seen`, or `reach` for whole sequences and their windows."""
    steps, window, dilation, block = plan.steps, plan.window, plan.dilation, plan.block
    device = positions.device
    if plan.output_attentions or has_dynamic_shapes or (steps > 1 and not plan.fresh):
        if cached:
            positions = first - cached + torch.arange(cached + steps, device=device)
        plan.mask = visible(positions, steps, window, dilation, block, plan.segments).unsqueeze(1)
    elif not plan.fresh:
        one_start = len(first) == 1
        plan.keys_seen = window
        if block:
            plan.keys_seen = 2 * window if not one_start else window + before[0] // dilation % window + 1
        read = first_key(cached + 1, plan.keys_seen, dilation)
        if min(before) - cached + read < 0 or (block and not one_start):
            positions = first - cached + torch.arange(read, cached + 1, dilation, device=device)
            plan.mask = visible(positions, 1, window, dilation, block).unsqueeze(1)
    elif window is not None:
        plan.reach = window_reach(positions, window, dilation, block)


def _rotary(config, hierarchy, positions, center, rotary_emb, dtype):
    """Cosines and signed sines of positions `[1 or batch, steps]` in a phase, scaled by xPos if there is a `center`."""
    head_dim = config.head_dim[hierarchy]
    cos, sin = rotary_emb(positions.new_zeros((), dtype=torch.float32), positions)
    sin = torch.cat((-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]), dim=-1)
    cos, sin = (x.unsqueeze(-2).unsqueeze(-2) for x in (cos, sin))
    if center is not None:
        scale = key_scale(config, hierarchy, (positions - center).unsqueeze(-1), positions.device)
        scale = torch.stack((scale, 1 / scale), dim=-2).unsqueeze(-2)
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def key_scale(
    config: HierarchicalLMConfig, hierarchy: int, distance: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Decay of each channel over a `distance` in a phase (xPos): factor of keys whose center moves so far."""
    head_dim = config.head_dim[hierarchy]
    decay = (torch.arange(0, head_dim, 2, device=device) + 0.4 * head_dim) / (1.4 * head_dim)
    return decay.repeat(2) ** (distance / config.xpos_scale_base)


def farthest_from_center(dtype: torch.dtype, device: torch.device) -> int:
    """Largest exponent of the decay that `dtype`, or autocast on `device`, can hold."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return _FARTHEST_FROM_CENTER_IN_FLOAT16 if dtype == torch.float16 else _FARTHEST_FROM_CENTER


def _center(config, hierarchy, newest, steps, cache, dtype, device):
    """The position from which decay is counted. It moves with the newest position, and cached keys are scaled to it."""
    base, farthest = config.xpos_scale_base, farthest_from_center(dtype, device)
    fresh = cache is None or cache.steps_cached(hierarchy) == 0
    fit = int((2 if fresh else 1) * farthest * base)
    if steps > fit:
        raise ValueError(
            f"With `use_xpos` at most {fit} steps of a hierarchy's phase fit in one pass "
            f"{'' if fresh else 'after cached ones '}at this precision, got {steps}: give them in several passes with "
            "a cache, or set a higher `xpos_scale_base`."
        )
    if fresh:
        center = newest // 2
        if cache is not None:
            cache.centers[hierarchy] = center
        return center
    center = cache.centers[hierarchy]
    if newest - center > farthest // 2 * base:
        cache.scale_keys(hierarchy, key_scale(config, hierarchy, newest - center, device))
        cache.centers[hierarchy] = center = newest
    return center


__all__ = [
    "HierarchicalLMContext",
    "StreamPlan",
    "farthest_from_center",
    "gather_steps",
    "key_scale",
    "make_plan",
    "make_step_plan",
]
