/* >>checkpoint: what opens, what is refused and with which words, memory. Variations of golden/a are served from
   memory through dspark_files, each in a block of its own size, so that a sanitizer sees every byte read too far. */
#include <stddef.h>
static size_t calls, fail_at, live;      /* allocations so far, the one that fails (0: none), blocks not yet freed */
static void *test_realloc(void *p, size_t n);
static void test_free(void *p);
#define DSPARK_MALLOC(n) test_realloc(NULL, n)
#define DSPARK_REALLOC(p, n) test_realloc(p, n)
#define DSPARK_FREE(p) test_free(p)
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "tap.h"

static void *test_realloc(void *p, size_t n) {
    if (++calls == fail_at) return NULL;
    live += !p;
    return realloc(p, n);
}
static void test_free(void *p) { live--, free(p); }

/* ---- a directory in memory */

typedef struct { const char *name; char *bytes; size_t n; } file;
typedef struct { file files[8]; int n, maps, unmaps; } directory;

static dspark_status serve(void *user, const char *path, const void **data, uint64_t *size) {
    directory *d = (directory *)user;
    for (int i = 0; i < d->n; i++) {
        if (strcmp(strrchr(path, '/') + 1, d->files[i].name)) continue;
        *data = d->files[i].bytes, *size = d->files[i].n;
        d->maps++;
        return DSPARK_OK;
    }
    return DSPARK_ERROR_IO;
}

static void take_back(void *user, const void *data, uint64_t size) {
    directory *d = (directory *)user;
    for (int i = 0; i < d->n; i++) d->unmaps += d->files[i].bytes == data && d->files[i].n == size;
}

static file *find_file(directory *d, const char *name) {
    int i = 0;
    while (i < d->n && strcmp(d->files[i].name, name)) i++;
    return &d->files[i];
}

/* Takes bytes over; NULL: removes the file's name. */
static void put(directory *d, const char *name, char *bytes, size_t n) {
    file *f = find_file(d, name);
    if (f == &d->files[d->n]) d->n++;
    else free(f->bytes);
    f->name = bytes ? name : "", f->bytes = bytes, f->n = n;
}

static void put_text(directory *d, const char *name, const char *text) {
    size_t n = strlen(text);
    put(d, name, (char *)memcpy(malloc(n + !n), text, n), n);
}

static void put_read(directory *d, const char *name, const char *path) {
    FILE *f = fopen(path, "rb");
    long n = f && !fseek(f, 0, SEEK_END) ? ftell(f) : 0;
    char *bytes = (char *)malloc((size_t)n + !n);
    if (!f || (rewind(f), fread(bytes, 1, (size_t)n, f) != (size_t)n)) printf("Bail out! cannot read %s\n", path), exit(1);
    fclose(f);
    put(d, name, bytes, (size_t)n);
}

static void copy_directory(directory *to, const directory *from) {
    memset(to, 0, sizeof *to);
    for (int i = 0; i < from->n; i++)
        put(to, from->files[i].name, (char *)memcpy(malloc(from->files[i].n), from->files[i].bytes, from->files[i].n),
            from->files[i].n);
}

static void drop(directory *d) {
    for (int i = 0; i < d->n; i++) free(d->files[i].bytes);
}

static dspark_status open_directory(dspark__checkpoint *ck, directory *d) {
    dspark_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.files.map = serve, desc.files.unmap = take_back, desc.files.user = d;
    return dspark__checkpoint_open(ck, "mem", &desc);
}

/* ---- replacing text in a file, or in its header */

/* Replaces find in bytes [before, after) of f, once or everywhere; returns how often. */
static int substitute(file *f, size_t before, size_t after, const char *find, const char *replace, int all) {
    size_t nf = strlen(find), nr = strlen(replace), n = 0;
    char *out = (char *)malloc(f->n + (all ? f->n / nf : 1) * nr + 1), *exact;
    int found = 0;
    for (size_t i = 0; i < f->n;) {
        int here = i >= before && i + nf <= after && !memcmp(f->bytes + i, find, nf) && (all || !found);
        if (here) memcpy(out + n, replace, nr), n += nr, i += nf, found++;
        else out[n++] = f->bytes[i++];
    }
    exact = (char *)memcpy(malloc(n + !n), out, n);
    free(out), free(f->bytes);
    f->bytes = exact, f->n = n;
    return found;
}

static int substitute_header(file *f, const char *find, const char *replace, int all) {
    uint64_t length;
    size_t was = f->n;
    int found;
    memcpy(&length, f->bytes, 8);
    found = substitute(f, 8, 8 + (size_t)length, find, replace, all);
    length += f->n, length -= was;
    memcpy(f->bytes, &length, 8);
    return found;
}

enum { CONFIG, HEADER, HEADER_ALL, MODEL, GENERATION, CALIBRATION, INDEX };    /* where; MODEL and after: all of the file */
static const char *const names[] = { "config.json", "model.safetensors", "model.safetensors", "model.safetensors",
                                     "generation_config.json", "calibration.json", "model.safetensors.index.json" };

typedef struct {
    int where;
    const char *find, *replace;         /* find NULL: replace is the whole file */
    const char *key, *found;            /* both are in the message */
    dspark_status status;               /* 0: FORMAT */
} bad;

#define U DSPARK_ERROR_UNSUPPORTED
#define ROWS(rows) "{\"format\": \"dspark-calibration-1\", \"rows\": " rows "}"
#define FIVES "5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,5,"
#define ROW(verify, band, sts) "{\"verify\": \"" verify "\", \"temperature\": " band ", \"sts\": " sts "}"
#define T(name, type, shape) "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape
static const bad cases[] = {
    /* JSON */
    { CONFIG, NULL, "", "config.json", "found the end", 0 },
    { CONFIG, NULL, "[]", "config.json", "found an array", 0 },
    { CONFIG, "{", "", "config.json", "expected", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": 512, \"vocab_size\": 512", "config.json", "vocab_size", 0 },
    /* another family */
    { CONFIG, "deepseek_v4\"", "qwen3\"", "model_type: expected deepseek_v4", "found qwen3", U },
    { CONFIG, "\"silu\"", "\"gelu\"", "hidden_act", "found gelu", U },
    { CONFIG, "\"sqrtsoftplus\"", "\"softmax\"", "scoring_func", "found softmax", U },
    { CONFIG, "\"noaux_tc\"", "\"greedy\"", "topk_method", "found greedy", U },
    { CONFIG, "\"norm_topk_prob\": true", "\"norm_topk_prob\": false", "norm_topk_prob", "found false", U },
    { CONFIG, "\"attention_bias\": false", "\"attention_bias\": true", "attention_bias", "found true", U },
    { CONFIG, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "tie_word", "found true", U },
    { CONFIG, "\"num_key_value_heads\": 1", "\"num_key_value_heads\": 2", "num_key_value_heads", "found 2", U },
    { CONFIG, "\"yarn\"", "\"linear\"", "rope_scaling.type: expected yarn", "found linear", U },
    /* numbers that are none, or no sizes */
    { CONFIG, "\"vocab_size\"", "\"vocab\"", "vocab_size: expected an integer", "found nothing", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": null", "vocab_size", "found nothing", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": \"512\"", "vocab_size", "512", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": 0", "vocab_size", "found 0", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": -512", "vocab_size", "found -512", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": 512.0", "vocab_size", "found 512.0", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": 1e300", "vocab_size", "found 1e300", 0 },
    { CONFIG, "\"vocab_size\": 512", "\"vocab_size\": 18446744073709552128", "vocab_size", "found 184467", 0 },
    { CONFIG, "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 300", "num_hidden_layers", "found 300", 0 },
    { CONFIG, "\"head_dim\": 128", "\"head_dim\": 32", "head_dim: expected at least qk_rope", "found 32", 0 },
    { CONFIG, "\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 63", "qk_rope_head_dim: expected an even", "63", 0 },
    { CONFIG, "\"o_groups\": 2", "\"o_groups\": 3", "o_groups: expected a divisor of num_attention", "found 3", 0 },
    { CONFIG, "\"index_head_dim\": 64", "\"index_head_dim\": 96", "index_head_dim: expected a power", "found 96", 0 },
    { CONFIG, "\"index_head_dim\": 64", "\"index_head_dim\": 32", "index_head_dim: expected at least", "found 32", 0 },
    { CONFIG, "\"index_head_dim\": 64", "\"index_head_dim\": 16", "index_head_dim", "found 16", 0 },
    { CONFIG, "\"num_experts_per_tok\": 3", "\"num_experts_per_tok\": 9", "num_experts_per_tok", "found 9", 0 },
    { CONFIG, "\"n_routed_experts\": 8", "\"n_routed_experts\": 60000", "n_routed_experts", "found 60000", 0 },
    { CONFIG, "\"num_hash_layers\": 1", "\"num_hash_layers\": 4", "num_hash_layers", "found 4", 0 },
    { CONFIG, "\"hc_mult\": 4", "\"hc_mult\": 9", "hc_mult", "found 9", 0 },
    { CONFIG, "\"hc_sinkhorn_iters\": 20", "\"hc_sinkhorn_iters\": 2000000000", "hc_sinkhorn_iters", "2000000000", 0 },
    { CONFIG, "\"sliding_window\": 32", "\"sliding_window\": 0", "sliding_window", "found 0", 0 },
    { CONFIG, "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 0", "rms_norm_eps", "found 0", 0 },
    { CONFIG, "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"x\"", "rms_norm_eps", "found x", 0 },
    { CONFIG, "\"hc_eps\": 1e-06", "\"hc_eps\": 1e999", "hc_eps", "found 1e999", 0 },
    { CONFIG, "\"swiglu_limit\": 10.0", "\"swiglu_limit\": -10.0", "swiglu_limit", "found -10.0", 0 },
    { CONFIG, "\"rope_theta\": 10000", "\"rope_theta\": 1", "rope_theta", "found 1", 0 },
    { CONFIG, "\"rope_scaling\": {", "\"rope_scaling\": 16, \"x\": {", "rope_scaling", "found 16", 0 },
    { CONFIG, "\"factor\": 16", "\"factor\": 0", "rope_scaling.factor", "found 0", 0 },
    { CONFIG, "\"original_max_position_embeddings\"", "\"x\"", "rope_scaling.original_max", "found nothing", 0 },
    { CONFIG, "\"bos_token_id\": 0", "\"bos_token_id\": 512", "bos_token_id", "found 512", 0 },
    { CONFIG, "\"eos_token_id\": 1", "\"eos_token_id\": 512", "eos_token_id", "found 512", 0 },
    { CONFIG, "\"eos_token_id\": 1", "\"eos_token_id\": [1, [2]]", "eos_token_id", "found an array of 1", 0 },
    { CONFIG, "\"eos_token_id\": 1", "\"eos_token_id\": [1,2,3,4,5,6,7,8,9]", "eos_token_id", "an array of 9", U },
    /* layers and stages */
    { CONFIG, "\"compress_ratios\"", "\"x\"", "compress_ratios: expected an array of 3", "found nothing", 0 },
    { CONFIG, "  0,\n  4,\n  128,\n  0,\n  0\n", "0, 4", "compress_ratios", "found an array of 2", 0 },
    { CONFIG, "  0,\n  4,", "  1,\n  4,", "compress_ratios[0]", "found 1", 0 },
    { CONFIG, "  0,\n  4,", "  -4,\n  4,", "compress_ratios[0]", "found -4", 0 },
    { CONFIG, "  0,\n  4,", "  [0, 0],\n  4,", "compress_ratios[0]", "found an array of 2", 0 },
    { CONFIG, "128,\n  0,", "128,\n  4,", "compress_ratios[3]", "found 4", 0 },
    { CONFIG, "128,\n  0,", "128,", "compress_ratios: expected 3 for the layers and 2 for the draft", "found 4", 0 },
    { CONFIG, "128,\n  0,", "128,\n  0, 0,", "compress_ratios: expected 3 for the layers and 2 for the draft", "found 6", 0 },
    { CONFIG, "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "for the layers and 2 for the draft", "found 5", 0 },
    { CONFIG, "  0,\n  4,", "  4,\n  4,", "layers.0.attn.compressor.wkv.weight", "no such tensor", 0 },
    { CONFIG, "  128,", "  64,", "layers.2.attn.compressor.ape: expected F32 [64, 128]", "found F32 [128, 128]", 0 },
    { CONFIG, "  128,", "  4,", "layers.2.attn.compressor.wkv.weight: expected BF16 [256, 256]", "[128, 256]", 0 },
    { CONFIG, "\"num_hash_layers\": 1", "\"num_hash_layers\": 0", "layers.0.ffn.gate.bias", "no such tensor", 0 },
    { CONFIG, "\"num_hash_layers\": 1", "\"num_hash_layers\": 2",
      "layers.1.ffn.gate.tid2eid: expected I64/I32 [512, 3]", "no such tensor", 0 },
    /* the drafter */
    { CONFIG, "\"dspark_block_size\": 5", "\"dspark_block_size\": 17", "dspark_block_size", "found 17", 0 },
    { CONFIG, "\"dspark_block_size\"", "\"x\"", "dspark_block_size", "found nothing", 0 },
    { CONFIG, "\"dspark_noise_token_id\": 511", "\"dspark_noise_token_id\": 512", "dspark_noise_token", "found 512", 0 },
    { CONFIG, "ids\": [\n  0,\n  1,\n  2\n ]", "ids\": [0, 1, 3]", "dspark_target_layer_ids[2]", "found 3", 0 },
    { CONFIG, "ids\": [\n  0,\n  1,\n  2\n ]", "ids\": [0, 2, 1]", "ids[2]: expected layers in ascending", "found 1", 0 },
    { CONFIG, "ids\": [\n  0,\n  1,\n  2\n ]", "ids\": []", "dspark_target_layer_ids", "found an array of 0", 0 },
    { CONFIG, "ids\": [\n  0,\n  1,\n  2\n ]", "ids\": [0, 1]", "mtp.0.main_proj.weight: expected F8_E4M3 [256, 512]",
      "found F8_E4M3 [256, 768]", 0 },
    { CONFIG, "\"dspark_markov_rank\": 64", "\"dspark_markov_rank\": 0",
      "dspark_markov_rank: expected that of the last stage's Markov head", "found 0", 0 },
    { CONFIG, "\"dspark_markov_rank\": 64", "\"dspark_markov_rank\": 32",
      "mtp.1.markov_head.markov_w1.weight: expected BF16 [512, 32]", "found BF16 [512, 64]", 0 },
    { HEADER, "mtp.0.main_norm.weight", "mtp.0.e_proj.weight", "mtp.0.e_proj.weight", "found an MTP-1 head", U },
    { HEADER, "mtp.1.norm.weight", "mtp.0.hnorm.weight", "mtp.0.hnorm.weight", "found an MTP-1 head", U },
    { HEADER_ALL, "\"mtp.1.", "\"mtp.2.", "expected stages 0 to 2", "none of the tensors of mtp.1", 0 },
    { HEADER, "mtp.1.norm.weight", "mtp.99999999999.norm.weight", "stages 0 to 256", "none of the tensors of mtp.2", 0 },
    { HEADER, "mtp.0.main_proj.weight", "x", "mtp.0.main_proj.weight: expected F32/BF16/F16/F8_E4M3/I8 [256, 768]",
      "no such tensor", 0 },
    { HEADER, "mtp.1.markov_head.markov_w1.weight", "x", "mtp.1.markov_head.markov_w1.weight", "no such tensor", 0 },
    { HEADER, T("mtp.1.markov_head.markov_w2.weight", "BF16", "[512,64]"),
      T("mtp.1.markov_head.markov_w2.weight", "F8_E4M3", "[512,128]"),
      "mtp.1.markov_head.markov_w2.weight: expected F32/BF16/F16 [512, 64]", "found F8_E4M3 [512, 128]", 0 },
    { HEADER, T("mtp.1.confidence_head.proj.weight", "BF16", "[1,320]"),
      T("mtp.1.confidence_head.proj.weight", "F8_E4M3", "[1,640]"),
      "mtp.1.confidence_head.proj.weight: expected F32/BF16/F16 [1, 320]", "found F8_E4M3 [1, 640]", 0 },
    { HEADER, "mtp.1.ffn.gate.bias", "x", "mtp.1.ffn.gate.bias", "no such tensor", 0 },
    /* the header as JSON */
    { MODEL, NULL, "1234567", "header: expected 8 bytes", "found 7", 0 },
    { MODEL, NULL, "\3\0\0\0", "header: expected 8 bytes", "found 1", 0 },
    { MODEL, NULL, "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "model.safetensors", "Git LFS", 0 },
    { MODEL, NULL, "AAAAAAAA{}", "header: expected at most 2 bytes", "4702111234474983745", 0 },
    { HEADER, "{", "[", "model.safetensors", "expected", 0 },
    { HEADER, "{\"__metadata__\"", "{}{\"__metadata__\"", "model.safetensors", "expected the end", 0 },
    { HEADER, "\"head.weight\"", "\"embed.weight\"", "model.safetensors", "embed.weight", 0 },
    { HEADER, "\"head.weight\"", "\"em\\u0062ed.weight\"", "model.safetensors", "embed.weight", 0 },
    { HEADER, "\"__metadata__\":{\"format\":\"pt\"}", "\"x\":1", "x: dtype", "found nothing", 0 },
    { HEADER, "\"__metadata__\":{\"format\":\"pt\"}", "\"x\":{\"dtype\":\"I8\"}", "x: shape", "found nothing", 0 },
    /* an entry of it */
    { HEADER, T("embed.weight", "BF16", "[512"), T("embed.weight", "F7", "[512"), "embed.weight: dtype", "found F7", 0 },
    { HEADER, T("embed.weight", "BF16", "[512"), T("embed.weight", "bf16", "[512"), "embed.weight: dtype", "bf16", 0 },
    { HEADER, "\"dtype\":\"BF16\",\"shape\":[512", "\"dtype\":16,\"shape\":[512", "embed.weight: dtype", "found 16", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":131072", "embed.weight: shape", "found 131072", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[-512,-256]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[512.0,256]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[[512],256]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[4294967296,4294967296]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[9223372036854775807,2,0]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[18446744073709551616]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[288230376151711744,32]", "embed.weight: shape", "found an array", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[512,255]", "expected 261120 bytes of BF16 [512, 255]", "found 262144", 0 },
    { HEADER, "\"shape\":[512,256]", "\"shape\":[]", "embed.weight: data_offsets: expected 2 bytes of BF16 []", "262144", 0 },
    { HEADER, T("hc_head_base", "F32", "[4]"), T("hc_head_base", "F4", "[33]"), "expected 16 bytes of F4 [33]", "16", 0 },
    { HEADER, "[0,262144]", "[0]", "embed.weight: data_offsets", "found [-1, -1]", 0 },
    { HEADER, "[0,262144]", "[0,262144,0]", "embed.weight: data_offsets", "found [-1, -1]", 0 },
    { HEADER, "[0,262144]", "[-2,262142]", "embed.weight: data_offsets", "found [-2, 262142]", 0 },
    { HEADER, "[0,262144]", "[262144,0]", "embed.weight: data_offsets", "found [262144, 0]", 0 },
    { HEADER, "[0,262144]", "[\"0\",262144]", "embed.weight: data_offsets", "found [-1, -1]", 0 },
    { HEADER, "[0,262144]", "[6469294,6731438]", "embed.weight: data_offsets", "found [6469294, 6731438]", 0 },
    { HEADER, "[0,262144]", "[9223372036854775807,9223372036855037951]", "embed.weight: data_offsets", "-1]", 0 },
    { HEADER, "[0,262144]", "[1,262145]", "hc_head_base: data_offsets", "those of embed.weight", 0 },
    { HEADER, "[278548,540692]", "[0,262144]", "data_offsets: expected bytes of its own", "found those of", 0 },
    /* tensors against the config */
    { HEADER, "\"embed.weight\"", "\"model.embed_tokens.weight\"", "embed.weight", "no such tensor", 0 },
    { HEADER, "\"head.weight\"", "\"lm_head.weight\"", "head.weight", "no such tensor", 0 },
    { HEADER, "\"norm.weight\"", "\"x\"", "norm.weight: expected F32/BF16/F16 [256]", "no such tensor", 0 },
    { HEADER, "\"hc_head_scale\"", "\"x\"", "hc_head_scale: expected F32/BF16/F16 [1]", "no such tensor", 0 },
    { HEADER, T("hc_head_scale", "F32", "[1]"), T("hc_head_scale", "F32", "[]"), "expected F32 [1]", "found F32 []", 0 },
    { HEADER, T("norm.weight", "BF16", "[256]"), T("norm.weight", "I16", "[256]"),
      "norm.weight: expected F32/BF16/F16 [256]", "found I16 [256]", 0 },
    { HEADER, T("norm.weight", "BF16", "[256]"), T("norm.weight", "F32", "[128]"), "expected F32 [256]", "F32 [128]", 0 },
    { HEADER, T("norm.weight", "BF16", "[256]"), T("norm.weight", "BF16", "[1,256]"), "BF16 [256]", "BF16 [1, 256]", 0 },
    { HEADER, T("embed.weight", "BF16", "[512,256]"), T("embed.weight", "BF16", "[256,512]"),
      "embed.weight: expected BF16 [512, 256]", "found BF16 [256, 512]", 0 },
    { HEADER, T("embed.weight", "BF16", "[512,256]"), T("embed.weight", "BF16", "[2,2,2,8,8,256]"),
      "embed.weight: expected BF16 [512, 256]", "found BF16 [2, 2, 2, 8, ...]", 0 },
    { HEADER, T("embed.weight", "BF16", "[512,256]"), T("embed.weight", "BF16", "[512,256,1]"),
      "embed.weight: expected BF16 [512, 256]", "found BF16 [512, 256, 1]", 0 },
    { HEADER, T("embed.weight", "BF16", "[512,256]"), T("embed.weight", "F8_E4M3", "[512,512]"),
      "embed.weight: expected F32/BF16/F16 [512, 256]", "found F8_E4M3 [512, 512]", 0 },
    { HEADER, T("layers.0.attn.wq_a.weight", "F8_E4M3", "[128,256]"), T("layers.0.attn.wq_a.weight", "F8_E5M2", "[128,256]"),
      "layers.0.attn.wq_a.weight: expected F32/BF16/F16/F8_E4M3/I8 [128, 256]", "found F8_E5M2 [128, 256]", 0 },
    { HEADER, T("layers.0.attn.wq_a.weight", "F8_E4M3", "[128,256]"), T("layers.0.attn.wq_a.weight", "I8", "[128,256]"),
      "layers.0.attn.wq_a.weight: expected I8 [128, 128]", "found I8 [128, 256]", 0 },
    { HEADER, T("layers.0.attn.wq_a.weight", "F8_E4M3", "[128,256]"), T("layers.0.attn.wq_a.weight", "BF16", "[128,128]"),
      "layers.0.attn.wq_a.weight: expected BF16 [128, 256]", "found BF16 [128, 128]", 0 },
    { HEADER, "layers.0.attn.wq_a.scale", "x", "layers.0.attn.wq_a.scale: expected F8_E8M0 [1, 2]", "no such tensor", 0 },
    { HEADER, T("layers.0.attn.wq_a.scale", "F8_E8M0", "[1,2]"), T("layers.0.attn.wq_a.scale", "U8", "[1,2]"),
      "layers.0.attn.wq_a.scale: expected F8_E8M0 [1, 2]", "found U8 [1, 2]", 0 },
    { HEADER, T("layers.0.attn.wq_a.scale", "F8_E8M0", "[1,2]"), T("layers.0.attn.wq_a.scale", "F8_E8M0", "[2,1]"),
      "layers.0.attn.wq_a.scale: expected F8_E8M0 [1, 2]", "found F8_E8M0 [2, 1]", 0 },
    { HEADER, "layers.2.attn.wq_a.scale", "head.scale", "head.scale: expected none beside BF16", "found F8_E8M0 [1, 2]", 0 },
    { HEADER, "layers.0.ffn.experts.7.w2.weight", "x", "layers.0.ffn.experts.7.w2.weight", "no such tensor", 0 },
    { HEADER, T("layers.0.ffn.experts.7.w2.weight", "I8", "[256,64]"), T("layers.0.ffn.experts.7.w2.weight", "I8", "[64,256]"),
      "layers.0.ffn.experts.7.w2.weight: expected I8 [256, 64]", "found I8 [64, 256]", 0 },
    { HEADER, T("layers.0.ffn.experts.7.w2.scale", "F8_E8M0", "[256,4]"), T("layers.0.ffn.experts.7.w2.scale", "F8_E8M0", "[4,256]"),
      "layers.0.ffn.experts.7.w2.scale: expected F8_E8M0 [256, 4]", "found F8_E8M0 [4, 256]", 0 },
    { HEADER, T("layers.0.ffn.gate.tid2eid", "I64", "[512,3]"), T("layers.0.ffn.gate.tid2eid", "F64", "[512,3]"),
      "layers.0.ffn.gate.tid2eid: expected I64/I32 [512, 3]", "found F64 [512, 3]", 0 },
    { HEADER, T("layers.0.ffn.gate.tid2eid", "I64", "[512,3]"), T("layers.0.ffn.gate.tid2eid", "I64", "[3,512]"),
      "layers.0.ffn.gate.tid2eid: expected I64 [512, 3]", "found I64 [3, 512]", 0 },
    { CONFIG, "\"hidden_size\": 256", "\"hidden_size\": 128", "embed.weight: expected BF16 [512, 128]", "[512, 256]", 0 },
    { CONFIG, "\"hc_mult\": 4", "\"hc_mult\": 2", "hc_head_fn: expected F32 [2, 512]", "found F32 [4, 1024]", 0 },
    { CONFIG, "\"q_lora_rank\": 128", "\"q_lora_rank\": 64", "layers.0.attn.wq_a.weight", "found F8_E4M3 [128, 256]", 0 },
    { CONFIG, "\"o_lora_rank\": 128", "\"o_lora_rank\": 64", "layers.0.attn.wo_a.weight: expected F8_E4M3 [128, 256]", "", 0 },
    { CONFIG, "\"num_attention_heads\": 4", "\"num_attention_heads\": 8", "layers.0.attn.wq_b.weight", "[512, 128]", 0 },
    { CONFIG, "\"index_n_heads\": 8", "\"index_n_heads\": 4", "layers.1.attn.indexer.wq_b.weight", "[512, 128]", 0 },
    { CONFIG, "\"n_shared_experts\": 1", "\"n_shared_experts\": 2", "layers.0.ffn.shared_experts.w1.weight", "[128, 256]", 0 },
    { CONFIG, "\"n_routed_experts\": 8", "\"n_routed_experts\": 9", "layers.0.ffn.gate.weight: expected BF16 [9, 256]", "[8", 0 },
    { CONFIG, "\"n_routed_experts\": 8", "\"n_routed_experts\": 7", "layers.0.ffn.gate.weight: expected BF16 [7, 256]", "[8", 0 },
    /* generation_config.json */
    { GENERATION, NULL, "{", "generation_config.json", "the end", 0 },
    { GENERATION, NULL, "{\"temperature\": -1}", "generation_config.json: temperature", "found -1", 0 },
    { GENERATION, NULL, "{\"temperature\": \"hot\"}", "temperature", "found hot", 0 },
    { GENERATION, NULL, "{\"top_p\": 1.5}", "top_p", "found 1.5", 0 },
    { GENERATION, NULL, "{\"eos_token_id\": [1, 512]}", "generation_config.json: eos_token_id", "found 512", 0 },
    /* calibration.json */
    { CALIBRATION, NULL, "{", "calibration.json", "the end", 0 },
    { CALIBRATION, NULL, "{}", "calibration.json: format: expected dspark-calibration-1", "found nothing", U },
    { CALIBRATION, NULL, "{\"format\": \"dspark-calibration-1\"}", "calibration.json: rows: expected an array", "found nothing", 0 },
    { CALIBRATION, NULL, ROWS("[" FIVES FIVES FIVES FIVES FIVES "5]"), "rows: expected at most 256", "found 321", 0 },
    { CALIBRATION, NULL, ROWS("[5]"), "rows[0].verify: expected coupled, rejection or greedy", "found nothing", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("hopeful", "[0, 1]", "[1, 1, 1, 1, 1]") "]"), "rows[0].verify", "found hopeful", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0]", "[1, 1, 1, 1, 1]") "]"), "rows[0].temperature: expected 2 numbers", "found an array of 1", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, -1]", "[1, 1, 1, 1, 1]") "]"), "rows[0].temperature", "from 0", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, 1, 1, 1]") ", " ROW("coupled", "[0, 1]", "[1, 1, 1, 1]") "]"),
      "rows[1].sts: expected 5 numbers", "found an array of 4", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, 1, 1, 0]") "]"), "rows[0].sts", "found an array of 5", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, [1], 1, 1]") "]"), "rows[0].sts", "found an array of 5", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, 1, 1, 1e999]") "]"), "rows[0].sts", "found an array of 5", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, 1, 1, 1], \"said\": []") "]"), "rows[0].said: expected 60 numbers from 0",
      "found an array of 0", 0 },
    { CALIBRATION, NULL, ROWS("[" ROW("greedy", "[0, 1]", "[1, 1, 1, 1, 1], \"stood\": 1") "]"), "rows[0].said: expected 60", "found nothing", 0 },
    /* model.safetensors.index.json, without model.safetensors */
    { INDEX, NULL, "{\"weight_map\": {", "model.safetensors.index.json", "the end", 0 },
    { INDEX, NULL, "{}", "weight_map", "found nothing", 0 },
    { INDEX, NULL, "{\"weight_map\": []}", "weight_map", "found an array", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": 1}}", "index.json: a: expected the name of a file", "found 1", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"\"}}", "index.json: a: expected the name of a file", "found ", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"..\"}}", "index.json: a: expected the name of a file", "found ..", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"../b\"}}", "index.json: a: expected the name of a file", "found ../b", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "index.json: a: expected the name", "/etc/passwd", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"b\\\\c\"}}", "index.json: a: expected the name of a file", "found b\\c", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"b\\u0000c\"}}", "index.json: a: expected the name of a file", "found b", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"a\": \"gone\"}}", "mem/gone", "IO", DSPARK_ERROR_IO },
    { INDEX, NULL, "{\"weight_map\": {\"norm.weight\": \"shard\"}}", "embed.weight", "no such tensor", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"x\": \"shard\"}}", "mem/shard: x: expected here by the index", "no such tensor", 0 },
    { INDEX, NULL, "{\"weight_map\": {\"norm.weight\": \"config.json\"}}", "mem/config.json: header", "found a length", 0 }
};
#undef U
#undef T

static void apply(directory *d, const bad *c) {
    file *model = find_file(d, "model.safetensors");
    int found = 1;
    if (c->where == INDEX) model->name = "shard";
    if (!c->find) put_text(d, names[c->where], c->replace);
    else if (c->where == CONFIG) {
        file *f = find_file(d, "config.json");
        found = substitute(f, 0, f->n, c->find, c->replace, 0);
    } else found = substitute_header(model, c->find, c->replace, c->where == HEADER_ALL);
    if (!found) printf("# %s is not in %s\n", c->find, names[c->where]);
}

static void check_refused(const directory *golden) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const bad *c = &cases[i];
        dspark_status expected = c->status ? c->status : DSPARK_ERROR_FORMAT, status;
        dspark__checkpoint ck;
        directory d;
        const char *said;
        copy_directory(&d, golden);
        apply(&d, c);
        status = open_directory(&ck, &d);
        said = dspark_last_error();
        if (!ok(status == expected && strstr(said, c->key) && strstr(said, c->found) && strstr(said, "mem/"),
                "refused, and the message has \"%s\" and \"%s\"", c->key, c->found))
            printf("# %s: %s\n", dspark_status_name(status), said);
        if (d.maps != d.unmaps || live) ok(0, "nothing stays mapped or allocated (%d, %zu)", d.maps - d.unmaps, live);
        if (!status) dspark__checkpoint_close(&ck);
        drop(&d);
    }
}

/* ---- a checkpoint as a list of tensors */

typedef struct { char name[96], type[16]; int dims[2]; char *data; size_t n; int shard; } item;
typedef struct { item items[512]; int n; } tensors;

static void read_tensors(tensors *t, const file *f) {
    uint64_t length;
    dspark__json j;
    memcpy(&length, f->bytes, 8);
    dspark__json_parse(&j, "", f->bytes + 8, (size_t)length);
    t->n = 0;
    for (int key = 1; key < j.nodes[0].next; key = dspark__json_next(&j, key + 1)) {
        int shape = dspark__json_find(&j, key + 1, "shape"), ends = dspark__json_find(&j, key + 1, "data_offsets");
        item *x = &t->items[t->n];
        int64_t begin, end, dim = 0;
        if (ends < 0) continue;
        snprintf(x->name, sizeof x->name, "%s", dspark__json_string(&j, key, NULL));
        snprintf(x->type, sizeof x->type, "%s", dspark__json_string(&j, dspark__json_find(&j, key + 1, "dtype"), NULL));
        for (int i = 0; i < 2; i++, dim = 0)
            x->dims[i] = i < j.nodes[shape].n && dspark__json_integer(&j, shape + 1 + i, &dim) ? (int)dim : 0;
        dspark__json_integer(&j, ends + 1, &begin), dspark__json_integer(&j, ends + 2, &end);
        x->n = (size_t)(end - begin), x->shard = 0;
        x->data = (char *)memcpy(malloc(x->n), f->bytes + 8 + length + begin, x->n);
        t->n++;
    }
    dspark__json_free(&j);
}

static void drop_tensors(tensors *t) {
    for (int i = 0; i < t->n; i++) free(t->items[i].data);
}

/* Those of one shard as a file; the last comes first, so nothing stands in the order of names. */
static void put_tensors(directory *d, const char *name, const tensors *t, int shard) {
    size_t cap = 64, n = 0, at = 0;
    char *header, *bytes;
    uint64_t length;
    for (int i = 0; i < t->n; i++) cap += t->items[i].n + 256;
    header = (char *)malloc(cap);
    n += (size_t)snprintf(header, cap, "{");
    for (int i = t->n - 1; i >= 0; i--) {
        const item *x = &t->items[i];
        char second[16] = "";
        if (x->shard != shard) continue;
        if (x->dims[1]) snprintf(second, sizeof second, ",%d", x->dims[1]);
        n += (size_t)snprintf(header + n, cap - n, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%d%s],\"data_offsets\":[%zu,%zu]}",
                              at ? "," : "", x->name, x->type, x->dims[0], second, at, at + x->n);
        at += x->n;
    }
    n += (size_t)snprintf(header + n, cap - n, "}");
    bytes = (char *)malloc(8 + n + at);
    length = n;
    memcpy(bytes, &length, 8), memcpy(bytes + 8, header, n);
    n += 8;
    for (int i = t->n - 1; i >= 0; i--)
        if (t->items[i].shard == shard) memcpy(bytes + n, t->items[i].data, t->items[i].n), n += t->items[i].n;
    free(header);
    put(d, name, bytes, n);
}

static item *tensor(tensors *t, const char *name) {
    for (int i = 0; i < t->n; i++) if (!strcmp(t->items[i].name, name)) return &t->items[i];
    printf("Bail out! no tensor %s\n", name), exit(1);
}

/* A tensor's content or, under a name that is new, a tensor; values i % 7 - 3, as `type`. */
static item *set(tensors *t, const char *name, const char *type, int rows, int cols) {
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1), bytes = !strcmp(type, "F32") ? 4 : !strcmp(type, "F8_E8M0") ? 1 : 2;
    item *x = t->items;
    while (x < t->items + t->n && strcmp(x->name, name)) x++;
    if (x == t->items + t->n) t->n++, x->data = NULL, snprintf(x->name, sizeof x->name, "%s", name), x->shard = 0;
    snprintf(x->type, sizeof x->type, "%s", type);
    free(x->data);
    x->dims[0] = rows, x->dims[1] = cols, x->n = n * bytes, x->data = (char *)malloc(n * bytes);
    for (size_t i = 0; i < n; i++) {
        static const uint16_t halves[] = { 0xC200, 0xC000, 0xBC00, 0, 0x3C00, 0x4000, 0x4200 };
        float v = (float)(i % 7) - 3;
        uint32_t bits;
        memcpy(&bits, &v, 4);
        bits = bytes == 4 ? bits : !strcmp(type, "F16") ? halves[i % 7] : bytes == 1 ? 127 : bits >> 16;
        memcpy(x->data + i * bytes, &bits, bytes);
    }
    return x;
}

static int is_pattern(const float *x, int n) {
    for (int i = 0; i < n; i++) if (x[i] != (float)(i % 7) - 3) return 0;
    return 1;
}

/* ---- everything that a checkpoint binds, as one hash */

static uint64_t hash_bytes(uint64_t h, const void *p, size_t n) {
    return (h ^ dspark__hash((const char *)p, n, 0)) * 0x9E3779B97F4A7C15u + !p;
}
static uint64_t hash_floats(uint64_t h, const float *p, int n) { return p ? hash_bytes(h, p, (size_t)n * 4) : h + 1; }

static uint64_t hash_matrix(uint64_t h, const dspark_matrix *m) {
    size_t n = (size_t)m->rows * (size_t)m->cols;
    int fp8 = m->dtype == DSPARK_FP8, kind[3];
    kind[0] = m->rows, kind[1] = m->cols, kind[2] = m->dtype;
    h = hash_bytes(h, kind, sizeof kind);
    if (!m->data) return h;
    h = hash_bytes(h, m->data, m->dtype == DSPARK_F32 ? 4 * n : fp8 ? n : m->dtype == DSPARK_FP4 ? n / 2 : 2 * n);
    if (!m->scale) return h;
    return hash_bytes(h, m->scale, fp8 ? (size_t)((m->rows + 127) / 128 * ((m->cols + 127) / 128)) : n / 32);
}

static uint64_t hash_mix(uint64_t h, const dspark_mix *m, int scales) {
    h = hash_matrix(h, &m->fn);
    return hash_floats(hash_floats(h, m->scale, m->fn.data ? scales : 0), m->base, m->fn.rows);
}

static uint64_t hash_compressor(uint64_t h, const dspark_compressor *p) {
    h = hash_matrix(hash_matrix(h, &p->wkv), &p->wgate);
    return hash_floats(hash_floats(h, p->ape, p->ratio * p->w), p->norm, p->d);
}

static uint64_t hash_layer(uint64_t h, const dspark_config *c, const dspark_layer *l) {
    const dspark_matrix *m[] = { &l->wq_a, &l->wq_b, &l->wkv, &l->wo_a, &l->wo_b, &l->index_wq_b, &l->index_weights, &l->gate };
    h = hash_mix(hash_mix(h, &l->hc_attn, 3), &l->hc_ffn, 3);
    h = hash_floats(hash_floats(h, l->attn_norm, c->hidden_size), l->ffn_norm, c->hidden_size);
    for (size_t i = 0; i < sizeof m / sizeof *m; i++) h = hash_matrix(h, m[i]);
    h = hash_floats(hash_floats(h, l->q_norm, c->q_lora_rank), l->kv_norm, c->head_dim);
    h = hash_floats(h, l->attn_sink, c->num_attention_heads);
    h = hash_compressor(hash_compressor(h, &l->compressor), &l->index_compressor);
    h = hash_floats(h, l->gate_bias, c->n_routed_experts);
    if (l->tid2eid) h = hash_bytes(h, l->tid2eid, (size_t)(l->tid2eid_bytes * c->vocab_size * c->num_experts_per_tok));
    for (int e = -1; e < c->n_routed_experts; e++) {
        const dspark_expert *x = e < 0 ? &l->shared : &l->experts[e];
        h = hash_matrix(hash_matrix(hash_matrix(h, &x->w1), &x->w2), &x->w3);
    }
    return h + (uint64_t)l->ratio;
}

static uint64_t hash_weights(const dspark__checkpoint *ck) {
    const dspark_config *c = &ck->config;
    const dspark_weights *w = &ck->weights;
    const dspark_matrix *m[] = { &w->embed, &w->head, &w->main_proj, &w->markov_w1, &w->markov_w2, &w->gate_proj,
                                 &w->joint_proj, &w->confidence_proj };
    uint64_t h = hash_bytes(0, c, sizeof *c);
    for (size_t i = 0; i < sizeof m / sizeof *m; i++) h = hash_matrix(h, m[i]);
    h = hash_mix(hash_mix(h, &w->hc_head, 1), &w->draft_hc_head, 1);
    h = hash_floats(hash_floats(h, w->norm, c->hidden_size), w->main_norm, c->hidden_size);
    h = hash_floats(h, w->draft_norm, c->hidden_size);
    for (int l = 0; l < c->num_hidden_layers + c->n_stages; l++) h = hash_layer(h, c, &w->layers[l]);
    return h;
}

/* Opens and says whether that went well; what is wrong is a comment. */
static int opens(dspark__checkpoint *ck, directory *d) {
    dspark_status status = open_directory(ck, d);
    if (status) printf("# %s: %s\n", dspark_status_name(status), dspark_last_error());
    return !status;
}

static int closes(dspark__checkpoint *ck, directory *d) {
    dspark__checkpoint_close(ck);
    return d->maps == d->unmaps && !live && !ck->files && !ck->owned;
}

/* ---- what opens */

static void check_binding(directory *d, tensors *t) {
    dspark__checkpoint ck;
    const dspark_config *c = &ck.config;
    const dspark_weights *w = &ck.weights;
    if (!ok(opens(&ck, d), "golden/a opens")) return;
    const struct { const void *data; const char *name; } at[] = {
        { w->embed.data, "embed.weight" }, { w->head.data, "head.weight" }, { w->hc_head.fn.data, "hc_head_fn" },
        { w->layers[0].wq_a.data, "layers.0.attn.wq_a.weight" }, { w->layers[0].wq_a.scale, "layers.0.attn.wq_a.scale" },
        { w->layers[1].index_weights.data, "layers.1.attn.indexer.weights_proj.weight" },
        { w->layers[1].index_wq_b.data, "layers.1.attn.indexer.wq_b.weight" },
        { w->layers[1].compressor.wgate.data, "layers.1.attn.compressor.wgate.weight" },
        { w->layers[1].index_compressor.wkv.data, "layers.1.attn.indexer.compressor.wkv.weight" },
        { w->layers[2].hc_ffn.fn.data, "layers.2.hc_ffn_fn" }, { w->layers[0].tid2eid, "layers.0.ffn.gate.tid2eid" },
        { w->layers[2].experts[7].w2.data, "layers.2.ffn.experts.7.w2.weight" },
        { w->layers[2].experts[7].w3.scale, "layers.2.ffn.experts.7.w3.scale" },
        { w->layers[3].shared.w1.data, "mtp.0.ffn.shared_experts.w1.weight" },
        { w->layers[4].wo_a.data, "mtp.1.attn.wo_a.weight" }, { w->main_proj.data, "mtp.0.main_proj.weight" },
        { w->draft_hc_head.fn.data, "mtp.1.hc_head_fn" }, { w->markov_w2.data, "mtp.1.markov_head.markov_w2.weight" },
        { w->confidence_proj.data, "mtp.1.confidence_head.proj.weight" }
    };
    int same = 0, n = (int)(sizeof at / sizeof *at);
    for (int i = 0; i < n; i++) {
        item *x = tensor(t, at[i].name);
        same += at[i].data && !memcmp(at[i].data, x->data, x->n);
    }
    ok(same == n, "%d of %d matrices point to their bytes in the file", same, n);
    ok(!memcmp(w->layers[1].attn_sink, tensor(t, "layers.1.attn.attn_sink")->data, 16), "an F32 vector as it is stored");
    ok(c->n_stages == 2 && c->n_taps == 3 && c->dspark_target_layer_ids[2] == 2 && c->dspark_markov_rank == 64 &&
       w->head_kind == DSPARK_HEAD_VANILLA && c->bos_token_id == 0 && c->n_eos == 1 && c->eos_token_id[0] == 1 &&
       c->rope_factor == 16 && c->temperature == -1 && c->top_p == -1 && c->compress_ratios[1] == 4,
       "the config has config.json's values");
    ok(w->layers[1].compressor.w == 256 && w->layers[2].compressor.w == 128 && !w->layers[0].compressor.ape &&
       !w->layers[0].gate_bias && w->layers[1].gate_bias && !w->layers[1].tid2eid && !w->layers[2].index_wq_b.data,
       "a layer has what its ratio and routing need, and nothing else");
    ok(ck.mapped == find_file(d, "model.safetensors")->n && ck.bytes > 50000 && ck.bytes < 200000,
       "all %zu bytes are mapped, and 50,000 to 200,000 (%zu) allocated", ck.mapped, ck.bytes);
    ok(closes(&ck, d), "closing unmaps every map and frees every block");
    ok(closes(&ck, d), "closing again does nothing");
}

static uint64_t hash_of(directory *d) {
    dspark__checkpoint ck;
    uint64_t h = opens(&ck, d) ? hash_weights(&ck) : 0;
    dspark__checkpoint_close(&ck);
    return h;
}

static void put_index(directory *d, const tensors *t, const char *const *shards) {
    size_t cap = 64 + (size_t)t->n * 160, n = 0;
    char *text = (char *)malloc(cap);
    n += (size_t)snprintf(text, cap, "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
    for (int i = 0; i < t->n; i++)
        n += (size_t)snprintf(text + n, cap - n, "%s\"%s\": \"%s\"", i ? ", " : "", t->items[i].name, shards[t->items[i].shard]);
    snprintf(text + n, cap - n, "}}");
    put_text(d, "model.safetensors.index.json", text);
    free(text);
}

static void check_shards(const directory *golden, directory *out) {
    static const char *const shards[] = { "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "c" };
    static tensors t;
    dspark__checkpoint ck;
    directory d;
    uint64_t whole;
    copy_directory(&d, golden);
    whole = hash_of(&d);
    read_tensors(&t, find_file(&d, "model.safetensors"));
    put_tensors(&d, "model.safetensors", &t, 0);
    ok(whole && hash_of(&d) == whole, "the order of a file's tensors does not matter");
    for (int i = 0; i < t.n; i++) t.items[i].shard = i * 7 % 3;
    for (int i = 0; i < 3; i++) put_tensors(&d, shards[i], &t, i);
    put_index(&d, &t, shards);
    put(&d, "model.safetensors", NULL, 0);
    ok(hash_of(&d) == whole, "three shards and their index are the same as the single file");
    put_read(&d, "model.safetensors", "tests/golden/a/model.safetensors");
    find_file(&d, shards[0])->name = "gone";
    ok(hash_of(&d) == whole, "model.safetensors goes before an index");
    find_file(&d, "gone")->name = shards[0];
    put(&d, "model.safetensors", NULL, 0);
    put_tensors(&d, shards[1], &t, 2);
    ok(open_directory(&ck, &d) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), shards[1]) &&
       strstr(dspark_last_error(), "expected here by the index"),
       "a tensor that is not in the shard that the index names is refused");
    put_tensors(&d, shards[1], &t, 1);
    put_tensors(&d, shards[2], &t, 1);
    for (int i = 0; i < t.n; i++) if (t.items[i].shard == 2) t.items[i].shard = 0;
    put_tensors(&d, shards[0], &t, 0);
    put_index(&d, &t, shards);
    find_file(&d, shards[2])->name = "";
    ok(hash_of(&d) == whole, "two shards with an index open as the single file does");
    drop_tensors(&t);
    *out = d;
}

/* In each of the three plain types: a linear, a looked-up matrix, vectors. */
static void check_types(const directory *golden) {
    static const char *const types[] = { "F32", "BF16", "F16" };
    for (int i = 0; i < 3; i++) {
        static tensors t;
        dspark__checkpoint ck;
        directory d;
        copy_directory(&d, golden);
        read_tensors(&t, find_file(&d, "model.safetensors"));
        set(&t, "layers.1.attn.wq_a.weight", types[i], 128, 256);
        snprintf(tensor(&t, "layers.1.attn.wq_a.scale")->name, 8, "unused");
        set(&t, "embed.weight", types[i], 512, 256);
        set(&t, "layers.1.attn.q_norm.weight", types[i], 128, 0);
        set(&t, "layers.1.attn.compressor.ape", types[i], 4, 256);
        put_tensors(&d, "model.safetensors", &t, 0);
        if (ok(opens(&ck, &d), "a linear, embed and vectors in %s open", types[i])) {
            const dspark_layer *l = &ck.weights.layers[1];
            ok(l->wq_a.dtype == i && !l->wq_a.scale && !memcmp(l->wq_a.data, tensor(&t, "layers.1.attn.wq_a.weight")->data, 1024) &&
               ck.weights.embed.dtype == i, "%s: matrices stay as they are stored", types[i]);
            ok(is_pattern(l->q_norm, 128) && is_pattern(l->compressor.ape, 1024), "%s: vectors become floats", types[i]);
        }
        ok(closes(&ck, &d), "%s: closing unmaps every map and frees every block", types[i]);
        drop(&d), drop_tensors(&t);
    }
}

static void check_halves(void) {
    static const struct { uint16_t half; float value; } h[] = {
        { 0x0001, 5.9604645e-8f }, { 0x83FF, -6.0975552e-5f }, { 0x0400, 6.1035156e-5f }, { 0x3555, .33325195f },
        { 0x7BFF, 65504 }, { 0xC000, -2 }, { 0x8000, -0.0f }
    };
    int same = 0, n = (int)(sizeof h / sizeof *h);
    uint16_t infinite = 0xFC00, nan = 0x7E01;
    for (int i = 0; i < n; i++) {
        float x = dspark__stored_float((const uint8_t *)&h[i].half, 0, DSPARK_F16);
        same += !memcmp(&x, &h[i].value, 4);
    }
    ok(same == n && dspark__stored_float((uint8_t *)&infinite, 0, DSPARK_F16) < -FLT_MAX &&
       isnan(dspark__stored_float((uint8_t *)&nan, 0, DSPARK_F16)), "F16: subnormal, largest, infinite, NaN");
}

static void check_hash_ids(const directory *golden) {
    int64_t bad_ids[] = { 8, -1, INT64_C(1) << 32, INT64_MIN, 0 };
    static tensors t;
    item *x;
    dspark__checkpoint ck;
    directory d;
    int refused = 0, narrow[512 * 3];
    copy_directory(&d, golden);
    read_tensors(&t, find_file(&d, "model.safetensors"));
    x = tensor(&t, "layers.0.ffn.gate.tid2eid");
    memcpy(&bad_ids[4], x->data + 8 * 1533, 8);      /* the token's first expert once more */
    for (int i = 0; i < 5; i++) {
        int64_t was;
        memcpy(&was, x->data + 8 * 1535, 8);
        memcpy(x->data + 8 * 1535, &bad_ids[i], 8);
        put_tensors(&d, "model.safetensors", &t, 0);
        refused += open_directory(&ck, &d) == DSPARK_ERROR_FORMAT &&
                   strstr(dspark_last_error(), "layers.0.ffn.gate.tid2eid: token 511: expected different experts from 0 to 7");
        memcpy(x->data + 8 * 1535, &was, 8);
    }
    ok(refused == 5, "tid2eid: an expert out of range, or twice in a token, is refused");
    for (int i = 0; i < 512 * 3; i++) memcpy(&narrow[i], x->data + 8 * i, 4);
    free(x->data);
    x->n = sizeof narrow, x->data = (char *)memcpy(malloc(x->n), narrow, x->n);
    snprintf(x->type, sizeof x->type, "I32");
    put_tensors(&d, "model.safetensors", &t, 0);
    ok(opens(&ck, &d) && ck.weights.layers[0].tid2eid_bytes == 4 && !memcmp(ck.weights.layers[0].tid2eid, narrow, sizeof narrow),
       "tid2eid may be I32");
    dspark__checkpoint_close(&ck);
    narrow[1535] = 8;
    memcpy(x->data, narrow, x->n);
    put_tensors(&d, "model.safetensors", &t, 0);
    ok(open_directory(&ck, &d) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "token 511"),
       "tid2eid in I32 is checked too");
    drop(&d), drop_tensors(&t);
}

/* A Markov head of each kind, none, and the confidence head's bias. */
static void check_heads(const directory *golden) {
    static const struct { const char *claim, *proj; int rows, cols, kind; } kinds[] = {
        { "gated", "mtp.1.markov_head.gate_proj", 64, 320, DSPARK_HEAD_GATED },
        { "RNN", "mtp.1.markov_head.joint_proj", 192, 384, DSPARK_HEAD_RNN }
    };
    for (int i = 0; i < 2; i++) for (int bias = 0; bias < 2; bias++) {
        static tensors t;
        char name[64];
        dspark__checkpoint ck;
        directory d;
        copy_directory(&d, golden);
        read_tensors(&t, find_file(&d, "model.safetensors"));
        snprintf(name, sizeof name, "%s.weight", kinds[i].proj);
        set(&t, name, "BF16", kinds[i].rows, kinds[i].cols);
        snprintf(name, sizeof name, "%s.bias", kinds[i].proj);
        if (bias) set(&t, name, "F32", kinds[i].rows, 0), set(&t, "mtp.1.confidence_head.proj.bias", "BF16", 1, 0);
        put_tensors(&d, "model.safetensors", &t, 0);
        if (ok(opens(&ck, &d), "a checkpoint opens with a %s head, bias %d", kinds[i].claim, bias)) {
            const dspark_weights *w = &ck.weights;
            const float *b = i ? w->joint_bias : w->gate_bias;
            ok(w->head_kind == kinds[i].kind && (i ? w->joint_proj.rows : w->gate_proj.rows) == kinds[i].rows &&
               (bias ? b && is_pattern(b, kinds[i].rows) : !b) && w->confidence_bias == (bias ? -3 : 0),
               "the head has its kind, rows and biases");
        }
        dspark__checkpoint_close(&ck);
        set(&t, kinds[!i].proj, "BF16", kinds[!i].rows, kinds[!i].cols);
        strcat(t.items[t.n - 1].name, ".weight");
        put_tensors(&d, "model.safetensors", &t, 0);
        ok(open_directory(&ck, &d) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "found both"),
           "two kinds of head are refused");
        drop(&d), drop_tensors(&t);
    }
}

typedef struct { const char *claim, *config[2], *header[2]; const char *generation, *calibration; } variant;

/* Opens golden/a with one change of config.json, one of the header (wherever it stands), and files beside it. */
static int opens_as(dspark__checkpoint *ck, directory *d, const directory *golden, const variant *v) {
    file *f;
    int done = 1;
    copy_directory(d, golden);
    f = find_file(d, "config.json");
    if (v->config[0]) done &= substitute(f, 0, f->n, v->config[0], v->config[1], 0) > 0;
    if (v->header[0]) done &= substitute_header(find_file(d, "model.safetensors"), v->header[0], v->header[1], 1) > 0;
    if (v->generation) put_text(d, "generation_config.json", v->generation);
    if (v->calibration) put_text(d, "calibration.json", v->calibration);
    if (!done) printf("# nothing to replace\n");
    return opens(ck, d) && done;
}

static void check_variants(const directory *golden) {
    static const variant v[] = {
        { "no drafter", { NULL, NULL }, { "\"mtp.", "\"old." }, NULL, NULL },
        { "no drafter in the config either", { "dspark_block_size", "x" }, { "\"mtp.", "\"old." }, NULL, NULL },
        { "neither Markov nor confidence head", { "\"dspark_markov_rank\": 64", "\"x\": 0" }, { "_head.", "_x." }, NULL, NULL },
        { "as many ratios as layers", { "128,\n  0,\n  0", "128" }, { NULL, NULL }, NULL, NULL },
        { "no rope_scaling", { "\"rope_scaling\"", "\"x\"" }, { NULL, NULL }, NULL, NULL },
        { "rope_scaling null", { "\"rope_scaling\": {", "\"rope_scaling\": null, \"x\": {" }, { NULL, NULL }, NULL, NULL },
        { "no bos, eos a list", { "\"bos_token_id\": 0", "\"bos_token_id\": null" }, { NULL, NULL }, "{\"eos_token_id\": [2, 3]}", NULL },
        { "generation", { NULL, NULL }, { NULL, NULL }, "{\"do_sample\": true, \"temperature\": 0.6, \"top_p\": 0.95}", NULL },
        { "do_sample unsaid", { NULL, NULL }, { NULL, NULL }, "{\"temperature\": 0.6, \"top_p\": null, \"eos_token_id\": 5}", NULL },
        { "greedy", { NULL, NULL }, { NULL, NULL }, "{\"do_sample\": false, \"temperature\": -9, \"top_p\": 0.95}", NULL },
        { "no eos", { "\"eos_token_id\": 1", "\"eos_token_id\": []" }, { NULL, NULL }, "{}", NULL },
        { "a calibration", { NULL, NULL }, { NULL, NULL }, NULL,
          ROWS("[" ROW("coupled", "[0.5, 1]", "[1, 2, 0.5, 1, 1e-3]") ", " ROW("greedy", "[0, 0]", "[4, 4, 4, 4, 4]") "]") },
        { "a calibration without rows", { NULL, NULL }, { NULL, NULL }, NULL, ROWS("[]") },
        { "no drafter, a malformed calibration", { NULL, NULL }, { "\"mtp.", "\"old." }, NULL, "{" }
    };
    int n = (int)(sizeof v / sizeof *v);
    for (int i = 0; i < n; i++) {
        dspark__checkpoint ck;
        directory d;
        const dspark_config *c = &ck.config;
        int right = opens_as(&ck, &d, golden, &v[i]);
        if (i < 2) right &= !c->n_stages && !c->dspark_block_size && !c->n_taps && !ck.weights.main_proj.data;
        if (i == 2) right &= ck.weights.head_kind == DSPARK_HEAD_NONE && c->n_stages == 2 && !ck.weights.markov_w1.data &&
                             !ck.weights.confidence_proj.data;
        if (i == 3) right &= c->n_stages == 2;
        if (i == 4 || i == 5) right &= c->rope_factor == 1 && c->rope_original_length == 1048576;
        if (i == 6) right &= c->bos_token_id == -1 && c->n_eos == 2 && c->eos_token_id[1] == 3;
        if (i == 7) right &= c->temperature == .6f && c->top_p == .95f && c->eos_token_id[0] == 1;
        if (i == 8) right &= c->temperature == .6f && c->top_p == -1 && c->n_eos == 1 && c->eos_token_id[0] == 5;
        if (i == 9) right &= c->temperature == -1 && c->top_p == -1;
        if (i == 10) right &= c->n_eos == 0;
        if (i == 11) right &= ck.n_calibrations == 2 && ck.calibrations[0].band[0] == .5f && ck.calibrations[0].sts[4] == 1e-3f &&
                              ck.calibrations[1].verify == DSPARK_VERIFY_GREEDY && ck.calibrations[1].sts[0] == 4;
        if (i >= 12) right &= !ck.n_calibrations;
        ok(right && closes(&ck, &d), "opens: %s", v[i].claim);
        drop(&d);
    }
}

/* ---- memory, progress, files */

static void check_memory(directory *d, const char *claim) {
    dspark__checkpoint ck;
    dspark_status status = DSPARK_ERROR_MEMORY;
    int wrong = 0;
    size_t n = 0;
    while (status && n < 10000) {
        calls = 0, fail_at = ++n;
        status = open_directory(&ck, d);
        fail_at = 0;
        wrong += status && (status != DSPARK_ERROR_MEMORY || !strstr(dspark_last_error(), "memory") || live || d->maps != d->unmaps);
    }
    ok(!status && !wrong && n > 50,
       "%s: when any of %zu allocations fails, it is MEMORY and nothing leaks", claim, n - 1);
    ok(closes(&ck, d), "what opens after all these failures closes completely");
}

typedef struct { int calls, cancel_at, falls; float last; } progress;
static int on_progress(void *user, float done) {
    progress *p = (progress *)user;
    p->falls += done <= p->last || done > 1;
    p->last = done;
    return ++p->calls != p->cancel_at;
}

static void check_progress(directory *d) {
    dspark_model_desc desc;
    dspark__checkpoint ck;
    progress p = { 0, 0, 0, 0 };
    dspark_status status;
    int cancelled = 0, n;
    memset(&desc, 0, sizeof desc);
    desc.files.map = serve, desc.files.unmap = take_back, desc.files.user = d, desc.progress = on_progress, desc.user = &p;
    status = dspark__checkpoint_open(&ck, "mem", &desc);
    n = p.calls;
    ok(!status && closes(&ck, d) && n > 2 && !p.falls && p.last == 1, "progress rises to 1 in %d calls", n);
    for (int i = 1; i <= n; i++) {
        p.calls = 0, p.cancel_at = i, p.last = 0;
        cancelled += dspark__checkpoint_open(&ck, "mem", &desc) == DSPARK_ERROR_CANCELLED && closes(&ck, d);
    }
    ok(cancelled == n, "an open cancelled at any progress call leaves nothing behind");
    desc.files.unmap = NULL, desc.progress = NULL;
    ok(dspark__checkpoint_open(&ck, "mem", &desc) == DSPARK_OK, "files without an unmap function open");
    dspark__checkpoint_close(&ck);
}

static void check_fingerprint(const directory *golden) {
    static const char *const files[] = { "config.json", "model.safetensors", "model.safetensors" };
    static const size_t at[] = { 1600, 100000, 6510069 };
    dspark__checkpoint ck;
    directory d;
    uint64_t first = 0, again = 1;
    int other = 0;
    copy_directory(&d, golden);
    if (opens(&ck, &d)) first = dspark__checkpoint_fingerprint(&ck), again = dspark__checkpoint_fingerprint(&ck);
    ok(first == again, "a checkpoint has one fingerprint");
    dspark__checkpoint_close(&ck);
    for (int i = 0; i < 3; i++) {
        char *byte = find_file(&d, files[i])->bytes + at[i], was = *byte;
        *byte = i ? (char)(was ^ 1) : ' ';
        other += opens(&ck, &d) && *byte != was && dspark__checkpoint_fingerprint(&ck) != first;
        dspark__checkpoint_close(&ck);
        *byte = was;
    }
    ok(other == 3, "the fingerprint changes with a byte of config.json, of a tensor, or the file's last");
    drop(&d);
}

static void check_disk(void) {
    static const char *const dirs[] = { "tests/golden/a", "tests/golden/b", "tools/spark-tiny/model" };
    static const int stages[] = { 2, 1, 1 };
    dspark__checkpoint ck;
    for (int i = 0; i < 3; i++) {
        dspark_status status = dspark__checkpoint_open(&ck, dirs[i], NULL);
        if (!ok(!status && ck.config.n_stages == stages[i], "%s opens from disk", dirs[i])) printf("# %s\n", dspark_last_error());
        dspark__checkpoint_close(&ck);
    }
    ok(!live, "checkpoints opened from disk and closed leave nothing allocated");
    ok(dspark__checkpoint_open(&ck, "tests", NULL) == DSPARK_ERROR_IO && strstr(dspark_last_error(), "tests/config.json: No such"),
       "a directory without config.json: IO, with its path");
    ok(dspark__checkpoint_open(&ck, NULL, NULL) == DSPARK_ERROR_ARGUMENT && dspark__checkpoint_open(&ck, "", NULL) ==
       DSPARK_ERROR_ARGUMENT, "no directory: ARGUMENT");
}

static void check_missing(const directory *golden) {
    dspark__checkpoint ck;
    dspark_model_desc desc;
    directory d;
    char deep[700] = "x";
    copy_directory(&d, golden);
    put(&d, "model.safetensors", NULL, 0);
    ok(open_directory(&ck, &d) == DSPARK_ERROR_IO && strstr(dspark_last_error(), "mem/model.safetensors") &&
       strstr(dspark_last_error(), "nor is there an index"), "neither model.safetensors nor an index: IO, naming both");
    memset(deep, 'x', sizeof deep - 1);
    memset(&desc, 0, sizeof desc);
    desc.files.map = serve, desc.files.user = &d;
    ok(dspark__checkpoint_open(&ck, deep, &desc) == DSPARK_ERROR_IO && strstr(dspark_last_error(), "x/model.safetensors: ") &&
       strstr(dspark_last_error(), "nor is there an index"), "a path that is too long for the message does not fill it");
    put(&d, "config.json", NULL, 0);
    ok(open_directory(&ck, &d) == DSPARK_ERROR_IO && strstr(dspark_last_error(), "mem/config.json"), "no config.json: IO");
    drop(&d);
}

/* Prefixes of the file, and all but its last byte: FORMAT. */
static void check_cut(const directory *golden) {
    dspark__checkpoint ck;
    directory d;
    file *f;
    size_t whole, refused = 0, n = 0;
    copy_directory(&d, golden);
    f = find_file(&d, "model.safetensors");
    whole = f->n;
    for (size_t size = 0; size < whole; size = size < 64 ? size + 1 : size * 5 / 4, n++) {
        char *all = f->bytes;
        f->bytes = (char *)memcpy(malloc(size + !size), all, size), f->n = size;
        refused += open_directory(&ck, &d) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "mem/model.safetensors");
        free(f->bytes);
        f->bytes = all, f->n = whole;
    }
    f->n = whole - 1;
    refused += open_directory(&ck, &d) == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "data_offsets");
    ok(refused == n + 1, "a file cut anywhere (%zu places) is refused", n + 1);
    drop(&d);
}

/* The time of V4-Flash's 70,000 tensors: the header alone, opened up to the first tensor that does not fit. */
static void check_many(void) {
    const size_t n = 70000, cap = n * 128;
    char *header = (char *)malloc(cap);
    uint64_t length;
    size_t at = 8;
    double us;
    dspark_status status;
    dspark__checkpoint ck;
    directory d;
    memset(&d, 0, sizeof d);
    put_read(&d, "config.json", "tests/golden/a/config.json");
    at += (size_t)snprintf(header + at, cap - at, "{");
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(header + at, cap - at, "%s\"layers.%zu.ffn.experts.%zu.w%zu.weight\":{\"dtype\":\"I8\",\"shape\":"
                               "[1,1],\"data_offsets\":[%zu,%zu]}", i ? "," : "", i / 1536, i % 1536 / 6, i % 6, i, i + 1);
    at += (size_t)snprintf(header + at, cap - at, "}");
    length = at - 8;
    memcpy(header, &length, 8);
    header = (char *)realloc(header, at + n);
    memset(header + at, 0, n);
    put(&d, "model.safetensors", header, at + n);
    us = dspark__now_us();
    status = open_directory(&ck, &d);
    us = dspark__now_us() - us;
    ok(status == DSPARK_ERROR_FORMAT && strstr(dspark_last_error(), "embed.weight") && us < 5e6,
       "a header of 70,000 tensors takes less than 5 seconds (%.0f ms)", us / 1000);
    drop(&d);
}

int main(void) {
    static tensors t;
    directory golden, sharded;
    memset(&golden, 0, sizeof golden);
    put_read(&golden, "config.json", "tests/golden/a/config.json");
    put_read(&golden, "model.safetensors", "tests/golden/a/model.safetensors");
    read_tensors(&t, find_file(&golden, "model.safetensors"));
    check_binding(&golden, &t);
    check_disk();
    check_shards(&golden, &sharded);
    check_types(&golden);
    check_halves();
    check_hash_ids(&golden);
    check_heads(&golden);
    check_variants(&golden);
    check_refused(&golden);
    check_missing(&golden);
    check_cut(&golden);
    check_memory(&golden, "one file");
    put_text(&sharded, "generation_config.json", "{\"temperature\": 1}");
    check_memory(&sharded, "shards and generation_config.json");
    check_progress(&golden);
    check_fingerprint(&golden);
    check_many();
    drop(&golden), drop(&sharded), drop_tensors(&t);
    return tap_done();
}
