"""The mixing step and its recurrent form on GPUs: Triton kernels that read the projections once and write the output once.

A program takes one head of one row and a chunk of its tokens. Inside a chunk the weights are a dense triangle, or a band
with a halo of the tokens before it, applied as a matrix product; all sums are in float32, relative to the largest log
weight among those that are summed, and nothing is subtracted from a sum.

Global means need what came before the chunk. Each program publishes the summed weights and values of its chunk, waits for
those of the chunks before it in its group of `_GROUP`, and takes what precedes the group from the last program of the
previous group, which combines and publishes that in turn. The order of summation is fixed, so results do not depend on
timing. Programs number themselves when they start, so that a program only ever waits for programs that have started.
The backward pass does the same from the end; it recomputes the means from the carries that the forward pass kept.

Without Triton or a CUDA device, `is_supported` is false and all of this is done in torch.
"""

import math

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 64  # window
_WIDEST_OF_WIDE = 33  # window of heads of more than 64 channels
_MOST_DIM = 256
_GROUP = 32  # chunks, one bit each of a word
# Floats of a record before its sums: log of the reference, sum of weights, whether the past passes, nothing.
_HEADER = 4


def is_supported(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the kernels run this mixing step in eager mode."""
    return (
        type(qfkv) in (torch.Tensor, torch.nn.Parameter)  # not one of tracing, which has no memory
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and takes(qfkv, settings, rotary)
    )


def takes(qfkv: torch.Tensor, settings, rotary: tuple | None = None) -> bool:
    """Whether the kernels can take this mixing step: causal, on a CUDA device, windows up to 64, heads up to 256 channels.

    Heads of more than 64 channels have windows up to 33 here.
    """
    widest = _WIDEST if qfkv.shape[-1] <= 64 else _WIDEST_OF_WIDE
    return (
        triton is not None
        and qfkv.device.type in _DEVICES
        and qfkv.dtype in _DTYPES
        and settings.causal
        and None not in settings.kernels
        and (settings.window is None or settings.window <= widest)
        and 1 < qfkv.shape[-1] <= _MOST_DIM
        and qfkv.shape[0] > 0
        and (rotary is None or (rotary[0].dtype == torch.float32 and qfkv.shape[-1] % 2 == 0))
    )


if triton is not None:
    # Stand for log(0), finite so that no difference is NaN: of a masked token, and, above it, of a sum over no tokens.
    _NOTHING = tl.constexpr(-1e30)
    _EMPTY = tl.constexpr(-1e29)

    @triton.jit
    def _channels(D: tl.constexpr, DP: tl.constexpr):
        """Which channel of a head each place of a padded row holds, and whether it holds one. Halves stay halves."""
        place = tl.arange(0, DP)
        channel, inside = place, place < D
        if D != DP:
            if D % 2 == 0:
                inside = tl.where(place >= DP // 2, place - DP // 2, place) < D // 2
                channel = tl.where(place >= DP // 2, place - DP // 2 + D // 2, place)
        return channel, inside

    @triton.jit
    def _load(base, local, stride, here, D: tl.constexpr, DP: tl.constexpr):
        """Rows `[tokens, DP]` in float32, zero where there is no token or channel."""
        channel, inside = _channels(D, DP)
        kept = here[:, None]
        if D != DP:
            kept = kept & inside[None, :]
        return tl.load(base + local[:, None] * stride + channel[None, :], mask=kept, other=0.0).to(tl.float32)

    @triton.jit
    def _store(base, local, stride, here, rows, D: tl.constexpr, DP: tl.constexpr):
        channel, inside = _channels(D, DP)
        kept = here[:, None]
        if D != DP:
            kept = kept & inside[None, :]
        tl.store(base + local[:, None] * stride + channel[None, :], rows.to(base.dtype.element_ty), mask=kept)

    @triton.jit
    def _part(base, local, stride, here, D: tl.constexpr, DP: tl.constexpr, NORMALIZE: tl.constexpr):
        """Rows as the mixing step has them, their standard deviations, and the factors that standardised them."""
        x = _load(base, local, stride, here, D, DP)
        deviation = tl.sum(x, 1)
        factor = deviation
        if NORMALIZE:
            _, inside = _channels(D, DP)
            x = tl.where(inside[None, :], x - (deviation / D)[:, None], 0.0)
            deviation = tl.sqrt(tl.maximum(tl.sum(x * x, 1) / (D - 1), 1e-24))
            factor = 1.0 / (deviation + 1e-5)
            x = x * factor[:, None]
        return x, deviation, factor

    @triton.jit
    def _part_backward(grad, y, deviation, factor, D: tl.constexpr, NORMALIZE: tl.constexpr):
        """From the gradient of standardised rows to that of the rows; padded channels come out wrong and are not stored."""
        if NORMALIZE:
            slope = tl.sum(grad * y, 1) / (deviation * (D - 1))
            grad = (grad - (tl.sum(grad, 1) / D)[:, None]) * factor[:, None] - y * slope[:, None]
        return grad

    @triton.jit
    def _swap(x, N: tl.constexpr, DP: tl.constexpr):
        """`(low, high)` halves of rows -> `(-high, low)`."""
        low, high = tl.split(tl.permute(tl.reshape(x, (N, 2, DP // 2)), (0, 2, 1)))
        return tl.reshape(tl.permute(tl.join(-high, low), (0, 2, 1)), (N, DP))

    @triton.jit
    def _turn(x, cos, sin, local, here, sign, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """Rotary positions; with sign -1, of gradients back."""
        return x * _load(cos, local, D, here, D, DP) + _swap(x, N, DP) * (_load(sin, local, D, here, D, DP) * sign)

    @triton.jit
    def _log_weight(logit, here, mask, local, ELU: tl.constexpr):
        log = logit
        if ELU:
            log = tl.where(logit > 0, tl.log(1.0 + tl.maximum(logit, 0.0)), logit)
        if mask is not None:
            here = here & (tl.load(mask + local, mask=here, other=0) != 0)
        return tl.where(here, log, _NOTHING)

    @triton.jit
    def _sigmoid(x):
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)

    @triton.jit
    def _gate_value(x, GATE: tl.constexpr):
        if GATE == 1:
            gate = _sigmoid(x)
        else:
            gate = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        return gate

    @triton.jit
    def _gate_slope(x, gate, GATE: tl.constexpr):
        if GATE == 1:
            slope = gate * _sigmoid(-x)
        else:
            slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return slope

    @triton.jit
    def _exponents(logs, query, key, query_segment, key_segment, slope, window, SEGMENTS: tl.constexpr):
        """Log weights `[queries, keys]` with which queries see keys, by their places; without a window, `window` is None."""
        distance = query[:, None] - key[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if SEGMENTS:
            seen = seen & (query_segment[:, None] == key_segment[None, :])
        return tl.where(seen, logs[None, :] - slope * distance.to(tl.float32), _NOTHING)

    @triton.jit
    def _share(total):
        return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)

    @triton.jit
    def _write_record(record, reference, total, passes, keys, values, GATED: tl.constexpr, DP: tl.constexpr):
        place = tl.arange(0, DP)
        tl.store(record, reference)
        tl.store(record + 1, total)
        tl.store(record + 2, passes)
        tl.store(record + 4 + place, values)
        if GATED:
            tl.store(record + 4 + DP + place, keys)

    @triton.jit
    def _read_record(record, GATED: tl.constexpr, DP: tl.constexpr):
        place = tl.arange(0, DP)
        values = tl.load(record + 4 + place, cache_modifier=".cg")
        keys = values
        if GATED:
            keys = tl.load(record + 4 + DP + place, cache_modifier=".cg")
        return tl.load(record, cache_modifier=".cg"), tl.load(record + 1, cache_modifier=".cg"), keys, values

    @triton.jit
    def _combine(
        records, inside, slope, reference, total, keys, values,
        GATED: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """What precedes a group, joined by the first `inside` chunks of it; `slope` is the ALiBi bias of a chunk."""
        k = tl.arange(0, GROUP)
        record = records + k * (4 + (1 + GATED) * DP)
        some = k < inside
        passes = tl.load(record + 2, mask=some, other=1.0, cache_modifier=".cg")
        cut = tl.max(tl.where(passes == 0, k, -1), 0)
        some = some & (k >= cut)
        logs = tl.load(record, mask=some, other=_NOTHING, cache_modifier=".cg")
        logs = tl.where(some, logs - slope * (inside - 1 - k).to(tl.float32), _NOTHING)
        reference = tl.where(cut < 0, reference - slope * inside, _NOTHING)
        top = tl.maximum(tl.maximum(tl.max(logs, 0), reference), _EMPTY)
        weights, own = tl.exp(logs - top), tl.exp(reference - top)
        sums = tl.load(record + 1, mask=some, other=0.0, cache_modifier=".cg")
        total = tl.sum(weights * sums, 0) + own * total
        place = tl.arange(0, DP)
        rows = tl.load(record[:, None] + 4 + place[None, :], mask=some[:, None], other=0.0, cache_modifier=".cg")
        values = tl.sum(weights[:, None] * rows, 0) + own * values
        if GATED:
            rows = tl.load(
                record[:, None] + 4 + DP + place[None, :], mask=some[:, None], other=0.0, cache_modifier=".cg"
            )
            keys = tl.sum(weights[:, None] * rows, 0) + own * keys
        else:
            keys = values
        return top, total, keys, values

    @triton.jit
    def _before(
        records, ends, words, row, index, chunks, slope, reference, total, keys, values,
        GATED: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Wait for the chunks before the `index`-th of a row, and combine them with what precedes the row."""
        size: tl.constexpr = 4 + (1 + GATED) * DP
        groups = (chunks + GROUP - 1) // GROUP
        group, inside = index // GROUP, index % GROUP
        word = words + 1 + row * groups + group
        wanted = (1 << inside) - 1
        ready = tl.atomic_or(word, 0, sem="acquire")
        while (ready & wanted) != wanted:
            ready = tl.atomic_or(word, 0, sem="acquire")
        if group > 0:
            ready = tl.atomic_or(word - 1, 0, sem="acquire")
            while ((ready >> (GROUP - 1)) & 1) == 0:  # until the last chunk of that group is in
                ready = tl.atomic_or(word - 1, 0, sem="acquire")
            end = ends + (row * groups + group - 1).to(tl.int64) * size
            reference, total, keys, values = _read_record(end, GATED, DP)
        records = records + (row * chunks + group * GROUP).to(tl.int64) * size
        return _combine(records, inside, slope, reference, total, keys, values, GATED, DP, GROUP)

    @triton.jit
    def _announce(words, row, index, chunks, GROUP: tl.constexpr):
        """Tell the others that the record of the `index`-th chunk of a row is written."""
        groups = (chunks + GROUP - 1) // GROUP
        tl.debug_barrier()
        tl.atomic_or(words + 1 + row * groups + index // GROUP, 1 << (index % GROUP), sem="release")

    @triton.jit
    def _join(reference, total, keys, values, slope, passes, own_reference, own_total, own_keys, own_values):
        """What precedes a chunk and the chunk itself."""
        reference = tl.where(passes > 0, reference - slope, _NOTHING)
        top = tl.maximum(tl.maximum(reference, own_reference), _EMPTY)
        past, own = tl.exp(reference - top), tl.exp(own_reference - top)
        total = past * total + own * own_total
        return top, total, past * keys + own * own_keys, past * values + own * own_values

    @triton.jit
    def _triangle(
        logs, carry_log, carry_total, local, segment, segment_before, slope, log_sink, SEGMENTS: tl.constexpr,
        NULL: tl.constexpr,
    ):  # fmt: skip
        """Weights of a chunk's tokens `[queries, keys]` and of what precedes it `[queries]`, and logs of the totals."""
        exponents = _exponents(logs, local, local, segment, segment, slope, None, SEGMENTS)
        before = carry_log - slope * (local + 1).to(tl.float32)
        if SEGMENTS:
            before = tl.where(segment == segment_before, before, _NOTHING)
        top = tl.maximum(tl.maximum(tl.max(exponents, 1), before), _EMPTY)
        if NULL:
            top = tl.maximum(top, log_sink)
        weights, past = tl.exp(exponents - top[:, None]), tl.exp(before - top)
        total = tl.sum(weights, 1) + past * carry_total
        if NULL:
            total += tl.exp(log_sink - top)
        share = _share(total)
        log_total = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), _NOTHING)
        return weights * share[:, None], past * share, log_total

    @triton.jit
    def _bands(a, b, log_sink, NULL: tl.constexpr):
        """Weights of two sets of keys from their exponents `[queries, keys]`."""
        top = tl.maximum(tl.maximum(tl.max(a, 1), tl.max(b, 1)), _EMPTY)
        if NULL:
            top = tl.maximum(top, log_sink)
        a, b = tl.exp(a - top[:, None]), tl.exp(b - top[:, None])
        total = tl.sum(a, 1) + tl.sum(b, 1)
        if NULL:
            total += tl.exp(log_sink - top)
        share = _share(total)
        return a * share[:, None], b * share[:, None]

    @triton.jit
    def _halo(
        base, cos, sin, mask, past_logs, past_values, row, local, first, stride, part, past, scale,
        D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr, NORMALIZE: tl.constexpr,
        ELU: tl.constexpr,
    ):  # fmt: skip
        """Log weights, rotated keys and values of tokens before a chunk, of the state where they precede the row."""
        here = first + local >= 0
        f = _part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)[0]
        k = _part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        v = _part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        logs = _log_weight(tl.sum(f * k, 1) * scale, here, mask, local, ELU)
        if GATED:
            if cos is not None:
                k = _turn(k, cos, sin, local, here, 1.0, N, D, DP)
        if past_logs is not None:
            old = past + first + local
            held = (old >= 0) & (old < past)
            channels: tl.constexpr = (1 + GATED) * D
            state = past_values + row.to(tl.int64) * past * channels
            logs = tl.where(here, logs, tl.load(past_logs + row * past + old, mask=held, other=_NOTHING))
            logs = tl.where(logs > _EMPTY, logs, _NOTHING)
            v += _load(state + GATED * D, old, channels, held, D, DP)
            if GATED:
                k += _load(state, old, channels, held, D, DP)
        return logs, k, v

    @triton.jit
    def _segments_of(segments, local, first, seq):
        """Segments of tokens by place; those before the row belong to its first one."""
        t = tl.minimum(tl.maximum(first + local, 0), seq - 1)
        return tl.load(segments + t)

    @triton.jit(do_not_specialize=["seq", "rows", "chunks", "window", "past", "kept"])
    def _forward(
        qfkv, out, alibi_slopes, cos, sin, mask, segments, past_logs, past_values, final_logs, final_values,
        records, ends, words, carries, seq, heads, rows, chunks, window, past, kept, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, HALO: tl.constexpr, GROUP: tl.constexpr,
        NORMALIZE: tl.constexpr, ELU: tl.constexpr, GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        SEGMENTS: tl.constexpr = segments is not None
        order = tl.program_id(0)
        if window is None:
            order = tl.atomic_add(words, 1)
        index, row = order // rows, order % rows
        b, h = (row // heads).to(tl.int64), row % heads
        first = index * T
        local = tl.arange(0, T)
        here = first + local < seq
        part = heads * D
        stride = (3 + GATED) * part
        base = qfkv + (b * seq + first) * stride + h * D
        if mask is not None:
            mask += b * seq + first
        if cos is not None:
            cos += b * rotary_stride + first.to(tl.int64) * D
            sin += b * rotary_stride + first.to(tl.int64) * D
        slope = 0.0
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + h)
        segment = local
        segment_before = 0
        if SEGMENTS:
            segments += b * seq
            segment = _segments_of(segments, local, first, seq)
            segment_before = tl.load(segments + tl.maximum(first - 1, 0))

        f = _part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)[0]
        k = _part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        v = _part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        q = v
        if GATED:
            q = _part(base, local, stride, here, D, DP, NORMALIZE)[0]
        logs = _log_weight(tl.sum(f * k, 1) * scale, here, mask, local, ELU)
        if GATED:
            if cos is not None:
                k = _turn(k, cos, sin, local, here, 1.0, T, D, DP)
                q = _turn(q, cos, sin, local, here, 1.0, T, D, DP)

        channel, inside = _channels(D, DP)
        channels: tl.constexpr = (1 + GATED) * D
        kbar = k
        if window is not None:
            if final_logs is not None:
                slot = first + local - (seq - kept)
                kept_here = here & (slot >= 0)
                tl.store(final_logs + row * kept + slot, tl.where(logs > _EMPTY, logs, float("-inf")), mask=kept_here)
                state = final_values + row.to(tl.int64) * kept * channels
                _store(state + GATED * D, slot, channels, kept_here, v, D, DP)
                if GATED:
                    _store(state, slot, channels, kept_here, k, D, DP)
            before = tl.arange(0, HALO) - HALO
            halo_logs, halo_k, halo_v = _halo(
                base, cos, sin, mask, past_logs, past_values, row, before, first, stride, part, past, scale,
                D, DP, HALO, GATED, NORMALIZE, ELU,
            )  # fmt: skip
            halo_segment = before
            if SEGMENTS:
                halo_segment = _segments_of(segments, before, first, seq)
            weights, halo_weights = _bands(
                _exponents(logs, local, local, segment, segment, slope, window, SEGMENTS),
                _exponents(halo_logs, local, before, segment, halo_segment, slope, window, SEGMENTS),
                log_sink,
                NULL,
            )
            vbar = tl.dot(halo_weights, halo_v, input_precision=PRECISION)
            vbar = tl.dot(weights, v, vbar, input_precision=PRECISION)
            if GATED:
                kbar = tl.dot(halo_weights, halo_k, input_precision=PRECISION)
                kbar = tl.dot(weights, k, kbar, input_precision=PRECISION)
        else:
            size: tl.constexpr = 4 + (1 + GATED) * DP
            count = tl.minimum(seq - first, T)
            ending = logs - slope * (count - 1 - local).to(tl.float32)
            passes = tl.full((), 1.0, tl.float32)
            if SEGMENTS:
                segment_after = tl.load(segments + first + count - 1)
                passes = (segment_before == segment_after).to(tl.float32)
                ending = tl.where(segment == segment_after, ending, _NOTHING)
            ending = tl.where(logs > _EMPTY, ending, _NOTHING)
            own_reference = tl.maximum(tl.max(ending, 0), _EMPTY)
            weight = tl.exp(ending - own_reference)
            own_total = tl.sum(weight, 0)
            own_v = tl.sum(weight[:, None] * v, 0)
            own_k = own_v
            if GATED:
                own_k = tl.sum(weight[:, None] * k, 0)
            record = records + (row * chunks + index).to(tl.int64) * size
            _write_record(record, own_reference, own_total, passes, own_k, own_v, GATED, DP)
            if index % GROUP < GROUP - 1:
                _announce(words, row, index, chunks, GROUP)

            reference = tl.full((), _NOTHING, tl.float32)
            total = tl.full((), 0.0, tl.float32)
            past_k = tl.zeros([DP], tl.float32)
            past_v = tl.zeros([DP], tl.float32)
            if past_logs is not None:
                reference = tl.load(past_logs + row)
                total = tl.where(reference > _EMPTY, 1.0, 0.0)
                reference = tl.where(reference > _EMPTY, reference, _NOTHING)
                past_v = tl.load(past_values + row * channels + GATED * D + channel, mask=inside, other=0.0)
                if GATED:
                    past_k = tl.load(past_values + row * channels + channel, mask=inside, other=0.0)
            reference, total, past_k, past_v = _before(
                records, ends, words, row, index, chunks, slope * T, reference, total, past_k, past_v, GATED, DP, GROUP
            )
            after, after_total, after_k, after_v = _join(
                reference, total, past_k, past_v, slope * count, passes, own_reference, own_total, own_k, own_v
            )
            if index % GROUP == GROUP - 1:
                groups = (chunks + GROUP - 1) // GROUP
                end = ends + (row * groups + index // GROUP).to(tl.int64) * size
                _write_record(end, after, after_total, 1.0, after_k, after_v, GATED, DP)
                _announce(words, row, index, chunks, GROUP)
            if carries is not None:
                record = carries + (row * chunks + index).to(tl.int64) * size
                _write_record(record, reference, total, 1.0, past_k, past_v, GATED, DP)
            if index == chunks - 1:
                share = _share(after_total)
                log_total = tl.log(tl.where(after_total > 0, after_total, 1.0))
                tl.store(final_logs + row, tl.where(after_total > 0, after + log_total, _EMPTY))
                tl.store(final_values + row * channels + GATED * D + channel, after_v * share, mask=inside)
                if GATED:
                    tl.store(final_values + row * channels + channel, after_k * share, mask=inside)
            weights, past_weights, _ = _triangle(
                logs, reference, total, local, segment, segment_before, slope, log_sink, SEGMENTS, NULL
            )
            vbar = tl.dot(weights, v, past_weights[:, None] * past_v[None, :], input_precision=PRECISION)
            if GATED:
                kbar = tl.dot(weights, k, past_weights[:, None] * past_k[None, :], input_precision=PRECISION)
        if GATED:
            vbar = vbar * _gate_value(tl.sum(q * kbar, 1) * scale, GATE)[:, None]
        _store(out + (b * seq + first) * part + h * D, local, part, here, vbar, D, DP)

    @triton.jit
    def _gate_gradients(
        grad_base, local, stride, here, q, kbar, vbar, scale, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr
    ):
        """Gradients of a token's means of keys and values, its gradient . mean, and that of its product with the query."""
        grad = _load(grad_base, local, stride, here, D, DP)
        slope = tl.sum(grad * vbar, 1)
        inner, grad_product, grad_k = slope, slope, grad
        if GATE:
            product = tl.sum(q * kbar, 1)
            gate = _gate_value(product * scale, GATE)
            grad_product = slope * _gate_slope(product * scale, gate, GATE) * scale
            inner = slope * gate + grad_product * product
            grad_k = grad_product[:, None] * q
            grad = grad * gate[:, None]
        return grad_k, grad, inner, grad_product

    @triton.jit
    def _store_gradients(
        grad_base, cos, sin, local, stride, part, here, scale, logit, logs, grad_k, grad_v, inner, grad_product, kbar,
        q, f, k, v, q_deviation, q_factor, f_deviation, f_factor, k_deviation, k_factor, v_deviation, v_factor,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr, NORMALIZE: tl.constexpr,
        ELU: tl.constexpr, turned_k,
    ):  # fmt: skip
        """From gradients of what is averaged to those of the projections; `q`, `f`, `k` and `v` are standardised."""
        grad_log = tl.sum(grad_v * v, 1) - inner
        if GATED:
            grad_log += tl.sum(grad_k * turned_k, 1)
        grad_logit = tl.where(logs > _EMPTY, grad_log, 0.0) * scale
        if ELU:
            grad_logit = grad_logit / (1.0 + tl.maximum(logit, 0.0))
        grad = _part_backward(grad_logit[:, None] * k, f, f_deviation, f_factor, D, NORMALIZE)
        _store(grad_base + GATED * part, local, stride, here, grad, D, DP)
        grad = _part_backward(grad_v, v, v_deviation, v_factor, D, NORMALIZE)
        _store(grad_base + (2 + GATED) * part, local, stride, here, grad, D, DP)
        grad = grad_logit[:, None] * f
        if GATED:
            grad_q = grad_product[:, None] * kbar
            if cos is not None:
                grad_q = _turn(grad_q, cos, sin, local, here, -1.0, T, D, DP)
                grad_k = _turn(grad_k, cos, sin, local, here, -1.0, T, D, DP)
            grad_q = _part_backward(grad_q, q, q_deviation, q_factor, D, NORMALIZE)
            _store(grad_base, local, stride, here, grad_q, D, DP)
            grad += grad_k
        grad = _part_backward(grad, k, k_deviation, k_factor, D, NORMALIZE)
        _store(grad_base + (1 + GATED) * part, local, stride, here, grad, D, DP)

    @triton.jit(do_not_specialize=["seq", "rows", "chunks", "window", "past"])
    def _backward(
        qfkv, grad_out, grad_in, alibi_slopes, cos, sin, mask, segments, past_logs, past_values,
        records, ends, words, carries, seq, heads, rows, chunks, window, past, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, HALO: tl.constexpr, GROUP: tl.constexpr,
        NORMALIZE: tl.constexpr, ELU: tl.constexpr, GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        SEGMENTS: tl.constexpr = segments is not None
        order = tl.program_id(0)
        if window is None:
            order = tl.atomic_add(words, 1)
        index, row = order // rows, order % rows  # counted from the end
        chunk = chunks - 1 - index
        b, h = (row // heads).to(tl.int64), row % heads
        first = chunk * T
        local = tl.arange(0, T)
        here = first + local < seq
        part = heads * D
        stride = (3 + GATED) * part
        base = qfkv + (b * seq + first) * stride + h * D
        grad_base = grad_in + (b * seq + first) * stride + h * D
        out_base = grad_out + (b * seq + first) * part + h * D
        if mask is not None:
            mask += b * seq + first
        if cos is not None:
            cos += b * rotary_stride + first.to(tl.int64) * D
            sin += b * rotary_stride + first.to(tl.int64) * D
        slope = 0.0
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + h)
        segment = local
        segment_before = 0
        if SEGMENTS:
            segments += b * seq
            segment = _segments_of(segments, local, first, seq)
            segment_before = tl.load(segments + tl.maximum(first - 1, 0))

        f, f_deviation, f_factor = _part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)
        k, k_deviation, k_factor = _part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)
        v, v_deviation, v_factor = _part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)
        q, q_deviation, q_factor = v, v_deviation, v_factor
        if GATED:
            q, q_deviation, q_factor = _part(base, local, stride, here, D, DP, NORMALIZE)
        logit = tl.sum(f * k, 1) * scale
        logs = _log_weight(logit, here, mask, local, ELU)
        turned_q, turned_k = q, k
        if GATED:
            if cos is not None:
                turned_q = _turn(q, cos, sin, local, here, 1.0, T, D, DP)
                turned_k = _turn(k, cos, sin, local, here, 1.0, T, D, DP)

        kbar = k
        if window is not None:
            before = tl.arange(0, HALO) - HALO
            halo_logs, halo_k, halo_v = _halo(
                base, cos, sin, mask, past_logs, past_values, row, before, first, stride, part, past, scale,
                D, DP, HALO, GATED, NORMALIZE, ELU,
            )  # fmt: skip
            halo_segment = before
            if SEGMENTS:
                halo_segment = _segments_of(segments, before, first, seq)
            weights, halo_weights = _bands(
                _exponents(logs, local, local, segment, segment, slope, window, SEGMENTS),
                _exponents(halo_logs, local, before, segment, halo_segment, slope, window, SEGMENTS),
                log_sink,
                NULL,
            )
            vbar = tl.dot(halo_weights, halo_v, input_precision=PRECISION)
            vbar = tl.dot(weights, v, vbar, input_precision=PRECISION)
            if GATED:
                kbar = tl.dot(halo_weights, halo_k, input_precision=PRECISION)
                kbar = tl.dot(weights, turned_k, kbar, input_precision=PRECISION)
            grad_kbar, grad_vbar, inner, grad_product = _gate_gradients(
                out_base, local, part, here, turned_q, kbar, vbar, scale, D, DP, GATE
            )
            back = tl.trans(weights)
            grad_v = tl.dot(back, grad_vbar, input_precision=PRECISION)
            grad_k = grad_v
            if GATED:
                grad_k = tl.dot(back, grad_kbar, input_precision=PRECISION)
            grad_inner = tl.sum(weights * inner[:, None], 0)

            # The tokens after the chunk whose windows reach into it.
            after = tl.arange(0, HALO) + T
            there = first + after < seq
            next_f = _part(base + GATED * part, after, stride, there, D, DP, NORMALIZE)[0]
            next_k = _part(base + (1 + GATED) * part, after, stride, there, D, DP, NORMALIZE)[0]
            next_v = _part(base + (2 + GATED) * part, after, stride, there, D, DP, NORMALIZE)[0]
            next_q = next_v
            next_logs = _log_weight(tl.sum(next_f * next_k, 1) * scale, there, mask, after, ELU)
            if GATED:
                next_q = _part(base, after, stride, there, D, DP, NORMALIZE)[0]
                if cos is not None:
                    next_q = _turn(next_q, cos, sin, after, there, 1.0, HALO, D, DP)
                    next_k = _turn(next_k, cos, sin, after, there, 1.0, HALO, D, DP)
            next_segment = after
            if SEGMENTS:
                next_segment = _segments_of(segments, after, first, seq)
            weights, halo_weights = _bands(
                _exponents(logs, after, local, next_segment, segment, slope, window, SEGMENTS),
                _exponents(next_logs, after, after, next_segment, next_segment, slope, window, SEGMENTS),
                log_sink,
                NULL,
            )
            vbar = tl.dot(halo_weights, next_v, input_precision=PRECISION)
            vbar = tl.dot(weights, v, vbar, input_precision=PRECISION)
            next_kbar = vbar
            if GATED:
                next_kbar = tl.dot(halo_weights, next_k, input_precision=PRECISION)
                next_kbar = tl.dot(weights, turned_k, next_kbar, input_precision=PRECISION)
            grad_kbar, grad_vbar, inner, _ = _gate_gradients(
                out_base, after, part, there, next_q, next_kbar, vbar, scale, D, DP, GATE
            )
            back = tl.trans(weights)
            grad_v = tl.dot(back, grad_vbar, grad_v, input_precision=PRECISION)
            if GATED:
                grad_k = tl.dot(back, grad_kbar, grad_k, input_precision=PRECISION)
            grad_inner += tl.sum(weights * inner[:, None], 0)
        else:
            size: tl.constexpr = 4 + (1 + GATED) * DP
            record = carries + (row * chunks + chunk).to(tl.int64) * size
            reference, total, past_k, past_v = _read_record(record, GATED, DP)
            weights, past_weights, log_total = _triangle(
                logs, reference, total, local, segment, segment_before, slope, log_sink, SEGMENTS, NULL
            )
            vbar = tl.dot(weights, v, past_weights[:, None] * past_v[None, :], input_precision=PRECISION)
            if GATED:
                kbar = tl.dot(weights, turned_k, past_weights[:, None] * past_k[None, :], input_precision=PRECISION)
            grad_kbar, grad_vbar, inner, grad_product = _gate_gradients(
                out_base, local, part, here, turned_q, kbar, vbar, scale, D, DP, GATE
            )

            # What this chunk's queries hand to the tokens before it.
            seen = here & (log_total > _EMPTY)
            passes = tl.full((), 1.0, tl.float32)
            segment_after = 0
            if SEGMENTS:
                own_first = tl.load(segments + first)
                segment_after = tl.load(segments + tl.minimum(first + T, seq - 1))
                passes = (own_first == segment_after).to(tl.float32)
                sent = seen & (segment == own_first)
            else:
                sent = seen
            leaving = tl.where(sent, -log_total - slope * local.to(tl.float32), _NOTHING)
            own_reference = tl.maximum(tl.max(leaving, 0), _EMPTY)
            weight = tl.exp(leaving - own_reference)
            own_inner = tl.sum(weight * inner, 0)
            own_v = tl.sum(weight[:, None] * grad_vbar, 0)
            own_k = own_v
            if GATED:
                own_k = tl.sum(weight[:, None] * grad_kbar, 0)
            record = records + (row * chunks + index).to(tl.int64) * size
            _write_record(record, own_reference, own_inner, passes, own_k, own_v, GATED, DP)
            if index % GROUP < GROUP - 1:
                _announce(words, row, index, chunks, GROUP)
            reference = tl.full((), _NOTHING, tl.float32)
            later_inner = tl.full((), 0.0, tl.float32)
            later_k = tl.zeros([DP], tl.float32)
            later_v = tl.zeros([DP], tl.float32)
            reference, later_inner, later_k, later_v = _before(
                records, ends, words, row, index, chunks, slope * T, reference, later_inner, later_k, later_v, GATED, DP,
                GROUP,
            )  # fmt: skip
            if index % GROUP == GROUP - 1:
                end, end_inner, end_k, end_v = _join(
                    reference, later_inner, later_k, later_v, slope * T, passes, own_reference, own_inner, own_k, own_v
                )
                groups = (chunks + GROUP - 1) // GROUP
                record = ends + (row * groups + index // GROUP).to(tl.int64) * size
                _write_record(record, end, end_inner, 1.0, end_k, end_v, GATED, DP)
                _announce(words, row, index, chunks, GROUP)

            factor = tl.minimum(logs - slope * (T - local).to(tl.float32) + reference, 0.0)
            if SEGMENTS:
                factor = tl.where(segment == segment_after, factor, _NOTHING)
            factor = tl.exp(factor)
            back = tl.trans(weights)
            grad_v = tl.dot(back, grad_vbar, factor[:, None] * later_v[None, :], input_precision=PRECISION)
            grad_k = grad_v
            if GATED:
                grad_k = tl.dot(back, grad_kbar, factor[:, None] * later_k[None, :], input_precision=PRECISION)
            grad_inner = tl.sum(weights * inner[:, None], 0) + factor * later_inner
        _store_gradients(
            grad_base, cos, sin, local, stride, part, here, scale, logit, logs, grad_k, grad_v, grad_inner, grad_product,
            kbar, q, f, k, v, q_deviation, q_factor, f_deviation, f_factor, k_deviation, k_factor, v_deviation, v_factor,
            D, DP, T, GATED, NORMALIZE, ELU, turned_k,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["window", "held"])
    def _step(
        qfkv, out, alibi_slopes, cos, sin, state, heads, window, held, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, HELD: tl.constexpr, NORMALIZE: tl.constexpr, ELU: tl.constexpr, GATE: tl.constexpr,
        NULL: tl.constexpr, GATED: tl.constexpr, BOUNDED: tl.constexpr,
    ):  # fmt: skip
        """One token of one head and row; the state is laid out as `pack_state` says."""
        row = tl.program_id(0)
        b, h = row // heads, row % heads
        part = heads * D
        base = qfkv + b.to(tl.int64) * (3 + GATED) * part + h * D
        local = tl.arange(0, 1)
        here = local == 0
        if cos is not None:
            cos += b * rotary_stride
            sin += b * rotary_stride
        slope = 0.0
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + h)
        f = _part(base + GATED * part, local, 0, here, D, DP, NORMALIZE)[0]
        k = _part(base + (1 + GATED) * part, local, 0, here, D, DP, NORMALIZE)[0]
        v = _part(base + (2 + GATED) * part, local, 0, here, D, DP, NORMALIZE)[0]
        q = v
        log = tl.sum(_log_weight(tl.sum(f * k, 1) * scale, here, None, local, ELU), 0)
        if GATED:
            q = _part(base, local, 0, here, D, DP, NORMALIZE)[0]
            if cos is not None:
                q = _turn(q, cos, sin, local, here, 1.0, 1, D, DP)
                k = _turn(k, cos, sin, local, here, 1.0, 1, D, DP)
        q, k, v = tl.sum(q, 0), tl.sum(k, 0), tl.sum(v, 0)
        channel, inside = _channels(D, DP)
        kbar = k
        if window is not None:
            state += b.to(tl.int64) * heads * (1 + (1 + GATED) * D) * held
            j = tl.arange(0, HELD)
            skip = held - (window - 1)
            used = (j >= skip) & (j < held)
            logs = tl.load(state + h * held + j, mask=used, other=_NOTHING)
            logs = tl.where(used, tl.maximum(logs, _NOTHING) - slope * (held - j).to(tl.float32), _NOTHING)
            top = tl.maximum(tl.maximum(tl.max(logs, 0), log), _EMPTY)
            if NULL:
                top = tl.maximum(top, log_sink)
            weights, own = tl.exp(logs - top), tl.exp(log - top)
            total = tl.sum(weights, 0) + own
            if NULL:
                total += tl.exp(log_sink - top)
            kept = (j >= 1)[None, :] & (j < held)[None, :] & inside[:, None]
            read = (j < held)[None, :] & inside[:, None]
            last = inside & (held > 0)
            values = state + heads * held + ((GATED * heads + h) * D + channel)[:, None] * held + j[None, :]
            newest = state + heads * held + ((GATED * heads + h) * D + channel) * held + held - 1
            old_v = tl.load(values, mask=read, other=0.0)
            vbar = (tl.sum(tl.where(used[None, :], old_v * weights[None, :], 0.0), 1) + own * v) / total
            keys = state + heads * held + (h * D + channel)[:, None] * held + j[None, :]
            newest_key = state + heads * held + (h * D + channel) * held + held - 1
            old_k = old_v
            if GATED:
                old_k = tl.load(keys, mask=read, other=0.0)
                kbar = (tl.sum(tl.where(used[None, :], old_k * weights[None, :], 0.0), 1) + own * k) / total
            moved = tl.load(state + h * held + j, mask=j < held, other=0.0)
            tl.debug_barrier()  # all is read before anything moves up by one place
            tl.store(state + h * held + j - 1, moved, mask=(j >= 1) & (j < held))
            tl.store(state + h * held + held - 1, log)
            tl.store(values - 1, old_v, mask=kept)
            tl.store(newest, v, mask=last)
            if GATED:
                tl.store(keys - 1, old_k, mask=kept)
                tl.store(newest_key, k, mask=last)
        else:
            state += b.to(tl.int64) * heads * (2 + (1 + GATED) * D)
            total = tl.load(state + heads + h)
            before = tl.load(state + h) - slope
            top = tl.maximum(before, log)
            if BOUNDED:
                top = tl.zeros_like(top)
            own = tl.exp(log - top)
            total = total * tl.exp(before - top) + own
            seen = 1.0
            if NULL:
                seen = total / (total + tl.exp(log_sink - top))
            share = own / total
            values = state + 2 * heads + (GATED * heads + h) * D + channel
            keys = state + 2 * heads + h * D + channel
            vbar = tl.load(values, mask=inside, other=0.0)
            vbar += share * (v - vbar)
            if GATED:
                kbar = tl.load(keys, mask=inside, other=0.0)
                kbar += share * (k - kbar)
            tl.debug_barrier()
            tl.store(state + heads + h, total)
            tl.store(state + h, top)
            tl.store(values, vbar, mask=inside)
            vbar = vbar * seen
            if GATED:
                tl.store(keys, kbar, mask=inside)
                kbar = kbar * seen
        if GATED:
            vbar = vbar * _gate_value(tl.sum(q * kbar, 0) * scale, GATE)
        tl.store(out + row * D + channel, vbar.to(out.dtype.element_ty), mask=inside)


def _tile(dim: int, halo: int) -> tuple[int, int, int]:
    """Tokens of a chunk, no fewer than of a halo, and warps of a program of the forward and the backward pass.

    Never 64 rows by 4 warps or more: for those Triton takes wgmma with an operand in registers, which ptxas up to CUDA 13.0
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
    """How matrix products round: as finely as float32 does, but where the output is far coarser."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


class TritonMixing:
    """One mixing step on a GPU: `forward`, then perhaps `backward`.

    Args:
        qfkv, settings, alibi_slopes, padding_mask, segments: as in `focus_mixing`, `segments` numbered by runs.
        rotary (`tuple` of cos and sin, *optional*): as in `focus_mixing`.
        past (`tuple` of log weights and values, *optional*): of the `FocusState` before the first token.
    """

    def __init__(self, qfkv, settings, alibi_slopes=None, rotary=None, padding_mask=None, segments=None, past=None):
        batch, seq, parts, heads, dim = qfkv.shape
        self.settings, self.shape = settings, (batch, seq, heads, dim)
        self.alibi_slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        self.cos, self.sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
        self.mask = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
        self.segments = None if segments is None else segments.int().contiguous()
        self.past_logs, self.past_values = (None, None) if past is None else (x.float().contiguous() for x in past)
        self.past = 0 if past is None or settings.window is None else past[0].shape[2]
        if self.past == 0 and settings.window is not None:
            self.past_logs = self.past_values = None
        halo = 16 if settings.window is None else max(16, triton.next_power_of_2(settings.window - 1))
        chunk, *self.warps = _tile(dim, halo)
        self.rows, self.chunks = batch * heads, -(-seq // chunk)
        self.carries = None  # of the forward pass, for the backward pass
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
            "ELU": settings.kernels[0] == 1,
            "GATE": settings.kernels[1],
            "NULL": bool(settings.sink_weight),
            "GATED": parts - 3,
            "PRECISION": _precision(qfkv.dtype),
        }

    @staticmethod
    def new_carries(qfkv: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """Memory for what the forward pass keeps of global means, for the backward pass; `None` where it keeps nothing."""
        if window is not None:
            return None
        batch, seq, parts, heads, dim = qfkv.shape
        chunk, *_ = _tile(int(dim), 16)
        record = _HEADER + (parts - 2) * _padded(int(dim))
        return qfkv.new_empty(batch * heads, -(-seq // chunk), record, dtype=torch.float32)

    def _shared_memory(self, like):
        """Records of chunks and of ends of groups, and the words by which programs wait for each other."""
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
        if kept > seq:  # some of the state before stays
            stay = kept - seq
            logs[:, :, :stay] = self.past_logs[:, :, self.past - stay :]
            values[:, :, :stay] = self.past_values[:, :, self.past - stay :]
        records, ends, words = self._shared_memory(qfkv)
        if for_backward:
            self.carries = self.new_carries(qfkv, window)
        out = qfkv.new_empty(batch, seq, heads, dim)
        has_final = window is None or kept > 0
        with _on_device(qfkv):
            _forward[(self.rows * self.chunks,)](
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
        with _on_device(qfkv):
            _backward[(self.rows * self.chunks,)](
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


def _on_device(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)


def step(
    qfkv: torch.Tensor, settings, alibi_slopes: torch.Tensor | None, rotary: tuple | None, packed: torch.Tensor
) -> torch.Tensor | None:
    """The mixing step of one more token, which also enters the packed state, in place.

    Args:
        qfkv, settings, alibi_slopes, rotary: as in `focus_mixing`, for one token.
        packed (`torch.Tensor`): of `pack_state`, float32.

    Returns:
        Output `[batch, 1, heads, head_dim]` in the dtype of `qfkv`; `None`, and nothing done, where the kernel can't take
        the step.
    """
    if not is_supported(qfkv, settings, rotary) or packed.dtype != torch.float32 or not packed.is_contiguous():
        return None
    window = settings.window
    if window is not None and packed.shape[-1] != max(window - 1, 1):
        return None  # a cache that keeps more than it needs, to roll back
    batch, _, parts, heads, dim = qfkv.shape
    out = qfkv.new_empty(batch, 1, heads, dim)
    held = 1 if window is None else packed.shape[-1]
    cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
    with _on_device(qfkv):
        _step[(batch * heads,)](
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
            ELU=settings.kernels[0] == 1,
            GATE=settings.kernels[1],
            NULL=bool(settings.sink_weight),
            GATED=parts - 3,
            BOUNDED=settings.bounded(dim),
            num_warps=1,
        )
    return out
