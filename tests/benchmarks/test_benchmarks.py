"""The benchmarks run, at sizes that measure nothing, and the docs' tables are made from their results."""

import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import run_all, tables
from tests.benchmarks.run_all import kind_of_processor


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
    for name, each in results.items():
        assert all(result["title"] and "|" in tables.render(result) for result in each), name
        assert [result["date"] for result in each] == sorted((result["date"] for result in each), reverse=True)
    for path in tables.RESULTS.glob("*/*.json"):
        assert kind_of_processor(json.loads(path.read_text(encoding="utf-8"))["device"]) == path.parent.name


def test_tables_fill_markers_and_nothing_else():
    text = "before\n<!-- bench:speed -->\nold\n<!-- /bench -->\nafter\n"
    filled = tables.fill(text, {"speed": [RESULT]})
    assert filled.startswith("before\n<!-- bench:speed -->\n| length | ratio | extra |\n| --- | --- | --- |\n")
    assert "| 1,024 | 1.50 | - |\n| 4,096 | 2.25e-07 | - |" in filled
    assert "| ratio >= 1.3 | 1.50 | yes |" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert tables.fill(filled, {"speed": [RESULT]}) == filled


def test_each_kind_of_processor_has_a_table():
    other = {**RESULT, "device": {**RESULT["device"], "cpu": "Another CPU"}}
    filled = tables.fill("<!-- bench:speed -->\n<!-- /bench -->", {"speed": [RESULT, other]})
    first, second = filled.split("On another kind of processor:")
    assert (
        "Some CPU" in first and "Another CPU" in second and first.count("| 1,024 |") == second.count("| 1,024 |") == 1
    )


def test_results_are_kept_by_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "run", lambda name, quick: {**RESULT, "settings": {"THP_MEM_ALLOC_ENABLE": "0"}})
    monkeypatch.setattr(run_all, "machine", lambda: RESULT["device"])
    monkeypatch.setattr(sys, "argv", ["run_all.py", "decode_state"])
    run_all.main()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["avx2/decode_state.json"]
    assert kind_of_processor({"units": ["avx2", "avx512f"]}) == "avx512f"
    assert kind_of_processor({"units": []}) == platform.machine().lower()


def test_tables_name_what_has_no_results():
    with pytest.raises(KeyError, match="speed"):
        tables.fill("<!-- bench:speed -->\n<!-- /bench -->", {})


def test_every_benchmark_finds_what_it_imports():
    """As a script, with its own folder first on the path; the slow tests run them."""
    folder = run_all.script_of("compression_report").parent
    imports = f"import sys; sys.path.append({str(folder)!r}); " + "; ".join(f"import {name}" for name in run_all.NAMES)
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
    assert scripts | {"compression_report"} == set(run_all.NAMES)


def test_holes_are_judged_by_what_is_written_in_them(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")  # that harness.py leaves this process as it is
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    bench = importlib.import_module("bench_grid_generation")
    monkeypatch.setattr(bench, "judged_bits", lambda judge, pages, processor: torch.zeros(len(pages)))
    processor = bench.models(quick=True)[1]
    blank = processor.blank_token_id
    pages = torch.full((2, 4, 12), blank)  # of which rows 1 and 2, columns 3 to 8 are masked
    pages[:, 1, 3:6], pages[1, 2, 3:8], pages[:, 3] = ord("a"), ord("b"), ord("c")
    filled = pages.clone()
    filled[0, 1, 3], filled[0, 1, 8], filled[1, 2, 3:8] = ord("b"), ord("x"), blank
    report = bench.harness.Report("", quick=True)
    hole = bench.Hole("hole", pages, torch.zeros(2), processor, None, report)
    hole.judge_filling("mine", lambda masked: (filled, 7))
    hole.judge_baselines()
    hole.compare("mine", "all 'a'", 0.5)
    (row, *others) = report.rows
    # Right 2 of 4 that were written and of 3 there were, then 3 of 3 and of 8.
    assert (row["how"], row["model calls"], row["masked cells"]) == ("mine", 7, 12)
    assert (row["precision"], row["recall"], row["F1"]) == pytest.approx((5 / 7, 5 / 11, 10 / 18), abs=1e-4)
    assert row["cells right with blanks"] == pytest.approx(17 / 24, abs=1e-4)
    # Residuals of 4 of 7 and 6 of 11 are 1 / 9 and -1 / 9.
    assert row["standard error"] == pytest.approx((2 / 1 * 2 / 81) ** 0.5 / 18, abs=1e-5)
    shares = [(each["how"], each["F1"], each["cells right with blanks"]) for each in others]
    assert shares == [
        ("all blanks", 0, pytest.approx(13 / 24, abs=1e-4)),
        ("all spaces", 0, 0),
        ("all 'a'", pytest.approx(12 / 35, abs=1e-4), 6 / 24),
    ]
    (ahead, bits) = report.checks
    assert ahead["what"] == "hole: mine ahead of all 'a' in F1, standard errors" and bits["measured"] == 0
    mine = [10 / 18 + (4 - 10 / 18 * 7) / 9, 10 / 18 + (6 - 10 / 18 * 11) / 9]
    peer = [12 / 35 + (6 - 12 / 35 * 15) / 17.5, 12 / 35 + (6 - 12 / 35 * 20) / 17.5]
    first, second = (a - b for a, b in zip(mine, peer))
    assert ahead["measured"] == pytest.approx((first + second) / abs(first - second), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", run_all.NAMES)
def test_runs_quickly(name):
    for peer in ("leap", "heptapod", "simple_hierarchical_transformer"):
        pytest.importorskip(peer, reason="the prototypes are not installed (extra `parity`)")
    command = [sys.executable, run_all.script_of(name), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["quick"]
    assert result["rows"]
    assert result["checks"]
