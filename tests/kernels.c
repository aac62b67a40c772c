/* The CPU kernels: every path of this machine gives plain C's bits, case by case; operations against
   another, exact implementation (golden/README.md, ops.safetensors) at its tolerances; a row's bits do not
   depend on its company; nothing is read past the end of a mapped file. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "kernels_cases.h"
#include "near.h"
#include "tap.h"
#include "tensors.h"

static void check_cases(const dspark__kernels *k, const kernel_case *expected, int n) {
    static kernel_case found[MAX_KERNEL_CASES];
    int same = 0, m = kernel_cases(k, found);
    for (int i = 0; i < n; i++) {
        if (found[i].hash == expected[i].hash) same++;
        else printf("# %s differs from plain C: %s\n", k->name, expected[i].name);
    }
    ok(m == n && same == n, "%s gives the bits of plain C in all %d cases", k->name, n);
}

/* A row alone, and among 1 to 26 others; an output alone, and among others. */
static void check_company(const dspark__kernels *k) {
    for (int kind = DSPARK_F32; kind <= DSPARK_FP4; kind++) {
        int differ = 0, cols = kind >= DSPARK_FP8 ? 128 : 91, n = 141;
        test_matrix m = random_matrix(kind, n, cols, 1);
        test_rows all = random_rows(27, cols, n);
        if (kind >= DSPARK_FP8) change_inputs(k, ROUNDED_INPUTS, kind, &m, &all, cols);
        run_linear(k, &m.m, &all, 0, 0, n);
        for (int count = 1; count < 27; count++) {
            test_rows some = all;
            some.n_rows = count;
            some.y_memory = (float *)room((size_t)(count * n) * sizeof(float));
            for (int r = 0; r < count; r++) some.x[r] = all.x[26 - r], some.y[r] = some.y_memory + r * n;
            run_linear(k, &m.m, &some, 0, 0, n);
            for (int i = 0; i < n && count == 3; i++) {
                memset(&some.y[1][i], 0, sizeof(float));
                run_linear(k, &m.m, &some, 0, i, i + 1);
            }
            for (int r = 0; r < count; r++) differ += memcmp(some.y[r], all.y[26 - r], (size_t)n * sizeof(float)) != 0;
            free(some.y_memory);
        }
        ok(!differ, "%s, %s: a row's bits are the same alone and among 1 to 26 others", k->name, kind_name(kind));
        free_matrix(m);
        free_rows(all);
    }
}

/* Weights and scales that end where memory ends. */
static void check_end(const dspark__kernels *k) {
    static const int shapes[][2] = { { 1, 1 }, { 3, 17 }, { 5, 64 }, { 2, 200 }, { 4, 1024 } };
    size_t page = (size_t)sysconf(_SC_PAGESIZE), sum = 0;
    int zero = open("/dev/zero", O_RDONLY);
    char *w = (char *)mmap(NULL, 5 * page, PROT_READ, MAP_PRIVATE, zero, 0);
    char *s = (char *)mmap(NULL, 5 * page, PROT_READ, MAP_PRIVATE, zero, 0);
    close(zero);
    if (w == MAP_FAILED || s == MAP_FAILED || mprotect(w + 4 * page, page, PROT_NONE) || mprotect(s + 4 * page, page, PROT_NONE)) {
        skip("no mprotect", "nothing is read past the end of a file");
        return;
    }
    for (int kind = DSPARK_F32; kind <= DSPARK_FP4; kind++)
        for (int i = 0; i < 5; i++) {
            int rows = shapes[i][0], cols = kind == DSPARK_FP4 ? (shapes[i][1] + 31) / 32 * 32 : shapes[i][1];
            size_t bytes = (size_t)rows * kind_row_bytes(kind, cols);
            size_t scales = (size_t)(kind == DSPARK_FP4 ? rows * (cols / 32) : (cols + 127) / 128);
            dspark_matrix m;
            m.data = w + 4 * page - bytes, m.scale = (uint8_t *)(s + 4 * page - scales);
            m.rows = rows, m.cols = cols, m.dtype = kind;
            if (bytes > 4 * page) continue;
            for (int n = 1; n <= 9; n += 4) {
                test_rows t = random_rows(n, cols, rows);
                run_linear(k, &m, &t, 0, 0, rows);
                sum += t.y[0][0] == 0;
                free_rows(t);
            }
        }
    ok(sum > 0, "%s: nothing is read past the end of a file", k->name);
    munmap(w, 5 * page);
    munmap(s, 5 * page);
}

/* ---- against ops.safetensors */

typedef struct { float *x; int n, rows, cols; } array;      // cols: the last dimension

static array get(const tensors *t, const char *group, const char *field) {
    char name[64];
    array a = { NULL, 1, 1, 1 };
    int64_t shape[4] = { 1, 1, 1, 1 };
    int dims = 0;
    snprintf(name, sizeof name, "%s.%s", group, field);
    a.x = (float *)tensors_get(t, name, &dims, shape, NULL);
    if (!a.x) {
        printf("Bail out! ops.safetensors has no %s\n", name);
        exit(1);
    }
    for (int i = 0; i < dims; i++) a.n *= (int)shape[i];
    if (dims) a.cols = (int)shape[dims - 1];
    a.rows = a.n / (a.cols ? a.cols : 1);
    return a;
}

static int count_different(const float *a, const float *b, int n) {     // as values: -0 is 0
    int different = 0;
    for (int i = 0; i < n; i++) different += !(a[i] == b[i]);
    return different;
}
static double worst_relative(const float *a, const float *b, int n) {
    double worst = 0;
    for (int i = 0; i < n; i++)
        worst = worse(worst, fabs((double)a[i] - b[i]) / (b[i] != 0 ? fabs((double)b[i]) : 1));
    return worst;
}

/* In a block with the format's largest number the scale is 1. Larger inputs, which cannot occur, are skipped. */
static void check_formats(const dspark__kernels *k, const tensors *t) {
    array in = get(t, "e4m3", "input"), out = get(t, "e4m3", "output");
    int wrong = 0;
    for (int i = 0; i < in.n; i++) {
        float x[2] = { in.x[i], 448 }, y[2], z[2];
        uint8_t codes[2], scale;
        if (fabsf(x[0]) > 448) continue;
        k->round_fp8(x, 2, 2, y);
        k->encode_fp8(x, 2, 2, codes, &scale);
        k->decode_fp8(codes, &scale, 2, 2, z);
        wrong += y[0] != out.x[i] || z[0] != out.x[i] || scale != 127;
    }
    ok(!wrong, "%s: E4M3 rounds every value, tie and neighbour exactly", k->name);
    free(in.x), free(out.x);
    in = get(t, "e2m1", "input"), out = get(t, "e2m1", "output"), wrong = 0;
    for (int i = 0; i < in.n; i++) {
        float x[32] = { in.x[i], 6 }, y[32];
        uint8_t codes[16], scale;
        if (fabsf(x[0]) > 6) continue;
        k->encode_fp4(x, 32, codes, &scale);
        k->decode_fp4(codes, &scale, 32, y);
        wrong += y[0] != out.x[i] || y[1] != 6 || scale != 127;
    }
    ok(!wrong, "%s: E2M1 rounds every value, tie and neighbour exactly", k->name);
    free(in.x), free(out.x);
}

static void check_rounding(const dspark__kernels *k, const tensors *t, const char *group, int block) {
    array in = get(t, group, "input"), out = get(t, group, "output");
    float *y = (float *)room((size_t)in.n * 4), *z = (float *)room((size_t)in.n * 4);
    uint8_t codes[512], scales[8];
    for (int r = 0; r < in.rows; r++) {
        k->round_fp8(in.x + r * in.cols, in.cols, block, y + r * in.cols);
        k->encode_fp8(in.x + r * in.cols, in.cols, block, codes, scales);
        k->decode_fp8(codes, scales, in.cols, block, z + r * in.cols);
    }
    ok(!count_different(y, out.x, in.n), "%s: %s exact", k->name, group);
    ok(!count_different(z, out.x, in.n), "%s: %s exact through codes", k->name, group);
    free(in.x), free(out.x), free(y), free(z);
}

/* The dequantized matrix is what it makes of the unit vectors. */
static void check_linear(const dspark__kernels *k, const tensors *t, const char *group, int kind) {
    array w = get(t, group, "weight"), scale = get(t, group, "scale"), plain = get(t, group, "dequantized");
    array in = get(t, group, "input"), out = get(t, group, "output");
    int N = plain.rows, K = plain.cols, wrong = 0;
    dspark_matrix m;
    test_rows rows = random_rows(in.rows, K, N);
    m.data = w.x, m.scale = (uint8_t *)scale.x, m.rows = N, m.cols = K, m.dtype = kind;
    for (int c = 0; c < K; c += in.rows) {
        for (int r = 0; r < in.rows; r++) {
            memset(rows.x_memory + r * rows.stride, 0, (size_t)K * sizeof(float));
            if (c + r < K) rows.x_memory[r * rows.stride + c + r] = 1;
        }
        run_linear(k, &m, &rows, 0, 0, N);
        for (int r = 0; r < in.rows && c + r < K; r++)
            for (int i = 0; i < N; i++) wrong += rows.y[r][i] != plain.x[i * K + c + r];
    }
    ok(!wrong, "%s: %s dequantized exactly", k->name, group);
    for (int r = 0; r < in.rows; r++) k->round_fp8(in.x + r * K, K, 128, rows.x_memory + r * rows.stride);
    run_linear(k, &m, &rows, 0, 0, N);
    ok(relative_l2(rows.y_memory, out.x, (size_t)out.n) < 1e-6, "%s: %s within 1e-6", k->name, group);
    free(w.x), free(scale.x), free(plain.x), free(in.x), free(out.x);
    free_rows(rows);
}

static void check_hadamard(const dspark__kernels *k, const tensors *t, const char *group) {
    array in = get(t, group, "input"), middle = get(t, group, "hadamard"), out = get(t, group, "output");
    uint8_t codes[64], scales[4];
    float *y = (float *)room((size_t)in.n * 4);
    for (int r = 0; r < in.rows; r++) k->hadamard(in.x + r * in.cols, in.cols);
    ok(relative_l2(in.x, middle.x, (size_t)in.n) < 1e-6, "%s: %s within 1e-6 before rounding", k->name, group);
    for (int r = 0; r < in.rows; r++) {
        k->encode_fp4(in.x + r * in.cols, in.cols, codes, scales);
        k->decode_fp4(codes, scales, in.cols, y + r * in.cols);
    }
    ok(!count_different(y, out.x, in.n), "%s: %s exact after rounding", k->name, group);
    free(in.x), free(middle.x), free(out.x), free(y);
}

static void check_sinkhorn(const dspark__kernels *k, const tensors *t, const char *field, int iters, float eps) {
    array in = get(t, "sinkhorn", "input"), out = get(t, "sinkhorn", field);
    double worst = 0;
    for (int i = 0; i < in.n; i += 16) k->sinkhorn(in.x + i, 4, iters, eps);
    for (int i = 0; i < in.n; i++) worst = worse(worst, fabs((double)in.x[i] - out.x[i]));
    ok(worst < 1e-6, "%s: Sinkhorn, %d iterations, within 1e-6", k->name, iters);
    free(in.x), free(out.x);
}

static void check_route(const dspark__kernels *k, const tensors *t) {
    array logits = get(t, "route", "logits"), bias = get(t, "route", "bias"), chosen = get(t, "route", "chosen");
    array weight = get(t, "route", "weight"), hash = get(t, "route", "hash_chosen"), hash_weight = get(t, "route", "hash_weight");
    int E = logits.cols, K = chosen.cols, wrong = 0;
    double worst = 0;
    k->sqrt_softplus(logits.x, logits.n);
    for (int r = 0; r < logits.rows; r++) {
        const float *s = logits.x + r * E;
        double sum = 0, hash_sum = 0;
        for (int i = 0; i < K; i++) {
            int e = ((int32_t *)(void *)chosen.x)[r * K + i], rank = 0;
            for (int j = 0; j < E; j++) rank += s[j] + bias.x[j] > s[e] + bias.x[e];
            wrong += rank >= K;
            sum += s[e], hash_sum += s[((int32_t *)(void *)hash.x)[r * K + i]];
        }
        for (int i = 0; i < K; i++) {
            int at = r * K + i;
            double a = 1.5 * s[((int32_t *)(void *)chosen.x)[at]] / sum, b = 1.5 * s[((int32_t *)(void *)hash.x)[at]] / hash_sum;
            worst = worse(worse(worst, fabs(a / weight.x[at] - 1)), fabs(b / hash_weight.x[at] - 1));
        }
    }
    ok(!wrong && worst < 1e-6, "%s: routing weights from sqrt(softplus) within 1e-6", k->name);
    free(logits.x), free(bias.x), free(chosen.x), free(weight.x), free(hash.x), free(hash_weight.x);
}

static void check_swiglu(const dspark__kernels *k, const tensors *t) {
    array gate = get(t, "swiglu", "gate"), up = get(t, "swiglu", "up"), out = get(t, "swiglu", "output");
    k->swiglu(gate.x, up.x, gate.n, 10, 1, gate.x);
    ok(worst_relative(gate.x, out.x, out.n) < 1e-6, "%s: swiglu within 1e-6", k->name);
    free(gate.x), free(up.x), free(out.x);
}

static const dspark_config rope_64 = {
    .qk_rope_head_dim = 64, .rope_theta = 10000, .compress_rope_theta = 160000, .rope_factor = 16,
    .rope_original_length = 65536, .rope_beta_fast = 32, .rope_beta_slow = 1
};
static const dspark_config rope_32 = {
    .qk_rope_head_dim = 32, .rope_theta = 20000, .compress_rope_theta = 40000, .rope_factor = 8,
    .rope_original_length = 64, .rope_beta_fast = 4, .rope_beta_slow = 1
};

static void check_freqs(const tensors *t, const char *field, const dspark_config *c, int compressed) {
    array expected = get(t, "rope", field);
    double freqs[32], worst = 0;
    dspark__rope_freqs(c, compressed, freqs);
    for (int i = 0; i < expected.n; i++) worst = worse(worst, fabs(freqs[i] / expected.x[i] - 1));
    ok(expected.n == c->qk_rope_head_dim / 2 && worst < 1e-6, "rope.%s: radians a position within 1e-6", field);
    free(expected.x);
}

/* A row's last 64 dims, up to position 70000. */
static void check_rope(const dspark__kernels *k, const tensors *t, const char *field, float direction) {
    array in = get(t, "rope", "input"), at = get(t, "rope", "positions"), out = get(t, "rope", field);
    double freqs[32], worst = 0;
    float turn[64];
    dspark__rope_freqs(&rope_64, 1, freqs);
    for (int r = 0; r < in.rows; r++) {
        dspark__rope_angles(freqs, 32, ((int32_t *)(void *)at.x)[r], turn);
        k->rope(in.x + (r + 1) * in.cols - 64, 64, turn, direction);
    }
    for (int i = 0; i < in.n; i++) worst = worse(worst, fabs((double)in.x[i] - out.x[i]));
    ok(worst < 1e-5, "%s: rope.%s within 1e-5 (%.1e)", k->name, field, worst);
    free(in.x), free(at.x), free(out.x);
}

static void check_ops(const dspark__kernels *k, const tensors *t) {
    check_formats(k, t);
    check_rounding(k, t, "fp8_round", 128);
    check_rounding(k, t, "fp8_round64", 64);
    check_linear(k, t, "fp8_linear", DSPARK_FP8);
    check_linear(k, t, "fp4_linear", DSPARK_FP4);
    check_hadamard(k, t, "hadamard_fp4");
    check_hadamard(k, t, "hadamard_fp4_64");
    check_sinkhorn(k, t, "output", 20, 1e-6f);
    check_sinkhorn(k, t, "output_5", 5, 1e-5f);
    check_route(k, t);
    check_swiglu(k, t);
    check_rope(k, t, "output", 1);
    check_rope(k, t, "inverse", -1);
}

/* ---- against libm in double, and at the extremes */

static double exact_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double exact_tanh(double x) { return tanh(x); }
static double exact_sqrt_softplus(double x) { return sqrt(x > 0 ? x + log1p(exp(-x)) : log1p(exp(x))); }

static void check_function(const dspark__kernels *k, const char *name, void (*f)(float *, int), double (*exact)(double)) {
    static const float extremes[] = { INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f, -1e-40f, 0, -200, 200, -88.5f, 88.5f };
    enum { N = 20000, E = sizeof extremes / sizeof *extremes };
    static float x[N + E], y[N + E];
    double worst = 0;
    int nan = 0;
    for (int i = 0; i < N; i++) x[i] = random_float() * (i & 1 ? 80.0f : 4.0f) * (i % 5 ? 1 : 1e-3f);
    memcpy(x + N, extremes, sizeof extremes);
    memcpy(y, x, sizeof x);
    f(y, N + E);
    for (int i = 0; i < N; i++) worst = worse(worst, fabs((double)y[i] / exact(x[i]) - 1));
    for (int i = N; i < N + E; i++) nan += y[i] != y[i];
    printf("# %s: %s within %.1e\n", k->name, name, worst);
    ok(worst < 3e-7 && !nan, "%s: %s within 3e-7, and no NaN at the extremes", k->name, name);
}

/* Copies mixed in place, and to one without y: each number is one chain of fused multiply-adds. */
static void check_mix(const dspark__kernels *k) {
    enum { MOST = 8, WIDE = 100 };
    static const int sizes[] = { 1, 7, 16, 33, WIDE };
    static float x[MOST * WIDE], in[MOST * WIDE], w[MOST * MOST], post[MOST], y[WIDE];
    int wrong = 0;
    for (int i = 0; i < 5 * 2 * MOST; i++) {
        int n = sizes[i % 5], C = i / 10 + 1, K = i / 5 % 2 ? 1 : C;
        random_floats(x, MOST * WIDE, 3), random_floats(w, MOST * MOST, 1);
        random_floats(post, MOST, 1), random_floats(y, WIDE, 2);
        memcpy(in, x, sizeof x);
        k->mix(x, C, n, w, K, K > 1 ? y : NULL, K > 1 ? post : NULL, x);
        for (int o = 0; o < K * n; o++) {
            float v = K > 1 ? fmaf(post[o / n], y[o % n], 0) : 0;
            for (int j = 0; j < C; j++) v = fmaf(w[j * K + o / n], in[j * n + o % n], v);
            wrong += v != x[o];
        }
        wrong += memcmp(x + K * n, in + K * n, (size_t)(MOST * WIDE - K * n) * sizeof *x) != 0;
    }
    ok(!wrong, "%s: mix of one to eight copies, in place and to one, to the bit", k->name);
}

/* softmax with a sink in double */
static void check_attend(const dspark__kernels *k) {
    enum { H = 7, D = 96, N = 133 };
    static float q[H * D], keys[N * D], sink[H], scratch[H * N + N], o[H * D];
    const float *rows[N];
    double worst = 0;
    random_floats(q, H * D, 1);
    random_floats(keys, N * D, 2);
    random_floats(sink, H, 2);
    for (int j = 0; j < N; j++) rows[j] = keys + j * D;
    sink[3] = -INFINITY, sink[4] = 60;
    k->attend(q, H, D, rows, N, .3f, sink, scratch, o);
    for (int h = 0; h < H; h++) {
        double e[N], all = exp(sink[h]);
        for (int j = 0; j < N; j++) {
            double s = 0;
            for (int i = 0; i < D; i++) s += (double)q[h * D + i] * keys[j * D + i];
            all += e[j] = exp(.3f * s);
        }
        for (int i = 0; i < D; i++) {
            double s = 0;
            for (int j = 0; j < N; j++) s += e[j] / all * keys[j * D + i];
            worst = worse(worst, fabs(s - o[h * D + i]));
        }
    }
    ok(worst < 3e-6, "%s: attention with sinks within 3e-6 (%.1e)", k->name, worst);
}

static void check_float_mode(void) {
#ifdef DSPARK__X86
    unsigned before = _mm_getcsr();
    volatile float tiny = 1e-20f;
    uint64_t old;
    _mm_setcsr(before | 0xe040);        // FTZ, DAZ, toward zero
    old = dspark__float_mode_set();
    volatile float inside = tiny * tiny, third = 1.0f / (tiny / tiny * 3.0f);
    dspark__float_mode_restore(old);
    volatile float outside = tiny * tiny;
    _mm_setcsr(before);
    ok(inside > 0 && third == 1.0f / 3, "inside a pass subnormals are kept, and rounding is to nearest");
    ok(outside == 0, "the caller's mode is given back");
#else
    skip("x86 only", "inside a pass subnormals are kept, and the caller's floating-point mode is restored");
#endif
}

/* Plain C's fused multiply-add against libm's: any bits, subnormal results, sums that all but cancel, and sums so close
   to the middle of two floats that a double has the middle itself. */
static void check_fma(void) {
    int same = 1;
    for (int i = 0; i < 3000000; i++) {
        uint32_t u[3] = { random_bits(), random_bits(), random_bits() };
        float x[3], expected, got, product;
        if (i % 4 == 1) u[0] &= 0x81ffffff, u[1] = (u[1] & 0x80ffffff) | 0x3f000000, u[2] &= 0x80ffffff;
        memcpy(x, u, sizeof x);
        product = -x[0] * x[1];
        if (i % 4 == 2) x[2] = product * (1 + (float)((int)(u[2] >> 29) - 4) * FLT_EPSILON);
        if (i % 4 == 3) {
            float less = (float)(u[0] % 1000) * FLT_EPSILON;
            x[0] = 1 + less, x[1] = u[1] & 1 ? less - 1 : 1 - less, x[2] = (float)(u[2] | 1u << 31 | 1u << 30);
            x[2] = (u[1] & 2 ? 1 : -1) * ldexpf(x[2], 24 - 31);
        }
        expected = fmaf(x[0], x[1], x[2]), got = dspark__fmaf(x[0], x[1], x[2]);
        same &= !memcmp(&expected, &got, sizeof got) || (isnan(expected) && isnan(got));
    }
    ok(same, "a fused multiply-add is rounded once");
}

/* Whether the system's flags of the processor have all of these words. */
static int has_all(const char *flags, const char *words) {
    char word[32];
    for (int n; sscanf(words, "%29s%n", word + 1, &n) == 1; words += n) {
        word[0] = ' ', strcat(word, " ");
        if (!strstr(flags, word)) return 0;
    }
    return 1;
}

static void check_paths(void) {
    static const char *const claim = "the paths offered are those that the system says the processor has";
#ifdef DSPARK__X86
    static const struct { int path; const char *needs; } x86[] = {
        { DSPARK_PATH_AVX2, "avx2 fma f16c" },
        { DSPARK_PATH_AVX512, "avx2 fma f16c avx512f avx512bw avx512vl avx512dq" },
        { DSPARK_PATH_AVX512_BF16, "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_bf16" } };
    static char flags[8192];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(flags, sizeof flags, f) && strncmp(flags, "flags", 5)) continue;
    if (f) fclose(f);
    char *end = strchr(flags, '\n');
    int agree = 1;
    if (!end || strncmp(flags, "flags", 5)) {
        skip("no flags in /proc/cpuinfo", claim);
        return;
    }
    *end = ' ';
    for (size_t i = 0; i < sizeof x86 / sizeof *x86; i++)
        agree &= has_all(flags, x86[i].needs) == (dspark__kernels_choose(x86[i].path) != NULL);
    ok(agree, "%s", claim);
#else
    (void)has_all;
    skip("x86-64 only", claim);
#endif
}

int main(void) {
    static kernel_case plain[MAX_KERNEL_CASES];
    const dspark__kernels *best = dspark__kernels_choose(DSPARK_PATH_BEST);
    int n = kernel_cases(dspark__kernels_choose(DSPARK_PATH_PLAIN), plain);
    tensors t;
    printf("# best here: %s\n", best->name);
    if (!ok(tensors_open(&t, "tests/golden/ops.safetensors"), "ops.safetensors can be read")) return tap_done();
    check_freqs(&t, "freqs", &rope_64, 0), check_freqs(&t, "freqs_yarn", &rope_64, 1);
    check_freqs(&t, "freqs_b", &rope_32, 0), check_freqs(&t, "freqs_yarn_b", &rope_32, 1);
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++) {
        static const char *const names[] = { "", "plain C runs", "AVX2 gives the bits of plain C",
            "AVX-512 gives the bits of plain C", "NEON gives the bits of plain C",
            "AVX-512 BF16 gives the bits of plain C" };
        const dspark__kernels *k = dspark__kernels_choose(path);
        if (!k) {
            skip("not on this machine", names[path]);
            continue;
        }
        if (path != DSPARK_PATH_PLAIN) check_cases(k, plain, n);
        check_company(k);
        check_end(k);
        check_ops(k, &t);
        check_function(k, "sigmoid", k->sigmoid, exact_sigmoid);
        check_function(k, "tanh", k->tanh, exact_tanh);
        check_function(k, "sqrt_softplus", k->sqrt_softplus, exact_sqrt_softplus);
        check_mix(k);
        check_attend(k);
    }
    check_fma();
    check_paths();
    check_float_mode();
    tensors_close(&t);
    return tap_done();
}
