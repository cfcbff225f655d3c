"""Run all benchmarks, each in a process of its own, and write `results/<processor>/<name>.json` for each that passed its own check.

python tests/benchmarks/run_all.py [name ...] [--quick]

With `THP_MEM_ALLOC_ENABLE=1` in the environment, torch asks for huge pages and the files are
`results/<processor>/<name>_huge_pages.json`.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT)]

from provenance import commit, kind_of_processor, machine

from tests.benchmarks.tables import RESULTS


NAMES = (
    "focus_accuracy",
    "mixing_memory",
    "recurrent_equality",
    "decode_state",
    "training_step",
    "training_compiled",
    "focus_mixing",
    "decode_speed",
    "one_token",
    "windowed_attention",
    "profiles",
    "grid_attention",
    "adaptive_windows",
    "bench_grid_generation",
    "page_baselines",
    "hierarchical_equality",
    "hierarchical_decode",
    "hierarchical_step",
    "compression_report",
    "multigrid_equality",
    "multigrid_step",
    "two_processes",
    "training_start",
)


def script_of(name: str) -> Path:
    """The file of a benchmark, here or among the experiments, which train models for their figures."""
    here = HERE / f"{name}.py"
    return here if here.is_file() else ROOT / "training" / "experiments" / f"{name}.py"


def run(name: str, quick: bool) -> dict | None:
    """Run one benchmark, showing what it prints. Returns the JSON of its last line, `None` where it failed."""
    command = [sys.executable, str(script_of(name)), *(["--quick"] if quick else [])]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line
    return json.loads(last) if process.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to run, by default all of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is written")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown names {unknown}; there are {', '.join(NAMES)}")

    about = {"commit": commit(HERE) or "unknown", "device": machine()}  # before any result changes the tree
    about["versions"] = {"python": platform.python_version()}
    about["versions"].update({name: importlib.metadata.version(name) for name in ("torch", "transformers")})
    failed, missed = [], []
    for name in arguments.names or NAMES:
        print(f"\n== {name}", flush=True)
        result = run(name, arguments.quick)
        if result is None:
            failed.append(name)
            continue
        missed += [f"{name}: {check['what']}" for check in result["checks"] if not check["met"]]
        if not arguments.quick:
            date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            huge_pages = result["settings"]["THP_MEM_ALLOC_ENABLE"] == "1"
            command = "THP_MEM_ALLOC_ENABLE=1 " * huge_pages + f"python {script_of(name).relative_to(ROOT)}"
            full = {"name": name, "command": command, "date": date, **about, **result}
            path = RESULTS / kind_of_processor(full["device"]) / f"{name}{'_huge_pages' * huge_pages}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(full, indent=1) + "\n")
            print(f"written: {path}")
    if missed and not arguments.quick:
        print("\nTargets missed:", *missed, sep="\n  ")
    if failed:
        raise SystemExit(f"\nFailed, results left as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main()
