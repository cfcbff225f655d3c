"""Where the Triton kernels do not run: without Triton, and on CPUs. And where they do run without a GPU: interpreted."""

import subprocess
import sys

import pytest
import torch

from modeling_heptapod.leap import focus_triton
from tests.test_focus import settings_for
from tests.triton_checks import ROOT, run_in_the_interpreter


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
    """One process for the kernels of all families."""
    modules = "leap.focus_triton", "heptapod.local_attention_triton", "hierarchical_lm.windowed_attention_triton"
    code = ["import importlib, sys", "sys.modules['triton'] = None"]
    code += [f"assert importlib.import_module('modeling_heptapod.{name}').triton is None" for name in modules]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, cwd=ROOT)


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
    run_in_the_interpreter("tests/gpu/test_focus_triton.py", INTERPRETED[group])
