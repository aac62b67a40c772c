// calibrate DIR FIT.jsonl HELDOUT.jsonl OUT [CYCLES [THREADS]]: judges a checkpoint's confidences, and fits what makes
// them true probabilities (`make calibrate` makes the prompts too).
//
// For each verifier, at a temperature of each band, the prompts of FIT and of HELDOUT are answered with the whole block
// verified in every cycle; CYCLES (20,000) of HELDOUT and half as many of FIT are kept, a quarter a domain, with
// their confidence logits and accepted prefixes. On FIT two things are fitted, position by position, and judged on
// HELDOUT:
//   sts             temperatures (>>calibrate in dspark.h), which leave c_k independent of the drafts before
//   said, stood     those c's product and how often it came true: FIT's reliability diagram, DSPARK_CURVE_POINTS
//                   bins of equally many cycles, made non-decreasing (isotonic regression); a_k is linear between them
// Written to OUT:
//   calibration.json    a row for each verifier and band, which belongs beside the checkpoint's config.json
//   cycles.csv          set, verify, temperature, domain, prompt, logit 1 .. gamma, accepted
//   report.csv          ECE, AUC and Brier score of the prefix's probability a_k, by k, before and after, held out,
//                       with 95 % intervals (bootstrap over prompts)
//   reliability.csv     the points of the diagram: predicted against observed a_k, in 20 bins
#include "bench/bench.h"

enum { GAMMA = DSPARK_MAX_BLOCK, LANES = 16, TOKENS = 128, BINS = 20, RESAMPLES = 200, BEFORE = 0, AFTER = 1 };

typedef struct { const char *name; int verify; float temperature, low, high; } manner;
static const manner manners[] = {
    { "greedy", DSPARK_VERIFY_GREEDY, 0, 0, 0 },
    { "coupled", DSPARK_VERIFY_COUPLED, .3f, 0, .5f }, { "coupled", DSPARK_VERIFY_COUPLED, .7f, .5f, .85f },
    { "coupled", DSPARK_VERIFY_COUPLED, 1, .85f, 100 },
    { "rejection", DSPARK_VERIFY_REJECTION, .3f, 0, .5f }, { "rejection", DSPARK_VERIFY_REJECTION, .7f, .5f, .85f },
    { "rejection", DSPARK_VERIFY_REJECTION, 1, .85f, 100 }
};
enum { N_MANNERS = sizeof manners / sizeof *manners };

// ---- cycles

typedef struct {
    float *logits;              // [n][gamma]
    int *accepted, *prompt;     // [n]; prompt: its number in the set
    int n, gamma, n_prompts;
} cycles;

typedef struct {
    dspark_model *m;
    const texts *set;
    const manner *how;
    int wanted[N_DOMAINS];                      // cycles still to come
    int next[N_DOMAINS], round[N_DOMAINS];      // the prompt after the last; times that all were gone through
    int used_up[N_DOMAINS];                     // 1: no prompt is left
    cycles *out;
} recorder;

typedef struct { dspark_session *s; int domain, prompt; } lane;

// The next prompt of a domain; -1: there is none. Where answers are drawn, the set may be gone through again.
static int next_prompt(recorder *r, int domain) {
    for (int tried = 0; tried <= r->set->n; tried++) {
        if (r->next[domain] == r->set->n) {
            if (r->how->temperature == 0) return -1;
            r->next[domain] = 0, r->round[domain]++;
        }
        if (domain_of(&r->set->t[r->next[domain]++]) == domain) return r->next[domain] - 1;
    }
    return -1;
}

// The domain that lacks most, of those that have prompts left; -1: none.
static int wants(const recorder *r) {
    int most = -1;
    for (int d = 0; d < N_DOMAINS; d++)
        if (r->wanted[d] > 0 && !r->used_up[d] && (most < 0 || r->wanted[d] > r->wanted[most])) most = d;
    return most;
}
static int wants_any(const recorder *r) {
    for (int d = 0; d < N_DOMAINS; d++) if (r->wanted[d] > 0) return 1;
    return 0;
}

// Gives a lane an answer to begin, of the domain that lacks most; 0: there is nothing left to begin.
static int lane_open(recorder *r, lane *l) {
    dspark_session_desc desc;
    memset(&desc, 0, sizeof desc);
    while ((l->domain = wants(r)) >= 0 && (l->prompt = next_prompt(r, l->domain)) < 0) r->used_up[l->domain] = 1;
    if (l->domain < 0) return 0;
    const text *t = &r->set->t[l->prompt];
    desc.max_context = t->n + TOKENS + 1, desc.temperature = r->how->temperature;
    desc.seed = (uint64_t)(l->prompt + r->set->n * r->round[l->domain]);
    desc.policy.schedule = DSPARK_SCHEDULE_BLOCK, desc.policy.verify = r->how->verify, desc.policy.quota = TOKENS;
    l->s = session_open(r->m, &desc);
    must(dspark_session_append(l->s, t->ids, t->n));
    return 1;
}

// With a temperature of WIDE, a float confidence still resolves logits of up to hundreds.
enum { WIDE = 16 };
static float logit_of(float c) { return (float)(WIDE * (log((double)c) - log1p(-(double)c))); }

static void keep(recorder *r, const lane *l, const dspark_step_result *got) {
    cycles *out = r->out;
    for (int k = 0; k < out->gamma; k++) out->logits[out->n * out->gamma + k] = logit_of(got->confidence[k]);
    out->accepted[out->n] = got->n_accepted, out->prompt[out->n++] = l->prompt;
    r->wanted[l->domain]--;
}

static void record(dspark_model *m, const texts *set, const manner *how, int n, cycles *out) {
    recorder r = { m, set, how, { 0 }, { 0 }, { 0 }, { 0 }, out };
    dspark_step_result result[LANES];
    lane lanes[LANES];
    int n_lanes = 0;
    for (int d = 0; d < N_DOMAINS; d++) r.wanted[d] = n / N_DOMAINS;
    out->gamma = dspark_model_config(m)->dspark_block_size, out->n = 0, out->n_prompts = set->n;
    while (n_lanes < LANES && lane_open(&r, &lanes[n_lanes])) n_lanes++;
    while (n_lanes && wants_any(&r)) {
        dspark_session *s[LANES];
        for (int i = 0; i < n_lanes; i++) s[i] = lanes[i].s;
        must(dspark_step(s, n_lanes, NULL, result));
        for (int i = n_lanes - 1; i >= 0; i--) {
            must(result[i].status);
            // a text that ends within the block says nothing of the drafts after its end
            if (result[i].n_scheduled == out->gamma && !result[i].finish && r.wanted[lanes[i].domain] > 0)
                keep(&r, &lanes[i], &result[i]);
            if (!result[i].finish) continue;
            dspark_session_close(lanes[i].s);
            if (!lane_open(&r, &lanes[i])) lanes[i] = lanes[--n_lanes];
        }
    }
    while (n_lanes) dspark_session_close(lanes[--n_lanes].s);
    for (int d = 0; d < N_DOMAINS; d++)
        if (r.wanted[d] > 0)
            fprintf(stderr, "%s, %s: %d cycles fewer, the prompts are used up\n", how->name, domains[d], r.wanted[d]);
}

static void write_cycles(FILE *f, const char *set, const manner *how, const texts *all, const cycles *c) {
    for (int i = 0; i < c->n; i++) {
        fprintf(f, "%s,%s,%g,", set, how->name, (double)how->temperature);
        fprintf(f, "%s,%d", all->t[c->prompt[i]].domain, c->prompt[i]);
        for (int k = 0; k < c->gamma; k++) fprintf(f, ",%.6g", (double)c->logits[i * c->gamma + k]);
        fprintf(f, ",%d\n", c->accepted[i]);
    }
}

// ---- how good a probability is

enum { ECE, AUC, BRIER, N_SCORES };
static const char *const scores[N_SCORES] = { "ECE", "AUC", "Brier" };

typedef struct { double q; int label, prompt; } judged;     // a_k as said; did the prefix stand?

static int by_q(const void *a, const void *b) {
    double x = ((const judged *)a)->q, y = ((const judged *)b)->q;
    return (x > y) - (x < y);
}

// a_k of every cycle, sorted by it.
static judged *judge(const cycles *c, int k, const dspark_calibration *by) {
    judged *j = (judged *)need((size_t)c->n, sizeof *j);
    for (int i = 0; i < c->n; i++) {
        float confidence[GAMMA];
        j[i].q = 1, j[i].label = c->accepted[i] > k, j[i].prompt = c->prompt[i];
        memcpy(confidence, c->logits + i * c->gamma, (size_t)c->gamma * sizeof *confidence);
        dspark__calibrate(by, confidence, k + 1);
        for (int p = 0; p <= k; p++) j[i].q *= (double)confidence[p];
    }
    qsort(j, (size_t)c->n, sizeof *j, by_q);
    return j;
}

typedef struct { double weight, said, stood; } bin;
static void bins_fill(const judged *j, int n, const double *weight, bin b[BINS]) {
    memset(b, 0, BINS * sizeof *b);
    for (int i = 0; i < n; i++) {
        int at = (int)(j[i].q * BINS);
        double w = weight ? weight[j[i].prompt] : 1;
        at = at < BINS ? at : BINS - 1;
        b[at].weight += w, b[at].said += w * j[i].q, b[at].stood += w * j[i].label;
    }
}

// weight [n_prompts] of each prompt's cycles; NULL: 1
static void score(const judged *j, int n, const double *weight, double out[N_SCORES]) {
    bin b[BINS];
    double total = 0, ones = 0, zeros = 0, pairs = 0;
    out[ECE] = out[BRIER] = 0;
    bins_fill(j, n, weight, b);
    for (int i = 0; i < BINS; i++) out[ECE] += fabs(b[i].said - b[i].stood), total += b[i].weight;
    for (int i = 0, next; i < n; i = next) {        // ties of q are half right
        double one = 0, zero = 0;
        for (next = i; next < n && j[next].q == j[i].q; next++) {
            double w = weight ? weight[j[next].prompt] : 1, off = j[next].q - j[next].label;
            out[BRIER] += w * off * off;
            *(j[next].label ? &one : &zero) += w;
        }
        pairs += one * (zeros + zero / 2), ones += one, zeros += zero;
    }
    out[ECE] /= total, out[BRIER] /= total, out[AUC] = ones * zeros > 0 ? pairs / (ones * zeros) : .5;
}

// Prompts drawn with replacement: how often each
static void resample(int n_prompts, uint64_t seed, double *weight) {
    memset(weight, 0, (size_t)n_prompts * sizeof *weight);
    for (int i = 0; i < n_prompts; i++) weight[(int)(dspark_uniform(seed, 0, (uint64_t)i, 0, 0) * n_prompts)]++;
}

typedef struct { double value; samples resampled; } estimate;
static void estimate_print(FILE *f, estimate *e) {
    fprintf(f, ",%.5f,%.5f,%.5f", e->value, quantile(&e->resampled, .025), quantile(&e->resampled, .975));
}

static void print_reliability(FILE *f, const manner *how, int k, const char *stage, const judged *j, int n) {
    bin b[BINS];
    bins_fill(j, n, NULL, b);
    for (int i = 0; i < BINS; i++)
        if (b[i].weight > 0)
            fprintf(f, "%s,%g,%d,%s,%.5f,%.5f,%.0f\n", how->name, (double)how->temperature, k + 1, stage,
                    b[i].said / b[i].weight, b[i].stood / b[i].weight, b[i].weight);
}

// The held-out cycles under T = 1 and under what was fitted
static void report(FILE *f, FILE *reliability, const manner *how, const cycles *c, const dspark_calibration *fitted) {
    static const char *const stages[2] = { "before", "after" };
    dspark_calibration ones;
    double *weight = (double *)need((size_t)c->n_prompts, sizeof *weight), got[N_SCORES];
    judged *j[2][GAMMA];
    estimate e[2][GAMMA + 1][N_SCORES], *mean;      // the last: the mean over positions
    memset(e, 0, sizeof e), memset(&ones, 0, sizeof ones);
    for (int k = 0; k < c->gamma; k++) ones.sts[k] = 1;
    for (int stage = BEFORE; stage <= AFTER; stage++)
        for (int k = 0; k < c->gamma; k++) {
            j[stage][k] = judge(c, k, stage ? fitted : &ones);
            print_reliability(reliability, how, k, stages[stage], j[stage][k], c->n);
        }
    for (int round = 0; round <= RESAMPLES; round++) {
        if (round) resample(c->n_prompts, (uint64_t)round, weight);
        for (int stage = BEFORE; stage <= AFTER; stage++) {
            double sum[N_SCORES] = { 0 };
            for (int k = 0; k <= c->gamma; k++) {
                if (k < c->gamma) score(j[stage][k], c->n, round ? weight : NULL, got);
                for (int s = 0; s < N_SCORES; s++) {
                    double x = k < c->gamma ? got[s] : sum[s] / c->gamma;
                    sum[s] += x;
                    if (round) sample(&e[stage][k][s].resampled, x);
                    else e[stage][k][s].value = x;
                }
            }
        }
    }
    for (int k = 0; k <= c->gamma; k++)
        for (int s = 0; s < N_SCORES; s++) {
            fprintf(f, "%s,%g,", how->name, (double)how->temperature);
            if (k < c->gamma) fprintf(f, "%d,%s", k + 1, scores[s]);
            else fprintf(f, "mean,%s", scores[s]);
            estimate_print(f, &e[BEFORE][k][s]), estimate_print(f, &e[AFTER][k][s]);
            fprintf(f, ",%d\n", c->n);
        }
    mean = e[AFTER][c->gamma];
    printf("| %s | %g | %.2f %% | %.2f %% (%.2f to %.2f) | %.3f to %.3f | %.3f to %.3f | %d |\n", how->name,
           (double)how->temperature, 100 * e[BEFORE][c->gamma][ECE].value, 100 * mean[ECE].value,
           100 * quantile(&mean[ECE].resampled, .025), 100 * quantile(&mean[ECE].resampled, .975),
           e[BEFORE][c->gamma][AUC].value, mean[AUC].value, e[BEFORE][c->gamma][BRIER].value, mean[BRIER].value, c->n);
    fflush(stdout);
    for (int stage = 0; stage < 2; stage++)
        for (int k = 0; k <= c->gamma; k++) {
            if (k < c->gamma) free(j[stage][k]);
            for (int s = 0; s < N_SCORES; s++) free(e[stage][k][s].resampled.x);
        }
    free(weight);
}

// Makes y non-decreasing: neighbours that fall take their common mean (bins weigh the same).
static void make_rise(double *y, int n) {
    int first[DSPARK_CURVE_POINTS], blocks = 0;      // a block's first bin; it ends where the next begins
    for (int i = 0; i < n; i++) {
        first[blocks++] = i;
        while (blocks > 1 && y[first[blocks - 2]] > y[first[blocks - 1]]) {
            int a = first[blocks - 2], b = first[--blocks];
            double mean = (y[a] * (b - a) + y[b] * (i + 1 - b)) / (i + 1 - a);
            for (int k = a; k <= i; k++) y[k] = mean;
        }
    }
}

// The curve of the prefixes of k + 1 drafts, from the temperatures' products in order
static void fit_curve(const judged *j, int n, float *said, float *stood) {
    double y[DSPARK_CURVE_POINTS];
    for (int b = 0; b < DSPARK_CURVE_POINTS; b++) {
        int from = (int)((int64_t)n * b / DSPARK_CURVE_POINTS), to = (int)((int64_t)n * (b + 1) / DSPARK_CURVE_POINTS);
        double x = 0;
        y[b] = 0;
        for (int i = from; i < to; i++) x += j[i].q / (to - from), y[b] += (double)j[i].label / (to - from);
        said[b] = (float)x;
    }
    make_rise(y, DSPARK_CURVE_POINTS);
    for (int b = 0; b < DSPARK_CURVE_POINTS; b++) stood[b] = (float)fmax(y[b], 1e-3);
}

// Of at least DSPARK_CURVE_POINTS cycles
static void fit(const cycles *c, dspark_calibration *row) {
    dspark_sts_desc d;
    memset(&d, 0, sizeof d), memset(row, 0, sizeof *row);
    d.logits = c->logits, d.accepted = c->accepted, d.n_cycles = c->n, d.gamma = c->gamma, d.n_bins = BINS;
    d.scratch = (double *)need(2 * (size_t)c->n, sizeof *d.scratch);
    must(dspark_sts_fit(&d, row->sts, NULL, NULL));
    free(d.scratch);
    for (int k = 0; k < c->gamma; k++) {
        judged *j = judge(c, k, row);
        fit_curve(j, c->n, row->said[k], row->stood[k]);
        free(j);
    }
    row->curved = 1;
}

// A key and its numbers, a line for each `width` of them
static void write_numbers(FILE *f, const char *key, const float *x, int n, int width) {
    fprintf(f, "\"%s\": [", key);
    for (int i = 0; i < n; i++) fprintf(f, "%s%.5g", !i ? "" : i % width ? ", " : ",\n    ", (double)x[i]);
    fputs("]", f);
}

static void write_row(FILE *f, const manner *how, const dspark_calibration *row, int gamma, int last) {
    fprintf(f, "  {\"verify\": \"%s\", \"temperature\": [%g, %g], ", how->name, (double)how->low, (double)how->high);
    write_numbers(f, "sts", row->sts, gamma, gamma), fputs(",\n   ", f);
    write_numbers(f, "said", row->said[0], gamma * DSPARK_CURVE_POINTS, DSPARK_CURVE_POINTS), fputs(",\n   ", f);
    write_numbers(f, "stood", row->stood[0], gamma * DSPARK_CURVE_POINTS, DSPARK_CURVE_POINTS);
    fprintf(f, "}%s\n", last ? "" : ",");
}

static FILE *create(const char *dir, const char *name, const char *head) {
    char path[4096];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (!(f = fopen(path, "w"))) die(path, "cannot be written");
    fputs(head, f);
    return f;
}

static cycles cycles_new(int n, int gamma) {
    cycles c;
    memset(&c, 0, sizeof c);
    c.logits = (float *)need((size_t)(n * gamma), sizeof *c.logits);
    c.accepted = (int *)need((size_t)n, sizeof *c.accepted), c.prompt = (int *)need((size_t)n, sizeof *c.prompt);
    return c;
}

static void cycles_free(cycles *c) { free(c->logits), free(c->accepted), free(c->prompt); }

int main(int argc, char **argv) {
    int n = argc > 5 ? atoi(argv[5]) : 20000, threads = argc > 6 ? atoi(argv[6]) : 1, gamma;
    float raw[GAMMA];
    dspark_calibration fitted;
    if (argc < 5 || n < 4 * DSPARK_CURVE_POINTS)
        die("calibrate", "expected DIR FIT.jsonl HELDOUT.jsonl OUT [CYCLES [THREADS]]");
    dspark_model *m = model_open(argv[1], threads, NULL);
    texts fitting = texts_read(m, argv[2]), heldout = texts_read(m, argv[3]);
    FILE *rows = create(argv[4], "calibration.json", "{\"format\": \"dspark-calibration-1\", \"rows\": [\n");
    FILE *all = create(argv[4], "cycles.csv", "set,verify,temperature,domain,prompt,logits and accepted\n");
    FILE *scored = create(argv[4], "report.csv",
                          "verify,temperature,position,score,before,low,high,after,low,high,cycles\n");
    FILE *reliability = create(argv[4], "reliability.csv", "verify,temperature,position,stage,said,stood,cycles\n");
    cycles seen = cycles_new(n, gamma = dspark_model_config(m)->dspark_block_size), unseen = cycles_new(n, gamma);
    for (int k = 0; k < GAMMA; k++) raw[k] = WIDE;
    must(dspark_model_set_calibration(m, raw));
    puts("| verifier | temperature | ECE before | after (95 %) | AUC | Brier | cycles |\n"
         "| - | - | - | - | - | - | - |");
    for (int i = 0; i < N_MANNERS; i++) {
        record(m, &fitting, &manners[i], n / 2, &seen), write_cycles(all, "fit", &manners[i], &fitting, &seen);
        record(m, &heldout, &manners[i], n, &unseen), write_cycles(all, "heldout", &manners[i], &heldout, &unseen);
        fit(&seen, &fitted);
        report(scored, reliability, &manners[i], &unseen, &fitted);
        write_row(rows, &manners[i], &fitted, gamma, i == N_MANNERS - 1);
    }
    fputs("]}\n", rows);
    fclose(rows), fclose(all), fclose(scored), fclose(reliability);
    texts_free(&fitting), texts_free(&heldout), dspark_model_close(m);
    cycles_free(&seen), cycles_free(&unseen);
    return 0;
}
