"""Read the machine code of the attention kernel: which loops it has, and how often each instruction runs.

A program of the kernel works through chunks of the context (`deployment/kernels/split.py`). The *chunk loop* is the
innermost loop that multiplies on tensor cores both before and after it takes exponentials: keys, softmax, values.
Loops directly within it are told apart by what they hold, and what they hold says how often they run:

    tensor cores, before exponentials    keys: as often as it takes to get through the products of a chunk, so that a body
    tensor cores, after them             values   of two or four blocks, or code before and after the loop, counts rightly
    atomics                              outliers of keys, of values: the expected number of rounds

and the rest, everything outside these loops, runs once in a chunk. Of several loops over the same outliers or
products the first, or largest, counts; any other loop is refused, since nothing says how often it runs.

Queries are rotated back once in a chunk, before its loops. Keys come in *spans* of blocks, each with operands of its
own. Where spans are a loop around the loop over blocks, what this outer one holds by itself are `queries`, too.
Compilers drop either loop, though, when a span is a whole chunk or a single block. What was written for a span, like
the rotation, then lies among other code, and only the line of the source that every instruction stems from
(`scripts/source_lines.py`) tells them apart; it runs as often as the code it lies in. Where a loop runs once for each
of several blocks, whatever it holds is keys.

Every instruction counts alike, whether its predicate holds or not, and so does code that is jumped over at times.
Waiting is not counted.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from scripts.source_lines import Place

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.MULTILINE)
_PRODUCT = re.compile(r"HMMA\.16(8)(\d+)")  # m16n8k8, m16n8k16
_ATOMIC = ("RED", "ATOM")
_SPILL = ("LDL", "STL")
PHASES = ("keys", "queries", "key_outliers", "values", "value_outliers", "rest")
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
    place: Place | None = None  # in the source

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
    def own(self) -> Code:
        """Its instructions that lie in no nested loop."""
        return [i for i in self.body if not any(n.first <= i.address <= n.last for n in self.nested)]

    @cached_property
    def products(self) -> int:
        """Of a round, with nested loops once, in units of n8k8."""
        return _products(self.body)


def parse(listing: str, places: Mapping[int, Place] | None = None) -> Code:
    """The instructions of `cuobjdump -sass`; `places` says from where in the source the one at an address stems."""
    places = places or {}
    found = ((int(address, 16), name, operands) for address, name, operands in _LINE.findall(listing))
    return [Instruction(at, name, operands, places.get(at)) for at, name, operands in found]


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
    spans: int = 1  # of keys
    span_products: int = 0  # of a span, besides those of its blocks
    query_places: Collection[Place] = ()  # in the source, written for the rotation or a span, not for its blocks


@dataclass(frozen=True)
class Run:
    """Instructions, and how often they run in a chunk; `inner`: in a loop within that over chunks."""

    phase: str
    code: Code
    times: float
    inner: bool = True

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

    def without_queries(self, places: Collection[Place]) -> list["Run"]:
        """Itself, less the instructions that stem from `places`; and these."""
        parts = {self.phase: [i for i in self.code if i.place not in places]}
        parts["queries"] = [i for i in self.code if i.place in places]
        return [Run(phase, code, self.times, self.inner) for phase, code in parts.items() if code]


def runs_of_a_chunk(code: Code, chunk: Chunk) -> tuple[list[Run], float]:
    """(what runs in the chunk loop, blocks of one round of it). Raises ValueError for code that reads differently."""
    loop, boundary = _chunk_loop(code)
    blocks, of_spans = float(chunk.blocks), chunk.spans * chunk.span_products
    if not any(inner.products for inner in loop.nested):  # unrolled throughout: the code says how far
        blocks = (loop.products - of_spans) / 2 / chunk.products
    before = [inner for inner in loop.nested if inner.first < boundary]
    after = [inner for inner in loop.nested if inner.first > boundary]
    done = _products([i for i in loop.own if i.address < boundary])
    keys = _keys(before, blocks * chunk.products + of_spans, done, chunk)
    values = _dense("values", after, blocks * chunk.products, _products(loop.own) - done)
    if any(loop.products or not _tries_again(loop) for inner in after for loop in inner.nested):
        raise ValueError("a loop over values or their outliers holds further loops")
    sparse = [*_sparse("key_outliers", before, chunk.rounds), *_sparse("value_outliers", after, chunk.rounds)]
    rest = Run("rest", loop.own, 1, inner=False).without_queries(chunk.query_places)
    return [*keys, *values, *sparse, *rest], blocks


def _tries_again(loop: Loop) -> bool:
    """Whether it adds to shared memory, and again if another lane was faster; it counts once."""
    return any(i.name.startswith("ATOMS.CAST.SPIN") for i in loop.body)


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


def _dense(phase: str, inner: Sequence[Loop], needed: float, done: int) -> list[Run]:
    """The largest loop over products, of which `needed` are, and `done` elsewhere."""
    dense = [loop for loop in inner if loop.products]
    if not dense:
        if done != needed:
            raise ValueError(f"{done} products of {phase} in a chunk and no loop over them where {needed:g} are needed")
        return []
    largest = max(dense, key=lambda loop: loop.products)
    if done >= needed:
        raise ValueError(f"{done} products of {phase} outside their loop, and only {needed:g} in a chunk")
    return [Run(phase, largest.body, (needed - done) / largest.products)]


def _keys(inner: Sequence[Loop], needed: float, done: int, chunk: Chunk) -> list[Run]:
    """Keys, and queries that lie in loops: a loop around that over blocks, or one loop for both."""
    outer = max(inner, key=lambda loop: loop.products, default=None)
    if outer is None or not outer.nested:
        merged = chunk.query_places if chunk.spans == chunk.blocks else ()
        return [part for run in _dense("keys", inner, needed, done) for part in run.without_queries(merged)]
    if len(outer.nested) > 1 or outer.nested[0].nested or done:
        raise ValueError("spans of keys are not one loop over blocks within another over spans")
    (blocks,) = _dense("keys", outer.nested, needed / chunk.spans, _products(outer.own))
    return [Run("keys", blocks.code, blocks.times * chunk.spans), Run("queries", outer.own, chunk.spans)]


def _sparse(phase: str, inner: Sequence[Loop], rounds: float) -> list[Run]:
    """The first loop over outliers; no loop is left that nothing is known of."""
    sparse = [loop for loop in inner if not loop.products]
    for loop in sparse:
        if not any(i.name.startswith(_ATOMIC) for i in loop.body):
            raise ValueError(f"a loop of {len(loop.body)} instructions has neither products nor atomics")
    return [Run(phase, sparse[0].body, rounds)] if sparse else []
