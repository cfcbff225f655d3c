"""Functions shared by the Triton kernels of the focus operator: rows, weights, gates, and sums published between chunks."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    # In place of log(0), and finite, so that no difference is NaN: for masked tokens and, larger, for sums over no tokens.
    NOTHING = tl.constexpr(-1e30)
    EMPTY = tl.constexpr(-1e29)
    # Weight functions and gates: `kernel` in focus_functions.py.
    _EXP, _ELU = tl.constexpr(0), tl.constexpr(1)
    _SIGMOID, _GELU = tl.constexpr(1), tl.constexpr(2)

    @triton.jit
    def padded_channels(D: tl.constexpr, DP: tl.constexpr):
        """The channel of a head at each place of a padded row, and whether there is one. Each half is padded on its own."""
        place = tl.arange(0, DP)
        channel, inside = place, place < D
        if D != DP:
            if D % 2 == 0:
                inside = tl.where(place >= DP // 2, place - DP // 2, place) < D // 2
                channel = tl.where(place >= DP // 2, place - DP // 2 + D // 2, place)
        return channel, inside

    @triton.jit
    def load_rows(base, local, stride, here, D: tl.constexpr, DP: tl.constexpr):
        """Rows `[tokens, DP]` in float32, zero where there is no token or channel."""
        channel, inside = padded_channels(D, DP)
        kept = here[:, None]
        if D != DP:
            kept = kept & inside[None, :]
        return tl.load(base + local[:, None] * stride + channel[None, :], mask=kept, other=0.0).to(tl.float32)

    @triton.jit
    def store_rows(base, local, stride, here, rows, D: tl.constexpr, DP: tl.constexpr):
        channel, inside = padded_channels(D, DP)
        kept = here[:, None]
        if D != DP:
            kept = kept & inside[None, :]
        tl.store(base + local[:, None] * stride + channel[None, :], rows.to(base.dtype.element_ty), mask=kept)

    @triton.jit
    def load_part(base, local, stride, here, D: tl.constexpr, DP: tl.constexpr, NORMALIZE: tl.constexpr):
        """Rows, standardised if `NORMALIZE`, with their standard deviations and the factors applied."""
        x = load_rows(base, local, stride, here, D, DP)
        deviation = tl.sum(x, 1)
        factor = deviation
        if NORMALIZE:
            _, inside = padded_channels(D, DP)
            x = tl.where(inside[None, :], x - (deviation / D)[:, None], 0.0)
            deviation = tl.sqrt(tl.maximum(tl.sum(x * x, 1) / (D - 1), 1e-24))
            factor = 1.0 / (deviation + 1e-5)
            x = x * factor[:, None]
        return x, deviation, factor

    @triton.jit
    def part_backward(grad, y, deviation, factor, D: tl.constexpr, NORMALIZE: tl.constexpr):
        """Gradient of rows from that of standardised rows. Padded channels are wrong and not stored."""
        if NORMALIZE:
            slope = tl.sum(grad * y, 1) / (deviation * (D - 1))
            grad = (grad - (tl.sum(grad, 1) / D)[:, None]) * factor[:, None] - y * slope[:, None]
        return grad

    @triton.jit
    def swap_halves(x, N: tl.constexpr, DP: tl.constexpr):
        """`(low, high)` halves of rows -> `(-high, low)`."""
        low, high = tl.split(tl.permute(tl.reshape(x, (N, 2, DP // 2)), (0, 2, 1)))
        return tl.reshape(tl.permute(tl.join(-high, low), (0, 2, 1)), (N, DP))

    @triton.jit
    def rotate(x, cos, sin, local, here, sign, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """Rotary positions; the sign is -1 for gradients."""
        return x * load_rows(cos, local, D, here, D, DP) + swap_halves(x, N, DP) * (
            load_rows(sin, local, D, here, D, DP) * sign
        )

    @triton.jit
    def log_weight(logit, here, mask, local, WEIGHT: tl.constexpr):
        if WEIGHT == _ELU:
            log = tl.where(logit > 0, tl.log(1.0 + tl.maximum(logit, 0.0)), logit)
        else:
            tl.static_assert(WEIGHT == _EXP, "unknown weight function")
            log = logit
        if mask is not None:
            here = here & (tl.load(mask + local, mask=here, other=0) != 0)
        return tl.where(here, log, NOTHING)

    @triton.jit
    def log_weight_slope(logit, WEIGHT: tl.constexpr):
        """Derivative of the log weight of a logit."""
        if WEIGHT == _ELU:
            slope = 1.0 / (1.0 + tl.maximum(logit, 0.0))
        else:
            tl.static_assert(WEIGHT == _EXP, "unknown weight function")
            slope = tl.full(logit.shape, 1.0, tl.float32)
        return slope

    @triton.jit
    def sigmoid(x):
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)

    @triton.jit
    def gate_value(x, GATE: tl.constexpr):
        if GATE == _SIGMOID:
            gate = sigmoid(x)
        else:
            tl.static_assert(GATE == _GELU, "unknown gate")
            gate = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        return gate

    @triton.jit
    def gate_slope(x, gate, GATE: tl.constexpr):
        if GATE == _SIGMOID:
            slope = gate * sigmoid(-x)
        else:
            tl.static_assert(GATE == _GELU, "unknown gate")
            slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return slope

    @triton.jit
    def exponents_of(logs, query, key, query_segment, key_segment, slope, window, SEGMENTS: tl.constexpr):
        """Log weights `[queries, keys]` by places of queries and keys. `window` is None for global means."""
        distance = query[:, None] - key[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if SEGMENTS:
            seen = seen & (query_segment[:, None] == key_segment[None, :])
        return tl.where(seen, logs[None, :] - slope * distance.to(tl.float32), NOTHING)

    @triton.jit
    def reciprocal(total):
        return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)

    @triton.jit
    def write_record(record, reference, total, passes, keys, values, GATED: tl.constexpr, DP: tl.constexpr):
        place = tl.arange(0, DP)
        tl.store(record, reference)
        tl.store(record + 1, total)
        tl.store(record + 2, passes)
        tl.store(record + 4 + place, values)
        if GATED:
            tl.store(record + 4 + DP + place, keys)

    @triton.jit
    def read_record(record, GATED: tl.constexpr, DP: tl.constexpr):
        place = tl.arange(0, DP)
        values = tl.load(record + 4 + place, cache_modifier=".cg")
        keys = values
        if GATED:
            keys = tl.load(record + 4 + DP + place, cache_modifier=".cg")
        return tl.load(record, cache_modifier=".cg"), tl.load(record + 1, cache_modifier=".cg"), keys, values

    @triton.jit
    def combine(
        records, inside, slope, reference, total, keys, values,
        GATED: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Sums before a group, joined with its first `inside` chunks. `slope` is the ALiBi bias of a whole chunk."""
        k = tl.arange(0, GROUP)
        record = records + k * (4 + (1 + GATED) * DP)
        some = k < inside
        passes = tl.load(record + 2, mask=some, other=1.0, cache_modifier=".cg")
        cut = tl.max(tl.where(passes == 0, k, -1), 0)
        some = some & (k >= cut)
        logs = tl.load(record, mask=some, other=NOTHING, cache_modifier=".cg")
        logs = tl.where(some, logs - slope * (inside - 1 - k).to(tl.float32), NOTHING)
        reference = tl.where(cut < 0, reference - slope * inside, NOTHING)
        top = tl.maximum(tl.maximum(tl.max(logs, 0), reference), EMPTY)
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
    def sum_before(
        records, ends, words, row, index, chunks, slope, reference, total, keys, values,
        GATED: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Wait for the chunks before the `index`-th of a row, and combine their sums with those before the row."""
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
            reference, total, keys, values = read_record(end, GATED, DP)
        records = records + (row * chunks + group * GROUP).to(tl.int64) * size
        return combine(records, inside, slope, reference, total, keys, values, GATED, DP, GROUP)

    @triton.jit
    def announce(words, row, index, chunks, GROUP: tl.constexpr):
        """Mark the record of the `index`-th chunk of a row as written."""
        groups = (chunks + GROUP - 1) // GROUP
        tl.debug_barrier()
        tl.atomic_or(words + 1 + row * groups + index // GROUP, 1 << (index % GROUP), sem="release")

    @triton.jit
    def publish_chunk(
        records, words, row, index, chunks, reference, total, passes, keys, values, GATED: tl.constexpr,
        DP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Write the sums of a chunk for later chunks. The last chunk of a group publishes the sums of the group instead."""
        write_record(
            records + (row * chunks + index).to(tl.int64) * (4 + (1 + GATED) * DP),
            reference, total, passes, keys, values, GATED, DP,
        )  # fmt: skip
        if index % GROUP < GROUP - 1:
            announce(words, row, index, chunks, GROUP)

    @triton.jit
    def publish_group(
        ends, words, row, index, chunks, reference, total, keys, values, GATED: tl.constexpr, DP: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """Write the sums over all chunks up to the last one of a group for later groups."""
        groups = (chunks + GROUP - 1) // GROUP
        write_record(
            ends + (row * groups + index // GROUP).to(tl.int64) * (4 + (1 + GATED) * DP),
            reference, total, 1.0, keys, values, GATED, DP,
        )  # fmt: skip
        announce(words, row, index, chunks, GROUP)

    @triton.jit
    def join(reference, total, keys, values, slope, passes, own_reference, own_total, own_keys, own_values):
        """Sums before a chunk, joined with those of the chunk."""
        reference = tl.where(passes > 0, reference - slope, NOTHING)
        top = tl.maximum(tl.maximum(reference, own_reference), EMPTY)
        past, own = tl.exp(reference - top), tl.exp(own_reference - top)
        total = past * total + own * own_total
        return top, total, past * keys + own * own_keys, past * values + own * own_values

    @triton.jit
    def triangle_weights(
        logs, carry_log, carry_total, local, segment, segment_before, slope, log_sink, SEGMENTS: tl.constexpr,
        NULL: tl.constexpr,
    ):  # fmt: skip
        """Weights of the tokens of a chunk `[queries, keys]`, of all earlier tokens `[queries]`, and logs of the totals."""
        exponents = exponents_of(logs, local, local, segment, segment, slope, None, SEGMENTS)
        before = carry_log - slope * (local + 1).to(tl.float32)
        if SEGMENTS:
            before = tl.where(segment == segment_before, before, NOTHING)
        top = tl.maximum(tl.maximum(tl.max(exponents, 1), before), EMPTY)
        if NULL:
            top = tl.maximum(top, log_sink)
        weights, past = tl.exp(exponents - top[:, None]), tl.exp(before - top)
        total = tl.sum(weights, 1) + past * carry_total
        if NULL:
            total += tl.exp(log_sink - top)
        share = reciprocal(total)
        log_total = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), NOTHING)
        return weights * share[:, None], past * share, log_total

    @triton.jit
    def band_weights(a, b, log_sink, NULL: tl.constexpr):
        """Weights of two sets of keys from their exponents `[queries, keys]`."""
        top = tl.maximum(tl.maximum(tl.max(a, 1), tl.max(b, 1)), EMPTY)
        if NULL:
            top = tl.maximum(top, log_sink)
        a, b = tl.exp(a - top[:, None]), tl.exp(b - top[:, None])
        total = tl.sum(a, 1) + tl.sum(b, 1)
        if NULL:
            total += tl.exp(log_sink - top)
        share = reciprocal(total)
        return a * share[:, None], b * share[:, None]

    @triton.jit
    def load_segments(segments, local, first, seq):
        """Segments of tokens by place. Tokens before the row are in its first segment."""
        t = tl.minimum(tl.maximum(first + local, 0), seq - 1)
        return tl.load(segments + t)

    @triton.jit
    def chunk_segments(segments, local, first, seq):
        """Segments of the tokens of a chunk and of the token before it."""
        segment = local
        before = 0
        if segments is not None:
            segment = load_segments(segments, local, first, seq)
            before = tl.load(segments + tl.maximum(first - 1, 0))
        return segment, before

    @triton.jit
    def load_slope(alibi_slopes, head):
        slope = 0.0
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + head)
        return slope

    @triton.jit
    def load_tokens(
        base, cos, sin, mask, local, here, stride, part, scale, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
        GATED: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr,
    ):  # fmt: skip
        """Log weights of tokens, and their rotated queries, rotated keys and values."""
        f = load_part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)[0]
        k = load_part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        v = load_part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        q = v
        logs = log_weight(tl.sum(f * k, 1) * scale, here, mask, local, WEIGHT)
        if GATED:
            q = load_part(base, local, stride, here, D, DP, NORMALIZE)[0]
            if cos is not None:
                q = rotate(q, cos, sin, local, here, 1.0, N, D, DP)
                k = rotate(k, cos, sin, local, here, 1.0, N, D, DP)
        return logs, q, k, v

    @triton.jit
    def load_halo(
        base, cos, sin, mask, past_logs, past_values, row, local, first, stride, part, past, scale,
        D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr, NORMALIZE: tl.constexpr,
        WEIGHT: tl.constexpr,
    ):  # fmt: skip
        """Log weights, rotated keys and values of tokens before a chunk. Those before the row come from the initial state."""
        here = first + local >= 0
        logs, _, k, v = load_tokens(
            base, cos, sin, mask, local, here, stride, part, scale, D, DP, N, GATED, NORMALIZE, WEIGHT
        )
        if past_logs is not None:
            old = past + first + local
            held = (old >= 0) & (old < past)
            channels: tl.constexpr = (1 + GATED) * D
            state = past_values + row.to(tl.int64) * past * channels
            logs = tl.where(here, logs, tl.load(past_logs + row * past + old, mask=held, other=NOTHING))
            logs = tl.where(logs > EMPTY, logs, NOTHING)
            v += load_rows(state + GATED * D, old, channels, held, D, DP)
            if GATED:
                k += load_rows(state, old, channels, held, D, DP)
        return logs, k, v

    @triton.jit
    def window_means(
        base, cos, sin, mask, segments, past_logs, past_values, row, local, first, stride, part, seq, window, past,
        scale, slope, log_sink, logs, k, v, segment, D: tl.constexpr, DP: tl.constexpr, HALO: tl.constexpr,
        GATED: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, NULL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Means of keys and values over the windows of a chunk, and the weights of the chunk's own tokens in them."""
        SEGMENTS: tl.constexpr = segments is not None
        before = tl.arange(0, HALO) - HALO
        halo_logs, halo_k, halo_v = load_halo(
            base, cos, sin, mask, past_logs, past_values, row, before, first, stride, part, past, scale,
            D, DP, HALO, GATED, NORMALIZE, WEIGHT,
        )  # fmt: skip
        halo_segment = before
        if SEGMENTS:
            halo_segment = load_segments(segments, before, first, seq)
        weights, halo_weights = band_weights(
            exponents_of(logs, local, local, segment, segment, slope, window, SEGMENTS),
            exponents_of(halo_logs, local, before, segment, halo_segment, slope, window, SEGMENTS),
            log_sink,
            NULL,
        )
        vbar = tl.dot(halo_weights, halo_v, input_precision=PRECISION)
        vbar = tl.dot(weights, v, vbar, input_precision=PRECISION)
        kbar = k
        if GATED:
            kbar = tl.dot(halo_weights, halo_k, input_precision=PRECISION)
            kbar = tl.dot(weights, k, kbar, input_precision=PRECISION)
        return kbar, vbar, weights
