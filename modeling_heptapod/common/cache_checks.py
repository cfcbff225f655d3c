"""What the cache of a model must hold, looked at before a forward pass takes it: a cache is foreign until then."""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache

from .transformers_versions import CACHE


class LayerStates(NamedTuple):
    """What one layer of a cache holds once it has seen a token.

    Attributes:
        kind (`str`): transformers' name for the type of the layer.
        shapes (`dict[tuple[str, int | None], tuple[int | None, ...]]`): of each state, without its rows, by attribute and
            place (`("conv_states", 0)`, `("keys", None)`); `None` stands for any size.
        precise (`bool`): whether states have at least float32, whatever the dtype of the model.
        sliding_window (`int`, *optional*): of the layer.
    """

    kind: str
    shapes: dict[tuple[str, int | None], tuple[int | None, ...]]
    precise: bool = False
    sliding_window: int | None = None


def held_states(layer: Any) -> dict[tuple[str, int | None], torch.Tensor]:
    """The states that a layer of a cache holds, by attribute and place; none before the first token."""
    held = {}
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
    """Compare what a cache holds with what it should.

    Args:
        cache (`Cache`): of any origin.
        expected (`list[LayerStates]`): what each of its layers should hold.
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`, *optional*): what is to continue it: states must be
            of its dtype.
        one_device (`bool`): whether states must be where `inputs_embeds` are.

    Returns:
        `int`: rows of the states, `None` before the first token.

    Raises:
        ValueError: that says what does not fit.
    """
    if len(cache.layers) != len(expected):
        raise _misfit(f"it has {len(cache.layers)} layers, the model needs {len(expected)}")
    device = inputs_embeds.device if one_device and inputs_embeds is not None else None
    dtypes = _possible_dtypes(inputs_embeds)
    begun, rows = [], None
    for idx, (layer, states) in enumerate(zip(cache.layers, expected)):
        window = getattr(layer, "sliding_window", None)
        if not isinstance(layer, DYNAMIC_LAYER_TYPE_MAPPING[states.kind]) or window != states.sliding_window:
            raise _misfit(
                f"layer {idx} is a {type(layer).__name__} of window {window}, expected the layer for {states.kind!r} of "
                f"window {states.sliding_window}"
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
                shape = (*shape[:-1], None)  # it keeps more, to roll back
            rows = state.shape[0] if rows is None and state.dim() else rows
            fault = _fault(state, shape, rows, dtypes and dtypes[states.precise], device)
            if fault is not None:
                raise _misfit(f"layer {idx} has {_names([name])} {fault}")
        if ("keys", None) in held and layer.keys.shape[2] != layer.values.shape[2]:
            raise _misfit(f"layer {idx} has {layer.keys.shape[2]} keys, but {layer.values.shape[2]} values")
    if len(set(begun)) > 1:
        raise _misfit("some of its layers hold states and others do not")
    if rows == 0:
        raise ValueError(f"`{CACHE}` holds no rows: none were left when rows were chosen.")
    return rows


def _fault(state, shape, rows, dtypes, device):
    """What is wrong with a state, as words that follow its name; `None` where nothing is."""
    if state.dim() != len(shape) + 1 or any(a not in (None, b) for a, b in zip(shape, state.shape[1:])):
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
    """Dtypes of states like activations, and of precise ones; `None` where nothing is known."""
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
        f"`{CACHE}` is not of this model: {fault}. A cache serves the model whose config it was made with, and "
        "inputs of the same device and dtype."
    )


__all__ = ["LayerStates", "check_states", "held_states"]
