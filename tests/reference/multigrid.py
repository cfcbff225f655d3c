"""MultiGrid from the prototype's description, token by token and head by head: slow, obvious, and independent of the package.

`multigrid_streams`, `multigrid_logits` and `multigrid_losses` take a state dict of a `MultiGridForCausalLM` and plain numbers,
and work in the dtype of the weights. Every sequence is computed on its own: nothing here knows batches, pads, packed rows or
caches, and each axis is a loop of its own. It is differentiable.

The wiring of a layer, with the main stream and one stream for each meta axis:

    1. every stream mixes its own past, then passes a feed-forward
    2. at the same time, from what 1 made: the main stream reads each meta stream, each meta stream reads the main stream
       (positions up to its own), and whoever has read passes a feed-forward
    3. the main stream takes over the weighted mean of what its readings have changed
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class GridDescription:
    """The numbers that make a MultiGrid; names and meaning as in the model's configuration."""

    axes: int
    heads: int
    meta_heads: int
    layers: int
    core: str = "transformer"
    factored: bool = False
    axis_weights: list = field(default_factory=list)
    main_loss_weight: float = 0.5
    windows: list | None = None
    cross_feed_forward: bool = True
    layer_norm_eps: float = 1e-5
    rescale: float = 10.0
    rope_theta: float = 10000.0


# --- the model ---------------------------------------------------------------------------------------------------------


def multigrid_losses(weights: dict, ids: list, meta_ids: list, d: GridDescription) -> tuple:
    """The loss, that of the main axis and those of the meta axes of one sequence: each token predicts the next one."""
    logits, meta_logits = multigrid_logits(weights, ids, meta_ids, d)
    main = _cross_entropy(logits, ids)
    metas = [_cross_entropy(logits, track) for logits, track in zip(meta_logits, meta_ids)]
    if not metas:
        return main, main, []
    return d.main_loss_weight * main + (1 - d.main_loss_weight) * sum(metas) / len(metas), main, metas


def multigrid_logits(weights: dict, ids: list, meta_ids: list, d: GridDescription, next_meta_ids: list | None = None):
    """Logits of one sequence.

    Args:
        weights: the state dict.
        ids: main token ids.
        meta_ids: for each axis the meta ids of the same tokens.
        d: see `GridDescription`.
        next_meta_ids: in the factored order, for each axis the meta id of the token after the last one; where it is not
            known, the last token is predicted without it.

    Returns:
        Those of the main axis, `[len(ids), vocabulary]`, and a list of those of each meta axis.
    """
    main, *metas = multigrid_streams(weights, ids, meta_ids, d)
    if d.factored:
        seen = []
        for t, x in enumerate(main):
            if t + 1 < len(ids):
                seen.append(_condition(weights, x, [track[t + 1] for track in meta_ids], d))
            elif next_meta_ids is not None:
                seen.append(_condition(weights, x, next_meta_ids, d))
            else:
                seen.append(x)
        main = seen
    main_logits = torch.stack([weights["lm_head.weight"] @ x for x in main])
    meta_logits = []
    for a, stream in enumerate(metas):
        meta_logits.append(torch.stack([weights[f"meta_lm_heads.{a}.weight"] @ x for x in stream]))
    return main_logits, meta_logits


def multigrid_streams(weights: dict, ids: list, meta_ids: list, d: GridDescription) -> list:
    """The normalised final states of one sequence: lists of vectors, the main stream first."""
    main = [weights["model.embed_tokens.weight"][token] for token in ids]
    metas = [[weights[f"model.meta_embed_tokens.{a}.weight"][i] for i in track] for a, track in enumerate(meta_ids)]
    if d.core == "transformer":
        table = weights["model.embed_positions.weight"]
        narrow = weights.get("model.meta_embed_positions.weight", table)
        main = [x + table[t] for t, x in enumerate(main)]
        metas = [[x + narrow[t] for t, x in enumerate(stream)] for stream in metas]
    for layer in range(d.layers):
        main, metas = _layer(weights, main, metas, layer, d)
    main = [_layer_norm(weights, "model.norm", x, d) for x in main]
    metas = [[_layer_norm(weights, f"model.meta_norms.{a}", x, d) for x in s] for a, s in enumerate(metas)]
    return [main, *metas]


def _layer(weights, main, metas, layer, d):
    name = f"model.layers.{layer}"
    main = _block(weights, f"{name}.self_block", main, None, layer, d.heads, d)
    metas = [
        _block(weights, f"{name}.meta_self_blocks.{a}", stream, None, layer, d.meta_heads, d)
        for a, stream in enumerate(metas)
    ]
    mains = [
        _block(weights, f"{name}.main_cross_blocks.{a}", main, stream, layer, d.meta_heads, d)
        for a, stream in enumerate(metas)
    ]
    metas = [
        _block(weights, f"{name}.meta_cross_blocks.{a}", stream, main, layer, d.meta_heads, d)
        for a, stream in enumerate(metas)
    ]
    merged = []
    for t, x in enumerate(main):
        for weight, read in zip(d.axis_weights, mains):
            x = x + weight * (read[t] - main[t])
        merged.append(x)
    return merged, metas


def _block(weights, name, stream, other, layer, heads, d):
    """Mixing of a stream with its own past, or with that of another stream, then a feed-forward; both are residual."""
    normed = [_layer_norm(weights, f"{name}.input_layernorm", x, d) for x in stream]
    source = None
    if other is not None:
        source = [_layer_norm(weights, f"{name}.key_value_layernorm", x, d) for x in other]
    mix = {"transformer": _attention, "leap": _leap, "lstm": _lstm}[d.core]
    stream = [x + y for x, y in zip(stream, mix(weights, f"{name}.mixer", normed, source, layer, heads, d))]
    if other is not None and not d.cross_feed_forward:
        return stream
    return [x + _feed_forward(weights, name, x, d) for x in stream]


def _linear(weights, name, x):
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _layer_norm(weights, name, x, d):
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + d.layer_norm_eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _feed_forward(weights, name, x, d):
    y = _linear(weights, f"{name}.mlp.up_proj", _layer_norm(weights, f"{name}.post_attention_layernorm", x, d))
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)))
    return _linear(weights, f"{name}.mlp.down_proj", y)


def _cross_entropy(logits, ids):
    terms = [torch.logsumexp(logits[t], 0) - logits[t][ids[t + 1]] for t in range(len(ids) - 1)]
    return sum(terms) / len(terms)


# --- how positions mix: attention --------------------------------------------------------------------------------------


def _attention(weights, name, stream, other, layer, heads, d):
    if other is None:
        qkv = [_linear(weights, f"{name}.qkv_proj", x).chunk(3) for x in stream]
        queries, keys, values = ([parts[i] for parts in qkv] for i in range(3))
    else:
        queries = [_linear(weights, f"{name}.q_proj", x) for x in stream]
        kv = [_linear(weights, f"{name}.kv_proj", x).chunk(2) for x in other]
        keys, values = ([parts[i] for parts in kv] for i in range(2))
    out = []
    for t, query in enumerate(queries):
        read = []
        for head, q in enumerate(query.chunk(heads)):
            logits = torch.stack([q @ keys[j].chunk(heads)[head] for j in range(t + 1)]) / math.sqrt(len(q))
            chances = torch.softmax(logits, 0)
            read.append(sum(chances[j] * values[j].chunk(heads)[head] for j in range(t + 1)))
        out.append(_linear(weights, f"{name}.o_proj", torch.cat(read)))
    return out
