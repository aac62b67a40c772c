// drafter [DIR [TEXTS [THREADS [PROMPTS [TOKENS]]]]]: how good the drafter is, at temperature 0 with the whole block
// verified in every cycle. After held-out prompts, and again after the same prompts preceded by documents of their
// domain, 512 tokens in all.
//   tau D            tokens a cycle, over the cycles whose block lies within the answer (as tools/spark-tiny/measure.py)
//   tau D at 512 over tau   ratio of tau after 512 tokens to tau; with quantiles .025 and .975 over resampled prompts
//   accepted D k     of the drafts at position k whose predecessors were all right, the share that was right
#include "bench.h"

enum { DEPTH = 512, SHALLOW = 0, DEEP = 1 };
typedef struct { int cycles[2], tokens[2], reached[2][DSPARK_MAX_BLOCK], right[2][DSPARK_MAX_BLOCK]; } domain_tally;

static void answer(dspark_model *m, const int32_t *ids, int n, int n_tokens, domain_tally *t, int depth) {
    int gamma = dspark_model_config(m)->dspark_block_size, *anchor, *accepted, cycles = 0, end;
    dspark_session_desc desc;
    dspark_session *s;
    dspark_step_result r;
    memset(&desc, 0, sizeof desc);
    desc.max_context = n + n_tokens + 2 * gamma + 8, desc.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = session_open(m, &desc);
    anchor = (int *)need((size_t)n_tokens, sizeof *anchor), accepted = (int *)need((size_t)n_tokens, sizeof *accepted);
    must(dspark_session_append(s, ids, n));
    do {
        int before = dspark_session_length(s);
        must(dspark_step(&s, 1, NULL, &r));
        must(r.status);
        if (r.n_scheduled < gamma) continue;
        // the first step also drew the anchor, from the prompt's logits
        anchor[cycles] = cycles ? before - 1 : before, accepted[cycles++] = r.n_accepted;
    } while (!r.finish && dspark_session_length(s) < n + n_tokens && cycles < n_tokens);
    end = dspark_session_length(s) < n + n_tokens ? dspark_session_length(s) : n + n_tokens;
    for (int i = 0; i < cycles && anchor[i] + gamma < end; i++) {
        t->cycles[depth]++, t->tokens[depth] += accepted[i] + 1;
        for (int k = 0; k < gamma && k <= accepted[i]; k++)
            t->reached[depth][k]++, t->right[depth][k] += k < accepted[i];
    }
    free(anchor), free(accepted);
    dspark_session_close(s);
}

// Of a domain, or (N_DOMAINS) the mean over them
static double tau(const domain_tally *t, int d, int depth) {
    double sum = 0;
    if (d < N_DOMAINS) return t[d].cycles[depth] ? (double)t[d].tokens[depth] / t[d].cycles[depth] : 0;
    for (d = 0; d < N_DOMAINS; d++) sum += tau(t, d, depth);
    return sum / N_DOMAINS;
}

static void add(domain_tally *to, const domain_tally *t) {
    for (int depth = SHALLOW; depth <= DEEP; depth++) {
        to->cycles[depth] += t->cycles[depth], to->tokens[depth] += t->tokens[depth];
        for (int k = 0; k < DSPARK_MAX_BLOCK; k++)
            to->reached[depth][k] += t->reached[depth][k], to->right[depth][k] += t->right[depth][k];
    }
}

// tau at 512 over tau, of a domain or the mean of all; with the quantiles .025 and .975 over prompts drawn anew. A
// domain's n[d] prompts are each[d * most] and on.
static void compare_depths(const domain_tally *each, const int *n, int most, int d, const domain_tally *all,
                           const char *model, int threads) {
    enum { DRAWS = 1000 };
    samples ratios = { NULL, 0, 0 };
    for (int i = 0; i < DRAWS; i++) {
        domain_tally drawn[N_DOMAINS];
        memset(drawn, 0, sizeof drawn);
        for (int of = 0; of < N_DOMAINS; of++)
            for (int j = 0; j < n[of]; j++)
                add(&drawn[of], &each[of * most + (int)(n[of] * dspark_uniform((uint64_t)i, 0, (uint64_t)j, of, 0))]);
        sample(&ratios, tau(drawn, d, DEEP) / fmax(tau(drawn, d, SHALLOW), 1));
    }
    printf("tau %s at 512 over tau,%s,%d,%.4f,%.4f,%.4f,x,%d\n", d < N_DOMAINS ? domains[d] : "mean", model, threads,
           tau(all, d, DEEP) / fmax(tau(all, d, SHALLOW), 1), quantile(&ratios, .025), quantile(&ratios, .975), DRAWS);
    free(ratios.x);
}

static void report(const domain_tally *tally, int depth, int gamma, const char *model, int threads) {
    const char *at = depth == DEEP ? " at 512" : "";
    for (int d = 0; d < N_DOMAINS; d++) {
        const domain_tally *t = &tally[d];
        printf("tau %s%s,%s,%d,%.4f,,,tokens a cycle,%d\n", domains[d], at, model, threads, tau(tally, d, depth),
               t->cycles[depth]);
        for (int k = 0; k < gamma; k++) {
            int n = t->reached[depth][k];
            printf("accepted %s %d%s,%s,%d,%.1f,,,%%,%d\n", domains[d], k + 1, at, model, threads,
                   n ? 100.0 * t->right[depth][k] / n : 0, n);
        }
    }
    printf("tau mean%s,%s,%d,%.4f,,,tokens a cycle,%d\n", at, model, threads, tau(tally, N_DOMAINS, depth), N_DOMAINS);
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *file = argc > 2 ? argv[2] : "bench/heldout.jsonl";
    int threads = argc > 3 ? atoi(argv[3]) : 1, prompts = argc > 4 ? atoi(argv[4]) : 0, n = argc > 5 ? atoi(argv[5]) : 64;
    dspark_model *m = model_open(dir, threads, NULL);
    int gamma = dspark_model_config(m)->dspark_block_size, done[N_DOMAINS] = { 0 };
    texts all = texts_read(m, file);
    domain_tally tally[N_DOMAINS], *each = (domain_tally *)need((size_t)(N_DOMAINS * all.n), sizeof *each);
    memset(tally, 0, sizeof tally), memset(each, 0, (size_t)(N_DOMAINS * all.n) * sizeof *each);
    if (!dspark_model_config(m)->n_stages) die(dir, "has no drafter");
    for (int i = 0; i < all.n; i++)
        for (int d = 0; d < N_DOMAINS; d++) {
            domain_tally *t = &each[d * all.n + done[d]];
            int32_t *ids;
            int n_ids;
            if (all.t[i].is_document || strcmp(all.t[i].domain, domains[d])) continue;
            if (prompts && done[d] >= prompts) continue;
            done[d]++;
            answer(m, all.t[i].ids, all.t[i].n, n, t, SHALLOW);
            ids = deepen(&all, &all.t[i], 7 * i, DEPTH, &n_ids);
            answer(m, ids, n_ids, n, t, DEEP);
            free(ids);
            add(&tally[d], t);
        }
    for (int depth = SHALLOW; depth <= DEEP; depth++) report(tally, depth, gamma, model_name(dir), threads);
    for (int d = 0; d <= N_DOMAINS; d++) compare_depths(each, done, all.n, d, tally, model_name(dir), threads);
    free(each);
    texts_free(&all), dspark_model_close(m);
}
