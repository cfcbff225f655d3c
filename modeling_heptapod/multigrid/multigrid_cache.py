"""The caches of MultiGrid, made of transformers' own layers. A layer holds the heads of all axes side by side.

Layer `l` of the first half is for the self blocks of layer `l`, layer `l` of the second half for its cross blocks. So a token
is appended twice a layer for any number of axes, and beam search reorders plain rows.

    full_attention      core "transformer": keys and values
    linear_attention    cores "leap" (the running means) and "lstm" (hidden and cell states)
"""

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache
from transformers.utils.import_utils import is_tracing

from ..common.key_room import KeyRoomMixin
from ..common.static_cache import select_rows
from ..leap.recurrent_cache import RecurrentCache, StaticRecurrentCache


class MultiGridCache(KeyRoomMixin, RecurrentCache):
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
        self.empty_room()

    @property
    def has_tokens(self) -> bool:
        """Whether the cache has seen a token."""
        return self.seen_tokens > 0

    def check_room(self, tokens: int) -> None:
        """Do nothing: there is room for any number of tokens."""

    def keep_mask(self, mask: torch.Tensor | None, batch: int, seq: int) -> None:
        """Set `past_mask` to that of all tokens so far, after a pass of `seq` tokens."""
        self.past_mask = mask

    def reset(self) -> None:
        """Empty the cache. The next batch may have another size."""
        super().reset()
        self.past_mask = None
        self.empty_room()

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


class StaticMultiGridCache(StaticRecurrentCache):
    """Static cache of a [`MultiGridModel`] for compiled steps: memory is allocated once and changed in place.

    Args:
        config (`MultiGridConfig`): of the model.
        max_cache_len (`int`, *optional*): number of tokens, pads included, for which there is room. Required with
            `core="transformer"`. States of the other cores have one size for any number of tokens.

    Attributes:
        max_cache_len (`int`, *optional*): as above, `None` with recurrent cores.
        has_tokens (`bool`): whether the cache has seen a token, known without reading the count.
        past_mask (`torch.BoolTensor` of shape `[batch, max_cache_len]`, *optional*): which cached tokens are real, `False`
            where there are none yet (core "transformer"). `None` before the first token.

    Raises:
        TypeError: for a `max_cache_len` that is no integer.
        ValueError: for one below 1, and for none with `core="transformer"`.
    """

    def __init__(self, config, max_cache_len: int | None = None):
        recurrent = "full_attention" not in config.cache_layer_types
        if max_cache_len is None and not recurrent:
            raise ValueError("`max_cache_len` must be given with core='transformer', got None: the number of tokens.")
        if max_cache_len is not None:
            self.check_max_cache_len(max_cache_len)
        layers = [STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=max_cache_len) for kind in config.cache_layer_types]
        Cache.__init__(self, layers=layers)
        self._start()
        self.max_cache_len = None if recurrent else max_cache_len
        self.past_mask: torch.Tensor | None = None

    def get_mask_sizes(self, query_length: int, layer_idx: int):
        """Length and offset of a mask over all of the memory."""
        return self.max_cache_len, 0

    def keep_mask(self, mask: torch.Tensor | None, batch: int, seq: int) -> None:
        """Write into `past_mask` which tokens are real, after a pass of `seq` tokens.

        Args:
            mask (`torch.BoolTensor` of shape `[batch, seq or max_cache_len]`, *optional*): of the first tokens, or of all.
            batch, seq (`int`): size of the pass.
        """
        if self.max_cache_len is None:
            return
        if mask is None:
            mask = torch.ones(batch, seq, dtype=torch.bool, device=self.seen_tokens.device)
        if self.past_mask is None:
            self.past_mask = mask.new_zeros(batch, self.max_cache_len)
            if not is_tracing(mask):
                torch._dynamo.mark_static_address(self.past_mask)
        self.past_mask[:, : mask.shape[1]].copy_(mask)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows by index, in place where their number stays the same."""
        super().reorder_cache(beam_idx)
        if self.past_mask is not None:
            self.past_mask = select_rows(self.past_mask, beam_idx)

    def reset(self) -> None:
        """Empty the cache, but keep the memory that compiled steps read: the next batch must have the same size."""
        super().reset()
        if self.past_mask is not None:
            self.past_mask.zero_()


__all__ = ["MultiGridCache", "StaticMultiGridCache"]
