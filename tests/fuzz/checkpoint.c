/* make fuzz-checkpoint: golden/a's header or config.json (the first byte says which) with bytes replaced; an edit is
   where (2 bytes), how many (1), by what. The weights stay. Reads the last bytes of what opens. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"

enum { CONFIG, MODEL, CAP = 1 << 23 };
static const char *const paths[] = { "tests/golden/a/config.json", "tests/golden/a/model.safetensors" };
static uint8_t golden[2][CAP], *served[2];
static uint64_t size[2], text[2];       /* bytes of a file, of its JSON and what stands before it */
static volatile unsigned sum;

static dspark_status map(void *user, const char *path, const void **data, uint64_t *n) {
    int i = strstr(path, "/config.json") ? CONFIG : MODEL;
    (void)user;
    if (i == MODEL && !strstr(path, "/model.safetensors")) return DSPARK_ERROR_IO;
    *data = served[i], *n = size[i];
    return DSPARK_OK;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    for (int i = 0; i < 2; i++) {
        FILE *f = fopen(paths[i], "rb");
        if (!f) return fprintf(stderr, "no %s here\n", paths[i]), exit(1), 0;
        size[i] = fread(golden[i], 1, CAP, f);
        text[i] = size[i];
        if (i == MODEL) memcpy(&text[i], golden[i], 8), text[i] += 8;
        served[i] = (uint8_t *)memcpy(malloc(size[i]), golden[i], size[i]);
        fclose(f);
    }
    return 0;
}

static void touch(const dspark_matrix *m) {
    size_t n = (size_t)m->rows * (size_t)m->cols, fp8 = m->dtype == DSPARK_FP8, fp4 = m->dtype == DSPARK_FP4;
    if (m->data) sum += ((const uint8_t *)m->data)[(m->dtype == DSPARK_F32 ? 4 * n : fp8 ? n : fp4 ? n / 2 : 2 * n) - 1];
    if (fp8) n = ((size_t)m->rows + 127) / 128 * (((size_t)m->cols + 127) / 128) * 32;
    if (m->scale) sum += m->scale[n / 32 - 1];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    dspark_model_desc desc;
    dspark__checkpoint ck;
    int edited = n ? *data & 1 : 0;
    for (int i = 0; i < 2; i++) memcpy(served[i], golden[i], text[i]);
    for (size_t at, count, i = 1; i + 3 < n; i += 3 + count) {
        at = (data[i] | (size_t)data[i + 1] << 8) % text[edited], count = data[i + 2] % 16u;
        for (size_t k = 0; k < count && i + 3 + k < n && at + k < text[edited]; k++)
            served[edited][at + k] = data[i + 3 + k];
    }
    memset(&desc, 0, sizeof desc);
    desc.files.map = map;
    if (dspark__checkpoint_open(&ck, "fuzz", &desc)) return 0;
    for (int l = 0; l < ck.config.num_hidden_layers + ck.config.n_stages; l++) {
        const dspark_layer *x = &ck.weights.layers[l];
        touch(&x->wq_a), touch(&x->wq_b), touch(&x->wkv), touch(&x->wo_a), touch(&x->wo_b), touch(&x->gate);
        touch(&x->compressor.wkv), touch(&x->compressor.wgate), touch(&x->index_wq_b), touch(&x->index_weights);
        for (int e = 0; e < ck.config.n_routed_experts; e++) touch(&x->experts[e].w1), touch(&x->experts[e].w2);
    }
    touch(&ck.weights.embed), touch(&ck.weights.head), touch(&ck.weights.main_proj), touch(&ck.weights.markov_w2);
    dspark__checkpoint_close(&ck);
    return 0;
}
