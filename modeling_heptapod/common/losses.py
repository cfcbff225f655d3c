"""Transformers' losses with checked labels; a loss without valid labels is 0 instead of `0 / 0`.

All of them take `num_items_in_batch`, the number of valid labels in all batches of one optimizer step, by which `Trainer`
divides accumulated gradients.
"""

from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss

from .model_inputs import check_ids


IGNORE_INDEX = -100  # label that is ignored


def at_least_one(count: torch.Tensor | int) -> torch.Tensor | int:
    """`count`, and 1 for 0, as a divisor."""
    return count.clamp_min(1) if torch.is_tensor(count) else max(count, 1)


def check_labels(name: str, labels: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """`labels` as int64. Raises a `TypeError` unless they are integers, a `ValueError` unless of `shape`."""
    check_ids(name, labels)
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`{name}` must be {list(shape)}, a label for each logit, got {list(labels.shape)}.")
    return labels.long()


def require_labels(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, why: str) -> None:
    """Raise a `ValueError` if there is a count of labels but no labels.

    `Trainer` removes them for `label_smoothing_factor` and `compute_loss_func`, which compute a loss of the logits alone.
    """
    if labels is None and num_items_in_batch is not None:
        raise ValueError(
            f"`labels` must be given with `num_items_in_batch`, got None: {why}, which a loss of the logits alone leaves out. "
            "Do not use `label_smoothing_factor` and `compute_loss_func`, with which `Trainer` removes the labels; to "
            "change the loss, override `Trainer.compute_loss`."
        )


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of the next tokens, in float32.

    Args:
        logits (`torch.Tensor` of shape `[batch, seq, vocab_size]`).
        labels (`torch.LongTensor` of shape `[batch, seq]`): the tokens themselves; the loss shifts them.
        vocab_size (`int`).
        num_items_in_batch (`int`, *optional*): divisor of the sum; defaults to the number of valid labels.
        ignore_index (`int`): label that is ignored.
        shift_labels (`torch.LongTensor` of shape `[batch, seq]`, *optional*): labels that are already shifted.

    Raises:
        TypeError, ValueError: for labels that are not integers, of another shape, or (on a CPU) outside the vocabulary.
    """
    name = "labels" if shift_labels is None else "shift_labels"
    given = check_labels(name, labels if shift_labels is None else shift_labels, logits.shape[:-1])
    targets = given if shift_labels is not None else given[..., 1:]
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    shift_labels = None if shift_labels is None else given
    divisor: Any = at_least_one(count)  # the annotation of the loss allows no integers
    try:
        return ForCausalLMLoss(logits, given, vocab_size, divisor, ignore_index, shift_labels, **kwargs)
    except IndexError as error:
        raise _out_of_range(name, targets, vocab_size, ignore_index) from error


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of masked tokens, in float32: as `causal_lm_loss`, without a shift of the labels."""
    labels = check_labels("labels", labels, logits.shape[:-1])
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    divisor: Any = at_least_one(count)  # the annotation of the loss allows no integers
    try:
        return ForMaskedLMLoss(logits, labels, vocab_size, divisor, ignore_index, **kwargs)
    except IndexError as error:
        raise _out_of_range("labels", labels, vocab_size, ignore_index) from error


def sequence_classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Transformers' loss of the config's `problem_type`, divided by `num_items_in_batch` if given.

    Args:
        labels (`torch.Tensor` of shape `[batch]` or `[batch, num_labels]`): classes, targets or indicators.
        pooled_logits (`torch.Tensor` of shape `[batch, num_labels]`).
        config (`PreTrainedConfig`): its `problem_type` is inferred from the labels and set if it is `None`.
        num_items_in_batch (`int`, *optional*): number of labels in all batches of one optimizer step.

    Raises:
        TypeError, ValueError: for labels of another shape or dtype, or (on a CPU) classes that do not exist.
    """
    batch, num_labels = pooled_logits.shape
    kind = config.problem_type
    if kind is None:
        of_integers = labels.dtype in (torch.long, torch.int)
        kind = "regression" if num_labels == 1 else f"{'single' if of_integers else 'multi'}_label_classification"
    one_each = num_labels == 1 or kind == "single_label_classification"
    shapes = ([batch], [batch, 1]) if one_each else ([batch, num_labels],)
    if list(labels.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"`labels` must be {expected} for a {kind} of {num_labels} labels, got {list(labels.shape)}.")
    if kind != "single_label_classification":
        labels = labels.to(pooled_logits.dtype).view_as(pooled_logits)
        loss = ForSequenceClassificationLoss(labels, pooled_logits, config)
        return loss if num_items_in_batch is None else loss * labels.numel() / at_least_one(num_items_in_batch)
    check_ids("labels", labels)
    labels = labels.long()
    count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    try:
        return ForSequenceClassificationLoss(labels, pooled_logits, config, num_items_in_batch=at_least_one(count))
    except IndexError as error:
        raise _out_of_range("labels", labels, num_labels, IGNORE_INDEX) from error


def _out_of_range(name, labels, size, ignored):
    """Error for an `IndexError` of `cross_entropy` on a CPU; on other devices reading a value would synchronize."""
    low, high = (int(x) for x in labels[labels != ignored].aminmax())
    return ValueError(f"`{name}` must be in [0, {size}) or {ignored}, got values from {low} to {high}.")


__all__ = [
    "IGNORE_INDEX",
    "at_least_one",
    "causal_lm_loss",
    "check_labels",
    "masked_lm_loss",
    "require_labels",
    "sequence_classification_loss",
]
