"""Levels of all codes of a byte at once, from a table in shared memory.

A byte permute finds one byte of four levels, so that a level takes an instruction and more, all of them on the same slow pipe. But a byte
is two codes of 3 or 4 bits, or four of 2, and shared memory answers each lane of a warp at an address of its own: a table
with an entry for every byte gives two or four fp16 levels for two instructions, a product of bytes that makes the address
(`dp4a`, which takes any byte of a word) and a load.

Shared memory has 32 banks, each of which answers one lane at a time, so random entries would make lanes wait for each other. The table
is therefore there once for every lane, interleaved: an entry takes 128 bytes, and lane l reads its own 4 of them; of 2 bits, whose
entries of 8 bytes are read by half a warp at a time, lanes l and l + 16 read the same 8.

That is 32 KiB, too much for one table of keys and one of values. So where both need one they take turns, and fill it (`fill`) before each phase
of a chunk. Triton has no such table: inline PTX writes and reads it.
"""

import triton
import triton.language as tl

from deployment.kernels.shared import shared_memory

_ENTRY_BYTES = 128
TABLE_BYTES = tl.constexpr(256 * _ENTRY_BYTES)


def _fill() -> str:
    """PTX: all of entry $2 of the table at $1 become the words $3 and $4 in turn; lanes begin at different banks."""
    text = f"{{ .reg .b32 l,a,b; mov.u32 l,%laneid; and.b32 l,l,7; mad.lo.u32 a,$2,{_ENTRY_BYTES},$1; mad.lo.u32 a,l,16,a; "
    for i in range(_ENTRY_BYTES // 16):
        text += f"xor.b32 b,a,{16 * i}; st.shared.v4.b32 [b],{{$3,$4,$3,$4}}; "
    return text + "mov.b32 $0,0; }"


def _find(words: int) -> str:
    """PTX: the first registers are the entries, of so many words, of the four bytes of the word after them; then the lane's own address."""
    outputs = 4 * words
    text = "{ .reg .b32 a,b,c,d; "
    for i, name in enumerate("abcd"):
        text += f"dp4a.u32.u32 {name},${outputs},{_ENTRY_BYTES << (8 * i):#010x},${outputs + 1}; "
    for i, name in enumerate("abcd"):
        if words == 1:
            text += f"ld.shared.b32 ${i},[{name}]; "
        else:
            text += f"ld.shared.v2.b32 {{${2 * i},${2 * i + 1}}},[{name}]; "
    return text + "}"


FILL = _fill()
FIND = {bits: _find(2 if bits == 2 else 1) for bits in (2, 3, 4)}
_FILL = tl.constexpr(FILL)
_FIND_ONE, _FIND_TWO = tl.constexpr(FIND[4]), tl.constexpr(FIND[2])
OWN = {
    bits: f"{{ .reg .b32 l; mov.u32 l,%laneid; and.b32 l,l,{15 if bits == 2 else 31}; mad.lo.u32 $0,l,{8 if bits == 2 else 4},$1; }}"
    for bits in (2, 3, 4)
}
_OWN_ONE, _OWN_TWO = tl.constexpr(OWN[4]), tl.constexpr(OWN[2])
_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
_EIGHT_WORDS = tl.constexpr((tl.int32,) * 8)


@triton.jit
def table_memory():
    """Address of memory for a table; outside of loops, as `shared_memory`."""
    return shared_memory(TABLE_BYTES)


@triton.jit
def own_entries(memory, BITS: tl.constexpr):
    """Where this lane finds its copy of the table's entries."""
    if BITS == 2:
        own = tl.inline_asm_elementwise(_OWN_TWO, "=r,r", [memory], tl.int32, is_pure=True, pack=1)
    else:
        own = tl.inline_asm_elementwise(_OWN_ONE, "=r,r", [memory], tl.int32, is_pure=True, pack=1)
    return own


@triton.jit
def fill(memory, entries):
    """Write the table of `Tables.bytes`; all lanes must be done with reading the last one, and wait until it is written."""
    byte = tl.arange(0, 256)
    one, two = tl.load(entries + byte), tl.load(entries + 256 + byte)
    tl.inline_asm_elementwise(_FILL, "=r,r,r,r,r", [memory, byte, one, two], tl.int32, is_pure=False, pack=1)


@triton.jit
def pair_levels(words, own):
    """Four pairs of levels, of the codes in the nibbles of every word."""
    return tl.inline_asm_elementwise(
        _FIND_ONE, "=&r,=&r,=&r,=&r,r,r", [words, own], dtype=_FOUR_WORDS.value, is_pure=True, pack=1
    )


@triton.jit
def quad_levels(words, own):
    """Eight pairs of levels, of the codes in the nibbles of every word of 2-bit codes: of low halves, high halves, low halves, ..."""
    return tl.inline_asm_elementwise(
        _FIND_TWO,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words, own],
        dtype=_EIGHT_WORDS.value,
        is_pure=True,
        pack=1,
    )
