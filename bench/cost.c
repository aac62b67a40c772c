// cost [DIR [THREADS]]: what does a pass cost, and what does it cost to schedule one?
//   pass error T(B)           median of |predicted / measured - 1| over random passes (sessions, rows, depths),
//                             predicted from rows
//   pass error +sessions      also from its sessions
//   pass error +context       also from their depths: what the engine uses
//   pass error +scale         the same, times a factor learned from half of the passes, on the other half
//   pass error +experts       also with a learned term for the distinct experts of all layers
//   pass error +constant      with a learned constant instead
//   expert, constant          those terms
//   schedule 256              microseconds to decide and schedule 256 sessions that all have drafts
//   schedule 256 share        its share of a plain pass of 256 rows
#include "bench.h"

enum { SESSIONS = 24, PASSES = 160, BLOCK = 6, DEEPEST = 3000 };

// The CPU, counting how many experts the layers of a pass had work for.
static int64_t distinct;
static void counting_moe(void *device, int layer) {
    const dspark__cpu *d = (const dspark__cpu *)device;
    dspark_cpu_backend()->moe(device, layer);
    for (int e = 0; e < d->c->n_routed_experts; e++) distinct += d->expert_first[e + 1] > d->expert_first[e];
}

typedef struct { double us, rows, sessions, depth, experts; } passage;

static passage random_pass(dspark_model *m, dspark_session **s, int i) {
    int gamma = dspark_model_config(m)->dspark_block_size;
    int n = 1 + (int)(dspark_uniform(1, 0, (uint64_t)i, 0, 0) * SESSIONS);
    dspark__batch *b = &m->batch;
    passage best;
    dspark_pass p;
    dspark_pass_result out;
    memset(&p, 0, sizeof p), memset(&best, 0, sizeof best);
    if (i % 3 == 0) n = 1 + n % 3;
    p.kind = DSPARK_PASS_TARGET, p.ids = b->ids, p.segments = b->segments, p.n_segments = n;
    best.sessions = n, best.us = 1e12;
    for (int k = 0; k < n; k++) {
        int rows = 1 + (int)(dspark_uniform(1, 1, (uint64_t)i, k, 0) * (gamma + 1));
        s[k]->n_run = 32 + (int)(dspark_uniform(1, 2, (uint64_t)i, i % 2 ? k : 0, 0) * (DEEPEST - 64));
        b->segments[k] = dspark__segment(s[k], p.n_rows, rows, s[k]->n_run), b->segments[k].logits_from = 0;
        memcpy(b->ids + p.n_rows, s[k]->tokens + 7 * i, (size_t)rows * sizeof *b->ids);
        p.n_rows += rows, best.depth += s[k]->n_run;
    }
    best.rows = p.n_rows, best.depth /= n;
    for (int k = 0; k < 3; k++) {
        double start = seconds(), us;
        distinct = 0;
        must(dspark__forward(m, &p, &out));
        us = 1e6 * (seconds() - start);
        if (k && us < best.us) best.us = us;
    }
    best.experts = (double)distinct;
    return best;
}

// T of the profile, up to `terms` of it; 3: all.
static double predicted(const dspark_profile *p, const passage *x, int terms) {
    double us = dspark_profile_us(p, (int64_t)x->rows);
    if (terms > 1) us += (x->sessions - 1) * (double)p->session_us;
    if (terms > 2) us += x->rows * (double)p->context_us * (x->depth - 256) / 1024;
    return us;
}

// scale T + per x one more number of each pass, f
typedef struct { double scale, per, f[PASSES]; } model_fit;

// By the least squares of us / T, over every second pass.
static void fit(model_fit *m, const dspark_profile *p, const passage *x) {
    double n = PASSES / 2, f = 0, y = 0, ff = 0, fy = 0;
    for (int i = 0; i < PASSES; i += 2) {
        double T = predicted(p, &x[i], 3), e = m->f[i] / T, us = x[i].us / T;
        f += e / n, y += us / n, ff += e * e / n, fy += e * us / n;
    }
    m->per = ff > f * f ? (fy - f * y) / (ff - f * f) : 0, m->scale = y - m->per * f;
}

// Of every step-th pass, by the profile alone (fitted NULL) or as fitted.
static void report(const char *question, const dspark_profile *p, const passage *x, int terms, const model_fit *fitted,
                   int step, const char *model, int threads) {
    samples error = { NULL, 0, 0 };
    for (int i = step - 1; i < PASSES; i += step) {
        double us = predicted(p, &x[i], terms);
        if (fitted) us = fitted->scale * us + fitted->per * fitted->f[i];
        sample(&error, 100 * fabs(us / x[i].us - 1));
    }
    result(question, model, threads, &error, "%");
    free(error.x);
}

static void measure_model(dspark_model *m, const dspark_profile *p, const char *name, int threads) {
    static passage x[PASSES];
    static model_fit scaled, experts, constant;
    dspark_session *s[SESSIONS];
    dspark_session_desc d = plain_desc(DEEPEST + BLOCK);
    for (int k = 0; k < SESSIONS; k++) {
        s[k] = session_open(m, &d), noise(m, s[k]->tokens, DEEPEST, (uint64_t)k);
        must(dspark__run_blank(s[k], DEEPEST));
    }
    for (int i = 0; i < PASSES; i++) x[i] = random_pass(m, s, i), experts.f[i] = x[i].experts, constant.f[i] = 1;
    fit(&scaled, p, x), fit(&experts, p, x), fit(&constant, p, x);
    report("pass error T(B)", p, x, 1, NULL, 1, name, threads);
    report("pass error +sessions", p, x, 2, NULL, 1, name, threads);
    report("pass error +context", p, x, 3, NULL, 1, name, threads);
    report("pass error +scale", p, x, 3, &scaled, 2, name, threads);
    report("pass error +experts", p, x, 3, &experts, 2, name, threads);
    report("pass error +constant", p, x, 3, &constant, 2, name, threads);
    result_one("expert", name, threads, experts.per, "us");
    result_one("constant", name, threads, constant.per, "us");
    for (int k = 0; k < SESSIONS; k++) dspark_session_close(s[k]);
}

static void measure_schedule(dspark_model *m, const dspark_profile *p, const char *name, int threads) {
    enum { N = 256 };
    int gamma = dspark_model_config(m)->dspark_block_size;
    dspark_step_result *r = (dspark_step_result *)need(N, sizeof *r);
    dspark__lane *lanes = m->batch.lanes;
    dspark_session_desc d = plain_desc(64);
    samples us = { NULL, 0, 0 };
    d.policy.plain = 0, d.policy.schedule = DSPARK_SCHEDULE_GLOBAL;
    memset(lanes, 0, N * sizeof *lanes);
    for (int i = 0; i < N; i++) {
        lanes[i].s = session_open(m, &d), lanes[i].r = &r[i];
        lanes[i].s->n_tokens = 20, lanes[i].s->n_run = 19;
        for (int k = 0; k < gamma; k++) r[i].confidence[k] = (float)dspark_uniform(1, 0, (uint64_t)i, k, 0);
    }
    for (int round = 0; round < 50; round++) {
        double start = seconds();
        dspark__decide(m, lanes, N);
        for (int i = 0; i < N; i++)
            lanes[i].limit = lanes[i].n_drafted = gamma, lanes[i].drafted = 1, lanes[i].length = 0;
        must(dspark__schedule(m, lanes, N));
        sample(&us, 1e6 * (seconds() - start));
    }
    result("schedule 256", name, threads, &us, "us");
    result_one("schedule 256 share", name, threads, 100 * quantile(&us, .5) / dspark_profile_us(p, N), "%");
    for (int i = 0; i < N; i++) dspark_session_close(lanes[i].s);
    free(us.x), free(r);
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int threads = argc > 2 ? atoi(argv[2]) : 1;
    dspark_backend counting = *dspark_cpu_backend();
    dspark_model *m;
    dspark_model_desc desc;
    dspark_profile p;
    memset(&desc, 0, sizeof desc);
    counting.moe = counting_moe, desc.backend = &counting, desc.n_threads = threads, desc.max_sessions = 256;
    must(dspark_model_open(&m, dir, &desc));
    must(dspark_model_profile(m, &p));
    measure_model(m, &p, model_name(dir), threads);
    if (dspark_model_config(m)->n_stages) measure_schedule(m, &p, model_name(dir), threads);
    dspark_model_close(m);
    return 0;
}
