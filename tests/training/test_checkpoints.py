"""Checkpoints that are whole or not taken; runs that go on as they began, or not at all."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import train
from checkpoints import CHECKSUMS, RUN, alone_in, check_begins_alone, check_same_run, damage_of, find_checkpoint
from run_settings import Corpus, settings_of
from training_callbacks import BestCheckpoint
from transformers import TrainerState

from tests.training import kills, tiny_runs


SCRIPTS = Path(train.__file__).parent
SETTINGS = {"--seed": 1, "--block_size": 32}
HERE = {"settings": SETTINGS, "length": {"--max_steps": 4}, "processes": 1, "sharded": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    run = tiny_runs.trainer("leap", folder, save_strategy="steps", save_steps=2)
    run.describe_run = lambda: HERE
    run.train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    return tmp_path / "out"


def cut(name, share=0.5):
    def harm(checkpoint):
        size = (checkpoint / name).stat().st_size
        os.truncate(checkpoint / name, int(size * share))

    return harm


def remove(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def change_a_byte(checkpoint):
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)


HARMS = {
    "weights cut off": (cut("model.safetensors"), "model.safetensors"),
    "weights one byte short": (cut("model.safetensors", 0.99999), "model.safetensors"),
    "weights empty": (cut("model.safetensors", 0), "model.safetensors"),
    "weights missing": (remove("model.safetensors"), "model.safetensors is missing"),
    "optimizer empty": (cut("optimizer.pt", 0), "optimizer.pt"),
    "optimizer cut off": (cut("optimizer.pt", 0.9), "optimizer.pt"),
    "optimizer missing": (remove("optimizer.pt"), "optimizer.pt is missing"),
    "schedule empty": (cut("scheduler.pt", 0), "scheduler.pt"),
    "random numbers empty": (cut("rng_state.pth", 0), "rng_state.pth"),
    "random numbers missing": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "state missing": (remove("trainer_state.json"), "trainer_state.json is missing"),
    "state cut off": (cut("trainer_state.json"), "trainer_state.json"),
    "config empty": (cut("config.json", 0), "(trainer_state|config).json"),
    "run cut off": (cut(RUN), "(trainer_state|run).json"),
    "another run": (lambda checkpoint: (checkpoint / RUN).write_text('["a list"]'), "(trainer_state|run).json"),
    "half a run": (lambda checkpoint: (checkpoint / RUN).write_text('{"settings": {}}'), "(trainer_state|run).json"),
}


@pytest.mark.parametrize("has_checksums", [True, False], ids=["with checksums", "of an older version"])
@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_is_named_and_the_one_before_taken(harm, has_checksums, folder, caplog):
    if not has_checksums:
        for checkpoint in folder.iterdir():
            (checkpoint / CHECKSUMS).unlink()
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-4")
    harm, named = HARMS[harm]
    harm(folder / "checkpoint-4")
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-2")
    assert re.search(f"{folder / 'checkpoint-4'} is not complete and is skipped: {named}", caplog.text)
    with pytest.raises(
        ValueError, match=f"--resume_from_checkpoint .*checkpoint-4 is not a complete checkpoint: {named}"
    ):
        find_checkpoint(str(folder / "checkpoint-4"), str(folder))
    shutil.rmtree(folder / "checkpoint-2")
    assert find_checkpoint("last", str(folder)) is None
    assert f"there is no complete checkpoint in {folder}, so training starts from the beginning" in caplog.text


def test_a_changed_byte_is_seen(folder):
    change_a_byte(folder / "checkpoint-4")
    assert damage_of(folder / "checkpoint-4") == "model.safetensors is not what was saved"
    (folder / "checkpoint-2" / CHECKSUMS).write_text('{"model.safetensors": 5}')
    assert damage_of(folder / "checkpoint-2").startswith(f"{CHECKSUMS} is damaged")


def test_checksums_are_of_all_files(saved):
    listed = json.loads((saved / "checkpoint-4" / CHECKSUMS).read_text(encoding="utf-8"))
    assert set(listed) == {path.name for path in (saved / "checkpoint-4").iterdir()} - {CHECKSUMS}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", RUN} <= set(listed)
    assert "training_args.bin" not in listed


def test_where_there_is_nothing_training_begins(tmp_path, caplog):
    """As after a kill before the first checkpoint, or in a loop that always resumes the last."""
    assert find_checkpoint("last", str(tmp_path / "nothing")) is None
    assert "so training starts from the beginning" in caplog.text
    with pytest.raises(
        ValueError, match=r"--resume_from_checkpoint .*missing is not a complete checkpoint: trainer_state\.json"
    ):
        find_checkpoint(str(tmp_path / "missing"), str(tmp_path))


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch, caplog):
    for _ in range(2):  # the end of one lets the next one in
        with alone_in(str(tmp_path)):
            with (
                pytest.raises(ValueError, match="--output_dir .*: another run writes into it"),
                alone_in(str(tmp_path)),
            ):
                pass
            command = [*kills.arguments("leap", tmp_path / "run", 1), "--output_dir", str(tmp_path)]
            monkeypatch.setattr(sys, "argv", ["train.py", *command])
            with pytest.raises(ValueError, match="--output_dir .*: another run writes into it"):
                train.main()

    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(checkpoints, "lock", no_locks)
    with alone_in(str(tmp_path)):
        assert "a second run in it would not be noticed: no locks available" in caplog.text


@pytest.mark.skipif(checkpoints.fcntl is None, reason="Windows has no fork")
def test_a_forked_worker_keeps_no_other_run_out(tmp_path):
    with alone_in(str(tmp_path)):
        is_there, says_so = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(says_so, b"x")
            while True:
                signal.pause()
        os.read(is_there, 1)
        with pytest.raises(ValueError, match="another run writes into it"), alone_in(str(tmp_path)):
            pass
    try:  # as after the run was killed
        with alone_in(str(tmp_path)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize("harm", [None, "weights cut off", "gone", "never saved"])
def test_a_best_checkpoint_is_taken_where_it_is_whole(harm, folder, caplog):
    """Moved with its folder it still is; of what is gone no figure is written. The best step may be one that was not saved."""
    args = train.TrainingArguments(
        str(folder), load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", use_cpu=True
    )
    recorded = None if harm == "never saved" else "elsewhere/checkpoint-2"
    saved = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    saved["best_model_checkpoint"] = recorded
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(saved))
    # Trainer drops a folder that is not there.
    state = TrainerState(best_global_step=3, best_metric=1.5, best_model_checkpoint=None)
    if harm == "gone":
        shutil.rmtree(folder / "checkpoint-2")
    elif harm in HARMS:
        HARMS[harm][0](folder / "checkpoint-2")
    BestCheckpoint(None).on_train_begin(args, state, None)
    BestCheckpoint(str(folder / "checkpoint-4")).on_train_begin(args, state, None)
    best = (state.best_global_step, state.best_metric, state.best_model_checkpoint)
    if harm is None:
        assert best == (3, 1.5, str(folder / "checkpoint-2")) and not caplog.text
    elif harm == "never saved":
        assert best == (3, 1.5, None) and not caplog.text
    else:
        assert best == (None, None, None)
        assert "checkpoint-2, the best so far, is not a complete checkpoint" in caplog.text


def test_what_is_no_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-7").write_text("a file")
    assert damage_of(tmp_path / "checkpoint-7") == "it is no folder"
    assert find_checkpoint("last", str(tmp_path)) is None


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to nothing"])
def test_nothing_is_in_the_way_of_a_checkpoint(kind, folder):
    """Said at the start, not when the step is saved."""
    path = folder / "checkpoint-6"
    if kind == "a file":
        path.write_text("")
    else:
        path.symlink_to(folder / ("checkpoint-4" if kind == "a link" else "nothing"))
    for checkpoint in (None, str(folder / "checkpoint-2")):
        with pytest.raises(ValueError, match="--output_dir .*: checkpoint-6 is a file or a link, where a checkpoint"):
            check_begins_alone(str(folder), checkpoint)
    assert os.path.lexists(path)


def test_what_was_cut_off_is_not_of_another_run(folder, caplog):
    with pytest.raises(ValueError, match="--output_dir .* holds checkpoint-4 of another run"):
        check_begins_alone(str(folder), None)
    check_begins_alone(str(folder), str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match="--output_dir .* holds checkpoint-4 of another run"):
        check_begins_alone(str(folder), "elsewhere/checkpoint-2")
    for checkpoint in folder.iterdir():
        (checkpoint / CHECKSUMS).unlink()
        (checkpoint / "trainer_state.json").unlink()
    check_begins_alone(str(folder), None)
    assert caplog.text.count("is ignored: trainer_state.json is missing") == 2


def test_models_without_their_optimizer_are_not_taken_for_cut_off(folder):
    for checkpoint in folder.iterdir():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / name).unlink()
        checkpoints.write_checksums(checkpoint)
    with pytest.raises(
        ValueError, match="checkpoint-4 cannot be resumed: optimizer.pt is missing, as with --save_only_model"
    ):
        find_checkpoint("last", str(folder))
    with pytest.raises(ValueError, match="--output_dir .* holds checkpoint-4 of another run"):
        check_begins_alone(str(folder), None)


def test_the_last_is_that_of_the_most_steps_and_all_processes(folder):
    (folder / "checkpoint-4").rename(folder / "checkpoint-10")
    (folder / "checkpoint-best").mkdir()
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-10")
    for checkpoint in (folder / "checkpoint-10", folder / "checkpoint-2"):
        (checkpoint / CHECKSUMS).unlink()
        (checkpoint / RUN).write_text(json.dumps({**HERE, "processes": 2}))
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(folder / "checkpoint-2" / "rng_state_0.pth", folder / "checkpoint-2" / "rng_state_1.pth")
    assert damage_of(folder / "checkpoint-10") == "rng_state_1.pth is missing"
    assert find_checkpoint("last", str(folder), 1) == str(folder / "checkpoint-2")  # the run says how many it had


def test_a_checkpoint_is_written_into_an_empty_folder(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "rng_state_1.pth").write_text("of the run that was cut off")
    tiny_runs.trainer("leap", tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert damage_of(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-2" / "rng_state_1.pth").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {**SETTINGS, "--seed": 2}}, "--seed: 1 there, 2 here"),
        ({"settings": {"--seed": 2, "--block_size": 16}}, "--seed: 1 there, 2 here; --block_size: 32 there, 16 here"),
        ({"length": {"--train_tokens": 9}}, "its length: --max_steps 4 there, --train_tokens 9 here"),
        ({"processes": 2}, "was saved by 1 processes, and here are 2"),
        ({"sharded": True}, "was saved without --fsdp.*: resume it without --fsdp"),
    ],
)
def test_what_differs_is_named(change, message, folder):
    checkpoint = str(folder / "checkpoint-4")
    check_same_run(checkpoint, HERE, is_last=True)
    check_same_run(checkpoint, {**HERE, "length": {"--num_train_epochs": 3.0}}, is_last=True)  # the default
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*{message}"):
        check_same_run(checkpoint, {**HERE, **change}, is_last=True)
    if "processes" in change:
        check_same_run(checkpoint, {**HERE, **change}, is_last=False)


def test_epochs_are_compared_with_epochs(folder):
    checkpoint = folder / "checkpoint-4"
    (checkpoint / RUN).write_text(json.dumps({**HERE, "length": {"--num_train_epochs": 2.0}}))
    with pytest.raises(ValueError, match="its length: --num_train_epochs 2.0 there, --num_train_epochs 3.0 here"):
        check_same_run(str(checkpoint), {**HERE, "length": {"--num_train_epochs": 3.0}}, is_last=True)


def test_shards_are_recognised_without_a_word_of_the_run(folder, caplog):
    """Checkpoints of an older version, or of `Trainer` alone."""
    checkpoint = folder / "checkpoint-4"
    (checkpoint / RUN).unlink()
    check_same_run(str(checkpoint), HERE, is_last=True)
    assert "has no record of its settings" in caplog.text
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="was saved with --fsdp"):
        check_same_run(str(checkpoint), HERE, is_last=True)


def test_settings_are_what_decides_the_weights(tmp_path):
    """Each change of what is computed is a change of one entry, and what only watches changes nothing."""

    def settings(texts=None, **options):
        data = {name: options.pop(name) for name in ("block_size", "packing") if name in options}
        args = train.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
        data_args = train.DataArguments(**{"block_size": 32, "cache_dir": "none", **data})
        texts = texts or tiny_runs.texts()
        objective = train.objective_for(tiny_runs.config_of("leap"))(texts, data_args, tiny_runs.config_of("leap"))
        return settings_of(Corpus(texts, None, objective), None, data_args, args, examples_per_step=8)

    plain, texts = settings(), tiny_runs.texts()
    texts.train[1] += "x"
    changes = {
        "--dataset_name (SHA-256 of the training text)": {"texts": texts},
        "--block_size": {"block_size": 16},
        "--packing": {"packing": "isolated"},
        "--seed": {"seed": 1},
        "--learning_rate": {"learning_rate": 1e-3},
        "--lr_scheduler_type": {"lr_scheduler_type": "cosine"},
        "--warmup_steps": {"warmup_steps": 3},
        "--bf16": {"bf16": True},
        "--accelerator_config": {"accelerator_config": {"use_seedable_sampler": False}},
    }
    for name, change in changes.items():
        other = settings(**change)
        assert {key for key in plain if plain[key] != other[key]} == {name}
    assert settings(logging_steps=3, eval_strategy="steps", run_name="other", save_total_limit=2) == plain


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {scripts!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
import train
train.main()
"""


@pytest.mark.slow
def test_a_full_disk_during_the_first_checkpoint(tmp_path):
    """Weights fit, the optimizer does not: the same command starts again, with or without asking for the last checkpoint."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.format(scripts=str(SCRIPTS)))
    command = [*kills.arguments("leap", tmp_path, 1), "--cache_dir", "none", "--optim", "adamw_torch"]
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    run = lambda *words: subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True)
    for more in ((), ("--resume_from_checkpoint", "last")):
        process = run(script, *command)
        assert process.returncode not in (0, -signal.SIGXFSZ), process.stderr
        (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
        assert (checkpoint / "config.json").is_file() and damage_of(checkpoint) is not None
        process = run(SCRIPTS / "train.py", *command, *more)
        assert process.returncode == 0 and "is not a complete checkpoint" in process.stderr, process.stderr
        assert (tmp_path / "out" / "results.json").is_file()
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_forty_kills_at_random_moments(tmp_path):
    """Each run that was killed goes on by the same command, with the losses of the run that nobody disturbed."""
    found = kills.kill_often(tmp_path, number=40, seed=random.SystemRandom().randrange(2**32))
    assert len(found) == 40 and all(each["equal"] for each in found), [each for each in found if not each["equal"]]
    assert {each["family"] for each in found} == set(tiny_runs.FAMILIES)
    assert {each["processes"] for each in found} == {1, 2}
    assert sum(each["in_first_checkpoint"] for each in found) >= 5
