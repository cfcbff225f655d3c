"""training/train.py, run as a user runs it: in a process of its own, once to the end and once with a kill -9."""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train
import training_callbacks
from accelerate.data_loader import BatchSamplerShard
from corpora import DataArguments, PackedBlocks
from objectives import objective_for
from run_report import runs_beside
from run_settings import check_resumable
from token_counts import Reading
from torch.utils.data import BatchSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerState, TrainingArguments


SCRIPTS = Path(train.__file__).parent
CONFIGS = SCRIPTS.parent / "configs"
CORPUS = argparse.__file__  # one file of real text on every machine
STEPS, SAVE_STEPS, KILLED_IN_STEP = 12, 3, 8

CONFIG = {
    "model_type": "leap",
    "vocab_size": 99,  # replaced by the tokenizer's
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_sizes": [None, 4],
    "hidden_dropout": 0.1,  # a resumed run must draw the same numbers
}

# Runs train.py, and dies in the middle of a step without any chance to clean up.
KILLED = f"""
import os, signal, sys
import train

class Trainer(train.ShardingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == {KILLED_IN_STEP} - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

train.ShardingTrainer = Trainer
train.main()
"""


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}  # so that the package need not be installed
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


def arguments(folder, *more):
    return [
        *("--config_name", str(folder / "config"), "--output_dir", str(folder / "out"), "--dataset_name", CORPUS),
        *(
            "--tokenizer_name",
            "bpe",
            "--vocab_size",
            "300",
            "--block_size",
            "64",
            "--per_device_train_batch_size",
            "4",
        ),
        *("--per_device_eval_batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine"),
        *("--logging_steps", "1", "--save_steps", str(SAVE_STEPS), "--eval_strategy", "steps", "--eval_steps", "6"),
        *("--max_validation_bytes", "3000", "--eval_on_start", "true", "--disable_tqdm", "true", "--use_cpu", "true"),
        *more,
    ]


def prepare(folder):
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "config" / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nobody disturbed, and what it printed."""
    folder = prepare(tmp_path_factory.mktemp("finished"))
    process = run(SCRIPTS / "train.py", *arguments(folder, "--max_steps", str(STEPS)), cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "out", process.stdout


def log(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def test_a_killed_run_resumes_with_the_same_losses(finished, tmp_path):
    folder = prepare(tmp_path)
    script = folder / "killed.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n" + KILLED)
    process = run(script, *arguments(folder, "--max_steps", str(STEPS)), cwd=folder)
    assert process.returncode == -signal.SIGKILL, process.stderr
    saved = sorted(path.name for path in (folder / "out").iterdir())
    assert saved == ["checkpoint-3", "checkpoint-6"]
    # As if the next checkpoint had been cut off while it was being written.
    (folder / "out" / "checkpoint-9").mkdir()
    (folder / "out" / "checkpoint-9" / "config.json").write_text("{}")

    # The length of the schedule comes from the checkpoint, also where it is not given.
    process = run(SCRIPTS / "train.py", *arguments(folder, "--resume_from_checkpoint", "last"), cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "checkpoint-9 is not complete and is skipped: trainer_state.json is missing" in process.stderr

    assert process.stdout.count("{'loss'") == STEPS - 6  # and not all over again

    assert [step for step, _ in log(finished[0], "loss")] == list(range(1, STEPS + 1))
    for name in ("loss", "eval_bits_per_byte"):
        assert log(folder / "out", name) == log(finished[0], name)
    results = [json.loads((out / "results.json").read_text(encoding="utf-8")) for out in (finished[0], folder / "out")]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert results[0]["bits_per_byte_before"] == results[1]["bits_per_byte_before"]


def test_a_finished_run_trains_no_further(finished, tmp_path):
    """As after a kill while the last evaluation ran."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0].parent, folder)
    (folder / "out" / "results.json").unlink()
    process = run(SCRIPTS / "train.py", *arguments(folder, "--resume_from_checkpoint", "last"), cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "{'loss'" not in process.stdout and log(folder / "out", "loss") == log(finished[0], "loss")
    expected, resumed = (
        json.loads((out / "results.json").read_text(encoding="utf-8")) for out in (finished[0], folder / "out")
    )
    for name in ("steps", "weights_of_step", "weights_sha256", "bits_per_byte"):
        assert resumed[name] == expected[name]
    assert (expected["resumed_at_step"], resumed["resumed_at_step"]) == (None, STEPS)


@pytest.mark.slow
def test_patience_is_not_given_anew(tmp_path, monkeypatch, capsys):
    """With steps that lead nowhere the run stops after three evaluations, also where it is resumed in between or after them."""
    folder = prepare(tmp_path)
    more = ("--learning_rate", "10", "--lr_scheduler_type", "constant", "--load_best_model_at_end", "true")
    more += ("--early_stopping_patience", "2", "--eval_steps", "2", "--save_steps", "2", "--max_steps", "12")
    command = arguments(folder, *more, "--eval_on_start", "false")
    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    train.main()
    assert log(folder / "out", "loss")[-1][0] == 6
    for left, steps in ((6, 0), (4, 2)):
        for path in (folder / "out").glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > left:
                shutil.rmtree(path)
        monkeypatch.setattr(sys, "argv", ["train.py", *command, "--resume_from_checkpoint", "last"])
        capsys.readouterr()
        train.main()
        assert capsys.readouterr().out.count("{'loss'") == steps
        assert log(folder / "out", "loss")[-1][0] == 6


def test_a_new_run_does_not_mix_its_checkpoints_with_others(finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(finished[0].parent, "--max_steps", "1")])
    with pytest.raises(ValueError, match="--output_dir .* must be a folder that can be written to"):
        file = TrainingArguments(str(finished[0] / "config.json"), use_cpu=True)
        train.check_arguments(train.ModelArguments(config_name=""), DataArguments(), file)
    with pytest.raises(ValueError, match="--output_dir .* holds checkpoint-12 of another run"):
        train.main()


PLAIN = SimpleNamespace(deepspeed_plugin=None, bf16=True, fp16=False)


def test_what_deepspeed_casts_is_resumed(tmp_path):
    """It saves the dtype that it cast the weights to; without a cast the dtype is the model's own."""
    config = AutoConfig.for_model("leap")
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(config.to_json_string()), "dtype": "bfloat16"}))
    for options in ({"bf16": True, "fp16": False}, {"bf16": False, "fp16": True}):
        check_resumable(str(tmp_path), config, SimpleNamespace(deepspeed_plugin=object(), **options))
    for args in (PLAIN, SimpleNamespace(deepspeed_plugin=object(), bf16=False, fp16=False)):
        with pytest.raises(ValueError, match="is of another model .*'dtype': .'bfloat16', 'float32'"):
            check_resumable(str(tmp_path), config, args)


@pytest.mark.parametrize(
    "change", [{"window_sizes": [None, 8]}, {"model_type": "hierarchical_lm"}, {"dtype": "bfloat16"}]
)
def test_a_checkpoint_of_another_model_is_not_resumed(finished, change, tmp_path):
    config = {name: value for name, value in CONFIG.items() if name != "window_sizes"} | {"vocab_size": 300} | change
    config = AutoConfig.for_model(**config)
    with pytest.raises(ValueError, match=rf"--resume_from_checkpoint .* is of another model .*{next(iter(change))}"):
        check_resumable(str(finished[0] / "checkpoint-6"), config, PLAIN)
    with pytest.raises(ValueError, match=r"--config_name must be a folder with a config\.json, .* got .*nowhere"):
        train.read_config("--config_name", str(tmp_path / "nowhere"))


def test_training_learns_and_says_what(finished):
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["steps"] == STEPS
    assert results["bits_per_byte"] < results["bits_per_byte_before"] - 0.5
    for name in ("bits_per_byte_before", "bits_per_byte", "bits_per_byte_bz2"):
        assert f"{results[name]:.3f}" in printed
    assert f"{results['held_out_bytes']:,} held-out bytes" in printed

    assert [step for step, _ in log(folder, "eval_bits_per_byte")] == [0, 6, 12, 12]

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "{{" not in card and "model-index" in card and f"**{results['bits_per_byte']:.3f}**" in card
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_agrees_with_an_independent_computation(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))

    text = Path(CORPUS).read_bytes().decode()
    cut = round(0.95 * len(text))
    text = text[text.index("\n", cut) + 1 :].encode()[:3000]
    assert results["held_out_bytes"] == len(text)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer(text.decode())["input_ids"], end]
    assert len(ids) < 0.8 * len(text)  # tokens are not bytes here
    nats = 0.0
    for start in range(0, len(ids) - 1, 63):  # blocks of 64, of which 63 are predicted
        block = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            probabilities = model(input_ids=block).logits.softmax(-1)
        for position, token in enumerate(block[0, 1:]):
            nats -= math.log(probabilities[0, position, token])
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


@pytest.mark.slow
def test_saved_folder_writes_text_without_the_package(finished, tmp_path):
    """In a new process that cannot import our package: the folder brings its own code."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import runpy, sys\nsys.modules['modeling_heptapod'] = None\nsys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    sample = (SCRIPTS / "sample.py", finished[0], "--prompt", "def parse", "--max_new_tokens", "20")
    first, other = (run(script, *sample, "--seed", seed, cwd=tmp_path) for seed in ("0", "1"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def parse") and len(first.stdout) > len("def parse") + 10
    assert first.stdout != other.stdout


def test_saved_configuration_is_the_models_and_the_tokenizers(finished):
    folder, _ = finished
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer) == 300
    assert config.use_cache
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.generation_config.do_sample and model.generation_config.top_k == 7


def tiny_model():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**CONFIG, "vocab_size": 258}))


def test_steps_within_fills_the_time_and_leaves_no_trace(tmp_path, monkeypatch):
    class SlowTrainer(train.ShardingTrainer):
        def training_step(self, *args, **kwargs):
            time.sleep(0.05)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(train, "ShardingTrainer", SlowTrainer)
    model, dataset = tiny_model(), PackedBlocks(np.arange(258, dtype=np.uint16).repeat(20), block_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, per_device_train_batch_size=2, max_steps=5)
    assert 40 < train.steps_within(0.1, model, args, dataset) <= 6 / 0.05
    assert train.steps_within(1e-9, model, args, dataset) == 1
    assert args.max_steps == 5 and not list((tmp_path / "out").iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="--train_minutes"):
        train.steps_within(0, model, args, dataset)


def test_runs_beside_are_those_on_the_same_bytes(tmp_path):
    for name, digest, bits in (("ours", "a", 3.0), ("same", "a", 2.0), ("other", "b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"held_out_sha256": digest, "bits_per_byte": bits}))
    for name, foreign in (("f", '{"accuracy": 1}'), ("g", "[1]"), ("h", "half {"), ("i", '{"held_out_sha256": "a"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(foreign)
    (tmp_path / "j" / "results.json").mkdir(parents=True)
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "results.json").write_bytes(b"\xff")
    assert runs_beside(tmp_path / "ours", {"held_out_sha256": "a"}) == {"same": 2.0}


FAMILIES = ("heptapod", "hierarchical_lm", "leap", "multigrid")


def test_every_family_has_every_size():
    expected = {f"{family}-{size}" for family in FAMILIES for size in ("tiny", "small", "base")}
    assert {path.name for path in CONFIGS.iterdir()} == expected


@pytest.mark.parametrize("folder", sorted(path.name for path in CONFIGS.iterdir()))
def test_configurations_make_models(folder):
    """Loadable by name alone: no code and no weights beside them."""
    assert sorted(path.name for path in (CONFIGS / folder).iterdir()) == ["config.json", "generation_config.json"]
    config = AutoConfig.from_pretrained(CONFIGS / folder)
    assert config.model_type == folder.rsplit("-", 1)[0] and not hasattr(config, "auto_map")
    with torch.device("meta"):
        model = objective_for(config).auto_class.from_config(config)
    least, most = {"tiny": (5e5, 2e6), "small": (1e7, 6e7), "base": (8e7, 1.3e8)}[folder.rsplit("-", 1)[1]]
    assert least < model.num_parameters() < most
    generation_config = type(model.generation_config).from_pretrained(CONFIGS / folder)
    assert (
        generation_config.max_denoising_steps == 16 if config.model_type == "heptapod" else generation_config.do_sample
    )


def test_a_run_that_is_resumed_keeps_its_schedule(finished, monkeypatch):
    more = ("--max_steps", str(STEPS + 1), "--resume_from_checkpoint", "last")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(finished[0].parent, *more)])
    with pytest.raises(
        ValueError, match=f"--max_steps {STEPS + 1}: the run that is resumed has a schedule of {STEPS} "
    ):
        train.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "7"), "--seed: 42 there, 7 here"),
        (("--block_size", "32"), "--block_size: 64 there, 32 here"),
        (("--per_device_train_batch_size", "2"), "--per_device_train_batch_size x .*: 4 there, 2 here"),
        (("--dataset_name", json.__file__), r"--dataset_name \(SHA-256 of the training text\): .* there"),
        (("--lr_scheduler_type", "linear"), "--lr_scheduler_type: 'cosine' there, 'linear' here"),
        (("--learning_rate", "2e-2"), "--learning_rate: 0.01 there, 0.02 here"),
        (("--train_minutes", "10"), "its length: --max_steps 12 there, --train_minutes 10.0 here"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_run_with_other_settings_is_not_resumed(change, message, finished, monkeypatch):
    words = ("--resume_from_checkpoint", "last", "--cache_dir", "none", "--tokenizer_name", "bpe", *change)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(finished[0].parent, *words)])
    monkeypatch.setattr(train, "ShardingTrainer", None)  # not even made
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*checkpoint-12 is of a run .*{message}"):
        train.main()


def test_a_model_that_gives_no_numbers_ends_in_an_error(tmp_path, monkeypatch):
    folder = prepare(tmp_path)
    more = ("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--eval_on_start", "false")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, *more)])

    class Diverging(train.ShardingTrainer):
        def train(self, **kwargs):
            result = super().train(**kwargs)
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))
            return result

    monkeypatch.setattr(train, "ShardingTrainer", Diverging)
    with pytest.raises(ValueError, match=r"results\.json was not written: bits_per_byte of this model would be NaN"):
        train.main()
    assert not (folder / "out" / "results.json").exists() and not (folder / "out" / "README.md").exists()


def test_what_trainer_could_not_resume_is_not_begun(tmp_path, monkeypatch):
    config = {"model_type": "hierarchical_lm", "compression_factors": [1, 4], "strides": [1, 2], "hidden_size": 32}
    config |= {"num_attention_heads": 2, "head_dim": [16, 32]}
    folder = prepare(tmp_path)
    (folder / "config" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, "--max_steps", "1")])
    with pytest.raises(
        ValueError, match=r"--config_name: Trainer cannot resume .* got \[16, 32\]; set --save_strategy no"
    ):
        train.main()


def test_tokens_of_a_run_are_those_of_all_its_batches(tmp_path, monkeypatch):
    """4 blocks of 64 and twice that in a step: the third step is needed for the last token."""
    folder = prepare(tmp_path)
    more = ("--gradient_accumulation_steps", "2", "--train_tokens", "1025", "--eval_strategy", "no")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, *more)])
    train.main()
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert (results["steps"], results["tokens_per_step"]) == (3, 512)
    # The first step, in which everything is made, is not in the speed.
    assert results["tokens_per_second"] * (results["train_seconds"] + 0.05) > 2 * 512


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("drops", [False, True])
def test_steps_read_what_accelerate_gives_them(drops, processes, accumulated):
    """Short last steps of an epoch, and last batches that are filled up with examples that were read already."""
    batch = 4
    args = SimpleNamespace(train_batch_size=batch, world_size=processes, dataloader_drop_last=drops)
    args.gradient_accumulation_steps = accumulated
    for examples in (*range(1, 40), 100):
        if drops and examples < batch * processes:
            continue  # is refused
        batches = BatchSampler(range(examples), batch, drops)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        if processes == 1:
            shards = [list(batches)]
        sizes = [sum(map(len, row)) for row in zip(*shards, strict=True)]
        steps = [sum(sizes[i : i + accumulated]) for i in range(0, len(sizes), accumulated)]
        reading, read = Reading(examples, args), list(itertools.accumulate(steps * 3, initial=0))
        assert [reading.examples_in(number) for number in range(len(read))] == read
        for wanted in range(1, read[-1] + 1):
            number = reading.steps_for(wanted)
            assert read[number - 1] < wanted <= read[number]


def test_a_batch_that_is_never_full_is_not_dropped_without_a_word(tmp_path, monkeypatch):
    folder = prepare(tmp_path)
    more = ("--dataloader_drop_last", "true", "--per_device_train_batch_size", "900")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, *more)])
    with pytest.raises(
        ValueError, match=r"--dataloader_drop_last leaves nothing to train on: .* fewer than the 900 of"
    ):
        train.main()


def test_the_speed_is_that_of_the_steps_after_the_first(monkeypatch):
    ticks, clock = iter([0, 5, 10, 11, 20, 23]), itertools.count(time.time()).__next__
    monkeypatch.setattr(training_callbacks, "time", SimpleNamespace(perf_counter=lambda: next(ticks), time=clock))
    speed, state, found = training_callbacks.Speed(), TrainerState(), []
    for _ in range(3):
        speed.on_step_begin(None, state, None)
        speed.on_step_end(None, state, None)
        found.append((speed.seconds, speed.later_seconds))
    first = found[0][0]
    assert first > 0 and found == [(first, 0), (first, 1), (first, 1 + 3)]


@pytest.mark.parametrize("metric", [(), ("--metric_for_best_model", "bits_per_byte")], ids=["default", "named"])
def test_a_run_stops_early_and_leaves_its_best_model(metric, tmp_path, monkeypatch):
    """Where each step climbs the loss, the first evaluation was the best, in bits per byte."""

    class ClimbingTrainer(train.ShardingTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for parameter in model.parameters():
                parameter.grad.neg_()
            return loss

    folder = prepare(tmp_path)
    more = ("--max_steps", "9", "--eval_steps", "1", "--save_steps", "1", "--eval_on_start", "false", *metric)
    more += ("--load_best_model_at_end", "true", "--early_stopping_patience", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, *more)])
    monkeypatch.setattr(train, "ShardingTrainer", ClimbingTrainer)
    train.main()
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    bits = [entry["eval_bits_per_byte"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["global_step"] == 3 and bits[:3] == sorted(bits[:3])
    assert state["best_metric"] == bits[0]
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["bits_per_byte"] == pytest.approx(bits[0], rel=1e-6)


def test_bad_corpus_ends_the_run_with_the_arguments_name(tmp_path):
    folder = prepare(tmp_path)
    more = ("--max_steps", "1", "--dataset_name", str(tmp_path / "missing.txt"))
    process = run(SCRIPTS / "train.py", *arguments(folder, *more), cwd=folder)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("ValueError: --dataset_name ")
