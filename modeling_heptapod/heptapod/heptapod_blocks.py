"""Blocks of the Heptapod grid, in this order: attention, feed-forward, layer. The arithmetic is in `local_attention.py`."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common.model_inputs import has_dynamic_shapes
from .configuration_heptapod import HeptapodConfig
from .grid_positions import rotate
from .local_attention import attention_weights, local_attention


def cell_by_cell(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a linear layer to a page `[batch, height, width, channels]` as `[batch, cells, channels]`.

    Adapters and quantized layers of other libraries take no more than three dimensions.
    """
    return layer(x.flatten(1, -2)).view(*x.shape[:-1], -1)


class HeptapodAttention(nn.Module):
    """Attention to the neighbourhood of each cell, to the whole page, or to both by different heads.

    Heads that attend to the whole page take transformers' attention interface. It has nothing for neighbourhoods in two
    dimensions, which take `local_attention`. `output_attentions=True` and `attn_implementation="eager"` compute matrices
    `[batch, heads, cells, cells]` for all heads. Returns the output, these matrices, and the spans
    `[batch, heads, height, width]` of heads with a neighbourhood, where the config has them.
    """

    def __init__(self, config: HeptapodConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        radius, dilation = config.neighborhood(layer_idx)
        split = self.num_heads - config.num_global_heads if radius is not None else 0
        groups = (slice(0, split), radius, dilation), (slice(split, self.num_heads), None, 1)
        self.head_groups = [group for group in groups if group[0].start < group[0].stop]  # heads, radius, dilation
        self.span_proj = self.relative_position_bias = None
        if radius is not None and split:
            if config.adaptive_span:
                self.span_proj = HeptapodSpan(config.hidden_size, split)
            if config.use_relative_position_bias:
                self.relative_position_bias = nn.Parameter(torch.zeros(split, 2 * radius + 1, 2 * radius + 1))
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        padding_mask: torch.Tensor | None = None,
        global_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        qkv = self.qkv_proj(hidden_states).view(hidden_states.shape[0], *grid_size, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # [batch, heads, height, width, head_dim]
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        dropout = self.attention_dropout if self.training else 0.0
        spans = self._spans(hidden_states, grid_size)
        attentions = None
        if output_attentions or self.config._attn_implementation == "eager" or has_dynamic_shapes(hidden_states):
            parts = [
                attention_weights(q[:, at], k[:, at], radius, dilation, padding_mask, **self._adapted(radius, spans))
                for at, radius, dilation in self.head_groups
            ]
            attentions = torch.cat(parts, dim=1)
            out = nn.functional.dropout(attentions, dropout) @ v.flatten(2, 3)
            out = out.unflatten(2, grid_size)
        else:
            parts = [
                self._global_attention(q[:, at], k[:, at], v[:, at], global_mask, dropout)
                if radius is None
                else local_attention(
                    q[:, at],
                    k[:, at],
                    v[:, at],
                    radius,
                    dilation,
                    padding_mask,
                    dropout=dropout,
                    **self._adapted(radius, spans),
                )
                for at, radius, dilation in self.head_groups
            ]
            out = torch.cat(parts, dim=1)
        out = out.permute(0, 2, 3, 1, 4).reshape(hidden_states.shape)
        return self.o_proj(out), attentions if output_attentions else None, spans

    def _spans(self, hidden_states, grid_size):
        """Spans `[batch, heads, height, width]` in neighbours, `None` without adaptive heads."""
        if self.span_proj is None:
            return None
        radius = self.head_groups[0][1]
        assert radius is not None  # for type checkers
        share = self.span_proj(hidden_states)
        share = torch.sigmoid(share.to(torch.promote_types(share.dtype, torch.float32)))
        return (radius * share).transpose(1, 2).unflatten(2, grid_size)

    def _adapted(self, radius, spans):
        """Arguments of `local_attention` for heads with a neighbourhood, none for others."""
        return {} if radius is None else {"span": spans, "bias": self.relative_position_bias}

    def _global_attention(self, q, k, v, global_mask, dropout):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # type: ignore[arg-type]
        cells = (x.flatten(2, 3) for x in (q, k, v))
        out, _ = attention(self, *cells, global_mask, dropout=dropout, scaling=self.scaling)
        return out.transpose(1, 2).unflatten(2, q.shape[2:4])  # from [batch, cells, heads, head_dim]


class HeptapodSpan(nn.Linear):
    """The span of each head from the state of a cell, as a share of the radius before a sigmoid. It starts close to 1."""


class HeptapodMLP(nn.Module):
    def __init__(self, config: HeptapodConfig):
        super().__init__()
        assert config.intermediate_size is not None  # for type checkers
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class HeptapodLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention and feed-forward, each with a residual connection."""

    def __init__(self, config: HeptapodConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = HeptapodAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HeptapodMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        page = hidden_states.shape
        hidden_states = hidden_states.flatten(1, -2)
        attended, _, spans = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states.view(page), spans


__all__ = ["HeptapodAttention", "HeptapodLayer", "HeptapodMLP", "HeptapodSpan", "cell_by_cell"]
