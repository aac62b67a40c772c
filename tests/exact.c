/* The algorithm layer's promises: tested by exact enumeration of every path where possible, else by chi-square
   over the real generator; optimized code against plain twins. */
#define DSPARK_NO_MODEL
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "near.h"
#include "tap.h"
#include <limits.h>

enum { MAX_R = 3, MAX_V = 4, MAX_GAMMA = 7, MAX_PREFIXES = 4096, LAG = 2 };

static uint64_t dice_seed, dice_at;
static double dice(void) { return dspark_uniform(dice_seed, 0, dice_at++, 0, 0); }
static int dice_below(int n) { return (int)(dice() * n); }
static int power(int base, int n) { return n ? base * power(base, n - 1) : 1; }

/* ---- a world in which everything is a table over the request's prefix --------------------------- */

typedef struct { double target[MAX_V], draft[MAX_V], confidence; } place;
typedef struct {
    int R, V, gamma, N;                         /* requests, vocabulary, drafts a cycle, tokens of a text */
    place at[MAX_R][MAX_PREFIXES];              /* by prefix: tokens + 1 as digits in base V + 1 */
    dspark_schedule_desc desc;                  /* all but what changes from cycle to cycle */
    dspark_sps sps;
    float passes[32], threshold[MAX_R], weight[MAX_R];
    int cap[MAX_R];
    double scratch[32];
} world;

static int after(const world *w, int prefix, int token) { return prefix * (w->V + 1) + token + 1; }

/* Small integers over their sum, some of them zero. */
static void random_row(int V, double *p) {
    double sum = 0;
    for (int v = 0; v < V; v++) p[v] = dice_below(6);
    p[dice_below(V)] += 1;
    for (int v = 0; v < V; v++) sum += p[v];
    for (int v = 0; v < V; v++) p[v] /= sum;
}

/* Pass times rise at random, in steps, or by a cliff behind which further rows cost little. */
static void random_sps(world *w) {
    int kind = dice_below(3);
    double seconds = 1;
    w->sps.sps = w->passes, w->sps.n = w->R * (w->gamma + 1);
    for (int b = 0; b < w->sps.n; b++) {
        w->passes[b] = (float)(1 / seconds);
        if (kind == 2) seconds += b + 1 == w->R ? .7 * w->R : .05;
        else seconds += kind ? 1.2 * dice_below(2) : .6 * dice();
    }
}

static void random_world(world *w, int seed, int R, int V, int gamma, int N) {
    static const double sure[] = { 0, .25, .5, .8, .9, 1, 1 };
    memset(w, 0, sizeof *w);
    w->R = R, w->V = V, w->gamma = gamma, w->N = N;
    dice_seed = (uint64_t)seed, dice_at = 0;
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < MAX_PREFIXES; i++) {
            random_row(V, w->at[r][i].target);
            random_row(V, w->at[r][i].draft);
            w->at[r][i].confidence = sure[dice_below(7)];
        }
        w->threshold[r] = dice_below(2) ? .5f : .8f;
        w->weight[r] = dice_below(2) ? 1 : .5f;
        w->cap[r] = 1 + dice_below(gamma);
    }
    random_sps(w);
    w->desc.n_requests = R, w->desc.gamma = gamma, w->desc.sps = &w->sps, w->desc.scratch = w->scratch;
    w->desc.draft_us = (float)(3e5 * dice_below(2));
    if (seed % 3 == 1) w->desc.threshold = w->threshold, w->desc.weight = w->weight;
    if (seed % 3 == 2) w->desc.cap = w->cap, w->desc.other_rows = 1;
}

/* ---- every path through the cycles, with its probability ---------------------------------------- */

typedef struct {
    int cycle, length[MAX_R], prefix[MAX_R], text[MAX_R];   /* text: the first N tokens as a number */
    int had[LAG][MAX_R];                                    /* drafts of the last cycles */
    float past[LAG][MAX_R * MAX_GAMMA];                     /* and their confidences */
} state;
typedef struct { int x[MAX_R][MAX_GAMMA], lengths[MAX_R]; } plan;

static const world *W;
static int mode, one_hot;
static double joint[4096], paths, planned;      /* joint: the probability of each joint text */

static void each_draft(const state *s, double weight);

static state with(const state *s, int r, int token) {
    state now = *s;
    now.prefix[r] = after(W, s->prefix[r], token);
    if (now.length[r]++ < W->N) now.text[r] = s->text[r] * W->V + token;
    return now;
}

/* Rejection at draft i of request r: x stands with min(1, p_t / p_d), else the residual; at the end p_t. */
static void each_outcome(const plan *d, int r, int i, const state *s, double weight) {
    if (weight == 0) return;
    if (r == W->R || r == MAX_R) {      /* all requests are through */
        paths++;
        each_draft(s, weight);
        return;
    }
    if (i == 0 && s->length[r] >= W->N) {
        each_outcome(d, r + 1, 0, s, weight);
        return;
    }
    const place *here = &W->at[r][s->prefix[r]];
    double rest[MAX_V], sum = 0, stands = 0;
    int x = i < d->lengths[r] ? d->x[r][i] : -1;
    for (int v = 0; v < W->V; v++) {
        double p_d = x < 0 ? 0 : one_hot ? v == x : here->draft[v];
        rest[v] = fmax(0, here->target[v] - p_d);
        sum += rest[v];
        if (v == x) stands = fmin(1, here->target[v] / p_d);
    }
    state now = with(s, r, x);
    if (x >= 0) each_outcome(d, r, i + 1, &now, weight * stands);
    for (int v = 0; v < W->V && stands < 1; v++) {
        now = with(s, r, v);
        each_outcome(d, r + 1, 0, &now, weight * (1 - stands) * rest[v] / sum);
    }
}

/* By dspark_schedule. ASYNC: the budget comes from the confidences of LAG cycles before, from then on. */
static void schedule(const state *s, const int *n_drafted, const float *confidence, int *lengths) {
    dspark_schedule_desc d = W->desc;
    d.mode = mode == DSPARK_SCHEDULE_ASYNC && s->cycle < LAG ? DSPARK_SCHEDULE_PREFIX : mode;
    if (d.mode == DSPARK_SCHEDULE_ASYNC) {
        d.mode = DSPARK_SCHEDULE_GLOBAL, d.n_drafted = s->had[LAG - 1], d.confidence = s->past[LAG - 1];
        if (dspark_schedule(&d, lengths)) joint[0] = NAN;
        for (int r = 0; r < W->R; r++) d.budget += lengths[r];
        d.mode = DSPARK_SCHEDULE_ASYNC;
    }
    d.n_drafted = n_drafted, d.confidence = confidence;
    if (dspark_schedule(&d, lengths)) joint[0] = NAN;
}

static void each_draft(const state *s, double weight) {
    int blocks = 1, text = 0;
    for (int r = 0; r < W->R; r++) {
        if (s->length[r] < W->N) blocks *= power(W->V, W->gamma);
        text = text * power(W->V, W->N) + s->text[r];
    }
    if (blocks == 1) {
        joint[text] += weight;
        return;
    }
    for (int block = 0; block < blocks; block++) {
        plan d;
        state now = *s;
        double p = weight;
        int digits = block;
        memcpy(now.past[1], s->past[0], sizeof s->past[0]);
        memcpy(now.had[1], s->had[0], sizeof s->had[0]);
        now.cycle++;
        for (int r = 0; r < W->R; r++) {
            int prefix = s->prefix[r], n = s->length[r] < W->N ? W->gamma : 0;
            now.had[0][r] = n;
            for (int k = 0; k < n; k++, digits /= W->V) {
                d.x[r][k] = digits % W->V;
                now.past[0][r * W->gamma + k] = (float)W->at[r][prefix].confidence;     /* not of x_k */
                p *= W->at[r][prefix].draft[d.x[r][k]];
                prefix = after(W, prefix, d.x[r][k]);
            }
        }
        if (p == 0) continue;
        schedule(s, now.had[0], now.past[0], d.lengths);
        for (int r = 0; r < W->R; r++) planned += d.lengths[r] > 0;
        each_outcome(&d, 0, 0, &now, p);
    }
}

/* Largest difference of a joint text's probability from the target's. */
static double enumerate(const world *w, int schedule_mode, int deterministic_drafter) {
    double worst = 0;
    state start;
    memset(&start, 0, sizeof start);
    memset(joint, 0, sizeof joint);
    W = w, mode = schedule_mode, one_hot = deterministic_drafter, planned = 0;
    each_draft(&start, 1);
    for (int text = 0; text < power(w->V, w->N * w->R); text++) {
        double p = 1;
        int scale = power(w->V, w->N * w->R);
        for (int r = 0; r < w->R; r++)
            for (int i = 0, prefix = 0; i < w->N; i++) {
                int token = text / (scale /= w->V) % w->V;
                p *= w->at[r][prefix].target[token];
                prefix = after(w, prefix, token);
            }
        worst = worse(worst, fabs(joint[text] - p));
    }
    return worst;
}

static void check_lossless(void) {
    static const char *const names[] = { "PLAIN", "BLOCK", "THRESHOLD", "PREFIX", "ASYNC", "GLOBAL" };
    static const int shapes[6][4] = { { 1, 2, 3, 4 }, { 1, 2, 2, 4 }, { 1, 3, 2, 3 }, { 2, 2, 2, 2 },
                                      { 2, 2, 1, 3 }, { 3, 2, 1, 2 } };     /* R, V, gamma, N */
    static world w;
    double worst[6] = { 0 }, drafted[6] = { 0 }, hinted = 0, e;
    int biased = 0, worlds = 54;
    for (int seed = 0; seed < worlds; seed++) {
        const int *shape = shapes[seed % 6];
        random_world(&w, seed, shape[0], shape[1], shape[2], shape[3]);
        for (int m = 0; m < 6; m++) {
            const float *threshold = w.desc.threshold;
            if (m == DSPARK_SCHEDULE_THRESHOLD) w.desc.threshold = w.threshold;
            e = enumerate(&w, m, 0);
            worst[m] = worse(worst[m], e);
            drafted[m] += planned;
            w.desc.threshold = threshold;
        }
        biased += e > 1e-9;
        hinted = worse(hinted, enumerate(&w, DSPARK_SCHEDULE_GLOBAL, 1));
    }
    printf("# %d worlds of 1 to 3 requests, %.0f cycles\n", worlds, paths);
    for (int m = 0; m < 5; m++)
        ok(worst[m] < 1e-12 && (m == 0 || drafted[m] > 1000),
           "rejection under %s gives exactly the target's joint distribution (%.0e)", names[m], worst[m]);
    ok(worst[5] > .01 && biased > 3, "control: rejection under GLOBAL is not exact (off by up to %.2f, in %d worlds)",
       worst[5], biased);
    ok(hinted < 1e-12, "rejection of one-hot drafts (p_draft NULL) is exact even under GLOBAL");
}

/* SPS(1, 2, 3) = 1, .5, .45; p_t = (.7, .3), p_d = (.5, .5); c_1 = .8; c_2 = .9 after A, 0 after B. */
static void check_counterexample(void) {
    static world w;
    random_world(&w, 0, 1, 2, 2, 1);
    for (int i = 0; i < power(3, 3); i++) {
        place *p = &w.at[0][i];
        p->target[0] = .7, p->target[1] = .3, p->draft[0] = p->draft[1] = .5;
        p->confidence = i == 0 ? .8 : i == after(&w, 0, 0) ? .9 : 0;
    }
    w.passes[0] = 1, w.passes[1] = .5f, w.passes[2] = .45f, w.desc.draft_us = 0;
    enumerate(&w, DSPARK_SCHEDULE_PREFIX, 0);
    ok(fabs(joint[0] - .7) < 1e-12, "the paper's counterexample: PREFIX emits A with probability .70 (%.2f)", joint[0]);
    enumerate(&w, DSPARK_SCHEDULE_GLOBAL, 0);
    ok(fabs(joint[0] - .85) < 1e-12, "control: without the stop, GLOBAL emits A with probability .85 (%.2f)", joint[0]);
}

/* ---- dspark_verify ------------------------------------------------------------------------------ */

static dspark_verify_desc verify_desc(int how, const float *p, const float *q, const int32_t *x, int n,
                                      int vocab) {
    dspark_verify_desc d;
    memset(&d, 0, sizeof d);
    d.mode = how, d.p_target = p, d.p_draft = q, d.draft = x, d.n = n, d.vocab = vocab;
    return d;
}

/* A row in sixteenths: residuals are exact in float, so dspark_draw may draw from them. */
static void sixteenths(int n, float *p) {
    memset(p, 0, (size_t)n * sizeof *p);
    for (int i = 0; i < 16; i++) p[dice_below(n)] += .0625f;
}

static void check_decisions(void) {
    enum { V = 5, N = 3 };
    int bad = 0, rejected = 0;
    dice_seed = 77;
    for (uint64_t cycle = 0; cycle < 20000; cycle++) {
        float p[N + 1][V], q[N][V], rest[V];
        int32_t x[N], token, expected = -1;
        int n_accepted, i, hint = cycle % 4 == 0;
        for (i = 0; i <= N; i++) sixteenths(V, p[i]);
        for (i = 0; i < N; i++) {
            sixteenths(V, q[i]);
            dspark_draw(q[i], V, 9, DSPARK_DRAW_DRAFT, cycle, i, &x[i]);
        }
        dspark_verify_desc d = verify_desc(DSPARK_VERIFY_REJECTION, p[0], hint ? NULL : q[0], x, N, V);
        d.seed = 9, d.cycle = cycle;
        for (i = 0; i < N; i++) {
            double p_d = hint ? 1 : (double)q[i][x[i]];
            if (!(dspark_uniform(9, DSPARK_DRAW_ACCEPT, cycle, i, 0) * p_d < (double)p[i][x[i]])) break;
        }
        for (int v = 0; v < V; v++)
            rest[v] = fmaxf(0, p[i][v] - (i == N ? 0 : hint ? (float)(v == x[i]) : q[i][v]));
        dspark_draw(rest, V, 9, DSPARK_DRAW_NEXT, cycle, i, &expected);
        bad += dspark_verify(&d, &n_accepted, &token) || n_accepted != i || token != expected;
        rejected += i < N;
    }
    ok(!bad && rejected > 1000, "dspark_verify decides as was enumerated: u p_d < p_t, then the residual");
}

/* Target and draft rows are one-hot; the target says 1, 2, 3 ..., and so do the first `good` drafts. */
static void check_trace(void) {
    enum { V = 12 };
    int bad = 0;
    for (int gamma = 1; gamma <= 7; gamma++)
        for (int good = 0; good <= gamma; good++)
            for (int how = 0; how < 4; how++) {     /* 3: rejection with p_draft NULL */
                float p[8 * V] = { 0 }, q[7 * V] = { 0 };
                int32_t x[7], next = -9;
                int n = -9;
                for (int i = 0; i <= gamma; i++) p[i * V + i + 1] = 1;
                for (int i = 0; i < gamma; i++) x[i] = i < good ? i + 1 : i + 3, q[i * V + x[i]] = 1;
                dspark_verify_desc d = verify_desc(how < 3 ? how : 1, p, how < 3 ? q : NULL, x, gamma, V);
                bad += dspark_verify(&d, &n, &next) || n != good || next != good + 1;
            }
    ok(!bad, "gamma 1..7, every accepted count, every verifier: the right replacement, the right bonus");
}

static const float bad_values[] = { NAN, HUGE_VALF, -HUGE_VALF, -.25f, 0 };     /* 0: no mass */

/* Row `row` of p_target, or (b >= 5) of p_draft, is spoilt. */
static int bad_row_is_caught(int how, int good, int row, int b) {
    enum { V = 4, N = 3 };
    float p[(N + 1) * V] = { 0 }, q[N * V] = { 0 };
    float *spoilt = b < 5 ? p + row * V : row < N ? q + row * V : NULL;
    int32_t x[N], next = -9;
    int n = -9, reached = row <= good && (b < 5 || (row < N && how == DSPARK_VERIFY_REJECTION));
    for (int i = 0; i <= N; i++) p[i * V + 1] = 1;
    for (int i = 0; i < N; i++) x[i] = i < good ? 1 : 2, q[i * V + x[i]] = 1;
    if (spoilt && b % 5 == 4) memset(spoilt, 0, V * sizeof *spoilt);
    else if (spoilt) spoilt[3] = bad_values[b % 5];
    dspark_verify_desc d = verify_desc(how, p, q, x, N, V);
    dspark_status status = dspark_verify(&d, &n, &next);
    return reached ? status == DSPARK_ERROR_NUMERIC && n == row && next == -1
                   : status == DSPARK_OK && n == good && next == 1;
}

static void check_bad_rows(void) {
    int missed = 0;
    for (int i = 0; i < 3 * 160; i++) missed += !bad_row_is_caught(i / 160, i / 40 % 4, i / 10 % 4, i % 10);
    ok(!missed, "a row with NaN, infinity, negative or no mass is NUMERIC if it is reached, and only then");
    missed = 0;
    for (int b = 0; b < 5; b++) {
        float p[4] = { .5f, .5f, 0, bad_values[b] }, z[4] = { 0, 1, -HUGE_VALF, bad_values[b] };
        int32_t token = -9;
        if (b == 4) p[0] = p[1] = 0;
        if (b >= 2) z[0] = z[1] = z[3] = -HUGE_VALF;
        missed += dspark_draw(p, 4, 1, DSPARK_DRAW_PLAIN, 0, 0, &token) != DSPARK_ERROR_NUMERIC || token >= 0;
        for (int t = 0; t < 2; t++)
            missed += dspark_distribution(z, 4, (float)t, 0, 0, 0, p) != DSPARK_ERROR_NUMERIC;
    }
    ok(!missed, "dspark_draw draws no token from such a row, dspark_distribution refuses such logits: NUMERIC");
}

/* ---- texts from the real generator -------------------------------------------------------------- */

static const float *float_row(const double *p, int n, float *out) {
    for (int v = 0; v < n; v++) out[v] = (float)p[v];
    return out;
}

/* A bigram world: a row depends on the token before. Request 0 is checked, the others only share its schedule.
   Mode, drafter and confidences (which here know x_k) vary. */
static int coupled_text_is_plain(const world *w, int seed) {
    enum { LENGTH = 12, ROOM = LENGTH + MAX_GAMMA + 1 };
    const place *bigram = w->at[0] + 1;
    int32_t plain[ROOM + 1], text[ROOM + 1], next;
    int n = 0, accepted, start = seed % 3 ? 5 * seed : INT_MAX - 40, lengths[MAX_R], same = 1;
    float row[MAX_V], rows[(MAX_GAMMA + 1) * MAX_V], c[MAX_R * MAX_GAMMA];
    dspark_schedule_desc d = w->desc;
    d.mode = seed % 6, d.confidence = c;
    plain[0] = text[0] = -1;                            /* [i + 1] is token i */
    for (int i = 0; i < ROOM; i++)
        dspark_draw(float_row(bigram[plain[i]].target, w->V, row), w->V, (uint64_t)seed, DSPARK_DRAW_PLAIN,
                    (uint64_t)start + (uint64_t)i, 0, &plain[i + 1]);
    for (uint64_t cycle = 0; n < LENGTH; cycle++) {
        for (int k = 0; k < w->gamma; k++) {            /* drafts straight behind the text */
            int at = n + k, coupled = seed % 4 == 0;
            dspark_draw(float_row(bigram[text[at]].draft, w->V, row), w->V, (uint64_t)seed,
                        coupled ? DSPARK_DRAW_PLAIN : DSPARK_DRAW_DRAFT,
                        coupled ? (uint64_t)start + (uint64_t)at : cycle, coupled ? 0 : k, &text[at + 1]);
            if (seed % 4 == 1) text[at + 1] = dice_below(w->V);
            if (seed % 4 == 2 && dice() < .9) text[at + 1] = plain[at + 1];
        }
        for (int i = 0; i < w->R * w->gamma; i++)
            c[i] = i < w->gamma ? (float)bigram[text[n + i + 1]].confidence : (float)dice();
        d.budget = dice_below(8);
        if (dspark_schedule(&d, lengths)) return 0;
        for (int i = 0; i <= lengths[0]; i++) float_row(bigram[text[n + i]].target, w->V, rows + i * w->V);
        dspark_verify_desc v = verify_desc(DSPARK_VERIFY_COUPLED, rows, NULL, text + n + 1, lengths[0], w->V);
        v.position = start + n, v.seed = (uint64_t)seed, v.cycle = cycle;
        if (dspark_verify(&v, &accepted, &next)) return 0;
        n += accepted + 1;
        text[n] = next;
    }
    for (int i = 1; i <= LENGTH; i++) same &= text[i] == plain[i];
    return same;
}

static void check_coupled(void) {
    static world w;
    int same = 0;
    for (int seed = 0; seed < 300; seed++) {
        random_world(&w, 1000 + seed, 1 + seed % MAX_R, 2 + seed % 3, 1 + seed % 7, 1);
        same += coupled_text_is_plain(&w, seed);
    }
    ok(same == 300, "coupled: plain sampling's text under any schedule and drafter (%d of 300)", same);
}

/* Rows by prefix, as the sampler's options leave them; s_drawn: what drafts are really drawn from. */
enum { SV = 4, SGAMMA = 2, SPREFIXES = 3125 };
static float s_target[SPREFIXES][SV], s_draft[SPREFIXES][SV], s_drawn[SPREFIXES][SV];
static world s_world;

/* The first three tokens, as a number, of cycles with two drafts each; -1: an error. */
static int sampled_text(int how, uint64_t seed) {
    int prefix = 0, length = 0, text = 0, n, coupled = how == DSPARK_VERIFY_COUPLED;
    for (uint64_t cycle = seed % 7; length < 3; cycle++) {
        float p[SGAMMA + 1][SV], q[SGAMMA][SV];
        int32_t x[SGAMMA + 1], next;
        int at = prefix;
        for (int i = 0; i <= SGAMMA; i++) {
            memcpy(p[i], s_target[at], sizeof p[i]);
            if (i == SGAMMA) break;
            memcpy(q[i], s_draft[at], sizeof q[i]);
            dspark_draw(s_drawn[at], SV, seed, coupled ? DSPARK_DRAW_PLAIN : DSPARK_DRAW_DRAFT,
                        coupled ? (uint64_t)(length + i) : cycle, coupled ? 0 : i, &x[i]);
            at = after(&s_world, at, x[i]);
        }
        dspark_verify_desc d = verify_desc(how, p[0], q[0], x, SGAMMA, SV);
        d.seed = seed, d.cycle = cycle, d.position = length;
        if (dspark_verify(&d, &n, &next)) return -1;
        x[n] = next;
        for (int i = 0; i <= n && length < 3; i++, length++) {
            text = text * SV + x[i];
            prefix = after(&s_world, prefix, x[i]);
        }
    }
    return text;
}

/* How far the counts of n joint texts are from the target's, in sigmas of chi-square. */
static double chi_square(int how, int n) {
    int counts[SV * SV * SV] = { 0 }, freedom = -1;
    double x = 0;
    for (int i = 0; i < n; i++) {
        int text = sampled_text(how, (uint64_t)i * 0x9E3779B97F4A7C15u);
        if (text < 0) return HUGE_VAL;
        counts[text]++;
    }
    for (int text = 0; text < SV * SV * SV; text++) {
        int a = text / SV / SV, b = text / SV % SV, c = text % SV, after_a = after(&s_world, 0, a);
        double p = (double)s_target[0][a] * (double)s_target[after_a][b];
        double expected = n * p * (double)s_target[after(&s_world, after_a, b)][c];
        if (expected == 0 && counts[text]) return HUGE_VAL;
        if (expected > 0) x += (counts[text] - expected) * (counts[text] - expected) / expected, freedom++;
    }
    return (x - freedom) / sqrt(2.0 * freedom);
}

static void check_samplers(void) {
    static const struct { const char *name; float temperature; int top_k; float top_p, min_p; } options[] = {
        { "temperature .7", .7f, 0, 0, 0 }, { "temperature 1.5", 1.5f, 0, 0, 0 }, { "top-k 2", 1, 2, 0, 0 },
        { "top-p .8", 1, 0, .8f, 0 }, { "min-p .2", 1, 0, 0, .2f }, { "all together", .9f, 3, .9f, .1f },
        { "temperature 1", 1, 0, 0, 0 } };
    double z;
    s_world.V = SV;
    for (int o = 0; o < 7; o++) {
        float t = options[o].temperature, top_p = options[o].top_p, min_p = options[o].min_p, a[SV], b[SV];
        dice_seed = 4, dice_at = 0;
        for (int i = 0; i < SPREFIXES; i++) {
            for (int v = 0; v < SV; v++) a[v] = (float)(5 * dice()), b[v] = a[v] + (float)(2 * dice());
            dspark_distribution(a, SV, t, options[o].top_k, top_p, min_p, s_target[i]);
            dspark_distribution(b, SV, t, options[o].top_k, top_p, min_p, s_draft[i]);
        }
        memcpy(s_drawn, s_draft, sizeof s_drawn);
        for (int how = 0; how < 2; how++) {
            z = chi_square(how, 20000);
            ok(fabs(z) < 4, "%s, %s: the joint of three tokens is the target's (chi-square %+.1f sigma)",
               how ? "rejection" : "coupled", options[o].name, z);
        }
    }
    memcpy(s_drawn, s_target, sizeof s_drawn);
    z = chi_square(DSPARK_VERIFY_REJECTION, 20000);
    ok(z > 10, "control: drafts drawn from another row than p_draft are noticed (%+.0f sigma)", z);
}

/* ---- plain twins -------------------------------------------------------------------------------- */

static void check_draw(void) {
    enum { V = 300 };
    int bad = 0;
    for (uint64_t at = 0; at < 3000; at++) {
        float p[V] = { 0 };
        double best = 0;
        int32_t token = -1, winner = -1;
        int n = 1 + dice_below(V);
        for (int v = 0; v < n; v++) {
            double u = dice();
            if (at % 4 == 1) u = u < .005 ? 1 : 3e-4;
            if (at % 4 == 2) u = dspark__exp(-100 * u);
            if (at % 4 == 3) u = ldexp(u, 20 * (v & 7) - 149);
            p[v] = (float)u;
        }
        p[dice_below(n)] += 1e-3f;
        for (int v = 0; v < n; v++) {
            double u = dspark_uniform(3, DSPARK_DRAW_NEXT, at, 2, (uint32_t)v);
            double score = (double)p[v] / -dspark__log(u);
            if (score > best) best = score, winner = v;
        }
        bad += dspark_draw(p, n, 3, DSPARK_DRAW_NEXT, at, 2, &token) || token != winner;
    }
    ok(!bad, "dspark_draw: a log for every token finds no other winner");
}

static float z[700], p[700];
static int by_logit(const void *a, const void *b) {
    int i = *(const int *)a, j = *(const int *)b;
    return z[i] != z[j] ? (z[i] < z[j] ? 1 : -1) : i - j;
}

static int filtered_as_sorted(int n, float t, int top_k, float top_p, float min_p) {
    int order[700], kept = top_k > 0 && top_k < n ? top_k : n, last = 0, same = 1;
    double e[700], sum = 0, before = 0;
    for (int v = 0; v < n; v++) order[v] = v;
    qsort(order, (size_t)n, sizeof *order, by_logit);
    for (int i = 0; i < n; i++) e[i] = dspark__exp(((double)z[order[i]] - (double)z[order[0]]) / (double)t);
    for (int i = 0; i < kept; i++) sum += e[i];
    for (; last < kept && e[last] >= (double)min_p; before += e[last++])
        if (top_p > 0 && !(before < (double)top_p * sum)) break;
    if (dspark_distribution(z, n, t, top_k, top_p, min_p, p)) return 0;
    for (int i = 0; i < n; i++) {
        double expected = i < last ? (double)(float)(e[i] / before) : 0;
        same &= fabs((double)p[order[i]] - expected) <= 1.2e-7 * expected;
    }
    return same;
}

static void check_filters(void) {
    int bad = 0;
    for (int trial = 0; trial < 1500; trial++) {
        int n = 1 + dice_below(700), top_k = dice_below(2) ? dice_below(n + 3) : 0;
        float t = (float)(.1 + dice()), top_p = dice_below(2) ? (float)dice() : 0;
        float min_p = dice_below(2) ? (float)(.2 * dice()) : 0;
        for (int v = 0; v < n; v++) {
            double logit = 24 * dice() - 12;
            z[v] = (float)(trial % 3 ? logit : ceil(logit / 3));    /* then with ties */
            if (z[v] == 0) z[v] = v % 2 ? -0.f : 0.f;
            if (trial % 5 == 0 && v && dice() < .3) z[v] = -HUGE_VALF;
        }
        bad += !filtered_as_sorted(n, t, top_k, top_p, min_p);
    }
    ok(!bad, "dspark_distribution keeps what a full sort keeps: top-k, top-p, min-p, ties, -0 and -inf");
}

/* Steps at 4 and 13 rows: the maximum of theta, by trying every count, lies behind the first. */
static void check_staircase(void) {
    enum { R = 3, GAMMA = 7, ROWS = R * (GAMMA + 1) };
    static world w;
    double best_theta = 0, tau = R;
    float c[R * GAMMA], sps[ROWS];
    int lengths[R], total[2] = { 0, 0 }, best = 0;
    for (int b = 0; b < ROWS; b++) sps[b] = (float)(1e6 / (b < 3 ? 100 : b < 12 ? 220 : 900));
    for (int i = 0; i < R * GAMMA; i++) c[i] = .9f;
    w.sps.sps = sps, w.sps.n = ROWS;
    w.desc.confidence = c, w.desc.n_requests = R, w.desc.gamma = GAMMA;
    w.desc.sps = &w.sps, w.desc.scratch = w.scratch;
    for (int i = 0; i < 2; i++) {
        w.desc.mode = i ? DSPARK_SCHEDULE_GLOBAL : DSPARK_SCHEDULE_PREFIX;
        dspark_schedule(&w.desc, lengths);
        for (int r = 0; r < R; r++) total[i] += lengths[r];
    }
    for (int n = 0; n <= R * GAMMA; n++) {
        if (n) tau += pow(.9, 1 + (n - 1) / R);
        if (tau * (double)sps[R + n - 1] > best_theta) best_theta = tau * (double)sps[R + n - 1], best = n;
    }
    ok(total[0] == 0 && best == 9 && total[1] == best,
       "on a staircase PREFIX stops at the first step (%d), GLOBAL at the maximum (%d)", total[0], total[1]);
}

/* ---- calibration, account, bits ----------------------------------------------------------------- */

static void check_sts(void) {
    enum { N = 8000, GAMMA = 3 };
    static float logits[N * GAMMA], grid[65], t[2][GAMMA];
    static int accepted[N];
    static double scratch[2 * N], before[GAMMA], fitted[GAMMA];
    dspark_sts_desc d;
    int good = 1;
    for (int g = 0; g < 65; g++) grid[g] = (float)pow(2, (g - 32) / 16.0);
    for (int i = 0; i < N; i++)
        for (int k = 0, stands = 1; k < GAMMA; k++) {
            float logit = (float)(6 * dice() - 2);
            logits[i * GAMMA + k] = 2 * logit;                  /* twice too sure of itself */
            stands &= dice() < dspark_sts_apply(logit, 1);
            accepted[i] += stands;
        }
    memset(&d, 0, sizeof d);
    d.logits = logits, d.accepted = accepted, d.n_cycles = N, d.gamma = GAMMA, d.scratch = scratch;
    good &= !dspark_sts_fit(&d, t[0], before, fitted);
    d.grid = grid, d.n_grid = 65, d.n_bins = 20;
    good &= !dspark_sts_fit(&d, t[1], NULL, NULL) && !memcmp(t[0], t[1], sizeof t[0]);
    ok(good, "sts: grid NULL and 0 bins mean 2^((g-32)/16) and 20");
    for (int k = 0; k < GAMMA; k++)
        good &= t[0][k] > 1.6f && t[0][k] < 2.5f && fitted[k] < .02 && fitted[k] < before[k];
    ok(good, "sts: logits twice too large get T near 2 (%.2f %.2f %.2f), and an ECE below 2 %%",
       (double)t[0][0], (double)t[0][1], (double)t[0][2]);
}

/* Drafters: hopeless; perfect, then hopeless; so in turns; filling the bucket to lose it; random. Cycles that break a
   bound, and that draft; `asking`: only when the account affords it. */
typedef struct { int over, stretch, negative, drafted; } breaches;
static breaches run_accounts(int asking) {
    breaches b = { 0, 0, 0, 0 };
    for (int trial = 0; trial < 400; trial++) {
        dspark_account a;
        int gamma = 1 + dice_below(7), drafter = trial % 5;
        double P = 10 + 90 * dice(), draft_us = P * dice(), us[8] = { P }, worst, excess = 0, low = 0;
        for (int l = 1; l <= gamma; l++) us[l] = us[l - 1] + P * dice() * (l % 3 ? .1 : .8);
        worst = draft_us + us[gamma];
        dspark_account_open(&a, P, worst);
        for (int step = 0; step < 2000; step++) {
            int l = drafter == 4 ? dice_below(gamma + 1) : gamma, tau = 1;
            int lucky = drafter == 1 ? step < 700 : drafter == 2 ? step % 2
                      : drafter == 3 && step / 200 % 2 && a.balance_us < a.limit_us / 2;
            double cost = P;
            if (dspark_account_affords(&a, P, worst) || !asking) {
                tau = drafter == 4 ? 1 + dice_below(l + 1) : lucky ? l + 1 : 1;
                cost = draft_us + us[l], b.drafted++;
            }
            dspark_account_settle(&a, P, cost, tau);
            excess += cost - 1.01 * P * tau;                    /* time - 1.01 plain, so far */
            low = fmin(low, excess);
            b.over += excess > worst - P + 1e-9 * worst * step;
            b.stretch += excess - low > 16 * (worst - P) + 1e-9 * worst * step;
            b.negative += !(a.balance_us >= -1e-9 * worst);
        }
    }
    return b;
}
static void check_account(void) {
    breaches b = run_accounts(1), reckless = run_accounts(0);
    ok(!b.over, "never slower: after any number of cycles time <= 1.01 plain + one cycle's worst loss");
    ok(!b.stretch, "never slower: over any stretch of text time <= 1.01 plain + 16 worst losses");
    ok(!b.negative, "never slower: the balance never falls below 0");
    ok(b.drafted > 300000, "and yet cycles draft: %d of 800000", b.drafted);
    ok(reckless.over > 300000 && reckless.stretch > 300000 && reckless.negative > 300000,
       "control: without asking the account cycles break all three bounds (%d, %d, %d)", reckless.over,
       reckless.stretch, reckless.negative);
}

static uint64_t hashed;
static void hash(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    for (int i = 0; i < 64; i += 8) hashed = (hashed ^ (bits >> i & 255)) * 0x100000001B3u;
}

static void check_bits(void) {
    hashed = 0xCBF29CE484222325u;
    dice_seed = 1, dice_at = 0;
    for (int trial = 0; trial < 200; trial++) {
        int32_t token = -1;
        for (int v = 0; v < 700; v++) z[v] = (float)(20 * dice());
        dspark_distribution(z, 700, (float)(.3 + dice()), trial % 2 * 50, trial % 3 ? .9f : 0,
                            trial % 5 ? 0 : .01f, p);
        dspark_draw(p, 700, 1, DSPARK_DRAW_PLAIN, (uint64_t)trial, 0, &token);
        for (int v = 0; v < 700; v++) hash((double)p[v]);
        hash(token);
        for (int i = 0; i < 50; i++) {
            double x = dice() - .5, s, c;
            dspark__sincos(2e6 * x, &s, &c);
            hash(s), hash(c), hash(dspark__exp(1500 * x));
            hash(dspark__log(ldexp(fabs(x), 10 * trial - 1000)));
        }
    }
    ok(hashed == 0x7134d8fa4988a6c3u,
       "distributions, draws, exp, log, sin and cos have the bits of every machine (%016llx)",
       (unsigned long long)hashed);
}

int main(void) {
    check_lossless();
    check_counterexample();
    check_decisions();
    check_trace();
    check_bad_rows();
    check_coupled();
    check_samplers();
    check_draw();
    check_filters();
    check_staircase();
    check_sts();
    check_account();
    check_bits();
    return tap_done();
}
