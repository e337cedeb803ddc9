"""Levels of codes: a readable way that any device runs, and a fast one of byte permutes, for fp16 tiles in fragment order.

`unit_levels` is the function that chooses. Both start from words whose eight nibbles hold a code each. A byte permute
(`prmt`) takes four bytes out of eight by the lower three bits of four nibbles, so that up to 16 levels fit eight
registers: one per four levels and half of their fp16 numbers. Neither shared memory nor another lane is asked.
"""

import triton
import triton.language as tl

_PAIRS = "prmt.b32 p,x,z,0x5140; mov.b32 {{${0},${1}}},p; prmt.b32 p,x,z,0x7362; mov.b32 {{${2},${3}}},p; "


def _permutes(bits: int) -> str:
    """PTX: $0 - $7 are the fp16 levels of the codes in the nibbles of $8; then low bytes of levels, then high bytes."""
    tables = max(1, 2**bits // 4)
    low, high = ([f"${9 + side * tables + i}" for i in range(tables)] for side in (0, 1))
    text = "{ .reg .b32 s,m,t,x,y,z,p; "
    text += "and.b32 s,$8,0x77777777; " if bits == 4 else "mov.b32 s,$8; "
    if bits == 4:  # the fourth bit chooses between two permutes of the lower three
        text += "shr.u32 t,$8,1; and.b32 t,t,0x44444444; or.b32 m,t,0x32103210; "
    for quarter in range(2):
        if quarter:
            text += "shr.u32 s,s,16; " + ("shr.u32 m,m,16; " if bits == 4 else "")
        for name, table in (("x", low), ("z", high)):
            text += f"prmt.b32 {name},{table[0]},{table[min(1, tables - 1)]},s; "
            if bits == 4:
                text += f"prmt.b32 y,{table[2]},{table[3]},s; prmt.b32 {name},{name},y,m; "
        text += _PAIRS.format(*range(4 * quarter, 4 * quarter + 4))
    return text + "}"


def _constraints(bits: int) -> str:
    return ",".join(["=h"] * 8 + ["r"] * (1 + 2 * max(1, 2**bits // 4)))


PTX = {bits: _permutes(bits) for bits in (2, 3, 4)}
_PTX_2, _PTX_3, _PTX_4 = (tl.constexpr(PTX[bits]) for bits in (2, 3, 4))
_IN_2, _IN_3, _IN_4 = (tl.constexpr(_constraints(bits)) for bits in (2, 3, 4))
_HALVES = tl.constexpr((tl.float16,) * 8)


@triton.jit
def level_bytes(levels, FIRST: tl.constexpr):
    """(low, high): the low and the high bytes of four fp16 levels from FIRST on, a word each."""
    low = 0
    high = 0
    for i in tl.static_range(4):
        number = tl.load(levels + FIRST + i).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        low |= (number & 255) << (8 * i)
        high |= (number >> 8) << (8 * i)
    return low, high


@triton.jit
def prepared(levels, BITS: tl.constexpr, FAST: tl.constexpr):
    """What `unit_levels` looks levels up in: loaded once, used in the loop."""
    if FAST:
        low, high = level_bytes(levels, 0)
        table = (low, high)
        if BITS == 3:
            low_4, high_4 = level_bytes(levels, 4)
            table = (low, low_4, high, high_4)  # type: ignore[assignment]
        if BITS == 4:
            low_4, high_4 = level_bytes(levels, 4)
            low_8, high_8 = level_bytes(levels, 8)
            low_12, high_12 = level_bytes(levels, 12)
            table = (low, low_4, low_8, low_12, high, high_4, high_8, high_12)  # type: ignore[assignment]
    else:
        table = (tl.load(levels + tl.arange(0, 1 << BITS)),)  # type: ignore[assignment]
    return table


@triton.jit
def unit_levels(nibbles, table, BITS: tl.constexpr, FAST: tl.constexpr):
    """Levels `[..., 8]` of the codes in the eight nibbles of words; fp16 if FAST, else fp32."""
    if FAST:
        if BITS == 4:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _PTX_4,
                _IN_4,
                [nibbles, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
                dtype=_HALVES.value,
                is_pure=True,
                pack=1,
            )
        elif BITS == 3:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _PTX_3,
                _IN_3,
                [nibbles, table[0], table[1], table[2], table[3]],
                dtype=_HALVES.value,
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _PTX_2,
                _IN_2,
                [nibbles, table[0], table[1]],
                dtype=_HALVES.value,
                is_pure=True,
                pack=1,
            )
        even = tl.join(tl.join(a, e), tl.join(c, g))
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        found = tl.reshape(tl.join(even, odd), [nibbles.shape[0], nibbles.shape[1], 8])
    else:
        codes = (nibbles[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
        flat = tl.gather(table[0], tl.reshape(codes, [codes.numel]), 0)
        found = tl.reshape(flat, codes.shape)
    return found
