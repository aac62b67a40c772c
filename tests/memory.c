/* Out of memory: each allocation of everything that allocates fails in turn. The call returns DSPARK_ERROR_MEMORY
   with a message, the object asked for is NULL, nothing leaks, and what existed before can be used as before.
   (checkpoint.c does so too, with files served from memory.) And a step allocates nothing. */
#include "crowd.h"
#include "tap.h"

enum { PROMPT = 40 };
typedef struct {
    dspark_model *m;            /* golden b */
    dspark_tokenizer *t;        /* the small model's */
    dspark_session *s;
    const int32_t *text;
} ground;

static const char saved[] = "build/memory.saved", tokenizer_json[] = "tools/spark-tiny/model/tokenizer.json";
static const char talk[] = "\346\274\242\345\255\227, na\303\257ve <think>12345 + 678 = 13023\n\n  and so on, and so forth";

/* An act does its work and undoes it; where it fails, *out is checked here. */
typedef dspark_status act(ground *);

static dspark_status closed(dspark_status status, void *out, void (*close_it)(void *)) {
    if (status && out) return DSPARK_OK;        /* failed, and yet gave something: no failure a caller could handle */
    if (out) close_it(out);
    return status;
}
static void close_model(void *p) { dspark_model_close((dspark_model *)p); }
static void close_session(void *p) { dspark_session_close((dspark_session *)p); }
static void close_tokenizer(void *p) { dspark_tokenizer_close((dspark_tokenizer *)p); }

static dspark_status open_golden(ground *g) {
    dspark_model *m = NULL;
    dspark_model_desc d;
    dspark_status status;
    (void)g;
    memset(&d, 0, sizeof d);
    d.n_threads = 1, d.max_rows = 8;
    status = dspark_model_open(&m, golden_b, &d);
    return closed(status, m, close_model);
}

static dspark_status open_tokenizer(ground *g) {
    dspark_tokenizer *t = NULL;
    dspark_status status = dspark_tokenizer_open(&t, tokenizer_json);
    (void)g;
    return closed(status, t, close_tokenizer);
}

static dspark_status encode(ground *g) {
    int32_t ids[128];
    int n = dspark_encode(g->t, talk, sizeof talk - 1, 0, ids, COUNT(ids));
    return n < 0 ? (dspark_status)-n : DSPARK_OK;
}

static dspark_status chat_encode(ground *g) {
    const dspark_message messages[] = { { "system", talk, NULL, 0 }, { "user", talk, NULL, 0 } };
    int32_t ids[256];
    int n = dspark_chat_encode(g->t, messages, 2, NULL, DSPARK_PLAIN_TEXT, ids, COUNT(ids));
    return n < 0 ? (dspark_status)-n : DSPARK_OK;
}

static dspark_status open_one(ground *g) {
    static const int32_t stop[] = { 5 };
    dspark_session *s = NULL;
    dspark_session_desc d = session_desc(9000);     /* longer than any before: the workspace grows */
    dspark_status status;
    d.stop_tokens = stop, d.n_stop_tokens = 1;
    status = dspark_session_open(&s, g->m, &d);
    return closed(status, s, close_session);
}

static dspark_status fork_one(ground *g) {
    dspark_session *s = NULL;
    dspark_status status = dspark_session_fork(&s, g->s, NULL);
    return closed(status, s, close_session);
}

static dspark_status save_one(ground *g) { return dspark_session_save(g->s, saved); }
static dspark_status restore_one(ground *g) {
    dspark_session *s = NULL;
    dspark_status status = dspark_session_restore(&s, g->m, saved, NULL);
    return closed(status, s, close_session);
}

static dspark_status append_some(ground *g) {
    dspark_status status = dspark_session_append(g->s, g->text + PROMPT, 150);      /* two passes */
    return status ? status : dspark_session_truncate(g->s, PROMPT);
}
static dspark_status run_again(ground *g) { return dspark_session_append(g->s, NULL,
    0); }      /* after that: a refill */

static dspark_status draft_one(ground *g) {
    int32_t tokens[DSPARK_MAX_BLOCK];
    float confidence[DSPARK_MAX_BLOCK];
    return dspark_session_draft(g->s, 7, tokens, confidence, NULL);
}

static dspark_status steps(ground *g, int plain, int schedule, int verify) {
    dspark_step_result r;
    dspark_status status = DSPARK_OK;
    dspark_policy p = g->s->desc.policy;
    p.plain = plain, p.schedule = schedule, p.verify = verify;
    must(dspark_session_set_policy(g->s, &p));
    for (int i = 0; i < 3 && !status; i++)
        if ((status = dspark_step(&g->s, 1, NULL, &r)) == DSPARK_OK) status = r.status;
    return status;
}
static dspark_status plain_steps(ground *g) { return steps(g, 1, 0, 0); }
static dspark_status coupled_steps(ground *g) { return steps(g, 0, DSPARK_SCHEDULE_BLOCK, DSPARK_VERIFY_COUPLED); }
static dspark_status rejection_steps(ground *g) { return steps(g, 0, DSPARK_SCHEDULE_BLOCK, DSPARK_VERIFY_REJECTION); }

/* The first step that schedules by the profile measures it, with a session of its own. */
static dspark_status measuring_step(ground *g) {
    int length = g->s->n_tokens;
    dspark_status status;
    g->m->n_profiles = 0;
    status = steps(g, 0, 0, 0);
    if (status && g->s->n_tokens != length) return DSPARK_OK;
    return status;
}

/* What allocates, and what also succeeds with less: measuring needs one session, and takes more. */
enum { NEVER, EACH, FIRST };

/* The n-th allocation of the act fails, n = 1, 2 .. until there is no n-th. */
static void test_act(ground *g, const char *claim, act *f, int allocates) {
    int good = 1, n = 0, refused = 0;
    for (int failed = 1; failed && n < 100000;) {
        size_t live = counted.live;
        dspark_status status;
        counted.calls = 0, counted.fail_at = (size_t)++n;
        dspark__message[0] = 0;
        status = f(g);
        failed = counted.calls >= counted.fail_at;
        counted.fail_at = 0;
        refused += status == DSPARK_ERROR_MEMORY;
        good &= counted.live == live && (!failed || *dspark_last_error());
        if (allocates == FIRST && refused && !status) n += 4;        /* it measured, for half a second */
        else if (status != (failed ? DSPARK_ERROR_MEMORY : DSPARK_OK)) {
            good = 0;
            printf("# allocation %d: %s: %s\n", n, dspark_status_name(status), dspark_last_error());
        }
    }
    if (allocates == FIRST)
        ok(good && refused && refused < n / 2, "%s: the first %d allocations failing are MEMORY, others do with less; "
           "nothing leaks", claim, refused);
    else if (allocates)
        ok(good && n > 1, "%s: each of %d allocations failing is MEMORY, and leaks nothing", claim, n - 1);
    else ok(good && n == 1, "%s: no allocation at all (%d)", claim, n - 1);
}

/* The profile is the model's by now: the step that measures one opens sessions. */
static void test_steps(dspark_model *m) {
    crowd c = { 40, 8, 0, 0, 0, 0, 0, 0, 0 };
    run_crowd(m, &c);
    ok(!c.allocated && c.accepted && !c.wrong,
       "%lld steps of a crowd allocate nothing: prompts, forks, any schedule (%zu)", (long long)c.steps, c.allocated);
}

int main(void) {
    static const struct { const char *claim; act *f; int allocates; } acts[] = {
        { "opening a model", open_golden, EACH }, { "opening a tokenizer", open_tokenizer, EACH },
        { "encode", encode, EACH },
        { "chat_encode", chat_encode, EACH }, { "opening a session", open_one, EACH }, { "fork", fork_one, EACH },
        { "save", save_one, NEVER }, { "restore", restore_one, EACH }, { "append", append_some, NEVER },
        { "running again after a truncate", run_again, NEVER }, { "draft", draft_one, NEVER },
        { "plain steps", plain_steps, NEVER }, { "coupled steps", coupled_steps, NEVER },
        { "rejection steps", rejection_steps, NEVER }, { "steps that measure first", measuring_step, FIRST }
    };
    int32_t *text = golden_text(golden_b);
    ground g;
    dspark_session_desc d = session_desc(320);
    g.m = open_model(golden_b), g.text = text;
    must(dspark_tokenizer_open(&g.t, tokenizer_json));
    d.temperature = 1, d.ignore_eos = 1, d.logprobs = 1;
    g.s = open_session_as(g.m, &d);
    must(dspark_session_append(g.s, text, PROMPT));
    for (int i = 0; i < COUNT(acts); i++) test_act(&g, acts[i].claim, acts[i].f, acts[i].allocates);
    test_steps(g.m);
    run_pending(g.s);
    ok(is_straight(g.s), "after all these failures the session is that of a straight run");
    remove(saved);
    dspark_session_close(g.s);
    dspark_tokenizer_close(g.t);
    dspark_model_close(g.m);
    free(text);
    return sessions_done();
}
