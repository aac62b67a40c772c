/* The algorithm layer against its golden cases (golden/algorithm/README.md): Philox, uniforms, schedules,
   verifiers, distributions, STS and the never-slower account, each compared as that file says. */
#define DSPARK_NO_MODEL
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "near.h"
#include "tap.h"

enum { MAX_FIELDS = 24 };
typedef struct {
    char name[64], key[MAX_FIELDS][24];
    int n_fields, count[MAX_FIELDS];
    char **word[MAX_FIELDS];
} golden_case;

static char *next_word(char **p) {
    char *start = *p + strspn(*p, " \n"), *end = start + strcspn(start, " \n");
    *p = *end ? end + 1 : end;
    *end = 0;
    return start;
}

static int read_case(char **p, golden_case *c) {
    char *word = next_word(p);
    if (strcmp(word, "case")) return 0;
    snprintf(c->name, sizeof c->name, "%s", next_word(p));
    for (c->n_fields = 0; strcmp(word = next_word(p), "end") && c->n_fields < MAX_FIELDS; c->n_fields++) {
        int f = c->n_fields;
        snprintf(c->key[f], sizeof c->key[f], "%s", word);
        c->count[f] = atoi(next_word(p));
        c->word[f] = (char **)malloc((size_t)(c->count[f] + 1) * sizeof(char *));
        for (int i = 0; i < c->count[f]; i++) c->word[f][i] = next_word(p);
    }
    return 1;
}

static int field(const golden_case *c, const char *key) {
    for (int f = 0; f < c->n_fields; f++) if (!strcmp(c->key[f], key)) return f;
    return -1;
}
static int count(const golden_case *c, const char *key) { return field(c, key) < 0 ? 0 : c->count[field(c, key)]; }
static const char *text(const golden_case *c, const char *key, int i) { return c->word[field(c, key)][i]; }
static int integer(const golden_case *c, const char *key) { return atoi(text(c, key, 0)); }
static uint64_t wide(const golden_case *c, const char *key) { return strtoull(text(c, key, 0), NULL, 10); }
static double real(const golden_case *c, const char *key, int i) { return strtod(text(c, key, i), NULL); }

/* A field's values as floats or ints; NULL for none. */
static float *floats(const golden_case *c, const char *key) {
    int n = count(c, key);
    float *x = n ? (float *)malloc((size_t)n * sizeof *x) : NULL;
    for (int i = 0; i < n; i++) x[i] = strtof(text(c, key, i), NULL);
    return x;
}
static int *ints(const golden_case *c, const char *key) {
    int n = count(c, key), *x = n ? (int *)malloc((size_t)n * sizeof *x) : NULL;
    for (int i = 0; i < n; i++) x[i] = atoi(text(c, key, i));
    return x;
}
static dspark_status status_of(const golden_case *c) {
    const char *s = text(c, "status", 0);
    return !strcmp(s, "OK") ? DSPARK_OK : !strcmp(s, "ARGUMENT") ? DSPARK_ERROR_ARGUMENT : DSPARK_ERROR_NUMERIC;
}

static int check_philox(const golden_case *c) {
    uint32_t counter[4], key[2], out[4];
    if (field(c, "index") >= 0) {
        uint32_t index = (uint32_t)wide(c, "index"), word = (uint32_t)strtoul(text(c, "word", 0), NULL, 16);
        double u = dspark_uniform(wide(c, "seed"), integer(c, "purpose"), wide(c, "at"), integer(c, "k"), index);
        return u > (word + .25) * 0x1p-32 && u < (word + .75) * 0x1p-32;
    }
    for (int i = 0; i < 4; i++) counter[i] = (uint32_t)strtoul(text(c, "counter", i), NULL, 16);
    for (int i = 0; i < 2; i++) key[i] = (uint32_t)strtoul(text(c, "key", i), NULL, 16);
    dspark_philox(counter, key, out);
    for (int i = 0; i < 4; i++) if (out[i] != (uint32_t)strtoul(text(c, "out", i), NULL, 16)) return 0;
    return 1;
}

static int check_schedule(const golden_case *c) {
    dspark_schedule_desc d;
    dspark_sps sps;
    int R = integer(c, "R"), n = R > 0 ? R : 0, same, *expected = ints(c, "lengths"), *lengths = (int *)malloc((size_t)(n + 1) * sizeof(int));
    float *table = floats(c, "sps"), *confidence = floats(c, "confidence"), *threshold = floats(c, "threshold"), *weight = floats(c, "weight");
    int *n_drafted = ints(c, "n_drafted"), *cap = ints(c, "cap");
    memset(&d, 0, sizeof d);
    d.n_requests = R, d.gamma = integer(c, "gamma"), d.mode = integer(c, "mode"), d.other_rows = integer(c, "other_rows");
    d.budget = integer(c, "budget"), d.draft_us = strtof(text(c, "draft_us", 0), NULL);
    d.confidence = confidence, d.threshold = threshold, d.weight = weight, d.n_drafted = n_drafted, d.cap = cap;
    sps.sps = table, sps.n = count(c, "sps");
    d.sps = table ? &sps : NULL;
    d.scratch = malloc(dspark_schedule_scratch_bytes(R, d.gamma) + 1);
    for (int r = 0; r < n; r++) lengths[r] = -77;
    dspark_status status = dspark_schedule(&d, lengths);
    same = status == status_of(c);
    for (int r = 0; r < n; r++) same &= lengths[r] == (status ? -77 : expected[r]);
    free(d.scratch), free(lengths), free(table), free(confidence), free(threshold), free(weight), free(n_drafted), free(cap), free(expected);
    return same;
}

static int check_verify(const golden_case *c) {
    dspark_verify_desc d;
    float *p_target = floats(c, "p_target"), *p_draft = floats(c, "p_draft");
    int *draft = ints(c, "draft"), n_accepted = -1;
    int32_t next = -1;
    memset(&d, 0, sizeof d);
    d.p_target = p_target, d.p_draft = integer(c, "one_hot") ? NULL : p_draft, d.draft = draft, d.n = integer(c, "n");
    d.vocab = integer(c, "vocab"), d.position = integer(c, "position"), d.mode = integer(c, "mode");
    d.seed = wide(c, "seed"), d.cycle = wide(c, "cycle");
    dspark_status status = dspark_verify(&d, &n_accepted, &next);
    free(p_target), free(p_draft), free(draft);
    return status == status_of(c) && n_accepted == integer(c, "n_accepted") && next == integer(c, "next");
}

static int check_distribution(const golden_case *c) {
    float *logits = floats(c, "logits"), *expected = floats(c, "p"), *p = (float *)malloc((size_t)(count(c, "logits") + 1) * sizeof *p);
    dspark_status status = dspark_distribution(logits, integer(c, "vocab"), strtof(text(c, "temperature", 0), NULL), integer(c, "top_k"),
                                               strtof(text(c, "top_p", 0), NULL), strtof(text(c, "min_p", 0), NULL), p);
    int same = status == status_of(c);
    for (int i = 0; same && !status && i < count(c, "p"); i++)
        same = expected[i] == 0 ? p[i] == 0 : fabs((double)p[i] - (double)expected[i]) <= 1e-6 * (double)expected[i];
    free(logits), free(expected), free(p);
    return same;
}

static int check_sts(const golden_case *c) {
    dspark_sts_desc d;
    int gamma = integer(c, "gamma"), n = integer(c, "n"), *accepted = ints(c, "accepted"), same = 1;
    float *logits = floats(c, "logits"), *grid = floats(c, "grid"), temperature[16];
    double before[16], after[16];
    memset(&d, 0, sizeof d);
    d.logits = logits, d.accepted = accepted, d.n_cycles = n, d.gamma = gamma, d.grid = grid, d.n_grid = count(c, "grid");
    d.n_bins = integer(c, "bins"), d.scratch = (double *)malloc((size_t)(2 * n) * sizeof(double));
    if (dspark_sts_fit(&d, temperature, before, after)) same = 0;
    for (int k = 0; k < gamma && same; k++)
        same = temperature[k] == strtof(text(c, "temperature", k), NULL) && fabs(before[k] - real(c, "ece_before", k)) < 1e-9 &&
               fabs(after[k] - real(c, "ece_after", k)) < 1e-9;
    free(logits), free(grid), free(accepted), free(d.scratch);
    return same;
}

static int check_account(const golden_case *c) {
    dspark_account a;
    a.allowance = real(c, "allowance", 0), a.balance_us = real(c, "start_us", 0), a.limit_us = real(c, "limit_us", 0);
    for (int i = 0; i + 5 < count(c, "steps"); i += 6) {
        double plain = real(c, "steps", i), worst = real(c, "steps", i + 1);
        if (dspark_account_affords(&a, plain, worst) != (int)real(c, "steps", i + 2)) return 0;
        dspark_account_settle(&a, plain, real(c, "steps", i + 3), (int)real(c, "steps", i + 4));
        if (!(fabs(a.balance_us - real(c, "steps", i + 5)) <= 1e-6 * (1 + fabs(a.balance_us)))) return 0;
    }
    return 1;
}

static void check_file(const char *name, int (*check)(const golden_case *)) {
    char path[128], *bytes, *p;
    golden_case c;
    int n = 0, bad = 0;
    snprintf(path, sizeof path, "tests/golden/algorithm/%s.txt", name);
    FILE *f = fopen(path, "rb");
    if (!ok(f != NULL, "%s is there", path)) return;
    fseek(f, 0, SEEK_END);
    size_t size = (size_t)ftell(f);
    rewind(f);
    p = bytes = (char *)calloc(size + 1, 1);
    if (fread(bytes, 1, size, f) != size) bad++;
    fclose(f);
    while (read_case(&p, &c)) {
        if (!check(&c)) printf("# %s: case %s\n", name, c.name), bad++;
        for (int i = 0; i < c.n_fields; i++) free(c.word[i]);
        n++;
    }
    free(bytes);
    ok(n > 0 && !bad, "%s: all %d golden cases hold", name, n);
}

static int names(dspark_status status, const char *expected) {
    int is = status == DSPARK_ERROR_ARGUMENT && !strcmp(dspark_last_error(), expected);
    if (!is) printf("# %s, not %s\n", dspark_last_error(), expected);
    return is;
}
static void check_arguments(void) {
    float p[2] = { .5f, .5f }, t, nan = NAN;
    double room[64];
    int n;
    int32_t next, draft[2] = { 0, 2 };
    dspark_schedule_desc s = { 0 };
    dspark_verify_desc v = { 0 };
    dspark_sts_desc f = { 0 };
    int named = names(dspark_draw(NULL, 2, 0, 0, 0, 0, &next), "draw: p is NULL") &
        names(dspark_draw(p, 0, 0, 0, 0, 0, &next), "draw: vocab = 0, expected 1 or more") &
        names(dspark_draw(p, 2, 0, 4, 0, 0, &next), "draw: purpose = 4, expected 0 .. 3") &
        names(dspark_draw(p, 2, 0, 0, 0, 65536, &next), "draw: k = 65536, expected 0 .. 65535") &
        names(dspark_distribution(p, 2, -1, 0, 0, 0, p), "distribution: temperature = -1, expected 0 or more") &
        names(dspark_distribution(p, 2, nan, 0, 0, 0, p), "distribution: temperature = nan, expected 0 or more") &
        names(dspark_distribution(p, 2, 1, -3, 0, 0, p), "distribution: top_k = -3, expected 0 or more") &
        names(dspark_distribution(p, 2, 1, 0, -.5f, 0, p), "distribution: top_p = -0.5, expected 0 or more") &
        names(dspark_distribution(p, 2, 1, 0, 0, 1.5f, p), "distribution: min_p = 1.5, expected 0 .. 1");
    named &= names(dspark_schedule(NULL, &n), "schedule: desc is NULL");
    s.gamma = -1;
    named &= names(dspark_schedule(&s, &n), "schedule: gamma = -1, expected 0 or more");
    s.gamma = 1, s.mode = 6;
    named &= names(dspark_schedule(&s, &n), "schedule: mode = 6, expected 0 .. 5");
    s.mode = DSPARK_SCHEDULE_BLOCK, s.n_requests = 1;
    named &= names(dspark_schedule(&s, NULL), "schedule: lengths is NULL");
    named &= names(dspark_verify(NULL, &n, &next), "verify: desc is NULL");
    v.p_target = p, v.vocab = 2, v.n = 2;
    named &= names(dspark_verify(&v, &n, &next), "verify: draft is NULL");
    v.draft = draft;
    named &= names(dspark_verify(&v, &n, &next), "verify: draft[1] = 2, expected 0 .. 1");
    v.position = -1;
    named &= names(dspark_verify(&v, &n, &next), "verify: position = -1, expected 0 or more");
    named &= names(dspark_sts_fit(NULL, &t, NULL, NULL), "sts: desc is NULL");
    f.n_cycles = 1, f.gamma = 1, f.scratch = room;
    named &= names(dspark_sts_fit(&f, &t, NULL, NULL), "sts: logits is NULL");
    f.logits = p, f.accepted = &n, n = 0, f.n_bins = 1025;
    named &= names(dspark_sts_fit(&f, &t, NULL, NULL), "sts: n_bins = 1025, expected 0 .. 1024");
    f.n_bins = 0;
    named &= names(dspark_sts_fit(&f, NULL, NULL, NULL), "sts: temperature is NULL");
    ok(named, "an argument that is wrong is named, with what was expected and found");
}

/* Errors in units of the last place against libm's long double. */
static void check_elementary(void) {
    double log_error = 0, exp_error = 0, sin_error = 0;
    int moderate = 1;
    for (int i = 1; i < 200000; i++) {
        double u = dspark_uniform(7, 0, (uint64_t)i, 0, 0), x = ldexp(u, i % 600 - 300), s, c;
        long double exact = logl((long double)x);
        double ulp = fabs(nextafter((double)exact, 1e300) - (double)exact);
        log_error = worse(log_error, (double)(fabsl((long double)dspark__log(x) - exact) / ulp));
        x = 1417 * u - 708, exact = expl((long double)x);
        ulp = nextafter((double)exact, 1e308) - (double)exact;
        exp_error = worse(exp_error, (double)(fabsl((long double)dspark__exp(x) - exact) / ulp));
        moderate &= fabs(x) > 700 || dspark__exp_moderate(x) == dspark__exp(x);
        x = (u - .5) * 3.2e6;
        dspark__sincos(x, &s, &c);
        sin_error = worse(sin_error, (double)fabsl((long double)s - sinl((long double)x)));
        sin_error = worse(sin_error, (double)fabsl((long double)c - cosl((long double)x)));
    }
    printf("# log %.2f ulp, exp %.2f ulp, sin and cos %.1e\n", log_error, exp_error, sin_error);
    ok(log_error < 2, "log is within 2 ulp");
    ok(exp_error < 2, "exp is within 2 ulp from -708 to 709");
    ok(moderate, "exp by one factor has the same bits from -700 to 700");
    ok(sin_error < 1e-15, "sin and cos are within 1e-15 up to 1.6 million radians");
}

static void check_subnormals(void) {
    double log_error = 0, exp_error = 0;
    for (int i = 0; i < 100000; i++) {
        double u = dspark_uniform(7, 1, (uint64_t)i, 0, 0), x = u * DBL_MIN, ulp;
        long double exact = logl((long double)x);
        ulp = fabs(nextafter((double)exact, 0) - (double)exact);
        log_error = worse(log_error, (double)(fabsl((long double)dspark__log(x) - exact) / ulp));
        x = -708.4 - 36.8 * u, exact = expl((long double)x);
        exp_error = worse(exp_error, (double)(fabsl((long double)dspark__exp(x) - exact) / 0x1p-1074L));
    }
    ok(log_error < 1, "log of a subnormal is within an ulp (%.2f)", log_error);
    ok(exp_error < 1, "a subnormal exp is within an ulp, rounded once (%.2f)", exp_error);
}

static void check_limits(void) {
    double highest = 0x1.62e42fefa39efp+9, lowest = -0x1.74910d52d3051p+9, s, c;
    dspark__sincos(HUGE_VAL, &s, &c);
    ok(dspark__exp(highest) <= DBL_MAX && dspark__exp(nextafter(highest, 1e9)) == HUGE_VAL,
       "exp is finite up to the logarithm of the largest double, and then infinite");
    ok(dspark__exp(lowest) == 0x1p-1074 && dspark__exp(nextafter(lowest, -1e9)) == 0,
       "exp is the smallest double down to the logarithm of half of it, and then 0");
    ok(dspark__exp(0) == 1 && dspark__exp(-HUGE_VAL) == 0 && dspark__exp(HUGE_VAL) == HUGE_VAL &&
       dspark__log(1) == 0 && dspark__log(0) == -HUGE_VAL && dspark__log(-0.) == -HUGE_VAL &&
       dspark__log(HUGE_VAL) == HUGE_VAL, "exp and log are exact at 0, 1 and infinity");
    ok(isnan(dspark__exp(NAN)) && isnan(dspark__log(NAN)) && isnan(dspark__log(-1)) && isnan(dspark__log(-HUGE_VAL)) &&
       isnan(s) && isnan(c), "what has no value is NaN: log of less than 0, sin and cos of infinity, anything of NaN");
}

int main(void) {
    check_file("philox", check_philox);
    check_file("schedule", check_schedule);
    check_file("verify", check_verify);
    check_file("distribution", check_distribution);
    check_file("sts", check_sts);
    check_file("account", check_account);
    check_elementary();
    check_subnormals();
    check_arguments();
    check_limits();
    return tap_done();
}
