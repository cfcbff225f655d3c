"""LEAP's mixing step as modules: rows and cached states in, running means, rows and states out.

`RunningMeanMixer` has what all mixers share. `FocusMixing` is the mixing step itself, without weights: `LeapMixer` projects
hidden states to its inputs, MultiGrid's LEAP core passes it the projections of all its streams.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..common.transformers_versions import CACHE
from .configuration_leap import LeapConfig
from .focus import attention_matrix, focus_mean, focus_mixing, mix_with_means, token_state
from .focus_cpu import step as native_step
from .focus_functions import FocusSettings
from .focus_recurrent import (
    gate_output,
    pack_state,
    prepare_step,
    state_of_rows,
    step_global_mean,
    step_window_mean,
    unpack_state,
)
from .focus_triton import step as triton_step
from .mixing_rows import MixingRows
from .running_mean import FocusState


def get_alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi's slopes (arXiv 2108.12409), by which log weights decrease per token of distance: `[num_heads]`."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)


class RunningMeanMixer(nn.Module):
    """Base class of mixers: settings, ALiBi slopes, the layout of rows, and states in a cache.

    Args:
        config (`LeapConfig`): of the model.
        layer_idx (`int`): layer of the model, and of the cache.
    """

    alibi_slopes: torch.Tensor | None

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__()
        assert config.output_gate is not None and config.window_sizes is not None  # for type checkers
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        scale = self.head_dim**-0.5 if config.rescale is None else config.rescale / self.head_dim
        self.settings = FocusSettings(
            scale=scale,
            normalize=config.rescale is not None,
            weight_function=config.weight_function,
            output_gate=config.output_gate,
            window=config.window_sizes[layer_idx],
            sink_weight=config.sink_weight,
        )
        self.two_sided = replace(self.settings, causal=False)  # made here, because forward passes are compiled
        alibi_slopes = get_alibi_slopes(self.num_heads) if config.position_embedding_type == "alibi" else None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def forward(
        self,
        inputs: torch.Tensor,
        past_key_values: Cache | None = None,
        rows: MixingRows | None = None,
        is_causal: bool = True,
        single_step: bool = False,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix each position with its window.

        Args:
            inputs (`torch.Tensor` of shape `[batch, seq, width]`).
            past_key_values (`Cache`, *optional*): holds the state before the first token, and then the one after the last.
            rows (`MixingRows`, *optional*): pads, packed sequences and positions.
            is_causal (`bool`): whether a position sees only itself and its past.
            single_step (`bool`): whether this is one real token after cached ones, without gradients.
            output_attentions (`bool`, *optional*): whether to return what `attention_matrix` needs.

        Returns:
            Output `[batch, seq, hidden_size]` and, if requested, attentions `[batch, heads, seq, 2]`.
        """
        rows = MixingRows() if rows is None else rows
        context = rows, past_key_values, is_causal, single_step, output_attentions
        if rows.layout is None:
            return self._mix(inputs, *context)
        out, attentions = self._mix(rows.layout.align(inputs), *context)
        if attentions is not None:
            flat = rows.layout.restore(attentions.transpose(1, 2).flatten(2))
            attentions = flat.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            attentions = self._without_pads(attentions, rows.layout.given)
        return rows.layout.restore(out), attentions

    def _mix(self, inputs, rows, cache, is_causal, single_step, output_attentions):
        """The result of `forward` for rows without pads between tokens."""
        raise NotImplementedError

    @staticmethod
    def _without_pads(attentions, mask):
        """`attentions [batch, heads, seq, 2]` with log weights of `-inf` at pads."""
        raise NotImplementedError

    def attention_matrix(
        self,
        attentions: torch.Tensor,
        is_causal: bool = True,
        segment_ids: torch.Tensor | None = None,
        positions: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Token-to-token attention of this layer from its entry in the `attentions` of a forward pass.

        Args:
            attentions (`torch.Tensor` of shape `[batch, heads, seq, 2]`): of a forward pass without a cached past.
            is_causal (`bool`): as in the forward pass.
            segment_ids (`torch.Tensor` of shape `[batch, seq]`, *optional*): of packed rows.
            positions (`torch.LongTensor` of shape `[rows]`, *optional*): tokens whose rows to compute. All by default,
                which is quadratic in length.

        Returns:
            `torch.Tensor`: the docstring of each mixer gives shape and meaning.
        """
        raise NotImplementedError

    def _dropout(self, x):
        return nn.functional.dropout(x, self.attention_dropout, self.training)

    def packed_state(self, cache: Cache, state_idx: int = 0) -> Any:
        """The state of this layer in a cache, a `torch.Tensor` as of `pack_state`, or `None` before the first token."""
        read = cache.get_recurrent_state if self.settings.window is None else cache.get_conv_state
        return read(self.layer_idx, state_idx)

    def _read_state(self, cache, state_idx=0):
        packed = None if cache is None else self.packed_state(cache, state_idx)
        return None if packed is None else unpack_state(packed, self.settings, self.num_heads, self.head_dim)

    def _write_state(
        self,
        state: FocusState | None,
        past: FocusState | None,
        tokens: Callable[[torch.Tensor], FocusState],
        seq: int,
        rows: MixingRows,
        cache: Cache,
        state_idx: int = 0,
    ):
        """Write the state after `seq` more tokens to the cache; `past` and `tokens` are those of `state_of_rows`."""
        if state is None:
            raise ValueError(
                f"`use_cache` must be False and `{CACHE}` left out where `torch.export` leaves sizes open or `torch.func` is at "
                "work: there LEAP's mixing leaves no state."
            )
        state = state_of_rows(
            state, past, self.settings, self.alibi_slopes, seq, rows.lengths, rows.segment_ids, tokens
        )
        packed = pack_state(state, self.settings, self.head_dim, cache.get_seq_length() + seq)
        write = cache.update_recurrent_state if self.settings.window is None else cache.update_conv_state
        write(packed, self.layer_idx, state_idx)

    def _step_mean(self, logits, token, cache, state_idx=0):
        """Means after one more token `[batch, parts, heads, head_dim]`, which is added to the cached state."""
        if self.settings.window is None:
            return step_global_mean(
                logits, token, self.packed_state(cache, state_idx), self.settings, self.alibi_slopes
            )
        push = partial(cache.update_conv_state, layer_idx=self.layer_idx, state_idx=state_idx)
        return step_window_mean(logits, token, push, self.settings, self.alibi_slopes)

    def _mean(self, logs, values, rows, cache, is_causal, state_idx=0):
        """Means of `values [batch, seq, heads, channels]` by `logs [batch, seq, heads]`, continued from the cache."""
        past, settings = self._read_state(cache, state_idx), self.settings if is_causal else self.two_sided
        means, state = focus_mean(logs, values, settings, self.alibi_slopes, None, rows.segment_ids, past)
        if cache is not None:
            tokens = partial(self._tokens_of_mean, logs.detach(), values.detach())
            self._write_state(state, past, tokens, values.shape[1], rows, cache, state_idx)
        return means

    @staticmethod
    def _tokens_of_mean(logs, values, places):
        """Log weights and values at `places [batch, count]`, as a windowed state holds them."""
        batch = torch.arange(len(places), device=places.device).unsqueeze(1)
        dtype = torch.promote_types(values.dtype, torch.float32)
        return FocusState(*(x[batch, places].to(dtype).transpose(1, 2) for x in (logs, values)))


class FocusMixing(RunningMeanMixer):
    """LEAP's mixing step `sigmoid(scale * q_i . kbar_i) * vbar_i` without weights, see `focus.py`.

    Its inputs are queries, focus, keys and values of all heads, `[batch, seq, parts * hidden_size]`. With
    `output_gate="none"` there are no queries, so there are 3 parts instead of 4.

    Its `attentions` are `[batch, heads, seq, 2]`: log focus weights (`-inf` at pads) and output gates. Its
    `attention_matrix` `[batch, heads, seq, seq]` times the (standardised) values is the mixer's output.
    """

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_parts = 3 if config.output_gate == "none" else 4

    def _project(self, inputs):
        return inputs

    def _mix(self, inputs, rows, cache, is_causal, single_step, output_attentions):
        batch, seq, _ = inputs.shape
        qfkv = self._project(inputs).view(batch, seq, self.num_parts, self.num_heads, self.head_dim)
        attentions = None
        if output_attentions or (self.training and self.attention_dropout > 0):
            out, attentions = self._mix_eager(qfkv, rows, cache, is_causal)
        elif single_step:
            out = self._step(qfkv, cache, rows.rotary)
        else:
            past, settings = self._read_state(cache), self.settings if is_causal else self.two_sided
            masks = rows.padding_mask, rows.segment_ids
            out, state = focus_mixing(qfkv, settings, self.alibi_slopes, rows.rotary, *masks, past)
            if cache is not None:
                self._write_state(state, past, partial(self._tokens, qfkv, rows), seq, rows, cache)
        return out.reshape(batch, seq, -1), attentions if output_attentions else None

    def _tokens(self, qfkv, rows, places):
        """Log weights and values at `places [batch, count]`, as a windowed state holds them."""
        batch, rotary = torch.arange(len(places), device=places.device).unsqueeze(1), rows.rotary
        mask = None if rows.padding_mask is None else rows.padding_mask.gather(1, places)
        if rotary is not None:
            rotary = tuple(x.expand(len(places), -1, -1)[batch, places] for x in rotary)
        return token_state(qfkv[batch, places], self.settings, rotary, mask)

    def _step(self, qfkv, cache, rotary):
        """Output of one token, which is added to the cached state."""
        step = triton_step if qfkv.is_cuda else native_step
        out = step(qfkv, self.settings, self.alibi_slopes, rotary, self.packed_state(cache))
        if out is not None:
            return out
        parts, logits = prepare_step(qfkv, self.settings, rotary)
        means = self._step_mean(logits, parts[:, 2:], cache)
        if self.num_parts == 4:
            means = gate_output(parts[:, 0], means[:, 0], means[:, 1], self.settings)
        return means.to(qfkv.dtype)

    def _mix_eager(self, qfkv, rows, cache, is_causal):
        """The same step in differentiable operations, with dropout inside and attentions as a result."""
        precise = qfkv.to(torch.promote_types(qfkv.dtype, torch.float32))
        means = partial(self._mean, rows=rows, cache=cache, is_causal=is_causal)
        out, logs, gate = mix_with_means(precise, self.settings, means, rows.rotary, rows.padding_mask, self._dropout)
        return out.to(qfkv.dtype), torch.stack((logs, gate), dim=-1).transpose(1, 2)

    @staticmethod
    def _without_pads(attentions, mask):
        logs, gate = attentions.unbind(-1)
        return torch.stack((logs.masked_fill(~mask.unsqueeze(1), -torch.inf), gate), dim=-1)

    def attention_matrix(self, attentions, is_causal=True, segment_ids=None, positions=None):
        logs, gate = attentions.unbind(-1)
        gate = gate if positions is None else gate[..., positions]
        settings = replace(self.settings, causal=is_causal)
        return gate.unsqueeze(-1) * attention_matrix(logs, settings, self.alibi_slopes, segment_ids, positions)


__all__ = ["FocusMixing", "RunningMeanMixer", "get_alibi_slopes"]
