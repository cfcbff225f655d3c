"""Two processes are one: the same losses on the same global batch, and after a kill -9; on CPUs, with gloo."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import train

from tests.training import tiny_runs


SCRIPTS = Path(train.__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS, SAVE_STEPS = 8, 2

# Runs train.py; the last process dies in the middle of a step without any chance to clean up, and the others with it.
KILLED = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import train

class Trainer(train.ShardingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == {step} - 1 and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

train.ShardingTrainer = Trainer
train.main()
"""


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=3600)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What `tiny_runs.py` found in two processes, for each way and family."""
    folder = tmp_path_factory.mktemp("two")
    process = run(*TORCHRUN, tiny_runs.__file__, folder / "losses.json", "ddp", "fsdp", cwd=folder)
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "losses.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    found = {}
    for family in tiny_runs.FAMILIES:
        with tiny_runs.masks_of_pages():
            alone = tiny_runs.trainer(family, tmp_path_factory.mktemp(family))
            alone.train()
        found[family] = tiny_runs.losses(alone)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
@pytest.mark.parametrize(("way", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPModule")])
def test_two_processes_have_the_losses_of_one(family, way, wrapper, two_processes, one_process):
    found = two_processes[f"{way} {family}"]
    assert wrapper in found["wrapper"][:2]
    layers = [name for name in found["sharded"] if name.endswith("Layer")]
    assert len(layers) == (2 if way == "fsdp" else 0)  # each on its own, not the model as a whole
    assert len(found["losses"]) == len(one_process[family]) == 4
    for step, expected in one_process[family].items():
        assert found["losses"][str(step)] == pytest.approx(expected, rel=2e-6)


def arguments(family, folder, processes, *more):
    (folder / "config").mkdir(exist_ok=True)
    config = {"model_type": family, "vocab_size": 258, **tiny_runs.CONFIGS[family]}
    if family != "hierarchical_lm":
        config["hidden_dropout"] = 0.1  # a resumed run must draw the same numbers
    (folder / "config" / "config.json").write_text(json.dumps(config))
    return [
        *(
            "--config_name",
            str(folder / "config"),
            "--output_dir",
            str(folder / "out"),
            "--dataset_name",
            json.__file__,
        ),
        *("--block_size", "32", "--axes", "token_kind", "bracket", "--learning_rate", "1e-2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", str(4 // processes), "--gradient_accumulation_steps", "2"),
        *("--max_validation_bytes", "500", "--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS)),
        *("--disable_tqdm", "true", "--use_cpu", "true", *more),
    ]


def losses(folder):
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


CASES = [
    *((family, 1, ()) for family in tiny_runs.FAMILIES if family != "leap"),  # which test_train.py does
    *((family, 2, ()) for family in tiny_runs.FAMILIES),
    *((family, 2, ("--fsdp", "--fsdp_config", tiny_runs.FSDP)) for family in tiny_runs.FAMILIES),
    ("leap", 1, ("--streaming", "true")),
    ("leap", 2, ("--streaming", "true")),
]


def name_of(case):
    family, processes, options = case
    return "-".join([family, str(processes), *(option[2:] for option in options[:1])])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_killed_at_any_step_resumes_with_the_same_losses(case, tmp_path):
    """Data order, random numbers, optimizer and schedule are those of a run that nobody disturbed."""
    family, processes, options = case
    launcher = TORCHRUN if processes == 2 else (sys.executable,)
    if "--streaming" in options:
        lines = (Path(json.__file__).parent / "decoder.py").read_text(encoding="utf-8")
        (tmp_path / "corpus").mkdir()
        for number in range(40):
            (tmp_path / "corpus" / f"{number}.py").write_text(lines[number * 200 :])
        options = (*options, "--dataset_name", str(tmp_path / "corpus"), "--validation_split_percentage", "20")
    killed_in = random.SystemRandom().randint(SAVE_STEPS + 1, STEPS)
    folders = {}
    for name in ("whole", "killed"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
    process = run(
        *launcher, SCRIPTS / "train.py", *arguments(family, folders["whole"], processes, *options), cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((folders["whole"] / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["processes"] == processes
    if processes == 2:
        assert results["wrapper"].startswith("FSDP" if "--fsdp" in options else "DistributedDataParallel")

    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(scripts=str(SCRIPTS), step=killed_in))
    command = arguments(family, folders["killed"], processes, *options)
    process = run(*launcher, script, *command, cwd=tmp_path)
    assert process.returncode != 0 and (processes == 2 or process.returncode == -signal.SIGKILL), process.stderr
    assert not (folders["killed"] / "out" / "results.json").exists()
    process = run(*launcher, SCRIPTS / "train.py", *command, "--resume_from_checkpoint", "last", cwd=tmp_path)
    assert process.returncode == 0, (killed_in, process.stderr)
    # The last checkpoint before the kill, or the one before it where the kill came while it was written.
    done = STEPS - process.stdout.count("{'loss'")
    assert done in (
        (killed_in - 1) // SAVE_STEPS * SAVE_STEPS,
        (killed_in - 1) // SAVE_STEPS * SAVE_STEPS - SAVE_STEPS,
    )

    expected, resumed = losses(folders["whole"]), losses(folders["killed"])
    assert list(expected) == list(range(1, STEPS + 1)) and len(set(expected.values())) == STEPS
    assert resumed == expected, killed_in
    bits = [
        json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["bits_per_byte"]
        for folder in folders.values()
    ]
    assert bits[0] == bits[1]


@pytest.mark.slow
@pytest.mark.parametrize("was_sharded", [False, True])
def test_shards_and_whole_weights_are_not_resumed_as_the_other(was_sharded, tmp_path):
    """What was saved with --fsdp goes on with it, and the other way round; else an error says so before anything is trained."""
    fsdp = ("--fsdp", "--fsdp_config", tiny_runs.FSDP)
    command = arguments("leap", tmp_path, 2)
    saved, resumed = (fsdp, ()) if was_sharded else ((), fsdp)
    process = run(*TORCHRUN, SCRIPTS / "train.py", *command, *saved, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    again = (*command, "--resume_from_checkpoint", "last")
    process = run(*TORCHRUN, SCRIPTS / "train.py", *again, *resumed, cwd=tmp_path)
    way = "with" if was_sharded else "without"
    assert process.returncode != 0 and "{'loss'" not in process.stdout
    assert f"was saved {way} --fsdp, which lays weights and optimizer out in another way" in process.stderr
    process = run(sys.executable, SCRIPTS / "train.py", *arguments("leap", tmp_path, 1), *again[-2:], cwd=tmp_path)
    message = "was saved with --fsdp" if was_sharded else "was saved by 2 processes, and here are 1"
    assert process.returncode != 0 and message in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_a_folder_saved_from_shards_is_whole(family, tmp_path):
    """It loads without this package and costs the held-out text what the run said; so do samples and the best model."""
    more = ("--fsdp", "--fsdp_config", tiny_runs.FSDP, "--eval_strategy", "steps", "--eval_steps", "2")
    more = (*more, "--load_best_model_at_end", "true", "--save_total_limit", "1")
    process = run(*TORCHRUN, SCRIPTS / "train.py", *arguments(family, tmp_path, 2, *more), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("--- a sample at step") >= 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert f"modeling_{family}.py" in names and not any(name.startswith("_fsdp") for name in names)
    auto = "AutoModelForMaskedLM" if family == "heptapod" else "AutoModelForCausalLM"
    code = (
        "import sys, torch; sys.modules['modeling_heptapod'] = None\n"
        f"from transformers import {auto}\n"
        f"model, info = {auto}.from_pretrained('out', trust_remote_code=True, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "assert all(p.isfinite().all() and p.dim() < 2 or p.std() > 0 for p in model.parameters())\n"
        "print(type(model).__name__)"
    )
    process = run(sys.executable, "-c", code, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert not process.stdout.startswith("FSDP")


@pytest.mark.slow
@pytest.mark.parametrize(
    "length", [("--train_minutes", "0.02"), ("--train_tokens", "257")], ids=lambda length: length[0]
)
def test_the_length_of_a_run_is_that_of_all_processes(length, tmp_path):
    command = arguments("leap", tmp_path, 2)
    place = command.index("--max_steps")
    command[place : place + 2] = length
    process = run(*TORCHRUN, SCRIPTS / "train.py", *command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["wrapper"] == "DistributedDataParallel" and results["tokens_per_step"] == 2 * 2 * 2 * 32
    assert results["steps"] == 2 or ("--train_minutes" in length and results["steps"] >= 1)


@pytest.mark.slow
def test_the_docs_train_in_two_processes_as_printed(tmp_path):
    page = (SCRIPTS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("torchrun --standalone")]
    assert len(commands) == 2
    for command, wrapper in zip(commands, ("DistributedDataParallel", "FSDPLeapForCausalLM")):
        outputs = str(tmp_path / "outputs")
        words = command.replace("outputs/", f"{outputs}/").split()
        process = run(*TORCHRUN[:3], *words[1:], cwd=SCRIPTS.parent)
        assert process.returncode == 0, process.stderr
        folder = Path(words[words.index("--output_dir") + 1])
        assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["wrapper"] == wrapper
