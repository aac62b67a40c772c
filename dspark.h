/* dspark.h - DSpark speculative decoding for DeepSeek-V4 in one C header. MIT license, at the end of the manual.

   The text with speculation is the text without it, bit for bit. By default drafts are made only where measured times
   say that they pay. Do this:

       #define DSPARK_IMPLEMENTATION       // in one file of the program; the others include the header as it is
       #include "dspark.h"

       int main(void) {
           dspark_model *model;
           dspark_session *session;
           dspark_session_desc desc = { 0 };
           dspark_step_result r;
           int32_t ids[64] = { 0 };        // begin of sentence, then the prompt
           desc.policy.quota = 200;        // tokens; a step gives one to six
           if (dspark_model_open(&model, "tools/spark-tiny/model", NULL)) return puts(dspark_last_error()), 1;
           int n = dspark_encode(dspark_model_tokenizer(model), "Once upon a time", 16, 0, ids + 1, 63);
           if (n < 0 || dspark_session_open(&session, model, &desc)) return puts(dspark_last_error()), 1;
           dspark_session_append(session, ids, 1 + n);
           do dspark_step(&session, 1, NULL, &r), fwrite(r.text, 1, (size_t)r.text_len, stdout);
           while (!r.status && !r.finish);
           dspark_session_close(session), dspark_model_close(model);
       }

   cc -O2 -fopenmp program.c -lm       (in the repository; without -fopenmp: one thread, the same text)

   CONTENTS (search for a name with its two angle brackets; declarations first)
       >>api-algorithm     layer 1 declared: schedules, verifiers, random numbers, calibration, on your arrays
       >>api-model         checkpoint, weights, tokenizer, chat form
       >>api-engine        sessions, steps, statistics
       >>api-backend       what a device must do
       >>base              failures, memory, files
       >>elementary        exp, log, sin, cos with the same bits everywhere
       >>random            Philox, distributions, draws
       >>schedule          Algorithm 1 and its relatives
       >>verify            coupled, rejection, greedy
       >>calibrate         sequential temperature scaling; the never-slower account
       >>json              a strict parser: untrusted bytes are read here ...
       >>checkpoint        ... here: config.json, safetensors, shards ...
       >>tokenizer         ... and here: byte-level BPE
       >>chat              messages to a prompt
       >>state             what the CPU keeps of a text, indexed by position
       >>model             what opens it all
       >>forward           the target, an operation a line
       >>drafter           backbone and sequential head
       >>session           append, truncate, fork, save
       >>engine            one decoding cycle: draft, schedule, verify, commit
       >>kernels           vectors of arithmetic, declared
       >>cpu               the operations of the forward pass and the drafter
       >>paths             the kernels, once for plain C, AVX2, AVX-512, NEON
   A section opens with a paragraph that says what it takes and gives.

   THREE WAYS TO USE IT
   1. The algorithm alone (>>api-algorithm; DSPARK_NO_MODEL): pure functions on arrays, no model, no allocation. An
      engine with its own model takes dspark_schedule, dspark_verify, dspark_draw, dspark_sts_fit and leaves the rest.
   2. A model (>>api-model, >>api-engine): a released checkpoint directory is mapped as it is, and speaks.
   3. To read: >>forward is DeepSeek-V4 on one screen, >>engine is DSpark's cycle. Names are the papers'.

   GLOSSARY
       target      the model whose text is wanted; drafter: the small one that proposes, here mtp.* of the checkpoint
       anchor      the last committed token, not yet run: x_0 of a cycle
       gamma       drafts a cycle, x_1 .. x_gamma: dspark_block_size
       c_k         confidence: the chance that x_k is accepted if x_1 .. x_{k-1} were;  a_k = c_1 ... c_k: survival
       l           length: how many of the drafts the target verifies
       tau         tokens a cycle commits: accepted drafts, and one more: the correction or the bonus
       SPS(B)      passes of the target a second with B rows;  T(B) = 1 / SPS(B)
       tap         a target layer's stream, averaged over its copies: the drafter's input
       coupled     draft and target draw with the same random numbers; a draft stands iff plain decoding draws it, so
                   the text is a function of (prompt, seed). rejection: accepts more, with the same distribution,
                   but the text depends on the schedule

   ONE CYCLE, WITH NUMBERS
   Anchor "the". The drafter proposes "cat sat on the mat" with c = .95 .99 .90 .98 .40, so a = .95 .94 .85 .83 .33.
   Measured here: T(1 .. 6) = 1.0 1.2 1.4 1.6 1.8 2.0 ms, a draft .3 ms. Verifying l drafts brings 1 + a_1 + .. + a_l
   tokens in T(1 + l) + .3 ms: .77 1.30 1.70 1.97 2.17 2.13 tokens a ms for l = 0 .. 5, so l = 4. The target runs once
   on "the cat sat on the": five rows. Say that it would have written "cat sat down": cat and sat are accepted, the
   third row gives the correction, "down", which is committed and is the next anchor. tau = 3, in 2.1 ms; plain
   decoding takes 3. The rows of "on" and "the" stand in the caches, and are overwritten before anyone reads them.

   NEVER SLOWER
   Each session has an account in modelled time (T and the draft's cost): a cycle's gain over plain decoding is added,
   its loss subtracted. It drafts only if the account covers the worst outcome and a gain is expected, or, at a text's
   first step and every 64th, to probe. So any text takes at most 1.01 times plain decoding, plus three worst outcomes
   if texts of its kind (temperature 0, or a verifier and a temperature band) have earned them; all texts of a kind
   together take 1.01 times plain decoding plus one worst outcome for each that shares a step. A fork and a restored
   session open an account of their own. (Schedules BLOCK and THRESHOLD always draft.)

   SWITCHES (define before the implementation)
       DSPARK_STATIC           all functions static
       DSPARK_MALLOC(bytes), DSPARK_REALLOC(p, bytes), DSPARK_FREE(p)      all three or none
       DSPARK_NO_MODEL         layer 1 alone, for an engine that has its own model: libc and libm on any platform,
                               compiled in half a second
       DSPARK_NO_STDIO         without dspark_session_save and _restore, dspark_model_save_profile and _load_profile
   A model needs libc with POSIX mmap, or Windows, libm, and nothing else; threads come from OpenMP if it is on. The
   header compiles as C11 and C++17 and refuses -ffast-math. The file includes itself, as "dspark.h".

   MEMORY
   Weights stay in the mapped files. dspark_model_bytes and dspark_session_bytes say what is allocated besides;
   a step allocates nothing, but for one that measures a profile first. Caches of V4-Flash take .7 KB for each
   compressed row and layer.

   THREADS
   A session belongs to one thread at a time; calls that run the same model must not overlap. Any number of threads may
   use a tokenizer, a config and all of layer 1.

   ERRORS
   Functions return a dspark_status and set the thread's dspark_last_error(): what, where, expected, found. Nothing is
   printed, nothing exits, nothing leaks. A pointer may be NULL where its comment says so. Checkpoint, tokenizer,
   session and profile files are untrusted.

   THE ORDER OF ARITHMETIC is part of the definition (>>kernels): the same text on every path, with any number of
   threads, at any optimization level, in any batch. Two FP8 codes that released weights do not use, 127 and 255
   (NaN), are read as +-480.

   ON A GPU
   dspark_model_desc.backend = dspark_cuda_backend(), with dspark_cuda.cu linked in. Bits are the device's own: a seed
   gives one text there, speculation on or off, in any batch, but not the CPU's text. Tokens are drawn on the device in
   float, except in sessions with an adjust hook or log-probabilities: asking for log-probabilities may change a text if
   two tokens are within 1e-7. FP8 weights of NaN are NaN. README.md says what has run on which device.

   WHAT IT DOES NOT DO
   Big-endian machines; compilers other than gcc and clang. Several GPUs. Tool calls in the chat form.
   Models other than DeepSeek-V4. Conversion: checkpoints are the official safetensors or nothing.

   VERSIONS
       0.1.0   first
*/

#ifndef DSPARK__PATH
#ifndef DSPARK_H
#define DSPARK_H
#include <stddef.h>
#include <stdint.h>

#if defined DSPARK_STATIC && defined __GNUC__
#define DSPARK_API static __attribute__((unused))
#elif defined DSPARK_STATIC
#define DSPARK_API static
#elif defined __cplusplus
#define DSPARK_API extern "C"
#else
#define DSPARK_API extern
#endif

#define DSPARK_VERSION "0.1.0"

typedef enum {
    DSPARK_OK,
    DSPARK_ERROR_IO,                // a file cannot be read or written
    DSPARK_ERROR_FORMAT,            // a file is malformed
    DSPARK_ERROR_UNSUPPORTED,       // a file is valid but of an unsupported kind
    DSPARK_ERROR_MEMORY,
    DSPARK_ERROR_ARGUMENT,          // the call is wrong
    DSPARK_ERROR_CONTEXT_FULL,      // more tokens than max_context
    DSPARK_ERROR_NUMERIC,           // NaN or infinity in the logits that a token was to be drawn from
    DSPARK_ERROR_CANCELLED,         // a progress callback returned 0
    DSPARK_ERROR_BACKEND            // the device failed
} dspark_status;

// What went wrong last in this thread: what, where, expected, found. Valid until the next failure in it.
DSPARK_API const char *dspark_last_error(void);
DSPARK_API const char *dspark_status_name(dspark_status);       // "OK", "IO", ...

// >>api-algorithm
// Layer 1: pure functions on the caller's arrays. No model, no allocation, no state but the thread's error
// message: any thread, any time. Inputs are float, arithmetic is double in a fixed order: all machines give the same
// bits. Outputs are written only on DSPARK_OK (but see dspark_verify) and must not overlap inputs (but see
// dspark_distribution). r counts requests from 0, k drafts from 1: x_k is draft[k - 1].

// Which drafts a pass verifies. All but GLOBAL are lossless with any verifier. GLOBAL looks at x_k: do not use it with
// REJECTION unless drafts are one-hot; COUPLED and GREEDY may use it.
enum {
    DSPARK_SCHEDULE_PLAIN,      // none
    DSPARK_SCHEDULE_BLOCK,      // all
    DSPARK_SCHEDULE_THRESHOLD,  // up to the first c_k below the request's threshold
    DSPARK_SCHEDULE_PREFIX,     // Algorithm 1: the largest a_k first, as long as tokens a second rise
    DSPARK_SCHEDULE_ASYNC,      // the `budget` largest a_k; the budget comes from the past
    DSPARK_SCHEDULE_GLOBAL      // PREFIX without the stop: the maximum, even past a drop in the SPS table
};
enum { DSPARK_VERIFY_COUPLED, DSPARK_VERIFY_REJECTION, DSPARK_VERIFY_GREEDY };

// What a random number is for. PLAIN: at = position, k = 0. The others: at = cycle, k = row i of the cycle.
enum { DSPARK_DRAW_PLAIN, DSPARK_DRAW_DRAFT, DSPARK_DRAW_ACCEPT, DSPARK_DRAW_NEXT };

// Philox4x32-10 (Salmon et al. 2011).
DSPARK_API void dspark_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// u = (x + 1/2) 2^-32 in (0, 1), exact. x is word index mod 4 of Philox, key = seed, counter = (index / 4,
// at low, at high, purpose << 16 | k). index: a token; 0 for ACCEPT. k 0 .. 65535.
DSPARK_API double dspark_uniform(uint64_t seed, int purpose, uint64_t at, int k, uint32_t index);

// *token = argmax over p_v > 0 of p_v / -log(u_v), ties to the smaller v: Gumbel-max with one log. Draws v with
// probability p_v / sum p. p [vocab].
// NUMERIC: NaN, infinite, negative, or no mass. ARGUMENT: vocab < 1, purpose, k.
DSPARK_API dspark_status dspark_draw(const float *p, int vocab, uint64_t seed, int purpose, uint64_t at,
                                     int k, int32_t *token);

// logits [vocab] to p [vocab], which may be the same array: softmax of logit / temperature over the tokens
// that stay, best first (logit descending, id ascending), as Hugging Face filters them:
//     top_k    the first k                                                    off: 0, >= vocab
//     top_p    iff the mass before it < top_p x the mass that top_k left      off: 0, >= 1
//     min_p    iff exp((logit - max) / temperature) >= min_p                  off: 0
// Temperature 0: one-hot at the first. O(vocab).
// NUMERIC: NaN, +inf, nothing but -inf. ARGUMENT: temperature negative or not finite, top_k negative, top_p
// negative or NaN, min_p outside [0, 1], vocab < 1.
DSPARK_API dspark_status dspark_distribution(const float *logits, int vocab, float temperature, int top_k,
                                             float top_p, float min_p, float *p);

// Pass cost: sps[B - 1] passes a second with B = 1 .. n rows; beyond, time is proportional to B.
typedef struct { const float *sps; int n; } dspark_sps;

// Arrays are [n_requests] where no shape is given. Values are the caller's; nothing is kept.
typedef struct {
    const float *confidence;    // [n_requests][gamma] c_k, calibrated: P(x_k stands) if those before it do.
                                //   Clamped to [0, 1]; NaN ends the request. PLAIN, BLOCK: not read
    const int *n_drafted;       // 0 .. gamma; NULL: gamma
    const int *cap;             // verify no more than this, below 0 none; NULL: no cap
    const float *threshold;     // end before the first c_k, as given, not >= it; NULL: 0. PLAIN, BLOCK: not read
    const float *weight;        // what a token is worth, >= 0; NULL: 1. PREFIX, ASYNC, GLOBAL
    int n_requests, gamma, mode;        // DSPARK_SCHEDULE_*; 0: PLAIN
    int budget;                 // drafts to admit in total: the sum of GLOBAL's lengths with the confidences of
                                //   two steps ago; below 0: none. ASYNC
    int other_rows;             // rows of the pass for no request (prefill)
    const dspark_sps *sps;      // PREFIX, GLOBAL
    float draft_us;             // what drafting costs this step, however little is admitted. PREFIX, GLOBAL
    void *scratch;              // dspark_schedule_scratch_bytes, aligned for double. PREFIX, ASYNC, GLOBAL
} dspark_schedule_desc;

DSPARK_API size_t dspark_schedule_scratch_bytes(int n_requests, int gamma);

// lengths [n_requests]: how many drafts of each to verify. Candidates (r, k) of value weight_r a_k > 0, a_k =
// c_1 ... c_k, are admitted by value descending, then k, then r. PREFIX and GLOBAL maximize
//     theta = tau / (T(B) + draft_us),  tau = sum of weights and of the values admitted,
//     T(B) = 1e6 / SPS(B),  B = n_requests + other_rows + admitted        (Algorithm 1)
// O(n_requests gamma log n_requests).
// ARGUMENT: unknown mode, n_drafted outside 0 .. gamma; a size, weight or draft_us negative or not finite;
// sps without entries, or one not positive and finite; NULL where it is read.
DSPARK_API dspark_status dspark_schedule(const dspark_schedule_desc *, int *lengths);

typedef struct {
    const float *p_target;      // [n + 1][vocab] what plain decoding draws from; row i: at draft[i]'s place
    const float *p_draft;       // [n][vocab] what draft[i] was drawn from; NULL: one-hot at it. REJECTION
    const int32_t *draft;       // [n] 0 .. vocab - 1
    int n, vocab;
    int position;               // draft[0]'s. COUPLED
    int mode;                   // DSPARK_VERIFY_*; 0: COUPLED
    uint64_t seed;              // COUPLED, REJECTION
    uint64_t cycle;             // counts the session's steps that may draw, never goes back. REJECTION
} dspark_verify_desc;

// *n_accepted drafts stand, 0 .. n; *next comes after them: the replacement, or the bonus if all stand.
//     COUPLED    x stands iff dspark_draw(p_target row; PLAIN, its position) gives it: the text is plain
//                sampling's, a function of (prompt, seed). The drafter draws p_draft with the same numbers.
//     REJECTION  x stands iff u_ACCEPT p_d(x) < p_t(x); else next is drawn from max(0, p_t - p_d), or from
//                p_t where that is 0 everywhere (Leviathan, Chen). The drafter draws (DRAFT, cycle, i).
//     GREEDY     x stands iff it is the argmax, the smaller token of equals.
// A row is read only if all drafts before it stand. NUMERIC: a row read cannot be drawn from (see dspark_draw); then
// *n_accepted drafts stand and *next = -1. ARGUMENT: unknown mode, a draft outside the vocabulary, p_d(x) = 0.
DSPARK_API dspark_status dspark_verify(const dspark_verify_desc *, int *n_accepted, int32_t *next);

typedef struct {
    const float *logits;        // [n_cycles][gamma] of the confidence head, raw
    const int *accepted;        // [n_cycles] drafts accepted, 0 .. gamma, where the whole block was verified
    int n_cycles, gamma;        // n_cycles >= 1
    const float *grid;          // [n_grid] temperatures to try, > 0; NULL: 2^((g - 32) / 16), g = 0 .. 64
    int n_grid, n_bins;         // bins of the ECE, at most 1024; 0: 20
    double *scratch;            // [2][n_cycles]
} dspark_sts_desc;

// Sequential Temperature Scaling. For k = 1 .. gamma, those before fixed: the T_k of the grid for which the
// prefix's probability q_k = product of sigmoid(logit_j / T_j), j <= k, has the least ECE, the first of
// equals. ECE = sum over bins of |sum (q_k - (accepted >= k))| / n_cycles. temperature [gamma]; ece_before
// (all T = 1), ece_after [gamma] or NULL.
// NUMERIC: a logit is NaN. ARGUMENT: what the fields' comments exclude.
DSPARK_API dspark_status dspark_sts_fit(const dspark_sts_desc *, float *temperature, double *ece_before,
                                        double *ece_after);

// c = sigmoid(logit / temperature)
DSPARK_API double dspark_sts_apply(float logit, float temperature);

// Never slower: an account a session, in microseconds of modelled time. plain_us P: a step without drafts. worst_us W:
// drafting, and a pass over the whole block. Draft only if the account affords W; after every step, settle with its
// cost and its number of tokens tau (a plain step: P, P, 1). Then at every step
//     time <= (1 + allowance) P tokens + (W - P),  and over any stretch  <= (1 + allowance) P tokens + limit.
typedef struct { double allowance, balance_us, limit_us; } dspark_account;
DSPARK_API void dspark_account_open(dspark_account *, double plain_us, double worst_us); // .01, W-P, 16 (W-P)
DSPARK_API int dspark_account_affords(const dspark_account *, double plain_us, double worst_us);   // 1: draft
DSPARK_API void dspark_account_settle(dspark_account *, double plain_us, double cycle_us, int tau);

#ifndef DSPARK_NO_MODEL
// >>api-model
// A checkpoint directory as released, mapped: config.json, generation_config.json where present,
// model.safetensors or model.safetensors.index.json with its shards, tokenizer.json and calibration.json where
// present. The fields of dspark_config carry config.json's names. Whatever opens is valid: there is no unchecked model.

enum { DSPARK_MAX_LAYERS = 256, DSPARK_MAX_TAPS = 16, DSPARK_MAX_BLOCK = 16, DSPARK_MAX_EOS = 8 };

typedef struct {
    int vocab_size, hidden_size, num_hidden_layers, max_position_embeddings;
    int num_attention_heads, head_dim, qk_rope_head_dim, q_lora_rank, o_lora_rank, o_groups, sliding_window;
    int compress_ratios[DSPARK_MAX_LAYERS];     // of target layers, then of draft stages (0): 0, 4, or more
    int index_n_heads, index_head_dim, index_topk;
    int n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size, num_hash_layers;
    int hc_mult, hc_sinkhorn_iters;
    double rope_theta, compress_rope_theta;
    double rope_factor, rope_beta_fast, rope_beta_slow, rope_original_length;   // rope_scaling; factor 1: none
    float rms_norm_eps, hc_eps, swiglu_limit, routed_scaling_factor;
    int n_stages;                               // mtp.* in the file; 0: no drafter, every session is plain
    int dspark_block_size, dspark_markov_rank, dspark_noise_token_id;   // gamma; 0: no Markov head (DFlash)
    int n_taps, dspark_target_layer_ids[DSPARK_MAX_TAPS];
    int32_t bos_token_id, eos_token_id[DSPARK_MAX_EOS];     // bos -1: none
    int n_eos;
    float temperature, top_p;                   // generation_config.json; -1: not given
} dspark_config;

// A stored matrix, [rows][cols] row-major, mapped and unaligned. FP8: E4M3, a scale (E8M0, 2^(byte-127)) for
// each 128 x 128 block, [ceil(rows/128)][ceil(cols/128)]. FP4: E2M1, two a byte, low nibble first, a scale
// for each 32 of a row, [rows][cols/32]. Quantized matrices take their input rounded to FP8 (but wo_a does
// not).
enum { DSPARK_F32, DSPARK_BF16, DSPARK_F16, DSPARK_FP8, DSPARK_FP4 };
typedef struct {
    const void *data;           // NULL: the checkpoint has no such matrix
    const uint8_t *scale;       // FP8 and FP4 only
    int rows, cols, dtype;
} dspark_matrix;

// C copies of the hidden state h: hc_*_fn [n][C * h], base [n], scale: 3 (n = (2 + C) C) or 1 (n = C, a
// head's).
typedef struct { dspark_matrix fn; const float *scale, *base; } dspark_mix;

// Pools `ratio` tokens (8 where ratio is 4) into a row of d: wkv, wgate [w][h], ape [ratio][w], norm [d];
// w = d, or 2 d where ratio is 4.
typedef struct { dspark_matrix wkv, wgate; const float *ape, *norm; int ratio, d, w; } dspark_compressor;

typedef struct { dspark_matrix w1, w2, w3; } dspark_expert;     // gate, down, up

// A target layer or a draft stage. Vectors are floats, converted when the model opens.
typedef struct {
    int ratio;                              // 0: window only; 4: CSA, with the indexer; else HCA
    dspark_mix hc_attn, hc_ffn;
    const float *attn_norm, *ffn_norm;      // [h]
    dspark_matrix wq_a, wq_b, wkv, wo_a, wo_b;
    const float *q_norm, *kv_norm, *attn_sink;      // [q_lora_rank], [head_dim], [heads]
    dspark_compressor compressor;
    dspark_matrix index_wq_b, index_weights;
    dspark_compressor index_compressor;
    dspark_matrix gate;                     // [experts][h]
    const float *gate_bias;                 // [experts]; NULL in a hash layer
    const uint8_t *tid2eid;                 // hash layers: I64 or I32 [vocab][num_experts_per_tok], unaligned
    int tid2eid_bytes;                      // 8 or 4 an entry
    dspark_expert shared, *experts;         // [n_routed_experts]
} dspark_layer;

enum { DSPARK_HEAD_NONE, DSPARK_HEAD_VANILLA, DSPARK_HEAD_GATED, DSPARK_HEAD_RNN };

typedef struct {
    dspark_matrix embed, head;              // [vocab][h]
    const float *norm;
    dspark_mix hc_head;
    dspark_layer *layers;                   // [num_hidden_layers + n_stages]
    dspark_matrix main_proj;                // [h][n_taps * h]
    const float *main_norm, *draft_norm;    // [h]
    dspark_mix draft_hc_head;
    int head_kind;                          // DSPARK_HEAD_*: which of these the last stage has, never quantized
    dspark_matrix markov_w1, markov_w2;     // [vocab][rank]
    dspark_matrix gate_proj, joint_proj;    // gated: [rank][h + rank]; RNN: [3 rank][2 rank + h]
    const float *gate_bias, *joint_bias;    // NULL: none
    dspark_matrix confidence_proj;          // [1][h + rank]; data NULL: no confidence, 1 is assumed
    float confidence_bias;
} dspark_weights;

typedef struct dspark_model dspark_model;
typedef struct dspark_backend dspark_backend;

// How files become bytes; NULL fields: the system's mapping. data stays valid until unmap. Threads that open models at
// the same time call these at the same time.
typedef struct {
    dspark_status (*map)(void *user, const char *path, const void **data, uint64_t *size);
    void (*unmap)(void *user, const void *data, uint64_t size);
    void *user;
} dspark_files;

enum {
    DSPARK_PATH_BEST, DSPARK_PATH_PLAIN, DSPARK_PATH_AVX2, DSPARK_PATH_AVX512, DSPARK_PATH_NEON,
    DSPARK_PATH_AVX512_BF16, DSPARK_PATHS
};

typedef struct {
    const dspark_backend *backend;      // NULL: the CPU
    int n_threads;                      // to 1024; 0: all processors, not OMP_NUM_THREADS (1 without OpenMP)
    int cpu_path;                       // DSPARK_PATH_*; 0: the best this machine has. All give the same bits.
    int max_rows;                       // rows of a pass, to 2^20; 0: 128. Bounds the workspace; no text depends on it.
    int max_sessions;                   // a pass holds at least so many with whole blocks; 0: what max_rows allow
    size_t memory_limit;                // bytes that the model and its sessions may allocate; 0: no limit
    int fast_prefill;                   // 1: if an append holds all of positions [512 i, 512 (i + 1)), a device may run
                                        // them with faster products (CUDA: FP8, by cuBLASLt and its own kernels;
                                        // attention and bf16 matrices in bf16), whose bits differ. A text then depends
                                        // on how its prompt was split into appends; rows rerun after a long
                                        // truncation use the usual products. 0: never. No effect on the CPU.
    dspark_files files;
    int (*progress)(void *user, float done);    // 0..1, while opening; returns 0 to cancel
    void *user;
} dspark_model_desc;

// Opens a directory. desc NULL or zeroed: the CPU, all defaults. On an error *out is NULL. IO, FORMAT (names
// file, tensor, expected, found), UNSUPPORTED, MEMORY, CANCELLED. Threads may share a model, but calls that run it
// (append, step, draft, profile) or open or close its sessions must not overlap.
DSPARK_API dspark_status dspark_model_open(dspark_model **out, const char *dir,
                                           const dspark_model_desc *desc);
DSPARK_API void dspark_model_close(dspark_model *);             // after its sessions; NULL is fine
DSPARK_API const dspark_config *dspark_model_config(const dspark_model *);
DSPARK_API const dspark_weights *dspark_model_weights(const dspark_model *);
// Bytes that the model has allocated (vectors, workspace, tokenizer); *mapped: of the checkpoint's files.
// NULL: skip.
DSPARK_API size_t dspark_model_bytes(const dspark_model *, size_t *mapped);
DSPARK_API const char *dspark_model_path_name(const dspark_model *);    // "AVX-512", ...
DSPARK_API const char *dspark_model_placement(const dspark_model *);    // what a device has where; NULL: all is mapped
DSPARK_API int dspark_model_threads(const dspark_model *);

// ---- tokenizer: text to ids and back, as DeepSeek-V4's tokenizer.json says. An open tokenizer is read-only: any
// number of threads may use it. No function keeps a pointer it was given. A returned count of ids or bytes is the
// number needed, even if over cap; with cap 0 (the array may be NULL) only the count is returned. A failure returns
// minus its dspark_status and sets dspark_last_error.

typedef struct dspark_tokenizer dspark_tokenizer;

// Reads a tokenizer.json (byte-level BPE with DeepSeek-V4's patterns; the file may be untrusted). *out is the
// caller's to close; NULL after a failure: IO, FORMAT, UNSUPPORTED (names the part), MEMORY.
DSPARK_API dspark_status dspark_tokenizer_open(dspark_tokenizer **out, const char *tokenizer_json);
DSPARK_API void dspark_tokenizer_close(dspark_tokenizer *t);    // NULL is fine

enum { DSPARK_PLAIN_TEXT = 1 };

// Writes the ids of len bytes of text to ids[cap]; returns their number, at most len. Adds no begin-of-sentence.
// flags 0: added tokens ("<think>") in the text become tokens. DSPARK_PLAIN_TEXT: they stay text, as untrusted content
// should. The text may contain zeros; invalid UTF-8 keeps its bytes. Time is O(len log len). Fails with
// -DSPARK_ERROR_MEMORY, -DSPARK_ERROR_ARGUMENT (len over 2^31 - 1; t NULL, as of a model without tokenizer.json).
DSPARK_API int dspark_encode(const dspark_tokenizer *t, const char *text, size_t len, int flags, int32_t *ids,
                            int cap);

// Writes the bytes of ids[n] to text[cap], special tokens by name, no zero at the end; returns their number. They need
// not be UTF-8 (dspark_utf8_push). An id outside the vocabulary gives none. Fails with -DSPARK_ERROR_ARGUMENT over
// 2^31 - 1 bytes, or if t is NULL.
DSPARK_API int dspark_decode(const dspark_tokenizer *t, const int32_t *ids, int n, char *text, int cap);

DSPARK_API int dspark_tokenizer_size(const dspark_tokenizer *t);    // ids are 0 .. size - 1, without a gap

// A token's *len bytes, then a zero, valid until the tokenizer is closed; NULL and 0 outside the vocabulary.
DSPARK_API const char *dspark_token_bytes(const dspark_tokenizer *t, int32_t id, int *len);
DSPARK_API int dspark_token_is_special(const dspark_tokenizer *t, int32_t id);  // 1: flagged so in the file

// The token whose bytes these are, added or not; -1: none.
DSPARK_API int32_t dspark_token_id(const dspark_tokenizer *t, const char *text, size_t len);

// Bytes that come in pieces, such as tokens, to whole UTF-8 characters. {0} begins a text.
typedef struct { unsigned char held[4]; int n; } dspark_utf8;

// Takes n bytes and writes the characters they complete to out, which has room for 3 * (n + 3) bytes; each
// maximal part that is not UTF-8 becomes one U+FFFD (as Unicode recommends). A character that lacks bytes
// waits for the next call; last not 0 ends the text, where it becomes U+FFFD. Returns the bytes written.
DSPARK_API int dspark_utf8_push(dspark_utf8 *u, const char *bytes, int n, int last, char *out);

// ---- chat: messages to the prompt DeepSeek-V4 was trained on

// role: "system", "user", "assistant", "latest_reminder" (goes before the user message). content and, of an
// assistant, reasoning end in a zero; NULL is the empty text. wo_eos: an answer to be continued, so no
// end-of-sentence after it. User messages in a row are one, joined by a blank line.
typedef struct { const char *role, *content, *reasoning; int wo_eos; } dspark_message;

typedef struct {
    int thinking;       // 1: answers after the last user message open with <think>; 0: no reasoning at all
    int drop_thinking;  // 1: reasoning of the turns before that is left out, the usual form; 0: it is kept
    int effort_max;     // 1, with thinking: the paragraph that asks for the greatest effort comes first
    int continued;      // 1: the next turns of a session: no begin-of-sentence and no such paragraph
} dspark_chat_desc;

// Writes the prompt to text[cap], no zero at the end; returns its bytes. After a user message that is last or followed
// by an answer, the assistant's turn is opened. form NULL: {0}. Fails with -DSPARK_ERROR_ARGUMENT: an unknown role,
// over 2^31 - 1 bytes.
DSPARK_API int dspark_chat_format(const dspark_message *messages, int n, const dspark_chat_desc *form,
                                  char *text, int cap);

// Writes its ids to ids[cap]; returns their number. With DSPARK_PLAIN_TEXT, tokens named in contents and reasoning are
// text; those of the form itself stay tokens. Also fails with -DSPARK_ERROR_MEMORY, and with
// -DSPARK_ERROR_UNSUPPORTED where the tokenizer lacks a token of the form.
DSPARK_API int dspark_chat_encode(const dspark_tokenizer *t, const dspark_message *messages, int n,
                                  const dspark_chat_desc *form, int flags, int32_t *ids, int cap);
// The model's own; NULL where the directory holds no tokenizer.json.
DSPARK_API const dspark_tokenizer *dspark_model_tokenizer(const dspark_model *);

// >>api-engine
// A session is one text: committed tokens and the state that running them left, indexed by position. A step
// is one decoding cycle of some sessions: draft, schedule, verify, commit. It commits the anchor of the next
// cycle without having run it, so after a step the last token is pending until a pass has run it.
// A session belongs to one thread at a time.

typedef struct dspark_session dspark_session;

// A pure function of the prefix: changes logits [vocab] for the token after prefix [n] (penalties, bias, a
// mask). Called before temperature, on the draft's logits and on the target's alike.
typedef void (*dspark_adjust)(void *user, const int32_t *prefix, int n, float *logits, int vocab);

typedef struct {
    int plain;              // 1: no drafting
    int schedule;           // 0: fastest by the cost model, never slower than plain: GLOBAL, or PREFIX for sampled
                            // REJECTION, which refuses GLOBAL. DSPARK_SCHEDULE_PREFIX, _ASYNC, _GLOBAL: that one,
                            // never slower; _BLOCK: all drafts; _THRESHOLD: up to the first confidence below
                            // threshold
    int verify;             // DSPARK_VERIFY_COUPLED (0): the text of plain decoding; DSPARK_VERIFY_REJECTION;
                            // DSPARK_VERIFY_GREEDY: the argmax, as both are at temperature 0
    float threshold;        // of confidence, 0: none. Cuts in every schedule but BLOCK.
    int draft_cap;          // drafts verified a cycle at most; 0: the block
    int quota;              // tokens emitted in all before the session finishes, as dspark_stats.emitted counts them:
                            // also those of a fork's source, of earlier answers, and truncated ones; 0: no limit
    float share;            // of the verification budget: weight of its tokens among all sessions; 0: 1
} dspark_policy;

// A policy by name, from one table: "code", "chat", "creative", "regulated"; quota and share are the caller's to set.
// NULL: there is no such name. dspark_preset_name: the i-th, NULL after the last.
DSPARK_API const dspark_policy *dspark_preset(const char *name);
DSPARK_API const char *dspark_preset_name(int i);

typedef struct {
    int max_context;        // tokens, prompt included; 0: 4096 or the model's max_position_embeddings, the smaller
    uint64_t seed;
    float temperature;      // 0: greedy
    int top_k;              // 0: off
    float top_p, min_p;     // 0: off
    dspark_policy policy;
    dspark_adjust adjust;   // NULL: none
    void *adjust_user;
    const char *const *stop_strings;    // the text ends before the first of them; each 1 to 4096 bytes from a
                                        // character's first byte on; copied
    int n_stop_strings;
    const int32_t *stop_tokens;         // besides the checkpoint's eos_token_id; copied
    int n_stop_tokens;
    int ignore_eos;         // 1: eos_token_id does not stop
    int logprobs;           // 1: fill dspark_step_result.logprob
    int (*progress)(void *user, int done, int total);   // tokens of an append; returns 0 to cancel it
    void *user;             // progress's
} dspark_session_desc;

enum { DSPARK_RUNNING, DSPARK_STOP_TOKEN, DSPARK_STOP_STRING, DSPARK_LENGTH, DSPARK_CONTEXT };  // finish
DSPARK_API const char *dspark_finish_name(int finish);         // "running", "stop_token", ...
enum { DSPARK_BY_PLAIN, DSPARK_BY_DRAFT, DSPARK_BY_CORRECTION, DSPARK_BY_BONUS };   // who produced a token

typedef struct {
    dspark_status status;               // of this session. NUMERIC: the tokens before the bad row are committed; each
                                        // further step fails, too, until the text changes
    int finish;                         // DSPARK_RUNNING, or why it ended with this step's last token
    int n_tokens;                       // 0 while a submitted prompt is still running
    int32_t tokens[DSPARK_MAX_BLOCK + 2];
    unsigned char by[DSPARK_MAX_BLOCK + 2];         // DSPARK_BY_*
    float logprob[DSPARK_MAX_BLOCK + 2];            // ln p of softmax(adjusted logits), temperature 1; if asked for
    const char *text;                   // whole UTF-8 characters; the session's, until its next call. Tokens that are
    int text_len;                       // special (dspark_token_is_special) give none; what may become a stop string
                                        // is held back.
    int n_drafted, n_scheduled, n_accepted;         // of this cycle; 0 if it was plain
    int32_t draft[DSPARK_MAX_BLOCK];
    float confidence[DSPARK_MAX_BLOCK];             // c_k, calibrated
    float draft_us, verify_us;          // this session's share of the passes' time
    float step_us;                      // the wait for its tokens, from the step's begin
} dspark_step_result;

enum { DSPARK_BUCKETS = 48 };
typedef struct {
    int64_t steps;                      // with a pass of the target
    int64_t cycles;                     // of them with drafts
    int64_t drafted, accepted, emitted;
    int64_t cut;                        // steps whose last token, a draft, ended the text: no bonus
    int64_t scheduled;                  // verified, except drafts after the token that ended a text: not read
    int64_t scheduled_by_position[DSPARK_MAX_BLOCK], accepted_by_position[DSPARK_MAX_BLOCK];
    double draft_us, verify_us;
    double step_us;                     // the waits for emitted tokens
    int64_t token_us[DSPARK_BUCKETS];   // tokens that took up to 2^(i / 2 + 1) us, their share of step_us; last: more
} dspark_stats;

typedef struct {
    double tau;                         // tokens a pass of the target
    double rejection_rate;              // of the drafts scheduled
    double accepted_us;                 // draft_us and verify_us over the drafts accepted
    double p50_us, p95_us;              // of a token, to a bucket's width
} dspark_summary;
DSPARK_API dspark_summary dspark_stats_summary(const dspark_stats *);

// Writes to text[cap], zero-ended if it fits; returns the length, even if over cap.
// Counters for Prometheus, under the names that engines share: dspark_spec_decode_num_drafts_total (cycles),
// _num_draft_tokens_total (scheduled), _num_accepted_tokens_total, _num_accepted_tokens_per_pos_total, and more.
// labels: `model="x"`, of every sample; NULL: none.
DSPARK_API int dspark_stats_prometheus(const dspark_stats *, const char *labels, char *text, int cap);
// A step of a session as one line of JSON, newline and all; id is the caller's name for it.
DSPARK_API int dspark_step_json(const dspark_step_result *, int64_t id, char *text, int cap);

// The schedules' cost model: the time of a pass here, in microseconds. With B rows of n sessions, d tokens deep on
// average: T(B) + (n - 1) session_us min(d / sliding_window, 1) + B context_us (d - 256) / 1024; SPS(B) is its inverse.
enum { DSPARK_MAX_PROFILE = 64 };
typedef struct {
    int n;                              // points of T: B = rows[i] rows of one session, 256 tokens deep, take us[i]
    int rows[DSPARK_MAX_PROFILE];       // ascending
    float us[DSPARK_MAX_PROFILE];
    float session_us, context_us;
    float draft_us, draft_more_us;      // gamma drafts of one session; of each further one in the same draft pass
    float inject_us;                    // each tap beyond two that a draft must inject
    float sample_us;                    // drawing a token from its logits
    int learn;                          // 1: every step's passes correct it; close choices are tried both ways
    unsigned char seen[DSPARK_MAX_PROFILE], draft_seen;     // times seen, up to 8: more means smaller corrections
} dspark_profile;

// T(B): linear between the points; below them proportional to B; above them with the slope of their last half, but at
// least half of, and at most, the average time of a row. 0 without points.
DSPARK_API double dspark_profile_us(const dspark_profile *, int64_t rows);
// Measures one, if there is none, in about half a second and with sessions of its own; it learns. So does the first
// step needing one, unless there is a memory_limit: then, as with NULL below, it is learned from the steps.
DSPARK_API dspark_status dspark_model_profile(dspark_model *, dspark_profile *out);
// NULL: nothing is known. It is then learned from plain passes and wholly verified drafts, three of each; after that,
// never slower. Every session's account opens anew. ARGUMENT: rows not ascending, or over 10^8; us outside of 1e-3 to
// 1e12; a cost outside of 0 to 1e12.
DSPARK_API dspark_status dspark_model_set_profile(dspark_model *, const dspark_profile *);
#ifndef DSPARK_NO_STDIO
// To a file (measured first, if there is none) and back, as {"format": "dspark-profile-2", ...}. One of another
// checkpoint, path or number of threads is refused (FORMAT), as its times differ.
DSPARK_API dspark_status dspark_model_save_profile(dspark_model *, const char *path);
DSPARK_API dspark_status dspark_model_load_profile(dspark_model *, const char *path);
#endif
// A calibration for every session: c_k = sigmoid(logit_k / temperature[k]), [gamma]; NULL: all 1. Without this call a
// session uses the row of the checkpoint's calibration.json with its verifier (greedy at temperature 0) and the nearest
// temperature band, ties to the first; all 1 if there is none. A row may also have a curve for each k from the product
// of these c to its acceptance (`said`, `stood`): its value is then a_k.
DSPARK_API dspark_status dspark_model_set_calibration(dspark_model *, const float *temperature);

// What dspark_session_open will allocate, all there is to a session; 0 and an error if the desc is wrong.
DSPARK_API size_t dspark_session_bytes(const dspark_model *, const dspark_session_desc *);
// MEMORY: out of memory, or memory_limit would be exceeded.
DSPARK_API dspark_status dspark_session_open(dspark_session **out, dspark_model *,
                                             const dspark_session_desc *);
DSPARK_API void dspark_session_close(dspark_session *);         // NULL is fine

// Commits ids [n] (0 <= id < vocab) and runs them now, after which the logits for the next token are there.
// All or nothing: on ARGUMENT, CONTEXT_FULL, CANCELLED the session is as it was.
DSPARK_API dspark_status dspark_session_append(dspark_session *, const int32_t *ids, int n);
// Commits ids; the next steps run them.
DSPARK_API dspark_status dspark_session_submit(dspark_session *, const int32_t *ids, int n);
// Back to n_tokens <= length. Free within the rings (block size + 1 tokens); further back the last tokens are
// run again when next needed. The state has the bits of a session that never went further. Here as after an append,
// what comes is a new text: what was held back is dropped.
DSPARK_API dspark_status dspark_session_truncate(dspark_session *, int n_tokens);
// A copy at its present length under another desc (NULL: the same), statistics included. The source stays.
DSPARK_API dspark_status dspark_session_fork(dspark_session **out, const dspark_session *,
                                             const dspark_session_desc *);
DSPARK_API dspark_status dspark_session_set_policy(dspark_session *, const dspark_policy *);    // between any two steps
#ifndef DSPARK_NO_STDIO
// To a file and back. Refused (FORMAT) when the checkpoint differs; desc as for open, NULL: what the file
// says.
DSPARK_API dspark_status dspark_session_save(const dspark_session *, const char *path);
DSPARK_API dspark_status dspark_session_restore(dspark_session **out, dspark_model *, const char *path,
                                                const dspark_session_desc *);
#endif

DSPARK_API int dspark_session_length(const dspark_session *);                   // committed tokens
DSPARK_API const int32_t *dspark_session_tokens(const dspark_session *);        // [length]
DSPARK_API const float *dspark_session_logits(const dspark_session *);          // [vocab] for the next token; NULL
                                                                                // while a token is pending, as after
                                                                                // a step or a truncation
DSPARK_API const dspark_stats *dspark_session_stats(const dspark_session *);
DSPARK_API const dspark_stats *dspark_model_stats(const dspark_model *);        // of all its sessions, closed ones too
// What the drafter would propose after `anchor`: gamma tokens (argmax), gamma confidence logits and, unless NULL,
// [gamma][vocab] draft logits. Does not change the text; no token may be pending.
DSPARK_API dspark_status dspark_session_draft(dspark_session *, int32_t anchor, int32_t *tokens,
                                              float *confidence_logits, float *logits);

typedef struct {
    int prompt_rows;        // most rows of a submitted prompt a step; 0: what a pass has room for
} dspark_step_desc;

// One cycle of n sessions of one model, results [n]; desc NULL: defaults. A pass has up to max_rows rows: one a
// session, and those of the drafts worth verifying; max_sessions sessions always fit. Others follow in further passes.
// Prompts get the rows left by decoding. A session's text does not depend on the others (but see REJECTION), so
// sessions may join, leave and close between steps. Returns an error that concerns all (results are then undefined); a
// session's own is in its result. A finished session emits nothing and says why. ARGUMENT: one session twice.
DSPARK_API dspark_status dspark_step(dspark_session **sessions, int n, const dspark_step_desc *,
                                     dspark_step_result *results);

// >>api-backend
// What a device must do: hold state, and run the operations of a pass that >>forward and >>drafter call in
// turn. A pass is flat rows; every number that changes from pass to pass travels in dspark_pass. Operations return
// nothing; pass_end returns the first failure. A row's bits must not depend on the other rows.

typedef struct {
    void *state;                // the session's
    int row, n_rows;            // rows [row, row + n_rows) of the pass are its
    int position;               // of its first row; the others follow
    int keep_rows;              // 1: do not write compressed rows (refilling rings; they are already there)
    int logits_from;            // logits are wanted from row + logits_from on
    int inject_from;            // drafting: taps of positions [inject_from, position) enter the stages' windows first
} dspark_segment;

// A token drawn on the device: at temperature 0 the argmax, else dspark_draw's (seed, purpose, at, k) from
// dspark_distribution's p. NEXT with a draft_row (-1: none): the draft in that row of the last draft pass if it stands,
// else dspark_verify's replacement. Token -1: no distribution. Temperature -1: the logits instead.
typedef struct {
    float temperature, top_p, min_p;
    int top_k, purpose, k, draft_row;
    uint64_t seed, at;
} dspark_device_draw;

// A row of calibration.json: for sessions of this verifier at temperatures low .. high. curved: of prefixes of k + 1
// drafts whose product of c was said[k][i], the share stood[k][i] was accepted.
enum { DSPARK_CURVE_POINTS = 12 };
typedef struct {
    int verify, curved;
    float band[2], sts[DSPARK_MAX_BLOCK];
    float said[DSPARK_MAX_BLOCK][DSPARK_CURVE_POINTS], stood[DSPARK_MAX_BLOCK][DSPARK_CURVE_POINTS];
} dspark_calibration;

// The device's choice of drafts (ASYNC): the `budget` best of the preceding draft pass, which asked for draws and whose
// n_steps steps have not run yet. A segment of the target pass is an anchor, ids [n_segments], and at most n_rows - 1
// drafts; all rows are drawn. Arrays [n_segments].
typedef struct {
    int n_steps, budget;
    const int *draft_row;               // of its first draft in the draft pass; -1: it has none
    const float *weight, *threshold;
    const dspark_calibration *const *calibration;       // of its confidences
} dspark_choice;

enum { DSPARK_PASS_TARGET, DSPARK_PASS_DRAFT };
enum { DSPARK_PROMPT_BLOCK = 512 };
typedef struct {
    int kind;                   // DSPARK_PASS_*
    int n_rows, n_segments;
    const int32_t *ids;         // [n_rows]
    const dspark_segment *segments;
    const dspark_device_draw *draws;    // NULL: logits are wanted; else, if the backend draws, one for each row of
                                        // logits; in a draft pass, one for each segment's first draft: the next ones
                                        // add 1 to at (PLAIN) or to k (the others)
    int whole;                  // 1: rows are whole blocks of DSPARK_PROMPT_BLOCK of one prompt (fast_prefill)
    const dspark_choice *choice;        // NULL: rows are as the segments say; else n_rows is the maximum, and draws has
                                        // one for each segment, for the token after the anchor; later rows add 1 as
                                        // drafts do, and draft_row comes from the choice
} dspark_pass;

typedef struct {
    float *logits;              // [n_logits][vocab], in row order; the device's, until its next pass
    int n_logits;
    const float *confidence_logits;     // draft: [n_rows]
    const int32_t *tokens;      // [n_logits], where the pass asked for draws; their logits then mean nothing
    const int32_t *lengths, *drafts;    // of a choice: drafts chosen, [n_segments]; and [draft pass' rows], -1: none
} dspark_pass_result;

// A state as pieces of bytes, in a fixed order, for save and restore; called with each piece of n_tokens. data is valid
// during the call: it reads the bytes or, restoring, fills them in.
typedef dspark_status (*dspark_piece)(void *user, void *data, size_t bytes);

enum { DSPARK_SUB_ATTN, DSPARK_SUB_FFN };
struct dspark_backend {
    const char *name;
    dspark_status (*open)(void **device, const dspark_model *, const dspark_model_desc *);      // max_rows > 0
    void (*close)(void *device);
    size_t (*bytes)(const void *device);                            // allocated so far, states left out
    const char *(*path_name)(const void *device);
    int (*threads)(const void *device), (*max_rows)(const void *device);
    size_t (*state_bytes)(const void *device, int max_context);     // what state_open would allocate
    dspark_status (*state_open)(void **state, void *device, int max_context);
    void (*state_close)(void *state);
    dspark_status (*state_copy)(void *to, const void *from, int n_tokens);      // the state of n_tokens
    dspark_status (*state_pieces)(void *state, int n_tokens, int restore, dspark_piece, void *user);
    dspark_status (*pass_begin)(void *device, const dspark_pass *); // embeds: stream [rows][C][h]
    void (*mix_in)(void *device, int layer, int sub);               // stream -> normed input x [rows][h]
    void (*attention)(void *device, int layer);                     // x -> y [rows][h]
    void (*moe)(void *device, int layer);                           // x -> y [rows][h]
    void (*mix_out)(void *device, int layer, int sub);              // y and stream -> stream
    void (*tap)(void *device, int index);                           // mean of the copies -> state, tap `index`
    void (*head)(void *device);                                     // stream -> logits of the wanted rows
    void (*inject)(void *device);                                   // taps -> the stages' windows
    void (*draft_head)(void *device);                               // stream -> x_i, U_i [rows]
    void (*draft_step)(void *device, int k, const int32_t *previous);   // previous [n_segments]: the tokens before
                                                                    // draft k = 0.. -> logits, confidence of rows k
    float *(*draft_logits)(void *device);                           // [rows][vocab] of the last draft pass
    dspark_status (*pass_end)(void *device, dspark_pass_result *);  // drafting: before the steps, which fill it in
    // Both NULL: the backend does not draw. draft_steps replaces n_steps draft_step after a draft pass that asked for
    // draws: tokens [n_rows], -1: none; and each row's confidence. draw: a token from the caller's logits [vocab]. A
    // backend that draws also chooses (dspark_choice).
    dspark_status (*draft_steps)(void *device, int n_steps, const int32_t *previous, int32_t *tokens);
    dspark_status (*draw)(void *device, const float *logits, const dspark_device_draw *, int32_t *token);
    const char *(*placement)(const void *device);       // what lies where, a line; NULL: it is all in memory
};
DSPARK_API const dspark_backend *dspark_cpu_backend(void);
#ifdef __cplusplus
extern "C"
#endif
const dspark_backend *dspark_cuda_backend(void);        // in dspark_cuda.cu

// For a backend: makes `message` this thread's dspark_last_error and gives status back.
DSPARK_API dspark_status dspark_fail(dspark_status status, const char *message);
#endif  // DSPARK_NO_MODEL

#endif  // DSPARK_H

#if defined DSPARK_IMPLEMENTATION && !defined DSPARK__IMPLEMENTED
#define DSPARK__IMPLEMENTED

#ifdef __FAST_MATH__
#error "dspark.h: -ffast-math frees the order of sums, and with it the text; compile without"
#endif
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined FLT_EVAL_METHOD && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16     // 16: _Float16 as itself, too
#error "dspark.h: floats must be computed as floats (on x86: -mfpmath=sse)"
#endif
#ifndef DSPARK_NO_MODEL
#include <errno.h>
#include <time.h>
#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined __GNUC__ && defined __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#elif defined __GNUC__ && defined __aarch64__
#include <arm_neon.h>
#endif
#endif

#if defined DSPARK_MALLOC + defined DSPARK_REALLOC + defined DSPARK_FREE == 1 || \
    defined DSPARK_MALLOC + defined DSPARK_REALLOC + defined DSPARK_FREE == 2
#error "dspark.h: define all of DSPARK_MALLOC, DSPARK_REALLOC, DSPARK_FREE, or none"
#endif
#ifndef DSPARK_MALLOC
#define DSPARK_MALLOC(bytes) malloc(bytes)
#define DSPARK_REALLOC(p, bytes) realloc(p, bytes)
#define DSPARK_FREE(p) free(p)
#endif

// A compiler may fuse a * b + c where it likes to; here that would change bits. Fused products are written fma.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#elif defined __GNUC__
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// Code between these mostly calls and computes little: it is to compile fast. The GCC passes disabled here took a
// quarter of compile time; texts come as fast without. Kernels disable only DSPARK__PASSES' own: without those of
// DSPARK__SOON they take up to 4 % more instructions.
#define DSPARK__PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define DSPARK__SOON DSPARK__PRAGMA(clang attribute push(__attribute__((minsize)), apply_to = function))
#define DSPARK__SOON_END DSPARK__PRAGMA(clang attribute pop)
#elif defined __GNUC__
#define DSPARK__PASSES(...) \
    DSPARK__PRAGMA(GCC push_options) \
    DSPARK__PRAGMA(GCC optimize("O1", "fp-contract=off", "no-tree-pta", "no-tree-dominator-opts", "no-tree-ccp", \
                                "no-reorder-blocks", "no-crossjumping", __VA_ARGS__))
#define DSPARK__SOON \
    DSPARK__PASSES("no-tree-loop-optimize", "no-ivopts", "no-tree-ch", "no-move-loop-invariants", "ira-region=one", \
                   "no-cprop-registers", "no-forward-propagate", "no-if-conversion", "no-guess-branch-probability")
#define DSPARK__SOON_END DSPARK__PRAGMA(GCC pop_options)
#else
#define DSPARK__SOON
#define DSPARK__SOON_END
#endif
#ifdef __clang__        // within >>paths, all of which GCC compiles so
#define DSPARK__SOON_CLANG DSPARK__SOON
#define DSPARK__SOON_CLANG_END DSPARK__SOON_END
#else
#define DSPARK__SOON_CLANG
#define DSPARK__SOON_CLANG_END
#endif
#ifdef __GNUC__
#define DSPARK__INLINE static inline __attribute__((always_inline))
#define DSPARK__CALLED static __attribute__((noinline, unused))
#else
#define DSPARK__INLINE static inline
#define DSPARK__CALLED static inline
#endif
#if defined __MINGW32__ && !defined __clang__
#define DSPARK__PRINTF __attribute__((format(gnu_printf, 2, 3)))
#elif defined __GNUC__
#define DSPARK__PRINTF __attribute__((format(printf, 2, 3)))
#else
#define DSPARK__PRINTF
#endif

// >>base
// Failures, memory, sizes, files, time. A failure is a status and its thread's message; memory comes only from
// DSPARK_MALLOC and DSPARK_REALLOC; a size read from a file is checked before it is added or multiplied.

#ifdef __cplusplus
#define DSPARK__THREAD_LOCAL thread_local
#else
#define DSPARK__THREAD_LOCAL _Thread_local
#endif

static DSPARK__THREAD_LOCAL char dspark__message[512];

DSPARK_API const char *dspark_last_error(void) { return dspark__message; }

DSPARK_API const char *dspark_status_name(dspark_status status) {
    static const char *const names[] = { "OK",       "IO",           "FORMAT",  "UNSUPPORTED", "MEMORY",
                                         "ARGUMENT", "CONTEXT_FULL", "NUMERIC", "CANCELLED",   "BACKEND" };
    return (unsigned)status < sizeof names / sizeof *names ? names[status] : "unknown status";
}

DSPARK__PRINTF static dspark_status dspark__fail(dspark_status status, const char *format, ...) {
    char text[sizeof dspark__message];      // an argument may be the message itself
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(dspark__message, text, sizeof text);
    return status;
}

// Checks of an argument: 1, and the message names it, if it is NULL, or outside low .. high or NaN.
static int dspark__is_null(const char *what, const void *p) {
    if (!p) dspark__fail(DSPARK_ERROR_ARGUMENT, "%s is NULL", what);
    return !p;
}
static int dspark__outside(const char *what, double x, double low, double high) {
    if (x >= low && x <= high) return 0;
    if (high < INT_MAX)
        dspark__fail(DSPARK_ERROR_ARGUMENT, "%s = %.7g, expected %g .. %g", what, x, low, high);
    else dspark__fail(DSPARK_ERROR_ARGUMENT, "%s = %.7g, expected %g or more", what, x, low);
    return 1;
}

#ifndef DSPARK_NO_MODEL
DSPARK_API dspark_status dspark_fail(dspark_status status, const char *message) {
    return dspark__fail(status, "%s", message);
}

static dspark_status dspark__no_memory(size_t n, size_t size) {
    return dspark__fail(DSPARK_ERROR_MEMORY, "no memory for %zu items of %zu bytes", n, size);
}

// n zeroed items; NULL and a message if out of memory. An empty array is not NULL.
static void *dspark__alloc(size_t n, size_t size) {
    size_t bytes = n && size ? n * size : 1;
    void *p = size && n > SIZE_MAX / size ? NULL : DSPARK_MALLOC(bytes);
    if (!p) return dspark__no_memory(n, size), (void *)NULL;
    return memset(p, 0, bytes);
}

static void dspark__free(void *p) {
    if (p) DSPARK_FREE(p);
}

// Makes room for n items in an array of *cap, which grows to 3/2 n. NULL: out of memory, p is unchanged.
static void *dspark__grow(void *p, size_t *cap, size_t n, size_t size) {
    size_t more = n < 8 ? 8 : n > SIZE_MAX / 2 ? n : n + n / 2;
    void *q;
    if (p && n <= *cap) return p;
    if (more > SIZE_MAX / size || !(q = DSPARK_REALLOC(p, more * size)))
        return dspark__no_memory(more, size), (void *)NULL;
    *cap = more;
    return q;
}

// One allocation for many arrays: counted first, without a base, then placed. Sizes are rounded up to 64 bytes.
typedef struct { char *base; size_t n; } dspark__carver;
static void *dspark__carve(dspark__carver *v, size_t n, size_t size) {
    void *p = v->base ? v->base + v->n : NULL;
    v->n += (n * size + 63) / 64 * 64;
    return p;
}

static double dspark__now_us(void) {
    struct timespec t;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &t);
#else       // -std=c11 without a feature macro: a clock that may be set
    timespec_get(&t, TIME_UTC);
#endif
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

// Writes x with so many digits to text [32]. Files have a decimal point in every locale.
static const char *dspark__decimal(char *text, double x, int digits) {
    char *to = text;
    snprintf(text, 32, "%.*g", digits, x);
    for (const char *from = text; *from; from++)
        if (strchr("+-0123456789einfa", *from)) *to++ = *from;
        else if (to[-1] != '.') *to++ = '.';
    *to = 0;
    return text;
}

static int dspark__min(int a, int b) { return a < b ? a : b; }
static int dspark__max(int a, int b) { return a > b ? a : b; }

// Maps a file into memory; the caller may supply functions of its own (dspark_files).
#ifdef _WIN32
static dspark_status dspark__file_map(void *user, const char *path, const void **data, uint64_t *size) {
    HANDLE mapping = NULL, file = CreateFileA(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
    LARGE_INTEGER bytes;
    void *p = NULL;
    (void)user;
    bytes.QuadPart = 0;
    if (file == INVALID_HANDLE_VALUE)
        return dspark__fail(DSPARK_ERROR_IO, "%s: Windows error %lu", path, GetLastError());
    if (GetFileSizeEx(file, &bytes) && bytes.QuadPart > 0)
        mapping = CreateFileMappingA(file, NULL, PAGE_READONLY, 0, 0, NULL);
    if (mapping) p = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    if (!p && bytes.QuadPart) dspark__fail(DSPARK_ERROR_IO, "%s: mapping: Windows error %lu", path, GetLastError());
    else if (!p) dspark__fail(DSPARK_ERROR_IO, "%s: expected a file that is not empty", path);
    if (mapping) CloseHandle(mapping);      // the view keeps them
    CloseHandle(file);
    *data = p;
    *size = (uint64_t)bytes.QuadPart;
    return p ? DSPARK_OK : DSPARK_ERROR_IO;
}
static void dspark__file_unmap(void *user, const void *data, uint64_t size) {
    (void)user, (void)size;
    UnmapViewOfFile(data);
}
#else
static dspark_status dspark__file_map(void *user, const char *path, const void **data, uint64_t *size) {
    struct stat st;
    void *p;
    int fd = open(path, O_RDONLY);
    (void)user;
    if (fd < 0) return dspark__fail(DSPARK_ERROR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size <= 0) {
        close(fd);
        return dspark__fail(DSPARK_ERROR_IO, "%s: expected a file that is not empty", path);
    }
    p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (p == MAP_FAILED) return dspark__fail(DSPARK_ERROR_IO, "%s: mmap: %s", path, strerror(errno));
    *data = p;
    *size = (uint64_t)st.st_size;
    return DSPARK_OK;
}
static void dspark__file_unmap(void *user, const void *data, uint64_t size) {
    (void)user;
    munmap((void *)(uintptr_t)data, (size_t)size);
}
#endif
#endif

// >>elementary
// exp, log, sin and cos in double: within 2 ulp (sin, cos: 1e-15), with only +, -, *, / in a fixed order. So every
// compiler and libc gives the same bits. Coefficients: minimax (Remez).

static inline double dspark__from_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint64_t dspark__to_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Adding it rounds |x| < 2^51 to an integer, ties to even, and leaves that integer in the sum's low bits.
#define DSPARK__ROUND 0x1.8p52

// 2^k of an integer -1022 <= k <= 1023: k + 1023 into the low bits, from there into the exponent.
static inline double dspark__exp2_integer(double k) {
    return dspark__from_bits(dspark__to_bits(k + (DSPARK__ROUND + 1023)) << 52);
}

// exp(x) = 2^k exp(r), |r| <= ln2 / 2, exp(r) = 1 + r + r^2 q(r): gives exp(r) and k. No branch, no table.
static inline double dspark__exp_reduced(double x, double *k) {
    double n = (x * 0x1.71547652b82fep+0 + DSPARK__ROUND) - DSPARK__ROUND, r, s, even, odd;
    r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    s = r * r;
    even = 0x1.28ad72dd1dd64p-22 * s + 0x1.a0199a0c53efap-16;
    odd = 0x1.ad7f6e8eaa133p-26 * s + 0x1.71df2552a3075p-19;
    even = even * s + 0x1.6c16c1842a198p-10;
    odd = odd * s + 0x1.a01a012a57713p-13;
    even = even * s + 0x1.555555555087cp-5;
    odd = odd * s + 0x1.1111111127be6p-7;
    even = even * s + 0x1.000000000000ap-1;
    odd = odd * s + 0x1.55555555554fap-3;
    *k = n;
    return 1.0 + (r + s * (even + r * odd));
}

// Multiplies by 2^k as two factors: subnormals round only once, overflow gives infinity. NaN stays NaN.
static inline double dspark__exp(double x) {
    double k, half, y;
    x = x < -746.0 ? -746.0 : x;        // exp is 0 from -745.14 down, infinite from 709.79 up
    x = x > 710.0 ? 710.0 : x;
    y = dspark__exp_reduced(x, &k);
    half = (k * 0.5 + DSPARK__ROUND) - DSPARK__ROUND;
    return y * dspark__exp2_integer(half) * dspark__exp2_integer(k - half);
}

// The same for -700 <= x <= 700, where one factor will do. A loop over it vectorizes.
static inline double dspark__exp_moderate(double x) {
    double k, y = dspark__exp_reduced(x, &k);
    return y * dspark__exp2_integer(k);
}

// log(x) = k ln2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)); with s = f / (2 + f), log(1 + f) = 2 atanh(s),
// written as f - (f^2/2 - s (f^2/2 + s^2 P(s^2))), in which the leading f is exact.
static double dspark__log(double x) {
    double k = 0, f, h, s, z, p;
    uint64_t bits, k_bits;
    if (!(x > 0.0)) return x == 0.0 ? -HUGE_VAL : x - x + (double)NAN;
    if (x > DBL_MAX) return x;
    if (x < DBL_MIN) x *= 0x1p54, k = -54;
    bits = dspark__to_bits(x) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    k_bits = bits >> 52;
    k += (double)(int)k_bits - 1023.0;
    f = dspark__from_bits((bits & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu) - 1.0;
    h = 0.5 * f * f;
    s = f / (2.0 + f);
    z = s * s;
    p = 0x1.2f063b03bc977p-3 * z + 0x1.39a1a646853dbp-3;
    p = p * z + 0x1.74663fa981effp-3;
    p = p * z + 0x1.c71c5205e1814p-3;
    p = p * z + 0x1.24924941f52d6p-2;
    p = p * z + 0x1.999999997fd74p-2;
    p = p * z + 0x1.5555555555592p-1;
    return k * 0x1.62e42feep-1 - ((h - (s * (h + z * p) + k * 0x1.a39ef35793c76p-33)) - f);
}

// sin and cos for |x| <= 1.6e6, a context of a million positions at one radian each: up to 2^20 quarter turns are
// subtracted exactly (pi/2 in parts of 32 bits). Beyond that, accuracy falls; infinity and NaN give NaN.
static inline void dspark__sincos(double x, double *sine, double *cosine) {
    double turns = x * 0x1.45f306dc9c883p-1 + DSPARK__ROUND, k = turns - DSPARK__ROUND, r, z, s, c;
    unsigned quarter = (unsigned)(dspark__to_bits(turns) & 3);
    r = ((x - k * 0x1.921fb544p+0) - k * 0x1.0b4611a6p-34) - k * 0x1.3198a2e037073p-69;
    z = r * r;
    s = 0x1.5d9300f9fc5d7p-33 * z - 0x1.ae5e663a6e2acp-26;
    s = s * z + 0x1.71de3577b64ebp-19;
    s = s * z - 0x1.a01a019c1198fp-13;
    s = s * z + 0x1.111111110f87ap-7;
    s = s * z - 0x1.5555555555549p-3;
    s = r + r * z * s;
    c = -0x1.8fae9c7f4f69ep-37 * z + 0x1.1ee9ebe94d88cp-29;
    c = c * z - 0x1.27e4f809f0eabp-22;
    c = c * z + 0x1.a01a019cb1be4p-16;
    c = c * z - 0x1.6c16c16c1517ep-10;
    c = c * z + 0x1.555555555554cp-5;
    c = (1.0 - 0.5 * z) + z * z * c;
    *sine = quarter & 1 ? c : s;
    *cosine = quarter & 1 ? s : c;
    if (quarter & 2) *sine = -*sine;
    if ((quarter + 1) & 2) *cosine = -*cosine;
}

// >>random
// Random numbers without state: each is Philox4x32-10 (Salmon et al. 2011) of its seed, purpose, place (at, k) and
// token, so order, batch and threads cannot change it.

// Rows are read in tiles: loops of a constant length, one operation each, are what compilers vectorize.
enum { DSPARK__TILE = 64 };

// The next n values of a row, at most a tile; `fill` after its end
static inline void dspark__row_tile(const float *p, int n, float fill, float tile[DSPARK__TILE]) {
    if (n >= DSPARK__TILE) {
        memcpy(tile, p, DSPARK__TILE * sizeof *tile);
        return;
    }
    for (int j = 0; j < DSPARK__TILE; j++) tile[j] = j < n ? p[j] : fill;
}

static inline float dspark__max_tile(const float z[DSPARK__TILE]) {
    enum { HALF = DSPARK__TILE / 2 };
    float m[HALF];
    for (int j = 0; j < HALF; j++) m[j] = z[j] > z[j + HALF] ? z[j] : z[j + HALF];
    for (int half = HALF / 2; half; half /= 2)
        for (int j = 0; j < half; j++) m[j] = m[j] > m[j + half] ? m[j] : m[j + half];
    return m[0];
}

// A row of a distribution must be finite and not negative, with some mass. -0 is 0.
static dspark_status dspark__row_check(const char *who, const float *p, int n) {
    float x[DSPARK__TILE];
    int bad[DSPARK__TILE], mass[DSPARK__TILE], any_bad = 0, any_mass = 0, i, j;
    memset(bad, 0, sizeof bad);
    memset(mass, 0, sizeof mass);
    for (i = 0; i < n; i += DSPARK__TILE) {
        dspark__row_tile(p + i, n - i, 0, x);
        for (j = 0; j < DSPARK__TILE; j++) bad[j] |= !(x[j] >= 0) | !(x[j] <= FLT_MAX);
        for (j = 0; j < DSPARK__TILE; j++) mass[j] |= x[j] > 0;
    }
    for (j = 0; j < DSPARK__TILE; j++) any_bad |= bad[j], any_mass |= mass[j];
    if (!any_bad && any_mass) return DSPARK_OK;
    for (i = 0; i < n; i++)
        if (!(p[i] >= 0 && p[i] <= FLT_MAX))
            return dspark__fail(DSPARK_ERROR_NUMERIC, "%s: p[%d] = %g in a row of %d, expected 0 or more",
                                who, i, (double)p[i], n);
    return dspark__fail(DSPARK_ERROR_NUMERIC, "%s: a row of %d without mass", who, n);
}

DSPARK_API void dspark_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The four words of indices 4 * block .. 4 * block + 3
static void dspark__words(uint64_t seed, int purpose, uint64_t at, int k, uint32_t block, uint32_t out[4]) {
    uint32_t counter[4], key[2];
    counter[0] = block, counter[1] = (uint32_t)at, counter[2] = (uint32_t)(at >> 32);
    counter[3] = (uint32_t)purpose << 16 | (uint32_t)k;
    key[0] = (uint32_t)seed, key[1] = (uint32_t)(seed >> 32);
    dspark_philox(counter, key, out);
}

// In double: the result has 33 bits, and a float would round the largest to 1.
static double dspark__unit(uint32_t word) { return ((double)word + 0.5) * 0x1p-32; }

DSPARK_API double dspark_uniform(uint64_t seed, int purpose, uint64_t at, int k, uint32_t index) {
    uint32_t word[4];
    dspark__words(seed, purpose, at, k, index >> 2, word);
    return dspark__unit(word[index & 3]);
}

// argmax of w_v / -log(u_v) over w_v > 0, ties to the smaller v; -1: no weight. w = p - q (q NULL: w = p), but 0 for
// the token `without`. As -log u >= (1 - u)(1 + (1 - u) / 2), a w_v <= best (1 - u_v) loses by a factor of at least
// 1 + 2^-34, far above the rounding of log and quotient: few logs are needed. As 1 - u >= 2^-33, a w_v <= best 2^-33
// loses for any u_v: a group of four such (or of 64, judged by p alone) needs no random numbers.
static int32_t dspark__race(const float *p, const float *q, int without, int vocab, uint64_t seed,
                            int purpose, uint64_t at, int k) {
    float a[DSPARK__TILE], b[DSPARK__TILE];
    double w[DSPARK__TILE], best = 0;
    int32_t winner = -1;
    uint32_t word[4];
    memset(b, 0, sizeof b);
    for (int v = 0; v < vocab; v += DSPARK__TILE) {
        dspark__row_tile(p + v, vocab - v, 0, a);
        if ((double)dspark__max_tile(a) <= best * 0x1p-33) continue;
        if (q) dspark__row_tile(q + v, vocab - v, 0, b);
        for (int j = 0; j < DSPARK__TILE; j++) w[j] = (double)a[j] - (double)b[j];
        if (without >= v && without - v < DSPARK__TILE) w[without - v] = 0;
        for (int g = 0; g < DSPARK__TILE; g += 4) {
            double least = best * 0x1p-33;
            if (w[g] <= least && w[g + 1] <= least && w[g + 2] <= least && w[g + 3] <= least) continue;
            dspark__words(seed, purpose, at, k, (uint32_t)(v + g) / 4, word);
            for (int j = g; j < g + 4; j++) {
                double u = dspark__unit(word[j - g]), score;
                if (!(w[j] > best * (1.0 - u))) continue;
                score = w[j] / -dspark__log(u);
                if (score > best) best = score, winner = v + j;
            }
        }
    }
    return winner;
}

DSPARK_API dspark_status dspark_draw(const float *p, int vocab, uint64_t seed, int purpose, uint64_t at,
                                     int k, int32_t *token) {
    dspark_status status;
    if (dspark__is_null("draw: p", p) || dspark__is_null("draw: token", token) ||
        dspark__outside("draw: vocab", vocab, 1, INT_MAX) || dspark__outside("draw: k", k, 0, 65535) ||
        dspark__outside("draw: purpose", purpose, DSPARK_DRAW_PLAIN, DSPARK_DRAW_NEXT))
        return DSPARK_ERROR_ARGUMENT;
    if ((status = dspark__row_check("draw", p, vocab)) != DSPARK_OK) return status;
    *token = dspark__race(p, NULL, -1, vocab, seed, purpose, at, k);
    return DSPARK_OK;
}

// The weights of a row of logits: e_v = exp((logit_v - max) / t) for kept tokens, 0 for the others. A token is kept if
// e_v >= min_p and it is not after (cut, cut_id) in the order logit descending, id ascending.
typedef struct {
    const float *logits;
    int vocab, filtered, cut_id;        // filtered: cut or min_p take some away
    float cut;
    double max, t, min_p, least;        // where (logit - max) / t < least, e is 0
} dspark__softmax;

// A weight of 2^-150 or less becomes 0; a tile with all (logit - max) / t < -104 (exp(-104) is less) is not computed.
// This is exact: the sum is at least the best token's weight, 1, so its p <= 2^-150 rounds to 0 as a float (half the
// least subnormal, ties to even); and all such weights together are below the sum's rounding.
#define DSPARK__LEAST_WEIGHT 0x1p-150
#define DSPARK__LEAST_EXPONENT (-104.0)

// Writes the weights of the tile from i on to e. Returns 0 if all are 0; e is then not written.
static int dspark__weights_tile(const dspark__softmax *s, int i, const float z[DSPARK__TILE],
                                double e[DSPARK__TILE]) {
    const double max = s->max, t = s->t, least = DSPARK__LEAST_EXPONENT;
    double d[DSPARK__TILE];
    float best = dspark__max_tile(z);
    if (best < s->cut || ((double)best - max) / t < s->least) return 0;
    for (int j = 0; j < DSPARK__TILE; j++) d[j] = (double)z[j] - max;
    for (int j = 0; j < DSPARK__TILE && t != 1.0; j++) d[j] /= t;
    for (int j = 0; j < DSPARK__TILE; j++) d[j] = d[j] > least ? d[j] : least;
    for (int j = 0; j < DSPARK__TILE; j++) e[j] = dspark__exp_moderate(d[j]);
    for (int j = 0; j < DSPARK__TILE; j++) e[j] = e[j] > DSPARK__LEAST_WEIGHT ? e[j] : 0.0;
    for (int j = 0; j < DSPARK__TILE && s->filtered; j++)
        if (z[j] < s->cut || (z[j] == s->cut && i + j > s->cut_id) || e[j] < s->min_p) e[j] = 0;
    return 1;
}

// A float's bits as an integer of the same order (-0 and 0 are equal), and back
DSPARK__INLINE uint32_t dspark__ordered(float z) {
    uint32_t bits;
    z += 0.0f;
    memcpy(&bits, &z, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static float dspark__ordered_float(uint32_t key) {
    float z;
    key = key & 0x80000000u ? key ^ 0x80000000u : ~key;
    memcpy(&z, &key, sizeof z);
    return z;
}

// mass[b]: the weight (count: the number) of tokens whose key begins with `prefix`, then the `bits` bits of b
static void dspark__histogram(const dspark__softmax *s, int count, uint32_t prefix, int shift, int bits,
                              double *mass) {
    float z[DSPARK__TILE];
    double e[DSPARK__TILE];
    uint32_t key[DSPARK__TILE], same;
    memset(mass, 0, sizeof *mass << bits);
    for (int i = 0; i < s->vocab; i += DSPARK__TILE) {
        dspark__row_tile(s->logits + i, s->vocab - i, -HUGE_VALF, z);
        for (int j = 0; j < DSPARK__TILE; j++) key[j] = dspark__ordered(z[j]) >> shift;
        same = 0;
        for (int j = 0; j < DSPARK__TILE; j++) same |= (uint32_t)(key[j] >> bits == prefix);
        if (!same || (!count && !dspark__weights_tile(s, i, z, e))) continue;
        for (int j = 0; j < DSPARK__TILE && i + j < s->vocab; j++)
            if (key[j] >> bits == prefix) mass[key[j] & ((1u << bits) - 1)] += count ? 1.0 : e[j];
    }
}

// Keeps tokens, best first, until they reach the limit: top_k tokens or, if top_k is 0, top_p of the weight. A radix
// selection (the key's bits from the top, then ids of equal keys), since there is no storage to sort in. O(vocab) for
// any logits.
static void dspark__softmax_cut(dspark__softmax *s, int top_k, double top_p) {
    static const int width[3] = { 11, 11, 10 };
    double mass[2048], before = 0, limit = top_k;
    uint32_t prefix = 0;
    int level, shift = 32, b, pick, last = -1;
    float cut;
    for (level = 0; level < 3; level++) {
        shift -= width[level];
        dspark__histogram(s, top_k, prefix, shift, width[level], mass);
        if (level == 0 && !top_k) {
            for (b = 0; b < 2048; b++) limit += mass[b];
            limit *= top_p;
        }
        pick = -1;
        for (b = (1 << width[level]) - 1; b >= 0 && (pick < 0 || before + mass[pick] < limit); b--) {
            if (!(mass[b] > 0)) continue;
            if (pick >= 0) before += mass[pick];
            pick = b;
        }
        prefix = prefix << width[level] | (uint32_t)pick;
    }
    cut = dspark__ordered_float(prefix);
    for (b = 0; b < s->vocab && before < limit; b++) {
        if (s->logits[b] != cut || (cut == s->cut && b > s->cut_id)) continue;
        last = b;
        before += top_k ? 1.0 : dspark__exp(((double)cut - s->max) / s->t);
    }
    s->cut = cut, s->cut_id = last, s->filtered = 1;
}

// The largest logit. NaN, +infinity, or nothing but -infinity is NUMERIC.
static dspark_status dspark__logits_max(const dspark__softmax *s, double *max) {
    float z[DSPARK__TILE], m[DSPARK__TILE];
    int bad = 0, i, j;
    for (j = 0; j < DSPARK__TILE; j++) m[j] = -HUGE_VALF;
    for (i = 0; i < s->vocab; i += DSPARK__TILE) {
        dspark__row_tile(s->logits + i, s->vocab - i, -HUGE_VALF, z);
        for (j = 0; j < DSPARK__TILE; j++) bad |= !(z[j] <= FLT_MAX);
        for (j = 0; j < DSPARK__TILE; j++) m[j] = z[j] > m[j] ? z[j] : m[j];
    }
    for (i = 0; bad && i < s->vocab; i++)
        if (!(s->logits[i] <= FLT_MAX))
            return dspark__fail(DSPARK_ERROR_NUMERIC, "distribution: logit %d of %d is %g, expected a number",
                                i, s->vocab, (double)s->logits[i]);
    *max = (double)dspark__max_tile(m);
    if (*max < -DBL_MAX)
        return dspark__fail(DSPARK_ERROR_NUMERIC, "distribution: all %d logits are -inf", s->vocab);
    return DSPARK_OK;
}

// Fixed order: lane j sums tokens j, j + 64, ...; then the upper half of the lanes is added to the lower, down to one.
static double dspark__softmax_sum(const dspark__softmax *s) {
    float z[DSPARK__TILE];
    double e[DSPARK__TILE], sum[DSPARK__TILE];
    for (int j = 0; j < DSPARK__TILE; j++) sum[j] = 0;
    for (int i = 0; i < s->vocab; i += DSPARK__TILE) {
        dspark__row_tile(s->logits + i, s->vocab - i, -HUGE_VALF, z);
        if (!dspark__weights_tile(s, i, z, e)) continue;
        for (int j = 0; j < DSPARK__TILE; j++) sum[j] += e[j];
    }
    for (int half = DSPARK__TILE / 2; half; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}

// p = e / sum. A tile of logits is read before its p are written: they may be one array.
static void dspark__softmax_write(const dspark__softmax *s, double sum, float *p) {
    float z[DSPARK__TILE], q[DSPARK__TILE];
    double e[DSPARK__TILE];
    for (int i = 0; i < s->vocab; i += DSPARK__TILE) {
        size_t n = (size_t)(s->vocab - i < DSPARK__TILE ? s->vocab - i : DSPARK__TILE);
        dspark__row_tile(s->logits + i, s->vocab - i, -HUGE_VALF, z);
        if (!dspark__weights_tile(s, i, z, e)) {
            memset(p + i, 0, n * sizeof *p);
            continue;
        }
        for (int j = 0; j < DSPARK__TILE; j++) q[j] = (float)(e[j] / sum);
        memcpy(p + i, q, n * sizeof *p);
    }
}

DSPARK_API dspark_status dspark_distribution(const float *logits, int vocab, float temperature, int top_k,
                                             float top_p, float min_p, float *p) {
    dspark__softmax s;
    dspark_status status;
    int first = 0;
    if (dspark__is_null("distribution: logits", logits) || dspark__is_null("distribution: p", p) ||
        dspark__outside("distribution: vocab", vocab, 1, INT_MAX) ||
        dspark__outside("distribution: temperature", (double)temperature, 0, FLT_MAX) ||
        dspark__outside("distribution: top_k", top_k, 0, INT_MAX) ||
        dspark__outside("distribution: top_p", (double)top_p, 0, HUGE_VAL) ||
        dspark__outside("distribution: min_p", (double)min_p, 0, 1))
        return DSPARK_ERROR_ARGUMENT;
    s.logits = logits, s.vocab = vocab, s.t = (double)temperature;
    s.cut = -HUGE_VALF, s.cut_id = vocab, s.filtered = 0, s.min_p = 0, s.least = DSPARK__LEAST_EXPONENT;
    if ((status = dspark__logits_max(&s, &s.max)) != DSPARK_OK) return status;
    if (s.t == 0) {
        while ((double)logits[first] < s.max) first++;
        memset(p, 0, (size_t)vocab * sizeof *p);
        p[first] = 1;
        return DSPARK_OK;
    }
    if (top_k > 0 && top_k < vocab) dspark__softmax_cut(&s, top_k, 0);
    if (top_p > 0 && top_p < 1) dspark__softmax_cut(&s, 0, (double)top_p);
    if (min_p > 0) {
        double least = dspark__log((double)min_p) - 1e-9;       // below it surely e < min_p: spares exps
        s.min_p = (double)min_p, s.filtered = 1;
        s.least = least > s.least ? least : s.least;
    }
    dspark__softmax_write(&s, dspark__softmax_sum(&s), p);
    return DSPARK_OK;
}

DSPARK__SOON
// >>schedule
// How many drafts of each request one target pass verifies: Algorithm 1 and its relatives. A candidate (r, k)
// is draft k of request r, its value weight_r a_k the tokens it is expected to add. Values fall along a
// request, so their order over all requests is a merge: a heap holds the next candidate of each. O(n log R).

typedef struct { double value, survival; int k, r; } dspark__candidate;    // survival a_k, value weight_r a_k
typedef struct { const dspark_schedule_desc *desc; dspark__candidate *heap; int n; } dspark__merge;

DSPARK_API size_t dspark_schedule_scratch_bytes(int n_requests, int gamma) {
    return n_requests > 0 && gamma > 0 ? (size_t)n_requests * sizeof(dspark__candidate) : 0;
}

// m_r: drafts of request r that may be verified
static int dspark__schedule_limit(const dspark_schedule_desc *d, int r) {
    int m = d->n_drafted ? d->n_drafted[r] : d->gamma;
    if (d->cap && d->cap[r] < m) m = d->cap[r];
    return m > 0 ? m : 0;
}

// Does draft k + 1 pass the threshold, all before it having passed? NaN does not.
static int dspark__schedule_passes(const dspark_schedule_desc *d, int r, int k) {
    if (k >= dspark__schedule_limit(d, r)) return 0;
    return d->confidence[(size_t)r * (size_t)d->gamma + (size_t)k] >= (d->threshold ? d->threshold[r] : 0.0f);
}

// From (r, k) to (r, k + 1): a_{k+1} = a_k c_{k+1}. 0: the request has no more.
static int dspark__candidate_next(const dspark_schedule_desc *d, dspark__candidate *e) {
    double c;
    if (!dspark__schedule_passes(d, e->r, e->k)) return 0;
    c = (double)d->confidence[(size_t)e->r * (size_t)d->gamma + (size_t)e->k++];
    e->survival *= c < 0 ? 0 : c > 1 ? 1 : c;
    e->value = (d->weight ? (double)d->weight[e->r] : 1.0) * e->survival;
    return e->value > 0;
}

// Value descending, then k, then r: larger k first would let x_k influence its own admission.
static int dspark__candidate_precedes(const dspark__candidate *a, const dspark__candidate *b) {
    if (a->value != b->value) return a->value > b->value;
    return a->k != b->k ? a->k < b->k : a->r < b->r;
}

static void dspark__merge_sink(dspark__merge *m, int i) {
    dspark__candidate e = m->heap[i];
    for (int child; (child = 2 * i + 1) < m->n; i = child) {
        if (child + 1 < m->n && dspark__candidate_precedes(&m->heap[child + 1], &m->heap[child])) child++;
        if (!dspark__candidate_precedes(&m->heap[child], &e)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = e;
}

static void dspark__merge_open(dspark__merge *m, const dspark_schedule_desc *d) {
    m->desc = d, m->heap = (dspark__candidate *)d->scratch, m->n = 0;
    for (int r = 0; r < d->n_requests; r++) {
        dspark__candidate *e = &m->heap[m->n];
        e->value = 0, e->survival = 1, e->k = 0, e->r = r;
        if (dspark__candidate_next(d, e)) m->n++;
    }
    for (int i = m->n / 2 - 1; i >= 0; i--) dspark__merge_sink(m, i);
}

// The best candidate left; 0: there is none.
static int dspark__merge_next(dspark__merge *m, dspark__candidate *out) {
    if (!m->n) return 0;
    *out = m->heap[0];
    if (!dspark__candidate_next(m->desc, &m->heap[0])) m->heap[0] = m->heap[--m->n];
    if (m->n) dspark__merge_sink(m, 0);
    return 1;
}

// T(B) = 1e6 / SPS(B) microseconds, beyond the table in proportion to B
static double dspark__pass_us(const dspark_sps *sps, int64_t rows) {
    if (rows <= sps->n) return 1e6 / (double)sps->sps[rows - 1];
    return 1e6 * (double)rows / ((double)sps->n * (double)sps->sps[sps->n - 1]);
}

// Algorithm 1's loop: how many of the best candidates maximize theta = tau / (T(B) + draft). PREFIX stops at the first
// that does not raise it: later ones depend on x_k and must not affect its admission. GLOBAL goes to the end.
static int64_t dspark__schedule_admit(const dspark_schedule_desc *d) {
    dspark__merge m;
    dspark__candidate e;
    int64_t rows = (int64_t)d->n_requests + d->other_rows, n = 0, taken = 0;
    double tau = 0, best, theta, draft_us = (double)d->draft_us;
    for (int r = 0; r < d->n_requests; r++) tau += d->weight ? (double)d->weight[r] : 1.0;
    best = tau / (dspark__pass_us(d->sps, rows) + draft_us);
    dspark__merge_open(&m, d);
    while (dspark__merge_next(&m, &e)) {
        rows++, n++;
        tau += e.value;
        theta = tau / (dspark__pass_us(d->sps, rows) + draft_us);
        if (theta > best) best = theta, taken = n;
        else if (d->mode == DSPARK_SCHEDULE_PREFIX) break;
    }
    return taken;
}

static int dspark__is_positive(double x) { return x > 0 && x <= DBL_MAX; }

static dspark_status dspark__sps_check(const dspark_schedule_desc *d) {
    if (!d->sps || !d->sps->sps || d->sps->n < 1)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: mode %d needs an SPS table", d->mode);
    for (int b = 0; b < d->sps->n; b++)
        if (!dspark__is_positive((double)d->sps->sps[b]))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: sps[%d] = %g, expected a positive number",
                                b, (double)d->sps->sps[b]);
    return dspark__outside("schedule: draft_us", (double)d->draft_us, 0, FLT_MAX) ? DSPARK_ERROR_ARGUMENT : DSPARK_OK;
}

static dspark_status dspark__schedule_check(const dspark_schedule_desc *d) {
    for (int r = 0; r < d->n_requests && d->n_drafted; r++)
        if (d->n_drafted[r] < 0 || d->n_drafted[r] > d->gamma)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: n_drafted[%d] = %d, expected 0 .. %d", r,
                                d->n_drafted[r], d->gamma);
    if (d->mode <= DSPARK_SCHEDULE_BLOCK) return DSPARK_OK;
    if (!d->confidence)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: mode %d needs confidences", d->mode);
    if (d->mode == DSPARK_SCHEDULE_THRESHOLD) return DSPARK_OK;
    if (!d->scratch) return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: mode %d needs scratch", d->mode);
    for (int r = 0; r < d->n_requests && d->weight; r++)
        if (!(d->weight[r] >= 0 && d->weight[r] <= FLT_MAX))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "schedule: weight[%d] = %g, expected 0 or more", r,
                                (double)d->weight[r]);
    return d->mode == DSPARK_SCHEDULE_ASYNC ? DSPARK_OK : dspark__sps_check(d);
}

DSPARK_API dspark_status dspark_schedule(const dspark_schedule_desc *d, int *lengths) {
    dspark__merge m;
    dspark__candidate e;
    dspark_status status;
    int64_t n;
    int r;
    if (dspark__is_null("schedule: desc", d) || dspark__outside("schedule: n_requests", d->n_requests, 0, INT_MAX) ||
        dspark__outside("schedule: gamma", d->gamma, 0, INT_MAX) ||
        dspark__outside("schedule: other_rows", d->other_rows, 0, INT_MAX) ||
        dspark__outside("schedule: mode", d->mode, DSPARK_SCHEDULE_PLAIN, DSPARK_SCHEDULE_GLOBAL) ||
        (d->n_requests && dspark__is_null("schedule: lengths", lengths)))
        return DSPARK_ERROR_ARGUMENT;
    if (d->n_requests && d->gamma && (status = dspark__schedule_check(d)) != DSPARK_OK) return status;
    for (r = 0; r < d->n_requests; r++) {
        lengths[r] = 0;
        if (d->mode == DSPARK_SCHEDULE_BLOCK) lengths[r] = dspark__schedule_limit(d, r);
        if (d->mode == DSPARK_SCHEDULE_THRESHOLD)
            while (dspark__schedule_passes(d, r, lengths[r])) lengths[r]++;
    }
    if (d->mode <= DSPARK_SCHEDULE_THRESHOLD || !d->n_requests || !d->gamma) return DSPARK_OK;
    n = d->mode == DSPARK_SCHEDULE_ASYNC ? d->budget : dspark__schedule_admit(d);
    for (dspark__merge_open(&m, d); n > 0 && dspark__merge_next(&m, &e); n--) lengths[e.r] = e.k;
    return DSPARK_OK;
}
DSPARK__SOON_END

// >>verify
// Which drafts stand, and the token after them. Rows are read from left to right, none after the first rejected draft:
// plain decoding would not reach it.

// x stands with probability min(1, p_t(x) / p_d(x)), else the residual max(0, p_t - p_d): so the token comes
// from p_t whatever p_d is. p_draft NULL: p_d is one-hot at x.
static dspark_status dspark__verify_rejection(const dspark_verify_desc *d, int i, int *accepted,
                                              int32_t *token) {
    const float *p = d->p_target + (size_t)i * (size_t)d->vocab;
    const float *q = d->p_draft && i < d->n ? d->p_draft + (size_t)i * (size_t)d->vocab : NULL;
    dspark_status status;
    int32_t x = -1;
    *accepted = 0;
    if (i < d->n) {
        double q_x = 1;
        x = d->draft[i];
        if (q && (status = dspark__row_check("verify: p_draft", q, d->vocab)) != DSPARK_OK) return status;
        if (q) q_x = (double)q[x];
        if (!(q_x > 0))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "verify: p_draft[%d] of draft %d is 0, expected more",
                                i, x);
        *accepted = dspark_uniform(d->seed, DSPARK_DRAW_ACCEPT, d->cycle, i, 0) * q_x < (double)p[x];
        if (*accepted) return DSPARK_OK;
    }
    *token = dspark__race(p, q, q ? -1 : x, d->vocab, d->seed, DSPARK_DRAW_NEXT, d->cycle, i);
    if (*token < 0)     // p_t <= p_d everywhere: they differ by rounding
        *token = dspark__race(p, NULL, -1, d->vocab, d->seed, DSPARK_DRAW_NEXT, d->cycle, i);
    return DSPARK_OK;
}

// The first of the largest of a row, of logits or of a distribution
static int32_t dspark__argmax(const float *p, int n) {
    float x[DSPARK__TILE], best = -HUGE_VALF, most;
    int32_t v = 0;
    for (int i = 0; i < n; i += DSPARK__TILE) {
        dspark__row_tile(p + i, n - i, -HUGE_VALF, x);
        most = dspark__max_tile(x);
        if (most > best) best = most, v = i;
    }
    while (p[v] < best) v++;        // in that tile
    return v;
}

// Row i of the target. accepted: the draft of that place stands; else token is what comes there.
static dspark_status dspark__verify_row(const dspark_verify_desc *d, int i, int *accepted, int32_t *token) {
    const float *p = d->p_target + (size_t)i * (size_t)d->vocab;
    uint64_t at = (uint64_t)d->position + (uint64_t)i;
    dspark_status status = dspark__row_check("verify: p_target", p, d->vocab);
    if (status) return status;
    if (d->mode == DSPARK_VERIFY_REJECTION) return dspark__verify_rejection(d, i, accepted, token);
    if (d->mode == DSPARK_VERIFY_GREEDY) *token = dspark__argmax(p, d->vocab);
    else *token = dspark__race(p, NULL, -1, d->vocab, d->seed, DSPARK_DRAW_PLAIN, at, 0);
    *accepted = i < d->n && *token == d->draft[i];
    return DSPARK_OK;
}

DSPARK_API dspark_status dspark_verify(const dspark_verify_desc *d, int *n_accepted, int32_t *next) {
    dspark_status status;
    int32_t token = -1;
    int accepted = 0, i;
    if (dspark__is_null("verify: desc", d) || dspark__is_null("verify: n_accepted", n_accepted) ||
        dspark__is_null("verify: next", next) || dspark__outside("verify: n", d->n, 0, 65535) ||
        dspark__outside("verify: mode", d->mode, DSPARK_VERIFY_COUPLED, DSPARK_VERIFY_GREEDY) ||
        dspark__outside("verify: vocab", d->vocab, 1, INT_MAX) || dspark__is_null("verify: p_target", d->p_target) ||
        (d->mode == DSPARK_VERIFY_COUPLED && dspark__outside("verify: position", d->position, 0, INT_MAX)) ||
        (d->n && dspark__is_null("verify: draft", d->draft)))
        return DSPARK_ERROR_ARGUMENT;
    for (i = 0; i < d->n; i++)
        if (d->draft[i] < 0 || d->draft[i] >= d->vocab)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "verify: draft[%d] = %d, expected 0 .. %d", i,
                                d->draft[i], d->vocab - 1);
    for (i = 0; i <= d->n; i++) {
        status = dspark__verify_row(d, i, &accepted, &token);
        if (status == DSPARK_ERROR_NUMERIC) *n_accepted = i, *next = -1;
        if (status) return status;
        if (!accepted) break;
    }
    *n_accepted = i, *next = token;
    return DSPARK_OK;
}

DSPARK__SOON
// >>calibrate
// Calibrated confidence (Sequential Temperature Scaling), and an account that makes drafting cost next to nothing
// where it does not pay.

enum { DSPARK__STS_MAX_BINS = 1024 };

DSPARK_API double dspark_sts_apply(float logit, float temperature) {
    return 1.0 / (1.0 + dspark__exp(-(double)logit / (double)temperature));
}

// ECE of q = prefix * sigmoid(logit / T), the label being accepted > k: sum over bins |sum (q - label)| / N.
// q_out, unless NULL, gets q; it may be prefix.
static double dspark__sts_ece(const dspark_sts_desc *d, int k, const double *prefix, double t, int n_bins,
                              double *q_out) {
    double sum[DSPARK__STS_MAX_BINS], ece = 0;
    for (int b = 0; b < n_bins; b++) sum[b] = 0;
    for (int i = 0; i < d->n_cycles; i++) {
        double logit = (double)d->logits[(size_t)i * (size_t)d->gamma + (size_t)k];
        double q = prefix[i] / (1.0 + dspark__exp(-logit / t));
        int b = (int)(q * n_bins);
        sum[b < n_bins ? b : n_bins - 1] += q - (d->accepted[i] > k ? 1.0 : 0.0);
        if (q_out) q_out[i] = q;
    }
    for (int b = 0; b < n_bins; b++) ece += fabs(sum[b]);
    return ece / d->n_cycles;
}

static dspark_status dspark__sts_check(const dspark_sts_desc *d) {
    if (dspark__outside("sts: n_cycles", d->n_cycles, 1, INT_MAX) ||
        dspark__outside("sts: gamma", d->gamma, 0, INT_MAX) ||
        dspark__outside("sts: n_bins", d->n_bins, 0, DSPARK__STS_MAX_BINS) ||
        dspark__is_null("sts: scratch", d->scratch) ||
        (d->grid && dspark__outside("sts: n_grid", d->n_grid, 1, INT_MAX)) ||
        (d->gamma && (dspark__is_null("sts: logits", d->logits) || dspark__is_null("sts: accepted", d->accepted))))
        return DSPARK_ERROR_ARGUMENT;
    for (int g = 0; g < d->n_grid && d->grid; g++)
        if (!dspark__is_positive((double)d->grid[g]))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "sts: grid[%d] = %g, expected a positive number", g,
                                (double)d->grid[g]);
    for (int i = 0; i < d->n_cycles; i++) {
        if (d->gamma && (d->accepted[i] < 0 || d->accepted[i] > d->gamma))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "sts: accepted[%d] = %d, expected 0 .. %d", i,
                                d->accepted[i], d->gamma);
        for (int k = 0; k < d->gamma; k++)
            if (isnan(d->logits[(size_t)i * (size_t)d->gamma + (size_t)k]))
                return dspark__fail(DSPARK_ERROR_NUMERIC, "sts: logits[%d][%d] is NaN", i, k);
    }
    return DSPARK_OK;
}

// T of the default grid: 2^((g - 32) / 16), g = 0 .. 64
static float dspark__sts_temperature(const dspark_sts_desc *d, int g) {
    return d->grid ? d->grid[g] : (float)dspark__exp((g - 32) * (0x1.62e42fefa39efp-1 / 16));
}

DSPARK_API dspark_status dspark_sts_fit(const dspark_sts_desc *d, float *temperature, double *ece_before,
                                        double *ece_after) {
    int n, n_bins, n_grid;
    double *raw, *prefix;       // [n] products so far at T = 1, and at the T fitted
    dspark_status status;
    if (dspark__is_null("sts: desc", d)) return DSPARK_ERROR_ARGUMENT;
    if ((status = dspark__sts_check(d)) != DSPARK_OK) return status;
    if (d->gamma && dspark__is_null("sts: temperature", temperature)) return DSPARK_ERROR_ARGUMENT;
    n = d->n_cycles, n_bins = d->n_bins ? d->n_bins : 20, n_grid = d->grid ? d->n_grid : 65;
    raw = d->scratch, prefix = raw + n;
    for (int i = 0; i < n; i++) raw[i] = prefix[i] = 1;
    for (int k = 0; k < d->gamma; k++) {
        double before = dspark__sts_ece(d, k, raw, 1.0, n_bins, raw), least = HUGE_VAL;
        for (int g = 0; g < n_grid; g++) {
            float t = dspark__sts_temperature(d, g);
            double ece = dspark__sts_ece(d, k, prefix, (double)t, n_bins, NULL);
            if (ece < least) least = ece, temperature[k] = t;
        }
        dspark__sts_ece(d, k, prefix, (double)temperature[k], n_bins, prefix);
        if (ece_before) ece_before[k] = before;
        if (ece_after) ece_after[k] = least;
    }
    return DSPARK_OK;
}

DSPARK_API void dspark_account_open(dspark_account *a, double plain_us, double worst_us) {
    double loss = worst_us > plain_us ? worst_us - plain_us : 0;
    a->allowance = 0.01, a->balance_us = loss, a->limit_us = 16 * loss;
}

DSPARK_API int dspark_account_affords(const dspark_account *a, double plain_us, double worst_us) {
    return a->balance_us + (1.0 + a->allowance) * plain_us >= worst_us;
}

DSPARK_API void dspark_account_settle(dspark_account *a, double plain_us, double cycle_us, int tau) {
    double balance = a->balance_us + ((1.0 + a->allowance) * (tau * plain_us) - cycle_us);
    a->balance_us = balance < a->limit_us ? balance : a->limit_us;
}

DSPARK__SOON_END

#ifndef DSPARK_NO_MODEL
DSPARK__SOON
// >>json
// Parses JSON (strict RFC 8259) into an array of nodes in document order: config.json, the header of a safetensors
// file, tokenizer.json. The children of node i start at i + 1, those of an object as key, value, key, value; the node
// after i's subtree is nodes[i].next. So child k of an array of scalars is i + 1 + k, and a loop over children is
// for (c = i + 1; c < nodes[i].next; c = nodes[c].next).  The text is untrusted: depth, UTF-8, escapes and the syntax
// of numbers are checked, an object must not repeat a key, and the result takes 16 to 24 bytes a node and a copy of
// the text. Nothing points into the text afterwards.

enum {
    DSPARK__JSON_NULL, DSPARK__JSON_FALSE, DSPARK__JSON_TRUE, DSPARK__JSON_NUMBER, DSPARK__JSON_STRING,
    DSPARK__JSON_ARRAY, DSPARK__JSON_OBJECT
};

enum { DSPARK__JSON_DEPTH = 64 };

typedef struct {
    int kind, n;        // n: elements of an array, pairs of an object, bytes of a string or number
    int next;           // the node after this one's subtree
    int at;             // of a string or number: where it begins in strings; a zero ends it
} dspark__json_node;

typedef struct dspark__json {
    dspark__json_node *nodes;
    size_t cap;
    int n;
    char *strings;      // strings decoded (they may hold zeros), numbers as written
} dspark__json;

typedef struct {
    dspark__json *j;
    const char *path, *text;
    size_t len, at, used;       // bytes of text, offset of the next one, bytes used of strings
} dspark__json_reader;

// Reads the character at text. Returns its length, 1 to 4; if it is not UTF-8, minus the length of the part that
// Unicode says to replace by one U+FFFD (the longest that could begin a character, or one byte); 0 if n bytes are too
// few to tell.
static int dspark__utf8_read(const char *text, size_t n, uint32_t *code) {
    const unsigned char *s = (const unsigned char *)text;
    unsigned c = n ? s[0] : 0, low = 0x80, high = 0xBF;
    int length = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (!n) return 0;
    *code = c;
    if (length == 1) return 1;
    if (c < 0xC2 || c > 0xF4) return -1;
    if (c == 0xE0) low = 0xA0;      // overlong forms
    if (c == 0xED) high = 0x9F;     // surrogates
    if (c == 0xF0) low = 0x90;
    if (c == 0xF4) high = 0x8F;     // above U+10FFFF
    *code = c & (0x7Fu >> length);
    for (int i = 1; i < length; i++, low = 0x80, high = 0xBF) {
        if ((size_t)i == n) return 0;
        if (s[i] < low || s[i] > high) return -i;
        *code = *code << 6 | (s[i] & 0x3Fu);
    }
    return length;
}

// 1 to 4 bytes; returns how many
static int dspark__utf8_write(uint32_t code, char *out) {
    int length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned first[] = { 0, 0, 0xC0, 0xE0, 0xF0 };
    for (int i = length - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)(first[length] | code);
    return length;
}

// For open addressing: 8 bytes a step, high bits folded down. Seeded with the table's address, which a file cannot
// predict, so it cannot choose names that collide.
static uint32_t dspark__hash(const char *s, size_t n, uint64_t seed) {
    uint64_t h = (0x9E3779B97F4A7C15u * (n + 1)) ^ (seed * 0xA0761D6478BD642Fu), word;
    for (; n; s += n < 8 ? n : 8, n -= n < 8 ? n : 8) {
        word = 0;
        if (n >= 8) memcpy(&word, s, 8);
        else for (size_t i = 0; i < n; i++) word = word << 8 | (unsigned char)s[i];
        h = (h ^ word) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    h *= 0xD6E8FEB86659FD93u;
    return (uint32_t)(h >> 32);
}
// The mask of a table that n entries fill at most half.
static size_t dspark__table_mask(size_t n) {
    size_t size = 16;
    while (size < 2 * n) size *= 2;
    return size - 1;
}

// ---- reading a parsed document: a node of another kind, or -1, gives the empty answer

static int dspark__json_kind(const dspark__json *j, int node) {
    return node >= 0 && node < j->n ? j->nodes[node].kind : -1;
}

static int dspark__json_next(const dspark__json *j, int node) { return j->nodes[node].next; }

// A string's *len bytes (len may be NULL), then a zero; NULL if the node is no string.
static const char *dspark__json_string(const dspark__json *j, int node, size_t *len) {
    int is_string = dspark__json_kind(j, node) == DSPARK__JSON_STRING;
    if (len) *len = is_string ? (size_t)j->nodes[node].n : 0;
    return is_string ? j->strings + j->nodes[node].at : NULL;
}

static int dspark__json_is(const dspark__json *j, int node, const char *text) {
    size_t len;
    const char *s = dspark__json_string(j, node, &len);
    return s && len == strlen(text) && !memcmp(s, text, len);
}

// What a message shows of a node; "nothing" for -1.
static const char *dspark__json_show(const dspark__json *j, int node) {
    static const char *const names[] = { "null", "false", "true", "", "", "an array", "an object" };
    int kind = dspark__json_kind(j, node);
    if (kind == DSPARK__JSON_NUMBER || kind == DSPARK__JSON_STRING) return j->strings + j->nodes[node].at;
    return kind < 0 ? "nothing" : names[kind];
}

// The value of a key, or -1. A linear search: to find thousands of keys in one object, loop over it instead.
static int dspark__json_find(const dspark__json *j, int object, const char *key) {
    if (dspark__json_kind(j, object) != DSPARK__JSON_OBJECT) return -1;
    for (int i = object + 1; i < j->nodes[object].next; i = j->nodes[i + 1].next)
        if (dspark__json_is(j, i, key)) return i + 1;
    return -1;
}

// Returns 1 if the node is a number without fraction and exponent that fits *value.
static int dspark__json_integer(const dspark__json *j, int node, int64_t *value) {
    const char *s;
    uint64_t u = 0, limit = INT64_MAX;
    int negative;
    if (dspark__json_kind(j, node) != DSPARK__JSON_NUMBER) return 0;
    s = j->strings + j->nodes[node].at;
    negative = *s == '-';
    limit += (uint64_t)negative;
    for (s += negative; *s; s++) {
        unsigned digit = (unsigned)(*s - '0');
        if (digit > 9 || u > (limit - digit) / 10) return 0;
        u = u * 10 + digit;
    }
    *value = !negative ? (int64_t)u : u ? -(int64_t)(u - 1) - 1 : 0;
    return 1;
}

// Returns digits * 10^exponent within 1 ulp, nearly always the nearest double. Works on 128 bits, m[0] the highest
// word, times a power of two; each of at most 400 steps loses less than 2^-123 of the value.
static double dspark__json_scale(uint64_t digits, int exponent) {
    uint32_t m[4] = { (uint32_t)(digits >> 32), (uint32_t)digits, 0, 0 };
    uint64_t top;
    int binary = 0;
    if (!digits) return 0;
    for (;; exponent += exponent > 0 ? -1 : 1) {
        uint64_t carry = 0;
        while (!(m[0] >> 31)) {
            for (int i = 0; i < 4; i++) m[i] = m[i] << 1 | (i < 3 ? m[i + 1] >> 31 : 0);
            binary--;
        }
        if (!exponent) break;
        if (exponent > 0) {
            for (int i = 3; i >= 0; i--) m[i] = m[i] >> 4 | (i ? m[i - 1] << 28 : 0);   // room for times ten
            for (int i = 3; i >= 0; i--) carry += (uint64_t)m[i] * 10, m[i] = (uint32_t)carry, carry >>= 32;
            binary += 4;
        } else for (int i = 0; i < 4; i++) {
            carry = carry << 32 | m[i];
            m[i] = (uint32_t)(carry / 10), carry %= 10;
        }
    }
    top = (uint64_t)m[0] << 32 | m[1] | (m[2] || m[3]);     // what is below decides ties
    return ldexp((double)top, binary);
}

// 1 for a number whose value is finite as a double.
static int dspark__json_real(const dspark__json *j, int node, double *value) {
    const char *s;
    uint64_t digits = 0;
    int64_t exponent = 0, given = 0;
    int negative, fraction = 0, given_negative;
    double x;
    if (dspark__json_kind(j, node) != DSPARK__JSON_NUMBER) return 0;
    s = j->strings + j->nodes[node].at;
    negative = *s == '-';
    for (s += negative; *s && *s != 'e' && *s != 'E'; s++) {
        if (*s == '.') { fraction = 1; continue; }
        if (digits > (UINT64_MAX - 9) / 10) exponent += !fraction;      // the 20th digit and on
        else digits = digits * 10 + (uint64_t)(*s - '0'), exponent -= fraction;
    }
    s += *s != 0;
    given_negative = *s == '-';
    for (s += *s == '-' || *s == '+'; *s; s++)
        if (given < INT64_C(1000000000000)) given = given * 10 + (*s - '0');
    exponent += given_negative ? -given : given;
    if (!digits || exponent < -400) x = 0;
    else if (exponent > 400) return 0;
    else x = dspark__json_scale(digits, (int)exponent);
    if (x > DBL_MAX) return 0;
    *value = negative ? -x : x;
    return 1;
}

static void dspark__json_free(dspark__json *j) {
    dspark__free(j->nodes);
    dspark__free(j->strings);
    memset(j, 0, sizeof *j);
}

// ---- parsing

// Fails: the next byte is not what the grammar expects.
static dspark_status dspark__json_expected(const dspark__json_reader *r, const char *what) {
    unsigned c = r->at < r->len ? (unsigned char)r->text[r->at] : 0;
    char found[16] = "the end";
    if (r->at < r->len) snprintf(found, sizeof found, c > 0x20 && c < 0x7F ? "'%c'" : "byte 0x%02X", (int)c);
    return dspark__fail(DSPARK_ERROR_FORMAT, "%s: byte %zu: expected %s, found %s", r->path, r->at, what,
                        found);
}

// The next byte; 0 at the end, as a zero byte is valid nowhere.
static int dspark__json_peek(const dspark__json_reader *r) {
    return r->at < r->len ? (unsigned char)r->text[r->at] : 0;
}

static int dspark__json_take(dspark__json_reader *r, char c) {
    if (r->at == r->len || r->text[r->at] != c) return 0;
    r->at++;
    return 1;
}

static void dspark__json_space(dspark__json_reader *r) {
    while (r->at < r->len) {
        char c = r->text[r->at];
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return;
        r->at++;
    }
}

static dspark_status dspark__json_push(dspark__json_reader *r, int kind) {
    dspark__json *j = r->j;
    dspark__json_node *node;
    node = (dspark__json_node *)dspark__grow(j->nodes, &j->cap, (size_t)j->n + 1, sizeof *node);
    if (!node) return DSPARK_ERROR_MEMORY;
    j->nodes = node;
    node += j->n++;
    node->kind = kind, node->n = 0, node->next = j->n, node->at = (int)r->used;
    return DSPARK_OK;
}

static dspark_status dspark__json_hex(dspark__json_reader *r, uint32_t *unit) {
    *unit = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        int c = dspark__json_peek(r), lower = c | 32;
        int digit = c >= '0' && c <= '9' ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
        if (digit < 0) return dspark__json_expected(r, "a hexadecimal digit");
        *unit = *unit << 4 | (uint32_t)digit;
    }
    return DSPARK_OK;
}

// Reads an escape, from its backslash on. An unpaired surrogate is an error.
static dspark_status dspark__json_escape(dspark__json_reader *r) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    size_t begin = r->at++;
    int c = dspark__json_peek(r);
    const char *found = c ? strchr(names, c) : NULL;
    uint32_t code, second = 0;
    dspark_status status;
    if (found) {
        r->j->strings[r->used++] = values[found - names];
        r->at++;
        return DSPARK_OK;
    }
    if (!dspark__json_take(r, 'u')) return dspark__json_expected(r, "one of \"\\/bfnrtu after a backslash");
    if ((status = dspark__json_hex(r, &code)) != DSPARK_OK) return status;
    if (code >= 0xD800 && code < 0xDC00 && dspark__json_take(r, '\\') && dspark__json_take(r, 'u') &&
        (status = dspark__json_hex(r, &second)) != DSPARK_OK) return status;
    if (second >= 0xDC00 && second < 0xE000) code = 0x10000 + ((code - 0xD800) << 10 | (second - 0xDC00));
    if (code >= 0xD800 && code < 0xE000) {
        r->at = begin;
        return dspark__json_expected(r, "both halves of a surrogate pair");
    }
    r->used += (size_t)dspark__utf8_write(code, r->j->strings + r->used);
    return DSPARK_OK;
}

// Reads a string, quotes included. Decoded text is never longer than the source; the quotes leave room for its zero.
static dspark_status dspark__json_text(dspark__json_reader *r) {
    dspark_status status = dspark__json_push(r, DSPARK__JSON_STRING);
    dspark__json_node *node;
    uint32_t code;
    if (status) return status;
    node = &r->j->nodes[r->j->n - 1];
    for (r->at++; !dspark__json_take(r, '"');) {
        int c = dspark__json_peek(r), length;
        if (c == '\\') {
            if ((status = dspark__json_escape(r)) != DSPARK_OK) return status;
        } else if (c < 0x20) {
            return dspark__json_expected(r, "a character of a string or '\"'");
        } else if (c < 0x80) {
            r->j->strings[r->used++] = (char)c;
            r->at++;
        } else {
            length = dspark__utf8_read(r->text + r->at, r->len - r->at, &code);
            if (length <= 0) return dspark__json_expected(r, "UTF-8");
            memcpy(r->j->strings + r->used, r->text + r->at, (size_t)length);
            r->used += (size_t)length, r->at += (size_t)length;
        }
    }
    node->n = (int)r->used - node->at;
    r->j->strings[r->used++] = 0;
    return DSPARK_OK;
}

static dspark_status dspark__json_digits(dspark__json_reader *r) {
    if (dspark__json_peek(r) < '0' || dspark__json_peek(r) > '9') return dspark__json_expected(r, "a digit");
    while (dspark__json_peek(r) >= '0' && dspark__json_peek(r) <= '9') r->at++;
    return DSPARK_OK;
}

// -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?  The delimiter or end after it leaves room for a zero.
static dspark_status dspark__json_number(dspark__json_reader *r) {
    size_t begin = r->at;
    dspark_status status = dspark__json_push(r, DSPARK__JSON_NUMBER);
    dspark__json_node *node;
    if (status) return status;
    dspark__json_take(r, '-');
    if (!dspark__json_take(r, '0') && (status = dspark__json_digits(r)) != DSPARK_OK) return status;
    if (dspark__json_take(r, '.') && (status = dspark__json_digits(r)) != DSPARK_OK) return status;
    if (dspark__json_take(r, 'e') || dspark__json_take(r, 'E')) {
        if (!dspark__json_take(r, '-')) dspark__json_take(r, '+');
        if ((status = dspark__json_digits(r)) != DSPARK_OK) return status;
    }
    node = &r->j->nodes[r->j->n - 1];
    node->n = (int)(r->at - begin);
    memcpy(r->j->strings + r->used, r->text + begin, r->at - begin);
    r->used += r->at - begin;
    r->j->strings[r->used++] = 0;
    return DSPARK_OK;
}

static dspark_status dspark__json_word(dspark__json_reader *r, const char *word, int kind) {
    for (; *word; word++)
        if (!dspark__json_take(r, *word)) return dspark__json_expected(r, "null, true or false");
    return dspark__json_push(r, kind);
}

static dspark_status dspark__json_repeated(const dspark__json_reader *r, int key) {
    return dspark__fail(DSPARK_ERROR_FORMAT, "%s: byte %zu: expected each key once in the object that ends "
                        "here, found \"%.64s\" again", r->path, r->at, r->j->strings + r->j->nodes[key].at);
}

static int dspark__json_equal(const dspark__json *j, int a, int b) {
    const dspark__json_node *x = &j->nodes[a], *y = &j->nodes[b];
    return x->n == y->n && !memcmp(j->strings + x->at, j->strings + y->at, (size_t)x->n);
}

// Rejects repeated keys: compares all pairs if keys are few, else uses a hash table of nodes (0 is never a key).
static dspark_status dspark__json_unique(const dspark__json_reader *r, int object) {
    const dspark__json *j = r->j;
    size_t mask = dspark__table_mask((size_t)j->nodes[object].n);
    int end = j->nodes[object].next, again = 0, *table;
    if (j->nodes[object].n <= 8) {
        for (int a = object + 1; a < end; a = j->nodes[a + 1].next)
            for (int b = object + 1; b < a; b = j->nodes[b + 1].next)
                if (dspark__json_equal(j, a, b)) return dspark__json_repeated(r, a);
        return DSPARK_OK;
    }
    table = (int *)dspark__alloc(mask + 1, sizeof *table);
    if (!table) return DSPARK_ERROR_MEMORY;
    for (int a = object + 1; a < end && !again; a = j->nodes[a + 1].next) {
        size_t slot = dspark__hash(j->strings + j->nodes[a].at, (size_t)j->nodes[a].n, (uintptr_t)table) & mask;
        while (table[slot] && !dspark__json_equal(j, a, table[slot])) slot = (slot + 1) & mask;
        if (table[slot]) again = a;
        table[slot] = a;
    }
    dspark__free(table);
    return again ? dspark__json_repeated(r, again) : DSPARK_OK;
}

static dspark_status dspark__json_value(dspark__json_reader *r, int depth);

// Reads an array or object that is inside `depth` others.
static dspark_status dspark__json_list(dspark__json_reader *r, int depth) {
    int object = dspark__json_peek(r) == '{', node = r->j->n;
    char end = object ? '}' : ']';
    dspark_status status;
    if (depth == DSPARK__JSON_DEPTH) return dspark__json_expected(r, "at most 64 levels");
    status = dspark__json_push(r, object ? DSPARK__JSON_OBJECT : DSPARK__JSON_ARRAY);
    if (status) return status;
    r->at++;
    dspark__json_space(r);
    if (dspark__json_take(r, end)) return DSPARK_OK;
    do {
        dspark__json_space(r);
        if (object) {
            if (dspark__json_peek(r) != '"') return dspark__json_expected(r, "a key in quotes");
            if ((status = dspark__json_text(r)) != DSPARK_OK) return status;
            dspark__json_space(r);
            if (!dspark__json_take(r, ':')) return dspark__json_expected(r, "':'");
            dspark__json_space(r);
        }
        if ((status = dspark__json_value(r, depth + 1)) != DSPARK_OK) return status;
        r->j->nodes[node].n++;
        dspark__json_space(r);
    } while (dspark__json_take(r, ','));
    if (!dspark__json_take(r, end)) return dspark__json_expected(r, object ? "',' or '}'" : "',' or ']'");
    r->j->nodes[node].next = r->j->n;
    return object ? dspark__json_unique(r, node) : DSPARK_OK;
}

static dspark_status dspark__json_value(dspark__json_reader *r, int depth) {
    int c = dspark__json_peek(r);
    switch (c) {
    case '{': case '[': return dspark__json_list(r, depth);
    case '"': return dspark__json_text(r);
    case 'n': return dspark__json_word(r, "null", DSPARK__JSON_NULL);
    case 'f': return dspark__json_word(r, "false", DSPARK__JSON_FALSE);
    case 't': return dspark__json_word(r, "true", DSPARK__JSON_TRUE);
    default:
        if (c != '-' && (c < '0' || c > '9')) return dspark__json_expected(r, "a value");
        return dspark__json_number(r);
    }
}

// path names the text in errors. After a failure *j is empty.
static dspark_status dspark__json_parse(dspark__json *j, const char *path, const char *text, size_t len) {
    dspark__json_reader r;
    dspark_status status;
    memset(j, 0, sizeof *j);
    r.j = j, r.path = path, r.text = text, r.len = len, r.at = 0, r.used = 0;
    if (len >= INT32_MAX)
        return dspark__fail(DSPARK_ERROR_FORMAT, "%s: expected less than 2 GiB, found %zu bytes", path, len);
    j->strings = (char *)dspark__alloc(len + 1, 1);
    if (!j->strings) return DSPARK_ERROR_MEMORY;
    dspark__json_space(&r);
    status = dspark__json_value(&r, 0);
    dspark__json_space(&r);
    if (!status && r.at < len) status = dspark__json_expected(&r, "the end");
    if (status) dspark__json_free(j);
    return status;
}

// >>checkpoint
// A directory as released -> dspark_config and dspark_weights. Nothing in it is trusted: sizes are checked before use,
// and allocations are bounded by the files' sizes. First config.json is read; then the shards' headers, into one table
// of tensors by name; then binding looks up every tensor that the config implies and checks its type and shape. The
// loader's status keeps the first failure, and calls after it do nothing, so that a step reads as a list. Weights stay
// in the mapped files and are not inspected: a NaN in them gives DSPARK_ERROR_NUMERIC once it is used. Vectors are
// converted to floats; the experts that hash layers name are checked, since they are indices.

typedef struct dspark__owned { struct dspark__owned *next; double align; } dspark__owned;

typedef struct {
    char *path;
    const char *name;       // the end of path, for messages
    const void *data;
    uint64_t size, begin;   // bytes; of a shard: where its tensors begin, after the header
} dspark__file;

typedef struct {
    dspark_config config;
    dspark_weights weights;
    dspark_files io;
    dspark__file *files;    // the shards, [n_files]
    int n_files;
    size_t files_cap;
    dspark__owned *owned;   // vectors, layers, experts: each follows its link
    dspark_calibration *calibrations;   // [n_calibrations]
    int n_calibrations;
    uint64_t hash;          // of config.json and the vectors
    size_t bytes, mapped;   // bytes owned, bytes of the shards
} dspark__checkpoint;

// The types of safetensors; the first five are those of dspark_matrix.
enum { DSPARK__E8M0 = 5, DSPARK__I64, DSPARK__I32 };
static const struct { const char *name; unsigned bits; } dspark__types[] = {
    { "F32", 32 }, { "BF16", 16 }, { "F16", 16 }, { "F8_E4M3", 8 }, { "I8", 8 }, { "F8_E8M0", 8 },
    { "I64", 64 }, { "I32", 32 }, { "BOOL", 8 }, { "U8", 8 }, { "I16", 16 }, { "U16", 16 }, { "U32", 32 },
    { "F64", 64 }, { "U64", 64 }, { "C64", 64 }, { "F8_E5M2", 8 }, { "F8_E4M3FNUZ", 8 },
    { "F8_E5M2FNUZ", 8 }, { "F4", 4 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }
};
enum {
    DSPARK__N_TYPES = sizeof dspark__types / sizeof *dspark__types,
    DSPARK__PLAIN_TYPES = 1 << DSPARK_F32 | 1 << DSPARK_BF16 | 1 << DSPARK_F16,
    DSPARK__LINEAR_TYPES = DSPARK__PLAIN_TYPES | 1 << DSPARK_FP8 | 1 << DSPARK_FP4
};

typedef struct {
    const char *name;
    uint64_t shape[4];      // the first four of n_dims
    uint64_t begin, end;    // its bytes in the shard
    int file, type, n_dims; // type -1: the index lists it, not yet found in its shard
} dspark__tensor;

// Names to numbers, by open addressing; at most half full. The names point into the JSON.
typedef struct { const char *name; size_t len; int value; } dspark__name;
typedef struct { dspark__name *slots; size_t mask; } dspark__names;

typedef struct { dspark__file file; dspark__json json; } dspark__document;

typedef struct {
    dspark__checkpoint *ck;
    const dspark_model_desc *desc;
    const char *dir;
    dspark_status status;
    dspark__document config, generation, calibration, index;    // index: of a single shard, json is its header
    dspark__names names;
    dspark__tensor *tensors;
    int n_tensors, n_ratios, n_stages;
    const char *source;     // the file that lists the tensors
    char scope[64], name[128];      // prefix of the names being bound; the last full name
} dspark__loader;

// "file: name: ...", FORMAT
#ifdef __GNUC__
__attribute__((format(printf, 3, 4)))
#endif
static dspark_status dspark__bad(const char *file, const char *name, const char *format, ...) {
    char text[320];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return dspark__fail(DSPARK_ERROR_FORMAT, "%s: %.100s: %s", file, name, text);
}

// ---- files

// The end of a long path tells the most.
static const char *dspark__path_end(const char *path) {
    size_t n = strlen(path);
    return path + (n > 160 ? n - 160 : 0);
}

static dspark_status dspark__file_open(const dspark_files *io, const char *dir, const char *name,
                                       dspark__file *f) {
    size_t n = strlen(dir), m = strlen(name) + 1;
    dspark_status status;
    memset(f, 0, sizeof *f);
    f->path = (char *)dspark__alloc(n + 1 + m, 1);
    if (!f->path) return DSPARK_ERROR_MEMORY;
    memcpy(f->path, dir, n);
    f->path[n] = '/';
    memcpy(f->path + n + 1, name, m);
    f->name = dspark__path_end(f->path);
    status = io->map(io->user, f->path, &f->data, &f->size);
    if (!status && (!f->data || f->size > SIZE_MAX / 2)) {
        if (f->data && io->unmap) io->unmap(io->user, f->data, f->size);
        status = DSPARK_ERROR_IO;
    }
    if (status && io->map != dspark__file_map)
        dspark__fail(status, "%s: dspark_files.map: %s", f->name, dspark_status_name(status));
    if (status) dspark__free(f->path), memset(f, 0, sizeof *f);
    return status;
}

static void dspark__file_close(const dspark_files *io, dspark__file *f) {
    if (f->data && io->unmap) io->unmap(io->user, f->data, f->size);
    dspark__free(f->path);
    memset(f, 0, sizeof *f);
}

static void dspark__document_close(const dspark_files *io, dspark__document *d) {
    dspark__json_free(&d->json);
    dspark__file_close(io, &d->file);
}

// JSON whose root is an object: a file's, or a shard's header.
static dspark_status dspark__object_parse(dspark__json *j, const dspark__file *f, size_t begin, size_t end) {
    dspark_status status = dspark__json_parse(j, f->name, (const char *)f->data + begin, end - begin);
    if (status || dspark__json_kind(j, 0) == DSPARK__JSON_OBJECT) return status;
    return dspark__bad(f->name, "JSON", "expected an object, found %.40s", dspark__json_show(j, 0));
}

static dspark_status dspark__document_open(dspark__loader *b, const char *name, dspark__document *d) {
    dspark_status status = dspark__file_open(&b->ck->io, b->dir, name, &d->file);
    return status ? status : dspark__object_parse(&d->json, &d->file, 0, (size_t)d->file.size);
}

static uint64_t dspark__fold(uint64_t h, const void *data, size_t n) {
    h = (h ^ dspark__hash((const char *)data, n, 0)) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

// n zeroed items that live as long as the checkpoint.
static void *dspark__own(dspark__loader *b, size_t n, size_t size) {
    dspark__owned *o;
    if (b->status) return NULL;
    o = n > (SIZE_MAX - sizeof *o) / size ? NULL : (dspark__owned *)dspark__alloc(1, sizeof *o + n * size);
    if (!o) return b->status = DSPARK_ERROR_MEMORY, (void *)NULL;
    o->next = b->ck->owned;
    b->ck->owned = o;
    b->ck->bytes += sizeof *o + n * size;
    return o + 1;
}

static void dspark__checkpoint_close(dspark__checkpoint *ck) {
    while (ck->owned) {
        dspark__owned *next = ck->owned->next;
        dspark__free(ck->owned);
        ck->owned = next;
    }
    for (int i = 0; i < ck->n_files; i++) dspark__file_close(&ck->io, &ck->files[i]);
    dspark__free(ck->files);
    memset(ck, 0, sizeof *ck);
}

// ---- config.json and generation_config.json

// An object whose keys are read; messages put prefix before a key.
typedef struct { dspark__loader *b; const dspark__document *d; int object; const char *prefix; } dspark__keys;

// The value of a key; -1 for none, or null.
static int dspark__key(const dspark__keys *k, const char *key) {
    int node = dspark__json_find(&k->d->json, k->object, key);
    return dspark__json_kind(&k->d->json, node) == DSPARK__JSON_NULL ? -1 : node;
}

static void dspark__key_failed(const dspark__keys *k, dspark_status status, const char *key,
                               const char *expected, int node) {
    const dspark__json *j = &k->d->json;
    char n[24] = "";
    if (k->b->status) return;
    if (dspark__json_kind(j, node) == DSPARK__JSON_ARRAY) snprintf(n, sizeof n, " of %d", j->nodes[node].n);
    k->b->status = dspark__fail(status, "%s: %s%s: expected %s, found %.100s%s", k->d->file.name, k->prefix,
                                key, expected, dspark__json_show(j, node), n);
}

static int dspark__node_int(const dspark__keys *k, const char *key, int node, int low, int high) {
    char expected[64];
    int64_t value;
    if (dspark__json_integer(&k->d->json, node, &value) && value >= low && value <= high) return (int)value;
    snprintf(expected, sizeof expected, "an integer from %d to %d", low, high);
    dspark__key_failed(k, DSPARK_ERROR_FORMAT, key, expected, node);
    return low;
}

static int dspark__key_int(const dspark__keys *k, const char *key, int low, int high) {
    return dspark__node_int(k, key, dspark__key(k, key), low, high);
}

static double dspark__key_real(const dspark__keys *k, const char *key, double low, double high) {
    char expected[64];
    double value;
    int node = dspark__key(k, key);
    if (dspark__json_real(&k->d->json, node, &value) && value >= low && value <= high) return value;
    snprintf(expected, sizeof expected, "a number from %g to %g", low, high);
    dspark__key_failed(k, DSPARK_ERROR_FORMAT, key, expected, node);
    return low;
}

// Fails unless `holds`, a condition on an integer of the config.
static void dspark__config_check(dspark__loader *b, int holds, const char *key, int found,
                                 const char *expected) {
    if (b->status || holds) return;
    b->status = dspark__bad(b->config.file.name, key, "expected %s, found %d", expected, found);
}

// What the forward pass assumes. A missing key is fine.
static void dspark__read_fixed(const dspark__keys *k) {
    static const char *const fixed[][2] = {
        { "model_type", "deepseek_v4" }, { "hidden_act", "silu" }, { "scoring_func", "sqrtsoftplus" },
        { "topk_method", "noaux_tc" }, { "norm_topk_prob", "true" }, { "attention_bias", "false" },
        { "tie_word_embeddings", "false" }, { "num_key_value_heads", "1" }
    };
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
        int node = dspark__key(k, fixed[i][0]);
        if (node >= 0 && strcmp(dspark__json_show(&k->d->json, node), fixed[i][1]))
            dspark__key_failed(k, DSPARK_ERROR_UNSUPPORTED, fixed[i][0], fixed[i][1], node);
    }
}

// The bounds keep later products of two sizes within an int; binding checks the sizes against the tensors.
static void dspark__read_sizes(const dspark__keys *k, dspark_config *c) {
    c->vocab_size = dspark__key_int(k, "vocab_size", 1, 1 << 24);
    c->hidden_size = dspark__key_int(k, "hidden_size", 1, 1 << 20);
    c->num_hidden_layers = dspark__key_int(k, "num_hidden_layers", 1, DSPARK_MAX_LAYERS);
    c->max_position_embeddings = dspark__key_int(k, "max_position_embeddings", 1, 1 << 30);
    c->num_attention_heads = dspark__key_int(k, "num_attention_heads", 1, 1 << 12);
    c->head_dim = dspark__key_int(k, "head_dim", 2, 1 << 14);
    c->qk_rope_head_dim = dspark__key_int(k, "qk_rope_head_dim", 2, 1 << 14);
    c->q_lora_rank = dspark__key_int(k, "q_lora_rank", 1, 1 << 20);
    c->o_lora_rank = dspark__key_int(k, "o_lora_rank", 1, 1 << 16);
    c->o_groups = dspark__key_int(k, "o_groups", 1, 1 << 12);
    c->sliding_window = dspark__key_int(k, "sliding_window", 1, 1 << 16);
    c->index_n_heads = dspark__key_int(k, "index_n_heads", 1, 1 << 12);
    c->index_head_dim = dspark__key_int(k, "index_head_dim", 32, 1 << 14);
    c->index_topk = dspark__key_int(k, "index_topk", 1, 1 << 16);
    c->n_routed_experts = dspark__key_int(k, "n_routed_experts", 1, 1 << 16);
    c->n_shared_experts = dspark__key_int(k, "n_shared_experts", 1, 64);
    c->num_experts_per_tok = dspark__key_int(k, "num_experts_per_tok", 1, c->n_routed_experts);
    c->moe_intermediate_size = dspark__key_int(k, "moe_intermediate_size", 1, 1 << 20);
    c->num_hash_layers = dspark__key_int(k, "num_hash_layers", 0, c->num_hidden_layers);
    c->hc_mult = dspark__key_int(k, "hc_mult", 1, 8);
    c->hc_sinkhorn_iters = dspark__key_int(k, "hc_sinkhorn_iters", 1, 1000);
    c->rms_norm_eps = (float)dspark__key_real(k, "rms_norm_eps", 1e-12, 1);
    c->hc_eps = (float)dspark__key_real(k, "hc_eps", 1e-12, 1);
    c->swiglu_limit = (float)dspark__key_real(k, "swiglu_limit", 0, 1e6);
    c->routed_scaling_factor = (float)dspark__key_real(k, "routed_scaling_factor", 1e-6, 1e6);
    c->rope_theta = dspark__key_real(k, "rope_theta", 2, 1e12);
    c->compress_rope_theta = dspark__key_real(k, "compress_rope_theta", 2, 1e12);
}

// compress_ratios: one for each target layer, then optionally one for each draft stage.
static void dspark__read_ratios(const dspark__keys *k, dspark_config *c) {
    int node = dspark__key(k, "compress_ratios");
    int n = dspark__json_kind(&k->d->json, node) == DSPARK__JSON_ARRAY ? k->d->json.nodes[node].n : -1;
    char key[32], expected[64];
    if (n < c->num_hidden_layers || n > DSPARK_MAX_LAYERS) {
        snprintf(expected, sizeof expected, "an array of %d to %d", c->num_hidden_layers, DSPARK_MAX_LAYERS);
        dspark__key_failed(k, DSPARK_ERROR_FORMAT, "compress_ratios", expected, node);
        return;
    }
    k->b->n_ratios = n;
    for (int i = 0; i < n; i++) {
        snprintf(key, sizeof key, "compress_ratios[%d]", i);
        c->compress_ratios[i] = dspark__node_int(k, key, node + 1 + i, 0, 1 << 16);
        dspark__config_check(k->b, c->compress_ratios[i] != 1, key, 1, "0, or at least 2");
    }
}

static void dspark__read_rope(const dspark__keys *k, dspark_config *c) {
    int node = dspark__key(k, "rope_scaling"), type;
    dspark__keys r = *k;
    c->rope_factor = 1, c->rope_beta_fast = 32, c->rope_beta_slow = 1;
    c->rope_original_length = c->max_position_embeddings;
    if (node < 0) return;
    if (dspark__json_kind(&k->d->json, node) != DSPARK__JSON_OBJECT) {
        dspark__key_failed(k, DSPARK_ERROR_FORMAT, "rope_scaling", "an object or null", node);
        return;
    }
    r.object = node, r.prefix = "rope_scaling.";
    type = dspark__key(&r, "type") < 0 ? dspark__key(&r, "rope_type") : dspark__key(&r, "type");
    if (!dspark__json_is(&k->d->json, type, "yarn"))
        dspark__key_failed(&r, DSPARK_ERROR_UNSUPPORTED, "type", "yarn", type);
    c->rope_factor = dspark__key_real(&r, "factor", 1, 1e6);
    c->rope_original_length = dspark__key_real(&r, "original_max_position_embeddings", 1, 1e9);
    if (dspark__key(&r, "beta_fast") >= 0) c->rope_beta_fast = dspark__key_real(&r, "beta_fast", 1e-3, 1e6);
    if (dspark__key(&r, "beta_slow") >= 0) c->rope_beta_slow = dspark__key_real(&r, "beta_slow", 1e-3, 1e6);
}

// One id or a list of them; if both files have it, generation_config.json counts, which is read later.
static void dspark__read_eos(const dspark__keys *k, dspark_config *c) {
    int node = dspark__key(k, "eos_token_id");
    if (node < 0) return;
    c->n_eos = 1;
    if (dspark__json_kind(&k->d->json, node) == DSPARK__JSON_ARRAY) {
        c->n_eos = k->d->json.nodes[node].n;
        if (c->n_eos > DSPARK_MAX_EOS) {
            dspark__key_failed(k, DSPARK_ERROR_UNSUPPORTED, "eos_token_id", "at most 8", node);
            return;
        }
        node++;
    }
    for (int i = 0; i < c->n_eos; i++)
        c->eos_token_id[i] = dspark__node_int(k, "eos_token_id", node + i, 0, c->vocab_size - 1);
}

static void dspark__check_config(dspark__loader *b, const dspark_config *c) {
    int D = c->head_dim, R = c->qk_rope_head_dim, I = c->index_head_dim;
    dspark__config_check(b, D >= R, "head_dim", D, "at least qk_rope_head_dim");
    dspark__config_check(b, R % 2 == 0, "qk_rope_head_dim", R, "an even number");
    dspark__config_check(b, c->num_attention_heads % c->o_groups == 0, "o_groups", c->o_groups,
                         "a divisor of num_attention_heads");
    dspark__config_check(b, (I & (I - 1)) == 0, "index_head_dim", I, "a power of two (Hadamard)");
    dspark__config_check(b, I >= R, "index_head_dim", I, "at least qk_rope_head_dim");
}

static void dspark__read_config(dspark__loader *b) {
    dspark_config *c = &b->ck->config;
    dspark__keys k = { b, &b->config, 0, "" };
    b->status = dspark__document_open(b, "config.json", &b->config);
    if (b->status) return;
    b->ck->hash = dspark__fold(0, b->config.file.data, (size_t)b->config.file.size);
    dspark__read_fixed(&k);
    dspark__read_sizes(&k, c);
    dspark__read_ratios(&k, c);
    dspark__read_rope(&k, c);
    dspark__check_config(b, c);
    c->bos_token_id = -1;
    if (dspark__key(&k, "bos_token_id") >= 0)
        c->bos_token_id = dspark__key_int(&k, "bos_token_id", 0, c->vocab_size - 1);
    dspark__read_eos(&k, c);
}

// Any I/O error counts as a missing generation_config.json.
static void dspark__read_generation(dspark__loader *b) {
    dspark_config *c = &b->ck->config;
    dspark__keys k = { b, &b->generation, 0, "" };
    dspark_status status = DSPARK_OK;
    c->temperature = c->top_p = -1;
    if (!b->status) status = dspark__document_open(b, "generation_config.json", &b->generation);
    if (b->status || status == DSPARK_ERROR_IO) return;
    if ((b->status = status) != DSPARK_OK) return;
    dspark__read_eos(&k, c);
    if (dspark__json_kind(&b->generation.json, dspark__key(&k, "do_sample")) == DSPARK__JSON_FALSE) return;
    if (dspark__key(&k, "temperature") >= 0)
        c->temperature = (float)dspark__key_real(&k, "temperature", 0, 1000);
    if (dspark__key(&k, "top_p") >= 0) c->top_p = (float)dspark__key_real(&k, "top_p", 1e-6, 1);
}

// Reads an array of n numbers from low to high to out [n].
static void dspark__key_reals(const dspark__keys *k, const char *key, int n, double low, double high, float *out) {
    const dspark__json *j = &k->d->json;
    int node = dspark__key(k, key), good = dspark__json_kind(j, node) == DSPARK__JSON_ARRAY && j->nodes[node].n == n;
    char expected[64];
    for (int i = 0; i < n && good; i++) {
        double value = 0;
        good = dspark__json_real(j, node + 1 + i, &value) && value >= low && value <= high;
        out[i] = (float)value;
    }
    snprintf(expected, sizeof expected, "%d numbers from %g to %g", n, low, high);
    if (!good) dspark__key_failed(k, DSPARK_ERROR_FORMAT, key, expected, node);
}

// {"format": "dspark-calibration-1", "rows": [{"verify": "coupled", "temperature": [low, high], "sts": [gamma],
//  "said": [12 gamma], "stood": [12 gamma]}, ...]}; the last two may both be missing.
static void dspark__read_calibration(dspark__loader *b) {
    static const char *const verifiers[] = { "coupled", "rejection", "greedy" };
    dspark__checkpoint *ck = b->ck;
    dspark__keys k = { b, &b->calibration, 0, "" };
    const dspark__json *j = &b->calibration.json;
    dspark_status status = DSPARK_OK;
    int rows, node, i;
    if (!b->status && ck->config.n_stages) status = dspark__document_open(b, "calibration.json", &b->calibration);
    if (b->status || !ck->config.n_stages || status == DSPARK_ERROR_IO) return;
    if ((b->status = status) != DSPARK_OK) return;
    node = dspark__key(&k, "format"), rows = dspark__key(&k, "rows");
    if (!dspark__json_is(j, node, "dspark-calibration-1"))
        dspark__key_failed(&k, DSPARK_ERROR_UNSUPPORTED, "format", "dspark-calibration-1", node);
    if (dspark__json_kind(j, rows) != DSPARK__JSON_ARRAY)
        dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "rows", "an array", rows);
    if (!b->status && j->nodes[rows].n > 256)
        b->status = dspark__bad(b->calibration.file.name, "rows", "expected at most 256, found %d", j->nodes[rows].n);
    if (b->status) return;
    ck->calibrations = (dspark_calibration *)dspark__own(b, (size_t)j->nodes[rows].n, sizeof *ck->calibrations);
    for (node = rows + 1; node < j->nodes[rows].next && !b->status; node = dspark__json_next(j, node)) {
        dspark_calibration *row = &ck->calibrations[ck->n_calibrations];
        char prefix[32];
        snprintf(prefix, sizeof prefix, "rows[%d].", ck->n_calibrations++);
        k.object = node, k.prefix = prefix;
        for (i = 0; i < 3 && !dspark__json_is(j, dspark__key(&k, "verify"), verifiers[i]); i++) continue;
        if (i == 3)
            dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "verify", "coupled, rejection or greedy",
                               dspark__key(&k, "verify"));
        row->verify = i;
        dspark__key_reals(&k, "temperature", 2, 0, 1e6, row->band);
        dspark__key_reals(&k, "sts", ck->config.dspark_block_size, 1e-6, 1e6, row->sts);
        row->curved = dspark__key(&k, "said") >= 0 || dspark__key(&k, "stood") >= 0;
        i = row->curved ? ck->config.dspark_block_size * DSPARK_CURVE_POINTS : 0;
        if (i) dspark__key_reals(&k, "said", i, 0, 1, row->said[0]);
        if (i) dspark__key_reals(&k, "stood", i, 1e-6, 1, row->stood[0]);
    }
}

// The config's fields for the draft stages found in the checkpoint; all 0 if it has none.
static void dspark__read_drafter(dspark__loader *b) {
    dspark_config *c = &b->ck->config;
    dspark__keys k = { b, &b->config, 0, "" };
    int L = c->num_hidden_layers, n = c->n_stages = b->n_stages, node;
    int *ratios = c->compress_ratios;
    char key[48];
    if (b->status) return;
    if (n && b->n_ratios > L && b->n_ratios != L + n)
        b->status = dspark__bad(b->config.file.name, "compress_ratios", "expected %d for the layers and %d "
                                "for the draft stages (mtp.0 .. mtp.%d), found %d", L, n, n - 1, b->n_ratios);
    dspark__config_check(b, n <= DSPARK_MAX_LAYERS - L, "num_hidden_layers", L, "at most 256, with stages");
    for (int i = L; i < b->n_ratios && !b->status; i++) {
        snprintf(key, sizeof key, "compress_ratios[%d]", i);
        dspark__config_check(b, !n || !ratios[i], key, ratios[i], "0 for a draft stage");
        ratios[i] = 0;
    }
    if (!n || b->status) return;
    c->dspark_block_size = dspark__key_int(&k, "dspark_block_size", 1, DSPARK_MAX_BLOCK);
    c->dspark_noise_token_id = dspark__key_int(&k, "dspark_noise_token_id", 0, c->vocab_size - 1);
    if (dspark__key(&k, "dspark_markov_rank") >= 0)
        c->dspark_markov_rank = dspark__key_int(&k, "dspark_markov_rank", 0, 1 << 16);
    node = dspark__key(&k, "dspark_target_layer_ids");
    if (dspark__json_kind(&k.d->json, node) == DSPARK__JSON_ARRAY) c->n_taps = b->config.json.nodes[node].n;
    if (c->n_taps < 1 || c->n_taps > DSPARK_MAX_TAPS)
        dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "dspark_target_layer_ids", "an array of 1 to 16", node);
    for (int i = 0; i < c->n_taps && !b->status; i++) {
        snprintf(key, sizeof key, "dspark_target_layer_ids[%d]", i);
        c->dspark_target_layer_ids[i] = dspark__node_int(&k, key, node + 1 + i, 0, L - 1);
        dspark__config_check(b, !i || c->dspark_target_layer_ids[i] > c->dspark_target_layer_ids[i - 1], key,
                             c->dspark_target_layer_ids[i], "layers in ascending order");
    }
}

// ---- the shards' headers

static dspark_status dspark__names_open(dspark__names *names, int n) {
    names->mask = dspark__table_mask((size_t)n);
    names->slots = (dspark__name *)dspark__alloc(names->mask + 1, sizeof *names->slots);
    return names->slots ? DSPARK_OK : DSPARK_ERROR_MEMORY;
}

// The slot of a name or, if it is absent, the empty slot for it (name NULL).
static dspark__name *dspark__names_find(const dspark__names *names, const char *name, size_t len) {
    size_t i = dspark__hash(name, len, (uintptr_t)names->slots) & names->mask;
    while (names->slots[i].name && (names->slots[i].len != len || memcmp(names->slots[i].name, name, len)))
        i = (i + 1) & names->mask;
    return &names->slots[i];
}

// "BF16 [512, 256]"
static void dspark__tensor_show(const dspark__tensor *t, char *out, size_t size) {
    int n = snprintf(out, size, "%s [", dspark__types[t->type].name);
    for (int i = 0; i < t->n_dims && i < 4; i++)
        n += snprintf(out + n, size - (size_t)n, i ? ", %llu" : "%llu", (unsigned long long)t->shape[i]);
    snprintf(out + n, size - (size_t)n, t->n_dims > 4 ? ", ...]" : "]");
}

// Reads a shape and its number of elements; returns 0 if it is no array of sizes or its bits overflow uint64_t.
static int dspark__tensor_shape(const dspark__json *j, int node, dspark__tensor *t, uint64_t *elements) {
    int64_t size;
    if (dspark__json_kind(j, node) != DSPARK__JSON_ARRAY) return 0;
    t->n_dims = j->nodes[node].n;
    *elements = 1;
    for (int i = 0; i < t->n_dims; i++) {
        if (!dspark__json_integer(j, node + 1 + i, &size) || size < 0) return 0;
        if (size && *elements > UINT64_MAX / 64 / (uint64_t)size) return 0;
        *elements *= (uint64_t)size;
        if (i < 4) t->shape[i] = (uint64_t)size;
    }
    return 1;
}

// One entry of a header: "name": { "dtype": "BF16", "shape": [512, 256], "data_offsets": [0, 262144] }
static dspark_status dspark__tensor_read(const dspark__file *f, const dspark__json *j, int key,
                                         dspark__tensor *t) {
    int type = dspark__json_find(j, key + 1, "dtype"), shape = dspark__json_find(j, key + 1, "shape");
    int ends = dspark__json_find(j, key + 1, "data_offsets");
    uint64_t elements = 0, bits, room = f->size - f->begin;
    int64_t begin = -1, end = -1;
    char found[160];
    memset(t, 0, sizeof *t);
    t->name = dspark__json_string(j, key, NULL);
    while (t->type < DSPARK__N_TYPES && !dspark__json_is(j, type, dspark__types[t->type].name)) t->type++;
    if (t->type == DSPARK__N_TYPES)
        return dspark__bad(f->name, t->name, "dtype: expected one of safetensors, found %.40s",
                           dspark__json_show(j, type));
    if (!dspark__tensor_shape(j, shape, t, &elements))
        return dspark__bad(f->name, t->name, "shape: expected sizes whose product fits 64 bits, found %.40s",
                           dspark__json_show(j, shape));
    if (dspark__json_kind(j, ends) == DSPARK__JSON_ARRAY && j->nodes[ends].n == 2)
        (void)(dspark__json_integer(j, ends + 1, &begin) && dspark__json_integer(j, ends + 2, &end));
    if (begin < 0 || end < begin || (uint64_t)end > room)
        return dspark__bad(f->name, t->name, "data_offsets: expected part of %llu bytes, found [%lld, %lld]",
                           (unsigned long long)room, (long long)begin, (long long)end);
    bits = elements * dspark__types[t->type].bits;
    dspark__tensor_show(t, found, sizeof found);
    if (bits % 8 || bits / 8 != (uint64_t)(end - begin))
        return dspark__bad(f->name, t->name, "data_offsets: expected %llu bytes of %s, found %lld",
                           (unsigned long long)(bits / 8), found, (long long)(end - begin));
    t->begin = f->begin + (uint64_t)begin, t->end = f->begin + (uint64_t)end;
    return DSPARK_OK;
}

typedef struct { uint64_t begin, end; const char *name; } dspark__span;

static int dspark__span_order(const void *a, const void *b) {
    const dspark__span *x = (const dspark__span *)a, *y = (const dspark__span *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static dspark_status dspark__check_overlap(const dspark__file *f, dspark__span *spans, size_t n) {
    qsort(spans, n, sizeof *spans, dspark__span_order);
    for (size_t i = 1; i < n; i++)
        if (spans[i].begin < spans[i - 1].end)
            return dspark__bad(f->name, spans[i].name, "data_offsets: expected bytes of its own, found those "
                               "of %.100s", spans[i - 1].name);
    return DSPARK_OK;
}

// Parses the header of a shard: 8 bytes of length, then JSON; the tensors' bytes follow.
static dspark_status dspark__header_open(dspark__file *f, dspark__json *j) {
    static const char pointer[] = "version https://git-lfs";
    uint64_t length, room;
    if (f->size >= sizeof pointer && !memcmp(f->data, pointer, sizeof pointer - 1))
        return dspark__bad(f->name, "header", "expected safetensors, found a Git LFS pointer (git lfs pull)");
    if (f->size < 8)
        return dspark__bad(f->name, "header", "expected 8 bytes of length, found %d", (int)f->size);
    memcpy(&length, f->data, 8);
    room = f->size - 8 < 100000000 ? f->size - 8 : 100000000;       // the format's limit
    if (length > room)
        return dspark__bad(f->name, "header", "expected at most %llu bytes, found a length of %llu",
                           (unsigned long long)room, (unsigned long long)length);
    f->begin = 8 + length;
    return dspark__object_parse(j, f, 8, (size_t)f->begin);
}

// Reads and checks all tensors of shard `file`. A single shard's enter the table; with an index they fill the entries
// it made, except tensors that it does not list or lists in another shard.
static dspark_status dspark__header_read(dspark__loader *b, int file, const dspark__json *j, int indexed) {
    const dspark__file *f = &b->ck->files[file];
    dspark__span *spans = (dspark__span *)dspark__alloc((size_t)j->nodes[0].n, sizeof *spans);
    dspark_status status = spans ? DSPARK_OK : DSPARK_ERROR_MEMORY;
    size_t n = 0, len;
    for (int key = 1; !status && key < j->nodes[0].next; key = dspark__json_next(j, key + 1)) {
        dspark__tensor t;
        dspark__name *place;
        const char *name = dspark__json_string(j, key, &len);
        if (dspark__json_is(j, key, "__metadata__")) continue;
        if ((status = dspark__tensor_read(f, j, key, &t)) != DSPARK_OK) break;
        spans[n].begin = t.begin, spans[n].end = t.end, spans[n++].name = name;
        place = dspark__names_find(&b->names, name, len);
        if (!place->name && !indexed) {
            place->name = name, place->len = len, place->value = b->n_tensors++;
            b->tensors[place->value].name = name;
        }
        if (!place->name || b->tensors[place->value].file != file) continue;
        t.name = place->name, t.file = file;
        b->tensors[place->value] = t;
    }
    if (!status) status = dspark__check_overlap(f, spans, n);
    dspark__free(spans);
    return status;
}

static dspark_status dspark__tensors_open(dspark__loader *b, int n) {
    b->tensors = (dspark__tensor *)dspark__alloc((size_t)n, sizeof *b->tensors);
    return b->tensors ? dspark__names_open(&b->names, n) : DSPARK_ERROR_MEMORY;
}

static dspark_status dspark__shard_open(dspark__loader *b, const char *name) {
    dspark__checkpoint *ck = b->ck;
    size_t n = (size_t)ck->n_files + 1;
    dspark__file *files = (dspark__file *)dspark__grow(ck->files, &ck->files_cap, n, sizeof *files);
    dspark_status status;
    if (!files) return DSPARK_ERROR_MEMORY;
    ck->files = files;
    if ((status = dspark__file_open(&ck->io, b->dir, name, &files[ck->n_files])) != DSPARK_OK) return status;
    ck->mapped += (size_t)files[ck->n_files++].size;
    return DSPARK_OK;
}

static dspark_status dspark__open_single(dspark__loader *b) {
    dspark_status status = dspark__header_open(&b->ck->files[0], &b->index.json);
    b->source = b->ck->files[0].name;
    if (!status) status = dspark__tensors_open(b, b->index.json.nodes[0].n);
    return status ? status : dspark__header_read(b, 0, &b->index.json, 0);
}

// The shard that a value of weight_map names, opened when it is new.
static dspark_status dspark__shard_of(dspark__loader *b, dspark__names *shards, int key, int *file) {
    size_t len;
    const char *name = dspark__json_string(&b->index.json, key + 1, &len);
    dspark__name *place;
    dspark_status status;
    if (!name || !len || strcspn(name, "/\\") != len || !strcmp(name, ".") || !strcmp(name, ".."))
        return dspark__bad(b->source, dspark__json_show(&b->index.json, key), "expected the name of a file "
                           "beside it, found %.100s", dspark__json_show(&b->index.json, key + 1));
    place = dspark__names_find(shards, name, len);
    if (!place->name) {
        if ((status = dspark__shard_open(b, name)) != DSPARK_OK) return status;
        place->name = name, place->len = len, place->value = b->ck->n_files - 1;
    }
    *file = place->value;
    return DSPARK_OK;
}

// Fills the table with what weight_map lists, in its order, and opens the shards.
static dspark_status dspark__index_read(dspark__loader *b, dspark__names *shards, int map) {
    const dspark__json *j = &b->index.json;
    dspark_status status;
    for (int key = map + 1; key < j->nodes[map].next; key = dspark__json_next(j, key + 1)) {
        dspark__tensor *t = &b->tensors[b->n_tensors];
        size_t len;
        const char *name = dspark__json_string(j, key, &len);
        dspark__name *place = dspark__names_find(&b->names, name, len);
        if ((status = dspark__shard_of(b, shards, key, &t->file)) != DSPARK_OK) return status;
        t->name = name, t->type = -1;
        place->name = name, place->len = len, place->value = b->n_tensors++;
    }
    return DSPARK_OK;
}

static dspark_status dspark__open_indexed(dspark__loader *b) {
    const dspark__json *j = &b->index.json;
    dspark__names shards = { NULL, 0 };
    int map = dspark__json_find(j, 0, "weight_map");
    dspark_status status;
    b->source = b->index.file.name;
    if (dspark__json_kind(j, map) != DSPARK__JSON_OBJECT)
        return dspark__bad(b->source, "weight_map", "expected an object, found %.40s",
                           dspark__json_show(j, map));
    status = dspark__tensors_open(b, j->nodes[map].n);
    if (!status) status = dspark__names_open(&shards, j->nodes[map].n);
    if (!status) status = dspark__index_read(b, &shards, map);
    for (int i = 0; !status && i < b->ck->n_files; i++) {
        dspark__json header = { NULL, 0, 0, NULL };
        status = dspark__header_open(&b->ck->files[i], &header);
        if (!status) status = dspark__header_read(b, i, &header, 1);
        dspark__json_free(&header);
    }
    dspark__free(shards.slots);
    for (int i = 0; !status && i < b->n_tensors; i++)
        if (b->tensors[i].type < 0)
            status = dspark__bad(b->ck->files[b->tensors[i].file].name, b->tensors[i].name,
                                 "expected here by the index, found no such tensor");
    return status;
}

static void dspark__open_shards(dspark__loader *b) {
    char first[200];
    if (b->status) return;
    b->status = dspark__shard_open(b, "model.safetensors");
    if (!b->status) b->status = dspark__open_single(b);
    else if (b->status == DSPARK_ERROR_IO) {
        snprintf(first, sizeof first, "%.199s", dspark_last_error());
        b->status = dspark__document_open(b, "model.safetensors.index.json", &b->index);
        if (!b->status) b->status = dspark__open_indexed(b);
        else if (b->status == DSPARK_ERROR_IO) dspark__fail(b->status, "%s; nor is there an index", first);
    }
}

// N of a name mtp.N.*, at most DSPARK_MAX_LAYERS, and what follows; -1: another name.
static int dspark__stage_of(const char *name, const char **rest) {
    int n = 0;
    if (strncmp(name, "mtp.", 4) || name[4] < '0' || name[4] > '9') return -1;
    for (name += 4; *name >= '0' && *name <= '9'; name++)
        n = dspark__min(10 * n + (*name - '0'), DSPARK_MAX_LAYERS);
    *rest = name + 1;
    return *name == '.' ? n : -1;
}

// Counts the draft stages. MTP-1, an earlier kind of head under the same names, is recognized by its own tensors.
static void dspark__count_stages(dspark__loader *b) {
    static const char *const mtp1[] = { "e_proj.", "h_proj.", "enorm.", "hnorm." };
    unsigned char seen[DSPARK_MAX_LAYERS + 1] = { 0 };
    for (int i = 0; i < b->n_tensors && !b->status; i++) {
        const char *name = b->tensors[i].name, *rest;
        int n = dspark__stage_of(name, &rest);
        if (n < 0) continue;
        for (int m = 0; m < 4; m++)
            if (!strncmp(rest, mtp1[m], strlen(mtp1[m])))
                b->status = dspark__fail(DSPARK_ERROR_UNSUPPORTED, "%s: %.100s: expected a DSpark drafter, "
                                         "found an MTP-1 head", b->source, name);
        seen[n] = 1;
        b->n_stages = dspark__max(b->n_stages, n + 1);
    }
    for (int n = 0; n < b->n_stages && !b->status; n++)
        if (!seen[n])
            b->status = dspark__bad(b->source, "mtp", "expected stages 0 to %d, found none of the tensors of "
                                    "mtp.%d", b->n_stages - 1, n);
}

// ---- binding

DSPARK__PRINTF static void dspark__scope(dspark__loader *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(b->scope, sizeof b->scope, format, args);
    va_end(args);
}

// The tensor of scope, name and suffix together; NULL if there is none.
static const dspark__tensor *dspark__find(dspark__loader *b, const char *name, const char *suffix) {
    int n = snprintf(b->name, sizeof b->name, "%s%s%s", b->scope, name, suffix);
    dspark__name *place = dspark__names_find(&b->names, b->name, (size_t)n);
    return place->name ? &b->tensors[place->value] : NULL;
}

static int dspark__has(dspark__loader *b, const char *name, const char *suffix) {
    return !b->status && dspark__find(b, name, suffix);
}

static const uint8_t *dspark__tensor_data(const dspark__loader *b, const dspark__tensor *t) {
    return (const uint8_t *)b->ck->files[t->file].data + t->begin;
}

static const char *dspark__file_of(const dspark__loader *b, const dspark__tensor *t) {
    return t ? b->ck->files[t->file].name : b->source;
}

// Fails with what b->name should be and is. Of `types` the message names the tensor's own if it is one, else all.
static void dspark__bind_failed(dspark__loader *b, const dspark__tensor *t, int types,
                                const dspark__tensor *wanted) {
    char expected[200], shape[120], found[160] = "no such tensor";
    int n = 0, right = t && types >> t->type & 1;
    for (int i = 0; i < DSPARK__N_TYPES; i++)
        if (types >> i & 1 && (!right || t->type == i))
            n += snprintf(expected + n, sizeof expected - (size_t)n, n ? "/%s" : "%s", dspark__types[i].name);
    dspark__tensor_show(wanted, shape, sizeof shape);
    if (t) dspark__tensor_show(t, found, sizeof found);
    b->status = dspark__bad(dspark__file_of(b, t), b->name, "expected %s %s, found %s",
                            expected, strchr(shape, '['), found);
}

// A tensor of one of `types`, [rows][cols], or [cols] if rows is 0. I8 holds FP4, two a byte.
static const dspark__tensor *dspark__bind(dspark__loader *b, int types, int rows, int cols, const char *name,
                                          const char *suffix) {
    const dspark__tensor *t;
    dspark__tensor wanted;
    int first = rows ? rows : cols, packed;
    if (b->status) return NULL;
    t = dspark__find(b, name, suffix);
    packed = t && t->type == DSPARK_FP4;
    memset(&wanted, 0, sizeof wanted);
    wanted.n_dims = rows ? 2 : 1;
    wanted.shape[0] = (uint64_t)first, wanted.shape[1] = rows ? (uint64_t)(packed ? cols / 2 : cols) : 0;
    if (t && types >> t->type & 1 && t->n_dims == wanted.n_dims && t->shape[0] == wanted.shape[0] &&
        t->shape[1] == wanted.shape[1]) return t;
    dspark__bind_failed(b, t, types, &wanted);
    return NULL;
}

// Binds name.scale if the weight's type has scales; else there must be none.
static void dspark__bind_scale(dspark__loader *b, dspark_matrix *m, const char *name) {
    int fp8 = m->dtype == DSPARK_FP8;
    int rows = fp8 ? (m->rows + 127) / 128 : m->rows, cols = fp8 ? (m->cols + 127) / 128 : m->cols / 32;
    const dspark__tensor *s;
    char found[160];
    if (fp8 || m->dtype == DSPARK_FP4) {
        s = dspark__bind(b, 1 << DSPARK__E8M0, rows, cols, name, ".scale");
        if (s) m->scale = dspark__tensor_data(b, s);
    } else if ((s = dspark__find(b, name, ".scale")) != NULL) {
        dspark__tensor_show(s, found, sizeof found);
        b->status = dspark__bad(dspark__file_of(b, s), b->name, "expected none beside %s, found %s",
                                dspark__types[m->dtype].name, found);
    }
}

static void dspark__bind_matrix(dspark__loader *b, dspark_matrix *m, int types, int rows, int cols,
                                const char *name, const char *suffix) {
    const dspark__tensor *t = dspark__bind(b, types, rows, cols, name, suffix);
    if (!t) return;
    if (t->type == DSPARK_FP4 && cols % 32)
        b->status = dspark__bad(dspark__file_of(b, t), b->name, "expected FP4 in rows of whole blocks (32), "
                                "found rows of %d", cols);
    m->data = dspark__tensor_data(b, t), m->rows = rows, m->cols = cols, m->dtype = t->type;
    if (!b->status) dspark__bind_scale(b, m, name);
}

static void dspark__bind_linear(dspark__loader *b, dspark_matrix *m, int rows, int cols, const char *name) {
    dspark__bind_matrix(b, m, DSPARK__LINEAR_TYPES, rows, cols, name, ".weight");
}

// For a matrix whose rows are looked up, or that is never quantized.
static void dspark__bind_plain(dspark__loader *b, dspark_matrix *m, int rows, int cols, const char *name,
                               const char *suffix) {
    dspark__bind_matrix(b, m, DSPARK__PLAIN_TYPES, rows, cols, name, suffix);
}

static float dspark__stored_float(const uint8_t *p, size_t i, int type) {
    uint32_t bits, exponent;
    uint16_t half;
    float x;
    if (type == DSPARK_F32) return memcpy(&x, p + 4 * i, 4), x;
    memcpy(&half, p + 2 * i, 2);
    bits = (uint32_t)half << 16;
    if (type == DSPARK_F16) {
        exponent = half >> 10 & 31;
        if (!exponent) return (half & 0x8000 ? -1.0f : 1.0f) * (float)(half & 1023) / 16777216.0f;
        bits = (half & 0x8000u) << 16 | (exponent == 31 ? 255 : exponent + 112) << 23 | (half & 1023u) << 13;
    }
    return memcpy(&x, &bits, 4), x;
}

// A vector [cols] (rows 0) or a small matrix, as floats.
static void dspark__bind_floats(dspark__loader *b, const float **out, int rows, int cols, const char *name,
                                const char *suffix) {
    const dspark__tensor *t = dspark__bind(b, DSPARK__PLAIN_TYPES, rows, cols, name, suffix);
    size_t n = (size_t)(rows ? rows : 1) * (size_t)cols;
    float *x = t ? (float *)dspark__own(b, n, sizeof *x) : NULL;
    if (!x) return;
    for (size_t i = 0; i < n; i++) x[i] = dspark__stored_float(dspark__tensor_data(b, t), i, t->type);
    b->ck->hash = dspark__fold(b->ck->hash, x, n * sizeof *x);
    *out = x;
}

static void dspark__bind_bias(dspark__loader *b, const float **out, int n, const char *name) {
    if (dspark__has(b, name, ".bias")) dspark__bind_floats(b, out, 0, n, name, ".bias");
}

static void dspark__bind_mix(dspark__loader *b, dspark_mix *mix, int rows, int scales, const char *name) {
    const dspark_config *c = &b->ck->config;
    dspark__bind_plain(b, &mix->fn, rows, c->hc_mult * c->hidden_size, name, "_fn");
    dspark__bind_floats(b, &mix->scale, 0, scales, name, "_scale");
    dspark__bind_floats(b, &mix->base, 0, rows, name, "_base");
}

static void dspark__bind_compressor(dspark__loader *b, dspark_compressor *p, int ratio, int d) {
    p->ratio = ratio, p->d = d, p->w = ratio == 4 ? 2 * d : d;
    dspark__bind_linear(b, &p->wkv, p->w, b->ck->config.hidden_size, "wkv");
    dspark__bind_linear(b, &p->wgate, p->w, b->ck->config.hidden_size, "wgate");
    dspark__bind_floats(b, &p->ape, ratio, p->w, "ape", "");
    dspark__bind_floats(b, &p->norm, 0, d, "norm", ".weight");
}

// prefix: "layers.3" or "mtp.0"
static void dspark__bind_attention(dspark__loader *b, dspark_layer *l, const char *prefix) {
    const dspark_config *c = &b->ck->config;
    int h = c->hidden_size, H = c->num_attention_heads, D = c->head_dim, low = c->o_groups * c->o_lora_rank;
    dspark__scope(b, "%s.attn.", prefix);
    dspark__bind_linear(b, &l->wq_a, c->q_lora_rank, h, "wq_a");
    dspark__bind_floats(b, &l->q_norm, 0, c->q_lora_rank, "q_norm", ".weight");
    dspark__bind_linear(b, &l->wq_b, H * D, c->q_lora_rank, "wq_b");
    dspark__bind_linear(b, &l->wkv, D, h, "wkv");
    dspark__bind_floats(b, &l->kv_norm, 0, D, "kv_norm", ".weight");
    dspark__bind_floats(b, &l->attn_sink, 0, H, "attn_sink", "");
    dspark__bind_linear(b, &l->wo_a, low, H * D / c->o_groups, "wo_a");
    dspark__bind_linear(b, &l->wo_b, h, low, "wo_b");
    if (!l->ratio) return;
    dspark__scope(b, "%s.attn.compressor.", prefix);
    dspark__bind_compressor(b, &l->compressor, l->ratio, D);
    if (l->ratio != 4) return;
    dspark__scope(b, "%s.attn.indexer.", prefix);
    dspark__bind_linear(b, &l->index_wq_b, c->index_n_heads * c->index_head_dim, c->q_lora_rank, "wq_b");
    dspark__bind_linear(b, &l->index_weights, c->index_n_heads, h, "weights_proj");
    dspark__scope(b, "%s.attn.indexer.compressor.", prefix);
    dspark__bind_compressor(b, &l->index_compressor, 4, c->index_head_dim);
}

// Checks a hash layer's experts of each token: in range, none twice. last [experts]: the last token naming it, plus 1.
static void dspark__check_hash(dspark__loader *b, const dspark_layer *l, const char *file, int *last) {
    const dspark_config *c = &b->ck->config;
    const uint8_t *p = l->tid2eid;
    for (int token = 0; token < c->vocab_size; token++)
        for (int k = 0; k < c->num_experts_per_tok; k++, p += l->tid2eid_bytes) {
            int64_t wide;
            int32_t narrow;
            if (l->tid2eid_bytes == 8) memcpy(&wide, p, 8);
            else memcpy(&narrow, p, 4), wide = narrow;
            if (wide < 0 || wide >= c->n_routed_experts || last[wide] == token + 1) {
                b->status = dspark__bad(file, b->name, "token %d: expected different experts from 0 to %d, "
                                        "found %lld", token, c->n_routed_experts - 1, (long long)wide);
                return;
            }
            last[wide] = token + 1;
        }
}

static void dspark__bind_hash(dspark__loader *b, dspark_layer *l) {
    const dspark_config *c = &b->ck->config;
    int types = 1 << DSPARK__I64 | 1 << DSPARK__I32, K = c->num_experts_per_tok, *last;
    const dspark__tensor *t = dspark__bind(b, types, c->vocab_size, K, "gate.tid2eid", "");
    if (!t) return;
    l->tid2eid = dspark__tensor_data(b, t);
    l->tid2eid_bytes = t->type == DSPARK__I64 ? 8 : 4;
    last = (int *)dspark__alloc((size_t)c->n_routed_experts, sizeof *last);
    if (!last) b->status = DSPARK_ERROR_MEMORY;
    else dspark__check_hash(b, l, dspark__file_of(b, t), last);
    dspark__free(last);
}

static void dspark__bind_expert(dspark__loader *b, dspark_expert *e, int width) {
    int h = b->ck->config.hidden_size;
    dspark__bind_linear(b, &e->w1, width, h, "w1");
    dspark__bind_linear(b, &e->w2, h, width, "w2");
    dspark__bind_linear(b, &e->w3, width, h, "w3");
}

static void dspark__bind_moe(dspark__loader *b, dspark_layer *l, const char *prefix, int hash) {
    const dspark_config *c = &b->ck->config;
    dspark__scope(b, "%s.ffn.", prefix);
    dspark__bind_linear(b, &l->gate, c->n_routed_experts, c->hidden_size, "gate");
    if (hash) dspark__bind_hash(b, l);
    else dspark__bind_floats(b, &l->gate_bias, 0, c->n_routed_experts, "gate.bias", "");
    dspark__scope(b, "%s.ffn.shared_experts.", prefix);
    dspark__bind_expert(b, &l->shared, c->n_shared_experts * c->moe_intermediate_size);
    l->experts = (dspark_expert *)dspark__own(b, (size_t)c->n_routed_experts, sizeof *l->experts);
    for (int e = 0; e < c->n_routed_experts && !b->status; e++) {
        dspark__scope(b, "%s.ffn.experts.%d.", prefix, e);
        dspark__bind_expert(b, &l->experts[e], c->moe_intermediate_size);
    }
}

// Binds layer l; draft stages come after the target's layers.
static void dspark__bind_layer(dspark__loader *b, int l) {
    const dspark_config *c = &b->ck->config;
    dspark_layer *layer = &b->ck->weights.layers[l];
    int stage = l - c->num_hidden_layers, mix = (2 + c->hc_mult) * c->hc_mult;
    char prefix[32];
    snprintf(prefix, sizeof prefix, stage < 0 ? "layers.%d" : "mtp.%d", stage < 0 ? l : stage);
    layer->ratio = c->compress_ratios[l];
    dspark__scope(b, "%s.", prefix);
    dspark__bind_mix(b, &layer->hc_attn, mix, 3, "hc_attn");
    dspark__bind_floats(b, &layer->attn_norm, 0, c->hidden_size, "attn_norm", ".weight");
    dspark__bind_mix(b, &layer->hc_ffn, mix, 3, "hc_ffn");
    dspark__bind_floats(b, &layer->ffn_norm, 0, c->hidden_size, "ffn_norm", ".weight");
    dspark__bind_attention(b, layer, prefix);
    dspark__bind_moe(b, layer, prefix, l < c->num_hash_layers);
}

// The kind of sequential head is known by its tensors; rank 0: there is none.
static void dspark__bind_markov(dspark__loader *b, int stage) {
    const dspark_config *c = &b->ck->config;
    dspark_weights *w = &b->ck->weights;
    int h = c->hidden_size, rank = c->dspark_markov_rank, gated, rnn, any;
    dspark__scope(b, "mtp.%d.markov_head.", stage);
    gated = dspark__has(b, "gate_proj", ".weight");
    rnn = dspark__has(b, "joint_proj", ".weight");
    any = gated || rnn || dspark__has(b, "markov_w1", ".weight");
    dspark__config_check(b, rank || !any, "dspark_markov_rank", rank, "that of the last stage's Markov head");
    if (gated && rnn && !b->status)
        b->status = dspark__bad(b->source, b->scope, "expected gate_proj or joint_proj, found both");
    if (!rank) return;
    w->head_kind = gated ? DSPARK_HEAD_GATED : rnn ? DSPARK_HEAD_RNN : DSPARK_HEAD_VANILLA;
    dspark__bind_plain(b, &w->markov_w1, c->vocab_size, rank, "markov_w1", ".weight");
    dspark__bind_plain(b, &w->markov_w2, c->vocab_size, rank, "markov_w2", ".weight");
    if (gated) dspark__bind_plain(b, &w->gate_proj, rank, h + rank, "gate_proj", ".weight");
    if (rnn) dspark__bind_plain(b, &w->joint_proj, 3 * rank, 2 * rank + h, "joint_proj", ".weight");
    if (gated) dspark__bind_bias(b, &w->gate_bias, rank, "gate_proj");
    if (rnn) dspark__bind_bias(b, &w->joint_bias, 3 * rank, "joint_proj");
}

// The first stage takes the taps in, the last has the heads.
static void dspark__bind_drafter(dspark__loader *b) {
    const dspark_config *c = &b->ck->config;
    dspark_weights *w = &b->ck->weights;
    int h = c->hidden_size, last = c->n_stages - 1;
    const float *bias = NULL;
    if (!c->n_stages) return;
    dspark__scope(b, "mtp.0.");
    dspark__bind_linear(b, &w->main_proj, h, c->n_taps * h, "main_proj");
    dspark__bind_floats(b, &w->main_norm, 0, h, "main_norm", ".weight");
    dspark__scope(b, "mtp.%d.", last);
    dspark__bind_floats(b, &w->draft_norm, 0, h, "norm", ".weight");
    dspark__bind_mix(b, &w->draft_hc_head, c->hc_mult, 1, "hc_head");
    dspark__bind_markov(b, last);
    dspark__scope(b, "mtp.%d.", last);
    if (dspark__has(b, "confidence_head.proj", ".weight"))
        dspark__bind_plain(b, &w->confidence_proj, 1, h + c->dspark_markov_rank, "confidence_head.proj", ".weight");
    if (w->confidence_proj.data) dspark__bind_bias(b, &bias, 1, "confidence_head.proj");
    if (bias) w->confidence_bias = *bias;
}

static void dspark__progress(dspark__loader *b, int done, int total) {
    const dspark_model_desc *desc = b->desc;
    if (!b->status && desc && desc->progress && !desc->progress(desc->user, (float)done / (float)total))
        b->status = dspark__fail(DSPARK_ERROR_CANCELLED, "%s: cancelled by the progress callback", b->source);
}

static void dspark__bind_all(dspark__loader *b) {
    const dspark_config *c = &b->ck->config;
    dspark_weights *w = &b->ck->weights;
    int n = c->num_hidden_layers + c->n_stages, h = c->hidden_size;
    dspark__bind_plain(b, &w->embed, c->vocab_size, h, "embed", ".weight");
    dspark__bind_linear(b, &w->head, c->vocab_size, h, "head");
    dspark__bind_floats(b, &w->norm, 0, h, "norm", ".weight");
    dspark__bind_mix(b, &w->hc_head, c->hc_mult, 1, "hc_head");
    dspark__config_check(b, c->n_routed_experts <= b->n_tensors / 3 / n, "n_routed_experts",
                         c->n_routed_experts, "no more than the number of tensors has room for");
    w->layers = (dspark_layer *)dspark__own(b, (size_t)n, sizeof *w->layers);
    dspark__progress(b, 1, n + 1);
    for (int l = 0; l < n && !b->status; l++) {
        dspark__bind_layer(b, l);
        dspark__progress(b, l + 2, n + 1);
    }
    dspark__bind_drafter(b);
}

// desc may be NULL. After a failure *ck is empty.
static dspark_status dspark__checkpoint_open(dspark__checkpoint *ck, const char *dir,
                                             const dspark_model_desc *desc) {
    dspark__loader b;
    memset(ck, 0, sizeof *ck);
    memset(&b, 0, sizeof b);
    if (!dir || !*dir) return dspark__fail(DSPARK_ERROR_ARGUMENT, "dir: expected a directory, found none");
    if (desc && desc->files.map) ck->io = desc->files;
    else ck->io.map = dspark__file_map, ck->io.unmap = dspark__file_unmap;
    b.ck = ck, b.desc = desc, b.dir = dir;
    dspark__read_config(&b);
    dspark__read_generation(&b);
    dspark__open_shards(&b);
    dspark__count_stages(&b);
    dspark__read_drafter(&b);
    dspark__read_calibration(&b);
    if (!b.status) dspark__bind_all(&b);
    dspark__document_close(&ck->io, &b.config);
    dspark__document_close(&ck->io, &b.generation);
    dspark__document_close(&ck->io, &b.calibration);
    dspark__document_close(&ck->io, &b.index);
    dspark__free(b.names.slots);
    dspark__free(b.tensors);
    if (b.status) dspark__checkpoint_close(ck);
    return b.status;
}

// >>tokenizer
// Text to ids as DeepSeek-V4's tokenizer.json says: the text is split at added tokens, and between them into pieces by
// three patterns. A piece starts as bytes; its adjacent pair of lowest rank, ties to the leftmost, is merged until no
// pair has a rank. Ids to text concatenates the tokens' bytes. The file is untrusted: in an open tokenizer every id
// below n has its bytes, every byte has a token, and every merge makes a token of two tokens.

// Classes of a byte of text, for the patterns; all bytes of a character have its class.
enum {
    DSPARK__LETTER = 1,         // \p{L}
    DSPARK__MARK = 2,           // \p{M}
    DSPARK__NUMBER = 4,         // \p{N}
    DSPARK__PUNCTUATION = 8,    // \p{P} or \p{S}
    DSPARK__SPACE = 16,         // \s
    DSPARK__NEWLINE = 32,       // \r or \n, besides SPACE
    DSPARK__KANJI = 64,         // [一-龥぀-ゟ゠-ヿ], besides its other class
    DSPARK__FIRST = 128         // first byte of a character
};

// Unicode 16.0 (tools/unicode_table.py): for each range in turn its class (0 L, 1 M, 2 N, 3 P or S, 4 \s), its distance
// from the end of the one before, and its length - 1; numbers in base 26, the last digit in upper case.
static const char dspark__unicode[] =
    "4JE4SA3AO2AJ3AG0AZ3AF0AZ3AD4GA4bAA3AI0AA3AB3BD2AB3AA0AA3AC2AA0AA3AA2AC3AA0AW3AA0AbE3AA0ArP3AD0AL3AN0AE3A"
    "G0AA3AA0AA3AQ1AeH0AE3AA0AB0CD3AA0AA3EB0AA3AA0AC0BA0BT0BdE3AA0AfI3AA1AG0AgJ0BbL0CA3AF0AbO3AB3CC1BbS3AA1AA"
    "3AA1AB3AA1AB3AA1AA0IbA0ED3AB3RJ1AK3AA3BC0AbQ1AU2AJ3AD0AB1AA0AdU3AA0AA1AG3BA1AF0AB1AB3AA1AD0AB2AJ0AC3AB0A"
    "A3AN0CA1AA0AbD1AbA0CdK1AK0AA2OJ0AbG1AI0AB3AD0AA1CA3AB0AV1AD0AA1AI0AA1AC0AA1AE3CO0BY1AC3CA0BK0FX3AA0AF1II"
    "0AbP1AX1BbG0AcB1AC0AA1AR0AA1AG0AJ1AB3AB2AJ3AA0AP1AC0BH0CB0CV0BG0BA0DD1CA0AA1AG1CB1CC0AA1IA0EB0BC1AB2CJ0A"
    "B3AB2AF3AB0AA3AA1AA1CC0BF0EB0CV0BG0BB0BB0BB1CA1BE1EB1CC1DA0HD0BA2HJ1AB0AC1AA3AA1KC0BI0BC0BV0BG0BB0BE1CA0"
    "AA1AH1BC1BC0CA0PB1AB2CJ3AB0HA1AF1BC0BH0CB0CV0BG0BB0BE1CA0AA1AG1CB1CC1HC0EB0BC1AB2CJ3AA0AA2AF1KA0AA0BF0DC"
    "0BD0DB0BA0BB0DB0DC0DL1EE1DC1BD0CA1GA2OM3AH1FE0AH0BC0BW0BP1CA0AA1AG1BC1BD1HB0BC0CA0CB1AB2CJ3HA2AG3AA0AA1A"
    "C3AA0AH0BC0BW0BJ0BE1CA0AA1AG1BC1BD1HB0GB0BB1AB2CJ0BB1AA1MD0AI0BC0BbO1AB0AA1AG1BC1BD0AA3AA0EC1AA2AG0AC1AB"
    "2CS3AA0AF1BC0BR0DX0BI0BA0CG1DA1EF1BA1BH2GJ1CB3AA0MbV1AA0AB1AG3EA0AG1AH3AA2AJ3AB0bLB0BA0BE0BX0BA0BJ1AA0AB"
    "1AI0AA0CE0BA1BG2BJ0CD0bGA3AW1AB3AF2AT3AA1AA3AA1AA3AA1AA3AD1AB0AH0BbJ1ET3AA1AB0AE1AK1BbJ3BH1AA3AF3BM0bLbQ"
    "1AT0AA2AJ3AF0AF1AD0AD1AC0AA1AC0AB1AG0AC1AD0AM1AL0AA1AA2AJ1AD3AB0AbL0BA0FA0CbQ3AA0AmU0BD0CG0BA0BD0CbO0BD0"
    "CbG0BD0CG0BA0BD0CO0BcE0BD0CcO1CC3AI2AT0DP3AJ0GdH0CF3CA0AxV3AB0AQ4AA0AZ3AB0DcW3AC2AC0AH0HR1AD0JS1AC3AB0JR"
    "1AB0MM0BC1BB0MbZ1AbF3AC0AA3AD0AA1AA2CJ2GJ3GK1AC1BA2AJ0GdK0HE1AB0AbH1AA0AA0FcR0KbE1BL1EL3EA3DB2AJ0AbD0CE0"
    "LbR0EZ2GK3DbH0AW1AE3CB0AcA1AJ1BbC1CA2AJ2GJ3GG0AA3AF1CbE1bXE0AbU1AQ0AH3BB2AJ3AQ1AI3AL1AC0AbD1AM0AB2AJ0AbR"
    "1AN3ID0AbJ1AT3DE2AJ0DC2AJ0AbJ3AB0AK0FbQ0CC3AH1IC3AA1AU0AD1AA0AF1AA0AB1AC0AA0FhJ1AcL0AkR0CF0CbL0CF0CH0BA0"
    "BA0BA0BbE0CcA0BG3AA0AA3AC0AC0BG3AC0AD0CF3BC0AM3AC0CC0BG3AB4BK3FX4AB4FA3AbU4AA2QA0AA2CF3AE0AA2AJ3AE0BM3Db"
    "G1PbG3PB0AA3AD0AA3AB0AJ3AA0AA3AC0AE3AF0AA3AA0AA3AA0AA3AA0AD3AA0AK3AB0AD3AE0AE3AD0AA3AA2AbY0AB2AE3AB3EzP3"
    "WK2VcH3AcZ2AV3AyF2AbD3AbmD3CbF3BeA0AiU3AF0AD1AC0AB3FD2AA3AB0AbL0BA0FA0CcD0HA3AA1OA0AW0JG0BG0BG0BG0BG0BG0"
    "BG0BG1BbF3AbU0AA3AbT3bIZ3BdK3MiF3bAP4AA3AD0AB2AA3AY2AI1AF3AA0AE3AB2AC0AB3AC0BdH1CB3AB0AC3AA0AdL3AA0AD0Fb"
    "Q0BdP3BB2AD3AJ0AbF3AbL3JA0AP3AbE2BJ3AbD2AH3AA2AO3AbF2AJ3AbM2AO3AmH0AjtN3AcL0AbguE3DcC0JbT3AB0AkI3AC0AP2A"
    "J0AB0UbU1AD3AA1AJ3AA0AbE1AB0AcR2AJ1AB3AF3IW0AI3AB0AdY3AB0AcO0CB0BA0BH0VP1AA0AC1AA0AD1AA0AW1AE3AD1AA2DF3A"
    "D0GbZ3AD1IB0AbX1AR3IB2AJ1GR0AF3AC0AA3AA0AB1AA2AJ0AbB1AH3AB0AW1AM3LA0AbC1DD0AbU1AN3AM0BA2AJ3EB0AE1AA0AJ2A"
    "J0AE0BbO1AN0JC1AA0AH1AB2CJ3CD0AW3AC0AA1AC0AbX1AA0AA1AC0AB1AB0AE1AB0AA1AA0AA0YC3AB0AK1AE3AB0AC1AB0KF0CF0C"
    "F0JG0BG0BbQ3AA0AN3AB0EeK1AH3AA1AB2CJ0GqnR0MW0EbW0mnCoB0CeB0bMG0ME0FA1AA0AJ3AA0AM0BE0BA0BB0BB0BeD3AQ0QnY3"
    "AR0AcL0CcB3HA0bGL3AD1AP3AJ1GP3AbI3BS3BD0EE0BfE3EO2AJ3AG0AZ3AF0AZ3AK0AdK0DF0CF0CF0CC3DG3BG3NB0CL0BZ0BS0BB"
    "0BO0CN0bIeS3FC2EbS3DI2AcE3AQ2AB3AC3BM3DA3bVbS1AA0fAbC0DbW1PA2AbA0EbF2AD0JT2AA0AH2AA0FbL1AE0FbD3BA0AbJ0EH"
    "3AA2AE0bQgB2CJ0GbJ0EbJ0EbN0IbZ3LA0AK0BO0BG0BB0BK0BO0BG0BB0DbZ0MlY0JV0KH0YF0BbP0BI0cRF0CA0BbR0BB0DA0CW3BA"
    "2AH0AW3AB2AG0AbE2II0bWS0BB2FE0AV2AF3DA0AZ3FA0cMcD2EB0AB2AP2CbT0AA1AC1BB1FD0AD0BC0BbC1CC1EA2AI3HI0HbC2AB3"
    "AA0AbC2AC0bGH3AA0AbB1AB2EE3AG0JcB3DG0AV2CH0AS2FH0AR3HD2MG0dCcU0cDbY0NbY2HF0AbJ1AD2IJ2GJ0AbB1DE3AA0AW3IB2"
    "iAbE0BbP1BB3AA0CB0QC1cDD0AbC2AJ0AA0IV1AK2AD3AE0WR1AD3AD0bMU2AG0UW1JC0AcA1AO3AG2EbD1AA0AB1AB0AA1JD0AbS1AK"
    "3AB3BD1AA0NY2HJ1GC0AbJ1AN2BJ3AD0AA1AB0AA0IbI1AA3AB0AA1JC0AbV1AN0AD3AD1AD3AA1AB2AJ0AA3AA0AA3AC2BT0LR0BY1A"
    "L3AF1AA0AB1AA0cKG0BA0BD0BO0BJ3AA0GbU1AL2FJ1GD0BH0CB0CV0BG0BB0BE1BB0AA1AG1CB1CC0CA1GA0FE1AB1CG1DE0LJ0BA0C"
    "A0BbL0BA1AI1BA1CA1BD1BE0AA1AA0AA3AB3BB1IB0bDcA1AR0AD3AE2AJ3AB3BA1AA0AC0bEbV1AT0AB3AA0AA2IJ0gKbU1AG1CI3AW"
    "0AD1AB0bIbV1AQ3AC0AA2LJ3GM0TbQ1AM0AA3AA2GJ2GT0bCbA1CO2EL3AD0AG0hDbR1AO3AA0dWcL2AS0MH0CA0CH0BB0BX1AF1BB1C"
    "D0AA1AA0AA1AB3AC2JJ0cSH0CbM1AG1CG0AA3AA0AA1AA0bBA1AJ0AbN1AG0AA1AD3AH1AA0IA1AK0AbT1AP3AC0AA3AE0NcU3HJ0hAb"
    "G3AA2OJ0GI0BbK1AH1BH0AA3AE2KbC3DB0AbD1CV1BN0cVG0BB0BbL1AF1DA1BB1BG0AA1AA2IJ0GF0BB0BbF1AE1BB1BE0AA2HJ0lYS"
    "1AD3AB1HB0AA1AA0AM0BbH1AG1DE3AM2AJ1AA0dHA2PU3AbC3NA0AbjL2dYeG3BE0LhN0dxKdS3AB0NbpF1QA0AF1AO0KfxQ0FwK0kdD"
    "bD1AR2AJ0coSvW0HbE2BJ3EB0AdA2BJ0GbD1CE3AA0KbV1AG3AI0AD3AB2KJ2BG0BU0FS0qQbS3AC2AJ0hQcL2AW3AD0dXcW1EA0AA1A"
    "cC1HD0AM0cMB3AA0AA1AA1LB0OjbZ0IbvP0bPJ0nfRD0BG0BB0BlE0PA0bDC0CA0OD0IpF0dkUeC0FM0DI0HJ3CA1AB3AA3fvKjF2AJ3"
    "GqT1cYbT1CW3JeL3cIjL3KbM3CcH1AE3AC1AF1IH3AB1AG3AbD1AD3AcI3VcN1AC3AA2eST2MT3MdI2JY0fFdG0BcS0BB0CA0CB0CD0B"
    "L0BA0BG0BcM0BD0CH0BG0BbB0BD0BE0BA0DG0BnB0CY3AA0AY3AA0AbE3AA0AY3AA0AbE3AA0AY3AA0AbE3AA0AY3AA0AbE3AA0AY3AA"
    "0AH2CbX3AtR1AcC3AD1AbX3AH1AA3AN1AA3AG1PE1BO0bqMbE0GF1iFG1BQ1CG1BB1BE0FcJ1bHA0eIbS1DG0AG2CJ0EA3AA0mIbD1AA"
    "0RbR1AD2AJ3FA0rWbB1AD2AJ0iGbD1AB0AA2AJ3EA0sMG0BD0BB0BO0BhO2CI1AG0bPcP1AG0AA2EJ3EB2beFcG3AA2AC3AA2AD2cYbS"
    "3AA2AO0hMD0BbA0BB0BA0CA0BJ0BD0BA0BA0GA0EA0BA0BA0BC0BB0BA0CA0BA0BA0BA0BA0BB0BA0CD0BG0BD0BD0BA0BJ0BQ0FC0BE"
    "0BQ3cAB3kKbR3EdV3MO3CO3BO3BbK2KM3AgE3cEbC3NbR3EI3HB3OF3fYblV3EQ3DM3DeO3EdQ3GL3EA3PL3EcD3IJ3GbN3IbD3CL3EB"
    "3cKnB3MN3CM3DJ3FcD3HO3CK3GI3HfQ3BdN2AJ0bnQclfB0bGgdT0GiN0CinP0OlbK0PxX0dqWuV0cfYhhY0FgfF1bonhGjF";

enum { DSPARK__CODES = 0x110000 };

enum {
    DSPARK__TOKEN_VOCABULARY = 1, DSPARK__TOKEN_ADDED = 2, DSPARK__TOKEN_SPECIAL = 4,
    DSPARK__TOKEN_RAW = 8       // its name is not byte-level text: must be an added token
};

typedef struct {
    const char *bytes;      // a zero follows them
    int len, kind;          // DSPARK__TOKEN_*; 0: no token has this id yet
} dspark__token;

typedef struct {
    uint64_t pair;          // left id * 2^32 + right id + 1; 0: an empty slot
    int32_t rank, id;       // what the two become
} dspark__bpe_merge;

struct dspark_tokenizer {
    int n;                          // ids are 0 .. n - 1
    dspark__token *tokens;          // [n]
    char *bytes;                    // of the tokens
    int32_t *ids;                   // [ids_mask + 1] by hash of a token's bytes: id + 1; 0: an empty slot
    size_t ids_mask;
    dspark__bpe_merge *merges;          // [merges_mask + 1] by hash of the pair
    size_t merges_mask;
    int32_t byte_id[256];           // the token of each byte
    const dspark__token **added;    // [n_added] in the order of their bytes
    int n_added;
    unsigned char begins_added[256];    // 1: an added token begins with this byte
    unsigned char *classes;         // [DSPARK__CODES] of a code point
};

DSPARK_API int dspark_tokenizer_size(const dspark_tokenizer *t) { return t->n; }

DSPARK_API const char *dspark_token_bytes(const dspark_tokenizer *t, int32_t id, int *len) {
    int known = id >= 0 && id < t->n;
    *len = known ? t->tokens[id].len : 0;
    return known ? t->tokens[id].bytes : NULL;
}

DSPARK_API int dspark_token_is_special(const dspark_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n && (t->tokens[id].kind & DSPARK__TOKEN_SPECIAL) != 0;
}

// The slot of these bytes in ids, or the empty slot for them.
static size_t dspark__token_slot(const dspark_tokenizer *t, const char *bytes, size_t len) {
    size_t slot = dspark__hash(bytes, len, (uintptr_t)t->ids) & t->ids_mask;
    for (; t->ids[slot]; slot = (slot + 1) & t->ids_mask) {
        const dspark__token *token = &t->tokens[t->ids[slot] - 1];
        if ((size_t)token->len == len && !memcmp(token->bytes, bytes, len)) break;
    }
    return slot;
}

DSPARK_API int32_t dspark_token_id(const dspark_tokenizer *t, const char *text, size_t len) {
    return len ? t->ids[dspark__token_slot(t, text, len)] - 1 : -1;
}

// The slot of a pair, or the empty slot for it.
static size_t dspark__merge_slot(const dspark_tokenizer *t, uint64_t pair) {
    size_t slot = dspark__hash((const char *)&pair, sizeof pair, (uintptr_t)t->merges) & t->merges_mask;
    while (t->merges[slot].pair && t->merges[slot].pair != pair) slot = (slot + 1) & t->merges_mask;
    return slot;
}

static uint64_t dspark__merge_pair(int32_t left, int32_t right) {
    return ((uint64_t)left << 32 | (uint64_t)right) + 1;
}

// ---- encoding

// A piece while it is merged: symbol i starts as its byte i. The right symbol of a merged pair is unlinked and has
// rank -1.
typedef struct {
    int32_t id, prev, next;     // neighbours; -1 before the first, the piece's length after the last
    int32_t rank, merged;       // of the pair with next: rank, -1: no merge; id of the whole
} dspark__symbol;

typedef struct {
    const dspark_tokenizer *t;
    const char *text;
    unsigned char *classes;     // [len] of the text's bytes
    dspark__symbol *symbols;    // of the piece
    uint64_t *heap;             // rank * 2^32 + place of the left symbol, lowest on top; outdated ones stay
    size_t symbols_cap, heap_cap, n_heap;
    int32_t *ids;
    int n, cap;
} dspark__encoder;

static void dspark__encoder_emit(dspark__encoder *e, int32_t id) {
    if (e->n < e->cap) e->ids[e->n] = id;
    e->n++;
}

static void dspark__encoder_push(dspark__encoder *e, uint64_t key) {
    size_t i = e->n_heap++;
    for (; i && e->heap[(i - 1) / 2] > key; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = key;
}

static uint64_t dspark__encoder_pop(dspark__encoder *e) {
    uint64_t lowest = e->heap[0], key = e->heap[--e->n_heap];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < e->n_heap) {
        if (child + 1 < e->n_heap && e->heap[child + 1] < e->heap[child]) child++;
        if (e->heap[child] >= key) break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = key;
    return lowest;
}

// Updates the pair of symbol i and the next, either of which is new.
static void dspark__encoder_pair(dspark__encoder *e, int32_t i, int32_t n) {
    dspark__symbol *s = &e->symbols[i];
    const dspark__bpe_merge *m;
    s->rank = -1;
    if (s->next == n) return;
    m = &e->t->merges[dspark__merge_slot(e->t, dspark__merge_pair(s->id, e->symbols[s->next].id))];
    if (!m->pair) return;
    s->rank = m->rank, s->merged = m->id;
    dspark__encoder_push(e, (uint64_t)m->rank << 32 | (uint64_t)i);
}

// The heap gets at most n - 1 pairs at first, and two for each of at most n - 1 merges: fewer than 3 n.
static dspark_status dspark__encode_piece(dspark__encoder *e, size_t begin, size_t end) {
    const unsigned char *bytes = (const unsigned char *)e->text + begin;
    int32_t n = (int32_t)(end - begin);
    dspark__symbol *s = (dspark__symbol *)dspark__grow(e->symbols, &e->symbols_cap, (size_t)n, sizeof *s);
    uint64_t *heap;
    if (!s) return DSPARK_ERROR_MEMORY;
    e->symbols = s;
    heap = (uint64_t *)dspark__grow(e->heap, &e->heap_cap, 3 * (size_t)n, sizeof *heap);
    if (!heap) return DSPARK_ERROR_MEMORY;
    e->heap = heap;
    for (int32_t i = 0; i < n; i++) s[i].id = e->t->byte_id[bytes[i]], s[i].prev = i - 1, s[i].next = i + 1;
    for (int32_t i = 0; i < n; i++) dspark__encoder_pair(e, i, n);
    while (e->n_heap) {
        uint64_t key = dspark__encoder_pop(e);
        int32_t i = (int32_t)(key & 0xFFFFFFFFu), right = s[i].next;
        if (s[i].rank != (int32_t)(key >> 32)) continue;
        s[right].rank = -1;
        s[i].id = s[i].merged, s[i].next = s[right].next;
        if (s[i].next < n) s[s[i].next].prev = i;
        dspark__encoder_pair(e, i, n);
        if (s[i].prev >= 0) dspark__encoder_pair(e, s[i].prev, n);
    }
    for (int32_t i = 0; i < n; i = s[i].next) dspark__encoder_emit(e, s[i].id);
    return DSPARK_OK;
}

// The end of the bytes from i on that have one of these classes.
static size_t dspark__run(const dspark__encoder *e, size_t i, size_t end, int classes) {
    while (i < end && (e->classes[i] & classes)) i++;
    return i;
}

static size_t dspark__next_character(const dspark__encoder *e, size_t i, size_t end) {
    for (i++; i < end && !(e->classes[i] & DSPARK__FIRST); ) i++;
    return i;
}

// The end of the third pattern's match at p in a text that ends at `end`; p if there is none. The first matching
// alternative counts:
//     [!-/:-@\[-`{-~][A-Za-z]+
//     [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
//      ?[\p{P}\p{S}]+[\r\n]*
//     \s*[\r\n]+
//     \s+(?!\S)
//     \s+
static size_t dspark__match(const dspark__encoder *e, size_t p, size_t end) {
    const unsigned char *text = (const unsigned char *)e->text;
    int word = DSPARK__LETTER | DSPARK__MARK, c = e->classes[p];
    size_t next = dspark__next_character(e, p, end), q;
    if (text[p] < 0x80 && (c & DSPARK__PUNCTUATION)) {
        for (q = next; q < end && text[q] < 0x80 && (e->classes[q] & DSPARK__LETTER); ) q++;
        if (q > next) return q;
    }
    if (c & word) return dspark__run(e, p, end, word);      // a mark may be either part, with the same end
    if (!(c & (DSPARK__NEWLINE | DSPARK__PUNCTUATION)) && next < end && (e->classes[next] & word))
        return dspark__run(e, next, end, word);
    q = p + (text[p] == ' ');
    if (q < end && (e->classes[q] & DSPARK__PUNCTUATION))
        return dspark__run(e, dspark__run(e, q, end, DSPARK__PUNCTUATION), end, DSPARK__NEWLINE);
    q = dspark__run(e, p, end, DSPARK__SPACE);
    for (size_t last = q; last > p; last--) if (e->classes[last - 1] & DSPARK__NEWLINE) return last;
    if (q == end || q <= next) return q;
    while (!(e->classes[--q] & DSPARK__FIRST)) {}           // the last of several is left to what follows
    return q;
}

// Encodes the third pattern's matches and the text between them.
static dspark_status dspark__encode_words(dspark__encoder *e, size_t begin, size_t end) {
    dspark_status status = DSPARK_OK;
    for (size_t p = begin; p < end && !status; ) {
        size_t to = dspark__match(e, p, end);
        if (to == p) {
            p = dspark__next_character(e, p, end);
            continue;
        }
        if (p > begin) status = dspark__encode_piece(e, begin, p);
        if (!status) status = dspark__encode_piece(e, p, to);
        begin = p = to;
    }
    if (begin < end && !status) status = dspark__encode_piece(e, begin, end);
    return status;
}

// The same for the second pattern, runs of kanji and kana. A pattern sees each piece of the one before as a whole text.
static dspark_status dspark__encode_kanji(dspark__encoder *e, size_t begin, size_t end) {
    dspark_status status = DSPARK_OK;
    for (size_t p = begin, to; p < end && !status; p = to) {
        int kanji = e->classes[p] & DSPARK__KANJI;
        for (to = p + 1; to < end && (e->classes[to] & DSPARK__KANJI) == kanji; ) to++;
        status = dspark__encode_words(e, p, to);
    }
    return status;
}

// The same for the first pattern, \p{N}{1,3}, in a text without added tokens.
static dspark_status dspark__encode_text(dspark__encoder *e, size_t begin, size_t end) {
    dspark_status status = DSPARK_OK;
    for (size_t p = begin, to; p < end && !status; p = to) {
        int number = e->classes[p] & DSPARK__NUMBER, n = 1;
        to = dspark__next_character(e, p, end);
        while (to < end && (e->classes[to] & DSPARK__NUMBER) == number && (!number || n++ < 3))
            to = dspark__next_character(e, to, end);
        status = dspark__encode_kanji(e, p, to);
    }
    return status;
}

// Sets the class of every byte; a byte that is not UTF-8 counts as a character without a class.
static void dspark__encoder_classify(dspark__encoder *e, size_t len) {
    for (size_t i = 0; i < len; ) {
        uint32_t code;
        int n = dspark__utf8_read(e->text + i, len - i, &code);
        if (n <= 0) n = 1, code = 0;
        memset(e->classes + i, e->t->classes[code], (size_t)n);
        e->classes[i] |= DSPARK__FIRST;
        i += (size_t)n;
    }
}

// The first of added[from, to) whose byte at depth is >= c; all are longer than depth and equal before it.
static int dspark__added_bound(const dspark_tokenizer *t, int from, int to, int depth, int c) {
    while (from < to) {
        int middle = from + (to - from) / 2;
        if ((unsigned char)t->added[middle]->bytes[depth] < c) from = middle + 1;
        else to = middle;
    }
    return from;
}

// The longest added token that the text begins with; NULL: none.
static const dspark__token *dspark__added_find(const dspark_tokenizer *t, const char *text, size_t len) {
    const dspark__token *found = NULL;
    int from = 0, to = t->n_added;
    for (int depth = 0; from < to; depth++) {
        if (t->added[from]->len == depth) found = t->added[from++];
        if ((size_t)depth == len) break;
        from = dspark__added_bound(t, from, to, depth, (unsigned char)text[depth]);
        to = dspark__added_bound(t, from, to, depth, (unsigned char)text[depth] + 1);
    }
    return found;
}

static dspark_status dspark__encode(dspark__encoder *e, size_t len, int flags) {
    const dspark_tokenizer *t = e->t;
    dspark_status status = DSPARK_OK;
    size_t begin = 0;
    e->classes = (unsigned char *)dspark__alloc(len, 1);
    if (!e->classes) return DSPARK_ERROR_MEMORY;
    dspark__encoder_classify(e, len);
    for (size_t p = 0; p < len && !status && !(flags & DSPARK_PLAIN_TEXT); ) {
        const dspark__token *added = NULL;
        if (t->begins_added[(unsigned char)e->text[p]]) added = dspark__added_find(t, e->text + p, len - p);
        if (added) {
            status = dspark__encode_text(e, begin, p);
            dspark__encoder_emit(e, (int32_t)(added - t->tokens));
            begin = p += (size_t)added->len;
        } else {
            p++;
        }
    }
    return status ? status : dspark__encode_text(e, begin, len);
}

DSPARK_API int dspark_encode(const dspark_tokenizer *t, const char *text, size_t len, int flags, int32_t *ids,
                             int cap) {
    dspark__encoder e;
    dspark_status status;
    memset(&e, 0, sizeof e);
    e.t = t, e.text = text, e.ids = ids, e.cap = cap;
    if (!t) return -(int)dspark__fail(DSPARK_ERROR_ARGUMENT, "encode: no tokenizer");
    if (len > INT32_MAX)
        return -(int)dspark__fail(DSPARK_ERROR_ARGUMENT, "encode: expected at most 2^31 - 1 bytes, found %zu",
                                  len);
    status = dspark__encode(&e, len, flags);
    dspark__free(e.classes);
    dspark__free(e.symbols);
    dspark__free(e.heap);
    return status ? -(int)status : e.n;
}

// ---- decoding

DSPARK_API int dspark_decode(const dspark_tokenizer *t, const int32_t *ids, int n, char *text, int cap) {
    int64_t total = 0;
    if (!t) return -(int)dspark__fail(DSPARK_ERROR_ARGUMENT, "decode: no tokenizer");
    for (int i = 0; i < n; i++) {
        int len;
        const char *bytes = dspark_token_bytes(t, ids[i], &len);
        if (len && total < cap) memcpy(text + total, bytes, (size_t)dspark__min(len, cap - (int)total));
        total += len;
    }
    if (total <= INT32_MAX) return (int)total;
    return -(int)dspark__fail(DSPARK_ERROR_ARGUMENT, "decode: expected ids of less than 2 GiB of text");
}

DSPARK_API int dspark_utf8_push(dspark_utf8 *u, const char *bytes, int n, int last, char *out) {
    char *end = out;
    for (int i = 0; i < n + (last != 0); i++) {
        int length;
        uint32_t code;
        if (i < n) u->held[u->n++] = (unsigned char)bytes[i];
        while (u->n && ((length = dspark__utf8_read((const char *)u->held, (size_t)u->n, &code)) || i == n)) {
            int taken = length > 0 ? length : length < 0 ? -length : u->n;
            end += dspark__utf8_write(length > 0 ? code : 0xFFFD, end);
            u->n -= taken;
            memmove(u->held, u->held + taken, (size_t)u->n);
        }
    }
    return (int)(end - out);
}

// ---- opening

typedef struct {
    dspark_tokenizer *t;
    const char *path;
    dspark__json j;
    size_t used;                // bytes of t->bytes
    int16_t byte_of[0x144];     // the byte that a character stands for in byte-level text; -1: none
} dspark__token_file;

// Failures: a tokenizer of an unsupported kind, and a malformed file.
static dspark_status dspark__unsupported(const dspark__token_file *r, const char *where, const char *expected,
                                         int found) {
    return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "%s: %s: expected %s, found %.160s", r->path, where,
                        expected, dspark__json_show(&r->j, found));
}
static dspark_status dspark__malformed(const dspark__token_file *r, const char *where, const char *expected,
                                       int found) {
    return dspark__fail(DSPARK_ERROR_FORMAT, "%s: %s: expected %s, found %.160s", r->path, where,
                        expected, dspark__json_show(&r->j, found));
}

// Options that would change the ids must be missing, null, false or "".
static dspark_status dspark__tokenizer_off(const dspark__token_file *r, const char *where, int object,
                                           const char *const *keys, int n) {
    for (int i = 0; i < n; i++) {
        char name[64];
        int node = dspark__json_find(&r->j, object, keys[i]), kind = dspark__json_kind(&r->j, node);
        if (kind <= DSPARK__JSON_FALSE || dspark__json_is(&r->j, node, "")) continue;
        snprintf(name, sizeof name, "%s%s", where, keys[i]);
        return dspark__unsupported(r, name, "null or false", node);
    }
    return DSPARK_OK;
}

static dspark_status dspark__tokenizer_type(const dspark__token_file *r, const char *where, int object,
                                            const char *type) {
    int node = dspark__json_find(&r->j, object, "type");
    if (dspark__json_is(&r->j, node, type)) return DSPARK_OK;
    return dspark__unsupported(r, where, type, node < 0 ? object : node);
}

static dspark_status dspark__tokenizer_split(const dspark__token_file *r, int split, const char *pattern) {
    static const char *const off[] = { "invert" };
    const char *where = "pre_tokenizer.pretokenizers[].";
    int regex = dspark__json_find(&r->j, dspark__json_find(&r->j, split, "pattern"), "Regex");
    int behavior = dspark__json_find(&r->j, split, "behavior");
    dspark_status status = dspark__tokenizer_type(r, "pre_tokenizer.pretokenizers[].type", split, "Split");
    if (status) return status;
    if (!dspark__json_is(&r->j, regex, pattern))
        return dspark__unsupported(r, "the pattern of a Split", pattern, regex);
    if (!dspark__json_is(&r->j, behavior, "Isolated"))
        return dspark__unsupported(r, "the behavior of a Split", "Isolated", behavior);
    return dspark__tokenizer_off(r, where, split, off, 1);
}

// Must be the three patterns that >>tokenizer implements by hand, then a ByteLevel without options.
static dspark_status dspark__tokenizer_pieces(const dspark__token_file *r) {
    static const char *const patterns[] = {
        "\\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        ("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
         " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
    };
    static const char *const switches[] = { "add_prefix_space", "use_regex" };      // not there: true
    const dspark__json *j = &r->j;
    int object = dspark__json_find(j, 0, "pre_tokenizer");
    int list = dspark__json_find(j, object, "pretokenizers"), item = list + 1, node;
    dspark_status status = dspark__tokenizer_type(r, "pre_tokenizer", object, "Sequence");
    if (status) return status;
    if (dspark__json_kind(j, list) != DSPARK__JSON_ARRAY || j->nodes[list].n != 4)
        return dspark__unsupported(r, "pre_tokenizer.pretokenizers", "three Splits and a ByteLevel", list);
    for (int i = 0; i < 3 && !status; i++, item = dspark__json_next(j, item))
        status = dspark__tokenizer_split(r, item, patterns[i]);
    if (!status) status = dspark__tokenizer_type(r, "pre_tokenizer.pretokenizers[3].type", item, "ByteLevel");
    for (int i = 0; i < 2 && !status; i++) {
        node = dspark__json_find(j, item, switches[i]);
        if (dspark__json_kind(j, node) != DSPARK__JSON_FALSE)
            status = dspark__unsupported(r, switches[i], "false", node);
    }
    return status;
}

// Everything but the tokens and merges.
static dspark_status dspark__tokenizer_form(const dspark__token_file *r) {
    static const char *const root_off[] = { "truncation", "padding" };
    static const char *const model_off[] = {
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback", "ignore_merges"
    };
    const dspark__json *j = &r->j;
    int model = dspark__json_find(j, 0, "model"), normalizer = dspark__json_find(j, 0, "normalizer");
    int steps = dspark__json_find(j, normalizer, "normalizers"), decoder = dspark__json_find(j, 0, "decoder");
    int post = dspark__json_find(j, 0, "post_processor");
    dspark_status status;
    if (dspark__json_kind(j, 0) != DSPARK__JSON_OBJECT)
        return dspark__malformed(r, "the text", "an object", 0);
    if (dspark__json_kind(j, model) != DSPARK__JSON_OBJECT)
        return dspark__malformed(r, "model", "an object", model);
    status = dspark__tokenizer_type(r, "model.type", model, "BPE");
    if (!status) status = dspark__tokenizer_off(r, "", 0, root_off, 2);
    if (!status) status = dspark__tokenizer_off(r, "model.", model, model_off, 7);
    if (!status && dspark__json_kind(j, normalizer) > DSPARK__JSON_NULL) {
        status = dspark__tokenizer_type(r, "normalizer", normalizer, "Sequence");
        if (!status && (dspark__json_kind(j, steps) != DSPARK__JSON_ARRAY || j->nodes[steps].n))
            status = dspark__unsupported(r, "normalizer", "an empty list", steps);
    }
    if (!status) status = dspark__tokenizer_pieces(r);
    if (!status && dspark__json_kind(j, post) > DSPARK__JSON_NULL)
        status = dspark__tokenizer_type(r, "post_processor", post, "ByteLevel");
    if (!status) status = dspark__tokenizer_type(r, "decoder", decoder, "ByteLevel");
    return status;
}

// Decodes byte-level text to out, which may be s; returns the number of bytes, -1: not byte-level text.
static int dspark__byte_level(const dspark__token_file *r, const char *s, size_t len, char *out) {
    int n = 0;
    for (size_t i = 0; i < len; n++) {
        uint32_t code = 0;
        int length = dspark__utf8_read(s + i, len - i, &code);
        if (length <= 0 || code >= sizeof r->byte_of / sizeof *r->byte_of || r->byte_of[code] < 0) return -1;
        out[n] = (char)r->byte_of[code];
        i += (size_t)length;
    }
    return n;
}

// A byte is its own character if that can be printed, else one from U+0100 on.
static void dspark__byte_level_init(dspark__token_file *r) {
    int others = 0x100;
    for (size_t i = 0; i < sizeof r->byte_of / sizeof *r->byte_of; i++) r->byte_of[i] = -1;
    for (int b = 0; b < 256; b++) {
        int printed = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
        r->byte_of[printed ? b : others++] = (int16_t)b;
    }
}

// The token with the id at node, which must be below t->n, at this point an upper bound.
static dspark_status dspark__tokenizer_id(const dspark__token_file *r, const char *where, int node,
                                          dspark__token **token) {
    int64_t id;
    char expected[48];
    *token = NULL;
    if (dspark__json_integer(&r->j, node, &id) && id >= 0 && id < r->t->n) {
        *token = &r->t->tokens[id];
        return DSPARK_OK;
    }
    snprintf(expected, sizeof expected, "an id below %d, the number of tokens", r->t->n);
    return dspark__malformed(r, where, expected, node);
}

static void dspark__tokenizer_keep(dspark__token_file *r, dspark__token *token, int len, int kind) {
    token->bytes = r->t->bytes + r->used;
    token->len = len, token->kind = kind;
    r->used += (size_t)len + 1;
}

// model.vocab: names in byte-level text to ids
static dspark_status dspark__tokenizer_vocabulary(dspark__token_file *r, int vocab) {
    const dspark__json *j = &r->j;
    for (int i = vocab + 1; i < dspark__json_next(j, vocab); i = dspark__json_next(j, i + 1)) {
        dspark__token *token;
        size_t len;
        const char *name = dspark__json_string(j, i, &len);
        dspark_status status = dspark__tokenizer_id(r, "model.vocab", i + 1, &token);
        int n = dspark__byte_level(r, name, len, r->t->bytes + r->used);
        if (status) return status;
        if (!len) return dspark__malformed(r, "model.vocab", "names that are not empty", i);
        if (token->kind) return dspark__malformed(r, "model.vocab", "one token an id", i);
        if (n < 0) memcpy(r->t->bytes + r->used, name, len);
        dspark__tokenizer_keep(r, token, n < 0 ? (int)len : n,
                               DSPARK__TOKEN_VOCABULARY | (n < 0 ? DSPARK__TOKEN_RAW : 0));
    }
    return DSPARK_OK;
}

static int dspark__added_order(const void *a, const void *b) {
    const dspark__token *x = *(const dspark__token *const *)a, *y = *(const dspark__token *const *)b;
    int order = memcmp(x->bytes, y->bytes, (size_t)dspark__min(x->len, y->len));
    return order ? order : (x->len > y->len) - (x->len < y->len);
}

// added_tokens: names as they are, with an id of their own or that of the same name in the vocabulary
static dspark_status dspark__tokenizer_added(dspark__token_file *r, int list) {
    static const char *const off[] = { "single_word", "lstrip", "rstrip" };
    const dspark__json *j = &r->j;
    dspark_tokenizer *t = r->t;
    for (int i = list + 1; list >= 0 && i < dspark__json_next(j, list); i = dspark__json_next(j, i)) {
        int content = dspark__json_find(j, i, "content");
        dspark__token *token;
        size_t len;
        const char *name = dspark__json_string(j, content, &len);
        int id = dspark__json_find(j, i, "id");
        dspark_status status = dspark__tokenizer_id(r, "added_tokens[].id", id, &token);
        if (!status) status = dspark__tokenizer_off(r, "added_tokens[].", i, off, 3);
        if (status) return status;
        if (!len)
            return dspark__malformed(r, "added_tokens[].content", "a text", content);
        if (token->kind && ((token->kind & DSPARK__TOKEN_ADDED) || (size_t)token->len != len ||
                            memcmp(token->bytes, name, len)))
            return dspark__malformed(r, "added_tokens[].content", "one token an id", content);
        if (!token->kind) {
            memcpy(t->bytes + r->used, name, len);
            dspark__tokenizer_keep(r, token, (int)len, 0);
        }
        token->kind |= DSPARK__TOKEN_ADDED;
        if (dspark__json_kind(j, dspark__json_find(j, i, "special")) == DSPARK__JSON_TRUE)
            token->kind |= DSPARK__TOKEN_SPECIAL;
        t->added[t->n_added++] = token;
        t->begins_added[(unsigned char)*name] = 1;
    }
    qsort(t->added, (size_t)t->n_added, sizeof *t->added, dspark__added_order);
    return DSPARK_OK;
}

static int32_t dspark__vocabulary_id(const dspark_tokenizer *t, const char *bytes, int len) {
    int32_t id = dspark_token_id(t, bytes, (size_t)len);
    return id >= 0 && (t->tokens[id].kind & DSPARK__TOKEN_VOCABULARY) ? id : -1;
}

// Checks that ids 0 .. n - 1 all have bytes, no two the same, and that each byte has an id.
static dspark_status dspark__tokenizer_index(dspark__token_file *r) {
    dspark_tokenizer *t = r->t;
    while (t->n && !t->tokens[t->n - 1].kind) t->n--;       // added tokens may repeat the vocabulary's
    t->ids_mask = dspark__table_mask((size_t)t->n);
    t->ids = (int32_t *)dspark__alloc(t->ids_mask + 1, sizeof *t->ids);
    if (!t->ids) return DSPARK_ERROR_MEMORY;
    for (int id = 0; id < t->n; id++) {
        const dspark__token *token = &t->tokens[id];
        size_t slot;
        if (!token->kind)
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: expected ids without a gap, found no token %d "
                                "below %d", r->path, id, t->n);
        if ((token->kind & DSPARK__TOKEN_RAW) && !(token->kind & DSPARK__TOKEN_ADDED))
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: model.vocab: expected byte-level text, found %.64s",
                                r->path, token->bytes);
        slot = dspark__token_slot(t, token->bytes, (size_t)token->len);
        if (t->ids[slot])
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: expected one id a token, found %d and %d for %.64s",
                                r->path, t->ids[slot] - 1, id, token->bytes);
        t->ids[slot] = id + 1;
    }
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        if ((t->byte_id[b] = dspark__vocabulary_id(t, &byte, 1)) < 0)
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: model.vocab: expected a token for every byte, "
                                "found none for 0x%02X", r->path, (unsigned)b);
    }
    return DSPARK_OK;
}

// Decodes a merge, "a b" or ["a", "b"], in place: a's bytes, then b's, at *at. Returns 0 if it is neither.
static int dspark__merge_parts(const dspark__token_file *r, int node, char **at, int *left, int *right) {
    const dspark__json *j = &r->j;
    int pair = dspark__json_kind(j, node) == DSPARK__JSON_ARRAY && j->nodes[node].n == 2;
    size_t n_first, n_second;
    const char *first = dspark__json_string(j, pair ? node + 1 : node, &n_first), *second;
    if (!first) return 0;
    second = pair ? dspark__json_string(j, node + 2, &n_second) : (const char *)memchr(first, ' ', n_first);
    if (!second) return 0;
    if (!pair) second++, n_second = n_first - (size_t)(second - first), n_first -= n_second + 1;
    *at = j->strings + (first - j->strings);
    *left = dspark__byte_level(r, first, n_first, *at);
    *right = *left < 0 ? -1 : dspark__byte_level(r, second, n_second, *at + *left);
    return *right >= 0;
}

// model.merges: pairs in rank order; both parts and the whole must be tokens of the vocabulary
static dspark_status dspark__tokenizer_merges(dspark__token_file *r, int list) {
    dspark_tokenizer *t = r->t;
    int32_t rank = 0;
    t->merges_mask = dspark__table_mask((size_t)r->j.nodes[list].n);
    t->merges = (dspark__bpe_merge *)dspark__alloc(t->merges_mask + 1, sizeof *t->merges);
    if (!t->merges) return DSPARK_ERROR_MEMORY;
    for (int i = list + 1; i < dspark__json_next(&r->j, list); i = dspark__json_next(&r->j, i), rank++) {
        char *bytes;
        int n_left, n_right;
        int32_t left, right, both;
        dspark__bpe_merge *m;
        if (!dspark__merge_parts(r, i, &bytes, &n_left, &n_right))
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: model.merges[%d]: expected byte-level \"a b\" or "
                                "[\"a\", \"b\"], found %.64s", r->path, rank, dspark__json_show(&r->j, i));
        left = dspark__vocabulary_id(t, bytes, n_left);
        right = dspark__vocabulary_id(t, bytes + n_left, n_right);
        both = dspark__vocabulary_id(t, bytes, n_left + n_right);
        if (left < 0 || right < 0 || both < 0)
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: model.merges[%d]: expected both parts and the "
                                "whole to be in the vocabulary, found no %s there", r->path, rank,
                                left < 0 ? "left part" : right < 0 ? "right part" : "whole");
        m = &t->merges[dspark__merge_slot(t, dspark__merge_pair(left, right))];
        if (m->pair)
            return dspark__fail(DSPARK_ERROR_FORMAT, "%s: model.merges[%d]: expected a new pair, found that "
                                "of [%d]", r->path, rank, m->rank);
        m->pair = dspark__merge_pair(left, right), m->rank = rank, m->id = both;
    }
    return DSPARK_OK;
}

static dspark_status dspark__tokenizer_classes(dspark_tokenizer *t) {
    static const unsigned char classes[] = {
        DSPARK__LETTER, DSPARK__MARK, DSPARK__NUMBER, DSPARK__PUNCTUATION, DSPARK__SPACE
    };
    size_t at = 0, numbers[2];
    t->classes = (unsigned char *)dspark__alloc(DSPARK__CODES, 1);
    if (!t->classes) return DSPARK_ERROR_MEMORY;
    for (const char *s = dspark__unicode; *s; ) {
        int kind = *s++ - '0';
        for (int i = 0; i < 2; i++) {
            for (numbers[i] = 0; *s >= 'a'; s++) numbers[i] = numbers[i] * 26 + (size_t)(*s - 'a');
            numbers[i] = numbers[i] * 26 + (size_t)(*s++ - 'A');
        }
        memset(t->classes + at + numbers[0], classes[kind], numbers[1] + 1);
        at += numbers[0] + numbers[1] + 1;
    }
    t->classes[0x0A] |= DSPARK__NEWLINE, t->classes[0x0D] |= DSPARK__NEWLINE;
    for (size_t code = 0x3040; code <= 0x30FF; code++) t->classes[code] |= DSPARK__KANJI;
    for (size_t code = 0x4E00; code <= 0x9FA5; code++) t->classes[code] |= DSPARK__KANJI;
    return DSPARK_OK;
}

// Room for every token of the file.
static dspark_status dspark__tokenizer_room(dspark__token_file *r, int vocab, int added) {
    const dspark__json *j = &r->j;
    dspark_tokenizer *t = r->t;
    int n_added = added < 0 ? 0 : j->nodes[added].n;
    size_t total = 0;
    t->n = j->nodes[vocab].n + n_added;
    for (int i = vocab + 1; i < dspark__json_next(j, vocab); i = dspark__json_next(j, i + 1))
        total += (size_t)j->nodes[i].n + 1;
    for (int i = added + 1; added >= 0 && i < dspark__json_next(j, added); i = dspark__json_next(j, i)) {
        int content = dspark__json_find(j, i, "content");
        total += content < 0 ? 0 : (size_t)j->nodes[content].n + 1;
    }
    t->tokens = (dspark__token *)dspark__alloc((size_t)t->n, sizeof *t->tokens);
    t->bytes = (char *)dspark__alloc(total, 1);
    t->added = (const dspark__token **)dspark__alloc((size_t)n_added, sizeof *t->added);
    return t->tokens && t->bytes && t->added ? DSPARK_OK : DSPARK_ERROR_MEMORY;
}

static dspark_status dspark__tokenizer_build(dspark__token_file *r) {
    const dspark__json *j = &r->j;
    int model = dspark__json_find(j, 0, "model"), added = dspark__json_find(j, 0, "added_tokens");
    int vocab = dspark__json_find(j, model, "vocab"), merges = dspark__json_find(j, model, "merges");
    dspark_status status = dspark__tokenizer_form(r);
    if (status) return status;
    if (dspark__json_kind(j, vocab) != DSPARK__JSON_OBJECT)
        return dspark__malformed(r, "model.vocab", "an object", vocab);
    if (dspark__json_kind(j, merges) != DSPARK__JSON_ARRAY)
        return dspark__malformed(r, "model.merges", "an array", merges);
    if (added >= 0 && dspark__json_kind(j, added) != DSPARK__JSON_ARRAY)
        return dspark__malformed(r, "added_tokens", "an array", added);
    dspark__byte_level_init(r);
    if ((status = dspark__tokenizer_room(r, vocab, added)) != DSPARK_OK) return status;
    if ((status = dspark__tokenizer_vocabulary(r, vocab)) != DSPARK_OK) return status;
    if ((status = dspark__tokenizer_added(r, added)) != DSPARK_OK) return status;
    if ((status = dspark__tokenizer_index(r)) != DSPARK_OK) return status;
    if ((status = dspark__tokenizer_merges(r, merges)) != DSPARK_OK) return status;
    return dspark__tokenizer_classes(r->t);
}

DSPARK_API void dspark_tokenizer_close(dspark_tokenizer *t) {
    if (!t) return;
    dspark__free(t->tokens);
    dspark__free(t->bytes);
    dspark__free(t->ids);
    dspark__free(t->merges);
    dspark__free((void *)t->added);
    dspark__free(t->classes);
    dspark__free(t);
}

// From the text of a tokenizer.json; path names it in errors.
static dspark_status dspark__tokenizer_read(dspark_tokenizer **out, const char *path, const char *text,
                                            size_t len) {
    dspark__token_file r;
    dspark_status status;
    memset(&r, 0, sizeof r);
    *out = NULL;
    r.path = path;
    status = dspark__json_parse(&r.j, path, text, len);
    if (status) return status;
    r.t = (dspark_tokenizer *)dspark__alloc(1, sizeof *r.t);
    status = r.t ? dspark__tokenizer_build(&r) : DSPARK_ERROR_MEMORY;
    dspark__json_free(&r.j);
    if (status) dspark_tokenizer_close(r.t);
    else *out = r.t;
    return status;
}

DSPARK_API dspark_status dspark_tokenizer_open(dspark_tokenizer **out, const char *tokenizer_json) {
    const void *text = NULL;
    uint64_t len = 0;
    dspark_status status = dspark__file_map(NULL, tokenizer_json, &text, &len);
    *out = NULL;
    if (status) return status;
    status = dspark__tokenizer_read(out, tokenizer_json, (const char *)text, (size_t)len);
    dspark__file_unmap(NULL, text, len);
    return status;
}

// >>chat
// Messages to the prompt that DeepSeek-V4 was trained on, without tools: the release's encoding_dsv4.py. Contents are
// copied unchanged. After a user message that is last or followed by an answer, the assistant's turn opens: with
// </think> if thinking is off or, when earlier reasoning is dropped, before the last user message; else with <think>.

static const char dspark__chat_effort[] =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

// Where the prompt goes. Adjacent contents are one text to the tokenizer; a token of the form ends it, so encoding
// these texts one by one gives the ids of the whole.
typedef struct {
    const dspark_tokenizer *t;      // NULL: the output is text, to the caller's text[cap]
    int flags;
    char *text;                     // else: text not yet encoded
    size_t n, cap;
    int32_t *ids;
    int64_t n_ids;
    int ids_cap;
} dspark__chat;

static dspark_status dspark__chat_text(dspark__chat *c, const char *s) {
    size_t len = s ? strlen(s) : 0;
    if (c->t) {
        char *text = (char *)dspark__grow(c->text, &c->cap, c->n + len, 1);
        if (!text) return DSPARK_ERROR_MEMORY;
        c->text = text;
    }
    if (len && c->n < c->cap) memcpy(c->text + c->n, s, len < c->cap - c->n ? len : c->cap - c->n);
    c->n += len;
    return DSPARK_OK;
}

static dspark_status dspark__chat_flush(dspark__chat *c) {
    int room = c->n_ids < c->ids_cap ? c->ids_cap - (int)c->n_ids : 0;
    int n = c->n ? dspark_encode(c->t, c->text, c->n, c->flags, room ? c->ids + c->n_ids : NULL, room) : 0;
    c->n = 0;
    c->n_ids += n > 0 ? n : 0;
    return n < 0 ? (dspark_status)-n : DSPARK_OK;
}

static dspark_status dspark__chat_token(dspark__chat *c, const char *name) {
    int32_t id = c->t ? dspark_token_id(c->t, name, strlen(name)) : 0;
    dspark_status status;
    if (id < 0 || (c->t && !(c->t->tokens[id].kind & DSPARK__TOKEN_ADDED)))
        return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "chat: expected %s among the added tokens", name);
    if (!c->t || !(c->flags & DSPARK_PLAIN_TEXT)) return dspark__chat_text(c, name);
    status = dspark__chat_flush(c);
    if (c->n_ids < c->ids_cap) c->ids[c->n_ids] = id;
    c->n_ids++;
    return status;
}

static int dspark__chat_is(const dspark_message *messages, int n, int i, const char *role) {
    return i >= 0 && i < n && messages[i].role && !strcmp(messages[i].role, role);
}

// A user message; thinking: whether the answer to it thinks.
static dspark_status dspark__chat_user(dspark__chat *c, const dspark_message *m, int n, int i, int thinking) {
    int joins = dspark__chat_is(m, n, i - 1, "user");
    dspark_status status = joins ? dspark__chat_text(c, "\n\n") : dspark__chat_token(c, "<｜User｜>");
    if (!status) status = dspark__chat_text(c, m[i].content);
    if (status || (i + 1 < n && !dspark__chat_is(m, n, i + 1, "assistant"))) return status;
    status = dspark__chat_token(c, "<｜Assistant｜>");
    return status ? status : dspark__chat_token(c, thinking ? "<think>" : "</think>");
}

static dspark_status dspark__chat_assistant(dspark__chat *c, const dspark_message *m, int thinking) {
    dspark_status status = thinking ? dspark__chat_text(c, m->reasoning) : DSPARK_OK;
    if (!status && thinking) status = dspark__chat_token(c, "</think>");
    if (!status) status = dspark__chat_text(c, m->content);
    return status || m->wo_eos ? status : dspark__chat_token(c, "<｜end▁of▁sentence｜>");
}

static dspark_status dspark__chat_message(dspark__chat *c, const dspark_message *m, int n, int i,
                                          int thinking) {
    dspark_status status;
    if (dspark__chat_is(m, n, i, "system")) return dspark__chat_text(c, m[i].content);
    if (dspark__chat_is(m, n, i, "user")) return dspark__chat_user(c, m, n, i, thinking);
    if (dspark__chat_is(m, n, i, "assistant")) return dspark__chat_assistant(c, &m[i], thinking);
    if (!dspark__chat_is(m, n, i, "latest_reminder"))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "chat: messages[%d].role: expected system, user, "
                            "assistant or latest_reminder, found %.64s", i, m[i].role ? m[i].role : "NULL");
    status = dspark__chat_token(c, "<｜latest_reminder｜>");
    return status ? status : dspark__chat_text(c, m[i].content);
}

static dspark_status dspark__chat_all(dspark__chat *c, const dspark_message *m, int n,
                                      const dspark_chat_desc *form) {
    static const dspark_chat_desc none = { 0, 0, 0, 0 };
    dspark_status status = DSPARK_OK;
    int last_user = n - 1;
    if (!form) form = &none;
    while (last_user >= 0 && !dspark__chat_is(m, n, last_user, "user")) last_user--;
    if (!form->continued) status = dspark__chat_token(c, "<｜begin▁of▁sentence｜>");
    if (!status && form->thinking && form->effort_max && !form->continued)
        status = dspark__chat_text(c, dspark__chat_effort);
    for (int i = 0; i < n && !status; i++)
        status = dspark__chat_message(c, m, n, i, form->thinking && (i >= last_user || !form->drop_thinking));
    return status;
}

DSPARK_API int dspark_chat_format(const dspark_message *messages, int n, const dspark_chat_desc *form,
                                  char *text, int cap) {
    dspark__chat c;
    dspark_status status;
    memset(&c, 0, sizeof c);
    c.text = text, c.cap = (size_t)dspark__max(cap, 0);
    status = dspark__chat_all(&c, messages, n, form);
    if (!status && c.n > INT32_MAX)
        status = dspark__fail(DSPARK_ERROR_ARGUMENT, "chat: expected less than 2 GiB, found %zu bytes", c.n);
    return status ? -(int)status : (int)c.n;
}

DSPARK_API int dspark_chat_encode(const dspark_tokenizer *t, const dspark_message *messages, int n,
                                  const dspark_chat_desc *form, int flags, int32_t *ids, int cap) {
    dspark__chat c;
    dspark_status status;
    if (!t) return -(int)dspark__fail(DSPARK_ERROR_ARGUMENT, "chat: no tokenizer");
    memset(&c, 0, sizeof c);
    c.t = t, c.flags = flags, c.ids = ids, c.ids_cap = cap;
    status = dspark__chat_all(&c, messages, n, form);
    if (!status) status = dspark__chat_flush(&c);
    dspark__free(c.text);
    if (!status && c.n_ids > INT32_MAX)
        status = dspark__fail(DSPARK_ERROR_ARGUMENT, "chat: expected less than 2^31 ids");
    return status ? -(int)status : (int)c.n_ids;
}

// >>state
// What the CPU keeps of a session, indexed by position, so that rollback is free: what a rejected token wrote is
// overwritten before it is read. A ring of n rows holds position p in row p % n; compressed row i pools tokens
// [i r, (i + 1) r), for r = 4 from (i - 1) r. Compressed rows are stored as rounded: E4M3 codes with their scales, and
// floats for the RoPE dims; the window stays in floats.

typedef struct {
    float *window;                      // [ring][head_dim]
    float *kv, *gate;                   // [raw ring][w]: what the compressor pools
    uint8_t *codes, *scales;            // [rows][head_dim - rope], [rows][blocks of 64]
    float *rope;                        // [rows][rope]
    float *index_kv, *index_gate;       // [raw ring][2 index_head_dim]
    uint8_t *key_codes, *key_scales;    // [rows][index_head_dim / 2], [rows][index_head_dim / 32]
} dspark__layer_state;

// One of a state's arrays: `ring` rows, or (0) a row for every `ratio` tokens.
typedef struct { void *data; size_t row_bytes; int ring, ratio; } dspark__array;

typedef struct {
    dspark__layer_state *layers;        // [num_hidden_layers + n_stages]
    float *taps;                        // [ring][n_taps * hidden]
    dspark__array *arrays;
    int n_arrays, max_context;
    char *memory;
} dspark__state;

// The window and as many rows as a cycle may write before it is rolled back.
static int dspark__ring(const dspark_config *c) { return c->sliding_window + c->dspark_block_size + 1; }
static int dspark__raw_ring(const dspark_config *c, int ratio) {
    return (ratio == 4 ? 2 * ratio : ratio) + c->dspark_block_size + 1;
}
static int dspark__blocks(int n, int block) { return (n + block - 1) / block; }

static size_t dspark__array_rows(const dspark__array *a, int n_tokens) {
    return a->ring ? (size_t)a->ring : (size_t)(n_tokens / a->ratio);
}

// Places one array after the others; without memory it only counts bytes.
static void *dspark__state_take(dspark__state *s, size_t *bytes, size_t row_bytes, int ring, int ratio) {
    dspark__array a = { NULL, row_bytes, ring, ratio };
    if (s->memory) a.data = s->memory + *bytes;
    if (s->arrays) s->arrays[s->n_arrays] = a;
    s->n_arrays++;
    *bytes += (row_bytes * dspark__array_rows(&a, s->max_context) + 63) / 64 * 64;
    return a.data;
}

static void dspark__state_take_layer(dspark__state *s, size_t *bytes, const dspark_config *c, int l) {
    dspark__layer_state none, *layer = s->layers ? &s->layers[l] : &none;
    int ratio = c->compress_ratios[l], D = c->head_dim, R = c->qk_rope_head_dim, I = c->index_head_dim;
    int raw = dspark__raw_ring(c, ratio);
    size_t w = (size_t)(ratio == 4 ? 2 * D : D) * sizeof(float), index_w = (size_t)(2 * I) * sizeof(float);
    layer->window = (float *)dspark__state_take(s, bytes, (size_t)D * sizeof(float), dspark__ring(c), 0);
    if (!ratio) return;
    layer->kv = (float *)dspark__state_take(s, bytes, w, raw, 0);
    layer->gate = (float *)dspark__state_take(s, bytes, w, raw, 0);
    layer->codes = (uint8_t *)dspark__state_take(s, bytes, (size_t)(D - R), 0, ratio);
    layer->scales = (uint8_t *)dspark__state_take(s, bytes, (size_t)dspark__blocks(D - R, 64), 0, ratio);
    layer->rope = (float *)dspark__state_take(s, bytes, (size_t)R * sizeof(float), 0, ratio);
    if (ratio != 4) return;
    layer->index_kv = (float *)dspark__state_take(s, bytes, index_w, raw, 0);
    layer->index_gate = (float *)dspark__state_take(s, bytes, index_w, raw, 0);
    layer->key_codes = (uint8_t *)dspark__state_take(s, bytes, (size_t)(I / 2), 0, ratio);
    layer->key_scales = (uint8_t *)dspark__state_take(s, bytes, (size_t)(I / 32), 0, ratio);
}

static size_t dspark__state_layout(dspark__state *s, const dspark_config *c) {
    size_t bytes = 0;
    s->n_arrays = 0;
    for (int l = 0; l < c->num_hidden_layers + c->n_stages; l++) dspark__state_take_layer(s, &bytes, c, l);
    s->taps = (float *)dspark__state_take(s, &bytes, (size_t)(c->n_taps * c->hidden_size) * sizeof(float),
                                          dspark__ring(c), 0);
    return bytes;
}

// >>model
// A checkpoint, its tokenizer and a device that runs it.

// One session's part in a step.
typedef struct {
    dspark_session *s;
    dspark_step_result *r;
    int n_prompt;               // rows of a submitted prompt that this step runs; 0: it decodes
    int n_drafted, limit;       // drafts made, and how many may be verified
    int length;                 // how many are
    int draft_row, logits_row;  // of its first draft, of its first row's logits
    int drafted;                // it went through the drafter
    int trial;                  // to learn what that costs
    double plain_us;            // P of its account; 0: no account is kept
    double extra_us;            // what its draft takes beyond its share of the pass
    int is_close;               // a cycle with a draft is expected to lose at most a tenth and gain at most a quarter
    int n_p, n_ahead;           // before its commit: rows turned into p, and those of them verified
    struct { int32_t token; int accepted; } ahead[DSPARK_MAX_BLOCK + 1];
} dspark__lane;

// What this step's passes cost.
typedef struct {
    int R, drafting;            // sessions that decode; those of them that may draft
    double base_us, row_us, context_us;         // beyond T(B): a pass; a row; the context's part of row_us
    double plain_us;            // P: a session's share of a step without drafts
    double worst[DSPARK_MAX_BLOCK + 1];         // [cap]: largest share of a pass's growth of one with l <= cap
    double growth[DSPARK_MAX_BLOCK + 1];        // [l]: its share if all that may draft verify l
} dspark__costs;

// What a step gathers about its sessions; arrays of max_rows entries, [max_rows][gamma] for confidence.
typedef struct {
    int32_t *ids, *previous, *drawn;
    dspark_segment *segments;
    dspark_device_draw *draws;
    dspark__lane *lanes;
    float *confidence, *threshold, *weight, *sps;
    const dspark_calibration **calibrations;
    int *limit, *lengths, *lane_of, *n_past;
    void *scratch;
    dspark__costs costs;
} dspark__batch;

// Recent results of drafting, means over so many cycles: a_k, and the accepted drafts that a schedule expected and got.
typedef struct { float survival[DSPARK_MAX_BLOCK], hoped, got; int cycles; } dspark__experience;
// Shared by all sessions of one kind: temperature 0, or one verifier in a temperature band. account: limit 0 if not
// opened since the profile was set.
enum { DSPARK__KINDS = 7, DSPARK__PRIOR = 8 };     // PRIOR: cycles that an initial experience counts as
typedef struct { dspark_account account; dspark__experience experience; } dspark__kind;
// A turn of `left` more steps, plain (0) or with drafts (1); steps since one was plain, or all drafted in it that may,
// or since a turn to that began; after how many the next begins, with about n sessions.
typedef struct { int drafts, left, since[2], wait, n; } dspark__turns;

struct dspark_model {
    dspark__checkpoint checkpoint;
    dspark_tokenizer *tokenizer;
    const dspark_backend *backend;
    void *device;
    int max_rows, max_token_bytes, fast_prefill;
    size_t memory_limit, session_bytes;     // session_bytes: of all open sessions
    int n_profiles, has_calibration;        // n_profiles: how many were set; 0: there is none
    dspark__turns turns;
    dspark__kind kinds[DSPARK__KINDS];
    dspark_stats stats;         // of all its sessions
    dspark_profile profile;
    dspark_calibration calibration;        // of every session, if it was set; else of those that no row is for
    dspark__batch batch;
    float *row;                 // [vocab]: adjusted logits, for log-probabilities; measuring: p
    char *memory;               // of batch and row
    size_t bytes;               // of memory
};

// MEMORY if `more` bytes would exceed memory_limit.
static dspark_status dspark__memory_check(const dspark_model *m, const char *what, size_t more) {
    size_t limit = m->memory_limit, used = dspark_model_bytes(m, NULL) + m->session_bytes;
    if (!limit || (used <= limit && more <= limit - used)) return DSPARK_OK;
    return dspark__fail(DSPARK_ERROR_MEMORY, "%s: %zu bytes and %zu more, memory_limit is %zu", what, used, more,
                        limit);
}

static size_t dspark__tokenizer_bytes(const dspark_tokenizer *t) {
    size_t bytes = 0;
    if (!t) return 0;
    for (int i = 0; i < t->n; i++) bytes += (size_t)t->tokens[i].len + 1 + sizeof *t->tokens;
    return bytes + sizeof *t + (t->ids_mask + 1) * sizeof *t->ids + (t->merges_mask + 1) * sizeof *t->merges +
           DSPARK__CODES;
}

DSPARK_API const dspark_config *dspark_model_config(const dspark_model *m) { return &m->checkpoint.config; }
DSPARK_API const dspark_weights *dspark_model_weights(const dspark_model *m) {
    return &m->checkpoint.weights;
}
DSPARK_API const dspark_tokenizer *dspark_model_tokenizer(const dspark_model *m) { return m->tokenizer; }
DSPARK_API const char *dspark_model_path_name(const dspark_model *m) {
    return m->backend->path_name(m->device);
}
DSPARK_API const char *dspark_model_placement(const dspark_model *m) {
    return m->backend->placement ? m->backend->placement(m->device) : NULL;
}
DSPARK_API int dspark_model_threads(const dspark_model *m) { return m->backend->threads(m->device); }
DSPARK_API size_t dspark_model_bytes(const dspark_model *m, size_t *mapped) {
    if (mapped) *mapped = m->checkpoint.mapped;
    return sizeof *m + m->bytes + m->checkpoint.bytes + (m->device ? m->backend->bytes(m->device) : 0) +
           dspark__tokenizer_bytes(m->tokenizer);
}

// The arrays of batch, and row. Counted first, then placed.
static size_t dspark__model_carve(dspark_model *m, char *memory) {
    dspark__carver v = { memory, 0 };
    dspark__batch *b = &m->batch;
    int gamma = dspark__max(m->checkpoint.config.dspark_block_size, 1);
    size_t n = (size_t)m->max_rows;
    b->ids = (int32_t *)dspark__carve(&v, n, sizeof *b->ids);
    b->previous = (int32_t *)dspark__carve(&v, n, sizeof *b->previous);
    b->drawn = (int32_t *)dspark__carve(&v, n, sizeof *b->drawn);
    b->draws = (dspark_device_draw *)dspark__carve(&v, n, sizeof *b->draws);
    b->segments = (dspark_segment *)dspark__carve(&v, n, sizeof *b->segments);
    b->lanes = (dspark__lane *)dspark__carve(&v, n, sizeof *b->lanes);
    b->confidence = (float *)dspark__carve(&v, n * (size_t)gamma, sizeof *b->confidence);
    b->threshold = (float *)dspark__carve(&v, n, sizeof *b->threshold);
    b->sps = (float *)dspark__carve(&v, n, sizeof *b->sps);
    b->weight = (float *)dspark__carve(&v, n, sizeof *b->weight);
    b->n_past = (int *)dspark__carve(&v, n, sizeof *b->n_past);
    b->calibrations = (const dspark_calibration **)dspark__carve(&v, n, sizeof *b->calibrations);
    b->limit = (int *)dspark__carve(&v, n, sizeof *b->limit);
    b->lengths = (int *)dspark__carve(&v, n, sizeof *b->lengths);
    b->lane_of = (int *)dspark__carve(&v, n, sizeof *b->lane_of);
    b->scratch = dspark__carve(&v, dspark_schedule_scratch_bytes(m->max_rows, gamma), 1);
    m->row = (float *)dspark__carve(&v, (size_t)m->checkpoint.config.vocab_size, sizeof *m->row);
    return v.n;
}

DSPARK_API void dspark_model_close(dspark_model *m) {
    if (!m) return;
    if (m->device) m->backend->close(m->device);
    dspark_tokenizer_close(m->tokenizer);
    dspark__free(m->memory);
    dspark__checkpoint_close(&m->checkpoint);
    dspark__free(m);
}

enum { DSPARK__LONGEST_TOKEN = 1 << 20 };
// A tokenizer.json that cannot be read counts as missing.
static dspark_status dspark__model_open_tokenizer(dspark_model *m, const char *dir) {
    dspark__file f;
    dspark_status status = dspark__file_open(&m->checkpoint.io, dir, "tokenizer.json", &f);
    if (status) return status == DSPARK_ERROR_IO ? DSPARK_OK : status;
    status = dspark__tokenizer_read(&m->tokenizer, f.path, (const char *)f.data, (size_t)f.size);
    dspark__file_close(&m->checkpoint.io, &f);
    if (status) return status;
    if (dspark_tokenizer_size(m->tokenizer) > m->checkpoint.config.vocab_size)
        return dspark__fail(DSPARK_ERROR_FORMAT, "%s/tokenizer.json: %d tokens, but vocab_size is %d", dir,
                            dspark_tokenizer_size(m->tokenizer), m->checkpoint.config.vocab_size);
    for (int i = 0; i < dspark_tokenizer_size(m->tokenizer); i++) {
        int len;
        dspark_token_bytes(m->tokenizer, i, &len);
        if (len > DSPARK__LONGEST_TOKEN)        // a session has room for the text of a block of them
            return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "%s/tokenizer.json: token %d: expected at most %d bytes, "
                                "found %d", dir, i, DSPARK__LONGEST_TOKEN, len);
        m->max_token_bytes = dspark__max(m->max_token_bytes, len);
    }
    return DSPARK_OK;
}

static dspark_status dspark__model_fill(dspark_model *m, const char *dir, const dspark_model_desc *desc) {
    const dspark_config *c = &m->checkpoint.config;
    dspark_model_desc d = *desc;
    dspark_status status = dspark__checkpoint_open(&m->checkpoint, dir, desc);
    if (!status) status = dspark__model_open_tokenizer(m, dir);
    if (status) return status;
    m->backend = desc->backend ? desc->backend : dspark_cpu_backend();
    if (desc->max_sessions < 0 || desc->max_sessions > 1 << 16)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "max_sessions %d: expected 0 to %d", desc->max_sessions, 1 << 16);
    if (desc->n_threads < 0 || desc->n_threads > 1024)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "n_threads %d: expected 0 to 1024", desc->n_threads);
    if (desc->max_rows < 0 || desc->max_rows > 1 << 20)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "max_rows %d: expected 0 to %d", desc->max_rows, 1 << 20);
    d.max_rows = desc->max_rows ? desc->max_rows : 128;
    d.max_rows = dspark__max(d.max_rows, desc->max_sessions * (1 + c->dspark_block_size));
    m->fast_prefill = desc->fast_prefill;
    if (m->fast_prefill) d.max_rows = dspark__max(d.max_rows, DSPARK_PROMPT_BLOCK);
    m->memory_limit = desc->memory_limit;
    status = m->backend->open(&m->device, m, &d);
    if (status) return status;
    m->max_rows = m->backend->max_rows(m->device);
    for (int k = 0; k < DSPARK_MAX_BLOCK; k++) m->calibration.sts[k] = 1;
    for (int i = 0; i < DSPARK__KINDS; i++) {
        dspark__experience *e = &m->kinds[i].experience;
        for (int k = 0; k < DSPARK_MAX_BLOCK; k++) e->survival[k] = 1;
        e->hoped = e->got = 1, e->cycles = DSPARK__PRIOR;
    }
    m->bytes = dspark__model_carve(m, NULL);
    if (!dspark__memory_check(m, "model", 0)) m->memory = (char *)dspark__alloc(m->bytes, 1);
    if (!m->memory) return DSPARK_ERROR_MEMORY;
    dspark__model_carve(m, m->memory);
    return DSPARK_OK;
}

DSPARK_API dspark_status dspark_model_open(dspark_model **out, const char *dir,
                                           const dspark_model_desc *desc) {
    dspark_model_desc defaults;
    dspark_status status;
    dspark_model *m = (dspark_model *)dspark__alloc(1, sizeof *m);
    *out = NULL;
    if (!m) return DSPARK_ERROR_MEMORY;
    memset(&defaults, 0, sizeof defaults);
    status = dspark__model_fill(m, dir, desc ? desc : &defaults);
    if (status) return dspark_model_close(m), status;
    *out = m;
    return DSPARK_OK;
}

DSPARK_API dspark_status dspark_model_set_calibration(dspark_model *m, const float *temperature) {
    for (int k = 0; temperature && k < m->checkpoint.config.dspark_block_size; k++)
        if (!(temperature[k] > 0 && temperature[k] <= FLT_MAX))
            return dspark__fail(DSPARK_ERROR_ARGUMENT,
                                "calibration: temperature[%d] is %g, expected more than 0", k,
                                (double)temperature[k]);
    for (int k = 0; k < m->checkpoint.config.dspark_block_size; k++)
        m->calibration.sts[k] = temperature ? temperature[k] : 1;
    m->has_calibration = 1;
    return DSPARK_OK;
}

DSPARK__SOON_END

// >>forward
// The target, an operation a line; the arithmetic stands in >>cpu under the same names. n rows, h hidden, C
// copies of the hidden state in the residual stream. In brackets: the part of the model.

static dspark_status dspark__forward(dspark_model *m, const dspark_pass *pass, dspark_pass_result *result) {
    const dspark_config *c = &m->checkpoint.config;
    const dspark_backend *b = m->backend;
    void *d = m->device;
    dspark_status status = b->pass_begin(d, pass);      // stream [n][C][h]: C times the embedding
    if (status) return status;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        b->mix_in(d, l, DSPARK_SUB_ATTN);               // x [n][h]: weighted sum of the copies, normed [mHC]
        b->attention(d, l);                             // y [n][h]: over window and compressed rows [attention]
        b->mix_out(d, l, DSPARK_SUB_ATTN);              // stream: y into each copy, the copies mixed [mHC]
        b->mix_in(d, l, DSPARK_SUB_FFN);
        b->moe(d, l);                                   // y [n][h]: routed experts and the shared one [MoE]
        b->mix_out(d, l, DSPARK_SUB_FFN);
        for (int i = 0; i < c->n_taps; i++)
            if (c->dspark_target_layer_ids[i] == l) b->tap(d, i);       // mean of the copies, for the drafter
    }
    b->head(d);                                         // logits [wanted rows][vocab]
    return b->pass_end(d, result);
}

// >>drafter
// Section 3.1 of the paper. The parallel backbone: taps of the newly committed tokens enter each stage's
// window, then all gamma rows [anchor, noise, noise, ...] go through the stages at once. The sequential head:
// left to right, each draft's logits get a bias from the token before it, and the confidence head says how
// far to trust it.

static dspark_status dspark__draft_backbone(dspark_model *m, const dspark_pass *pass,
                                            dspark_pass_result *result) {
    const dspark_config *c = &m->checkpoint.config;
    const dspark_backend *b = m->backend;
    void *d = m->device;
    dspark_status status = b->pass_begin(d, pass);
    if (status) return status;
    b->inject(d);                                       // main_x of positions [inject_from, anchor) -> windows
    for (int l = c->num_hidden_layers; l < c->num_hidden_layers + c->n_stages; l++) {
        b->mix_in(d, l, DSPARK_SUB_ATTN);
        b->attention(d, l);                             // over the window and the whole block, both ways
        b->mix_out(d, l, DSPARK_SUB_ATTN);
        b->mix_in(d, l, DSPARK_SUB_FFN);
        b->moe(d, l);
        b->mix_out(d, l, DSPARK_SUB_FFN);
    }
    b->draft_head(d);                                   // U [n][vocab], the logits without the bias
    return b->pass_end(d, result);
}

DSPARK__SOON    // up to >>kernels: code that mostly calls and computes little
// >>session
// Committed tokens. The first n_run have been run: their rows are in the state, indexed by position. Between calls,
// n_run is n_tokens (the next token's logits are available) or less (the rest is pending).

enum { DSPARK__LONGEST_STOP = 4096 };      // bytes of a stop string

struct dspark_session {
    dspark_model *model;
    void *state;                    // the backend's
    dspark_session_desc desc;       // stop_strings and stop_tokens point into memory
    int32_t *tokens;                // [max_context + block + 2]: drafts follow the committed ones for a while
    int n_tokens, n_run;
    int place;                      // among the sessions of a step
    int high;                       // end of the positions run since the last refill: the rings hold the last ones
    int n_injected;                 // taps of positions before it are in the stages' windows
    int has_logits;
    float *logits;                  // [vocab]
    uint64_t cycle;                 // never goes back
    dspark_account account;
    int account_of;                 // the model's n_profiles when it was opened: another profile has other times
    dspark__experience experience;
    float past[2][DSPARK_MAX_BLOCK];        // confidences one step ago, and two steps ago
    int n_past[2];                          // their number
    dspark_stats stats;
    dspark_utf8 utf8;
    char *text;                     // what the last step gave (text_out bytes), then what is held back
    int text_len, text_out, text_cap;
    int finish;                     // the stop that ended the text, until an append or a truncate; else 0
    char *memory;
    size_t bytes;                   // of the model's session_bytes
};

static const dspark_config *dspark__config(const dspark_session *s) { return &s->model->checkpoint.config; }

DSPARK_API int dspark_session_length(const dspark_session *s) { return s->n_tokens; }
DSPARK_API const int32_t *dspark_session_tokens(const dspark_session *s) { return s->tokens; }
DSPARK_API const dspark_stats *dspark_session_stats(const dspark_session *s) { return &s->stats; }
DSPARK_API const dspark_stats *dspark_model_stats(const dspark_model *m) { return &m->stats; }
DSPARK_API const float *dspark_session_logits(const dspark_session *s) {
    return s->has_logits ? s->logits : NULL;
}

static int dspark__context(const dspark_model *m, const dspark_session_desc *desc) {
    if (desc && desc->max_context) return desc->max_context;
    return dspark__min(4096, m->checkpoint.config.max_position_embeddings);
}

// code: drafts are nearly always right, verify what pays. chat: what the drafter doubts is not worth a row.
// creative: sampled, so rejection, which accepts more there. regulated: a seed's text is fixed, and the schedule looks
// at nothing but what came before.
static const struct { const char *name; dspark_policy policy; } dspark__presets[] = {
    { "code", { 0, DSPARK_SCHEDULE_PLAIN, DSPARK_VERIFY_COUPLED, 0, 0, 0, 0 } },
    { "chat", { 0, DSPARK_SCHEDULE_PLAIN, DSPARK_VERIFY_COUPLED, .5f, 0, 0, 0 } },
    { "creative", { 0, DSPARK_SCHEDULE_PREFIX, DSPARK_VERIFY_REJECTION, 0, 0, 0, 0 } },
    { "regulated", { 0, DSPARK_SCHEDULE_PREFIX, DSPARK_VERIFY_COUPLED, 0, 0, 0, 0 } }
};
DSPARK_API const char *dspark_preset_name(int i) {
    return i >= 0 && i < (int)(sizeof dspark__presets / sizeof *dspark__presets) ? dspark__presets[i].name : NULL;
}
DSPARK_API const dspark_policy *dspark_preset(const char *name) {
    for (int i = 0; dspark_preset_name(i); i++)
        if (!strcmp(dspark_preset_name(i), name)) return &dspark__presets[i].policy;
    return NULL;
}

static dspark_status dspark__policy_check(const dspark_model *m, const dspark_policy *p, float temperature) {
    int gamma = m->checkpoint.config.dspark_block_size;
    if (p->schedule < DSPARK_SCHEDULE_PLAIN || p->schedule > DSPARK_SCHEDULE_GLOBAL)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: schedule %d: expected 0 to %d", p->schedule,
                            DSPARK_SCHEDULE_GLOBAL);
    if (p->schedule == DSPARK_SCHEDULE_GLOBAL && p->verify == DSPARK_VERIFY_REJECTION && temperature > 0)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: schedule GLOBAL looks at drafts: with rejection at "
                            "temperature %g the text would not be the target's", (double)temperature);
    if (!(p->share >= 0 && p->share <= FLT_MAX))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: share %g: expected 0 or more", (double)p->share);
    if (p->verify < DSPARK_VERIFY_COUPLED || p->verify > DSPARK_VERIFY_GREEDY)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: verify %d: expected 0 to %d", p->verify,
                            DSPARK_VERIFY_GREEDY);
    if (!(p->threshold >= 0 && p->threshold <= 1))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: threshold %g: expected 0 to 1",
                            (double)p->threshold);
    if (p->draft_cap < 0 || (p->draft_cap > gamma && gamma))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: draft_cap %d: the checkpoint's block is %d",
                            p->draft_cap, gamma);
    if (p->quota < 0)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: quota %d: expected 0 or more", p->quota);
    return DSPARK_OK;
}

static dspark_status dspark__desc_check(const dspark_model *m, const dspark_session_desc *d) {
    int most = m->checkpoint.config.max_position_embeddings;
    if (d->max_context < 0 || d->max_context > most)
        return dspark__fail(DSPARK_ERROR_ARGUMENT,
                            "max_context %d: expected 1 to max_position_embeddings, %d", d->max_context,
                            most);
    if (!(d->temperature >= 0 && d->temperature <= FLT_MAX) || d->top_k < 0 || !(d->top_p >= 0) ||
        !(d->min_p >= 0 && d->min_p <= 1))
        return dspark__fail(DSPARK_ERROR_ARGUMENT,
                            "temperature %g, top-k %d, top-p %g, min-p %g: expected none negative, min-p at "
                            "most 1",
                            (double)d->temperature, d->top_k, (double)d->top_p, (double)d->min_p);
    if (d->n_stop_strings < 0 || d->n_stop_tokens < 0 || (d->n_stop_strings && !d->stop_strings) ||
        (d->n_stop_tokens && !d->stop_tokens))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "%d stop strings, %d stop tokens", d->n_stop_strings,
                            d->n_stop_tokens);
    if (d->n_stop_strings && !m->tokenizer)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "stop strings: the model has no tokenizer.json");
    for (int i = 0; i < d->n_stop_strings; i++)
        if (!d->stop_strings[i] || !*d->stop_strings[i] || strlen(d->stop_strings[i]) > DSPARK__LONGEST_STOP)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "stop string %d: expected 1 to %d bytes", i,
                                DSPARK__LONGEST_STOP);
        else if ((*d->stop_strings[i] & 0xC0) == 0x80)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "stop string %d begins within a character, byte 0x%02X", i,
                                (unsigned)*d->stop_strings[i] & 0xFFu);
    return dspark__policy_check(m, &d->policy, d->temperature);
}

// The session's own memory: struct, tokens, logits, text, stops. Counted first, then placed.
static size_t dspark__session_layout(dspark_session *s, const dspark_model *m, const dspark_session_desc *d,
                                     char *memory) {
    const dspark_config *c = &m->checkpoint.config;
    dspark__carver v = { memory, 0 };
    size_t strings = 0, step = (size_t)(c->dspark_block_size + 2);
    const char **stops;
    char *bytes;
    int32_t *stop_tokens;
    for (int i = 0; i < d->n_stop_strings; i++) strings += strlen(d->stop_strings[i]) + 1;
    s->text_cap = (int)(step * (size_t)(3 * m->max_token_bytes + 9) + DSPARK__LONGEST_STOP + 16);
    s->tokens = (int32_t *)dspark__carve(&v, (size_t)(dspark__context(m, d) + c->dspark_block_size + 2),
                                         sizeof *s->tokens);
    s->logits = (float *)dspark__carve(&v, (size_t)c->vocab_size, sizeof *s->logits);
    s->text = (char *)dspark__carve(&v, (size_t)s->text_cap, 1);
    stops = (const char **)dspark__carve(&v, (size_t)d->n_stop_strings, sizeof *stops);
    bytes = (char *)dspark__carve(&v, strings, 1);
    stop_tokens = (int32_t *)dspark__carve(&v, (size_t)d->n_stop_tokens, sizeof *stop_tokens);
    for (int i = 0; memory && i < d->n_stop_strings; i++) {
        size_t n = strlen(d->stop_strings[i]) + 1;
        stops[i] = (const char *)memcpy(bytes, d->stop_strings[i], n);
        bytes += n;
    }
    if (memory && d->n_stop_tokens)
        memcpy(stop_tokens, d->stop_tokens, (size_t)d->n_stop_tokens * sizeof *stop_tokens);
    if (memory) s->desc.stop_strings = stops, s->desc.stop_tokens = stop_tokens;
    return v.n;
}

// desc, or if it is NULL, *none with all defaults: greedy, only the checkpoint's stops, the schedule that is
// fastest by the cost model.
static const dspark_session_desc *dspark__session_defaults(const dspark_session_desc *desc,
                                                           dspark_session_desc *none) {
    memset(none, 0, sizeof *none);
    return desc ? desc : none;
}

DSPARK_API size_t dspark_session_bytes(const dspark_model *m, const dspark_session_desc *desc) {
    dspark_session s;
    dspark_session_desc none;
    desc = dspark__session_defaults(desc, &none);
    if (dspark__desc_check(m, desc)) return 0;
    return sizeof s + dspark__session_layout(&s, m, desc, NULL) +
           m->backend->state_bytes(m->device, dspark__context(m, desc));
}

DSPARK_API void dspark_session_close(dspark_session *s) {
    if (!s) return;
    if (s->state) s->model->backend->state_close(s->state);
    s->model->session_bytes -= s->bytes;
    dspark__free(s->memory);
    dspark__free(s);
}

DSPARK_API dspark_status dspark_session_open(dspark_session **out, dspark_model *m,
                                             const dspark_session_desc *desc) {
    dspark_session_desc none;
    dspark_session *s;
    dspark_status status;
    size_t bytes, before = m->backend->bytes(m->device);
    *out = NULL;
    desc = dspark__session_defaults(desc, &none);
    if ((status = dspark__desc_check(m, desc)) != DSPARK_OK) return status;
    bytes = dspark_session_bytes(m, desc);
    if ((status = dspark__memory_check(m, "session", bytes)) != DSPARK_OK) return status;
    s = (dspark_session *)dspark__alloc(1, sizeof *s);
    if (!s) return DSPARK_ERROR_MEMORY;
    s->model = m, s->desc = *desc, s->desc.max_context = dspark__context(m, desc);
    s->memory = (char *)dspark__alloc(dspark__session_layout(s, m, desc, NULL), 1);
    status =
        s->memory ? m->backend->state_open(&s->state, m->device, s->desc.max_context) : DSPARK_ERROR_MEMORY;
    if (status) return dspark_session_close(s), status;
    dspark__session_layout(s, m, desc, s->memory);
    s->bytes = bytes - (m->backend->bytes(m->device) - before);     // the device's workspace may have grown
    m->session_bytes += s->bytes;
    *out = s;
    return DSPARK_OK;
}

DSPARK_API dspark_status dspark_session_set_policy(dspark_session *s, const dspark_policy *p) {
    dspark_status status;
    if (!p) return dspark__fail(DSPARK_ERROR_ARGUMENT, "policy: NULL, expected one");
    if ((status = dspark__policy_check(s->model, p, s->desc.temperature)) == DSPARK_OK) s->desc.policy = *p;
    return status;
}

// ---- running tokens

static dspark_segment dspark__segment(const dspark_session *s, int row, int n_rows, int position) {
    dspark_segment g;
    memset(&g, 0, sizeof g);
    g.state = s->state, g.row = row, g.n_rows = n_rows, g.position = position, g.logits_from = n_rows;
    return g;
}

// A target pass of this session alone over ids [n] at `position`.
static dspark_status dspark__run_alone(dspark_session *s, const int32_t *ids, int n, int position,
                                       int keep_rows, int logits_from, dspark_pass_result *result) {
    dspark_segment g = dspark__segment(s, 0, n, position);
    dspark_pass pass;
    memset(&pass, 0, sizeof pass);
    g.keep_rows = keep_rows, g.logits_from = logits_from;
    pass.kind = DSPARK_PASS_TARGET, pass.n_rows = n, pass.n_segments = 1, pass.ids = ids, pass.segments = &g;
    pass.whole = s->model->fast_prefill && !keep_rows && n % DSPARK_PROMPT_BLOCK + position % DSPARK_PROMPT_BLOCK == 0;
    return dspark__forward(s->model, &pass, result);
}

// Positions before `end` have been run: the rings hold the last ones below s->high.
static void dspark__mark_run(dspark_session *s, int end) { s->high = dspark__max(s->high, end); }

// After a long truncation the rings no longer hold the rows before n_run: the last tokens are run again, as
// many as those rows depend on (a window for each layer). Their compressed rows are kept; only the rings are
// written.
static dspark_status dspark__refill(dspark_session *s) {
    const dspark_config *c = dspark__config(s);
    int need = dspark__ring(c), start, n_run = s->n_run;
    dspark_pass_result result;
    if (s->high - n_run <= c->dspark_block_size + 1) return DSPARK_OK;
    for (int l = 0; l < c->num_hidden_layers; l++)
        need = dspark__max(need, dspark__raw_ring(c, c->compress_ratios[l]));
    start = (int64_t)n_run - need - (int64_t)c->num_hidden_layers * (c->sliding_window - 1) > 0
                ? n_run - need - c->num_hidden_layers * (c->sliding_window - 1) : 0;
    for (int p = start; p < n_run; p += s->model->max_rows) {
        int n = dspark__min(s->model->max_rows, n_run - p);
        dspark_status status = dspark__run_alone(s, s->tokens + p, n, p, 1, n, &result);
        if (status) return status;
    }
    s->high = n_run;
    s->n_injected = 0;
    return DSPARK_OK;
}

// How many of n pending tokens a pass runs: with fast_prefill, whole blocks, or tokens of one block only.
static int dspark__cut(const dspark_model *m, int position, int n) {
    int into = position % DSPARK_PROMPT_BLOCK;
    n = dspark__min(m->max_rows, n);
    if (!m->fast_prefill) return n;
    return into || n < DSPARK_PROMPT_BLOCK ? dspark__min(n, DSPARK_PROMPT_BLOCK - into) : n - n % DSPARK_PROMPT_BLOCK;
}

// Runs what is pending up to n_tokens, a pass of at most max_rows at a time; the last row's logits are kept.
static dspark_status dspark__run_pending(dspark_session *s) {
    int first = s->n_run, V = dspark__config(s)->vocab_size;
    dspark_status status = dspark__refill(s);
    while (!status && s->n_run < s->n_tokens) {
        int n = dspark__cut(s->model, s->n_run, s->n_tokens - s->n_run), last = s->n_run + n == s->n_tokens;
        dspark_pass_result result;
        if (s->desc.progress && !s->desc.progress(s->desc.user, s->n_run - first, s->n_tokens - first))
            return dspark__fail(DSPARK_ERROR_CANCELLED, "append: cancelled after %d of %d tokens",
                                s->n_run - first, s->n_tokens - first);
        status = dspark__run_alone(s, s->tokens + s->n_run, n, s->n_run, 0, last ? n - 1 : n, &result);
        dspark__mark_run(s, s->n_run + n);
        if (status) return status;
        s->n_run += n;
        if (last) memcpy(s->logits, result.logits, (size_t)V * sizeof *s->logits), s->has_logits = 1;
    }
    return status;
}

// Rows for the drafter at the session's end, and the taps that its windows lack.
static dspark_segment dspark__draft_segment(dspark_session *s, int row, int n_rows) {
    dspark_segment g = dspark__segment(s, row, n_rows, s->n_run);
    g.logits_from = 0, g.inject_from = dspark__max(s->n_injected, s->high - dspark__ring(dspark__config(s)));
    s->n_injected = s->n_run;
    return g;
}

// The drafter's part of a prompt: its taps enter the windows now, not in the first cycle's time.
static dspark_status dspark__inject_prompt(dspark_session *s) {
    const dspark_model *m = s->model;
    dspark_segment g;
    dspark_pass pass;
    dspark_pass_result result;
    dspark_status status;
    if (!dspark__config(s)->n_stages || s->desc.policy.plain || s->n_run < 1) return DSPARK_OK;
    g = dspark__draft_segment(s, 0, 1);
    memset(&pass, 0, sizeof pass);
    pass.kind = DSPARK_PASS_DRAFT, pass.n_rows = 1, pass.n_segments = 1, pass.ids = s->tokens, pass.segments = &g;
    if ((status = m->backend->pass_begin(m->device, &pass)) != DSPARK_OK) return status;
    m->backend->inject(m->device);
    return m->backend->pass_end(m->device, &result);
}

// What comes is a new text: nothing is held back, no stop has been met.
static void dspark__text_reset(dspark_session *s) {
    s->text_len = s->text_out = 0, s->finish = DSPARK_RUNNING;
    memset(&s->utf8, 0, sizeof s->utf8);
}

static dspark_status dspark__add_tokens(dspark_session *s, const int32_t *ids, int n) {
    int V = dspark__config(s)->vocab_size;
    if (n < 0 || (n && !ids))
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "%d tokens, ids %s: expected 0 or more, not NULL", n,
                            ids ? "given" : "NULL");
    if (n > s->desc.max_context - s->n_tokens)
        return dspark__fail(DSPARK_ERROR_CONTEXT_FULL, "%d tokens and %d more: the context holds %d",
                            s->n_tokens, n, s->desc.max_context);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= V)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "token %d is %d: expected 0 to %d", i,
                                (int)ids[i], V - 1);
    if (!n) return DSPARK_OK;
    memcpy(s->tokens + s->n_tokens, ids, (size_t)n * sizeof *ids);
    s->n_tokens += n, s->has_logits = 0;
    return DSPARK_OK;
}

DSPARK_API dspark_status dspark_session_submit(dspark_session *s, const int32_t *ids, int n) {
    dspark_status status = dspark__add_tokens(s, ids, n);
    if (!status && n) dspark__text_reset(s);
    return status;
}

DSPARK_API dspark_status dspark_session_append(dspark_session *s, const int32_t *ids, int n) {
    int n_tokens = s->n_tokens, n_run = s->n_run, n_injected = s->n_injected, has_logits = s->has_logits;
    dspark_status status = dspark__add_tokens(s, ids, n);
    if (!status) status = dspark__run_pending(s);
    if (!status) status = dspark__inject_prompt(s);
    if (!status && n) dspark__text_reset(s);
    if (!status) return DSPARK_OK;
    s->n_tokens = n_tokens, s->n_run = n_run, s->has_logits = has_logits;
    s->n_injected = dspark__min(s->n_injected, n_injected);
    return status;
}

DSPARK_API dspark_status dspark_session_truncate(dspark_session *s, int n_tokens) {
    if (n_tokens < 0 || n_tokens > s->n_tokens)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "truncate: %d tokens: expected 0 to %d", n_tokens,
                            s->n_tokens);
    if (n_tokens == s->n_tokens) return DSPARK_OK;
    s->n_tokens = n_tokens, s->has_logits = 0;
    s->n_run = dspark__min(s->n_run, dspark__max(0, n_tokens - 1));
    s->n_injected = dspark__min(s->n_injected, s->n_run);
    dspark__text_reset(s);
    return DSPARK_OK;
}

// ---- copies and files

// The scalars of a session and of its desc; a session file begins with these bytes.
static const char dspark__session_magic[8] = "dspark3";
typedef struct {
    char magic[8];
    uint64_t fingerprint, seed, cycle;
    int32_t max_context, n_tokens, n_run, high, n_injected, has_logits, top_k;
    int32_t ignore_eos, logprobs, finish, n_text;       // n_text: bytes of text held back
    float temperature, top_p, min_p;
    dspark_utf8 utf8;
    dspark_policy policy;
    dspark_stats stats;
} dspark__session_record;

static void dspark__session_take(dspark_session *s, const dspark__session_record *r) {
    s->cycle = r->cycle, s->n_tokens = r->n_tokens, s->n_run = r->n_run, s->high = r->high;
    s->n_injected = r->n_injected, s->has_logits = r->has_logits;
    s->stats = r->stats, s->utf8 = r->utf8, s->text_len = r->n_text, s->text_out = 0, s->finish = r->finish;
}

static void dspark__session_record_of(const dspark_session *s, dspark__session_record *r) {
    memset(r, 0, sizeof *r);
    memcpy(r->magic, dspark__session_magic, sizeof r->magic);
    r->seed = s->desc.seed, r->cycle = s->cycle, r->max_context = s->desc.max_context;
    r->n_tokens = s->n_tokens, r->n_run = s->n_run, r->high = s->high, r->n_injected = s->n_injected;
    r->has_logits = s->has_logits, r->top_k = s->desc.top_k;
    r->temperature = s->desc.temperature, r->top_p = s->desc.top_p, r->min_p = s->desc.min_p;
    r->policy = s->desc.policy, r->stats = s->stats;
    r->ignore_eos = s->desc.ignore_eos, r->logprobs = s->desc.logprobs, r->finish = s->finish;
    r->utf8 = s->utf8, r->n_text = s->text_len - s->text_out;
}

DSPARK_API dspark_status dspark_session_fork(dspark_session **out, const dspark_session *s,
                                             const dspark_session_desc *desc) {
    const dspark_backend *b = s->model->backend;
    int most = dspark__context(s->model, desc ? desc : &s->desc), V = dspark__config(s)->vocab_size;
    dspark__session_record r;
    dspark_status status;
    *out = NULL;
    if (s->n_tokens > most)
        return dspark__fail(DSPARK_ERROR_CONTEXT_FULL, "fork: %d tokens, a context of %d", s->n_tokens, most);
    status = dspark_session_open(out, s->model, desc ? desc : &s->desc);
    if (status) return status;
    status = b->state_copy((*out)->state, s->state, s->n_tokens);
    if (status) return dspark_session_close(*out), *out = NULL, status;
    dspark__session_record_of(s, &r);
    dspark__session_take(*out, &r);
    if (desc) (*out)->finish = DSPARK_RUNNING;
    memcpy((*out)->text, s->text + s->text_out, (size_t)r.n_text);
    memcpy((*out)->tokens, s->tokens, (size_t)s->n_tokens * sizeof *s->tokens);
    memcpy((*out)->logits, s->logits, (size_t)V * sizeof *s->logits);
    return DSPARK_OK;
}

#ifndef DSPARK_NO_STDIO
// Equal for equal checkpoints, almost surely different for others. Covers config.json, the vectors, the headers and the
// tensors' bytes: up to 64 MiB all of them, beyond that about 256 pages spread over them.
static uint64_t dspark__checkpoint_fingerprint(const dspark__checkpoint *ck) {
    const uint64_t page = 4096, pages = ck->mapped <= 64 << 20 ? 1 : (uint64_t)ck->mapped / page / 256 + 1;
    uint64_t h = ck->hash;
    for (int i = 0; i < ck->n_files; i++) {
        const dspark__file *f = &ck->files[i];
        const char *data = (const char *)f->data;
        h = dspark__fold(h ^ f->size, data, (size_t)f->begin);
        for (uint64_t at = f->begin; at < f->size; at = (at / page + pages) * page) {
            uint64_t n = page - at % page < f->size - at ? page - at % page : f->size - at;
            h = dspark__fold(h, data + at, (size_t)n);
        }
    }
    return h;
}

typedef struct { FILE *f; const char *path; } dspark__stream;
static dspark_status dspark__piece_write(void *user, void *data, size_t bytes) {
    const dspark__stream *to = (const dspark__stream *)user;
    if (fwrite(data, 1, bytes, to->f) == bytes) return DSPARK_OK;
    return dspark__fail(DSPARK_ERROR_IO, "%s: %zu bytes cannot be written: %s", to->path, bytes, strerror(errno));
}
static dspark_status dspark__piece_read(void *user, void *data, size_t bytes) {
    const dspark__stream *from = (const dspark__stream *)user;
    if (fread(data, 1, bytes, from->f) == bytes) return DSPARK_OK;
    if (ferror(from->f)) return dspark__fail(DSPARK_ERROR_IO, "%s: %s", from->path, strerror(errno));
    return dspark__fail(DSPARK_ERROR_FORMAT, "%s: expected a session's %zu bytes more, found the end", from->path,
                        bytes);
}

// The parts of a session file after its record: tokens, logits, text held back, state.
static dspark_status dspark__session_parts(const dspark_session *s, int restore, dspark_piece piece, void *user) {
    size_t V = (size_t)dspark__config(s)->vocab_size;
    dspark_status status = piece(user, s->tokens, (size_t)s->n_tokens * sizeof *s->tokens);
    if (!status) status = piece(user, s->logits, V * sizeof *s->logits);
    if (!status) status = piece(user, s->text + s->text_out, (size_t)(s->text_len - s->text_out));
    return status ? status : s->model->backend->state_pieces(s->state, s->n_tokens, restore, piece, user);
}

DSPARK_API dspark_status dspark_session_save(const dspark_session *s, const char *path) {
    dspark__session_record r;
    dspark__stream to = { NULL, path };
    dspark_status status;
    dspark__session_record_of(s, &r);
    r.fingerprint = dspark__checkpoint_fingerprint(&s->model->checkpoint);
    if (!(to.f = fopen(path, "wb"))) return dspark__fail(DSPARK_ERROR_IO, "%s: %s", path, strerror(errno));
    status = dspark__piece_write(&to, &r, sizeof r);
    if (!status) status = dspark__session_parts(s, 0, dspark__piece_write, &to);
    if (fclose(to.f) && !status)
        status = dspark__fail(DSPARK_ERROR_IO, "%s: cannot be written: %s", path, strerror(errno));
    return status;
}

// Could these bytes be the beginning of a character?
static int dspark__utf8_waits(const dspark_utf8 *u) {
    dspark_utf8 again;
    char out[32];
    memset(&again, 0, sizeof again);
    return u->n >= 0 && u->n < 4 && !dspark_utf8_push(&again, (const char *)u->held, u->n, 0, out) &&
           again.n == u->n;
}

static int dspark__stats_are_counts(const dspark_stats *t) {
    int64_t count[offsetof(dspark_stats, draft_us) / sizeof(int64_t)], wrong = 0;
    memcpy(count, t, sizeof count);
    for (size_t i = 0; i < sizeof count / sizeof *count; i++) wrong |= count[i] >> 53;
    for (int i = 0; i < DSPARK_BUCKETS; i++) wrong |= t->token_us[i] >> 53;
    return !wrong;
}

static dspark_status dspark__record_check(const dspark_model *m, const char *path,
                                          const dspark__session_record *r) {
    const dspark_config *c = &m->checkpoint.config;
    uint64_t fingerprint = dspark__checkpoint_fingerprint(&m->checkpoint);
    if (memcmp(r->magic, dspark__session_magic, sizeof r->magic))
        return dspark__fail(DSPARK_ERROR_FORMAT, "%s: not a session file of this version", path);
    if (r->fingerprint != fingerprint)
        return dspark__fail(DSPARK_ERROR_FORMAT,
                            "%s: saved with another checkpoint (%016llx, this one is %016llx)", path,
                            (unsigned long long)r->fingerprint, (unsigned long long)fingerprint);
    if (r->max_context < 1 || r->max_context > c->max_position_embeddings || r->n_tokens < 0 ||
        r->n_tokens > r->max_context || r->n_run < 0 || r->n_run > r->n_tokens || r->high < r->n_run ||
        r->n_injected < 0 || r->n_injected > r->n_run ||
        r->has_logits != (r->n_tokens && r->n_run == r->n_tokens))
        return dspark__fail(DSPARK_ERROR_FORMAT, "%s: lengths %d, %d, %d, %d of %d contradict each other",
                            path, r->n_tokens, r->n_run, r->high, r->n_injected, r->max_context);
    if (r->n_text < 0 || r->n_text > DSPARK__LONGEST_STOP || !dspark__utf8_waits(&r->utf8) || r->finish < 0 ||
        r->finish > DSPARK_STOP_STRING || !dspark__stats_are_counts(&r->stats))
        return dspark__fail(DSPARK_ERROR_FORMAT,
                            "%s: %d bytes of text, finish %d, %lld tokens emitted, or another count", path,
                            r->n_text, r->finish, (long long)r->stats.emitted);
    return DSPARK_OK;
}

static dspark_status dspark__session_read(dspark_session **out, dspark_model *m, dspark__stream *from,
                                          const dspark_session_desc *desc) {
    dspark__session_record r;
    dspark_session_desc own;
    const char *path = from->path;
    dspark_status status = dspark__piece_read(from, &r, sizeof r);
    if (status) return status;
    if ((status = dspark__record_check(m, path, &r)) != DSPARK_OK) return status;
    memset(&own, 0, sizeof own);
    own.max_context = r.max_context, own.seed = r.seed, own.temperature = r.temperature, own.top_k = r.top_k;
    own.top_p = r.top_p, own.min_p = r.min_p, own.policy = r.policy, own.ignore_eos = r.ignore_eos,
    own.logprobs = r.logprobs;
    if (desc && dspark__context(m, desc) < r.n_tokens)
        return dspark__fail(DSPARK_ERROR_CONTEXT_FULL, "%s: %d tokens, a context of %d", path, r.n_tokens,
                            dspark__context(m, desc));
    if ((status = dspark_session_open(out, m, desc ? desc : &own)) != DSPARK_OK) return status;
    dspark__session_take(*out, &r);
    if (desc) (*out)->finish = DSPARK_RUNNING;
    status = dspark__session_parts(*out, 1, dspark__piece_read, from);
    for (int i = 0; !status && i < r.n_tokens; i++)
        if ((*out)->tokens[i] < 0 || (*out)->tokens[i] >= m->checkpoint.config.vocab_size)
            status = dspark__fail(DSPARK_ERROR_FORMAT, "%s: token %d is %d", path, i, (int)(*out)->tokens[i]);
    if (!status && fgetc(from->f) != EOF)
        status = dspark__fail(DSPARK_ERROR_FORMAT, "%s: longer than its session", path);
    return status;
}

DSPARK_API dspark_status dspark_session_restore(dspark_session **out, dspark_model *m, const char *path,
                                                const dspark_session_desc *desc) {
    dspark__stream from = { fopen(path, "rb"), path };
    dspark_status status;
    *out = NULL;
    if (!from.f) return dspark__fail(DSPARK_ERROR_IO, "%s: %s", path, strerror(errno));
    status = dspark__session_read(out, m, &from, desc);
    fclose(from.f);
    if (status) dspark_session_close(*out), *out = NULL;
    return status;
}
#endif

// >>engine
// One decoding cycle of a batch: anchors drawn, drafts, schedule, one flat pass of the target, verification,
// commit. Every number a session draws is a function of its seed and a position or a cycle, never of its
// batch.

// ---- one token at a time

static int dspark__greedy(const dspark_session *s) {
    return s->desc.temperature == 0 || s->desc.policy.verify == DSPARK_VERIFY_GREEDY;
}
static int dspark__mode(const dspark_session *s) {
    return dspark__greedy(s) ? DSPARK_VERIFY_GREEDY : s->desc.policy.verify;
}

// The calibration that turns a session's confidence logits into c_k.
static const dspark_calibration *dspark__calibration_of(const dspark_session *s) {
    const dspark_model *m = s->model;
    const dspark__checkpoint *ck = &m->checkpoint;
    const dspark_calibration *best = &m->calibration;
    float t = dspark__greedy(s) ? 0 : s->desc.temperature, nearest = HUGE_VALF;
    for (int i = 0; i < ck->n_calibrations && !m->has_calibration; i++) {
        const dspark_calibration *row = &ck->calibrations[i];
        float away = fmaxf(0, fmaxf(row->band[0] - t, t - row->band[1]));
        if (row->verify == dspark__mode(s) && away < nearest) nearest = away, best = row;
    }
    return best;
}

// n logits to c_k = a_k / a_{k-1}. With a curve, a_k is its value at the product, at most a_{k-1}: it corrects for
// dependent drafts, and c_k still depends only on logits up to k.
static void dspark__calibrate(const dspark_calibration *row, float *c, int n) {
    double product = 1, a = 1;
    for (int k = 0; k < n; k++) {
        const float *x = row->said[k], *y = row->stood[k];
        double sts = dspark_sts_apply(c[k], row->sts[k]), before = a, t;
        int i = 1;
        if (sts != sts) {           // NaN: neither this draft nor those after it are trusted
            for (; k < n; k++) c[k] = 0;
            return;
        }
        product *= sts, c[k] = (float)sts;
        if (!row->curved) continue;
        while (i < DSPARK_CURVE_POINTS - 1 && product > (double)x[i]) i++;
        t = x[i] > x[i - 1] ? (product - (double)x[i - 1]) / ((double)x[i] - (double)x[i - 1]) : 1;
        a = fmin(a, (double)y[i - 1] + fmax(0, fmin(t, 1)) * ((double)y[i] - (double)y[i - 1]));
        c[k] = (float)(a / before);
    }
}

// Are all tokens of a session drawn on the device? That depends on the session alone, never on its batch.
static int dspark__drawn_there(const dspark_session *s) {
    return s->model->backend->draft_steps && !s->desc.adjust && !s->desc.logprobs;
}
// The draw of the token at position n_tokens + k.
static dspark_device_draw dspark__draw_there(const dspark_session *s, int k) {
    const dspark_session_desc *d = &s->desc;
    int rejection = dspark__mode(s) == DSPARK_VERIFY_REJECTION;
    dspark_device_draw draw;
    draw.temperature = dspark__greedy(s) ? 0 : d->temperature, draw.top_p = d->top_p, draw.min_p = d->min_p;
    draw.top_k = d->top_k, draw.purpose = rejection ? DSPARK_DRAW_NEXT : DSPARK_DRAW_PLAIN, draw.k = rejection ? k : 0;
    draw.draft_row = -1, draw.seed = d->seed, draw.at = rejection ? s->cycle : (uint64_t)(s->n_tokens + k);
    return draw;
}

// Turns the logits after n of the session's tokens into p, in place, once adjusted. *log_sum, unless NULL: the
// log-sum-exp of the adjusted logits, which go to the model's row.
static dspark_status dspark__to_p(const dspark_session *s, float *logits, int n, double *log_sum) {
    const dspark_session_desc *d = &s->desc;
    int V = dspark__config(s)->vocab_size;
    if (d->adjust) d->adjust(d->adjust_user, s->tokens, n, logits, V);
    if (log_sum) {
        double max = -HUGE_VAL, sum = 0;
        for (int v = 0; v < V; v++) max = (double)logits[v] > max ? (double)logits[v] : max;
        for (int v = 0; v < V; v++) sum += dspark__exp((double)logits[v] - max);
        *log_sum = max + dspark__log(sum);
        memcpy(s->model->row, logits, (size_t)V * sizeof *logits);
    }
    return dspark_distribution(logits, V, dspark__greedy(s) ? 0 : d->temperature, d->top_k, d->top_p,
                               d->min_p, logits);
}

// Appends a token's text; returns 1 if a stop string is complete: the text then ends before it.
static int dspark__text_add(dspark_session *s, int32_t token, int last) {
    const dspark_tokenizer *t = s->model->tokenizer;
    const char *bytes = "";
    int len = 0, from = s->text_len, best = -1;
    if (t && !last && !dspark_token_is_special(t, token)) bytes = dspark_token_bytes(t, token, &len);
    s->text_len += dspark_utf8_push(&s->utf8, bytes, len, last, s->text + s->text_len);
    for (int i = 0; i < s->desc.n_stop_strings; i++) {
        int n = (int)strlen(s->desc.stop_strings[i]);
        for (int at = dspark__max(0, from - n + 1); at + n <= s->text_len && (best < 0 || at < best); at++)
            if (!memcmp(s->text + at, s->desc.stop_strings[i], (size_t)n)) best = at;
    }
    if (best >= 0) s->text_len = best;
    return best >= 0;
}

// How much of the text's end may be the beginning of a stop string.
static int dspark__text_held(const dspark_session *s) {
    int held = 0;
    for (int i = 0; i < s->desc.n_stop_strings; i++) {
        int n = dspark__min((int)strlen(s->desc.stop_strings[i]) - 1, s->text_len);
        while (n > held && memcmp(s->text + s->text_len - n, s->desc.stop_strings[i], (size_t)n)) n--;
        held = dspark__max(held, n);
    }
    return held;
}

static int dspark__is_stop_token(const dspark_session *s, int32_t token) {
    const dspark_config *c = dspark__config(s);
    for (int i = 0; i < c->n_eos && !s->desc.ignore_eos; i++)
        if (c->eos_token_id[i] == token) return 1;
    for (int i = 0; i < s->desc.n_stop_tokens; i++)
        if (s->desc.stop_tokens[i] == token) return 1;
    return 0;
}

// Why the session can make no more; DSPARK_RUNNING if it can.
static int dspark__exhausted(const dspark_session *s) {
    if (s->desc.policy.quota && s->stats.emitted >= s->desc.policy.quota) return DSPARK_LENGTH;
    return s->n_tokens >= s->desc.max_context ? DSPARK_CONTEXT : DSPARK_RUNNING;
}

// Commits and emits a token; returns 1 if it finishes the session.
static int dspark__emit(dspark_session *s, dspark_step_result *r, int32_t token, int by, double logprob) {
    int stop = dspark__is_stop_token(s, token);
    s->tokens[s->n_tokens++] = token;
    s->stats.emitted++, s->model->stats.emitted++;
    r->tokens[r->n_tokens] = token, r->by[r->n_tokens] = (unsigned char)by,
    r->logprob[r->n_tokens++] = (float)logprob;
    r->finish = stop                            ? DSPARK_STOP_TOKEN
                : dspark__text_add(s, token, 0) ? DSPARK_STOP_STRING
                                                : dspark__exhausted(s);
    return r->finish != DSPARK_RUNNING;
}

// Drops the text that the last step returned; what was held back stays.
static void dspark__text_begin(dspark_session *s) {
    memmove(s->text, s->text + s->text_out, (size_t)(s->text_len - s->text_out));
    s->text_len -= s->text_out, s->text_out = 0;
}
static void dspark__text_end(dspark_session *s, dspark_step_result *r) {
    if (r->finish && r->finish != DSPARK_STOP_STRING && dspark__text_add(s, 0, 1))
        r->finish = DSPARK_STOP_STRING;
    if (r->finish == DSPARK_STOP_TOKEN || r->finish == DSPARK_STOP_STRING) s->finish = r->finish;
    s->text_out = r->finish ? s->text_len : s->text_len - dspark__text_held(s);
    r->text = s->text, r->text_len = s->text_out;
    if (r->finish) memset(&s->utf8, 0, sizeof s->utf8);
}

// ---- the cost of passes

enum { DSPARK__FRESH_TAPS = 2 };        // taps that a draft usually injects: draft_us includes them
enum { DSPARK__DEPTH = 256, DSPARK__DEEPER = 2048, DSPARK__COMPANY = 8 };      // measured: depth, more depth, sessions
enum { DSPARK__SEEN_SOME = 4 };         // sightings that a cost counts as which was measured, or lies between others

DSPARK_API double dspark_profile_us(const dspark_profile *p, int64_t rows) {
    double slope;
    int i = 0, half = p->n - 1;
    if (p->n < 1) return 0;
    if (rows <= p->rows[0]) return (double)p->us[0] * (double)rows / p->rows[0];
    for (int end = p->n; end - i > 1;) {
        int middle = (i + end) / 2;
        if (p->rows[middle] <= rows) i = middle;
        else end = middle;
    }
    if (i + 1 < p->n) slope = ((double)p->us[i + 1] - (double)p->us[i]) / (p->rows[i + 1] - p->rows[i]);
    else {
        slope = (double)p->us[i] / p->rows[i];
        while (half >= 0 && p->rows[half] > p->rows[i] / 2) half--;
        if (half >= 0)
            slope = fmax(slope / 2, fmin(slope, ((double)p->us[i] - (double)p->us[half]) /
                                                    (p->rows[i] - p->rows[half])));
    }
    return (double)p->us[i] + slope * (double)(rows - p->rows[i]);
}

// The costs of a profile that are one number.
static const struct { const char *name; size_t at; } dspark__profile_costs[] = {
    { "session_us", offsetof(dspark_profile, session_us) }, { "context_us", offsetof(dspark_profile, context_us) },
    { "draft_us", offsetof(dspark_profile, draft_us) }, { "draft_more_us", offsetof(dspark_profile, draft_more_us) },
    { "inject_us", offsetof(dspark_profile, inject_us) }, { "sample_us", offsetof(dspark_profile, sample_us) }
};
enum { DSPARK__PROFILE_COSTS = sizeof dspark__profile_costs / sizeof *dspark__profile_costs };
static float *dspark__profile_cost(const dspark_profile *p, int i) {
    return (float *)(uintptr_t)((const char *)p + dspark__profile_costs[i].at);
}

// A machine's speed changes from second to second, for all passes alike: a quarter of a pass's deviation from its
// expected time scales all costs, so that those compared are of one speed.
static void dspark__learn_speed(dspark_profile *p, double ratio) {
    float scale = (float)(1 + (fmax(.75, fmin(ratio, 1.25)) - 1) / 4);
    for (int i = 0; i < p->n; i++) p->us[i] *= scale;
    for (int i = 0; i < DSPARK__PROFILE_COSTS; i++) *dspark__profile_cost(p, i) *= scale;
}

// A cost seen *seen times before, seen again: the smaller of the first two, since the first may wait for the disk; then
// a mean that limits outliers. Known costs move slowly: else those seen often would soon be of another speed than the
// rest.
static float dspark__learned(float was, double us, unsigned char *seen) {
    double error = us - (double)was, bound = (double)was / 4;
    if (*seen < 8) ++*seen;
    if (*seen <= 2) return (float)(*seen == 1 ? us : fmin(us, (double)was));
    return (float)((double)was + fmax(-bound, fmin(error, bound)) / (*seen < 8 ? *seen : 16));
}

// A pass of `rows` rows took `us`: its point moves, or a new one is added if none is near. More rows cost no less:
// where points disagree, the newer counts.
static void dspark__learn_pass(dspark_profile *p, int rows, double us) {
    int i = 0;
    while (i < p->n && p->rows[i] < rows) i++;
    if (i < p->n && p->seen[i] == 8) dspark__learn_speed(p, us / dspark_profile_us(p, rows));
    if (i == p->n || p->rows[i] != rows) {
        int last = i == p->n;
        int nearby = (i && 8 * (rows - p->rows[i - 1]) < rows) || (!last && 8 * (p->rows[i] - rows) < rows);
        double expected = p->n ? dspark_profile_us(p, rows) : us;
        if (nearby || p->n == DSPARK_MAX_PROFILE) {     // the nearest takes the error
            if (last || (i && rows - p->rows[i - 1] < p->rows[i] - rows)) i--;
            us = (double)p->us[i] * us / expected;
        } else {
            size_t after = (size_t)(p->n - i);
            memmove(p->rows + i + 1, p->rows + i, after * sizeof *p->rows);
            memmove(p->us + i + 1, p->us + i, after * sizeof *p->us);
            memmove(p->seen + i + 1, p->seen + i, after);
            p->rows[i] = rows, p->us[i] = (float)expected, p->seen[i] = i && !last ? DSPARK__SEEN_SOME : 0, p->n++;
        }
    }
    p->us[i] = dspark__learned(p->us[i], us, &p->seen[i]);
    for (int j = 0; j < p->n; j++)
        if ((p->us[j] > p->us[i]) == (j < i)) p->us[j] = p->us[i];
}

// A draft of n sessions took `us`, not counting their extra_us.
static void dspark__learn_draft(dspark_profile *p, int n, double us) {
    double expected = (double)p->draft_us + (n - 1) * (double)p->draft_more_us;
    float scale;
    if (expected <= 0) p->draft_us = p->draft_more_us = (float)(us / n), expected = us;
    scale = dspark__learned(1, us / expected, &p->draft_seen);
    p->draft_us *= scale;
    if (n > 1) p->draft_more_us *= scale;
}

// Times one target pass with B rows at the end of each of n sessions, or (B 0) a draft of each, in microseconds.
static dspark_status dspark__time_pass(dspark_session **s, int n, int B, double *us) {
    dspark_model *m = s[0]->model;
    const dspark_config *c = &m->checkpoint.config;
    dspark__batch *b = &m->batch;
    dspark_pass pass;
    dspark_pass_result result;
    dspark_status status;
    int rows = B ? B : c->dspark_block_size;
    double start = dspark__now_us();
    memset(&pass, 0, sizeof pass);
    pass.kind = B ? DSPARK_PASS_TARGET : DSPARK_PASS_DRAFT, pass.ids = b->ids, pass.segments = b->segments;
    pass.n_rows = n * rows, pass.n_segments = n;
    for (int i = 0; i < n; i++) {
        b->segments[i] = B ? dspark__segment(s[i], i * rows, rows, s[i]->n_run)
                           : dspark__draft_segment(s[i], i * rows, rows);
        b->segments[i].logits_from = 0, b->previous[i] = s[i]->tokens[0];
        for (int k = 0; k < rows; k++) b->draws[i * rows + k] = dspark__draw_there(s[i], k);
        memcpy(b->ids + i * rows, s[i]->tokens + i, (size_t)rows * sizeof *b->ids);
    }
    if (m->backend->draft_steps) pass.draws = b->draws;     // as in a step: no logits come back
    status = B ? dspark__forward(m, &pass, &result) : dspark__draft_backbone(m, &pass, &result);
    if (!B && !status && pass.draws) status = m->backend->draft_steps(m->device, rows, b->previous, b->drawn);
    for (int k = 0; k < rows && !B && !status && !pass.draws; k++) m->backend->draft_step(m->device, k, b->previous);
    *us = dspark__now_us() - start;
    return status;
}

// What is timed: a pass with `rows` rows of each of n sessions, the first one `deeper` positions further on; or (rows
// 0) their draft, which injects the last `taps`. n 0: nothing. us: the least so far.
typedef struct { int n, rows, taps, deeper; double us; } dspark__timed;

static void dspark__timed_open(dspark__timed *t, int n, int rows, int taps, int deeper) {
    t->n = n, t->rows = rows, t->taps = taps, t->deeper = deeper, t->us = HUGE_VAL;
}
static dspark_status dspark__time_one(dspark_session **s, dspark__timed *t) {
    double us = 0;
    dspark_status status;
    s[0]->n_run += t->deeper;
    for (int i = 0; i < t->n; i++) s[i]->n_injected = dspark__max(0, s[i]->n_run - t->taps);
    status = t->n ? dspark__time_pass(s, t->n, t->rows, &us) : DSPARK_OK;
    s[0]->n_run -= t->deeper;
    if (us > 0) t->us = fmin(t->us, us);
    return status;
}
// Tries *n things in turn, at least three times: the machine's speed changes, and each should meet its best. The first
// round gives up those after `needed` that take too long.
static dspark_status dspark__time_all(dspark_session **s, dspark__timed *t, int needed, int *n) {
    dspark_status status = dspark__time_one(s, &t[needed - 1]); // may wait for the disk: not counted
    double start = dspark__now_us();
    t[needed - 1].us = HUGE_VAL;
    for (int round = 0; !status && (round < 3 || dspark__now_us() - start < 4.5e5); round++)
        for (int i = 0; i < *n && !status; i++) {
            double began = dspark__now_us();
            if (!round && i >= needed && began - start > 1.2e5) *n = i;
            for (int k = 0; i < *n && !status && (!k || (k < 4 && dspark__now_us() - began < 5e3)); k++)
                status = dspark__time_one(s, &t[i]);
        }
    return status;
}

// A draw at temperature 1 from the logits of the last pass. NaN among them: 0, and a step reports it.
static double dspark__time_sample(dspark_session *s, const float *logits) {
    int V = dspark__config(s)->vocab_size;
    int32_t token;
    double best = HUGE_VAL;
    for (int i = 0; i < 5; i++) {
        double start = dspark__now_us();
        if (dspark_distribution(logits, V, 1, 0, 0, 0, s->model->row) ||
            dspark_draw(s->model->row, V, 1, DSPARK_DRAW_PLAIN, (uint64_t)i, 0, &token)) return 0;
        best = fmin(best, dspark__now_us() - start);
    }
    return best;
}

// T(B) from n timings of one session. What cost more than a pass with more rows was interrupted, as was what took
// longer than two passes that could have run its rows.
static void dspark__profile_rows(const dspark__timed *t, int n, dspark_profile *p) {
    for (int i = 0; i < n; i++) {
        double us = t[i].us;
        for (int j = 0; j < i; j++) p->us[j] = fminf(p->us[j], (float)us);
        if (i) us = fmin(us, (double)p->us[i - 1] + dspark_profile_us(p, t[i].rows - t[i - 1].rows));
        p->rows[i] = t[i].rows, p->us[i] = (float)us, p->seen[i] = DSPARK__SEEN_SOME, p->n = i + 1;
    }
}

// s [n]: sessions. The first has room for `most` rows, and `deeper` further on; the others for a block each.
static dspark_status dspark__measure(dspark_session **s, int n, int most, int deeper, dspark_profile *p) {
    enum { TOGETHER, DEEP, DRAFT, INJECT, DRAFTS, ROWS };
    dspark__timed t[(int)ROWS + DSPARK_MAX_PROFILE];
    int gamma = dspark__config(s[0])->dspark_block_size, few = dspark__max(DSPARK__COMPANY, gamma + 1), n_timed = ROWS,
        rows = dspark__min(most, DSPARK__COMPANY), company = gamma ? dspark__min(n, s[0]->model->max_rows / gamma) : 0;
    dspark_pass_result result;
    dspark_status status;
    dspark__timed_open(&t[TOGETHER], n, 1, 0, 0);
    dspark__timed_open(&t[DEEP], deeper > 0, rows, 0, deeper);
    dspark__timed_open(&t[DRAFT], gamma > 0, 0, DSPARK__FRESH_TAPS, 0);
    dspark__timed_open(&t[INJECT], gamma > 0, 0, DSPARK__FRESH_TAPS + 64, 0);
    dspark__timed_open(&t[DRAFTS], company, 0, DSPARK__FRESH_TAPS, 0);
    for (int B = 1; B <= most; B = B < few ? B + 1 : (B + B / 2) & ~1) dspark__timed_open(&t[n_timed++], 1, B, 0, 0);
    status = dspark__time_all(s, t, ROWS + dspark__min(few, most), &n_timed);
    if (status) return status;
    dspark__profile_rows(t + ROWS, n_timed - ROWS, p);
    // bounded, as an error of it counts up to 255 times
    if (n > 1) p->session_us = (float)fmin(fmax(t[TOGETHER].us - dspark_profile_us(p, n), 0) / (n - 1),
                                           (double)p->us[0] / 2);
    if (deeper) p->context_us = (float)(fmax(t[DEEP].us - dspark_profile_us(p, rows), 0) / rows * 1024 / deeper);
    if (gamma) {
        p->draft_us = p->draft_more_us = (float)t[DRAFT].us, p->draft_seen = DSPARK__SEEN_SOME;
        p->inject_us = (float)(fmax(t[INJECT].us - t[DRAFT].us, 0) / 64);
        if (company > 1) p->draft_more_us = (float)(fmax(t[DRAFTS].us - t[DRAFT].us, 0) / (company - 1));
    }
    status = dspark__run_alone(s[0], s[0]->tokens, 1, s[0]->n_run, 0, 0, &result);
    if (!status) p->sample_us = (float)dspark__time_sample(s[0], result.logits);
    return status;
}

static dspark_status dspark__piece_zero(void *user, void *data, size_t bytes) {
    (void)user, memset(data, 0, bytes);
    return DSPARK_OK;
}
// As if n tokens had been run. What a pass costs does not depend on what a state holds, but on its memory: all pages
// that were never written are one page, which never leaves the caches. So all of it is written.
static dspark_status dspark__run_blank(dspark_session *s, int n) {
    s->n_run = n;
    return s->model->backend->state_pieces(s->state, s->desc.max_context, 1, dspark__piece_zero, NULL);
}

static dspark_status dspark__measure_sessions(dspark_model *m, dspark_profile *p) {
    const dspark_config *c = &m->checkpoint.config;
    dspark_session *s[DSPARK__COMPANY];
    dspark_session_desc desc;
    dspark_status status = DSPARK_OK;
    int all = c->max_position_embeddings, most = dspark__min(m->max_rows, dspark__max(1, all - DSPARK__DEPTH)),
        depth = dspark__min(DSPARK__DEPTH, dspark__max(1, all - most - 1)), deeper = DSPARK__DEEPER, n = 0;
    most = dspark__min(most, all - depth);
    if (depth + deeper + most > all) deeper = 0;
    memset(&desc, 0, sizeof desc);
    for (; n < dspark__min(DSPARK__COMPANY, m->max_rows); n++) {
        desc.max_context = depth + (n ? dspark__min(most, c->dspark_block_size + 1) : most + deeper);
        status = dspark_session_open(&s[n], m, &desc);
        if (!status && (status = dspark__run_blank(s[n], depth)) != DSPARK_OK) dspark_session_close(s[n]);
        if (status) break;      // fewer will do
        for (int i = 0; i < desc.max_context; i++) s[n]->tokens[i] = (int32_t)((int64_t)(i + n) * 7919 % c->vocab_size);
    }
    if (n) status = dspark__measure(s, n, most, deeper, p);
    while (n) dspark_session_close(s[--n]);
    return status;
}

DSPARK_API dspark_status dspark_model_profile(dspark_model *m, dspark_profile *out) {
    if (!m->n_profiles) {
        dspark_profile p;
        dspark_status status;
        memset(&p, 0, sizeof p);
        if ((status = dspark__measure_sessions(m, &p)) != DSPARK_OK) return status;
        p.learn = 1;
        m->profile = p, m->n_profiles = 1;
    }
    *out = m->profile;
    return DSPARK_OK;
}

// Limits of a profile's times and rows, in memory and in files.
static const double dspark__least_us = 1e-3, dspark__most_us = 1e12;
enum { DSPARK__MOST_ROWS = 100000000 };

DSPARK_API dspark_status dspark_model_set_profile(dspark_model *m, const dspark_profile *p) {
    dspark_profile unknown;
    memset(&unknown, 0, sizeof unknown), unknown.learn = 1;
    if (!p) p = &unknown;
    if (p->n < !p->learn || p->n > DSPARK_MAX_PROFILE)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "profile: %d points: expected %d to %d", p->n, !p->learn,
                            DSPARK_MAX_PROFILE);
    for (int i = 0; i < p->n; i++)
        if (!((double)p->us[i] >= dspark__least_us && (double)p->us[i] <= dspark__most_us) ||
            p->rows[i] > DSPARK__MOST_ROWS || p->rows[i] <= (i ? p->rows[i - 1] : 0))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "profile: us[%d] is %g for %d rows: expected %g to %g, and "
                                "more rows than before, up to %d", i, (double)p->us[i], p->rows[i], dspark__least_us,
                                dspark__most_us, DSPARK__MOST_ROWS);
    for (int i = 0; i < DSPARK__PROFILE_COSTS; i++)
        if (!(*dspark__profile_cost(p, i) >= 0 && (double)*dspark__profile_cost(p, i) <= dspark__most_us))
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "profile: %s is %g: expected 0 to %g",
                                dspark__profile_costs[i].name, (double)*dspark__profile_cost(p, i), dspark__most_us);
    for (int i = 0; i < DSPARK__KINDS; i++) m->kinds[i].account.limit_us = 0;
    memset(&m->turns, 0, sizeof m->turns);
    m->profile = *p, m->n_profiles++;
    return DSPARK_OK;
}

#ifndef DSPARK_NO_STDIO
// What pass times depend on; a profile of anything else is refused.
static void dspark__profile_of(const dspark_model *m, char *text, size_t size) {
    snprintf(text, size, "checkpoint %016llx, %s, %s, %d threads", (unsigned long long)m->checkpoint.hash,
             m->backend->name, dspark_model_path_name(m), dspark_model_threads(m));
}

DSPARK_API dspark_status dspark_model_save_profile(dspark_model *m, const char *path) {
    dspark_profile p;
    dspark_status status = dspark_model_profile(m, &p);
    char of[128], number[32];
    int failed;
    FILE *f;
    if (status) return status;
    if (!(f = fopen(path, "w"))) return dspark__fail(DSPARK_ERROR_IO, "%s: %s", path, strerror(errno));
    dspark__profile_of(m, of, sizeof of);
    fprintf(f, "{\"format\": \"dspark-profile-2\", \"of\": \"%s\",\n \"rows\": [", of);
    for (int i = 0; i < p.n; i++) fprintf(f, "%s%d", i ? ", " : "", p.rows[i]);
    fprintf(f, "],\n \"us\": [");
    for (int i = 0; i < p.n; i++) fprintf(f, "%s%s", i ? ", " : "", dspark__decimal(number, (double)p.us[i], 9));
    fprintf(f, "],\n \"seen\": [");
    for (int i = 0; i < p.n; i++) fprintf(f, "%s%d", i ? ", " : "", dspark__min(p.seen[i], 8));
    fprintf(f, "],\n \"draft_seen\": %d", dspark__min(p.draft_seen, 8));
    for (int i = 0; i < DSPARK__PROFILE_COSTS; i++)
        fprintf(f, ",\n \"%s\": %s", dspark__profile_costs[i].name,
                dspark__decimal(number, (double)*dspark__profile_cost(&p, i), 9));
    fprintf(f, "}\n");
    failed = ferror(f) ? EIO : 0;
    if (fclose(f)) failed = errno;
    return failed ? dspark__fail(DSPARK_ERROR_IO, "%s: %s", path, strerror(failed)) : DSPARK_OK;
}

// Reads an array of n integers from low to high to out [n].
static void dspark__key_ints(const dspark__keys *k, const char *key, int n, int low, int high, int *out) {
    const dspark__json *j = &k->d->json;
    int node = dspark__key(k, key);
    char expected[32];
    snprintf(expected, sizeof expected, "%d integers", n);
    if (dspark__json_kind(j, node) != DSPARK__JSON_ARRAY || j->nodes[node].n != n)
        dspark__key_failed(k, DSPARK_ERROR_FORMAT, key, expected, node);
    for (int i = 0; i < n && !k->b->status; i++) out[i] = dspark__node_int(k, key, node + 1 + i, low, high);
}

static dspark_status dspark__profile_read(dspark_model *m, dspark__loader *b, dspark_profile *p) {
    const dspark__json *j = &b->config.json;
    const dspark__keys k = { b, &b->config, 0, "" };
    int seen[DSPARK_MAX_PROFILE], node = dspark__key(&k, "of");
    char of[128];
    dspark__profile_of(m, of, sizeof of);
    if (!dspark__json_is(j, dspark__key(&k, "format"), "dspark-profile-2"))
        dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "format", "dspark-profile-2", dspark__key(&k, "format"));
    else if (!dspark__json_is(j, node, of)) dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "of", of, node);
    node = dspark__key(&k, "rows");
    if (dspark__json_kind(j, node) != DSPARK__JSON_ARRAY || j->nodes[node].n > DSPARK_MAX_PROFILE)
        dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "rows", "an array of at most 64", node);
    else p->n = j->nodes[node].n;
    dspark__key_ints(&k, "rows", p->n, 1, DSPARK__MOST_ROWS, p->rows);
    for (int i = 1; i < p->n && !b->status; i++)
        if (p->rows[i] <= p->rows[i - 1])
            dspark__key_failed(&k, DSPARK_ERROR_FORMAT, "rows", "each more than the one before", node + 1 + i);
    dspark__key_reals(&k, "us", p->n, dspark__least_us, dspark__most_us, p->us);
    dspark__key_ints(&k, "seen", p->n, 0, 8, seen);
    for (int i = 0; i < p->n && !b->status; i++) p->seen[i] = (unsigned char)seen[i];
    for (int i = 0; i < DSPARK__PROFILE_COSTS && !b->status; i++)
        *dspark__profile_cost(p, i) = (float)dspark__key_real(&k, dspark__profile_costs[i].name, 0, dspark__most_us);
    p->learn = 1, p->draft_seen = (unsigned char)dspark__key_int(&k, "draft_seen", 0, 8);
    return b->status ? b->status : dspark_model_set_profile(m, p);
}

DSPARK_API dspark_status dspark_model_load_profile(dspark_model *m, const char *path) {
    dspark_profile p;
    dspark__loader b;
    dspark__document *d = &b.config;
    memset(&p, 0, sizeof p), memset(&b, 0, sizeof b);
    b.status = dspark__file_map(NULL, path, &d->file.data, &d->file.size);
    if (b.status) return b.status;
    d->file.name = dspark__path_end(path);
    b.status = dspark__object_parse(&d->json, &d->file, 0, (size_t)d->file.size);
    if (!b.status) b.status = dspark__profile_read(m, &b, &p);
    dspark__json_free(&d->json);
    dspark__file_unmap(NULL, d->file.data, d->file.size);
    return b.status;
}
#endif

// What a session adds to each of its rows' time: a draw, unless it is greedy or the device draws.
static double dspark__sample_us(const dspark_session *s) {
    return dspark__greedy(s) || dspark__drawn_there(s) ? 0 : (double)s->model->profile.sample_us;
}

// A target pass of this step with so many rows; a depth below DSPARK__DEPTH saves at most half of T(B).
static double dspark__pass_time(const dspark_model *m, int64_t rows) {
    const dspark__costs *c = &m->batch.costs;
    double T = dspark_profile_us(&m->profile, rows);
    return fmax(T + c->base_us + (double)rows * c->row_us, T / 2);
}
// A draft's share for each of n sessions.
static double dspark__draft_time(const dspark_model *m, int n) {
    return ((double)m->profile.draft_us + (n - 1) * (double)m->profile.draft_more_us) / n;
}
// What else a session's draft takes: its draws, and injecting the taps left by a pause.
static double dspark__draft_extra(const dspark_session *s) {
    int taps = s->n_run - dspark__max(s->n_injected, s->n_run - dspark__config(s)->sliding_window);
    return (double)s->model->profile.inject_us * dspark__max(0, taps - DSPARK__FRESH_TAPS) +
           dspark__config(s)->dspark_block_size * dspark__sample_us(s);
}

// What the step's passes cost, R sessions decoding, of which `drafting` may draft.
static void dspark__costs_open(dspark_model *m, const dspark__lane *lanes, int n) {
    dspark__costs *c = &m->batch.costs;
    const dspark_profile *p = &m->profile;
    int gamma = m->checkpoint.config.dspark_block_size, others;
    double depth = 0, draws = 0, T;
    memset(c, 0, sizeof *c);
    for (int i = 0; i < n; i++) {
        if (lanes[i].n_prompt) continue;
        c->R++, c->drafting += lanes[i].limit > 0;
        depth += lanes[i].s->n_run, draws += dspark__sample_us(lanes[i].s);
    }
    if (!p->n || !c->R) return;
    depth /= c->R;
    c->base_us = (double)p->session_us * (c->R - 1) * fmin(depth / m->checkpoint.config.sliding_window, 1);
    c->context_us = (double)p->context_us * (depth - (double)DSPARK__DEPTH) / 1024;
    c->row_us = c->context_us + draws / c->R / dspark__min(c->R, m->backend->threads(m->device));
    T = dspark__pass_time(m, c->R), c->plain_us = T / c->R, others = (c->R - 1) * gamma;
    for (int rows = 1; rows <= gamma + others && c->drafting; rows++) {
        double each = (dspark__pass_time(m, c->R + rows) - T) / rows;
        for (int cap = dspark__max(1, rows - others); cap <= gamma; cap++)
            c->worst[cap] = fmax(c->worst[cap], each * dspark__min(rows, cap));
    }
    for (int l = 1; l <= gamma && c->drafting; l++)
        c->growth[l] = (dspark__pass_time(m, (int64_t)c->R + (int64_t)c->drafting * l) - T) / c->drafting;
}

// ---- draft

// How many drafts of a session may be verified; 0: it may not draft. Never past the quota or the context.
static int dspark__draft_limit(const dspark_session *s) {
    const dspark_policy *p = &s->desc.policy;
    int limit = dspark__config(s)->dspark_block_size, left = s->desc.max_context - s->n_tokens;
    if (!dspark__config(s)->n_stages || p->plain || s->n_run < 1) return 0;
    if (p->draft_cap) limit = dspark__min(limit, p->draft_cap);
    if (p->quota) left = (int)(p->quota - s->stats.emitted < left ? p->quota - s->stats.emitted : left);
    return dspark__max(0, dspark__min(limit, left - 1));
}

// BLOCK and THRESHOLD always draft; other schedules only if it pays.
static int dspark__is_forced(const dspark_session *s) {
    return s->desc.policy.schedule == DSPARK_SCHEDULE_BLOCK || s->desc.policy.schedule == DSPARK_SCHEDULE_THRESHOLD;
}

// A draft's expected gain, as a share of the cycle's time: tokens at price P, minus the cost of rows and draft. e NULL:
// every draft accepted.
static double dspark__gain(const dspark_model *m, const dspark__lane *a, const dspark__experience *e) {
    const dspark__costs *c = &m->batch.costs;
    double tokens = 0, best = 0, took = c->plain_us, kept = e ? (double)e->got / (double)e->hoped : 1;
    double draft = dspark__draft_time(m, dspark__max(1, c->drafting)) + a->extra_us;
    for (int l = 1; l <= a->limit; l++) {
        double gain;
        tokens += e ? fmin(1, kept * (double)e->survival[l - 1]) : 1, gain = tokens * c->plain_us - c->growth[l];
        if (gain > best) best = gain, took = c->plain_us + c->growth[l];
    }
    return (best - draft) / (took + draft);
}

// A text probes at its first step and every PROBE steps: texts differ, and change.
enum { DSPARK__PROBE = 64, DSPARK__TRIALS = 3, DSPARK__TRIAL_SESSIONS = 4 };

static dspark__kind *dspark__kind_of(const dspark_session *s) {
    float t = s->desc.temperature;
    int band = (t > .5f) + (t > .85f), rejection = dspark__mode(s) == DSPARK_VERIFY_REJECTION;
    return &s->model->kinds[dspark__greedy(s) ? 0 : 1 + 3 * rejection + band];
}

// A session's account starts at 0 and may borrow three worst outcomes from its kind's, which starts with one and
// collects all sessions' gains. So where drafts do not pay, only the first text tries at length; where they do, an
// unlucky start stops no text from drafting.
static void dspark__account_begin(dspark_session *s, double plain_us, double worst_us) {
    dspark__kind *all = dspark__kind_of(s);
    if (all->account.limit_us <= 0) dspark_account_open(&all->account, plain_us, worst_us);
    if (s->account_of == s->model->n_profiles) return;
    s->account = all->account, s->account.balance_us = 0, s->account_of = s->model->n_profiles;
}
static int dspark__affords(const dspark_session *s, double plain_us, double worst_us) {
    dspark_account credit = s->account;
    if (dspark_account_affords(&credit, plain_us, worst_us)) return 1;
    credit.balance_us += credit.limit_us * 3 / 16;
    return dspark_account_affords(&dspark__kind_of(s)->account, plain_us, worst_us) &&
           dspark_account_affords(&credit, plain_us, worst_us);
}

// Does this lane draft? If it gains a twentieth, for costs outside passes. This depends on the past only, so it is safe
// for REJECTION. While costs are unknown, a few sessions draft to learn them, with plain passes between and no account.
static int dspark__decides_to_draft(dspark__lane *a, int *trials) {
    dspark_session *s = a->s;
    const dspark_model *m = s->model;
    const dspark__costs *c = &m->batch.costs;
    double worst, gain;
    if (!s->experience.cycles) s->experience = dspark__kind_of(s)->experience, s->experience.cycles = DSPARK__PRIOR;
    if (!a->limit || dspark__is_forced(s)) return a->limit > 0;
    if (!m->profile.n) return 0;
    if (m->profile.learn && m->profile.draft_seen < DSPARK__TRIALS)
        return a->trial = m->profile.seen[0] > m->profile.draft_seen && ++*trials <= DSPARK__TRIAL_SESSIONS;
    worst = c->plain_us + dspark__draft_time(m, 1) + a->extra_us;
    a->plain_us = c->plain_us;
    dspark__account_begin(s, c->plain_us, worst + c->worst[dspark__config(s)->dspark_block_size]);
    while (a->limit && !dspark__affords(s, c->plain_us, worst + c->worst[a->limit])) a->limit--;
    gain = dspark__gain(m, a, &s->experience);
    a->is_close = a->limit && gain > -.1 && gain < .25;
    return gain > .05 || (s->stats.steps % DSPARK__PROBE == 0 && dspark__gain(m, a, NULL) > .05);
}

// Plain steps do not show what drafts cost now, nor steps with drafts what plain ones do, and a machine's speeds do not
// change alike. So where the comparison is close, some steps of one kind are followed by TURN_STEPS of the other, from
// which costs are learned quickly: soon after the number of sessions has changed, but not before 32 cycles, as a text
// knows little about itself in its first; and then ever less often.
enum { DSPARK__TURN = 256, DSPARK__TURN_STEPS = 4 };
static void dspark__turn_open(dspark_model *m) {
    dspark__turns *t = &m->turns;
    dspark_profile *p = &m->profile;
    t->drafts = t->since[1] >= t->wait, t->left = DSPARK__TURN_STEPS, t->wait = dspark__min(2 * t->wait, DSPARK__TURN);
    t->since[t->drafts] = 0;            // though sessions whose choice is clear may keep a turn from being whole
    for (int i = 0; i < p->n; i++) p->seen[i] = (unsigned char)dspark__min(p->seen[i], DSPARK__SEEN_SOME);
    p->draft_seen = (unsigned char)dspark__min(p->draft_seen, DSPARK__SEEN_SOME);
}
static void dspark__take_turns(dspark_model *m, dspark__lane *lanes, int n) {
    dspark__turns *t = &m->turns;
    int block = m->checkpoint.config.dspark_block_size, any = 0, all = 1, close = 0;
    if (!m->profile.learn || m->batch.costs.R < n || n * (1 + block) > m->max_rows || lanes != m->batch.lanes) return;
    for (int i = 0; i < n; i++) {
        if (lanes[i].trial || (lanes[i].limit && dspark__is_forced(lanes[i].s))) return;
        close += lanes[i].is_close;
    }
    if (8 * dspark__max(n - t->n, t->n - n) > n) t->n = n, t->wait = dspark__max(32 / n, 2 * DSPARK__TURN_STEPS);
    if (!t->left && close && dspark__max(t->since[0], t->since[1]) >= t->wait) dspark__turn_open(m);
    for (int i = 0; i < n && t->left; i++)
        if (lanes[i].is_close) lanes[i].drafted = t->drafts;
    t->left = dspark__max(t->left - 1, 0);
    for (int i = 0; i < n; i++) any |= lanes[i].drafted, all &= lanes[i].drafted || !lanes[i].limit;
    t->since[0] = any ? t->since[0] + 1 : 0, t->since[1] = any && all ? 0 : t->since[1] + 1;
}

static void dspark__decide(dspark_model *m, dspark__lane *lanes, int n) {
    int trials = 0;
    for (int i = 0; i < n; i++) lanes[i].limit = lanes[i].n_prompt ? 0 : dspark__draft_limit(lanes[i].s);
    dspark__costs_open(m, lanes, n);
    for (int i = 0; i < n; i++) {
        dspark__lane *a = &lanes[i];
        if (a->limit) a->extra_us = dspark__draft_extra(a->s);
        a->trial = a->is_close = 0;
        a->drafted = dspark__decides_to_draft(a, &trials) && a->limit;
    }
    dspark__take_turns(m, lanes, n);
    for (int i = 0; i < n; i++) {
        if (!lanes[i].drafted) lanes[i].limit = 0;
        lanes[i].n_drafted = lanes[i].drafted ? m->checkpoint.config.dspark_block_size : 0;
    }
}
// Decides how many of n lanes share the next pass, and what they draft: all lanes if they fit; else as many as fit if
// every lane drafts that may. *rows: the most rows they need.
static int dspark__fitting(dspark_model *m, dspark__lane *lanes, int n, int *rows) {
    int block = m->checkpoint.config.dspark_block_size, some = 0;
    dspark__decide(m, lanes, n);
    *rows = n;
    for (int i = 0; i < n; i++) *rows += lanes[i].n_drafted;
    if (*rows <= m->max_rows) return n;
    for (*rows = 0; some < n && m->max_rows - *rows > block; some++)
        *rows += 1 + (lanes[some].n_prompt || !dspark__draft_limit(lanes[some].s) ? 0 : block);
    dspark__decide(m, lanes, some);
    return some;
}

// Draws draft k of a lane from its logits, into the tokens after the committed ones.
static dspark_status dspark__draw_draft(dspark__lane *a, int k, float *logits, float confidence_logit) {
    dspark_session *s = a->s;
    int V = dspark__config(s)->vocab_size, position = s->n_tokens + k,
        rejection = dspark__mode(s) == DSPARK_VERIFY_REJECTION;
    int32_t token;
    dspark_status status = dspark__to_p(s, logits, position, NULL);
    if (!status && dspark__greedy(s)) token = dspark__argmax(logits, V);
    else if (!status)
        status = rejection
                     ? dspark_draw(logits, V, s->desc.seed, DSPARK_DRAW_DRAFT, s->cycle, k, &token)
                     : dspark_draw(logits, V, s->desc.seed, DSPARK_DRAW_PLAIN, (uint64_t)position, 0, &token);
    if (status) return status;
    s->tokens[position] = a->r->draft[k] = token, a->r->confidence[k] = confidence_logit;
    return DSPARK_OK;
}

// The draft pass: a block [anchor, noise, ...] for each drafting lane whose tokens the device draws (there 1) or not.
static void dspark__draft_rows(dspark_model *m, dspark__lane *lanes, int n, int there, dspark_pass *pass) {
    const dspark_config *c = &m->checkpoint.config;
    dspark__batch *b = &m->batch;
    memset(pass, 0, sizeof *pass);
    pass->kind = DSPARK_PASS_DRAFT, pass->ids = b->ids, pass->segments = b->segments;
    for (int i = 0; i < n; i++) {
        dspark_session *s = lanes[i].s;
        dspark_segment *g = &b->segments[pass->n_segments];
        if (!lanes[i].n_drafted || dspark__drawn_there(s) != there) continue;
        b->draws[pass->n_segments] = dspark__draw_there(s, 0);
        if (b->draws[pass->n_segments].purpose) b->draws[pass->n_segments].purpose = DSPARK_DRAW_DRAFT;
        b->lane_of[pass->n_segments++] = i;
        *g = dspark__draft_segment(s, pass->n_rows, c->dspark_block_size);
        lanes[i].draft_row = pass->n_rows;
        for (int k = 0; k < c->dspark_block_size; k++)
            b->ids[pass->n_rows++] = k ? c->dspark_noise_token_id : s->tokens[s->n_run];
    }
}

// Takes a lane's drafts and confidence logits from the device.
static void dspark__take_drafts(dspark__lane *a, const int32_t *drafts, const float *confidence) {
    for (int k = 0; k < dspark__config(a->s)->dspark_block_size; k++) {
        int32_t token = drafts[a->draft_row + k];
        if (token < 0 && k < a->n_drafted) a->n_drafted = k;
        a->s->tokens[a->s->n_tokens + k] = a->r->draft[k] = k < a->n_drafted ? token : 0;
        a->r->confidence[k] = confidence[a->draft_row + k];
    }
    a->r->n_drafted = a->n_drafted;
}

// All draft steps on the device: tokens and confidence logits come back.
static dspark_status dspark__draft_there(dspark_model *m, dspark__lane *lanes, const dspark_pass *pass,
                                         const float *confidence) {
    dspark__batch *b = &m->batch;
    dspark_status status;
    for (int i = 0; i < pass->n_segments; i++) {
        const dspark_session *s = lanes[b->lane_of[i]].s;
        b->previous[i] = s->tokens[s->n_tokens - 1];
    }
    status = m->backend->draft_steps(m->device, m->checkpoint.config.dspark_block_size, b->previous, b->drawn);
    for (int i = 0; i < pass->n_segments && !status; i++)
        dspark__take_drafts(&lanes[b->lane_of[i]], b->drawn, confidence);
    return status;
}

// Drafts for the lanes whose tokens the device draws (there 1), or for the others.
static dspark_status dspark__draft(dspark_model *m, dspark__lane *lanes, int n, int there) {
    const dspark_config *c = &m->checkpoint.config;
    dspark__batch *b = &m->batch;
    dspark_pass pass;
    dspark_pass_result out;
    dspark_status status;
    double start = dspark__now_us(), extra = 0;
    dspark__draft_rows(m, lanes, n, there, &pass);
    if (!pass.n_segments) return DSPARK_OK;
    if (there) pass.draws = b->draws;
    if ((status = dspark__draft_backbone(m, &pass, &out)) != DSPARK_OK) return status;
    if (there && (status = dspark__draft_there(m, lanes, &pass, out.confidence_logits)) != DSPARK_OK) return status;
    for (int k = 0; k < c->dspark_block_size && !there; k++) {
        for (int i = 0; i < pass.n_segments; i++) {
            const dspark_session *s = lanes[b->lane_of[i]].s;
            b->previous[i] = s->tokens[s->n_tokens - 1 + k];
        }
        m->backend->draft_step(m->device, k, b->previous);
        for (int i = 0; i < pass.n_segments; i++) {
            dspark__lane *a = &lanes[b->lane_of[i]];
            size_t row = (size_t)(a->draft_row + k);
            // a drafter that computes NaN proposes nothing more: its text is the target's alone
            if (k < a->n_drafted && dspark__draw_draft(a, k, out.logits + row * (size_t)c->vocab_size,
                                                       out.confidence_logits[row]))
                a->n_drafted = k, a->s->tokens[a->s->n_tokens + k] = 0;
            else if (k >= a->n_drafted) a->s->tokens[a->s->n_tokens + k] = 0;
        }
    }
    for (int i = 0; i < pass.n_segments; i++) {
        dspark__lane *a = &lanes[b->lane_of[i]];
        a->r->draft_us = (float)((dspark__now_us() - start) / pass.n_segments),
        a->r->n_drafted = a->n_drafted;
        a->limit = dspark__min(a->limit, a->n_drafted);
        dspark__calibrate(dspark__calibration_of(a->s), a->r->confidence, a->n_drafted);
        extra += a->extra_us;
    }
    if (m->profile.learn) dspark__learn_draft(&m->profile, pass.n_segments, fmax(dspark__now_us() - start - extra, 1));
    return DSPARK_OK;
}

// ---- schedule

static int dspark__mode_of(const dspark__lane *a) {
    const dspark_session *s = a->s;
    if (a->trial) return DSPARK_SCHEDULE_BLOCK;
    if (s->desc.policy.schedule) return s->desc.policy.schedule;
    return dspark__mode(s) == DSPARK_VERIFY_REJECTION ? DSPARK_SCHEDULE_PREFIX : DSPARK_SCHEDULE_GLOBAL;
}

// The budget: what GLOBAL would admit with the confidences of two steps ago. PREFIX until there are any.
static dspark_status dspark__async_budget(dspark__batch *b, const dspark__lane *lanes, dspark_schedule_desc *d) {
    dspark_schedule_desc past = *d;
    dspark_status status;
    int any = 0;
    past.mode = DSPARK_SCHEDULE_GLOBAL, past.n_drafted = b->n_past;
    for (int i = 0; i < d->n_requests; i++) {
        const dspark_session *s = lanes[b->lane_of[i]].s;
        b->n_past[i] = s->n_past[1], any += b->limit[i] ? s->n_past[1] : 0;
        memcpy(b->confidence + i * d->gamma, s->past[1], (size_t)d->gamma * sizeof *b->confidence);
    }
    if (!any) return d->mode = DSPARK_SCHEDULE_PREFIX, DSPARK_OK;
    status = dspark_schedule(&past, b->lengths);
    for (int i = 0; i < d->n_requests && !status; i++) d->budget += b->lengths[i];
    return status;
}

// Fills *d for schedule `mode`, except the confidences. All decoding lanes are requests, as each brings a token; `rows`
// are the pass's so far, without this mode's drafts. Returns how many drafts there are to choose from.
static int dspark__schedule_open(dspark_model *m, const dspark__lane *lanes, int n, int mode, int rows,
                                 dspark_schedule_desc *d, dspark_sps *sps) {
    dspark__batch *b = &m->batch;
    int R = 0, candidates = 0, drafted = 0;
    double extra = 0;
    for (int i = 0; i < n; i++) {
        const dspark_session *s = lanes[i].s;
        if (lanes[i].n_prompt) continue;
        b->limit[R] = dspark__mode_of(&lanes[i]) == mode ? lanes[i].limit : 0;
        candidates += b->limit[R], drafted += lanes[i].drafted, extra += lanes[i].drafted ? lanes[i].extra_us : 0;
        b->weight[R] = s->desc.policy.share > 0 ? s->desc.policy.share : 1;
        b->threshold[R] = s->desc.policy.threshold, b->lane_of[R++] = i;
    }
    memset(d, 0, sizeof *d);
    sps->sps = b->sps, sps->n = rows + candidates;
    if (mode >= DSPARK_SCHEDULE_PREFIX && candidates)   // entries below `rows` are never read
        for (int B = 1; B <= sps->n; B++) b->sps[B - 1] = (float)(1e6 / dspark__pass_time(m, dspark__max(B, rows)));
    d->confidence = b->confidence, d->cap = b->limit, d->threshold = b->threshold, d->weight = b->weight;
    d->n_requests = R, d->gamma = m->checkpoint.config.dspark_block_size, d->mode = mode, d->other_rows = rows - R;
    d->sps = sps, d->scratch = b->scratch;
    d->draft_us = (float)(drafted ? drafted * dspark__draft_time(m, drafted) + extra : 0);
    return candidates;
}

// Sets the lengths of lanes with schedule `mode`; adds their rows to *rows. PREFIX, Algorithm 1, is for sessions with
// REJECTION, since no admission there depends on the draft itself; GLOBAL, its maximum, where that is lossless.
static dspark_status dspark__schedule_mode(dspark_model *m, dspark__lane *lanes, int n, int mode, int *rows) {
    dspark__batch *b = &m->batch;
    dspark_schedule_desc d;
    dspark_sps sps;
    dspark_status status;
    if (!dspark__schedule_open(m, lanes, n, mode, *rows, &d, &sps)) return DSPARK_OK;
    if (mode == DSPARK_SCHEDULE_ASYNC && (status = dspark__async_budget(b, lanes, &d)) != DSPARK_OK) return status;
    for (int i = 0; i < d.n_requests; i++)
        memcpy(b->confidence + i * d.gamma, lanes[b->lane_of[i]].r->confidence, (size_t)d.gamma * sizeof(float));
    if ((status = dspark_schedule(&d, b->lengths)) != DSPARK_OK) return status;
    for (int i = 0; i < d.n_requests; i++)
        if (b->limit[i]) lanes[b->lane_of[i]].length = b->lengths[i], *rows += b->lengths[i];
    return DSPARK_OK;
}

// Keeps this step's confidences for the next two steps.
static void dspark__remember(const dspark__lane *a) {
    dspark_session *s = a->s;
    if (a->n_prompt) return;
    memcpy(s->past[1], s->past[0], sizeof s->past[0]);
    memcpy(s->past[0], a->r->confidence, sizeof s->past[0]);
    s->n_past[1] = s->n_past[0], s->n_past[0] = a->n_drafted;
}

static dspark_status dspark__schedule(dspark_model *m, dspark__lane *lanes, int n) {
    dspark_status status = DSPARK_OK;
    int rows = 0;
    for (int i = 0; i < n; i++) rows += lanes[i].n_prompt ? lanes[i].n_prompt : 1;
    for (int mode = DSPARK_SCHEDULE_BLOCK; mode <= DSPARK_SCHEDULE_GLOBAL && !status; mode++)
        status = dspark__schedule_mode(m, lanes, n, mode, &rows);
    for (int i = 0; i < n; i++) dspark__remember(&lanes[i]);
    return status;
}

// ---- verify and commit

// One flat pass: prompt chunks, anchors, drafts.
static dspark_status dspark__target(dspark_model *m, dspark__lane *lanes, int n, dspark_pass_result *out) {
    dspark__batch *b = &m->batch;
    dspark_pass pass;
    dspark_status status;
    double start = dspark__now_us(), us;
    int logits = 0;
    memset(&pass, 0, sizeof pass);
    pass.kind = DSPARK_PASS_TARGET, pass.ids = b->ids, pass.segments = b->segments;
    for (int i = 0; i < n; i++) {
        dspark_session *s = lanes[i].s;
        int rows = lanes[i].n_prompt ? lanes[i].n_prompt : 1 + lanes[i].length;
        dspark_segment *g = &b->segments[pass.n_segments++];
        *g = dspark__segment(s, pass.n_rows, rows, s->n_run);
        g->logits_from = !lanes[i].n_prompt ? 0 : s->n_run + rows == s->n_tokens ? rows - 1 : rows;
        memcpy(b->ids + pass.n_rows, s->tokens + s->n_run, (size_t)rows * sizeof *b->ids);
        lanes[i].logits_row = logits;
        for (int k = 0; k < rows - g->logits_from; k++) {
            b->draws[logits + k] = dspark__draw_there(s, k);
            if (k < lanes[i].length) b->draws[logits + k].draft_row = lanes[i].draft_row + k;
            if (lanes[i].n_prompt || !dspark__drawn_there(s)) b->draws[logits + k].temperature = -1;
            else pass.draws = b->draws;
        }
        pass.n_rows += rows, logits += rows - g->logits_from;
        dspark__mark_run(s, s->n_run + rows);
    }
    status = dspark__forward(m, &pass, out), us = dspark__now_us() - start;
    for (int i = 0; i < n; i++) lanes[i].r->verify_us = (float)(us * b->segments[i].n_rows / pass.n_rows);
    us -= b->costs.base_us + b->costs.context_us * pass.n_rows;
    if (!status && m->profile.learn && b->costs.R == n && us > 0) dspark__learn_pass(&m->profile, pass.n_rows, us);
    return status;
}

// Draft, choice and verification in one go, with one read-back at the end. ASYNC knows its budget before the drafts: if
// the device draws all the step's tokens, it also chooses the lengths. *done 0: not in this step; nothing was done.
static dspark_status dspark__cycle_there(dspark_model *m, dspark__lane *lanes, int n, dspark_pass_result *out,
                                         int *done) {
    dspark__batch *b = &m->batch;
    int gamma = m->checkpoint.config.dspark_block_size, most, logits = 0;
    double start = dspark__now_us();
    dspark_schedule_desc d;
    dspark_sps sps;
    dspark_pass pass;
    dspark_choice choice;
    dspark_status status = DSPARK_OK;
    for (int i = 0; i < n; i++)
        if (lanes[i].n_prompt || !dspark__drawn_there(lanes[i].s) ||
            (lanes[i].limit && dspark__mode_of(&lanes[i]) != DSPARK_SCHEDULE_ASYNC))
            return DSPARK_OK;
    most = dspark__schedule_open(m, lanes, n, DSPARK_SCHEDULE_ASYNC, n, &d, &sps);
    if (!most || (status = dspark__async_budget(b, lanes, &d)) != DSPARK_OK) return status;
    if (d.mode != DSPARK_SCHEDULE_ASYNC) return DSPARK_OK;
    dspark__draft_rows(m, lanes, n, 1, &pass);
    pass.draws = b->draws, *done = 1;
    if ((status = dspark__draft_backbone(m, &pass, out)) != DSPARK_OK) return status;
    memset(&pass, 0, sizeof pass), memset(&choice, 0, sizeof choice);
    for (int i = 0; i < n; i++) {
        dspark_session *s = lanes[i].s;
        b->segments[i] = dspark__segment(s, i, 1 + lanes[i].limit, s->n_run), b->segments[i].logits_from = 0;
        b->ids[i] = s->tokens[s->n_run], b->draws[i] = dspark__draw_there(s, 0);
        b->n_past[i] = lanes[i].drafted ? lanes[i].draft_row : -1;
        b->calibrations[i] = dspark__calibration_of(s);
        dspark__mark_run(s, s->n_run + 1 + lanes[i].limit);
    }
    choice.n_steps = gamma, choice.budget = d.budget, choice.draft_row = b->n_past, choice.weight = b->weight;
    choice.threshold = b->threshold, choice.calibration = b->calibrations;
    pass.kind = DSPARK_PASS_TARGET, pass.n_rows = n + dspark__min(most, d.budget), pass.n_segments = n;
    pass.ids = b->ids, pass.segments = b->segments, pass.draws = b->draws, pass.choice = &choice;
    status = dspark__forward(m, &pass, out);
    for (int i = 0; i < n && !status; i++) {
        dspark__lane *a = &lanes[i];
        if (a->drafted) {
            dspark__take_drafts(a, out->drafts, out->confidence_logits);
            dspark__calibrate(dspark__calibration_of(a->s), a->r->confidence, a->n_drafted);
        }
        a->length = out->lengths[i], a->logits_row = logits, logits += 1 + a->length;
        a->r->verify_us = (float)((dspark__now_us() - start) / n);      // the draft's time is in it
        dspark__remember(a);
    }
    return status;
}

// A prompt's chunk has been run; its last row's logits are for the next step to draw from.
static void dspark__commit_prompt(dspark__lane *a, const dspark_pass_result *out) {
    dspark_session *s = a->s;
    size_t V = (size_t)dspark__config(s)->vocab_size;
    s->n_run += a->n_prompt;
    if (s->n_run < s->n_tokens) return;
    memcpy(s->logits, out->logits + (size_t)a->logits_row * V, V * sizeof *s->logits);
    s->has_logits = 1;
}

// A row whose token the device has drawn. (REJECTION: if rounding leaves p_t <= p_d everywhere, the token is drawn from
// p_t and may be the rejected draft, which then counts as accepted.)
static dspark_status dspark__verify_there(const dspark__lane *a, int i, int32_t drawn, int *accepted, int32_t *token) {
    *token = drawn, *accepted = i < a->length && drawn == a->s->tokens[a->s->n_tokens];
    if (drawn >= 0) return DSPARK_OK;
    return dspark__fail(DSPARK_ERROR_NUMERIC, "row %d of a session: its logits are no distribution", i);
}

// n: drafts.
static dspark_verify_desc dspark__verify_of(const dspark_session *s, int n, const float *p_target,
                                            const float *p_draft) {
    dspark_verify_desc v;
    memset(&v, 0, sizeof v);
    v.p_target = p_target, v.p_draft = p_draft, v.draft = s->tokens + s->n_tokens, v.n = n,
    v.vocab = dspark__config(s)->vocab_size, v.position = s->n_tokens;
    v.mode = dspark__mode(s), v.seed = s->desc.seed, v.cycle = s->cycle;
    return v;
}

static uint64_t dspark__float_mode_set(void);
static void dspark__float_mode_restore(uint64_t old);

// Verifies a lane's rows before its turn, on any thread, unless a hook or log-probabilities need them. A failure recurs
// and is reported in turn.
static void dspark__verify_ahead(dspark__lane *a, float *p_target, const float *p_draft) {
    const dspark_session *s = a->s;
    dspark_verify_desc v = dspark__verify_of(s, a->length, p_target, p_draft);
    if (a->n_prompt || s->desc.adjust || s->desc.logprobs || dspark__drawn_there(s)) return;
    for (int i = 0, accepted = 1; i <= a->length && accepted; i++) {
        int32_t token = 0;
        if (dspark__to_p(s, p_target + (size_t)i * (size_t)v.vocab, s->n_tokens + i, NULL)) return;
        a->n_p++;
        if (dspark__verify_row(&v, i, &accepted, &token)) return;
        a->ahead[i].token = token, a->ahead[i].accepted = accepted, a->n_ahead++;
    }
}

// Verifies row by row, only rows that plain decoding would reach. drawn: the rows' tokens, or NULL.
static dspark_status dspark__verify_lane(dspark__lane *a, float *p_target, const float *p_draft, const int32_t *drawn) {
    dspark_session *s = a->s;
    dspark_step_result *r = a->r;
    dspark_verify_desc v = dspark__verify_of(s, a->length, p_target, p_draft);
    int first = s->n_tokens, finished = 0;
    for (int i = 0, accepted = 1; i <= a->length && accepted && !finished; i++) {
        float *row = p_target + (size_t)i * (size_t)v.vocab;
        double log_sum = 0;
        int32_t token = 0;
        int by, ahead = !drawn && i < a->n_ahead;
        dspark_status status = DSPARK_OK;
        if (drawn) status = dspark__verify_there(a, i, drawn[i], &accepted, &token);
        else if (ahead) token = a->ahead[i].token, accepted = a->ahead[i].accepted;
        else if (i >= a->n_p) status = dspark__to_p(s, row, first + i, s->desc.logprobs ? &log_sum : NULL);
        if (!drawn && !ahead && !status) status = dspark__verify_row(&v, i, &accepted, &token);
        if (status) return status;
        if (accepted) token = s->tokens[first + i];
        by = accepted         ? DSPARK_BY_DRAFT
             : !a->length     ? DSPARK_BY_PLAIN
             : i == a->length ? DSPARK_BY_BONUS
                              : DSPARK_BY_CORRECTION;
        r->n_accepted += accepted;
        finished =
            dspark__emit(s, r, token, by, s->desc.logprobs ? (double)s->model->row[token] - log_sum : 0);
    }
    return DSPARK_OK;
}

// The bucket of a token that took so long.
static int dspark__bucket(double us) {
    int i = 0;
    for (double top = 2; us > top && i < DSPARK_BUCKETS - 1; i++) top *= 1.4142135623730951;
    return i;
}

static void dspark__count(dspark_stats *t, const dspark_step_result *r) {
    int cut = r->finish && r->n_tokens && r->by[r->n_tokens - 1] == DSPARK_BY_DRAFT;
    int n = cut ? r->n_accepted : r->n_scheduled;
    t->steps++, t->cut += cut, t->cycles += r->n_drafted > 0;
    t->drafted += r->n_drafted, t->scheduled += n, t->accepted += r->n_accepted;
    t->draft_us += (double)r->draft_us, t->verify_us += (double)r->verify_us;
    if (r->n_tokens) t->token_us[dspark__bucket((double)r->step_us / r->n_tokens)] += r->n_tokens;
    if (r->n_tokens) t->step_us += (double)r->step_us;
    for (int k = 0; k < n; k++) t->scheduled_by_position[k]++;
    for (int k = 0; k < r->n_accepted; k++) t->accepted_by_position[k]++;
}

// Adds a cycle's a_k, and the accepted drafts expected and got, to means over about `most` cycles.
static void dspark__experience_add(dspark__experience *e, const dspark_step_result *r, int most) {
    float survival = 1, hoped = 0, rate;
    if (!r->n_drafted) return;
    rate = 1 / (float)(e->cycles = dspark__min(e->cycles + 1, most));
    for (int k = 0; k < r->n_drafted; k++) {
        survival *= r->confidence[k];
        e->survival[k] += rate * (survival - e->survival[k]);
        if (k < r->n_scheduled) hoped += survival;
    }
    if (!r->n_scheduled) return;
    e->hoped = fmaxf(e->hoped + rate * (hoped - e->hoped), 1e-3f);
    e->got += rate * ((float)r->n_accepted - e->got);
}

// What a text saw before it stopped drafting counts less and less: a few unlucky cycles should not stop it for good.
static void dspark__experience_fade(dspark__experience *e, const dspark__experience *all) {
    const float rate = 1.f / 32;        // so most of it is gone after 32 steps
    for (int k = 0; k < DSPARK_MAX_BLOCK; k++) e->survival[k] += rate * (all->survival[k] - e->survival[k]);
    e->hoped += rate * (all->hoped - e->hoped), e->got += rate * (all->got - e->got);
}

// Settles the accounts in modelled time: this cycle's cost to the session against that of its tokens plainly decoded.
// In the pass, `drafts` drafts were verified; `drafted` sessions drafted.
static void dspark__settle(dspark__lane *a, int drafts, int drafted, int tau) {
    dspark_model *m = a->s->model;
    int R = m->batch.costs.R;
    double cycle = a->plain_us;
    if (a->plain_us <= 0) return;
    if (a->drafted) cycle += dspark__draft_time(m, drafted) + a->extra_us;
    if (a->length)
        cycle += (dspark__pass_time(m, R + drafts) - dspark__pass_time(m, R)) * a->length / (double)drafts;
    dspark_account_settle(&a->s->account, a->plain_us, cycle, tau);
    dspark_account_settle(&dspark__kind_of(a->s)->account, a->plain_us, cycle, tau);
}

// A lane's rows of the pass, and its drafts' distributions.
static float *dspark__lane_logits(const dspark__lane *a, const dspark_pass_result *out) {
    return out->logits + (size_t)a->logits_row * (size_t)dspark__config(a->s)->vocab_size;
}
static const float *dspark__lane_drafts(const dspark__lane *a, const float *p_draft) {
    if (!p_draft || !a->n_drafted) return NULL;
    return p_draft + (size_t)a->draft_row * (size_t)dspark__config(a->s)->vocab_size;
}
// Verifies the lanes ahead of their turns, on as many threads as the backend has.
static void dspark__draw_ahead(dspark_model *m, dspark__lane *lanes, int n, const dspark_pass_result *out,
                               const float *p_draft) {
    int threads = dspark__min(n, m->backend->threads(m->device));
    (void)threads;
#ifdef _OPENMP
    #pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int i = 0; i < n; i++) {
        uint64_t mode = dspark__float_mode_set();
        dspark__verify_ahead(&lanes[i], dspark__lane_logits(&lanes[i], out), dspark__lane_drafts(&lanes[i], p_draft));
        dspark__float_mode_restore(mode);
    }
}

static void dspark__commit(dspark__lane *a, const dspark_pass_result *out, const float *p_draft, int drafts,
                           int drafted) {
    dspark_session *s = a->s;
    dspark__experience *all = &dspark__kind_of(s)->experience;
    int before = s->n_tokens;
    a->r->n_scheduled = a->length;
    a->r->status = dspark__verify_lane(a, dspark__lane_logits(a, out), dspark__lane_drafts(a, p_draft),
                                       dspark__drawn_there(s) ? out->tokens + a->logits_row : NULL);
    s->n_run = dspark__min(before + a->r->n_accepted, s->n_tokens - 1);
    dspark__settle(a, drafts, drafted, s->n_tokens - before);
    if (a->drafted) dspark__experience_add(&s->experience, a->r, 16);
    else dspark__experience_fade(&s->experience, all);
    dspark__experience_add(all, a->r, 1024);
}

// ---- a step

// Draws the anchor from an append's logits.
static void dspark__first_token(dspark_session *s, dspark_step_result *r) {
    int accepted;
    double log_sum = 0;
    float *p = s->logits;
    dspark_device_draw draw = dspark__draw_there(s, 0);         // before the next lines change s->cycle
    dspark_verify_desc v = dspark__verify_of(s, 0, p, NULL);
    int32_t token;
    s->cycle++, s->has_logits = 0;
    if (dspark__drawn_there(s)) {
        r->status = s->model->backend->draw(s->model->device, p, &draw, &token);
        if (!r->status && token < 0) r->status = dspark__fail(DSPARK_ERROR_NUMERIC, "the logits are no distribution");
    } else {
        r->status = dspark__to_p(s, p, s->n_tokens, s->desc.logprobs ? &log_sum : NULL);
        if (!r->status) r->status = dspark__verify_row(&v, 0, &accepted, &token);
    }
    if (r->status) s->n_run = s->n_tokens - 1, s->n_injected = dspark__min(s->n_injected, s->n_run);
    else dspark__emit(s, r, token, DSPARK_BY_PLAIN, s->desc.logprobs ? (double)s->model->row[token] - log_sum : 0);
}

// Enters a session into the step. 0: it needs no rows, its result is complete.
static int dspark__lane_open(dspark__lane *a, dspark_session *s, dspark_step_result *r) {
    memset(a, 0, sizeof *a);
    memset(r, 0, sizeof *r);
    a->s = s, a->r = r;
    dspark__text_begin(s);
    r->text = s->text;
    if (!s->n_tokens)
        return r->status =
                   dspark__fail(DSPARK_ERROR_ARGUMENT, "step: the session has no tokens to go on from"),
               0;
    if (!s->has_logits && s->n_tokens - s->n_run > 1) {
        r->status = dspark__refill(s);
        return r->status ? 0 : (a->n_prompt = 1);
    }
    r->finish = s->finish ? s->finish : dspark__exhausted(s);
    if (!r->finish && s->has_logits) dspark__first_token(s, r);
    if (r->status) return 0;
    if (r->finish) return dspark__text_end(s, r), 0;
    r->status = dspark__refill(s);
    return !r->status;
}

// Gives the pass's remaining rows to the prompts in it, in their order.
static void dspark__share_rows(dspark__lane *lanes, int n, int left, int prompt_rows) {
    for (int i = 0; i < n; i++) {
        int more = lanes[i].s->n_tokens - lanes[i].s->n_run;
        if (!lanes[i].n_prompt) continue;
        if (prompt_rows > 0) more = dspark__min(more, prompt_rows);
        more = dspark__min(more - lanes[i].n_prompt, left);
        lanes[i].n_prompt += more, left -= more;
    }
}

// start: when the step began.
static dspark_status dspark__cycle(dspark_model *m, dspark__lane *lanes, int n, double start) {
    dspark_pass_result out;
    dspark_status status;
    float *p_draft = NULL;
    int drafts = 0, drafted = 0, done = 0;
    status = dspark__cycle_there(m, lanes, n, &out, &done);
    if (!status && !done) status = dspark__draft(m, lanes, n, 0);
    if (!status && !done) status = dspark__draft(m, lanes, n, 1);   // last: the device verifies with its logits
    if (!status && !done) status = dspark__schedule(m, lanes, n);
    if (!status && !done) status = dspark__target(m, lanes, n, &out);
    for (int i = 0; i < n && status; i++) lanes[i].s->n_injected = 0;       // what the draft pass left is unknown
    if (status) return status;
    if (m->checkpoint.config.n_stages) p_draft = m->backend->draft_logits(m->device);
    if (out.logits) dspark__draw_ahead(m, lanes, n, &out, p_draft);
    for (int i = 0; i < n; i++) drafts += lanes[i].length, drafted += lanes[i].drafted;
    for (int i = 0; i < n; i++) {
        if (lanes[i].n_prompt) dspark__commit_prompt(&lanes[i], &out);
        else dspark__commit(&lanes[i], &out, p_draft, drafts, drafted);
        lanes[i].s->cycle++;
        dspark__text_end(lanes[i].s, lanes[i].r);
    }
    for (int i = 0; i < n; i++) {
        lanes[i].r->step_us = (float)(dspark__now_us() - start);
        if (lanes[i].n_prompt) continue;
        dspark__count(&lanes[i].s->stats, lanes[i].r);
        dspark__count(&m->stats, lanes[i].r);
    }
    return DSPARK_OK;
}

// Does any session of the step schedule by the profile?
static int dspark__wants_profile(dspark_session **sessions, int n) {
    for (int i = 0; i < n; i++)
        if (dspark__config(sessions[i])->n_stages && !sessions[i]->desc.policy.plain &&
            !dspark__is_forced(sessions[i]))
            return 1;
    return 0;
}

DSPARK_API dspark_status dspark_step(dspark_session **sessions, int n, const dspark_step_desc *desc,
                                     dspark_step_result *results) {
    dspark_model *m;
    dspark_status status = DSPARK_OK;
    int prompt_rows = desc ? desc->prompt_rows : 0;
    double start;
    if (n < 1 || !sessions || !results)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "step: %d sessions, expected 1 or more, and two arrays", n);
    m = sessions[0] ? sessions[0]->model : NULL;
    for (int i = 0; i < n; i++)
        if (!sessions[i]) return dspark__fail(DSPARK_ERROR_ARGUMENT, "step: session %d is NULL", i);
        else if (sessions[i]->model != m)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "step: session %d is of another model", i);
    for (int i = 0; i < n; i++) sessions[i]->place = i;
    for (int i = 0; i < n; i++)
        if (sessions[i]->place != i)
            return dspark__fail(DSPARK_ERROR_ARGUMENT, "step: sessions %d and %d are one", i, sessions[i]->place);
    if (!m->n_profiles && dspark__wants_profile(sessions, n)) {
        dspark_profile p;
        status = m->memory_limit ? dspark_model_set_profile(m, NULL) : dspark_model_profile(m, &p);
        if (status) return status;
    }
    start = dspark__now_us();
    // as many sessions a pass as its rows allow
    for (int i = 0; i < n && !status;) {
        dspark__lane *lanes = m->batch.lanes;
        int open = 0, some, rows;
        for (; i < n && open < m->max_rows; i++) open += dspark__lane_open(&lanes[open], sessions[i], &results[i]);
        for (; open > 0 && !status; lanes += some, open -= some) {
            some = dspark__fitting(m, lanes, open, &rows);
            dspark__share_rows(lanes, some, m->max_rows - rows, prompt_rows);
            status = dspark__cycle(m, lanes, some, start);
        }
    }
    return status;
}

// ---- statistics

static double dspark__quantile_us(const dspark_stats *t, double p) {
    double below = 0, all = 0, top = 2;
    for (int i = 0; i < DSPARK_BUCKETS; i++) all += (double)t->token_us[i];
    for (int i = 0; i < DSPARK_BUCKETS - 1; i++, top *= 1.4142135623730951)
        if ((below += (double)t->token_us[i]) >= p * all) break;
    return all > 0 ? top : 0;
}

DSPARK_API dspark_summary dspark_stats_summary(const dspark_stats *t) {
    dspark_summary s;
    s.tau = t->steps ? (double)(t->steps + t->accepted - t->cut) / (double)t->steps : 0;
    s.rejection_rate = t->scheduled ? 1 - (double)t->accepted / (double)t->scheduled : 0;
    s.accepted_us = t->accepted ? (t->draft_us + t->verify_us) / (double)t->accepted : 0;
    s.p50_us = dspark__quantile_us(t, .5), s.p95_us = dspark__quantile_us(t, .95);
    return s;
}

typedef struct { char *text; int cap, n; } dspark__writer;
DSPARK__PRINTF static void dspark__write(dspark__writer *w, const char *format, ...) {
    int left = dspark__max(w->cap - w->n, 0), n;
    va_list args;
    va_start(args, format);
    n = vsnprintf(left ? w->text + w->n : NULL, (size_t)left, format, args);
    va_end(args);
    w->n += dspark__max(n, 0);
}

static void dspark__write_value(dspark__writer *w, const char *name, const char *labels, double value) {
    const char *open = *labels ? "{" : "", *close = *labels ? "}" : "";
    char number[32];
    dspark__write(w, "dspark_%s%s%s%s %s\n", name, open, labels, close, dspark__decimal(number, value, 15));
}
static void dspark__write_counter(dspark__writer *w, const char *name, const char *labels, double value) {
    dspark__write(w, "# TYPE dspark_%s counter\n", name);
    dspark__write_value(w, name, labels, value);
}
static void dspark__write_by_position(dspark__writer *w, const char *name, const char *labels, const int64_t *count) {
    int n = DSPARK_MAX_BLOCK;
    while (n && !count[n - 1]) n--;
    dspark__write(w, "# TYPE dspark_%s counter\n", name);
    for (int k = 0; k < n; k++)
        dspark__write(w, "dspark_%s{%s%sposition=\"%d\"} %lld\n", name, labels, *labels ? "," : "", k,
                      (long long)count[k]);
}

DSPARK_API int dspark_stats_prometheus(const dspark_stats *t, const char *labels, char *text, int cap) {
    dspark__writer w = { text, cap, 0 };
    const char *comma = labels && *labels ? "," : "";
    char number[32];
    long long below = 0;
    double top = 2;
    labels = labels ? labels : "";
    dspark__write_counter(&w, "spec_decode_num_drafts_total", labels, (double)t->cycles);
    dspark__write_counter(&w, "spec_decode_num_draft_tokens_total", labels, (double)t->scheduled);
    dspark__write_counter(&w, "spec_decode_num_accepted_tokens_total", labels, (double)t->accepted);
    dspark__write_by_position(&w, "spec_decode_num_draft_tokens_per_pos_total", labels, t->scheduled_by_position);
    dspark__write_by_position(&w, "spec_decode_num_accepted_tokens_per_pos_total", labels, t->accepted_by_position);
    dspark__write_counter(&w, "drafted_tokens_total", labels, (double)t->drafted);
    dspark__write_counter(&w, "generation_tokens_total", labels, (double)t->emitted);
    dspark__write_counter(&w, "steps_total", labels, (double)t->steps);
    dspark__write_counter(&w, "draft_seconds_total", labels, 1e-6 * t->draft_us);
    dspark__write_counter(&w, "verify_seconds_total", labels, 1e-6 * t->verify_us);
    dspark__write(&w, "# TYPE dspark_time_per_output_token_seconds histogram\n");
    for (int i = 0; i < DSPARK_BUCKETS; i++, top *= 1.4142135623730951) {
        below += t->token_us[i];
        if (i < DSPARK_BUCKETS - 1 && (i % 2 || !below)) continue;
        dspark__write(&w, "dspark_time_per_output_token_seconds_bucket{%s%sle=\"", labels, comma);
        dspark__write(&w, "%s\"} %lld\n",
                      i == DSPARK_BUCKETS - 1 ? "+Inf" : dspark__decimal(number, 1e-6 * top, 6), below);
    }
    dspark__write_value(&w, "time_per_output_token_seconds_sum", labels, 1e-6 * t->step_us);
    dspark__write_value(&w, "time_per_output_token_seconds_count", labels, (double)below);
    return w.n;
}

DSPARK_API const char *dspark_finish_name(int finish) {
    static const char *const names[] = { "running", "stop_token", "stop_string", "length", "context" };
    return finish >= 0 && finish <= DSPARK_CONTEXT ? names[finish] : "unknown finish";
}

DSPARK_API int dspark_step_json(const dspark_step_result *r, int64_t id, char *text, int cap) {
    dspark__writer w = { text, cap, 0 };
    char number[3][32];
    dspark__write(&w, "{\"session\": %lld, \"status\": \"%s\", \"finish\": \"%s\", \"tokens\": [", (long long)id,
                  dspark_status_name(r->status), dspark_finish_name(r->finish));
    for (int i = 0; i < r->n_tokens; i++) dspark__write(&w, "%s%d", i ? ", " : "", (int)r->tokens[i]);
    dspark__write(&w, "], \"drafted\": %d, \"scheduled\": %d, \"accepted\": %d, \"draft\": [", r->n_drafted,
                  r->n_scheduled, r->n_accepted);
    for (int k = 0; k < r->n_drafted; k++) dspark__write(&w, "%s%d", k ? ", " : "", (int)r->draft[k]);
    dspark__write(&w, "], \"confidence\": [");
    for (int k = 0; k < r->n_drafted; k++)
        dspark__write(&w, "%s%s", k ? ", " : "", dspark__decimal(number[0], (double)r->confidence[k], 4));
    dspark__write(&w, "], \"draft_us\": %s, \"verify_us\": %s, \"step_us\": %s}\n",
                  dspark__decimal(number[0], (double)r->draft_us, 7),
                  dspark__decimal(number[1], (double)r->verify_us, 7),
                  dspark__decimal(number[2], (double)r->step_us, 7));
    return w.n;
}

DSPARK_API dspark_status dspark_session_draft(dspark_session *s, int32_t anchor, int32_t *tokens,
                                              float *confidence_logits, float *logits) {
    dspark_model *m = s->model;
    const dspark_config *c = &m->checkpoint.config;
    size_t V = (size_t)c->vocab_size;
    dspark__lane lane;
    dspark_pass pass;
    dspark_pass_result out;
    dspark_status status;
    if (!c->n_stages) return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "draft: the checkpoint has no drafter");
    if (s->n_run != s->n_tokens || s->n_run < 1 || anchor < 0 || anchor >= c->vocab_size)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "draft: %d of %d tokens have been run, anchor %d of %d",
                            s->n_run, s->n_tokens, (int)anchor, c->vocab_size);
    if ((status = dspark__refill(s)) != DSPARK_OK) return status;
    memset(&lane, 0, sizeof lane);
    lane.s = s, lane.n_drafted = c->dspark_block_size;
    s->tokens[s->n_tokens] = anchor;
    dspark__draft_rows(m, &lane, 1, dspark__drawn_there(s), &pass);
    if ((status = dspark__draft_backbone(m, &pass, &out)) != DSPARK_OK) return s->n_injected = 0, status;
    for (int k = 0; k < c->dspark_block_size; k++) {
        m->backend->draft_step(m->device, k, &anchor);
        tokens[k] = anchor = dspark__argmax(out.logits + (size_t)k * V, c->vocab_size);
        confidence_logits[k] = out.confidence_logits[k];
        if (logits) memcpy(logits + (size_t)k * V, out.logits + (size_t)k * V, V * sizeof *logits);
    }
    return DSPARK_OK;
}

DSPARK__SOON_END

// >>kernels
// The arithmetic on vectors, written once, at the end of this file, and compiled once for each path: plain C, AVX2,
// AVX-512, NEON. All paths give the same bits. A sum over k has 16 lanes: lane i takes k = i, i + 16, ... in
// order, each by a fused multiply-add; then lanes 8 apart are added, then 4 apart, 2 apart, 1 apart. If the weights
// are FP8 or FP4, lane i takes 2 i + 1, then 2 i of each 32, as processors' products of bfloat16 pairs do; these
// are exact for such weights and for inputs rounded to FP8. A row is extended with zeros (to a multiple of 32 in a
// linear, of 16 elsewhere). So an output depends neither on the path, nor on other rows, nor on who computes its
// neighbours. Block scales are powers of two and multiply exactly: FP8's go into the input, FP4's into the weight.
// An FP8 weight of NaN counts as +-480.

// y[r][i] = sum over k of w[first + i][k] x[r][k], for i in [0, n); a thread computes i in [begin, end).
typedef struct {
    const dspark_matrix *w;
    int first, n, n_rows;
    const float *const *x;      // [n_rows][cols]; need not be aligned
    float *const *y;            // [n_rows][n]
} dspark__job;

typedef struct {
    const char *name;
    // scratch: dspark__linear_scratch floats
    void (*linear)(const dspark__job *job, int begin, int end, float *scratch);
    // To E4M3 with a scale a block (the last may be short), and back to floats. NaN stays NaN.
    void (*round_fp8)(const float *x, int n, int block, float *y);
    void (*encode_fp8)(const float *x, int n, int block, uint8_t *codes, uint8_t *scales);
    void (*decode_fp8)(const uint8_t *codes, const uint8_t *scales, int n, int block, float *y);
    // E2M1 in blocks of 32, two codes a byte; n is a multiple of 32. NaN becomes 0.
    void (*encode_fp4)(const float *x, int n, uint8_t *codes, uint8_t *scales);
    void (*decode_fp4)(const uint8_t *codes, const uint8_t *scales, int n, float *y);
    // n / 2 adjacent pairs as complex numbers, times turn (cos, sin in turn), or its conjugate if direction is -1
    void (*rope)(float *x, int n, const float *turn, float direction);
    void (*hadamard)(float *y, int n);      // y_i = n^-1/2 sum_j (-1)^popcount(i & j) y_j; n a power of two
    float (*dot)(const float *a, const float *b, int n);
    void (*axpy)(float *y, float a, const float *x, int n);         // y += a x
    // out_k = post_k y + sum_j w_jk x_j for k < K <= 8: w [C][K], x [C][n], out [K][n], which may be x; y NULL: 0
    void (*mix)(const float *x, int C, int n, const float *w, int K, const float *y, const float *post, float *out);
    void (*rms_norm)(const float *x, const float *w, int n, float eps, float *y);       // w NULL: ones
    // weight silu(min(gate, limit)) clamp(up, -limit, limit); limit 0: none; y may be gate or up
    void (*swiglu)(const float *gate, const float *up, int n, float limit, float weight, float *y);
    void (*sigmoid)(float *x, int n);
    void (*tanh)(float *x, int n);
    void (*sqrt_softplus)(float *x, int n);
    // o[h] = sum_j e^(s_hj) row_j / (e^sink_h + sum_j e^(s_hj)), s_hj = scale q_h . row_j; q and o [H][d];
    // scratch [H * n + n]
    void (*attend)(const float *q, int H, int d, const float *const *rows, int n, float scale,
                   const float *sink, float *scratch, float *o);
    // scores_j = sum_h relu(q_h . key_j) w_h; q [H][d], keys [n][d], d whole blocks of 32
    void (*index_scores)(const float *q, const float *w, int H, int d, const float *keys, int n, float *scores);
    // out_i = sum_j softmax_j(gate_ji + ape_ji) kv_ji, i < d, over n > 0 rows
    void (*pool)(const float *const *kv, const float *const *gate, const float *const *ape, int n, int d,
                 float *out);
    // comb [C][C], C <= 8: rows softmaxed, + eps; columns divided by (sum + eps); then iters - 1 times rows, columns
    void (*sinkhorn)(float *comb, int C, int iters, float eps);
} dspark__kernels;

// Products of up to 6 rows of inputs with `groups` times up to 4 rows of weights, one group after the other.
typedef struct {
    const uint8_t *w[4];        // of the first group: n weights each, as they are stored; n a multiple of 32
    const uint8_t *codes[4];    // FP4: their scales, or NULL if `scale` has them; past `end` nothing is read
    const uint8_t *end;
    float *scale;               // room for those of four rows as p_table wants them, [4][n / 32]
    const float *x[6];          // as prepare() leaves them
    float *y[6];                // [row][output]
    int n, groups;
    size_t step;                // bytes of weights a group
    size_t ahead;               // bytes from a row of weights to the one that is prefetched meanwhile
} dspark__product;

// Many rows go in groups of at most this many, whose inputs (scaled, for FP8) stay in the L2 cache.
enum { DSPARK__LINEAR_ROWS = 64 };
static int dspark__linear_rows(int n) { return n < DSPARK__LINEAR_ROWS ? n : DSPARK__LINEAR_ROWS; }

// How many bytes ahead of use weights are prefetched: into the L2 cache, since a line on its way to L1 holds one of
// its few miss buffers.
enum { DSPARK__AHEAD = 8192 };
// 16 more, so that rows do not map to the same lines of the L1 cache.
static size_t dspark__input_stride(int cols) { return ((size_t)cols + 31) / 32 * 32 + 16; }
// Floats of scratch for a thread: rows of inputs; four rows of weights; their scales; those rows decoded; the inputs
// packed, a lane a row.
static size_t dspark__linear_scratch(int cols, int n_rows) {
    size_t rows = (size_t)dspark__linear_rows(n_rows);
    return dspark__input_stride(cols) * (rows + 9 + (rows + 15) / 16 * 16) + 64;
}

static size_t dspark__row_bytes(const dspark_matrix *m) {
    size_t n = (size_t)m->cols;
    if (m->dtype == DSPARK_FP8) return n;
    return m->dtype == DSPARK_FP4 ? n / 2 : m->dtype == DSPARK_F32 ? 4 * n : 2 * n;
}

static float dspark__float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static uint32_t dspark__bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
// 2^e, -126 <= e <= 127
static float dspark__exp2i(int e) { return dspark__float_of((uint32_t)(e + 127) << 23); }
// 2^(byte - 127); 0 is the subnormal 2^-127, 255 (NaN in E8M0) infinity
static float dspark__e8m0(uint8_t byte) { return dspark__float_of(byte ? (uint32_t)byte << 23 : 0x400000u); }
// The exponent of an FP8 block's scale times the 2^8 that decoding leaves out, clamped to -56 .. 71: scaling x by it is
// exact.
static int dspark__fp8_power(uint8_t byte) { return (byte < 63 ? 63 : byte > 190 ? 190 : byte) - 127 + 8; }
// The smallest e with amax / 2^e in the format's range, from the bits: log2f is wrong near powers of two.
static int dspark__fp8_exponent(float amax) {       // 448 = 1.75 * 2^8
    uint32_t u = dspark__bits_of(amax > 1e-4f ? amax : 1e-4f);
    return (int)(u >> 23) - 127 - 8 + ((u & 0x7fffff) > 0x600000);
}
static int dspark__fp4_exponent(float amax) {       // 6 = 1.5 * 2^2
    uint32_t u = dspark__bits_of(amax);
    uint32_t least = 0x01c00000;                    // 6 * 2^-126
    if (u < least) u = least;
    return (int)(u >> 23) - 127 - 2 + ((u & 0x7fffff) > 0x400000);
}

#if defined __GNUC__ && defined __x86_64__
#define DSPARK__X86 1
#elif defined __GNUC__ && defined __aarch64__
#define DSPARK__ARM 1
#endif

// Sets this thread's float mode to round to nearest and keep subnormals, whatever the caller chose; and restores it.
static uint64_t dspark__float_mode_set(void) {
#ifdef DSPARK__X86
    uint64_t old = _mm_getcsr();
    _mm_setcsr(0x1f80 | ((unsigned)old & 0x3f));
    return old;
#elif defined DSPARK__ARM
    uint64_t old, plain;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    plain = old & ~(uint64_t)0x07c80000;            // AHP, DN, FZ, RMode, FZ16
    __asm__ volatile("msr fpcr, %0" : : "r"(plain));
    return old;
#else
    return 0;
#endif
}
static void dspark__float_mode_restore(uint64_t old) {
#ifdef DSPARK__X86
    _mm_setcsr((unsigned)old);
#elif defined DSPARK__ARM
    __asm__ volatile("msr fpcr, %0" : : "r"(old));
#else
    (void)old;
#endif
}

#define DSPARK__PASTE_(a, b) a##_##b
#define DSPARK__PASTE(a, b) DSPARK__PASTE_(a, b)
#define DSPARK__AT(name) DSPARK__PASTE(dspark__##name, DSPARK__PATH)

// Path numbers as in DSPARK_PATH_*, which the preprocessor cannot read; 5: products for 3. What must be fast here is
// unrolled by hand. (GCC's expensive optimizations put a vzeroupper after AVX code: without it, later SSE instructions
// wait for the upper halves, and a draw takes three times as long.)
#ifdef __clang__
#define DSPARK__TARGET(x) DSPARK__PRAGMA(clang attribute push(__attribute__((target(x))), apply_to = function))
#define DSPARK__TARGET_END DSPARK__PRAGMA(clang attribute pop)
#elif defined __GNUC__
#define DSPARK__TARGET(x) DSPARK__PRAGMA(GCC push_options) DSPARK__PRAGMA(GCC target(x))
#define DSPARK__TARGET_END DSPARK__PRAGMA(GCC pop_options)
DSPARK__PASSES("expensive-optimizations")
#pragma GCC diagnostic push     // of GCC's own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
DSPARK__SOON
#define DSPARK__PATH 1
#include "dspark.h"
#undef DSPARK__PATH
DSPARK__SOON_END
#ifdef DSPARK__X86
DSPARK__TARGET("avx2,fma,f16c")
#define DSPARK__PATH 2
#include "dspark.h"
#undef DSPARK__PATH
DSPARK__TARGET_END
DSPARK__TARGET("avx512bf16,avx512vbmi,avx512bw,avx512vl,avx512dq,fma,f16c")
#define DSPARK__PATH 5
#include "dspark.h"
#undef DSPARK__PATH
DSPARK__TARGET_END
DSPARK__TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define DSPARK__PATH 3
#include "dspark.h"
#undef DSPARK__PATH
DSPARK__TARGET_END
#endif
#ifdef DSPARK__ARM
#define DSPARK__PATH 4
#include "dspark.h"
#undef DSPARK__PATH
#endif
#if defined __GNUC__ && !defined __clang__
#pragma GCC diagnostic pop
DSPARK__SOON_END
#endif

// The kernels of a path, or of the best one (DSPARK_PATH_BEST); NULL where machine or build has it not.
static const dspark__kernels *dspark__kernels_choose(int path) {
#ifdef DSPARK__X86
    // Not __builtin_cpu_supports, which says no to everything in runtimes that do without it (zig cc).
    unsigned a, b = 0, c = 0, d, saved = 0;         // saved: the registers that the system saves
    if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    int avx2 = (saved & 0x06) == 0x06 && (c >> 12 & 1) && (c >> 29 & 1) &&              // FMA, F16C
               __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 5 & 1);
    int avx512 = avx2 && (saved & 0xe6) == 0xe6 && (b >> 16 & b >> 17 & b >> 30 & b >> 31 & 1);     // F, DQ, BW, VL
    int bf16 = avx512 && (c >> 1 & 1) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);   // VBMI
    if (bf16 && (path == DSPARK_PATH_BEST || path == DSPARK_PATH_AVX512_BF16)) return &dspark__kernels_bf16;
    if (avx512 && (path == DSPARK_PATH_BEST || path == DSPARK_PATH_AVX512)) return &dspark__kernels_3;
    if (avx2 && (path == DSPARK_PATH_BEST || path == DSPARK_PATH_AVX2)) return &dspark__kernels_2;
#endif
#ifdef DSPARK__ARM
    if (path == DSPARK_PATH_BEST || path == DSPARK_PATH_NEON) return &dspark__kernels_4;
#endif
    return path == DSPARK_PATH_BEST || path == DSPARK_PATH_PLAIN ? &dspark__kernels_1 : NULL;
}

DSPARK__SOON
// >>cpu
// The operations of dspark_backend in plain C: this section says what is computed, >>kernels how vectors are.
// Buffers are [rows][...], a row's stride a multiple of 16 floats. Work is split by rows, by heads and by
// outputs; a sum is never split, so neither threads nor batch change a bit.

enum { DSPARK__INDEX_KEYS = 16 };       // decoded at a time

typedef struct {
    const dspark_config *c;
    const dspark_weights *w;
    const dspark__kernels *k;
    int n_threads, max_rows;
    size_t bytes;
    void *memory;

    const dspark_pass *pass;
    int n_rows, n_logits;
    int *row_segment, *row_position;            // [rows]
    float *turn[2];                             // [rows][rope]: cos, sin of a row's position; theta plain, compressed
    double *freqs[2];                           // [rope / 2]: radians a position

    float *stream, *mixes, *post_comb;          // [rows][C * h], [rows][(2 + C) C], the same
    float *x, *xq, *y;                          // [rows][h]: input of a sub-layer, the same in FP8, its output
    float *qr, *q, *kv, *o, *low, *lowq;        // [rows] [q_lora], [H * D], [D], [H * D], [G * o_lora (+ q_lora)] twice
    float *pool_kv, *pool_gate;                 // [rows][2 D]
    float *index_kv, *index_gate, *index_q, *index_w;   // [rows] [2 I], [2 I], [heads * I], [heads]
    float *gate, *route_weight;                 // [rows] [experts], [experts a token]
    int *route, *expert_rows, *expert_first;    // [rows][K]; [rows * K] (row * K + slot), [experts + 1]
    float *up[2], *down;                        // [rows][K + 1] [widest], [h]: w1 x and w3 x; w2 of their product
    float *main, *main_q;                       // [rows][n_taps * h]
    float *hidden, *logits, *draft_logits;      // [rows] [h], [vocab], [vocab]
    float *markov, *markov_in, *joint, *rnn, *bias;     // [rows] [rank], [2 rank + h], [3 rank], [rank] (s_k), [vocab]
    float *confidence;                          // [rows]: logits
    float *confidence_w;                        // [h + rank]; NULL: none
    float *thread_scratch;                      // [threads][scratch_floats]
    size_t scratch_floats;
    float *attend_scratch;                      // [threads][attend_floats], for the longest context so far
    size_t attend_floats;
    const float **attend_rows;                  // [threads][attend_n]: keys of one row
    int *chosen;                                // [rows][index_topk]: what the indexer picked
    float *index_scores;                        // [threads][attend_n]
    size_t attend_n;
    dspark__job *jobs;
    int n_jobs;
    const float **job_x;
    float **job_y;
    size_t n_pointers;
} dspark__cpu;

// A row's stride: rows a multiple of 4 KiB apart would map to the same lines of the L1 cache.
static int dspark__pad(int n) { return (n + 15) / 16 * 16 + (n % 1024 ? 0 : 16); }
static int dspark__expert_width(const dspark_config *c) {
    return dspark__pad(c->n_shared_experts * c->moe_intermediate_size);
}

// ---- work -------------------------------------------------------------------------------------

typedef void (*dspark__work)(dspark__cpu *, int thread, int item, void *arg);

// Where a share of n things begins; shares are multiples of `each`.
static int dspark__share_of(int n, int each, int share, int n_shares) {
    return dspark__min(each * (int)((int64_t)((n + each - 1) / each) * share / n_shares), n);
}
// Many rows (16 a thread, by measurement) are split by rows in every operation: each input is packed by one thread,
// which finds its rows in its own L2 cache.
static int dspark__many_rows(int n, int n_shares) { return n >= n_shares * 16; }
static int dspark__rows_begin(int n, int share, int n_shares) {
    return dspark__share_of(n, dspark__many_rows(n, n_shares) ? 4 : 1, share, n_shares);
}

// A thread's share of the items, in the float mode that the bits are defined by.
static void dspark__each_share(dspark__cpu *d, int thread, int threads, int n, dspark__work f, void *arg) {
    uint64_t mode = dspark__float_mode_set();
    int end = dspark__rows_begin(n, thread + 1, threads);
    for (int i = dspark__rows_begin(n, thread, threads); i < end; i++) f(d, thread, i, arg);
    dspark__float_mode_restore(mode);
}

// f for each item of [0, n), in any order, on all threads.
static void dspark__each(dspark__cpu *d, int n, dspark__work f, void *arg) {
#ifdef _OPENMP
    if (d->n_threads > 1 && n > 1) {
        #pragma omp parallel num_threads(d->n_threads)
        dspark__each_share(d, omp_get_thread_num(), omp_get_num_threads(), n, f, arg);
        return;
    }
#endif
    dspark__each_share(d, 0, 1, n, f, arg);
}

static float *dspark__scratch(dspark__cpu *d, int thread) {
    return d->thread_scratch + (size_t)thread * d->scratch_floats;
}

// The first of a job's outputs in a share; shares are multiples of 4.
static int dspark__share_begin(const dspark__job *job, int share, int n_shares) {
    return dspark__share_of(job->n, 4, share, n_shares);
}

// A kernel prefetches its weights, except the first ones: these come while the previous job runs.
static void dspark__fetch_first(const dspark__job *job, int begin) {
#ifdef __GNUC__
    const dspark_matrix *w = job->w;
    size_t row = (size_t)(job->first + begin), each = dspark__row_bytes(w),
           left = each * ((size_t)w->rows - row);
    const char *p = (const char *)w->data + each * row;
    for (size_t i = 0; i < 4096 && i < left; i += 64) __builtin_prefetch(p + i, 0, 2);
    if (w->dtype != DSPARK_FP4) return;
    p = (const char *)w->scale + row * (size_t)(w->cols / 32);
    for (size_t i = 0; i < 512 && i < left / 16; i += 64) __builtin_prefetch(p + i, 0, 2);
#else
    (void)job, (void)begin;
#endif
}

static void dspark__run_share(dspark__cpu *d, int thread, int share, void *arg) {
    const int n_shares = *(const int *)arg;
    for (int j = 0; j < d->n_jobs; j++) {
        const dspark__job *next = &d->jobs[j + 1];
        dspark__job job = d->jobs[j];
        int begin = dspark__share_begin(&job, share, n_shares),
            end = dspark__share_begin(&job, share + 1, n_shares);
        if (j + 1 < d->n_jobs) dspark__fetch_first(next, dspark__share_begin(next, share, n_shares));
        if (dspark__many_rows(job.n_rows, n_shares)) {
            int first = dspark__rows_begin(job.n_rows, share, n_shares);
            job.n_rows = dspark__rows_begin(job.n_rows, share + 1, n_shares) - first;
            job.x += first, job.y += first, begin = 0, end = job.n;
        }
        if (begin < end) d->k->linear(&job, begin, end, dspark__scratch(d, thread));
    }
}
static void dspark__run_jobs(dspark__cpu *d) {
    dspark__each(d, d->n_threads, dspark__run_share, &d->n_threads);
    d->n_jobs = 0, d->n_pointers = 0;
}

// The next job: outputs [first, first + n) of w for n_rows rows, which dspark__job_row fills in.
static dspark__job *dspark__job_add(dspark__cpu *d, const dspark_matrix *w, int first, int n, int n_rows) {
    dspark__job *job = &d->jobs[d->n_jobs++];
    job->w = w, job->first = first, job->n = n, job->n_rows = n_rows;
    job->x = d->job_x + d->n_pointers;
    job->y = d->job_y + d->n_pointers;
    d->n_pointers += (size_t)n_rows;
    return job;
}

static void dspark__job_row(dspark__cpu *d, const dspark__job *job, int i, const float *x, float *y) {
    d->job_x[job->x - d->job_x + i] = x;
    d->job_y[job->y - d->job_y + i] = y;
}

// y = w x for every row of the pass; x and y [rows][their stride]
static void dspark__linear(dspark__cpu *d, const dspark_matrix *w, const float *x, int x_stride, float *y,
                           int y_stride) {
    dspark__job *job = dspark__job_add(d, w, 0, w->rows, d->n_rows);
    for (int r = 0; r < d->n_rows; r++)
        dspark__job_row(d, job, r, x + (size_t)r * (size_t)x_stride, y + (size_t)r * (size_t)y_stride);
}

// Quantized matrices take their input rounded (dspark_matrix).
static const float *dspark__input(const dspark_matrix *w, const float *plain, const float *rounded) {
    return w->dtype >= DSPARK_FP8 ? rounded : plain;
}

static float *dspark__row(float *base, int row, int n) { return base + (size_t)row * (size_t)dspark__pad(n); }

// A row of a plain matrix as floats: an embedding.
static void dspark__lookup(const dspark_matrix *w, int32_t row, float *out) {
    size_t first = (size_t)row * (size_t)w->cols;
    for (int i = 0; i < w->cols; i++)
        out[i] = dspark__stored_float((const uint8_t *)w->data, first + (size_t)i, w->dtype);
}

// ---- rotary embedding -------------------------------------------------------------------------

// Radians a position for each pair of the rotary dims, [rope / 2]; compressed: YaRN's, which slows the pairs
// that turn fewer than beta_slow times within the original length, and leaves those above beta_fast.
static void dspark__rope_freqs(const dspark_config *c, int compressed, double *freqs) {
    int d = c->qk_rope_head_dim;
    double log_base = dspark__log(compressed ? c->compress_rope_theta : c->rope_theta),
           L = c->rope_original_length;
    double turns_fast = d * dspark__log(L / (c->rope_beta_fast * 6.283185307179586)) / (2 * log_base);
    double turns_slow = d * dspark__log(L / (c->rope_beta_slow * 6.283185307179586)) / (2 * log_base);
    double low = fmax(floor(turns_fast), 0), high = fmin(ceil(turns_slow), d - 1);
    for (int i = 0; i < d / 2; i++) {
        double f = dspark__exp(-log_base * (2.0 * i / d)), ramp = (i - low) / fmax(high - low, 1e-3);
        ramp = fmin(fmax(ramp, 0), 1);
        freqs[i] = compressed && c->rope_factor != 1 ? f * (1 - ramp) + f / c->rope_factor * ramp : f;
    }
}

static void dspark__rope_angles(const double *freqs, int n, int position, float *turn) {
    for (int i = 0; i < n; i++) {
        double s, c;
        dspark__sincos(position * freqs[i], &s, &c);
        turn[2 * i] = (float)c, turn[2 * i + 1] = (float)s;
    }
}

// Rotates the rotary dims of x [n], which are its last; direction -1: back.
static void dspark__rope(const dspark__cpu *d, float *x, int n, const float *turn, float direction) {
    d->k->rope(x + n - d->c->qk_rope_head_dim, d->c->qk_rope_head_dim, turn, direction);
}

// ---- a pass -----------------------------------------------------------------------------------

static void dspark__embed_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark_config *c = d->c;
    float *copies = dspark__row(d->stream, r, c->hc_mult * c->hidden_size);
    (void)thread, (void)arg;
    dspark__lookup(&d->w->embed, d->pass->ids[r], copies);
    for (int j = 1; j < c->hc_mult; j++)
        memcpy(copies + j * c->hidden_size, copies, (size_t)c->hidden_size * sizeof(float));
    for (int set = 0; set < 2; set++)
        dspark__rope_angles(d->freqs[set], c->qk_rope_head_dim / 2, d->row_position[r],
                            dspark__row(d->turn[set], r, c->qk_rope_head_dim));
}

static dspark_status dspark__cpu_pass_begin(void *device, const dspark_pass *pass) {
    dspark__cpu *d = (dspark__cpu *)device;
    if (pass->n_rows < 1 || pass->n_rows > d->max_rows)
        return dspark__fail(DSPARK_ERROR_ARGUMENT, "a pass of %d rows: expected 1 to %d", pass->n_rows,
                            d->max_rows);
    d->pass = pass, d->n_rows = pass->n_rows, d->n_logits = 0;
    for (int s = 0; s < pass->n_segments; s++)
        for (int i = 0; i < pass->segments[s].n_rows; i++) {
            d->row_segment[pass->segments[s].row + i] = s;
            d->row_position[pass->segments[s].row + i] = pass->segments[s].position + i;
        }
    dspark__each(d, d->n_rows, dspark__embed_row, NULL);
    return DSPARK_OK;
}

// ---- hyper-connections ------------------------------------------------------------------------

// m = (fn z) rsqrt(mean z^2 + eps) for a row; z is the stream.
static void dspark__mix_scale(dspark__cpu *d, int r, float *m, int n) {
    const dspark_config *c = d->c;
    int width = c->hc_mult * c->hidden_size;
    const float *z = dspark__row(d->stream, r, width);
    float scale = 1 / sqrtf(d->k->dot(z, z, width) / (float)width + c->rms_norm_eps);
    for (int i = 0; i < n; i++) m[i] *= scale;
}

// x [h] = sum_j pre_j copy_j, pre_j = sigmoid(m_j scale + base_j) + eps
static void dspark__mix_copies(dspark__cpu *d, int r, const float *pre, float *x) {
    const dspark_config *c = d->c;
    const float *stream = dspark__row(d->stream, r, c->hc_mult * c->hidden_size);
    d->k->mix(stream, c->hc_mult, c->hidden_size, pre, 1, NULL, NULL, x);
}

typedef struct { const dspark_mix *mix; const float *norm; } dspark__mix_arg;

static void dspark__mix_in_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark__mix_arg *a = (const dspark__mix_arg *)arg;
    const dspark_config *c = d->c;
    int C = c->hc_mult, n = (2 + C) * C;
    float *m = dspark__row(d->mixes, r, n), *post = dspark__row(d->post_comb, r, n), pre[16];
    const float *base = a->mix->base, *scale = a->mix->scale;
    float *x = dspark__row(d->x, r, c->hidden_size);
    (void)thread;
    dspark__mix_scale(d, r, m, n);
    for (int j = 0; j < C; j++) pre[j] = m[j] * scale[0] + base[j];
    for (int j = 0; j < C; j++) post[j] = m[C + j] * scale[1] + base[C + j];
    for (int j = 2 * C; j < n; j++) post[j - C] = m[j] * scale[2] + base[j];
    d->k->sigmoid(pre, C);
    d->k->sigmoid(post, C);
    for (int j = 0; j < C; j++) pre[j] += c->hc_eps, post[j] *= 2;
    d->k->sinkhorn(post + C, C, c->hc_sinkhorn_iters, c->hc_eps);
    dspark__mix_copies(d, r, pre, x);
    d->k->rms_norm(x, a->norm, c->hidden_size, c->rms_norm_eps, x);
    d->k->round_fp8(x, c->hidden_size, 128, dspark__row(d->xq, r, c->hidden_size));
}

static void dspark__mix_project(dspark__cpu *d, const dspark_mix *mix) {
    dspark__linear(d, &mix->fn, d->stream, dspark__pad(d->c->hc_mult * d->c->hidden_size), d->mixes,
                   dspark__pad((2 + d->c->hc_mult) * d->c->hc_mult));
    dspark__run_jobs(d);
}

static void dspark__cpu_mix_in(void *device, int layer, int sub) {
    dspark__cpu *d = (dspark__cpu *)device;
    const dspark_layer *l = &d->w->layers[layer];
    dspark__mix_arg a;
    a.mix = sub == DSPARK_SUB_ATTN ? &l->hc_attn : &l->hc_ffn;
    a.norm = sub == DSPARK_SUB_ATTN ? l->attn_norm : l->ffn_norm;
    dspark__mix_project(d, a.mix);
    dspark__each(d, d->n_rows, dspark__mix_in_row, &a);
}

// copy_k = post_k y + sum_j comb_jk copy_j, the sum over comb's first index
static void dspark__mix_out_row(dspark__cpu *d, int thread, int r, void *arg) {
    int C = d->c->hc_mult, h = d->c->hidden_size;
    const float *post = dspark__row(d->post_comb, r, (2 + C) * C);
    float *stream = dspark__row(d->stream, r, C * h);
    (void)thread, (void)arg;
    d->k->mix(stream, C, h, post + C, C, dspark__row(d->y, r, h), post, stream);
}

static void dspark__cpu_mix_out(void *device, int layer, int sub) {
    dspark__cpu *d = (dspark__cpu *)device;
    (void)layer, (void)sub;
    dspark__each(d, d->n_rows, dspark__mix_out_row, NULL);
}

// ---- attention --------------------------------------------------------------------------------

static dspark__layer_state *dspark__state_of(dspark__cpu *d, int segment, int layer) {
    return &((dspark__state *)d->pass->segments[segment].state)->layers[layer];
}

// The first product of everything that reads x: queries, the row, what the compressors will pool.
static void dspark__attn_project(dspark__cpu *d, const dspark_layer *l) {
    const dspark_config *c = d->c;
    int h = dspark__pad(c->hidden_size), w = dspark__pad(2 * c->head_dim),
        i = dspark__pad(2 * c->index_head_dim);
    dspark__linear(d, &l->wq_a, dspark__input(&l->wq_a, d->x, d->xq), h, d->qr, dspark__pad(c->q_lora_rank));
    dspark__linear(d, &l->wkv, dspark__input(&l->wkv, d->x, d->xq), h, d->kv, dspark__pad(c->head_dim));
    if (l->ratio && d->pass->kind == DSPARK_PASS_TARGET) {
        const dspark_matrix *kv = &l->compressor.wkv, *gate = &l->compressor.wgate;
        dspark__linear(d, kv, dspark__input(kv, d->x, d->xq), h, d->pool_kv, w);
        dspark__linear(d, gate, dspark__input(gate, d->x, d->xq), h, d->pool_gate, w);
    }
    if (l->ratio == 4) {
        const dspark_matrix *kv = &l->index_compressor.wkv, *gate = &l->index_compressor.wgate;
        dspark__linear(d, &l->index_weights, dspark__input(&l->index_weights, d->x, d->xq), h, d->index_w,
                       dspark__pad(c->index_n_heads));
        dspark__linear(d, kv, dspark__input(kv, d->x, d->xq), h, d->index_kv, i);
        dspark__linear(d, gate, dspark__input(gate, d->x, d->xq), h, d->index_gate, i);
    }
    dspark__run_jobs(d);
}

// kv_norm, RoPE, FP8 in blocks of 64 on the other dims: a row as the window holds it.
static void dspark__finish_row(dspark__cpu *d, const float *norm, const float *turn, float *kv) {
    const dspark_config *c = d->c;
    d->k->rms_norm(kv, norm, c->head_dim, c->rms_norm_eps, kv);
    dspark__rope(d, kv, c->head_dim, turn, 1);
    d->k->round_fp8(kv, c->head_dim - c->qk_rope_head_dim, 64, kv);
}

static void dspark__attn_norm_row(dspark__cpu *d, int r, const dspark_layer *l) {
    const dspark_config *c = d->c;
    float *qr = dspark__row(d->qr, r, c->q_lora_rank),
          *turn = dspark__row(d->turn[l->ratio > 0], r, c->qk_rope_head_dim);
    d->k->rms_norm(qr, l->q_norm, c->q_lora_rank, c->rms_norm_eps, qr);
    d->k->round_fp8(qr, c->q_lora_rank, 128,
                    dspark__row(d->low, r, c->o_groups * c->o_lora_rank + c->q_lora_rank));
    dspark__finish_row(d, l->kv_norm, turn, dspark__row(d->kv, r, c->head_dim));
}

// qr's rounded copy borrows `low`, which the output projection needs later.
static void dspark__attn_queries(dspark__cpu *d, const dspark_layer *l) {
    const dspark_config *c = d->c;
    int qr = dspark__pad(c->q_lora_rank), low = dspark__pad(c->o_groups * c->o_lora_rank + c->q_lora_rank);
    int rounded = l->wq_b.dtype >= DSPARK_FP8;
    dspark__linear(d, &l->wq_b, rounded ? d->low : d->qr, rounded ? low : qr, d->q,
                   dspark__pad(c->num_attention_heads * c->head_dim));
    if (l->ratio == 4) {
        rounded = l->index_wq_b.dtype >= DSPARK_FP8;
        dspark__linear(d, &l->index_wq_b, rounded ? d->low : d->qr, rounded ? low : qr, d->index_q,
                       dspark__pad(c->index_n_heads * c->index_head_dim));
    }
    dspark__run_jobs(d);
}

// ---- compressed rows

// The members of group i, oldest first, from this pass or from the ring; returns their number. With ratio 4, the
// group before gives its first halves, this one its second halves; before group 0 there is none.
static int dspark__group(const dspark__cpu *d, const dspark_segment *s, const dspark_compressor *p, int i,
                         const float *pass_rows, int stride, const float *ring, const float **rows,
                         const float **ape) {
    int r = p->ratio, overlap = r == 4, n = 0, n_ring = dspark__raw_ring(d->c, r);
    for (int t = dspark__max(0, overlap ? (i - 1) * r : i * r); t < (i + 1) * r; t++) {
        int second = overlap && t >= i * r ? p->d : 0;
        const float *row = t >= s->position ? pass_rows + (size_t)(s->row + t - s->position) * (size_t)stride
                                            : ring + (size_t)(t % n_ring) * (size_t)p->w;
        rows[n] = row + second;
        ape[n++] = p->ape + (size_t)(t % r) * (size_t)p->w + second;
    }
    return n;
}

// Row i of a compressor, [d]: pooled by the gates' softmax over its tokens, normed, rotated to its first
// position.
static void dspark__pool(dspark__cpu *d, const dspark_segment *s, const dspark_compressor *p, int i,
                         const float *kv, const float *gate, int stride, const float *ring_kv,
                         const float *ring_gate, float *out) {
    const dspark_config *c = d->c;
    const float *rows[3][256];
    float turn[256];
    int n = dspark__group(d, s, p, i, kv, stride, ring_kv, rows[0], rows[2]);
    dspark__group(d, s, p, i, gate, stride, ring_gate, rows[1], rows[2]);
    d->k->pool(rows[0], rows[1], rows[2], n, p->d, out);
    d->k->rms_norm(out, p->norm, p->d, c->rms_norm_eps, out);
    dspark__rope_angles(d->freqs[1], c->qk_rope_head_dim / 2, i * p->ratio, turn);
    dspark__rope(d, out, p->d, turn, 1);
}

// If row r completes a group: the compressed row and, in CSA, its index key.
static void dspark__compress_row(dspark__cpu *d, int thread, int r, int layer) {
    const dspark_layer *l = &d->w->layers[layer];
    const dspark_config *c = d->c;
    const dspark_segment *s = &d->pass->segments[d->row_segment[r]];
    dspark__layer_state *state = dspark__state_of(d, d->row_segment[r], layer);
    int position = d->row_position[r], D = c->head_dim, R = c->qk_rope_head_dim, I = c->index_head_dim;
    float *row = dspark__scratch(d, thread);
    size_t i = (size_t)(position / l->ratio);
    if ((position + 1) % l->ratio || s->keep_rows) return;
    dspark__pool(d, s, &l->compressor, (int)i, d->pool_kv, d->pool_gate, dspark__pad(2 * D), state->kv,
                 state->gate, row);
    d->k->encode_fp8(row, D - R, 64, state->codes + i * (size_t)(D - R),
                     state->scales + i * (size_t)dspark__blocks(D - R, 64));
    memcpy(state->rope + i * (size_t)R, row + D - R, (size_t)R * sizeof(float));
    if (l->ratio != 4) return;
    dspark__pool(d, s, &l->index_compressor, (int)i, d->index_kv, d->index_gate, dspark__pad(2 * I),
                 state->index_kv, state->index_gate, row);
    d->k->hadamard(row, I);
    d->k->encode_fp4(row, I, state->key_codes + i * (size_t)(I / 2),
                     state->key_scales + i * (size_t)(I / 32));
}

// The part of a row's work that needs only its projections.
static void dspark__attn_row(dspark__cpu *d, int thread, int r, void *arg) {
    int layer = *(const int *)arg;
    dspark__attn_norm_row(d, r, &d->w->layers[layer]);
    if (d->w->layers[layer].ratio && d->pass->kind == DSPARK_PASS_TARGET) dspark__compress_row(d, thread, r, layer);
}

// ---- the indexer

// index_q [heads][I]: RoPE, Hadamard, FP4; index_w scaled by (I heads)^-1/2.
static void dspark__index_query(dspark__cpu *d, int r, const float *turn, float *scratch) {
    const dspark_config *c = d->c;
    int I = c->index_head_dim, H = c->index_n_heads;
    float *q = dspark__row(d->index_q, r, H * I), *w = dspark__row(d->index_w, r, H);
    uint8_t *codes = (uint8_t *)scratch, *scales = codes + I;
    float scale = 1 / sqrtf((float)I) * (1 / sqrtf((float)H));
    for (int h = 0; h < H; h++) {
        dspark__rope(d, q + h * I, I, turn, 1);
        d->k->hadamard(q + h * I, I);
        d->k->encode_fp4(q + h * I, I, codes, scales);
        d->k->decode_fp4(codes, scales, I, q + h * I);
        w[h] *= scale;
    }
}

// The k largest of scores [n], ascending by index; among equals the lower index wins.
static void dspark__top_few(const float *scores, int n, int k, int *chosen) {
    for (int i = 0, n_chosen = 0; n_chosen < k && i < n; i++) {
        int before = 0;
        for (int j = 0; j < n; j++) before += j < i ? scores[j] >= scores[i] : scores[j] > scores[i];
        if (before < k) chosen[n_chosen++] = i;
    }
}

// The same for any n. The k-th largest is found a byte at a time, by counting, until all scores that begin with the
// bytes found belong to the k.
static void dspark__top(const float *scores, int n, int k, int *chosen) {
    uint32_t kth = 0;
    int equal = k, n_chosen = 0, done = 0;  // how many of those equal to the k-th belong to the k
    if (n <= 32) {
        dspark__top_few(scores, n, k, chosen);
        return;
    }
    for (int shift = 24; shift >= 0 && !done; shift -= 8) {
        int counts[256] = { 0 }, digit = 255;
        for (int i = 0; i < n; i++) {
            uint32_t u = dspark__ordered(scores[i]);
            if (shift == 24 || (u ^ kth) >> (shift + 8) == 0) counts[u >> shift & 255]++;
        }
        while (counts[digit] < equal) equal -= counts[digit--];
        kth |= (uint32_t)digit << shift, done = counts[digit] == equal;
    }
    for (int i = 0; i < n; i++) {
        uint32_t u = dspark__ordered(scores[i]);
        if (u > kth || (u == kth && equal-- > 0)) chosen[n_chosen++] = i;
    }
}

static void dspark__index_row(dspark__cpu *d, int thread, int r, void *arg) {
    int layer = *(const int *)arg;
    const dspark_config *c = d->c;
    const dspark__layer_state *state = dspark__state_of(d, d->row_segment[r], layer);
    int n = (d->row_position[r] + 1) / 4, I = c->index_head_dim, H = c->index_n_heads;
    float *scores = d->index_scores + (size_t)thread * d->attend_n, *keys = dspark__scratch(d, thread);
    const float *q = dspark__row(d->index_q, r, H * I), *w = dspark__row(d->index_w, r, H);
    if (n <= c->index_topk) return;         // all are taken
    dspark__index_query(d, r, dspark__row(d->turn[1], r, c->qk_rope_head_dim), keys);
    for (int i = 0, some; i < n; i += some) {
        some = dspark__min(n - i, DSPARK__INDEX_KEYS);
        d->k->decode_fp4(state->key_codes + (size_t)i * (size_t)(I / 2),
                         state->key_scales + (size_t)i * (size_t)(I / 32), some * I, keys);
        d->k->index_scores(q, w, H, I, keys, some, scores + i);
    }
    dspark__top(scores, n, c->index_topk, d->chosen + (size_t)r * (size_t)c->index_topk);
}

// ---- who is seen

// Window rows that row r sees, oldest first: of the ring before this pass, then of the pass. Drafts see the
// whole block.
static int dspark__window_rows(dspark__cpu *d, int r, int layer, const float **rows) {
    const dspark_config *c = d->c;
    const dspark_segment *s = &d->pass->segments[d->row_segment[r]];
    const float *ring = dspark__state_of(d, d->row_segment[r], layer)->window;
    int drafts = d->pass->kind == DSPARK_PASS_DRAFT, n = 0;
    int last = drafts ? s->position + s->n_rows - 1 : d->row_position[r];
    int first = (drafts ? s->position : last + 1) - c->sliding_window;
    for (int p = dspark__max(0, first); p <= last; p++)
        rows[n++] = p < s->position ? ring + (size_t)(p % dspark__ring(c)) * (size_t)c->head_dim
                                    : dspark__row(d->kv, s->row + p - s->position, c->head_dim);
    return n;
}

// Compressed rows that row r sees, decoded into room [][D].
static int dspark__compressed_rows(dspark__cpu *d, int r, int layer, float *room, const float **rows) {
    const dspark_config *c = d->c;
    const dspark__layer_state *state = dspark__state_of(d, d->row_segment[r], layer);
    int ratio = d->w->layers[layer].ratio, D = c->head_dim, R = c->qk_rope_head_dim,
        blocks = dspark__blocks(D - R, 64);
    int n = (d->row_position[r] + 1) / ratio, selected = ratio == 4 && n > c->index_topk;
    if (selected) n = c->index_topk;
    for (int m = 0; m < n; m++, room += dspark__pad(D)) {
        size_t i = (size_t)(selected ? d->chosen[(size_t)r * (size_t)c->index_topk + (size_t)m] : m);
        d->k->decode_fp8(state->codes + i * (size_t)(D - R), state->scales + i * (size_t)blocks, D - R, 64,
                         room);
        memcpy(room + D - R, state->rope + i * (size_t)R, (size_t)R * sizeof(float));
        rows[m] = room;
    }
    return n;
}

typedef struct { int layer, parts; } dspark__attend_arg;

// Some heads of a row: queries divided by their RMS and rotated; softmax over the rows seen and the sink;
// outputs rotated back.
static void dspark__attend_part(dspark__cpu *d, int thread, int item, void *arg) {
    const dspark__attend_arg *a = (const dspark__attend_arg *)arg;
    const dspark_config *c = d->c;
    const dspark_layer *l = &d->w->layers[a->layer];
    int r = item / a->parts, part = item % a->parts, H = c->num_attention_heads, D = c->head_dim;
    int first = H * part / a->parts, n_heads = H * (part + 1) / a->parts - first, n;
    float *q = dspark__row(d->q, r, H * D) + first * D, *o = dspark__row(d->o, r, H * D) + first * D;
    float *turn = dspark__row(d->turn[l->ratio > 0], r, c->qk_rope_head_dim);
    float *room = d->attend_scratch + (size_t)thread * d->attend_floats;
    const float **rows = d->attend_rows + (size_t)thread * d->attend_n;
    for (int h = 0; h < n_heads; h++) {
        d->k->rms_norm(q + h * D, NULL, D, c->rms_norm_eps, q + h * D);
        dspark__rope(d, q + h * D, D, turn, 1);
    }
    n = dspark__window_rows(d, r, a->layer, rows);
    if (l->ratio) {
        int n_compressed = dspark__compressed_rows(d, r, a->layer, room, rows + n);
        n += n_compressed, room += n_compressed * dspark__pad(D);
    }
    d->k->attend(q, n_heads, D, rows, n, 1 / sqrtf((float)D), l->attn_sink + first, room, o);
    for (int h = 0; h < n_heads; h++) dspark__rope(d, o + h * D, D, turn, -1);
}

// Group g's heads times its slice of wo_a (unrounded input), all groups' results times wo_b.
static void dspark__round_low(dspark__cpu *d, int thread, int r, void *arg) {
    int n = d->c->o_groups * d->c->o_lora_rank;
    (void)thread, (void)arg;
    d->k->round_fp8(dspark__row(d->low, r, n + d->c->q_lora_rank), n, 128, dspark__row(d->lowq, r, n));
}
static void dspark__attn_output(dspark__cpu *d, const dspark_layer *l) {
    const dspark_config *c = d->c;
    int G = c->o_groups, rank = c->o_lora_rank, wide = c->num_attention_heads * c->head_dim;
    int low = dspark__pad(G * rank + c->q_lora_rank), rounded = l->wo_b.dtype >= DSPARK_FP8;
    for (int g = 0; g < G; g++) {
        dspark__job *job = dspark__job_add(d, &l->wo_a, g * rank, rank, d->n_rows);
        for (int r = 0; r < d->n_rows; r++)
            dspark__job_row(d, job, r, dspark__row(d->o, r, wide) + g * (wide / G),
                            d->low + (size_t)r * (size_t)low + g * rank);
    }
    dspark__run_jobs(d);
    if (rounded) dspark__each(d, d->n_rows, dspark__round_low, NULL);
    dspark__linear(d, &l->wo_b, rounded ? d->lowq : d->low, rounded ? dspark__pad(G * rank) : low, d->y,
                   dspark__pad(c->hidden_size));
    dspark__run_jobs(d);
}

// This pass's rows into the rings; a row that a later one of the pass would overwrite is left out.
static void dspark__ring_put(float *ring, int n_ring, int w, const dspark_segment *s, const float *rows,
                             int stride) {
    for (int i = dspark__max(0, s->n_rows - n_ring); i < s->n_rows; i++)
        memcpy(ring + (size_t)((s->position + i) % n_ring) * (size_t)w,
               rows + (size_t)(s->row + i) * (size_t)stride, (size_t)w * sizeof *ring);
}
static void dspark__attn_commit(dspark__cpu *d, int layer) {
    const dspark_config *c = d->c;
    const dspark_layer *l = &d->w->layers[layer];
    for (int i = 0; i < d->pass->n_segments; i++) {
        const dspark_segment *s = &d->pass->segments[i];
        dspark__layer_state *state = dspark__state_of(d, i, layer);
        int raw = dspark__raw_ring(c, l->ratio), D = dspark__pad(2 * c->head_dim),
            I = dspark__pad(2 * c->index_head_dim);
        dspark__ring_put(state->window, dspark__ring(c), c->head_dim, s, d->kv, dspark__pad(c->head_dim));
        if (!l->ratio) continue;
        dspark__ring_put(state->kv, raw, l->compressor.w, s, d->pool_kv, D);
        dspark__ring_put(state->gate, raw, l->compressor.w, s, d->pool_gate, D);
        if (l->ratio != 4) continue;
        dspark__ring_put(state->index_kv, raw, l->index_compressor.w, s, d->index_kv, I);
        dspark__ring_put(state->index_gate, raw, l->index_compressor.w, s, d->index_gate, I);
    }
}

static void dspark__cpu_attention(void *device, int layer) {
    dspark__cpu *d = (dspark__cpu *)device;
    const dspark_layer *l = &d->w->layers[layer];
    int target = d->pass->kind == DSPARK_PASS_TARGET;
    dspark__attend_arg a;
    a.layer = layer,
    a.parts = d->n_rows < d->n_threads ? dspark__min(d->n_threads, d->c->num_attention_heads) : 1;
    dspark__attn_project(d, l);
    dspark__each(d, d->n_rows, dspark__attn_row, &layer);
    dspark__attn_queries(d, l);
    if (target && l->ratio == 4) dspark__each(d, d->n_rows, dspark__index_row, &layer);
    dspark__each(d, d->n_rows * a.parts, dspark__attend_part, &a);
    if (target) dspark__attn_commit(d, layer);
    dspark__attn_output(d, l);
}

// ---- experts ----------------------------------------------------------------------------------

static int dspark__hash_expert(const dspark_layer *l, int32_t id, int k, int n) {
    const uint8_t *p = l->tid2eid + ((size_t)id * (size_t)n + (size_t)k) * (size_t)l->tid2eid_bytes;
    return p[0] | p[1] << 8 | p[2] << 16;       // checked when the model opened
}

// scores = sqrt(softplus(gate x)); the experts with the largest scores + bias, or the token's own; weights are
// the scores without bias over their sum. Slots are in ascending order of experts, the order of summing.
static void dspark__route_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark_layer *l = (const dspark_layer *)arg;
    const dspark_config *c = d->c;
    int E = c->n_routed_experts, K = c->num_experts_per_tok, *route = d->route + (size_t)r * (size_t)K;
    float *scores = dspark__row(d->gate, r, E), *weight = d->route_weight + (size_t)r * (size_t)K, sum = 0;
    float *biased = dspark__scratch(d, thread);
    d->k->sqrt_softplus(scores, E);
    if (l->tid2eid) {
        for (int k = 0; k < K; k++) {
            int e = dspark__hash_expert(l, d->pass->ids[r], k, K), at = k;
            for (; at && route[at - 1] > e; at--) route[at] = route[at - 1];
            route[at] = e;
        }
    } else {
        for (int e = 0; e < E; e++) biased[e] = scores[e] + l->gate_bias[e];
        dspark__top(biased, E, K, route);
    }
    for (int k = 0; k < K; k++) sum += weight[k] = scores[route[k]];
    for (int k = 0; k < K; k++) weight[k] = weight[k] / sum * c->routed_scaling_factor;
}

// Which rows each expert has: row * K + slot, by expert.
static void dspark__group_by_expert(dspark__cpu *d) {
    int E = d->c->n_routed_experts, K = d->c->num_experts_per_tok, n = d->n_rows * K,
        *first = d->expert_first;
    memset(first, 0, (size_t)(E + 1) * sizeof *first);
    for (int i = 0; i < n; i++) first[d->route[i] + 1]++;
    for (int e = 0; e < E; e++) first[e + 1] += first[e];
    for (int i = 0; i < n; i++) d->expert_rows[first[d->route[i]]++] = i;
    for (int e = E; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

// The buffer of slot `slot` of row r; the shared expert's is slot K.
static float *dspark__slot(const dspark__cpu *d, float *base, int r, int slot, int stride) {
    return base + ((size_t)r * (size_t)(d->c->num_experts_per_tok + 1) + (size_t)slot) * (size_t)stride;
}

enum { DSPARK__UP, DSPARK__DOWN };
// One expert's w1 and w3, or its w2, for those of the rows that have it (rows NULL: all, the shared expert).
static void dspark__expert_jobs(dspark__cpu *d, const dspark_expert *e, const int *rows, int n, int step) {
    int K = d->c->num_experts_per_tok, h = d->c->hidden_size, w = dspark__expert_width(d->c);
    for (int j = 0; j < (step == DSPARK__UP ? 2 : 1); j++) {
        const dspark_matrix *m = step == DSPARK__DOWN ? &e->w2 : j ? &e->w3 : &e->w1;
        dspark__job *job = dspark__job_add(d, m, 0, m->rows, n);
        for (int i = 0; i < n; i++) {
            int r = rows ? rows[i] / K : i, slot = rows ? rows[i] % K : K;
            if (step == DSPARK__UP)
                dspark__job_row(d, job, i, dspark__row(m->dtype >= DSPARK_FP8 ? d->xq : d->x, r, h),
                                dspark__slot(d, d->up[j], r, slot, w));
            else
                dspark__job_row(d, job, i, dspark__slot(d, d->up[0], r, slot, w),
                                dspark__slot(d, d->down, r, slot, dspark__pad(h)));
        }
    }
}

static void dspark__routed_jobs(dspark__cpu *d, const dspark_layer *l, int step) {
    for (int e = 0; e < d->c->n_routed_experts; e++) {
        int first = d->expert_first[e], n = d->expert_first[e + 1] - first;
        if (n) dspark__expert_jobs(d, &l->experts[e], d->expert_rows + first, n, step);
    }
}

// weight * silu(gate) * up, rounded if w2 is quantized
static void dspark__swiglu_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark_layer *l = (const dspark_layer *)arg;
    const dspark_config *c = d->c;
    int K = c->num_experts_per_tok, w = dspark__expert_width(c);
    (void)thread;
    for (int slot = 0; slot <= K; slot++) {
        const dspark_expert *e = slot < K ? &l->experts[d->route[r * K + slot]] : &l->shared;
        float *gate = dspark__slot(d, d->up[0], r, slot, w), *up = dspark__slot(d, d->up[1], r, slot, w);
        float weight = slot < K ? d->route_weight[r * K + slot] : 1;
        d->k->swiglu(gate, up, e->w1.rows, c->swiglu_limit, weight, gate);
        if (e->w2.dtype >= DSPARK_FP8) d->k->round_fp8(gate, e->w1.rows, 128, gate);
    }
}

static void dspark__moe_sum_row(dspark__cpu *d, int thread, int r, void *arg) {
    int K = d->c->num_experts_per_tok, h = d->c->hidden_size;
    float *y = dspark__row(d->y, r, h);
    (void)thread, (void)arg;
    memset(y, 0, (size_t)h * sizeof *y);
    for (int slot = 0; slot <= K; slot++)
        d->k->axpy(y, 1, dspark__slot(d, d->down, r, slot, dspark__pad(h)), h);
}

static void dspark__cpu_moe(void *device, int layer) {
    dspark__cpu *d = (dspark__cpu *)device;
    const dspark_layer *l = &d->w->layers[layer];
    void *arg = (void *)(uintptr_t)l;
    dspark__linear(d, &l->gate, dspark__input(&l->gate, d->x, d->xq), dspark__pad(d->c->hidden_size), d->gate,
                   dspark__pad(d->c->n_routed_experts));
    dspark__expert_jobs(d, &l->shared, NULL, d->n_rows, DSPARK__UP);
    dspark__run_jobs(d);
    dspark__each(d, d->n_rows, dspark__route_row, arg);
    dspark__group_by_expert(d);
    dspark__routed_jobs(d, l, DSPARK__UP);
    dspark__run_jobs(d);
    dspark__each(d, d->n_rows, dspark__swiglu_row, arg);
    dspark__expert_jobs(d, &l->shared, NULL, d->n_rows, DSPARK__DOWN);
    dspark__routed_jobs(d, l, DSPARK__DOWN);
    dspark__run_jobs(d);
    dspark__each(d, d->n_rows, dspark__moe_sum_row, NULL);
}

// ---- taps and heads ---------------------------------------------------------------------------

static void dspark__tap_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark_config *c = d->c;
    const dspark_segment *s = &d->pass->segments[d->row_segment[r]];
    int index = *(const int *)arg, h = c->hidden_size, n = dspark__ring(c);
    float *tap = ((dspark__state *)s->state)->taps +
                 (size_t)(d->row_position[r] % n) * (size_t)(c->n_taps * h) + index * h;
    (void)thread;
    if (r < s->row + s->n_rows - n) return;         // a later row of this pass stands in its place
    memset(tap, 0, (size_t)h * sizeof *tap);
    for (int j = 0; j < c->hc_mult; j++)
        d->k->axpy(tap, 1 / (float)c->hc_mult, dspark__row(d->stream, r, c->hc_mult * h) + j * h, h);
}
static void dspark__cpu_tap(void *device, int index) {
    dspark__cpu *d = (dspark__cpu *)device;
    dspark__each(d, d->n_rows, dspark__tap_row, &index);
}

// hidden = sum_j pre_j copy_j; x = its norm. One row of fn a copy.
static void dspark__head_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark__mix_arg *a = (const dspark__mix_arg *)arg;
    const dspark_config *c = d->c;
    int C = c->hc_mult;
    float *m = dspark__row(d->mixes, r, (2 + C) * C), *hidden = dspark__row(d->hidden, r, c->hidden_size);
    (void)thread;
    dspark__mix_scale(d, r, m, C);
    for (int j = 0; j < C; j++) m[j] = m[j] * a->mix->scale[0] + a->mix->base[j];
    d->k->sigmoid(m, C);
    for (int j = 0; j < C; j++) m[j] += c->hc_eps;
    dspark__mix_copies(d, r, m, hidden);
    d->k->rms_norm(hidden, a->norm, c->hidden_size, c->rms_norm_eps, dspark__row(d->x, r, c->hidden_size));
    if (d->w->head.dtype >= DSPARK_FP8)
        d->k->round_fp8(dspark__row(d->x, r, c->hidden_size), c->hidden_size, 128,
                        dspark__row(d->xq, r, c->hidden_size));
}

// logits [n][vocab] of the rows whose logits are wanted
static void dspark__project_logits(dspark__cpu *d, const dspark_mix *mix, const float *norm, float *logits) {
    int h = d->c->hidden_size;
    size_t n = 0, V = (size_t)d->c->vocab_size;
    dspark__mix_arg a;
    dspark__job *job;
    a.mix = mix, a.norm = norm;
    d->n_logits = 0;
    for (int i = 0; i < d->pass->n_segments; i++)
        d->n_logits += d->pass->segments[i].n_rows - d->pass->segments[i].logits_from;
    if (!d->n_logits) return;
    dspark__mix_project(d, mix);
    dspark__each(d, d->n_rows, dspark__head_row, &a);
    job = dspark__job_add(d, &d->w->head, 0, d->w->head.rows, d->n_rows);
    for (int i = 0; i < d->pass->n_segments; i++) {
        const dspark_segment *s = &d->pass->segments[i];
        for (int r = s->logits_from; r < s->n_rows; r++, n++)
            dspark__job_row(d, job, (int)n,
                            dspark__row(d->w->head.dtype >= DSPARK_FP8 ? d->xq : d->x, s->row + r, h),
                            logits + n * V);
    }
    job->n_rows = (int)n;
    dspark__run_jobs(d);
}
static void dspark__cpu_head(void *device) {
    dspark__cpu *d = (dspark__cpu *)device;
    dspark__project_logits(d, &d->w->hc_head, d->w->norm, d->logits);
}

// ---- the drafter's own ------------------------------------------------------------------------

// Taps of positions [inject_from, position) -> main_x = main_norm(main_proj taps) -> one row for each stage's
// window.
typedef struct { const dspark_layer *stage; float *window; int first; } dspark__inject_arg;

static void dspark__inject_main(dspark__cpu *d, int thread, int r, void *arg) {
    int h = d->c->hidden_size;
    float *x = dspark__row(d->x, r, h);
    (void)thread, (void)arg;
    d->k->rms_norm(x, d->w->main_norm, h, d->c->rms_norm_eps, x);
    d->k->round_fp8(x, h, 128, dspark__row(d->xq, r, h));
}
static void dspark__inject_round(dspark__cpu *d, int thread, int r, void *arg) {
    int n = d->c->n_taps * d->c->hidden_size;
    (void)thread, (void)arg;
    d->k->round_fp8(dspark__row(d->main, r, n), n, 128, dspark__row(d->main_q, r, n));
}
static void dspark__inject_row(dspark__cpu *d, int thread, int r, void *arg) {
    const dspark__inject_arg *a = (const dspark__inject_arg *)arg;
    const dspark_config *c = d->c;
    int p = a->first + r;
    float *kv = dspark__row(d->kv, r, c->head_dim), *turn = dspark__scratch(d, thread);
    dspark__rope_angles(d->freqs[0], c->qk_rope_head_dim / 2, p, turn);
    dspark__finish_row(d, a->stage->kv_norm, turn, kv);
    memcpy(a->window + (size_t)(p % dspark__ring(c)) * (size_t)c->head_dim, kv,
           (size_t)c->head_dim * sizeof *kv);
}

// Runs before the block's own rows need the buffers; d->n_rows stands for the rows injected.
static void dspark__inject_segment(dspark__cpu *d, const dspark_segment *s, int first, int n) {
    const dspark_config *c = d->c;
    dspark__state *state = (dspark__state *)s->state;
    int taps = c->n_taps * c->hidden_size, h = dspark__pad(c->hidden_size),
        rounded = d->w->main_proj.dtype >= DSPARK_FP8;
    d->n_rows = n;
    for (int i = 0; i < n; i++)
        memcpy(dspark__row(d->main, i, taps),
               state->taps + (size_t)((first + i) % dspark__ring(c)) * (size_t)taps,
               (size_t)taps * sizeof(float));
    if (rounded) dspark__each(d, n, dspark__inject_round, NULL);
    dspark__linear(d, &d->w->main_proj, rounded ? d->main_q : d->main, dspark__pad(taps), d->x, h);
    dspark__run_jobs(d);
    dspark__each(d, n, dspark__inject_main, NULL);
    for (int i = 0; i < c->n_stages; i++) {
        dspark__inject_arg a;
        a.stage = &d->w->layers[c->num_hidden_layers + i];
        a.window = state->layers[c->num_hidden_layers + i].window, a.first = first;
        dspark__linear(d, &a.stage->wkv, dspark__input(&a.stage->wkv, d->x, d->xq), h, d->kv,
                       dspark__pad(c->head_dim));
        dspark__run_jobs(d);
        dspark__each(d, n, dspark__inject_row, &a);
    }
    d->n_rows = d->pass->n_rows;
}
static void dspark__cpu_inject(void *device) {
    dspark__cpu *d = (dspark__cpu *)device;
    for (int i = 0; i < d->pass->n_segments; i++) {
        const dspark_segment *s = &d->pass->segments[i];
        for (int first = s->inject_from; first < s->position; first += d->max_rows)
            dspark__inject_segment(d, s, first, dspark__min(d->max_rows, s->position - first));
    }
}

static void dspark__cpu_draft_head(void *device) {
    dspark__cpu *d = (dspark__cpu *)device;
    dspark__project_logits(d, &d->w->draft_hc_head, d->w->draft_norm, d->draft_logits);
    memset(d->rnn, 0, (size_t)d->n_rows * (size_t)dspark__pad(d->c->dspark_markov_rank) * sizeof *d->rnn);
}

// The sequential heads (DSpark's paper): the logits of row r get W2 times e, left in d->markov.
//   vanilla: e = W1[previous];  gated: e = sigmoid(G [x ; W1[previous]] + b) * W1[previous]
//   RNN: (g, c, o) = J [s ; W1[previous] ; x] + b, s = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), e = tanh(o)
// A draft's confidence is computed from [x ; W1[previous]], before the draft is drawn.
static void dspark__markov_input(dspark__cpu *d, int r, int32_t previous) {
    int rank = d->c->dspark_markov_rank, h = d->c->hidden_size, rnn = d->w->head_kind == DSPARK_HEAD_RNN;
    float *in = dspark__row(d->markov_in, r, 2 * rank + h), *e = dspark__row(d->markov, r, rank);
    const float *x = dspark__row(d->hidden, r, h);
    if (rank) dspark__lookup(&d->w->markov_w1, previous, e);
    memcpy(in, x, (size_t)h * sizeof *in);
    memcpy(in + h, e, (size_t)rank * sizeof *in);
    d->confidence[r] =
        d->confidence_w ? d->k->dot(d->confidence_w, in, h + rank) + d->w->confidence_bias : HUGE_VALF;
    if (!rnn) return;
    memcpy(in, dspark__row(d->rnn, r, rank), (size_t)rank * sizeof *in);
    memcpy(in + rank, e, (size_t)rank * sizeof *in);
    memcpy(in + 2 * rank, x, (size_t)h * sizeof *in);
}

// z = G or J times the input, in place; the next row's s where there is one.
static void dspark__markov_gate(dspark__cpu *d, int r, int last) {
    int rank = d->c->dspark_markov_rank, n = d->w->head_kind == DSPARK_HEAD_RNN ? 3 * rank : rank;
    const float *bias = d->w->head_kind == DSPARK_HEAD_RNN ? d->w->joint_bias : d->w->gate_bias;
    float *e = dspark__row(d->markov, r, rank), *s = dspark__row(d->rnn, r, rank),
          *z = dspark__row(d->joint, r, 3 * rank);
    for (int i = 0; i < n && bias; i++) z[i] += bias[i];
    d->k->sigmoid(z, rank);
    for (int i = 0; i < rank && n == rank; i++) e[i] *= z[i];
    if (n == rank) return;
    d->k->tanh(z + rank, 2 * rank);
    for (int i = 0; i < rank; i++) s[i] = z[i] * s[i] + (1 - z[i]) * z[rank + i];
    memcpy(e, z + 2 * rank, (size_t)rank * sizeof *e);
    if (!last) memcpy(dspark__row(d->rnn, r + 1, rank), s, (size_t)rank * sizeof *s);
}

// Row k of each segment through a matrix; x and y [rows][their stride]
static void dspark__step_linear(dspark__cpu *d, int k, const dspark_matrix *w, float *x, int nx, float *y,
                                int ny) {
    dspark__job *job = dspark__job_add(d, w, 0, w->rows, d->pass->n_segments);
    for (int i = 0; i < d->pass->n_segments; i++)
        dspark__job_row(d, job, i, dspark__row(x, d->pass->segments[i].row + k, nx),
                        dspark__row(y, d->pass->segments[i].row + k, ny));
    dspark__run_jobs(d);
}

static void dspark__sequential_step(dspark__cpu *d, int k, const int32_t *previous) {
    int kind = d->w->head_kind, rank = d->c->dspark_markov_rank, V = d->c->vocab_size,
        n = d->pass->n_segments;
    const dspark_matrix *joint = kind == DSPARK_HEAD_GATED ? &d->w->gate_proj : &d->w->joint_proj;
    for (int i = 0; i < n; i++) dspark__markov_input(d, d->pass->segments[i].row + k, previous[i]);
    if (kind == DSPARK_HEAD_NONE) return;
    if (kind != DSPARK_HEAD_VANILLA) {
        dspark__step_linear(d, k, joint, d->markov_in, 2 * rank + d->c->hidden_size, d->joint, 3 * rank);
        for (int i = 0; i < n; i++)
            dspark__markov_gate(d, d->pass->segments[i].row + k, k + 1 == d->pass->segments[i].n_rows);
    }
    dspark__step_linear(d, k, &d->w->markov_w2, d->markov, rank, d->bias, V);
    for (int i = 0; i < n; i++) {
        int r = d->pass->segments[i].row + k;
        d->k->axpy(d->draft_logits + (size_t)r * (size_t)V, 1, dspark__row(d->bias, r, V), V);
    }
}

static void dspark__cpu_draft_step(void *device, int k, const int32_t *previous) {
    uint64_t mode = dspark__float_mode_set();
    dspark__sequential_step((dspark__cpu *)device, k, previous);
    dspark__float_mode_restore(mode);
}

static float *dspark__cpu_draft_logits(void *device) { return ((dspark__cpu *)device)->draft_logits; }

static dspark_status dspark__cpu_pass_end(void *device, dspark_pass_result *out) {
    dspark__cpu *d = (dspark__cpu *)device;
    int drafts = d->pass->kind == DSPARK_PASS_DRAFT;
    out->logits = drafts ? d->draft_logits : d->logits, out->n_logits = d->n_logits;
    out->confidence_logits = drafts ? d->confidence : NULL, out->tokens = NULL;
    return DSPARK_OK;
}

// ---- opening ----------------------------------------------------------------------------------

static float *dspark__carve_rows(dspark__carver *v, int rows, int n) {
    return (float *)dspark__carve(v, (size_t)rows * (size_t)dspark__pad(n), sizeof(float));
}
static int *dspark__carve_ints(dspark__carver *v, int rows, int n) {
    return (int *)dspark__carve(v, (size_t)rows * (size_t)n, sizeof(int));
}

static void dspark__carve_attention(dspark__cpu *d, dspark__carver *v) {
    const dspark_config *c = d->c;
    int n = d->max_rows, wide = c->num_attention_heads * c->head_dim, low = c->o_groups * c->o_lora_rank;
    d->qr = dspark__carve_rows(v, n, c->q_lora_rank);
    d->q = dspark__carve_rows(v, n, wide);
    d->o = dspark__carve_rows(v, n, wide);
    d->kv = dspark__carve_rows(v, n, c->head_dim);
    d->low = dspark__carve_rows(v, n, low + c->q_lora_rank);
    d->lowq = dspark__carve_rows(v, n, low);
    d->pool_kv = dspark__carve_rows(v, n, 2 * c->head_dim);
    d->pool_gate = dspark__carve_rows(v, n, 2 * c->head_dim);
    d->index_kv = dspark__carve_rows(v, n, 2 * c->index_head_dim);
    d->index_gate = dspark__carve_rows(v, n, 2 * c->index_head_dim);
    d->index_q = dspark__carve_rows(v, n, c->index_n_heads * c->index_head_dim);
    d->index_w = dspark__carve_rows(v, n, c->index_n_heads);
    d->chosen = dspark__carve_ints(v, n, c->index_topk);
}

static void dspark__carve_experts(dspark__cpu *d, dspark__carver *v) {
    const dspark_config *c = d->c;
    int n = d->max_rows, K = c->num_experts_per_tok, slots = n * (K + 1);
    d->gate = dspark__carve_rows(v, n, c->n_routed_experts);
    d->route_weight = dspark__carve_rows(v, n, K);
    d->route = dspark__carve_ints(v, n, K);
    d->expert_rows = dspark__carve_ints(v, n, K);
    d->expert_first = dspark__carve_ints(v, 1, c->n_routed_experts + 1);
    d->up[0] = dspark__carve_rows(v, slots, dspark__expert_width(c));
    d->up[1] = dspark__carve_rows(v, slots, dspark__expert_width(c));
    d->down = dspark__carve_rows(v, slots, c->hidden_size);
}

static void dspark__carve_drafter(dspark__cpu *d, dspark__carver *v) {
    const dspark_config *c = d->c;
    int n = d->max_rows, h = c->hidden_size, rank = c->dspark_markov_rank;
    if (!c->n_stages) return;
    d->main = dspark__carve_rows(v, n, c->n_taps * h);
    d->main_q = dspark__carve_rows(v, n, c->n_taps * h);
    d->draft_logits = dspark__carve_rows(v, n, c->vocab_size);
    d->bias = dspark__carve_rows(v, n, c->vocab_size);
    d->markov = dspark__carve_rows(v, n, rank);
    d->markov_in = dspark__carve_rows(v, n, 2 * rank + h);
    d->joint = dspark__carve_rows(v, n, 3 * rank);
    d->rnn = dspark__carve_rows(v, n, rank);
    d->confidence = dspark__carve_rows(v, 1, n);
    if (d->w->confidence_proj.data) d->confidence_w = dspark__carve_rows(v, 1, h + rank);
}

static int dspark__widest(const dspark_config *c) {     // input of any linear
    int n = c->hc_mult * c->hidden_size, h = c->hidden_size;
    n = dspark__max(n, c->num_attention_heads * c->head_dim);
    n = dspark__max(n, dspark__max(c->n_taps * h, 2 * c->dspark_markov_rank + h));
    return dspark__max(n, dspark__max(dspark__expert_width(c),
                                      dspark__max(c->o_groups * c->o_lora_rank, c->q_lora_rank)));
}

static void dspark__carve_pass(dspark__cpu *d, dspark__carver *v) {
    const dspark_config *c = d->c;
    int n = d->max_rows, C = c->hc_mult, h = c->hidden_size, E = c->n_routed_experts;
    size_t most = dspark__linear_scratch(dspark__widest(c), n),
           pointers = (size_t)n * (size_t)(3 * c->num_experts_per_tok + 16);
    most = most > (size_t)(C * h + E) ? most : (size_t)(C * h + E);
    most += (size_t)(2 * c->head_dim + DSPARK__INDEX_KEYS * c->index_head_dim) + 1024;
    d->scratch_floats = (most + 15) / 16 * 16;
    d->thread_scratch = (float *)dspark__carve(v, (size_t)d->n_threads * d->scratch_floats, sizeof(float));
    d->row_segment = dspark__carve_ints(v, n, 1);
    d->row_position = dspark__carve_ints(v, n, 1);
    d->stream = dspark__carve_rows(v, n, C * h);
    d->mixes = dspark__carve_rows(v, n, (2 + C) * C);
    d->post_comb = dspark__carve_rows(v, n, (2 + C) * C);
    d->x = dspark__carve_rows(v, n, h);
    d->xq = dspark__carve_rows(v, n, h);
    d->y = dspark__carve_rows(v, n, h);
    d->hidden = dspark__carve_rows(v, n, h);
    d->logits = dspark__carve_rows(v, n, c->vocab_size);
    for (int set = 0; set < 2; set++) {
        d->turn[set] = dspark__carve_rows(v, n, c->qk_rope_head_dim);
        d->freqs[set] = (double *)dspark__carve(v, (size_t)c->qk_rope_head_dim / 2, sizeof(double));
    }
    d->jobs = (dspark__job *)dspark__carve(v, (size_t)(2 * E + c->o_groups + 16), sizeof *d->jobs);
    d->job_x = (const float **)dspark__carve(v, pointers + (size_t)n * (size_t)c->o_groups, sizeof *d->job_x);
    d->job_y = (float **)dspark__carve(v, pointers + (size_t)n * (size_t)c->o_groups, sizeof *d->job_y);
}

static size_t dspark__cpu_carve(dspark__cpu *d, void *memory) {
    dspark__carver v = { (char *)memory, 0 };
    if (memory) v.n = (size_t)(-(uintptr_t)memory & 63);
    dspark__carve_pass(d, &v);
    dspark__carve_attention(d, &v);
    dspark__carve_experts(d, &v);
    dspark__carve_drafter(d, &v);
    return v.n + 64;
}

static void dspark__cpu_close(void *device) {
    dspark__cpu *d = (dspark__cpu *)device;
    dspark__free(d->memory);
    dspark__free(d->attend_scratch);
    dspark__free(d->attend_rows);
    dspark__free(d->index_scores);
    dspark__free(d);
}

static int dspark__all_threads(void) {
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

static dspark_status dspark__cpu_open(void **device, const dspark_model *m, const dspark_model_desc *desc) {
    const dspark_config *c = dspark_model_config(m);
    const dspark__kernels *k = dspark__kernels_choose(desc->cpu_path);
    int threads = desc->n_threads ? desc->n_threads : dspark__all_threads();
    dspark__cpu *d;
    *device = NULL;
    if (!k)
        return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "cpu_path %d: this machine has no such instructions",
                            desc->cpu_path);
    for (int l = 0; l < c->num_hidden_layers; l++)
        if (c->compress_ratios[l] > 256)
            return dspark__fail(DSPARK_ERROR_UNSUPPORTED,
                                "compress_ratios[%d]: expected at most 256, found %d", l,
                                c->compress_ratios[l]);
    if (c->qk_rope_head_dim > 256)
        return dspark__fail(DSPARK_ERROR_UNSUPPORTED, "qk_rope_head_dim: expected at most 256, found %d",
                            c->qk_rope_head_dim);
    d = (dspark__cpu *)dspark__alloc(1, sizeof *d);
    if (!d) return DSPARK_ERROR_MEMORY;
    d->c = c, d->w = dspark_model_weights(m), d->k = k;
#ifdef _OPENMP
    d->n_threads = threads;
#else
    d->n_threads = threads > 0;
#endif
    d->max_rows = dspark__max(desc->max_rows, c->dspark_block_size + 1);
    d->bytes = dspark__cpu_carve(d, NULL);
    if (!dspark__memory_check(m, "workspace", d->bytes)) d->memory = dspark__alloc(d->bytes, 1);
    if (!d->memory) return dspark__cpu_close(d), DSPARK_ERROR_MEMORY;
    dspark__cpu_carve(d, d->memory);
    for (int set = 0; set < 2; set++) dspark__rope_freqs(c, set, d->freqs[set]);
    if (d->confidence_w) dspark__lookup(&d->w->confidence_proj, 0, d->confidence_w);
    *device = d;
    return DSPARK_OK;
}

static size_t dspark__cpu_bytes(const void *device) {
    const dspark__cpu *d = (const dspark__cpu *)device;
    return sizeof *d + d->bytes + (size_t)d->n_threads * (d->attend_floats + 3 * d->attend_n) * sizeof(float);
}

// ---- states -----------------------------------------------------------------------------------

// Room for a thread's attention over max_context tokens: n row pointers or scores; floats for decoded rows and scores.
static void dspark__attend_room(const dspark__cpu *d, int max_context, size_t *n, size_t *floats) {
    const dspark_config *c = d->c;
    int rows = 0, scored = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        int r = c->compress_ratios[l], all = r ? max_context / r : 0;
        rows = dspark__max(rows, r == 4 ? dspark__min(all, c->index_topk) : all);
        scored = dspark__max(scored, r == 4 ? all : 0);
    }
    *floats = (size_t)rows * (size_t)dspark__pad(c->head_dim);
    rows += c->sliding_window + c->dspark_block_size;
    *floats += (size_t)rows * (size_t)(c->num_attention_heads + 1) + 16;
    *n = (size_t)dspark__max(rows, scored) + 16;
}

static size_t dspark__cpu_state_bytes(const void *device, int max_context) {
    const dspark__cpu *d = (const dspark__cpu *)device;
    dspark__state s;
    size_t n, floats, bytes;
    memset(&s, 0, sizeof s);
    s.max_context = max_context;
    bytes = sizeof s + dspark__state_layout(&s, d->c) + 64;
    bytes += (size_t)s.n_arrays * sizeof *s.arrays;
    bytes += (size_t)(d->c->num_hidden_layers + d->c->n_stages) * sizeof *s.layers;
    dspark__attend_room(d, max_context, &n, &floats);
    if (n > d->attend_n) bytes += (n - d->attend_n) * (sizeof(void *) + sizeof(float)) * (size_t)d->n_threads;
    if (floats > d->attend_floats)
        bytes += (floats - d->attend_floats) * sizeof(float) * (size_t)d->n_threads;
    return bytes;
}

static void dspark__cpu_state_close(void *state) {
    dspark__state *s = (dspark__state *)state;
    dspark__free(s->memory);
    dspark__free(s->arrays);
    dspark__free(s->layers);
    dspark__free(s);
}

// Room for the longest context so far; nothing in it lives from pass to pass.
static dspark_status dspark__attend_grow(dspark__cpu *d, int max_context) {
    size_t n, floats, T = (size_t)d->n_threads;
    dspark__attend_room(d, max_context, &n, &floats);
    if (n > d->attend_n) {
        const float **rows = (const float **)dspark__alloc(n * T, sizeof *rows);
        float *scores = (float *)dspark__alloc(n * T, sizeof *scores);
        if (!rows || !scores) return dspark__free((void *)rows), dspark__free(scores), DSPARK_ERROR_MEMORY;
        dspark__free((void *)d->attend_rows), dspark__free(d->index_scores);
        d->attend_rows = rows, d->index_scores = scores, d->attend_n = n;
    }
    if (floats > d->attend_floats) {
        float *scratch = (float *)dspark__alloc(floats * T, sizeof *scratch);
        if (!scratch) return DSPARK_ERROR_MEMORY;
        dspark__free(d->attend_scratch);
        d->attend_scratch = scratch, d->attend_floats = floats;
    }
    return DSPARK_OK;
}

static dspark_status dspark__cpu_state_open(void **state, void *device, int max_context) {
    dspark__cpu *d = (dspark__cpu *)device;
    dspark__state *s = (dspark__state *)dspark__alloc(1, sizeof *s);
    size_t bytes;
    *state = NULL;
    if (!s || dspark__attend_grow(d, max_context)) return dspark__free(s), DSPARK_ERROR_MEMORY;
    s->max_context = max_context;
    bytes = dspark__state_layout(s, d->c);
    s->layers = (dspark__layer_state *)dspark__alloc((size_t)(d->c->num_hidden_layers + d->c->n_stages),
                                                     sizeof *s->layers);
    s->arrays = (dspark__array *)dspark__alloc((size_t)s->n_arrays, sizeof *s->arrays);
    s->memory = (char *)dspark__alloc(bytes + 64, 1);
    if (!s->layers || !s->arrays || !s->memory) return dspark__cpu_state_close(s), DSPARK_ERROR_MEMORY;
    dspark__state_layout(s, d->c);
    *state = s;
    return DSPARK_OK;
}

static dspark_status dspark__cpu_state_copy(void *to, const void *from, int n_tokens) {
    const dspark__state *a = (const dspark__state *)from, *b = (const dspark__state *)to;
    for (int i = 0; i < a->n_arrays; i++)
        memcpy(b->arrays[i].data, a->arrays[i].data,
               a->arrays[i].row_bytes * dspark__array_rows(&a->arrays[i], n_tokens));
    return DSPARK_OK;
}

static dspark_status dspark__cpu_state_pieces(void *state, int n_tokens, int restore, dspark_piece piece, void *user) {
    const dspark__state *s = (const dspark__state *)state;
    (void)restore;
    for (int i = 0; i < s->n_arrays; i++) {
        const dspark__array *a = &s->arrays[i];
        dspark_status status = piece(user, a->data, a->row_bytes * dspark__array_rows(a, n_tokens));
        if (status) return status;
    }
    return DSPARK_OK;
}

static const char *dspark__cpu_path_name(const void *device) {
    return ((const dspark__cpu *)device)->k->name;
}
static int dspark__cpu_threads(const void *device) { return ((const dspark__cpu *)device)->n_threads; }
static int dspark__cpu_max_rows(const void *device) { return ((const dspark__cpu *)device)->max_rows; }

DSPARK_API const dspark_backend *dspark_cpu_backend(void) {
    static const dspark_backend cpu = { "cpu",
                                        dspark__cpu_open,
                                        dspark__cpu_close,
                                        dspark__cpu_bytes,
                                        dspark__cpu_path_name,
                                        dspark__cpu_threads,
                                        dspark__cpu_max_rows,
                                        dspark__cpu_state_bytes,
                                        dspark__cpu_state_open,
                                        dspark__cpu_state_close,
                                        dspark__cpu_state_copy,
                                        dspark__cpu_state_pieces,
                                        dspark__cpu_pass_begin,
                                        dspark__cpu_mix_in,
                                        dspark__cpu_attention,
                                        dspark__cpu_moe,
                                        dspark__cpu_mix_out,
                                        dspark__cpu_tap,
                                        dspark__cpu_head,
                                        dspark__cpu_inject,
                                        dspark__cpu_draft_head,
                                        dspark__cpu_draft_step,
                                        dspark__cpu_draft_logits,
                                        dspark__cpu_pass_end,
                                        NULL,
                                        NULL,
                                        NULL };
    return &cpu;
}
DSPARK__SOON_END
#endif  // DSPARK_NO_MODEL

#if defined __GNUC__ && !defined __clang__
#pragma GCC pop_options
#endif
#endif  // DSPARK_IMPLEMENTATION

#else   // DSPARK__PATH: what follows is compiled once a path, included from >>kernels
// >>paths
// First the vocabulary: dspark__v, a vector of 16 floats, dspark__i, of 16 integers (bits of floats), and the
// operations on them, for plain C, AVX2, AVX-512 and NEON. Then the kernels, in these words only. A name here
// is short for one with the path's number appended: dspark__v_add is dspark__v_add_3.

#define dspark__v DSPARK__AT(v)
#define dspark__i DSPARK__AT(i)
#define dspark__v_set DSPARK__AT(v_set)             // all lanes
#define dspark__v_load DSPARK__AT(v_load)           // 16 floats at any byte
#define dspark__v_store DSPARK__AT(v_store)
#define dspark__v_add DSPARK__AT(v_add)
#define dspark__v_sub DSPARK__AT(v_sub)
#define dspark__v_mul DSPARK__AT(v_mul)
#define dspark__v_div DSPARK__AT(v_div)
#define dspark__v_fma DSPARK__AT(v_fma)             // a b + c
#define dspark__v_max DSPARK__AT(v_max)             // a > b ? a : b, so b if one is NaN
#define dspark__v_min DSPARK__AT(v_min)             // a < b ? a : b
#define dspark__v_sqrt DSPARK__AT(v_sqrt)
#define dspark__v_less DSPARK__AT(v_less)           // a < b ? x : y
#define dspark__v_bits DSPARK__AT(v_bits)           // the bits of floats, and floats of bits
#define dspark__i_floats DSPARK__AT(i_floats)
#define dspark__i_set DSPARK__AT(i_set)
#define dspark__i_add DSPARK__AT(i_add)
#define dspark__i_sub DSPARK__AT(i_sub)
#define dspark__i_and DSPARK__AT(i_and)
#define dspark__i_xor DSPARK__AT(i_xor)
#define dspark__i_left DSPARK__AT(i_left)           // shifts by a constant; right: logical
#define dspark__i_right DSPARK__AT(i_right)
#define dspark__i_half DSPARK__AT(i_half)           // floor(a / 2), signed
#define dspark__i_bytes DSPARK__AT(i_bytes)         // stores the 16 low bytes; values < 256
#define dspark__v_swap8 DSPARK__AT(v_swap8)         // lane i takes lane i ^ 8, ...
#define dspark__v_swap4 DSPARK__AT(v_swap4)
#define dspark__v_swap2 DSPARK__AT(v_swap2)
#define dspark__v_swap1 DSPARK__AT(v_swap1)
#define dspark__v_first DSPARK__AT(v_first)         // lane 0
// A piece: the lanes that one step of a product takes at once, a vector or half of one. When two are joined,
// the second begins AT(piece) % 16 weights after the first: if a piece is a whole vector, it is the same
// piece again.
#define dspark__p DSPARK__AT(p)
#define dspark__p_zero DSPARK__AT(p_zero)
#define dspark__p_load DSPARK__AT(p_load)
#define dspark__p_keep DSPARK__AT(p_keep)           // its argument; keeps GCC from reloading it for each use
#define dspark__p_fma DSPARK__AT(p_fma)
#define dspark__p_input DSPARK__AT(p_input)         // inputs, from the k-th on
// Of a block of 32 weights, the lanes from `part` on: below 16 they are the odd weights, from 16 on the even ones.
#define dspark__p_fp8 DSPARK__AT(p_fp8)             // E4M3 codes: 2^-8 of their values; NaN: +-480/256
#define dspark__p_table DSPARK__AT(p_table)         // what p_fp4 needs of a scale
#define dspark__p_fp4 DSPARK__AT(p_fp4)             // E2M1 codes times that scale
#define dspark__v_zip DSPARK__AT(v_zip)             // stores 32 floats: even and odd ones in turn
#define dspark__v_unzip DSPARK__AT(v_unzip)         // stores 32 floats: the odd ones of both, then the even ones
#define dspark__p_bf16 DSPARK__AT(p_bf16)
#define dspark__p_f16 DSPARK__AT(p_f16)
#define dspark__v_join DSPARK__AT(v_join)           // the vector of two pieces, if a piece is half of one
#define dspark__v_sum4 DSPARK__AT(v_sum4)           // the sums (v_sum) of four vectors
#define dspark__v_e8m0 DSPARK__AT(v_e8m0)           // 16 scales
#define dspark__prefetch DSPARK__AT(prefetch)

// Each path says how many rows and outputs of a product its registers hold, and outputs of one row (wide).
// Words are inlined, except in plain C, where that would take GCC ten seconds.
#undef DSPARK__WORD
#if DSPARK__PATH == 1
#define DSPARK__WORD DSPARK__CALLED
#else
#define DSPARK__WORD DSPARK__INLINE
#endif

#if DSPARK__PATH == 2 || DSPARK__PATH == 3 || DSPARK__PATH == 5
DSPARK__INLINE __m128i DSPARK__AT(load16)(const uint8_t *p) {
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}
DSPARK__INLINE void DSPARK__AT(store16)(uint8_t *p, __m128i x) { _mm_storeu_si128((__m128i *)(void *)p, x); }
// v_sum of four vectors folded to 8 lanes: adds lanes 4 apart, of two side by side; then 2 and 1 apart, of all four.
DSPARK__INLINE void DSPARK__AT(sum4)(float *y, __m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ac = _mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
    __m256 bd = _mm256_add_ps(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
    __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
    s = _mm256_add_ps(s, _mm256_permute_ps(s, 0xb1));
    _mm_storeu_ps(y, _mm_shuffle_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1), 0x88));
}
DSPARK__INLINE void dspark__prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
#endif

#if DSPARK__PATH == 1       // plain C
typedef struct { float f[16]; } dspark__v;
typedef struct { uint32_t u[16]; } dspark__i;
enum { DSPARK__AT(rows) = 1, DSPARK__AT(wide) = 1, DSPARK__AT(outputs) = 1, DSPARK__AT(piece) = 16 };
#define DSPARK__EACH(type, expression) \
    type y; \
    for (int i = 0; i < 16; i++) y expression; \
    return y
#undef DSPARK__V2
#undef DSPARK__I2
#define DSPARK__V2(name, value) \
    DSPARK__CALLED dspark__v name(dspark__v a, dspark__v b) { DSPARK__EACH(dspark__v, .f[i] = value); }
#define DSPARK__I2(name, value) \
    DSPARK__CALLED dspark__i name(dspark__i a, dspark__i b) { DSPARK__EACH(dspark__i, .u[i] = value); }
DSPARK__CALLED dspark__v dspark__v_set(float a) { DSPARK__EACH(dspark__v, .f[i] = a); }
DSPARK__CALLED dspark__v dspark__v_load(const void *p) { dspark__v y; memcpy(&y, p, sizeof y); return y; }
DSPARK__CALLED void dspark__v_store(float *p, dspark__v a) { memcpy(p, a.f, sizeof a.f); }
DSPARK__V2(dspark__v_add, a.f[i] + b.f[i])
DSPARK__V2(dspark__v_sub, a.f[i] - b.f[i])
DSPARK__V2(dspark__v_mul, a.f[i] * b.f[i])
DSPARK__V2(dspark__v_div, a.f[i] / b.f[i])
DSPARK__V2(dspark__v_max, a.f[i] > b.f[i] ? a.f[i] : b.f[i])
DSPARK__V2(dspark__v_min, a.f[i] < b.f[i] ? a.f[i] : b.f[i])
#ifdef FP_FAST_FMAF
#define dspark__fmaf fmaf
#else
// fmaf: a call takes longer, and not every libm rounds once (MinGW's does not). The product is exact in double. A sum
// that is not is made odd, towards what was lost, so that float rounds it as it would round the exact one.
DSPARK__INLINE float dspark__fmaf(float a, float b, float c) {
    double p = (double)a * (double)b, s = p + (double)c, t = s - p, lost = (p - (s - t)) + ((double)c - t);
    uint64_t u;
    memcpy(&u, &s, sizeof u);
    if (lost == 0 || (u & 1) || !(s - s == 0)) return (float)s;
    u = (lost > 0) == (s > 0) ? u + 1 : u - 1;
    memcpy(&s, &u, sizeof s);
    return (float)s;
}
#endif
DSPARK__CALLED dspark__v dspark__v_fma(dspark__v a, dspark__v b, dspark__v c) {
    DSPARK__EACH(dspark__v, .f[i] = dspark__fmaf(a.f[i], b.f[i], c.f[i]));
}
DSPARK__CALLED dspark__v dspark__v_sqrt(dspark__v a) { DSPARK__EACH(dspark__v, .f[i] = sqrtf(a.f[i])); }
DSPARK__CALLED dspark__v dspark__v_less(dspark__v a, dspark__v b, dspark__v x, dspark__v y0) {
    DSPARK__EACH(dspark__v, .f[i] = a.f[i] < b.f[i] ? x.f[i] : y0.f[i]);
}
DSPARK__CALLED dspark__i dspark__v_bits(dspark__v a) { dspark__i y; memcpy(&y, &a, sizeof y); return y; }
DSPARK__CALLED dspark__v dspark__i_floats(dspark__i a) { dspark__v y; memcpy(&y, &a, sizeof y); return y; }
DSPARK__CALLED dspark__i dspark__i_set(uint32_t a) { DSPARK__EACH(dspark__i, .u[i] = a); }
DSPARK__I2(dspark__i_add, a.u[i] + b.u[i])
DSPARK__I2(dspark__i_sub, a.u[i] - b.u[i])
DSPARK__I2(dspark__i_and, a.u[i] & b.u[i])
DSPARK__I2(dspark__i_xor, a.u[i] ^ b.u[i])
DSPARK__CALLED dspark__i dspark__i_left(dspark__i a, int n) { DSPARK__EACH(dspark__i, .u[i] = a.u[i] << n); }
DSPARK__CALLED dspark__i dspark__i_right(dspark__i a, int n) { DSPARK__EACH(dspark__i, .u[i] = a.u[i] >> n); }
DSPARK__CALLED dspark__i dspark__i_half(dspark__i a) {
    DSPARK__EACH(dspark__i, .u[i] = a.u[i] >> 1 | (a.u[i] & 0x80000000u));
}
DSPARK__CALLED void dspark__i_bytes(uint8_t *p, dspark__i a) {
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)a.u[i];
}
DSPARK__CALLED dspark__v dspark__v_swap8(dspark__v a) { DSPARK__EACH(dspark__v, .f[i] = a.f[i ^ 8]); }
DSPARK__CALLED dspark__v dspark__v_swap4(dspark__v a) { DSPARK__EACH(dspark__v, .f[i] = a.f[i ^ 4]); }
DSPARK__CALLED dspark__v dspark__v_swap2(dspark__v a) { DSPARK__EACH(dspark__v, .f[i] = a.f[i ^ 2]); }
DSPARK__CALLED dspark__v dspark__v_swap1(dspark__v a) { DSPARK__EACH(dspark__v, .f[i] = a.f[i ^ 1]); }
DSPARK__CALLED float dspark__v_first(dspark__v a) { return a.f[0]; }
typedef dspark__v dspark__p;
DSPARK__CALLED dspark__p dspark__p_zero(void) { return dspark__v_set(0); }
DSPARK__CALLED dspark__p dspark__p_load(const void *p) { return dspark__v_load(p); }
DSPARK__CALLED dspark__p dspark__p_input(const float *x, size_t k) { return dspark__v_load(x + k); }
DSPARK__CALLED dspark__p dspark__p_keep(dspark__p x) { return x; }
DSPARK__CALLED dspark__p dspark__p_fma(dspark__p a, dspark__p b, dspark__p c) {
    return dspark__v_fma(a, b, c);
}
DSPARK__CALLED dspark__v dspark__v_join(dspark__p a, dspark__p b) { return (void)b, a; }
// The code's exponent and mantissa, put into a float's fields, give 2^-120 of its value, subnormals included.
DSPARK__CALLED dspark__p dspark__p_fp8(const uint8_t *p, int part) {
    dspark__p y;
    p += part < 16;
    for (int i = 0; i < 16; i++, p += 2)
        y.f[i] = dspark__float_of((uint32_t)(*p & 128) << 24 | (uint32_t)(*p & 127) << 20) * 0x1p112f;
    return y;
}
DSPARK__CALLED dspark__p dspark__p_table(float scale) {
    static const float values[16] = { 0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6 };
    DSPARK__EACH(dspark__p, .f[i] = values[i] * scale);
}
DSPARK__CALLED dspark__p dspark__p_fp4(const uint8_t *p, int part, dspark__p table) {
    DSPARK__EACH(dspark__p, .f[i] = table.f[part < 16 ? p[i] >> 4 : p[i] & 15]);
}
DSPARK__CALLED void dspark__v_zip(float *y, dspark__v even, dspark__v odd) {
    for (int i = 0; i < 16; i++) y[2 * i] = even.f[i], y[2 * i + 1] = odd.f[i];
}
DSPARK__CALLED void dspark__v_unzip(float *y, dspark__v a, dspark__v b) {
    for (int i = 0; i < 8; i++) {
        y[i] = a.f[2 * i + 1], y[8 + i] = b.f[2 * i + 1];
        y[16 + i] = a.f[2 * i], y[24 + i] = b.f[2 * i];
    }
}
DSPARK__CALLED dspark__p dspark__p_bf16(const uint8_t *p) {
    dspark__p y;
    for (int i = 0; i < 16; i++, p += 2) y.f[i] = dspark__float_of((uint32_t)(p[0] | p[1] << 8) << 16);
    return y;
}
DSPARK__CALLED dspark__p dspark__p_f16(const uint8_t *p) {
    dspark__p y;
    for (int i = 0; i < 16; i++) {
        uint32_t h = p[2 * i] | (uint32_t)p[2 * i + 1] << 8, u = (h & 0x7fff) << 13;
        float f = dspark__float_of(u) * 0x1p112f;
        if ((h & 0x7c00) == 0x7c00) f = dspark__float_of(0x7f800000 | u);
        y.f[i] = h & 0x8000 ? -f : f;
    }
    return y;
}
DSPARK__CALLED dspark__v dspark__v_e8m0(const uint8_t *p) {
    DSPARK__EACH(dspark__v, .f[i] = dspark__e8m0(p[i]));
}
DSPARK__CALLED void dspark__prefetch(const void *p) { (void)p; }

#elif DSPARK__PATH == 2     // AVX2: two registers a vector
typedef struct { __m256 a, b; } dspark__v;
typedef struct { __m256i a, b; } dspark__i;
enum { DSPARK__AT(rows) = 3, DSPARK__AT(wide) = 4, DSPARK__AT(outputs) = 2, DSPARK__AT(piece) = 8 };
DSPARK__INLINE dspark__v DSPARK__AT(v_pair)(__m256 a, __m256 b) { dspark__v y; y.a = a, y.b = b; return y; }
DSPARK__INLINE dspark__i DSPARK__AT(i_pair)(__m256i a, __m256i b) { dspark__i y; y.a = a, y.b = b; return y; }
#undef DSPARK__V2
#undef DSPARK__I2
#define DSPARK__V2(operation) DSPARK__AT(v_pair)(operation(x.a, y.a), operation(x.b, y.b))
#define DSPARK__I2(operation) DSPARK__AT(i_pair)(operation(x.a, y.a), operation(x.b, y.b))
DSPARK__INLINE dspark__v dspark__v_set(float x) {
    return DSPARK__AT(v_pair)(_mm256_set1_ps(x), _mm256_set1_ps(x));
}
DSPARK__INLINE dspark__v dspark__v_load(const void *p) {
    return DSPARK__AT(v_pair)(_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)p + 8));
}
DSPARK__INLINE void dspark__v_store(float *p, dspark__v x) {
    _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b);
}
DSPARK__INLINE dspark__v dspark__v_add(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_add_ps); }
DSPARK__INLINE dspark__v dspark__v_sub(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_sub_ps); }
DSPARK__INLINE dspark__v dspark__v_mul(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_mul_ps); }
DSPARK__INLINE dspark__v dspark__v_div(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_div_ps); }
DSPARK__INLINE dspark__v dspark__v_max(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_max_ps); }
DSPARK__INLINE dspark__v dspark__v_min(dspark__v x, dspark__v y) { return DSPARK__V2(_mm256_min_ps); }
DSPARK__INLINE dspark__v dspark__v_fma(dspark__v x, dspark__v y, dspark__v z) {
    return DSPARK__AT(v_pair)(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
DSPARK__INLINE dspark__v dspark__v_sqrt(dspark__v x) {
    return DSPARK__AT(v_pair)(_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b));
}
DSPARK__INLINE dspark__v dspark__v_less(dspark__v a, dspark__v b, dspark__v x, dspark__v y) {
    return DSPARK__AT(v_pair)(_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
                              _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ)));
}
DSPARK__INLINE dspark__i dspark__v_bits(dspark__v x) {
    return DSPARK__AT(i_pair)(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
DSPARK__INLINE dspark__v dspark__i_floats(dspark__i x) {
    return DSPARK__AT(v_pair)(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b));
}
DSPARK__INLINE dspark__i dspark__i_set(uint32_t x) {
    return DSPARK__AT(i_pair)(_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x));
}
DSPARK__INLINE dspark__i dspark__i_add(dspark__i x, dspark__i y) { return DSPARK__I2(_mm256_add_epi32); }
DSPARK__INLINE dspark__i dspark__i_sub(dspark__i x, dspark__i y) { return DSPARK__I2(_mm256_sub_epi32); }
DSPARK__INLINE dspark__i dspark__i_and(dspark__i x, dspark__i y) { return DSPARK__I2(_mm256_and_si256); }
DSPARK__INLINE dspark__i dspark__i_xor(dspark__i x, dspark__i y) { return DSPARK__I2(_mm256_xor_si256); }
DSPARK__INLINE dspark__i dspark__i_left(dspark__i x, int n) {
    __m128i by = _mm_cvtsi32_si128(n);
    return DSPARK__AT(i_pair)(_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by));
}
DSPARK__INLINE dspark__i dspark__i_right(dspark__i x, int n) {
    __m128i by = _mm_cvtsi32_si128(n);
    return DSPARK__AT(i_pair)(_mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by));
}
DSPARK__INLINE dspark__i dspark__i_half(dspark__i x) {
    return DSPARK__AT(i_pair)(_mm256_srai_epi32(x.a, 1), _mm256_srai_epi32(x.b, 1));
}
DSPARK__INLINE void dspark__i_bytes(uint8_t *p, dspark__i x) {
    __m128i a = _mm_packus_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
    __m128i b = _mm_packus_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
    DSPARK__AT(store16)(p, _mm_packus_epi16(a, b));
}
DSPARK__INLINE dspark__v dspark__v_swap8(dspark__v x) { return DSPARK__AT(v_pair)(x.b, x.a); }
DSPARK__INLINE dspark__v dspark__v_swap4(dspark__v x) {
    return DSPARK__AT(v_pair)(_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1));
}
DSPARK__INLINE dspark__v dspark__v_swap2(dspark__v x) {
    return DSPARK__AT(v_pair)(_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e));
}
DSPARK__INLINE dspark__v dspark__v_swap1(dspark__v x) {
    return DSPARK__AT(v_pair)(_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1));
}
DSPARK__INLINE float dspark__v_first(dspark__v x) { return _mm256_cvtss_f32(x.a); }
typedef __m256 dspark__p;
DSPARK__INLINE dspark__p dspark__p_zero(void) { return _mm256_setzero_ps(); }
DSPARK__INLINE dspark__p dspark__p_load(const void *p) { return _mm256_loadu_ps((const float *)p); }
DSPARK__INLINE dspark__p dspark__p_input(const float *x, size_t k) { return _mm256_loadu_ps(x + k); }
DSPARK__INLINE dspark__p dspark__p_keep(dspark__p x) { __asm__("" : "+x"(x)); return x; }
DSPARK__INLINE dspark__p dspark__p_fma(dspark__p x, dspark__p y, dspark__p z) {
    return _mm256_fmadd_ps(x, y, z);
}
DSPARK__INLINE dspark__v dspark__v_join(dspark__p x, dspark__p y) { return DSPARK__AT(v_pair)(x, y); }
// A code in the upper byte of 16 bits, shifted right by one with its sign, is 2^-8 of its value in half precision,
// once the copied sign and the other code are masked out.
DSPARK__INLINE dspark__p dspark__p_fp8(const uint8_t *p, int part) {
    __m128i h = DSPARK__AT(load16)(p + 2 * (part & 8));
    if (part >= 16) h = _mm_slli_epi16(h, 8);
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(h, 1), _mm_set1_epi16((short)0xbf80)));
}
// Shifting a code's sign to its place shifts the rest of the code along; the table contains that rest too, so
// the xor cancels it.
DSPARK__INLINE dspark__p dspark__p_table(float scale) {
    __m256i rest = _mm256_slli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 28);
    return _mm256_xor_ps(_mm256_mul_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6), _mm256_set1_ps(scale)),
                         _mm256_castsi256_ps(rest));
}
DSPARK__INLINE dspark__p dspark__p_fp4(const uint8_t *p, int part, dspark__p table) {
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + (part & 8))));
    if (part < 16) code = _mm256_srli_epi32(code, 4);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, code),
                         _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
DSPARK__INLINE void DSPARK__AT(zip)(float *y, __m256 even, __m256 odd) {
    __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(y, _mm256_permute2f128_ps(a, b, 0x20));
    _mm256_storeu_ps(y + 8, _mm256_permute2f128_ps(a, b, 0x31));
}
DSPARK__INLINE void dspark__v_zip(float *y, dspark__v even, dspark__v odd) {
    DSPARK__AT(zip)(y, even.a, odd.a), DSPARK__AT(zip)(y + 16, even.b, odd.b);
}
DSPARK__INLINE void DSPARK__AT(unzip)(float *y, __m256 a, __m256 b) {
    __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    _mm256_storeu_ps(y, _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
    _mm256_storeu_ps(y + 16, _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
}
DSPARK__INLINE void dspark__v_unzip(float *y, dspark__v x, dspark__v z) {
    DSPARK__AT(unzip)(y, x.a, x.b), DSPARK__AT(unzip)(y + 8, z.a, z.b);
}
DSPARK__INLINE dspark__p dspark__p_bf16(const uint8_t *p) {
    __m128i h = DSPARK__AT(load16)(p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
DSPARK__INLINE dspark__p dspark__p_f16(const uint8_t *p) {
    return _mm256_cvtph_ps(DSPARK__AT(load16)(p));
}
DSPARK__INLINE void dspark__v_sum4(float *y, dspark__v a, dspark__v b, dspark__v c, dspark__v d) {
    DSPARK__AT(sum4)(y, _mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b), _mm256_add_ps(c.a, c.b),
                     _mm256_add_ps(d.a, d.b));
}
DSPARK__INLINE __m256 DSPARK__AT(e8m0_half)(const uint8_t *p) {
    __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(u, 23), _mm256_set1_epi32(0x400000)));
}
DSPARK__INLINE dspark__v dspark__v_e8m0(const uint8_t *p) {
    return DSPARK__AT(v_pair)(DSPARK__AT(e8m0_half)(p), DSPARK__AT(e8m0_half)(p + 8));
}

#elif DSPARK__PATH == 3 || DSPARK__PATH == 5     // AVX-512: one register. 5: for products of bfloat16
typedef struct { __m512 a; } dspark__v;
typedef struct { __m512i a; } dspark__i;
enum { DSPARK__AT(rows) = 6, DSPARK__AT(wide) = 4, DSPARK__AT(outputs) = 4 };
enum { DSPARK__AT(piece) = DSPARK__PATH == 5 ? 32 : 16 };
DSPARK__INLINE dspark__v DSPARK__AT(v_of)(__m512 a) { dspark__v y; y.a = a; return y; }
DSPARK__INLINE dspark__i DSPARK__AT(i_of)(__m512i a) { dspark__i y; y.a = a; return y; }
#define DSPARK__V1(operation) DSPARK__AT(v_of)(operation(x.a, y.a))
#define DSPARK__I1(operation) DSPARK__AT(i_of)(operation(x.a, y.a))
DSPARK__INLINE dspark__v dspark__v_set(float x) { return DSPARK__AT(v_of)(_mm512_set1_ps(x)); }
DSPARK__INLINE dspark__v dspark__v_load(const void *p) { return DSPARK__AT(v_of)(_mm512_loadu_ps(p)); }
DSPARK__INLINE void dspark__v_store(float *p, dspark__v x) { _mm512_storeu_ps(p, x.a); }
DSPARK__INLINE dspark__v dspark__v_add(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_add_ps); }
DSPARK__INLINE dspark__v dspark__v_sub(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_sub_ps); }
DSPARK__INLINE dspark__v dspark__v_mul(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_mul_ps); }
DSPARK__INLINE dspark__v dspark__v_div(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_div_ps); }
DSPARK__INLINE dspark__v dspark__v_max(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_max_ps); }
DSPARK__INLINE dspark__v dspark__v_min(dspark__v x, dspark__v y) { return DSPARK__V1(_mm512_min_ps); }
DSPARK__INLINE dspark__v dspark__v_fma(dspark__v x, dspark__v y, dspark__v z) {
    return DSPARK__AT(v_of)(_mm512_fmadd_ps(x.a, y.a, z.a));
}
DSPARK__INLINE dspark__v dspark__v_sqrt(dspark__v x) { return DSPARK__AT(v_of)(_mm512_sqrt_ps(x.a)); }
DSPARK__INLINE dspark__v dspark__v_less(dspark__v a, dspark__v b, dspark__v x, dspark__v y) {
    return DSPARK__AT(v_of)(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.a, b.a, _CMP_LT_OQ), y.a, x.a));
}
DSPARK__INLINE dspark__i dspark__v_bits(dspark__v x) { return DSPARK__AT(i_of)(_mm512_castps_si512(x.a)); }
DSPARK__INLINE dspark__v dspark__i_floats(dspark__i x) { return DSPARK__AT(v_of)(_mm512_castsi512_ps(x.a)); }
DSPARK__INLINE dspark__i dspark__i_set(uint32_t x) { return DSPARK__AT(i_of)(_mm512_set1_epi32((int)x)); }
DSPARK__INLINE dspark__i dspark__i_add(dspark__i x, dspark__i y) { return DSPARK__I1(_mm512_add_epi32); }
DSPARK__INLINE dspark__i dspark__i_sub(dspark__i x, dspark__i y) { return DSPARK__I1(_mm512_sub_epi32); }
DSPARK__INLINE dspark__i dspark__i_and(dspark__i x, dspark__i y) { return DSPARK__I1(_mm512_and_si512); }
DSPARK__INLINE dspark__i dspark__i_xor(dspark__i x, dspark__i y) { return DSPARK__I1(_mm512_xor_si512); }
DSPARK__INLINE dspark__i dspark__i_left(dspark__i x, int n) {
    return DSPARK__AT(i_of)(_mm512_sll_epi32(x.a, _mm_cvtsi32_si128(n)));
}
DSPARK__INLINE dspark__i dspark__i_right(dspark__i x, int n) {
    return DSPARK__AT(i_of)(_mm512_srl_epi32(x.a, _mm_cvtsi32_si128(n)));
}
DSPARK__INLINE dspark__i dspark__i_half(dspark__i x) { return DSPARK__AT(i_of)(_mm512_srai_epi32(x.a, 1)); }
DSPARK__INLINE void dspark__i_bytes(uint8_t *p, dspark__i x) {
    DSPARK__AT(store16)(p, _mm512_cvtepi32_epi8(x.a));
}
DSPARK__INLINE dspark__v dspark__v_swap8(dspark__v x) {
    return DSPARK__AT(v_of)(_mm512_shuffle_f32x4(x.a, x.a, 0x4e));
}
DSPARK__INLINE dspark__v dspark__v_swap4(dspark__v x) {
    return DSPARK__AT(v_of)(_mm512_shuffle_f32x4(x.a, x.a, 0xb1));
}
DSPARK__INLINE dspark__v dspark__v_swap2(dspark__v x) {
    return DSPARK__AT(v_of)(_mm512_permute_ps(x.a, 0x4e));
}
DSPARK__INLINE dspark__v dspark__v_swap1(dspark__v x) {
    return DSPARK__AT(v_of)(_mm512_permute_ps(x.a, 0xb1));
}
DSPARK__INLINE float dspark__v_first(dspark__v x) { return _mm512_cvtss_f32(x.a); }
DSPARK__INLINE __m256 DSPARK__AT(fold)(dspark__v x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x.a), _mm512_extractf32x8_ps(x.a, 1));
}
DSPARK__INLINE void dspark__v_sum4(float *y, dspark__v a, dspark__v b, dspark__v c, dspark__v d) {
    DSPARK__AT(sum4)(y, DSPARK__AT(fold)(a), DSPARK__AT(fold)(b), DSPARK__AT(fold)(c), DSPARK__AT(fold)(d));
}
// In each quarter of a register, 4 x 4: element j of v[i] becomes element i of v[j].
DSPARK__INLINE void DSPARK__AT(turn)(__m512 *v) {
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
// y[r][q] = v_sum of v[r][q] for four rows: adds halves, then quarters, of a row's four together; then of all rows.
#define DSPARK__QUARTERS_SUM(r) { \
        __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(v[r][0][0], v[r][1][0], 0x44), \
                                  _mm512_shuffle_f32x4(v[r][0][0], v[r][1][0], 0xee)); \
        __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(v[r][2][0], v[r][3][0], 0x44), \
                                  _mm512_shuffle_f32x4(v[r][2][0], v[r][3][0], 0xee)); \
        t[r] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd)); \
    }
DSPARK__INLINE void DSPARK__AT(sum16)(float *const *y, int at, __m512 (*v)[4][2]) {
    const __m512i rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 t[4];
    DSPARK__QUARTERS_SUM(0) DSPARK__QUARTERS_SUM(1) DSPARK__QUARTERS_SUM(2) DSPARK__QUARTERS_SUM(3)
    DSPARK__AT(turn)(t);
    t[0] = _mm512_permutexvar_ps(rows, _mm512_add_ps(_mm512_add_ps(t[0], t[2]), _mm512_add_ps(t[1], t[3])));
    _mm_storeu_ps(y[0] + at, _mm512_castps512_ps128(t[0]));
    _mm_storeu_ps(y[1] + at, _mm512_extractf32x4_ps(t[0], 1));
    _mm_storeu_ps(y[2] + at, _mm512_extractf32x4_ps(t[0], 2));
    _mm_storeu_ps(y[3] + at, _mm512_extractf32x4_ps(t[0], 3));
}
DSPARK__INLINE dspark__v dspark__v_e8m0(const uint8_t *p) {
    __m512i u = _mm512_cvtepu8_epi32(DSPARK__AT(load16)(p));
    u = _mm512_max_epi32(_mm512_slli_epi32(u, 23), _mm512_set1_epi32(0x400000));
    return DSPARK__AT(v_of)(_mm512_castsi512_ps(u));
}
typedef __m512 dspark__p;
DSPARK__INLINE dspark__p dspark__p_zero(void) { return _mm512_setzero_ps(); }
DSPARK__INLINE dspark__p dspark__p_load(const void *p) { return _mm512_loadu_ps(p); }
DSPARK__INLINE dspark__p dspark__p_keep(dspark__p x) { __asm__("" : "+v"(x)); return x; }
DSPARK__INLINE dspark__v dspark__v_join(dspark__p x, dspark__p y) { return (void)y, DSPARK__AT(v_of)(x); }
#if DSPARK__PATH == 3
DSPARK__INLINE dspark__p dspark__p_input(const float *x, size_t k) { return _mm512_loadu_ps(x + k); }
DSPARK__INLINE dspark__p dspark__p_fma(dspark__p x, dspark__p y, dspark__p z) {
    return _mm512_fmadd_ps(x, y, z);
}
// As in AVX2.
DSPARK__INLINE dspark__p dspark__p_fp8(const uint8_t *p, int part) {
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    if (part >= 16) h = _mm256_slli_epi16(h, 8);
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(h, 1), _mm256_set1_epi16((short)0xbf80)));
}
DSPARK__INLINE dspark__p dspark__p_table(float scale) {
    __m512 values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return _mm512_mul_ps(values, _mm512_set1_ps(scale));
}
DSPARK__INLINE dspark__p dspark__p_fp4(const uint8_t *p, int part, dspark__p table) {
    __m512i code = _mm512_cvtepu8_epi32(DSPARK__AT(load16)(p));
    return _mm512_permutexvar_ps(part < 16 ? _mm512_srli_epi32(code, 4) : code, table);
}
DSPARK__INLINE void dspark__v_zip(float *y, dspark__v even, dspark__v odd) {
    __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(y, _mm512_permutex2var_ps(even.a, low, odd.a));
    _mm512_storeu_ps(y + 16, _mm512_permutex2var_ps(even.a, high, odd.a));
}
DSPARK__INLINE void dspark__v_unzip(float *y, dspark__v a, dspark__v b) {
    __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_storeu_ps(y, _mm512_permutex2var_ps(a.a, odd, b.a));
    _mm512_storeu_ps(y + 16, _mm512_permutex2var_ps(a.a, even, b.a));
}
DSPARK__INLINE dspark__p dspark__p_bf16(const uint8_t *p) {
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
DSPARK__INLINE dspark__p dspark__p_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
// n inputs to pairs of bfloat16; returns whether that is exact, and each 0 or of a size that no scale underflows.
static int DSPARK__AT(to_bf16)(const float *x, int n, uint16_t *y) {
    const __m512i least = _mm512_set1_epi32(0x2b800000), range = _mm512_set1_epi32(0x28000000);      // 2^-40 .. 2^40
    unsigned bad = 0;
    for (int k = 0; k < n; k += 16) {
        __m512i u = _mm512_loadu_si512(x + k), a = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
        __mmask16 some = _mm512_test_epi32_mask(a, a);
        bad |= _mm512_test_epi32_mask(u, _mm512_set1_epi32(0xffff));
        bad |= _mm512_mask_cmpge_epu32_mask(some, _mm512_sub_epi32(a, least), range);
        _mm256_storeu_si256((__m256i *)(void *)(y + k), _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
    }
    return !bad;
}
// y = x times the scales of a row of FP8 blocks, `each` inputs a scale: adds its exponent where x is not 0.
static void DSPARK__AT(scale_bf16)(const uint16_t *x, int n, int each, const uint8_t *scale, uint16_t *y) {
    __m512i power = _mm512_setzero_si512();
    for (int k = 0; k < n; k += 32) {
        __m512i u = _mm512_loadu_si512(x + k);
        __mmask32 some = _mm512_test_epi16_mask(u, _mm512_set1_epi16(0x7fff));
        if (k % each == 0) power = _mm512_set1_epi16((short)(dspark__fp8_power(scale[k / each]) * 128));
        _mm512_storeu_si512(y + k, _mm512_mask_add_epi16(u, some, u, power));
    }
}
#else       // a piece is 32 bfloat16, in pairs; inputs are bfloat16 too
DSPARK__INLINE dspark__p dspark__p_input(const float *x, size_t k) { return _mm512_loadu_ps(x + k / 2); }
DSPARK__INLINE dspark__p dspark__p_bf16(const uint8_t *p) { return _mm512_loadu_ps(p); }
DSPARK__INLINE dspark__p dspark__p_fma(dspark__p x, dspark__p y, dspark__p z) {
    return _mm512_dpbf16_ps(z, (__m512bh)x, (__m512bh)y);
}
// A code without its sign indexes tables of the bytes of 2^-8 of its value. Both halves of 64 are decoded at once:
// the second call reuses the first's work.
#define DSPARK__16(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#define DSPARK__LOW 0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240
static const uint8_t DSPARK__AT(upper)[128] = {
    0, 0x37, 0x37, 0x37, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, 0x38, DSPARK__16(0x39),
    DSPARK__16(0x3a), DSPARK__16(0x3b), DSPARK__16(0x3c), DSPARK__16(0x3d), DSPARK__16(0x3e), DSPARK__16(0x3f)
}, DSPARK__AT(lower)[128] = {
    0, 0, 128, 192, 0, 32, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240, DSPARK__LOW, DSPARK__LOW, DSPARK__LOW,
    DSPARK__LOW, DSPARK__LOW, DSPARK__LOW, DSPARK__LOW
};
DSPARK__INLINE dspark__p dspark__p_fp8(const uint8_t *p, int part) {
    const uint8_t *up = DSPARK__AT(upper), *low = DSPARK__AT(lower);
    __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);      // unpack takes of each 16 bytes the halves in turn
    __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p)), u, l;
    u = _mm512_permutex2var_epi8(_mm512_loadu_si512(up), code, _mm512_loadu_si512(up + 64));
    l = _mm512_permutex2var_epi8(_mm512_loadu_si512(low), code, _mm512_loadu_si512(low + 64));
    u = _mm512_ternarylogic_epi32(u, code, _mm512_set1_epi8(-128), 0xf8);       // u | (code & 128)
    return _mm512_castsi512_ps(part ? _mm512_unpackhi_epi8(l, u) : _mm512_unpacklo_epi8(l, u));
}
// All codes' values times each scale, clamped to 2^-64 .. 2^64, four a number; twice, as indices have a bit too many.
#define DSPARK__CODES(e, sign) \
    (sign & ~0xffffull) + (e - 1) * 0x80008000800000 + 0xc0008000000000, \
    sign + (e - 1) * 0x80008000800080 + 0x1c0018001400100
#define DSPARK__SIGNED(e) DSPARK__CODES(e, 0), DSPARK__CODES(e, 0x8000800080008000)
#define DSPARK__SCALED(e) { DSPARK__SIGNED((e)), DSPARK__SIGNED((e)) }
#define DSPARK__SCALED4(e) DSPARK__SCALED(e), DSPARK__SCALED(e + 1), DSPARK__SCALED(e + 2), DSPARK__SCALED(e + 3)
#define DSPARK__SCALED16(e) DSPARK__SCALED4(e), DSPARK__SCALED4(e + 4), DSPARK__SCALED4(e + 8), DSPARK__SCALED4(e + 12)
#define DSPARK__SAME16(e) DSPARK__16(DSPARK__SCALED(e))
static const uint64_t DSPARK__AT(scaled)[256][8] __attribute__((aligned(64))) = {
    DSPARK__SAME16(63), DSPARK__SAME16(63), DSPARK__SAME16(63), DSPARK__SAME16(63), DSPARK__SCALED16(64),
    DSPARK__SCALED16(80), DSPARK__SCALED16(96), DSPARK__SCALED16(112), DSPARK__SCALED16(128), DSPARK__SCALED16(144),
    DSPARK__SCALED16(160), DSPARK__SCALED16(176), DSPARK__SAME16(191), DSPARK__SAME16(191), DSPARK__SAME16(191),
    DSPARK__SAME16(191)
};
DSPARK__INLINE dspark__p dspark__p_table(uint8_t scale) { return _mm512_load_ps(DSPARK__AT(scaled)[scale]); }
DSPARK__INLINE dspark__p dspark__p_fp4(const uint8_t *p, int part, dspark__p table) {
    __m512i code = _mm512_cvtepu8_epi32(DSPARK__AT(load16)(p + part / 2));
    code = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0024002000040000), code);    // bits 0 and 4 of each 32
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(code, _mm512_castps_si512(table)));
}
#endif

#elif DSPARK__PATH == 4     // NEON: four registers
typedef struct { float32x4_t a, b, c, d; } dspark__v;
typedef struct { uint32x4_t a, b, c, d; } dspark__i;
enum { DSPARK__AT(rows) = 3, DSPARK__AT(wide) = 4, DSPARK__AT(outputs) = 2, DSPARK__AT(piece) = 8 };
DSPARK__INLINE dspark__v DSPARK__AT(v_of)(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    dspark__v y;
    y.a = a, y.b = b, y.c = c, y.d = d;
    return y;
}
DSPARK__INLINE dspark__i DSPARK__AT(i_of)(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    dspark__i y;
    y.a = a, y.b = b, y.c = c, y.d = d;
    return y;
}
#define DSPARK__V4(operation) \
    DSPARK__AT(v_of)(operation(x.a, y.a), operation(x.b, y.b), operation(x.c, y.c), operation(x.d, y.d))
#define DSPARK__I4(operation) \
    DSPARK__AT(i_of)(operation(x.a, y.a), operation(x.b, y.b), operation(x.c, y.c), operation(x.d, y.d))
#define DSPARK__V4_EACH(operation) \
    DSPARK__AT(v_of)(operation(x.a), operation(x.b), operation(x.c), operation(x.d))
#define DSPARK__I4_EACH(operation) \
    DSPARK__AT(i_of)(operation(x.a), operation(x.b), operation(x.c), operation(x.d))
DSPARK__INLINE dspark__v dspark__v_set(float a) {
    float32x4_t x = vdupq_n_f32(a);
    return DSPARK__AT(v_of)(x, x, x, x);
}
DSPARK__INLINE dspark__v dspark__v_load(const void *from) {
    const uint8_t *p = (const uint8_t *)from;
    return DSPARK__AT(v_of)(vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p + 16)),
                            vreinterpretq_f32_u8(vld1q_u8(p + 32)), vreinterpretq_f32_u8(vld1q_u8(p + 48)));
}
DSPARK__INLINE void dspark__v_store(float *p, dspark__v x) {
    vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
}
DSPARK__INLINE dspark__v dspark__v_add(dspark__v x, dspark__v y) { return DSPARK__V4(vaddq_f32); }
DSPARK__INLINE dspark__v dspark__v_sub(dspark__v x, dspark__v y) { return DSPARK__V4(vsubq_f32); }
DSPARK__INLINE dspark__v dspark__v_mul(dspark__v x, dspark__v y) { return DSPARK__V4(vmulq_f32); }
DSPARK__INLINE dspark__v dspark__v_div(dspark__v x, dspark__v y) { return DSPARK__V4(vdivq_f32); }
DSPARK__INLINE float32x4_t DSPARK__AT(max4)(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
DSPARK__INLINE float32x4_t DSPARK__AT(min4)(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
DSPARK__INLINE dspark__v dspark__v_max(dspark__v x, dspark__v y) { return DSPARK__V4(DSPARK__AT(max4)); }
DSPARK__INLINE dspark__v dspark__v_min(dspark__v x, dspark__v y) { return DSPARK__V4(DSPARK__AT(min4)); }
DSPARK__INLINE dspark__v dspark__v_fma(dspark__v x, dspark__v y, dspark__v z) {
    return DSPARK__AT(v_of)(vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
                            vfmaq_f32(z.d, x.d, y.d));
}
DSPARK__INLINE dspark__v dspark__v_sqrt(dspark__v x) { return DSPARK__V4_EACH(vsqrtq_f32); }
DSPARK__INLINE dspark__v dspark__v_less(dspark__v a, dspark__v b, dspark__v x, dspark__v y) {
    x.a = vbslq_f32(vcltq_f32(a.a, b.a), x.a, y.a), x.b = vbslq_f32(vcltq_f32(a.b, b.b), x.b, y.b);
    x.c = vbslq_f32(vcltq_f32(a.c, b.c), x.c, y.c), x.d = vbslq_f32(vcltq_f32(a.d, b.d), x.d, y.d);
    return x;
}
DSPARK__INLINE dspark__i dspark__v_bits(dspark__v x) { return DSPARK__I4_EACH(vreinterpretq_u32_f32); }
DSPARK__INLINE dspark__v dspark__i_floats(dspark__i x) { return DSPARK__V4_EACH(vreinterpretq_f32_u32); }
DSPARK__INLINE dspark__i dspark__i_set(uint32_t a) {
    uint32x4_t x = vdupq_n_u32(a);
    return DSPARK__AT(i_of)(x, x, x, x);
}
DSPARK__INLINE dspark__i dspark__i_add(dspark__i x, dspark__i y) { return DSPARK__I4(vaddq_u32); }
DSPARK__INLINE dspark__i dspark__i_sub(dspark__i x, dspark__i y) { return DSPARK__I4(vsubq_u32); }
DSPARK__INLINE dspark__i dspark__i_and(dspark__i x, dspark__i y) { return DSPARK__I4(vandq_u32); }
DSPARK__INLINE dspark__i dspark__i_xor(dspark__i x, dspark__i y) { return DSPARK__I4(veorq_u32); }
DSPARK__INLINE dspark__i dspark__i_left(dspark__i x, int n) {
    int32x4_t by = vdupq_n_s32(n);
    return DSPARK__AT(i_of)(vshlq_u32(x.a, by), vshlq_u32(x.b, by), vshlq_u32(x.c, by), vshlq_u32(x.d, by));
}
DSPARK__INLINE dspark__i dspark__i_right(dspark__i x, int n) { return dspark__i_left(x, -n); }
DSPARK__INLINE uint32x4_t DSPARK__AT(half4)(uint32x4_t x) {
    return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(x), 1));
}
DSPARK__INLINE dspark__i dspark__i_half(dspark__i x) { return DSPARK__I4_EACH(DSPARK__AT(half4)); }
DSPARK__INLINE void dspark__i_bytes(uint8_t *p, dspark__i x) {
    uint16x8_t a = vcombine_u16(vmovn_u32(x.a), vmovn_u32(x.b));
    uint16x8_t b = vcombine_u16(vmovn_u32(x.c), vmovn_u32(x.d));
    vst1q_u8(p, vcombine_u8(vmovn_u16(a), vmovn_u16(b)));
}
DSPARK__INLINE dspark__v dspark__v_swap8(dspark__v x) { return DSPARK__AT(v_of)(x.c, x.d, x.a, x.b); }
DSPARK__INLINE dspark__v dspark__v_swap4(dspark__v x) { return DSPARK__AT(v_of)(x.b, x.a, x.d, x.c); }
DSPARK__INLINE float32x4_t DSPARK__AT(swap2)(float32x4_t x) { return vextq_f32(x, x, 2); }
DSPARK__INLINE dspark__v dspark__v_swap2(dspark__v x) { return DSPARK__V4_EACH(DSPARK__AT(swap2)); }
DSPARK__INLINE dspark__v dspark__v_swap1(dspark__v x) { return DSPARK__V4_EACH(vrev64q_f32); }
DSPARK__INLINE float dspark__v_first(dspark__v x) { return vgetq_lane_f32(x.a, 0); }
typedef struct { float32x4_t a, b; } dspark__p;
DSPARK__INLINE dspark__p DSPARK__AT(p_of)(float32x4_t a, float32x4_t b) {
    dspark__p y;
    y.a = a, y.b = b;
    return y;
}
DSPARK__INLINE dspark__p dspark__p_zero(void) { return DSPARK__AT(p_of)(vdupq_n_f32(0), vdupq_n_f32(0)); }
DSPARK__INLINE dspark__p dspark__p_load(const void *from) {
    const uint8_t *p = (const uint8_t *)from;
    return DSPARK__AT(p_of)(vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p + 16)));
}
DSPARK__INLINE dspark__p dspark__p_keep(dspark__p x) { return x; }
DSPARK__INLINE dspark__p dspark__p_input(const float *x, size_t k) { return dspark__p_load(x + k); }
DSPARK__INLINE dspark__p dspark__p_fma(dspark__p x, dspark__p y, dspark__p z) {
    return DSPARK__AT(p_of)(vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b));
}
DSPARK__INLINE dspark__v dspark__v_join(dspark__p x, dspark__p y) {
    return DSPARK__AT(v_of)(x.a, x.b, y.a, y.b);
}
DSPARK__INLINE dspark__p DSPARK__AT(p_half)(uint16x8_t x) {         // of half precision
    float16x8_t a = vreinterpretq_f16_u16(x);
    return DSPARK__AT(p_of)(vcvt_f32_f16(vget_low_f16(a)), vcvt_f32_f16(vget_high_f16(a)));
}
// As in AVX2.
DSPARK__INLINE dspark__p dspark__p_fp8(const uint8_t *p, int part) {
    int16x8_t h = vreinterpretq_s16_u8(vld1q_u8(p + 2 * (part & 8)));
    if (part >= 16) h = vshlq_n_s16(h, 8);
    return DSPARK__AT(p_half)(vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(h, 1)), vdupq_n_u16(0xbf80)));
}
DSPARK__INLINE dspark__p dspark__p_table(float scale) {
    return DSPARK__AT(p_of)(vdupq_n_f32(scale), vdupq_n_f32(scale));
}
DSPARK__INLINE dspark__p dspark__p_fp4(const uint8_t *p, int part, dspark__p table) {
    static const uint8_t halves[16] = { 0, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46,    // their upper bytes
                                        0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6 };
    uint8x8_t x = vld1_u8(p + (part & 8));
    dspark__p y;
    x = part < 16 ? vshr_n_u8(x, 4) : vand_u8(x, vdup_n_u8(15));
    y = DSPARK__AT(p_half)(vshll_n_u8(vqtbl1_u8(vld1q_u8(halves), x), 8));
    return DSPARK__AT(p_of)(vmulq_f32(y.a, table.a), vmulq_f32(y.b, table.b));
}
DSPARK__INLINE void DSPARK__AT(store2)(float *y, float32x4x2_t x, int apart) {
    vst1q_f32(y, x.val[0]), vst1q_f32(y + apart, x.val[1]);
}
DSPARK__INLINE void dspark__v_zip(float *y, dspark__v even, dspark__v odd) {
    DSPARK__AT(store2)(y, vzipq_f32(even.a, odd.a), 4), DSPARK__AT(store2)(y + 8, vzipq_f32(even.b, odd.b), 4);
    DSPARK__AT(store2)(y + 16, vzipq_f32(even.c, odd.c), 4), DSPARK__AT(store2)(y + 24, vzipq_f32(even.d, odd.d), 4);
}
DSPARK__INLINE void dspark__v_unzip(float *y, dspark__v x, dspark__v z) {      // even ones first in uzp
    DSPARK__AT(store2)(y + 16, vuzpq_f32(x.a, x.b), -16), DSPARK__AT(store2)(y + 20, vuzpq_f32(x.c, x.d), -16);
    DSPARK__AT(store2)(y + 24, vuzpq_f32(z.a, z.b), -16), DSPARK__AT(store2)(y + 28, vuzpq_f32(z.c, z.d), -16);
}
DSPARK__INLINE dspark__p dspark__p_bf16(const uint8_t *p) {
    uint16x8_t x = vreinterpretq_u16_u8(vld1q_u8(p));
    return DSPARK__AT(p_of)(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)),
                            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(x), 16)));
}
DSPARK__INLINE dspark__p dspark__p_f16(const uint8_t *p) {
    return DSPARK__AT(p_half)(vreinterpretq_u16_u8(vld1q_u8(p)));
}
DSPARK__INLINE dspark__v dspark__v_e8m0(const uint8_t *p) {
    float y[16];
    for (int i = 0; i < 16; i++) y[i] = dspark__e8m0(p[i]);
    return dspark__v_load(y);
}
DSPARK__INLINE void dspark__prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }
#endif

// ---- From here on the same text for all paths.

#define dspark__v_zero() dspark__v_set(0)
#define dspark__v_abs DSPARK__AT(v_abs)
#define dspark__v_sum DSPARK__AT(v_sum)
#define dspark__v_largest DSPARK__AT(v_largest)
#define dspark__v_load_n DSPARK__AT(v_load_n)
#define dspark__v_store_n DSPARK__AT(v_store_n)

DSPARK__WORD dspark__v dspark__v_abs(dspark__v x) {
    return dspark__i_floats(dspark__i_and(dspark__v_bits(x), dspark__i_set(0x7fffffff)));
}
DSPARK__WORD float dspark__v_sum(dspark__v x) {
    x = dspark__v_add(x, dspark__v_swap8(x));
    x = dspark__v_add(x, dspark__v_swap4(x));
    x = dspark__v_add(x, dspark__v_swap2(x));
    return dspark__v_first(dspark__v_add(x, dspark__v_swap1(x)));
}
DSPARK__WORD float dspark__v_largest(dspark__v x) {
    x = dspark__v_max(x, dspark__v_swap8(x));
    x = dspark__v_max(x, dspark__v_swap4(x));
    x = dspark__v_max(x, dspark__v_swap2(x));
    return dspark__v_first(dspark__v_max(x, dspark__v_swap1(x)));
}
#if DSPARK__PATH == 1 || DSPARK__PATH == 4
DSPARK__WORD void dspark__v_sum4(float *y, dspark__v a, dspark__v b, dspark__v c, dspark__v d) {
    y[0] = dspark__v_sum(a), y[1] = dspark__v_sum(b), y[2] = dspark__v_sum(c), y[3] = dspark__v_sum(d);
}
#endif
// The first n > -16 lanes (16 if n is more); loads set the others to `fill`, stores leave them alone.
#if DSPARK__PATH == 3 || DSPARK__PATH == 5     // inline: a call would spill the sums at each step
DSPARK__INLINE __mmask16 DSPARK__AT(lanes)(int n) { return (__mmask16)(0xffffu >> (n < 16 ? 16 - n : 0)); }
DSPARK__INLINE dspark__v dspark__v_load_n(const float *p, int n, float fill) {
    return DSPARK__AT(v_of)(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), DSPARK__AT(lanes)(n), p));
}
DSPARK__INLINE void dspark__v_store_n(float *p, int n, dspark__v x) {
    if (n >= 16) dspark__v_store(p, x);
    else _mm512_mask_storeu_ps(p, DSPARK__AT(lanes)(n), x.a);
}
#else
DSPARK__CALLED dspark__v DSPARK__AT(load_some)(const float *p, int n, float fill) {
    float some[16];
    for (int i = 0; i < 16; i++) some[i] = i < n ? p[i] : fill;
    return dspark__v_load(some);
}
DSPARK__CALLED void DSPARK__AT(store_some)(float *p, int n, dspark__v x) {
    float some[16];
    dspark__v_store(some, x);
    memcpy(p, some, (size_t)n * sizeof(float));
}
DSPARK__WORD dspark__v dspark__v_load_n(const float *p, int n, float fill) {
    return n >= 16 ? dspark__v_load(p) : DSPARK__AT(load_some)(p, n, fill);
}
DSPARK__WORD void dspark__v_store_n(float *p, int n, dspark__v x) {
    if (n >= 16) dspark__v_store(p, x);
    else DSPARK__AT(store_some)(p, n, x);
}
#endif

#if DSPARK__PATH != 5
// n FP4 scales, held in 2^-64 .. 2^64, as p_table wants them; up to 15 too many are written.
static void DSPARK__AT(scales)(const uint8_t *codes, int n, const uint8_t *end, float *y) {
    for (int k = 0; k < n; k += 16, codes += 16) {
        uint8_t some[16] = { 0 };
        dspark__v v;
        if (end - codes < 16) memcpy(some, codes, end > codes ? (size_t)(end - codes) : 0);
        v = dspark__v_e8m0(end - codes < 16 ? some : codes);
        v = dspark__v_max(dspark__v_set(0x1p-64f), dspark__v_min(dspark__v_set(0x1p64f), v));
        dspark__v_store(y + k, v);
    }
}
#endif

// A piece of the block that begins at weight k; FP8: 2^-8 of the weights; FP4: times their scale
#define dspark__p_decode DSPARK__AT(p_decode)
DSPARK__WORD dspark__p dspark__p_decode(const int dtype, const uint8_t *w, size_t k, int part, dspark__p table) {
    if (dtype == DSPARK_FP8) return dspark__p_fp8(w + k, part);
    if (dtype == DSPARK_FP4) return dspark__p_fp4(w + k / 2, part, table);
    if (dtype == DSPARK_BF16) return dspark__p_bf16(w + 2 * (k + (size_t)part));
#if DSPARK__PATH != 5
    if (dtype == DSPARK_F16) return dspark__p_f16(w + 2 * (k + (size_t)part));
#endif
    return dspark__p_load(w + 4 * (k + (size_t)part));
}
DSPARK__INLINE size_t DSPARK__AT(bytes)(const int dtype, size_t k) {
    return dtype == DSPARK_FP8 ? k : dtype == DSPARK_FP4 ? k / 2 : dtype == DSPARK_F32 ? 4 * k : 2 * k;
}

// The innermost loop of all products: R inputs times Q rows of weights, a block of 32 (64 if a piece is 32) at a time.
// dtype, R and Q are constants in each call, so that unused code vanishes and acc stays in registers (hence no loops
// over r and q: GCC at -O2 would not unroll them). Weights are decoded where they are used, each for R rows:
// measured, that costs less than loading floats from a tile decoded before.
#define DSPARK__EACH_ROW(what) \
    if (R > 0) { what(0) } if (R > 1) { what(1) } if (R > 2) { what(2) } \
    if (R > 3) { what(3) } if (R > 4) { what(4) } if (R > 5) { what(5) }
#define DSPARK__EACH_OUTPUT(what) what(0) if (Q > 1) { what(1) } if (Q > 2) { what(2) } if (Q > 3) { what(3) }
#define DSPARK__ZERO(r) \
    acc[r][0][0] = acc[r][1][0] = acc[r][2][0] = acc[r][3][0] = dspark__p_zero(); \
    acc[r][0][1] = acc[r][1][1] = acc[r][2][1] = acc[r][3][1] = dspark__p_zero();
#define DSPARK__MULTIPLY(r) \
    v = dspark__p_keep(dspark__p_input(p->x[r], k + part)); \
    acc[r][0][half] = dspark__p_fma(w0, v, acc[r][0][half]); \
    if (Q > 1) acc[r][1][half] = dspark__p_fma(w1, v, acc[r][1][half]); \
    if (Q > 2) acc[r][2][half] = dspark__p_fma(w2, v, acc[r][2][half]); \
    if (Q > 3) acc[r][3][half] = dspark__p_fma(w3, v, acc[r][3][half]);
#define DSPARK__PREFETCH(q) \
    dspark__prefetch((const void *)((uintptr_t)(p->w[q] + at + DSPARK__AT(bytes)(dtype, k)) + p->ahead));
#undef DSPARK__TABLE
#if DSPARK__PATH == 5
#define DSPARK__TABLE(q) t##q = dspark__p_table(p->codes[q][(2 * at + k + part) / 32]);     // one for 16 bytes of a row
#else
#define DSPARK__TABLE(q) t##q = dspark__p_table(scale[q * blocks + (k + part) / 32]);
#endif
#define DSPARK__DECODE(q) w##q = dspark__p_decode(dtype, p->w[q] + at, k, part, t##q);
#define DSPARK__STEP(from, which) { \
        enum { part = from, half = which }; \
        if (dtype == DSPARK_FP4 && part % 32 == 0) { DSPARK__EACH_OUTPUT(DSPARK__TABLE) } \
        DSPARK__EACH_OUTPUT(DSPARK__DECODE) \
        DSPARK__EACH_ROW(DSPARK__MULTIPLY) \
    }
#define DSPARK__JOIN(r, q) dspark__v_join(acc[r][q][0], acc[r][q][1])
#define DSPARK__SUM(r) \
    if (Q > 3) { \
        dspark__v_sum4(p->y[r] + Q * g, DSPARK__JOIN(r, 0), DSPARK__JOIN(r, 1), DSPARK__JOIN(r, 2), \
                       DSPARK__JOIN(r, 3)); \
    } else { \
        p->y[r][Q * g] = dspark__v_sum(DSPARK__JOIN(r, 0)); \
        if (Q > 1) p->y[r][Q * g + 1] = dspark__v_sum(DSPARK__JOIN(r, 1)); \
    }

#define dspark__product_of DSPARK__AT(product_of)
DSPARK__INLINE void dspark__product_of(const dspark__product *of, const int dtype, const int R, const int Q) {
    const size_t line = dtype == DSPARK_FP8 ? 64 : dtype == DSPARK_FP4 ? 128 : dtype == DSPARK_F32 ? 16 : 32;
    const dspark__product copy = *of, *p = &copy;       // nothing below can change it
    dspark__p acc[6][4][2], v, w0, w1, w2, w3, t0, t1, t2, t3;
    w1 = w2 = w3 = t0 = t1 = t2 = t3 = dspark__p_zero();
    for (int g = 0; g < p->groups; g++) {
        const size_t at = (size_t)g * p->step;
#if DSPARK__PATH != 5
        const float *const scale = p->scale;
        const size_t blocks = (size_t)p->n / 32;
        if (dtype == DSPARK_FP4 && p->codes[0])
            DSPARK__AT(scales)(p->codes[0] + at / 16, Q * (int)blocks, p->end, p->scale);
#endif
        DSPARK__EACH_ROW(DSPARK__ZERO)
        for (size_t k = 0, n = (size_t)p->n; k < n; k += DSPARK__AT(piece) == 32 ? 64 : 32) {
            if (k % line == 0) { DSPARK__EACH_OUTPUT(DSPARK__PREFETCH) }        // every 64 bytes
            DSPARK__STEP(0, 0)
            if (DSPARK__AT(piece) == 8) DSPARK__STEP(8, 1)
            DSPARK__STEP(DSPARK__AT(piece) == 32 ? 32 : 16, 0)
            if (DSPARK__AT(piece) == 8) DSPARK__STEP(24, 1)
        }
#if DSPARK__PATH == 3 || DSPARK__PATH == 5
        if (R > 3) {
            DSPARK__AT(sum16)(p->y, Q * g, acc);
            if (R > 4) { DSPARK__SUM(4) }
            if (R > 5) { DSPARK__SUM(5) }
        } else
#endif
        { DSPARK__EACH_ROW(DSPARK__SUM) }
    }
}

#define dspark__multiply DSPARK__AT(multiply)
#if DSPARK__PATH == 1
static void dspark__multiply(int dtype, int R, const dspark__product *p) {
    (void)R;
    dspark__product_of(p, dtype, 1, 1);
}
#else
// One function a dtype and number of rows, with as many outputs as the registers hold.
#define DSPARK__PRODUCT(name, dtype, R) \
    static void DSPARK__AT(name##R)(const dspark__product *p) { \
        dspark__product_of(p, dtype, R, R == 1 ? DSPARK__AT(wide) : DSPARK__AT(outputs)); \
    }
#if DSPARK__PATH == 5
#define DSPARK__PRODUCTS(R) \
    DSPARK__PRODUCT(fp8_, DSPARK_FP8, R) DSPARK__PRODUCT(fp4_, DSPARK_FP4, R)
#define DSPARK__PRODUCT_ROW(R) { NULL, NULL, NULL, DSPARK__AT(fp8_##R), DSPARK__AT(fp4_##R) }
#else
#define DSPARK__PRODUCTS(R) \
    DSPARK__PRODUCT(f32_, DSPARK_F32, R) DSPARK__PRODUCT(bf16_, DSPARK_BF16, R) \
    DSPARK__PRODUCT(fp8_, DSPARK_FP8, R) DSPARK__PRODUCT(fp4_, DSPARK_FP4, R)
#define DSPARK__PRODUCT_ROW(R) \
    { DSPARK__AT(f32_##R), DSPARK__AT(bf16_##R), DSPARK__AT(f16_1), DSPARK__AT(fp8_##R), DSPARK__AT(fp4_##R) }
DSPARK__PRODUCT(f16_, DSPARK_F16, 1)        // rare: one row at a time
#endif
DSPARK__PRODUCTS(1)
DSPARK__PRODUCTS(2)
DSPARK__PRODUCTS(3)
#if DSPARK__PATH == 3 || DSPARK__PATH == 5
DSPARK__PRODUCTS(4)
DSPARK__PRODUCTS(5)
DSPARK__PRODUCTS(6)
#endif
static void dspark__multiply(int dtype, int R, const dspark__product *p) {
    static void (*const products[][5])(const dspark__product *) = {
        DSPARK__PRODUCT_ROW(1), DSPARK__PRODUCT_ROW(2), DSPARK__PRODUCT_ROW(3),
#if DSPARK__PATH == 3 || DSPARK__PATH == 5
        DSPARK__PRODUCT_ROW(4), DSPARK__PRODUCT_ROW(5), DSPARK__PRODUCT_ROW(6)
#endif
    };
    products[R - 1][dtype](p);
}
#undef DSPARK__PRODUCTS
#undef DSPARK__PRODUCT_ROW
#endif

#if DSPARK__PATH == 3 || DSPARK__PATH == 5
// ---- Sixteen rows at once: each lane of a register is a row, each register one lane of the rows' sums, which then
// add up without a transpose. A column has 4 bytes: a float, or a pair of bfloat16.

#if DSPARK__PATH == 3
// n columns of each 16 rows to y [n][16]; the last row stands in for those missing at the end.
static void DSPARK__AT(pack)(const float *const *x, int rows, int n, float *y) {
    const float *from[16];
    __m512 v[4];
    for (; rows > 0; rows -= 16, x += 16, y += 16 * n) {
        for (int j = 0; j < 16; j++) from[j] = x[j < rows ? j : rows - 1];
        for (int k = 0; k < n; k += 4) {
#define DSPARK__QUARTERS(i) \
            v[i] = _mm512_castps128_ps512(_mm_loadu_ps(from[i] + k)); \
            v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(from[4 + i] + k), 1); \
            v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(from[8 + i] + k), 2); \
            v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(from[12 + i] + k), 3);
            DSPARK__QUARTERS(0) DSPARK__QUARTERS(1) DSPARK__QUARTERS(2) DSPARK__QUARTERS(3)
            DSPARK__AT(turn)(v);
            _mm512_storeu_ps(y + 16 * k, v[0]), _mm512_storeu_ps(y + 16 * k + 16, v[1]);
            _mm512_storeu_ps(y + 16 * k + 32, v[2]), _mm512_storeu_ps(y + 16 * k + 48, v[3]);
        }
    }
}
#endif

// Decodes four rows of weights to `tile` as pieces of a product, once for all rows of inputs; p->w then points there.
static void DSPARK__AT(decode)(dspark__product *p, int dtype, float *tile) {
    enum { next = DSPARK__AT(piece) == 32 ? 32 : 16, step = 2 * next, each = DSPARK__AT(piece) / 16 };
#if DSPARK__PATH != 5
    const float *scale = p->scale;
    if (dtype == DSPARK_FP4) DSPARK__AT(scales)(p->codes[0], p->n / 8, p->end, p->scale);
#endif
    for (int q = 0; q < 4; q++) {
        const uint8_t *w = p->w[q];
#if DSPARK__PATH == 5
        const uint8_t *scale = p->codes[q];
#endif
        p->w[q] = (const uint8_t *)tile;
        for (int k = 0; k < p->n; k += step, tile += step / each) {
            dspark__p low = dspark__p_zero(), high;
            if (dtype == DSPARK_FP4) low = dspark__p_table(*scale++);
            high = dtype == DSPARK_FP4 && each == 2 ? dspark__p_table(*scale++) : low;
            dspark__prefetch((const void *)((uintptr_t)(w + DSPARK__AT(bytes)(dtype, (size_t)k)) + p->ahead));
            _mm512_storeu_ps(tile, dspark__p_decode(dtype, w, (size_t)k, 0, low));
            _mm512_storeu_ps(tile + next / each, dspark__p_decode(dtype, w, (size_t)k, next, high));
        }
    }
}

// A column of inputs times one of weights, for all rows. GCC would take two instructions for a pair.
DSPARK__INLINE __m512 DSPARK__AT(column)(__m512 x, const float *w, __m512 sum) {
#if DSPARK__PATH == 3
    return _mm512_fmadd_ps(x, _mm512_set1_ps(*w), sum);
#else
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*w));
    return sum;
#endif
}

// y[r % 4], lane 4 (r / 4) + q = the product of row r and weights q; x [n][16], as pack() leaves it. Computes four
// lanes of the sum at a time, 4 apart, since these are added first.
static void DSPARK__AT(across)(const float *x, const uint8_t *const *w, int n, __m512 *y) {
    const float *w0 = (const float *)(const void *)w[0], *w1 = (const float *)(const void *)w[1];
    const float *w2 = (const float *)(const void *)w[2], *w3 = (const float *)(const void *)w[3];
    __m512 part[4][4];
    for (int j = 0; j < 4; j++) {
        __m512 acc[4][4], v;
#define DSPARK__LANE_ZERO(i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = _mm512_setzero_ps();
#define DSPARK__LANE(i) \
        v = dspark__p_keep(_mm512_loadu_ps(x + 16 * (k + 4 * i))); \
        acc[i][0] = DSPARK__AT(column)(v, w0 + k + 4 * i, acc[i][0]); \
        acc[i][1] = DSPARK__AT(column)(v, w1 + k + 4 * i, acc[i][1]); \
        acc[i][2] = DSPARK__AT(column)(v, w2 + k + 4 * i, acc[i][2]); \
        acc[i][3] = DSPARK__AT(column)(v, w3 + k + 4 * i, acc[i][3]);
#define DSPARK__SUM4(a, b, c, d) _mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d))
#define DSPARK__LANE_SUM(q) part[q][j] = DSPARK__SUM4(acc[0][q], acc[1][q], acc[2][q], acc[3][q]);
        DSPARK__LANE_ZERO(0) DSPARK__LANE_ZERO(1) DSPARK__LANE_ZERO(2) DSPARK__LANE_ZERO(3)
        for (int k = j; k < n; k += 16) { DSPARK__LANE(0) DSPARK__LANE(1) DSPARK__LANE(2) DSPARK__LANE(3) }
        DSPARK__LANE_SUM(0) DSPARK__LANE_SUM(1) DSPARK__LANE_SUM(2) DSPARK__LANE_SUM(3)
    }
    for (int q = 0; q < 4; q++) y[q] = DSPARK__SUM4(part[q][0], part[q][1], part[q][2], part[q][3]);
    DSPARK__AT(turn)(y);
}
#endif

#if DSPARK__PATH != 5
// Rows go in even groups of at most `rows`: 8 are 4 and 4. The size of the next group when n are left.
static int DSPARK__AT(group)(int n) {
    int groups = (n + DSPARK__AT(rows) - 1) / DSPARK__AT(rows);
    return (n + groups - 1) / groups;
}

// The input in a product's form, with zeros after it: for FP8, times the scales of a row of blocks; for FP8 and FP4,
// the odd ones first in each 32.
static void DSPARK__AT(prepare)(const dspark_matrix *m, int block, const float *x, float *y) {
    const uint8_t *scale = m->scale;
    int n = m->cols;
    dspark__v s = dspark__v_set(1);
    if (m->dtype == DSPARK_FP8) scale += (size_t)block * (size_t)((n + 127) / 128);
    for (int k = 0; k < n; k += 32) {
        dspark__v a = dspark__v_load_n(x + k, n - k, 0), b = dspark__v_load_n(x + k + 16, n - k - 16, 0);
        if (m->dtype == DSPARK_FP8 && k % 128 == 0) s = dspark__v_set(dspark__exp2i(dspark__fp8_power(scale[k / 128])));
        if (m->dtype >= DSPARK_FP8) dspark__v_unzip(y + k, dspark__v_mul(a, s), dspark__v_mul(b, s));
        else dspark__v_store(y + k, a), dspark__v_store(y + k + 16, b);
    }
}

// Points p to the weight rows of outputs i, i + 1, ...; past the end, to the last one again. odd: room to pad
// them with zeros if their length needs it; else NULL.
static void DSPARK__AT(take)(const dspark__job *job, int i, int end, dspark__product *p, uint8_t *odd) {
    const dspark_matrix *m = job->w;
    size_t bytes = dspark__row_bytes(m), padded = DSPARK__AT(bytes)(m->dtype, (size_t)p->n);
    for (int q = 0; q < 4; q++) {
        size_t row = (size_t)(job->first + (i + q < end ? i + q : end - 1));
        p->w[q] = (const uint8_t *)m->data + row * bytes;
        if (m->dtype == DSPARK_FP4) p->codes[q] = m->scale + row * (size_t)(m->cols / 32);
        if (!odd) continue;
        memset(odd + (size_t)q * padded, 0, padded);
        p->w[q] = (const uint8_t *)memcpy(odd + (size_t)q * padded, p->w[q], bytes);
    }
}

#if DSPARK__PATH == 3
// How many of n rows go by sixteens; ten or more are worth a sixteen of their own.
static int dspark__across_rows(int n) { return n % 16 >= 10 ? n : n - n % 16; }

// Outputs i .. i + 3 (those below end) of these rows. packed: of each sixteen n columns.
static void dspark__across_block(const dspark__product *from, int dtype, int i, int end, const float *packed,
                                 float *const *y, int rows, float *tile, int bf16) {
    dspark__product p = *from;
    int n = bf16 ? p.n / 2 : p.n;
    if (bf16) dspark__decode_5(&p, dtype, tile);
    else dspark__decode_3(&p, dtype, tile);
    for (int r = 0; r < rows; r += 16, packed += 16 * n) {
        __m512 all[4];
        if (bf16) dspark__across_5(packed, p.w, n, all);
        else dspark__across_3(packed, p.w, n, all);
        if (rows - r >= 16 && end - i >= 4) {
#define DSPARK__FOURS(j) \
            _mm_storeu_ps(y[r + j] + i, _mm512_castps512_ps128(all[j])); \
            _mm_storeu_ps(y[r + 4 + j] + i, _mm512_extractf32x4_ps(all[j], 1)); \
            _mm_storeu_ps(y[r + 8 + j] + i, _mm512_extractf32x4_ps(all[j], 2)); \
            _mm_storeu_ps(y[r + 12 + j] + i, _mm512_extractf32x4_ps(all[j], 3));
            DSPARK__FOURS(0) DSPARK__FOURS(1) DSPARK__FOURS(2) DSPARK__FOURS(3)
        } else for (int j = 0; j < 16 && r + j < rows; j++)
            memcpy(y[r + j] + i, (const float *)&all[j % 4] + j / 4 * 4,
                   (size_t)(end - i < 4 ? end - i : 4) * sizeof(float));
    }
}
#endif

// Outputs [begin, end) of one row of FP8 blocks, for n rows of prepared inputs: all outputs at once if the rows are one
// group; else a few at a time, whose weights stay in the L1 cache for all rows. bf16: inputs are pairs of bfloat16.
// spare: room for four rows of weights; their FP4 scales; those rows decoded; packed inputs.
static void DSPARK__AT(linear_block)(const dspark__job *job, int begin, int end, const float *const *x,
                                     float *const *y, int n, float *spare, int bf16) {
    const dspark_matrix *m = job->w;
    int single = n == 1 || m->dtype == DSPARK_F16, Q = single ? DSPARK__AT(wide) : DSPARK__AT(outputs);
    int once = n <= (single ? 1 : DSPARK__AT(rows)) && m->cols % 32 == 0, first = 0;
    size_t stride = dspark__input_stride(m->cols);
    dspark__product p;
    p.n = (m->cols + 31) / 32 * 32, p.step = dspark__row_bytes(m) * (size_t)Q;
    p.scale = spare + 4 * stride;
    if (m->dtype == DSPARK_FP4) p.end = m->scale + (size_t)m->rows * (size_t)(m->cols / 32);
#if DSPARK__PATH == 3
    float *packed = spare + 9 * stride;
    first = dspark__across_rows(n);
    if (!bf16) dspark__pack_3(x, first, p.n, packed);
    else if (m->dtype == DSPARK_FP8) packed += (size_t)(first + 15) / 16 * 16 * (size_t)(p.n / 2);
#endif
    for (int i = begin; i < end; i += p.groups * Q) {
        float some[6][4];
        int whole = end - i >= Q;
        DSPARK__AT(take)(job, i, end, &p, m->cols % 32 ? (uint8_t *)spare : NULL);
        p.groups = once && whole ? (end - i) / Q : 1;
        p.ahead = (DSPARK__AHEAD + p.step - 1) / p.step * p.step;
#if DSPARK__PATH == 3
        if (first) dspark__across_block(&p, m->dtype, i, end, packed, y, first, spare + 5 * stride, bf16), p.ahead = 0;
#endif
        for (int r = first, R; r < n; r += R, p.ahead = 0, p.codes[0] = bf16 ? p.codes[0] : NULL) {
            R = single ? 1 : DSPARK__AT(group)(n - r);
            for (int j = 0; j < R; j++) p.x[j] = x[r + j], p.y[j] = whole ? y[r + j] + i : some[j];
#if DSPARK__PATH == 3
            if (bf16) dspark__multiply_5(m->dtype, R, &p);
            else
#endif
            dspark__multiply(m->dtype, R, &p);
            for (int j = 0; j < R && !whole; j++) memcpy(y[r + j] + i, some[j], (size_t)(end - i) * sizeof(float));
        }
    }
    (void)bf16;
}

#if DSPARK__PATH == 3
// Converts n rows of inputs, if exact in bfloat16, to pairs in `copy`: a row has cols of them, then room for as many
// scaled by a row of FP8 blocks. Rows that go by sixteens are in `packed` too. Returns whether they are exact.
static int DSPARK__AT(inputs_bf16)(const dspark__job *job, int r, int n, float *copy, size_t stride, const float **x,
                                   float *packed) {
    int cols = job->w->cols;
    if (job->w->dtype < DSPARK_FP8 || cols % 64) return 0;
    for (int j = 0; j < n; j++, copy += stride) {
        if (!DSPARK__AT(to_bf16)(job->x[r + j], cols, (uint16_t *)(void *)copy)) return 0;
        x[j] = copy;
    }
    dspark__pack_3(x, dspark__across_rows(n), cols / 2, packed);
    for (int j = 0; j < n && job->w->dtype == DSPARK_FP8; j++) x[j] += cols / 2;
    return 1;
}
// Scales both by a row of blocks, into the room after the unscaled ones.
static void DSPARK__AT(scale_inputs)(const dspark_matrix *m, int block, int n, float *copy, size_t stride,
                                     float *packed) {
    const uint8_t *scale = m->scale + (size_t)block * (size_t)((m->cols + 127) / 128);
    int first = dspark__across_rows(n), sixteens = (first + 15) / 16, half = m->cols / 2;
    for (int j = 0; j < sixteens; j++, packed += 16 * half)
        DSPARK__AT(scale_bf16)((const uint16_t *)(void *)packed, 16 * m->cols, 16 * 128, scale,
                               (uint16_t *)(void *)(packed + 16 * half * sixteens));
    for (int j = first; j < n; j++) {
        float *x = copy + (size_t)j * stride;
        DSPARK__AT(scale_bf16)((const uint16_t *)(void *)x, m->cols, 128, scale, (uint16_t *)(void *)(x + half));
    }
}
#endif

// bf16: whether the machine has products of bfloat16, which give the same bits where they are exact.
static void DSPARK__AT(linear_by)(const dspark__job *job, int begin, int end, float *scratch, int bf16) {
    const dspark_matrix *m = job->w;
    size_t stride = dspark__input_stride(m->cols);
    float *copy = scratch + (64 - ((uintptr_t)scratch & 63)) % 64 / sizeof(float);
    float *spare = copy + stride * (size_t)dspark__linear_rows(job->n_rows);
    int copied = m->dtype >= DSPARK_FP8 || m->cols % 32 != 0;
    for (int r = 0, n; r < job->n_rows; r += n) {
        const float *x[DSPARK__LINEAR_ROWS];
        int exact = 0;
        n = dspark__linear_rows(job->n_rows - r);
#if DSPARK__PATH == 3
        exact = bf16 && DSPARK__AT(inputs_bf16)(job, r, n, copy, stride, x, spare + 9 * stride);
#endif
        for (int i = begin, next; i < end; i = next) {
            int block = (job->first + i) / 128;
            next = m->dtype == DSPARK_FP8 ? (block + 1) * 128 - job->first : end;
            if (next > end) next = end;
#if DSPARK__PATH == 3
            if (exact && m->dtype == DSPARK_FP8)
                DSPARK__AT(scale_inputs)(m, block, n, copy, stride, spare + 9 * stride);
#endif
            for (int j = 0; j < n && !exact; j++) {
                float *to = copy + (size_t)j * stride;
                x[j] = job->x[r + j];
                if (copied) DSPARK__AT(prepare)(m, block, x[j], to), x[j] = to;
            }
            DSPARK__AT(linear_block)(job, i, next, x, job->y + r, n, spare, exact);
        }
    }
    (void)bf16;
}
static void DSPARK__AT(linear)(const dspark__job *job, int begin, int end, float *scratch) {
    DSPARK__AT(linear_by)(job, begin, end, scratch, 0);
}
#if DSPARK__PATH == 3
static void dspark__linear_bf16(const dspark__job *job, int begin, int end, float *scratch) {
    DSPARK__AT(linear_by)(job, begin, end, scratch, 1);
}
#endif

DSPARK__SOON_CLANG      // all but attention: it would unroll what does not get faster
// ---- Rounding to FP8 and FP4

#define dspark__v_amax DSPARK__AT(v_amax)
static float dspark__v_amax(const float *x, int n) {    // NaN does not count
    dspark__v m = dspark__v_zero();
    for (int i = 0; i < n; i += 16) m = dspark__v_max(dspark__v_abs(dspark__v_load_n(x + i, n - i, 0)), m);
    return dspark__v_largest(m);
}

// |x|, at most `limit`, to the nearest number with `bits` mantissa bits, or multiple of least * 2^-bits below
// `least`; ties to even: adding 2^(23 - bits) times its power of two shifts the rest out. NaN stays.
#define dspark__v_nearest DSPARK__AT(v_nearest)
DSPARK__WORD dspark__v dspark__v_nearest(dspark__v x, float limit, float least, int bits) {
    dspark__v a = dspark__v_min(dspark__v_set(limit), dspark__v_abs(x));
    dspark__v power = dspark__i_floats(dspark__i_and(dspark__v_bits(a), dspark__i_set(0x7f800000)));
    power = dspark__v_max(power, dspark__v_set(least));
    power = dspark__v_mul(power, dspark__v_set(dspark__exp2i(23 - bits)));
    return dspark__v_sub(dspark__v_add(a, power), power);
}

static void DSPARK__AT(round_fp8)(const float *x, int n, int block, float *y) {
    for (int b = 0; b < n; b += block) {
        int size = n - b < block ? n - b : block, e = dspark__fp8_exponent(dspark__v_amax(x + b, size));
        dspark__v down = dspark__v_set(dspark__exp2i(-e)), up = dspark__v_set(dspark__exp2i(e));
        for (int i = 0; i < size; i += 16) {
            dspark__v v = dspark__v_load_n(x + b + i, size - i, 0);
            dspark__i sign = dspark__i_and(dspark__v_bits(v), dspark__i_set(0x80000000u));
            dspark__v a = dspark__v_mul(dspark__v_nearest(dspark__v_mul(v, down), 448, 0x1p-6f, 3), up);
            dspark__v_store_n(y + b + i, size - i, dspark__i_floats(dspark__i_xor(dspark__v_bits(a), sign)));
        }
    }
}

// Codes of 16 values as dspark__v_nearest left them, `least` being the first with an exponent.
#define dspark__v_codes DSPARK__AT(v_codes)
DSPARK__WORD dspark__v dspark__v_codes(dspark__v a, float least, int bits) {
    float shift = least * dspark__exp2i(23 - bits);
    dspark__i low = dspark__i_sub(dspark__v_bits(dspark__v_add(a, dspark__v_set(shift))),
                                  dspark__i_set(dspark__bits_of(shift)));
    dspark__i high = dspark__i_sub(dspark__i_right(dspark__v_bits(a), 23 - bits),
                                   dspark__i_set((dspark__bits_of(least) >> (23 - bits)) - (1u << bits)));
    return dspark__v_less(a, dspark__v_set(least), dspark__i_floats(low), dspark__i_floats(high));
}

static void DSPARK__AT(encode_fp8)(const float *x, int n, int block, uint8_t *codes, uint8_t *scales) {
    for (int b = 0; b < n; b += block) {
        int size = n - b < block ? n - b : block, e = dspark__fp8_exponent(dspark__v_amax(x + b, size));
        dspark__v down = dspark__v_set(dspark__exp2i(-e));
        *scales++ = (uint8_t)(e + 127);
        for (int i = 0; i < size; i += 16) {
            dspark__v v = dspark__v_mul(dspark__v_load_n(x + b + i, size - i, 0), down);
            dspark__v a = dspark__v_nearest(v, 448, 0x1p-6f, 3);
            dspark__i sign = dspark__i_and(dspark__i_right(dspark__v_bits(v), 24), dspark__i_set(0x80));
            dspark__i code = dspark__i_add(dspark__v_bits(dspark__v_codes(a, 0x1p-6f, 3)), sign);
            dspark__v nan = dspark__i_floats(dspark__i_set(0x7f));
            uint8_t some[16];
            code = dspark__v_bits(dspark__v_less(a, dspark__v_set(1000), dspark__i_floats(code), nan));
            dspark__i_bytes(size - i < 16 ? some : codes + b + i, code);
            if (size - i < 16) memcpy(codes + b + i, some, (size_t)(size - i));
        }
    }
}

static void DSPARK__AT(decode_fp8)(const uint8_t *codes, const uint8_t *scales, int n, int block, float *y) {
    dspark__v nan = dspark__i_floats(dspark__i_set(0x7fc00000));
    for (int b = 0; b < n; b += block) {
        int size = n - b < block ? n - b : block;
        dspark__v s = dspark__v_set(dspark__e8m0(*scales++));
        for (int i = 0; i < size; i += 32) {
            const uint8_t *from = codes + b + i;
            uint8_t some[32] = { 0 };
            float all[32];
            dspark__v v[2];
            if (size - i < 32) from = (const uint8_t *)memcpy(some, from, (size_t)(size - i));
            v[0] = dspark__v_join(dspark__p_fp8(from, 16), dspark__p_fp8(from, 16 + DSPARK__AT(piece) % 16));
            v[1] = dspark__v_join(dspark__p_fp8(from, 0), dspark__p_fp8(from, DSPARK__AT(piece) % 16));
            for (int odd = 0; odd < 2; odd++) {
                v[odd] = dspark__v_mul(v[odd], dspark__v_set(256));
                v[odd] = dspark__v_less(dspark__v_set(448), dspark__v_abs(v[odd]), nan, v[odd]);
                v[odd] = dspark__v_mul(v[odd], s);
            }
            dspark__v_zip(size - i < 32 ? all : y + b + i, v[0], v[1]);
            if (size - i < 32) memcpy(y + b + i, all, (size_t)(size - i) * sizeof(float));
        }
    }
}

static void DSPARK__AT(encode_fp4)(const float *x, int n, uint8_t *codes, uint8_t *scales) {
    dspark__v zero = dspark__v_set(0);
    for (int b = 0; b < n; b += 32) {
        int e = dspark__fp4_exponent(dspark__v_amax(x + b, 32));
        uint8_t pairs[32];
        *scales++ = (uint8_t)(e + 127);
        for (int i = 0; i < 32; i += 16) {
            dspark__v v = dspark__v_load(x + b + i);
            dspark__i code, other;
            v = dspark__v_add(dspark__v_min(v, zero), dspark__v_max(v, zero));      // NaN: 0
            v = dspark__v_mul(v, dspark__v_set(dspark__exp2i(-e)));
            code = dspark__i_and(dspark__i_right(dspark__v_bits(v), 28), dspark__i_set(8));
            code = dspark__i_add(dspark__v_bits(dspark__v_codes(dspark__v_nearest(v, 6, 1, 1), 1, 1)), code);
            other = dspark__v_bits(dspark__v_swap1(dspark__i_floats(code)));
            dspark__i_bytes(pairs + i, dspark__i_add(code, dspark__i_left(other, 4)));
        }
        for (int i = 0; i < 16; i++) codes[b / 2 + i] = pairs[2 * i];
    }
}

static void DSPARK__AT(decode_fp4)(const uint8_t *codes, const uint8_t *scales, int n, float *y) {
    for (int i = 0; i < n; i += 32, codes += 16) {
        dspark__p table = dspark__p_table(dspark__e8m0(*scales++));
        dspark__p even = dspark__p_fp4(codes, 16, table), odd = dspark__p_fp4(codes, 0, table);
        dspark__v_zip(y + i, dspark__v_join(even, dspark__p_fp4(codes, 16 + DSPARK__AT(piece) % 16, table)),
                      dspark__v_join(odd, dspark__p_fp4(codes, DSPARK__AT(piece) % 16, table)));
    }
}

// ---- Vectors

static void DSPARK__AT(hadamard)(float *y, int n) {
    dspark__v sign[4], scale = dspark__v_set(1.0f / sqrtf((float)n));     // sign where a lane meets i ^ 2^h
    for (int h = 0; h < 4; h++) {
        float f[16];
        for (int i = 0; i < 16; i++) f[i] = i >> h & 1 ? -1.0f : 1.0f;
        sign[h] = dspark__v_load(f);
    }
    for (int i = 0; i < n; i += 16) {
        dspark__v v = dspark__v_load_n(y + i, n - i, 0);
        if (n > 1) v = dspark__v_fma(v, sign[0], dspark__v_swap1(v));
        if (n > 2) v = dspark__v_fma(v, sign[1], dspark__v_swap2(v));
        if (n > 4) v = dspark__v_fma(v, sign[2], dspark__v_swap4(v));
        if (n > 8) v = dspark__v_fma(v, sign[3], dspark__v_swap8(v));
        dspark__v_store_n(y + i, n - i, v);
    }
    for (int h = 16; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            for (int j = i; j < i + h; j += 16) {
                dspark__v a = dspark__v_load(y + j), b = dspark__v_load(y + j + h);
                dspark__v_store(y + j, dspark__v_add(a, b));
                dspark__v_store(y + j + h, dspark__v_sub(a, b));
            }
    for (int i = 0; i < n; i += 16)
        dspark__v_store_n(y + i, n - i, dspark__v_mul(dspark__v_load_n(y + i, n - i, 0), scale));
}

static void DSPARK__AT(rope)(float *x, int n, const float *turn, float direction) {
    float f[16];
    dspark__v odd, sign, zero = dspark__v_zero();
    for (int i = 0; i < 16; i++) f[i] = i & 1 ? 1.0f : -1.0f;
    odd = dspark__v_load(f), sign = dspark__v_mul(odd, dspark__v_set(direction));
    for (int i = 0; i < n; i += 16) {
        dspark__v v = dspark__v_load_n(x + i, n - i, 0), t = dspark__v_load_n(turn + i, n - i, 0);
        dspark__v u = dspark__v_swap1(t);
        dspark__v c = dspark__v_less(odd, zero, t, u), s = dspark__v_mul(sign, dspark__v_less(odd, zero, u, t));
        dspark__v_store_n(x + i, n - i, dspark__v_add(dspark__v_mul(v, c), dspark__v_mul(dspark__v_swap1(v), s)));
    }
}

static float DSPARK__AT(dot)(const float *a, const float *b, int n) {
    dspark__v s = dspark__v_zero();
    for (int i = 0; i < n; i += 16)
        s = dspark__v_fma(dspark__v_load_n(a + i, n - i, 0), dspark__v_load_n(b + i, n - i, 0), s);
    return dspark__v_sum(s);
}

static void DSPARK__AT(axpy)(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i += 16) {
        dspark__v v = dspark__v_load_n(y + i, n - i, 0), u = dspark__v_load_n(x + i, n - i, 0);
        dspark__v_store_n(y + i, n - i, dspark__v_fma(dspark__v_set(a), u, v));
    }
}

// K is 1 or hc_mult, which is 4 in all models: any other is compiled once, in plain C, for all paths.
#if DSPARK__PATH == 1
static void dspark__mix_1(const float *x, int C, int n, const float *w, int K, const float *y, const float *post,
                          float *out) {
    for (int i = 0; i < n; i += 16) {
        dspark__v v[8], u = dspark__v_zero();
        for (int k = 0; k < K; k++) v[k] = u;
        if (y) u = dspark__v_load_n(y + i, n - i, 0);
        for (int k = 0; k < K && y; k++) v[k] = dspark__v_fma(dspark__v_set(post[k]), u, v[k]);
        for (int j = 0; j < C; j++) {
            u = dspark__v_load_n(x + j * n + i, n - i, 0);
            for (int k = 0; k < K; k++) v[k] = dspark__v_fma(dspark__v_set(w[j * K + k]), u, v[k]);
        }
        for (int k = 0; k < K; k++) dspark__v_store_n(out + k * n + i, n - i, v[k]);
    }
}
#else
#define DSPARK__MIX(w) \
    v0 = dspark__v_fma(dspark__v_set((w)[0]), u, v0); \
    if (K == 4) v1 = dspark__v_fma(dspark__v_set((w)[1]), u, v1), v2 = dspark__v_fma(dspark__v_set((w)[2]), u, v2), \
                v3 = dspark__v_fma(dspark__v_set((w)[3]), u, v3);
DSPARK__INLINE void DSPARK__AT(mix_of)(const float *x, int C, int n, const float *w, const int K, const float *y,
                                       const float *post, float *out) {
    for (int i = 0; i < n; i += 16) {
        dspark__v v0 = dspark__v_zero(), v1 = v0, v2 = v0, v3 = v0, u;
        if (y) {
            u = dspark__v_load_n(y + i, n - i, 0);
            DSPARK__MIX(post)
        }
        for (int j = 0; j < C; j++) {
            u = dspark__v_load_n(x + j * n + i, n - i, 0);
            DSPARK__MIX(w + j * K)
        }
        dspark__v_store_n(out + i, n - i, v0);
        if (K == 1) continue;
        dspark__v_store_n(out + n + i, n - i, v1), dspark__v_store_n(out + 2 * n + i, n - i, v2);
        dspark__v_store_n(out + 3 * n + i, n - i, v3);
    }
}
#undef DSPARK__MIX
static void DSPARK__AT(mix)(const float *x, int C, int n, const float *w, int K, const float *y, const float *post,
                            float *out) {
    if (K == 1) DSPARK__AT(mix_of)(x, C, n, w, 1, y, post, out);
    else if (K == 4) DSPARK__AT(mix_of)(x, C, n, w, 4, y, post, out);
    else dspark__mix_1(x, C, n, w, K, y, post, out);
}
#endif

static void DSPARK__AT(rms_norm)(const float *x, const float *w, int n, float eps, float *y) {
    dspark__v r = dspark__v_set(1.0f / sqrtf(DSPARK__AT(dot)(x, x, n) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        dspark__v v = dspark__v_mul(dspark__v_load_n(x + i, n - i, 0), r);
        if (w) v = dspark__v_mul(v, dspark__v_load_n(w + i, n - i, 0));
        dspark__v_store_n(y + i, n - i, v);
    }
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with x = n ln 2 + r, |r| <= ln 2 / 2; gives e^r - 1, and n as an
// integer.
#define dspark__v_exp_parts DSPARK__AT(v_exp_parts)
DSPARK__WORD dspark__v dspark__v_exp_parts(dspark__v x, dspark__i *n) {
    dspark__v magic = dspark__v_set(0x1.8p23f), t = dspark__v_fma(x, dspark__v_set(1.44269504f), magic);
    dspark__v k = dspark__v_sub(t, magic), r, p;
    *n = dspark__i_sub(dspark__v_bits(t), dspark__v_bits(magic));
    r = dspark__v_fma(k, dspark__v_set(-0.693145751953125f), x);
    r = dspark__v_fma(k, dspark__v_set(-1.42860682e-6f), r);
    p = dspark__v_fma(dspark__v_set(1.3926376e-3f), r, dspark__v_set(8.363333082e-3f));
    p = dspark__v_fma(p, r, dspark__v_set(4.166655346e-2f));
    p = dspark__v_fma(p, r, dspark__v_set(1.666657606e-1f));
    p = dspark__v_fma(p, r, dspark__v_set(.5f));
    return dspark__v_fma(dspark__v_mul(r, r), p, r);
}
#define dspark__i_exp2 DSPARK__AT(i_exp2)
DSPARK__WORD dspark__v dspark__i_exp2(dspark__i n) {      // -126 <= n <= 127
    return dspark__i_floats(dspark__i_left(dspark__i_add(n, dspark__i_set(127)), 23));
}
// Within 1 unit in the last place; subnormal results included; NaN stays.
#define dspark__v_exp DSPARK__AT(v_exp)
DSPARK__CALLED dspark__v dspark__v_exp(dspark__v x) {
    dspark__i n, half;
    dspark__v p;
    x = dspark__v_max(dspark__v_set(-105), dspark__v_min(dspark__v_set(89), x));
    p = dspark__v_add(dspark__v_exp_parts(x, &n), dspark__v_set(1));
    half = dspark__i_half(n);               // in two steps: 2^n alone may be out of range
    return dspark__v_mul(dspark__v_mul(p, dspark__i_exp2(half)), dspark__i_exp2(dspark__i_sub(n, half)));
}
// ln x of a positive normal x: x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
#define dspark__v_log DSPARK__AT(v_log)
DSPARK__CALLED dspark__v dspark__v_log(dspark__v x) {
    dspark__i u = dspark__i_sub(dspark__v_bits(x), dspark__i_set(0x3f3504f3));
    dspark__i n = dspark__i_and(u, dspark__i_set(0xff800000u));
    dspark__v f = dspark__v_sub(dspark__i_floats(dspark__i_sub(dspark__v_bits(x), n)), dspark__v_set(1));
    dspark__v magic = dspark__v_set(0x1.8p23f), k, p, y;
    u = dspark__i_sub(dspark__i_right(dspark__i_add(u, dspark__i_set(0x3f800000)), 23), dspark__i_set(127));
    k = dspark__v_sub(dspark__i_floats(dspark__i_add(u, dspark__v_bits(magic))), magic);     // n as a float
    p = dspark__v_fma(dspark__v_set(.06971620541f), f, dspark__v_set(-.1147974863f));
    p = dspark__v_fma(p, f, dspark__v_set(.1168542357f));
    p = dspark__v_fma(p, f, dspark__v_set(-.1242568569f));
    p = dspark__v_fma(p, f, dspark__v_set(.1424905714f));
    p = dspark__v_fma(p, f, dspark__v_set(-.1666780237f));
    p = dspark__v_fma(p, f, dspark__v_set(.2000071576f));
    p = dspark__v_fma(p, f, dspark__v_set(-.2499999696f));
    p = dspark__v_fma(p, f, dspark__v_set(.3333333118f));
    y = dspark__v_mul(dspark__v_mul(f, f), dspark__v_fma(p, f, dspark__v_set(-.5f)));
    y = dspark__v_fma(k, dspark__v_set(1.42860682e-6f), y);
    return dspark__v_fma(k, dspark__v_set(0.693145751953125f), dspark__v_add(f, y));
}
#define dspark__v_sigmoid DSPARK__AT(v_sigmoid)
DSPARK__WORD dspark__v dspark__v_sigmoid(dspark__v x) {
    dspark__v one = dspark__v_set(1);
    return dspark__v_div(one, dspark__v_add(one, dspark__v_exp(dspark__v_sub(dspark__v_zero(), x))));
}
#define dspark__v_tanh DSPARK__AT(v_tanh)
DSPARK__WORD dspark__v dspark__v_tanh(dspark__v x) {      // m / (m + 2), m = e^(2|x|) - 1
    dspark__v a = dspark__v_min(dspark__v_set(10), dspark__v_abs(x)), p, power, m;
    dspark__i n, sign = dspark__i_and(dspark__v_bits(x), dspark__i_set(0x80000000u));
    p = dspark__v_exp_parts(dspark__v_add(a, a), &n);
    power = dspark__i_exp2(n);
    m = dspark__v_fma(power, p, dspark__v_sub(power, dspark__v_set(1)));
    m = dspark__v_div(m, dspark__v_add(m, dspark__v_set(2)));
    return dspark__i_floats(dspark__i_xor(dspark__v_bits(m), sign));
}
// sqrt(log(1 + e^x)) = sqrt(max(x, 0) + log1p(u)), u = e^-|x|; log1p(u) = log(w) + (u - (w - 1)) / w, w = 1 +
// u as rounded.
#define dspark__v_sqrt_softplus DSPARK__AT(v_sqrt_softplus)
DSPARK__WORD dspark__v dspark__v_sqrt_softplus(dspark__v x) {
    dspark__v one = dspark__v_set(1), u = dspark__v_exp(dspark__v_sub(dspark__v_zero(), dspark__v_abs(x)));
    dspark__v w = dspark__v_add(one, u), rest = dspark__v_sub(u, dspark__v_sub(w, one));
    dspark__v y = dspark__v_add(dspark__v_log(w), dspark__v_div(rest, w));
    return dspark__v_sqrt(dspark__v_add(dspark__v_max(dspark__v_zero(), x), y));
}

#define DSPARK__MAP(name) \
    static void DSPARK__AT(name)(float *x, int n) { \
        for (int i = 0; i < n; i += 16) \
            dspark__v_store_n(x + i, n - i, dspark__v_##name(dspark__v_load_n(x + i, n - i, 0))); \
    }
DSPARK__MAP(sigmoid)
DSPARK__MAP(tanh)
DSPARK__MAP(sqrt_softplus)

static void DSPARK__AT(swiglu)(const float *gate, const float *up, int n, float limit, float weight,
                               float *y) {
    dspark__v most = limit > 0 ? dspark__v_set(limit) : dspark__i_floats(dspark__i_set(0x7f800000));
    dspark__v least = dspark__v_sub(dspark__v_zero(), most), one = dspark__v_set(1);
    for (int i = 0; i < n; i += 16) {
        dspark__v g = dspark__v_min(most, dspark__v_load_n(gate + i, n - i, 0));
        dspark__v u = dspark__v_max(least, dspark__v_min(most, dspark__v_load_n(up + i, n - i, 0)));
        g = dspark__v_max(dspark__v_set(-200), g);      // -inf / inf would be NaN
        g = dspark__v_div(g, dspark__v_add(one, dspark__v_exp(dspark__v_sub(dspark__v_zero(), g))));
        dspark__v_store_n(y + i, n - i, dspark__v_mul(dspark__v_set(weight), dspark__v_mul(g, u)));
    }
}

#define DSPARK__INFINITY dspark__float_of(0x7f800000)
#define dspark__v_maximum DSPARK__AT(v_maximum)
static float dspark__v_maximum(const float *x, int n, float at_least) {     // NaN does not count
    dspark__v m = dspark__v_set(at_least);
    for (int i = 0; i < n; i += 16) m = dspark__v_max(dspark__v_load_n(x + i, n - i, at_least), m);
    return dspark__v_largest(m);
}

DSPARK__SOON_CLANG_END
// ---- Attention

// o[r][i] = factor[r] sum_j p[r][j] rows[j][i] for i in [at, at + 16 W), or [at, at + n) if W is 1; in order of
// j.
#define DSPARK__WEIGH_ROW(r) \
    if (R > r) { \
        dspark__v pr = dspark__v_set(p[r < R ? r : 0][j]); \
        acc[r][0] = dspark__v_fma(pr, v0, acc[r][0]); \
        if (W > 1) acc[r][1] = dspark__v_fma(pr, v1, acc[r][1]); \
        if (W > 2) acc[r][2] = dspark__v_fma(pr, v2, acc[r][2]); \
        if (W > 3) acc[r][3] = dspark__v_fma(pr, v3, acc[r][3]); \
    }
#define dspark__weigh DSPARK__AT(weigh)
DSPARK__INLINE void dspark__weigh(const float *const *rows, int n_rows, int at, int n, const float *const *p,
                                  float *const *o, const float *factor, const int R, const int W) {
    dspark__v acc[4][4];
    for (int r = 0; r < 4; r++) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = dspark__v_zero();
    for (int j = 0; j < n_rows; j++) {
        const float *row = rows[j] + at;
        dspark__v v0 = W == 1 ? dspark__v_load_n(row, n, 0) : dspark__v_load(row), v1 = v0, v2 = v0, v3 = v0;
        if (W > 1) v1 = dspark__v_load(row + 16);
        if (W > 2) v2 = dspark__v_load(row + 32);
        if (W > 3) v3 = dspark__v_load(row + 48);
        DSPARK__WEIGH_ROW(0) DSPARK__WEIGH_ROW(1) DSPARK__WEIGH_ROW(2) DSPARK__WEIGH_ROW(3)
    }
#define DSPARK__WEIGH_OUT(r) \
    if (R > r) { \
        float *to = o[r < R ? r : 0] + at; \
        dspark__v f = dspark__v_set(factor[r < R ? r : 0]); \
        dspark__v_store_n(to, W == 1 ? n : 16, dspark__v_mul(acc[r][0], f)); \
        if (W > 1) dspark__v_store(to + 16, dspark__v_mul(acc[r][1], f)); \
        if (W > 2) dspark__v_store(to + 32, dspark__v_mul(acc[r][2], f)); \
        if (W > 3) dspark__v_store(to + 48, dspark__v_mul(acc[r][3], f)); \
    }
    DSPARK__WEIGH_OUT(0) DSPARK__WEIGH_OUT(1) DSPARK__WEIGH_OUT(2) DSPARK__WEIGH_OUT(3)
}

// s[h][j] = scale q_h . rows[j], by up to 128 rows, equally far apart, and all heads
static void DSPARK__AT(scores)(const float *q, int H, int d, const float *const *rows, int n, float scale,
                               float *s) {
    dspark__product p;
    float some[6][4];
    memset(&p, 0, sizeof p);
    p.n = d;
    for (int j0 = 0, m; j0 < n && d % 32 == 0; j0 += m) {
        uintptr_t apart = j0 + 1 < n ? (uintptr_t)rows[j0 + 1] - (uintptr_t)rows[j0] : 0;
        for (m = 1; m < 128 && j0 + m < n && (uintptr_t)rows[j0 + m] - (uintptr_t)rows[j0 + m - 1] == apart; m++) {}
        for (int h = 0, R; h < H; h += R) {
            int Q;
            R = DSPARK__AT(group)(H - h), Q = R == 1 ? DSPARK__AT(wide) : DSPARK__AT(outputs);
            p.step = (size_t)Q * apart;
            for (int j = 0; j < m; j += p.groups * Q) {
                float *to = s + (size_t)h * (size_t)n + (size_t)(j0 + j);
                int whole = m - j >= Q;
                p.groups = whole ? (m - j) / Q : 1;
                for (int r = 0; r < R; r++)
                    p.x[r] = q + (size_t)(h + r) * (size_t)d, p.y[r] = whole ? to + (size_t)r * (size_t)n : some[r];
                for (int i = 0; i < Q; i++) p.w[i] = (const uint8_t *)rows[j0 + (j + i < m ? j + i : m - 1)];
                dspark__multiply(DSPARK_F32, R, &p);
                for (int r = 0; r < R && !whole; r++)
                    memcpy(to + (size_t)r * (size_t)n, some[r], (size_t)(m - j) * sizeof(float));
            }
        }
    }
    for (int h = 0; h < H && d % 32; h++)       // a width that no model has
        for (int j = 0; j < n; j++) s[h * n + j] = DSPARK__AT(dot)(q + (size_t)h * (size_t)d, rows[j], d);
    for (int i = 0; i < H * n; i += 16)
        dspark__v_store_n(s + i, H * n - i, dspark__v_mul(dspark__v_load_n(s + i, H * n - i, 0), dspark__v_set(scale)));
}

// s becomes e^(s - max); returns 1 / (their sum + e^(sink - max))
static float DSPARK__AT(soften)(float *s, int n, float sink) {
    float m = dspark__v_maximum(s, n, sink);
    dspark__v sum = dspark__v_zero(), v;
    for (int i = 0; i < n; i += 16) {
        v = dspark__v_exp(dspark__v_sub(dspark__v_load_n(s + i, n - i, -DSPARK__INFINITY), dspark__v_set(m)));
        dspark__v_store_n(s + i, n - i, v);
        sum = dspark__v_add(sum, v);
    }
    v = dspark__v_exp(dspark__v_sub(dspark__v_set(sink), dspark__v_set(m)));
    return 1.0f / (dspark__v_sum(sum) + dspark__v_first(v));
}

static void DSPARK__AT(attend)(const float *q, int H, int d, const float *const *rows, int n, float scale,
                               const float *sink, float *scratch, float *o) {
    enum { R = DSPARK__AT(outputs), W = DSPARK__AT(outputs) };     // heads at a time: they come in fours
    DSPARK__AT(scores)(q, H, d, rows, n, scale, scratch);
    for (int h = 0; h < H; h += R) {
        const float *p[R] = { NULL };
        float *to[R] = { NULL }, factor[R] = { 0 };
        int i = 0;
        for (int r = 0; r < R; r++) {       // past the end: the last head again
            int at = h + r < H ? h + r : H - 1;
            float *s = scratch + (size_t)at * (size_t)n;
            p[r] = s;
            to[r] = o + (size_t)at * (size_t)d;
            factor[r] = h + r < H ? DSPARK__AT(soften)(s, n, sink[at]) : factor[r - 1];
        }
        if (W > 1) for (; i + 16 * W <= d; i += 16 * W) dspark__weigh(rows, n, i, 16, p, to, factor, R, W);
        for (; i < d; i += 16) dspark__weigh(rows, n, i, d - i, p, to, factor, R, 1);
    }
}

DSPARK__SOON_CLANG
static void DSPARK__AT(index_scores)(const float *q, const float *w, int H, int d, const float *keys, int n,
                                     float *scores) {
    float dots[DSPARK__AT(rows)][16];
    dspark__v s[DSPARK__AT(rows)];
    dspark__product p;
    memset(&p, 0, sizeof p);
    p.n = d, p.groups = 1;
    for (int j = 0, R; j < n; j += R) {
        int Q;
        R = DSPARK__AT(group)(n - j), Q = R == 1 ? DSPARK__AT(wide) : DSPARK__AT(outputs);
        for (int r = 0; r < R; r++) p.x[r] = keys + (size_t)(j + r) * (size_t)d, s[r] = dspark__v_zero();
        for (int h0 = 0; h0 < H; h0 += 16) {
            int heads = H - h0 < 16 ? H - h0 : 16;
            for (int h = 0; h < heads; h += Q) {
                for (int r = 0; r < R; r++) p.y[r] = dots[r] + h;
                for (int i = 0; i < Q; i++)
                    p.w[i] = (const uint8_t *)(q + (size_t)(h0 + (h + i < heads ? h + i : heads - 1)) * (size_t)d);
                dspark__multiply(DSPARK_F32, R, &p);
            }
            for (int r = 0; r < R; r++)
                s[r] = dspark__v_fma(dspark__v_max(dspark__v_load_n(dots[r], heads, 0), dspark__v_zero()),
                                     dspark__v_load_n(w + h0, heads, 0), s[r]);
        }
        for (int r = 0; r < R; r++) scores[j + r] = dspark__v_sum(s[r]);
    }
}

static void DSPARK__AT(pool)(const float *const *kv, const float *const *gate, const float *const *ape, int n,
                             int d, float *out) {
    for (int i = 0; i < d; i += 16) {
        dspark__v m = dspark__v_set(-DSPARK__INFINITY), sum = dspark__v_zero(), acc = dspark__v_zero();
        for (int j = 0; j < n; j++) {
            dspark__v g = dspark__v_load_n(gate[j] + i, d - i, 0);
            m = dspark__v_max(m, dspark__v_add(g, dspark__v_load_n(ape[j] + i, d - i, 0)));
        }
        for (int j = 0; j < n; j++) {
            dspark__v g = dspark__v_load_n(gate[j] + i, d - i, 0);
            g = dspark__v_add(g, dspark__v_load_n(ape[j] + i, d - i, 0));
            g = dspark__v_exp(dspark__v_sub(g, m));
            sum = dspark__v_add(sum, g);
            acc = dspark__v_fma(g, dspark__v_load_n(kv[j] + i, d - i, 0), acc);
        }
        dspark__v_store_n(out + i, d - i, dspark__v_div(acc, sum));
    }
}

// C = 4: the whole matrix in a vector, row j in lanes 4 j to 4 j + 3.
static void DSPARK__AT(sinkhorn4)(float *comb, int iters, float eps) {
    dspark__v e = dspark__v_set(eps), v = dspark__v_load(comb), s;
    s = dspark__v_max(v, dspark__v_swap1(v));
    s = dspark__v_max(s, dspark__v_swap2(s));
    v = dspark__v_exp(dspark__v_sub(v, s));
    for (int i = 0; i < iters; i++) {
        s = dspark__v_add(v, dspark__v_swap1(v));
        s = dspark__v_add(s, dspark__v_swap2(s));
        v = i ? dspark__v_div(v, dspark__v_add(s, e)) : dspark__v_add(dspark__v_div(v, s), e);
        s = dspark__v_add(v, dspark__v_swap4(v));
        s = dspark__v_add(s, dspark__v_swap8(s));
        v = dspark__v_div(v, dspark__v_add(s, e));
    }
    dspark__v_store(comb, v);
}
static void DSPARK__AT(sinkhorn)(float *comb, int C, int iters, float eps) {
    if (C == 4) {
        DSPARK__AT(sinkhorn4)(comb, iters, eps);
        return;
    }
#if DSPARK__PATH != 1       // as mix: compiled once
    dspark__sinkhorn_1(comb, C, iters, eps);
#else
    for (int j = 0; j < C; j++) {
        dspark__v m = dspark__v_set(dspark__v_maximum(comb + j * C, C, -DSPARK__INFINITY));
        dspark__v_store_n(comb + j * C, C, dspark__v_exp(dspark__v_sub(dspark__v_load_n(comb + j * C, C, 0), m)));
    }
    for (int i = 0; i < iters; i++) {
        for (int j = 0; j < C; j++) {
            float s = 0;
            for (int k = 0; k < C; k++) s += comb[j * C + k];
            for (int k = 0; k < C; k++)
                comb[j * C + k] = i ? comb[j * C + k] / (s + eps) : comb[j * C + k] / s + eps;
        }
        for (int k = 0; k < C; k++) {
            float s = 0;
            for (int j = 0; j < C; j++) s += comb[j * C + k];
            for (int j = 0; j < C; j++) comb[j * C + k] /= s + eps;
        }
    }
#endif
}

DSPARK__SOON_CLANG_END
#define DSPARK__KERNELS(name, linear) { \
        name, linear, DSPARK__AT(round_fp8), DSPARK__AT(encode_fp8), DSPARK__AT(decode_fp8), DSPARK__AT(encode_fp4), \
        DSPARK__AT(decode_fp4), DSPARK__AT(rope), DSPARK__AT(hadamard), DSPARK__AT(dot), DSPARK__AT(axpy), \
        DSPARK__AT(mix), DSPARK__AT(rms_norm), DSPARK__AT(swiglu), DSPARK__AT(sigmoid), DSPARK__AT(tanh), \
        DSPARK__AT(sqrt_softplus), DSPARK__AT(attend), DSPARK__AT(index_scores), DSPARK__AT(pool), \
        DSPARK__AT(sinkhorn) \
    }
static const dspark__kernels DSPARK__AT(kernels) =
#if DSPARK__PATH == 1
    DSPARK__KERNELS("plain C", DSPARK__AT(linear));
#elif DSPARK__PATH == 2
    DSPARK__KERNELS("AVX2", DSPARK__AT(linear));
#elif DSPARK__PATH == 3
    DSPARK__KERNELS("AVX-512", DSPARK__AT(linear));
static const dspark__kernels dspark__kernels_bf16 = DSPARK__KERNELS("AVX-512 BF16", dspark__linear_bf16);
#else
    DSPARK__KERNELS("NEON", DSPARK__AT(linear));
#endif
#undef DSPARK__KERNELS
#endif  // DSPARK__PATH != 5
#endif  // DSPARK__PATH
