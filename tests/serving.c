/* >>engine with many sessions, and what it is told about costs and confidences: each of many texts is what it would
   have been alone; schedules across requests, profiles, calibrations, policies and counters are what they say. */
#include "sessions.h"
#include "tap.h"

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
    test_calibration(text);
    free(text);
    return sessions_done();
}
