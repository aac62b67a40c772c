/* dspark_cuda.cu on random weights of a shape that the golden cases lack: more heads than a block takes (16, or 64 in a
   prompt's whole blocks); index heads that are no multiple of eight and wider than the others; many rows, where a block
   does all of a row's attention; and whole blocks of a prompt. */
#define _GNU_SOURCE
#include "sessions.h"
#include "near.h"
#include "tap.h"
#include "../tools/synth.h"

const dspark_backend *dspark_cuda_backend(void);

#ifdef DSPARK_CUDA_HOST
enum { TEXTS = 3 };         /* compared with the CPU's */
extern long cuda_host_products;
extern int cuda_host_sms;
void cuda_host_backwards(int on);
#else
enum { TEXTS = 12 };        /* a device rounds differently more often: it sums in other orders */
#endif
enum { N = 72, LENGTH = 24, CHOOSES = 20 };    /* tokens; of one text; where its index starts to choose */
_Static_assert((TEXTS - 1) * 4 + LENGTH <= N, "texts begin four tokens apart");

static dspark_model *open_on(const dspark_backend *backend) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = synth_map, desc.files.unmap = synth_unmap, desc.backend = backend;
    desc.max_rows = backend ? N : DSPARK_PROMPT_BLOCK;
    must(dspark_model_open(&m, ".", &desc));
    return m;
}
static dspark_session *open_plain(dspark_model *m) {
    dspark_session *s = open_session(m);
    set_plain(s, 1);
    return s;
}

/* A sum in another order may round a cached number differently, and with it all that follows in that text. So a quarter
   of the tokens whose index chooses must be near, and none far off. */
static void check_near(dspark_model *cpu, dspark_model *m, const int32_t *ids) {
    size_t V = (size_t)dspark_model_config(m)->vocab_size;
    double error[TEXTS * (LENGTH - CHOOSES)];
    int n = 0;
    for (int text = 0; text < TEXTS; text++) {
        dspark_session *s[2] = { open_plain(cpu), open_plain(m) };
        for (int k = 0; k < 2; k++) must(dspark_session_append(s[k], ids + text * 4, CHOOSES));
        for (int i = CHOOSES; i < LENGTH; i++) {
            for (int k = 0; k < 2; k++) must(dspark_session_append(s[k], ids + text * 4 + i, 1));
            error[n++] = relative_l2(dspark_session_logits(s[1]), dspark_session_logits(s[0]), V);
        }
        dspark_session_close(s[0]), dspark_session_close(s[1]);
    }
    sort_up(error, (size_t)n);
    ok(error[n / 4] < 1e-6 && error[n - 1] < .3, "72 heads, 12 of an index that chooses: the CPU's logits, a quarter "
       "of %d tokens within 1e-6 (%.1e), all within .3 (%.1e)", n, error[n / 4], error[n - 1]);
}

/* The last 30 tokens in chunks of `chunk`, all before them in one. */
static uint64_t in_chunks(dspark_model *m, const int32_t *ids, int chunk) {
    dspark_session *s = open_plain(m);
    uint64_t h;
    must(dspark_session_append(s, ids, chunk < N ? N - 30 : N));
    for (int at = s->n_tokens; at < N; at += chunk)
        must(dspark_session_append(s, ids + at, at + chunk < N ? chunk : N - at));
    h = logits_hash(s);
    dspark_session_close(s);
    return h;
}

/* The window of layer 0, whose rows depend on their own token alone: the first piece of a state. */
static float window[90 * 96];
static dspark_status first_piece(void *user, void *from, size_t n) {
    if (!*(int *)user) memcpy(window, from, n < sizeof window ? n : sizeof window);
    ++*(int *)user;
    return DSPARK_OK;
}
static void window_of(dspark_session *s, float *to) {
    int pieces = 0;
    memset(window, 0, sizeof window);
    must(s->model->backend->state_pieces(s->state, s->n_tokens, 0, first_piece, &pieces));
    memcpy(to, window, sizeof window);
}

/* cuBLASLt's sums keep 13 bits or so on a device; its twin on the host keeps all. */
#ifdef DSPARK_CUDA_HOST
#define LIBRARY_ERROR 1e-7
#else
#define LIBRARY_ERROR 1e-2
#endif
enum { BLOCK_ROWS = DSPARK_PROMPT_BLOCK, LAST = 24, VOCABULARY = 300 };
/* A session `left` rows before a block's end, as if it had run: its rings are empty. */
static dspark_session *open_after(dspark_model *m, const int32_t *ids, int left) {
    dspark_session_desc d = session_desc(BLOCK_ROWS);
    dspark_session *s = open_session_as(m, &d);
    memcpy(s->tokens, ids, (size_t)(BLOCK_ROWS - left) * sizeof *ids), s->n_tokens = s->n_run = BLOCK_ROWS - left;
    return s;
}
static dspark_model *open_fast(const dspark_backend *backend) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = synth_map, desc.files.unmap = synth_unmap, desc.backend = backend, desc.fast_prefill = 1;
    must(dspark_model_open(&m, ".", &desc));
    return m;
}
/* fast_prefill: cuBLASLt's products and the kernels of whole blocks. 72 heads are two of their blocks, a window of 80
   is two steps of keys. */
static void check_block(const dspark_backend *backend, dspark_model *cpu) {
    static int32_t ids[BLOCK_ROWS];
    static float usual[BLOCK_ROWS * VOCABULARY], logits[BLOCK_ROWS * VOCABULARY], by_library[COUNT(window)], by_kernels[COUNT(window)];
    static double error[BLOCK_ROWS];
    dspark_model *m;
    dspark_session *s, *last;
    dspark_pass_result out;
    double of_window;
    for (int i = 0; i < BLOCK_ROWS; i++) ids[i] = i * 7919 % VOCABULARY;
    s = open_after(cpu, ids, 0);
    must(dspark__run_alone(s, ids, BLOCK_ROWS, 0, 0, 0, &out));
    memcpy(usual, out.logits, sizeof usual), dspark_session_close(s);
    m = open_fast(backend), s = open_after(m, ids, 0), last = open_after(m, ids, LAST);
    must(dspark__run_alone(s, ids, BLOCK_ROWS, 0, 0, 0, &out));
#ifdef DSPARK_CUDA_HOST
    /* wkv, wo_b and the shared w1, w3, w2 of four layers; 136 (wq_a, wq_b) is no multiple of 16 */
    ok(cuda_host_products == 20, "a block of 512 runs its FP8 matrices by the library (%ld products)",
       cuda_host_products);
#endif
    memcpy(logits, out.logits, sizeof logits);
    for (size_t i = 0; i < BLOCK_ROWS; i++)
        error[i] = relative_l2(out.logits + i * VOCABULARY, usual + i * VOCABULARY, VOCABULARY);
    sort_up(error, BLOCK_ROWS);
    ok(error[BLOCK_ROWS / 2] < .12 && error[BLOCK_ROWS - 1] < 2,
       "its logits are the CPU's but for what bf16 leaves of queries and weights: median %.1e, least %.1e, most %.1e",
       error[BLOCK_ROWS / 2], error[0], error[BLOCK_ROWS - 1]);
    must(dspark_session_append(last, ids + BLOCK_ROWS - LAST, LAST));
    window_of(s, by_library), window_of(last, by_kernels);
    for (int i = 0; i < COUNT(window); i++) if (by_kernels[i] == 0) by_library[i] = 0;    /* rows of other positions */
    of_window = relative_l2(by_library, by_kernels, COUNT(window));
    ok(of_window < LIBRARY_ERROR, "and the rows of the first window those of the usual kernels (%.1e)", of_window);
    dspark_session_close(s), dspark_session_close(last), dspark_model_close(m);
#ifdef DSPARK_CUDA_HOST
    cuda_host_sms = 132, cuda_host_backwards(1);        /* an H100's: tiles of 64 rows, not 128 */
    m = open_fast(backend), s = open_after(m, ids, 0);
    must(dspark__run_alone(s, ids, BLOCK_ROWS, 0, 0, 0, &out));
    ok(!memcmp(logits, out.logits, sizeof logits), "with 132 SMs, not 3, threads in the opposite order and late copies "
       "its logits have the same bits");
    dspark_session_close(s), dspark_model_close(m);
    cuda_host_sms = 3, cuda_host_backwards(0);
#endif
}

/* Numbers that FP8 keeps in a window's ring; any codes in compressed rows and index keys, none of them NaN, with scales
   of 8: these count most; all else of a state zeros. */
typedef struct { size_t ring, codes[2], scales[2]; } pieces;
static dspark_status some_state(void *user, void *to, size_t n) {
    const pieces *of = (const pieces *)user;
    uint32_t dice = 1;
    memset(to, n == of->scales[0] || n == of->scales[1] ? 130 : 0, n);
    for (size_t i = 0; n == of->ring && i < n / sizeof(float); i++)
        dice = dice * 1664525 + 1013904223, ((float *)to)[i] = (float)(dice >> 28) / 8 - 1;
    for (size_t i = 0; (n == of->codes[0] || n == of->codes[1]) && i < n; i++)
        dice = dice * 1664525 + 1013904223, ((uint8_t *)to)[i] = (uint8_t)(dice >> 24 & 0xbf);
    return DSPARK_OK;
}
static dspark_session *open_deep(dspark_model *m, const int32_t *ids, int before, int after) {
    const dspark_config *c = dspark_model_config(m);
    size_t ring = (size_t)(c->sliding_window + c->dspark_block_size + 1), D = (size_t)c->head_dim,
           plain = D - (size_t)c->qk_rope_head_dim, I = (size_t)c->index_head_dim, groups = (size_t)before / 4;
    pieces of = { ring * D * sizeof(float), { groups * plain, groups * I / 2 },
                  { groups * ((plain + 63) / 64), groups * I / 32 } };
    dspark_session_desc d = session_desc(before + after);
    dspark_session *s = open_session_as(m, &d);
    for (int i = 0; i < before; i++) s->tokens[i] = ids[i % N];
    s->n_tokens = s->n_run = before;
    must(m->backend->state_pieces(s->state, before, 1, some_state, &of));
    return s;
}
/* 900 keys are more than 24 splits of a row take in one step each; the ring has wrapped; an index chooses among more
   keys than it keeps in shared memory. */
static void check_depth(const int32_t *ids) {
    enum { BEFORE = 20000, AFTER = 34, FIRST = 32 };     /* more than 32 rows have a block each */
    dspark_model *m[2];
    uint64_t hash[2];
    double worst = 0;
    if (!synth_set("sliding_window=900") || !synth_set("num_hidden_layers=3") || !synth_set("hidden_size=512")) return;
    m[0] = open_on(NULL), m[1] = open_on(dspark_cuda_backend());
    for (int whole = 0; whole < 2; whole++) {
        dspark_session *s[2];
        for (int k = 0; k < 2; k++) {
            s[k] = open_deep(m[k], ids, BEFORE, AFTER), set_plain(s[k], 1);
            for (int at = 0, n; at < AFTER; at += n)
                n = whole ? AFTER : at ? 1 : FIRST, must(dspark_session_append(s[k], ids + at, n));
        }
        hash[whole] = logits_hash(s[1]);
        worst = worse(worst, relative_l2(dspark_session_logits(s[1]), dspark_session_logits(s[0]), VOCABULARY));
        dspark_session_close(s[0]), dspark_session_close(s[1]);
    }
    ok(hash[0] == hash[1] && worst < .1, "at depth 20,000 rows alone have the bits of all together, and the CPU's "
       "logits (%.1e)", worst);
    dspark_model_close(m[0]), dspark_model_close(m[1]);
}

/* A block whose rows see a ring that has wrapped, its own rows and 70 keys of an index that chooses: 220, four steps.
   Heads of 128 dims go to wo_a straight from registers. Experts have some 170 rows each, two tiles of 128. */
static void check_deep_block(const int32_t *ids) {
    enum { BEFORE = 2 * BLOCK_ROWS };
    static double error[BLOCK_ROWS];
    static float logits[2][BLOCK_ROWS * VOCABULARY];
    static int32_t block[BLOCK_ROWS];
    dspark_model *m[2];
    dspark_pass_result out;
    if (!synth_set("sliding_window=150") || !synth_set("index_topk=70") || !synth_set("head_dim=128") ||
        !synth_set("n_routed_experts=6") || !synth_set("num_attention_heads=24")) return;
    for (int i = 0; i < BLOCK_ROWS; i++) block[i] = i * 7919 % VOCABULARY;
    m[0] = open_on(NULL), m[1] = open_fast(dspark_cuda_backend());
    for (int k = 0; k < 2; k++) {
        dspark_session *s = open_deep(m[k], ids, BEFORE, BLOCK_ROWS);
        must(dspark__run_alone(s, block, BLOCK_ROWS, 0, 0, 0, &out));
        memcpy(logits[k], out.logits, sizeof logits[k]), dspark_session_close(s);
    }
    for (size_t i = 0; i < BLOCK_ROWS; i++)
        error[i] = relative_l2(logits[1] + i * VOCABULARY, logits[0] + i * VOCABULARY, VOCABULARY);
    sort_up(error, BLOCK_ROWS);
    ok(error[BLOCK_ROWS / 2] < .12 && error[BLOCK_ROWS - 1] < 2,
       "at depth 1,024 a block's logits are the CPU's: median %.1e, least %.1e, most %.1e", error[BLOCK_ROWS / 2],
       error[0], error[BLOCK_ROWS - 1]);
#ifdef DSPARK_CUDA_HOST
    dspark_session *s = open_deep(m[1], ids, BEFORE, BLOCK_ROWS);
    cuda_host_backwards(1);
    must(dspark__run_alone(s, block, BLOCK_ROWS, 0, 0, 0, &out));
    cuda_host_backwards(0);
    ok(!memcmp(logits[1], out.logits, sizeof logits[1]), "and have the same bits in backwards mode");
    dspark_session_close(s);
#endif
    dspark_model_close(m[0]), dspark_model_close(m[1]);
}

int main(void) {
    const char *const shape[] = { "num_hidden_layers=4", "num_attention_heads=72", "o_groups=3", "o_lora_rank=96",
                                  "hidden_size=288", "vocab_size=300", "index_n_heads=12", "head_dim=96",
                                  "index_topk=4", "sliding_window=80", "moe_intermediate_size=160", "stages=1",
                                  "q_lora_rank=136", "num_experts_per_tok=2" };
    dspark_model *cpu, *m;
    int32_t ids[N];
    uint64_t h;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) if (!synth_set(shape[i])) return 1;
    for (int i = 0; i < N; i++) ids[i] = i * 7919 % 300;
    cpu = open_on(NULL), m = open_on(dspark_cuda_backend());
    check_near(cpu, m, ids);
    h = in_chunks(m, ids, N);
    ok(in_chunks(m, ids, 7) == h && in_chunks(m, ids, 30) == h,
       "and of %d tokens the last in chunks of 7 and of 30 leave the bits of one chunk", N);
    dspark_model_close(m);
    check_block(dspark_cuda_backend(), cpu);
    dspark_model_close(cpu);
    check_depth(ids), check_deep_block(ids);
    return sessions_done();
}
