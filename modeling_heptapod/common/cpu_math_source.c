/* What the C sources of this package share: rows of float32 and bfloat16, exponentials that compilers vectorise, threads. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(x) _Pragma(SIMD_TEXT(omp simd reduction(+ : x)))
#define SIMD_TEXT(x) #x

enum { MOST_THREADS = 256 };
enum { DONE, NO_MEMORY, UNFIT }; /* what a call returns */

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    return x != x ? 0x7FC0 : (uint16_t)rounded;
}

/* exp of x <= 0 to 2 units in the last place, in a form that compilers vectorise. NaN stays NaN. */
INLINE float exp_negative(float x) {
    float safe = x < -87.0f ? -87.0f : x;
    float n = rintf(safe * 1.44269504f);
    float r = safe - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t bits = ((int32_t)(n == n ? n : 0.0f) + 127) << 23; /* no integer is NaN */
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}

/* Starts threads that run `work(job)`, one less than so many, and fewer where the system refuses them. Returns how many. */
static int start_threads(void *(*work)(void *), void *job, int64_t threads, pthread_t others[MOST_THREADS]) {
    int started = 0;
    while (started < threads - 1 && started < MOST_THREADS && !pthread_create(&others[started], NULL, work, job))
        started++;
    return started;
}

/* Runs `work(job)` in so many threads, fewer where the system refuses them. */
static void in_threads(void *(*work)(void *), void *job, int64_t threads) {
    pthread_t others[MOST_THREADS];
    int started = start_threads(work, job, threads, others);
    work(job);
    while (started) pthread_join(others[--started], NULL);
}
