// dspark: text from a DeepSeek-V4 checkpoint, decoded with DSpark. `make` builds it, `./dspark -h` lists
// its options. It uses only the public part of dspark.h: generate() makes an answer, chat() holds a
// conversation.
#define _GNU_SOURCE      // getline, readlink, sigaction
#define DSPARK_IMPLEMENTATION
#include "dspark.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NORMAL "\033[0m"
#define DIM "\033[2m"
#define RED "\033[31m"
#define GREEN "\033[32m"
#define YELLOW "\033[33m"
#define BLUE "\033[34m"
#define ERASE_LINE "\r\033[K"

// ---- options ---------------------------------------------------------------------------------

enum { MAX_STOPS = 16 };

typedef struct {
    const char *model, *prompt, *system, *preset, *profile, *metrics, *log;
    const char *stop[MAX_STOPS];
    int n_stops, n, context, top_k, threads;
    double temperature, top_p, threshold;           // negative: not given
    double min_p;
    uint64_t seed;
    int schedule, verify;                           // in the numbers of dspark_policy; negative: not given
    int backend;
    int plain, chat, think, show, stats, json, compare, check, learn, fast_prefill, help;
} settings;

enum { FLAG, INTEGER, REAL, SEED, TEXT, NAME, STOP, CHOICE };     // NAME: a text that is not empty

typedef struct {
    const char *name, *value;   // value: what follows it; of a CHOICE the words, whose index is stored
    int kind;
    size_t at;                  // the field in settings
    double low, high;
    const char *help;
} option;

#define AT(field) offsetof(settings, field)
static const option options[] = {
    { "-m", "DIR", NAME, AT(model), 0, 0, "checkpoint directory; default tools/spark-tiny/model" },
    { "-p", "PROMPT", TEXT, AT(prompt), 0, 0, "- reads standard input; no -p on a terminal: a chat" },
    { "-n", "N", INTEGER, AT(n), 0, 1e9, "at most N tokens, default 256; 0: until the context is full" },
    { "-c", "CONTEXT", INTEGER, AT(context), 1, 1e9, "tokens of prompt and answers; default 4096" },
    { "-t", "TEMPERATURE", REAL, AT(temperature), 0, 100, "0: greedy; default: the checkpoint's, or 0" },
    { "--top-k", "K", INTEGER, AT(top_k), 0, 1e9, "draw among the K likeliest tokens; 0: all" },
    { "--top-p", "P", REAL, AT(top_p), 0, 1, "draw from the likeliest tokens of total probability P; 0: all" },
    { "--min-p", "P", REAL, AT(min_p), 0, 1, "drop tokens below P times the likeliest; 0: none" },
    { "--stop", "TEXT", STOP, AT(stop), 0, 0, "end before this text; may be given 16 times" },
    { "--seed", "SEED", SEED, AT(seed), 0, 0x1p64, "one seed, one text; default 0" },
    { "--plain", NULL, FLAG, AT(plain), 0, 0, "no drafting" },
    { "--schedule", "sps|block|threshold", CHOICE, AT(schedule), 0, 0,
      "drafts to verify: fastest by the cost model (default), all, up to --threshold" },
    { "--threshold", "X", REAL, AT(threshold), 0, 1, "cut before the first confidence below X; default 0" },
    { "--preset", "NAME", NAME, AT(preset), 0, 0, "schedule, verifier, threshold: code, chat, creative, regulated" },
    { "--verify", "coupled|rejection", CHOICE, AT(verify), 0, 0, "coupled (default): the text of --plain" },
    { "--chat", NULL, FLAG, AT(chat), 0, 0, "put the prompt into the chat form" },
    { "--system", "TEXT", TEXT, AT(system), 0, 0, "the chat's system message (implies --chat)" },
    { "--think", NULL, FLAG, AT(think), 0, 0, "reason before answering (implies --chat)" },
    { "--show", NULL, FLAG, AT(show), 0, 0, "colour each token by its origin, then list the cycles" },
    { "--stats", NULL, FLAG, AT(stats), 0, 0, "speed and acceptance, on standard error" },
    { "--json", NULL, FLAG, AT(json), 0, 0, "one JSON object in place of the text" },
    { "--metrics", "FILE", NAME, AT(metrics), 0, 0, "counters at the end, for Prometheus" },
    { "--log", "FILE", NAME, AT(log), 0, 0, "a line of JSON for every step" },
    { "--profile", "FILE", NAME, AT(profile), 0, 0, "pass times: read if FILE exists, written at the end" },
    { "--learn", NULL, FLAG, AT(learn), 0, 0, "do not measure pass times: learn them from the first steps" },
    { "--compare", NULL, FLAG, AT(compare), 0, 0, "plain and with DSpark: speeds; are the texts the same?" },
    { "--check", NULL, FLAG, AT(check), 0, 0, "show machine, checkpoint and pass times; does it fit in memory?" },
    { "--backend", "cpu|cuda", CHOICE, AT(backend), 0, 0, "where to run; cuda: if built by make cuda; default cpu" },
    { "--fast-prefill", NULL, FLAG, AT(fast_prefill), 0, 0, "cuda: prompt blocks of 512 tokens in FP8; bits differ" },
    { "--threads", "N", INTEGER, AT(threads), 1, 1024, "default: all processors" },
    { "-h", NULL, FLAG, AT(help), 0, 0, "this list" },
    { "--help", NULL, FLAG, AT(help), 0, 0, "the same" },
};
enum { N_OPTIONS = sizeof options / sizeof *options };

enum { FAILED = 1, BAD_CALL = 2 };      // exit statuses

// One line on standard error; gives the exit status back.
static int error(int exit_status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "dspark: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return exit_status;
}

static int api_error(dspark_status status) {
    int bad_call = status == DSPARK_ERROR_ARGUMENT || status == DSPARK_ERROR_CONTEXT_FULL;
    return error(bad_call ? BAD_CALL : FAILED, "%s", dspark_last_error());
}

// The index of a word in "a|b|c", or -1.
static int choice(const char *words, const char *word) {
    size_t len = strlen(word);
    for (int i = 0; words && !strchr(word, '|'); i++) {
        if (!strncmp(words, word, len) && (words[len] == '|' || !words[len])) return i;
        words = strchr(words, '|');
        if (words) words++;
    }
    return -1;
}

static int store(settings *s, const option *o, const char *text) {
    void *field = (char *)s + o->at;
    char *end;
    double x;
    switch (o->kind) {
    case TEXT: case NAME: *(const char **)field = text; return *text || o->kind == TEXT;
    case STOP: return *text && s->n_stops < MAX_STOPS && (s->stop[s->n_stops++] = text) != NULL;
    case CHOICE: return (*(int *)field = choice(o->value, text)) >= 0;
    case SEED:
        errno = 0;
        *(uint64_t *)field = strtoull(text, &end, 0);
        return *text >= '0' && *text <= '9' && !*end && !errno;
    default:
        x = strtod(text, &end);
        if (end == text || *end || !(x >= o->low && x <= o->high)) return 0;
        if (o->kind == REAL) return *(double *)field = x, 1;
        return (*(int *)field = (int)x) == x;
    }
}

static int parse(settings *s, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const option *o = options;
        while (o < options + N_OPTIONS && strcmp(o->name, argv[i])) o++;
        if (o == options + N_OPTIONS)
            return error(BAD_CALL, *argv[i] == '-' ? "unknown option %s; dspark -h lists all"
                                                   : "'%s': expected an option; a prompt follows -p", argv[i]);
        if (o->kind == FLAG) {
            *(int *)(void *)((char *)s + o->at) = 1;
            continue;
        }
        if (++i == argc) return error(BAD_CALL, "%s: %s is missing", o->name, o->value);
        if (store(s, o, argv[i])) continue;
        if (o->kind == STOP && *argv[i]) return error(BAD_CALL, "--stop '%s': expected at most %d", argv[i], MAX_STOPS);
        if (o->high <= 0) return error(BAD_CALL, "%s '%s': expected %s", o->name, argv[i], o->value);
        return error(BAD_CALL, "%s '%s': expected %s%g to %g", o->name, argv[i],
                     o->kind == REAL ? "" : "a whole number, ", o->low, o->high);
    }
    if (s->json + s->show + s->compare > 1) return error(BAD_CALL, "--json, --show, --compare: only one of them");
    if (s->preset && !dspark_preset(s->preset))
        return error(BAD_CALL, "--preset '%s': expected code, chat, creative or regulated", s->preset);
    if (s->fast_prefill && !s->backend) return error(BAD_CALL, "--fast-prefill needs --backend cuda");
    if (s->plain && s->compare) return error(BAD_CALL, "--compare runs --plain itself");
    if (s->schedule == DSPARK_SCHEDULE_THRESHOLD && s->threshold <= 0)
        return error(BAD_CALL, "--schedule threshold needs a --threshold");
    s->chat |= s->think || s->system;
    return 0;
}

static int help(void) {
    printf("usage: dspark [OPTION]...\nText from a DeepSeek-V4 checkpoint, decoded with DSpark.\n\n");
    for (const option *o = options; o < options + N_OPTIONS; o++)
        printf("  %s %-*s  %s\n", o->name, 31 - (int)strlen(o->name), o->value ? o->value : "", o->help);
    printf("\nExit status: 0, 1 when something failed at run time, 2 when the call was wrong.\n");
    return 0;
}

// ---- small things ----------------------------------------------------------------------------

typedef struct {
    void *data;
    size_t n, cap;      // bytes
} buffer;

// Room for n more bytes, which become part of it.
static void *extend(buffer *b, size_t n) {
    if (n > b->cap - b->n) {
        b->cap = 2 * b->cap + n + 64;
        b->data = realloc(b->data, b->cap);
        if (!b->data) exit(error(FAILED, "out of memory"));     // a program may; a library must not
    }
    b->n += n;
    return (char *)b->data + b->n - n;
}

static void push(buffer *b, const void *bytes, size_t n) {
    if (n) memcpy(extend(b, n), bytes, n);
}

static int last_byte(const buffer *b) { return b->n ? ((const char *)b->data)[b->n - 1] : -1; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double ratio(double a, double b) { return b > 0 ? a / b : 0; }

static volatile sig_atomic_t interrupted;
static void on_interrupt(int sig) { (void)sig, interrupted = 1; }

static void progress(const char *what, double share) {
    if (isatty(STDERR_FILENO)) fprintf(stderr, ERASE_LINE "%s %.0f %%", what, 100 * share);
}
static void progress_end(void) {
    if (isatty(STDERR_FILENO)) fprintf(stderr, ERASE_LINE);
}
static int loading(void *user, float done) { return (void)user, progress("loading", (double)done), 1; }
static int reading(void *user, int done, int total) {
    return (void)user, progress("reading the prompt", ratio(done, total)), !interrupted;
}

// ---- an answer -------------------------------------------------------------------------------

typedef struct {
    buffer text;                // UTF-8
    buffer tokens, token_s;     // int32_t; double: a step's seconds over its tokens
    buffer cycles;              // --show: dspark_step_result
    dspark_stats stats;
    dspark_utf8 utf8;           // --show
    double prompt_s, s;
    int n_prompt, n, finish;
} answer;

static void answer_clear(answer *a) {
    free(a->text.data), free(a->tokens.data), free(a->token_s.data), free(a->cycles.data);
    memset(a, 0, sizeof *a);
}

// All printed figures: tokens a second, without the prompt's time; tokens a pass of the target (the first
// token comes from the prompt's logits and needs none), 1 without drafting; the share of the drafts
// verified at position k = 0.. that were accepted; milliseconds a token took (sorts them).
static double speed(const answer *a) { return ratio(a->n, a->s); }
static double tau(const answer *a) { return ratio(a->n - 1, (double)a->stats.steps); }
static double accepted_at(const answer *a, int k) {
    return ratio((double)a->stats.accepted_by_position[k], (double)a->stats.scheduled_by_position[k]);
}
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double percentile_ms(answer *a, double p) {
    double *s = a->token_s.data;
    if (a->n) qsort(s, (size_t)a->n, sizeof *s, ascending);
    return a->n ? 1e3 * s[(int)(p * (a->n - 1) + .5)] : 0;
}

static void count(answer *a, const dspark_step_result *r, double seconds) {
    dspark_stats *s = &a->stats;
    double each = ratio(seconds, r->n_tokens);
    for (int i = 0; i < r->n_tokens; i++) push(&a->token_s, &each, sizeof each);
    push(&a->tokens, r->tokens, (size_t)r->n_tokens * sizeof *r->tokens);
    a->n += r->n_tokens;
    s->steps += r->verify_us > 0, s->cycles += r->n_drafted > 0;
    s->drafted += r->n_drafted, s->scheduled += r->n_scheduled, s->accepted += r->n_accepted;
    s->draft_us += (double)r->draft_us, s->verify_us += (double)r->verify_us;
    for (int k = 0; k < r->n_scheduled; k++) s->scheduled_by_position[k]++;
    for (int k = 0; k < r->n_accepted; k++) s->accepted_by_position[k]++;
}

static const char *const colours[] = { NORMAL, GREEN, YELLOW, BLUE };      // by DSPARK_BY_*

// --show: each token in the colour of its origin, a stop string's tokens too.
static void show_tokens(answer *a, const dspark_step_result *r, const dspark_tokenizer *t) {
    for (int i = 0; i < r->n_tokens; i++) {
        int len;
        const char *bytes = dspark_token_bytes(t, r->tokens[i], &len);
        size_t start = a->text.n;
        char *out = extend(&a->text, 4 * (size_t)len + 16);
        int n = dspark_token_is_special(t, r->tokens[i]) ? 0 : dspark_utf8_push(&a->utf8, bytes, len, 0, out);
        a->text.n = start + (size_t)n;
        printf("%s%.*s" NORMAL, colours[r->by[i] & 3], n, out);
    }
}

// --show: `3 of 5 verified, 2 accepted:  " the" .98  " cat" .91  " sat" .60 | "\n" .31  "on" .20`
static void show_cycles(const answer *a, const dspark_tokenizer *t) {
    const dspark_step_result *r = a->cycles.data;
    for (size_t i = 0; i < a->cycles.n / sizeof *r; i++, r++) {
        printf("%d of %d verified, %d accepted:", r->n_scheduled, r->n_drafted, r->n_accepted);
        for (int k = 0; k < r->n_drafted; k++) {
            int len, accepted = k < r->n_accepted, verified = k < r->n_scheduled;
            const char *s = dspark_token_bytes(t, r->draft[k], &len);
            printf("%s%s\"", k == r->n_scheduled ? " | " : "  ", accepted ? GREEN : verified ? RED : DIM);
            for (int c = 0; c < len; c++) printf(s[c] == '\n' ? "\\n" : "%c", s[c]);
            printf("\" %.2f" NORMAL, (double)r->confidence[k]);
        }
        printf("\n");
    }
}

static FILE *log_file;      // from the first step on: a call that is refused leaves the old log
static int log_step(const char *path, const dspark_step_result *r) {
    char line[4096];
    if (!log_file && !(log_file = fopen(path, "w"))) return error(FAILED, "%s: %s", path, strerror(errno));
    if (dspark_step_json(r, 0, line, sizeof line) < (int)sizeof line) fputs(line, log_file);
    return 0;
}

// From a session that holds the prompt to an answer; an exit status.
static int generate(const settings *o, dspark_session *s, const dspark_tokenizer *t, answer *a) {
    int quiet = o->json || o->compare;
    dspark_step_result r;
    double start = now();
    do {
        double began = now();
        dspark_status status = dspark_step(&s, 1, NULL, &r);
        if (!status) status = r.status;
        if (status) return api_error(status);
        count(a, &r, now() - began);
        if (o->log && log_step(o->log, &r)) return FAILED;
        if (o->show && r.n_drafted) push(&a->cycles, &r, sizeof r);
        if (o->show) show_tokens(a, &r, t);
        else push(&a->text, r.text, (size_t)r.text_len);
        if (!o->show && !quiet) fwrite(r.text, 1, (size_t)r.text_len, stdout);
        fflush(stdout);
    } while (!r.finish && !interrupted && !ferror(stdout));
    a->s = now() - start;
    a->finish = r.finish;
    if (!quiet && a->text.n && last_byte(&a->text) != '\n') printf("\n");
    show_cycles(a, t);
    fflush(stdout);
    return 0;
}

static void print_stats(answer *a) {
    const dspark_stats *s = &a->stats;
    fprintf(stderr, "%d tokens in %.2f s, %.1f tokens/s; a token took %.2f ms (p50), %.2f ms (p95)\n",
            a->n, a->s, speed(a), percentile_ms(a, .5), percentile_ms(a, .95));
    fprintf(stderr, "tau %.2f: %d passes, %d with drafts; %d drafted, %d verified, %d accepted\n", tau(a),
            (int)s->steps, (int)s->cycles, (int)s->drafted, (int)s->scheduled, (int)s->accepted);
    for (int k = 0; k < DSPARK_MAX_BLOCK && s->scheduled_by_position[k]; k++)
        fprintf(stderr, "%s %d: %.0f %%", k ? "," : "accepted at position", k + 1, 100 * accepted_at(a, k));
    fprintf(stderr, "%sprompt %d tokens in %.2f s, drafts %.2f s, verification %.2f s\n",
            s->scheduled ? "; " : "", a->n_prompt, a->prompt_s, 1e-6 * s->draft_us, 1e-6 * s->verify_us);
}

static void print_json(const answer *a) {
    const dspark_stats *s = &a->stats;
    const unsigned char *text = a->text.data;
    const int32_t *ids = a->tokens.data;
    printf("{\"text\": \"");
    for (size_t i = 0; i < a->text.n; i++)
        printf(text[i] < ' ' ? "\\u%04x" : strchr("\"\\", text[i]) ? "\\%c" : "%c", text[i]);
    printf("\", \"tokens\": [");
    for (int i = 0; i < a->n; i++) printf("%s%d", i ? ", " : "", (int)ids[i]);
    printf("], \"finish\": \"%s\", \"prompt_tokens\": %d, \"prompt_seconds\": %.6f, \"seconds\": %.6f, "
           "\"tokens_per_second\": %.3f, ", dspark_finish_name(a->finish), a->n_prompt, a->prompt_s, a->s, speed(a));
    printf("\"tau\": %.4f, \"steps\": %d, \"cycles\": %d, \"drafted\": %d, \"scheduled\": %d, "
           "\"accepted\": %d, \"accepted_by_position\": [", tau(a), (int)s->steps, (int)s->cycles,
           (int)s->drafted, (int)s->scheduled, (int)s->accepted);
    for (int k = 0; k < DSPARK_MAX_BLOCK && s->scheduled_by_position[k]; k++)
        printf("%s%d", k ? ", " : "", (int)s->accepted_by_position[k]);
    printf("]}\n");
}

// ---- prompts and sessions --------------------------------------------------------------------

// The prompt, or all of standard input, but its last newline; ends in a zero. An exit status.
static int read_prompt(const settings *o, buffer *text) {
    if (o->prompt && strcmp(o->prompt, "-")) push(text, o->prompt, strlen(o->prompt));
    else for (int c; (c = getchar()) != EOF;) *(char *)extend(text, 1) = (char)c;
    if (last_byte(text) == '\n') text->n--;
    *(char *)extend(text, 1) = 0, text->n--;
    return ferror(stdin) ? error(FAILED, "standard input: %s", strerror(errno)) : 0;
}

static int encode_text(const dspark_model *m, const buffer *text, buffer *ids) {
    const dspark_tokenizer *t = dspark_model_tokenizer(m);
    int32_t bos = dspark_model_config(m)->bos_token_id;
    int n = dspark_encode(t, text->data, text->n, 0, NULL, 0);
    if (bos >= 0) push(ids, &bos, sizeof bos);
    if (n > 0) n = dspark_encode(t, text->data, text->n, 0, extend(ids, (size_t)n * sizeof bos), n);
    return n < 0 ? error(FAILED, "%s", dspark_last_error()) : 0;
}

// Encodes a question in the chat form, the first with the system message. Their contents are text, whatever
// tokens they name.
static int encode_chat(const settings *o, const dspark_model *m, const char *question, int first,
                       buffer *ids) {
    const dspark_message said[] = { { "system", o->system, NULL, 0 }, { "user", question, NULL, 0 } };
    const dspark_chat_desc form = { o->think, 1, 0, !first };
    const dspark_tokenizer *t = dspark_model_tokenizer(m);
    int skip = !first || !o->system;
    int n = dspark_chat_encode(t, said + skip, 2 - skip, &form, DSPARK_PLAIN_TEXT, NULL, 0);
    int32_t *id = extend(ids, n < 0 ? 0 : (size_t)n * sizeof *id);
    if (n > 0) n = dspark_chat_encode(t, said + skip, 2 - skip, &form, DSPARK_PLAIN_TEXT, id, n);
    return n < 0 ? error(FAILED, "%s", dspark_last_error()) : 0;
}

static dspark_session_desc session_desc(const settings *o, const dspark_model *m) {
    const dspark_config *c = dspark_model_config(m);
    dspark_session_desc d;
    memset(&d, 0, sizeof d);
    d.max_context = o->context, d.seed = o->seed, d.top_k = o->top_k, d.min_p = (float)o->min_p;
    d.temperature = o->temperature >= 0 ? (float)o->temperature : c->temperature >= 0 ? c->temperature : 0;
    d.top_p = o->top_p >= 0 ? (float)o->top_p : c->top_p >= 0 ? c->top_p : 0;
    d.stop_strings = o->stop, d.n_stop_strings = o->n_stops;
    if (o->preset) d.policy = *dspark_preset(o->preset);
    d.policy.plain = o->plain;
    if (o->schedule >= 0) d.policy.schedule = o->schedule;
    if (o->verify >= 0) d.policy.verify = o->verify;
    if (o->threshold >= 0) d.policy.threshold = (float)o->threshold;
    d.progress = reading;
    return d;
}

// Runs the session's next tokens, then answers.
static int respond(const settings *o, dspark_model *m, dspark_session *s, const buffer *ids, answer *a) {
    dspark_policy policy = session_desc(o, m).policy;
    double began = now();
    dspark_status status;
    a->n_prompt = (int)(ids->n / sizeof(int32_t));
    status = dspark_session_append(s, ids->data, a->n_prompt);
    progress_end();
    a->prompt_s = now() - began;
    if (status == DSPARK_ERROR_CONTEXT_FULL)
        return error(BAD_CALL, "the prompt is too long (-c): %s", dspark_last_error());
    if (o->n) policy.quota = (int)dspark_session_stats(s)->emitted + o->n;
    if (!status) status = dspark_session_set_policy(s, &policy);
    return status ? api_error(status) : generate(o, s, dspark_model_tokenizer(m), a);
}

static int answer_once(const settings *o, dspark_model *m, const buffer *ids, answer *a) {
    dspark_session_desc desc = session_desc(o, m);
    dspark_session *s;
    dspark_status status = dspark_session_open(&s, m, &desc);
    int exit_status = status ? api_error(status) : respond(o, m, s, ids, a);
    if (!status) dspark_session_close(s);
    return exit_status;
}

// ---- what the program can do -----------------------------------------------------------------

static void show_prompt(const dspark_tokenizer *t, const buffer *ids) {
    const int32_t *id = ids->data;
    int n = (int)(ids->n / sizeof *id), len = dspark_decode(t, id, n, NULL, 0);
    buffer text = { NULL, 0, 0 };
    dspark_decode(t, id, n, extend(&text, (size_t)len), len);
    puts(DIM "prompt" NORMAL "  plain  " GREEN "accepted draft" YELLOW "  correction" BLUE "  bonus" NORMAL);
    printf(DIM "%.*s" NORMAL, len, (char *)text.data);
    free(text.data);
}

// Each way twice, in turn, and the better time of each: the first passes may wait for the disk.
static int compare(const settings *o, dspark_model *m, const buffer *ids) {
    answer a[2];
    double best[2] = { 0, 0 };
    int status = 0, same;
    memset(a, 0, sizeof a);
    for (int i = 0; i < 4 && !status; i++) {
        int drafts = i % 2;
        settings way = *o;
        way.plain = !drafts;
        answer_clear(&a[drafts]);
        status = answer_once(&way, m, ids, &a[drafts]);
        if (speed(&a[drafts]) > best[drafts]) best[drafts] = speed(&a[drafts]);
    }
    same = a[0].n == a[1].n && a[0].n && !memcmp(a[0].tokens.data, a[1].tokens.data, a[0].tokens.n);
    for (int i = 0; i < 2 && !status; i++)
        printf("%s %8.1f tokens/s, %d tokens, tau %.2f\n", i ? "dspark" : "plain ", best[i], a[i].n,
               tau(&a[i]));
    if (!status)
        printf("ratio  %8.2f, texts %s\n", ratio(best[1], best[0]), same ? "identical" : "different");
    answer_clear(&a[0]), answer_clear(&a[1]);
    return status ? status : same || session_desc(o, m).policy.verify != DSPARK_VERIFY_COUPLED ? 0 : FAILED;
}

static int one_prompt(const settings *o, dspark_model *m) {
    buffer text = { NULL, 0, 0 }, ids = { NULL, 0, 0 };
    answer a;
    int status;
    memset(&a, 0, sizeof a);
    status = read_prompt(o, &text);
    if (!status && o->chat && strlen(text.data) < text.n) status = error(BAD_CALL, "a zero byte cannot be in a chat");
    if (!status) status = o->chat ? encode_chat(o, m, text.data, 1, &ids) : encode_text(m, &text, &ids);
    if (!status && o->show) show_prompt(dspark_model_tokenizer(m), &ids);
    if (!status) status = o->compare ? compare(o, m, &ids) : answer_once(o, m, &ids, &a);
    if (!status && o->json) print_json(&a);
    if (!status && o->stats && !o->compare) print_stats(&a);
    free(text.data), free(ids.data), answer_clear(&a);
    return status;
}

// Prints T(B) in milliseconds, and the tokens a second if every row gives one; then the times of drafts and draws.
static int check_profile(dspark_model *m) {
    dspark_profile p;
    dspark_status status = dspark_model_profile(m, &p);
    if (status) return api_error(status);
    if (!p.n) return puts("passes      to be learned"), 0;
    printf("passes     ");
    for (int B = 1; B <= 64; B *= 2)
        printf(" %d: %.2f ms (%.0f/s)", B, 1e-3 * dspark_profile_us(&p, B), 1e6 * B / dspark_profile_us(&p, B));
    printf("\ndraft       %.2f ms, %.2f ms for another session; a draw %.3f ms\n", 1e-3 * (double)p.draft_us,
           1e-3 * (double)p.draft_more_us, 1e-3 * (double)p.sample_us);
    return 0;
}

static int check(const settings *o, dspark_model *m) {
    const dspark_config *c = dspark_model_config(m);
    const dspark_tokenizer *t = dspark_model_tokenizer(m);
    const double MiB = 1 << 20, memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    dspark_session_desc desc = session_desc(o, m);
    size_t mapped, model = dspark_model_bytes(m, &mapped), session = dspark_session_bytes(m, &desc);
    double all = (double)mapped + (double)model + (double)session;
    if (!session) return api_error(DSPARK_ERROR_ARGUMENT);
    printf("machine     path %s, %d threads, %.0f MiB of memory\n", dspark_model_path_name(m),
           dspark_model_threads(m), memory / MiB);
    printf("target      %d layers, hidden %d, %d heads of %d, window %d, vocabulary %d\n",
           c->num_hidden_layers, c->hidden_size, c->num_attention_heads, c->head_dim, c->sliding_window,
           c->vocab_size);
    printf("experts     %d of %d a token and %d shared, width %d\n", c->num_experts_per_tok,
           c->n_routed_experts, c->n_shared_experts, c->moe_intermediate_size);
    printf("ratios     ");
    for (int l = 0; l < c->num_hidden_layers; l++) printf(" %d", c->compress_ratios[l]);
    printf("\ndrafter     %d stage%s", c->n_stages, c->n_stages > 1 ? "s" : "");
    if (c->n_stages) printf(", block %d, Markov rank %d, taps", c->dspark_block_size, c->dspark_markov_rank);
    for (int i = 0; i < c->n_taps && c->n_stages; i++) printf(" %d", c->dspark_target_layer_ids[i]);
    printf("\ntokenizer   %d tokens\n", t ? dspark_tokenizer_size(t) : 0);
    printf("memory      %.1f MiB of weights mapped, %.1f MiB model, %.1f MiB session; %.1f MiB in all: %s\n",
           (double)mapped / MiB, (double)model / MiB, (double)session / MiB, all / MiB,
           all < memory ? "fits" : "does not fit, weights will be paged");
    if (dspark_model_placement(m)) printf("device      %s\n", dspark_model_placement(m));
    return all < memory ? check_profile(m) : 0;
}

// ---- a conversation --------------------------------------------------------------------------

typedef struct {
    settings o;
    dspark_model *model;
    dspark_session *session;
    answer last;
    int asked;              // length of the session up to the last question's end; 0: none
} conversation;

// Another seed for the same tokens: a fork takes the session's place.
static dspark_status reseed(conversation *c, uint64_t seed) {
    dspark_session_desc desc;
    dspark_session *fork;
    dspark_status status;
    c->o.seed = seed, desc = session_desc(&c->o, c->model);
    status = dspark_session_fork(&fork, c->session, &desc);
    if (status) return status;
    dspark_session_close(c->session);
    c->session = fork;
    return DSPARK_OK;
}

// One turn; question NULL: the last one again, with the next seed. A question that fails is taken back.
static void turn(conversation *c, const char *question) {
    const dspark_config *config = dspark_model_config(c->model);
    const int32_t *tokens = dspark_session_tokens(c->session), eos = config->eos_token_id[0];
    int length = dspark_session_length(c->session);
    int cut_off = length && config->n_eos && tokens[length - 1] != eos;
    buffer ids = { NULL, 0, 0 };
    dspark_status status = DSPARK_OK;
    if (!question) status = dspark_session_truncate(c->session, length = c->asked);
    if (!question && !status) status = reseed(c, c->o.seed + 1);
    if (question && cut_off) push(&ids, &eos, sizeof eos);
    answer_clear(&c->last);
    if (status) api_error(status);
    else if ((question && encode_chat(&c->o, c->model, question, !length, &ids)) ||
             respond(&c->o, c->model, c->session, &ids, &c->last))
        dspark_session_truncate(c->session, length);
    else c->asked = length + c->last.n_prompt;
    if (c->o.stats) print_stats(&c->last);
    free(ids.data);
}

// Obeys a line; 0 ends the chat.
static int chat_line(conversation *c, const char *line) {
    if (!strcmp(line, "/quit")) return 0;
    if (!strcmp(line, "/reset")) dspark_session_truncate(c->session, c->asked = 0), answer_clear(&c->last);
    else if (!strcmp(line, "/stats")) print_stats(&c->last);
    else if (!strcmp(line, "/retry") && c->asked) turn(c, NULL);
    else if (*line == '/') puts("commands: /retry with the next seed, /reset, /stats, /quit; Ctrl-C stops an answer");
    else if (*line) turn(c, line);
    return 1;
}

static int chat(const settings *o, dspark_model *m) {
    conversation c;
    dspark_session_desc desc = session_desc(o, m);
    dspark_status status;
    struct sigaction on_int;
    char *line = NULL;
    size_t cap = 0;
    memset(&c, 0, sizeof c);
    c.o = *o, c.model = m;
    status = dspark_session_open(&c.session, m, &desc);
    if (status) return api_error(status);
    memset(&on_int, 0, sizeof on_int);      // without SA_RESTART: Ctrl-C ends the reading of a line, too
    on_int.sa_handler = on_interrupt;
    sigaction(SIGINT, &on_int, NULL);
    for (int more = 1; more;) {
        interrupted = 0;
        printf("> ");
        fflush(stdout);
        ssize_t n = getline(&line, &cap, stdin);
        if (n < 0) more = interrupted, clearerr(stdin), printf("\n");
        else if (strlen(line) < (size_t)n) error(BAD_CALL, "a zero byte cannot be in a chat");
        else line[strcspn(line, "\n")] = 0, more = chat_line(&c, line);
    }
    free(line), answer_clear(&c.last);
    dspark_session_close(c.session);
    return 0;
}

// ---- the program -----------------------------------------------------------------------------

// The directory of -m, or of the small model beside the program, else in the working directory.
static const char *model_directory(const settings *o, char *room, size_t size) {
    static const char small[] = "tools/spark-tiny/model";
    ssize_t n = o->model ? 0 : readlink("/proc/self/exe", room, size - sizeof small);
    while (n > 0 && room[n - 1] != '/') n--;
    if (n > 0) memcpy(room + n, small, sizeof small);
    return o->model ? o->model : n > 0 && !access(room, F_OK) ? room : small;
}

// The backend asked for; NULL is the CPU.
static const dspark_backend *backend_of(const settings *o) {
#ifdef DSPARK_CUDA
    return o->backend ? dspark_cuda_backend() : NULL;
#else
    (void)o;
    return NULL;
#endif
}

// Reads the profile file if it exists; else has it learned, or measures it now, not in the first answer's time.
static dspark_status prepare_profile(const settings *o, dspark_model *m) {
    dspark_profile profile;
    if (o->profile && !access(o->profile, F_OK)) return dspark_model_load_profile(m, o->profile);
    if (o->plain || !dspark_model_config(m)->n_stages) return DSPARK_OK;
    if (o->learn) return dspark_model_set_profile(m, NULL);
    return o->check ? DSPARK_OK : dspark_model_profile(m, &profile);
}

// Whether a file can be written at the end, as a run takes long; one that exists stays as it is. An exit status.
static int may_write(const char *path) {
    struct stat st;
    FILE *f;
    if (!path) return 0;
    if (!stat(path, &st)) errno = S_ISDIR(st.st_mode) ? EISDIR : access(path, W_OK) ? errno : 0;
    else if ((f = fopen(path, "wx"))) fclose(f), remove(path), errno = 0;
    else if (errno == EEXIST) errno = 0;        // a link to what is not there yet
    return errno ? error(BAD_CALL, "%s: %s", path, strerror(errno)) : 0;
}

// Writes the files that were asked for.
static int leave(const settings *o, dspark_model *m) {
    char text[16384];
    FILE *f;
    int n = dspark_stats_prometheus(dspark_model_stats(m), NULL, text, sizeof text);
    dspark_status status = o->profile ? dspark_model_save_profile(m, o->profile) : DSPARK_OK;
    if (status) return api_error(status);
    if (log_file && fclose(log_file)) return error(FAILED, "%s: %s", o->log, strerror(errno));
    if (!o->metrics) return 0;
    if (n >= (int)sizeof text)
        return error(FAILED, "%s: expected up to %zu bytes, found %d", o->metrics, sizeof text, n);
    f = fopen(o->metrics, "w");
    if (!f || fputs(text, f) < 0 || fclose(f))
        return error(FAILED, "%s: %s", o->metrics, strerror(errno));
    return 0;
}

static int run(settings *o) {
    char room[4096];
    const char *dir = model_directory(o, room, sizeof room);
    int exit_status, ask = !o->prompt && isatty(STDIN_FILENO);
    dspark_model_desc desc;
    dspark_model *m;
    dspark_status status;
    struct stat st;
    errno = 0;
    if (stat(dir, &st) || !S_ISDIR(st.st_mode))
        return error(BAD_CALL, "%s: %s", dir, strerror(errno ? errno : ENOTDIR));
#ifndef DSPARK_CUDA
    if (o->backend) return error(BAD_CALL, "--backend cuda: this program was built without it; make cuda builds it");
#endif
    if (ask && (o->json || o->compare)) return error(BAD_CALL, "--json and --compare need a prompt (-p)");
    if ((exit_status = may_write(o->metrics)) || (exit_status = may_write(o->profile)) ||
        (exit_status = may_write(o->log)))
        return exit_status;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = o->threads, desc.progress = loading, desc.backend = backend_of(o);
    if (o->backend) desc.max_rows = 512;        // a pass reads every expert once, however many rows of a prompt it has
    desc.fast_prefill = o->fast_prefill;
    status = dspark_model_open(&m, dir, &desc);
    if (!status) status = prepare_profile(o, m);
    progress_end();
    if (status) exit_status = api_error(status);
    else if (o->check) exit_status = check(o, m);
    else if (!dspark_model_tokenizer(m)) exit_status = error(FAILED, "%s holds no tokenizer.json", dir);
    else exit_status = ask ? chat(o, m) : one_prompt(o, m);
    if (!exit_status) exit_status = leave(o, m);
    dspark_model_close(m);
    return exit_status;
}

int main(int argc, char **argv) {
    settings o;
    int status;
    for (int fd = 0; fd < 3; fd++)      // a closed one fails, rather than being the next file that is opened
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd ? O_RDONLY : O_WRONLY);
    memset(&o, 0, sizeof o);
    o.n = 256, o.temperature = o.top_p = o.threshold = -1, o.schedule = o.verify = -1;
    status = parse(&o, argc, argv);
    if (!status) status = o.help ? help() : run(&o);
    if (fflush(stdout) || ferror(stdout)) status = error(FAILED, "standard output cannot be written");
    return status;
}
