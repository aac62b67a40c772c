/* Bugs of public speculative decoding engines, as a test suite for any engine: bind the functions below, run
   conform_row[i].holds for each of the CONFORM_ROWS, and break the binding on purpose to see it fail (conformance.c
   does both for dspark.h). L = llama.cpp, V = vLLM, S = SGLang, T = TensorRT-LLM, D = ds4; the number is the issue or
   pull request.

   A text is committed tokens. The last of them is the anchor: it has not been run yet, all before it have. A cycle
   drafts after the anchor, verifies in one pass, and commits what was accepted and one token more. */
#ifndef CONFORMANCE_H
#define CONFORMANCE_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CONFORM_BLOCK = 16, CONFORM_VOCAB = 512, CONFORM_FINISHED = 1, CONFORM_REFUSED = -1 };

/* Changes logits [vocab] for the token after prefix [n]; a pure function, wanted on drafts and target alike. */
typedef void (*conform_hook)(void *user, const int32_t *prefix, int n, float *logits, int vocab);

typedef struct {
    uint64_t seed;
    float temperature, top_p;       /* 0: greedy; 0: off */
    int rejection;                  /* 1: verify by rejection sampling; 0: the text is plain decoding's */
    int plain;                      /* 1: no drafts */
    int drafts;                     /* verified a cycle; 0: the block; the engine's own schedule if `adaptive` */
    int adaptive;
    int limit;                      /* tokens made in all; 0: none */
    int32_t stop;                   /* a token that ends the text; 0: none */
    conform_hook hook;
    void *user;
} conform_options;

typedef struct {
    int status;                     /* 0, CONFORM_FINISHED, or CONFORM_REFUSED: this text cannot go on */
    int n_tokens;                   /* committed by this cycle */
    int32_t tokens[CONFORM_BLOCK + 1];
    int n_drafted, n_scheduled, n_accepted;
    int32_t draft[CONFORM_BLOCK];
} conform_cycle;

/* Functions that return int: 0, or CONFORM_REFUSED, after which why() says what, expected, found. */
typedef struct conform_engine {
    void *self;
    int vocab, block;               /* 300 .. CONFORM_VOCAB, at most CONFORM_BLOCK; a block of 8 tests most */
    int period;                     /* positions after which every ring has begun again */
    const char *(*why)(void);
    /* texts */
    void *(*open)(void *self, const conform_options *);     /* NULL: refused */
    void (*close)(void *text);
    int (*append)(void *text, const int32_t *ids, int n);
    int (*truncate)(void *text, int n);
    void *(*restore)(void *text);                           /* a copy, made by saving and restoring */
    int (*logits)(void *text, float *logits);               /* [vocab] after the anchor, before hook and sampler */
    uint64_t (*state)(void *text);                          /* a hash of what later tokens depend on */
    void (*count)(void *text, int64_t counters[4]);         /* drafted, scheduled, accepted, emitted so far */
    /* cycles */
    int (*propose)(void *text, int32_t *draft, float *logits);  /* [block], [block][vocab] or NULL; changes nothing */
    int (*verify)(void *text, const int32_t *draft, int n, conform_cycle *);    /* with these in place of its own */
    int (*step)(void **texts, int n, conform_cycle *);
    /* arithmetic: rejection sampling, p_target [n + 1][vocab], p_draft [n][vocab]; next -1 where it is refused */
    int (*decide)(const float *p_target, const float *p_draft, const int32_t *draft, int n, int vocab, uint64_t seed,
                  int *accepted, int32_t *next);
    /* lengths [n] of texts with confidences [n][gamma] that a coupled verifier is to check; sps [n_sps] or NULL */
    int (*schedule)(const float *confidence, int n, int gamma, const float *sps, int n_sps, float draft_us,
                    int *lengths);
    int (*measured)(void *self);                            /* 1: it knows what passes cost */
    void (*forget)(void *self);                             /* what passes cost, as if no cycle had run */
    /* the checkpoint: its tensor file's header (the caller frees), and opening with another in its place */
    char *(*header)(void *self, size_t *n);
    int (*load)(void *self, const char *header, size_t n, uint64_t stated_length);
    int (*damaged)(void *self);                             /* writes outside of what was allocated, so far */
    /* a case of an independent implementation: text of n tokens, drafts after it and their logits. 0: no such case */
    int (*golden)(void *self, int i, const int32_t **text, int *n, const int32_t **draft, const float **logits);
} conform_engine;

#define CONFORM static __attribute__((unused))

/* ---- small tools */

static uint64_t conform_state = 1;
CONFORM double conform_random(void) {       /* splitmix64, (0, 1) */
    uint64_t z = conform_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u, z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return ((double)((z ^ z >> 31) >> 11) + .5) * 0x1p-53;
}

/* Tokens that say nothing, and none of them 0 or 1. */
CONFORM void conform_prompt(const conform_engine *e, int32_t *ids, int n) {
    for (int i = 0; i < n; i++) ids[i] = 2 + (i * 7919 + 13) % (e->vocab - 2);
}
enum { CONFORM_PROMPT = 24 };
CONFORM void *conform_open(const conform_engine *e, const conform_options *o, int n) {
    int32_t ids[512];
    void *t = e->open(e->self, o);
    conform_prompt(e, ids, n);
    if (t && e->append(t, ids, n)) e->close(t), t = NULL;
    return t;
}

/* Steps until n tokens are made or the text has ended; how many. */
CONFORM int conform_tell(const conform_engine *e, void *t, int32_t *tokens, int n) {
    int made = 0;
    while (made < n) {
        conform_cycle c;
        if (e->step(&t, 1, &c)) return CONFORM_REFUSED;
        for (int i = 0; i < c.n_tokens && made < n; i++) tokens[made++] = c.tokens[i];
        if (c.status) break;
    }
    return made;
}
CONFORM int conform_text(const conform_engine *e, const conform_options *o, int32_t *tokens, int n) {
    void *t = conform_open(e, o, CONFORM_PROMPT);
    int made = t ? conform_tell(e, t, tokens, n) : CONFORM_REFUSED;
    if (t) e->close(t);
    return made;
}

/* Chi-square of counts [n] against p, rare cells together; passes where its chance is over 1e-4 or so. */
CONFORM int conform_fits(const double *p, const int *count, int n, int samples) {
    double rare = 0, rare_count = 0, chi = 0;
    int df = -1;
    for (int i = 0; i < n; i++) {
        double expected = p[i] * samples;
        if (p[i] <= 0 && count[i]) return 0;
        if (expected < 5) rare += expected, rare_count += count[i];
        else df++, chi += (count[i] - expected) * (count[i] - expected) / expected;
    }
    if (rare > 1) df++, chi += (rare_count - rare) * (rare_count - rare) / rare;
    return df > 0 && chi < df * pow(1 - 2. / (9 * df) + 4 * sqrt(2. / (9 * df)), 3);     /* Wilson, Hilferty */
}

/* ---- the rows */

/* Plain decoding: its text and the state after each token. Then, at each of `positions` places, a cycle of `width`
   drafts, of which the first 0 .. width, in turn, are that text's. State, text and counts must be plain decoding's. */
typedef struct { int32_t token[512]; uint64_t state[512]; } conform_trace;
CONFORM int conform_plain(const conform_engine *e, conform_trace *trace, int n) {
    const conform_options plain = { .plain = 1 };
    void *t = conform_open(e, &plain, CONFORM_PROMPT);
    conform_cycle c;
    for (int i = 0; t && i <= n; i++) {
        trace->state[i] = e->state(t);
        if (e->step(&t, 1, &c) || c.n_tokens != 1) return e->close(t), 0;
        trace->token[i] = c.tokens[0];
    }
    if (t) e->close(t);
    return t != NULL;
}
CONFORM int conform_width(const conform_engine *e, const conform_trace *plain, int width, int positions) {
    const conform_options o = { .drafts = width };
    void *t = conform_open(e, &o, CONFORM_PROMPT);
    int is = t != NULL;
    for (int at = 0; at < positions && is; at++) {
        int right = (at + at / (width + 1)) % (width + 1);      /* so that each meets every phase of 4 and 8 */
        int32_t draft[CONFORM_BLOCK];
        conform_cycle c;
        for (int k = 0; k < width; k++)
            draft[k] = k < right ? plain->token[at + k] : (plain->token[at + k] + 1 + k) % e->vocab;
        is = !e->verify(t, draft, width, &c) && c.n_accepted == right && c.n_tokens == right + 1 &&
             !memcmp(c.tokens, plain->token + at, (size_t)c.n_tokens * sizeof *draft) &&
             e->state(t) == plain->state[at + right + 1] && !e->truncate(t, CONFORM_PROMPT + at + 1) &&
             e->state(t) == plain->state[at + 1];
    }
    if (t) e->close(t);
    return is;
}
CONFORM int conform_rings(const conform_engine *e) {
    static conform_trace plain;
    int is = conform_plain(e, &plain, e->period + e->block + 1);
    for (int width = e->block < 8 ? e->block : 8; width; width--) is = is && conform_width(e, &plain, width, e->period);
    return is;
}

/* The same tokens in chunks, and in the company of other texts. */
CONFORM int conform_chunk(const conform_engine *e, int chunk, float *logits, uint64_t *state) {
    const conform_options plain = { .plain = 1 };
    int32_t ids[130];
    void *t = e->open(e->self, &plain);
    int is = t != NULL;
    conform_prompt(e, ids, 130);
    for (int i = 0; i < 130 && is; i += chunk) is = !e->append(t, ids + i, 130 - i < chunk ? 130 - i : chunk);
    is = is && !e->logits(t, logits);
    if (is) *state = e->state(t);
    if (t) e->close(t);
    return is;
}
CONFORM int conform_company(const conform_engine *e, int n) {
    const conform_options o = { .drafts = e->block };
    void *t[8], *alone[8];
    float a[CONFORM_VOCAB], b[CONFORM_VOCAB];
    int is = 1;
    conform_cycle c[8];
    for (int i = 0; i < n; i++) t[i] = conform_open(e, &o, 9 + 5 * i), alone[i] = conform_open(e, &o, 9 + 5 * i);
    for (int round = 0; round < 3; round++) {
        is &= !e->step(t, n, c);
        for (int i = 0; i < n; i++)
            is &= !e->step(&alone[i], 1, c) && !e->logits(t[i], a) && !e->logits(alone[i], b) &&
                  !memcmp(a, b, (size_t)e->vocab * sizeof *a) && e->state(t[i]) == e->state(alone[i]);
    }
    for (int i = 0; i < n; i++) e->close(t[i]), e->close(alone[i]);
    return is;
}
CONFORM int conform_row_bits(const conform_engine *e) {
    static const int chunks[] = { 2, 7, 64, 130 };
    float one[CONFORM_VOCAB], other[CONFORM_VOCAB];
    uint64_t state, other_state;
    int is = conform_chunk(e, 1, one, &state);
    for (int i = 0; i < 4; i++)
        is = is && conform_chunk(e, chunks[i], other, &other_state) && state == other_state &&
             !memcmp(one, other, (size_t)e->vocab * sizeof *one);
    return is && conform_company(e, 2) && conform_company(e, 5);
}

CONFORM int conform_golden(const conform_engine *e) {
    static float logits[CONFORM_BLOCK * CONFORM_VOCAB];
    const conform_options o = { .drafts = e->block };
    const int32_t *text, *draft;
    const float *expected;
    int n, i = 0;
    for (; e->golden(e->self, i, &text, &n, &draft, &expected); i++) {
        void *t = e->open(e->self, &o);
        int32_t mine[CONFORM_BLOCK];
        double off = 0, norm = 0;
        int is = t && !e->append(t, text, n) && !e->propose(t, mine, logits);
        if (t) e->close(t);
        for (int j = 0; is && j < e->block * e->vocab; j++)
            off += pow((double)logits[j] - (double)expected[j], 2), norm += pow((double)expected[j], 2);
        if (!is || memcmp(mine, draft, (size_t)e->block * sizeof *draft) || !(off <= 4e-10 * norm)) return 0;
    }
    return i > 0;
}

/* However the text came about, the drafter sees the whole of it. */
CONFORM uint64_t conform_proposal(const conform_engine *e, void *t) {
    static float logits[CONFORM_BLOCK * CONFORM_VOCAB];
    int32_t draft[CONFORM_BLOCK];
    uint64_t h = 1;
    if (e->propose(t, draft, logits)) return 0;
    for (int i = 0; i < e->block * e->vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof bits);
        h = (h ^ bits) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    }
    return h;
}
CONFORM int conform_restored(const conform_engine *e) {
    const conform_options o = { .drafts = e->block };
    int32_t ids[160];
    void *t[3] = { conform_open(e, &o, 150), conform_open(e, &o, 160), conform_open(e, &o, 120) };
    uint64_t h = t[0] ? conform_proposal(e, t[0]) : 0;
    int is = h != 0 && t[1] && t[2];
    void *restored = is ? e->restore(t[2]) : NULL;
    conform_prompt(e, ids, 160);
    is = is && !e->truncate(t[1], 40) && !e->append(t[1], ids + 40, 110) && conform_proposal(e, t[1]) == h;
    is = is && restored && conform_proposal(e, restored) == conform_proposal(e, t[2]) &&
         !e->append(restored, ids + 120, 30) && conform_proposal(e, restored) == h;
    for (int i = 0; i < 3; i++) if (t[i]) e->close(t[i]);
    if (restored) e->close(restored);
    return is;
}

/* A text that has reached its limit stays in the batch. */
CONFORM int conform_idle(const conform_engine *e) {
    const conform_options o = { .drafts = e->block, .limit = 2 }, more = { .drafts = e->block };
    uint64_t state[2];
    conform_cycle c[4];
    void *t[4];
    int is = 1;
    for (int i = 0; i < 4; i++) t[i] = conform_open(e, i % 2 ? &o : &more, 9 + 7 * i);
    for (int i = 0; i < 3; i++) is &= !e->step(t, 4, c);
    state[0] = e->state(t[1]), state[1] = e->state(t[3]);
    is &= c[1].status == CONFORM_FINISHED && c[3].status == CONFORM_FINISHED;
    for (int i = 0; i < 6; i++) is &= !e->step(t, 4, c) && c[0].n_tokens && !c[1].n_tokens && !c[3].n_tokens;
    is &= e->state(t[1]) == state[0] && e->state(t[3]) == state[1];
    for (int i = 0; i < 4; i++) e->close(t[i]);
    return is && !e->damaged(e->self);
}

/* Rows that depend on nothing before them: P(i accepted, then v) = prod_{j<i} sum min(p_j, q_j) x max(0, p_i - q_i)(v),
   and p_n(v) where all n are. */
enum { CONFORM_V = 3 };
CONFORM void conform_tiny(float *row) {
    float sum = 0;
    for (int v = 0; v < CONFORM_V; v++) sum += row[v] = (float)(conform_random() + .05);
    for (int v = 0; v < CONFORM_V; v++) row[v] /= sum;
}
CONFORM int conform_law(const conform_engine *e, int gamma) {
    enum { SAMPLES = 4000 };
    float p[8 * CONFORM_V], q[7 * CONFORM_V];
    double law[8 * CONFORM_V], reached = 1;
    int count[8 * CONFORM_V] = { 0 };
    for (int i = 0; i <= gamma; i++) {
        double stands = 0;
        conform_tiny(p + i * CONFORM_V);
        if (i < gamma) conform_tiny(q + i * CONFORM_V);
        for (int v = i * CONFORM_V; v < (i + 1) * CONFORM_V; v++) {
            law[v] = reached * (i < gamma ? fmax(0, (double)p[v] - (double)q[v]) : (double)p[v]);
            if (i < gamma) stands += fmin((double)p[v], (double)q[v]);
        }
        reached *= stands;
    }
    for (int s = 0; s < SAMPLES; s++) {
        int32_t draft[7], next;
        int accepted;
        for (int i = 0; i < gamma; i++) {
            double u = conform_random();
            for (draft[i] = 0; draft[i] < CONFORM_V - 1 && u >= (double)q[i * CONFORM_V + draft[i]]; draft[i]++)
                u -= (double)q[i * CONFORM_V + draft[i]];
        }
        if (e->decide(p, q, draft, gamma, CONFORM_V, (uint64_t)s, &accepted, &next)) return 0;
        if (accepted < 0 || accepted > gamma || next < 0 || next >= CONFORM_V) return 0;
        count[accepted * CONFORM_V + next]++;
    }
    return conform_fits(law, count, (gamma + 1) * CONFORM_V, SAMPLES);
}
CONFORM int conform_trace_oracle(const conform_engine *e) {
    int is = 1;
    for (int gamma = 1; gamma <= 7; gamma++) is &= conform_law(e, gamma);
    return is;
}

/* A text led along a line of tokens that are all different, so that every place can be named by its token. */
CONFORM int32_t conform_line(int at, int vocab) { return (int32_t)(2 + at * 7 % (vocab - 3)); }
CONFORM void conform_lead(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    (void)user, (void)prefix;
    logits[conform_line(n, vocab)] += 1e4f;
}
/* Cycles of the block, of `n` tokens in all before the end: made exactly those, counted them, and no more after it? */
CONFORM int conform_ends(const conform_engine *e, const conform_options *o, int n) {
    void *t = conform_open(e, o, CONFORM_PROMPT);
    int32_t tokens[64];
    int64_t counters[4] = { 0 };
    conform_cycle c;
    int is = t && conform_tell(e, t, tokens, 64) == n;
    for (int i = 0; is && i < n; i++) is = tokens[i] == conform_line(CONFORM_PROMPT + i, e->vocab);
    if (is) is = !e->step(&t, 1, &c) && c.status == CONFORM_FINISHED && !c.n_tokens, e->count(t, counters);
    if (t) e->close(t);
    return is && counters[3] == n;
}
CONFORM int conform_stops(const conform_engine *e) {
    conform_options o = { .drafts = e->block, .hook = conform_lead };
    int is = 1;
    for (int n = 1; n <= 2 * (e->block + 1); n++) {
        o.stop = conform_line(CONFORM_PROMPT + n - 1, e->vocab);
        is = is && conform_ends(e, &o, n);
    }
    return is;
}
CONFORM int conform_limits(const conform_engine *e) {
    conform_options o = { .drafts = e->block, .hook = conform_lead };
    int is = 1;
    for (o.limit = 1; o.limit <= 2 * (e->block + 1); o.limit++) is = is && conform_ends(e, &o, o.limit);
    return is;
}

/* The text of (prompt, seed): plain, under every cap and the engine's own schedule, alone and in batches. */
enum { CONFORM_TOKENS = 12 };
CONFORM int conform_batch_text(const conform_engine *e, const conform_options *o, int n, const int32_t *expected) {
    conform_options other = *o;
    int32_t tokens[8][CONFORM_TOKENS + CONFORM_BLOCK];
    int made[8] = { 0 }, is = 1;
    void *t[8];
    conform_cycle c[8];
    for (int i = 0; i < n; i++) t[i] = conform_open(e, i == n - 1 ? o : &other, CONFORM_PROMPT), other.seed += 17;
    while (is && made[n - 1] < CONFORM_TOKENS) {
        is = !e->step(t, n, c);
        for (int i = 0; i < n && is; i++)
            for (int j = 0; j < c[i].n_tokens; j++) if (made[i] < CONFORM_TOKENS) tokens[i][made[i]++] = c[i].tokens[j];
    }
    for (int i = 0; i < n; i++) e->close(t[i]);
    return is && !memcmp(tokens[n - 1], expected, CONFORM_TOKENS * sizeof *expected);
}
CONFORM int conform_seeds(const conform_engine *e) {
    conform_options o = { .seed = 0x123456789ABCDEF0u, .temperature = .8f, .top_p = .95f, .plain = 1 };
    int32_t plain[CONFORM_TOKENS], other[CONFORM_TOKENS];
    int is = conform_text(e, &o, plain, CONFORM_TOKENS) == CONFORM_TOKENS;
    o.seed ^= (uint64_t)1 << 63;
    is = is && conform_text(e, &o, other, CONFORM_TOKENS) == CONFORM_TOKENS && memcmp(plain, other, sizeof plain);
    o.seed ^= (uint64_t)1 << 63, o.plain = 0;
    for (o.drafts = 1; o.drafts <= e->block; o.drafts++) is = is && conform_batch_text(e, &o, 1 + o.drafts % 4, plain);
    o.drafts = 0, o.adaptive = 1;
    return is && conform_batch_text(e, &o, 1, plain) && conform_batch_text(e, &o, 7, plain);
}

/* The joint law of three tokens out of four, by rejection sampling, in batches of 1 to 8. */
static const int32_t conform_four[4] = { 5, 60, 171, 290 };
CONFORM void conform_only_four(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    float kept[4];
    (void)user, (void)prefix, (void)n;
    for (int i = 0; i < 4; i++) kept[i] = logits[conform_four[i]];
    for (int v = 0; v < vocab; v++) logits[v] = -INFINITY;
    for (int i = 0; i < 4; i++) logits[conform_four[i]] = .4f * kept[i];
}
CONFORM int conform_which(int32_t token) {
    for (int i = 0; i < 4; i++) if (conform_four[i] == token) return i;
    return -1;
}
/* p of the four after the text, by the sampler's definition. */
CONFORM int conform_four_p(const conform_engine *e, void *t, const conform_options *o, double p[4]) {
    float logits[CONFORM_VOCAB];
    double sum = 0;
    if (e->logits(t, logits)) return 0;
    for (int i = 0; i < 4; i++) sum += p[i] = exp(.4 * (double)logits[conform_four[i]] / (double)o->temperature);
    for (int i = 0; i < 4; i++) p[i] /= sum;
    if (o->top_p > 0) {
        double whole[4], kept = 0;
        memcpy(whole, p, sizeof whole);
        for (int i = 0; i < 4; i++) {
            double before = 0;
            for (int j = 0; j < 4; j++) before += whole[j] > whole[i] ? whole[j] : 0;
            kept += p[i] = before < (double)o->top_p ? whole[i] : 0;
        }
        for (int i = 0; i < 4; i++) p[i] /= kept;
    }
    return 1;
}
CONFORM int conform_exact_joint(const conform_engine *e, const conform_options *o, double law[64]) {
    double p[3][4];
    void *t = conform_open(e, o, CONFORM_PROMPT);
    int is = t && conform_four_p(e, t, o, p[0]);
    for (int i = 0; i < 16 && is; i++) {
        is = !e->append(t, &conform_four[i / 4], 1) && conform_four_p(e, t, o, p[1]) &&
             !e->append(t, &conform_four[i % 4], 1) && conform_four_p(e, t, o, p[2]) && !e->truncate(t, CONFORM_PROMPT);
        for (int c = 0; c < 4; c++) law[4 * i + c] = p[0][i / 4] * p[1][i % 4] * p[2][c];
    }
    if (t) e->close(t);
    return is;
}
/* Three tokens of each of n texts, which then are cut back; the cell of each, -1: not of the four. */
CONFORM int conform_threes(const conform_engine *e, void **t, int n, int cell[8]) {
    int32_t made[8][3 + CONFORM_BLOCK];
    int n_made[8] = { 0 }, left = n;
    while (left) {
        conform_cycle c[8];
        if (e->step(t, n, c)) return 0;
        left = 0;
        for (int i = 0; i < n; left += n_made[i++] < 3)
            for (int j = 0; j < c[i].n_tokens && n_made[i] < 3; j++) made[i][n_made[i]++] = c[i].tokens[j];
    }
    for (int i = 0; i < n; i++) {
        int x = conform_which(made[i][0]), y = conform_which(made[i][1]), z = conform_which(made[i][2]);
        cell[i] = x < 0 || y < 0 || z < 0 ? -1 : 16 * x + 4 * y + z;
        if (e->truncate(t[i], CONFORM_PROMPT)) return 0;
    }
    return 1;
}
CONFORM int conform_joint(const conform_engine *e, conform_options o) {
    enum { ROUNDS = 10 };
    double law[64];
    int count[64] = { 0 }, samples = 0, is;
    void *t[8];
    o.drafts = 2, o.rejection = 1, o.hook = conform_only_four;
    is = conform_exact_joint(e, &o, law);
    for (int i = 0; i < 8; i++) t[i] = conform_open(e, &o, CONFORM_PROMPT), o.seed++;
    for (int round = 0; round < ROUNDS && is; round++)
        for (int B = 1; B <= 8 && is; samples += B++) {
            int cell[8];
            is = conform_threes(e, t, B, cell);
            for (int i = 0; i < B && is; i++) is = cell[i] >= 0 && law[cell[i]] > 0, count[is ? cell[i] : 0]++;
        }
    for (int i = 0; i < 8; i++) e->close(t[i]);
    return is && conform_fits(law, count, 64, samples);
}
CONFORM int conform_samplers(const conform_engine *e) {
    const conform_options cold = { .temperature = .4f }, cut = { .temperature = 1, .top_p = .6f };
    return conform_joint(e, cut) && conform_joint(e, cold);
}

/* A row that nothing can be drawn from: refused there, with the tokens before it; never a token. */
CONFORM void conform_spoil(float *row, int n, int kind) {
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int v = 0; v < n; v++) if (kind == 2 || v == n / 2) row[v] = bad[kind];
}
typedef struct { int at, kind; } conform_poison;
CONFORM void conform_poisoned(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    const conform_poison *p = (const conform_poison *)user;
    conform_lead(NULL, prefix, n, logits, vocab);
    if (n == p->at) conform_spoil(logits, vocab, p->kind);
}
CONFORM int conform_bad_rows(const conform_engine *e) {
    const int32_t draft[2] = { 1, 2 };
    int is = 1;
    for (int kind = 0; kind < 3; kind++) {
        for (int side = 0; side < 2; side++) {      /* of target, of draft; -inf is no probability either */
            float p[9] = { .2f, .5f, .3f, .2f, .5f, .3f, .2f, .5f, .3f }, q[6] = { .3f, .3f, .4f, .3f, .3f, .4f };
            int accepted = -1;
            int32_t next = 5;
            conform_spoil(side ? q : p, CONFORM_V, kind);
            is &= e->decide(p, q, draft, 2, CONFORM_V, 1, &accepted, &next) != 0 && next < 0;
        }
        for (int at = 0; at < 3; at++) {
            conform_poison poison = { CONFORM_PROMPT + at, kind };
            conform_options o = { .drafts = e->block, .hook = conform_poisoned, .user = &poison };
            const conform_options sound = { .drafts = e->block };
            void *t[2] = { conform_open(e, &o, CONFORM_PROMPT), conform_open(e, &sound, CONFORM_PROMPT) };
            int made = 0;
            conform_cycle c[2] = { { 0 } };
            for (int i = 0; i < 4 && is && c[0].status != CONFORM_REFUSED; i++) {
                is = !e->step(t, 2, c) && !c[1].status && c[1].n_tokens > 0;
                for (int j = 0; j < c[0].n_tokens; j++, made++)
                    is &= c[0].tokens[j] == conform_line(CONFORM_PROMPT + made, e->vocab);
            }
            is &= c[0].status == CONFORM_REFUSED && made == at;
            e->close(t[0]), e->close(t[1]);
        }
    }
    return is;
}

/* Proposed, then truncated or closed, and an empty cycle: no draft proposed for another text is verified, and counters
   count what happened. */
CONFORM int conform_counts(const conform_engine *e, void *t, int64_t emitted) {
    int64_t c[4];
    e->count(t, c);
    return c[0] >= c[1] && c[1] >= c[2] && c[2] >= 0 && c[3] == emitted;
}
CONFORM int conform_aborted(const conform_engine *e) {
    const conform_options o = { .drafts = e->block };
    void *t = conform_open(e, &o, 40), *gone = conform_open(e, &o, 33), *straight = conform_open(e, &o, 30);
    int32_t draft[CONFORM_BLOCK];
    conform_cycle c, expected;
    int is = !e->propose(t, draft, NULL) && !e->propose(gone, draft, NULL) && conform_counts(e, t, 0);
    e->close(gone);
    is = is && !e->truncate(t, 30) && !e->step(&t, 1, &c) && !e->step(&straight, 1, &expected) &&
         c.n_drafted == expected.n_drafted && c.n_tokens == expected.n_tokens &&
         !memcmp(c.draft, expected.draft, (size_t)c.n_drafted * sizeof *c.draft) &&
         !memcmp(c.tokens, expected.tokens, (size_t)c.n_tokens * sizeof *c.tokens) &&
         e->state(t) == e->state(straight) && conform_counts(e, t, c.n_tokens);
    is = is && !e->verify(t, NULL, 0, &c) && c.n_tokens == 1 && !c.n_scheduled && !c.n_accepted;
    is = is && !e->truncate(t, 10) && !e->append(t, draft, 1) && !e->step(&t, 1, &c) && c.n_tokens > 0;
    e->close(t), e->close(straight);
    t = conform_open(e, &o, 30);
    is = is && conform_counts(e, t, 0);
    e->close(t);
    return is;
}

/* A hook that leads the text and bars what is even: the drafter, led too, is always right. */
CONFORM void conform_bar(void *user, const int32_t *prefix, int n, float *logits, int vocab) {
    (void)user, (void)prefix;
    for (int v = 0; v < vocab; v += 2) logits[v] = -INFINITY;
    logits[conform_line(n, vocab) | 1] += 1e4f;
}
CONFORM int conform_hooks(const conform_engine *e) {
    conform_options o = { .drafts = e->block, .hook = conform_bar };
    for (o.rejection = 0; o.rejection < 2; o.rejection++, o.temperature = 1) {
        void *t = conform_open(e, &o, CONFORM_PROMPT);
        conform_cycle c;
        int is = 1, made = 0;
        for (int round = 0; round < 2 && is; round++) {
            is = !e->step(&t, 1, &c) && c.n_accepted == e->block && c.n_tokens == e->block + 1;
            for (int j = 0; j < c.n_tokens; j++, made++)
                is &= c.tokens[j] == (conform_line(CONFORM_PROMPT + made, e->vocab) | 1);
        }
        e->close(t);
        if (!is) return 0;
    }
    return 1;
}

/* Two requests of five drafts; passes cost the same up to four rows, ten times as much from the fifth. And a cycle of
   the engine's own schedule, to which no profile is given. */
CONFORM int conform_trims(const conform_engine *e) {
    static const float confidence[10] = { .9f, .9f, .9f, .9f, .9f, .8f, .8f, .8f, .8f, .8f };
    const float stairs[12] = { 1000, 1000, 1000, 1000, 100, 100, 100, 100, 100, 100, 100, 100 };
    const conform_options o = { .adaptive = 1 };
    int lengths[2] = { 5, 5 };
    int32_t token;
    if (e->schedule(confidence, 2, 5, stairs, 12, 0, lengths) || lengths[0] + lengths[1] != 2) return 0;
    lengths[0] = lengths[1] = 0;
    if (!e->schedule(confidence, 2, 5, NULL, 0, 0, lengths) && lengths[0] + lengths[1] == 10) return 0;
    e->forget(e->self);
    return !e->measured(e->self) && conform_text(e, &o, &token, 1) == 1 && e->measured(e->self);
}

/* Staircases at random: the lengths are those that the largest tokens a second, over all counts, have. */
CONFORM void conform_best(const float *c, int n, int gamma, const float *sps, int n_sps, double draft_us,
                          int *lengths) {
    double best = 0, tau = n, survival[4] = { 1, 1, 1, 1 };
    int at[4] = { 0 };
    for (int rows = n;; rows++) {
        double us = rows <= n_sps ? 1e6 / (double)sps[rows - 1] : 1e6 * rows / (n_sps * (double)sps[n_sps - 1]);
        int r = -1;
        if (tau / (us + draft_us) > best)
            best = tau / (us + draft_us), memcpy(lengths, at, (size_t)n * sizeof *lengths);
        for (int i = 0; i < n; i++)
            if (at[i] < gamma && (r < 0 || survival[i] * (double)c[i * gamma + at[i]] >
                                               survival[r] * (double)c[r * gamma + at[r]])) r = i;
        if (r < 0) return;
        survival[r] *= (double)c[r * gamma + at[r]++], tau += survival[r];
    }
}
CONFORM int conform_global(const conform_engine *e) {
    for (int i = 0; i < 300; i++) {
        int n = 1 + i % 4, gamma = 1 + i % 7, lengths[4], expected[4];
        float c[28], sps[16], draft_us = (float)(i % 3 * 100), speed = 2000;
        for (int j = 0; j < n * gamma; j++) c[j] = (float)(.3 + .7 * conform_random());
        for (int j = 0; j < 16; j++) {
            if (j % 4 == 0) speed *= (float)(.4 + .6 * conform_random());
            sps[j] = speed;
        }
        conform_best(c, n, gamma, sps, 16, (double)draft_us, expected);
        if (e->schedule(c, n, gamma, sps, 16, draft_us, lengths)) return 0;
        if (memcmp(lengths, expected, (size_t)n * sizeof *lengths)) return 0;
    }
    return 1;
}

CONFORM int conform_block(const conform_engine *e) {
    conform_options o = { .drafts = e->block };
    void *t = conform_open(e, &o, CONFORM_PROMPT);
    char number[16];
    conform_cycle c;
    int is = t && !e->step(&t, 1, &c) && c.n_drafted == e->block && c.n_scheduled == e->block;
    if (t) e->close(t);
    o.drafts = e->block + 2;
    t = e->open(e->self, &o);
    if (t) return e->close(t), 0;
    snprintf(number, sizeof number, "%d", e->block);
    return is && strstr(e->why(), number) != NULL;
}

/* Headers that lie: lengths that wrap, dimensions whose product wraps, data beyond the file, unknown types, cut off. */
typedef struct { const char *find, *put; } conform_lie;
CONFORM int conform_refuses(const conform_engine *e, const char *header, size_t n, uint64_t stated) {
    return e->load(e->self, header, n, stated) && *e->why();
}
CONFORM int conform_refuses_lie(const conform_engine *e, const char *header, size_t n, const conform_lie *lie) {
    const char *at = strstr(header, lie->find);
    size_t before, put = strlen(lie->put), find = strlen(lie->find);
    char *text;
    int is;
    if (!at) return 1;      /* not of this format */
    before = (size_t)(at - header);
    if (!(text = (char *)malloc(n + put))) return 0;
    memcpy(text, header, before), memcpy(text + before, lie->put, put);
    memcpy(text + before + put, at + find, n - before - find);
    is = conform_refuses(e, text, n + put - find, n + put - find);
    free(text);
    return is;
}
CONFORM int conform_files(const conform_engine *e) {
    static const conform_lie lies[] = {
        { "\"shape\":[", "\"shape\":[4294967296,4294967296," }, { "\"shape\":[", "\"shape\":[-1," },
        { "\"shape\":[", "\"shape\":[0," }, { "\"data_offsets\":[", "\"data_offsets\":[18446744073709551615," },
        { "\"data_offsets\":[", "\"data_offsets\":[99999999999," }, { "\"dtype\":\"", "\"dtype\":\"X" },
        { "\"dtype\":\"", "\"dtype\":\"F64\",\"was\":\"" }, { "{\"", "{{\"" }, { ":", ":9e999," } };
    static const uint64_t lengths[] = { 0, 1, (uint64_t)1 << 40, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7 };
    size_t n;
    char *header = e->header(e->self, &n);
    int is = header && !e->load(e->self, header, n, n);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) is = is && conform_refuses_lie(e, header, n, &lies[i]);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) is = is && conform_refuses(e, header, n, lengths[i]);
    for (size_t cut = 16; cut < n; cut += n / 23 + 1) is = is && conform_refuses(e, header, n - cut, n - cut);
    free(header);
    return is;
}

/* In a child whose standard streams are a pipe: a checkpoint that is refused, a text, a refusal. */
CONFORM void conform_all_of_it(const conform_engine *e) {
    const conform_options o = { .drafts = e->block }, wrong = { .drafts = e->block + 2 };
    int32_t tokens[8];
    e->load(e->self, "{}", 2, (uint64_t)1 << 60), e->open(e->self, &wrong), conform_text(e, &o, tokens, 8);
}
CONFORM int conform_silent(const conform_engine *e) {
    int ends[2], status = -1, said;
    char byte;
    pid_t child;
    fflush(NULL);
    if (pipe(ends) || (child = fork()) < 0) return 0;
    if (!child) dup2(ends[1], 1), dup2(ends[1], 2), conform_all_of_it(e), fflush(NULL), _exit(42);
    close(ends[1]), said = read(ends[0], &byte, 1) != 0, close(ends[0]);
    waitpid(child, &status, 0);
    return !said && WIFEXITED(status) && WEXITSTATUS(status) == 42;
}

/* ---- the table */

#define CONFORM_ROWS(row) \
    row(rings, "every width 1..8, accepted count and start position leaves plain decoding's state " \
        "(S#34189, S#33872, S#33800)") \
    row(row_bits, "a row's bits do not depend on chunks or company (D#658, L#25618)") \
    row(golden, "draft logits are an independent implementation's, near and far (ik_llama.cpp#2296, V#41834)") \
    row(restored, "after truncate, append and restore the drafter sees the whole text (V#47930)") \
    row(idle, "an idle text writes nothing, and nothing is written out of bounds (V#56734)") \
    row(trace_oracle, "accepted counts and next tokens have the exact law, gamma 1..7 (openvino.genai#4190, V#9730)") \
    row(stops, "a stop token at every offset of a cycle ends the text there (S#33758, S#39826, V#56101)") \
    row(limits, "a limit at every offset of a cycle is kept (ferrox#311)") \
    row(seeds, "coupled: a seed has one text, with or without drafts, in any batch and schedule (V#6038, T#17599)") \
    row(samplers, "rejection: three tokens' joint law is exact with temperature and top-p (dflash#74, sparkring#161)") \
    row(bad_rows, "NaN, infinity or nothing at all in p or q: a refusal, never a token (V#53029, V#45060)") \
    row(aborted, "cut, closed, empty cycles leave no stale draft and no negative counter (V#28473, V#49620, V#31955)") \
    row(hooks, "a hook acts on drafts and target alike (V#48932, V#31955, S#31753)") \
    row(trims, "drafts stop before a step in the cost of passes; without a profile one is measured (S#35413)") \
    row(global, "where looking ahead is lossless the global maximum is taken (T#17056)") \
    row(block, "the block is the checkpoint's; more is refused, and the message has its size (V#41834)") \
    row(files, "headers that lie are refused (L#27203, L#18674, L#15711, L#24759, L#26690, L#19856)") \
    row(silent, "nothing is printed and the process lives (D#217)")

#define CONFORM_ENUM(name, claim) CONFORM_##name,
enum { CONFORM_ROWS(CONFORM_ENUM) CONFORM_N };
#define CONFORM_ENTRY(name, claim) { #name, claim, conform_##name },
static const struct { const char *name, *claim; int (*holds)(const conform_engine *); } conform_row[CONFORM_N] = {
    CONFORM_ROWS(CONFORM_ENTRY)
};
#endif
