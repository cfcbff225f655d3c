"""The mixing step and its means in torch, tile by tile. It runs where there are no kernels.

`TiledMixing` is the whole mixing step, recomputed in its backward pass. `means` and `means_backward` are the means alone. The
arithmetic of one tile is in `running_mean.py`, the specification in `focus.py`.
"""

import math

import torch

from .focus_functions import NORM_EPS, OUTPUT_GATES, WEIGHT_FUNCTIONS, gate_value, log_weight, rotate
from .running_mean import EMPTY, FocusState, join_tokens, two_sided_mean, weighted_mean


_CPU_BLOCK = 2048  # tokens whose temporaries fit into the cache of a core


def means(logs, values, settings, alibi_slopes, segments, carry):
    """Means `[batch, heads, n, channels]`, logs of the summed weights `[batch, heads, n]`, and the carry that follows."""
    if settings.causal:
        log_total, means = weighted_mean(logs, values, settings.window, alibi_slopes, segments, carry)
        carry = _leave_state(logs, values, settings, segments, (log_total, means), carry)
    else:
        log_total, means = two_sided_mean(logs, values, settings.window, alibi_slopes, segments)
    if settings.sink_weight:
        seen = log_total
        log_total = torch.logaddexp(seen, seen.new_tensor(math.log(settings.sink_weight)))
        means = means * torch.exp(seen - log_total).unsqueeze(-1)
    return means, log_total, carry


def means_backward(grads, log_total, logs, values, settings, alibi_slopes, segments, carry):
    """Gradients of log weights and values, and the carry for the block before.

    With weights `P_ij`, `grad_values = P^T grad_means` and `grad_logs_j = values_j . grad_values_j - sum_i P_ij inner_i`,
    where `inner_i = grad_means_i . means_i`. As `P_ij = exp(l_j) exp(-log_total_i)`, a product with `P^T` is the same kind
    of mean in the other direction, with log weights `-log_total`.

    Args:
        grads (`torch.Tensor` of shape `[batch, heads, n, channels + 1]`): `grad_means`, and `inner` in the last channel.

    Returns:
        `grad_logs [batch, heads, n]`, `grad_values [batch, heads, n, channels]` without a factor `[batch, heads, n, 1]`,
        this factor, and the carry.
    """
    channels = values.shape[-1]
    reverse_logs = torch.where(log_total <= EMPTY / 2, -math.inf, -log_total)  # NaN stays
    if settings.causal:
        running = weighted_mean(reverse_logs, grads, settings.window, alibi_slopes, segments, carry, reverse=True)
        carry = _leave_state(reverse_logs, grads, settings, segments, running, carry, reverse=True)
    else:
        running = two_sided_mean(reverse_logs, grads, settings.window, alibi_slopes, segments)
    factor = torch.exp(logs + running[0])
    grad_values, inner = running[1][..., :channels], running[1][..., channels]
    grad_logs = ((grad_values * values).sum(-1) - inner) * factor
    return grad_logs, grad_values, factor.unsqueeze(-1), carry


def _leave_state(logs, values, settings, segments, running, carry, reverse=False):
    """The state after these tokens (before them when `reverse`)."""
    if settings.window is None:
        end = 0 if reverse else -1
        log_total, means = (x[:, :, end].clone() for x in running)
        return FocusState(log_total, means, None if segments is None else segments[:, end])
    count = settings.window - 1
    tokens = FocusState(logs, values, segments)
    if carry is not None and logs.shape[2] < count:
        tokens = join_tokens((tokens, carry) if reverse else (carry, tokens))
    length = tokens.log_weights.shape[2]
    kept = slice(0, count) if reverse else slice(max(length - count, 0), length)
    kept_segments = None if tokens.segments is None else tokens.segments[:, kept]
    return FocusState(tokens.log_weights[:, :, kept], tokens.values[:, :, kept], kept_segments)


def enter_state(state, settings, segments):
    """An initial state, with the segment of the first token."""
    if state is None or segments is None:
        return state
    first = segments[:, :1]
    return state._replace(segments=first[:, 0] if settings.window is None else first.expand(-1, state.values.shape[2]))


def standardize_forward(x):
    """`standardize` by the layer norm kernel, and the statistics for its backward pass."""
    size = x.shape[-1]
    y, mean, rstd = torch.native_layer_norm(x, [size], None, None, 1e-30)
    # From the biased deviation 1 / rstd to the unbiased one plus epsilon, relative to the former.
    divisor = rstd * NORM_EPS + math.sqrt(size / (size - 1))
    return y.div_(divisor), (x, mean, rstd, divisor)


def _standardize_backward(grad, stats):
    """Gradient of `standardize` by the layer norm kernel, exact by factors for each row, epsilon included."""
    x, mean, rstd, divisor = stats
    size = x.shape[-1]
    root = (math.sqrt(size / (size - 1)) / divisor).sqrt()
    grad = grad.mul_(root * math.sqrt((size - 1) / size))
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(grad, x, [size], mean, rstd * root, None, None, mask)[0]


class Block:
    """One block of the mixing step, forward and backward: the arithmetic around the means."""

    def __init__(self, raw, settings, alibi_slopes, rotary, padding_mask, segments):
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
        if settings.output_gate == "none":
            values = self.v.transpose(1, 2).contiguous()
        else:
            q, k = parts[:, :, 0], self.k
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            self.q = q.transpose(1, 2)
            values = torch.cat((k.transpose(1, 2), self.v.transpose(1, 2)), dim=-1)  # [batch, heads, n, 2 * head_dim]
        self.tokens = logs, values, settings, alibi_slopes, segments

    def forward(self, carry):
        """The mixing step's output `[batch, heads, n, head_dim]`, and the carry for the next block."""
        self.means, self.log_total, carry = means(*self.tokens, carry)
        if self.settings.output_gate == "none":
            return self.means, carry
        self.kbar, self.vbar = self.means.chunk(2, dim=-1)
        self.dot = (self.q * self.kbar).sum(-1)
        self.gate = gate_value(self.dot * self.settings.scale, self.settings.output_gate)
        return self.gate.unsqueeze(-1) * self.vbar, carry

    def backward(self, grad_out, carry):
        """Gradient of the raw parts `[batch, n, parts, heads, head_dim]`, and the carry for the block before."""
        settings, scale = self.settings, self.settings.scale
        grad_out = grad_out.to(self.v.dtype)  # [batch, heads, n, head_dim]
        channels = self.means.shape[-1]
        grad_means = self.means.new_empty(*self.means.shape[:-1], channels + 1)
        if settings.output_gate == "none":
            grad_means[..., :channels] = grad_out
            torch.sum(grad_out * self.means, -1, out=grad_means[..., channels])
        else:
            grad_gate = (grad_out * self.vbar).sum(-1)
            grad_dot = grad_gate * OUTPUT_GATES[settings.output_gate].slope(self.dot * scale, self.gate) * scale
            torch.mul(grad_dot.unsqueeze(-1), self.q, out=grad_means[..., : channels // 2])
            torch.mul(self.gate.unsqueeze(-1), grad_out, out=grad_means[..., channels // 2 : channels])
            torch.addcmul(grad_dot * self.dot, self.gate, grad_gate, out=grad_means[..., channels])
        grad_logs, grad_values, factor, carry = means_backward(grad_means, self.log_total, *self.tokens, carry)

        grad_logits = grad_logs.transpose(1, 2) * scale  # [batch, n, heads]
        grad_logits = (grad_logits * WEIGHT_FUNCTIONS[settings.weight_function].slope(self.logits)).unsqueeze(-1)
        grad_values, factor = grad_values.transpose(1, 2), factor.transpose(1, 2)
        batch, n, heads, head_dim = self.v.shape
        grads = grad_values.new_empty(batch, n, 3 if settings.output_gate == "none" else 4, heads, head_dim)
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
    """Ranges of rows and of tokens, in order of time, that fit into the cache of a core."""
    block = _CPU_BLOCK if device.type == "cpu" and not torch.compiler.is_compiling() else batch * seq
    if settings.window is not None:
        block = max(block, 4 * settings.window)
    rows = max(1, block // seq)
    length = block if settings.causal else seq
    times = [slice(start, min(start + length, seq)) for start in range(0, seq, length)]
    return [slice(row, min(row + rows, batch)) for row in range(0, batch, rows)], times


class TiledMixing:
    """One mixing step in torch: `forward`, then optionally `backward`. It keeps its input and one carry per block.

    Args:
        qfkv, settings, alibi_slopes, padding_mask, segments: as in `focus_mixing`, `segments` numbered by runs.
        rotary (`tuple` of cos and sin, *optional*): as in `focus_mixing`.
        past (`tuple` of log weights and values, *optional*): of the `FocusState` before the first token.
    """

    def __init__(self, qfkv, settings, alibi_slopes=None, rotary=None, padding_mask=None, segments=None, past=None):
        self.settings, self.alibi_slopes, self.rotary = settings, alibi_slopes, rotary
        self.padding_mask, self.segments, self.past = padding_mask, segments, past
        batch, seq = qfkv.shape[:2]
        self.rows, self.times = _block_ranges(batch, seq, settings, qfkv.device)
        self.carries: list[FocusState | None] | None = None  # kept by the forward pass for the backward pass

    @staticmethod
    def new_carries(qfkv: torch.Tensor, window: int | None) -> None:
        """No memory: the backward pass computes missing carries again."""
        return None

    def forward(
        self, qfkv: torch.Tensor, for_backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Output `[batch, seq, heads, head_dim]`, and log weights and values of the `FocusState` after the last token."""
        out = qfkv.new_empty(*qfkv.shape[:2], *qfkv.shape[3:])
        carries: list[FocusState | None] = []
        finals: list[FocusState] = []
        for row in self.rows:
            carry = None
            if self.past is not None:
                segments = None if self.segments is None else self.segments[row]
                logs, values = self.past
                carry = enter_state(FocusState(logs[row], values[row]), self.settings, segments)
            for time in self.times:
                if for_backward:
                    carries.append(None if carry is None else carry.map(torch.clone))
                part, carry = self._block(qfkv, row, time).forward(carry)
                out[row, time] = part.transpose(1, 2)
            if carry is not None:
                finals.append(carry)
        self.carries = carries if for_backward else None
        if not self.settings.causal:
            return out, None, None
        return out, torch.cat([final.log_weights for final in finals]), torch.cat([final.values for final in finals])

    def backward(self, qfkv: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient of `qfkv` from that of the output."""
        if self.carries is None:
            self.forward(qfkv, for_backward=True)
        assert self.carries is not None  # for type checkers
        grad = torch.empty_like(qfkv)
        carries = iter(reversed(self.carries))
        for row in reversed(self.rows):
            following = None
            for time in reversed(self.times):
                block = self._block(qfkv, row, time)
                block.forward(next(carries))
                grad[row, time], following = block.backward(grad_out[row, time].transpose(1, 2), following)
        return grad

    def _block(self, qfkv, row, time):
        rotary = self.rotary
        if rotary is not None:
            rotary = tuple((x if x.shape[0] == 1 else x[row])[:, time] for x in rotary)
        masks = (None if mask is None else mask[row, time] for mask in (self.padding_mask, self.segments))
        return Block(qfkv[row, time], self.settings, self.alibi_slopes, rotary, *masks)


__all__ = ["Block", "TiledMixing", "enter_state", "means", "means_backward", "standardize_forward"]
