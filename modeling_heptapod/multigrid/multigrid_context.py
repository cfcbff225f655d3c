"""The context of a MultiGrid's forward pass: what the layers read about pads, packed sequences and positions."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from ..common.forward_context import ForwardContext
from ..common.model_inputs import (
    check_position_ids,
    count_positions,
    has_dynamic_shapes,
    mask_of_new_tokens,
    token_mask,
)
from ..common.packing import segment_ids as find_segments
from ..common.transformers_versions import CACHE
from ..leap.mixing_rows import MixingRows, lay_out
from .configuration_multigrid import MultiGridConfig
from .multigrid_cache import MultiGridCache, StaticMultiGridCache


@dataclass
class MultiGridContext(ForwardContext):
    """What all layers of one forward pass read about its rows.

    Attributes:
        is_first (`bool`): whether no cached tokens come before the new ones.
        token_mask (`torch.BoolTensor` of shape `[batch, past + seq]`, *optional*): which of all tokens so far are real
            (core "transformer"). With a static cache that is continued `[batch, max_cache_len]`.
        attention_mask (*optional*): what each token attends to, in the form that the attention implementation takes; `None`
            for all tokens up to itself (core "transformer").
        flash_kwargs (`FlashAttentionKwargs`, *optional*): boundaries of packed sequences for flash attention.
        mixing_rows (`MixingRows`, *optional*): pads, packed sequences and positions (core "leap").
        single_step (`bool`): whether the pass is one real token after cached ones, without gradients (core "leap").
        lstm_rows (`LSTMRows`, *optional*): how pads and packed sequences are laid out (core "lstm").
    """

    is_first: bool = True
    token_mask: torch.Tensor | None = None
    attention_mask: object | None = None
    flash_kwargs: FlashAttentionKwargs | None = None
    mixing_rows: MixingRows | None = None
    single_step: bool = False
    lstm_rows: "LSTMRows | None" = None

    @classmethod
    def for_attention(cls, embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cache) -> "MultiGridContext":
        """As `from_inputs`, for the core "transformer": cached tokens can still be masked.

        Raises:
            TypeError, ValueError: what `from_inputs` raises, and for a cache of packed sequences.
        """
        batch, seq, _ = embeds.shape
        check_position_ids(position_ids, batch, seq)
        past = 0 if cache is None else cache.get_seq_length()
        mask = token_mask(attention_mask, embeds, past)
        new = mask_of_new_tokens(mask, seq)
        if cache is not None and cache.packed:
            raise ValueError(
                f"`{CACHE}` holds packed sequences, and with core='transformer' new tokens would attend to all of them: "
                "continue from a cache of the last sequence alone."
            )
        lengths = past
        if cache is not None and (mask is not None or cache.past_mask is not None):
            covers_past = attention_mask is not None and attention_mask.shape[1] > seq
            mask = _whole_mask(cache, attention_mask if covers_past else mask, embeds, past)
            lengths = mask.sum(1) - (seq if new is None else new.sum(1))
        continued = None if cache is None else lengths
        segments = find_segments(embeds, new, position_ids, seq_idx, cu_seq_lens_q, continued)
        return cls(new, segments, lengths, position_ids, token_mask=mask)


def make_context(
    config: MultiGridConfig,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cache: MultiGridCache | StaticMultiGridCache | None,
    output_attentions: bool,
    rotary_emb: nn.Module | None,
) -> MultiGridContext:
    """The context of one forward pass.

    Args:
        config (`MultiGridConfig`): of the model.
        embeds (`torch.Tensor` of shape `[batch, seq, hidden_size]`): embeddings of the main axis.
        attention_mask, position_ids, seq_idx, cu_seq_lens_q: arguments of the forward pass.
        cache (`MultiGridCache` or `StaticMultiGridCache`, *optional*): cache that the pass continues or fills.
        output_attentions (`bool`): whether layers return their attention weights.
        rotary_emb (`nn.Module`, *optional*): rotary embedding of the core "leap".

    Raises:
        TypeError, ValueError: for arguments that do not fit the rows, the cache or the attention implementation.
    """
    if cache is not None:
        cache.check_room(embeds.shape[1])
    continued = cache if cache is not None and cache.has_tokens else None
    make = MultiGridContext.for_attention if config.core == "transformer" else MultiGridContext.from_inputs
    context = make(embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q, continued)
    context.is_first, context.output_attentions = continued is None, output_attentions
    mask, segments = context.padding_mask, context.segment_ids
    if config.core == "lstm":
        context.lstm_rows = None if mask is None and segments is None else LSTMRows(mask, segments)
        return context
    if position_ids is None:
        context.position_ids = count_positions(embeds, mask, segments, context.past_lengths)
    if config.core == "transformer":
        return context
    assert rotary_emb is not None  # for type checkers
    precise = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    rotary = rotary_emb(precise, context.position_ids)
    context.mixing_rows = lay_out(mask, segments, rotary, not context.is_first, cache is not None)
    is_step = embeds.shape[1] == 1 and not context.is_first
    context.single_step = is_step and mask is None and not torch.is_grad_enabled()
    return context


def add_causal_mask(
    context: MultiGridContext,
    config: MultiGridConfig,
    embeds: torch.Tensor,
    cache: MultiGridCache | StaticMultiGridCache | None,
) -> None:
    """Set `attention_mask` and `flash_kwargs`, as the attention implementation of layers takes them.

    Args:
        context, config, embeds, cache: of `make_context`.

    Raises:
        ValueError: for pads in packed rows with flash attention.
    """
    cache = None if context.is_first else cache
    mask, segments = context.token_mask, context.segment_ids
    if context.output_attentions and config._attn_implementation != "eager":
        config = copy.copy(config)
        config._attn_implementation = "eager"
    is_causal = mask is None and segments is None and (cache is None or embeds.shape[1] == 1)
    if is_causal and not has_dynamic_shapes(embeds) and config._attn_implementation != "flex_attention":
        return  # flex attention attends to everything without a mask, others only to the past
    if segments is not None and is_flash_attention_requested(config):
        if mask is not None:
            raise ValueError(
                "`attention_mask` must be 1 everywhere in packed rows with flash attention, got pads: leave them out, or "
                'use `attn_implementation="sdpa"`.'
            )
        context.flash_kwargs = _flash_kwargs(segments)
        return
    if cache is not None and cache.max_cache_len is not None and is_flash_attention_requested(config):
        assert mask is not None  # for type checkers: a static cache has one
        # Of the keys that it may take, because it counts from their end.
        mask = mask[:, : int(cache.seen_tokens) + embeds.shape[1]]
    context.attention_mask = create_causal_mask(
        config,
        inputs_embeds=embeds,
        attention_mask=mask,
        and_mask_function=None if segments is None else packed_sequence_mask_function(segments),
        layer_idx=0,
        **{CACHE: cache},  # type: ignore[arg-type]
    )


def _flash_kwargs(segments):
    """Boundaries of the packed sequences of all rows, one row after the other."""
    first = torch.arange(len(segments), device=segments.device).unsqueeze(1) * segments.shape[1]
    lengths = (first + segments).flatten().unique_consecutive(return_counts=True)[1]
    ends, longest = nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
    # Flash attention takes int32, while its annotation is of int64.
    return FlashAttentionKwargs(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)  # type: ignore[typeddict-item]


def _whole_mask(cache, mask, main, past):
    """Which of all tokens so far are real, from the mask of a cache and one of all or of the new tokens, or `None`.

    In a static cache there are places for later tokens, too: `False`.
    """
    batch, seq, _ = main.shape
    past_mask, room = cache.past_mask, cache.max_cache_len
    if past_mask is None:
        past_mask = main.new_ones(batch, past, dtype=torch.bool)
    if mask is None or mask.shape[1] == seq:
        new = main.new_ones(batch, seq, dtype=torch.bool) if mask is None else mask
        if room is None:
            return torch.cat((past_mask, new), dim=1)
        return past_mask.index_copy(1, past + torch.arange(seq, device=new.device), new)
    mask = mask.bool()
    old = mask[:, :-seq]
    if not is_tracing(mask) and (old & ~past_mask[:, : old.shape[1]]).any():
        raise ValueError(
            f"`attention_mask` keeps tokens that were pads when `{CACHE}` was filled: it must be 0 there, too."
        )
    return mask if room is None else nn.functional.pad(mask, (0, room - mask.shape[1]))


class LSTMRows:
    """Padded and packed rows as one row for each sequence, without pads.

    Args:
        padding_mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which tokens are real.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token. Equal values
            that do not touch are different sequences.
    """

    def __init__(self, padding_mask: torch.Tensor | None, segment_ids: torch.Tensor | None):
        if segment_ids is None:
            assert padding_mask is not None  # for type checkers: one of both is given
            runs = torch.zeros_like(padding_mask, dtype=torch.long)
        else:
            runs = nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)).long().cumsum(1)
        (batch, seq), device = runs.shape, runs.device
        if padding_mask is None:
            self.tokens = torch.arange(batch * seq, device=device)  # real ones, in a flat batch
        else:
            self.tokens = padding_mask.flatten().nonzero().squeeze(1)
        rows = torch.arange(batch, device=device).unsqueeze(1)
        names = (rows * seq + runs).flatten()[self.tokens]
        _, self.sequence, counts = names.unique_consecutive(return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.place = torch.arange(len(self.tokens), device=device) - starts[self.sequence]
        self.lengths = counts.tolist()
        self.row = self.tokens[starts] // seq  # of each sequence
        last = torch.searchsorted(self.row, rows.squeeze(1), right=True) - 1
        self.last = last.clamp_min(0)  # sequence of each row
        self.has_tokens = (last >= 0) & (torch.bincount(self.row, minlength=batch) > 0)

    def to(self, device: torch.device) -> "LSTMRows":
        """The same on another device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def run(self, lstm: nn.LSTM, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]):
        """Run `lstm` on `x [batch, seq, width]` from `state`, two tensors `[1, batch, width]`. Outputs at pads are zero."""
        out = x.new_zeros(x.shape[0] * x.shape[1], lstm.hidden_size)
        if not self.lengths:
            return out.unflatten(0, x.shape[:2]), state
        take = self.tokens.new_zeros(len(self.lengths), max(self.lengths))
        take[self.sequence, self.place] = self.tokens
        packed = nn.utils.rnn.pack_padded_sequence(
            x.flatten(0, 1)[take], torch.tensor(self.lengths), batch_first=True, enforce_sorted=False
        )
        packed, final = lstm(packed, tuple(part[:, self.row] for part in state))
        rows, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        out = out.index_copy(0, self.tokens, rows[self.sequence, self.place])
        has_tokens = self.has_tokens.unsqueeze(-1)
        final = tuple(torch.where(has_tokens, new[:, self.last], old) for new, old in zip(final, state))
        return out.unflatten(0, x.shape[:2]), final


__all__ = ["LSTMRows", "MultiGridContext", "add_causal_mask", "make_context"]
