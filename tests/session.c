/* >>session and >>state: however a text came about (chunks, verified drafts, batches, threads, paths, truncation,
   forks, files), the session is, bit for bit, the one that a single append of its tokens leaves. And what is refused,
   with which message. Bug numbers are as in conformance.h. */
#include "sessions.h"
#include "tap.h"

enum { N = 300 };       /* tokens of a golden case */
static const char *const goldens[] = { golden_a, golden_b };
static const char *name_of(const char *dir) { return dir == spark_tiny ? "spark-tiny" : strrchr(dir, '/') + 1; }

/* ---- prompts in chunks */

static void append_in(dspark_session *s, const int32_t *tokens, int n, int chunk) {
    for (int i = 0; i < n; i += chunk) must(dspark_session_append(s, tokens + i, n - i < chunk ? n - i : chunk));
}

/* `max_rows` of a pass, `chunk` of an append against one pass over all. */
static int chunks_are_whole(dspark_session *whole, const char *dir, int n, int chunk, int max_rows) {
    dspark_model *m = open_model_as(dir, 1, 0, max_rows);
    dspark_session *s = open_session(m);
    int is;
    append_in(s, whole->tokens, n, chunk);
    is = same(s, whole);
    dspark_session_close(s);
    dspark_model_close(m);
    return is;
}

static void test_chunks(const char *dir, const int32_t *text, int n) {
    static const int chunks[] = { 1, 2, 3, 7, 64, 128 }, rows[] = { 1, 9, 20, 64, 128 };
    dspark_model *m = open_model_as(dir, 1, 0, n);
    dspark_session *whole = straight(m, text, n);
    for (int i = 0; i < COUNT(chunks); i++)
        ok(chunks_are_whole(whole, dir, n, chunks[i], 0), "%s: %d tokens appended by %d leave the bits of one pass",
           name_of(dir), n, chunks[i]);
    for (int i = 0; i < COUNT(rows); i++)
        ok(chunks_are_whole(whole, dir, n, n, rows[i]),
            "%s: a prompt in passes of at most %d rows leaves the bits of one pass",
           name_of(dir), rows[i]);
    dspark_session_close(whole);
    dspark_model_close(m);
}

/* ---- verification: what rejected drafts wrote is as if it had never been (S#34189, S#33872, S#33800, D#658) */

typedef struct { uint64_t state[N + 1], logits[N + 1]; } trace;

/* Plain decoding of the text: the state after each of its n tokens. */
static trace *plain_trace(dspark_model *m, const int32_t *text, int n) {
    trace *t = (trace *)must_have(calloc(1, sizeof *t));
    dspark_session *s = open_session(m);
    for (int i = 1; i <= n; i++) {
        must(dspark_session_append(s, text + i - 1, 1));
        t->state[i] = live_hash(s), t->logits[i] = logits_hash(s);
    }
    dspark_session_close(s);
    return t;
}

/* One pass from the session's end: the text's next token, then width - 1 drafts of which `accepted` are the text's.
   Rolls back to what was accepted; returns whether state and logits are plain decoding's. */
static int verify_by_hand(dspark_session *s, const int32_t *text, const trace *plain, int width, int accepted) {
    int V = dspark_model_config(s->model)->vocab_size, at = s->n_run, is = 1;
    int32_t ids[DSPARK_MAX_BLOCK + 1];
    dspark_pass_result out;
    for (int i = 0; i < width; i++) ids[i] = i <= accepted ? text[at + i] : (text[at + i] + 1 + i) % V;
    must(dspark__run_alone(s, ids, width, at, 0, 0, &out));
    dspark__mark_run(s, at + width);
    s->n_run = s->n_tokens = at + 1 + accepted;
    for (int i = 0; i <= accepted; i++)
        is &= hash_add(2, out.logits + (size_t)(i * V), (size_t)V * sizeof(float)) == plain->logits[at + 1 + i];
    return is && live_hash(s) == plain->state[s->n_run];
}

/* Every width and accepted count at position `at`, one after the other over the same rings. */
static int verify_all_at(dspark_session *s, const int32_t *text, const trace *plain, int at,
    int wrong[DSPARK_MAX_BLOCK + 2]) {
    int n_wrong = 0;
    for (int width = 1; width <= dspark_model_config(s->model)->dspark_block_size + 1; width++)
        for (int accepted = 0; accepted < width; accepted++) {
            s->n_run = s->n_tokens = at;
            if (verify_by_hand(s, text, plain, width, accepted)) continue;
            wrong[width]++, n_wrong++;
        }
    s->n_run = s->n_tokens = at;
    return n_wrong;
}

static void test_widths(const char *dir, dspark_model *m, const int32_t *text, const trace *plain, int last) {
    int gamma = dspark_model_config(m)->dspark_block_size, wrong[DSPARK_MAX_BLOCK + 2] = { 0 }, first_wrong = 0;
    dspark_session *s = open_session(m);
    for (int at = 0; at < last; at++) {
        if (verify_all_at(s, text, plain, at, wrong) && !first_wrong) first_wrong = at;
        must(dspark_session_append(s, text + at, 1));
    }
    for (int width = 1; width <= gamma + 1; width++)
        ok(!wrong[width], "%s: verifying %d rows, any number accepted, at any position leaves plain decoding's state",
           name_of(dir), width);
    if (first_wrong) printf("# first at position %d\n", first_wrong);
    ok(is_straight(s), "%s: after all these passes drafts too are those of a straight run", name_of(dir));
    dspark_session_close(s);
}

/* The same through dspark_step: cycles that draft `cap` and accept `right` of them, until the text is full. */
static int cycles_are_plain(dspark_model *m, const int32_t *text, const trace *plain, int n, int cap, int right) {
    rails r;
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    int is = 1;
    memset(&r, 0, sizeof r);
    r.text = text, r.n = n, d.adjust = follow_rails, d.adjust_user = &r, d.ignore_eos = 1;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 9));
    set_plain(s, 1);
    step_on_rails(s, &r, DSPARK_MAX_BLOCK);
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, cap);
    while (s->n_tokens + cap < n && is) {
        dspark_step_result got = step_on_rails(s, &r, right);
        is = got.n_accepted == right && got.n_tokens == right + 1 && live_hash(s) == plain->state[s->n_run] &&
             !memcmp(s->tokens, text, (size_t)s->n_tokens * sizeof *text);
    }
    dspark_session_close(s);
    return is;
}

static void test_cycles(const char *dir, dspark_model *m, const int32_t *text, const trace *plain, int n) {
    for (int cap = 1; cap <= dspark_model_config(m)->dspark_block_size; cap++) {
        int right = 0;
        while (right <= cap && cycles_are_plain(m, text, plain, n, cap, right)) right++;
        ok(right > cap, "%s: cycles of %d drafts of which 0..%d stand leave plain decoding's state after each",
            name_of(dir),
           cap, cap);
    }
}

static void test_verification(const char *dir, int n) {
    dspark_model *m = open_model(dir);
    int32_t *text = golden_text(dir);
    trace *plain = plain_trace(m, text, N);
    test_widths(dir, m, text, plain, n);
    test_cycles(dir, m, text, plain, n);
    free(plain), free(text);
    dspark_model_close(m);
}

/* ---- company: a row's bits do not depend on the other rows (L#25618, V#6038) */

enum { MOST = 8, MADE = 20 };
typedef struct { int32_t tokens[MADE]; float logprob[MADE]; int n; uint64_t state; } story;
static const int prompt_length[MOST] = { 1, 40, 17, 131, 5, 64, 2, 90 };

/* Session i of a company: its own prompt, seed and sampler. */
static dspark_session *member(dspark_model *m, int i, int plain) {
    dspark_session_desc d = session_desc(320);
    d.seed = 100 + (uint64_t)i, d.temperature = i % 3 ? 1 : .6f, d.top_p = i % 2 ? .9f : 0;
    d.logprobs = 1, d.ignore_eos = 1, d.policy.plain = plain, d.policy.quota = MADE;
    d.policy.schedule = i % 2 ? DSPARK_SCHEDULE_BLOCK : DSPARK_SCHEDULE_THRESHOLD, d.policy.threshold = .3f;
    return open_session_as(m, &d);
}

static void tell(story *t, const dspark_step_result *r) {
    for (int k = 0; k < r->n_tokens; k++, t->n++) t->tokens[t->n] = r->tokens[k], t->logprob[t->n] = r->logprob[k];
}
static void end_story(story *t, dspark_session *s) { run_pending(s), t->state = live_hash(s) ^ logits_hash(s); }

static story alone(dspark_model *m, const int32_t *text, int i) {
    dspark_session *s = member(m, i, 1);
    story t;
    memset(&t, 0, sizeof t);
    must(dspark_session_append(s, text + i, prompt_length[i]));
    while (t.n < MADE) { dspark_step_result r = step(s); tell(&t, &r); }
    end_story(&t, s);
    dspark_session_close(s);
    return t;
}

/* B sessions step together; the prompt of session i is submitted before step i / 2, and runs a few rows a step. */
static int together_as_alone(dspark_model *m, const int32_t *text, const story *expected, int B) {
    dspark_session *s[MOST];
    dspark_step_result r[MOST];
    dspark_step_desc some_rows = { 7 };
    story t[MOST];
    int is = 1, left = B;
    memset(t, 0, sizeof t);
    for (int i = 0; i < B; i++) s[i] = member(m, i, 0);
    for (int at = 0; left; at++) {
        int n = B < 2 * at + 2 ? B : 2 * at + 2;
        for (int i = 2 * at; i < n; i++) must(dspark_session_submit(s[i], text + i, prompt_length[i]));
        must(dspark_step(s, n, &some_rows, r));
        for (int i = 0; i < n; i++) tell(&t[i], &r[i]), left -= r[i].n_tokens && r[i].finish, is &= !r[i].status;
    }
    for (int i = 0; i < B; i++) {
        end_story(&t[i], s[i]);
        is &= t[i].n == expected[i].n && t[i].state == expected[i].state &&
              !memcmp(&t[i], &expected[i], offsetof(story, n));
        dspark_session_close(s[i]);
    }
    return is;
}

static void test_company(const char *dir) {
    dspark_model *m = open_model(dir);
    int32_t *text = golden_text(dir);
    story expected[MOST];
    for (int i = 0; i < MOST; i++) expected[i] = alone(m, text, i);
    for (int B = 1; B <= MOST; B++)
        ok(together_as_alone(m, text, expected, B),
           "%s: %d sessions drafting in one step, prompts arriving in between: each one's tokens, log-probabilities and "
           "state are those of plain decoding alone", name_of(dir), B);
    free(text);
    dspark_model_close(m);
}

/* ---- threads and paths */

/* A number for all that a text of `prompt` tokens and `steps` drafted steps leaves. */
static uint64_t life_hash(const char *dir, int threads, int path, const int32_t *text, int prompt, int steps) {
    dspark_model *m = open_model_as(dir, threads, path, 0);
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    uint64_t h;
    d.temperature = 1, d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, prompt));
    for (int i = 0; i < steps; i++) step(s);
    run_pending(s);
    h = hash_add(live_hash(s) ^ logits_hash(s), s->tokens, (size_t)s->n_tokens * sizeof *s->tokens) ^ draft_hash(s, 5);
    dspark_session_close(s);
    dspark_model_close(m);
    return h;
}

static int path_is_here(int path) { return dspark__kernels_choose(path) != NULL; }

static void test_paths(const char *dir, const int32_t *text, int prompt, int steps) {
    static const char *const names[] = { "best", "plain C", "AVX2", "AVX-512", "NEON", "AVX-512 BF16" };
    uint64_t expected = life_hash(dir, 1, DSPARK_PATH_BEST, text, prompt, steps);
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++)
        if (!path_is_here(path)) skip("not this machine", names[path]);
        else
            ok(life_hash(dir, 1, path, text, prompt, steps) == expected, "%s: %s has the bits of every path",
                name_of(dir),
               names[path]);
    for (int threads = 2; threads <= 3; threads++)
        ok(life_hash(dir, threads, 0, text, prompt, steps) == expected, "%s: %d threads have the bits of one",
            name_of(dir),
           threads);
}

/* ---- truncation (V#47930, V#28473) */

/* Back by `back` tokens, then `more` others: a straight run? */
static int truncated_is_straight(dspark_model *m, const int32_t *text, int n, int back, int more) {
    dspark_session *s = straight(m, text, n);
    int is;
    must(dspark_session_truncate(s, n - back));
    must(dspark_session_append(s, text + n, more));
    is = is_straight(s);
    dspark_session_close(s);
    return is;
}

static void test_truncate(const char *dir) {
    dspark_model *m = open_model(dir);
    int32_t *text = golden_text(dir);
    int ring = dspark_model_config(m)->dspark_block_size + 1, within = 1, far = 1, nothing = 1;
    for (int n = 127; n < 137; n += 3)
        for (int back = 1; back <= ring + 1; back++) within &= truncated_is_straight(m, text, n, back, 3 * (back % 2));
    for (int back = 8; back < 200; back += 23) far &= truncated_is_straight(m, text, 200, back, 0) &&
        truncated_is_straight(m, text, 200, back, 30);
    for (int n = 1; n < 200; n += 40) nothing &= truncated_is_straight(m, text, n, n, 50);
    ok(within, "%s: truncate within the rings, append: state, logits, drafts are a straight run's", name_of(dir));
    ok(far, "%s: truncate far back, append: state, logits, drafts are a straight run's", name_of(dir));
    ok(nothing, "%s: truncate to nothing, append: state, logits, drafts are a straight run's", name_of(dir));
    free(text);
    dspark_model_close(m);
}

/* Long without drafts, then one, which injects the window's taps; back within the rings, where the window begins
   earlier. */
static void test_truncate_after_pause(dspark_model *m, const int32_t *text) {
    int is = 1;
    for (int back = 1; back <= dspark_model_config(m)->dspark_block_size + 1; back++) {
        dspark_session *s = straight(m, text, 150);
        draft_hash(s, 5);
        must(dspark_session_truncate(s, 150 - back));
        run_pending(s);
        is &= is_straight(s);
        dspark_session_close(s);
    }
    ok(is, "the first draft after a long pause, truncate within the rings: drafts are those of a straight run");
}

/* Back within the rings right after a refill. Without HCA, whose rings are longer than any other, and with taps of
   the last layer, whose rows depend on the most before them. */
static void test_truncate_twice(const int32_t *text) {
    const edit config[] = { { "  128,\n  0,", "  0,\n  0," }, { "  1,\n  2\n ]", "  1,\n  3\n ]" } };
    const variant csa_only = { golden_b, { config[0], config[1] }, { { NULL, NULL } }, NULL, 0 };
    dspark_model *m = open_variant(&csa_only);
    int is = 1;
    for (int back = 1; back <= dspark_model_config(m)->dspark_block_size + 1; back++) {
        dspark_session *s = straight(m, text, 250);
        must(dspark_session_truncate(s, 151));
        run_pending(s);
        must(dspark_session_truncate(s, 151 - back));
        run_pending(s);
        is &= is_straight(s);
        dspark_session_close(s);
    }
    ok(is, "truncate far back, run, truncate within the rings: state, logits and drafts of a straight run");
    dspark_model_close(m);
}

/* Truncated to n, the rest goes through steps: is it what a straight run of its tokens leaves? */
static int truncated_steps_are_straight(dspark_model *m, const int32_t *text, int n, int more) {
    dspark_session *s = straight(m, text, 250);
    int is;
    s->desc.ignore_eos = 1;
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, 0);
    must(dspark_session_truncate(s, n));
    must(dspark_session_submit(s, text, more));
    for (int i = 0; i < 4; i++) step(s);
    run_pending(s);
    is = s->n_tokens > n + more && is_straight(s);
    dspark_session_close(s);
    return is;
}

static void test_truncate_and_step(dspark_model *m, const int32_t *text) {
    int at_once = 1, submitted = 1;
    for (int n = 20; n < 245; n += 25) at_once &= truncated_steps_are_straight(m, text, n, 0);
    for (int n = 20; n < 245; n += 25) submitted &= truncated_steps_are_straight(m, text, n, 4);
    ok(at_once, "truncate far back, then step: the session is a straight run's");
    ok(submitted, "truncate far back, submit a prompt, then step: the session is a straight run's");
}

/* Turns: a prompt, an answer, a prompt, an answer; back into the first; another turn. */
static void test_truncate_turns(dspark_model *m, const int32_t *text) {
    dspark_session *s = straight(m, text, 60);
    s->desc.ignore_eos = 1;
    for (int i = 0; i < 10; i++) step(s);
    must(dspark_session_append(s, text + 60, 50));
    for (int i = 0; i < 10; i++) step(s);
    must(dspark_session_truncate(s, 30));
    must(dspark_session_append(s, text + 100, 40));
    for (int i = 0; i < 5; i++) step(s);
    must(dspark_session_append(s, text + 140, 9));
    ok(is_straight(s), "truncate across turns, then another turn: the session is a straight run's");
    dspark_session_close(s);
}

static void test_truncate_drafts(dspark_model *m, const int32_t *text) {
    dspark_session *s = straight(m, text, 100);
    int is;
    draft_hash(s, 7);
    must(dspark_session_truncate(s, 99));
    step(s);
    run_pending(s);
    is = is_straight(s);
    draft_hash(s, 7);
    must(dspark_session_truncate(s, 40));
    must(dspark_session_append(s, text + 40, 1));
    ok(is && is_straight(s), "truncate between a draft and a step: stale drafts leave no trace");
    dspark_session_close(s);
}

/* Closed while tokens are pending or just drafted: nothing leaks (the last test), others go on. */
static void test_close_early(dspark_model *m, const int32_t *text) {
    dspark_session *s = straight(m, text, 50), *other = straight(m, text, 20);
    must(dspark_session_submit(s, text, 5));
    dspark_session_close(s);
    s = straight(m, text, 50);
    draft_hash(s, 9);
    dspark_session_close(s);
    must(dspark_session_append(other, text + 20, 5));
    ok(is_straight(other), "closing a session with drafts or a pending prompt leaves the others as they are");
    dspark_session_close(other);
}

static void test_no_drafts(dspark_model *m, const int32_t *text) {
    static const int32_t one[] = { 3 };
    dspark_session *s = open_session(m);
    dspark_step_result r;
    must(dspark_session_submit(s, one, 1));
    r = step(s);
    ok(r.n_tokens == 1 && !r.n_drafted && r.by[0] == DSPARK_BY_PLAIN,
        "a session whose first token is pending decodes plainly");
    must(dspark_session_truncate(s, 0));
    ok(dspark_session_length(s) == 0 && !dspark_session_logits(s), "truncated to 0: no tokens, no logits");
    must(dspark_step(&s, 1, NULL, &r));
    ok(r.status == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "no tokens"),
        "a step without tokens is refused");
    must(dspark_session_append(s, text, 30));
    ok(is_straight(s), "after a refused step the session can be used again");
    dspark_session_close(s);
}

/* ---- a random walk over every operation */

enum { APPEND, STEP, SUBMIT, TRUNCATE, DRAFT, FORK, PLAIN, N_OPERATIONS };

static dspark_session *walk(dspark_session *s, int operation) {
    int32_t some[150];
    int room = s->desc.max_context - s->n_tokens, n = dice(3) ? dice(10) : dice(150);
    dspark_session *copy;
    random_tokens(s->model, some, COUNT(some));
    if (n > room) n = room;
    if (operation == APPEND) must(dspark_session_append(s, some, n));
    if (operation == SUBMIT) must(dspark_session_submit(s, some, n));
    if (operation == TRUNCATE) must(dspark_session_truncate(s, s->n_tokens - dice(dspark__min(s->n_tokens,
        dice(2) ? 7 : 400) + 1)));
    if (operation == STEP && s->n_tokens) step(s), step(s);
    if (operation == DRAFT && s->n_tokens && s->n_tokens < s->desc.max_context) run_pending(s), draft_hash(s, 3);
    if (operation == PLAIN) set_plain(s, dice(2));
    if (operation != FORK) return s;
    must(dspark_session_fork(&copy, s, NULL));
    dspark_session_close(s);
    return copy;
}

static void test_walk(dspark_model *m) {
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    int bad = 0, checked = 0;
    d.temperature = 1, d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = open_session_as(m, &d);
    for (int i = 0; i < 500 && !bad; i++) {
        s = walk(s, dice(N_OPERATIONS));
        if (i % 4 || !s->n_tokens) continue;
        run_pending(s);
        checked++, bad = is_straight(s) ? 0 : i + 1;
    }
    ok(!bad && checked > 60,
        "a random walk of 500 appends, steps, submits, truncations, drafts, forks: always a straight run's "
       "state (%d times)", checked);
    if (bad) printf("# not after operation %d\n", bad);
    dspark_session_close(s);
}

/* ---- an append that fails leaves the session as it was */

static int stop_at_call(void *user, int done, int total) {
    (void)done, (void)total;
    return --*(int *)user > 0;
}

static void test_cancel(dspark_model *m, const int32_t *text) {
    int calls = 2;
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    uint64_t before, logits, drafts;
    d.progress = stop_at_call, d.user = &calls;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 50));
    before = live_hash(s), logits = logits_hash(s), drafts = draft_hash(s, 5);
    calls = 2;      /* the second of three passes */
    ok(dspark_session_append(s, text + 20, 260) == DSPARK_ERROR_CANCELLED && dspark_session_length(s) == 50,
       "an append cancelled in its second pass: CANCELLED, no token was added");
    ok(logits_hash(s) == logits && draft_hash(s, 5) == drafts && live_hash(s) == before && is_straight(s),
       "an append cancelled in its second pass leaves state, logits and drafts as they were");
    calls = 1;
    ok(dspark_session_append(s, text + 20, 100) == DSPARK_ERROR_CANCELLED && live_hash(s) == before,
        "an append cancelled before its first pass leaves the state as it was");
    calls = 100;
    must(dspark_session_append(s, text + 50, 30));
    ok(is_straight(s), "after cancelled appends the next one goes on from there");
    dspark_session_close(s);
}

static int append_refused(dspark_session *s, const int32_t *ids, int n, dspark_status status, const char *words) {
    uint64_t state = live_hash(s), logits = logits_hash(s);
    int length = s->n_tokens, appended = dspark_session_append(s, ids, n) == status && strstr(dspark_last_error(),
        words);
    int submitted = dspark_session_submit(s, ids, n) == status && strstr(dspark_last_error(), words);
    return appended && submitted && live_hash(s) == state && logits_hash(s) == logits && s->n_tokens == length;
}

static void test_append_refused(dspark_model *m, const int32_t *text) {
    int32_t wrong[] = { 4, -1 }, V = dspark_model_config(m)->vocab_size;
    dspark_session_desc d = session_desc(64);
    dspark_session *s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 60));
    ok(append_refused(s, text, 5, DSPARK_ERROR_CONTEXT_FULL, "context holds 64"),
        "5 tokens where 4 fit: CONTEXT_FULL, nothing changed");
    ok(append_refused(s, wrong, 2, DSPARK_ERROR_ARGUMENT, "token 1 is -1"), "an id below 0: ARGUMENT, nothing changed");
    wrong[1] = V;
    ok(append_refused(s, wrong, 2, DSPARK_ERROR_ARGUMENT, "token 1"), "an id of vocab_size: ARGUMENT, nothing changed");
    ok(append_refused(s, text, -1, DSPARK_ERROR_ARGUMENT, "-1 tokens"), "fewer than no tokens: ARGUMENT");
    ok(append_refused(s, NULL, 2, DSPARK_ERROR_ARGUMENT, "2 tokens"), "NULL for tokens: ARGUMENT");
    ok(dspark_session_truncate(s, 61) == DSPARK_ERROR_ARGUMENT && dspark_session_truncate(s,
        -1) == DSPARK_ERROR_ARGUMENT &&
       s->n_tokens == 60, "truncate to more than there is, or less than nothing: ARGUMENT");
    must(dspark_session_append(s, text + 60, 4));
    ok(is_straight(s) && step(s).finish == DSPARK_CONTEXT,
       "4 tokens fill the context; a step then finishes with CONTEXT");
    dspark_session_close(s);
}

/* ---- fork */

/* Both go on for a while: the same tokens and states at every step. */
static int go_on_alike(dspark_session *a, dspark_session *b, int steps) {
    int is = 1;
    for (int i = 0; i < steps && is; i++) {
        dspark_step_result x = step(a), y = step(b);
        is = x.n_tokens == y.n_tokens && !memcmp(x.tokens, y.tokens, (size_t)x.n_tokens * sizeof *x.tokens) &&
             x.text_len == y.text_len && !memcmp(x.text, y.text, (size_t)x.text_len) && x.n_accepted == y.n_accepted &&
             x.finish == y.finish && live_hash(a) == live_hash(b);
    }
    return is && !memcmp(&a->stats, &b->stats, offsetof(dspark_stats, draft_us));
}

/* After a prompt and `steps` steps: a fork is the session, and goes on as it does. */
static int fork_is_source(dspark_model *m, const int32_t *text, int steps, int verify) {
    dspark_session_desc d = session_desc(320);
    dspark_session *s, *copy;
    int is;
    d.temperature = 1, d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.verify = verify;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 70));
    for (int i = 0; i < steps; i++) step(s);
    must(dspark_session_fork(&copy, s, NULL));
    is = live_hash(s) == live_hash(copy) && logits_hash(s) == logits_hash(copy) && go_on_alike(s, copy, 8);
    dspark_session_close(s);
    run_pending(copy);
    is &= is_straight(copy);
    dspark_session_close(copy);
    return is;
}

static void test_fork(dspark_model *m, const int32_t *text) {
    dspark_session_desc small = session_desc(20);
    dspark_session *s = straight(m, text, 40), *copy;
    uint64_t before;
    ok(fork_is_source(m, text, 0, 0), "a fork at a turn's boundary is its source, and goes on as it does");
    ok(fork_is_source(m, text, 3, 0),
       "a fork within an answer, a token pending, is its source, and goes on as it does");
    ok(fork_is_source(m, text, 3, DSPARK_VERIFY_REJECTION),
        "a fork that verifies by rejection takes the cycle number along, and goes on as its source does");
    ok(dspark_session_fork(&copy, s, &small) == DSPARK_ERROR_CONTEXT_FULL && !copy && strstr(dspark_last_error(),
        "context of 20"),
       "a fork into a context that is too small: CONTEXT_FULL");
    small.max_context = 41;
    must(dspark_session_fork(&copy, s, &small));
    before = live_hash(s);
    must(dspark_session_append(copy, text + 100, 1));
    ok(is_straight(copy) && live_hash(s) == before,
        "a fork into a smaller context that holds it is a straight run, and leaves its source untouched");
    dspark_session_close(s), dspark_session_close(copy);
}

/* ---- files */

static const char session_file[] = "build/session.saved";

static int restored_is_saved(dspark_model *m, const int32_t *text, int steps) {
    dspark_session_desc d = session_desc(320);
    dspark_session *s, *back;
    int is;
    d.temperature = 1, d.seed = 8, d.top_p = .9f, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.ignore_eos = 1,
        d.logprobs = 1;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 70));
    for (int i = 0; i < steps; i++) step(s);
    must(dspark_session_save(s, session_file));
    must(dspark_session_restore(&back, m, session_file, NULL));
    is = live_hash(s) == live_hash(back) && logits_hash(s) == logits_hash(back) && back->n_tokens == s->n_tokens &&
         back->desc.logprobs == 1 && back->desc.ignore_eos == 1;
    is = is && go_on_alike(s, back, 8);
    run_pending(back);
    is &= is_straight(back);
    dspark_session_close(s), dspark_session_close(back);
    return is;
}

static void write_file(const char *path, const char *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n) bail("cannot be written", path);
    fclose(f);
}

static char *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *bytes;
    if (!f) bail("cannot be read", path);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    bytes = (char *)must_have(malloc(*n));
    if (fread(bytes, 1, *n, f) != *n) bail("cannot be read", path);
    fclose(f);
    return bytes;
}

static dspark_status restore_bytes(dspark_model *m, const char *bytes, size_t n) {
    dspark_session *s;
    dspark_status status;
    write_file(session_file, bytes, n);
    status = dspark_session_restore(&s, m, session_file, NULL);
    if ((status != DSPARK_OK) != (s == NULL)) return DSPARK_OK;
    dspark_session_close(s);
    return status;
}

static void test_cut_file(dspark_model *m, const char *bytes, size_t n) {
    int refused = 1;
    for (size_t cut = 1; cut < n; cut = cut * 2 + 1) refused &= restore_bytes(m, bytes, n - cut) == DSPARK_ERROR_FORMAT;
    for (size_t at = 1; at < sizeof(dspark__session_record); at += 61) refused &= restore_bytes(m, bytes,
        at) == DSPARK_ERROR_FORMAT;
    ok(refused, "a session file cut off at one of many places is refused: FORMAT");
    ok(restore_bytes(m, bytes, 0) != DSPARK_OK, "an empty session file is refused");
}

/* What a flipped bit of the head may do: be refused, or give a session that can be used. */
static int flipped_is_harmless(dspark_model *m, char *bytes, size_t n, size_t at, int flip) {
    dspark_session *s;
    dspark_step_result r;
    int harmless = 1;
    bytes[at] = (char)(bytes[at] ^ flip);
    write_file(session_file, bytes, n);
    if (dspark_session_restore(&s, m, session_file, NULL) == DSPARK_OK) {
        harmless = dspark_step(&s, 1, NULL, &r) == DSPARK_OK && r.n_tokens <= DSPARK_MAX_BLOCK + 2;
        harmless &= dspark_step(&s, 1, NULL, &r) == DSPARK_OK;
        dspark_session_close(s);
    } else harmless = !s && *dspark_last_error();
    bytes[at] = (char)(bytes[at] ^ flip);
    return harmless;
}

static void test_flipped_file(dspark_model *m, char *bytes, size_t n) {
    static const int flips[] = { 0x80, 1 };
    int harmless = 1;
    for (size_t at = 0; at < sizeof(dspark__session_record); at++)
        for (int i = 0; i < COUNT(flips); i++) harmless &= flipped_is_harmless(m, bytes, n, at, flips[i]);
    ok(harmless, "bit 0 or 7 of any byte of a session file's head flipped: an error, or a session that can be used");
}

/* Is a head refused if the value at `at` contradicts the rest? */
static int changed_refused(dspark_model *m, char *bytes, size_t n, size_t at, int32_t value) {
    int32_t old;
    dspark_status status;
    memcpy(&old, bytes + at, 4), memcpy(bytes + at, &value, 4);
    status = restore_bytes(m, bytes, n);
    memcpy(bytes + at, &old, 4);
    return status == DSPARK_ERROR_FORMAT;
}
#define FIELD(name) offsetof(dspark__session_record, name)

static void test_wrong_head(dspark_model *m, char *bytes, size_t n) {
    ok(changed_refused(m, bytes, n, 0, 0x21212121), "a file of another kind: FORMAT");
    ok(changed_refused(m, bytes, n, FIELD(n_tokens), 1000000), "more tokens than its context: FORMAT");
    ok(changed_refused(m, bytes, n, FIELD(n_tokens), -1), "fewer than no tokens: FORMAT");
    ok(changed_refused(m, bytes, n, FIELD(n_run), 10000), "more tokens run than there are: FORMAT");
    ok(changed_refused(m, bytes, n, FIELD(has_logits), 0), "all tokens run, and no logits: FORMAT");
    ok(changed_refused(m, bytes, n, sizeof(dspark__session_record), 99999), "a token outside the vocabulary: FORMAT");
}

/* Long, truncated, forked into a small context, saved: the file has positions beyond it. */
static void test_save_small(dspark_model *m, const int32_t *text) {
    dspark_session_desc small = session_desc(41);
    dspark_session *s = straight(m, text, 300), *copy, *back;
    must(dspark_session_truncate(s, 40));
    must(dspark_session_fork(&copy, s, &small));
    must(dspark_session_save(copy, session_file));
    ok(dspark_session_restore(&back, m, session_file, NULL) == DSPARK_OK,
        "a long session, truncated, forked into a small context, saved, "
       "can be restored");
    must(dspark_session_append(back, text + 40, 1));
    ok(is_straight(back), "the session restored into a small context is a straight run");
    dspark_session_close(s), dspark_session_close(copy), dspark_session_close(back);
    s = open_session(m);
    must(dspark_session_save(s, session_file));
    must(dspark_session_restore(&back, m, session_file, NULL));
    must(dspark_session_append(back, text, 20));
    ok(is_straight(back), "a session without tokens can be saved, restored and used");
    dspark_session_close(s), dspark_session_close(back);
}

static void test_files(dspark_model *m, const int32_t *text) {
    dspark_model *other = open_model(golden_a);
    dspark_session *s = straight(m, text, 70), *back;
    size_t n;
    char *bytes;
    dspark_policy p = s->desc.policy;
    ok(restored_is_saved(m, text, 0), "save and restore at a turn's boundary: the same session, the same text goes on");
    ok(restored_is_saved(m, text, 3), "save and restore within an answer: the same session, the same text goes on");
    p.quota = 1000;
    must(dspark_session_set_policy(s, &p));
    must(dspark_session_save(s, session_file));
    ok(dspark_session_restore(&back, other, session_file, NULL) == DSPARK_ERROR_FORMAT && !back &&
       strstr(dspark_last_error(), "another checkpoint"), "restoring with another checkpoint: FORMAT");
    ok(dspark_session_restore(&back, m, "build/no such file", NULL) == DSPARK_ERROR_IO && !back,
        "a file that is not there: IO");
    ok(dspark_session_restore(&back, m, "build", NULL) == DSPARK_ERROR_IO && !back &&
       !strncmp(dspark_last_error(), "build: ", 7), "a directory: IO");
    ok(dspark_session_save(s, "build/no such directory/x") == DSPARK_ERROR_IO, "a file that cannot be written: IO");
    bytes = read_file(session_file, &n);
    test_cut_file(m, bytes, n);
    test_flipped_file(m, bytes, n);
    test_wrong_head(m, bytes, n);
    test_save_small(m, text);
    remove(session_file);
    free(bytes);
    dspark_session_close(s);
    dspark_model_close(other);
}

/* ---- one session's step is no other's business (V#56734) */

static void test_apart(dspark_model *m, const int32_t *text) {
    dspark_session *s[3] = { straight(m, text, 100), straight(m, text + 50, 100), straight(m, text, 31) };
    const dspark__state *state = (const dspark__state *)s[1]->state;
    dspark__state counted_only;
    size_t n;
    uint64_t idle;
    memset(&counted_only, 0, sizeof counted_only), counted_only.max_context = 320;
    n = dspark__state_layout(&counted_only, dspark_model_config(m)), idle = hash_add(0, state->memory, n);
    for (int i = 0; i < 12; i++) step(s[0]), step(s[2]);
    must(dspark_session_append(s[0], text + 100, 64));
    draft_hash(s[0], 6);
    ok(hash_add(0, state->memory, n) == idle,
       "steps, appends and drafts of others leave an idle session's memory untouched");
    for (int i = 0; i < 3; i++) run_pending(s[i]);
    ok(is_straight(s[0]) && is_straight(s[1]) && is_straight(s[2]),
       "after steps of others, each session is a straight run");
    for (int i = 0; i < 3; i++) dspark_session_close(s[i]);
}

/* ---- descs */

static int refused(const dspark_model *m, dspark_session_desc d, const char *words) {
    dspark_session *s;
    return dspark_session_open(&s, (dspark_model *)(uintptr_t)m, &d) == DSPARK_ERROR_ARGUMENT && !s &&
           strstr(dspark_last_error(), words) && !dspark_session_bytes(m, &d);
}
#define refuses(m, field, value, words) do { \
        dspark_session_desc d_ = session_desc(64); \
        d_.field = value; \
        ok(refused(m, d_, words), "desc: " #field " = " #value " is refused by name"); \
    } while (0)

static void test_desc(const dspark_model *m) {
    const float nan_ = (float)NAN, inf = (float)HUGE_VAL;
    refuses(m, max_context, -1, "max_context");
    refuses(m, max_context, 1048577, "max_context");
    refuses(m, temperature, -1, "temperature");
    refuses(m, temperature, nan_, "temperature");
    refuses(m, temperature, inf, "temperature");
    refuses(m, top_k, -1, "top-k");
    refuses(m, top_p, -.5f, "top-p");
    refuses(m, top_p, nan_, "top-p");
    refuses(m, min_p, -.5f, "min-p");
    refuses(m, min_p, 1.5f, "min-p");
    refuses(m, n_stop_tokens, 1, "stop tokens");
    refuses(m, n_stop_tokens, -1, "stop tokens");
    refuses(m, n_stop_strings, 1, "stop strings");
    refuses(m, policy.schedule, DSPARK_SCHEDULE_GLOBAL + 1, "schedule");
    refuses(m, policy.share, -1, "share");
    refuses(m, policy.schedule, -1, "schedule");
    refuses(m, policy.verify, 3, "verify");
    refuses(m, policy.threshold, 2, "threshold");
    refuses(m, policy.threshold, nan_, "threshold");
    refuses(m, policy.draft_cap, -1, "draft_cap");
    refuses(m, policy.draft_cap, dspark_model_config(m)->dspark_block_size + 1, "draft_cap");
    refuses(m, policy.quota, -1, "quota");
}

static void test_stop_strings_refused(void) {
    static const char *const empty[] = { "" }, *const none[] = { NULL }, *const good[] = { "end" }, *const within[] = { "\xA9n" };
    dspark_model *tiny = open_model(spark_tiny), *golden = open_model(golden_b);
    dspark_session_desc d = session_desc(64);
    d.n_stop_strings = 1, d.stop_strings = empty;
    ok(refused(tiny, d, "stop string 0"), "desc: an empty stop string is refused");
    d.stop_strings = none;
    ok(refused(tiny, d, "stop string 0"), "desc: a stop string that is NULL is refused");
    d.stop_strings = within;
    ok(refused(tiny, d, "stop string 0 begins within a character"),
       "desc: a stop string that would leave half a character is refused");
    d.stop_strings = good;
    ok(refused(golden, d, "tokenizer"), "desc: stop strings without a tokenizer are refused");
    dspark_model_close(tiny), dspark_model_close(golden);
}

static void test_policy(dspark_model *m) {
    dspark_session *s = open_session(m);
    dspark_policy p = s->desc.policy;
    p.draft_cap = dspark_model_config(m)->dspark_block_size + 1;
    ok(dspark_session_set_policy(s, &p) == DSPARK_ERROR_ARGUMENT && !s->desc.policy.draft_cap,
       "set_policy refuses a draft cap above the block, and the policy stays");
    ok(dspark_session_set_policy(s, NULL) == DSPARK_ERROR_ARGUMENT, "set_policy refuses NULL");
    dspark_session_close(s);
}

/* ---- what it allocates */

static int bytes_are_told(dspark_model *m, const dspark_session_desc *d) {
    size_t told = dspark_session_bytes(m, d), before = counted.bytes;
    dspark_session *s = open_session_as(m, d);
    size_t took = counted.bytes - before;
    int is = told == took && told;
    if (!is) printf("# told %zu, took %zu\n", told, took);
    dspark_session_close(s);
    return is;
}

static void test_bytes(const char *dir) {
    static const int contexts[] = { 700, 1, 5, 64, 700, 2500, 8192, 0 };
    dspark_model *m = open_model_as(dir, 2, 0, 0);
    int is = 1;
    for (int i = 0; i < COUNT(contexts); i++) {
        dspark_session_desc d = session_desc(contexts[i]);
        is &= bytes_are_told(m, &d);
    }
    ok(is, "%s: dspark_session_bytes is what opening allocates, contexts of 1 to 8192", name_of(dir));
    dspark_model_close(m);
}

static void test_bytes_of_stops(void) {
    static const char *const stops[] = { "one", "another, longer stop string" };
    static const int32_t tokens[] = { 4, 5, 6 };
    dspark_model *m = open_model(spark_tiny);
    dspark_session_desc d = session_desc(100);
    d.stop_strings = stops, d.n_stop_strings = 2, d.stop_tokens = tokens, d.n_stop_tokens = 3;
    ok(bytes_are_told(m, &d), "dspark_session_bytes counts stop strings and stop tokens");
    dspark_model_close(m);
}

/* ---- a real text */

static void test_real_text(void) {
    static const char said[] = "‘What a curious feeling!’ said Alice; ‘I must be shutting up like a telescope.’ And so it was "
        "indeed: she was now only ten inches high, and her face brightened up at the thought that she was now the right size "
        "for going through the little door into that lovely garden. First, however, she waited for a few minutes to see if she "
        "was going to shrink any further: she felt a little nervous about this; 12 + 34 = 46, 7 * 8 = 56; and so on.";
    dspark_model *m = open_model(spark_tiny);
    int32_t ids[300];
    int n = dspark_encode(dspark_model_tokenizer(m), said, sizeof said - 1, 0, ids, COUNT(ids));
    ok(n > 60 && n < 200, "a sentence of 400 bytes is %d tokens of the small model", n);
    for (int i = n; i < 200; i++) ids[i] = ids[i % n];
    ok(truncated_is_straight(m, ids, 180, 3, 5) && truncated_is_straight(m, ids, 180, 100, 20),
       "spark-tiny: truncate near and far, append: state, logits and drafts of a straight run");
    dspark_model_close(m);
    test_chunks(spark_tiny, ids, 180);
    test_paths(spark_tiny, ids, 20, 1);
}

int main(void) {
    dspark_model *b = open_model(golden_b);
    int32_t *text = golden_text(golden_b), *text_a = golden_text(golden_a);
    test_chunks(golden_a, text_a, N), test_chunks(golden_b, text, N);
    test_verification(golden_a, 140), test_verification(golden_b, 290);
    for (int i = 0; i < 2; i++) test_company(goldens[i]), test_truncate(goldens[i]), test_bytes(goldens[i]);
    test_paths(golden_a, text_a, 70, 6), test_paths(golden_b, text, 70, 6);
    test_truncate_and_step(b, text), test_truncate_turns(b, text), test_truncate_drafts(b, text);
    test_truncate_after_pause(b, text), test_truncate_twice(text);
    test_close_early(b, text), test_no_drafts(b, text);
    test_walk(b);
    test_cancel(b, text), test_append_refused(b, text);
    test_fork(b, text);
    test_files(b, text);
    test_apart(b, text);
    test_desc(b), test_stop_strings_refused(), test_policy(b);
    test_bytes(spark_tiny), test_bytes_of_stops();
    test_real_text();
    free(text), free(text_a);
    dspark_model_close(b);
    return sessions_done();
}
