"""The inline PTX of the lookup, in Python, against the portable way: every code in every nibble."""

import re

import pytest
import torch

pytest.importorskip("triton")

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


OPERATIONS = {
    "prmt.b32": prmt,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
}


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """What registers hold at the end."""
    values = dict(inputs)

    def read(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in text.strip("{} ").split(";"):
        words = re.split(r"[\s,{}]+", line.strip())
        if not words[0] or words[0] == ".reg":
            continue
        if words[0] != "mov.b32":
            values[words[1]] = OPERATIONS[words[0]](*(read(word) for word in words[2:]))
        elif "{" in line:
            values[words[1]], values[words[2]] = read(words[3]) & 0xFFFF, read(words[3]) >> 16
        else:
            values[words[1]] = read(words[2])
    return values


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_byte_permutes_are_the_lookup(bits: int) -> None:
    count = 2**bits
    levels = torch.randn(count, generator=torch.Generator().manual_seed(bits)).half()
    numbers = levels.view(torch.int16).tolist()
    words = [
        sum((numbers[4 * group + i] >> (8 * side) & 255) << (8 * i) for i in range(4))
        for side in (0, 1)
        for group in range(count // 4)
    ]
    tables = {f"${9 + i}": word for i, word in enumerate(words)}
    for first in range(count):
        for second in range(count):  # every pair of codes, in all neighbouring nibbles
            codes = [first, second, second, first, first, first, second, (first + second) % count]
            nibbles = sum(code << (4 * i) for i, code in enumerate(codes))
            found = run_ptx(PTX[bits], {"$8": nibbles, **tables})
            assert [found[f"${i}"] for i in range(8)] == [numbers[code] & 0xFFFF for code in codes]
