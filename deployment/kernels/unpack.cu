// Blocks of 64 tokens of a page as plain fp16 tokens [rows, room, G, D], keys rotated: what unpack.py does in Triton, for keys and values in groups of up to
// 4 bits without outliers, at once. A block of D threads has 64 tokens of some heads of one side. For each head it goes through a tile in shared memory:
//
//     1  a warp takes two groups of 16 channels (of keys the two halves of 16 pairs): words to nibbles, a byte of them to two levels, times scale plus zero
//     2  a thread takes 8 neighbours (of keys both halves of 8 pairs, which it rotates) and writes them, 16 bytes at a time
//
// Compiled for HEAD_DIM, HEADS of a block, and DYNAMIC, whether ranges of values are tokens'.
// Without __CUDACC__ lanes are fibers (tests/lanes.h).
#ifdef __CUDACC__
#include "ptx.h"
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 512 / (threads))
#else
#include "lanes.h"
#endif

constexpr int D = HEAD_DIM, HALF = D / 2, TOKENS = 64, WIDTHS = 5;
constexpr int PITCH = D + 8;  // of a token in the tile

struct Side {
    const uint32_t* words;
    const uint16_t* ranges;          // of tokens
    const uint32_t *slots, *groups;  // [G, D, 4] scale, zero, floor, channel; [G, D / 16, 2] first word, width
    const float* levels;
    uint16_t* result;
    int64_t block_words;
    int first_level[WIDTHS + 1];  // of each width, -1 where it does not occur
};
struct Params {
    Side side[2];
    const int64_t *origins, *limits;
    const uint32_t* steps;
    const float* turn;  // [2, 64, D / 2]
    int64_t shift;      // of the page's first token
    int blocks, first, count, row0, rows, room, at, heads;
};
struct alignas(16) Shared {
    uint32_t entries[WIDTHS][256];  // two fp16 levels
    uint16_t tile[TOKENS * PITCH + 4 * 16];
};

// Every 16 tokens are moved on by 32 bytes, so that lanes that write together do not meet on a bank.
DEVICE int place(int token, int channel) { return token * PITCH + token / 16 * 16 + channel; }

DEVICE void fill_entries(const Side& s, Shared& m) {
    for (int width = 0; width < WIDTHS; width++) {
        const int levels = 1 << width, first = s.first_level[width];
        for (int byte = thread_number(); first >= 0 && byte < 256; byte += D)
            if (byte % 16 < levels && byte / 16 < levels) m.entries[width][byte] = halves(s.levels[first + byte % 16], s.levels[first + byte / 16]);
    }
}

// A lane's 32 codes of a group, as four words of eight nibbles (format/groups.py).
DEVICE void load_nibbles(uint32_t* n, const uint32_t* at, int width, int lane) {
    for (int i = 0; i < 4; i++) n[i] = 0;
    if (width == 4) read4(n, at + 4 * lane);
    if (width == 2 || width == 3) {
        uint32_t pair[2];
        read2(pair, at + 2 * lane);
        for (int i = 0; i < 4; i++) n[i] = pair[i / 2] >> 2 * (i % 2) & 0x33333333u;
    }
    if (width == 1 || width == 3) {
        const uint32_t word = load1(at + 32 * (width - 1) + lane);
        for (int i = 0; i < 4; i++) n[i] |= (word >> i & 0x11111111u) << (width - 1);
    }
}

DEVICE void put(Shared& m, int token, int channel, uint32_t level, float scale, float zero) {
    m.tile[place(token, channel)] = to_half(from_half((uint16_t)level) * scale + zero);
}

template <bool KEYS> DEVICE void decode_head(const Side& s, Shared& m, const uint32_t* words, const uint16_t* ranges, int g, int held) {
    const int warp = thread_number() / 32, lane = thread_number() % 32, r = lane / 4, c = lane % 4;
    UNROLL for (int k = 0; k < 2; k++) {
        const int group = g * (D / 16) + 2 * warp + k;
        uint32_t about[2], n[4], slot[4][4];
        read2(about, s.groups + 2 * group);
        const uint32_t* entries = m.entries[about[1]];
        load_nibbles(n, words + about[0], about[1], lane);
        if (KEYS) {
            UNROLL for (int i = 0; i < 4; i++) read4(slot[i], s.slots + 4 * (16 * group + 2 * c + i % 2 + i / 2 * 8));
        } else {
            UNROLL for (int h = 0; h < 2; h++) read4(slot[h], s.slots + 4 * (16 * group + 8 * h + r));
        }
        UNROLL for (int i = 0; i < 16; i++) {  // codes 2 i and 2 i + 1
            const uint32_t two = entries[n[i / 4] >> 8 * (i % 4) & 255];
            if (KEYS) {
                const int token = 8 * (i / 2) + r, first = 2 * (i % 2);
                put(m, token, slot[first][3], two & 0xFFFF, as_float(slot[first][0]), as_float(slot[first][1]));
                put(m, token, slot[first + 1][3], two >> 16, as_float(slot[first + 1][0]), as_float(slot[first + 1][1]));
            } else {
                const int token = 16 * c + 2 * (i % 8), h = i / 8;
                float scale = as_float(slot[h][0]), zero = as_float(slot[h][1]), scale2 = scale, zero2 = zero;
                if (DYNAMIC) {
                    uint32_t both[2];
                    read2(both, ranges + 2 * token);  // behind the last token they may be anything
                    both[0] = token < held ? both[0] : 0, both[1] = token + 1 < held ? both[1] : 0;
                    scale = from_half((uint16_t)both[0]), zero = from_half(both[0] >> 16), scale2 = from_half((uint16_t)both[1]), zero2 = from_half(both[1] >> 16);
                }
                put(m, token, slot[h][3], two & 0xFFFF, scale, zero);
                put(m, token + 1, slot[h][3], two >> 16, scale2, zero2);
            }
        }
    }
}

// Cosine and sine of 8 pairs at four tokens, those that a thread rotates of every head.
DEVICE void angles(const Params& p, int64_t base, float* cos, float* sin) {
    const int first = thread_number() % (D / 16) * 8, row = thread_number() / (D / 16);
    UNROLL for (int i = 0; i < 8; i++) {
        const uint32_t high = p.steps[2 * (first + i)], low = p.steps[2 * (first + i) + 1], t = (uint32_t)base;
        float base_cos, base_sin;
        quick_cos_sin((int)(t * high + multiply_high(t, low)) * 1.4629180792671596e-09f, base_cos, base_sin);
        UNROLL for (int k = 0; k < 4; k++) {
            const float* at = p.turn + (row + 16 * k) * HALF + first + i;
            const float c = at[0], s = at[TOKENS * HALF];
            cos[8 * k + i] = base_cos * c - base_sin * s, sin[8 * k + i] = base_sin * c + base_cos * s;
        }
    }
}

DEVICE void write_keys(const Shared& m, uint16_t* result, int64_t token_stride, const float* cos, const float* sin) {
    const int first = thread_number() % (D / 16) * 8, row = thread_number() / (D / 16);
    UNROLL for (int k = 0; k < 4; k++) {
        const int token = row + 16 * k;
        uint32_t a[4], b[4];
        read4(a, m.tile + place(token, first)), read4(b, m.tile + place(token, first + HALF));
        UNROLL for (int i = 0; i < 4; i++) {
            float one[2], two[2];
            UNROLL for (int j = 0; j < 2; j++) {
                const float x = from_half(a[i] >> 16 * j & 0xFFFF), y = from_half(b[i] >> 16 * j & 0xFFFF), c = cos[8 * k + 2 * i + j], s = sin[8 * k + 2 * i + j];
                one[j] = x * c - y * s, two[j] = y * c + x * s;
            }
            a[i] = halves(one[0], one[1]), b[i] = halves(two[0], two[1]);
        }
        uint32_t* to = (uint32_t*)(result + token * token_stride + first);
        store4(to, a[0], a[1], a[2], a[3]), store4(to + HALF / 2, b[0], b[1], b[2], b[3]);
    }
}

DEVICE void write_values(const Shared& m, uint16_t* result, int64_t token_stride) {
    const int first = thread_number() % (D / 8) * 8, row = thread_number() / (D / 8);
    UNROLL for (int k = 0; k < 8; k++) {
        const int token = row + 8 * k;
        uint32_t x[4];
        read4(x, m.tile + place(token, first));
        store4((uint32_t*)(result + token * token_stride + first), x[0], x[1], x[2], x[3]);
    }
}

template <bool KEYS> DEVICE void unpack_heads(const Params& p, const Side& s, Shared& m, int number) {
    const int parts = p.heads / HEADS, part = number % parts, row = number / parts % p.rows, at = number / parts / p.rows, block = p.first + at;
    const int64_t b = p.row0 + row, base = p.origins[b] + p.shift + (int64_t)block * TOKENS, page_block = b * p.blocks + block;
    const int held = (int)min(max(p.limits[b] - base, (int64_t)0), (int64_t)TOKENS);
    float cos[32], sin[32];
    if (KEYS) angles(p, base, cos, sin);
    fill_entries(s, m);
    barrier_of_block();
    ROLLED for (int g = part * HEADS; g < (part + 1) * HEADS; g++) {
        decode_head<KEYS>(s, m, s.words + page_block * s.block_words, s.ranges + 2 * TOKENS * page_block, g, held);
        barrier_of_block();
        uint16_t* result = s.result + (((int64_t)row * p.room + p.at + at * TOKENS) * p.heads + g) * D;
        if (KEYS) write_keys(m, result, (int64_t)p.heads * D, cos, sin);
        else write_values(m, result, (int64_t)p.heads * D);
        barrier_of_block();
    }
}

KERNEL(D) unpack(const GRID_CONSTANT Params p) {
    Shared& m = *(Shared*)SHARED_MEMORY;
    wait_for_prerequisites();
    const int keys = p.count * p.rows * (p.heads / HEADS);
    if (block_number() < keys) unpack_heads<true>(p, p.side[0], m, block_number());
    else unpack_heads<false>(p, p.side[1], m, block_number() - keys);
}

GLOBAL sizes(int* out) { out[0] = sizeof(Shared), out[1] = sizeof(Params); }
