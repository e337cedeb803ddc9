"""Ask for memory ahead of its use, so that it waits in the second-level cache.

Which outliers a chunk will read is known when it starts. Asking for them costs one instruction for 128 bytes. (Words come by another way, ring.py.)
"""

import triton
import triton.language as tl

_ASK = tl.constexpr("{ .reg .pred p; setp.ne.s32 p,$2,0; @p prefetch.global.L2 [$1]; mov.b32 $0,0; }")
_LINE_HALVES = tl.constexpr(64)


@triton.jit
def ask_for(at, mask):
    """Bring the lines at pointers `at` to the second-level cache, where `mask` holds."""
    tl.inline_asm_elementwise(_ASK, "=r,l,r", [at, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1)


@triton.jit
def ask_for_list(index, value, begin, end, MOST: tl.constexpr):
    """Of two arrays of 2-byte elements those from `begin` to `end`, at most MOST of them."""
    at = begin + tl.arange(0, MOST // _LINE_HALVES) * _LINE_HALVES
    ask_for(index + at, at < end)
    ask_for(value + at, at < end)
