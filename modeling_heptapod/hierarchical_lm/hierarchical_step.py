"""One token through all layers of the hierarchical LM in one call of C, with which a CPU decodes.

Whatever changes what a layer does is left to the layers: see `plain_modules.py`. Graphs of `torch.compile` contain the call as the
registered operator `heptapod::hierarchical_step`.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.plain_modules import are_plain, keep, look_once
from ..common.registered_operators import in_graph, operator_namespace, register_for_cpu
from ..common.step_program import ACTIVATIONS, MOST_ROWS, Slots, StepProgram, lie_as_expected, load_steps
from .configuration_hierarchical_lm import HierarchicalLMConfig
from .stream_plan import HierarchicalLMContext
from .windowed_attention import first_key


NAMESPACE = operator_namespace(__name__)
_NORMS: dict[type, str] = {nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm"}


class Stream(NamedTuple):
    """A stream as a program sees it, the same in all layers.

    Attributes:
        width, inner (`int`): channels of the stream and of the feed-forward between.
        heads, head_dim (`int`), scale (`float`): of attention. Without it `heads` is 0.
        norm (`str`): kind of the norm before attention.
        epsilon, post_epsilon (`float`): of the norms before attention and feed-forward.
        owner (`int`): index of the stream whose attention has the weights.
        stride, dilation (`int`): of the hierarchy.
    """

    width: int
    inner: int
    heads: int
    head_dim: int
    scale: float
    norm: str
    epsilon: float
    post_epsilon: float
    owner: int
    stride: int
    dilation: int


class Layers(NamedTuple):
    """The layers of a model as a program sees them.

    Attributes:
        number (`int`): of layers.
        streams (`tuple[Stream, ...]`): of all hierarchies.
        receivers (`tuple[int, ...]`): indices of the streams that the merge changes. None without a merge.
        epsilon (`float`): of the merge.
        activation (`int`): of the feed-forwards.
        text (`str`): the other fields as JSON, for an operator.
    """

    number: int
    streams: tuple[Stream, ...]
    receivers: tuple[int, ...]
    epsilon: float
    activation: int
    text: str


@lru_cache(maxsize=64)
def _from_text(text):
    number, streams, receivers, epsilon, activation = json.loads(text)
    return Layers(number, tuple(Stream(*one) for one in streams), tuple(receivers), epsilon, activation, text)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that a program can stand for
# ---------------------------------------------------------------------------------------------------------------------


def describe_layers(
    layers: nn.ModuleList, config: HierarchicalLMConfig, forwards: dict[type, Callable]
) -> Layers | None:
    """What a program sees of layers that do nothing but what it computes, `None` for others.

    Args:
        layers (`nn.ModuleList`): of `HierarchicalLMModel`. `step_layers` looks at their weights.
        config (`HierarchicalLMConfig`): of the model.
        forwards (`dict[type, Callable]`): classes of a layer, its block, attention, MLP and merge, with their `forward` that is
            known here.
    """
    return look_once(layers, ("eps", "scaling"), lambda: _describe(layers, config, forwards))


def _describe(layers, config, forwards):
    if load_steps() is None or not are_plain(layers, forwards):
        return None
    seen = {_see(layer, config, *forwards) for layer in layers}
    fields = seen.pop()
    return None if seen or fields is None else _from_text(json.dumps((len(layers), *fields)))


def _see(layer, config, layer_class, block_class, attention_class, mlp_class, merge_class):
    """The fields of `Layers` but their number, from one of them, or `None`."""
    merge, blocks = layer.merge, list(layer.blocks)
    if type(layer) is not layer_class or {type(block) for block in blocks} != {block_class}:
        return None
    if {type(block.mlp) for block in blocks} != {mlp_class} or not _is_known(merge, merge_class):
        return None
    streams = []
    for h, (block, owner) in enumerate(zip(blocks, layer.owners)):
        attention = blocks[owner].self_attn if block.has_attention else None
        if attention is not None and type(attention) is not attention_class:
            return None
        streams.append(_see_block(block, attention, owner, config.strides[h], config.dilations[h]))
    activations = {type(block.mlp.act_fn) for block in blocks}
    if None in streams or len(activations) != 1 or not activations <= ACTIVATIONS.keys():
        return None
    receivers, epsilon = ((), 0.0) if merge is None else (tuple(merge.receivers), merge.eps)
    return tuple(streams), receivers, epsilon, ACTIVATIONS[activations.pop()]


def _is_known(merge, merge_class):
    if merge is None:
        return True
    down = merge.down_proj if type(merge) is merge_class else None
    return type(down) is nn.Linear and down.bias is not None and _are_linear(*merge.up_projs)


def _see_block(block, attention, owner, stride, dilation):
    norm, after, up, down = None, block.post_attention_layernorm, block.mlp.up_proj, block.mlp.down_proj
    if type(after) is not nn.RMSNorm or not _are_linear(up, down):
        return None
    heads, head_dim, scale, kind, epsilon = 0, 0, 1.0, "", after.eps
    if attention is not None:
        norm = block.input_layernorm
        if type(norm) not in _NORMS or not _are_linear(attention.qkv_proj, attention.o_proj):
            return None
        heads, head_dim, scale = attention.num_heads, attention.head_dim, attention.scaling
        kind, epsilon = _NORMS[type(norm)], norm.eps
    has_weights = norm is None or (norm.weight is not None and getattr(norm, "bias", norm.weight) is not None)
    if after.weight is None or not has_weights or None in (epsilon, after.eps):
        return None
    sizes: Any = up.in_features, up.out_features, heads, head_dim, scale
    return Stream(*[*sizes, kind, epsilon, after.eps, 0 if owner is None else owner, stride, dilation])


def _are_linear(*modules):
    return all(type(module) is nn.Linear and module.bias is None for module in modules)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _make_program(layers: Layers, batch: int, active: tuple[bool, ...], rotary_rows: tuple[int, ...]) -> StepProgram:
    """The program for streams that have a step at the token where they are `active`.

    Its tensors are the token, cosines and sines of each active stream with attention, the weights, and the states.
    """
    streams = layers.streams
    shapes = list(_weight_shapes(layers, active))
    program = StepProgram(batch, shapes)
    token = program.tensor("hidden_states", batch, 1, sum(stream.width for stream in streams))
    turns: dict[int, list[int]] = {}
    for h, number in enumerate(rotary_rows):
        if number:
            shape = number, streams[h].head_dim
            turns[h] = [program.tensor("rotary", *shape, dtype=torch.float32) for _ in range(2)]
    weights = iter(range(len(shapes)))
    states = iter([program.tensor("past_key_values", *shape) for shape in _state_shapes(layers, batch, active)])
    hidden, places = program.rows(sum(stream.width for stream in streams)), []
    start = 0
    for stream in streams:
        places.append(hidden.part(start, stream.width))
        start += stream.width
    rows = _Rows(program, layers)
    program.load(token, hidden)
    for _ in range(layers.number):
        for h, stream in enumerate(streams):
            if active[h]:
                _add_block(program, rows, places[h], stream, turns.get(h), layers.activation, weights, states)
        if layers.receivers:
            _add_merge(program, rows, hidden, places, layers, active, weights, states)
    program.store(token, hidden)
    return program.compile()


class _Rows:
    """Rows between the operations of a block."""

    def __init__(self, program, layers):
        streams = layers.streams
        self.normed = program.rows(max(stream.width for stream in streams))
        self.qkv = program.rows(3 * max(stream.heads * stream.head_dim for stream in streams))
        self.mixed = program.rows(max(stream.heads * stream.head_dim for stream in streams))
        self.between = program.rows(max(stream.inner for stream in streams))
        self.up = program.rows(_merge_width(layers))


def _merge_width(layers):
    return 2 * sum(layers.streams[h].width for h in layers.receivers)


def _weight_shapes(layers, active) -> Iterator[tuple[int, ...]]:
    """Shapes of the weights of all layers, in the order of `_weights`."""
    up = _merge_width(layers)
    for _ in range(layers.number):
        for stream, is_active in zip(layers.streams, active):
            if not is_active:
                continue
            width, inner, attended = stream.width, stream.inner, stream.heads * stream.head_dim
            if attended:
                yield from [(width,)] * (2 if stream.norm == "layer_norm" else 1)
                yield from ((3 * attended, width), (width, attended))
            yield from ((width,), (inner, width), (width, inner))
        if layers.receivers:
            yield from ((up, stream.width) for stream in layers.streams)
            yield from ((up,), (up // 2, up), (up // 2,))


def _weights(layers: nn.ModuleList, active) -> Iterator[torch.Tensor]:
    modules: list[Any] = list(layers)
    for layer in modules:
        blocks, merge = layer.blocks, layer.merge
        for block, owner, is_active in zip(blocks, layer.owners, active):
            if not is_active:
                continue
            if block.has_attention:
                attention, norm = blocks[owner].self_attn, block.input_layernorm
                yield norm.weight
                if type(norm) is nn.LayerNorm:
                    yield norm.bias
                yield attention.qkv_proj.weight
                yield attention.o_proj.weight
            yield block.post_attention_layernorm.weight
            yield block.mlp.up_proj.weight
            yield block.mlp.down_proj.weight
        if merge is not None:
            for module in merge.up_projs:
                yield module.weight
            yield merge.up_bias
            yield merge.down_proj.weight
            yield merge.down_proj.bias


def _state_shapes(layers, batch, active) -> Iterator[tuple[int | None, ...]]:
    """Shapes of the states of all layers, in the order of `_State`."""
    for _ in range(layers.number):
        for stream, is_active in zip(layers.streams, active):
            if not is_active:
                continue
            shift = batch, stream.dilation, stream.width // 2
            if stream.heads:
                yield from (shift, *[(batch, stream.heads, None, stream.head_dim)] * 2)
            yield shift
        if layers.receivers:
            yield from ((batch, 1, stream.width) for stream in layers.streams if stream.stride > 1)


def _add_block(program, rows, x, stream, rotary, activation, weights, states):
    attended = stream.heads * stream.head_dim
    normed, between = rows.normed._replace(width=x.width), rows.between._replace(width=stream.inner)
    if attended:
        norm = next(weights), next(weights) if stream.norm == "layer_norm" else None, stream.epsilon, stream.norm
        program.shifted_norm(x, normed, *norm, next(states), stream.dilation)
        qkv, mixed = rows.qkv._replace(width=3 * attended), rows.mixed._replace(width=attended)
        program.linear(normed, qkv, next(weights))
        query, key_value = qkv.part(0, attended), qkv.part(attended, 2 * attended)
        program.attend(query, key_value, mixed, next(states), next(states), stream.heads, stream.scale, rotary)
        program.linear(mixed, x, next(weights), adds=True)
    norm = next(weights), None, stream.post_epsilon, "rms_norm"
    program.shifted_norm(x, normed, *norm, next(states), stream.dilation)
    program.linear(normed, between, next(weights), activation=activation)
    program.linear(between, x, next(weights), adds=True)


def _add_merge(program, rows, hidden, places, layers, active, weights, states):
    """The merge, after the step that a token reads was kept or fetched in streams with a stride."""
    for x, stream, is_active in zip(places, layers.streams, active):
        if stream.stride > 1:
            (program.store if is_active else program.load)(next(states), x)
    for h, x in enumerate(places):
        program.linear(x, rows.up, next(weights), adds=h > 0)
    program.gate(hidden, rows.up, next(weights), layers.epsilon)
    weight, bias, first = next(weights), next(weights), 0
    for h in layers.receivers:
        if active[h]:
            program.linear(rows.up, places[h], weight, bias, adds=True, first=first)
        first += places[h].width


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def step_layers(
    layers: nn.ModuleList,
    known: Layers,
    config: HierarchicalLMConfig,
    streams: list[torch.Tensor],
    context: HierarchicalLMContext,
    cache: Any,
) -> list[torch.Tensor] | None:
    """All streams after all layers for one more token, which is added to the cache.

    Args:
        layers (`nn.ModuleList`): of `HierarchicalLMModel`.
        known (`Layers`): of `describe_layers`.
        config (`HierarchicalLMConfig`): of the model.
        streams (`list[torch.Tensor]` of shape `[batch, 1 or 0, width]`): before the first layer. Without a step there is none.
        context (`HierarchicalLMContext`): of a pass of one token, which continues the cache.
        cache (`HierarchicalCache` or `StaticHierarchicalCache`): checked.

    Returns:
        The streams, or `None`, with the cache unchanged, where the layers are to be called.

    Raises:
        MemoryError: if there is no memory for a token.
    """
    active = tuple(plan.steps > 0 for plan in context.streams)
    token = torch.cat([x if x.shape[1] else x.new_zeros(len(x), 1, x.shape[2]) for x in streams], dim=-1)
    if not _is_token_of_all_rows(token, context):
        return None
    rotary = [x.reshape(-1, x.shape[-1]).float() for plan in context.streams for x in plan.rotary or ()]
    if in_graph():
        weights = list(_weights(layers, active))
        if not lie_as_expected(weights, list(_weight_shapes(known, active)), token.dtype):
            return None
    else:
        program = _find_program(known, len(token), active, rotary)
        kept = keep(layers, active, lambda: list(_weights(layers, active)))
        weights = program.addresses_of_weights(kept, token.dtype)
        if weights is None:
            return None
    if context.is_static_step:
        windows = [-1 if plan.window is None else plan.window for plan in context.streams]
        states = [_read(cache, *place) for place in _state_places(known, active)]
        where = context.past_lengths, cache.ring_sizes, windows, config.window_type == "block"
        if in_graph():
            token = _operator(token, states, weights, rotary, *where, known.text, list(active))
        else:
            token = _run(program, token, states, weights, rotary, _static_slots(*where, known, active))
    else:
        if any(cache.steps_cached(h) == 0 for h, stream in enumerate(known.streams) if stream.heads):
            return None
        token = _dynamic_step(program, token, cache, weights, rotary, context, known, active)
    parts = token.split([stream.width for stream in known.streams], dim=-1)
    return [x if is_active else empty for x, empty, is_active in zip(parts, streams, active)]


def _is_token_of_all_rows(token, context):
    """Whether all rows have the token, at the same place, in a pass that C takes."""
    plans = context.streams
    if len(token) > MOST_ROWS or token.dtype not in (torch.float32, torch.bfloat16) or context.layout is not None:
        return False
    if any(x is not None for plan in plans for x in (plan.rows, plan.counts, plan.segments)):
        return False
    if context.is_static_step:
        return context.past_lengths.dim() == 0
    return len(set(context.past_lengths)) == 1 and all(plan.mask is None for plan in plans)


def _state_places(layers, active):
    """Kind, layer of the cache and index of the states of all layers, in the order of `_state_shapes`."""
    streams = list(enumerate(zip(layers.streams, active)))
    for layer in range(layers.number):
        at = layer * len(streams)
        for h, (stream, is_active) in streams:
            if is_active and stream.heads:
                yield from (("conv", at + h, 0), ("keys", at + h, 0), ("values", at + h, 0))
            if is_active:
                yield "conv", at + h, 1
        if layers.receivers:
            yield from (("last", at + h, 0) for h, (stream, _) in streams if stream.stride > 1)


def _read(cache, kind, place, index):
    layer = cache.layers[place]
    if kind == "conv":
        return layer.conv_states[index]
    return layer.recurrent_states[index] if kind == "last" else getattr(layer, kind)


def _dynamic_step(program, token, cache, weights, rotary, context, layers, active):
    """The step with new states, which replace those of the cache: results that were returned may share memory with the old ones."""
    number, changed, states, slots = len(layers.streams), [], [], []
    for kind, place, index in _state_places(layers, active):
        state, h = _read(cache, kind, place, index), place % number
        if kind == "keys":
            (state, values), end, length = cache.make_room(place)
            first = first_key(length + 1, context.streams[h].keys_seen, layers.streams[h].dilation)
            step = layers.streams[h].dilation
            slots.append(Slots(end, end - length + first, 0, step, state.shape[2], (length - first) // step + 1))
        elif kind == "values":
            state = values
        elif kind == "conv" or active[h]:
            state = state.clone(memory_format=torch.contiguous_format)
            changed.append((kind, place, index, state))
        states.append(state.contiguous())
    token = _run(program, token, states, weights, rotary, slots)
    for kind, place, index, state in changed:
        (cache.write_conv if kind == "conv" else cache.write_recurrent)(state, place, index)
    return token


def _static_slots(past_length, rings, windows, is_block, layers, active):
    """The slots of a step in memory that stays where it is."""
    past, slots = int(past_length), []
    for stream, is_active, ring, window in zip(layers.streams, active, rings, windows):
        if is_active and stream.heads:
            slots.append(_slots_of_ring(past // stream.stride, stream.dilation, ring, window if is_block else -1))
    return slots * layers.number


def _slots_of_ring(step, dilation, ring, block):
    """The slots of a step in the memory of a static cache, whose phases have `ring` keys. With a `block` above 0 two are read."""
    phase, position = step % dilation * ring, step // dilation
    first = max(0, position - ring + 1)
    if block > 0:
        first = max(first, (position // block - 1) * block)
    return Slots(phase + position % ring, phase, first, 1, ring, position - first + 1)


def _find_program(layers, batch, active, rotary):
    rows, given = [], iter(rotary[::2])
    for stream, is_active in zip(layers.streams, active):
        rows.append(len(next(given)) if is_active and stream.heads else 0)
    return _make_program(layers, batch, active, tuple(rows))


def _run(program, token, states, weights, rotary, slots):
    token = token.clone(memory_format=torch.contiguous_format)
    program.run([token, *rotary, *states], weights, token.dtype, slots)
    return token


def _on_cpu(
    token: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    rotary: list[torch.Tensor],
    past_length: torch.Tensor,
    rings: list[int],
    windows: list[int],
    is_block: bool,
    layers: str,
    active: list[bool],
) -> torch.Tensor:
    known, has_step = _from_text(layers), tuple(active)
    program = _find_program(known, len(token), has_step, rotary)
    slots = _static_slots(past_length, rings, windows, is_block, known, has_step)
    return _run(program, token, states, program.addresses_of_weights(weights, token.dtype), rotary, slots)


def _without_memory(token, *_):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


_operator = register_for_cpu(f"{NAMESPACE}::hierarchical_step", _on_cpu, _without_memory, ("states",))

__all__ = ["NAMESPACE", "Layers", "Stream", "describe_layers", "step_layers"]
