"""What all caches of this package have in common: how many tokens they have seen, and their rows."""

import torch

from .cache_checks import held_states
from .transformers_versions import CacheVersionsMixin


class CountingCacheMixin(CacheVersionsMixin):
    """Before a cache class of transformers; it counts in `seen_tokens`, and its rows can be repeated and chosen.

    Attributes:
        seen_tokens (`int` or `torch.LongTensor` of shape `[]`): how many tokens each row has seen, pads included.
        next_positions (`torch.LongTensor` of shape `[batch]`, *optional*): how many real tokens the sequence of each row
            has; `None` where there were no pads and no packed rows, and it is what each row has seen.
        packed (`bool`): whether a row holds more than one sequence, of which the last one goes on.
    """

    next_positions: torch.Tensor | None = None
    packed: bool = False

    def get_seq_length(self, layer_idx: int = 0):
        """Number of tokens seen, the same for every layer."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int):
        """Length and offset of a mask over everything seen and `query_length` new tokens."""
        return self.seen_tokens + query_length, 0

    def lengths(self) -> int | torch.Tensor:
        """Real tokens of the sequence of each row, `[batch]`, or one number for all rows."""
        return self.seen_tokens if self.next_positions is None else self.next_positions

    @property
    def rows_differ(self) -> bool:
        """Whether rows hold different numbers of real tokens, or may do so."""
        return self.next_positions is not None

    def follow(self, next_positions: torch.Tensor) -> None:
        """Remember `next_positions [batch]`; a model calls it once a forward pass in which rows differ."""
        self.next_positions = next_positions

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows; there may be more or fewer than before."""
        super().reorder_cache(beam_idx)
        if self.next_positions is not None:
            self.next_positions = self.next_positions[beam_idx.to(self.next_positions.device)]

    def reset(self) -> None:
        """Empty the cache, as before its first token."""
        super().reset()
        self.next_positions, self.packed = None, False

    def drop_states(self) -> None:
        """Let go of states, of which the `reset` of stock layers keeps the memory, and so the number of rows."""
        for layer in self.layers:
            for name in ("conv_states", "recurrent_states"):
                states, written = getattr(layer, name, {}), getattr(layer, f"is_{name}_initialized", {})
                states.update(dict.fromkeys(states))
                written.update(dict.fromkeys(written, False))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            RuntimeError: where a layer has a state or a window, from which a token cannot be taken out again.
            ValueError: for a positive number, and for more tokens than there are.
        """
        self._check_that_tokens_are_kept()
        if not -self.seen_tokens <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be from {-self.seen_tokens}, all tokens seen, to 0, got {tokens_to_remove}."
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Nothing to record for `crop`; raises a `RuntimeError` where tokens cannot be taken back."""
        self._check_that_tokens_are_kept()

    def _check_that_tokens_are_kept(self):
        if any(hasattr(layer, "activate_past_recording") for layer in self.layers):
            raise RuntimeError(
                f"This {type(self).__name__} cannot crop: its states and windows do not keep every token. Copy it before tokens "
                "that may have to be taken back (`copy.deepcopy`)."
            )

    def num_rows(self) -> int | None:
        """Size of the batch, `None` before the first token."""
        for layer in self.layers:
            for state in held_states(layer).values():
                return state.shape[0]  # `len` would make a number of what an export leaves open
        return None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other: many continuations of one prompt.

        Raises:
            ValueError: unless `repeats` is an integer of at least 0.
        """
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 0:
            raise ValueError(f"`repeats` must be an integer of at least 0, got {repeats!r}.")
        rows = self.num_rows()
        if rows is not None:
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` in this order: numbers, those below 0 from the end, or a mask.

        Raises:
            TypeError, ValueError: for what are no numbers of rows, or a mask of another length.
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
            raise ValueError(
                f"`indices` must be a vector of numbers below {rows}, the rows held, got {indices.tolist()}."
            )
        self.reorder_cache(indices.long() % rows)


__all__ = ["CountingCacheMixin"]
