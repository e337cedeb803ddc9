"""Every byte of the packed cache.

One layer's keys, or its values, of B sequences are a `PackedTensor`: pages of up to 8 blocks of 64 tokens.

    words[w]  :: [B, blocks, C_w, 2 * w]   int32    64 codes of w bits of a channel (packing.py), for the C_w channels of that width
    scales    :: [B, blocks * 64, 2]       fp16     scale and zero of a token, where the range is dynamic
    index     :: [N]                       int16    outlier: token * D + channel within its block and head, unsigned
    value     :: [N]                       fp16     outlier: the element itself
    ends      :: [B, blocks, G]            int32    end of the outlier list of (sequence, block, head) in index, value

Channels ascend within `words[w]`, so those of a head are contiguous; the paper's schemes know one width, and C_w = C. Lists
of outliers follow one another in the order of `ends`, so a list starts where the one before it ends, and whoever works
on one block and head reads only its own. A token is packed as soon as it arrives, also into a block that is not
full yet; since scales are static (keys) or the token's own (values), its codes never change afterwards. Pages are
allocated as the sequences grow, or at once when the length is known; growing copies nothing.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deployment.packing import GROUP, pack, unpack
from quant.quantizer import Encoded, Quantizer, TokenQuantizer, keeps_outliers
from quant.storage import BLOCK_TOKENS

PAGE_BLOCKS = 8
PAGE_TOKENS = PAGE_BLOCKS * BLOCK_TOKENS

Rows = slice | Tensor  # which sequences of the batch: all of them, or an index


@dataclass
class OutlierLists:
    """The outliers of one page; an append rebuilds them, so they are always exactly as long as they need be."""

    index: Tensor
    value: Tensor
    ends: Tensor

    @classmethod
    def empty(cls, batch: int, blocks: int, heads: int, device: torch.device) -> "OutlierLists":
        """No outliers yet."""
        return cls(
            index=torch.empty(0, dtype=torch.int16, device=device),
            value=torch.empty(0, dtype=torch.float16, device=device),
            ends=torch.zeros(batch, blocks, heads, dtype=torch.int32, device=device),
        )

    def lists(self) -> Tensor:
        """For every outlier the number of its list, `[N]` int64: (sequence * blocks + block) * G + head."""
        counts = self.ends.flatten().diff(prepend=self.ends.new_zeros(1))
        return torch.repeat_interleave(counts.long())

    def unsigned_index(self) -> Tensor:
        """`index` as int64."""
        return self.index.long() & 0xFFFF

    def rebuilt(self, lists: Tensor, index: Tensor, value: Tensor) -> "OutlierLists":
        """The same page with other outliers, given in any order with the number of their list."""
        order = (lists << 16 | index).argsort()
        counts = lists.bincount(minlength=self.ends.numel())
        return OutlierLists(
            index=index[order].short(), value=value[order], ends=counts.cumsum(0).int().view_as(self.ends)
        )

    def with_added(self, lists: Tensor, index: Tensor, value: Tensor) -> "OutlierLists":
        """The same page with more outliers."""
        return self.rebuilt(
            torch.cat([self.lists(), lists]), torch.cat([self.unsigned_index(), index]), torch.cat([self.value, value])
        )


@dataclass
class Page:
    """Some consecutive blocks of every sequence."""

    blocks: int
    words: dict[int, Tensor]
    scales: Tensor | None
    outliers: OutlierLists | None


class PackedTensor:
    """One layer's packed keys or values of B sequences; the attributes' bytes are all that is stored."""

    def __init__(self, quantizer: Quantizer, batch: int, heads: int, head_dim: int, device: torch.device) -> None:
        self.quantizer = quantizer.to(device)
        self.batch, self.heads, self.head_dim, self.device = batch, heads, head_dim, device
        # a width of 0 has no codes to store
        self.channels = {width: chosen for width, chosen in self.quantizer.channels.items() if width}
        self.pages: list[Page] = []

    @property
    def tokens_reserved(self) -> int:
        """Tokens per sequence that the pages have room for."""
        return sum(page.blocks for page in self.pages) * BLOCK_TOKENS

    def reserve(self, tokens: int, exactly: bool = False) -> None:
        """Make room for `tokens` per sequence, in whole pages, or `exactly` in whole blocks."""
        while (missing := tokens - self.tokens_reserved) > 0:
            blocks = min(PAGE_BLOCKS, -(-missing // BLOCK_TOKENS)) if exactly else PAGE_BLOCKS
            self.pages.append(self._new_page(blocks))

    def _new_page(self, blocks: int) -> Page:
        scales = outliers = None
        if isinstance(self.quantizer, TokenQuantizer):
            scales = torch.zeros(self.batch, blocks * BLOCK_TOKENS, 2, dtype=torch.float16, device=self.device)
        if keeps_outliers(self.quantizer):
            outliers = OutlierLists.empty(self.batch, blocks, self.heads, self.device)
        words = {
            width: torch.zeros(
                (self.batch, blocks, count, BLOCK_TOKENS // GROUP * width), dtype=torch.int32, device=self.device
            )
            for width, count in self._channel_counts().items()
        }
        return Page(blocks, words, scales, outliers)

    def _channel_counts(self) -> dict[int, int]:
        channels = torch.arange(self.heads * self.head_dim, device=self.device)
        return {width: len(channels[chosen]) for width, chosen in self.channels.items()}

    def write(self, rows: Rows, start: int, encoded: Encoded) -> None:
        """Append tokens `start`, `start + 1`, ... of the sequences `rows`; `encoded` holds `[R, n, C]` of them."""
        tokens = encoded.codes.shape[1]
        self.reserve(start + tokens)
        page_start = 0
        for page in self.pages:
            page_end = page_start + page.blocks * BLOCK_TOKENS
            low, high = max(start, page_start), min(start + tokens, page_end)
            if low < high:
                part = slice(low - start, high - start)
                self._write_codes(page, rows, low - page_start, encoded.codes[:, part])
                if page.scales is not None:
                    both = torch.cat([encoded.scale[:, part], encoded.zero[:, part]], dim=-1)
                    page.scales[rows, low - page_start : high - page_start] = both
            page_start = page_end
        if encoded.outliers is not None:
            self._write_outliers(rows, start, encoded)

    def _write_codes(self, page: Page, rows: Rows, offset: int, codes: Tensor) -> None:
        """Put codes `[R, n, C]` at token `offset` of a page, keeping what the first block already holds."""
        first, filled = divmod(offset, BLOCK_TOKENS)
        last = -(-(offset + codes.shape[1]) // BLOCK_TOKENS)
        held = codes.new_zeros(codes.shape[0], (last - first) * BLOCK_TOKENS, codes.shape[2])
        held[:, filled : filled + codes.shape[1]] = codes
        by_block = held.unflatten(1, (last - first, BLOCK_TOKENS))
        for width, chosen in self.channels.items():
            words = page.words[width]
            by_channel = by_block[..., chosen].transpose(2, 3).contiguous()  # [R, blocks, C_w, 64]
            if filled:
                by_channel[:, 0, :, :filled] = unpack(words[rows, first], width)[..., :filled]
            words[rows, first:last] = pack(by_channel, width)

    def _write_outliers(self, rows: Rows, start: int, encoded: Encoded) -> None:
        row, token, channel = encoded.outliers.nonzero(as_tuple=True)
        sequence = torch.arange(self.batch, device=self.device)[rows][row]
        block, slot = (token + start) // BLOCK_TOKENS, (token + start) % BLOCK_TOKENS
        head, dim = channel // self.head_dim, channel % self.head_dim
        index = slot * self.head_dim + dim
        first_block = 0
        for page in self.pages:
            here = (block >= first_block) & (block < first_block + page.blocks)
            # most appends touch one page of many
            if start < (first_block + page.blocks) * BLOCK_TOKENS and here.any():
                numbers = (sequence * page.blocks + block - first_block) * self.heads + head
                page.outliers = page.outliers.with_added(numbers[here], index[here], encoded.exact[here])
            first_block += page.blocks

    def read(self, page: Page, tokens: int) -> Tensor:
        """Dequantized first `tokens` tokens of a page, `[B, G, tokens, D]` float32, blocks rounded up."""
        blocks = min(page.blocks, -(-tokens // BLOCK_TOKENS))
        codes = self._read_codes(page, blocks)
        scale = zero = None
        if page.scales is not None:
            scale, zero = page.scales[:, : codes.shape[1]].split(1, dim=-1)
        dense = self.quantizer.dense(Encoded(codes, None, None, scale, zero))
        if page.outliers is not None:
            self._put_outliers(page, blocks, dense)
        return dense.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _read_codes(self, page: Page, blocks: int) -> Tensor:
        """Codes `[B, n, C]` uint8 of the first blocks of a page."""
        shape = (self.batch, blocks, BLOCK_TOKENS, self.heads * self.head_dim)
        codes = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        for width, chosen in self.channels.items():
            codes[..., chosen] = unpack(page.words[width][:, :blocks], width).transpose(2, 3)
        return codes.flatten(1, 2)

    def _put_outliers(self, page: Page, blocks: int, dense: Tensor) -> None:
        """Overwrite elements of `dense`, `[B, n, C]`."""
        assert page.outliers is not None
        lists, index = page.outliers.lists(), page.outliers.unsigned_index()
        head, block, sequence = (
            lists % self.heads,
            lists // self.heads % page.blocks,
            lists // self.heads // page.blocks,
        )
        token = (sequence * blocks + block) * BLOCK_TOKENS + index // self.head_dim
        place = (token * self.heads + head) * self.head_dim + index % self.head_dim
        value = page.outliers.value.float()
        if blocks < page.blocks:
            inside = block < blocks
            place, value = place[inside], value[inside]
        dense.view(-1)[place] = value

    def truncate(self, lengths: list[int]) -> None:
        """Forget all tokens from `lengths[b]` on of each sequence b."""
        limits = torch.tensor(lengths, device=self.device)
        page_start = 0
        for page in self.pages:
            if page.outliers is not None:
                lists, index = page.outliers.lists(), page.outliers.unsigned_index()
                block, sequence = lists // self.heads % page.blocks, lists // self.heads // page.blocks
                token = page_start + block * BLOCK_TOKENS + index // self.head_dim
                kept = token < limits[sequence]
                page.outliers = page.outliers.rebuilt(lists[kept], index[kept], page.outliers.value[kept])
            page_start += page.blocks * BLOCK_TOKENS

    def select(self, sequences: Tensor) -> None:
        """Keep the given sequences `[B']` int64, in this order; one may appear more than once."""
        for page in self.pages:
            page.words = {width: words[sequences] for width, words in page.words.items()}
            page.scales = None if page.scales is None else page.scales[sequences]
            if page.outliers is not None:
                page.outliers = _select_lists(page.outliers, sequences)
        self.batch = len(sequences)

    def tensors(self) -> list[Tensor]:
        """Every tensor that exists per cached token; the quantizer's tables are the model's, not the cache's."""
        held: list[Tensor] = []
        for page in self.pages:
            held += [*page.words.values(), *([] if page.scales is None else [page.scales])]
            if page.outliers is not None:
                held += [getattr(page.outliers, field.name) for field in fields(page.outliers)]
        return held


def _select_lists(outliers: OutlierLists, sequences: Tensor) -> OutlierLists:
    per_sequence = outliers.ends[0].numel()
    number = outliers.lists()
    sequence = number // per_sequence
    chosen = [(sequence == wanted).nonzero()[:, 0] for wanted in sequences]
    source = torch.cat(chosen)
    moved = torch.repeat_interleave(
        torch.arange(len(sequences), device=number.device), torch.tensor([len(c) for c in chosen], device=number.device)
    )
    selected = OutlierLists(outliers.index, outliers.value, outliers.ends[sequences])
    return selected.rebuilt(
        moved * per_sequence + number[source] % per_sequence, outliers.unsigned_index()[source], outliers.value[source]
    )
