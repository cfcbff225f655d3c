"""What all caches of this package have in common: how many tokens they have seen, and their rows."""

import torch

from .cache_states import held_states
from .transformers_versions import StateReadersMixin


class CountingCacheMixin(StateReadersMixin):
    """Before a cache class of transformers; it counts in `seen_tokens`, and its rows can be repeated and chosen.

    Attributes:
        seen_tokens (`int` or `torch.LongTensor` of shape `[]`): how many tokens each row has seen, pads included.
    """

    def get_seq_length(self, layer_idx: int = 0):
        """Number of tokens seen, the same for every layer."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int):
        """Length and offset of a mask over everything seen and `query_length` new tokens."""
        return self.seen_tokens + query_length, 0

    def num_rows(self) -> int | None:
        """Size of the batch, `None` before the first token."""
        for layer in self.layers:
            for state in held_states(layer).values():
                return state.shape[0]  # `len` would make a number of what an export leaves open
        return None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other: many continuations of one prompt."""
        rows = self.num_rows()
        if rows is not None:
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, numbers or a mask, in this order."""
        if self.num_rows() is not None:
            self.reorder_cache(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)


__all__ = ["CountingCacheMixin"]
