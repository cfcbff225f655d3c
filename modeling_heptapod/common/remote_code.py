"""Saved folders hold the code of their classes, and load with `trust_remote_code=True` where this package is not installed.

Here the code lies in folders, one for each family; Transformers loads it from one folder, whose modules import each other
as `from .name import`. So relative imports are followed from the modules that a folder names and written anew.
"""

import ast
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar


def write_code(modules: Iterable[Path], folder: str | Path) -> None:
    """Write modules, and those that they import relatively, side by side into a folder.

    Args:
        modules (`Iterable[Path]`): files to begin with.
        folder (`str` or `Path`): is made where it is not there.

    Raises:
        ValueError: for two modules of one name, and for a relative import of a package.
    """
    waiting, flat, sources = list(modules), {}, {}
    while waiting:
        path = waiting.pop()
        if path in flat.values():
            continue
        if path.name in flat:
            raise ValueError(f"{flat[path.name]} and {path} would be one file in a saved folder: rename one of them")
        flat[path.name] = path
        sources[path.name], imported = _flatten(path, path.stat().st_mtime_ns)
        waiting += imported
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        Path(folder, name).write_text(source, encoding="utf-8")


@lru_cache(maxsize=256)
def _flatten(path, modified):
    """Source with `from .name import` in place of each relative import, and the files of what is imported so.

    `modified`, the file's time of change, is what tells a file that was edited from the one that was read.
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
    """Before `PreTrainedConfig` or `ProcessorMixin`: what is saved has the code of its family with it.

    Models need nothing of their own: they save their config.

    Attributes:
        _auto_classes (`dict[str, str]`): from the name of an Auto class to `"module.Class"`, with modules in the folder of
            the class itself.
    """

    _auto_classes: ClassVar[dict[str, str]]

    def save_pretrained(self, save_directory, **kwargs):
        """As Transformers' own, with the code; with `trust_remote_code=True` every Auto class loads the folder.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to.
            kwargs: as there.
        """
        ours = {reference.partition(".")[0] for reference in self._auto_classes.values()}
        given = getattr(self, "auto_map", None) or {}
        # Also classes that a user has registered; what is said of ours is of the folder that they were loaded from.
        others = {name: given[name] for name in given if _module_of(given[name]) not in ours}
        self.auto_map = {**self._auto_classes, **others}
        here = Path(sys.modules[_defining(type(self)).__module__].__file__).parent
        files = (here / f"{name}.py" for name in sorted(ours))
        write_code([file for file in files if file.is_file()], save_directory)  # loaded as code, a config comes alone
        super().save_pretrained(save_directory, **kwargs)

    def _get_files_timestamps(self, working_dir):
        """As Transformers' own, by which it knows what to push: the code has been written already, and counts as changed."""
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if not name.endswith(".py")}


def _module_of(reference):
    return reference.rpartition("--")[2].partition(".")[0] if isinstance(reference, str) else None


def _defining(cls):
    """The class of a family, of which `cls` may be a subclass somewhere else."""
    return next(base for base in cls.__mro__ if "_auto_classes" in vars(base))


__all__ = ["CustomCodeMixin", "write_code"]
