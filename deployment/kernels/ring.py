"""Words on their way: a ring of blocks in shared memory, filled by copies that run ahead of their use.

Memory answers after a thousand cycles or more, as long as a program takes for several blocks. Registers hold the words of one block; the
next STAGES are on their way to shared memory meanwhile, by `cp.async`, which needs neither registers nor instructions until the
words are used. Every lane copies what it will read itself, so that no lane waits for another: a copy belongs to a group, and a lane
waits for its own oldest group.

Copies are in inline PTX (Triton would have them only where it pipelines a loop by itself, with barriers). Blocks are numbered; block j lies in
slot j % STAGES. Each block has a group, an empty one if there is nothing to copy, so that the number of groups tells which is done.
"""

import triton
import triton.language as tl

from deployment.kernels.tiles import FRAGMENT_ORDER, block_words

_COPY_16 = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p,$3,0; @p cp.async.cg.shared.global [$1],[$2],16; mov.b32 $0,0; }"
)
_COPY_8 = tl.constexpr("{ .reg .pred p; setp.ne.s32 p,$3,0; @p cp.async.ca.shared.global [$1],[$2],8; mov.b32 $0,0; }")
_COPY_4 = tl.constexpr("{ .reg .pred p; setp.ne.s32 p,$3,0; @p cp.async.ca.shared.global [$1],[$2],4; mov.b32 $0,0; }")
_COMMIT = tl.constexpr("cp.async.commit_group; mov.b32 $0,$1;")
_READ_FOUR = tl.constexpr("ld.shared.v4.b32 {$0,$1,$2,$3},[$4];")
_READ_ONE = tl.constexpr("ld.shared.b32 $0,[$1];")
_READ_TWO = tl.constexpr("ld.shared.v2.b32 {$0,$1},[$2];")
_FOUR_WORDS = tl.constexpr((tl.int32,) * 4)
_TWO_WORDS = tl.constexpr((tl.int32,) * 2)


@triton.constexpr_function
def ring_bytes(bits: int, geometry: tuple[int, ...], stages: int) -> int:
    """Shared memory of a ring of blocks of a head in fragment order; `geometry` as `Fragment.constants`."""
    return stages * slot_bytes(bits, geometry) if stages else 0


@triton.constexpr_function
def slot_bytes(bits: int, geometry: tuple[int, ...]) -> int:
    """Of one block: 4 bytes for each of the words of all units."""
    _, _, _, tiles_n, tiles_k, _, warps = geometry
    return 4 * 32 * warps * tiles_n * tiles_k * (3 if bits == 3 else 1)


@triton.constexpr_function
def _waiting(groups: int) -> str:
    """PTX: wait until so many groups, or fewer, are on their way."""
    return f"cp.async.wait_group {groups}; mov.b32 $0,$1;"


@triton.jit
def send(ring, block, at, wanted, BITS: tl.constexpr, GEOMETRY: tl.constexpr, STAGES: tl.constexpr):
    """Let the words at `at`, of block number `block` of a head, come to the ring, if `wanted`."""
    VECTOR: tl.constexpr = GEOMETRY[5]
    LANES: tl.constexpr = 32 * GEOMETRY[6]
    PIECES: tl.constexpr = slot_bytes(BITS, GEOMETRY) // (4 * VECTOR * LANES)
    lane = tl.arange(0, LANES)
    to = ring + (block & (STAGES - 1)) * slot_bytes(BITS, GEOMETRY) + lane * (4 * VECTOR)
    source = at + lane * VECTOR
    mask = tl.full([LANES], 1, tl.int32) * wanted.to(tl.int32)
    for piece in tl.static_range(PIECES):
        far = piece * LANES * VECTOR
        if VECTOR == 4:
            tl.inline_asm_elementwise(
                _COPY_16, "=r,r,l,r", [to + 4 * far, source + far, mask], tl.int32, is_pure=False, pack=1
            )
        elif VECTOR == 2:
            tl.inline_asm_elementwise(
                _COPY_8, "=r,r,l,r", [to + 4 * far, source + far, mask], tl.int32, is_pure=False, pack=1
            )
        else:
            tl.inline_asm_elementwise(
                _COPY_4, "=r,r,l,r", [to + 4 * far, source + far, mask], tl.int32, is_pure=False, pack=1
            )
    tl.inline_asm_elementwise(_COMMIT, "=r,r", [block], tl.int32, is_pure=False, pack=1)


@triton.jit
def send_first(ring, words, stride, first, end, BITS: tl.constexpr, GEOMETRY: tl.constexpr, STAGES: tl.constexpr):
    """Send the first STAGES blocks of a head from block `first` on, those below `end`, as numbers 0, 1, ..."""
    at = words + first.to(tl.int64) * stride
    for block in tl.static_range(STAGES):
        send(ring, block, at + block * stride, first + block < end, BITS, GEOMETRY, STAGES)


@triton.jit
def receive(ring, block, words, BITS: tl.constexpr, GEOMETRY: tl.constexpr, STAGES: tl.constexpr, AFTER: tl.constexpr):
    """Wait for a block, after which AFTER have been sent and not more; its words as `block_words` has them.

    words: pointer to the words of any block.
    """
    VECTOR: tl.constexpr = GEOMETRY[5]
    LANES: tl.constexpr = 32 * GEOMETRY[6]
    REPEATS: tl.constexpr = GEOMETRY[3] * GEOMETRY[4] // VECTOR
    WAIT: tl.constexpr = _waiting(AFTER)
    block = tl.inline_asm_elementwise(WAIT, "=r,r", [block], tl.int32, is_pure=False, pack=1)
    at = ring + (block & (STAGES - 1)) * slot_bytes(BITS, GEOMETRY) + tl.arange(0, LANES) * (4 * VECTOR)
    PLANE: tl.constexpr = 4 * LANES * VECTOR * REPEATS
    first = lane_words(at, words, LANES, VECTOR, REPEATS)
    second, third = first, first
    if BITS == 3:
        second = lane_words(at + PLANE, words, LANES, VECTOR, REPEATS)
        third = lane_words(at + 2 * PLANE, words, LANES, VECTOR, REPEATS)
    return first, second, third


@triton.jit
def words_of(
    ring,
    block,
    words,
    at,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Words of a block in fragment order: received if STAGES > 0 (all of a chunk have been sent if WHOLE), else read at `at`."""
    if STAGES > 0:
        held = receive(ring, block, words, BITS, GEOMETRY, STAGES, 0 if WHOLE else STAGES - 1)
    elif SOURCE == FRAGMENT_ORDER:
        held = block_words(at, BITS, GEOMETRY)
    else:
        held = (0, 0, 0)
    return held


@triton.jit
def lane_words(at, source, LANES: tl.constexpr, VECTOR: tl.constexpr, REPEATS: tl.constexpr):
    """VECTOR words at `at` `[LANES]`, and REPEATS (1 or 2) times as many: `[REPEATS LANES / 8, 8 VECTOR]`."""
    words = vector_words(at, LANES, VECTOR)
    if REPEATS == 2:
        words = tl.permute(tl.join(words, vector_words(at + 4 * LANES * VECTOR, LANES, VECTOR)), (2, 0, 1))
    ROWS: tl.constexpr = REPEATS * LANES // 8
    ROW: tl.constexpr = 8 * VECTOR
    place = tl.arange(0, ROWS)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    # a load that never happens, and that the assembler drops: Triton takes its layout of words from loads, and without one lays these out
    # so that operands have to go through shared memory
    never = (place & 0) > tl.program_id(0)
    like = tl.load(source + place, mask=never, other=0)
    return tl.reshape(words, [ROWS, ROW]) | like


@triton.jit
def vector_words(at, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """`[LANES, VECTOR]` int32, neighbours in shared memory."""
    if VECTOR == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            _READ_FOUR, "=r,=r,=r,=r,r", [at], dtype=_FOUR_WORDS.value, is_pure=False, pack=1
        )
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [LANES, 4])
    elif VECTOR == 2:
        a, b = tl.inline_asm_elementwise(_READ_TWO, "=r,=r,r", [at], dtype=_TWO_WORDS.value, is_pure=False, pack=1)
        words = tl.join(a, b)
    else:
        words = tl.inline_asm_elementwise(_READ_ONE, "=r,r", [at], tl.int32, is_pure=False, pack=1)[:, None]
    return words
