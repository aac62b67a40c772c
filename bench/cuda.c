// cuda [DIR | synth] [key=value ...]: on a device, the time of passes and of the kernels in them, and the share of the
// floor: the bytes that must move, over the rate at which this device copies. synth: a checkpoint in memory (tools/synth.h), as
//     cuda synth flash n_routed_experts=110
// Lines of CSV as bench.h says, the device's own figures; what was not measured is not printed.
#define DSPARK_CUDA
#include "bench.h"
#undef SHARED
#include "../tools/synth.h"

int dspark_cuda_timing(int on);
const char *dspark_cuda_time(int i, double *us, long *calls);
double dspark_cuda_copy_rate(size_t n);

enum { CONTEXT = 4096, REPEATS = 15 };
static const char *name;

static double stored(const dspark_matrix *m) {
    double n = (double)m->rows * m->cols;
    if (!m->data) return 0;
    switch (m->dtype) {
    case DSPARK_F32: return 4 * n;
    case DSPARK_FP8: return n + n / 16384;
    case DSPARK_FP4: return n / 2 + n / 32;
    default: return 2 * n;
    }
}
static double stored_expert(const dspark_expert *e) { return stored(&e->w1) + stored(&e->w2) + stored(&e->w3); }

// Bytes of a layer that a pass of so many independent rows reads: all matrices, and of the experts those that rows may
// be expected to choose.
typedef struct { double linears, experts, stream; } floors;
static floors layer_floor(const dspark_config *c, const dspark_layer *l, int rows) {
    double E = c->n_routed_experts, distinct = E * (1 - pow(1 - c->num_experts_per_tok / E, rows));
    floors f = { 0, 0, 0 };
    const dspark_matrix *all[] = { &l->wq_a,
                                   &l->wq_b,
                                   &l->wkv,
                                   &l->wo_a,
                                   &l->wo_b,
                                   &l->compressor.wkv,
                                   &l->compressor.wgate,
                                   &l->index_wq_b,
                                   &l->index_weights,
                                   &l->index_compressor.wkv,
                                   &l->index_compressor.wgate,
                                   &l->gate,
                                   &l->shared.w1,
                                   &l->shared.w3 };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) f.linears += stored(all[i]);
    f.experts = distinct * stored_expert(&l->experts[0]) + stored(&l->shared.w2);
    f.stream = stored(&l->hc_attn.fn) + stored(&l->hc_ffn.fn);
    return f;
}
static floors pass_floor(const dspark_model *m, int rows, int drafts) {
    const dspark_config *c = dspark_model_config(m);
    const dspark_weights *w = dspark_model_weights(m);
    floors f = { stored(&w->head), 0, 0 };
    int first = drafts ? c->num_hidden_layers : 0, end = drafts ? first + c->n_stages : c->num_hidden_layers;
    for (int l = first; l < end; l++) {
        floors one = layer_floor(c, &w->layers[l], rows);
        f.linears += one.linears, f.experts += one.experts, f.stream += one.stream;
    }
    if (drafts) f.linears += stored(&w->main_proj) + c->dspark_block_size * stored(&w->markov_w2);
    return f;
}

static void print_pass(const char *what, samples *us, const floors *f, double rate) {
    char question[128];
    double floor_us = (f->linears + f->experts + f->stream) / (1e3 * rate);
    result(what, name, 1, us, "us");
    snprintf(question, sizeof question, "%s share of floor", what);
    result_one(question, name, 1, 100 * floor_us / quantile(us, .5), "%");
}

// A pass of `rows` rows at the session's end, or (0) a draft.
static void run(dspark_session *s, const int32_t *ids, int rows) {
    dspark_pass_result out;
    int32_t tokens[DSPARK_MAX_BLOCK];
    float confidence[DSPARK_MAX_BLOCK];
    if (rows) must(dspark__run_alone(s, ids, rows, s->n_run, 0, 0, &out));
    else must(dspark_session_draft(s, ids[0], tokens, confidence, NULL));
}

static void passes(dspark_session *s, const int32_t *ids, double rate) {
    static const int rows[] = { 1, 2, 3, 4, 6, 8, 16, 32, 64, 0 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        floors f = pass_floor(s->model, rows[i] ? rows[i] : dspark_model_config(s->model)->dspark_block_size, !rows[i]);
        samples us = { 0 };
        char what[64];
        if (!rows[i] && !dspark_model_config(s->model)->n_stages) continue;
        snprintf(what, sizeof what, rows[i] ? "cuda T_verify(%d)" : "cuda T_draft", rows[i]);
        for (int k = -3; k < REPEATS; k++) {
            double start = seconds();
            run(s, ids, rows[i]);
            if (k >= 0) sample(&us, 1e6 * (seconds() - start));
        }
        print_pass(what, &us, &f, rate);
        free(us.x);
    }
}

// Kernel by kernel, each launch alone: what they take is more than their share of a recorded pass.
static void kernels(dspark_session *s, const int32_t *ids, int rows, double rate) {
    floors f = pass_floor(s->model, rows, 0);
    const char *kernel;
    double us;
    long calls;
    dspark_cuda_timing(1);
    for (int k = 0; k < REPEATS; k++) run(s, ids, rows);
    for (int i = 0; (kernel = dspark_cuda_time(i, &us, &calls)) != NULL; i++) {
        char question[128];
        double bytes = strstr(kernel, "linears")   ? f.linears
                       : strstr(kernel, "experts") ? f.experts
                       : !strcmp(kernel, "stream") ? f.stream
                                                   : 0;
        snprintf(question, sizeof question, "cuda %d rows %s (%ld launches)", rows, kernel, calls / REPEATS);
        result_one(question, name, 1, us / REPEATS, "us");
        snprintf(question, sizeof question, "cuda %d rows %s share of floor", rows, kernel);
        if (bytes > 0) result_one(question, name, 1, 100 * bytes / (1e3 * rate) / (us / REPEATS), "%");
    }
    dspark_cuda_timing(0);
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int synth = !strcmp(dir, "synth"), n;
    dspark_model_desc desc;
    dspark_session_desc d;
    dspark_session *s;
    dspark_model *m;
    double rate = dspark_cuda_copy_rate((size_t)1 << 28), start;
    if (rate <= 0) die("cuda", "the device cannot be measured");
    memset(&desc, 0, sizeof desc);
    for (int i = 2; i < argc; i++) if (!synth_set(argv[i])) return 2;
    desc.backend = dspark_cuda_backend(), name = synth ? "synth" : model_name(dir);
    if (synth) desc.files.map = synth_map, desc.files.unmap = synth_unmap, dir = ".";
    must(dspark_model_open(&m, dir, &desc));
    result_one("cuda copy", name, 1, rate, "GB/s");
    n = dspark_model_config(m)->max_position_embeddings < CONTEXT + 64
            ? dspark_model_config(m)->max_position_embeddings - 64
            : CONTEXT;
    d = plain_desc(n + 64), s = session_open(m, &d);
    int32_t *ids = (int32_t *)need((size_t)n, sizeof *ids);
    noise(m, ids, n, 1);
    start = seconds();
    must(dspark_session_append(s, ids, n));
    result_one("cuda prefill", name, 1, n / (seconds() - start), "tokens/s");
    passes(s, ids, rate);
    kernels(s, ids, 1, rate), kernels(s, ids, 6, rate);
    dspark_session_close(s), dspark_model_close(m), free(ids);
    return 0;
}
