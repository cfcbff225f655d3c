"""How long does training/train.py take from its start until the first step is done?

On the source of the standard library, for each family's -tiny configuration: first with an empty cache, then again. Beside
it, what importing torch and transformers' Trainer alone takes in a process of its own, which nothing of ours can shorten.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness


ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("leap", "hierarchical_lm", "heptapod", "multigrid")
FIRST, AGAIN = 20.0, 5.0  # seconds


def run(*command: str) -> float:
    began = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    harness.require(done.returncode == 0, done.stderr[-2000:])
    return time.perf_counter() - began


def seconds_to_first_step(family: str, folder: Path, quick: bool) -> float:
    run(
        *(str(ROOT / "training" / "train.py"), "--config_name", str(ROOT / "configs" / f"{family}-tiny")),
        *("--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache"), "--max_steps", "1"),
        *("--dataset_name", json.__file__ if quick else "stdlib", "--max_validation_bytes", "1000"),
        *("--block_size", "64" if quick else "512", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
        *("--save_strategy", "no", "--use_cpu", "true"),
    )
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["seconds_to_first_step"]


def main():
    report, quick = harness.start(__doc__.splitlines()[0])
    rounds = 1 if quick else 3
    run("-c", "from transformers import Trainer")  # what is on disk is in memory from here on
    imports = statistics.median(run("-c", "from transformers import Trainer") for _ in range(rounds))
    for family in FAMILIES[:1] if quick else FAMILIES:
        first, again = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                first.append(seconds_to_first_step(family, Path(folder), quick))
                again.append(seconds_to_first_step(family, Path(folder), quick))
        first, again = statistics.median(first), statistics.median(again)
        report.row(family=family, first_time_s=first, again_s=again, imports_alone_s=imports)
        report.check(f"{family}, first time, seconds", first, "<=", FIRST)
        report.check(f"{family}, again, seconds", again, "<=", AGAIN)
    report.note(
        f"Medians of {rounds} rounds; until the end of the first optimizer step, from the start of the process."
    )
    report.finish()


if __name__ == "__main__":
    main()
