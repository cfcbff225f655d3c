"""Layers of the hierarchical LM: a block for each stream (token shift, windowed attention, feed-forward), then a merge."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..common.eager_attention import eager_attention
from ..common.transformers_versions import with_cache_argument
from .configuration_hierarchical_lm import HierarchicalLMConfig
from .hierarchical_cache import HierarchicalCache
from .hierarchy_merges import ConcatMerge, CrossAttentionMerge
from .stream_plan import HierarchicalLMContext, StreamPlan
from .windowed_attention import step_attention, windowed_attention
from .windowed_attention_operator import has_kernel, kernel_attention


def _rotate(x, rotary):
    """Rotary positions of queries and keys `x [batch, steps, 2, heads, head_dim]`, in the half-split layout.

    `rotary` holds cosines and signed sines `[1 or batch, steps, 1 or 2, 1, head_dim]`, scaled by xPos.
    """
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class HierarchicalLMAttention(nn.Module):
    """Causal attention of one stream, or of several with equal width."""

    def __init__(self, config: HierarchicalLMConfig, hierarchy: int):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads[hierarchy], config.head_dim[hierarchy]
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        inner, width = self.num_heads * self.head_dim, config.hidden_sizes[hierarchy]
        self.qkv_proj = nn.Linear(width, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, plan: StreamPlan, cache: Any, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, steps, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, steps, 3, self.num_heads, self.head_dim)
        query, key = _rotate(qkv[:, :, :2], plan.rotary).unbind(2)
        value = qkv[:, :, 2]
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        elif plan.slots is not None:
            keys, values = cache.write(layer_idx, key.transpose(1, 2), value.transpose(1, 2), plan)
        else:
            keys, values = cache.append(layer_idx, key.transpose(1, 2), value.transpose(1, 2), plan.order)
        weights = None
        if plan.output_attentions:
            out, weights = eager_attention(self, query.transpose(1, 2), keys, values, plan.mask, self.scaling)
        elif plan.fresh and plan.mask is None:
            out = self._attend_to_windows(query, key, value, plan)
        elif not plan.fresh and steps == 1 and plan.slots is None:
            query = query.transpose(1, 2)
            out = step_attention(self._attend, query, keys, values, plan.keys_seen, plan.dilation, plan.mask)
        else:
            out = self._attend(query.transpose(1, 2), keys, values, plan.mask, False)
        return self.o_proj(out.reshape(batch, steps, -1)), weights

    def _attend_to_windows(self, query, key, value, plan):
        is_default = self.config._attn_implementation == "sdpa"
        if plan.reach is not None and is_default and has_kernel(query, plan.span):
            return kernel_attention(query, key, value, plan.reach, plan.span, plan.dilation, self.scaling)
        where = (plan.window, plan.dilation, plan.block, plan.positions, plan.segments)
        return windowed_attention(self._attend, query, key, value, *where)

    def _attend(self, query, key, value, mask, is_causal):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attention(self, query, key, value, mask, scaling=self.scaling, is_causal=is_causal)[0]


class HierarchicalLMMLP(nn.Module):
    def __init__(self, config: HierarchicalLMConfig, hierarchy: int):
        super().__init__()
        width, inner = config.hidden_sizes[hierarchy], config.intermediate_sizes[hierarchy]
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class HierarchicalLMBlock(nn.Module):
    """Pre-norm block of one stream: attention (unless its window is 0) and feed-forward, each after a token shift.

    `attention` in the forward pass is the module of another block where weights are shared.
    """

    def __init__(self, config: HierarchicalLMConfig, layer_idx: int, hierarchy: int, has_own_attention: bool):
        super().__init__()
        width = config.hidden_sizes[hierarchy]
        self.cache_idx = layer_idx * config.num_hierarchies + hierarchy
        self.has_attention = config.window_sizes[hierarchy] != 0
        if self.has_attention:
            norms = {
                "rms_norm": (nn.RMSNorm, config.rms_norm_eps),
                "layer_norm": (nn.LayerNorm, config.layer_norm_eps),
            }
            norm, eps = norms[config.attention_norm[hierarchy]]
            self.input_layernorm = norm(width, eps=eps)
        if has_own_attention:
            self.self_attn = HierarchicalLMAttention(config, hierarchy)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = HierarchicalLMMLP(config, hierarchy)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: StreamPlan,
        cache: HierarchicalCache | None = None,
        attention: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = None
        if self.has_attention:
            shifted = self.input_layernorm(self._token_shift(hidden_states, plan, cache, 0))
            attention = self.self_attn if attention is None else attention
            out, weights = attention(shifted, plan, cache, self.cache_idx)
            hidden_states = hidden_states + out
        shifted = self.post_attention_layernorm(self._token_shift(hidden_states, plan, cache, 1))
        return hidden_states + self.mlp(shifted), weights

    def _token_shift(self, x, plan, cache, state_idx):
        """RWKV's token shift: the second half of the channels comes from the step before, `dilation` steps back."""
        steps, width = x.shape[1:]
        kept, moved = x.split((width + 1) // 2, dim=-1) if width > 1 else (x, x[..., :0])
        past = None if cache is None else cache.read_conv(self.cache_idx, state_idx)
        if past is None:
            past = moved.new_zeros(x.shape[0], plan.dilation, moved.shape[-1])
        if cache is not None and steps == 1 and plan.dilation == 1 and plan.counts is None and plan.rows is None:
            shifted = torch.cat((kept, past), dim=-1)  # before a static cache writes where `past` is
            cache.write_conv(moved, self.cache_idx, state_idx)
            return shifted
        joined = torch.cat((past, moved), dim=1)
        if cache is not None:
            cache.write_conv(plan.last_of(joined, plan.dilation), self.cache_idx, state_idx)
        earlier = joined[:, :steps]
        if plan.shift_mask is not None:
            earlier = earlier * plan.shift_mask
        return torch.cat((kept, earlier), dim=-1)


class HierarchicalLMLayer(GradientCheckpointingLayer):
    """A block for each stream, then their merge."""

    def __init__(self, config: HierarchicalLMConfig, layer_idx: int):
        super().__init__()
        self.owners = _attention_owners(config)
        blocks = [HierarchicalLMBlock(config, layer_idx, h, owner == h) for h, owner in enumerate(self.owners)]
        self.cache_indices = [block.cache_idx for block in blocks]
        self.blocks = nn.ModuleList(blocks)
        self.merge = None
        if config.num_hierarchies > 1:
            self.merge = (ConcatMerge if config.merge == "concat" else CrossAttentionMerge)(config)

    @with_cache_argument
    def forward(
        self,
        *streams: torch.Tensor,
        context: HierarchicalLMContext,
        past_key_values: HierarchicalCache | None = None,
        ablate_merge: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Streams `[batch, steps, width]` after this layer, then attentions with `context.output_attentions`."""
        cache, plans, out, attentions = past_key_values, context.streams, list(streams), []
        for h, (block, plan) in enumerate(zip(self.blocks, plans)):
            if plan.steps == 0:
                continue
            owner = self.owners[h]
            attention = None if owner is None or owner == h else self.blocks[owner].self_attn
            out[h], weights = block(out[h], plan, cache, attention)
            if weights is not None:
                attentions.append(weights)
        if self.merge is None:
            return (*out, *attentions)
        to_read = [steps_to_read(x, plan, cache, i) for x, plan, i in zip(out, plans, self.cache_indices)]
        if not ablate_merge:
            for h, pooled in self.merge(to_read, plans).items():
                if plans[h].steps:
                    out[h] = out[h] + plans[h].at_steps(pooled)
        return (*out, *attentions)


def _attention_owners(config: HierarchicalLMConfig) -> list[int | None]:
    """Index of the hierarchy whose block holds the attention of each hierarchy, `None` where there is no attention."""
    owners: list[int | None] = []
    first_of: dict[tuple[int, ...], int] = {}
    for h, window in enumerate(config.window_sizes):
        shape = (config.hidden_sizes[h], config.num_attention_heads[h], config.head_dim[h])
        key = shape if config.shared_attention else (h,)
        owners.append(None if window == 0 else first_of.setdefault(key, h))
    return owners


def steps_to_read(
    x: torch.Tensor, plan: StreamPlan, cache: HierarchicalCache | None, layer_idx: int, state_idx: int = 0
) -> torch.Tensor:
    """The steps of a stream that tokens read, from new steps `[batch, steps, width]`. The cache keeps the last one."""
    if plan.stride == 1 or cache is None:
        return x
    last = cache.read_recurrent(layer_idx, state_idx)
    if last is None:
        last = x.new_zeros(x.shape[0], 1, x.shape[2])
    if plan.steps:
        seen = x if plan.counts is None and plan.rows is None else torch.cat((last, x), dim=1)
        cache.write_recurrent(plan.last_of(seen, 1), layer_idx, state_idx)
    return plan.to_read(x, last)


__all__ = [
    "HierarchicalLMAttention",
    "HierarchicalLMBlock",
    "HierarchicalLMLayer",
    "HierarchicalLMMLP",
    "steps_to_read",
]
