"""The Triton kernels of windowed attention: forward, and backward once over queries and once over keys.

A program computes a tile of steps of one head and one phase. A phase is the row of the steps that lie a multiple of the
dilation apart: places below are those in the phase. The tile meets the keys in its windows, or the queries in whose windows it
is, `CHUNK` at a time.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    # In place of minus infinity, and finite, so that no difference is NaN: for excluded logits and, larger, for no logits.
    _NOTHING = tl.constexpr(-1e30)
    _EMPTY = tl.constexpr(-1e29)
    _PRECISION = tl.constexpr("tf32x3")  # of products of float32: as good as float32

    @triton.jit
    def _program(heads, length, dilation, TILE: tl.constexpr):
        """Row of the batch, head, first step of the phase, and first place of the tile in it."""
        order = tl.program_id(0)
        tiles = tl.cdiv(tl.cdiv(length, dilation), TILE)
        first, order = order % tiles * TILE, order // tiles
        phase, order = order % tl.minimum(dilation, length), order // tl.minimum(dilation, length)
        return (order // heads).to(tl.int64), (order % heads).to(tl.int64), phase, first

    @triton.jit
    def _phase(base, strides, b, h, phase):
        """The first step of a phase, of a tensor `[batch, length, heads, channels]`."""
        return base + b * strides[0] + phase.to(tl.int64) * strides[1] + h * strides[2]

    @triton.jit
    def _channels(phase, strides, dilation, x, here, D: tl.constexpr, DP: tl.constexpr):
        """Addresses `[steps, DP]` of the channels of steps, and whether there are such."""
        channel = tl.arange(0, DP)
        step = phase + x.to(tl.int64) * dilation * strides[1]
        kept = here[:, None]
        if D != DP:
            kept = kept & (channel < D)[None, :]
        return step[:, None] + channel[None, :], kept

    @triton.jit
    def _load_steps(phase, strides, dilation, x, here, D: tl.constexpr, DP: tl.constexpr):
        """Channels of steps `[steps, DP]`, zero where there is no step or channel."""
        address, kept = _channels(phase, strides, dilation, x, here, D, DP)
        return tl.load(address, mask=kept, other=0.0)

    @triton.jit
    def _store_steps(phase, strides, dilation, x, here, values, D: tl.constexpr, DP: tl.constexpr):
        address, kept = _channels(phase, strides, dilation, x, here, D, DP)
        tl.store(address, values.to(phase.dtype.element_ty), mask=kept)

    @triton.jit
    def _load_reach(reach, reach_batch, b, phase, dilation, x, here):
        """Number of keys that queries see, 0 where there is no query."""
        return tl.load(reach + b * reach_batch + phase + x * dilation, mask=here, other=0)

    @triton.jit(do_not_specialize=["heads", "length", "reach_batch", "span", "dilation"])
    def forward_kernel(
        q, k, v, reach, out, tops, shares, q_strides, k_strides, v_strides, out_strides, heads, length, reach_batch, span,
        dilation, scale, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries: their outputs, their largest logits and one over the sums of the others relative to it."""
        b, h, phase, first = _program(heads, length, dilation, TILE)
        steps = tl.cdiv(length - phase, dilation)
        q, k = _phase(q, q_strides, b, h, phase), _phase(k, k_strides, b, h, phase)
        v, out = _phase(v, v_strides, b, h, phase), _phase(out, out_strides, b, h, phase)
        x = first + tl.arange(0, TILE)
        here = x < steps
        queries = _load_steps(q, q_strides, dilation, x, here, D, DP)
        farthest = x - _load_reach(reach, reach_batch, b, phase, dilation, x, here)
        largest = tl.full([TILE], _EMPTY, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        sums = tl.zeros([TILE, DP], tl.float32)
        end = tl.minimum(first + TILE, steps)
        for start in range(tl.maximum(first - span + 1, 0), end, CHUNK):
            key_x = start + tl.arange(0, CHUNK)
            there = key_x < end
            keys = _load_steps(k, k_strides, dilation, key_x, there, D, DP)
            values = _load_steps(v, v_strides, dilation, key_x, there, D, DP)
            logits = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION) * scale
            seen = (key_x[None, :] <= x[:, None]) & (key_x[None, :] > farthest[:, None])
            logits = tl.where(seen, logits, _NOTHING)
            larger = tl.maximum(largest, tl.max(logits, 1))
            weights, past = tl.exp(logits - larger[:, None]), tl.exp(largest - larger)
            total = total * past + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * past[:, None], input_precision=_PRECISION)
            largest = larger
        sees = total != 0
        share = tl.where(sees, 1.0 / tl.where(sees, total, 1.0), 0.0)
        _store_steps(out, out_strides, dilation, x, here, sums * share[:, None], D, DP)
        place = (b * heads + h) * length + phase + x * dilation
        tl.store(tops + place, tl.where(sees, largest, 0.0), mask=here)
        tl.store(shares + place, share, mask=here)

    @triton.jit
    def _weights_of_chunk(
        queries, grads, largest, share, x, farthest, k, v, k_strides, v_strides, start, end, dilation, scale,
        D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Weights of a chunk of keys for a tile of queries, their gradients, zero where excluded, and the keys."""
        key_x = start + tl.arange(0, CHUNK)
        keys = _load_steps(k, k_strides, dilation, key_x, key_x < end, D, DP)
        values = _load_steps(v, v_strides, dilation, key_x, key_x < end, D, DP)
        seen = (key_x[None, :] <= x[:, None]) & (key_x[None, :] > farthest[:, None])
        logits = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION) * scale
        weights = tl.exp(tl.where(seen, logits, _NOTHING) - largest[:, None]) * share[:, None]
        grad_weights = tl.dot(grads, tl.trans(values), input_precision=_PRECISION)
        return weights, tl.where(seen, grad_weights, 0.0), keys

    @triton.jit(do_not_specialize=["heads", "length", "reach_batch", "span", "dilation"])
    def backward_queries_kernel(
        grad_out, q, k, v, reach, tops, shares, deltas, grad_q, grad_out_strides, q_strides, k_strides, v_strides,
        grad_q_strides, heads, length, reach_batch, span, dilation, scale, D: tl.constexpr, DP: tl.constexpr,
        TILE: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries: their gradients, and in `deltas` the mean of the gradients of their weights."""
        b, h, phase, first = _program(heads, length, dilation, TILE)
        steps = tl.cdiv(length - phase, dilation)
        grad_out, q = _phase(grad_out, grad_out_strides, b, h, phase), _phase(q, q_strides, b, h, phase)
        k, v = _phase(k, k_strides, b, h, phase), _phase(v, v_strides, b, h, phase)
        grad_q = _phase(grad_q, grad_q_strides, b, h, phase)
        x = first + tl.arange(0, TILE)
        here = x < steps
        queries = _load_steps(q, q_strides, dilation, x, here, D, DP)
        grads = _load_steps(grad_out, grad_out_strides, dilation, x, here, D, DP)
        farthest = x - _load_reach(reach, reach_batch, b, phase, dilation, x, here)
        place = (b * heads + h) * length + phase + x * dilation
        largest = tl.load(tops + place, mask=here, other=0.0)
        share = tl.load(shares + place, mask=here, other=0.0)
        begin, end = tl.maximum(first - span + 1, 0), tl.minimum(first + TILE, steps)
        delta = tl.zeros([TILE], tl.float32)
        for start in range(begin, end, CHUNK):
            weights, grad_weights, _ = _weights_of_chunk(
                queries, grads, largest, share, x, farthest, k, v, k_strides, v_strides, start, end, dilation, scale,
                D, DP, CHUNK,
            )  # fmt: skip
            delta += tl.sum(weights * grad_weights, 1)
        grad = tl.zeros([TILE, DP], tl.float32)
        # The weights again: with the products summed before delta is known, rounding to 16 bits would not cancel.
        for start in range(begin, end, CHUNK):
            weights, grad_weights, keys = _weights_of_chunk(
                queries, grads, largest, share, x, farthest, k, v, k_strides, v_strides, start, end, dilation, scale,
                D, DP, CHUNK,
            )  # fmt: skip
            grad_logits = weights * (grad_weights - delta[:, None])
            grad = tl.dot(grad_logits.to(keys.dtype), keys, grad, input_precision=_PRECISION)
        tl.store(deltas + place, delta, mask=here)
        _store_steps(grad_q, grad_q_strides, dilation, x, here, grad * scale, D, DP)

    @triton.jit(do_not_specialize=["heads", "length", "reach_batch", "span", "dilation"])
    def backward_keys_kernel(
        grad_out, q, k, v, reach, tops, shares, deltas, grad_k, grad_v, grad_out_strides, q_strides, k_strides, v_strides,
        grad_strides, heads, length, reach_batch, span, dilation, scale, D: tl.constexpr, DP: tl.constexpr,
        TILE: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of keys and values: their gradients, from the queries in whose windows they are."""
        b, h, phase, first = _program(heads, length, dilation, TILE)
        steps = tl.cdiv(length - phase, dilation)
        grad_out, q = _phase(grad_out, grad_out_strides, b, h, phase), _phase(q, q_strides, b, h, phase)
        k, v = _phase(k, k_strides, b, h, phase), _phase(v, v_strides, b, h, phase)
        grad_k, grad_v = _phase(grad_k, grad_strides, b, h, phase), _phase(grad_v, grad_strides, b, h, phase)
        x = first + tl.arange(0, TILE)
        here = x < steps
        keys = _load_steps(k, k_strides, dilation, x, here, D, DP)
        values = _load_steps(v, v_strides, dilation, x, here, D, DP)
        sum_k = tl.zeros([TILE, DP], tl.float32)
        sum_v = tl.zeros([TILE, DP], tl.float32)
        for start in range(first, tl.minimum(first + TILE + span - 1, steps), CHUNK):
            query_x = start + tl.arange(0, CHUNK)
            there = query_x < steps
            queries = _load_steps(q, q_strides, dilation, query_x, there, D, DP)
            grads = _load_steps(grad_out, grad_out_strides, dilation, query_x, there, D, DP)
            farthest = query_x - _load_reach(reach, reach_batch, b, phase, dilation, query_x, there)
            place = (b * heads + h) * length + phase + query_x * dilation
            largest = tl.load(tops + place, mask=there, other=0.0)
            share = tl.load(shares + place, mask=there, other=0.0)
            delta = tl.load(deltas + place, mask=there, other=0.0)
            seen = (x[:, None] <= query_x[None, :]) & (x[:, None] > farthest[None, :])
            logits = tl.dot(keys, tl.trans(queries), input_precision=_PRECISION) * scale
            weights = tl.exp(tl.where(seen, logits, _NOTHING) - largest[None, :]) * share[None, :]
            sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=_PRECISION)
            grad_weights = tl.dot(values, tl.trans(grads), input_precision=_PRECISION)
            grad_logits = weights * tl.where(seen, grad_weights - delta[None, :], 0.0)
            sum_k = tl.dot(grad_logits.to(queries.dtype), queries, sum_k, input_precision=_PRECISION)
        _store_steps(grad_k, grad_strides, dilation, x, here, sum_k * scale, D, DP)
        _store_steps(grad_v, grad_strides, dilation, x, here, sum_v, D, DP)
