"""The static cache of the hierarchical LM: single tokens are computed in place, in as many graphs as there are strides.

Layers hold the same states as those of a [`HierarchicalCache`], and keys and values in rings:

    [batch, heads, phases * reach, channels]    step `k` of a row is at `(k % phases) * reach + k // phases % reach`

with a phase for each of the `dilation` steps that attention skips, and room for the steps of a phase that a window reaches. A
token that has no step in a row leaves that row as it was. Passes of several tokens, and the first, run on a
[`HierarchicalCache`] made from this one, and are written back.
"""

import torch
from torch import nn
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache
from transformers.utils.import_utils import is_tracing

from ..common.static_cache import StaticCountingMixin
from .hierarchical_cache import HierarchicalCache
from .stream_plan import StreamPlan, farthest_from_center, key_scale


def ring_sizes(config, max_cache_len: int) -> list[int]:
    """Number of keys of a phase that the memory of each hierarchy holds, for texts of up to `max_cache_len` tokens."""
    sizes = []
    for factor, window in zip(config.compression_factors, config.window_sizes):
        longest = -(-max_cache_len // factor)
        reach = longest if window is None else window if config.window_type == "sliding" else 2 * window
        sizes.append(min(longest, reach))
    return sizes


class StaticHierarchicalCache(StaticCountingMixin, Cache):
    """Static cache of a [`HierarchicalLMModel`] for compiled steps: memory is allocated once and changed in place.

    Attentions of a step are over the keys in the order of the memory.

    Args:
        config (`HierarchicalLMConfig`): of the model.
        max_cache_len (`int`): number of tokens, pads included, for which there is room.

    Attributes:
        max_cache_len (`int`): as above.
        ring_sizes (`list[int]`): number of keys of a phase that the memory of each hierarchy holds.
        has_tokens (`bool`): whether the cache has seen a token, known without reading the count.
        centers (`list[int]`): position of each hierarchy from which the decay of keys is counted (xPos).
        has_step (`tuple[bool, ...]`, *optional*): whether each hierarchy has a step at the next token, in any row; `None` if
            that is not known. A compiled step leaves out the others. See `prepare_step`.

    Raises:
        TypeError: for a `max_cache_len` that is no integer.
        ValueError: for one below 1.
    """

    max_cache_len: int

    def __init__(self, config, max_cache_len: int):
        self.check_max_cache_len(max_cache_len)
        self.config, self.max_cache_len = config, max_cache_len
        self.num_hierarchies = config.num_hierarchies
        self.ring_sizes = ring_sizes(config, max_cache_len)
        layers = []
        for place, kind in enumerate(config.cache_layer_types):
            is_last = place == self.num_hierarchies * config.num_hidden_layers
            how: dict[str, int] = {"number_of_states": max(2, self.num_hierarchies) if is_last else 2}
            if kind != "conv":
                hierarchy = place % self.num_hierarchies
                kind, how["max_cache_len"] = "hybrid", config.dilations[hierarchy] * self.ring_sizes[hierarchy]
            layers.append(STATIC_LAYER_TYPE_MAPPING[kind](**how))
        super().__init__(layers=layers)
        self._start()
        self.centers = [-(-max_cache_len // factor) // 2 for factor in config.compression_factors]
        self.has_step: tuple[bool, ...] | None = None
        # Real tokens of the rows before the step that was prepared last, and whether it was taken.
        self._known_lengths: list[int] | None = None
        self._is_taken = False

    def get_mask_sizes(self, query_length: int, layer_idx: int):
        """Length and offset of a mask over all tokens for which there is room."""
        return self.max_cache_len, 0

    def of_pass(self, embeds: torch.Tensor) -> "StaticHierarchicalCache | HierarchicalCache":
        """The cache on which a pass over `embeds [batch, seq, hidden_size]` runs: this one for a single token, or a dynamic one."""
        length = embeds.shape[1]
        self.check_room(length)
        if self.has_tokens and length == 1:
            if self.has_step is None and not is_tracing(embeds):
                self.prepare_step()
            return self
        self.check_positions(embeds.dtype, embeds.device)
        return self.to_dynamic()

    # --- single tokens ---------------------------------------------------------------------------------------------------

    def prepare_step(self) -> None:
        """Note which hierarchies have a step at the next token.

        `generate` calls it before each compiled step, which would otherwise be one graph for each length. Without it, all
        hierarchies are computed, with the same result.
        """
        if not self.has_tokens:
            return
        if self._known_lengths is None:
            self._known_lengths = self.lengths().reshape(-1).tolist()
        elif self._is_taken:
            self._known_lengths = [length + 1 for length in self._known_lengths]
        self._is_taken = False
        self.has_step = tuple(any(n % stride == 0 for n in self._known_lengths) for stride in self.config.strides)

    def finish_step(self, rows_differ: bool) -> None:
        """Note that a token was added, with `rows_differ` not to all rows."""
        if self.has_step is None or rows_differ:
            self._known_lengths = None
        self.has_step, self._is_taken = None, True

    def write(
        self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, plan: StreamPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one step in place, at `plan.slots`, in the rows of `plan.rows`.

        Args:
            layer_idx (`int`): of a layer with keys and values.
            key, value (`torch.Tensor` of shape `[batch, heads, 1, channels]`).
            plan (`StreamPlan`): of the hierarchy.

        Returns:
            Keys and values of its phase, `[batch, heads, reach, channels]`.
        """
        layer, phases = self.layers[layer_idx], plan.dilation
        _put(layer.keys, key, plan)
        _put(layer.values, value, plan)
        if phases == 1:
            return layer.keys, layer.values
        phase = plan.slots // (layer.keys.shape[2] // phases)
        return _phase_of(layer.keys, phases, phase), _phase_of(layer.values, phases, phase)

    def read_conv(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """A conv state."""
        return self.layers[layer_idx].conv_states[state_idx]

    def write_conv(self, state: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        """Write a state `[batch, ...]` in place."""
        self.layers[layer_idx].conv_states[state_idx].copy_(state)

    def read_recurrent(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """A copy of a recurrent state, which may be part of the output."""
        return self.layers[layer_idx].recurrent_states[state_idx].clone()

    def write_recurrent(self, state: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        """Write a state `[batch, ...]` in place."""
        self.layers[layer_idx].recurrent_states[state_idx].copy_(state)

    # --- several tokens --------------------------------------------------------------------------------------------------

    def check_positions(self, dtype: torch.dtype, device: torch.device) -> None:
        """Raise a `ValueError` if `dtype`, or autocast on `device`, cannot hold the decay of all keys for which there is room (xPos)."""
        config = self.config
        steps = max(
            -(-self.max_cache_len // c) if xpos else 0 for c, xpos in zip(config.compression_factors, config.use_xpos)
        )
        fit = int(2 * farthest_from_center(dtype, device) * config.xpos_scale_base)
        if steps > fit:
            raise ValueError(
                f"With `use_xpos` a {type(self).__name__} has room for at most {fit} steps of a hierarchy's phase at this "
                f"precision, got `max_cache_len`={self.max_cache_len}, which makes {steps}: use a HierarchicalCache, or set a "
                "higher `xpos_scale_base`."
            )

    def to_dynamic(self) -> HierarchicalCache:
        """A [`HierarchicalCache`] of the same tokens."""
        cache = HierarchicalCache(self.config)
        if not self.has_tokens:
            return cache
        lengths = self.lengths().reshape(-1)
        cache.advance(int(self.seen_tokens), lengths.tolist())
        cache.centers = list(self.centers)
        places = [self._places_of_steps(h, lengths) for h in range(self.num_hierarchies)]
        for idx, layer in enumerate(self.layers):
            if hasattr(layer, "keys"):
                slots, exists = places[idx % self.num_hierarchies]
                keys, values = (_take(x, slots, exists) for x in (layer.keys, layer.values))
                cache.append(idx, keys, values)
            for place, state in layer.conv_states.items():
                if state is not None:
                    cache.write_conv(state.clone(), idx, place)
            for place, state in layer.recurrent_states.items():
                if state is not None:
                    cache.write_recurrent(state.clone(), idx, place)
        return cache

    def keep(self, cache: HierarchicalCache) -> None:
        """Take over the tokens of `cache`, into the same memory where the batch has the same size."""
        lengths = cache.lengths()
        self._keep_states(cache)
        device = next(x.device for layer in self.layers for x in layer.conv_states.values() if x is not None)
        rows = torch.tensor(lengths, device=device)
        for hierarchy in range(self.num_hierarchies):
            self._keep_keys(cache, hierarchy, rows)
        self.seen_tokens.zero_()
        self.advance(cache.seen_tokens, device)
        if cache.rows_differ:
            self.follow(rows)
        self.has_step, self._known_lengths, self._is_taken = None, lengths, False

    def _keep_states(self, cache):
        for layer, other in zip(self.layers, cache.layers):
            for kind in ("conv_states", "recurrent_states"):
                mine, flags = getattr(layer, kind), getattr(layer, f"is_{kind}_initialized")
                for place, state in getattr(other, kind).items():
                    if state is None:
                        continue
                    if mine[place] is None or mine[place].shape != state.shape:
                        mine[place], flags[place] = _static(state), True
                    mine[place].copy_(state)
                    layer.has_previous_state[place] = True

    def _keep_keys(self, cache, hierarchy, lengths):
        """Write the keys and values of a hierarchy, in rows of `lengths [1 or batch]`, into their slots."""
        if self.config.window_sizes[hierarchy] == 0:
            return
        cached = cache.steps_cached(hierarchy)
        config, reach, device = self.config, self.ring_sizes[hierarchy], lengths.device
        phases, steps = config.dilations[hierarchy], self._steps(hierarchy, lengths).unsqueeze(1)  # [1 or batch, 1]
        slot = torch.arange(phases * reach, device=device)
        phase, place = slot // reach, slot % reach
        newest = (steps - 1 - phase).div(phases, rounding_mode="floor")  # in the phase, below 0 if there is none
        held = newest - (newest - place) % reach
        column = held * phases + phase - steps + cached
        exists = (held >= 0) & (column >= 0)
        scale = None
        if config.use_xpos[hierarchy]:
            scale = key_scale(config, hierarchy, self.centers[hierarchy] - cache.centers[hierarchy], device)
        for layer, other in self._layers_of(cache, hierarchy):
            keys = other.keys if scale is None else (other.keys * scale).to(other.keys.dtype)
            keys, values = (_take(x, column, exists) for x in (keys, other.values))
            if not layer.is_initialized or layer.keys.shape != keys.shape:
                layer.lazy_initialization(keys, values)
            layer.keys.copy_(keys)
            layer.values.copy_(values)

    def _places_of_steps(self, hierarchy, lengths):
        """Slots `[1 or batch, cached]` of the steps that a dynamic cache holds, and whether each exists."""
        config = self.config
        steps, phases = self._steps(hierarchy, lengths).unsqueeze(1), config.dilations[hierarchy]
        reach = self.ring_sizes[hierarchy]
        cached, kept = int(steps.max()), config.kept_steps[hierarchy]
        cached = cached if kept is None else min(cached, kept - 1)
        step = steps - cached + torch.arange(cached, device=lengths.device)
        return step % phases * reach + step // phases % reach, step >= 0

    def _steps(self, hierarchy, lengths):
        """Number of steps of rows of `lengths` tokens."""
        return -(-lengths // self.config.strides[hierarchy])

    def _layers_of(self, cache, hierarchy):
        return zip(
            self.layers[hierarchy : -1 : self.num_hierarchies], cache.layers[hierarchy : -1 : self.num_hierarchies]
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows by index, in place where their number stays the same."""
        super().reorder_cache(beam_idx)
        self._known_lengths = self.has_step = None

    def reset(self) -> None:
        """Empty the cache, but keep the memory that compiled steps read."""
        super().reset()
        self._known_lengths = self.has_step = None


def _put(memory, new, plan):
    """Write `new [batch, heads, 1, channels]` into `memory [batch, heads, slots, channels]` at `plan.slots`."""
    slots, new = plan.slots, new.to(memory.dtype)
    if slots.shape[0] == 1 and plan.rows is None:
        memory.index_copy_(2, slots, new)
        return
    index = slots.view(-1, 1, 1, 1).expand(new.shape)
    if plan.rows is not None:
        new = torch.where(plan.rows.unsqueeze(1), new, memory.gather(2, index))
    memory.scatter_(2, index, new)


def _phase_of(memory, phases, phase):
    """`[batch, heads, phases * reach, channels]` of `phase [1 or batch]` -> `[batch, heads, reach, channels]`."""
    memory = memory.unflatten(2, (phases, -1))
    if phase.shape[0] == 1:
        return memory.index_select(2, phase).squeeze(2)
    batch, heads, _, reach, channels = memory.shape
    return memory.gather(2, phase.view(-1, 1, 1, 1, 1).expand(batch, heads, 1, reach, channels)).squeeze(2)


def _take(x, places, exists):
    """`[batch, heads, length, channels]` at `places [1 or batch, chosen]`, something finite where `exists` is `False`."""
    x = nn.functional.pad(x, (0, 0, 0, 1))  # at least one to read
    index = torch.where(exists, places, 0).to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def _static(x):
    """Memory of the shape of a state, whose address compiled steps may rely on."""
    memory = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if not is_tracing(memory):
        torch._dynamo.mark_static_address(memory)
    return memory


__all__ = ["StaticHierarchicalCache", "ring_sizes"]
