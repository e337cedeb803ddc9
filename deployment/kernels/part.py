"""Ranges and outliers of tokens of which this process has some heads only (gradients/parallel.py).

The token is gathered, encoded with all of its heads as one process would, and the own heads' codes are kept. Nothing
waits for the device, so a graph may be recorded.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from deployment.kernels.side import Codes, Side
from deployment.kernels.sums import already_opened
from gradients.parallel import Part, gathered_heads
from quant.quantizer import TokenQuantizer


def with_all_heads(side: Side) -> Side:
    """The same with all heads of its tokens, of which it stores its own."""
    quantizer = side.packed.quantizer
    assert isinstance(quantizer, TokenQuantizer)
    return replace(side, x=_gathered(side.x, quantizer.part), first_head=quantizer.part.number * side.packed.heads)


def _gathered(x: Tensor, part: Part) -> Tensor:
    sums = already_opened(part) if x.is_cuda else None
    if sums is None or not sums.takes(x.numel(), x.dtype):
        return gathered_heads(x, part, 1)
    return sums.gathered(x.movedim(1, 0).contiguous()).flatten(0, 1).movedim(0, 1)


def encode_own(side: Side, encode: Callable[[Side], Codes]) -> Codes:
    """What `encode` finds of all heads of the tokens, as far as it is of the own ones `side.x` `[B, G, S, D]`; sinks are stored."""
    quantizer = side.packed.quantizer
    assert isinstance(quantizer, TokenQuantizer)
    part = quantizer.part
    whole = _gathered(side.x, part)
    heads = part.of(whole.shape[1])
    sinks = side.sinks.new_empty(len(side.sinks), whole.shape[1], *side.sinks.shape[2:])
    sinks[:, heads] = side.sinks
    found = encode(Side(side.packed.of_all_heads, whole, sinks, []))
    side.sinks.copy_(sinks[:, heads])
    own = found.codes[..., part.of(found.codes.shape[-1])].contiguous()
    return Codes(own, found.ranges, found.counts[:, heads].contiguous())
