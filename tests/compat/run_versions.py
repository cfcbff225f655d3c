"""`make compat`: an environment for each version of Transformers, one suite in all of them, a table of what passed.

    python tests/compat/run_versions.py [--versions oldest 5.20.2 newest]

`oldest` is the first of the window, `newest` the newest on the package index. An environment lies in `.compat/<version>`, has the
torch of `constraints.txt` and, of everything else, what pip chooses, and is made once. Every version writes its folders first;
then each reads those of all.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from modeling_heptapod.common.transformers_versions import OLDEST


ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".compat"
MODELS = "tests/compat/models.py"
# The suite, and what else depends on the version.
TESTS = ["tests/compat/compat_suite.py", "tests/test_transformers_versions.py", "tests/test_unused_kwargs.py"]


def newest_on_the_index(printed: str) -> str:
    """The newest release in what `pip index versions transformers` prints."""
    found = re.match(r"transformers \((\d+(?:\.\d+)+)\)", printed)
    if not found:
        raise ValueError(f"pip names no newest version of transformers: {printed[:200]!r}.")
    return found.group(1)


def resolve(names: list[str]) -> list[str]:
    """Versions in the order given, each once."""
    resolved = []
    for name in names:
        if name == "oldest":
            name = f"{OLDEST[0]}.{OLDEST[1]}.0"
        elif name == "newest":
            name = newest_on_the_index(run([sys.executable, "-m", "pip", "index", "versions", "transformers"]))
        resolved.append(name)
    return list(dict.fromkeys(resolved))


def run(command, **kwargs) -> str:
    """What a command prints; raises with all of it where the command fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def torch_requirement() -> str:
    """The torch of `constraints.txt`: pip's own choice could bring gigabytes of CUDA."""
    return re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE).group()


def python_of(version: str) -> Path:
    """The interpreter of this version's environment, which is made where it is missing."""
    folder = ENVIRONMENTS / version
    python, is_whole = folder / "bin" / "python", folder / "installed"
    if not is_whole.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a stopped installation left
        venv.create(folder, with_pip=True)
        run([python, "-m", "pip", "install", torch_requirement()])
        run([python, "-m", "pip", "install", f"transformers=={version}", "accelerate", "peft", "pytest"])
        is_whole.touch()
    return python


def environment(home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that finds no package, keeps remote code in `home` and reaches for no Hub."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def counts_of(report: Path) -> dict[str, Counter]:
    """How many tests of each class passed and did not, from a JUnit file; those outside of a class go by their file."""
    counts = {}
    for case in ElementTree.parse(report).iter("testcase"):
        group = case.get("classname").split(".")[-1].removeprefix("Test").removeprefix("test_")
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts.setdefault(group, Counter())[result] += 1
    return counts


def table_of(results: dict[str, dict[str, Counter]]) -> str:
    """A row for each version: how many tests of a group passed, and how many of how many failed."""
    groups = list(dict.fromkeys(group for counts in results.values() for group in counts))
    rows = [["transformers", *groups]]
    for version, counts in results.items():
        cells = [counts.get(group, Counter()) for group in groups]
        rows.append(
            [version, *(f"{c['failed']} of {c.total()} FAILED" if c["failed"] else str(c["passed"]) for c in cells)]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["oldest", "newest"])
    started = time.time()
    versions = resolve(parser.parse_args().versions)
    pythons = {}
    for version in versions:
        print(f"{version}: environment", flush=True)
        pythons[version] = python_of(version)
    results = {}
    with tempfile.TemporaryDirectory(prefix="heptapod-compat-") as work:
        work = Path(work)
        folders = work / "folders"
        for version, python in pythons.items():
            print(f"{version}: writes its folders", flush=True)
            (folders / version).mkdir(parents=True)
            env = environment(work / "home", PYTHONPATH=str(ROOT))
            run([python, MODELS, "write", folders / version], cwd=ROOT, env=env)
        for version, python in pythons.items():
            print(f"{version}: reads all folders, then runs the suite", flush=True)
            said, report = work / f"said-{version}.pt", work / f"report-{version}.xml"
            env = environment(work / f"home-{version}", COMPAT_FOLDERS=str(folders), COMPAT_SAID=str(said))
            run([python, ROOT / MODELS, "read", folders, said], cwd=work, env=env)
            tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
            code = subprocess.run(list(map(str, tests)), cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}).returncode
            if code > 1 or not report.exists():
                raise SystemExit(f"{version}: pytest stopped with exit status {code}.")
            results[version] = counts_of(report)
    print(f"\n{table_of(results)}\n{time.time() - started:.0f} s")
    if any(count["failed"] for counts in results.values() for count in counts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
