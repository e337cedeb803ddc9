"""Attention over segments of the context: plain tokens, and pages of packed ones.

Few queries of a kind that `decode/` takes read the packed words themselves, in CUDA C++ (decode/decode.cu). Everything else goes the general way,
in Triton, which any GPU and the interpreter run: few queries as they are (portable.py), many to stretches that are unpacked (prefill.py). All are `attend_torch`
(step/reference.py) but for rounding. Nothing here waits for the device or depends on how full the cache is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.kernels.phase import Rotary


@dataclass(frozen=True)
class DenseSegment:
    """Tokens as they are, pre-RoPE: `key` and `value` `[B, G, n, D]`.

    Row b's first token is at position `start` + `origins[b]` (int64); before 0 lies padding. Tokens from position
    `limits[b]` (int64) on are not there yet; None for a segment that is full.
    """

    key: Tensor
    value: Tensor
    origins: Tensor
    limits: Tensor | None
    start: int = 0

    @property
    def tokens(self) -> int:
        """There is room for so many per sequence."""
        return self.key.shape[2]


@dataclass(frozen=True)
class PackedSegment:
    """A page of keys and one of values; `origins`, `limits` and `start` as above, but there is no padding."""

    key: PackedTensor
    key_page: Page
    value: PackedTensor
    value_page: Page
    origins: Tensor
    limits: Tensor
    start: int = 0

    @property
    def tokens(self) -> int:
        """There is room for so many per sequence."""
        return self.key_page.end - self.key_page.start


Segment = DenseSegment | PackedSegment


@dataclass(frozen=True)
class Known:
    """What the host knows of a sequence whose queries follow one another, `pad` of them left padding.

    The first of the others is at position `before` of the sequence; `stored` tokens are stored, those of the queries among them or not.
    """

    before: int
    stored: int
    pad: int

    def ends(self, new: int) -> tuple[int, int]:
        """How many tokens may be stored: those before the `new` queries, or these, too."""
        return self.before, self.before + new - self.pad


def attend_packed(
    query: Tensor,
    positions: Tensor,
    segments: Sequence[Segment],
    rotary: Rotary,
    scaling: float,
    kv_heads: int,
    known: Sequence[Known] | None = None,
) -> Tensor:
    """Causal softmax attention over segments.

    Args:
        query: `[B, H, S, D]`, pre-RoPE; query head h reads KV head h // (H / G).
        positions: `[B, S]` int64 of the queries; a query sees the tokens up to its own position, one at -1 none.
        scaling: factor on the scores.
        known: what the host knows of every sequence, which makes many queries faster; None if it must not matter (a graph is captured).

    Returns `[B, S, H, D]` in the query's dtype.
    """
    from deployment.kernels.decode import host
    from deployment.kernels.prefill import attend_many

    if host.takes(query, segments, rotary, kv_heads):
        return host.attend(query, positions, segments, rotary, scaling, kv_heads)
    return attend_many(query, positions, segments, rotary, scaling, kv_heads, known)


def prepare(packed: PackedTensor) -> None:
    """Make now what kernels ask the device or the host for once, so that the next step may be captured."""
    from deployment.kernels.decode import host
    from deployment.kernels.unpacking import is_permuted

    is_permuted(packed)
    if host.is_grouped(packed):
        host.fixed_of(packed)
