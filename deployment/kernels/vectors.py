"""Neighbours in memory, in one load where a compiled kernel may say so.

Triton itself loads several numbers at once only if they are neighbours along an axis of one tile, and then leaves them
in one register each of whichever lane it likes; here every lane gets all that lie at its own place.
"""

import triton
import triton.language as tl

_TWO_WORDS = tl.constexpr((tl.int32,) * 2)
_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
_LOAD_TWO = tl.constexpr("ld.global.v2.b32 {$0,$1},[$2];")
_LOAD_FOUR = tl.constexpr("ld.global.v4.b32 {$0,$1,$2,$3},[$4];")


@triton.jit
def two_floats(at, QUICK: tl.constexpr):
    """fp32 at pointers `at`, multiples of 8 bytes, and behind; QUICK: inline PTX, of a GPU."""
    if QUICK:
        a, b = tl.inline_asm_elementwise(_LOAD_TWO, "=r,=r,l", [at], dtype=_TWO_WORDS.value, is_pure=False, pack=1)
        a, b = a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    else:
        a, b = tl.load(at), tl.load(at + 1)
    return a, b


@triton.jit
def four_floats(at, QUICK: tl.constexpr):
    """fp32 at pointers `at`, multiples of 16 bytes, and the three behind; QUICK: inline PTX, of a GPU."""
    if QUICK:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOAD_FOUR, "=r,=r,=r,=r,l", [at], dtype=_FOUR_WORDS.value, is_pure=False, pack=1
        )
        a, b = a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
        c, d = c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True)
    else:
        a, b, c, d = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return a, b, c, d
