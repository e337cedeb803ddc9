"""Host side of unpacking: which arguments `unpack_kernel` needs for the segments there are."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deployment.kernels.packed import DenseSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.tiles import CHANNEL_ORDER, DENSE, FRAGMENT_ORDER
from deployment.kernels.unpack import bases_kernel, unpack_kernel
from deployment.layout import PackedTensor, Page
from deployment.order import FragmentOrder
from quant.storage import BLOCK_TOKENS

_ENTRIES = 256  # outliers at a time
_WIDTH = 2  # k in its natural order, see `operand_order`: no tensor core reads these tiles from registers
_TABLES = ("levels", "scale", "zero", "width", "offset", "first_level")
_STREAMS = ("index", "value", "starts", "ends")
_STRIDES = ("dense_stride_b", "dense_stride_g", "dense_stride_t")


@dataclass(frozen=True)
class Unpacking:
    """How to unpack the blocks of a segment: the arguments of `unpack_kernel` that are the same for all stretches."""

    segment: Segment
    bases: Tensor  # [B, blocks, 2, D/2] float32
    turn: Tensor  # [2, 64, D/2] float32
    half: int

    @classmethod
    def of(cls, segment: Segment, rotary: Rotary, turn: Tensor, batch: int, head_dim: int) -> "Unpacking":
        """`turn` is the rotary embedding's with tokens before pairs, so that neighbouring lanes load neighbours."""
        blocks = -(-segment.tokens // BLOCK_TOKENS)
        bases = torch.empty(batch, blocks, 2, head_dim // 2, dtype=torch.float32, device=turn.device)
        bases_kernel[(blocks, batch)](
            segment.origins,
            segment.start,
            rotary.high,
            rotary.low,
            bases,
            D=head_dim,
            PAIRS=triton.next_power_of_2(head_dim // 2),
            num_warps=1,
        )
        return cls(segment, bases, turn, rotary.half)

    def run(self, first: int, blocks: int, key: Tensor, value: Tensor) -> None:
        """Unpack blocks `first`, ..., `first + blocks - 1` to `[B, G, room, D]`, keys rotated.

        What a sequence does not hold is left as it is, but for finite numbers to the end of its last block.
        """
        segment = self.segment
        if isinstance(segment, DenseSegment):
            keys, values = _dense_arguments(segment.key), _dense_arguments(segment.value)
        else:
            keys = _packed_arguments(segment.key, segment.key_page)
            values = _packed_arguments(segment.value, segment.value_page)
        self._launch(keys, first, blocks, key, True)
        self._launch(values, first, blocks, value, False)

    def _launch(self, arguments: dict[str, Any], first: int, blocks: int, result: Tensor, rotated: bool) -> None:
        segment = self.segment
        batch, heads, room, dim = result.shape
        unpack_kernel[(blocks, batch * heads)](
            **arguments,
            origins=segment.origins,
            shift=segment.start,
            limits=segment.origins if segment.limits is None else segment.limits,
            bases=self.bases,
            turn=self.turn,
            tokens=segment.tokens,
            first_block=first,
            segment_blocks=self.bases.shape[1],
            room=room,
            result=result,
            G=heads,
            D=dim,
            PAIRS=triton.next_power_of_2(dim // 2),
            CHANNELS=triton.next_power_of_2(dim),
            ROTARY_HALF=self.half,
            LIMITED=segment.limits is not None,
            ROTATED=rotated,
            # permutes make fp16 levels, and are inline PTX
            FAST=arguments["SOURCE"] == FRAGMENT_ORDER and result.is_cuda and result.dtype == torch.float16,
            ENTRIES=_ENTRIES,
            WIDTH=_WIDTH,
            num_warps=8 if dim > 128 else 4,  # as many as fragments are laid out for
        )


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
        "SOURCE": FRAGMENT_ORDER if isinstance(order, FragmentOrder) else CHANNEL_ORDER,
        "BITS": order.bits if isinstance(order, FragmentOrder) else tables.planes,
        "GEOMETRY": order.geometry.constants() if isinstance(order, FragmentOrder) else (),
        "DYNAMIC": page.scales is not None,
        "OUTLIERS": streams is not None and streams.index.numel() > 0,
    }


def _dense_arguments(tokens: Tensor) -> dict[str, Any]:
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    unused = ("words", "scales", *_TABLES, *_STREAMS, "dense")
    strides = zip(_STRIDES, tokens.stride()[:3], strict=True)
    constants = {"SOURCE": DENSE, "BITS": 0, "GEOMETRY": (), "DYNAMIC": False, "OUTLIERS": False}
    return {**dict.fromkeys(unused, tokens), **dict(strides), "blocks": 0, "block_words": 0, **constants}
