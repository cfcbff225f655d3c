"""Losses of every head: what labels are refused, and what a batch costs in which none counts."""

from functools import partial

import pytest
import torch

from modeling_heptapod.common.losses import causal_lm_loss, masked_lm_loss, sequence_classification_loss
from tests.tiny_heptapod import random_page, tiny_heptapod
from tests.tiny_hierarchical_lm import VARIANTS as HIERARCHICAL
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import random_ids, tiny_leap
from tests.tiny_multigrid import TWO_AXES, random_grid, tiny_multigrid


EXTRA = {
    "reconstruction_loss_weight": 0.1,
    "prophet_loss_weight": 0.1,
    "quantized_prophet_loss_weight": 0.1,
    "next_latent_loss_weight": 0.1,
}
SHORT = {"num_hidden_layers": 2, "window_sizes": [None, 3]}
HEADS = {
    "leap": partial(tiny_leap, **SHORT),
    "leap-masked": partial(tiny_leap, "LeapForMaskedLM", **SHORT),
    "leap-classes": partial(tiny_leap, "LeapForSequenceClassification", num_labels=3, **SHORT),
    "hierarchical": tiny_hierarchical_lm,
    "hierarchical-losses": partial(tiny_hierarchical_lm, **HIERARCHICAL["stride"], **EXTRA),
    "grid": tiny_heptapod,
    "grid-losses": partial(tiny_heptapod, neighbor_loss_weight=0.5, self_conditioning=True),
    "multigrid": tiny_multigrid,
    "multigrid-axes": partial(tiny_multigrid, **TWO_AXES),
    "multigrid-factored": partial(tiny_multigrid, **TWO_AXES, axis_order="factored"),
    "multigrid-leap": partial(tiny_multigrid, **TWO_AXES, core="leap"),
    "multigrid-lstm": partial(tiny_multigrid, **TWO_AXES, core="lstm"),
}
every_head = pytest.mark.parametrize("head", HEADS)


def batch_for(model, rows=2):
    """Inputs and labels that all count."""
    if model.config.model_type == "heptapod":
        page = random_page(rows, 4, 5)
        return {"input_ids": page}, page.clone()
    inputs = (
        random_grid(model, rows, 12) if model.config.model_type == "multigrid" else {"input_ids": random_ids(rows, 12)}
    )
    if hasattr(model, "score"):
        return {**inputs, "attention_mask": torch.ones(rows, 12)}, torch.arange(rows) % 3
    return inputs, inputs["input_ids"].clone()


@every_head
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("training", [False, True])
def test_no_label_costs_nothing(head, items, training):
    """0, not NaN, and so are the gradients."""
    model = HEADS[head]().train(training)
    inputs, labels = batch_for(model)
    counted = {} if items is None else {"num_items_in_batch": items}
    loss = model(**inputs, labels=torch.full_like(labels, -100), **counted).loss
    loss.backward()
    assert loss == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)  # NaN would be something


@every_head
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_labels_out_of_range_are_named(head, wrong):
    model = HEADS[head]()
    inputs, labels = batch_for(model)
    labels.view(-1)[-1] = wrong
    with pytest.raises(ValueError, match=rf"`labels` must be in \[0, \d+\).*, got values from .*{wrong}"):
        model(**inputs, labels=labels)


@every_head
def test_labels_of_another_shape_or_kind_are_named(head):
    """Labels of as many numbers in another shape would be taken for others."""
    model = HEADS[head]()
    inputs, labels = batch_for(model)
    with pytest.raises(ValueError, match="`labels` must be"):
        model(**inputs, labels=labels.unsqueeze(0) if labels.dim() == 1 else labels.transpose(0, 1))
    if not hasattr(model, "score"):
        with pytest.raises(TypeError, match="`labels` must be torch.long or torch.int, got torch.float32"):
            model(**inputs, labels=labels.float())


@every_head
def test_labels_of_32_bits_are_labels(head):
    model = HEADS[head]()
    inputs, labels = batch_for(model)
    assert torch.equal(model(**inputs, labels=labels.int()).loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("axis_order", ["parallel", "factored"])
def test_meta_targets_out_of_range_are_named(axis_order):
    model = tiny_multigrid(**TWO_AXES, axis_order=axis_order)
    inputs, labels = batch_for(model)
    for wrong in (5, -1):
        targets = inputs["axis_ids"].clone()
        targets[1, 1, 3] = wrong  # the first axis has 7 tokens, this one 5
        with pytest.raises(
            ValueError, match=rf"`axis_targets` of axis 'bracket' must be in \[0, 5\) or -100, got {wrong}"
        ):
            model(**inputs, labels=labels, axis_targets=targets)
    with pytest.raises(TypeError, match="`axis_targets` must be"):
        model(**inputs, labels=labels, axis_targets=targets.float())


def test_a_batch_that_counts_costs_what_transformers_says():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, :3] = -100
    kept = labels[:, 1:] != -100
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum")
    torch.testing.assert_close(causal_lm_loss(logits, labels, 7), wanted / kept.sum())
    torch.testing.assert_close(causal_lm_loss(logits, labels, 7, num_items_in_batch=20), wanted / 20)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(causal_lm_loss(logits, None, 7, shift_labels=shifted), wanted / kept.sum())
    kept = labels != -100
    wanted = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
    torch.testing.assert_close(masked_lm_loss(logits, labels, 7), wanted / 7)
    torch.testing.assert_close(masked_lm_loss(logits, labels, 7, num_items_in_batch=20), wanted / 20)


@pytest.mark.parametrize(
    "kind, num_labels, labels",
    [
        ("single_label_classification", 3, torch.tensor([0, 2, 1, -100])),
        ("multi_label_classification", 3, torch.randint(2, (4, 3))),
        ("regression", 1, torch.randn(4)),
        ("regression", 3, torch.randn(4, 3)),
    ],
)
def test_accumulated_classification_is_that_of_the_whole_batch(kind, num_labels, labels):
    """`Trainer` leaves the division to the model and counts labels as here."""
    model = tiny_leap("LeapForSequenceClassification", num_labels=num_labels, problem_type=kind, **SHORT)
    inputs = {"input_ids": random_ids(4, 9), "attention_mask": torch.ones(4, 9)}
    whole = model(**inputs, labels=labels).loss
    items = labels.ne(-100).sum()
    rows = [
        model(
            **{name: x[row : row + 1] for name, x in inputs.items()},
            labels=labels[row : row + 1],
            num_items_in_batch=items,
        )
        for row in range(4)
    ]
    torch.testing.assert_close(sum(row.loss for row in rows), whole)


def test_classes_of_a_wrong_shape_are_named():
    model = tiny_leap("LeapForSequenceClassification", num_labels=3, problem_type="regression", **SHORT)
    with pytest.raises(ValueError, match=r"`labels` must be \[2, 3\] for a regression of 3 labels, got \[2\]"):
        model(random_ids(2, 5), attention_mask=torch.ones(2, 5), labels=torch.zeros(2))
    model.config.problem_type = None
    with pytest.raises(ValueError, match=r"for a single_label_classification of 3 labels, got \[2, 3\]"):
        sequence_classification_loss(torch.zeros(2, 3).long(), torch.zeros(2, 3), model.config)
