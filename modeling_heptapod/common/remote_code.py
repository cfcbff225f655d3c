"""Saved folders with the code of their classes, which load with `trust_remote_code=True` where this package is not installed.

The package has a folder for each family. Transformers loads code from a single folder, whose modules import each other as
`from .name import`, and loads Python files only. So relative imports are followed and rewritten, and C sources become modules.
"""

import ast
import inspect
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar


def write_code(modules: Iterable[Path], folder: str | os.PathLike) -> None:
    """Write modules, and those that they import relatively, side by side into a folder.

    A module with a C file of the same name beside it is written as this file's text, in the constant `SOURCE`.

    Args:
        modules (`Iterable[Path]`): files to begin with.
        folder (`str` or `os.PathLike`): created if needed.

    Raises:
        ValueError: for two modules of one name, for a relative import of a package, and for C that no raw string can hold.
    """
    waiting = list(modules)
    flat: dict[str, Path] = {}
    sources: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if path in flat.values():
            continue
        if path.name in flat:
            raise ValueError(f"{flat[path.name]} and {path} would be one file in a saved folder: rename one of them")
        flat[path.name] = path
        if path.with_suffix(".c").is_file():
            sources[path.name] = _as_module(path.with_suffix(".c"))
            continue
        sources[path.name], imported = _flatten(path, path.stat().st_mtime_ns)
        waiting += imported
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        Path(folder, name).write_text(source, encoding="utf-8")


def _as_module(path):
    """Python source that holds C source."""
    source = path.read_text(encoding="utf-8")
    if '"""' in source or source.endswith(("\\", '"')):
        raise ValueError(f"{path} must not contain three double quotes, nor end in a backslash or a double quote")
    return f'"""C source, saved from `{path.name}`."""\n\nSOURCE = r"""{source}"""\n\n__all__ = ["SOURCE"]\n'


@lru_cache(maxsize=256)
def _flatten(path, modified):
    """The source with `from .name import` for each relative import, and the files that are imported.

    `modified` is the file's modification time. It keeps an edited file from being taken from the cache.
    """
    source = path.read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source, path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        file = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
        if node.module is None or not file.is_file():
            raise ValueError(
                f"{path}, line {node.lineno}: a relative import must be of a module, in a file of its own"
            )
        imported.append(file)
        lines[node.lineno - 1] = re.sub(r"\bfrom\s+\.+[\w.]+", f"from .{file.stem}", lines[node.lineno - 1], count=1)
    return "".join(lines), tuple(imported)


class CustomCodeMixin:
    """Mixin for `PreTrainedConfig` and `ProcessorMixin` that saves the code of their family with them.

    Models need no mixin, because they save their config.

    Attributes:
        _auto_classes (`dict[str, str]`): names of Auto classes to `"module.Class"`. The modules are in the folder of the
            class itself.
    """

    _auto_classes: ClassVar[dict[str, str]]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save as Transformers does, and the code with it, so that Auto classes load the folder with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to.
            push_to_hub (`bool`): whether to push the folder to the Hub as well.
            kwargs: passed to Transformers' method.
        """
        ours = {reference.partition(".")[0] for reference in self._auto_classes.values()}
        given = getattr(self, "auto_map", None) or {}
        # Classes that a user registered stay; entries for ours point to the folder that they were loaded from.
        others = {name: given[name] for name in given if _module_of(given[name]) not in ours}
        self.auto_map = {**self._auto_classes, **others}
        here = Path(inspect.getfile(_defining(type(self)))).parent
        files = (here / f"{name}.py" for name in sorted(ours))
        # Remote code of a config comes without the models.
        write_code((file for file in files if file.is_file()), save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir):
        """Timestamps of the files that `push_to_hub` compares, without the code, which is always pushed."""
        times = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in times.items() if not name.endswith(".py")}


def _module_of(reference):
    return reference.rpartition("--")[2].partition(".")[0] if isinstance(reference, str) else None


def _defining(cls):
    """The class of a family that `cls` is or inherits from."""
    return next(base for base in cls.__mro__ if "_auto_classes" in vars(base))


__all__ = ["CustomCodeMixin", "write_code"]
