"""The mixers of MultiGrid: attention, LEAP's running means, or an LSTM, for all streams of a layer at once.

A core makes the weights of one mixer (`self_mixer`, `cross_mixer`) and runs many of them (`mix`). Streams of equal width are
stacked in a `Group`, `[streams, batch, seq, width]`, with one mixer each. Weights are plain `nn.Linear` modules, so that
adapters and quantisation find them. `grouped_linear` multiplies several at once where none was replaced.
"""

from contextlib import nullcontext
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common.cache_checks import LayerStates
from ..common.eager_attention import eager_attention
from ..common.model_inputs import has_dynamic_shapes
from ..leap.configuration_leap import LeapConfig
from ..leap.leap_mixing import FocusMixing
from ..leap.recurrent_cache import mixing_states
from .configuration_multigrid import MultiGridConfig
from .multigrid_cache import MultiGridCache, StaticMultiGridCache
from .multigrid_context import MultiGridContext


_BATCHED_ROWS = 256  # with fewer rows, stacking the weights costs more than a batched product saves


class Group(NamedTuple):
    """Mixers of equal shape and their normalised streams.

    Attributes:
        mixers (`list[nn.Module]`): one for each stream.
        own (`torch.Tensor` of shape `[streams, batch, seq, width]`): the streams that are changed.
        other (`torch.Tensor` of shape `[streams, batch, seq, other_width]`, *optional*): the streams they read, in cross
            blocks.
    """

    mixers: list[nn.Module]
    own: torch.Tensor
    other: torch.Tensor | None = None


def _is_plain(linear):
    """Whether a linear layer has no adapter, no hook, and no quantised or sharded weight."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    hooked = hooked or "forward" in vars(linear)  # replaced by accelerate and others
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not hooked


def grouped_linear(linears: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
    """One linear layer for each stream: `[streams, batch, seq, in] -> [streams, batch, seq, out]`.

    In training one batched product. In inference one product each, with results that do not depend on the number of streams
    to the last bit.
    """
    if len(linears) == 1:
        return linears[0](x[0]).unsqueeze(0)
    one_each = not torch.is_grad_enabled() or has_dynamic_shapes(x) or not all(map(_is_plain, linears))
    if one_each or x[0, ..., 0].numel() < _BATCHED_ROWS:
        return torch.stack([linear(part) for linear, part in zip(linears, x)])
    weight = torch.stack([linear.weight for linear in linears]).transpose(1, 2)
    if linears[0].bias is None:
        out = torch.bmm(x.flatten(1, 2), weight)
    else:
        bias = torch.stack([linear.bias for linear in linears]).unsqueeze(1)
        out = torch.baddbmm(bias, x.flatten(1, 2), weight)
    return out.unflatten(1, x.shape[1:3])


def grouped_norm(norms: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """One norm for each stream `[streams, batch, seq, width]`."""
    if len(norms) == 1:
        return norms[0](x[0]).unsqueeze(0)
    return torch.stack([norm(part) for norm, part in zip(norms, x)])


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """`[streams, batch, seq, ..., heads, head_dim]` -> `[batch, seq, ..., streams * heads, head_dim]`."""
    return x.movedim(0, -3).flatten(-3, -2)


def split_heads(x: torch.Tensor, groups: list[Group], heads: list[int]) -> list[torch.Tensor]:
    """Concatenated heads of all groups `[batch, seq, heads, head_dim]` -> `[streams, batch, seq, width]` for each group."""
    parts = x.split([len(group.mixers) * count for group, count in zip(groups, heads)], dim=2)
    return [part.unflatten(2, (-1, count)).movedim(2, 0).flatten(3) for part, count in zip(parts, heads)]


class _Core(nn.Module):
    """Base class of cores.

    Args:
        config (`MultiGridConfig`): of the model.
        layer_idx (`int`): index of its layer in the cache.

    Attributes:
        self_mixer (`type`): weights with which a stream reads its own past, made from its width.
        cross_mixer (`type`): weights with which a stream reads another one, made from both widths and the number of
            channels between them.
    """

    self_mixer: ClassVar[type[nn.Module]]
    cross_mixer: ClassVar[type[nn.Module]]

    def __init__(self, config: MultiGridConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross = layer_idx >= config.num_hidden_layers
        axis_heads = config.num_axes * config.axis_num_attention_heads
        self.num_heads = 2 * axis_heads if self.is_cross else config.num_attention_heads + axis_heads

    def mix(
        self, groups: list[Group], context: MultiGridContext, cache: MultiGridCache | StaticMultiGridCache | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Mix the streams of all groups.

        Returns:
            What is added to each stream, `[streams, batch, seq, width]` for each group, and attention weights
            `[batch, all heads, seq, keys]` with `context.output_attentions` and core "transformer", else `None`.
        """
        raise NotImplementedError

    def cache_states(self, cache: MultiGridCache | StaticMultiGridCache) -> LayerStates:
        """Expected states of its layer of `cache`."""
        raise NotImplementedError


class _SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)


class _CrossAttention(nn.Module):
    def __init__(self, width, other_width, inner):
        super().__init__()
        self.q_proj = nn.Linear(width, inner)
        self.kv_proj = nn.Linear(other_width, 2 * inner)
        self.o_proj = nn.Linear(inner, width)


class TransformerCore(_Core):
    """Causal attention. The heads of all streams are those of one attention."""

    self_mixer, cross_mixer = _SelfAttention, _CrossAttention
    is_causal = True

    def mix(self, groups, context, cache):
        parts = [self._project(group) for group in groups]
        query, key, value = (torch.cat([join_heads(x) for x in xs], dim=2).transpose(1, 2) for xs in zip(*parts))
        if cache is not None:
            cached = cache.update(key, value, self.layer_idx)
            # The first tokens attend to themselves: a static cache returns all of its memory.
            key, value = (key, value) if context.is_first else cached
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = (eager_attention if context.output_attentions else attention)(
            self,
            query,
            key,
            value,
            context.attention_mask,
            scaling=self.config.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **(context.flash_kwargs or {}),
        )
        outs = split_heads(out, groups, [part[0].shape[3] for part in parts])
        outs = [grouped_linear([m.o_proj for m in group.mixers], out) for group, out in zip(groups, outs)]
        return outs, weights if context.output_attentions else None

    def cache_states(self, cache):
        is_static = cache.max_cache_len is not None
        shape = (self.num_heads, cache.max_cache_len if is_static else cache.seen_tokens, self.config.head_dim)
        return LayerStates("full_attention", {("keys", None): shape, ("values", None): shape}, is_static=is_static)

    def _project(self, group):
        """Queries, keys and values `[streams, batch, seq, heads, head_dim]`."""
        head_dim = self.config.head_dim
        if group.other is None:
            qkv = grouped_linear([m.qkv_proj for m in group.mixers], group.own)
            return qkv.unflatten(-1, (3, -1, head_dim)).unbind(3)
        query = grouped_linear([m.q_proj for m in group.mixers], group.own).unflatten(-1, (-1, head_dim))
        key_value = grouped_linear([m.kv_proj for m in group.mixers], group.other)
        return query, *key_value.unflatten(-1, (2, -1, head_dim)).unbind(3)


def leap_config(config: MultiGridConfig, heads: int) -> LeapConfig:
    """Config of LEAP's mixers with `heads` heads: its defaults, for the self blocks of all layers, then their cross blocks."""
    return LeapConfig(
        hidden_size=heads * config.head_dim,
        num_attention_heads=heads,
        num_hidden_layers=2 * config.num_hidden_layers,
        window_sizes=2 * config.window_sizes,
    )


class _LeapSelfMixing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qfkv_proj = nn.Linear(width, 4 * width, bias=False)


class _LeapCrossMixing(nn.Module):
    def __init__(self, width, other_width, inner):
        super().__init__()
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.fkv_proj = nn.Linear(other_width, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width)


class LeapCore(_Core):
    """LEAP's mixer on the heads of all streams. In cross blocks all parts but the queries are of the other stream."""

    self_mixer, cross_mixer = _LeapSelfMixing, _LeapCrossMixing

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mixer = FocusMixing(leap_config(config, self.num_heads), layer_idx)

    def mix(self, groups, context, cache):
        parts = [self._project(group) for group in groups]
        joined = torch.cat([join_heads(part) for part in parts], dim=3)  # [batch, seq, 4, heads, head_dim]
        out, _ = self.mixer(
            joined.flatten(2), past_key_values=cache, rows=context.mixing_rows, single_step=context.single_step
        )
        outs = split_heads(out.unflatten(-1, (-1, self.config.head_dim)), groups, [part.shape[4] for part in parts])
        for i, group in enumerate(groups):
            if group.other is not None:
                outs[i] = grouped_linear([m.o_proj for m in group.mixers], outs[i])
        return outs, None

    def cache_states(self, cache):
        window = self.config.window_sizes[self.layer_idx % self.config.num_hidden_layers]
        return mixing_states(window, self.num_heads, 2, self.config.head_dim)

    def _project(self, group):
        """Queries, focus, keys and values `[streams, batch, seq, 4, heads, head_dim]`."""
        head_dim = self.config.head_dim
        if group.other is None:
            qfkv = grouped_linear([m.qfkv_proj for m in group.mixers], group.own)
            return qfkv.unflatten(-1, (4, -1, head_dim))
        query = grouped_linear([m.q_proj for m in group.mixers], group.own)
        rest = grouped_linear([m.fkv_proj for m in group.mixers], group.other)
        return torch.cat((query, rest), dim=-1).unflatten(-1, (4, -1, head_dim))


class _LSTMSelfMixing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        # The dictionary in which it keeps its weights: graphs may hold these, but Dynamo refuses to look at an `nn.LSTM`.
        self.weights = self.lstm._parameters


class _LSTMCrossMixing(nn.Module):
    def __init__(self, width, other_width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner)
        self.value_proj = nn.Linear(other_width, inner)
        self.o_proj = nn.Linear(inner, width)


def _differentiable(lstm, x):
    """A context without cuDNN where it has no gradients: it computes those of an LSTM in training mode only."""
    if x.is_cuda and torch.is_grad_enabled() and not lstm.training:
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def lstm_step(weights, x, state):
    """What an LSTM makes of one token `[batch, 1, width]`, in operations that graphs may hold."""
    hidden, cell = (part[0] for part in state)
    gates = nn.functional.linear(x[:, 0], weights["weight_ih_l0"], weights["bias_ih_l0"])
    gates = gates + nn.functional.linear(hidden, weights["weight_hh_l0"], weights["bias_hh_l0"])
    write, keep, candidate, read = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + write.sigmoid() * candidate.tanh()
    hidden = read.sigmoid() * cell.tanh()
    return hidden.unsqueeze(1), (hidden.unsqueeze(0), cell.unsqueeze(0))


class LSTMCore(_Core):
    """An LSTM in each stream, one after the other, since recurrences with different weights have no batched form.

    The state of a stream holds its past, so a cross block reads the other stream at the same position only, through a gate.
    """

    self_mixer, cross_mixer = _LSTMSelfMixing, _LSTMCrossMixing

    def mix(self, groups, context, cache):
        if self.is_cross:
            return [self._read(group) for group in groups], None
        outs, states, offset = [], [], 0
        past = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        for group in groups:
            parts = []
            for mixer, x in zip(group.mixers, group.own):
                batch, _, width = x.shape
                if past is None:
                    state = x.new_zeros(2, 1, batch, width)
                else:
                    # A copy, since the cache is overwritten and gradients may need its values.
                    state = past[:, :, offset : offset + width].to(x.dtype).permute(1, 0, 2).unsqueeze(1)
                    state = state.clone(memory_format=torch.contiguous_format)
                offset += width
                out, state = self._run(mixer, x, tuple(state.unbind(0)), context.lstm_rows)
                parts.append(out)
                states.append(torch.cat(state))
            outs.append(parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts))
        if cache is not None:
            precise = torch.promote_types(states[0].dtype, torch.float32)
            state = torch.cat(states, dim=-1).transpose(0, 1).to(precise)  # [batch, 2, width of all]
            cache.update_recurrent_state(state, self.layer_idx)
        return outs, None

    def cache_states(self, cache):
        states = LayerStates("linear_attention", {}, precise=True)
        if not self.is_cross:  # cross blocks have none
            states.shapes["recurrent_states", 0] = (2, self.num_heads * self.config.head_dim)
        return states

    @staticmethod
    def _run(mixer, x, state, rows):
        """Outputs of `x [batch, seq, width]` and the state after it, from a state of two tensors `[1, batch, width]`."""
        if rows is None and torch.compiler.is_compiling() and x.shape[1] == 1:
            return lstm_step(mixer.weights, x, state)
        run = mixer.lstm if rows is None else partial(rows.run, mixer.lstm)
        with _differentiable(mixer.lstm, x):
            return run(x, state)

    def _read(self, group):
        gate = torch.sigmoid(grouped_linear([m.gate_proj for m in group.mixers], group.own))
        value = grouped_linear([m.value_proj for m in group.mixers], group.other)
        return grouped_linear([m.o_proj for m in group.mixers], gate * value)


CORES: dict[str, type[_Core]] = {"transformer": TransformerCore, "leap": LeapCore, "lstm": LSTMCore}

__all__ = ["CORES", "Group", "grouped_linear", "grouped_norm", "leap_config", "lstm_step"]
