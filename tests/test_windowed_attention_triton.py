"""The Triton kernels of windowed attention without a GPU: what they take, that they compile, and their tests in the interpreter."""

import os

import pytest
import torch

from modeling_heptapod.common import triton_attention
from modeling_heptapod.hierarchical_lm import windowed_attention_triton as kernels
from tests.triton_checks import DTYPES, check_compiled_for_a_gpu, run_in_the_interpreter


INTERPRETED = {  # tests of tests/gpu/test_windowed_attention_triton.py
    "values": "values",
    "others": "precision or packed or nothing or layout or extreme or repeated",
}


def test_what_the_kernels_take(monkeypatch):
    monkeypatch.setattr(triton_attention, "triton", object())
    q = torch.zeros(1, 3, 2, 128)
    assert not kernels.takes(q, 1)  # on a CPU
    monkeypatch.setattr(triton_attention, "DEVICES", ("cpu",))
    assert kernels.takes(q, 1) and kernels.takes(q.bfloat16(), 1024) and kernels.takes(q.half()[..., :1], 1)
    for other, span in ((q, 1025), (q.double(), 1), (q[:0], 1), (torch.zeros(1, 3, 2, 129), 1)):
        assert not kernels.takes(other, span)


@pytest.mark.skipif(kernels.triton is None, reason="there is no Triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted")
@pytest.mark.parametrize("dtype, head_dim", [("bf16", 64), ("fp32", 20)])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"])
def test_the_kernels_compile_for_a_gpu(name, dtype, head_dim, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = kernels._constants(torch.empty(1, 1, 1, head_dim, dtype=DTYPES[dtype]))
    kernel = getattr(kernels, name)
    types = {"reach": "*i32", "scale": "fp32", **dict.fromkeys(("tops", "shares", "deltas"), "*fp32")}
    types |= dict.fromkeys(("heads", "length", "reach_batch", "span", "dilation"), "i32")
    types |= dict.fromkeys([name for name in kernel.arg_names if name.endswith("strides")], ("i64",) * 3)
    check_compiled_for_a_gpu(kernel, dtype, types, constants)


@pytest.mark.slow
@pytest.mark.parametrize("group", INTERPRETED)
def test_the_kernels_in_the_interpreter(group):
    run_in_the_interpreter("tests/gpu/test_windowed_attention_triton.py", INTERPRETED[group])
