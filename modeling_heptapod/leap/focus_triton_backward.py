"""The Triton kernel of the focus operator for the backward pass."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    from .focus_triton_parts import (
        EMPTY,
        NOTHING,
        band_weights,
        chunk_segments,
        exponents_of,
        gate_slope,
        gate_value,
        join,
        load_part,
        load_rows,
        load_segments,
        load_slope,
        load_tokens,
        log_weight,
        log_weight_slope,
        part_backward,
        publish_chunk,
        publish_group,
        read_record,
        rotate,
        store_rows,
        sum_before,
        triangle_weights,
        window_means,
    )

    @triton.jit
    def _gate_gradients(
        grad_base, local, stride, here, q, kbar, vbar, scale, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr
    ):
        """Gradients of the means of keys and values, gradient . mean, and the gradient of query . mean of keys."""
        grad = load_rows(grad_base, local, stride, here, D, DP)
        slope = tl.sum(grad * vbar, 1)
        inner, grad_product, grad_k = slope, slope, grad
        if GATE:
            product = tl.sum(q * kbar, 1)
            gate = gate_value(product * scale, GATE)
            grad_product = slope * gate_slope(product * scale, gate, GATE) * scale
            inner = slope * gate + grad_product * product
            grad_k = grad_product[:, None] * q
            grad = grad * gate[:, None]
        return grad_k, grad, inner, grad_product

    @triton.jit
    def _store_gradients(
        grad_base, cos, sin, local, stride, part, here, scale, logit, logs, grad_k, grad_v, inner, grad_product, kbar,
        q, f, k, v, q_deviation, q_factor, f_deviation, f_factor, k_deviation, k_factor, v_deviation, v_factor,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, GATED: tl.constexpr, NORMALIZE: tl.constexpr,
        WEIGHT: tl.constexpr, turned_k,
    ):  # fmt: skip
        """Store gradients of the projections, from those of averaged keys and values. `q`, `f`, `k` and `v` are standardised."""
        grad_log = tl.sum(grad_v * v, 1) - inner
        if GATED:
            grad_log += tl.sum(grad_k * turned_k, 1)
        grad_logit = tl.where(logs > EMPTY, grad_log, 0.0) * scale * log_weight_slope(logit, WEIGHT)
        grad = part_backward(grad_logit[:, None] * k, f, f_deviation, f_factor, D, NORMALIZE)
        store_rows(grad_base + GATED * part, local, stride, here, grad, D, DP)
        grad = part_backward(grad_v, v, v_deviation, v_factor, D, NORMALIZE)
        store_rows(grad_base + (2 + GATED) * part, local, stride, here, grad, D, DP)
        grad = grad_logit[:, None] * f
        if GATED:
            grad_q = grad_product[:, None] * kbar
            if cos is not None:
                grad_q = rotate(grad_q, cos, sin, local, here, -1.0, T, D, DP)
                grad_k = rotate(grad_k, cos, sin, local, here, -1.0, T, D, DP)
            grad_q = part_backward(grad_q, q, q_deviation, q_factor, D, NORMALIZE)
            store_rows(grad_base, local, stride, here, grad_q, D, DP)
            grad += grad_k
        grad = part_backward(grad, k, k_deviation, k_factor, D, NORMALIZE)
        store_rows(grad_base + (1 + GATED) * part, local, stride, here, grad, D, DP)

    @triton.jit
    def _window_gradients(
        base, out_base, cos, sin, mask, segments, local, first, stride, part, seq, window, scale, slope, log_sink, logs,
        k, v, segment, weights, inner, grad_kbar, grad_vbar, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
        HALO: tl.constexpr, GATED: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
        NULL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Gradients from the windows of the tokens of a chunk and of those after it."""
        SEGMENTS: tl.constexpr = segments is not None
        back = tl.trans(weights)
        grad_v = tl.dot(back, grad_vbar, input_precision=PRECISION)
        grad_k = grad_v
        if GATED:
            grad_k = tl.dot(back, grad_kbar, input_precision=PRECISION)
        grad_inner = tl.sum(weights * inner[:, None], 0)

        after = tl.arange(0, HALO) + T
        there = first + after < seq
        next_logs, next_q, next_k, next_v = load_tokens(
            base, cos, sin, mask, after, there, stride, part, scale, D, DP, HALO, GATED, NORMALIZE, WEIGHT
        )
        next_segment = after
        if SEGMENTS:
            next_segment = load_segments(segments, after, first, seq)
        weights, halo_weights = band_weights(
            exponents_of(logs, after, local, next_segment, segment, slope, window, SEGMENTS),
            exponents_of(next_logs, after, after, next_segment, next_segment, slope, window, SEGMENTS),
            log_sink,
            NULL,
        )
        vbar = tl.dot(halo_weights, next_v, input_precision=PRECISION)
        vbar = tl.dot(weights, v, vbar, input_precision=PRECISION)
        next_kbar = vbar
        if GATED:
            next_kbar = tl.dot(halo_weights, next_k, input_precision=PRECISION)
            next_kbar = tl.dot(weights, k, next_kbar, input_precision=PRECISION)
        grad_kbar, grad_vbar, inner, _ = _gate_gradients(
            out_base, after, part, there, next_q, next_kbar, vbar, scale, D, DP, GATE
        )
        back = tl.trans(weights)
        grad_v = tl.dot(back, grad_vbar, grad_v, input_precision=PRECISION)
        if GATED:
            grad_k = tl.dot(back, grad_kbar, grad_k, input_precision=PRECISION)
        grad_inner += tl.sum(weights * inner[:, None], 0)
        return grad_k, grad_v, grad_inner

    @triton.jit
    def _sum_chunk(
        segments, local, first, seq, here, segment, slope, log_total, inner, grad_kbar, grad_vbar, T: tl.constexpr,
        GATED: tl.constexpr,
    ):  # fmt: skip
        """Sums of gradients over a chunk for earlier tokens, whether later sums reach these, and the segment after the chunk."""
        sent = here & (log_total > EMPTY)
        passes = tl.full((), 1.0, tl.float32)
        segment_after = 0
        if segments is not None:
            own_first = tl.load(segments + first)
            segment_after = tl.load(segments + tl.minimum(first + T, seq - 1))
            passes = (own_first == segment_after).to(tl.float32)
            sent = sent & (segment == own_first)
        leaving = tl.where(sent, -log_total - slope * local.to(tl.float32), NOTHING)
        own_reference = tl.maximum(tl.max(leaving, 0), EMPTY)
        weight = tl.exp(leaving - own_reference)
        own_inner = tl.sum(weight * inner, 0)
        own_v = tl.sum(weight[:, None] * grad_vbar, 0)
        own_k = own_v
        if GATED:
            own_k = tl.sum(weight[:, None] * grad_kbar, 0)
        return own_reference, own_inner, passes, own_k, own_v, segment_after

    @triton.jit
    def _global_gradients(
        segments, records, ends, words, row, index, chunks, local, first, seq, here, slope, logs, segment, weights,
        log_total, inner, grad_kbar, grad_vbar, DP: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
        GATED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Gradients from the tokens of a chunk and all later ones. The sums of the chunk are published for earlier chunks."""
        own_reference, own_inner, passes, own_k, own_v, segment_after = _sum_chunk(
            segments, local, first, seq, here, segment, slope, log_total, inner, grad_kbar, grad_vbar, T, GATED
        )
        publish_chunk(
            records, words, row, index, chunks, own_reference, own_inner, passes, own_k, own_v, GATED, DP, GROUP
        )
        reference = tl.full((), NOTHING, tl.float32)
        later_inner = tl.full((), 0.0, tl.float32)
        later_k = tl.zeros([DP], tl.float32)
        later_v = tl.zeros([DP], tl.float32)
        reference, later_inner, later_k, later_v = sum_before(
            records, ends, words, row, index, chunks, slope * T, reference, later_inner, later_k, later_v, GATED, DP,
            GROUP,
        )  # fmt: skip
        if index % GROUP == GROUP - 1:
            end, end_inner, end_k, end_v = join(
                reference, later_inner, later_k, later_v, slope * T, passes, own_reference, own_inner, own_k, own_v
            )
            publish_group(ends, words, row, index, chunks, end, end_inner, end_k, end_v, GATED, DP, GROUP)

        factor = tl.minimum(logs - slope * (T - local).to(tl.float32) + reference, 0.0)
        if segments is not None:
            factor = tl.where(segment == segment_after, factor, NOTHING)
        factor = tl.exp(factor)
        back = tl.trans(weights)
        grad_v = tl.dot(back, grad_vbar, factor[:, None] * later_v[None, :], input_precision=PRECISION)
        grad_k = grad_v
        if GATED:
            grad_k = tl.dot(back, grad_kbar, factor[:, None] * later_k[None, :], input_precision=PRECISION)
        grad_inner = tl.sum(weights * inner[:, None], 0) + factor * later_inner
        return grad_k, grad_v, grad_inner

    @triton.jit
    def _global_means(
        carries, row, chunk, chunks, local, slope, log_sink, logs, k, v, segment, segment_before, DP: tl.constexpr,
        SEGMENTS: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Means of keys and values as in the forward pass, from the sums that it kept; weights, and logs of the totals."""
        record = carries + (row * chunks + chunk).to(tl.int64) * (4 + (1 + GATED) * DP)
        reference, total, past_k, past_v = read_record(record, GATED, DP)
        weights, past_weights, log_total = triangle_weights(
            logs, reference, total, local, segment, segment_before, slope, log_sink, SEGMENTS, NULL
        )
        vbar = tl.dot(weights, v, past_weights[:, None] * past_v[None, :], input_precision=PRECISION)
        kbar = k
        if GATED:
            kbar = tl.dot(weights, k, past_weights[:, None] * past_k[None, :], input_precision=PRECISION)
        return kbar, vbar, weights, log_total

    @triton.jit(do_not_specialize=["seq", "rows", "chunks", "window", "past"])
    def backward_kernel(
        qfkv, grad_out, grad_in, alibi_slopes, cos, sin, mask, segments, past_logs, past_values,
        records, ends, words, carries, seq, heads, rows, chunks, window, past, rotary_stride, scale, log_sink,
        D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, HALO: tl.constexpr, GROUP: tl.constexpr,
        NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr, NULL: tl.constexpr, GATED: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A chunk of one head of one row. Chunks are counted from the end of the row."""
        order = tl.program_id(0)
        if window is None:
            order = tl.atomic_add(words, 1)
        index, row = order // rows, order % rows
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
        if segments is not None:
            segments += b * seq
        slope = load_slope(alibi_slopes, h)
        segment, segment_before = chunk_segments(segments, local, first, seq)
        f, f_deviation, f_factor = load_part(base + GATED * part, local, stride, here, D, DP, NORMALIZE)
        k, k_deviation, k_factor = load_part(base + (1 + GATED) * part, local, stride, here, D, DP, NORMALIZE)
        v, v_deviation, v_factor = load_part(base + (2 + GATED) * part, local, stride, here, D, DP, NORMALIZE)
        q, q_deviation, q_factor = v, v_deviation, v_factor
        if GATED:
            q, q_deviation, q_factor = load_part(base, local, stride, here, D, DP, NORMALIZE)
        logit = tl.sum(f * k, 1) * scale
        logs = log_weight(logit, here, mask, local, WEIGHT)
        turned_q, turned_k = q, k
        if GATED:
            if cos is not None:
                turned_q = rotate(q, cos, sin, local, here, 1.0, T, D, DP)
                turned_k = rotate(k, cos, sin, local, here, 1.0, T, D, DP)
        if window is not None:
            kbar, vbar, weights = window_means(
                base, cos, sin, mask, segments, past_logs, past_values, row, local, first, stride, part, seq, window,
                past, scale, slope, log_sink, logs, turned_k, v, segment, D, DP, HALO, GATED, NORMALIZE, WEIGHT, NULL,
                PRECISION,
            )  # fmt: skip
        else:
            kbar, vbar, weights, log_total = _global_means(
                carries, row, chunk, chunks, local, slope, log_sink, logs, turned_k, v, segment, segment_before, DP,
                segments is not None, NULL, GATED, PRECISION,
            )  # fmt: skip
        grad_kbar, grad_vbar, inner, grad_product = _gate_gradients(
            out_base, local, part, here, turned_q, kbar, vbar, scale, D, DP, GATE
        )
        if window is not None:
            grad_k, grad_v, grad_inner = _window_gradients(
                base, out_base, cos, sin, mask, segments, local, first, stride, part, seq, window, scale, slope, log_sink,
                logs, turned_k, v, segment, weights, inner, grad_kbar, grad_vbar, D, DP, T, HALO, GATED, NORMALIZE, WEIGHT,
                GATE, NULL, PRECISION,
            )  # fmt: skip
        else:
            grad_k, grad_v, grad_inner = _global_gradients(
                segments, records, ends, words, row, index, chunks, local, first, seq, here, slope, logs, segment, weights,
                log_total, inner, grad_kbar, grad_vbar, DP, T, GROUP, GATED, PRECISION,
            )  # fmt: skip
        _store_gradients(
            grad_base, cos, sin, local, stride, part, here, scale, logit, logs, grad_k, grad_v, grad_inner, grad_product,
            kbar, q, f, k, v, q_deviation, q_factor, f_deviation, f_factor, k_deviation, k_factor, v_deviation, v_factor,
            D, DP, T, GATED, NORMALIZE, WEIGHT, turned_k,
        )  # fmt: skip
