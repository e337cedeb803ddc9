"""Ranges and outliers of tokens of which this process has some heads only (gradients/parallel.py).

The token is gathered, encoded with all of its heads as one process would, and the own heads' codes are kept. Nothing
waits for the device, so a graph may be recorded.
"""

from collections.abc import Callable

from deployment.kernels.side import Codes, Side
from gradients.parallel import gathered_heads
from quant.quantizer import TokenQuantizer


def encode_own(side: Side, encode: Callable[[Side], Codes]) -> Codes:
    """What `encode` finds of all heads of the tokens, as far as it is of the own ones `side.x` `[B, G, S, D]`; sinks are stored."""
    quantizer = side.packed.quantizer
    assert isinstance(quantizer, TokenQuantizer)
    part = quantizer.part
    whole = gathered_heads(side.x, part, 1)
    heads = part.of(whole.shape[1])
    sinks = side.sinks.new_empty(len(side.sinks), whole.shape[1], *side.sinks.shape[2:])
    sinks[:, heads] = side.sinks
    found = encode(Side(side.packed.of_all_heads, whole, sinks, []))
    side.sinks.copy_(sinks[:, heads])
    own = found.codes[..., part.of(found.codes.shape[-1])].contiguous()
    return Codes(own, found.ranges, found.counts[:, heads].contiguous())
