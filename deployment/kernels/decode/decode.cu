// Attention of a few queries over packed keys and values: `attend` takes a page apart, `combine` puts the parts together.
//
// A team of D / 32 warps attends to a part of one (sequence, KV head). Warp j has 16 rotary pairs, two groups of keys, and two groups of
// values (order.py), so that scales, zeros and rotation of its channels stay in its registers. A chunk is 128 tokens:
//
//   scores    levels of codes (a table in shared memory of what every byte means), scaled and rotated by their place in a stretch of
//             tokens: 16 tokens x 16 channels, first operand of a product whose 8 columns are (stretches of tokens) x (queries), each a query
//             rotated back to the first token of its stretch. A warp knows its channels' share of a score; shares meet in shared memory
//   softmax   a thread a token, with the largest score so far; only if one exceeds it by far all is rescaled
//   values    levels, 16 channels x 16 tokens, times the weights, which hold the token's scale; zeros add up apart
//
// A step is the scores of a chunk, the values of the last but one before it and the softmax of the one between, so that its three parts do not wait for
// each other and one barrier is enough. Teams are at different places at the same time. Words are copied to shared memory a step ahead. Outliers are
// lists: what an element exceeds its code's level by is added to a score, or to an output, as an integer. Compiled by compile.py for one shape:
// HEAD_DIM, QUERIES (of a tile: 1, 2, 4, 8), TEAMS, KEY_WIDTHS and VALUE_WIDTHS (bit w: groups of w bits occur), DYNAMIC (values have ranges of tokens),
// KEY_OUTLIERS, VALUE_OUTLIERS, BFLOAT, ROUNDS (of outliers that wait in shared memory). Without __CUDACC__ lanes are fibers (tests/lanes.h).
#ifdef __CUDACC__
#include "ptx.h"
#else
#include "lanes.h"
#endif

struct Side {  // keys, or values
    const uint32_t *words, *entries, *ranges;  // [B, blocks, block_words]; pairs of fp16 levels; [B, blocks * 64] fp16 scale, zero
    const uint32_t* slots;                     // [G, D, 4] of channels in their order within a head: scale, zero, what code 0 is, which channel
    const int* groups;                         // [G, D / 16, 2] first word in a block, width
    const uint16_t *index, *value;             // outliers, as streams.py says
    const int *starts, *ends;
    int block_words;
    float lowest;  // level of code 0, where ranges are tokens'
};

struct Plain {  // a few tokens as they are: sinks, or not stored yet
    const void *key, *value;           // [B, G, n, D] of their own dtype, strides below
    const int64_t *origins, *limits;   // [B], plus shift: position of the first; positions from here on are not stored, or null
    int64_t stride_b, stride_g, stride_t, shift;
    int tokens, half;  // whether fp16, else as the queries
};

struct Params {
    Side key, value;
    Plain plain[2];
    const void *query;                                // [B, H, S, D]
    void *result;                                     // [B, S, H, D]
    const int64_t *positions, *origins, *limits;      // [B, S]; [B], plus shift, as of plain tokens
    const uint2 *steps;                               // [D / 2] turns a token, high and low
    const float *factor, *turn;                       // [D / 2] of queries; [2, D / 2, 64] cos and sin of the tokens of a block
    float *outputs, *state;                           // [parts, B, G, tiles, QUERIES, D] in the order of slots; and maximum, sum, zeros, -
    int64_t query_b, query_h, query_s, shift;
    float scaling;                                    // of scores, times log2 e
    int new_tokens, group, heads, rotary_half;        // S, H / G, G, R / 2
    int tokens, blocks, splits, tiles, items;         // of the page; parts of it, tiles of queries, all that teams take turns with
    int first_part, parts, rows;                      // of outputs; tiles of all sequences and heads
};

DEVICE constexpr int only(int widths) { return widths == 1 ? 0 : widths == 2 ? 1 : widths == 4 ? 2 : widths == 8 ? 3 : widths == 16 ? 4 : -1; }
constexpr bool SHORT = QUERIES == 1 && only(KEY_WIDTHS) < 0 && !KEY_OUTLIERS;  // stretches, which take fewer registers and more columns
constexpr int D = HEAD_DIM, WARPS = D / 32, THREADS = D, PAIRS = D / 2, CHUNK = 128, EACH = (CHUNK + THREADS - 1) / THREADS;
constexpr int STRETCHES = 8 / QUERIES, EIGHTS = QUERIES == 8 ? 4 : SHORT ? 1 : 2, STRETCH = 8 * EIGHTS, SET = STRETCHES * STRETCH;
constexpr int ANCHOR = SET;  // chunks, 128 sets, after which columns are rotated from the queries again, so that errors do not add up
// Registers of a thread, spilled ones being dear: with several queries a block of `combine`, and so the next `attend`, finds room beside all teams.
constexpr int COMBINE_REGISTERS = 56, SHARE = (65536 - (QUERIES == 2 || QUERIES == 4 ? 128 * COMBINE_REGISTERS : 0)) / (TEAMS * THREADS), REGISTERS = SHARE > 255 ? 255 : SHARE / 8 * 8;
constexpr float LIFT = DYNAMIC ? 4 : 12, SLACK = 3;          // of weights in fp16: 2^(LIFT + SLACK) at most, 2^-14 normal
constexpr float KEY_UNIT = 65536, VALUE_UNIT = DYNAMIC ? 1024 : 4;  // of integers that outliers add: room for 128 of 1000 each
constexpr float HIDDEN = -1e30f;
constexpr uint32_t QUARTER = 1u << 30;  // of a turn
constexpr float TURN = 1.4629180792671596e-9f;  // 2 pi / 2^32

DEVICE constexpr bool is_quad(int widths) { return only(widths) == 2; }  // four codes a byte, else two
DEVICE constexpr int entries(int width, int widths) {
    return !(widths >> width & 1) ? 0 : width == 0 ? 1 : width == 1 ? 18 : width == 4 || only(widths) > 1 ? 256 : width == 2 ? 52 : 120;
}
DEVICE constexpr int widest(int widths) { return widths >> 4 & 1 ? 4 : widths >> 3 & 1 ? 3 : widths >> 2 & 1 ? 2 : 1; }
DEVICE constexpr int first_entry(int width, int widths) {
    int sum = 0;
    for (int w = 0; w < width; w++) sum += entries(w, widths);
    return sum;
}

constexpr bool PICKED = QUERIES == 1 && is_quad(KEY_WIDTHS);  // levels of keys come from registers: that takes fewer of them
constexpr int KEY_PLACE = 64 * widest(KEY_WIDTHS), VALUE_PLACE = 64 * widest(VALUE_WIDTHS);  // words of a warp and block

constexpr int PIECES = 5;  // of 8: a warp's 32 outliers of a round may begin within one
struct alignas(16) List { uint16_t index[ROUNDS][8 * PIECES], value[ROUNDS][8 * PIECES]; };  // of a warp and chunk; longer ones are read where they are

struct alignas(16) Team {
    uint32_t keys[WARPS][2][KEY_PLACE], values[WARPS][2][VALUE_PLACE];  // words of both blocks of the next chunk
    alignas(16) float scores[2][WARPS][CHUNK][QUERIES];                        // a warp's shares, of two chunks
    alignas(16) uint16_t scaled[2][QUERIES][CHUNK + 8];                 // weights times scales of tokens
    alignas(16) float delta[WARPS][4][8];                               // by which columns are rotated from set to set
#if QUERIES < 4
    alignas(16) float column[WARPS][2][32][4];  // queries rotated back to the next set: where sets are long registers are dearer
#endif
    float raised[WARPS][QUERIES], shrink[QUERIES];
    int end[QUERIES];  // tokens of the page that a query sees
#if KEY_OUTLIERS
    alignas(16) uint32_t query[PAIRS][QUERIES];  // two fp16: rotated back to the part's first token
    int key_sums[2][QUERIES][CHUNK];
    uint32_t key_channel[D];  // level of code 0 in such units, whose last 8 bits are replaced: 128 for a second half, and the pair
    List key_list[WARPS];
#endif
#if VALUE_OUTLIERS
    int value_sums[2][QUERIES][D];
    alignas(16) uint32_t weights[2][CHUNK][(QUERIES + 1) / 2];  // two fp16
    float value_floor[D];
    uint32_t ranges[2][CHUNK];
    List value_list[WARPS];
#endif
};

struct Shared {  // an entry of 128 bytes has the levels of a byte for every lane, so that no two meet on a bank
    alignas(128) uint32_t keys[first_entry(5, KEY_WIDTHS) * 32];
    uint32_t values[first_entry(5, VALUE_WIDTHS) * 32];
    uint2 turns[PAIRS];
    Team team[TEAMS];
};

// A thread an entry; neighbours begin at different banks.
template <int WIDTHS> DEVICE void fill(uint32_t* table, const uint32_t* from, int thread, int threads) {
    constexpr int COUNT = first_entry(5, WIDTHS);
    for (int entry = thread; entry < COUNT; entry += threads) {
        const uint32_t a = from[is_quad(WIDTHS) ? 2 * entry : entry], b = is_quad(WIDTHS) ? from[2 * entry + 1] : a;
        UNROLL for (int i = 0; i < 8; i++) store4(table + 4 * (entry * 8 + ((i + entry) & 7)), a, b, a, b);
    }
}

template <int N> DEVICE void read_words(uint32_t* v, const void* from) {
    if (N == 1) v[0] = *(const uint32_t*)from;
    else if (N == 2) read2(v, from);
    else read4(v, from);
}

DEVICE void prefetch(const uint32_t* from, int words) {
    if (32 * thread_number() < words) prefetch_line(from + 32 * thread_number());
}

// Where a lane finds its copies of the entries of a width.
template <int WIDTHS> DEVICE uint32_t own_entries(const uint32_t* table, int width, int lane) {
    const uint32_t copy = is_quad(WIDTHS) ? 8 * (lane & 15) : 4 * lane;
    uint32_t first = 0;
    if (only(WIDTHS) < 0)
        UNROLL for (int w = 0; w < 5; w++) first = width == w ? first_entry(w, WIDTHS) : first;
    return shared_address(table) + 128 * first + copy;
}

// Of four levels, low and high bytes apart, those of eight codes in nibbles: two to a word.
DEVICE void pick(uint32_t* level, uint32_t codes, const uint32_t* levels) {
    UNROLL for (int h = 0; h < 2; h++) {
        const uint32_t which = codes >> (16 * h), low = permute(levels[0], 0, which), high = permute(levels[1], 0, which);
        level[2 * h] = permute(low, high, 0x5140), level[2 * h + 1] = permute(low, high, 0x7362);
    }
}

DEVICE uint32_t entry_of(uint32_t own, uint32_t word, int byte) { return dp4a(word, 0x80u << (8 * byte), own); }

template <int WIDTHS> DEVICE void read_group(uint32_t* w, const uint32_t* at, int width, int lane) {
    if (width == 4) read4(w, at + 4 * lane);
    else if (!(WIDTHS & 3) || width >= 2) {
        read2(w, at + 2 * lane);
        w[2] = width == 3 ? at[64 + lane] : 0;
    } else if (only(WIDTHS) != 0) w[0] = width ? at[lane] : 0, w[1] = w[2] = 0;
}

// The words of a lane and group as four words of nibbles; two words of four codes a byte are left.
template <int WIDTHS> DEVICE void expand(uint32_t* w, int width) {
    if (is_quad(WIDTHS) || width == 4) return;
    const uint32_t high = only(WIDTHS) == 3 ? 0xCCCCCCCCu : 0x44444444u;  // a table of its own does not mind the fourth bit
    const uint32_t a = w[0], b = w[1], c = w[2];
    if (only(WIDTHS) == 0) w[0] = w[1] = w[2] = w[3] = 0;
    else if ((WIDTHS & 2) && width == 1) {
        w[0] = a & 0x11111111u, w[1] = a >> 1 & 0x11111111u, w[2] = a >> 2 & 0x11111111u, w[3] = a >> 3 & 0x11111111u;
    } else {  // where there are no third bits, or none at all, they are 0
        w[0] = (a & 0x33333333u) | (c << 2 & high);
        w[1] = (a >> 2 & 0x33333333u) | (c << 1 & high);
        w[2] = (b & 0x33333333u) | (c & high);
        w[3] = (b >> 2 & 0x33333333u) | (c >> 1 & high);
    }
}

// Words of two channels, four codes of one of them to a byte, become words of tokens 0 to 7 and 8 to 15 with two codes of each: neighbours in registers, as a
// product wants its rows r and r + 8.
DEVICE void pair_rows(uint32_t* w) {
    const uint32_t a = w[0], b = w[1];
    w[0] = (a & 0x33333333u) | (b << 2 & 0xCCCCCCCCu), w[1] = (a >> 2 & 0x33333333u) | (b & 0xCCCCCCCCu);
}

DEVICE void turned(uint2 step, int tokens, float& c, float& s) {  // what comes before is as much of 2^32 tokens less
    const uint32_t turns = tokens * step.x + multiply_high(tokens, step.y) - (tokens < 0 ? step.y : 0);
    quick_cos_sin((float)(int)turns * TURN, c, s);
}

DEVICE void pair_of(int channel, int half, int& pair, bool& second) {  // as of phase.py
    second = channel >= half && (channel < 2 * half || channel >= PAIRS + half);
    pair = channel - (second ? (channel < 2 * half ? half : PAIRS) : channel < half ? 0 : half);
}

DEVICE float element(const void* at, int64_t i, bool half) {
    const uint16_t bits = ((const uint16_t*)at)[i];
    return half ? from_half(bits) : as_float((uint32_t)bits << 16);
}

struct Outlier { uint32_t index; uint16_t value; };

// What a thread knows of its team's item: part `split` of a page, for a tile of queries of one sequence and KV head.
struct Worker {
    const Params& P;
    Shared& S;
    Team& T;
    const int team, tid, warp, lane, row, c;
    int item, b, g, tile, split, stream, held, first, last, end_block, whole;  // whole: chunks before it are seen as they are
    int key_width[2], value_width[2];
    uint32_t key_own[2], value_own[2], key_levels[2];
    const uint32_t *key_at, *value_at, *ranges_at;  // words of the block to ask for next, and ranges of the chunk
    uint32_t factors[EIGHTS][2][6];   // of keys: scale and rotation of both halves, and zeros
    float output[2][4], highest[QUERIES], sum[QUERIES], zeros[QUERIES], extra[QUERIES];
    uint32_t operand[2][2];
    float column[8];  // queries rotated back to the next set
    int piece, key_ends, value_ends;  // of lists of outliers: where in one a lane's piece is, and where those of 32 chunks end, one to a lane

    DEVICE Worker(const Params& p, Shared& s, int t, int thread)
        : P(p), S(s), T(s.team[t]), team(t), tid(thread), warp(thread >> 5), lane(thread & 31), row((thread & 31) >> 2), c(thread & 3) {}

    DEVICE void wait() { barrier(team + 1, THREADS); }
    DEVICE const uint32_t* slot_of(const Side& side, int slot) { return side.slots + 4 * (g * D + slot); }
    // The warp's two groups, which lie side by side.
    template <int WIDTHS> DEVICE const uint32_t* begin_groups(const Side& side, const uint32_t* table, int* width, uint32_t* own) {
        const int number = g * (D / 16) + 2 * warp;
        const uint32_t width_of_all = only(WIDTHS);
        uint32_t group[4] = {32 * number * width_of_all, width_of_all, 0, width_of_all};
        if (only(WIDTHS) < 0) read4(group, side.groups + 2 * number);
        UNROLL for (int i = 0; i < 2; i++) width[i] = group[2 * i + 1], own[i] = own_entries<WIDTHS>(table, width[i], lane);
        return side.words + (int64_t)b * P.blocks * side.block_words + group[0] + 4 * lane;
    }
    // Words of a block, 16 bytes a lane, set out for their place.
    DEVICE void ask(const Side& side, const uint32_t*& from, const int* width, int block, uint32_t* place) {
        const int pieces = block < end_block ? 8 * (width[0] + width[1]) : 0;
        copy16_if(lane < pieces, place + 4 * lane, from);
        if (widest(KEY_WIDTHS | VALUE_WIDTHS) > 2) copy16_if(lane + 32 < pieces, place + 4 * lane + 128, from + 128);
        end_of_copies();
        from += side.block_words;
    }
    // Words of the block that was asked for longest ago, and then others for its place.
    template <int WIDTHS> DEVICE void take(uint32_t* w, const Side& side, const uint32_t*& from, const int* width, int block, uint32_t* place) {
        wait_for_copies<3>();
        barrier_of_warp();
        read_group<WIDTHS>(w, place, width[0], lane), read_group<WIDTHS>(w + 4, place + 32 * width[0], width[1], lane);
        barrier_of_warp();
        ask(side, from, width, block, place);
        expand<WIDTHS>(w, width[0]), expand<WIDTHS>(w + 4, width[1]);
    }
    // Where a query lies, and how many tokens it comes after the page's first; the first one stands in for one that there is not.
    DEVICE void find(int number, int64_t& at, int& place) {
        number = number < P.new_tokens * P.group ? number : 0;
        const int token = quick_quotient(number, P.group), member = number - token * P.group;
        at = b * P.query_b + (g * P.group + member) * P.query_h + token * P.query_s;
        place = (int)(P.positions[b * P.new_tokens + token] - P.origins[b] - P.shift);
    }
    // A pair of the query there, rotated to the token that it is `tokens` after.
    DEVICE void rotated(int64_t at, int p, int tokens, float& x, float& y) {
        const int first_half = p < P.rotary_half ? p : p + P.rotary_half, second_half = p < P.rotary_half ? p + P.rotary_half : p + PAIRS;
        const float scale = P.factor[p] * P.scaling, a = scale * element(P.query, at + first_half, !BFLOAT), d = scale * element(P.query, at + second_half, !BFLOAT);
        float co, si;
        turned(P.steps[p], tokens, co, si);
        x = a * co - d * si, y = d * co + a * si;
    }

    DEVICE void locate() {  // anew wherever it is rare, so that it takes no registers meanwhile
        const int rest = quick_quotient(item, P.splits);
        split = item - rest * P.splits, stream = quick_quotient(rest, P.tiles), tile = rest - stream * P.tiles;
        b = quick_quotient(stream, P.heads), g = stream - b * P.heads;
    }

    // What no kernel just before this one changes, so that it need not be waited for.
    DEVICE void prepare(int number) {
        item = number;
        locate();
        uint32_t slots[4][2][4];  // asked for before anything is waited for
        UNROLL for (int n = 0; n < 4; n++) read4(slots[n][0], slot_of(P.key, slot_of_column(n))), read4(slots[n][1], slot_of(P.key, slot_of_column(n) + 16));
        key_at = begin_groups<KEY_WIDTHS>(P.key, S.keys, key_width, key_own), value_at = begin_groups<VALUE_WIDTHS>(P.value, S.values, value_width, value_own);
        begin_keys(slots);
        if (PICKED) {
            const uint32_t *level = P.key.entries, one = permute(level[0], level[2], 0x5410), two = permute(level[4], level[6], 0x5410);
            key_levels[0] = permute(one, two, 0x6420), key_levels[1] = permute(one, two, 0x7531);
        }
#if KEY_OUTLIERS
        uint32_t key_slot[4];
        int p;
        bool second;
        read4(key_slot, slot_of(P.key, tid)), pair_of(key_slot[3], P.rotary_half, p, second);
        T.key_channel[key_slot[3]] = (as_bits(KEY_UNIT * as_float(key_slot[2])) & ~0xFFu) | p | (second ? 128 : 0);
        for (int i = tid; i < 2 * CHUNK * QUERIES; i += THREADS) T.key_sums[0][0][i] = 0;
#endif
#if VALUE_OUTLIERS
        uint32_t value_slot[4];
        read4(value_slot, slot_of(P.value, tid)), T.value_floor[value_slot[3]] = as_float(value_slot[2]);
        for (int i = tid; i < 2 * QUERIES * D; i += THREADS) T.value_sums[0][0][i] = 0;
#endif
    }
    DEVICE void begin() {
        const int64_t stored = P.limits[b] - P.origins[b] - P.shift;
        held = stored < 0 ? 0 : stored < P.tokens ? (int)stored : P.tokens;
        const int chunks = (held + CHUNK - 1) / CHUNK, per = quick_quotient(chunks, P.splits), longer = chunks - per * P.splits;
        first = split * per + min(split, longer), last = first + per + (split < longer), end_block = min(2 * last, (held + 63) / 64);
        ranges_at = P.value.ranges + (int64_t)b * P.blocks * 64 + (first - 1) * CHUNK;
        begin_lists();
        key_at += (int64_t)2 * first * P.key.block_words, value_at += (int64_t)2 * first * P.value.block_words;
        UNROLL for (int i = 0; i < 2; i++) ask(P.key, key_at, key_width, 2 * first + i, T.keys[warp][i]);
        begin_outliers();  // whose copies come with the next ones
        UNROLL for (int i = 0; i < 2; i++) ask(P.value, value_at, value_width, 2 * first + i, T.values[warp][i]);
        UNROLL for (int i = 0; i < 8; i++) output[i / 4][i % 4] = 0;
        UNROLL for (int q = 0; q < QUERIES; q++) highest[q] = HIDDEN, sum[q] = zeros[q] = extra[q] = 0;
        const int place = anchor(first);
        if (warp == 0 && c == 0 && row < QUERIES) T.end[row] = max(min(place + 1, held), 0);
        wait();
        whole = held;
        UNROLL for (int q = 0; q < QUERIES; q++) whole = min(whole, T.end[q]);
        whole /= CHUNK;
    }

    // Of a pair of channels with levels l, zeros z and rotation by the token's place in its stretch:
    //   a' = l_a (cos scale_a) - l_b (sin scale_b) + (cos z_a - sin z_b)      b' = l_b (cos scale_b) + l_a (sin scale_a) + (cos z_b + sin z_a)
    DEVICE void begin_keys(const uint32_t (*slots)[2][4]) {
        float scale[4][2], zero[4][2];
        int pair[4];
        UNROLL for (int n = 0; n < 4; n++) pair[n] = pair_of_first(slots[n][0][3]);
        UNROLL for (int n = 0; n < 4; n++)
            UNROLL for (int i = 0; i < 2; i++) scale[n][i] = as_float(slots[n][i][0]), zero[n][i] = as_float(slots[n][i][1]);
        UNROLL for (int n = 0; n < 4; n++) {
            float co, si;
            turned(P.steps[pair[n]], SET, co, si);
            if (row == 0) T.delta[warp][c][2 * n] = co, T.delta[warp][c][2 * n + 1] = si;
        }
        UNROLL for (int v = 0; v < EIGHTS; v++)
            UNROLL for (int h = 0; h < 2; h++) {
                float f[6][2];
                UNROLL for (int e = 0; e < 2; e++) {
                    const int n = 2 * h + e;
                    const float co = P.turn[pair[n] * 64 + 8 * v + row], si = P.turn[(PAIRS + pair[n]) * 64 + 8 * v + row];
                    f[0][e] = co * scale[n][0], f[1][e] = -si * scale[n][1], f[2][e] = co * scale[n][1], f[3][e] = si * scale[n][0];
                    f[4][e] = co * zero[n][0] - si * zero[n][1], f[5][e] = co * zero[n][1] + si * zero[n][0];
                }
                UNROLL for (int i = 0; i < 6; i++) factors[v][h][i] = halves(f[i][0], f[i][1]);
            }
    }

    // Of a lane's four columns of an operand: the slot of the first half of their pair, and the pair.
    DEVICE int slot_of_column(int n) { return 32 * warp + 2 * c + (n & 1) + 8 * (n >> 1); }
    DEVICE int pair_of_first(int channel) { return channel < P.rotary_half ? channel : channel - P.rotary_half; }

    DEVICE int anchor(int chunk) {
        int64_t at;
        int pair[4], place;
        UNROLL for (int n = 0; n < 4; n++) pair[n] = pair_of_first(slot_of(P.key, slot_of_column(n))[3]);
        find(tile * QUERIES + row % QUERIES, at, place);
        UNROLL for (int n = 0; n < 4; n++) rotated(at, pair[n], place - chunk * CHUNK - row / QUERIES * STRETCH, column[2 * n], column[2 * n + 1]);
        park();
        return place;
    }
    DEVICE void anchor_again(int chunk) {
        locate();
        anchor(chunk);
    }
    DEVICE void park() {
#if QUERIES < 4
        UNROLL for (int i = 0; i < 2; i++) store4(T.column[warp][i][lane], column[4 * i], column[4 * i + 1], column[4 * i + 2], column[4 * i + 3]);
#endif
    }

    // The columns as an operand, and on to those of the next set of tokens.
    DEVICE void next_columns() {
#if QUERIES < 4
        uint32_t parked[8];
        UNROLL for (int i = 0; i < 2; i++) read4(parked + 4 * i, T.column[warp][i][lane]);
        UNROLL for (int i = 0; i < 8; i++) column[i] = as_float(parked[i]);
#endif
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int h = 0; h < 2; h++) operand[h][i] = halves(column[4 * i + h], column[4 * i + 2 + h]);
        UNROLL for (int n = 0; n < 4; n++) {
            const float co = T.delta[warp][c][2 * n], si = T.delta[warp][c][2 * n + 1], x = column[2 * n], y = column[2 * n + 1];
            column[2 * n] = x * co + y * si, column[2 * n + 1] = y * co - x * si;
        }
        park();
    }

    DEVICE void score_chunk(int chunk) {
        float kept[QUERIES > 1 ? STRETCH / 4 : 4] = {};  // scores wait for the others of their set: before a store of scores is done no table is read
        if (chunk > first && (chunk - first) % ANCHOR == 0) anchor_again(chunk);
        UNROLL for (int block = 0; block < 2; block++) {
            uint32_t w[8], level[2][2][4];  // first and second halves, of two tiles of 16 tokens
            take<KEY_WIDTHS>(w, P.key, key_at, key_width, 2 * chunk + 2 + block, T.keys[warp][block]);
            UNROLL for (int u = 0; u < 4; u++) {
                const int t16 = 4 * block + u;  // of the chunk
                if (PICKED) UNROLL for (int h = 0; h < 2; h++) pick(level[u & 1][h], w[4 * h + u / 2] >> (2 * (u & 1)) & 0x33333333u, key_levels);
                else UNROLL for (int i = 0; i < 4; i++)
                    UNROLL for (int h = 0; h < 2; h++) {
                        if (!is_quad(KEY_WIDTHS)) level[u & 1][h][i] = shared1(entry_of(key_own[h], w[4 * h + u], i));
                        else if (u % 2 == 0) shared2(entry_of(key_own[h], w[4 * h + u / 2], i), level[0][h][i], level[1][h][i]);
                    }
                if (t16 * 16 % SET == 0) next_columns();  // behind the look-up: its operand need not wait meanwhile
                score_tile(t16, level[u & 1], T.scores[chunk & 1][warp][0], kept);
            }
        }
    }

    DEVICE void score_tile(int t16, uint32_t (*level)[4], float* to, float* kept) {
        uint32_t one[4], two[4];
        UNROLL for (int i = 0; i < 4; i++) {  // token half i / 2, channel half i % 2
            const uint32_t* f = factors[(2 * t16 + i / 2) % EIGHTS][i % 2];
            const int to = 2 * (i % 2) + i / 2;
            one[to] = fma2(level[1][i], f[1], fma2(level[0][i], f[0], f[4]));
            two[to] = fma2(level[0][i], f[3], fma2(level[1][i], f[2], f[5]));
        }
        float d[4] = {0, 0, 0, 0};
        multiply(d, one, operand[0][0], operand[0][1]);
        multiply(d, two, operand[1][0], operand[1][1]);
        const int stretch = t16 * 16 % SET / STRETCH;  // whose columns count
        if (QUERIES == 1) {  // a lane has those of 32 tokens of the chunk, which are four neighbouring places
            UNROLL for (int i = 0; i < 2; i++) {  // rows r and r + 8: of one stretch, or of two
                float& one = kept[SHORT ? t16 / 4 * 2 + i : 2 * (stretch % 2) + i];
                one = c == stretch / 2 ? d[SHORT ? 3 * i : 2 * i + stretch % 2] : one;
            }
            if (t16 == 7) store4(to + 4 * lane, kept[0], kept[1], kept[2], kept[3]);
        } else {
            const int n = t16 * 16 % STRETCH / 4, next = 16 * t16 + 16;
            UNROLL for (int i = 0; i < 4; i++) kept[n + i] = 2 * c / QUERIES == stretch ? d[i] : kept[n + i];
            if (next % SET) return;
            to += (next - SET + 2 * c / QUERIES * STRETCH + row) * QUERIES + query_at(2 * c % QUERIES, row);
            UNROLL for (int i = 0; i < STRETCH / 8; i++) store2(to + 8 * i * QUERIES, kept[2 * i], kept[2 * i + 1]);
        }
    }
    // Where in a place's row a query's score is: of eight, halves change places so that neighbours' are on other banks.
    DEVICE int query_at(int q, int place) { return QUERIES == 8 ? q ^ (place & 4) : q; }
    // The token of the chunk whose score is at a place.
    DEVICE int token_at(int place) {
        const int r = place / 16, column = place / 4 % 4, kept = place % 4;
        return QUERIES > 1 ? place : SHORT ? 64 * (kept / 2) + 16 * column + 8 * (kept % 2) + r : 32 * column + 8 * kept + r;
    }

    // Where the weight of a token lies: as products want them, which with four codes to a byte take tokens 2 k, 2 k + 1, 8 + 2 k and 9 + 2 k at once.
    DEVICE int weight_at(int t) { return is_quad(VALUE_WIDTHS) ? (t & ~14) | (t << 1 & 12) | (t >> 2 & 2) : t; }

    DEVICE void weigh(int chunk, float score, int q, int t, uint32_t range, float& p) {
        p = exp2_of(score - highest[q] + LIFT);
        T.scaled[chunk & 1][q][weight_at(t)] = to_half(DYNAMIC ? p * from_half(range & 0xFFFF) : p);
    }
    DEVICE void keep_weights(int chunk, int t, const float* p) {
#if VALUE_OUTLIERS
        UNROLL for (int q = 0; q < QUERIES; q += 2) T.weights[chunk & 1][t][q / 2] = halves(p[q], q + 1 < QUERIES ? p[q + 1] : 0);
#endif
    }

    // Weights by the largest scores so far; whether one exceeds them by far.
    DEVICE bool softmax(int chunk, const uint32_t* range, float (*score)[QUERIES], float (*p)[QUERIES]) {
        bool over = false;
        UNROLL for (int i = 0; i < EACH; i++) {
            const int place = tid + i * THREADS, t = token_at(place);
            if (place >= CHUNK) continue;
            uint32_t share[WARPS][QUERIES];  // a whole row a load: lanes that read a word of theirs each would meet on banks
            UNROLL for (int w = 0; w < WARPS; w++)
                UNROLL for (int q = 0; q < QUERIES; q += 4) read_words<QUERIES < 4 ? QUERIES : 4>(share[w] + q, &T.scores[chunk & 1][w][place][query_at(q, place)]);
            UNROLL for (int q = 0; q < QUERIES; q++) {
                float s = as_float(share[0][q]);
                UNROLL for (int w = 1; w < WARPS; w++) s += as_float(share[w][q]);
#if KEY_OUTLIERS
                s += T.key_sums[chunk & 1][q][t] * (1 / KEY_UNIT), T.key_sums[chunk & 1][q][t] = 0;
#endif
                if (chunk >= whole && chunk * CHUNK + t >= T.end[q]) s = -infinity();
                score[i][q] = s;
                over |= s > highest[q] + SLACK;
            }
            UNROLL for (int q = 0; q < QUERIES; q++) weigh(chunk, score[i][q], q, t, range[i], p[i][q]);  // stores, which loads would wait for
            keep_weights(chunk, t, p[i]);
#if VALUE_OUTLIERS
            T.ranges[chunk & 1][t] = range[i];
#endif
        }
        return over;
    }

    // The largest scores become those of this chunk, too; what was summed before shrinks.
    DEVICE void rescale(float (*score)[QUERIES]) {
        UNROLL for (int q = 0; q < QUERIES; q++) {
            float x = HIDDEN;
            UNROLL for (int i = 0; i < EACH; i++)
                if (tid + i * THREADS < CHUNK) x = maximum(x, score[i][q]);
            UNROLL for (int k = 16; k; k >>= 1) x = maximum(x, shuffle_xor(x, k));
            if (lane == 0) T.raised[warp][q] = x;
        }
        wait();
        UNROLL for (int q = 0; q < QUERIES; q++) {
            float x = highest[q];
            UNROLL for (int w = 0; w < WARPS; w++) x = maximum(x, T.raised[w][q]);
            const float f = exp2_of(highest[q] - x);
            highest[q] = x, sum[q] *= f, zeros[q] *= f, extra[q] *= f;
            if (tid == 0) T.shrink[q] = f;
        }
        wait();
        const float f = T.shrink[2 * c % QUERIES], e = T.shrink[(2 * c + 1) % QUERIES];
        UNROLL for (int t = 0; t < 2; t++) output[t][0] *= f, output[t][1] *= e, output[t][2] *= f, output[t][3] *= e;
    }

    DEVICE void add_values(int chunk) {
        UNROLL for (int block = 0; block < 2; block++) {
            uint32_t w[8], weight[8];
            take<VALUE_WIDTHS>(w, P.value, value_at, value_width, 2 * chunk + 2 + block, T.values[warp][block]);
            const uint16_t* at = &T.scaled[chunk & 1][row % QUERIES][64 * block + 16 * c];
            read4_if(row < QUERIES, weight, at), read4_if(row < QUERIES, weight + 4, at + 8);  // other columns may be anything
            UNROLL for (int t = 0; t < 2; t++) {
                uint32_t* words = w + 4 * t;
                if (is_quad(VALUE_WIDTHS)) pair_rows(words);
                UNROLL for (int k = 0; k < 4; k++) {
                    const uint32_t own = value_own[t];
                    uint32_t a[4];
                    if (is_quad(VALUE_WIDTHS)) {
                        shared2(entry_of(own, words[0], k), a[0], a[1]), shared2(entry_of(own, words[1], k), a[2], a[3]);
                    } else {
                        UNROLL for (int i = 0; i < 4; i++) a[i] = shared1(entry_of(own, words[2 * (i & 1) + (k >> 1)], 2 * (k & 1) + (i >> 1)));
                    }
                    multiply(output[t], a, weight[2 * k], weight[2 * k + 1]);
                }
            }
        }
    }

    // Where lists end, at the last block of a chunk that exists: of the chunk before, this one and 30 more, one to a lane.
    DEVICE int ends_from(const Side& side, int chunk) {
        const int n = chunk - 1 + lane;
        return n < 0 ? side.starts[stream] : side.ends[(int64_t)stream * P.blocks + max(min(2 * n + 1, (held + 63) / 64 - 1), 0)];
    }
    // A warp copies what it will read: of each round of the team 32 outliers.
    DEVICE void ask_list(const Side& side, int at, int end, int share, List& list) {
        const uint16_t* from = lane < ROUNDS * PIECES ? side.index : side.value;
        at = (at & ~7) + piece + 32 * share;
        copy16_if(lane < 2 * ROUNDS * PIECES && at < end, (uint32_t*)&list + 4 * lane, (const uint32_t*)(from + at));
    }
    // Outliers of a chunk, and copies of the next one's.
    template <class Add> DEVICE void add_list(const Side& side, int& ends, int chunk, int share, List& list, Add add) {
        const int n = (uint32_t)(chunk - first) % 16, at = shuffle(ends, n), end = shuffle(ends, n + 1), later = shuffle(ends, n + 2);
        wait_for_copies<3>();
        barrier_of_warp();
        const uint16_t* copied = &list.index[0][(at & 7) + lane];
        const int copied_end = min(end, at + ROUNDS * THREADS);
        int i = at + 32 * share + lane;
        ROLLED for (; i < copied_end; i += THREADS, copied += 8 * PIECES) add(Outlier{copied[0], copied[ROUNDS * 8 * PIECES]});
        ROLLED for (; i < end; i += THREADS) add(Outlier{side.index[i], side.value[i]});
        barrier_of_warp();
        ask_list(side, end, chunk + 1 < last ? later : end, share, list);
        if (n == 15) ends = ends_from(side, chunk + 1);
    }
    DEVICE int channel_of(Outlier outlier) { return outlier.index % D; }
    DEVICE int token_of(Outlier outlier) { return outlier.index / D % CHUNK; }

    DEVICE void begin_lists() {  // asked for early, since where they end is waited for
        const int n = lane % (ROUNDS * PIECES);
        piece = n / PIECES * THREADS + n % PIECES * 8;
#if KEY_OUTLIERS
        key_ends = ends_from(P.key, first);
#endif
#if VALUE_OUTLIERS
        value_ends = ends_from(P.value, first);
#endif
    }
    DEVICE void begin_outliers() {
#if VALUE_OUTLIERS  // what is left over falls to other warps than of keys
        ask_list(P.value, shuffle(value_ends, 0), shuffle(value_ends, 1), WARPS - 1 - warp, T.value_list[warp]);
#endif
#if KEY_OUTLIERS
        ask_list(P.key, shuffle(key_ends, 0), shuffle(key_ends, 1), warp, T.key_list[warp]);
        int64_t at;
        int place;
        find(tile * QUERIES + tid % QUERIES, at, place);
        for (int i = tid; i < PAIRS * QUERIES; i += THREADS) {
            float x, y;
            rotated(at, i / QUERIES, place - first * CHUNK, x, y);
            T.query[i / QUERIES][i % QUERIES] = halves(x, y);
        }
#endif
    }

#if KEY_OUTLIERS
    DEVICE void add_key(Outlier outlier, int chunk) {
        const int t = token_of(outlier);
        const uint32_t channel = T.key_channel[channel_of(outlier)];
        const float exceeds = KEY_UNIT * from_half(outlier.value) - as_float(channel);
        const uint32_t tokens = (chunk - first) * CHUNK + t, p = channel % 128;
        const uint2 step = S.turns[p];
        float co, si;  // the second half of a pair stands a quarter of a turn ahead
        quick_cos_sin((float)(int)(tokens * step.x + multiply_high(tokens, step.y) + (channel << 23 & QUARTER)) * TURN, co, si);
        co *= exceeds, si *= exceeds;
        uint32_t query[QUERIES];
        if (QUERIES % 4 == 0)
            UNROLL for (int q = 0; q < QUERIES; q += 4) read4(query + q, &T.query[p][q]);
        else
            UNROLL for (int q = 0; q < QUERIES; q++) query[q] = T.query[p][q];
        UNROLL for (int q = 0; q < QUERIES; q++)
            add_shared(&T.key_sums[chunk & 1][q][t], round_int(from_half(query[q] & 0xFFFF) * co + from_half(query[q] >> 16) * si));
    }
#endif
#if VALUE_OUTLIERS
    DEVICE void add_value(Outlier outlier, int chunk) {
        const int channel = channel_of(outlier), t = token_of(outlier);
        const uint32_t range = T.ranges[chunk & 1][t];
        const float coded = DYNAMIC ? P.value.lowest * from_half(range & 0xFFFF) + from_half(range >> 16) : T.value_floor[channel];
        const float exceeds = VALUE_UNIT * (from_half(outlier.value) - coded);
        uint32_t weight[(QUERIES + 1) / 2];
        read_words<(QUERIES + 1) / 2>(weight, T.weights[chunk & 1][t]);
        UNROLL for (int q = 0; q < QUERIES; q++) add_shared(&T.value_sums[chunk & 1][q][channel], round_int(from_half(weight[q / 2] >> 16 * (q % 2) & 0xFFFF) * exceeds));
    }
#endif

    // Softmax of a chunk, scores of the next one, values of the one before.
    DEVICE void step(int chunk) {
        const bool here = first <= chunk && chunk < last;
        uint32_t range[EACH];
        UNROLL for (int i = 0; i < EACH; i++) {
            const int place = tid + i * THREADS, t = token_at(place);
            range[i] = DYNAMIC && here && place < CHUNK && chunk * CHUNK + t < held ? load1(ranges_at + t) : 0;
        }
        ranges_at += CHUNK;
        if (chunk + 1 < last) {
            score_chunk(chunk + 1);
#if KEY_OUTLIERS
            add_list(P.key, key_ends, chunk + 1, warp, T.key_list[warp], [&](Outlier outlier) { add_key(outlier, chunk + 1); });
#endif
        } else end_of_copies(), end_of_copies();
        if (first < chunk) {
            add_values(chunk - 1);
#if VALUE_OUTLIERS
            add_list(P.value, value_ends, chunk - 1, WARPS - 1 - warp, T.value_list[warp], [&](Outlier outlier) { add_value(outlier, chunk - 1); });
#endif
        } else end_of_copies(), end_of_copies();
        float score[EACH][QUERIES], p[EACH][QUERIES];
        const bool over = barrier_any(team + 1, THREADS, here && softmax(chunk, range, score, p));
#if VALUE_OUTLIERS
        if (first < chunk) {
            UNROLL for (int q = 0; q < QUERIES; q++) {
                int& added = T.value_sums[~chunk & 1][q][tid];
                extra[q] += added * (1 / VALUE_UNIT), added = 0;
            }
        }
#endif
        if (!here) return;
        if (over) {
            rescale(score);
            UNROLL for (int i = 0; i < EACH; i++) {
                const int place = tid + i * THREADS, t = token_at(place);
                if (place >= CHUNK) continue;
                UNROLL for (int q = 0; q < QUERIES; q++) weigh(chunk, score[i][q], q, t, range[i], p[i][q]);
                keep_weights(chunk, t, p[i]);
            }
            wait();
        }
        UNROLL for (int i = 0; i < EACH; i++)
            UNROLL for (int q = 0; q < QUERIES; q++)
                if (tid + i * THREADS < CHUNK) {
                    sum[q] += p[i][q];
                    if (DYNAMIC) zeros[q] += p[i][q] * from_half(range[i] >> 16);
                }
    }

    DEVICE void finish() {
        locate();
        uint32_t slot[4];  // of the lane's outputs and of the thread
        UNROLL for (int q = 0; q < QUERIES; q++) {
            UNROLL for (int k = 16; k; k >>= 1) sum[q] += shuffle_xor(sum[q], k), zeros[q] += shuffle_xor(zeros[q], k);
        }
        wait();
        float(&shares)[WARPS][CHUNK][QUERIES] = T.scores[0];
        if (lane == 0) {
            UNROLL for (int q = 0; q < QUERIES; q++) shares[warp][0][q] = sum[q], shares[warp][1][q] = zeros[q], shares[warp][2][q] = highest[q];
        }
        wait();
        const int64_t at = ((int64_t)(P.first_part + split) * P.rows + stream * P.tiles + tile) * QUERIES;
        if (tid < QUERIES) {
            float total = 0, zero = 0;
            UNROLL for (int w = 0; w < WARPS; w++) total += shares[w][0][tid], zero += shares[w][1][tid];
            float* to = P.state + 4 * (at + tid);
            to[0] = shares[0][2][tid], to[1] = total, to[2] = zero;
        }
        UNROLL for (int i = 0; i < 8; i++) {  // group i / 4, row i / 2 % 2 * 8
            const int q = 2 * c + i % 2, number = 32 * warp + 16 * (i / 4) + 8 * (i / 2 % 2) + row;
            if (!DYNAMIC && i % 2 == 0) read4(slot, slot_of(P.value, number));
            if (q < QUERIES) P.outputs[(at + q) * D + number] = output[i / 4][i % 4] * (DYNAMIC ? 1 : as_float(slot[0]));
        }
        wait();
#if VALUE_OUTLIERS
        float* extras = T.scores[0][0][0];  // by channel
        UNROLL for (int q = 0; q < QUERIES; q++) extras[q * D + tid] = extra[q];
        read4(slot, slot_of(P.value, tid));
        wait();
        UNROLL for (int q = 0; q < QUERIES; q++) P.outputs[(at + q) * D + tid] += extras[q * D + slot[3]];
        wait();
#endif
    }
};

KERNEL_OF(REGISTERS) attend(const GRID_CONSTANT Params P) {
    Shared& S = *(Shared*)SHARED_MEMORY;
    prefetch(P.key.entries, first_entry(5, KEY_WIDTHS) * (is_quad(KEY_WIDTHS) ? 2 : 1));
    prefetch(P.value.entries, first_entry(5, VALUE_WIDTHS) * (is_quad(VALUE_WIDTHS) ? 2 : 1));
    const int threads = threads_in_block(), teams = threads / THREADS, team = thread_number() / THREADS;  // TEAMS at most
    Worker worker(P, S, team, thread_number() % THREADS);
    int item = team * blocks_in_grid() + block_number();
    if (item < P.items) worker.prepare(item);
    if (!PICKED) fill<KEY_WIDTHS>(S.keys, P.key.entries, thread_number(), threads);
    fill<VALUE_WIDTHS>(S.values, P.value.entries, thread_number(), threads);
    for (int i = thread_number(); i < PAIRS; i += threads) S.turns[i] = P.steps[i];
    barrier_of_block();
    wait_for_prerequisites();
    launch_dependents();  // not before: `combine` reads what kernels before this one have written
    while (item < P.items) {
        worker.begin();
        for (int chunk = worker.first - 1; chunk <= worker.last; chunk++) worker.step(chunk);
        worker.finish();
        item += teams * blocks_in_grid();
        if (item < P.items) worker.prepare(item);
    }
}

#include "combine.h"

GLOBAL sizes(int* out) { out[0] = sizeof(Shared), out[1] = sizeof(Params); }
