"""Compressors of the hierarchical LM: each step of a coarse stream is made of the last `factor` token embeddings."""

import torch
from torch import nn

from .configuration_hierarchical_lm import HierarchicalLMConfig
from .hierarchical_cache import HierarchicalCache
from .stream_plan import HierarchicalLMContext


class ConvCompressor(nn.Module):
    """A causal convolution over the last `factor` embeddings, as two linear layers."""

    def __init__(self, config: HierarchicalLMConfig, hierarchy: int):
        super().__init__()
        width, self.factor = config.hidden_size, config.compression_factors[hierarchy]
        self.conv_in = nn.Linear(self.factor * width, 4 * width)
        self.conv_out = nn.Linear(4 * width, config.hidden_sizes[hierarchy])

    def forward(self, windows: torch.Tensor, exists: torch.Tensor | None) -> torch.Tensor:
        """Steps `[batch, steps, width]` from `windows [batch, steps, factor, hidden_size]`, oldest first, zero before the text."""
        return self.conv_out(nn.functional.silu(self.conv_in(windows.flatten(2))))


class AttentionCompressor(nn.Module):
    """Self-attention over the last `factor` embeddings. Only the output of the last one is computed."""

    def __init__(self, config: HierarchicalLMConfig, hierarchy: int):
        super().__init__()
        width, self.factor = config.hidden_size, config.compression_factors[hierarchy]
        self.num_heads, self.head_dim = config.num_attention_heads[hierarchy], config.head_dim[hierarchy]
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_sizes[hierarchy], bias=False)
        self.tap_embed = nn.Parameter(torch.empty(self.factor, inner))  # embeddings of places in the window, for keys

    def forward(self, windows: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """As `ConvCompressor.forward`. `exists [1 or batch, steps, factor]` is `False` before the text."""
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(windows[:, :, -1]).unflatten(-1, heads)
        blocks, windows = windows.shape[1:3], windows.flatten(1, 2)  # adapters take three dimensions
        key = (self.k_proj(windows).unflatten(1, blocks) + self.tap_embed).unflatten(-1, heads)
        value = self.v_proj(windows).unflatten(1, blocks).unflatten(-1, heads)
        logits = torch.einsum("bnhd,bnchd->bnhc", query, key) * self.head_dim**-0.5
        logits = logits.masked_fill(~exists.unsqueeze(2), torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(torch.float32, logits.dtype))
        out = torch.einsum("bnhc,bnchd->bnhd", weights.to(value.dtype), value)
        return self.o_proj(out.flatten(2))


def make_compressor(config: HierarchicalLMConfig, hierarchy: int) -> nn.Module:
    """The compressor of a hierarchy; at factor 1 a projection to its width, or the identity where widths are equal."""
    if config.compression_factors[hierarchy] == 1:
        if config.hidden_sizes[hierarchy] == config.hidden_size:
            return nn.Identity()
        return nn.Linear(config.hidden_size, config.hidden_sizes[hierarchy], bias=False)
    kind = {"conv": ConvCompressor, "attention": AttentionCompressor}[config.compressor[hierarchy]]
    return kind(config, hierarchy)


def compress(
    compressors: nn.ModuleList,
    config: HierarchicalLMConfig,
    embeds: torch.Tensor,
    context: HierarchicalLMContext,
    cache: HierarchicalCache | None,
) -> list[torch.Tensor]:
    """The streams `[batch, steps, width]` of all hierarchies, from embeddings `[batch, slots, hidden_size]` as laid out."""
    factors = config.compression_factors
    back = max(factors) - 1  # embeddings before the first new one that compressors read
    joined = embeds
    if back:
        before = None if cache is None else cache.read_conv(-1)
        # One more than is read, so that no window spans the whole row: a compiler would specialise on such lengths.
        unread = int(before is None)
        if before is None:
            before = embeds.new_zeros(embeds.shape[0], unread + back, embeds.shape[2])
        joined = torch.cat((before, embeds), dim=1)
        if cache is not None:
            cache.write_conv(context.last_of(joined[:, unread:], back), -1)
    streams = []
    for factor, width, plan, compressor in zip(factors, config.hidden_sizes, context.streams, compressors):
        if plan.steps == 0:
            streams.append(embeds.new_zeros(embeds.shape[0], 0, width))
            continue
        if factor == 1:
            streams.append(compressor(embeds).to(embeds.dtype))
            continue
        first, stride = (plan.pick.start, plan.stride) if isinstance(plan.pick, slice) else (0, 1)
        windows = joined[:, unread + back - factor + 1 + first :].unfold(1, factor, stride).transpose(2, 3)
        if stride < plan.stride:
            windows = torch.stack([plan.at_steps(x) for x in windows.unbind(2)], dim=2)
        exists = None
        if isinstance(compressor, AttentionCompressor):
            assert plan.token_positions is not None  # for type checkers
            taps = torch.arange(1 - factor, 1, device=embeds.device)
            exists = (plan.token_positions.unsqueeze(-1) + taps) >= 0
        streams.append(compressor(windows, exists).to(embeds.dtype))  # autocast must not make bf16 streams
    return streams


__all__ = ["AttentionCompressor", "ConvCompressor", "compress", "make_compressor"]
