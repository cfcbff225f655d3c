"""Several sequences packed into one row: which of them each token belongs to."""

import torch
from transformers.masking_utils import find_packed_sequence_indices


def segment_ids(
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
) -> torch.Tensor | None:
    """Which packed sequence each token belongs to, `[batch, seq]`, or `None` where nothing is packed.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[batch, seq, width]`).
        mask (`torch.Tensor` of shape `[batch, seq]`, *optional*): with one, restarting `position_ids` mean nothing.
        position_ids (`torch.LongTensor` of shape `[1 or batch, seq]`, *optional*): may restart.
        seq_idx (`torch.LongTensor` of shape `[batch, seq]`, *optional*): the answer itself.
        cu_seq_lens_q (`torch.LongTensor` of shape `[sequences + 1]`, *optional*): boundaries in the one row.

    Raises:
        ValueError: for shapes that do not fit.
    """
    batch, seq, _ = inputs_embeds.shape
    if seq_idx is not None:
        if list(seq_idx.shape) != [batch, seq]:
            raise ValueError(f"`seq_idx` must be [{batch}, {seq}], got {list(seq_idx.shape)}.")
        return seq_idx
    if cu_seq_lens_q is not None:
        if batch != 1 or cu_seq_lens_q.dim() != 1:
            raise ValueError(
                "`cu_seq_lens_q` must be one-dimensional and needs one packed row, got shape "
                f"{list(cu_seq_lens_q.shape)} for a batch of {batch}."
            )
        place = torch.arange(seq, device=inputs_embeds.device)
        return torch.bucketize(place, cu_seq_lens_q[1:].to(place), right=True).unsqueeze(0)
    if position_ids is None or mask is not None or seq == 1:
        return None
    segments = find_packed_sequence_indices(position_ids)
    return None if segments is None else segments.expand(batch, seq)


__all__ = ["segment_ids"]
