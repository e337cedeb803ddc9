"""The kernels' inline PTX, in Python: lookups against the levels, for every code in every place; rotation; lanes."""

import numpy as np
import pytest
import torch
from ptx import in_kernels, run_ptx
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from deployment.kernels import keys, lookup, pairs
from deployment.kernels.lookup import PTX
from deployment.kernels.shared import _declared as declared_jit
from deployment.order import FragmentOrder
from deployment.tables import _levels_of_bytes


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


def bytes_of(bits: int, levels: Tensor) -> Tensor:
    """`Tables.bytes` of a codebook in fragment order."""
    return _levels_of_bytes(levels, FragmentOrder(bits, 1, 64, "key", levels.device))


def levels_in(byte: int, bits: int, numbers: list[int]) -> list[int]:
    """The words of an entry, from what a byte is: two nibbles of a code, or of two codes of 2 bits."""
    nibbles = byte & 15, byte >> 4
    shifts = (0, 2) if bits == 2 else (0,)
    mask = 2**bits - 1
    return [numbers[nibbles[0] >> shift & mask] | numbers[nibbles[1] >> shift & mask] << 16 for shift in shifts]


def declared_table(shared: dict[int, int] | None = None) -> int:
    return run_ptx(declared_jit(pairs.TABLE_BYTES.value), {"$1": 0}, shared)["$0"]


def own_copy(table: int, lane: int, bits: int) -> int:
    return run_ptx(pairs.OWN[bits], {"$1": table, "%laneid": lane})["$0"]


def find(word: int, own: int, bits: int, shared: dict[int, int]) -> list[int]:
    outputs = 8 if bits == 2 else 4
    found = run_ptx(pairs.FIND[bits], {f"${outputs}": word, f"${outputs + 1}": own}, shared)
    return [found[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_lane_finds_the_levels_of_every_byte(bits: int) -> None:
    levels = torch.randn(2**bits, generator=torch.Generator().manual_seed(bits))
    numbers = [number & 0xFFFF for number in levels.half().view(torch.int16).tolist()]
    assert len(set(numbers)) == 2**bits
    entries = [[word & 0xFFFFFFFF for word in words] for words in bytes_of(bits, levels).tolist()]
    shared: dict[int, int] = {}
    table = declared_table()
    for byte in range(256):
        inputs = {"$1": table, "$2": byte, "$3": entries[0][byte], "$4": entries[1][byte]}
        run_ptx(pairs.FILL, {**inputs, "%laneid": byte % 32}, shared)
    assert sorted(shared) == list(range(table, table + 256 * 128, 4)) and pairs.TABLE_BYTES.value == 256 * 128
    # at 3 bits the top bit of a nibble belongs to another code, and makes no difference
    expected = [levels_in(byte, bits, numbers) for byte in range(256)]
    for lane in (0, 1, 6, 15, 16, 31):
        own = own_copy(table, lane, bits)
        for first in range(256):  # every byte, in every place of a word
            found_in = [(first + 85 * i) % 256 for i in range(4)]
            word = int.from_bytes(bytes(found_in), "little")
            assert find(word, own, bits, shared) == [level for byte in found_in for level in expected[byte]]


def test_lanes_that_fill_together_begin_at_different_banks() -> None:
    table = declared_table()
    assert table % 128 == 0
    for first in range(0, 32, 8):  # 16 bytes of each of 8 lanes are written at once
        stores = []
        for lane in range(first, first + 8):
            shared: dict[int, int] = {}
            run_ptx(pairs.FILL, {"$1": table, "$2": 5 * lane, "$3": 1, "$4": 2, "%laneid": lane}, shared)
            assert sorted(shared) == list(range(table + 5 * lane * 128, table + (5 * lane + 1) * 128, 4))
            stores.append(list(shared))  # in the order of writing
        for i in range(0, 32, 4):
            assert len({at // 4 % 32 for addresses in stores for at in addresses[i : i + 4]}) == 32


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lanes_that_look_up_together_share_no_bank(bits: int) -> None:
    table = declared_table()
    # a word of this memory is its own address, so what is found is where it was
    shared = {at: at for at in range(table, table + pairs.TABLE_BYTES.value, 4)}
    words = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in range(0, 256, 4)]
    lanes, size = (16, 2) if bits == 2 else (32, 1)  # 8 bytes each are read by half a warp at a time
    banks: list[set[int]] = []
    for lane in range(32):
        own = own_copy(table, lane, bits)
        at = [address for word in words for address in find(word, own, bits, shared)]
        assert at == [table + 128 * byte + 4 * (size * (lane % lanes) + i) for byte in range(256) for i in range(size)]
        banks.append({address // 4 % 32 for address in at})
    for first in range(0, 32, lanes):
        together = banks[first : first + lanes]
        assert sum(map(len, together)) == len(set().union(*together)) == 32


@triton.jit
def pairs_kernel(entries, words, found, BITS: tl.constexpr):
    place = tl.arange(0, 64)
    memory = pairs.table_memory()
    pairs.fill(memory, entries)
    tl.debug_barrier()
    word, own = tl.load(words + place), pairs.own_entries(memory, BITS)
    if BITS == 2:
        a, b, c, d, e, f, g, h = pairs.quad_levels(word, own)
        tl.store(found + 8 * place, a)
        tl.store(found + 8 * place + 1, b)
        tl.store(found + 8 * place + 2, c)
        tl.store(found + 8 * place + 3, d)
        tl.store(found + 8 * place + 4, e)
        tl.store(found + 8 * place + 5, f)
        tl.store(found + 8 * place + 6, g)
        tl.store(found + 8 * place + 7, h)
    else:
        a, b, c, d = pairs.pair_levels(word, own)
        tl.store(found + 4 * place, a)
        tl.store(found + 4 * place + 1, b)
        tl.store(found + 4 * place + 2, c)
        tl.store(found + 4 * place + 3, d)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kernels_fill_the_table_and_look_levels_up(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        in_kernels(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    levels = torch.randn(2**bits, generator=torch.Generator().manual_seed(5)).to(device)
    held = torch.randperm(256, generator=torch.Generator().manual_seed(6)).to(device, torch.uint8)
    found = torch.empty(64 * (8 if bits == 2 else 4), dtype=torch.int32, device=device)
    pairs_kernel[(1,)](bytes_of(bits, levels), held.view(torch.int32), found, bits)
    nibbles = torch.stack([held & 15, held >> 4], 1).int()
    codes = torch.stack([nibbles & 3, nibbles >> 2], 1) if bits == 2 else nibbles & (2**bits - 1)
    assert torch.equal(found.view(torch.float16).view(codes.shape), levels.half()[codes])
