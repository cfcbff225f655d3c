"""Random calls of compiled code, valid and invalid, alone and under gcc's sanitizers: see the `fuzz_*.py` beside this file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_heptapod.heptapod import local_attention_cpu
from modeling_heptapod.leap import focus_cpu
from tests import fuzz_focus, fuzz_leap_step, fuzz_local_attention, fuzz_token_steps, fuzz_windowed_attention


FUZZERS = {
    "fuzz_focus": fuzz_focus,
    "fuzz_leap_step": fuzz_leap_step,
    "fuzz_local_attention": fuzz_local_attention,
    "fuzz_token_steps": fuzz_token_steps,
    "fuzz_windowed_attention": fuzz_windowed_attention,
}


@pytest.fixture(autouse=True)
def compiled():
    if focus_cpu._library(4) is None or local_attention_cpu._library() is None:
        pytest.skip("there is no C compiler")


@pytest.mark.parametrize("name", FUZZERS)
def test_a_few_random_calls(name):
    FUZZERS[name].fuzz(valid=60, invalid=200)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_thousands_of_random_calls(name):
    FUZZERS[name].fuzz(valid=2000, invalid=2000, seed=1000)


def sanitizers():
    """Paths of gcc's sanitizer runtimes, empty where they are not all there."""
    gcc = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(found):
            return []
        paths.append(found)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_random_calls_under_sanitizers(name, tmp_path):
    """Memory out of bounds and undefined behaviour end the process."""
    runtimes = sanitizers()
    if not runtimes:
        pytest.skip("the compiler has no sanitizer runtimes (libasan, libubsan)")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", f"tests.{name}", "--valid", "500", "--invalid", "1000", "--sanitize"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, errors="replace"
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "no finding" in run.stdout
