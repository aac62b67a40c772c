// How fast this machine reads memory, and decodes and multiplies stored weights: floor.c compares the engine with it.
// A probe is not a kernel: no scales on FP8, rows in multiples of four, one order of lanes. Four rows of weights at a
// time, 16 lanes, one sum for each (row of weights, row of activations), fused multiply-adds of floats; the next four
// rows are prefetched. bfloat16 products, where a machine has them, beat it. Without AVX-512 it is the header's linear.
#ifndef PROBE_H
#define PROBE_H
#include "bench.h"

enum { PROBE_COLS = 1024, PROBE_ROWS = 6 };
static size_t dtype_bytes(int dtype, size_t n) {
    return dtype == DSPARK_F32 ? 4 * n : dtype == DSPARK_FP8 ? n : dtype == DSPARK_FP4 ? n / 2 : 2 * n;
}

#ifdef DSPARK__X86
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define AVX512_INLINE AVX512 static inline __attribute__((always_inline))
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// 16 weights of a row from the k-th on; FP8: 2^-8 of them; FP4: even lanes low nibbles, times 1
AVX512_INLINE __m512 probe_decode(const int dtype, const uint8_t *w, size_t k, __m512 table) {
    if (dtype == DSPARK_F32) return _mm512_loadu_ps(w + 4 * k);
    if (dtype == DSPARK_BF16) {
        __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)(w + 2 * k));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    if (dtype == DSPARK_FP8) {
        __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(w + k))), 7);
        return _mm512_cvtph_ps(_mm256_and_si256(h, _mm256_set1_epi16((short)0xbf80)));
    }
    __m512i by = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    long long u;
    memcpy(&u, w + k / 2, 8);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(u), by), table);
}

// y[r] += something of w x[r], for 4 rows of weights
AVX512_INLINE void probe_four(const int dtype, const int R, const uint8_t *w, const uint8_t *scale, const float *x,
                              float *y) {
    const size_t row = dtype_bytes(dtype, PROBE_COLS);
    const size_t line = dtype == DSPARK_F32 ? 16 : dtype == DSPARK_BF16 ? 32 : dtype == DSPARK_FP8 ? 64 : 128;
    __m512 values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    __m512 sum[PROBE_ROWS][4], table[4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) for (int q = 0; q < 4; q++) sum[r][q] = _mm512_setzero_ps();
    for (int q = 0; q < 4; q++) table[q] = values;
    for (size_t k = 0; k < PROBE_COLS; k += 16) {
        __m512 v[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const uint8_t *p = w + (size_t)q * row;
            if (k % line == 0) _mm_prefetch((const char *)p + dtype_bytes(dtype, k) + 4 * row, _MM_HINT_T0);
            if (dtype == DSPARK_FP4 && k % 32 == 0) {
                int bits = (int)scale[q * (PROBE_COLS / 32) + (int)k / 32] << 23;
                table[q] = _mm512_mul_ps(values, _mm512_castsi512_ps(_mm512_set1_epi32(bits)));
            }
            v[q] = probe_decode(dtype, p, k, table[q]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m512 a = _mm512_loadu_ps(x + r * PROBE_COLS + (int)k);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) sum[r][q] = _mm512_fmadd_ps(v[q], a, sum[r][q]);
        }
    }
    for (int r = 0; r < R; r++) for (int q = 0; q < 4; q++) y[r] += _mm512_reduce_add_ps(sum[r][q]);
}

#define PROBE(dtype, R) \
    case dtype * 8 + R: \
        for (int o = first; o < end; o += 4) \
            probe_four(dtype, R, w + (size_t)o * row, scale + (size_t)o * (PROBE_COLS / 32), x, y); \
        break;
#define PROBES(dtype) \
    PROBE(dtype, 1) PROBE(dtype, 2) PROBE(dtype, 3) PROBE(dtype, 4) PROBE(dtype, 5) PROBE(dtype, 6)
AVX512 static void probe_avx512(int dtype, int R, const uint8_t *w, const uint8_t *scale, const float *x, float *y,
                                int first, int end) {
    const size_t row = dtype_bytes(dtype, PROBE_COLS);
    switch (dtype * 8 + R) { PROBES(DSPARK_F32) PROBES(DSPARK_BF16) PROBES(DSPARK_FP8) PROBES(DSPARK_FP4) }
}

AVX512 static uint64_t read_avx512(const uint8_t *p, size_t n) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i + 256 <= n; i += 256) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(p + i)), b = _mm512_or_si512(b, _mm512_loadu_si512(p + i + 64));
        c = _mm512_or_si512(c, _mm512_loadu_si512(p + i + 128)), d = _mm512_or_si512(d, _mm512_loadu_si512(p + i + 192));
    }
    return (uint64_t)_mm512_reduce_or_epi64(_mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d)));
}
#else
static int has_avx512(void) { return 0; }
static void probe_avx512(int dtype, int R, const uint8_t *w, const uint8_t *scale, const float *x, float *y, int first,
                         int end) {
    (void)dtype, (void)R, (void)w, (void)scale, (void)x, (void)y, (void)first, (void)end;
}
static uint64_t read_avx512(const uint8_t *p, size_t n) { return (void)p, (uint64_t)n; }
#endif

static uint64_t read_plain(const uint8_t *p, size_t n) {
    uint64_t a = 0, b = 0, c = 0, d = 0, w[4];
    for (size_t i = 0; i + 32 <= n; i += 32) memcpy(w, p + i, 32), a |= w[0], b |= w[1], c |= w[2], d |= w[3];
    return a | b | c | d;
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Seconds to read a buffer once, its parts by so many threads.
static volatile uint64_t read_sink;
static double read_buffer(const uint8_t *p, size_t n, int threads) {
    double start = seconds();
    uint64_t all = 0;
#ifdef _OPENMP
    #pragma omp parallel num_threads(threads) reduction(|:all)
#endif
    {
        size_t part = n / (size_t)threads / 256 * 256, t = (size_t)thread_number();
        all |= has_avx512() ? read_avx512(p + t * part, part) : read_plain(p + t * part, part);
    }
    read_sink = all;
    return seconds() - start;
}

// A matrix of about `bytes` bytes, PROBE_COLS wide.
typedef struct { dspark_matrix m; uint8_t *memory, *scale; } probe_matrix;
static probe_matrix probe_open(int dtype, size_t bytes) {
    probe_matrix p;
    size_t n, row = dtype_bytes(dtype, PROBE_COLS);
    p.m.dtype = dtype, p.m.cols = PROBE_COLS, p.m.rows = (int)(bytes / row / 64 * 64);
    n = (size_t)p.m.rows * row;
    p.memory = (uint8_t *)need(n + 8192, 1), p.scale = (uint8_t *)need((size_t)p.m.rows * (PROBE_COLS / 32), 1);
    for (size_t i = 0; i < n; i++) p.memory[i] = (uint8_t)(i * 2654435761u >> 11 & 0x3f);       // small numbers in every format
    memset(p.scale, 127, (size_t)p.m.rows * (PROBE_COLS / 32));
    p.m.data = p.memory, p.m.scale = p.scale;
    return p;
}
static void probe_close(probe_matrix *p) { free(p->memory), free(p->scale); }

// Weights a second with R rows of activations, by the probe or the header's linear.
static double probe_run(const probe_matrix *p, int R, int threads, int own, const dspark__kernels *k) {
    static float x[PROBE_ROWS * PROBE_COLS], *y, *scratch;
    size_t n = dspark__linear_scratch(PROBE_COLS, PROBE_ROWS);
    const float *rows[PROBE_ROWS];
    float *outs[PROBE_ROWS];
    dspark__job job;
    double start;
    y = (float *)realloc(y, (size_t)(PROBE_ROWS * p->m.rows) * sizeof *y);
    scratch = (float *)realloc(scratch, n * (size_t)threads * sizeof *scratch);
    if (!y || !scratch) die("bench", "out of memory");
    for (int i = 0; i < PROBE_ROWS * PROBE_COLS; i++) x[i] = (float)(i % 17 - 8);
    for (int r = 0; r < R; r++) rows[r] = x + r * PROBE_COLS, outs[r] = y + (size_t)r * (size_t)p->m.rows;
    job.w = &p->m, job.first = 0, job.n = p->m.rows, job.n_rows = R, job.x = rows, job.y = outs;
    start = seconds();
#ifdef _OPENMP
    #pragma omp parallel num_threads(threads)
#endif
    {
        int t = thread_number(), begin = p->m.rows / 4 * t / threads * 4, end = p->m.rows / 4 * (t + 1) / threads * 4;
        if (own) k->linear(&job, begin, end, scratch + (size_t)t * n);
        else {
            float sums[PROBE_ROWS] = { 0 };
            probe_avx512(p->m.dtype, R, p->memory, p->scale, x, sums, begin, end);
            memcpy(y + begin, sums, sizeof sums);
        }
    }
    return (double)p->m.rows * PROBE_COLS / (seconds() - start);
}
static double probe_rate(const probe_matrix *p, int R, int threads, const dspark__kernels *k) {
    return probe_run(p, R, threads, !has_avx512(), k);
}
#endif
