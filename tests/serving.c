/* >>engine with many sessions, and with costs and confidences that it is given: each text is what it would have been
   alone; schedules across requests, profiles, calibrations, policies and counters do what they say. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* commas 1: numbers are printed as in a locale with a decimal comma. */
static int commas;
static int comma_vsnprintf(char *text, size_t cap, const char *format, va_list args) {
    int n = vsnprintf(text, cap, format, args);
    for (char *c = text; commas && cap && strstr(format, "%.") && *c; c++)
        if (*c == '.') *c = ',';
    return n;
}
static int comma_snprintf(char *text, size_t cap, const char *format, ...) {
    va_list args;
    int n;
    va_start(args, format), n = comma_vsnprintf(text, cap, format, args), va_end(args);
    return n;
}
static int comma_fprintf(FILE *f, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format), comma_vsnprintf(text, sizeof text, format, args), va_end(args);
    return fputs(text, f);
}
/* shown 0: the machine's clock; else a clock that stands but for what passes add to it, and a little at each look. */
static double shown;
static int shown_clock(struct timespec *t) {
    if (shown <= 0) return 0;
    shown += .1, t->tv_sec = (time_t)(shown / 1e6), t->tv_nsec = (long)(1e3 * (shown - 1e6 * (double)t->tv_sec));
    return 1;
}
#define clock_gettime(id, t) (shown_clock(t) ? 0 : clock_gettime(id, t))
#define timespec_get(t, base) (shown_clock(t) ? (base) : timespec_get(t, base))
#undef vsnprintf
#undef snprintf
#undef fprintf
#define vsnprintf comma_vsnprintf
#define snprintf comma_snprintf
#define fprintf comma_fprintf
#include "crowd.h"
#include "near.h"
#undef vsnprintf
#undef snprintf
#undef fprintf
#include "tap.h"

/* ---- many sessions in a step */

static dspark_model *open_for(const char *dir, int max_sessions, int max_rows, size_t memory_limit) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1, desc.max_sessions = max_sessions, desc.max_rows = max_rows, desc.memory_limit = memory_limit;
    must(dspark_model_open(&m, dir, &desc));
    return m;
}

static void test_crowd(const char *dir, int max_sessions, int max_rows, int n_requests, int most) {
    dspark_model *m = open_for(dir, max_sessions, max_rows, 0);
    crowd c;
    memset(&c, 0, sizeof c);
    c.n_requests = n_requests, c.most = most;
    run_crowd(m, &c);
    ok(!c.wrong && c.done == n_requests && c.cancelled > n_requests / 20 && c.accepted > 0,
       "up to %d at once, %d rows a pass, %d requests that come, fork, change policy, are cancelled, end: %d of %d "
       "texts are those of plain decoding alone", most, m->max_rows, n_requests, c.done - c.wrong, c.done);
    dspark_model_close(m);
}

/* A backend that counts passes and their rows; the rest is the CPU's. */
static struct { int passes[2], rows[2], prompts; } seen;
static dspark_status counting_begin(void *device, const dspark_pass *pass) {
    seen.passes[pass->kind]++, seen.rows[pass->kind] += pass->n_rows;
    for (int i = 0; i < pass->n_segments; i++) seen.prompts += pass->segments[i].logits_from > 0;
    return dspark_cpu_backend()->pass_begin(device, pass);
}

static void test_flat_passes(const int32_t *text) {
    enum { N = 256 };
    dspark_backend counting = *dspark_cpu_backend();
    dspark_model *m;
    dspark_model_desc desc;
    static dspark_session *s[N + 1];
    dspark_step_result *r = (dspark_step_result *)must_have(malloc((N + 1) * sizeof *r));
    int gamma, made = 0;
    memset(&desc, 0, sizeof desc);
    counting.pass_begin = counting_begin, desc.backend = &counting, desc.n_threads = 1, desc.max_sessions = N + 1;
    must(dspark_model_open(&m, golden_b, &desc));
    gamma = dspark_model_config(m)->dspark_block_size;
    for (int i = 0; i <= N; i++) {
        dspark_session_desc d = session_desc(40);
        d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.ignore_eos = 1;
        s[i] = open_session_as(m, &d);
        if (i < N) must(dspark_session_append(s[i], text + i % 200, 2));
    }
    must(dspark_session_submit(s[N], text, 30));
    memset(&seen, 0, sizeof seen);
    must(dspark_step(s, N + 1, NULL, r));
    for (int i = 0; i < N; i++) made += r[i].n_tokens > 0 && r[i].n_drafted == gamma;
    ok(made == N && seen.passes[DSPARK_PASS_DRAFT] == 1 && seen.rows[DSPARK_PASS_DRAFT] == N * gamma,
       "%d sessions draft in one flat pass", N);
    ok(seen.passes[DSPARK_PASS_TARGET] == 1 && seen.prompts == 1 && seen.rows[DSPARK_PASS_TARGET] > N * (gamma + 1),
       "all sessions' drafts are verified in one flat pass, which also runs a prompt's rows");
    for (int i = 0; i <= N; i++) dspark_session_close(s[i]);
    free(r);
    dspark_model_close(m);
}

/* Room for drafts that do not pay would cost passes: 32 sessions that may draft, four rows each, fill 128. */
static void test_full_passes(const int32_t *text) {
    enum { N = 100 };
    static dspark_session *s[N];
    static dspark_step_result r[N];
    static const float dear[2] = { 100, 1e5f };
    dspark_backend counting = *dspark_cpu_backend();
    dspark_model *m;
    dspark_model_desc desc;
    int passes;
    memset(&desc, 0, sizeof desc);
    counting.pass_begin = counting_begin, desc.backend = &counting, desc.n_threads = 1, desc.max_rows = 128;
    must(dspark_model_open(&m, golden_b, &desc));
    set_costs(m, dear, 2, 1e5f, 0);
    for (int i = 0; i < N; i++) s[i] = straight(m, text + i, 2);
    memset(&seen, 0, sizeof seen);
    must(dspark_step(s, N, NULL, r));
    ok(seen.passes[DSPARK_PASS_TARGET] == 1 && !seen.passes[DSPARK_PASS_DRAFT] && seen.rows[DSPARK_PASS_TARGET] == N,
       "%d sessions whose drafts do not pay share a pass of up to %d rows", N, m->max_rows);
    for (int i = 0; i < N; i++) {
        dspark_policy block = { 0, DSPARK_SCHEDULE_BLOCK, 0, 0, 0, 0, 0 };
        must(dspark_session_set_policy(s[i], &block));
    }
    memset(&seen, 0, sizeof seen);
    must(dspark_step(s, N, NULL, r));
    passes = seen.passes[DSPARK_PASS_TARGET];
    ok(passes == seen.passes[DSPARK_PASS_DRAFT] && passes == (4 * N + 127) / 128 &&
       seen.rows[DSPARK_PASS_TARGET] <= 128 * passes &&
       seen.rows[DSPARK_PASS_DRAFT] == N * dspark_model_config(m)->dspark_block_size,
       "where all sessions draft, as many passes draft as verify, with as many sessions as 128 rows hold: %d", passes);
    for (int i = 0; i < N; i++) dspark_session_close(s[i]);
    dspark_model_close(m);
}

/* ---- memory: stated before, refused where it does not fit */

static void test_memory_limit(void) {
    dspark_model *m = open_for(golden_b, 0, 0, 0);
    dspark_session_desc d = session_desc(320);
    size_t all = dspark_model_bytes(m, NULL) + 3 * dspark_session_bytes(m, &d);
    dspark_session *s[4], *fork;
    dspark_step_result r[3];
    int32_t ids[] = { 3, 4, 5 };
    int n = 0;
    dspark_model_close(m);
    m = open_for(golden_b, 0, 0, all);
    while (n < 4 && !dspark_session_open(&s[n], m, &d)) n++;
    ok(n == 3 && !s[3] && strstr(dspark_last_error(), "memory_limit"),
       "memory_limit for 3 sessions: the fourth is refused");
    ok(dspark_session_fork(&fork, s[0], NULL) == DSPARK_ERROR_MEMORY && !fork,
       "memory_limit for 3 sessions: a fork is refused");
    for (int i = 0; i < 3; i++) must(dspark_session_submit(s[i], ids, COUNT(ids)));
    ok(!dspark_step(s, 3, NULL, r), "a step of sessions that take all of memory_limit learns what passes cost");
    dspark_session_close(s[1]);
    ok(!dspark_session_open(&s[1], m, &d), "memory_limit: closing a session makes room for another");
    for (int i = 0; i < 3; i++) dspark_session_close(s[i]);
    dspark_model_close(m);
}

static void test_memory_limit_of_model(void) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.memory_limit = 1000;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_MEMORY && !m,
       "a model that needs more than memory_limit is refused");
    desc.memory_limit = 1 << 20, desc.max_rows = 1 << 14;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_MEMORY && strstr(dspark_last_error(), "workspace:"),
       "a workspace over memory_limit is refused before it is allocated");
    desc.max_rows = INT32_MAX;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_ARGUMENT && !m, "passes of 2^31 - 1 rows are refused");
    desc.n_threads = 100000;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "n_threads"),
       "100,000 threads are refused by name");
    desc.n_threads = 0, desc.memory_limit = 0, desc.max_rows = 0, desc.max_sessions = -1;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_ARGUMENT && !m, "max_sessions -1 is refused");
}

/* ---- files by the caller's means */

static int n_mapped;
static dspark_status map_elsewhere(void *user, const char *path, const void **data, uint64_t *size) {
    char real[256];
    dspark_status status;
    snprintf(real, sizeof real, "%s/%s", (const char *)user, strrchr(path, '/') + 1);
    status = dspark__file_map(NULL, real, data, size);
    n_mapped += !status;
    return status;
}
static void unmap_elsewhere(void *user, const void *data, uint64_t size) {
    (void)user;
    n_mapped--, dspark__file_unmap(NULL, data, size);
}
static void test_files(void) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = map_elsewhere, desc.files.unmap = unmap_elsewhere, desc.files.user = (void *)(uintptr_t)spark_tiny;
    must(dspark_model_open(&m, "nowhere", &desc));
    ok(dspark_tokenizer_size(dspark_model_tokenizer(m)) > 0, "tokenizer.json comes by dspark_files, as all files do");
    dspark_model_close(m);
    ok(n_mapped == 0, "all that dspark_files mapped is unmapped");
}

/* The small model's files, but a tokenizer.json with a token of 2 MB, which stays in `longer`. */
static char longer[4 << 20];
static dspark_status map_long_token(void *user, const char *path, const void **data, uint64_t *size) {
    dspark_status status = map_elsewhere(user, path, data, size);
    char *at;
    if (status || !strstr(path, "tokenizer.json")) return status;
    memcpy(longer, *data, (size_t)*size), longer[*size] = 0;
    dspark__file_unmap(NULL, *data, *size);
    at = (char *)must_have(strstr(longer, "<think>\""));
    memmove(at + (2 << 20), at + 7, strlen(at + 7) + 1), memset(at, 'a', 2 << 20);
    *data = longer, *size = strlen(longer);
    return DSPARK_OK;
}
static void unmap_long_token(void *user, const void *data, uint64_t size) {
    if (data == longer) n_mapped--;
    else unmap_elsewhere(user, data, size);
}
static void test_long_token(void) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = map_long_token, desc.files.unmap = unmap_long_token;
    desc.files.user = (void *)(uintptr_t)spark_tiny;
    ok(dspark_model_open(&m, "nowhere", &desc) == DSPARK_ERROR_UNSUPPORTED && !m &&
       strstr(dspark_last_error(), "found 2097152"), "a token too long for a session's text is refused (%s)",
       dspark_last_error());
}

/* ---- calibration.json */

static const char three_rows[] = "{\"format\": \"dspark-calibration-1\", \"rows\": ["
    "{\"verify\": \"coupled\", \"temperature\": [0.5, 0.8], \"sts\": [2, 1, 1]},"
    "{\"verify\": \"coupled\", \"temperature\": [0.8, 1.2], \"sts\": [3, 1, 1]},"
    "{\"verify\": \"greedy\", \"temperature\": [0, 0], \"sts\": [5, 1, 1]}]}";

static dspark_status with_calibration(void *user, const char *path, const void **data, uint64_t *size) {
    if (strcmp(strrchr(path, '/'), "/calibration.json")) return dspark__file_map(user, path, data, size);
    *data = three_rows, *size = sizeof three_rows - 1;
    return DSPARK_OK;
}
static void unmap_others(void *user, const void *data, uint64_t size) {
    if (data != three_rows) dspark__file_unmap(user, data, size);
}

/* With a curve, a_k is its value at the product, at most a_{k-1}, and does not depend on later logits. */
static void test_curve(void) {
    enum { N = DSPARK_MAX_BLOCK };
    static dspark_calibration straight, curved;
    int as_said = 1, falls = 1, early = 1, value = 1, none = 0;
    for (int k = 0; k < N; k++) {
        straight.sts[k] = curved.sts[k] = 1 + (float)k / 8;
        for (int i = 0; i < DSPARK_CURVE_POINTS; i++) {
            straight.said[k][i] = curved.said[k][i] = (float)i / (DSPARK_CURVE_POINTS - 1);
            straight.stood[k][i] = fmaxf(straight.said[k][i], 1e-6f), curved.stood[k][i] = .2f + .05f * (float)i;
        }
    }
    straight.curved = curved.curved = 1;
    for (int trial = 0; trial < 200; trial++) {
        float logits[N], c[N], d[N];
        double product = 1, a = 1;
        int changed = dice(N);
        for (int k = 0; k < N; k++) logits[k] = (float)(dice(2001) - 1000) / 200;
        memcpy(c, logits, sizeof c), memcpy(d, logits, sizeof d);
        dspark__calibrate(&straight, c, N);
        for (int k = 0; k < N && product > .01; product *= (double)c[k++])
            as_said &= fabs((double)c[k] - dspark_sts_apply(logits[k], straight.sts[k])) < 1e-3;
        product = 1;
        memcpy(c, logits, sizeof c), d[changed] = 50;
        dspark__calibrate(&curved, c, N), dspark__calibrate(&curved, d, N);
        for (int k = 0; k < N; k++) {
            product *= dspark_sts_apply(logits[k], curved.sts[k]), a *= (double)c[k];
            falls &= c[k] > 0 && c[k] <= 1, early &= k >= changed || c[k] == d[k];
            value &= fabs(a - (.2 + .05 * (DSPARK_CURVE_POINTS - 1) * product)) < 1e-5;
        }
    }
    ok(as_said, "a curve that is the identity changes nothing");
    ok(value, "a_k is the curve's value at the product of c_1 .. c_k as they are without it");
    ok(falls && early, "with a curve c_k is above 0, at most 1, and depends only on logits up to k");
    for (int i = 0; i < 2; i++) {
        float c[4] = { 1, 2, NAN, 1 };
        dspark__calibrate(i ? &curved : &straight, c, 4);
        none += c[0] > 0 && c[1] > 0 && c[2] == 0 && c[3] == 0;
    }
    ok(none == 2, "a logit of NaN gives its draft, and those after it, confidence 0");
}

/* The confidence of a session's first draft is calibrated with temperature T. */
static int calibrated_with(dspark_model *m, const int32_t *text, int verify, float temperature, float T) {
    dspark_session_desc d = session_desc(100);
    dspark_session *s;
    dspark_step_result r;
    int32_t drafts[DSPARK_MAX_BLOCK];
    float logits[DSPARK_MAX_BLOCK], expected;
    d.temperature = temperature, d.policy.verify = verify, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.ignore_eos = 1;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 30));
    must(dspark_step(&s, 1, NULL, &r));
    must(dspark_session_truncate(s, 30));
    run_pending(s);
    must(dspark_session_draft(s, r.tokens[0], drafts, logits, NULL));
    expected = (float)dspark_sts_apply(logits[0], T);
    dspark_session_close(s);
    return r.n_drafted && r.confidence[0] == expected;
}

static void test_calibration(const int32_t *text) {
    static const struct { const char *claim; int verify; float temperature, T; } sessions[] = {
        { "the row of its verifier and temperature", DSPARK_VERIFY_COUPLED, .6f, 2 },
        { "the first of two rows whose bands meet", DSPARK_VERIFY_COUPLED, .8f, 2 },
        { "the row of the nearest band", DSPARK_VERIFY_COUPLED, 1.7f, 3 },
        { "the row of the nearest band, from below", DSPARK_VERIFY_COUPLED, .1f, 2 },
        { "the row of greedy at temperature 0", DSPARK_VERIFY_COUPLED, 0, 5 },
        { "the row of greedy by its policy", DSPARK_VERIFY_GREEDY, 1, 5 },
        { "none where its verifier has no row", DSPARK_VERIFY_REJECTION, 1, 1 },
    };
    static const float fours[] = { 4, 4, 4 };
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1, desc.files.map = with_calibration, desc.files.unmap = unmap_others;
    must(dspark_model_open(&m, golden_b, &desc));
    for (int i = 0; i < COUNT(sessions); i++)
        ok(calibrated_with(m, text, sessions[i].verify, sessions[i].temperature, sessions[i].T),
           "calibration.json: a session takes %s", sessions[i].claim);
    must(dspark_model_set_calibration(m, fours));
    ok(calibrated_with(m, text, DSPARK_VERIFY_COUPLED, .6f, 4),
       "dspark_model_set_calibration replaces calibration.json");
    must(dspark_model_set_calibration(m, NULL));
    ok(calibrated_with(m, text, DSPARK_VERIFY_COUPLED, .6f, 1), "dspark_model_set_calibration with NULL removes it");
    dspark_model_close(m);
}

static void test_wait(const int32_t *text) {
    dspark_model *m = open_for(golden_b, 0, 4, 0);
    dspark_session_desc d = session_desc(40);
    dspark_session *s[2];
    dspark_step_result r[2];
    d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.ignore_eos = 1;
    for (int i = 0; i < 2; i++) s[i] = open_session_as(m, &d), must(dspark_session_append(s[i], text, 4));
    must(dspark_step(s, 2, NULL, r));
    ok(r[1].step_us >= r[0].step_us + r[1].draft_us + .9f * r[1].verify_us && r[0].step_us > 0,
       "a session of a step's second pass has waited for the first (%.0f us, then %.0f)", (double)r[0].step_us,
       (double)r[1].step_us);
    for (int i = 0; i < 2; i++) dspark_session_close(s[i]);
    dspark_model_close(m);
}

/* ---- schedules across requests */

enum { R = 3, STEPS = 30 };
typedef struct { dspark_session *s[R]; dspark_step_result r[R]; } table;

static void sit_down(table *t, dspark_model *m, const int32_t *text, int schedule, int verify, const float *share) {
    for (int i = 0; i < R; i++) {
        dspark_session_desc d = session_desc(320);
        d.ignore_eos = 1, d.seed = 9, d.policy.schedule = schedule, d.policy.verify = verify;
        d.temperature = verify == DSPARK_VERIFY_REJECTION;
        if (share) d.policy.share = share[i];
        t->s[i] = open_session_as(m, &d);
        must(dspark_session_append(t->s[i], text + (share ? 0 : 7 * i), 20));
        for (int k = 0; k < DSPARK_MAX_BLOCK; k++) t->s[i]->experience.survival[k] = 1;
        t->s[i]->experience.hoped = t->s[i]->experience.got = 1, t->s[i]->experience.cycles = 16;
        t->s[i]->account_of = m->n_profiles, t->s[i]->account.balance_us = t->s[i]->account.limit_us = 1e9;      /* rich */
    }
}
static void stand_up(table *t) {
    for (int i = 0; i < R; i++) dspark_session_close(t->s[i]);
}

/* Pass times rise in steps of four rows; a draft costs 5 us a session: all draft while gains are expected. */
static const float stairs_us[] = { 100, 100, 100, 180, 180, 180, 180, 260, 260, 260, 260, 340 };
static void set_stairs(dspark_model *m) { set_costs(m, stairs_us, COUNT(stairs_us), 5, 0); }

/* ASYNC's lengths for a step whose requests drafted `now`, and `then` two steps before. */
static void async_lengths(int gamma, const dspark_step_result *now, const dspark_step_result *then, int *lengths) {
    float sps[COUNT(stairs_us)], c[R * DSPARK_MAX_BLOCK];
    int n[R], budget = 0, drafted = 0, any = 0;
    char scratch[R * 64];
    dspark_sps table_of;
    dspark_schedule_desc d;
    memset(&d, 0, sizeof d);
    for (int i = 0; i < COUNT(sps); i++) sps[i] = 1e6f / stairs_us[i];
    table_of.sps = sps, table_of.n = COUNT(sps);
    d.sps = &table_of, d.n_requests = R, d.gamma = gamma, d.n_drafted = n, d.confidence = c, d.scratch = scratch;
    for (int i = 0; i < R; i++) drafted += now[i].n_drafted > 0;
    d.draft_us = (float)(5 * drafted);
    for (int i = 0; i < R && then; i++) n[i] = now[i].n_drafted ? then[i].n_drafted : 0, any += n[i];
    for (int i = 0; i < R && then; i++)
        memcpy(c + i * gamma, then[i].confidence, (size_t)gamma * sizeof *c);
    d.mode = DSPARK_SCHEDULE_GLOBAL;
    if (any) must(dspark_schedule(&d, lengths));
    for (int i = 0; i < R && any; i++) budget += lengths[i];
    for (int i = 0; i < R; i++)
        n[i] = now[i].n_drafted, memcpy(c + i * gamma, now[i].confidence, (size_t)gamma * sizeof *c);
    d.mode = any ? DSPARK_SCHEDULE_ASYNC : DSPARK_SCHEDULE_PREFIX, d.budget = budget;
    must(dspark_schedule(&d, lengths));
}

static void test_async(dspark_model *m, const int32_t *text, int verify) {
    static dspark_step_result seen_before[STEPS][R];
    float *bias = &m->checkpoint.weights.confidence_bias, was = *bias;
    int gamma = dspark_model_config(m)->dspark_block_size, lengths[R], right = 1, scheduled = 0, asked = 0;
    table t;
    *bias += 3;         /* believed in, but not beyond doubt */
    set_stairs(m);
    sit_down(&t, m, text, DSPARK_SCHEDULE_ASYNC, verify, NULL);
    for (int k = 0; k < STEPS; k++) {
        must(dspark_step(t.s, R, NULL, t.r));
        memcpy(seen_before[k], t.r, sizeof t.r);
        async_lengths(gamma, t.r, k < 2 ? NULL : seen_before[k - 2], lengths);
        for (int i = 0; i < R; i++) {
            right &= lengths[i] == t.r[i].n_scheduled;
            scheduled += t.r[i].n_scheduled, asked += t.r[i].n_drafted;
        }
    }
    ok(right && scheduled > 0 && scheduled < asked, "ASYNC, %s: the largest a_k within the budget of two steps "
       "before (%d of %d drafts)", verify ? "rejection" : "coupled", scheduled, asked);
    *bias = was;
    stand_up(&t);
}

static void test_share(dspark_model *m, const int32_t *text) {
    static const float shares[R] = { 1, 8, 1 };
    float *bias = &m->checkpoint.weights.confidence_bias, was = *bias;
    int n[R] = { 0 };
    table t;
    *bias += 3;
    set_stairs(m);
    sit_down(&t, m, text, 0, 0, shares);        /* one and the same text, thrice */
    for (int k = 0; k < STEPS; k++) {
        must(dspark_step(t.s, R, NULL, t.r));
        for (int i = 0; i < R; i++) n[i] += t.r[i].n_scheduled;
    }
    ok(n[1] > n[0] && n[1] > n[2], "of equal requests the one with the larger share gets more verified (%d, %d, %d)",
       n[0], n[1], n[2]);
    *bias = was;
    stand_up(&t);
}

static void test_refused_global(dspark_model *m) {
    dspark_session_desc d = session_desc(100);
    dspark_session *s;
    dspark_policy p;
    d.policy.schedule = DSPARK_SCHEDULE_GLOBAL, d.policy.verify = DSPARK_VERIFY_REJECTION, d.temperature = .5f;
    ok(dspark_session_open(&s, m, &d) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "GLOBAL"),
       "GLOBAL is refused for a session that verifies by rejection from a sampled draft");
    d.temperature = 0, p = d.policy;
    ok(!dspark_session_open(&s, m, &d), "GLOBAL is accepted at temperature 0, where drafts are not drawn");
    dspark_session_close(s);
    d.temperature = 1, d.policy.schedule = DSPARK_SCHEDULE_ASYNC, s = open_session_as(m, &d);
    ok(dspark_session_set_policy(s, &p) == DSPARK_ERROR_ARGUMENT && s->desc.policy.schedule == DSPARK_SCHEDULE_ASYNC,
       "GLOBAL is refused also as a later replacement for ASYNC");
    dspark_session_close(s);
}

static void test_presets(dspark_model *m) {
    int n = 0, good = 1;
    for (; dspark_preset_name(n); n++) {
        dspark_session_desc d = session_desc(100);
        dspark_session *s;
        d.temperature = 1, d.policy = *dspark_preset(dspark_preset_name(n));
        good &= !dspark_session_open(&s, m, &d);
        dspark_session_close(s);
    }
    ok(good && n == 4, "each of %d presets is a policy that opens a session", n);
    ok(!dspark_preset("reckless"), "there is no preset of another name");
}

/* ---- what passes cost */

/* One thread of a CPU whose passes begin like this. */
static dspark_model *open_with_begin(dspark_status (*pass_begin)(void *, const dspark_pass *)) {
    static dspark_backend backend;
    dspark_model_desc desc;
    dspark_model *m;
    memset(&desc, 0, sizeof desc);
    backend = *dspark_cpu_backend(), backend.pass_begin = pass_begin, desc.backend = &backend, desc.n_threads = 1;
    must(dspark_model_open(&m, golden_b, &desc));
    return m;
}

/* Passes of three rows are always interrupted. */
static dspark_status interrupted_begin(void *device, const dspark_pass *pass) {
    double until = dspark__now_us() + 2e4;
    while (pass->kind == DSPARK_PASS_TARGET && pass->n_rows == 3 && dspark__now_us() < until) continue;
    return dspark_cpu_backend()->pass_begin(device, pass);
}
static void test_interrupted(void) {
    dspark_model *m = open_with_begin(interrupted_begin);
    dspark_profile p;
    must(dspark_model_profile(m, &p));
    ok(p.rows[2] == 3 && p.us[2] <= 1.001f * (p.us[0] + p.us[1]),
       "a pass is measured at no more than two passes with its rows (%.0f us of %.0f and %.0f)", (double)p.us[2],
       (double)p.us[0], (double)p.us[1]);
    dspark_model_close(m);
}

/* Memory that was never written reads as one page, faster than any session's. */
static struct { int states, passes, early; } written;
static dspark_status counting_pieces(void *state, int n_tokens, int restore, dspark_piece piece, void *user) {
    written.states += restore && n_tokens > 256;
    return dspark_cpu_backend()->state_pieces(state, n_tokens, restore, piece, user);
}
static dspark_status written_begin(void *device, const dspark_pass *pass) {
    written.passes++, written.early += pass->n_segments > written.states;
    return dspark_cpu_backend()->pass_begin(device, pass);
}
static void test_measured_memory(void) {
    dspark_backend backend = *dspark_cpu_backend();
    dspark_model_desc desc;
    dspark_model *m;
    dspark_profile p;
    memset(&desc, 0, sizeof desc);
    backend.pass_begin = written_begin, backend.state_pieces = counting_pieces;
    desc.backend = &backend, desc.n_threads = 1;
    must(dspark_model_open(&m, golden_b, &desc));
    must(dspark_model_profile(m, &p));
    ok(written.passes && !written.early && written.states == 8,
       "costs are measured with sessions whose whole states were written before (%d)", written.states);
    dspark_model_close(m);
}

/* A machine that for a quarter of a second, while costs are measured, has a third of its speed. */
static int has_slow_moments;
static double slow_from;
static dspark_status at_times_slow_begin(void *device, const dspark_pass *pass) {
    double us = 2000 + 100 * pass->n_rows + 200 * pass->n_segments;
    shown += has_slow_moments && fabs(shown - slow_from - 2.25e5) < 1.25e5 ? 3 * us : us;
    return dspark_cpu_backend()->pass_begin(device, pass);
}
static dspark_profile profile_at_times_slow(int slow) {
    dspark_model *m = open_with_begin(at_times_slow_begin);
    dspark_profile p;
    has_slow_moments = slow, shown = slow_from = 1e9;
    must(dspark_model_profile(m, &p));
    shown = 0, dspark_model_close(m);
    return p;
}
static void test_slow_moments(void) {
    dspark_profile p = profile_at_times_slow(0), q = profile_at_times_slow(1);
    double worst = fabs((double)q.draft_us / (double)p.draft_us - 1);
    for (int B = 1; B <= 8; B++) worst = worse(worst, fabs(dspark_profile_us(&q, B) / dspark_profile_us(&p, B) - 1));
    ok(worst < .01, "a machine that is slow for moments has the costs of one that is not, to %.0f %%", 100 * worst);
    ok(q.session_us > 190 && q.session_us < 210, "so has a session beside its rows: 200 us and its own (%.0f; %.0f)",
       (double)q.session_us, (double)p.session_us);
}

/* T(B) = 500 + 90 B; every pass takes up to 8 % more, one in twenty four times as much. */
static double passes_take(int B) { return (500 + 90 * B) * (1 + dice(80) / 1000.) * (dice(20) ? 1 : 4); }

static double farthest(const dspark_profile *p, int rows) {
    double most = 0;
    for (int B = 1; B <= rows; B++) most = worse(most, fabs(dspark_profile_us(p, B) / (1.04 * (500 + 90 * B)) - 1));
    return most;
}

/* Of many such histories: of one, the dice decide. */
static void test_learning(void) {
    enum { MANY = 100 };
    double learned[MANY], followed[MANY];
    int points = 0;
    for (int k = 0; k < MANY; k++) {
        dspark_profile p;
        memset(&p, 0, sizeof p);
        for (int i = 0; i < 400; i++) {
            int B = 1 + dice(i < 200 ? 24 : 200);
            dspark__learn_pass(&p, B, passes_take(B));
        }
        learned[k] = farthest(&p, 200), points = p.n > points ? p.n : points;
        for (int i = 0; i < p.n; i++) p.us[i] *= 2;
        for (int i = 0; i < 600; i++) {
            int B = 1 + dice(24);
            dspark__learn_pass(&p, B, passes_take(B));
        }
        followed[k] = farthest(&p, 24);
    }
    sort_up(learned, MANY), sort_up(followed, MANY);
    ok(learned[MANY / 2] < .12 && learned[MANY * 3 / 4] < .2 && points <= DSPARK_MAX_PROFILE,
       "400 noisy passes teach T(B) to %.0f %% (median; upper quartile %.0f %%), with up to %d points",
       100 * learned[MANY / 2], 100 * learned[MANY * 3 / 4], points);
    ok(followed[MANY / 2] < .12 && followed[MANY * 3 / 4] < .2,
       "600 more passes at twice the speed correct T(B) (%.0f %%, %.0f %%)", 100 * followed[MANY / 2],
       100 * followed[MANY * 3 / 4]);
}

/* A known profile, and then half the speed, seen in plain passes alone. */
static void test_learning_speed(void) {
    dspark_profile p;
    memset(&p, 0, sizeof p);
    p.n = 3, p.draft_us = 300, p.session_us = 10, p.draft_seen = 8;
    for (int i = 0; i < 3; i++) p.rows[i] = 1 + 5 * i, p.us[i] = 500 + 100 * (float)p.rows[i], p.seen[i] = 8;
    for (int i = 0; i < 100; i++) dspark__learn_pass(&p, 1, 1200);
    ok(fabs(dspark_profile_us(&p, 1) / 1200 - 1) < .02 && dspark_profile_us(&p, 11) > 2700 && p.draft_us > 500 &&
       p.session_us > 17,
       "half the speed in plain passes: costs not seen since rise nearly as much (%.0f of 3200, %.0f of 600 us)",
       dspark_profile_us(&p, 11), (double)p.draft_us);
}

/* The profile says what a session's plain step and its whole block take; here is what they do take, a draft apart. */
static double takes_us[2];
static dspark_status unlike_profile_begin(void *device, const dspark_pass *pass) {
    int n = pass->n_segments, drafts = pass->n_rows - n;
    shown += pass->kind == DSPARK_PASS_DRAFT ? 300 * n : n * takes_us[0] + drafts * (takes_us[1] - takes_us[0]) / 3;
    return dspark_cpu_backend()->pass_begin(device, pass);
}
/* Of the steps 300 to 323 of a text whose drafts are worth 2.4 tokens, those that drafted; n 2: beside one whose drafts
   are worth nothing. */
static int drafts_after_a_while(int n, float plain_us, float block_us, double true_plain_us, double true_block_us) {
    dspark_model *m = open_with_begin(unlike_profile_begin);
    dspark_session_desc d = session_desc(1400);
    dspark__experience good = { { .9f, .8f, .7f }, 1, 1, 16 }, bad = { { 0, 0, 0 }, 1, 1, 16 };
    dspark_session *s[2];
    dspark_step_result r[2];
    dspark_profile p;
    int32_t ids[] = { 3, 4, 5 };
    int drafted = 0;
    memset(&p, 0, sizeof p);
    p.n = 2, p.rows[0] = n, p.rows[1] = n + 3, p.us[0] = (float)n * plain_us;
    p.us[1] = p.us[0] + block_us - plain_us, p.draft_us = p.draft_more_us = 300;
    p.learn = 1, p.seen[0] = p.seen[1] = p.draft_seen = 8;
    must(dspark_model_set_profile(m, &p));
    m->checkpoint.weights.confidence_bias = 50;         /* whole blocks are verified */
    d.ignore_eos = 1;
    for (int i = 0; i < n; i++) {
        s[i] = open_session_as(m, &d);
        must(dspark_session_append(s[i], ids, COUNT(ids)));
    }
    takes_us[0] = true_plain_us, takes_us[1] = true_block_us, shown = 1e9;
    for (int step = 0; step < 324; step++) {
        for (int i = 0; i < n; i++) {
            s[i]->experience = i ? bad : good, s[i]->account.balance_us = s[i]->account.limit_us;
            s[i]->stats.steps = 1;      /* no text probes by itself */
        }
        must(dspark_step(s, n, NULL, r));
        drafted += r[0].n_drafted && step >= 300;
    }
    shown = 0;
    for (int i = 0; i < n; i++) dspark_session_close(s[i]);
    dspark_model_close(m);
    return drafted;
}
static void test_turns(void) {
    int dear = drafts_after_a_while(1, 1000, 2500, 700, 2500), cheap = drafts_after_a_while(1, 700, 2300, 700, 1500),
        clear = drafts_after_a_while(1, 1000, 1200, 1000, 1200), poor = drafts_after_a_while(1, 500, 2500, 500, 2500),
        beside = drafts_after_a_while(2, 700, 2300, 700, 2300);
    ok(!dear, "though every step drafted, plain steps are found to be faster than known (%d of 24 draft)", dear);
    ok(cheap == 24, "though no step drafted, drafts are found to be cheaper than known (%d of 24 draft)", cheap);
    ok(clear == 24 && !poor, "what is clear is not tried (%d and %d of 24 draft)", clear, poor);
    ok(!beside, "beside a text that never drafts, a turn ends, too (%d of 24 draft)", beside);
}

static void test_no_profile(dspark_model *m, const int32_t *text) {
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    dspark_step_result r[6];
    dspark_profile p;
    int as_told = 1;
    must(dspark_model_set_profile(m, NULL));
    d.ignore_eos = 1;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 20));
    for (int i = 0; i < 6; i++) r[i] = step(s), as_told &= r[i].n_scheduled == (i % 2 ? 3 : 0);
    must(dspark_model_profile(m, &p));
    ok(as_told && p.n >= 2 && p.draft_us > 0,
       "without a profile three plain steps and three blocks, in turn, teach the costs");
    ok(s->experience.survival[0] > 8.f / 11, "accepted drafts of those three blocks count in the survival (%.2f)",
       (double)s->experience.survival[0]);
    dspark_session_close(s);
}

static int refuses_profile(dspark_model *m, const char *path, const char *text, const char *words) {
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) bail("cannot be written", path);
    return dspark_model_load_profile(m, path) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), words);
}

/* The same of the saved profile, with one text in place of another. */
static int edited_profile(dspark_model *m, const char *path, const char *was, const char *is, const char *words) {
    char text[8192], edited[8192], *at;
    size_t n;
    FILE *f;
    must(dspark_model_save_profile(m, path));
    if (!(f = fopen(path, "r"))) bail("cannot be read", path);
    n = fread(text, 1, sizeof text - 1, f), text[n] = 0, fclose(f);
    if (!(at = strstr(text, was))) bail("has no such text", was);
    snprintf(edited, sizeof edited, "%.*s%s%s", (int)(at - text), text, is, at + strlen(was));
    return refuses_profile(m, path, edited, words);
}

/* Accounts are in microseconds: those of other costs would keep a session from drafting, or let it draft at a loss. */
static void test_accounts_anew(dspark_model *m, const int32_t *text) {
    static const char path[] = "build/serving.session";
    static const float us[] = { 100, 110, 120, 130 }, slower_us[] = { 1e5, 1.1e5, 1.2e5, 1.3e5 };
    script lead = { text, 300 };
    dspark_session_desc d = session_desc(320);
    dspark_session *s, *t, *u;
    int drafted = 0;
    d.adjust = follow_script, d.adjust_user = &lead, d.ignore_eos = 1;
    set_costs(m, us, COUNT(us), 5, 0);
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 20));
    for (int i = 0; i < 20; i++) step(s);
    ok(s->stats.cycles > 10 && s->account.balance_us > 0, "a session that gains fills its account");
    must(dspark_session_fork(&t, s, NULL));
    must(dspark_session_save(s, path));
    must(dspark_session_restore(&u, m, path, &d));
    step(t), step(u);
    ok(t->account.balance_us < s->account.balance_us / 2 && u->account.balance_us < s->account.balance_us / 2,
       "a fork and a restored session do not spend their source's account again");
    set_costs(m, slower_us, COUNT(us), 5000, 0);
    for (int i = 0; i < 10; i++) drafted += step(s).n_drafted > 0;
    ok(drafted > 5 && s->account.limit_us > 1e5, "with a profile of other costs a session's account opens anew");
    dspark_session_close(s), dspark_session_close(t), dspark_session_close(u);
    remove(path);
}

/* Else a short text would never learn that its drafts are better than those of the text before it. */
static void test_each_text_tries(dspark_model *m, const int32_t *text) {
    static const float flat_us[] = { 100, 101, 102, 103, 104, 105 };
    dspark__kind *all = &m->kinds[0], was;
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    int first, second, others;
    d.ignore_eos = 1;
    set_costs(m, flat_us, COUNT(flat_us), 50, 0);
    was = *all, memset(&all->experience, 0, sizeof all->experience);
    all->experience.hoped = 1, all->experience.cycles = 1024;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 20));
    first = step(s).n_drafted, others = all->experience.cycles == 1024 && all->experience.survival[0] < .01f;
    s->experience = all->experience;            /* nor did its own draft please */
    second = step(s).n_drafted;
    ok(first > 0 && !second && others, "a text drafts once, whatever others have seen, and goes by what it sees itself "
       "(%d, then %d)", first, second);
    dspark_session_close(s), *all = was;
}

/* Steps until a text drafts again whose own drafts did not please, where those of its kind have this survival. */
static int steps_until_retry(dspark_model *m, const int32_t *text, float survival) {
    static const float flat_us[] = { 100, 101, 102, 103, 104, 105 };
    dspark__experience *all = &m->kinds[0].experience, bad, kind;
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    int steps = 0;
    set_costs(m, flat_us, COUNT(flat_us), 50, 0);
    d.ignore_eos = 1, s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 20));
    step(s), s->account.balance_us = s->account.limit_us = 1e9;
    memset(&bad, 0, sizeof bad), bad.hoped = bad.got = 1, bad.cycles = 16, kind = bad;
    for (int k = 0; k < DSPARK_MAX_BLOCK; k++) kind.survival[k] = survival;
    for (s->experience = bad, *all = kind; steps < 60 && !step(s).n_drafted; steps++) *all = kind;
    dspark_session_close(s);
    return steps;
}
static void test_text_tries_again(dspark_model *m, const int32_t *text) {
    dspark__kind was = m->kinds[0];
    int good = steps_until_retry(m, text, 1), bad = steps_until_retry(m, text, .1f);
    ok(good > 3 && good < 16 && bad == 60,
       "a text whose drafts did not please tries again after %d steps if those of its kind do, else not (%d)", good,
       bad);
    m->kinds[0] = was;
}

/* Its rows would go to the same places of its state. */
static void test_twice(void) {
    dspark_model *m = open_for(golden_b, 0, 0, 0);
    dspark_session *s = open_session(m), *all[] = { s, open_session(m), s };
    dspark_step_result r[3];
    int32_t ids[] = { 3, 4, 5 };
    for (int i = 0; i < 2; i++) must(dspark_session_append(all[i], ids, COUNT(ids)));
    ok(dspark_step(all, 3, NULL, r) == DSPARK_ERROR_ARGUMENT &&
       strstr(dspark_last_error(), "sessions 0 and 2 are one") && dspark_session_length(s) == 3,
       "a session that is twice in a step is refused, and nothing happens");
    dspark_session_close(all[0]), dspark_session_close(all[1]), dspark_model_close(m);
}
/* A cost by depth as a busy machine may measure it: at depth 3 a row would take less than nothing. */
static void test_steep_context(void) {
    static const float us[] = { 1000, 1010, 1020, 1030 };
    dspark_model *m = open_for(golden_b, 0, 0, 0);
    dspark_session *s = open_session(m);
    dspark_step_result r;
    dspark_profile p;
    int32_t ids[] = { 3, 4, 5 };
    memset(&p, 0, sizeof p);
    p.n = COUNT(us), memcpy(p.us, us, sizeof us), p.draft_us = 1, p.context_us = 3000;
    for (int i = 0; i < COUNT(us); i++) p.rows[i] = i + 1;
    must(dspark_model_set_profile(m, &p));
    must(dspark_session_append(s, ids, COUNT(ids)));
    ok(!dspark_step(&s, 1, NULL, &r) && !r.status && r.n_drafted,
       "a pass at a small depth takes time, however steep its cost by depth");
    dspark_session_close(s), dspark_model_close(m);
}
/* Beside the first, a session costs the reading of its window: little of it at first. */
static void test_shallow_sessions(void) {
    static const float us[] = { 1000, 1010, 1020, 1030 };
    dspark_model *m = open_for(golden_b, 0, 0, 0);
    dspark_session *s[] = { open_session(m), open_session(m) };
    dspark_step_result r[2];
    int window = m->checkpoint.config.sliding_window, right = 1;
    int32_t ids[320] = { 3, 4, 5 };
    set_costs(m, us, COUNT(us), 1, 0), m->profile.session_us = 80;
    for (int i = 0, n[] = { window / 4, 2 * window }, run = 0; i < 2; run = n[i++]) {
        for (int j = 0; j < 2; j++) must(dspark_session_append(s[j], ids, n[i] - run));
        must(dspark_step(s, 2, NULL, r));
        right &= fabs(m->batch.costs.base_us - (i ? 80 : 20)) < 1;
        for (int j = 0; j < 2; j++) must(dspark_session_truncate(s[j], n[i]));
    }
    ok(right, "a session at a depth of a quarter of the window costs a quarter");
    for (int j = 0; j < 2; j++) dspark_session_close(s[j]);
    dspark_model_close(m);
}
/* The last half of the points may be too flat: 256 rows are not nearly as cheap as 128. */
static void test_beyond_profile(void) {
    dspark_profile p;
    memset(&p, 0, sizeof p);
    p.n = 3, p.rows[0] = 1, p.rows[1] = 64, p.rows[2] = 128, p.us[0] = 500, p.us[1] = 12700, p.us[2] = 12800;
    ok(dspark_profile_us(&p, 256) >= 12800 + 128 * 50,
       "beyond the points a row takes at least half of the mean (%.0f us)", dspark_profile_us(&p, 256));
    p.us[1] = 6400;
    ok(fabs(dspark_profile_us(&p, 256) - 25600) < 1,
       "beyond the profile a row takes what it takes over the points' last half, if that is more");
}

static int same_costs(const dspark_profile *a, const dspark_profile *b) {
    return a->session_us == b->session_us && a->context_us == b->context_us && a->draft_us == b->draft_us &&
           a->draft_more_us == b->draft_more_us && a->inject_us == b->inject_us && a->sample_us == b->sample_us;
}

static void test_profile_file(void) {
    static const char path[] = "build/serving.profile";
    dspark_model *m = open_model(golden_b), *other = open_model_as(golden_b, 2, 0, 0);
    dspark_profile measured, p, q;
    must(dspark_model_profile(m, &measured));
    p = measured, p.us[0] = 1e-3f, p.us[p.n - 1] = 1e12f, p.rows[p.n - 1] = 100000000, p.seen[0] = 1, p.draft_seen = 2;
    must(dspark_model_set_profile(m, &p));
    must(dspark_model_save_profile(m, path));
    must(dspark_model_set_profile(m, NULL));
    must(dspark_model_load_profile(m, path));
    must(dspark_model_profile(m, &q));
    ok(q.n == p.n && q.learn && !memcmp(p.rows, q.rows, sizeof p.rows) && !memcmp(p.us, q.us, sizeof p.us) &&
       !memcmp(p.seen, q.seen, sizeof p.seen) && p.draft_seen == q.draft_seen && same_costs(&p, &q),
       "a profile is saved and loaded, to the last bit");
    dspark__learn_pass(&q, 3, 1000);
    ok(dspark_profile_us(&q, INT64_C(1) << 40) > 0, "a profile of 100 million rows can be learned and read");
    commas = 1;
    must(dspark_model_save_profile(m, path));
    commas = 0;
    ok(dspark_model_load_profile(m, path) == DSPARK_OK, "a profile is the same file in a locale with decimal commas");
#ifdef _OPENMP
    ok(dspark_model_load_profile(other, path) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "2 threads"),
       "a profile for another number of threads is refused");
#else
    skip("without OpenMP there is one thread", "a profile for another number of threads is refused");
#endif
    ok(refuses_profile(m, path, "{}", "format") && refuses_profile(m, path, "[]", "object") &&
       refuses_profile(m, path, "{\"format\": \"dspark-profile-2\"}", "of: expected checkpoint"),
       "what is no profile is refused");
    must(dspark_model_set_profile(m, &measured));
    ok(edited_profile(m, path, "\"rows\": [1, ", "\"rows\": [2, ",
                      "rows: expected each more than the one before, found 2") &&
       edited_profile(m, path, "\"rows\": [1, ", "\"rows\": [1.5, ", "found 1.5") &&
       edited_profile(m, path, "\"rows\":", "\"row\":", "rows: expected an array of at most 64, found nothing") &&
       edited_profile(m, path, "\"seen\": [", "\"seen\": [9, ", "seen: expected") &&
       edited_profile(m, path, "\"draft_seen\":", "\"draft\":", "draft_seen: expected an integer from 0 to 8"),
       "what a profile lacks, or has wrong, is named");
    ok(dspark_model_load_profile(m, "build/none") == DSPARK_ERROR_IO, "a file that is not there is IO");
    remove(path);
    dspark_model_close(m), dspark_model_close(other);
}

/* ---- what there is to see */

static void test_counters(const int32_t *text) {
    dspark_model *m = open_model(golden_b);
    dspark_stats sum, told;
    dspark_summary all;
    static char metrics[16384], few[40], line[4096], expected[128];
    table t;
    int good = 1, n;
    memset(&sum, 0, sizeof sum);
    sit_down(&t, m, text, DSPARK_SCHEDULE_BLOCK, 0, NULL);
    for (int k = 0; k < 10; k++) must(dspark_step(t.s, R, NULL, t.r));
    for (int i = 0; i < R; i++) {
        const dspark_stats *s = dspark_session_stats(t.s[i]);
        sum.cycles += s->cycles, sum.scheduled += s->scheduled, sum.accepted += s->accepted, sum.emitted += s->emitted;
    }
    n = dspark_step_json(&t.r[1], 7, line, sizeof line);
    stand_up(&t);
    ok(dspark_model_stats(m)->cycles == sum.cycles && dspark_model_stats(m)->scheduled == sum.scheduled &&
       dspark_model_stats(m)->accepted == sum.accepted && dspark_model_stats(m)->emitted == sum.emitted &&
       sum.cycles == 30, "the model counts what its sessions counted, closed ones too");
    good = n == (int)strlen(line) && line[n - 1] == '\n' && strstr(line, "\"session\": 7,") &&
           strstr(line, "\"drafted\": 3,");
    ok(good, "a step is a line of JSON");
    t.r[1].n_drafted = 1, t.r[1].confidence[0] = .5f, t.r[1].draft_us = 1.5f, commas = 1;
    dspark_step_json(&t.r[1], 7, line, sizeof line), commas = 0;
    ok(strstr(line, "\"confidence\": [0.5], \"draft_us\": 1.5,"), "its numbers have a point in any locale");
    told = *dspark_model_stats(m), told.step_us = 5e5, commas = 1;
    n = dspark_stats_prometheus(&told, "model=\"b\"", metrics, sizeof metrics);
    commas = 0;
    ok(!strstr(metrics, "0,") && strstr(metrics, "seconds_sum{model=\"b\"} 0.5\n"),
       "counters have a point in any locale");
    snprintf(expected, sizeof expected, "\ndspark_spec_decode_num_draft_tokens_total{model=\"b\"} %d\n",
             (int)sum.scheduled);
    ok(n == (int)strlen(metrics) && strstr(metrics, expected) &&
       strstr(metrics, "dspark_spec_decode_num_draft_tokens_per_pos_total{model=\"b\",position=\"0\"} "),
       "counters are Prometheus' text, labelled");
    snprintf(expected, sizeof expected, "\ndspark_time_per_output_token_seconds_count{model=\"b\"} %d\n",
             (int)sum.emitted);
    ok(strstr(metrics, expected) && strstr(metrics, "\ndspark_time_per_output_token_seconds_sum{model=\"b\"} "),
       "a histogram has its sum and its count");
    ok(dspark_stats_prometheus(&told, "model=\"b\"", few, sizeof few) == n &&
       strlen(few) == sizeof few - 1, "a Prometheus text that does not fit is cut off, and its full length returned");
    all = dspark_stats_summary(dspark_model_stats(m));
    ok(fabs(all.tau - (double)(30 + sum.accepted) / 30) < 1e-9 && all.p50_us > 0 && all.p95_us >= all.p50_us &&
       fabs(all.rejection_rate - 1 + (double)sum.accepted / (double)sum.scheduled) < 1e-9,
       "the summary has tau %.2f, the share of rejected drafts, p50 and p95", all.tau);
    dspark_model_close(m);
}

/* The text ends with an accepted draft: those behind it were neither accepted nor rejected. */
static void test_stop_within_block(const int32_t *text) {
    dspark_model *m = open_model(golden_b);
    script lead = { NULL, 0 };
    dspark_session_desc d = session_desc(100);
    dspark_session *s;
    int32_t stop = text[22];        /* anchor, a draft, this draft, another */
    dspark_step_result r;
    lead.text = text, lead.n = 100, d.adjust = follow_script, d.adjust_user = &lead;
    d.stop_tokens = &stop, d.n_stop_tokens = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 20));
    r = step(s);
    ok(r.finish == DSPARK_STOP_TOKEN && r.n_scheduled == 3 && r.n_accepted == 2 && s->stats.scheduled == 2 &&
       dspark_stats_summary(&s->stats).rejection_rate == 0, "drafts behind a stop token are not counted as rejected");
    ok(r.n_tokens == 3 && dspark_stats_summary(&s->stats).tau == 2,
       "a text that ends with a draft has no bonus in its tau: an anchor from the prompt's pass, and 2 of the first");
    dspark_session_close(s);
    dspark_model_close(m);
}

static void test_one_model(const int32_t *text) {
    dspark_model *m = open_model(golden_b);
    test_async(m, text, DSPARK_VERIFY_COUPLED), test_async(m, text, DSPARK_VERIFY_REJECTION);
    test_share(m, text), test_refused_global(m), test_presets(m);
    test_no_profile(m, text);
    test_each_text_tries(m, text), test_text_tries_again(m, text), test_accounts_anew(m, text);
    dspark_model_close(m);
}

int main(void) {
    int32_t *text = golden_text(golden_b);
    test_crowd(golden_b, 256, 0, 300, 256);
    test_crowd(golden_b, 0, 24, 60, 30);
    test_crowd(golden_a, 64, 0, 120, 40);
    test_flat_passes(text), test_full_passes(text), test_wait(text);
    test_memory_limit(), test_memory_limit_of_model();
    test_files(), test_long_token();
    test_calibration(text), test_curve();
    test_one_model(text), test_learning(), test_learning_speed(), test_turns();
    test_interrupted(), test_measured_memory(), test_slow_moments(), test_steep_context();
    test_shallow_sessions(), test_beyond_profile();
    test_profile_file(), test_twice();
    test_counters(text), test_stop_within_block(text);
    free(text);
    return sessions_done();
}
