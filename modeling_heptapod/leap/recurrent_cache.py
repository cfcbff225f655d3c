"""Caches for models whose layers are all recurrent.

The caches of transformers hold the states of such layers (`LinearAttentionLayer`), but not the number of tokens seen, which
`generate` and position embeddings need. These subclasses count tokens; the layers are those of transformers.
"""

import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils.import_utils import is_tracing

from ..common.cache_checks import LayerStates, held_states
from ..common.cache_utils import CountingCacheMixin
from .focus_recurrent import packed_shape


def mixing_states(window: int | None, heads: int, parts: int, head_dim: int, number: int = 1) -> LayerStates:
    """The `number` states of a layer of running means, see `pack_state` in `focus_recurrent.py`."""
    kind, shape = "recurrent_states" if window is None else "conv_states", packed_shape(window, heads, parts, head_dim)
    return LayerStates("linear_attention", {(kind, place): shape for place in range(number)}, precise=True)


class _RecurrentCacheMixin(CountingCacheMixin):
    """Differences to the caches of transformers that both caches share."""

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        """As in transformers, which marks a state as present only with its conv state; this method does so, too."""
        states = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        self.layers[layer_idx].has_previous_state[state_idx] = True
        return states


class RecurrentCache(_RecurrentCacheMixin, DynamicCache):
    """Dynamic cache that counts the tokens it has seen.

    Args:
        config (`PreTrainedConfig`): its `layer_types` must all be `"linear_attention"` or `"conv"`.
        offloading, offload_only_non_sliding (`bool`): as in `DynamicCache`.
    """

    # The count is a Python number, so each compiled step would be another graph. `StaticRecurrentCache` has one graph.
    is_compileable = False

    def __init__(self, config, **kwargs):
        super().__init__(config=config, **kwargs)
        self.seen_tokens = 0

    def advance(self, tokens: int, device: torch.device) -> None:
        """Count `tokens` more. A model calls it once per forward pass, after its last layer."""
        self.seen_tokens += tokens

    def reset(self) -> None:
        """Empty the cache, also for another batch size."""
        super().reset()
        self.drop_states()
        self.seen_tokens = 0


class StaticRecurrentCache(_RecurrentCacheMixin, StaticCache):
    """Static cache for compiled steps: the count is a tensor changed in place, so that all steps share one graph.

    Args:
        config (`PreTrainedConfig`): as in `RecurrentCache`.
        max_cache_len (`int`, *optional*): accepted because `generate` passes it; recurrent states have no length.
        offloading, offload_only_non_sliding (`bool`): as in `StaticCache`.
    """

    def __init__(self, config, max_cache_len: int | None = None, **kwargs):
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)  # type: ignore[arg-type]
        self._start()

    def _start(self):
        self.seen_tokens = torch.zeros((), dtype=torch.long)
        # Of the instance from the beginning: a compiled step knows whether they are.
        self.next_positions, self.packed = None, False

    def advance(self, tokens: int, device: torch.device) -> None:
        """Count `tokens` more, in place; the first call moves the count to the model's device."""
        if self.seen_tokens.device != device:
            self.seen_tokens = self.seen_tokens.to(device)
            torch._dynamo.mark_static_address(self.seen_tokens)
        self.seen_tokens.add_(tokens)

    def follow(self, next_positions: torch.Tensor) -> None:
        """As the dynamic cache, in place."""
        if self.next_positions is not None and self.next_positions.shape == next_positions.shape:
            self.next_positions.copy_(next_positions)
            return
        self.next_positions = next_positions
        if not is_tracing(next_positions):
            torch._dynamo.mark_static_address(self.next_positions)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows by index, in place where their number stays the same."""
        for layer in self.layers:
            for (name, place), state in held_states(layer).items():
                rows = select_rows(state, beam_idx)
                if place is None:
                    setattr(layer, name, rows)
                else:
                    getattr(layer, name)[place] = rows
        if self.next_positions is not None:
            self.next_positions = select_rows(self.next_positions, beam_idx)

    def reset(self) -> None:
        """Empty the cache, but keep the memory that compiled steps read."""
        super().reset()
        self.seen_tokens.zero_()


def select_rows(memory: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor by index, written into its own memory where their number stays the same."""
    rows = memory.index_select(0, indices.to(memory.device))
    if rows.shape == memory.shape:
        return memory.copy_(rows)
    torch._dynamo.mark_static_address(rows)
    return rows


__all__ = ["RecurrentCache", "StaticRecurrentCache", "mixing_states", "select_rows"]
