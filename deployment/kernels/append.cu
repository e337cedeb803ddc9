// Storing new tokens as `Quantizer.encode` says, with error feedback (quant/feedback.py) or without, bit for bit: every product and every sum is rounded on
// its own.
//
// `append_token` stores one token per sequence, all there is to it. A block has one side (keys or values) of one KV head; what a token's own range and
// outliers take, all channels of the token, every block of the sequence looks at for itself. With feedback its first warp then goes through the channels in
// the head's order: lane l has D / 32 of them that follow each other, targets and levels in registers, and when its turn has come hands their errors to all
// lanes. What a division would say is compared with, not divided: `edge` is the largest number whose quotient does not exceed a boundary.
//
// `feed_back` finds the codes of a chunk with feedback, between encode.py and store.py. A block has 64 tokens of a head, two to a lane, all of them in each of
// its warps, which take turns with 8 channels: one finds their codes, and all hand the errors on to their own channels, in registers.
//
// Compiled for HEAD_DIM, HEADS, X_HEADS, the largest number of heads of x, LEVELS, the largest number of levels of a channel, ELEMENT of x: 0 fp16, 1 bf16, 2 fp32, and FED, whether a side has feedback.
// Without __CUDACC__ lanes are fibers (tests/lanes.h).
#ifdef __CUDACC__
#include "ptx.h"
#define KERNELS_TOGETHER(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
DEVICE uint32_t ballot(bool p) { return __ballot_sync(~0u, p); }
DEVICE uint32_t or_of_warp(uint32_t x) { return __reduce_or_sync(~0u, x); }
DEVICE uint32_t sum_of_warp(uint32_t x) { return __reduce_add_sync(~0u, x); }
DEVICE uint32_t max_of_warp(uint32_t x) { return __reduce_max_sync(~0u, x); }
DEVICE int ones_of(uint32_t x) { return __popc(x); }
DEVICE void flip(uint32_t* p, uint32_t bits) { atomicXor(p, bits); }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
// 16 bytes to shared memory, there once they are waited for
DEVICE void copy_later(void* to, const void* from) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address(to)), "l"(from) : "memory"); }
DEVICE void wait_for_copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
DEVICE float difference(float a, float b) { return __fsub_rn(a, b); }
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
#else
#include "lanes.h"
#define KERNELS_TOGETHER(threads, blocks) KERNEL(threads)
template <class T, class F> T over_warp(T x, F f) {
    T all[32];
    lanes::gather(x, all);
    for (int i = 1; i < 32; i++) all[0] = f(all[0], all[i]);
    return all[0];
}
DEVICE uint32_t or_of_warp(uint32_t x) { return over_warp(x, [](uint32_t a, uint32_t b) { return a | b; }); }
DEVICE uint32_t sum_of_warp(uint32_t x) { return over_warp(x, [](uint32_t a, uint32_t b) { return a + b; }); }
DEVICE uint32_t max_of_warp(uint32_t x) { return over_warp(x, [](uint32_t a, uint32_t b) { return max(a, b); }); }
DEVICE uint32_t ballot(bool p) { return or_of_warp((uint32_t)p << lanes::now % 32); }
DEVICE int ones_of(uint32_t x) { return __builtin_popcount(x); }
DEVICE void flip(uint32_t* p, uint32_t bits) { *p ^= bits; }
DEVICE uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
DEVICE void copy_later(void* to, const void* from) { read4((uint32_t*)to, from); }
DEVICE void wait_for_copied() {}
DEVICE float sum(float a, float b) { return a + b; }
DEVICE float difference(float a, float b) { return a - b; }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float quotient(float a, float b) { return a / b; }
#endif

struct Side {  // keys, or values; tensors as in encode.py and store.py; no matrix and no order without feedback
    const void* x;
    uint16_t *sinks, *scales, *index, *value, *codes, *targets;
    uint32_t* words;
    const uint16_t *ranges, *matrix;
    const int* starts;
    int* ends;
    const float *scale, *zero, *levels, *boundaries;
    const int *width, *first_level, *first_boundary, *offset, *slot, *order;
    int64_t stride_b, stride_g, stride_s, block_words, places;
    int dynamic, outliers, per_end, source, span, all_levels, all_boundaries;
    int channels, first_head;  // of x, which may have heads that are stored elsewhere, and its first that is stored here
};
struct Params {
    Side side[2];
    const int64_t *stored, *padding;
    int* overflow;
    int64_t page_start, blocks, streams, sinks, tokens;
};

constexpr int D = HEAD_DIM, CHANNELS = HEADS * D, MOST_CHANNELS = X_HEADS * D, THREADS = 256, WARPS = THREADS / 32, PER = D / 32, MOST_LEVELS = 128, WIDTHS = 7;
constexpr float TINY = 1.17549435e-38f;
constexpr uint16_t OUTLIER = 256;  // what encode.py writes for the code of one

DEVICE uint32_t raw_of(const void* x, int64_t at) { return ELEMENT == 2 ? ((const uint32_t*)x)[at] : ((const uint16_t*)x)[at]; }
DEVICE float number_of(uint32_t raw) { return ELEMENT == 0 ? from_half((uint16_t)raw) : as_float(ELEMENT == 1 ? raw << 16 : raw); }
DEVICE uint16_t stored_as(float x) { return to_half(maximum(-65504.f, -maximum(-65504.f, -x))); }
DEVICE float as_stored(float x) { return from_half(stored_as(x)); }

constexpr bool TABLES = FED && LEVELS <= 16 && PER <= 4;  // whether a lane can hold the levels of its channels
struct Shared {
    uint16_t matrix[FED ? D * D : 8];                                   // in order, as is all else but for masks and `place`
    float edge[TABLES ? D * LEVELS : 4], value[TABLES ? D * LEVELS : 4];  // [LEVELS, D]; if ranges are the token's only the first of D
    float levels[MOST_LEVELS], boundaries[MOST_LEVELS];
    float x[D], s[D], z[D], target[D];
    int code[D];
    uint32_t outlier[PER], tied[2][PER], part[2][WARPS];  // masks by channel
    uint8_t order[D], place[D], width[D], level[D], boundary[D];  // where the channel's levels begin, and its boundaries; `place` is the inverse of the order
};

// ---- one token

// f of what all warps have, of which `mine` is one's.
template <class F> DEVICE uint32_t over_warps(Shared& sh, uint32_t mine, int turn, F f) {
    if (thread_number() % 32 == 0) sh.part[turn & 1][thread_number() / 32] = mine;
    barrier_of_block();
    uint32_t all = 0;
    for (int w = 0; w < WARPS; w++) all = f(all, sh.part[turn & 1][w]);
    return all;
}
DEVICE uint32_t sum_of_block(Shared& sh, uint32_t x, int turn) {
    return over_warps(sh, sum_of_warp(x), turn, [](uint32_t a, uint32_t b) { return a + b; });
}
DEVICE uint32_t max_of_block(Shared& sh, uint32_t x, int turn) {
    return over_warps(sh, max_of_warp(x), turn, [](uint32_t a, uint32_t b) { return max(a, b); });
}

// Integers that sort as numbers do, see encode.py.
constexpr uint32_t SIGN = ELEMENT == 2 ? 0x80000000u : 0x8000u, ONES = SIGN | (SIGN - 1);
DEVICE uint32_t sort_key(uint32_t raw) {
    if (!(raw & ~SIGN)) raw = 0;
    return raw & SIGN ? ~raw & ONES : raw | SIGN;
}
DEVICE float of_sort_key(uint32_t key) { return number_of(key & SIGN ? key ^ SIGN : ~key & ONES); }

DEVICE uint32_t both(bool top, bool bottom) { return top + ((uint32_t)bottom << 16); }  // flags, or counts of them below 65536

constexpr int SHARE = (MOST_CHANNELS + THREADS - 1) / THREADS;  // channels of the token to a thread
// f(key from above, key from below, channel) of all channels, added up.
template <class F> DEVICE uint32_t sum_over(Shared& sh, const Side& side, const uint32_t* up, int turn, F f) {
    uint32_t total = 0;
    UNROLL for (int k = 0; k < SHARE; k++) {
        const int channel = k * THREADS + thread_number();
        if (channel < side.channels) total += f(up[k], ONES - up[k], channel);
    }
    return sum_of_block(sh, total, turn);
}

// The thread's channels of the token; one that there is not is the last, so that no load waits for a condition.
DEVICE void read_share(uint32_t* raw, const Side& side, int64_t b) {
    UNROLL for (int k = 0; k < SHARE; k++) {
        const int channel = min(k * THREADS + thread_number(), side.channels - 1);
        raw[k] = raw_of(side.x, b * side.stride_b + channel / D * side.stride_g + channel % D);
    }
}

// The token's own range, and which of the head's channels are outliers: as encode.py finds them.
DEVICE void token_range(Shared& sh, const Side& side, int64_t b, int g, uint32_t* up, float& scale, float& zero) {
    const int thread = thread_number(), warp = thread / 32;
    UNROLL for (int k = 0; k < SHARE; k++) up[k] = sort_key(up[k]);
    const uint32_t count = side.per_end;
    uint32_t top = 0, bottom = 0, more_top = 1, more_bottom = 1;
    int turn = 0;
    if (count) {
        for (uint32_t bit = SIGN; bit; bit >>= 1, turn++) {
            const uint32_t found = sum_over(sh, side, up, turn, [&](uint32_t a, uint32_t z, int) { return both(a >= (top | bit), z >= (bottom | bit)); });
            if ((found & 65535) >= count) top |= bit, more_top = (found & 65535) > count;
            if (found >> 16 >= count) bottom |= bit, more_bottom = found >> 16 > count;
        }
        const uint32_t beyond = sum_over(sh, side, up, turn++, [&](uint32_t a, uint32_t z, int) { return both(a > top, z > bottom); });
        const uint32_t before = sum_over(sh, side, up, turn++, [&](uint32_t a, uint32_t z, int c) { return c < (side.first_head + g) * D ? both(a == top, z == bottom) : 0; });
        const uint32_t room_top = count - (beyond & 65535), room_bottom = count - (beyond >> 16);
        const int own = min(thread, D - 1);
        const uint32_t a = sort_key(raw_of(side.x, b * side.stride_b + (side.first_head + g) * side.stride_g + own)), z = ONES - a;
        const uint32_t tops = ballot(thread < D && a == top), bottoms = ballot(thread < D && z == bottom);
        if (thread % 32 == 0 && warp < PER) sh.tied[0][warp] = tops, sh.tied[1][warp] = bottoms;
        barrier_of_block();
        const uint32_t up_to = ~0u >> (31 - thread % 32);
        uint32_t top_rank = (before & 65535) + ones_of(tops & up_to), bottom_rank = (before >> 16) + ones_of(bottoms & up_to);
        for (int w = 0; w < min(warp, PER); w++) top_rank += ones_of(sh.tied[0][w]), bottom_rank += ones_of(sh.tied[1][w]);
        const int after = (int)bottom_rank - (int)(top == ONES - bottom ? room_top : 0);  // if the thresholds are one number top takes its ties first
        const bool extreme = a > top || z > bottom || (a == top && top_rank <= room_top) || (z == bottom && after > 0 && after <= (int)room_bottom);
        const uint32_t mask = ballot(thread < D && extreme);
        if (thread % 32 == 0 && warp < PER) sh.outlier[warp] = mask;
    }
    uint32_t most = 0, least = 0;
    UNROLL for (int k = 0; k < SHARE; k++)
        if (k * THREADS + thread < side.channels) {
            if (!count || up[k] < top + more_top) most = max(most, up[k]);
            if (!count || ONES - up[k] < bottom + more_bottom) least = max(least, ONES - up[k]);
        }
    const float high = of_sort_key(max_of_block(sh, most, turn)), low = of_sort_key(ONES - max_of_block(sh, least, turn + 1));
    scale = as_stored(product(difference(high, low), 0.5f)), zero = as_stored(product(sum(high, low), 0.5f));
}

// The largest number whose quotient by s does not exceed the boundary: from where it must nearly be, in growing steps, then in halves.
DEVICE float edge_of(float boundary, float s) {
    auto at = [](int k) { return as_float(k < 0 ? (uint32_t)k ^ 0x7FFFFFFFu : (uint32_t)k); };  // floats by their place among all
    auto holds = [&](int k) { return quotient(at(k), s) <= boundary; };
    const int guess = (int)bits_of(product(boundary, s));
    int k = guess < 0 ? guess ^ 0x7FFFFFFF : guess, step = 1;
    while (!holds(k)) k -= step, step *= 2;
    for (step = 1; holds(k + step); step *= 2) k += step;
    while (step /= 2)
        if (holds(k + step)) k += step;
    return at(k);
}

struct alignas(PER & (PER - 1) ? 2 : 2 * PER) Row { uint16_t m[PER]; };  // what a channel hands on to those of a lane

// Leaves the level whose edge is the first that d does not exceed in v[0]: halves of what is left, N of each, all in registers.
template <int N> DEVICE void halve(float d, float* e, float* v, int& code) {
    const bool up = d > e[N - 1];
    code += up ? N : 0;
    UNROLL for (int k = 0; k < N; k++) e[k] = up ? e[N + k] : e[k], v[k] = up ? v[N + k] : v[k];
    if constexpr (N > 1) halve<N / 2>(d, e, v, code);
}
DEVICE float nearest(float d, const float* edge, const float* value, int& code) {
    float e[LEVELS], v[LEVELS];
    UNROLL for (int k = 0; k < LEVELS; k++) e[k] = edge[k], v[k] = value[k];
    code = 0;
    if constexpr (LEVELS > 1) halve<LEVELS / 2>(d, e, v, code);
    return v[0];
}
// The same where there are too many levels for that, by division; i-th in order.
DEVICE float searched(const Shared& sh, float d, int i, int& code) {
    const float q = quotient(d, maximum(sh.s[i], TINY)), *boundaries = sh.boundaries + sh.boundary[i];
    code = 0;
    for (int step = 1 << sh.width[i] >> 1; step; step /= 2)
        if (q > boundaries[code + step - 1]) code += step;
    return sum(product(sh.levels[sh.level[i] + code], sh.s[i]), sh.z[i]);
}

// Codes and targets of the head's channels, by one warp. `apart` is 0 if all have one range.
DEVICE void chain(Shared& sh, int apart) {
    constexpr int HELD = TABLES ? LEVELS : 1;
    const int lane = thread_number() % 32;
    float y[PER], z[PER], target[PER], among[PER][PER], edge[PER][HELD], value[PER][HELD];
    int code[PER];
    bool exact[PER];
    UNROLL for (int r = 0; r < PER; r++) {
        const int i = lane * PER + r, channel = sh.order[i];
        y[r] = sh.x[i], z[r] = sh.z[i], exact[r] = sh.outlier[channel / 32] >> channel % 32 & 1, target[r] = 0, code[r] = 0;
        UNROLL for (int c = r + 1; c < PER; c++) among[r][c] = from_half(sh.matrix[i * D + lane * PER + c]);
        if (TABLES)
            UNROLL for (int k = 0; k < HELD; k++) edge[r][k] = sh.edge[k * D + i * apart], value[r][k] = sh.value[k * D + i * apart];
    }
    Row rows[PER], next[PER];
    UNROLL for (int r = 0; r < PER; r++) next[r] = *(const Row*)(sh.matrix + r * D + lane * PER);
#pragma unroll 2
    for (int turn = 0; turn < 32; turn++) {
        UNROLL for (int r = 0; r < PER; r++) rows[r] = next[r], next[r] = *(const Row*)(sh.matrix + (min(turn + 1, 31) * PER + r) * D + lane * PER);
        float t[PER], e[PER];
        int found[PER];
        UNROLL for (int r = 0; r < PER; r++) t[r] = y[r], e[r] = 0, found[r] = 0;
        if (TABLES || lane == turn)  // only the lane whose turn it is counts
            UNROLL for (int r = 0; r < PER; r++) {
                const float d = difference(t[r], z[r]), lost = difference(t[r], as_stored(t[r]));
                e[r] = difference(t[r], TABLES ? nearest(d, edge[r], value[r], found[r]) : searched(sh, d, lane * PER + r, found[r]));
                if (exact[r]) e[r] = lost;
                UNROLL for (int c = r + 1; c < PER; c++) t[c] = difference(t[c], product(e[r], among[r][c]));
            }
        UNROLL for (int r = 0; r < PER; r++) {
            if (lane == turn) target[r] = t[r], code[r] = found[r];
            e[r] = shuffle(e[r], turn);
        }
        UNROLL for (int r = 0; r < PER; r++)
            UNROLL for (int c = 0; c < PER; c++) y[c] = difference(y[c], product(e[r], from_half(rows[r].m[c])));
    }
    UNROLL for (int r = 0; r < PER; r++) sh.target[lane * PER + r] = target[r], sh.code[lane * PER + r] = code[r];
}

// Where the bits of a channel's code are: for each plane a word, what it was, and its lowest bit. See store.py.
struct Bits { uint32_t *word[3], was[3]; int first[3], width; };
DEVICE Bits bits_at(uint32_t* words, const Side& side, int width, int own_slot, int slot) {
    Bits bits;
    bits.width = width;
    UNROLL for (int k = 0; k < 3; k++) {
        const int plane = 4 >> k, shift = width & (16 - 2 * plane);
        int word = slot * plane / 32, bit = slot * plane % 32;
        if (side.source == 0) word = word / plane * width + shift + word % plane;
        else {
            const bool keys = side.source == 2;
            const int c = own_slot % 16, lane = keys ? slot % 8 * 4 + c % 8 / 2 : c % 8 * 4 + slot / 16;
            const int n = keys ? slot / 16 : c / 8 * 2 + slot / 8 % 2, j = keys ? slot / 8 % 2 * 4 + c / 8 * 2 + c % 2 : slot % 8;
            word = 32 * shift + lane * plane + n * plane / 4, bit = 4 * j + n * plane % 4;
        }
        bits.word[k] = words + word, bits.was[k] = width & plane ? words[word] : 0, bits.first[k] = bit;
    }
    return bits;
}
// Make them those of `code`; others may change other bits of these words meanwhile.
DEVICE void put_code(const Bits& bits, uint32_t code) {
    UNROLL for (int k = 0; k < 3; k++) {
        const int plane = 4 >> k, shift = bits.width & (16 - 2 * plane), bit = bits.first[k];
        if (bits.width & plane) flip(bits.word[k], (bits.was[k] ^ code >> shift << bit) & ((1u << plane) - 1) << bit);
    }
}

// Put the outliers behind the head's others, from `begin` up to `limit`.
DEVICE void put_outliers(const Shared& sh, const Params& p, const Side& side, int64_t token, int* end, int64_t begin, int64_t limit) {
    const int thread = thread_number();
    int before = 0, all = 0;
    for (int w = 0; w < PER; w++) {
        const int count = ones_of(sh.outlier[w]);
        if (w < thread / 32) before += count;
        all += count;
    }
    if (thread < D && sh.outlier[thread / 32] >> thread % 32 & 1) {
        const int64_t entry = begin + before + ones_of(sh.outlier[thread / 32] & ((1u << thread % 32) - 1));
        if (entry < limit) side.index[entry] = (uint16_t)(token % side.span * D + thread), side.value[entry] = stored_as(sh.target[sh.place[thread]]);
    }
    if (thread) return;
    *end = (int)min(begin + all, limit);
    if (begin + all > limit) *p.overflow = 1;
}

KERNEL(THREADS) append_token(const GRID_CONSTANT Params p) {
    Shared& sh = *(Shared*)SHARED_MEMORY;
    const int thread = thread_number(), warp = thread / 32;
    const bool values = block_number() < p.streams;  // they take longer, and come first
    const Side& side = p.side[values];
    const int64_t stream = block_number() - (values ? 0 : p.streams), b = stream / HEADS;
    const int g = (int)(stream % HEADS), channel = g * D + thread;
    // what does not depend on what else is loaded comes first, since each wait for memory is a tenth of the time; and tables before kernels before this one are waited for
    float x = 0, scale = 0, zero = 0, level = 0, boundary = 0;
    int width = 0, offset = 0, slot = 0;
    if (thread < side.all_levels) level = side.levels[thread];
    if (thread < side.all_boundaries) boundary = side.boundaries[thread];
    if (thread < D) {
        scale = side.scale[channel], zero = side.zero[channel], width = side.width[channel], offset = side.offset[channel];
        if (side.source) slot = side.slot[channel];
    }
    wait_for_prerequisites();
    launch_dependents();  // `attend` waits for all of this before it reads what may have changed
    const int64_t number = p.stored[b], padding = p.padding[b], own = b * side.stride_b + (side.first_head + g) * side.stride_g;
    const bool fed = FED && side.matrix;
    for (int i = 8 * thread; fed && i < D * D; i += 8 * THREADS) copy_later(sh.matrix + i, side.matrix + g * D * D + i);
    uint32_t raw[SHARE];
    if (side.dynamic) read_share(raw, side, b);
    if (thread < D) {
        x = number_of(raw_of(side.x, own + thread));
        const int place = fed ? side.order[channel] : thread, at = g * D + place;
        sh.order[thread] = (uint8_t)place, sh.place[place] = (uint8_t)thread, sh.x[thread] = number_of(raw_of(side.x, own + place));
        sh.width[thread] = (uint8_t)side.width[at], sh.level[thread] = (uint8_t)side.first_level[at], sh.boundary[thread] = (uint8_t)side.first_boundary[at];
        sh.s[thread] = side.scale[at], sh.z[thread] = side.zero[at];
    }
    if (thread < MOST_LEVELS) sh.levels[thread] = level, sh.boundaries[thread] = boundary;
    if (thread < PER) sh.outlier[thread] = 0;
    const int64_t token = number - p.sinks - p.page_start;
    if (padding) return;
    if (thread < D && number < p.sinks) side.sinks[(stream * p.sinks + number) * D + thread] = stored_as(x);
    if (token < 0 || token >= p.blocks * 64) return;
    Bits bits;
    if (thread < D) bits = bits_at(side.words + (b * p.blocks + token / 64) * side.block_words + offset, side, width, slot, (int)(token % 64));
    int64_t begin = 0, limit = 0;
    int* const end = side.ends + stream * p.blocks + token / 64;
    if (side.outliers) {
        begin = token % 64 ? end[0] : token >= 64 ? end[-1] : side.starts[stream];
        limit = stream + 1 < p.streams ? side.starts[stream + 1] : side.places;
    }
    barrier_of_block();
    if (side.dynamic) {
        token_range(sh, side, b, g, raw, scale, zero);
        uint16_t* range = side.scales + (b * p.blocks * 64 + token) * 2;
        if (thread == 0 && g == 0) range[0] = stored_as(scale), range[1] = stored_as(zero);
        if (thread < D) sh.s[thread] = scale, sh.z[thread] = zero;
    } else if (warp < PER) {
        const float normalised = quotient(difference(x, zero), maximum(scale, TINY));
        const uint32_t mask = ballot(side.outliers && (normalised > 1 || normalised < -1));
        if (thread % 32 == 0) sh.outlier[warp] = mask;
    }
    barrier_of_block();
    if (fed) {
        const int columns = side.dynamic ? 1 : D;
        if (TABLES)
            for (int i = thread; i < columns * LEVELS; i += THREADS) {
                const int c = i % columns, k = i / columns, levels = 1 << sh.width[c];
                sh.edge[k * D + c] = k < levels - 1 ? edge_of(sh.boundaries[sh.boundary[c] + k], maximum(sh.s[c], TINY)) : infinity();
                sh.value[k * D + c] = k < levels ? sum(product(sh.levels[sh.level[c] + k], sh.s[c]), sh.z[c]) : 0;
            }
        wait_for_copied();
        barrier_of_block();
        if (warp == 0) chain(sh, side.dynamic ? 0 : 1);
        barrier_of_block();
    } else if (thread < D) sh.target[thread] = x, searched(sh, difference(x, sh.z[thread]), thread, sh.code[thread]);
    if (thread < D) {
        const bool outlier = sh.outlier[thread / 32] >> thread % 32 & 1;
        put_code(bits, outlier ? 0 : sh.code[sh.place[thread]]);
    }
    if (side.outliers) put_outliers(sh, p, side, token, end, begin, limit);
}

// ---- a chunk

constexpr int TILE = 64, ROW = TILE + 1, NEXT = 8, TEAM = D / 32, OWN = 4;  // tokens of a block; numbers from row to row, so that lanes meet on no bank; channels at a time; warps; a warp's turns
struct Tile {
    uint16_t rows[3][NEXT * D];  // of the matrix: those of this turn, of the next, and of the one after on their way
    float y[D * ROW];            // x, and from when a channel had its turn errors, in order
    float s[D], z[D], levels[WIDTHS][LEVELS], boundaries[WIDTHS][LEVELS];  // in order; the codebooks by width, infinity behind boundaries
    uint8_t order[D], place[D], width[D];                                  // the inverse of the order by channel, all others in order
    uint8_t code[D * (TILE + 4)];                                          // before, 255 is an outlier
};

// Rows of a turn's channels, 16 bytes a thread.
DEVICE void copy_rows(Tile& sh, const uint16_t* matrix, int turn) {
    if (turn < D / NEXT) copy_later(sh.rows[turn % 3] + 8 * thread_number(), matrix + turn * NEXT * D + 8 * thread_number());
}

// Errors `e` of both of a lane's tokens, of the channel whose row of the matrix this is, go to some of NEXT channels.
DEVICE void hand_on(const uint16_t* row, const float* e, int from, float (*y)[NEXT]) {
    uint32_t words[NEXT / 2];
    read4(words, row);
#pragma unroll
    for (int j = 0; j < NEXT; j++)
        if (j >= from) {
            const float m = from_half((uint16_t)(words[j / 2] >> 16 * (j % 2)));
            y[0][j] = difference(y[0][j], product(e[0], m)), y[1][j] = difference(y[1][j], product(e[1], m));
        }
}

// Targets of NEXT channels from `first` on of a lane's tokens become errors, codes and, where they are stored, targets. Nothing is written between, so that loads need not wait.
DEVICE void find_codes(Tile& sh, const Side& side, int first, float (*y)[NEXT], const uint16_t* rows, const float* s, const float* z, uint16_t* targets, int last) {
    const int lane = thread_number() % 32;
    uint8_t codes[NEXT][2];
#pragma unroll
    for (int i = 0; i < 2 * NEXT; i++) codes[i / 2][i % 2] = sh.code[(first + i / 2) * (TILE + 4) + lane + 32 * (i % 2)];
#pragma unroll
    for (int r = 0; r < NEXT; r++) {
        const int c = first + r;
        const float *levels = sh.levels[sh.width[c]], *boundaries = sh.boundaries[sh.width[c]];
        int code[2] = {0, 0};
        float e[2], q[2], scale[2], zero[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            scale[h] = side.dynamic ? s[h] : sh.s[c], zero[h] = side.dynamic ? z[h] : sh.z[c];
            q[h] = quotient(difference(y[h][r], zero[h]), maximum(scale[h], TINY));
        }
        if (LEVELS <= 16) {  // no load depends on a comparison
#pragma unroll
            for (int k = 0; k < LEVELS - 1; k++) code[0] += q[0] > boundaries[k], code[1] += q[1] > boundaries[k];
        } else
            for (int step = 1 << sh.width[c] >> 1; step; step /= 2)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (q[h] > boundaries[code[h] + step - 1]) code[h] += step;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float value = sum(product(levels[code[h]], scale[h]), zero[h]);
            if (codes[r][h] == 255) value = as_stored(y[h][r]), targets[min(lane + 32 * h, last) * CHANNELS + sh.order[c]] = stored_as(y[h][r]);
            else codes[r][h] = (uint8_t)code[h];
            y[h][r] = e[h] = difference(y[h][r], value);
        }
        if (r + 1 < NEXT) hand_on(rows + r * D + first, e, r + 1, y);
    }
#pragma unroll
    for (int i = 0; i < 2 * NEXT; i++) {
        const int c = first + i / 2, t = lane + 32 * (i % 2);
        sh.code[c * (TILE + 4) + t] = codes[i / 2][i % 2], sh.y[c * ROW + t] = y[i % 2][i / 2];
    }
}

KERNELS_TOGETHER(TEAM * 32, LEVELS > 16 ? 1 : 512 / (TEAM * 32)) feed_back(const GRID_CONSTANT Params p) {
    wait_for_prerequisites();
    Tile& sh = *(Tile*)SHARED_MEMORY;
    const int thread = thread_number(), lane = thread % 32, warp = thread / 32, tiles = (int)((p.tokens + TILE - 1) / TILE);
    const int64_t all = p.streams * tiles, mine = block_number() % all, stream = mine / tiles, b = stream / HEADS, first = mine % tiles * TILE;
    const Side& side = p.side[block_number() / all];
    const int g = (int)(stream % HEADS), tokens = (int)min((int64_t)TILE, p.tokens - first);
    const uint16_t* matrix = side.matrix + g * D * D;
    copy_rows(sh, matrix, 0), copy_rows(sh, matrix, 1);
    for (int c = thread; c < D; c += TEAM * 32) {
        const int place = side.order[g * D + c], at = g * D + place, width = side.width[at];
        sh.order[c] = (uint8_t)place, sh.place[place] = (uint8_t)c, sh.width[c] = (uint8_t)width;
        sh.s[c] = side.scale[at], sh.z[c] = side.zero[at];
        for (int k = 0; k < LEVELS; k++) {  // channels of one width write the same
            sh.levels[width][k] = k < 1 << width ? side.levels[side.first_level[at] + k] : 0;
            sh.boundaries[width][k] = k + 1 < 1 << width ? side.boundaries[side.first_boundary[at] + k] : infinity();
        }
    }
    barrier_of_block();
    const int64_t at = (b * p.tokens + first) * CHANNELS + g * D;
    uint16_t *const codes = side.codes + at, *const targets = side.targets + at;
    // tokens that are not there are the last one once more: so nothing waits for a condition
#pragma unroll 8
    for (int t = warp; t < TILE; t += TEAM)
#pragma unroll
        for (int part = 0; part < PER; part++) {
            const int channel = 32 * part + lane, c = sh.place[channel], there = min(t, tokens - 1);
            sh.y[c * ROW + t] = number_of(raw_of(side.x, b * side.stride_b + g * side.stride_g + (first + there) * side.stride_s + channel));
            sh.code[c * (TILE + 4) + t] = codes[there * CHANNELS + channel] == OUTLIER ? 255 : 0;
        }
    float s[2] = {1, 1}, z[2] = {0, 0}, y[OWN][2][NEXT];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int64_t t = b * p.tokens + first + min(lane + 32 * h, tokens - 1);
        if (side.dynamic) s[h] = from_half(side.ranges[2 * t]), z[h] = from_half(side.ranges[2 * t + 1]);
    }
    wait_for_copied();
    barrier_of_block();
#pragma unroll
    for (int k = 0; k < OWN; k++)
#pragma unroll
        for (int i = 0; i < 2 * NEXT; i++) y[k][i / NEXT][i % NEXT] = sh.y[((TEAM * k + warp) * NEXT + i % NEXT) * ROW + lane + 32 * (i / NEXT)];
#pragma unroll
    for (int k = 0; k < OWN; k++)
#pragma unroll 1
        for (int turn = 0; turn < TEAM; turn++) {
            const int n = TEAM * k + turn, c = n * NEXT;
            const uint16_t* rows = sh.rows[n % 3];
            if (warp == turn) find_codes(sh, side, c, y[k], rows, s, z, targets, tokens - 1);
            wait_for_copied();
            barrier_of_block();
            copy_rows(sh, matrix, n + 2);  // in place of those of the turn before, which all have done with
#pragma unroll 2
            for (int r = 0; r < NEXT; r++) {
                const float e[2] = {sh.y[(c + r) * ROW + lane], sh.y[(c + r) * ROW + lane + 32]};
#pragma unroll
                for (int later = k; later < OWN; later++)
                    if (later > k || warp > turn) hand_on(rows + r * D + (TEAM * later + warp) * NEXT, e, 0, y[later]);
            }
        }
    for (int t = warp; t < tokens; t += TEAM)
#pragma unroll
        for (int part = 0; part < PER; part++) {
            const int channel = 32 * part + lane;
            const uint8_t code = sh.code[sh.place[channel] * (TILE + 4) + t];
            if (code != 255) codes[t * CHANNELS + channel] = code;
        }
}

GLOBAL sizes(int* out) { out[0] = sizeof(Shared), out[1] = sizeof(Tile), out[2] = sizeof(Params); }
