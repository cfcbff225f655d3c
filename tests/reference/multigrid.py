"""MultiGrid from the prototype's description, token by token and head by head: slow, obvious, and independent of the package.

`multigrid_streams`, `multigrid_logits` and `multigrid_losses` take a state dict of a `MultiGridForCausalLM` and plain numbers,
and work in the dtype of the weights. Every sequence is computed on its own: nothing here knows batches, pads, packed rows or
caches, and each axis is a loop of its own. It is differentiable.

The wiring of a layer, with the main stream and one stream for each axis:

    1. every stream mixes its own past, then passes a feed-forward
    2. at the same time, from what 1 made: the main stream reads each axis stream, each axis stream reads the main stream
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
    axis_heads: int
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


def multigrid_losses(weights: dict, ids: list, axis_ids: list, d: GridDescription) -> tuple:
    """The loss, that of the main axis and those of the axes of one sequence: each token predicts the next one."""
    logits, axis_logits = multigrid_logits(weights, ids, axis_ids, d)
    main = _cross_entropy(logits, ids)
    metas = [_cross_entropy(logits, track) for logits, track in zip(axis_logits, axis_ids)]
    if not metas:
        return main, main, []
    return d.main_loss_weight * main + (1 - d.main_loss_weight) * sum(metas) / len(metas), main, metas


def multigrid_logits(weights: dict, ids: list, axis_ids: list, d: GridDescription, next_axis_ids: list | None = None):
    """Logits of one sequence.

    Args:
        weights: the state dict.
        ids: main token ids.
        axis_ids: for each axis the axis ids of the same tokens.
        d: see `GridDescription`.
        next_axis_ids: in the factored order, for each axis the axis id of the token after the last one; where it is not
            known, the last token is predicted without it.

    Returns:
        Those of the main axis, `[len(ids), vocabulary]`, and a list of those of each axis.
    """
    main, *metas = multigrid_streams(weights, ids, axis_ids, d)
    if d.factored:
        nexts = [[track[t] for track in axis_ids] for t in range(1, len(ids))] + [next_axis_ids]
        main = [_condition(weights, x, after, d) for x, after in zip(main, nexts)]
    main_logits = torch.stack([weights["lm_head.weight"] @ x for x in main])
    axis_logits = []
    for a, stream in enumerate(metas):
        axis_logits.append(torch.stack([weights[f"axis_lm_heads.{a}.weight"] @ x for x in stream]))
    return main_logits, axis_logits


def multigrid_streams(weights: dict, ids: list, axis_ids: list, d: GridDescription) -> list:
    """The normalised final states of one sequence: lists of vectors, the main stream first."""
    main = [weights["model.embed_tokens.weight"][token] for token in ids]
    metas = [[weights[f"model.axis_embed_tokens.{a}.weight"][i] for i in track] for a, track in enumerate(axis_ids)]
    if d.core == "transformer":
        table = weights["model.embed_positions.weight"]
        narrow = weights.get("model.axis_embed_positions.weight", table)
        main = [x + table[t] for t, x in enumerate(main)]
        metas = [[x + narrow[t] for t, x in enumerate(stream)] for stream in metas]
    for layer in range(d.layers):
        main, metas = _layer(weights, main, metas, layer, d)
    main = [_layer_norm(weights, "model.norm", x, d) for x in main]
    metas = [[_layer_norm(weights, f"model.axis_norms.{a}", x, d) for x in s] for a, s in enumerate(metas)]
    return [main, *metas]


def _condition(weights, x, next_axis_ids, d):
    """What predicts a main token in the factored order: the main stream, given the axis ids of that very token."""
    for a, axis_id in enumerate(next_axis_ids or []):
        x = x + weights[f"next_axes.projs.{a}.weight"] @ weights[f"model.axis_embed_tokens.{a}.weight"][axis_id]
    return x + _feed_forward(weights, "next_axes.norm", "next_axes.mlp", x, d)


def _layer(weights, main, metas, layer, d):
    name = f"model.layers.{layer}"
    main = _block(weights, f"{name}.self_block", main, None, layer, d.heads, d)
    metas = [
        _block(weights, f"{name}.axis_self_blocks.{a}", stream, None, layer, d.axis_heads, d)
        for a, stream in enumerate(metas)
    ]
    mains = [
        _block(weights, f"{name}.main_cross_blocks.{a}", main, stream, layer, d.axis_heads, d)
        for a, stream in enumerate(metas)
    ]
    metas = [
        _block(weights, f"{name}.axis_cross_blocks.{a}", stream, main, layer, d.axis_heads, d)
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
    norm, mlp = f"{name}.post_attention_layernorm", f"{name}.mlp"
    return [x + _feed_forward(weights, norm, mlp, x, d) for x in stream]


def _linear(weights, name, x):
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _layer_norm(weights, name, x, d):
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + d.layer_norm_eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _feed_forward(weights, norm, mlp, x, d):
    y = _linear(weights, f"{mlp}.up_proj", _layer_norm(weights, norm, x, d))
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)))
    return _linear(weights, f"{mlp}.down_proj", y)


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


# --- how positions mix: LEAP -------------------------------------------------------------------------------------------


def _leap(weights, name, stream, other, layer, heads, d):
    """Means of keys and values over the window, with weights that the key's own position says, behind a gate."""
    if other is None:
        parts = [_linear(weights, f"{name}.qfkv_proj", x).chunk(4) for x in stream]
    else:
        parts = [
            (_linear(weights, f"{name}.q_proj", x), *_linear(weights, f"{name}.fkv_proj", y).chunk(3))
            for x, y in zip(stream, other)
        ]
    out = []
    for t in range(len(stream)):
        first = 0 if d.windows[layer] is None else max(0, t - d.windows[layer] + 1)
        read = []
        for head in range(heads):
            total, key_sum, value_sum = 0, 0, 0
            for j in range(first, t + 1):
                f, k, v = (_standardize(part.chunk(heads)[head]) for part in parts[j][1:])
                logit = d.rescale / len(k) * (f @ k)
                weight = torch.exp(logit) if logit < 0 else 1 + logit
                total = total + weight
                key_sum, value_sum = key_sum + weight * _rotate(k, j, d), value_sum + weight * v
            q = _rotate(_standardize(parts[t][0].chunk(heads)[head]), t, d)
            gate = torch.sigmoid(d.rescale / len(q) * (q @ key_sum / total))
            read.append(gate * value_sum / total)
        read = torch.cat(read)
        out.append(read if other is None else _linear(weights, f"{name}.o_proj", read))
    return out


def _standardize(x):
    centred = x - x.sum() / len(x)
    return centred / (torch.sqrt((centred * centred).sum() / (len(x) - 1)) + 1e-5)


def _rotate(x, position, d):
    """Channel `c` turns together with channel `c + size / 2`."""
    half = len(x) // 2
    angles = [position * d.rope_theta ** (-2 * c / len(x)) for c in range(half)]
    first = [x[c] * math.cos(angle) - x[c + half] * math.sin(angle) for c, angle in enumerate(angles)]
    second = [x[c + half] * math.cos(angle) + x[c] * math.sin(angle) for c, angle in enumerate(angles)]
    return torch.stack(first + second)


# --- how positions mix: LSTM -------------------------------------------------------------------------------------------


def _lstm(weights, name, stream, other, layer, heads, d):
    """A stream's own past through its state; another stream, whose state knows its past, at the same position."""
    if other is not None:
        out = []
        for x, y in zip(stream, other):
            gate = torch.sigmoid(_linear(weights, f"{name}.gate_proj", x))
            out.append(_linear(weights, f"{name}.o_proj", gate * _linear(weights, f"{name}.value_proj", y)))
        return out
    lstm, out = f"{name}.lstm", []
    hidden = cell = torch.zeros_like(stream[0])
    for x in stream:
        gates = weights[f"{lstm}.weight_ih_l0"] @ x + weights[f"{lstm}.bias_ih_l0"]
        gates = gates + weights[f"{lstm}.weight_hh_l0"] @ hidden + weights[f"{lstm}.bias_hh_l0"]
        enter, forget, new, leave = gates.chunk(4)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        out.append(hidden)
    return out
