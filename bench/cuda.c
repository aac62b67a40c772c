// cuda [DIR | synth] [key=value ...] [fast]: on a device, the time of passes and of the kernels in them, and the share
// of the floor: the bytes that must move, over the rate at which this device copies. synth: a checkpoint in memory, as
//     cuda synth flash n_routed_experts=110
// fast: fast_prefill, in passes of 2,048 rows. cuBLASLt's kernels count with those before them, `codes` and by_rows.
// Prints CSV as bench.h says, with the device's own figures; what was not measured is left out.
#define DSPARK_CUDA
#include "bench.h"
#undef SHARED
#include "../tools/synth.h"

void dspark_cuda_trace(int on);
const char *dspark_cuda_traced(int i, double *us);
double dspark_cuda_copy_rate(size_t n);

enum { CONTEXT = 4096, REPEATS = 15, MOST_ROWS = 64 };
static int prompt = 512;        // rows of a pass of a prompt
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

// Bytes that the launches of one name read in a pass of `rows` independent rows: all matrices, and as many experts as
// rows are expected to choose. Names are dspark_cuda.cu's. A mix's matrix counts with the product before it.
enum { WQ_A, WQ_B, WO_A, WO_B, GATE, UP, DOWN, HEAD, PROJ, W2, N_READS };
static const char *const reads[N_READS] = { "linears wq_a wkv", "linears wq_b", "linears wo_a",
                                            "linears wo_b", "linears gate w1 w3", "experts w1 w3", "experts w2",
                                            "linears head", "linears main_proj", "linears markov_w2" };
typedef struct { double bytes[N_READS]; } floors;
static void layer_floor(floors *f, const dspark_config *c, const dspark_layer *l, int rows) {
    double E = c->n_routed_experts, distinct = E * (1 - pow(1 - c->num_experts_per_tok / E, rows)), *b = f->bytes;
    const dspark_expert *e = &l->experts[0];
    b[WQ_A] += stored(&l->wq_a) + stored(&l->wkv) + stored(&l->compressor.wkv) + stored(&l->compressor.wgate) +
               stored(&l->index_compressor.wkv) + stored(&l->index_compressor.wgate) + stored(&l->index_weights);
    b[WQ_B] += stored(&l->wq_b) + stored(&l->index_wq_b);
    b[WO_A] += stored(&l->wo_a), b[WO_B] += stored(&l->wo_b) + stored(&l->hc_ffn.fn);
    b[GATE] += stored(&l->gate) + stored(&l->shared.w1) + stored(&l->shared.w3);
    b[UP] += distinct * (stored(&e->w1) + stored(&e->w3));
    b[DOWN] += distinct * stored(&e->w2) + stored(&l->shared.w2) + stored(&l->hc_attn.fn);
}
static floors pass_floor(const dspark_model *m, int rows, int drafts) {
    const dspark_config *c = dspark_model_config(m);
    const dspark_weights *w = dspark_model_weights(m);
    floors f = { { 0 } };
    int first = drafts ? c->num_hidden_layers : 0, end = drafts ? first + c->n_stages : c->num_hidden_layers;
    f.bytes[HEAD] = stored(&w->head);
    for (int l = first; l < end; l++) layer_floor(&f, c, &w->layers[l], rows);
    if (drafts) f.bytes[PROJ] = stored(&w->main_proj), f.bytes[W2] = c->dspark_block_size * stored(&w->markov_w2);
    return f;
}
static double all_of(const floors *f) {
    double sum = 0;
    for (int i = 0; i < N_READS; i++) sum += f->bytes[i];
    return sum;
}

static void print_pass(const char *what, samples *us, const floors *f, double rate) {
    char question[128];
    double floor_us = all_of(f) / (1e3 * rate);
    result(what, name, 1, us, "us");
    snprintf(question, sizeof question, "%s share of floor", what);
    result_one(question, name, 1, 100 * floor_us / quantile(us, .5), "%");
}

// A pass of `rows` rows at the session's end (a prompt's: the last has logits); or (0) a cycle of a session that
// drafts: a draft, and the pass that verifies it all.
static void run(dspark_session *s, const int32_t *ids, int rows) {
    dspark_pass_result out;
    dspark_step_result r;
    if (rows) must(dspark__run_alone(s, ids, rows, s->n_run, 0, rows == prompt ? rows - 1 : 0, &out));
    else must(dspark_step(&s, 1, NULL, &r)), must(r.status);
}

static void time_passes(samples *us, dspark_session *s, const int32_t *ids, int rows, int repeats) {
    memset(us, 0, sizeof *us);
    for (int k = -3; k < repeats; k++) {
        double start = seconds();
        run(s, ids, rows);
        if (k >= 0) sample(us, 1e6 * (seconds() - start));
    }
}
// median[n]: of a pass of n rows
static void passes(dspark_session *s, const int32_t *ids, double rate, double *median) {
    static const int rows[] = { 1, 2, 3, 4, 6, 8, 16, 32, 64 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        floors f = pass_floor(s->model, rows[i], 0);
        samples us;
        char what[64];
        snprintf(what, sizeof what, "cuda T_verify(%d)", rows[i]);
        time_passes(&us, s, ids, rows[i], REPEATS);
        print_pass(what, &us, &f, rate);
        median[rows[i]] = quantile(&us, .5);
        free(us.x);
    }
}

// Time and count of the kernels of each name in a pass of `rows` rows, or (0) in a cycle. A prompt's pass is not bound
// by bytes, and two repeats are enough. Returned: microseconds of all, of what a cycle does before the pass that
// verifies, and of the sequential head, all draws included.
enum { MAX_KERNELS = 64 };
typedef struct { const char *name; double us; int n; } share;
typedef struct { double all, draft, head; } totals;
static totals kernels(dspark_session *s, const int32_t *ids, int rows, double rate) {
    floors f = pass_floor(s->model, rows, 0);
    share found[MAX_KERNELS];
    totals sum = { 0, 0, 0 };
    const char *kernel;
    double us;
    int n = 0, k, repeats = rows == prompt ? 2 : REPEATS;
    dspark_cuda_trace(1), run(s, ids, rows);
    for (int pass = 0; pass < repeats; pass++) {
        dspark_cuda_trace(1), run(s, ids, rows);
        for (int i = 0, played = 0; (kernel = dspark_cuda_traced(i, &us)) != NULL; i++) {
            if (!strcmp(kernel, "between")) {
                played++;
                continue;
            }
            if (!played) sum.draft += us / repeats;
            for (k = 0; k < n && strcmp(found[k].name, kernel); k++) {}
            if (k == MAX_KERNELS) continue;
            if (k == n) found[n].name = kernel, found[n].us = found[n].n = 0, n++;
            found[k].us += us / repeats, found[k].n++;
        }
    }
    dspark_cuda_trace(0);
    for (k = 0; k < n; k++) {
        char question[128], of[32];
        double bytes = 0;
        for (int i = 0; i < N_READS; i++) if (!strcmp(found[k].name, reads[i])) bytes = f.bytes[i];
        snprintf(of, sizeof of, rows ? "%d rows" : "cycle", rows);
        snprintf(question, sizeof question, "cuda %s %s (%d launches)", of, found[k].name, found[k].n / repeats);
        result_one(question, name, 1, found[k].us, "us");
        snprintf(question, sizeof question, "cuda %s %s share of floor", of, found[k].name);
        if (bytes > 0 && rows && rows != prompt)
            result_one(question, name, 1, 100 * bytes / (1e3 * rate) / found[k].us, "%");
        sum.all += found[k].us;
        if (strstr(found[k].name, "markov") || strstr(found[k].name, "draw")) sum.head += found[k].us;
    }
    return sum;
}

// Cycles at the passes' context. Host time: what the kernels do not account for.
static void cycle(dspark_model *m, const int32_t *ids, int n, double rate) {
    dspark_session_desc d = plain_desc(n + prompt);
    dspark_session *s;
    totals all;
    samples us;
    double median;
    floors f = pass_floor(m, dspark_model_config(m)->dspark_block_size, 1);
    d.policy.plain = 0, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, s = session_open(m, &d);
    must(dspark_session_append(s, ids, n));
    time_passes(&us, s, ids, 0, REPEATS);
    result("cuda T_cycle", name, 1, &us, "us");
    median = quantile(&us, .5), all = kernels(s, ids, 0, rate);
    result_one("cuda draft", name, 1, all.draft, "us");
    result_one("cuda draft share of floor", name, 1, 100 * all_of(&f) / (1e3 * rate) / all.draft, "%");
    result_one("cuda draft over verification", name, 1, 100 * all.draft / (all.all - all.draft), "%");
    result_one("cuda the sequential head's share of a cycle", name, 1, 100 * all.head / median, "%");
    result_one("cuda host time's share of a cycle", name, 1, 100 * (median - all.all) / median, "%");
    dspark_session_close(s), free(us.x);
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int synth = !strcmp(dir, "synth"), n;
    dspark_model_desc desc;
    dspark_session_desc d;
    dspark_session *s;
    dspark_model *m;
    double rate = dspark_cuda_copy_rate((size_t)1 << 28), start, median[MOST_ROWS + 1] = { 0 };
    if (rate <= 0) die("cuda", "the device cannot be measured");
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = prompt;
    for (int i = 2; i < argc; i++)
        if (!strcmp(argv[i], "fast")) desc.fast_prefill = 1, desc.max_rows = prompt = 2048;
        else if (!synth_set(argv[i])) return 2;
    name = synth ? "synth" : model_name(dir);
    if (synth) desc.files.map = synth_map, desc.files.unmap = synth_unmap, dir = ".";
    must(dspark_model_open(&m, dir, &desc));
    result_one("cuda copy", name, 1, rate, "GB/s");
    n = dspark_model_config(m)->max_position_embeddings - prompt, n = n < CONTEXT ? n : CONTEXT;
    d = plain_desc(n + prompt), s = session_open(m, &d);
    int32_t *ids = (int32_t *)need((size_t)n, sizeof *ids);
    noise(m, ids, n, 1);
    start = seconds();
    must(dspark_session_append(s, ids, n));
    result_one("cuda prefill", name, 1, n / (seconds() - start), "tokens/s");
    passes(s, ids, rate, median);
    result_one("cuda verification of 6 over 1 row", name, 1, median[6] / median[1], "x");
    kernels(s, ids, 1, rate), kernels(s, ids, 6, rate), kernels(s, ids, prompt, rate);
    dspark_session_close(s);
    if (dspark_model_config(m)->n_stages) cycle(m, ids, n, rate);
    dspark_model_close(m), free(ids);
    return 0;
}
