"""What tests of Triton kernels do without a GPU: compile them for one, and run the tests of a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_compiled_for_a_gpu(
    kernel, dtype: str, types: dict[str, str], constants: dict, multiplies: bool = True
) -> None:
    """An attention kernel compiles for sm_90, and multiplies by mma, not by wgmma.

    Args:
        kernel: a function of Triton; pointers whose type is not given are to `dtype`, and `*_strides` to four integers.
        dtype (`str`): "bf16" or "fp32".
        types (`dict`): of other arguments.
        constants (`dict`): by name, and `num_warps`.
        multiplies (`bool`): whether it has products of matrices.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    warps = constants.pop("num_warps")
    names = kernel.arg_names
    signature = dict.fromkeys(names, f"*{dtype}") | {key: kind for key, kind in types.items() if key in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(key),): constants[key] for key in constants})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
    assert ("mma.sync" in compiled.asm["ptx"]) == multiplies and "wgmma" not in compiled.asm["ptx"]


def run_in_the_interpreter(tests: str, group: str) -> None:
    """Run tests of a GPU whose names fit an expression on this CPU."""
    pytest.importorskip("triton", reason="`pip install --no-deps triton==3.6.0` has it run on CPUs")
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "gpu", tests, "-k", group]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
