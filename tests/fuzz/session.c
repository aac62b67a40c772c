/* make fuzz-session: a session's file, of which only the record and tokens, or a profile (the first byte says which),
   with bytes replaced; an edit is where (2 bytes), how many (1), by what. What is restored takes three steps, is saved and
   restored once more; steps follow what is loaded, too. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"

enum { SESSION, PROFILE, CAP = 1 << 20 };
static char path[2][64];
static uint8_t whole[2][CAP];
static size_t size[2];
static dspark_model *model;
static dspark_session *session;

static void must(int good) {
    if (!good) fprintf(stderr, "%s\n", dspark_last_error()), abort();
}
static void put(int i, const uint8_t *bytes) {
    FILE *f = fopen(path[i], "wb");
    must(f && fwrite(bytes, 1, size[i], f) == size[i] && !fclose(f));
}

static void sweep(void) { remove(path[SESSION]), remove(path[PROFILE]); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    static const int32_t ids[20] = { 0, 5, 9, 40, 41, 42, 5, 9, 40, 41, 42, 5, 9, 40, 41, 42, 5, 9, 40, 41 };
    dspark_model_desc desc;
    dspark_session_desc d;
    dspark_step_result r;
    (void)argc, (void)argv;
    memset(&desc, 0, sizeof desc), memset(&d, 0, sizeof d);
    desc.n_threads = 1, d.max_context = 48, d.policy.schedule = DSPARK_SCHEDULE_BLOCK;
    must(!dspark_model_open(&model, "tests/golden/b", &desc) && !dspark_session_open(&session, model, &d));
    must(!dspark_session_append(session, ids, 20) && !dspark_step(&session, 1, NULL, &r));
    for (int i = 0; i < 2; i++) snprintf(path[i], sizeof path[i], "build/fuzz/session.%d.%d", (int)getpid(), i);
    atexit(sweep);
    must(!dspark_session_save(session, path[SESSION]) && !dspark_model_save_profile(model, path[PROFILE]));
    for (int i = 0; i < 2; i++) {
        FILE *f = fopen(path[i], "rb");
        must(f && (size[i] = fread(whole[i], 1, CAP, f)) < CAP && !fclose(f));
    }
    return 0;
}

static void steps(dspark_session *s, int n) {
    dspark_step_result r;
    while (n-- && !dspark_step(&s, 1, NULL, &r) && !r.status && !r.finish) continue;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static uint8_t edited[CAP];
    int file = n ? *data & 1 : SESSION;
    dspark_session *s, *again;
    memcpy(edited, whole[file], size[file]);
    for (size_t at, count, i = 1; i + 3 < n; i += 3 + count) {
        size_t room = file == SESSION ? sizeof(dspark__session_record) + 80 : size[file];
        at = (data[i] | (size_t)data[i + 1] << 8) % room, count = data[i + 2] % 16u;
        for (size_t k = 0; k < count && i + 3 + k < n && at + k < room; k++) edited[at + k] = data[i + 3 + k];
    }
    put(file, edited);
    if (file == PROFILE) {
        if (dspark_model_load_profile(model, path[PROFILE])) return 0;
        must(!dspark_session_truncate(session, 20));
        dspark_policy fastest = session->desc.policy;
        fastest.schedule = 0;
        must(!dspark_session_set_policy(session, &fastest));
        steps(session, 3);
        return 0;
    }
    if (dspark_session_restore(&s, model, path[SESSION], NULL)) return 0;
    steps(s, 3);
    must(!dspark_session_save(s, path[SESSION]));
    if (!dspark_session_restore(&again, model, path[SESSION], NULL)) steps(again, 1), dspark_session_close(again);
    dspark_session_close(s);
    return 0;
}
