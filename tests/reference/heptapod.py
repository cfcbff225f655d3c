"""The Heptapod grid from its description, cell by cell and head by head: slow, obvious, and independent of the package.

`heptapod_logits` takes a state dict of a `HeptapodForMaskedLM` and plain numbers, and works in the dtype of the
weights. Nothing here is vectorised over cells or heads.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class HeptapodDescription:
    """The numbers that make a grid model.

    `layers` holds one pair a layer: the offsets, in rows and in columns, at which a cell sees others (`None`: the whole
    page), for the heads that are not global. The last `global_heads` heads see the whole page in every layer. The others may
    have `spans` and `offset_biases`.
    """

    heads: int
    layers: list
    global_heads: int = 0
    rope_theta: float = 100.0
    borders: bool = True
    layer_norm_eps: float = 1e-5
    spans: bool = False
    offset_biases: bool = False


def window(radius: int, dilation: int = 1) -> list[int]:
    """Offsets of a neighbourhood along one axis."""
    return [dilation * step for step in range(-radius, radius + 1)]


def heptapod_logits(
    weights: dict[str, torch.Tensor],
    pages: list[list[list[int]]],
    description: HeptapodDescription,
    real: list[list[list[bool]]] | None = None,
    self_conditioning_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits `[pages, height, width, vocabulary]`, NaN at pads.

    Args:
        weights: the state dict.
        pages: token ids, rows of equal length.
        description: see `HeptapodDescription`.
        real: which cells are no pads; all when not given.
        self_conditioning_logits: `[pages, height, width, vocabulary]`, for models that read their last prediction.
    """
    out = []
    for number, page in enumerate(pages):
        cells = [(y, x) for y in range(len(page)) for x in range(len(page[0]))]
        here = {(y, x): real is None or real[number][y][x] for y, x in cells}
        before = None if self_conditioning_logits is None else self_conditioning_logits[number]
        out.append(_page_logits(weights, page, cells, description, here, before))
    return torch.stack(out)


def _page_logits(weights, page, cells, description, real, before):
    table = weights["model.embed_tokens.weight"]
    stream = {}
    for y, x in cells:
        stream[y, x] = table[page[y][x]]
        if before is not None:
            share = before[y, x].exp() / before[y, x].exp().sum()
            guess = sum(share[token] * table[token] for token in range(len(table)))
            stream[y, x] = stream[y, x] + weights["self_conditioning_proj.weight"] @ guess
        if description.borders:
            features = _distances(y, x, [cell for cell in cells if real[cell]], description.rope_theta)
            stream[y, x] = stream[y, x] + weights["model.embed_positions.proj.weight"] @ features.to(table)
    for layer, offsets in enumerate(description.layers):

        def parameter(name, layer=layer):
            return weights[f"model.layers.{layer}.{name}"]

        normed = {cell: _layer_norm(stream[cell], parameter, "input_layernorm", description) for cell in cells}
        attended = _attention(normed, parameter, cells, description, offsets, real)
        for cell in cells:
            stream[cell] = stream[cell] + parameter("self_attn.o_proj.weight") @ attended[cell]
            y = _layer_norm(stream[cell], parameter, "post_attention_layernorm", description)
            y = parameter("mlp.up_proj.weight") @ y + parameter("mlp.up_proj.bias")
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            stream[cell] = stream[cell] + parameter("mlp.down_proj.weight") @ y + parameter("mlp.down_proj.bias")
    logits = []
    for cell in cells:
        z = _layer_norm(stream[cell], lambda name: weights[f"model.{name}"], "norm", description)
        z = weights["lm_head.weight"] @ z
        logits.append(z if real[cell] else torch.full_like(z, math.nan))
    return torch.stack(logits).view(len(page), len(page[0]), -1)


def _distances(y, x, page, theta):
    """Sines, then cosines, of the distances to top, bottom, left and right of the page, at eight frequencies each."""
    rows, columns = [row for row, _ in page], [column for _, column in page]
    distances = y - min(rows), max(rows) - y, x - min(columns), max(columns) - x
    angles = [distance * theta ** (-step / 8) for distance in distances for step in range(8)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]) / math.sqrt(32)


def _layer_norm(x, parameter, name, description):
    centred = x - x.mean()
    normed = centred / torch.sqrt(centred.square().mean() + description.layer_norm_eps)
    return normed * parameter(f"{name}.weight") + parameter(f"{name}.bias")


def _attention(normed, parameter, cells, description, offsets, real):
    projected = {cell: (parameter("self_attn.qkv_proj.weight") @ normed[cell]).chunk(3) for cell in cells}
    out = {cell: [] for cell in cells}
    for head in range(description.heads):
        q, k, v = ({cell: projected[cell][part].chunk(description.heads)[head] for cell in cells} for part in range(3))
        q, k = ({cell: _turn(part[cell], cell, description) for cell in cells} for part in (q, k))
        everywhere = offsets is None or head >= description.heads - description.global_heads
        for y, x in cells:
            span = math.inf
            if description.spans and not everywhere:
                raw = (
                    parameter("self_attn.span_proj.weight")[head] @ normed[y, x]
                    + parameter("self_attn.span_proj.bias")[head]
                )
                span = (len(offsets) // 2) / (1 + math.exp(-float(raw)))
            seen = [
                (row, column)
                for row, column in cells
                if real[row, column] and (everywhere or (row - y in offsets and column - x in offsets))
            ]
            factors = [math.exp(float(q[y, x] @ k[cell]) / math.sqrt(len(q[y, x]))) for cell in seen]
            for number, (row, column) in enumerate(seen):
                if everywhere:
                    continue
                place = offsets.index(row - y), offsets.index(column - x)
                away = max(abs(at - len(offsets) // 2) for at in place)
                factors[number] *= min(1, max(0, span + 1 - away))
                if description.offset_biases:
                    factors[number] *= math.exp(float(parameter("self_attn.relative_position_bias")[head][place]))
            mixed = sum((factor * v[cell] for factor, cell in zip(factors, seen)), torch.zeros_like(v[y, x]))
            out[y, x].append(mixed / sum(factors) if seen else mixed)
    return {cell: torch.cat(parts) for cell, parts in out.items()}


def _turn(x, cell, description):
    """The first half of a head's channels turns with the row, the second half with the column."""
    halves = []
    for half, place in zip(x.chunk(2), cell):
        pairs, y = len(half) // 2, half.clone()
        for c in range(pairs):
            angle = place * description.rope_theta ** (-c / pairs)
            y[c] = half[c] * math.cos(angle) - half[c + pairs] * math.sin(angle)
            y[c + pairs] = half[c + pairs] * math.cos(angle) + half[c] * math.sin(angle)
        halves.append(y)
    return torch.cat(halves)
