/* The tensors of a small safetensors file, for tests: F32 and I32 by name. The file stays in memory. */
#ifndef TENSORS_H
#define TENSORS_H

typedef struct {
    char *bytes;
    size_t size, data;
    dspark__json json;
} tensors;

static int tensors_open(tensors *t, const char *path) {
    uint64_t length;
    FILE *f = fopen(path, "rb");
    memset(t, 0, sizeof *t);
    if (!f) return 0;
    fseek(f, 0, SEEK_END);
    t->size = (size_t)ftell(f);
    rewind(f);
    t->bytes = (char *)malloc(t->size);
    if (fread(t->bytes, 1, t->size, f) != t->size) t->size = 0;
    fclose(f);
    if (t->size < 8) return 0;
    memcpy(&length, t->bytes, 8);
    t->data = 8 + (size_t)length;
    return dspark__json_parse(&t->json, path, t->bytes + 8, (size_t)length) == DSPARK_OK;
}

static void tensors_close(tensors *t) {
    dspark__json_free(&t->json);
    free(t->bytes);
}

/* The data of a tensor (aligned copy, caller frees) and its shape; NULL if there is none. */
static void *tensors_get(const tensors *t, const char *name, int *n_dims, int64_t shape[4], size_t *bytes) {
    int node = dspark__json_find(&t->json, 0, name), dims, ends;
    int64_t begin, end;
    void *copy;
    if (node < 0) return NULL;
    dims = dspark__json_find(&t->json, node, "shape");
    ends = dspark__json_find(&t->json, node, "data_offsets");
    dspark__json_integer(&t->json, ends + 1, &begin);
    dspark__json_integer(&t->json, ends + 2, &end);
    if (n_dims) *n_dims = t->json.nodes[dims].n;
    for (int i = 0; shape && i < t->json.nodes[dims].n && i < 4; i++) dspark__json_integer(&t->json, dims + 1 + i, &shape[i]);
    if (bytes) *bytes = (size_t)(end - begin);
    copy = malloc((size_t)(end - begin) + 1);
    return memcpy(copy, t->bytes + t->data + begin, (size_t)(end - begin));
}
#endif
