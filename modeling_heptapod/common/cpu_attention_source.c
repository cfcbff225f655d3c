/* What attentions to windows share on CPUs. Vectors hold neighbouring queries, one channel each, so that the keys at another
 * offset of the window are the same memory, shifted. Rows of `stride` floats hold a channel, or an offset of the window.
 */

#include "../common/cpu_math_source.c"

#ifdef __AVX512F__
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#ifdef __clang__
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourPlaces){i, j, k, l})
#endif


enum { MOST = 8, GROUP = 8, STRIP = 96, TILES_PER_THREAD = 4 };

INLINE Vec load(const float *from) { return *(const Vec *)from; }
INLINE void store(float *to, Vec x) { *(Vec *)to = x; }
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int whole_vectors(int count) { return (count + LANES - 1) / LANES * LANES; }
INLINE int padded(int64_t dim) { return (int)((dim + GROUP - 1) / GROUP * GROUP); }

/* Zeros after `count` elements of rows: what is not a query adds nothing to a key, and narrow tiles follow wide ones. */
INLINE void clear_ends(float *rows, int64_t number, int64_t count, int64_t stride) {
    for (int64_t n = 0; n < number; n++) memset(rows + n * stride + count, 0, (stride - count) * sizeof(float));
}

/* Four rows become four columns. */
INLINE void transpose(Four *x) {
    Four low = PICK(x[0], x[1], 0, 4, 1, 5), high = PICK(x[0], x[1], 2, 6, 3, 7);
    Four low_next = PICK(x[2], x[3], 0, 4, 1, 5), high_next = PICK(x[2], x[3], 2, 6, 3, 7);
    x[0] = PICK(low, low_next, 0, 1, 4, 5);
    x[1] = PICK(low, low_next, 2, 3, 6, 7);
    x[2] = PICK(high, high_next, 0, 1, 4, 5);
    x[3] = PICK(high, high_next, 2, 3, 6, 7);
}

INLINE float read_one(const void *data, int bf16, int64_t at) {
    return bf16 ? from_bf16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
}

INLINE void write_one(void *data, int bf16, int64_t at, float x) {
    if (bf16)
        ((uint16_t *)data)[at] = to_bf16(x);
    else
        ((float *)data)[at] = x;
}

INLINE Four read_four(const void *data, int bf16, int64_t at) {
    if (!bf16) return *(const Four *)((const float *)data + at);
    Four x;
    for (int d = 0; d < 4; d++) x[d] = from_bf16(((const uint16_t *)data)[at + d]);
    return x;
}

INLINE void write_four(void *data, int bf16, int64_t at, Four x) {
    if (!bf16)
        *(Four *)((float *)data + at) = x;
    else
        for (int d = 0; d < 4; d++) ((uint16_t *)data)[at + d] = to_bf16(x[d]);
}

/* `count` columns, channel by channel, times `factor`, of data whose column i is at `at + i * step`. Those before 0 and from
 * `width` on, for a first column `left`, become zero. */
INLINE void read_columns(const void *data, int bf16, int64_t at, int64_t step, int64_t left, int64_t width, int count,
                         int dim, float factor, float *to, int64_t stride) {
    int fours = dim / 4 * 4, i = 0;
    while (i < count) {
        if (left + i < 0 || left + i >= width) {
            for (int d = 0; d < dim; d++) to[d * stride + i] = 0;
            i++;
            continue;
        }
        int together = i + 4 <= count && left + i + 4 <= width ? 4 : 1, begin = together == 4 ? fours : 0;
        for (int d = 0; d < begin; d += 4) {
            Four x[4];
            for (int j = 0; j < 4; j++) x[j] = read_four(data, bf16, at + (i + j) * step + d) * factor;
            transpose(x);
            for (int j = 0; j < 4; j++) *(Four *)(to + (d + j) * stride + i) = x[j];
        }
        for (int j = 0; j < together; j++)
            for (int d = begin; d < dim; d++)
                to[d * stride + i + j] = read_one(data, bf16, at + (i + j) * step + d) * factor;
        i += together;
    }
}

/* `count` columns to data, from channels. */
INLINE void write_columns(void *data, int bf16, int64_t at, int64_t step, int count, int dim, const float *from,
                          int64_t stride) {
    int fours = dim / 4 * 4, whole = count / 4 * 4;
    for (int i = 0; i < whole; i += 4) {
        for (int d = 0; d < fours; d += 4) {
            Four x[4];
            for (int j = 0; j < 4; j++) x[j] = *(const Four *)(from + (d + j) * stride + i);
            transpose(x);
            for (int j = 0; j < 4; j++) write_four(data, bf16, at + (i + j) * step + d, x[j]);
        }
    }
    for (int i = 0; i < count; i++)
        for (int d = i < whole ? fours : 0; d < dim; d++)
            write_one(data, bf16, at + i * step + d, from[d * stride + i]);
}

/* sums[b][x] = first[b + x] + sum over channels of row[x] * keys[b + x], for `count` offsets b. Rows of keys are
 * `key_stride` apart, here and below. */
INLINE void products(const float *row, const float *keys, const float *first, int dim, int64_t stride,
                     int64_t key_stride, int columns, float *sums, const int count) {
    for (int x = 0; x < columns; x += LANES) {
        Vec sum[MOST];
#pragma GCC unroll 8
        for (int b = 0; b < count; b++) sum[b] = first ? load(first + b + x) : (Vec){0};
        for (int d = 0; d < dim; d++) {
            Vec one = load(row + d * stride + x);
            const float *key = keys + d * key_stride + x;
#pragma GCC unroll 8
            for (int b = 0; b < count; b++) sum[b] += one * load(key + b);
        }
#pragma GCC unroll 8
        for (int b = 0; b < count; b++) store(sums + b * stride + x, sum[b]);
    }
}

/* The same for all offsets of a row of the window, in groups that fit into registers. */
INLINE void window_products(const float *row, const float *keys, const float *first, int dim, int64_t stride,
                            int64_t key_stride, int columns, int side, float *sums) {
    int groups = (side + MOST - 1) / MOST;
    for (int b = 0, left = groups; left; left--) {
        int count = (side - b + left - 1) / left;
        const float *from = first ? first + b : NULL;
        switch (count) {
#define CASE(n)                                                                                          \
    case n: products(row, keys + b, from, dim, stride, key_stride, columns, sums + b * stride, n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
        b += count;
    }
}

/* sums[d][x] += sum over offsets b of weights[b][x] * rows[d][x + b]: of the keys that a query sees. */
INLINE void weigh(const float *weights, const float *rows, int dim, int64_t stride, int64_t key_stride, int columns,
                  int side, float *sums) {
    for (int d = 0; d < dim; d += GROUP) {
        for (int x = 0; x < columns; x += LANES) {
            Vec sum[GROUP];
#pragma GCC unroll 8
            for (int e = 0; e < GROUP; e++) sum[e] = load(sums + (d + e) * stride + x);
            for (int b = 0; b < side; b++) {
                Vec weight = load(weights + b * stride + x);
                const float *row = rows + d * key_stride + x + b;
#pragma GCC unroll 8
                for (int e = 0; e < GROUP; e++) sum[e] += weight * load(row + e * key_stride);
            }
#pragma GCC unroll 8
            for (int e = 0; e < GROUP; e++) store(sums + (d + e) * stride + x, sum[e]);
        }
    }
}

/* sums[d][x] += sum over offsets b of weights[b][x - b] * rows[d][x - b]: of the `queries` that see a key. Before and after
 * them, weights and rows hold zeros, at least a vector less one or as many as the largest offset. */
INLINE void weigh_back(const float *weights, const float *rows, int dim, int64_t stride, int64_t key_stride, int queries,
                       int side, float *sums) {
    for (int d = 0; d < dim; d += GROUP) {
        for (int x = 0; x < queries + side - 1; x += LANES) {
            int begin = x < queries ? 0 : x - queries + 1, end = x + LANES < side ? x + LANES : side;
            Vec sum[GROUP];
#pragma GCC unroll 8
            for (int e = 0; e < GROUP; e++) sum[e] = load(sums + (d + e) * key_stride + x);
            for (int b = begin; b < end; b++) {
                Vec weight = load(weights + b * stride + x - b);
                const float *row = rows + d * stride + x - b;
#pragma GCC unroll 8
                for (int e = 0; e < GROUP; e++) sum[e] += weight * load(row + e * stride);
            }
#pragma GCC unroll 8
            for (int e = 0; e < GROUP; e++) store(sums + (d + e) * key_stride + x, sum[e]);
        }
    }
}
