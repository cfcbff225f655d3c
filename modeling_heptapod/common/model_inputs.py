"""What all families ask of the inputs of a forward pass, and what masks and positions they make of them."""

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from transformers.utils.import_utils import is_tracing

from .transformers_versions import CACHE


def has_dynamic_shapes(x: torch.Tensor) -> bool:
    """Whether `torch.export` leaves sizes of it open: paths that loop over sizes would fix them then."""
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in x.shape)


def is_dynamic(size: int) -> bool:
    """Whether a compiler or an export leaves a size open: what is compared with it then narrows what the program is for."""
    return torch.compiler.is_compiling() and not has_static_value(size)


def is_torch_func_active() -> bool:
    """Whether `torch.func` (`grad`, `vmap`) is at work: it takes plain operations only, and lets no value be looked at."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def check_ids(name: str, ids: torch.Tensor) -> None:
    """Raise a `TypeError` unless `ids` is a tensor of integers."""
    kind = getattr(ids, "dtype", type(ids).__name__)
    if kind not in (torch.long, torch.int):
        raise TypeError(f"`{name}` must be torch.long or torch.int, got {kind}.")


def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raise a `ValueError` unless exactly one is given, a `TypeError` where it is of a wrong dtype."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
    if input_ids is not None:
        check_ids("input_ids", input_ids)
    elif not inputs_embeds.is_floating_point():
        raise TypeError(f"`inputs_embeds` must be floating point, got {inputs_embeds.dtype}.")


def embed_text(
    table: nn.Module,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.FloatTensor | None,
    width: int,
) -> torch.FloatTensor:
    """Embeddings `[batch, seq, width]` of tokens `[batch, seq]`, or the given ones.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: unless exactly one is given, of the right shape, and for ids outside of the vocabulary.
    """
    check_one_input(input_ids, inputs_embeds)
    if input_ids is None:
        shape = inputs_embeds.shape
        if len(shape) != 3 or 0 in shape[:2] or shape[2] != width:
            raise ValueError(f"`inputs_embeds` must be [batch >= 1, seq >= 1, {width}], got {list(shape)}.")
        return inputs_embeds
    shape = input_ids.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`input_ids` must be [batch >= 1, seq >= 1], got {list(shape)}.")
    return embed_ids(table, input_ids, "`input_ids`")


def embed_ids(table: nn.Module, ids: torch.LongTensor, what: str) -> torch.FloatTensor:
    """Rows of an embedding. Raises a `ValueError` about `what` for ids outside of it."""
    try:
        return table(ids)
    except IndexError as error:  # on a CPU; elsewhere reading a value would synchronize the device
        size = table.weight.shape[0]  # what an adapter in place of the table has as well
        low, high = (int(x) for x in ids.aminmax())
        raise ValueError(f"{what} must be in [0, {size}), got values from {low} to {high}.") from error


def check_position_ids(position_ids: torch.LongTensor | None, batch: int, seq: int) -> None:
    """Raise a `ValueError` for positions of another shape, a `TypeError` for what are no integers."""
    if position_ids is None:
        return
    check_ids("position_ids", position_ids)
    shape = position_ids.shape  # `in` has no answer for sizes that a compiler leaves open
    if len(shape) != 2 or (shape[0] != 1 and shape[0] != batch) or shape[1] != seq:
        raise ValueError(f"`position_ids` must be [1 or {batch}, {seq}], got {list(shape)}.")


def check_position_range(position_ids: torch.LongTensor, limit: int, remedy: str) -> None:
    """Raise a `ValueError` for positions outside of a learned table of `limit`; `remedy` ends the message."""
    if is_tracing(position_ids):
        return
    low, high = (int(x) for x in position_ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"`position_ids`, given or counted, must be in [0, {limit}), got values from {low} to {high}: there are "
            f"`max_position_embeddings`={limit} learned ones. {remedy}"
        )


def token_mask(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past: int | torch.Tensor
) -> torch.BoolTensor | None:
    """Which tokens are real, `[batch, seq]` or `[batch, past + seq]` as given; `None` where all are.

    Raises:
        TypeError: for a mask that is no tensor.
        ValueError: for a mask of another shape, or of other values than 0 and 1.
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


def mask_of_new_tokens(mask: torch.BoolTensor | None, seq: int) -> torch.BoolTensor | None:
    """The last `seq` columns of what `token_mask` gave; `None` where all of them are real."""
    if mask is None or mask.shape[1] == seq:
        return mask
    mask = mask[:, -seq:]
    return None if not is_tracing(mask) and mask.all() else mask


def apply_mask_to_padding_states(x: torch.Tensor, mask: torch.BoolTensor | None) -> torch.Tensor:
    """`x [..., channels]` with zeros where `mask [...]` is `False`: weights of 0 do not keep a NaN or an infinity out of a sum."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def check_past_mask(attention_mask: torch.Tensor | None, seq: int, lengths: int | list[int] | torch.Tensor) -> None:
    """Raise a `ValueError` where a mask of all tokens so far is not of what a cache holds.

    Args:
        attention_mask (`torch.Tensor` of shape `[batch, seq or past + seq]`, *optional*): 0 at pads.
        seq (`int`): new tokens.
        lengths (`int`, `list[int]`, or `torch.LongTensor` of shape `[]` or `[batch]`): real tokens of each row in the cache.
    """
    if attention_mask is None or attention_mask.shape[1] == seq or is_tracing(attention_mask):
        return
    given = attention_mask[:, :-seq].long().sum(1)
    lengths = torch.as_tensor(lengths, device=given.device)
    if (given != lengths).any():
        held = lengths.expand(len(given)).tolist()
        raise ValueError(
            f"`attention_mask` keeps {given.tolist()} of the tokens before these in each row, but `{CACHE}` was filled "
            f"with {held} real ones: pads are left out when they come, not afterwards."
        )


def count_positions(
    inputs_embeds: torch.Tensor,
    mask: torch.BoolTensor | None,
    segment_ids: torch.LongTensor | None,
    past: int | torch.Tensor,
) -> torch.LongTensor:
    """Positions `[1 or batch, seq]` that count real tokens only and restart with every packed sequence.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`).
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): which of these tokens are real.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed sequence of each token, as runs.
        past (`int`, or `torch.LongTensor` of shape `[]` or `[batch]`): real tokens before these.
    """
    if isinstance(past, torch.Tensor) and past.dim() == 1:
        past = past.unsqueeze(1)
    if mask is None:
        place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    else:
        place = (mask.long().cumsum(1) - 1).clamp_min(0)
    if segment_ids is None:
        return place + past
    # Real tokens before the run that each token belongs to: the highest count at the beginning of a run so far.
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
    "is_torch_func_active",
    "mask_of_new_tokens",
    "token_mask",
]
