/* The golden checkpoints (golden/README.md): target logits, taps, drafts and confidences of another,
   exact implementation, at its recommended tolerances, at every position it gives. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "near.h"
#include "tap.h"
#include "tensors.h"

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

typedef struct { double logits, main_hidden, draft_logits, confidence; int anchors, drafts; } worst;

/* Adds the session's errors at position p against row i. */
static void compare(dspark_session *s, const tensors *t, int i, int p, worst *w) {
    const dspark_config *c = dspark_model_config(s->model);
    int V = c->vocab_size, gamma = c->dspark_block_size, taps = c->n_taps * c->hidden_size;
    float *logits = (float *)tensors_get(t, "logits", NULL, NULL, NULL);
    float *hidden = (float *)tensors_get(t, "main_hidden", NULL, NULL, NULL);
    float *draft_logits = (float *)tensors_get(t, "draft_logits", NULL, NULL, NULL);
    float *confidence = (float *)tensors_get(t, "confidence_logits", NULL, NULL, NULL);
    int32_t *anchor = (int32_t *)tensors_get(t, "anchor", NULL, NULL, NULL);
    int32_t *drafts = (int32_t *)tensors_get(t, "draft_tokens", NULL, NULL, NULL);
    float *mine = (float *)malloc((size_t)(gamma * V) * sizeof *mine), confidences[DSPARK_MAX_BLOCK];
    int32_t tokens[DSPARK_MAX_BLOCK];
    const float *tap = ((dspark__state *)s->state)->taps + (size_t)(p % dspark__ring(c)) * (size_t)taps;
    w->logits = worse(w->logits, relative_l2(dspark_session_logits(s), logits + (size_t)(i * V), (size_t)V));
    w->main_hidden = worse(w->main_hidden, relative_l2(tap, hidden + (size_t)i * (size_t)taps, (size_t)taps));
    w->anchors += argmax(dspark_session_logits(s), V) == anchor[i];
    if (dspark_session_draft(s, anchor[i], tokens, confidences, mine) == DSPARK_OK) {
        w->draft_logits = worse(w->draft_logits, relative_l2(mine, draft_logits + (size_t)i * (size_t)(gamma * V),
                                                             (size_t)(gamma * V)));
        for (int k = 0; k < gamma; k++)
            w->confidence = worse(w->confidence, fabs((double)confidences[k] - confidence[i * gamma + k]));
        w->drafts += !memcmp(tokens, drafts + i * gamma, (size_t)gamma * sizeof *tokens);
    }
    free(logits), free(hidden), free(draft_logits), free(confidence), free(anchor), free(drafts), free(mine);
}

static void check_case(const char *dir) {
    char path[512];
    tensors t;
    worst w = { 0, 0, 0, 0, 0, 0 };
    dspark_model *m;
    dspark_session *s;
    dspark_session_desc desc;
    int64_t m_positions[4] = { 0 };
    snprintf(path, sizeof path, "%s/case.safetensors", dir);
    if (!ok(tensors_open(&t, path), "%s can be read", path)) return;
    if (!ok(dspark_model_open(&m, dir, NULL) == DSPARK_OK, "%s opens", dir)) {
        printf("# %s\n", dspark_last_error());
        return;
    }
    memset(&desc, 0, sizeof desc);
    desc.max_context = 304;
    int32_t *tokens = (int32_t *)tensors_get(&t, "tokens", NULL, NULL, NULL);
    int32_t *positions = (int32_t *)tensors_get(&t, "positions", NULL, m_positions, NULL);
    int n = (int)m_positions[0];
    ok(dspark_session_open(&s, m, &desc) == DSPARK_OK, "a session opens");
    for (int i = 0; i < n; i++) {
        int length = dspark_session_length(s);
        dspark_session_append(s, tokens + length, positions[i] + 1 - length);
        compare(s, &t, i, positions[i], &w);
    }
    printf("# %s: logits %.1e, main_hidden %.1e, draft logits %.1e, confidence %.1e\n", dir, w.logits, w.main_hidden,
           w.draft_logits, w.confidence);
    ok(w.logits < 2e-5, "%s: target logits within 2e-5 at all %d positions", dir, n);
    ok(w.main_hidden < 2e-5, "%s: taps within 2e-5", dir);
    ok(w.draft_logits < 2e-5, "%s: draft logits within 2e-5", dir);
    ok(w.confidence < 1e-4, "%s: confidence logits within 1e-4", dir);
    ok(w.anchors == n, "%s: %d anchors equal (of %d)", dir, w.anchors, n);
    ok(w.drafts == n, "%s: %d drafts equal (of %d)", dir, w.drafts, n);
    dspark_session_close(s);
    dspark_model_close(m);
    tensors_close(&t);
    free(tokens), free(positions);
}

/* What the tolerances here and in other tests rest on. */
static void check_nan(void) {
    int far = !(worse(worse(0, NAN), 1e-9) < 1) && !(worse(worse(0, 1e-9), NAN) < 1);
    for (int i = 0; i < 3; i++) {
        float x[3] = { 1, 2, 3 }, y[3] = { 1, 2, 3 };
        y[i] = NAN;
        far &= !(relative_l2(x, y, 3) < 1e9) && !(relative_l2(y, x, 3) < 1e9);
    }
    ok(far, "a NaN, in either of two arrays and whatever comes after it, is within no tolerance");
}

int main(void) {
    check_nan();
    check_case("tests/golden/a");
    check_case("tests/golden/b");
    return tap_done();
}
