// memory [DIR [THREADS]]: what a process keeps resident that reads a prompt of 512 tokens and answers with 64, against
// what the library states: the weights' files and dspark_session_bytes. The most that was resident (VmHWM), so where
// weights are mapped and only in part read it can be less.
#include "bench.h"

static double resident(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[256];
    double kB = 0;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %lf", &kB) == 1) break;
    if (f) fclose(f);
    return kB * 1024;
}

int main(int argc, char **argv) {
    enum { PROMPT = 512 };
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model";
    int threads = argc > 2 ? atoi(argv[2]) : 1;
    dspark_model *m = model_open(dir, threads, NULL);
    dspark_session_desc desc;
    dspark_session *s;
    dspark_step_result r;
    int32_t ids[PROMPT];
    size_t mapped, model = dspark_model_bytes(m, &mapped), session;
    memset(&desc, 0, sizeof desc);
    desc.max_context = 4096, desc.policy.quota = 64, desc.ignore_eos = 1;
    session = dspark_session_bytes(m, &desc);
    s = session_open(m, &desc);
    noise(m, ids, PROMPT, 1);
    must(dspark_session_append(s, ids, PROMPT));
    do must(dspark_step(&s, 1, NULL, &r)); while (!r.finish && !r.status);
    must(r.status);
    result_one("resident", model_name(dir), threads, 1e-6 * resident(), "MB");
    result_one("weights mapped", model_name(dir), threads, 1e-6 * (double)mapped, "MB");
    result_one("session bytes", model_name(dir), threads, 1e-6 * (double)session, "MB");
    result_one("model bytes", model_name(dir), threads, 1e-6 * (double)model, "MB");
    result_one("resident over weights and session", model_name(dir), threads,
               1e-6 * (resident() - (double)mapped - (double)session), "MB");
    dspark_session_close(s), dspark_model_close(m);
}
