// Decode attention over blocks of 64 tokens whose codes lie in the order of tensor cores (order.py), for CPUs.
//
// A block of one KV head becomes a tile of numbers on the stack, [columns][rows], 16 rows at a time: rows are tokens for
// keys and channels for values, so that neither scores nor sums add up within a vector. `words` says which word has the
// codes of a row, `columns` which columns its fields are.
#include <stdint.h>
#include <string.h>

#define BLOCK 64
#define LANES 16
#define MOST (BLOCK * 256)  // elements of a tile: heads of 256 channels

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

typedef struct {
    const int32_t *words, *which, *columns;  // [B, blocks, G * words of a head], [M, R], [M, fields]
    const float *levels, *scale, *zero;      // [16]; [G * D], or [B, tokens of the stretch] if by token
    const uint16_t *index;                   // of outliers, null if there are none
    const _Float16 *value;
    const int64_t *begin, *end;              // [B, G, blocks]: where a block's outliers are
    int64_t batch, heads, dim, blocks, first, last, bits, by_token, keys;
} Side;

static inline floats chosen(floats levels, const float *table, ints code) {
#if defined(__AVX512F__) && !defined(__clang__)
    (void)table;
    return __builtin_shuffle(levels, code);
#else
    (void)levels;
    floats out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = table[code[lane]];
    return out;
#endif
}

// 3 bits: the codes in the spare bits of three words become a fourth (packing.py).
static const int32_t *with_spare(const int32_t *words, int units, int32_t *room) {
    memcpy(room, words, 12 * units);
    for (int unit = 0; unit < units; unit++)
        for (int bit = 0; bit < 3; bit++) {
            int32_t spare = words[bit * units + unit] >> 3 & 0x11111111;
            room[3 * units + unit] = (bit ? room[3 * units + unit] : 0) | spare << bit;
        }
    return room;
}

// The tile [columns][rows] of block `block` of head `head` of sequence `row`, outliers in their places.
static void dequantize(const Side *side, int64_t row, int64_t head, int64_t block, float *tile) {
    int64_t dim = side->dim, bits = side->bits, per_head = dim * BLOCK * bits / 32;
    int rows = side->keys ? BLOCK : dim, columns = side->keys ? dim : BLOCK;
    int fields = bits == 2 ? 16 : 8, width = bits == 2 ? 2 : 4, mask = (1 << bits) - 1;
    int32_t room[MOST / 8];
    const int32_t *words = side->words + ((row * side->blocks + block) * side->heads + head) * per_head;
    if (bits == 3) words = with_spare(words, per_head / 3, room);
    floats levels;
    memcpy(&levels, side->levels, sizeof levels);
    for (int many = 0; many < columns / fields; many++)
        for (int start = 0; start < rows; start += LANES) {
            ints held;
            for (int lane = 0; lane < LANES; lane++) held[lane] = words[side->which[many * rows + start + lane]];
            for (int field = 0; field < fields; field++) {
                floats level = chosen(levels, side->levels, held >> (width * field) & mask);
                memcpy(tile + side->columns[many * fields + field] * rows + start, &level, sizeof level);
            }
        }
    // a scale for each column, or for each row
    int64_t at = side->by_token ? (row * (side->last - side->first) + block - side->first) * BLOCK : head * dim;
    const float *scale = side->scale + at, *zero = side->zero + at;
    if (side->by_token != side->keys)
        for (int column = 0; column < columns; column++)
            for (int one = 0; one < rows; one++)
                tile[column * rows + one] = tile[column * rows + one] * scale[column] + zero[column];
    else
        for (int column = 0; column < columns; column++)
            for (int one = 0; one < rows; one++)
                tile[column * rows + one] = tile[column * rows + one] * scale[one] + zero[one];
    if (!side->index) return;
    int64_t list = (row * side->heads + head) * side->blocks + block;
    for (int64_t place = side->begin[list]; place < side->end[list]; place++) {
        int token = side->index[place] / dim % BLOCK, channel = side->index[place] % dim;
        tile[side->keys ? channel * rows + token : token * rows + channel] = side->value[place];
    }
}

// Scores [B, G, Q, tokens] of queries [B, G, Q, D], which are rotated and scaled. Keys are rotated within their block, by
// `cosine` and `sine` [D / 2, 64]; the queries back by where it begins, [blocks, D / 2].
void scores(const Side *side, const float *query, int64_t queries, const float *cosine, const float *sine,
            const float *base_cosine, const float *base_sine, float *out) {
    int64_t dim = side->dim, half = dim / 2, blocks = side->last - side->first;
    float tile[MOST] __attribute__((aligned(64))), turned[256];
    for (int64_t pair = 0; pair < side->batch * side->heads; pair++)
        for (int64_t block = 0; block < blocks; block++) {
            dequantize(side, pair / side->heads, pair % side->heads, side->first + block, tile);
            for (int c = 0; c < half; c++)
                for (int i = 0; i < BLOCK; i++) {
                    float a = tile[c * BLOCK + i], b = tile[(c + half) * BLOCK + i];
                    float co = cosine[c * BLOCK + i], si = sine[c * BLOCK + i];
                    tile[c * BLOCK + i] = a * co - b * si;
                    tile[(c + half) * BLOCK + i] = b * co + a * si;
                }
            for (int64_t number = 0; number < queries; number++) {
                const float *q = query + (pair * queries + number) * dim;
                float sum[BLOCK] = {0};
                for (int c = 0; c < half; c++) {
                    float co = base_cosine[block * half + c], si = base_sine[block * half + c];
                    turned[c] = q[c] * co + q[c + half] * si;
                    turned[c + half] = q[c + half] * co - q[c] * si;
                }
                for (int c = 0; c < dim; c++)
                    for (int i = 0; i < BLOCK; i++) sum[i] += turned[c] * tile[c * BLOCK + i];
                memcpy(out + ((pair * queries + number) * blocks + block) * BLOCK, sum, sizeof sum);
            }
        }
}

// What weights [B, G, Q, tokens] make of the values, [B, G, Q, D]; `out` begins as zeros.
void attended(const Side *side, const float *weights, int64_t queries, float *out) {
    int64_t dim = side->dim, blocks = side->last - side->first;
    float tile[MOST] __attribute__((aligned(64)));
    for (int64_t pair = 0; pair < side->batch * side->heads; pair++)
        for (int64_t block = 0; block < blocks; block++) {
            dequantize(side, pair / side->heads, pair % side->heads, side->first + block, tile);
            for (int64_t number = 0; number < queries; number++) {
                const float *weight = weights + ((pair * queries + number) * blocks + block) * BLOCK;
                float sum[256] = {0};
                for (int i = 0; i < BLOCK; i++)
                    for (int c = 0; c < dim; c++) sum[c] += weight[i] * tile[i * dim + c];
                for (int c = 0; c < dim; c++) out[(pair * queries + number) * dim + c] += sum[c];
            }
        }
}
