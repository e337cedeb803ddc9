"""First operands of products, left in memory as a tensor core wants them.

`m16n8k16` takes from lane 4 g + q of a warp the rows g and g + 8 and, of every 16 columns, 2 q + {0, 1, 8, 9}: eight
fp16 numbers. Kept next to each other, they are one 16-byte load, and no number has to change lanes:

    column    16 s + 8 h + 2 q + e        row    g + 8 r
    place     ((s G + g) 4 + q) 8 + 4 h + 2 r + e       G: 8, or as many rows as there are, if those repeat

What is summed over may come in any order, if both operands agree. Triton takes from a lane four neighbours at a time, two
for each of two products, where an operand was joined of parts, as here. Its column L is therefore the hardware's `column_of(L)`:

    L    32 (s div 2) + 16 h + 4 q + 2 (s mod 2) + e

Memory is global (rotated queries), or shared (weights), which Triton has no way to address (shared.py), so that inline
PTX reads and writes it. In full precision, and in the interpreter, both are plain loads and stores.
"""

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
GLOBAL_OPERAND = tl.constexpr(1)
SHARED_OPERAND = tl.constexpr(2)

_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
_TWO_HALVES = tl.constexpr((tl.float16,) * 2)
_LOAD_GLOBAL = tl.constexpr("ld.global.v4.b32 {$0,$1,$2,$3},[$4];")
_LOAD_SHARED = tl.constexpr("ld.shared.v4.b32 {$0,$1,$2,$3},[$4];")
# a pair, for row g and again for row g + 8; and a number
_STORE_TWICE = tl.constexpr("st.shared.v2.b32 [$1],{$2,$2}; mov.b32 $0,0;")
_STORE_ONCE = tl.constexpr("st.shared.b32 [$1],$2; mov.b32 $0,0;")


@triton.jit
def column_of(number, COLUMNS: tl.constexpr):
    """The hardware's column of column `number` of a tile; below 32 columns Triton takes them as they are."""
    column = number
    if COLUMNS >= 32:
        column = (number & ~30) | ((number & 16) >> 1) | ((number & 12) >> 1) | ((number & 2) << 3)
    return column


@triton.jit
def place_in_operand(row, column, ROWS: tl.constexpr):
    """Where an element of an operand lies; ROWS: how many rows are held, 8 or fewer repeat."""
    group = (column // 16 * min(ROWS, 8) + row % 8) * 4 + column // 2 % 4
    return group * 8 + column // 8 % 2 * 4 + row // 8 * 2 + column % 2


@triton.constexpr_function
def row_offset(row):
    """How far row `row` of a stretch lies behind its first, whose number is a multiple of all rows of a stretch."""
    return row % 8 * 32 + row // 8 * 2


@triton.jit
def four_words(at, KIND: tl.constexpr):
    """Words at pointers (or addresses) `at` `[32]` and behind them, `[32, h, r]`."""
    if KIND == SHARED_OPERAND:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOAD_SHARED, "=r,=r,=r,=r,r", [at], dtype=_FOUR_WORDS.value, is_pure=False, pack=1
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOAD_GLOBAL, "=r,=r,=r,=r,l", [at], dtype=_FOUR_WORDS.value, is_pure=False, pack=1
        )
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def operand(at, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr):
    """`[16, COLUMNS]` of ROWS rows (8 or fewer repeat) that were kept at `at`; COLUMNS 32, 64 or 128 unless PLAIN."""
    STEP: tl.constexpr = 32 * min(ROWS, 8)  # elements of 16 columns
    if KIND == PLAIN:
        row, column = tl.arange(0, 16)[:, None] % ROWS, column_of(tl.arange(0, COLUMNS), COLUMNS)[None, :]
        x = tl.load(at + place_in_operand(row, column, ROWS))
    else:
        STEPS: tl.constexpr = COLUMNS // 16
        SIZE: tl.constexpr = 2 if KIND == SHARED_OPERAND else 1  # pointers count elements, addresses bytes
        lane = tl.arange(0, 32)
        first = at + (lane // 4 % min(ROWS, 8) * 4 + lane % 4) * (8 * SIZE)
        if STEPS == 2:
            words = tl.join(four_words(first, KIND), four_words(first + STEP * SIZE, KIND))
        elif STEPS == 4:
            words = four_steps(first, STEP * SIZE, 1, KIND)
        else:
            second = four_steps(first + STEP * SIZE, STEP * SIZE, 2, KIND)
            words = tl.join(four_steps(first, STEP * SIZE, 2, KIND), second)
        lanes = tl.reshape(words, (8, 4, 2, 2, STEPS // 2, 2))  # g, q, h, r, s div 2, s mod 2
        pairs = tl.reshape(tl.permute(lanes, (3, 0, 4, 2, 1, 5)), (16, COLUMNS // 2))
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0,$1},$2;", "=h,=h,r", [pairs], dtype=_TWO_HALVES.value, is_pure=True, pack=1
        )
        x = tl.reshape(tl.join(low, high), (16, COLUMNS))
    return x


@triton.jit
def four_steps(at, STEP: tl.constexpr, EVERY: tl.constexpr, KIND: tl.constexpr):
    """Words of every EVERYth of 4 EVERY steps, `[32, h, r, 2, 2]`."""
    FAR: tl.constexpr = STEP * EVERY
    first, third = four_words(at, KIND), four_words(at + 2 * FAR, KIND)
    second, fourth = four_words(at + FAR, KIND), four_words(at + 3 * FAR, KIND)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def keep_operand(at, x, ROWS: tl.constexpr, ORDERED: tl.constexpr, KIND: tl.constexpr):
    """Keep rows `x` `[ROWS, N]` of an operand; ORDERED: its columns are those of the hardware."""
    row = tl.arange(0, ROWS)[:, None]
    if KIND == PLAIN:
        column = tl.arange(0, x.shape[1])
        if not ORDERED:
            column = column_of(column, x.shape[1])
        tl.store(at + place_in_operand(row, column[None, :], ROWS), x.to(at.dtype.element_ty))
    else:
        low, high = tl.split(tl.reshape(x.to(tl.float16), (ROWS, x.shape[1] // 2, 2)))
        low_bits = low.to(tl.uint16, bitcast=True).to(tl.uint32)
        high_bits = high.to(tl.uint16, bitcast=True).to(tl.uint32)
        both = (low_bits | (high_bits << 16)).to(tl.int32, bitcast=True)
        column = 2 * tl.arange(0, x.shape[1] // 2)
        if not ORDERED:
            column = column_of(column, x.shape[1])
        to = at + 2 * place_in_operand(row, column[None, :], ROWS)
        if ROWS > 8:
            tl.inline_asm_elementwise(_STORE_ONCE, "=r,r,r", [to, both], tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_STORE_TWICE, "=r,r,r", [to, both], tl.int32, is_pure=False, pack=1)
