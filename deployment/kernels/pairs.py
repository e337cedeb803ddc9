"""Levels of two codes at once, from a table in shared memory: what 4 bits take instead of byte permutes.

Sixteen levels fill eight registers, and a permute sees two of them: more than two instructions a code. But two codes are a
byte, and shared memory answers each lane of a warp at an address of its own: a table of all 256 pairs of fp16 levels
gives two levels for one load, one permute that takes the byte out of a word, and one multiply-add for the address.

Shared memory has 32 banks, each of which answers one lane at a time, so random entries would make lanes wait for each other. The table
is therefore there COPIES times, interleaved: entry e of copy c lies at word e COPIES + c, and lane l asks copy l % COPIES. Two
lanes share a bank with 16 copies, none with 32.

Triton has no such table, so inline PTX writes it (`filled`, once in a kernel) and reads it (`pair_levels`).
"""

import triton
import triton.language as tl

from deployment.kernels.shared import shared_memory

_COPIES = 16
COPIES = tl.constexpr(_COPIES)
_ENTRY_BYTES = 4 * _COPIES
TABLE_BYTES = tl.constexpr(256 * _ENTRY_BYTES)


def _fill(copies: int) -> str:
    """PTX: all copies of entry $2 of the table at $1 become the pair $3."""
    text = f"{{ .reg .b32 a; mad.lo.u32 a,$2,{4 * copies},$1; "
    for first in range(0, copies, 4):
        text += f"st.shared.v4.b32 [a+{4 * first}],{{$3,$3,$3,$3}}; "
    return text + "mov.b32 $0,0; }"


def _find(copies: int) -> str:
    """PTX: $0 - $3 are the pairs at the four bytes of $4; $5 is the lane's copy."""
    text = "{ .reg .b32 a,b,c,d; "
    for i, name in enumerate("abcd"):
        text += f"prmt.b32 {name},$4,0,{0x4440 + i}; mad.lo.u32 {name},{name},{4 * copies},$5; "
    return text + "".join(f"ld.shared.b32 ${i},[{name}]; " for i, name in enumerate("abcd")) + "}"


_FILL = tl.constexpr(_fill(_COPIES))
_OWN = tl.constexpr(f"{{ .reg .b32 l; mov.u32 l,%laneid; and.b32 l,l,{_COPIES - 1}; mad.lo.u32 $0,l,4,$1; }}")
FIND = _find(_COPIES)
_FIND = tl.constexpr(FIND)
_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)


@triton.jit
def filled(levels):
    """A table of the pairs of 16 fp32 or fp16 `levels`, in shared memory; the address of this lane's copy."""
    table = shared_memory(TABLE_BYTES)
    entry = tl.arange(0, 256)
    low = tl.load(levels + entry % 16).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = tl.load(levels + entry // 16).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    pair = (low | (high << 16)).to(tl.int32, bitcast=True)
    tl.inline_asm_elementwise(_FILL, "=r,r,r,r", [table, entry, pair], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    # impure: nothing is looked up before it is written
    return tl.inline_asm_elementwise(_OWN, "=r,r", [table], tl.int32, is_pure=False, pack=1)


@triton.jit
def pair_levels(words, table):
    """Four pairs of levels, of the codes in the nibbles of every word."""
    return tl.inline_asm_elementwise(
        _FIND, "=&r,=&r,=&r,=&r,r,r", [words, table], dtype=_FOUR_WORDS.value, is_pure=True, pack=1
    )
