"""All axes that come with this package, by name."""

import json
from pathlib import Path

from .axes import AXIS_CLASSES, Axis, ConstantAxis, RandomAxis
from .decision_tree_axis import DecisionTreeAxis
from .python_axes import PythonBracketAxis, PythonIndentationAxis, PythonStringAxis, PythonTokenKindAxis
from .text_axes import AffixAxis, GoldTagAxis, PartOfSpeechAxis


BUILTIN_AXES = (
    ConstantAxis,
    RandomAxis,
    AffixAxis,
    PartOfSpeechAxis,
    GoldTagAxis,
    PythonTokenKindAxis,
    PythonBracketAxis,
    PythonIndentationAxis,
    PythonStringAxis,
    DecisionTreeAxis,
)


def make_axis(spec) -> Axis:
    """Make an axis from its name or description.

    Args:
        spec: an axis, which is returned unchanged, a dict from `to_dict`, a name like `"affix"` or `"bracket"`, or the path of a
            `.json` file with such a dict.

    Raises:
        ValueError: for a name or class that is not known, and for arguments that the class does not take. The module of a
            custom class must be imported before.
        TypeError: for anything else.
    """
    if isinstance(spec, Axis):
        return spec
    if isinstance(spec, (str, Path)) and str(spec).endswith(".json"):
        spec = json.loads(Path(spec).read_text(encoding="utf-8"))
    elif isinstance(spec, (str, Path)):
        registry_names = {
            name: (axis_class, arguments)
            for axis_class in (*AXIS_CLASSES.values(), *BUILTIN_AXES)  # no other class takes a name of these
            for name, arguments in vars(axis_class).get("registry_names", {}).items()
        }
        if spec not in registry_names:
            raise ValueError(
                f"axis {spec!r} is neither a .json file nor one of {sorted(registry_names)}; `load_axis_class` loads a class "
                "from a file."
            )
        axis_class, arguments = registry_names[spec]
        return axis_class(**arguments)
    if not isinstance(spec, dict) or not isinstance(spec.get("class"), str):
        raise TypeError(f"an axis is made from an axis, a name, or a dict with a 'class', got {spec!r}.")
    arguments = dict(spec)
    class_name = arguments.pop("class")
    if class_name not in AXIS_CLASSES:
        raise ValueError(
            f"axis {spec.get('name')!r} is of class {class_name!r}, which is not one of {sorted(AXIS_CLASSES)}: import "
            "the module that defines it first, or, where the class was saved from a file, load the folder with "
            "`trust_remote_code=True`."
        )
    try:
        return AXIS_CLASSES[class_name](**arguments)
    except TypeError as error:
        raise ValueError(
            f"axis {spec.get('name')!r}: {class_name} cannot be made from {arguments}, which another version may have "
            f"written: {error}."
        ) from error


__all__ = ["BUILTIN_AXES", "make_axis"]
