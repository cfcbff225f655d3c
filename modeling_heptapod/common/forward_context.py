"""The context of a forward pass: what every layer reads about its rows, made once by the model."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from transformers.utils.import_utils import is_tracing

from .cache_utils import CountingCacheMixin
from .model_inputs import check_past_mask, check_position_ids, mask_of_new_tokens, token_mask
from .packing import next_positions
from .packing import segment_ids as find_segments


_Context = TypeVar("_Context", bound="ForwardContext")


@dataclass
class ForwardContext:
    """What all layers of one forward pass read about its rows. Families add fields; layers do not change any.

    Attributes:
        padding_mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which of the new tokens are real, `None` where
            all are.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each new token, `None` where
            each row is one sequence.
        past_lengths (`int`, `list[int]`, or `torch.LongTensor` of shape `[]` or `[batch]`): real tokens of each row before
            the new ones.
        position_ids (`torch.LongTensor` of shape `[1 or batch, seq]`, *optional*): positions of the new tokens.
        output_attentions (`bool`): whether layers return their attention weights.
    """

    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    past_lengths: Any = 0
    position_ids: torch.Tensor | None = None
    output_attentions: bool = False

    @classmethod
    def from_inputs(
        cls: type[_Context],
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: CountingCacheMixin | None = None,
    ) -> _Context:
        """Check the inputs that describe the rows, and make the context from them.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`): embeddings of the new tokens.
            attention_mask (`torch.Tensor` of shape `[batch, seq or past + seq]`, *optional*): 0 at pads.
            position_ids, seq_idx, cu_seq_lens_q: see `segment_ids` in `packing.py`.
            cache (`CountingCacheMixin`, *optional*): the cache that the pass continues, with at least one token.

        Raises:
            TypeError, ValueError: for masks, positions and sequences that do not fit the rows or the cache.
        """
        batch, seq, _ = inputs_embeds.shape
        check_position_ids(position_ids, batch, seq)
        past = 0 if cache is None else cache.lengths()
        mask = token_mask(attention_mask, inputs_embeds, 0 if cache is None else cache.get_seq_length())
        if cache is not None and not cache.packed and (mask is not None or cache.rows_differ):
            check_past_mask(attention_mask, seq, past)
        mask = mask_of_new_tokens(mask, seq)
        continued = None if cache is None else past
        segments = find_segments(inputs_embeds, mask, position_ids, seq_idx, cu_seq_lens_q, continued)
        return cls(padding_mask=mask, segment_ids=segments, past_lengths=past, position_ids=position_ids)

    def advance(self, cache: CountingCacheMixin, seq: int, device: torch.device) -> None:
        """Count the `seq` new tokens in `cache`. A model calls it after its last layer, on the device of which they are."""
        mask, segments, positions = self.padding_mask, self.segment_ids, None
        if mask is not None or segments is not None or cache.rows_differ:
            # Before the cache counts, because a static one changes `past_lengths` in place.
            positions = next_positions(segments, mask, seq, self.past_lengths)
        cache.advance(seq, device)
        if isinstance(positions, torch.Tensor):
            cache.follow(positions)
        if segments is not None and not is_tracing(segments):
            cache.packed = True

    def to(self, device: torch.device) -> "ForwardContext":
        """The same with all tensors on `device`. Accelerate calls it where layers are spread over devices."""
        return _to_device(self, device)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(part, device) for part in value)
    if isinstance(value, dict):
        return {name: _to_device(part, device) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{x.name: _to_device(getattr(value, x.name), device) for x in fields(value)})
    return value.to(device) if hasattr(value, "to") else value


__all__ = ["ForwardContext"]
