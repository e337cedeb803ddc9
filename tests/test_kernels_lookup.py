"""The kernels' inline PTX, in Python: the lookup against the levels, for every code in every nibble; the rotation; lanes."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from deployment.kernels import keys, lookup
from deployment.kernels.lookup import PTX


def prmt(first: int, second: int, selector: int) -> int:
    """PTX `prmt.b32`: byte i is the one that nibble i of the selector names; its top bit would spread the sign."""
    source = (first | second << 32).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        chosen.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX `lop3.b32`: every bit of the result is the table's bit 4 a + 2 b + c."""
    bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def in_pairs(operation: Callable[..., np.ndarray]) -> Callable[..., int]:
    """An operation on two fp16 numbers that share a register; rounded once."""

    def calculate(*words: int) -> int:
        numbers = [np.array([word], dtype=np.uint32).view(np.float16).astype(np.float64) for word in words]
        return int(operation(*numbers).astype(np.float16).view(np.uint32)[0])

    return calculate


OPERATIONS: dict[str, Callable[..., int]] = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "not.b32": lambda a: ~a & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mul.rn.f16x2": in_pairs(lambda a, b: a * b),
    "fma.rn.f16x2": in_pairs(lambda a, b, c: a * b + c),
}


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """What registers hold at the end."""
    values = dict(inputs)
    for line in text.strip("{} ").split(";"):
        words = re.split(r"[\s,{}]+", line.strip())
        if words[0] and words[0] != ".reg":
            values[words[1]] = OPERATIONS[words[0]](*(values[w] if w in values else int(w, 0) for w in words[2:]))
    return values


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


def test_a_pair_is_scaled_and_rotated() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        a, b, cos_a, sin_b, cos_b, sin_a = numbers = torch.randn(6, 2, generator=generator).half()
        words = {f"${2 + i}": int(pair.view(torch.int32)) & 0xFFFFFFFF for i, pair in enumerate(numbers)}
        found = run_ptx(keys._TURN.value, words)
        expected = (a * cos_a.double() + b * sin_b.double(), b * cos_b.double() + a * sin_a.double())
        for i in range(2):
            pair = torch.tensor(np.array([found[f"${i}"]], dtype=np.uint32).view(np.float16))
            # the second product is rounded before it is added, and the sum again
            torch.testing.assert_close(pair.double(), expected[i], rtol=1e-3, atol=4e-3)


def test_every_lane_gets_the_word_itself() -> None:
    for lane in range(32):
        registers = {"%lanemask_lt": (1 << lane) - 1, "%lanemask_le": (2 << lane) - 1, "$1": 0x12345678}
        assert run_ptx(lookup._PER_LANE.value, registers)["$0"] == 0x12345678
