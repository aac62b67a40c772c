// operations DIR THREADS [ROWS]: where the time of a pass goes. The backend's table is copied and each function timed;
// so are the kernels under it, on the first thread, but for those that are called for each key of a row: a clock would
// outweigh them. Medians, so that what else runs on the machine counts little.
#include "bench.h"

enum { PASS_BEGIN, MIX_IN, WINDOW, CSA, HCA, MOE, MIX_OUT, TAP, HEAD, N_OPERATIONS };
static const char *const names[N_OPERATIONS] = { "pass_begin", "mix_in", "attention (window)", "attention (CSA)",
                                                 "attention (HCA)", "moe", "mix_out", "tap", "head" };
enum { LINEAR, ATTEND, POOL, MIX, ROUND, NORM, SINKHORN, OTHER, N_KERNELS };
static const char *const kernel_names[N_KERNELS] = { "linear", "attend", "pool", "mix", "round", "norm", "sinkhorn", "other" };

static const dspark_backend *inner;
static dspark_model *model;
static dspark__kernels timed;
static const dspark__kernels *kernels;
static double in_kernel[N_KERNELS];
static samples times[N_OPERATIONS], shares[N_OPERATIONS][N_KERNELS];
static int calls[N_OPERATIONS], recording;

// ---- kernels, on the first thread only

static int first_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num() == 0;
#else
    return 1;
#endif
}
#define TIMED(kernel, call) do { \
        double t_ = first_thread() ? seconds() : 0; \
        call; \
        if (t_ > 0) in_kernel[kernel] += seconds() - t_; \
    } while (0)
#define TIMED_VALUE(kernel, call) float y; TIMED(kernel, y = call); return y
static void k_linear(const dspark__job *j, int b, int e, float *s) { TIMED(LINEAR, kernels->linear(j, b, e, s)); }
static void k_round(const float *x, int n, int b, float *y) { TIMED(ROUND, kernels->round_fp8(x, n, b, y)); }
static void k_mix(const float *x, int C, int n, const float *w, int K, const float *y, const float *post, float *out) {
    TIMED(MIX, kernels->mix(x, C, n, w, K, y, post, out));
}
static float k_dot(const float *a, const float *b, int n) { TIMED_VALUE(NORM, kernels->dot(a, b, n)); }
static void k_norm(const float *x, const float *w, int n, float e, float *y) { TIMED(NORM, kernels->rms_norm(x, w, n, e, y)); }
static void k_swiglu(const float *g, const float *u, int n, float l, float w, float *y) {
    TIMED(OTHER, kernels->swiglu(g, u, n, l, w, y));
}
static void k_sigmoid(float *x, int n) { TIMED(OTHER, kernels->sigmoid(x, n)); }
static void k_softplus(float *x, int n) { TIMED(OTHER, kernels->sqrt_softplus(x, n)); }
static void k_attend(const float *q, int H, int d, const float *const *rows, int n, float scale, const float *sink,
                     float *scratch, float *o) {
    TIMED(ATTEND, kernels->attend(q, H, d, rows, n, scale, sink, scratch, o));
}
static void k_pool(const float *const *kv, const float *const *gate, const float *const *ape, int n, int d, float *out) {
    TIMED(POOL, kernels->pool(kv, gate, ape, n, d, out));
}
static void k_sinkhorn(float *c, int C, int iters, float eps) { TIMED(SINKHORN, kernels->sinkhorn(c, C, iters, eps)); }

static dspark_status open_timed(void **device, const dspark_model *m, const dspark_model_desc *desc) {
    dspark_status status = inner->open(device, m, desc);
    dspark__cpu *d = (dspark__cpu *)*device;
    if (status) return status;
    kernels = d->k, timed = *kernels, d->k = &timed;
    timed.linear = k_linear, timed.round_fp8 = k_round, timed.mix = k_mix;
    timed.dot = k_dot, timed.rms_norm = k_norm, timed.swiglu = k_swiglu, timed.sigmoid = k_sigmoid;
    timed.sqrt_softplus = k_softplus, timed.attend = k_attend, timed.pool = k_pool;
    timed.sinkhorn = k_sinkhorn;
    return DSPARK_OK;
}

// ---- operations

static double op_start;
static void begin(void) { memset(in_kernel, 0, sizeof in_kernel), op_start = seconds(); }
static void end(int op) {
    double t = seconds() - op_start;
    if (!recording) return;
    sample(&times[op], 1e6 * t), calls[op]++;
    for (int k = 0; k < N_KERNELS; k++) sample(&shares[op][k], 1e6 * in_kernel[k]);
}
static dspark_status o_pass_begin(void *d, const dspark_pass *p) {
    dspark_status status;
    begin(), status = inner->pass_begin(d, p), end(PASS_BEGIN);
    return status;
}
static void o_mix_in(void *d, int l, int sub) { begin(), inner->mix_in(d, l, sub), end(MIX_IN); }
static void o_attention(void *d, int l) {
    int ratio = dspark_model_config(model)->compress_ratios[l];
    begin(), inner->attention(d, l), end(!ratio ? WINDOW : ratio == 4 ? CSA : HCA);
}
static void o_moe(void *d, int l) { begin(), inner->moe(d, l), end(MOE); }
static void o_mix_out(void *d, int l, int sub) { begin(), inner->mix_out(d, l, sub), end(MIX_OUT); }
static void o_tap(void *d, int i) { begin(), inner->tap(d, i), end(TAP); }
static void o_head(void *d) { begin(), inner->head(d), end(HEAD); }

static void report(samples *pass, int passes, int n_rows, int n_threads) {
    double sum = 0, of[N_KERNELS] = { 0 }, each[N_OPERATIONS], glue = 0;
    for (int op = 0; op < N_OPERATIONS; op++) sum += each[op] = calls[op] ? quantile(&times[op], .5) * calls[op] / passes : 0;
    printf("\n%d rows, %d threads: a pass takes %.0f us (quartiles %.0f, %.0f); its operations' medians sum to %.0f\n\n| operation | "
           "calls | us each | us a pass | share | ", n_rows, n_threads, quantile(pass, .5), quantile(pass, .25), quantile(pass, .75), sum);
    for (int k = 0; k < N_KERNELS; k++) printf("%s | ", kernel_names[k]);
    printf("glue and waiting |\n| --- |");
    for (int k = 0; k < N_KERNELS + 5; k++) printf(" ---: |");
    printf("\n");
    for (int op = 0; op < N_OPERATIONS; op++) {
        double rest = each[op];
        if (!calls[op]) continue;
        printf("| %s | %d | %.1f | %.0f | %.1f %% |", names[op], calls[op] / passes, quantile(&times[op], .5), each[op],
               100 * each[op] / sum);
        for (int k = 0; k < N_KERNELS; k++) {
            double t = quantile(&shares[op][k], .5) * calls[op] / passes;
            printf(" %.0f |", t);
            of[k] += t, rest -= t;
        }
        printf(" %.0f |\n", rest);
        glue += rest;
    }
    printf("| all | | | %.0f | |", sum);
    for (int k = 0; k < N_KERNELS; k++) printf(" %.0f |", of[k]);
    printf(" %.0f |\n", glue);
}

int main(int argc, char **argv) {
    enum { DEPTH = 256, PASSES = 120, MOST = 64 };
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int threads = argc > 2 ? atoi(argv[2]) : 1, rows = argc > 3 ? atoi(argv[3]) : 1;
    dspark_backend table = *(inner = dspark_cpu_backend());
    dspark_session_desc desc = plain_desc(DEPTH + MOST);
    int32_t ids[DEPTH], next[MOST];
    samples pass = { 0 };
    dspark_session *s;
    table.open = open_timed, table.pass_begin = o_pass_begin, table.mix_in = o_mix_in, table.attention = o_attention;
    table.moe = o_moe, table.mix_out = o_mix_out, table.tap = o_tap, table.head = o_head;
    model = model_open(dir, threads, &table);
    s = session_open(model, &desc);
    if (rows < 1 || rows > MOST) die("operations", "1 to 64 rows");
    noise(model, ids, DEPTH, 1);
    must(dspark_session_append(s, ids, DEPTH));
    for (int i = 0; i < PASSES + 3; i++) {
        dspark_pass_result out;
        double start;
        noise(model, next, rows, (uint64_t)i + 2);
        recording = i >= 3, start = seconds();
        must(dspark__run_alone(s, next, rows, DEPTH + i % 4, 0, 0, &out));      // every fourth completes a group
        if (recording) sample(&pass, 1e6 * (seconds() - start));
    }
    printf("%s, %s", model_name(dir), dspark_model_path_name(model));
    report(&pass, PASSES, rows, threads);
    dspark_session_close(s), dspark_model_close(model);
}
