"""Checks of numbers, shared by all configurations."""

import dataclasses
import math


LARGEST = 2**31 - 1  # native code and index arithmetic use 32 bits
MOST_LAYERS = 65_536


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


__all__ = ["check_numbers"]
