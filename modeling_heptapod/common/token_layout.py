"""Rows laid out anew: no pad between real tokens and, for the hierarchical LM, sequences that begin where coarse steps do.

A pad takes no place in a window, no step of the ALiBi bias and no position. So pads are moved behind the last real token of their
row, where causality keeps them from being seen.

Compression, strides and dilations of the hierarchical LM count from the first token of a sequence. So packed sequences are
set apart: each begins at a multiple of the coarsest factor, after at least as many empty slots as a compressor looks back.
"""

from dataclasses import dataclass

import torch


@dataclass
class TokenLayout:
    """Mapping between tokens of the input and slots.

    Attributes:
        take (`torch.LongTensor` of shape `[batch, slots]`): index in the input of the token in each slot.
        real (`torch.BoolTensor` of shape `[batch, slots]`): whether a slot holds a token.
        back (`torch.LongTensor` of shape `[batch, seq]`): slot of each token of the input.
        given (`torch.BoolTensor` of shape `[batch, seq]`): whether an input is a token, not padding.
        positions (`torch.LongTensor` of shape `[batch, slots]`, *optional*): position in the packed sequence; `None` if
            each row is one sequence, whose slots are its positions.
        segments (`torch.LongTensor` of shape `[batch, slots]`, *optional*): packed sequence, from 0; slots without a
            token belong to the sequence before them.
    """

    take: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor
    given: torch.Tensor
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def align(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, width]` -> `[batch, slots, width]`, zero in slots without a token."""
        taken = x.gather(1, self.take.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.where(self.real.unsqueeze(-1), taken, torch.zeros((), dtype=x.dtype, device=x.device))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, slots, width]` -> `[batch, seq, width]`, zero at padding."""
        taken = x.gather(1, self.back.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.where(self.given.unsqueeze(-1), taken, torch.zeros((), dtype=x.dtype, device=x.device))


def pad_layout(mask: torch.Tensor) -> TokenLayout:
    """Layout of padded rows.

    Args:
        mask (`torch.BoolTensor` of shape `[batch, seq]`): mask of real tokens; padding may be anywhere.
    """
    return _layout(mask, (mask.long().cumsum(1) - 1).clamp_min(0), mask.shape[1])


def packed_layout(segments: torch.Tensor, mask: torch.Tensor | None, factor: int) -> TokenLayout:
    """Layout of packed rows.

    Args:
        segments (`torch.LongTensor` of shape `[batch, seq]`): sequence of each token. Equal values that are not adjacent
            are different sequences.
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): mask of real tokens.
        factor (`int`): sequences begin at multiples of it, at least `factor - 1` slots after the end of the one before.
    """
    mask = torch.ones_like(segments, dtype=torch.bool) if mask is None else mask
    changes = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    segments = changes.long().cumsum(1)
    lengths = torch.zeros(segments.shape[0], int(segments.max()) + 1, dtype=torch.long, device=segments.device)
    lengths.scatter_add_(1, segments, mask.long())
    room = -(-(lengths + factor - 1) // factor) * factor
    starts = room.cumsum(1) - room
    count = mask.long().cumsum(1)
    before = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).gather(1, segments)
    position = (count - 1 - before).clamp_min(0)
    slots = int(room.sum(1).max())
    layout = _layout(mask, starts.gather(1, segments) + position, slots)
    # The last sequence that begins at or before a slot; empty ones share their start with the next.
    places = torch.arange(slots, device=segments.device).expand(segments.shape[0], -1).contiguous()
    layout.segments = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    layout.positions = places - starts.gather(1, layout.segments)
    return layout


def _layout(mask, slot, slots):
    """Layout from the slot of each token; padding goes to an extra slot, which is removed."""
    batch, seq = mask.shape
    to = torch.where(mask, slot, slots)
    take = torch.zeros(batch, slots + 1, dtype=torch.long, device=mask.device)
    take = take.scatter(1, to, torch.arange(seq, device=mask.device).expand(batch, -1))[:, :slots]
    real = torch.zeros(batch, slots + 1, dtype=torch.bool, device=mask.device).scatter(1, to, mask)[:, :slots]
    return TokenLayout(take, real, slot.clamp_max(slots - 1), mask)


__all__ = ["TokenLayout", "packed_layout", "pad_layout"]
