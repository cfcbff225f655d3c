"""The cache of the hierarchical LM, made of transformers' layers: one for each hierarchy of each layer, one for the compressors.

    hybrid, hybrid_sliding    keys and values; conv states 0 and 1: past steps for the token shifts before attention and
                              feed-forward; recurrent state 0: the last step of a strided hierarchy before it is merged
    conv                      the same without keys and values, for hierarchies without attention
    conv (the last one)       conv state 0: past embeddings for the compressors; recurrent states: the last output of each
                              strided hierarchy

Rows are aligned at their ends: shorter rows lack entries at the front. Keys and values are written in place into memory with
room to spare, so that a token does not copy the window.
"""

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache

from ..common.cache_checks import LayerStates
from ..common.cache_utils import CountingCacheMixin
from ..common.key_room import KeyRoomMixin


class HierarchicalCache(KeyRoomMixin, CountingCacheMixin, DynamicCache):
    """Dynamic cache of a [`HierarchicalLMModel`].

    Args:
        config (`HierarchicalLMConfig`): of the model.

    Attributes:
        seen_tokens (`int`): tokens seen, pads included.
        row_lengths (`list[int]`): real tokens of each row, or of all rows if there is one entry.
        centers (`list[int]`): position of each hierarchy from which the decay of cached keys is counted (xPos).
    """

    # Keys, lengths and strides change in Python at each step, which would compile a graph for each.
    is_compileable = False

    def __init__(self, config):
        layers = []
        hierarchies = config.num_hierarchies
        for place, layer_type in enumerate(config.cache_layer_types):
            is_last = place == hierarchies * config.num_hidden_layers
            how = {"number_of_states": max(2, hierarchies) if is_last else 2}
            if layer_type == "hybrid_sliding":
                how["sliding_window"] = config.kept_steps[place % hierarchies]
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**how))
        super(DynamicCache, self).__init__(layers=layers)
        self.num_hierarchies = hierarchies
        self.centers = [0] * hierarchies
        self.seen_tokens = 0
        self.row_lengths = [0]
        self.empty_room()

    def advance(self, tokens: int, row_lengths: list[int]) -> None:
        """Count `tokens` more. A model calls it once in a forward pass, after its last layer."""
        self.seen_tokens += tokens
        self.row_lengths = row_lengths

    def lengths(self) -> list[int]:
        """Real tokens of each row, or of all rows if there is one entry."""
        return self.row_lengths

    @property
    def rows_differ(self) -> bool:
        """Whether a row holds fewer real tokens than tokens seen."""
        return min(self.row_lengths) < self.seen_tokens

    def steps_cached(self, hierarchy: int) -> int:
        """Number of cached keys of a hierarchy. Missing ones at the front of short rows count."""
        layer = self.layers[hierarchy]
        return layer.keys.shape[2] if getattr(layer, "is_initialized", False) and layer.keys.dim() == 4 else 0

    def append(
        self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, order: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add steps.

        Args:
            layer_idx (`int`): of a layer with keys and values.
            key, value (`torch.Tensor` of shape `[batch, heads, steps, channels]`).
            order (`torch.LongTensor` of shape `[batch, length]`, *optional*): which of the cached and new steps to keep,
                where rows have different numbers of new steps.

        Returns:
            Keys and values of all cached and new steps `[batch, heads, length, channels]`, not reordered.
        """
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = (x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (key, value))
        keep = layer.sliding_window - 1 if layer.is_sliding else None
        if order is None and not (torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)):
            return self._append_in_place(layer, layer_idx, key, value, keep)
        self._count_steps(layer, key.shape[2])
        full = torch.cat((layer.keys, key), dim=2), torch.cat((layer.values, value), dim=2)
        kept = list(full)
        if order is not None:
            order = order[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            kept = [x.gather(2, order) for x in full]
        if keep is not None:
            kept = [x[:, :, max(x.shape[2] - keep, 0) :] for x in kept]
        layer.keys, layer.values = kept
        return full

    @staticmethod
    def _count_steps(layer, steps):
        if layer.is_sliding:
            layer.cumulative_length += steps

    def _append_in_place(self, layer, layer_idx, key, value, keep):
        length, steps = layer.keys.shape[2], key.shape[2]
        if not length:  # a prompt: a copy, so that steps outside of the window, and queries, are freed
            first = 0 if keep is None else max(steps - keep, 0)
            memory = [x[:, :, first:].clone() for x in (key, value)]
            layer.keys, layer.values = memory
            self._count_steps(layer, steps)
            self.start_room(layer_idx, memory, steps - first)
            return key, value
        if keep is not None and steps > max(keep, 1):
            self._count_steps(layer, steps)
            full = [torch.cat(pair, dim=2) for pair in ((layer.keys, key), (layer.values, value))]
            layer.keys, layer.values = (x[:, :, x.shape[2] - keep :].clone() for x in full)
            return tuple(full)
        memory, end, length = self.make_room(layer_idx, steps)
        memory[0][:, :, end : end + steps].copy_(key)
        memory[1][:, :, end : end + steps].copy_(value)
        return tuple(x[:, :, end - length : end + steps] for x in memory)

    def scale_keys(self, hierarchy: int, factor: torch.Tensor) -> None:
        """Multiply the cached keys of a hierarchy by `factor [channels]`, in every layer."""
        for layer in self.layers[hierarchy : -1 : self.num_hierarchies]:
            layer.keys = (layer.keys * factor).to(layer.keys.dtype)

    def read_conv(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A conv state, `None` before the first is written."""
        return self.layers[layer_idx].conv_states[state_idx]

    def write_conv(self, state: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        """Replace the state by `state [batch, ...]`."""
        layer = self.layers[layer_idx]
        if not layer.is_conv_states_initialized[state_idx]:
            layer.lazy_initialization(conv_states=state, state_idx=state_idx)
            layer.has_previous_state[state_idx] = True
        layer.conv_states[state_idx] = state

    def read_recurrent(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A recurrent state, `None` before the first is written."""
        return self.layers[layer_idx].recurrent_states[state_idx]

    def write_recurrent(self, state: torch.Tensor, layer_idx: int, state_idx: int = 0) -> None:
        """Replace the state by `state [batch, ...]`."""
        layer = self.layers[layer_idx]
        if not layer.is_recurrent_states_initialized[state_idx]:
            layer.lazy_initialization(recurrent_states=state, state_idx=state_idx)
            layer.device = state.device
        layer.recurrent_states[state_idx] = state

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search. Their number may change."""
        super().reorder_cache(beam_idx)
        equal = len(set(self.row_lengths)) == 1  # then `beam_idx` is not read, which would synchronize the device
        rows = [0] * len(beam_idx) if equal else beam_idx.tolist()
        self.row_lengths = [self.row_lengths[row] for row in rows]

    def reset(self) -> None:
        """Empty the cache. The next batch may have another size."""
        super().reset()
        self.drop_states()
        self.seen_tokens, self.row_lengths = 0, [0]
        self.empty_room()


def layer_states(config, ring_sizes: list[int] | None) -> list[LayerStates]:
    """Expected states of each layer of a cache after its first token.

    Args:
        config (`HierarchicalLMConfig`): of the model.
        ring_sizes (`list[int]`, *optional*): of a static cache, see [`StaticHierarchicalCache`].
    """
    is_static, layer = ring_sizes is not None, []
    shapes: dict[tuple[str, int | None], tuple[int | None, ...]]
    last: dict[tuple[str, int | None], tuple[int | None, ...]] = {}
    for h, kind in zip(range(config.num_hierarchies), config.cache_layer_types):
        width, window = config.hidden_sizes[h], None
        slots = None if ring_sizes is None else config.dilations[h] * ring_sizes[h]
        shift, keys = (config.dilations[h], width // 2), (config.num_attention_heads[h], slots, config.head_dim[h])
        shapes = {("conv_states", 1): shift}
        if kind != "conv":
            shapes |= {("conv_states", 0): shift, ("keys", None): keys, ("values", None): keys}
        if config.strides[h] > 1 and config.num_hierarchies > 1:
            shapes["recurrent_states", 0] = (1, width)
        if is_static and kind != "conv":
            kind = "hybrid"
        if kind == "hybrid_sliding":
            window = config.kept_steps[h]
        layer.append(LayerStates(kind, shapes, sliding_window=window, is_static=is_static))
        if config.strides[h] > 1 and (config.predict_from_all or h == config.predict_index):
            last["recurrent_states", h] = (1, width)
    if max(config.compression_factors) > 1:
        last["conv_states", 0] = (max(config.compression_factors) - 1, config.hidden_size)
    return layer * config.num_hidden_layers + [LayerStates("conv", last, is_static=is_static)]


__all__ = ["HierarchicalCache", "layer_states"]
