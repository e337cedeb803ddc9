"""How the past is cut into stretches for reading: as many tokens as fit some scratch memory, which plan.py counts, in few lengths.

cuDNN plans for every length anew, 0.07 s each, and for every size of a batch's memory. So it is asked for few lengths, and what is left goes to flash.
"""

from collections.abc import Iterator

from quant.storage import BLOCK_TOKENS

FEW = 16  # queries of a KV head, which are not worth unpacking anything for
LONG = 1 << 26  # numbers of a sequence's keys, from which on they are where no kernel reads the codes
SCRATCH_BYTES = 256 * 2**20  # of a stretch's keys and values; with less, launching would take longer than computing
MOST_TOKENS = 65536  # of a stretch, as many as 256 MiB hold of 8 heads of 128 channels
PLANNED = 2048  # cuDNN is asked for multiples of so many tokens
_EVEN = 16384  # and from here on for powers of two
_LONGER = 8  # the last stretch may be longer than others by this part of them


def stretch_tokens(bytes_per_token: int) -> int:
    """Tokens of a stretch, whose keys take so many bytes each: whole plans of cuDNN if there are any, whole blocks, one at least."""
    tokens = min(SCRATCH_BYTES // (2 * bytes_per_token), MOST_TOKENS)
    even = _EVEN if tokens > _EVEN else PLANNED
    return max(1, (tokens // even * even or tokens) // BLOCK_TOKENS) * BLOCK_TOKENS


def whole_stretches(stretch: int, past: int) -> int:
    """Stretches of so many tokens before the last one, which may be an eighth longer, so that no few tokens are left for one more."""
    return max(0, -(-(past - stretch // _LONGER) // stretch) - 1)


def room_of(stretch: int, past: int, new: int, rows: int) -> int:
    """Tokens that there must be room for in each of `rows` sequences, which hold `past` and read `new` more.

    The rest of a block is unpacked, too. Of several sequences it is one of few sizes, at most an eighth of a stretch, or as much again, too many.
    """
    last = past - whole_stretches(stretch, past) * stretch + new + BLOCK_TOKENS
    room = max(last, min(past, stretch))
    if rows == 1:
        return room
    step = min(1 << (room - 1).bit_length(), max(1, stretch // _LONGER))
    return -(-room // step) * step


def planned_lengths(tokens: int) -> Iterator[int]:
    """Lengths for cuDNN that make up `tokens`, but for less than `PLANNED`."""
    while tokens >= PLANNED:
        length = MOST_TOKENS
        while length > tokens and length > _EVEN:
            length //= 2
        yield (length := min(length, tokens // PLANNED * PLANNED))
        tokens -= length
