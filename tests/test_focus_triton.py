"""Where the Triton kernels do not run: without Triton, and on CPUs. And where they do run without a GPU: interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_heptapod import focus_triton
from tests.test_focus import settings_for


ROOT = Path(__file__).resolve().parents[1]


def test_tensors_on_cpus_are_left_alone():
    qfkv = torch.randn(1, 4, 4, 2, 8)
    assert not focus_triton.applies(qfkv, settings_for(4))
    assert focus_triton.step(qfkv[:, :1], settings_for(4), None, None, torch.zeros(1, 34, 3)) is None


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from modeling_heptapod import focus_triton as f; assert f.triton is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="`pip install --no-deps triton==3.6.0` has it run on CPUs")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu/test_focus_triton.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
