"""The weight functions and query gates of the focus operator, in one table each for torch, its backward pass, C and Triton.

A new one is an entry here, with its derivative, and a name in `LeapConfig`. While it has no number in the kernels
(`kernel=None`) it runs in torch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


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


class QueryGate(NamedTuple):
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
QUERY_GATES = {
    "none": QueryGate(None, None, 0),
    "sigmoid": QueryGate(torch.sigmoid, lambda alignment, gate: gate * (1 - gate), 1),
    "gelu": QueryGate(nn.functional.gelu, _gelu_slope, 2),
}

__all__ = ["QUERY_GATES", "WEIGHT_FUNCTIONS", "QueryGate", "WeightFunction"]
