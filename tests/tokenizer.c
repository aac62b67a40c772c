/* JSON, tokenizer and chat form: every golden case (golden/tokenizer/README.md), and files that are not what
   they should be, each with its error. */
#include <stddef.h>
#include <time.h>
static void *test_malloc(size_t n);
static void *test_realloc(void *old, size_t n);
static void test_free(void *p);
#define DSPARK_MALLOC test_malloc
#define DSPARK_REALLOC test_realloc
#define DSPARK_FREE test_free
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "tap.h"

/* Blocks held, and which allocation is to fail (counted down; 0: none). */
static int blocks, fail_in;
static int fails(void) { return fail_in && !--fail_in; }
static void *test_malloc(size_t n) {
    void *p = fails() ? NULL : malloc(n);
    blocks += p != NULL;
    return p;
}
static void *test_realloc(void *old, size_t n) {
    void *p = fails() ? NULL : realloc(old, n);
    blocks += p && !old;
    return p;
}
static void test_free(void *p) {
    blocks -= p != NULL;
    free(p);
}

#define GOLDEN "tests/golden/tokenizer/"
#define SMALL "tools/spark-tiny/model/tokenizer.json"
#define LARGE "build/deepseek-v4.tokenizer.json"
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static char *read_file(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    char *text;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *len = (size_t)ftell(f);
    rewind(f);
    text = (char *)malloc(*len + 1);
    *len = fread(text, 1, *len, f);
    text[*len] = 0;
    fclose(f);
    return text;
}

/* ---- JSON ---- */

typedef struct { const char *text; int at; } malformed;     /* the byte that the error names */
static const malformed documents[] = {
    { "", 0 }, { "  \n", 3 }, { "{", 1 }, { "[", 1 }, { "[1,", 3 }, { "{\"a\"", 4 }, { "{\"a\":", 5 }, { "{\"a\":1", 6 },
    { "{\"a\":1,", 7 }, { "{\"a\":1,}", 7 }, { "[1,]", 3 }, { "[,1]", 1 }, { "[1 2]", 3 }, { "{\"a\" 1}", 5 },
    { "{a:1}", 1 }, { "{1:1}", 1 }, { "{'a':1}", 1 }, { "[1}", 2 }, { "{\"a\":1]", 6 }, { "1 1", 2 }, { "{} x", 3 },
    { "nul", 3 }, { "nulll", 4 }, { "True", 0 }, { "tru e", 3 }, { "falsy", 4 }, { "NaN", 0 }, { "Infinity", 0 },
    { "-", 1 }, { "+1", 0 }, { "01", 1 }, { "-01", 2 }, { "1.", 2 }, { ".5", 0 }, { "1.e5", 2 }, { "1e", 2 }, { "1e+", 3 },
    { "1,5", 1 }, { "0x10", 1 }, { "1_000", 1 }, { "--1", 1 }, { "\"", 1 }, { "\"abc", 4 }, { "\"\\\"", 3 },
    { "\"\\x41\"", 2 }, { "\"\\u12\"", 5 }, { "\"\\u12G4\"", 5 }, { "\"\\ud800\"", 1 }, { "\"\\udc00\"", 1 },
    { "\"\\ud800\\ud800\"", 1 }, { "\"\\ud800x\"", 1 }, { "\"\\ud800\\n\"", 1 }, { "\"a\nb\"", 2 }, { "\"\t\"", 1 },
    { "\"\x1f\"", 1 }, { "\"\x80\"", 1 }, { "\"\xc0\x80\"", 1 }, { "\"\xed\xa0\x80\"", 1 }, { "\"\xe2\x82\"", 1 },
    { "\"\xf4\x90\x80\x80\"", 1 }, { "\"\xff\"", 1 }, { "\xef\xbb\xbf{}", 0 }, { "// no\n1", 0 }, { "[1]/**/", 3 },
    { "{\"a\":1,\"b\":2,\"a\":3}", 19 }, { "{\"a\":1,\"\\u0061\":3}", 18 },
    { "{\"a\":0,\"b\":0,\"c\":0,\"d\":0,\"e\":0,\"f\":0,\"g\":0,\"h\":0,\"i\":0,\"j\":0,\"b\":0}", 67 }
};

/* Parsed from a block of just its size, so that a read beyond it shows. */
static dspark_status parse(dspark__json *j, const char *text, size_t len) {
    char *copy = (char *)malloc(len ? len : 1);
    dspark_status status;
    memcpy(copy, text, len);
    status = dspark__json_parse(j, "file.json", copy, len);
    free(copy);
    return status;
}

static void test_json_errors(void) {
    dspark__json j;
    static const char sample[] = "{\"key\": [1, -2.5e+3, \"\\u00e9\\ud83d\\ude00\\n\", {\"\": null}], \"b\": true, "
                                 "\"c\": false, \"\xe4\xb8\x80\": []}";
    static const char zero[] = "[1]\0";
    char deep[200];
    int cut = 0;
    for (int i = 0; i < COUNT(documents); i++) {
        char at[64];
        dspark_status status = parse(&j, documents[i].text, strlen(documents[i].text));
        snprintf(at, sizeof at, "file.json: byte %d: expected ", documents[i].at);
        if (!ok(status == DSPARK_ERROR_FORMAT && !strncmp(dspark_last_error(), at, strlen(at)) && !j.nodes,
                "JSON: document %d is refused at byte %d: %s", i, documents[i].at, dspark_last_error()))
            printf("# %s\n", documents[i].text);
    }
    ok(parse(&j, zero, 4) == DSPARK_ERROR_FORMAT, "JSON: a zero after the text is refused");
    for (size_t n = 0; n < sizeof sample - 1; n++) cut += parse(&j, sample, n) == DSPARK_ERROR_FORMAT;
    ok(cut == (int)sizeof sample - 1, "JSON: cut off at any of %d bytes it is refused", (int)sizeof sample - 1);
    ok(parse(&j, sample, sizeof sample - 1) == DSPARK_OK, "JSON: the whole document is accepted");
    dspark__json_free(&j);
    memset(deep, '[', 100);
    memset(deep + 64, ']', 64);
    ok(parse(&j, deep, 128) == DSPARK_OK && j.n == 64, "JSON: 64 levels are taken");
    dspark__json_free(&j);
    memset(deep, '[', 65);
    memset(deep + 65, ']', 65);
    ok(parse(&j, deep, 130) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "byte 64: "),
       "JSON: 65 levels are refused");
    ok(!blocks, "JSON: refused documents leave no memory allocated");
}

static int real_is(const dspark__json *j, int node, const char *text) {
    double x = 0, y = strtod(text, NULL);
    return dspark__json_real(j, node, &x) && x <= nextafter(y, HUGE_VAL) && x >= nextafter(y, -HUGE_VAL);
}

static void test_json_values(void) {
    static const char *const reals[] = {
        "0", "-0.0", "1", "1.5", "1e-06", "160000", "160000.0", "0.1", "3.141592653589793", "1e22", "1e23", "1e-300",
        "1.7976931348623157e308", "2.2250738585072014e-308", "4.9406564584124654e-324", "9007199254740993",
        "123456789012345678901234567890", "0.000000000000000000000000000000123456789", "1e-400", "0e999999999999999999",
        "8.5e-05", "1000000000000000000000000000000000000000e-39", "6755399441055744.5"
    };
    static const char *const whole[] = { "0", "-1", "9223372036854775807", "-9223372036854775808" };
    static const char *const not_whole[] = { "9223372036854775808", "-9223372036854775809", "1.0", "1e3", "\"1\"",
                                             "99999999999999999999999" };
    static const char text[] = " {\"a\": [10, [20, 21], {\"x\": 30}, 40], \"b\\u0000c\": \"\\u0000\\ud83d\\ude00/\\/\", "
                               "\"\": null, \"n\": {}}\r\n";
    dspark__json j;
    int64_t n = 0;
    double x;
    size_t len = 0;
    const char *s;
    int good = 0, a;
    for (int i = 0; i < COUNT(reals); i++, dspark__json_free(&j))
        good += parse(&j, reals[i], strlen(reals[i])) == DSPARK_OK && real_is(&j, 0, reals[i]);
    ok(good == COUNT(reals), "JSON: %d of %d reals are strtod's, to one unit in the last place", good, COUNT(reals));
    ok(parse(&j, "1e309", 5) == DSPARK_OK && !dspark__json_real(&j, 0, &x), "JSON: 1e309 is no double");
    dspark__json_free(&j);
    good = 0;
    for (int i = 0; i < COUNT(whole); i++, dspark__json_free(&j))
        good += parse(&j, whole[i], strlen(whole[i])) == DSPARK_OK && dspark__json_integer(&j, 0, &n) &&
                n == strtoll(whole[i], NULL, 10);
    for (int i = 0; i < COUNT(not_whole); i++, dspark__json_free(&j))
        good += parse(&j, not_whole[i], strlen(not_whole[i])) == DSPARK_OK && !dspark__json_integer(&j, 0, &n);
    ok(good == COUNT(whole) + COUNT(not_whole),
       "JSON: a number is an integer if it is written as one and fits 64 bits");
    if (!ok(parse(&j, text, sizeof text - 1) == DSPARK_OK, "JSON: a document of every kind")) return;
    a = dspark__json_find(&j, 0, "a");
    ok(j.nodes[0].n == 4 && j.nodes[a].n == 4 && dspark__json_integer(&j, a + 1, &n) && n == 10 &&
       dspark__json_integer(&j, dspark__json_next(&j, a + 2), &n) == 0 &&
       dspark__json_integer(&j, dspark__json_find(&j, dspark__json_next(&j, a + 2), "x"), &n) && n == 30,
       "JSON: children follow their node, next skips them");
    ok(dspark__json_find(&j, 0, "x") < 0 && dspark__json_find(&j, a, "x") < 0 && dspark__json_find(&j, -1, "x") < 0,
       "JSON: find looks into its object only");
    s = dspark__json_string(&j, dspark__json_next(&j, a) + 1, &len);
    ok(len == 7 && s && !memcmp(s, "\0\xf0\x9f\x98\x80//", 8), "JSON: escapes, zeros and surrogate pairs are decoded");
    s = dspark__json_string(&j, dspark__json_next(&j, a), &len);
    ok(len == 3 && s && !memcmp(s, "b\0c", 3) && !dspark__json_string(&j, 0, &len) && !len, "JSON: keys are strings");
    dspark__json_free(&j);
}

/* ---- tokenizer files that are not what they should be ---- */

typedef struct { const char *from, *to; dspark_status status; const char *says; } edit;     /* of the small one */
static const edit edits[] = {
    { "\"type\":\"BPE\"", "\"type\":\"Unigram\"", DSPARK_ERROR_UNSUPPORTED, "model.type: expected BPE, found Unigram" },
    { "\"dropout\":null", "\"dropout\":0.1", DSPARK_ERROR_UNSUPPORTED, "model.dropout" },
    { "\"unk_token\":null", "\"unk_token\":\"<unk>\"", DSPARK_ERROR_UNSUPPORTED, "model.unk_token" },
    { "\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"", DSPARK_ERROR_UNSUPPORTED, "##" },
    { "\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"", DSPARK_ERROR_UNSUPPORTED, "</w>" },
    { "\"byte_fallback\":false", "\"byte_fallback\":true", DSPARK_ERROR_UNSUPPORTED, "model.byte_fallback" },
    { "\"ignore_merges\":false", "\"ignore_merges\":true", DSPARK_ERROR_UNSUPPORTED, "model.ignore_merges" },
    { "\"truncation\":null", "\"truncation\":{\"max_length\":5}", DSPARK_ERROR_UNSUPPORTED, "truncation" },
    { "\"padding\":null", "\"padding\":[]", DSPARK_ERROR_UNSUPPORTED, "padding" },
    { "\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", DSPARK_ERROR_UNSUPPORTED, "normalizer: expected Sequence, found NFC" },
    { "\"normalizer\":null", "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}", DSPARK_ERROR_UNSUPPORTED, "normalizer" },
    { "{1,3}", "{1,4}", DSPARK_ERROR_UNSUPPORTED, "expected \\p{N}{1,3}, found \\p{N}{1,4}" },
    { "|\\\\s+(?!\\\\S)", "", DSPARK_ERROR_UNSUPPORTED, "the pattern of a Split" },
    { "{\"Regex\":\"\\\\p{N}", "{\"String\":\"\\\\p{N}", DSPARK_ERROR_UNSUPPORTED, "found nothing" },
    { "\"Isolated\"", "\"Removed\"", DSPARK_ERROR_UNSUPPORTED, "expected Isolated, found Removed" },
    { "\"invert\":false", "\"invert\":true", DSPARK_ERROR_UNSUPPORTED, "invert" },
    { "\"type\":\"Split\"", "\"type\":\"Digits\"", DSPARK_ERROR_UNSUPPORTED, "found Digits" },
    { "\"use_regex\":false", "\"use_regex\":true", DSPARK_ERROR_UNSUPPORTED, "use_regex" },
    { "\"add_prefix_space\":false", "\"add_prefix_space\":true", DSPARK_ERROR_UNSUPPORTED, "add_prefix_space" },
    { "\"pretokenizers\":[", "\"pretokenizers\":[1,", DSPARK_ERROR_UNSUPPORTED, "pretokenizers" },
    { "\"pre_tokenizer\":", "\"pre_tokenizer\":null,\"x\":", DSPARK_ERROR_UNSUPPORTED, "pre_tokenizer: expected Sequence, found null" },
    { "\"post_processor\":{\"type\":\"ByteLevel\"", "\"post_processor\":{\"type\":\"TemplateProcessing\"", DSPARK_ERROR_UNSUPPORTED, "TemplateProcessing" },
    { "\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"Metaspace\"", DSPARK_ERROR_UNSUPPORTED, "Metaspace" },
    { "\"lstrip\":false", "\"lstrip\":true", DSPARK_ERROR_UNSUPPORTED, "added_tokens[].lstrip" },
    { "\"single_word\":false", "\"single_word\":true", DSPARK_ERROR_UNSUPPORTED, "added_tokens[].single_word" },
    { "\"model\":", "\"other\":", DSPARK_ERROR_FORMAT, "model: expected an object, found nothing" },
    { "\"vocab\":{", "\"vocab\":[],\"x\":{", DSPARK_ERROR_FORMAT, "model.vocab: expected an object" },
    { "\"merges\":[", "\"merges\":{},\"x\":[", DSPARK_ERROR_FORMAT, "model.merges: expected an array" },
    { "\"added_tokens\":[", "\"added_tokens\":7,\"x\":[", DSPARK_ERROR_FORMAT, "added_tokens: expected an array, found 7" },
    { "{\"id\":4095,", "{\"id\":4096,", DSPARK_ERROR_FORMAT, "expected ids without a gap, found no token 4095 below 4097" },
    { "{\"id\":4095,", "{\"id\":999999999999,", DSPARK_ERROR_FORMAT, "added_tokens[].id: expected an id below" },
    { "{\"id\":4095,", "{\"id\":4094,", DSPARK_ERROR_FORMAT, "one token an id" },
    { "{\"id\":4095,", "{\"id\":\"4095\",", DSPARK_ERROR_FORMAT, "added_tokens[].id" },
    { "{\"id\":4095,", "{", DSPARK_ERROR_FORMAT, "found nothing" },
    { "\"content\":\"<think>\"", "\"content\":\"\"", DSPARK_ERROR_FORMAT, "added_tokens[].content" },
    { "\"content\":\"<think>\"", "\"content\":null", DSPARK_ERROR_FORMAT, "added_tokens[].content" },
    { "\"content\":\"<think>\"", "\"content\":\"</think>\"", DSPARK_ERROR_FORMAT, "expected one id a token, found 4093 and 4094" },
    { "\"content\":\"<think>\"", "\"content\":\"the\"", DSPARK_ERROR_FORMAT, "expected one id a token" },
    { "{\"id\":1,\"content\":\"<", "{\"id\":1,\"content\":\"(", DSPARK_ERROR_FORMAT, "one token an id" },
    { "\"!\":2,", "\"!\":3,", DSPARK_ERROR_FORMAT, "model.vocab: expected one token an id" },
    { "\"!\":2,", "\"!\":-2,", DSPARK_ERROR_FORMAT, "model.vocab: expected an id below 4098, the number of tokens, found -2" },
    { "\"!\":2,", "\"!\":2.0,", DSPARK_ERROR_FORMAT, "found 2.0" },
    { "\"!\":2,", "\"\":2,", DSPARK_ERROR_FORMAT, "model.vocab: expected names that are not empty" },
    { "\"!\":2,", "\"!!!!!!!!\":2,", DSPARK_ERROR_FORMAT, "expected a token for every byte, found none for 0x21" },
    { "\"!\":2,", "\"\xe4\xb8\x80\":2,", DSPARK_ERROR_FORMAT, "model.vocab: expected byte-level text" },
    { "\"!\":2,", "\"\\\"\":2,", DSPARK_ERROR_FORMAT, "expected each key once" },
    { "\"merges\":[", "\"merges\":[[\"h\",\"e\"],", DSPARK_ERROR_FORMAT, "expected a new pair, found that of [0]" },
    { "\"merges\":[", "\"merges\":[[\"zqzq\",\"e\"],", DSPARK_ERROR_FORMAT, "model.merges[0]: expected both parts and the whole to be in the vocabulary, found no left part" },
    { "\"merges\":[", "\"merges\":[[\"e\",\"zqzq\"],", DSPARK_ERROR_FORMAT, "no right part" },
    { "\"merges\":[", "\"merges\":[[\"q\",\"~\"],", DSPARK_ERROR_FORMAT, "no whole" },
    { "\"merges\":[", "\"merges\":[\"h  e\",", DSPARK_ERROR_FORMAT, "model.merges[0]" },
    { "\"merges\":[", "\"merges\":[\"he\",", DSPARK_ERROR_FORMAT, "model.merges[0]" },
    { "\"merges\":[", "\"merges\":[\" h\",", DSPARK_ERROR_FORMAT, "left part" },
    { "\"merges\":[", "\"merges\":[[\"h\"],", DSPARK_ERROR_FORMAT, "model.merges[0]" },
    { "\"merges\":[", "\"merges\":[[\"h\",\"e\",\"y\"],", DSPARK_ERROR_FORMAT, "model.merges[0]" },
    { "\"merges\":[", "\"merges\":[[\"h\",1],", DSPARK_ERROR_FORMAT, "model.merges[0]" },
    { "\"merges\":[", "\"merges\":[null,", DSPARK_ERROR_FORMAT, "model.merges[0]" }
};

/* The text with the first `from` replaced; NULL: it does not occur. */
static char *replace(const char *text, size_t len, const char *from, const char *to, size_t *new_len) {
    const char *at = strstr(text, from);
    size_t before = at ? (size_t)(at - text) : 0;
    char *out = (char *)malloc(len + strlen(to) + 1);
    memcpy(out, text, before);
    memcpy(out + before, to, strlen(to));
    memcpy(out + before + strlen(to), text + before + strlen(from), len - before - strlen(from));
    *new_len = len + strlen(to) - strlen(from);
    if (!at) free(out);
    return at ? out : NULL;
}

static void test_malformed(void) {
    size_t len = 0, n = 0;
    char *text = read_file(SMALL, &len);
    dspark_tokenizer *t;
    int refused = 0, cuts = 0;
    for (int i = 0; text && i < COUNT(edits); i++) {
        const edit *e = &edits[i];
        char *changed = replace(text, len, e->from, e->to, &n);
        dspark_status status = changed ? dspark__tokenizer_read(&t, "t.json", changed, n) : DSPARK_OK;
        if (!ok(changed && status == e->status && !t && strstr(dspark_last_error(), "t.json: ") &&
                strstr(dspark_last_error(), e->says), "a tokenizer with %.60s is refused", e->to))
            printf("# %s\n# expected %s\n", changed ? dspark_last_error() : "nothing to replace", e->says);
        if (!status) dspark_tokenizer_close(t);
        free(changed);
    }
    for (n = 0; text && n < len; n += 997, cuts++)
        refused += dspark__tokenizer_read(&t, "t.json", text, n) == DSPARK_ERROR_FORMAT;
    ok(cuts && refused == cuts, "a tokenizer cut off at any of %d places is refused", cuts);
    ok(dspark_tokenizer_open(&t, "no/such/tokenizer.json") == DSPARK_ERROR_IO && !t &&
       strstr(dspark_last_error(), "no/such/tokenizer.json"), "a tokenizer that is not there is an IO error");
    ok(!blocks, "a tokenizer that is refused leaves no memory behind");
    free(text);
}

/* Every allocation in turn fails: no crash, no leak, MEMORY. */
static void test_memory(void) {
    static const dspark_message said[] = { { "system", "Be brief.", NULL, 0 }, { "user", "a <think> b", NULL, 0 } };
    dspark_tokenizer *t = NULL;
    int32_t ids[64];
    int calls = 0, good = 1, n = 0;
    dspark_status status;
    do {
        fail_in = ++calls;
        status = dspark_tokenizer_open(&t, SMALL);
        good &= !status || (status == DSPARK_ERROR_MEMORY && !blocks);
    } while (status && calls < 1000);
    fail_in = 0;
    ok(good && calls > 8, "opening: each of %d allocations may fail", calls - 1);
    if (status) return;
    good = blocks;
    for (calls = 1; calls < 100; calls++) {
        fail_in = calls;
        n = dspark_encode(t, "hello  world", 12, 0, ids, 64);
        if (n >= 0) break;
        if (n != -DSPARK_ERROR_MEMORY || blocks != good) good = -1;
    }
    ok(n > 0 && calls > 3 && blocks == good, "encoding: each of %d allocations may fail", calls - 1);
    for (calls = 1; calls < 100; calls++) {
        fail_in = calls;
        n = dspark_chat_encode(t, said, 2, NULL, DSPARK_PLAIN_TEXT, ids, 64);
        if (n >= 0) break;
        if (n != -DSPARK_ERROR_MEMORY || blocks != good) good = -1;
    }
    ok(n > 0 && calls > 3 && blocks == good, "chat: each of %d allocations may fail", calls - 1);
    fail_in = 0;
    dspark_tokenizer_close(t);
    dspark_tokenizer_close(NULL);
    ok(!blocks, "closing gives all memory back");
}

/* ---- golden cases ---- */

typedef struct {
    dspark__json j;
    int32_t *ids;
    int n;
} line;

/* The next line's JSON with its "ids"; 0 at the end. */
static int next_line(char **text, line *l) {
    size_t len = strcspn(*text, "\n");
    int list;
    int64_t id = 0;
    if (!len || dspark__json_parse(&l->j, "line", *text, len)) return 0;
    *text += len + ((*text)[len] == '\n');
    list = dspark__json_find(&l->j, 0, "ids");
    l->n = l->j.nodes[list].n;
    l->ids = (int32_t *)malloc((size_t)(l->n + 1) * sizeof *l->ids);
    for (int i = 0; i < l->n; i++) l->ids[i] = dspark__json_integer(&l->j, list + 1 + i, &id) ? (int32_t)id : -1;
    return 1;
}
static void free_line(line *l) {
    dspark__json_free(&l->j);
    free(l->ids);
}
static const char *field(const line *l, const char *key, size_t *len) {
    return dspark__json_string(&l->j, dspark__json_find(&l->j, 0, key), len);
}
static int field_is(const line *l, const char *key, const char *text) {
    return dspark__json_is(&l->j, dspark__json_find(&l->j, 0, key), text);
}

static size_t base64(const char *s, size_t len, char *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned bits = 0, held = 0;
    size_t n = 0;
    for (size_t i = 0; i < len && s[i] != '='; i++) {
        held = held << 6 | (unsigned)(strchr(digits, s[i]) - digits);
        if ((bits += 6) >= 8) out[n++] = (char)(held >> (bits -= 8));
    }
    return n;
}

/* Encoded as expected, whole and over cap; plain text decodes to itself, too, and names no added token. */
static int check_encode(const dspark_tokenizer *t, const line *l) {
    size_t len;
    const char *text = field(l, "text", &len);
    int32_t *ids = (int32_t *)malloc((len + 2) * sizeof *ids);
    char *back = (char *)malloc(len + 1);
    int n = dspark_encode(t, text, len, 0, ids, (int)len), half = l->n / 2;
    int same = n == l->n && !memcmp(ids, l->ids, (size_t)n * sizeof *ids);
    same = same && dspark_decode(t, ids, n, back, (int)len) == (int)len && !memcmp(back, text, len);
    ids[half] = -7;
    same = same && dspark_encode(t, text, len, 0, ids, half) == n && ids[half] == -7;
    same = same && dspark_encode(t, text, len, 0, NULL, 0) == n;
    n = dspark_encode(t, text, len, DSPARK_PLAIN_TEXT, ids, (int)len);
    same = same && dspark_decode(t, ids, n, back, (int)len) == (int)len && !memcmp(back, text, len);
    for (int i = 0; i < n; i++) same = same && !(t->tokens[ids[i]].kind & DSPARK__TOKEN_ADDED);
    free(ids), free(back);
    return same;
}

static int is_utf8(const char *s, int n) {
    uint32_t code;
    for (int i = 0, length; i < n; i += length)
        if ((length = dspark__utf8_read(s + i, (size_t)(n - i), &code)) <= 0) return 0;
    return 1;
}

/* Bytes pushed in pieces of this size (0: all at once): whole characters each time, text in the end. */
static int streams(const char *bytes, size_t n, int piece, const char *text, size_t len) {
    char *all = (char *)malloc(3 * n + 16), *one = (char *)malloc(3 * n + 16);
    size_t total = 0;
    int whole = 1, wrote;
    dspark_utf8 u = { { 0, 0, 0, 0 }, 0 };
    for (size_t i = 0; i < n; ) {
        int take = piece && (size_t)piece < n - i ? piece : (int)(n - i);
        wrote = dspark_utf8_push(&u, bytes + i, take, 0, one);
        whole = whole && wrote <= 3 * (take + 3) && is_utf8(one, wrote);
        memcpy(all + total, one, (size_t)wrote);
        total += (size_t)wrote, i += (size_t)take;
    }
    wrote = dspark_utf8_push(&u, NULL, 0, 1, one);
    memcpy(all + total, one, (size_t)wrote);
    total += (size_t)wrote;
    whole = whole && is_utf8(one, wrote) && total == len && !memcmp(all, text, len) && !u.n;
    free(all), free(one);
    return whole;
}

/* ids to bytes, and the bytes to text as they come */
static int decodes_to(const dspark_tokenizer *t, const int32_t *ids, int n, const line *l, const char *bytes_key,
                      const char *text_key) {
    size_t len, text_len;
    const char *coded = field(l, bytes_key, &len), *text = field(l, text_key, &text_len);
    char *expected = (char *)malloc(len + 1), *bytes = (char *)malloc(len + 1);
    int same;
    len = base64(coded, len, expected);
    bytes[len] = 7;
    same = dspark_decode(t, ids, n, bytes, (int)len) == (int)len && !memcmp(bytes, expected, len) && bytes[len] == 7;
    if (len) bytes[len / 2] = 7;
    same = same && dspark_decode(t, ids, n, bytes, (int)len / 2) == (int)len && (!len || bytes[len / 2] == 7);
    for (int piece = 0; piece < 6; piece++) same = same && streams(expected, len, piece, text, text_len);
    free(expected), free(bytes);
    return same;
}

static int check_decode(const dspark_tokenizer *t, const line *l) {
    int32_t *kept = (int32_t *)malloc((size_t)(l->n + 1) * sizeof *kept);
    int n = 0, same = decodes_to(t, l->ids, l->n, l, "bytes", "text");
    for (int i = 0; i < l->n; i++) if (!dspark_token_is_special(t, l->ids[i])) kept[n++] = l->ids[i];
    same = same && decodes_to(t, kept, n, l, "bytes_skip_special", "text_skip_special");
    free(kept);
    return same;
}

static void test_cases(const dspark_tokenizer *t, const char *name, int n_encode, int n_decode) {
    size_t len;
    char *text = read_file(GOLDEN "cases.jsonl", &len), *p = text;
    int n[2] = { 0, 0 }, passed[2] = { 0, 0 };
    line l;
    if (!ok(text, "cases.jsonl can be read")) return;
    for (; next_line(&p, &l); free_line(&l)) {
        int decode = field_is(&l, "kind", "decode"), same;
        if (!field_is(&l, "tokenizer", name)) continue;
        same = decode ? check_decode(t, &l) : check_encode(t, &l);
        n[decode]++, passed[decode] += same;
        if (!same) printf("# %s: %s\n", decode ? "decode" : "encode", field(&l, "name", NULL));
    }
    ok(n[0] == n_encode && passed[0] == n[0], "%s: %d of %d texts have Hugging Face's ids, and decode to themselves",
       name, passed[0], n[0]);
    ok(n[1] == n_decode && passed[1] == n[1], "%s: %d of %d lists of ids have its bytes, and stream in whole characters",
       name, passed[1], n[1]);
    free(text);
}

static void test_tokens(const dspark_tokenizer *t, const char *name, int size, const char *noise) {
    int len = -1, same = dspark_tokenizer_size(t) == size;
    int32_t ids[64], think = dspark_token_id(t, "<think>", 7);
    char text[64];
    for (int32_t id = 0; id < size; id++) {
        const char *bytes = dspark_token_bytes(t, id, &len);
        same = same && bytes && len > 0 && !bytes[len] && dspark_token_id(t, bytes, (size_t)len) == id;
    }
    ok(same, "%s: each of %d ids has its bytes, and they have that id", name, size);
    ok(!dspark_token_bytes(t, -1, &len) && !len && !dspark_token_bytes(t, size, &len) && !len &&
       dspark_token_id(t, "no such token", 13) == -1 && dspark_token_id(t, "", 0) == -1 &&
       !dspark_token_is_special(t, size) && !dspark_token_is_special(t, -1),
       "%s: other ids have no bytes, and other text no id", name);
    ok(dspark_token_is_special(t, 0) && !dspark_token_is_special(t, think) &&
       dspark_token_is_special(t, dspark_token_id(t, noise, strlen(noise))), "%s: special is what is flagged so", name);
    ok(dspark_encode(t, "<think>", 7, 0, ids, 64) == 1 && ids[0] == think, "%s: an added token is recognized", name);
    ok(dspark_encode(t, "<think>", 7, DSPARK_PLAIN_TEXT, ids, 64) > 1 && ids[0] != think,
       "%s: in plain text an added token is not recognized", name);
    ids[0] = think, ids[1] = size, ids[2] = -5, ids[3] = think;
    ok(dspark_decode(t, ids, 4, text, 64) == 14 && !memcmp(text, "<think><think>", 14),
       "%s: ids outside the vocabulary are left out", name);
    ok(dspark_encode(t, NULL, 0, 0, NULL, 0) == 0 && dspark_decode(t, NULL, 0, NULL, 0) == 0,
       "%s: an empty text has no ids, and no ids decode to an empty text", name);
}

static void test_classes(const dspark_tokenizer *t) {
    static const int bits[] = { DSPARK__LETTER, DSPARK__MARK, DSPARK__NUMBER, DSPARK__PUNCTUATION, DSPARK__SPACE };
    static const int expected[] = { 141028, 2501, 1911, 855 + 8514, 25 };
    for (int k = 0; k < COUNT(bits); k++) {
        int n = 0;
        for (int code = 0; code < DSPARK__CODES; code++) n += (t->classes[code] & bits[k]) != 0;
        ok(n == expected[k], "Unicode 16.0 has %d code points of the %s", expected[k],
           k == 0 ? "letters" : k == 1 ? "marks" : k == 2 ? "numbers" : k == 3 ? "punctuation and symbols" : "white space");
    }
}

/* What is not UTF-8, and random bytes, come back as they went in. */
static void test_bytes(const dspark_tokenizer *t) {
    enum { N = 4096 };
    char text[N], back[N];
    int32_t ids[N];
    uint32_t state = 1;
    int same = 1;
    for (int round = 0; round < 64; round++) {
        int n;
        for (int i = 0; i < N; i++) {
            state = state * 1664525 + 1013904223;
            text[i] = (char)(state >> 24 & (round % 2 ? 0xFF : 0xBF));
        }
        n = dspark_encode(t, text, N, 0, ids, N);
        same = same && n > 0 && n <= N && dspark_decode(t, ids, n, back, N) == N && !memcmp(text, back, N);
    }
    ok(same, "any bytes are encoded and decode to themselves");
}

/* Time of the processor: other programs take none of it. */
static double encode_ms(const dspark_tokenizer *t, const char *text, size_t n) {
    double best = 1e30;
    for (int i = 0; i < 5; i++) {
        clock_t start = clock();
        double ms;
        dspark_encode(t, text, n, 0, NULL, 0);
        ms = 1e3 * (double)(clock() - start) / CLOCKS_PER_SEC;
        if (ms < best) best = ms;
    }
    return best;
}

/* Quadratic work would take 100 times as long. */
static void test_long_word(const dspark_tokenizer *t) {
    enum { N = 100000 };
    char *text = (char *)malloc(N);
    uint32_t state = 1;
    double shorter, longer;
    for (int i = 0; i < N; i++) state = state * 1664525 + 1013904223, text[i] = "etaoinshrdlu"[(state >> 16) % 12];
    shorter = encode_ms(t, text, N / 10), longer = encode_ms(t, text, N);
    ok(longer < 40 * shorter,
       "a word ten times as long takes less than 40 times as long: %.1f, %.1f ms", shorter, longer);
    memset(text, ' ', N);
    shorter = encode_ms(t, text, N / 10), longer = encode_ms(t, text, N);
    ok(longer < 40 * shorter,
       "ten times as many spaces take less than 40 times as long: %.1f, %.1f ms", shorter, longer);
    free(text);
}

/* ---- chat ---- */

enum { MAX_MESSAGES = 16 };

static const char *string_of(const dspark__json *j, int object, const char *key) {
    return dspark__json_string(j, dspark__json_find(j, object, key), NULL);
}

static int read_chat(const line *l, dspark_message *m, dspark_chat_desc *form) {
    const dspark__json *j = &l->j;
    int list = dspark__json_find(j, 0, "messages"), options = dspark__json_find(j, 0, "options"), n = 0;
    memset(form, 0, sizeof *form);
    form->thinking = field_is(l, "thinking_mode", "thinking");
    form->drop_thinking = dspark__json_find(j, options, "drop_thinking") < 0;
    form->effort_max = dspark__json_is(j, dspark__json_find(j, options, "reasoning_effort"), "max");
    form->continued = dspark__json_find(j, options, "add_default_bos_token") >= 0;
    for (int i = list + 1; i < dspark__json_next(j, list) && n < MAX_MESSAGES; i = dspark__json_next(j, i), n++) {
        m[n].role = string_of(j, i, "role"), m[n].content = string_of(j, i, "content");
        m[n].reasoning = string_of(j, i, "reasoning_content");
        m[n].wo_eos = dspark__json_find(j, i, "wo_eos") >= 0;
    }
    return n;
}

static void test_chat(const dspark_tokenizer *t) {
    size_t len;
    char *text = read_file(GOLDEN "chat.jsonl", &len), *p = text, *prompt = (char *)malloc(1 << 16);
    int32_t *ids = (int32_t *)malloc((1 << 16) * sizeof *ids);
    int count = 0, prompts = 0, all_ids = 0, plain = 0;
    line l;
    for (; text && next_line(&p, &l); free_line(&l), count++) {
        dspark_message m[MAX_MESSAGES];
        dspark_chat_desc form;
        const char *expected = field(&l, "prompt", &len);
        int n = read_chat(&l, m, &form), n_ids, names_tokens = field_is(&l, "name", "tokens-in-content");
        int same = dspark_chat_format(m, n, &form, prompt, 1 << 16) == (int)len && !memcmp(prompt, expected, len);
        prompts += same && dspark_chat_format(m, n, &form, NULL, 0) == (int)len;
        if (!same) printf("# %s: %.*s\n", field(&l, "name", NULL), (int)len, prompt);
        n_ids = dspark_chat_encode(t, m, n, &form, 0, ids, 1 << 16);
        all_ids += n_ids == l.n && !memcmp(ids, l.ids, (size_t)n_ids * sizeof *ids);
        n_ids = dspark_chat_encode(t, m, n, &form, DSPARK_PLAIN_TEXT, ids, 1 << 16);
        same = n_ids == l.n && !memcmp(ids, l.ids, (size_t)n_ids * sizeof *ids);
        same = same != names_tokens && dspark_decode(t, ids, n_ids, prompt, 1 << 16) == (int)len && !memcmp(prompt, expected, len);
        plain += same && dspark_chat_encode(t, m, n, &form, DSPARK_PLAIN_TEXT, NULL, 0) == n_ids;
        if (!same) printf("# %s: plain text\n", field(&l, "name", NULL));
    }
    ok(count == 25 && prompts == count, "chat: %d of %d prompts are the release's", prompts, count);
    ok(all_ids == count, "chat: %d of %d prompts have the release's ids", all_ids, count);
    ok(plain == count,
       "chat: %d of %d have the same ids with plain contents, unless a content names tokens", plain, count);
    free(text), free(prompt), free(ids);
}

static void test_chat_parts(const dspark_tokenizer *small) {
    static const dspark_message all[] = {
        { "system", "Be brief.", NULL, 0 }, { "user", "<think>", NULL, 0 }, { "assistant", "<｜User｜>", "Why?", 0 },
        { "user", "</think>", NULL, 0 }
    };
    static const dspark_message wrong[] = { { "tool", "x", NULL, 0 }, { NULL, "x", NULL, 0 } };
    static const dspark_message reminder[] = { { "latest_reminder", NULL, NULL, 0 } };
    dspark_chat_desc form = { 1, 0, 0, 0 };
    int32_t ids[256], parts[256], user = dspark_token_id(small, "<｜User｜>", 12), think = dspark_token_id(small, "<think>", 7);
    int n = dspark_chat_encode(small, all, 4, &form, DSPARK_PLAIN_TEXT, ids, 256), m, k, users = 0, thinks = 0;
    for (int i = 0; i < n; i++) users += ids[i] == user, thinks += ids[i] == think;
    ok(n > 0 && users == 2 && thinks == 2, "chat: plain contents cannot name a token, the form's own are tokens");
    m = dspark_chat_encode(small, all, 3, &form, DSPARK_PLAIN_TEXT, parts, 256);
    form.continued = 1;
    k = dspark_chat_encode(small, all + 3, 1, &form, DSPARK_PLAIN_TEXT, parts + m, 256 - m);
    ok(m > 0 && k > 0 && m + k == n && !memcmp(ids, parts, (size_t)n * sizeof *ids),
       "chat: a conversation encoded in two parts has the ids of the whole");
    ids[3] = -7;
    ok(dspark_chat_encode(small, all, 4, NULL, DSPARK_PLAIN_TEXT, ids, 3) > 3 && ids[3] == -7, "chat: ids stay below cap");
    ok(dspark_chat_format(wrong, 1, NULL, NULL, 0) == -DSPARK_ERROR_ARGUMENT && strstr(dspark_last_error(), "found tool") &&
       dspark_chat_encode(small, wrong + 1, 1, NULL, 0, NULL, 0) == -DSPARK_ERROR_ARGUMENT, "chat: other roles are refused");
    ok(dspark_chat_encode(small, reminder, 1, NULL, 0, NULL, 0) == -DSPARK_ERROR_UNSUPPORTED &&
       strstr(dspark_last_error(), "<｜latest_reminder｜>"), "chat: a tokenizer without the form's tokens is refused");
}

static void test_utf8(void) {
    static const char text[] = "a\xc3\xa9\xe4\xb8\x80\xf0\x9f\x98\x80z", bad[] = "\xf0\x9f\x98" "a\xed\xa0\x80\xff\xc3";
    dspark_utf8 u = { { 0, 0, 0, 0 }, 0 };
    char out[64];
    int n = dspark_utf8_push(&u, "\xf0\x9f", 2, 0, out), good = n == 0;
    n = dspark_utf8_push(&u, "\x98\x80", 2, 0, out);
    good = good && n == 4 && !memcmp(out, "\xf0\x9f\x98\x80", 4);
    ok(good, "utf8: a character in two pieces comes with the second");
    good = 1;
    for (int piece = 0; piece < 12; piece++) {
        good = good && streams(text, sizeof text - 1, piece, text, sizeof text - 1);
        good = good && streams(bad, sizeof bad - 1, piece, "\xef\xbf\xbd" "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", 19);
    }
    ok(good, "utf8: each maximal invalid part is one U+FFFD, in pieces of any size");
}

static void test_tokenizer(const char *path, const char *name, int size, int n_encode, int n_decode, const char *noise) {
    dspark_tokenizer *t;
    if (!ok(dspark_tokenizer_open(&t, path) == DSPARK_OK, "%s: opens", name)) {
        printf("# %s\n", dspark_last_error());
        return;
    }
    test_tokens(t, name, size, noise);
    test_cases(t, name, n_encode, n_decode);
    test_bytes(t);
    test_long_word(t);
    if (!strcmp(name, "small")) test_classes(t), test_chat_parts(t);
    else test_chat(t);
    dspark_tokenizer_close(t);
}

static void test_no_tokenizer(void) {
    static const dspark_message hello = { "user", "hello", NULL, 0 };
    int32_t ids[8] = { 0 };
    char text[8];
    ok(dspark_encode(NULL, "hello", 5, 0, ids, 8) == -DSPARK_ERROR_ARGUMENT &&
       dspark_decode(NULL, ids, 1, text, 8) == -DSPARK_ERROR_ARGUMENT &&
       dspark_chat_encode(NULL, &hello, 1, NULL, 0, ids, 8) == -DSPARK_ERROR_ARGUMENT,
       "a model's tokenizer that is NULL is refused");
}

int main(void) {
    int have_xz = system("xz --version >/dev/null 2>&1") == 0;
    test_json_errors();
    test_json_values();
    test_no_tokenizer();
    test_utf8();
    test_malformed();
    test_memory();
    test_tokenizer(SMALL, "small", 4096, 223, 60, "<｜noise｜>");
    if (!have_xz) skip("xz is missing", "deepseek-v4: the tokenizer's and the chat form's cases hold");
    else if (ok(system("mkdir -p build && xz -dc " GOLDEN "deepseek-v4/tokenizer.json.xz >" LARGE) == 0,
                "deepseek-v4: tokenizer.json is unpacked"))
        test_tokenizer(LARGE, "deepseek-v4", 129280, 548, 60, "<｜place▁holder▁no▁799｜>");
    ok(!blocks, "all memory is given back");
    return tap_done();
}
