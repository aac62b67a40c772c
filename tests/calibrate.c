/* tools/calibrate.c from inside: its scores against figures worked out by hand, and the cycles that it records. */
#define main calibrate_main
#include "../tools/calibrate.c"
#undef main
#include "tap.h"

static int near(double a, double b) { return fabs(a - b) < 1e-9; }

static void test_scores(void) {
    /* pairs of a prefix that stood and one that did not: right, half right, right, right */
    judged j[] = { { .1, 0, 0 }, { .4, 0, 1 }, { .4, 1, 1 }, { .9, 1, 2 } };
    const double weight[] = { 1, 1, 2 };
    double s[N_SCORES];
    score(j, 4, NULL, s);
    ok(near(s[AUC], 3.5 / 4), "AUC: the share of pairs in order, ties half");
    ok(near(s[BRIER], (.01 + .16 + .36 + .01) / 4), "the Brier score is the mean square of prediction minus outcome");
    ok(near(s[ECE], (.1 + .2 + .1) / 4), "ECE: bins' differences over all");
    score(j, 4, weight, s);
    ok(near(s[AUC], 5.5 / 6) && near(s[BRIER], .55 / 5) && near(s[ECE], (.1 + .2 + .2) / 5),
       "a prompt drawn twice counts twice");
}

static void test_resample(void) {
    double weight[50], sum = 0;
    int differ = 0;
    resample(50, 3, weight);
    for (int i = 0; i < 50; i++) sum += weight[i], differ |= weight[i] > 1;
    ok(near(sum, 50) && differ, "a resampling draws as many prompts, some more than once");
}

static void test_curve(void) {
    enum { EACH = 10, N = EACH * DSPARK_CURVE_POINTS };
    static const int stand[DSPARK_CURVE_POINTS] = { 1, 3, 2, 2, 5, 5, 6, 9, 8, 7, 6, 10 };     /* of the EACH of a bin */
    static const double risen[DSPARK_CURVE_POINTS] = { .1, 7 / 30., 7 / 30., 7 / 30., .5, .5, .6, .75, .75, .75, .75, 1 };
    double pools[4] = { .3, .2, .2, .4 };
    judged j[N];
    float said[DSPARK_CURVE_POINTS], stood[DSPARK_CURVE_POINTS];
    int is = 1;
    make_rise(pools, 4);
    ok(near(pools[0], .7 / 3) && near(pools[1], .7 / 3) && near(pools[2], .7 / 3) && near(pools[3], .4),
       "make_rise gives neighbours that fall their mean, so that values never decrease");
    for (int i = 0; i < N; i++) j[i].q = (i + .5) / N, j[i].label = i % EACH < stand[i / EACH], j[i].prompt = 0;
    fit_curve(j, N, said, stood);
    for (int b = 0; b < DSPARK_CURVE_POINTS; b++)
        is &= fabs((double)said[b] - (b + .5) / DSPARK_CURVE_POINTS) < 1e-6 && fabs((double)stood[b] - risen[b]) < 1e-6;
    ok(is, "a curve has bins of equally many cycles: the mean prediction, and the share accepted, never decreasing");
}

/* The first cycle of a prompt, by hand: raw logits, and how many drafts are what plain decoding goes on with. */
static int is_first_cycle(dspark_model *m, const text *t, const cycles *c, int i) {
    dspark_session_desc d = plain_desc(t->n + 16);
    dspark_session *s = session_open(m, &d), *plain = session_open(m, &d);
    int32_t draft[GAMMA], anchor = -1;
    float logits[GAMMA];
    int right = 0, is = 1;
    dspark_step_result r;
    must(dspark_session_append(s, t->ids, t->n)), must(dspark_session_append(plain, t->ids, t->n));
    for (int k = -1; k < c->gamma; k++) {
        must(dspark_step(&plain, 1, NULL, &r));
        if (k < 0) {    /* the first step also draws the anchor */
            anchor = r.tokens[0];
            must(dspark_session_draft(s, anchor, draft, logits, NULL));
        }
        if (right == k + 1 && k + 1 < c->gamma && r.tokens[k < 0] == draft[k + 1]) right++;
    }
    for (int k = 0; k < c->gamma; k++) is &= fabsf(c->logits[i * c->gamma + k] - logits[k]) < 1e-3f;
    dspark_session_close(s), dspark_session_close(plain);
    return is && c->accepted[i] == right;
}

static void test_record(void) {
    dspark_model *m = model_open("tools/spark-tiny/model", 1, NULL);
    texts all = texts_read(m, "bench/heldout.jsonl"), few = { NULL, 0 };
    text one_each[N_DOMAINS];
    int first[N_DOMAINS], n[N_DOMAINS] = { 0 }, is = 1;
    float raw[GAMMA];
    dspark_calibration fitted;
    cycles c = cycles_new(400, dspark_model_config(m)->dspark_block_size);
    for (int i = all.n - 1; i >= 0; i--) if (!all.t[i].is_document) one_each[domain_of(&all.t[i])] = all.t[i];
    few.t = one_each, few.n = N_DOMAINS;
    for (int k = 0; k < GAMMA; k++) raw[k] = WIDE;
    must(dspark_model_set_calibration(m, raw));
    record(m, &few, &manners[0], 2 * N_DOMAINS, &c);
    for (int i = c.n - 1; i >= 0; i--) n[c.prompt[i]]++, first[c.prompt[i]] = i;
    for (int d = 0; d < N_DOMAINS; d++) is &= n[d] == 2 && is_first_cycle(m, &few.t[d], &c, first[d]);
    ok(is, "greedy: a prompt's first cycle has the drafter's logits and the drafts that plain decoding confirms");
    record(m, &few, &manners[3], 40, &c);
    ok(c.n == 40, "drawn answers: as many cycles as asked for, from however few prompts");
    fit(&c, &fitted);
    for (int k = 0; k < c.gamma; k++) {
        judged *after = judge(&c, k, &fitted);
        double said = 0, stood = 0;
        for (int i = 0; i < c.n; i++) said += after[i].q / c.n, stood += (double)after[i].label / c.n;
        is &= fitted.sts[k] > 0 && fabs(said - stood) < .05;
        free(after);
    }
    ok(is, "a fit predicts, to .05, the share accepted at each position of the cycles it was fitted on");
    cycles_free(&c), texts_free(&all), dspark_model_close(m);
}

int main(void) {
    test_scores();
    test_resample();
    test_curve();
    test_record();
    return tap_done();
}
