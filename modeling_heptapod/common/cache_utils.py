"""Number of seen tokens and selection of rows, shared by all caches of this package."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_checks import held_states
from .transformers_versions import CacheVersionsMixin


class CountingCacheMixin(CacheVersionsMixin, Cache):
    """Mixin for caches, placed before a cache class of transformers.

    Attributes:
        seen_tokens (`int` or `torch.LongTensor` of shape `[]`): number of tokens of each row, padding included.
        next_positions (`torch.LongTensor` of shape `[batch]`, *optional*): number of real tokens of each row's sequence;
            `None` without padding and packed rows, where it equals `seen_tokens`.
        packed (`bool`): whether a row holds several sequences, the last of which continues.
        advance (`Callable`): method of each cache that counts new tokens. A model calls it once per forward pass, after its
            last layer. The arguments depend on the cache.
    """

    seen_tokens: Any
    next_positions: torch.Tensor | None = None
    packed: bool = False
    advance: Callable[..., None]

    def get_seq_length(self, layer_idx: int = 0):
        """Number of tokens seen, the same for every layer."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int):
        """Length and offset of a mask over all seen tokens and `query_length` new ones."""
        return self.seen_tokens + query_length, 0

    def lengths(self) -> int | list[int] | torch.Tensor:
        """Number of real tokens of each row's sequence, `[batch]`, or one number for all rows."""
        return self.seen_tokens if self.next_positions is None else self.next_positions

    @property
    def rows_differ(self) -> bool:
        """Whether rows hold different numbers of real tokens, or may do so."""
        return self.next_positions is not None

    def follow(self, next_positions: torch.Tensor) -> None:
        """Set `next_positions [batch]`; called once per forward pass whose rows differ."""
        self.next_positions = next_positions

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows by index; their number may change."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.next_positions is not None:
            self.next_positions = self.next_positions[beam_idx.to(self.next_positions.device)]

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.next_positions, self.packed = None, False

    def drop_states(self) -> None:
        """Free the states: `reset` of stock layers keeps their memory, and with it the batch size."""
        for layer in self.layers:
            for name in ("conv_states", "recurrent_states"):
                states, written = getattr(layer, name, {}), getattr(layer, f"is_{name}_initialized", {})
                states.update(dict.fromkeys(states))
                written.update(dict.fromkeys(written, False))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            RuntimeError: if a layer has a recurrent state or a window, from which no token can be removed.
            ValueError: for a positive number, and for more tokens than the cache has seen.
        """
        self._check_that_tokens_are_kept()
        if not -self.seen_tokens <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be from {-self.seen_tokens}, all tokens seen, to 0, got {tokens_to_remove}."
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Do nothing: `crop` needs no record. Raises a `RuntimeError` if tokens cannot be removed."""
        self._check_that_tokens_are_kept()

    def _check_that_tokens_are_kept(self):
        if any(hasattr(layer, "activate_past_recording") for layer in self.layers):
            raise RuntimeError(
                f"This {type(self).__name__} cannot be cropped: its states and windows do not keep every token. Copy it "
                "(`copy.deepcopy`) before tokens that may have to be removed."
            )

    def num_rows(self) -> int | None:
        """Batch size, `None` before the first token."""
        for layer in self.layers:
            for state in held_states(layer).values():
                return state.shape[0]  # not `len`, which would fix a dynamic batch size in an export
        return None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, as for several continuations of one prompt.

        Raises:
            ValueError: unless `repeats` is an integer of at least 0.
        """
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 0:
            raise ValueError(f"`repeats` must be an integer of at least 0, got {repeats!r}.")
        rows = self.num_rows()
        if rows is not None:
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index, in this order and with negative ones counted from the end, or by a mask.

        Raises:
            TypeError, ValueError: for other dtypes, rows that do not exist, or a mask of another length.
        """
        indices, rows = torch.as_tensor(indices), self.num_rows()
        if rows is None:
            return
        if indices.numel() == 0 and indices.dtype != torch.bool:
            indices = indices.long()  # an empty list makes floats
        if indices.dtype == torch.bool:
            if list(indices.shape) != [rows]:
                raise ValueError(f"`indices` as a mask must be [{rows}], got {list(indices.shape)}.")
            indices = indices.nonzero().squeeze(1)
        elif indices.is_floating_point() or indices.is_complex():
            raise TypeError(f"`indices` must be integers or a mask, got {indices.dtype}.")
        elif indices.dim() != 1 or ((indices < -rows) | (indices >= rows)).any():
            raise ValueError(f"`indices` must be a vector of row numbers below {rows}, got {indices.tolist()}.")
        self.reorder_cache(indices.long() % rows)


__all__ = ["CountingCacheMixin"]
