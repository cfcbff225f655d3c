"""One token through all layers of LEAP in one call of C, with which a CPU decodes.

The products of one token are short, so that what Python does between them takes longer than they do. The call reads the weights
where they lie. Whatever changes what a layer does is left to the layers: hooks, adapters, quantised or replaced modules,
autocast, modes of torch that watch operations. Graphs of `torch.compile` contain the call as the registered operator
`heptapod::leap_step`.
"""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..common.cpu_kernels import FLAGS, address, check_status, load_kernels
from ..common.model_inputs import is_torch_func_active
from ..common.registered_operators import in_graph, operator_namespace
from .focus_cpu import Mixing, blank_mixing, has_kernel, holds_step, recurrent_share
from .focus_functions import FocusSettings
from .leap_step_source import SOURCE


NAMESPACE = operator_namespace(__name__)
_MOST_ROWS = 8  # of a batch, beyond which products of matrices are faster
_PARALLEL = 2**17  # weights of all layers times rows below which a second thread costs more than it saves
_ACTIVATIONS = {type(ACT2FN[name]): number for number, name in enumerate(("gelu", "relu", "silu"))}
_KINDS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.Linear, *_ACTIVATIONS)
_MODULES = {kind: kind.forward for kind in _KINDS}  # before anyone replaces them
_WEIGHTS = "norm_weight norm_bias qfkv post_norm_weight post_norm_bias up up_bias down down_bias".split()


class _Layer(ctypes.Structure):
    """`Layer` of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in _WEIGHTS]


class _LeapStep(ctypes.Structure):
    """`LeapStep` of the source."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in "batch width parts inner layers activation bf16 threads mixing_bytes".split()
        ),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in "layer mix mixing hidden rows mixed qfkv between own".split()),
        *((name, ctypes.c_int64) for name in "tickets members arrived phase failed".split()),
    ]


@cache
def _library():
    return load_kernels("leap_step", "LEAP decodes", SOURCE, {"leap_step": _LeapStep}, FLAGS)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that the source can stand for
# ---------------------------------------------------------------------------------------------------------------------

# By the layers of a model: what was seen of their modules, and whether the source computes what those do.
_seen: WeakKeyDictionary[nn.ModuleList, tuple[list, bool]] = WeakKeyDictionary()


def can_step(layers: nn.ModuleList, forwards: dict[type, Callable]) -> bool:
    """Whether layers do nothing but what the C source computes. `step_layers` looks at their weights.

    Args:
        layers (`nn.ModuleList`): of `LeapModel`.
        forwards (`dict[type, Callable]`): classes of a layer, its mixer and its MLP, with their `forward` that the source knows.
    """
    facts = _look(layers)
    if facts is None:
        return False
    known, suits = _seen.get(layers, (None, False))
    if known != facts:
        suits = _suit(layers, forwards) and _library() is not None
        _seen[layers] = facts, suits
    return suits


def _look(layers):
    """Modules, their classes and options, by which a change is seen. `None` for hooks, and tensors that C cannot read."""
    facts: list = []
    for layer in layers._modules.values():
        for module in _modules(layer):
            options = module.__dict__
            replaced = "forward" in options or options.get("_compiled_call_impl") is not None
            if module._forward_hooks or module._forward_pre_hooks or replaced or module.training:
                return None
            facts += (module, type(module), type(module).forward, options.get("eps"), options.get("settings"))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and not (type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_cpu):
                    return None
                facts.append(tensor is None)
    return facts


def _modules(layer):
    yield layer
    for module in layer._modules.values():
        yield module
        yield from module._modules.values()


def _suit(layers, forwards):
    """Whether all layers are built of modules that C knows, with the same options but for windows."""
    known, options = {**_MODULES, **forwards}, set()
    for layer in layers:
        if any(known.get(type(module)) is not type(module).forward for module in _modules(layer)):
            return False
        mixer, mlp = layer.mixer, layer.mlp
        if (type(layer), type(mixer), type(mlp)) != tuple(forwards) or type(mlp.act_fn) not in _ACTIVATIONS:
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
    if hidden_states.shape[0] > _MOST_ROWS or torch.is_autocast_enabled("cpu"):
        return None
    modules: list[Any] = list(layers)
    states = [layer.mixer.packed_state(cache) for layer in modules]
    if not all(holds_step(state, layer.mixer.settings) for state, layer in zip(states, modules)):
        return None
    first = modules[0]
    weights = [x for layer in modules for x in _weights(layer)]
    slopes = [layer.mixer.alibi_slopes for layer in modules if layer.mixer.alibi_slopes is not None]
    cos, sin = rotary or (None, None)
    tensors = hidden_states, states, weights, slopes, cos, sin
    if not _lie_as_expected(*tensors, first.mixer.num_heads):
        return None
    windows = [layer.mixer.settings.window or 0 for layer in modules]
    kind, epsilon = _ACTIVATIONS[type(first.mlp.act_fn)], first.input_layernorm.eps
    options = first.mixer.num_heads, windows, *_values(first.mixer.settings), kind, epsilon
    if in_graph():
        return _operator(*tensors, *options)
    return None if _is_watched() else _step(*tensors, *options)


def _weights(layer):
    """Tensors of a layer in the order of the source."""
    before, after, up, down = (
        layer.input_layernorm,
        layer.post_attention_layernorm,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    )
    norms = before.weight, before.bias, layer.mixer.qfkv_proj.weight, after.weight, after.bias
    return *norms, up.weight, up.bias, down.weight, down.bias


def _is_watched():
    """Whether torch changes or observes single operations."""
    return (
        is_torch_func_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def _lie_as_expected(hidden_states, states, weights, slopes, cos, sin, heads):
    """Whether all weights have the dtype of the hidden states, and the shapes and the layout that C reads."""
    width, dtype, number = hidden_states.shape[-1], hidden_states.dtype, len(_WEIGHTS)
    if dtype not in (torch.float32, torch.bfloat16) or width % heads:
        return False
    if not weights or len(weights) != number * len(states) or len(slopes) not in (0, len(states)):
        return False
    parts, inner = weights[2].shape[0] // width, weights[5].shape[0]
    norm, up, down = [(width,), (width,)], [(inner, width), (inner,)], [(width, inner), (width,)]
    shapes = [*norm, (parts * width, width), *norm, *up, *down] * len(states)
    return (
        all(x.shape == shape and x.dtype == dtype for x, shape in zip(weights, shapes))
        and all(x.shape == (heads,) and x.dtype == torch.float32 for x in slopes)
        and all(x.is_cpu and x.is_contiguous() for x in (*weights, *slopes))
        and (cos is None or (cos.dtype == sin.dtype == torch.float32 and len(cos) == len(sin)))
    )


class _Plan(NamedTuple):
    """The call for weights that lie where they lie, without what belongs to one token.

    Attributes:
        call (`_LeapStep`): sizes, options and weights.
        layers, mixing (`ctypes.Array`): weights and mixing step of each layer.
        shapes (`tuple[dict, ...]`): shapes and dtypes of the tensors of each mixing step.
        scratch (`dict[str, int]`): the call's own memory, in numbers of float32.
    """

    call: _LeapStep
    layers: Any
    mixing: Any
    shapes: tuple[dict, ...]
    scratch: dict[str, int]


@lru_cache(maxsize=64)
def _make_plan(weights, slopes, sizes, dtype, rotary_rows, threads, heads, windows, settings, activation, epsilon):
    """The plan for addresses of weights and of slopes, and the sizes batch, width, parts and inner."""
    batch, width, parts, inner = sizes
    layers, head_dim = len(windows), width // heads
    names = "scale normalize weight_function output_gate sink_weight".split()
    each = [FocusSettings(**dict(zip(names, settings)), window=window or None) for window in windows]
    if not all(has_kernel(one, head_dim) for one in each):
        raise ValueError(
            f"There is no compiled C source for `windows`={list(windows)} and settings {settings} with heads of {head_dim} channels."
        )
    own_threads = threads if layers * batch * width * (parts * width + 2 * inner) >= _PARALLEL else 1
    call = _LeapStep(
        batch=batch,
        width=width,
        parts=parts,
        inner=inner,
        layers=layers,
        activation=activation,
        bf16=dtype == torch.bfloat16,
        threads=own_threads,
        mixing_bytes=ctypes.sizeof(Mixing),
        epsilon=epsilon,
        mix=recurrent_share(head_dim),
    )
    number = len(_WEIGHTS)
    table = (_Layer * layers)(*(_Layer(*weights[number * layer :][:number]) for layer in range(layers)))
    call.layer = ctypes.addressof(table)
    qfkv = batch, 1, parts, heads, head_dim
    blanks, shapes = zip(*(blank_mixing(qfkv, torch.float32, one, 0, rotary_rows, 1) for one in each))
    mixing = (Mixing * layers)(*blanks)
    for step, place in zip(mixing, slopes):
        step.alibi_slopes = place
    scratch = {"own": 2 * own_threads * width, "rows": width, "mixed": width, "qfkv": parts * width, "between": inner}
    return _Plan(call, table, mixing, shapes, {name: batch * size for name, size in scratch.items()})


def _step(hidden_states, states, weights, slopes, cos, sin, heads, windows, *settings_activation_epsilon):
    *settings, activation, epsilon = settings_activation_epsilon
    batch, _, width = hidden_states.shape
    sizes = batch, width, weights[2].shape[0] // width, weights[5].shape[0]
    places = (tuple([x.data_ptr() for x in tensors]) for tensors in (weights, slopes))
    rows, threads = 0 if cos is None else len(cos), torch.get_num_threads()
    options = heads, tuple(windows), tuple(settings), activation, epsilon
    plan = _make_plan(*places, sizes, hidden_states.dtype, rows, threads, *options)
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    memory = torch.empty(sum(plan.scratch.values()), dtype=torch.float32)
    call, mixing = _LeapStep.from_buffer_copy(plan.call), type(plan.mixing).from_buffer_copy(plan.mixing)
    call.hidden = address("hidden_states", out, hidden_states.shape, hidden_states.dtype)
    call.mixing, place = ctypes.addressof(mixing), memory.data_ptr()
    for name, size in plan.scratch.items():
        setattr(call, name, place)
        place += 4 * size
    turns = {}
    if cos is not None:
        rotary = [x.contiguous() for x in (cos, sin)]  # alive until the call is done
        turns = {name: address(name, x, *plan.shapes[0][name]) for name, x in zip(("cos", "sin"), rotary)}
    for step, state, expected in zip(mixing, states, plan.shapes):
        step.input, step.out = call.qfkv, call.mixed
        step.state = address("past_key_values", state, *expected["state"])
        for name, x in turns.items():
            setattr(step, name, x)
    check_status(_library().leap_step(call), "decoding step")
    return out


@torch.library.custom_op(f"{NAMESPACE}::leap_step", mutates_args=("states",))
def _operator(
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
    if not is_token or not _lie_as_expected(*tensors, heads):
        raise ValueError(
            "`states`, `weights` and `alibi_slopes` must be those of LEAP's layers on a CPU, and `hidden_states` one token."
        )
    settings = scale, normalize, weight_function, output_gate, sink_weight
    return _step(*tensors, heads, windows, *settings, activation, epsilon)


@_operator.register_fake
def _(hidden_states, *_):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


__all__ = ["NAMESPACE", "can_step", "step_layers"]
