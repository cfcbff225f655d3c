"""Checks of a cache before a forward pass uses it: it may come from another model."""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache

from .transformers_versions import CACHE


class LayerStates(NamedTuple):
    """Expected states of one layer of a cache that has seen a token.

    Attributes:
        kind (`str`): transformers' name for the type of the layer.
        shapes (`dict[tuple[str, int | None], tuple[int | None, ...]]`): shape of each state without the batch dimension,
            by attribute and index (`("conv_states", 0)`, `("keys", None)`); `None` stands for any size.
        precise (`bool`): whether states are kept in float32 or higher precision, whatever the dtype of the model.
        sliding_window (`int`, *optional*): window of the layer.
        is_static (`bool`): whether the layer is that of a static cache.
    """

    kind: str
    shapes: dict[tuple[str, int | None], tuple[int | None, ...]]
    precise: bool = False
    sliding_window: int | None = None
    is_static: bool = False


def held_states(layer: Any) -> dict[tuple[str, int | None], torch.Tensor]:
    """States that a layer of a cache holds, by attribute and index; empty before the first token."""
    held: dict[tuple[str, int | None], torch.Tensor] = {}
    for name in ("keys", "values"):
        state = getattr(layer, name, None)
        if state is not None and state.dim() > 1:  # stock layers begin with an empty vector
            held[name, None] = state
    for name in ("conv_states", "recurrent_states"):
        for place, state in getattr(layer, name, {}).items():
            if state is not None:
                held[name, place] = state
    return held


def check_states(
    cache: Cache, expected: list[LayerStates], inputs_embeds: torch.Tensor | None, one_device: bool
) -> int | None:
    """Compare the states of a cache with the expected ones.

    Args:
        cache (`Cache`): cache of any origin.
        expected (`list[LayerStates]`): expected states of each layer.
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`, *optional*): input of the pass that continues the
            cache; states must have its dtype.
        one_device (`bool`): whether states must be on the device of `inputs_embeds`.

    Returns:
        `int`: batch size of the states, `None` before the first token.

    Raises:
        ValueError: if a state is missing, unexpected, or has another shape, dtype or device.
    """
    if len(cache.layers) != len(expected):
        raise _misfit(f"it has {len(cache.layers)} layers, the model needs {len(expected)}")
    device = inputs_embeds.device if one_device and inputs_embeds is not None else None
    dtypes = _possible_dtypes(inputs_embeds)
    begun, rows = [], None
    for idx, (layer, states) in enumerate(zip(cache.layers, expected)):
        window = getattr(layer, "sliding_window", None)
        layer_classes = STATIC_LAYER_TYPE_MAPPING if states.is_static else DYNAMIC_LAYER_TYPE_MAPPING
        if not isinstance(layer, layer_classes[states.kind]) or window != states.sliding_window:
            raise _misfit(
                f"layer {idx} is a {type(layer).__name__} of window {window}, expected a "
                f"{layer_classes[states.kind].__name__} of window {states.sliding_window}"
            )
        held = held_states(layer)
        names = held.keys() if held else {(n, i) for n, i in states.shapes if i is None or i in getattr(layer, n)}
        if names != states.shapes.keys():
            raise _misfit(f"layer {idx} has {_names(names)}, expected {_names(states.shapes)}")
        if names:
            begun.append(bool(held))
        for name, state in held.items():
            shape = states.shapes[name]
            if name[0] == "conv_states" and getattr(layer, "record_past", False):
                shape = (*shape[:-1], None)  # longer, so that tokens can be removed
            rows = state.shape[0] if rows is None and state.dim() else rows
            fault = _fault(state, shape, rows, dtypes and dtypes[states.precise], device)
            if fault is not None:
                raise _misfit(f"layer {idx} has {_names([name])} {fault}")
        lengths = [held[name, None].shape[2] for name in ("keys", "values") if (name, None) in held]
        if len(set(lengths)) > 1:
            raise _misfit(f"layer {idx} has {lengths[0]} keys, but {lengths[1]} values")
    if len(set(begun)) > 1:
        raise _misfit("some of its layers hold states and others do not")
    if rows == 0:
        raise ValueError(f"`{CACHE}` has a batch size of 0.")
    return rows


def _fault(state, shape, rows, dtypes, device):
    """Mismatch of a state as the end of an error message, `None` if there is none."""
    sizes = state.shape[1:]
    fits = sizes == shape or (len(sizes) == len(shape) and all(a in (None, b) for a, b in zip(shape, sizes)))
    if not fits or state.dim() == 0:
        wanted = ", ".join("?" if size is None else str(size) for size in ("rows", *shape))
        return f"of shape {list(state.shape)}, expected [{wanted}]"
    if state.shape[0] != rows:
        return f"of {state.shape[0]} rows, others have {rows}"
    if dtypes is not None and state.dtype not in dtypes:
        return f"of {state.dtype}, expected {' or '.join(map(str, dtypes))}"
    if device is not None and state.device != device:
        return f"on {state.device}, the input is on {device}"
    return None


def _possible_dtypes(inputs_embeds):
    """Allowed dtypes of states without and with `precise`; `None` without an input to compare with."""
    if inputs_embeds is None:
        return None
    own, device = inputs_embeds.dtype, inputs_embeds.device.type
    precise = torch.promote_types(own, torch.float32)
    if torch.is_autocast_enabled(device):
        return (own, precise, torch.get_autocast_dtype(device)), (precise,)
    return (own,), (precise,)


def _names(names):
    return ", ".join(name if place is None else f"{name}[{place}]" for name, place in names) or "no states"


def _misfit(fault):
    return ValueError(
        f"`{CACHE}` does not fit this model: {fault}. A cache can be used with the model whose config it was created from, "
        "and with inputs of one device and dtype."
    )


__all__ = ["LayerStates", "check_states", "held_states"]
