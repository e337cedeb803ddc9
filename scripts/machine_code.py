"""Read the machine code of the attention kernel: which loops it has, and how often each instruction runs.

A program of the kernel works through chunks of the context (`deployment/kernels/split.py`). The *chunk loop* is the innermost
loop that multiplies on tensor cores both before and after it takes exponentials: keys, softmax, values. Loops directly
within it are told apart by what they hold, and what they hold says how often they run:

    tensor cores, before exponentials    keys: as often as it takes to get through the products of a chunk, so that a body
    tensor cores, after them             values   of two or four blocks, or code before and after the loop, counts rightly
    atomics                              outliers of keys, of values: the expected number of rounds
    none of these                        other: once in a block of 64 tokens, as queries are rotated back

and the rest, everything outside these loops, runs once in a chunk. Of several loops over the same outliers or products the
first, or largest, counts. Code that is jumped over together with a loop nested still deeper is the slow path of the
sine of huge angles, which phases below one turn never take: it counts nothing. Every instruction counts alike, whether
its predicate holds or not, and waiting is not counted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.MULTILINE)
_PRODUCT = re.compile(r"HMMA\.16(8)(\d+)")  # m16n8k8, m16n8k16
_ATOMIC = ("RED", "ATOM")
_SPILL = ("LDL", "STL")
PHASES = ("keys", "key_outliers", "values", "value_outliers", "other", "rest")
# what instructions are for; the first prefix that fits decides
_CLASSES = {
    "PRMT": ("PRMT",),
    "LOP3/SHF": ("LOP", "ULOP", "SHF", "USHF", "SHL", "SHR", "BFE", "BFI", "SGXT", "USGXT"),
    "HFMA2/HMUL2": ("HFMA2", "HMUL2", "HADD2"),
    "HMMA": ("HMMA",),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "MUFU"),
    "convert": ("F2F", "F2I", "I2F", "F2FP", "HADD"),
    "LDS/STS/LDSM": ("LDS", "STS", "LDSM"),
    "LDL/STL": _SPILL,
    "LDG/STG": ("LDG", "STG", "LDC", "ULDC", *_ATOMIC),
    "SHFL": ("SHFL",),
    "BAR": ("BAR", "DEPBAR", "WARPSYNC", "MEMBAR"),
    "integer": ("I", "UI", "LEA", "ULEA"),
    "MOV": ("MOV", "UMOV", "R2UR", "S2R", "CS2R", "SEL", "USEL", "R2P", "P2R"),
}


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    name: str  # with modifiers
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def product(self) -> int:
        """Products of a tensor-core instruction in units of n8k8: 2 for m16n8k16, 0 for any other instruction."""
        found = _PRODUCT.match(self.name)
        return int(found[2]) // 8 if found else 0

    @property
    def kind(self) -> str:
        """Its class."""
        fits = (kind for kind, prefixes in _CLASSES.items() if self.name.startswith(prefixes))
        return next(fits, "other")


Code = list[Instruction]


@dataclass(frozen=True)
class Loop:
    """Instructions from one address to another, both included."""

    code: Sequence[Instruction]  # of the whole kernel
    first: int
    last: int

    @cached_property
    def body(self) -> Code:
        """All its instructions, those of nested loops too."""
        return [i for i in self.code if self.first <= i.address <= self.last]

    def holds(self, other: "Loop") -> bool:
        """Whether the other is nested in it."""
        return self != other and self.first <= other.first and other.last <= self.last

    @cached_property
    def nested(self) -> list["Loop"]:
        """The loops directly within it, in the order of the code."""
        inside = [loop for loop in loops(self.body) if (loop.first, loop.last) != (self.first, self.last)]
        return [loop for loop in inside if not any(other.holds(loop) for other in inside)]

    @cached_property
    def runs(self) -> Code:
        """What runs in one round of an inner loop: everything but the slow paths of functions."""
        left_out: list[range] = []
        for loop in self.nested:
            jumps = [i for i in self.body if i.target and i.address < loop.first and loop.last < i.target <= self.last]
            if jumps:
                target = min(i.target for i in jumps if i.target)
                start = min(i.address for i in jumps if i.target == target)
                left_out.append(range(start + 1, target))
        return [i for i in self.body if not any(i.address in span for span in left_out)]


def parse(listing: str) -> Code:
    """The instructions of `cuobjdump -sass`."""
    return [Instruction(int(address, 16), name, rest) for address, name, rest in _LINE.findall(listing)]


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Every loop, outer ones first: what lies between a branch back and its target."""
    ends: dict[int, int] = {}
    for i in code:
        if i.target is not None and i.target < i.address and i.target >= code[0].address:
            ends[i.target] = max(i.address, ends.get(i.target, 0))
    return [Loop(code, first, last) for first, last in sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))]


@dataclass(frozen=True)
class Chunk:
    """How much work a chunk is for one warp, which the code does not say."""

    blocks: int  # of 64 tokens
    products: int  # of a block's keys, and as many of its values, in units of n8k8
    rounds: float  # through a loop over outliers: the expected number


@dataclass(frozen=True)
class Run:
    """Instructions, and how often they run in a chunk."""

    phase: str
    code: Code
    times: float

    @property
    def instructions(self) -> float:
        """In a chunk."""
        return len(self.code) * self.times

    def kinds(self) -> Counter[str]:
        """Instructions of one round, by class."""
        return Counter(i.kind for i in self.code)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory in one round."""
        return sum(i.name.startswith(_SPILL) for i in self.code)


def runs_of_a_chunk(code: Code, chunk: Chunk) -> tuple[list[Run], float]:
    """(what runs in the chunk loop, blocks of one round of it). Raises ValueError for code that reads differently."""
    loop, boundary = _chunk_loop(code)
    blocks = float(chunk.blocks)
    if not any(_products(inner.body) for inner in loop.nested):  # unrolled throughout: the code says how far
        blocks = _products(loop.body) / 2 / chunk.products
    found: list[Run] = []
    for phase, inside in (("keys", lambda i: i.address < boundary), ("values", lambda i: i.address > boundary)):
        inner = [nested for nested in loop.nested if inside(nested.body[0])]
        found += _side(phase, inner, [i for i in _own(loop) if inside(i)], chunk, blocks)
    return [*found, Run("rest", _own(loop), 1)], blocks


def _own(loop: Loop) -> Code:
    return [i for i in loop.body if not any(n.first <= i.address <= n.last for n in loop.nested)]


def _products(code: Sequence[Instruction]) -> int:
    return sum(i.product for i in code)


def _chunk_loop(code: Code) -> tuple[Loop, int]:
    """(the loop, address of its first exponential after keys)."""
    found: list[tuple[Loop, int]] = []
    for loop in loops(code):
        products = [i.address for i in loop.body if i.product]
        for i in loop.body:
            if i.name == "MUFU.EX2" and products and products[0] < i.address < products[-1]:
                found.append((loop, i.address))
                break
    innermost = [(loop, at) for loop, at in found if not any(loop.holds(other) for other, _ in found)]
    if not innermost:
        raise ValueError("no loop of the machine code has products, exponentials and products again, in this order")
    # where whole and broken chunks have loops of their own, that of whole ones is the shorter
    return min(innermost, key=lambda candidate: len(candidate[0].body))


def _side(phase: str, inner: Sequence[Loop], own: Code, chunk: Chunk, blocks: float) -> list[Run]:
    """What runs in the loops before, or after, the exponentials; `own` is the code between these loops."""
    needed, done = blocks * chunk.products, _products(own)
    dense = [loop for loop in inner if _products(loop.body)]
    runs = []
    if dense:
        largest = max(dense, key=lambda loop: _products(loop.body))
        runs.append(Run(phase, largest.runs, (needed - done) / _products(largest.body)))
    elif done != needed:
        raise ValueError(f"{done} products of {phase} in a chunk and no loop over them, where {needed:g} are needed")
    sparse = [loop for loop in inner if loop not in dense and any(i.name.startswith(_ATOMIC) for i in loop.body)]
    if sparse:
        runs.append(Run(f"{phase[:-1]}_outliers", sparse[0].runs, chunk.rounds))
    return runs + [Run("other", loop.runs, blocks) for loop in inner if loop not in dense and loop not in sparse]
