/* One token through all layers of LEAP in a call, for decoding, where what lies between small products takes longer than they
 * do. leap_step.py compiles and calls it.
 *
 * Threads share each product by rows of its weights, and wait for one another between products. What is cheap, norms and sums
 * with the residual, each thread computes for itself. The mixing step is `focus_recurrent_share` of the focus operator.
 */

#include "../common/cpu_math_source.c"

#include <sched.h>

enum { GELU, RELU, SILU, ACTIVATIONS }; /* in the order of leap_step.py */
enum { TOGETHER = 4, SPINS = 4096 };

/* Weights of one layer, float32 or bfloat16; the fields are mirrored in leap_step.py. */
typedef struct {
    const void *norm_weight, *norm_bias;           /* [width] */
    const void *qfkv;                              /* [parts * width, width] */
    const void *post_norm_weight, *post_norm_bias; /* [width] */
    const void *up, *up_bias;                      /* [inner, width], [inner] */
    const void *down, *down_bias;                  /* [width, inner], [width] */
} Layer;

/* One call; the fields are mirrored in leap_step.py. */
typedef struct {
    int64_t batch, width, parts, inner, layers, activation, bf16, threads, mixing_bytes;
    double epsilon;
    const Layer *layer;
    int (*mix)(const void *mixing, int64_t first, int64_t step); /* heads first, first + step, ... */
    const char *mixing;     /* of each layer: its input is `qfkv`, its output `mixed` */
    void *hidden;           /* [batch, width]: embeddings, then the result of the last layer */
    float *rows;            /* [batch, width] */
    float *mixed;           /* [batch, width] */
    float *qfkv;            /* [batch, parts * width] */
    float *between;         /* [batch, inner] */
    float *own;             /* [threads, 2, batch, width]: hidden states of each thread, and the same after a norm */
    int64_t tickets, members, arrived, phase, failed; /* 0 at first */
} LeapStep;

/* The error function to 2 units in the last place of 1, as a ratio of polynomials that compilers vectorise. NaN stays NaN. */
INLINE float erf_ratio(float x) {
    x = x < -4.0f ? -4.0f : x;
    x = x > 4.0f ? 4.0f : x;
    float s = x * x, p = -2.72614225801306e-10f, q = -1.45660718464996e-05f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    q = q * s - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

INLINE float activate(float x, int64_t kind) {
    float decay = exp_negative(x > 0 ? -x : x);
    switch (kind) {
    case RELU: return x < 0 ? 0 : x;
    case SILU: return x * (x > 0 ? 1 : decay) / (1 + decay);
    default: return 0.5f * x * (1 + erf_ratio(x * 0.70710678f)); /* GELU */
    }
}

/* Without a call: compilers make slow string instructions of short memcpys. */
INLINE void copy(float *to, const float *from, int64_t count) { SIMD for (int64_t i = 0; i < count; i++) to[i] = from[i]; }

INLINE float weight_at(const void *weights, int64_t at, int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)weights)[at]) : ((const float *)weights)[at];
}

/* y[b, r] = x[b] . weights[r] + bias[r] for rows `from` to `to`, of which some are taken together. */
INLINE void product(const LeapStep *s, const void *weights, const void *bias, const float *x, float *y, int64_t in,
                    int64_t out, int64_t from, int64_t to, int bf16) {
    int64_t r = from;
    for (; r + TOGETHER <= to; r += TOGETHER)
        for (int64_t b = 0; b < s->batch; b++) {
            const float *row = x + b * in;
            float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
            _Pragma("omp simd reduction(+ : sum0, sum1, sum2, sum3)") for (int64_t i = 0; i < in; i++) {
                sum0 += row[i] * weight_at(weights, r * in + i, bf16);
                sum1 += row[i] * weight_at(weights, (r + 1) * in + i, bf16);
                sum2 += row[i] * weight_at(weights, (r + 2) * in + i, bf16);
                sum3 += row[i] * weight_at(weights, (r + 3) * in + i, bf16);
            }
            float sums[TOGETHER] = {sum0, sum1, sum2, sum3};
            for (int64_t j = 0; j < TOGETHER; j++)
                y[b * out + r + j] = sums[j] + (bias ? weight_at(bias, r + j, bf16) : 0);
        }
    for (; r < to; r++)
        for (int64_t b = 0; b < s->batch; b++) {
            const float *row = x + b * in;
            float sum = 0;
            SIMD_SUM(sum) for (int64_t i = 0; i < in; i++) sum += row[i] * weight_at(weights, r * in + i, bf16);
            y[b * out + r] = sum + (bias ? weight_at(bias, r, bf16) : 0);
        }
}

INLINE void layer_norm(const LeapStep *s, const float *x, const void *weight, const void *bias, float *y, int bf16) {
    for (int64_t b = 0; b < s->batch; b++, x += s->width, y += s->width) {
        float mean = 0, squares = 0;
        SIMD_SUM(mean) for (int64_t i = 0; i < s->width; i++) mean += x[i];
        mean /= s->width;
        SIMD_SUM(squares) for (int64_t i = 0; i < s->width; i++) squares += (x[i] - mean) * (x[i] - mean);
        float factor = 1 / sqrtf(squares / s->width + (float)s->epsilon);
        SIMD for (int64_t i = 0; i < s->width; i++) y[i] =
            (x[i] - mean) * factor * weight_at(weight, i, bf16) + weight_at(bias, i, bf16);
    }
}

/* Waits until all threads are here. */
static void meet(LeapStep *s) {
    int64_t phase = __atomic_load_n(&s->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == s->members) {
        __atomic_store_n(&s->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&s->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&s->phase, __ATOMIC_ACQUIRE) == phase; spins++)
        if (spins >= SPINS) sched_yield();
}

/* Where the share of thread `me` in so many rows begins. */
INLINE int64_t share_of(const LeapStep *s, int64_t rows, int64_t me) {
    int64_t groups = (rows + TOGETHER - 1) / TOGETHER, first = groups * me / s->members * TOGETHER;
    return first < rows ? first : rows;
}

INLINE void keep(LeapStep *s, const float *hidden, int64_t count, int bf16) {
    if (bf16) {
        uint16_t *x = s->hidden;
        SIMD for (int64_t i = 0; i < count; i++) x[i] = to_bf16(hidden[i]);
    } else {
        copy(s->hidden, hidden, count);
    }
}

INLINE void through_layers(LeapStep *s, int64_t me, int bf16) {
    int64_t width = s->width, parts = s->parts * width, inner = s->inner, count = s->batch * width, from, to;
    float *hidden = s->own + me * 2 * count, *normed = hidden + count;
    copy(hidden, s->rows, count);
    for (int64_t l = 0; l < s->layers; l++) {
        const Layer *layer = &s->layer[l];
        layer_norm(s, hidden, layer->norm_weight, layer->norm_bias, normed, bf16);
        from = share_of(s, parts, me), to = share_of(s, parts, me + 1);
        product(s, layer->qfkv, NULL, normed, s->qfkv, width, parts, from, to, bf16);
        meet(s);
        int status = s->mix(s->mixing + l * s->mixing_bytes, me, s->members);
        if (status) __atomic_store_n(&s->failed, status, __ATOMIC_RELAXED);
        meet(s);
        SIMD for (int64_t i = 0; i < count; i++) hidden[i] += s->mixed[i];
        layer_norm(s, hidden, layer->post_norm_weight, layer->post_norm_bias, normed, bf16);
        from = share_of(s, inner, me), to = share_of(s, inner, me + 1);
        product(s, layer->up, layer->up_bias, normed, s->between, width, inner, from, to, bf16);
        for (int64_t b = 0; b < s->batch; b++) {
            float *x = s->between + b * inner;
            SIMD for (int64_t i = from; i < to; i++) x[i] = activate(x[i], s->activation);
        }
        meet(s);
        from = share_of(s, width, me), to = share_of(s, width, me + 1);
        product(s, layer->down, layer->down_bias, s->between, s->rows, inner, width, from, to, bf16);
        meet(s);
        SIMD for (int64_t i = 0; i < count; i++) hidden[i] += s->rows[i];
    }
    if (me == 0) keep(s, hidden, count, bf16);
}

static void *step_layers(void *argument) {
    LeapStep *s = argument;
    int64_t me = __atomic_fetch_add(&s->tickets, 1, __ATOMIC_RELAXED);
    for (int spins = 0; !__atomic_load_n(&s->members, __ATOMIC_ACQUIRE); spins++)
        if (spins >= SPINS) sched_yield();
    if (s->bf16)
        through_layers(s, me, 1);
    else
        through_layers(s, me, 0);
    return NULL;
}

int leap_step(LeapStep *s) {
    pthread_t others[MOST_THREADS];
    int sizes = s->batch > 0 && s->width > 0 && s->parts > 0 && s->inner > 0 && s->layers > 0 && s->threads > 0;
    if (!sizes || s->threads > MOST_THREADS || s->activation < GELU || s->activation >= ACTIVATIONS) return UNFIT;
    for (int64_t i = 0; i < s->batch * s->width; i++) s->rows[i] = weight_at(s->hidden, i, (int)s->bf16);
    int started = start_threads(step_layers, s, s->threads, others);
    __atomic_store_n(&s->members, started + 1, __ATOMIC_RELEASE);
    step_layers(s);
    while (started) pthread_join(others[--started], NULL);
    return (int)s->failed;
}
