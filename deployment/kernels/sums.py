"""Sums that lanes add to as they come: in memory, by atomic additions, or in shared memory.

The second-level cache, where atomic additions to memory are done, takes about as many in a clock as it has slices, for
the whole GPU: ten million of them, as 1 % of a large layer, take it longer than all else. In shared memory each
multiprocessor adds for itself. It has no such instruction for fp32, though, so that the assembler makes a loop that reads, adds, and
writes if nobody else did.

A place is a pointer, or an address in shared memory (SHARED; shared.py); indices count numbers, fp32.
"""

import triton
import triton.language as tl

_CLEAR = tl.constexpr("{ .reg .b32 z; mov.b32 z,0; st.shared.v4.b32 [$1],{z,z,z,z}; mov.b32 $0,0; }")
_ADD = tl.constexpr("red.shared.add.f32 [$1],$2; mov.b32 $0,0;")
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
