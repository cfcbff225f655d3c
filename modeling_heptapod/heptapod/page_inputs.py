"""Inputs of the grid: checks of sizes, shapes and ids, and the masks of padding."""

from collections.abc import Sequence

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.import_utils import is_tracing


def check_page(name: str, tensor: torch.Tensor, channels: int | None = None) -> None:
    """Raises a `ValueError` unless a tensor is `[batch, height, width]` or `[batch, cells]`, with `channels` last if given."""
    last = [] if channels is None else [channels]
    shape = list(tensor.shape)
    if len(shape) - len(last) not in (2, 3) or 0 in shape or shape[len(shape) - len(last) :] != last:
        end = "" if channels is None else f", {channels}"
        raise ValueError(
            f"`{name}` must be [batch, height, width{end}] or [batch, cells{end}], none of them 0, got {shape}."
        )


def page_size(
    shape: tuple[int, ...], grid_size: Sequence[int] | None, default: Sequence[int] | None
) -> tuple[int, int]:
    """Height and width of a page of `shape`, `[batch, height, width]` or `[batch, cells]`.

    Raises:
        ValueError: if the size of a flat page is not given, or `grid_size` does not fit.
    """
    if grid_size is not None and not _is_grid_size(grid_size):
        raise ValueError(f"`grid_size` must be a height and a width of at least 1, got {grid_size!r}.")
    if len(shape) == 3:
        height, width = shape[1:]
        if grid_size is not None and tuple(grid_size) != (height, width):
            raise ValueError(f"`grid_size` {tuple(grid_size)} does not fit the page given, {height} x {width}.")
        return height, width
    grid_size = default if grid_size is None else grid_size
    if grid_size is None:
        raise ValueError(f"A flat page of {shape[1]} cells needs `grid_size`, in the call or in the config.")
    height, width = grid_size
    if height * width != shape[1]:
        raise ValueError(f"`grid_size` {height} x {width} does not fit a flat page of {shape[1]} cells.")
    return height, width


def _is_grid_size(grid_size):
    """Whether `grid_size` is two positive integers. Symbolic sizes of an export are accepted."""
    if not isinstance(grid_size, (tuple, list)) or len(grid_size) != 2:
        return False
    return all(isinstance(x, torch.SymInt) or (isinstance(x, int) and x > 0) for x in grid_size)


def make_padding_mask(
    attention_mask: torch.Tensor | None, shape: tuple[int, ...], grid_size: tuple[int, int]
) -> torch.Tensor | None:
    """`attention_mask` as booleans `[batch, height, width]`, or `None` without padding."""
    check_shape("attention_mask", attention_mask, shape)
    if attention_mask is None or (not is_tracing(attention_mask) and attention_mask.all()):
        return None
    return attention_mask.bool().view(shape[0], *grid_size)


def make_global_mask(config, padding_mask: torch.Tensor | None, inputs_embeds: torch.Tensor):
    """Padding mask of heads that attend to the whole page, in the form that the attention implementation takes."""
    if padding_mask is None or config._attn_implementation == "eager":
        return None
    mask = padding_mask.flatten(1)
    if config._attn_implementation != "sdpa":
        return create_bidirectional_mask(config, inputs_embeds.flatten(1, -2), mask)
    # Broadcast over queries instead of quadratic in cells. The softmax of a page without keys is undefined: it gets all.
    return (mask | ~mask.any(1, keepdim=True))[:, None, None, :]


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` if a tensor is given and has another shape than the page."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"`{name}` must be {list(shape)} like the page, got {list(tensor.shape)}.")


def values_are_readable(ids: torch.Tensor) -> bool:
    """Whether values can be checked: on the CPU and outside of tracing. Elsewhere a read synchronizes the device."""
    return ids.device.type == "cpu" and not is_tracing(ids)


def check_vocabulary(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raises a `ValueError` for ids outside of the vocabulary, where values can be read."""
    if values_are_readable(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"`{name}` must be in [0, {vocab_size}), got values from {low} to {high}.")
