// What the processes of a tensor-parallel model have of a few tokens, added up, or side by side, in all of them. Each stores its part in the inboxes of the
// others, over NVLink, and waits for theirs in its own. A word travels with the number of its round, in one store of 8 bytes: who finds the number has the word, so
// no flag is set or reset, and nothing else is waited for. All add in the order of the processes, and have the same bits.
//
// An inbox has places for two rounds. That is enough: who begins round n + 2 has got all of round n + 1, and who sent that had read round n before.
// Word w is always that of block w / THREADS, which counts its rounds, so calls may be of any size.
//
// Compiled for PARTS processes. Without __CUDACC__ lanes are fibers (tests/lanes.h).
#define THREADS 256
#ifdef __CUDACC__
#include "ptx.h"
DEVICE void send(uint64_t* to, uint64_t x) { asm volatile("st.relaxed.sys.global.b64 [%0],%1;" ::"l"(to), "l"(x) : "memory"); }
DEVICE uint64_t arrived(const uint64_t* at) { uint64_t x; asm volatile("ld.relaxed.sys.global.b64 %0,[%1];" : "=l"(x) : "l"(at) : "memory"); return x; }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
#else
#include "lanes.h"
DEVICE void send(uint64_t* to, uint64_t x) { *to = x; }
DEVICE uint64_t arrived(const uint64_t* at) { return *at; }
DEVICE uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
#endif

struct Params {
    uint64_t* inboxes[8];  // those of PARTS processes, as this one sees them: [2, PARTS, capacity]
    const uint32_t* own;
    uint32_t *result, *rounds;  // a sum, or the parts one after another; rounds of each block
    int64_t capacity;
    int words, number, element, gathers;
};

enum { HALF, BFLOAT, FLOAT };

DEVICE void add(float* sum, uint32_t word, int element) {
    if (element == FLOAT) sum[0] += as_float(word);
    if (element == HALF) sum[0] += from_half(word & 0xFFFF), sum[1] += from_half(word >> 16);
    if (element == BFLOAT) sum[0] += as_float(word << 16), sum[1] += as_float(word & 0xFFFF0000u);
}

DEVICE uint32_t word_of(const float* sum, int element) {
    if (element == FLOAT) return bits_of(sum[0]);
    if (element == HALF) return to_half(sum[0]) | (uint32_t)to_half(sum[1]) << 16;
    return to_bfloat(sum[0]) | (uint32_t)to_bfloat(sum[1]) << 16;
}

KERNEL(THREADS) exchange(const GRID_CONSTANT Params p) {
    wait_for_prerequisites();  // a library's product may let this one begin before its sums are written
    const uint32_t round = p.rounds[block_number()] + 1;
    const int word = block_number() * THREADS + thread_number();
    const int64_t first = (round & 1) * PARTS * p.capacity;
    if (word < p.words) {
        const uint32_t own = p.own[word];
        UNROLL for (int i = 0; i < PARTS; i++)
            if (i != p.number) send(p.inboxes[i] + first + p.number * p.capacity + word, (uint64_t)round << 32 | own);
        float sum[2] = {0, 0};
        UNROLL for (int i = 0; i < PARTS; i++) {
            uint32_t part = own;
            if (i != p.number) {
                uint64_t found;
                do found = arrived(p.inboxes[p.number] + first + i * p.capacity + word);
                while ((uint32_t)(found >> 32) != round);
                part = (uint32_t)found;
            }
            if (p.gathers) p.result[(int64_t)i * p.words + word] = part;
            else add(sum, part, p.element);
        }
        if (!p.gathers) p.result[word] = word_of(sum, p.element);
    }
    barrier_of_block();  // all have read the number of the round
    if (thread_number() == 0) p.rounds[block_number()] = round;
}

GLOBAL sizes(int* out) { out[0] = sizeof(Params); }
