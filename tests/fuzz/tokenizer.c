/* A small tokenizer.json with the input spliced in: its first bytes say where and over how much, the rest is put
   there. What opens encodes the input, with and without added tokens, and must give it back. See `make fuzz`. */
#define DSPARK_IMPLEMENTATION
#include "dspark.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int make_file(char *out, size_t room) {
    int n = 0, others = 0x100;
#define ADD(...) (n += snprintf(out + n, room - (size_t)n, __VA_ARGS__))
    ADD("{\"added_tokens\":[{\"id\":260,\"content\":\"<a>\",\"special\":true},{\"id\":261,\"content\":\"<a>b\"}],"
        "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[");
    for (int i = 0; i < 3; i++) {
        static const char *const patterns[] = {
            "\\\\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            ("[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?"
             "[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+") };
        ADD("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},\"behavior\":\"Isolated\"},", patterns[i]);
    }
    ADD("{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]},\"decoder\":{\"type\":\"ByteLevel\"},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"ab\":256,\"abc\":257,\"bc\":258,\"aa\":259");
    for (int b = 0; b < 256; b++)
        ADD(",\"\\u%04x\":%d", (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD) ? b : others++, b);
    ADD("},\"merges\":[\"b c\",\"a b\",[\"a\",\"a\"],\"a bc\"]}}");
    return n;
}

static void use(const dspark_tokenizer *t, const char *text, size_t len, int flags) {
    int32_t *ids = (int32_t *)malloc((len + 1) * sizeof *ids);
    char *back = (char *)malloc(3 * len + 9);
    dspark_utf8 u = { { 0, 0, 0, 0 }, 0 };
    int n = dspark_encode(t, text, len, flags, ids, (int)len);
    if (n < 0 || n > (int)len || dspark_decode(t, ids, n, back, (int)len) != (int)len || memcmp(text, back, len)) abort();
    if (dspark_utf8_push(&u, text, (int)len, 1, back) > 3 * (int)len + 9) abort();
    free(ids), free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char file[16384];
    static int len;
    char *text;
    size_t at, cut, n;
    dspark_tokenizer *t;
    if (!len) len = make_file(file, sizeof file);
    if (size < 4) return 0;
    at = (data[0] | (size_t)data[1] << 8) % (size_t)(len + 1);
    cut = (data[2] | (size_t)data[3] << 8) % ((size_t)len - at + 1);
    data += 4, size -= 4, n = (size_t)len - cut + size;
    text = (char *)malloc(n + 1);
    memcpy(text, file, at);
    memcpy(text + at, data, size);
    memcpy(text + at + size, file + at + cut, (size_t)len - at - cut);
    if (!dspark__tokenizer_read(&t, "fuzz", text, n)) {
        for (int flags = 0; flags < 2; flags++) use(t, (const char *)data, size, flags), use(t, text, n, flags);
        dspark_tokenizer_close(t);
    }
    free(text);
    return 0;
}
