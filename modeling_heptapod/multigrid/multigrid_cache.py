"""The cache of MultiGrid, made of transformers' own layers. A layer holds the heads of all axes side by side.

Layer `l` of the first half is for the self blocks of layer `l`, layer `l` of the second half for its cross blocks. So a token
is appended twice a layer for any number of axes, and beam search reorders plain rows.

    full_attention      core "transformer": keys and values
    linear_attention    cores "leap" (the running means) and "lstm" (hidden and cell states)
"""

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache

from ..leap.recurrent_cache import RecurrentCache


class MultiGridCache(RecurrentCache):
    """Dynamic cache of a [`MultiGridModel`]. It counts the tokens it has seen, with every core.

    Args:
        config (`MultiGridConfig`): of the model.

    Attributes:
        past_mask (`torch.BoolTensor` of shape `[batch, seen_tokens]`, *optional*): which cached tokens are real, `None` where
            all are (core "transformer").
    """

    def __init__(self, config):
        Cache.__init__(self, layers=[DYNAMIC_LAYER_TYPE_MAPPING[kind]() for kind in config.cache_layer_types])
        self.seen_tokens = 0
        self.past_mask = None

    def reset(self) -> None:
        """Empty the cache. The next batch may have another size."""
        super().reset()
        self.past_mask = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search. Their number may change."""
        super().reorder_cache(beam_idx)
        if self.past_mask is not None:
            self.past_mask = self.past_mask[beam_idx.to(self.past_mask.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises a `RuntimeError` with recurrent cores."""
        super().crop(tokens_to_remove)
        if self.past_mask is not None:
            self.past_mask = self.past_mask[:, : self.seen_tokens]
            self.next_positions = self.past_mask.sum(1)


__all__ = ["MultiGridCache"]
