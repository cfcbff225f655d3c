"""Namespaces of the operators that this package registers with torch."""

import hashlib


def operator_namespace(module: str) -> str:
    """Namespace for the operators of a module of this package, or of a copy of it that a saved folder brought.

    Each copy has its own: its code may be of another version than the package's, or than another folder's in the same process.

    Args:
        module (`str`): its `__name__`.
    """
    if module.startswith("modeling_heptapod."):
        return "heptapod"
    return f"heptapod_{hashlib.sha256(module.encode()).hexdigest()[:8]}"


__all__ = ["operator_namespace"]
