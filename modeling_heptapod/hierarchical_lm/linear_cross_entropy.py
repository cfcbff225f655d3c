"""Cross-entropy of several predictions from each hidden state, without all their logits in memory.

A hidden state of a coarse stream predicts all `k` tokens of a block:

    logits[n, i] = weight[i * vocab : (i + 1) * vocab] @ hidden[n]        loss = mean over targets of -log softmax

`k * vocab` logits for each state take too much memory. The fast path computes them in pieces of `_PIECE` numbers, and adds the
contribution of each piece to both gradients, softmax minus one-hot. It saves these gradients for the backward pass, which
have the sizes of `hidden` and `weight`.

`torch.nn.functional.linear_cross_entropy`, which torch has from 2.13 on, is not used: in chunks it takes one target for each
state, and it rounds the loss of bfloat16 inputs to bfloat16 (1% off, here 5e-6).
"""

import torch

from ..common.losses import IGNORE_INDEX
from ..common.model_inputs import is_dynamic
from ..common.registered_operators import operator_namespace


_PIECE = 1 << 22  # logits in memory at a time


def naive_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition of `linear_cross_entropy`, one prediction after the other."""
    num_targets = targets.shape[1]
    vocab = weight.shape[0] // num_targets
    total, count = hidden.new_zeros(()), 0
    for state, row in zip(hidden, targets.tolist()):
        for i, target in enumerate(row):
            if target != IGNORE_INDEX:
                logits = weight[i * vocab : (i + 1) * vocab] @ state
                total, count = total + logits.logsumexp(0) - logits[target], count + 1
    return total / max(count, 1)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `targets.shape[1]` linear predictions of each hidden state.

    Args:
        hidden (`torch.Tensor` of shape `(n, width)`): hidden states.
        weight (`torch.Tensor` of shape `(k * vocab, width)`): weights of `k` linear layers, concatenated.
        targets (`torch.LongTensor` of shape `(n, k)`): -100 where there is no target.

    Returns:
        A scalar in at least float32; 0 without targets. It can be differentiated once.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    if targets.dim() != 2 or hidden.dim() != 2 or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"`hidden` must be [n, width] and `targets` [n, k], got {list(hidden.shape)} and {list(targets.shape)}."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] % targets.shape[1]:
        raise ValueError(
            f"`weight` must be [{targets.shape[1]} * vocab, {hidden.shape[1]}], got {list(weight.shape)}."
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, differentiate):
        # A compiler would unroll the loop over pieces for each number of states.
        in_pieces = _in_pieces_as_one if is_dynamic(hidden.shape[0]) else _in_pieces
        with torch.autocast(hidden.device.type, enabled=False):
            loss, grad_hidden, grad_weight = in_pieces(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                differentiate and ctx.needs_input_grad[0],
                differentiate and ctx.needs_input_grad[1],
            )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = (
            (saved * grad).to(dtype) if needed else None
            for saved, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        )
        return *grads, None, None, None


def _in_pieces(hidden, weight, targets, for_hidden, for_weight):
    """The mean loss and its gradients, empty where not needed. Sums are in at least float32."""
    states, num_targets = targets.shape
    vocab = weight.shape[0] // num_targets
    precise = torch.promote_types(hidden.dtype, torch.float32)
    counts = targets != IGNORE_INDEX
    share = 1 / counts.sum().clamp_min(1).to(precise)
    places = targets.clamp_min(0).unsqueeze(-1)
    loss = hidden.new_zeros((), dtype=precise)
    grad_hidden = hidden.new_zeros(hidden.shape if for_hidden else (0,), dtype=precise)
    grad_weight = hidden.new_zeros(weight.shape if for_weight else (0,), dtype=precise)

    group = max(1, min(num_targets, _PIECE // (states * vocab + 1)))  # targets in a piece
    rows = max(1, min(states, _PIECE // (group * vocab)))  # states in a piece
    for first in range(0, num_targets, group):
        at = slice(first, first + group)
        part = weight[first * vocab : (first + group) * vocab]
        for start in range(0, states, rows):
            here = slice(start, start + rows)
            logits = (hidden[here] @ part.t()).to(precise).unflatten(-1, (-1, vocab))
            log_probabilities = logits.log_softmax(-1)
            counted = counts[here, at].unsqueeze(-1)
            loss -= (log_probabilities.gather(-1, places[here, at]) * counted).sum()
            if not (for_hidden or for_weight):
                continue
            grad = log_probabilities.exp_()
            grad.scatter_add_(-1, places[here, at], grad.new_full((1, 1, 1), -1).expand_as(counted))
            grad = grad.mul_(counted).flatten(1).to(hidden.dtype)
            if for_hidden:
                grad_hidden[here] += grad @ part
            if for_weight:
                grad_weight[first * vocab : (first + group) * vocab] += grad.t() @ hidden[here]
    return loss * share, grad_hidden.mul_(share), grad_weight.mul_(share)


@torch.library.custom_op(f"{operator_namespace(__name__)}::linear_cross_entropy", mutates_args=())
def _in_pieces_as_one(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, for_hidden: bool, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_in_pieces` as one operator, which compilers do not trace."""
    return _in_pieces(hidden, weight, targets, for_hidden, for_weight)


@_in_pieces_as_one.register_fake
def _(hidden, weight, targets, for_hidden, for_weight):
    precise = torch.promote_types(hidden.dtype, torch.float32)
    shapes = ((), hidden.shape if for_hidden else (0,), weight.shape if for_weight else (0,))
    return tuple(hidden.new_empty(shape, dtype=precise) for shape in shapes)
