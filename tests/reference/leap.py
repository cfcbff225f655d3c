"""LEAP from its description, token by token and head by head: slow, obvious, and independent of the package.

`leap_logits` takes a state dict of a `LeapForCausalLM` or `LeapForMaskedLM` and plain numbers, and works in the dtype of
the weights. Nothing here is vectorised over positions or heads.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class LeapDescription:
    """The numbers that make a LEAP model; names and meaning as in the model's configuration."""

    heads: int
    windows: list
    mixer: str = "focus"
    weight: str = "elu"
    rescale: float | None = 10.0
    gate: str = "sigmoid"
    positions: str = "rotary"
    rope_theta: float = 10000.0
    sink_weight: float = 0.0
    causal: bool = True
    layer_norm_eps: float = 1e-5


def leap_logits(
    weights: dict[str, torch.Tensor],
    ids: list[list[int]],
    description: LeapDescription,
    real: list[list[bool]] | None = None,
    sequences: list[list[int]] | None = None,
) -> torch.Tensor:
    """Logits `[rows, tokens, vocabulary]`, NaN at pads.

    Args:
        weights: the state dict.
        ids: token ids, rows of equal length.
        description: see `LeapDescription`.
        real: which tokens are no pads; all when not given.
        sequences: of packed rows, the number of the sequence that each token belongs to; one when not given.
    """
    rows = []
    for row, tokens in enumerate(ids):
        here = real[row] if real is not None else [True] * len(tokens)
        sequence = sequences[row] if sequences is not None else [0] * len(tokens)
        rows.append(_row_logits(weights, tokens, description, here, sequence))
    return torch.stack(rows)


def _row_logits(weights, tokens, description, real, sequence):
    positions = _positions(real, sequence)
    stream = []
    for token, position in zip(tokens, positions):
        x = weights["model.embed_tokens.weight"][token]
        if description.positions == "absolute":
            x = x + weights["model.embed_positions.weight"][position]
        stream.append(x)
    for layer, window in enumerate(description.windows):

        def parameter(name, layer=layer):
            return weights[f"model.layers.{layer}.{name}"]

        normed = [_layer_norm(x, parameter, "input_layernorm", description) for x in stream]

        def sees(i, j, window=window):
            near = window is None or abs(i - j) < window
            return near and real[j] and sequence[i] == sequence[j] and (j <= i or not description.causal)

        mix = _focus_layer if description.mixer == "focus" else _additive_layer
        mixed = mix(normed, parameter, description, positions, sees)
        stream = [x + m for x, m in zip(stream, mixed)]
        for i, x in enumerate(stream):
            y = _layer_norm(x, parameter, "post_attention_layernorm", description)
            y = parameter("mlp.up_proj.weight") @ y + parameter("mlp.up_proj.bias")
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            stream[i] = x + parameter("mlp.down_proj.weight") @ y + parameter("mlp.down_proj.bias")
    logits = []
    for i, x in enumerate(stream):
        x = _layer_norm(x, lambda name: weights[f"model.{name}"], "norm", description)
        x = weights["lm_head.weight"] @ x
        logits.append(x if real[i] else torch.full_like(x, math.nan))
    return torch.stack(logits)


def _positions(real, sequence):
    """The number of real tokens before each token in its own sequence."""
    positions, count = [], 0
    for i, is_real in enumerate(real):
        count = 0 if i and sequence[i] != sequence[i - 1] else count
        positions.append(count)
        count += is_real
    return positions


def _layer_norm(x, parameter, name, description):
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / torch.sqrt(variance + description.layer_norm_eps) * parameter(f"{name}.weight") + parameter(
        f"{name}.bias"
    )


def _standardize(x):
    centred = x - x.sum() / len(x)
    return centred / (torch.sqrt((centred * centred).sum() / (len(x) - 1)) + 1e-5)


def _scale(size, description):
    return description.rescale / size if description.rescale is not None else 1 / math.sqrt(size)


def _weight(logit, description):
    if description.weight == "exp":
        return math.exp(logit)
    return math.exp(logit) if logit < 0 else 1 + logit


def _mean(i, head, vectors, token_weights, description, sees):
    """Weighted mean of the vectors that token `i` sees; the null token adds to the denominator only."""
    seen = [j for j in range(len(vectors)) if sees(i, j)]
    present = [token_weights[j] for j in seen]
    if description.positions == "alibi":
        slope = 2 ** (-8 * (head + 1) / description.heads)
        present = [weight * math.exp(-slope * abs(i - j)) for weight, j in zip(present, seen)]
    total = sum(present) + description.sink_weight
    if not seen:
        return torch.zeros_like(vectors[i])
    return torch.stack([vectors[j] for j in seen]).T @ vectors[i].new_tensor(present) / total


def _rotate(x, position, description):
    """Channel `c` turns together with channel `c + size / 2`."""
    half, y = len(x) // 2, x.clone()
    for c in range(half):
        angle = position * description.rope_theta ** (-2 * c / len(x))
        y[c] = x[c] * math.cos(angle) - x[c + half] * math.sin(angle)
        y[c + half] = x[c + half] * math.cos(angle) + x[c] * math.sin(angle)
    return y


def _gate(alignment, description):
    if description.gate == "sigmoid":
        return 1 / (1 + math.exp(-alignment))
    return alignment * 0.5 * (1 + math.erf(alignment / math.sqrt(2)))


def _heads(x, parts, description):
    """A projected token as `parts` lists of one vector a head."""
    return [list(part.chunk(description.heads)) for part in x.chunk(parts)]


def _focus_layer(stream, parameter, description, positions, sees):
    gated = description.gate != "none"  # else there are no queries
    tokens = [_heads(parameter("mixer.qfkv_proj.weight") @ x, 3 + gated, description) for x in stream]
    outputs = [[] for _ in stream]
    for head in range(description.heads):
        q, f, k, v = ([token[part - (not gated)][head] for token in tokens] for part in range(4))
        if description.rescale is not None:
            q, f, k, v = ([_standardize(x) for x in part] for part in (q, f, k, v))
        scale = _scale(len(v[0]), description)
        token_weights = [_weight(scale * float(a @ b), description) for a, b in zip(f, k)]
        if description.positions == "rotary":
            q, k = ([_rotate(x, p, description) for x, p in zip(part, positions)] for part in (q, k))
        for i in range(len(stream)):
            out = _mean(i, head, v, token_weights, description, sees)
            if gated:
                kbar = _mean(i, head, k, token_weights, description, sees)
                out = _gate(scale * float(q[i] @ kbar), description) * out
            outputs[i].append(out)
    return [torch.cat(output) for output in outputs]


def _additive_layer(stream, parameter, description, positions, sees):
    tokens = [_heads(parameter("mixer.qkv_proj.weight") @ x, 3, description) for x in stream]
    outputs = [[] for _ in stream]
    for head in range(description.heads):
        q, k, v = ([token[part][head] for token in tokens] for part in range(3))

        def pool(vectors, vector, head=head):
            if description.rescale is not None:
                vectors, vector = [_standardize(x) for x in vectors], _standardize(vector)
            scale = _scale(len(vector), description)
            token_weights = [_weight(scale * float(x @ vector), description) for x in vectors]
            return [_mean(i, head, vectors, token_weights, description, sees) for i in range(len(vectors))]

        pooled_queries = pool(q, parameter("mixer.query_vector")[head])
        pooled_keys = pool([a * b for a, b in zip(pooled_queries, k)], parameter("mixer.key_vector")[head])
        for i in range(len(stream)):
            outputs[i].append(pooled_keys[i] * v[i])
    return [torch.cat(output) for output in outputs]
