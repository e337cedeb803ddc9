"""Host side of unpacking: which arguments `unpack_kernel` needs for the segments there are."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deployment.kernels.packed import DenseSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.unpack import DENSE, bases_kernel, source_of, unpack_kernel
from deployment.layout import PackedTensor, Page
from quant.storage import BLOCK_TOKENS

_ENTRIES = 256  # outliers at a time
_TABLES = ("levels", "scale", "zero", "width", "offset", "first_level", "slot")
_STREAMS = ("index", "value", "starts", "ends")
_STRIDES = ("dense_stride_b", "dense_stride_g", "dense_stride_t")


@dataclass(frozen=True)
class Unpacking:
    """A segment on its way to `key` and `value` `[B, G, room, D]`: the kernel's arguments, the same for all stretches."""

    arguments: list[dict[str, Any]]  # of keys, then of values
    streams: int  # sequences times heads

    @classmethod
    def of(cls, segment: Segment, rotary: Rotary, turn: Tensor, key: Tensor, value: Tensor) -> "Unpacking":
        """`turn` is the rotary embedding's with tokens before pairs, so that neighbouring lanes load neighbours."""
        batch, heads, room, dim = key.shape
        bases = _bases(segment, rotary, batch, dim)
        if isinstance(segment, DenseSegment):
            sources = [_dense_arguments(segment.key), _dense_arguments(segment.value)]
        else:
            sources = [_packed_arguments(segment.key, segment.key_page)]
            sources += [_packed_arguments(segment.value, segment.value_page)]
        place = {
            "origins": segment.origins,
            "shift": segment.start,
            "limits": segment.origins if segment.limits is None else segment.limits,
            "LIMITED": segment.limits is not None,
            "tokens": segment.tokens,
            "segment_blocks": bases.shape[1],
            "bases": bases,
            "turn": turn,
            "ROTARY_HALF": rotary.half,
        }
        shape = {"room": room, "G": heads, "D": dim, "ENTRIES": _ENTRIES}
        shape |= {"PAIRS": triton.next_power_of_2(dim // 2), "CHANNELS": triton.next_power_of_2(dim)}
        for source, result, rotated in zip(sources, (key, value), (True, False), strict=True):
            source |= {**place, **shape, "result": result, "ROTATED": rotated}
            source["num_warps"] = 8
        return cls(sources, batch * heads)

    def run(self, first: int, blocks: int) -> None:
        """Unpack blocks `first`, ..., `first + blocks - 1` of every sequence.

        What a sequence does not hold is left as it is, but for finite numbers to the end of its last block.
        """
        for arguments in self.arguments:
            unpack_kernel[(blocks, self.streams)](**arguments, first_block=first)


def _bases(segment: Segment, rotary: Rotary, batch: int, head_dim: int) -> Tensor:
    """Cos and sin at the first position of every block, `[B, blocks, 2, D/2]` float32."""
    blocks = -(-segment.tokens // BLOCK_TOKENS)
    bases = torch.empty(batch, blocks, 2, head_dim // 2, dtype=torch.float32, device=rotary.turn.device)
    bases_kernel[(blocks, batch)](
        segment.origins,
        segment.start,
        rotary.steps,
        bases,
        D=head_dim,
        PAIRS=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return bases


def _packed_arguments(packed: PackedTensor, page: Page) -> dict[str, Any]:
    tables, order, unused = packed.tables, packed.order, page.words
    if page.outliers is not None:
        page.outliers = page.outliers.with_starts()
    streams = page.outliers
    return {
        "words": page.words,
        "scales": unused if page.scales is None else page.scales,
        **{name: getattr(tables, name) for name in _TABLES},
        **{name: unused if streams is None else getattr(streams, name) for name in _STREAMS},
        "dense": unused,
        **dict.fromkeys(_STRIDES, 0),
        "blocks": page.blocks,
        "block_words": order.words,
        "SOURCE": source_of(order),
        "PLANES": tables.planes,
        "DYNAMIC": page.scales is not None,
        "OUTLIERS": streams is not None and streams.index.numel() > 0,
    }


def _dense_arguments(tokens: Tensor) -> dict[str, Any]:
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    unused = ("words", "scales", *_TABLES, *_STREAMS, "dense")
    strides = zip(_STRIDES, tokens.stride()[:3], strict=True)
    constants = {"SOURCE": DENSE, "PLANES": 0, "DYNAMIC": False, "OUTLIERS": False}
    return {**dict.fromkeys(unused, tokens), **dict(strides), "blocks": 0, "block_words": 0, **constants}
