"""What the families learn from text, and its price in bits per byte; the grid's whole path through train.py."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import objectives
import pytest
import torch
from corpora import DataArguments, PackedBlocks, Texts, build_tokenizer, encode
from objectives import MaskedPages, NextTokens, bits_per_byte, objective_for, sum_nats
from transformers import AutoConfig, AutoModelForMaskedLM, AutoProcessor


SCRIPTS = Path(objectives.__file__).parent
PAGE_CONFIG = {
    "model_type": "heptapod",
    "vocab_size": 99,  # replaced by the tokenizer's
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "grid_size": [4, 24],
    "hidden_dropout": 0.1,  # a resumed run must draw the same numbers, for this and for the masks
}


def test_a_cache_that_cannot_be_kept_is_named(tmp_path):
    (tmp_path / "file").touch()
    config = AutoConfig.for_model("leap")
    with pytest.raises(ValueError, match="--cache_dir .*file must be a folder that can be written to"):
        objective_for(config)(Texts(["a"], ["b"]), DataArguments(cache_dir=str(tmp_path / "file")), config)


def test_what_a_family_has_no_use_for_is_said(caplog, monkeypatch):
    monkeypatch.setattr(objectives.logger, "propagate", True)
    monkeypatch.setattr(objectives.logger.parent, "propagate", True, raising=False)
    texts = Texts(["some text\n" * 9], ["other text\n" * 9])
    options = {"cache_dir": "none", "block_size": 8, "axes": ["bracket"]}
    for config, unused in ((PAGE_CONFIG, ("axes", "block_size")), ({"model_type": "leap"}, ("axes",))):
        caplog.clear()
        config = AutoConfig.for_model(**config)
        objective_for(config)(texts, DataArguments(**options), config)
        said = [f"--{name} {options[name]} is of no use to a {config.model_type}: it is left aside" for name in unused]
        assert [record.getMessage() for record in caplog.records if "of no use" in record.getMessage()] == said


def test_sum_nats_counts_each_predicted_token_once():
    logits, labels = torch.randn(3, 8, 11), torch.randint(11, (3, 8))
    labels[1, 5:] = -100
    expected = torch.zeros(3)
    for row in range(3):
        for position in range(7):
            if labels[row, position + 1] != -100:
                expected[row] -= logits[row, position].log_softmax(-1)[labels[row, position + 1]]
    torch.testing.assert_close(sum_nats(logits, labels), expected)
    torch.testing.assert_close(sum_nats(logits.bfloat16(), labels), expected, rtol=0.02, atol=0.02)


def test_bits_per_byte_of_a_uniform_model_is_known():
    """A byte tokenizer and a model that knows nothing: log2(258) bits for each byte and for the two separators."""
    tokenizer = build_tokenizer("byte", [])
    blocks = PackedBlocks(encode(["é" * 50], tokenizer), block_size=16, pad_token_id=tokenizer.pad_token_id)
    nats = torch.cat([sum_nats(torch.zeros(1, 16, 258), block["labels"][None]) for block in blocks])
    assert bits_per_byte(nats.numpy(), 100) == pytest.approx(math.log2(258) * 101 / 100, rel=1e-6)


def page_config(**changes):
    options = {**PAGE_CONFIG, **changes}
    return AutoConfig.for_model(options.pop("model_type"), **options)


def test_each_family_has_its_objective():
    assert objective_for(page_config()) is MaskedPages
    assert objective_for(AutoConfig.for_model("leap")) is NextTokens


def test_pages_hold_the_texts_and_each_begins_one():
    texts = Texts(["a = 1\nb = 2\n" * 5, "é" * 60], ["x\n"])
    objective = MaskedPages(texts, DataArguments(), page_config())
    processor = objective.processing_class
    pages = torch.from_numpy(objective.train_dataset.pages.astype(np.int64))
    assert pages.shape == (3 + 2, 4, 24)  # 10 lines of a row each, and 120 bytes
    assert processor.decode(pages[:3].reshape(-1, 24)) == texts.train[0]
    assert processor.decode(pages[3:].reshape(-1, 24)) == texts.train[1]
    example = objective.train_dataset[1]
    assert torch.equal(example["input_ids"], example["labels"]) and torch.equal(example["labels"], pages[1])
    assert objective.held_out_bytes == 2 and objective.held_out_cells == 96
    assert objective.config_options["mask_token_id"] == processor.tokenizer.mask_token_id


def test_pages_need_a_size():
    with pytest.raises(ValueError, match="--config_name.*grid_size"):
        MaskedPages(Texts(["a"], ["b"]), DataArguments(), page_config(grid_size=None))


class Stub:
    """As much of a trainer as `evaluate` asks for, around a model that knows nothing."""

    def __init__(self, objective):
        self.model = AutoModelForMaskedLM.from_config(page_config(**objective.config_options))
        torch.nn.init.zeros_(self.model.lm_head.weight)
        self.args = argparse.Namespace(device=torch.device("cpu"), eval_batch_size=2)

    def compute_loss_context_manager(self):
        return torch.autocast("cpu", enabled=False)


def test_the_bound_of_a_uniform_model_is_known(monkeypatch):
    """258 tokens may be written, bytes, end and blank; every cell costs log2(258) bits, whatever was masked."""
    objective = MaskedPages(Texts(["a\n"], ["é" * 50, "b\n"]), DataArguments(), page_config())
    figures = objective.evaluate(Stub(objective))
    cells = 3 * 96  # two pages and one
    assert figures["bits_per_cell"] == pytest.approx(math.log2(258), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(258) * cells / 102, rel=1e-5)
    assert figures["bits_per_byte_standard_error"] == pytest.approx(0, abs=1e-4)
    output = argparse.Namespace(losses=np.full(3, math.log(258)))
    during_training = objective.trainer_options()["compute_metrics"](output)
    assert during_training["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-5)
    # Of nats that differ, with their error, all in one unit; the loss is of the 96 cells that two bytes were trained on.
    monkeypatch.setattr("objectives.diffusion_bound", lambda *_: (np.array([100.0, 200.0, 44.0]), 1.5))
    figures = objective.evaluate(Stub(objective))
    names = ("bits_per_byte", "bits_per_byte_standard_error", "bits_per_cell")
    nats_in_bits = [344 / 102, 1.5 / 102, 344 / cells]
    assert [figures[name] for name in names] == pytest.approx([x / math.log(2) for x in nats_in_bits])
    assert objective.bits_per_byte_of_loss == pytest.approx(96 / 2 / math.log(2))


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


FAILS = f"""
import sys; sys.path.insert(0, {str(SCRIPTS)!r})
import objectives, train

def evaluate(self, trainer):
    raise RuntimeError("no figures today")

objectives.MaskedPages.evaluate = evaluate
train.main()
"""


@pytest.mark.slow
def test_what_was_trained_is_saved_before_it_is_measured(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    process = train_process(tmp_path, tmp_path / "fails.py", "--save_strategy", "no", "--max_steps", "1")
    assert process.returncode == 1 and "no figures today" in process.stderr
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").generation_config.max_denoising_steps == 5
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).height == 4


def train(folder, *more):
    process = train_process(folder, SCRIPTS / "train.py", *more)
    assert process.returncode == 0, process.stderr
    return folder / "out", process.stdout


def train_process(folder, script, *more):
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(PAGE_CONFIG))
    (folder / "config" / "generation_config.json").write_text(json.dumps({"max_denoising_steps": 5}))
    return run(
        script,
        *(
            "--config_name",
            str(folder / "config"),
            "--output_dir",
            str(folder / "out"),
            "--dataset_name",
            argparse.__file__,
        ),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--learning_rate", "1e-2"),
        *("--logging_steps", "1", "--save_steps", "4", "--max_steps", "8", "--max_validation_bytes", "2000"),
        *("--disable_tqdm", "true", "--use_cpu", "true", "--eval_on_start", "true", *more),
        cwd=folder,
    )


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.slow
def test_a_grid_is_trained_resumed_and_fills_a_page(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    out, printed = train(tmp_path / "first")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["bits_per_byte"] < results["bits_per_byte_before"] - 0.5
    assert f"{results['bits_per_byte']:.3f} +- {results['bits_per_byte_standard_error']:.3f}" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "{{" not in card and "AutoProcessor" in card and "4 x 24 cells" in card
    assert "pipeline_tag: other" in card and "pipeline_tag: fill-mask" not in card  # that pipeline cannot read pages
    assert "use_cache" not in json.loads((out / "config.json").read_text(encoding="utf-8")) and "use_cache" not in card

    resumed, _ = train(tmp_path / "second", "--resume_from_checkpoint", str(out / "checkpoint-4"))
    assert losses(resumed) == losses(out) and list(losses(out)) == list(range(1, 9))
    assert (
        json.loads((resumed / "results.json").read_text(encoding="utf-8"))["bits_per_byte"] == results["bits_per_byte"]
    )

    assert AutoProcessor.from_pretrained(out, trust_remote_code=True).height == 4
    process = run(SCRIPTS / "infill.py", out, "--text_file", argparse.__file__, "--page", "3", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "generated in 16 forward passes" in process.stdout
    assert (out / "infilling.gif").read_bytes().startswith(b"GIF8") and (out / "infilling.png").stat().st_size > 1000
    written = []
    for seed in ("1", "1", "2"):
        more = ("--text_file", argparse.__file__, "--do_sample", "--seed", seed)
        written.append(run(SCRIPTS / "infill.py", out, *more, cwd=tmp_path).stdout)
    assert written[0] == written[1] != written[2] and "forward passes" in written[2]
    process = run(SCRIPTS / "infill.py", out, "--page", "100000", cwd=tmp_path)
    assert process.returncode == 1 and "ValueError: --page 100000" in process.stderr
