/* Causal attention with a window and a dilation on CPUs: forward and backward. windowed_attention_cpu.py compiles and calls it.
 *
 * Steps whose distance is a multiple of the dilation form a row of their own, a phase. A tile of queries of a phase is
 * computed at once, with the keys and values of its windows in the cache of a core, channel by channel. The backward pass
 * computes the weights again and adds to the gradients of those keys, which are complete once the windows have passed.
 */

#include "../common/cpu_attention_source.c"

enum { LONGEST = 1024, MIN_WINDOWS = 4 };

/* A tensor [batch, length, heads, dim] with channels side by side: its memory, and distances in elements. */
typedef struct {
    void *data;
    int64_t batch, step, head;
} Steps;

/* One call; the fields are mirrored in windowed_attention_cpu.py. */
typedef struct {
    int64_t batch, length, heads, dim, span, dilation, bf16, threads;
    double scale;
    Steps q, k, v, out;                     /* `out` is written by the forward pass */
    Steps grad_out, grad_q, grad_k, grad_v; /* read and written by the backward pass */
    const int32_t *reach;  /* [batch, length]: how many keys of its phase a query sees, itself the last; at most `span` */
    int64_t reach_batch;   /* distance of its rows */
    float *totals;         /* [2, batch, heads, length]: largest logit, 1 / sum of exp(logit - it) */
    int64_t bands, next, failed; /* parts of a phase; the next part to take; whether memory ran out */
} WindowedAttention;

/* Queries and keys `left`, ..., `right` - 1 of a phase, whose results one thread computes. */
typedef struct {
    int64_t b, h, phase, length; /* where they belong, and number of steps of the phase */
    int64_t left, right;
} Band;

/* Memory of a thread. Rows of `stride` floats for queries, of `key_stride` for keys. */
typedef struct {
    int64_t stride, key_stride, block; /* `block`: queries whose keys are held at once */
    float *query, *grad;               /* [dim, stride] after LANES zeros: queries times scale, gradients of the output */
    float *keys, *values;              /* [dim, key_stride]: `span` - 1 before the block, and the block's */
    float *grad_keys, *grad_values;    /* the same */
    float *weights, *slopes;           /* [span, stride] after LANES zeros */
    float *sums;                       /* [dim, stride] */
    float *reach, *top, *share, *inner; /* [stride] */
    void *memory;
} Work;

INLINE int64_t place(const WindowedAttention *m, const Band *t, const Steps *steps, int64_t i) {
    return t->b * steps->batch + t->h * steps->head + (t->phase + i * m->dilation) * steps->step;
}

INLINE float *totals(const WindowedAttention *m, const Band *t, int which, int64_t i) {
    return m->totals + ((which * m->batch + t->b) * m->heads + t->h) * m->length + t->phase + i * m->dilation;
}

/* `count` steps from `first` on, channel by channel, times `factor`. Those outside of the phase become zero. */
INLINE void read_steps(const WindowedAttention *m, const Band *t, const Steps *steps, int64_t first, int64_t count,
                       float factor, float *to, int64_t stride) {
    read_columns(steps->data, (int)m->bf16, place(m, t, steps, first), m->dilation * steps->step, first, t->length,
                 (int)count, (int)m->dim, factor, to, stride);
}

INLINE void write_steps(const WindowedAttention *m, const Band *t, const Steps *steps, int64_t first, int64_t count,
                        const float *from, int64_t stride) {
    write_columns(steps->data, (int)m->bf16, place(m, t, steps, first), m->dilation * steps->step, (int)count,
                  (int)m->dim, from, stride);
}

/* Moves the last `kept` of `kept + block` columns to the front. */
INLINE void move_columns(float *rows, int dim, int64_t stride, int64_t kept, int64_t block) {
    for (int d = 0; d < dim; d++) memmove(rows + d * stride, rows + d * stride + block, kept * sizeof(float));
}

/* Keys and values of the queries `from`, ..., `to` - 1, of which the first of a band reads all. */
INLINE void read_keys(const WindowedAttention *m, Work *w, const Band *t, int64_t from, int64_t to) {
    int64_t kept = from == t->left ? 0 : m->span - 1, first = from == t->left ? from - m->span + 1 : from;
    move_columns(w->keys, (int)m->dim, w->key_stride, kept, w->block);
    move_columns(w->values, (int)m->dim, w->key_stride, kept, w->block);
    read_steps(m, t, &m->k, first, to - first, 1, w->keys + kept, w->key_stride);
    read_steps(m, t, &m->v, first, to - first, 1, w->values + kept, w->key_stride);
}

/* Reads how many keys the queries see, and returns the most. */
INLINE int read_reach(const WindowedAttention *m, Work *w, const Band *t, int64_t first, int queries) {
    int most = 1;
    for (int i = 0; i < queries; i++) {
        int32_t reach = m->reach[t->b * m->reach_batch + t->phase + (first + i) * m->dilation];
        reach = reach < m->span ? reach : (int32_t)m->span;
        w->reach[i] = (float)reach;
        most = reach > most ? reach : most;
    }
    return most;
}

/* Logits of queries from `first` on, at `w->weights`: -inf where a query sees no key. Keys begin with that `side` - 1 before. */
INLINE void logits(const WindowedAttention *m, Work *w, const Band *t, int64_t first, int queries, const float *keys,
                   int side) {
    read_steps(m, t, &m->q, first, queries, (float)m->scale, w->query + LANES, w->stride);
    window_products(w->query + LANES, keys, NULL, (int)m->dim, w->stride, w->key_stride, whole_vectors(queries), side,
                    w->weights + LANES);
    for (int b = 0; b < side; b++) {
        float *logit = w->weights + LANES + b * w->stride, behind = (float)(side - 1 - b);
        SIMD for (int i = 0; i < queries; i++) logit[i] = w->reach[i] > behind ? logit[i] : -INFINITY;
    }
}

/* Largest logits and 1 / sum; the logits become exp(logit - largest). */
INLINE void softmax(Work *w, int queries, int side) {
    float *top = w->top, *share = w->share;
    for (int i = 0; i < queries; i++) top[i] = -INFINITY, share[i] = 0;
    for (int b = 0; b < side; b++) {
        const float *logit = w->weights + LANES + b * w->stride;
        SIMD for (int i = 0; i < queries; i++) top[i] = logit[i] > top[i] ? logit[i] : top[i];
    }
    for (int i = 0; i < queries; i++) top[i] = w->reach[i] < 1 ? 0 : top[i]; /* exp(-inf - 0) is 0 */
    for (int b = 0; b < side; b++) {
        float *weight = w->weights + LANES + b * w->stride;
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = exp_negative(weight[i] - top[i]);
            share[i] += weight[i];
        }
    }
    SIMD for (int i = 0; i < queries; i++) share[i] = share[i] == 0 ? 0 : 1 / share[i];
}

INLINE void forward_band(const WindowedAttention *m, Work *w, const Band *t) {
    int dim = padded(m->dim);
    for (int64_t from = t->left; from < t->right; from += w->block) {
        int64_t to = at_most(t->right, from + w->block);
        read_keys(m, w, t, from, to);
        for (int64_t first = from; first < to; first += STRIP) {
            int queries = (int)at_most(STRIP, to - first), side = read_reach(m, w, t, first, queries);
            int64_t at = first - from + m->span - side;
            logits(m, w, t, first, queries, w->keys + at, side);
            softmax(w, queries, side);
            memset(w->sums, 0, dim * w->stride * sizeof(float));
            weigh(w->weights + LANES, w->values + at, dim, w->stride, w->key_stride, whole_vectors(queries), side,
                  w->sums);
            for (int d = 0; d < (int)m->dim; d++) {
                SIMD for (int i = 0; i < queries; i++) w->sums[d * w->stride + i] *= w->share[i];
            }
            write_steps(m, t, &m->out, first, queries, w->sums, w->stride);
            for (int i = 0; i < queries; i++) {
                *totals(m, t, 0, first + i) = w->top[i];
                *totals(m, t, 1, first + i) = w->share[i];
            }
        }
    }
}

/* From logits, and products of gradients and values at `w->slopes`, to weights, and gradients of the logits. */
INLINE void logits_backward(const WindowedAttention *m, Work *w, const Band *t, int64_t first, int queries, int side) {
    float *top = w->top, *share = w->share, *inner = w->inner;
    for (int i = 0; i < queries; i++) {
        top[i] = *totals(m, t, 0, first + i);
        share[i] = *totals(m, t, 1, first + i);
        inner[i] = 0;
    }
    for (int b = 0; b < side; b++) {
        float *weight = w->weights + LANES + b * w->stride, *slope = w->slopes + LANES + b * w->stride;
        SIMD for (int i = 0; i < queries; i++) {
            weight[i] = exp_negative(weight[i] - top[i]) * share[i];
            inner[i] += weight[i] * slope[i];
        }
    }
    for (int b = 0; b < side; b++) {
        float *weight = w->weights + LANES + b * w->stride, *slope = w->slopes + LANES + b * w->stride;
        SIMD for (int i = 0; i < queries; i++) slope[i] = weight[i] * (slope[i] - inner[i]);
    }
    clear_ends(w->weights, side, LANES + queries, w->stride);
    clear_ends(w->slopes, side, LANES + queries, w->stride);
    clear_ends(w->query, m->dim, LANES + queries, w->stride);
    clear_ends(w->grad, m->dim, LANES + queries, w->stride);
}

/* Gradients of the queries from `first` on; adds to those of keys and values, which begin at column `at`. */
INLINE void backward_tile(const WindowedAttention *m, Work *w, const Band *t, int64_t first, int queries, int64_t at,
                          int side) {
    int dim = padded(m->dim), columns = whole_vectors(queries);
    logits(m, w, t, first, queries, w->keys + at, side);
    read_steps(m, t, &m->grad_out, first, queries, 1, w->grad + LANES, w->stride);
    window_products(w->grad + LANES, w->values + at, NULL, (int)m->dim, w->stride, w->key_stride, columns, side,
                    w->slopes + LANES);
    logits_backward(m, w, t, first, queries, side);
    weigh_back(w->weights + LANES, w->grad + LANES, dim, w->stride, w->key_stride, queries, side, w->grad_values + at);
    weigh_back(w->slopes + LANES, w->query + LANES, dim, w->stride, w->key_stride, queries, side, w->grad_keys + at);
    if (first >= t->right) return;
    memset(w->sums, 0, dim * w->stride * sizeof(float));
    weigh(w->slopes + LANES, w->keys + at, dim, w->stride, w->key_stride, columns, side, w->sums);
    for (int d = 0; d < (int)m->dim; d++) {
        SIMD for (int i = 0; i < queries; i++) w->sums[d * w->stride + i] *= (float)m->scale;
    }
    write_steps(m, t, &m->grad_q, first, at_most(queries, t->right - first), w->sums, w->stride);
}

/* Writes gradients of keys and values at columns 0, ..., `count` - 1, the first of which is key `first`. */
INLINE void write_keys(const WindowedAttention *m, const Work *w, const Band *t, int64_t first, int64_t count) {
    int64_t begin = at_least(first, t->left), end = at_most(first + count, t->right);
    if (begin >= end) return;
    write_steps(m, t, &m->grad_k, begin, end - begin, w->grad_keys + begin - first, w->key_stride);
    write_steps(m, t, &m->grad_v, begin, end - begin, w->grad_values + begin - first, w->key_stride);
}

INLINE void backward_band(const WindowedAttention *m, Work *w, const Band *t) {
    int dim = padded(m->dim);
    int64_t kept = m->span - 1, end = at_most(t->length, t->right + kept); /* later queries see keys of this band */
    for (int64_t from = t->left; from < end; from += w->block) {
        int64_t to = at_most(end, from + w->block), old = from == t->left ? 0 : kept;
        read_keys(m, w, t, from, to);
        for (int which = 0; which < 2; which++) {
            float *grads = which ? w->grad_values : w->grad_keys;
            move_columns(grads, dim, w->key_stride, old, w->block);
            for (int d = 0; d < dim; d++)
                memset(grads + d * w->key_stride + old, 0, (w->key_stride - old) * sizeof(float));
        }
        for (int64_t first = from; first < to; first += STRIP) {
            int queries = (int)at_most(STRIP, to - first), side = read_reach(m, w, t, first, queries);
            backward_tile(m, w, t, first, queries, first - from + m->span - side, side);
        }
        write_keys(m, w, t, from - kept, to == end ? kept + to - from : w->block);
    }
}

/* Steps of the bands of a phase, whole strips: the same strips are computed in any number of threads. */
INLINE int64_t per_band(const WindowedAttention *m) {
    int64_t strips = ((m->length + m->dilation - 1) / m->dilation + STRIP - 1) / STRIP;
    return (strips + m->bands - 1) / m->bands * STRIP;
}

INLINE int64_t count_phases(const WindowedAttention *m) { return at_most(m->dilation, m->length); }

/* Band `number`; an empty one in phases that are shorter than the longest. */
INLINE Band find_band(const WindowedAttention *m, int64_t number) {
    Band t;
    int64_t band = number % m->bands, steps = per_band(m);
    number /= m->bands;
    t.phase = number % count_phases(m);
    number /= count_phases(m);
    t.h = number % m->heads;
    t.b = number / m->heads;
    t.length = (m->length - t.phase + m->dilation - 1) / m->dilation;
    t.left = at_most(band * steps, t.length);
    t.right = at_most(t.left + steps, t.length);
    return t;
}

static int allocate(const WindowedAttention *m, Work *w) {
    int64_t dim = padded(m->dim), used = 0;
    int64_t back = m->grad_out.data != NULL; /* what the forward pass does not use takes no memory */
    w->stride = LANES + STRIP + LANES;
    w->block = at_most((m->span + STRIP - 1) / STRIP * STRIP, (per_band(m) + back * (m->span + STRIP)) / STRIP * STRIP);
    w->key_stride = whole_vectors((int)(w->block + m->span)) + 2 * LANES;
    w->stride += w->stride % 64 == 0 ? LANES : 0; /* rows a multiple of 256 bytes apart share few places of a cache */
    w->key_stride += w->key_stride % 64 == 0 ? LANES : 0;
    struct {
        float **slot;
        int64_t size;
    } parts[] = {{&w->query, dim * w->stride},
                 {&w->grad, back * dim * w->stride},
                 {&w->keys, dim * w->key_stride},
                 {&w->values, dim * w->key_stride},
                 {&w->grad_keys, back * dim * w->key_stride},
                 {&w->grad_values, back * dim * w->key_stride},
                 {&w->weights, m->span * w->stride},
                 {&w->slopes, back * m->span * w->stride},
                 {&w->sums, dim * w->stride},
                 {&w->reach, w->stride},
                 {&w->top, w->stride},
                 {&w->share, w->stride},
                 {&w->inner, back * w->stride}};
    int count = sizeof(parts) / sizeof(parts[0]);
    for (int i = 0; i < count; i++) used += parts[i].size;
    if (posix_memalign(&w->memory, 64, (used + LANES) * sizeof(float))) return 0;
    memset(w->memory, 0, (used + LANES) * sizeof(float));
    float *place = w->memory;
    for (int i = 0; i < count; i++) {
        *parts[i].slot = place;
        place += parts[i].size;
    }
    return 1;
}

static int64_t count_bands(const WindowedAttention *m) { return m->batch * m->heads * count_phases(m) * m->bands; }

#define OVER_BANDS(name, compute)                                              \
    static void *name(void *argument) {                                        \
        WindowedAttention *m = argument;                                       \
        Work w;                                                                \
        if (!allocate(m, &w)) {                                                \
            m->failed = NO_MEMORY;                                             \
            return NULL;                                                       \
        }                                                                      \
        int64_t number, count = count_bands(m);                                \
        while ((number = __sync_fetch_and_add(&m->next, 1)) < count) {         \
            Band t = find_band(m, number);                                     \
            if (t.left < t.right) compute(m, &w, &t);                          \
        }                                                                      \
        free(w.memory);                                                        \
        return NULL;                                                           \
    }
OVER_BANDS(forward_bands, forward_band)
OVER_BANDS(backward_bands, backward_band)

/* windowed_attention_cpu.py checks all tensors. */
static int over_bands(void *(*work)(void *), WindowedAttention *m) {
    if (m->batch < 1 || m->heads < 1 || m->length < 1 || m->dim < 1 || m->dilation < 1 || m->span < 1 ||
        m->span > LONGEST)
        return UNFIT;
    m->bands = 1;
    int64_t wanted = TILES_PER_THREAD * m->threads, bands = count_bands(m), steps = per_band(m);
    if (m->threads > 1 && bands < wanted)
        m->bands = at_least(1, at_most((wanted + bands - 1) / bands, steps / at_least(STRIP, MIN_WINDOWS * m->span)));
    in_threads(work, m, at_most(m->threads, count_bands(m)));
    return (int)m->failed;
}

int windowed_attention_forward(WindowedAttention *m) { return over_bands(forward_bands, m); }
int windowed_attention_backward(WindowedAttention *m) { return over_bands(backward_bands, m); }
