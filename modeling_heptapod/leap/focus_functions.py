"""Settings of the focus operator and its elementwise operations.

`WEIGHT_FUNCTIONS` and `OUTPUT_GATES` list the options that exist. All forms of the operator, `LeapConfig` and the tests read
them. A new option is one entry with its derivative. It runs in torch as long as it has no kernels (`kernel=None`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


NORM_EPS = 1e-5  # added to the standard deviation, as in the prototype


class WeightFunction(NamedTuple):
    """A function from focus logits to positive weights.

    Attributes:
        log (`Callable`): logits -> log weights.
        slope (`Callable`): logits -> derivatives of `log`.
        weight (`Callable`): logits -> weights, the exponential of `log`. It adds one token to a global state without a
            maximum, which saves operations. Called only where `FocusSettings.bounded` says that logits lie within +-30.
        kernel (`int`, *optional*): its number in the C source and in the Triton kernels, which must both have it. With
            `None` it runs in torch.
    """

    log: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor], torch.Tensor]
    kernel: int | None = None


class OutputGate(NamedTuple):
    """A function from alignments `scale * q . kbar` to gates on the output.

    Attributes:
        value (`Callable`): alignments -> gates.
        slope (`Callable`): alignments, gates -> derivatives of `value`.
        kernel (`int`, *optional*): its number in the C source and in the Triton kernels, which must both have it. With
            `None` it runs in torch.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    kernel: int | None = None


def _elu_log(logits):
    return torch.where(logits < 0, logits, torch.log1p(logits.clamp_min(0)))


def _elu_slope(logits):
    return 1 / (1 + logits.clamp_min(0))


def _elu_weight(logits):  # elu(x) + 1, which loses precision below zero when computed as written
    return logits.clamp_max(0).exp_().add_(logits.clamp_min(0))


def _gelu_slope(alignment, gate):
    density = torch.exp(-0.5 * alignment.square()) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(alignment) + alignment * density


WEIGHT_FUNCTIONS = {
    "elu": WeightFunction(_elu_log, _elu_slope, _elu_weight, kernel=1),
    "exp": WeightFunction(lambda logits: logits, torch.ones_like, torch.exp, kernel=0),
}
OUTPUT_GATES = {
    "sigmoid": OutputGate(torch.sigmoid, lambda alignment, gate: gate * (1 - gate), kernel=1),
    "gelu": OutputGate(nn.functional.gelu, _gelu_slope, kernel=2),
    "none": OutputGate(torch.ones_like, lambda alignment, gate: torch.zeros_like(gate), kernel=0),  # without queries
}


@dataclass(frozen=True)
class FocusSettings:
    """Settings of a mixing step; `focus.py` defines the symbols.

    Attributes:
        scale (`float`): factor of both dot products.
        normalize (`bool`): standardise q, f, k and v over the head dimension first (the prototype's `rescale`).
        weight_function (`str`): key of `WEIGHT_FUNCTIONS`.
        output_gate (`str`): key of `OUTPUT_GATES`. With `"none"` there is no q and `out = vbar`.
        window (`int`, *optional*): window size, `None` for a global mean.
        sink_weight (`float`): weight of an additional token of value zero in every window.
        causal (`bool`): whether a position sees only itself and its past.

    Raises:
        ValueError: for options that are not in these tables, and for numbers out of range.
    """

    scale: float
    normalize: bool = False
    weight_function: str = "elu"
    output_gate: str = "sigmoid"
    window: int | None = None
    sink_weight: float = 0.0
    causal: bool = True

    def __post_init__(self):
        for name, known in (("weight_function", WEIGHT_FUNCTIONS), ("output_gate", OUTPUT_GATES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}; focus_functions.py lists them."
                )
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"`window` must be an integer of at least 1, or None, got {self.window!r}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}.")
        if not 0 <= self.sink_weight < math.inf:
            raise ValueError(f"`sink_weight` must be finite and not negative, got {self.sink_weight}.")

    @property
    def kernels(self) -> tuple[int | None, int | None]:
        """Numbers of the weight function and the gate in the kernels, `None` for those in torch only."""
        return WEIGHT_FUNCTIONS[self.weight_function].kernel, OUTPUT_GATES[self.output_gate].kernel

    def have_kernels(self, widest: int) -> bool:
        """Whether there are kernels for these settings, whose windows hold at most `widest` tokens."""
        fits = self.window is None or self.window <= widest
        return self.causal and fits and None not in self.kernels

    def bounded(self, head_dim: int) -> bool:
        """Whether focus logits stay within +-30. Dot products of standardised vectors are below `head_dim`."""
        return self.normalize and self.scale * head_dim <= 30


def log_weight(logits: torch.Tensor, weight_function: str) -> torch.Tensor:
    """Log weights of focus logits, elementwise."""
    return WEIGHT_FUNCTIONS[weight_function].log(logits)


def gate_value(alignment: torch.Tensor, output_gate: str) -> torch.Tensor:
    """Gates of alignments `scale * q . kbar`, elementwise."""
    return OUTPUT_GATES[output_gate].value(alignment)


def standardize(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean and divide by (unbiased standard deviation + 1e-5) over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return centred / (variance.clamp_min(1e-24).sqrt() + NORM_EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on `[batch, seq, heads, head_dim]`; `cos`, `sin` `[batch, seq, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.unsqueeze(2), torch.cat((-high, low), dim=-1), sin.unsqueeze(2))


__all__ = [
    "NORM_EPS",
    "OUTPUT_GATES",
    "WEIGHT_FUNCTIONS",
    "FocusSettings",
    "OutputGate",
    "WeightFunction",
    "gate_value",
    "log_weight",
    "rotate",
    "standardize",
]
