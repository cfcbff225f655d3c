"""The benchmarks run, at sizes that measure nothing, and the README's tables are made from their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import run_all, tables


HERE = Path(__file__).resolve().parent

RESULT = {
    "title": "Speed",
    "command": "python speed.py",
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "device": {"cpu": "Some CPU", "cores": 2, "units": ["avx2"], "gpu": None},
    "versions": {"torch": "2.13.0"},
    "settings": {"threads": 2, "THP_MEM_ALLOC_ENABLE": "1"},
    "rows": [{"length": 1024, "ratio": 1.5}, {"length": 4096, "ratio": 2.25e-7, "extra": None}],
    "checks": [{"what": "ratio", "measured": 1.5, "target": ">= 1.3", "met": True}],
    "notes": ["A note."],
}


def test_results_that_are_kept_make_tables():
    results = tables.read_results()
    assert "training_step" in results
    for name, result in results.items():
        assert result["title"] and "|" in tables.render(result), name


def test_tables_fill_markers_and_nothing_else():
    text = "before\n<!-- bench:speed -->\nold\n<!-- /bench -->\nafter\n"
    filled = tables.fill(text, {"speed": RESULT})
    assert filled.startswith("before\n<!-- bench:speed -->\n| length | ratio | extra |\n| --- | --- | --- |\n")
    assert "| 1,024 | 1.50 | - |\n| 4,096 | 2.25e-07 | - |" in filled
    assert "| ratio >= 1.3 | 1.50 | yes |" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert tables.fill(filled, {"speed": RESULT}) == filled


def test_tables_name_what_has_no_results():
    with pytest.raises(KeyError, match="speed"):
        tables.fill("<!-- bench:speed -->\n<!-- /bench -->", {})


def test_every_benchmark_finds_what_it_imports():
    """As a script, with its own folder first on the path; the slow tests run them."""
    imports = "; ".join(f"import {name}" for name in run_all.NAMES)
    run = subprocess.run([sys.executable, "-c", imports], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_benchmark_is_in_run_all():
    scripts = {path.stem for path in HERE.glob("*.py")} - {
        "harness",
        "run_all",
        "tables",
        "test_benchmarks",
        "gpu_focus",
    }
    assert scripts == set(run_all.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", run_all.NAMES)
def test_runs_quickly(name):
    for peer in ("leap", "heptapod", "simple_hierarchical_transformer"):
        pytest.importorskip(peer, reason="the prototypes are not installed (extra `parity`)")
    command = [sys.executable, HERE / f"{name}.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["quick"]
    assert result["rows"]
    assert result["checks"]
