"""Supervised fine-tuning by trl on the causal families: documents packed in a row are as if each were alone."""

from itertools import pairwise

import pytest
import torch
from corpora import build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from modeling_heptapod.hierarchical_lm import modeling_hierarchical_lm
from tests.tiny import mostly_slow
from tests.tiny_hierarchical_lm import VARIANTS as HIERARCHICAL
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


TOKENIZER = build_tokenizer("byte", [])
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "x = 1\n",
    "class A:\n    pass\n",
    "import os, sys\n",
    "for i in x: print(i)",
]
SHORT = {"num_hidden_layers": 2, "window_sizes": [None, 3]}
MODELS = {
    "leap": lambda **options: tiny_leap(**SHORT, **options),
    "leap-additive": lambda **options: tiny_leap(
        mixer="additive", position_embedding_type="alibi", **SHORT, **options
    ),
    "hierarchical-stride": lambda **options: tiny_hierarchical_lm(**HIERARCHICAL["stride"], **options),
    "hierarchical-blocks": lambda **options: tiny_hierarchical_lm(**HIERARCHICAL["blocks"], **options),
    "multigrid-transformer": tiny_multigrid,
    "multigrid-leap": lambda **options: tiny_multigrid(core="leap", **options),
    "multigrid-lstm": lambda **options: tiny_multigrid(core="lstm", **options),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def trainer(model, folder, texts=TEXTS, **options):
    """Plain gradient descent, one step of all texts unless `options` say otherwise; trl checkpoints gradients."""
    values = {
        "output_dir": str(folder),
        "max_length": 96,
        "per_device_train_batch_size": len(texts),
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,  # which is trl's default
    }
    more = {name: options.pop(name) for name in ("peft_config",) if name in options}
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(
        model, SFTConfig(**{**values, **options}), train_dataset=data, processing_class=TOKENIZER, **more
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@every_model
def test_packed_documents_are_as_if_alone(make, tmp_path):
    """Of what trl gives the model on a CPU, one row of all documents: each one's scores are those of the document alone."""
    model = make(vocab_size=len(TOKENIZER))
    packed = trainer(model, tmp_path, packing=True)
    batch = next(iter(packed.get_train_dataloader()))
    ids, labels = batch["input_ids"], batch.pop("labels")
    assert len(ids) == 1 and "attention_mask" not in batch
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) == len(TEXTS) + 1
    with torch.no_grad():
        logits = model.eval()(**batch, use_cache=False).logits
        for start, end in pairwise(bounds):
            alone = model(ids[:, start:end], use_cache=False).logits
            torch.testing.assert_close(logits[:, start:end], alone, rtol=1e-4, atol=1e-4)
            assert labels[0, start] == -100  # nothing tells the first token of a document
    texts = [TOKENIZER.decode(ids[0, start : end - 1]) for start, end in pairwise(bounds)]
    assert sorted(texts) == sorted(TEXTS)


@every_model
@pytest.mark.parametrize("hint", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_each_of_the_three_hints_is_enough(make, hint, tmp_path):
    model = make(vocab_size=len(TOKENIZER))
    batch = next(iter(trainer(model, tmp_path, packing=True).get_train_dataloader()))
    with torch.no_grad():
        ids, model = batch["input_ids"], model.eval()
        whole = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        assert torch.equal(model(ids, **{hint: batch[hint]}).logits, whole)
        assert not torch.allclose(model(ids).logits, whole, atol=1e-2)


@every_model
def test_a_step_on_packed_documents_is_the_step_on_separate_ones(make, tmp_path):
    steps = []
    for packing in (False, True):
        run = trainer(make(vocab_size=len(TOKENIZER)), tmp_path, packing=packing)
        run.train()
        steps.append((losses(run), [p.detach() for p in run.model.parameters()]))
    (separate, weights), (packed, packed_weights) = steps
    assert packed == pytest.approx(separate, abs=1e-5)
    torch.testing.assert_close(packed_weights, weights, rtol=1e-5, atol=1e-6)
    untrained = list(make(vocab_size=len(TOKENIZER)).parameters())
    assert max((a - b).abs().max() for a, b in zip(weights, untrained)) > 1e-3


@pytest.mark.parametrize("packing", mostly_slow([False, True], (True,)))
@pytest.mark.parametrize("name", ["leap", "hierarchical-stride", "multigrid-leap"])
def test_adapters_learn_by_sft(name, packing, tmp_path):
    lora = LoraConfig(target_modules="all-linear", r=4)
    options = {"max_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-2}
    run = trainer(MODELS[name](vocab_size=len(TOKENIZER)), tmp_path, packing=packing, peft_config=lora, **options)
    kept = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    assert kept and not any("lora_" in name for name in kept)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1
    assert all(torch.equal(p, kept[name]) for name, p in run.model.named_parameters() if name in kept)


def test_only_completions_count_where_prompts_are_given(tmp_path):
    run = trainer(tiny_leap(vocab_size=len(TOKENIZER), **SHORT), tmp_path, packing=True)
    data = Dataset.from_dict({"prompt": ["2 + 2 =", "3 + 4 ="], "completion": [" 4", " 7"]})
    run = SFTTrainer(run.model, run.args, train_dataset=data, processing_class=TOKENIZER)
    batch = next(iter(run.get_train_dataloader()))
    counted = batch["labels"][batch["labels"] != -100]
    assert TOKENIZER.decode(counted) == " 4<|endoftext|> 7<|endoftext|>"


def test_what_sft_does_not_train(tmp_path):
    """trl multiplies hidden states with the head itself, so losses that a model adds to the next token's are left out."""
    options = {**HIERARCHICAL["stride"], "prophet_loss_weight": 1.0, "vocab_size": len(TOKENIZER)}
    run = trainer(tiny_hierarchical_lm(**options), tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        outputs = tiny_hierarchical_lm(**options)(**batch)
    assert outputs.loss > outputs.ce_loss + 1
    heads = [p.clone() for p in run.model.auxiliary_losses.parameters()]
    run.train()
    assert losses(run)[0] == pytest.approx(outputs.ce_loss.item(), abs=1e-4)
    assert all(torch.equal(*pair) for pair in zip(run.model.auxiliary_losses.parameters(), heads))

    axes = {"axis_names": ["bracket"], "axis_vocab_sizes": [9]}
    run = trainer(tiny_multigrid(vocab_size=len(TOKENIZER), **axes), tmp_path)
    with pytest.raises(ValueError, match="`axis_ids` must be given"):
        run.train()


@pytest.mark.parametrize("weights", [{}, {"next_latent_loss_weight": 0.1}], ids=["none", "some"])
def test_losses_that_trl_passes_by_are_named(weights, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_hierarchical_lm.logger, "warning_once", said.append)
    trainer(tiny_hierarchical_lm(vocab_size=len(TOKENIZER), **weights), tmp_path, TEXTS[:2]).train()
    assert bool(said) == bool(weights)
    assert all("`*_loss_weight`" in text for text in said)
