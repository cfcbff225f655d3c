"""Runs that start from an untrained configuration or from trained weights, and what cannot be started from."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import starting_model
import torch
import train
from corpora import build_tokenizer
from loading import choose_source
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from tests.saved_models import FAMILIES, save_tiny
from tests.tiny import mostly_slow


CONFIGS = Path(__file__).parent.parent.parent / "configs"
SENTENCE = "Line {} of a text of one's own.\n"


def fine_tune(folder, monkeypatch, *more, base="base"):
    (folder / "text.txt").write_text("".join(SENTENCE.format(number) for number in range(300)), encoding="utf-8")
    command = f"train.py --model_name_or_path {folder / base} --dataset_name {folder / 'text.txt'} --output_dir {folder / 'out'}"
    command += " --cache_dir none --per_device_train_batch_size 2 --max_validation_bytes 300 --use_cpu true --disable_tqdm true"
    command += " --logging_steps 1 --report_to none"
    monkeypatch.setattr(sys, "argv", [*command.split(), *more])
    train.main()
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def losses(folder):
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ("leap", "heptapod")))
def test_weights_are_trained_further(family, tmp_path, monkeypatch):
    """With no learning rate nothing changes: neither weights, nor tokenizer, nor processor, nor what the model costs."""
    save_tiny(family, tmp_path / "base")
    size = () if family == "heptapod" else ("--block_size", "32")
    for rate in ("0", "1e-2"):
        options = (
            "--max_steps",
            "2",
            "--learning_rate",
            rate,
            "--eval_on_start",
            "true",
            "--save_strategy",
            "no",
            *size,
        )
        results = fine_tune(tmp_path, monkeypatch, *options)
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before) == (rate == "0")
    assert (results["base_model"], results["tokenizer"]) == ("base", "base")
    assert family == "heptapod" or results["bits_per_byte_before"] > results["bits_per_byte"]
    for name in ("tokenizer.json", "processor_config.json"):
        assert (tmp_path / "base" / name).exists() == (tmp_path / "out" / name).exists()
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert "Trained further from `base`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_fine_tuning_goes_on_from_its_checkpoint_and_its_own_base(tmp_path, monkeypatch):
    save_tiny("leap", tmp_path / "base")
    save_tiny("leap", tmp_path / "other", seed=1)
    options = ("--block_size", "32", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2")
    fine_tune(tmp_path, monkeypatch, *options)
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    options += ("--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="with other settings; --model_name_or_path: 'base' there, 'other' here"):
        fine_tune(tmp_path, monkeypatch, *options, base="other")
    fine_tune(tmp_path, monkeypatch, *options)
    assert losses(tmp_path) == whole and len(whole) == 4


def test_a_source_is_a_configuration_or_a_model(tmp_path):
    save_tiny("leap", tmp_path / "model")
    assert choose_source(str(tmp_path / "model"), None) == str(tmp_path / "model")
    for given in ((None, None), ("a", "b")):
        with pytest.raises(ValueError, match="one of --model_name_or_path .* and --config_name .* must be given, got"):
            choose_source(*given)
    with pytest.raises(
        ValueError, match=r"--config_name .* without weights, got model\.safetensors: --model_name_or_path"
    ):
        choose_source(None, str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model-1.bin")
    with pytest.raises(ValueError, match=r"--config_name .* without weights, got pytorch_model-1\.bin"):
        choose_source(None, str(tmp_path / "model"))
    (tmp_path / "model" / "pytorch_model-1.bin").unlink()
    assert choose_source(None, str(tmp_path / "model")) == str(tmp_path / "model")
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        choose_source(str(tmp_path / "nowhere" / "at" / "all"), None)


@pytest.mark.parametrize("more", [("--tokenizer_name", "byte"), ("--axes", "bracket")], ids=lambda more: more[0])
def test_a_trained_model_has_its_tokenizer_and_axes(more, tmp_path, monkeypatch):
    save_tiny("multigrid", tmp_path / "base")
    with pytest.raises(
        ValueError, match=f"{more[0]} .*: with --model_name_or_path the tokenizer and the axes are those of"
    ):
        fine_tune(tmp_path, monkeypatch, *more)


def test_a_tokenizer_fits_its_model(tmp_path):
    save_tiny("multigrid", tmp_path / "axes", axes=["bracket"])
    save_tiny("leap", tmp_path / "leap")
    config = AutoConfig.from_pretrained(tmp_path / "axes")
    name = str(tmp_path / "axes")
    assert starting_model.read_processing_class(name, config).axis_names == ["bracket"]
    assert len(starting_model.read_processing_class(str(tmp_path / "leap"), AutoConfig.for_model("leap"))) == 258
    for field, value in (("vocab_size", 257), ("axis_names", ["string"]), ("axis_vocab_sizes", [99])):
        other = AutoConfig.from_pretrained(tmp_path / "axes", **{field: value})
        with pytest.raises(
            ValueError, match=f"--model_name_or_path .*axes: `{field}` of the model is .*, of its tokenizer"
        ):
            starting_model.read_processing_class(name, other)
    save_tiny("heptapod", tmp_path / "grid")
    other = AutoConfig.from_pretrained(tmp_path / "grid", mask_token_id=3)
    with pytest.raises(ValueError, match="`mask_token_id` of the model is 3"):
        starting_model.read_processing_class(str(tmp_path / "grid"), other)
    for path in (tmp_path / "leap").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        ValueError, match="--model_name_or_path .*leap has no tokenizer or processor that can be loaded"
    ):
        starting_model.read_processing_class(str(tmp_path / "leap"), AutoConfig.for_model("leap"))


def test_no_weight_is_made_anew_or_left_out(tmp_path):
    save_tiny("leap", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    objective = SimpleNamespace(auto_class=train.objective_for(AutoConfig.for_model("leap")).auto_class)
    model = starting_model.load_trained(str(tmp_path / "model"), objective)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(
        ValueError, match=r"must hold the weights of a LeapForCausalLM, and differs from one in .*score\.weight"
    ):
        starting_model.load_trained(str(tmp_path / "classifier"), objective)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--model_name_or_path .* holds an adapter: merge it"):
        starting_model.load_trained(str(tmp_path / "model"), objective)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_an_untrained_model_are_those_of_the_tokenizer(family):
    """Else `Trainer` changes them with a warning."""
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    auto_class = AutoModelForMaskedLM if family == "heptapod" else AutoModelForCausalLM
    objective = SimpleNamespace(processing_class=tokenizer, config_options={"vocab_size": 999}, auto_class=auto_class)
    model = starting_model.make_untrained(str(CONFIGS / f"{family}-tiny"), objective)
    for owner in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(owner, name) == getattr(tokenizer, name) is not None, name


def test_a_folder_with_old_names_is_not_trained_further(tmp_path, monkeypatch):
    save_tiny("leap", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"sink_weight"', '"null_weight"'), encoding="utf-8")
    with pytest.raises(ValueError, match="--model_name_or_path .*base: `null_weight` was renamed to `sink_weight`"):
        fine_tune(tmp_path, monkeypatch, "--max_steps", "1")
