/* One hash of logits and texts of a golden checkpoint, a line a path and number of threads: a prompt, its
   text with DSpark, its plain text. Every line must be the same with every path, number of threads,
   compiler and optimization level. */
#define DSPARK_STATIC
#define DSPARK_IMPLEMENTATION
#include "../dspark.h"

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n) {     // FNV-1a
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t hash_text(uint64_t hash, dspark_model *m, float temperature, int plain) {
    int32_t prompt[30];
    dspark_session_desc d;
    dspark_session *s;
    dspark_step_result r;
    memset(&d, 0, sizeof d), memset(&r, 0, sizeof r);
    for (int i = 0; i < 30; i++) prompt[i] = (7 * i * i + 3) % dspark_model_config(m)->vocab_size;
    d.max_context = 40, d.temperature = temperature, d.seed = 5, d.ignore_eos = 1;
    d.policy.plain = plain, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    if (dspark_session_open(&s, m, &d)) return 0;
    if (dspark_session_append(s, prompt, 30)) return 0;
    hash = hash_bytes(hash, dspark_session_logits(s), (size_t)dspark_model_config(m)->vocab_size * sizeof(float));
    while (!r.finish && !r.status) dspark_step(&s, 1, NULL, &r);
    hash = hash_bytes(hash, dspark_session_tokens(s), (size_t)dspark_session_length(s) * sizeof(int32_t));
    dspark_session_close(s);
    return hash;
}

int main(void) {
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++)
        for (int threads = 1; threads <= 2; threads++) {
            dspark_model_desc d;
            dspark_model *m;
            uint64_t hash = 0xcbf29ce484222325u;
            memset(&d, 0, sizeof d);
            d.cpu_path = path, d.n_threads = threads;
            if (dspark_model_open(&m, "tests/golden/b", &d)) continue;
            hash = hash_text(hash_text(hash, m, 1, 0), m, 1, 1);
            printf("%016llx %s, %d threads\n", (unsigned long long)hash, dspark_model_path_name(m), threads);
            dspark_model_close(m);
        }
    return 0;
}
