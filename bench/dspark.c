// dspark [DIR [TEXTS [THREADS [PROMPTS [TOKENS]]]]]: DSpark against plain decoding over held-out prompts (PROMPTS a
// domain, all if 0) at temperatures 0, 0.7 and 1, and over random bytes. Both write the same text, TURN tokens at a
// time in turn: the machine's speed changes within a second, and then changes for both.
//   dspark/plain D tT      tokens a second with DSpark over tokens a second without, the prompt left out: of a domain's
//                          prompts the median, and (`all`) of their whole time
//   equal texts            coupled verification gives the tokens of plain decoding: percent of texts, all temperatures
#include "bench.h"

enum { N_TEMPERATURES = 3, N_NOISE = 8, NOISE_BYTES = 256, RANDOM = N_DOMAINS, N_KINDS, TURN = 16 };
static const float temperatures[N_TEMPERATURES] = { 0, .7f, 1 };

typedef struct { dspark_session *session; int32_t *ids; int n, done; double s; } answer;

static void begin(dspark_model *m, const text *t, float temperature, uint64_t seed, int plain, int n_tokens, answer *a) {
    dspark_session_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.max_context = t->n + n_tokens + 1, desc.temperature = temperature, desc.seed = seed;
    desc.policy.plain = plain, desc.policy.quota = n_tokens;
    a->session = session_open(m, &desc);
    must(dspark_session_append(a->session, t->ids, t->n));
    a->n = a->done = 0, a->s = 0;
}

static void go_on(answer *a, int until) {
    dspark_step_result r;
    double start = seconds();
    while (!a->done && a->n < until) {
        must(dspark_step(&a->session, 1, NULL, &r));
        must(r.status);
        memcpy(a->ids + a->n, r.tokens, (size_t)r.n_tokens * sizeof *a->ids);
        a->n += r.n_tokens, a->done = r.finish != 0;
    }
    a->s += seconds() - start;
}

typedef struct { samples ratio[N_KINDS][N_TEMPERATURES]; double s[N_KINDS][N_TEMPERATURES][2]; int texts, equal; } tally;

static void compare(dspark_model *m, const text *t, int kind, int n_tokens, uint64_t seed, answer a[2], tally *all) {
    for (int i = 0; i < N_TEMPERATURES; i++) {
        for (int plain = 0; plain < 2; plain++) begin(m, t, temperatures[i], seed, plain, n_tokens, &a[plain]);
        for (int turn = 1; !a[0].done || !a[1].done; turn++)        // who begins changes
            go_on(&a[turn & 1], turn * TURN), go_on(&a[~turn & 1], turn * TURN);
        for (int plain = 0; plain < 2; plain++) dspark_session_close(a[plain].session);
        all->texts++, all->equal += a[0].n == a[1].n && !memcmp(a[0].ids, a[1].ids, (size_t)a[0].n * sizeof *a[0].ids);
        if (a[0].n < 8) continue;                           // too short to time
        sample(&all->ratio[kind][i], a[1].s / a[0].s);
        for (int k = 0; k < 2; k++) all->s[kind][i][k] += a[k].s;
    }
}

static void random_bytes(const dspark_model *m, text *t, uint64_t seed) {
    char bytes[NOISE_BYTES];
    for (int i = 0; i < NOISE_BYTES; i++) bytes[i] = (char)(dspark_uniform(seed, 0, (uint64_t)i, 0, 0) * 256);
    t->ids = (int32_t *)need(NOISE_BYTES, sizeof *t->ids);
    t->n = dspark_encode(dspark_model_tokenizer(m), bytes, NOISE_BYTES, DSPARK_PLAIN_TEXT, t->ids, NOISE_BYTES);
    if (t->n < 1) die("encode", dspark_last_error());
}

static void report(tally *all, const char *model, int threads) {
    char question[64];
    for (int kind = 0; kind < N_KINDS; kind++)
        for (int i = 0; i < N_TEMPERATURES; i++) {
            if (!all->ratio[kind][i].n) continue;
            snprintf(question, sizeof question, "dspark/plain %s t%g", kind < RANDOM ? domains[kind] : "random bytes",
                     (double)temperatures[i]);
            result(question, model, threads, &all->ratio[kind][i], "x");
            strcat(question, " all");
            result_one(question, model, threads, all->s[kind][i][1] / all->s[kind][i][0], "x");
        }
    result_one("equal texts", model, threads, 100.0 * all->equal / all->texts, "%");
    result_one("compared texts", model, threads, all->texts, "texts");
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *file = argc > 2 ? argv[2] : "bench/heldout.jsonl";
    int threads = argc > 3 ? atoi(argv[3]) : 1, prompts = argc > 4 ? atoi(argv[4]) : 0, n = argc > 5 ? atoi(argv[5]) : 256;
    dspark_model *m = model_open(dir, threads, NULL);
    texts all = texts_read(m, file);
    dspark_profile profile;
    answer a[2];
    int done[N_DOMAINS] = { 0 };
    static tally t;
    must(dspark_model_profile(m, &profile));        // measured here, not within the first answer
    for (int i = 0; i < 2; i++) a[i].ids = (int32_t *)need((size_t)n + DSPARK_MAX_BLOCK, sizeof *a[i].ids);
    for (int i = 0; i < all.n; i++)
        for (int d = 0; d < N_DOMAINS; d++)
            if (!all.t[i].is_document && !strcmp(all.t[i].domain, domains[d]) && (!prompts || done[d] < prompts))
                done[d]++, compare(m, &all.t[i], d, n, (uint64_t)i, a, &t);
    for (int i = 0; i < N_NOISE; i++) {
        text bytes;
        random_bytes(m, &bytes, (uint64_t)i);
        compare(m, &bytes, RANDOM, n, (uint64_t)i, a, &t);
        free(bytes.ids);
    }
    report(&t, model_name(dir), threads);
    free(a[0].ids), free(a[1].ids), texts_free(&all);
    dspark_model_close(m);
    return t.equal != t.texts;
}
