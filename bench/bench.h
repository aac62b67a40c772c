// What the drivers of bench/ share. A driver prints lines of CSV, one a result:
//     question,model,threads,value,low,high,unit,samples
// value is a median, low and high the quartiles. run.sh makes the table of them.
#ifndef BENCH_H
#define BENCH_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define DSPARK_IMPLEMENTATION
#ifndef DSPARK_CUDA      // whose object needs the header's functions
#define DSPARK_STATIC
#endif
#include "dspark.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SHARED static __attribute__((unused))

SHARED void die(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}
#define must(call) ((call) == DSPARK_OK ? (void)0 : die(#call, dspark_last_error()))

SHARED void *need(size_t n, size_t size) {
    void *p = calloc(n + 1, size);
    if (!p) die("bench", "out of memory");
    return p;
}

SHARED double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- samples and results

typedef struct { double *x; int n, cap; } samples;

SHARED void sample(samples *s, double x) {
    if (s->n == s->cap) s->x = (double *)realloc(s->x, (size_t)(s->cap = 2 * s->cap + 16) * sizeof *s->x);
    if (!s->x) die("bench", "out of memory");
    s->x[s->n++] = x;
}

SHARED int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Sorts; p .5 is the median.
SHARED double quantile(samples *s, double p) {
    double at = p * (s->n - 1);
    int i = (int)at;
    if (!s->n) return 0;
    qsort(s->x, (size_t)s->n, sizeof *s->x, by_value);
    return i + 1 < s->n ? s->x[i] + (at - i) * (s->x[i + 1] - s->x[i]) : s->x[i];
}

SHARED const char *model_name(const char *dir) {
    const char *slash = strrchr(dir, '/');
    return slash && !strcmp(slash, "/model") ? "spark-tiny" : slash ? slash + 1 : dir;
}

SHARED void result(const char *question, const char *model, int threads, samples *s, const char *unit) {
    printf("%s,%s,%d,%.5g,%.5g,%.5g,%s,%d\n", question, model, threads, quantile(s, .5), quantile(s, .25),
           quantile(s, .75), unit, s->n);
    fflush(stdout);
}

SHARED void result_one(const char *question, const char *model, int threads, double value, const char *unit) {
    printf("%s,%s,%d,%.5g,,,%s,1\n", question, model, threads, value, unit);
    fflush(stdout);
}

// ---- models and sessions

SHARED dspark_model *model_open(const char *dir, int threads, const dspark_backend *backend) {
    dspark_model *m;
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = threads, desc.backend = backend;
    must(dspark_model_open(&m, dir, &desc));
    return m;
}

SHARED dspark_session_desc plain_desc(int max_context) {
    dspark_session_desc d;
    memset(&d, 0, sizeof d);
    d.max_context = max_context, d.policy.plain = 1, d.ignore_eos = 1;
    return d;
}

SHARED dspark_session *session_open(dspark_model *m, const dspark_session_desc *desc) {
    dspark_session *s;
    must(dspark_session_open(&s, m, desc));
    return s;
}

// Tokens of no text, the same in every run.
SHARED void noise(const dspark_model *m, int32_t *ids, int n, uint64_t seed) {
    int V = dspark_model_config(m)->vocab_size;
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(dspark_uniform(seed, 0, (uint64_t)i, 0, 0) * (V - 4)) + 2;
}

// ---- held-out text: bench/heldout.jsonl, a line {"domain", "source", and "prompt" with "chat", or "document"}

typedef struct { char *domain; int32_t *ids; int n, is_document; } text;
typedef struct { text *t; int n; } texts;
enum { N_DOMAINS = 4 };
static const char *const domains[N_DOMAINS] = { "math", "code", "chat", "story" };

SHARED unsigned hex4(const char *p) {
    char digits[5] = { p[0], p[1], p[2], p[3], 0 };
    return (unsigned)strtoul(digits, NULL, 16);
}

// The string of a key in a line of JSON, unescaped; NULL: the line has no such key. It is the caller's.
SHARED char *json_field(const char *line, const char *key) {
    char name[32], *out, *to;
    const char *p;
    snprintf(name, sizeof name, "\"%s\": \"", key);
    p = strstr(line, name);
    if (!p) return NULL;
    p += strlen(name), out = to = (char *)need(strlen(p), 1);
    for (; *p && *p != '"'; p++) {
        const char *escapes = "n\nt\tr\rb\bf\f", *e;
        if (*p != '\\') *to++ = *p;
        else if (*++p == 'u') *to++ = (char)hex4(p + 1), p += 4;       // the file escapes only what is below space
        else if ((e = strchr(escapes, *p)) != NULL && (e - escapes) % 2 == 0) *to++ = e[1];
        else *to++ = *p;
    }
    return out;
}

SHARED void encode(const dspark_model *m, text *t, const char *string, int chat) {
    const dspark_tokenizer *tokenizer = dspark_model_tokenizer(m);
    const dspark_message said = { "user", string, NULL, 0 };
    int most = (int)strlen(string) + 16;
    t->ids = (int32_t *)need((size_t)most, sizeof *t->ids);
    t->n = chat ? dspark_chat_encode(tokenizer, &said, 1, NULL, DSPARK_PLAIN_TEXT, t->ids, most)
                : dspark_encode(tokenizer, string, strlen(string), 0, t->ids, most);
    if (t->n < 0 || t->n > most) die("encode", dspark_last_error());
}

SHARED texts texts_read(const dspark_model *m, const char *path) {
    FILE *f = fopen(path, "r");
    texts all = { NULL, 0 };
    char *line = NULL;
    size_t cap = 0;
    if (!f) die(path, "cannot be read");
    while (getline(&line, &cap, f) > 0) {
        char *document = json_field(line, "document"), *prompt = document ? document : json_field(line, "prompt");
        text *t;
        if (!prompt) die(path, "a line without prompt or document");
        all.t = (text *)realloc(all.t, (size_t)(all.n + 1) * sizeof *all.t);
        if (!all.t) die("bench", "out of memory");
        t = &all.t[all.n++];
        t->domain = json_field(line, "domain"), t->is_document = document != NULL;
        encode(m, t, prompt, !document && strstr(line, "\"chat\": 1") != NULL);
        free(prompt);
    }
    free(line), fclose(f);
    return all;
}

// A prompt behind documents of its domain, from line `first` on: `depth` tokens in all, or the prompt if it has more.
// The caller frees.
SHARED int32_t *deepen(const texts *all, const text *prompt, int first, int depth, int *n) {
    int32_t *ids = (int32_t *)need((size_t)(depth + prompt->n), sizeof *ids);
    *n = 0;
    for (int i = 0; *n + prompt->n < depth && i < 8 * all->n; i++) {
        const text *t = &all->t[(first + i) % all->n];
        int left = depth - prompt->n - *n, take = t->n < left ? t->n : left;
        if (!t->is_document || strcmp(t->domain, prompt->domain)) continue;
        memcpy(ids + *n, t->ids + (t->n - take), (size_t)take * sizeof *ids), *n += take;       // its end, if not all
    }
    memcpy(ids + *n, prompt->ids, (size_t)prompt->n * sizeof *ids), *n += prompt->n;
    return ids;
}

SHARED int domain_of(const text *t) {
    for (int d = 0; d < N_DOMAINS; d++) if (!strcmp(t->domain, domains[d])) return d;
    die(t->domain, "expected math, code, chat or story");
    return 0;
}

SHARED void texts_free(texts *all) {
    for (int i = 0; i < all->n; i++) free(all->t[i].domain), free(all->t[i].ids);
    free(all->t);
}
#endif
