// frontier [DIR [TEXTS [THREADS [TEMPERATURE [QUICK]]]]]: what a user gets and what the machine makes, by load and
// policy. QUICK 1: every second load, one round.
//
// Closed loop: N requests are always being served; one that has its TOKENS is replaced by the next held-out prompt's.
// The policies serve the same requests side by side, ROUNDS times (half as often from 64 on); prompts have been run
// before the clock starts. Those that weigh costs have a model each, as in service: it begins each N with the costs
// measured at the start, and an account of nothing. 256 requests of ten policies take 8.5 GB; all takes eight minutes.
//   closed tT N P throughput     tokens a second in all: median and quartiles of the rounds
//   closed tT N P user           tokens a second for each of the N
//   closed tT N P verified       drafts verified a request and step
//   scheduler over plain tT N, scheduler over best fixed tT N, scheduler over bound tT N
//                                ratios in each round; best fixed: the length fastest over all rounds together; bound:
//                                the same, counting the passes' time only
//   learned over measured tT N   the scheduler without a profile, after LEARNING steps, over one that has measured
// Open loop: Poisson arrivals at a share S of plain decoding's capacity, not counting prompts, which run between the
// others' tokens; plain and scheduler in turn.
//   open tT S P first p50 ...    seconds from arrival to the first token, ms a token from there on; p50 and p95
#include "bench.h"

enum { MOST = 256, FEW = 64, TOKENS = 64, ROUNDS = 5, PROMPT_ROWS = 64, WARM = 2, LEARNING = 50, OPEN_PARTS = 5 };

typedef struct { const char *name; int plain, schedule, cap; float threshold; } policy;
static const policy policies[] = {
    { "plain", 1, 0, 0, 0 },
    { "block 1", 0, DSPARK_SCHEDULE_BLOCK, 1, 0 }, { "block 2", 0, DSPARK_SCHEDULE_BLOCK, 2, 0 },
    { "block 3", 0, DSPARK_SCHEDULE_BLOCK, 3, 0 }, { "block 4", 0, DSPARK_SCHEDULE_BLOCK, 4, 0 },
    { "block 5", 0, DSPARK_SCHEDULE_BLOCK, 5, 0 },
    { "threshold", 0, DSPARK_SCHEDULE_THRESHOLD, 0, .8f },
    { "algorithm 1", 0, DSPARK_SCHEDULE_PREFIX, 0, 0 }, { "asynchronous", 0, DSPARK_SCHEDULE_ASYNC, 0, 0 },
    { "scheduler", 0, 0, 0, 0 }         // the engine's own choice, never slower
};
enum { N_POLICIES = sizeof policies / sizeof *policies, N_FIXED = 6, SCHEDULER = N_POLICIES - 1 };
enum { WEIGHING = 7, N_KITCHENS = 1 + N_POLICIES - WEIGHING };       // from there on policies weigh costs

static dspark_policy policy_of(const policy *p, int quota) {
    dspark_policy out;
    memset(&out, 0, sizeof out);
    out.plain = p->plain, out.schedule = p->schedule, out.draft_cap = p->cap, out.threshold = p->threshold;
    out.quota = quota;
    return out;
}

// ---- requests: prompts that have been run, to be copied

typedef struct {
    const char *model;
    int threads;
    dspark_model *m;
    dspark_session *ready[MOST];
    const text *prompt[MOST];
    int n, max_context;         // n: of ready, prompt
    float temperature;
} kitchen;

// A result of these samples, which it takes; the question is a format.
static void say(const kitchen *k, samples *s, const char *unit, const char *format, ...) {
    char question[96];
    va_list args;
    va_start(args, format);
    vsnprintf(question, sizeof question, format, args);
    va_end(args);
    result(question, k->model, k->threads, s, unit);
    free(s->x), s->x = NULL, s->n = s->cap = 0;
}

static dspark_session_desc order(const kitchen *k, const policy *p, int number) {
    dspark_session_desc d;
    memset(&d, 0, sizeof d);
    d.max_context = k->max_context, d.temperature = k->temperature, d.seed = (uint64_t)number, d.ignore_eos = 1;
    d.policy = policy_of(p, TOKENS);
    return d;
}

static dspark_session *serve(const kitchen *k, const policy *p, int number) {
    dspark_session_desc d = order(k, p, number);
    dspark_session *s;
    must(dspark_session_fork(&s, k->ready[number % k->n], &d));
    return s;
}

// A model of its own, and up to `most` prompts, the domains' in turn
static void prepare(kitchen *k, const char *dir, const char *file, int most, texts *all) {
    int at[N_DOMAINS] = { 0 }, longest = 0;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = k->threads, desc.max_rows = MOST * (DSPARK_MAX_BLOCK + 1) / 2;
    must(dspark_model_open(&k->m, dir, &desc));
    *all = texts_read(k->m, file);
    for (int tried = 0; k->n < most && tried < 4 * all->n; tried++) {
        int d = tried % N_DOMAINS;
        while (at[d] < all->n && (all->t[at[d]].is_document || domain_of(&all->t[at[d]]) != d)) at[d]++;
        if (at[d] < all->n) k->prompt[k->n++] = &all->t[at[d]++];
    }
    for (int i = 0; i < k->n; i++) longest = k->prompt[i]->n > longest ? k->prompt[i]->n : longest;
    k->max_context = longest + TOKENS + 1;
    for (int i = 0; i < k->n; i++) {
        dspark_session_desc d = order(k, &policies[0], 0);
        k->ready[i] = session_open(k->m, &d);
        must(dspark_session_append(k->ready[i], k->prompt[i]->ids, k->prompt[i]->n));
    }
}

static void tidy(kitchen *k, texts *all) {
    for (int i = 0; i < k->n; i++) dspark_session_close(k->ready[i]);
    texts_free(all), dspark_model_close(k->m);
}

// ---- closed loop

typedef struct { double tokens, s, verified, rows, draft_us, verify_us; } served;      // rows: requests x steps

// What a policy serves: n requests, the next one's number; the first `warm` steps do not count
typedef struct {
    const kitchen *k;
    const policy *p;
    dspark_session *s[MOST];
    int n, next, steps, warm;
    double made;                // tokens, those of the first steps too
    served got;
} house;

static void house_open(house *h, const kitchen *k, const policy *p, int n, int first, int warm) {
    memset(h, 0, sizeof *h);
    h->k = k, h->p = p, h->n = n, h->next = first, h->warm = warm;
    for (int i = 0; i < n; i++) h->s[i] = serve(k, p, h->next++);
}

static void house_step(house *h) {
    static dspark_step_result r[MOST];
    double start = seconds();
    must(dspark_step(h->s, h->n, NULL, r));
    if (h->steps++ == h->warm) memset(&h->got, 0, sizeof h->got);
    h->got.s += seconds() - start;
    for (int i = 0; i < h->n; i++) {
        must(r[i].status);
        h->made += r[i].n_tokens, h->got.tokens += r[i].n_tokens, h->got.verified += r[i].n_scheduled, h->got.rows++;
        h->got.draft_us += (double)r[i].draft_us, h->got.verify_us += (double)r[i].verify_us;
        if (!r[i].finish) continue;
        dspark_session_close(h->s[i]);
        h->s[i] = serve(h->k, h->p, h->next++);
    }
}

// Houses side by side, so that other load hits them alike: the one with the fewest tokens takes steps for 20 ms, so
// that the caches hold what is its own, as in service.
static void race(house *h, int n_houses, double tokens) {
    int through;
    do {
        int least = 0;
        for (int i = 1; i < n_houses; i++) if (h[i].made < h[least].made) least = i;
        for (double until = seconds() + .02; seconds() < until;) house_step(&h[least]);
        through = 0;
        for (int i = 0; i < n_houses; i++) through += h[i].steps > h[i].warm && h[i].got.tokens >= tokens;
    } while (through < n_houses);
    for (int i = 0; i < n_houses; i++)
        for (int j = 0; j < h[i].n; j++) dspark_session_close(h[i].s[j]);
}

static double speed(const served *g) { return g->tokens / g->s; }
static double speed_of_passes(const served *g) { return 1e6 * g->tokens / (g->draft_us + g->verify_us); }
static const served *best_fixed(served got[N_POLICIES][ROUNDS], int rounds, double (*of)(const served *)) {
    int best = 0;
    double fastest = 0;
    for (int i = 0; i < N_FIXED; i++) {
        double us = 0;          // a token, in the mean of rounds
        for (int round = 0; round < rounds; round++) us += 1e6 / of(&got[i][round]);
        if (1 / us > fastest) fastest = 1 / us, best = i;
    }
    return got[best];
}

static void report_policy(const kitchen *k, int n, const char *name, const served *got, int rounds) {
    samples all = { NULL, 0, 0 }, user = all, verified = all;
    double t = (double)k->temperature;
    for (int round = 0; round < rounds; round++) {
        sample(&all, speed(&got[round])), sample(&user, speed(&got[round]) / n);
        sample(&verified, got[round].verified / got[round].rows);
    }
    say(k, &all, "tokens/s", "closed t%g %d %s throughput", t, n, name);
    say(k, &user, "tokens/s", "closed t%g %d %s user", t, n, name);
    say(k, &verified, "drafts", "closed t%g %d %s verified", t, n, name);
}

// All policies with n requests at once, k [N_KITCHENS]; tokens a second of plain decoding.
static double at_load(const kitchen *k, const dspark_profile *measured, int n, int rounds) {
    static const served nothing;
    served got[N_POLICIES][ROUNDS] = { { nothing } };
    samples over_plain = { NULL, 0, 0 }, over_fixed = over_plain, over_bound = over_plain;
    const served *fixed, *bound;
    double t = (double)k->temperature;
    for (int i = 1; i < N_KITCHENS; i++) must(dspark_model_set_profile(k[i].m, measured));
    for (int round = 0; round < rounds; round++) {
        static house h[N_POLICIES];
        for (int i = 0; i < N_POLICIES; i++)
            house_open(&h[i], i < WEIGHING ? k : &k[1 + i - WEIGHING], &policies[i], n, round * (n + TOKENS), WARM);
        race(h, N_POLICIES, 6 * n > 768 ? 6 * n : 768);
        for (int i = 0; i < N_POLICIES; i++) got[i][round] = h[i].got;
    }
    for (int i = 0; i < N_POLICIES; i++) report_policy(k, n, policies[i].name, got[i], rounds);
    fixed = best_fixed(got, rounds, speed), bound = best_fixed(got, rounds, speed_of_passes);
    for (int round = 0; round < rounds; round++) {
        double ours = speed(&got[SCHEDULER][round]);
        sample(&over_plain, ours / speed(&got[0][round])), sample(&over_fixed, ours / speed(&fixed[round]));
        sample(&over_bound, ours / speed_of_passes(&bound[round]));
    }
    say(k, &over_plain, "x", "scheduler over plain t%g %d", t, n);
    say(k, &over_fixed, "x", "scheduler over best fixed t%g %d", t, n);
    say(k, &over_bound, "x", "scheduler over bound t%g %d", t, n);
    return speed(&got[0][0]);
}

// What the scheduler makes without a profile, learning, over what it makes with one, n requests at once. Both begin
// with an account of nothing.
static void without_profile(const kitchen *k, const dspark_profile *measured, const char *dir, const char *file,
                            int rounds) {
    kitchen learner = { .model = k->model, .threads = k->threads, .temperature = k->temperature };
    texts all;
    prepare(&learner, dir, file, FEW, &all);
    for (int n = 1; n <= FEW; n *= 8) {
        samples ratio = { NULL, 0, 0 };
        for (int round = 0; round < (n == 1 ? 3 : 1) * rounds; round++) {       // one alone is the noisiest
            static house h[2];
            must(dspark_model_set_profile(k->m, measured)), must(dspark_model_set_profile(learner.m, NULL));
            house_open(&h[0], k, &policies[SCHEDULER], n, round * (n + TOKENS), LEARNING);
            house_open(&h[1], &learner, &policies[SCHEDULER], n, round * (n + TOKENS), LEARNING);
            race(h, 2, 16 * n > 1024 ? 16 * n : 1024);
            sample(&ratio, speed(&h[1].got) / speed(&h[0].got));
        }
        say(k, &ratio, "x", "learned over measured t%g %d", (double)k->temperature, n);
    }
    tidy(&learner, &all);
}

// ---- open loop

typedef struct { dspark_session *s; double arrived, first; int tokens; } guest;
typedef struct { samples first, token; } waits;

static void serve_guests(guest *g, int *n, double from, waits *w) {
    static dspark_step_result r[MOST];
    const dspark_step_desc desc = { PROMPT_ROWS };
    dspark_session *s[MOST];
    double now;
    for (int i = 0; i < *n; i++) s[i] = g[i].s;
    must(dspark_step(s, *n, &desc, r));
    now = seconds() - from;
    for (int i = *n - 1; i >= 0; i--) {
        must(r[i].status);
        if (!g[i].tokens && r[i].n_tokens) g[i].first = now, sample(&w->first, now - g[i].arrived);
        g[i].tokens += r[i].n_tokens;
        if (!r[i].finish) continue;
        sample(&w->token, 1e3 * (now - g[i].first) / (g[i].tokens > 1 ? g[i].tokens - 1 : 1));
        dspark_session_close(g[i].s);
        g[i] = g[--*n];
    }
}

// Arrivals for so many seconds, rate a second; then until all are served.
static void open_loop(const kitchen *k, const policy *p, double rate, double length, waits *w) {
    guest g[MOST];
    double next = 0, from = seconds();
    int n = 0, number = 0;
    while (next < length || n) {
        double now = seconds() - from;
        while (next < length && next <= now && n < MOST) {
            dspark_session_desc d = order(k, p, number);
            guest *in = &g[n++];
            memset(in, 0, sizeof *in);
            in->s = session_open(k->m, &d), in->arrived = next;
            must(dspark_session_submit(in->s, k->prompt[number % k->n]->ids, k->prompt[number % k->n]->n));
            next -= log(dspark_uniform(9, 0, (uint64_t)number++, 0, 0)) / rate;
        }
        if (n) serve_guests(g, &n, from, w);
        else if (next < length) nanosleep(&(struct timespec){ 0, 200000 }, NULL);
    }
}

static void report_waits(const kitchen *k, double share, const policy *p, waits *w) {
    static const double quantiles[] = { .5, .95 };
    for (int i = 0; i < 2; i++) {
        double q = quantiles[i], t = (double)k->temperature;
        printf("open t%g %g %s first p%g,%s,%d,%.5g,,,s,%d\n", t, share, p->name, 100 * q, k->model, k->threads,
               quantile(&w->first, q), w->first.n);
        printf("open t%g %g %s token p%g,%s,%d,%.5g,,,ms,%d\n", t, share, p->name, 100 * q, k->model, k->threads,
               quantile(&w->token, q), w->token.n);
    }
    fflush(stdout);
    free(w->first.x), free(w->token.x);
}

int main(int argc, char **argv) {
    static const int loads[] = { 1, 2, 4, 8, 16, 32, 64, 128, 256 };
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *file = argc > 2 ? argv[2] : "bench/heldout.jsonl";
    int threads = argc > 3 ? atoi(argv[3]) : 2, quick = argc > 5 && atoi(argv[5]), rounds = quick ? 1 : ROUNDS;
    static kitchen kitchens[N_KITCHENS];
    static texts all[N_KITCHENS];
    const kitchen *own = &kitchens[N_KITCHENS - 1];         // the scheduler's
    dspark_profile measured;
    double capacity = 0;
    for (int i = 0; i < N_KITCHENS; i++) {
        kitchen *k = &kitchens[i];
        k->model = model_name(dir), k->threads = threads, k->temperature = argc > 4 ? (float)atof(argv[4]) : 0;
        prepare(k, dir, file, MOST, &all[i]);
    }
    must(dspark_model_profile(own->m, &measured));
    for (int i = 0; i < 9; i += quick ? 2 : 1) {
        double plain = at_load(kitchens, &measured, loads[i],
                               loads[i] < FEW ? rounds : (rounds + 1) / 2);      // they are long
        capacity = plain > capacity ? plain : capacity;
    }
    without_profile(own, &measured, dir, file, rounds);
    for (int i = 0; i < 2; i++) {
        const policy *p[2] = { &policies[0], &policies[SCHEDULER] };
        double share = i ? .4 : .2;
        waits w[2];
        memset(w, 0, sizeof w);
        for (int part = 0; part < 2 * OPEN_PARTS; part++)       // in turn: the machine's speed changes
            open_loop(own, p[part % 2], share * capacity / TOKENS, (quick ? 4. : 10.) / OPEN_PARTS, &w[part % 2]);
        for (int j = 0; j < 2; j++) report_waits(own, share, p[j], &w[j]);
    }
    for (int i = 0; i < N_KITCHENS; i++) tidy(&kitchens[i], &all[i]);
}
