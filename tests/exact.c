/* What the algorithm layer promises, shown exactly where it can be and by chi-square where it cannot:
   lossless schedules, verifiers, sampler options, rows that are no distribution, the never-slower account. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "tap.h"

/* ---- a world in which everything is a table over a request's prefix ------------------------------------ */

enum { MAX_R = 2, MAX_V = 4, MAX_GAMMA = 7, MAX_PREFIXES = 1 << 15 };
typedef struct { double target[MAX_V], draft[MAX_V], confidence; } place;
typedef struct {
    int R, V, gamma, N;                         /* requests, vocabulary, drafts a cycle, tokens of a text */
    place at[MAX_R][MAX_PREFIXES];              /* by prefix: tokens + 1 as digits in base V + 1 */
    dspark_schedule_desc desc;                  /* all but what changes from cycle to cycle */
    dspark_sps sps;
    float us[32], threshold[MAX_R], weight[MAX_R];
    int cap[MAX_R];
} world;

static uint64_t dice_seed, dice_at;
static double dice(void) { return dspark_uniform(dice_seed, 0, dice_at++, 0, 0); }
static int dice_below(int n) { return (int)(dice() * n); }

static int power(int base, int n) { return n ? base * power(base, n - 1) : 1; }
static int after(const world *w, int prefix, int token) { return prefix * (w->V + 1) + token + 1; }

/* Small integers over their sum, some of them zero. */
static void random_row(int V, double *p) {
    double sum = 0;
    for (int v = 0; v < V; v++) p[v] = dice_below(6);
    p[dice_below(V)] += 1;
    for (int v = 0; v < V; v++) sum += p[v];
    for (int v = 0; v < V; v++) p[v] /= sum;
}

static void set_sps(world *w, const double *pass_us, int n) {
    for (int b = 0; b < n; b++) w->us[b] = (float)(1e6 / pass_us[b]);
    w->sps.sps = w->us, w->sps.n = n, w->desc.sps = &w->sps;
}

/* Pass times that rise at random, in steps, or by a cliff behind which many rows cost little. */
static void random_sps(world *w) {
    double t = 1e6, us[32];
    int kind = dice_below(3), rows = w->R * (w->gamma + 1);
    for (int b = 0; b < rows; b++) {
        us[b] = t;
        t += 1e6 * (kind == 0 ? dice() * .6 : kind == 1 ? 1.2 * dice_below(2) : b + 1 == w->R ? .7 * w->R : .05);
    }
    set_sps(w, us, rows);
}

static void random_world(world *w, int seed, int R, int V, int gamma, int N) {
    static const double sure[] = { 0, .25, .5, .8, .9, 1, 1 };
    memset(w, 0, sizeof *w);
    w->R = R, w->V = V, w->gamma = gamma, w->N = N;
    dice_seed = (uint64_t)seed, dice_at = 0;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < power(V + 1, N + gamma) && i < MAX_PREFIXES; i++) {
            random_row(V, w->at[r][i].target);
            random_row(V, w->at[r][i].draft);
            w->at[r][i].confidence = sure[dice_below(7)];
        }
    random_sps(w);
    w->desc.draft_us = (float)(3e5 * dice_below(2));
    for (int r = 0; r < R; r++) {
        w->threshold[r] = dice_below(2) ? .5f : 0, w->weight[r] = dice_below(2) ? 1 : .5f;
        w->cap[r] = 1 + dice_below(gamma);
    }
    if (seed % 3 == 1) w->desc.threshold = w->threshold, w->desc.weight = w->weight;
    if (seed % 3 == 2) w->desc.cap = w->cap, w->desc.other_rows = 1;
}

/* ---- every path through the cycles, with its probability ------------------------------------------------ */

enum { LAG = 2 };       /* ASYNC: the budget comes from confidences so many cycles old */
typedef struct {
    int length[MAX_R], prefix[MAX_R], text[MAX_R];      /* text: the first N tokens as a number */
    int cycle, had[LAG][MAX_R];
    float past[LAG][MAX_R][MAX_GAMMA];
} state;

static const world *W;
static int mode, one_hot;
static double joint[4096];      /* probability of each joint text */
static double paths;

static void each_draft(const state *s, double weight);

static void push(state *s, int r, int token) {
    s->prefix[r] = after(W, s->prefix[r], token);
    if (s->length[r]++ < W->N) s->text[r] = s->text[r] * W->V + token;
}

/* Rejection: x stands with min(1, p_t / p_d), else the residual; after all of them the bonus. */
static void each_outcome(const state *s, const int lengths[], int x[][MAX_GAMMA], int r, int i, state *now, double weight) {
    if (weight == 0) return;
    if (r == W->R) {
        paths++;
        each_draft(now, weight);
        return;
    }
    if (s->length[r] >= W->N) {
        each_outcome(s, lengths, x, r + 1, 0, now, weight);
        return;
    }
    const place *here = &W->at[r][now->prefix[r]];
    double rest[MAX_V], sum = 0, stands = 0;
    for (int v = 0; v < W->V; v++) rest[v] = here->target[v];
    if (i < lengths[r]) {
        int t = x[r][i];
        for (int v = 0; v < W->V; v++) rest[v] = fmax(0, rest[v] - (one_hot ? v == t : here->draft[v]));
        stands = fmin(1, here->target[t] / (one_hot ? 1 : here->draft[t]));
        state next = *now;
        push(&next, r, t);
        each_outcome(s, lengths, x, r, i + 1, &next, weight * stands);
    }
    for (int v = 0; v < W->V; v++) sum += rest[v];
    for (int v = 0; v < W->V && stands < 1; v++) {
        state next = *now;
        push(&next, r, v);
        each_outcome(s, lengths, x, r + 1, 0, &next, weight * (1 - stands) * rest[v] / sum);
    }
}

/* Lengths from dspark_schedule, for the requests that are not done. */
static void schedule(const state *s, const float c[][MAX_GAMMA], int *lengths) {
    static char scratch[4096];
    dspark_schedule_desc d = W->desc;
    float confidence[MAX_R * MAX_GAMMA], threshold[MAX_R], weight[MAX_R];
    int cap[MAX_R], n_drafted[MAX_R], who[MAX_R], found[MAX_R], n = 0;
    for (int r = 0; r < W->R; r++) if (s->length[r] < W->N) who[n++] = r;
    d.n_requests = n, d.gamma = W->gamma, d.confidence = confidence, d.scratch = scratch, d.mode = mode;
    for (int j = 0; j < n; j++) {
        threshold[j] = W->threshold[who[j]], weight[j] = W->weight[who[j]], cap[j] = W->cap[who[j]];
        for (int k = 0; k < W->gamma; k++) confidence[j * W->gamma + k] = s->past[LAG - 1][who[j]][k];
        n_drafted[j] = s->had[LAG - 1][who[j]] ? W->gamma : 0;
    }
    if (d.threshold) d.threshold = threshold;
    if (d.weight) d.weight = weight;
    if (d.cap) d.cap = cap;
    if (mode == DSPARK_SCHEDULE_ASYNC && s->cycle < LAG) d.mode = DSPARK_SCHEDULE_PREFIX;
    if (d.mode == DSPARK_SCHEDULE_ASYNC) {
        d.mode = DSPARK_SCHEDULE_GLOBAL, d.n_drafted = n_drafted;
        if (dspark_schedule(&d, found)) joint[0] = NAN;
        for (int j = 0; j < n; j++) d.budget += found[j];
        d.mode = DSPARK_SCHEDULE_ASYNC, d.n_drafted = NULL;
    }
    for (int j = 0; j < n; j++)
        for (int k = 0; k < W->gamma; k++) confidence[j * W->gamma + k] = c[who[j]][k];
    if (dspark_schedule(&d, found)) joint[0] = NAN;
    for (int j = 0; j < n; j++) lengths[who[j]] = found[j];
}

static void each_draft(const state *s, double weight) {
    int blocks = power(W->V, W->gamma), all = 1, text = 0, lengths[MAX_R] = { 0 }, x[MAX_R][MAX_GAMMA];
    float c[MAX_R][MAX_GAMMA];
    for (int r = 0; r < W->R; r++) {
        if (s->length[r] < W->N) all *= blocks;
        text = text * power(W->V, W->N) + s->text[r];
    }
    if (all == 1) {
        joint[text] += weight;
        return;
    }
    for (int block = 0; block < all; block++) {
        double p = weight;
        state now = *s;
        int digits = block;
        now.cycle++;
        memmove(now.past[1], now.past[0], sizeof now.past[0]);
        memmove(now.had[1], now.had[0], sizeof now.had[0]);
        for (int r = 0; r < W->R; r++) {
            int prefix = s->prefix[r];
            now.had[0][r] = s->length[r] < W->N;
            for (int k = 0; k < W->gamma && now.had[0][r]; k++, digits /= W->V) {
                x[r][k] = digits % W->V;
                c[r][k] = now.past[0][r][k] = (float)W->at[r][prefix].confidence;   /* knows x_1 .. x_{k-1} */
                p *= W->at[r][prefix].draft[x[r][k]];
                prefix = after(W, prefix, x[r][k]);
            }
        }
        if (p == 0) continue;
        schedule(s, (const float (*)[MAX_GAMMA])c, lengths);
        each_outcome(s, lengths, x, 0, 0, &now, p);
    }
}

/* Largest difference of a joint text's probability from the target's. */
static double enumerate(const world *w, int schedule_mode, int deterministic_drafter) {
    double worst = 0;
    state start;
    int texts = power(w->V, w->N * w->R);
    memset(&start, 0, sizeof start);
    memset(joint, 0, sizeof joint);
    W = w, mode = schedule_mode, one_hot = deterministic_drafter;
    each_draft(&start, 1);
    for (int text = 0; text < texts; text++) {
        double p = 1;
        for (int r = 0, rest = text; r < w->R; r++) {
            int prefix = 0, scale = power(w->V, w->N * (w->R - r) - 1);
            for (int i = 0; i < w->N; i++, scale /= w->V) {
                int token = rest / scale % w->V;
                p *= w->at[r][prefix].target[token];
                prefix = after(w, prefix, token);
            }
        }
        if (!(fabs(joint[text] - p) <= worst)) worst = fabs(joint[text] - p);
    }
    return worst;
}

static void check_lossless(void) {
    static const char *const names[] = { "PLAIN", "BLOCK", "THRESHOLD", "PREFIX", "ASYNC", "GLOBAL" };
    static const int shapes[][4] = { { 1, 2, 3, 4 }, { 1, 2, 2, 4 }, { 1, 3, 2, 3 }, { 2, 2, 2, 2 }, { 2, 2, 1, 3 } };
    static world w;
    double worst[6] = { 0 }, hinted = 0;
    int biased = 0, worlds = 0;
    for (int seed = 0; seed < 30; seed++) {
        const int *shape = shapes[seed % 5];
        random_world(&w, seed, shape[0], shape[1], shape[2], shape[3]);
        for (int m = 0; m < 6; m++) {
            if (m == DSPARK_SCHEDULE_THRESHOLD) w.desc.threshold = w.threshold;
            double e = enumerate(&w, m, 0);
            if (!(e <= worst[m])) worst[m] = e;
            if (m == DSPARK_SCHEDULE_GLOBAL) biased += e > 1e-9;
        }
        hinted = fmax(hinted, enumerate(&w, DSPARK_SCHEDULE_GLOBAL, 1));
        worlds++;
    }
    printf("# %d worlds, %.0f paths, largest difference %.1e\n", worlds, paths, worst[DSPARK_SCHEDULE_ASYNC]);
    for (int m = 0; m < 5; m++)
        ok(worst[m] < 1e-12, "rejection under %s gives exactly the target's joint distribution", names[m]);
    ok(worst[DSPARK_SCHEDULE_GLOBAL] > .01 && biased > 3,
       "control: rejection under GLOBAL does not (%d worlds of %d, by up to %.2f)", biased, worlds, worst[5]);
    ok(hinted < 1e-12, "rejection of one-hot drafts (p_draft NULL) is exact even under GLOBAL");
}

/* SPS(1, 2, 3) = 1, .5, .45; p_t = (.7, .3), p_d = (.5, .5); c_1 = .8; c_2 = .9 after A, 0 after B. */
static void check_counterexample(void) {
    static world w;
    const double us[] = { 1e6, 2e6, 1e6 / .45 };
    random_world(&w, 0, 1, 2, 2, 1);
    for (int i = 0; i < power(3, 3); i++) {
        place *p = &w.at[0][i];
        p->target[0] = .7, p->target[1] = .3, p->draft[0] = p->draft[1] = .5;
        p->confidence = i == 0 ? .8 : i == after(&w, 0, 0) ? .9 : 0;
    }
    set_sps(&w, us, 3);
    w.desc.draft_us = 0;
    enumerate(&w, DSPARK_SCHEDULE_PREFIX, 0);
    ok(fabs(joint[0] - .7) < 1e-12, "the paper's counterexample: Algorithm 1 emits A with .70 (%.2f)", joint[0]);
    enumerate(&w, DSPARK_SCHEDULE_GLOBAL, 0);
    ok(fabs(joint[0] - .85) < 1e-12, "control: the search without the stop emits A with .85 (%.2f)", joint[0]);
}

/* ---- dspark_verify ---------------------------------------------------------------------------------------- */

static void to_float(const double *p, int n, float *out) { for (int i = 0; i < n; i++) out[i] = (float)p[i]; }

/* n drafts of vocab tokens, all defaults but these */
static dspark_verify_desc verify_desc(int how, const float *p_target, const float *p_draft, const int32_t *draft, int n, int vocab) {
    dspark_verify_desc d;
    memset(&d, 0, sizeof d);
    d.mode = how, d.p_target = p_target, d.p_draft = p_draft, d.draft = draft, d.n = n, d.vocab = vocab;
    return d;
}

/* Rows in sixteenths: the residual is exact in float, so dspark_draw may draw from it. */
static void sixteenths(int n, float *p) {
    for (int v = 0; v < n; v++) p[v] = 0;
    for (int i = 0; i < 16; i++) p[dice_below(n)] += .0625f;
}

static void check_decisions(void) {
    enum { V = 5, N = 3 };
    int bad = 0, rejected = 0;
    dice_seed = 77;
    for (int trial = 0; trial < 20000; trial++) {
        float p[(N + 1) * V], q[N * V], rest[V];
        int32_t x[N], token, expected = -1;
        int n_accepted, i, v, hint = trial % 4 == 0;
        for (i = 0; i <= N; i++) sixteenths(V, p + i * V);
        for (i = 0; i < N; i++) {
            sixteenths(V, q + i * V);
            dspark_draw(q + i * V, V, 9, DSPARK_DRAW_DRAFT, (uint64_t)trial, i, &x[i]);
        }
        dspark_verify_desc d = verify_desc(DSPARK_VERIFY_REJECTION, p, hint ? NULL : q, x, N, V);
        d.seed = 9, d.cycle = (uint64_t)trial;
        for (i = 0; i < N; i++) {
            double p_d = hint ? 1 : (double)q[i * V + x[i]];
            if (!(dspark_uniform(9, DSPARK_DRAW_ACCEPT, d.cycle, i, 0) * p_d < (double)p[i * V + x[i]])) break;
        }
        for (v = 0; v < V; v++) {
            float taken = i == N ? 0 : hint ? (float)(v == x[i]) : q[i * V + v];
            rest[v] = p[i * V + v] > taken ? p[i * V + v] - taken : 0;
        }
        dspark_draw(rest, V, 9, DSPARK_DRAW_NEXT, d.cycle, i, &expected);
        bad += dspark_verify(&d, &n_accepted, &token) || n_accepted != i || token != expected;
        rejected += i < N;
    }
    ok(!bad && rejected > 1000, "dspark_verify takes the decisions that were enumerated: u p_d < p_t, then the residual");
}

/* One-hot targets that say 1, 2, 3, ...; the first `good` drafts agree. In every mode. */
static void check_trace(void) {
    enum { V = 11 };
    int bad = 0;
    for (int gamma = 1; gamma <= 7; gamma++)
        for (int good = 0; good <= gamma; good++)
            for (int how = 0; how < 4; how++) {     /* 3: rejection with p_draft NULL */
                float p[8 * V] = { 0 }, q[7 * V] = { 0 };
                int32_t x[7], next = -9;
                int n = -9;
                for (int i = 0; i <= gamma; i++) p[i * V + i + 1] = 1;
                for (int i = 0; i < gamma; i++) x[i] = i < good ? i + 1 : i + 3, q[i * V + x[i]] = 1;
                dspark_verify_desc d = verify_desc(how % 3 ? how % 3 : how ? DSPARK_VERIFY_REJECTION : 0, p, how == 3 ? NULL : q, x, gamma, V);
                d.position = 100, d.cycle = 5;
                bad += dspark_verify(&d, &n, &next) || n != good || next != good + 1;
            }
    ok(!bad, "gamma 1..7, every accepted count, every verifier: the right count, the right replacement or bonus");
}

static void check_bad_rows(void) {
    enum { V = 4, N = 3 };
    const float bad[] = { NAN, HUGE_VALF, -HUGE_VALF, -.25f, 0 };
    int wrong = 0, tokens = 0;
    for (int how = 0; how < 3; how++)
        for (int good = 0; good <= N; good++)
            for (int row = 0; row <= N; row++)
                for (int b = 0; b < 10; b++) {      /* in p_target, then in p_draft */
                    float p[(N + 1) * V] = { 0 }, q[N * V] = { 0 };
                    int32_t x[N], next = -9;
                    int n = -9, in_draft = b >= 5, reached = row <= good && !(in_draft && (row == N || how != DSPARK_VERIFY_REJECTION));
                    for (int i = 0; i <= N; i++) p[i * V + 1] = 1;
                    for (int i = 0; i < N; i++) x[i] = i < good ? 1 : 2, q[i * V + x[i]] = 1;
                    if (!in_draft && b % 5 == 4) p[row * V + 1] = 0;
                    else if (!in_draft) p[row * V + 3] = bad[b % 5];
                    else if (row < N && b % 5 == 4) q[row * V + x[row]] = 0;
                    else if (row < N) q[row * V + 3] = bad[b % 5];
                    dspark_verify_desc d = verify_desc(how, p, q, x, N, V);
                    dspark_status status = dspark_verify(&d, &n, &next);
                    if (reached) wrong += status != DSPARK_ERROR_NUMERIC || n != row || next != -1;
                    else wrong += status != DSPARK_OK || n != good || next != 1;
                }
    ok(!wrong, "a row with NaN, infinity, a negative number or no mass is NUMERIC if it is reached, and only then");
    for (int b = 0; b < 5; b++) {
        float p[V] = { .5f, .5f, 0, 0 };
        int32_t token = -9;
        if (b == 4) p[0] = p[1] = 0;
        else p[3] = bad[b];
        tokens += dspark_draw(p, V, 1, DSPARK_DRAW_PLAIN, 0, 0, &token) != DSPARK_ERROR_NUMERIC || token != -9;
        for (int i = 0; i < V; i++) p[i] = b < 2 ? (i == 2 ? bad[b] : 0.f) : -HUGE_VALF;
        for (int t = 0; t < 2; t++) tokens += dspark_distribution(p, V, (float)t, 0, 0, 0, p) != DSPARK_ERROR_NUMERIC;
    }
    ok(!tokens, "nor does dspark_draw give a token, or dspark_distribution a distribution, of such a row");
}

/* ---- texts from the real generator ------------------------------------------------------------------------- */

/* A batch decodes with any drafter under any schedule; GLOBAL may look at x_k here. */
static int coupled_batch(world *w, int seed) {
    enum { LENGTH = 12, ROOM = LENGTH + MAX_GAMMA + 1 };
    static char scratch[4096];
    int32_t plain[MAX_R][ROOM], text[MAX_R][ROOM], x[MAX_R][MAX_GAMMA];
    int length[MAX_R] = { 0 }, lengths[MAX_R] = { 0 }, prefix[ROOM], same = 1, drafter = seed % 4, shortest;
    int start = seed % 3 ? 5 * seed : INT_MAX - 40;
    float rows[(MAX_GAMMA + 1) * MAX_V], c[MAX_R * MAX_GAMMA];
    for (int r = 0; r < w->R; r++)
        for (int i = 0; i < ROOM; i++) {
            prefix[0] = i ? 1 + plain[r][i - 1] : 0;        /* a bigram world: short tables, long texts */
            to_float(w->at[r][prefix[0]].target, w->V, rows);
            dspark_draw(rows, w->V, (uint64_t)(seed * 9 + r), DSPARK_DRAW_PLAIN, (uint64_t)start + (uint64_t)i, 0, &plain[r][i]);
        }
    for (int cycle = 0;; cycle++) {
        for (int r = 0; r < w->R; r++)
            for (int k = 0; k < w->gamma; k++) {
                int at = length[r] + k, last = k ? x[r][k - 1] : length[r] ? text[r][length[r] - 1] : -1;
                to_float(w->at[r][last + 1].draft, w->V, rows);
                if (drafter == 0) dspark_draw(rows, w->V, (uint64_t)(seed * 9 + r), DSPARK_DRAW_PLAIN, (uint64_t)start + (uint64_t)at, 0, &x[r][k]);
                if (drafter == 1) dspark_draw(rows, w->V, 5, DSPARK_DRAW_DRAFT, (uint64_t)cycle, k, &x[r][k]);
                if (drafter == 2) x[r][k] = dice() < .9 && at < LENGTH ? plain[r][at] : dice_below(w->V);
                if (drafter == 3) x[r][k] = dice_below(w->V);
                c[r * w->gamma + k] = (float)w->at[r][x[r][k] + 1].confidence;
            }
        dspark_schedule_desc d = w->desc;
        d.n_requests = w->R, d.gamma = w->gamma, d.confidence = c, d.scratch = scratch, d.mode = seed % 6, d.budget = dice_below(8);
        if (dspark_schedule(&d, lengths)) return 0;
        shortest = LENGTH;
        for (int r = 0; r < w->R; r++) {
            if (length[r] >= LENGTH) continue;
            for (int i = 0; i <= lengths[r]; i++) {
                int last = i ? x[r][i - 1] : length[r] ? text[r][length[r] - 1] : -1;
                to_float(w->at[r][last + 1].target, w->V, rows + i * w->V);
            }
            dspark_verify_desc v = verify_desc(DSPARK_VERIFY_COUPLED, rows, NULL, x[r], lengths[r], w->V);
            int n;
            v.position = start + length[r], v.seed = (uint64_t)(seed * 9 + r), v.cycle = (uint64_t)cycle;
            if (dspark_verify(&v, &n, &text[r][length[r] + lengths[r]])) return 0;
            int32_t next = text[r][length[r] + lengths[r]];
            for (int i = 0; i < n; i++) text[r][length[r]++] = x[r][i];
            text[r][length[r]++] = next;
            shortest = length[r] < shortest ? length[r] : shortest;
        }
        if (shortest >= LENGTH) break;
    }
    for (int r = 0; r < w->R; r++)
        for (int i = 0; i < LENGTH; i++) same &= text[r][i] == plain[r][i];
    return same;
}

static void check_coupled(void) {
    static world w;
    int same = 0;
    for (int seed = 0; seed < 600; seed++) {
        random_world(&w, 1000 + seed, 1 + seed % MAX_R, 2 + seed % 3, 1 + seed % 7, 1);
        same += coupled_batch(&w, seed);
    }
    ok(same == 600, "coupled: plain sampling's text under every schedule, with every drafter, in company (%d of 600)", same);
}

typedef struct { const char *name; float temperature; int top_k; float top_p, min_p; } sampler;
enum { SV = 4, SGAMMA = 2, STEXTS = SV * SV * SV };

/* Three tokens from cycles of two drafts each; false_draft: drafted at another temperature than p_draft tells. */
static int sampled_text(const world *w, float (*target)[SV], float (*draft)[SV], float (*drawn)[SV], int how, uint64_t seed) {
    int prefix = 0, length = 0, text = 0, n, at[SGAMMA + 1];
    for (uint64_t cycle = seed % 7; length < 3; cycle++) {
        float p[(SGAMMA + 1) * SV], q[SGAMMA * SV];
        int32_t x[SGAMMA + 1];
        at[0] = prefix;
        for (int i = 0; i < SGAMMA; i++) {
            memcpy(q + i * SV, draft[at[i]], sizeof *draft);
            dspark_draw(drawn[at[i]], SV, seed, how == DSPARK_VERIFY_COUPLED ? DSPARK_DRAW_PLAIN : DSPARK_DRAW_DRAFT,
                        how == DSPARK_VERIFY_COUPLED ? (uint64_t)(length + i) : cycle, how == DSPARK_VERIFY_COUPLED ? 0 : i, &x[i]);
            at[i + 1] = after(w, at[i], x[i]);
        }
        for (int i = 0; i <= SGAMMA; i++) memcpy(p + i * SV, target[at[i]], sizeof *target);
        dspark_verify_desc d = verify_desc(how, p, q, x, SGAMMA, SV);
        int32_t next;
        d.seed = seed, d.cycle = cycle, d.position = length;
        if (dspark_verify(&d, &n, &next)) return -1;
        x[n] = next;
        for (int i = 0; i <= n && length < 3; i++, length++) text = text * SV + x[i], prefix = after(w, prefix, x[i]);
    }
    return text;
}

/* Sigmas of chi-square of n joint texts; a text that cannot be: infinite. */
static double chi_square(const world *w, float (*target)[SV], float (*draft)[SV], float (*drawn)[SV], int how, int n) {
    int counts[STEXTS] = { 0 }, cells = -1;
    double x = 0;
    for (int i = 0; i < n; i++) {
        int text = sampled_text(w, target, draft, drawn, how, (uint64_t)i * 0x9E3779B97F4A7C15u);
        if (text < 0) return HUGE_VAL;
        counts[text]++;
    }
    for (int text = 0; text < STEXTS; text++) {
        int a = text / SV / SV, b = text / SV % SV, c = text % SV, after_a = after(w, 0, a);
        double p = (double)target[0][a] * (double)target[after_a][b] * (double)target[after(w, after_a, b)][c];
        if (p == 0 && counts[text]) return HUGE_VAL;
        if (p * n < 1e-3) continue;
        x += (counts[text] - n * p) * (counts[text] - n * p) / (n * p), cells++;
    }
    return (x - cells) / sqrt(2 * fmax(cells, 1));
}

static void check_samplers(void) {
    static const sampler samplers[] = { { "temperature 1", 1, 0, 0, 0 }, { "temperature .7", .7f, 0, 0, 0 }, { "temperature 1.5", 1.5f, 0, 0, 0 },
        { "top-k 2", 1, 2, 0, 0 }, { "top-p .8", 1, 0, .8f, 0 }, { "min-p .2", 1, 0, 0, .2f }, { "all of them", .9f, 3, .9f, .1f } };
    static world w;
    static float target[3125][SV], draft[3125][SV], warm[3125][SV];
    double logits[2][SV], z = 0;
    w.V = SV;
    for (int s = 0; s < 7; s++) {
        const sampler *o = &samplers[s];
        dice_seed = 4, dice_at = 0;
        for (int i = 0; i < 3125; i++) {
            float a[SV], b[SV];
            for (int v = 0; v < SV; v++) logits[0][v] = 5 * dice(), logits[1][v] = logits[0][v] + 2 * dice();
            to_float(logits[0], SV, a), to_float(logits[1], SV, b);
            dspark_distribution(a, SV, o->temperature, o->top_k, o->top_p, o->min_p, target[i]);
            dspark_distribution(b, SV, o->temperature, o->top_k, o->top_p, o->min_p, draft[i]);
            dspark_distribution(b, SV, 2 * o->temperature, 0, 0, 0, warm[i]);
        }
        for (int how = 0; how < 2; how++) {
            z = chi_square(&w, target, draft, draft, how, 20000);
            ok(fabs(z) < 4, "%s, %s: the joint of three tokens is the target's (chi-square %+.1f sigma)", how ? "rejection" : "coupled", o->name, z);
        }
        if (s == 0) z = chi_square(&w, target, draft, warm, DSPARK_VERIFY_REJECTION, 20000);
        if (s == 0) ok(z > 10, "control: drafts drawn at another temperature than p_draft's are noticed (%+.0f sigma)", z);
    }
}

/* ---- plain twins of what is done cleverly ------------------------------------------------------------------- */

static void check_draw(void) {
    enum { V = 300 };
    int bad = 0;
    for (int trial = 0; trial < 3000; trial++) {
        float p[V];
        double best = 0;
        int32_t token = -1, winner = -1;
        int n = 1 + dice_below(V), kind = trial % 4;
        for (int v = 0; v < n; v++) {
            double u = dice();
            p[v] = kind == 0 ? (float)u : kind == 1 ? (float)(u < .02) : kind == 2 ? (float)dspark__exp(-100 * u) : (float)ldexp(u, -149 + 20 * (v & 7));
        }
        p[dice_below(n)] += 1e-3f;
        for (int v = 0; v < n; v++) {
            double score = (double)p[v] / -dspark__log(dspark_uniform(3, DSPARK_DRAW_NEXT, (uint64_t)trial, 2, (uint32_t)v));
            if (score > best) best = score, winner = v;
        }
        bad += dspark_draw(p, n, 3, DSPARK_DRAW_NEXT, (uint64_t)trial, 2, &token) || token != winner;
    }
    ok(!bad, "draw: what it skips never wins (one log a token gives the same)");
}

static const float *sorted_logits;
static int by_logit(const void *a, const void *b) {
    int i = *(const int *)a, j = *(const int *)b;
    float x = sorted_logits[i], y = sorted_logits[j];
    return x != y ? (x < y ? 1 : -1) : i - j;
}

static void check_filters(void) {
    enum { V = 700 };
    static float z[V], p[V];
    int bad = 0, order[V];
    double e[V];
    for (int trial = 0; trial < 1500; trial++) {
        int n = 1 + dice_below(V), top_k = dice_below(2) ? dice_below(n + 3) : 0, kept, last;
        float t = (float)(.1 + dice()), top_p = dice_below(2) ? (float)dice() : 0, min_p = dice_below(3) ? 0 : (float)(.2 * dice());
        double sum = 0, before = 0, limit;
        for (int v = 0; v < n; v++) {
            double logit = 12 * (dice() + dice() + dice() - 1.5);
            z[v] = trial % 3 ? (float)logit : (float)floor(logit / 3);      /* with many ties, -0 and 0 among them */
            if (trial % 3 == 0 && z[v] == 0 && v % 2) z[v] = -0.0f;
            if (trial % 5 == 0 && dice() < .3) z[v] = -HUGE_VALF;
            order[v] = v;
        }
        z[dice_below(n)] = 9;
        sorted_logits = z;
        qsort(order, (size_t)n, sizeof *order, by_logit);
        for (int i = 0; i < n; i++) e[i] = dspark__exp(((double)z[order[i]] - (double)z[order[0]]) / (double)t);
        kept = top_k > 0 && top_k < n ? top_k : n;
        for (int i = 0; i < kept; i++) sum += e[i];
        limit = top_p > 0 ? (double)top_p * sum : HUGE_VAL;
        for (last = 0, sum = 0; last < kept && before < limit && e[last] >= (double)min_p; last++) before += e[last];
        for (int i = 0; i < last; i++) sum += e[i];
        bad += dspark_distribution(z, n, t, top_k, top_p, min_p, p) != DSPARK_OK;
        for (int i = 0; i < n; i++) {
            double expected = i < last ? (double)(float)(e[i] / sum) : 0;
            bad += !(fabs((double)p[order[i]] - expected) <= 1.2e-7 * expected);
        }
    }
    ok(!bad, "distribution: top-k, top-p and min-p keep what a full sort keeps, ties, -0 and -inf included");
}

/* The maximum of theta by trying every count of the candidates, sorted plainly. */
static void check_staircase(void) {
    enum { R = 3, GAMMA = 7, ROWS = R * (GAMMA + 1) };
    static char scratch[1024];
    double us[ROWS], value[R * GAMMA], best_theta = 0, tau = R;
    float c[R * GAMMA], sps[ROWS];
    int lengths[R], total[2] = { 0, 0 }, best = 0;
    dspark_sps table;
    dspark_schedule_desc d;
    memset(&d, 0, sizeof d);
    for (int b = 0; b < ROWS; b++) us[b] = b < 3 ? 100 : b < 12 ? 220 : 900, sps[b] = (float)(1e6 / us[b]);
    for (int r = 0; r < R; r++)
        for (int k = 0; k < GAMMA; k++) c[r * GAMMA + k] = .9f, value[k * R + r] = pow(.9, k + 1);
    table.sps = sps, table.n = ROWS;
    d.confidence = c, d.n_requests = R, d.gamma = GAMMA, d.sps = &table, d.scratch = scratch;
    for (int i = 0; i < 2; i++) {
        d.mode = i ? DSPARK_SCHEDULE_GLOBAL : DSPARK_SCHEDULE_PREFIX;
        dspark_schedule(&d, lengths);
        for (int r = 0; r < R; r++) total[i] += lengths[r];
    }
    for (int n = 0; n <= R * GAMMA; n++) {
        if (n) tau += value[n - 1];
        if (tau / us[R + n - 1] > best_theta) best_theta = tau / us[R + n - 1], best = n;
    }
    ok(total[0] == 0 && total[1] == best && best == 9,
       "on a staircase SPS, PREFIX stops at the first step (%d) and GLOBAL goes to the maximum (%d of 9)", total[0], total[1]);
}

static void check_scratch(void) {
    enum { R = 50, GAMMA = 7 };
    size_t n = dspark_schedule_scratch_bytes(R, GAMMA);
    char *scratch = (char *)malloc(n + 16);
    float c[R * GAMMA];
    int lengths[R + 1], good = 1;
    dspark_schedule_desc d;
    memset(&d, 0, sizeof d);
    memset(scratch, 0x5A, n + 16);
    for (int i = 0; i < R * GAMMA; i++) c[i] = (float)dice();
    d.confidence = c, d.n_requests = R, d.gamma = GAMMA, d.mode = DSPARK_SCHEDULE_ASYNC, d.budget = R * GAMMA, d.scratch = scratch;
    lengths[R] = -7;
    good &= !dspark_schedule(&d, lengths) && lengths[R] == -7;
    for (size_t i = n; i < n + 16; i++) good &= scratch[i] == 0x5A;
    ok(good, "dspark_schedule writes no further than its scratch and its lengths");
    free(scratch);
}

/* ---- calibration, account, bits ------------------------------------------------------------------------------ */

static void check_sts(void) {
    enum { N = 3000, GAMMA = 3 };
    static float logits[N * GAMMA], grid[65], t[2][GAMMA];
    static int accepted[N];
    static double scratch[2 * N], before[GAMMA], after_fit[GAMMA];
    dspark_sts_desc d;
    int good = 1;
    for (int g = 0; g < 65; g++) grid[g] = (float)pow(2, (g - 32) / 16.0);
    for (int i = 0; i < N; i++) {
        int stands = 1;
        for (int k = 0; k < GAMMA; k++) {
            double logit = 6 * dice() - 2;
            logits[i * GAMMA + k] = (float)(2 * logit);     /* twice too sure of itself */
            stands &= dice() < dspark_sts_apply((float)logit, 1);
            accepted[i] += stands;
        }
    }
    memset(&d, 0, sizeof d);
    d.logits = logits, d.accepted = accepted, d.n_cycles = N, d.gamma = GAMMA, d.scratch = scratch;
    good &= !dspark_sts_fit(&d, t[0], before, after_fit);
    d.grid = grid, d.n_grid = 65, d.n_bins = 20;
    good &= !dspark_sts_fit(&d, t[1], NULL, NULL) && !memcmp(t[0], t[1], sizeof t[0]);
    ok(good, "sts: no grid and no bins mean 2^((g-32)/16) and 20");
    for (int k = 0; k < GAMMA; k++) good &= t[0][k] > 1.5f && t[0][k] < 2.7f && after_fit[k] < .6 * before[k] && after_fit[k] < .035;
    ok(good, "sts: logits twice too large get T near 2 (%.2f %.2f %.2f), the ECE falls below 3.5 %%",
       (double)t[0][0], (double)t[0][1], (double)t[0][2]);
}

/* time - 1.01 plain, at its highest and over its steepest stretch, of drafters from hopeless to perfect. */
static void check_account(void) {
    int over = 0, stretch = 0, negative = 0, reckless = 0;
    for (int trial = 0; trial < 400; trial++) {
        dspark_account a;
        int gamma = 1 + dice_below(7), strategy = trial % 5;
        double P = 10 + 90 * dice(), draft_us = P * dice(), us[8], worst = 0, excess = 0, low = 0;
        us[0] = P;
        for (int l = 1; l <= gamma; l++) us[l] = us[l - 1] + P * dice() * (dice_below(3) ? .1 : .8);
        for (int l = 0; l <= gamma; l++) worst = fmax(worst, draft_us + us[l]);
        dspark_account_open(&a, P, worst);
        for (int step = 0; step < 2000; step++) {
            int l = dice_below(gamma + 1), tau = 1, drafts = dspark_account_affords(&a, P, worst);
            double cost = P;
            if (strategy != 4) l = gamma;
            if (strategy == 1) tau = step < 700 ? l + 1 : 1;
            if (strategy == 2) tau = step % 2 ? l + 1 : 1;
            if (strategy == 3) tau = (step / 200) % 2 && a.balance_us < a.limit_us / 2 ? l + 1 : 1;
            if (strategy == 4) tau = 1 + dice_below(l + 1);
            if (drafts) cost = draft_us + us[l];
            else tau = 1;
            dspark_account_settle(&a, P, cost, tau);
            excess += cost - 1.01 * P * tau;
            negative += a.balance_us < -1e-9 * worst;
            over += excess > worst - P + 1e-9 * worst * step;
            stretch += excess - low > 16 * (worst - P) + 1e-9 * worst * step;
            low = fmin(low, excess);
        }
        reckless += strategy == 0 && 2000 * (worst - 1.01 * P) > worst - P;
    }
    ok(!over, "never slower: after any number of cycles time <= 1.01 plain + one cycle's worst loss");
    ok(!stretch, "never slower: over any stretch of text time <= 1.01 plain + 16 worst losses");
    ok(!negative, "never slower: the balance never falls below 0");
    ok(reckless > 60, "control: drafting always, the hopeless drafter breaks the bound (%d of 80)", reckless);
}

static uint64_t hash_of;
static void hash(const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash_of = (hash_of ^ ((const unsigned char *)bytes)[i]) * 0x100000001B3u;
}

static void check_bits(void) {
    enum { V = 1000 };
    static float z[V], p[V];
    hash_of = 0xCBF29CE484222325u;
    dice_seed = 1, dice_at = 0;
    for (int trial = 0; trial < 200; trial++) {
        double values[4];
        int32_t token = -1;
        for (int v = 0; v < V; v++) z[v] = (float)(20 * dice());
        dspark_distribution(z, V, (float)(.3 + dice()), trial % 2 ? 50 : 0, trial % 3 ? .9f : 0, trial % 5 ? 0 : .01f, p);
        dspark_draw(p, V, 1, DSPARK_DRAW_PLAIN, (uint64_t)trial, 0, &token);
        values[0] = dspark__exp(1500 * (dice() - .5)), values[1] = dspark__log(ldexp(dice(), trial * 10 - 1000));
        dspark__sincos(2e6 * (dice() - .5), &values[2], &values[3]);
        hash(p, sizeof p), hash(&token, sizeof token), hash(values, sizeof values);
    }
    ok(hash_of == 0x0u, "distributions, draws, exp, log, sin and cos have the bits of every machine (%016llx)", (unsigned long long)hash_of);
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
    check_scratch();
    check_sts();
    check_account();
    check_bits();
    return tap_done();
}
