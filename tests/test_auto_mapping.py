"""Clients that decide by the name of a class or by tables of names take our models for what they are."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.models.auto import modeling_auto

import modeling_heptapod
from tests.clean_room import run_beside
from tests.test_losses import HEADS, batch_for
from tests.tiny_leap import tiny_leap


CAUSAL = ["leap", "hierarchical", "multigrid"]
# What each of these does with labels is more than a loss of logits.
OF_LABELS = ["hierarchical-losses", "grid", "grid-losses", "multigrid-axes", "multigrid-factored", "multigrid-lstm"]
TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ["LeapForCausalLM", "HierarchicalLMForCausalLM", "MultiGridForCausalLM"],
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ["LeapForMaskedLM", "HeptapodForMaskedLM"],
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ["LeapForSequenceClassification"],
    "MODEL_MAPPING_NAMES": ["LeapModel", "HierarchicalLMModel", "HeptapodModel", "MultiGridModel"],
}


def test_names_are_known_once_the_package_is_imported():
    """Before any class is: `lm_eval` looks before it loads."""
    code = (
        "import sys, json, modeling_heptapod\n"
        "from transformers.models.auto import modeling_auto\n"
        "assert 'modeling_heptapod.leap.modeling_leap' not in sys.modules\n"
        f"tables = {list(TASKS)}\n"
        "types = ('leap', 'hierarchical_lm', 'heptapod', 'multigrid')\n"
        "print(json.dumps({t: {m: n for m, n in getattr(modeling_auto, t).items() if m in types} for t in tables}))\n"
    )
    found = json.loads(run_beside(code).splitlines()[-1])
    for table, names in TASKS.items():
        assert sorted(found[table].values()) == sorted(names)
        for model_type, name in found[table].items():
            assert getattr(modeling_heptapod, name).config_class.model_type == model_type


def test_a_subclass_is_known_beside_its_parent():
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class Mine(modeling_heptapod.LeapForCausalLM):
        pass

    assert names.pop("Mine") == "Mine" and names["leap"] == "LeapForCausalLM"
    # By this `Trainer` knows that the first label of a row counts for nothing.
    assert Mine(tiny_leap(num_hidden_layers=1).config).loss_type == "ForCausalLM"


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_head(head):
    name = type(HEADS[head]()).__name__
    kind = next(kind for kind in ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification") if name.endswith(kind))
    assert HEADS[head]().loss_type == kind


def smoothing_trainer(model, folder, rows=None, **options):
    values = {
        "output_dir": str(folder),
        "label_smoothing_factor": 0.1,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(model, TrainingArguments(**{**values, **options}), train_dataset=rows, eval_dataset=rows)


def smoothed(logits, labels, items=None, factor=0.1):
    """The loss by the book: the mean of `-log p` at the label, and over the vocabulary."""
    surprise = -logits.log_softmax(-1)[labels != -100]
    at_label = surprise.gather(-1, labels[labels != -100].unsqueeze(-1)).squeeze(-1)
    items = len(at_label) if items is None else items
    return ((1 - factor) * at_label + factor * surprise.mean(-1)).sum() / items


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("head", CAUSAL)
def test_smoothed_labels_are_shifted(head, adapted, tmp_path):
    model = HEADS[head]()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    inputs, labels = batch_for(model.base_model.model if adapted else model)
    labels[0, :4] = -100
    trainer = smoothing_trainer(model, tmp_path)
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
        for items in (None, 30):
            loss = trainer.compute_loss(model, {**inputs, "labels": labels}, num_items_in_batch=items)
            torch.testing.assert_close(loss, smoothed(logits, labels[:, 1:], items))


@pytest.mark.parametrize("head", ["leap-masked", "leap-classes"])
def test_smoothed_labels_of_other_heads_stay_in_place(head, tmp_path):
    model = HEADS[head]()
    inputs, labels = batch_for(model)
    with torch.no_grad():
        loss = smoothing_trainer(model, tmp_path).compute_loss(model, {**inputs, "labels": labels})
        torch.testing.assert_close(loss, smoothed(model(**inputs).logits, labels))


@pytest.mark.parametrize("head", OF_LABELS)
def test_labels_that_make_the_loss_cannot_be_smoothed(head, tmp_path):
    """`Trainer` would take them away: the grid would learn to copy, other losses would be forgotten."""
    model = HEADS[head]()
    inputs, labels = batch_for(model, rows=8)
    rows = [{**{name: x[row] for name, x in inputs.items()}, "labels": labels[row]} for row in range(8)]
    trainer = smoothing_trainer(model, tmp_path, rows)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"`labels` must be given .*`label_smoothing_factor`"):
            run()


@pytest.mark.parametrize(
    "head, task", [("leap", "text-generation"), ("grid", "fill-mask"), ("leap-classes", "text-classification")]
)
def test_trainers_card_names_the_task(head, task, tmp_path):
    model = HEADS[head]()
    trainer = smoothing_trainer(model, tmp_path, label_smoothing_factor=0)
    summary = TrainingSummary.from_trainer(trainer, model_name="mine", dataset="some/texts")
    assert summary.tasks == task
