"""What do two processes gain, with whole copies (DDP) and with sharded weights (FSDP2), and do they learn the same?

`training/train.py` on the same global batches of the standard library's source: one process, two under torchrun, and two
with --fsdp, on CPUs, connected by gloo. One thread each. Seconds are those of training, without the first step's start.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness


ROOT = Path(__file__).resolve().parents[2]
WAYS = {
    "one process": (1, ()),
    "two, DDP": (2, ()),
    "two, FSDP2": (2, ("--fsdp", "--fsdp_config", str(ROOT / "training" / "fsdp2.json"))),
}
WRAPPERS = {"one process": "", "two, DDP": "DistributedDataParallel", "two, FSDP2": "FSDP"}
FAMILIES = ("leap", "hierarchical_lm", "heptapod", "multigrid")
BATCH = 8  # examples a step, in all processes


def train(family: str, way: str, steps: int, quick: bool, folder: Path) -> tuple[dict, list[float]]:
    """Runs train.py. Returns its results and the losses of its steps."""
    processes, options = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    command = [
        *(sys.executable, *launcher, str(ROOT / "training" / "train.py"), *options),
        *("--config_name", str(ROOT / "configs" / f"{family}-tiny"), "--output_dir", str(folder / "out")),
        *("--block_size", "64" if quick else "256", "--per_device_train_batch_size", str(BATCH // processes)),
        *(
            "--dataset_name",
            json.__file__ if quick else "stdlib",
            "--max_validation_bytes",
            "1000",
            "--use_cpu",
            "true",
        ),
        *("--max_steps", str(steps), "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"),
        *("--learning_rate", "1e-3", "--cache_dir", str(folder / "cache")),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    harness.require(done.returncode == 0, f"{family}, {way}: {done.stderr[-2000:]}")
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return results, [entry["loss"] for entry in history if "loss" in entry]


def main():
    report, quick = harness.start(__doc__.splitlines()[0])
    steps = 3 if quick else 60
    for family in FAMILIES:
        losses, speed = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                results, losses[way] = train(family, way, steps, quick, Path(folder))
                harness.require(results["wrapper"].startswith(WRAPPERS[way]), f"{way} is {results['wrapper']}")
                speed[way] = results["tokens_per_second"]
        alone = losses["one process"]
        for way in WAYS:
            apart = max(abs(a - b) for a, b in zip(alone, losses[way]))
            report.row(
                family=family,
                how=way,
                tokens_per_second=round(speed[way]),
                over_one_process=speed[way] / speed["one process"],
                first_loss=losses[way][0],
                last_loss=losses[way][-1],
                largest_difference_from_one_process=apart,
            )
            if way != "one process" and family != "heptapod":
                report.check(f"{family}, {way}: largest difference of a loss", apart, "<=", 1e-3)
    report.note(
        f"{steps} steps of {BATCH} examples of the -tiny configurations, float32, one thread a process; tokens per second "
        "are those of the steps after the first."
    )
    report.note(
        "The grid draws other masks in other processes, so that its losses differ; with the same masks they are the same, "
        "which tests/training/test_distributed.py shows."
    )
    report.finish()


if __name__ == "__main__":
    main()
