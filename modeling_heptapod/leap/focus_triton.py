"""The mixing step and its recurrent form on GPUs: launches of Triton kernels, which read the projections and write the output once.

A program computes a chunk of tokens of one head and row. Within a chunk the weights are a dense triangle, or a band with a
halo of earlier tokens, applied as a matrix product. All sums are in float32, relative to the largest log weight among those
that are summed, and nothing is subtracted from a sum.

Global means need the sums over all earlier chunks. Each program publishes the summed weights and values of its chunk, and
waits for those of the earlier chunks in its group of `_GROUP`. The sums before the group come from the last program of the
previous group, which combines and publishes them in turn. The order of summation is fixed, so results do not depend on
timing. Programs number themselves when they start, so a program only waits for programs that have started. The backward
pass does the same from the end, and recomputes the means from the carries that the forward pass kept.

Without Triton or a CUDA device, `is_supported` is false and the step runs in torch.
"""

import math

import torch

from ..common.model_inputs import is_eager


try:
    import triton
except ImportError:
    triton = None
if triton is not None:
    from .focus_triton_backward import backward_kernel
    from .focus_triton_forward import forward_kernel, step_kernel

_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 64  # window
_WIDEST_OF_WIDE = 33  # window of heads of more than 64 channels
_MOST_DIM = 256
_GROUP = 32  # chunks, one bit each of a word
# Floats of a record before its sums: reference log weight, sum of weights, whether earlier sums continue, unused.
_HEADER = 4


def is_supported(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the kernels run this mixing step in eager mode."""
    return is_eager(qfkv) and takes(qfkv, settings, rotary)


def takes(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the kernels support this mixing step: causal, on a CUDA device, windows up to 64, heads up to 256 channels.

    Heads of more than 64 channels are limited to windows of 33.
    """
    widest = _WIDEST if qfkv.shape[-1] <= 64 else _WIDEST_OF_WIDE
    return (
        triton is not None
        and qfkv.device.type in _DEVICES
        and qfkv.dtype in _DTYPES
        and settings.have_kernels(widest)
        and 1 < qfkv.shape[-1] <= _MOST_DIM
        and qfkv.shape[0] > 0
        and (rotary is None or (rotary[0].dtype == torch.float32 and qfkv.shape[-1] % 2 == 0))
    )


def _tile(dim: int, halo: int) -> tuple[int, int, int]:
    """Tokens of a chunk, at least as many as of a halo, and warps of a program of the forward and the backward pass.

    Never 64 rows with 4 warps or more: Triton then uses wgmma with an operand in registers, which ptxas up to CUDA 13.0
    miscompiles (illegal addresses, wrong sums).
    """
    if halo > 32:
        return 64, 2, 2
    warps = max(1, min(8, triton.next_power_of_2(dim) // 16))
    return 32, warps, min(8, 2 * warps)


def _padded(dim: int) -> int:
    """Channels of a head in a kernel's rows, a power of two."""
    return max(16, triton.next_power_of_2(dim))


def _precision(dtype: torch.dtype) -> str:
    """Precision of matrix products: that of float32, or less for bfloat16, whose outputs are coarser."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


class TritonMixing:
    """One mixing step on a GPU: `forward`, then optionally `backward`.

    Args:
        qfkv, settings, alibi_slopes, padding_mask, segments: as in `focus_mixing`, `segments` numbered by runs.
        rotary (`tuple` of cos and sin, *optional*): as in `focus_mixing`.
        past (`tuple` of log weights and values, *optional*): of the `FocusState` before the first token.
    """

    def __init__(self, qfkv, settings, alibi_slopes=None, rotary=None, padding_mask=None, segments=None, past=None):
        batch, seq, parts, heads, dim = qfkv.shape
        self.settings, self.shape = settings, (batch, seq, heads, dim)
        self.alibi_slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        self.cos, self.sin = (None, None) if rotary is None else tuple(x.contiguous() for x in rotary)
        self.mask = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
        self.segments = None if segments is None else segments.int().contiguous()
        self.past_logs = None if past is None else past[0].float().contiguous()
        self.past_values = None if past is None else past[1].float().contiguous()
        self.past = 0 if past is None or settings.window is None else past[0].shape[2]
        if self.past == 0 and settings.window is not None:
            self.past_logs = self.past_values = None
        halo = 16 if settings.window is None else max(16, triton.next_power_of_2(settings.window - 1))
        chunk, *self.warps = _tile(dim, halo)
        self.rows, self.chunks = batch * heads, -(-seq // chunk)
        self.carries = None  # kept by the forward pass for the backward pass
        self.numbers = {
            "seq": seq,
            "heads": heads,
            "rows": self.rows,
            "chunks": self.chunks,
            "window": settings.window,
            "past": self.past,
            "rotary_stride": seq * dim if rotary is not None and rotary[0].shape[0] > 1 else 0,
            "scale": float(settings.scale),
            "log_sink": math.log(settings.sink_weight) if settings.sink_weight else 0.0,
        }
        self.constants = {
            "D": dim,
            "DP": _padded(dim),
            "T": chunk,
            "HALO": halo,
            "GROUP": _GROUP,
            "NORMALIZE": settings.normalize,
            "WEIGHT": settings.kernels[0],
            "GATE": settings.kernels[1],
            "NULL": bool(settings.sink_weight),
            "GATED": parts - 3,
            "PRECISION": _precision(qfkv.dtype),
        }

    @staticmethod
    def new_carries(qfkv: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """Memory for the sums of global means that the backward pass needs, `None` for windows."""
        if window is not None:
            return None
        batch, seq, parts, heads, dim = qfkv.shape
        chunk, *_ = _tile(int(dim), 16)
        record = _HEADER + (parts - 2) * _padded(int(dim))
        return qfkv.new_empty(batch * heads, -(-seq // chunk), record, dtype=torch.float32)

    def _shared_memory(self, like):
        """Records of chunks and of ends of groups, and the words with a bit for each published record."""
        records = self.new_carries(like, self.settings.window)  # as large as the carries
        if records is None:
            return None, None, None
        groups = -(-self.chunks // _GROUP)
        ends = like.new_empty(self.rows, groups, records.shape[-1], dtype=torch.float32)
        return records, ends, like.new_zeros(1 + self.rows * groups, dtype=torch.int32)

    def forward(self, qfkv: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output `[batch, seq, heads, head_dim]`, and log weights and values of the `FocusState` after the last token."""
        batch, seq, heads, dim = self.shape
        window, channels = self.settings.window, (qfkv.shape[2] - 2) * dim
        kept = 0 if window is None else min(window - 1, self.past + seq)
        places = () if window is None else (kept,)
        logs = qfkv.new_empty(batch, heads, *places, dtype=torch.float32)
        values = qfkv.new_empty(batch, heads, *places, channels, dtype=torch.float32)
        stay = kept - seq  # tokens of the initial state
        if self.past_logs is not None and self.past_values is not None and stay > 0:
            logs[:, :, :stay] = self.past_logs[:, :, self.past - stay :]
            values[:, :, :stay] = self.past_values[:, :, self.past - stay :]
        records, ends, words = self._shared_memory(qfkv)
        if for_backward:
            self.carries = self.new_carries(qfkv, window)
        out = qfkv.new_empty(batch, seq, heads, dim)
        has_final = window is None or kept > 0
        with torch.cuda.device_of(qfkv):  # Triton launches on the current device
            forward_kernel[(self.rows * self.chunks,)](
                qfkv.contiguous(),
                out,
                self.alibi_slopes,
                self.cos,
                self.sin,
                self.mask,
                self.segments,
                self.past_logs,
                self.past_values,
                logs if has_final else None,
                values if has_final else None,
                records,
                ends,
                words,
                self.carries,
                kept=kept,
                **self.numbers,
                **self.constants,
                num_warps=self.warps[0],
            )
        return out, logs, values

    def backward(self, qfkv: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient of `qfkv` from that of the output."""
        qfkv = qfkv.contiguous()
        grad = torch.empty_like(qfkv)
        with torch.cuda.device_of(qfkv):  # Triton launches on the current device
            backward_kernel[(self.rows * self.chunks,)](
                qfkv,
                grad_out.contiguous(),
                grad,
                self.alibi_slopes,
                self.cos,
                self.sin,
                self.mask,
                self.segments,
                self.past_logs,
                self.past_values,
                *self._shared_memory(qfkv),
                self.carries,
                **self.numbers,
                **self.constants,
                num_warps=self.warps[1],
            )
        return grad


def step(
    qfkv: torch.Tensor, settings, alibi_slopes: torch.Tensor | None, rotary: tuple | None, packed: torch.Tensor
) -> torch.Tensor | None:
    """The mixing step of one more token, which is added to the packed state in place.

    Args:
        qfkv, settings, alibi_slopes, rotary: as in `focus_mixing`, for one token.
        packed (`torch.Tensor`): of `pack_state`, float32.

    Returns:
        Output `[batch, 1, heads, head_dim]` in the dtype of `qfkv`, or `None`, with the state unchanged, if the kernel does
        not support the step.
    """
    if not is_supported(qfkv, settings, rotary) or packed.dtype != torch.float32 or not packed.is_contiguous():
        return None
    window = settings.window
    if window is not None and packed.shape[-1] != max(window - 1, 1):
        return None  # a cache that keeps more tokens than a window, to roll back
    batch, _, parts, heads, dim = qfkv.shape
    out = qfkv.new_empty(batch, 1, heads, dim)
    held = 1 if window is None else packed.shape[-1]
    cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
    with torch.cuda.device_of(qfkv):  # Triton launches on the current device
        step_kernel[(batch * heads,)](
            qfkv.contiguous(),
            out,
            None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            cos,
            sin,
            packed,
            heads,
            window,
            held,
            dim if rotary is not None and rotary[0].shape[0] > 1 else 0,
            float(settings.scale),
            math.log(settings.sink_weight) if settings.sink_weight else 0.0,
            D=dim,
            DP=_padded(dim),
            HELD=triton.next_power_of_2(held),
            NORMALIZE=settings.normalize,
            WEIGHT=settings.kernels[0],
            GATE=settings.kernels[1],
            NULL=bool(settings.sink_weight),
            GATED=parts - 3,
            BOUNDED=settings.bounded(dim),
            num_warps=1,
        )
    return out
