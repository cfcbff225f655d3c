"""Checks of the inputs of a forward pass, and masks and positions made from them, shared by all families."""

from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from transformers.utils.import_utils import is_tracing

from .transformers_versions import CACHE


def has_dynamic_shapes(x: torch.Tensor) -> bool:
    """Whether `torch.export` traces sizes of `x` as symbols, which loops over sizes would make constants."""
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in x.shape)


def is_dynamic(size: int) -> bool:
    """Whether a compiler or an export treats a size as a symbol: comparisons with it would restrict the program."""
    return torch.compiler.is_compiling() and not has_static_value(size)


def is_torch_func_active() -> bool:
    """Whether a transform of `torch.func` (`grad`, `vmap`) is active: it supports plain operations only, and reads no values."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_eager(x: torch.Tensor) -> bool:
    """Whether native code can read the memory of a tensor: it is no subclass, and nothing is being compiled or traced."""
    plain = type(x) in (torch.Tensor, nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def check_ids(name: str, ids: Any) -> None:
    """Raise a `TypeError` unless `ids` is a tensor of integers."""
    kind = getattr(ids, "dtype", type(ids).__name__)
    if kind not in (torch.long, torch.int):
        raise TypeError(f"`{name}` must be torch.long or torch.int, got {kind}.")


def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raise a `ValueError` unless exactly one is given, a `TypeError` for a wrong dtype."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
    if input_ids is not None:
        check_ids("input_ids", input_ids)
    if inputs_embeds is not None and not inputs_embeds.is_floating_point():
        raise TypeError(f"`inputs_embeds` must be floating point, got {inputs_embeds.dtype}.")


def embed_text(
    table: nn.Embedding,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """Embeddings `[batch, seq, width]` of tokens `[batch, seq]`, or the given ones.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: unless exactly one is given, of the right shape, and for ids outside of the vocabulary.
    """
    check_one_input(input_ids, inputs_embeds)
    if inputs_embeds is not None:
        shape = inputs_embeds.shape
        if len(shape) != 3 or 0 in shape[:2] or shape[2] != width:
            raise ValueError(f"`inputs_embeds` must be [batch >= 1, seq >= 1, {width}], got {list(shape)}.")
        return inputs_embeds
    assert input_ids is not None  # for type checkers
    shape = input_ids.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`input_ids` must be [batch >= 1, seq >= 1], got {list(shape)}.")
    return embed_ids(table, input_ids, "`input_ids`")


def embed_ids(table: nn.Embedding, ids: torch.Tensor, what: str) -> torch.Tensor:
    """Rows of an embedding. Raises a `ValueError` that names `what` for ids out of range."""
    try:
        return table(ids)
    except IndexError as error:  # on a CPU; on other devices reading a value would synchronize
        size = table.weight.shape[0]  # which adapters have as well
        low, high = (int(x) for x in ids.aminmax())
        raise ValueError(f"{what} must be in [0, {size}), got values from {low} to {high}.") from error


def check_position_ids(position_ids: torch.Tensor | None, batch: int, seq: int) -> None:
    """Raise a `ValueError` for positions of another shape, a `TypeError` for other dtypes than integers."""
    if position_ids is None:
        return
    check_ids("position_ids", position_ids)
    shape = position_ids.shape  # `in` has no answer for sizes that a compiler leaves open
    if len(shape) != 2 or (shape[0] != 1 and shape[0] != batch) or shape[1] != seq:
        raise ValueError(f"`position_ids` must be [1 or {batch}, {seq}], got {list(shape)}.")


def check_position_range(position_ids: torch.Tensor, limit: int, remedy: str) -> None:
    """Raise a `ValueError` for positions outside `[0, limit)`, those of a learned table; `remedy` ends the message."""
    if is_tracing(position_ids):
        return
    low, high = (int(x) for x in position_ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"`position_ids`, given or derived, must be in [0, {limit}), got values from {low} to {high}: the model has "
            f"`max_position_embeddings`={limit}. {remedy}"
        )


def token_mask(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past: int | torch.Tensor
) -> torch.Tensor | None:
    """Boolean mask of real tokens, `[batch, seq]` or `[batch, past + seq]` as given; `None` without padding.

    Raises:
        TypeError: for a mask that is not a tensor.
        ValueError: for a mask of another shape, or with other values than 0 and 1.
    """
    if attention_mask is None:
        return None
    batch, seq, _ = inputs_embeds.shape
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"`attention_mask` must be a tensor [{batch}, length], got {type(attention_mask).__name__}.")
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ValueError(f"`attention_mask` must be [{batch}, length], got {list(attention_mask.shape)}.")
    if is_tracing(attention_mask):
        return attention_mask.bool()
    if attention_mask.shape[1] not in (seq, int(past) + seq):
        raise ValueError(
            f"`attention_mask` must cover the {seq} new tokens or all {int(past) + seq} seen so far, got length "
            f"{attention_mask.shape[1]}."
        )
    real = attention_mask == 1
    if real.all():
        return None
    if not (real | (attention_mask == 0)).all():
        raise ValueError("`attention_mask` must be 1 at tokens and 0 at pads, got other values.")
    return real


def mask_of_new_tokens(mask: torch.Tensor | None, seq: int) -> torch.Tensor | None:
    """The last `seq` columns of a mask from `token_mask`; `None` if all of them are real tokens."""
    if mask is None or mask.shape[1] == seq:
        return mask
    mask = mask[:, -seq:]
    return None if not is_tracing(mask) and mask.all() else mask


def apply_mask_to_padding_states(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros in `x [..., channels]` where `mask [...]` is `False`: a weight of 0 would not remove NaN or infinity from a sum."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def check_past_mask(attention_mask: torch.Tensor | None, seq: int, lengths: int | list[int] | torch.Tensor) -> None:
    """Raise a `ValueError` if a mask over all tokens so far does not match the tokens in a cache.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, seq or past + seq]`, *optional*): 0 at padding.
        seq (`int`): number of new tokens.
        lengths (`int`, `list[int]`, or `torch.LongTensor` of shape `[]` or `[batch]`): number of real tokens of each row
            in the cache.
    """
    if attention_mask is None or attention_mask.shape[1] == seq or is_tracing(attention_mask):
        return
    given = attention_mask[:, :-seq].long().sum(1)
    lengths = torch.as_tensor(lengths, device=given.device)
    if (given != lengths).any():
        held = lengths.expand(len(given)).tolist()
        raise ValueError(
            f"`attention_mask` has {given.tolist()} real tokens before the new ones in each row, but `{CACHE}` holds "
            f"{held}: padding cannot be masked after it was processed."
        )


def count_positions(
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    past: int | torch.Tensor,
) -> torch.Tensor:
    """Positions `[1 or batch, seq]` that count real tokens only and restart with each packed sequence.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`).
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): mask of real tokens.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token, as runs.
        past (`int`, or `torch.LongTensor` of shape `[]` or `[batch]`): number of real tokens before these.
    """
    if isinstance(past, torch.Tensor) and past.dim() == 1:
        past = past.unsqueeze(1)
    if mask is None:
        place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    else:
        place = (mask.long().cumsum(1) - 1).clamp_min(0)
    if segment_ids is None:
        return place + past
    # Number of real tokens before the run of each token: the highest count at the start of a run so far.
    before = place if mask is None else mask.long().cumsum(1) - mask.long()
    starts = nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
    return (place - torch.where(starts, before, 0).cummax(1).values).clamp_min(0)


__all__ = [
    "apply_mask_to_padding_states",
    "check_ids",
    "check_one_input",
    "check_past_mask",
    "check_position_ids",
    "check_position_range",
    "count_positions",
    "embed_ids",
    "embed_text",
    "has_dynamic_shapes",
    "is_dynamic",
    "is_eager",
    "is_torch_func_active",
    "mask_of_new_tokens",
    "token_mask",
]
