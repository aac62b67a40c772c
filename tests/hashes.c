/* hashes kernels: for each path of this machine a line with the hash of the kernels' outputs on fixed inputs; with -v
   also a line for each case. hashes model: for each path and number of threads the hash of golden b's logits and
   texts. Each part has one hash on all paths, numbers of threads, compilers and optimization levels. */
#define DSPARK_STATIC
#define DSPARK_IMPLEMENTATION
#include "../dspark.h"
#include "kernels_cases.h"

static void hash_kernels(int verbose) {
    static kernel_case cases[MAX_KERNEL_CASES];
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++) {
        const dspark__kernels *k = dspark__kernels_choose(path);
        uint64_t hash = HASH_START;
        int n = k ? kernel_cases(k, cases) : 0;
        for (int i = 0; i < n; i++) {
            for (int b = 0; b < 64; b += 8) hash = (hash ^ (cases[i].hash >> b & 255)) * 0x100000001b3u;
            if (verbose) printf("%016llx %s\n", (unsigned long long)cases[i].hash, cases[i].name);
        }
        if (n) printf("%016llx %s\n", (unsigned long long)hash, k->name);
    }
}

static uint64_t hash_text(uint64_t hash, dspark_model *m, int plain) {
    int32_t prompt[30];
    int V = dspark_model_config(m)->vocab_size;
    dspark_session_desc d;
    dspark_session *s;
    dspark_step_result r;
    memset(&d, 0, sizeof d), memset(&r, 0, sizeof r);
    for (int i = 0; i < 30; i++) prompt[i] = (7 * i * i + 3) % V;
    d.max_context = 40, d.temperature = 1, d.seed = 5, d.ignore_eos = 1;
    d.policy.plain = plain, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    if (dspark_session_open(&s, m, &d)) return 0;
    if (dspark_session_append(s, prompt, 30)) return 0;
    hash = hash_bytes(hash, (const uint8_t *)dspark_session_logits(s), V * (int)sizeof(float));
    while (!r.finish && !r.status) dspark_step(&s, 1, NULL, &r);
    hash = hash_bytes(hash, (const uint8_t *)dspark_session_tokens(s), dspark_session_length(s) * (int)sizeof(int32_t));
    dspark_session_close(s);
    return hash;
}
static void hash_model(void) {
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++)
        for (int threads = 1; threads <= 2; threads++) {
            dspark_model_desc d;
            dspark_model *m;
            memset(&d, 0, sizeof d);
            d.cpu_path = path, d.n_threads = threads;
            if (dspark_model_open(&m, "tests/golden/b", &d)) continue;
            printf("%016llx %s, %d threads\n", (unsigned long long)hash_text(hash_text(HASH_START, m, 0), m, 1),
                   dspark_model_path_name(m), threads);
            dspark_model_close(m);
        }
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "model")) hash_model();
    else hash_kernels(argc > 2 && !strcmp(argv[2], "-v"));
    return 0;
}
