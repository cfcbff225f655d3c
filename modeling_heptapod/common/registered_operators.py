"""Operators that are registered with torch, so that `torch.compile` keeps them as one call."""

import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


_libraries: dict[str, torch.library.Library] = {}


def operator_namespace(module: str) -> str:
    """Namespace for the operators of a module of this package, or of a copy of it from a saved folder.

    Each copy has its own namespace: one process may load several versions of the code.

    Args:
        module (`str`): `__name__` of the module.
    """
    if module.startswith("modeling_heptapod."):
        return "heptapod"
    return f"heptapod_{hashlib.sha256(module.encode()).hexdigest()[:8]}"


def in_graph() -> bool:
    """Whether `torch.compile` traces. Programs of `torch.export` run without this package, so they hold plain operations."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def register_for_cpu(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...]
) -> Any:
    """Register an operator without gradients.

    Between a graph and the function `torch.library.custom_op` has three more layers of Python, each of which unpacks all tensors.

    Args:
        name (`str`): with the namespace.
        function (`Callable`): the operator on CPUs, with annotated arguments.
        fake (`Callable`): what it returns, without memory.
        mutates (`tuple[str, ...]`): names of the arguments that it changes in place.

    Returns:
        The operator.
    """
    namespace, _, own = name.partition("::")
    # Alive as long as the operator. That of the same module before it was loaded again ends here.
    library = _libraries[name] = torch.library.Library(namespace, "FRAGMENT")
    library.define(own + torch.library.infer_schema(function, mutates_args=mutates))
    library.impl(own, function, "CPU")
    torch.library.register_fake(name, fake, lib=library)
    return getattr(getattr(torch.ops, namespace), own).default


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run outside autocast, which would compute products of float32 sums in bf16."""

    @wraps(function)
    def wrapper(*args):
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args)

    return wrapper


__all__ = ["in_full_precision", "in_graph", "operator_namespace", "register_for_cpu"]
