/* All CPU kernels on fixed inputs, a hash of the bits a case: odd sizes, tails, unaligned
   weights, partial ranges, 1 to 64 rows. Two paths, compilers or optimization levels that give the same
   hashes give the same text. Include after dspark.h's implementation. */
#ifndef KERNELS_CASES_H
#define KERNELS_CASES_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char name[96];
    uint64_t hash;
} kernel_case;

static uint32_t random_state = 1;
static uint32_t random_bits(void) {     // xorshift32
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}
// In (-1, 1), exactly the same everywhere.
static float random_float(void) { return (float)((int32_t)(random_bits() >> 8) - (1 << 23)) * (1.0f / (1 << 23)); }
static void random_floats(float *x, int n, float scale) {
    for (int i = 0; i < n; i++) x[i] = random_float() * scale;
}
static void *room(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) exit(1);
    memset(p, 0, bytes ? bytes : 1);
    return p;
}

static uint64_t hash_floats(uint64_t hash, const float *x, int n) {     // FNV-1a; all NaN alike
    for (int i = 0; i < n; i++) {
        uint32_t u = 0x7fc00000;
        if (x[i] == x[i]) memcpy(&u, &x[i], 4);
        for (int b = 0; b < 32; b += 8) hash = (hash ^ (u >> b & 255)) * 0x100000001b3u;
    }
    return hash;
}
static uint64_t hash_bytes(uint64_t hash, const uint8_t *x, int n) {
    for (int i = 0; i < n; i++) hash = (hash ^ x[i]) * 0x100000001b3u;
    return hash;
}
#define HASH_START 0xcbf29ce484222325u

/* A matrix whose bytes lie `offset` past a malloc'd address; free `memory`. */
typedef struct {
    dspark_matrix m;
    void *memory, *scales;
} test_matrix;

static size_t kind_row_bytes(int kind, int cols) {
    size_t n = (size_t)cols;
    return kind == DSPARK_FP8 ? n : kind == DSPARK_FP4 ? n / 2 : kind == DSPARK_F32 ? 4 * n : 2 * n;
}
static const char *kind_name(int kind) {
    static const char *const names[] = { "F32", "BF16", "F16", "FP8", "FP4" };
    return names[kind];
}
static test_matrix random_matrix(int kind, int rows, int cols, int offset) {
    test_matrix t;
    size_t bytes = (size_t)rows * kind_row_bytes(kind, cols);
    size_t n_scales = kind == DSPARK_FP8 ? (size_t)((rows + 127) / 128) * (size_t)((cols + 127) / 128)
                                         : (size_t)rows * (size_t)(cols / 32);
    uint8_t *p, *s;
    t.memory = room(bytes + 8);
    t.scales = room(n_scales + 8);
    p = (uint8_t *)t.memory + offset;
    s = (uint8_t *)t.scales + offset;
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(random_bits() >> 11);
    for (size_t i = 0; i < n_scales; i++) s[i] = (uint8_t)(117 + random_bits() % 7);
    for (size_t i = 0; kind <= DSPARK_F16 && i < bytes; i += kind == DSPARK_F32 ? 4 : 2) {  // plain numbers
        float f = random_float();
        uint32_t u, half = 0x3000 + random_bits() % 0x900;
        memcpy(&u, &f, 4);
        if (kind == DSPARK_F32) memcpy(p + i, &u, 4);
        if (kind == DSPARK_BF16) p[i] = (uint8_t)(u >> 16), p[i + 1] = (uint8_t)(u >> 24);
        if (kind == DSPARK_F16) p[i] = (uint8_t)half, p[i + 1] = (uint8_t)(half >> 8 | (random_bits() & 128));
    }
    t.m.data = p;
    t.m.scale = s;
    t.m.rows = rows, t.m.cols = cols, t.m.dtype = kind;
    return t;
}
static void free_matrix(test_matrix t) {
    free(t.memory);
    free(t.scales);
}

/* rows of x, padded as the kernels ask; y [n_rows][n] */
typedef struct {
    int n_rows, stride, n;
    float *x_memory, *y_memory, *scratch;
    const float *x[80];
    float *y[80];
} test_rows;

static test_rows random_rows(int n_rows, int cols, int n) {
    test_rows t;
    t.n_rows = n_rows, t.stride = (cols + 15) / 16 * 16 + 1, t.n = n;      // + 1: no row but the first is aligned
    t.x_memory = (float *)room((size_t)(n_rows * t.stride) * sizeof(float));
    t.y_memory = (float *)room((size_t)(n_rows * n) * sizeof(float));
    t.scratch = (float *)room(dspark__linear_scratch(cols, n_rows) * sizeof(float));
    for (int r = 0; r < n_rows; r++) {
        t.x[r] = t.x_memory + r * t.stride;
        t.y[r] = t.y_memory + r * n;
        random_floats(t.x_memory + r * t.stride, cols, 3);
    }
    return t;
}
static void free_rows(test_rows t) {
    free(t.x_memory);
    free(t.y_memory);
    free(t.scratch);
}
static void run_linear(const dspark__kernels *k, const dspark_matrix *m, test_rows *t, int first, int begin, int end) {
    dspark__job job;
    job.w = m, job.first = first, job.n = t->n, job.n_rows = t->n_rows, job.x = t->x, job.y = t->y;
    k->linear(&job, begin, end, t->scratch);
}

static const int linear_shapes[][4] = {     // rows, cols, first, rows of x
    { 5, 32, 0, 1 }, { 7, 48, 1, 2 }, { 130, 96, 3, 3 }, { 33, 288, 0, 4 }, { 260, 160, 126, 5 }, { 21, 608, 2, 6 },
    { 12, 1120, 0, 7 }, { 9, 544, 0, 8 }, { 10, 64, 3, 9 }, { 140, 320, 100, 64 }, { 4, 200, 0, 1 }, { 6, 17, 0, 3 },
    { 6, 1, 0, 2 }, { 5, 15, 1, 7 }, { 3, 520, 0, 13 }, { 1, 31, 0, 6 }, { 300, 257, 0, 5 }, { 70, 128, 2, 1 },
    { 131, 192, 1, 2 }, { 23, 1024, 0, 3 }, { 9, 448, 0, 4 }, { 6, 64, 1, 5 }, { 133, 256, 0, 6 },
    { 11, 128, 2, 10 }, { 6, 320, 0, 16 }, { 131, 192, 1, 28 }, { 7, 96, 0, 50 }
};

/* Inputs of an FP8 or FP4 linear: any floats; rounded to FP8, so that they and the products are exact in few bits; the
   same so small that a product of bfloat16 would flush some to zero; scales of any code. */
enum { ANY_INPUTS, ROUNDED_INPUTS, TINY_INPUTS, ANY_SCALES, INPUT_KINDS };
static void change_inputs(const dspark__kernels *k, int inputs, int kind, test_matrix *m, test_rows *t, int cols) {
    size_t n_scales = kind == DSPARK_FP8 ? (size_t)((m->m.rows + 127) / 128) * (size_t)((cols + 127) / 128)
                                         : (size_t)m->m.rows * (size_t)(cols / 32);
    uint8_t *scale = (uint8_t *)m->scales + (m->m.scale - (const uint8_t *)m->scales);
    for (int r = 0; inputs != ANY_INPUTS && r < t->n_rows; r++) {
        float *x = t->x_memory + r * t->stride;
        k->round_fp8(x, cols, 128, x);
        for (int i = 0; inputs == TINY_INPUTS && i < cols; i++) x[i] *= i % 3 ? 0x1p-60f : 0x1p-127f;
    }
    for (size_t i = 0; inputs == ANY_SCALES && i < n_scales; i++) scale[i] = (uint8_t)(random_bits() >> 9);
}

static int linear_cases(const dspark__kernels *k, kernel_case *out) {
    static const char *const inputs_name[] = { "", ", rounded inputs", ", tiny inputs", ", any scales" };
    int n_shapes = (int)(sizeof linear_shapes / sizeof *linear_shapes), count = 0;
    for (int kind = DSPARK_F32; kind <= DSPARK_FP4; kind++)
        for (int i = 0; i < n_shapes * (kind >= DSPARK_FP8 ? INPUT_KINDS : 1); i++) {
            const int *s = linear_shapes[i % n_shapes], inputs = i / n_shapes;
            int cols = kind == DSPARK_FP4 ? (s[1] + 31) / 32 * 32 : s[1], n = s[0] - s[2], cut = n / 8 * 4;
            test_matrix m = random_matrix(kind, s[0], cols, i & 3);
            test_rows t = random_rows(s[3], cols, n);
            change_inputs(k, inputs, kind, &m, &t, cols);
            run_linear(k, &m.m, &t, s[2], cut, n);
            run_linear(k, &m.m, &t, s[2], 0, cut);
            snprintf(out[count].name, sizeof out->name, "linear %s [%d x %d] from %d, %d rows%s", kind_name(kind), s[0], cols,
                     s[2], s[3], inputs_name[inputs]);
            out[count++].hash = hash_floats(HASH_START, t.y_memory, t.n_rows * n);
            free_matrix(m);
            free_rows(t);
        }
    return count;
}

static void activation_values(float *x, int n) {    // many magnitudes, zeros, ties, tiny ones
    for (int i = 0; i < n; i++) {
        float f = random_float();       // a statement each: arguments are evaluated in any order
        x[i] = ldexpf(f, (int)(random_bits() % 24) - 16);
        if (random_bits() % 16 == 0) x[i] = 0;
        if (random_bits() % 16) continue;
        f = (float)(random_bits() % 64);
        x[i] = ldexpf(f, (int)(random_bits() % 12) - 10);
    }
}

static int rounding_cases(const dspark__kernels *k, kernel_case *out) {
    static const int sizes[] = { 1, 15, 16, 64, 100, 128, 300, 448, 513 };
    static float x[1024], y[1024];
    static uint8_t codes[1024], scales[64];
    int count = 0;
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++) {
        int n = sizes[i], block = i & 1 ? 64 : 128, n4 = (n + 31) / 32 * 32;
        uint64_t hash = HASH_START;
        activation_values(x, 1024);
        if (i == 4) memset(x, 0, sizeof x);
        if (i == 5) x[3] = INFINITY, x[7] = NAN;
        k->round_fp8(x, n, block, y);
        hash = hash_floats(hash, y, n);
        k->encode_fp8(x, n, block, codes, scales);
        hash = hash_bytes(hash_bytes(hash, codes, n), scales, (n + block - 1) / block);
        k->decode_fp8(codes, scales, n, block, y);
        snprintf(out[count].name, sizeof out->name, "round, encode, decode FP8, %d in blocks of %d", n, block);
        out[count++].hash = hash_floats(hash, y, n);
        k->encode_fp4(x, n4, codes, scales);
        hash = hash_bytes(hash_bytes(HASH_START, codes, n4 / 2), scales, n4 / 32);
        k->decode_fp4(codes, scales, n4, y);
        snprintf(out[count].name, sizeof out->name, "encode, decode FP4, %d", n4);
        out[count++].hash = hash_floats(hash, y, n4);
    }
    return count;
}

static int vector_cases(const dspark__kernels *k, kernel_case *out) {
    static const int sizes[] = { 1, 7, 16, 33, 128, 301 };
    static float a[512], b[512], y[1024];
    static const char *const names[] = { "hadamard", "dot", "axpy", "rms_norm", "rms_norm without weight", "swiglu", "sigmoid",
                                         "tanh", "sqrt_softplus", "rope", "rope back" };
    int count = 0;
    for (int f = 0; f < (int)(sizeof names / sizeof *names); f++) {
        uint64_t hash = HASH_START;
        for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++) {
            int n = sizes[i], written = n;
            random_floats(a, 512, i == 5 ? 90.0f : 12.0f);
            random_floats(b, 512, 12);
            if (i == 4) a[5] = 0, a[6] = -INFINITY, a[7] = 1e-30f, a[8] = -100, a[9] = 1e-42f;
            memcpy(y, a, sizeof a);
            switch (f) {
            case 0: k->hadamard(y, written = 16 << i); break;
            case 1: y[0] = k->dot(a, b, n), written = 1; break;
            case 2: k->axpy(y, .37f, b, n); break;
            case 3: k->rms_norm(a, b, n, 1e-6f, y); break;
            case 4: k->rms_norm(y, NULL, n, 1e-6f, y); break;
            case 5: k->swiglu(y, b, n, 10, .7f, y); break;
            case 6: k->sigmoid(y, n); break;
            case 7: k->tanh(y, n); break;
            case 8: k->sqrt_softplus(y, n); break;
            case 9: k->rope(y, n / 2 * 2, b, 1); break;
            default: k->rope(y, n / 2 * 2, b, -1);
            }
            hash = hash_floats(hash, y, written);
        }
        snprintf(out[count].name, sizeof out->name, "%s", names[f]);
        out[count++].hash = hash;
    }
    return count;
}

/* Copies to one without y, and in place with it. */
static int mix_cases(const dspark__kernels *k, kernel_case *out) {
    static const int sizes[] = { 1, 7, 16, 33, 100 };
    static float x[800], w[64], post[8], y[100];
    for (int i = 0; i < 16; i++) {
        int C = i / 2 + 1, K = i % 2 ? C : 1;
        snprintf(out[i].name, sizeof out->name, "mix, %d copies to %d", C, K);
        out[i].hash = HASH_START;
        for (int j = 0; j < (int)(sizeof sizes / sizeof *sizes); j++) {
            random_floats(x, 800, 3), random_floats(w, 64, 1), random_floats(post, 8, 1), random_floats(y, 100, 2);
            k->mix(x, C, sizes[j], w, K, i % 2 ? y : NULL, i % 2 ? post : NULL, x);
            out[i].hash = hash_floats(out[i].hash, x, 800);
        }
    }
    return 16;
}

static int attention_cases(const dspark__kernels *k, kernel_case *out) {
    static const int shapes[][3] = { { 1, 1, 32 }, { 4, 100, 64 }, { 3, 17, 160 }, { 8, 137, 512 }, { 64, 33, 40 }, { 5, 9, 72 },
                                     { 7, 700, 96 }, { 2, 3, 7 }, { 6, 0, 16 } };
    int count = 0;
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++) {
        int H = shapes[i][0], n = shapes[i][1], d = shapes[i][2], stride = d + 3;
        float *q = (float *)room((size_t)(H * d) * 4), *o = (float *)room((size_t)(H * d) * 4), sink[64], w[64], out_pool[512];
        float *keys = (float *)room((size_t)(n * stride) * 4), *gates = (float *)room((size_t)(n * stride) * 4);
        float *scratch = (float *)room((size_t)(H * n + n) * 4);
        const float **rows = (const float **)room((size_t)(n + 1) * sizeof *rows);
        const float **gate = (const float **)room((size_t)(n + 1) * sizeof *gate);
        random_floats(q, H * d, 2);
        random_floats(keys, n * stride, 2);
        random_floats(gates, n * stride, 5);
        random_floats(sink, 64, 3);
        random_floats(w, 64, 1);
        for (int m = 0; m < n; m++) rows[m] = keys + m * stride, gate[m] = gates + (n - 1 - m) * stride;
        k->attend(q, H, d, rows, n, 1 / sqrtf((float)d), sink, scratch, o);
        snprintf(out[count].name, sizeof out->name, "attend, %d heads, %d keys of %d", H, n, d);
        out[count++].hash = hash_floats(HASH_START, o, H * d);
        if (n) {
            if (d % 32 == 0) {
                float *scores = (float *)room((size_t)n * 4);
                k->index_scores(q, w, H, d, keys, n, scores);
                snprintf(out[count].name, sizeof out->name, "index_scores, %d heads, %d keys of %d", H, n, d);
                out[count++].hash = hash_floats(HASH_START, scores, n);
                free(scores);
            }
            k->pool(rows, gate, rows, n, d, out_pool);
            snprintf(out[count].name, sizeof out->name, "pool, %d of %d", n, d);
            out[count++].hash = hash_floats(HASH_START, out_pool, d);
        }
        free(q), free(o), free(keys), free(gates), free(scratch), free((void *)rows), free((void *)gate);
    }
    for (int C = 1; C <= 6; C++) {
        float comb[36];
        random_floats(comb, C * C, 6);
        k->sinkhorn(comb, C, 20, 1e-6f);
        snprintf(out[count].name, sizeof out->name, "sinkhorn, %d by %d", C, C);
        out[count++].hash = hash_floats(HASH_START, comb, C * C);
    }
    return count;
}

#define MAX_KERNEL_CASES 512
// All of them, [MAX_KERNEL_CASES]; returns how many.
static int kernel_cases(const dspark__kernels *k, kernel_case *out) {
    int n;
    random_state = 1;
    n = linear_cases(k, out);
    n += rounding_cases(k, out + n);
    n += vector_cases(k, out + n);
    n += mix_cases(k, out + n);
    return n + attention_cases(k, out + n);
}
#endif
