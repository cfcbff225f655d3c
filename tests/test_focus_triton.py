"""Where the Triton kernels do not run: without Triton, and on CPUs. And where they do run without a GPU: interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_heptapod.leap import focus_triton
from tests.test_focus import settings_for


ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = {  # tests of tests/gpu/test_focus_triton.py
    "options": "options",
    "chunks": "lengths or widest or groups or split",
    "heads": "head_dims or precision or extreme or overflow or thousands",
    "tokens": "single_tokens or bounded or keeps_more",
    "rows": "packed or pads or state or contiguous or left_to_torch",
}


def test_tensors_on_cpus_are_left_alone():
    qfkv = torch.randn(1, 4, 4, 2, 8)
    assert not focus_triton.is_supported(qfkv, settings_for(4))
    assert focus_triton.step(qfkv[:, :1], settings_for(4), None, None, torch.zeros(1, 34, 3)) is None


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from modeling_heptapod.leap import focus_triton as f; assert f.triton is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.skipif(focus_triton.triton is None, reason="there is no Triton")
def test_tiles_hold_a_window_and_stay_below_wgmma():
    for dim in range(2, 257):
        for halo in (16, 32) if dim > 64 else (16, 32, 64):
            chunk, *warps = focus_triton._tile(dim, halo)
            assert chunk >= halo
            assert chunk < 64 or max(warps) < 4


@pytest.mark.slow
@pytest.mark.parametrize("group", INTERPRETED)
def test_the_kernels_in_the_interpreter(group):
    pytest.importorskip("triton", reason="`pip install --no-deps triton==3.6.0` has it run on CPUs")
    tests = ["tests/gpu/test_focus_triton.py", "-k", INTERPRETED[group]]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
