// Blocks of 64 tokens of a page as plain fp16 tokens [rows, room, G, D], keys rotated: what unpack.py does in Triton, for keys and values in groups of up to
// 4 bits, at once. A block of 2 D threads has 64 tokens of some heads of one side. For each head it goes through a tile in shared memory:
//
//     1  a warp takes a group of 16 channels: words to nibbles, a byte of them to two levels, times scale plus zero
//     2  outliers are written over them
//     3  a thread takes 8 neighbours (of keys both halves of 8 pairs, which it rotates) and writes them, 16 bytes at a time
//
// What it reads for the next head is on its way meanwhile.
//
// Compiled for HEAD_DIM, HEADS of a block, and DYNAMIC, whether ranges of values are tokens'.
// Without __CUDACC__ lanes are fibers (tests/lanes.h).
#ifdef __CUDACC__
#include "ptx.h"
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 768 / (threads))  // 80 registers
#else
#include "lanes.h"
#endif

constexpr int D = HEAD_DIM, HALF = D / 2, THREADS = 2 * D, TOKENS = 64, WIDTHS = 5;
constexpr int PITCH = D + 8;  // of a token in the tile

struct Side {
    const uint32_t* words;
    const uint16_t *ranges, *index, *value;  // of tokens; of outliers, if there are any
    const int *starts, *ends;                // [B, G], [B, G, blocks]
    const uint32_t *slots, *groups;          // [G, D, 4] scale, zero, floor, channel; [G, D / 16, 2] first word, width
    const float* levels;
    uint16_t* result;
    int64_t block_words;
    int first_level[WIDTHS];  // of each width, -1 where it does not occur
    int outliers;
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
    uint32_t slots[HEADS * D][4];
    uint16_t tile[TOKENS * PITCH + 4 * 16];
    uint32_t groups[HEADS * D / 16][2];
    int lists[HEADS][2];  // of outliers: where they begin and end
};

// Every 16 tokens are moved on by 32 bytes, so that lanes that write together do not meet on a bank.
DEVICE int place(int token, int channel) { return token * PITCH + token / 16 * 16 + channel; }

// Of widths that do not occur, and of nibbles that are no code, anything: so no load waits for a condition.
DEVICE void fill_entries(const Side& s, Shared& m) {
    for (int byte = thread_number(); byte < 256; byte += THREADS)
        UNROLL for (int width = 0; width < WIDTHS; width++) {
            const float* levels = s.levels + max(s.first_level[width], 0);
            const int last = s.first_level[width] < 0 ? 0 : (1 << width) - 1;
            m.entries[width][byte] = halves(levels[min(byte % 16, last)], levels[min(byte / 16, last)]);
        }
}

// What a block reads once for all of its heads.
DEVICE void read_tables(const Params& p, const Side& s, Shared& m, int64_t b, int first, int block, int held) {
    const int thread = thread_number();
    for (int slot = thread; slot < HEADS * D; slot += THREADS) {
        uint32_t x[4];
        read4(x, s.slots + 4 * (first * D + slot)), store4(m.slots[slot], x[0], x[1], x[2], x[3]);
    }
    if (thread < HEADS * D / 16) read2(m.groups[thread], s.groups + 2 * (first * (D / 16) + thread));
    if (s.outliers && thread < HEADS) {
        const int64_t stream = b * p.heads + first + thread;
        m.lists[thread][0] = block ? s.ends[stream * p.blocks + block - 1] : s.starts[stream], m.lists[thread][1] = held ? s.ends[stream * p.blocks + block] : 0;
    }
}

// What a lane has of a group, and a thread of a list of outliers, on its way before it is needed.
struct Ahead {
    uint32_t word[4];
    uint16_t index, value;
};
DEVICE void load(Ahead& a, const Side& s, const Shared& m, const uint32_t* words, int own) {
    const uint32_t* group = m.groups[own * (D / 16) + thread_number() / 32];
    const int width = group[1], lane = thread_number() % 32, entry = m.lists[own][0] + thread_number();
    const uint32_t* at = words + group[0];
    if (width == 4) read4(a.word, at + 4 * lane);
    if (width == 2 || width == 3) read2(a.word, at + 2 * lane);
    if (width == 1 || width == 3) a.word[2] = load1(at + 32 * (width - 1) + lane);
    if (s.outliers && entry < m.lists[own][1]) a.index = s.index[entry], a.value = s.value[entry];
}

// A lane's 32 codes of a group, as four words of eight nibbles (format/groups.py).
DEVICE void to_nibbles(uint32_t* n, const Ahead& a, int width) {
    for (int i = 0; i < 4; i++) n[i] = width == 4 ? a.word[i] : width & 2 ? a.word[i / 2] >> 2 * (i % 2) & 0x33333333u : 0;
    if (width & 1)
        for (int i = 0; i < 4; i++) n[i] |= (a.word[2] >> i & 0x11111111u) << (width - 1);
}

// Levels of two codes, as they are with their scales and zeros.
DEVICE void put_two(uint16_t* one, uint16_t* other, uint32_t levels, float scale, float zero, float scale2, float zero2) {
    const uint32_t two = halves(from_half((uint16_t)levels) * scale + zero, from_half((uint16_t)(levels >> 16)) * scale2 + zero2);
    *one = (uint16_t)two, *other = (uint16_t)(two >> 16);
}

template <bool KEYS> DEVICE void decode_head(Shared& m, const Ahead& a, int own, const float* scale, const float* zero) {
    const int lane = thread_number() % 32, r = lane / 4, c = lane % 4, group = own * (D / 16) + thread_number() / 32, width = m.groups[group][1];
    const uint32_t entries = shared_address(m.entries[width]);
    uint32_t n[4], slot[KEYS ? 4 : 2][4], two[8];
    to_nibbles(n, a, width);
    UNROLL for (int i = 0; i < (KEYS ? 4 : 2); i++) read4(slot[i], m.slots[16 * group + (KEYS ? 2 * c + i % 2 + i / 2 * 8 : 8 * i + r)]);
    UNROLL for (int h = 0; h < 2; h++) {
        // all at once: behind something written, each would wait for the one before
        UNROLL for (int i = 0; i < 8; i++) two[i] = shared1(dp4a(n[2 * h + i / 4], 4u << 8 * (i % 4), entries));  // codes 16 h + 2 i and 16 h + 2 i + 1
        UNROLL for (int i = 0; i < 8; i++)
            if (KEYS) {
                const uint32_t *x = slot[2 * (i % 2)], *y = slot[2 * (i % 2) + 1];
                uint16_t* at = m.tile + r * PITCH + place(32 * h + 8 * (i / 2), 0);
                put_two(at + x[3], at + y[3], two[i], as_float(x[0]), as_float(x[1]), as_float(y[0]), as_float(y[1]));
            } else {
                uint16_t* at = m.tile + c * (16 * PITCH + 16) + 2 * i * PITCH + slot[h][3];
                const float x = as_float(slot[h][0]), y = as_float(slot[h][1]);
                if (DYNAMIC) put_two(at, at + PITCH, two[i], scale[2 * i], zero[2 * i], scale[2 * i + 1], zero[2 * i + 1]);
                else put_two(at, at + PITCH, two[i], x, y, x, y);
            }
    }
}

DEVICE void put_outliers(const Side& s, Shared& m, const Ahead& a, int own, int held) {
    const int begin = m.lists[own][0] + thread_number(), end = m.lists[own][1];
    for (int entry = begin; entry < end; entry += THREADS) {
        const int index = entry == begin ? a.index : s.index[entry], token = index / D % TOKENS;
        if (token < held) m.tile[place(token, index % D)] = entry == begin ? a.value : s.value[entry];
    }
}

constexpr int PER = TOKENS / 32;  // tokens of a thread that rotates

// Cosine and sine of 8 pairs at PER tokens, those that a thread rotates of every head.
DEVICE void angles(const Params& p, int64_t base, float* cos, float* sin) {
    const int first = thread_number() % (D / 16) * 8, row = thread_number() / (D / 16);
    UNROLL for (int i = 0; i < 8; i++) {
        const uint32_t high = p.steps[2 * (first + i)], low = p.steps[2 * (first + i) + 1], t = (uint32_t)base;
        float base_cos, base_sin;
        quick_cos_sin((int)(t * high + multiply_high(t, low)) * 1.4629180792671596e-09f, base_cos, base_sin);
        UNROLL for (int k = 0; k < PER; k++) {
            const float* at = p.turn + (row + 32 * k) * HALF + first + i;
            const float c = at[0], s = at[TOKENS * HALF];
            cos[8 * k + i] = base_cos * c - base_sin * s, sin[8 * k + i] = base_sin * c + base_cos * s;
        }
    }
}

// Ranges of the 16 tokens whose values a lane decodes; of those that are not there 0.
DEVICE void read_ranges(const uint16_t* ranges, int held, float* scale, float* zero) {
    const int first = 16 * (thread_number() % 4);
    UNROLL for (int i = 0; i < 16; i += 4) {
        uint32_t x[4];
        read4(x, ranges + 2 * (first + i));
        UNROLL for (int j = 0; j < 4; j++) {
            x[j] = first + i + j < held ? x[j] : 0;
            scale[i + j] = from_half((uint16_t)x[j]), zero[i + j] = from_half((uint16_t)(x[j] >> 16));
        }
    }
}

DEVICE void write_keys(const Shared& m, uint16_t* result, int64_t token_stride, const float* cos, const float* sin) {
    const int first = thread_number() % (D / 16) * 8, row = thread_number() / (D / 16);
    UNROLL for (int k = 0; k < PER; k++) {
        const int token = row + 32 * k;
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
    UNROLL for (int k = 0; k < 2 * PER; k++) {
        const int token = row + 16 * k;
        uint32_t x[4];
        read4(x, m.tile + place(token, first));
        store4((uint32_t*)(result + token * token_stride + first), x[0], x[1], x[2], x[3]);
    }
}

template <bool KEYS> DEVICE void unpack_heads(const Params& p, const Side& s, Shared& m, int number) {
    const int parts = p.heads / HEADS, part = number % parts, row = number / parts % p.rows, at = number / parts / p.rows, block = p.first + at;
    const int64_t b = p.row0 + row, base = p.origins[b] + p.shift + (int64_t)block * TOKENS, page_block = b * p.blocks + block;
    const int held = (int)min(max(p.limits[b] - base, (int64_t)0), (int64_t)TOKENS);
    const uint32_t* words = s.words + page_block * s.block_words;
    const int first = part * HEADS;
    float cos[16], sin[16];  // of values scales and zeros
    Ahead ahead;
    if (KEYS) angles(p, base, cos, sin);
    read_tables(p, s, m, b, first, block, held);
    fill_entries(s, m);
    barrier_of_block();
    load(ahead, s, m, words, 0);
    if (!KEYS && DYNAMIC) read_ranges(s.ranges + 2 * TOKENS * page_block, held, cos, sin);
    ROLLED for (int own = 0; own < HEADS; own++) {
        decode_head<KEYS>(m, ahead, own, cos, sin);
        barrier_of_block();
        if (s.outliers) put_outliers(s, m, ahead, own, held);
        if (own + 1 < HEADS) load(ahead, s, m, words, own + 1);
        if (s.outliers) barrier_of_block();
        uint16_t* result = s.result + (((int64_t)row * p.room + p.at + at * TOKENS) * p.heads + first + own) * D;
        if (KEYS) write_keys(m, result, (int64_t)p.heads * D, cos, sin);
        else write_values(m, result, (int64_t)p.heads * D);
        barrier_of_block();
    }
}

KERNEL(THREADS) unpack(const GRID_CONSTANT Params p) {
    Shared& m = *(Shared*)SHARED_MEMORY;
    wait_for_prerequisites();
    const int keys = p.count * p.rows * (p.heads / HEADS);
    if (block_number() < keys) unpack_heads<true>(p, p.side[0], m, block_number());
    else unpack_heads<false>(p, p.side[1], m, block_number() - keys);
}

GLOBAL sizes(int* out) { out[0] = sizeof(Shared), out[1] = sizeof(Params); }
