"""One token through all layers of MultiGrid in one call of C, with which a CPU decodes with the core "transformer".

Whatever changes what a layer does is left to the layers: see `plain_modules.py`. Graphs of `torch.compile` contain the call as the
registered operator `heptapod::multigrid_step`.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.plain_modules import are_plain, keep, look_once
from ..common.registered_operators import in_graph, operator_namespace, register_for_cpu
from ..common.step_program import ACTIVATIONS, MOST_ROWS, Rows, Slots, StepProgram, lie_as_expected, load_steps
from .multigrid_context import MultiGridContext


NAMESPACE = operator_namespace(__name__)


class Layers(NamedTuple):
    """The layers of a model as a program sees them.

    Attributes:
        number (`int`): of layers.
        widths, inners (`tuple[int, int]`): channels of the main stream and of an axis stream, and of their feed-forwards.
        head_dim (`int`): of all heads.
        shares (`tuple[float, ...]`): share of each axis in what the main stream reads.
        reads_further (`bool`): whether cross blocks have a feed-forward.
        epsilon (`float`): of all norms.
        activation (`int`): of the feed-forwards.
        text (`str`): the other fields as JSON, for an operator.
    """

    number: int
    widths: tuple[int, int]
    inners: tuple[int, int]
    head_dim: int
    shares: tuple[float, ...]
    reads_further: bool
    epsilon: float
    activation: int
    text: str

    @property
    def total(self) -> int:
        """Channels of all streams."""
        return self.widths[0] + len(self.shares) * self.widths[1]


@lru_cache(maxsize=64)
def _from_text(text):
    fields: list[Any] = [tuple(x) if isinstance(x, list) else x for x in json.loads(text)]
    return Layers(*[*fields, text])


# ---------------------------------------------------------------------------------------------------------------------
# Layers that a program can stand for
# ---------------------------------------------------------------------------------------------------------------------


def describe_layers(layers: nn.ModuleList, config, forwards: dict[type, Callable]) -> Layers | None:
    """What a program sees of layers that do nothing but what it computes, `None` for others.

    Args:
        layers (`nn.ModuleList`): of `MultiGridModel`. `step_layers` looks at their weights.
        config (`MultiGridConfig`): of the model.
        forwards (`dict[type, Callable]`): classes of a layer and of all modules within that are not torch's, with their `forward`
            that is known here.
    """
    return look_once(layers, ("eps",), lambda: _describe(layers, config, forwards), config.axis_shares)


def _describe(layers, config, forwards):
    if config.core != "transformer" or load_steps() is None or not are_plain(layers, forwards):
        return None
    blocks = [(block, is_cross) for layer in layers for block, _, is_cross in _blocks_of(layer)]
    modules = [module for block, is_cross in blocks for module in _modules_of(block, is_cross)]
    expected = [kind for block, is_cross in blocks for kind in _classes_of(block, is_cross)]
    if [type(module) for module in modules] != expected:
        return None
    activations = {type(block.mlp.act_fn) for block, _ in blocks if block.mlp is not None}
    epsilons = {module.eps for module in modules if type(module) is nn.LayerNorm}
    if len(activations) != 1 or not activations <= ACTIVATIONS.keys() or len(epsilons) != 1:
        return None
    if any(module.weight is None or module.bias is None for module in modules):
        return None
    fields = (
        len(layers),
        (config.hidden_size, config.axis_hidden_size),
        (config.intermediate_size, config.axis_intermediate_size),
        config.head_dim,
        tuple(config.axis_shares),
        config.cross_feed_forward,
        epsilons.pop(),
        ACTIVATIONS[activations.pop()],
    )
    return _from_text(json.dumps(fields))


def _blocks_of(layer):
    """Blocks of a layer in the order of the program, whether each changes an axis stream, and whether it reads another one."""
    yield layer.self_block, False, False
    for block in layer.axis_self_blocks:
        yield block, True, False
    for main_block, axis_block in zip(layer.main_cross_blocks, layer.axis_cross_blocks):
        yield main_block, False, True
        yield axis_block, True, True


def _kinds(layers):
    """The same without the blocks."""
    axes = len(layers.shares)
    return [(False, False), *[(True, False)] * axes, *[(False, True), (True, True)] * axes]


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def _modules_of(block, is_cross):
    """Modules with weights of a block, in the order of the program."""
    mixer = block.mixer
    modules = [block.input_layernorm]
    if is_cross:
        modules += [block.key_value_layernorm, mixer.q_proj, mixer.kv_proj, mixer.o_proj]
    else:
        modules += [mixer.qkv_proj, mixer.o_proj]
    if block.mlp is not None:
        modules += [block.post_attention_layernorm, block.mlp.up_proj, block.mlp.down_proj]
    return modules


def _classes_of(block, is_cross):
    """Their classes."""
    classes: list[type] = [nn.LayerNorm, nn.LayerNorm, nn.Linear] if is_cross else [nn.LayerNorm]
    classes += [nn.Linear, nn.Linear]
    return classes if block.mlp is None else [*classes, nn.LayerNorm, nn.Linear, nn.Linear]


def _weight_shapes(layers: Layers, is_axis, is_cross) -> Iterator[tuple[int, ...]]:
    """Shapes of weights and biases of a block, in the order of `_modules_of`."""
    width, inner, other, reach = (
        layers.widths[is_axis],
        layers.inners[is_axis],
        layers.widths[not is_axis],
        layers.widths[1],
    )
    norm = [(width,), (width,)]
    yield from norm
    if is_cross:
        yield from (
            (other,),
            (other,),
            (reach, width),
            (reach,),
            (2 * reach, other),
            (2 * reach,),
            (width, reach),
            (width,),
        )
    else:
        yield from ((3 * width, width), (3 * width,), (width, width), (width,))
    if layers.reads_further or not is_cross:
        yield from (*norm, (inner, width), (inner,), (width, inner), (width,))


def _all_weight_shapes(layers):
    return [shape for _ in range(layers.number) for kind in _kinds(layers) for shape in _weight_shapes(layers, *kind)]


class _Writer:
    """Writes the operations of all blocks. `weights` are taken in the order of `_modules_of`."""

    def __init__(self, layers: Layers, program: StepProgram, mask: int | None):
        self.layers, self.program, self.mask = layers, program, mask
        wide, widest = max(layers.widths), max(layers.inners)
        self.normed, self.other_normed, self.mixed = (program.rows(wide) for _ in range(3))
        self.qkv, self.between = program.rows(3 * wide), program.rows(widest)
        self.read, self.change = program.rows(layers.widths[0]), program.rows(layers.widths[0])
        self.weights: Iterator[int] = iter(())

    def norm(self, x: Rows, out: Rows) -> Rows:
        out = out._replace(width=x.width)
        self.program.norm(x, out, next(self.weights), next(self.weights), self.layers.epsilon)
        return out

    def linear(self, x: Rows, out: Rows, **options) -> None:
        self.program.linear(x, out, next(self.weights), next(self.weights), **options)

    def attend(self, query: Rows, key_value: Rows, cache: tuple[int, int], first_head: int) -> Rows:
        mixed, heads = self.mixed._replace(width=query.width), query.width // self.layers.head_dim
        scale = self.layers.head_dim**-0.5
        self.program.attend(query, key_value, mixed, *cache, heads, scale, None, first_head, self.mask)
        return mixed

    def read_past(self, x: Rows, cache: tuple[int, int], first_head: int) -> None:
        """A self block."""
        qkv = self.qkv._replace(width=3 * x.width)
        self.linear(self.norm(x, self.normed), qkv)
        mixed = self.attend(qkv.part(0, x.width), qkv.part(x.width, 2 * x.width), cache, first_head)
        self.linear(mixed, x, adds=True)

    def read_other(self, x: Rows, other: Rows, out: Rows, cache: tuple[int, int], first_head: int) -> None:
        """The mixer of a cross block, which adds to `out`."""
        reach = self.layers.widths[1]
        query, key_value = self.qkv.part(0, reach), self.qkv.part(reach, 2 * reach)
        normed, other_normed = self.norm(x, self.normed), self.norm(other, self.other_normed)
        self.linear(normed, query)
        self.linear(other_normed, key_value)
        self.linear(self.attend(query, key_value, cache, first_head), out, adds=True)

    def feed_forward(self, x: Rows, is_axis: bool) -> None:
        between = self.between._replace(width=self.layers.inners[is_axis])
        self.linear(self.norm(x, self.normed), between, activation=self.layers.activation)
        self.linear(between, x, adds=True)


@lru_cache(maxsize=64)
def _make_program(layers: Layers, batch: int, has_mask: bool) -> StepProgram:
    """The program. Its tensors are the token, the mask if there is one, the weights, and keys and values of the cache."""
    shapes = _all_weight_shapes(layers)
    program = StepProgram(batch, shapes)
    token = program.tensor("hidden_states", batch, 1, layers.total)
    mask = program.tensor("attention_mask", batch, None, dtype=torch.bool) if has_mask else None
    axes, (main_width, width) = len(layers.shares), layers.widths
    heads = [(main_width + axes * width) // layers.head_dim, 2 * axes * width // layers.head_dim]
    caches = []
    for layer in range(layers.number * (2 if axes else 1)):
        shape = batch, heads[layer >= layers.number], None, layers.head_dim
        caches.append((program.tensor("past_key_values", *shape), program.tensor("past_key_values", *shape)))
    hidden = program.rows(layers.total)
    main, metas = hidden.part(0, main_width), [hidden.part(main_width + a * width, width) for a in range(axes)]
    writer = _Writer(layers, program, mask)
    writer.weights = iter(range(len(shapes)))
    program.load(token, hidden)
    for layer in range(layers.number):
        for stream, x in enumerate((main, *metas)):
            writer.read_past(x, caches[layer], (main_width + (stream - 1) * width) // layers.head_dim if stream else 0)
            writer.feed_forward(x, stream > 0)
        for axis, meta in enumerate(metas):
            cache, first_head = caches[layers.number + layer], axis * width // layers.head_dim
            program.add(main, writer.read, adds=False)
            writer.read_other(main, meta, writer.read, cache, first_head)
            if layers.reads_further:
                writer.feed_forward(writer.read, False)
            program.add(writer.read, writer.change, layers.shares[axis], main, adds=axis > 0)
            _change_axis(writer, meta, main, cache, first_head + axes * width // layers.head_dim)
        if axes:
            program.add(writer.change, main)
    program.store(token, hidden)
    return program.compile()


def _change_axis(writer, meta, main, cache, first_head):
    writer.read_other(meta, main, meta, cache, first_head)
    if writer.layers.reads_further:
        writer.feed_forward(meta, True)


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def step_layers(
    layers: nn.ModuleList,
    known: Layers,
    main: torch.Tensor,
    meta: torch.Tensor | None,
    context: MultiGridContext,
    cache: Any,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """All streams after all layers for one more token, which is added to the cache.

    Args:
        layers (`nn.ModuleList`): of `MultiGridModel`.
        known (`Layers`): of `describe_layers`.
        main (`torch.Tensor` of shape `[batch, 1, hidden_size]`), meta (`torch.Tensor` of shape
            `[axes, batch, 1, axis_hidden_size]`, *optional*): streams before the first layer.
        context (`MultiGridContext`): of a pass of one real token, which continues the cache.
        cache (`MultiGridCache` or `StaticMultiGridCache`): checked.

    Returns:
        The streams, or `None`, with the cache unchanged, where the layers are to be called.

    Raises:
        MemoryError: if there is no memory for a token.
    """
    token = main if meta is None else torch.cat((main, *meta.unbind(0)), dim=-1)
    mask, dtype = context.token_mask, token.dtype
    if len(token) > MOST_ROWS or dtype not in (torch.float32, torch.bfloat16):
        return None
    if in_graph():
        weights = _weights(layers)
        if not lie_as_expected(weights, _all_weight_shapes(known), dtype):
            return None
    else:
        program = _make_program(known, len(token), mask is not None)
        weights = program.addresses_of_weights(keep(layers, None, lambda: _weights(layers)), dtype)
        if weights is None:
            return None
    if cache.max_cache_len is None:
        states: list[torch.Tensor] = []
        slots = []
        for place in range(len(cache.layers)):
            memory, end, length = cache.make_room(place)
            states += memory
            slots.append(Slots(end, end - length, 0, 1, memory[0].shape[2], length + 1))
        token = _run(program, token, states, weights, mask, slots)
    else:
        cached = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        for layer in cache.layers:
            layer.cumulative_length.add_(1)  # where the next pass of several tokens is written
        if in_graph():
            token = _operator(token, cached, weights, mask, cache.seen_tokens, known.text)
        else:
            token = _run(program, token, cached, weights, mask, _static_slots(cached, cache.seen_tokens))
    main, *metas = token.split([known.widths[0], *[known.widths[1]] * len(known.shares)], dim=-1)
    return main, torch.stack(metas) if metas else None


def _weights(layers):
    modules: list[Any] = [
        module
        for layer in layers
        for block, _, is_cross in _blocks_of(layer)
        for module in _modules_of(block, is_cross)
    ]
    return [x for module in modules for x in (module.weight, module.bias)]


def _static_slots(cached, seen_tokens):
    """The slots of a token in memory that stays where it is."""
    past, length = int(seen_tokens), cached[0].shape[2]
    return [Slots(past, 0, 0, 1, length, past + 1)] * (len(cached) // 2)


def _run(program, token, states, weights, mask, slots):
    token = token.clone(memory_format=torch.contiguous_format)
    given = [] if mask is None else [mask.contiguous()]
    program.run([token, *given, *states], weights, token.dtype, slots)
    return token


def _on_cpu(
    token: torch.Tensor,
    cached: list[torch.Tensor],
    weights: list[torch.Tensor],
    mask: torch.Tensor | None,
    seen_tokens: torch.Tensor,
    layers: str,
) -> torch.Tensor:
    program = _make_program(_from_text(layers), len(token), mask is not None)
    places = program.addresses_of_weights(weights, token.dtype)
    return _run(program, token, cached, places, mask, _static_slots(cached, seen_tokens))


def _without_memory(token, *_):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


_operator = register_for_cpu(f"{NAMESPACE}::multigrid_step", _on_cpu, _without_memory, ("cached",))

__all__ = ["NAMESPACE", "Layers", "describe_layers", "step_layers"]
