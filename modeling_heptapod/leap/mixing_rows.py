"""Rows of one forward pass for LEAP's mixers: pads have no weight in a mean, and must take no places in windows."""

from dataclasses import dataclass

import torch
from transformers.utils.import_utils import is_tracing

from ..common.packing import last_run
from ..common.token_layout import TokenLayout, pad_layout


@dataclass
class MixingRows:
    """Pads, packed sequences and positions of the rows of a forward pass.

    Attributes:
        padding_mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token.
        rotary (`tuple[torch.Tensor, torch.Tensor]`, *optional*): cosines and sines `[1 or batch, seq, head_dim]`.
        layout (`TokenLayout`, *optional*): layout of the attributes above, in which mixers bring their input.
        lengths (`torch.LongTensor` of shape `[batch]`, *optional*): number of real tokens of each row, if pads follow them
            that must not enter the state.
    """

    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    layout: TokenLayout | None = None
    lengths: torch.Tensor | None = None


def lay_out(
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    has_initial_state: bool,
    output_final_state: bool,
) -> MixingRows:
    """Rows with all pads behind the real tokens, if pads would otherwise affect means or states.

    Args:
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segment_ids, rotary: as attributes of `MixingRows`, in the order of the input.
        has_initial_state (`bool`): whether there is a state before the first token.
        output_final_state (`bool`): whether the state after the last token is used.
    """
    if mask is None or not (is_tracing(mask) or _pads_matter(mask, has_initial_state, output_final_state)):
        return MixingRows(mask, segment_ids, rotary)
    lengths, layout, real = mask.sum(1), None, mask
    if is_tracing(mask) or (mask[:, 1:] & ~mask[:, :-1]).any() or (~mask[:, 0] & mask.any(1)).any():
        layout = pad_layout(mask)
        real = layout.real
        if rotary is not None:
            cos, sin = (layout.align(x.expand(len(mask), -1, -1)) for x in rotary)
            rotary = cos, sin
    if segment_ids is not None:
        taken = segment_ids if layout is None else segment_ids.gather(1, layout.take)
        segment_ids = torch.where(real, taken, last_run(segment_ids, mask).clamp_min(0))
    return MixingRows(real, segment_ids, rotary, layout, lengths)


def _pads_matter(mask, has_initial_state, output_final_state):
    if has_initial_state:
        return True
    pieces = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return (pieces > 1).any() or (output_final_state and (mask.any(1) & ~mask[:, -1]).any())


__all__ = ["MixingRows", "lay_out"]
