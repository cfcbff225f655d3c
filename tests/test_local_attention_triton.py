"""Where the Triton kernels of local attention do not run: without Triton, and on CPUs. And what they do without a GPU.

They compile, and they run in Triton's interpreter.
"""

import os

import pytest
import torch

from modeling_heptapod.common import triton_attention
from modeling_heptapod.heptapod import local_attention_triton as kernels
from tests.triton_checks import DTYPES, check_compiled_for_a_gpu, run_in_the_interpreter


INTERPRETED = {  # tests of tests/gpu/test_local_attention_triton.py
    "loop": "values",
    "precision": "low_precision or extreme or repeated",
    "pads": "nothing or trace or hidden or larger",
    "layout": "layout",
    "adapted": "adapted",
}


def test_what_the_kernels_take(monkeypatch):
    monkeypatch.setattr(triton_attention, "triton", object())
    q = torch.zeros(1, 2, 3, 4, 128)
    assert not kernels.takes(q, 1)  # on a CPU
    monkeypatch.setattr(triton_attention, "DEVICES", ("cpu",))
    assert kernels.takes(q, 0) and kernels.takes(q.bfloat16(), 32) and kernels.takes(q.half()[..., :1], 1)
    for other, radius in ((q, 33), (q.double(), 1), (q[:0], 1), (torch.zeros(1, 2, 3, 4, 129), 1)):
        assert not kernels.takes(other, radius)
    monkeypatch.setattr(triton_attention, "triton", None)
    assert not kernels.takes(q, 1)


def test_tiles_stay_below_wgmma():
    for dtype in triton_attention.DTYPES:
        for head_dim in range(1, triton_attention.MOST_DIM + 1):
            queries, chunk, warps = triton_attention.tile(head_dim, dtype)
            assert queries >= 16 and chunk >= 16
            assert queries < 64 or warps < 4
            assert queries <= 8 * kernels._WIDE and chunk <= 32  # of which the next test knows


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
@pytest.mark.parametrize("adapted", ["nothing", "span", "bias", "both"])
def test_the_kernels_compile_for_a_gpu(adapted, name, dtype, head_dim, padded, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = (
        getattr(kernels, name),
        kernels._constants(torch.empty(1, 1, 1, 1, head_dim, dtype=DTYPES[dtype])),
    )
    missing = ([] if padded else ["mask"]) + {
        "nothing": ["span", "bias", "grad_span"],
        "span": ["bias"],
        "bias": ["span", "grad_span"],
        "both": [],
    }[adapted]
    constants |= {name: None for name in missing if name in kernel.arg_names}
    check_compiled_for_a_gpu(kernel, dtype, types_of(kernel), constants)


def types_of(kernel):
    """Of the arguments of a kernel that are no pointers to cells."""
    floats = "tops shares deltas span bias grad_span parts".split()
    types = {"mask": "*u8", "sent": "*u8", "scale": "fp32", **dict.fromkeys(floats, "*fp32")}
    types |= dict.fromkeys(("heads", "height", "width", "radius", "dilation"), "i32")
    return types | dict.fromkeys([name for name in kernel.arg_names if name.endswith("strides")], ("i64",) * 4)


@pytest.mark.skipif(kernels.triton is None, reason="there is no Triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted")
@pytest.mark.parametrize("dtype, padded", [("bf16", True), ("fp32", False)])
def test_the_kernel_of_biases_compiles_for_a_gpu(dtype, padded, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"D": 20, "DP": 32, "CELLS": kernels._BIAS_CELLS, "num_warps": 4}
    missing = [] if padded else ["mask", "span"]
    constants |= dict.fromkeys(missing)
    kernel = kernels.backward_bias_kernel
    check_compiled_for_a_gpu(kernel, dtype, types_of(kernel), constants, multiplies=False)


@pytest.mark.slow
@pytest.mark.parametrize("group", INTERPRETED)
def test_the_kernels_in_the_interpreter(group):
    run_in_the_interpreter("tests/gpu/test_local_attention_triton.py", INTERPRETED[group])
