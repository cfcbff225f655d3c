"""The settings of the focus operator and its elementwise operations.

Weight functions and query gates stand in one table each for torch, its backward pass, C and Triton.

A new kind is an entry here, with its derivative, and a name in `LeapConfig`. While it has no number in the kernels
(`kernel=None`) it runs in torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


NORM_EPS = 1e-5  # added to the standard deviation, as in the prototype


class WeightFunction(NamedTuple):
    """The positive weight of a focus logit.

    Attributes:
        log (`Callable`): logits -> logs of their weights.
        weight (`Callable`): logits -> weights, of logits that are not large.
        backward (`Callable`): gradient of the logs, logits -> gradient of the logits.
        kernel (`int`, *optional*): its number in the kernels.
    """

    log: Callable
    weight: Callable
    backward: Callable
    kernel: int | None


class OutputGate(NamedTuple):
    """What `scale * q . kbar` opens.

    Attributes:
        open (`Callable`, *optional*): alignments -> gates; `None` where there is no query.
        slope (`Callable`, *optional*): alignments, gates -> derivatives.
        kernel (`int`, *optional*): its number in the kernels.
    """

    open: Callable | None
    slope: Callable | None
    kernel: int | None


def _elu_log(logits):
    return torch.where(logits < 0, logits, torch.log1p(logits.clamp_min(0)))


def _elu_weight(logits):  # elu(x) + 1, which has no precision below zero when taken as written
    return logits.clamp_max(0).exp_().add_(logits.clamp_min(0))


def _gelu_slope(alignment, gate):
    density = torch.exp(-0.5 * alignment.square()) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(alignment) + alignment * density


WEIGHT_FUNCTIONS = {
    "elu": WeightFunction(_elu_log, _elu_weight, lambda grad, logits: grad / (1 + logits.clamp_min(0)), 1),
    "exp": WeightFunction(lambda logits: logits, torch.exp, lambda grad, logits: grad, 0),
}
OUTPUT_GATES = {
    "none": OutputGate(None, None, 0),
    "sigmoid": OutputGate(torch.sigmoid, lambda alignment, gate: gate * (1 - gate), 1),
    "gelu": OutputGate(nn.functional.gelu, _gelu_slope, 2),
}


@dataclass(frozen=True)
class FocusSettings:
    """What distinguishes one mixing step from another; see `focus.py` for the symbols.

    Attributes:
        scale (`float`): factor of both dot products.
        normalize (`bool`): standardise q, f, k and v over the head dimension first (the prototype's `rescale`).
        weight_function (`str`): `"elu"` or `"exp"`.
        output_gate (`str`): `"sigmoid"`, `"gelu"` or `"none"`; with `"none"` there is no q and `out = vbar`.
        window (`int`, *optional*): window size; `None` is global.
        sink_weight (`float`): weight of one more token of value zero in every window.
        causal (`bool`): whether a position sees only itself and its past.

    Raises:
        ValueError: for kinds that are not in the tables above, and numbers that mean nothing.
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
                    f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}; a new one is an entry of the table "
                    "in focus_functions.py."
                )
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"`window` must be an integer of at least 1, or None, got {self.window!r}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}.")
        if not 0 <= self.sink_weight < math.inf:
            raise ValueError(f"`sink_weight` must be finite and not negative, got {self.sink_weight}.")

    @property
    def kernels(self) -> tuple[int | None, int | None]:
        """Numbers of weight function and gate in the kernels, `None` for what is in torch only."""
        return WEIGHT_FUNCTIONS[self.weight_function].kernel, OUTPUT_GATES[self.output_gate].kernel

    def bounded(self, head_dim: int) -> bool:
        """Whether no focus logit can leave +-30: dot products of standardised vectors stay below `head_dim`."""
        return self.normalize and self.scale * head_dim <= 30


def log_weight(logits: torch.Tensor, weight_function: str) -> torch.Tensor:
    """Log of the positive weight that a focus logit stands for, elementwise."""
    return WEIGHT_FUNCTIONS[weight_function].log(logits)


def gate_value(alignment: torch.Tensor, output_gate: str) -> torch.Tensor:
    """The gate of an alignment `scale * q . kbar`, elementwise."""
    return OUTPUT_GATES[output_gate].open(alignment)


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
