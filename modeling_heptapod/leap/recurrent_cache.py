"""Caches for models whose layers are all recurrent.

The caches of transformers hold the states of such layers (`LinearAttentionLayer`), but not the number of tokens seen, which
`generate` and position embeddings need. These subclasses count tokens; the layers are those of transformers.
"""

import torch
from transformers.cache_utils import DynamicCache, StaticCache

from ..common.cache_checks import LayerStates
from ..common.cache_utils import CountingCacheMixin
from ..common.static_cache import StaticCountingMixin
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


class StaticRecurrentCache(_RecurrentCacheMixin, StaticCountingMixin, StaticCache):
    """Static cache for compiled steps: the count is a tensor changed in place, so that all steps share one graph.

    Args:
        config (`PreTrainedConfig`): as in `RecurrentCache`.
        max_cache_len (`int`, *optional*): accepted because `generate` passes it; recurrent states have no length.
        offloading, offload_only_non_sliding (`bool`): as in `StaticCache`.
    """

    def __init__(self, config, max_cache_len: int | None = None, **kwargs):
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)  # type: ignore[arg-type]
        self._start()


__all__ = ["RecurrentCache", "StaticRecurrentCache", "mixing_states"]
