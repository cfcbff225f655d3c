/* Local attention on a grid on CPUs: forward and backward. local_attention_cpu.py compiles and calls it.
 *
 * Vectors hold neighbouring cells of a row, one channel each, so the keys at another offset of the window are the same
 * memory, shifted. A tile of cells of one head is computed row by row. The rows of keys and values that the windows of a
 * row of queries reach stay in the cache of a core, channel by channel. The backward pass computes the weights again and
 * adds to the gradients of the same rows of keys, which are complete once the windows have passed. Cells whose distance is
 * a multiple of the dilation form grids of their own.
 */

#include "../common/cpu_attention_source.c"

enum { WIDEST = 32, MIN_ROWS = 8, USUAL_THREADS = 4 };

/* A tensor [batch, heads, height, width, dim] with channels side by side: its memory, and distances in elements. */
typedef struct {
    void *data;
    int64_t batch, head, row, column;
} Cells;

/* One call; the fields are mirrored in local_attention_cpu.py. */
typedef struct {
    int64_t batch, heads, height, width, dim, radius, dilation, bf16, threads;
    double scale;
    Cells q, k, v, out;                     /* `out` is written by the forward pass */
    Cells grad_out, grad_q, grad_k, grad_v; /* read and written by the backward pass */
    const uint8_t *mask;                    /* [batch, height, width], or NULL */
    const float *span, *bias;               /* [batch, heads, height, width] and [heads, (2 * radius + 1)^2], or NULL */
    float *grad_span, *grad_bias;           /* likewise, written by the backward pass */
    float *totals;                          /* [2, batch, heads, height, width]: largest logit, 1 / sum of exp(logit - it) */
    int64_t bands, strips, next, failed;    /* tiles down and across; the next tile to take; whether memory ran out */
    float *bias_parts;                      /* [tiles, (2 * radius + 1)^2]: what each adds to `grad_bias` */
} LocalAttention;

/* Cells of one page that one thread computes: of one head, row of the batch and phase of the dilation. */
typedef struct {
    int64_t b, h, down, across;         /* where they belong; `down` and `across` are the phase */
    int64_t height, width;              /* of the phase */
    int64_t top, bottom, left, right;   /* the cells whose results are written */
    int64_t query_left;                 /* first column of the queries; keys begin `radius` before it */
    int queries, keys;                  /* columns of them */
    int64_t number;
} Tile;

/* Memory of a thread. Rows of `stride` floats; rows of queries, gradients and weights begin with 2 * radius zeros. */
typedef struct {
    int64_t stride;
    float *query, *grad;           /* [dim, stride]: queries times scale, gradients of the output */
    float *keys, *values;          /* [2 * radius + 1, dim, stride] */
    float *hidden;                 /* [2 * radius + 1, stride]: -inf for keys that are not attended to, else 0 */
    float *seen;                   /* [2 * radius + 1, stride]: whether a window's part in this row has a key */
    float *weights, *slopes;       /* [(2 * radius + 1)^2, stride] */
    float *grad_keys, *grad_values; /* as keys */
    float *sums;                   /* [dim, stride] */
    float *top, *share, *inner;    /* [stride]: largest logit, 1 / sum, sum of weights times their gradients */
    float *span, *grad_span;       /* [stride]: of the queries of a row */
    void *memory;
} Work;

INLINE int64_t place(const LocalAttention *m, const Tile *t, const Cells *cells, int64_t y, int64_t x) {
    return t->b * cells->batch + t->h * cells->head + (t->down + y * m->dilation) * cells->row +
           (t->across + x * m->dilation) * cells->column;
}

/* Place of a cell in the mask and in one head of the totals. */
INLINE int64_t cell(const LocalAttention *m, const Tile *t, int64_t y, int64_t x) {
    return (t->down + y * m->dilation) * m->width + t->across + x * m->dilation;
}

/* Columns from `left` on of a row of cells, channel by channel, times `factor`. Columns beyond the grid become zero. */
INLINE void read_row(const LocalAttention *m, const Tile *t, const Cells *cells, int64_t y, int64_t left, int count,
                     float factor, float *to, int64_t stride) {
    read_columns(cells->data, (int)m->bf16, place(m, t, cells, y, left), m->dilation * cells->column, left, t->width,
                 count, (int)m->dim, factor, to, stride);
}

/* Columns left, ..., right - 1 of a row of cells, from channels; `from` is that of column `left`. */
INLINE void write_row(const LocalAttention *m, const Tile *t, const Cells *cells, int64_t y, int64_t left, int64_t right,
                      const float *from, int64_t stride) {
    write_columns(cells->data, (int)m->bf16, place(m, t, cells, y, left), m->dilation * cells->column,
                  (int)(right - left), (int)m->dim, from, stride);
}

/* Keys and values of a row, and which of them are attended to. */
INLINE void read_keys(const LocalAttention *m, Work *w, const Tile *t, int64_t y) {
    int side = 2 * (int)m->radius + 1;
    int64_t left = t->query_left - m->radius, slot = y % side, size = padded(m->dim) * w->stride;
    float *keys = w->keys + slot * size, *values = w->values + slot * size, *hidden = w->hidden + slot * w->stride;
    read_row(m, t, &m->k, y, left, t->keys, 1, keys, w->stride);
    read_row(m, t, &m->v, y, left, t->keys, 1, values, w->stride);
    for (int i = 0; i < t->keys; i++) {
        int inside = left + i >= 0 && left + i < t->width;
        int real = inside && (!m->mask || m->mask[t->b * m->height * m->width + cell(m, t, y, left + i)]);
        hidden[i] = real ? 0 : -INFINITY;
        if (!inside || real) continue;
        for (int d = 0; d < (int)m->dim; d++) keys[d * w->stride + i] = values[d * w->stride + i] = 0; /* NaN leaves no trace */
    }
    if (!m->mask) return;
    float *seen = w->seen + slot * w->stride;
    for (int i = 0; i < t->queries; i++) {
        seen[i] = 0;
        for (int b = 0; b < side; b++) seen[i] = hidden[i + b] == 0 ? 1 : seen[i];
    }
}

/* The rows of keys that row y of queries sees: first, ..., last. */
INLINE void visible_rows(const LocalAttention *m, const Tile *t, int64_t y, int64_t *first, int64_t *last) {
    *first = at_least(0, y - m->radius);
    *last = at_most(t->height - 1, y + m->radius);
}

/* Logits of row y of queries, at `w->weights`; the first row of the window that is on the grid is that of key row `first`. */
INLINE void logits(const LocalAttention *m, Work *w, int64_t y, const Tile *t, int64_t first, int64_t last) {
    int side = 2 * (int)m->radius + 1, border = 2 * (int)m->radius, columns = whole_vectors(t->queries);
    int64_t size = padded(m->dim) * w->stride;
    read_row(m, t, &m->q, y, t->query_left, t->queries, (float)m->scale, w->query + border, w->stride);
    for (int64_t row = first; row <= last; row++) {
        int64_t slot = row % side;
        window_products(w->query + border, w->keys + slot * size, w->hidden + slot * w->stride, (int)m->dim, w->stride,
                        w->stride, columns, side, w->weights + (row - first) * side * w->stride + border);
    }
}

/* How many neighbours key `n` is away, in the direction in which it is further; keys are counted from those of row `first`. */
INLINE float distance(const LocalAttention *m, int64_t y, int64_t first, int n) {
    int side = 2 * (int)m->radius + 1;
    int64_t down = first + n / side - y, across = n % side - m->radius;
    return (float)at_least(down < 0 ? -down : down, across < 0 ? -across : across);
}

/* Adds the bias of each offset to the logits of row y; keys that are a neighbour or more beyond the span become -inf. */
INLINE void adapt_logits(const LocalAttention *m, Work *w, const Tile *t, int64_t y, int64_t first, int64_t last) {
    int side = 2 * (int)m->radius + 1, count = (int)(last - first + 1) * side, queries = t->queries;
    const float *bias = m->bias ? m->bias + (t->h * side + first - y + m->radius) * side : NULL;
    for (int n = 0; bias && n < count; n++) {
        float *logit = w->weights + n * w->stride + 2 * m->radius;
        SIMD for (int i = 0; i < queries; i++) logit[i] += bias[n];
    }
    if (!m->span) return;
    const float *spans = m->span + (t->b * m->heads + t->h) * m->height * m->width;
    for (int i = 0; i < queries; i++) w->span[i] = spans[cell(m, t, y, t->query_left + i)];
    for (int n = 0; n < count; n++) {
        float *logit = w->weights + n * w->stride + 2 * m->radius, far = distance(m, y, first, n);
        SIMD for (int i = 0; i < queries; i++) logit[i] = w->span[i] + 1 <= far ? -INFINITY : logit[i];
    }
}

/* exp(logit - largest) of a key at a distance. The last neighbour of a span counts in part. */
INLINE float weight_within(float logit, float top, float span, float far) {
    return exp_negative(logit - top) * (span + 1 - far >= 1 ? 1 : span + 1 - far); /* NaN stays NaN */
}

/* Largest logits and 1 / sum of row y; the logits become exp(logit - largest). */
INLINE void softmax(const LocalAttention *m, Work *w, const Tile *t, int64_t y, int64_t first, int64_t last) {
    int side = 2 * (int)m->radius + 1, count = (int)(last - first + 1) * side, queries = t->queries;
    float *weights = w->weights + 2 * m->radius, *top = w->top, *share = w->share;
    for (int i = 0; i < queries; i++) top[i] = -INFINITY, share[i] = 0;
    for (int n = 0; n < count; n++) {
        const float *logit = weights + n * w->stride;
        SIMD for (int i = 0; i < queries; i++) top[i] = logit[i] > top[i] ? logit[i] : top[i];
    }
    for (int i = 0; m->mask && i < queries; i++) {
        float sees = 0;
        for (int64_t row = first; row <= last; row++) sees += w->seen[row % side * w->stride + i];
        if (sees == 0) top[i] = 0; /* exp(-inf - 0) is 0 */
    }
    for (int i = 0; m->span && i < queries; i++) top[i] = top[i] == -INFINITY ? 0 : top[i]; /* no key within the span */
    for (int n = 0; m->span && n < count; n++) {
        float *weight = weights + n * w->stride, far = distance(m, y, first, n);
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = weight_within(weight[i], top[i], w->span[i], far);
            share[i] += weight[i];
        }
    }
    for (int n = 0; !m->span && n < count; n++) {
        float *weight = weights + n * w->stride;
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = exp_negative(weight[i] - top[i]);
            share[i] += weight[i];
        }
    }
    SIMD for (int i = 0; i < queries; i++) share[i] = share[i] == 0 ? 0 : 1 / share[i];
}

INLINE float *totals(const LocalAttention *m, const Tile *t, int which) {
    return m->totals + ((which * m->batch + t->b) * m->heads + t->h) * m->height * m->width;
}

INLINE void forward_tile(const LocalAttention *m, Work *w, const Tile *t) {
    int side = 2 * (int)m->radius + 1, dim = padded(m->dim), columns = whole_vectors(t->queries);
    int64_t read = at_least(0, t->top - m->radius), first, last, size = dim * w->stride;
    for (int64_t y = t->top; y < t->bottom; y++) {
        visible_rows(m, t, y, &first, &last);
        for (; read <= last; read++) read_keys(m, w, t, read);
        logits(m, w, y, t, first, last);
        if (m->bias || m->span) adapt_logits(m, w, t, y, first, last);
        softmax(m, w, t, y, first, last);
        memset(w->sums, 0, size * sizeof(float));
        for (int64_t row = first; row <= last; row++)
            weigh(w->weights + (row - first) * side * w->stride + 2 * m->radius, w->values + row % side * size, dim,
                  w->stride, w->stride, columns, side, w->sums);
        for (int d = 0; d < (int)m->dim; d++) {
            SIMD for (int i = 0; i < t->queries; i++) w->sums[d * w->stride + i] *= w->share[i];
        }
        write_row(m, t, &m->out, y, t->left, t->right, w->sums, w->stride);
        for (int i = 0; i < t->queries; i++) {
            totals(m, t, 0)[cell(m, t, y, t->left + i)] = w->top[i];
            totals(m, t, 1)[cell(m, t, y, t->left + i)] = w->share[i];
        }
    }
}

/* Gradient of the span by key n, which counts in part. */
INLINE void span_backward(const LocalAttention *m, Work *w, const Tile *t, int64_t y, int64_t first, int n) {
    const float *weight = w->weights + n * w->stride + 2 * m->radius, *slope = w->slopes + n * w->stride + 2 * m->radius;
    float far = distance(m, y, first, n);
    if (n == 0) memset(w->grad_span, 0, t->queries * sizeof(float));
    SIMD for (int i = 0; i < t->queries; i++) {
        float share = w->span[i] + 1 - far;
        w->grad_span[i] += share > 0 && share < 1 ? weight[i] / share * (slope[i] - w->inner[i]) : 0;
    }
}

/* From logits, and products of gradients and values at `w->slopes`, to weights, and gradients of the logits. */
INLINE void logits_backward(const LocalAttention *m, Work *w, const Tile *t, int64_t y, int64_t first, int64_t last) {
    int side = 2 * (int)m->radius + 1, border = 2 * (int)m->radius, count = (int)(last - first + 1) * side;
    int queries = t->queries;
    float *top = w->top, *share = w->share, *inner = w->inner;
    for (int i = 0; i < queries; i++) {
        top[i] = totals(m, t, 0)[cell(m, t, y, t->query_left + i)];
        share[i] = totals(m, t, 1)[cell(m, t, y, t->query_left + i)];
        inner[i] = 0;
    }
    for (int n = 0; m->span && n < count; n++) {
        float *weight = w->weights + n * w->stride + border, *slope = w->slopes + n * w->stride + border;
        float far = distance(m, y, first, n);
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = weight_within(weight[i], top[i], w->span[i], far) * share[i];
            inner[i] += weight[i] * slope[i];
        }
    }
    for (int n = 0; !m->span && n < count; n++) {
        float *weight = w->weights + n * w->stride + border, *slope = w->slopes + n * w->stride + border;
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = exp_negative(weight[i] - top[i]) * share[i];
            inner[i] += weight[i] * slope[i];
        }
    }
    clear_ends(w->weights, count, border + queries, w->stride);
    clear_ends(w->slopes, count, border + queries, w->stride);
    clear_ends(w->query, m->dim, border + queries, w->stride);
    clear_ends(w->grad, m->dim, border + queries, w->stride);
    for (int n = 0; n < count; n++) {
        float *weight = w->weights + n * w->stride + border, *slope = w->slopes + n * w->stride + border;
        if (m->span) span_backward(m, w, t, y, first, n);
        SIMD for (int i = 0; i < queries; i++) slope[i] = weight[i] * (slope[i] - inner[i]);
    }
    if (y < t->top || y >= t->bottom) return; /* of another tile */
    int from = (int)(t->left - t->query_left), to = (int)(t->right - t->query_left);
    if (m->grad_bias) {
        float *sums = m->bias_parts + (t->number * side + first - y + m->radius) * side;
        for (int n = 0; n < count; n++) {
            const float *slope = w->slopes + n * w->stride + border;
            float sum = 0;
            SIMD_SUM(sum) for (int i = from; i < to; i++) sum += slope[i];
            sums[n] += sum;
        }
    }
    float *grads = m->grad_span + (t->b * m->heads + t->h) * m->height * m->width;
    for (int i = from; m->grad_span && i < to; i++) grads[cell(m, t, y, t->query_left + i)] = w->grad_span[i];
}

/* Gradients of row `row` of keys and values, which are complete, where they belong to this tile. */
INLINE void write_key_gradients(const LocalAttention *m, const Work *w, const Tile *t, int64_t row) {
    if (row < t->top || row >= t->bottom) return;
    int64_t slot = row % (2 * m->radius + 1) * padded(m->dim) * w->stride, at = t->left - (t->query_left - m->radius);
    write_row(m, t, &m->grad_k, row, t->left, t->right, w->grad_keys + slot + at, w->stride);
    write_row(m, t, &m->grad_v, row, t->left, t->right, w->grad_values + slot + at, w->stride);
}

INLINE void backward_tile(const LocalAttention *m, Work *w, const Tile *t) {
    int side = 2 * (int)m->radius + 1, border = 2 * (int)m->radius, dim = padded(m->dim);
    int columns = whole_vectors(t->queries);
    int64_t begin = at_least(0, t->top - m->radius), end = at_most(t->height, t->bottom + m->radius);
    int64_t read = at_least(0, begin - m->radius), done = read, first, last, size = dim * w->stride;
    for (int64_t y = begin; y < end; y++) {
        visible_rows(m, t, y, &first, &last);
        for (; read <= last; read++) {
            read_keys(m, w, t, read);
            memset(w->grad_keys + read % side * size, 0, size * sizeof(float));
            memset(w->grad_values + read % side * size, 0, size * sizeof(float));
        }
        logits(m, w, y, t, first, last);
        if (m->bias || m->span) adapt_logits(m, w, t, y, first, last);
        read_row(m, t, &m->grad_out, y, t->query_left, t->queries, 1, w->grad + border, w->stride);
        for (int64_t row = first; row <= last; row++)
            window_products(w->grad + border, w->values + row % side * size, NULL, (int)m->dim, w->stride, w->stride, columns,
                            side, w->slopes + (row - first) * side * w->stride + border);
        logits_backward(m, w, t, y, first, last);
        memset(w->sums, 0, size * sizeof(float));
        for (int64_t row = first; row <= last; row++) {
            const float *weights = w->weights + (row - first) * side * w->stride + border;
            const float *slopes = w->slopes + (row - first) * side * w->stride + border;
            int64_t slot = row % side * size;
            weigh(slopes, w->keys + slot, dim, w->stride, w->stride, columns, side, w->sums);
            weigh_back(weights, w->grad + border, dim, w->stride, w->stride, t->queries, side, w->grad_values + slot);
            weigh_back(slopes, w->query + border, dim, w->stride, w->stride, t->queries, side, w->grad_keys + slot);
        }
        if (y >= t->top && y < t->bottom) {
            for (int d = 0; d < (int)m->dim; d++) {
                SIMD for (int i = 0; i < t->queries; i++) w->sums[d * w->stride + i] *= (float)m->scale;
            }
            write_row(m, t, &m->grad_q, y, t->left, t->right, w->sums + (t->left - t->query_left), w->stride);
        }
        for (; done <= y - m->radius; done++) write_key_gradients(m, w, t, done);
    }
    for (; done < read; done++) write_key_gradients(m, w, t, done);
}

/* Columns of a strip, and rows of a band, of a phase. All phases are cut as the largest. */
INLINE int64_t per_part(int64_t length, int64_t dilation, int64_t parts) {
    int64_t longest = (length + dilation - 1) / dilation;
    return (longest + parts - 1) / parts;
}

/* Tile `number`; an empty one in phases that are smaller than the largest. */
INLINE Tile find_tile(const LocalAttention *m, int64_t number, int64_t halo) {
    Tile t;
    t.number = number;
    int64_t strip = number % m->strips, band = number / m->strips % m->bands;
    number /= m->strips * m->bands;
    t.across = number % at_most(m->dilation, m->width);
    number /= at_most(m->dilation, m->width);
    t.down = number % at_most(m->dilation, m->height);
    number /= at_most(m->dilation, m->height);
    t.h = number % m->heads;
    t.b = number / m->heads;
    t.height = (m->height - t.down + m->dilation - 1) / m->dilation;
    t.width = (m->width - t.across + m->dilation - 1) / m->dilation;
    int64_t rows = per_part(m->height, m->dilation, m->bands), columns = per_part(m->width, m->dilation, m->strips);
    t.top = at_most(band * rows, t.height);
    t.bottom = at_most(t.top + rows, t.height);
    t.left = at_most(strip * columns, t.width);
    t.right = at_most(t.left + columns, t.width);
    t.query_left = at_least(0, t.left - halo);
    t.queries = (int)(at_most(t.width, t.right + halo) - t.query_left);
    t.keys = t.queries + 2 * (int)m->radius;
    return t;
}

static int allocate(const LocalAttention *m, Work *w) {
    int64_t side = 2 * m->radius + 1, dim = padded(m->dim), used = 0;
    int64_t back = m->grad_out.data != NULL; /* what the forward pass does not use takes no memory */
    int64_t queries = at_most(per_part(m->width, m->dilation, m->strips) + 2 * m->radius, per_part(m->width, m->dilation, 1));
    int64_t stride = whole_vectors((int)(queries + 4 * m->radius)) + 2 * LANES; /* of the widest read beyond a row */
    stride += stride % 64 == 0 ? LANES : 0; /* rows a multiple of 256 bytes apart share few places of a cache */
    w->stride = stride;
    struct {
        float **slot;
        int64_t rows;
    } parts[] = {{&w->query, dim},
                 {&w->grad, back * dim},
                 {&w->keys, side * dim},
                 {&w->values, side * dim},
                 {&w->hidden, side},
                 {&w->seen, m->mask ? side : 0},
                 {&w->weights, side * side},
                 {&w->slopes, back * side * side},
                 {&w->grad_keys, back * side * dim},
                 {&w->grad_values, back * side * dim},
                 {&w->sums, dim},
                 {&w->top, 1},
                 {&w->share, 1},
                 {&w->inner, back},
                 {&w->span, m->span ? 1 : 0},
                 {&w->grad_span, m->span ? back : 0}};
    int count = sizeof(parts) / sizeof(parts[0]);
    for (int i = 0; i < count; i++) used += parts[i].rows * stride;
    if (posix_memalign(&w->memory, 64, (used + LANES) * sizeof(float))) return 0;
    memset(w->memory, 0, (used + LANES) * sizeof(float));
    float *place = w->memory;
    for (int i = 0; i < count; i++) {
        *parts[i].slot = place;
        place += parts[i].rows * stride;
    }
    return 1;
}

static int64_t count_tiles(const LocalAttention *m) {
    return m->batch * m->heads * at_most(m->dilation, m->height) * at_most(m->dilation, m->width) * m->bands * m->strips;
}

#define OVER_TILES(name, compute, halo)                                                                    \
    static void *name(void *argument) {                                                                    \
        LocalAttention *m = argument;                                                                      \
        Work w;                                                                                            \
        if (!allocate(m, &w)) {                                                                            \
            m->failed = NO_MEMORY;                                                                         \
            return NULL;                                                                                   \
        }                                                                                                  \
        int64_t number, count = count_tiles(m);                                                            \
        while ((number = __sync_fetch_and_add(&m->next, 1)) < count) {                                     \
            Tile t = find_tile(m, number, halo);                                                           \
            if (t.top < t.bottom && t.left < t.right) compute(m, &w, &t);                                  \
        }                                                                                                  \
        free(w.memory);                                                                                    \
        return NULL;                                                                                       \
    }
OVER_TILES(forward_tiles, forward_tile, 0)
OVER_TILES(backward_tiles, backward_tile, m->radius)

/* local_attention_cpu.py checks all tensors. */
static int over_tiles(void *(*work)(void *), LocalAttention *m) {
    if (m->batch < 1 || m->heads < 1 || m->height < 1 || m->width < 1 || m->dim < 1 || m->dilation < 1 ||
        m->radius < 0 || m->radius > WIDEST)
        return UNFIT;
    int64_t rows = per_part(m->height, m->dilation, 1);
    m->strips = (per_part(m->width, m->dilation, 1) + STRIP - 1) / STRIP;
    m->bands = 1;
    int64_t threads = m->grad_bias ? USUAL_THREADS : m->threads; /* its sums are of tiles, whose number must not differ */
    int64_t wanted = TILES_PER_THREAD * threads, tiles = count_tiles(m);
    if (threads > 1 && tiles < wanted)
        m->bands = at_least(1, at_most((wanted + tiles - 1) / tiles, rows / at_least(MIN_ROWS, 2 * m->radius)));
    int64_t offsets = (2 * m->radius + 1) * (2 * m->radius + 1);
    tiles = count_tiles(m);
    m->bias_parts = NULL;
    if (m->grad_bias && !(m->bias_parts = calloc(tiles * offsets, sizeof(float)))) return NO_MEMORY;
    in_threads(work, m, at_most(m->threads, tiles));
    for (int64_t number = 0; m->grad_bias && number < tiles; number++) {
        int64_t h = number / (tiles / (m->batch * m->heads)) % m->heads;
        for (int64_t n = 0; n < offsets; n++) m->grad_bias[h * offsets + n] += m->bias_parts[number * offsets + n];
    }
    free(m->bias_parts);
    return (int)m->failed;
}

int local_attention_forward(LocalAttention *m) { return over_tiles(forward_tiles, m); }
int local_attention_backward(LocalAttention *m) { return over_tiles(backward_tiles, m); }
