"""One token through all layers of LEAP in one call of C, with which a CPU decodes.

Whatever changes what a layer does is left to the layers: see `plain_modules.py`. Graphs of `torch.compile` contain the call as the
registered operator `heptapod::leap_step`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..common.cpu_kernels import address
from ..common.plain_modules import are_plain, is_watched, keep, look_once
from ..common.registered_operators import in_graph, operator_namespace, register_for_cpu
from ..common.step_program import ACTIVATIONS, MOST_ROWS, Rows, StepProgram, lie_as_expected, load_steps
from .focus_cpu import Mixing, blank_mixing, has_kernel, holds_step, recurrent_share
from .focus_functions import FocusSettings


NAMESPACE = operator_namespace(__name__)
_WEIGHTS = 9  # of a layer

# ---------------------------------------------------------------------------------------------------------------------
# Layers that a program can stand for
# ---------------------------------------------------------------------------------------------------------------------


def can_step(layers: nn.ModuleList, forwards: dict[type, Callable]) -> bool:
    """Whether layers do nothing but what a program computes. `step_layers` looks at their weights.

    Args:
        layers (`nn.ModuleList`): of `LeapModel`.
        forwards (`dict[type, Callable]`): classes of a layer, its mixer and its MLP, with their `forward` that is known here.
    """
    return bool(look_once(layers, ("eps", "settings"), lambda: _suit(layers, forwards) and load_steps() is not None))


def _suit(layers, forwards):
    """Whether all layers are built of modules that are known, with the same options but for windows."""
    if not are_plain(layers, forwards):
        return False
    options = set()
    for layer in layers:
        mixer, mlp = layer.mixer, layer.mlp
        if (type(layer), type(mixer), type(mlp)) != tuple(forwards) or type(mlp.act_fn) not in ACTIVATIONS:
            return False
        norms = layer.input_layernorm, layer.post_attention_layernorm
        linear = mixer.qfkv_proj, mlp.up_proj, mlp.down_proj
        if {type(norm) for norm in norms} != {nn.LayerNorm} or {type(module) for module in linear} != {nn.Linear}:
            return False
        biased = [module for module in (*norms, *linear) if module.bias is not None]
        if biased != [*norms, mlp.up_proj, mlp.down_proj] or None in (norm.weight for norm in norms):
            return False
        if not has_kernel(mixer.settings, mixer.head_dim):
            return False
        mixing = mixer.num_heads, mixer.alibi_slopes is None, *_values(mixer.settings)
        options |= {(norm.eps, type(mlp.act_fn), *mixing) for norm in norms}
    return len(options) == 1


def _values(settings):
    return settings.scale, settings.normalize, settings.weight_function, settings.output_gate, settings.sink_weight


def step_layers(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    cache: Cache,
) -> torch.Tensor | None:
    """Hidden states of one more token after all layers; the token is added to the cached states in place.

    Args:
        layers (`nn.ModuleList`): of `LeapModel`, for which `can_step` is true.
        hidden_states (`torch.Tensor` of shape `[batch, 1, hidden_size]`): embeddings of the token.
        rotary (`tuple` of cos and sin `[1 or batch, 1, head_dim]`, *optional*): rotary positions of the token.
        cache (`Cache`): checked, with the states after at least one token.

    Returns:
        `torch.Tensor` of shape `[batch, 1, hidden_size]`, or `None`, with the cache unchanged, where the layers are to be called.

    Raises:
        ValueError: for states and rotary positions of other shapes or dtypes.
        MemoryError: if there is no memory for a token.
    """
    if hidden_states.shape[0] > MOST_ROWS or torch.is_autocast_enabled("cpu"):
        return None
    modules: list[Any] = list(layers)
    states = [layer.mixer.packed_state(cache) for layer in modules]
    if not all(holds_step(state, layer.mixer.settings) for state, layer in zip(states, modules)):
        return None
    first = modules[0]
    weights = _weights(modules) if in_graph() else keep(layers, None, lambda: _weights(modules))
    slopes = [layer.mixer.alibi_slopes for layer in modules if layer.mixer.alibi_slopes is not None]
    cos, sin = rotary or (None, None)
    tensors = hidden_states, states, weights, slopes, cos, sin
    if not _fit(*tensors, first.mixer.num_heads):
        return None
    windows = [layer.mixer.settings.window or 0 for layer in modules]
    kind, epsilon = ACTIVATIONS[type(first.mlp.act_fn)], first.input_layernorm.eps
    options = first.mixer.num_heads, windows, *_values(first.mixer.settings), kind, epsilon
    if in_graph():
        _, *sizes = _sizes(hidden_states, weights)
        fit = lie_as_expected(weights, _shapes(*sizes) * len(states), hidden_states.dtype)
        return _operator(*tensors, *options) if fit else None
    return None if is_watched() else _step(*tensors, *options)


def _weights(layers):
    """Tensors of all layers in the order of the program."""
    weights: list[torch.Tensor] = []
    for layer in layers:
        before, after, mixer, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mixer, layer.mlp
        weights += before.weight, before.bias, mixer.qfkv_proj.weight, after.weight, after.bias
        weights += mlp.up_proj.weight, mlp.up_proj.bias, mlp.down_proj.weight, mlp.down_proj.bias
    return weights


def _fit(hidden_states, states, weights, slopes, cos, sin, heads):
    """Whether numbers and dtypes of tensors are those of layers. `StepProgram` looks at the weights."""
    if hidden_states.dtype not in (torch.float32, torch.bfloat16) or hidden_states.shape[-1] % heads:
        return False
    if not weights or len(weights) != _WEIGHTS * len(states) or len(slopes) not in (0, len(states)):
        return False
    return (
        all(x.shape == (heads,) and x.dtype == torch.float32 for x in slopes)
        and all(x.is_cpu and x.is_contiguous() for x in slopes)
        and (cos is None or (cos.dtype == sin.dtype == torch.float32 and len(cos) == len(sin)))
    )


def _sizes(hidden_states, weights):
    """Batch, width, parts of the input of a mixing step, and channels of the feed-forwards between."""
    batch, _, width = hidden_states.shape
    return batch, width, weights[2].shape[0] // width, weights[5].shape[0]


def _shapes(width, parts, inner):
    norm, up, down = [(width,), (width,)], [(inner, width), (inner,)], [(width, inner), (width,)]
    return [*norm, (parts * width, width), *norm, *up, *down]


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The call without what belongs to one token.

    Attributes:
        program (`StepProgram`): of all layers.
        qfkv, mixed (`Rows`): input and output of the mixing steps.
        mixing (`ctypes.Array`): mixing step of each layer, without its tensors.
        expected (`tuple[dict, ...]`): shapes and dtypes of the tensors of each mixing step.
    """

    program: StepProgram
    qfkv: Rows
    mixed: Rows
    mixing: Any
    expected: tuple[dict, ...]


@lru_cache(maxsize=64)
def _make_plan(sizes, rotary_rows, heads, windows, settings, activation, epsilon):
    """The plan for sizes batch, width, parts and inner, and windows of the layers."""
    batch, width, parts, inner = sizes
    head_dim = width // heads
    names = "scale normalize weight_function output_gate sink_weight".split()
    each = [FocusSettings(**dict(zip(names, settings)), window=window or None) for window in windows]
    if not all(has_kernel(one, head_dim) for one in each):
        raise ValueError(
            f"There is no compiled C source for `windows`={list(windows)} and settings {settings} with heads of {head_dim} channels."
        )
    program = StepProgram(batch, _shapes(width, parts, inner) * len(windows))
    token = program.tensor("hidden_states", batch, 1, width)
    hidden, normed, mixed = (program.rows(width) for _ in range(3))
    qfkv, between = program.rows(parts * width), program.rows(inner)
    program.load(token, hidden)
    for layer in range(len(windows)):
        weights = range(_WEIGHTS * layer, _WEIGHTS * (layer + 1))
        norm, norm_bias, qfkv_proj, post_norm, post_norm_bias, up, up_bias, down, down_bias = weights
        program.norm(hidden, normed, norm, norm_bias, epsilon)
        program.linear(normed, qfkv, qfkv_proj)
        program.mix(layer)
        program.add(mixed, hidden)
        program.norm(hidden, normed, post_norm, post_norm_bias, epsilon)
        program.linear(normed, between, up, up_bias, activation)
        program.linear(between, hidden, down, down_bias, adds=True)
    program.store(token, hidden)
    shape = batch, 1, parts, heads, head_dim
    blanks, expected = zip(*(blank_mixing(shape, torch.float32, one, 0, rotary_rows, 1) for one in each))
    return _Plan(program.compile(), qfkv, mixed, (Mixing * len(windows))(*blanks), expected)


def _step(hidden_states, states, weights, slopes, cos, sin, heads, windows, *settings_activation_epsilon):
    """The result, or `None` for weights that lie in another way."""
    *settings, activation, epsilon = settings_activation_epsilon
    rows = 0 if cos is None else len(cos)
    sizes = _sizes(hidden_states, weights)
    plan = _make_plan(sizes, rows, heads, tuple(windows), tuple(settings), activation, epsilon)
    addresses = plan.program.addresses_of_weights(weights, hidden_states.dtype)
    if addresses is None:
        return None
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    memory = torch.empty(plan.program.size, dtype=torch.float32)
    mixing = type(plan.mixing).from_buffer_copy(plan.mixing)
    turns = {}
    if cos is not None:
        rotary = [x.contiguous() for x in (cos, sin)]  # alive until the call is done
        turns = {name: address(name, x, *plan.expected[0][name]) for name, x in zip(("cos", "sin"), rotary)}
    places = {"input": plan.qfkv.place, "out": plan.mixed.place}
    turns |= {name: memory.data_ptr() + 4 * place for name, place in places.items()}
    for step, state, expected in zip(mixing, states, plan.expected):
        step.state = address("past_key_values", state, *expected["state"])
        for name, x in turns.items():
            setattr(step, name, x)
    for step, one in zip(mixing, slopes):
        step.alibi_slopes = one.data_ptr()
    mix = recurrent_share(out.shape[-1] // heads)
    plan.program.run([out], addresses, out.dtype, memory=memory, mixing=mixing, mix=mix)
    return out


def _on_cpu(
    hidden_states: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    alibi_slopes: list[torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    windows: list[int],
    scale: float,
    normalize: bool,
    weight_function: str,
    output_gate: str,
    sink_weight: float,
    activation: int,
    epsilon: float,
) -> torch.Tensor:
    tensors = hidden_states, states, weights, alibi_slopes, cos, sin
    is_token = hidden_states.dim() == 3 and hidden_states.shape[1] == 1 and heads > 0 and len(windows) == len(states)
    settings = scale, normalize, weight_function, output_gate, sink_weight
    out = None
    if is_token and _fit(*tensors, heads):
        out = _step(*tensors, heads, windows, *settings, activation, epsilon)
    if out is None:
        raise ValueError(
            "`states`, `weights` and `alibi_slopes` must be those of LEAP's layers on a CPU, and `hidden_states` one token."
        )
    return out


def _without_memory(hidden_states, *_):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_operator = register_for_cpu(f"{NAMESPACE}::leap_step", _on_cpu, _without_memory, ("states",))

__all__ = ["NAMESPACE", "can_step", "step_layers"]
