/* >>engine: one decoding cycle. With coupled verification the text is plain decoding's, whatever the drafts, schedules,
   batches and hooks; rejection keeps the distribution; stops and limits hold to the token; counters add up; and
   drafting never costs more than it may. Bug numbers are as in conformance.h.

   prompts.jsonl: 50 prompts of the corpus' held-out split, 12 or 13 of each domain, from the sources that each line
   names (README.md, Credits); questions go in the chat form ("chat": 1), the others are beginnings of texts. */
#include "sessions.h"
#include "heads.h"
#include "near.h"
#include "tap.h"

/* ================================================================================================
   Worked examples of an adjust hook. Each is a pure function of the prefix: no counter, no clock, nothing that
   differs between the call for a draft and the call for the target. Copy what you need. */

/* Repetition, presence and frequency penalty over the last `window` tokens. */
typedef struct { float repetition, presence, frequency; int window; } penalties;

static int count_of(const int32_t *tokens, int n, int32_t token) {
    int count = 0;
    for (int i = 0; i < n; i++) count += tokens[i] == token;
    return count;
}

static void penalize(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const penalties *p = (const penalties *)user;
    const int32_t *recent = prefix + (n > p->window ? n - p->window : 0);
    int n_recent = n > p->window ? p->window : n;
    (void)vocab;
    for (int i = 0; i < n_recent; i++) {
        float *x = &logits[recent[i]];
        if (count_of(recent, i, recent[i])) continue;       /* was its turn already */
        *x = *x > 0 ? *x / p->repetition : *x * p->repetition;
        *x -= p->presence + p->frequency * (float)count_of(recent, n_recent, recent[i]);
    }
}

/* Logit bias: so much more for some tokens; -HUGE_VALF bans one. */
typedef struct { const int32_t *token; const float *bias; int n; } biases;

static void add_biases(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const biases *b = (const biases *)user;
    (void)prefix, (void)n, (void)vocab;
    for (int i = 0; i < b->n; i++) logits[b->token[i]] += b->bias[i];
}

/* A grammar as a machine over bytes: a list of whole numbers, "[12, 7, 33]", then the end of text. A token is allowed
   iff all its bytes are. */
typedef struct { const dspark_tokenizer *tokenizer; int32_t eos; int start; /* tokens of the prompt */ } list_grammar;

enum { OPEN, NUMBER, DIGITS, COMMA, CLOSED, WRONG };
static int next_state(int state, char c) {
    int digit = c >= '0' && c <= '9';
    switch (state) {
    case OPEN: return c == '[' ? NUMBER : WRONG;
    case NUMBER: return digit ? DIGITS : WRONG;
    case DIGITS: return digit ? DIGITS : c == ',' ? COMMA : c == ']' ? CLOSED : WRONG;
    case COMMA: return c == ' ' ? NUMBER : WRONG;
    default: return WRONG;
    }
}

static int state_after(const list_grammar *g, int state, int32_t token) {
    int len;
    const char *bytes = dspark_token_bytes(g->tokenizer, token, &len);
    if (dspark_token_is_special(g->tokenizer, token) || !len) return WRONG;
    for (int i = 0; i < len && state != WRONG; i++) state = next_state(state, bytes[i]);
    return state;
}

static void allow_list(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const list_grammar *g = (const list_grammar *)user;
    int state = OPEN;
    for (int i = g->start; i < n; i++) state = state_after(g, state, prefix[i]);
    for (int32_t v = 0; v < vocab; v++)
        if (state == CLOSED ? v != g->eos : state_after(g, state, v) == WRONG) logits[v] = -HUGE_VALF;
}

/* ================================================================================================
   Texts of the small model */

enum { N_PROMPTS = 50, N_TOKENS = 128, PROMPT_ROOM = 320 };
typedef struct { int32_t ids[PROMPT_ROOM]; int n; } prompt;

static int encode_prompt(const dspark_model *m, const char *line, prompt *p) {
    const dspark_tokenizer *t = dspark_model_tokenizer(m);
    dspark_message message = { "user", NULL, NULL, 0 };
    dspark__json j;
    int64_t chat = 0;
    must(dspark__json_parse(&j, "prompts.jsonl", line, strlen(line)));
    message.content = j.strings + j.nodes[dspark__json_find(&j, 0, "prompt")].at;
    dspark__json_integer(&j, dspark__json_find(&j, 0, "chat"), &chat);
    p->ids[0] = dspark_model_config(m)->bos_token_id;
    p->n = chat ? dspark_chat_encode(t, &message, 1, NULL, 0, p->ids, PROMPT_ROOM)
                : 1 + dspark_encode(t, message.content, strlen(message.content), 0, p->ids + 1, PROMPT_ROOM - 1);
    dspark__json_free(&j);
    return p->n > 0 && p->n <= PROMPT_ROOM;
}

static void read_prompts(const dspark_model *m, prompt *p) {
    char line[4096];
    FILE *f = fopen("tests/prompts.jsonl", "r");
    if (!f) bail("cannot be read", "tests/prompts.jsonl");
    for (int i = 0; i < N_PROMPTS; i++)
        if (!fgets(line, sizeof line, f) || !encode_prompt(m, line, &p[i])) bail(line, "tests/prompts.jsonl");
    fclose(f);
}

/* What a session said, and its counters. */
typedef struct { int32_t tokens[N_TOKENS + 8]; int n, finish; dspark_stats stats; } told;

/* All sessions step together until each has finished. */
static void tell_all(dspark_session **s, int n, told *t) {
    dspark_step_result *r = (dspark_step_result *)must_have(malloc((size_t)n * sizeof *r));
    memset(t, 0, (size_t)n * sizeof *t);
    for (int left = n; left;) {
        must(dspark_step(s, n, NULL, r));
        for (int i = 0; i < n; i++) {
            if (r[i].status) bail(dspark_last_error(), "a step");
            for (int k = 0; k < r[i].n_tokens; k++) t[i].tokens[t[i].n++] = r[i].tokens[k];
            left -= r[i].finish && !t[i].finish;
            t[i].finish = r[i].finish;
        }
    }
    for (int i = 0; i < n; i++) t[i].stats = *dspark_session_stats(s[i]);
    free(r);
}

static int same_text(const told *a, const told *b) {
    return a->n == b->n && a->finish == b->finish && !memcmp(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens);
}

/* emitted = tokens given; accepted <= scheduled <= drafted; sums by position are the sums. */
static int adds_up(const told *t, int gamma) {
    const dspark_stats *s = &t->stats;
    int64_t scheduled = 0, accepted = 0;
    int is = s->emitted == t->n && s->accepted <= s->scheduled && s->scheduled <= s->drafted && s->cycles <= s->steps &&
             s->drafted <= s->cycles * gamma;
    for (int k = 0; k < DSPARK_MAX_BLOCK; k++) {
        scheduled += s->scheduled_by_position[k], accepted += s->accepted_by_position[k];
        is &= s->accepted_by_position[k] <= s->scheduled_by_position[k] && (k < gamma || !s->scheduled_by_position[k]);
    }
    return is && scheduled == s->scheduled && accepted == s->accepted && s->emitted <= s->steps + s->accepted + 1;
}

typedef struct { dspark_policy policy; int caps, n; } manner;       /* caps: draft_cap is 1 + i % block; n: tokens */

/* The text of every prompt in this manner, at temperatures 0, .7, 0, 1 in turn. */
static void texts(dspark_model *m, const prompt *p, const manner *how, told *t) {
    static const float temperatures[] = { 0, .7f, 0, 1 };
    dspark_session *s[N_PROMPTS];
    for (int i = 0; i < N_PROMPTS; i++) {
        dspark_session_desc d = session_desc(PROMPT_ROOM + N_TOKENS);
        d.temperature = temperatures[i % 4], d.seed = (uint64_t)i, d.ignore_eos = 1;
        d.policy = how->policy, d.policy.quota = how->n;
        if (how->caps) d.policy.draft_cap = 1 + i % dspark_model_config(m)->dspark_block_size;
        s[i] = open_session_as(m, &d);
        must(dspark_session_append(s[i], p[i].ids, p[i].n));
    }
    tell_all(s, N_PROMPTS, t);
    for (int i = 0; i < N_PROMPTS; i++) dspark_session_close(s[i]);
}

/* In how many of the prompts are the first n tokens the same? */
static int n_same(const told *a, const told *b, int n) {
    int same_ones = 0;
    for (int i = 0; i < N_PROMPTS; i++)
        same_ones += a[i].n == n && b[i].n >= n && !memcmp(a[i].tokens, b[i].tokens, (size_t)n * sizeof *a->tokens);
    return same_ones;
}
static int all_add_up(const told *t, int gamma) {
    int n = 0;
    for (int i = 0; i < N_PROMPTS; i++) n += adds_up(&t[i], gamma);
    return n == N_PROMPTS;
}

static void test_prompts(dspark_model *m, const prompt *p) {
    static const struct { const char *claim; manner how; } manners[] = {
        { "the default schedule", { { 0, 0, 0, 0, 0, 0, 0 }, 0, N_TOKENS } },
        { "whole blocks, draft caps 1 to 5", { { 0, DSPARK_SCHEDULE_BLOCK, 0, 0, 0, 0, 0 }, 1, N_TOKENS / 2 } },
        { "a threshold of .4", { { 0, DSPARK_SCHEDULE_THRESHOLD, 0, .4f, 0, 0, 0 }, 0, N_TOKENS / 4 } },
    };
    const manner plain = { { 1, 0, 0, 0, 0, 0, 0 }, 0, N_TOKENS };
    told *expected = (told *)must_have(malloc(N_PROMPTS * sizeof *expected)),
        *t = (told *)must_have(malloc(N_PROMPTS * sizeof *t));
    texts(m, p, &plain, expected);
    for (int i = 0; i < COUNT(manners); i++) {
        int n;
        texts(m, p, &manners[i].how, t);
        n = n_same(t, expected, manners[i].how.n);
        ok(n == N_PROMPTS, "coupled, %s, temperatures 0, .7 and 1: %d prompts of 50 give the %d tokens of plain decoding",
           manners[i].claim, n, manners[i].how.n);
        ok(all_add_up(t, dspark_model_config(m)->dspark_block_size), "the counters of each of these texts add up");
    }
    free(expected), free(t);
}

/* ---- acceptance (ik_llama.cpp#2296, V#41834, V#47930: a drafter at the wrong place still gives the right text) */

/* Drafts accepted a cycle over 100 greedy tokens after the beginning of a text. */
static double acceptance(dspark_model *m, const int32_t *ids, int n) {
    dspark_session_desc d = session_desc(n + 120);
    dspark_session *s;
    double rate;
    d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.quota = 100;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, n));
    while (!step(s).finish) continue;
    rate = (double)s->stats.accepted / (double)s->stats.cycles;
    dspark_session_close(s);
    return rate;
}

static void test_acceptance(dspark_model *m, const prompt *p) {
    enum { FIRST = 38, TEXTS = 6 };         /* stories */
    static int32_t ids[TEXTS * PROMPT_ROOM];
    double near = 0, far;
    int n = 0;
    for (int i = FIRST; i < FIRST + TEXTS; i++) near += acceptance(m, p[i].ids, p[i].n) / TEXTS;
    for (int i = FIRST; i < FIRST + TEXTS; i++) {
        memcpy(ids + n, p[i].ids, (size_t)p[i].n * sizeof *ids);
        n += p[i].n;
    }
    far = acceptance(m, ids, n);
    ok(near > 1.2, "more than 1.2 of five drafts are accepted a cycle (%.2f)", near);
    ok(far > 1.2, "more than 1.2 are accepted after %d tokens, far beyond the window (%.2f)", n, far);
}

/* ================================================================================================
   Forced texts: golden models, whose own texts mean nothing */

enum { START = 10, LONGEST = 60 };
static int32_t line_of_tokens[START + LONGEST];      /* all different: every token tells its place */

static void set_line(void) {
    for (int i = 0; i < START + LONGEST; i++) line_of_tokens[i] = 100 + i;
}

/* A session that will say line_of_tokens from START on, whole blocks accepted. */
static dspark_session *led(dspark_model *m, script *lead, dspark_session_desc d) {
    dspark_session *s;
    lead->text = line_of_tokens, lead->n = START + LONGEST;
    d.adjust = follow_script, d.adjust_user = lead;
    d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, line_of_tokens, START));
    return s;
}

/* Steps to the end: n tokens of the line from START; if a limit ends them, no draft was verified in vain. One more step
   gives nothing and finishes alike. */
static int says(dspark_session *s, int n, int finish) {
    dspark_step_result r;
    do r = step(s); while (!r.finish && s->n_tokens < START + LONGEST - 8);
    if (finish >= DSPARK_LENGTH && r.n_scheduled >= r.n_tokens) return 0;
    if (r.finish != finish || s->stats.emitted != n || s->n_tokens != START + n ||
        memcmp(s->tokens, line_of_tokens, (size_t)s->n_tokens * sizeof *s->tokens)) return 0;
    r = step(s);
    return !r.n_tokens && r.finish == finish && s->n_tokens == START + n;
}

/* transformers#47912, S#33758: every produced token as a stop token. */
static void test_stop_tokens(dspark_model *m) {
    int n_wrong = 0, offsets = 3 * (dspark_model_config(m)->dspark_block_size + 1) + 1;
    for (int n = 1; n <= offsets; n++) {
        script lead;
        dspark_session_desc d = session_desc(200);
        dspark_session *s;
        int32_t stops[] = { 7, line_of_tokens[START + n - 1] };
        d.stop_tokens = stops, d.n_stop_tokens = 2;
        s = led(m, &lead, d);
        n_wrong += !says(s, n, DSPARK_STOP_TOKEN);
        must(dspark_session_append(s, line_of_tokens, 3));
        n_wrong += !is_straight(s) || step(s).n_tokens < 1;
        dspark_session_close(s);
    }
    ok(!n_wrong,
       "a stop token at each of %d places, all offsets of a cycle, ends the text there; the state is right", offsets);
}

static void test_eos(dspark_model *m) {
    int32_t eos = dspark_model_config(m)->eos_token_id[0], was = line_of_tokens[START + 3];
    script lead;
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    line_of_tokens[START + 3] = eos;
    s = led(m, &lead, d);
    ok(says(s, 4, DSPARK_STOP_TOKEN), "end-of-text within an accepted prefix ends the text there");
    dspark_session_close(s);
    d.ignore_eos = 1, d.policy.quota = 9;
    s = led(m, &lead, d);
    ok(says(s, 9, DSPARK_LENGTH), "with ignore_eos end-of-text does not end the text");
    dspark_session_close(s);
    line_of_tokens[START + 3] = was;
}

/* ferrox#311: the limit at every offset. */
static void test_limits(dspark_model *m) {
    int quota_wrong = 0, context_wrong = 0, offsets = 3 * (dspark_model_config(m)->dspark_block_size + 1) + 1;
    for (int n = 1; n <= offsets; n++) {
        script lead;
        dspark_session_desc d = session_desc(200);
        dspark_session *s;
        d.policy.quota = n;
        s = led(m, &lead, d);
        quota_wrong += !says(s, n, DSPARK_LENGTH);
        dspark_session_close(s);
        d.policy.quota = 0, d.max_context = START + n;
        s = led(m, &lead, d);
        context_wrong += !says(s, n, DSPARK_CONTEXT);
        dspark_session_close(s);
    }
    ok(!quota_wrong, "a quota of 1 to %d tokens gives exactly those", offsets);
    ok(!context_wrong, "a context with room for 1 to %d tokens is filled to the last", offsets);
}

static void test_more_quota(dspark_model *m) {
    script lead;
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    dspark_policy p;
    int at_first;
    d.policy.quota = 5;
    s = led(m, &lead, d);
    at_first = says(s, 5, DSPARK_LENGTH);
    p = s->desc.policy, p.quota = 12;
    must(dspark_session_set_policy(s, &p));
    ok(at_first && says(s, 12, DSPARK_LENGTH), "with a larger quota the text goes on where it stopped");
    dspark_session_close(s);
}

/* Who made each token: drafts first, then what corrects or crowns them (V#9730: the bonus). */
static int made_by(dspark_session *s, rails *r, int cap, int right) {
    dspark_step_result got = step_on_rails(s, r, right);
    int is = got.n_tokens == right + 1 && got.n_accepted == right && got.n_scheduled == cap;
    for (int i = 0; i < right; i++) is &= got.by[i] == DSPARK_BY_DRAFT && got.tokens[i] == got.draft[i];
    return is && got.by[right] == (right == cap ? DSPARK_BY_BONUS : DSPARK_BY_CORRECTION);
}

static void test_makers(dspark_model *m) {
    int is = 1, gamma = dspark_model_config(m)->dspark_block_size;
    rails r;
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    memset(&r, 0, sizeof r);
    r.text = line_of_tokens, r.n = START + LONGEST, d.adjust = follow_rails, d.adjust_user = &r;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, line_of_tokens, START));
    set_plain(s, 1);
    step_on_rails(s, &r, DSPARK_MAX_BLOCK);
    for (int cap = 1; cap <= gamma; cap++)
        for (int right = 0; right <= cap; right++) {
            set_schedule(s, DSPARK_SCHEDULE_BLOCK, cap);
            is &= made_by(s, &r, cap, right);
            if (s->n_tokens > START + LONGEST / 2) must(dspark_session_truncate(s, START + 1));
        }
    ok(is, "at every cap and accepted count a cycle gives the accepted drafts, then the correction or the bonus");
    dspark_session_close(s);
}

/* ================================================================================================
   Stop strings: a text that is led, on the small model for its tokenizer */

static const char said[] = "Say: na\303\257ve caf\303\251, \346\274\242\345\255\227 \360\237\231\202 end.\nThe cat sat on the mat; 3 + 4 = 7, ok?";
enum { SAID_PROMPT = 4 };        /* bytes */

typedef struct { dspark_model *m; dspark_session *base; int32_t ids[96]; script lead; int n_prompt, quota; } talk;

static void open_talk(talk *t, dspark_model *m) {
    const dspark_tokenizer *k = dspark_model_tokenizer(m);
    dspark_session_desc d = session_desc(200);
    int n;
    t->m = m;
    t->n_prompt = dspark_encode(k, said, SAID_PROMPT, 0, t->ids, COUNT(t->ids));
    n = t->n_prompt + dspark_encode(k, said + SAID_PROMPT, sizeof said - 1 - SAID_PROMPT, 0, t->ids + t->n_prompt, 64);
    t->lead.text = t->ids, t->lead.n = n, t->quota = n - t->n_prompt;
    d.adjust = follow_script, d.adjust_user = &t->lead;
    t->base = open_session_as(m, &d);
    must(dspark_session_append(t->base, t->ids, t->n_prompt));
}

static dspark_session *open_talk_with(const talk *t, const char *const *stops, int n_stops, int plain) {
    dspark_session_desc d = t->base->desc;
    dspark_session *s;
    d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.plain = plain, d.policy.quota = t->quota;
    d.stop_strings = stops, d.n_stop_strings = n_stops;
    must(dspark_session_fork(&s, t->base, &d));
    return s;
}

static int is_utf8(const char *text, int n) {
    uint32_t code;
    for (int length; n > 0; text += length, n -= length)
        if ((length = dspark__utf8_read(text, (size_t)n, &code)) <= 0) return 0;
    return 1;
}

/* The session's text is `expected` and never anything else on the way, whole characters at every step. */
static int talks(dspark_session *s, const char *expected, int n, int finish) {
    int at = 0;
    dspark_step_result r;
    do {
        r = step(s);
        if (at + r.text_len > n || memcmp(r.text, expected + at, (size_t)r.text_len) || !is_utf8(r.text,
            r.text_len)) return 0;
        at += r.text_len;
    } while (!r.finish);
    return at == n && r.finish == finish;
}

/* With these stops the text ends before the first of them; where none comes, with its quota. */
static int ends_before(const talk *t, const char *const *stops, int n_stops, int plain) {
    const char *text = said + SAID_PROMPT, *end = NULL;
    dspark_session *s = open_talk_with(t, stops, n_stops, plain);
    int is;
    for (int i = 0; i < n_stops; i++) {
        const char *at = strstr(text, stops[i]);
        if (at && (!end || at < end)) end = at;
    }
    is = talks(s, text, (int)(end ? (size_t)(end - text) : strlen(text)), end ? DSPARK_STOP_STRING : DSPARK_LENGTH);
    dspark_session_close(s);
    return is;
}

static int is_head(char c) { return ((unsigned char)c & 0xC0) != 0x80; }     /* of a character */

/* Every piece of the text of n characters as the stop string. */
static int every_piece_stops(const talk *t, int n, int plain) {
    const char *text = said + SAID_PROMPT;
    for (int from = 0; text[from]; from++) {
        char piece[64];
        const char *stops[] = { piece };
        int to = from;
        if (!is_head(text[from])) continue;
        for (int k = 0; k < n && text[to]; k++)
            do to++; while (!is_head(text[to]));
        memcpy(piece, text + from, (size_t)(to - from)), piece[to - from] = 0;
        if (!ends_before(t, stops, 1, plain)) return printf("# \"%s\"\n", piece), 0;
    }
    return 1;
}

static void test_stop_strings(talk *t) {
    static const char *const two[] = { "sat on", "cat" },
        *const overlapping[] = { "\346\274\242\345\255\227 \360\237\231\202 END", "\345\255\227 \360\237" },
        *const never[] = { "ok?!", "mat; 3 + 4 = 8", "\346\274\242\345\255\227\345\255\227", "e\n" },
        *const none[] = { "zzz" };
    ok(ends_before(t, none, 1, 0) && ends_before(t, NULL, 0, 0), "without a stop string in it the text is whole");
    for (int n = 1; n <= 7; n += 6)
        ok(every_piece_stops(t, n, 0),
            "each piece of %d characters as a stop string ends the text before it; no part of it is given out", n);
    ok(ends_before(t, two, 2, 1) && ends_before(t, never, 4, 1), "stop strings work in plain decoding too");
    ok(ends_before(t, two, 2, 0), "of two stop strings the first in the text counts");
    ok(ends_before(t, overlapping, 1, 0) && ends_before(t, never, 4, 0),
        "what begins like a stop string and is none is given out after all");
}

/* A stop string of which half is held back while the session is forked, saved, or an append fails. */
static const char *const halfway[] = { "cat sat on the" };

static dspark_session *halfway_talk(const talk *t, int steps) {
    dspark_session *s = open_talk_with(t, halfway, 1, 1);
    for (int i = 0; i < steps; i++) step(s);
    return s;
}

static int same_end(dspark_session *a, dspark_session *b) {
    dspark_step_result x, y;
    do {
        x = step(a), y = step(b);
        if (x.text_len != y.text_len || memcmp(x.text, y.text, (size_t)x.text_len) || x.finish != y.finish) return 0;
    } while (!x.finish);
    return x.finish == DSPARK_STOP_STRING;
}

static void test_text_goes_along(const talk *t) {
    int forked = 1, cancelled = 1;
    for (int steps = 1; steps < 28; steps += 2) {
        dspark_session *s = halfway_talk(t, steps), *copy;
        must(dspark_session_fork(&copy, s, NULL));
        forked &= same_end(s, copy);
        dspark_session_close(s), dspark_session_close(copy);
    }
    ok(forked, "a fork goes along with the text held back and the character begun, wherever it is made");
    for (int steps = 10; steps < 28; steps += 3) {
        dspark_session *s = halfway_talk(t, steps), *other = halfway_talk(t, steps);
        int32_t wrong = -1;
        cancelled &= dspark_session_append(s, &wrong, 1) == DSPARK_ERROR_ARGUMENT && same_end(s, other);
        dspark_session_close(s), dspark_session_close(other);
    }
    ok(cancelled, "a refused append leaves the text held back and the character begun as they are");
}

static int never_go_on(void *user, int done, int total) { (void)user, (void)done, (void)total; return 0; }

static void test_text_saved(const talk *t) {
    static const char path[] = "build/cycle.saved";
    int saved = 1, cancelled = 1;
    for (int steps = 8; steps < 28; steps += 3) {
        dspark_session *s = halfway_talk(t, steps), *back, *other = halfway_talk(t, steps);
        must(dspark_session_save(s, path));
        must(dspark_session_restore(&back, t->m, path, &s->desc));
        saved &= same_end(s, back);
        other->desc.progress = never_go_on;
        cancelled &= dspark_session_append(other, t->ids, 3) == DSPARK_ERROR_CANCELLED;
        dspark_session_close(s), dspark_session_close(back);
        s = halfway_talk(t, steps);
        cancelled &= same_end(s, other);
        dspark_session_close(s), dspark_session_close(other);
    }
    ok(saved, "a file restored with the same desc has the text held back and the character begun");
    ok(cancelled, "a cancelled append leaves the text held back and the character begun as they are");
    remove(path);
}

/* ================================================================================================
   One seed, one text */

enum { FEW = 24 };

static void some_text(dspark_model *m, const int32_t *ids, uint64_t seed, int plain, int schedule, told *t) {
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    d.temperature = 1, d.seed = seed, d.ignore_eos = 1;
    d.policy.quota = FEW, d.policy.plain = plain, d.policy.schedule = schedule;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 30));
    tell_all(&s, 1, t);
    dspark_session_close(s);
}

static int seeds_hold(dspark_model *m, const int32_t *ids, int B) {
    static const int schedules[] = { 0, DSPARK_SCHEDULE_BLOCK, DSPARK_SCHEDULE_THRESHOLD };
    dspark_session *s[8];
    told t[8], expected;
    int is = 1;
    for (int i = 0; i < B; i++) {
        dspark_session_desc d = session_desc(200);
        d.temperature = 1, d.seed = (uint64_t)(B * 100 + i % 5), d.ignore_eos = 1, d.policy.quota = FEW;
        d.policy.schedule = schedules[i % 3], d.policy.threshold = .4f;
        s[i] = open_session_as(m, &d);
        must(dspark_session_append(s[i], ids + i, 30));
    }
    tell_all(s, B, t);
    for (int i = 0; i < B; i++) {
        some_text(m, ids + i, (uint64_t)(B * 100 + i % 5), 1, 0, &expected);
        is &= same_text(&t[i], &expected) && adds_up(&t[i], dspark_model_config(m)->dspark_block_size);
        dspark_session_close(s[i]);
    }
    return is;
}

static void test_seeds(dspark_model *m, const int32_t *ids) {
    told a, b, c;
    for (int B = 1; B <= 8; B++)
        ok(seeds_hold(m, ids, B),
            "coupled, temperature 1, %d in a step under mixed schedules: each seed's text is plain decoding's alone", B);
    some_text(m, ids, 1, 0, 0, &a), some_text(m, ids, 2, 0, 0, &b), some_text(m, ids, 1ull << 40 | 1, 0, 0, &c);
    ok(!same_text(&a, &b) && !same_text(&a, &c), "another seed, another text; all 64 bits count");
}

/* ================================================================================================
   Hooks: on both sides (V#48932, V#31955, S#31753) */

/* The text with a hook: as plain decoding's? *t: what it was. */
static int hooked_is_plain(dspark_model *m, const int32_t *ids, int n, dspark_adjust adjust, void *user, told *t) {
    told plain;
    for (int i = 0; i < 2; i++) {
        dspark_session_desc d = session_desc(PROMPT_ROOM + 100);
        dspark_session *s;
        d.temperature = .8f, d.seed = 3, d.adjust = adjust, d.adjust_user = user;
        d.policy.plain = !i, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.quota = 60;
        s = open_session_as(m, &d);
        must(dspark_session_append(s, ids, n));
        tell_all(&s, 1, i ? t : &plain);
        dspark_session_close(s);
    }
    return same_text(t, &plain) && adds_up(t, dspark_model_config(m)->dspark_block_size);
}

static void test_penalties(dspark_model *m, const prompt *p) {
    penalties some = { 1.3f, .5f, .2f, 64 }, never_twice = { 1, 1e4f, 0, 1000 };
    told t, without;
    int twice = 0;
    ok(hooked_is_plain(m, p->ids, p->n, penalize, &some, &t),
        "repetition, presence and frequency penalties: coupled text is plain text");
    hooked_is_plain(m, p->ids, p->n, NULL, NULL, &without);
    ok(!same_text(&t, &without), "penalties change the text");
    ok(hooked_is_plain(m, p->ids, p->n, penalize, &never_twice, &t),
        "a presence penalty without bound: coupled text is plain text");
    for (int i = 0; i < t.n; i++) twice += count_of(t.tokens, i, t.tokens[i]) + count_of(p->ids, p->n, t.tokens[i]);
    ok(!twice && t.n > 10, "a presence penalty without bound: no token comes twice");
}

static void test_biases(dspark_model *m, const prompt *p) {
    told without, t;
    int32_t token[3];
    const float bias[] = { -HUGE_VALF, 2, -HUGE_VALF };
    biases b = { token, bias, 3 };
    hooked_is_plain(m, p->ids, p->n, NULL, NULL, &without);
    token[0] = without.tokens[0], token[1] = without.tokens[1], token[2] = without.tokens[5];
    ok(hooked_is_plain(m, p->ids, p->n, add_biases, &b, &t) && t.n > 10, "logit bias: coupled text is plain text");
    ok(!count_of(t.tokens, t.n, token[0]) && !count_of(t.tokens, t.n, token[2]),
       "logit bias: banned tokens never come");
}

static void test_grammar(dspark_model *m, const prompt *p) {
    list_grammar g = { dspark_model_tokenizer(m), dspark_model_config(m)->eos_token_id[0], p->n };
    told t;
    int state = OPEN, n_list;
    ok(hooked_is_plain(m, p->ids, p->n, allow_list, &g, &t), "a grammar as a mask: coupled text is plain text");
    n_list = t.finish == DSPARK_STOP_TOKEN ? t.n - 1 : t.n;
    for (int i = 0; i < n_list; i++) state = state_after(&g, state, t.tokens[i]);
    ok(t.n > 3 && state != WRONG && (state == CLOSED) == (t.finish == DSPARK_STOP_TOKEN),
        "a grammar as a mask: the text is a list of numbers (%d tokens)", t.n);
    ok(t.stats.accepted > 0,
       "a grammar as a mask: some drafts, masked too, are accepted (%d of %d)", (int)t.stats.accepted,
        (int)t.stats.drafted);
}

/* ---- what a hook, or a model, must never make a token of (V#53029, V#45060) */

enum { NAN_LAST, PLUS_INFINITY, ALL_MASKED, ALL_NAN, N_POISONS };
typedef struct { int at, kind, armed; } poison;      /* the row after `at` tokens */

static void poison_row(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const poison *p = (const poison *)user;
    (void)prefix;
    if (!p->armed || n != p->at) return;
    if (p->kind == NAN_LAST) logits[vocab - 1] = (float)NAN;
    if (p->kind == PLUS_INFINITY) logits[vocab / 2] = HUGE_VALF;
    if (p->kind >= ALL_MASKED) for (int v = 0; v < vocab; v++) logits[v] = p->kind == ALL_NAN ? (float)NAN : -HUGE_VALF;
}

static dspark_session *poisoned(dspark_model *m, const int32_t *ids, poison *p, int verify, uint64_t seed) {
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    d.temperature = 1, d.seed = seed, d.ignore_eos = 1, d.adjust = poison_row, d.adjust_user = p, d.logprobs = 1;
    d.policy.quota = FEW, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.verify = verify;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 30));
    return s;
}

/* Two sessions in a step, the second poisoned after `at` of its tokens: only it stops, and there. Once cured, it goes
   on as if nothing had happened. */
static int poison_is_contained(dspark_model *m, const int32_t *ids, int kind, int at, int verify,
    const told *expected) {
    poison harmless = { 0, 0, 0 }, p = { 30 + at, kind, 1 };
    dspark_session *s[2] = { poisoned(m, ids, &harmless, verify, 1), poisoned(m, ids, &p, verify, 1) };
    dspark_step_result r[2];
    told t[2];
    int is = 1, made = 0;
    do {
        must(dspark_step(s, 2, NULL, r));
        made += r[1].n_tokens;
        is &= !r[0].status && made <= at;
    } while (!r[1].status && is && made < FEW);
    is &= r[1].status == DSPARK_ERROR_NUMERIC && made == at && s[1]->n_tokens == 30 + at && !r[1].finish &&
        *dspark_last_error();
    must(dspark_step(s, 2, NULL, r));
    is &= r[1].status == DSPARK_ERROR_NUMERIC && !r[1].n_tokens && !r[0].status;
    p.armed = 0;
    tell_all(s, 2, t);
    for (int i = 0; i < 2; i++) {
        is &= s[i]->n_tokens == 30 + FEW && s[i]->stats.emitted == FEW;
        is &= verify || !memcmp(s[i]->tokens + 30, expected->tokens, FEW * sizeof(int32_t));
        run_pending(s[i]);
        is &= is_straight(s[i]);
        dspark_session_close(s[i]);
    }
    return is;
}

static void test_poison(dspark_model *m, const int32_t *ids) {
    static const char *const kinds[] = { "NaN for the last token", "+infinity", "a row that is masked whole",
        "a row of NaN" };
    static const int places[] = { 0, 1, 2, 3, 7 };
    told expected;
    some_text(m, ids, 1, 1, 0, &expected);
    for (int kind = 0; kind < N_POISONS; kind++) {
        int is = 1;
        for (int i = 0; i < COUNT(places); i++)
            is &= poison_is_contained(m, ids, kind, places[i], DSPARK_VERIFY_COUPLED, &expected) &&
                  poison_is_contained(m, ids, kind, places[i], DSPARK_VERIFY_REJECTION, &expected);
        ok(is,
           "%s from a hook: NUMERIC for that session at its row, never a token; others go on, as it does once cured",
           kinds[kind]);
    }
}

/* The anchor's row is bad after a draft was asked for: a file saved then is still consistent. */
static void test_poison_and_file(dspark_model *m, const int32_t *ids) {
    static const char path[] = "build/cycle.saved";
    poison p = { 30, ALL_NAN, 1 };
    dspark_session *s = poisoned(m, ids, &p, 0, 1), *back = NULL;
    dspark_step_result r;
    draft_hash(s, 5);
    must(dspark_step(&s, 1, NULL, &r));
    must(dspark_session_save(s, path));
    ok(r.status == DSPARK_ERROR_NUMERIC && dspark_session_restore(&back, m, path, NULL) == DSPARK_OK,
       "a session whose row was bad can be saved and restored");
    if (back) run_pending(back);
    ok(back && is_straight(back), "a session restored after a bad row is a straight run");
    remove(path);
    dspark_session_close(s), dspark_session_close(back);
}

/* A row beyond the session's end is met by nobody. */
static void test_unreached_poison(dspark_model *m, const int32_t *ids) {
    poison p = { 30 + FEW, ALL_MASKED, 1 };
    dspark_session *s = poisoned(m, ids, &p, 0, 1);
    told t;
    tell_all(&s, 1, &t);
    ok(t.n == FEW && t.finish == DSPARK_LENGTH, "a bad row behind the quota's last token is never looked at");
    dspark_session_close(s);
}

/* Drafts that are poisoned, the target that is not: the text is the target's alone. */
typedef struct { int start, seen; } draft_poison;
static void poison_drafts(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    draft_poison *p = (draft_poison *)user;
    (void)prefix, (void)vocab;
    p->seen += n == p->start;
    if (p->seen == 1 && n > p->start) logits[0] = (float)NAN;
}

static void test_poisoned_drafts(dspark_model *m, const int32_t *ids) {
    draft_poison p = { 0, 0 };
    dspark_session_desc d = session_desc(200);
    dspark_session *s;
    told expected;
    int drafted = 0;
    some_text(m, ids, 1, 1, 0, &expected);
    d.temperature = 1, d.seed = 1, d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK, d.policy.quota = FEW;
    d.adjust = poison_drafts, d.adjust_user = &p;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 30));
    p.start = 31;
    for (int finish = 0; !finish; p.start = s->n_tokens, p.seen = 0) {
        dspark_step_result r = step(s);
        finish = r.finish, drafted += r.n_drafted;
        if (r.status || r.n_drafted > 1) drafted = -1000;
    }
    ok(drafted > 0 && !memcmp(s->tokens + 30, expected.tokens, FEW * sizeof(int32_t)),
       "a drafter that gives NaN drafts no further; the text is the target's");
    dspark_session_close(s);
}

/* ---- where drafter and target agree, nothing is rejected: one sampler on both sides, and in coupled one noise */

static void agree(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    (void)user, (void)prefix;
    for (int v = 0; v < vocab; v++) logits[v] = 6 * (float)dspark_uniform(1, 0, (uint64_t)n, 0, (uint32_t)v);
}

static int all_accepted(dspark_model *m, const int32_t *ids, dspark_session_desc d, int verify) {
    dspark_session *s;
    told t;
    d.adjust = agree, d.ignore_eos = 1, d.policy.quota = 41;
    d.policy.verify = verify, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 20));
    tell_all(&s, 1, &t);
    dspark_session_close(s);
    return t.stats.scheduled == 30 && t.stats.accepted == 30;
}

static void test_agreement(dspark_model *m, const int32_t *ids) {
    static const struct { const char *name; float temperature, top_p, min_p; int top_k; } samplers[] = {
        { "temperature 1", 1, 0, 0, 0 }, { "temperature .4", .4f, 0, 0, 0 }, { "temperature 2", 2, 0, 0, 0 },
        { "top-k 9", 1, 0, 0, 9 }, { "top-p .7", 1, .7f, 0, 0 }, { "min-p .3", 1, 0, .3f, 0 }, { "temperature 0", 0, 0, 0, 0 }
    };
    for (int i = 0; i < COUNT(samplers); i++) {
        dspark_session_desc d = session_desc(80);
        d.temperature = samplers[i].temperature, d.top_k = samplers[i].top_k;
        d.top_p = samplers[i].top_p, d.min_p = samplers[i].min_p;
        ok(all_accepted(m, ids, d, DSPARK_VERIFY_COUPLED) && all_accepted(m, ids, d, DSPARK_VERIFY_REJECTION),
           "%s: where drafter and target give the same logits every draft stands, coupled and in rejection", samplers[i].name);
    }
}

/* ================================================================================================
   Rejection through the engine: the joint of three tokens (dflash#74, sparkring#161) */

enum { CELLS = 64 };
static const int32_t four[4] = { 5, 60, 171, 290 };
static void only_four(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    float kept[4];
    (void)user, (void)prefix, (void)n;
    for (int i = 0; i < 4; i++) kept[i] = logits[four[i]];
    for (int v = 0; v < vocab; v++) logits[v] = -HUGE_VALF;
    for (int i = 0; i < 4; i++) logits[four[i]] = .4f * kept[i];
}
static int which(int32_t token) {
    for (int i = 0; i < 4; i++) if (four[i] == token) return i;
    return -1;
}

/* p of the four tokens after the session's text, from the target's logits. */
static void exact_row(const dspark_session *s, const dspark_session_desc *d, double p[4]) {
    int V = dspark_model_config(s->model)->vocab_size;
    float *row = (float *)must_have(malloc((size_t)V * sizeof *row));
    memcpy(row, dspark_session_logits(s), (size_t)V * sizeof *row);
    only_four(NULL, s->tokens, s->n_tokens, row, V);
    must(dspark_distribution(row, V, d->temperature, d->top_k, d->top_p, d->min_p, row));
    for (int i = 0; i < 4; i++) p[i] = (double)row[four[i]];
    free(row);
}

/* p of every three tokens after the base, by running each prefix plainly. */
static void exact_joint(const dspark_session *base, const dspark_session_desc *d, double p[CELLS]) {
    double p1[4], p2[4], p3[4];
    dspark_session *s;
    must(dspark_session_fork(&s, base, NULL));
    exact_row(s, d, p1);
    for (int a = 0; a < 4; a++) {
        must(dspark_session_truncate(s, base->n_tokens));
        must(dspark_session_append(s, &four[a], 1));
        exact_row(s, d, p2);
        for (int b = 0; b < 4; b++) {
            must(dspark_session_truncate(s, base->n_tokens + 1));
            must(dspark_session_append(s, &four[b], 1));
            exact_row(s, d, p3);
            for (int c = 0; c < 4; c++) p[16 * a + 4 * b + c] = p1[a] * p2[b] * p3[c];
        }
    }
    dspark_session_close(s);
}

/* B texts of three tokens, one step of all at a time, each with its own seed. */
static int count_texts(const dspark_session *base, dspark_session_desc d, int B, uint64_t seed, int count[CELLS],
    int64_t *accepted) {
    dspark_session *s[8];
    told t[8];
    int is = 1;
    for (int i = 0; i < B; i++) {
        d.seed = seed + (uint64_t)i;
        must(dspark_session_fork(&s[i], base, &d));
    }
    tell_all(s, B, t);
    for (int i = 0; i < B; i++) {
        int a = which(t[i].tokens[0]), b = which(t[i].tokens[1]), c = which(t[i].tokens[2]);
        is &= t[i].n == 3 && a >= 0 && b >= 0 && c >= 0;
        if (is) count[16 * a + 4 * b + c]++;
        *accepted += s[i]->stats.accepted;
        dspark_session_close(s[i]);
    }
    return is;
}

/* Chi-square of counts against n p, rare cells together; passes where its chance is over 1e-4 or so (Wilson-Hilferty). */
static int fits(const double p[CELLS], const int count[CELLS], int n, double *chi) {
    double rare = 0, rare_count = 0, limit, z = 4;
    int df = -1;
    *chi = 0;
    for (int i = 0; i < CELLS; i++) {
        double e = p[i] * n;
        if (p[i] <= 0 && count[i]) return 0;
        if (e < 5) rare += e, rare_count += count[i];
        else df++, *chi += (count[i] - e) * (count[i] - e) / e;
    }
    if (rare > 1) df++, *chi += (rare_count - rare) * (rare_count - rare) / rare;
    if (df < 1) return 0;
    limit = df * pow(1 - 2. / (9 * df) + z * sqrt(2. / (9 * df)), 3);
    return *chi < limit;
}

static void test_joint(dspark_model *m, const int32_t *ids) {
    static const struct { const char *name; float temperature, top_p, min_p; int top_k, schedule; } samplers[] = {
        { "temperature .7", .7f, 0, 0, 0, DSPARK_SCHEDULE_BLOCK }, { "top-k 3", 1, 0, 0, 3, DSPARK_SCHEDULE_BLOCK },
        { "top-p .8", 1, .8f, 0, 0, 0 }, { "min-p .2", 1, 0, .2f, 0, DSPARK_SCHEDULE_THRESHOLD },
        { "all of them", 1.5f, .95f, .05f, 3, DSPARK_SCHEDULE_BLOCK }
    };
    static const float flat[] = { 100, 101, 102, 103, 104, 105, 106, 107 };
    dspark_session *base = straight(m, ids, 40);
    set_costs(m, flat, COUNT(flat), 1, 0);
    for (int k = 0; k < COUNT(samplers); k++) {
        double p[CELLS], chi;
        int count[CELLS] = { 0 }, is = 1, n = 0;
        int64_t accepted = 0;
        dspark_session_desc d = session_desc(64);
        d.temperature = samplers[k].temperature, d.top_k = samplers[k].top_k, d.top_p = samplers[k].top_p,
            d.min_p = samplers[k].min_p;
        d.adjust = only_four, d.policy.verify = DSPARK_VERIFY_REJECTION, d.policy.quota = 3, d.ignore_eos = 1;
        d.policy.schedule = samplers[k].schedule, d.policy.threshold = samplers[k].schedule ? .3f : 0;
        exact_joint(base, &d, p);
        for (int round = 0; round < 25; round++)
            for (int B = 1; B <= 8; n += B, B++) is &= count_texts(base, d, B, (uint64_t)(100000 * k + n), count,
                &accepted);
        is &= fits(p, count, n, &chi);
        ok(is && accepted, "rejection, %s, batches of 1 to 8: three tokens' joint is the target's (chi-square %.0f, %d texts, %d "
           "drafts accepted)", samplers[k].name, chi, n, (int)accepted);
    }
    dspark_session_close(base);
}

/* ================================================================================================
   Log-probabilities */

/* ln softmax of the adjusted plain logits. */
static double exact_logprob(const dspark_session *s, dspark_adjust adjust, void *user, int32_t token) {
    int V = dspark_model_config(s->model)->vocab_size;
    float *row = (float *)must_have(malloc((size_t)V * sizeof *row));
    double sum = 0, x;
    memcpy(row, dspark_session_logits(s), (size_t)V * sizeof *row);
    adjust(user, s->tokens, s->n_tokens, row, V);
    for (int v = 0; v < V; v++) sum += exp((double)row[v]);
    x = (double)row[token] - log(sum);
    free(row);
    return x;
}

static void test_logprobs(dspark_model *m, const int32_t *ids) {
    penalties some = { 1.2f, .3f, .1f, 32 };
    dspark_session_desc d = session_desc(200);
    dspark_session *s, *plain = straight(m, ids, 30);
    double worst = 0;
    int n = 0, drafts = 0;
    d.temperature = .6f, d.top_p = .9f, d.logprobs = 1, d.ignore_eos = 1, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    d.policy.quota = 40, d.adjust = penalize, d.adjust_user = &some;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 30));
    for (int finish = 0; !finish;) {
        dspark_step_result r = step(s);
        finish = r.finish;
        for (int i = 0; i < r.n_tokens; i++, n++) {
            worst = worse(worst, fabs((double)r.logprob[i] - exact_logprob(plain, penalize, &some, r.tokens[i])));
            drafts += r.by[i] == DSPARK_BY_DRAFT;
            must(dspark_session_append(plain, &r.tokens[i], 1));
        }
    }
    ok(n == 40 && worst < 2e-6,
        "log-probabilities are ln softmax, at temperature 1, of plain decoding's adjusted logits (off by %.1e, %d of "
       "drafts)", worst, drafts);
    dspark_session_close(s), dspark_session_close(plain);
}

/* ================================================================================================
   The sequential heads, against a straightforward computation */

/* What the backbone gives, of the model without a head: logits and hidden rows. */
typedef struct { float logits[GAMMA][VOCAB], hidden[GAMMA][H]; } backbone;

static void run_backbone(const int32_t *ids, int n, int32_t anchor, backbone *b) {
    dspark_model *m = open_variant(&no_head);
    dspark_session *s = straight(m, ids, n);
    int32_t tokens[GAMMA];
    float confidence[GAMMA];
    must(dspark_session_draft(s, anchor, tokens, confidence, b->logits[0]));
    for (int k = 0; k < GAMMA; k++) memcpy(b->hidden[k], dspark__row(((dspark__cpu *)m->device)->hidden, k, H),
        sizeof b->hidden[k]);
    ok(isinf(confidence[0]) && isinf(confidence[2]),
        "a drafter without a Markov or a confidence head: confidence 1, whatever it drafts");
    dspark_session_close(s);
    dspark_model_close(m);
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double element(const dspark_matrix *w, int row, int col) {
    float values[512];
    dspark__lookup(w, row, values);
    return (double)values[col];
}
/* Row i of the head's matrix, its columns from `first`, times x. */
static double dot_row(int i, int width, int first, const double *x, int n) {
    double sum = 0;
    for (int j = 0; j < n; j++) sum += (double)joint[i * width + first + j] * x[j];
    return sum;
}

/* e of draft k, by the equations above dspark__markov_input; s is the RNN's state. */
static void head_step(int kind, const double *w1, const double *x, double *s, double *e) {
    int width = kind == DSPARK_HEAD_RNN ? 2 * RANK + H : RANK + H;
    double z[3 * RANK];
    for (int i = 0; i < RANK; i++) e[i] = w1[i];
    if (kind == DSPARK_HEAD_GATED)
        for (int i = 0; i < RANK; i++)
            e[i] *= sigmoid(dot_row(i, width, 0, x, H) + dot_row(i, width, H, w1,
                RANK) + (double)joint[RANK * width + i]);
    if (kind != DSPARK_HEAD_RNN) return;
    for (int i = 0; i < 3 * RANK; i++)
        z[i] = dot_row(i, width, 0, s, RANK) + dot_row(i, width, RANK, w1, RANK) + dot_row(i, width, 2 * RANK, x, H) +
               (double)joint[3 * RANK * width + i];
    for (int i = 0; i < RANK; i++) {
        s[i] = sigmoid(z[i]) * s[i] + (1 - sigmoid(z[i])) * tanh(z[RANK + i]);
        e[i] = tanh(z[2 * RANK + i]);
    }
}

/* How far draft k's logits and confidence are from U_k + W2 e and w [x ; W1 x_(k-1)] + b. */
static double head_error(const dspark_model *m, const backbone *b, int k, int32_t previous, double *s,
    const float *logits, float confidence) {
    const dspark_weights *w = dspark_model_weights(m);
    double w1[RANK], x[H], e[RANK], worst, c = (double)w->confidence_bias;
    for (int i = 0; i < RANK; i++) w1[i] = element(&w->markov_w1, previous, i);
    for (int i = 0; i < H; i++) x[i] = (double)b->hidden[k][i], c += element(&w->confidence_proj, 0, i) * x[i];
    for (int i = 0; i < RANK; i++) c += element(&w->confidence_proj, 0, H + i) * w1[i];
    worst = fabs(c - (double)confidence);
    head_step(w->head_kind, w1, x, s, e);
    for (int v = 0; v < VOCAB; v++) {
        double u = (double)b->logits[k][v];
        for (int i = 0; i < RANK; i++) u += element(&w->markov_w2, v, i) * e[i];
        worst = worse(worst, fabs(u - (double)logits[v]));
    }
    return worst;
}

static void test_head(dspark_model *m, const char *name, const int32_t *ids, const backbone *b) {
    dspark_session *s = straight(m, ids, 50);
    int32_t tokens[GAMMA], previous = 9;
    float confidence[GAMMA], logits[GAMMA][VOCAB];
    double state[RANK] = { 0 }, worst = 0;
    must(dspark_session_draft(s, previous, tokens, confidence, logits[0]));
    for (int k = 0; k < GAMMA; previous = tokens[k++])
        worst = worse(worst, head_error(m, b, k, previous, state, logits[k], confidence[k]));
    ok(worst < 1e-4, "a %s head: draft logits and confidences are the formula's (off by %.1e)", name, worst);
    dspark_session_close(s);
}

static void test_heads(const int32_t *ids) {
    static backbone b;
    const variant vanilla = { golden_b, { { NULL, NULL } }, { { NULL, NULL } }, NULL, 0 };
    const struct { const char *name; const variant *v; int kind; } heads[] = {
        { "vanilla", &vanilla, DSPARK_HEAD_VANILLA }, { "gated", &gated, DSPARK_HEAD_GATED }, { "RNN", &rnn,
            DSPARK_HEAD_RNN },
        { "missing", &no_head, DSPARK_HEAD_NONE }
    };
    set_joint();
    run_backbone(ids, 50, 9, &b);
    for (int i = 0; i < COUNT(heads); i++) {
        dspark_model *m = open_variant(heads[i].v);
        int is = dspark_model_weights(m)->head_kind == heads[i].kind;
        if (heads[i].kind) test_head(m, heads[i].name, ids, &b);
        for (int B = 1; B <= 4; B += 3) is &= seeds_hold(m, ids, B);
        ok(is, "a %s head: coupled text is plain text, alone and in company", heads[i].name);
        dspark_model_close(m);
    }
}

static void test_no_drafter(const int32_t *ids) {
    static const float flat[] = { 100, 100, 100 };
    dspark_model *m = open_model(golden_b);
    dspark_session *s = straight(m, ids, 20);
    int32_t tokens[GAMMA];
    float confidence[GAMMA];
    set_costs(m, flat, 3, 10, 0);
    m->checkpoint.config.n_stages = 0;      /* as in a checkpoint without mtp.* */
    ok(dspark_session_draft(s, 3, tokens, confidence, NULL) == DSPARK_ERROR_UNSUPPORTED &&
        strstr(dspark_last_error(), "no drafter"),
       "without a drafter a draft is refused");
    ok(step(s).n_tokens == 2 && !s->stats.drafted, "without a drafter every step is plain");
    m->checkpoint.config.n_stages = 1;
    dspark_session_close(s);
    dspark_model_close(m);
}

/* ================================================================================================
   Profile and schedule */

static void test_block_size(dspark_model *m, const int32_t *ids) {
    dspark_session *s = straight(m, ids, 30);
    dspark_policy p = s->desc.policy;
    dspark_step_result r;
    int gamma = dspark_model_config(m)->dspark_block_size, refused;
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, 0);
    r = step(s);
    p.draft_cap = gamma + 1;
    refused = dspark_session_set_policy(s, &p) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "draft_cap") &&
              strstr(dspark_last_error(), "block is 3");
    ok(r.n_drafted == gamma && r.n_scheduled == gamma, "the block size is the checkpoint's");
    ok(refused, "a draft cap above the block size is refused, and the message has that size");
    dspark_session_close(s);
}

static void test_profile(const int32_t *ids) {
    dspark_model *m = open_model(golden_b);
    dspark_session *s = straight(m, ids, 30);
    dspark_profile p;
    int lazy, sane = 1;
    set_plain(s, 1), step(s);
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, 0), step(s);
    lazy = !m->n_profiles;
    set_schedule(s, 0, 0), step(s);
    ok(lazy && m->n_profiles, "without a profile the first step that schedules by one measures it (S#35413)");
    must(dspark_model_profile(m, &p));
    for (int i = 0; i < p.n; i++) sane &= p.us[i] > 0 && (!i || (p.us[i] >= p.us[i - 1] && p.rows[i] > p.rows[i - 1]));
    ok(sane && p.n >= 4 && p.rows[3] == 4 && p.draft_us > 0, "up to %d rows were timed, none faster than fewer; a draft "
       "took %.0f us", p.rows[p.n - 1], (double)p.draft_us);
    dspark_session_close(s);
    dspark_model_close(m);
}

static void test_profile_of_short_context(const int32_t *ids) {
    static const variant small = { golden_b, { { "\"max_position_embeddings\": 1048576",
        "\"max_position_embeddings\": 6" } }, { { NULL, NULL } }, NULL, 0 };
    dspark_model *m = open_variant(&small);
    dspark_session_desc d = session_desc(0);
    dspark_session *s = open_session_as(m, &d);
    dspark_step_result r;
    int made = 0;
    must(dspark_session_append(s, ids, 2));
    do r = step(s), made += r.n_tokens; while (!r.finish);
    ok(m->n_profiles && made == 4 && r.finish == DSPARK_CONTEXT, "a model of 6 positions is measured within them");
    dspark_session_close(s);
    dspark_model_close(m);
}

/* A backend whose draft passes fail before they have injected anything. */
static int drafts_fail;
static void failing_inject(void *device) {
    if (!drafts_fail) dspark_cpu_backend()->inject(device);
}
static dspark_status failing_end(void *device, dspark_pass_result *out) {
    dspark_status status = dspark_cpu_backend()->pass_end(device, out);
    return drafts_fail && out->confidence_logits ? dspark__fail(DSPARK_ERROR_BACKEND, "as the test wants it") : status;
}
static void test_failed_draft(const int32_t *ids) {
    dspark_backend failing = *dspark_cpu_backend();
    dspark_model *m;
    dspark_model_desc desc;
    dspark_session *s;
    dspark_step_result r;
    int32_t tokens[DSPARK_MAX_BLOCK];
    float confidence[DSPARK_MAX_BLOCK];
    memset(&desc, 0, sizeof desc);
    failing.inject = failing_inject, failing.pass_end = failing_end, desc.backend = &failing, desc.n_threads = 1;
    must(dspark_model_open(&m, golden_b, &desc));
    s = straight(m, ids, 20);
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, 0), step(s), step(s);
    drafts_fail = 1;
    ok(dspark_step(&s, 1, NULL, &r) == DSPARK_ERROR_BACKEND, "a step whose draft pass fails is BACKEND");
    drafts_fail = 0, run_pending(s);
    ok(is_straight(s), "drafts after it are those of a session in which nothing failed");
    step(s), set_plain(s, 1), run_pending(s);       /* taps that no draft has injected yet */
    drafts_fail = 1;
    ok(dspark_session_draft(s, 5, tokens, confidence, NULL) == DSPARK_ERROR_BACKEND, "so is dspark_session_draft");
    drafts_fail = 0;
    ok(is_straight(s), "and so are its drafts");
    dspark_session_close(s);
    dspark_model_close(m);
}

static void test_profile_refused(dspark_model *m) {
    dspark_profile p;
    memset(&p, 0, sizeof p);
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT, "a profile without entries is refused");
    p.n = 2, p.rows[0] = 1, p.rows[1] = 2, p.us[0] = 100;
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "us[1]"),
        "a profile with a time of 0 is refused by name");
    p.us[1] = 110, p.rows[1] = 1;
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "more rows"),
        "a profile whose rows do not ascend is refused");
    p.rows[1] = 2, p.draft_us = (float)NAN;
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT, "a profile whose draft takes NaN is refused");
    p.draft_us = 0, p.us[0] = 1e-4f;
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT, "a profile with times that no file may have is refused");
    p.n = 0;
    ok(dspark_profile_us(&p, 7) == 0, "a pass takes 0 by a profile without points");
    p.n = DSPARK_MAX_PROFILE + 1;
    ok(dspark_model_set_profile(m, &p) == DSPARK_ERROR_ARGUMENT, "a profile with too many entries is refused");
}

/* The most drafts scheduled in 40 cycles, with passes that cost so much. */
static int most_scheduled(dspark_model *m, const int32_t *ids, const float *us, int verify) {
    dspark_session_desc d = session_desc(320);
    dspark_session *s;
    int most = 0;
    script lead = { NULL, 0 };
    lead.text = ids, lead.n = 300;
    d.ignore_eos = 1, d.adjust = follow_script, d.adjust_user = &lead;
    d.policy.verify = verify, d.temperature = verify == DSPARK_VERIFY_REJECTION;
    set_costs(m, us, GAMMA + 1, 1, 0);
    s = open_session_as(m, &d);
    must(dspark_session_append(s, ids, 30));
    for (int i = 0; i < 40; i++) {
        dspark_step_result r = step(s);
        if (r.n_scheduled > most) most = r.n_scheduled;
    }
    dspark_session_close(s);
    return most;
}

static void test_staircase(dspark_model *m, const int32_t *ids) {
    static const float flat[] = { 100, 100, 100, 100 }, stair[] = { 100, 100, 100, 1000 }, steep[] = { 100, 1000,
        2000, 3000 },
        cliff[] = { 100, 250, 250, 250 };
    float *bias = &m->checkpoint.weights.confidence_bias, was = *bias;
    *bias = 1e4f;       /* sure of every draft, and so expecting as much of the next */
    ok(most_scheduled(m, ids, flat, 0) == 3, "where rows cost nothing the whole block is verified");
    ok(most_scheduled(m, ids, stair, 0) == 2,
       "where the fourth row costs ten times as much, two drafts at most are verified");
    ok(most_scheduled(m, ids, steep, 0) == 0, "where the second row costs ten times as much, none is verified");
    ok(most_scheduled(m, ids, cliff, 0) == 3,
        "the global maximum past a step of the curve is taken where that is lossless (T#17056)");
    ok(most_scheduled(m, ids, cliff, DSPARK_VERIFY_REJECTION) == 0,
        "where that is not lossless, Algorithm 1 stops before the step");
    *bias = was;
}

static void test_calibration(dspark_model *m, const int32_t *ids) {
    float t[GAMMA] = { 2, .5f, 1 }, raw[GAMMA], wrong[GAMMA] = { 1, 0, 1 };
    int32_t tokens[GAMMA];
    dspark_session *s = straight(m, ids, 30);
    dspark_step_result r;
    int is = 1;
    must(dspark_model_set_calibration(m, t));
    set_schedule(s, DSPARK_SCHEDULE_BLOCK, 0);
    r = step(s);
    must(dspark_session_truncate(s, 30));
    run_pending(s);
    must(dspark_session_draft(s, r.tokens[0], tokens, raw, NULL));
    for (int k = 0; k < GAMMA; k++) is &= fabs((double)r.confidence[k] - sigmoid((double)raw[k] / (double)t[k])) < 1e-6;
    ok(is, "c_k = sigmoid(logit_k / T_k)");
    ok(dspark_model_set_calibration(m, wrong) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(),
        "temperature[1]"), "a T of 0 is refused by name");
    must(dspark_model_set_calibration(m, NULL));
    dspark_session_close(s);
}

/* ================================================================================================
   Never slower, in modelled time */

/* A ledger of one session: what its tokens would have cost plainly, what they cost. */
typedef struct { double excess, least, worst, worst_stretch; int cycles; } ledger;      /* cost - 1.01 plain so far */

static void enter(ledger *l, double plain_us, double cost_us, int tokens, int drafted) {
    l->excess += cost_us - 1.01 * plain_us * tokens;
    l->cycles += drafted;
    l->least = fmin(l->least, l->excess);
    l->worst = worse(l->worst, l->excess);
    l->worst_stretch = worse(l->worst_stretch, l->excess - l->least);
}

enum { NEVER, ALWAYS, WAVES, RANDOMLY, N_MOODS };
static int mood_of(int mood, int at) {      /* how many drafts are right in cycle `at` */
    return mood == ALWAYS || (mood == WAVES && at / 60 % 2 == 0) ? GAMMA : mood == RANDOMLY ? dice(GAMMA + 1) : 0;
}

/* 300 steps of a drafter in this mood; warm: at temperature 1, where each row and draft costs a draw too. */
enum { DRAFT_US = 40, SAMPLE_US = 15 };
static ledger ledger_of(dspark_model *m, const int32_t *text, int n, const float *us, int warm, int mood) {
    ledger l;
    rails r;
    dspark_session_desc d = session_desc(n);
    dspark_session *s;
    memset(&l, 0, sizeof l), memset(&r, 0, sizeof r);
    r.text = text, r.n = n, d.adjust = follow_rails, d.adjust_user = &r, d.ignore_eos = 1;
    set_costs(m, us, GAMMA + 1, DRAFT_US, SAMPLE_US);
    d.temperature = (float)warm;
    s = open_session_as(m, &d);
    must(dspark_session_append(s, text, 10));
    set_plain(s, 1), step_on_rails(s, &r, GAMMA), set_plain(s, 0);
    for (int i = 0; i < 300 && s->n_tokens < n - 8; i++) {
        dspark_step_result got = step_on_rails(s, &r, mood_of(mood, i));
        double draw = warm ? SAMPLE_US : 0, cost = (double)us[got.n_scheduled] + draw * (1 + got.n_scheduled);
        if (got.n_drafted) cost += DRAFT_US + GAMMA * draw;
        enter(&l, (double)us[0] + draw, cost, got.n_tokens, got.n_drafted > 0);
    }
    dspark_session_close(s);
    return l;
}

static void test_never_slower(dspark_model *m) {
    static const char *const moods[] = { "never right", "always right", "right in waves", "right at random" };
    static const float flat[] = { 100, 100, 100, 100 }, linear[] = { 100, 120, 140, 160 }, stairs[] = { 100, 100,
        190, 190 };
    static const float *const costs[] = { flat, linear, stairs };
    enum { LONG = 1400 };
    int32_t *text = (int32_t *)must_have(malloc(LONG * sizeof *text));
    float sure[GAMMA] = { .05f, .05f, .05f };
    random_tokens(m, text, LONG);
    must(dspark_model_set_calibration(m, sure));
    for (int mood = 0; mood < N_MOODS; mood++) {
        int prefixes = 1, stretches = 1, cycles = 0;
        for (int k = 0; k < COUNT(costs); k++) {
            int warm = k == 1;
            ledger l = ledger_of(m, text, LONG, costs[k], warm, mood);
            double loss = DRAFT_US + (double)costs[k][GAMMA] - (double)costs[k][0] + warm * 2 * GAMMA * SAMPLE_US;
            prefixes &= l.worst <= loss + 1e-3, stretches &= l.worst_stretch <= 16 * loss + 1e-3, cycles += l.cycles;
        }
        ok(prefixes && cycles,
            "a drafter that is %s: any beginning of a text costs at most 1.01 plain + one worst loss (%d cycles)",
           moods[mood], cycles);
        ok(stretches, "any stretch of these texts costs at most 1.01 plain + 16 worst losses");
    }
    must(dspark_model_set_calibration(m, NULL));
    free(text);
}

/* In a batch: a session of small cap whose drafts are never right, beside sessions that always verify whole blocks
   and so push the pass over a step of the curve. Drafts share the pass's growth equally. */
static void test_never_slower_in_company(dspark_model *m) {
    enum { R = 3, LONG = 300 };
    static const float us[] = { 100, 100, 100, 100, 100, 100, 100, 100, 1000, 1000, 1000, 1000 };
    int32_t text[LONG];
    rails r[R];
    dspark_session *s[R];
    dspark_step_result got[R];
    float sure[GAMMA] = { .05f, .05f, .05f };
    ledger l;
    double P = 100. / R, loss = 5 + 900. * GAMMA / 6;
    random_tokens(m, text, LONG);
    memset(&l, 0, sizeof l), memset(r, 0, sizeof r);
    set_costs(m, us, COUNT(us), 5, 0);
    must(dspark_model_set_calibration(m, sure));
    for (int i = 0; i < R; i++) {
        dspark_session_desc d = session_desc(LONG + 8);
        r[i].text = text, r[i].n = LONG, d.adjust = follow_rails, d.adjust_user = &r[i], d.ignore_eos = 1;
        s[i] = open_session_as(m, &d);
        must(dspark_session_append(s[i], text, 10));
        set_plain(s[i], 1), step_on_rails(s[i], &r[i], GAMMA);
        set_schedule(s[i], i ? DSPARK_SCHEDULE_BLOCK : 0, i ? 0 : 1);
    }
    for (int k = 0; k < 200; k++) {
        int rows = 0;
        for (int i = 0; i < R; i++) r[i].right = 0, r[i].start = s[i]->n_tokens, r[i].seen = 0;
        must(dspark_step(s, R, NULL, got));
        for (int i = 0; i < R; i++) rows += got[i].n_scheduled;
        enter(&l, P, P + (got[0].n_drafted ? 5 : 0) + (rows ? ((double)us[R + rows - 1] - 100) * got[0].n_scheduled / rows : 0),
              got[0].n_tokens, got[0].n_drafted > 0);
    }
    ok(l.worst <= loss + 1e-3 && l.cycles,
        "beside blocks past a step of the curve a text costs at most 1.01 plain + one worst loss (%.0f of %.0f us)",
       l.worst, loss);
    must(dspark_model_set_calibration(m, NULL));
    for (int i = 0; i < R; i++) dspark_session_close(s[i]);
}

/* ================================================================================================
   What a step refuses */

static void test_step_refused(dspark_model *m, const int32_t *ids) {
    dspark_model *other = open_model(golden_b);
    dspark_session *s[2] = { straight(m, ids, 5), straight(other, ids, 5) };
    dspark_step_result r[2];
    ok(dspark_step(s, 0, NULL, r) == DSPARK_ERROR_ARGUMENT && dspark_step(NULL, 1, NULL, r) == DSPARK_ERROR_ARGUMENT &&
       dspark_step(s, 1, NULL, NULL) == DSPARK_ERROR_ARGUMENT, "a step of no sessions, or without results, is refused");
    ok(dspark_step(s, 2, NULL, r) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "another model") &&
        s[0]->n_tokens == 5,
       "sessions of two models in one step are refused");
    ok(dspark_session_draft(s[0], -1, r[0].draft, r[0].confidence, NULL) == DSPARK_ERROR_ARGUMENT,
        "a draft after a token that is none is refused");
    dspark_session_close(s[1]), s[1] = NULL;
    ok(dspark_step(s, 2, NULL, r) == DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "session 1 is NULL"),
       "a session that is NULL is refused");
    must(dspark_session_submit(s[0], ids, 2));
    ok(dspark_session_draft(s[0], 4, r[0].draft, r[0].confidence, NULL) == DSPARK_ERROR_ARGUMENT &&
        !dspark_session_logits(s[0]),
       "while tokens are pending there are no logits, and a draft is refused");
    dspark_session_close(s[0]), dspark_session_close(s[1]);
    dspark_model_close(other);
}

static void test_led(void) {
    dspark_model *a = open_model(golden_a), *b = open_model(golden_b);
    int32_t *ids = golden_text(golden_b);
    set_line();
    test_stop_tokens(a), test_eos(a), test_limits(a), test_more_quota(a), test_makers(a);
    test_seeds(b, ids);
    test_poison(b, ids), test_poison_and_file(b, ids), test_unreached_poison(b, ids), test_poisoned_drafts(b, ids);
    test_agreement(b, ids), test_joint(b, ids);
    test_logprobs(b, ids);
    test_heads(ids), test_no_drafter(ids), test_failed_draft(ids);
    test_block_size(b, ids), test_profile(ids), test_profile_of_short_context(ids), test_profile_refused(b);
    test_staircase(b, ids), test_calibration(b, ids);
    test_never_slower(b), test_never_slower_in_company(b);
    test_step_refused(b, ids);
    free(ids);
    dspark_model_close(a), dspark_model_close(b);
}

static void test_texts(void) {
    dspark_model *m = open_model(spark_tiny);
    prompt *p = (prompt *)must_have(malloc(N_PROMPTS * sizeof *p));
    talk t;
    read_prompts(m, p);
    test_prompts(m, p);
    test_acceptance(m, p);
    test_penalties(m, &p[40]), test_biases(m, &p[41]), test_grammar(m, &p[5]);
    open_talk(&t, m);
    test_stop_strings(&t), test_text_goes_along(&t), test_text_saved(&t);
    dspark_session_close(t.base);
    free(p);
    dspark_model_close(m);
}

int main(void) {
    test_led();
    test_texts();
    return sessions_done();
}
