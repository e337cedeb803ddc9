"""Words on their way: blocks that come through the ring, how many fit, and whole steps by the path that GPUs take."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import all_pairs
from ptx import in_kernels
from test_kernels_attention import DEVICE, run_case

pytest.importorskip("triton")

import triton
import triton.language as tl

from deployment.kernels import packed
from deployment.kernels.lookup import PERMUTES, SHARED
from deployment.kernels.packed import DenseSegment, Segment, lookup_of, stages_of
from deployment.kernels.pairs import TABLE_BYTES
from deployment.kernels.ring import receive, ring_bytes, send, send_first
from deployment.kernels.schedule import Plan, chunk_tokens, weights_bytes
from deployment.kernels.shared import shared_memory
from deployment.kernels.tiles import block_words
from deployment.kernels.tuning import Tuning, tuned, tuning_of
from deployment.order import FragmentOrder, Role

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs take this path anyway")
ROLES: tuple[Role, ...] = ("key", "value")
DIMS, BITS = (64, 128, 256), (2, 3, 4)
ORDERS = [FragmentOrder(bits, 2, dim, role, DEVICE) for dim in DIMS for bits in BITS for role in ROLES]
BOTH = {"permutes": PERMUTES.value, "table": SHARED.value}


@triton.jit
def copied(out, at, BITS: tl.constexpr, GEOMETRY: tl.constexpr, holds):
    """Store the words that `block_words` gives as it gives them."""
    UNITS: tl.constexpr = GEOMETRY[3] * GEOMETRY[4] * GEOMETRY[6] * 32
    ROW: tl.constexpr = 8 * GEOMETRY[5]
    place = out + at * (3 * UNITS) + tl.arange(0, UNITS // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    tl.store(place, holds[0])
    tl.store(place + UNITS, holds[1])
    tl.store(place + 2 * UNITS, holds[2])


@triton.jit
def ring_kernel(
    words,
    stride,
    first,
    end,
    through,
    direct,
    left,
    BITS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks `first` to `end` through the ring, and as they are read from memory; then what the ring still holds."""
    ring = shared_memory(ring_bytes(BITS, GEOMETRY, STAGES))
    send_first(ring, words, stride, first, end, BITS, GEOMETRY, STAGES)
    at = words + first * stride
    for block in range(end - first):
        copied(through, block, BITS, GEOMETRY, receive(ring, block, words, BITS, GEOMETRY, STAGES, STAGES - 1))
        later = block + STAGES
        send(ring, later, at + later * stride, first + later < end, BITS, GEOMETRY, STAGES)
        copied(direct, block, BITS, GEOMETRY, block_words(at + block * stride, BITS, GEOMETRY))
    for block in range(tl.maximum(end - first - STAGES, 0), end - first):
        copied(left, block, BITS, GEOMETRY, receive(ring, block, words, BITS, GEOMETRY, STAGES, 0))


# every order of words with two blocks on their way; fewer and more where there are fewest words
@pytest.mark.parametrize(
    ("order", "stages"),
    all_pairs(ORDERS, [1, 2, 4], lambda order, stages: stages == 2 or order.head_dim == 64),
    ids=lambda x: f"{x.role}-{x.bits}-{x.head_dim}" if isinstance(x, FragmentOrder) else None,
)
def test_blocks_come_as_they_would_be_read(order: FragmentOrder, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = None if DEVICE.type == "cuda" else in_kernels(monkeypatch)
    constants, warps = order.geometry.constants(), order.geometry.warps
    head = order.head_dim * 2 * order.bits
    generator = torch.Generator().manual_seed(order.bits)
    words = torch.randint(-(2**31), 2**31, (7, order.words), generator=generator).int().to(DEVICE)
    for first, end in ((2, 7), (4, 7), (2, 5)):
        count = end - first
        outputs = [torch.zeros(count, 3, order.geometry.units, dtype=torch.int32, device=DEVICE) for _ in range(3)]
        if shared is not None:
            shared.clear()
        arguments = (words[:, head:], order.words, first, end, *outputs, order.bits, constants, stages)
        ring_kernel[(1,)](*arguments, num_warps=warps)
        through, direct, left = outputs
        planes = words[first:end, head : 2 * head].view(count, -1, order.geometry.units)
        assert torch.equal(direct, planes if order.bits == 3 else planes.expand(-1, 3, -1))
        assert torch.equal(through, direct)
        # blocks from the end on are not wanted, and take the place of none
        held = min(stages, count)
        assert torch.equal(left[-held:], direct[-held:])
        assert shared is None or 4 * len(shared) == ring_bytes(order.bits, constants, held) == held * 4 * head


def fast(keys: int | None, values: int | None) -> Any:
    """As `packed._fast` for a GPU; `keys` and `values` as of KEY_FAST and VALUE_FAST, None for its own choice."""

    def chosen(segment: Segment, precise: bool, plan: Plan, tuning: Tuning) -> dict[str, int]:
        found = {"KEY_FAST": 0, "VALUE_FAST": 0, "KEY_STAGES": 0, "VALUE_STAGES": 0}
        if isinstance(segment, DenseSegment) or precise:
            return found
        for side, order, lookup in (("KEY", segment.key.order, keys), ("VALUE", segment.value.order, values)):
            assert isinstance(order, FragmentOrder)
            found[f"{side}_FAST"] = lookup_of(order) if lookup is None else lookup
            found[f"{side}_STAGES"] = stages_of(order, plan.rows, plan.chunk, tuning)
            seen.append(found[f"{side}_STAGES"])
        return found

    seen: list[int] = []
    chosen.stages = seen  # type: ignore[attr-defined]
    return chosen


def fast_case(patch: pytest.MonkeyPatch, keys: int | None = None, values: int | None = None, **case: Any) -> list[int]:
    """Check a step by the fast path; how many blocks were on their way."""
    in_kernels(patch)
    patch.setattr(packed, "_fast", way := fast(keys, values))
    assert 0 < run_case(**case) < 3e-3
    assert way.stages and min(way.stages) > 0
    return way.stages


@interpreted
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (2, 4), pytest.param((4, 2), marks=pytest.mark.slow)])
def test_steps_as_gpus_take_them(
    bits: tuple[int, int], heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_case(monkeypatch, bits=bits, heads=heads, lengths=(130,), share=0.02)


@interpreted
@pytest.mark.parametrize(
    "bits", [(2, 2), pytest.param((3, 3), marks=pytest.mark.slow), pytest.param((4, 4), marks=pytest.mark.slow), (3, 2)]
)
@pytest.mark.parametrize(("keys", "values"), list(itertools.product(BOTH, BOTH)))
def test_either_lookup_of_either_side(
    bits: tuple[int, int], keys: str, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tables for both sides, keys and values take turns."""
    fast_case(monkeypatch, BOTH[keys], BOTH[values], bits=bits, heads=(1, 1), lengths=(130,), share=0.02)


@interpreted
@pytest.mark.parametrize(("dim", "bits"), [(128, (4, 4)), (128, (3, 2)), (256, (2, 3))])
def test_larger_heads(dim: int, bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fast_case(monkeypatch, bits=bits, heads=(1, 1), dim=dim, lengths=(70,), share=0.02)


@interpreted
@pytest.mark.parametrize(
    ("chunk", "stages", "length"), [pytest.param(256, 2, 700, marks=pytest.mark.slow), (128, 4, 450), (128, 1, 300)]
)
@pytest.mark.parametrize("bits", [(3, 3), (4, 2)])
def test_chunks_follow_each_other_in_the_ring(
    chunk: int, stages: int, length: int, bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs of several chunks each, of more blocks than are on their way, or fewer; the last one is short."""
    with tuned(chunk=chunk, stages=stages, waves=1):
        plan = Plan.of(1, 1, [length], 64, DEVICE)
        assert (plan.chunk, plan.splits) == (chunk, [2]) and length > 2 * chunk and length % chunk
        used = fast_case(monkeypatch, bits=bits, heads=(1, 1), lengths=(length,), share=0.02)
        assert set(used) == {stages}


@interpreted
def test_sequences_of_different_lengths_and_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_case(monkeypatch, bits=(3, 3), heads=(2, 1), lengths=(0, 1, 130), new=3, share=0.02)


@pytest.mark.parametrize("rows", range(1, 17))
def test_shared_memory_has_room_for_table_weights_and_ring(rows: int) -> None:
    tuning = tuning_of(torch.device("cpu"))
    for order, stages in itertools.product(ORDERS, (1, 2, 4, 8, 64)):
        limited = Tuning(**{**vars(tuning), "stages": stages})
        for chunk in chunks_of(rows, tuning):
            found = stages_of(order, rows, chunk, limited)
            used = TABLE_BYTES.value + weights_bytes(rows, chunk)
            assert 0 <= found <= stages and found & (found - 1) == 0
            constants = order.geometry.constants()
            assert used + ring_bytes(order.bits, constants, found) <= 48 * 1024
            twice = max(1, 2 * found)
            # as many as there is room for
            assert twice > stages or used + ring_bytes(order.bits, constants, twice) > 48 * 1024


def chunks_of(rows: int, tuning: Tuning) -> Sequence[int]:
    return sorted({chunk_tokens(rows, part, dim, tuning) for part in (1, 300, 10**6) for dim in DIMS})
