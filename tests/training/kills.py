"""Runs of train.py that are killed at random moments and go on: do they end as the run that nobody disturbed?

    python tests/training/kills.py FOLDER --number 40 --seed 0

prints one JSON line with what became of each. All runs are forks of one process that has imported everything, so that a kill
and what goes on from it take seconds; two processes are two forks, in the places that torchrun would give them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

from tests.training import tiny_runs


STEPS, SAVE_STEPS = 6, 2
CASES = [(family, processes) for family in tiny_runs.FAMILIES for processes in (1, 2)]


def arguments(family, folder, processes):
    """Of a run in `folder / "out"`."""
    (folder / "config").mkdir(parents=True, exist_ok=True)
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
        *("--per_device_train_batch_size", str(4 // processes), "--max_validation_bytes", "300"),
        *("--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--report_to", "none"),
        *("--disable_tqdm", "true", "--use_cpu", "true"),
    ]


def start(command, processes, log):
    """The ids of the processes of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(command, processes, rank, port, log) for rank in range(processes)]


def _fork(command, processes, rank, port, log):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        import train

        sys.argv = ["train.py", *command]
        train.main()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(children, deadline):
    """Exit codes of all; `None` for those that had to be killed, since another one failed or time was over."""
    codes, left = [None] * len(children), set(range(len(children)))
    while left:
        for place in sorted(left):
            child, status = os.waitpid(children[place], os.WNOHANG)
            if child:
                codes[place] = os.waitstatus_to_exitcode(status)
                left.discard(place)
        if left and (time.monotonic() > deadline or any(code for code in codes)):
            kill([children[place] for place in left])
            return codes
        time.sleep(0.005)
    return codes


def kill(children, number=signal.SIGKILL):
    for child in children:
        os.kill(child, number)
    if number == signal.SIGKILL:
        for child in children:
            os.waitpid(child, 0)


def outcome(folder):
    """Losses of all steps, and what the model costs in the end."""
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    return losses, json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["bits_per_byte"]


def whole_run(folder, family, processes):
    """What a run that nobody disturbs comes to, how long it takes, and how long its first checkpoint does."""
    command, began = arguments(family, folder, processes), time.monotonic()
    children = start(command, processes, folder / "log")
    first = folder / "out" / f"checkpoint-{SAVE_STEPS}"
    while not first.is_dir():
        time.sleep(0.001)
    opened = time.monotonic()
    while not (first / "checksums.json").is_file():
        time.sleep(0.001)
    writing = time.monotonic() - opened
    codes = finish(children, time.monotonic() + 300)
    assert codes == [0] * processes, (folder / "log").read_text(encoding="utf-8")
    return outcome(folder), time.monotonic() - began, writing


def killed_run(folder, family, processes, expected, seconds, writing, draw):
    """Kill a run and let it go on; what became of it, `None` where it had ended. A third is killed in the first checkpoint."""
    from checkpoints import checkpoints_in, damage_of

    command, first = arguments(family, folder, processes), folder / "out" / f"checkpoint-{SAVE_STEPS}"
    in_first = draw.random() < 1 / 3
    children, began = start(command, processes, folder / "log"), time.monotonic()
    if in_first:
        while not first.is_dir():
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, writing))
    else:
        time.sleep(draw.uniform(0, seconds))
    moment = time.monotonic() - began
    kill(draw.sample(children, processes))
    if (folder / "out" / "results.json").is_file():
        return None
    whole = [path.name for path in checkpoints_in(folder / "out") if damage_of(path, processes) is None]
    was_cut_off = first.is_dir() and damage_of(first, processes) is not None
    # Without a whole checkpoint the command alone starts again, too.
    more = [] if not whole and draw.random() < 0.5 else ["--resume_from_checkpoint", "last"]
    codes = finish(start([*command, *more], processes, folder / "log"), time.monotonic() + 300)
    is_equal = codes == [0] * processes and outcome(folder) == expected
    return {
        "family": family,
        "processes": processes,
        "killed_after_seconds": round(moment, 2),
        "in_first_checkpoint": was_cut_off,
        "went_on_from": whole[0] if whole else None,
        "equal": is_equal,
        **({} if is_equal else {"codes": codes, "log": (folder / "log").read_text(encoding="utf-8")[-3000:]}),
    }


def kill_often(folder: Path, number: int, seed: int) -> list[dict]:
    """What became of so many runs, by a process of its own."""
    command = [sys.executable, __file__, str(folder), "--number", str(number), "--seed", str(seed)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, (seed, process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch
    import train  # noqa: F401  so that the forks need not

    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(args.folder / "cache")  # which a killed run has part of
    draw, found = random.Random(args.seed), []
    whole = {case: whole_run(args.folder / "-".join(map(str, case)), *case) for case in CASES}
    while len(found) < args.number:
        case, folder = CASES[len(found) % len(CASES)], args.folder / "killed"
        killed = killed_run(folder, *case, *whole[case], draw)
        shutil.rmtree(folder)
        if killed is not None:
            found.append(killed)
            print(json.dumps(killed), file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
