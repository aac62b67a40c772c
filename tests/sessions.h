/* What the engine's tests share: dspark.h over counted memory, models and sessions that must open, a hash of what
   a session still needs, and hooks that force a text. Include it first. Helpers end the program if what a test
   rests on fails. */
#ifndef SESSIONS_H
#define SESSIONS_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HELPER static __attribute__((unused))

/* ---- memory: blocks that are counted and fenced, and a call that fails */

static struct {
    size_t calls, fail_at;      /* allocations so far, the one that fails (0: none) */
    size_t live, bytes;         /* blocks and bytes not yet freed */
    size_t damaged;             /* blocks whose fences were written */
} counted;

typedef struct { size_t size; uint64_t fence; } heap_head;
static const uint64_t heap_fence = 0x5AFEC0DE5AFEC0DEu;

HELPER void *heap_take(size_t n) {
    heap_head *head;
    if (++counted.calls == counted.fail_at ||
        !(head = (heap_head *)malloc(sizeof *head + n + sizeof heap_fence))) return NULL;
    head->size = n, head->fence = heap_fence;
    memset(head + 1, 0xCD, n);
    memcpy((char *)(head + 1) + n, &heap_fence, sizeof heap_fence);
    counted.live++, counted.bytes += n;
    return head + 1;
}

HELPER void heap_free(void *p) {
    heap_head *head = (heap_head *)p - 1;
    counted.damaged += head->fence != heap_fence || memcmp((char *)p + head->size, &heap_fence, sizeof heap_fence);
    counted.live--, counted.bytes -= head->size;
    free(head);
}

HELPER void *heap_resize(void *p, size_t n) {
    size_t old = p ? ((heap_head *)p - 1)->size : 0;
    void *q = heap_take(n);
    if (q && p) memcpy(q, p, old < n ? old : n), heap_free(p);
    return q;
}

#define DSPARK_MALLOC(n) heap_take(n)
#define DSPARK_REALLOC(p, n) heap_resize(p, n)
#define DSPARK_FREE(p) heap_free(p)
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "tap.h"
#include "tensors.h"

/* ---- what must work before anything can be tested */

HELPER void bail(const char *why, const char *what) {
    printf("Bail out! %s: %s\n", what, why);
    exit(1);
}
#define must(call) ((call) == DSPARK_OK ? (void)0 : bail(dspark_last_error(), #call))

HELPER void *must_have(void *p) {
    if (!p) bail("no memory", "malloc");
    return p;
}

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* ---- models */

static const char golden_a[] = "tests/golden/a", golden_b[] = "tests/golden/b", spark_tiny[] = "tools/spark-tiny/model";

HELPER dspark_model *open_model_as(const char *dir, int n_threads, int cpu_path, int max_rows) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = n_threads, desc.cpu_path = cpu_path, desc.max_rows = max_rows;
    must(dspark_model_open(&m, dir, &desc));
    return m;
}
/* One thread: the golden models' passes are shorter than a barrier. */
HELPER dspark_model *open_model(const char *dir) { return open_model_as(dir, 1, 0, 0); }

/* A checkpoint with some text of its config.json and its tensors' header replaced, and floats put behind its tensors. */
typedef struct { const char *find, *put; } edit;
typedef struct {
    const char *dir;
    edit config[4], header[4];      /* up to the first find that is NULL */
    const float *extra;
    size_t n_extra;
} variant;

HELPER char *edit_text(char *text, size_t *n, const edit *e, const char *what) {
    char *at, *out;
    for (; e->find; e++, text = out) {
        size_t find = strlen(e->find), put = strlen(e->put), before;
        if (!(at = strstr(text, e->find))) bail(e->find, what);
        before = (size_t)(at - text);
        out = (char *)must_have(malloc(*n + put + 1));
        memcpy(out, text, before), memcpy(out + before, e->put, put);
        memcpy(out + before + put, at + find, *n - before - find + 1);
        *n += put - find;
        free(text);
    }
    return text;
}

HELPER char *copy_text(const char *data, size_t n) {
    char *text = (char *)must_have(malloc(n + 1));
    memcpy(text, data, n), text[n] = 0;
    return text;
}

/* A safetensors file: its header's length, the header, the data. */
HELPER char *edit_tensors(const variant *v, const char *data, size_t *size) {
    uint64_t header;
    size_t n, n_data, n_extra = v->n_extra * sizeof *v->extra;
    char *text, *out;
    memcpy(&header, data, 8);
    n = (size_t)header, n_data = *size - 8 - n;
    text = edit_text(copy_text(data + 8, n), &n, v->header, v->dir);
    out = (char *)must_have(malloc(8 + n + n_data + n_extra));
    header = n;
    memcpy(out, &header, 8), memcpy(out + 8, text, n), memcpy(out + 8 + n, data + *size - n_data, n_data);
    if (n_extra) memcpy(out + 8 + n + n_data, v->extra, n_extra);
    *size = 8 + n + n_data + n_extra;
    free(text);
    return out;
}

HELPER dspark_status variant_map(void *user, const char *path, const void **data, uint64_t *size) {
    const variant *v = (const variant *)user;
    const char *file = strrchr(path, '/') + 1;
    size_t n;
    const void *stored;
    dspark_status status = dspark__file_map(NULL, path, &stored, size);
    if (status) return status;
    n = (size_t)*size;
    if (!strcmp(file, "config.json")) *data = edit_text(copy_text((const char *)stored, n), &n, v->config, path);
    else if (strstr(file, ".safetensors")) *data = edit_tensors(v, (const char *)stored, &n);
    else *data = copy_text((const char *)stored, n);
    dspark__file_unmap(NULL, stored, *size);
    *size = n;
    return DSPARK_OK;
}
HELPER void variant_unmap(void *user, const void *data, uint64_t size) {
    (void)user, (void)size;
    free((void *)(uintptr_t)data);
}

/* v must outlive the model. */
HELPER dspark_model *open_variant_on(const variant *v, const dspark_backend *backend) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1, desc.backend = backend;
    desc.files.map = variant_map, desc.files.unmap = variant_unmap, desc.files.user = (void *)(uintptr_t)v;
    must(dspark_model_open(&m, v->dir, &desc));
    return m;
}
HELPER dspark_model *open_variant(const variant *v) { return open_variant_on(v, NULL); }

/* The 300 tokens of a golden case; the caller frees them. */
HELPER int32_t *golden_text(const char *dir) {
    char path[256];
    tensors t;
    int32_t *tokens;
    snprintf(path, sizeof path, "%s/case.safetensors", dir);
    if (!tensors_open(&t, path)) bail("cannot be read", path);
    tokens = (int32_t *)must_have(tensors_get(&t, "tokens", NULL, NULL, NULL));
    tensors_close(&t);
    return tokens;
}

/* Microseconds of a pass of B = 1 .. n rows, us[B - 1], of a draft, and of drawing a token. */
HELPER void set_costs(dspark_model *m, const float *us, int n, float draft_us, float sample_us) {
    dspark_profile p;
    memset(&p, 0, sizeof p);
    p.n = n, p.draft_us = p.draft_more_us = draft_us, p.sample_us = sample_us;
    for (int i = 0; i < n; i++) p.rows[i] = i + 1, p.us[i] = us[i];
    must(dspark_model_set_profile(m, &p));
}

/* ---- sessions */

HELPER dspark_session_desc session_desc(int max_context) {
    dspark_session_desc d;
    memset(&d, 0, sizeof d);
    d.max_context = max_context;
    return d;
}

HELPER dspark_session *open_session_as(dspark_model *m, const dspark_session_desc *desc) {
    dspark_session *s;
    must(dspark_session_open(&s, m, desc));
    return s;
}
HELPER dspark_session *open_session(dspark_model *m) {
    dspark_session_desc d = session_desc(320);
    return open_session_as(m, &d);
}

/* A session that ran these tokens in one append. */
HELPER dspark_session *straight(dspark_model *m, const int32_t *tokens, int n) {
    dspark_session *s = open_session(m);
    must(dspark_session_append(s, tokens, n));
    return s;
}

HELPER void run_pending(dspark_session *s) { must(dspark_session_append(s, NULL, 0)); }

HELPER void set_plain(dspark_session *s, int plain) {
    dspark_policy p = s->desc.policy;
    p.plain = plain;
    must(dspark_session_set_policy(s, &p));
}

/* DSPARK_SCHEDULE_*, and at most `cap` drafts a cycle (0: the block). */
HELPER void set_schedule(dspark_session *s, int schedule, int cap) {
    dspark_policy p = s->desc.policy;
    p.plain = 0, p.schedule = schedule, p.draft_cap = cap;
    must(dspark_session_set_policy(s, &p));
}

HELPER dspark_step_result step(dspark_session *s) {
    dspark_step_result r;
    must(dspark_step(&s, 1, NULL, &r));
    return r;
}

/* ---- what a session still needs, as a number */

HELPER uint64_t hash_add(uint64_t h, const void *data, size_t n) {
    const char *p = (const char *)data;
    uint64_t word;
    for (; n; p += sizeof word, n -= n < sizeof word ? n : sizeof word) {
        word = n;
        memcpy(&word, p, n < sizeof word ? n : sizeof word);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    return h;
}

/* Rows of positions [first, end) of a ring of n_ring. */
HELPER uint64_t hash_ring(uint64_t h, const float *ring, int width, int n_ring, int first, int end) {
    for (int p = first > 0 ? first : 0; p < end; p++)
        h = hash_add(h, ring + (size_t)(p % n_ring) * (size_t)width, (size_t)width * sizeof *ring);
    return h;
}

HELPER uint64_t hash_layer(uint64_t h, const dspark_session *s, int l) {
    const dspark_config *c = dspark_model_config(s->model);
    const dspark__layer_state *state = &((const dspark__state *)s->state)->layers[l];
    int r = c->compress_ratios[l], n = s->n_run, raw = dspark__raw_ring(c, r), first = n - (r == 4 ? 2 * r : r);
    int D = c->head_dim, R = c->qk_rope_head_dim, I = c->index_head_dim, w = r == 4 ? 2 * D : D;
    size_t rows = r ? (size_t)(n / r) : 0;
    h = hash_ring(h, state->window, D, dspark__ring(c), n - c->sliding_window, n);
    if (!r) return h;
    h = hash_ring(h, state->kv, w, raw, first, n);
    h = hash_ring(h, state->gate, w, raw, first, n);
    h = hash_add(h, state->codes, rows * (size_t)(D - R));
    h = hash_add(h, state->scales, rows * (size_t)dspark__blocks(D - R, 64));
    h = hash_add(h, state->rope, rows * (size_t)R * sizeof(float));
    if (r != 4) return h;
    h = hash_ring(h, state->index_kv, 2 * I, raw, first, n);
    h = hash_ring(h, state->index_gate, 2 * I, raw, first, n);
    h = hash_add(h, state->key_codes, rows * (size_t)(I / 2));
    return hash_add(h, state->key_scales, rows * (size_t)(I / 32));
}

/* Of all that a later pass may read after n_run tokens: window rows of the last W positions, raw rows of the last r
   (2 r where r = 4), compressed rows below n_run / r, index keys, taps of the last W. The stages' windows show in
   draft_hash. */
HELPER uint64_t live_hash(const dspark_session *s) {
    const dspark_config *c = dspark_model_config(s->model);
    const float *taps = ((const dspark__state *)s->state)->taps;
    uint64_t h = 1;
    for (int l = 0; l < c->num_hidden_layers; l++) h = hash_layer(h, s, l);
    return hash_ring(h, taps, c->n_taps * c->hidden_size, dspark__ring(c), s->n_run - c->sliding_window, s->n_run);
}

HELPER uint64_t logits_hash(const dspark_session *s) {
    const float *logits = dspark_session_logits(s);
    return logits ? hash_add(2, logits, (size_t)dspark_model_config(s->model)->vocab_size * sizeof *logits) : 0;
}

/* Of the draft's tokens, confidences and logits after `anchor`. */
HELPER uint64_t draft_hash(dspark_session *s, int32_t anchor) {
    const dspark_config *c = dspark_model_config(s->model);
    size_t gamma = (size_t)c->dspark_block_size, n = gamma * (size_t)c->vocab_size;
    int32_t tokens[DSPARK_MAX_BLOCK];
    float confidence[DSPARK_MAX_BLOCK], *logits = (float *)must_have(malloc(n * sizeof *logits));
    uint64_t h;
    must(dspark_session_draft(s, anchor, tokens, confidence, logits));
    h = hash_add(hash_add(3, tokens, gamma * sizeof *tokens), confidence, gamma * sizeof *confidence);
    h = hash_add(h, logits, n * sizeof *logits);
    free(logits);
    return h;
}

/* Two sessions of one text, with nothing pending: the same state, logits and drafts. */
HELPER int same(dspark_session *a, dspark_session *b) {
    return a->n_run == b->n_run && live_hash(a) == live_hash(b) && logits_hash(a) == logits_hash(b) && logits_hash(a) &&
           draft_hash(a, 5) == draft_hash(b, 5);
}

/* The session is what one append of its tokens would have made. */
HELPER int is_straight(dspark_session *s) {
    dspark_session *t = straight(s->model, s->tokens, s->n_tokens);
    int is = same(s, t);
    dspark_session_close(t);
    return is;
}

/* ---- numbers */

/* A NaN comes last. */
HELPER int double_up(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y || x != x) - (x < y || y != y);
}
HELPER void sort_up(double *x, size_t n) { qsort(x, n, sizeof *x, double_up); }

/* ---- dice */

static uint64_t dice_at;
HELPER int dice(int n) { return (int)(dspark_uniform(4, 0, dice_at++, 0, 0) * n); }
HELPER void random_tokens(const dspark_model *m, int32_t *tokens, int n) {
    for (int i = 0; i < n; i++) tokens[i] = 2 + dice(dspark_model_config(m)->vocab_size - 2);
}

/* ---- hooks that lead a text */

/* Text [n] whatever the model thinks: a pure hook, so every draft is accepted. */
typedef struct { const int32_t *text; int n; } script;
HELPER void follow_script(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const script *s = (const script *)user;
    (void)prefix, (void)vocab;
    if (n < s->n) logits[s->text[n]] += 1e4f;
}

/* The same, but only the first `right` drafts of a cycle are right. The second call for the cycle's start tells target
   from drafter; so it is not pure, as the library's hooks must be. For one session a step. */
typedef struct { const int32_t *text; int n, right, start, seen; } rails;
HELPER void follow_rails(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    rails *r = (rails *)user;
    int32_t token = n < r->n ? r->text[n] : 0;
    (void)prefix;
    r->seen += n == r->start;
    if (r->seen == 1 && n - r->start >= r->right) token = (token + 1) % vocab;
    logits[token] += 1e4f;
}
/* A step with `right` drafts right; nothing but the last token is pending. */
HELPER dspark_step_result step_on_rails(dspark_session *s, rails *r, int right) {
    r->right = right, r->start = s->n_tokens, r->seen = 0;
    return step(s);
}

/* ---- the end */

HELPER int sessions_done(void) {
    ok(!counted.damaged, "nothing was written next to an allocation");
    ok(!counted.live, "everything was freed");
    return tap_done();
}
#endif
