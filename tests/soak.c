/* soak [DIR [REQUESTS [THREADS]]]: 10,000 requests of mixed lengths, up to 256 at once, cancellations among them, TAP.
   Each text is held against the one that its request has alone. A program of `make soak`: spark-tiny takes
   three to six minutes on two cores. */
#include "crowd.h"

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : spark_tiny;
    dspark_model *m;
    dspark_model_desc desc;
    crowd c;
    memset(&c, 0, sizeof c), memset(&desc, 0, sizeof desc);
    c.n_requests = argc > 2 ? atoi(argv[2]) : 10000, c.most = CROWD_MOST;
    desc.max_sessions = CROWD_MOST, desc.n_threads = argc > 3 ? atoi(argv[3]) : 0;
    must(dspark_model_open(&m, dir, &desc));
    run_crowd(m, &c);
    printf("# %d requests, %d of them cancelled, %lld steps, %lld drafts accepted\n", c.done, c.cancelled,
           (long long)c.steps, (long long)c.accepted);
    ok(c.done == c.n_requests && !c.wrong, "%d of %d texts are those of plain decoding alone", c.done - c.wrong,
       c.done);
    dspark_model_close(m);
    return sessions_done();
}
