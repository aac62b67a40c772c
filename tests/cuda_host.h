// The CUDA that dspark_cuda.cu needs, on a CPU: g++ -DDSPARK_CUDA_HOST -I. -Itests -x c++ dspark_cuda.cu. Blocks run
// one after the other; a block's threads are fibers that switch where they wait for each other: at __syncthreads and at
// a warp's operations (shuffles, ballots, matrix products). A wait that cannot end aborts with a message. Memory comes
// filled with NaN, streams run at once, graphs are lists of calls. In backwards mode blocks and threads run in the
// opposite order and copies land as late as they may: no result may depend on it. One host thread at a time.
#ifndef CUDA_HOST_H
#define CUDA_HOST_H
#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }
static inline float2 make_float2(float x, float y) { return { x, y }; }
static inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }

// ---- fibers

// HOST_STACK is no power of two: equal depths of two stacks must not share cache lines.
enum { HOST_THREADS = 1024, HOST_STACK = (64 << 10) + 17 * 64, HOST_SHARED = 228 << 10, HOST_FENCE = 256 };
#ifdef __x86_64__
typedef void *host_place;           // a stack pointer, over callee-saved registers
extern "C" void cuda_host_switch(host_place *from, host_place *to);
__asm__(".text\n.globl cuda_host_switch\ncuda_host_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp, (%rdi)\n"
        "mov (%rsi), %rsp\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
static void host_place_new(host_place *p, char *stack, void (*f)(void)) {
    void **top = (void **)(void *)(stack + HOST_STACK - 64);
    memset((void *)(top - 8), 0, 8 * sizeof *top);
    top[-1] = NULL, top[-2] = (void *)f;       // what `ret` takes
    *p = top - 8;
}
#else
typedef ucontext_t host_place;
static void cuda_host_switch(host_place *from, host_place *to) { swapcontext(from, to); }
static void host_place_new(host_place *p, char *stack, void (*f)(void)) {
    getcontext(p);
    p->uc_stack.ss_sp = stack, p->uc_stack.ss_size = HOST_STACK, p->uc_link = NULL;
    makecontext(p, f, 0);
}
#endif

enum { HOST_BF16, HOST_F16, HOST_E4M3 };
struct host_fiber {
    host_place at;
    bool done;
    const unsigned *waits_for;      // until it is no longer `seen`
    unsigned seen;
};
struct host_product;
struct host_warp {
    unsigned generation;
    int arrived, live;
    uint32_t slot[2][32], *to[32];
    const uint32_t *in[32];
    const uint16_t *from[32];
    float *out[32];
    int kind;                       // HOST_*: a product's number type
    const host_product *product;
};
static struct {
    host_fiber fiber[HOST_THREADS];
    host_warp warp[HOST_THREADS / 32];
    host_place home;
    int n, self, live, arrived;     // threads of the block, the one that runs, those not done, those at the barrier
    unsigned generation;
    int backwards;
    dim3 thread, block, block_dim, grid_dim;
    std::function<void()> kernel;
    char *stacks;
    alignas(1024) char shared[HOST_SHARED + HOST_FENCE];
} host;

#define threadIdx (host.thread)
#define blockIdx (host.block)
#define blockDim (host.block_dim)
#define gridDim (host.grid_dim)

// What a thread has asked for and not yet waited for; where groups end.
template <class T> struct host_groups {
    std::vector<T> asked;
    std::vector<size_t> closed;
    void close() { closed.push_back(asked.size()); }
    template <class F> void land(size_t pending, F work) {      // all but the last `pending` groups
        if (closed.size() <= pending) return;
        auto last = closed.end() - (ptrdiff_t)pending - 1;
        size_t n = *last;
        for (size_t i = 0; i < n; i++) work(asked[i]);
        asked.erase(asked.begin(), asked.begin() + (ptrdiff_t)n);
        closed.erase(closed.begin(), last + 1);
        for (size_t &end : closed) end -= n;
    }
};
struct host_copy { char *to; const char *from; size_t n; };
static host_groups<host_copy> host_copies[HOST_THREADS];
// mbarrier, in shared memory: what its turn still expects.
struct host_barrier { unsigned turn, bytes : 20, arrivals : 6, missing : 6; };
struct host_bulk { char *to; const void *from; int n; host_barrier *by; };
static std::vector<host_bulk> host_bulks;               // asked for, not landed

static void host_stop(const char *why) {
    fprintf(stderr, "cuda_host: block %u %u, thread %d: %s\n", host.block.x, host.block.y, host.self, why);
    abort();
}
static bool host_ready(const host_fiber *f) { return !f->done && (!f->waits_for || *f->waits_for != f->seen); }

// Switches to thread i; this one, saved in `mine`, goes on when its turn comes.
static void host_enter(host_place *mine, int i) {
    host.self = i, host.thread.x = (unsigned)i, host.fiber[i].waits_for = NULL;
    cuda_host_switch(mine, &host.fiber[i].at);
}
static int host_next(void) {
    int step = host.backwards ? host.n - 1 : 1, i = host.self;
    for (int tries = 0; tries < host.n; tries++) {
        i += step;
        if (i >= host.n) i -= host.n;
        if (host_ready(&host.fiber[i])) return i;
    }
    host_stop("all threads wait");
    return 0;
}
static void host_wait(const unsigned *generation) {
    host_fiber *f = &host.fiber[host.self];
    int next;
    f->waits_for = generation, f->seen = *generation;
    next = host_next();
    if (next != host.self) host_enter(&f->at, next);
}
static void host_fiber_main(void) {
    for (;;) {
        int self = host.self;
        host.kernel();
        host_warp *w = &host.warp[self / 32];
        host.fiber[self].done = true;
        host.live--, w->live--;
        if (w->arrived) host_stop("a thread ended while its warp waits for it");
        if (!host_copies[self].asked.empty()) host_stop("a thread ended before its copies");
        host_copies[self].closed.clear();
        if (host.live && host.arrived == host.live) host.arrived = 0, host.generation++;
        if (!host.live && !host_bulks.empty()) host_stop("a block ended before its copies");
        if (host.live) host_enter(&host.fiber[self].at, host_next());
        else cuda_host_switch(&host.fiber[self].at, &host.home);
    }
}
static void host_block(int n) {
    if (!host.stacks) {
        host.stacks = (char *)malloc((size_t)HOST_THREADS * HOST_STACK);
        for (int i = 0; i < HOST_THREADS; i++)
            host_place_new(&host.fiber[i].at, host.stacks + (size_t)i * HOST_STACK, host_fiber_main);
    }
    host.n = host.live = n, host.arrived = 0;
    for (int i = 0; i < n; i++) host.fiber[i].done = false, host.fiber[i].waits_for = NULL;
    for (int i = 0; i < n; i += 32) host.warp[i / 32].arrived = 0, host.warp[i / 32].live = n - i < 32 ? n - i : 32;
    host_enter(&host.home, host.backwards ? n - 1 : 0);
}

// ---- what threads do together

static void __syncthreads(void) {
    if (++host.arrived == host.live) host.arrived = 0, host.generation++;
    else host_wait(&host.generation);
}
// bar.sync of N threads.
template <int BARRIER, int N> static void threads_meet(void) {
    static int arrived;
    static unsigned generation;
    if (++arrived == N) arrived = 0, generation++;
    else host_wait(&generation);
}
// The last lane of the warp to come does the work.
template <class F> static inline void host_together(F work) {
    host_warp *w = &host.warp[host.self / 32];
    if (++w->arrived < w->live) host_wait(&w->generation);
    else work(w), w->arrived = 0, w->generation++;
}
static uint32_t *host_exchange(uint32_t mine) {
    host_warp *w = &host.warp[host.self / 32];
    uint32_t *slot = w->slot[w->generation & 1];
    slot[host.self % 32] = mine;
    host_together([](host_warp *) {});
    return slot;
}
static __forceinline__ float host_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static __forceinline__ uint32_t host_as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float __shfl_xor_sync(unsigned, float x, int mask) {
    return host_as_float(host_exchange(host_as_bits(x))[(host.self % 32) ^ mask]);
}
static int __shfl_xor_sync(unsigned, int x, int mask) {
    return (int)host_exchange((uint32_t)x)[(host.self % 32) ^ mask];
}
static unsigned long long __shfl_xor_sync(unsigned all, unsigned long long x, int mask) {
    uint32_t low = (uint32_t)__shfl_xor_sync(all, (int)x, mask);
    uint32_t high = (uint32_t)__shfl_xor_sync(all, (int)(x >> 32), mask);
    return (unsigned long long)high << 32 | low;
}
static int __shfl_up_sync(unsigned, int x, int by) {
    int lane = (int)(host.self % 32);
    return (int)host_exchange((uint32_t)x)[lane < by ? lane : lane - by];
}
static void __syncwarp(void) { host_exchange(0); }
static float __shfl_sync(unsigned, float x, int lane) {
    return host_as_float(host_exchange(host_as_bits(x))[lane & 31]);
}
static int __shfl_sync(unsigned, int x, int lane) { return (int)host_exchange((uint32_t)x)[lane & 31]; }
static unsigned __ballot_sync(unsigned, int x) {
    uint32_t *slot = host_exchange(x != 0);
    unsigned bits = 0;
    for (int i = 0; i < host.warp[host.self / 32].live; i++) bits |= slot[i] << i;
    return bits;
}
static uint32_t __reduce_max_sync(unsigned, uint32_t x) {
    uint32_t *slot = host_exchange(x);
    for (int i = 0; i < host.warp[host.self / 32].live; i++) x = slot[i] > x ? slot[i] : x;
    return x;
}
static uint32_t __reduce_min_sync(unsigned, uint32_t x) {
    uint32_t *slot = host_exchange(x);
    for (int i = 0; i < host.warp[host.self / 32].live; i++) x = slot[i] < x ? slot[i] : x;
    return x;
}

static __forceinline__ float f16_value(uint32_t u) {
    uint32_t a = (u & 0x7fffu) << 13;
    float x = (u & 0x7c00u) == 0x7c00u ? host_as_float(a | 0x7f800000u) : host_as_float(a) * host_as_float(239u << 23);
    return host_as_float(host_as_bits(x) | (u << 16 & 0x80000000u));
}
// c [16][8] += a [16][16] b [16][8], fragments as mma.sync.m16n8k16 has them: sums in double, rounded once.
typedef double host_columns __attribute__((vector_size(64)));
#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void host_mma_all(host_warp *w) {
    alignas(64) double A[16][16], B[16][8];
    uint32_t words[6][32], any = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 6; i++) words[i][lane] = w->in[lane][i];
    for (int i = 0; i < 4 * 32; i++) any |= words[i / 32][i % 32] & 0x7fff7fffu;
    if (!any) return;    // padding
    for (int i = 0; i < 6; i++) {
        float x[64];     // of each of the eight g, eight consecutive numbers
        for (int lane = 0; lane < 32; lane++) {
            uint32_t u = words[i][lane];
            x[2 * lane] = w->kind == HOST_F16 ? f16_value(u & 0xffffu) : host_as_float(u << 16);
            x[2 * lane + 1] = w->kind == HOST_F16 ? f16_value(u >> 16) : host_as_float(u & 0xffff0000u);
        }
        double *to = i < 4 ? &A[8 * (i & 1)][8 * (i >> 1)] : B[8 * (i - 4)];
        int row = i < 4 ? 16 : 1, column = i < 4 ? 1 : 8;
        for (int g = 0; g < 8; g++)
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) to[g * row + k * column] = (double)x[8 * g + k];
    }
    for (int half = 0; half < 2; half++) {
        host_columns sum[8];
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 2; j++) sum[i / 4][i % 4 * 2 + j] = (double)w->out[i][half * 2 + j];
        for (int k = 0; k < 16; k++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sum[i] += A[half * 8 + i][k] * *(const host_columns *)(const void *)B[k];
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 2; j++) w->out[i][half * 2 + j] = (float)sum[i / 4][i % 4 * 2 + j];
    }
}
static void host_mma(float *c, const uint32_t *a, const uint32_t *b, int f16) {
    host_warp *w = &host.warp[host.self / 32];
    const uint32_t ab[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    w->kind = f16 ? HOST_F16 : HOST_BF16;
    w->in[host.self % 32] = ab, w->out[host.self % 32] = c;
    host_together(host_mma_all);
}

static float host_e4m3(uint32_t code) {
    float x = (code & 0x7f) == 0x7f ? host_as_float(0x7fc00000u)
                                    : host_as_float((code & 0x7f) << 20) * host_as_float(247u << 23);
    return host_as_float(host_as_bits(x) | (code << 24 & 0x80000000u));
}
// A warp's part of wgmma.m64n64k32 of FP8, or k16 of f16 or bf16: c [16][64] += a [16][k] b [64][k]. b points to its
// first 32 bytes, in row 0, in shared memory; rows are 128 bytes, their 16s swizzled by address.
static float host_number(const void *at, int kind) {
    static float value[256];
    uint16_t u;
    for (uint32_t i = 256; value[1] == 0 && i--;) value[i] = host_e4m3(i);
    if (kind == HOST_E4M3) return value[*(const uint8_t *)at];
    memcpy(&u, at, sizeof u);
    return kind == HOST_F16 ? f16_value(u) : host_as_float((uint32_t)u << 16);
}
static void host_mma_panel(float *c, const uint32_t *a, const char *b, int kind, int first) {
    host_warp *w = &host.warp[host.self / 32];
    if (first) memset(c, 0, 32 * sizeof *c);
    w->in[host.self % 32] = a, w->out[host.self % 32] = c, w->from[0] = (const uint16_t *)(const void *)b;
    w->kind = kind;
    host_together([](host_warp *all) {
        int size = all->kind == HOST_E4M3 ? 1 : 2, n_k = 32 / size, in_word = 4 / size;
        float B[32][64];
        for (int n = 0; n < 64; n++)
            for (int k = 0; k < n_k; k++) {
                uintptr_t at = (uintptr_t)(const void *)all->from[0] + (uintptr_t)(n * 128 + k * size);
                B[k][n] = host_number((const void *)(at ^ (at >> 7 & 7) << 4), all->kind);
            }
        for (int row = 0; row < 16; row++) {
            double sum[64];
            for (int n = 0; n < 64; n++)
                sum[n] = (double)all->out[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
            for (int k = 0; k < n_k; k++) {
                const uint32_t *word = &all->in[row % 8 * 4 + k / in_word % 4][row / 8 + k * 2 / n_k * 2];
                double x = (double)host_number((const char *)word + k % in_word * size, all->kind);
                if (x != 0) for (int n = 0; n < 64; n++) sum[n] += x * (double)B[k][n];
            }
            for (int n = 0; n < 64; n++)
                all->out[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] = (float)sum[n];
        }
    });
}
// A warp's part of wgmma.m64 .. k16 of bf16 with both factors in shared memory, rows of 128 bytes swizzled by address:
// c [16][n] += a [16][16] b, b [n][16] or, if `across`, [16][n], where 64 columns are a row and the next 64 `across`
// bytes on. Done at once or, backwards, at the wait for its group.
struct host_product { float *c; const char *a, *b; int n, across, first; };
static host_groups<host_product> host_products[HOST_THREADS];
static double host_swizzled(const char *row, int byte) {
    uintptr_t at = (uintptr_t)(const void *)row + (uintptr_t)byte;
    return (double)host_number((const void *)(at ^ (at >> 7 & 7) << 4), HOST_BF16);
}
#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void host_mma_shared_all(host_warp *all) {
    const host_product &x = *all->product;
    const char *a = x.a + (all - host.warp) % 4 * 16 * 128;
    double A[16][16], any = 0;
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) A[row][k] = host_swizzled(a + row * 128, 2 * k), any += A[row][k] != 0;
    if (any == 0) return;      // padding
    for (int n0 = 0; n0 < x.n; n0 += 8) {
        host_columns B[16];
        double all_b = 0;
        for (int k = 0; k < 16; k++)
            for (int n = n0; n < n0 + 8; n++)
                B[k][n % 8] = x.across ? host_swizzled(x.b + n / 64 * x.across + k * 128, n % 64 * 2)
                                       : host_swizzled(x.b + n * 128, 2 * k), all_b += B[k][n % 8] != 0;
        if (all_b == 0) continue;
        for (int row = 0; row < 16; row++) {
            host_columns sum;
            for (int n = 0; n < 8; n++) sum[n] = (double)all->out[row % 8 * 4 + n / 2][n0 / 2 + row / 8 * 2 + n % 2];
            for (int k = 0; k < 16; k++) sum += A[row][k] * B[k];
            for (int n = 0; n < 8; n++) all->out[row % 8 * 4 + n / 2][n0 / 2 + row / 8 * 2 + n % 2] = (float)sum[n];
        }
    }
}
static void host_mma_now(const host_product &x) {
    host_warp *w = &host.warp[host.self / 32];
    if (x.first) memset(x.c, 0, (size_t)x.n / 2 * sizeof *x.c);
    w->out[host.self % 32] = x.c, w->product = &x;
    host_together(host_mma_shared_all);
}
static void host_mma_shared(const host_product &x) {
    if (((uintptr_t)x.b & 15) || (x.across && ((uintptr_t)x.b & 1023))) host_stop("a panel that is not aligned");
    if (host.backwards) host_products[host.self].asked.push_back(x);
    else host_mma_now(x);
}

// cp.async: the copy lands at once or, backwards, at the wait for its group, not before.
static inline void host_ask(char *to, const void *from, size_t n) {
    if (((uintptr_t)to | (uintptr_t)from) % n) host_stop("a copy's ends are not multiples of its size");
    if (host.backwards) host_copies[host.self].asked.push_back({ to, (const char *)from, n });
    else memcpy(to, from, n);
}
static inline void copies_close(void) {
    if (host.backwards) host_copies[host.self].close();
}
static void host_land(size_t pending) {
    host_copies[host.self].land(pending, [](const host_copy &x) { memcpy(x.to, x.from, x.n); });
}
// mbarrier, and bulk copies that it counts: they land at once or, backwards, at a wait, not before.
static inline host_barrier *host_barrier_at(char *b) { return (host_barrier *)(void *)b; }
static inline void barrier_open(char *b, unsigned arrivals = 1) {
    host_barrier *x = host_barrier_at(b);
    x->turn = 0, x->bytes = 0, x->arrivals = x->missing = arrivals & 63;
}
static inline void host_change(host_barrier *x, int arrivals, int bytes) {
    if (x->missing < (unsigned)arrivals) host_stop("a barrier's turn begins before the last has ended");
    x->missing = (x->missing - (unsigned)arrivals) & 63, x->bytes = (x->bytes + (unsigned)bytes) & 0xfffff;
    if (!x->missing && !x->bytes) x->missing = x->arrivals, x->turn++;
}
static inline void barrier_arrive(char *b) { host_change(host_barrier_at(b), 1, 0); }
static inline void barrier_expect(char *b, int bytes) { host_change(host_barrier_at(b), 1, bytes); }
static inline void host_land_bulk(const host_bulk &x) {
    memcpy(x.to, x.from, (size_t)x.n);
    host_change(x.by, 0, -x.n);
}
static inline void copy_bulk(char *to, const void *from, int n, char *b) {
    const host_bulk x = { to, from, n, host_barrier_at(b) };
    if (((uintptr_t)to | (uintptr_t)from | (uintptr_t)n) % 16) host_stop("a bulk copy is not aligned to 16");
    if (host.backwards) host_bulks.push_back(x);
    else host_land_bulk(x);
}
static void barrier_wait(char *b, unsigned parity) {
    host_barrier *of = host_barrier_at(b);
    for (size_t i = 0; i < host_bulks.size();)
        if (host_bulks[i].by == of) host_land_bulk(host_bulks[i]), host_bulks.erase(host_bulks.begin() + (ptrdiff_t)i);
        else i++;
    while (of->turn % 2 == parity) host_wait(&of->turn);
}
static inline const void *host_aligned(const void *row) {
    if ((uintptr_t)row % 16) host_stop("a 16-byte access to shared memory that is not aligned to 16");
    return row;
}

// ldmatrix.x4.trans: lane i gives row i % 8 of tile i / 8; r[j]: of tile j rows 2 (lane % 4) and the next, column lane
// / 4.
static void load_transposed(uint32_t *r, const uint16_t *row) {
    host_warp *w = &host.warp[host.self / 32];
    w->from[host.self % 32] = (const uint16_t *)host_aligned(row), w->to[host.self % 32] = r;
    host_together([](host_warp *all) {
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < 4; j++)
                all->to[lane][j] = all->from[8 * j + 2 * (lane % 4)][lane / 4] |
                                   (uint32_t)all->from[8 * j + 2 * (lane % 4) + 1][lane / 4] << 16;
    });
}
// ldmatrix.x4: of tile j, two numbers of row lane / 4.
static uint4 host_load_rows(const char *row) {
    host_warp *w = &host.warp[host.self / 32];
    uint32_t r[4];
    w->from[host.self % 32] = (const uint16_t *)host_aligned(row), w->to[host.self % 32] = r;
    host_together([](host_warp *all) {
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < 4; j++) memcpy(&all->to[lane][j], all->from[8 * j + lane / 4] + lane % 4 * 2, 4);
    });
    return make_uint4(r[0], r[1], r[2], r[3]);
}

// ---- arithmetic

static inline float __uint_as_float(unsigned u) { return host_as_float(u); }
static inline unsigned __float_as_uint(float x) { return host_as_bits(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float host_rsqrtf(float x) { return 1 / __builtin_sqrtf(x); }
#define rsqrtf host_rsqrtf       // C23 has a function of this name
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
template <class T> static inline T atomicAdd(T *p, T x) { T old = *p; *p += x; return old; }
template <class T> static inline T atomicMax(T *p, T x) { T old = *p; if (x > old) *p = x; return old; }
static inline void __threadfence(void) {}
// Global memory only.
template <class T> static inline T __ldcg(const T *p) {
    if ((const char *)p >= host.shared && (const char *)p < host.shared + HOST_SHARED) host_stop("__ldcg of shared memory");
    return *p;
}
static inline uint32_t host_bf16(float x) {
    uint32_t u = host_as_bits(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
static inline uint32_t bf16x2(float low, float high) { return host_bf16(low) | host_bf16(high) << 16; }
static inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    return bf16x2(host_as_float(a << 16) * host_as_float(b << 16),
                  host_as_float(a & 0xffff0000u) * host_as_float(b & 0xffff0000u));
}
// To the nearest f16, ties to even.
static inline uint32_t host_f16(float x) {
    uint32_t u = host_as_bits(x), a = u & 0x7fffffffu, r;
    if (a > 0x7f800000u) return 0x7fffu;
    if (a >= 0x477ff000u) r = 0x7c00u;                                      // 65520 and up
    else if (a < 0x38800000u) r = host_as_bits(host_as_float(a) + .5f) - 0x3f000000u;      // below 2^-14: of 2^-24
    else r = ((a + 0xfffu + (a >> 13 & 1)) >> 13) - (112u << 10);
    return r | (u >> 16 & 0x8000u);
}
static inline uint32_t f16x2(float low, float high) { return host_f16(low) | host_f16(high) << 16; }
static inline uint2 f16_of_e4m3(uint32_t codes) {
    uint32_t r[4];
    for (int i = 0; i < 4; i++, codes >>= 8)
        r[i] = (codes & 0x80) << 8 | ((codes & 0x7f) == 0x7f ? 0x7fffu
                                                             : host_f16(host_as_float((codes & 0x7f) << 20) *
                                                                        host_as_float(247u << 23)));
    return { r[0] | r[1] << 16, r[2] | r[3] << 16 };
}

// ---- the runtime

typedef enum { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorUnknown = 999 } cudaError_t;
typedef enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice } cudaMemcpyKind;
typedef enum { cudaStreamCaptureModeThreadLocal = 1 } cudaStreamCaptureMode;
typedef enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
               cudaFuncAttributePreferredSharedMemoryCarveout = 9 } cudaFuncAttribute;
typedef enum { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75,
               cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 } cudaDeviceAttr;
typedef std::vector<std::function<void()>> host_calls;
typedef struct host_stream { host_calls *capture; } *cudaStream_t;
typedef host_calls *cudaGraph_t;
typedef host_calls *cudaGraphExec_t;
typedef struct host_event { int unused; } *cudaEvent_t;
#define cudaEventDisableTiming 2u
#define cudaStreamNonBlocking 1u

// What a test may set: the device's memory, a call that fails (counted from 1).
extern "C" {
extern size_t cuda_host_memory;
extern long cuda_host_calls, cuda_host_fail_at, cuda_host_launches, cuda_host_waits;
extern size_t cuda_host_used;
extern int cuda_host_sms;
void cuda_host_backwards(int on);
}
#ifdef CUDA_HOST_IMPLEMENTATION
size_t cuda_host_memory = (size_t)1 << 31, cuda_host_used, cuda_host_back;
long cuda_host_calls, cuda_host_fail_at, cuda_host_launches, cuda_host_waits;
int cuda_host_sms = 3;
void cuda_host_backwards(int on) { host.backwards = on; }
#endif

#define HOST_CALL() do { if (++cuda_host_calls == cuda_host_fail_at) return cudaErrorUnknown; } while (0)
static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : e ? "unspecified failure" : "no error";
}
static inline cudaError_t cudaGetLastError(void) { return cudaSuccess; }
static inline void nvtxRangePushA(const char *) {}
static inline void nvtxRangePop(void) {}
static inline cudaError_t cudaSetDevice(int) { HOST_CALL(); return cudaSuccess; }
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    HOST_CALL();
    *value = which == cudaDevAttrMultiProcessorCount      ? cuda_host_sms
             : which == cudaDevAttrComputeCapabilityMajor ? 9
                                                          : HOST_SHARED - 1024;
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    HOST_CALL();
    *total = cuda_host_memory, *free_bytes = cuda_host_memory - cuda_host_used;
    return cudaSuccess;
}
// Each piece stores its size and lies between fences that cudaFree checks.
template <class T> static cudaError_t cudaMalloc(T **p, size_t n) {
    HOST_CALL();
    if (n > cuda_host_memory - cuda_host_used) return cudaErrorMemoryAllocation;
    char *base = (char *)aligned_alloc(HOST_FENCE, (n + 3 * HOST_FENCE - 1) / HOST_FENCE * HOST_FENCE);
    if (!base) return cudaErrorMemoryAllocation;
    memset(base, 0xfe, HOST_FENCE), memset(base + HOST_FENCE, 0xff, n), memset(base + HOST_FENCE + n, 0xfe, HOST_FENCE);
    memcpy(base, &n, sizeof n);
    cuda_host_used += n;
    *p = (T *)(void *)(base + HOST_FENCE);
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    char *base = (char *)p - HOST_FENCE;
    size_t n;
    memcpy(&n, base, sizeof n);
    for (int i = sizeof n; i < HOST_FENCE; i++)
        if ((unsigned char)base[i] != 0xfe || (unsigned char)base[HOST_FENCE + n + (size_t)i] != 0xfe)
            host_stop("memory beside an allocation was written");
    cuda_host_used -= n;
    free(base);
    return cudaSuccess;
}
template <class T> static cudaError_t cudaMallocHost(T **p, size_t n) {
    HOST_CALL();
    *p = (T *)malloc(n ? n : 1);
    if (*p) memset((void *)*p, 0xff, n);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
static inline cudaError_t cudaFreeHost(void *p) { free(p); return cudaSuccess; }
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    HOST_CALL();
    *s = new host_stream();
    return cudaSuccess;
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t s) { delete s; return cudaSuccess; }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { cuda_host_waits++; HOST_CALL(); return cudaSuccess; }
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    HOST_CALL();
    *e = new host_event();
    return cudaSuccess;
}
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { HOST_CALL(); return cudaSuccess; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { HOST_CALL(); return cudaSuccess; }
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return cudaSuccess; }
static inline void host_do(cudaStream_t s, const std::function<void()> &call) {
    if (s && s->capture) s->capture->push_back(call);
    else call();
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    HOST_CALL();
    if (kind == cudaMemcpyDeviceToHost) cuda_host_back += n;
    host_do(s, [=] { memcpy(to, from, n); });
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t n, cudaStream_t s) {
    HOST_CALL();
    host_do(s, [=] { memset(to, byte, n); });
    return cudaSuccess;
}
static inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    HOST_CALL();
    s->capture = new host_calls();
    return cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    *g = s->capture, s->capture = NULL;
    HOST_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) {
    HOST_CALL();
    *e = new host_calls(*g);
    return cudaSuccess;
}
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
    HOST_CALL();
    for (auto &call : *e) call();
    return cudaSuccess;
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete e; return cudaSuccess; }
template <class F> static cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) {
    HOST_CALL();
    return cudaSuccess;
}

template <class P> static void host_run(void (*kernel)(P), dim3 grid, dim3 block, size_t shared, const P &p) {
    if (block.x > HOST_THREADS || shared > HOST_SHARED) host_stop("too many threads or too much shared memory");
    cuda_host_launches++;
    host.kernel = [kernel, p] { kernel(p); };
    host.grid_dim = grid, host.block_dim = block;
    memset(host.shared + shared, 0xfe, HOST_FENCE);
    for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
            memset(host.shared, 0xff, shared);
            host.block = host.backwards ? dim3(grid.x - 1 - x, grid.y - 1 - y) : dim3(x, y);
            host_block((int)block.x);
        }
    for (int i = 0; i < HOST_FENCE; i++)
        if ((unsigned char)host.shared[shared + (size_t)i] != 0xfe) host_stop("a write past the block's shared memory");
}
template <class P>
static cudaError_t host_launch(dim3 grid, dim3 block, size_t shared, cudaStream_t s, void (*kernel)(P), const P &p) {
    HOST_CALL();
    host_do(s, [=] { host_run(kernel, grid, block, shared, p); });
    return cudaSuccess;
}
#endif
