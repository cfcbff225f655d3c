"""A classifier beside what always says the same and what knows words alone, and the numbers that compare them."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import classify
import numpy as np
import pytest
import torch
from classify import difference, read_rows, scores, split, words_alone
from corpora import build_tokenizer
from transformers import AutoModelForSequenceClassification, pipeline

from tests.tiny_leap import tiny_leap


ROOT = Path(__file__).parent.parent.parent
WORDS = ["one", "two", "six", "ten"]


def write_rows(path, number=400):
    """Four words in order or turned around: words alone tell nothing, their order all."""
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        label = draw.choice(["forward", "forward", "back"])
        words = " ".join(WORDS if label == "forward" else reversed(WORDS))
        rows.append({"line": words, "way": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def save_model(folder):
    tokenizer = build_tokenizer("byte", [])
    model = tiny_leap(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2, window_sizes=[3, None]
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_order_is_learned_that_words_alone_do_not_tell(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    save_model(tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "training/classify.py", "--model_name_or_path", tmp_path / "model"]
    command += ["--train_file", tmp_path / "rows.jsonl", "--text_column_name", "line", "--label_column_name", "way"]
    command += ["--output_dir", tmp_path / "out", "--max_steps", "40", "--learning_rate", "1e-2", "--use_cpu"]
    command += ["--report_to", "none"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "classification.json").read_text(encoding="utf-8"))
    held_out = [row["way"] for row in rows[::10]]
    most = held_out.count("forward") / len(held_out)
    assert (results["rows"], results["held_out_rows"], results["labels"]) == (360, 40, ["back", "forward"])
    assert results["scores"]["always the same"]["accuracy"] == pytest.approx(most)
    assert results["scores"]["words alone"]["accuracy"] == pytest.approx(most)
    ours = results["scores"]["LeapForSequenceClassification"]
    assert ours["accuracy"] == ours["macro_f1"] == 1
    assert results["above_words_alone"] == pytest.approx(1 - most)
    assert f"accuracy 1.000 +- 0.000, macro F1 1.000\n  above words alone, row by row: +{1 - most:.3f}" in done.stdout
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "back", 1: "forward"}
    classifier = pipeline("text-classification", loaded.eval(), tokenizer=build_tokenizer("byte", []))
    assert [said["label"] for said in classifier(["one two six ten", "ten six two one"])] == ["forward", "back"]


@pytest.mark.parametrize("option", ["--model_name_or_path", "--config_name"])
def test_what_is_trained_and_on_what(option, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", 40)
    trained, seen = save_model(tmp_path / "model"), []
    if option == "--config_name":
        (tmp_path / "model" / "model.safetensors").unlink()

    class Watched(classify.CleanTrainer):
        def train(self):
            seen.append(self.train_dataset["input_ids"])
            return super().train()

    command = f"classify.py {option} {tmp_path}/model --train_file {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --use_cpu"
    command += " --text_column_name line --label_column_name way --max_seq_length 7 --max_steps 1 --learning_rate 0 --report_to none"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(classify, "CleanTrainer", Watched)
    classify.main()
    assert {len(row) for row in seen[0]} == {7}
    left = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert left.config.vocab_size == 258 and left.config.num_labels == 2
    has_trained = torch.equal(left.model.embed_tokens.weight, trained.model.embed_tokens.weight)
    assert has_trained == (option == "--model_name_or_path")


@pytest.mark.parametrize("options", ["", "--model_name_or_path a --config_name b"])
def test_weights_or_a_configuration_are_given(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"classify.py --train_file x --output_dir {tmp_path} {options}".split())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="one of --model_name_or_path .* and --config_name .* must be given, got"):
        classify.main()


def test_an_untrained_classifier_takes_the_tokenizer_that_is_named(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", 40)
    save_model(tmp_path / "model")
    command = (
        f"classify.py --config_name {ROOT}/configs/leap-tiny --tokenizer_name {tmp_path}/model --use_cpu --max_steps 1"
    )
    command += f" --text_column_name line --label_column_name way --train_file {tmp_path}/rows.jsonl --report_to none"
    monkeypatch.setattr(sys, "argv", f"{command} --output_dir {tmp_path}/out".split())
    classify.main()
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (config.vocab_size, config.pad_token_id, config.num_labels) == (258, 257, 2)


def test_every_tenth_row_is_held_out():
    train, held_out = split(list(range(25)))
    assert held_out == [0, 10, 20] and sorted(train + held_out) == list(range(25))


def test_words_alone_tell_what_words_tell():
    texts, labels = ["red apple", "red rose", "blue sea", "blue sky"] * 3, ["r", "r", "b", "b"] * 3
    assert words_alone(texts, labels, ["sea so blue", "red red red"]).tolist() == ["b", "r"]


@pytest.mark.parametrize("texts", [["one", "two", "three"], ["a", "b", "c"]])
def test_words_that_tell_nothing(texts):
    """None is in two texts, or all are too short to count: always the most frequent label."""
    assert words_alone(texts, ["x", "y", "y"], ["one", "four"]).tolist() == ["y", "y"]


def test_scores_by_hand():
    truth, said = np.array(["a", "a", "b", "c"]), np.array(["a", "b", "b", "b"])
    found = scores(said, truth)
    assert found["accuracy"] == 0.5 and found["standard_error"] == 0.25
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_difference_is_of_the_same_rows():
    """Three rows of eight are won, one is lost."""
    truth = np.array(list("aaaaaaaa"))
    ours, other = np.array(list("aaaaaaab")), np.array(list("aaaabbba"))
    gain, error = difference(ours, other, truth)
    gains = np.array([0, 0, 0, 0, 1, 1, 1, -1])
    assert gain == 0.25
    assert error == pytest.approx(math.sqrt(((gains - 0.25) ** 2).sum() / 7 / 8))


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"--label_column_name label: line 2 of .* has only \['text'\]"):
        read_rows(str(path), "text", "label")
    with pytest.raises(ValueError, match="--text_column_name words: line 1"):
        read_rows(str(path), "words", "label")
    path.write_text('{"text": "a\u2028b", "label": "x"}\n{"text":\n', encoding="utf-8")
    with pytest.raises(ValueError, match="--train_file .*: line 2 is no JSON object"):
        read_rows(str(path), "text", "label")
    path.write_text('"text, label"\n')
    with pytest.raises(ValueError, match='--train_file .*: line 1 is no JSON object, but "text, label"'):
        read_rows(str(path), "text", "label")
    with pytest.raises(ValueError, match="--train_file nowhere must be a file of JSON objects"):
        read_rows("nowhere", "text", "label")
    path.write_text('{"text": "a", "label": "x"}\n' * 30)
    with pytest.raises(
        ValueError, match="--train_file .* must have at least 20 rows, with two labels .*, got 30 with 1"
    ):
        read_rows(str(path), "text", "label")
    path.write_text('{"text": "a", "label": "y"}\n' + '{"text": "a", "label": "x"}\n' * 30)  # the first is held out
    with pytest.raises(ValueError, match="got 31 with 1"):
        read_rows(str(path), "text", "label")
    for row, column in (
        ({"text": "", "label": "x"}, "text"),
        ({"text": ["a"], "label": "x"}, "text"),
        ({"text": "a", "label": None}, "label"),
    ):
        path.write_text(json.dumps({"text": "a", "label": 3}) + "\n" + json.dumps(row))
        with pytest.raises(ValueError, match=f"--{column}_column_name {column}: line 2 of .* must hold"):
            read_rows(str(path), "text", "label")
    path.write_bytes(b'{"text": "\xe9", "label": 1}')
    with pytest.raises(ValueError, match="--train_file .* is not UTF-8 text"):
        read_rows(str(path), "text", "label")
