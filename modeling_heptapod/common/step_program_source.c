/* One token through the layers of a model in a call, for decoding, where what lies between small products takes longer than they
 * do. step_program.py compiles and calls it.
 *
 * A call runs a program: operations on rows of float32, a row for each text of a batch. Tensors of the model and its cache, float32
 * or bfloat16, are read and written where they lie.
 *
 * Each operation is cut into shares, which threads take one after another. A thread that does not get to run takes none, and nobody
 * waits for it, not even at the end: threads of OpenMP spin for milliseconds after their work.
 */

#include "../common/cpu_math_source.c"

#include <sched.h>

enum { LOAD, STORE, LINEAR, LAYER_NORM, RMS_NORM, MIX, ATTEND, ADD, GATE, KINDS }; /* in the order of step_program.py */
enum { NO_ACTIVATION, GELU, GELU_TANH, RELU, SILU };                               /* the same */
enum { TOGETHER = 4, SHARES = 4, SPINS = 4096, KEYS = 64, MOST_CHANNELS = 1024 };

/* One operation; the fields are mirrored in step_program.py. A place of a tensor is -1 where there is none. */
typedef struct {
    int64_t kind;
    int64_t in, in_row, width;    /* rows that are read: the first, floats from one to the next, channels */
    int64_t out, out_row, height; /* rows that are written: the same */
    int64_t other, other_row;     /* further rows that are read; -1: none */
    int64_t tensor[4];            /* places of weight, bias and state, or of keys, values, cosines and sines */
    int64_t from;                 /* the first row of the weight, or the first head of the cache */
    int64_t activation, adds;     /* `adds` to what is there */
    int64_t steps;                /* of the state of a token shift */
    int64_t index;                /* which mixing step, or which `Slots` */
    int64_t heads, mask, turn;    /* of ATTEND: how many, a place, floats from the cosines of queries to those of keys */
    double factor, epsilon;
} Operation;

/* Numbers of one cache: elements from one text to the next and from one head to the next, slots, the one to write, and those to
 * read, `base + (first + i * step) % ring` for i < keys. */
typedef struct {
    int64_t text, head, slots, write, base, first, step, ring, keys;
} Slots;

/* One call; the fields are mirrored in step_program.py. */
typedef struct {
    int64_t batch, operations, threads, bf16, mixing_bytes;
    const Operation *operation;
    void *const *tensor;
    const Slots *slots;
    float *memory;                                               /* all rows */
    int (*mix)(const void *mixing, int64_t first, int64_t step); /* heads first, first + step, ... */
    const char *mixing;                                          /* of each layer */
} StepProgram;

/* How many shares an operation has, how many were taken, and how many are done; alone in a line of a cache. */
typedef struct {
    int64_t shares, taken, done, padding[5];
} Progress;

/* A call, for threads that may outlive it. These touch nothing else, unless they have taken a share, which the call waits for. */
typedef struct {
    StepProgram call;
    int64_t failed, references;
    Progress progress[]; /* of each operation */
} Job;

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

INLINE float sigmoid(float x) {
    float decay = exp_negative(x > 0 ? -x : x);
    return (x > 0 ? 1 : decay) / (1 + decay);
}

INLINE float activate(float x, int64_t kind) {
    switch (kind) {
    case GELU: return 0.5f * x * (1 + erf_ratio(x * 0.70710678f));
    case GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case RELU: return x < 0 ? 0 : x;
    case SILU: return x * sigmoid(x);
    default: return x;
    }
}

INLINE float value_at(const void *values, int64_t at, int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)values)[at]) : ((const float *)values)[at];
}

INLINE void write_at(void *values, int64_t at, float x, int bf16) {
    if (bf16)
        ((uint16_t *)values)[at] = to_bf16(x);
    else
        ((float *)values)[at] = x;
}

INLINE void *tensor_of(const StepProgram *s, int64_t place) { return place < 0 ? NULL : s->tensor[place]; }

/* Where share `share` of `shares` begins in so many things, of which so many are done together. */
INLINE int64_t start_of(int64_t things, int64_t together, int64_t share, int64_t shares) {
    int64_t groups = (things + together - 1) / together, first = groups * share / shares * together;
    return first < things ? first : things;
}

INLINE void put(const Operation *o, float *y, int64_t r, float sum, const void *bias, int bf16) {
    y[r] = sum + (bias ? value_at(bias, o->from + r, bf16) : 0) + (o->adds ? y[r] : 0);
}

/* y[r] = activation(x . weight[r] + bias[r]), or added to what is there. Some rows of the weight are taken together. */
INLINE void linear(const StepProgram *s, const Operation *o, int64_t share, int64_t shares, int bf16) {
    const void *weight = tensor_of(s, o->tensor[0]), *bias = tensor_of(s, o->tensor[1]);
    int64_t from = start_of(o->height, TOGETHER, share, shares), to = start_of(o->height, TOGETHER, share + 1, shares);
    int64_t in = o->width, r = from;
    for (; r + TOGETHER <= to; r += TOGETHER)
        for (int64_t b = 0; b < s->batch; b++) {
            const float *x = s->memory + o->in + b * o->in_row;
            float *y = s->memory + o->out + b * o->out_row;
            int64_t w = (o->from + r) * in;
            float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
            _Pragma("omp simd reduction(+ : sum0, sum1, sum2, sum3)") for (int64_t i = 0; i < in; i++) {
                sum0 += x[i] * value_at(weight, w + i, bf16);
                sum1 += x[i] * value_at(weight, w + in + i, bf16);
                sum2 += x[i] * value_at(weight, w + 2 * in + i, bf16);
                sum3 += x[i] * value_at(weight, w + 3 * in + i, bf16);
            }
            float sums[TOGETHER] = {sum0, sum1, sum2, sum3};
            for (int64_t j = 0; j < TOGETHER; j++) put(o, y, r + j, sums[j], bias, bf16);
        }
    for (; r < to; r++)
        for (int64_t b = 0; b < s->batch; b++) {
            const float *x = s->memory + o->in + b * o->in_row;
            float sum = 0;
            SIMD_SUM(sum) for (int64_t i = 0; i < in; i++) sum += x[i] * value_at(weight, (o->from + r) * in + i, bf16);
            put(o, s->memory + o->out + b * o->out_row, r, sum, bias, bf16);
        }
    for (int64_t b = 0; o->activation && b < s->batch; b++) {
        float *y = s->memory + o->out + b * o->out_row;
        SIMD for (int64_t i = from; i < to; i++) y[i] = activate(y[i], o->activation);
    }
}

/* Replaces the second half of the channels by that of the oldest step in the state, in which it takes its place as the newest. */
INLINE void token_shift(const Operation *o, void *state, const float *x, float *y, int64_t b, int bf16) {
    int64_t moved = o->width / 2, stays = o->width - moved, start = b * o->steps * moved;
    for (int64_t i = 0; i < stays; i++) y[i] = x[i];
    for (int64_t i = 0; i < moved; i++) y[stays + i] = value_at(state, start + i, bf16);
    int64_t size = bf16 ? 2 : 4;
    char *first = (char *)state + start * size;
    memmove(first, first + moved * size, (o->steps - 1) * moved * size);
    for (int64_t i = 0; i < moved; i++) write_at(state, start + (o->steps - 1) * moved + i, x[stays + i], bf16);
}

INLINE void norm(const StepProgram *s, const Operation *o, int64_t b, int bf16) {
    const void *weight = tensor_of(s, o->tensor[0]), *bias = tensor_of(s, o->tensor[1]);
    void *state = tensor_of(s, o->tensor[2]);
    const float *x = s->memory + o->in + b * o->in_row;
    float *y = s->memory + o->out + b * o->out_row, mean = 0, squares = 0;
    if (state) {
        token_shift(o, state, x, y, b, bf16);
        x = y;
    }
    if (o->kind == LAYER_NORM) {
        SIMD_SUM(mean) for (int64_t i = 0; i < o->width; i++) mean += x[i];
        mean /= o->width;
    }
    SIMD_SUM(squares) for (int64_t i = 0; i < o->width; i++) squares += (x[i] - mean) * (x[i] - mean);
    float factor = 1 / sqrtf(squares / o->width + (float)o->epsilon);
    SIMD for (int64_t i = 0; i < o->width; i++) y[i] =
        (x[i] - mean) * factor * value_at(weight, i, bf16) + (bias ? value_at(bias, i, bf16) : 0);
}

/* Rotary positions in the half-split layout, with signed sines. */
INLINE void rotate(const float *x, const float *cosines, const float *sines, int64_t dim, float *y) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) y[i] = x[i] * cosines[i] + x[i + dim - half] * sines[i];
    for (int64_t i = half; i < dim; i++) y[i] = x[i] * cosines[i] + x[i - half] * sines[i];
}

/* Attention of one head, with a softmax that runs over blocks of keys: out = sum exp(q . k - largest) v / sum exp(q . k - largest). */
INLINE void attend_head(const Operation *o, const Slots *n, const void *keys, const void *values, const uint8_t *mask,
                        const float *query, int64_t dim, float *out, int bf16) {
    float scores[KEYS], largest = -INFINITY, total = 0;
    int64_t at = n->first % n->ring;
    for (int64_t i = 0; i < dim; i++) out[i] = 0;
    for (int64_t start = 0; start < n->keys; start += KEYS) {
        int64_t count = n->keys - start < KEYS ? n->keys - start : KEYS, place[KEYS];
        float best = largest;
        for (int64_t j = 0; j < count; j++) {
            float sum = 0;
            int64_t slot = n->base + at;
            at += n->step;
            if (at >= n->ring) at %= n->ring; /* a division a key takes as long as its product */
            place[j] = slot * dim;
            SIMD_SUM(sum) for (int64_t i = 0; i < dim; i++) sum += query[i] * value_at(keys, place[j] + i, bf16);
            scores[j] = mask && !mask[slot] ? -INFINITY : sum * (float)o->factor;
            best = scores[j] > best || scores[j] != scores[j] ? scores[j] : best;
        }
        if (best == -INFINITY) continue;
        float before = exp_negative(largest - best);
        total *= before;
        SIMD for (int64_t i = 0; i < dim; i++) out[i] *= before;
        SIMD_SUM(total) for (int64_t j = 0; j < count; j++) total += scores[j] = exp_negative(scores[j] - best);
        for (int64_t j = 0; j < count; j++)
            SIMD for (int64_t i = 0; i < dim; i++) out[i] += scores[j] * value_at(values, place[j] + i, bf16);
        largest = best;
    }
    SIMD for (int64_t i = 0; i < dim; i++) out[i] /= total;
}

/* Queries at `in`, keys at `other` and values behind them; the token is written into the cache first. */
INLINE void attend(const StepProgram *s, const Operation *o, int64_t share, int bf16) {
    void *keys = tensor_of(s, o->tensor[0]), *values = tensor_of(s, o->tensor[1]);
    const uint8_t *mask = tensor_of(s, o->mask);
    const float *cosines = tensor_of(s, o->tensor[2]), *sines = tensor_of(s, o->tensor[3]);
    const Slots *n = &s->slots[o->index];
    int64_t dim = o->width / o->heads, inner = o->width, size = bf16 ? 2 : 4;
    int64_t b = share / o->heads, h = share % o->heads, start = b * n->text + (o->from + h) * n->head;
    const float *query = s->memory + o->in + b * o->in_row + h * dim, *key = s->memory + o->other + b * o->other_row + h * dim;
    const float *value = key + inner;
    float turned[2][MOST_CHANNELS];
    if (cosines) {
        rotate(query, cosines, sines, dim, turned[0]);
        rotate(key, cosines + o->turn, sines + o->turn, dim, turned[1]);
        query = turned[0], key = turned[1];
    }
    for (int64_t i = 0; i < dim; i++) {
        write_at(keys, start + n->write * dim + i, key[i], bf16);
        write_at(values, start + n->write * dim + i, value[i], bf16);
    }
    float *out = s->memory + o->out + b * o->out_row + h * dim;
    const uint8_t *row = mask ? mask + b * n->slots : NULL;
    attend_head(o, n, (char *)keys + start * size, (char *)values + start * size, row, query, dim, out, bf16);
}

/* y = factor * (x - other), or added to y; without `other` where there is none. */
INLINE void add(const StepProgram *s, const Operation *o, int64_t b) {
    const float *x = s->memory + o->in + b * o->in_row, *z = s->memory + o->other + b * o->other_row;
    float *y = s->memory + o->out + b * o->out_row, factor = (float)o->factor;
    for (int64_t i = 0; i < o->width; i++) y[i] = (o->adds ? y[i] : 0) + factor * (o->other < 0 ? x[i] : x[i] - z[i]);
}

/* y = silu(y / rms(x) + bias), with the root of the mean square of the row x. */
INLINE void gate(const StepProgram *s, const Operation *o, int64_t b, int bf16) {
    const void *bias = tensor_of(s, o->tensor[1]);
    const float *x = s->memory + o->in + b * o->in_row;
    float *y = s->memory + o->out + b * o->out_row, squares = 0;
    SIMD_SUM(squares) for (int64_t i = 0; i < o->width; i++) squares += x[i] * x[i];
    float factor = 1 / sqrtf(squares / o->width + (float)o->epsilon);
    SIMD for (int64_t i = 0; i < o->height; i++) y[i] = activate(y[i] * factor + value_at(bias, i, bf16), SILU);
}

/* Between rows and a tensor [batch, width]. */
INLINE void copy(const StepProgram *s, const Operation *o, int64_t b, int bf16) {
    void *values = tensor_of(s, o->tensor[0]);
    float *x = s->memory + o->in + b * o->in_row;
    for (int64_t i = 0; i < o->width; i++)
        if (o->kind == LOAD)
            x[i] = value_at(values, b * o->width + i, bf16);
        else
            write_at(values, b * o->width + i, x[i], bf16);
}

INLINE int do_share(const StepProgram *s, const Operation *o, int64_t share, int64_t shares, int bf16) {
    switch (o->kind) {
    case LINEAR: linear(s, o, share, shares, bf16); break;
    case LAYER_NORM:
    case RMS_NORM: norm(s, o, share, bf16); break;
    case ATTEND: attend(s, o, share, bf16); break;
    case ADD: add(s, o, share); break;
    case GATE: gate(s, o, share, bf16); break;
    case MIX: return s->mix(s->mixing + o->index * s->mixing_bytes, share, shares);
    default: copy(s, o, share, bf16);
    }
    return DONE;
}

INLINE int64_t shares_of(const StepProgram *s, const Operation *o) {
    switch (o->kind) {
    case LINEAR:
    case MIX: return SHARES * s->threads;
    case ATTEND: return s->batch * o->heads;
    default: return s->batch;
    }
}

INLINE void run(Job *job, int bf16) {
    for (int64_t at = 0; at < job->call.operations; at++) {
        Progress *p = &job->progress[at];
        int64_t share;
        while ((share = __atomic_fetch_add(&p->taken, 1, __ATOMIC_RELAXED)) < p->shares) {
            int status = do_share(&job->call, &job->call.operation[at], share, p->shares, bf16);
            if (status) __atomic_store_n(&job->failed, status, __ATOMIC_RELAXED);
            __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
        }
        for (int spins = 0; __atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < p->shares; spins++)
            if (spins >= SPINS) sched_yield();
    }
}

static void leave(Job *job, int64_t threads) {
    if (!__atomic_sub_fetch(&job->references, threads, __ATOMIC_ACQ_REL)) free(job);
}

static void *run_job(void *argument) {
    Job *job = argument;
    if (job->call.bf16)
        run(job, 1);
    else
        run(job, 0);
    return NULL;
}

static void *help(void *argument) {
    run_job(argument);
    leave(argument, 1);
    return NULL;
}

int step_program(StepProgram *s) {
    pthread_t others[MOST_THREADS];
    if (s->batch < 1 || s->threads < 1 || s->threads > MOST_THREADS) return UNFIT;
    for (int64_t at = 0; at < s->operations; at++) {
        const Operation *o = &s->operation[at];
        if (o->kind < LOAD || o->kind >= KINDS || o->activation < NO_ACTIVATION || o->activation > SILU) return UNFIT;
        if (o->kind == ATTEND && (o->heads < 1 || o->width / o->heads > MOST_CHANNELS)) return UNFIT;
    }
    Job *job = calloc(1, sizeof(Job) + s->operations * sizeof(Progress));
    if (!job) return NO_MEMORY;
    job->call = *s, job->references = s->threads;
    for (int64_t at = 0; at < s->operations; at++) job->progress[at].shares = shares_of(s, &s->operation[at]);
    int started = start_threads(help, job, s->threads, others);
    for (int i = 0; i < started; i++) pthread_detach(others[i]);
    run_job(job);
    int failed = (int)job->failed;
    leave(job, s->threads - started);
    return failed;
}
