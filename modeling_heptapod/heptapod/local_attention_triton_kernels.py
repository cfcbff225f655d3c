"""The Triton kernels of local attention on a grid: forward, and backward once over queries and once over keys.

A program computes a tile of cells of one head and one phase. A phase is the grid of the cells that lie a multiple of the
dilation apart: places below are those in the phase. The tile meets the cells of its halo, that is of all windows around it
which are on the grid, `CHUNK` at a time.
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
    _FAR = tl.constexpr(1 << 28)  # a row that no window reaches
    _PRECISION = tl.constexpr("tf32x3")  # of products of float32: as good as float32

    @triton.jit
    def _program(heads, height, width, dilation, TALL: tl.constexpr, WIDE: tl.constexpr):
        """Row of the batch, head, first cell of the phase on the grid, and first cell of the tile in the phase."""
        order = tl.program_id(0)
        across, down = tl.cdiv(tl.cdiv(width, dilation), WIDE), tl.cdiv(tl.cdiv(height, dilation), TALL)
        left, order = order % across * WIDE, order // across
        top, order = order % down * TALL, order // down
        phase_x, order = order % tl.minimum(dilation, width), order // tl.minimum(dilation, width)
        phase_y, order = order % tl.minimum(dilation, height), order // tl.minimum(dilation, height)
        return (order // heads).to(tl.int64), (order % heads).to(tl.int64), phase_y, phase_x, top, left

    @triton.jit
    def _tile_cells(top, left, rows, columns, TALL: tl.constexpr, WIDE: tl.constexpr):
        """Places of the cells of a tile, and whether they are on the grid."""
        cell = tl.arange(0, TALL * WIDE)
        y, x = top + cell // WIDE, left + cell % WIDE
        return y, x, (y < rows) & (x < columns)

    @triton.jit
    def _halo(top, left, rows, columns, radius, TALL: tl.constexpr, WIDE: tl.constexpr):
        """First cell of the halo of a tile, its width, and the number of its cells, clipped at the borders of the grid."""
        first_y, first_x = tl.maximum(top - radius, 0), tl.maximum(left - radius, 0)
        tall = tl.minimum(top + TALL + radius, rows) - first_y
        wide = tl.minimum(left + WIDE + radius, columns) - first_x
        return first_y, first_x, tl.maximum(wide, 1), tl.maximum(tall, 0) * tl.maximum(wide, 0)

    @triton.jit
    def _halo_cells(first, halo_y, halo_x, wide, count, CHUNK: tl.constexpr):
        """Places of the cells of a halo from the `first` on, row by row, and whether there are so many."""
        cell = first + tl.arange(0, CHUNK)
        row = cell * ((1 << 19) // wide + 1) >> 19  # cell // wide for halos up to 72 x 72, without divisions
        return halo_y + row, halo_x + cell - row * wide, cell < count

    @triton.jit
    def _sees(y, x, other_y, other_x, there, radius):
        """Whether cells see others in their windows `[cells, others]`, of those that are there."""
        reach = (2 * radius).to(tl.uint32)  # as unsigned numbers, those below zero are larger
        other_y = tl.where(there, other_y, -_FAR)
        down = ((y + radius)[:, None] - other_y[None, :]).to(tl.uint32)
        across = ((x + radius)[:, None] - other_x[None, :]).to(tl.uint32)
        return (down <= reach) & (across <= reach)

    @triton.jit
    def _phase(base, strides, b, h, phase_y, phase_x):
        """The first cell of a phase, of a tensor `[batch, heads, height, width, channels]`."""
        cell = phase_y.to(tl.int64) * strides[2] + phase_x.to(tl.int64) * strides[3]
        return base + b * strides[0] + h * strides[1] + cell

    @triton.jit
    def _channels(phase, strides, dilation, y, x, here, D: tl.constexpr, DP: tl.constexpr):
        """Addresses `[cells, DP]` of the channels of cells, and whether there are such."""
        channel = tl.arange(0, DP)
        cell = phase + (y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]) * dilation
        kept = here[:, None]
        if D != DP:
            kept = kept & (channel < D)[None, :]
        return cell[:, None] + channel[None, :], kept

    @triton.jit
    def _load_cells(phase, strides, dilation, y, x, here, D: tl.constexpr, DP: tl.constexpr):
        """Channels of cells `[cells, DP]`, zero where there is no cell or channel."""
        address, kept = _channels(phase, strides, dilation, y, x, here, D, DP)
        return tl.load(address, mask=kept, other=0.0)

    @triton.jit
    def _store_cells(phase, strides, dilation, y, x, here, values, D: tl.constexpr, DP: tl.constexpr):
        address, kept = _channels(phase, strides, dilation, y, x, here, D, DP)
        tl.store(address, values.to(phase.dtype.element_ty), mask=kept)

    @triton.jit
    def _flat(row, height, width, phase_y, phase_x, dilation, y, x):
        """Places of cells in a contiguous tensor `[rows, height, width]`."""
        y, x = phase_y + y * dilation, phase_x + x * dilation
        return (row * height + y) * width + x

    @triton.jit
    def _are_kept(mask, place, here):
        """Whether there are cells at places, and the mask keeps them."""
        if mask is not None:
            here = here & (tl.load(mask + place, mask=here, other=0) != 0)
        return here

    @triton.jit
    def _adapt(logits, seen, down, across, span, bias, radius):
        """Logits with the bias of each offset, keys within the spans, and the shares with which these count.

        `down` and `across` are the offsets from queries to keys, `span` those of the queries `[queries, 1]`, transposed with the
        others, `bias` the address of a head's.
        """
        share = tl.full(logits.shape, 1.0, tl.float32)
        if bias is not None:
            place = (down + radius) * (2 * radius + 1) + across + radius
            logits += tl.load(bias + place, mask=seen, other=0.0)
        if span is not None:
            left = span + 1 - tl.maximum(tl.abs(down), tl.abs(across)).to(tl.float32)
            share = tl.where(left >= 1, 1.0, left)  # NaN stays NaN
            seen = seen & ((left > 0) | (left != left))
        return logits, seen, share

    @triton.jit(do_not_specialize=["heads", "height", "width", "radius", "dilation"])
    def forward_kernel(
        q, k, v, mask, span, bias, out, tops, shares, q_strides, k_strides, v_strides, out_strides, heads, height, width, radius,
        dilation, scale, D: tl.constexpr, DP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
        CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries: their outputs, their largest logits and one over the sums of the others relative to it."""
        b, h, phase_y, phase_x, top, left = _program(heads, height, width, dilation, TALL, WIDE)
        rows, columns = tl.cdiv(height - phase_y, dilation), tl.cdiv(width - phase_x, dilation)
        q = _phase(q, q_strides, b, h, phase_y, phase_x)
        k = _phase(k, k_strides, b, h, phase_y, phase_x)
        v = _phase(v, v_strides, b, h, phase_y, phase_x)
        out = _phase(out, out_strides, b, h, phase_y, phase_x)
        y, x, here = _tile_cells(top, left, rows, columns, TALL, WIDE)
        queries = _load_cells(q, q_strides, dilation, y, x, here, D, DP)
        place = _flat(b * heads + h, height, width, phase_y, phase_x, dilation, y, x)
        if span is not None:
            span = tl.load(span + place, mask=here, other=0.0)[:, None]
        if bias is not None:
            bias += h * (2 * radius + 1) * (2 * radius + 1)
        largest = tl.full([TALL * WIDE], _EMPTY, tl.float32)
        total = tl.zeros([TALL * WIDE], tl.float32)
        sums = tl.zeros([TALL * WIDE, DP], tl.float32)
        halo_y, halo_x, wide, count = _halo(top, left, rows, columns, radius, TALL, WIDE)
        for first in range(0, count, CHUNK):
            key_y, key_x, there = _halo_cells(first, halo_y, halo_x, wide, count, CHUNK)
            there = _are_kept(mask, _flat(b, height, width, phase_y, phase_x, dilation, key_y, key_x), there)
            keys = _load_cells(k, k_strides, dilation, key_y, key_x, there, D, DP)
            values = _load_cells(v, v_strides, dilation, key_y, key_x, there, D, DP)
            logits = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION) * scale
            seen = _sees(y, x, key_y, key_x, there, radius)
            if span is not None or bias is not None:
                down, across = key_y[None, :] - y[:, None], key_x[None, :] - x[:, None]
                logits, seen, part = _adapt(logits, seen, down, across, span, bias, radius)
            logits = tl.where(seen, logits, _NOTHING)
            larger = tl.maximum(largest, tl.max(logits, 1))
            weights, past = tl.exp(logits - larger[:, None]), tl.exp(largest - larger)
            if span is not None:
                weights = tl.where(seen, weights * part, 0.0)
            total = total * past + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * past[:, None], input_precision=_PRECISION)
            largest = larger
        sees = total != 0
        share = tl.where(sees, 1.0 / tl.where(sees, total, 1.0), 0.0)
        _store_cells(out, out_strides, dilation, y, x, here, sums * share[:, None], D, DP)
        tl.store(tops + place, tl.where(sees, largest, 0.0), mask=here)
        tl.store(shares + place, share, mask=here)

    @triton.jit
    def _weights_of_chunk(
        queries, grads, largest, share, span, bias, y, x, k, v, mask, k_strides, v_strides, first, halo_y, halo_x, wide, count,
        b, height, width, phase_y, phase_x, radius, dilation, scale, D: tl.constexpr, DP: tl.constexpr,
        CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Weights of a chunk of keys for a tile of queries, their gradients, zero where excluded, the keys, and what the
        weights of keys at the edge of a span would be within it.
        """
        key_y, key_x, there = _halo_cells(first, halo_y, halo_x, wide, count, CHUNK)
        there = _are_kept(mask, _flat(b, height, width, phase_y, phase_x, dilation, key_y, key_x), there)
        keys = _load_cells(k, k_strides, dilation, key_y, key_x, there, D, DP)
        values = _load_cells(v, v_strides, dilation, key_y, key_x, there, D, DP)
        seen = _sees(y, x, key_y, key_x, there, radius)
        logits = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION) * scale
        if span is not None or bias is not None:
            down, across = key_y[None, :] - y[:, None], key_x[None, :] - x[:, None]
            logits, seen, part = _adapt(logits, seen, down, across, span, bias, radius)
        weights = tl.exp(tl.where(seen, logits, _NOTHING) - largest[:, None]) * share[:, None]
        edge = weights
        if span is not None:
            edge, weights = tl.where(seen & (part < 1), weights, 0.0), tl.where(seen, weights * part, 0.0)
        grad_weights = tl.dot(grads, tl.trans(values), input_precision=_PRECISION)
        return weights, tl.where(seen, grad_weights, 0.0), keys, edge

    @triton.jit(do_not_specialize=["heads", "height", "width", "radius", "dilation"])
    def backward_queries_kernel(
        grad_out, q, k, v, mask, span, bias, grad_span, tops, shares, deltas, sent, grad_q, grad_out_strides, q_strides, k_strides, v_strides,
        grad_q_strides, heads, height, width, radius, dilation, scale, D: tl.constexpr, DP: tl.constexpr,
        TALL: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries: their gradients, in `deltas` the mean of the gradients of their weights, and which are `sent`.

        With padding, queries that see nothing send no gradient to keys, nor do pads that have come to infinity or NaN.
        """
        b, h, phase_y, phase_x, top, left = _program(heads, height, width, dilation, TALL, WIDE)
        rows, columns = tl.cdiv(height - phase_y, dilation), tl.cdiv(width - phase_x, dilation)
        grad_out = _phase(grad_out, grad_out_strides, b, h, phase_y, phase_x)
        q = _phase(q, q_strides, b, h, phase_y, phase_x)
        k = _phase(k, k_strides, b, h, phase_y, phase_x)
        v = _phase(v, v_strides, b, h, phase_y, phase_x)
        grad_q = _phase(grad_q, grad_q_strides, b, h, phase_y, phase_x)
        y, x, here = _tile_cells(top, left, rows, columns, TALL, WIDE)
        queries = _load_cells(q, q_strides, dilation, y, x, here, D, DP)
        grads = _load_cells(grad_out, grad_out_strides, dilation, y, x, here, D, DP)
        place = _flat(b * heads + h, height, width, phase_y, phase_x, dilation, y, x)
        largest = tl.load(tops + place, mask=here, other=0.0)
        share = tl.load(shares + place, mask=here, other=0.0)
        if span is not None:
            span = tl.load(span + place, mask=here, other=0.0)[:, None]
        if bias is not None:
            bias += h * (2 * radius + 1) * (2 * radius + 1)
        halo_y, halo_x, wide, count = _halo(top, left, rows, columns, radius, TALL, WIDE)
        delta = tl.zeros([TALL * WIDE], tl.float32)
        for first in range(0, count, CHUNK):
            weights, grad_weights, _, _ = _weights_of_chunk(
                queries, grads, largest, share, span, bias, y, x, k, v, mask, k_strides, v_strides, first, halo_y, halo_x, wide,
                count, b, height, width, phase_y, phase_x, radius, dilation, scale, D, DP, CHUNK,
            )  # fmt: skip
            delta += tl.sum(weights * grad_weights, 1)
        grad = tl.zeros([TALL * WIDE, DP], tl.float32)
        of_span = tl.zeros([TALL * WIDE], tl.float32)
        # The weights again: with the products summed before delta is known, rounding to 16 bits would not cancel.
        for first in range(0, count, CHUNK):
            weights, grad_weights, keys, edge = _weights_of_chunk(
                queries, grads, largest, share, span, bias, y, x, k, v, mask, k_strides, v_strides, first, halo_y, halo_x, wide,
                count, b, height, width, phase_y, phase_x, radius, dilation, scale, D, DP, CHUNK,
            )  # fmt: skip
            grad_logits = weights * (grad_weights - delta[:, None])
            if span is not None:
                of_span += tl.sum(edge * (grad_weights - delta[:, None]), 1)
            grad = tl.dot(grad_logits.to(keys.dtype), keys, grad, input_precision=_PRECISION)
        tl.store(deltas + place, delta, mask=here)
        if span is not None:
            tl.store(grad_span + place, of_span, mask=here)
        if mask is not None:
            real = _are_kept(mask, _flat(b, height, width, phase_y, phase_x, dilation, y, x), here)
            sends = (share != 0) & (real | (tl.abs(delta) < float("inf")))
            tl.store(sent + place, sends.to(tl.uint8), mask=here)
        _store_cells(grad_q, grad_q_strides, dilation, y, x, here, grad * scale, D, DP)

    @triton.jit(do_not_specialize=["heads", "height", "width", "radius", "dilation"])
    def backward_keys_kernel(
        grad_out, q, k, v, mask, span, bias, tops, shares, deltas, sent, grad_k, grad_v, grad_out_strides, q_strides, k_strides,
        v_strides, grad_strides, heads, height, width, radius, dilation, scale, D: tl.constexpr, DP: tl.constexpr,
        TALL: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A tile of keys and values: their gradients, from the queries in their windows."""
        b, h, phase_y, phase_x, top, left = _program(heads, height, width, dilation, TALL, WIDE)
        rows, columns = tl.cdiv(height - phase_y, dilation), tl.cdiv(width - phase_x, dilation)
        grad_out = _phase(grad_out, grad_out_strides, b, h, phase_y, phase_x)
        q = _phase(q, q_strides, b, h, phase_y, phase_x)
        k = _phase(k, k_strides, b, h, phase_y, phase_x)
        v = _phase(v, v_strides, b, h, phase_y, phase_x)
        grad_k = _phase(grad_k, grad_strides, b, h, phase_y, phase_x)
        grad_v = _phase(grad_v, grad_strides, b, h, phase_y, phase_x)
        y, x, here = _tile_cells(top, left, rows, columns, TALL, WIDE)
        real = _are_kept(mask, _flat(b, height, width, phase_y, phase_x, dilation, y, x), here)
        keys = _load_cells(k, k_strides, dilation, y, x, real, D, DP)
        values = _load_cells(v, v_strides, dilation, y, x, real, D, DP)
        seen_y = tl.where(real, y, _FAR)
        if bias is not None:
            bias += h * (2 * radius + 1) * (2 * radius + 1)
        sum_k = tl.zeros([TALL * WIDE, DP], tl.float32)
        sum_v = tl.zeros([TALL * WIDE, DP], tl.float32)
        halo_y, halo_x, wide, count = _halo(top, left, rows, columns, radius, TALL, WIDE)
        for first in range(0, count, CHUNK):
            query_y, query_x, there = _halo_cells(first, halo_y, halo_x, wide, count, CHUNK)
            place = _flat(b * heads + h, height, width, phase_y, phase_x, dilation, query_y, query_x)
            there = _are_kept(sent, place, there)
            queries = _load_cells(q, q_strides, dilation, query_y, query_x, there, D, DP)
            grads = _load_cells(grad_out, grad_out_strides, dilation, query_y, query_x, there, D, DP)
            largest = tl.load(tops + place, mask=there, other=0.0)
            share = tl.load(shares + place, mask=there, other=0.0)
            delta = tl.load(deltas + place, mask=there, other=0.0)
            seen = _sees(seen_y, x, query_y, query_x, there, radius)
            logits = tl.dot(keys, tl.trans(queries), input_precision=_PRECISION) * scale
            if span is not None or bias is not None:
                down, across = y[:, None] - query_y[None, :], x[:, None] - query_x[None, :]
                if span is not None:
                    spans = tl.load(span + place, mask=there, other=0.0)[None, :]
                else:
                    spans = span
                logits, seen, part = _adapt(logits, seen, down, across, spans, bias, radius)
            weights = tl.exp(tl.where(seen, logits, _NOTHING) - largest[None, :]) * share[None, :]
            if span is not None:
                weights = tl.where(seen, weights * part, 0.0)
            sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=_PRECISION)
            grad_weights = tl.dot(values, tl.trans(grads), input_precision=_PRECISION)
            grad_logits = weights * (grad_weights - delta[None, :])
            sum_k = tl.dot(grad_logits.to(queries.dtype), queries, sum_k, input_precision=_PRECISION)
        _store_cells(grad_k, grad_strides, dilation, y, x, here, sum_k * scale, D, DP)
        _store_cells(grad_v, grad_strides, dilation, y, x, here, sum_v, D, DP)

    @triton.jit(do_not_specialize=["heads", "height", "width", "radius", "dilation"])
    def backward_bias_kernel(
        grad_out, q, k, v, mask, span, bias, tops, shares, deltas, parts, grad_out_strides, q_strides, k_strides,
        v_strides, heads, height, width, radius, dilation, scale, D: tl.constexpr, DP: tl.constexpr, CELLS: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the bias of one offset, from `CELLS` queries of a head, into `parts [blocks, batch, heads, side, side]`."""
        block, offset, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        side = 2 * radius + 1
        b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
        q, grad_out = (
            q + b * q_strides[0] + h * q_strides[1],
            grad_out + b * grad_out_strides[0] + h * grad_out_strides[1],
        )
        k, v = k + b * k_strides[0] + h * k_strides[1], v + b * v_strides[0] + h * v_strides[1]
        cell = block * CELLS + tl.arange(0, CELLS)
        y, x = cell // width, cell % width
        down, across = offset // side - radius, offset % side - radius
        key_y, key_x = y + down * dilation, x + across * dilation
        seen = (cell < height * width) & (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
        seen = _are_kept(mask, (b * height + key_y) * width + key_x, seen)
        place = (b * heads + h) * height * width + cell
        share = tl.load(shares + place, mask=seen, other=0.0)
        left = 1.0
        if span is not None:
            left = tl.load(span + place, mask=seen, other=0.0) + 1 - tl.maximum(tl.abs(down), tl.abs(across))
            seen = seen & ((left > 0) | (left != left))
            left = tl.where(left >= 1, 1.0, left)
        queries = _load_cells(q, q_strides, 1, y, x, seen, D, DP).to(tl.float32)
        keys = _load_cells(k, k_strides, 1, key_y, key_x, seen, D, DP).to(tl.float32)
        logits = tl.sum(queries * keys, 1) * scale + tl.load(bias + h * side * side + offset)
        largest = tl.load(tops + place, mask=seen, other=0.0)
        weights = tl.where(seen, tl.exp(tl.where(seen, logits, _NOTHING) - largest) * share * left, 0.0)
        grads = _load_cells(grad_out, grad_out_strides, 1, y, x, seen, D, DP).to(tl.float32)
        values = _load_cells(v, v_strides, 1, key_y, key_x, seen, D, DP).to(tl.float32)
        delta = tl.load(deltas + place, mask=seen, other=0.0)
        grad_logits = tl.where(seen, weights * (tl.sum(grads * values, 1) - delta), 0.0)
        total = tl.num_programs(2).to(tl.int64) * side * side
        tl.store(parts + block * total + row.to(tl.int64) * side * side + offset, tl.sum(grad_logits, 0))
