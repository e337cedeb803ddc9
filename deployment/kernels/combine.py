"""Put together what was computed of parts of the context: the flash-decoding reduction."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["new", "parts", "tiles", "batch"])
def combine_kernel(
    outputs,  # [parts, B, G, tiles, ROWS, D] fp32
    maxima,  # [parts, B, G, tiles, ROWS] fp32
    sums,
    result,  # [B, S, H, D] any float
    new,
    parts,
    tiles,
    batch,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # put together at once
):
    """One query of one head: the parts' outputs weighted by e^(their maximum - the maximum of all)."""
    GROUP: tl.constexpr = H // G
    head, rest = tl.program_id(0) % H, tl.program_id(0) // H
    token, b = rest % new, rest // new
    number = token * GROUP + head % GROUP
    row = ((b * G + head // GROUP) * tiles).to(tl.int64) * ROWS + number  # tiles are ROWS rows each
    per_part = (batch * G * tiles).to(tl.int64) * ROWS
    channel = tl.arange(0, CHANNELS)
    highest, total = float("-inf"), 0.0
    output = tl.zeros([CHANNELS], tl.float32)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)
        ok = part < parts
        at = row + part * per_part
        maximum = tl.load(maxima + at, mask=ok, other=float("-inf"))
        ok = ok & (maximum > float("-inf"))
        share = tl.load(sums + at, mask=ok, other=0)
        values = tl.load(
            outputs + at[:, None] * D + channel[None, :], mask=ok[:, None] & (channel < D)[None, :], other=0
        )
        raised = tl.maximum(highest, tl.max(maximum, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, factor = tl.exp2(highest - reference), tl.exp2(maximum - reference)
        output = output * shrink + tl.sum(values * factor[:, None], 0)
        total = total * shrink + tl.sum(share * factor, 0)
        highest = raised
    output = output / tl.where(total == 0, 1.0, total)
    to = result + ((b * new + token).to(tl.int64) * H + head) * D + channel
    tl.store(to, output.to(result.dtype.element_ty), mask=channel < D)
