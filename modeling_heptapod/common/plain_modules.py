"""Whether modules do what their classes say, so that C may do it for them.

Hooks, adapters, quantised, replaced or patched modules and classes, and modes of torch that watch operations all change what a layer
does, or want to see it.
"""

from collections.abc import Callable
from typing import Any
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

# By a module: what was seen of it and all within, and what was found then.
_seen: WeakKeyDictionary[nn.Module, tuple[list, Any]] = WeakKeyDictionary()


def look_once(root: nn.Module, options: tuple[str, ...], suit: Callable[[], Any], also: Any = None) -> Any:
    """What `suit` says about a module, which is asked again once a module within, its class or an option has changed.

    Args:
        root (`nn.Module`): the module.
        options (`tuple[str, ...]`): attributes of modules that `suit` reads.
        suit (`Callable`): asked unless hooks, replaced methods, training mode or tensors that C cannot read forbid a call of C.

        also (*optional*): something else that it reads.

    Returns:
        What `suit` returned, or `None`.
    """
    facts = _look(root, options)
    if facts is None:
        return None
    facts.append(also)
    known, suits = _seen.get(root, (None, None))
    if known != facts:
        suits = suit()
        _seen[root] = facts, suits
    return suits


def _look(root, options):
    """Modules, their classes and options, by which a change is seen. `None` for what forbids C."""
    facts: list[Any] = []
    for module in modules_within(root):
        own = module.__dict__
        replaced = "forward" in own or own.get("_compiled_call_impl") is not None
        hooked = module._forward_pre_hooks or (module._forward_hooks and not _are_idle(module._forward_hooks))
        if hooked or replaced or module.training:
            return None
        facts += (module, type(module), type(module).forward, *(own.get(name) for name in options))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not (type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_cpu):
                return None
            facts.append(tensor is None)
    return facts


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
    found: list[nn.Module] = []
    for module in root._modules.values():
        if module is not None:
            found.append(module)
            found += modules_within(module)
    return found


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


__all__ = ["are_plain", "is_watched", "look_once", "may_step", "modules_within"]
