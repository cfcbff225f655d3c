"""Merges of the streams of all hierarchies at the end of a layer, token by token."""

from functools import reduce

import torch
from torch import nn

from .configuration_hierarchical_lm import HierarchicalLMConfig
from .stream_plan import StreamPlan


class ConcatMerge(nn.Module):
    """Concatenation of all streams, an RMSNorm without gain, and a feed-forward into the predicting stream or all.

    The first linear layer reads each stream at its own resolution. The norm is applied to its output, with the same result
    for less work: `norm([x, y]) @ [U, V] = (x @ U + y @ V) / rms([x, y])`.
    """

    def __init__(self, config: HierarchicalLMConfig):
        super().__init__()
        into_all = config.merge_into == "all"
        self.receivers = list(range(config.num_hierarchies)) if into_all else [config.predict_index]
        self.sizes = [config.hidden_sizes[h] for h in self.receivers]
        self.width, self.eps = sum(config.hidden_sizes), config.rms_norm_eps
        inner = 2 * sum(self.sizes)
        self.up_projs = nn.ModuleList(nn.Linear(width, inner, bias=False) for width in config.hidden_sizes)
        self.up_bias = nn.Parameter(torch.zeros(inner))
        self.down_proj = nn.Linear(inner, sum(self.sizes))

    def forward(self, streams: list[torch.Tensor], plans: list[StreamPlan]) -> dict[int, torch.Tensor]:
        """What each receiving stream adds at each token, by its index, from the steps of all streams that tokens read."""
        up = reduce(torch.add, (plan.at_tokens(proj(x)) for x, proj, plan in zip(streams, self.up_projs, plans)))
        squares = reduce(torch.add, (plan.at_tokens(_squared_norm(x)) for x, plan in zip(streams, plans)))
        inverse_rms = torch.rsqrt(squares / self.width + self.eps).to(up.dtype)
        hidden_states = nn.functional.silu(torch.addcmul(self.up_bias, up, inverse_rms))
        return dict(zip(self.receivers, self.down_proj(hidden_states).split(self.sizes, dim=-1)))


def _squared_norm(x):
    """Squared length `[..., 1]` of vectors `[..., width]`, in at least float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise).square()


class CrossAttentionMerge(nn.Module):
    """Attention over the streams at the same token. Each stream has its own projections to a common width."""

    def __init__(self, config: HierarchicalLMConfig):
        super().__init__()
        into_all = config.merge_into == "all"
        self.receivers = list(range(config.num_hierarchies)) if into_all else [config.predict_index]
        self.sources = {
            i: [
                j
                for j, factor in enumerate(config.compression_factors)
                if config.merge_direction == "full" or factor >= config.compression_factors[i]
            ]
            for i in self.receivers
        }
        self.num_heads = config.num_attention_heads[config.predict_index]
        self.head_dim = config.head_dim[config.predict_index]
        inner = self.num_heads * self.head_dim
        used = sorted({*self.receivers, *(j for places in self.sources.values() for j in places)})
        self.norms = nn.ModuleDict({str(j): nn.RMSNorm(config.hidden_sizes[j], eps=config.rms_norm_eps) for j in used})
        self.kv_projs = nn.ModuleDict(
            {
                str(j): nn.Linear(config.hidden_sizes[j], 2 * inner, bias=False)
                for j in sorted({j for places in self.sources.values() for j in places})
            }
        )
        self.q_projs = nn.ModuleDict(
            {str(i): nn.Linear(config.hidden_sizes[i], inner, bias=False) for i in self.receivers}
        )
        self.o_projs = nn.ModuleDict(
            {str(i): nn.Linear(inner, config.hidden_sizes[i], bias=False) for i in self.receivers}
        )

    def forward(self, streams: list[torch.Tensor], plans: list[StreamPlan]) -> dict[int, torch.Tensor]:
        """What each receiving stream adds at each token, by its index, from the steps of all streams that tokens read."""
        streams = [plan.at_tokens(x) for x, plan in zip(streams, plans)]
        normed = {name: norm(streams[int(name)]) for name, norm in self.norms.items()}
        heads = (self.num_heads, self.head_dim)
        keys_values = {j: proj(normed[j]).unflatten(-1, (2, *heads)) for j, proj in self.kv_projs.items()}
        out = {}
        for i, sources in self.sources.items():
            query = self.q_projs[str(i)](normed[str(i)]).unflatten(-1, heads)
            key, value = torch.stack([keys_values[str(j)] for j in sources], dim=-2).unbind(2)
            weights = torch.softmax((query.unsqueeze(-2) * key).sum(-1) * self.head_dim**-0.5, dim=-1)
            out[i] = self.o_projs[str(i)]((weights.unsqueeze(-1) * value).sum(-2).flatten(2))
        return out


__all__ = ["ConcatMerge", "CrossAttentionMerge"]
