/* A crowd: requests that arrive, share steps, change policy, fork from a shared prompt, are cancelled, or end. All of a
   request follows from its number, so that each text can be compared with the one it gets alone. */
#ifndef CROWD_H
#define CROWD_H
#include "sessions.h"

enum { CROWD_PROMPT = 72, CROWD_TOKENS = 24, CROWD_ROOTS = 3, CROWD_MOST = 256 };

/* A number below n that belongs to request `id`. */
HELPER int of_request(int id, int what, int n) {
    return (int)(dspark_uniform(11, 0, (uint64_t)id, what, 0) * n);
}

typedef struct {
    int32_t ids[CROWD_PROMPT];
    int n, root, cancel_after;          /* root: of its fork, or -1; cancel_after: tokens, or never (0) */
    dspark_session_desc desc;
} request;

/* Root r's prompt is request -1 - r's. */
HELPER void request_prompt(const dspark_model *m, int id, request *q) {
    q->n = of_request(id, 1, 8) ? 1 + of_request(id, 2, 20) : 21 + of_request(id, 2, CROWD_PROMPT - 20);
    for (int i = 0; i < q->n; i++) q->ids[i] = 2 + of_request(id, 100 + i, dspark_model_config(m)->vocab_size - 2);
}

HELPER request request_of(const dspark_model *m, int id) {
    static const float temperatures[] = { 0, .7f, 1, 1.3f };
    request q;
    memset(&q, 0, sizeof q);
    q.root = of_request(id, 3, 6) ? -1 : of_request(id, 4, CROWD_ROOTS);
    request_prompt(m, q.root < 0 ? id : -1 - q.root, &q);
    q.desc = session_desc(q.n + CROWD_TOKENS + of_request(id, 5, 100));
    q.desc.seed = (uint64_t)id, q.desc.temperature = temperatures[of_request(id, 6, 4)];
    q.desc.top_p = of_request(id, 7, 2) ? .9f : 0, q.desc.ignore_eos = of_request(id, 8, 4) > 0;
    q.desc.policy.quota = 1 + of_request(id, 9, CROWD_TOKENS);
    q.desc.policy.verify = of_request(id, 10, 8) ? DSPARK_VERIFY_COUPLED : DSPARK_VERIFY_GREEDY;
    q.cancel_after = of_request(id, 11, 4) ? 0 : 1 + of_request(id, 12, 8);
    return q;
}

typedef struct { int32_t tokens[CROWD_TOKENS + DSPARK_MAX_BLOCK + 2]; int n, finish; } said;

HELPER int hear(said *t, const dspark_step_result *r) {
    memcpy(t->tokens + t->n, r->tokens, (size_t)r->n_tokens * sizeof *r->tokens);
    t->n += r->n_tokens, t->finish = r->finish;
    return !r->status && t->n <= CROWD_TOKENS;
}

/* The request's text in plain decoding, alone. */
HELPER said said_alone(dspark_model *m, request q) {
    dspark_session *s;
    said t;
    memset(&t, 0, sizeof t);
    q.desc.policy.plain = 1;
    s = open_session_as(m, &q.desc);
    must(dspark_session_append(s, q.ids, q.n));
    while (!t.finish) {
        dspark_step_result r = step(s);
        if (!hear(&t, &r)) bail(dspark_last_error(), "a text alone");
    }
    dspark_session_close(s);
    return t;
}

typedef struct { int id; request q; dspark_session *s; said t; } visitor;
typedef struct {
    int n_requests, most;               /* in all; at once */
    int came, done, cancelled, wrong;   /* wrong: texts that are not those of plain decoding alone */
    int64_t steps, accepted;
    size_t allocated;                   /* allocations in steps */
} crowd;

HELPER void shuffle_policy(visitor *v, int gamma) {
    dspark_policy p = v->q.desc.policy;
    p.plain = dice(4) == 0, p.schedule = dice(DSPARK_SCHEDULE_GLOBAL + 1), p.threshold = dice(2) ? .3f : 0;
    p.draft_cap = dice(gamma + 1), p.share = (float)dice(3);
    must(dspark_session_set_policy(v->s, &p));
}

/* Roots hold their prompts from the beginning; what is forked from one has nothing left to submit. */
HELPER void admit(dspark_model *m, visitor *v, int id, dspark_session **roots) {
    memset(v, 0, sizeof *v);
    v->id = id, v->q = request_of(m, id);
    if (v->q.root >= 0) must(dspark_session_fork(&v->s, roots[v->q.root], &v->q.desc));
    else must(dspark_session_open(&v->s, m, &v->q.desc));
    if (v->q.root < 0) must(dspark_session_submit(v->s, v->q.ids, v->q.n));
}

/* It is through, or is cancelled here: the text is the one alone, or begins it. */
HELPER int leaves(dspark_model *m, visitor *v, crowd *c) {
    int cancelled = v->q.cancel_after && v->t.n >= v->q.cancel_after && !v->t.finish;
    said alone;
    if (!v->t.finish && !cancelled) return 0;
    alone = said_alone(m, v->q);
    c->wrong += v->t.n > alone.n || memcmp(v->t.tokens, alone.tokens, (size_t)v->t.n * sizeof *alone.tokens) ||
                (!cancelled && (v->t.n != alone.n || v->t.finish != alone.finish));
    c->accepted += dspark_session_stats(v->s)->accepted;
    c->done++, c->cancelled += cancelled;
    dspark_session_close(v->s);
    return 1;
}

HELPER void run_crowd(dspark_model *m, crowd *c) {
    visitor *v = (visitor *)must_have(malloc(CROWD_MOST * sizeof *v));
    dspark_session *s[CROWD_MOST], *roots[CROWD_ROOTS];
    dspark_step_result *r = (dspark_step_result *)must_have(malloc(CROWD_MOST * sizeof *r));
    int n = 0;
    for (int i = 0; i < CROWD_ROOTS; i++) {
        request q;
        request_prompt(m, -1 - i, &q);
        roots[i] = straight(m, q.ids, q.n);
    }
    while (c->done < c->n_requests) {
        dspark_step_desc some_rows = { dice(3) ? 0 : 1 + dice(20) };
        for (int k = dice(c->most / 4 + 2); k > 0 && n < c->most && c->came < c->n_requests; k--)
            admit(m, &v[n++], c->came++, roots);
        for (int i = 0; i < n; i++) if (!dice(4)) shuffle_policy(&v[i], dspark_model_config(m)->dspark_block_size);
        for (int i = 0; i < n; i++) s[i] = v[i].s;
        c->allocated -= counted.calls;
        if (n) must(dspark_step(s, n, &some_rows, r));
        c->allocated += counted.calls;
        for (int i = 0; i < n; i++) if (!hear(&v[i].t, &r[i])) bail(dspark_last_error(), "a step of the crowd");
        for (int i = n - 1; i >= 0; i--) if (leaves(m, &v[i], c)) v[i] = v[--n];
        c->steps += n > 0;
    }
    for (int i = 0; i < CROWD_ROOTS; i++) dspark_session_close(roots[i]);
    free(v), free(r);
}
#endif
