/* Any bytes as JSON; what is taken is walked and read in every way. See `make fuzz`. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The nodes of a subtree by its children must be those by its next. */
static void walk(const dspark__json *j, int node) {
    int kind = dspark__json_kind(j, node), n = 0, list = kind >= DSPARK__JSON_ARRAY;
    int64_t integer;
    double real;
    size_t len;
    const char *s = dspark__json_string(j, node, &len);
    if (!!s != (kind == DSPARK__JSON_STRING) || (s && s[len])) abort();
    if (dspark__json_integer(j, node, &integer) && !dspark__json_real(j, node, &real)) abort();
    if (dspark__json_real(j, node, &real) && !(real - real == 0)) abort();
    if (dspark__json_find(j, node, "key") >= 0 && kind != DSPARK__JSON_OBJECT) abort();
    for (int i = node + 1; list && i < dspark__json_next(j, node); i = dspark__json_next(j, i), n++) walk(j, i);
    if (list && n != j->nodes[node].n * (kind == DSPARK__JSON_OBJECT ? 2 : 1)) abort();
    if (!list && dspark__json_next(j, node) != node + 1) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    dspark__json j;
    if (dspark__json_parse(&j, "fuzz", (const char *)data, size)) return 0;
    walk(&j, 0);
    if (dspark__json_next(&j, 0) != j.n) abort();
    dspark__json_free(&j);
    return 0;
}
