"""One token through all layers of LEAP in one call of C, with which a CPU decodes.

The products of one token are short, so that what Python does between them takes longer than they do. The call reads the weights
where they lie. Whatever changes what a layer does is left to the layers: hooks, adapters, quantised or replaced modules,
autocast, modes of torch that watch operations.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..common.cpu_kernels import FLAGS, address, check_status, load_kernels
from ..common.model_inputs import is_torch_func_active
from .focus_cpu import Mixing, blank_mixing, holds_step, recurrent_share, takes
from .leap_step_source import SOURCE


_MOST_ROWS = 8  # of a batch, beyond which products of matrices are faster
_PARALLEL = 2**17  # weights of a layer times rows below which a second thread costs more than it saves
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


class _Plan(NamedTuple):
    """The call for layers as they are, without what belongs to one token.

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


# By the layers of a model: what the plan was made for, and the plan, `None` if the C source does not support the layers.
_plans: WeakKeyDictionary[nn.ModuleList, tuple[list, _Plan | None]] = WeakKeyDictionary()


@cache
def _library():
    return load_kernels("leap_step", "LEAP decodes", SOURCE, {"leap_step": _LeapStep}, FLAGS)


def step_layers(
    layers: nn.ModuleList,
    forwards: dict[type, Callable],
    hidden_states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    cache: Cache,
) -> torch.Tensor | None:
    """Hidden states of one more token after all layers; the token is added to the cached states in place.

    Args:
        layers (`nn.ModuleList`): of `LeapModel`.
        forwards (`dict[type, Callable]`): classes of a layer, its mixer and its MLP, with their `forward` that the C source knows.
        hidden_states (`torch.Tensor` of shape `[batch, 1, hidden_size]`): embeddings of the token, in eager mode.
        rotary (`tuple` of cos and sin `[1 or batch, 1, head_dim]`, *optional*): rotary positions of the token.
        cache (`Cache`): checked, with the states after at least one token.

    Returns:
        `torch.Tensor` of shape `[batch, 1, hidden_size]`, or `None`, with the cache unchanged, where the layers are to be called.

    Raises:
        ValueError: for states and rotary positions of other shapes or dtypes.
        MemoryError: if there is no memory for a token.
    """
    if hidden_states.device.type != "cpu" or len(hidden_states) > _MOST_ROWS or _is_watched():
        return None
    facts = _look(layers)
    if facts is None:
        return None
    facts += [hidden_states.dtype, len(hidden_states), torch.get_num_threads()]
    facts += [] if rotary is None else [rotary[0].dtype, len(rotary[0])]
    known, plan = _plans.get(layers, (None, None))
    if known != facts:
        plan = _make_plan(layers, forwards, hidden_states, rotary)
        _plans[layers] = facts, plan
    return None if plan is None else _run(plan, layers, hidden_states, rotary, cache)


def _is_watched():
    """Whether torch changes or observes single operations."""
    return (
        is_torch_func_active()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
    )


def _look(layers):
    """Modules, their classes and options, and memory and layout of their tensors, by which a change is seen. `None` where hooks run."""
    facts: list = []
    for layer in layers._modules.values():
        for module in _modules(layer):
            options = module.__dict__
            replaced = "forward" in options or options.get("_compiled_call_impl") is not None
            if module._forward_hooks or module._forward_pre_hooks or replaced or module.training:
                return None
            facts += (module, type(module), type(module).forward, options.get("eps"), options.get("settings"))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    facts.append(None)
                elif type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_cpu:
                    facts += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                else:
                    return None
    return facts


def _modules(layer):
    yield layer
    for module in layer._modules.values():
        yield module
        yield from module._modules.values()


def _make_plan(layers, forwards, hidden_states, rotary):
    if hidden_states.dtype not in (torch.float32, torch.bfloat16) or not layers or _library() is None:
        return None
    weights = []
    for layer in layers:
        weights.append(_weights(layer, layers[0], forwards, hidden_states))
        if weights[-1] is None:
            return None
    mixers, norms = [layer.mixer for layer in layers], [layer.input_layernorm for layer in layers]
    slopes = {mixer.alibi_slopes.dtype for mixer in mixers if mixer.alibi_slopes is not None}
    if len({norm.eps for norm in norms}) > 1 or slopes - {torch.float32}:
        return None
    batch, _, width = hidden_states.shape
    inner, parts, heads, head_dim = len(weights[0][5]), mixers[0].num_parts, mixers[0].num_heads, mixers[0].head_dim
    qfkv = hidden_states.new_empty(batch, 1, parts, heads, head_dim, dtype=torch.float32)
    if not all(takes(qfkv, mixer.settings, rotary) for mixer in mixers):
        return None
    size = sum(x.numel() for layer in weights for x in layer) * batch
    threads = torch.get_num_threads() if size >= _PARALLEL else 1
    call = _LeapStep(
        batch=batch,
        width=width,
        parts=parts,
        inner=inner,
        layers=len(layers),
        activation=_ACTIVATIONS[type(layers[0].mlp.act_fn)],
        bf16=hidden_states.dtype == torch.bfloat16,
        threads=threads,
        mixing_bytes=ctypes.sizeof(Mixing),
        epsilon=norms[0].eps,
        mix=recurrent_share(head_dim),
    )
    table = (_Layer * len(layers))(*(_Layer(*(x.data_ptr() for x in layer)) for layer in weights))
    call.layer = ctypes.addressof(table)
    rows = 0 if rotary is None else len(rotary[0])
    blanks, shapes = zip(*(blank_mixing(qfkv.shape, qfkv.dtype, mixer.settings, 0, rows, 1) for mixer in mixers))
    mixing = (Mixing * len(layers))(*blanks)
    for step, mixer, expected in zip(mixing, mixers, shapes):
        if mixer.alibi_slopes is not None:
            step.alibi_slopes = address("alibi_slopes", mixer.alibi_slopes, *expected["alibi_slopes"])
    sizes = {"own": 2 * threads * width, "rows": width, "mixed": width, "qfkv": parts * width, "between": inner}
    return _Plan(call, table, mixing, shapes, {name: batch * size for name, size in sizes.items()})


def _weights(layer, first, forwards, hidden_states):
    """Tensors of a layer in the order of the source, `None` if it is not built like the first layer of modules that C knows."""
    mixer, mlp = layer.mixer, layer.mlp
    known = {**_MODULES, **forwards}
    if any(known.get(type(module)) is not type(module).forward for module in _modules(layer)):
        return None
    if (type(layer), type(mixer), type(mlp)) != tuple(forwards):
        return None
    modules = layer.input_layernorm, mixer.qfkv_proj, layer.post_attention_layernorm, mlp.up_proj, mlp.down_proj
    kinds = [type(module) for module in modules]
    if (
        kinds != [nn.LayerNorm, nn.Linear, nn.LayerNorm, nn.Linear, nn.Linear]
        or type(mlp.act_fn) not in _ACTIVATIONS
        or type(mlp.act_fn) is not type(first.mlp.act_fn)
    ):
        return None
    width, inner = hidden_states.shape[-1], len(first.mlp.up_proj.weight)
    shapes = [(width,), (width,), (mixer.num_parts * width, width), (width,), (width,)]
    shapes += [(inner, width), (inner,), (width, inner), (width,)]
    tensors = [
        x for module in modules for x in (module.weight, module.bias) if module is not mixer.qfkv_proj or x is not None
    ]
    if [None if x is None else x.shape for x in tensors] != shapes:
        return None
    return tensors if all(x.dtype == hidden_states.dtype and x.is_contiguous() for x in tensors) else None


def _run(plan, layers, hidden_states, rotary, cache):
    mixers = [layer.mixer for layer in layers]
    states = [mixer.packed_state(cache) for mixer in mixers]
    if not all(holds_step(state, mixer.settings) for state, mixer in zip(states, mixers)):
        return None
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    memory = torch.empty(sum(plan.scratch.values()), dtype=torch.float32)
    call, mixing = _LeapStep.from_buffer_copy(plan.call), type(plan.mixing).from_buffer_copy(plan.mixing)
    call.hidden = address("hidden_states", out, hidden_states.shape, hidden_states.dtype)
    call.mixing, place = ctypes.addressof(mixing), memory.data_ptr()
    for name, size in plan.scratch.items():
        setattr(call, name, place)
        place += 4 * size
    turns = {}
    if rotary is not None:
        rotary = [x.contiguous() for x in rotary]  # alive until the call is done
        turns = {name: address(name, x, *plan.shapes[0][name]) for name, x in zip(("cos", "sin"), rotary)}
    for step, state, expected in zip(mixing, states, plan.shapes):
        step.input, step.out = call.qfkv, call.mixed
        step.state = address("past_key_values", state, *expected["state"])
        for name, x in turns.items():
            setattr(step, name, x)
    check_status(_library().leap_step(call), "decoding step")
    return out


__all__ = ["step_layers"]
