"""Public names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, names: dict[str, list[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package with public names in its submodules.

    Args:
        package (`str`): `__name__` of the package.
        names (`dict[str, list[str]]`): public names by the submodule that they are imported from.
    """
    module_of = {name: module for module, exported in names.items() for name in exported}

    def __getattr__(name):
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__():
        return sorted({*vars(sys.modules[package]), *module_of})

    return __getattr__, __dir__, sorted(module_of)


__all__ = ["lazy_exports"]
