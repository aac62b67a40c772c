// text [DIR [TEXTS [THREADS [DOCUMENTS]]]]: bits a byte of held-out documents (DOCUMENTS a domain, all if 0), as the
// engine computes them. The first token is given; of the others, up to the 512th, the log-probabilities are summed
// and divided by the bytes of text in their tokens (added tokens have none): tools/spark-tiny/measure.py's figure.
#include "bench.h"

enum { MOST = 512, ROWS = 64 };

// Nats of ids[1..n); logits of all rows, which the public part of the header does not give.
static double nats(dspark_model *m, const int32_t *ids, int n) {
    dspark_session_desc desc = plain_desc(n);
    dspark_session *s = session_open(m, &desc);
    int V = dspark_model_config(m)->vocab_size;
    double sum = 0;
    for (int p = 0; p < n - 1; p += ROWS) {
        int rows = dspark__min(ROWS, n - 1 - p);
        dspark_pass_result out;
        must(dspark__run_alone(s, ids + p, rows, p, 0, 0, &out));
        for (int r = 0; r < rows; r++) {
            const float *logits = out.logits + (size_t)r * (size_t)V;
            double most = (double)logits[0], all = 0;
            for (int v = 1; v < V; v++) most = fmax(most, (double)logits[v]);
            for (int v = 0; v < V; v++) all += exp((double)logits[v] - most);
            sum += most + log(all) - (double)logits[ids[p + r + 1]];
        }
    }
    dspark_session_close(s);
    return sum;
}

int main(int argc, char **argv) {
    const char *dir = argc > 1 ? argv[1] : "tools/spark-tiny/model", *file = argc > 2 ? argv[2] : "bench/heldout.jsonl";
    int threads = argc > 3 ? atoi(argv[3]) : 1, documents = argc > 4 ? atoi(argv[4]) : 0;
    dspark_model *m = model_open(dir, threads, NULL);
    const dspark_tokenizer *tokenizer = dspark_model_tokenizer(m);
    texts all = texts_read(m, file);
    double mean = 0;
    for (int d = 0; d < N_DOMAINS; d++) {
        double bits = 0, bytes = 0;
        char question[64];
        for (int i = 0, done = 0; i < all.n && (!documents || done < documents); i++) {
            const text *t = &all.t[i];
            int n = dspark__min(t->n, MOST), len;
            if (!t->is_document || strcmp(t->domain, domains[d]) || n < 2) continue;
            done++, bits += nats(m, t->ids, n) / log(2);
            for (int k = 1; k < n; k++)
                if (!(tokenizer->tokens[t->ids[k]].kind & DSPARK__TOKEN_ADDED))
                    dspark_token_bytes(tokenizer, t->ids[k], &len), bytes += len;
        }
        snprintf(question, sizeof question, "bits a byte %s", domains[d]);
        result_one(question, model_name(dir), threads, bits / bytes, "bits");
        mean += bits / bytes / N_DOMAINS;
    }
    result_one("bits a byte mean", model_name(dir), threads, mean, "bits");
    texts_free(&all), dspark_model_close(m);
}
