// The second kernel of decode.cu, which includes this file.
#pragma once

// One query of one head: the parts weighted by 2^(their maximum - the maximum of all), plain tokens among them, a warp a token.
SMALL_KERNEL(4 * D) combine(const GRID_CONSTANT Params P) {
    launch_dependents();  // all it reads was written before `attend` began, or is that kernel's
    constexpr int ALL = 4 * D;
    const int tokens = P.plain[0].tokens + P.plain[1].tokens;
    float* weight = (float*)SHARED_MEMORY;  // [plain tokens + parts], then sums and zeros of parts, [4 D], [3, 4 D / 32]
    float *sums = weight + tokens + P.parts, *zeros = sums + P.parts, *outputs = zeros + P.parts, *reduced = outputs + ALL;
    const int t = thread_number(), lane = t % 32, heads = P.heads * P.group;
    const int head = block_number() % heads, token = block_number() / heads % P.new_tokens, b = block_number() / heads / P.new_tokens, g = head / P.group;
    const int number = token * P.group + head % P.group;
    const int64_t position = P.positions[b * P.new_tokens + token];
    const int64_t row = ((int64_t)(b * P.heads + g) * P.tiles) * QUERIES + number, per_part = (int64_t)P.rows * QUERIES;
    uint32_t slot[4];  // the thread's: its output's channel, and what belongs to it
    read4(slot, P.value.slots + 4 * (g * D + t % D));
    const int channel = slot[3];
    float top = HIDDEN;
    for (int i = t / 32; i < tokens; i += ALL / 32) {
        const bool second = i >= P.plain[0].tokens;
        const Plain& plain = P.plain[second];
        const int k = i - (second ? P.plain[0].tokens : 0);
        const int64_t at = plain.origins[b] + plain.shift + k, key = b * plain.stride_b + g * plain.stride_g + k * plain.stride_t;
        const int64_t query = b * P.query_b + head * P.query_h + token * P.query_s;
        float score = 0;
        for (int p = lane; p < PAIRS; p += 32) {
            const int one = p < P.rotary_half ? p : p + P.rotary_half, two = p < P.rotary_half ? p + P.rotary_half : p + PAIRS;
            const float x = element(plain.key, key + one, plain.half), y = element(plain.key, key + two, plain.half), scale = P.factor[p] * P.scaling;
            float co, si;
            turned(P.steps[p], (int)(at - position), co, si);
            score += scale * ((x * co - y * si) * element(P.query, query + one, !BFLOAT) + (y * co + x * si) * element(P.query, query + two, !BFLOAT));
        }
        UNROLL for (int k = 16; k; k >>= 1) score += shuffle_xor(score, k);
        const bool seen = at >= 0 && at <= position && (!plain.limits || at < plain.limits[b]);
        if (lane == 0) weight[i] = seen ? score + LIFT : HIDDEN;
        if (seen) top = maximum(top, score);
    }
    auto value_of = [&](int i) {  // of the plain token i, the thread's channel
        const bool second = i >= P.plain[0].tokens;
        const Plain& plain = P.plain[second];
        return element(plain.value, b * plain.stride_b + g * plain.stride_g + (i - (second ? P.plain[0].tokens : 0)) * plain.stride_t + channel, plain.half);
    };
    const float plain_value = t / D < tokens ? value_of(t / D) : 0;
    wait_for_prerequisites();
    uint32_t part[4];  // the thread's first; asked for before anything is waited for
    if (t < P.parts) read4(part, P.state + 4 * (row + t * per_part));
    constexpr int AHEAD = 13;
    float ahead[AHEAD];  // of the first parts, asked for before their weights are known
    UNROLL for (int n = 0; n < AHEAD; n++) ahead[n] = 4 * n + t / D < P.parts ? P.outputs[(row + (4 * n + t / D) * per_part) * D + t % D] : 0;
    for (int i = t; i < P.parts; i += ALL) {
        if (i != t) read4(part, P.state + 4 * (row + i * per_part));
        top = maximum(top, weight[tokens + i] = as_float(part[0])), sums[i] = as_float(part[1]), zeros[i] = as_float(part[2]);
    }
    UNROLL for (int k = 16; k; k >>= 1) top = maximum(top, shuffle_xor(top, k));
    if (lane == 0) reduced[t / 32] = top;
    barrier_of_block();
    for (int i = 0; i < ALL / 32; i++) top = maximum(top, reduced[i]);
    float total = 0, packed = 0, zero = 0;
    for (int i = t; i < tokens + P.parts; i += ALL) {
        const float w = weight[i] == HIDDEN ? 0 : exp2_of(weight[i] - top);
        weight[i] = w;
        if (i < tokens) total += w;
        else packed += w * sums[i - tokens], zero += w * zeros[i - tokens];
    }
    total += packed;
    UNROLL for (int k = 16; k; k >>= 1) total += shuffle_xor(total, k), packed += shuffle_xor(packed, k), zero += shuffle_xor(zero, k);
    if (lane == 0) reduced[ALL / 32 + t / 32] = total, reduced[2 * (ALL / 32) + t / 32] = DYNAMIC ? zero : packed;
    barrier_of_block();
    float output = 0;
    UNROLL for (int n = 0; n < AHEAD; n++) output += 4 * n + t / D < P.parts ? weight[tokens + 4 * n + t / D] * ahead[n] : 0;
    UNROLL_BY_8 for (int i = t / D + 4 * AHEAD; i < P.parts; i += 4) output += weight[tokens + i] * P.outputs[(row + i * per_part) * D + t % D];
    for (int i = t / D; i < tokens; i += 4)  // one that is not seen may be anything
        if (weight[i] != 0) output += weight[i] * (i < 4 ? plain_value : value_of(i));
    outputs[t] = output;
    barrier_of_block();
    if (t >= D) return;
    total = zero = 0;
    for (int i = 0; i < ALL / 32; i++) total += reduced[ALL / 32 + i], zero += reduced[2 * (ALL / 32) + i];
    output = outputs[t] + outputs[D + t] + outputs[2 * D + t] + outputs[3 * D + t] + zero * (DYNAMIC ? 1 : as_float(slot[1]));
    output /= total == 0 ? 1 : total;
    ((uint16_t*)P.result)[((int64_t)(b * P.new_tokens + token) * heads + head) * D + channel] = BFLOAT ? to_bfloat(output) : to_half(output);
}
