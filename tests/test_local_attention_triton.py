"""Where the Triton kernels of local attention do not run: without Triton, and on CPUs. And what they do without a GPU.

They compile, and they run in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_heptapod.heptapod import local_attention_triton as kernels


ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = {  # tests of tests/gpu/test_local_attention_triton.py
    "loop": "values",
    "precision": "low_precision or extreme or repeated",
    "pads": "nothing or trace or hidden or larger",
    "layout": "layout",
}


def test_what_the_kernels_take(monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    q = torch.zeros(1, 2, 3, 4, 128)
    assert not kernels.takes(q, 1)  # on a CPU
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    assert kernels.takes(q, 0) and kernels.takes(q.bfloat16(), 32) and kernels.takes(q.half()[..., :1], 1)
    for other, radius in ((q, 33), (q.double(), 1), (q[:0], 1), (torch.zeros(1, 2, 3, 4, 129), 1)):
        assert not kernels.takes(other, radius)
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.takes(q, 1)


def test_the_package_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; "
        "from modeling_heptapod.heptapod import local_attention_triton as kernels; assert kernels.triton is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tiles_stay_below_wgmma():
    for dtype in kernels._DTYPES:
        for head_dim in range(1, kernels._MOST_DIM + 1):
            tall, wide, chunk, warps = kernels._tile(head_dim, dtype)
            assert tall * wide >= 16 and chunk >= 16
            assert tall * wide < 64 or warps < 4
            assert max(tall, wide) <= 8 and chunk <= 32  # of which the next test knows


def test_rows_of_a_halo_need_no_division():
    """The arithmetic of `_halo_cells`, for all halos."""
    for wide in range(1, 8 + 2 * kernels.WIDEST + 1):
        cell = torch.arange(wide * (8 + 2 * kernels.WIDEST) + 32)
        product = cell * ((1 << 19) // wide + 1)
        assert torch.equal(product >> 19, cell // wide) and product.max() < 2**31


@pytest.mark.skipif(kernels.triton is None, reason="there is no Triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted")
@pytest.mark.parametrize("dtype, head_dim, padded", [("bf16", 32, True), ("fp32", 20, False)])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"])
def test_the_kernels_compile_for_a_gpu(name, dtype, head_dim, padded, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    query = torch.empty(1, 1, 1, 1, head_dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    constants = kernels._constants(query)
    warps = constants.pop("num_warps")
    if not padded:
        constants["mask"] = None
    kernel = getattr(kernels, name)
    signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | {"mask": "*u8", "scale": "fp32"}
    signature |= dict.fromkeys(("heads", "height", "width", "radius", "dilation"), "i32")
    signature |= dict.fromkeys({"tops", "shares", "deltas"} & signature.keys(), "*fp32")
    signature |= dict.fromkeys([name for name in signature if name.endswith("strides")], ("i64",) * 4)
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): constants[key] for key in constants})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
    assert "mma.sync" in compiled.asm["ptx"] and "wgmma" not in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("group", INTERPRETED)
def test_the_kernels_in_the_interpreter(group):
    pytest.importorskip("triton", reason="`pip install --no-deps triton==3.6.0` has it run on CPUs")
    tests = ["tests/gpu/test_local_attention_triton.py", "-k", INTERPRETED[group]]
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "gpu", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
