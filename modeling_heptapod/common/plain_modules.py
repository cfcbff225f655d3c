"""Whether modules do what their classes say, so that C may do it for them.

Hooks, adapters, quantised, replaced or patched modules and classes, and modes of torch that watch operations all change what a layer
does, or want to see it.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers.utils import output_capturing

from .model_inputs import is_eager, is_torch_func_active
from .registered_operators import in_graph
from .step_program import ACTIVATIONS


_collector = getattr(output_capturing, "_active_collector", None)  # of the outputs that a forward pass was asked for
_KINDS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.ModuleList, *ACTIVATIONS)
_FORWARDS = {kind: kind.forward for kind in _KINDS}  # before anyone replaces them

_TENSORS = {nn.Parameter, torch.Tensor, type(None)}
_TRAINING, _HOOKS_BEFORE, _HOOKS_AFTER = map(attrgetter, ("training", "_forward_pre_hooks", "_forward_hooks"))


class _Sight(NamedTuple):
    """What was seen of a module and of all within.

    Attributes:
        facts (`tuple[list, ...]`): by which a change is seen.
        tensors (`list[torch.Tensor]`): alive, so that no other has the identity of one of them.
        suits (`Any`): what was found then.
        kept (`dict`): see `keep`.
    """

    facts: tuple[list, ...]
    tensors: list
    suits: Any
    kept: dict


_seen: WeakKeyDictionary[nn.Module, _Sight] = WeakKeyDictionary()


def look_once(root: nn.Module, options: tuple[str, ...], suit: Callable[[], Any], also: Any = None) -> Any:
    """What `suit` says about a module, which is asked again once a module or tensor within, a class or an option has changed.

    Args:
        root (`nn.Module`): the module.
        options (`tuple[str, ...]`): attributes of modules that `suit` reads.
        suit (`Callable`): asked unless hooks, replaced methods, training mode or tensors that C cannot read forbid a call of C.
        also (*optional*): something else that it reads.

    Returns:
        What `suit` returned, or `None`.
    """
    facts, tensors = _look(root, options)
    if facts is None:
        _seen.pop(root, None)
        return None
    facts = *facts, [also]
    known = _seen.get(root)
    if known is None or known.facts != facts:
        suits = suit()
        known = _seen[root] = _Sight(facts, tensors if suits is not None else [], suits, {})
    return known.suits


def keep(root: nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns for a module that `look_once` has just found suitable, kept until it sees a change."""
    sight = _seen.get(root)
    if sight is None:
        return make()
    if key not in sight.kept:
        sight.kept[key] = make()
    return sight.kept[key]


def _look(root, options):
    """Modules, their classes, options and tensors, and the tensors. `None` for both where something forbids C."""
    modules = modules_within(root)
    own = list(map(vars, modules))
    # Each line asks all modules one question, in a fraction of the time of a loop with all of them.
    changed = any(map(_TRAINING, modules)) or any(map(_HOOKS_BEFORE, modules))
    changed = changed or not all(map(_are_idle, filter(None, map(_HOOKS_AFTER, modules))))
    changed = changed or any("forward" in one or one.get("_compiled_call_impl") is not None for one in own)
    tensors: list[Any] = [x for module in modules for x in module._parameters.values()]
    tensors += [x for module in modules for x in module._buffers.values()]
    if changed or not _TENSORS.issuperset(map(type, tensors)):
        return None, None
    kinds: list[Any] = list(map(type, modules))
    forwards = [kind.forward for kind in dict.fromkeys(kinds)]
    values = [one.get(name) for name in options for one in own]
    return (modules, kinds, forwards, values, list(map(id, tensors))), tensors


def _are_idle(hooks):
    """Whether hooks are those with which transformers captures outputs, which stay once outputs were asked for, and none is now."""
    capture = output_capturing.__name__
    return (
        _collector is not None
        and _collector.get() == {}
        and all(hook.__module__ == capture for hook in hooks.values())
    )


def modules_within(root: nn.Module) -> list[nn.Module]:
    """All modules within one, without it. Faster than `modules`, which removes duplicates."""
    found = [*root._modules.values()]
    for module in found:  # grows by what is within each
        if module is not None:
            found += module._modules.values()
    return [module for module in found if module is not None]


def are_plain(root: nn.Module, forwards: dict[type, Callable]) -> bool:
    """Whether all modules within one have the `forward` of torch's and transformers' classes, or those of `forwards`."""
    known = {**_FORWARDS, **forwards}
    return all(known.get(type(module)) is type(module).forward for module in modules_within(root))


def is_watched() -> bool:
    """Whether torch changes or observes single operations."""
    return (
        is_torch_func_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
    )


def may_step(x: torch.Tensor, config: Any, is_static: bool) -> bool:
    """Whether C may compute layers with attention of one token.

    Args:
        x (`torch.Tensor`): hidden states.
        config (`PreTrainedConfig`): of the model.
        is_static (`bool`): whether the cache is static, which graphs need.
    """
    if torch.is_grad_enabled() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if config._attn_implementation != "sdpa":
        return False
    if torch.compiler.is_compiling():
        return in_graph() and is_static
    return is_eager(x) and not is_watched()


__all__ = ["are_plain", "is_watched", "keep", "look_once", "may_step", "modules_within"]
