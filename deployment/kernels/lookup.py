"""Levels of codes: a readable way that any device runs, and a fast one of byte permutes, for fp16 tiles in fragment order.

`unit_levels` is the function that chooses. Both start from words whose eight nibbles hold a code each. A byte permute
(`prmt`) takes four bytes out of eight by the lower three bits of four nibbles, so that up to 16 levels fit eight
registers: one per four levels and half of their fp16 numbers. Neither shared memory nor another lane is asked.

What comes out are pairs of fp16 numbers that share a register. As long as they are calculated with they stay `pairs`, int32
tiles, since the compiler does not reliably see that two fp16 numbers are neighbours.
"""

import triton
import triton.language as tl

from deployment.kernels.pairs import pair_levels

# FAST: not, or by byte permutes, or from a table in shared memory (pairs.py), which pays if many words are looked up
PERMUTES = tl.constexpr(1)
SHARED = tl.constexpr(2)


def _permutes(bits: int) -> str:
    """PTX: $0 - $3 are the fp16 levels, in pairs, of the codes in the nibbles of $4; then low bytes of levels, then high.

    Four bits have 0x32103210 in $13: a register, since an instruction takes one constant only.
    """
    tables = max(1, 2**bits // 4)
    low, high = ([f"${5 + side * tables + i}" for i in range(tables)] for side in (0, 1))
    text = "{ .reg .b32 s,m,t,x,y,z; "
    text += "and.b32 s,$4,0x77777777; " if bits == 4 else "mov.b32 s,$4; "
    if bits == 4:  # the fourth bit chooses between two permutes of the lower three
        text += "shr.u32 t,$4,1; lop3.b32 m,t,0x44444444,$13,0xEA; "  # (t & 0x44444444) | 0x32103210
    for half in range(2):
        if half:
            text += "shr.u32 s,s,16; " + ("shr.u32 m,m,16; " if bits == 4 else "")
        for name, table in (("x", low), ("z", high)):
            text += f"prmt.b32 {name},{table[0]},{table[min(1, tables - 1)]},s; "
            if bits == 4:
                text += f"prmt.b32 y,{table[2]},{table[3]},s; prmt.b32 {name},{name},y,m; "
        text += f"prmt.b32 ${2 * half},x,z,0x5140; prmt.b32 ${2 * half + 1},x,z,0x7362; "
    return text + "}"


def _constraints(bits: int) -> str:
    return ",".join(["=&r"] * 4 + ["r"] * (1 + 2 * max(1, 2**bits // 4) + (bits == 4)))


PTX = {bits: _permutes(bits) for bits in (2, 3, 4)}
_PTX_2, _PTX_3, _PTX_4 = (tl.constexpr(PTX[bits]) for bits in (2, 3, 4))
_IN_2, _IN_3, _IN_4 = (tl.constexpr(_constraints(bits)) for bits in (2, 3, 4))
_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
_TWO_HALVES = tl.constexpr((tl.float16,) * 2)


@triton.jit
def level_bytes(levels, FIRST: tl.constexpr):
    """(low, high): the low and the high bytes of four fp16 levels from FIRST on, a word each."""
    low = 0
    high = 0
    for i in tl.static_range(4):
        number = tl.load(levels + FIRST + i).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        low |= (number & 255) << (8 * i)
        high |= (number >> 8) << (8 * i)
    return per_lane(low), per_lane(high)


# no bit is below a lane and neither below nor at it, which the assembler does not know
_PER_LANE = tl.constexpr(
    "{ .reg .b32 a,b; mov.u32 a,%lanemask_lt; mov.u32 b,%lanemask_le; not.b32 b,b; and.b32 a,a,b; or.b32 $0,$1,a; }"
)


@triton.jit
def per_lane(word):
    """The same word, as if every lane had its own: what is uniform goes to registers that a permute cannot read."""
    return tl.inline_asm_elementwise(_PER_LANE, "=r,r", [word], tl.int32, is_pure=True, pack=1)


@triton.jit
def prepared(levels, BITS: tl.constexpr, FAST: tl.constexpr):
    """What `unit_levels` looks levels up in: loaded once, used in the loop."""
    if FAST:
        low, high = level_bytes(levels, 0)
        table = (low, high)  # type: ignore[assignment]
        if BITS == 3:
            low_4, high_4 = level_bytes(levels, 4)
            table = (low, low_4, high, high_4)  # type: ignore[assignment]
        if BITS == 4:
            low_4, high_4 = level_bytes(levels, 4)
            low_8, high_8 = level_bytes(levels, 8)
            low_12, high_12 = level_bytes(levels, 12)
            byte_numbers = per_lane(0x32103210)
            table = (low, low_4, low_8, low_12, high, high_4, high_8, high_12, byte_numbers)  # type: ignore[assignment]
    else:
        table = (tl.load(levels + tl.arange(0, 1 << BITS)),)  # type: ignore[assignment]
    return table


@triton.jit
def unit_levels(nibbles, table, BITS: tl.constexpr, FAST: tl.constexpr):
    """Levels of the codes in the eight nibbles of words: `[..., 8]` fp32, or if FAST `[..., 4]` pairs of fp16."""
    if FAST:
        if FAST == SHARED:
            a, b, c, d = pair_levels(nibbles, table[0])
        elif BITS == 4:
            a, b, c, d = tl.inline_asm_elementwise(
                _PTX_4,
                _IN_4,
                [
                    nibbles,
                    table[0],
                    table[1],
                    table[2],
                    table[3],
                    table[4],
                    table[5],
                    table[6],
                    table[7],
                    table[8],
                ],
                dtype=_FOUR_WORDS.value,
                is_pure=True,
                pack=1,
            )
        elif BITS == 3:
            a, b, c, d = tl.inline_asm_elementwise(
                _PTX_3,
                _IN_3,
                [nibbles, table[0], table[1], table[2], table[3]],
                dtype=_FOUR_WORDS.value,
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _PTX_2,
                _IN_2,
                [nibbles, table[0], table[1]],
                dtype=_FOUR_WORDS.value,
                is_pure=True,
                pack=1,
            )
        found = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [nibbles.shape[0], nibbles.shape[1], 4])
    else:
        codes = (nibbles[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
        flat = tl.gather(table[0], tl.reshape(codes, [codes.numel]), 0)
        found = tl.reshape(flat, codes.shape)
    return found


@triton.jit
def unpaired(pairs):
    """fp16 `[2 K, N]` of pairs `[K, N]`: neighbours along K shared a register."""
    low, high = tl.inline_asm_elementwise(
        "mov.b32 {$0,$1},$2;", "=h,=h,r", [pairs], dtype=_TWO_HALVES.value, is_pure=True, pack=1
    )
    both = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(both, [2 * pairs.shape[0], pairs.shape[1]])


@triton.jit
def paired(x):
    """Pairs `[K / 2, N]` int32 of fp16 `[K, N]`; the inverse of `unpaired`."""
    K: tl.constexpr = x.shape[0] // 2
    low, high = tl.split(tl.permute(tl.reshape(x, [K, 2, x.shape[1]]), (0, 2, 1)))
    bits_low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
    bits_high = high.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (bits_low | (bits_high << 16)).to(tl.int32, bitcast=True)
