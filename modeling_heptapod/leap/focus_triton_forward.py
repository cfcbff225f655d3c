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
        announce,
        band_weights,
        exponents_of,
        gate_value,
        join,
        load_halo,
        load_part,
        load_segments,
        log_weight,
        padded_channels,
        reciprocal,
        rotate,
        store_rows,
        sum_before,
        triangle_weights,
        write_record,
    )

    @triton.jit(do_not_specialize=["seq", "rows", "chunks", "window", "past", "kept"])
    def forward_kernel(
        qfkv, out, alibi_slopes, cos, sin, mask, segments, past_logs, past_values, final_logs, final_values,
        records, ends, words, carries, seq, heads, rows, chunks, window, past, kept, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, HALO: tl.constexpr, GROUP: tl.constexpr,
        NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
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
            segment = load_segments(segments, local, first, seq)
            segment_before = tl.load(segments + tl.maximum(first - 1, 0))

        f = load_part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)[0]
        k = load_part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        v = load_part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)[0]
        q = v
        if GATED:
            q = load_part(base, local, stride, here, D, DP, NORMALIZE)[0]
        logs = log_weight(tl.sum(f * k, 1) * scale, here, mask, local, WEIGHT)
        if GATED:
            if cos is not None:
                k = rotate(k, cos, sin, local, here, 1.0, T, D, DP)
                q = rotate(q, cos, sin, local, here, 1.0, T, D, DP)

        channel, inside = padded_channels(D, DP)
        channels: tl.constexpr = (1 + GATED) * D
        kbar = k
        if window is not None:
            if final_logs is not None:
                slot = first + local - (seq - kept)
                kept_here = here & (slot >= 0)
                tl.store(final_logs + row * kept + slot, tl.where(logs > EMPTY, logs, float("-inf")), mask=kept_here)
                state = final_values + row.to(tl.int64) * kept * channels
                store_rows(state + GATED * D, slot, channels, kept_here, v, D, DP)
                if GATED:
                    store_rows(state, slot, channels, kept_here, k, D, DP)
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
                ending = tl.where(segment == segment_after, ending, NOTHING)
            ending = tl.where(logs > EMPTY, ending, NOTHING)
            own_reference = tl.maximum(tl.max(ending, 0), EMPTY)
            weight = tl.exp(ending - own_reference)
            own_total = tl.sum(weight, 0)
            own_v = tl.sum(weight[:, None] * v, 0)
            own_k = own_v
            if GATED:
                own_k = tl.sum(weight[:, None] * k, 0)
            record = records + (row * chunks + index).to(tl.int64) * size
            write_record(record, own_reference, own_total, passes, own_k, own_v, GATED, DP)
            if index % GROUP < GROUP - 1:
                announce(words, row, index, chunks, GROUP)

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
            reference, total, past_k, past_v = sum_before(
                records, ends, words, row, index, chunks, slope * T, reference, total, past_k, past_v, GATED, DP, GROUP
            )
            after, after_total, after_k, after_v = join(
                reference, total, past_k, past_v, slope * count, passes, own_reference, own_total, own_k, own_v
            )
            if index % GROUP == GROUP - 1:
                groups = (chunks + GROUP - 1) // GROUP
                end = ends + (row * groups + index // GROUP).to(tl.int64) * size
                write_record(end, after, after_total, 1.0, after_k, after_v, GATED, DP)
                announce(words, row, index, chunks, GROUP)
            if carries is not None:
                record = carries + (row * chunks + index).to(tl.int64) * size
                write_record(record, reference, total, 1.0, past_k, past_v, GATED, DP)
            if index == chunks - 1:
                share = reciprocal(after_total)
                log_total = tl.log(tl.where(after_total > 0, after_total, 1.0))
                tl.store(final_logs + row, tl.where(after_total > 0, after + log_total, EMPTY))
                tl.store(final_values + row * channels + GATED * D + channel, after_v * share, mask=inside)
                if GATED:
                    tl.store(final_values + row * channels + channel, after_k * share, mask=inside)
            weights, past_weights, _ = triangle_weights(
                logs, reference, total, local, segment, segment_before, slope, log_sink, SEGMENTS, NULL
            )
            vbar = tl.dot(weights, v, past_weights[:, None] * past_v[None, :], input_precision=PRECISION)
            if GATED:
                kbar = tl.dot(weights, k, past_weights[:, None] * past_k[None, :], input_precision=PRECISION)
        if GATED:
            vbar = vbar * gate_value(tl.sum(q * kbar, 1) * scale, GATE)[:, None]
        store_rows(out + (b * seq + first) * part + h * D, local, part, here, vbar, D, DP)

    @triton.jit(do_not_specialize=["window", "held"])
    def step_kernel(
        qfkv, out, alibi_slopes, cos, sin, state, heads, window, held, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, HELD: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
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
        f = load_part(base + GATED * part, local, 0, here, D, DP, NORMALIZE)[0]
        k = load_part(base + (1 + GATED) * part, local, 0, here, D, DP, NORMALIZE)[0]
        v = load_part(base + (2 + GATED) * part, local, 0, here, D, DP, NORMALIZE)[0]
        q = v
        log = tl.sum(log_weight(tl.sum(f * k, 1) * scale, here, None, local, WEIGHT), 0)
        if GATED:
            q = load_part(base, local, 0, here, D, DP, NORMALIZE)[0]
            if cos is not None:
                q = rotate(q, cos, sin, local, here, 1.0, 1, D, DP)
                k = rotate(k, cos, sin, local, here, 1.0, 1, D, DP)
        q, k, v = tl.sum(q, 0), tl.sum(k, 0), tl.sum(v, 0)
        channel, inside = padded_channels(D, DP)
        kbar = k
        if window is not None:
            state += b.to(tl.int64) * heads * (1 + (1 + GATED) * D) * held
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
            vbar = vbar * gate_value(tl.sum(q * kbar, 0) * scale, GATE)
        tl.store(out + row * D + channel, vbar.to(out.dtype.element_ty), mask=inside)
