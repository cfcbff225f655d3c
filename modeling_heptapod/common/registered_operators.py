"""Operators that are registered with torch, so that `torch.compile` keeps them as one call."""

import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


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


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run outside autocast, which would compute products of float32 sums in bf16."""

    @wraps(function)
    def wrapper(*args):
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args)

    return wrapper


__all__ = ["in_full_precision", "in_graph", "operator_namespace"]
