// dspark_cuda.cu - the CUDA backend of dspark.h, in one file. MIT license, as dspark.h.
//
//     nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c dspark_cuda.cu     (or sm_80 and newer; make cuda)
//     desc.backend = dspark_cuda_backend();      (grep -n '^// ----' lists the sections)
//
// COMPARED WITH THE CPU. The same: every rounding to FP8 and FP4, in the same place, with fp32 in between; ties and
// orders of selection; so the golden cases hold at their tolerances. Not the same: the order of a sum, so bits differ.
// BATCH INVARIANCE. A row's bits depend on no other row. A matrix product cuts its sum over k into units of 128 bytes
// of weights: warp w of eight adds up units w, w + 8, ..., then the eight sums are added in order, for any number of
// rows. Attention splits its keys by their number alone. Compile with -fmad=false: where a fused multiply-add is
// wanted, the code says fmaf.
//
// EXACT PRODUCTS. FP8 and FP4 values are exact in f16, so one mma.m16n8k16 sums exact products in fp32. Scales are
// powers of two and are applied outside it: a weight's after 128 products (FP8) or 32 (FP4), a rounded input's after
// 128. Inputs that are not rounded enter as two f16 planes with a scale (wo_a), or, for bf16 matrices, as three bf16
// planes that add up to them. Weights are the M side of the mma and rows the N side, so one read of the weights serves
// 8, 16 or 32 rows. From 33 rows on a block has a tile of outputs x rows (linears_wide, experts_wide).
// WHOLE BLOCKS of 512 prompt tokens, with fast_prefill, have other bits, always the same: cuBLASLt does FP8 products,
// wgmma attention (attend_whole), the routed experts (experts_up_whole with the SwiGLU, experts_whole), wo_a and bf16
// matrices (linears_whole, with one plane of their inputs).
//
// OPERATIONS and their kernels, one launch each. [..]: not always. (kv_rows): from 33 rows on; with fewer, the next
// product does it. The comment at each kernel has its bound: V4-Flash's shape, one layer, 3.0 TB/s.
// a pass        turns (cos and sin of each row's position)
// mix_in        stream (embedding at first; deferred mix_out and tap; the sums of this mix), mix
// attention     linears, round_rows, (kv_rows) linears, [index_query, index_scores,] attend, attend_merge, linears,
//               round_rows, linears
// moe           linears, route, [cache_choose, cache_fill,] experts, swiglu, experts
// head          stream, mix, linears
// inject        take_taps, linears, round_rows, linears, inject_rows
// draws         [survey, 4 sift, 4 sift, weigh,] draw, drawn
// a step        markov_begin, [linears, markov_gate,] linears, [survey, .. weigh,] draw
// A layer is 19 launches if its indexer has keys to choose among, else 17; a pass is some 780, one CUDA graph.
// Programmatic dependent launch: a kernel calls grid_go first, so the next one may start early. Before waiting
// (grid_wait) that one reads its parameters and the pass's counts and rows; `linears`, and `experts` of w2, also issue
// copies of their first 96 KB of weights an SM, 4.3 us of bytes, a few at a time. `attend` of few rows and `experts`
// of w1 w3 call it when they have waited: what precedes them is then complete for all that follows, and stream_few
// reads the old copies early. `route` does, too, so that experts' blocks do not start in its way.
//
// MEASURED on an H100, 43 layers of 16 experts, position 4096, bench/cuda.c, with all of a block's first copies asked
// for at once. A pass of one row: 6,480 us, 59 % of the bytes' floor. Six rows: 10,140; a cycle that drafts five and
// verifies six rows: 11,000. Of one row, us and share of floor:
//   wq_b 459, wo_b 423, gate w1 w3 214, w2 509, head 364: 99 % and more, their weights load before their turn.
//   wo_a 586, 84 %; wq_a and beside it 384, 79 %; experts' w1 w3 1,139, 69 %: which experts is known last; they take
//   1.5 us to find them, 1.5 to the first bytes, and SMs differ by 3 at the end.
//   Others 2,330: stream 478, attend 476, round_rows 331, mix 317, index_scores 242, attend_merge 207, route 128,
//   swiglu 118, index_query 37. Each takes 2 to 11. In a graph of nothing else a launch that only waits takes .6, one
//   that reads what the one before it wrote 1 to 1.9; blocks of one kernel that meet at a barrier .7 to 1.4, 1 to 2.6.
// Copies a few at a time (ask_gently) and three slots a warp take 3 % off 1, 2 and 6 rows of 8 layers: loads of small
// kernels wait less in L2; part of that comes back in products, whose first units are then still on their way. What is
// left: the bytes' floor is 80 us of a layer's 137; a layer has 17 to 19 launches, 1.1 us from the end of one to the
// start of the next; and blocks of a product end 1 to 3 us apart, of six rows' w1 w3 and w2 12 to 16, as experts with
// five or six rows read more x than L1 has room for.
// SLOWER: the block that completes a tile does the small kernel that follows, 12 launches a layer, since such blocks do
// serially what waits for them. Or each block of the next product does it, in shared memory: 1 to 2.5 % for one row.
// All of a row's x brought to L1 before a product: 3 %. Weights by cp.async, 16 bytes a lane: loads of small kernels
// wait behind them in their SM, one row 4 %, six 7 %. The next product's weights prefetched into L2, 2 to 24 MB, by
// five ways: 0 to 5 %. Units on their way limited to 1, 2 or 3 a warp: 2 to 4 %. Small kernels that run before their
// turn once, to have their code: 2 to 5 %. round_rows, swiglu or all small kernels that let the next one start when
// they have waited, as route does: 1 to 3 %. All 128 registers for products of few rows, so that no small kernel fits
// beside them: 2 %. Two tiles of an expert for each x: 3 %. Whatever a product does before its first copy costs as much
// as after its turn.
// COUNTED (steady loops in cuobjdump -sass of sm_90a, a warp's instructions for a unit of 2 KB times 8 rows; in
// brackets: via bf16): FP4 275 (438), FP8 122 (278), times wo_a's planes 145 (308), bf16 81 (127). For FP4 a
// scheduler's four warps issue 1,100 while their bytes take 2,400 clocks.
#ifdef DSPARK_CUDA_HOST
#define CUDA_HOST_IMPLEMENTATION
#include "cuda_host.h"      // tests/: the same source on a machine without a GPU
#else
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
#endif
#include "dspark.h"
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARP = 32, WARPS = 8, THREADS = WARP * WARPS };
enum { COPIES = 4, MIX = (2 + COPIES) * COPIES };       // hc_mult, and the numbers that a mix computes for a row
enum { SLICE = 32 };                                    // dims of the hidden state that a block of the stream owns
enum { UNIT = 128, TILE = 16 };    // bytes of a weight row that a warp takes at once; rows of a tile
// Splits of a long attention; keys a step; rows for which splits, and indexes, have buffers.
enum { SPLITS = 24, KEYS = 32, ATTEND_ROWS = 32, INDEX_ROWS = 128 };
enum { PANEL = 64 };              // rows of x in a panel, as wgmma takes them
enum { MAX_HEAD_DIM = 512, MAX_INDEX_DIM = 256, MAX_CHOSEN = 32, MAX_EXPERTS = 1024 };

#define ALL 0xffffffffu

// ---- instructions, and their twins on the host ------------------------------------------------

#ifdef DSPARK_CUDA_HOST     // tests/cuda_host.h has the others
#define UNROLL
#define UNROLL_BY(n)
#define SHARED_BYTES(name) char *name = host.shared
#define IN_GLOBAL(p) ((void)0)
static inline void grid_wait(void) {}
static inline void grid_go(void) {}
template <class P> static inline void params_near(const P &) {}
typedef char *shared_at;
static inline shared_at place_in(const char *shared) { return (char *)(uintptr_t)shared; }
template <int AT> static inline void copy16(shared_at to, const void *from) {
    host_ask(to + AT, from, 16);
}
template <int AT> static inline void copy4(shared_at to, const void *from) { host_ask(to + AT, from, 4); }
static inline void keep(int) {}
static inline void prefetch_line(const void *) {}
template <int PENDING> static inline void copies_wait(void) { host_land(PENDING); }
static inline void mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t a[4] = { a0, a1, a2, a3 }, b[2] = { b0, b1 };
    host_mma(c, a, b, 0);
}
static inline void mma_f16(float *c, const uint32_t (*a)[4], int pair, uint32_t b0, uint32_t b1, int first) {
    const uint32_t all[4] = { a[0][pair], a[1][pair], a[0][pair + 1], a[1][pair + 1] }, b[2] = { b0, b1 };
    if (first) c[0] = c[1] = c[2] = c[3] = 0;
    host_mma(c, all, b, 1);
}
template <int DTYPE, int FIRST> static inline void mma_panel(float (*c)[4], const uint32_t (*a)[4], shared_at b) {
    for (int i = 0; i < 4; i++)
        host_mma_panel(c[0], a[i], b + 32 * i,
                       DTYPE == DSPARK_FP4 ? HOST_E4M3 : DTYPE == DSPARK_FP8 ? HOST_F16 : HOST_BF16, FIRST && !i);
}
template <int FIRST, int AT> static inline void mma_scores(float (*c)[4], shared_at a, shared_at b) {
    host_mma_shared({ c[0], a + AT, b + AT, 64, 0, FIRST });
}
template <int K> static inline void mma_values(float (*c)[4], shared_at a, shared_at b) {
    host_mma_shared({ c[0], a + K * 32, b + K * 2048, 256, 8192, 0 });
}
template <int EIGHTS> static inline void keep_sums(float (*)[4]) {}
static inline void mma_panel_begin(void) {}
static inline void mma_panel_close(void) { if (host.backwards) host_products[host.self].close(); }
template <int PENDING, int EIGHTS = 8> static inline void mma_panel_wait(float (*)[4]) {
    host_products[host.self].land(PENDING, host_mma_now);
}
template <int PENDING> static inline void mma_panel_read(uint32_t (*)[4]) {}
static inline void copies_seen(void) {}
template <int N> static inline void registers_fewer(void) {}
template <int N> static inline void registers_more(void) {}
static inline uint32_t bytes_of(const uint2 &from, uint32_t which) { return __byte_perm(from.x, from.y, which); }
static inline float power2(float x) { return exp2f(x); }
template <int AT> static inline uint4 load16(shared_at from) { return *(const uint4 *)host_aligned(from + AT); }
template <int AT> static inline uint4 load_rows(shared_at row) { return host_load_rows(row + AT); }
#else
#define UNROLL _Pragma("unroll")
#define TEXT_OF(x) #x
#define UNROLL_BY(n) _Pragma(TEXT_OF(unroll n))
#define SHARED_BYTES(name) extern __shared__ __align__(16) char name[]
#define IN_GLOBAL(p) __builtin_assume(__isGlobal(p))       // p is global: no generic loads
#ifdef DSPARK_CUDA_TIMED
enum { MAX_TRACED = 4096 };
__device__ unsigned long long trace_ns[MAX_TRACED];     // when each kernel's turn came
__device__ unsigned trace_n;
#endif
// Programmatic dependent launch: waits until the kernel before has ended and its stores are visible. Precedes any read
// of what this pass's kernels wrote; counts and rows, written before its first kernel (op_pass), are read early.
__device__ __forceinline__ void grid_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#ifdef DSPARK_CUDA_TIMED
    if (blockIdx.x + blockIdx.y + threadIdx.x == 0)
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(trace_ns[atomicAdd(&trace_n, 1) % MAX_TRACED]));
#endif
}
// x is needed, and now: ptxas deletes what only an empty asm uses.
__device__ __forceinline__ void keep(int x) {
    asm volatile("{ .reg .pred p; setp.eq.s32 p, %0, -1; @p nanosleep.u32 1; }" :: "r"(x));
}
// Brings a kernel's parameters to the constant cache, for what reads them after its wait.
template <class P> __device__ __forceinline__ void params_near(const P &p) {
    const int *words = (const int *)(const void *)&p;
    int any = 0;
    UNROLL
    for (int i = 0; i < (int)(sizeof p / sizeof(int)); i += 16) any |= words[i];
    keep(any);
}
// Lets the next kernel start beside this one.
__device__ __forceinline__ void grid_go(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// cp.async to AT bytes past an address in shared memory. Copies issued before a close are one group; groups land in
// order.
typedef uint32_t shared_at;
__device__ __forceinline__ shared_at place_in(const char *shared) {
    shared_at at = (uint32_t)__cvta_generic_to_shared(shared);
    asm("" : "+r"(at));         // keep it in a register, do not recompute it
    return at;
}
template <int AT> __device__ __forceinline__ uint4 load16(shared_at from) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from), "n"(AT));
    return r;
}
template <int AT> __device__ __forceinline__ void copy16(shared_at to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1], 16;" :: "r"(to), "l"(from), "n"(AT) : "memory");
}
template <int AT> __device__ __forceinline__ void copy4(shared_at to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0 + %2], [%1], 4;" :: "r"(to), "l"(from), "n"(AT) : "memory");
}
// Prefetches into L2: a weight's unit, the line at p.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void prefetch_bulk(const void *from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
}
#endif
__device__ __forceinline__ void prefetch_line(const void *p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
#if __CUDA_ARCH__ >= 900
#define BULK_COPIES
// A barrier in shared memory, of one arrival and copies that it counts the bytes of, or of more.
__device__ __forceinline__ void barrier_open(shared_at b, int arrivals = 1) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(b), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(shared_at b) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(b) : "memory");
}
// After barrier_open: copies see it.
__device__ __forceinline__ void barriers_seen(void) {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(shared_at b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(shared_at b, uint32_t parity) {
    asm volatile("{ .reg .pred p; AGAIN%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra AGAIN%=; }"
                 :: "r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ int barrier_passed(shared_at b, uint32_t parity) {
    int passed;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
                 : "=r"(passed) : "r"(b), "r"(parity) : "memory");
    return passed;
}
__device__ __forceinline__ void copy_bulk(shared_at to, const void *from, int bytes, shared_at barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// Weights that are not read again in this pass leave L2 first, so that what is read again stays there: code,
// parameters, the residual stream, keys. A layer's weights are 90 MB, L2 50.
__device__ __forceinline__ void copy_weights(shared_at to, const void *from, int bytes, shared_at barrier) {
    uint64_t first;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                 "[%3], %4;" :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(first) : "memory");
}
#else       // not reached: panels and whole blocks are Hopper's
__device__ __forceinline__ void barrier_open(shared_at, int = 1) {}
__device__ __forceinline__ void barrier_arrive(shared_at) {}
__device__ __forceinline__ void barrier_expect(shared_at, int) {}
__device__ __forceinline__ void barrier_wait(shared_at, uint32_t) {}
__device__ __forceinline__ void copy_bulk(shared_at, const void *, int, shared_at) {}
#endif
// N threads of a block meet, at a barrier that is not 0, that of __syncthreads.
template <int BARRIER, int N> __device__ __forceinline__ void threads_meet(void) {
    asm volatile("bar.sync %0, %1;" :: "n"(BARRIER), "n"(N) : "memory");
}
__device__ __forceinline__ void copies_close(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copies_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
// c [16][8] += a [16][16] b [16][8]; lane (g, t) = (lane / 4, lane % 4) has a: rows g, g + 8, k 2t and 2t + 1 (a0, a1),
// 2t + 8 and 2t + 9 (a2, a3); b: column g, the same k; c: row g columns 2t, 2t + 1, then row g + 8.
__device__ __forceinline__ void mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same in f16. a[half][pair]: rows g + 8 half, `pair` and the next. first: c is 0.
__device__ __forceinline__ void mma_f16(float *c, const uint32_t (*a)[4], int pair, uint32_t b0, uint32_t b1,
                                        int first) {
    float c0 = first ? 0 : c[0], c1 = first ? 0 : c[1], c2 = first ? 0 : c[2], c3 = first ? 0 : c[3];
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0][pair]), "r"(a[1][pair]), "r"(a[0][pair + 1]), "r"(a[1][pair + 1]), "r"(b0), "r"(b1), "f"(c0),
          "f"(c1), "f"(c2), "f"(c3));
}
// Four 8 x 8 tiles of shared memory; lane i gives row i % 8 of tile i / 8. r[j]: rows 2t and 2t + 1 of tile j, column
// g, as mma takes b.
__device__ __forceinline__ void load_transposed(uint32_t *r, const uint16_t *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)));
}
// The same, not transposed, of eight rows of 16 bytes: bytes 4t .. 4t + 3 of row g.
template <int AT> __device__ __forceinline__ uint4 load_rows(shared_at row) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(row), "n"(AT));
    return r;
}
// Hopper's wgmma: a warpgroup's c [64][64] += a [64][k] b [64][k], a group of four of a quarter of k each. DTYPE is the
// weights': FP4 as E4M3, k 128; FP8 as f16, k 64; bf16, k 64. A warp has 16 rows of a and c, laid out as for mma, but
// with four k of E4M3 where mma has two. b is in shared memory: 128 bytes a row, 16-byte pieces swizzled by row % 8, on
// a multiple of 1,024. It runs on: mma_panel_wait waits until c is complete, mma_panel_read until a may be written, and
// PENDING groups issued later may go on. FIRST: c starts at 0. Sums of E4M3 keep some 13 bits.
// The descriptor of b: its address / 16 in bits 0 to 13, two distances / 16 from bits 16 and 32 on, 1 for this swizzle
// in bit 62. If a row is numbers along k, the second distance is that of eight rows, 1,024, the first has no meaning,
// and the next quarter is 32 bytes on.
// mma_scores: bf16; a is in shared memory as b is; both AT bytes past. mma_values: bf16, c [64][256] += a b, for keys
// 16 K .. of 64; a [64][64 keys] as in mma_scores; b [64 keys][256] in four panels of [64][64], 8,192 bytes. There a
// row is numbers along n: the first distance is that of 64 columns, a panel; the second that of eight rows, 1,024; the
// next k are 16 rows, 2,048 bytes, on. mma_panel_begin precedes them, after keep_sums where c was written;
// mma_panel_close makes a group of what was issued.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FOUR_SUMS(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
                "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EIGHT_BY_FOUR_SUMS(i) FOUR_SUMS(i), FOUR_SUMS(i + 1), FOUR_SUMS(i + 2), FOUR_SUMS(i + 3), FOUR_SUMS(i + 4),   \
                              FOUR_SUMS(i + 5), FOUR_SUMS(i + 6), FOUR_SUMS(i + 7)
#define MMA_PANEL(types, end)                                                                                         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64" types " {"              \
                 SUMS_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1" end "; }"                                            \
                 : EIGHT_BY_FOUR_SUMS(0)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at), "n"(!FIRST))
__device__ __forceinline__ uint64_t panel_place(shared_at p, int next_panel) {
    return (uint64_t)(p >> 4 & 0x3fff) | (uint64_t)(next_panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}
template <int DTYPE, int FIRST, int AT>
__device__ __forceinline__ void mma_quarter(float (*c)[4], const uint32_t *a, shared_at b) {
    uint64_t at = panel_place(b, 0) + AT / 16;
    if (DTYPE == DSPARK_FP4) MMA_PANEL("k32.f32.e4m3.e4m3", "");
    else if (DTYPE == DSPARK_FP8) MMA_PANEL("k16.f32.f16.f16", ", 0");
    else MMA_PANEL("k16.f32.bf16.bf16", ", 0");
}
template <int FIRST, int AT>
__device__ __forceinline__ void mma_scores(float (*c)[4], shared_at a, shared_at b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 SUMS_32 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : EIGHT_BY_FOUR_SUMS(0)
                 : "l"(panel_place(a, 0) + (AT >> 4)), "l"(panel_place(b, 0) + (AT >> 4)), "n"(!FIRST));
}
template <int K> __device__ __forceinline__ void mma_values(float (*c)[4], shared_at a, shared_at b) {
    asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "
                 "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, "
                 "%69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, "
                 "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "
                 "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "
                 "%123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 1; }"
                 : EIGHT_BY_FOUR_SUMS(0), EIGHT_BY_FOUR_SUMS(8), EIGHT_BY_FOUR_SUMS(16), EIGHT_BY_FOUR_SUMS(24)
                 : "l"(panel_place(a, 0) + (K * 32 >> 4)), "l"(panel_place(b, 8192) + (K * 2048 >> 4)));
}
// Nobody reads or writes these sums across here.
template <int EIGHTS> __device__ __forceinline__ void keep_sums(float (*c)[4]) {
    UNROLL
    for (int i = 0; i < EIGHTS; i++) asm volatile("" : FOUR_SUMS(i) :: "memory");
}
__device__ __forceinline__ void mma_panel_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_panel_close(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int DTYPE, int FIRST>
__device__ __forceinline__ void mma_panel(float (*c)[4], const uint32_t (*a)[4], shared_at b) {
    mma_panel_begin();
    mma_quarter<DTYPE, FIRST, 0>(c, a[0], b), mma_quarter<DTYPE, 0, 32>(c, a[1], b);
    mma_quarter<DTYPE, 0, 64>(c, a[2], b), mma_quarter<DTYPE, 0, 96>(c, a[3], b);
    mma_panel_close();
}
template <int PENDING, int EIGHTS = 8> __device__ __forceinline__ void mma_panel_wait(float (*c)[4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
    keep_sums<EIGHTS>(c);
}
template <int PENDING> __device__ __forceinline__ void mma_panel_read(uint32_t (*a)[4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
    UNROLL
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
}
// Makes copies and stores that this thread made, or knows of by a barrier, visible to wgmma. Waits for its loads.
__device__ __forceinline__ void copies_seen(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A warpgroup has N registers a thread from here on; more only when others have given them up.
template <int N> __device__ __forceinline__ void registers_fewer(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ __forceinline__ void registers_more(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
#else       // not reached: only an H100 has whole blocks
#if __CUDA_ARCH__ == 900
#error "build for sm_90a: sm_90 has no wgmma"
#endif
template <int DTYPE, int FIRST>
__device__ __forceinline__ void mma_panel(float (*)[4], const uint32_t (*)[4], shared_at) {
    __trap();
}
template <int FIRST, int AT>
__device__ __forceinline__ void mma_scores(float (*)[4], shared_at, shared_at) { __trap(); }
template <int K> __device__ __forceinline__ void mma_values(float (*)[4], shared_at, shared_at) { __trap(); }
template <int EIGHTS> __device__ __forceinline__ void keep_sums(float (*)[4]) {}
__device__ __forceinline__ void mma_panel_begin(void) {}
__device__ __forceinline__ void mma_panel_close(void) {}
template <int PENDING, int EIGHTS = 8> __device__ __forceinline__ void mma_panel_wait(float (*)[4]) {}
template <int PENDING> __device__ __forceinline__ void mma_panel_read(uint32_t (*)[4]) {}
__device__ __forceinline__ void copies_seen(void) {}
template <int N> __device__ __forceinline__ void registers_fewer(void) {}
template <int N> __device__ __forceinline__ void registers_more(void) {}
#endif
// __byte_perm without its mask: no nibble of `which` is above 7.
__device__ __forceinline__ uint32_t bytes_of(const uint2 &from, uint32_t which) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(from.x), "r"(from.y), "r"(which));
    return r;
}
// 2^x, to 2 ulp; 0 below 2^-126.
__device__ __forceinline__ float power2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// Four E4M3 codes, in pairs.
__device__ __forceinline__ uint2 f16_of_e4m3(uint32_t codes) {
    uint2 r;
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(r.x), "=r"(r.y) : "r"(codes));
#else
    uint32_t x = __byte_perm(codes, 0, 0x1404), y = __byte_perm(codes, 0, 0x3424);       // as f16: 2^-8 of the value
    x = (x & 0x80008000u) | (x & 0x7f007f00u) >> 1, y = (y & 0x80008000u) | (y & 0x7f007f00u) >> 1;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r.x) : "r"(x), "r"(0x5c005c00u));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r.y) : "r"(y), "r"(0x5c005c00u));
#endif
    return r;
}
__device__ __forceinline__ uint32_t f16x2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float f16_value(uint32_t u) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)u));
    return x;
}
__device__ __forceinline__ uint32_t bf16x2(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Exact where one factor is a power of two; keeps subnormals.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
    return r;
}
#endif

// Where panels may begin in a block's shared memory.
static __device__ __forceinline__ char *panel_room(char *shared) {
    return shared + (1024 - (uintptr_t)place_in(shared) % 1024) % 1024;
}
// To 2 ulp, without the branch of an exact quotient or root: eight at once run side by side, not one after the other.
static __device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
static __device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
// 1 / RMS of n numbers, from the sum of their squares.
static __device__ __forceinline__ float inverse_rms(float squares, int n, float eps) {
    return inverse_root(quotient(squares, (float)n) + eps);
}

static __host__ __device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
static __host__ __device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }
static __host__ __device__ __forceinline__ int blocks_of(int n, int each) { return (n + each - 1) / each; }
// 2^e, -126 <= e <= 127
static __device__ __forceinline__ float exp2i(int e) { return __uint_as_float((uint32_t)(e + 127) << 23); }
// 2^(byte - 127), as E8M0 stores a scale
static __device__ __forceinline__ float e8m0(uint32_t byte) { return __uint_as_float(byte ? byte << 23 : 0x400000u); }

// ---- sums of a warp and of a block: fixed trees, the same bits in every thread ----------------

static __device__ __forceinline__ float warp_sum(float x) {
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}
static __device__ float block_sum(float x, float *scratch /* [warps] */) {
    float sum = 0;
    x = warp_sum(x);
    __syncthreads();        // all have read the old scratch
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    UNROLL_BY(8)
    for (unsigned i = 0; i < blockDim.x / WARP; i++) sum += scratch[i];
    return sum;
}

// Exclusive prefix sum of x over a block; *all: its total.
static __device__ int block_before(int x, int *all) {
    __shared__ int warps[WARP];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, sum = x, before = 0;
    for (int i = 1; i < WARP; i *= 2) {
        int other = __shfl_up_sync(ALL, sum, i);
        if (lane >= i) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) warps[warp] = sum;
    __syncthreads();
    *all = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) {
        if (w < warp) before += warps[w];
        *all += warps[w];
    }
    return before + sum - x;
}

// Is this the last of n blocks to arrive? Then what the others wrote is visible to loads that bypass L1.
static __device__ int last_block(int *arrived, int n) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1) == n - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// ---- rounding ---------------------------------------------------------------------------------

// e of the smallest 2^e with amax / 2^e within the format, from the bits: 448 = 1.75 * 2^8, 6 = 1.5 * 2^2.
static __device__ __forceinline__ int fp8_exponent(float amax) {
    uint32_t u = __float_as_uint(amax > 1e-4f ? amax : 1e-4f);
    return (int)(u >> 23) - 127 - 8 + ((u & 0x7fffff) > 0x600000);
}
static __device__ __forceinline__ int fp4_exponent(float amax) {
    uint32_t u = __float_as_uint(amax);
    if (u < 0x01c00000) u = 0x01c00000;     // 6 * 2^-126
    return (int)(u >> 23) - 127 - 2 + ((u & 0x7fffff) > 0x400000);
}
// |x|, at most `limit`, rounded to `bits` mantissa bits, or below `first` to multiples of first 2^-bits; ties to even.
static __device__ __forceinline__ float nearest(float x, float limit, float first, int bits) {
    float a = fabsf(x), power;
    if (limit < a) a = limit;               // NaN stays
    power = __uint_as_float(__float_as_uint(a) & 0x7f800000u);
    power = (power > first ? power : first) * exp2i(23 - bits);
    return (a + power) - power;
}
static __device__ __forceinline__ float signed_as(float a, float x) {
    return __uint_as_float(__float_as_uint(a) | (__float_as_uint(x) & 0x80000000u));
}
static __device__ __forceinline__ float nearest_e4m3(float x) { return signed_as(nearest(x, 448, 0.015625f, 3), x); }
static __device__ __forceinline__ uint32_t e4m3_code(float x) {        // of a number that nearest_e4m3 gave
    uint32_t u = __float_as_uint(x), a = u & 0x7fffffffu;
    uint32_t code = a < 0x3c800000u ? (uint32_t)(__uint_as_float(a) * 512) : (a >> 20) - (120u << 3);
    return a > 0x7f800000u ? 0x7f : code | (u >> 24 & 0x80);
}
// Both to the nearest E4M3, as two codes.
static __device__ __forceinline__ uint32_t e4m3x2(float low, float high) {
    uint32_t r;
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 x; cvt.rn.satfinite.e4m3x2.f32 x, %1, %2; cvt.u32.u16 %0, x; }" : "=r"(r) : "f"(high), "f"(low));
#else
    r = e4m3_code(nearest_e4m3(low)) | e4m3_code(nearest_e4m3(high)) << 8;
#endif
    return r;
}

// ---- rows of inputs ---------------------------------------------------------------------------

// A row of inputs, in one to three forms. rounded [rows][stride]: FP8 with a scale per 128, stored as f16, exact.
// halves [2][rows][stride]: two f16 numbers whose sum, times a scale per 128, is the input to 2^-24 of it or 2^-39 of
// the largest. plain [3][rows][stride]: three bf16 numbers that add up to it; of each 32, those that lane t of an mma
// takes, 2t and 2t + 1 of each eight, are at 8t. Scales [rows][stride / 128]. Zeros up to the stride.
typedef struct {
    uint16_t *rounded, *halves, *plain;
    float *rounded_scale, *halves_scale;
    int stride;
    size_t plane;
} input;

// The largest a of `threads` consecutive threads, a power of two, that share a block.
static __device__ __forceinline__ float group_max(float a, int threads) {
    for (int i = threads / 2; i; i /= 2) a = fmaxf(a, __shfl_xor_sync(ALL, a, i));
    return a;
}
static __device__ __forceinline__ float largest_of(const float *v) {
    float a = 0;
    for (int i = 0; i < 8; i++) a = fmaxf(a, fabsf(v[i]));
    return a;
}
// put_*: eight numbers in a form, at `to`; a: the largest of their block of 128.
static __device__ __forceinline__ void put_rounded(const input &x, size_t to, const float *v, float a) {
    int e = fp8_exponent(a);
    uint32_t w[4];
    for (int i = 0; i < 4; i++)
        w[i] = f16x2(nearest_e4m3(v[2 * i] * exp2i(-e)), nearest_e4m3(v[2 * i + 1] * exp2i(-e)));
    *(uint4 *)(void *)(x.rounded + to) = make_uint4(w[0], w[1], w[2], w[3]);
    if (to % 128 == 0) x.rounded_scale[to / 128] = a <= FLT_MAX ? exp2i(e) : HUGE_VALF;     // infinity stays
}
static __device__ __forceinline__ int halves_exponent(float a) {       // a 2^-e < 2^15
    return (int)(__float_as_uint(fmaxf(a, exp2i(-112))) >> 23) - 127 - 14;
}
static __device__ __forceinline__ void put_halves(const input &x, size_t to, const float *v, float a) {
    int e = halves_exponent(a);
    float rest[8];
    uint32_t w[4];
    for (int i = 0; i < 8; i++) rest[i] = v[i] * exp2i(-e);
    for (int p = 0; p < 2; p++) {
        for (int i = 0; i < 4; i++) {
            w[i] = f16x2(rest[2 * i], rest[2 * i + 1]);
            rest[2 * i] -= f16_value(w[i] & 0xffffu), rest[2 * i + 1] -= f16_value(w[i] >> 16);
        }
        *(uint4 *)(void *)(x.halves + (size_t)p * x.plane + to) = make_uint4(w[0], w[1], w[2], w[3]);
    }
    if (to % 128 == 0) x.halves_scale[to / 128] = exp2i(e);
}
// Panel order of rows of `pitch` bytes: [rows / 64][pitch / 128][64][128], pieces of 16 swizzled. Where byte k of row r
// is: in its panel, and in all. Scales, n a row: [rows / 64][n][64].
static __device__ __forceinline__ int in_panel(int r, int k) {
    return (k / UNIT * PANEL + r) * UNIT + (k % UNIT ^ r % 8 * 16);
}
static __device__ __forceinline__ size_t panel_byte(int r, int k, int pitch) {
    return (size_t)(r / PANEL * PANEL) * (size_t)pitch + (size_t)in_panel(r % PANEL, k);
}
static __device__ __forceinline__ size_t panel_scale(int r, int k, int n) {
    return (size_t)(r / PANEL * n + k) * PANEL + (size_t)(r % PANEL);
}
// wo_a's input for mma_panel, one plane, in panel order: of each 16, numbers 4t, 4t + 1 at 2t, the next two at 8 + 2t.
static __device__ __forceinline__ void put_panel(const input &x, int row, int at, const float *v, int live) {
    float a = group_max(live ? largest_of(v) : 0, 16), scaled[8];
    size_t to = panel_byte(row, (at - at % 16) * 2, x.stride * 2);
    uint8_t *out = (uint8_t *)x.halves + at % 16;
    int e = halves_exponent(a);
    if (!live) return;
    for (int i = 0; i < 8; i++) scaled[i] = v[i] * exp2i(-e);
    for (int i = 0; i < 2; i++)
        *(uint2 *)(void *)(out + (to ^ (size_t)(i * 16))) =
            make_uint2(f16x2(scaled[2 * i], scaled[2 * i + 1]), f16x2(scaled[2 * i + 4], scaled[2 * i + 5]));
    if (at % 128 == 0) x.halves_scale[panel_scale(row, at / 128, x.stride / 128)] = exp2i(e);
}
static __device__ __forceinline__ void put_plain(const input &x, size_t to, const float *v) {
    uint16_t *out = x.plain + to - to % 32 + to % 32 / 4;
    float rest[8];
    for (int i = 0; i < 8; i++) rest[i] = v[i];
    for (int p = 0; p < 3; p++, out += x.plane)
        for (int t = 0; t < 4; t++) {
            uint32_t w = bf16x2(rest[2 * t], rest[2 * t + 1]);
            rest[2 * t] -= __uint_as_float(w << 16), rest[2 * t + 1] -= __uint_as_float(w & 0xffff0000u);
            *(uint32_t *)(void *)(out + 8 * t) = w;
        }
}
template <int N> static __device__ __forceinline__ void zero(float *v) {
    UNROLL
    for (int i = 0; i < N; i++) v[i] = 0;
}
// Eight values of a row, at `at`, in the forms x has. All threads of a warp call it, 16 to a block of 128; `live` 0: no
// values.
static __device__ void put_input(const input &x, int row, int at, const float *v, int live) {
    float a = group_max(live ? largest_of(v) : 0, 16);
    size_t to = (size_t)row * (size_t)x.stride + (size_t)at;
    if (!live) return;
    if (x.rounded) put_rounded(x, to, v, a);
    if (x.halves) put_halves(x, to, v, a);
    if (x.plain) put_plain(x, to, v);
}
static __device__ __forceinline__ void load8(float *v, const float *from) {
    float4 a = ((const float4 *)(const void *)from)[0], b = ((const float4 *)(const void *)from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
// Bypasses L1, for what is read once.
static __device__ __forceinline__ void load8_fresh(float *v, const float *from) {
    float4 a = __ldcg((const float4 *)(const void *)from), b = __ldcg((const float4 *)(const void *)from + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
// A row of n values, which may lie in shared memory.
static __device__ void put_input_row(const input &x, int row, const float *values, int n) {
    for (int at = 0; at < n; at += THREADS * 8) {
        int mine = at + (int)threadIdx.x * 8, live = mine < n;
        float v[8];
        if (live) load8(v, values + mine);
        put_input(x, row, mine, v, live);
    }
}
// x / rms * w of a row of n values, by a block; the first 2,048 are read once.
static __device__ void put_normed_row(const input &x, int row, const float *values, const float *w, int n, float eps,
                                      float *scratch) {
    enum { STEP = THREADS * 8 };
    int first = (int)threadIdx.x * 8;
    float sum = 0, scale, v[8], by[8];
    zero<8>(v), zero<8>(by);
    if (first < n) load8_fresh(v, values + first), load8(by, w + first);
    for (int at = first; at < n; at += STEP) {
        if (at != first) load8_fresh(v, values + at);
        for (int k = 0; k < 8; k++) sum = fmaf(v[k], v[k], sum);
    }
    scale = inverse_rms(block_sum(sum, scratch), n, eps);
    for (int at0 = 0; at0 < n; at0 += STEP) {
        int at = at0 + first, live = at < n;
        float y[8];
        if (n > STEP && live) load8_fresh(v, values + at), load8(by, w + at);
        for (int k = 0; k < 8; k++) y[k] = v[k] * scale * by[k];
        put_input(x, row, at, y, live);
    }
}
// x = x / rms * w in shared memory
static __device__ void norm_row(float *x, const float *w, int n, float eps, float *scratch) {
    float sum = 0, scale;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) sum = fmaf(x[i], x[i], sum);
    scale = inverse_rms(block_sum(sum, scratch), n, eps);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) x[i] = x[i] * scale * w[i];
    __syncthreads();
}

// ---- a pass -----------------------------------------------------------------------------------

// A row, as kernels see it; of its segment the first row, that row's position, the number of rows.
typedef struct {
    uint8_t *const *state;          // the session's arrays
    int id, position, keep_rows;
    int first, first_position, n;
} row;
typedef struct { int n_rows, n_logits, n_segments, n_injected, drafts; } counts;
typedef struct { uint8_t *const *state; int position; } injection;
// cos and sin of a row's position, for both sets of frequencies: once a pass, in double
enum { TURNS_PLAIN, TURNS_COMPRESSED };
typedef struct { const counts *n; const row *rows; const double *freqs[2]; int half; float2 *turns; } turns_args;
static __device__ __forceinline__ float2 turn_of(const float2 *turns, int half, int r, int set, int i) {
    return turns[((size_t)r * 2 + (size_t)set) * (size_t)half + (size_t)i];
}
static __global__ void __launch_bounds__(THREADS) turns(const turns_args p) {
    int r = (int)blockIdx.x;
    grid_go();
    grid_wait();
    if (r >= p.n->n_rows) return;
    for (int i = (int)threadIdx.x; i < 2 * p.half; i += THREADS) {
        double s, c;
        sincos(p.rows[r].position * p.freqs[i / p.half][i % p.half], &s, &c);
        p.turns[(size_t)r * 2 * (size_t)p.half + (size_t)i] = make_float2((float)c, (float)s);
    }
}

// Numbers of the checkpoint that kernels share.
typedef struct {
    int h, H, D, R, q_lora, window, ring, I, index_heads, index_topk, block, n_taps, rank, V, K, E;
    float eps, hc_eps, limit, routed_scale;
    int sinkhorn_iters;
} shape;

// The arrays of a state, for each layer; after them, the taps.
enum { WINDOW, KV, GATE, ROW_CODES, ROW_SCALES, ROPE, INDEX_KV, INDEX_GATE, KEY_CODES, KEY_SCALES, N_ARRAYS };

static __host__ __device__ int raw_ring(int ratio, int block) { return (ratio == 4 ? 2 * ratio : ratio) + block + 1; }

// ---- linears ----------------------------------------------------------------------------------
// Weights are the M side: a block takes tiles of 16 outputs, a warp of it every eighth unit. A lane has 16 bytes of
// rows g and g + 8 at a time (of FP4 four of each block of 32, so that an mma has one scale a row) as fragments: any
// order of k will do if both sides agree. A warp issues copies three units of 2 KB ahead, into slots of shared memory
// that only it reads: no barrier, and no gap at the ends of tiles and matrices; 96 KB an SM with two blocks. Bound:
// bytes of weights, the same at 1 and at 6 rows, MB (us): wq_a, wkv, compressors, index weights 27.8 (9.3); wq_b, index
// wq_b 41.9 (14); wo_a 33.6 (11.2); wo_b 33.6 (11.2); gate, shared w1 w3 18.1 (6.0); the head 1059 (353) once a pass;
// markov_w2 66 (22) a step. From 16 rows on, reading x from the caches for each unit binds instead; from 33 on other
// kernels run.

typedef struct {
    const uint8_t *data;            // [rows / TILE][units][unit_bytes]; what pads tiles and units is zeros
    const uint8_t *scale;           // FP8: [rows / 128][units]; FP4 has its scales in the units
    const float *block_scale;       // FP8, if cuBLASLt may take it: [rows / 128][cols / 128, padded to fours]
    int rows, cols, pitch, dtype;   // pitch: bytes of a row's units, without scales
} matrix;

// What a block multiplies before it adds its warps' sums: outputs [m0, m0 + tiles * TILE) of a matrix.
typedef struct {
    const uint8_t *data, *scale;    // of the matrix
    const int *list;                // the rows that take it, NULL: all
    int n, pitch, dtype, rows, m0, tiles, of;       // of: which job, or which of an expert's matrices
} span;
static __device__ __forceinline__ void set_span(span &s, const matrix &w, int m0, int tiles, int of) {
    s.data = w.data, s.scale = w.scale, s.list = NULL, s.n = 0, s.pitch = w.pitch, s.dtype = w.dtype, s.rows = w.rows;
    s.m0 = m0, s.tiles = tiles, s.of = of;
}

// A launch's weights are counted in items of item_bytes, so that blocks get equal shares of bytes. A tile is one item
// or more; it is in the share where it begins.
enum { ITEM = 16 << 10 };
static __host__ __device__ __forceinline__ int items_of_tile(const matrix &w, int item_bytes) {
    return most(1, TILE * w.pitch / item_bytes);
}
static __host__ __device__ __forceinline__ int items_of(const matrix &w, int item_bytes) {
    return blocks_of(w.rows, TILE) * items_of_tile(w, item_bytes);
}
// An item of a launch: its matrix w, the n rows of a list that take it (experts), its part, and the tile that begins
// there (-1: none).
typedef struct { matrix w; const int *list; int n, tile, part, of; } item_at;

// Finds the spans that begin in items [first, first + 32), up to `end`: runs of up to `most_tiles` tiles of one part.
// The first warp writes them; every thread gets the count. active: as item_of of experts takes it.
template <class P> static __device__ __forceinline__ int find_spans(const P &p, int first, int end, int most_tiles,
                                                                    int active, span *spans) {
    __shared__ int n;
    __syncthreads();        // all are done with old spans
    if (threadIdx.x < WARP) {
        int lane = (int)threadIdx.x, before;
        item_at it;
        item_of(p, least(first + lane, end - 1), active, it);
        if (first + lane >= end) it.tile = it.part = -1;
        unsigned tile_lanes = __ballot_sync(ALL, it.tile >= 0), lower = (1u << lane) - 1, upto = lower | 1u << lane;
        before = tile_lanes & lower ? 31 - __clz((int)(tile_lanes & lower)) : lane;     // the lane of the tile before
        int starts = __shfl_sync(ALL, it.part, before) != it.part || before == lane;
        unsigned part_starts = __ballot_sync(ALL, it.tile >= 0 && starts);
        int part_lane = part_starts & upto ? 31 - __clz((int)(part_starts & upto)) : 0;
        int in_part = __popc(tile_lanes & lower & ~((1u << part_lane) - 1));            // the tile's number in its part
        unsigned span_starts = __ballot_sync(ALL, it.tile >= 0 && in_part % most_tiles == 0);
        unsigned later = span_starts & ~upto;
        unsigned mine = tile_lanes & ~lower & (later ? (1u << (__ffs((int)later) - 1)) - 1 : ALL);
        if (span_starts >> lane & 1) {
            span &s = spans[__popc(span_starts & lower)];
            set_span(s, it.w, it.tile * TILE, __popc(mine), it.of);
            s.list = it.list, s.n = it.n;
        }
        if (lane == 0) n = __popc(span_starts);
    }
    __syncthreads();
    return n;
}

// A unit of 16 rows, as stored and in shared memory, four parts of 512 bytes: rows g, rows g + 8, both again 64 bytes
// further. Lane (g, t) has its 16 bytes of each at place_of(lane). FP4's scales follow, 16 bytes a g. Eight consecutive
// lanes, and the eight g of a t, then cover all banks.
enum { UNIT_BYTES = TILE * UNIT, SLOT_BYTES = UNIT_BYTES + UNIT };
static __host__ __device__ __forceinline__ int place_of(int lane) { return (lane ^ lane / 8) * 16; }
// Where byte b of row r is stored, of a matrix that is not FP4.
static __host__ __device__ __forceinline__ size_t stored_at(int pitch, int r, int b) {
    int part = r % TILE / 8 + b % UNIT / 64 * 2, lane = r % 8 * 4 + b % 64 / 16;
    return (size_t)(r / TILE) * (size_t)pitch * TILE +
           (size_t)(b / UNIT * UNIT_BYTES + part * 512 + place_of(lane) + b % 16);
}

static __host__ __device__ __forceinline__ int unit_bytes(int dtype) {
    return dtype == DSPARK_FP4 ? SLOT_BYTES : UNIT_BYTES;
}
static __device__ __forceinline__ const uint8_t *unit_at(const span &s, int tile, int unit) {
    return s.data + (size_t)((s.m0 / TILE + tile) * (s.pitch / UNIT) + unit) * (size_t)unit_bytes(s.dtype);
}
// By a warp.
static __device__ __forceinline__ void ask_unit(shared_at slot, const uint8_t *p, int bytes) {
    int lane = (int)threadIdx.x % WARP;
    slot += lane * 16, p += lane * 16;
    copy16<0>(slot, p), copy16<512>(slot, p + 512), copy16<1024>(slot, p + 1024), copy16<1536>(slot, p + 1536);
    if (lane * 16 < bytes - UNIT_BYTES) copy16<UNIT_BYTES>(slot, p + UNIT_BYTES);
}
// A slot of a warp's ring. Hopper copies a unit by itself and counts its bytes at a barrier beside it, so no load waits
// behind those of a hundred kilobytes of weights; elsewhere lanes copy, a group a unit. ring_wait: of the slot's turns,
// the one of this parity; PENDING groups were asked for later.
enum { RING_SLOT = SLOT_BYTES + 16 };
#ifdef BULK_COPIES
static __device__ __forceinline__ void ring_open(shared_at slots, int n) {
    if ((int)threadIdx.x % WARP < n) barrier_open(slots + (int)threadIdx.x % WARP * RING_SLOT + SLOT_BYTES);
    barriers_seen();
    __syncwarp();
}
static __device__ __forceinline__ void ring_ask(shared_at slot, const uint8_t *p, int bytes) {
    if (threadIdx.x % WARP) return;
    barrier_expect(slot + SLOT_BYTES, bytes);
    copy_weights(slot, p, bytes, slot + SLOT_BYTES);
}
static __device__ __forceinline__ void ring_close(void) {}
template <int PENDING> static __device__ __forceinline__ void ring_wait(shared_at slot, uint32_t parity) {
    barrier_wait(slot + SLOT_BYTES, parity);
}
static __device__ __forceinline__ int ring_landed(shared_at slot, uint32_t parity) {
    return barrier_passed(slot + SLOT_BYTES, parity);
}
#else
static __device__ __forceinline__ void ring_open(shared_at, int) {}
static __device__ __forceinline__ void ring_ask(shared_at slot, const uint8_t *p, int bytes) {
    ask_unit(slot, p, bytes);
}
static __device__ __forceinline__ void ring_close(void) { copies_close(); }
template <int PENDING> static __device__ __forceinline__ void ring_wait(shared_at, uint32_t) {
    copies_wait<PENDING>();
    __syncwarp();       // lanes read each other's copies
}
#endif

// A lane's part of a unit. FP8, F32: v[2 c + half] has 16 bytes of row g + 8 half, chunk c. Others: word 2 b + half of
// v[j] has four bytes of row g + 8 half, of the 16 at 2 j + b. FP4's scales: the bytes of scale's word j, ordered
// alike; FP8 has one scale.
typedef struct { uint4 v[4], scale; } piece;
template <int DTYPE>
static __device__ __forceinline__ void take_piece(piece &q, shared_at slot, uint32_t scale) {
    int lane = (int)threadIdx.x % WARP;
    if (DTYPE == DSPARK_FP8 || DTYPE == DSPARK_F32) {
        shared_at from = slot + place_of(lane);
        q.v[0] = load16<0>(from), q.v[1] = load16<512>(from), q.v[2] = load16<1024>(from);
        q.v[3] = load16<1536>(from), q.scale.x = scale;
    } else {
        shared_at from = slot + lane / 8 % 2 * 512, even = from + place_of(lane % 8 * 4 + lane / 16),
                  odd = from + place_of(lane % 8 * 4 + lane / 16 + 2);
        q.v[0] = load_rows<0>(even), q.v[1] = load_rows<0>(odd);
        q.v[2] = load_rows<1024>(even), q.v[3] = load_rows<1024>(odd);
        if (DTYPE == DSPARK_FP4) q.scale = load16<UNIT_BYTES>(slot + lane / 4 * 16);
    }
}
// FP8: where the scales of a tile's units are.
static __device__ __forceinline__ const uint8_t *scales_of(const span &s, int tile) {
    return s.scale + (size_t)((s.m0 + tile * TILE) / 128) * (size_t)(s.pitch / UNIT);
}

// Per dtype: numbers in a unit; adjacent eights a lane has of a row; bf16 planes a weight splits into; accumulators.
template <int DTYPE> struct weights_of { enum { IN_UNIT = 64, EIGHTS = 1, PLANES = 1, SUMS = 3 }; };
template <> struct weights_of<DSPARK_FP8> { enum { IN_UNIT = 128, EIGHTS = 2, PLANES = 1, SUMS = 1 }; };
template <> struct weights_of<DSPARK_FP4> { enum { IN_UNIT = 256, EIGHTS = 1, PLANES = 1, SUMS = 1 }; };
template <> struct weights_of<DSPARK_F16> { enum { IN_UNIT = 64, EIGHTS = 1, PLANES = 2, SUMS = 3 }; };
template <> struct weights_of<DSPARK_F32> { enum { IN_UNIT = 32, EIGHTS = 1, PLANES = 3, SUMS = 3 }; };

static __device__ __forceinline__ uint32_t word(const uint4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Eight FP4 codes, as `arranged` leaves them, to f16 pairs (0, 1), (2, 3) .., 2^-14 of the value: e e m become the
// exponent's low bits and the mantissa's first. A byte has one code in bits 7 and 3 2 1, another in the mirrored bits:
// seven instructions for the eight.
enum { FP4_SHIFT = 14 };
static __device__ __forceinline__ void decode_fp4(uint32_t codes, uint32_t *a) {
    uint32_t mirrored = __brev(codes), bits = 0x8e008e00u;
    a[0] = codes & bits, a[1] = codes << 8 & bits, a[2] = mirrored & bits, a[3] = mirrored << 8 & bits;
}
static __device__ __forceinline__ uint32_t arranged(uint32_t codes) {
    uint32_t to = 0;
    for (int i = 0; i < 8; i++) {
        uint32_t code = codes >> 4 * i & 15, byte = (code & 8) << 4 | (code & 7) << 1;
        to |= (i < 4 ? byte : __brev(byte) >> 24) << 8 * (0x13022031u >> 4 * i & 15);
    }
    return to;
}

// Splits a pair of floats into bf16 planes.
template <int PLANES>
static __device__ __forceinline__ void planes_of(float low, float high, uint32_t (*a)[4], int pair) {
    for (int p = 0; p < PLANES; p++) {
        uint32_t w = a[p][pair] = bf16x2(low, high);
        low -= __uint_as_float(w << 16), high -= __uint_as_float(w & 0xffff0000u);
    }
}
// A lane's eight i of a unit, row g + 8 half: a[plane][pair] in bf16.
template <int DTYPE>
static __device__ __forceinline__ void decode_plain(const piece &q, int i, int half, uint32_t (*a)[4]) {
    enum { PLANES = weights_of<DTYPE>::PLANES };
    UNROLL
    for (int k = 0; k < 4; k++) {
        uint32_t w = word(q.v[2 * i + k / 2], k % 2 * 2 + half);
        if (DTYPE == DSPARK_BF16) a[0][k] = w;
        else if (DTYPE == DSPARK_F16) planes_of<PLANES>(f16_value(w & 0xffffu), f16_value(w >> 16), a, k);
        else {
            const uint4 &v = q.v[k / 2 * 2 + half];     // four floats of each chunk are an eight
            planes_of<PLANES>(__uint_as_float(k % 2 ? v.z : v.x), __uint_as_float(k % 2 ? v.w : v.y), a, k);
        }
    }
}

typedef struct { const uint16_t *x; const float *scale; size_t plane; int planes; } operand;
// The form of x that goes with weights of a dtype; as_is: not rounded.
static __host__ __device__ __forceinline__ operand operand_of(const input &x, int dtype, int as_is) {
    operand o = { x.plain, NULL, x.plane, 3 };
    if (dtype < DSPARK_FP8) return o;
    o.x = as_is ? x.halves : x.rounded, o.scale = as_is ? x.halves_scale : x.rounded_scale, o.planes = as_is ? 2 : 1;
    return o;
}

// Where a lane's first eight is in 32 numbers of x.
template <int DTYPE> static __device__ __forceinline__ uint32_t lane_eight(void) {
    uint32_t t = threadIdx.x % 4;
    return DTYPE == DSPARK_F32 ? t % 2 * 16 + t / 2 * 2 : t * 8;
}
// Reads x for a unit: the lane's i-th eight in row g of row group `nt`, ordered as its weights; and the scales of rows
// 2t and 2t + 1, s[row][128]. from_memory: the lane's part of row g begins at [nt], the two rows' scales at scale_at
// [nt][2].
template <int DTYPE> static __device__ __forceinline__ uint4 eight_at(const uint16_t *x) {
    if (DTYPE != DSPARK_F32) return *(const uint4 *)(const void *)x;
    const uint32_t *pair = (const uint32_t *)(const void *)x;
    return make_uint4(pair[0], pair[4], pair[2], pair[6]);
}
template <int DTYPE> struct from_memory {
    const uint16_t *const *x;       // the planes
    const float *scale;
    const uint32_t *at, (*scale_at)[2];
    uint32_t unit;
    __device__ __forceinline__ uint4 operator()(int p, int nt, int i) const {
        enum { EIGHTS = weights_of<DTYPE>::EIGHTS };
        uint32_t from = at[nt] + unit * weights_of<DTYPE>::IN_UNIT;
        return eight_at<DTYPE>(x[p] + from + (i / EIGHTS * EIGHTS * 32 + i % EIGHTS * 8));
    }
    __device__ __forceinline__ void scales(int nt, float (*s)[2]) const {
        UNROLL
        for (int j = 0; j < 2; j++)
            if (DTYPE == DSPARK_FP4) {
                const float2 both = *(const float2 *)(const void *)(scale + (scale_at[nt][j] + unit * 2));
                s[j][0] = both.x, s[j][1] = both.y;
            } else s[j][0] = scale[scale_at[nt][j] + unit];
    }
};

// c += 16 weight rows times 8 rows of x, over 32 numbers of k.
static __device__ __forceinline__ void mma_eight(float *c, const uint32_t (*a)[4], const uint4 &x, int first) {
    mma_f16(c, a, 0, x.x, x.y, first), mma_f16(c, a, 2, x.z, x.w, 0);
}
// acc[mt][nt] += a unit of MT * 16 weight rows times NT * 8 rows of x, in X planes that `b` reads. FP8: 128 products
// are summed, then take both scales. FP4: 32 products take their scale and enter a sum of 128, which takes the scale of
// x.
template <int MT, int NT, int X, class B>
static __device__ __forceinline__ void multiply_fp8(const piece *q, const B &b, float (*acc)[NT][4]) {
    float sum[MT][NT][4];
    UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t a[MT][2][4];
        UNROLL
        for (int k = 0; k < MT * 8; k++) {
            int mt = k / 8, half = k / 4 % 2;
            if (k % 2) continue;
            const uint2 two = f16_of_e4m3(word(q[mt].v[i / 2 * 2 + half], i % 2 * 2 + k / 2 % 2));
            a[mt][half][k % 4] = two.x, a[mt][half][k % 4 + 1] = two.y;
        }
        UNROLL
        for (int p = 0; p < X; p++)
            UNROLL
            for (int nt = 0; nt < NT; nt++) {
                const uint4 x = b(p, nt, i);
                UNROLL
                for (int mt = 0; mt < MT; mt++) mma_eight(sum[mt][nt], a[mt], x, !i && !p);
            }
    }
    UNROLL
    for (int nt = 0; nt < NT; nt++) {
        float s[2][2];
        b.scales(nt, s);
        UNROLL
        for (int mt = 0; mt < MT; mt++)
            UNROLL
            for (int k = 0; k < 4; k++)
                acc[mt][nt][k] = fmaf(sum[mt][nt][k], s[k % 2][0] * e8m0(q[mt].scale.x), acc[mt][nt][k]);
    }
}
// 2^(byte - 127) for byte i of a word, byte 1 and up.
static __device__ __forceinline__ float scale_float(uint32_t w, int i) {
    return __uint_as_float((i == 3 ? w >> 1 : w << (23 - 8 * i)) & 0x7f800000u);
}
template <int MT, int NT, int X, class B>
static __device__ __forceinline__ void multiply_fp4(const piece *q, const B &b, float (*acc)[NT][4]) {
    float s[NT][2][2];
    UNROLL
    for (int nt = 0; nt < NT; nt++) b.scales(nt, s[nt]);
    UNROLL
    for (int c = 0; c < 2; c++) {
        float part[MT][NT][4];
        zero<MT * NT * 4>(&part[0][0][0]);
        UNROLL
        for (int i = 0; i < 4; i++) {
            uint32_t a[MT][2][4];
            float sum[MT][NT][4];
            int j = 2 * c + i / 2, first = i % 2 * 2;
            UNROLL
            for (int mt = 0; mt < MT; mt++)
                UNROLL
                for (int half = 0; half < 2; half++) decode_fp4(word(q[mt].v[j], first + half), a[mt][half]);
            UNROLL
            for (int p = 0; p < X; p++)
                UNROLL
                for (int nt = 0; nt < NT; nt++) {
                    const uint4 x = b(p, nt, 4 * c + i);
                    UNROLL
                    for (int mt = 0; mt < MT; mt++) mma_eight(sum[mt][nt], a[mt], x, !p);
                }
            UNROLL
            for (int mt = 0; mt < MT; mt++)
                UNROLL
                for (int nt = 0; nt < NT; nt++)
                    UNROLL
                    for (int k = 0; k < 4; k++) {
                        float by = scale_float(word(q[mt].scale, j), first + k / 2);
                        part[mt][nt][k] = fmaf(sum[mt][nt][k], by, part[mt][nt][k]);
                    }
        }
        UNROLL
        for (int nt = 0; nt < NT; nt++)
            UNROLL
            for (int mt = 0; mt < MT; mt++)
                UNROLL
                for (int k = 0; k < 4; k++) acc[mt][nt][k] = fmaf(part[mt][nt][k], s[nt][k % 2][c], acc[mt][nt][k]);
    }
}
// acc[p][mt][nt] += the same for plane p of x. Apart, planes are three short chains of mma, not a long one.
template <int DTYPE, int MT, int NT, class B>
static __device__ __forceinline__ void multiply_plain(const piece *q, const B &b, float (*acc)[MT][NT][4]) {
    enum { PLANES = weights_of<DTYPE>::PLANES };
    UNROLL
    for (int j = 0; j < weights_of<DTYPE>::IN_UNIT / 32; j++) {
        uint32_t a[MT][2][PLANES][4];
        UNROLL
        for (int mt = 0; mt < MT; mt++)
            decode_plain<DTYPE>(q[mt], j, 0, a[mt][0]), decode_plain<DTYPE>(q[mt], j, 1, a[mt][1]);
        UNROLL
        for (int p = 0; p < 3; p++)
            UNROLL
            for (int nt = 0; nt < NT; nt++) {
                const uint4 x = b(p, nt, j);
                UNROLL
                for (int i = 0; i < PLANES; i++) {
                    if (i + p > 2) continue;        // below 2^-24 of the product
                    UNROLL
                    for (int mt = 0; mt < MT; mt++)
                        mma(acc[p][mt][nt], a[mt][0][i][0], a[mt][1][i][0], a[mt][0][i][1], a[mt][1][i][1], x.x, x.y);
                    UNROLL
                    for (int mt = 0; mt < MT; mt++)
                        mma(acc[p][mt][nt], a[mt][0][i][2], a[mt][1][i][2], a[mt][0][i][3], a[mt][1][i][3], x.z, x.w);
                }
            }
    }
}
template <int DTYPE, int MT, int NT, int X, class B>
static __device__ __forceinline__ void multiply(const piece *q, const B &b, float (*acc)[MT][NT][4]) {
    if constexpr (DTYPE == DSPARK_FP8) multiply_fp8<MT, NT, X>(q, b, acc[0]);
    else if constexpr (DTYPE == DSPARK_FP4) multiply_fp4<MT, NT, X>(q, b, acc[0]);
    else multiply_plain<DTYPE, MT, NT>(q, b, acc);
}

// What a warp copies next, SLOTS units ahead of what it multiplies, across tiles and spans: the unit, units left in the
// tile and tiles left in the span; bytes of a unit, and from where a tile's next unit would be to the next one's first;
// the warp's slots, the next of them and, a bit each, the parity of the copies that land there next.
typedef struct {
    const span *spans;
    const uint8_t *p;
    shared_at slots;
    int n, k, i0, bytes, skip, each, units, tiles, next;
    uint32_t parity;
} feed;

enum { SLOTS = 3 };         // of a warp
static __host__ __device__ constexpr int tiles_at_once(int nt) { return 4 / nt; }
// Shared memory: the eight warps' sums [tile][warp][row of x][16 outputs, padded to 17], then the warps' slots. With
// few rows a span may have more tiles.
static __host__ __device__ constexpr int parts_bytes(int nt) { return tiles_at_once(nt) * WARPS * nt * 8 * 17 * 4; }
static __device__ __forceinline__ int most_tiles(int nt, int width) {
    return least(WARP, tiles_at_once(nt) * nt * 8 / width);
}
// A block's threads, as __launch_bounds__ counts them. More than there are leave registers free: with 320 a thread has
// 96, and two blocks leave a quarter of an SM's, room for a block of the small kernels before and after a product.
constexpr int bound_of(int nt) { return nt == 1 ? 320 : THREADS; }
static int product_bytes(int nt) { return parts_bytes(nt) + WARPS * SLOTS * RING_SLOT; }

// Where the share of a block begins.
static __device__ __forceinline__ int first_item(int n, int block, int blocks) {
    return (int)((uint32_t)n * (uint32_t)block / (uint32_t)blocks);     // 2^32 / 264 items are 260 GB
}

// To the next span that has units for the warp.
static __device__ __forceinline__ void feed_span(feed &f) {
    int warp = (int)threadIdx.x / WARP;
    for (f.tiles = 0, f.units = INT_MAX; f.k < f.n; f.k++) {
        const span &s = f.spans[f.k];
        f.units = f.each = (s.pitch / UNIT - warp + WARPS - 1) / WARPS;
        if (!f.each) continue;
        f.p = unit_at(s, 0, warp), f.bytes = unit_bytes(s.dtype), f.tiles = s.tiles;
        f.skip = (s.pitch / UNIT - f.each * WARPS) * f.bytes;
        return;
    }
}
template <int NT> static __device__ __forceinline__ void feed_tile(feed &f) {
    f.units = f.each;
    f.p += f.skip;
    if (--f.tiles) return;
    if ((f.i0 += NT * 8) >= f.spans[f.k].n) f.i0 = 0, f.k++;
    feed_span(f);
}
template <int NT> static __device__ __forceinline__ void ask(feed &f) {
    if (f.tiles) ring_ask(f.slots + f.next * RING_SLOT, f.p, f.bytes);
    ring_close();
    f.p += WARPS * f.bytes;
    f.next = f.next + 1 == SLOTS ? 0 : f.next + 1;
    if (!--f.units) feed_tile<NT>(f);
}
// Waits for the oldest unit; its slot.
template <int NT> static __device__ __forceinline__ shared_at await(feed &f) {
    shared_at slot = f.slots + f.next * RING_SLOT;
    ring_wait<SLOTS - 1>(slot, f.parity >> f.next & 1);
    f.parity ^= 1u << f.next;
    return slot;
}
template <int NT> static __device__ __forceinline__ void feed_open(feed &f, char *bytes) {
    memset(&f, 0, sizeof f);
    f.p = (const uint8_t *)bytes;
    f.slots = place_in(bytes + parts_bytes(NT) + (int)threadIdx.x / WARP * SLOTS * RING_SLOT);
    ring_open(f.slots, SLOTS);
}
static __device__ __forceinline__ void feed_spans(feed &f, const span *spans, int n) {
    f.spans = spans, f.n = n, f.k = f.i0 = 0;
    for (int k = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP; k < n; k += WARPS)      // a scale a tile
        if (spans[k].dtype == DSPARK_FP8 && lane < spans[k].tiles) prefetch_line(scales_of(spans[k], lane));
    feed_span(f);
}
template <int NT> static __device__ __forceinline__ void feed_begin(feed &f, const span *spans, int n) {
    feed_spans(f, spans, n);
    for (int i = 0; i < SLOTS; i++) ask<NT>(f);
}
#ifdef BULK_COPIES
// When a warp's slots are taken and there is still time, its next units come to L2, one a microsecond.
template <int NT> static __device__ __forceinline__ void prefetch_next(feed f, const volatile int &turn) {
    for (int k = 0; k < 4 && f.tiles; k++) {
        for (int i = 0; i < 10 && !turn; i++) __nanosleep(100);
        if (turn) return;
        if (threadIdx.x % WARP == 0) prefetch_bulk(f.p, f.bytes);
        f.p += WARPS * f.bytes;
        if (!--f.units) feed_tile<NT>(f);
    }
}
// Until its turn a block has AHEAD units on their way, and what its last warp asks for: all at once fill L2's queues,
// and a load of the small kernel that runs now would wait 5 us. Warps ask one after the other, each unit when one AHEAD
// units before it has landed; the last warp waits for the turn and says so.
template <int NT> static __device__ __forceinline__ void ask_gently(feed &f) {
    __shared__ volatile int turn;
    enum { AHEAD = 4, OTHERS = WARPS - 1 };
    int warp = (int)threadIdx.x / WARP;
    shared_at first = f.slots - warp * SLOTS * RING_SLOT;
    if (threadIdx.x == 0) turn = 0;
    __syncthreads();
    for (int i = 0; i < SLOTS; i++) {
        int before = i * OTHERS + warp - AHEAD;
        shared_at slot = first + (before % OTHERS * SLOTS + before / OTHERS) * RING_SLOT;
        while (warp < OTHERS && before >= 0 && !turn && !ring_landed(slot, 0)) __nanosleep(40);
        __syncwarp();
        ask<NT>(f);
    }
    if (warp < OTHERS) prefetch_next<NT>(f, turn);
    grid_wait();
    if (warp == OTHERS) turn = 1;
}
#endif
// feed_begin, of a block's first spans, and grid_wait: asks for weights alone, as inputs may not be ready yet.
template <int NT> static __device__ __forceinline__ void feed_until_turn(feed &f, const span *spans, int n) {
#ifdef BULK_COPIES
    if constexpr (NT == 1) {
        feed_spans(f, spans, n), ask_gently<NT>(f);
        return;
    }
#endif
    feed_begin<NT>(f, spans, n);
    grid_wait();
}

template <int NT, int X>
static __device__ __forceinline__ void put_part(float *part, int width, int tile, float (*acc)[1][NT][4]) {
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float *to = part + (tile * WARPS + (int)threadIdx.x / WARP) * width * 17;
    for (int nt = 0; nt < NT; nt++)
        for (int i = 0; i < 4; i++) {
            int column = nt * 8 + 2 * t + (i & 1);
            float sum = acc[0][0][nt][i];
            for (int p = 1; p < X; p++) sum += acc[p][0][nt][i];
            if (column < width) to[column * 17 + g + 8 * (i >> 1)] = sum;
        }
}
// Output m of tile `tile` for row n of x: the warps' sums in order.
static __device__ __forceinline__ float total(const float *part, int width, int tile, int n, int m) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += part[((tile * WARPS + w) * width + n) * 17 + m];
    return sum;
}

// A span times the rows of x at `at`; the sums are in `part` after the next barrier.
template <int DTYPE, int NT, int X>
static __device__ __forceinline__ void tile_sums(const span &s, const operand &x, const int *at, feed &f,
                                                 float *part, int width) {
    enum { SUMS = weights_of<DTYPE>::SUMS };
    int units = s.pitch / UNIT;
    uint32_t from[NT], scale_at[NT][2];
    const uint16_t *planes[X];      // of x
    UNROLL
    for (int p = 0; p < X; p++) planes[p] = x.x + (size_t)p * x.plane;
    IN_GLOBAL(x.x);
    if (DTYPE >= DSPARK_FP8) IN_GLOBAL(x.scale);
    UNROLL
    for (int i = 0; i < NT * 2; i++) {
        from[i / 2] = (uint32_t)at[i / 2] + lane_eight<DTYPE>() * weights_of<DTYPE>::EIGHTS;
        if (DTYPE >= DSPARK_FP8)        // of the rows whose sums the lane has
            scale_at[i / 2][i % 2] = (uint32_t)__shfl_sync(ALL, at[i / 2], (int)threadIdx.x % 4 * 8 + i % 2 * 4) / 128;
    }
    for (int tile = 0; tile < s.tiles; tile++) {
        const uint8_t *scales = DTYPE == DSPARK_FP8 ? scales_of(s, tile) : NULL;
        if (DTYPE == DSPARK_FP8) IN_GLOBAL(scales);
        float acc[SUMS][1][NT][4];
        zero<SUMS * NT * 4>(&acc[0][0][0][0]);
        for (int unit = (int)threadIdx.x / WARP; unit < units; unit += WARPS) {
            piece q;
            take_piece<DTYPE>(q, await<NT>(f), DTYPE == DSPARK_FP8 ? scales[unit] : 0);
            multiply<DTYPE, 1, NT, X>(
                &q, from_memory<DTYPE>{ planes, x.scale, from, scale_at, (uint32_t)unit }, acc);
            __syncwarp();
            ask<NT>(f);
        }
        put_part<NT, SUMS>(part, width, tile, acc);
    }
}
template <int NT>
static __device__ __forceinline__ void tile_sums_of(const span &s, const operand &x, const int *at, feed &f,
                                                    float *part, int width) {
    switch (x.planes == 1 ? -s.dtype : s.dtype) {
    case -DSPARK_FP8: tile_sums<DSPARK_FP8, NT, 1>(s, x, at, f, part, width); break;
    case -DSPARK_FP4: tile_sums<DSPARK_FP4, NT, 1>(s, x, at, f, part, width); break;
    case DSPARK_FP8: tile_sums<DSPARK_FP8, NT, 2>(s, x, at, f, part, width); break;
    case DSPARK_FP4: tile_sums<DSPARK_FP4, NT, 2>(s, x, at, f, part, width); break;
    case DSPARK_F16: tile_sums<DSPARK_F16, NT, 3>(s, x, at, f, part, width); break;
    case DSPARK_F32: tile_sums<DSPARK_F32, NT, 3>(s, x, at, f, part, width); break;
    default: tile_sums<DSPARK_BF16, NT, 3>(s, x, at, f, part, width);
    }
}

static __device__ float sigmoid(float x) { return quotient(1, 1 + expf(-x)); }

// ---- the residual stream: mHC -----------------------------------------------------------------
// A block owns 32 dims of all four copies: it updates them (or embeds), takes the tap, and multiplies them by its part
// of the next mix's fn; a block of `mix` adds the sums in order. A warp has a row, or (stream_few) a block. Bound:
// bytes, 1.6 MB of fn and a row's copies, .13 MB twice: .6 us for one row, .8 for six; so latency.

enum { STREAM_AS_IS, STREAM_EMBED, STREAM_ADD };
enum { STREAM_FEW = 4 };            // rows, each with blocks of its own: all run at once
typedef struct {
    shape c;
    const counts *n;
    const row *rows;
    int from;                       // STREAM_*
    matrix embed;
    const float *y;                 // [rows][slots][h]: slots are summed in order, then go into every copy
    int slots;
    const float *post_comb;         // [rows][COPIES + COPIES * COPIES]
    float *stream;                  // [rows][COPIES][h]
    int tap, taps_at;               // tap number, -1: none; where the state's table has the taps
    const float *fn;                // [n_out][COPIES * h]; NULL: none
    int n_out;
    float *partial;                 // [rows][h / SLICE][WARP]: sums of fn z, the last of z^2
} stream_args;

// Lane i gets the sum of all lanes' v[i], by exchanging halves. Indices are constants, so v stays in registers.
template <int HALF> static __device__ __forceinline__ float scatter_sums(float *v) {
    int upper = (int)threadIdx.x & HALF;
    UNROLL
    for (int i = 0; i < HALF; i++) {
        float mine = upper ? v[i + HALF] : v[i], other = upper ? v[i] : v[i + HALF];
        v[i] = mine + __shfl_xor_sync(ALL, other, HALF);
    }
    return scatter_sums<HALF / 2>(v);
}
template <> __device__ __forceinline__ float scatter_sums<0>(float *v) { return v[0]; }

static __device__ __forceinline__ float plain_number(const matrix &w, int r, int i) {
    const void *p = w.data + stored_at(w.pitch, r, i * (w.dtype == DSPARK_F32 ? 4 : 2));
    if (w.dtype == DSPARK_F32) return *(const float *)p;
    uint32_t u = *(const uint16_t *)p;
    return w.dtype == DSPARK_F16 ? f16_value(u) : __uint_as_float(u << 16);
}

static __device__ void stream_tap(const stream_args &p, const row &s, int d, const float *z) {
    int n = p.c.ring;
    float mean = 0, *taps = (float *)(void *)s.state[p.taps_at];
    if (s.position < s.first_position + s.n - n) return;        // a later row of this pass takes its place
    for (int j = 0; j < COPIES; j++) mean = fmaf(1.0f / COPIES, z[j], mean);
    taps[(size_t)(s.position % n) * (size_t)(p.c.n_taps * p.c.h) + (size_t)(p.tap * p.c.h + d)] = mean;
}

// What precedes the update of dim d of row r: the copies z and, of its mix, post and comb.
enum { POST_COMB = COPIES + COPIES * COPIES };
static __device__ __forceinline__ void stream_old(const stream_args &p, int r, int d, float *z, float *by) {
    const float4 *from_mix = (const float4 *)(const void *)(p.post_comb + (size_t)r * POST_COMB);
    const float *copies = p.stream + (size_t)r * (size_t)(COPIES * p.c.h) + (size_t)d;
    UNROLL
    for (int j = 0; j < COPIES; j++) z[j] = copies[(size_t)j * (size_t)p.c.h];
    UNROLL
    for (int i = 0; i < POST_COMB / 4; i++) {
        float4 four = from_mix[i];
        by[4 * i] = four.x, by[4 * i + 1] = four.y, by[4 * i + 2] = four.z, by[4 * i + 3] = four.w;
    }
}
// copy_k = post_k y + sum_j comb_jk copy_j
static __device__ void stream_mix(const stream_args &p, int r, int d, float *z, const float *by) {
    float y = 0, old[COPIES];
    for (int base = 0; base < p.slots; base += 8) {
        const float *from = p.y + ((size_t)r * (size_t)p.slots + (size_t)base) * (size_t)p.c.h + (size_t)d;
        float some[8];
        UNROLL
        for (int i = 0; i < 8; i++) some[i] = __ldcg(from + (size_t)least(i, p.slots - 1 - base) * (size_t)p.c.h);
        UNROLL
        for (int i = 0; i < 8; i++) y += base + i < p.slots ? some[i] : 0;
    }
    for (int k = 0; k < COPIES; k++) old[k] = z[k];
    for (int k = 0; k < COPIES; k++) {
        z[k] = by[k] * y;
        for (int j = 0; j < COPIES; j++) z[k] = fmaf(by[COPIES + j * COPIES + k], old[j], z[k]);
    }
}

// A slice's part of a mix's matrix.
typedef float stream_fn[MIX][COPIES][SLICE];
static __device__ void load_fn(const stream_args &p, int slice, stream_fn fn) {
    for (int i = (int)threadIdx.x; p.fn && i < p.n_out * COPIES * SLICE; i += THREADS)
        fn[i / SLICE / COPIES][i / SLICE % COPIES][i % SLICE] =
            p.fn[(size_t)(i / SLICE) * (size_t)p.c.h + (size_t)(slice * SLICE + i % SLICE)];
}
// Dim d of row r's copies, updated: z.
static __device__ __forceinline__ void stream_update(const stream_args &p, int r, int d, float *z, const float *by) {
    float embedded = p.from == STREAM_EMBED ? plain_number(p.embed, p.rows[r].id, d) : 0;
    for (int j = 0; p.from == STREAM_EMBED && j < COPIES; j++) z[j] = embedded;
    if (p.from == STREAM_ADD) stream_mix(p, r, d, z, by);
}
static __device__ __forceinline__ void stream_keep(const stream_args &p, int r, int d, const float *z) {
    float *copies = p.stream + (size_t)r * (size_t)(COPIES * p.c.h) + (size_t)d;
    for (int j = 0; p.from && j < COPIES; j++) copies[(size_t)j * (size_t)p.c.h] = z[j];
    if (p.tap >= 0) stream_tap(p, p.rows[r], d, z);
}
// A lane's part of output o of a mix; the last is the sum of squares.
static __device__ __forceinline__ float stream_output(const stream_args &p, const stream_fn fn, int o, const float *z) {
    float v = 0;
    int lane = (int)threadIdx.x % WARP;
    for (int j = 0; o < p.n_out && j < COPIES; j++) v = fmaf(fn[o][j][lane], z[j], v);
    for (int j = 0; o == WARP - 1 && j < COPIES; j++) v = fmaf(z[j], z[j], v);
    return v;
}
// ROWS of n rows, from r on; reads fn once.
template <int ROWS>
static __device__ __forceinline__ void stream_rows(const stream_args &p, int slice, int r, int n, const stream_fn fn) {
    int lane = (int)threadIdx.x % WARP;
    float z[ROWS][COPIES], v[ROWS][WARP], by[POST_COMB];
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        zero<COPIES>(z[i]);
        if (r + i >= n) continue;
        stream_old(p, r + i, slice * SLICE + lane, z[i], by);
        stream_update(p, r + i, slice * SLICE + lane, z[i], by);
        stream_keep(p, r + i, slice * SLICE + lane, z[i]);
    }
    if (!p.fn) return;
    UNROLL
    for (int o = 0; o < WARP; o++) {
        for (int i = 0; i < ROWS; i++) v[i][o] = 0;
        for (int j = 0; o < MIX && o < p.n_out && j < COPIES; j++) {
            float w = fn[o][j][lane];
            for (int i = 0; i < ROWS; i++) v[i][o] = fmaf(w, z[i][j], v[i][o]);
        }
        for (int i = 0; o == WARP - 1 && i < ROWS; i++)
            for (int j = 0; j < COPIES; j++) v[i][o] = fmaf(z[i][j], z[i][j], v[i][o]);
    }
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        float sum = scatter_sums<WARP / 2>(v[i]);
        size_t to = (size_t)(r + i) * (size_t)(p.c.h / SLICE) + (size_t)slice;
        if (r + i < n) p.partial[to * WARP + (size_t)lane] = sum;
    }
}
template <int ROWS> static __global__ void __launch_bounds__(THREADS) stream(const stream_args p) {
    __shared__ stream_fn fn;
    int slice = (int)blockIdx.x, n;
    grid_go();
    load_fn(p, slice, fn);
    n = p.n->n_rows;
    grid_wait();
    __syncthreads();
    for (int r = (int)(blockIdx.y * WARPS + threadIdx.x / WARP) * ROWS; r < n; r += (int)gridDim.y * WARPS * ROWS)
        stream_rows<ROWS>(p, slice, r, n, fn);
}

// For few rows: a block has one row of a slice, each warp four of its outputs, in the same order of sums. What an
// update adds to is from before `attend` or `experts`, so it is there before the wait.
static __global__ void __launch_bounds__(THREADS) stream_few(const stream_args p) {
    __shared__ stream_fn fn;
    enum { EACH = WARP / WARPS };
    int slice = (int)blockIdx.x, r = (int)blockIdx.y, lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, n;
    float z[COPIES], by[POST_COMB], v[EACH];
    grid_go();
    params_near(p);
    load_fn(p, slice, fn);
    n = p.n->n_rows;
    if (p.from == STREAM_ADD) stream_old(p, r, slice * SLICE + lane, z, by);
    grid_wait();
    __syncthreads();
    if (r >= n) return;
    if (p.from != STREAM_ADD) stream_old(p, r, slice * SLICE + lane, z, by);
    stream_update(p, r, slice * SLICE + lane, z, by);
    __syncthreads();        // all have read the old copies
    if (warp == 0) stream_keep(p, r, slice * SLICE + lane, z);
    if (!p.fn) return;
    UNROLL
    for (int k = 0; k < EACH; k++) v[k] = warp_sum(stream_output(p, fn, warp * EACH + k, z));
    UNROLL
    for (int k = 0; k < EACH; k++)
        if (lane == k)
            p.partial[((size_t)r * (size_t)(p.c.h / SLICE) + (size_t)slice) * WARP + (size_t)(warp * EACH + k)] = v[k];
}

// Adds up a mix's sums, then x = sum_j pre_j copy_j, normed, in both forms. A block a row; of few rows up to eight,
// which do all the same but for the forms, a part each. post_comb does post and comb. Bound: latency, 80 KB a row
// through one SM (1 us), two barriers.
typedef struct {
    shape c;
    const int *n;
    const int *list;                // rows; NULL: all
    const float *partial, *stream, *scale, *base, *norm;
    float *mixes;                   // [rows][MIX], for post_comb; NULL: a head, which has none
    float *hidden;                  // [rows][h] before the norm, or NULL
    input x;
} mix_args;

enum { MIX_THREADS = 1024 };        // eight dims each: h up to 8192, and a warp has eight slices
static __global__ void __launch_bounds__(MIX_THREADS) mix(const mix_args p) {
    __shared__ float part[MIX_THREADS / WARP][WARP], m[WARP], scratch[MIX_THREADS / WARP];
    int i = (int)blockIdx.x, lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, h = p.c.h, r,
        at = 8 * (int)threadIdx.x, live = at < h, n;
    float sum = 0, squares = 0, x[8], by[8], scale;
    grid_go();
    params_near(p);
    n = *p.n, r = p.list ? p.list[i] : i;
    for (int k = 0; k < 8; k++) by[k] = 0;
    if (live) load8(by, p.norm + at);
    float pre_scale = p.scale[0], pre_base = lane < COPIES ? p.base[lane] : 0;
    grid_wait();
    if (i >= n) return;
    const float *z = p.stream + (size_t)r * (size_t)(COPIES * h) + (size_t)at;
    float copies[COPIES][8];
    for (int k = 0; k < 8; k++) copies[0][k] = copies[1][k] = copies[2][k] = copies[3][k] = 0;
    UNROLL
    for (int j = 0; live && j < COPIES; j++) load8(copies[j], z + (size_t)j * (size_t)h);
    UNROLL
    for (int k = 0; k < 8; k++) {
        int slice = warp + k * (int)(blockDim.x / WARP);
        if (slice < h / SLICE)
            sum += p.partial[((size_t)r * (size_t)(h / SLICE) + (size_t)slice) * WARP + (size_t)lane];
    }
    part[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
        float total = 0, square;
        UNROLL_BY(8)
        for (int w = 0; w < (int)(blockDim.x / WARP); w++) total += part[w][lane];
        square = __shfl_sync(ALL, total, WARP - 1);
        total *= inverse_rms(square, COPIES * h, p.c.eps);
        m[lane] = lane < COPIES ? sigmoid(total * pre_scale + pre_base) + p.c.hc_eps : 0;
        if (p.mixes && lane < MIX && !blockIdx.y) p.mixes[(size_t)r * MIX + (size_t)lane] = total;
    }
    __syncthreads();
    UNROLL
    for (int k = 0; k < 8; k++) {
        x[k] = 0;
        for (int j = 0; j < COPIES; j++) x[k] = fmaf(m[j], copies[j][k], x[k]);
    }
    for (int k = 0; k < 8; k++) {
        if (live && p.hidden && !blockIdx.y) p.hidden[(size_t)i * (size_t)h + (size_t)(at + k)] = x[k];
        squares = fmaf(x[k], x[k], squares);
    }
    scale = inverse_rms(block_sum(squares, scratch), h, p.c.eps);
    if (gridDim.y > 1 && at / (h / (int)gridDim.y) != (int)blockIdx.y) return;
    for (int k = 0; k < 8; k++) x[k] = x[k] * scale * by[k];
    put_input(p.x, i, at, x, live);
}

// What only the end of a mix's sub-layer needs: post = 2 sigmoid, comb by Sinkhorn. Of a warp's first 16 lanes, lane 4
// j + k has comb_jk.
typedef struct {
    const float *mixes, *scale, *base;      // [rows][MIX]
    float *out;                             // [rows][COPIES + COPIES * COPIES]
    float eps;
    int iters;
} post_comb_args;
static __device__ void post_comb(const post_comb_args &p, int r) {
    int lane = (int)threadIdx.x % WARP, jk = lane % (COPIES * COPIES);
    const float *m = p.mixes + (size_t)r * MIX;
    float e, a, s, *out = p.out + (size_t)r * (COPIES + COPIES * COPIES);
    if (lane < COPIES) out[lane] = 2 * sigmoid(m[COPIES + lane] * p.scale[1] + p.base[COPIES + lane]);
    a = m[2 * COPIES + jk] * p.scale[2] + p.base[2 * COPIES + jk];
    e = fmaxf(a, __shfl_xor_sync(ALL, a, 1));
    e = fmaxf(e, __shfl_xor_sync(ALL, e, 2));
    a = expf(a - e);
    for (int i = 0; i < p.iters; i++) {
        s = a + __shfl_xor_sync(ALL, a, 1);         // over k
        s += __shfl_xor_sync(ALL, s, 2);
        a = i ? quotient(a, s + p.eps) : quotient(a, s) + p.eps;
        s = a + __shfl_xor_sync(ALL, a, 4);         // over j
        s += __shfl_xor_sync(ALL, s, 8);
        a = quotient(a, s + p.eps);
    }
    if (lane < COPIES * COPIES) out[COPIES + lane] = a;
}

// ---- after the first products of an attention -------------------------------------------------

// RoPE of x [d] in shared memory: its last R dims, adjacent pairs as complex numbers. To turn back, negate s.
static __device__ __forceinline__ void rope_pair(float &x, float &y, float c, float s) {
    float a = x * c - y * s, b = x * s + y * c;
    x = a, y = b;
}
static __device__ void rope_row(float *x, int d, int R, const double *freqs, int position) {
    for (int i = (int)threadIdx.x; i < R / 2; i += THREADS) {
        double s, c;
        sincos(position * freqs[i], &s, &c);
        rope_pair(x[d - R + 2 * i], x[d - R + 2 * i + 1], (float)c, (float)s);
    }
    __syncthreads();
}
// The first n dims of x in shared memory to FP8 in blocks of 64: back into x, or as codes and scales.
static __device__ void round_row(float *x, int n, uint8_t *codes, uint8_t *scales) {
    for (int at = 0; at < n; at += THREADS * 8) {
        int mine = at + (int)threadIdx.x * 8, live = mine < n;
        int e = fp8_exponent(group_max(live ? largest_of(x + mine) : 0, 8));
        for (int i = mine; live && i < mine + 8; i++) {
            float a = nearest_e4m3(x[i] * exp2i(-e));
            if (codes) codes[i] = (uint8_t)e4m3_code(a);
            else x[i] = a * exp2i(e);
        }
        if (live && codes && mine % 64 == 0) scales[mine / 64] = (uint8_t)(e + 127);
    }
    __syncthreads();
}
// Hadamard over 32 N dims (a lane has dims lane, lane + 32, ..), then E2M1 in blocks of 32: values, 4-bit codes,
// exponents.
template <int N> static __device__ __forceinline__ void hadamard_fp4(float *v, uint32_t *codes, int *exponents) {
    int lane = (int)threadIdx.x % WARP;
    float scale = 1 / sqrtf((float)(N * WARP));
    UNROLL
    for (int half = 1; half < WARP; half *= 2)
        UNROLL
        for (int i = 0; i < N; i++) {
            float other = __shfl_xor_sync(ALL, v[i], half);
            v[i] = lane & half ? other - v[i] : v[i] + other;
        }
    UNROLL
    for (int half = 1; half < N; half *= 2)
        UNROLL
        for (int i = 0; i < N; i++)
            if (!(i & half)) {
                float a = v[i], b = v[i + half];
                v[i] = a + b, v[i + half] = a - b;
            }
    UNROLL
    for (int i = 0; i < N; i++) {
        float x = v[i] * scale, a;
        int e;
        if (!(x == x)) x = 0;
        e = exponents[i] = fp4_exponent(group_max(fabsf(x), WARP));
        a = nearest(x * exp2i(-e), 6, 1, 1);
        codes[i] = (a < 1 ? (uint32_t)(a * 2) : (__float_as_uint(a) >> 22) - 252) | (__float_as_uint(x) >> 28 & 8);
        v[i] = signed_as(a, x) * exp2i(e);
    }
}
// f<N>, for the N of an index of 32 N dims.
#define FOR_INDEX_DIM(I, f, ...) \
    switch ((I) / WARP) { \
    case 1: f<1>(__VA_ARGS__); break; \
    case 2: f<2>(__VA_ARGS__); break; \
    case 4: f<4>(__VA_ARGS__); break; \
    default: f<MAX_INDEX_DIM / WARP>(__VA_ARGS__); \
    }

typedef struct {
    const float *ape, *norm;        // [ratio][w], [d]
    float *kv, *gate;               // [rows][w] of this pass
    int d, w, state_kv, state_gate; // which arrays of the state hold those before it
} pooling;
typedef struct {
    shape c;
    const counts *n;
    const row *rows;
    const float2 *turns;
    int set;                        // of this layer
    const double *freqs_compressed;
    const float *kv_norm;
    float *kv;                      // [rows][D], finished in place
    int ratio, layer;
    pooling pool[2];                // the compressor; the index compressor
} kv_args;

// Row i of a compressor into x [d] in shared memory: its tokens pooled by their gates' softmax, normed, rotated. At
// ratio 4 the group before gives its rows' first halves, this one their second.
static __device__ void pool_row(const kv_args &p, const pooling &o, const row &s, int i, float *x,
                                float *scratch) {
    enum { AT_ONCE = 8 };       // tokens
    int r = p.ratio, overlap = r == 4, ring = raw_ring(r, p.c.block), first = most(0, (overlap ? i - 1 : i) * r);
    const float *ring_kv = (const float *)(const void *)s.state[p.layer * N_ARRAYS + o.state_kv];
    const float *ring_gate = (const float *)(const void *)s.state[p.layer * N_ARRAYS + o.state_gate];
    for (int d = (int)threadIdx.x; d < o.d; d += THREADS) {
        float largest = -HUGE_VALF, sum = 0, out = 0;
        for (int t0 = first; t0 < (i + 1) * r; t0 += AT_ONCE) {
            float g[AT_ONCE], v[AT_ONCE], m = largest, factor;
            UNROLL
            for (int k = 0; k < AT_ONCE; k++) {
                int t = t0 + k, old = t < s.first_position, at = d + (overlap && t >= i * r ? o.d : 0);
                size_t from = (size_t)(old ? t % ring : s.first + t - s.first_position) * (size_t)o.w + (size_t)at;
                g[k] = -HUGE_VALF, v[k] = 0;
                if (t >= (i + 1) * r) continue;
                g[k] = __ldcg((old ? ring_gate : o.gate) + from) + o.ape[(size_t)(t % r) * (size_t)o.w + (size_t)at];
                v[k] = __ldcg((old ? ring_kv : o.kv) + from);
            }
            UNROLL
            for (int k = 0; k < AT_ONCE; k++) m = fmaxf(m, g[k]);
            factor = expf(largest - m), sum *= factor, out *= factor, largest = m;
            UNROLL
            for (int k = 0; k < AT_ONCE; k++) {
                float e = expf(g[k] - m);
                sum += e, out = fmaf(e, v[k], out);
            }
        }
        x[d] = quotient(out, sum);
    }
    __syncthreads();
    norm_row(x, o.norm, o.d, p.c.eps, scratch);
    rope_row(x, o.d, p.c.R, p.freqs_compressed, i * r);
}
// Index key i from x, by a warp.
template <int N>
static __device__ __forceinline__ void put_index_key(const float *x, size_t i, uint8_t *to, uint8_t *scales) {
    int lane = (int)threadIdx.x % WARP, e[N];
    float v[N];
    uint32_t codes[N];
    UNROLL
    for (int k = 0; k < N; k++) v[k] = x[k * WARP + lane];
    hadamard_fp4<N>(v, codes, e);
    UNROLL
    for (int k = 0; k < N; k++) {
        uint32_t other = (uint32_t)__shfl_xor_sync(ALL, (int)codes[k], 1);
        if (lane % 2 == 0) to[(i * N + (size_t)k) * (WARP / 2) + (size_t)(lane / 2)] = (uint8_t)(codes[k] | other << 4);
        if (lane == 0) scales[i * N + (size_t)k] = (uint8_t)(e[k] + 127);
    }
}
// If row s completes a group: its compressed row (which 0), or its index key (1).
static __device__ void compress(const kv_args &p, const row &s, int which, float *x, float *scratch) {
    const pooling &o = p.pool[which];
    uint8_t *const *state = s.state + p.layer * N_ARRAYS;
    int D = p.c.D, R = p.c.R;
    size_t i = (size_t)(s.position / p.ratio);
    if ((s.position + 1) % p.ratio || s.keep_rows) return;
    pool_row(p, o, s, (int)i, x, scratch);
    if (!which) {
        round_row(x, D - R, state[ROW_CODES] + i * (size_t)(D - R),
                  state[ROW_SCALES] + i * (size_t)((D - R + 63) / 64));
        for (int k = (int)threadIdx.x; k < R; k += THREADS)
            ((float *)(void *)state[ROPE])[i * (size_t)R + (size_t)k] = x[D - R + k];
    } else if (threadIdx.x < WARP) {
        FOR_INDEX_DIM(p.c.I, put_index_key, x, i, state[KEY_CODES], state[KEY_SCALES])
    }
}

// The window's row, in place: normed, rotated, rounded. A warp a row; a lane has eight dims of every 256.
static __device__ void window_row(const kv_args &p, int r) {
    enum { EACH = MAX_HEAD_DIM / 8 / WARP };
    int D = p.c.D, R = p.c.R, first = (int)threadIdx.x % WARP * 8;
    const float2 *turns = p.turns + (2 * r + p.set) * (R / 2);
    float *kv = p.kv + (size_t)r * (size_t)D, v[EACH][8], sum = 0, scale;
    UNROLL
    for (int i = 0; i < EACH; i++) {
        int at = first + i * WARP * 8;
        for (int k = 0; k < 8; k++) v[i][k] = 0;
        if (at < D) load8_fresh(v[i], kv + at);
        for (int k = 0; k < 8; k++) sum = fmaf(v[i][k], v[i][k], sum);
    }
    scale = inverse_rms(warp_sum(sum), D, p.c.eps);
    UNROLL
    for (int i = 0; i < EACH; i++) {
        int at = first + i * WARP * 8, plain = at < D - R, live = at < D, e;
        for (int k = 0; live && k < 8; k++) v[i][k] = v[i][k] * scale * p.kv_norm[at + k];
        for (int k = 0; live && !plain && k < 8; k += 2) {
            float2 turn = turns[(at - (D - R) + k) / 2];
            rope_pair(v[i][k], v[i][k + 1], turn.x, turn.y);
        }
        e = fp8_exponent(group_max(plain ? largest_of(v[i]) : 0, 8));
        for (int k = 0; live && k < 8; k++)
            kv[at + k] = plain ? nearest_e4m3(v[i][k] * exp2i(-e)) * exp2i(e) : v[i][k];
    }
}

// A block's task. 0: eight rows of the window; 1, 2: a compressor's result for one row. bytes: D or I floats.
static __device__ __forceinline__ void kv_task(const kv_args &p, int block, int task, int n, char *bytes,
                                                    float *scratch) {
    int r = task ? block : block * WARPS + (int)threadIdx.x / WARP;
    if (r >= n) return;
    if (!task) window_row(p, r);
    else compress(p, p.rows[r], task - 1, (float *)(void *)bytes, scratch);
}
// For many rows; with fewer run_beside does it in the next product. Bound: latency; a compressor's group is 8
// rows of 4 KB or 128 of 2 KB, twice: .5 MB where it completes (.2 us).
static __global__ void __launch_bounds__(THREADS) kv_rows(const kv_args p) {
    __shared__ float scratch[WARPS];
    SHARED_BYTES(bytes);
    int n;
    grid_go();
    n = p.n->n_rows;
    grid_wait();
    kv_task(p, (int)blockIdx.x, (int)blockIdx.y, n, bytes, scratch);
}

// ---- the indexer ------------------------------------------------------------------------------

typedef struct {
    shape c;
    const counts *n;
    const row *rows;
    int row0;                       // rows row0 .. row0 + INDEX_ROWS - 1; buffers start with row0
    int layer;
    const float2 *turns;
    const float *index_q, *index_w; // [rows][index_heads * I], [rows][index_heads]
    uint16_t *q;                    // [INDEX_ROWS][heads / 8][I / 32][lane][8]: bf16, as index_scores takes them
    float *w;                       // [INDEX_ROWS][heads to whole eights]
    float *scores;                  // [INDEX_ROWS][n_scores]
    size_t n_scores;
    int *arrived;                   // [INDEX_ROWS], zeros between kernels: blocks that are done with a row
    int *chosen;                    // [INDEX_ROWS][index_topk]
} index_args;

static __device__ __forceinline__ int keys_of(const row &s) { return (s.position + 1) / 4; }
static __host__ __device__ __forceinline__ int eights(int n) { return (n + 7) / 8 * 8; }

// RoPE, Hadamard, FP4 of row row0 + i, head h, by a warp, for index_scores: there lane 4 (h % 8) + t takes the t-th
// quarter of the dims, of eight in order 0 4 1 5 .. Heads that pad the matrix to eights stay zeros.
template <int N> static __device__ __forceinline__ void query_head(const index_args &p, int i, int h) {
    int H = p.c.index_heads, lane = (int)threadIdx.x % WARP, r = p.row0 + i, e[N];
    float v[N];
    float2 turn[N];
    uint32_t codes[N];
    const float *q = p.index_q + ((size_t)r * (size_t)H + (size_t)h) * (size_t)(N * WARP) + (size_t)lane;
    uint16_t *to = p.q + (size_t)i * (size_t)(eights(H) * N * WARP);
    UNROLL
    for (int k = 0; k < N; k++) {
        int at = k * WARP + lane - (N * WARP - p.c.R);
        v[k] = q[k * WARP];
        turn[k] = at >= 0 ? turn_of(p.turns, p.c.R / 2, r, TURNS_COMPRESSED, at / 2) : make_float2(1, 0);
    }
    UNROLL
    for (int k = 0; k < N; k++) {
        int at = k * WARP + lane - (N * WARP - p.c.R);
        float other = __shfl_xor_sync(ALL, v[k], 1);
        if (at >= 0) v[k] = at % 2 ? other * turn[k].y + v[k] * turn[k].x : v[k] * turn[k].x - other * turn[k].y;
    }
    hadamard_fp4<N>(v, codes, e);
    UNROLL
    for (int k = 0; k < N; k++) {
        int d = k * WARP + lane, place = ((h / 8 * N + d / 8 % N) * WARP + h % 8 * 4 + d / 8 / N) * 8;
        to[place + ((d & 3) << 1 | (d >> 2 & 1))] = (uint16_t)bf16x2(v[k], 0);
    }
    if (lane == 0)
        p.w[(size_t)i * (size_t)eights(H) + (size_t)h] =
            p.index_w[(size_t)r * (size_t)H + (size_t)h] * (inverse_root((float)(N * WARP)) * inverse_root((float)H));
}
// Bound: latency, 32 KB a row.
static __global__ void __launch_bounds__(THREADS) index_query(const index_args p) {
    int h = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), i = (int)blockIdx.y, n;
    grid_go();
    params_near(p);
    n = keys_of(p.rows[p.row0 + i]) > p.c.index_topk ? p.n->n_rows : 0;     // else no row is left out
    grid_wait();
    if (p.row0 + i < n && h < p.c.index_heads) {
        FOR_INDEX_DIM(p.c.I, query_head, p, i, h)
    }
}

// A float's bits as an integer of the same order.
static __device__ __forceinline__ uint32_t ordered(float x) {
    uint32_t u = __float_as_uint(x == 0 ? 0.0f : x);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// Score j of a row as such an integer; the first NEAR are in shared memory.
enum { NEAR = 4096 };
static __device__ __forceinline__ uint32_t score_at(const uint32_t *cached, const float *scores, int j) {
    return j < NEAR ? cached[j] : ordered(__ldcg(scores + j));
}
// By a warp: the digit of which the missing-th largest is, and how many of that digit are still missing.
static __device__ __forceinline__ void find_digit(const int *histogram, int missing, int *digit, int *left) {
    int lane = (int)threadIdx.x, first = 255 - 8 * lane, mine = 0, above, count[8];     // digits `first` and down
    UNROLL
    for (int j = 0; j < 8; j++) mine += count[j] = histogram[first - j];
    above = mine;
    for (int j = 1; j < WARP; j *= 2) {
        int other = __shfl_up_sync(ALL, above, j);
        if (lane >= j) above += other;
    }
    above -= mine;
    if (above < missing && above + mine >= missing) {
        int at = first, more = missing - above, found = 0;
        UNROLL
        for (int j = 0; j < 8; j++) {
            found |= count[j] >= more;
            if (!found) more -= count[j], at--;
        }
        *digit = at, *left = more;
    }
}
// The k-th largest of n scores, digit by digit, by counting; *missing: how many equal to it are among the k.
static __device__ __forceinline__ uint32_t kth_score(const uint32_t *cached, const float *scores, int n, int k,
                                                     int *missing) {
    __shared__ int histogram[256], digit, left;
    uint32_t kth = 0;
    *missing = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int j = (int)threadIdx.x; j < n; j += THREADS) {
            uint32_t u = score_at(cached, scores, j);
            if (shift == 24 || (u ^ kth) >> (shift + 8) == 0) atomicAdd(&histogram[u >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x < WARP) find_digit(histogram, *missing, &digit, &left);
        __syncthreads();
        kth |= (uint32_t)digit << shift, *missing = left;
    }
    return kth;
}
// The k largest of a row's scores, ascending by index: those above the k-th, and the first of those equal to it.
static __device__ void index_top(const index_args &p, int i, int n) {
    enum { EACH = 4 };
    __shared__ uint32_t cached[NEAR];
    int k = p.c.index_topk, missing, n_above = 0, n_equal = 0;
    const float *scores = p.scores + (size_t)i * p.n_scores;
    UNROLL_BY(4)
    for (int j = (int)threadIdx.x; j < least(n, NEAR); j += THREADS) cached[j] = ordered(__ldcg(scores + j));
    const uint32_t kth = kth_score(cached, scores, n, k, &missing);
    for (int j0 = 0; j0 < n; j0 += THREADS * EACH) {
        int first = j0 + (int)threadIdx.x * EACH, mine = 0, before, all, a, b;      // two counts a number: above, equal
        uint32_t u[EACH];
        UNROLL
        for (int e = 0; e < EACH; e++) {
            u[e] = first + e < n ? score_at(cached, scores, first + e) : 0;
            mine += first + e < n ? (u[e] > kth) << 16 | (u[e] == kth) : 0;
        }
        before = block_before(mine, &all), a = n_above + (before >> 16), b = n_equal + (before & 0xffff);
        UNROLL
        for (int e = 0; e < EACH; e++) {
            int above = first + e < n && u[e] > kth, same = first + e < n && u[e] == kth;
            if (above || (same && b < missing))
                p.chosen[(size_t)i * (size_t)k + (size_t)(a + least(b, missing))] = first + e;
            a += above, b += same;
        }
        n_above += all >> 16, n_equal += all & 0xffff;
    }
}

// Eight FP4 codes of a key, low nibble first, to bf16 pairs (0, 4), (1, 5), (2, 6), (3, 7) with their scale, 2^-16 of
// the value: room for scales. e e m become the exponent's low bits and the mantissa's first, 2^-126 of the value.
enum { KEY_SHIFT = 16 };
static __device__ __forceinline__ void decode_key_codes(uint32_t codes, uint32_t scale, uint32_t *a) {
    uint32_t e = scale + 126 - KEY_SHIFT, factor = e << 7 | e << 23;        // 2^(e - 127) in both halves
    for (int i = 0; i < 4; i++) {
        uint32_t w = codes >> 4 * i;
        a[i] = mul_bf16x2((w & 0x00070007u) << 6 | (w & 0x00080008u) << 12, factor);
    }
}

// A row's queries, as they are stored; then the heads' weights.
static __host__ __device__ size_t query_bytes(int heads, int I) {
    return (size_t)eights(heads) * ((size_t)I * sizeof(uint16_t) + sizeof(float));
}
static __device__ void load_query(const index_args &p, int i, uint4 *query, float *weights) {
    int H = eights(p.c.index_heads), n = H * p.c.I / 8;
    const uint4 *from = (const uint4 *)(const void *)p.q + (size_t)i * (size_t)n;
    UNROLL_BY(4)
    for (int k = (int)threadIdx.x; k < n; k += THREADS) query[k] = from[k];
    UNROLL_BY(1)
    for (int h = (int)threadIdx.x; h < H; h += THREADS) weights[h] = p.w[(size_t)i * (size_t)H + (size_t)h];
    __syncthreads();
}
// A lane's part of keys m0 + g and m0 + g + 8, the last of n in place of those missing: all are loaded before any is
// decoded.
typedef struct { uint32_t codes[2][MAX_INDEX_DIM / 32]; uint8_t scales[2][MAX_INDEX_DIM / 128]; } index_keys;
static __device__ __forceinline__ void ask_index_keys(const uint8_t *codes, const uint8_t *scales, int I, int m0, int n,
                                                      index_keys &a) {
    int g = (int)threadIdx.x % WARP / 4, t = (int)threadIdx.x % 4, each = I / 32;
    UNROLL
    for (int half = 0; half < 2; half++) {
        size_t key = (size_t)least(m0 + g + 8 * half, n - 1);
        const uint32_t *from = (const uint32_t *)(const void *)(codes + key * (size_t)(I / 2)) + t * each;
        UNROLL
        for (int e = 0; e < MAX_INDEX_DIM / 32; e++) a.codes[half][e] = e < each ? from[e] : 0;
        UNROLL
        for (int e = 0; e < MAX_INDEX_DIM / 128; e++)
            a.scales[half][e] = 4 * e < each ? scales[key * (size_t)each + (size_t)((t * each + 4 * e) / 4)] : 0;
    }
}

// sum_h relu(q_h . key) w_h: a warp takes 16 keys as the M side, heads by eights; the last block of a row chooses.
// Bound: at 1,024 keys (4,096 tokens) latency: .07 MB a row; at 262,144 keys bytes, 18 MB (6 us) for one row, and
// products for six: 26 GFLOP, 43 us at 600 TFLOP/s.
static __global__ void __launch_bounds__(THREADS) index_scores(const index_args p) {
    SHARED_BYTES(bytes);
    int I = p.c.I, H = eights(p.c.index_heads), lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4,
        each = I / 32;
    int i = (int)blockIdx.y, r = p.row0 + i, n, first = (int)blockIdx.x * TILE;
    uint4 *query = (uint4 *)(void *)bytes;
    float *weights = (float *)(void *)(query + H * I / 8);
    grid_go();
    params_near(p);
    const row s = p.rows[r];
    n = r < p.n->n_rows ? keys_of(s) : 0;
    if (n <= p.c.index_topk || first >= n) return grid_wait();
    const uint8_t *codes = s.state[p.layer * N_ARRAYS + KEY_CODES], *scales = s.state[p.layer * N_ARRAYS + KEY_SCALES];
    int m0 = (int)(threadIdx.x / WARP * gridDim.x) * TILE + first, next = (int)gridDim.x * WARPS * TILE;
    index_keys keys;
    IN_GLOBAL(codes);
    IN_GLOBAL(scales);
    grid_wait();
    ask_index_keys(codes, scales, I, m0, n, keys);
    load_query(p, i, query, weights);
    for (; m0 < n; m0 += next) {
        uint32_t a[2][MAX_INDEX_DIM / 32][4];
        float sum[2] = { 0, 0 };
        UNROLL
        for (int half = 0; half < 2; half++)
            UNROLL
            for (int e = 0; e < MAX_INDEX_DIM / 32; e++)
                if (e < each) decode_key_codes(keys.codes[half][e], keys.scales[half][e / 4], a[half][e]);
        if (m0 + next < n) ask_index_keys(codes, scales, I, m0 + next, n, keys);
        for (int h = 0; h < H; h += 8) {
            float acc[4] = { 0, 0, 0, 0 };
            const float *w = weights + h + 2 * t;
            UNROLL
            for (int e = 0; e < MAX_INDEX_DIM / 32; e++)
                if (e < each) {
                    const uint4 b = query[(h / 8 * each + e) * WARP + lane];
                    mma(acc, a[0][e][0], a[1][e][0], a[0][e][1], a[1][e][1], b.x, b.y);
                    mma(acc, a[0][e][2], a[1][e][2], a[0][e][3], a[1][e][3], b.z, b.w);
                }
            UNROLL
            for (int k = 0; k < 4; k++) sum[k / 2] = fmaf(fmaxf(acc[k], 0), w[k % 2], sum[k / 2]);
        }
        UNROLL
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(ALL, sum[half], 1);
            sum[half] += __shfl_xor_sync(ALL, sum[half], 2);
            if (t == half && m0 + g + 8 * half < n)
                p.scores[(size_t)i * p.n_scores + (size_t)(m0 + g + 8 * half)] = sum[half] * exp2i(KEY_SHIFT);
        }
    }
    if (last_block(&p.arrived[i], least((int)gridDim.x, blocks_of(n, TILE)))) index_top(p, i, n);
}

// ---- attention --------------------------------------------------------------------------------

// Writes a row of this pass to the rings, once nothing reads what it replaces; skips rows that a later one replaces.
typedef struct {
    const row *rows;
    int layer, ratio, arrays;
    const float *from[N_ARRAYS];
    int width[N_ARRAYS];
} commit_args;
static __device__ void commit(const shape &c, const commit_args &p, int r, int a) {
    const row &s = p.rows[r];
    int ring = a == WINDOW ? c.ring : raw_ring(p.ratio, c.block), w = p.width[a];
    if (!p.from[a] || s.position < s.first_position + s.n - ring) return;
    float *to = (float *)(void *)s.state[p.layer * N_ARRAYS + a] + (size_t)(s.position % ring) * (size_t)w;
    UNROLL_BY(4)
    for (int i = (int)threadIdx.x; i < w; i += THREADS) to[i] = p.from[a][(size_t)r * (size_t)w + (size_t)i];
}

typedef struct {
    shape c;
    const counts *n;
    const row *rows;
    int row0, layer, ratio, set;
    const float2 *turns;
    const float *q, *kv, *sink;     // [rows][H * D], [rows][D] of this pass, [H]
    const int *chosen;              // [INDEX_ROWS][index_topk]
    float *part;    // [ATTEND_ROWS][SPLITS][H][D + 4]: weighted sum, largest score, sum of weights
    input o;                        // [rows][H * D]; wo_a's groups begin o_pitch apart
    int o_group, o_pitch, panels;   // panels: as put_panel writes it
} attend_args;

// What a row sees, oldest first: n_window rows from position first on, which is ring_at in the ring, then n_compressed
// rows, all or those chosen.
typedef struct { int first, ring_at, n_window, n_compressed, selected, length, splits; } view;
static __device__ view view_of(const attend_args &p, const row &s, int drafts) {
    view v;
    int last = drafts ? s.first_position + s.n - 1 : s.position;
    v.first = most(0, (drafts ? s.first_position : last + 1) - p.c.window);
    v.ring_at = v.first % p.c.ring, v.n_window = last - v.first + 1;
    v.n_compressed = p.ratio ? (s.position + 1) / p.ratio : 0;
    v.selected = p.ratio == 4 && v.n_compressed > p.c.index_topk;
    if (v.selected) v.n_compressed = p.c.index_topk;
    // by the number of keys alone: 32 a split, or what SPLITS splits need; rows past the pass's last may have none
    int n = v.n_window + v.n_compressed;
    v.length = KEYS * most(1, (n + KEYS * SPLITS - 1) / (KEYS * SPLITS));
    v.splits = (n + v.length - 1) / v.length;
    return v;
}

// A block's shared memory: 32 keys as bf16, exact but for the rotary dims, whose two other planes are in `rope`; the
// warps' parts of the scores; the weights in three planes. Strides avoid bank conflicts.
enum { PAD = 16, SCORE_STRIDE = KEYS + 1, WEIGHT_STRIDE = KEYS + 8 };
typedef struct {
    uint16_t *keys, *rope, *weights;      // [KEYS][D + PAD]; [2][KEYS][R + PAD]; [3][TILE][WEIGHT_STRIDE]
    float *scores;                          // [WARPS][TILE][SCORE_STRIDE]
    float *factor;                          // [TILE]: what the sums so far are multiplied by
} attend_room;
static __host__ __device__ size_t attend_shared(const shape *c, char *base, attend_room *room) {
    size_t n[5] = { (size_t)(KEYS * (c->D + PAD)) * 2, (size_t)(2 * KEYS * (c->R + PAD)) * 2,
                    3 * TILE * WEIGHT_STRIDE * 2, WARPS * TILE * SCORE_STRIDE * 4, TILE * 4 };
    if (!room) return n[0] + n[1] + n[2] + n[3] + n[4];
    room->keys = (uint16_t *)(void *)base, room->rope = (uint16_t *)(void *)(base + n[0]);
    room->weights = (uint16_t *)(void *)(base + n[0] + n[1]),
    room->scores = (float *)(void *)(base + n[0] + n[1] + n[2]);
    room->factor = (float *)(void *)(base + n[0] + n[1] + n[2] + n[3]);
    return 0;
}

// Where a row's key j lies: floats of the window, or a compressed row's codes, scales, rotary dims.
typedef struct { const float *floats, *rope; const uint8_t *codes, *scales; } key_at;
static __device__ __forceinline__ key_at keys_in(const attend_args &p, const row &s) {
    uint8_t *const *state = s.state + p.layer * N_ARRAYS;
    key_at all = { (const float *)(const void *)state[WINDOW], (const float *)(const void *)state[ROPE],
                   state[ROW_CODES], state[ROW_SCALES] };
    return all;
}
// Which array has key j of a view, and at which row.
enum { IN_RING, IN_PASS, COMPRESSED, PLACE_BITS = 30 };
static __device__ __forceinline__ uint32_t place_of_key(const attend_args &p, const row &s, int i, const view &v,
                                                        int j) {
    int position = v.first + j, at = v.ring_at + j;
    uint32_t place;
    if (j >= v.n_window) {
        place = (uint32_t)(j - v.n_window);
        if (v.selected) place = (uint32_t)p.chosen[(size_t)i * (size_t)p.c.index_topk + place];
        return (uint32_t)COMPRESSED << PLACE_BITS | place;
    }
    place = position < s.first_position ? (uint32_t)(at < p.c.ring ? at : at - p.c.ring)
                                        : (uint32_t)(s.first + position - s.first_position);
    return (uint32_t)(position < s.first_position ? IN_RING : IN_PASS) << PLACE_BITS | place;
}
static __device__ __forceinline__ key_at key_of(const attend_args &p, const key_at &all, uint32_t place) {
    int D = p.c.D, R = p.c.R, array = (int)(place >> PLACE_BITS);
    size_t at = place & ((1u << PLACE_BITS) - 1);
    key_at k = { NULL, NULL, NULL, NULL };
    if (array != COMPRESSED) k.floats = (array == IN_RING ? all.floats : p.kv) + at * (size_t)D;
    else
        k.codes = all.codes + at * (size_t)(D - R), k.scales = all.scales + at * (size_t)((D - R + 63) / 64),
        k.rope = all.rope + at * (size_t)R;
    return k;
}
// Dims [d, d + 16) of a key, none rotary, as stored: floats, or 16 codes and their scale.
typedef struct { float4 v[4]; uint32_t scale; int coded; } key_dims;
static __device__ __forceinline__ void ask_key(const key_at &k, int d, key_dims &x) {
    x.coded = !k.floats, x.scale = 0;
    if (x.coded) {
        x.v[0] = *(const float4 *)(const void *)(k.codes + d), x.scale = k.scales[d / 64];
        return;
    }
    UNROLL
    for (int i = 0; i < 4; i++) x.v[i] = ((const float4 *)(const void *)(k.floats + d))[i];
}
// Four codes of a key times their scale, in bf16: exact.
static __device__ __forceinline__ uint2 bf16_of_codes(uint32_t codes, float scale) {
    const uint2 two = f16_of_e4m3(codes);
    return { bf16x2(f16_value(two.x & 0xffff) * scale, f16_value(two.x >> 16) * scale),
             bf16x2(f16_value(two.y & 0xffff) * scale, f16_value(two.y >> 16) * scale) };
}
// To shared memory as bf16, exact; zeros where no key is.
static __device__ __forceinline__ void put_key(const key_dims &x, int live, uint16_t *to) {
    const uint32_t codes[4] = { __float_as_uint(x.v[0].x), __float_as_uint(x.v[0].y), __float_as_uint(x.v[0].z),
                                __float_as_uint(x.v[0].w) };
    float scale = e8m0(x.scale);
    uint2 w[4];
    if (x.coded)
        UNROLL
        for (int i = 0; i < 4; i++) w[i] = bf16_of_codes(codes[i], scale);
    else
        UNROLL
        for (int i = 0; i < 4; i++) w[i] = { bf16x2(x.v[i].x, x.v[i].y), bf16x2(x.v[i].z, x.v[i].w) };
    UNROLL
    for (int i = 0; i < 4; i++) {
        if (!live) w[i].x = w[i].y = 0;
        *(uint2 *)(void *)(to + 4 * i) = w[i];
    }
}
// Rotary dims [d, d + 8) of key j in three planes; zeros where no key is.
static __device__ __forceinline__ void put_rope(const attend_args &p, const attend_room &room, int j, int d, float *v,
                                                int live) {
    uint16_t *to = room.keys + j * (p.c.D + PAD) + p.c.D - p.c.R + d;
    UNROLL
    for (int plane = 0; plane < 3; plane++) {
        uint32_t w[4];
        UNROLL
        for (int i = 0; i < 4; i++) {
            w[i] = live ? bf16x2(v[2 * i], v[2 * i + 1]) : 0;
            v[2 * i] -= __uint_as_float(w[i] << 16), v[2 * i + 1] -= __uint_as_float(w[i] & 0xffff0000u);
        }
        *(uint4 *)(void *)to = make_uint4(w[0], w[1], w[2], w[3]);
        to = room.rope + (plane * KEYS + j) * (p.c.R + PAD) + d;
    }
}

// What a thread loads of a step's keys. A warp has every eighth key, AT_ONCE of them at a time, a lane 16 dims; eight
// threads have the rotary dims of a key, the first 64 at once if all keys are. A lane knows one key's place.
enum { WARP_KEYS = KEYS / WARPS };
template <int AT_ONCE> struct key_step {
    uint32_t places;
    key_dims x[AT_ONCE];
    float rope[8];
};
template <int AT_ONCE>
static __device__ __forceinline__ void ask_keys(const attend_args &p, const key_at &all, int k, key_step<AT_ONCE> &a) {
    int warp = (int)threadIdx.x / WARP, d = 16 * ((int)threadIdx.x % WARP);
    UNROLL
    for (int m = 0; m < AT_ONCE; m++) {
        const key_at at = key_of(p, all, (uint32_t)__shfl_sync(ALL, (int)a.places, (k + m) * WARPS + warp));
        if (d < p.c.D - p.c.R) ask_key(at, d, a.x[m]);
    }
}
static __device__ __forceinline__ const float *rope_of(const attend_args &p, const key_at &all, uint32_t places) {
    const key_at k = key_of(p, all, (uint32_t)__shfl_sync(ALL, (int)places, (int)threadIdx.x / 8));
    return k.floats ? k.floats + p.c.D - p.c.R : k.rope;
}
// The step of keys from j0 on, at most to `end`: the last stands in for those missing.
template <int AT_ONCE>
static __device__ __forceinline__ void ask_step(const attend_args &p, const row &s, const key_at &all, int i,
                                                const view &v, int j0, int end, key_step<AT_ONCE> &a) {
    int d = (int)threadIdx.x % 8 * 8;
    a.places = place_of_key(p, s, i, v, least(j0 + (int)threadIdx.x % WARP, end - 1));
    if (AT_ONCE < WARP_KEYS) return;        // put_step asks
    ask_keys<AT_ONCE>(p, all, 0, a);
    const float *rope = rope_of(p, all, a.places);
    if (d < p.c.R) load8(a.rope, rope + d);
}
template <int AT_ONCE>
static __device__ __forceinline__ void put_step(const attend_args &p, const key_at &all, int n, const attend_room &room,
                                                key_step<AT_ONCE> &a) {
    int warp = (int)threadIdx.x / WARP, d = 16 * ((int)threadIdx.x % WARP), mine = (int)threadIdx.x / 8;
    UNROLL_BY(1)
    for (int k = 0; k < WARP_KEYS; k += AT_ONCE) {
        if (AT_ONCE < WARP_KEYS) ask_keys<AT_ONCE>(p, all, k, a);
        UNROLL
        for (int m = 0; m < AT_ONCE; m++) {
            int slot = (k + m) * WARPS + warp;
            if (d < p.c.D - p.c.R) put_key(a.x[m], slot < n, room.keys + slot * (p.c.D + PAD) + d);
        }
    }
    const float *rope = rope_of(p, all, a.places);
    for (d = (int)threadIdx.x % 8 * 8; d < p.c.R; d += 64) {
        float v[8];
        if (AT_ONCE < WARP_KEYS || d >= 64) load8(v, rope + d);
        else for (int k = 0; k < 8; k++) v[k] = a.rope[k];
        put_rope(p, room, mine, d, v, mine < n);
    }
}

// A warp's part of the queries of 16 heads, every eighth 16 dims, as mma takes them: not normed (the scores take their
// RMS), rotated, in three planes; of rows g, g + 8 dims 4t and 4t + 1, then 4t + 2 and 4t + 3.
enum { Q_STEPS = MAX_HEAD_DIM / 16 / WARPS };
typedef struct { uint32_t a[Q_STEPS][3][4]; } queries;
typedef struct { float4 x[Q_STEPS][2]; } query_dims;
static __device__ __forceinline__ void ask_queries(const attend_args &p, int r, int h0, query_dims &all) {
    int D = p.c.D, lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4, warp = (int)threadIdx.x / WARP;
    UNROLL
    for (int i = 0; i < Q_STEPS; i++)
        UNROLL
        for (int half = 0; half < 2; half++) {
            int h = h0 + g + 8 * half, k = (i * WARPS + warp) * 16 + 4 * t;
            all.x[i][half] = make_float4(0, 0, 0, 0);
            const float *from = p.q + ((size_t)r * (size_t)p.c.H + (size_t)h) * (size_t)D + (size_t)k;
            if (h < p.c.H && k < D) all.x[i][half] = *(const float4 *)(const void *)from;
        }
}
// squares[2]: of heads g and g + 8, the lane's part.
static __device__ __forceinline__ void split_queries(const attend_args &p, int r, const query_dims &all, queries &q,
                                                     float *squares) {
    int D = p.c.D, R = p.c.R, t = (int)threadIdx.x % 4, warp = (int)threadIdx.x / WARP;
    squares[0] = squares[1] = 0;
    UNROLL
    for (int i = 0; i < Q_STEPS; i++) {
        int at = (i * WARPS + warp) * 16 + 4 * t - (D - R), turns = at >= 0 && at < R;
        float2 turn[2] = { { 1, 0 }, { 1, 0 } };
        for (int m = 0; turns && m < 2; m++) turn[m] = turn_of(p.turns, R / 2, r, p.set, at / 2 + m);
        UNROLL
        for (int half = 0; half < 2; half++) {
            float4 x = all.x[i][half];
            squares[half] = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, squares[half]))));
            if (turns) rope_pair(x.x, x.y, turn[0].x, turn[0].y), rope_pair(x.z, x.w, turn[1].x, turn[1].y);
            UNROLL
            for (int plane = 0; plane < 3; plane++) {
                uint32_t w0 = bf16x2(x.x, x.y), w1 = bf16x2(x.z, x.w);
                q.a[i][plane][half] = w0, q.a[i][plane][2 + half] = w1;
                x.x -= __uint_as_float(w0 << 16), x.y -= __uint_as_float(w0 & 0xffff0000u);
                x.z -= __uint_as_float(w1 << 16), x.w -= __uint_as_float(w1 & 0xffff0000u);
            }
        }
    }
}
// Their scores with the block's keys, SIDE eights of keys side by side.
template <int SIDE>
static __device__ __forceinline__ void score(const attend_args &p, const queries &q, const attend_room &room) {
    int D = p.c.D, R = p.c.R, lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4,
        warp = (int)threadIdx.x / WARP;
    float acc[KEYS / 8][4];
    zero<KEYS / 8 * 4>(&acc[0][0]);
    UNROLL
    for (int i = 0; i < Q_STEPS; i++) {
        int k = (i * WARPS + warp) * 16;
        if (k >= D) break;
        UNROLL
        for (int b = 0; b < 3; b++) {       // planes of the keys
            if (b && k < D - R) break;
            const uint16_t *keys = b ? room.rope + ((b - 1) * KEYS + g) * (R + PAD) + k - (D - R) + 4 * t
                                     : room.keys + g * (D + PAD) + k + 4 * t;
            int eight = 8 * ((b ? R : D) + PAD);
            UNROLL
            for (int nt = 0; nt < KEYS / 8; nt += SIDE) {
                uint2 w[SIDE];
                UNROLL
                for (int m = 0; m < SIDE; m++) w[m] = *(const uint2 *)(const void *)(keys + (nt + m) * eight);
                UNROLL
                for (int plane = 0; plane + b < 3; plane++) {
                    const uint32_t *a = q.a[i][plane];
                    UNROLL
                    for (int m = 0; m < SIDE; m++) mma(acc[nt + m], a[0], a[1], a[2], a[3], w[m].x, w[m].y);
                }
            }
        }
    }
    UNROLL
    for (int nt = 0; nt < KEYS / 8; nt++)
        UNROLL
        for (int i = 0; i < 4; i++)
            room.scores[(warp * TILE + g + 8 * (i >> 1)) * SCORE_STRIDE + nt * 8 + 2 * t + (i & 1)] = acc[nt][i];
}

// 1 / RMS of each head times D^-1/2, from the lanes' squares: over the lanes of a head, then over the warps in order.
static __device__ void query_scales(const attend_args &p, float *squares, float *part /* [WARPS][TILE] */,
                                    float *scale /* [TILE] */) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    for (int half = 0; half < 2; half++) {
        squares[half] += __shfl_xor_sync(ALL, squares[half], 1);
        squares[half] += __shfl_xor_sync(ALL, squares[half], 2);
        if (lane % 4 == 0) part[warp * TILE + lane / 4 + 8 * half] = squares[half];
    }
    __syncthreads();
    if (threadIdx.x < TILE) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += part[w * TILE + (int)threadIdx.x];
        scale[threadIdx.x] = inverse_rms(sum, p.c.D, p.c.eps) * inverse_root((float)p.c.D);
    }
}

// Online softmax of head threadIdx / 16 over keys threadIdx % 16 and 16 further: largest, sum; weights in three planes.
static __device__ void softmax_step(const attend_room &room, int n, const float *scale, float *largest, float *sum) {
    int h = (int)threadIdx.x / 16, j = (int)threadIdx.x % 16;
    float s[2], m = *largest, e[2];
    for (int k = 0; k < 2; k++) {
        s[k] = 0;
        for (int w = 0; w < WARPS; w++) s[k] += room.scores[(w * TILE + h) * SCORE_STRIDE + j + 16 * k];
        s[k] = j + 16 * k < n ? s[k] * scale[h] : -HUGE_VALF;
        m = fmaxf(m, s[k]);
    }
    m = group_max(m, 16);
    for (int k = 0; k < 2; k++) e[k] = expf(s[k] - m);
    float more = e[0] + e[1], factor = expf(*largest - m);
    for (int i = 8; i; i /= 2) more += __shfl_xor_sync(ALL, more, i);
    *sum = fmaf(*sum, factor, more), *largest = m;
    if (j == 0) room.factor[h] = factor;
    for (int plane = 0; plane < 3; plane++)
        for (int k = 0; k < 2; k++) {
            uint32_t w = bf16x2(e[k], 0);
            room.weights[(plane * TILE + h) * WEIGHT_STRIDE + j + 16 * k] = (uint16_t)w;
            e[k] -= __uint_as_float(w << 16);
        }
}

// o += weights times plane b of the keys, dims [d, d + 8) and those of every eighth n-tile after it, side by side.
typedef uint32_t weight_planes[3][KEYS / 16][4];
template <int SIDE>
static __device__ __forceinline__ void add_plane(const attend_args &p, const attend_room &room, const weight_planes a,
                                                 int b, int d, float (*o)[4]) {
    int D = p.c.D, R = p.c.R, lane = (int)threadIdx.x % WARP;
    const uint16_t *keys = b ? room.rope + ((b - 1) * KEYS + lane) * (R + PAD) + d - (D - R)
                             : room.keys + lane * (D + PAD) + d;
    uint32_t w[SIDE][4];
    UNROLL
    for (int i = 0; i < SIDE; i++) load_transposed(w[i], keys + i * WARPS * 8);
    UNROLL
    for (int k = 0; k < KEYS / 16; k++)
        UNROLL
        for (int plane = 0; plane + b < 3; plane++)
            UNROLL
            for (int i = 0; i < SIDE; i++)
                mma(o[i], a[plane][k][0], a[plane][k][1], a[plane][k][2], a[plane][k][3], w[i][2 * k], w[i][2 * k + 1]);
}
// o += weights times keys: a warp has dims of n-tiles warp, warp + 8, ...; SIDE of them side by side.
template <int SIDE>
static __device__ __forceinline__ void add_values(const attend_args &p, const attend_room &room, float (*o)[4]) {
    int D = p.c.D, R = p.c.R, lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4,
        warp = (int)threadIdx.x / WARP;
    weight_planes a;
    for (int plane = 0; plane < 3; plane++)
        for (int k = 0; k < KEYS / 16; k++)
            for (int i = 0; i < 4; i++)
                a[plane][k][i] =
                    *(const uint32_t *)(const void *)(room.weights + (plane * TILE + g + 8 * (i & 1)) * WEIGHT_STRIDE +
                                                      k * 16 + 2 * t + 8 * (i >> 1));
    UNROLL
    for (int i = 0; i < MAX_HEAD_DIM / 8 / WARPS; i += SIDE) {
        int d = (i * WARPS + warp) * 8, next = d + (SIDE - 1) * WARPS * 8;
        if (d >= D) break;
        UNROLL
        for (int m = 0; m < SIDE; m++)
            for (int k = 0; k < 4; k++) o[i + m][k] *= room.factor[g + 8 * (k >> 1)];
        if (next < D) add_plane<SIDE>(p, room, a, 0, d, o + i);
        for (int m = 0; next >= D && m < SIDE && d + m * WARPS * 8 < D; m++)
            add_plane<1>(p, room, a, 0, d + m * WARPS * 8, o + i + m);
        UNROLL
        for (int m = 0; m < SIDE; m++)
            UNROLL
            for (int b = 1; b < 3; b++) {
                if (d + m * WARPS * 8 < D - R || d + m * WARPS * 8 >= D) break;
                add_plane<1>(p, room, a, b, d + m * WARPS * 8, o + i + m);
            }
    }
}

// A lane's part of the weighted sums: heads g and g + 8, dims 2t and 2t + 1 of every eighth n-tile; and of head
// threadIdx / 16 the largest score and the sum of weights.
typedef struct { float o[MAX_HEAD_DIM / 8 / WARPS][4], largest, sum; } part_sums;
typedef struct { float scale[TILE], part[WARPS * TILE]; } attend_scratch;
static __device__ __forceinline__ int dim_of(int k, int m) {
    return (k * WARPS + (int)threadIdx.x / WARP) * 8 + (int)threadIdx.x % 4 * 2 + (m & 1);
}
static __device__ __forceinline__ int end_of(const view &v, int split) {
    return least(v.n_window + v.n_compressed, (split + 1) * v.length);
}
// A split of a row's keys for 16 heads, 32 keys at a time. With a step's keys all at once, which only a block alone on
// its SM has registers for, the caller has asked for the first step, and each step asks for the next.
template <int AT_ONCE>
static __device__ __forceinline__ void attend_split(const attend_args &p, const row &s, const key_at &all,
                                                    const view &v, int i, int split, const queries &q,
                                                    const attend_room &room, const float *scale,
                                                    key_step<AT_ONCE> &step, part_sums &a) {
    enum { ALONE = AT_ONCE == WARP_KEYS };
    int end = end_of(v, split);
    zero<MAX_HEAD_DIM / 8 / WARPS * 4>(&a.o[0][0]);
    a.largest = -HUGE_VALF, a.sum = 0;
    for (int j0 = split * v.length; j0 < end; j0 += KEYS) {
        int n = least(KEYS, end - j0);
        if (!ALONE) ask_step<AT_ONCE>(p, s, all, i, v, j0, end, step);
        __syncthreads();
        put_step<AT_ONCE>(p, all, n, room, step);
        __syncthreads();
        if (ALONE && j0 + KEYS < end) ask_step<AT_ONCE>(p, s, all, i, v, j0 + KEYS, end, step);
        score<ALONE ? KEYS / 8 : 1>(p, q, room);
        __syncthreads();
        softmax_step(room, n, scale, &a.largest, &a.sum);
        __syncthreads();
        add_values<ALONE ? 4 : 1>(p, room, a.o);
    }
}

// Bound: latency. Bytes are .63 MB a row of 640 keys (.2 us; six rows 3.8 MB, 1.3 us), products .42 us a row at three
// planes; a step of eight warps is some 900 mma (16 x 8 x 16) and 36 KB of keys. One row of 640 keys is 80 blocks; with
// more rows two blocks share an SM, at half the registers each: six rows are 480 blocks, two waves.
template <int BLOCKS> static __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const attend_args p) {
    __shared__ attend_scratch scratch;
    SHARED_BYTES(bytes);
    int D = p.c.D, h0 = (int)blockIdx.y * TILE, i = (int)(blockIdx.x / SPLITS), split = (int)(blockIdx.x % SPLITS),
        r = p.row0 + i, g = (int)threadIdx.x % WARP / 4;
    float squares[2];
    query_dims asked;
    queries q;
    attend_room room;
    key_step<BLOCKS == 1 ? WARP_KEYS : 2> step;
    part_sums a;
    const row s = p.rows[r];
    view v = view_of(p, s, p.n->drafts);
    if (r >= p.n->n_rows || split >= v.splits) return grid_wait();
    const key_at all = keys_in(p, s);
    params_near(p);
    grid_wait();
    grid_go();      // not earlier: stream_few reads before its wait what is complete now
    attend_shared(&p.c, bytes, &room);
    ask_queries(p, r, h0, asked);
    if (BLOCKS == 1) ask_step(p, s, all, i, v, split * v.length, end_of(v, split), step);
    split_queries(p, r, asked, q, squares);
    query_scales(p, squares, scratch.part, scratch.scale);
    attend_split(p, s, all, v, i, split, q, room, scratch.scale, step, a);
    float *to = p.part + (((size_t)i * SPLITS + (size_t)split) * (size_t)p.c.H) * (size_t)(D + 4);
    UNROLL
    for (int k = 0; k < MAX_HEAD_DIM / 8 / WARPS; k++)
        for (int half = 0; half < 2; half++) {
            int d = dim_of(k, 0), h = h0 + g + 8 * half;
            float2 *at = (float2 *)(void *)(to + ((size_t)h * (size_t)(D + 4) + (size_t)d));
            if (d < D && h < p.c.H) *at = make_float2(a.o[k][2 * half], a.o[k][2 * half + 1]);
        }
    int h = h0 + (int)threadIdx.x / 16;
    to += (size_t)h * (size_t)(D + 4) + (size_t)D;
    if (threadIdx.x % 16 == 0 && h < p.c.H) to[0] = a.largest, to[1] = a.sum;
}

// Merges a head's splits in order, from the sink on. Returned: what the sums so far (x) and the split's (y) are
// multiplied by.
typedef struct { float largest, sum; } merged;
static __device__ __forceinline__ merged merge_begin(const attend_args &p, int h) {
    merged a = { h < p.c.H ? p.sink[h] : 0, 1 };
    return a;
}
static __device__ __forceinline__ float2 merge_weights(float &largest, float of_split) {
    float m = fmaxf(largest, of_split);
    float2 by = make_float2(expf(largest - m), expf(of_split - m));
    largest = m;
    return by;
}
static __device__ __forceinline__ float2 merge_split(merged &a, float largest, float sum) {
    float2 by = merge_weights(a.largest, largest);
    a.sum = fmaf(by.y, sum, a.sum * by.x);
    return by;
}
// The dim, over all heads, at a place of o; -1: none.
static __device__ __forceinline__ int dim_at(const attend_args &p, int place) {
    int from_group = place % p.o_pitch, dim = place / p.o_pitch * p.o_group + from_group;
    return from_group < p.o_group && dim < p.c.H * p.c.D ? dim : -1;
}
// Eight sums of a row over the sum of weights, rotated back, as wo_a's input; dim -1: none.
template <int WHOLE>
static __device__ __forceinline__ void put_values(const attend_args &p, int r, int place, int dim, float *o,
                                                  float sum) {
    int at = dim % p.c.D - (p.c.D - p.c.R);
    for (int d = 0; d < 8; d++) o[d] = quotient(o[d], sum);
    for (int d = 0; d < 8; d += 2)
        if (dim >= 0 && at + d >= 0) {
            float2 turn = turn_of(p.turns, p.c.R / 2, r, p.set, (at + d) / 2);
            rope_pair(o[d], o[d + 1], turn.x, -turn.y);
        }
    if (WHOLE && p.panels) put_panel(p.o, r, place, o, dim >= 0);
    else put_input(p.o, r, place, o, dim >= 0);
}

// A block has 256 dims of a row, a thread eight of them and a quarter of the splits: it loads all it needs (of splits
// that a row lacks whatever is there), computes its splits' weights, and the quarters are added in order. Bound: 2.6 MB
// a row of 20 splits through L2 (.9 us; six rows 5). It would be slower in the last split's block: the four blocks of a
// row would read 650 KB each.
enum { QUARTER = SPLITS / 4, MERGE_THREADS = 128, MERGED = MERGE_THREADS / 4 };
static __device__ void merge_heads(const attend_args &p, const view &v, int i, int r, int place, int dim) {
    __shared__ float so_far[9][MERGED];
    int D = p.c.D, me = (int)threadIdx.x % MERGED, quarter = (int)threadIdx.x / MERGED, h = most(0, dim) / D;
    size_t next = (size_t)p.c.H * (size_t)(D + 4);
    const float *head = p.part + (size_t)(i * SPLITS) * next + (size_t)h * (size_t)(D + 4);
    const float *part = head + (size_t)(quarter * QUARTER) * next;
    float before[SPLITS - QUARTER], largest[QUARTER], sum[QUARTER], x[QUARTER][8], o[8];
    float2 by[QUARTER];
    merged a = merge_begin(p, h);
    UNROLL
    for (int k = 0; k < SPLITS - QUARTER; k++) before[k] = head[(size_t)k * next + (size_t)D];
    UNROLL
    for (int k = 0; k < QUARTER; k++) {
        const float *from = part + (size_t)k * next;
        if (quarter * QUARTER + k >= v.splits) continue;
        largest[k] = from[D], sum[k] = from[D + 1];
        load8(x[k], from + most(0, dim) % D);
    }
    UNROLL
    for (int k = 0; k < SPLITS - QUARTER; k++)
        if (k < least(quarter * QUARTER, v.splits)) a.largest = fmaxf(a.largest, before[k]);
    UNROLL
    for (int k = 0; k < QUARTER; k++)
        if (quarter * QUARTER + k < v.splits) by[k] = merge_weights(a.largest, largest[k]);
    zero<8>(o);
    for (int turn = 0; turn < 4; turn++) {
        if (turn == quarter) {
            for (int d = 0; turn && d < 8; d++) o[d] = so_far[d][me];
            if (turn) a.sum = so_far[8][me];
            UNROLL
            for (int k = 0; k < QUARTER; k++) {
                if (quarter * QUARTER + k >= v.splits) continue;
                a.sum = fmaf(by[k].y, sum[k], a.sum * by[k].x);
                for (int d = 0; d < 8; d++) o[d] = fmaf(by[k].y, x[k][d], o[d] * by[k].x);
            }
            for (int d = 0; d < 8; d++) so_far[d][me] = o[d];
            so_far[8][me] = a.sum;
        }
        __syncthreads();
    }
    if (quarter == 3) put_values<0>(p, r, place, dim, o, a.sum);
}
static __global__ void __launch_bounds__(MERGE_THREADS) attend_merge(const attend_args p) {
    int i = (int)blockIdx.x, r = p.row0 + i, place = ((int)blockIdx.y * MERGED + (int)threadIdx.x % MERGED) * 8, dim, n;
    grid_go();
    params_near(p);
    view v = view_of(p, p.rows[r], p.n->drafts);
    dim = dim_at(p, place), n = p.n->n_rows;
    keep(dim);
    grid_wait();
    if (r < n) merge_heads(p, v, i, r, place, dim);
}

// For many rows: a block computes all splits of a row for 16 heads and merges them itself, so that sums never leave the
// SM. total [TILE][D + 8]. Bound: products, .42 us a row of 640 keys at 600 TFLOP/s.
static __host__ __device__ size_t attend_rows_shared(const shape *c) {
    return attend_shared(c, NULL, NULL) + (size_t)(TILE * (c->D + 8)) * sizeof(float);
}
static __device__ __forceinline__ void add_split(const attend_args &p, const part_sums &a, float (*of_split)[2],
                                                 merged *heads, float *total) {
    int g = (int)threadIdx.x % WARP / 4;
    float2 by[2];
    if (threadIdx.x % 16 == 0) of_split[threadIdx.x / 16][0] = a.largest, of_split[threadIdx.x / 16][1] = a.sum;
    __syncthreads();
    for (int half = 0; half < 2; half++)
        by[half] = merge_split(heads[half], of_split[g + 8 * half][0], of_split[g + 8 * half][1]);
    UNROLL
    for (int k = 0; k < MAX_HEAD_DIM / 8 / WARPS; k++)
        for (int m = 0; m < 4; m++) {
            float *to = total + (g + 8 * (m >> 1)) * (p.c.D + 8) + dim_of(k, m);
            if (dim_of(k, m) < p.c.D) *to = fmaf(by[m >> 1].y, a.o[k][m], *to * by[m >> 1].x);
        }
}
// Sums of heads h0 .. [heads][D + 8] over of[][1], as wo_a's input.
template <int WHOLE>
static __device__ __forceinline__ void put_heads(const attend_args &p, int r, int h0, int heads, const float *total,
                                                 const float (*of)[2]) {
    int D = p.c.D, end = least(p.c.H, h0 + heads) * D, last = end / p.o_group * p.o_pitch + end % p.o_group;
    for (int at = h0 * D / p.o_group * p.o_pitch + h0 * D % p.o_group; at < last; at += THREADS * 8) {
        int place = at + (int)threadIdx.x * 8, dim = place < last ? dim_at(p, place) : -1, h = most(0, dim) / D - h0;
        float o[8];
        if (dim < 0) h = 0;
        load8(o, total + h * (D + 8) + most(0, dim) % D);
        put_values<WHOLE>(p, r, place, dim, o, of[h][1]);
    }
}
static __global__ void __launch_bounds__(THREADS, 2) attend_rows(const attend_args p) {
    __shared__ attend_scratch scratch;
    __shared__ float of_split[TILE][2];
    SHARED_BYTES(bytes);
    int D = p.c.D, h0 = (int)blockIdx.y * TILE, i = (int)blockIdx.x, r = p.row0 + i, g = (int)threadIdx.x % WARP / 4;
    float squares[2];
    query_dims asked;
    queries q;
    float *total = (float *)(void *)(bytes + attend_shared(&p.c, NULL, NULL));
    attend_room room;
    key_step<2> step;
    part_sums a;
    grid_go();
    const row s = p.rows[r];
    view v = view_of(p, s, p.n->drafts);
    if (r >= p.n->n_rows) return grid_wait();
    const key_at all = keys_in(p, s);
    merged heads[2] = { merge_begin(p, h0 + g), merge_begin(p, h0 + g + 8) };
    grid_wait();
    attend_shared(&p.c, bytes, &room);
    ask_queries(p, r, h0, asked), split_queries(p, r, asked, q, squares);
    query_scales(p, squares, scratch.part, scratch.scale);
    for (int k = (int)threadIdx.x; k < TILE * (D + 8); k += THREADS) total[k] = 0;
    for (int split = 0; split < v.splits; split++) {
        attend_split(p, s, all, v, i, split, q, room, scratch.scale, step, a);
        add_split(p, a, of_split, heads, total);
    }
    __syncthreads();        // all have read the last split's
    if (threadIdx.x % 4 == 0 && threadIdx.x < WARP)
        for (int half = 0; half < 2; half++) of_split[g + 8 * half][1] = heads[half].sum;
    __syncthreads();
    put_heads<0>(p, r, h0, TILE, total, of_split);
}

// ---- attention of whole blocks of a prompt ----------------------------------------------------
// With fast_prefill. As in the released kernels, queries, softmax weights and keys' rotary dims are rounded to bf16.
// That is a third of the products above, and one block has room for 64 heads of a row: it reads and decodes keys once
// where four blocks of attend_rows do. Keys come in steps of 64. One warpgroup decodes them, two multiply: the first
// has the scores and weights of even steps, the second of odd ones, and each adds to its half of the dims, always in
// the order of steps. So the tensor cores have values of one step before and while the next's scores are found, and
// keys are decoded beside both.
// BARRIERS. A step's buffer is that of its parity. `full`: the four decoding warps have stored its keys; `empty`: the
// eight others have read them, for scores and values. Nobody arrives for a phase before all have passed the one before:
// decoders come to full behind their wait for empty; the others to empty behind their wait for full or, as the group
// without the step's scores, behind threads_meet, to which the group that waited comes later. threads_meet, once a
// step: its weights and factors are there, and those of two steps before no longer used, for each group has waited for
// its values. Every wait is for something earlier in the order full, threads_meet, empty, step by step, decoders' for
// the last but one; so all end. Decoders do not call copies_seen, which would wait for what they have asked for: it is
// called behind the wait for full.
// Bound for 64 keys: products, 2,050 clocks; shared memory, 2,200 (scores 1,020, values 640, decoding 510); while
// weights are found the tensor cores wait, 500. Of L2, 840 KB a row of 640 keys (queries and sums 256, window 256): at
// 5.5 TB/s .15 us a row. Measured, 2,048 rows: 750 us, 358 of them for the window's 128 keys, queries and sums.

#define LOG2_E 1.44269504f
enum { WHOLE_KEYS = 64, WHOLE_HEADS = 64, WHOLE_PANELS = MAX_HEAD_DIM / 64, WHOLE_ROW = 128 };
enum { WHOLE_PANEL = WHOLE_KEYS * WHOLE_ROW, WHOLE_ALL = WHOLE_PANELS * WHOLE_PANEL };      // bytes
enum { WHOLE_GROUP = THREADS / 2, WHOLE_EIGHTS = MAX_HEAD_DIM / 2 / 8 };    // a warpgroup's threads; its dims / 8
enum { WHOLE_PART = WHOLE_GROUP / 4, WHOLE_THREADS = THREADS + WHOLE_GROUP };   // keys decoded at once; threads in all
enum { WHOLE_FEW = 104, WHOLE_MANY = 200 };     // registers of a thread that decodes; of one that multiplies
enum { WHOLE_AHEAD = INDEX_ROWS };      // rows that run at once: an H100 has SMs for little more
// Panels of 64 dims, or keys, in bf16, as mma_scores takes them; zeros behind D. Queries, then keys and weights of an
// even and an odd step.
typedef struct {
    char *q, *keys, *weights;       // [panels][64 rows][64]: one, two of them; two of a panel each
    int *chosen;                    // [index_topk]
} whole_room;
// Their bytes. Queries and keys, when no longer used, become the heads' sums [WHOLE_HEADS][D + 8].
static __host__ __device__ size_t whole_shared(const shape *c, char *base, whole_room *room) {
    if (!room) return 1024 + 3 * WHOLE_ALL + 2 * WHOLE_PANEL + (size_t)c->index_topk * 4;
    room->q = base, room->keys = base + WHOLE_ALL, room->weights = room->keys + 2 * WHOLE_ALL;
    room->chosen = (int *)(void *)(room->weights + 2 * WHOLE_PANEL);
    return 0;
}
// Where number d of a row lies in panels. In a panel, the place of number 8 i + d, d < 8, is that of d, ^ 16 i.
static __device__ __forceinline__ unsigned whole_at(unsigned r, unsigned d) {
    return d / 64 * WHOLE_PANEL + r * WHOLE_ROW + (d % 64 / 8 ^ r % 8) * 16 + d % 8 * 2;
}
// Where a thread's rows of sums are: head g or g + 8 of its warp's 16.
static __device__ __forceinline__ int whole_head(int k) {
    return (int)threadIdx.x / WARP % 4 * 16 + (int)threadIdx.x % WARP / 4 + 8 * k;
}
// Of each head the largest score so far (LOG2_E times) and the sum of weights; the factors of an even and an odd step.
// full, empty: barriers of the even and the odd step's keys.
typedef struct {
    float head[WHOLE_HEADS][2], factor[2][WHOLE_HEADS];
    uint64_t full[2], empty[2];
} whole_scratch;
static __device__ __forceinline__ shared_at whole_barrier(const uint64_t *b, int step) {
    return place_in((const char *)(const void *)(b + step % 2));
}
// A warp arrives.
static __device__ __forceinline__ void whole_arrive(const uint64_t *b, int step) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(whole_barrier(b, step));
}

// Queries of 64 heads over their RMS, rotated; zeros behind the last. A warp has every eighth head, four side by side.
static __device__ __forceinline__ void whole_queries(const attend_args &p, int r, int h0, char *to) {
    enum { EACH = MAX_HEAD_DIM / 4 / WARP, SIDE = 4 };
    int D = p.c.D, lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    float2 turn[EACH][2];
    UNROLL
    for (int i = 0; i < EACH; i++) {
        int d = (i * WARP + lane) * 4, at = d - (D - p.c.R);
        turn[i][0] = turn[i][1] = { 1, 0 };
        if (d < D && at >= 0)
            for (int k = 0; k < 2; k++) turn[i][k] = turn_of(p.turns, p.c.R / 2, r, p.set, at / 2 + k);
    }
    UNROLL_BY(1)
    for (int h1 = warp; h1 < WHOLE_HEADS; h1 += SIDE * WARPS) {
        const float *from = p.q + ((size_t)r * (size_t)p.c.H + (size_t)(h0 + h1)) * (size_t)D;
        float4 x[SIDE][EACH];
        float squares[SIDE] = { 0, 0, 0, 0 };
        UNROLL
        for (int m = 0; m < SIDE; m++)
            UNROLL
            for (int i = 0; i < EACH; i++) {
                int d = (i * WARP + lane) * 4;
                x[m][i] = make_float4(0, 0, 0, 0);
                if (d < D && h0 + h1 + m * WARPS < p.c.H)
                    x[m][i] = *(const float4 *)(const void *)(from + (size_t)(m * WARPS) * (size_t)D + d);
            }
        UNROLL
        for (int m = 0; m < SIDE; m++)
            UNROLL
            for (int i = 0; i < EACH; i++) {
                const float4 &v = x[m][i];
                squares[m] = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares[m]))));
            }
        UNROLL
        for (int i = WARP / 2; i; i /= 2)
            for (int m = 0; m < SIDE; m++) squares[m] += __shfl_xor_sync(ALL, squares[m], i);
        UNROLL
        for (int m = 0; m < SIDE; m++) {
            float scale = inverse_rms(squares[m], D, p.c.eps);
            UNROLL
            for (int i = 0; i < EACH; i++) {
                int d = (i * WARP + lane) * 4;
                float4 &v = x[m][i];
                rope_pair(v.x, v.y, turn[i][0].x, turn[i][0].y), rope_pair(v.z, v.w, turn[i][1].x, turn[i][1].y);
                if (d < D)
                    *(uint2 *)(void *)(to + whole_at((unsigned)(h1 + m * WARPS), (unsigned)d)) =
                        { bf16x2(v.x * scale, v.y * scale), bf16x2(v.z * scale, v.w * scale) };
            }
        }
    }
}
// Of a later row, to L2, by a warpgroup.
static __device__ __forceinline__ void whole_prefetch(const attend_args &p, int r, int h0) {
    enum { LINE = 128 / sizeof(float) };
    const float *q = p.q + ((size_t)r * (size_t)p.c.H + (size_t)h0) * (size_t)p.c.D;
    if (r >= p.n->n_rows) return;
    for (int k = (int)threadIdx.x % WHOLE_GROUP * LINE; k < least(WHOLE_HEADS, p.c.H - h0) * p.c.D;
         k += WHOLE_GROUP * LINE)
        prefetch_line(q + k);
}

static __device__ __forceinline__ void load16_floats(float4 *x, const float *from) {
    IN_GLOBAL(from);
    UNROLL
    for (int i = 0; i < 4; i++) x[i] = ((const float4 *)(const void *)from)[i];
}
// A decoder has 16 dims of each panel of every 32nd key: so eight lanes store to all banks. Of a compressed key it asks
// for them as stored, the first 64 rotary dims, and two panels' scales, each when it has decoded those of the key
// before.
typedef struct { uint4 codes[WHOLE_PANELS]; float4 rope[4]; uint32_t scales; } whole_asked;
static __device__ __forceinline__ void whole_ask_codes(const attend_args &p, const key_at &k, int i, whole_asked &a) {
    int d = (int)threadIdx.x % 4 * 16;
    const uint8_t *from = k.codes + d;
    IN_GLOBAL(from);
    if (i * 64 < p.c.D - p.c.R - d) a.codes[i] = *(const uint4 *)(const void *)(from + i * 64);
}
static __device__ __forceinline__ void whole_ask_scales(const attend_args &p, const key_at &k, whole_asked &a) {
    int plain = p.c.D - p.c.R, first = (int)threadIdx.x % 4 * 2;
    IN_GLOBAL(k.scales);
    a.scales = first * 64 < plain ? k.scales[first] : 0;
    if (first * 64 + 64 < plain) a.scales |= (uint32_t)k.scales[first + 1] << 8;
}
static __device__ __forceinline__ void whole_ask_rope(const attend_args &p, const key_at &k, whole_asked &a) {
    int d = (int)threadIdx.x % 4 * 16;
    if (d < p.c.R) load16_floats(a.rope, k.rope + d);
}
static __device__ __forceinline__ int whole_coded(uint32_t place) { return place >> PLACE_BITS == COMPRESSED; }
static __device__ __forceinline__ void whole_ask(const attend_args &p, const key_at &all, uint32_t place,
                                                 whole_asked &a) {
    a = {};         // keeps no registers for what is not asked for
    if (!whole_coded(place)) return;
    const key_at k = key_of(p, all, place);
    whole_ask_scales(p, k, a);
    UNROLL
    for (int i = 0; i < WHOLE_PANELS; i++) whole_ask_codes(p, k, i, a);
    whole_ask_rope(p, k, a);
}
// The place of the thread's key of 32 from j0 on; the last stands in for those missing. The first compressed ones wait
// for which are chosen.
static __device__ __forceinline__ int whole_key(const view &v, int j0) {
    return least(j0 + (int)threadIdx.x % WHOLE_GROUP / 4, v.n_window + v.n_compressed - 1);
}
static __device__ __forceinline__ uint32_t whole_find(const attend_args &p, const row &s, const view &v,
                                                      const whole_room &room, int j0) {
    int j = whole_key(v, j0), k = j - v.n_window;
    if (j0 / WHOLE_PART == v.n_window / WHOLE_PART) copies_wait<0>(), threads_meet<2, WHOLE_GROUP>();
    return k < 0 ? place_of_key(p, s, 0, v, j)
                 : (uint32_t)COMPRESSED << PLACE_BITS | (uint32_t)(v.selected ? room.chosen[k] : k);
}
// 16 dims to panels.
static __device__ __forceinline__ void whole_put16(char *to, unsigned at, const float4 *x) {
    UNROLL
    for (unsigned i = 0; i < 2; i++)
        *(uint4 *)(void *)(to + (at ^ 16 * i)) =
            make_uint4(bf16x2(x[2 * i].x, x[2 * i].y), bf16x2(x[2 * i].z, x[2 * i].w),
                       bf16x2(x[2 * i + 1].x, x[2 * i + 1].y), bf16x2(x[2 * i + 1].z, x[2 * i + 1].w));
}
// Eight codes times their scale, twice in `by`: exact.
static __device__ __forceinline__ uint4 whole_decoded(uint32_t low, uint32_t high, uint32_t by) {
    const uint2 a = f16_of_e4m3(low), b = f16_of_e4m3(high);
    return make_uint4(mul_bf16x2(bf16x2(f16_value(a.x & 0xffff), f16_value(a.x >> 16)), by),
                      mul_bf16x2(bf16x2(f16_value(a.y & 0xffff), f16_value(a.y >> 16)), by),
                      mul_bf16x2(bf16x2(f16_value(b.x & 0xffff), f16_value(b.x >> 16)), by),
                      mul_bf16x2(bf16x2(f16_value(b.y & 0xffff), f16_value(b.y >> 16)), by));
}
// The thread's dims of a key of the window; loads wait for each other if they are not all unconditional.
static __device__ __forceinline__ void whole_put_floats(const attend_args &p, const float *from, char *to,
                                                        unsigned at) {
    enum { AT_ONCE = 4 };       // panels
    int d = (int)threadIdx.x % 4 * 16;
    UNROLL_BY(1)
    for (int i = 0; i < WHOLE_PANELS; i += AT_ONCE, d += AT_ONCE * 64, to += AT_ONCE * WHOLE_PANEL) {
        float4 x[AT_ONCE][4];
        UNROLL
        for (int k = 0; k < AT_ONCE; k++) load16_floats(x[k], from + (d + k * 64 < p.c.D ? d + k * 64 : 0));
        UNROLL
        for (int k = 0; k < AT_ONCE; k++)
            if (d + k * 64 < p.c.D) whole_put16(to + k * WHOLE_PANEL, at, x[k]);
    }
}
// A key of the window, or the one asked for, to bf16; and asks for the next.
static __device__ __forceinline__ void whole_put_key(const attend_args &p, const key_at &all, uint32_t place,
                                                     uint32_t next, whole_asked &a, char *to) {
    int plain = p.c.D - p.c.R, d = (int)threadIdx.x % 4 * 16, lane = (int)threadIdx.x % WARP & ~3;
    unsigned key = threadIdx.x % WHOLE_GROUP / 4, at = whole_at(key, (unsigned)d);
    uint32_t scales[4];
    UNROLL
    for (int i = 0; i < 4; i++) scales[i] = (uint32_t)__shfl_sync(ALL, (int)a.scales, lane + i);
    if (!whole_coded(place)) {
        whole_put_floats(p, key_of(p, all, place).floats, to, at);
        return whole_ask(p, all, next, a);
    }
    const key_at k = key_of(p, all, next);
    whole_ask_scales(p, k, a);
    UNROLL
    for (int i = 0; i < WHOLE_PANELS; i++) {
        uint32_t by = (__float_as_uint(e8m0(scales[i / 2] >> i % 2 * 8 & 255)) >> 16) * 0x10001;
        if (i * 64 >= plain - d) break;
        *(uint4 *)(void *)(to + i * WHOLE_PANEL + at) = whole_decoded(a.codes[i].x, a.codes[i].y, by);
        *(uint4 *)(void *)(to + i * WHOLE_PANEL + (at ^ 16)) = whole_decoded(a.codes[i].z, a.codes[i].w, by);
        whole_ask_codes(p, k, i, a);
    }
    for (int r = d; r < p.c.R; r += 64) {
        if (r >= 64) load16_floats(a.rope, key_of(p, all, place).rope + r);
        whole_put16(to, whole_at(key, (unsigned)(plain + r)), a.rope);
    }
    whole_ask_rope(p, k, a);
}
// All keys of a row.
static __device__ __forceinline__ void whole_decode(const attend_args &p, const row &s, const key_at &all,
                                                    const view &v, const whole_room &room, const whole_scratch &x) {
    const int *chosen = p.chosen + (size_t)blockIdx.x * (size_t)p.c.index_topk;
    whole_asked a;
    for (int k = (int)threadIdx.x % WHOLE_GROUP; v.selected && k < v.n_compressed; k += WHOLE_GROUP)
        copy4<0>(place_in((const char *)(room.chosen + k)), chosen + k);
    copies_close();
    uint32_t place = whole_find(p, s, v, room, 0);
    whole_ask(p, all, place, a);
    for (int j0 = 0, n = v.n_window + v.n_compressed; j0 < n; j0 += WHOLE_KEYS) {
        int step = j0 / WHOLE_KEYS;
        char *to = room.keys + step % 2 * WHOLE_ALL;
        barrier_wait(whole_barrier(x.empty, step), (uint32_t)(step / 2 + 1) & 1);
        UNROLL_BY(1)
        for (int j = 0; j < WHOLE_KEYS; j += WHOLE_PART) {
            uint32_t next = whole_find(p, s, v, room, j0 + j + WHOLE_PART);
            whole_put_key(p, all, place, next, a, to + j * WHOLE_ROW);
            place = next;
        }
        whole_arrive(x.full, step);
    }
}

// Scores of a warpgroup's step, to be waited for. A thread has heads g and g + 8 of its warp's 16, as mma_panel.
static __device__ __forceinline__ void whole_scores(const char *q, const char *keys, float (*acc)[4]) {
    shared_at a = place_in(q), b = place_in(keys);
    keep_sums<WHOLE_KEYS / 8>(acc), mma_panel_begin();
    mma_scores<1, 0>(acc, a, b), mma_scores<0, 32>(acc, a, b), mma_scores<0, 64>(acc, a, b);
    mma_scores<0, 96>(acc, a, b);
    UNROLL
    for (int i = 1; i < WHOLE_PANELS; i++) {
        a += WHOLE_PANEL, b += WHOLE_PANEL;
        mma_scores<0, 0>(acc, a, b), mma_scores<0, 32>(acc, a, b), mma_scores<0, 64>(acc, a, b);
        mma_scores<0, 96>(acc, a, b);
    }
    mma_panel_close();
}
// Online softmax over n more keys, in powers of two.
static __device__ __forceinline__ void whole_softmax_step(const attend_args &p, float (*acc)[4], int n,
                                                          float (*head)[2], float *factors, char *weights) {
    int t = (int)threadIdx.x % 4;
    float largest[2] = { -HUGE_VALF, -HUGE_VALF }, by = LOG2_E * inverse_root((float)p.c.D);
    if (n < WHOLE_KEYS)
        UNROLL
        for (int i = 0; i < WHOLE_KEYS / 2; i++)
            if (i / 4 * 8 + i % 2 >= n - 2 * t) acc[i / 4][i % 4] = -HUGE_VALF;
    UNROLL
    for (int i = 0; i < WHOLE_KEYS / 2; i++) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], acc[i / 4][i % 4]);
    UNROLL
    for (int k = 0; k < 2; k++) {
        int h = whole_head(k);
        unsigned at = whole_at((unsigned)h, 2 * (unsigned)t);
        float before = head[h][0], m = fmaxf(before, group_max(largest[k], 4) * by), more = 0,
              factor = power2(before - m);
        UNROLL
        for (int i = 0; i < WHOLE_KEYS / 8; i++) {
            float x = power2(fmaf(acc[i][2 * k], by, -m)), y = power2(fmaf(acc[i][2 * k + 1], by, -m));
            more += x + y;
            *(uint32_t *)(void *)(weights + (at ^ 16 * (unsigned)i)) = bf16x2(x, y);
        }
        more += __shfl_xor_sync(ALL, more, 1), more += __shfl_xor_sync(ALL, more, 2);
        if (t == 0) head[h][0] = m, head[h][1] = fmaf(head[h][1], factor, more), factors[h] = factor;
    }
}
// o += weights times keys, to be waited for.
static __device__ __forceinline__ void whole_values(const char *weights, const char *keys, const float *factors,
                                                    float (*o)[4]) {
    const float by[2] = { factors[whole_head(0)], factors[whole_head(1)] };
    shared_at a = place_in(weights), b = place_in(keys);
    if (__ballot_sync(ALL, by[0] != 1 || by[1] != 1))
        UNROLL
        for (int i = 0; i < 4 * WHOLE_EIGHTS; i++) o[i / 4][i % 4] *= by[i / 2 % 2];
    keep_sums<WHOLE_EIGHTS>(o), mma_panel_begin();
    mma_values<0>(o, a, b), mma_values<1>(o, a, b), mma_values<2>(o, a, b), mma_values<3>(o, a, b);
    mma_panel_close();
}
// Sums over the sum of weights, rotated back, as put_panel writes them: of head h those of dims d .. d + 127 that the
// thread has, in every other pair of o. Needs these in one head and one group of wo_a.
static __device__ __forceinline__ int whole_panels(const attend_args &p) {
    return p.panels && p.c.D % 128 == 0 && p.o_group % 128 == 0;
}
static __device__ __forceinline__ void whole_put_panel(const attend_args &p, int r, int h, int d, float sum, float *o) {
    int t = (int)threadIdx.x % 4, dim = h * p.c.D + d, place = dim / p.o_group * p.o_pitch + dim % p.o_group,
        first = (d + p.c.R - p.c.D) / 2 + t, e;
    uint8_t *out = (uint8_t *)p.o.halves + panel_byte(r - r % 8, place * 2, p.o.stride * 2) + t / 2 * 8;
    float largest = 0, by = quotient(1, sum);
    UNROLL
    for (int i = 0; i < 16; i++) o[4 * i] *= by, o[4 * i + 1] *= by;
    if (d + 128 > p.c.D - p.c.R)
        UNROLL
        for (int i = 0; i < 16; i++) {
            float2 turn = { 1, 0 };
            if (first + 4 * i >= 0 && d < p.c.D) turn = turn_of(p.turns, p.c.R / 2, r, p.set, first + 4 * i);
            rope_pair(o[4 * i], o[4 * i + 1], turn.x, -turn.y);
        }
    UNROLL
    for (int i = 0; i < 16; i++) largest = fmaxf(largest, fmaxf(fabsf(o[4 * i]), fabsf(o[4 * i + 1])));
    e = halves_exponent(group_max(largest, 4));
    UNROLL
    for (int i = 0; i < 16; i += 2) {       // lane ^ 2 has the words beside these two
        uint32_t w[2] = { f16x2(o[4 * i] * exp2i(-e), o[4 * i + 1] * exp2i(-e)),
                          f16x2(o[4 * i + 4] * exp2i(-e), o[4 * i + 5] * exp2i(-e)) };
        uint32_t other = (uint32_t)__shfl_xor_sync(ALL, (int)(t < 2 ? w[1] : w[0]), 2);
        uint2 *to = (uint2 *)(void *)(out + in_panel(r % 8, i / 2 * 32 + t % 2 * 16));
        if (h < p.c.H && d < p.c.D) *to = t < 2 ? make_uint2(w[0], other) : make_uint2(other, w[1]);
    }
    if (t == 0 && h < p.c.H && d < p.c.D) p.o.halves_scale[panel_scale(r, place / 128, p.o.stride / 128)] = exp2i(e);
}
// Else sums go to memory, in place of queries and keys, and from there to put_heads.
static __device__ __forceinline__ void whole_put(const attend_args &p, int r, int h0, float *total,
                                                 const float (*head)[2], float (*o)[4]) {
    int d0 = (int)threadIdx.x / WHOLE_GROUP * WHOLE_EIGHTS * 8;
    if (whole_panels(p)) {
        UNROLL
        for (int i = 0; i < 4; i++)
            whole_put_panel(p, r, h0 + whole_head(i % 2), d0 + i / 2 * 128, head[whole_head(i % 2)][1],
                            &o[i / 2 * 16][i % 2 * 2]);
        return;
    }
    threads_meet<1, THREADS>();
    UNROLL
    for (int k = 0; k < 2; k++) {
        float *to = total + whole_head(k) * (p.c.D + 8) + d0 + (int)threadIdx.x % 4 * 2;
        UNROLL
        for (int i = 0; i < WHOLE_EIGHTS; i++)
            if (d0 + 8 * i < p.c.D) *(float2 *)(void *)(to + 8 * i) = make_float2(o[i][2 * k], o[i][2 * k + 1]);
    }
    threads_meet<1, THREADS>();
    put_heads<1>(p, r, h0, WHOLE_HEADS, total, head);
}
// A step of the group's own, while values of the one before, if there is one, may still go on.
template <int GROUP, int FIRST>
static __device__ __forceinline__ void whole_own(const attend_args &p, int n, int step, const whole_room &room,
                                                 whole_scratch &x, float (*o)[4]) {
    char *keys = room.keys + GROUP * WHOLE_ALL, *weights = room.weights + GROUP * WHOLE_PANEL;
    float acc[WHOLE_KEYS / 8][4];
    barrier_wait(whole_barrier(x.full, GROUP), (uint32_t)step / 2 & 1);
    copies_seen();
    whole_scores(room.q, keys, acc);
    if (!FIRST) mma_panel_wait<1, WHOLE_EIGHTS>(o), whole_arrive(x.empty, !GROUP);
    mma_panel_wait<0>(acc);
    whole_softmax_step(p, acc, n - step * WHOLE_KEYS, x.head, x.factor[GROUP], weights);
    copies_seen();
    threads_meet<1, THREADS>();
    whole_values(weights, keys + GROUP * WHOLE_ALL / 2, x.factor[GROUP], o);
    mma_panel_wait<0, WHOLE_EIGHTS>(o);
    whole_arrive(x.empty, GROUP);
}
// All steps of a warpgroup: in turn values of the other's and one of its own.
template <int GROUP>
static __device__ __forceinline__ void whole_steps(const attend_args &p, int n, const whole_room &room,
                                                   whole_scratch &x, float (*o)[4]) {
    enum { OTHER = !GROUP };
    zero<4 * WHOLE_EIGHTS>(o[0]);
    if (!GROUP) whole_own<GROUP, 1>(p, n, 0, room, x, o);
    for (int step = 2 - GROUP; (step - 1) * WHOLE_KEYS < n; step += 2) {
        threads_meet<1, THREADS>();
        whole_values(room.weights + OTHER * WHOLE_PANEL, room.keys + OTHER * WHOLE_ALL + GROUP * WHOLE_ALL / 2,
                     x.factor[OTHER], o);
        if (step * WHOLE_KEYS >= n) {
            mma_panel_wait<0, WHOLE_EIGHTS>(o);
            break;
        }
        whole_own<GROUP, 0>(p, n, step, room, x, o);
    }
}
static __global__ void __launch_bounds__(WHOLE_THREADS, 1) attend_whole(const attend_args p) {
    __shared__ whole_scratch scratch;
    SHARED_BYTES(bytes);
    int h0 = (int)blockIdx.y * WHOLE_HEADS, r = p.row0 + (int)blockIdx.x;
    whole_room room;
    float o[WHOLE_EIGHTS][4];
    grid_go();
    const row s = p.rows[r];
    if (r >= p.n->n_rows) return grid_wait();
    const view v = view_of(p, s, 0);
    const key_at all = keys_in(p, s);
    if (threadIdx.x < WHOLE_HEADS) {
        const merged sink = merge_begin(p, h0 + (int)threadIdx.x);
        scratch.head[threadIdx.x][0] = LOG2_E * sink.largest, scratch.head[threadIdx.x][1] = sink.sum;
    }
    if (threadIdx.x < 2) {
        barrier_open(whole_barrier(scratch.full, (int)threadIdx.x), WHOLE_GROUP / WARP);
        barrier_open(whole_barrier(scratch.empty, (int)threadIdx.x), WARPS);
    }
    whole_shared(&p.c, panel_room(bytes), &room);
    for (int k = (int)threadIdx.x * 16; p.c.D < MAX_HEAD_DIM && k < 3 * WHOLE_ALL; k += WHOLE_THREADS * 16)
        *(uint4 *)(void *)(room.q + k) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    grid_wait();
    if (threadIdx.x >= THREADS) {
        registers_fewer<WHOLE_FEW>();
        whole_prefetch(p, r + WHOLE_AHEAD, h0);
        whole_decode(p, s, all, v, room, scratch);
        return;
    }
    registers_more<WHOLE_MANY>();
    whole_queries(p, r, h0, room.q);
    copies_seen();
    threads_meet<1, THREADS>();
    if (threadIdx.x < WHOLE_GROUP) whole_steps<0>(p, v.n_window + v.n_compressed, room, scratch, o);
    else whole_steps<1>(p, v.n_window + v.n_compressed, room, scratch, o);
    whole_put(p, r, h0, (float *)(void *)room.q, scratch.head, o);
}

// ---- rows as inputs; the rings ----------------------------------------------------------------
// Rows of floats [rows][n] to inputs, normed first if there is a norm. A block takes 2048 numbers of a row, or with a
// norm all; extra blocks commit the row to the rings, an array each. Bound: latency, 32 KB a row.
typedef struct {
    shape c;
    const int *n_rows;
    const float *x, *norm;
    int n, parts;
    input out;
    commit_args commit;
} round_args;
// Eight numbers of a row from `at` on.
static __device__ void round_eight(const round_args &p, int r, int at) {
    int live = at < p.n;
    float v[8];
    if (live) load8_fresh(v, p.x + (size_t)r * (size_t)p.n + (size_t)at);
    put_input(p.out, r, at, v, live);
}
static __global__ void __launch_bounds__(THREADS) round_rows(const round_args p) {
    __shared__ float scratch[WARPS];
    int r = (int)blockIdx.x, part = (int)blockIdx.y, n, any = 0;
    grid_go();
    params_near(p);
    for (int i = (int)threadIdx.x * 32; p.norm && i < p.n; i += THREADS * 32) any |= (int)__float_as_uint(p.norm[i]);
    keep(any);      // brings its lines to L1
    n = *p.n_rows;
    grid_wait();
    if (r >= n) return;
    if (part >= p.parts) commit(p.c, p.commit, r, part - p.parts);
    else if (!p.norm) round_eight(p, r, (part * THREADS + (int)threadIdx.x) * 8);
    else put_normed_row(p.out, r, p.x + (size_t)r * (size_t)p.n, p.norm, p.n, p.c.eps, scratch);
}

// ---- routing and SwiGLU -----------------------------------------------------------------------

typedef struct { matrix w[3]; } expert;         // w1, w3 (gate, up), w2

typedef struct {
    shape c;
    const counts *n;
    const row *rows;
    const float *gate, *bias;       // [rows][E] logits, [E]
    const int *tid2eid;             // [V][K], or NULL
    int *route;                     // [rows][K], ascending
    float *weight;                  // [rows][K]
    int *first, *list;              // [E + 1]; [rows * K]: row * K + slot, an expert's together
    int *where;                     // [rows * K]: of more than one row, where each is in the list
    int *active;                    // [0]: how many experts have rows; then which, ascending
    int *arrived;                   // zero between kernels: blocks that are done
} route_args;

static __device__ __forceinline__ float sqrt_softplus(float x) { return sqrtf(fmaxf(x, 0) + log1pf(expf(-fabsf(x)))); }

// What the choice of an expert goes by, and its weight before it is normalized.
typedef struct { uint32_t order; float weight; } scored_expert;
// A block's scores, and the bias.
static __host__ __device__ size_t route_bytes(int warps, int E) {
    return (size_t)(warps * E) * sizeof(scored_expert) + (size_t)E * sizeof(float);
}
static __device__ __forceinline__ scored_expert score_expert(const route_args &p, int r, int e, const float *bias) {
    float weight = sqrt_softplus(__ldcg(p.gate + (size_t)r * (size_t)p.c.E + (size_t)e));
    uint32_t order = p.tid2eid ? 1 : ordered(weight + bias[e]);
    scored_expert s = { order ? order : 1, weight };
    return s;
}
// Row r's K experts, ascending: the largest (the lower index of equals), or its token's own. A warp; lane k has the
// k-th. It overwrites scores [E]; 0 is below all. only: of one row whose experts differ the groups are known, too.
static __device__ void route_row(const route_args &p, int r, scored_expert *scores, int only) {
    int E = p.c.E, K = p.c.K, lane = (int)threadIdx.x % WARP, mine = -1, place = 0;
    float sum = 0, weight = 0;
    if (p.tid2eid && lane < K) mine = p.tid2eid[(size_t)p.rows[r].id * (size_t)K + (size_t)lane];
    uint32_t score = 0;         // of the lane's best
    for (int k = 0, changed = 1, best = 0; !p.tid2eid && k < K; k++) {
        if (changed) {
            score = 0;
            UNROLL_BY(8)
            for (int e = lane; e < E; e += WARP) {
                uint32_t other = scores[e].order;
                if (other > score) score = other, best = e;
            }
        }
        uint32_t best_score = __reduce_max_sync(ALL, score);
        int chosen = (int)__reduce_min_sync(ALL, score == best_score ? (uint32_t)best : (uint32_t)E);
        changed = chosen == best;
        if (k == lane) mine = chosen;
        __syncwarp();
        if (changed && lane == chosen % WARP) scores[chosen].order = 0;
        __syncwarp();
    }
    if (mine >= 0) weight = scores[mine].weight;
    for (int k = 0; k < K; k++) {
        int other = __shfl_sync(ALL, mine, k);
        sum += __shfl_sync(ALL, weight, k), place += other < mine || (other == mine && k < lane);
    }
    if (lane < K) p.route[r * K + place] = mine, p.weight[r * K + place] = quotient(weight, sum) * p.c.routed_scale;
    if (!only || lane >= K) return;
    p.first[mine] = p.list[place] = place, p.first[mine + 1] = place + 1, p.active[1 + place] = mine;
    if (lane == 0) p.active[0] = K;
}

// Counts each expert's rows, in one block; at [E]: where its rows begin in the list.
static __device__ void count_experts(const route_args &p, int n, int *at) {
    int E = p.c.E, rows = 0, active = 0, some, more;
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) at[e] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) atomicAdd(&at[__ldcg(p.route + i)], 1);
    __syncthreads();
    for (int e0 = 0; e0 < E; e0 += (int)blockDim.x) {
        int e = e0 + (int)threadIdx.x, count = e < E ? at[e] : 0;
        int first = rows + block_before(count, &some), place = active + block_before(count > 0, &more);
        rows += some, active += more;
        if (e < E) at[e] = p.first[e] = first;
        if (count) p.active[1 + place] = e;
    }
    if (threadIdx.x == 0) p.first[E] = rows, p.active[0] = active;
    __syncthreads();
}
// All score, a warp chooses per row; the last block groups. Bound: latency, K rounds of a warp over the experts.
static __global__ void __launch_bounds__(1024) route(const route_args p) {
    SHARED_BYTES(bytes);
    int n, E = p.c.E, warps = (int)blockDim.x / WARP, warp = (int)threadIdx.x / WARP, r0 = (int)blockIdx.x * warps;
    scored_expert *scores = (scored_expert *)(void *)bytes;
    float *bias = (float *)(void *)(scores + (size_t)warps * (size_t)E);
    for (int e = (int)threadIdx.x; p.bias && e < E; e += (int)blockDim.x) bias[e] = p.bias[e];
    n = p.n->n_rows;
    params_near(p);
    grid_wait();
    grid_go();
    __syncthreads();
    for (int i = (int)threadIdx.x; i < least(warps, n - r0) * E; i += (int)blockDim.x)
        scores[i] = score_expert(p, r0 + i / E, i % E, bias);
    __syncthreads();
    int only = n == 1 && !p.tid2eid;
    if (r0 + warp < n) route_row(p, r0 + warp, scores + (size_t)warp * (size_t)E, only);
    if (only) return;
    __syncthreads();
    if (gridDim.x > 1 && !last_block(p.arrived, (int)gridDim.x)) return;
    int *at = (int *)(void *)bytes;
    n *= p.c.K, count_experts(p, n, at);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        int to = atomicAdd(&at[__ldcg(p.route + i)], 1);
        p.list[to] = i, p.where[i] = to;
    }
}

// weight * silu(gate) * up of a slot, as w2's input.
typedef struct {
    shape c;
    const counts *n;
    const float *gate, *up, *weight;        // [rows][K + 1][stride], the same, [rows][K]
    int stride, width, shared_width, slot;  // slot: the first one
    input x;                                // [rows * (K + 1)]
} swiglu_args;
static __device__ __forceinline__ float swiglu_of(float limit, float g, float u) {
    g = limit < g ? limit : g, g = g < -200 ? -200 : g;         // -inf / inf would be NaN
    u = limit < u ? limit : u, u = u < -limit ? -limit : u;
    return quotient(g, 1 + expf(-g)) * u;
}
static __device__ __forceinline__ float swiglu_limit(const shape &c) { return c.limit > 0 ? c.limit : HUGE_VALF; }
// Eight numbers of it from `at` on.
static __device__ void swiglu_eight(const swiglu_args &p, int r, int slot, int at) {
    int K = p.c.K;
    size_t from = (size_t)(r * (K + 1) + slot) * (size_t)p.stride + (size_t)at;
    int live = at < (slot < K ? p.width : p.shared_width);
    float v[8], g[8], u[8], weight, limit = swiglu_limit(p.c);
    if (live) load8_fresh(g, p.gate + from), load8_fresh(u, p.up + from);
    weight = live && slot < K ? p.weight[r * K + slot] : 1;
    for (int i = 0; live && i < 8; i++) v[i] = weight * swiglu_of(limit, g[i], u[i]);
    put_input(p.x, r * (K + 1) + slot, at, v, live);
}
// A block a slot. Bound: latency, 16 KB a slot.
static __global__ void __launch_bounds__(THREADS) swiglu(const swiglu_args p) {
    int r = (int)blockIdx.x, slot = p.slot + (int)blockIdx.y, n;
    grid_go();
    params_near(p);
    n = p.n->n_rows;
    grid_wait();
    for (int at = 0; r < n && at < (slot < p.c.K ? p.width : p.shared_width); at += THREADS * 8)
        swiglu_eight(p, r, slot, at + (int)threadIdx.x * 8);
}

// ---- products ---------------------------------------------------------------------------------

// y = w x of several matrices in one launch, by n_blocks blocks. Extra blocks do work that only a later launch needs:
// post and comb for `mix`, a warp a row; or the window's rows and the compressors'.
typedef struct {
    matrix w;
    operand x;                  // [rows][x_stride]
    int x_stride;
    int group, x_group;    // each `group` outputs take x from x_group numbers further on; 0: all alike
    float *y;                   // [row][y_stride]
    int y_stride, add;          // 1: y += w x
    const int *y_rows;          // NULL: row r goes to row r
} job;
enum { MAX_JOBS = 10 };
typedef struct {
    int n_jobs, n_items, item_bytes, n_blocks;
    int rows;                       // at most so many
    const int *n_rows;
    int first[MAX_JOBS];            // items of the jobs before
    job jobs[MAX_JOBS];
    post_comb_args mix;             // out NULL: none
    int tasks;                      // of kv_rows; 0: none
    kv_args kv;
} linears_args;

// The job that item or tile i is of.
static __device__ __forceinline__ int job_of(const linears_args &p, int i) {
    int k = 0;
    UNROLL
    for (int j = 1; j < MAX_JOBS; j++) k += j < p.n_jobs && p.first[j] <= i;
    return k;
}
static __device__ __forceinline__ void item_of(const linears_args &p, int i, int, item_at &it) {
    int k = job_of(p, i), each, tile;
    const job &j = p.jobs[k];
    each = items_of_tile(j.w, p.item_bytes), i -= p.first[k], tile = i / each;
    it.w = j.w, it.of = k, it.tile = i % each ? -1 : tile, it.list = NULL, it.n = 0;
    it.part = k + (j.group ? tile * TILE / j.group * MAX_JOBS : 0);
}
static __device__ __noinline__ void run_beside(const linears_args &p, int block, char *bytes) {
    __shared__ float scratch[WARPS];
    int n = *p.n_rows, windows = blocks_of(p.rows, WARPS), warp = (int)threadIdx.x / WARP;
    grid_wait();
    if (!p.mix.out) kv_task(p.kv, block < windows ? block : (block - windows) / (p.tasks - 1),
                                 block < windows ? 0 : 1 + (block - windows) % (p.tasks - 1), n, bytes, scratch);
    else if (block * WARPS + warp < n) post_comb(p.mix, block * WARPS + warp);
}
// The same for all rows, before the blocks' tiles.
static __device__ __forceinline__ void all_post_comb(const linears_args &p, int n) {
    for (int r = (int)(blockIdx.x * WARPS + threadIdx.x / WARP); p.mix.out && r < n; r += (int)gridDim.x * WARPS)
        post_comb(p.mix, r);
}
// Rows r0 .. of the n.
template <int NT> static __device__ __forceinline__ void linear_rows(const job &j, const span &s, int r0, int n,
                                                                     feed &f, float *part, int width) {
    int at[NT];
    for (int nt = 0; nt < NT; nt++) {       // missing rows repeat the last one
        int r = least(r0 + nt * 8 + (int)threadIdx.x % WARP / 4, n - 1);
        at[nt] = r * j.x_stride + (j.group ? s.m0 / j.group * j.x_group : 0);
    }
    tile_sums_of<NT>(s, j.x, at, f, part, width);
    __syncthreads();
    for (int k = (int)threadIdx.x; k < s.tiles * TILE * width; k += THREADS) {
        int m = k % TILE, tile = k / TILE / width, r = r0 + k / TILE % width, out = s.m0 + tile * TILE + m;
        if (r >= n || out >= s.rows) continue;
        float *y = j.y + (size_t)(j.y_rows ? j.y_rows[r] : r) * (size_t)j.y_stride + (size_t)out;
        float sum = total(part, width, tile, r - r0, m);
        *y = j.add ? *y + sum : sum;
    }
    __syncthreads();
}

template <int NT> static __global__ void __launch_bounds__(bound_of(NT), 2)
linears(const __grid_constant__ linears_args p) {
    __shared__ span spans[WARP];
    SHARED_BYTES(bytes);
    int r0 = (int)blockIdx.y * NT * 8, n = -1, block = (int)blockIdx.x, width = least(NT * 8, p.rows), item, end;
    feed f;
    grid_go();
    feed_open<NT>(f, bytes);        // first: its fence waits for loads
    if (block >= p.n_blocks) return r0 ? grid_wait() : run_beside(p, block - p.n_blocks, bytes);
    item = first_item(p.n_items, block, p.n_blocks), end = first_item(p.n_items, block + 1, p.n_blocks);
    for (; item < end; item += WARP) {
        int some = find_spans(p, item, end, most_tiles(NT, width), 0, spans);
        if (n >= 0) feed_begin<NT>(f, spans, some);
        else n = *p.n_rows, feed_until_turn<NT>(f, spans, some);
        for (int k = 0; n > r0 && k < some; k++)
            linear_rows<NT>(p.jobs[spans[k].of], spans[k], r0, n, f, (float *)(void *)bytes, width);
    }
    if (n < 0) grid_wait();
}

// For each expert with rows: those rows times some of its matrices. Then, if given, the shared expert for all rows. An
// expert's weights are read once for NT * 8 rows. Bound: bytes, MB (us): w1 w3 53.5 (18) for one row, 292 (97) for six
// rows with 33 different experts; w2 and the shared one's 35 (12), 155 (52).
typedef struct {
    shape c;
    const counts *n;
    const expert *experts, *shared; // [E]; NULL: without
    int each, each_tile, shared_each, shared_tile;      // items of a matrix and of a tile of it; of the shared one's
    const int *first, *list, *active;
    int which, n_which;             // matrices w[which] .. of an expert
    int n_slots;                    // K + 1: slot K is the shared expert's
    int rows;                       // of the pass, at most
    int routed;                     // 1: routes are known before the kernel ahead ends
    int x_by_slot;                  // x has a row for each slot; else for each row of the pass
    input x;
    float *y[2];                    // [rows][n_slots][y_stride]
    int y_stride;
} experts_args;

// The lane's number of p.active: the first 32 come with one load, before it is known which are needed.
static __device__ __forceinline__ int lane_active(const experts_args &p) {
    return __ldcg(p.active + least((int)threadIdx.x % WARP, p.c.E));
}
static __device__ __forceinline__ void item_of(const experts_args &p, int i, int active, item_at &it) {
    int n = __shfl_sync(ALL, active, 0), a = i / (p.each * p.n_which), at = 1 + least(a, p.c.E - 1),
        e = __shfl_sync(ALL, active, at % WARP), each = p.each, of_tile = p.each_tile;
    if (at >= WARP) e = __ldcg(p.active + at);
    e = least(most(0, e), p.c.E - 1);       // past the active ones anything may be there
    const expert *of = p.experts + e;
    int first = __ldcg(p.first + e), end = __ldcg(p.first + e + 1);
    it.list = p.list + first, it.n = end - first;
    if (a >= n)
        a = n, of = p.shared, each = p.shared_each, of_tile = p.shared_tile, it.list = NULL, it.n = p.n->n_rows;
    i -= a * p.each * p.n_which, it.of = i / each, i -= it.of * each;
    it.w = of->w[p.which + it.of], it.tile = i % of_tile ? -1 : i / of_tile, it.part = a * p.n_which + it.of;
}
// Rows from i0 on of the expert's.
template <int NT> static __device__ __forceinline__ void expert_rows(const experts_args &p, const span &s, int i0,
                                                                     feed &f, float *part, int width) {
    int at[NT], K = p.c.K;
    operand x = operand_of(p.x, s.dtype, 0);
    for (int nt = 0; nt < NT; nt++) {
        int i = least(i0 + nt * 8 + (int)threadIdx.x % WARP / 4, s.n - 1);
        int r = s.list ? s.list[i] / K : i, slot = s.list ? s.list[i] % K : K;
        at[nt] = (p.x_by_slot ? r * p.n_slots + slot : r) * p.x.stride;
    }
    tile_sums_of<NT>(s, x, at, f, part, width);
    __syncthreads();
    for (int k = (int)threadIdx.x; k < s.tiles * TILE * width; k += THREADS) {
        int out = k % TILE, tile = k / TILE / width, i = i0 + k / TILE % width, o = s.m0 + tile * TILE + out;
        if (i >= s.n || o >= s.rows) continue;
        int r = s.list ? s.list[i] / K : i, slot = s.list ? s.list[i] % K : K;
        p.y[s.of][(size_t)(r * p.n_slots + slot) * (size_t)p.y_stride + (size_t)o] =
            total(part, width, tile, i - i0, out);
    }
    __syncthreads();
}

// w1 and w3 let the next kernel start only when the routes are complete, so the one after it may read them before it
// waits: w2 copies its first weights while its inputs are still computed.
template <int NT> static __global__ void __launch_bounds__(bound_of(NT), 2)
experts(const __grid_constant__ experts_args p) {
    __shared__ span spans[WARP];
    SHARED_BYTES(bytes);
    int n, item, end, active, width = least(NT * 8, p.rows), waits = p.routed;
    feed f;
    feed_open<NT>(f, bytes);
    if (!waits) {
        for (int i = (int)threadIdx.x * 128; !blockIdx.x && i < (p.c.E + 1) * (int)sizeof(expert); i += THREADS * 128)
            prefetch_line((const char *)p.experts + i);     // last read in the previous pass
        grid_wait();
    }
    grid_go();
    active = lane_active(p), n = (__shfl_sync(ALL, active, 0) * p.each + p.shared_each) * p.n_which;
    item = first_item(n, (int)blockIdx.x, (int)gridDim.x), end = first_item(n, (int)blockIdx.x + 1, (int)gridDim.x);
    for (; item < end; item += WARP) {
        int some = find_spans(p, item, end, most_tiles(NT, width), active, spans);
        if (!waits) feed_begin<NT>(f, spans, some);
        else feed_until_turn<NT>(f, spans, some), waits = 0;
        for (int k = 0; k < some; k++)
            for (int i = 0; i < spans[k].n; i += NT * 8)
                expert_rows<NT>(p, spans[k], i, f, (float *)(void *)bytes, width);
    }
    if (waits) grid_wait();
}

// ---- products of many rows --------------------------------------------------------------------
// The kernels above decode weights again for every 32 rows and read x from the caches for every tile of 16. Here a
// block of eight warps has a tile of outputs x rows: a warp has 16 MT outputs, whose weights no other reads, and all
// rows, which come to shared memory in stages. For the same bits a warp sums as eight warps do above: for each w, units
// w, w + 8, .. alone, then those sums in order. Blocks take tiles in turn, rows first, so that blocks that run together
// share weights. Tiles are 256 outputs x 64 rows; x 32 for FP4, whose sums take registers, and bf16; 128 x 32 where
// tiles are few. Bound: products, 600 TFLOP/s of mma.sync, us of 512 rows: wq_a and beside it 66 (bf16: three planes),
// wq_b 71, wo_a 115 (two planes), wo_b 57, gate and shared w1 w3 32; measured 158, 258, 256, 152, 140. A unit of FP8
// times 64 rows, of a tile of 256, is 1,024 mma (16 x 8 x 16): 1,600 clocks of an SM, in which a scheduler issues 1,500
// instructions for its two warps, and 48 KB from L2, 30 bytes a clock; of FP4 times 32 rows as many, 2,100
// instructions. Two warps a scheduler wait more than they issue, yet four with half the tile (128 outputs, two blocks
// an SM) took 1.2 to 1.5 times as long. wgmma.m64n64k16 on f16 has mma_f16's bits (8.4 million chains of four
// compared), so these products may use it.

enum { MANY_ROWS = 33, MOST_COLUMNS = 64, TILES_KNOWN = 4 };
static __host__ __device__ constexpr int wide_stages(int mt) { return mt == 1 ? 2 : 3; }
static __host__ __device__ constexpr int wide_outputs(int mt) { return WARPS * mt * TILE; }
// Rows of a tile, in eights. A stage, sized for the largest tile: weights, x's scales [row][2], x.
static __host__ __device__ constexpr int wide_eights(int mt, int dtype, int planes) {
    return dtype == DSPARK_FP4 ? (planes == 1 ? 4 : 2) : dtype == DSPARK_FP8 ? 4 * mt : 4;
}
static __host__ __device__ constexpr int stage_rows(int mt) { return WARPS * mt * SLOT_BYTES; }
static __host__ __device__ constexpr int stage_bytes(int mt) {
    return stage_rows(mt) + MOST_COLUMNS * 2 * 4 + (mt == 1 ? 16 << 10 : 32 << 10);
}

// A tile: some outputs of a matrix for `live` rows of x; row i begins at at[i], its sums go to row to[i]. eights: of
// rows that linears_wide computes, padding included.
template <int COLUMNS> struct tile_of {
    span s;
    operand x;
    float *y;
    int y_stride, add, eights, live, at[COLUMNS], to[COLUMNS];
};
typedef tile_of<MOST_COLUMNS> wide_tile;
// A block's position: tile k, the chain of units from w on, the unit in it, and its stage.
typedef struct { int k, w, unit, stage; } wide_at;

// A unit of x in a stage: scales [row][2], then [plane][row][16 bytes each]. A row is ordered as lanes read it: the
// e-th eights of the four t together; every second row has the halves of 128 bytes swapped, so that lanes of two rows
// read all banks. A thread copies the same 16 bytes of some rows of each unit: kept here for a block's tile are where
// they begin in x and in the stage, and the thread's scale. NONE: there is none.
enum { MOST_COPIES = 8, NONE = -1 };
typedef struct { uint4 from[MOST_COPIES / 4][THREADS]; uint32_t to[THREADS], scale[THREADS]; } row_copies;
static __device__ __forceinline__ int row_chunks(int dtype) {       // log2 of the 16 bytes in a row of a unit
    return dtype == DSPARK_F32 ? 2 : dtype < DSPARK_FP8 ? 3 : dtype == DSPARK_FP8 ? 4 : 5;
}
static __device__ __noinline__ void plan_rows(const wide_tile &t, row_copies &c) {
    int of = t.s.dtype, chunks = row_chunks(of), most = of == DSPARK_FP8, me = (int)threadIdx.x, i = me / 2,
        q = me & ((1 << chunks) - 1), first = me >> chunks, each = THREADS >> chunks,
        passes = (8 * t.eights + each - 1) / each, scales = of == DSPARK_FP4 ? 2 : of == DSPARK_FP8;
    int place = (q >> (most + 2) << most | (q & ((1 << most) - 1))) * 64 + (q >> most & 3) * 16;
    if (of != DSPARK_F32) place ^= (first & 1) * 64;
    c.to[me] = (uint32_t)((first << (chunks + 4)) + place + (scales ? MOST_COLUMNS * 2 * 4 : 0));
    c.scale[me] = i < t.live && me % 2 < scales ? (uint32_t)(t.at[i] / 128 + me % 2) : (uint32_t)NONE;
    for (int half = 0; half < MOST_COPIES / 4; half++) {
        uint32_t from[4];
        UNROLL
        for (int k = 0; k < 4; k++) {
            int plane = (half * 4 + k) / passes, r = first + (half * 4 + k) % passes * each;
            from[k] = (uint32_t)NONE;
            if (plane < t.x.planes && r < t.live)
                from[k] = (uint32_t)((size_t)plane * t.x.plane + (size_t)(t.at[r] + q * 8));
        }
        c.from[half][me] = make_uint4(from[0], from[1], from[2], from[3]);
    }
}
static __device__ __forceinline__ void ask_rows(shared_at to, const wide_tile &t, int unit, const row_copies &c) {
    int of = t.s.dtype, chunks = row_chunks(of), me = (int)threadIdx.x;
    const uint16_t *x = t.x.x + ((size_t)unit << (chunks + 3));
    shared_at at = to + (int)c.to[me];
    uint32_t scale = c.scale[me];
    if (scale != (uint32_t)NONE) copy4<0>(to + me * 4, t.x.scale + (scale + (uint32_t)(unit << (of == DSPARK_FP4))));
    UNROLL
    for (int half = 0; half < MOST_COPIES / 4; half++) {
        const uint4 from = c.from[half][me];
        if (half && t.x.planes * t.eights < 16) break;      // only FP8 of 64 rows in two planes has more than four
        UNROLL
        for (int k = 0; k < 4; k++) {
            if (word(from, k) != (uint32_t)NONE) copy16<0>(at, x + word(from, k));
            at += of == DSPARK_F32 ? 2048 : 4096;
        }
    }
}
template <int DTYPE, int NT> struct from_stage {
    const char *x;
    __device__ __forceinline__ uint4 operator()(int p, int nt, int i) const {
        enum { ROW = weights_of<DTYPE>::IN_UNIT * 2, SCALES = DTYPE >= DSPARK_FP8 ? MOST_COLUMNS * 2 * 4 : 0 };
        int g = (int)threadIdx.x % WARP / 4, from = ROW < 128 ? 0 : i / 2 * 128 + ((i & 1) ^ (g & 1)) * 64;
        from += (int)lane_eight<DTYPE>() * 2;
        return eight_at<DTYPE>((const uint16_t *)(const void *)(x + SCALES + ((p * NT + nt) * 8 + g) * ROW + from));
    }
    __device__ __forceinline__ void scales(int nt, float (*s)[2]) const {
        const float4 all = *(const float4 *)(const void *)(x + (nt * 8 + (int)threadIdx.x % 4 * 2) * 8);
        s[0][0] = all.x, s[0][1] = all.y, s[1][0] = all.z, s[1][1] = all.w;
    }
};

// Issues copies of the next unit of the block's n tiles to its stage.
template <int MT> static __device__ __forceinline__ void ask_wide(const wide_tile *known, int n, wide_at &a,
                                                                  char *bytes, row_copies &rows) {
    int first = (int)threadIdx.x / WARP * MT;
    if (a.k < n) {
        const wide_tile &t = known[a.k % TILES_KNOWN];
        shared_at stage = place_in(bytes + a.stage * stage_bytes(MT));
        int units = t.s.pitch / UNIT;
        UNROLL
        for (int mt = 0; mt < MT; mt++)
            if (first + mt < t.s.tiles)
                ask_unit(stage + (first + mt) * SLOT_BYTES, unit_at(t.s, first + mt, a.unit), unit_bytes(t.s.dtype));
        if (!a.w && !a.unit) plan_rows(t, rows);
        ask_rows(stage + stage_rows(MT), t, a.unit, rows);
        for (a.unit += WARPS; a.unit >= units && a.w < WARPS - 1;) a.unit = ++a.w;
        if (a.unit >= units) a.k++, a.w = a.unit = 0;
    }
    copies_close();
    a.stage = a.stage + 1 == wide_stages(MT) ? 0 : a.stage + 1;
}

template <int MT, int NT>
static __device__ __forceinline__ void put_wide(const wide_tile &t, float (*total)[NT][4]) {
    int lane = (int)threadIdx.x % WARP, m0 = t.s.m0 + (int)threadIdx.x / WARP * MT * TILE + lane / 4;
    UNROLL
    for (int nt = 0; nt < NT; nt++)
        UNROLL
        for (int half = 0; half < 2; half++) {
            int column = nt * 8 + lane % 4 * 2 + half;
            if (column >= t.live) continue;
            float *y = t.y + (size_t)t.to[column] * (size_t)t.y_stride;
            UNROLL
            for (int mt = 0; mt < MT; mt++)
                UNROLL
                for (int i = 0; i < 2; i++) {
                    int out = m0 + mt * TILE + 8 * i;
                    float sum = total[mt][nt][2 * i + half];
                    if (out < t.s.rows) y[out] = t.add ? y[out] + sum : sum;
                }
        }
}
// Tile k of the block's n. a: what to copy next.
template <int DTYPE, int MT, int NT, int X>
static __device__ __forceinline__ void wide_sums(const wide_tile *known, int k, int n, wide_at &a, int &stage,
                                                 char *bytes, row_copies &rows) {
    enum { SUMS = weights_of<DTYPE>::SUMS };
    const wide_tile &t = known[k % TILES_KNOWN];
    int units = t.s.pitch / UNIT, first = (int)threadIdx.x / WARP * MT, live = first < t.s.tiles;
    int late = threadIdx.x >= THREADS / 2;      // of a scheduler's two warps one copies, the other multiplies
    float total[MT][NT][4];
    zero<MT * NT * 4>(&total[0][0][0]);
    for (int w = 0; w < WARPS; w++) {
        float acc[SUMS][MT][NT][4];
        zero<SUMS * MT * NT * 4>(&acc[0][0][0][0]);
        for (int unit = w; unit < units; unit += WARPS) {
            const char *from = bytes + stage * stage_bytes(MT);
            uint32_t scale[MT];
            piece q[MT];
            UNROLL
            for (int mt = 0; mt < MT; mt++)
                scale[mt] = DTYPE == DSPARK_FP8 ? scales_of(t.s, least(first + mt, t.s.tiles - 1))[unit] : 0;
            copies_wait<wide_stages(MT) - 2>();
            __syncthreads();        // all see the stage, and are done with the one before it
            if (!late) ask_wide<MT>(known, n, a, bytes, rows);
            UNROLL
            for (int mt = 0; live && mt < MT; mt++)
                take_piece<DTYPE>(q[mt], place_in(from + (first + mt) * SLOT_BYTES), scale[mt]);
            if (live) multiply<DTYPE, MT, NT, X>(q, from_stage<DTYPE, NT>{ from + stage_rows(MT) }, acc);
            if (late) ask_wide<MT>(known, n, a, bytes, rows);
            stage = stage + 1 == wide_stages(MT) ? 0 : stage + 1;
        }
        UNROLL
        for (int mt = 0; mt < MT; mt++)
            UNROLL
            for (int nt = 0; nt < NT; nt++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    float sum = acc[0][mt][nt][i];
                    for (int p = 1; p < SUMS; p++) sum += acc[p][mt][nt][i];
                    total[mt][nt][i] += sum;
                }
    }
    if (live) put_wide<MT, NT>(t, total);
}
// Runs a block's share of tiles, in turn, by all threads: find(i, tile) says what tile i is, ask(known, n) copies the
// next unit of its n tiles, `ahead` units before sums(known, k, n) computes tile k.
template <class T, class F, class A, class S>
static __device__ __forceinline__ void run_tiles(int n_tiles, int ahead, const F &find, const A &ask, const S &sums) {
    __shared__ T known[TILES_KNOWN];
    int n = n_tiles > (int)blockIdx.x ? (n_tiles - (int)blockIdx.x - 1) / (int)gridDim.x + 1 : 0;
    for (int k = 0; k < TILES_KNOWN - 1 && k < n; k++)
        find((int)(blockIdx.x + (unsigned)k * gridDim.x), known[k]);
    __syncthreads();
    for (int i = 0; i < ahead; i++) ask(known, n);
    for (int k = 0; k < n; k++) {
        int next = k + TILES_KNOWN - 2;     // the last that may be asked for; takes tile k - 2's place
        if (k && next < n) find((int)(blockIdx.x + (unsigned)next * gridDim.x), known[next % TILES_KNOWN]);
        sums(known, k, n);
    }
    copies_wait<0>();
}
template <int MT, class F> static __device__ __forceinline__ void wide(int n_tiles, char *bytes, const F &find) {
    __shared__ row_copies rows;
    int stage = 0;
    wide_at a = { 0, 0, 0, 0 };
    run_tiles<wide_tile>(n_tiles, wide_stages(MT) - 1, find, [&](const wide_tile *known, int n) {
        ask_wide<MT>(known, n, a, bytes, rows);
    }, [&](const wide_tile *known, int k, int n) {
        const wide_tile &t = known[k % TILES_KNOWN];
        switch (t.x.planes == 1 ? -t.s.dtype : t.s.dtype) {
        case -DSPARK_FP8:
            if (t.eights == 8 && MT == 2) wide_sums<DSPARK_FP8, MT, 4 * MT, 1>(known, k, n, a, stage, bytes, rows);
            else wide_sums<DSPARK_FP8, MT, 4, 1>(known, k, n, a, stage, bytes, rows);
            break;
        case DSPARK_FP8:
            if (t.eights == 8 && MT == 2) wide_sums<DSPARK_FP8, MT, 4 * MT, 2>(known, k, n, a, stage, bytes, rows);
            else wide_sums<DSPARK_FP8, MT, 4, 2>(known, k, n, a, stage, bytes, rows);
            break;
        case -DSPARK_FP4: wide_sums<DSPARK_FP4, MT, 4, 1>(known, k, n, a, stage, bytes, rows); break;
        case DSPARK_FP4: wide_sums<DSPARK_FP4, MT, 2, 2>(known, k, n, a, stage, bytes, rows); break;
        case DSPARK_F16: wide_sums<DSPARK_F16, MT, 4, 3>(known, k, n, a, stage, bytes, rows); break;
        case DSPARK_F32: wide_sums<DSPARK_F32, MT, 4, 3>(known, k, n, a, stage, bytes, rows); break;
        default: wide_sums<DSPARK_BF16, MT, 4, 3>(known, k, n, a, stage, bytes, rows);
        }
    });
}
static __device__ __forceinline__ void set_tile(span &s, const matrix &w, int m0, int end, int outputs, int of) {
    set_span(s, w, m0, blocks_of(least(end - m0, outputs), TILE), of);
    s.rows = end;
}

static __host__ __device__ __forceinline__ int wide_columns(const job &j, int mt) {
    return 8 * wide_eights(mt, j.w.dtype, j.x.planes);
}
template <class T, class C>
static __device__ __forceinline__ void find_job(const linears_args &p, int n, int i, int outputs, const C &columns,
                                                T &t) {
    int k = job_of(p, i), me = (int)threadIdx.x;
    if (me >= (int)(sizeof t.at / sizeof *t.at)) return;
    const job &j = p.jobs[k];
    int each = columns(j), along = blocks_of(p.rows, each), group, m0, r0, r;
    i -= p.first[k], r0 = i % along * each, i /= along;
    group = j.group ? j.group : j.w.rows, along = blocks_of(group, outputs);
    m0 = i / along * group + i % along * outputs, r = most(0, least(r0 + me, n - 1));
    t.at[me] = r * j.x_stride + (j.group ? i / along * j.x_group : 0), t.to[me] = j.y_rows ? j.y_rows[r] : r;
    if (me) return;
    set_tile(t.s, j.w, m0, (i / along + 1) * group, outputs, k);
    t.live = least(each, n - r0), t.eights = each == 64 && t.live <= 32 ? 4 : each / 8, t.x = j.x;
    t.y = j.y, t.y_stride = j.y_stride, t.add = j.add;
}
template <int MT> static __global__ void __launch_bounds__(THREADS, MT == 1 ? 2 : 1)
linears_wide(const linears_args p) {
    SHARED_BYTES(bytes);
    grid_go();
    int n = *p.n_rows;
    grid_wait();
    all_post_comb(p, n);
    wide<MT>(p.n_items, bytes, [&](int i, wide_tile &t) {
        find_job(p, n, i, wide_outputs(MT), [](const job &j) { return wide_columns(j, MT); }, t);
    });
}

// For experts. before[a]: tiles before the a-th active one's; the shared one is last.
enum { EXPERT_TILES = 2 };
typedef struct { const expert *of; int first, n, eights, along; } expert_part;
static __device__ expert_part part_of(const experts_args &p, int a) {
    expert_part o = { p.shared, 0, p.n->n_rows, 4 * EXPERT_TILES, 0 };
    if (a < p.active[0]) {
        int e = p.active[1 + a];
        o.of = p.experts + e, o.first = p.first[e], o.n = p.first[e + 1] - o.first;
    }
    if (!o.of) return o;
    for (int i = 0; i < p.n_which; i++) if (o.of->w[p.which + i].dtype != DSPARK_FP8) o.eights = 4;
    o.along = blocks_of(o.of->w[p.which].rows, wide_outputs(EXPERT_TILES));
    return o;
}
// before[i]: tiles, of(i) each, of things before i. Returned: all.
template <class F> static __device__ __forceinline__ int tiles_before(int n, int *before, const F &of) {
    int tiles = 0, some;
    for (int a0 = 0; a0 < n; a0 += THREADS) {
        int a = a0 + (int)threadIdx.x, at = tiles + block_before(a < n ? of(a) : 0, &some);
        if (a < n) before[a] = at;
        tiles += some;
    }
    __syncthreads();
    return tiles;
}
// The thing, 0 .. n, that has tile i. One without tiles is never it, unless it is the last.
static __device__ __forceinline__ int last_before(const int *before, int n, int i) {
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (before[middle] <= i) low = middle;
        else high = middle - 1;
    }
    return low;
}
static __device__ void find_expert(const experts_args &p, const int *before, int i, wide_tile &t) {
    int me = (int)threadIdx.x, K = p.c.K;
    if (me >= MOST_COLUMNS) return;
    int low = last_before(before, p.active[0], i);
    expert_part o = part_of(p, low);
    int rows = blocks_of(o.n, 8 * o.eights), m, r0, which, at, r, slot, shared = low == p.active[0];
    i -= before[low], r0 = i % rows * 8 * o.eights, i /= rows, which = i / o.along;
    m = i % o.along * wide_outputs(EXPERT_TILES), at = least(r0 + me, o.n - 1);
    if (!shared) at = p.list[o.first + at];
    r = shared ? at : at / K, slot = shared ? K : at % K;
    t.to[me] = r * p.n_slots + slot, t.at[me] = (p.x_by_slot ? t.to[me] : r) * p.x.stride;
    if (me) return;
    const matrix &w = o.of->w[p.which + which];
    set_tile(t.s, w, m, w.rows, wide_outputs(EXPERT_TILES), which);
    t.live = least(8 * o.eights, o.n - r0), t.eights = t.live <= 32 ? 4 : o.eights;
    t.y = p.y[which], t.y_stride = p.y_stride, t.add = 0;
    t.x = operand_of(p.x, w.dtype, 0);
}
// Bound, of 160 experts: at 512 rows bytes, w1 w3 1,430 MB (480 us), w2 720 (240); at 2,048, 77 an expert, products at
// 600 TFLOP/s, 690 us and 400.
static __global__ void __launch_bounds__(THREADS, 1) experts_wide(const experts_args p) {
    __shared__ int before[MAX_EXPERTS + 1];
    SHARED_BYTES(bytes);
    grid_go();
    grid_wait();
    int n = tiles_before(p.active[0] + 1, before, [&](int a) {
        expert_part o = part_of(p, a);
        return blocks_of(o.n, 8 * o.eights) * o.along * p.n_which;
    });
    wide<EXPERT_TILES>(n, bytes, [&](int i, wide_tile &t) { find_expert(p, before, i, t); });
}

// ---- products of whole blocks of a prompt -----------------------------------------------------
// With fast_prefill, by wgmma: what cuBLASLt does not take, except F16 and F32. A block has 128 outputs and 64 or 128
// rows. Weights are decoded in registers, half a unit while the half before is multiplied, also if that is the unit
// before's; x is in panels of 64 rows of 128 bytes. That of FP4 and FP8 lies in panels in global memory, too: a unit of
// a panel is one copy, by one thread, which nobody's later copies or stores wait for, as they would at a fence.
//   FP4, the routed experts: as E4M3, the scales of 16 rows and four blocks of 32 relative to the largest of them, so
//     that 128 products are one sum. A code whose scale is below 2^-14 of the largest loses bits, as the sum does.
//   FP8, wo_a: as f16, with the first plane of its inputs: 11 bits where the released kernels have 8.
//   bf16: as it is, with the first plane of its inputs, as those kernels.
// Bound: products. FP4: 1.98 PFLOP/s, 1,024 clocks for a unit of 256 k and 128 rows; 1.3 with the 755 instructions that
// each of a scheduler's two warps issues for it, in which time its 49 KB are 33 bytes a clock from L2 (512 rows in 160
// experts: bytes, as experts_wide). Others: .99 PFLOP/s, 1,024 clocks for a unit of FP8, 512 of bf16; us of 512 rows:
// wo_a 35, the compressors 9, but one tile's 64 units 19. Measured, us of 2,048 rows: w1 w3 of 16 experts 752, w2 383
// (540 TFLOP/s, 3,600 clocks a unit), wo_a 293.

// Stages of x, slots of a warp's weights; units that copies are ahead; 6 2^6 is an E4M3.
enum { PANEL_STAGES = 4, PANEL_SLOTS = 2, PANEL_AHEAD = 2, FP8_ROOM = 6 };
// Per dtype: how many 128 bytes of a row of x a unit has; scales of x in a unit; is x in panel order; the dtype whose
// layout a lane's piece has: for FP8 four bytes of each 16, for bf16 16 of each 64.
template <int DTYPE> struct panels_of { enum { ALONG = 1, SCALES = 0, BULK = 0, PIECE = DSPARK_FP8 }; };
template <> struct panels_of<DSPARK_FP8> { enum { ALONG = 2, SCALES = 1, BULK = 1, PIECE = DSPARK_BF16 }; };
template <> struct panels_of<DSPARK_FP4> { enum { ALONG = 2, SCALES = 2, BULK = 1, PIECE = DSPARK_FP4 }; };
// A stage: x [panel][ALONG][64][128 bytes] and its scales [panel][SCALES][64]. Behind the stages are their barriers,
// then the warps' rings of slots.
enum { PANEL_BYTES = PANEL * UNIT, STAGE_BARRIER = 16 };
static __host__ __device__ constexpr int panel_x_bytes(int panels) { return panels * 2 * PANEL_BYTES; }
static __host__ __device__ constexpr int panel_stage_bytes(int panels) { return panel_x_bytes(panels) + 1024; }
static __host__ __device__ constexpr int panel_bytes(int panels) {
    return 1024 + PANEL_STAGES * (panel_stage_bytes(panels) + STAGE_BARRIER) + WARPS * PANEL_SLOTS * RING_SLOT;
}
template <int PANELS> static __device__ __forceinline__ shared_at panel_barrier(const char *bytes, int stage) {
    return place_in(bytes + PANEL_STAGES * panel_stage_bytes(PANELS)) + stage * STAGE_BARRIER;
}
template <int PANELS> static __device__ __forceinline__ shared_at panel_slot(const char *bytes, uint32_t turn) {
    return panel_barrier<PANELS>(bytes, PANEL_STAGES) +
           (int)(threadIdx.x / WARP * PANEL_SLOTS + turn % PANEL_SLOTS) * RING_SLOT;
}
// The place in panel order of the first row of expert e, at `first` in the list: each begins a panel. With f = 64 q + s
// before e, and n in it: n fills blocks_of(n, 64) <= (s + n) / 64 + 1 panels, and the next begins that many further.
static __device__ __forceinline__ int expert_place(int first, int e) { return (first / PANEL + e) * PANEL; }
static int places_of(int chosen, int E) { return blocks_of(chosen, PANEL) * PANEL + E * PANEL; }
// A tile may have two parts, the same outputs of w1 and w3. place: its first row's in panel order, and bytes of a row
// there. weight: each row's routing weight.
struct panel_tile : tile_of<2 * PANEL> {
    span second;
    int place, pitch;
    float weight[2 * PANEL];
};

// E4M3 of the eight FP4 magnitudes times 2^(FP8_ROOM - i).
typedef uint2 fp8_table[256];
static __device__ void fill_table(fp8_table table) {
    const float value[8] = { 0, .5f, 1, 1.5f, 2, 3, 4, 6 };
    uint32_t w[2] = { 0, 0 };
    for (int i = 0; i < 8; i++)
        w[i / 4] |= e4m3_code(nearest_e4m3(value[i] * exp2i(FP8_ROOM - least(100, (int)threadIdx.x)))) << i % 4 * 8;
    table[threadIdx.x] = make_uint2(w[0], w[1]);
}
// Eight `arranged` codes as 2, 0, 3, 1; mirrored, as 6, 4, 7, 5.
static __device__ __forceinline__ uint32_t fp8_of(uint32_t w, const uint2 &table) {
    uint32_t z = w >> 1 & 0x07070707u;
    return bytes_of(table, __byte_perm(z | z >> 4, 0, 0x20)) | (w & 0x80808080u);
}
// Half c of a unit, for mma_panel. Returned: the scale that its sums take.
template <int DTYPE>
static __device__ __forceinline__ float panel_weights(const piece &q, int c, const uint2 *, uint32_t (*a)[4]) {
    UNROLL
    for (int b = 0; b < 4; b++)
        UNROLL
        for (int half = 0; half < 2; half++)
            if (DTYPE == DSPARK_FP8) {
                const uint2 two = f16_of_e4m3(word(q.v[2 * c + b / 2], b % 2 * 2 + half));
                a[b][half] = two.x, a[b][2 + half] = two.y;
            } else {
                const uint4 &v = q.v[b / 2 * 2 + half];
                a[b][half] = word(v, b % 2 * 2), a[b][2 + half] = word(v, b % 2 * 2 + 1);
            }
    return DTYPE == DSPARK_FP8 ? e8m0(q.scale.x) : 1;
}
template <> __device__ __forceinline__ float panel_weights<DSPARK_FP4>(const piece &q, int c, const uint2 *table,
                                                                       uint32_t (*a)[4]) {
    uint32_t scale[4][2], largest = 0;
    UNROLL
    for (int i = 0; i < 8; i++) {
        scale[i / 2][i % 2] = word(q.scale, 2 * c + i / 4) >> i % 4 * 8 & 255;
        largest = scale[i / 2][i % 2] > largest ? scale[i / 2][i % 2] : largest;
    }
    largest = __reduce_max_sync(ALL, largest);
    UNROLL
    for (int b = 0; b < 4; b++)
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint32_t w = word(q.v[2 * c + b / 2], b % 2 * 2 + half);
            const uint2 by = table[largest - scale[b][half]];
            a[b][half] = fp8_of(w, by), a[b][2 + half] = fp8_of(__brev(w), by);
        }
    return exp2i(most(-126, (int)largest - 127 - FP4_SHIFT - FP8_ROOM));
}

// A unit's weights are asked for after its x, between products and decoding: as that is a branch, ptxas does not put
// decoding between one product and the next.
struct panel_at : wide_at { const uint8_t *weights; shared_at slot; };
template <int DTYPE> static __device__ __forceinline__ void ask_weights(const panel_at &a) {
    if (a.weights) ring_ask(a.slot, a.weights, unit_bytes(DTYPE));
}
// Issues copies of a unit of x to a stage.
template <int DTYPE, int PANELS>
static __device__ __forceinline__ void gather_panels(const panel_tile &t, int unit, shared_at stage) {
    enum { IN_ROW = 8 * panels_of<DTYPE>::ALONG, ROWS = THREADS / IN_ROW, EACH = PANELS * PANEL / ROWS,
           X = panels_of<DTYPE>::ALONG * PANEL_BYTES };
    int me = (int)threadIdx.x, q = me % IN_ROW, first = me / IN_ROW;
    shared_at to = stage + in_panel(first, q * 16);
    const uint16_t *x = t.x.x + (size_t)((unit * IN_ROW + q) * 8);
    uint32_t at[EACH];      // no load passes a copy: all of them first
    UNROLL
    for (int k = 0; k < EACH; k++) at[k] = (uint32_t)t.at[first + k * ROWS];
    UNROLL
    for (int k = 0; k < EACH; k++)
        copy16<0>(to + k * ROWS / PANEL * X + k * ROWS % PANEL * UNIT, x + (size_t)at[k]);
}
// The same of x in panel order, and of its scales, counted at the stage's barrier, a copy a warp: one that issues all
// would be late at the block's barrier. Bytes may land before they are expected: the turn waits for that arrival.
// Panels without rows are left out: what the stage has in their place gives columns that nobody reads.
template <int DTYPE, int PANELS>
static __device__ __forceinline__ void copy_panels(const panel_tile &t, int unit, shared_at stage, shared_at barrier) {
    enum { X = panels_of<DTYPE>::ALONG * PANEL_BYTES, SCALES = panels_of<DTYPE>::SCALES * PANEL, BYTES = SCALES * 4 };
    int warp = (int)threadIdx.x / WARP, i = warp / 2, n = least(PANELS, blocks_of(t.live, PANEL));
    if (threadIdx.x % WARP || i >= n) return;
    if (!warp) barrier_expect(barrier, n * (X + BYTES));
    size_t x = (size_t)t.place * (size_t)t.pitch + (size_t)(i * PANEL * t.pitch),
           scale = x / (X / SCALES) + (size_t)(unit * SCALES);
    if (warp % 2) copy_bulk(stage + panel_x_bytes(PANELS) + i * BYTES, t.x.scale + scale, BYTES, barrier);
    else copy_bulk(stage + i * X, (const uint8_t *)t.x.x + x + (size_t)(unit * X), X, barrier);
}
// Issues copies of the next unit's x, and says where its weights are.
template <int DTYPE, int PANELS, int PARTS>
static __device__ __forceinline__ void ask_panels(const panel_tile *known, int n, panel_at &a, char *bytes) {
    a.weights = NULL;
    if (a.k < n) {
        const panel_tile &t = known[a.k % TILES_KNOWN];
        const span &s = PARTS == 2 && a.w ? t.second : t.s;
        shared_at stage = place_in(bytes + a.stage * panel_stage_bytes(PANELS));
        int units = s.pitch / UNIT;
        a.weights = unit_at(s, least((int)threadIdx.x / WARP, s.tiles - 1), a.unit);    // all warps ask: slots turn as
        a.slot = panel_slot<PANELS>(bytes, (uint32_t)a.stage);                          // stages do
        if constexpr (panels_of<DTYPE>::BULK)
            copy_panels<DTYPE, PANELS>(t, a.unit, stage, panel_barrier<PANELS>(bytes, a.stage));
        else gather_panels<DTYPE, PANELS>(t, a.unit, stage);
        if (++a.unit == units) a.w++, a.unit = 0;
        if (a.w == PARTS) a.k++, a.w = 0;
    }
    if (panels_of<DTYPE>::BULK) ring_close();
    else copies_close();
    a.stage = a.stage + 1 == PANEL_STAGES ? 0 : a.stage + 1;
}
// acc += sums times the scales of weights and x.
static __device__ __forceinline__ void enter(float (*acc)[4], const float (*sum)[4], float scale, const float *x) {
    UNROLL
    for (int nt = 0; nt < PANEL / 8; nt++) {
        const float2 two = *(const float2 *)(const void *)(x + nt * 8 + (int)threadIdx.x % 4 * 2);
        const float by[2] = { two.x * scale, two.y * scale };
        UNROLL
        for (int k = 0; k < 4; k++) acc[nt][k] = fmaf(sum[nt][k], by[k % 2], acc[nt][k]);
    }
}
// Waits for the next unit, takes the warp's weights and asks for the x of the unit after the next. Returned: the stage.
// A thread comes to the block's barrier when it has seen the stage land, or its own copies to it, and its warp's
// products of the unit before last are complete, as it has waited for their sums: so behind it all see this stage, and
// that unit's, which is the place of the one asked for, is free, and its barrier has turned. A slot is free when its
// warp has taken it. Each unit is asked for once and waited for once by all, in order: so the parity of a turn is that
// of the barriers of its stage and slot, none is more than one turn ahead, and no copy is left at the end.
template <int DTYPE, int PANELS, int PARTS>
static __device__ __forceinline__ const char *next_stage(const panel_tile *known, int n, panel_at &a,
                                                         uint32_t &turn, char *bytes, piece &q) {
    int at = (int)(turn % PANEL_STAGES);
    const char *stage = bytes + at * panel_stage_bytes(PANELS);
    shared_at slot = panel_slot<PANELS>(bytes, turn);
    if (panels_of<DTYPE>::BULK) barrier_wait(panel_barrier<PANELS>(bytes, at), turn / PANEL_STAGES % 2);
    else copies_wait<PANEL_AHEAD - 1>(), copies_seen();
    __syncthreads();
    ring_wait<0>(slot, turn++ / PANEL_SLOTS % 2);
    take_piece<panels_of<DTYPE>::PIECE>(q, slot, 0);
    ask_panels<DTYPE, PANELS, PARTS>(known, n, a, bytes);
    return stage;
}
// With SUMMED, a step's sums enter acc; with NEXT, the next step is issued, and 2: its sums start at 0. Panel by panel,
// so that the tensor cores have one in hand while the other's sums are entered.
template <int DTYPE, int PANELS, int SUMMED, int NEXT>
static __device__ __forceinline__ void panel_step(float (*acc)[PANEL / 8][4], float (*sum)[PANEL / 8][4], float scale,
                                                  const float *x_scales, const uint32_t (*w)[4], const char *x) {
    enum { SCALES = panels_of<DTYPE>::SCALES };
    UNROLL
    for (int i = 0; i < PANELS; i++) {
        if (SUMMED && (NEXT || i + 1 < PANELS)) mma_panel_wait<PANELS - 1>(sum[i]);
        else if (SUMMED) mma_panel_wait<0>(sum[i]);
        if (SUMMED && SCALES > 0) enter(acc[i], sum[i], scale, x_scales + i * SCALES * PANEL);
        if (NEXT) mma_panel<DTYPE, NEXT == 2>(sum[i], w, place_in(x + i * panels_of<DTYPE>::ALONG * PANEL_BYTES));
    }
}
// One part of tile k of the block's n, in steps of half a unit; while one is multiplied, the next one's weights are
// decoded. bf16 adds straight to acc; FP4 sums 128 products of each half, FP8 both halves, then scales. ptxas would
// serialize products that are read in another turn of the loop than they are issued in.
template <int DTYPE, int PANELS, int PARTS>
static __device__ __forceinline__ void panel_sums(const panel_tile *known, int k, int n, panel_at &a, uint32_t &turn,
                                                  char *bytes, const uint2 *table, float (*acc)[PANEL / 8][4]) {
    enum { ALONG = panels_of<DTYPE>::ALONG, SCALED = panels_of<DTYPE>::SCALES > 0, EACH = DTYPE == DSPARK_FP4 };
    const panel_tile &t = known[k % TILES_KNOWN];
    const uint8_t *scales = DTYPE == DSPARK_FP8 ? scales_of(t.s, least((int)threadIdx.x / WARP, t.s.tiles - 1)) : NULL;
    int units = t.s.pitch / UNIT;
    uint32_t w[2][4][4] = {};
    float some[PANELS][PANEL / 8][4], (*sum)[PANEL / 8][4] = SCALED ? some : acc, scale[2];
    piece q;
    const char *x = next_stage<DTYPE, PANELS, PARTS>(known, n, a, turn, bytes, q);
    q.scale.x = DTYPE == DSPARK_FP8 ? scales[0] : q.scale.x;
    zero<PANELS * PANEL / 2>(&acc[0][0][0]);
    if (ALONG == 2) scale[0] = panel_weights<DTYPE>(q, 0, table, w[0]);
    for (int unit = 1; unit <= units; unit++) {
        const float *x_scales = (const float *)(const void *)(x + panel_x_bytes(PANELS));
        uint32_t next_scale = DTYPE == DSPARK_FP8 ? scales[least(unit, units - 1)] : 0;
        if (ALONG == 1) scale[0] = panel_weights<DTYPE>(q, 0, table, w[0]);     // nothing to decode
        panel_step<DTYPE, PANELS, 0, 1 + SCALED>(acc, sum, 1, NULL, w[0], x);
        ask_weights<DTYPE>(a);
        if (ALONG == 2) {
            scale[1] = panel_weights<DTYPE>(q, 1, table, w[1]);
            panel_step<DTYPE, PANELS, EACH, 1 + EACH>(acc, sum, scale[0], x_scales, w[1], x + PANEL_BYTES);
            mma_panel_read<PANELS>(w[0]);
            if (EACH) x_scales += PANEL;
            scale[0] = scale[1];
        }
        float last = scale[0];
        if (unit < units) {
            x = next_stage<DTYPE, PANELS, PARTS>(known, n, a, turn, bytes, q);
            if (DTYPE == DSPARK_FP8) q.scale.x = next_scale;
            if (ALONG == 2) scale[0] = panel_weights<DTYPE>(q, 0, table, w[0]);
        }
        panel_step<DTYPE, PANELS, 1, 0>(acc, sum, last, x_scales, NULL, NULL);
    }
}
// put(tile, part, its sums) of each part.
template <int DTYPE, int PANELS, int PARTS, class F, class P>
static __device__ __forceinline__ void panels(int n_tiles, char *bytes, const uint2 *table, const F &find,
                                              const P &put) {
    uint32_t turn = 0;
    panel_at a = {};
    if (panels_of<DTYPE>::BULK && (int)threadIdx.x < PANEL_STAGES)
        barrier_open(panel_barrier<PANELS>(bytes, (int)threadIdx.x));
    ring_open(panel_slot<PANELS>(bytes, 0), PANEL_SLOTS);       // copies see all barriers
    run_tiles<panel_tile>(n_tiles, PANEL_AHEAD, find, [&](const panel_tile *known, int n) {
        ask_panels<DTYPE, PANELS, PARTS>(known, n, a, bytes);
        ask_weights<DTYPE>(a);
    }, [&](const panel_tile *known, int k, int n) {
        for (int part = 0; part < PARTS; part++) {
            float acc[PANELS][PANEL / 8][4];
            panel_sums<DTYPE, PANELS, PARTS>(known, k, n, a, turn, bytes, table, acc);
            put(known[k % TILES_KNOWN], part, acc);
        }
    });
}
template <int PANELS>
static __device__ __forceinline__ void put_panels(const panel_tile &t, float (*acc)[PANEL / 8][4]) {
    int lane = (int)threadIdx.x % WARP, m0 = t.s.m0 + (int)threadIdx.x / WARP * TILE + lane / 4,
        low = m0 < t.s.rows, high = m0 + 8 < t.s.rows, stride = t.y_stride, live = t.live;
    float *y = t.y + m0;
    UNROLL
    for (int i = 0; i < PANELS; i++) {
        int to[PANEL / 4];          // read at once, as no load passes a store
        UNROLL
        for (int k = 0; k < PANEL / 4; k++) to[k] = t.to[i * PANEL + k / 2 * 8 + lane % 4 * 2 + k % 2];
        UNROLL
        for (int k = 0; k < PANEL / 4; k++) {
            int column = i * PANEL + k / 2 * 8 + lane % 4 * 2 + k % 2;
            float *at = y + (size_t)to[k] * (size_t)stride;
            if (column < live && low) at[0] = acc[i][k / 2][k % 2];
            if (column < live && high) at[8] = acc[i][k / 2][2 + k % 2];
        }
    }
}

// Of x in panel order: a tile's first row is its place, its group's numbers begin at whole chunks.
static __device__ __forceinline__ void find_panels(const job &j, panel_tile &t) {
    int from = t.at[0] % j.x_stride;
    t.place = t.at[0] / j.x_stride, t.pitch = j.x_stride * 2;
    t.x.x += (size_t)from * PANEL, t.x.scale += from / 128 * PANEL;
}
template <int DTYPE, int PANELS> static __global__ void __launch_bounds__(THREADS, 1)
linears_whole(const linears_args p) {
    SHARED_BYTES(shared);
    grid_go();
    int n = *p.n_rows;
    grid_wait();
    all_post_comb(p, n);
    panels<DTYPE, PANELS, 1>(p.n_items, panel_room(shared), NULL, [&](int i, panel_tile &t) {
        find_job(p, n, i, WARPS * TILE, [](const job &) { return PANELS * PANEL; }, t);
        if (panels_of<DTYPE>::BULK && threadIdx.x == 0) find_panels(p.jobs[t.s.of], t);
    }, [&](const panel_tile &t, int, float (*acc)[PANEL / 8][4]) { put_panels<PANELS>(t, acc); });
}

typedef struct {
    experts_args e;
    const uint8_t *x;               // by place, in panel order, as expert_codes makes them
    const float *x_scale, *weight;  // [rows][K]: weight
    uint8_t *act;                   // what w1 and w3 give w2, as its x
    float *act_scale;
    int pitch, act_pitch;           // bytes of a row
} whole_args;
// The active experts: tiles before each, where its rows begin in the list, its number. The last's end follows.
typedef struct { int before[MAX_EXPERTS + 1], first[MAX_EXPERTS + 1]; uint16_t expert[MAX_EXPERTS]; } active_experts;
// Tile i: by expert, then outputs, then rows. Two parts: w1 and w3.
template <int PANELS, int PARTS>
static __device__ void find_whole(const whole_args &p, const active_experts &of, int n_active, int i, panel_tile &t) {
    int a = last_before(of.before, n_active - 1, i), me = (int)threadIdx.x, K = p.e.c.K, first = of.first[a],
        n = of.first[a + 1] - first, rows = blocks_of(n, PANELS * PANEL), r0, at, m0;
    const matrix *w = p.e.experts[of.expert[a]].w + p.e.which;
    if (me >= PANELS * PANEL) return;
    i -= of.before[a], r0 = i % rows * PANELS * PANEL, m0 = i / rows * WARPS * TILE;
    at = p.e.list[first + least(r0 + me, n - 1)];
    t.to[me] = at / K * p.e.n_slots + at % K;
    if (PARTS == 2) t.weight[me] = p.weight[at];
    if (me) return;
    set_tile(t.s, w[0], m0, w[0].rows, WARPS * TILE, 0);
    if (PARTS == 2) set_tile(t.second, w[1], m0, w[1].rows, WARPS * TILE, 0);
    t.live = least(PANELS * PANEL, n - r0), t.y = p.e.y[0], t.y_stride = p.e.y_stride;
    t.x.x = (const uint16_t *)(const void *)p.x, t.x.scale = p.x_scale;
    t.place = expert_place(first, of.expert[a]) + r0, t.pitch = p.pitch;
}
template <int PANELS, int PARTS, class P>
static __device__ __forceinline__ void whole_experts(const whole_args &p, char *bytes, const P &put) {
    __shared__ active_experts of;
    __shared__ fp8_table table;
    int n, n_active;
    grid_go();
    fill_table(table);
    grid_wait();
    n_active = p.e.active[0];
    n = tiles_before(n_active, of.before, [&](int a) {
        int e = p.e.active[1 + a], end = p.e.first[e + 1];
        of.expert[a] = (uint16_t)e, of.first[a] = p.e.first[e];
        if (a + 1 == n_active) of.first[a + 1] = end;
        return blocks_of(end - of.first[a], PANELS * PANEL) *
               blocks_of(p.e.experts[e].w[p.e.which].rows, WARPS * TILE);
    });
    panels<DSPARK_FP4, PANELS, PARTS>(n, bytes, table, [&](int i, panel_tile &t) {
        find_whole<PANELS, PARTS>(p, of, n_active, i, t);
    }, put);
}
template <int PANELS> static __global__ void __launch_bounds__(THREADS, 1) experts_whole(const whole_args p) {
    SHARED_BYTES(shared);
    whole_experts<PANELS, 1>(p, panel_room(shared), [&](const panel_tile &t, int, float (*acc)[PANEL / 8][4]) {
        put_panels<PANELS>(t, acc);
    });
}

// w1 and w3 with the SwiGLU: a block computes the same 128 outputs of both, keeps w1's in bf16 while it computes w3's,
// and rounds the SwiGLU of both, a block of 128, to w2's input.
static __device__ __forceinline__ int code_place(int k) {       // of a code among 32, as `codes` places it
    return k / 8 * 4 + k / 4 % 2 * 16 + (0x2031 >> k % 4 * 4 & 3);
}
template <int PANELS>
static __device__ __forceinline__ void put_gates(float (*acc)[PANEL / 8][4], uint32_t (*gates)[THREADS]) {
    UNROLL
    for (int i = 0; i < PANELS * 16; i++)
        gates[i][threadIdx.x] = bf16x2(acc[i / 16][i / 2 % 8][i % 2 * 2], acc[i / 16][i / 2 % 8][i % 2 * 2 + 1]);
}
// Each column's largest in a warp's outputs; the factor that makes it codes.
typedef struct { float largest[WARPS][2 * PANEL], by[2 * PANEL]; } act_scratch;
template <int PANELS>
static __device__ __forceinline__ void put_act(const whole_args &p, const panel_tile &t, float (*acc)[PANEL / 8][4],
                                               uint32_t (*gates)[THREADS], act_scratch &of) {
    int me = (int)threadIdx.x, warp = me / WARP, lane = me % WARP, m0 = t.s.m0 + warp * TILE + lane / 4;
    uint8_t *codes = (uint8_t *)gates;      // a panel each, when all have read their gates
    float limit = swiglu_limit(p.e.c), a[PANELS * 16];
    zero<PANELS * 16>(a);
    UNROLL
    for (int i = 0; i < PANELS * 32; i++) {         // k: row m0 or 8 further, and which of two columns
        int k = i % 4, at = i / 4 * 2 + k % 2, column = i / 4 * 8 + lane % 4 * 2 + k % 2;
        uint32_t two = gates[i / 2][me];
        float &x = acc[i / 32][i / 4 % 8][k];
        x = swiglu_of(limit, __uint_as_float(k % 2 ? two & 0xffff0000u : two << 16), x) * t.weight[column];
        if (m0 + k / 2 * 8 >= t.s.rows) x = 0;
        a[at] = fmaxf(a[at], fabsf(x));
    }
    UNROLL
    for (int i = 0; i < PANELS * 16; i++) {
        for (int k = 4; k < WARP; k *= 2) a[i] = fmaxf(a[i], __shfl_xor_sync(ALL, a[i], k));
        if (lane < 4) of.largest[warp][i / 2 * 8 + lane * 2 + i % 2] = a[i];
    }
    __syncthreads();
    if (me < t.live) {
        float largest = 0;
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, of.largest[w][me]);
        int e = fp8_exponent(largest);
        of.by[me] = exp2i(-e);
        p.act_scale[panel_scale(t.place + me, t.s.m0 / 128, p.act_pitch / 128)] =
            largest <= FLT_MAX ? exp2i(e) : HUGE_VALF;
    }
    __syncthreads();
    UNROLL
    for (int i = 0; i < PANELS * 32; i += 2) {
        int r = i / 4 % 8 * 8 + lane % 4 * 2, column = i / 32 * PANEL + r, out = warp * TILE + lane / 4 + i % 4 / 2 * 8,
            k = out / 32 * 32 + code_place(out % 32);
        const float *x = &acc[i / 32][i / 4 % 8][i % 4];
        uint32_t two = e4m3x2(x[0] * of.by[column], x[1] * of.by[column + 1]);
        codes[i / 32 * PANEL_BYTES + in_panel(r, k)] = (uint8_t)two;
        codes[i / 32 * PANEL_BYTES + in_panel(r + 1, k)] = (uint8_t)(two >> 8);
    }
    __syncthreads();
    UNROLL
    for (int i = 0; i < PANELS; i++) {      // a panel with rows belongs to this expert: all of it
        uint8_t *to = p.act + panel_byte(t.place + i * PANEL, t.s.m0, p.act_pitch);
        for (int at = me * 16; i * PANEL < t.live && at < PANEL_BYTES; at += THREADS * 16)
            *(uint4 *)(void *)(to + at) = *(const uint4 *)(const void *)(codes + i * PANEL_BYTES + at);
    }
}
static __host__ __device__ constexpr int gate_bytes(int panels) { return panels * 16 * THREADS * 4; }
template <int PANELS> static __global__ void __launch_bounds__(THREADS, 1) experts_up_whole(const whole_args p) {
    __shared__ act_scratch scratch;
    SHARED_BYTES(shared);
    char *bytes = panel_room(shared) + gate_bytes(PANELS);
    uint32_t (*gates)[THREADS] = (uint32_t (*)[THREADS])(void *)panel_room(shared);
    whole_experts<PANELS, 2>(p, bytes, [&](const panel_tile &t, int part, float (*acc)[PANEL / 8][4]) {
        if (!part) put_gates<PANELS>(acc, gates);
        else put_act<PANELS>(p, t, acc, gates, scratch);
    });
}

// For cuBLASLt, an FP8 matrix by rows.
typedef struct { const uint8_t *from; uint8_t *to; int rows, pitch; } by_rows_args;
static __global__ void __launch_bounds__(THREADS) by_rows(const by_rows_args p) {
    int in_row = p.pitch / 16, n = p.rows * in_row;
    grid_go();
    grid_wait();
    for (int i = (int)(blockIdx.x * THREADS + threadIdx.x); i < n; i += (int)gridDim.x * THREADS)
        ((uint4 *)(void *)p.to)[i] =
            *(const uint4 *)(const void *)(p.from + stored_at(p.pitch, i / in_row, i % in_row * 16));
}

// The codes of eight numbers of a row that put_rounded rounded: exact.
static __device__ __forceinline__ uint2 codes_of(const uint16_t *x) {
    const uint4 w = *(const uint4 *)(const void *)x;
    uint32_t code[2] = { 0, 0 };
    for (int i = 0; i < 8; i++)
        code[i / 4] |= e4m3_code(f16_value(word(w, i / 2) >> i % 2 * 16 & 0xffff)) << i % 4 * 8;
    return make_uint2(code[0], code[1]);
}
// Rounded inputs for cuBLASLt: FP8 codes and a scale per 128.
typedef struct {
    const uint16_t *x;              // [rows][stride], as input.rounded
    const float *x_scales;          // [rows][stride / 128]
    int stride, n;
    uint8_t *codes;                 // [rows][n]
    float *scales;                  // [rows / DSPARK_PROMPT_BLOCK][n / 128][DSPARK_PROMPT_BLOCK]
} codes_args;
static __global__ void __launch_bounds__(THREADS) codes(const codes_args p) {
    int r = (int)blockIdx.x, blocks = (p.n + 127) / 128;
    grid_go();
    grid_wait();
    for (int at = (int)threadIdx.x * 8; at < p.n; at += THREADS * 8) {
        size_t from = (size_t)r * (size_t)p.stride + (size_t)at;
        *(uint2 *)(void *)(p.codes + (size_t)r * (size_t)p.n + (size_t)at) = codes_of(p.x + from);
        if (at % 128 == 0)
            p.scales[((size_t)(r / DSPARK_PROMPT_BLOCK) * (size_t)blocks + (size_t)(at / 128)) * DSPARK_PROMPT_BLOCK +
                     (size_t)(r % DSPARK_PROMPT_BLOCK)] = p.x_scales[from / 128];
    }
}
// The experts' x in panel order: a row's codes at each of its K places. Ordered as panel_weights: of 32, lane t's codes
// 8t .. 8t + 7 go to 4t (codes 2, 0, 3, 1) and 16 + 4t (6, 4, 7, 5). Bound: bytes, 2,048 rows 17 MB read, 50 written.
typedef struct {
    const uint16_t *x;              // [rows][stride], as input.rounded
    const float *x_scales;          // [rows][stride / 128]
    const int *route, *where, *first;
    int stride, K;
    uint8_t *codes;
    float *scales;
} expert_codes_args;
static __global__ void __launch_bounds__(THREADS) expert_codes(const expert_codes_args p) {
    __shared__ int place[MAX_CHOSEN];
    int r = (int)blockIdx.x, me = (int)threadIdx.x;
    grid_go();
    grid_wait();
    if (me < p.K) {
        int e = p.route[r * p.K + me], first = p.first[e];
        place[me] = expert_place(first, e) + p.where[r * p.K + me] - first;
    }
    __syncthreads();
    for (int at = me * 32; at < p.stride; at += THREADS * 32) {
        size_t from = (size_t)r * (size_t)p.stride + (size_t)at;
        float scale = p.x_scales[from / 128];
        uint32_t low[4], high[4];
        for (int t = 0; t < 4; t++) {
            const uint2 code = codes_of(p.x + from + 8 * t);
            low[t] = __byte_perm(code.x, 0, 0x1302), high[t] = __byte_perm(code.y, 0, 0x1302);
        }
        for (int k = 0; k < p.K; k++) {
            size_t to = panel_byte(place[k], at, p.stride);
            *(uint4 *)(void *)(p.codes + to) = make_uint4(low[0], low[1], low[2], low[3]);
            *(uint4 *)(void *)(p.codes + (to ^ 16)) = make_uint4(high[0], high[1], high[2], high[3]);
            if (at % 128 == 0) p.scales[panel_scale(place[k], at / 128, p.stride / 128)] = scale;
        }
    }
}

// ---- experts that lie in host memory ----------------------------------------------------------
// If not all fit, the routed experts live in pinned host memory, and `slots` of them have a copy on the device. Before
// a layer's products the experts it chose get slots, by the clock algorithm: a hand goes round, skips slots this layer
// uses, spares those used since it last came for one round, and takes any other. All of this runs on the device, so a
// pass stays one CUDA graph. Bytes are copied as they are: no bit changes. Bound: bytes over PCIe, 13.4 MB a miss at
// V4-Flash's shape, 270 us at 50 GB/s.

enum { CACHE_HAND, CACHE_NOW, CACHE_MOVES };    // where the hand stands, layers so far, how many move
typedef struct {
    const int *active;
    expert *experts;                // [E] of the layer, as `experts` reads them
    const expert *home;             // [E], in host memory
    const uint8_t *base;            // of expert 0 there; the next follow each slot_bytes
    uint8_t *cache;
    size_t slot_bytes;
    int slots, first;               // first: the layer's expert 0 among those of all layers
    int *slot_of, *owner;           // [all experts], [slots]: one more than the other's number, 0: none
    int *used, *spared;             // [slots]: layer of last use; is it spared a round?
    int *state, *moves;             // CACHE_*; [E]: experts
} cache_args;

static __device__ int free_slot(const cache_args &p, int now) {
    for (;;) {
        int s = p.state[CACHE_HAND];
        p.state[CACHE_HAND] = s + 1 < p.slots ? s + 1 : 0;
        if (p.used[s] == now) continue;
        if (!p.spared[s]) return s;
        p.spared[s] = 0;
    }
}
static __device__ void move_in(const cache_args &p, int e, int now) {
    int s = free_slot(p, now);
    if (p.owner[s]) p.slot_of[p.owner[s] - 1] = 0;
    p.owner[s] = p.first + e + 1, p.slot_of[p.first + e] = s + 1, p.used[s] = now, p.spared[s] = 1;
    for (int i = 0; i < 3; i++) {
        const matrix &m = p.home[e].w[i];
        const uint8_t *from = p.base + (size_t)e * p.slot_bytes;
        uint8_t *to = p.cache + (size_t)s * p.slot_bytes;
        p.experts[e].w[i].data = to + (m.data - from);
        p.experts[e].w[i].scale = m.scale ? to + (m.scale - from) : NULL;
    }
}
static __global__ void __launch_bounds__(THREADS) cache_choose(const cache_args p) {
    int now, n_moves = 0;
    grid_wait();
    now = p.state[CACHE_NOW] + 1;
    for (int a = (int)threadIdx.x; a < p.active[0]; a += THREADS) {
        int s = p.slot_of[p.first + p.active[1 + a]] - 1;
        if (s >= 0) p.used[s] = now, p.spared[s] = 1;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int a = 0; a < p.active[0]; a++) {
        int e = p.active[1 + a];
        if (!p.slot_of[p.first + e]) move_in(p, e, now), p.moves[n_moves++] = e;
    }
    p.state[CACHE_NOW] = now, p.state[CACHE_MOVES] = n_moves;
}
static __global__ void __launch_bounds__(THREADS) cache_fill(const cache_args p) {
    size_t each = p.slot_bytes / sizeof(uint4), step = (size_t)gridDim.x * THREADS;
    grid_wait();
    for (int i = 0; i < p.state[CACHE_MOVES]; i++) {
        int e = p.moves[i];
        const uint4 *from = (const uint4 *)(const void *)(p.base + (size_t)e * p.slot_bytes);
        uint4 *to = (uint4 *)(void *)(p.cache + (size_t)(p.slot_of[p.first + e] - 1) * p.slot_bytes);
        for (size_t k = blockIdx.x * THREADS + threadIdx.x; k < each; k += step) to[k] = from[k];
    }
}

// ---- draws ------------------------------------------------------------------------------------
// A row's token: argmax over the vocabulary of logit / temperature + Gumbel noise, at temperature 0 of the logit; of
// equals the lower token. Blocks pack score and token into one number and the largest wins, in any order. A row with
// NaN, +inf or nothing finite gives none. Bound: .5 MB a row (.2 us), ten rounds of Philox for four tokens: latency. A
// row is weighed first if it has a filter, if a draft may be refused with dspark_verify's probabilities, or if a float
// has no room for logit / temperature plus noise: its largest logit (survey), the cuts of top-k and top-p (sift, a byte
// of the logits at a time), the sum of what stays (weigh). Its scores are dspark_draw's weight / -log u. Weights are
// summed as integers (UNITS), with the same bits in any order. p is not stored: logits and a tally give it, and the
// drafter's are kept for the verifying pass. Bound: latency, 3 launches and 4 for each of the cuts, .5 MB a row each.

typedef struct {
    float temperature, top_p, min_p;        // top_p, min_p, top_k 0: off
    int top_k, purpose, k, draft_row;       // as dspark_device_draw
    unsigned seed[2], at[2];
} draw_row;
// A row's distribution: p = e / sum, e = exp((logit - max) / temperature), of tokens with a logit above the cut, or at
// it and an id up to cut_id, and with e >= min_p.
typedef struct {
    double max;                             // NaN: no token
    unsigned long long sum, before, limit;  // of what stays; while cutting: above the prefix, to be reached
    uint32_t cut, prefix;                   // as `ordered`; the cut's bytes so far
    int cut_id;
} tally;
typedef struct {
    shape c;
    const int *n;                           // rows
    const float *logits;                    // [row][V]
    const int *rows;                        // row i's logits and result are of rows[i] + k; NULL: i
    int k, chunk;
    const draw_row *draws;                  // [i]; a step's are k further
    unsigned long long *best;               // [row]
    tally *tallies;                         // [row]
    unsigned *peak;                         // [i], as the next two: zeros between kernels
    int *arrived;
    unsigned long long *mass;               // [i][256]
    int by_weight, level;                   // of sift: top-p, not top-k; which byte
    const float *draft_logits;              // of the last draft pass, by draft_row
    const tally *draft_tallies;
    const int *drafted;
} draw_args;
enum { SIFTED = 2048 };                     // tokens of a block that weighs
#define UNITS 0x1p39                        // for e = 1: 2^24 tokens do not overflow, and an error is 2^-40 of the best
#define COLD 0.0625f                        // below it logit / temperature leaves a float no room for the noise
#define NO_TOKEN 0xffffffffffffffffull
static __device__ __forceinline__ int token_of(unsigned long long best) {
    return best == NO_TOKEN || best == 0 ? -1 : (int)(0xffffffffu - (uint32_t)best);
}
static __device__ __forceinline__ unsigned long long scored(uint32_t score, int token) {
    return (unsigned long long)score << 32 | (0xffffffffu - (uint32_t)token);
}
static __device__ __forceinline__ int drawn_row(const draw_args &p, int i) { return (p.rows ? p.rows[i] : i) + p.k; }
static __device__ __forceinline__ int refuses(const draw_row &d) {
    return d.temperature > 0 && d.purpose == DSPARK_DRAW_NEXT && d.draft_row >= 0;
}
static __device__ __forceinline__ int is_weighed(const draw_row &d) {
    return d.temperature > 0 &&
           (d.top_k || d.top_p > 0 || d.min_p > 0 || d.purpose == DSPARK_DRAW_DRAFT || refuses(d) ||
            d.temperature < COLD);
}
static __device__ __forceinline__ float logit_of(uint32_t key) {       // inverse of `ordered`
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// e of a token; 0 if it is cut or, as in dspark_distribution, too small for a float.
static __device__ double weight(const draw_row &d, const tally &t, float min_p, float z, int v) {
    uint32_t key = ordered(z);
    double e;
    if (key < t.cut || (key == t.cut && v > t.cut_id)) return 0;
    e = exp(((double)z - t.max) / (double)d.temperature);
    return e >= (double)min_p && e > 0x1p-150 ? e : 0;
}
static __device__ __forceinline__ unsigned long long units(double e) { return (unsigned long long)(e * UNITS + .5); }
static __device__ __forceinline__ float chance(const tally &t, double e) {
    return (float)(e * UNITS / (double)t.sum);
}

static __global__ void __launch_bounds__(THREADS) survey(const draw_args p) {
    int i = (int)blockIdx.y, from = (int)blockIdx.x * SIFTED, to = least(p.c.V, from + SIFTED), r;
    uint32_t peak = 0;
    grid_go();
    grid_wait();
    if (i >= *p.n || !is_weighed(p.draws[i])) return;
    r = drawn_row(p, i);
    const float *logits = p.logits + (size_t)r * (size_t)p.c.V;
    for (int v = from + (int)threadIdx.x; v < to; v += THREADS) {
        uint32_t key = logits[v] <= FLT_MAX ? ordered(logits[v]) : ALL;
        if (key > peak) peak = key;
    }
    peak = __reduce_max_sync(ALL, peak);
    if (threadIdx.x % WARP == 0) atomicMax(&p.peak[i], peak);
    if (!last_block(&p.arrived[i], (int)gridDim.x) || threadIdx.x) return;
    peak = __ldcg(&p.peak[i]), p.peak[i] = 0;
    tally t = { peak != ALL && logit_of(peak) >= -FLT_MAX ? (double)logit_of(peak) : NAN, 0, 0, 0, 0, 0, p.c.V };
    p.tallies[r] = t;
}

// Inclusive prefix sum of x over a block; the last of `sums` is all.
static __device__ unsigned long long block_scan(unsigned long long x, unsigned long long *sums /* [THREADS] */) {
    int i = (int)threadIdx.x;
    for (int step = 1; step <= THREADS; step *= 2) {
        __syncthreads();
        sums[i] = x;
        __syncthreads();
        if (i >= step) x += sums[i - step];
    }
    return x;
}
// Of equals at the cut only `stay` stay: the first by id.
static __device__ void cut_equals(const draw_args &p, tally *t, const float *logits, uint32_t cut, int stay,
                                  unsigned long long *sums) {
    int each = blocks_of(p.c.V, THREADS), from = (int)threadIdx.x * each, to = least(p.c.V, from + each);
    int equal = 0;
    for (int v = from; v < to; v++) equal += ordered(logits[v]) == cut;
    stay -= (int)block_scan((unsigned long long)equal, sums) - equal;
    for (int v = from; v < to && stay > 0; v++)
        if (ordered(logits[v]) == cut && --stay == 0) t->cut_id = v;
}
// The cut's next byte: the last, best first, with less than the limit before it.
static __device__ void sift_choose(const draw_args &p, const draw_row &d, int i, tally t, tally *out,
                                   const float *logits) {
    __shared__ unsigned long long sums[THREADS];
    __shared__ int last, stay;
    __shared__ uint32_t cut;
    int byte = 255 - (int)threadIdx.x;
    unsigned long long *mass = p.mass + (size_t)i * 256, mine = __ldcg(mass + byte);
    unsigned long long before = block_scan(mine, sums) - mine;
    mass[byte] = 0;
    if (threadIdx.x == 0) last = stay = 0;
    __syncthreads();
    if (p.level == 0) {
        double all = (double)sums[THREADS - 1];
        t.limit = p.by_weight ? (unsigned long long)ceil((double)d.top_p * all) : (unsigned long long)d.top_k;
    }
    before += t.before;
    if (mine && before < t.limit) atomicMax(&last, (int)threadIdx.x + 1);
    __syncthreads();
    if ((int)threadIdx.x + 1 == last) {
        t.before = before, t.prefix = t.prefix << 8 | (uint32_t)byte;
        if (p.level == 3) {
            unsigned long long each = p.by_weight ? units(weight(d, t, 0, logit_of(t.prefix), 0)) : 1;
            unsigned long long some = (t.limit - before + each - 1) / each;
            if (some < mine / each) stay = (int)some;
            else if (t.prefix != t.cut) t.cut_id = p.c.V;
            t.cut = cut = t.prefix, t.prefix = 0, t.before = 0;
        }
        *out = t;
    }
    __syncthreads();
    if (stay) cut_equals(p, out, logits, cut, stay, sums);
}
static __global__ void __launch_bounds__(THREADS) sift(const draw_args p) {
    __shared__ unsigned low[256], high[256];        // of sums of up to SIFTED: low 20 bits and rest
    int i = (int)blockIdx.y, from = (int)blockIdx.x * SIFTED, to = least(p.c.V, from + SIFTED), r;
    grid_go();
    grid_wait();
    if (i >= *p.n) return;
    const draw_row d = p.draws[i];
    if (!is_weighed(d) || !(p.by_weight ? d.top_p > 0 : d.top_k > 0)) return;
    r = drawn_row(p, i);
    const tally t = p.tallies[r];
    const float *logits = p.logits + (size_t)r * (size_t)p.c.V;
    if (!(t.max >= -FLT_MAX)) return;
    low[threadIdx.x] = high[threadIdx.x] = 0;
    __syncthreads();
    for (int v = from + (int)threadIdx.x; v < to; v += THREADS) {
        uint32_t key = ordered(logits[v]), byte = key >> (24 - 8 * p.level) & 255;
        unsigned long long mine = 1;
        if ((unsigned long long)key >> (32 - 8 * p.level) != t.prefix) continue;
        if (p.by_weight) mine = units(weight(d, t, 0, logits[v], v));
        if (mine & 0xfffff) atomicAdd(&low[byte], (unsigned)(mine & 0xfffff));
        if (mine >> 20) atomicAdd(&high[byte], (unsigned)(mine >> 20));
    }
    __syncthreads();
    unsigned long long sum = ((unsigned long long)high[threadIdx.x] << 20) + low[threadIdx.x];
    if (sum) atomicAdd(&p.mass[(size_t)i * 256 + threadIdx.x], sum);
    if (last_block(&p.arrived[i], (int)gridDim.x)) sift_choose(p, d, i, t, &p.tallies[r], logits);
}

static __global__ void __launch_bounds__(THREADS) weigh(const draw_args p) {
    int i = (int)blockIdx.y, from = (int)blockIdx.x * SIFTED, to = least(p.c.V, from + SIFTED), r;
    unsigned long long sum = 0;
    grid_go();
    grid_wait();
    if (i >= *p.n || !is_weighed(p.draws[i])) return;
    r = drawn_row(p, i);
    const draw_row d = p.draws[i];
    const tally t = p.tallies[r];
    if (!(t.max >= -FLT_MAX)) return;
    for (int v = from + (int)threadIdx.x; v < to; v += THREADS)
        sum += units(weight(d, t, d.min_p, p.logits[(size_t)r * (size_t)p.c.V + (size_t)v], v));
    for (int k = 16; k; k /= 2) sum += __shfl_xor_sync(ALL, sum, k);
    if (threadIdx.x % WARP == 0 && sum) atomicAdd(&p.tallies[r].sum, sum);
}

// Philox4x32-10's words 4 block .. + 3, as dspark.h counts. Step k is k positions further for PLAIN, else k rows.
static __device__ void noise_words(const draw_row &d, int purpose, int k, uint32_t block, uint32_t *c) {
    int plain = purpose == DSPARK_DRAW_PLAIN;
    unsigned long long at = ((unsigned long long)d.at[1] << 32 | d.at[0]) + (unsigned long long)(plain ? k : 0);
    uint32_t k0 = d.seed[0], k1 = d.seed[1];
    c[0] = block, c[1] = (uint32_t)at, c[2] = (uint32_t)(at >> 32);
    c[3] = (uint32_t)purpose << 16 | (uint32_t)(plain ? 0 : d.k + k);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        unsigned long long a = (unsigned long long)c[0] * 0xD2511F53u, b = (unsigned long long)c[2] * 0xCD9E8D57u;
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)a;
    }
}
// -log u, u = (word + 1/2) 2^-32; near 1 from 1 - u, which a float holds well enough.
static __device__ float waiting(uint32_t w) {
    float u = ((float)w + 0.5f) * 2.3283064365386963e-10f,
          missing = ((float)(0xffffffffu - w) + 0.5f) * 2.3283064365386963e-10f;
    return w >> 31 ? -log1pf(-missing) : -logf(u);
}

// Is draft x accepted? Iff u p_d(x) < p_t(x).
static __device__ int stands(const draw_args &p, const draw_row &d, const float *logits, const tally &t, int x) {
    float p_t = chance(t, weight(d, t, d.min_p, logits[x], x));
    const tally q = p.draft_tallies[d.draft_row];
    float z = p.draft_logits[(size_t)d.draft_row * (size_t)p.c.V + (size_t)x];
    float p_d = chance(q, weight(d, q, d.min_p, z, x));
    uint32_t w[4];
    noise_words(d, DSPARK_DRAW_ACCEPT, 0, 0, w);
    return ((double)w[0] + 0.5) * 0x1p-32 * (double)p_d < (double)p_t;
}
// After a refusal, a token's score: max(0, p_t - p_d) / -log u; or p_t / -log u, below all those, which counts if no
// token has such a difference.
static __device__ uint32_t rest_score(const draw_args &p, const draw_row &d, const tally &t, double e, int v,
                                      uint32_t w) {
    const tally q = p.draft_tallies[d.draft_row];
    float z = p.draft_logits[(size_t)d.draft_row * (size_t)p.c.V + (size_t)v], p_t = chance(t, e);
    float rest = p_t - chance(q, weight(d, q, d.min_p, z, v));
    return rest > 0 ? ordered(rest / waiting(w)) : __float_as_uint(p_t / waiting(w));
}

static __global__ void __launch_bounds__(THREADS) draw(const draw_args p) {
    int i = (int)blockIdx.y, V = p.c.V, r, from = (int)blockIdx.x * p.chunk, to = least(V, from + p.chunk);
    int weighed, refused;
    unsigned long long best = 0;
    grid_go();
    grid_wait();
    if (i >= *p.n || p.draws[i].temperature < 0) return;
    r = drawn_row(p, i);
    const draw_row d = p.draws[i];
    const tally t = p.tallies[r];
    const float *logits = p.logits + (size_t)r * (size_t)V;
    weighed = is_weighed(d), refused = refuses(d);
    if (weighed && !(t.max >= -FLT_MAX)) return;
    if (refused && stands(p, d, logits, t, p.drafted[d.draft_row])) {
        if (blockIdx.x + threadIdx.x == 0) p.best[r] = scored(ALL - 1, p.drafted[d.draft_row]);
        return;
    }
    for (int v = from + 4 * (int)threadIdx.x; v < to; v += 4 * THREADS) {
        uint32_t w[4] = { 0, 0, 0, 0 };
        if (d.temperature > 0) noise_words(d, d.purpose, p.k, (uint32_t)v / 4, w);
        for (int j = 0; j < 4 && v + j < to; j++) {
            float z = logits[v + j];
            double e = 0;
            unsigned long long key;
            if (!(z <= FLT_MAX)) best = NO_TOKEN;
            if (!(z >= -FLT_MAX)) continue;
            if (weighed && !((e = weight(d, t, d.min_p, z, v + j)) > 0)) continue;
            if (refused) key = scored(rest_score(p, d, t, e, v + j, w[j]), v + j);
            else if (weighed) key = scored(ordered((float)e / waiting(w[j])), v + j);
            else key = scored(ordered(d.temperature > 0 ? z / d.temperature - logf(waiting(w[j])) : z), v + j);
            if (key > best) best = key;
        }
    }
    for (int k = 16; k; k /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL, best, k);
        if (other > best) best = other;
    }
    if (threadIdx.x % WARP == 0) atomicMax(&p.best[r], best);
}
// Leaves zeros for the next draws.
typedef struct { const int *n; unsigned long long *best; int *tokens; } drawn_args;
static __global__ void __launch_bounds__(THREADS) drawn(const drawn_args p) {
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    grid_go();
    grid_wait();
    if (i < *p.n) p.tokens[i] = token_of(p.best[i]), p.best[i] = 0;
}

// ---- which drafts are verified ----------------------------------------------------------------
// dspark_schedule's ASYNC: of all drafts the `budget` largest in weight * survival (of equals the earlier, then the
// lower segment), a prefix of each segment's; then the rows of the target pass that has them.

typedef struct {
    uint8_t *const *state;
    int id, position, draft_row, limit;     // of the anchor; the first draft's row of the draft pass, -1: none
    float weight, threshold;
    dspark_calibration calibration;
    draw_row draw;
} pick;
typedef struct { int n, budget; } picking;
typedef struct {
    const picking *what;
    const pick *picks;
    const int *drafted;                     // [draft pass' rows]
    const float *confidence;                // logits, the same
    double *value;                          // [picks][DSPARK_MAX_BLOCK]
    int *candidates, *lengths;              // [picks]
    counts *n;
    row *rows;
    int *logit_rows;
    draw_row *draws;
} choose_args;

// a_k: curve k at the product of the scaled confidences.
static __device__ double curve_at(const dspark_calibration &of, int k, double product) {
    const float *x = of.said[k], *y = of.stood[k];
    double t = 1;
    int i = 1;
    while (i < DSPARK_CURVE_POINTS - 1 && product > (double)x[i]) i++;
    if (x[i] > x[i - 1]) t = (product - (double)x[i - 1]) / ((double)x[i] - (double)x[i - 1]);
    return (double)y[i - 1] + fmax(0.0, fmin(t, 1.0)) * ((double)y[i] - (double)y[i - 1]);
}
// Drafts of a pick that may be chosen: up to its limit, a missing draft, or the threshold.
static __device__ int candidates_of(const choose_args &p, int i) {
    const pick &a = p.picks[i];
    double survival = 1, product = 1, stood = 1;
    int k = 0;
    for (; a.draft_row >= 0 && k < a.limit && p.drafted[a.draft_row + k] >= 0; k++) {
        double sts = 1 / (1 + exp(-(double)p.confidence[a.draft_row + k] / (double)a.calibration.sts[k]));
        double before = stood;
        float c = (float)sts;
        product *= sts;
        if (a.calibration.curved && product >= 0)
            stood = fmin(stood, curve_at(a.calibration, k, product)), c = (float)(stood / before);
        if (!(c >= a.threshold)) break;
        survival *= (double)c;
        p.value[i * DSPARK_MAX_BLOCK + k] = (double)a.weight * survival;
        if (!(p.value[i * DSPARK_MAX_BLOCK + k] > 0)) break;
    }
    return k;
}
// How many candidates come before draft k of pick i.
static __device__ int rank_of(const choose_args &p, int i, int k) {
    double value = p.value[i * DSPARK_MAX_BLOCK + k];
    int before = 0;
    for (int j = 0; j < p.what->n; j++)
        for (int m = 0; m < p.candidates[j]; m++) {
            double other = p.value[j * DSPARK_MAX_BLOCK + m];
            before += other > value || (other == value && (m < k || (m == k && j < i)));
        }
    return before;
}
static __device__ void choose_rows(const choose_args &p, int i) {
    const pick &a = p.picks[i];
    int first = i, n = 1 + p.lengths[i];
    for (int j = 0; j < i; j++) first += p.lengths[j];
    for (int k = 0; k < n; k++) {
        row r = { a.state, k ? p.drafted[a.draft_row + k - 1] : a.id, a.position + k, 0, first, a.position, n };
        draw_row d = a.draw;
        if (d.purpose != DSPARK_DRAW_PLAIN) d.k = k;
        else d.at[0] += (unsigned)k, d.at[1] += d.at[0] < (unsigned)k;
        d.draft_row = k + 1 < n ? a.draft_row + k : -1;
        p.rows[first + k] = r, p.logit_rows[first + k] = first + k, p.draws[first + k] = d;
    }
    if (i + 1 < p.what->n) return;
    counts all = { first + n, first + n, i + 1, 0, 0 };
    *p.n = all;
}
// One block, a thread a pick: 256 picks of 5 drafts take some 30 us, six rows no more than the launch.
static __global__ void __launch_bounds__(THREADS) choose(const choose_args p) {
    grid_go();
    grid_wait();
    for (int i = (int)threadIdx.x; i < p.what->n; i += THREADS) p.candidates[i] = candidates_of(p, i);
    __syncthreads();
    for (int i = (int)threadIdx.x, k; i < p.what->n; i += THREADS) {
        for (k = 0; k < p.candidates[i] && rank_of(p, i, k) < p.what->budget;) k++;
        p.lengths[i] = k;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < p.what->n; i += THREADS) choose_rows(p, i);
}

// ---- the drafter's own ------------------------------------------------------------------------

// Taps of a position as an input [n_taps * h]. Bound, as of those below: latency; 48 KB a position, 2 KB a stage, 20 KB
// a segment and step.
typedef struct { shape c; const counts *n; const injection *list; int taps_at; input x; } taps_args;
static __global__ void __launch_bounds__(THREADS) take_taps(const taps_args p) {
    int r = (int)blockIdx.x, n = p.c.n_taps * p.c.h;
    grid_go();
    grid_wait();
    if (r >= p.n->n_injected) return;
    const float *taps =
        (const float *)(const void *)p.list[r].state[p.taps_at] + (size_t)(p.list[r].position % p.c.ring) * (size_t)n;
    put_input_row(p.x, r, taps, n);
}

// A stage's row of the window from wkv main_x; a block a row and stage.
typedef struct {
    shape c;
    const counts *n;
    const injection *list;
    const double *freqs;
    const float *kv, *const *norms;         // [stages][max_rows][D]; [stages]
    int max_rows, first_layer;
} inject_args;
static __global__ void __launch_bounds__(THREADS) inject_rows(const inject_args p) {
    __shared__ float scratch[WARPS];
    SHARED_BYTES(bytes);
    float *x = (float *)(void *)bytes;
    int r = (int)blockIdx.x, stage = (int)blockIdx.y, D = p.c.D;
    grid_go();
    grid_wait();
    if (r >= p.n->n_injected) return;
    const float *kv = p.kv + ((size_t)stage * (size_t)p.max_rows + (size_t)r) * (size_t)D;
    for (int i = (int)threadIdx.x; i < D; i += THREADS) x[i] = kv[i];
    __syncthreads();
    norm_row(x, p.norms[stage], D, p.c.eps, scratch);
    rope_row(x, D, p.c.R, p.freqs, p.list[r].position);
    round_row(x, D - p.c.R, NULL, NULL);
    float *to = (float *)(void *)p.list[r].state[(p.first_layer + stage) * N_ARRAYS + WINDOW] +
                (size_t)(p.list[r].position % p.c.ring) * (size_t)D;
    for (int i = (int)threadIdx.x; i < D; i += THREADS) to[i] = x[i];
}

// The sequential heads, step k:
//   vanilla: e = W1[previous];  gated: e = sigmoid(G [x ; W1[previous]] + b) * W1[previous]
//   RNN: (g, c, o) = J [s ; W1[previous] ; x] + b, s = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), e = tanh(o)
// and the confidence of [x ; W1[previous]]. A block a segment.
typedef struct {
    shape c;
    const counts *n;
    const int *segment_row, *previous;      // [segments]
    const unsigned long long *best;         // [rows]: where step k - 1 was drawn here; NULL: `previous` has it
    int k, kind;
    matrix w1;
    const float *hidden, *confidence_w;     // [rows][h]; [h + rank], NULL: none
    float confidence_bias;
    float *confidence;                      // [rows]
    float *e, *rnn;                         // [segments][rank]; [segments][rank]: s
    const float *z, *bias;                  // [segments][3 rank] of the gate, bias NULL: none
    input in;                               // [segments]: of the gate
    input out;                              // [segments]: e, of w2
} markov_args;

static __global__ void __launch_bounds__(THREADS) markov_begin(const markov_args p) {
    __shared__ float scratch[WARPS];
    SHARED_BYTES(bytes);
    float *x = (float *)(void *)bytes, *e, *in, sum = 0;
    int i = (int)blockIdx.x, rank = p.c.rank, h = p.c.h, r, rnn = p.kind == DSPARK_HEAD_RNN;
    grid_go();
    grid_wait();
    if (i >= p.n->n_segments) return;
    r = p.segment_row[i] + p.k;
    int previous = p.best ? token_of(p.best[r - 1]) : p.previous[i];
    if (previous < 0) previous = 0;         // no draft, and none follows it
    in = x, e = x + (rnn ? rank : h);       // [x ; e], or [s ; e ; x]
    for (int d = (int)threadIdx.x; d < h; d += THREADS)
        x[rnn ? 2 * rank + d : d] = p.hidden[(size_t)r * (size_t)h + (size_t)d];
    for (int d = (int)threadIdx.x; d < rank; d += THREADS) {
        e[d] = plain_number(p.w1, previous, d);
        p.e[(size_t)i * (size_t)rank + (size_t)d] = e[d];
        if (rnn) in[d] = p.k ? p.rnn[(size_t)i * (size_t)rank + (size_t)d] : 0;
    }
    __syncthreads();
    for (int d = (int)threadIdx.x; p.confidence_w && d < h + rank; d += THREADS)
        sum = fmaf(p.confidence_w[d], d < h ? x[rnn ? 2 * rank + d : d] : e[d - h], sum);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) p.confidence[r] = p.confidence_w ? sum + p.confidence_bias : HUGE_VALF;
    if (p.kind == DSPARK_HEAD_VANILLA) put_input_row(p.out, i, e, rank);
    else if (p.kind != DSPARK_HEAD_NONE) put_input_row(p.in, i, in, (rnn ? 2 : 1) * rank + h);
}
static __global__ void __launch_bounds__(THREADS) markov_gate(const markov_args p) {
    SHARED_BYTES(bytes);
    float *e = (float *)(void *)bytes;
    int i = (int)blockIdx.x, rank = p.c.rank;
    const float *z = p.z + (size_t)i * (size_t)(3 * rank);
    grid_go();
    grid_wait();
    if (i >= p.n->n_segments) return;
    for (int d = (int)threadIdx.x; d < rank; d += THREADS) {
        float g = sigmoid(z[d] + (p.bias ? p.bias[d] : 0)), *s = p.rnn + (size_t)i * (size_t)rank + (size_t)d;
        if (p.kind == DSPARK_HEAD_GATED) e[d] = p.e[(size_t)i * (size_t)rank + (size_t)d] * g;
        else {
            float c = tanhf(z[rank + d] + (p.bias ? p.bias[rank + d] : 0));
            *s = g * (p.k ? *s : 0) + (1 - g) * c;
            e[d] = tanhf(z[2 * rank + d] + (p.bias ? p.bias[2 * rank + d] : 0));
        }
    }
    __syncthreads();
    put_input_row(p.out, i, e, rank);
}

// ---- the device -------------------------------------------------------------------------------

typedef struct { const float *fn, *scale, *base; } mixer;
typedef struct { matrix wkv, wgate; const float *ape, *norm; int d, w; } compressor;
typedef struct {
    int ratio;
    mixer hc[2];                            // DSPARK_SUB_*
    const float *norm[2], *q_norm, *kv_norm, *sink, *gate_bias;
    matrix wq_a, wq_b, wkv, wo_a, wo_b, index_wq_b, index_weights, gate;
    compressor pool[2];                     // the attention's; the indexer's
    const int *tid2eid;
    expert shared, routed;                  // routed: one of them, for its sizes
    expert *experts;                        // on the device: E, then the shared one
    const expert *home;                     // the same, in host memory; NULL: all lie on the device
} layer_weights;

enum { OP_PASS, OP_MIX_IN, OP_ATTENTION, OP_MOE, OP_MIX_OUT, OP_TAP, OP_HEAD, OP_INJECT, OP_DRAFT_HEAD, OP_STEPS,
       OP_CHOOSE, OP_DRAW };
typedef struct { unsigned char op, sub; short layer; } operation;

// A pass's kind, and the numbers its grids are sized for. indexed: a row has keys to choose among; whole: blocks of a
// prompt; weighs: what draws need.
enum { WEIGHED = 1, BY_COUNT = 2, BY_WEIGHT = 4 };
typedef struct { int drafts, rows, logits, injected, segments, indexed, whole, weighs; } extent;

// A CUDA graph of a pass, or of a draft and the pass that verifies it: its calls, as a hash; where its kernels' names
// begin and end.
typedef struct { uint64_t calls; cudaGraphExec_t exec; int traced[2]; } recording;
enum { MAX_RECORDINGS = 64, RECORDED_ROWS = 64, STAGE_BYTES = 8 << 20 };

// What changes from pass to pass: filled on the host, copied when the pass begins; from `tokens` on, copied back in one
// piece when it ends.
typedef struct {
    counts *n;
    row *rows;
    int *logit_rows, *segment_row, *previous;
    injection *injected;
    draw_row *draws;
    picking *what;
    pick *picks;
    int *tokens, *drafted, *lengths;
    float *confidence;
} pass_block;

// A product by cuBLASLt, of a block of a prompt and a matrix of this size, and the algorithm chosen for it.
typedef struct {
    int rows, cols, pitch, y_stride, possible;
#ifndef DSPARK_CUDA_HOST
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
#endif
} lt_product;
enum { MAX_PRODUCTS = 32, LT_BYTES = 32 << 20 };

typedef struct {
    const dspark_config *c;
    const dspark_weights *w;
    shape s;
    int max_rows, sms, major, shared_most, layers;
    int wide, whole;                        // there is room for tiles of many rows; for the kernels of whole blocks
    dspark_status status;                   // the first failure, until pass_end gives it
    char message[256];
    cudaStream_t stream;
    uint8_t *slab, *work, *scores_memory;   // weights, workspace, index scores
    size_t slab_bytes, work_bytes, scores_bytes, host_bytes;
    int n_slots;                            // for experts that have their home in host memory; 0: all are in the slab
    size_t slot_bytes;
    uint8_t *cache, *home[DSPARK_MAX_LAYERS];
    int *slot_of, *owner, *used, *spared, *cache_state, *moves;
    char placement[384];
    layer_weights *layer;                           // [layers]
    matrix embed, head, main_proj, w1, w2, joint;
    mixer hc_head, draft_hc_head;
    const float *norm, *main_norm, *draft_norm, *confidence_w, *joint_bias, *const *stage_norms;
    const double *freqs[2];                 // [R / 2]: plain, compressed

    pass_block host, dev;                   // pinned, and its twin on the device
    uint8_t *host_block;
    float *host_logits, *host_drafts;

    float *residual, *mixes, *post_comb, *partial, *y, *qr, *kv, *q, *low, *pool_kv, *pool_gate, *index_kv, *index_gate,
        *index_q, *index_w, *gate, *route_weight, *up[2], *down, *hidden, *logits, *draft_logits, *stage_kv, *e, *rnn,
        *z;
    input x, qr_in, o, low_in, act, main, markov_in, markov_out;
    float2 *turns;                          // [rows][2][R / 2]
    uint16_t *query;
    float *query_w, *scores, *part;
    int *arrived, *chosen, *route, *first, *list, *where, *active;     // arrived: zeros between kernels
    unsigned long long *best, *mass;        // zeros between passes
    unsigned *peak;
    int *surveyed;
    tally *tallies, *draft_tallies;
    double *value;
    int *candidates;

    // a pass in the making
    int n_rows, n_logits, n_segments;
    int draws;                              // the pass gives tokens, not logits
    int choice;                             // the device chooses its rows
    int serial;                             // no programmatic dependent launch
    int pending;                            // a draft whose steps are to come is noted, and not run
    operation *ops;
    int n_ops, max_ops, n_passes;
    extent passes[2], grid;                 // those noted; that of the operation that runs
    int from, tap, slots;                   // updates of the stream, deferred to the next mix
    const float *from_y;
    mixer now;                              // the mix whose post and comb are still to be made
    int fast_prefill;                       // blocks of prompts may go through cuBLASLt
    lt_product products[MAX_PRODUCTS];
    int n_products;
    uint8_t *codes, *expert_codes, *act_codes, *lt_room, *by_rows;
    float *code_scales, *expert_scales, *act_scales;
    size_t by_rows_bytes;                   // of the largest matrix that cuBLASLt may take
#ifndef DSPARK_CUDA_HOST
    cublasLtHandle_t lt;
#endif
    recording recordings[MAX_RECORDINGS];
    int n_recordings, oldest;
} cuda;

static void fail(cuda *d, dspark_status status, const char *format, ...) {
    va_list args;
    if (d->status) return;
    va_start(args, format);
    vsnprintf(d->message, sizeof d->message, format, args);
    va_end(args);
    d->status = status;
}
// 1: success. The first failure is kept, with the call's name.
static int good(cuda *d, cudaError_t e, const char *call) {
    if (e == cudaSuccess) return 1;
    fail(d, DSPARK_ERROR_BACKEND, "%.*s: %s", (int)strcspn(call, "("), call, cudaGetErrorString(e));
    cudaGetLastError();
    return 0;
}
#define TRY(call) (!d->status && good(d, call, #call))
// After a failure: half of a pass may have left scores where draws expect zeros, and a slot without its expert.
static void clean(cuda *d) {
    cudaStreamSynchronize(d->stream);       // nothing reads the pinned block any more
    cudaMemsetAsync(d->best, 0, (size_t)((uint8_t *)d->tallies - (uint8_t *)d->best), d->stream);   // best .. surveyed
    cudaMemsetAsync(d->arrived, 0, INDEX_ROWS * sizeof *d->arrived, d->stream);
    if (d->n_slots)                         // all of carve_cache
        cudaMemsetAsync(d->slot_of, 0, (size_t)((uint8_t *)(d->cache_state + CACHE_MOVES + 1) - (uint8_t *)d->slot_of),
                        d->stream);
}
static dspark_status result(cuda *d) {
    dspark_status status = d->status;
    if (status) dspark_fail(status, d->message);
    if (status && d->best) clean(d);
    d->status = DSPARK_OK;
    return status;
}

#ifdef DSPARK_CUDA_TIMED
// For bench/cuda.c: the kernels that ran, in order, and when each passed grid_wait; one device at a time. noted: names
// of each recording, made once; names: of all kernels run since tracing began. "between": from the last kernel of one
// replay to the first of the next.
static struct { const char *noted[4 * MAX_TRACED], *names[MAX_TRACED]; int n_noted, n, on; } traced;
static void trace(const char *name) {
    if (traced.on && traced.n_noted < 4 * MAX_TRACED) traced.noted[traced.n_noted++] = name;
}
static void trace_between(void) { traced.noted[traced.n_noted - 1] = "between"; }
static int trace_at(void) { return traced.n_noted; }
static void trace_played(int from, int to) {
    for (; traced.on && from < to && traced.n < MAX_TRACED; from++) traced.names[traced.n++] = traced.noted[from];
}
#define TRACED traced.on
#else
#define trace(name) ((void)0)
#define trace_between() ((void)0)
#define trace_at() 0
#define trace_played(from, to) ((void)0)
#define TRACED 0
#endif

template <class P>
static void launch(cuda *d, const char *name, void (*kernel)(P), dim3 grid, int threads, size_t shared, const P &p) {
    if (d->status || !grid.x || !grid.y) return;
    trace(name);
#ifdef DSPARK_CUDA_HOST
    good(d, host_launch(grid, dim3((unsigned)threads), shared, d->stream, kernel, p), name);
#else
    cudaLaunchAttribute early;
    cudaLaunchConfig_t config = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid, config.blockDim = dim3((unsigned)threads), config.dynamicSmemBytes = shared,
    config.stream = d->stream;
    // where experts move, a reader could begin before its weights are written
    config.attrs = &early, config.numAttrs = d->major >= 9 && !d->n_slots && !d->serial;
    good(d, cudaLaunchKernelEx(&config, kernel, p), name);
#endif
}
#define LAUNCH(kernel, ...) launch(d, #kernel, kernel, __VA_ARGS__)
static dim3 grid_of(int x, int y) { return dim3((unsigned)x, (unsigned)y); }

// Rows grids are made for: a recording serves all n up to it.
static int bucket(int n) { return n <= 8 ? n : n <= 64 ? (n + 7) / 8 * 8 : (n + 63) / 64 * 64; }

// ---- launching products -----------------------------------------------------------------------

static void job_add(linears_args *p, const matrix &w, const input &x, float *y, int y_stride, int as_is = 0) {
    job *j = &p->jobs[p->n_jobs++];
    memset(j, 0, sizeof *j);
    j->w = w, j->y = y, j->y_stride = y_stride, j->x_stride = x.stride, j->x = operand_of(x, w.dtype, as_is);
}

// ---- blocks of prompts through cuBLASLt
// The decoding kernels decode weights to 16 bits. Whole blocks of a prompt are bound by products, and cuBLASLt's take
// FP8 twice as fast: 512 rows of wq_b (33.5 MB) are 34 GFLOP, 23 us at 1.5 PFLOP/s, where mma.sync on f16 needs some
// 60. Its sums keep fewer bits, and its algorithm depends on the shape: so rows are always 512, and a shape's first
// choice stays. It wants matrices by rows: each is copied before its product. wo_a, bf16 matrices and the routed
// experts are linears_whole's and experts_whole's.

#ifdef DSPARK_CUDA_HOST
extern "C" { long cuda_host_products; }
static void lt_product_open(cuda *, lt_product *p, const matrix &) { p->possible = 1; }
// y [512][y_stride] = codes [512][cols] times w, each 128 summed alone.
static void lt_product_run(cuda *d, const lt_product *p, const matrix &w, const uint8_t *codes, const float *scales,
                        float *y) {
    int blocks = blocks_of(p->cols, 128), stride = blocks_of(blocks, 4) * 4;
    float value[256];
    for (int i = 0; i < 256; i++) value[i] = host_e4m3((uint32_t)i);
    cuda_host_products++;
    for (int r = 0; r < DSPARK_PROMPT_BLOCK; r++)
        for (int o = 0; o < p->rows; o++) {
            const uint8_t *a = d->by_rows + (size_t)o * (size_t)p->pitch, *x = codes + (size_t)r * (size_t)p->cols;
            float all = 0;
            for (int b = 0; b < blocks; b++) {
                float sum = 0, scale = w.block_scale[o / 128 * stride + b] * scales[b * DSPARK_PROMPT_BLOCK + r];
                for (int k = b * 128; k < least(p->cols, b * 128 + 128); k++) sum += value[a[k]] * value[x[k]];
                all = fmaf(sum, scale, all);
            }
            y[(size_t)r * (size_t)p->y_stride + (size_t)o] = all;
        }
}
static void lt_open(cuda *) {}
static void lt_close(cuda *) {}
#else
static int good_lt(cuda *d, cublasStatus_t e, const char *call) {
    if (e == CUBLAS_STATUS_SUCCESS) return 1;
    fail(d, DSPARK_ERROR_BACKEND, "%.*s: %s", (int)strcspn(call, "("), call, cublasLtGetStatusString(e));
    return 0;
}
#define TRY_LT(call) (!d->status && good_lt(d, call, #call))
static void lt_open(cuda *d) { TRY_LT(cublasLtCreate(&d->lt)); }
static void lt_close(cuda *d) {
    for (int i = 0; i < d->n_products; i++) {
        lt_product *p = &d->products[i];
        if (p->desc) cublasLtMatmulDescDestroy(p->desc);
        if (p->w) cublasLtMatrixLayoutDestroy(p->w);
        if (p->x) cublasLtMatrixLayoutDestroy(p->x);
        if (p->y) cublasLtMatrixLayoutDestroy(p->y);
    }
    if (d->lt) cublasLtDestroy(d->lt);
}
static void lt_product_scales(cuda *d, const lt_product *p, const matrix &w, const float *scales) {
    TRY_LT(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w.block_scale,
                                          sizeof w.block_scale));
    TRY_LT(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scales, sizeof scales));
}
// Column-major, as cuBLASLt counts: y [rows x 512] = (w [cols x rows])^T x [cols x 512].
static void lt_product_open(cuda *d, lt_product *p, const matrix &w) {
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found;
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtMatmulMatrixScale_t w_mode = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F,
                                x_mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    uint32_t no_splits = CUBLASLT_REDUCTION_SCHEME_NONE;
    size_t room = LT_BYTES;
    int n = 0;
    TRY_LT(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TRY_LT(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    TRY_LT(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &w_mode, sizeof w_mode));
    TRY_LT(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &x_mode, sizeof x_mode));
    lt_product_scales(d, p, w, d->code_scales);
    TRY_LT(cublasLtMatrixLayoutCreate(&p->w, CUDA_R_8F_E4M3, (uint64_t)p->cols, (uint64_t)p->rows, p->pitch));
    TRY_LT(cublasLtMatrixLayoutCreate(&p->x, CUDA_R_8F_E4M3, (uint64_t)p->cols, DSPARK_PROMPT_BLOCK, p->cols));
    TRY_LT(cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, (uint64_t)p->rows, DSPARK_PROMPT_BLOCK, p->y_stride));
    if (TRY_LT(cublasLtMatmulPreferenceCreate(&wish))) {
        TRY_LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                                    sizeof room));
        TRY_LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_splits,
                                                    sizeof no_splits));
    }
    // no algorithm is not a failure: kernels do it then
    if (!d->status && !cublasLtMatmulAlgoGetHeuristic(d->lt, p->desc, p->w, p->x, p->y, p->y, wish, 1, &found, &n))
        p->possible = n > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    if (p->possible) p->algo = found.algo;
    if (wish) cublasLtMatmulPreferenceDestroy(wish);
}
static void lt_product_run(cuda *d, const lt_product *p, const matrix &w, const uint8_t *codes, const float *scales,
                        float *y) {
    const float one = 1, none = 0;
    lt_product_scales(d, p, w, scales);
    TRY_LT(cublasLtMatmul(d->lt, p->desc, &one, d->by_rows, p->w, codes, p->x, &none, y, p->y, y, p->y, &p->algo,
                          d->lt_room, LT_BYTES, d->stream));
}
#endif

// The cuBLASLt product for a job, the same each time; NULL: none.
static const lt_product *lt_product_of(cuda *d, const job *j) {
    lt_product *p = d->products;
    if (!j->w.block_scale || j->x.planes > 1 || j->w.cols % 16 || j->w.rows % 16) return NULL;
    for (; p < d->products + d->n_products; p++)
        if (p->rows == j->w.rows && p->cols == j->w.cols && p->y_stride == j->y_stride) return p->possible ? p : NULL;
    if (d->n_products == MAX_PRODUCTS) return NULL;
    d->n_products++;
    p->rows = j->w.rows, p->cols = j->w.cols, p->pitch = j->w.pitch, p->y_stride = j->y_stride;
    lt_product_open(d, p, j->w);
    return p->possible ? p : NULL;
}
// Runs the jobs that cuBLASLt takes; the others stay in p.
static void jobs_by_lt(cuda *d, linears_args *p) {
    const uint16_t *last = NULL;
    int left = 0;
    for (int i = 0; i < p->n_jobs && !d->status; i++) {
        const job *j = &p->jobs[i];
        const lt_product *with = lt_product_of(d, j);
        int n = j->w.cols, scales = blocks_of(n, 128) * DSPARK_PROMPT_BLOCK;
        if (!with) {
            p->jobs[left++] = *j;
            continue;
        }
        codes_args c = { j->x.x, j->x.scale, j->x_stride, n, d->codes, d->code_scales };
        if (last != j->x.x) LAUNCH(codes, grid_of(d->n_rows, 1), THREADS, 0, c);
        by_rows_args w = { j->w.data, d->by_rows, j->w.rows, j->w.pitch };
        LAUNCH(by_rows, grid_of(8 * d->sms, 1), THREADS, 0, w);
        last = j->x.x;
        for (int b = 0; b < d->n_rows / DSPARK_PROMPT_BLOCK; b++)
            lt_product_run(d, with, j->w, d->codes + (size_t)b * DSPARK_PROMPT_BLOCK * (size_t)n,
                        d->code_scales + (size_t)b * (size_t)scales,
                        j->y + (size_t)b * DSPARK_PROMPT_BLOCK * (size_t)j->y_stride);
    }
    p->n_jobs = left;
}

// Numbers the jobs' tiles, of `outputs` x columns(job) rows each; none crosses groups of outputs. Returns how many
// there are.
template <class C> static int count_tiles(linears_args *p, int outputs, const C &columns) {
    p->n_items = 0;
    for (int i = 0; i < p->n_jobs; i++) {
        job *j = &p->jobs[i];
        int group = j->group ? j->group : j->w.rows;
        p->first[i] = p->n_items;
        p->n_items += j->w.rows / group * blocks_of(group, outputs) * blocks_of(p->rows, columns(*j));
    }
    return p->n_items;
}
static int count_wide(linears_args *p, int mt) {
    return count_tiles(p, wide_outputs(mt), [=](const job &j) { return wide_columns(j, mt); });
}
static int count_panels(linears_args *p, int panels) {
    return count_tiles(p, WARPS * TILE, [=](const job &) { return panels * PANEL; });
}
// FP8 with inputs from put_panel: in panel order nothing keeps the rest of 128 numbers zero.
static int by_panels(const matrix &w) { return w.dtype == DSPARK_FP8 && w.cols % 128 == 0; }
// Runs the jobs whose matrices are bf16, or FP8 with inputs from put_panel. Tiles have 64 rows if SMs would be idle
// otherwise.
static void jobs_by_panels(cuda *d, const char *name, linears_args *p, int dtype) {
    linears_args some = *p;
    int left = 0, panels = 2;
    some.n_jobs = 0;
    for (int i = 0; i < p->n_jobs; i++) {
        const job *j = &p->jobs[i];
        if (j->w.dtype == dtype && j->x.planes > 1 && (dtype == DSPARK_BF16 || by_panels(j->w)))
            some.jobs[some.n_jobs++] = *j;
        else p->jobs[left++] = *j;
    }
    if (!some.n_jobs) return;
    if (count_panels(&some, 2) < d->sms) panels = 1, count_panels(&some, 1);
    launch(d, name, dtype == DSPARK_FP8 ? panels == 1 ? linears_whole<DSPARK_FP8, 1> : linears_whole<DSPARK_FP8, 2>
                    : panels == 1 ? linears_whole<DSPARK_BF16, 1> : linears_whole<DSPARK_BF16, 2>,
           grid_of(some.mix.out ? d->sms : least(some.n_items, d->sms), 1), THREADS, (size_t)panel_bytes(panels),
           some);
    p->n_jobs = left, p->mix.out = NULL;
}
// A large tile does four small ones' work in the time of three; those run two an SM. Takes the faster.
static void jobs_wide(cuda *d, const char *name, linears_args *p) {
    int mt = 3 * blocks_of(count_wide(p, 2), d->sms) <= 2 * blocks_of(count_wide(p, 1), 2 * d->sms) ? 2 : 1,
        n = count_wide(p, mt), blocks = (3 - mt) * d->sms;
    launch(d, name, mt == 1 ? linears_wide<1> : linears_wide<2>, grid_of(n ? least(n, blocks) : blocks, 1), THREADS,
           (size_t)(wide_stages(mt) * stage_bytes(mt)), *p);
}

static void jobs_few(cuda *d, const char *name, linears_args *p) {
    int rows = p->rows, nt = rows <= 8 ? 1 : rows <= 16 ? 2 : 4,
        beside = p->mix.out || p->tasks ? blocks_of(rows, WARPS) + most(0, p->tasks - 1) * rows : 0;
    p->item_bytes = ITEM / 2;
    do {        // few enough for a block to find its spans at once
        p->n_items = 0, p->item_bytes *= 2;
        for (int i = 0; i < p->n_jobs; i++)
            p->first[i] = p->n_items, p->n_items += items_of(p->jobs[i].w, p->item_bytes);
    } while (p->n_items > 2 * d->sms * (WARP - 1) && p->item_bytes < 1 << 20);
    p->n_blocks = least(p->n_items, most(d->sms, 2 * d->sms - beside));     // all resident: none waits for an SM
    launch(d, name, nt == 1 ? linears<1> : nt == 2 ? linears<2> : linears<4>,
           grid_of(p->n_blocks + beside, blocks_of(rows, 8 * nt)), THREADS, (size_t)product_bytes(nt), *p);
}
// Runs p's jobs and what is beside them, then empties p.
static void jobs_run(cuda *d, const char *name, linears_args *p, int rows, const int *n_rows) {
    p->n_rows = n_rows, p->rows = rows;
    if (d->grid.whole && n_rows == &d->dev.n->n_rows) {
        jobs_by_lt(d, p);
        if (d->whole) jobs_by_panels(d, name, p, DSPARK_FP8), jobs_by_panels(d, name, p, DSPARK_BF16);
    }
    if (p->n_jobs || p->mix.out || p->tasks) (rows >= MANY_ROWS && d->wide ? jobs_wide : jobs_few)(d, name, p);
    p->n_jobs = p->tasks = 0, p->mix.out = NULL;
}

// ---- the operations of a pass -----------------------------------------------------------------

// The deferred updates, and with them the sums for a mix.
static void run_stream(cuda *d, const float *fn, int n_out) {
    stream_args p;
    int rows = d->grid.rows, slices = d->s.h / SLICE;
    memset(&p, 0, sizeof p);
    p.c = d->s, p.n = d->dev.n, p.rows = d->dev.rows, p.from = d->from, p.embed = d->embed, p.y = d->from_y,
    p.slots = d->slots;
    p.post_comb = d->post_comb, p.stream = d->residual, p.tap = d->tap, p.taps_at = d->layers * N_ARRAYS;
    p.fn = fn, p.n_out = n_out, p.partial = d->partial;
    if (rows <= STREAM_FEW) launch(d, "stream", stream_few, grid_of(slices, rows), THREADS, 0, p);
    else
        launch(d, "stream", rows < MANY_ROWS ? stream<1> : stream<2>,
               grid_of(slices, blocks_of(rows, (rows < MANY_ROWS ? 2 : 8) * WARPS)), THREADS, 0, p);
    d->from = STREAM_AS_IS, d->tap = -1;
}
static void run_mix(cuda *d, const mixer *m, const float *norm, int head) {
    mix_args p;
    memset(&p, 0, sizeof p);
    p.c = d->s, p.n = head ? &d->dev.n->n_logits : &d->dev.n->n_rows, p.list = head ? d->dev.logit_rows : NULL;
    p.partial = d->partial, p.stream = d->residual, p.scale = m->scale, p.base = m->base, p.norm = norm;
    p.mixes = head ? NULL : d->mixes, p.hidden = head ? d->hidden : NULL, p.x = d->x;
    int rows = head ? d->grid.logits : d->grid.rows, parts = 1;
    while (rows <= 8 && parts < 8 && d->s.h % (2 * parts * 8 * WARP) == 0) parts *= 2;
    LAUNCH(mix, grid_of(rows, parts), blocks_of(d->s.h, 8 * WARP) * WARP, 0, p);
    d->now = *m;
}
static post_comb_args post_comb_of(const cuda *d) {
    post_comb_args p = { d->mixes, d->now.scale, d->now.base, d->post_comb, d->s.hc_eps, d->s.sinkhorn_iters };
    return p;
}

static void run_turns(cuda *d) {
    turns_args p = { d->dev.n, d->dev.rows, { d->freqs[0], d->freqs[1] }, d->s.R / 2, d->turns };
    LAUNCH(turns, grid_of(d->grid.rows, 1), THREADS, 0, p);
}
static void op_pass(cuda *d, int which) {
    d->grid = d->passes[which], d->from = STREAM_EMBED, d->tap = -1;
    d->serial = 1, run_turns(d), d->serial = 0;
}
static void op_mix_in(cuda *d, int l, int sub) {
    const layer_weights *w = &d->layer[l];
    run_stream(d, w->hc[sub].fn, MIX);
    run_mix(d, &w->hc[sub], w->norm[sub], 0);
}
static void op_mix_out(cuda *d, int sub) {
    if (d->from) run_stream(d, NULL, 0);
    d->from = STREAM_ADD, d->from_y = sub == DSPARK_SUB_ATTN ? d->y : d->down,
    d->slots = sub == DSPARK_SUB_ATTN ? 1 : d->s.K + 1;
}
static void op_tap(cuda *d, int index) {
    if (d->tap >= 0) run_stream(d, NULL, 0);
    d->tap = index;
}

static void attention_index(cuda *d, int l, int row0, int rows) {
    index_args p;
    memset(&p, 0, sizeof p);
    p.c = d->s, p.n = d->dev.n, p.rows = d->dev.rows, p.row0 = row0, p.layer = l, p.turns = d->turns;
    p.index_q = d->index_q, p.index_w = d->index_w, p.q = d->query, p.w = d->query_w;
    p.scores = d->scores, p.n_scores = d->scores_bytes / sizeof(float) / INDEX_ROWS, p.chosen = d->chosen,
    p.arrived = d->arrived;
    LAUNCH(index_query, grid_of(blocks_of(d->s.index_heads, WARPS), rows), THREADS, 0, p);
    LAUNCH(index_scores, grid_of(most(1, 2 * d->sms / rows), rows), THREADS,
           query_bytes(d->s.index_heads, d->s.I), p);
}
static void attention_project(cuda *d, const layer_weights *w, int l) {
    linears_args p;
    kv_args a;
    round_args r;
    int target = !d->grid.drafts, tasks = 1;
    memset(&p, 0, sizeof p), memset(&a, 0, sizeof a), memset(&r, 0, sizeof r);
    a.c = d->s, a.n = d->dev.n, a.rows = d->dev.rows, a.turns = d->turns, a.set = w->ratio > 0,
    a.freqs_compressed = d->freqs[1];
    a.kv_norm = w->kv_norm, a.kv = d->kv, a.ratio = w->ratio, a.layer = l;
    r.c = d->s, r.n_rows = &d->dev.n->n_rows, r.x = d->qr, r.norm = w->q_norm, r.n = d->s.q_lora, r.out = d->qr_in,
    r.parts = 1;
    for (int i = 0; i < 2; i++) {
        const compressor *o = &w->pool[i];
        pooling *q = &a.pool[i];
        if (!target || !w->ratio || (i && w->ratio != 4)) continue;
        q->ape = o->ape, q->norm = o->norm, q->d = o->d, q->w = o->w;
        q->kv = i ? d->index_kv : d->pool_kv, q->gate = i ? d->index_gate : d->pool_gate;
        q->state_kv = i ? INDEX_KV : KV, q->state_gate = i ? INDEX_GATE : GATE;
        job_add(&p, o->wkv, d->x, q->kv, o->w);
        job_add(&p, o->wgate, d->x, q->gate, o->w);
        tasks++;
    }
    if (target && w->ratio == 4 && d->grid.indexed)
        job_add(&p, w->index_weights, d->x, d->index_w, d->s.index_heads);
    job_add(&p, w->wq_a, d->x, d->qr, d->s.q_lora);
    job_add(&p, w->wkv, d->x, d->kv, d->s.D);
    p.mix = post_comb_of(d);
    jobs_run(d, "linears wq_a wkv", &p, d->grid.rows, &d->dev.n->n_rows);
    LAUNCH(round_rows, grid_of(d->grid.rows, 1), THREADS, 0, r);
    if (d->grid.rows < MANY_ROWS || !d->wide) p.tasks = tasks, p.kv = a;
    else LAUNCH(kv_rows, grid_of(d->grid.rows, tasks), THREADS, (size_t)most(d->s.D, d->s.I) * sizeof(float), a);
    job_add(&p, w->wq_b, d->qr_in, d->q, d->s.H * d->s.D);
    if (target && w->ratio == 4 && d->grid.indexed)
        job_add(&p, w->index_wq_b, d->qr_in, d->index_q, d->s.index_heads * d->s.I);
    jobs_run(d, "linears wq_b", &p, d->grid.rows, &d->dev.n->n_rows);
}

// What of this pass goes into the rings.
static commit_args commit_of(const cuda *d, const layer_weights *w, int l) {
    commit_args o;
    memset(&o, 0, sizeof o);
    o.rows = d->dev.rows, o.layer = l, o.ratio = w->ratio, o.arrays = d->grid.drafts ? 0 : w->ratio ? N_ARRAYS : 1;
    o.from[WINDOW] = d->kv, o.width[WINDOW] = d->s.D;
    for (int i = 0; i < 2 && w->ratio; i++) {
        int kv = i ? INDEX_KV : KV, gate = i ? INDEX_GATE : GATE;
        if (i && w->ratio != 4) continue;
        o.from[kv] = i ? d->index_kv : d->pool_kv, o.from[gate] = i ? d->index_gate : d->pool_gate;
        o.width[kv] = o.width[gate] = w->pool[i].w;
    }
    return o;
}
// Scores, softmax and values of all rows.
static void attention_values(cuda *d, const layer_weights *w, int l, int o_pitch) {
    int many = d->grid.rows >= MANY_ROWS, whole = d->grid.whole && d->whole, chooses = w->ratio == 4 &&
        d->grid.indexed && !d->grid.drafts, heads = blocks_of(d->s.H, TILE),
        at_once = !many ? ATTEND_ROWS : whole && !chooses ? d->grid.rows : INDEX_ROWS;
    attend_args a;
    memset(&a, 0, sizeof a);
    a.c = d->s, a.n = d->dev.n, a.rows = d->dev.rows, a.layer = l, a.ratio = d->grid.drafts ? 0 : w->ratio,
    a.turns = d->turns, a.set = w->ratio > 0;
    a.q = d->q, a.kv = d->kv, a.sink = w->sink, a.chosen = d->chosen, a.part = d->part, a.o = d->o;
    a.o_group = w->wo_a.cols, a.o_pitch = o_pitch, a.panels = by_panels(w->wo_a);
    for (a.row0 = 0; a.row0 < d->grid.rows; a.row0 += at_once) {
        int rows = least(at_once, d->grid.rows - a.row0);
        if (chooses) attention_index(d, l, a.row0, rows);
        if (whole) {
            LAUNCH(attend_whole, grid_of(rows, blocks_of(d->s.H, WHOLE_HEADS)), WHOLE_THREADS,
                   whole_shared(&d->s, NULL, NULL), a);
            continue;
        }
        if (many) {
            LAUNCH(attend_rows, grid_of(rows, heads), THREADS, attend_rows_shared(&d->s), a);
            continue;
        }
        launch(d, "attend", d->grid.rows == 1 ? attend<1> : attend<2>, grid_of(rows * SPLITS, heads), THREADS,
               attend_shared(&d->s, NULL, NULL), a);
        LAUNCH(attend_merge, grid_of(rows, blocks_of(d->o.stride, 8 * MERGED)), MERGE_THREADS, 0, a);
    }
}
static void op_attention(cuda *d, int l) {
    const layer_weights *w = &d->layer[l];
    linears_args p;
    round_args r;
    int o_pitch = blocks_of(w->wo_a.cols, 256) * 256;
    attention_project(d, w, l);
    attention_values(d, w, l, o_pitch);
    memset(&p, 0, sizeof p), memset(&r, 0, sizeof r);
    r.c = d->s, r.n_rows = &d->dev.n->n_rows, r.x = d->low, r.n = w->wo_a.rows, r.out = d->low_in;
    r.parts = blocks_of(r.n, 8 * THREADS), r.commit = commit_of(d, w, l);
    job_add(&p, w->wo_a, d->o, d->low, w->wo_a.rows, 1);
    p.jobs[0].group = d->c->o_lora_rank, p.jobs[0].x_group = o_pitch;
    jobs_run(d, "linears wo_a", &p, d->grid.rows, &d->dev.n->n_rows);
    LAUNCH(round_rows, grid_of(d->grid.rows, r.parts + r.commit.arrays), THREADS, 0, r);
    job_add(&p, w->wo_b, d->low_in, d->y, d->s.h);
    jobs_run(d, "linears wo_b", &p, d->grid.rows, &d->dev.n->n_rows);
}

static void cache_run(cuda *d, int l) {
    const layer_weights *w = &d->layer[l];
    cache_args p = { d->active, w->experts, w->home, d->home[l], d->cache, d->slot_bytes, d->n_slots, l * d->s.E,
                     d->slot_of, d->owner, d->used, d->spared, d->cache_state, d->moves };
    LAUNCH(cache_choose, grid_of(1, 1), THREADS, 0, p);
    LAUNCH(cache_fill, grid_of(2 * d->sms, 1), THREADS, 0, p);
}

// Experts of whole blocks, from x to the sums of all slots. e: as for w1 and w3; a: its slot is set here.
static void experts_of_blocks(cuda *d, const experts_args &e, swiglu_args a, const layer_weights *w) {
    int K = d->s.K, width = a.stride, panels = d->n_rows * K > PANEL * d->s.E ? 2 : 1;
    expert_codes_args c = { d->x.rounded, d->x.rounded_scale, d->route, d->where, d->first, d->x.stride, K,
                            d->expert_codes, d->expert_scales };
    whole_args p = { e, d->expert_codes, d->expert_scales, d->route_weight, d->act_codes, d->act_scales, d->x.stride,
                     width };
    linears_args shared;
    input x = d->act;
    LAUNCH(expert_codes, grid_of(d->n_rows, 1), THREADS, 0, c);
    launch(d, "experts w1 w3", panels == 1 ? experts_up_whole<1> : experts_up_whole<2>, grid_of(d->sms, 1), THREADS,
           (size_t)(panel_bytes(panels) + gate_bytes(panels)), p);
    a.slot = K;
    LAUNCH(swiglu, grid_of(d->grid.rows, 1), THREADS, 0, a);
    p.x = d->act_codes, p.x_scale = d->act_scales, p.pitch = width;
    p.e.which = 2, p.e.y[0] = d->down, p.e.y_stride = d->s.h;
    launch(d, "experts w2", panels == 1 ? experts_whole<1> : experts_whole<2>, grid_of(d->sms, 1), THREADS,
           (size_t)panel_bytes(panels), p);
    memset(&shared, 0, sizeof shared);
    x.rounded += K * width, x.rounded_scale += K * width / 128, x.stride = (K + 1) * width;
    if (x.plain) x.plain += K * width;
    job_add(&shared, w->shared.w[2], x, d->down + K * d->s.h, (K + 1) * d->s.h);
    jobs_run(d, "linears w2", &shared, d->grid.rows, &d->dev.n->n_rows);
}
// Few experts get more than half of the rows: 16 at once will do.
static void experts_run(cuda *d, const char *name, experts_args &e, const layer_weights *w) {
    if (d->grid.rows >= MANY_ROWS && d->wide) {
        launch(d, name, experts_wide, grid_of(d->sms, 1), THREADS,
               (size_t)(wide_stages(EXPERT_TILES) * stage_bytes(EXPERT_TILES)), e);
        return;
    }
    e.each_tile = items_of_tile(w->routed.w[e.which], ITEM), e.each = items_of(w->routed.w[e.which], ITEM);
    e.shared_tile = items_of_tile(w->shared.w[e.which], ITEM);
    e.shared_each = e.shared ? items_of(w->shared.w[e.which], ITEM) : 0;
    launch(d, name, d->grid.rows <= 8 ? experts<1> : experts<2>, grid_of(2 * d->sms, 1), THREADS,
           (size_t)product_bytes(d->grid.rows <= 8 ? 1 : 2), e);
}

static void op_moe(cuda *d, int l) {
    const layer_weights *w = &d->layer[l];
    int K = d->s.K, width = d->act.stride, up_stride = (K + 1) * width, threads;
    linears_args p;
    route_args r;
    experts_args e;
    swiglu_args a;
    memset(&p, 0, sizeof p), memset(&r, 0, sizeof r), memset(&e, 0, sizeof e), memset(&a, 0, sizeof a);
    r.c = d->s, r.n = d->dev.n, r.rows = d->dev.rows, r.gate = d->gate, r.bias = w->gate_bias, r.tid2eid = w->tid2eid;
    r.route = d->route, r.weight = d->route_weight, r.first = d->first, r.list = d->list, r.active = d->active;
    r.where = d->where, r.arrived = d->arrived;
    a.c = d->s, a.n = d->dev.n, a.gate = d->up[0], a.up = d->up[1], a.weight = d->route_weight, a.stride = width;
    a.width = d->c->moe_intermediate_size, a.shared_width = w->shared.w[0].rows, a.x = d->act;
    job_add(&p, w->gate, d->x, d->gate, d->s.E);
    for (int i = 0; i < 2; i++) job_add(&p, w->shared.w[i], d->x, d->up[i] + K * width, up_stride);
    p.mix = post_comb_of(d);
    jobs_run(d, "linears gate w1 w3", &p, d->grid.rows, &d->dev.n->n_rows);
    threads = WARP * least(d->s.E > 512 ? 8 : d->s.E > 256 ? 16 : 32, most(8, d->grid.rows));
    LAUNCH(route, grid_of(blocks_of(d->grid.rows, threads / WARP), 1), threads,
           route_bytes(threads / WARP, d->s.E), r);
    if (d->n_slots) cache_run(d, l);
    e.c = d->s, e.n = d->dev.n, e.experts = w->experts, e.first = d->first, e.list = d->list, e.active = d->active;
    e.rows = d->grid.rows, e.n_which = 2, e.n_slots = K + 1, e.x = d->x, e.y[0] = d->up[0], e.y[1] = d->up[1],
    e.y_stride = width;
    if (d->grid.whole && d->whole && w->routed.w[0].dtype == DSPARK_FP4 && w->routed.w[2].dtype == DSPARK_FP4)
        return experts_of_blocks(d, e, a, w);
    experts_run(d, "experts w1 w3", e, w);
    LAUNCH(swiglu, grid_of(d->grid.rows, K + 1), THREADS, 0, a);
    e.routed = 1, e.which = 2, e.n_which = 1, e.x_by_slot = 1, e.x = d->act, e.y[0] = d->down, e.y_stride = d->s.h;
    e.shared = w->experts + d->s.E;
    experts_run(d, "experts w2", e, w);
}

static void op_head(cuda *d, int drafts) {
    const mixer *m = drafts ? &d->draft_hc_head : &d->hc_head;
    linears_args p;
    memset(&p, 0, sizeof p);
    if (!d->grid.logits) {
        if (d->tap >= 0) run_stream(d, NULL, 0);
        return;
    }
    run_stream(d, m->fn, COPIES);
    run_mix(d, m, drafts ? d->draft_norm : d->norm, 1);
    job_add(&p, d->head, d->x, drafts ? d->draft_logits : d->logits, d->s.V);
    jobs_run(d, "linears head", &p, d->grid.logits, &d->dev.n->n_logits);
}

// Taps of positions [inject_from, position) -> main_x = main_norm(main_proj taps) -> a row for each stage's window.
static void op_inject(cuda *d) {
    int n = d->grid.injected, stages = d->c->n_stages;
    const int *n_rows = &d->dev.n->n_injected;
    linears_args p;
    taps_args t;
    round_args r;
    inject_args a;
    if (!n) return;
    memset(&p, 0, sizeof p), memset(&t, 0, sizeof t), memset(&r, 0, sizeof r), memset(&a, 0, sizeof a);
    t.c = d->s, t.n = d->dev.n, t.list = d->dev.injected, t.taps_at = d->layers * N_ARRAYS, t.x = d->main;
    LAUNCH(take_taps, grid_of(n, 1), THREADS, 0, t);
    job_add(&p, d->main_proj, d->main, d->y, d->s.h);
    jobs_run(d, "linears main_proj", &p, n, n_rows);
    r.c = d->s, r.n_rows = n_rows, r.x = d->y, r.norm = d->main_norm, r.n = d->s.h, r.out = d->x, r.parts = 1;
    LAUNCH(round_rows, grid_of(n, 1), THREADS, 0, r);
    for (int i = 0; i < stages; i++) {
        job_add(&p, d->layer[d->c->num_hidden_layers + i].wkv, d->x,
                d->stage_kv + (size_t)i * (size_t)d->max_rows * (size_t)d->s.D, d->s.D);
        if (p.n_jobs == MAX_JOBS || i + 1 == stages) jobs_run(d, "linears wkv of stages", &p, n, n_rows);
    }
    a.c = d->s, a.n = d->dev.n, a.list = d->dev.injected, a.freqs = d->freqs[0], a.kv = d->stage_kv,
    a.norms = d->stage_norms;
    a.max_rows = d->max_rows, a.first_layer = d->c->num_hidden_layers;
    LAUNCH(inject_rows, grid_of(n, stages), THREADS, (size_t)d->s.D * sizeof(float), a);
}

// Draws n rows' tokens; row i is row rows[i] + k.
static void run_draw(cuda *d, const float *logits, tally *tallies, int n, const int *n_rows, const int *rows, int k) {
    draw_args p;
    int weighs = d->grid.weighs;
    int blocks = least(blocks_of(d->s.V, 4 * THREADS), blocks_of(4 * d->sms, n));
    dim3 tiles = grid_of(blocks_of(d->s.V, SIFTED), n);
    memset(&p, 0, sizeof p);
    p.c = d->s, p.n = n_rows, p.logits = logits, p.rows = rows, p.k = k, p.draws = d->dev.draws, p.best = d->best;
    p.chunk = blocks_of(blocks_of(d->s.V, blocks), 4) * 4;
    p.tallies = tallies, p.peak = d->peak, p.arrived = d->surveyed, p.mass = d->mass;
    p.draft_logits = d->draft_logits, p.draft_tallies = d->draft_tallies, p.drafted = d->dev.drafted;
    if (weighs) LAUNCH(survey, tiles, THREADS, 0, p);
    for (; p.by_weight < 2; p.by_weight++)
        for (p.level = 0; weighs & (p.by_weight ? BY_WEIGHT : BY_COUNT) && p.level < 4; p.level++)
            LAUNCH(sift, tiles, THREADS, 0, p);
    if (weighs) LAUNCH(weigh, tiles, THREADS, 0, p);
    LAUNCH(draw, grid_of(blocks, n), THREADS, 0, p);
}
static void op_draw(cuda *d) {
    drawn_args p = { &d->dev.n->n_logits, d->best, d->dev.tokens };
    run_draw(d, d->logits, d->tallies, d->grid.logits, p.n, NULL, 0);
    LAUNCH(drawn, grid_of(blocks_of(d->grid.logits, THREADS), 1), THREADS, 0, p);
}

static void draft_step(cuda *d, int k, int drawn_here) {
    int n = d->grid.segments, rank = d->s.rank, kind = d->w->head_kind;
    linears_args p;
    markov_args m;
    memset(&p, 0, sizeof p), memset(&m, 0, sizeof m);
    m.c = d->s, m.n = d->dev.n, m.segment_row = d->dev.segment_row, m.previous = d->dev.previous, m.k = k,
    m.kind = kind;
    m.best = drawn_here && k ? d->best : NULL;
    m.w1 = d->w1, m.hidden = d->hidden, m.confidence_w = d->confidence_w, m.confidence_bias = d->w->confidence_bias;
    m.confidence = d->dev.confidence, m.e = d->e, m.rnn = d->rnn, m.z = d->z, m.bias = d->joint_bias,
    m.in = d->markov_in, m.out = d->markov_out;
    LAUNCH(markov_begin, grid_of(n, 1), THREADS, (size_t)(d->s.h + 2 * rank) * sizeof(float), m);
    if (kind == DSPARK_HEAD_NONE) return;
    if (kind != DSPARK_HEAD_VANILLA) {
        job_add(&p, d->joint, d->markov_in, d->z, 3 * rank);
        jobs_run(d, "linears markov joint", &p, n, &d->dev.n->n_segments);
        LAUNCH(markov_gate, grid_of(n, 1), THREADS, (size_t)rank * sizeof(float), m);
    }
    job_add(&p, d->w2, d->markov_out, d->draft_logits + (size_t)k * (size_t)d->s.V, d->s.V);
    p.jobs[0].add = 1, p.jobs[0].y_rows = d->dev.segment_row;
    jobs_run(d, "linears markov_w2", &p, n, &d->dev.n->n_segments);
}

// All steps, each token drawn from the logits before the next step needs it.
static void op_steps(cuda *d, int n_steps) {
    drawn_args p = { &d->dev.n->n_rows, d->best, d->dev.drafted };
    for (int k = 0; k < n_steps; k++) {
        draft_step(d, k, 1);
        run_draw(d, d->draft_logits, d->draft_tallies, d->grid.segments, &d->dev.n->n_segments, d->dev.segment_row, k);
    }
    LAUNCH(drawn, grid_of(blocks_of(d->grid.rows, THREADS), 1), THREADS, 0, p);
}
static void op_choose(cuda *d) {
    choose_args p = { d->dev.what, d->dev.picks, d->dev.drafted, d->dev.confidence, d->value, d->candidates,
                      d->dev.lengths, d->dev.n, d->dev.rows, d->dev.logit_rows, d->dev.draws };
    LAUNCH(choose, grid_of(1, 1), THREADS, 0, p);
}

static void run_op(cuda *d, const operation *o) {
    switch (o->op) {
    case OP_PASS: op_pass(d, o->sub); break;
    case OP_MIX_IN: op_mix_in(d, o->layer, o->sub); break;
    case OP_ATTENTION: op_attention(d, o->layer); break;
    case OP_MOE: op_moe(d, o->layer); break;
    case OP_MIX_OUT: op_mix_out(d, o->sub); break;
    case OP_TAP: op_tap(d, o->layer); break;
    case OP_HEAD: op_head(d, 0); break;
    case OP_INJECT: op_inject(d); break;
    case OP_STEPS: op_steps(d, o->layer); break;
    case OP_CHOOSE: op_choose(d); break;
    case OP_DRAW: op_draw(d); break;
    default: op_head(d, 1);
    }
}

// ---- a pass, from begin to end ----------------------------------------------------------------
// Operations are noted, and run when the pass ends: the same calls with grids of the same size are one recording, a
// CUDA graph. A draft that asks for draws waits for its steps or, if the device chooses among them, for the pass that
// verifies it: a cycle is then one recording with one read-back.

static void note(void *device, int op, int l, int sub) {
    cuda *d = (cuda *)device;
    operation o = { (unsigned char)op, (unsigned char)sub, (short)l };
    if (d->n_ops < d->max_ops) d->ops[d->n_ops++] = o;
    else fail(d, DSPARK_ERROR_ARGUMENT, "cuda: more than %d operations in a pass", d->max_ops);
}
static void cuda_mix_in(void *d, int l, int sub) { note(d, OP_MIX_IN, l, sub); }
static void cuda_attention(void *d, int l) { note(d, OP_ATTENTION, l, 0); }
static void cuda_moe(void *d, int l) { note(d, OP_MOE, l, 0); }
static void cuda_mix_out(void *d, int l, int sub) { note(d, OP_MIX_OUT, l, sub); }
static void cuda_tap(void *d, int index) { note(d, OP_TAP, index, 0); }
static void cuda_head(void *d) { note(d, OP_HEAD, 0, 0); }
static void cuda_inject(void *d) { note(d, OP_INJECT, 0, 0); }
static void cuda_draft_head(void *d) { note(d, OP_DRAFT_HEAD, 0, 0); }

// The first n items of an array of the block to the device.
static void block_copy(cuda *d, void *to, const void *from, size_t n, size_t size) {
    if (n) TRY(cudaMemcpyAsync(to, from, n * size, cudaMemcpyHostToDevice, d->stream));
}

// One of a session's arrays, from `at` on: `ring` rows, or (0) a row for every `ratio` tokens; both 0: none.
typedef struct { size_t at, row_bytes; int ring, ratio; } state_array;
typedef struct {
    cuda *d;
    uint8_t *memory;            // on the device: table, then the arrays
    uint8_t **table;            // [layers][N_ARRAYS], then the taps
    state_array *arrays;
    int n_arrays, max_context;
    size_t bytes;
} state;

static void segment_rows(cuda *d, const dspark_pass *pass, int i, int *n_logits) {
    const dspark_segment *g = &pass->segments[i];
    const state *s = (const state *)g->state;
    d->host.segment_row[i] = g->row;
    for (int k = 0; k < g->n_rows; k++) {
        row r = { s->table, pass->ids[g->row + k], g->position + k, g->keep_rows, g->row, g->position, g->n_rows };
        d->host.rows[g->row + k] = r;
        if (k >= g->logits_from) d->host.logit_rows[(*n_logits)++] = g->row + k;
    }
}

// Notes the positions whose taps are injected: full buffers run at once, the rest is left to the pass.
static int inject_all(cuda *d, const dspark_pass *pass) {
    int n = 0;
    for (int i = 0; pass->kind == DSPARK_PASS_DRAFT && i < pass->n_segments; i++)
        for (int p = pass->segments[i].inject_from; p < pass->segments[i].position; p++) {
            injection one = { ((const state *)pass->segments[i].state)->table, p };
            if (n == d->max_rows) {
                d->host.n->n_injected = d->grid.injected = n;
                block_copy(d, d->dev.n, d->host.n, 1, sizeof *d->dev.n);
                block_copy(d, d->dev.injected, d->host.injected, (size_t)n, sizeof one);
                op_inject(d);
                TRY(cudaStreamSynchronize(d->stream));
                n = 0;
            }
            d->host.injected[n++] = one;
        }
    return n;
}

static draw_row draw_of(const cuda *d, const dspark_device_draw *a) {
    draw_row r = { a->temperature, a->top_p < 1 ? a->top_p : 0, a->min_p, a->top_k < d->s.V ? a->top_k : 0, a->purpose,
                   a->k, a->draft_row, { (unsigned)a->seed, (unsigned)(a->seed >> 32) },
                   { (unsigned)a->at, (unsigned)(a->at >> 32) } };
    return r;
}
static void draws_copy(cuda *d, const dspark_device_draw *from, int n) {
    for (int i = 0; i < n; i++) d->host.draws[i] = draw_of(d, &from[i]);
    block_copy(d, d->dev.draws, d->host.draws, (size_t)n, sizeof(draw_row));
}
// WEIGHED and BY_* of n draws
static int weighs_of(const cuda *d, const dspark_device_draw *draws, int n) {
    int weighs = 0;
    for (int i = 0; draws && i < n; i++) {
        draw_row r = draw_of(d, &draws[i]);
        if (!(r.temperature > 0)) continue;
        if (r.purpose || r.top_k || r.top_p > 0 || r.min_p > 0 || r.temperature < COLD) weighs |= WEIGHED;
        weighs |= (r.top_k ? BY_COUNT : 0) | (r.top_p > 0 ? BY_WEIGHT : 0);
    }
    return weighs;
}

// Begins to note a pass, alone or after a draft.
static void pass_note(cuda *d, const dspark_pass *pass, int n_logits, int n_injected) {
    extent *e;
    if (!d->pending) d->n_ops = d->n_passes = 0;
    e = &d->passes[d->n_passes];
    e->drafts = pass->kind == DSPARK_PASS_DRAFT, e->rows = least(bucket(pass->n_rows), d->max_rows);
    e->logits = least(bucket(n_logits), e->rows), e->injected = least(bucket(n_injected), d->max_rows);
    e->segments = least(bucket(pass->n_segments), e->rows), e->indexed = 0;
    e->whole = pass->whole && d->fast_prefill;
    e->weighs = weighs_of(d, pass->draws, e->drafts || pass->choice ? pass->n_segments : n_logits);
    for (int i = 0; i < pass->n_segments; i++)
        e->indexed |= (pass->segments[i].position + pass->segments[i].n_rows) / 4 > d->s.index_topk;
    d->draws = pass->draws != NULL, d->choice = pass->choice != NULL;
    d->n_rows = pass->n_rows, d->n_segments = pass->n_segments, d->n_logits = n_logits;
    note(d, OP_PASS, 0, d->n_passes++);
}

// Notes the pending draft's steps, and the choice.
static void choice_begin(cuda *d, const dspark_pass *pass) {
    const dspark_choice *c = pass->choice;
    for (int i = 0; i < d->n_segments; i++) d->host.previous[i] = d->host.rows[d->host.segment_row[i]].id;
    block_copy(d, d->dev.previous, d->host.previous, (size_t)d->n_segments, sizeof(int));
    note(d, OP_STEPS, c->n_steps, 0), note(d, OP_CHOOSE, 0, 0);
    for (int i = 0; i < pass->n_segments; i++) {
        const dspark_segment *g = &pass->segments[i];
        pick *p = &d->host.picks[i];
        p->state = ((const state *)g->state)->table, p->id = pass->ids[i], p->position = g->position;
        p->draft_row = c->draft_row[i], p->limit = g->n_rows - 1, p->weight = c->weight[i],
        p->threshold = c->threshold[i], p->draw = draw_of(d, &pass->draws[i]);
        p->calibration = *c->calibration[i];
    }
    d->host.what->n = pass->n_segments, d->host.what->budget = c->budget;
    block_copy(d, d->dev.picks, d->host.picks, (size_t)pass->n_segments, sizeof(pick));
    block_copy(d, d->dev.what, d->host.what, 1, sizeof(picking));
    pass_note(d, pass, pass->n_rows, 0);
}

static dspark_status cuda_pass_begin(void *device, const dspark_pass *pass) {
    cuda *d = (cuda *)device;
    counts *n = d->host.n;
    int n_logits = 0, n_injected;
    if (d->status) return result(d);        // from a draft step after its pass
    if (pass->n_rows < 1 || pass->n_rows > d->max_rows || (pass->choice && !d->pending)) {
        fail(d, DSPARK_ERROR_ARGUMENT, "a pass of %d rows: expected 1 to %d, and to choose a draft before",
             pass->n_rows, d->max_rows);
        return result(d);
    }
    if (pass->choice) return choice_begin(d, pass), result(d);
    if (d->pending) TRY(cudaStreamSynchronize(d->stream));      // a draft that came to nothing
    d->pending = 0;
    for (int i = 0; i < pass->n_segments; i++) segment_rows(d, pass, i, &n_logits);
    n_injected = inject_all(d, pass);
    pass_note(d, pass, n_logits, n_injected);
    n->n_rows = pass->n_rows, n->n_logits = n_logits, n->n_segments = pass->n_segments, n->n_injected = n_injected;
    n->drafts = pass->kind == DSPARK_PASS_DRAFT;
    block_copy(d, d->dev.n, n, 1, sizeof *n);
    block_copy(d, d->dev.rows, d->host.rows, (size_t)n->n_rows, sizeof *d->host.rows);
    block_copy(d, d->dev.logit_rows, d->host.logit_rows, (size_t)n_logits, sizeof(int));
    block_copy(d, d->dev.segment_row, d->host.segment_row, (size_t)n->n_segments, sizeof(int));
    block_copy(d, d->dev.injected, d->host.injected, (size_t)n_injected, sizeof(injection));
    if (d->draws) draws_copy(d, pass->draws, n->drafts ? n->n_segments : n_logits);
    return result(d);
}

// Each in an NVTX range of its name.
static void run_ops(cuda *d) {
    static const char *const names[] = { "pass", "mix_in", "attention",  "moe",         "mix_out", "tap",
                                         "head", "inject", "draft_head", "draft_steps", "choose",  "draw" };
    for (int i = 0; i < d->n_ops && !d->status; i++) {
        nvtxRangePushA(names[d->ops[i].op]);
        run_op(d, &d->ops[i]);
        nvtxRangePop();
    }
    if (TRACED) run_turns(d), trace_between();      // its turn ends the last kernel's time
}

static void record(cuda *d, recording *r, uint64_t calls) {
    cudaGraph_t graph = NULL;
    memset(r, 0, sizeof *r);
    if (!TRY(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal))) return;
    r->traced[0] = trace_at(), run_ops(d), r->traced[1] = trace_at();
    cudaError_t ended = cudaStreamEndCapture(d->stream, &graph);        // also after a failure
    good(d, ended, "cudaStreamEndCapture");
    if (TRY(cudaGraphInstantiate(&r->exec, graph, 0))) r->calls = calls;
    if (graph) cudaGraphDestroy(graph);
}

static uint64_t calls_of(const cuda *d) {
    uint64_t calls = 1469598103934665603u + TRACED;
    for (int i = 0; i < d->n_ops; i++) {
        const operation *o = &d->ops[i];
        calls = (calls ^ (uint64_t)(o->op | o->sub << 8 | (int)o->layer << 16)) * 1099511628211u;
    }
    for (int i = 0; i < d->n_passes; i++) {
        const extent *e = &d->passes[i];
        const int sizes[] = { e->drafts, e->rows, e->logits, e->injected, e->segments, e->indexed, e->whole,
                              e->weighs };
        for (int k = 0; k < 8; k++) calls = (calls ^ (uint64_t)sizes[k]) * 1099511628211u;
    }
    return calls;
}

// Runs what was noted: as a recording, made if there is none (the oldest makes room); with many rows, call by call.
static void play(cuda *d) {
    uint64_t calls = calls_of(d);
    int i = 0, rows = 0;
    for (int k = 0; k < d->n_passes; k++) rows = most(rows, d->passes[k].rows);
    if (d->status || d->n_ops < 2) return;      // nothing but OP_PASS
    d->grid = d->passes[d->n_passes - 1];       // of steps that the host asks for one by one
    if (rows > RECORDED_ROWS) {
        i = trace_at(), run_ops(d), trace_played(i, trace_at());
        return;
    }
    while (i < d->n_recordings && d->recordings[i].calls != calls) i++;
    if (i == d->n_recordings) {
        if (i == MAX_RECORDINGS) i = d->oldest, d->oldest = (i + 1) % MAX_RECORDINGS;
        else d->n_recordings++;
        if (d->recordings[i].exec) cudaGraphExecDestroy(d->recordings[i].exec);
        record(d, &d->recordings[i], calls);
    }
    TRY(cudaGraphLaunch(d->recordings[i].exec, d->stream));
    trace_played(d->recordings[i].traced[0], d->recordings[i].traced[1]);
}

// The part of the block that comes back.
static void answer_copy(cuda *d) {
    size_t n = (size_t)((uint8_t *)(d->dev.confidence + d->max_rows) - (uint8_t *)d->dev.tokens);
    TRY(cudaMemcpyAsync(d->host.tokens, d->dev.tokens, n, cudaMemcpyDeviceToHost, d->stream));
}

static dspark_status cuda_pass_end(void *device, dspark_pass_result *out) {
    cuda *d = (cuda *)device;
    size_t V = (size_t)d->s.V;
    int drafts = d->passes[d->n_passes - 1].drafts, drawn_here = d->draws && !drafts && d->n_logits;
    out->logits = drafts ? d->host_drafts : d->host_logits, out->n_logits = d->n_logits;
    out->tokens = drawn_here ? d->host.tokens : NULL, out->lengths = out->drafts = NULL;
    out->confidence_logits = drafts || d->choice ? d->host.confidence : NULL;
    if (drafts && d->draws) return d->pending = 1, result(d);       // the steps follow
    if (drawn_here) note(d, OP_DRAW, 0, 0);
    play(d);
    if (drawn_here) answer_copy(d);
    for (int i = 0, n; i < d->n_logits && !drafts && !d->choice; i += n) {  // logits: runs of rows not drawn here
        for (n = 0; i + n < d->n_logits && (!d->draws || d->host.draws[i + n].temperature < 0);) n++;
        if (n)
            TRY(cudaMemcpyAsync(d->host_logits + (size_t)i * V, d->logits + (size_t)i * V,
                                (size_t)n * V * sizeof(float), cudaMemcpyDeviceToHost, d->stream));
        else n = 1;
    }
    TRY(cudaStreamSynchronize(d->stream));
    d->pending = 0;
    if (!d->choice) return result(d);
    out->lengths = d->host.lengths, out->drafts = d->host.drafted, out->n_logits = d->n_segments;
    for (int i = 0; i < d->n_segments && !d->status; i++) out->n_logits += d->host.lengths[i];
    return result(d);
}

// ---- the sequential head ----------------------------------------------------------------------

// Logits of step k to the host. A failure shows as NaN, which is no draft, and the next pass_begin returns it.
static void cuda_draft_step(void *device, int k, const int32_t *previous) {
    cuda *d = (cuda *)device;
    size_t V = (size_t)d->s.V;
    for (int i = 0; i < d->n_segments; i++) d->host.previous[i] = previous[i];
    block_copy(d, d->dev.previous, d->host.previous, (size_t)d->n_segments, sizeof(int));
    draft_step(d, k, 0);
    for (int i = 0; i < d->n_segments; i++) {
        size_t r = (size_t)(d->host.segment_row[i] + k);
        TRY(cudaMemcpyAsync(d->host_drafts + r * V, d->draft_logits + r * V, V * sizeof(float), cudaMemcpyDeviceToHost,
                            d->stream));
    }
    answer_copy(d);
    TRY(cudaStreamSynchronize(d->stream));
    for (int i = 0; d->status && i < d->n_segments; i++) d->host_drafts[(size_t)(d->host.segment_row[i] + k) * V] = NAN;
}
// The pending draft and all its steps.
static dspark_status cuda_draft_steps(void *device, int n_steps, const int32_t *previous, int32_t *tokens) {
    cuda *d = (cuda *)device;
    for (int i = 0; i < d->n_segments; i++) d->host.previous[i] = previous[i];
    block_copy(d, d->dev.previous, d->host.previous, (size_t)d->n_segments, sizeof(int));
    note(d, OP_STEPS, n_steps, 0);
    play(d);
    answer_copy(d);
    TRY(cudaStreamSynchronize(d->stream));
    d->pending = 0;
    for (int r = 0; r < d->n_rows; r++) tokens[r] = d->status ? -1 : d->host.drafted[r];
    return result(d);
}
// From the caller's logits: through the same kernels as all others, so the same token.
static dspark_status cuda_draw(void *device, const float *logits, const dspark_device_draw *draw_it, int32_t *token) {
    cuda *d = (cuda *)device;
    if (d->status) return result(d);
    memset(d->host.n, 0, sizeof *d->host.n);
    d->host.n->n_logits = d->grid.logits = 1, d->n_ops = d->pending = 0, d->grid.weighs = weighs_of(d, draw_it, 1);
    memcpy(d->host_logits, logits, (size_t)d->s.V * sizeof *logits);
    block_copy(d, d->dev.n, d->host.n, 1, sizeof *d->host.n);
    block_copy(d, d->logits, d->host_logits, (size_t)d->s.V, sizeof *logits);
    draws_copy(d, draw_it, 1);
    op_draw(d);
    TRY(cudaMemcpyAsync(d->host.tokens, d->dev.tokens, sizeof(int), cudaMemcpyDeviceToHost, d->stream));
    TRY(cudaStreamSynchronize(d->stream));
    *token = d->status ? -1 : d->host.tokens[0];
    return result(d);
}
static float *cuda_draft_logits(void *device) { return ((cuda *)device)->host_drafts; }

// ---- weights ----------------------------------------------------------------------------------
// The checkpoint is walked twice: what it takes is counted, then all of it goes to the device in the order in which it
// is stored there, through two pinned buffers. Matrices keep their bytes, but go tile by tile, unit by unit, so
// that a unit is one copy: rows are padded to whole units, tiles to 16 rows; FP4's codes and scales are put in the
// order in which lanes want them.

typedef struct {
    cuda *d;
    uint8_t *slab;              // NULL: counting
    size_t n, total, flushed, filled;
    size_t at_home;             // bytes of experts put into host memory
    int home;                   // 1: slab is host memory
    uint8_t *stage[2];
    cudaEvent_t event[2];
    int which, used[2];
    const dspark_model_desc *desc;
} uploader;

static void up_progress(const uploader *u) {
    double done = (double)(u->flushed + u->at_home) / (double)u->total;
    if (u->desc->progress && !u->desc->progress(u->desc->user, (float)done))
        fail(u->d, DSPARK_ERROR_CANCELLED, "cuda: cancelled by the progress callback");
}
static void up_flush(uploader *u) {
    cuda *d = u->d;
    if (!u->filled) return;
    TRY(cudaMemcpyAsync(u->slab + u->flushed, u->stage[u->which], u->filled, cudaMemcpyHostToDevice, d->stream));
    TRY(cudaEventRecord(u->event[u->which], d->stream));
    u->used[u->which] = 1, u->flushed += u->filled, u->filled = 0, u->which ^= 1;
    if (u->used[u->which]) TRY(cudaEventSynchronize(u->event[u->which]));
    up_progress(u);
}
// n bytes more; p NULL: zeros
static void up_put(uploader *u, const void *p, size_t n) {
    if (u->home && u->slab) {
        if (p) memcpy(u->slab + u->n, p, n);
        else memset(u->slab + u->n, 0, n);
    }
    u->n += n;
    while (u->slab && !u->home && n && !u->d->status) {
        size_t some = n < STAGE_BYTES - u->filled ? n : STAGE_BYTES - u->filled;
        if (p) memcpy(u->stage[u->which] + u->filled, p, some), p = (const char *)p + some;
        else memset(u->stage[u->which] + u->filled, 0, some);
        u->filled += some, n -= some;
        if (u->filled == STAGE_BYTES) up_flush(u);
    }
}
// Where the next array begins: 256-byte aligned.
static const uint8_t *up_begin(uploader *u) {
    up_put(u, NULL, (size_t)(-(int64_t)u->n & 255));
    return (const uint8_t *)((uintptr_t)u->slab + u->n);
}
static const void *up_array(uploader *u, const void *p, size_t n, size_t size) {
    const uint8_t *at = up_begin(u);
    if (!p) return NULL;
    up_put(u, p, n * size);
    return at;
}
static const float *up_floats(uploader *u, const float *p, size_t n) {
    return (const float *)up_array(u, p, n, sizeof *p);
}

// Refuses scales too large for decoding.
static void check_scale(uploader *u, const dspark_matrix *m, uint8_t byte) {
    int room = 254 - (m->dtype == DSPARK_FP4 ? FP4_SHIFT : 0);
    if (byte > room)
        fail(u->d, DSPARK_ERROR_UNSUPPORTED, "cuda: a matrix of %d x %d has a scale of 2^%d, expected at most 2^%d",
             m->rows, m->cols, byte - 127, room - 127);
}

// FP4's scales of a unit: 16 bytes for each g, block b's scales of rows g and g + 8 at 2 b, times decoding's 2^14.
// Those of padding are 0: experts_whole takes the largest of a tile.
static void up_fp4_scales(uploader *u, const dspark_matrix *m, int m0, int unit) {
    enum { BLOCKS = 8 };
    int in_row = m->cols / 32, first = unit * BLOCKS, rows = least(TILE, m->rows - m0),
        blocks = least(BLOCKS, in_row - first);
    uint8_t some[UNIT], largest = 0;
    memset(some, FP4_SHIFT, sizeof some);
    for (int r = 0; r < rows; r++) {
        const uint8_t *from = m->scale + (size_t)(m0 + r) * (size_t)in_row + (size_t)first;
        for (int b = 0; b < blocks; b++) {
            if (from[b] > largest) largest = from[b];
            some[r % 8 * 16 + 2 * b + r / 8] = (uint8_t)(from[b] + FP4_SHIFT);
        }
    }
    check_scale(u, m, largest), up_put(u, some, sizeof some);
}
// Reorders FP4 codes for decode_fp4, on the device or, for experts at home, in host memory: n words of units.
typedef struct { uint32_t *codes; size_t n; } arrange_args;
static __global__ void __launch_bounds__(THREADS) arrange(const arrange_args p) {
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < p.n; i += gridDim.x * (size_t)THREADS)
        if (i % (SLOT_BYTES / 4) < UNIT_BYTES / 4) p.codes[i] = arranged(p.codes[i]);
}
static void up_arrange(uploader *u, const matrix &m) {
    cuda *d = u->d;
    arrange_args p = { (uint32_t *)(uintptr_t)m.data,
                       (size_t)(blocks_of(m.rows, TILE) * (m.pitch / UNIT)) * (SLOT_BYTES / 4) };
    if (!u->slab) return;
    if (!u->home) up_flush(u);
    d->serial = 1, LAUNCH(arrange, grid_of(2 * d->sms, 1), THREADS, 0, p), d->serial = 0;
}

static const float *up_block_scales(uploader *u, const dspark_matrix *m) {
    const uint8_t *at = up_begin(u);
    int rows = blocks_of(m->rows, 128), cols = blocks_of(m->cols, 128);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < blocks_of(cols, 4) * 4; j++) {
            float scale = u->slab && j < cols ? ldexpf(1, m->scale[i * cols + j] - 127) : 1;
            up_put(u, &scale, sizeof scale);
        }
    return (const float *)(const void *)at;
}
// Rows of `each` bytes, tile by tile, unit by unit; zeros where there are none.
static void up_units(uploader *u, const dspark_matrix *m, size_t each, int units) {
    enum { PIECES = UNIT_BYTES / 16 };
    int place[PIECES];
    size_t all = (size_t)blocks_of(m->rows, TILE) * (size_t)units * (size_t)unit_bytes(m->dtype);
    if (!u->slab) return up_put(u, NULL, all);
    for (int i = 0; i < PIECES; i++) place[i] = (int)stored_at(UNIT, i / 8, i % 8 * 16);
    for (int m0 = 0; m0 < m->rows; m0 += TILE)
        for (int unit = 0; unit < units; unit++) {
            size_t at = (size_t)unit * UNIT, left = each - at < (size_t)UNIT ? each - at : (size_t)UNIT;
            const uint8_t *from = (const uint8_t *)m->data + (size_t)m0 * each + at;
            uint8_t some[UNIT_BYTES], last[UNIT] = { 0 };
            if (left < UNIT || m0 + TILE > m->rows) memset(some, 0, sizeof some);
            for (int i = 0; i < PIECES && m0 + i / 8 < m->rows; i++) {
                const uint8_t *p = from + (size_t)(i / 8) * each;
                if (left < UNIT && !(i % 8)) memcpy(last, p, left);
                memcpy(some + place[i], (left < UNIT ? last : p) + i % 8 * 16, 16);
            }
            up_put(u, some, sizeof some);
            if (m->dtype == DSPARK_FP4) up_fp4_scales(u, m, m0, unit);
        }
}
static matrix up_matrix(uploader *u, const dspark_matrix *m) {
    size_t each = (size_t)m->cols * (m->dtype == DSPARK_F32 ? 4 : m->dtype >= DSPARK_FP8 ? 1 : 2);
    matrix out;
    memset(&out, 0, sizeof out);
    if (!m->data) return out;
    if (m->dtype == DSPARK_FP4) each /= 2;
    out.rows = m->rows, out.cols = m->cols, out.dtype = m->dtype, out.pitch = (int)((each + UNIT - 1) / UNIT * UNIT);
    out.data = up_begin(u), up_units(u, m, each, out.pitch / UNIT);
    if (m->dtype == DSPARK_FP4) up_arrange(u, out);
    if (m->dtype == DSPARK_FP8) {
        size_t n = (size_t)blocks_of(m->rows, 128) * (size_t)blocks_of(m->cols, 128);
        for (size_t i = 0; u->slab && i < n; i++) check_scale(u, m, m->scale[i]);
        out.scale = up_begin(u), up_put(u, m->scale, n);
        if (!u->d->fast_prefill || u->home) return out;
        out.block_scale = up_block_scales(u, m);
        n = (size_t)m->rows * (size_t)out.pitch;
        if (n > u->d->by_rows_bytes) u->d->by_rows_bytes = n;
    }
    return out;
}

static float stored_number(const dspark_matrix *m, size_t i) {
    const uint8_t *p = (const uint8_t *)m->data + i * (m->dtype == DSPARK_F32 ? 4 : 2);
    uint32_t bits;
    uint16_t half;
    float x;
    if (m->dtype == DSPARK_F32) return memcpy(&x, p, 4), x;
    memcpy(&half, p, 2);
    if (m->dtype == DSPARK_F16) {
        int e = half >> 10 & 31;
        x = e == 31 ? (half & 1023 ? NAN : HUGE_VALF)
                    : ldexpf((float)((half & 1023) + (e ? 1024 : 0)), (e ? e : 1) - 25);
        return half >> 15 ? -x : x;
    }
    bits = (uint32_t)half << 16;
    return memcpy(&x, &bits, 4), x;
}
// A plain matrix as floats.
static const float *up_as_floats(uploader *u, const dspark_matrix *m) {
    const uint8_t *at = up_begin(u);
    size_t n = (size_t)m->rows * (size_t)m->cols;
    if (!m->data) return NULL;
    for (size_t i = 0; i < n; i++) {
        float x = u->slab ? stored_number(m, i) : 0;
        up_put(u, &x, sizeof x);
    }
    return (const float *)(const void *)at;
}
static mixer up_mix(uploader *u, const dspark_mix *m, int rows) {
    mixer out;
    out.fn = up_as_floats(u, &m->fn);
    out.scale = up_floats(u, m->scale, rows == COPIES ? 1 : 3), out.base = up_floats(u, m->base, (size_t)rows);
    return out;
}
static compressor up_compressor(uploader *u, const dspark_compressor *p) {
    compressor out;
    out.wkv = up_matrix(u, &p->wkv), out.wgate = up_matrix(u, &p->wgate), out.d = p->d, out.w = p->w;
    out.ape = up_floats(u, p->ape, (size_t)p->ratio * (size_t)p->w), out.norm = up_floats(u, p->norm, (size_t)p->d);
    return out;
}
static expert up_expert(uploader *u, const dspark_expert *e) {
    expert out = { { up_matrix(u, &e->w1), up_matrix(u, &e->w3), up_matrix(u, &e->w2) } };
    return out;
}
// A routed expert: into the slab or, if there are slots, host memory. Counting sets slot_bytes to the largest expert's.
static expert up_routed(uploader *u, int l, int e, const dspark_expert *from) {
    cuda *d = u->d;
    uploader home = *u;
    expert out;
    if (!d->n_slots) return up_expert(u, from);
    home.home = 1, home.n = 0, home.slab = u->slab ? d->home[l] + (size_t)e * d->slot_bytes : NULL;
    out = up_expert(&home, from), up_begin(&home);
    if (!u->slab) d->slot_bytes = home.n > d->slot_bytes ? home.n : d->slot_bytes;
    else u->at_home += home.n, up_progress(u);
    return out;
}
static const int *up_hash(uploader *u, const dspark_layer *l) {
    size_t n = (size_t)u->d->s.V * (size_t)u->d->s.K;
    const uint8_t *at = up_begin(u);
    if (!l->tid2eid) return NULL;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *p = l->tid2eid + i * (size_t)l->tid2eid_bytes;
        int e = p[0] | p[1] << 8 | p[2] << 16;      // checked when the checkpoint was opened
        up_put(u, &e, sizeof e);
    }
    return (const int *)(const void *)at;
}

static void up_attention(uploader *u, layer_weights *o, const dspark_layer *l) {
    const shape *c = &u->d->s;
    o->hc[0] = up_mix(u, &l->hc_attn, MIX);
    o->norm[0] = up_floats(u, l->attn_norm, (size_t)c->h), o->q_norm = up_floats(u, l->q_norm, (size_t)c->q_lora);
    o->kv_norm = up_floats(u, l->kv_norm, (size_t)c->D), o->sink = up_floats(u, l->attn_sink, (size_t)c->H);
    o->wq_a = up_matrix(u, &l->wq_a), o->wkv = up_matrix(u, &l->wkv);
    if (l->ratio) o->pool[0] = up_compressor(u, &l->compressor);
    if (l->ratio == 4) o->index_weights = up_matrix(u, &l->index_weights);
    if (l->ratio == 4) o->pool[1] = up_compressor(u, &l->index_compressor);
    o->wq_b = up_matrix(u, &l->wq_b);
    if (l->ratio == 4) o->index_wq_b = up_matrix(u, &l->index_wq_b);
    o->wo_a = up_matrix(u, &l->wo_a), o->wo_b = up_matrix(u, &l->wo_b);
}
static void up_layer(uploader *u, int number) {
    cuda *d = u->d;
    layer_weights *o = &d->layer[number];
    const dspark_layer *l = &d->w->layers[number];
    int E = d->s.E;
    expert *all = (expert *)malloc((size_t)(E + 1) * sizeof *all);
    if (!all) {
        fail(d, DSPARK_ERROR_MEMORY, "cuda: no memory for %d experts", E);
        return;
    }
    o->ratio = l->ratio;
    up_attention(u, o, l);
    o->tid2eid = up_hash(u, l);
    o->hc[1] = up_mix(u, &l->hc_ffn, MIX), o->norm[1] = up_floats(u, l->ffn_norm, (size_t)d->s.h);
    o->gate_bias = up_floats(u, l->gate_bias, (size_t)E), o->gate = up_matrix(u, &l->gate);
    all[E] = o->shared = up_expert(u, &l->shared);
    for (int e = 0; e < E && !d->status; e++) all[e] = up_routed(u, number, e, &l->experts[e]);
    o->routed = all[0];
    o->experts = (expert *)(uintptr_t)up_array(u, all, (size_t)(E + 1), sizeof *all);
    if (d->n_slots) o->home = (const expert *)up_array(u, all, (size_t)(E + 1), sizeof *all);
    free(all);
}

// Radians a position for each pair of the rotary dims; compressed: YaRN's.
static void rope_freqs(const dspark_config *c, int compressed, double *freqs) {
    int n = c->qk_rope_head_dim;
    double log_base = log(compressed ? c->compress_rope_theta : c->rope_theta), L = c->rope_original_length;
    double low = fmax(floor(n * log(L / (c->rope_beta_fast * 6.283185307179586)) / (2 * log_base)), 0);
    double high = fmin(ceil(n * log(L / (c->rope_beta_slow * 6.283185307179586)) / (2 * log_base)), n - 1);
    for (int i = 0; i < n / 2; i++) {
        double f = exp(-log_base * (2.0 * i / n)), ramp = fmin(fmax((i - low) / fmax(high - low, 1e-3), 0), 1);
        freqs[i] = compressed && c->rope_factor != 1 ? f * (1 - ramp) + f / c->rope_factor * ramp : f;
    }
}

static void up_drafter(uploader *u) {
    cuda *d = u->d;
    const dspark_weights *w = d->w;
    int h = d->s.h, rank = d->s.rank, stages = d->c->n_stages;
    const float *norms[DSPARK_MAX_LAYERS], *bias = w->head_kind == DSPARK_HEAD_RNN ? w->joint_bias : w->gate_bias;
    if (!stages) return;
    d->main_proj = up_matrix(u, &w->main_proj), d->main_norm = up_floats(u, w->main_norm, (size_t)h);
    d->draft_norm = up_floats(u, w->draft_norm, (size_t)h), d->draft_hc_head = up_mix(u, &w->draft_hc_head, COPIES);
    d->w1 = up_matrix(u, &w->markov_w1), d->w2 = up_matrix(u, &w->markov_w2);
    d->joint = up_matrix(u, w->head_kind == DSPARK_HEAD_RNN ? &w->joint_proj : &w->gate_proj);
    d->joint_bias = up_floats(u, bias, (size_t)(w->head_kind == DSPARK_HEAD_RNN ? 3 : 1) * (size_t)rank);
    d->confidence_w = up_as_floats(u, &w->confidence_proj);
    for (int i = 0; i < stages; i++) norms[i] = d->layer[d->c->num_hidden_layers + i].kv_norm;
    d->stage_norms = (const float *const *)up_array(u, norms, (size_t)stages, sizeof *norms);
}
static void up_all(uploader *u) {
    cuda *d = u->d;
    const dspark_weights *w = d->w;
    double freqs[2][128];
    for (int i = 0; i < 2; i++) {
        rope_freqs(d->c, i, freqs[i]);
        d->freqs[i] = (const double *)up_array(u, freqs[i], (size_t)d->s.R / 2, sizeof(double));
    }
    d->embed = up_matrix(u, &w->embed), d->head = up_matrix(u, &w->head),
    d->norm = up_floats(u, w->norm, (size_t)d->s.h);
    d->hc_head = up_mix(u, &w->hc_head, COPIES);
    for (int l = 0; l < d->layers && !d->status; l++) up_layer(u, l);
    up_drafter(u);
    up_begin(u);
}
static void up_run(cuda *d, const dspark_model_desc *desc) {
    uploader u;
    memset(&u, 0, sizeof u);
    u.d = d, u.slab = d->slab, u.desc = desc;
    u.total = d->slab_bytes + (d->n_slots ? (size_t)(d->layers * d->s.E) * d->slot_bytes : 0);
    for (int i = 0; i < 2; i++) {
        TRY(cudaMallocHost(&u.stage[i], STAGE_BYTES));
        TRY(cudaEventCreateWithFlags(&u.event[i], cudaEventDisableTiming));
    }
    if (!d->status) up_all(&u);
    if (!d->status) up_flush(&u);
    good(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");      // also after a failure: the buffers go
    for (int i = 0; i < 2; i++) {
        cudaFreeHost(u.stage[i]);
        if (u.event[i]) cudaEventDestroy(u.event[i]);
    }
}

// ---- workspace --------------------------------------------------------------------------------

typedef struct { uint8_t *base; size_t n; } carver;
static void *carve(carver *v, size_t n, size_t size) {
    void *p = v->base ? v->base + v->n : NULL;
    v->n += (n * size + 255) / 256 * 256;
    return p;
}
static float *carve_rows(carver *v, int rows, int n) {
    return (float *)carve(v, (size_t)rows * (size_t)n, sizeof(float));
}
static int *carve_ints(carver *v, int rows, int n) { return (int *)carve(v, (size_t)rows * (size_t)n, sizeof(int)); }
// An input in the forms its products take. form_of: a matrix's, `form` if it is FP8 or FP4.
enum { ROUNDED = 1, HALVES = 2, PLAIN = 4 };
static int form_of(const dspark_matrix *m, int form) { return !m->data ? 0 : m->dtype < DSPARK_FP8 ? PLAIN : form; }
static input carve_input(carver *v, int rows, int n, int forms) {
    input x;
    memset(&x, 0, sizeof x);
    x.stride = blocks_of(n, 256) * 256, x.plane = (size_t)rows * (size_t)x.stride;
    if (forms & ROUNDED) x.rounded = (uint16_t *)carve(v, x.plane, sizeof *x.rounded);
    if (forms & ROUNDED) x.rounded_scale = carve_rows(v, rows, x.stride / 128);
    if (forms & HALVES) x.halves = (uint16_t *)carve(v, 2 * x.plane, sizeof *x.halves);
    if (forms & HALVES) x.halves_scale = carve_rows(v, rows, x.stride / 128);
    if (forms & PLAIN) x.plain = (uint16_t *)carve(v, 3 * x.plane, sizeof *x.plain);
    return x;
}

static void carve_block(cuda *d, pass_block *b, carver *v) {
    size_t n = (size_t)d->max_rows;
    b->n = (counts *)carve(v, 1, sizeof(counts)), b->rows = (row *)carve(v, n, sizeof(row));
    b->logit_rows = (int *)carve(v, n, sizeof(int)), b->segment_row = (int *)carve(v, n, sizeof(int));
    b->previous = (int *)carve(v, n, sizeof(int)), b->injected = (injection *)carve(v, n, sizeof(injection));
    b->draws = (draw_row *)carve(v, n, sizeof(draw_row)), b->picks = (pick *)carve(v, n, sizeof(pick));
    b->what = (picking *)carve(v, 1, sizeof(picking)), b->tokens = (int *)carve(v, n, sizeof(int));
    b->drafted = (int *)carve(v, n, sizeof(int)), b->lengths = (int *)carve(v, n, sizeof(int));
    b->confidence = (float *)carve(v, n, sizeof(float));
}

static void carve_attention(cuda *d, carver *v, int n) {
    const shape *c = &d->s;
    int low = d->c->o_groups * d->c->o_lora_rank, group = c->H * c->D / d->c->o_groups, of_q = 0, of_o = 0, of_low = 0;
    for (int l = 0; l < d->layers; l++) {
        const dspark_layer *w = &d->w->layers[l];
        of_q |= form_of(&w->wq_b, ROUNDED) | form_of(&w->index_wq_b, ROUNDED), of_o |= form_of(&w->wo_a, HALVES);
        of_low |= form_of(&w->wo_b, ROUNDED);
    }
    d->qr = carve_rows(v, n, c->q_lora), d->qr_in = carve_input(v, n, c->q_lora, of_q), d->kv = carve_rows(v, n, c->D);
    d->q = carve_rows(v, n, c->H * c->D), d->o = carve_input(v, n, d->c->o_groups * blocks_of(group, 256) * 256, of_o);
    d->low = carve_rows(v, n, low), d->low_in = carve_input(v, n, low, of_low);
    d->pool_kv = carve_rows(v, n, 2 * c->D), d->pool_gate = carve_rows(v, n, 2 * c->D);
    d->index_kv = carve_rows(v, n, 2 * c->I), d->index_gate = carve_rows(v, n, 2 * c->I);
    d->index_q = carve_rows(v, n, c->index_heads * c->I), d->index_w = carve_rows(v, n, c->index_heads);
    d->query =
        (uint16_t *)carve(v, (size_t)INDEX_ROWS * (size_t)(c->index_heads + 7) * (size_t)c->I, sizeof *d->query);
    d->query_w = carve_rows(v, INDEX_ROWS, c->index_heads + 7), d->chosen = carve_ints(v, INDEX_ROWS, c->index_topk);
    d->arrived = carve_ints(v, INDEX_ROWS, 1);
    d->part = carve_rows(v, ATTEND_ROWS * SPLITS, c->H * (c->D + 4));
}
static void carve_experts(cuda *d, carver *v, int n) {
    int K = d->s.K, width = d->c->n_shared_experts * d->c->moe_intermediate_size, forms = 0;
    for (int l = 0; l < d->layers; l++) {
        forms |= form_of(&d->w->layers[l].shared.w2, ROUNDED);
        for (int e = 0; e < d->s.E; e++) forms |= form_of(&d->w->layers[l].experts[e].w2, ROUNDED);
    }
    d->gate = carve_rows(v, n, d->s.E), d->route_weight = carve_rows(v, n, K), d->route = carve_ints(v, n, K);
    d->first = carve_ints(v, 1, d->s.E + 1), d->active = carve_ints(v, 1, d->s.E + 1), d->list = carve_ints(v, n, K);
    d->where = carve_ints(v, n, K);
    d->act = carve_input(v, n * (K + 1), width, forms);
    for (int i = 0; i < 2; i++) d->up[i] = carve_rows(v, n * (K + 1), d->act.stride);
    d->down = carve_rows(v, n * (K + 1), d->s.h);
}
static void carve_lt(cuda *d, carver *v, int n) {
    int widest = most(most(d->s.h, d->s.q_lora), most(d->c->o_groups * d->c->o_lora_rank, d->act.stride));
    int places = places_of(n * d->s.K, d->s.E);
    if (!d->fast_prefill) return;
    d->codes = (uint8_t *)carve(v, (size_t)n * (size_t)widest, 1);
    d->code_scales = carve_rows(v, n, blocks_of(widest, 128));
    d->expert_codes = (uint8_t *)carve(v, (size_t)places * (size_t)d->x.stride, 1);
    d->expert_scales = carve_rows(v, places, d->x.stride / 128);
    d->act_codes = (uint8_t *)carve(v, (size_t)places * (size_t)d->act.stride, 1);
    d->act_scales = carve_rows(v, places, d->act.stride / 128);
    d->lt_room = (uint8_t *)carve(v, LT_BYTES, 1), d->by_rows = (uint8_t *)carve(v, d->by_rows_bytes, 1);
}
static void carve_cache(cuda *d, carver *v) {
    if (!d->n_slots) return;
    d->slot_of = carve_ints(v, d->layers, d->s.E), d->moves = carve_ints(v, 1, d->s.E);
    d->owner = carve_ints(v, 1, d->n_slots), d->used = carve_ints(v, 1, d->n_slots);
    d->spared = carve_ints(v, 1, d->n_slots);
    d->cache_state = carve_ints(v, 1, CACHE_MOVES + 1);
}
static void carve_drafter(cuda *d, carver *v, int n) {
    const dspark_weights *w = d->w;
    int rank = d->s.rank, h = d->s.h;
    if (!d->c->n_stages) return;
    d->main = carve_input(v, n, d->s.n_taps * h, form_of(&w->main_proj, ROUNDED));
    d->stage_kv = carve_rows(v, d->c->n_stages * d->max_rows, d->s.D);
    d->draft_logits = carve_rows(v, n, d->s.V), d->candidates = carve_ints(v, n, 1);
    d->value = (double *)carve(v, (size_t)n * DSPARK_MAX_BLOCK, sizeof *d->value);
    d->e = carve_rows(v, n, rank), d->rnn = carve_rows(v, n, rank), d->z = carve_rows(v, n, 3 * rank);
    d->markov_in = carve_input(v, n, 2 * rank + h, w->head_kind > DSPARK_HEAD_VANILLA ? PLAIN : 0);
    d->markov_out = carve_input(v, n, rank, PLAIN);
}
// Rows padded to 64: products read so many; the extra sums are unused.
static size_t carve_all(cuda *d, uint8_t *base) {
    carver v = { base, 0 };
    const shape *c = &d->s;
    int n = blocks_of(d->max_rows, 64) * 64, h = c->h;
    carve_block(d, &d->dev, &v);
    d->residual = carve_rows(&v, n, COPIES * h), d->mixes = carve_rows(&v, n, MIX),
    d->post_comb = carve_rows(&v, n, COPIES + COPIES * COPIES);
    d->best = (unsigned long long *)carve(&v, (size_t)n, sizeof *d->best);
    d->mass = (unsigned long long *)carve(&v, (size_t)n * 256, sizeof *d->mass);
    d->peak = (unsigned *)carve(&v, (size_t)n, sizeof *d->peak), d->surveyed = carve_ints(&v, n, 1);
    d->tallies = (tally *)carve(&v, (size_t)n, sizeof(tally));
    d->draft_tallies = (tally *)carve(&v, (size_t)n, sizeof(tally));
    d->turns = (float2 *)(void *)carve_rows(&v, n, 2 * d->s.R);
    d->partial = carve_rows(&v, n, h / SLICE * WARP), d->x = carve_input(&v, n, h, ROUNDED | PLAIN);
    d->y = carve_rows(&v, n, h), d->hidden = carve_rows(&v, n, h), d->logits = carve_rows(&v, n, c->V);
    carve_attention(d, &v, n);
    carve_experts(d, &v, n);
    carve_lt(d, &v, n);
    carve_cache(d, &v);
    carve_drafter(d, &v, n);
    return v.n;
}
static size_t carve_host(cuda *d, uint8_t *base) {
    carver v = { base, 0 };
    carve_block(d, &d->host, &v);
    d->host_logits = carve_rows(&v, d->max_rows, d->s.V);
    if (d->c->n_stages) d->host_drafts = carve_rows(&v, d->max_rows, d->s.V);
    return v.n;
}

// ---- opening ----------------------------------------------------------------------------------

static void forget_recordings(cuda *d) {
    for (int i = 0; i < d->n_recordings; i++)
        if (d->recordings[i].exec) cudaGraphExecDestroy(d->recordings[i].exec);
    memset(d->recordings, 0, sizeof d->recordings);
    d->n_recordings = d->oldest = 0;
}

static void cuda_close(void *device) {
    cuda *d = (cuda *)device;
    if (d->stream) cudaStreamSynchronize(d->stream);
    forget_recordings(d), lt_close(d);
    cudaFree(d->slab), cudaFree(d->work), cudaFree(d->scores_memory), cudaFree(d->cache);
    cudaFreeHost(d->host_block);
    for (int l = 0; l < d->layers; l++) if (d->home[l]) cudaFreeHost(d->home[l]);
    if (d->stream) cudaStreamDestroy(d->stream);
    free(d->layer), free(d->ops), free(d);
}

// What the kernels have no room for.
static void check_shape(cuda *d) {
    const dspark_config *c = d->c;
    const struct { const char *name; int value, multiple, most;
    } limits[] = { { "hc_mult", c->hc_mult, COPIES, COPIES },
                   { "hidden_size", c->hidden_size, SLICE, 8192 },
                   { "head_dim", c->head_dim, 32, MAX_HEAD_DIM },
                   { "qk_rope_head_dim", c->qk_rope_head_dim, 16, 256 },
                   { "q_lora_rank", c->q_lora_rank, 8, 8192 },
                   { "o_lora_rank", c->o_lora_rank, TILE, 8192 },
                   { "o_groups * o_lora_rank", c->o_groups * c->o_lora_rank, 8, 32768 },
                   { "moe_intermediate_size", c->moe_intermediate_size, 8, 32768 },
                   { "dspark_markov_rank", c->dspark_markov_rank, 8, 8192 },
                   { "num_experts_per_tok", c->num_experts_per_tok, 1, MAX_CHOSEN },
                   { "n_routed_experts", c->n_routed_experts, 1, MAX_EXPERTS },
                   { "index_head_dim", c->index_head_dim, WARP, MAX_INDEX_DIM },
                   { "index_n_heads * index_head_dim", c->index_n_heads * c->index_head_dim, WARP, 32768 },
                   { "vocab_size", c->vocab_size, 1, 1 << 24 },
                   { "max_rows", d->max_rows, 1, 1 << 14 } };
    const int act = blocks_of(c->n_shared_experts * c->moe_intermediate_size, 256) * 256;
    const int group = blocks_of(c->num_attention_heads * c->head_dim / c->o_groups, 256) * 256;
    const int64_t rows = blocks_of(d->max_rows, 64) * 64;
    const int64_t planes[] = { (int64_t)3 * c->o_groups * group,
                               (int64_t)3 * c->n_taps * c->hidden_size,
                               (int64_t)3 * (c->num_experts_per_tok + 1) * act, (int64_t)2 * c->vocab_size };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value % limits[i].multiple || limits[i].value > limits[i].most)
            fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: %s is %d, expected a multiple of %d up to %d", limits[i].name,
                 limits[i].value, limits[i].multiple, limits[i].most);
    for (size_t i = 0; i < sizeof planes / sizeof *planes; i++)     // offsets have 32 bits, those of logits 31
        if (rows * planes[i] > UINT32_MAX)
            fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: max_rows is %d with %lld numbers a row, more than 2^32 in all",
                 d->max_rows, (long long)planes[i]);
    if (c->head_dim == c->qk_rope_head_dim)
        fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: all %d dims of a head are rotary", c->head_dim);
    if (c->num_attention_heads > TILE && c->num_attention_heads * c->head_dim / c->o_groups % 128)
        fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: %d heads of %d in %d groups: expected groups of whole 128, or no more "
             "than %d heads", c->num_attention_heads, c->head_dim, c->o_groups, TILE);
}
// All w1 and w3 of a layer have one dtype; so have all w2.
static void check_experts(cuda *d) {
    static const char *const types[] = { "F32", "BF16", "F16", "FP8", "FP4" };
    for (int l = 0; l < d->layers; l++)
        for (int e = 0; e < d->s.E; e++) {
            const dspark_expert *first = d->w->layers[l].experts, *a = first + e;
            if (a->w1.dtype != first->w1.dtype || a->w3.dtype != first->w1.dtype || a->w2.dtype != first->w2.dtype)
                fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: layer %d: expert %d has w1 of %s, w3 of %s, w2 of %s, "
                     "expected %s, %s, %s as in expert 0", l, e, types[a->w1.dtype], types[a->w3.dtype],
                     types[a->w2.dtype], types[first->w1.dtype], types[first->w1.dtype], types[first->w2.dtype]);
        }
}
static void set_shape(cuda *d) {
    const dspark_config *c = d->c;
    shape *s = &d->s;
    s->h = c->hidden_size, s->H = c->num_attention_heads, s->D = c->head_dim, s->R = c->qk_rope_head_dim,
    s->q_lora = c->q_lora_rank;
    s->window = c->sliding_window, s->ring = c->sliding_window + c->dspark_block_size + 1, s->I = c->index_head_dim;
    s->index_heads = c->index_n_heads, s->index_topk = c->index_topk, s->block = c->dspark_block_size,
    s->n_taps = c->n_taps;
    s->rank = c->dspark_markov_rank, s->V = c->vocab_size, s->K = c->num_experts_per_tok, s->E = c->n_routed_experts;
    s->eps = c->rms_norm_eps, s->hc_eps = c->hc_eps, s->limit = c->swiglu_limit,
    s->routed_scale = c->routed_scaling_factor;
    s->sinkhorn_iters = c->hc_sinkhorn_iters;
    d->layers = c->num_hidden_layers + c->n_stages, d->max_ops = 8 * d->layers + DSPARK_MAX_TAPS + 16;
}

// Sets how much shared memory a kernel may ask for, and the same carveout for all: where two differ, the second waits
// until the SM is empty. 164 KB of an H100's 228: two blocks of products fit, and L1 has 92 for their inputs. With a
// slot more and 60, six rows take 3 % longer.
template <class P> static void allow(cuda *d, void (*kernel)(P), int bytes, int share = 72) {
    if (bytes) TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, share));
}
// Tiles of many rows take all of it; where it is less than 220 KB, the decoding kernels run instead.
static void allow_wide(cuda *d) {
    int bytes[2] = { wide_stages(1) * stage_bytes(1), wide_stages(2) * stage_bytes(2) };
    d->wide = d->shared_most >= bytes[1] + (20 << 10);
    if (!d->wide) return;
    allow(d, linears_wide<1>, bytes[0], 100), allow(d, linears_wide<2>, bytes[1], 100);
    allow(d, experts_wide, bytes[1], 100);
}
// For fast_prefill.
static void allow_whole(cuda *d) {
    int attend = (int)whole_shared(&d->s, NULL, NULL);
    d->whole = d->shared_most >= most(attend + (2 << 10), panel_bytes(2) + gate_bytes(2) + (26 << 10));
    if (!d->whole) return;
    allow(d, attend_whole, attend, 100);
    allow(d, experts_whole<1>, panel_bytes(1), 100), allow(d, experts_whole<2>, panel_bytes(2), 100);
    allow(d, experts_up_whole<1>, panel_bytes(1) + gate_bytes(1), 100);
    allow(d, experts_up_whole<2>, panel_bytes(2) + gate_bytes(2), 100);
    allow(d, linears_whole<DSPARK_FP8, 1>, panel_bytes(1), 100);
    allow(d, linears_whole<DSPARK_FP8, 2>, panel_bytes(2), 100);
    allow(d, linears_whole<DSPARK_BF16, 1>, panel_bytes(1), 100);
    allow(d, linears_whole<DSPARK_BF16, 2>, panel_bytes(2), 100);
}
static void allow_shared(cuda *d) {
    const shape *c = &d->s;
    size_t wide = (size_t)most(c->h + 2 * c->rank, most(c->D, c->I)) * sizeof(float);
    size_t attend_bytes = attend_shared(c, NULL, NULL), rows_bytes = attend_rows_shared(c),
           largest = wide > rows_bytes ? wide : rows_bytes;
    if (largest < (size_t)product_bytes(4)) largest = (size_t)product_bytes(4);
    if (largest > (size_t)d->shared_most) {
        fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: a kernel needs %zu bytes of shared memory, the device gives %d",
             largest, d->shared_most);
        return;
    }
    allow(d, linears<1>, product_bytes(1)), allow(d, experts<1>, product_bytes(1));
    allow(d, linears<2>, product_bytes(2)), allow(d, experts<2>, product_bytes(2));
    allow(d, linears<4>, product_bytes(4)), allow_wide(d), allow_whole(d);
    allow(d, attend<1>, (int)attend_bytes), allow(d, attend<2>, (int)attend_bytes);
    allow(d, attend_rows, (int)rows_bytes, 100), allow(d, route, 72 << 10);
    allow(d, kv_rows, (int)wide), allow(d, inject_rows, (int)wide);
    allow(d, markov_begin, (int)wide), allow(d, markov_gate, (int)wide);
    allow(d, turns, 0), allow(d, stream_few, 0), allow(d, stream<1>, 0), allow(d, stream<2>, 0), allow(d, mix, 0);
    allow(d, round_rows, 0), allow(d, codes, 0), allow(d, expert_codes, 0);
    allow(d, index_query, 0), allow(d, index_scores, (int)query_bytes(c->index_heads, c->I)), allow(d, attend_merge, 0);
    allow(d, cache_choose, 0), allow(d, cache_fill, 0), allow(d, swiglu, 0);
    allow(d, survey, 0), allow(d, sift, 0), allow(d, weigh, 0), allow(d, draw, 0), allow(d, drawn, 0);
    allow(d, choose, 0), allow(d, take_taps, 0);
}

static void open_device(cuda *d) {
    TRY(cudaSetDevice(0));
    TRY(cudaDeviceGetAttribute(&d->major, cudaDevAttrComputeCapabilityMajor, 0));
    TRY(cudaDeviceGetAttribute(&d->sms, cudaDevAttrMultiProcessorCount, 0));
    TRY(cudaDeviceGetAttribute(&d->shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    TRY(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking));
    if (!d->status && d->major < 8)
        fail(d, DSPARK_ERROR_UNSUPPORTED, "cuda: compute capability %d, expected 8.0 or newer", d->major);
}

static size_t cuda_state_bytes(const void *device, int max_context);

// Bytes of the slab; if experts have their home elsewhere, slot_bytes too.
static size_t slab_bytes_of(cuda *d) {
    uploader u;
    memset(&u, 0, sizeof u);
    u.d = d, d->slot_bytes = 0;
    up_all(&u);
    return u.n;
}

// All weights on the device if they fit beside the workspace and the states of max_sessions; else as many experts as
// fit, at least those that one layer may need at once; else a failure that says how much of each is needed.
static void place(cuda *d, const dspark_model_desc *desc) {
    size_t free_bytes = 0, total = 0, room, states, all, experts;
    int context = least(4096, d->c->max_position_embeddings), n = d->layers * d->s.E, needed;
    TRY(cudaMemGetInfo(&free_bytes, &total));
    states = (size_t)most(1, desc->max_sessions) * cuda_state_bytes(d, context) + total / 64;     // and for graphs
    all = d->slab_bytes = slab_bytes_of(d), d->work_bytes = carve_all(d, NULL), d->host_bytes = carve_host(d, NULL);
    room = free_bytes > d->work_bytes + states ? free_bytes - d->work_bytes - states : 0;
    snprintf(d->placement, sizeof d->placement, "on the device %zu bytes of weights, %zu of workspace, %zu for states",
             all, d->work_bytes, states);
    if (d->status || all <= room) return;
    d->n_slots = n, d->slab_bytes = slab_bytes_of(d), experts = (size_t)n * d->slot_bytes;
    room = room > d->slab_bytes ? (room - d->slab_bytes) / (d->slot_bytes + 64) : 0;      // 64: a slot's share of lists
    needed = d->max_rows < n / d->s.K ? least(d->s.E, d->max_rows * d->s.K) : d->s.E;
    d->n_slots = room < (size_t)n ? (int)room : n;
    if (d->n_slots < needed)
        fail(d, DSPARK_ERROR_MEMORY,
             "cuda: weights take %zu bytes, passes of %d rows %zu, states %zu: the device has %zu free of %zu; with "
             "the experts in host memory (%zu bytes), %zu and %d slots of %zu bytes", all, d->max_rows, d->work_bytes,
             states, free_bytes, total, experts, d->slab_bytes, needed, d->slot_bytes);
    d->work_bytes = carve_all(d, NULL);
    snprintf(d->placement, sizeof d->placement, "on the device %zu bytes of weights, %d of %d experts (%zu), %zu of "
             "workspace, %zu for states; in host memory the experts, %zu", d->slab_bytes, d->n_slots, n,
             (size_t)d->n_slots * d->slot_bytes, d->work_bytes, states, experts);
}

static void open_memory(cuda *d, const dspark_model_desc *desc) {
    size_t home;
    place(d, desc);
    home = (size_t)d->s.E * d->slot_bytes;
    TRY(cudaMalloc(&d->slab, d->slab_bytes));
    TRY(cudaMalloc(&d->work, d->work_bytes));
    TRY(cudaMallocHost(&d->host_block, d->host_bytes));
    if (d->n_slots) TRY(cudaMalloc(&d->cache, (size_t)d->n_slots * d->slot_bytes));
    for (int l = 0; l < d->layers && d->n_slots; l++) {
        TRY(cudaMallocHost(&d->home[l], home));
        d->host_bytes += home;
    }
    if (d->status) return;
    carve_all(d, d->work), carve_host(d, d->host_block);
    TRY(cudaMemsetAsync(d->work, 0, d->work_bytes, d->stream));     // inputs are padded with zeros
}

static dspark_status cuda_open(void **device, const dspark_model *m, const dspark_model_desc *desc) {
    cuda *d = (cuda *)calloc(1, sizeof *d);
    dspark_status status;
    *device = NULL;
    if (!d) return dspark_fail(DSPARK_ERROR_MEMORY, "cuda: no memory");
    d->c = dspark_model_config(m), d->w = dspark_model_weights(m);
    d->max_rows = most(desc->max_rows, d->c->dspark_block_size + 1);
    set_shape(d), check_shape(d), check_experts(d);
    d->layer = (layer_weights *)calloc((size_t)d->layers, sizeof *d->layer);
    d->ops = (operation *)calloc((size_t)d->max_ops, sizeof *d->ops);
    if (!d->layer || !d->ops) fail(d, DSPARK_ERROR_MEMORY, "cuda: no memory for %d layers", d->layers);
    if (!d->status) open_device(d);
    d->fast_prefill = desc->fast_prefill && d->major == 9;      // cuBLASLt has such scales only there
    if (!d->status && d->fast_prefill) lt_open(d);
    if (!d->status) allow_shared(d);
    if (!d->status) open_memory(d, desc);
    if (!d->status) up_run(d, desc);
    if ((status = result(d)) != DSPARK_OK) return cuda_close(d), status;
    *device = d;
    return DSPARK_OK;
}

static size_t cuda_bytes(const void *device) {
    const cuda *d = (const cuda *)device;
    return sizeof *d + d->slab_bytes + d->work_bytes + d->scores_bytes + d->host_bytes +
           (size_t)d->n_slots * d->slot_bytes;
}
static const char *cuda_path_name(const void *device) { (void)device; return "CUDA"; }
static const char *cuda_placement(const void *device) { return ((const cuda *)device)->placement; }
static int cuda_threads(const void *device) { (void)device; return 1; }
static int cuda_max_rows(const void *device) { return ((const cuda *)device)->max_rows; }

// ---- states -----------------------------------------------------------------------------------
// As the CPU's, indexed by position: a ring of n rows has position p in row p % n, compressed row i begins at token i
// r.

static void state_take(state *s, int l, int which, size_t row_bytes, int ring, int ratio) {
    state_array *a = &s->arrays[l * N_ARRAYS + which];
    a->at = s->bytes, a->row_bytes = row_bytes, a->ring = ring, a->ratio = ratio;
    s->bytes += (row_bytes * (size_t)(ring ? ring : s->max_context / ratio) + 255) / 256 * 256;
}
static void state_take_layer(state *s, const cuda *d, int l) {
    const shape *c = &d->s;
    int ratio = d->c->compress_ratios[l], raw = raw_ring(ratio, c->block);
    size_t D = (size_t)c->D, R = (size_t)c->R, I = (size_t)c->I, w = (ratio == 4 ? 2 : 1) * D * sizeof(float);
    state_take(s, l, WINDOW, D * sizeof(float), c->ring, 0);
    if (!ratio) return;
    state_take(s, l, KV, w, raw, 0), state_take(s, l, GATE, w, raw, 0);
    state_take(s, l, ROW_CODES, D - R, 0, ratio), state_take(s, l, ROW_SCALES, (D - R + 63) / 64, 0, ratio);
    state_take(s, l, ROPE, R * sizeof(float), 0, ratio);
    if (ratio != 4) return;
    state_take(s, l, INDEX_KV, 2 * I * sizeof(float), raw, 0),
        state_take(s, l, INDEX_GATE, 2 * I * sizeof(float), raw, 0);
    state_take(s, l, KEY_CODES, I / 2, 0, ratio), state_take(s, l, KEY_SCALES, I / WARP, 0, ratio);
}
static int state_layout(state *s, const cuda *d, int max_context) {
    s->max_context = max_context, s->n_arrays = d->layers * N_ARRAYS + 1;
    s->arrays = (state_array *)calloc((size_t)s->n_arrays, sizeof *s->arrays);
    if (!s->arrays) return 0;
    for (int l = 0; l < d->layers; l++) state_take_layer(s, d, l);
    state_take(s, d->layers, 0, (size_t)(d->s.n_taps * d->s.h) * sizeof(float), d->s.ring, 0);
    return 1;
}
static size_t scores_for(const cuda *d, int max_context) {
    int scored = 0;
    for (int l = 0; l < d->c->num_hidden_layers; l++) if (d->c->compress_ratios[l] == 4) scored = max_context / 4;
    return (size_t)INDEX_ROWS * (size_t)(scored + 16) * sizeof(float);
}
static size_t state_table_bytes(const state *s) { return ((size_t)s->n_arrays * sizeof(void *) + 255) / 256 * 256; }

static size_t cuda_state_bytes(const void *device, int max_context) {
    const cuda *d = (const cuda *)device;
    size_t scores = scores_for(d, max_context), bytes;
    state s;
    memset(&s, 0, sizeof s);
    if (!state_layout(&s, d, max_context)) return 0;
    bytes = sizeof s + (size_t)s.n_arrays * sizeof *s.arrays + state_table_bytes(&s) + s.bytes;
    free(s.arrays);
    return bytes + (scores > d->scores_bytes ? scores - d->scores_bytes : 0);
}

static void cuda_state_close(void *p) {
    state *s = (state *)p;
    if (!s) return;
    cudaFree(s->memory);
    free(s->arrays), free(s);
}

// Device memory, or a failure that says what it was for.
static uint8_t *device_bytes(cuda *d, size_t n, const char *what) {
    size_t free_bytes = 0, total = 0;
    uint8_t *p = NULL;
    cudaError_t e = cudaMalloc(&p, n);
    if (e != cudaErrorMemoryAllocation) return good(d, e, "cudaMalloc") ? p : NULL;
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    fail(d, DSPARK_ERROR_MEMORY, "cuda: %s takes %zu bytes, the device has %zu free of %zu", what, n, free_bytes,
         total);
    return NULL;
}
static void scores_grow(cuda *d, int max_context) {
    size_t bytes = scores_for(d, max_context);
    uint8_t *p;
    if (bytes <= d->scores_bytes || !(p = device_bytes(d, bytes, "an indexer's scores"))) return;
    forget_recordings(d);
    cudaFree(d->scores_memory);
    d->scores_memory = p, d->scores = (float *)(void *)p, d->scores_bytes = bytes;
}

static dspark_status cuda_state_open(void **out, void *device, int max_context) {
    cuda *d = (cuda *)device;
    state *s = (state *)calloc(1, sizeof *s);
    uint8_t **table = NULL;
    dspark_status status;
    size_t head;
    *out = NULL;
    if (!s || !state_layout(s, d, max_context) || !(table = (uint8_t **)calloc((size_t)s->n_arrays, sizeof *table))) {
        cuda_state_close(s);
        return dspark_fail(DSPARK_ERROR_MEMORY, "cuda: no memory for a state's tables");
    }
    head = state_table_bytes(s), s->d = d;
    scores_grow(d, max_context);
    if (!d->status) s->memory = device_bytes(d, head + s->bytes, "a state");
    if (!d->status) {
        s->table = (uint8_t **)(void *)s->memory;
        for (int i = 0; i < s->n_arrays; i++) table[i] = s->memory + head + s->arrays[i].at;
        TRY(cudaMemcpyAsync(s->table, table, (size_t)s->n_arrays * sizeof *table, cudaMemcpyHostToDevice, d->stream));
        TRY(cudaMemsetAsync(s->memory + head, 0, s->bytes, d->stream));
        TRY(cudaStreamSynchronize(d->stream));
    }
    free(table);
    if ((status = result(d)) != DSPARK_OK) return cuda_state_close(s), status;
    *out = s;
    return DSPARK_OK;
}

static size_t piece_bytes(const state_array *a, int n_tokens) {
    return a->ring ? a->row_bytes * (size_t)a->ring : a->ratio ? a->row_bytes * (size_t)(n_tokens / a->ratio) : 0;
}
static uint8_t *piece_at(const state *s, int i) { return s->memory + state_table_bytes(s) + s->arrays[i].at; }

static dspark_status cuda_state_copy(void *to, const void *from, int n_tokens) {
    const state *a = (const state *)from, *b = (const state *)to;
    cuda *d = a->d;
    for (int i = 0; i < a->n_arrays; i++) {
        size_t n = piece_bytes(&a->arrays[i], n_tokens);
        if (n) TRY(cudaMemcpyAsync(piece_at(b, i), piece_at(a, i), n, cudaMemcpyDeviceToDevice, d->stream));
    }
    TRY(cudaStreamSynchronize(d->stream));
    return result(d);
}

// Pieces pass through host memory.
static dspark_status cuda_state_pieces(void *p, int n_tokens, int restore, dspark_piece give, void *user) {
    state *s = (state *)p;
    cuda *d = s->d;
    dspark_status status = DSPARK_OK;
    for (int i = 0; i < s->n_arrays && !status; i++) {
        size_t n = piece_bytes(&s->arrays[i], n_tokens);
        void *bytes = malloc(n ? n : 1);
        if (!bytes) return dspark_fail(DSPARK_ERROR_MEMORY, "cuda: no memory for a piece of a state");
        if (!restore && n) TRY(cudaMemcpyAsync(bytes, piece_at(s, i), n, cudaMemcpyDeviceToHost, d->stream));
        TRY(cudaStreamSynchronize(d->stream));
        status = result(d);
        if (!status) status = give(user, bytes, n);
        if (restore && n && !status) TRY(cudaMemcpyAsync(piece_at(s, i), bytes, n, cudaMemcpyHostToDevice, d->stream));
        TRY(cudaStreamSynchronize(d->stream));
        if (!status) status = result(d);
        free(bytes);
    }
    return status;
}

#ifdef DSPARK_CUDA_HOST
// For tests/cuda.c: tokens of n rows of logits, of a draft pass or of the pass that verifies it.
extern "C" void cuda_host_rows(void *device, int drafts, const float *logits, const dspark_device_draw *draws, int n,
                               int32_t *tokens) {
    cuda *d = (cuda *)device;
    float *to = drafts ? d->draft_logits : d->logits;
    drawn_args p = { &d->dev.n->n_logits, d->best, drafts ? d->dev.drafted : d->dev.tokens };
    memcpy(to, logits, (size_t)n * (size_t)d->s.V * sizeof *to);
    d->dev.n->n_logits = n, d->grid.weighs = weighs_of(d, draws, n);
    draws_copy(d, draws, n);
    run_draw(d, to, drafts ? d->draft_tallies : d->tallies, n, p.n, NULL, 0);
    LAUNCH(drawn, grid_of(blocks_of(n, THREADS), 1), THREADS, 0, p);
    memcpy(tokens, p.tokens, (size_t)n * sizeof *tokens);
}
#endif

#ifdef DSPARK_CUDA_TIMED
// 1: passes from now on are traced, the next one from its beginning.
extern "C" void dspark_cuda_trace(int on) {
    unsigned none = 0;
    traced.on = on, traced.n = 0;
    cudaMemcpyToSymbol(trace_n, &none, sizeof none);
}
// Kernel i of the last pass, and the time from its grid_wait to the next one's; NULL: no more.
extern "C" const char *dspark_cuda_traced(int i, double *us) {
    static unsigned long long ns[MAX_TRACED];
    if (!i) cudaMemcpyFromSymbol(ns, trace_ns, sizeof ns);
    if (i + 1 >= traced.n) return NULL;
    *us = 1e-3 * (double)(ns[i + 1] - ns[i]);
    return traced.names[i];
}
// GB/s, read and written, of a copy on the device; 0: it failed.
extern "C" double dspark_cuda_copy_rate(size_t n) {
    uint8_t *p = NULL;
    cudaEvent_t begin = NULL, end = NULL;
    float ms = 0, best = 0;
    int good = !cudaMalloc(&p, 2 * n) && !cudaEventCreate(&begin) && !cudaEventCreate(&end);
    for (int i = 0; good && i < 6; i++) {
        good = !cudaEventRecord(begin, 0) && !cudaMemcpyAsync(p + n, p, n, cudaMemcpyDeviceToDevice, 0) &&
               !cudaEventRecord(end, 0) && !cudaEventSynchronize(end) && !cudaEventElapsedTime(&ms, begin, end);
        if (i && ms > 0 && (best == 0 || ms < best)) best = ms;
    }
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    cudaFree(p);
    return best > 0 ? 2e-6 * (double)n / (double)best : 0;
}
#endif

extern "C" const dspark_backend *dspark_cuda_backend(void) {
    static const dspark_backend table = { "cuda",           cuda_open,        cuda_close,        cuda_bytes,
                                          cuda_path_name,   cuda_threads,     cuda_max_rows,     cuda_state_bytes,
                                          cuda_state_open,  cuda_state_close, cuda_state_copy,   cuda_state_pieces,
                                          cuda_pass_begin,  cuda_mix_in,      cuda_attention,    cuda_moe,
                                          cuda_mix_out,     cuda_tap,         cuda_head,         cuda_inject,
                                          cuda_draft_head,  cuda_draft_step,  cuda_draft_logits, cuda_pass_end,
                                          cuda_draft_steps, cuda_draw,        cuda_placement };
    return &table;
}
