// acceptance [DIR [DFLASH [TEXTS [THREADS [PROMPTS [TOKENS]]]]]]: tau, the tokens that a pass commits, by drafter,
// verifier and domain, at temperature 1 over held-out prompts (PROMPTS a domain, 12; answers of TOKENS, 160). DFLASH: a
// checkpoint of the same target whose drafter was trained without a Markov head; "-": none.
//   tau V W D            drafter W = dspark, dflash, lookup, plain under verifier V; D a domain or `mean` of them all
//   dspark over W V      ratio of those means
//   accepted V W k       of the drafts at position k whose predecessors were all accepted, the share accepted
//   threshold T ...      coupled DSpark that verifies up to the first confidence below T: tau, drafts verified a cycle,
//                        the share of them that was accepted, over all domains, and of chat
//   depth N tau D        coupled DSpark with whole documents before the prompt, N tokens in all
// low and high: 95 % of RESAMPLES draws of the prompts. What is counted: cycles that did not end the answer.
#include "bench.h"

enum { DSPARK, DFLASH, LOOKUP, PLAIN, N_DRAFTERS, RESAMPLES = 400, MANY = 64 };
static const char *const drafters[N_DRAFTERS] = { "dspark", "dflash", "lookup", "plain" };
static const char *const verifiers[2] = { "coupled", "rejection" };

// ---- prompt lookup proposes what followed the last occurrence of the text's end. A backend whose draft pass runs
// nothing: the target's operations are the CPU's, the drafter's logits allow one token, or none.

enum { LONGEST = 3 };       // of the ends that are looked for, tokens
static struct {
    dspark_backend cpu;
    const dspark_session *s;            // the one that runs
    float *logits, confidence[DSPARK_MAX_BLOCK];        // [block][vocab]
    int drafting, at;                   // the place in the text that was proposed last, -1: none
} lookup;

// The place after the latest earlier occurrence of the text's last n tokens; -1: none.
static int find_end(const int32_t *ids, int length, int n) {
    for (int at = length - 1; at >= n; at--)
        if (!memcmp(ids + at - n, ids + length - n, (size_t)n * sizeof *ids)) return at;
    return -1;
}

static dspark_status lookup_begin(void *device, const dspark_pass *pass) {
    lookup.drafting = pass->kind == DSPARK_PASS_DRAFT;
    return lookup.drafting ? DSPARK_OK : lookup.cpu.pass_begin(device, pass);
}
static dspark_status lookup_end(void *device, dspark_pass_result *r) {
    if (!lookup.drafting) return lookup.cpu.pass_end(device, r);
    r->logits = lookup.logits, r->n_logits = lookup.s->model->checkpoint.config.dspark_block_size;
    r->confidence_logits = lookup.confidence;
    return DSPARK_OK;
}
static void lookup_mix_in(void *device, int l, int sub) { if (!lookup.drafting) lookup.cpu.mix_in(device, l, sub); }
static void lookup_mix_out(void *device, int l, int sub) { if (!lookup.drafting) lookup.cpu.mix_out(device, l, sub); }
static void lookup_attention(void *device, int l) { if (!lookup.drafting) lookup.cpu.attention(device, l); }
static void lookup_moe(void *device, int l) { if (!lookup.drafting) lookup.cpu.moe(device, l); }
static void lookup_nothing(void *device) { (void)device; }
static float *lookup_logits(void *device) { return (void)device, lookup.logits; }
static void lookup_step(void *device, int k, const int32_t *previous) {
    int V = lookup.s->model->checkpoint.config.vocab_size, length = lookup.s->n_tokens + k;
    float *row = lookup.logits + (size_t)k * (size_t)V;
    (void)device, (void)previous;
    lookup.at = k && lookup.at >= 0 ? lookup.at + 1 : -1;
    for (int n = LONGEST; !k && n && lookup.at < 0; n--) lookup.at = find_end(lookup.s->tokens, length, n);
    for (int v = 0; v < V; v++) row[v] = -HUGE_VALF;        // a row without any token: nothing more is proposed
    if (lookup.at >= 0) row[lookup.s->tokens[lookup.at]] = 0;
}

static dspark_model *lookup_open(const char *dir, int threads) {
    static dspark_backend table;
    dspark_model *m;
    lookup.cpu = table = *dspark_cpu_backend();
    table.name = "CPU, prompt lookup";
    table.pass_begin = lookup_begin, table.pass_end = lookup_end;
    table.mix_in = lookup_mix_in, table.mix_out = lookup_mix_out;
    table.attention = lookup_attention, table.moe = lookup_moe, table.inject = lookup_nothing;
    table.draft_head = lookup_nothing, table.draft_step = lookup_step, table.draft_logits = lookup_logits;
    m = model_open(dir, threads, &table);
    lookup.logits = (float *)need(DSPARK_MAX_BLOCK * (size_t)dspark_model_config(m)->vocab_size, sizeof *lookup.logits);
    return m;
}

// ---- answers, counted

typedef struct {
    double cycles, tokens, scheduled, accepted, reached[DSPARK_MAX_BLOCK], right[DSPARK_MAX_BLOCK];
} counts;
typedef struct { counts of[N_DOMAINS][MANY]; int n[N_DOMAINS]; } tally;     // an answer each

static void count_cycle(counts *c, const dspark_step_result *r) {
    c->cycles++, c->tokens += r->n_accepted + 1, c->scheduled += r->n_scheduled, c->accepted += r->n_accepted;
    for (int k = 0; k < r->n_scheduled && k <= r->n_accepted; k++) c->reached[k]++, c->right[k] += k < r->n_accepted;
}

static void answer(dspark_model *m, const int32_t *ids, int n, int n_tokens, const dspark_policy *policy, uint64_t seed,
                   counts *c) {
    dspark_session_desc desc;
    dspark_session *s;
    dspark_step_result r;
    memset(&desc, 0, sizeof desc);
    desc.max_context = n + n_tokens + 1, desc.temperature = 1, desc.seed = seed, desc.policy = *policy;
    desc.policy.quota = n_tokens;
    lookup.s = s = session_open(m, &desc);
    must(dspark_session_append(s, ids, n));
    do {
        must(dspark_step(&s, 1, NULL, &r));
        must(r.status);
        if (!r.finish) count_cycle(c, &r);
    } while (!r.finish);
    dspark_session_close(s);
}

typedef struct { const texts *all; int prompts, tokens, depth; } work;
static void run(dspark_model *m, const work *w, const dspark_policy *policy, tally *t) {
    memset(t, 0, sizeof *t);
    for (int i = 0; i < w->all->n; i++) {
        const text *prompt = &w->all->t[i];
        int d = domain_of(prompt), n;
        int32_t *ids;
        if (prompt->is_document || t->n[d] >= w->prompts) continue;
        ids = deepen(w->all, prompt, 7 * i, w->depth, &n);
        answer(m, ids, n, w->tokens, policy, (uint64_t)i, &t->of[d][t->n[d]]);
        t->n[d]++;
        free(ids);
    }
}

// ---- what is said of them, with what it would be for other prompts

typedef double (*figure)(const counts *);
static double tau(const counts *c) { return c->cycles > 0 ? c->tokens / c->cycles : 0; }
static double verified(const counts *c) { return c->cycles > 0 ? c->scheduled / c->cycles : 0; }
static double accepted(const counts *c) { return c->scheduled > 0 ? 100 * c->accepted / c->scheduled : 0; }

// The answers of a domain together; round 0: each once; else drawn with replacement.
static counts sum(const tally *t, int d, int round) {
    counts all;
    double *to = (double *)&all;
    memset(&all, 0, sizeof all);
    for (int i = 0; i < t->n[d]; i++) {
        int at = round ? (int)(dspark_uniform((uint64_t)round, 0, (uint64_t)i, d, 0) * t->n[d]) : i;
        const double *from = (const double *)&t->of[d][at];
        for (size_t j = 0; j < sizeof all / sizeof *to; j++) to[j] += from[j];
    }
    return all;
}

// Of a domain; N_DOMAINS: the mean over them
static double figure_of(const tally *t, int d, int round, figure f) {
    double mean = 0;
    counts c;
    if (d < N_DOMAINS) return c = sum(t, d, round), f(&c);
    for (d = 0; d < N_DOMAINS; d++) mean += figure_of(t, d, round, f) / N_DOMAINS;
    return mean;
}

// under NULL: the figure itself; else over that of `under`, whose prompts are the same
typedef struct { const char *model; int threads; } subject;
static void report(const char *question, const subject *of, const tally *t, const tally *under, int d, figure f,
                   const char *unit) {
    samples s = { NULL, 0, 0 };
    double value = 0, cycles = 0;
    for (int round = 0; round <= RESAMPLES; round++) {
        double x = figure_of(t, d, round, f);
        if (under) x /= figure_of(under, d, round, f);
        if (round) sample(&s, x);
        else value = x;
    }
    for (int i = 0; i < N_DOMAINS; i++) if (d == i || d == N_DOMAINS) cycles += sum(t, i, 0).cycles;
    printf("%s,%s,%d,%.5g,%.5g,%.5g,%s,%.0f\n", question, of->model, of->threads, value, quantile(&s, .025),
           quantile(&s, .975), unit, cycles);
    fflush(stdout);
    free(s.x);
}

static const char *domain_name(int d) { return d < N_DOMAINS ? domains[d] : "mean"; }

static void report_positions(const char *verifier, const char *drafter, const subject *of, const tally *t) {
    for (int k = 0; k < DSPARK_MAX_BLOCK; k++) {
        double reached = 0, right = 0;
        for (int d = 0; d < N_DOMAINS; d++) reached += sum(t, d, 0).reached[k], right += sum(t, d, 0).right[k];
        if (reached > 0)
            printf("accepted %s %s %d,%s,%d,%.1f,,,%%,%.0f\n", verifier, drafter, k + 1, of->model, of->threads,
                   100 * right / reached, reached);
    }
}

static void compare_drafters(dspark_model *const models[N_DRAFTERS], const work *w, const subject *of) {
    static tally t[N_DRAFTERS];
    char question[96];
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < N_DRAFTERS; i++) {
            dspark_policy p;
            memset(&p, 0, sizeof p);
            p.schedule = DSPARK_SCHEDULE_BLOCK, p.verify = v ? DSPARK_VERIFY_REJECTION : DSPARK_VERIFY_COUPLED;
            p.plain = i == PLAIN;
            if (!models[i]) continue;
            run(models[i], w, &p, &t[i]);
            for (int d = 0; d <= N_DOMAINS; d++) {
                snprintf(question, sizeof question, "tau %s %s %s", verifiers[v], drafters[i], domain_name(d));
                report(question, of, &t[i], NULL, d, tau, "tokens a pass");
            }
            snprintf(question, sizeof question, "dspark over %s %s", drafters[i], verifiers[v]);
            if (i != DSPARK) report(question, of, &t[DSPARK], &t[i], N_DOMAINS, tau, "x");
            report_positions(verifiers[v], drafters[i], of, &t[i]);
        }
}

static void sweep_thresholds(dspark_model *m, const work *w, const subject *of) {
    static const float thresholds[] = { 0, .2f, .4f, .6f, .7f, .8f, .9f, .95f };
    static const struct { const char *name, *unit; figure f; } figures[] = {
        { "tau", "tokens a pass", tau }, { "verified", "drafts a pass", verified }, { "accepted", "%", accepted } };
    static tally t;
    char question[96];
    for (int i = 0; i < (int)(sizeof thresholds / sizeof *thresholds); i++) {
        dspark_policy p;
        memset(&p, 0, sizeof p);
        p.schedule = DSPARK_SCHEDULE_THRESHOLD, p.threshold = thresholds[i];
        run(m, w, &p, &t);
        for (int f = 0; f < 3; f++)
            for (int chat = 0; chat < 2; chat++) {
                snprintf(question, sizeof question, "threshold %g %s %s", (double)thresholds[i], figures[f].name,
                         chat ? "chat" : "mean");
                report(question, of, &t, NULL, chat ? 2 : N_DOMAINS, figures[f].f, figures[f].unit);
            }
    }
}

static void sweep_depths(dspark_model *m, work w, const subject *of) {
    static const int depths[] = { 256, 512, 1024, 2048 };       // the drafter's window is 128
    static tally t;
    dspark_policy p;
    char question[96];
    memset(&p, 0, sizeof p);
    p.schedule = DSPARK_SCHEDULE_BLOCK;
    for (int i = 0; i < (int)(sizeof depths / sizeof *depths); i++) {
        w.depth = depths[i];
        run(m, &w, &p, &t);
        for (int d = 0; d <= N_DOMAINS; d++) {
            snprintf(question, sizeof question, "depth %d tau %s", depths[i], domain_name(d));
            report(question, of, &t, NULL, d, tau, "tokens a pass");
        }
    }
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *dflash = argc > 2 ? argv[2] : "-";
    const char *file = argc > 3 ? argv[3] : "bench/heldout.jsonl";
    int threads = argc > 4 ? atoi(argv[4]) : 1, prompts = argc > 5 ? atoi(argv[5]) : 12;
    int n = argc > 6 ? atoi(argv[6]) : 160;
    const subject of = { model_name(dir), threads };
    dspark_model *m = model_open(dir, threads, NULL), *models[N_DRAFTERS] = { m, NULL, lookup_open(dir, threads), m };
    texts all = texts_read(m, file);
    work w = { &all, prompts < MANY ? prompts : MANY, n, 0 };
    if (!dspark_model_config(m)->n_stages) die(dir, "has no drafter");
    if (strcmp(dflash, "-")) models[DFLASH] = model_open(dflash, threads, NULL);
    compare_drafters(models, &w, &of);
    sweep_thresholds(m, &w, &of);
    sweep_depths(m, w, &of);
    free(lookup.logits), texts_free(&all);
    dspark_model_close(m), dspark_model_close(models[LOOKUP]), dspark_model_close(models[DFLASH]);
}
