"""The cache of MultiGrid: transformers' own layers, all axes side by side in the heads of one.

Layer `l` of the first half holds what the streams of layer `l` mix of their own past, layer `l` of the second half what they
read of each other's. So a token appends twice a layer, however many axes there are, and beams reorder plain rows.

    full_attention      core "transformer": keys and values
    linear_attention    cores "leap" (the running means) and "lstm" (hidden and cell states)
"""

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache

from ..leap.recurrent_cache import RecurrentCache


class MultiGridCache(RecurrentCache):
    """Dynamic cache of a [`MultiGridModel`]; counts the tokens it has seen for every core.

    Args:
        config (`MultiGridConfig`): of the model.

    Attributes:
        past_mask (`torch.BoolTensor` of shape `[batch, seen_tokens]`, *optional*): which cached tokens are real, for the
            core "transformer"; `None` where all are.
    """

    def __init__(self, config):
        Cache.__init__(self, layers=[DYNAMIC_LAYER_TYPE_MAPPING[kind]() for kind in config.cache_layer_types])
        self.seen_tokens = 0
        self.past_mask = None

    def reset(self) -> None:
        """Empty the cache, as before its first token: of another batch, too."""
        super().reset()
        self.past_mask = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search; there may be more or fewer than before."""
        super().reorder_cache(beam_idx)
        if self.past_mask is not None:
            self.past_mask = self.past_mask[beam_idx.to(self.past_mask.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. Recurrent cores cannot, and raise a `RuntimeError`."""
        super().crop(tokens_to_remove)
        if self.past_mask is not None:
            self.past_mask = self.past_mask[:, : self.seen_tokens]


__all__ = ["MultiGridCache"]
