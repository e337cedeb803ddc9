"""How the work on some queries is cut up: the context into parts, one to a program, and a part into chunks.

A GPU runs so many programs at once. If there are fewer parts than that, some of it idles; if there are a few more, most of it idles while the
last ones run. A part is whole pairs of blocks, whatever the chunks are, so that parts can be alike: the longest one decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from deployment.kernels.tuning import LEAST_CHUNK, Tuning, tuning_of
from deployment.streams import index_span

DECODED_ROWS = 16  # queries per KV head up to which every one reads the packed words itself (beyond: prefill.py)
_CHUNK_WEIGHTS = 8192  # bytes of a program's weights at a time
_SMALL_CHUNK = 256  # tokens: a chunk of fewer costs as much
_MOST_SPLITS = 256
_START = 1.5  # what a program does before its first pair of blocks, in pairs
_PART = 0.02  # what `combine` does for a part


@dataclass(frozen=True)
class Plan:
    """How the work on some queries is cut up."""

    rows: int
    tiles: int
    chunk: int
    programs: int
    splits: list[int]  # parts of each segment

    @classmethod
    def of(cls, rows: int, streams: int, segments: Sequence[int], dim: int, device: torch.device) -> "Plan":
        """For `rows` queries of each of `streams` (sequence, KV head), heads of `dim`, and segments of so many tokens."""
        tile = min(DECODED_ROWS, triton.next_power_of_2(rows))
        tiles = -(-rows // tile)
        tuning = tuning_of(device)
        programs = multiprocessors(device) * tuning.waves
        splits = [parts_of(tokens, streams * tiles, programs) for tokens in segments]
        longest = max((part_tokens(*of) for of in zip(segments, splits, strict=True)), default=0)
        works = streams * tiles * max(splits, default=0)
        return cls(tile, tiles, chunk_tokens(tile, longest, dim, tuning), min(programs, works), splits)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter gets two, so that splitting is tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def parts_of(tokens: int, streams: int, programs: int) -> int:
    """Parts of a segment of so many tokens, of each stream: those with which `programs` at once are done first."""

    def cost(parts: int) -> float:
        rounds = -(-streams * parts // programs)
        return rounds * (part_tokens(tokens, parts) / LEAST_CHUNK + _START) + _PART * parts

    return min(range(1, max(1, min(_MOST_SPLITS, -(-tokens // LEAST_CHUNK))) + 1), key=cost)


def part_tokens(tokens: int, parts: int) -> int:
    """Tokens of the longest of so many parts of a segment."""
    return -(-tokens // (parts * LEAST_CHUNK)) * LEAST_CHUNK


def chunk_tokens(rows: int, part: int, dim: int, tuning: Tuning) -> int:
    """Tokens of a chunk, for parts of at most `part` tokens: as the tuning says, and no more than memory and indices allow, or are there."""
    asked = tuning.chunk if rows < 4 else max(LEAST_CHUNK, tuning.chunk // 2)
    chunk = min(asked, _CHUNK_WEIGHTS // weights_bytes(rows, 1), index_span(dim))
    while chunk > _SMALL_CHUNK and part <= chunk // 2:
        chunk //= 2
    return chunk


def weights_bytes(rows: int, chunk: int) -> int:
    """Of a chunk's weights as an operand in shared memory."""
    return chunk * 4 * min(rows, 8)
