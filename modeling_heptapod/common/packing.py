"""Several sequences packed into one row."""

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .model_inputs import check_ids
from .transformers_versions import CACHE


def segment_ids(
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    past: int | list[int] | torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Packed sequence of each token, `[batch, seq]`, numbered from 0; `None` if no row holds several.

    Equal values of `seq_idx` that are not adjacent are different sequences.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`).
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): mask of real tokens.
        position_ids (`torch.LongTensor` of shape `[1 or batch, seq]`, *optional*): a sequence begins where positions of
            real tokens do not increase by 1, or by 1 and the padding between. Ignored with one of the next two.
        seq_idx (`torch.LongTensor` of shape `[batch, seq]`, *optional*): number of the sequence.
        cu_seq_lens_q (`torch.LongTensor` of shape `[sequences + 1]`, *optional*): boundaries in a batch of one row.
        past (`int`, `list[int]`, or `torch.LongTensor` of shape `[]` or `[batch]`, *optional*): number of tokens before
            these in a cache.

    Raises:
        TypeError: for other dtypes than integers.
        ValueError: for wrong shapes, boundaries that do not divide the row, `seq_idx` and `cu_seq_lens_q` that
            disagree, and packed rows in a pass that continues a cache.
    """
    batch, seq, _ = inputs_embeds.shape
    continues = past is not None
    name, runs = None, None
    if cu_seq_lens_q is not None:
        name, runs = "cu_seq_lens_q", _runs_of_boundaries(cu_seq_lens_q, batch, seq, inputs_embeds.device)
    if seq_idx is not None:
        check_ids("seq_idx", seq_idx)
        if list(seq_idx.shape) != [batch, seq]:
            raise ValueError(f"`seq_idx` must be [{batch}, {seq}], got {list(seq_idx.shape)}.")
        by_boundaries, name, runs = runs, "seq_idx", _number(seq_idx[:, 1:] != seq_idx[:, :-1])
        if by_boundaries is not None and not is_tracing(runs) and not torch.equal(runs, by_boundaries):
            raise ValueError(
                "`seq_idx` and `cu_seq_lens_q` must describe the same sequences, got different boundaries."
            )
    if runs is None:
        if position_ids is None or seq == 1 or (continues and is_tracing(position_ids)):
            return None
        name, runs = "position_ids", _runs_of_positions(position_ids, mask, batch)
        if continues:
            _check_start(position_ids, mask, past, batch)
    if is_tracing(runs):
        if continues:
            raise ValueError(f"`{name}` cannot be given in a traced pass that continues `{CACHE}`.")
        return runs
    first, last = (runs[:, :1], runs[:, -1:]) if mask is None else _ends(runs, mask)
    if (first >= last).all():
        return None
    if continues:
        raise ValueError(
            f"`{name}` packs several sequences into a row, but the pass continues `{CACHE}`, whose rows are one "
            "sequence each: pass each new sequence on its own."
        )
    return runs


def next_positions(
    runs: torch.Tensor | None, mask: torch.Tensor | None, seq: int, past: int | torch.Tensor
) -> int | torch.Tensor:
    """Number of real tokens of the last sequence of each row after a pass, `[batch]`, or one number for all rows.

    Args:
        runs (`torch.LongTensor` of shape `[batch, seq]`, *optional*): result of `segment_ids`.
        mask (`torch.BoolTensor` of shape `[batch, seq]`, *optional*): mask of real tokens.
        seq (`int`): number of new tokens.
        past (`int`, or `torch.LongTensor` of shape `[]` or `[batch]`): number of real tokens before them.
    """
    if runs is None:
        return past + (seq if mask is None else mask.sum(1))
    if mask is None:
        return (runs == runs[:, -1:]).sum(1)
    return ((runs == last_run(runs, mask)) & mask).sum(1)


def last_run(runs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Number of the last sequence with real tokens of each row, `[batch, 1]`; -1 for rows of padding."""
    return runs.masked_fill(~mask, -1).amax(1, keepdim=True)


def _ends(runs, mask):
    """First and last sequence number of real tokens, `[batch, 1]` each; the first is higher for rows of padding."""
    first = runs.masked_fill(~mask, runs.shape[1]).amin(1, keepdim=True)
    return first, last_run(runs, mask)


def _number(changes):
    """Sequence numbers `[batch, seq]` from changes `[batch, seq - 1]` between neighbours."""
    return nn.functional.pad(changes, (1, 0)).long().cumsum(1)


def _runs_of_boundaries(boundaries, batch, seq, device):
    check_ids("cu_seq_lens_q", boundaries)
    if batch != 1 or boundaries.dim() != 1:
        raise ValueError(
            "`cu_seq_lens_q` must be one-dimensional and needs a batch of one row, got shape "
            f"{list(boundaries.shape)} for a batch of {batch}."
        )
    if not is_tracing(boundaries):
        ends = boundaries.tolist()
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != seq or sorted(ends) != ends:
            raise ValueError(f"`cu_seq_lens_q` must rise from 0 to {seq}, the length of the row, got {ends}.")
    place = torch.arange(seq, device=device)
    places = torch.bucketize(place, boundaries[1:].to(place), right=True).unsqueeze(0)
    return _number(places[:, 1:] != places[:, :-1])  # boundaries may repeat


def _runs_of_positions(positions, mask, batch):
    steps = positions[:, 1:] - positions[:, :-1]
    if mask is None:
        return _number(steps != 1).expand(batch, -1)
    place = torch.arange(positions.shape[1], device=positions.device)
    last_real = torch.where(mask, place, -1).cummax(1).values[:, :-1]  # before each token
    positions = positions.expand(batch, -1)
    steps = positions[:, 1:] - positions.gather(1, last_real.clamp_min(0))
    goes_on = (steps == 1) | (steps == place[1:] - last_real)  # positions may count the padding between
    return _number(mask[:, 1:] & (last_real >= 0) & ~goes_on)


def _check_start(positions, mask, past, batch):
    """Raise a `ValueError` if a row that continues a cache begins at position 0."""
    positions = positions.expand(batch, -1)
    at = positions[:, :1] if mask is None else positions.gather(1, mask.int().argmax(1, keepdim=True))
    begins = (at.squeeze(1) == 0) & (torch.as_tensor(past, device=at.device) > 0)
    if mask is not None:
        begins = begins & mask.any(1)
    if begins.any():
        raise ValueError(
            f"`position_ids` begin at 0 in a row that continues `{CACHE}`: a cached row is one sequence, whose "
            "positions continue. Pass another sequence on its own."
        )


__all__ = ["last_run", "next_positions", "segment_ids"]
