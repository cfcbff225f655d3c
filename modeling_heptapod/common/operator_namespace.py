"""Namespaces of operators that are registered with torch."""

import hashlib


def operator_namespace(module: str) -> str:
    """Namespace for the operators of a module of this package, or of a copy of it from a saved folder.

    Each copy has its own namespace: one process may load several versions of the code.

    Args:
        module (`str`): `__name__` of the module.
    """
    if module.startswith("modeling_heptapod."):
        return "heptapod"
    return f"heptapod_{hashlib.sha256(module.encode()).hexdigest()[:8]}"


__all__ = ["operator_namespace"]
