"""The mixing step and its recurrent form on CPUs, in C that is compiled on first use.

Without a C compiler (`$CC`, `cc`, `gcc` or `clang`), or with the environment variable `HEPTAPOD_NATIVE=0`, everything runs in
torch, which is slower. `native_library.py` caches compiled libraries. Shape, dtype, device and memory of every tensor are
checked before it is passed to C.
"""

import ctypes
from functools import cache, lru_cache

import torch

from ..common.cpu_kernels import FLAGS, address, check_status, load_kernels
from ..common.model_inputs import is_eager
from .focus_cpu_source import SOURCE


_BLOCK, _WIDEST = 128, 64  # of the source
_MOST_DIM = 1024  # a head's rows must fit on a thread's stack
_PARALLEL = 512  # tokens times heads below which a second thread costs more than it saves
_INTEGERS = "batch seq heads parts window past kept bf16 normalize weight gate bounded rotary_stride threads".split()
_POINTERS = (
    "input out alibi_slopes cos sin mask segments past_logs past_values final_logs final_values carries grad_out grad_in state"
).split()


class Mixing(ctypes.Structure):
    """`Mixing` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        ("sink_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("next", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    ]


@cache
def _library(head_dim):
    """The source compiled for one head dimension, `None` if it cannot be compiled or loaded."""
    functions = dict.fromkeys(("focus_forward", "focus_backward", "focus_recurrent"), Mixing)
    return load_kernels("focus", "LEAP's mixing runs", SOURCE, functions, [*FLAGS, f"-DHEAD_DIM={head_dim}"])


def is_supported(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the compiled source runs this mixing step in eager mode."""
    return is_eager(qfkv) and takes(qfkv, settings, rotary)


def takes(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the C source supports this mixing step: causal, on a CPU, float32 or bfloat16, windows up to 64."""
    return (
        qfkv.device.type == "cpu"
        and qfkv.dtype in (torch.float32, torch.bfloat16)
        and (rotary is None or rotary[0].dtype == torch.float32)
        and has_kernel(settings, int(qfkv.shape[-1]))  # `int` fixes a size that is dynamic in a graph
    )


def has_kernel(settings, head_dim: int) -> bool:
    """Whether the C source supports these settings and this head dimension, and could be compiled."""
    return settings.have_kernels(_WIDEST) and 1 < head_dim <= _MOST_DIM and _library(head_dim) is not None


@lru_cache(maxsize=256)
def blank_mixing(shape, dtype, settings, past, rotary_rows, threads):
    """A `Mixing` without its pointers, and the shapes and dtypes of these. Cached to save time in single steps."""
    batch, seq, parts, heads, dim = shape
    channels = dim if parts == 3 else 2 * dim
    weight, gate = settings.kernels
    blank = Mixing(
        batch=batch,
        seq=seq,
        heads=heads,
        parts=parts,
        window=settings.window or 0,
        past=past,
        kept=0 if settings.window is None else min(settings.window - 1, past + seq),
        bf16=dtype == torch.bfloat16,
        normalize=settings.normalize,
        weight=weight,
        gate=gate,
        bounded=settings.bounded(dim),
        rotary_stride=seq * dim if rotary_rows > 1 else 0,
        threads=min(threads, batch * heads) if batch * seq * heads >= _PARALLEL else 1,
        scale=settings.scale,
        sink_weight=settings.sink_weight,
    )
    windowed, single = settings.window is not None, torch.float32
    before, after = ((past,), (blank.kept,)) if windowed else ((), ())
    state = (heads * (1 + channels), max(settings.window - 1, 1)) if windowed else (heads * (2 + channels),)
    expected = {
        **dict.fromkeys(("input", "grad_in"), (shape, dtype)),
        **dict.fromkeys(("out", "grad_out"), ((batch, seq, heads, dim), dtype)),
        "alibi_slopes": ((heads,), single),
        **dict.fromkeys(("cos", "sin"), ((batch if rotary_rows > 1 else 1, seq, dim), single)),
        "mask": ((batch, seq), torch.bool),
        "segments": ((batch, seq), torch.long),
        "past_logs": ((batch, heads, *before), single),
        "past_values": ((batch, heads, *before, channels), single),
        "final_logs": ((batch, heads, *after), single),
        "final_values": ((batch, heads, *after, channels), single),
        "carries": ((batch, heads, -(-seq // _BLOCK), 2 + channels), torch.float64),
        "state": ((batch, *state), single),
    }
    return blank, expected


def _dense(tensor, dtype=None):
    return tensor.resolve_neg().to(dtype or tensor.dtype).contiguous()


class NativeMixing:
    """One mixing step in C: `forward`, then optionally `backward`.

    Args:
        qfkv, settings, alibi_slopes, padding_mask, segments: as in `focus_mixing`, `segments` numbered by runs.
        rotary (`tuple` of cos and sin, *optional*): as in `focus_mixing`.
        past (`tuple` of log weights and values, *optional*): of the `FocusState` before the first token.
    """

    def __init__(self, qfkv, settings, alibi_slopes=None, rotary=None, padding_mask=None, segments=None, past=None):
        self.windowed, self.library = settings.window is not None, _library(qfkv.shape[-1])
        self.carries = None  # kept by the forward pass for the backward pass
        self.given, tokens, rows = {}, 0, 0
        if alibi_slopes is not None:
            self.given["alibi_slopes"] = _dense(alibi_slopes, torch.float32)
        if rotary is not None:
            self.given["cos"], self.given["sin"] = map(_dense, rotary)
            rows = rotary[0].shape[0]
        if padding_mask is not None:
            self.given["mask"] = _dense(padding_mask)
        if segments is not None:
            self.given["segments"] = _dense(segments)
        if past is not None:
            self.given["past_logs"], self.given["past_values"] = (_dense(x, torch.float32) for x in past)
            tokens = past[0].shape[2] if self.windowed else 0
        threads = torch.get_num_threads()
        self.blank, self.expected = blank_mixing(qfkv.shape, qfkv.dtype, settings, tokens, rows, threads)

    def call(self, name: str, **tensors: torch.Tensor) -> None:
        """Call a function of the library with the tensors of the constructor and `tensors`.

        Raises:
            ValueError: for a tensor of another shape, dtype, device or layout, and for options that the source lacks.
            MemoryError: if there is no memory for one block of tokens.
        """
        mixing = Mixing.from_buffer_copy(self.blank)
        if self.carries is not None:
            tensors["carries"] = self.carries
        for field, tensor in (*self.given.items(), *tensors.items()):
            setattr(mixing, field, address(field, tensor, *self.expected[field]))
        check_status(getattr(self.library, name)(mixing), "mixing step")

    @staticmethod
    def new_carries(qfkv: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """Memory for the sums of global means that the backward pass needs, `None` for windows."""
        if window is not None:
            return None
        batch, seq, parts, heads, dim = qfkv.shape
        channels = dim if parts == 3 else 2 * dim
        return qfkv.new_empty(batch, heads, -(-seq // _BLOCK), 2 + channels, dtype=torch.float64)

    def forward(self, qfkv: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output `[batch, seq, heads, head_dim]`, and log weights and values of the `FocusState` after the last token."""
        batch, seq, parts, heads, dim = qfkv.shape
        channels = dim if parts == 3 else 2 * dim
        kept = (self.blank.kept,) if self.windowed else ()
        logs = qfkv.new_empty(batch, heads, *kept, dtype=torch.float32)
        values = logs.new_empty(*logs.shape, channels)
        if for_backward:
            self.carries = self.new_carries(qfkv, self.blank.window or None)
        out = qfkv.new_empty(batch, seq, heads, dim)
        state = {"final_logs": logs, "final_values": values}
        self.call("focus_forward", input=_dense(qfkv), out=out, **state)
        return out, logs, values

    def backward(self, qfkv: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient of `qfkv` from that of the output."""
        if not self.windowed and self.carries is None:
            raise RuntimeError("The backward pass needs a forward pass with `for_backward=True`.")
        qfkv, grad_out = _dense(qfkv), _dense(grad_out, qfkv.dtype)
        grad = torch.empty_like(qfkv)
        self.call("focus_backward", input=qfkv, grad_out=grad_out, grad_in=grad)
        return grad


def holds_step(packed: torch.Tensor, settings) -> bool:
    """Whether the C source adds a token to this packed state. It leaves those that keep more than a window, to roll back."""
    longer = settings.window is not None and packed.dim() == 3 and packed.shape[-1] > max(settings.window - 1, 1)
    return packed.dtype == torch.float32 and packed.is_contiguous() and not longer


def recurrent_share(head_dim: int) -> int | None:
    """Address of the step of a token that other C code calls, for a share of the heads."""
    return ctypes.cast(_library(head_dim).focus_recurrent_share, ctypes.c_void_p).value


def step(
    qfkv: torch.Tensor, settings, alibi_slopes: torch.Tensor | None, rotary: tuple | None, packed: torch.Tensor
) -> torch.Tensor | None:
    """The mixing step of one more token, which is added to the packed state in place.

    Args:
        qfkv, settings, alibi_slopes, rotary: as in `focus_mixing`, for one token.
        packed (`torch.Tensor`): of `pack_state`, float32.

    Returns:
        Output `[batch, 1, heads, head_dim]` in the dtype of `qfkv`, or `None`, with the state unchanged, if the C source does
        not support the step.
    """
    if not is_supported(qfkv, settings, rotary) or not holds_step(packed, settings):
        return None
    if qfkv.shape[1] != 1:
        raise ValueError(f"`qfkv` must hold one token, got {qfkv.shape[1]}.")
    out = qfkv.new_empty(qfkv.shape[0], 1, *qfkv.shape[3:])
    NativeMixing(qfkv, settings, alibi_slopes, rotary).call(
        "focus_recurrent", input=_dense(qfkv), out=out, state=packed
    )
    return out
