"""The training objective of the grid, masked diffusion (MDLM, arXiv 2406.07524), and the bound that it estimates.

In this order: labels, masks, losses, the bound of a page.
"""

import zlib
from collections.abc import Callable, Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..common.losses import IGNORE_INDEX, at_least_one
from ..common.model_inputs import check_ids
from .page_inputs import check_shape, check_vocabulary, values_are_readable


logger = logging.get_logger(__name__)

DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # of the neighbour loss: above, below, left, right


def prepare_labels(
    labels: torch.Tensor, shape: tuple[int, ...], attention_mask: torch.Tensor | None, config
) -> torch.Tensor:
    """Labels of a page of `shape` with `-100` at padding.

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for another shape, ids outside of the vocabulary, or a config without a mask token.
    """
    if config.mask_token_id is None:
        raise ValueError("`labels` need a `config.mask_token_id` to mask cells with, got None.")
    check_ids("labels", labels)
    check_shape("labels", labels, shape)
    check_shape("attention_mask", attention_mask, shape)
    labels = labels.long()
    if config.pad_token_id is not None:
        labels = labels.masked_fill(labels == config.pad_token_id, IGNORE_INDEX)
    if attention_mask is not None:
        labels = labels.masked_fill(~attention_mask.bool(), IGNORE_INDEX)
    check_vocabulary("labels", labels.masked_fill(labels == IGNORE_INDEX, 0), config.vocab_size)
    return labels


def check_clean(input_ids: torch.Tensor | None, labels: torch.Tensor, mask_token_id: int) -> None:
    """Raises a `ValueError` for pages that are masked already, and for labels that differ from the page."""
    counts = labels != IGNORE_INDEX
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if ids is not None and ((ids == mask_token_id) & counts).any():
            raise ValueError(
                f"`{name}` hold the mask token ({mask_token_id}) where `labels` are not {IGNORE_INDEX}: pass the clean page, "
                "the model masks it itself. `DataCollatorForLanguageModeling` needs `mlm=False`."
            )
    if input_ids is not None and ((input_ids != labels) & counts).any():
        number = int(((input_ids != labels) & counts).sum())
        raise ValueError(
            f"`labels` must be `input_ids` where they are not {IGNORE_INDEX}, but {number} of {int(counts.sum())} differ: pass "
            "the clean page, the model masks it itself."
        )


def warn_if_padding_was_counted(given: torch.Tensor, labels: torch.Tensor) -> None:
    """`Trainer` passes the number of labels of a step that are not `-100`, some of them of other batches."""
    if values_are_readable(given) and (given != labels).any():
        logger.warning_once(
            "`labels` include padding, which is left out of the loss but was counted in `num_items_in_batch`: the loss is "
            f"too small. Set it to {IGNORE_INDEX}, as `HeptapodProcessor(..., return_labels=True)` does."
        )


def sample_mask(
    labels: torch.Tensor, generator: torch.Generator | None = None, rank: int = 0, num_ranks: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples the cells to mask and the probability of each page.

    The ratios of a batch are evenly spaced, from a common random start: each is uniform, together they cover (0, 1].
    Processes that draw equal random numbers, as those that `Trainer` starts do, get ratios between each other's, and
    other cells: each process shifts its draws by a part of the unit interval, modulo 1, so that they stay uniform.

    Args:
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that are never masked.
        generator (`torch.Generator`, *optional*): the global one when not given.
        rank, num_ranks (`int`): index of this process, and number of processes.

    Returns:
        `torch.BoolTensor` of the shape of `labels`, and the ratios, float32 `[batch]`, in (0, 1].
    """
    batch, device = labels.shape[0], labels.device
    start = torch.rand((), generator=generator, device=device)
    rows = rank + num_ranks * torch.arange(batch, device=device)
    mask_ratio = 1 - (start + rows / (num_ranks * batch)) % 1
    chance = torch.empty(labels.shape, device=device).uniform_(generator=generator)  # `rand` takes no symbolic sizes
    chance = (chance + rank / num_ranks) % 1 if rank else chance
    return (labels != IGNORE_INDEX) & (chance < mask_ratio.view(-1, *[1] * (labels.dim() - 1))), mask_ratio


def rank_and_num_ranks() -> tuple[int, int]:
    """Rank of this process and number of processes of a distributed run, otherwise 0 and 1."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sample_eval_masks(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample_mask`, but each page's ratio and cells are drawn from its own labels, in reading order.

    A page is always masked in the same way, whatever the model, the device, the batch and the padding. So a loss over
    many pages does not depend on how they are batched.

    Args:
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that are never masked.

    Returns:
        `torch.BoolTensor` of the shape of `labels`, and the ratios, float32 `[batch]`, in (0, 1].
    """
    pages = labels.detach().cpu().long()
    masked, mask_ratio = torch.zeros_like(pages, dtype=torch.bool), torch.empty(len(pages))
    for row, page in enumerate(pages):
        counts = page != IGNORE_INDEX
        cells = page[counts]
        generator = torch.Generator().manual_seed(zlib.crc32(cells.numpy().tobytes()))
        mask_ratio[row] = 1 - torch.rand((), generator=generator)
        masked[row, counts] = torch.rand(len(cells), generator=generator) < mask_ratio[row]
    return masked.to(labels.device), mask_ratio.to(labels.device)


def choose_cells(candidates: torch.Tensor, number: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Chooses `number [batch]` of each page's candidates `[batch, ...]`, all sets equally likely."""
    order = torch.rand(candidates.flatten(1).shape, generator=generator, device=candidates.device)
    order = order.masked_fill(~candidates.flatten(1), 2.0)  # after all candidates
    chosen = order.argsort(1).argsort(1) < number[:, None]
    return chosen.view(candidates.shape) & candidates


def token_nll(logits: torch.Tensor, labels: torch.Tensor, excluded: list[int]) -> torch.Tensor:
    """Negative log-likelihood of each cell's label, in float32 at least.

    Args:
        logits (`torch.Tensor` of shape `[..., vocab]`).
        labels (`torch.LongTensor` of shape `[...]`): the result is 0 where they are `-100`; on any device.
        excluded (`list[int]`): tokens that are never generated and get no probability.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if excluded:
        columns = torch.tensor(excluded, device=logits.device)
        logits = logits.index_fill(-1, columns, torch.finfo(logits.dtype).min)
    nats = nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return nats.view(labels.shape)


def masked_diffusion_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    mask_ratio: torch.Tensor,
    excluded: list[int],
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of the masked cells, divided by the mask ratio of their page and by the number of labels.

    With the ratio drawn uniformly from (0, 1] this is an unbiased estimate of the negative ELBO in nats a cell (MDLM,
    arXiv 2406.07524).

    Args:
        logits (`torch.Tensor` of shape `[batch, ..., vocab]`).
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that the loss leaves out.
        masked (`torch.BoolTensor` of the shape of `labels`): the masked cells.
        mask_ratio (`torch.Tensor` of shape `[batch]`): the probability with which they were masked.
        excluded (`list[int]`): tokens that are never generated and get no probability.
        num_items_in_batch (`int`, *optional*): number of labels in all batches of one optimizer step.
    """
    nats = token_nll(logits, labels.masked_fill(~masked, IGNORE_INDEX), excluded).flatten(1).sum(1)
    return (nats / mask_ratio.to(nats)).sum() / _count(labels, num_items_in_batch, nats.device)


def neighbor_loss(
    hidden_states: torch.Tensor,
    projections: Iterable[nn.Module],
    lm_head: nn.Module,
    grid_size: tuple[int, int],
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    masked: torch.Tensor,
    mask_ratio: torch.Tensor,
    excluded: list[int],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`masked_diffusion_loss` of predictions from the four neighbours of each masked cell, the mean over directions.

    `projections`, one for each of `DIRECTIONS`, map a cell's hidden state to that of its neighbour. Padding predicts
    nothing. The other arguments are those of `masked_diffusion_loss`.
    """
    grid = labels.shape[0], *grid_size
    states, real = hidden_states.view(*grid, -1), attention_mask
    labels, masked = (x.view(grid).to(states.device) for x in (labels, masked))
    real = None if real is None else real.bool().view(grid).to(states.device)
    losses = []
    for (down, across), projection in zip(DIRECTIONS, projections):
        here, there = _overlap(down, across, *grid_size)
        wanted = masked[there] if real is None else masked[there] & real[here]
        predicted = lm_head(projection(states[here][wanted]))
        nats = token_nll(predicted, labels[there][wanted], excluded)
        ratio = mask_ratio.to(nats).view(-1, 1, 1).expand_as(wanted)[wanted]
        losses.append((nats / ratio).sum())
    total = reduce(torch.add, losses)
    return total / (len(DIRECTIONS) * _count(labels, num_items_in_batch, total.device))


def _overlap(down, across, height, width):
    """Indices of all cells that have a neighbour in this direction, and of these neighbours."""
    here = slice(max(0, -down), height - max(0, down)), slice(max(0, -across), width - max(0, across))
    there = slice(max(0, down), height - max(0, -down)), slice(max(0, across), width - max(0, -across))
    return (slice(None), *here), (slice(None), *there)


def span_loss(
    spans: Iterable[torch.Tensor],
    radii: Iterable[int],
    grid_size: tuple[int, int],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean span of the cells with labels, as a share of the radius of each layer.

    Args:
        spans (`Iterable[torch.Tensor]`): of each layer, `[batch, heads, height, width]`.
        radii (`Iterable[int]`): of these layers.
        grid_size (`tuple[int, int]`): height and width.
        labels (`torch.LongTensor` of shape `[batch, ...]`): `-100` at cells that the loss leaves out.
        num_items_in_batch (`int`, *optional*): number of labels in all batches of one optimizer step.
    """
    counted = (labels != IGNORE_INDEX).view(-1, *grid_size)
    shares = [
        (span.mean(1) / max(radius, 1)).masked_fill(~counted.to(span.device), 0).sum()
        for span, radius in zip(spans, radii)
    ]
    total = reduce(torch.add, shares) / len(shares)
    return total / _count(labels, num_items_in_batch, total.device)


def _count(labels, num_items_in_batch, device):
    count = at_least_one((labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
    return count.to(device) if torch.is_tensor(count) else count


class ElboEstimate(NamedTuple):
    """Estimates of an upper bound of `-log p(page)`, see `HeptapodForMaskedLM.elbo`.

    Attributes:
        nats (`torch.Tensor` of shape `[batch]`): of whole pages, not a cell.
        standard_error (`torch.Tensor` of shape `[batch]`): of these estimates.
    """

    nats: torch.Tensor
    standard_error: torch.Tensor


def estimate_elbo(
    predict: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    num_samples: int,
    excluded: list[int],
    generator: torch.Generator | None = None,
) -> ElboEstimate:
    """The estimate of `HeptapodForMaskedLM.elbo`, stratified by the number of masked cells, two samples of each stratum.

    `predict` gives logits `[batch, ..., vocab]` for masked cells, a `torch.BoolTensor` of the shape of `labels`.
    """
    count = (labels != IGNORE_INDEX).flatten(1).sum(1)
    strata = num_samples // 2
    samples = []
    for sample in range(num_samples):
        place = torch.rand(len(count), generator=generator, device=count.device)
        number = ((sample // 2 + place) / strata * count).long().clamp_max(count - 1) + 1
        masked = choose_cells(labels != IGNORE_INDEX, number, generator)
        nats = token_nll(predict(masked), labels.masked_fill(~masked, IGNORE_INDEX), excluded)
        samples.append(nats.flatten(1).sum(1) * count / number.clamp_min(1))
    pairs = torch.stack(samples).unflatten(0, (strata, 2))  # [strata, 2, batch]
    error = (pairs[:, 0] - pairs[:, 1]).square().sum(0).sqrt() / (2 * strata)
    return ElboEstimate(pairs.mean((0, 1)), error)
