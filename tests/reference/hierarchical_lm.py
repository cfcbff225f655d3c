"""The hierarchical LM from its description, step by step and head by head: slow, obvious, and independent of the package.

`hierarchical_streams`, `hierarchical_logits` and `hierarchical_losses` take a state dict of a `HierarchicalLMForCausalLM`
and plain numbers, and work in the dtype of the weights. Every sequence is computed on its own: nothing here knows batches,
pads, packed rows or caches. Coarse vectors are looked up by the token they belong to; rotary positions and xPos enter as
one rotation by the distance of two steps. It is differentiable.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class HierarchicalDescription:
    """The numbers that make a hierarchical LM; lists have one entry per hierarchy."""

    factors: list
    strides: list
    heads: list
    head_dims: list
    windows: list  # None: all steps, 0: no attention
    layers: int
    blocks: bool = False
    predict: int = 0  # index of the hierarchy that predicts
    predict_from_all: bool = False
    merge: str = "concat"
    merge_into_all: bool = False
    coarse_to_fine: bool = False
    attention_norms: list = field(default_factory=lambda: ["rms_norm"])
    compressors: list = field(default_factory=lambda: ["conv"])
    xpos: list = field(default_factory=lambda: [True])
    xpos_base: float = 512.0
    rope_theta: float = 10000.0
    shared_attention: bool = False
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5


# --- the model ---------------------------------------------------------------------------------------------------------


def hierarchical_logits(
    weights: dict, ids: list[int], d: HierarchicalDescription, merging: bool = True
) -> torch.Tensor:
    """Logits `[len(ids), vocabulary]` of one sequence."""
    streams = hierarchical_streams(weights, ids, d, merging)
    rows = []
    for t in range(len(ids)):
        if d.predict_from_all:
            seen = torch.cat([stream[t // s] for stream, s in zip(streams, d.strides)])
        else:
            seen = streams[d.predict][t // d.strides[d.predict]]
        rows.append(weights["lm_head.weight"] @ seen)
    return torch.stack(rows)


def hierarchical_streams(
    weights: dict, ids: list[int], d: HierarchicalDescription, merging: bool = True
) -> list[list]:
    """The normalised final states of one sequence: per hierarchy a list of vectors, that of step `i` at token `i * stride`."""
    embeddings = [weights["model.embed_tokens.weight"][token] for token in ids]
    streams = []
    for h, (c, s) in enumerate(zip(d.factors, d.strides)):
        name = f"model.embed_norms.{h}"
        steps = range(0, len(ids), s)
        streams.append([_layer_norm(_compress(weights, embeddings, t, h, c, d), weights, name, d) for t in steps])
    for layer in range(d.layers):
        streams = [_block(weights, stream, layer, h, d) for h, stream in enumerate(streams)]
        if merging and len(streams) > 1:
            merge = _concat_merge if d.merge == "concat" else _cross_merge
            streams = merge(weights, streams, f"model.layers.{layer}.merge", len(ids), d)
    return [[_layer_norm(x, weights, f"model.norms.{h}", d) for x in stream] for h, stream in enumerate(streams)]


def _rms_norm(x, weight, d):
    return x / torch.sqrt((x * x).sum() / len(x) + d.rms_norm_eps) * weight


def _layer_norm(x, weights, name, d):
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + d.layer_norm_eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _silu(x):
    return x / (1 + torch.exp(-x))


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _compress(weights, embeddings, t, h, c, d):
    """What the last `c` embeddings up to token `t` become; zeros stand before the first."""
    name = f"model.compressors.{h}"
    if c == 1:
        projection = weights.get(f"{name}.weight")
        return embeddings[t] if projection is None else projection @ embeddings[t]
    if d.compressors[h] == "attention":
        return _attend_over_block(weights, name, embeddings, t, h, c, d)
    nothing = torch.zeros_like(embeddings[0])
    last = [embeddings[u] if u >= 0 else nothing for u in range(t - c + 1, t + 1)]
    inner = _silu(weights[f"{name}.conv_in.weight"] @ torch.cat(last) + weights[f"{name}.conv_in.bias"])
    return weights[f"{name}.conv_out.weight"] @ inner + weights[f"{name}.conv_out.bias"]


def _attend_over_block(weights, name, embeddings, t, h, c, d):
    """What token `t` reads of the last `c` embeddings; keys also know their place in the block."""
    heads, head_dim = d.heads[h], d.head_dims[h]
    q = (weights[f"{name}.q_proj.weight"] @ embeddings[t]).view(heads, head_dim)
    kv = []
    for u in range(max(0, t - c + 1), t + 1):
        key = weights[f"{name}.k_proj.weight"] @ embeddings[u] + weights[f"{name}.tap_embed"][c - 1 - (t - u)]
        value = weights[f"{name}.v_proj.weight"] @ embeddings[u]
        kv.append((key.view(heads, head_dim), value.view(heads, head_dim)))
    return weights[f"{name}.o_proj.weight"] @ _read(q, kv)


def _read(queries, keys_and_values):
    """Softmax attention of each head of one query, heads side by side."""
    parts = []
    for head, q in enumerate(queries):
        logits = torch.stack([q @ key[head] for key, _ in keys_and_values])
        chances = torch.softmax(logits / math.sqrt(len(q)), 0)
        parts.append(sum(chance * value[head] for chance, (_, value) in zip(chances, keys_and_values)))
    return torch.cat(parts)


def _shift(stream, i, jump):
    """The first half of a step's channels, the second half of the step `jump` before it."""
    half = (len(stream[i]) + 1) // 2
    before = stream[i - jump] if i >= jump else torch.zeros_like(stream[i])
    return torch.cat((stream[i][:half], before[half:]))


def _block(weights, stream, layer, h, d):
    name = f"model.layers.{layer}.blocks.{h}"
    jump = d.factors[h] // d.strides[h]
    if d.windows[h] != 0:
        normed = []
        for i in range(len(stream)):
            shifted = _shift(stream, i, jump)
            if d.attention_norms[h] == "layer_norm":
                normed.append(_layer_norm(shifted, weights, f"{name}.input_layernorm", d))
            else:
                normed.append(_rms_norm(shifted, weights[f"{name}.input_layernorm.weight"], d))
        stream = [x + y for x, y in zip(stream, _attention(weights, normed, layer, h, jump, d))]
    out = []
    for i, x in enumerate(stream):
        y = _rms_norm(_shift(stream, i, jump), weights[f"{name}.post_attention_layernorm.weight"], d)
        y = weights[f"{name}.mlp.down_proj.weight"] @ _gelu(weights[f"{name}.mlp.up_proj.weight"] @ y)
        out.append(x + y)
    return out


def _attention(weights, normed, layer, h, jump, d):
    owner = h
    if d.shared_attention:  # the first hierarchy of this shape has the weights
        width = len(normed[0])
        for other in range(h, -1, -1):
            norm = weights.get(f"model.layers.{layer}.blocks.{other}.input_layernorm.weight")
            shape = d.heads[other], d.head_dims[other]
            if norm is not None and len(norm) == width and shape == (d.heads[h], d.head_dims[h]):
                owner = other
    name = f"model.layers.{layer}.blocks.{owner}.self_attn"
    heads, head_dim = d.heads[h], d.head_dims[h]
    qkv = [(weights[f"{name}.qkv_proj.weight"] @ x).view(3, heads, head_dim) for x in normed]
    out = []
    for i in range(len(normed)):
        parts = []
        seen = [j for j in range(i % jump, i + 1, jump) if _within(i // jump, j // jump, d.windows[h], d.blocks)]
        for head in range(heads):
            logits = [_rotated_product(qkv[i][0, head], qkv[j][1, head], (i - j) // jump, h, d) for j in seen]
            chances = torch.softmax(torch.stack(logits) / math.sqrt(head_dim), 0)
            parts.append(sum(chance * qkv[j][2, head] for chance, j in zip(chances, seen)))
        out.append(weights[f"{name}.o_proj.weight"] @ torch.cat(parts))
    return out


def _within(later, earlier, window, blocks):
    if window is None:
        return True
    if blocks:
        return later // window - earlier // window <= 1
    return later - earlier < window


def _rotated_product(q, k, distance, h, d):
    """`q . k` after `q` was turned `distance` steps further than `k`, channel `i` together with `i + half`."""
    half = len(q) // 2
    total = 0
    for i in range(half):
        angle = distance * d.rope_theta ** (-i / half)
        decay = 1.0
        if d.xpos[h]:
            decay = ((2 * i + 0.4 * 2 * half) / (1.4 * 2 * half)) ** (distance / d.xpos_base)
        along = q[i] * k[i] + q[i + half] * k[i + half]
        across = q[i + half] * k[i] - q[i] * k[i + half]
        total = total + decay * (math.cos(angle) * along - math.sin(angle) * across)
    return total


def _concat_merge(weights, streams, name, seq, d):
    """Streams side by side at each token, through a feed-forward, onto one stream or all."""
    pooled = []
    for t in range(seq):
        x = torch.cat([stream[t // s] for stream, s in zip(streams, d.strides)])
        up_proj = torch.cat([weights[f"{name}.up_projs.{h}.weight"] for h in range(len(streams))], dim=1)
        x = _silu(up_proj @ _rms_norm(x, 1.0, d) + weights[f"{name}.up_bias"])
        pooled.append(weights[f"{name}.down_proj.weight"] @ x + weights[f"{name}.down_proj.bias"])
    out, first = [], 0
    for h, (stream, s) in enumerate(zip(streams, d.strides)):
        if d.merge_into_all:
            width = len(stream[0])
            stream = [x + pooled[i * s][first : first + width] for i, x in enumerate(stream)]
            first += width
        elif h == d.predict:
            stream = [x + pooled[i * s] for i, x in enumerate(stream)]
        out.append(stream)
    return out


def _cross_merge(weights, streams, name, seq, d):
    """Each receiving stream attends to the streams at its token, with the heads of the hierarchy that predicts."""

    def normed(h, i):
        return _rms_norm(streams[h][i], weights[f"{name}.norms.{h}.weight"], d)

    heads, head_dim = d.heads[d.predict], d.head_dims[d.predict]
    out = []
    for h, stream in enumerate(streams):
        if not d.merge_into_all and h != d.predict:
            out.append(stream)
            continue
        seen = [j for j in range(len(streams)) if not d.coarse_to_fine or d.factors[j] >= d.factors[h]]
        new = []
        for i, x in enumerate(stream):
            q = (weights[f"{name}.q_projs.{h}.weight"] @ normed(h, i)).view(heads, head_dim)
            kv = []
            for j in seen:
                other = normed(j, i * d.strides[h] // d.strides[j])
                kv.append((weights[f"{name}.kv_projs.{j}.weight"] @ other).view(2, heads, head_dim))
            new.append(x + weights[f"{name}.o_projs.{h}.weight"] @ _read(q, kv))
        out.append(new)
    return out


# --- losses on streams -------------------------------------------------------------------------------------------------


@dataclass
class LossDescription:
    """What the losses of a hierarchical LM are made of."""

    factors: list
    strides: list
    vocabulary: int
    loss_type: str = "mse_and_cosine"
    rollouts: int = 1
    rollout_weights: list | None = None
    dynamic: bool = True
    dynamic_decay: float = 1.0
    detach_summaries: bool = True
    dynamics_layers: int = 3


def _log_chance(logits, token):
    return logits[token] - torch.logsumexp(logits, 0)


def _mean(values):
    return sum(values) / len(values) if values else torch.zeros(())


def token_loss(
    name: str, weights: dict, sequences: list[list[int]], streams: list[list], d: LossDescription
) -> torch.Tensor:
    """`"reconstruction"` of the tokens a step was made of, or `"prophet"` of those that follow it.

    Args:
        weights: the state dict of the losses.
        sequences: token ids.
        streams: per sequence, per hierarchy, a list of vectors or a tensor `[steps, width]`.
    """
    total = 0
    for h, (c, s) in enumerate(zip(d.factors, d.strides)):
        if c == 1:
            continue
        heads = weights[f"{name}.{c}.weight"].view(c, d.vocabulary, -1)
        found = []
        for ids, stream in zip(sequences, streams):
            for i, x in enumerate(stream[h]):
                for head in range(c):
                    t = i * s + head - (c - 1) if name == "reconstruction" else i * s + head + 1
                    if 0 <= t < len(ids):
                        found.append(-_log_chance(heads[head] @ x, ids[t]))
        total = total + _mean(found)
    return total


def quantized_prophet_loss(weights: dict, embeddings: list, streams: list[list], d: LossDescription) -> torch.Tensor:
    """The codes of the `c` embeddings after a step, one per codebook: the nearest direction to their projection.

    Args:
        weights: the state dict of the losses.
        embeddings: per sequence, one vector a token.
        streams: as for `token_loss`.
    """
    total = 0
    for h, (c, s) in enumerate(zip(d.factors, d.strides)):
        if c == 1:
            continue
        name = f"quantized_prophet.{c}"
        codebooks = weights[f"{name}.quantizer.codebooks"]
        number, size, dim = codebooks.shape
        projection = weights[f"{name}.quantizer.projection"].view(number, dim, -1)
        heads = weights[f"{name}.head.weight"].view(number, size, -1)
        found = []
        for tokens, stream in zip(embeddings, streams):
            for i, x in enumerate(stream[h]):
                block = list(tokens[i * s + 1 : i * s + 1 + c])
                if len(block) < c:
                    continue
                block = torch.cat(block)
                block = (block - block.mean()) / block.std()
                for head in range(number):
                    point = projection[head] @ block
                    cosines = [point @ code / point.norm() / code.norm() for code in codebooks[head]]
                    found.append(-_log_chance(heads[head] @ x, int(torch.stack(cosines).argmax())))
        total = total + _mean(found)
    return total


def next_latent_loss(weights: dict, embeddings: list, streams: list[list], h: int, d: LossDescription) -> torch.Tensor:
    """The next-latent loss of one hierarchy. Arguments as for `quantized_prophet_loss`."""
    c, s = d.factors[h], d.strides[h]
    name = f"next_latent.{c}"
    rollout_weights = d.rollout_weights or [1.0] * d.rollouts
    found = []
    for tokens, stream in zip(embeddings, streams):
        for i in range(len(stream[h]) - d.rollouts):
            latent, past, loss = stream[h][i], 0.0, 0
            for step in range(1, d.rollouts + 1):
                t = (i + step) * s
                block = list(tokens[max(0, t - c + 1) : t + 1])
                summary = sum(block) / len(block)
                if d.detach_summaries:
                    summary = summary.detach()
                projection = weights.get(f"{name}.summarizer.proj.weight")
                if projection is not None:
                    summary = projection @ summary + weights[f"{name}.summarizer.proj.bias"]
                latent = latent + _change(weights, f"{name}.dynamics", latent, summary, d)
                error = _latent_error(latent, stream[h][i + step].detach(), d.loss_type)
                share = rollout_weights[step - 1] / sum(rollout_weights)
                loss = loss + share * error * (math.exp(-d.dynamic_decay * past) if d.dynamic else 1)
                past = past + float(error.detach())
            found.append(loss)
    return _mean(found)


def _change(weights, name, latent, summary, d):
    x = torch.cat((latent, summary))
    x = x - x.mean()
    x = x / torch.sqrt((x * x).mean() + 1e-5) * weights[f"{name}.norm.weight"] + weights[f"{name}.norm.bias"]
    for layer in range(d.dynamics_layers):
        x = weights[f"{name}.layers.{layer}.weight"] @ x + weights[f"{name}.layers.{layer}.bias"]
        if layer < d.dynamics_layers - 1:
            x = _gelu(x)
    return x


def _latent_error(predicted, target, kind):
    difference = predicted - target
    squares = (difference * difference).mean()
    cosine = 1 - predicted @ target / predicted.norm() / target.norm()
    if kind == "smooth_l1":
        absolute = difference.abs()
        return torch.where(absolute < 1, 0.5 * difference * difference, absolute - 0.5).mean()
    return {"mse": squares, "cosine": cosine, "mse_and_cosine": 0.1 * squares + 0.9 * cosine}[kind]
