"""Axis classes in files of their own: loaded by path, and saved beside a processor, so that the folder loads anywhere.

A saved file imports from the modules beside it (`from .axes import Axis`) in place of this package.
"""

import ast
import inspect
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from .axes import AXIS_CLASSES, Axis
from .axis_registry import BUILTIN_AXES


_FAMILY, _HERE = __name__.rpartition(".")[0], Path(__file__).parent
_PACKAGE = "modeling_heptapod"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_sources: dict[str, str] = {}  # of the files that were loaded here, by the names of their modules


def load_axis_class(path: str | Path, class_name: str) -> type[Axis]:
    """An axis class from a Python file, whose code runs. Processors with such an axis save the file, too.

    Args:
        path (`str` or `Path`): a file that imports names of this package as `from modeling_heptapod import Axis`, and other
            packages.
        class_name (`str`): of a subclass of [`Axis`] in it.

    Raises:
        ValueError: for a file that is not there, cannot be imported, or has the name of a module of this package; for a
            class that is not in it, is no axis, or has the name of another axis class; for imports of other files.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    is_taken = path.resolve().parent != _HERE and path.stem in _module_names()
    if path.suffix != ".py" or not path.stem.isidentifier() or is_taken:
        raise ValueError(
            f"{path} must be named like a Python module, and like none of this package, got {path.name!r}"
        )
    source, name = _with_relative_imports(path), f"{_FAMILY}.{path.stem}"
    if _sources.get(name) != source:
        _run(path, source, name)
    sys.modules[name].__file__ = str(path)  # the same code may lie elsewhere now
    found = getattr(sys.modules[name], class_name, None)
    if not isinstance(found, type) or found.__module__ != name:
        raise ValueError(f"{path} must define the class {class_name!r}")
    if not issubclass(found, Axis):
        raise ValueError(f"{class_name} in {path} must be a subclass of `Axis`")
    found._code = source  # the file may change before a processor with it is saved
    return found


def _module_names():
    folders = (_HERE, _HERE.parent / "common", _HERE.parent / "leap")
    return {path.stem for folder in folders for path in folder.glob("*.py")}


def _run(path, source, name):
    spec = spec_from_file_location(name, path)
    assert spec is not None  # for type checkers
    module, before, known = module_from_spec(spec), dict(AXIS_CLASSES), sys.modules.get(name)
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
        for class_name, axis_class in before.items():
            if AXIS_CLASSES[class_name] is not axis_class and axis_class.__module__ != name:
                where = sys.modules[axis_class.__module__].__file__
                raise ImportError(
                    f"its class {class_name} has the name of one in {where}: rename one of them. After the file itself was "
                    "renamed, start Python anew"
                )
    except Exception as error:  # of the file, which may raise any
        AXIS_CLASSES.clear()
        AXIS_CLASSES.update(before)
        sys.modules.pop(name)
        if known is not None:
            sys.modules[name] = known
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    _sources[name] = source


def _with_relative_imports(path):
    """The source of a file with `from .axes import Axis` in place of `from modeling_heptapod import Axis`."""
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source, path)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno} cannot be imported: SyntaxError: {error.msg}") from error
    lines = source.split("\n")  # not `splitlines`, which also ends lines at characters that Python does not
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    # From the end, so that the places of those before stay as they are.
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        written = _relative(node, path)
        if written is None:
            continue
        assert node.end_lineno is not None and node.end_col_offset is not None  # for type checkers
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first].encode()[: node.col_offset], lines[last].encode()[node.end_col_offset :]
        lines[first : last + 1] = [before.decode() + written + after.decode()]
    return "\n".join(lines)


def _relative(node, path):
    """An import of this package written anew; `None` for one of another package, which stays as it is."""
    where = f"{path}, line {node.lineno}"
    if isinstance(node, ast.Import):
        if any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
            raise ValueError(f"{where}: names of this package must be imported as `from {_PACKAGE} import Axis`")
        return None
    if node.level:
        if node.level > 1 or node.module is None or not (_HERE / f"{node.module}.py").is_file():
            raise ValueError(f"{where}: an axis must be in one file, without relative imports of others")
        return None
    if node.module.split(".")[0] != _PACKAGE:
        return None
    statements = []
    for alias in node.names:
        found = getattr(import_module(node.module), alias.name, None)
        module = getattr(found, "__module__", "")
        if module.rpartition(".")[0] != _FAMILY:
            raise ValueError(f"{where}: of this package only what belongs to axes can be imported, got {alias.name}")
        renamed = f" as {alias.asname}" if alias.asname else ""
        statements.append(f"from .{module.rpartition('.')[2]} import {alias.name}{renamed}")
    return "; ".join(statements)


class AxisFilesMixin(ProcessorMixin):
    """A processor that is saved with the files of its axes. Subclasses put [`CustomCodeMixin`] before it."""

    axes: tuple[Axis, ...]
    auto_map: dict[str, str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As Transformers' own. With `trust_remote_code=True` the files of axes that the folder holds run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or a name on the Hub.
            args, kwargs: as there.
        """
        if kwargs.get("trust_remote_code"):
            options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            saved, _ = ProcessorMixin.get_processor_dict(pretrained_model_name_or_path, **options)
            names = {spec["class"] for spec in saved.get("axes", ()) if isinstance(spec, dict) and "class" in spec}
            for class_name, reference in (saved.get("auto_map") or {}).items():
                known = AXIS_CLASSES.get(class_name)
                # A class that was imported otherwise is the one that is meant; of those from files each folder has its own.
                if class_name in names and (known is None or known.__module__ in _sources):
                    file = f"{reference.rpartition('--')[2].partition('.')[0]}.py"
                    path = cached_file(pretrained_model_name_or_path, file, **options)
                    assert path is not None  # for type checkers
                    load_axis_class(path, class_name)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As Transformers' own, with the files of axes from [`load_axis_class`], which the processor's module imports.

        Args:
            save_directory (`str` or `os.PathLike`): folder to write to.
            push_to_hub, kwargs: as there.
        """
        entry = Path(save_directory, "processing_multigrid.py")
        for axis_class in dict.fromkeys(map(type, self.axes)):
            module = axis_class.__module__
            if axis_class in BUILTIN_AXES or module.rpartition(".")[0] != _FAMILY:
                continue
            stem, class_name = module.rpartition(".")[2], axis_class.__name__
            source = vars(axis_class).get("_code") or Path(inspect.getfile(axis_class)).read_text(encoding="utf-8")
            Path(save_directory, f"{stem}.py").write_text(source, encoding="utf-8")
            code, line = entry.read_text(encoding="utf-8"), f"from .{stem} import {class_name}  # noqa: E402, F401\n"
            if line not in code:
                entry.write_text(code + line, encoding="utf-8")
            self.auto_map[class_name] = f"{stem}.{class_name}"
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


__all__ = ["AxisFilesMixin", "load_axis_class"]
