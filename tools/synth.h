// A random checkpoint in the official format, of any shape, for timing: its weights are normally distributed, in the
// formats of a released model, scaled so that activations stay sane; its text is noise. synth_write writes it to a
// directory; synth_map (for dspark_files) opens a model of any size without one: tensors of 64 KB or more repeat 32 MB
// of their kind, mapped over and over.
#ifndef SYNTH_H
#define SYNTH_H
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HIDDEN, LAYERS, EXPERTS, WIDTH, TOP_K, VOCAB, HEADS, HEAD_DIM, ROPE, Q_LORA, GROUPS, O_LORA, INDEX_HEADS, INDEX_DIM,
       INDEX_TOP_K, WINDOW, HASH, SHARED, COPIES, SINKHORN, RANK, BLOCK, STAGES, N_KEYS };
static struct { const char *key; int value; } config[N_KEYS] = {
    { "hidden_size", 512 }, { "num_hidden_layers", 14 }, { "n_routed_experts", 16 }, { "moe_intermediate_size", 256 },
    { "num_experts_per_tok", 4 }, { "vocab_size", 4096 }, { "num_attention_heads", 8 }, { "head_dim", 128 },
    { "qk_rope_head_dim", 64 }, { "q_lora_rank", 256 }, { "o_groups", 2 }, { "o_lora_rank", 256 }, { "index_n_heads", 8 },
    { "index_head_dim", 128 }, { "index_topk", 64 }, { "sliding_window", 128 }, { "num_hash_layers", 3 },
    { "n_shared_experts", 1 }, { "hc_mult", 4 }, { "hc_sinkhorn_iters", 20 }, { "dspark_markov_rank", 64 },
    { "dspark_block_size", 5 }, { "stages", 3 }
};
static int of(int key) { return config[key].value; }

// DeepSeek-V4-Flash; experts and layers may still be set to what a device has room for.
static const int flash[N_KEYS] = { 4096, 43, 256, 2048, 6, 129280, 64, 512, 64, 1024, 8, 1024, 64, 128, 512, 128, 3, 1,
                                   4, 20, 256, 5, 3 };

// The tensors are walked three times: sizes, then names and places, then bytes. A file is one region; in memory each
// kind of large tensor has a region of its own, of which SPAN bytes are written and mapped over all of it.
enum { MEASURE, ANNOUNCE, WRITE };
enum { SPAN = 32 << 20, LARGE = 64 << 10, MAX_REGIONS = 128 };
typedef struct { char kind[64]; uint64_t size, base, at, filled; int fd; unsigned char *block; } region;
static region regions[MAX_REGIONS];
static int n_regions = 1, walking, in_memory;
static FILE *header, *data;
static int announced;
static unsigned char *put_to, *small;       // where the next bytes go, in memory; region 0 there
static uint64_t put_room;

static region *region_of(const char *kind, uint64_t bytes) {
    int i = 1;
    if (!in_memory || bytes < LARGE) return regions;
    while (i < n_regions && strcmp(regions[i].kind, kind)) i++;
    if (i == MAX_REGIONS) fprintf(stderr, "synth: more than %d kinds of tensors\n", MAX_REGIONS), exit(1);
    if (i == n_regions) snprintf(regions[n_regions++].kind, sizeof regions->kind, "%s", kind);
    return &regions[i];
}

static uint64_t random_state = 1;
static uint64_t next_random(void) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
}
static int below(int n) { return (int)((next_random() >> 33) % (uint64_t)n); }

static float normals[65536];
static void fill_normals(void) {
    for (int i = 0; i < 65536; i++) {
        double u = ((double)(next_random() >> 11) + .5) / 9007199254740992.0, v = (double)(next_random() >> 11) / 9007199254740992.0;
        normals[i] = (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
    }
}

static unsigned e4m3(double x) {
    double a = fabs(x);
    int e;
    unsigned sign = x < 0 ? 128 : 0, code;
    if (a >= 448) return sign | 0x7e;
    frexp(a, &e);                                   // a = m 2^e, .5 <= m < 1
    if (e < -5) e = -5;                             // below 2^-6: subnormal, steps of 2^-9
    code = (unsigned)((e + 5) * 8) + (unsigned)nearbyint(ldexp(a, 4 - e));
    return sign | code;
}

static void put(const void *bytes, size_t n) {
    if (in_memory) {
        if (n > put_room) n = (size_t)put_room;
        memcpy(put_to, bytes, n), put_to += n, put_room -= n;
    } else if (!data || fwrite(bytes, 1, n, data) != n) perror("synth"), exit(1);
}

typedef struct { const char *dtype; int rows, cols; } tensor;    // cols 0: a vector

// Places a tensor; 1: write its bytes now, until there is no room for more.
static int begin(tensor t, const char *kind, const char *format, va_list args) {
    char name[256];
    int size = !strcmp(t.dtype, "F32") ? 4 : !strcmp(t.dtype, "BF16") ? 2 : !strcmp(t.dtype, "I64") ? 8 : 1;
    uint64_t bytes = (uint64_t)t.rows * (uint64_t)(t.cols ? t.cols : 1) * (uint64_t)size;
    region *r = region_of(kind, bytes);
    uint64_t at = r->at, begins = r->base + at;
    r->at += bytes;
    if (walking == ANNOUNCE) {
        vsnprintf(name, sizeof name, format, args);
        fprintf(header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%d", announced++ ? "," : "{", name, t.dtype, t.rows);
        if (t.cols) fprintf(header, ",%d", t.cols);
        fprintf(header, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begins, (unsigned long long)(begins + bytes));
    }
    if (walking != WRITE) return 0;
    if (!in_memory) return put_room = 1, 1;
    put_to = r == regions ? small + at : r->block + r->filled;
    put_room = r == regions || bytes < SPAN - r->filled ? bytes : SPAN - r->filled;
    r->filled += put_room;
    return put_room > 0;
}

// mean + deviation N(0, 1), as F32 or BF16
static void real(const char *dtype, int rows, int cols, double mean, double deviation, const char *format, ...) {
    tensor t = { dtype, rows, cols };
    char kind[64];
    va_list args;
    va_start(args, format);
    snprintf(kind, sizeof kind, "%s %g %g", dtype, mean, deviation);
    if (begin(t, kind, format, args))
        for (int64_t i = 0; i < (int64_t)rows * (cols ? cols : 1) && put_room; i++) {
            float x = (float)(mean + deviation * (double)normals[next_random() >> 48]);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            uint16_t high = (uint16_t)((bits + 0x8000) >> 16);
            if (*dtype == 'F') put(&x, 4);
            else put(&high, 2);
        }
    va_end(args);
}

static void bytes(const char *kind, const char *dtype, int rows, int cols, const unsigned char *choices, const char *format, ...) {
    tensor t = { dtype, rows, cols };
    va_list args;
    va_start(args, format);
    if (begin(t, kind, format, args))
        for (size_t left = (size_t)rows * (size_t)cols, n; left && put_room; left -= n) {
            unsigned char some[4096];
            n = left < sizeof some ? left : sizeof some;
            for (size_t i = 0; i < n; i++)
                some[i] = choices ? choices[next_random() >> 48] : (unsigned char)(next_random() >> 56);
            put(some, n);
        }
    va_end(args);
}

// FP8 with one scale a block of 128 x 128, so that the largest of a block comes near 448
static void fp8(int rows, int cols, double gain, const char *prefix, const char *name) {
    static unsigned char codes[65536], scales[65536];
    double deviation = gain / sqrt(cols);
    int e = (int)ceil(log2(4.5 * deviation / 448));
    char kind[64];
    snprintf(kind, sizeof kind, "fp8 %g", ldexp(deviation, -e));
    for (int i = 0; walking == WRITE && i < 65536; i++) codes[i] = (unsigned char)e4m3((double)normals[i] * ldexp(deviation, -e));
    memset(scales, e + 127, sizeof scales);
    bytes(kind, "F8_E4M3", rows, cols, codes, "%s%s.weight", prefix, name);
    snprintf(kind, sizeof kind, "scales %d", e);
    bytes(kind, "F8_E8M0", (rows + 127) / 128, (cols + 127) / 128, scales, "%s%s.scale", prefix, name);
}

static void fp4(int rows, int cols, const char *prefix, int expert, const char *name) {
    static unsigned char scales[65536];
    int e = (int)nearbyint(log2(1 / sqrt(cols) / 2.93)) + 127;
    char kind[64];
    for (int i = 0; i < 65536; i++) scales[i] = (unsigned char)(e - (i & 1));
    snprintf(kind, sizeof kind, "scales of fp4 %d", e);
    bytes("fp4", "I8", rows, cols / 2, NULL, "%sffn.experts.%d.%s.weight", prefix, expert, name);
    bytes(kind, "F8_E8M0", rows, cols / 32, scales, "%sffn.experts.%d.%s.scale", prefix, expert, name);
}

static void bf16(int rows, int cols, const char *prefix, const char *name) {
    real("BF16", rows, cols, 0, 1 / sqrt(cols), "%s%s.weight", prefix, name);
}
static void norm(int n, const char *prefix, const char *name) { real("BF16", n, 0, 1, .1, "%s%s.weight", prefix, name); }

static void compressor(int ratio, int width, const char *prefix, const char *name) {
    int w = ratio == 4 ? 2 * width : width;
    char path[64];
    snprintf(path, sizeof path, "%s%s.", prefix, name);
    real("F32", ratio, w, 0, .5, "%sape", path);
    norm(width, path, "norm");
    bf16(w, of(HIDDEN), path, "wkv");
    bf16(w, of(HIDDEN), path, "wgate");
}

static void mix(int rows, int n_scales, const char *prefix, const char *name) {
    int n = of(COPIES) * of(HIDDEN);
    real("F32", rows, n, 0, 1 / sqrt(n), "%s%s_fn", prefix, name);
    real("F32", rows, 0, 0, .5, "%s%s_base", prefix, name);
    real("F32", n_scales, 0, .5, 0, "%s%s_scale", prefix, name);
}

static int announce(tensor t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int now = begin(t, "hash", format, args);
    va_end(args);
    return now;
}

static void hash_table(const char *prefix) {
    tensor t = { "I64", of(VOCAB), of(TOP_K) };
    if (!announce(t, "%sffn.gate.tid2eid", prefix)) return;
    int64_t *order = malloc((size_t)of(EXPERTS) * sizeof *order);
    if (!order) fprintf(stderr, "synth: no memory\n"), exit(1);
    for (int v = 0; v < t.rows && put_room; v++) {
        for (int e = 0; e < of(EXPERTS); e++) order[e] = e;
        for (int k = 0; k < t.cols; k++) {
            int other = k + below(of(EXPERTS) - k);
            int64_t swap = order[k];
            order[k] = order[other], order[other] = swap;
        }
        put(order, (size_t)t.cols * 8);
    }
    free(order);
}

static void attention(const char *prefix, int ratio) {
    int h = of(HIDDEN), q = of(Q_LORA), wide = of(HEADS) * of(HEAD_DIM), low = of(GROUPS) * of(O_LORA);
    real("F32", of(HEADS), 0, 0, 1, "%sattn_sink", prefix);
    fp8(q, h, 1, prefix, "wq_a"), norm(q, prefix, "q_norm"), fp8(wide, q, 1, prefix, "wq_b");
    fp8(of(HEAD_DIM), h, 1, prefix, "wkv"), norm(of(HEAD_DIM), prefix, "kv_norm");
    fp8(low, wide / of(GROUPS), 1, prefix, "wo_a"), fp8(h, low, 1.5, prefix, "wo_b");
    if (ratio) compressor(ratio, of(HEAD_DIM), prefix, "compressor");
    if (ratio != 4) return;
    fp8(of(INDEX_HEADS) * of(INDEX_DIM), q, 1, prefix, "indexer.wq_b");
    bf16(of(INDEX_HEADS), h, prefix, "indexer.weights_proj");
    compressor(4, of(INDEX_DIM), prefix, "indexer.compressor");
}

static void block(const char *prefix, int ratio, int hashed) {
    int h = of(HIDDEN), w = of(WIDTH), C = of(COPIES);
    char path[64];
    snprintf(path, sizeof path, "%sattn.", prefix);
    attention(path, ratio);
    norm(h, prefix, "attn_norm"), norm(h, prefix, "ffn_norm");
    bf16(of(EXPERTS), h, prefix, "ffn.gate");
    if (hashed) hash_table(prefix);
    else real("F32", of(EXPERTS), 0, 0, .1, "%sffn.gate.bias", prefix);
    for (int e = 0; e < of(EXPERTS); e++) fp4(w, h, prefix, e, "w1"), fp4(h, w, prefix, e, "w2"), fp4(w, h, prefix, e, "w3");
    w *= of(SHARED);
    fp8(w, h, 1, prefix, "ffn.shared_experts.w1"), fp8(h, w, 1, prefix, "ffn.shared_experts.w2");
    fp8(w, h, 1, prefix, "ffn.shared_experts.w3");
    mix((2 + C) * C, 3, prefix, "hc_attn"), mix((2 + C) * C, 3, prefix, "hc_ffn");
}

static int ratio(int l) { return l < 2 ? 0 : l % 2 ? 128 : 4; }

static void walk(void) {
    int h = of(HIDDEN), v = of(VOCAB), last = of(STAGES) - 1;
    char prefix[64];
    real("BF16", v, h, 0, 1, "embed.weight");
    norm(h, "", "norm");
    real("BF16", v, h, 0, 2 / sqrt(h), "head.weight");
    mix(of(COPIES), 1, "", "hc_head");
    for (int l = 0; l < of(LAYERS); l++) {
        snprintf(prefix, sizeof prefix, "layers.%d.", l);
        block(prefix, ratio(l), l < of(HASH));
    }
    for (int s = 0; s <= last; s++) {
        snprintf(prefix, sizeof prefix, "mtp.%d.", s);
        block(prefix, 0, 0);
        if (s == 0) fp8(h, 3 * h, 1, prefix, "main_proj"), norm(h, prefix, "main_norm");
        if (s < last) continue;
        norm(h, prefix, "norm"), mix(of(COPIES), 1, prefix, "hc_head");
        real("BF16", v, of(RANK), 0, 1, "%smarkov_head.markov_w1.weight", prefix);
        bf16(v, of(RANK), prefix, "markov_head.markov_w2");
        bf16(1, h + of(RANK), prefix, "confidence_head.proj");
    }
}

static void write_config(FILE *f) {
    fprintf(f, "{\n");
    for (int i = 0; i < N_KEYS; i++) if (i != STAGES) fprintf(f, " \"%s\": %d,\n", config[i].key, config[i].value);
    fprintf(f, " \"compress_ratios\": [");
    for (int l = 0; l < of(LAYERS) + of(STAGES); l++) fprintf(f, "%s%d", l ? ", " : "", l < of(LAYERS) ? ratio(l) : 0);
    fprintf(f, "],\n \"dspark_target_layer_ids\": [%d, %d, %d],\n \"dspark_noise_token_id\": %d,\n", of(LAYERS) - 3,
            of(LAYERS) - 2, of(LAYERS) - 1, of(VOCAB) - 1);
    fprintf(f, " \"bos_token_id\": %d,\n \"eos_token_id\": %d,\n", of(VOCAB) - 2, of(VOCAB) - 3);
    fputs(" \"architectures\": [\"DeepseekV4ForCausalLM\"],\n \"attention_bias\": false,\n \"attention_dropout\": 0.0,\n"
          " \"compress_rope_theta\": 160000,\n \"expert_dtype\": \"fp4\",\n \"hc_eps\": 1e-06,\n \"hidden_act\": \"silu\",\n"
          " \"initializer_range\": 0.02,\n \"max_position_embeddings\": 1048576,\n \"model_type\": \"deepseek_v4\",\n"
          " \"norm_topk_prob\": true,\n \"num_key_value_heads\": 1,\n \"num_nextn_predict_layers\": 1,\n"
          " \"quantization_config\": {\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": \"fp8\",\n"
          "  \"scale_fmt\": \"ue8m0\", \"weight_block_size\": [128, 128]},\n \"rms_norm_eps\": 1e-06,\n"
          " \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1, \"factor\": 16,\n"
          "  \"original_max_position_embeddings\": 65536, \"type\": \"yarn\"},\n \"rope_theta\": 10000,\n"
          " \"routed_scaling_factor\": 1.5, \"scoring_func\": \"sqrtsoftplus\", \"swiglu_limit\": 10.0,\n"
          " \"tie_word_embeddings\": false, \"topk_method\": \"noaux_tc\", \"torch_dtype\": \"bfloat16\",\n"
          " \"transformers_version\": \"4.57.1\", \"use_cache\": true\n}\n", f);
}

// key=value, or flash
static int synth_set(const char *argument) {
    if (!strcmp(argument, "flash")) {
        for (int i = 0; i < N_KEYS; i++) config[i].value = flash[i];
        return 1;
    }
    for (int i = 0; i < N_KEYS; i++) {
        size_t n = strlen(config[i].key);
        if (!strncmp(argument, config[i].key, n) && argument[n] == '=') return config[i].value = atoi(argument + n + 1), 1;
    }
    return fprintf(stderr, "synth: no key in %s\n", argument), 0;
}

static void walk_as(int how) {
    walking = how;
    for (int i = 0; i < n_regions; i++) regions[i].at = 0;
    walk();
}
// Makes the header's text; places the regions one after another, mapped ones at multiples of SPAN; returns their bytes.
static uint64_t synth_header(char **json, size_t *size) {
    uint64_t total = 0;
    random_state = 1, announced = 0;        // the same each time
    walk_as(MEASURE);
    for (int i = n_regions - 1; i >= 0; i--) {
        regions[i].size = regions[i].at, regions[i].base = total;
        total += i ? (regions[i].size + SPAN - 1) / SPAN * SPAN : regions[i].size;
    }
    header = open_memstream(json, size);
    walk_as(ANNOUNCE);
    fputc('}', header);
    fclose(header);
    fill_normals();
    return total;
}

#ifndef DSPARK_H
static int synth_write(const char *dir) {
    char path[4096], *json;
    size_t size;
    uint64_t padded, total = synth_header(&json, &size);
    FILE *f;
    mkdir(dir, 0777);
    snprintf(path, sizeof path, "%s/config.json", dir);
    if (!(f = fopen(path, "w"))) return perror(path), 1;
    write_config(f), fclose(f);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (!(data = fopen(path, "wb"))) return perror(path), 1;
    padded = (size + 7) / 8 * 8;
    put(&padded, 8), put(json, size), put("        ", padded - size);
    walk_as(WRITE);
    if (fclose(data)) return perror(path), 1;
    printf("%s: %.1f MB\n", path, (double)(8 + padded + total) / 1e6);
    free(json);
    return 0;
}

#else
static void synth_region(unsigned char *at, const region *r) {
    for (uint64_t done = 0; done < r->size; done += SPAN)
        if (mmap(at + done, SPAN, PROT_READ, MAP_SHARED | MAP_FIXED, r->fd, 0) == MAP_FAILED) perror("mmap"), exit(1);
}
static dspark_status synth_map(void *user, const char *path, const void **out, uint64_t *size) {
    const char *file = strrchr(path, '/') + 1;
    char *json;
    size_t n;
    (void)user;
    if (!strcmp(file, "config.json")) {
        FILE *f = open_memstream(&json, &n);
        write_config(f), fclose(f);
        *out = json, *size = n;
        return DSPARK_OK;
    }
    if (strcmp(file, "model.safetensors")) return DSPARK_ERROR_IO;
    in_memory = 1;
    uint64_t total = synth_header(&json, &n), padded = (8 + n + SPAN - 1) / SPAN * SPAN, head = padded - 8;
    unsigned char *base = (unsigned char *)mmap(NULL, padded + total + SPAN, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) perror("mmap"), exit(1);
    memcpy(base, &head, 8), memset(base + 8, ' ', head), memcpy(base + 8, json, n);
    free(json);
    small = base + padded + regions[0].base;
    for (int i = 1; i < n_regions; i++) {
        regions[i].fd = memfd_create("synth", 0), regions[i].filled = 0;
        if (regions[i].fd < 0 || ftruncate(regions[i].fd, SPAN)) perror("memfd"), exit(1);
        regions[i].block = (unsigned char *)mmap(NULL, SPAN, PROT_READ | PROT_WRITE, MAP_SHARED, regions[i].fd, 0);
        if (regions[i].block == MAP_FAILED) perror("mmap"), exit(1);
    }
    walk_as(WRITE);
    for (int i = 1; i < n_regions; i++) {
        synth_region(base + padded + regions[i].base, &regions[i]);
        munmap(regions[i].block, SPAN), close(regions[i].fd);
    }
    *out = base, *size = padded + total;
    return DSPARK_OK;
}
static void synth_unmap(void *user, const void *bytes_, uint64_t size) {
    (void)user;
    if (size < SPAN) free((void *)(uintptr_t)bytes_);      // the config
    else munmap((void *)(uintptr_t)bytes_, (size_t)size + SPAN);
}
#endif
#endif
