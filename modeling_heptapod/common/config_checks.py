"""Checks and types of fields, shared by all configurations."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar


LARGEST = 2**31 - 1  # native code and index arithmetic use 32 bits
MOST_LAYERS = 65_536

_Given = TypeVar("_Given")
_Read = TypeVar("_Read")


class Field(Generic[_Given, _Read]):
    """A field that is given as one type and read as another, once the config has filled it in. At run time it has the first."""

    if TYPE_CHECKING:

        def __init__(self, default: _Given) -> None: ...
        def __get__(self, config: object, owner: type | None = None) -> _Read: ...
        def __set__(self, config: object, value: _Given) -> None: ...
    else:

        def __class_getitem__(cls, types):
            return types[0]

        def __new__(cls, default):
            return default


def check_numbers(config) -> None:
    """Raise a `ValueError` for a field that is or contains a number that is NaN, infinite or beyond 32 bits.

    Called before derived values are computed, some of which are lists with an entry per layer.

    Args:
        config (`PreTrainedConfig`): config with fields of any type; fields without numbers are ignored.
    """
    for name in (field.name for field in dataclasses.fields(config)):
        _check(name, getattr(config, name, None))
    for name in (x for x in vars(config) if x.endswith("_eps") or x == "initializer_range"):
        value = getattr(config, name)
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"`num_hidden_layers` must be at most {MOST_LAYERS}, got {layers}.")
    rope = getattr(config, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    if isinstance(theta, (int, float)) and theta <= 0:
        raise ValueError(f"`rope_parameters['rope_theta']` must be positive, got {theta}.")


def _check(name, value):
    if isinstance(value, dict):
        for key, entry in value.items():
            _check(f"{name}[{key!r}]", entry)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check(f"{name}[{index}]", entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"`{name}` must be at most {LARGEST}, got {value}.")


def check_fields(config, choices: Mapping[str, Collection[str]], at_least_one: tuple[str, ...]) -> None:
    """Raise a `ValueError` for an unknown option, a size below 1, heads that do not divide the width, and bad dropouts.

    Args:
        config (`PreTrainedConfig`): with `hidden_size`, `num_attention_heads`, `hidden_dropout` and `attention_dropout`.
        choices (`Mapping[str, Collection[str]]`): names of fields to their possible values.
        at_least_one (`tuple[str, ...]`): names of sizes.
    """
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"`{name}` must be one of {tuple(known)}, got {getattr(config, name)!r}.")
    for name in at_least_one:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be a multiple of `num_attention_heads` "
            f"({config.num_attention_heads})."
        )
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {getattr(config, name)}.")


def check_window_sizes(config) -> None:
    """Raise a `ValueError` unless `window_sizes` has an entry for each layer, `None` or at least 1."""
    windows = config.window_sizes
    if len(windows) != config.num_hidden_layers:
        raise ValueError(
            f"`window_sizes` must have one entry for each of the {config.num_hidden_layers} layers, got {len(windows)}: "
            f"{windows}."
        )
    if any(window is not None and window < 1 for window in windows):
        raise ValueError(f"`window_sizes` must be at least 1 or None (global), got {windows}.")


__all__ = ["Field", "check_fields", "check_numbers", "check_window_sizes"]
