"""A small interpreter of the inline PTX in the kernels: one lane, its registers, and shared memory as a dict of words.

Triton's own interpreter knows no PTX; `in_kernels` lends it this one, so that kernels run with theirs. Their copies to
shared memory are as late as they may be.
"""

import ctypes
import re
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

_SHARED = 0x800  # where declared arrays begin
_WORD = 0xFFFFFFFF
_LANE_0 = {"%laneid": 0, "%lanemask_lt": 0, "%lanemask_le": 1}


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
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a & _WORD,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: (a + b) & _WORD,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & _WORD,
    "dp4a.u32.u32": lambda a, b, c: (sum((a >> i & 255) * (b >> i & 255) for i in (0, 8, 16, 24)) + c) & _WORD,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "fma.rn.f16x2": in_pairs(lambda a, b, c: a * b + c),
}


class Shared(dict[int, int]):
    """Shared memory of a kernel: arrays lie behind one another, and copies arrive when they are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.end = _SHARED
        self.groups: list[dict[int, int]] = [{}]  # of copies; the last is not committed yet

    def declare(self, size: int) -> int:
        """Address of a new array of so many bytes."""
        address = self.end
        self.end += -(-size // 128) * 128
        return address

    def wait(self, groups: int) -> None:
        """Until no more than so many groups are on their way."""
        while len(self.groups) - 1 > groups:
            self.update(self.groups.pop(0))


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
        if name.startswith("@"):
            if not value(name[1:]):
                continue
            name, *operands = operands
        if name == ".shared":
            array, size = operands[-1].rstrip("]").split("[")
            values[array] = memory.declare(int(size)) if isinstance(memory, Shared) else _SHARED
        elif name.startswith(("ld.shared.", "ld.global.")):
            registers, read = _listed(operands[0]), memory.__getitem__ if "shared" in name else _read
            held = [read(at) for at in _addresses(name, operands[1], value, len(registers))]
            values.update(zip(registers, held, strict=True))
        elif name.startswith(("cp.async.ca", "cp.async.cg")):
            to, source, size = operands[0], operands[1], int(operands[2], 0)
            kind = f"{'v' * (size > 4)}{size // 4 if size > 4 else ''}{'.' * (size > 4)}b32"
            held = [_read(at) for at in _addresses(f"ld.global.{kind}", source, value, size // 4)]
            arriving = memory.groups[-1] if isinstance(memory, Shared) else memory
            arriving.update(zip(_addresses(f"st.shared.{kind}", to, value, size // 4), held, strict=True))
        elif name == "cp.async.commit_group":
            if isinstance(memory, Shared):
                memory.groups.append({})
        elif name == "cp.async.wait_group":
            if isinstance(memory, Shared):
                memory.wait(int(operands[0], 0))
        elif name == "setp.ne.s32":
            values[operands[0]] = int(value(operands[1]) != value(operands[2]))
        elif name.startswith("st.shared."):
            words = [value(word) for word in _listed(operands[1])]
            memory.update(zip(_addresses(name, operands[0], value, len(words)), words, strict=True))
        elif operands[0].startswith("{"):
            if name != "mov.b32":
                raise ValueError(f"{name} to {operands[0]}")
            low, high = _listed(operands[0])
            values[low], values[high] = value(operands[1]) & 0xFFFF, value(operands[1]) >> 16
        elif name != ".reg":
            values[operands[0]] = OPERATIONS[name](*map(value, operands[1:]))
    return values


def in_kernels(patch: pytest.MonkeyPatch) -> dict[int, int]:
    """Make interpreted kernels run inline PTX of one element at a time, all as lane 0; returns their shared memory."""
    from triton.runtime import interpreter

    shared = Shared()

    def call(_: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> Any:
        outputs = sum("=" in constraint for constraint in constraints.split(","))
        assert (outputs, pack) == (len(types), 1)
        arguments = np.broadcast_arrays(*(handle.data for handle in values))
        elements = zip(*(argument.ravel().tolist() for argument in arguments), strict=True)
        # shorter numbers than words are not taken, and pointers are not negative
        inputs = ({f"${outputs + i}": x if x >= 0 else x & _WORD for i, x in enumerate(xs)} for xs in elements)
        found = [run_ptx(text, {**given, **_LANE_0}, shared) for given in inputs]
        results = []
        for i, kind in enumerate(types):
            width = np.uint16 if kind.scalar.primitive_bitwidth == 16 else np.uint32
            words = np.array([registers[f"${i}"] for registers in found], width).reshape(arguments[0].shape)
            number = {"int32": np.int32, "fp16": np.float16}[kind.scalar.name]
            results.append(interpreter.TensorHandle(words.view(number), kind.scalar))
        return SimpleNamespace(get_result=results.__getitem__)

    patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", call)
    return shared


def _read(address: int) -> int:
    return ctypes.c_uint32.from_address(address).value


def _listed(operand: str) -> list[str]:
    return re.findall(r"[^\s,{}]+", operand)


def _addresses(name: str, operand: str, value: Callable[[str], int], count: int) -> list[int]:
    """Of the words that a load or a store of `count` registers reaches."""
    if {"b32": 1, "v2.b32": 2, "v4.b32": 4}[name.split(".", 2)[2]] != count:
        raise ValueError(f"{name} with {count} registers")
    first = sum(value(part) for part in operand.strip("[]").split("+"))
    if first % (4 * count):
        raise ValueError(f"{name} at {first}")
    return [first + 4 * i for i in range(count)]
