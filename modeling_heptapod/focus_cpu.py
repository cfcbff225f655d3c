"""The mixing step and its recurrent form on CPUs: compiles the C source once a machine, and calls it.

A C compiler (`$CC`, `cc`, `gcc` or `clang`) is wanted but not needed: without one, or with the environment variable
`HEPTAPOD_NATIVE=0`, everything runs in torch, and more slowly. The library is kept under `$XDG_CACHE_HOME/heptapod`
(`~/.cache/heptapod`), one for each source, compiler and kind of CPU.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

import torch
from transformers.utils import logging

from .focus_cpu_source import SOURCE


logger = logging.get_logger(__name__)

_BLOCK, _WIDEST = 128, 64  # of the source
_MOST_DIM = 1024  # a head's rows must fit on a thread's stack
_FLAGS = "-O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -ffp-contract=fast -shared -fPIC -pthread".split()
_GATES = {"none": 0, "sigmoid": 1, "gelu": 2}
_PARALLEL = 512  # rows of heads below which a second thread costs more than it saves
_INTEGERS = "batch seq heads parts window past kept bf16 normalize elu gate bounded rotary_stride threads".split()
_POINTERS = (
    "input out decay cos sin mask segments past_logs past_values final_logs final_values carries grad_out grad_in state"
).split()


class _Mixing(ctypes.Structure):
    """`Mixing` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        ("null_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("next", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    ]


@cache
def _library(head_dim):
    """The source compiled for one size of heads, `None` where there is no way to have it."""
    if os.environ.get("HEPTAPOD_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or os.name != "posix":
        logger.warning_once("No C compiler was found: LEAP's mixing runs in torch, which is slower.")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler, head_dim)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning_once(f"LEAP's mixing runs in torch, which is slower: its C source was not compiled ({reason}).")
        return None
    for name in ("focus_forward", "focus_backward", "focus_step"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Mixing)]
    return library


def _compiled(compiler, head_dim):
    """Path of the library, compiled now unless it was before."""
    flags = [*_FLAGS, f"-DHEAD_DIM={head_dim}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    about = "\n".join((SOURCE, *flags, version, _cpu()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heptapod"
    path = folder / f"focus_{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, built = Path(scratch, "focus.c"), Path(scratch, "focus.so")
        source.write_text(SOURCE, encoding="utf-8")
        command = [compiler, *flags, *_tuning(), str(source), "-o", str(built), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(built, path)  # whole or not at all, whoever else is compiling
    return path


def _tuning():
    """Flags for this very CPU."""
    if platform.machine() in ("x86_64", "AMD64"):
        wide = ["-mprefer-vector-width=512"] if "avx512f" in _cpu() else []
        return ["-march=native", *wide]
    return ["-mcpu=native"]


@cache
def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def applies(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the compiled source can take this mixing step: causal, on a CPU, float32 or bfloat16, windows up to 64."""
    return (
        type(qfkv) in (torch.Tensor, torch.nn.Parameter)  # not one of tracing, which has no memory
        and qfkv.device.type == "cpu"
        and qfkv.dtype in (torch.float32, torch.bfloat16)
        and settings.causal
        and (settings.window is None or settings.window <= _WIDEST)
        and 1 < qfkv.shape[-1] <= _MOST_DIM
        and (rotary is None or rotary[0].dtype == torch.float32)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _library(qfkv.shape[-1]) is not None
    )


@lru_cache(maxsize=256)
def _blank(shape, dtype, settings, past, rotary_rows, threads):
    """A `Mixing` without its pointers: kept, because a single token feels the time it takes to make one."""
    batch, seq, parts, heads, dim = shape
    return _Mixing(
        batch=batch,
        seq=seq,
        heads=heads,
        parts=parts,
        window=settings.window or 0,
        past=past,
        kept=0 if settings.window is None else min(settings.window - 1, past + seq),
        bf16=dtype == torch.bfloat16,
        normalize=settings.normalize,
        elu=settings.weight_function == "elu",
        gate=_GATES[settings.query_gate],
        bounded=settings.bounded(dim),
        rotary_stride=seq * dim if rotary_rows > 1 else 0,
        threads=min(threads, batch * heads) if batch * seq * heads >= _PARALLEL else 1,
        scale=settings.scale,
        null_weight=settings.null_weight,
    )


class NativeMixing:
    """One mixing step on the compiled source: `forward`, then perhaps `backward`.

    Args:
        qfkv, settings, decay, padding_mask, segments: as in `focus_mixing`, `segments` numbered by runs.
        rotary (`tuple` of cos and sin, *optional*): as in `focus_mixing`.
        past (`tuple` of log weights and values, *optional*): of the `FocusState` before the first token.
    """

    def __init__(self, qfkv, settings, decay=None, rotary=None, padding_mask=None, segments=None, past=None):
        self.windowed, self.library = settings.window is not None, _library(qfkv.shape[-1])
        self.given, tokens, rows = {}, 0, 0
        if decay is not None:
            self.given["decay"] = decay.float().contiguous()
        if rotary is not None:
            self.given["cos"], self.given["sin"] = rotary[0].contiguous(), rotary[1].contiguous()
            rows = rotary[0].shape[0]
        if padding_mask is not None:
            self.given["mask"] = padding_mask.contiguous()
        if segments is not None:
            self.given["segments"] = segments.contiguous()
        if past is not None:
            self.given["past_logs"], self.given["past_values"] = (x.float().contiguous() for x in past)
            tokens = past[0].shape[2] if self.windowed else 0
        self.blank = _blank(qfkv.shape, qfkv.dtype, settings, tokens, rows, torch.get_num_threads())

    def call(self, name: str, **tensors: torch.Tensor) -> None:
        """Call a function of the library with what was given and what `tensors` adds."""
        mixing = _Mixing.from_buffer_copy(self.blank)
        for field, tensor in (*self.given.items(), *tensors.items()):
            setattr(mixing, field, tensor.data_ptr())
        if getattr(self.library, name)(mixing):
            raise MemoryError("The mixing step found no memory for one block of tokens.")

    def forward(self, qfkv: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output `[batch, seq, heads, head_dim]`, and log weights and values of the `FocusState` after the last token."""
        batch, seq, parts, heads, dim = qfkv.shape
        channels = dim if parts == 3 else 2 * dim
        kept = (self.blank.kept,) if self.windowed else ()
        logs = qfkv.new_empty(batch, heads, *kept, dtype=torch.float32)
        values = logs.new_empty(*logs.shape, channels)
        if for_backward and not self.windowed:
            carries = logs.new_empty(batch, heads, -(-seq // _BLOCK), 2 + channels, dtype=torch.float64)
            self.given["carries"] = carries  # for the backward pass as well
        out = qfkv.new_empty(batch, seq, heads, dim)
        state = {"final_logs": logs, "final_values": values}
        self.call("focus_forward", input=qfkv.contiguous(), out=out, **state)
        return out, logs, values

    def backward(self, qfkv: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient of `qfkv` from that of the output."""
        qfkv, grad_out = qfkv.contiguous(), grad_out.to(qfkv.dtype).contiguous()
        grad = torch.empty_like(qfkv)
        self.call("focus_backward", input=qfkv, grad_out=grad_out, grad_in=grad)
        return grad


def step(
    qfkv: torch.Tensor, settings, decay: torch.Tensor | None, rotary: tuple | None, packed: torch.Tensor
) -> torch.Tensor | None:
    """The mixing step of one more token, which also enters the packed state, in place.

    Args:
        qfkv, settings, decay, rotary: as in `focus_mixing`, for one token.
        packed (`torch.Tensor`): of `pack_state`, float32.

    Returns:
        Output `[batch, 1, heads, head_dim]` in the dtype of `qfkv`; `None`, and nothing done, where the compiled source
        can't take the step.
    """
    if not applies(qfkv, settings, rotary) or packed.dtype != torch.float32 or not packed.is_contiguous():
        return None
    if settings.window is not None and packed.shape[-1] != max(settings.window - 1, 1):
        return None  # a cache that keeps more than it needs, to roll back
    out = qfkv.new_empty(qfkv.shape[0], 1, *qfkv.shape[3:])
    NativeMixing(qfkv, settings, decay, rotary).call("focus_step", input=qfkv.contiguous(), out=out, state=packed)
    return out
