// Decode attention over blocks of 64 tokens whose codes lie in the order of tensor cores (groups.py), for CPUs.
//
// A block of one KV head becomes a tile of numbers on the stack, [columns][rows], 16 rows at a time: rows are tokens for
// keys and channels for values, so that neither scores nor sums add up within a vector. `which` says which word has the
// codes of a row (half a word of nibbles), `columns` which columns its fields are. Softmax is online: for each query the highest score so far, the
// sum of weights relative to it, and the weighted sum of values, which `stored` and `exact` carry on from call to call.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 64
#define LANES 16
#define LEVELS 16
#define MOST_DIM 256
#define MOST (BLOCK * MOST_DIM)  // elements of a tile
#define TOGETHER 4               // queries that share what was loaded
#define MOST_QUERIES 16          // of a KV head; native.py gives no more

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

typedef struct {
    const int32_t *words, *which, *columns;  // [B, blocks, G * words of a head], [M, R], [M, 4]
    const float *levels, *scale, *zero;      // [16] repeated to fill; [G * D], null if by token
    const _Float16 *scales;                  // [B, blocks * 64, 2]: scale and zero by token, null if by channel
    const uint16_t *index;                   // of outliers, null if there are none
    const _Float16 *value;
    const int32_t *ends;                     // [B, G, blocks]: where a block's outliers end and the next one's begin
    int64_t batch, heads, dim, blocks, bits, keys;
} Side;

typedef struct {
    const float *query;           // [B, G, Q, D], rotated and scaled; Q: those of one KV head, token by token for each head
    float *highest, *total, *out; // [B, G, Q], [B, G, Q], [B, G, Q, D]
    int64_t queries, tokens;      // Q, and how many tokens they belong to
} State;

// The level of each lane's code, which is in its lowest bits; `levels` repeat, so the bits above say nothing.
static inline floats chosen(floats levels, ints code) {
#if defined(__AVX512F__) && !defined(__clang__)
    return __builtin_shuffle(levels, code);
#else
    floats out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = levels[code[lane] & (LEVELS - 1)];
    return out;
#endif
}

static inline floats loaded(const float *from) {
    floats out;
    memcpy(&out, from, sizeof out);
    return out;
}

// `n` numbers, a multiple of 16, as float32.
static inline void widened(const _Float16 *from, int n, float *out) {
    for (int start = 0; start < n; start += LANES) {
#ifdef __AVX512F__
        _mm512_storeu_ps(out + start, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + start))));
#else
        for (int lane = 0; lane < LANES; lane++) out[start + lane] = from[start + lane];
#endif
    }
}

// e^x for x <= 0 to the last bit or two: 2^n times a polynomial on half a step around it.
static inline floats exponential(floats x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds
    ints low = x < -87.0f;  // whose weight would be no normal number
    x = (floats)((ints)x & ~low) + (floats)((ints)((floats){} - 87.0f) & low);
    floats whole = (x * 1.44269504f + shift) - shift;
    floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((__builtin_convertvector(whole, ints) + 127) << 23);
}

// The words of nibbles [groups][32 lanes][4] of groups of 2 or 3 bits (groups.py).
static const int32_t *nibbles(const int32_t *words, int groups, int64_t bits, int32_t *room) {
    for (int group = 0; group < groups; group++, words += 32 * bits)
        for (int lane = 0; lane < 32; lane++)
            for (int n = 0; n < 4; n++) {
                int32_t word = words[2 * lane + n / 2] >> (2 * (n % 2)) & 0x33333333;
                if (bits == 3) word |= (words[64 + lane] >> n & 0x11111111) << 2;
                room[(group * 32 + lane) * 4 + n] = word;
            }
    return room;
}

// The tile [columns][rows] of block `block` of head `head` of sequence `row`, outliers in their places.
static void dequantize(const Side *side, int64_t row, int64_t head, int64_t block, float *tile) {
    int64_t dim = side->dim, bits = side->bits, per_head = dim * BLOCK * bits / 32;
    int rows = side->keys ? BLOCK : dim, columns = side->keys ? dim : BLOCK;
    int fields = 4, sets = columns / fields;
    int by_column = side->keys == !side->scales;
    int32_t room[MOST / 8], held[MOST / 4];
    float scale[MOST_DIM], zero[MOST_DIM];
    const int32_t *words = side->words + ((row * side->blocks + block) * side->heads + head) * per_head;
    if (bits < 4) words = nibbles(words, dim / 16, bits, room);
    for (int i = 0; i < sets * rows; i++) held[i] = ((const uint16_t *)words)[side->which[i]];
    if (side->scales) {
        const _Float16 *scales = side->scales + (row * side->blocks + block) * BLOCK * 2;
        float both[2 * BLOCK];
        widened(scales, 2 * BLOCK, both);
        for (int i = 0; i < BLOCK; i++) scale[i] = both[2 * i], zero[i] = both[2 * i + 1];
    } else {
        memcpy(scale, side->scale + head * dim, 4 * dim);
        memcpy(zero, side->zero + head * dim, 4 * dim);
    }
    floats levels = loaded(side->levels);
    for (int set = 0; set < sets; set++)
        for (int field = 0; field < fields; field++) {
            int column = side->columns[set * fields + field];
            floats table = by_column ? levels * scale[column] + zero[column] : levels;
            for (int start = 0; start < rows; start += LANES) {
                ints codes;
                memcpy(&codes, held + set * rows + start, sizeof codes);
                floats level = chosen(table, codes >> (4 * field));
                if (!by_column) level = level * loaded(scale + start) + loaded(zero + start);
                memcpy(tile + column * rows + start, &level, sizeof level);
            }
        }
    if (!side->index) return;
    int64_t list = (row * side->heads + head) * side->blocks + block;
    for (int32_t place = list ? side->ends[list - 1] : 0; place < side->ends[list]; place++) {
        uint32_t element = side->index[place], token = element / (uint32_t)dim % BLOCK, channel = element % (uint32_t)dim;
        tile[side->keys ? channel * rows + token : token * rows + channel] = side->value[place];
    }
}

// Scores [n][64] of `n` queries [n][D] with keys [D][64], which are rotated within their block on the way.
static inline __attribute__((always_inline)) void scores(int n, const float *query, int64_t dim, const float *tile,
                                                         const float *cosine, const float *sine, float *out) {
    int64_t half = dim / 2;
    for (int start = 0; start < BLOCK; start += 2 * LANES) {
        floats sum[TOGETHER][2] = {};
        for (int64_t c = 0; c < half; c++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                int64_t at = c * BLOCK + start + v * LANES;
                floats a = loaded(tile + at), b = loaded(tile + half * BLOCK + at);
                floats co = loaded(cosine + at), si = loaded(sine + at);
                floats first = a * co - b * si, second = b * co + a * si;
#pragma GCC unroll 4
                for (int q = 0; q < n; q++) sum[q][v] += query[q * dim + c] * first + query[q * dim + c + half] * second;
            }
#pragma GCC unroll 4
        for (int q = 0; q < n; q++) memcpy(out + q * BLOCK + start, sum[q], 2 * sizeof(floats));
    }
}

// Adds to `out` [n][D] what weights [n][64] make of values [64][D].
static inline __attribute__((always_inline)) void attended(int n, const float *weight, int64_t dim, const float *tile,
                                                           float *out) {
    for (int start = 0; start < dim; start += 4 * LANES) {
        floats sum[TOGETHER][4] = {};
        for (int i = 0; i < BLOCK; i++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                floats value = loaded(tile + i * dim + start + v * LANES);
#pragma GCC unroll 4
                for (int q = 0; q < n; q++) sum[q][v] += weight[q * BLOCK + i] * value;
            }
#pragma GCC unroll 4
        for (int q = 0; q < n; q++)
            for (int v = 0; v < 4 * LANES; v++) out[q * dim + start + v] += ((float *)sum[q])[v];
    }
}

#define FOR_EACH_NUMBER(n, call) \
    switch (n) { case 1: { enum { N = 1 }; call; } break; case 2: { enum { N = 2 }; call; } break; \
                 case 3: { enum { N = 3 }; call; } break; default: { enum { N = 4 }; call; } }

static inline float sum_of(floats x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

// The first n of the scores [64] of one query become weights relative to the highest score so far, the others zeros.
static void weigh(float *score, int n, float *highest, float *total, float *out, int64_t dim) {
    for (int i = n; i < BLOCK; i++) score[i] = score[0];
    floats top = loaded(score), sum = {};
    for (int start = LANES; start < BLOCK; start += LANES) {
        floats other = loaded(score + start);
        ints more = other > top;
        top = (floats)(((ints)other & more) | ((ints)top & ~more));
    }
    float high = *highest;
    for (int lane = 0; lane < LANES; lane++) high = top[lane] > high ? top[lane] : high;
    if (high > *highest) {
        float shrink = *highest == -INFINITY ? 0 : expf(*highest - high);
        for (int64_t c = 0; c < dim; c++) out[c] *= shrink;
        *total *= shrink, *highest = high;
    }
    for (int start = 0; start < BLOCK; start += LANES) {
        floats weight = exponential(loaded(score + start) - high);
        memcpy(score + start, &weight, sizeof weight);
    }
    for (int i = n; i < BLOCK; i++) score[i] = 0;
    for (int start = 0; start < BLOCK; start += LANES) sum += loaded(score + start);
    *total += sum_of(sum);
}

// The first `last` blocks of a page. A query of sequence b and token t sees the first `limits` [B, tokens] tokens of it.
// Keys are rotated within their block, by `cosine` and `sine` [D / 2, 64]; queries back by where it begins, `bases` [blocks, D / 2].
void stored(const Side *key, const Side *value, const State *state, const int64_t *limits, int64_t last, const float *cosine,
            const float *sine, const float *base_cosine, const float *base_sine) {
    int64_t dim = key->dim, half = dim / 2, queries = state->queries;
    float tile[MOST] __attribute__((aligned(64))), weight[MOST_QUERIES * BLOCK] __attribute__((aligned(64)));
    float turned[TOGETHER * MOST_DIM];
    for (int64_t pair = 0; pair < key->batch * key->heads; pair++)
        for (int64_t block = 0; block < last; block++) {
            const float *co = base_cosine + block * half, *si = base_sine + block * half;
            dequantize(key, pair / key->heads, pair % key->heads, block, tile);
            for (int64_t first = 0; first < queries; first += TOGETHER) {
                int n = queries - first < TOGETHER ? queries - first : TOGETHER;
                for (int q = 0; q < n; q++)
                    for (int c = 0; c < half; c++) {
                        const float *from = state->query + (pair * queries + first + q) * dim;
                        turned[q * dim + c] = from[c] * co[c] + from[c + half] * si[c];
                        turned[q * dim + c + half] = from[c + half] * co[c] - from[c] * si[c];
                    }
                FOR_EACH_NUMBER(n, scores(N, turned, dim, tile, cosine, sine, weight + first * BLOCK))
            }
            for (int64_t q = 0; q < queries; q++) {
                int64_t seen = limits[pair / key->heads * state->tokens + q % state->tokens] - block * BLOCK;
                int64_t at = pair * queries + q;
                if (seen <= 0) memset(weight + q * BLOCK, 0, BLOCK * sizeof(float));
                else weigh(weight + q * BLOCK, seen < BLOCK ? seen : BLOCK, state->highest + at, state->total + at,
                           state->out + at * dim, dim);
            }
            dequantize(value, pair / key->heads, pair % key->heads, block, tile);
            for (int64_t first = 0; first < queries; first += TOGETHER) {
                int n = queries - first < TOGETHER ? queries - first : TOGETHER;
                FOR_EACH_NUMBER(n, attended(N, weight + first * BLOCK, dim, tile, state->out + (pair * queries + first) * dim))
            }
        }
}

// A few tokens in full precision: rotated keys and values [B, G, n, D]; `visible` [B, tokens, n].
void exact(const State *state, const float *key, const float *value, const uint8_t *visible, int64_t batch, int64_t heads,
           int64_t dim, int64_t n) {
    for (int64_t number = 0; number < batch * heads * state->queries; number++) {
        int64_t pair = number / state->queries, token = number % state->queries % state->tokens;
        for (int64_t i = 0; i < n; i++) {
            if (!visible[(pair / heads * state->tokens + token) * n + i]) continue;
            float score[BLOCK] = {0};
            float *out = state->out + number * dim;
            for (int64_t c = 0; c < dim; c++) score[0] += state->query[number * dim + c] * key[(pair * n + i) * dim + c];
            weigh(score, 1, state->highest + number, state->total + number, out, dim);
            for (int64_t c = 0; c < dim; c++) out[c] += score[0] * value[(pair * n + i) * dim + c];
        }
    }
}
