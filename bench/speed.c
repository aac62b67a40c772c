// speed DIR THREADS [N]: tokens a second at a depth of 256, plain decoding of N (32) tokens and prefill of 512, and how
// many times faster prefill is. As `llama-bench -d 256 -p 512 -n 32` measures; run.sh runs both in turn.
#include "bench.h"

enum { DEPTH = 256, PROMPT = 512, REPEATS = 3 };

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int threads = argc > 2 ? atoi(argv[2]) : 1, n = argc > 3 ? atoi(argv[3]) : 32;
    dspark_model *m = model_open(dir, threads, NULL);
    dspark_session_desc desc = plain_desc(DEPTH + PROMPT + n + 1);
    samples decode = { 0 }, prefill = { 0 }, ratio = { 0 };
    int32_t ids[DEPTH + PROMPT];
    dspark_session *s = session_open(m, &desc);
    noise(m, ids, DEPTH + PROMPT, 1);
    for (int i = 0; i <= REPEATS; i++) {        // the first waits for the disk
        dspark_step_result r;
        double start, prefilled, began;
        must(dspark_session_truncate(s, 0));
        must(dspark_session_append(s, ids, DEPTH));
        start = seconds();
        must(dspark_session_append(s, ids + DEPTH, PROMPT));
        prefilled = PROMPT / (seconds() - start);
        must(dspark_session_truncate(s, 0));
        must(dspark_session_append(s, ids, DEPTH));
        must(dspark_step(&s, 1, NULL, &r));     // the token from the prompt's logits, and one pass
        began = seconds();
        for (int k = 0; k < n; k++) must(dspark_step(&s, 1, NULL, &r));
        if (!i) continue;
        sample(&decode, n / (seconds() - began)), sample(&prefill, prefilled);
        sample(&ratio, prefilled / decode.x[decode.n - 1]);
    }
    result("decode", model_name(dir), threads, &decode, "tokens/s");
    result("prefill", model_name(dir), threads, &prefill, "tokens/s");
    result("prefill/decode", model_name(dir), threads, &ratio, "x");
    dspark_session_close(s), dspark_model_close(m);
    free(decode.x), free(prefill.x), free(ratio.x);
}
