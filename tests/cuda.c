/* dspark_cuda.cu: the golden cases at their tolerances, and the same bits and texts whatever shares a pass. Built for
   the host (cuda_host.h: the same kernels, thread by thread) as build/tests/cuda, for a device as
   build/tests/cuda_device. */
#include "heads.h"
#include "near.h"
#include "tap.h"

#ifdef DSPARK_CUDA_HOST
extern size_t cuda_host_memory, cuda_host_used, cuda_host_back;
extern long cuda_host_calls, cuda_host_fail_at, cuda_host_launches, cuda_host_waits;
void cuda_host_backwards(int on);
void cuda_host_rows(void *device, int drafts, const float *logits, const dspark_device_draw *draws, int n,
                    int32_t *tokens);
#endif

/* ---- the golden cases */

static dspark_model *open_on_device(const char *dir, int max_rows) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = max_rows;
    must(dspark_model_open(&m, dir, &desc));
    return m;
}

typedef struct { double logits, draft_logits, confidence; int drafts; } worst;

/* Adds the session's errors against row i of the case. */
static void compare(dspark_session *s, const tensors *t, int i, int draft, worst *w) {
    const dspark_config *c = dspark_model_config(s->model);
    int V = c->vocab_size, gamma = c->dspark_block_size;
    float *logits = (float *)must_have(tensors_get(t, "logits", NULL, NULL, NULL));
    float *draft_logits = (float *)must_have(tensors_get(t, "draft_logits", NULL, NULL, NULL));
    float *confidence = (float *)must_have(tensors_get(t, "confidence_logits", NULL, NULL, NULL));
    int32_t *anchor = (int32_t *)must_have(tensors_get(t, "anchor", NULL, NULL, NULL));
    int32_t *drafts = (int32_t *)must_have(tensors_get(t, "draft_tokens", NULL, NULL, NULL));
    float *mine = (float *)must_have(malloc((size_t)(gamma * V) * sizeof *mine)), confidences[DSPARK_MAX_BLOCK];
    int32_t tokens[DSPARK_MAX_BLOCK];
    w->logits = worse(w->logits, relative_l2(dspark_session_logits(s), logits + (size_t)(i * V), (size_t)V));
    if (draft) must(dspark_session_draft(s, anchor[i], tokens, confidences, mine));
    if (draft)
        w->draft_logits = worse(w->draft_logits,
                                relative_l2(mine, draft_logits + (size_t)i * (size_t)(gamma * V), (size_t)(gamma * V)));
    for (int k = 0; draft && k < gamma; k++)
        w->confidence = worse(w->confidence, fabs((double)confidences[k] - (double)confidence[i * gamma + k]));
    w->drafts += draft && !memcmp(tokens, drafts + i * gamma, (size_t)gamma * sizeof *tokens);
    free(logits), free(draft_logits), free(confidence), free(anchor), free(drafts), free(mine);
}

/* At the case's positions up to `last`. */
static void check_golden(const char *dir, int last) {
    char path[512];
    tensors t;
    worst w = { 0, 0, 0, 0 };
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *s = open_session(m);
    int64_t m_positions[4] = { 0 };
    int n = 0;
    int32_t *tokens = golden_text(dir), *positions;
    snprintf(path, sizeof path, "%s/case.safetensors", dir);
    if (!tensors_open(&t, path)) bail("cannot be read", path);
    positions = (int32_t *)must_have(tensors_get(&t, "positions", NULL, m_positions, NULL));
    for (; n < m_positions[0] && positions[n] <= last; n++) {
        int length = dspark_session_length(s);
        must(dspark_session_append(s, tokens + length, positions[n] + 1 - length));
        compare(s, &t, n, n % 2 == 0, &w);
    }
    ok(w.logits < 2e-5, "%s: target logits within 2e-5 at %d positions (%.1e)", dir, n, w.logits);
    ok(w.draft_logits < 2e-5, "%s: draft logits within 2e-5 (%.1e)", dir, w.draft_logits);
    ok(w.confidence < 1e-4, "%s: confidence logits within 1e-4 (%.1e)", dir, w.confidence);
    ok(w.drafts == (n + 1) / 2, "%s: drafts equal at every second position (%d)", dir, w.drafts);
    dspark_session_close(s), dspark_model_close(m), tensors_close(&t);
    free(tokens), free(positions);
}

/* ---- heads that the golden cases do not have */

/* A draft's logits and confidences from the device and from the CPU. */
static void check_head(const char *name, const variant *v, const int32_t *tokens) {
    static float logits[2][GAMMA * VOCAB];
    float confidences[2][DSPARK_MAX_BLOCK];
    int32_t drafts[2][DSPARK_MAX_BLOCK];
    double error, far = 0;
    for (int i = 0; i < 2; i++) {
        dspark_model *m = open_variant_on(v, i ? dspark_cuda_backend() : NULL);
        dspark_session *s = straight(m, tokens, 33);
        must(dspark_session_draft(s, 9, drafts[i], confidences[i], logits[i]));
        dspark_session_close(s), dspark_model_close(m);
    }
    error = relative_l2(logits[1], logits[0], GAMMA * VOCAB);
    for (int k = 0; k < GAMMA; k++)     /* without a head they are infinite */
        if (confidences[1][k] != confidences[0][k])
            far = worse(far, fabs((double)confidences[1][k] - (double)confidences[0][k]));
    ok(error < 2e-5 && far < 1e-4 && !memcmp(drafts[0], drafts[1], GAMMA * sizeof *tokens),
       "%s head: the CPU's draft logits, confidences and drafts (%.1e, %.1e)", name, error, far);
}
static void check_heads(void) {
    int32_t *tokens = golden_text(golden_b);
    set_joint();
    check_head("a gated", &gated, tokens), check_head("an RNN", &rnn, tokens), check_head("no", &no_head, tokens);
    free(tokens);
}

/* ---- a row's bits */

static uint64_t state_hash_of;
static dspark_status hash_piece(void *user, void *data, size_t n) {
    (void)user;
    state_hash_of = hash_add(state_hash_of, data, n);
    return DSPARK_OK;
}
/* Of logits, state and a draft. */
static uint64_t all_hash(dspark_session *s) {
    state_hash_of = logits_hash(s);
    must(s->model->backend->state_pieces(s->state, s->n_tokens, 0, hash_piece, NULL));
    return hash_add(draft_hash(s, 7), &state_hash_of, sizeof state_hash_of);
}
static uint64_t in_chunks(dspark_model *m, const int32_t *tokens, int n, int chunk) {
    dspark_session *s = open_session(m);
    uint64_t h;
    for (int i = 0; i < n; i += chunk) must(dspark_session_append(s, tokens + i, n - i < chunk ? n - i : chunk));
    h = all_hash(s);
    dspark_session_close(s);
    return h;
}

/* Up to 8, 16, 32 and more rows go through different instances of the kernels. */
static void check_chunks(const char *dir, int n, const int *chunks, int n_chunks) {
    dspark_model *m = open_on_device(dir, 128);
    int32_t *tokens = golden_text(dir);
    uint64_t h = in_chunks(m, tokens, n, n);
    int same_bits = 0;
    for (int i = 0; i < n_chunks; i++) same_bits += in_chunks(m, tokens, n, chunks[i]) == h;
    ok(same_bits == n_chunks, "%s: %d tokens in chunks of %d to %d leave the bits of one chunk: logits, state, drafts",
       dir, n, chunks[0], chunks[n_chunks - 1]);
#ifdef DSPARK_CUDA_HOST
    cuda_host_backwards(1);
    ok(in_chunks(m, tokens, n, n) == h && in_chunks(m, tokens, n, chunks[0]) == h,
       "%s: threads that run in the opposite order and copies that land late change no bit", dir);
    cuda_host_backwards(0);
#endif
    dspark_model_close(m), free(tokens);
}

/* Golden b with one gate in FP32, one in FP16; with its own matrices all dtypes. */
static const variant all_dtypes = { golden_b, { { NULL, NULL } },
    { { "\"layers.1.ffn.gate.weight\":", "\"layers.1.ffn.gate.weight\":{\"dtype\":\"F32\",\"shape\":[6,288],"
                                        "\"data_offsets\":[6345295,6352207]},\"unused.0\":" },
      { "\"layers.2.ffn.gate.weight\":{\"dtype\":\"BF16\"", "\"layers.2.ffn.gate.weight\":{\"dtype\":\"F16\"" } },
    joint, 6 * 288 };
/* From 33 rows on products use tiles of many rows, below that the decoding kernels. Here both run, with partial tiles
   and with experts of layer 0 (token 0 goes to experts 1 and 5, 3 to 0 and 1, 18 to 2 and 4, 5 to 2 and 3) that have 0,
   1, 63, 65 and 66, or all rows. */
static void check_many(void) {
    enum { N = 200 };
    static int32_t same[N], some[129];
    dspark_model_desc desc;
    dspark_model *m;
    uint64_t h;
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = N;
    desc.files.map = variant_map, desc.files.unmap = variant_unmap, desc.files.user = (void *)(uintptr_t)&all_dtypes;
    for (int i = 0; i < COUNT(some); i++) some[i] = i < 63 ? 3 : i < 128 ? 18 : 5;
    must(dspark_model_open(&m, golden_b, &desc));
    h = in_chunks(m, some, COUNT(some), 32);
    ok(in_chunks(m, some, COUNT(some), COUNT(some)) == h,
       "tiles of many rows leave the bits of few rows: every dtype, experts with 0, 1, 63, 65 and 66 rows of 129");
    ok(in_chunks(m, same, N, N) == in_chunks(m, same, N, 32), "and where two experts have all rows of %d", N);
#ifdef DSPARK_CUDA_HOST
    cuda_host_backwards(1);
    ok(in_chunks(m, some, COUNT(some), COUNT(some)) == h,
       "tiles of many rows: threads in the opposite order and copies that land late change no bit");
    cuda_host_backwards(0);
#endif
    dspark_model_close(m);
}

/* ---- texts */

enum { TEXT = 6, PROMPT = 21 };
static dspark_session *open_for_text(dspark_model *m, const int32_t *tokens, int i, int plain) {
    dspark_session_desc d = session_desc(96);
    dspark_session *s;
    d.temperature = i ? .9f : 0, d.seed = (uint64_t)i, d.ignore_eos = 1, d.policy.plain = plain;
    if (i) d.top_k = 40, d.top_p = .95f, d.min_p = .001f;
    d.logprobs = i == 3;                    /* drawn by the host; the others on the device */
    d.policy.schedule = i == 2 ? DSPARK_SCHEDULE_THRESHOLD : DSPARK_SCHEDULE_BLOCK, d.policy.threshold = .5f;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, tokens + i, PROMPT + i));
    return s;
}
static int until(dspark_session **s, int n) {
    dspark_step_result r[4];
    int short_ones = 1;
    while (short_ones) {
        must(dspark_step(s, n, NULL, r));
        short_ones = 0;
        for (int i = 0; i < n; i++) short_ones += s[i]->n_tokens < PROMPT + i + TEXT, r[0].status |= r[i].status;
        if (r[0].status) return 0;
    }
    return 1;
}

static void check_texts(const char *dir) {
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *plain[4], *drafted[4];
    int32_t *tokens = golden_text(dir);
    int same_text = 0;
    for (int i = 0; i < 4; i++) plain[i] = open_for_text(m, tokens, i, 1), drafted[i] = open_for_text(m, tokens, i, 0);
    for (int i = 0; i < 4; i++) while (plain[i]->n_tokens < PROMPT + i + TEXT) step(plain[i]);
    if (!until(drafted, 4)) bail(dspark_last_error(), "step");
    for (int i = 0; i < 4; i++)
        same_text += !memcmp(plain[i]->tokens, drafted[i]->tokens, (size_t)(PROMPT + i + TEXT) * sizeof *tokens);
    ok(same_text == 4, "%s: four sessions in one pass with DSpark have the texts of plain decoding alone: greedy, "
       "filtered, and one that the host draws for", dir);
    for (int i = 0; i < 4; i++) dspark_session_close(plain[i]), dspark_session_close(drafted[i]);
    dspark_model_close(m), free(tokens);
}

static dspark_device_draw draw_as(float temperature, int top_k, float top_p, float min_p, int i) {
    dspark_device_draw d;
    memset(&d, 0, sizeof d);
    d.temperature = temperature, d.top_k = top_k, d.top_p = top_p, d.min_p = min_p, d.draft_row = -1;
    d.seed = (uint64_t)i << 30, d.at = (uint64_t)i;
    return d;
}

static void check_draws(const char *dir) {
    enum { N = 300 };
    dspark_model *m = open_on_device(dir, 8);
    int V = dspark_model_config(m)->vocab_size, equal = 0, none = 0;
    float *logits = (float *)must_have(malloc((size_t)V * sizeof *logits)),
          *p = (float *)must_have(malloc((size_t)V * sizeof *p));
    int32_t there = 0, here = 0;
    for (int i = 0; i < N; i++) {
        dspark_device_draw draw = draw_as(i % 3 ? .4f * (float)(i % 3) : 0, 0, 0, 0, i);
        for (int v = 0; v < V; v++) logits[v] = i % 5 ? (float)dice(4000) / 500 : (float)dice(3);      /* with ties */
        must(m->backend->draw(m->device, logits, &draw, &there));
        must(dspark_distribution(logits, V, draw.temperature, 0, 0, 0, p));
        if (draw.temperature > 0) must(dspark_draw(p, V, draw.seed, DSPARK_DRAW_PLAIN, draw.at, 0, &here));
        else for (here = 0; p[here] == 0; here++) {}
        equal += here == there;
    }
    ok(equal == N, "%s: tokens drawn on the device are those that dspark_draw gives, ties at temperature 0 included",
       dir);
    for (int i = 0; i < 3; i++) {
        dspark_device_draw draw = draw_as(i ? 1 : 0, 0, 0, 0, 1);
        for (int v = 0; v < V; v++) logits[v] = i == 2 ? -HUGE_VALF : 1;
        if (i < 2) logits[V - 3] = i ? NAN : HUGE_VALF;
        must(m->backend->draw(m->device, logits, &draw, &there));
        draw.temperature = 1, draw.top_k = 5, draw.top_p = .5f;
        none += there == -1;
        must(m->backend->draw(m->device, logits, &draw, &there));
        none += there == -1;
    }
    ok(none == 6, "%s: a row with NaN, with infinity or without mass gives no token, with filters and without", dir);
    dspark_model_close(m), free(logits), free(p);
}

/* Where logit / temperature is large, or more than a float holds. */
static void check_cold(const char *dir) {
    static const float cold[] = { .05f, 1e-3f, 1e-6f, 1e-30f, 1e-40f };
    enum { N = 300 };
    dspark_model *m = open_on_device(dir, 8);
    int V = dspark_model_config(m)->vocab_size, equal = 0;
    float *logits = (float *)must_have(malloc((size_t)V * sizeof *logits)),
          *p = (float *)must_have(malloc((size_t)V * sizeof *p));
    for (int i = 0; i < N; i++) {
        dspark_device_draw draw = draw_as(cold[i % COUNT(cold)], i % 2 ? 40 : 0, 0, 0, i);
        int32_t there, here;
        for (int v = 0; v < V; v++)                             /* with ties; with logits one step of a float apart */
            logits[v] = 20 + (i % 3 ? (float)dice(3) : (float)dice(6) * 0x1p-19f);
        must(m->backend->draw(m->device, logits, &draw, &there));
        must(dspark_distribution(logits, V, draw.temperature, draw.top_k, 0, 0, p));
        must(dspark_draw(p, V, draw.seed, DSPARK_DRAW_PLAIN, draw.at, 0, &here));
        equal += here == there;
    }
    ok(equal == N, "%s: tokens drawn on the device are dspark_draw's at temperatures that leave a float no room for "
       "the noise", dir);
    dspark_model_close(m), free(logits), free(p);
}

/* Rows with many best tokens that are nearly or exactly equal: if a filter kept one token too many or too few, a draw
   would show it. */
static void check_filters(const char *dir) {
    static const struct { const char *name; int top_k; float top_p, min_p; } filters[] = {
        { "top-k", 17, 0, 0 }, { "top-k 1", 1, 0, 0 }, { "top-p", 0, .3f, 0 }, { "min-p", 0, 0, .5f },
        { "all three", 40, .6f, .3f } };
    enum { N = 240, EACH = N / 3 };
    dspark_model *m = open_on_device(dir, 8);
    int V = dspark_model_config(m)->vocab_size;
    float *logits = (float *)must_have(malloc((size_t)V * sizeof *logits)),
          *p = (float *)must_have(malloc((size_t)V * sizeof *p));
    for (int f = 0; f < COUNT(filters); f++) {
        int equal = 0;
        for (int i = 0; i < N; i++) {
            dspark_device_draw draw = draw_as(1.5f, filters[f].top_k, filters[f].top_p, filters[f].min_p, i);
            int32_t there, here;
            for (int v = 0; v < V && i % EACH == 0; v++)        /* many equal ones; all different; all equal */
                logits[v] = !i ? .7f * (float)dice(4) : i == EACH ? (float)dice(4000) / 1500 : 3;
            if (i % 3 == 1) draw.purpose = DSPARK_DRAW_NEXT, draw.k = 5;
            must(m->backend->draw(m->device, logits, &draw, &there));
            must(dspark_distribution(logits, V, draw.temperature, draw.top_k, draw.top_p, draw.min_p, p));
            must(dspark_draw(p, V, draw.seed, draw.purpose, draw.at, draw.k, &here));
            equal += here == there;
        }
        ok(equal == N, "%s: %s: the device draws from the tokens that dspark_distribution leaves, ties included", dir,
           filters[f].name);
    }
    dspark_model_close(m), free(logits), free(p);
}

/* ---- rejection */

#ifdef DSPARK_CUDA_HOST
enum { ROWS = 128 };
/* Drafts from ROWS rows of the drafter's logits q, then verifies them with the target's, p. */
static void reject_rows(dspark_model *m, const float *q, const float *p, dspark_device_draw *draws, int32_t *drafts,
                        int32_t *tokens) {
    for (int i = 0; i < ROWS; i++) draws[i].purpose = DSPARK_DRAW_DRAFT, draws[i].draft_row = -1;
    cuda_host_rows(m->device, 1, q, draws, ROWS, drafts);
    for (int i = 0; i < ROWS; i++) draws[i].purpose = DSPARK_DRAW_NEXT, draws[i].draft_row = i;
    cuda_host_rows(m->device, 0, p, draws, ROWS, tokens);
}

/* The CPU's draft from a row and the token it leads to. */
static int32_t reject_on_cpu(const float *q, const float *p, const dspark_device_draw *d, int32_t *draft,
                             int *accepted) {
    static float p_d[VOCAB], p_t[VOCAB];
    dspark_verify_desc v;
    int32_t token = 0;
    must(dspark_distribution(q, VOCAB, d->temperature, d->top_k, d->top_p, d->min_p, p_d));
    must(dspark_distribution(p, VOCAB, d->temperature, d->top_k, d->top_p, d->min_p, p_t));
    must(dspark_draw(p_d, VOCAB, d->seed, DSPARK_DRAW_DRAFT, d->at, d->k, draft));
    memset(&v, 0, sizeof v);        /* row k of a block */
    v.p_target = p_t - d->k * VOCAB, v.p_draft = p_d - d->k * VOCAB, v.draft = draft - d->k, v.n = d->k + 1;
    v.vocab = VOCAB, v.mode = DSPARK_VERIFY_REJECTION, v.seed = d->seed, v.cycle = d->at;
    must(dspark__verify_row(&v, d->k, accepted, &token));
    return *accepted ? *draft : token;
}
/* From the same logits: every draft and decision. Temperature, filters and the drafter's accuracy differ by row. */
static void check_rejection_rows(void) {
    enum { BATCHES = 8, N = BATCHES * ROWS };
    dspark_model *m = open_on_device(golden_b, ROWS);
    static float q[ROWS * VOCAB], p[ROWS * VOCAB];
    dspark_device_draw draws[ROWS];
    int32_t drafts[ROWS], tokens[ROWS], x, token;
    int same_drafts = 0, same_tokens = 0, stood = 0, alone = 0, accepted;
    for (int b = 0; b < BATCHES; b++) {
        for (int i = 0; i < ROWS * VOCAB; i++) {
            p[i] = (float)dice(4000) / 500;
            q[i] = p[i] + (float)(i / VOCAB % 4) * ((float)dice(1000) / 1000 - .5f);
        }
        for (int i = 0; i < ROWS; i++) {
            int top_k = i % 3 == 1 ? 30 : 0;
            float top_p = i % 5 > 2 ? .8f : 0, min_p = i % 7 > 4 ? .3f : 0;
            draws[i] = draw_as(.6f + .1f * (float)(i % 8), top_k, top_p, min_p, b * ROWS + i), draws[i].k = i % 6;
        }
        reject_rows(m, q, p, draws, drafts, tokens);
        for (int i = 0; i < ROWS; i++) {
            token = reject_on_cpu(q + i * VOCAB, p + i * VOCAB, &draws[i], &x, &accepted);
            same_drafts += x == drafts[i], same_tokens += token == tokens[i], stood += accepted;
        }
    }
    ok(same_drafts == N, "rejection, %d rows: the drafts are the CPU's, from the same logits", N);
    ok(same_tokens == N && stood > N / 4 && stood < N,
       "rejection: the tokens that replace refused drafts are the CPU's (%d stand)", stood);
    cuda_host_backwards(1);
    for (int i = 0; i < ROWS; i++) {
        draws[i].purpose = DSPARK_DRAW_DRAFT, draws[i].draft_row = -1;
        cuda_host_rows(m->device, 1, q + i * VOCAB, &draws[i], 1, &drafts[i]);
        draws[i].purpose = DSPARK_DRAW_NEXT, draws[i].draft_row = 0;
        cuda_host_rows(m->device, 0, p + i * VOCAB, &draws[i], 1, &token);
        alone += token == tokens[i];
    }
    cuda_host_backwards(0);
    ok(alone == ROWS, "rejection: a row alone decides as among %d, whatever the order of threads", ROWS);
    dspark_model_close(m);
}

/* Chi-square of counts against n p, in sigmas. */
static double sigmas(const int *count, const double *p, int cells, int n) {
    double chi = 0, df = -1;
    for (int i = 0; i < cells; i++) {
        if (p[i] > 0) chi += (count[i] - n * p[i]) * (count[i] - n * p[i]) / (n * p[i]), df++;
        else if (count[i]) return HUGE_VAL;
    }
    return (cbrt(chi / df) - (1 - 2 / (9 * df))) / sqrt(2 / (9 * df));
}
/* Four tokens have all of the probability: counts the 16 pairs of a draft and what replaces it. */
static void check_rejection_exact(void) {
    enum { BATCHES = 40, N = BATCHES * ROWS };
    static const int four[4] = { 5, 60, 171, 290 };
    static const float z_t[4] = { 1.2f, .3f, -.4f, .5f }, z_d[4] = { .1f, 1.1f, .2f, -1 };
    static float q[ROWS * VOCAB], p[ROWS * VOCAB], p_d[VOCAB], p_t[VOCAB];
    dspark_model *m = open_on_device(golden_b, ROWS);
    double joint_of[16], target[4], draft[4], naive[4] = { 0 }, rest = 0;
    int pairs[16] = { 0 }, out[4] = { 0 };
    for (int i = 0; i < ROWS * VOCAB; i++) q[i] = p[i] = -HUGE_VALF;
    for (int i = 0; i < 4 * ROWS; i++)
        q[i / 4 * VOCAB + four[i % 4]] = z_d[i % 4], p[i / 4 * VOCAB + four[i % 4]] = z_t[i % 4];
    must(dspark_distribution(q, VOCAB, .8f, 0, 0, 0, p_d)), must(dspark_distribution(p, VOCAB, .8f, 0, 0, 0, p_t));
    for (int i = 0; i < 4; i++) target[i] = p_t[four[i]], draft[i] = p_d[four[i]];
    for (int i = 0; i < 4; i++) rest += fmax(0, target[i] - draft[i]);
    for (int i = 0; i < 16; i++) {
        double x = draft[i / 4], stands = fmin(1, target[i / 4] / x);
        joint_of[i] = x * (stands * (i / 4 == i % 4) + (1 - stands) * fmax(0, target[i % 4] - draft[i % 4]) / rest);
        naive[i % 4] += x * (stands * (i / 4 == i % 4) + (1 - stands) * target[i % 4]);
    }
    for (int b = 0; b < BATCHES; b++) {
        dspark_device_draw draws[ROWS];
        int32_t drafts[ROWS], tokens[ROWS];
        for (int i = 0; i < ROWS; i++) draws[i] = draw_as(.8f, 0, 0, 0, b * ROWS + i), draws[i].k = i % 5;
        reject_rows(m, q, p, draws, drafts, tokens);
        for (int i = 0; i < ROWS; i++) {
            int x = 0, y = 0;
            while (x < 3 && four[x] != drafts[i]) x++;
            while (y < 3 && four[y] != tokens[i]) y++;
            pairs[4 * x + y]++, out[y]++;
        }
    }
    ok(fabs(sigmas(pairs, joint_of, 16, N)) < 4, "rejection, %d rows: a draft and what comes in its place have the "
       "joint of min(1, p_t / p_d) and the residual (%+.1f sigma)", N, sigmas(pairs, joint_of, 16, N));
    ok(fabs(sigmas(out, target, 4, N)) < 4, "rejection: the resulting tokens have the target's distribution (%+.1f "
       "sigma)", sigmas(out, target, 4, N));
    ok(sigmas(out, naive, 4, N) > 6 && sigmas(out, draft, 4, N) > 6,
       "control: the test tells it from the drafter's and from refused drafts replaced by p_t (%+.1f, %+.1f sigma)",
       sigmas(out, draft, 4, N), sigmas(out, naive, 4, N));
    dspark_model_close(m);
}
#endif

/* At a temperature at which the golden model's drafter is often right. */
static dspark_session_desc rejecting(int seed) {
    dspark_session_desc d = session_desc(96);
    d.temperature = 3, d.seed = (uint64_t)seed, d.ignore_eos = 1;
    d.policy.verify = DSPARK_VERIFY_REJECTION, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    if (seed % 2) d.top_k = 200, d.top_p = .9f, d.min_p = .01f;
    return d;
}
static int same_step(const dspark_step_result *a, const dspark_step_result *b) {
    return a->n_tokens == b->n_tokens && a->n_accepted == b->n_accepted && a->n_drafted == b->n_drafted &&
           !memcmp(a->tokens, b->tokens, (size_t)a->n_tokens * sizeof *a->tokens) &&
           !memcmp(a->draft, b->draft, (size_t)a->n_drafted * sizeof *a->draft) &&
           !memcmp(a->by, b->by, (size_t)a->n_tokens);
}
/* The same cycles as the CPU's, with BLOCK and with ASYNC (the device chooses), with and without filters: until a value
   of the model rounds the other way, which shows in the confidence before anything is drawn. */
static void check_follows(const char *dir) {
    enum { CYCLES = 12 };
    static const float flat[] = { 100, 101, 102, 103 };
    dspark_model *m[2] = { open_model(dir), open_on_device(dir, 0) };
    int32_t *tokens = golden_text(dir);
    int all = 0, accepted = 0, refused = 0;
    for (int seed = 0; seed < 4; seed++) {
        dspark_session_desc d = rejecting(seed);
        dspark_session *s[2];
        int cycles = 0, equal = 0;
        if (seed > 1) d.policy.schedule = DSPARK_SCHEDULE_ASYNC;
        for (int i = 0; i < 2; i++) {
            set_costs(m[i], flat, COUNT(flat), 1, 0);
            s[i] = open_session_as(m[i], &d);
            must(dspark_session_append(s[i], tokens, PROMPT));
        }
        for (; cycles < CYCLES; cycles++) {
            dspark_step_result a = step(s[0]), b = step(s[1]);
            if (!(fabsf(a.confidence[0] - b.confidence[0]) < 1e-5f)) break;
            equal += same_step(&a, &b), accepted += a.n_accepted, refused += a.n_accepted < a.n_scheduled;
        }
        ok(equal == cycles, "%s: rejection%s%s: the CPU's drafts, tokens and who made them (%d cycles)", dir,
           seed % 2 ? " with filters" : "", seed > 1 ? ", lengths chosen on the device" : "", cycles);
        all += cycles;
        dspark_session_close(s[0]), dspark_session_close(s[1]);
    }
    ok(all > 2 * CYCLES && accepted > 9 && refused > 9, "%s: in %d cycles that accept %d drafts and refuse %d", dir,
       all, accepted, refused);
    dspark_model_close(m[0]), dspark_model_close(m[1]), free(tokens);
}

/* Two sessions verified by rejection on the device, one on the host, one coupled: in one step and alone. Each verifies
   its whole block, so no schedule depends on company. */
static void check_rejection_company(const char *dir) {
    enum { CYCLES = 4 };
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *alone[4], *company[4];
    dspark_step_result r[4];
    int32_t *tokens = golden_text(dir);
    int equal = 0;
    for (int i = 0; i < 4; i++) {
        dspark_session_desc d = rejecting(i);
        d.logprobs = i == 1;
        if (i == 3) d.policy.verify = DSPARK_VERIFY_COUPLED;
        alone[i] = open_session_as(m, &d);
        must(dspark_session_append(alone[i], tokens + i, PROMPT));
        must(dspark_session_fork(&company[i], alone[i], &d));
    }
    for (int cycle = 0; cycle < CYCLES; cycle++) {
        must(dspark_step(company, 4, NULL, r));
        for (int i = 0; i < 4; i++) {
            dspark_step_result a = step(alone[i]);
            equal += same_step(&a, &r[i]);
        }
    }
    ok(equal == 4 * CYCLES, "%s: rejection: who shares the pass, the host's sessions included, changes no decision",
       dir);
    for (int i = 0; i < 4; i++) dspark_session_close(alone[i]), dspark_session_close(company[i]);
    dspark_model_close(m), free(tokens);
}

/* Lengths that the device chooses among sessions of all kinds; then each alone, told to verify as many. */
static void check_rejection_lengths(const char *dir) {
    enum { CYCLES = 6, N = 5 };
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *alone[N], *company[N];
    dspark_step_result r[N];
    int32_t *tokens = golden_text(dir);
    float steep[64];
    int equal = 0, none = 0, some = 0;
    for (int i = 0; i < COUNT(steep); i++) steep[i] = 100 + 9 * (float)i;
    set_costs(m, steep, COUNT(steep), 1, 0);
    for (int i = 0; i < N; i++) {
        dspark_session_desc d = rejecting(i);
        if (i == 3) d.policy.verify = DSPARK_VERIFY_COUPLED;
        if (i == 4) d.temperature = 0;
        alone[i] = open_session_as(m, &d);
        must(dspark_session_append(alone[i], tokens + i, PROMPT));
        d.policy.schedule = DSPARK_SCHEDULE_ASYNC;
        must(dspark_session_fork(&company[i], alone[i], &d));
    }
    for (int cycle = 0; cycle < CYCLES; cycle++) {
        must(dspark_step(company, N, NULL, r));
        for (int i = 0; i < N; i++) {
            dspark_policy p = alone[i]->desc.policy;
            dspark_step_result a;
            p.draft_cap = r[i].n_scheduled, p.plain = !r[i].n_scheduled;
            must(dspark_session_set_policy(alone[i], &p));
            a = step(alone[i]);
            equal += a.n_tokens == r[i].n_tokens && a.n_accepted == r[i].n_accepted &&
                     !memcmp(a.tokens, r[i].tokens, (size_t)a.n_tokens * sizeof *a.tokens);
            none += r[i].n_drafted && !r[i].n_scheduled, some += r[i].n_scheduled > 0;
        }
    }
    ok(equal == CYCLES * N && none && some > CYCLES, "%s: rejection: with lengths that the device chose for five "
       "sessions (%d of 0, %d more) each decides as it does alone", dir, none, some);
    for (int i = 0; i < N; i++) dspark_session_close(alone[i]), dspark_session_close(company[i]);
    dspark_model_close(m), free(tokens);
}

#ifdef DSPARK_CUDA_HOST
/* Each launch costs some 3 us, whatever it does. */
static void check_launches(const char *dir, int n) {
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *s = open_session(m);
    int32_t *tokens = golden_text(dir);
    int layers = dspark_model_config(m)->num_hidden_layers;
    set_plain(s, 1);
    must(dspark_session_append(s, tokens, n));
    cuda_host_launches = 0;
    must(dspark_session_append(s, tokens + n, 1));
    ok(cuda_host_launches <= 18 * layers + 4, "%s: a token at %d takes no more than 18 launches a layer and 4 (%ld, %d "
       "layers)", dir, n, cuda_host_launches, layers);
    dspark_session_close(s), dspark_model_close(m), free(tokens);
}
static void check_traffic(const char *dir) {
    dspark_model *m = open_on_device(dir, 8);
    dspark_session_desc d = rejecting(1);
    dspark_session *s = open_session_as(m, &d);
    int32_t *tokens = golden_text(dir);
    size_t row = (size_t)dspark_model_config(m)->vocab_size * sizeof(float), most = 0;
    long waits = 0;
    must(dspark_session_append(s, tokens, PROMPT));
    for (int cycle = 0; cycle < 4; cycle++) {
        cuda_host_back = 0, cuda_host_waits = 0;
        step(s);
        if (cycle && cuda_host_back > most) most = cuda_host_back;
        if (cycle && cuda_host_waits > waits) waits = cuda_host_waits;
    }
    ok(most < row && waits == 2, "%s: rejection with filters: a cycle waits twice, and less than a row of logits comes "
       "back (%d bytes, %d a row)", dir, (int)most, (int)row);
    dspark_session_close(s), dspark_model_close(m), free(tokens);
}
#endif

/* Would dspark_schedule have chosen these, of the first two of three sessions? */
static int chosen_well(const dspark_step_result *r, int gamma) {
    float confidence[3 * DSPARK_MAX_BLOCK];
    int cap[3], lengths[3], same = 1;
    double scratch[32];
    dspark_schedule_desc d;
    memset(&d, 0, sizeof d);
    for (int i = 0; i < 3; i++) {
        memcpy(confidence + i * gamma, r[i].confidence, (size_t)gamma * sizeof *confidence);
        cap[i] = r[i].n_drafted, d.budget += r[i].n_scheduled;
    }
    d.confidence = confidence, d.cap = cap, d.n_requests = 3, d.gamma = gamma, d.mode = DSPARK_SCHEDULE_ASYNC;
    d.scratch = scratch;
    must(dspark_schedule(&d, lengths));
    for (int i = 0; i < 3; i++) same &= lengths[i] == r[i].n_scheduled;
    return same;
}
/* Three sessions under ASYNC; the last does not draft. From the third cycle on, when confidences of two steps earlier
   exist, the device chooses what is verified; on the host a pass's waits are counted. */
static void check_choice(const char *dir) {
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *plain[3], *drafted[3];
    dspark_policy async;
    int32_t *tokens = golden_text(dir);
    int same_text = 0, chosen = 0, well = 0, gamma = dspark_model_config(m)->dspark_block_size;
    static float us[] = { 1000, 1001, 1002, 1403 };
    static int rows[] = { 1, 2, 6, 7 };
    dspark_profile profile;
    memset(&async, 0, sizeof async), memset(&profile, 0, sizeof profile);
    profile.n = 4, memcpy(profile.us, us, sizeof us), memcpy(profile.rows, rows, sizeof rows);
    profile.draft_us = 1;
    must(dspark_model_set_profile(m, &profile));
    m->has_calibration = m->calibration.curved = 1;         // curves through (0, .1) and (1, .1 + .8 / (k + 1))
    for (int k = 0; k < gamma; k++)
        for (int i = 0; i < DSPARK_CURVE_POINTS; i++) {
            float x = (float)i / (DSPARK_CURVE_POINTS - 1);
            m->calibration.sts[k] = 1 + .1f * (float)k, m->calibration.said[k][i] = x;
            m->calibration.stood[k][i] = .1f + .8f / (float)(k + 1) * x;
        }
    async.schedule = DSPARK_SCHEDULE_ASYNC;
    for (int i = 0; i < 3; i++) {
        plain[i] = open_for_text(m, tokens, i ? 2 : 0, 1), drafted[i] = open_for_text(m, tokens, i ? 2 : 0, 0);
        async.plain = i == 2;
        must(dspark_session_set_policy(drafted[i], &async));
    }
    for (int cycle = 0; cycle < 4; cycle++) {
        dspark_step_result r[3];
        int scheduled = 0;
#ifdef DSPARK_CUDA_HOST
        cuda_host_waits = 0;
#endif
        must(dspark_step(drafted, 3, NULL, r));
        for (int i = 0; i < 3; i++) scheduled += r[i].n_scheduled, must(r[i].status);
        chosen += cycle > 1 ? scheduled : 0, well += cycle < 2 || chosen_well(r, gamma);
#ifdef DSPARK_CUDA_HOST
        if (cycle) ok(cuda_host_waits == (cycle > 1 ? 1 : 2), "%s: cycle %d waits for the device %s", dir, cycle,
                      cycle > 1 ? "once: it chooses the drafts" : "twice");
#endif
    }
    for (int i = 0; i < 3; i++) {
        while (plain[i]->n_tokens < drafted[i]->n_tokens) step(plain[i]);
        same_text += !memcmp(plain[i]->tokens, drafted[i]->tokens, (size_t)drafted[i]->n_tokens * sizeof *tokens);
        dspark_session_close(plain[i]), dspark_session_close(drafted[i]);
    }
    ok(well == 4, "%s: it chooses what dspark_schedule would", dir);
    ok(same_text == 3 && chosen, "%s: drafts chosen on the device (%d) leave the texts of plain decoding", dir, chosen);
    dspark_model_close(m), free(tokens);
}

/* ---- sessions that go and come */

static void check_copies(const char *dir) {
    static const char path[] = "build/cuda.saved";
    dspark_model *m = open_on_device(dir, 0);
    int32_t *tokens = golden_text(dir);
    dspark_session *s = straight(m, tokens, 40), *fork, *back, *whole = straight(m, tokens, 50);
    uint64_t h = all_hash(whole);
    must(dspark_session_fork(&fork, s, NULL));
    must(dspark_session_save(s, path));
    must(dspark_session_append(s, tokens + 45, 5));
    must(dspark_session_restore(&back, m, path, NULL));
    must(dspark_session_append(fork, tokens + 40, 10)), must(dspark_session_append(back, tokens + 40, 10));
    ok(all_hash(fork) == h, "%s: a fork goes on as the whole text", dir);
    ok(all_hash(back) == h, "%s: so does a session that was saved and restored", dir);
    must(dspark_session_truncate(s, 40)), must(dspark_session_append(s, tokens + 40, 10));
    ok(logits_hash(s) == logits_hash(whole), "%s: and one that was truncated", dir);
    remove(path);
    dspark_session_close(s), dspark_session_close(fork), dspark_session_close(back), dspark_session_close(whole);
    dspark_model_close(m), free(tokens);
}

/* A longer context than any before moves the indexer's scores, whose address recordings contain. */
static void check_longer(const char *dir) {
    dspark_model *m = open_on_device(dir, 8), *other = open_on_device(dir, 8);
    int32_t *tokens = golden_text(dir);
    dspark_session_desc d = session_desc(24);
    dspark_session *s = open_session_as(m, &d);
    for (int i = 0; i < 16; i += 8) must(dspark_session_append(s, tokens + i, 8));
    dspark_session_close(s);
    ok(in_chunks(m, tokens, 41, 8) == in_chunks(other, tokens, 41, 8),
       "%s: after a longer context than any before, passes are recorded anew", dir);
    dspark_model_close(m), dspark_model_close(other), free(tokens);
}

/* ---- failures */

#ifdef DSPARK_CUDA_HOST
static dspark_status open_and_run(void) {
    dspark_model *m = NULL;
    dspark_session *s = NULL;
    dspark_model_desc desc;
    dspark_session_desc d = session_desc(32);
    int32_t ids[] = { 3, 4, 5 }, tokens[DSPARK_MAX_BLOCK];
    float confidences[DSPARK_MAX_BLOCK];
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = 8;
    dspark_status status = dspark_model_open(&m, golden_b, &desc);
    if (!status) status = dspark_session_open(&s, m, &d);
    if (!status) status = dspark_session_append(s, ids, 3);
    if (!status) status = dspark_session_draft(s, 7, tokens, confidences, NULL);
    if (!status) status = dspark_session_append(s, ids, 1);        /* a failed step of the head shows here */
    dspark_session_close(s), dspark_model_close(m);
    return status;
}

static void check_failures(void) {
    dspark_status status;
    long calls, failed = 0, named = 0, tried = 0;
    cuda_host_calls = 0;
    must(open_and_run());
    calls = cuda_host_calls;
    for (long i = 1; i <= calls; i += i < 24 ? 1 : 29, tried++) {
        cuda_host_calls = 0, cuda_host_fail_at = i;
        status = open_and_run();
        if (status != DSPARK_ERROR_BACKEND)
            printf("# call %ld: %s, %s\n", i, dspark_status_name(status), dspark_last_error());
        failed += status == DSPARK_ERROR_BACKEND, named += strstr(dspark_last_error(), ": unspecified failure") != NULL;
    }
    cuda_host_fail_at = 0;
    ok(failed == tried && named == tried && !cuda_host_used,
       "each of the runtime's calls may fail (%ld): BACKEND and its name, all freed", tried);
    cuda_host_memory = 1 << 20;
    ok(open_and_run() == DSPARK_ERROR_MEMORY && strstr(dspark_last_error(), "weights take") && !cuda_host_used,
       "a device too small: refused before the upload, with what is needed and what is there");
    printf("# %s\n", dspark_last_error());
    cuda_host_memory = (size_t)1 << 31;
}
#endif

#ifdef DSPARK_CUDA_HOST
/* A draw that fails between its two launches: the next one begins anew. */
static void check_failed_draw(const char *dir) {
    dspark_model *m = open_on_device(dir, 8);
    int V = dspark_model_config(m)->vocab_size, tried = 0, anew = 0;
    float *large = (float *)must_have(calloc((size_t)V, sizeof *large)),
          *small = (float *)must_have(calloc((size_t)V, sizeof *small));
    dspark_device_draw draw = draw_as(0, 0, 0, 0, 0);
    int32_t token = 0;
    dspark_status status;
    large[5] = 100, small[9] = 1;
    do {
        cuda_host_calls = 0, cuda_host_fail_at = ++tried;
        status = m->backend->draw(m->device, large, &draw, &token);
        cuda_host_fail_at = 0;
        must(m->backend->draw(m->device, small, &draw, &token));
        anew += token == 9;
    } while (status);
    ok(anew == tried && tried > 2, "%s: a draw that fails at any of %d calls leaves nothing to the next", dir,
       tried - 1);
    dspark_model_close(m), free(large), free(small);
}
#endif

/* Offsets of rows are 32 bits wide. */
static void check_most_rows(const char *dir) {
    dspark_model_desc desc;
    dspark_model *m;
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = 1 << 15;
    ok(dspark_model_open(&m, dir, &desc) == DSPARK_ERROR_UNSUPPORTED && strstr(dspark_last_error(), "max_rows"),
       "%s: passes of more rows than offsets can hold are refused (%s)", dir, dspark_last_error());
}

/* Kernels assume a layer's experts alike: one that differs is read past its end. */
static void check_alike(const char *dir) {
    static uint16_t zeros[1 << 16];
    const dspark_backend *b = dspark_cuda_backend();
    dspark_model_desc desc;
    dspark_model *m;
    void *device = NULL;
    int refused = 0;
    memset(&desc, 0, sizeof desc);
    desc.max_rows = 8;
    must(dspark_model_open(&m, dir, NULL));
    dspark_expert *e = &dspark_model_weights(m)->layers[1].experts[2];
    dspark_matrix *all[] = { &e->w1, &e->w3, &e->w2 };
    for (int i = 0; i < 3; i++) {
        dspark_matrix was = *all[i], plain = { zeros, NULL, was.rows, was.cols, DSPARK_BF16 };
        *all[i] = plain;
        refused += was.rows * was.cols <= COUNT(zeros) && b->open(&device, m, &desc) == DSPARK_ERROR_UNSUPPORTED &&
                   !device && strstr(dspark_last_error(), "expert 2") != NULL;
        *all[i] = was;
    }
    ok(refused == 3, "%s: an expert with a matrix of another type than the others' is refused", dir);
    printf("# %s\n", dspark_last_error());
    dspark_model_close(m);
}

#ifdef DSPARK_CUDA_HOST
/* The same bits where experts move in and out, with as few slots as limited memory can force. */
static void check_cache(const char *dir) {
    dspark_model *m = open_on_device(dir, 8), *few;
    dspark_model_desc desc;
    int32_t *tokens = golden_text(dir);
    uint64_t h = in_chunks(m, tokens, 41, 8);
    size_t step = cuda_host_used / 64, none = 0, enough = 80;       /* steps that do not open the model, that do */
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = 8;
    dspark_model_close(m);
    while (enough - none > 1) {
        size_t middle = (none + enough) / 2;
        cuda_host_memory = middle * step;
        if (dspark_model_open(&few, dir, &desc)) none = middle;
        else enough = middle, dspark_model_close(few);
    }
    cuda_host_memory = none * step;
    ok(dspark_model_open(&few, dir, &desc) && strstr(dspark_last_error(), "weights take") &&
           strstr(dspark_last_error(), "slots of") && !cuda_host_used,
       "%s: not even a layer's experts fit beside the rest: refused with byte counts", dir);
    printf("# %s\n", dspark_last_error());
    cuda_host_memory = enough * step;
    must(dspark_model_open(&few, dir, &desc));
    printf("# %s\n", dspark_model_placement(few));
    ok(strstr(dspark_model_placement(few), "in host memory") && in_chunks(few, tokens, 41, 8) == h,
       "%s: experts in host memory leave the bits of those on the device: logits, state, drafts", dir);
    dspark_model_close(few), free(tokens);
    cuda_host_memory = (size_t)1 << 31;
}
#endif

int main(void) {
    static const int chunks_a[] = { 16 }, chunks_b[] = { 5, 17 };
    check_golden(golden_a, 64);
    check_golden(golden_b, 129);
    check_heads();
    check_chunks(golden_a, 33, chunks_a, COUNT(chunks_a));
    check_chunks(golden_b, 41, chunks_b, COUNT(chunks_b));
    check_many();
    check_texts(golden_b);
    check_choice(golden_b);
    check_draws(golden_b), check_cold(golden_b);
    check_filters(golden_b), check_filters(spark_tiny);
    check_follows(golden_b), check_rejection_company(golden_b), check_rejection_lengths(golden_b);
    check_copies(golden_b);
    check_longer(golden_b), check_most_rows(golden_b), check_alike(golden_b);
#ifdef DSPARK_CUDA_HOST
    check_launches(golden_a, 20), check_launches(golden_b, 120);
    check_traffic(golden_a), check_failed_draw(golden_a), check_rejection_rows(), check_rejection_exact();
    check_cache(golden_b);
    check_failures();
#endif
    return sessions_done();
}
