"""The rows of one forward pass as LEAP's mixers get them: pads weigh nothing in a mean, but must not take places either."""

from dataclasses import dataclass, replace

import torch
from transformers.utils.import_utils import is_tracing

from ..common.packing import last_run
from ..common.token_layout import TokenLayout, pad_layout


@dataclass
class MixingRows:
    """What mixers need to know of pads, packed sequences and positions.

    Attributes:
        padding_mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token.
        rotary (`tuple[torch.Tensor, torch.Tensor]`, *optional*): cosines and sines `[1 or batch, seq, head_dim]`.
        layout (`TokenLayout`, *optional*): how the attributes above are laid out, and mixers are to lay out their input.
        lengths (`torch.LongTensor` of shape `[batch]`, *optional*): real tokens of each row, where pads behind them must
            not enter the state.
    """

    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    layout: TokenLayout | None = None
    lengths: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MixingRows":
        """The same on another device: where layers are spread over devices, accelerate asks it of their arguments."""
        rotary = None if self.rotary is None else tuple(part.to(device) for part in self.rotary)
        names = ("padding_mask", "segment_ids", "layout", "lengths")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return replace(self, rotary=rotary, **moved)


def lay_out(
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    has_initial_state: bool,
    output_final_state: bool,
) -> MixingRows:
    """Rows in which no pad stands between real tokens, between them and the state before, or leaves a trace in the next.

    Args:
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segment_ids, rotary: as attributes of `MixingRows`, in the order of the input.
        has_initial_state (`bool`): whether a state comes before the first token.
        output_final_state (`bool`): whether one is taken after the last.
    """
    if mask is None or not (is_tracing(mask) or _pads_matter(mask, has_initial_state, output_final_state)):
        return MixingRows(mask, segment_ids, rotary)
    lengths, layout, real = mask.sum(1), None, mask
    last = None if segment_ids is None else last_run(segment_ids, mask).clamp_min(0)
    if is_tracing(mask) or (mask[:, 1:] & ~mask[:, :-1]).any() or (~mask[:, 0] & mask.any(1)).any():
        layout = pad_layout(mask)
        real = layout.real
        segment_ids = None if segment_ids is None else segment_ids.gather(1, layout.take)
        if rotary is not None:
            rotary = tuple(layout.align(x.expand(len(mask), -1, -1)) for x in rotary)
    segment_ids = None if segment_ids is None else torch.where(real, segment_ids, last)
    return MixingRows(real, segment_ids, rotary, layout, lengths)


def _pads_matter(mask, has_initial_state, output_final_state):
    if has_initial_state:
        return True
    pieces = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return (pieces > 1).any() or (output_final_state and (mask.any(1) & ~mask[:, -1]).any())


__all__ = ["MixingRows", "lay_out"]
