/* dspark_cuda.cu on a shape of random weights that the golden cases do not have: more than 16 heads, of which a block
   has 16, index heads that are no whole eights and wider than the others, and rows of many, of which a block has all of
   an attention. */
#define _GNU_SOURCE
#include "sessions.h"
#include "near.h"
#include "tap.h"
#include "../tools/synth.h"

const dspark_backend *dspark_cuda_backend(void);

#ifdef DSPARK_CUDA_HOST
enum { TEXTS = 3 };         /* compared with the CPU's */
#else
enum { TEXTS = 12 };        /* a device rounds otherwise more often: its sums have other orders */
#endif
enum { N = 150, LENGTH = 24, CHOOSES = 20 };    /* tokens, of such a text, and from where on its index has to choose */

static dspark_model *open_on(const dspark_backend *backend) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = synth_map, desc.files.unmap = synth_unmap, desc.backend = backend, desc.max_rows = N;
    must(dspark_model_open(&m, ".", &desc));
    return m;
}
static dspark_session *open_plain(dspark_model *m) {
    dspark_session *s = open_session(m);
    set_plain(s, 1);
    return s;
}

/* A sum in another order may round a number of the caches otherwise, and all that follows in that text with it: so of
   all tokens that have a choice a quarter is near, and none is another's. */
static void check_near(dspark_model *cpu, dspark_model *m, const int32_t *ids) {
    size_t V = (size_t)dspark_model_config(m)->vocab_size;
    double error[TEXTS * (LENGTH - CHOOSES)];
    int n = 0;
    for (int text = 0; text < TEXTS; text++) {
        dspark_session *s[2] = { open_plain(cpu), open_plain(m) };
        for (int k = 0; k < 2; k++) must(dspark_session_append(s[k], ids + text * 10, CHOOSES));
        for (int i = CHOOSES; i < LENGTH; i++) {
            for (int k = 0; k < 2; k++) must(dspark_session_append(s[k], ids + text * 10 + i, 1));
            error[n++] = relative_l2(dspark_session_logits(s[1]), dspark_session_logits(s[0]), V);
        }
        dspark_session_close(s[0]), dspark_session_close(s[1]);
    }
    sort_up(error, (size_t)n);
    ok(error[n / 4] < 1e-6 && error[n - 1] < .3, "24 heads, 12 of an index that chooses: the CPU's logits, a quarter "
       "of %d tokens within 1e-6 (%.1e), all within .3 (%.1e)", n, error[n / 4], error[n - 1]);
}

static uint64_t in_chunks(dspark_model *m, const int32_t *ids, int chunk) {
    dspark_session *s = open_plain(m);
    uint64_t h;
    for (int at = 0; at < N; at += chunk) must(dspark_session_append(s, ids + at, at + chunk < N ? chunk : N - at));
    h = logits_hash(s);
    dspark_session_close(s);
    return h;
}

int main(void) {
    const char *const shape[] = { "num_hidden_layers=4", "num_attention_heads=24", "o_groups=3", "o_lora_rank=96",
                                  "hidden_size=288", "vocab_size=300", "index_n_heads=12", "head_dim=96",
                                  "index_topk=4", "sliding_window=32", "moe_intermediate_size=160", "stages=1",
                                  "q_lora_rank=136" };
    dspark_model *cpu, *m;
    int32_t ids[N];
    uint64_t h;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) if (!synth_set(shape[i])) return 1;
    for (int i = 0; i < N; i++) ids[i] = i * 7919 % 300;
    cpu = open_on(NULL), m = open_on(dspark_cuda_backend());
    check_near(cpu, m, ids);
    h = in_chunks(m, ids, N);
    ok(in_chunks(m, ids, 7) == h && in_chunks(m, ids, 30) == h,
       "and %d tokens in chunks of 7 and of 30 leave the bits of one chunk", N);
    dspark_model_close(cpu), dspark_model_close(m);
    return sessions_done();
}
