"""Ask for memory ahead of its use, so that it waits in the second-level cache.

What a chunk reads later (values, outliers) and what the next one begins with is known when a chunk starts. Registers hold only a
block's words; the rest is asked for here, and costs one instruction for 128 bytes.
"""

import triton
import triton.language as tl

import os
_ASK = tl.constexpr("mov.b32 $0,0;" if os.environ.get("PF")=="no" else "{ .reg .pred p; setp.ne.s32 p,$2,0; @p prefetch.global.L2 [$1]; mov.b32 $0,0; }")
_LINE = tl.constexpr(128)  # bytes


@triton.jit
def ask_for(at, mask):
    """Bring the lines at pointers `at` to the second-level cache, where `mask` holds."""
    tl.inline_asm_elementwise(
        _ASK,
        "=r,l,r",
        [at, mask.to(tl.int32)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_for_words(words, block, blocks, stride, BLOCKS: tl.constexpr, WORDS: tl.constexpr):
    """Of a head, WORDS a block from `block` on, as many blocks as there are below `blocks` and at most BLOCKS."""
    LINES: tl.constexpr = WORDS // 32
    number, line = tl.arange(0, BLOCKS)[:, None], tl.arange(0, triton.next_power_of_2(LINES))[None, :]
    at = words + (block + number).to(tl.int64) * stride + line * 32
    ask_for(at, (block + number < blocks) & (line < LINES))


@triton.jit
def ask_for_list(first, begin, end, MOST: tl.constexpr):
    """Of an array of 2-byte elements those from `begin` to `end`, at most MOST of them."""
    line = tl.arange(0, MOST // 64)
    ask_for(first + begin + line * 64, begin + line * 64 < end)


_STAY = tl.constexpr(os.environ.get("STAY", "bar.warp.sync 0xffffffff; ") + "mov.b32 $0,$1;")


@triton.jit
def stay(number, QUICK: tl.constexpr):
    """`number`, after all that was loaded so far has been asked for: an assembler that saves registers loads late."""
    if QUICK:
        number = tl.inline_asm_elementwise(_STAY, "=r,r", [number], tl.int32, is_pure=False, pack=1)
    return number
