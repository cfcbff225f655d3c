/* The focus operator on CPUs: forward, backward and recurrent. focus_cpu.py compiles and calls it.
 *
 * The arithmetic is that of `naive_focus_mixing`, for one head of one row at a time and block by block: what a block
 * needs stays in the cache of a core, so memory is read once and written once. Global means are sums in double precision
 * relative to a reference log weight, which follows the largest one. Windows are summed directly. Nothing is subtracted
 * from a sum. Comparisons are written so that NaN stays NaN: `is_empty` says which tokens are missing.
 */

#include "../common/cpu_math_source.c"

enum { BLOCK = 128, WIDEST = 64, AHEAD = 8 };
enum { EXP, ELU, WEIGHT_FUNCTIONS };    /* in the order of `kernel` in focus_functions.py */
enum { NO_GATE, SIGMOID, GELU, GATES }; /* likewise */
static const float NOTHING = -1e30f;    /* log weight of what is not there */
static const float EMPTY = -1e29f;      /* smallest log weight of what is */

/* One call; the fields are mirrored in focus_cpu.py. Pointers that do not apply are NULL. */
typedef struct {
    int64_t batch, seq, heads, parts, window, past, kept, bf16, normalize, weight, gate, bounded, rotary_stride,
        threads;
    double scale, sink_weight;
    const void *in;                       /* [batch, seq, parts, heads, dim]: (q,) f, k, v */
    void *out;                            /* [batch, seq, heads, dim] */
    const float *alibi_slopes;            /* [heads] */
    const float *cos, *sin;               /* [1 or batch, seq, dim] */
    const uint8_t *mask;                  /* [batch, seq] */
    const int64_t *segments;              /* [batch, seq] */
    const float *past_logs, *past_values; /* state before the first token: [batch, heads(, past)(, channels)] */
    float *final_logs, *final_values;     /* state after the last one */
    double *carries;                      /* [batch, heads, blocks, 2 + channels] */
    const void *grad_out;                 /* as out */
    void *grad_in;                        /* as in */
    float *state;                         /* packed state of one step, see pack_state in focus_recurrent.py */
    int64_t next, failed;                 /* the next head to take; whether memory ran out */
} Mixing;

/* Sums of exp(log weight - reference) times values, and of the weights alone. */
typedef struct {
    double reference, total, *sums;
} Running;

/* What the tokens of a block own, the `halo` tokens before it included. */
typedef struct {
    float *rows[4];            /* q, f, k, v: [halo + BLOCK, dim], standardised */
    float *query;              /* [halo + BLOCK, dim], rotated */
    float *values;             /* [halo + BLOCK, channels]: rotated k, v */
    float *logits, *logs;      /* [halo + BLOCK] */
    float *deviation, *factor; /* [halo + BLOCK, 4]: standard deviation, 1 / (it + epsilon) */
    float *means;              /* [BLOCK, channels] */
    double *log_total;         /* [BLOCK + halo], of the tokens after the block at the end */
    float *grads;              /* [BLOCK + halo, channels]: gradients of the means, likewise */
    float *inner;              /* [BLOCK + halo]: gradient . mean, likewise */
    float *grad_query;         /* [BLOCK, dim] */
    double *carry;             /* [channels] */
    double *back;              /* [channels + 1] */
    void *memory;
} Work;

/* Without a call: compilers make slow string instructions of short memcpys. */
INLINE void copy(float *to, const float *from, int count) { SIMD for (int i = 0; i < count; i++) to[i] = from[i]; }

INLINE void load(const Mixing *m, const void *from, int64_t at, float *row, int dim) {
    if (m->bf16) {
        const uint16_t *x = (const uint16_t *)from + at;
        SIMD for (int d = 0; d < dim; d++) row[d] = from_bf16(x[d]);
    } else {
        copy(row, (const float *)from + at, dim);
    }
}

INLINE void store(const Mixing *m, void *to, int64_t at, const float *row, int dim) {
    if (m->bf16) {
        uint16_t *x = (uint16_t *)to + at;
        SIMD for (int d = 0; d < dim; d++) x[d] = to_bf16(row[d]);
    } else {
        copy((float *)to + at, row, dim);
    }
}

/* Rows of one head lie a page apart, where the CPU's own prefetching does not follow. */
INLINE void prefetch(const Mixing *m, const void *from, int64_t at, int dim) {
    const char *x = (const char *)from + at * (m->bf16 ? 2 : 4);
    for (int d = 0; d < dim * (m->bf16 ? 2 : 4); d += 64) __builtin_prefetch(x + d);
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

/* Whether a log weight stands for no token at all. NaN does not, nor does -inf: zero times an infinite value is NaN. */
INLINE int is_empty(double log) { return log <= EMPTY && log != -INFINITY; }

INLINE float dot(const float *a, const float *b, int dim) {
    float sum = 0;
    SIMD_SUM(sum) for (int d = 0; d < dim; d++) sum += a[d] * b[d];
    return sum;
}

INLINE float log_weight(float logit, int kind) {
    switch (kind) {
    case ELU: return logit > 0 ? log1pf(logit) : logit;
    default: return logit; /* EXP */
    }
}

/* Derivative of log_weight. */
INLINE float log_weight_slope(float logit, int kind) {
    switch (kind) {
    case ELU: return logit > 0 ? 1 / (1 + logit) : 1;
    default: return 1; /* EXP */
    }
}

INLINE float gate_value(float x, int kind) {
    switch (kind) {
    case SIGMOID: return 1.0f / (1.0f + expf(-x));
    default: return 0.5f * x * (1.0f + erff(x * 0.70710678f)); /* GELU */
    }
}

/* Derivative of gate_value, whose result is `gate`. */
INLINE float gate_slope(float x, float gate, int kind) {
    switch (kind) {
    case SIGMOID: return gate * (1.0f - gate);
    default: return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x); /* GELU */
    }
}

INLINE void standardize(float *x, int dim, float *deviation, float *factor) {
    float mean = 0, squares = 0;
    SIMD_SUM(mean) for (int d = 0; d < dim; d++) mean += x[d];
    mean /= dim;
    SIMD_SUM(squares) for (int d = 0; d < dim; d++) {
        x[d] -= mean;
        squares += x[d] * x[d];
    }
    squares /= dim - 1;
    *deviation = sqrtf(squares < 1e-24f ? 1e-24f : squares);
    *factor = 1.0f / (*deviation + 1e-5f);
    SIMD for (int d = 0; d < dim; d++) x[d] *= *factor;
}

/* In place, from the gradient of y = standardize(x) to that of x. */
INLINE void standardize_backward(float *grad, const float *y, float deviation, float factor, int dim) {
    float mean = 0, slope = dot(grad, y, dim) / (deviation * (dim - 1));
    SIMD_SUM(mean) for (int d = 0; d < dim; d++) mean += grad[d];
    mean /= dim;
    SIMD for (int d = 0; d < dim; d++) grad[d] = (grad[d] - mean) * factor - y[d] * slope;
}

/* Rotary positions; turn = -1 turns back. */
INLINE void rotate(const float *x, const float *cos, const float *sin, float turn, float *y, int dim) {
    int half = dim / 2;
    SIMD for (int d = 0; d < half; d++) {
        y[d] = x[d] * cos[d] - x[half + d] * sin[d] * turn;
        y[half + d] = x[half + d] * cos[half + d] + x[d] * sin[half + d] * turn;
    }
}

INLINE void take(Running *r, double log, const float *x, float extra, int channels) {
    if (log > r->reference + 10) { /* rarely: the reference need only be near the largest */
        double shrink = exp(r->reference - log);
        r->reference = log;
        r->total *= shrink;
        for (int c = 0; c < channels; c++) r->sums[c] *= shrink;
    }
    double weight = exp(log - r->reference);
    r->total += weight * extra;
    SIMD for (int c = 0; c < channels; c++) r->sums[c] += weight * x[c];
}

INLINE void forget(Running *r, int channels) {
    r->reference = NOTHING;
    r->total = 0;
    memset(r->sums, 0, channels * sizeof(double));
}

/* sums[c] = sum over j of weights[j] * rows[j][c] */
INLINE void weigh(const float *weights, const float *rows, int count, int channels, float *sums) {
    int c = 0;
    for (; c + 64 <= channels; c += 64) {
        float part[64] = {0};
        for (int j = 0; j < count; j++) {
            SIMD for (int d = 0; d < 64; d++) part[d] += weights[j] * rows[j * channels + c + d];
        }
        copy(sums + c, part, 64);
    }
    for (; c < channels; c++) {
        sums[c] = 0;
        for (int j = 0; j < count; j++) sums[c] += weights[j] * rows[j * channels + c];
    }
}

/* Rows, logits and log weights of the tokens first, first + 1, ..., at place `at` of the block's arrays. */
INLINE void prepare(const Mixing *m, Work *w, int64_t b, int64_t h, int64_t first, int count, int at, int dim) {
    int gated = m->parts == 4, channels = gated ? 2 * dim : dim;
    for (int i = at; i < at + count; i++) {
        int64_t t = first + i - at;
        for (int p = 4 - (int)m->parts; p < 4; p++) {
            float *row = w->rows[p] + i * dim;
            int64_t stride = m->parts * m->heads * dim;
            int64_t place = (b * m->seq + t) * stride + ((p - 4 + m->parts) * m->heads + h) * dim;
            if (t + AHEAD < m->seq) prefetch(m, m->in, place + AHEAD * stride, dim);
            load(m, m->in, place, row, dim);
            if (m->normalize) standardize(row, dim, &w->deviation[4 * i + p], &w->factor[4 * i + p]);
        }
        const float *f = w->rows[1] + i * dim, *k = w->rows[2] + i * dim, *v = w->rows[3] + i * dim;
        w->logits[i] = dot(f, k, dim) * (float)m->scale;
        int real = !m->mask || m->mask[b * m->seq + t];
        w->logs[i] = real ? log_weight(w->logits[i], (int)m->weight) : NOTHING;
        float *values = w->values + i * channels;
        if (gated) {
            const float *q = w->rows[0] + i * dim;
            if (m->cos) {
                int64_t place = b * m->rotary_stride + t * dim;
                rotate(q, m->cos + place, m->sin + place, 1, w->query + i * dim, dim);
                rotate(k, m->cos + place, m->sin + place, 1, values, dim);
            } else {
                copy(w->query + i * dim, q, dim);
                copy(values, k, dim);
            }
        }
        copy(values + channels - dim, v, dim);
    }
}

/* The `halo` tokens before token `first`: of the sequence, of the state before it, or none. */
INLINE void prepare_halo(const Mixing *m, Work *w, int64_t b, int64_t h, int64_t first, int dim) {
    int halo = m->window ? (int)m->window - 1 : 0, channels = m->parts == 4 ? 2 * dim : dim;
    int inside = first < halo ? (int)first : halo;
    prepare(m, w, b, h, first - inside, inside, halo - inside, dim);
    for (int i = 0; i < halo - inside; i++) {
        int64_t old = m->past - (halo - inside) + i;
        w->logs[i] = NOTHING;
        memset(w->values + i * channels, 0, channels * sizeof(float));
        if (old < 0) continue;
        int64_t at = (b * m->heads + h) * m->past + old;
        w->logs[i] = m->past_logs[at];
        if (w->logs[i] <= EMPTY) w->logs[i] = NOTHING; /* -inf marks an empty place of a state */
        memcpy(w->values + i * channels, m->past_values + at * channels, channels * sizeof(float));
    }
}

INLINE int continues(const Mixing *m, int64_t b, int64_t t) { /* whether token t shares a segment with t - 1 */
    return !m->segments || m->segments[b * m->seq + t] == m->segments[b * m->seq + t - 1];
}

/* Means of a block and, for the backward pass, logs of the summed weights. */
INLINE void block_means(const Mixing *m, Work *w, Running *r, int64_t b, int64_t h, int64_t first, int count,
                        int totals, int dim) {
    int channels = m->parts == 4 ? 2 * dim : dim, window = (int)m->window, halo = window ? window - 1 : 0;
    float alibi_slope = m->alibi_slopes ? m->alibi_slopes[h] : 0;
    double log_sink = m->sink_weight ? log(m->sink_weight) : NOTHING;
    int64_t begin = first; /* of the segment, as far as a window reaches */
    if (window)
        while (begin > first - halo && (begin <= 0 || continues(m, b, begin))) begin--;
    for (int i = 0; i < count; i++) {
        int64_t t = first + i;
        float *mean = w->means + i * channels;
        double share; /* what one unit of the sums counts in the mean */
        if (window) {
            if (i > 0 && !continues(m, b, t)) begin = t;
            int64_t from = t - halo > begin ? t - halo : begin;
            int seen = (int)(t - from) + 1, start = halo + i - seen + 1;
            float weights[WIDEST], top = (float)log_sink, total = 0;
            for (int j = 0; j < seen; j++) {
                weights[j] = w->logs[start + j] - alibi_slope * (seen - 1 - j);
                top = weights[j] > top ? weights[j] : top;
            }
            SIMD_SUM(total) for (int j = 0; j < seen; j++) {
                weights[j] = exp_negative(weights[j] - top);
                total += weights[j];
            }
            if (is_empty(top) && total == total) total = 0;
            if (m->sink_weight) total += exp_negative((float)log_sink - top);
            weigh(weights, w->values + start * channels, seen, channels, mean);
            if (totals) w->log_total[i] = total == 0 ? NOTHING : top + log(total);
            share = total == 0 ? 0 : 1 / total;
            SIMD for (int c = 0; c < channels; c++) mean[c] *= (float)share;
        } else {
            if (t > 0 && !continues(m, b, t)) forget(r, channels);
            r->reference -= alibi_slope;
            if (!is_empty(w->logs[i])) take(r, w->logs[i], w->values + i * channels, 1, channels);
            double total = r->total + (m->sink_weight ? exp(log_sink - r->reference) : 0);
            if (totals) w->log_total[i] = r->total == 0 ? log_sink : r->reference + log(total);
            share = r->total == 0 ? 0 : 1 / total;
            SIMD for (int c = 0; c < channels; c++) mean[c] = (float)(r->sums[c] * share);
        }
    }
}

INLINE void enter_state(const Mixing *m, Running *r, int64_t row, int channels) {
    forget(r, channels);
    if (m->window || !m->past_logs || m->past_logs[row] <= EMPTY) return;
    r->reference = m->past_logs[row];
    r->total = 1;
    for (int c = 0; c < channels; c++) r->sums[c] = m->past_values[row * channels + c];
}

INLINE void leave_state(const Mixing *m, const Work *w, const Running *r, int64_t row, int last, int channels) {
    if (m->window) { /* the last `kept` tokens; `last` is the place of the last one */
        for (int64_t i = 0; i < m->kept; i++) {
            int64_t from = last - m->kept + 1 + i, to = row * m->kept + i;
            m->final_logs[to] = is_empty(w->logs[from]) ? -INFINITY : w->logs[from];
            memcpy(m->final_values + to * channels, w->values + from * channels, channels * sizeof(float));
        }
        return;
    }
    m->final_logs[row] = r->total == 0 ? EMPTY : (float)(r->reference + log(r->total));
    double share = r->total == 0 ? 0 : 1 / r->total;
    for (int c = 0; c < channels; c++) m->final_values[row * channels + c] = (float)(r->sums[c] * share);
}

INLINE void forward_head(Mixing *m, Work *w, int64_t row, int dim) {
    int64_t b = row / m->heads, h = row % m->heads, blocks = (m->seq + BLOCK - 1) / BLOCK;
    int gated = m->parts == 4, channels = gated ? 2 * dim : dim, halo = m->window ? (int)m->window - 1 : 0;
    Running r = {0, 0, w->carry};
    enter_state(m, &r, row, channels);
    prepare_halo(m, w, b, h, 0, dim);
    for (int64_t first = 0; first < m->seq; first += BLOCK) {
        int count = m->seq - first < BLOCK ? (int)(m->seq - first) : BLOCK;
        if (m->carries && !m->window) {
            double *carry = m->carries + (row * blocks + first / BLOCK) * (2 + channels);
            carry[0] = r.reference;
            carry[1] = r.total;
            memcpy(carry + 2, r.sums, channels * sizeof(double));
        }
        prepare(m, w, b, h, first, count, halo, dim);
        block_means(m, w, &r, b, h, first, count, 0, dim);
        for (int i = 0; i < count; i++) {
            float *mean = w->means + i * channels, *value = mean + channels - dim;
            if (gated) {
                float gate = gate_value(dot(w->query + (halo + i) * dim, mean, dim) * (float)m->scale, (int)m->gate);
                SIMD for (int d = 0; d < dim; d++) value[d] *= gate;
            }
            store(m, m->out, ((b * m->seq + first + i) * m->heads + h) * dim, value, dim);
        }
        if (first + BLOCK < m->seq) {
            memmove(w->logs, w->logs + count, halo * sizeof(float));
            memmove(w->values, w->values + count * channels, halo * channels * sizeof(float));
        } else if (m->final_logs) {
            leave_state(m, w, &r, row, halo + count - 1, channels);
        }
    }
}

/* Gradients of a block's means, of its rotated queries, and gradient . mean. */
INLINE void gate_backward(const Mixing *m, Work *w, int64_t b, int64_t h, int64_t first, int count, int dim) {
    int gated = m->parts == 4, channels = gated ? 2 * dim : dim, halo = m->window ? (int)m->window - 1 : 0;
    for (int i = 0; i < count; i++) {
        float *grad = w->grads + i * channels, *out = grad + channels - dim;
        const float *mean = w->means + i * channels;
        int64_t place = ((b * m->seq + first + i) * m->heads + h) * dim;
        if (i + AHEAD < count) prefetch(m, m->grad_out, place + AHEAD * m->heads * dim, dim);
        load(m, m->grad_out, place, out, dim);
        float slope = dot(out, mean + channels - dim, dim);
        w->inner[i] = slope;
        if (!gated) continue;
        const float *query = w->query + (halo + i) * dim;
        float product = dot(query, mean, dim), gate = gate_value(product * (float)m->scale, (int)m->gate);
        float grad_product = slope * gate_slope(product * (float)m->scale, gate, (int)m->gate) * (float)m->scale;
        w->inner[i] = slope * gate + grad_product * product;
        SIMD for (int d = 0; d < dim; d++) {
            grad[d] = grad_product * query[d];
            out[d] *= gate;
            w->grad_query[i * dim + d] = grad_product * mean[d];
        }
    }
}

INLINE void store_gradient(const Mixing *m, const Work *w, int64_t at, int part, int place, float *grad, int dim) {
    int i = 4 * place + part;
    if (m->normalize) standardize_backward(grad, w->rows[part] + place * dim, w->deviation[i], w->factor[i], dim);
    store(m, m->grad_in, at + (part - 4 + m->parts) * m->heads * dim, grad, dim);
}

/* The gradient of a token's values, and of its log weight, from the windows that hold it. `end` is the last token of its
 * segment; w->grads, w->inner and w->log_total are those of the tokens from this one on. */
INLINE float window_gradient(const Mixing *m, const Work *w, int64_t h, int64_t t, int64_t end, int i, int channels,
                             float *grad_value) {
    int halo = (int)m->window - 1, reach = (int)((t + halo < end ? t + halo : end) - t) + 1;
    float log = w->logs[halo + i], alibi_slope = m->alibi_slopes ? m->alibi_slopes[h] : 0, weights[WIDEST], inner = 0;
    for (int j = 0; j < reach; j++) weights[j] = (float)(log - alibi_slope * j - w->log_total[i + j]);
    SIMD_SUM(inner) for (int j = 0; j < reach; j++) {
        weights[j] = exp_negative(weights[j] > 0 ? 0 : weights[j]);
        inner += weights[j] * w->inner[i + j];
    }
    if (is_empty(log)) { /* a pad, which weighs nothing */
        memset(weights, 0, sizeof(weights));
        inner = 0;
    }
    weigh(weights, w->grads + i * channels, reach, channels, grad_value);
    return dot(grad_value, w->values + (halo + i) * channels, channels) - inner;
}

/* The same for global means: from all tokens of its segment from this one on, summed in `later`. */
INLINE float global_gradient(const Mixing *m, const Work *w, Running *later, int64_t h, int i, int channels,
                             float *grad_value) {
    const float *value = w->values + i * channels;
    later->reference -= m->alibi_slopes ? m->alibi_slopes[h] : 0;
    if (!is_empty(w->log_total[i])) take(later, -w->log_total[i], w->grads + i * channels, w->inner[i], channels);
    double factor = is_empty(w->logs[i]) ? 0 : exp(w->logs[i] + later->reference), slope = 0;
    SIMD_SUM(slope) for (int c = 0; c < channels; c++) slope += later->sums[c] * value[c];
    SIMD for (int c = 0; c < channels; c++) grad_value[c] = (float)(later->sums[c] * factor);
    return (float)((slope - later->total) * factor);
}

/* From the gradients of a token's log weight and values to those of its parts, which are stored. */
INLINE void store_gradients(const Mixing *m, const Work *w, int64_t b, int64_t h, int64_t t, int i, float grad_log,
                            float *grad_value, int dim) {
    int gated = m->parts == 4, place = (m->window ? (int)m->window - 1 : 0) + i;
    float grad_logit = grad_log * (float)m->scale * log_weight_slope(w->logits[place], (int)m->weight), grad[dim];
    const float *f = w->rows[1] + place * dim, *k = w->rows[2] + place * dim;
    int64_t at = ((b * m->seq + t) * m->parts * m->heads + h) * dim, part = m->heads * dim;
    for (int p = 0; p < m->parts && t >= AHEAD; p++) prefetch(m, m->grad_in, at + (p - AHEAD * m->parts) * part, dim);
    SIMD for (int d = 0; d < dim; d++) grad[d] = grad_logit * k[d];
    store_gradient(m, w, at, 1, place, grad, dim);
    store_gradient(m, w, at, 3, place, grad_value + (gated ? dim : 0), dim);
    if (!gated) {
        SIMD for (int d = 0; d < dim; d++) grad[d] = grad_logit * f[d];
    } else if (m->cos) {
        int64_t turn = b * m->rotary_stride + t * dim;
        rotate(w->grad_query + i * dim, m->cos + turn, m->sin + turn, -1, grad, dim);
        store_gradient(m, w, at, 0, place, grad, dim);
        rotate(grad_value, m->cos + turn, m->sin + turn, -1, grad, dim);
        SIMD for (int d = 0; d < dim; d++) grad[d] += grad_logit * f[d];
    } else {
        store_gradient(m, w, at, 0, place, w->grad_query + i * dim, dim);
        SIMD for (int d = 0; d < dim; d++) grad[d] = grad_value[d] + grad_logit * f[d];
    }
    store_gradient(m, w, at, 2, place, grad, dim);
}

/* Blocks from the last to the first; each makes its means again from the carry that the forward pass kept. */
INLINE void backward_head(Mixing *m, Work *w, int64_t row, int dim) {
    int64_t b = row / m->heads, h = row % m->heads, blocks = (m->seq + BLOCK - 1) / BLOCK;
    int channels = m->parts == 4 ? 2 * dim : dim, halo = m->window ? (int)m->window - 1 : 0;
    Running past = {0, 0, w->carry}, later = {0, 0, w->back};
    forget(&later, channels);
    int64_t end = m->seq - 1; /* of the segment */
    for (int64_t block = blocks - 1; block >= 0; block--) {
        int64_t first = block * BLOCK;
        int count = m->seq - first < BLOCK ? (int)(m->seq - first) : BLOCK;
        if (m->window && block < blocks - 1) { /* what the windows of this block reach in the next one */
            memcpy(w->log_total + count, w->log_total, halo * sizeof(double));
            memcpy(w->inner + count, w->inner, halo * sizeof(float));
            memcpy(w->grads + count * channels, w->grads, halo * channels * sizeof(float));
        }
        prepare_halo(m, w, b, h, first, dim);
        prepare(m, w, b, h, first, count, halo, dim);
        if (!m->window) {
            const double *carry = m->carries + (row * blocks + block) * (2 + channels);
            past.reference = carry[0];
            past.total = carry[1];
            memcpy(past.sums, carry + 2, channels * sizeof(double));
        }
        block_means(m, w, &past, b, h, first, count, 1, dim);
        gate_backward(m, w, b, h, first, count, dim);
        for (int i = count - 1; i >= 0; i--) {
            int64_t t = first + i;
            float grad_value[channels], grad_log;
            if (t + 1 < m->seq && !continues(m, b, t + 1)) { /* the last token of a segment */
                end = t;
                forget(&later, channels);
            }
            if (m->window)
                grad_log = window_gradient(m, w, h, t, end, i, channels, grad_value);
            else
                grad_log = global_gradient(m, w, &later, h, i, channels, grad_value);
            store_gradients(m, w, b, h, t, i, grad_log, grad_value, dim);
        }
    }
}

/* One more token of a global state: its means, the token included. */
INLINE void step_global(const Mixing *m, Work *w, int64_t b, int64_t h, int dim) {
    int pairs = m->parts == 4 ? 2 : 1;
    float *state = m->state + b * m->heads * (2 + pairs * dim), *reference = state + h, *total = state + m->heads + h;
    float alibi_slope = m->alibi_slopes ? m->alibi_slopes[h] : 0, before = *reference - alibi_slope,
          own_log = w->logs[0];
    float top = m->bounded ? 0 : larger(before, own_log), weight = expf(own_log - top);
    *total = *total * expf(before - top) + weight;
    *reference = top;
    float share = weight / *total, seen = 1;
    if (m->sink_weight) seen = *total / (*total + expf((float)log(m->sink_weight) - top));
    for (int p = 0; p < pairs; p++) {
        float *past = state + 2 * m->heads + (p * m->heads + h) * dim;
        SIMD for (int d = 0; d < dim; d++) {
            past[d] += share * (w->values[p * dim + d] - past[d]);
            w->means[p * dim + d] = past[d] * seen;
        }
    }
}

/* The same for a windowed state, whose oldest token leaves. */
INLINE void step_window(const Mixing *m, Work *w, int64_t b, int64_t h, int dim) {
    int pairs = m->parts == 4 ? 2 : 1, window = (int)m->window, held = window > 1 ? window - 1 : 1;
    int skip = held - (window - 1);
    float *state = m->state + b * m->heads * (1 + pairs * dim) * held, *logs = state + h * held;
    float alibi_slope = m->alibi_slopes ? m->alibi_slopes[h] : 0, own_log = w->logs[0];
    float log_sink = m->sink_weight ? (float)log(m->sink_weight) : NOTHING;
    float weights[WIDEST], top = larger(own_log, log_sink), total = 0;
    for (int j = skip; j < held; j++) {
        weights[j] = logs[j] - alibi_slope * (held - j);
        top = weights[j] > top ? weights[j] : top;
    }
    SIMD_SUM(total) for (int j = skip; j < held; j++) {
        weights[j] = exp_negative(weights[j] - top);
        total += weights[j];
    }
    float own = expf(own_log - top);
    total += own + expf(log_sink - top);
    memmove(logs, logs + 1, (held - 1) * sizeof(float));
    logs[held - 1] = own_log;
    for (int p = 0; p < pairs; p++) {
        float *past = state + (m->heads + (p * m->heads + h) * dim) * held;
        const float *token = w->values + p * dim;
        for (int d = 0; d < dim; d++, past += held) {
            float sum = own * token[d];
            SIMD_SUM(sum) for (int j = skip; j < held; j++) sum += weights[j] * past[j];
            w->means[p * dim + d] = sum / total;
            for (int j = 0; j < held - 1; j++) past[j] = past[j + 1];
            past[held - 1] = token[d];
        }
    }
}

/* One token of one row: its focus logit, the state with it, its output. */
INLINE void step_head(Mixing *m, Work *w, int64_t row, int dim) {
    int64_t b = row / m->heads, h = row % m->heads;
    prepare(m, w, b, h, 0, 1, 0, dim);
    if (m->window)
        step_window(m, w, b, h, dim);
    else
        step_global(m, w, b, h, dim);
    float *value = w->means;
    if (m->parts == 4) {
        value += dim;
        float gate = gate_value(dot(w->query, w->means, dim) * (float)m->scale, (int)m->gate);
        SIMD for (int d = 0; d < dim; d++) value[d] *= gate;
    }
    store(m, m->out, row * dim, value, dim);
}

static int allocate(const Mixing *m, Work *w) {
    int64_t block = m->seq < BLOCK ? m->seq : BLOCK, rows = block + (m->window ? m->window - 1 : 0);
    int64_t dim = HEAD_DIM, channels = 2 * dim, used = 0;
    struct {
        void *slot;
        int64_t bytes;
    } parts[] = {{&w->rows[0], rows * dim * 4},
                 {&w->rows[1], rows * dim * 4},
                 {&w->rows[2], rows * dim * 4},
                 {&w->rows[3], rows * dim * 4},
                 {&w->query, rows * dim * 4},
                 {&w->values, rows * channels * 4},
                 {&w->logits, rows * 4},
                 {&w->logs, rows * 4},
                 {&w->deviation, rows * 16},
                 {&w->factor, rows * 16},
                 {&w->means, block * channels * 4},
                 {&w->log_total, rows * 8},
                 {&w->grads, rows * channels * 4},
                 {&w->inner, rows * 4},
                 {&w->grad_query, block * dim * 4},
                 {&w->carry, channels * 8},
                 {&w->back, channels * 8}};
    int count = sizeof(parts) / sizeof(parts[0]);
    for (int i = 0; i < count; i++) used += (parts[i].bytes + 63) / 64 * 64;
    if (posix_memalign(&w->memory, 64, used)) return 0;
    char *place = w->memory;
    for (int i = 0; i < count; i++) {
        memcpy(parts[i].slot, &place, sizeof(place));
        place += (parts[i].bytes + 63) / 64 * 64;
    }
    return 1;
}

/* HEAD_DIM is given to the compiler, which unrolls for it. */
#define OVER_HEADS(name, step)                                                                              \
    static void *name(void *argument) {                                                                     \
        Mixing *m = argument;                                                                               \
        Work w;                                                                                             \
        if (!allocate(m, &w)) {                                                                             \
            m->failed = NO_MEMORY;                                                                          \
            return NULL;                                                                                    \
        }                                                                                                   \
        int64_t row;                                                                                        \
        while ((row = __sync_fetch_and_add(&m->next, 1)) < m->batch * m->heads) step(m, &w, row, HEAD_DIM); \
        free(w.memory);                                                                                     \
        return NULL;                                                                                        \
    }
OVER_HEADS(forward_heads, forward_head)
OVER_HEADS(backward_heads, backward_head)
OVER_HEADS(step_heads, step_head)

/* focus_cpu.py checks all tensors. A kind or size that is missing here must not be taken for another one. */
static int fits(const Mixing *m) {
    return m->weight >= EXP && m->weight < WEIGHT_FUNCTIONS && m->gate >= NO_GATE && m->gate < GATES &&
           m->parts == (m->gate == NO_GATE ? 3 : 4) && m->batch > 0 && m->seq > 0 && m->heads > 0 && m->past >= 0 &&
           m->window >= 0 && m->window <= WIDEST;
}

static int over_heads(void *(*work)(void *), Mixing *m) {
    if (!fits(m)) return UNFIT;
    in_threads(work, m, m->threads);
    return (int)m->failed;
}

int focus_forward(Mixing *m) { return over_heads(forward_heads, m); }
int focus_backward(Mixing *m) { return over_heads(backward_heads, m); }
int focus_recurrent(Mixing *m) { return over_heads(step_heads, m); }

/* Heads first, first + step, ... of all rows, in the thread of the caller. */
int focus_recurrent_share(const Mixing *given, int64_t first, int64_t step) {
    Mixing m = *given;
    Work w;
    if (!fits(&m)) return UNFIT;
    if (!allocate(&m, &w)) return NO_MEMORY;
    for (int64_t row = first; row < m.batch * m.heads; row += step) step_head(&m, &w, row, HEAD_DIM);
    free(w.memory);
    return DONE;
}
