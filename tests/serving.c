/* >>engine with many sessions, and what it is told about costs and confidences: each of many texts is what it would
   have been alone; schedules across requests, profiles, calibrations, policies and counters are what they say. */
#include "crowd.h"
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
       "up to %d at once, %d rows a pass, %d requests that come, fork, change policy, are cancelled, end: %d of %d texts "
       "are those of plain decoding alone", most, m->max_rows, n_requests, c.done - c.wrong, c.done);
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
       "and are verified in one, which runs a prompt's rows as well");
    for (int i = 0; i <= N; i++) dspark_session_close(s[i]);
    free(r);
    dspark_model_close(m);
}

/* ---- memory: stated before, refused where it does not fit */

static void test_memory_limit(void) {
    dspark_model *m = open_for(golden_b, 0, 0, 0);
    dspark_session_desc d = session_desc(320);
    size_t all = dspark_model_bytes(m, NULL) + 3 * dspark_session_bytes(m, &d);
    dspark_session *s[4], *fork;
    int n = 0;
    dspark_model_close(m);
    m = open_for(golden_b, 0, 0, all);
    while (n < 4 && !dspark_session_open(&s[n], m, &d)) n++;
    ok(n == 3 && !s[3] && strstr(dspark_last_error(), "memory_limit"), "memory_limit for 3 sessions: the fourth is refused");
    ok(dspark_session_fork(&fork, s[0], NULL) == DSPARK_ERROR_MEMORY && !fork, "so is a fork");
    dspark_session_close(s[1]);
    ok(!dspark_session_open(&s[1], m, &d), "one that is closed makes room for another");
    for (int i = 0; i < 3; i++) dspark_session_close(s[i]);
    dspark_model_close(m);
}

static void test_memory_limit_of_model(void) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.memory_limit = 1000;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_MEMORY && !m, "a model that needs more is refused");
    desc.memory_limit = 0, desc.max_sessions = -1;
    ok(dspark_model_open(&m, golden_b, &desc) == DSPARK_ERROR_ARGUMENT && !m, "max_sessions -1 is refused");
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
    ok(calibrated_with(m, text, DSPARK_VERIFY_COUPLED, .6f, 4), "dspark_model_set_calibration puts another in its place");
    must(dspark_model_set_calibration(m, NULL));
    ok(calibrated_with(m, text, DSPARK_VERIFY_COUPLED, .6f, 1), "and none");
    dspark_model_close(m);
}

int main(void) {
    int32_t *text = golden_text(golden_b);
    test_crowd(golden_b, 256, 0, 300, 256);
    test_crowd(golden_b, 0, 24, 60, 30);
    test_crowd(golden_a, 64, 0, 40, 40);
    test_flat_passes(text);
    test_memory_limit(), test_memory_limit_of_model();
    test_calibration(text);
    free(text);
    return sessions_done();
}
