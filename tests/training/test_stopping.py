"""Runs that end by the clock, by SIGTERM and by Ctrl-C, in one process and in two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train
from checkpoints import damage_of, read_run
from stopping import Ending
from transformers import TrainerCallback

from tests.training import kills, tiny_runs


SCRIPTS = Path(train.__file__).parent


class AfterStep(TrainerCallback):
    """Calls something after a step, before `Ending` looks."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


def steps_of(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_signal_ends_the_step_and_saves_it(number, strategy, tmp_path):
    ending = Ending()
    before = signal.getsignal(number)
    calls = [AfterStep(2, lambda: os.kill(os.getpid(), number)), ending]
    run = tiny_runs.trainer("leap", tmp_path, calls, save_strategy=strategy, save_steps=3, max_steps=9)
    with ending.signals():
        run.train()
    assert run.state.global_step == 2 and ending.signal == number and not ending.by_clock
    assert steps_of(tmp_path) == ([2] if strategy == "steps" else [])
    assert signal.getsignal(number) is before
    if strategy == "steps":
        assert damage_of(tmp_path / "checkpoint-2") is None


def test_what_was_ended_goes_on_with_the_same_losses(tmp_path):
    whole = tiny_runs.trainer("leap", tmp_path / "whole", max_steps=5)
    whole.train()
    ending = Ending()
    calls = [AfterStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), ending]
    ended = tiny_runs.trainer("leap", tmp_path, calls, save_strategy="steps", max_steps=5)
    with ending.signals():
        ended.train()
    again = tiny_runs.trainer("leap", tmp_path, [Ending()], save_strategy="steps", max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny_runs.losses(again) == tiny_runs.losses(whole)


def test_a_second_ctrl_c_does_not_wait():
    ending = Ending()
    with pytest.raises(KeyboardInterrupt), ending.signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after a Ctrl-C that all processes get
        os.kill(os.getpid(), signal.SIGINT)
    with Ending().signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_time_runs_out_with_all_that_is_not_a_step(tmp_path, monkeypatch):
    """Evaluations count, so do the runs before; the last step is saved, and resuming it trains no further."""
    clock = [100.0]
    monkeypatch.setattr("stopping.time.monotonic", lambda: clock[0])

    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            clock[0] += 30

    ending = Ending(seconds=100, used=25)
    clock[0] += 1000  # before training begins
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 7, "max_steps": 9}
    run = tiny_runs.trainer("leap", tmp_path, [Slow(), ending], **options)
    run.describe_run = lambda: {"settings": {}, "length": 9, "processes": 1, "seconds": ending.seconds_used}
    run.train()
    assert (run.state.global_step, ending.by_clock, ending.signal) == (4, True, None)
    assert steps_of(tmp_path) == [4]
    seconds = read_run(tmp_path / "checkpoint-4")["seconds"]
    assert seconds >= 100
    again = tiny_runs.trainer("leap", tmp_path, [Ending(100, seconds)], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4


def test_timing_a_slow_model_takes_a_part_of_the_time(tmp_path, monkeypatch):
    class SlowTrainer(train.ShardingTrainer):
        def training_step(self, *args, **kwargs):
            calls.append(1)
            time.sleep(0.1)
            return super().training_step(*args, **kwargs)

    calls = []
    run = tiny_runs.trainer("leap", tmp_path)
    monkeypatch.setattr(train, "ShardingTrainer", SlowTrainer)
    steps = train.steps_within(0.05, run.model, run.args, run.train_dataset)  # 3 seconds, a tenth of them for timing
    assert 1 <= len(calls) <= 3 and 1 <= steps <= 30


def test_processes_end_together(monkeypatch):
    """What one has seen all know: the largest of what they saw."""
    ending, args = Ending(seconds=1e9), type("Args", (), {"world_size": 2, "device": torch.device("cpu")})
    theirs = torch.tensor([signal.SIGTERM, 1])

    def all_reduce(tensor, kind):
        assert kind == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, theirs))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    ending.agree(args)
    assert ending.signal == signal.SIGTERM and ending.by_clock


ENDED = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import train

class Trainer(train.ShardingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2 and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getppid() if {parent} else os.getpid(), signal.{name})
        return super().training_step(*args, **kwargs)

train.ShardingTrainer = Trainer
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_and_goes_on(name, processes, tmp_path):
    """In two processes torchrun gets the signal, which ends its processes with SIGTERM."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED.format(scripts=str(SCRIPTS), name=name, parent=processes == 2))
    launcher = [sys.executable]
    if processes == 2:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    run = lambda *words: subprocess.run([*launcher, *map(str, words)], env=env, capture_output=True, text=True)
    whole = kills.arguments("leap", tmp_path / "whole", processes)
    process = run(SCRIPTS / "train.py", *whole)
    assert process.returncode == 0, process.stderr
    command = kills.arguments("leap", tmp_path, processes)
    process = run(script, *command, "--save_steps", "100")
    if processes == 1:
        assert process.returncode == 128 + getattr(signal, name), process.stderr
        assert f"ended by {name} after step 3 of {kills.STEPS}" in process.stdout
    else:
        assert process.returncode != 0
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert damage_of(checkpoint, processes) is None and not (tmp_path / "out" / "results.json").exists()
    process = run(SCRIPTS / "train.py", *command, "--save_steps", "100", "--resume_from_checkpoint", "last")
    assert process.returncode == 0, process.stderr
    assert kills.outcome(tmp_path) == kills.outcome(tmp_path / "whole")


@pytest.mark.slow
def test_minutes_are_those_of_the_clock(tmp_path):
    """Each evaluation takes longer than all the time there is."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r})\nimport train\n"
        "evaluate = train.ShardingTrainer.evaluation_loop\n"
        "def slow(*args, **kwargs):\n    time.sleep(4)\n    return evaluate(*args, **kwargs)\n"
        "train.ShardingTrainer.evaluation_loop = slow\ntrain.main()\n"
    )
    command = kills.arguments("leap", tmp_path, 1)
    place = command.index("--max_steps")
    command[place : place + 2] = ["--train_minutes", "0.05"]
    more = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "1000"]
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    process = subprocess.run([sys.executable, script, *command, *more], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "ended by the clock after step" in process.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert 2 <= results["steps"] <= 3 and results["train_seconds"] < 15
