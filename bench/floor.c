// floor DIR THREADS: how close decoding and verification come to the machine's limits, measured in turn with them.
//   decode share   the time to read a token's weights and cache, at the read bandwidth of a buffer of that size, over
//                  the time a token takes
//   verify R       the time of a pass of R rows, with all their logits, over its floor: the weights that it touches, at
//                  the rate of decoding their format for R rows, and attention (all heads read each key twice, as
//                  float weights)
//   verify R own   the same, each expert at the rate for the rows that it has
#include "probe.h"

enum { DEPTH = 256, ROUNDS = 15, N_DTYPES = 5 };

typedef struct { double weights[N_DTYPES], bytes; } load;        // weights by dtype, bytes with scales and vectors

static void add_matrix(load *l, const dspark_matrix *m, double times) {
    double n = (double)m->rows * m->cols, scales = m->dtype == DSPARK_FP4 ? n / 32 : m->dtype == DSPARK_FP8 ? n / 16384 : 0;
    if (!m->data) return;
    l->weights[m->dtype] += times * n;
    l->bytes += times * ((double)dtype_bytes(m->dtype, (size_t)m->rows * (size_t)m->cols) + scales);
}
static void add_expert(load *l, const dspark_expert *e, double times) {
    add_matrix(l, &e->w1, times), add_matrix(l, &e->w2, times), add_matrix(l, &e->w3, times);
}
static void add_compressor(load *l, const dspark_compressor *c) { add_matrix(l, &c->wkv, 1), add_matrix(l, &c->wgate, 1); }

// What any pass reads but for routed experts; and one token's routed experts.
static void model_load(const dspark_model *m, load *all, load *experts) {
    const dspark_config *c = dspark_model_config(m);
    const dspark_weights *w = dspark_model_weights(m);
    memset(all, 0, sizeof *all), memset(experts, 0, sizeof *experts);
    for (int i = 0; i < c->num_hidden_layers; i++) {
        const dspark_layer *l = &w->layers[i];
        add_matrix(all, &l->hc_attn.fn, 1), add_matrix(all, &l->hc_ffn.fn, 1);
        add_matrix(all, &l->wq_a, 1), add_matrix(all, &l->wq_b, 1), add_matrix(all, &l->wkv, 1);
        add_matrix(all, &l->wo_a, 1), add_matrix(all, &l->wo_b, 1);
        if (l->ratio) add_compressor(all, &l->compressor);
        if (l->ratio == 4) {
            add_compressor(all, &l->index_compressor);
            add_matrix(all, &l->index_weights, 1), add_matrix(all, &l->index_wq_b, 1);
        }
        add_matrix(all, &l->gate, 1), add_expert(all, &l->shared, 1);
        add_expert(experts, &l->experts[0], c->num_experts_per_tok);
    }
    add_matrix(all, &w->hc_head.fn, 1), add_matrix(all, &w->head, 1);
}

// Keys that a row at a position attends to, in all layers; the bytes of the cache that hold them, index keys too.
static double keys(const dspark_config *c, int position, double *bytes) {
    double n = 0, D = c->head_dim, R = c->qk_rope_head_dim, I = c->index_head_dim;
    *bytes = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        int r = c->compress_ratios[l], window = dspark__min(position + 1, c->sliding_window), rows = r ? (position + 1) / r : 0;
        if (r == 4 && rows > c->index_topk) *bytes += rows * (I / 2 + I / 32), rows = c->index_topk;
        *bytes += window * D * 4 + rows * (D - R + (D - R) / 64 + 4 * R);
        n += window + rows;
    }
    return n;
}

// ---- which experts a pass touches: seen after each moe

static const dspark_backend *inner;
static const dspark_model *model;
static double touched[DSPARK__LINEAR_ROWS + 1];     // by rows: weights of experts that had so many
static void moe(void *device, int layer) {
    const dspark__cpu *d = (const dspark__cpu *)device;
    const dspark_expert *experts = d->w->layers[layer].experts;
    inner->moe(device, layer);
    for (int e = 0; e < d->c->n_routed_experts; e++) {
        int n = dspark__min(d->expert_first[e + 1] - d->expert_first[e], PROBE_ROWS);
        touched[n] += 3.0 * experts[e].w1.rows * experts[e].w1.cols;
    }
}

// ---- plain decoding

static void decode_share(dspark_session *s, const load *token, int threads, samples *share, samples *bandwidth, samples *speed) {
    const dspark_config *c = dspark_model_config(model);
    double cache, bytes = token->bytes + (keys(c, DEPTH, &cache), cache);
    uint8_t *buffer = (uint8_t *)need((size_t)bytes + 8192, 1);
    dspark_step_result r;
    memset(buffer, 1, (size_t)bytes + 8192);
    for (int i = 0; i < ROUNDS; i++) {
        enum { TOKENS = 8 };
        samples reads = { NULL, 0, 0 }, steps = reads;
        double read, took;
        for (int j = 0; j < TOKENS; j++) sample(&reads, read_buffer(buffer, (size_t)bytes, threads));
        must(dspark_session_truncate(s, DEPTH));
        must(dspark_step(&s, 1, NULL, &r));
        for (int j = 0; j < TOKENS; j++) {
            double start = seconds();
            must(dspark_step(&s, 1, NULL, &r));
            sample(&steps, seconds() - start);
        }
        read = quantile(&reads, .5), took = quantile(&steps, .5);
        sample(share, 100 * read / took), sample(bandwidth, 1e-9 * bytes / read), sample(speed, 1 / took);
        free(reads.x), free(steps.x);
    }
    free(buffer);
}

// ---- verification

static const int dtypes[] = { DSPARK_F32, DSPARK_BF16, DSPARK_FP8, DSPARK_FP4 };
typedef struct {
    probe_matrix of[N_DTYPES], keys;        // of a buffer in memory; keys: float rows in the L2 cache
    double rate[PROBE_ROWS + 1][N_DTYPES], key_rate;
    const dspark__kernels *k;
    int threads;
} probes;

static void measure_rates(probes *p, int R) {
    for (int d = 0; d < 4; d++) {
        const probe_matrix *m = &p->of[dtypes[d]];
        p->rate[R][dtypes[d]] = fmax(probe_rate(m, R, p->threads, p->k), probe_rate(m, R, p->threads, p->k));
    }
    p->rate[R][DSPARK_F16] = p->rate[R][DSPARK_BF16];
    for (int i = 0; i < 20; i++) p->key_rate = fmax(i ? p->key_rate : 0, probe_rate(&p->keys, PROBE_ROWS, p->threads, p->k));
}

// Seconds: all that the pass touched for R rows, and attention; own: experts for the rows that they had.
static double pass_floor(const probes *p, const load *dense, int R, int own) {
    const dspark_config *c = dspark_model_config(model);
    int dtype = dspark_model_weights(model)->layers[0].experts[0].w1.dtype;
    double t = 0, cache;
    for (int d = 0; d < N_DTYPES; d++) if (dense->weights[d] > 0) t += dense->weights[d] / p->rate[R][d];
    for (int n = 1; n <= R; n++) t += touched[n] / p->rate[own ? n : R][dtype];
    for (int r = 0; r < R; r++)
        t += 2 * keys(c, DEPTH + r, &cache) * c->head_dim * c->num_attention_heads / PROBE_ROWS / p->key_rate;
    return t;
}

static void verify(dspark_session *s, const load *dense, probes *p, samples ratio[], samples own[], samples us[]) {
    int32_t ids[PROBE_ROWS];
    for (int round = 0; round < ROUNDS; round++)
        for (int R = 1; R <= PROBE_ROWS; R++) {
            double best = 1e9;
            dspark_pass_result out;
            noise(model, ids, PROBE_ROWS, (uint64_t)(100 + round));
            measure_rates(p, R);
            for (int i = 0; i < 3; i++) {
                double start = seconds();
                memset(touched, 0, sizeof touched);
                must(dspark__run_alone(s, ids, R, DEPTH, 0, 0, &out));
                best = fmin(best, seconds() - start);
            }
            sample(&ratio[R], best / pass_floor(p, dense, R, 0)), sample(&own[R], best / pass_floor(p, dense, R, 1));
            sample(&us[R], 1e6 * best);
        }
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *name = model_name(dir);
    int threads = argc > 2 ? atoi(argv[2]) : 1;
    dspark_backend table = *(inner = dspark_cpu_backend());
    dspark_session_desc desc = plain_desc(DEPTH + 32);
    samples share = { 0 }, bandwidth = { 0 }, speed = { 0 }, ratio[PROBE_ROWS + 1], own[PROBE_ROWS + 1], us[PROBE_ROWS + 1];
    load dense, experts, token;
    int32_t ids[DEPTH];
    dspark_session *s;
    dspark_model *m;
    probes p;
    char question[64];
    double weights = 0;
    memset(&p, 0, sizeof p), memset(ratio, 0, sizeof ratio), memset(own, 0, sizeof own), memset(us, 0, sizeof us);
    table.moe = moe;
    model = m = model_open(dir, threads, &table);
    s = session_open(m, &desc);
    noise(m, ids, DEPTH, 1);
    must(dspark_session_append(s, ids, DEPTH));
    model_load(m, &dense, &experts);
    token = dense, token.bytes += experts.bytes;
    for (int d = 0; d < N_DTYPES; d++) token.weights[d] += experts.weights[d];
    decode_share(s, &token, threads, &share, &bandwidth, &speed);
    must(dspark_session_truncate(s, DEPTH));
    for (int d = 0; d < 4; d++) p.of[dtypes[d]] = probe_open(dtypes[d], 32 << 20);
    p.keys = probe_open(DSPARK_F32, 128 * sizeof(float) * PROBE_COLS), p.threads = threads, p.k = ((dspark__cpu *)m->device)->k;
    verify(s, &dense, &p, ratio, own, us);
    for (int d = 0; d < N_DTYPES; d++) weights += token.weights[d];
    result_one("weights a token", name, threads, 1e-6 * weights, "millions");
    result_one("bytes a token", name, threads, 1e-6 * token.bytes, "MB");
    result("read bandwidth", name, threads, &bandwidth, "GB/s");
    result("decode at the floor's", name, threads, &speed, "tokens/s");
    result("decode share of floor", name, threads, &share, "%");
    for (int R = 1; R <= PROBE_ROWS; R++) {
        snprintf(question, sizeof question, "pass of %d rows", R), result(question, name, threads, &us[R], "us");
        snprintf(question, sizeof question, "verify %d over floor", R), result(question, name, threads, &ratio[R], "x");
        snprintf(question, sizeof question, "verify %d over own floor", R), result(question, name, threads, &own[R], "x");
    }
    for (int d = 0; d < 4; d++) {
        static const char *const dtype_names[] = { "F32", "BF16", "F16", "FP8", "FP4" };
        snprintf(question, sizeof question, "probe %s 1 and 6 rows", dtype_names[dtypes[d]]);
        fprintf(stderr, "%s: %.1f %.1f Gweights/s\n", question, 1e-9 * p.rate[1][dtypes[d]], 1e-9 * p.rate[6][dtypes[d]]);
        probe_close(&p.of[dtypes[d]]);
    }
    probe_close(&p.keys);
    dspark_session_close(s), dspark_model_close(m);
}
