"""tests/run_mutants.py on a project of one module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_mutants import Mutation, choose, read_table, why_stale


RUNNER = Path(__file__).with_name("run_mutants.py")

MODULE = """
def double(x):
    return 2 * x


def count(n):
    while n > 0:
        n -= 1
    return n
"""
TESTS = """
import os
import subprocess
import sys
from pathlib import Path

import pytest
from arithmetic import count, double


@pytest.mark.parametrize("x", [0, 3])
def test_double(x):
    assert double(x) == x + x


def test_double_of_nothing():
    assert double(0) == 0


def test_count():
    assert count(3) == 0


@pytest.mark.slow
def test_slowly():
    assert double(1) == 2


def test_elsewhere():
    pytest.skip("not here")


def test_broken():
    assert False


def test_in_a_process_of_its_own():
    code = "import arithmetic, given; assert arithmetic.double(given.number) == 10"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_compiled():
    library = Path(os.environ["XDG_CACHE_HOME"], "heptapod", "double.so")
    if library.exists():
        assert double(0) == 0
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()
"""
DEFECTS = {
    "caught": ("2 * x", "3 * x", "test_double[3]"),
    "caught by one of them": ("2 * x", "3 * x", "test_double"),
    "caught by a slow test": ("2 * x", "3 * x", "test_slowly"),
    "caught with what was compiled": ("2 * x", "2 * x + 1", "test_compiled"),
    "not imported": ("def double", "undefined\n\n\ndef double", "test_double"),
    "caught in another process": ("2 * x", "3 * x", "test_in_a_process_of_its_own"),
    "unnoticed": ("2 * x", "3 * x", "test_double[0]"),
    "known": ("2 * x", "x * 2", "test_double"),
    "twice": (" n ", " m ", "test_count"),
    "gone": ("4 * x", "3 * x", "test_double"),
    "no Python": ("2 * x", "2 *", "test_double"),
    "no test": ("2 * x", "3 * x", "test_treble"),
    "broken": ("2 * x", "3 * x", "test_broken"),
    "not here": ("2 * x", "3 * x", "test_elsewhere"),
}
ENDLESS = ("n -= 1", "n += 1", "test_count")
OUTCOMES = {
    "caught": "caught",
    "caught by one of them": "caught",
    "caught by a slow test": "caught",
    "caught with what was compiled": "caught",
    "caught in another process": "caught",
    "not imported": "caught",
    "unnoticed": "survived",
    "known": "known to survive",
    "not here": "skipped",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "tests").mkdir()
    (folder / "given").mkdir()
    (folder / "given" / "given.py").write_text("number = 5\n")
    (folder / "arithmetic.py").write_text(MODULE)
    (folder / "tests" / "test_arithmetic.py").write_text(TESTS)
    options = "pythonpath = ['.']\naddopts = '-m \"not slow\"'\nmarkers = ['slow']\n"
    (folder / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{options}")
    _write_table(folder / "tests" / "mutations.toml", DEFECTS)
    _write_table(folder / "tests" / "endless.toml", {"endless": ENDLESS})
    return folder


def _write_table(path, defects):
    table = ""
    for what, (old, new, test) in defects.items():
        table += f"[[mutation]]\nfile = 'arithmetic.py'\nwhat = '{what}'\nold = '''{old}'''\nnew = '''{new}'''\n"
        table += f"test = 'tests/test_arithmetic.py::{test}'\n"
        table += "survives = 'multiplication commutes'\n" if what == "known" else ""
    path.write_text(table)


def _run(project, *options):
    command = [sys.executable, str(RUNNER), "--root", str(project), "--libraries", "", "-n", "2"]
    environment = {**os.environ, "PYTHONPATH": str(project / "given")}  # which processes of tests see, too
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, env=environment)
    lines = [line.split(": ") for line in result.stdout.splitlines() if ": arithmetic.py: " in line]
    outcomes = {line[2].split(" (")[0]: line[0].split("] ")[1] for line in lines}
    return result, outcomes


def test_each_outcome_is_told_apart(project):
    result, outcomes = _run(project)
    assert outcomes == {what: OUTCOMES.get(what, "stale") for what in DEFECTS}, result.stdout + result.stderr
    assert result.returncode == 1
    assert "6 of 7 caught (85.7%)" in result.stdout
    assert (project / "arithmetic.py").read_text() == MODULE


def test_what_does_not_end_is_told_apart(project):
    result, outcomes = _run(project, "--table", str(project / "tests" / "endless.toml"), "--timeout", "2")
    assert outcomes == {"endless": "timed out"} and result.returncode == 0
    assert "1 of 1 caught (100.0%)" in result.stdout


def test_the_status_says_whether_all_were_caught(project):
    result, outcomes = _run(project, "caught by", "known", "not here")
    assert set(outcomes.values()) == {"caught", "known to survive", "skipped"}
    assert result.returncode == 0
    assert _run(project, "gone")[0].returncode == 1


def test_checking_runs_nothing(project):
    result, outcomes = _run(project, "--check")
    assert set(outcomes) == {"twice", "gone", "no Python"}
    assert result.returncode == 1


def test_what_an_invocation_asks_for():
    mutations = [Mutation(f"{i % 3}.py", f"defect {i}", "a", "b", "test.py::test") for i in range(30)]
    assert choose(mutations) == mutations
    assert choose(mutations, ["1.py"]) == mutations[1::3]
    shards = [mutation for i in (1, 2, 3, 4) for mutation in choose(mutations, shard=(i, 4))]
    assert sorted(shards, key=mutations.index) == mutations
    drawn = choose(mutations, sample=5, seed=1)
    assert len(drawn) == 5 and drawn == choose(mutations, sample=5, seed=1) != choose(mutations, sample=5, seed=2)


def test_entries_that_are_not_complete_are_named(tmp_path):
    table = tmp_path / "mutations.toml"
    table.write_text("[[mutation]]\nfile = 'a.py'\nwhat = 'b'\nold = 'c'\nnew = 'd'\ntests = 'e'\n")
    with pytest.raises(ValueError, match=r"missing \['test'\], unknown \['tests'\]"):
        read_table(table)


def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in why_stale(Mutation("a.py", "b", "c", "d", "e"), tmp_path)
