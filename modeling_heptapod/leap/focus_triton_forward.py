"""The Triton kernels of the focus operator for the forward pass: a chunk of tokens, and a single token."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    from .focus_triton_parts import (
        EMPTY,
        NOTHING,
        chunk_segments,
        gate_value,
        join,
        load_slope,
        load_tokens,
        padded_channels,
        publish_chunk,
        publish_group,
        reciprocal,
        store_rows,
        sum_before,
        triangle_weights,
        window_means,
        write_record,
    )

    @triton.jit
    def _store_tokens(
        final_logs, final_values, row, local, first, here, seq, kept, logs, k, v, D: tl.constexpr, DP: tl.constexpr,
        GATED: tl.constexpr,
    ):  # fmt: skip
        """Write those tokens of a chunk that are among the last `kept` of their row into the final state of a window."""
        channels: tl.constexpr = (1 + GATED) * D
        slot = first + local - (seq - kept)
        inside = here & (slot >= 0)
        tl.store(final_logs + row * kept + slot, tl.where(logs > EMPTY, logs, float("-inf")), mask=inside)
        state = final_values + row.to(tl.int64) * kept * channels
        store_rows(state + GATED * D, slot, channels, inside, v, D, DP)
        if GATED:
            store_rows(state, slot, channels, inside, k, D, DP)

    @triton.jit
    def _store_sums(
        final_logs, final_values, row, reference, total, keys, values, D: tl.constexpr, DP: tl.constexpr,
        GATED: tl.constexpr,
    ):  # fmt: skip
        """Write the sums over a row into the final state of a global mean."""
        channel, inside = padded_channels(D, DP)
        channels: tl.constexpr = (1 + GATED) * D
        share = reciprocal(total)
        log_total = tl.log(tl.where(total > 0, total, 1.0))
        tl.store(final_logs + row, tl.where(total > 0, reference + log_total, EMPTY))
        tl.store(final_values + row * channels + GATED * D + channel, values * share, mask=inside)
        if GATED:
            tl.store(final_values + row * channels + channel, keys * share, mask=inside)

    @triton.jit
    def _load_sums(past_logs, past_values, row, D: tl.constexpr, DP: tl.constexpr, GATED: tl.constexpr):
        """Sums before the first token of a row: of the initial state, or empty."""
        channel, inside = padded_channels(D, DP)
        channels: tl.constexpr = (1 + GATED) * D
        reference = tl.full((), NOTHING, tl.float32)
        total = tl.full((), 0.0, tl.float32)
        past_k = tl.zeros([DP], tl.float32)
        past_v = tl.zeros([DP], tl.float32)
        if past_logs is not None:
            reference = tl.load(past_logs + row)
            total = tl.where(reference > EMPTY, 1.0, 0.0)
            reference = tl.where(reference > EMPTY, reference, NOTHING)
            past_v = tl.load(past_values + row * channels + GATED * D + channel, mask=inside, other=0.0)
            if GATED:
                past_k = tl.load(past_values + row * channels + channel, mask=inside, other=0.0)
        return reference, total, past_k, past_v

    @triton.jit
    def _sum_chunk(
        segments, logs, k, v, local, first, seq, segment, segment_before, slope, T: tl.constexpr, GATED: tl.constexpr
    ):
        """Sums over a chunk at its last token, and whether earlier sums reach that token."""
        count = tl.minimum(seq - first, T)
        ending = logs - slope * (count - 1 - local).to(tl.float32)
        passes = tl.full((), 1.0, tl.float32)
        if segments is not None:
            segment_after = tl.load(segments + first + count - 1)
            passes = (segment_before == segment_after).to(tl.float32)
            ending = tl.where(segment == segment_after, ending, NOTHING)
        ending = tl.where(logs > EMPTY, ending, NOTHING)
        own_reference = tl.maximum(tl.max(ending, 0), EMPTY)
        weight = tl.exp(ending - own_reference)
        own_total = tl.sum(weight, 0)
        own_v = tl.sum(weight[:, None] * v, 0)
        own_k = own_v
        if GATED:
            own_k = tl.sum(weight[:, None] * k, 0)
        return own_reference, own_total, passes, own_k, own_v

    @triton.jit
    def _global_means(
        segments, past_logs, past_values, final_logs, final_values, records, ends, words, carries, row, index, chunks,
        local, first, seq, slope, log_sink, logs, k, v, segment, segment_before, D: tl.constexpr, DP: tl.constexpr,
        T: tl.constexpr, GROUP: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Global means of keys and values at the tokens of a chunk, whose sums are published for later chunks."""
        size: tl.constexpr = 4 + (1 + GATED) * DP
        count = tl.minimum(seq - first, T)
        own_reference, own_total, passes, own_k, own_v = _sum_chunk(
            segments, logs, k, v, local, first, seq, segment, segment_before, slope, T, GATED
        )
        publish_chunk(
            records, words, row, index, chunks, own_reference, own_total, passes, own_k, own_v, GATED, DP, GROUP
        )

        reference, total, past_k, past_v = _load_sums(past_logs, past_values, row, D, DP, GATED)
        reference, total, past_k, past_v = sum_before(
            records, ends, words, row, index, chunks, slope * T, reference, total, past_k, past_v, GATED, DP, GROUP
        )
        after, after_total, after_k, after_v = join(
            reference, total, past_k, past_v, slope * count, passes, own_reference, own_total, own_k, own_v
        )
        if index % GROUP == GROUP - 1:
            publish_group(ends, words, row, index, chunks, after, after_total, after_k, after_v, GATED, DP, GROUP)
        if carries is not None:
            record = carries + (row * chunks + index).to(tl.int64) * size
            write_record(record, reference, total, 1.0, past_k, past_v, GATED, DP)
        if index == chunks - 1:
            _store_sums(final_logs, final_values, row, after, after_total, after_k, after_v, D, DP, GATED)
        weights, past_weights, _ = triangle_weights(
            logs, reference, total, local, segment, segment_before, slope, log_sink, segments is not None, NULL
        )
        vbar = tl.dot(weights, v, past_weights[:, None] * past_v[None, :], input_precision=PRECISION)
        kbar = k
        if GATED:
            kbar = tl.dot(weights, k, past_weights[:, None] * past_k[None, :], input_precision=PRECISION)
        return kbar, vbar

    @triton.jit(do_not_specialize=["seq", "rows", "chunks", "window", "past", "kept"])
    def forward_kernel(
        qfkv, out, alibi_slopes, cos, sin, mask, segments, past_logs, past_values, final_logs, final_values,
        records, ends, words, carries, seq, heads, rows, chunks, window, past, kept, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, HALO: tl.constexpr, GROUP: tl.constexpr,
        NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A chunk of one head of one row."""
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
        if segments is not None:
            segments += b * seq
        slope = load_slope(alibi_slopes, h)
        segment, segment_before = chunk_segments(segments, local, first, seq)
        logs, q, k, v = load_tokens(
            base, cos, sin, mask, local, here, stride, part, scale, D, DP, T, GATED, NORMALIZE, WEIGHT
        )
        if window is not None:
            if final_logs is not None:
                _store_tokens(final_logs, final_values, row, local, first, here, seq, kept, logs, k, v, D, DP, GATED)
            kbar, vbar, _ = window_means(
                base, cos, sin, mask, segments, past_logs, past_values, row, local, first, stride, part, seq, window,
                past, scale, slope, log_sink, logs, k, v, segment, D, DP, HALO, GATED, NORMALIZE, WEIGHT, NULL, PRECISION,
            )  # fmt: skip
        else:
            kbar, vbar = _global_means(
                segments, past_logs, past_values, final_logs, final_values, records, ends, words, carries, row, index,
                chunks, local, first, seq, slope, log_sink, logs, k, v, segment, segment_before, D, DP, T, GROUP, NULL,
                GATED, PRECISION,
            )  # fmt: skip
        if GATED:
            vbar = vbar * gate_value(tl.sum(q * kbar, 1) * scale, GATE)[:, None]
        store_rows(out + (b * seq + first) * part + h * D, local, part, here, vbar, D, DP)

    @triton.jit
    def _step_window(
        state, h, heads, window, held, slope, log, k, v, log_sink, D: tl.constexpr, DP: tl.constexpr,
        HELD: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """Means over the window of one more token, which replaces the oldest one in the state."""
        channel, inside = padded_channels(D, DP)
        kbar = k
        j = tl.arange(0, HELD)
        skip = held - (window - 1)
        used = (j >= skip) & (j < held)
        logs = tl.load(state + h * held + j, mask=used, other=NOTHING)
        logs = tl.where(used, tl.maximum(logs, NOTHING) - slope * (held - j).to(tl.float32), NOTHING)
        top = tl.maximum(tl.maximum(tl.max(logs, 0), log), EMPTY)
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
        tl.debug_barrier()  # all reads precede the shift by one place
        tl.store(state + h * held + j - 1, moved, mask=(j >= 1) & (j < held))
        tl.store(state + h * held + held - 1, log)
        tl.store(values - 1, old_v, mask=kept)
        tl.store(newest, v, mask=last)
        if GATED:
            tl.store(keys - 1, old_k, mask=kept)
            tl.store(newest_key, k, mask=last)
        return kbar, vbar

    @triton.jit
    def _step_global(
        state, h, heads, slope, log, k, v, log_sink, D: tl.constexpr, DP: tl.constexpr, NULL: tl.constexpr,
        GATED: tl.constexpr, BOUNDED: tl.constexpr,
    ):  # fmt: skip
        """Global means at one more token, which is added to the state."""
        channel, inside = padded_channels(D, DP)
        kbar = k
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
        return kbar, vbar

    @triton.jit(do_not_specialize=["window", "held"])
    def step_kernel(
        qfkv, out, alibi_slopes, cos, sin, state, heads, window, held, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, HELD: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr,
        GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr, BOUNDED: tl.constexpr,
    ):  # fmt: skip
        """One token of one head of one row. `pack_state` defines the layout of the state."""
        row = tl.program_id(0)
        b, h = row // heads, row % heads
        part = heads * D
        base = qfkv + b.to(tl.int64) * (3 + GATED) * part + h * D
        local = tl.arange(0, 1)
        here = local == 0
        if cos is not None:
            cos += b * rotary_stride
            sin += b * rotary_stride
        slope = load_slope(alibi_slopes, h)
        log, q, k, v = load_tokens(
            base, cos, sin, None, local, here, 0, part, scale, D, DP, 1, GATED, NORMALIZE, WEIGHT
        )
        log, q, k, v = tl.sum(log, 0), tl.sum(q, 0), tl.sum(k, 0), tl.sum(v, 0)
        if window is not None:
            state += b.to(tl.int64) * heads * (1 + (1 + GATED) * D) * held
            kbar, vbar = _step_window(
                state, h, heads, window, held, slope, log, k, v, log_sink, D, DP, HELD, NULL, GATED
            )
        else:
            state += b.to(tl.int64) * heads * (2 + (1 + GATED) * D)
            kbar, vbar = _step_global(state, h, heads, slope, log, k, v, log_sink, D, DP, NULL, GATED, BOUNDED)
        if GATED:
            vbar = vbar * gate_value(tl.sum(q * kbar, 0) * scale, GATE)
        channel, inside = padded_channels(D, DP)
        tl.store(out + row * D + channel, vbar.to(out.dtype.element_ty), mask=inside)
