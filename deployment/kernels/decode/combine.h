// The second kernel of decode.cu, which includes this file.
#pragma once

// One query of one head, and MINE channels a lane: parts weighted by 2^(their maximum - the maximum of all), plain tokens among them. A warp
// takes a token or a part at a time, as if it were alone; then all that the warps have is put together in the same way.
constexpr int MINE = D % 64 ? D / 32 : 2, SLICES = D / (32 * MINE);

KERNEL_OF(COMBINE_REGISTERS) combine(const GRID_CONSTANT Params P) {
    launch_dependents();  // all it reads was written before `attend` began, or is that kernel's
    const int t = thread_number(), lane = t % 32, warp = t / 32, warps = threads_in_block() / 32, heads = P.heads * P.group;
    const int slice = block_number() % SLICES, rest = block_number() / SLICES, head = rest % heads, token = rest / heads % P.new_tokens, b = rest / heads / P.new_tokens;
    const int g = head / P.group, tokens = P.plain[0].tokens + P.plain[1].tokens;
    const int64_t position = P.positions[b * P.new_tokens + token], per_part = (int64_t)P.rows * QUERIES;
    const int64_t row = (int64_t)(b * P.heads + g) * P.tiles * QUERIES + token * P.group + head % P.group;
    const uint32_t* slots = P.value.slots + 4 * (g * D + slice * 32 * MINE);
    uint32_t slot[4];  // of the output that the thread ends with
    read4(slot, slots + 4 * (t % (32 * MINE)));
    float top = HIDDEN, total = 0, zero = 0, output[MINE] = {};  // of totals and zeros a lane has a share
    for (int i = warp; i < tokens; i += warps) {
        const bool second = i >= P.plain[0].tokens;
        const Plain& plain = P.plain[second];
        const int k = i - (second ? P.plain[0].tokens : 0);
        const int64_t at = plain.origins[b] + plain.shift + k, from = b * plain.stride_b + g * plain.stride_g + k * plain.stride_t;
        const int64_t query = b * P.query_b + head * P.query_h + token * P.query_s;
        if (at < 0 || at > position || (plain.limits && at >= plain.limits[b])) continue;  // it may be anything
        float score = 0, value[MINE];
        UNROLL for (int n = 0; n < MINE; n++) value[n] = element(plain.value, from + slots[4 * (32 * n + lane) + 3], plain.half);
        for (int p = lane; p < PAIRS; p += 32) {
            const int one = p < P.rotary_half ? p : p + P.rotary_half, two = p < P.rotary_half ? p + P.rotary_half : p + PAIRS;
            const float x = element(plain.key, from + one, plain.half), y = element(plain.key, from + two, plain.half), scale = P.factor[p] * P.scaling;
            float co, si;
            turned(P.steps[p], (int)(at - position), co, si);
            score += scale * ((x * co - y * si) * element(P.query, query + one, !BFLOAT) + (y * co + x * si) * element(P.query, query + two, !BFLOAT));
        }
        UNROLL for (int k = 16; k; k >>= 1) score += shuffle_xor(score, k);
        const float higher = maximum(top, score), shrink = exp2_of(top - higher), weight = exp2_of(score - higher + LIFT);
        top = higher, total = total * shrink + (lane == 0 ? weight : 0);
        UNROLL for (int n = 0; n < MINE; n++) output[n] = output[n] * shrink + weight * value[n];
    }
    wait_for_prerequisites();
    constexpr int AHEAD = 26 / MINE;
    for (int first = warp; first < P.parts; first += 32 * warps) {  // a lane knows of one of 32 parts
        const float* from = P.outputs + (row + first * per_part) * D + slice * 32 * MINE + lane;
        const int64_t next = warps * per_part * D;
        const int parts = min((P.parts - first + warps - 1) / warps, 32);
        float ahead[AHEAD][MINE];  // asked for before their weights are known
        uint32_t state[4] = {};
        if (lane < parts) read4(state, P.state + 4 * (row + (first + lane * warps) * per_part));
        UNROLL for (int k = 0; k < AHEAD; k++, from += next)
            UNROLL for (int n = 0; n < MINE; n++) ahead[k][n] = k < parts ? from[32 * n] : 0;
        const float highest = lane < parts ? as_float(state[0]) : HIDDEN;
        float higher = maximum(top, highest);
        UNROLL for (int k = 16; k; k >>= 1) higher = maximum(higher, shuffle_xor(higher, k));
        const float shrink = exp2_of(top - higher), weight = highest == HIDDEN ? 0 : exp2_of(highest - higher);
        top = higher, total = total * shrink + weight * as_float(state[1]), zero = zero * shrink + weight * as_float(state[DYNAMIC ? 2 : 1]);
        UNROLL for (int n = 0; n < MINE; n++) output[n] *= shrink;
        UNROLL for (int k = 0; k < AHEAD; k++) {
            const float w = shuffle(weight, k);
            UNROLL for (int n = 0; n < MINE; n++) output[n] += w * ahead[k][n];
        }
        UNROLL_BY_8 for (int k = AHEAD; k < parts; k++, from += next) {
            const float w = shuffle(weight, k);
            UNROLL for (int n = 0; n < MINE; n++) output[n] += w * from[32 * n];
        }
    }
    UNROLL for (int k = 16; k; k >>= 1) total += shuffle_xor(total, k), zero += shuffle_xor(zero, k);
    float(*all)[32 * MINE + 3] = (float(*)[32 * MINE + 3])SHARED_MEMORY;  // of a warp
    UNROLL for (int n = 0; n < MINE; n++) all[warp][32 * n + lane] = output[n];
    if (lane == 0) all[warp][32 * MINE] = top, all[warp][32 * MINE + 1] = total, all[warp][32 * MINE + 2] = zero;
    barrier_of_block();
    if (t >= 32 * MINE) return;
    for (int w = 0; w < warps; w++) top = maximum(top, all[w][32 * MINE]);
    float sum = 0;
    total = zero = 0;
    for (int w = 0; w < warps; w++) {
        const float f = exp2_of(all[w][32 * MINE] - top);
        sum += f * all[w][t], total += f * all[w][32 * MINE + 1], zero += f * all[w][32 * MINE + 2];
    }
    sum = (sum + zero * (DYNAMIC ? 1 : as_float(slot[1]))) / (total == 0 ? 1 : total);
    ((uint16_t*)P.result)[((int64_t)(b * P.new_tokens + token) * heads + head) * D + slot[3]] = BFLOAT ? to_bfloat(sum) : to_half(sum);
}
