// The functions of deployment/kernels/decode/ptx.h on a CPU, for tests: the lanes of a block are fibers, and whatever they do together waits
// until all that take part have arrived. Between such meetings they run in a random order, shared memory begins as NaN, and
// vectors must be aligned, so that what a GPU only sometimes shows is seen here.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#define UNROLL
#define UNROLL_BY_8
#define ROLLED
#define DEVICE inline
#define GRID_CONSTANT
#define KERNEL(threads) inline void
#define KERNEL_OF(registers) inline void
#define GLOBAL inline void
#define SHARED_MEMORY lanes::shared
using std::max;
using std::min;
struct alignas(8) uint2 { uint32_t x, y; };

namespace lanes {
struct Meeting { int arrived = 0; unsigned generation = 0; };
struct Copy { uint32_t* to; std::array<uint32_t, 4> words; };
struct Lane { ucontext_t context; bool done; std::vector<char> stack; std::vector<std::vector<Copy>> copies; };
inline std::vector<Lane> all;
inline ucontext_t home;
inline int now, block, grid, size;
inline char* shared;
inline std::function<void()> body;
inline Meeting of_warp[64], of_barrier[16], of_block;
inline void yield() { swapcontext(&all[now].context, &home); }
inline void run_lane() { body(); all[now].done = true; yield(); }
inline void meet(Meeting& m, int count, std::function<void()> last = [] {}) {
    const unsigned generation = m.generation;
    if (++m.arrived == count) last(), m.arrived = 0, m.generation++;
    else while (m.generation == generation) yield();
}
// Every lane of a warp gives a value, all see all of them.
template <class T> void gather(const T& mine, T* out) {
    static T box[64][32];
    box[now / 32][now % 32] = mine;
    meet(of_warp[now / 32], 32);
    for (int i = 0; i < 32; i++) out[i] = box[now / 32][i];
    meet(of_warp[now / 32], 32);
}
inline void check(const void* p, int bytes) {
    if ((uintptr_t)p % bytes) fprintf(stderr, "%p is not aligned to %d bytes\n", p, bytes), abort();
}
template <class K> void launch(unsigned seed, int blocks, int threads, size_t bytes, K kernel) {
    std::vector<char> memory(bytes + 256);
    std::mt19937 random(seed);
    std::vector<int> order(threads);
    for (int t = 0; t < threads; t++) order[t] = t;
    grid = blocks, size = threads, body = kernel;
    if ((int)all.size() < threads) all.resize(threads);
    for (block = 0; block < blocks; block++) {
        std::fill(memory.begin(), memory.end(), (char)0xFF);  // NaN
        shared = (char*)(((uintptr_t)memory.data() + 127) & ~(uintptr_t)127);
        for (int t = 0; t < threads; t++) {
            Lane& lane = all[t];
            lane.done = false, lane.stack.resize(1 << 16), lane.copies.assign(1, {});
            getcontext(&lane.context);
            lane.context.uc_stack.ss_sp = lane.stack.data(), lane.context.uc_stack.ss_size = lane.stack.size();
            lane.context.uc_link = &home;
            makecontext(&lane.context, run_lane, 0);
        }
        for (bool more = true; more;) {
            more = false;
            std::shuffle(order.begin(), order.end(), random);
            for (int t : order)
                if (!all[t].done) now = t, swapcontext(&home, &all[t].context), more |= !all[t].done;
        }
    }
}
inline float half(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline uint16_t bits(float x) { _Float16 h = (_Float16)x; uint16_t b; memcpy(&b, &h, 2); return b; }
inline float part(uint32_t w, int i) { return half(w >> 16 * i); }
}  // namespace lanes

DEVICE int thread_number() { return lanes::now; }
DEVICE int block_number() { return lanes::block; }
DEVICE int threads_in_block() { return lanes::size; }
DEVICE int blocks_in_grid() { return lanes::grid; }
DEVICE void barrier_of_block() { lanes::meet(lanes::of_block, lanes::size); }
DEVICE void barrier(int id, int threads) { lanes::meet(lanes::of_barrier[id], threads); }
DEVICE bool barrier_any(int id, int threads, bool p) {
    static bool any[16], result[16];
    any[id] |= p;
    lanes::meet(lanes::of_barrier[id], threads, [&] { result[id] = any[id], any[id] = false; });
    const bool r = result[id];
    lanes::meet(lanes::of_barrier[id], threads);
    return r;
}
DEVICE float shuffle_xor(float x, int k) { float v[32]; lanes::gather(x, v); return v[lanes::now % 32 ^ k]; }
template <class T> DEVICE T shuffle(T x, int lane) { T v[32]; lanes::gather(x, v); return v[lane]; }
DEVICE uint32_t load1(const uint32_t* p) { lanes::check(p, 4); return *p; }
DEVICE void read2(uint32_t* v, const void* p) { lanes::check(p, 8); memcpy(v, p, 8); }
DEVICE void read4(uint32_t* v, const void* p) { lanes::check(p, 16); memcpy(v, p, 16); }
DEVICE void barrier_of_warp() { lanes::meet(lanes::of_warp[lanes::now / 32], 32); }
// They arrive as late as they may.
DEVICE void copy16_if(bool p, uint32_t* to, const uint32_t* from) {
    if (!p) return;
    lanes::check(to, 16), lanes::check(from, 16);
    lanes::all[lanes::now].copies.back().push_back({to, {from[0], from[1], from[2], from[3]}});
}
DEVICE void end_of_copies() { lanes::all[lanes::now].copies.emplace_back(); }
template <int LATEST> DEVICE void wait_for_copies() {
    auto& groups = lanes::all[lanes::now].copies;  // the last one has not ended
    for (; (int)groups.size() > LATEST + 1; groups.erase(groups.begin()))
        for (const auto& copy : groups.front()) memcpy(copy.to, copy.words.data(), 16);
}
DEVICE void launch_dependents() {}
DEVICE int quick_quotient(int n, int d) { return (int)((n + 0.5f) / d); }
DEVICE void wait_for_prerequisites() {}
DEVICE uint32_t shared_address(const void* p) { return (const char*)p - lanes::shared; }
DEVICE uint32_t shared1(uint32_t at) { return load1((const uint32_t*)(lanes::shared + at)); }
DEVICE void shared2(uint32_t at, uint32_t& a, uint32_t& b) { uint32_t v[2]; read2(v, lanes::shared + at); a = v[0], b = v[1]; }
DEVICE void read4_if(bool p, uint32_t* v, const void* at) { if (p) read4(v, at); else std::fill(v, v + 4, 0x7FFF7FFFu); }
DEVICE void prefetch_line(const void*) {}
DEVICE void store4(uint32_t* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { lanes::check(p, 16); p[0] = a, p[1] = b, p[2] = c, p[3] = d; }
DEVICE void store4(float* p, float a, float b, float c, float d) { lanes::check(p, 16); p[0] = a, p[1] = b, p[2] = c, p[3] = d; }
DEVICE void store2(float* p, float x, float y) { lanes::check(p, 8); p[0] = x, p[1] = y; }
DEVICE void add_shared(int* p, int x) { *p += x; }
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (uint32_t)(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
DEVICE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) { for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255); return c; }
DEVICE void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    struct Operands { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all[32];
    lanes::gather(mine, all);
    const int row = lanes::now % 32 / 4, pair = lanes::now % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const Operands &A = all[row * 4 + k % 8 / 2], &B = all[(2 * pair + i % 2) * 4 + k % 8 / 2];
            d[i] += lanes::part(A.a[i / 2 + 2 * (k / 8)], k % 2) * lanes::part(B.b[k / 8], k % 2);
        }
}
DEVICE uint32_t halves(float a, float b) { return lanes::bits(a) | (uint32_t)lanes::bits(b) << 16; }
DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return halves(lanes::part(a, 0) * lanes::part(b, 0) + lanes::part(c, 0), lanes::part(a, 1) * lanes::part(b, 1) + lanes::part(c, 1));
}
DEVICE uint16_t to_half(float x) { return lanes::bits(x); }
DEVICE uint32_t as_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
DEVICE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
DEVICE uint16_t to_bfloat(float x) { uint32_t b; memcpy(&b, &x, 4); return (b + 0x7FFF + (b >> 16 & 1)) >> 16; }
DEVICE float from_half(uint16_t h) { return lanes::half(h); }
DEVICE float infinity() { return INFINITY; }
DEVICE float maximum(float a, float b) { return std::fmax(a, b); }
DEVICE float exp2_of(float x) { return std::exp2(x); }
DEVICE void quick_cos_sin(float x, float& c, float& s) { c = std::cos(x), s = std::sin(x); }
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
DEVICE int round_int(float x) { return (int)std::lrint(x); }
