/* dspark_cuda.cu, built for the host (cuda_host.h) or for a device: the golden cases at their tolerances, and the same
   text whatever shares a pass. */
#include "sessions.h"
static double relative_l2(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (norm > 0 ? norm : 1));
}
static dspark_model *open_on_device(const char *dir, int max_rows) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.backend = dspark_cuda_backend(), desc.max_rows = max_rows;
    must(dspark_model_open(&m, dir, &desc));
    return m;
}

typedef struct { double logits, draft_logits, confidence; int drafts; } worst;

/* What was measured at position p against row i of the case. */
static void compare(dspark_session *s, const tensors *t, int i, worst *w) {
    const dspark_config *c = dspark_model_config(s->model);
    int V = c->vocab_size, gamma = c->dspark_block_size;
    float *logits = (float *)must_have(tensors_get(t, "logits", NULL, NULL, NULL));
    float *draft_logits = (float *)must_have(tensors_get(t, "draft_logits", NULL, NULL, NULL));
    float *confidence = (float *)must_have(tensors_get(t, "confidence_logits", NULL, NULL, NULL));
    int32_t *anchor = (int32_t *)must_have(tensors_get(t, "anchor", NULL, NULL, NULL));
    int32_t *drafts = (int32_t *)must_have(tensors_get(t, "draft_tokens", NULL, NULL, NULL));
    float *mine = (float *)must_have(malloc((size_t)(gamma * V) * sizeof *mine)), confidences[DSPARK_MAX_BLOCK];
    int32_t tokens[DSPARK_MAX_BLOCK];
    w->logits = fmax(w->logits, relative_l2(dspark_session_logits(s), logits + (size_t)(i * V), (size_t)V));
    must(dspark_session_draft(s, anchor[i], tokens, confidences, mine));
    w->draft_logits = fmax(w->draft_logits, relative_l2(mine, draft_logits + (size_t)i * (size_t)(gamma * V), (size_t)(gamma * V)));
    for (int k = 0; k < gamma; k++)
        w->confidence = fmax(w->confidence, fabs((double)confidences[k] - (double)confidence[i * gamma + k]));
    w->drafts += !memcmp(tokens, drafts + i * gamma, (size_t)gamma * sizeof *tokens);
    free(logits), free(draft_logits), free(confidence), free(anchor), free(drafts), free(mine);
}

static void check_golden(const char *dir) {
    char path[512];
    tensors t;
    worst w = { 0, 0, 0, 0 };
    dspark_model *m = open_on_device(dir, 0);
    dspark_session *s = open_session(m);
    int64_t m_positions[4] = { 0 };
    int32_t *tokens = golden_text(dir), *positions;
    snprintf(path, sizeof path, "%s/case.safetensors", dir);
    if (!tensors_open(&t, path)) bail("cannot be read", path);
    positions = (int32_t *)must_have(tensors_get(&t, "positions", NULL, m_positions, NULL));
    for (int i = 0; i < m_positions[0]; i++) {
        int length = dspark_session_length(s);
        must(dspark_session_append(s, tokens + length, positions[i] + 1 - length));
        compare(s, &t, i, &w);
        if (getenv("V")) printf("# %d: %g %g %g\n", positions[i], w.logits, w.draft_logits, w.confidence);
    }
    ok(w.logits < 2e-5, "%s: target logits within 2e-5 at all %d positions (%.1e)", dir, (int)m_positions[0], w.logits);
    ok(w.draft_logits < 2e-5, "%s: draft logits within 2e-5 (%.1e)", dir, w.draft_logits);
    ok(w.confidence < 1e-4, "%s: confidence logits within 1e-4 (%.1e)", dir, w.confidence);
    ok(w.drafts == m_positions[0], "%s: %d drafts equal (of %d)", dir, w.drafts, (int)m_positions[0]);
    dspark_session_close(s), dspark_model_close(m), tensors_close(&t);
    free(tokens), free(positions);
}

int main(void) {
    check_golden(golden_a);
    check_golden(golden_b);
    return sessions_done();
}
