"""A small interpreter of the inline PTX in the kernels: one lane, its registers, and shared memory as a dict of words."""

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

_SHARED = 0x800  # where a declared array lies
_WORD = 0xFFFFFFFF


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
    "not.b32": lambda a: ~a & _WORD,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: (a + b) & _WORD,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & _WORD,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mul.rn.f16x2": in_pairs(lambda a, b: a * b),
    "fma.rn.f16x2": in_pairs(lambda a, b, c: a * b + c),
}


@lru_cache
def _statements(text: str) -> list[list[str]]:
    """Of every statement its name and operands: words, `[addresses]` and `{lists}`."""
    body = text.strip()
    if body.startswith("{") and body.endswith("}"):
        body = body[1:-1]
    return [re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", line) for line in body.split(";") if line.strip()]


def run_ptx(text: str, inputs: dict[str, int], shared: dict[int, int] | None = None) -> dict[str, int]:
    """What registers hold at the end; `shared` maps addresses to words, and is written.

    Special registers such as `%laneid` are inputs. Raises KeyError for a read of what was never written, and
    ValueError for an address that is not a multiple of the access's size.
    """
    values, memory = dict(inputs), {} if shared is None else shared

    def value(word: str) -> int:
        return values[word] if word in values else int(word, 0)

    for name, *operands in _statements(text):
        if name == ".shared":
            values[operands[-1].split("[")[0]] = _SHARED
        elif name.startswith("ld.shared."):
            registers = _listed(operands[0])
            held = [memory[at] for at in _addresses(name, operands[1], value, len(registers))]
            values.update(zip(registers, held, strict=True))
        elif name.startswith("st.shared."):
            words = [value(word) for word in _listed(operands[1])]
            memory.update(zip(_addresses(name, operands[0], value, len(words)), words, strict=True))
        elif name != ".reg":
            values[operands[0]] = OPERATIONS[name](*map(value, operands[1:]))
    return values


def _listed(operand: str) -> list[str]:
    return re.findall(r"[^\s,{}]+", operand)


def _addresses(name: str, operand: str, value: Callable[[str], int], count: int) -> list[int]:
    """Of the words that a load or a store of `count` registers reaches."""
    vector = {"ld.shared.b32": 1, "ld.shared.v2.b32": 2, "ld.shared.v4.b32": 4}[name.replace("st.", "ld.")]
    if vector != count:
        raise ValueError(f"{name} with {count} registers")
    first = sum(value(part) for part in operand.strip("[]").split("+"))
    if first % (4 * count):
        raise ValueError(f"{name} at {first}")
    return [first + 4 * i for i in range(count)]
