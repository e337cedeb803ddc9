"""What an element costs once it is stored: the constants of the packed cache, and the sums made of them.

`deployment/format/layout.py` lays out exactly these bytes; they are named here because `quant.evaluate` reports them.
"""

from dataclasses import dataclass

BLOCK_TOKENS = 64  # tokens of a block; a KV head's codes of one block are contiguous
FP16_BITS = 16
TOKEN_SCALE_BITS = 2 * FP16_BITS  # scale and zero of a token-wise axis
OUTLIER_BITS = 16 + FP16_BITS  # index within block and head, value
OUTLIER_LIST_BITS = 32  # end of the outlier list of one block and head


@dataclass(frozen=True)
class StoredSize:
    """Bits stored and elements they stand for; sizes of several tensors add up."""

    bits: int = 0
    elements: int = 0

    def __add__(self, other: "StoredSize") -> "StoredSize":
        return StoredSize(self.bits + other.bits, self.elements + other.elements)

    @property
    def bits_per_element(self) -> float:
        """Mean bits of one element."""
        return self.bits / self.elements


def exact_size(tokens: int, channels: int) -> StoredSize:
    """Tokens kept in fp16 (attention sinks)."""
    return StoredSize(tokens * channels * FP16_BITS, tokens * channels)


def packed_size(
    tokens: int, heads: int, channels: int, code_bits: int, outliers: int, has_outliers: bool, token_scales: bool
) -> StoredSize:
    """One sequence of packed tokens, the unused slots of its last block included.

    Args:
        heads, channels: G and C of the layer.
        code_bits: bits of a token's codes, all channels together.
        outliers: number of elements kept exactly; `has_outliers` is whether lists exist at all.
        token_scales: whether every token stores a scale and a zero.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    slots = blocks * BLOCK_TOKENS
    total = slots * code_bits
    if token_scales:
        total += slots * TOKEN_SCALE_BITS
    if has_outliers:
        total += outliers * OUTLIER_BITS + blocks * heads * OUTLIER_LIST_BITS
    return StoredSize(total, tokens * channels)
