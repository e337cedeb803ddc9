"""Sums that lanes add to as they come: in memory, by atomic additions, or in shared memory.

The second-level cache, where atomic additions to memory are done, takes about as many in a clock as it has slices, for
the whole GPU: ten million of them, as 1 % of a large layer, take it longer than all else. In shared memory each
multiprocessor adds for itself. For whole numbers it has an instruction; for fp32 the assembler makes a loop that reads, adds, and
writes if nobody else did. Scores are therefore sums of whole UNITs, 2^-14 of a doubled weight: finer than fp16 products, and 2^17 at
most. Outputs, whose size nobody knows beforehand, are sums of fp32.

A place is a pointer, or an address in shared memory (SHARED; shared.py); indices count numbers.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-14)

_CLEAR = tl.constexpr("{ .reg .b32 z; mov.b32 z,0; st.shared.v4.b32 [$1],{z,z,z,z}; mov.b32 $0,0; }")
_ADD = tl.constexpr("red.shared.add.f32 [$1],$2; mov.b32 $0,0;")
_ADD_UNITS = tl.constexpr("{ .reg .b32 n; cvt.rni.s32.f32 n,$2; red.shared.add.u32 [$1],n; mov.b32 $0,0; }")
_READ = tl.constexpr("ld.shared.b32 $0,[$1];")
_WRITE = tl.constexpr("st.shared.b32 [$1],$2; mov.b32 $0,0;")


@triton.jit
def clear(at, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """COUNT sums from `at` on become 0; a power of two, of multiples of 16 bytes."""
    if SHARED:
        four = at + 16 * tl.arange(0, COUNT // 4)
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [four], tl.int32, is_pure=False, pack=1)
    else:
        tl.store(at + tl.arange(0, COUNT), tl.zeros([COUNT], tl.float32))


@triton.jit
def add(at, index, x, SHARED: tl.constexpr):
    """Add `x` to the sums `index`. If SHARED, tiles must have as many numbers as lanes, or whole multiples: Triton repeats smaller ones."""
    if SHARED:
        bits = x.to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(_ADD, "=r,r,r", [at + 4 * index, bits], tl.int32, is_pure=False, pack=1)
    else:
        tl.atomic_add(at + index, x, sem="relaxed")


@triton.jit
def add_units(at, index, x):
    """Add `x`, rounded, to the whole sums `index` in shared memory; tiles as of `add`."""
    bits = x.to(tl.int32, bitcast=True)
    tl.inline_asm_elementwise(_ADD_UNITS, "=r,r,r", [at + 4 * index, bits], tl.int32, is_pure=False, pack=1)


@triton.jit
def read_units(at, index):
    """The whole sums `index` in shared memory, times UNIT, fp32."""
    count = tl.inline_asm_elementwise(_READ, "=r,r", [at + 4 * index], tl.int32, is_pure=False, pack=1)
    return count.to(tl.float32) * UNIT


@triton.jit
def read(at, index, SHARED: tl.constexpr):
    """The sums `index`."""
    if SHARED:
        bits = tl.inline_asm_elementwise(_READ, "=r,r", [at + 4 * index], tl.int32, is_pure=False, pack=1)
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = tl.load(at + index, cache_modifier=".cg")
    return x


@triton.jit
def write(at, index, x, SHARED: tl.constexpr):
    """The sums `index` become `x`."""
    if SHARED:
        bits = x.to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(_WRITE, "=r,r,r", [at + 4 * index, bits], tl.int32, is_pure=False, pack=1)
    else:
        tl.store(at + index, x)
