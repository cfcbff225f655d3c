"""The focus operator: windowed, positively weighted running means instead of attention.

For every head, token `j` owns a focus logit `s_j = scale * (f_j . k_j)`, which makes its log weight `l_j` through a
weight function (`exp`: `l = s`; `elu`: `l = log(elu(s) + 1)`). Position `i` sees, over its window,

    P_ij = exp(l_j - decay * |i - j|) / (null_weight + sum_j' exp(l_j' - decay * |i - j'|))
    kbar_i = sum_j P_ij k_j,    vbar_i = sum_j P_ij v_j,    out_i = gate(scale * q_i . kbar_i) * vbar_i

The window is `(i - w, i]` (causal) or `(i - w, i + w)` (bidirectional); without one it is everything allowed. The method
is that of the prototype `leap-transformer`, after Fastformer (arXiv 2108.09084) and "Transformers are RNNs" (arXiv
2006.16236); its logits do not depend on the query, which is what makes linear time and a constant-size state possible.

Read in this order: `naive_focus_mean` and `naive_focus_mixing` (the specification),
`_FocusMixing` (the whole mixing step, recomputed in the backward pass), `focus_mixing` (what the model calls). The tiles are
in `running_mean.py`, the recurrent form is in `focus_step.py`, the form in C for CPUs is in `focus_cpu.py`.

Numerics: everything is accumulated in float32 (float64 for float64 inputs) in log-weight space relative to a maximum
that is actually present, so that no exponent is positive and no prefix sums are ever subtracted from each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn

from ..common.model_inputs import has_open_sizes, is_transformed
from .focus_cpu import NativeMixing, applies
from .focus_kinds import QUERY_GATES, WEIGHT_FUNCTIONS
from .focus_triton import TritonMixing
from .focus_triton import applies as triton_applies
from .running_mean import EMPTY, FocusState, same_segment, two_sided_mean, weighted_mean


_CPU_BLOCK = 2048  # tokens whose temporaries stay in the cache of a core
_NORM_EPS = 1e-5  # added to the standard deviation, as in the prototype


@dataclass(frozen=True)
class FocusSettings:
    """What distinguishes one mixing step from another; see the module's docstring for the symbols.

    Attributes:
        scale (`float`): factor of both dot products.
        normalize (`bool`): standardise q, f, k and v over the head dimension first (the prototype's `rescale`).
        weight_function (`str`): `"elu"` or `"exp"`.
        query_gate (`str`): `"sigmoid"`, `"gelu"` or `"none"`; with `"none"` there is no q and `out = vbar`.
        window (`int`, *optional*): window size; `None` is global.
        null_weight (`float`): weight of one more token of value zero in every window.
        causal (`bool`): whether a position sees only itself and its past.

    Raises:
        ValueError: for kinds that are not in the tables of `focus_kinds.py`, and numbers that mean nothing.
    """

    scale: float
    normalize: bool = False
    weight_function: str = "elu"
    query_gate: str = "sigmoid"
    window: int | None = None
    null_weight: float = 0.0
    causal: bool = True

    def __post_init__(self):
        for name, known in (("weight_function", WEIGHT_FUNCTIONS), ("query_gate", QUERY_GATES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}; a new one is an entry of the table "
                    "in focus_kinds.py."
                )
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"`window` must be an integer of at least 1, or None, got {self.window!r}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}.")
        if not 0 <= self.null_weight < math.inf:
            raise ValueError(f"`null_weight` must be finite and not negative, got {self.null_weight}.")

    @property
    def kernels(self) -> tuple[int | None, int | None]:
        """Numbers of weight function and gate in the kernels, `None` for what is in torch only."""
        return WEIGHT_FUNCTIONS[self.weight_function].kernel, QUERY_GATES[self.query_gate].kernel

    def bounded(self, head_dim: int) -> bool:
        """Whether no focus logit can leave +-30: dot products of standardised vectors stay below `head_dim`."""
        return self.normalize and self.scale * head_dim <= 30


def log_weight(logits: torch.Tensor, weight_function: str) -> torch.Tensor:
    """Log of the positive weight that a focus logit stands for, elementwise."""
    return WEIGHT_FUNCTIONS[weight_function].log(logits)


def open_gate(alignment: torch.Tensor, query_gate: str) -> torch.Tensor:
    """The gate of an alignment `scale * q . kbar`, elementwise."""
    return QUERY_GATES[query_gate].open(alignment)


def standardize(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean and divide by (unbiased standard deviation + 1e-5) over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return centred / (variance.clamp_min(1e-24).sqrt() + _NORM_EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on `[batch, seq, heads, head_dim]`; `cos`, `sin` `[batch, seq, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.unsqueeze(2), torch.cat((-high, low), dim=-1), sin.unsqueeze(2))


def _runs(segment_ids):
    """Number the runs of equal ids `[batch, seq]`, so that two runs of one id are two sequences."""
    if segment_ids is None:
        return None
    return nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)).cumsum(1)


# ---------------------------------------------------------------------------------------------------------------------
# The specification
# ---------------------------------------------------------------------------------------------------------------------


def naive_focus_mean(
    log_weights: torch.Tensor,
    values: torch.Tensor,
    window: int | None = None,
    decay: torch.Tensor | None = None,
    null_weight: float = 0.0,
    causal: bool = True,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted means by a loop over positions: the executable specification of `focus_mean`.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, seq, heads]`): `-inf` leaves a token out.
        values (`torch.Tensor` of shape `[batch, seq, heads, channels]`).
        window (`int`, *optional*): `None` is global.
        decay (`torch.Tensor` of shape `[heads]`, *optional*): subtracted from the log weight per token of distance.
        null_weight (`float`): weight of one more token of value zero.
        causal (`bool`): whether a position sees only itself and its past.
        segment_ids (`torch.Tensor` of shape `[batch, seq]`, *optional*): each run of equal ids sees itself only.

    Returns:
        `torch.Tensor` of shape `[batch, seq, heads, channels]`; zero where nothing is seen.
    """
    segment_ids = _runs(segment_ids)
    seq = log_weights.shape[1]
    reach = seq if window is None else window
    means = []
    for i in range(seq):
        first, last = max(0, i - reach + 1), i if causal else min(seq - 1, i + reach - 1)
        logs = log_weights[:, first : last + 1]  # [batch, seen, heads]
        if decay is not None:
            distance = (torch.arange(first, last + 1, device=logs.device) - i).abs()
            logs = logs - distance[:, None] * decay
        if segment_ids is not None:
            other = segment_ids[:, first : last + 1] != segment_ids[:, i : i + 1]
            logs = logs.masked_fill(other[..., None], -math.inf)
        top = logs.amax(1, keepdim=True).clamp_min(EMPTY).detach()
        weights = (logs - top).exp()
        total = weights.sum(1) + null_weight * (-top[:, 0]).exp() if null_weight else weights.sum(1)
        seen = torch.einsum("bjh,bjhc->bhc", weights, values[:, first : last + 1])
        means.append(torch.where(total[..., None] == 0, 0.0, seen / total.clamp_min(1e-37)[..., None]))
    return torch.stack(means, 1)


def naive_focus_mixing(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    decay: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    means: Callable = naive_focus_mean,
) -> torch.Tensor:
    """The mixing step in plain differentiable operations: the executable specification of `focus_mixing`.

    `means` may be any function of the arguments of `naive_focus_mean`.
    """
    if padding_mask is not None:
        qfkv = torch.where(padding_mask.bool()[..., None, None, None], qfkv, 0.0)
    parts = [standardize(part) if settings.normalize else part for part in qfkv.unbind(2)]
    f, k, v = parts[-3:]
    logs = log_weight(settings.scale * (f * k).sum(-1), settings.weight_function)
    if padding_mask is not None:
        logs = logs.masked_fill(~padding_mask.bool()[..., None], -math.inf)

    def mean(values):
        return means(logs, values, settings.window, decay, settings.null_weight, settings.causal, segment_ids)

    if settings.query_gate == "none":
        return mean(v)
    q = parts[0]
    if rotary is not None:
        q, k = (rotate(x, *rotary) for x in (q, k))
    alignment = settings.scale * (q * mean(k)).sum(-1, keepdim=True)
    return open_gate(alignment, settings.query_gate) * mean(v)


# ---------------------------------------------------------------------------------------------------------------------
# Means and their gradients, for both autograd functions below
# ---------------------------------------------------------------------------------------------------------------------


def _means(logs, values, settings, decay, segments, carry):
    """Means `[batch, heads, n, channels]`, logs of the summed weights `[batch, heads, n]`, and the carry that follows."""
    if settings.causal:
        log_total, means = weighted_mean(logs, values, settings.window, decay, segments, carry)
        carry = _leave_state(logs, values, settings, segments, (log_total, means), carry)
    else:
        log_total, means = two_sided_mean(logs, values, settings.window, decay, segments)
    if settings.null_weight:
        seen = log_total
        log_total = torch.logaddexp(seen, seen.new_tensor(math.log(settings.null_weight)))
        means = means * torch.exp(seen - log_total).unsqueeze(-1)
    return means, log_total, carry


def _means_backward(grads, log_total, logs, values, settings, decay, segments, carry):
    """Gradients of log weights and values, and the carry for the block before.

    With weights `P_ij`, `grad_values = P^T grad_means` and `grad_logs_j = values_j . grad_values_j - sum_i P_ij inner_i`,
    where `inner_i = grad_means_i . means_i`. As `P_ij = exp(l_j) exp(-log_total_i)`, a product with `P^T` is the same kind
    of mean in the other direction, with log weights `-log_total`.

    Args:
        grads (`torch.Tensor` of shape `[batch, heads, n, channels + 1]`): `grad_means`, and `inner` in the last channel.

    Returns:
        `grad_logs [batch, heads, n]`, `grad_values [batch, heads, n, channels]` still to be multiplied by a factor
        `[batch, heads, n, 1]`, this factor, and the carry.
    """
    channels = values.shape[-1]
    reverse_logs = torch.where(log_total <= EMPTY / 2, -math.inf, -log_total)  # NaN stays
    if settings.causal:
        running = weighted_mean(reverse_logs, grads, settings.window, decay, segments, carry, reverse=True)
        carry = _leave_state(reverse_logs, grads, settings, segments, running, carry, reverse=True)
    else:
        running = two_sided_mean(reverse_logs, grads, settings.window, decay, segments)
    factor = torch.exp(logs + running[0])
    grad_values, inner = running[1][..., :channels], running[1][..., channels]
    grad_logs = ((grad_values * values).sum(-1) - inner) * factor
    return grad_logs, grad_values, factor.unsqueeze(-1), carry


def _leave_state(logs, values, settings, segments, running, carry, reverse=False):
    """What these tokens leave to the following ones (to the preceding ones when `reverse`)."""
    if settings.window is None:
        end = 0 if reverse else -1
        return FocusState(*(x[:, :, end].clone() for x in running), None if segments is None else segments[:, end])
    count = settings.window - 1
    tokens = FocusState(logs, values, segments)
    if carry is not None and logs.shape[2] < count:
        pairs = zip(tokens, carry) if reverse else zip(carry, tokens)
        tokens = FocusState(*(None if a is None else torch.cat((a, b), dim=2 if a.dim() > 2 else 1) for a, b in pairs))
    length = tokens.log_weights.shape[2]
    kept = slice(0, count) if reverse else slice(max(length - count, 0), length)
    kept_segments = None if segments is None else tokens.segments[:, kept]
    return FocusState(tokens.log_weights[:, :, kept], tokens.values[:, :, kept], kept_segments)


def _enter_state(state, settings, segments):
    """A state from outside belongs to the first segment."""
    if state is None or segments is None:
        return state
    first = segments[:, :1]
    return state._replace(segments=first[:, 0] if settings.window is None else first.expand(-1, state.values.shape[2]))


# ---------------------------------------------------------------------------------------------------------------------
# The whole mixing step, block by block, recomputed in the backward pass
# ---------------------------------------------------------------------------------------------------------------------


def standardize_forward(x):
    """`standardize` through the layer norm kernel, and what its backward needs."""
    size = x.shape[-1]
    y, mean, rstd = torch.native_layer_norm(x, [size], None, None, 1e-30)
    # From the biased deviation 1 / rstd to the unbiased one plus epsilon, relative to the former.
    divisor = rstd * _NORM_EPS + math.sqrt(size / (size - 1))
    return y.div_(divisor), (x, mean, rstd, divisor)


def _standardize_backward(grad, stats):
    """Gradient of `standardize` by the layer norm kernel; its row factors make it exact, epsilon included."""
    x, mean, rstd, divisor = stats
    size = x.shape[-1]
    root = (math.sqrt(size / (size - 1)) / divisor).sqrt()
    grad = grad.mul_(root * math.sqrt((size - 1) / size))
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(grad, x, [size], mean, rstd * root, None, None, mask)[0]


class _Block:
    """One block of the mixing step: the arithmetic before and after the means, forward and backward."""

    def __init__(self, raw, settings, decay, rotary, padding_mask, segments):
        self.settings, self.rotary = settings, rotary
        parts = raw.to(torch.promote_types(raw.dtype, torch.float32))  # [batch, n, parts, heads, head_dim]
        if settings.normalize:
            parts, self.norm_stats = standardize_forward(parts)
        self.f, self.k, self.v = parts.unbind(2)[-3:]
        self.logits = (self.f * self.k).sum(-1).mul_(settings.scale)  # [batch, n, heads]
        logs = log_weight(self.logits, settings.weight_function)
        if padding_mask is not None:
            logs = logs.masked_fill(~padding_mask.unsqueeze(-1), -math.inf)
        logs = logs.transpose(1, 2).contiguous()  # [batch, heads, n]
        if settings.query_gate == "none":
            values = self.v.transpose(1, 2).contiguous()
        else:
            q, k = parts[:, :, 0], self.k
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            self.q = q.transpose(1, 2)
            values = torch.cat((k.transpose(1, 2), self.v.transpose(1, 2)), dim=-1)  # [batch, heads, n, 2 * head_dim]
        self.tokens = logs, values, settings, decay, segments

    def forward(self, carry):
        """The mixing step's output `[batch, heads, n, head_dim]`, and the carry for the next block."""
        self.means, self.log_total, carry = _means(*self.tokens, carry)
        if self.settings.query_gate == "none":
            return self.means, carry
        self.kbar, self.vbar = self.means.chunk(2, dim=-1)
        self.dot = (self.q * self.kbar).sum(-1)
        self.gate = open_gate(self.dot * self.settings.scale, self.settings.query_gate)
        return self.gate.unsqueeze(-1) * self.vbar, carry

    def backward(self, grad_out, carry):
        """Gradient of the raw parts `[batch, n, parts, heads, head_dim]`, and the carry for the block before."""
        settings, scale = self.settings, self.settings.scale
        grad_out = grad_out.to(self.v.dtype)  # [batch, heads, n, head_dim]
        channels = self.means.shape[-1]
        grad_means = self.means.new_empty(*self.means.shape[:-1], channels + 1)
        if settings.query_gate == "none":
            grad_means[..., :channels] = grad_out
            torch.sum(grad_out * self.means, -1, out=grad_means[..., channels])
        else:
            grad_gate = (grad_out * self.vbar).sum(-1)
            grad_dot = grad_gate * QUERY_GATES[settings.query_gate].slope(self.dot * scale, self.gate) * scale
            torch.mul(grad_dot.unsqueeze(-1), self.q, out=grad_means[..., : channels // 2])
            torch.mul(self.gate.unsqueeze(-1), grad_out, out=grad_means[..., channels // 2 : channels])
            torch.addcmul(grad_dot * self.dot, self.gate, grad_gate, out=grad_means[..., channels])
        grad_logs, grad_values, factor, carry = _means_backward(grad_means, self.log_total, *self.tokens, carry)

        grad_logits = grad_logs.transpose(1, 2) * scale  # [batch, n, heads]
        grad_logits = WEIGHT_FUNCTIONS[settings.weight_function].backward(grad_logits, self.logits).unsqueeze(-1)
        grad_values, factor = grad_values.transpose(1, 2), factor.transpose(1, 2)
        batch, n, heads, head_dim = self.v.shape
        grads = grad_values.new_empty(batch, n, 3 if settings.query_gate == "none" else 4, heads, head_dim)
        *grad_q, grad_f, grad_k, grad_v = grads.unbind(2)
        torch.mul(grad_logits, self.k, out=grad_f)
        torch.mul(grad_values[..., -head_dim:], factor, out=grad_v)
        torch.mul(grad_logits, self.f, out=grad_k)
        if grad_q:
            grad_rotated = grad_values[..., :head_dim]
            torch.mul(grad_dot.unsqueeze(-1).transpose(1, 2), self.kbar.transpose(1, 2), out=grad_q[0])
            if self.rotary is not None:
                cos, sin = self.rotary
                grad_q[0].copy_(rotate(grad_q[0], cos, -sin))
                grad_rotated = rotate(grad_rotated, cos, -sin)
            grad_k.addcmul_(grad_rotated, factor)
        return (_standardize_backward(grads, self.norm_stats) if settings.normalize else grads), carry


def _block_ranges(batch, seq, settings, device):
    """Ranges of rows and, inside them, of tokens: small enough for a core's cache, in order of time."""
    block = _CPU_BLOCK if device.type == "cpu" and not torch.compiler.is_compiling() else batch * seq
    if settings.window is not None:
        block = max(block, 4 * settings.window)
    rows = max(1, block // seq)
    length = block if settings.causal else seq
    times = [slice(start, min(start + length, seq)) for start in range(0, seq, length)]
    return [slice(row, min(row + rows, batch)) for row in range(0, batch, rows)], times


def _in_full_precision(function):
    """Run a step of an autograd function outside autocast, which would hand its float32 sums to bf16 products."""

    @wraps(function)
    def wrapper(ctx, tensor, *args):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(ctx, tensor, *args)

    return wrapper


class _FocusMixing(torch.autograd.Function):
    """The mixing step. Between forward and backward it holds its input and one carry a block, nothing else."""

    @staticmethod
    @_in_full_precision
    def forward(ctx, qfkv, settings, decay, cos, sin, padding_mask, segments, state_logs, state_values):
        past = None if state_logs is None else (state_logs, state_values)
        if past is not None and ctx.needs_input_grad[0]:
            # A cache may hold it, and be written over before the backward pass reads it.
            past = tuple(x.clone() for x in past)
        rotary = None if cos is None else (cos, sin)
        ctx.native = None
        ctx.save_for_backward(qfkv)
        mixing = NativeMixing if applies(qfkv, settings, rotary) else None
        if triton_applies(qfkv, settings, rotary):
            mixing = TritonMixing
        if mixing is not None:
            ctx.native = mixing(qfkv, settings, decay, rotary, padding_mask, segments, past)
            out, *final = ctx.native.forward(qfkv, ctx.needs_input_grad[0])
            ctx.mark_non_differentiable(*final)
            return out, *final
        inputs = settings, decay, cos, sin, padding_mask, segments
        rows, times = _block_ranges(*qfkv.shape[:2], settings, qfkv.device)
        out = qfkv.new_empty(*qfkv.shape[:2], *qfkv.shape[3:])
        carries, finals = [], []
        for row in rows:
            carry = None
            if state_logs is not None:
                carry = FocusState(state_logs[row], state_values[row])
                carry = _enter_state(carry, settings, None if segments is None else segments[row])
            for time in times:
                carries.append(carry if carry is None else FocusState(*(x if x is None else x.clone() for x in carry)))
                part, carry = _make_block(qfkv, inputs, row, time).forward(carry)
                out[row, time] = part.transpose(1, 2)
            finals.append(carry)
        ctx.inputs, ctx.blocks, ctx.carries = inputs, (rows, times), carries
        if not settings.causal:
            return out, None, None
        final = [torch.cat([final[i] for final in finals]) for i in (0, 1)]
        ctx.mark_non_differentiable(*final)
        return out, *final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_in_full_precision
    def backward(ctx, grad_out, *_):
        (qfkv,) = ctx.saved_tensors
        if ctx.native is not None:
            return ctx.native.backward(qfkv, grad_out), *(None,) * 8
        grad = torch.empty_like(qfkv)
        rows, times = ctx.blocks
        carries = iter(reversed(ctx.carries))
        for row in reversed(rows):
            following = None
            for time in reversed(times):
                block = _make_block(qfkv, ctx.inputs, row, time)
                block.forward(next(carries))
                grad[row, time], following = block.backward(grad_out[row, time].transpose(1, 2), following)
        return grad, *(None,) * 8


def _make_block(qfkv, inputs, row, time):
    settings, decay, cos, sin, padding_mask, segments = inputs
    rotary = None
    if cos is not None:
        rotary = tuple((x if x.shape[0] == 1 else x[row])[:, time] for x in (cos, sin))
    masks = (None if mask is None else mask[row, time] for mask in (padding_mask, segments))
    return _Block(qfkv[row, time], settings, decay, rotary, *masks)


def focus_mixing(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    decay: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    state: FocusState | None = None,
) -> tuple[torch.Tensor, FocusState | None]:
    """The whole mixing step of LEAP, `[q, f, k, v] -> gate(q . kbar) * vbar`, in linear time.

    Args:
        qfkv (`torch.Tensor` of shape `[batch, seq, 4, heads, head_dim]`): queries, focus, keys, values; without a
            query gate `[batch, seq, 3, heads, head_dim]` (no queries).
        settings (`FocusSettings`): see there.
        decay (`torch.Tensor` of shape `[heads]`, *optional*): subtracted from log weights per token of distance.
        rotary (`tuple` of cos and sin `[1 or batch, seq, head_dim]`, *optional*): positions of queries and keys.
        padding_mask (`torch.Tensor` of shape `[batch, seq]`, *optional*): zero or `False` at pads, which weigh nothing
            and are taken for zeros, whatever they hold. They do take places in windows and steps of decay where they stand:
            models lay rows out before.
        segment_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): packed rows; each run of equal ids is a
            sequence of its own.
        state (`FocusState`, *optional*): what came before (causal only). No gradient flows into it.

    Returns:
        The output `[batch, seq, heads, head_dim]` in the dtype of `qfkv`, and the `FocusState` after the last token
        (`None` when bidirectional, and where `torch.export` leaves sizes open or `torch.func` is at work: then time is
        quadratic, too).

    Raises:
        TypeError, ValueError: for inputs of another dtype or shape, or a state in a bidirectional step.
    """
    parts = 3 if settings.query_gate == "none" else 4
    _check_inputs("qfkv", qfkv, [None, None, parts, None, None], settings, state)
    batch, seq, _, heads, head_dim = qfkv.shape
    channels = head_dim if parts == 3 else 2 * head_dim
    _check_companions(qfkv, (batch, seq, heads, channels), settings, decay, padding_mask, segment_ids, state)
    qfkv, mask = _blank_pads(qfkv, padding_mask)
    if state is None and _must_be_plain(qfkv):
        precise = qfkv.to(torch.promote_types(qfkv.dtype, torch.float32))
        masks = mask, segment_ids
        return naive_focus_mixing(precise, settings, decay, rotary, *masks, _means_by_matrix).to(qfkv.dtype), None
    cos, sin = (None, None) if rotary is None else rotary
    for name, table in (("rotary[0]", cos), ("rotary[1]", sin)):
        if table is None:
            continue
        rows = batch if isinstance(table, torch.Tensor) and table.shape[:1] == (batch,) else 1
        _check_tensor(name, table, qfkv, (rows, seq, head_dim), floating=True)
        if head_dim % 2:
            raise ValueError(f"`rotary` needs an even head dimension, got {head_dim}.")
    if rotary is not None and cos.shape != sin.shape:
        raise ValueError(f"`rotary` must be two tensors of one shape, got {list(cos.shape)} and {list(sin.shape)}.")
    past = (None, None) if state is None else (state.log_weights, state.values)
    out, *final = _FocusMixing.apply(qfkv, settings, decay, cos, sin, mask, _runs(segment_ids), *past)
    return out, FocusState(*final) if settings.causal else None


# ---------------------------------------------------------------------------------------------------------------------
# Means alone, for mixers that have their own arithmetic around them
# ---------------------------------------------------------------------------------------------------------------------


class _FocusMean(torch.autograd.Function):
    """Means alone. Between forward and backward it holds inputs, outputs and the logs of the summed weights."""

    @staticmethod
    @_in_full_precision
    def forward(ctx, logs, values, settings, decay, segments, state_logs, state_values):
        carry = None if state_logs is None else FocusState(state_logs, state_values)
        carry = _enter_state(carry, settings, segments)
        means, log_total, final = _means(logs, values, settings, decay, segments, carry)
        ctx.settings, ctx.decay, ctx.segments = settings, decay, segments
        ctx.save_for_backward(logs, values, means, log_total)
        if not settings.causal:
            return means, None, None
        final = [x.clone() for x in final[:2]]
        ctx.mark_non_differentiable(*final)
        return means, *final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_in_full_precision
    def backward(ctx, grad_means, *_):
        logs, values, means, log_total = ctx.saved_tensors
        grads = torch.cat((grad_means, (grad_means * means).sum(-1, keepdim=True)), dim=-1)
        arguments = logs, values, ctx.settings, ctx.decay, ctx.segments
        grad_logs, grad_values, factor, _ = _means_backward(grads, log_total, *arguments, None)
        return grad_logs, grad_values * factor, None, None, None, None, None


def focus_mean(
    log_weights: torch.Tensor,
    values: torch.Tensor,
    settings: FocusSettings,
    decay: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    state: FocusState | None = None,
) -> tuple[torch.Tensor, FocusState | None]:
    """Weighted means alone, without the arithmetic around them.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, seq, heads]`).
        values (`torch.Tensor` of shape `[batch, seq, heads, channels]`).
        settings (`FocusSettings`): of which `window`, `null_weight` and `causal` matter.
        decay, padding_mask, segment_ids, state: as in `focus_mixing`.

    Returns:
        Means of shape `[batch, seq, heads, channels]` in the dtype of `values`, and the `FocusState` after the last
        token (`None` where `focus_mixing` has none).

    Raises:
        TypeError, ValueError: for inputs of another dtype or shape, or a state in a bidirectional step.
    """
    _check_inputs("values", values, [*log_weights.shape, None], settings, state)
    _check_tensor("log_weights", log_weights, values, values.shape[:3], floating=True)
    _check_companions(values, values.shape, settings, decay, padding_mask, segment_ids, state)
    dtype = torch.promote_types(values.dtype, torch.float32)
    logs = log_weights.to(dtype)
    if padding_mask is not None:
        mask = padding_mask.bool().unsqueeze(-1)
        logs, values = logs.masked_fill(~mask, -math.inf), values.masked_fill(~mask.unsqueeze(-1), 0)
    if state is None and _must_be_plain(values):
        arguments = settings.window, decay, settings.null_weight, settings.causal, segment_ids
        return _means_by_matrix(logs, values.to(dtype), *arguments).to(values.dtype), None
    past = (None, None) if state is None else (state.log_weights, state.values)
    rows = logs.transpose(1, 2).contiguous(), values.to(dtype).transpose(1, 2).contiguous()
    means, *final = _FocusMean.apply(*rows, settings, decay, _runs(segment_ids), *past)
    return means.transpose(1, 2).to(values.dtype), FocusState(*final) if settings.causal else None


@torch.no_grad()
def token_state(
    qfkv: torch.Tensor,
    settings: FocusSettings,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    padding_mask: torch.Tensor | None = None,
) -> FocusState:
    """Log weights and values of tokens, as a windowed state holds them; the arguments are those of `focus_mixing`."""
    qfkv, mask = _blank_pads(qfkv, padding_mask)
    return FocusState(*_Block(qfkv, settings, None, rotary, mask, None).tokens[:2])


def _must_be_plain(x):
    """Whether plain operations are needed: where an export leaves sizes open, and under `torch.func.grad` and `vmap`."""
    return has_open_sizes(x) or is_transformed()


def _blank_pads(qfkv, padding_mask):
    """Zeros at pads: a weight of 0 would not keep a NaN out of a sum. And the mask as booleans."""
    if padding_mask is None:
        return qfkv, None
    mask = padding_mask.bool()
    return qfkv.masked_fill(~mask[..., None, None, None], 0), mask


def _check_inputs(name, tensor, shape, settings, state):
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {tensor.dtype}.")
    wrong = len(shape) != tensor.dim() or any(size not in (None, got) for size, got in zip(shape, tensor.shape))
    if wrong or 0 in tensor.shape:
        expected = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` must have shape [{expected}] with at least one token, got {list(tensor.shape)}.")
    if state is not None and not settings.causal:
        raise ValueError("`state` was given, but a bidirectional step has no past to continue from.")


def _check_companions(tensor, shape, settings, decay, padding_mask, segment_ids, state):
    """Check what comes with `tensor`, by the shape `[batch, seq, heads, channels]` of the means."""
    batch, seq, heads, channels = shape
    if decay is not None:
        _check_tensor("decay", decay, tensor, (heads,), floating=True)
    if padding_mask is not None:
        _check_tensor("padding_mask", padding_mask, tensor, (batch, seq))
    if segment_ids is not None:
        _check_tensor("segment_ids", segment_ids, tensor, (batch, seq), floating=False)
    if state is None:
        return
    past = ()
    if settings.window is not None:
        past = tuple(state.log_weights.shape[2:3])
        if len(past) != 1 or past[0] >= settings.window:
            raise ValueError(
                f"`state.log_weights` must be [batch, heads, past] of at most {settings.window - 1} tokens for a window of "
                f"{settings.window}, got {list(state.log_weights.shape)}."
            )
    _check_tensor("state.log_weights", state.log_weights, tensor, (batch, heads, *past), floating=True)
    _check_tensor("state.values", state.values, tensor, (batch, heads, *past, channels), floating=True)


def _check_tensor(name, tensor, like, shape, floating=None):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    if floating is not None and tensor.is_floating_point() != floating:
        raise TypeError(f"`{name}` must be {'floating point' if floating else 'integers'}, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {list(shape)}, got {list(tensor.shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device}, as the tokens are, got {tensor.device}.")


def _means_by_matrix(logs, values, window, decay, null_weight, causal, segment_ids):
    """What `naive_focus_mean` computes, as one product, quadratic in length."""
    settings = FocusSettings(scale=1.0, window=window, null_weight=null_weight, causal=causal)
    place, runs = torch.arange(logs.shape[1], device=logs.device), _runs(segment_ids)
    weights = _weight_matrix(logs.transpose(1, 2), settings, decay, place, place, runs, runs)
    return (weights @ values.transpose(1, 2)).transpose(1, 2)


def attention_matrix(
    log_weights: torch.Tensor,
    settings: FocusSettings,
    decay: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    positions: torch.LongTensor | None = None,
) -> torch.Tensor:
    """The weights `P` of the module's docstring as a matrix: quadratic in length, for looking at.

    Args:
        log_weights (`torch.Tensor` of shape `[batch, heads, seq]`): `-inf` at pads, which take no place in windows and no
            step of decay.
        settings, decay, segment_ids: as in `focus_mixing`.
        positions (`torch.LongTensor` of shape `[rows]`, *optional*): the rows to make; all when not given.

    Returns:
        `torch.Tensor` of shape `[batch, heads, rows, seq]`: row `i` holds the weights with which position `i` sees.
    """
    place = (log_weights[:, :1] != -math.inf).long().cumsum(-1)  # [batch, 1, seq]
    runs = _runs(segment_ids)
    rows = slice(None) if positions is None else positions
    here, own_runs = place[..., rows], None if runs is None else runs[:, rows]
    return _weight_matrix(log_weights, settings, decay, here, place, own_runs, runs)


def _weight_matrix(log_weights, settings, decay, here, place, own_runs, runs):
    """With the places and runs of the rows (`here`, `own_runs`) and of all positions."""
    distance = here.unsqueeze(-1) - place.unsqueeze(-2)
    allowed = distance >= 0 if settings.causal else torch.ones_like(distance, dtype=torch.bool)
    if settings.window is not None:
        allowed = allowed & (distance.abs() < settings.window)
    if runs is not None:
        allowed = allowed & same_segment(own_runs, runs)
    logits = log_weights.unsqueeze(-2)
    if decay is not None:
        logits = logits - decay.view(-1, 1, 1) * distance.abs()
    logits = torch.where(allowed, logits, -math.inf)
    if settings.null_weight:
        logits = nn.functional.pad(logits, (0, 1), value=math.log(settings.null_weight))
    weights = torch.softmax(logits, dim=-1)
    weights = torch.where((logits == -math.inf).all(-1, keepdim=True), 0.0, weights)  # a pad may see nothing at all
    return weights[..., :-1] if settings.null_weight else weights
