"""Counts in tensors and memory that keeps its address, shared by static caches: all compiled steps are one graph."""

import torch
from transformers.utils.import_utils import is_tracing

from .cache_checks import held_states
from .cache_utils import CountingCacheMixin
from .transformers_versions import CACHE


class StaticCountingMixin(CountingCacheMixin):
    """Mixin for static caches, placed before a cache class of transformers.

    Attributes:
        has_tokens (`bool`): whether the cache has seen a token, known without reading the count.
    """

    is_croppable = False

    def _start(self):
        self.seen_tokens = torch.zeros((), dtype=torch.long)
        # Of the instance from the beginning: a compiled step knows whether they are.
        self.next_positions, self.packed, self.has_tokens = None, False, False

    @staticmethod
    def check_max_cache_len(max_cache_len: int) -> None:
        """Raise a `TypeError` for another type than an integer, and a `ValueError` for one below 1."""
        if not isinstance(max_cache_len, int):
            raise TypeError(f"`max_cache_len` must be an integer, got {max_cache_len!r}.")
        if max_cache_len < 1:
            raise ValueError(f"`max_cache_len` must be at least 1, got {max_cache_len}.")

    def lengths(self) -> torch.Tensor:
        """Number of real tokens of each row's sequence, `[batch]`, or `[]` for all rows."""
        return self.seen_tokens if self.next_positions is None else self.next_positions

    def check_room(self, tokens: int) -> None:
        """Raise a `ValueError` where `tokens` more do not fit. A compiled step cannot, because it does not read the count."""
        if self.max_cache_len is None or (self.has_tokens and is_tracing(self.seen_tokens)):
            return
        seen = int(self.seen_tokens) if self.has_tokens else 0
        if seen + tokens > self.max_cache_len:
            raise ValueError(
                f"`{CACHE}` is full: it has room for `max_cache_len`={self.max_cache_len} tokens and holds {seen}, but "
                f"{tokens} more were given. Create a {type(self).__name__} with a larger `max_cache_len`."
            )

    def prepare_step(self) -> None:
        """Prepare what compiled code must know of the next token. Called outside of it, by `generate`."""

    def advance(self, tokens: int, device: torch.device) -> None:
        """Count `tokens` more, in place; the first call moves the count to the model's device."""
        if self.seen_tokens.device != device:
            self.seen_tokens = self.seen_tokens.to(device)
            torch._dynamo.mark_static_address(self.seen_tokens)
        self.seen_tokens.add_(tokens)
        self.has_tokens = True

    def follow(self, next_positions: torch.Tensor) -> None:
        """As a dynamic cache, in place."""
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
        self.has_tokens = False

    def _check_that_tokens_are_kept(self):
        raise RuntimeError(
            f"This {type(self).__name__} cannot be cropped. Copy it (`copy.deepcopy`) before tokens that may have to be "
            "removed, or use a dynamic cache."
        )


def select_rows(memory: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor by index, written into its own memory where their number stays the same."""
    rows = memory.index_select(0, indices.to(memory.device))
    if rows.shape == memory.shape:
        return memory.copy_(rows)
    torch._dynamo.mark_static_address(rows)
    return rows


__all__ = ["StaticCountingMixin", "select_rows"]
