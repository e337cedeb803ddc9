"""The kernels' inline PTX, in Python: lookups against the levels, for every code in every place; the rotation; lanes."""

import numpy as np
import pytest
import torch
from ptx import in_kernels, run_ptx

pytest.importorskip("triton")

import triton
import triton.language as tl

from deployment.kernels import keys, lookup, pairs
from deployment.kernels.lookup import PTX
from deployment.kernels.shared import _declared as declared_jit


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_byte_permutes_are_the_lookup(bits: int) -> None:
    count = 2**bits
    levels = torch.randn(count, generator=torch.Generator().manual_seed(bits)).half()
    numbers = [number & 0xFFFF for number in levels.view(torch.int16).tolist()]
    words = [
        sum((numbers[4 * group + i] >> (8 * side) & 255) << (8 * i) for i in range(4))
        for side in (0, 1)
        for group in range(count // 4)
    ]
    tables = {f"${5 + i}": word for i, word in enumerate([*words, 0x32103210])}
    for first in range(count):
        for second in range(count):  # every pair of codes, in all neighbouring nibbles
            codes = [first, second, second, first, first, first, second, (first + second) % count]
            nibbles = sum(code << (4 * i) for i, code in enumerate(codes))
            found = run_ptx(PTX[bits], {"$4": nibbles, **tables})
            pairs = [numbers[a] | numbers[b] << 16 for a, b in zip(codes[::2], codes[1::2], strict=True)]
            assert [found[f"${i}"] for i in range(4)] == pairs


def test_a_pair_is_scaled_and_rotated_and_zeros_added() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        a, b, cos_a, sin_b, cos_b, sin_a, plus_a, plus_b = numbers = torch.randn(8, 2, generator=generator).half()
        words = {f"${2 + i}": int(pair.view(torch.int32)) & 0xFFFFFFFF for i, pair in enumerate(numbers)}
        found = run_ptx(keys._TURN.value, words)
        expected = (
            a * cos_a.double() + b * sin_b.double() + plus_a.double(),
            b * cos_b.double() + a * sin_a.double() + plus_b.double(),
        )
        for i in range(2):
            pair = torch.tensor(np.array([found[f"${i}"]], dtype=np.uint32).view(np.float16))
            # the first sum is rounded before the second product is added, and that again
            torch.testing.assert_close(pair.double(), expected[i], rtol=1e-3, atol=4e-3)


def test_every_lane_gets_the_word_itself() -> None:
    for lane in range(32):
        registers = {"%lanemask_lt": (1 << lane) - 1, "%lanemask_le": (2 << lane) - 1, "$1": 0x12345678}
        assert run_ptx(lookup._PER_LANE.value, registers)["$0"] == 0x12345678


def filled_table(numbers: list[int]) -> tuple[int, dict[int, int]]:
    """(address, shared memory) of the table of pairs of 16 fp16 numbers, as `pairs.filled` writes it."""
    shared: dict[int, int] = {}
    table = run_ptx(declared_jit(pairs.TABLE_BYTES.value), {"$1": 0})["$0"]
    for entry in range(256):
        pair = numbers[entry % 16] | numbers[entry // 16] << 16
        run_ptx(pairs._FILL.value, {"$1": table, "$2": entry, "$3": pair}, shared)
    return table, shared


def own_copy(table: int, lane: int) -> int:
    return run_ptx(pairs._OWN.value, {"$1": table, "%laneid": lane})["$0"]


def test_pairs_of_levels_are_those_of_every_byte_for_every_lane() -> None:
    levels = torch.randn(16, generator=torch.Generator().manual_seed(4)).half()
    numbers = [number & 0xFFFF for number in levels.view(torch.int16).tolist()]
    assert len(set(numbers)) == 16
    table, shared = filled_table(numbers)
    assert sorted(shared) == list(range(table, table + pairs.TABLE_BYTES.value, 4))
    for lane in range(32):
        own = own_copy(table, lane)
        for first in range(256):  # every byte, in every place of a word
            codes = [(first + 85 * i) % 256 for i in range(4)]
            word = int.from_bytes(bytes(codes), "little")
            found = run_ptx(pairs.FIND, {"$4": word, "$5": own}, shared)
            expected = [numbers[code & 15] | numbers[code >> 4] << 16 for code in codes]
            assert [found[f"${i}"] for i in range(4)] == expected


def test_lanes_of_different_copies_share_no_bank() -> None:
    copies = pairs._COPIES
    table = run_ptx(declared_jit(pairs.TABLE_BYTES.value), {"$1": 0})["$0"]
    assert table % 128 == 0 and pairs.COPIES.value == copies and 32 % copies == 0
    # a word of this memory is its own address, so what is found is where it was
    shared = {at: at for at in range(table, table + pairs.TABLE_BYTES.value, 4)}
    banks: list[set[int]] = []
    for lane in range(32):
        words = [{"$4": int.from_bytes(bytes(range(i, i + 4)), "little")} for i in range(0, 256, 4)]
        found = [run_ptx(pairs.FIND, {**word, "$5": own_copy(table, lane)}, shared) for word in words]
        at = [run[f"${i}"] for run in found for i in range(4)]
        assert at == [table + 4 * (code * copies + lane % copies) for code in range(256)]
        banks.append({address // 4 % 32 for address in at})
    for lane in range(32):
        for other in range(32):
            assert banks[lane].isdisjoint(banks[other]) == (lane % copies != other % copies)


@triton.jit
def pairs_kernel(levels, words, found):
    place = tl.arange(0, 64)
    a, b, c, d = pairs.pair_levels(tl.load(words + place), pairs.filled(levels))
    tl.store(found + 4 * place, a)
    tl.store(found + 4 * place + 1, b)
    tl.store(found + 4 * place + 2, c)
    tl.store(found + 4 * place + 3, d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_fill_the_table_and_look_pairs_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        in_kernels(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    levels = torch.randn(16, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    codes = torch.randperm(256, generator=torch.Generator().manual_seed(6)).to(device, torch.uint8)
    found = torch.empty(256, dtype=torch.int32, device=device)
    pairs_kernel[(1,)](levels, codes.view(torch.int32), found)
    expected = torch.stack([levels.half()[(codes & 15).int()], levels.half()[(codes >> 4).int()]], 1)
    assert torch.equal(found.view(torch.float16).view(256, 2), expected)
