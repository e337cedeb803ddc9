"""Ranges and outliers of tokens of which this process has some heads only (gradients/parallel.py).

The token is gathered, encoded with all of its heads as one process would, and the own heads' codes are kept. Nothing
waits for the device, so a graph may be recorded.
"""

from collections.abc import Callable

from torch import Tensor

from deployment.layout import PackedTensor
from gradients.parallel import gathered_heads
from quant.quantizer import TokenQuantizer

Encode = Callable[[PackedTensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def encode_own(packed: PackedTensor, x: Tensor, sinks: Tensor, encode: Encode) -> tuple[Tensor, Tensor]:
    """(codes `[B, S, C]`, ranges `[B, S, 2]`) of the own heads `x` `[B, G, S, D]`, some of whose tokens go to `sinks`.

    `encode` makes them of all heads: of a packed tensor, tokens and sinks `[B, G, sink tokens, D]` that have these.
    """
    assert isinstance(packed.quantizer, TokenQuantizer)
    part = packed.quantizer.part
    whole = gathered_heads(x, part, 1)
    heads = part.of(whole.shape[1])
    all_sinks = sinks.new_empty(len(sinks), whole.shape[1], *sinks.shape[2:])
    all_sinks[:, heads] = sinks
    codes, ranges = encode(packed.of_all_heads, whole, all_sinks)
    sinks.copy_(all_sinks[:, heads])
    return codes[..., part.of(codes.shape[-1])].contiguous(), ranges
