/* conformance.h on dspark.h: every row passes, and for every row a twin of the binding, with that row's bug, fails. To
   test another engine, replace `sound`. */
#include "sessions.h"
#include "tap.h"
#include "conformance.h"

/* ---- dspark.h, bound */

/* golden/b with a block of 8, and as it is where its drafts are to be an oracle's. */
static const variant wide = { golden_b, { { "\"dspark_block_size\": 3", "\"dspark_block_size\": 8" } },
                              { { NULL, NULL } }, NULL, 0 };
typedef struct { dspark_model *m, *as_released; tensors golden; } subject;

typedef struct {
    dspark_model *m;
    dspark_session *s;
    conform_options o;
    const int32_t *forced;      /* [n_forced] drafts of the cycle that runs, in place of the drafter's */
    int n_forced, start, draft_calls, calls;    /* of the hook in a step, the first of which are the drafter's */
} text;

static int is_drafting(const text *t) { return t->calls <= t->draft_calls; }

static void hook(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    text *t = (text *)user;
    t->calls++;
    if (t->o.hook) t->o.hook(t->o.user, prefix, n, logits, vocab);
    if (is_drafting(t) && n - t->start < t->n_forced) logits[t->forced[n - t->start]] += 1e9f;
}

static dspark_session_desc desc_of(text *t) {
    const conform_options *o = &t->o;
    dspark_session_desc d = session_desc(400);
    d.seed = o->seed, d.temperature = o->temperature, d.top_p = o->top_p, d.ignore_eos = 1;
    d.adjust = hook, d.adjust_user = t;
    d.stop_tokens = &t->o.stop, d.n_stop_tokens = o->stop != 0;
    d.policy.plain = o->plain, d.policy.quota = o->limit, d.policy.draft_cap = o->drafts;
    d.policy.schedule = o->adaptive ? 0 : DSPARK_SCHEDULE_BLOCK;
    d.policy.verify = o->rejection ? DSPARK_VERIFY_REJECTION : DSPARK_VERIFY_COUPLED;
    return d;
}

static text *new_text(dspark_model *m, const conform_options *o) {
    text *t = (text *)must_have(calloc(1, sizeof *t));
    t->m = m, t->o = *o;
    return t;
}
static void *open_text(void *self, const conform_options *o) {
    text *t = new_text(((subject *)self)->m, o);
    dspark_session_desc d = desc_of(t);
    if (dspark_session_open(&t->s, t->m, &d) == DSPARK_OK) return t;
    free(t);
    return NULL;
}
static void close_text(void *user) {
    text *t = (text *)user;
    dspark_session_close(t->s);
    free(t);
}

/* All but the last are run. */
static int append(void *user, const int32_t *ids, int n) {
    dspark_session *s = ((text *)user)->s;
    return dspark_session_append(s, ids, n - 1) || dspark_session_submit(s, ids + n - 1, 1) ? CONFORM_REFUSED : 0;
}
static int cut(void *user, int n) {
    return dspark_session_truncate(((text *)user)->s, n) ? CONFORM_REFUSED : 0;
}
static void *restore(void *user) {
    const text *t = (const text *)user;
    text *other = new_text(t->m, &t->o);
    dspark_session_desc d = desc_of(other);
    char path[64];
    snprintf(path, sizeof path, "build/conformance.%d", (int)getpid());
    if (dspark_session_save(t->s, path) || dspark_session_restore(&other->s, t->m, path, &d)) free(other), other = NULL;
    remove(path);
    return other;
}

/* On a copy: the text's own anchor stays to be run. */
static int logits_of(void *user, float *logits) {
    const dspark_session *s = ((const text *)user)->s;
    dspark_session *copy;
    if (dspark_session_fork(&copy, s, NULL)) return CONFORM_REFUSED;
    run_pending(copy);
    memcpy(logits, dspark_session_logits(copy), (size_t)dspark_model_config(s->model)->vocab_size * sizeof *logits);
    dspark_session_close(copy);
    return 0;
}
static uint64_t state_of(void *user) {
    must(dspark__refill(((text *)user)->s));
    return live_hash(((text *)user)->s);
}
static void count(void *user, int64_t counters[4]) {
    const dspark_stats *t = dspark_session_stats(((const text *)user)->s);
    counters[0] = t->drafted, counters[1] = t->scheduled, counters[2] = t->accepted, counters[3] = t->emitted;
}

static int propose(void *user, int32_t *draft, float *logits) {
    dspark_session *s = ((text *)user)->s;
    float confidence[DSPARK_MAX_BLOCK];
    dspark_status status;
    s->n_tokens--;
    status = dspark_session_draft(s, s->tokens[s->n_tokens], draft, confidence, logits);
    s->n_tokens++;
    return status ? CONFORM_REFUSED : 0;
}

static int step_texts(void **texts, int n, conform_cycle *cycles) {
    dspark_session *s[8];
    dspark_step_result r[8];
    for (int i = 0; i < n; i++) {
        text *t = (text *)texts[i];
        s[i] = t->s, t->start = t->s->n_tokens, t->calls = 0;
        t->draft_calls = dspark__draft_limit(t->s) ? dspark_model_config(t->m)->dspark_block_size : 0;
    }
    if (dspark_step(s, n, NULL, r)) return CONFORM_REFUSED;
    for (int i = 0; i < n; i++) {
        conform_cycle *c = &cycles[i];
        c->status = r[i].status ? CONFORM_REFUSED : r[i].finish ? CONFORM_FINISHED : 0;
        c->n_tokens = r[i].n_tokens, c->n_drafted = r[i].n_drafted, c->n_scheduled = r[i].n_scheduled;
        c->n_accepted = r[i].n_accepted;
        memcpy(c->tokens, r[i].tokens, sizeof c->tokens), memcpy(c->draft, r[i].draft, sizeof c->draft);
    }
    return 0;
}
static int verify(void *user, const int32_t *draft, int n, conform_cycle *c) {
    text *t = (text *)user;
    dspark_policy before = t->s->desc.policy;
    int status;
    if (n) set_schedule(t->s, DSPARK_SCHEDULE_BLOCK, n);
    else set_plain(t->s, 1);
    t->forced = draft, t->n_forced = n;
    status = step_texts(&user, 1, c);
    t->n_forced = 0;
    must(dspark_session_set_policy(t->s, &before));
    return status;
}

static int decide(const float *p, const float *q, const int32_t *draft, int n, int vocab, uint64_t seed, int *accepted,
                  int32_t *next) {
    dspark_verify_desc d;
    memset(&d, 0, sizeof d);
    d.p_target = p, d.p_draft = q, d.draft = draft, d.n = n, d.vocab = vocab, d.seed = seed;
    d.mode = DSPARK_VERIFY_REJECTION;
    return dspark_verify(&d, accepted, next) ? CONFORM_REFUSED : 0;
}
static int schedule_as(int mode, const float *confidence, int n, int gamma, const float *sps, int n_sps,
                       float draft_us, int *lengths) {
    dspark_schedule_desc d;
    dspark_sps curve = { sps, n_sps };
    dspark_status status;
    memset(&d, 0, sizeof d);
    d.confidence = confidence, d.n_requests = n, d.gamma = gamma, d.mode = mode, d.draft_us = draft_us;
    d.sps = sps ? &curve : NULL;
    d.scratch = must_have(malloc(dspark_schedule_scratch_bytes(n, gamma)));
    status = dspark_schedule(&d, lengths);
    free(d.scratch);
    return status ? CONFORM_REFUSED : 0;
}
static int schedule(const float *confidence, int n, int gamma, const float *sps, int n_sps, float draft_us,
                    int *lengths) {
    return schedule_as(DSPARK_SCHEDULE_GLOBAL, confidence, n, gamma, sps, n_sps, draft_us, lengths);
}
static int measured(void *self) { return ((subject *)self)->m->n_profiles; }
static void forget(void *self) { ((subject *)self)->m->n_profiles = 0; }

/* model.safetensors: 8 bytes, the header's length; the header; the data */
typedef struct { const char *header; size_t n; uint64_t stated; } forged;
static dspark_status map_forged(void *user, const char *path, const void **data, uint64_t *size) {
    const forged *f = (const forged *)user;
    const void *stored;
    uint64_t n_stored, length;
    char *out;
    dspark_status status = dspark__file_map(NULL, path, &stored, &n_stored);
    if (status) return status;
    if (!strstr(path, ".safetensors")) *data = copy_text((const char *)stored, (size_t)(*size = n_stored));
    else {
        memcpy(&length, stored, 8);
        *size = 8 + f->n + (n_stored - 8 - length);
        *data = out = (char *)must_have(malloc((size_t)*size));
        memcpy(out, &f->stated, 8), memcpy(out + 8, f->header, f->n);
        memcpy(out + 8 + f->n, (const char *)stored + 8 + length, (size_t)(n_stored - 8 - length));
    }
    dspark__file_unmap(NULL, stored, n_stored);
    return DSPARK_OK;
}
static char *header_of(void *self, size_t *n) {
    const void *stored;
    uint64_t size, length;
    char *copy;
    (void)self;
    must(dspark__file_map(NULL, "tests/golden/b/model.safetensors", &stored, &size));
    memcpy(&length, stored, 8);
    copy = copy_text((const char *)stored + 8, *n = (size_t)length);
    dspark__file_unmap(NULL, stored, size);
    return copy;
}
static int load(void *self, const char *header, size_t n, uint64_t stated) {
    forged f = { header, n, stated };
    dspark_model *m;
    dspark_model_desc d;
    dspark_status status;
    (void)self;
    memset(&d, 0, sizeof d);
    d.n_threads = 1, d.files.map = map_forged, d.files.unmap = variant_unmap, d.files.user = &f;
    status = dspark_model_open(&m, golden_b, &d);
    dspark_model_close(m);
    return status ? CONFORM_REFUSED : 0;
}
static int damaged(void *self) { return (void)self, (int)counted.damaged; }

/* Case i of golden/b: its tokens up to position p, the anchor, and the drafts after it. */
static int golden(void *self, int i, const int32_t **ids, int *n, const int32_t **draft, const float **logits) {
    static int32_t text_of[512], drafts[DSPARK_MAX_BLOCK];
    static float rows[DSPARK_MAX_BLOCK * CONFORM_VOCAB];
    const subject *u = (const subject *)self;
    const dspark_config *c = dspark_model_config(u->m);
    size_t V = (size_t)c->vocab_size, gamma = (size_t)c->dspark_block_size;
    int64_t n_cases[4];
    int32_t *position = (int32_t *)tensors_get(&u->golden, "positions", NULL, n_cases, NULL);
    int32_t *tokens = (int32_t *)tensors_get(&u->golden, "tokens", NULL, NULL, NULL);
    int32_t *anchor = (int32_t *)tensors_get(&u->golden, "anchor", NULL, NULL, NULL);
    int32_t *all = (int32_t *)tensors_get(&u->golden, "draft_tokens", NULL, NULL, NULL);
    float *all_logits = (float *)tensors_get(&u->golden, "draft_logits", NULL, NULL, NULL);
    int is = i < (int)n_cases[0];
    if (is) {
        *n = position[i] + 2;
        memcpy(text_of, tokens, (size_t)(*n - 1) * sizeof *tokens), text_of[*n - 1] = anchor[i];
        memcpy(drafts, all + (size_t)i * gamma, gamma * sizeof *drafts);
        memcpy(rows, all_logits + (size_t)i * gamma * V, gamma * V * sizeof *rows);
        *ids = text_of, *draft = drafts, *logits = rows;
    }
    free(position), free(tokens), free(anchor), free(all), free(all_logits);
    return is;
}

static const conform_engine sound = {
    .why = dspark_last_error, .open = open_text, .close = close_text, .append = append, .truncate = cut,
    .restore = restore, .logits = logits_of, .state = state_of, .count = count, .propose = propose, .verify = verify,
    .step = step_texts, .decide = decide, .schedule = schedule, .measured = measured, .forget = forget,
    .header = header_of, .load = load, .damaged = damaged, .golden = golden, .period = 128
};

/* ---- a twin a row, broken as that row's engines were */

static dspark__state *inner(const text *t) { return (dspark__state *)t->s->state; }

/* The compressors' raw rings have room for 4 drafts: the row of a fifth falls on one that is still to be read. */
static void lose_row(text *t, int l, int p) {
    const dspark_config *c = dspark_model_config(t->m);
    int r = c->compress_ratios[l], ring = dspark__raw_ring(c, r), lost = p - ((r == 4 ? 2 * r : r) + 4);
    size_t w = (size_t)(r == 4 ? 2 * c->head_dim : c->head_dim);
    float *kv = inner(t)->layers[l].kv;
    if (lost >= 0) memcpy(kv + (size_t)(lost % ring) * w, kv + (size_t)(p % ring) * w, w * sizeof *kv);
}
static int verify_in_small_ring(void *user, const int32_t *draft, int n, conform_cycle *c) {
    text *t = (text *)user;
    const dspark_config *k = dspark_model_config(t->m);
    int from = t->s->n_run, status = verify(user, draft, n, c);
    for (int l = 0; l < k->num_hidden_layers; l++)
        for (int p = from + 5; k->compress_ratios[l] && p <= from + n; p++) if (p >= t->s->n_run) lose_row(t, l, p);
    return status;
}
static void break_rings(conform_engine *e) { e->verify = verify_in_small_ring; }

/* Another kernel, another order of sums, where a pass has many rows. */
static int append_by_other_kernel(void *user, const int32_t *ids, int n) {
    text *t = (text *)user;
    int status = append(user, ids, n), D = dspark_model_config(t->m)->head_dim;
    float *row = inner(t)->layers[0].window + (size_t)((t->s->n_run - 1) % dspark__ring(dspark_model_config(t->m)) * D);
    if (n > 32) row[0] = nextafterf(row[0], 9e9f);
    return status;
}
static void break_row_bits(conform_engine *e) { e->append = append_by_other_kernel; }

/* The seed of a draft is the token before the anchor. */
static int propose_from_before(void *user, int32_t *draft, float *logits) {
    dspark_session *s = ((text *)user)->s;
    int32_t anchor = s->tokens[s->n_tokens - 1];
    int status;
    if (s->n_tokens > 1) s->tokens[s->n_tokens - 1] = s->tokens[s->n_tokens - 2];
    status = propose(user, draft, logits);
    s->tokens[s->n_tokens - 1] = anchor;
    return status;
}
static void break_golden(conform_engine *e) { e->propose = propose_from_before; }

/* What is saved has the target's caches, not the drafter's context. */
static void *restore_target_alone(void *user) {
    text *t = (text *)restore(user);
    const dspark_config *c = dspark_model_config(t->m);
    memset(inner(t)->taps, 0, (size_t)(dspark__ring(c) * c->n_taps * c->hidden_size) * sizeof(float));
    t->s->n_injected = 0;
    return t;
}
static void break_restored(conform_engine *e) { e->restore = restore_target_alone; }

/* A row that pads the batch has slot 0 of whoever is idle: it moves every row of a window. */
static int step_padded(void **texts, int n, conform_cycle *c) {
    int status = step_texts(texts, n, c);
    for (int i = 0; i < n; i++) {
        const dspark_config *k = dspark_model_config(((text *)texts[i])->m);
        float *window = inner((text *)texts[i])->layers[1].window;
        for (int j = 0; !c[i].n_tokens && j < dspark__ring(k); j++) window[j * k->head_dim] += 1;
    }
    return status;
}
static void break_idle(conform_engine *e) { e->step = step_padded; }

static int decide_late(const float *p, const float *q, const int32_t *draft, int n, int vocab, uint64_t seed,
                       int *accepted, int32_t *next) {
    int status = decide(p, q, draft, n, vocab, seed, accepted, next);
    if (!status && *accepted < n) ++*accepted;
    return status;
}
static void break_trace_oracle(conform_engine *e) { e->decide = decide_late; }

/* Only the last token of a cycle is compared with the stop token. */
static int step_stopping_late(void **texts, int n, conform_cycle *c) {
    int status;
    for (int i = 0; i < n; i++) ((text *)texts[i])->s->desc.n_stop_tokens = 0;
    status = step_texts(texts, n, c);
    for (int i = 0; i < n; i++) {
        int32_t stop = ((text *)texts[i])->o.stop;
        if (c[i].n_tokens && c[i].tokens[c[i].n_tokens - 1] == stop) c[i].status = CONFORM_FINISHED;
    }
    return status;
}
static void break_stops(conform_engine *e) { e->step = step_stopping_late; }

/* The limit is looked at between cycles. */
static int step_over_limit(void **texts, int n, conform_cycle *c) {
    int status;
    for (int i = 0; i < n; i++) {
        dspark_policy *p = &((text *)texts[i])->s->desc.policy;
        p->quota = ((text *)texts[i])->s->stats.emitted >= p->quota ? p->quota : 0;
    }
    status = step_texts(texts, n, c);
    for (int i = 0; i < n; i++) ((text *)texts[i])->s->desc.policy.quota = ((text *)texts[i])->o.limit;
    return status;
}
static void break_limits(conform_engine *e) { e->step = step_over_limit; }

/* One stream of random numbers, from which the batch draws in turn. */
static int step_from_one_stream(void **texts, int n, conform_cycle *c) {
    for (int i = 0; i < n; i++) ((text *)texts[i])->s->desc.seed = ((text *)*texts)->o.seed + (uint64_t)i;
    return step_texts(texts, n, c);
}
static void break_seeds(conform_engine *e) { e->step = step_from_one_stream; }

/* Top-p is ignored. */
static void *open_without_top_p(void *self, const conform_options *o) {
    conform_options other = *o;
    other.top_p = 0;
    return open_text(self, &other);
}
static void break_samplers(conform_engine *e) { e->open = open_without_top_p; }

static int decide_whatever(const float *p, const float *q, const int32_t *draft, int n, int vocab, uint64_t seed,
                           int *accepted, int32_t *next) {
    if (decide(p, q, draft, n, vocab, seed, accepted, next)) *next = vocab - 1;
    return 0;
}
static void break_bad_rows(conform_engine *e) { e->decide = decide_whatever; }

/* What was proposed stays queued though the text was cut. */
static int32_t queued[DSPARK_MAX_BLOCK];
static int n_queued;
static int propose_and_queue(void *user, int32_t *draft, float *logits) {
    int status = propose(user, draft, logits);
    n_queued = dspark_model_config(((text *)user)->m)->dspark_block_size;
    memcpy(queued, draft, (size_t)n_queued * sizeof *draft);
    return status;
}
static int step_queued(void **texts, int n, conform_cycle *c) {
    int n_drafts = n_queued;
    n_queued = 0;
    return n == 1 && n_drafts ? verify(*texts, queued, n_drafts, c) : step_texts(texts, n, c);
}
static void break_aborted(conform_engine *e) { e->propose = propose_and_queue, e->step = step_queued; }

/* The mask is applied to the target's rows only. */
static conform_hook one_sided;
static void hook_target(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    if (!is_drafting((text *)user)) one_sided(NULL, prefix, n, logits, vocab);
}
static void *open_one_sided(void *self, const conform_options *o) {
    text *t = (text *)open_text(self, o);
    if (t && o->hook) one_sided = o->hook, t->o.hook = hook_target, t->o.user = t;
    return t;
}
static void break_hooks(conform_engine *e) { e->open = open_one_sided; }

static int schedule_all(const float *confidence, int n, int gamma, const float *sps, int n_sps, float draft_us,
                        int *lengths) {
    if (sps) return schedule(confidence, n, gamma, sps, n_sps, draft_us, lengths);
    for (int i = 0; i < n; i++) lengths[i] = gamma;
    return 0;
}
static void break_trims(conform_engine *e) { e->schedule = schedule_all; }

/* Algorithm 1's early stop where nothing asks for it. */
static int schedule_prefix(const float *confidence, int n, int gamma, const float *sps, int n_sps, float draft_us,
                           int *lengths) {
    return schedule_as(DSPARK_SCHEDULE_PREFIX, confidence, n, gamma, sps, n_sps, draft_us, lengths);
}
static void break_global(conform_engine *e) { e->schedule = schedule_prefix; }

/* A longer draft is cut to the block without a word. */
static void *open_clamping(void *self, const conform_options *o) {
    conform_options other = *o;
    int block = dspark_model_config(((subject *)self)->m)->dspark_block_size;
    if (other.drafts > block) other.drafts = block;
    return open_text(self, &other);
}
static void break_block(conform_engine *e) { e->open = open_clamping; }

/* A header's stated length is clamped to its real one. */
static int load_trusting(void *self, const char *header, size_t n, uint64_t stated) {
    return load(self, header, n, stated > n ? n : stated);
}
static void break_files(conform_engine *e) { e->load = load_trusting; }

static int load_loudly(void *self, const char *header, size_t n, uint64_t stated) {
    int status = load(self, header, n, stated);
    if (status) fprintf(stderr, "%s\n", dspark_last_error());
    return status;
}
static void break_silent(conform_engine *e) { e->load = load_loudly; }

/* ---- every row, whole and broken */

#define BREAK(name, claim) break_##name,
static void (*const breaks[CONFORM_N])(conform_engine *) = { CONFORM_ROWS(BREAK) };

int main(int argc, char **argv) {
    subject whole = { NULL, NULL, { NULL, 0, 0, { 0 } } }, released;
    conform_engine e = sound;
    if (!tensors_open(&whole.golden, "tests/golden/b/case.safetensors")) bail("cannot be read", "golden/b");
    whole.m = open_variant(&wide), whole.as_released = open_model(golden_b);
    released = whole, released.m = whole.as_released;
    for (int i = 0; i < CONFORM_N; i++) {
        const dspark_config *c;
        conform_engine twin;
        int holds;
        if (argc > 1 && strcmp(argv[1], conform_row[i].name)) continue;
        e.self = i == CONFORM_golden ? &released : &whole;
        c = dspark_model_config(((subject *)e.self)->m), e.vocab = c->vocab_size, e.block = c->dspark_block_size;
        twin = e, breaks[i](&twin);
        holds = conform_row[i].holds(&e);
        ok(holds, "%s", conform_row[i].claim);
        ok(!conform_row[i].holds(&twin), "%s: its broken twin is found out", conform_row[i].name);
    }
    dspark_model_close(whole.m), dspark_model_close(whole.as_released), tensors_close(&whole.golden);
    return sessions_done();
}
