"""Losses by name in the trainer's logs, and a hierarchical LM through train.py."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import train
from corpora import DataArguments, Texts
from named_losses import NamedLossTrainer
from objectives import NextTokens
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments


SCRIPTS = Path(train.__file__).parent
OTHERS = {"reconstruction_loss": 0.5, "prophet_loss": 0.25, "quantized_prophet_loss": 0.125}
NAMES = ["ce_loss", *OTHERS, "next_latent_loss"]
CONFIG = {
    "model_type": "hierarchical_lm",
    "vocab_size": 258,
    "compression_factors": [1, 4],
    "strides": [1, 2],
    "hidden_sizes": [16, 24],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "window_sizes": [8, None],
    "prophet_codebook_size": 16,
    "prophet_codebook_dim": 8,
    "prophet_num_codebooks": 2,
    "next_latent_loss_weight": 0.3,
    **{f"{name}_weight": weight for name, weight in OTHERS.items()},
}


def hierarchical_lm(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**CONFIG, **changes}))


def rows(number, seq=24):
    """Rows of random bytes with labels for ever fewer of them."""
    ids = torch.randint(256, (number, seq), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(number):
        labels[row, seq - 4 * row :] = -100
    return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels)]


def trainer(folder, model, data, **options):
    options = {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 1, **options}
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_nan_inf_filter=False,
        **options,
    )
    return NamedLossTrainer(model, args, train_dataset=data, eval_dataset=data)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def expected_losses(model, batches):
    """Means over the labels of all batches: each has a share of the mean that is its share of the labels."""
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    outputs = [model(**batch) for batch in batches]
    return {
        name: sum(share * output[name].item() for share, output in zip(items, outputs)) / sum(items)
        for name in ("loss", *NAMES)
    }


def stacked(data, size):
    return [
        {name: torch.stack([row[name] for row in data[start : start + size]]) for name in data[0]}
        for start in range(0, len(data), size)
    ]


def test_accumulated_gradients_log_the_losses_of_the_whole_step(tmp_path):
    model, data = hierarchical_lm(), rows(4)
    found = trainer(tmp_path, model, data, gradient_accumulation_steps=4, learning_rate=0.0, max_steps=1)
    found.train()
    expected = expected_losses(model.train(), stacked(data, 1))
    (entry,) = logged(found)
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    total = entry["ce_loss"] + entry["next_latent_loss"] + sum(OTHERS[name] * entry[name] for name in OTHERS)
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert min(entry[name] for name in NAMES) > 0.1


def test_logs_are_means_since_the_last_one(tmp_path):
    every, every_other = [], []
    for steps, entries in ((1, every), (2, every_other)):
        run = trainer(tmp_path, hierarchical_lm(), rows(4), logging_steps=steps, gradient_accumulation_steps=2)
        run.train()
        entries += logged(run)
    assert len(every) == 4 and len(every_other) == 2
    for name in ("loss", *NAMES):
        values = [entry[name] for entry in every]
        assert len(set(values)) == 4
        means = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2]
        assert [entry[name] for entry in every_other] == pytest.approx(means, rel=1e-5)


def test_a_mean_over_batches_where_a_model_takes_no_number_of_items(tmp_path):
    model, data = hierarchical_lm(), rows(2)
    found = trainer(tmp_path, model, data, gradient_accumulation_steps=2, learning_rate=0.0, max_steps=1)
    found.model_accepts_loss_kwargs = False
    found.train()
    outputs = [model.train()(**batch) for batch in stacked(data, 1)]
    for name in ("loss", *NAMES):
        assert logged(found)[0][name] == pytest.approx(sum(x[name].item() for x in outputs) / 2, rel=1e-5)


def test_one_loss_alone_is_the_loss(tmp_path):
    """Where nothing is added to it, cross-entropy and the total are one tensor."""
    off = dict.fromkeys((f"{name}_weight" for name in (*OTHERS, "next_latent_loss")), 0.0)
    for takes_items in (True, False):
        model, data = hierarchical_lm(**off), rows(2)
        found = trainer(tmp_path, model, data, gradient_accumulation_steps=2, learning_rate=0.0, max_steps=1)
        found.model_accepts_loss_kwargs = takes_items
        found.train()
        assert logged(found)[0]["ce_loss"] == pytest.approx(logged(found)[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("alone", [True, False])
def test_losses_of_several_devices_are_scaled_as_their_total(alone, tmp_path, monkeypatch):
    """`Trainer` multiplies the total by the number of devices, which then average their gradients."""
    off = dict.fromkeys((f"{name}_weight" for name in (*OTHERS, "next_latent_loss")), 0.0)
    found = trainer(tmp_path, hierarchical_lm(**off if alone else {}), rows(2), max_steps=1)
    (batch,) = stacked(rows(2), 2)
    found.current_gradient_accumulation_steps = 1
    one = found.compute_loss(found.model.train(), dict(batch), num_items_in_batch=torch.tensor(30)).item()
    shares = {name: value.item() for name, value in found._batch_losses.items()}
    monkeypatch.setattr(type(found.accelerator), "num_processes", property(lambda self: 2))
    assert found.compute_loss(found.model, dict(batch), num_items_in_batch=torch.tensor(30)).item() == pytest.approx(
        2 * one
    )
    assert {name: value.item() for name, value in found._batch_losses.items()} == pytest.approx(
        {name: 2 * share for name, share in shares.items()}
    )


def test_rows_without_labels_are_predicted_after_training(tmp_path):
    found = trainer(tmp_path, hierarchical_lm(), rows(2), max_steps=1)
    found.train()
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(3)]
    output = found.predict(unlabelled)
    assert output.predictions.shape[0] == 3 and not any(name.endswith("ce_loss") for name in output.metrics)


def test_evaluation_gives_means_over_examples_and_leaves_training_alone(tmp_path):
    model, data = hierarchical_lm(), rows(5)
    found = trainer(tmp_path, model, data, per_device_eval_batch_size=2, learning_rate=0.0, max_steps=1)
    metrics = found.evaluate(metric_key_prefix="held_out")
    with torch.no_grad():
        outputs = [model.eval()(**batch) for batch in stacked(data, 2)]
    for name in ("loss", *NAMES):
        mean = sum(size * output[name].item() for size, output in zip((2, 2, 1), outputs)) / 5
        assert metrics[f"held_out_{name}"] == pytest.approx(mean, rel=1e-5)
    assert found.evaluate(data[:2])["eval_ce_loss"] == pytest.approx(outputs[0]["ce_loss"].item(), rel=1e-5)
    found.train()
    (entry,) = logged(found)
    assert entry["loss"] == pytest.approx(
        entry["ce_loss"] + entry["next_latent_loss"] + sum(OTHERS[name] * entry[name] for name in OTHERS), rel=1e-5
    )


def test_losses_that_are_off_are_not_logged(tmp_path):
    off = dict.fromkeys((f"{name}_weight" for name in (*OTHERS, "next_latent_loss")), 0.0)
    found = trainer(tmp_path, hierarchical_lm(**off), rows(4), max_steps=2)
    found.train()
    for entry in logged(found):
        assert [name for name in entry if name.endswith("_loss")] == ["ce_loss"]
        assert entry["ce_loss"] == pytest.approx(entry["loss"])
    assert {name for name in found.evaluate() if name.endswith("_loss")} == {"eval_loss", "eval_ce_loss"}
    leap = {"model_type": "leap", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = trainer(tmp_path, AutoModelForCausalLM.from_config(AutoConfig.for_model(**leap, vocab_size=258)), rows(4))
    found.train()
    assert not any(name.endswith("_loss") for entry in logged(found) for name in entry)


def test_bits_per_byte_are_those_of_cross_entropy_alone(tmp_path):
    texts = Texts(["import os\n" * 20], ["def parse(text):\n    return text\n"])
    model = hierarchical_lm()
    objective = NextTokens(texts, DataArguments(block_size=16), model.config)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    found = NamedLossTrainer(
        model, args, eval_dataset=objective.eval_dataset, **objective.trainer_options()
    ).evaluate()
    nats = 0.0
    with torch.no_grad():
        for block in objective.eval_dataset:
            logits = model.eval()(block["input_ids"][None]).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, block["labels"][1:], reduction="sum").item()
    assert found["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(texts.validation[0]), rel=1e-5)
    assert found["eval_loss"] > 1.5 * found["eval_ce_loss"]


def test_the_curve_shows_cross_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    history = [
        {"step": 1, "loss": 9.0, "ce_loss": 2.0},
        {"step": 2, "loss": 8.0, "ce_loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]
    train.plot_curve(history, {"bits_per_byte_bz2": 2.0}, 10.0, tmp_path / "curve.png", ["ce_loss"])
    assert list(plt.gca().lines[0].get_ydata()) == [20.0, 10.0, 5.0]


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_a_hierarchical_lm_through_train_and_sample(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 99}))
    (tmp_path / "config" / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    command = [
        *(SCRIPTS / "train.py", "--config_name", "config", "--output_dir", "out", "--dataset_name", argparse.__file__),
        *("--block_size", "32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--max_steps", "4", "--logging_steps", "2", "--learning_rate", "1e-2", "--eval_strategy", "steps"),
        *(
            "--eval_steps",
            "2",
            "--max_validation_bytes",
            "500",
            "--disable_tqdm",
            "true",
            "--use_cpu",
            "true",
            "--eval_on_start",
            "true",
        ),
    ]
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    train_entries = [entry for entry in history if "loss" in entry]
    eval_entries = [entry for entry in history if "eval_bits_per_byte" in entry]
    assert len(train_entries) == 2 and all(name in entry for entry in train_entries for name in NAMES)
    assert all(f"eval_{name}" in entry for entry in eval_entries for name in NAMES)
    assert train_entries[1]["ce_loss"] < train_entries[0]["ce_loss"] < 6
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["bits_per_byte"] < results["bits_per_byte_before"]

    sample = run(SCRIPTS / "sample.py", "out", "--prompt", "def parse", "--max_new_tokens", "20", cwd=tmp_path)
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("def parse") and len(sample.stdout) > len("def parse") + 5
