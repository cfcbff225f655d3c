"""The prototype's wiring as a lecture writes it: a module per block, a Python loop over the axes, nothing computed together.

A peer for speed, with the same arithmetic as our model. `LectureAttention` has a module per head and a masked softmax, as the
lecture that the prototype's notebook grew from; `FusedAttention` is what nanoGPT made of it: one projection for all heads
and torch's scaled dot product attention. Both have biases, as GPT-2 has. Imports nothing from the package.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Head(nn.Module):
    """One head: each position of `reader` sees `source` up to itself."""

    def __init__(self, width, size, positions):
        super().__init__()
        self.query = nn.Linear(width, size)
        self.key = nn.Linear(width, size)
        self.value = nn.Linear(width, size)
        self.register_buffer("tril", torch.ones(positions, positions).tril())

    def forward(self, reader, source):
        length = reader.shape[1]
        q, k, v = self.query(reader), self.key(source), self.value(source)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return F.softmax(weights, dim=-1) @ v


class LectureAttention(nn.Module):
    def __init__(self, width, heads, positions):
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads, positions) for _ in range(heads))
        self.proj = nn.Linear(width, width)

    def forward(self, reader, source):
        return self.proj(torch.cat([head(reader, source) for head in self.heads], dim=-1))

    def load(self, query, key, value, out):
        """Take over weights and biases of four `nn.Linear`-like pairs, the heads one below the other."""
        for name, (weight, bias) in (("query", query), ("key", key), ("value", value)):
            for i, head in enumerate(self.heads):
                linear, size = getattr(head, name), getattr(head, name).out_features
                linear.weight.copy_(weight[i * size : (i + 1) * size])
                linear.bias.copy_(bias[i * size : (i + 1) * size])
        self.proj.weight.copy_(out[0])
        self.proj.bias.copy_(out[1])


class FusedAttention(nn.Module):
    def __init__(self, width, heads, positions):
        super().__init__()
        self.num_heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, reader, source):
        batch, length, width = reader.shape
        if reader is source:
            q, k, v = self.c_attn(reader).split(width, dim=2)
        else:
            weight, bias = self.c_attn.weight, self.c_attn.bias
            q = F.linear(reader, weight[:width], bias[:width])
            k, v = F.linear(source, weight[width:], bias[width:]).split(width, dim=2)
        q, k, v = (x.view(batch, length, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width))

    def load(self, query, key, value, out):
        """As in `LectureAttention`."""
        self.c_attn.weight.copy_(torch.cat([x[0] for x in (query, key, value)]))
        self.c_attn.bias.copy_(torch.cat([x[1] for x in (query, key, value)]))
        self.c_proj.weight.copy_(out[0])
        self.c_proj.bias.copy_(out[1])


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward on one stream."""

    def __init__(self, attention, width, heads, positions):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention(width, heads, positions)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        return x + self.feed_forward(self.feed_forward_norm(x))


class CrossBlock(nn.Module):
    """The same, where one stream reads another."""

    def __init__(self, attention, width, heads, positions):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width)
        self.attention = attention(width, heads, positions)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x, source):
        x = x + self.attention(self.norm(x), self.source_norm(source))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Layer(nn.Module):
    def __init__(self, attention, axes, *shape):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention, *shape) for _ in range(1 + axes))
        self.main_reads = nn.ModuleList(CrossBlock(attention, *shape) for _ in range(axes))
        self.axis_reads = nn.ModuleList(CrossBlock(attention, *shape) for _ in range(axes))

    def forward(self, streams):
        main, *metas = [block(x) for block, x in zip(self.blocks, streams)]
        if not metas:
            return [main]
        mains = [block(main, meta) for block, meta in zip(self.main_reads, metas)]
        metas = [block(meta, main) for block, meta in zip(self.axis_reads, metas)]
        return [sum(mains) / len(mains), *metas]


class MultiGridInLoops(nn.Module):
    """A model of streams that all have the same width.

    Args:
        attention (`type`): `LectureAttention` or `FusedAttention`.
        vocabularies (`list[int]`): sizes, that of the main axis first.
        width, heads, layers, positions (`int`): as usual.
        main_loss_weight (`float`): share of the main axis's loss.
    """

    def __init__(self, attention, vocabularies, width, heads, layers, positions, main_loss_weight=0.5):
        super().__init__()
        self.main_loss_weight = main_loss_weight
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in vocabularies)
        self.positions = nn.Embedding(positions, width)
        axes = len(vocabularies) - 1
        self.layers = nn.ModuleList(Layer(attention, axes, width, heads, positions) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in vocabularies)
        self.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in vocabularies)

    def forward(self, grid):
        """Loss of `grid [batch, 1 + axes, length]`, the main axis first: each token predicts the next of its axis."""
        place = self.positions(torch.arange(grid.shape[2], device=grid.device))
        streams = [embed(ids) + place for embed, ids in zip(self.embeddings, grid.unbind(1))]
        for layer in self.layers:
            streams = layer(streams)
        losses = []
        for norm, head, stream, ids in zip(self.norms, self.heads, streams, grid.unbind(1)):
            logits = head(norm(stream))
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        main, *metas = losses
        if not metas:
            return main
        return self.main_loss_weight * main + (1 - self.main_loss_weight) * sum(metas) / len(metas)
