"""Page layout of the packed cache: words, scales and outliers of blocks of 64 tokens.

One layer's keys, or its values, of B sequences are a `PackedTensor`: pages of blocks of 64 tokens. When the length is
known there is one page; otherwise further ones are added as the sequences grow, which copies nothing.

    words     :: [B, blocks, W]            int32  a block's codes, W = 2 * the sum of all channels' bits (order.py)
    scales    :: [B, blocks * 64, 2]       fp16   scale and zero of a token, where the range is dynamic
    index, value, ends                            outliers (streams.py): 4 bytes each, and 4 per block and head

Every KV head's words of a block are contiguous, and so are its outliers. A token is packed as soon as it arrives, also into
a block that is not full yet; since scales are static (keys) or the token's own (values), its codes never change
afterwards. The code of an outlier is stored as 0, so that a kernel knows what is to be corrected.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from deployment.format.bits import places_of
from deployment.format.groups import GroupOrder
from deployment.format.order import Order, order_of
from deployment.format.page import Page
from deployment.format.room import ROOM_TOKENS
from deployment.format.streams import FEW, OutlierStreams, index_span, sent
from deployment.format.tables import FeedbackTables, Tables
from gradients.models import Kind
from quant.outliers import outliers_per_end
from quant.quantizer import Encoded, Quantizer, TokenQuantizer, keeps_outliers
from quant.storage import BLOCK_TOKENS

PAGE_BLOCKS = 8  # of the smallest page
_GROWTH = 8  # a further page holds at least an eighth of what is there already

Rows = slice | Tensor  # which sequences of the batch: all of them, or an index


class PackedTensor:
    """One layer's packed keys or values of B sequences; the attributes' bytes are all that is stored.

    `rotary_half` and `channels` are as of `order_of`.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        batch: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        kind: Kind,
        rotary_half: int | None = None,
        channels: Tensor | None = None,
    ) -> None:
        self.quantizer = quantizer.to(device)
        self.batch, self.heads, self.head_dim, self.device = batch, heads, head_dim, device
        self.rotary_half = head_dim // 2 if rotary_half is None else rotary_half
        self.order: Order = order_of(self.quantizer, heads, head_dim, kind, rotary_half, channels)
        self.span = index_span(head_dim) if self.keeps_outliers else 0  # tokens that an outlier's index tells apart
        self.pages: list[Page] = []

    @cached_property
    def tables(self) -> Tables:
        """The quantizer as the kernels read it."""
        return Tables.of(self.quantizer, self.order, self.heads * self.head_dim)

    @cached_property
    def feedback(self) -> FeedbackTables | None:
        """How errors are handed on, as the kernels read it; None if they are not."""
        return FeedbackTables.of(self.quantizer)

    @property
    def keeps_outliers(self) -> bool:
        """Whether lists of outliers exist at all."""
        return keeps_outliers(self.quantizer)

    @property
    def tokens_reserved(self) -> int:
        """Tokens per sequence that the pages have room for."""
        return self.pages[-1].end if self.pages else 0

    def reserve(self, tokens: int, exactly: bool = False) -> None:
        """Make room for `tokens` per sequence, in a page of a decent size, or `exactly` in whole blocks."""
        missing = -(-(tokens - self.tokens_reserved) // BLOCK_TOKENS)
        if missing > 0:
            least = 0 if exactly else max(PAGE_BLOCKS, self.tokens_reserved // BLOCK_TOKENS // _GROWTH)
            self.pages.append(self._new_page(max(missing, least)))

    def _new_page(self, blocks: int) -> Page:
        scales = outliers = None
        if isinstance(self.quantizer, TokenQuantizer):
            scales = torch.zeros(self.batch, blocks * BLOCK_TOKENS, 2, dtype=torch.float16, device=self.device)
        if self.keeps_outliers:
            outliers = OutlierStreams.empty(self.batch, self.heads, blocks, self.device)
        words = torch.zeros(self.batch, blocks, self.order.words, dtype=torch.int32, device=self.device)
        return Page(self.tokens_reserved, blocks, words, scales, outliers)

    def make_room(self, start: int, span: int, tokens: int, overflow: Tensor) -> list[Page]:
        """Prepare for the append kernels to store up to `tokens` per sequence, which begin at `start` or later.

        All end before `start` + `span`. Returns the pages they go to; the device is not waited for (room.py).
        """
        self.reserve(start + span)
        for page in self.pages:
            if page.outliers is not None and page.end > start:
                page.make_room(*self._worst(page, start, span, tokens))
            elif page.outliers is not None and page.room is not None:
                page.outliers = page.room.settled(page.outliers, overflow)
        return self.pages_of(start, span)

    def pages_of(self, start: int, span: int | None = None) -> list[Page]:
        """The pages that `span` tokens from `start` on are in, or all tokens from there on."""
        return [page for page in self.pages if page.end > start and (span is None or page.start < start + span)]

    def _worst(self, page: Page, start: int, span: int, tokens: int) -> tuple[int, int]:
        """(outliers of one stream that `tokens` tokens may add to a page, those of what is kept spare)."""
        here = min(tokens, min(start + span, page.end) - max(start, page.start))
        return max(here, 0) * self.most_outliers, ROOM_TOKENS * self.most_outliers

    def used_room(self, start: int, span: int, tokens: int, overflow: Tensor) -> None:
        """The kernels have stored what `make_room` prepared for."""
        for page in self.pages_of(start, span):
            if page.outliers is not None and page.room is not None:
                page.room.used(page.outliers, *self._worst(page, start, span, tokens), overflow)

    def fix(self) -> None:
        """Let streams stay where they are, since a graph will rely on it."""
        for page in self.pages:
            if page.room is not None:
                page.room.fixed = True

    def counts(self) -> list[Tensor]:
        """How many outliers the device has counted, `[B * G]` int64 for every page with room."""
        return [
            page.outliers.counts().flatten()
            for page in self.pages
            if page.outliers is not None and page.room is not None
        ]

    def recount(self, counts: Iterator[Tensor]) -> None:
        """Take over the next of `counts`, which have come to the host."""
        for page in self.pages:
            if page.outliers is not None and page.room is not None:
                page.room.recount(next(counts))

    @property
    def most_outliers(self) -> int:
        """Of one token in one head."""
        if isinstance(self.quantizer, TokenQuantizer):
            channels = self.heads * self.head_dim * self.quantizer.part.count
            return min(self.head_dim, 2 * outliers_per_end(channels, self.quantizer.scheme.outliers))
        return self.head_dim

    def write(self, rows: Rows, start: int, encoded: Encoded) -> None:
        """Append tokens `start`, `start + 1`, ... of the sequences `rows`; `encoded` holds `[R, n, C]` of them."""
        codes = encoded.codes
        if encoded.outliers is not None:
            codes = codes.masked_fill(encoded.outliers, 0)
        self.reserve(start + codes.shape[1])
        for page, part in self._parts(start, codes.shape[1]):
            offset = start + part.start - page.start
            self._write_codes(page, rows, offset, codes[:, part])
            if page.scales is not None:
                both = torch.cat([encoded.scale[:, part], encoded.zero[:, part]], dim=-1)
                page.scales[rows, offset : offset + both.shape[1]] = both
        if encoded.outliers is not None:
            self._write_outliers(rows, start, encoded)

    def _parts(self, start: int, tokens: int) -> Iterator[tuple[Page, slice]]:
        """The pages that new tokens `start`, ..., `start + tokens - 1` go to, and which of them."""
        for page in self.pages:
            low, high = max(start, page.start), min(start + tokens, page.end)
            if low < high:
                yield page, slice(low - start, high - start)

    def _write_codes(self, page: Page, rows: Rows, offset: int, codes: Tensor) -> None:
        """Put codes `[R, n, C]` at token `offset` of a page, keeping what the first block already holds."""
        first, filled = divmod(offset, BLOCK_TOKENS)
        if codes.shape[1] == 1 and isinstance(self.order, GroupOrder):
            page.words[rows, first] = places_of(self.order).store(page.words[rows, first], filled, codes[:, 0])
            return
        last = -(-(offset + codes.shape[1]) // BLOCK_TOKENS)
        held = codes.new_zeros(codes.shape[0], (last - first) * BLOCK_TOKENS, codes.shape[2])
        if filled:
            held[:, :filled] = self.order.unpack(page.words[rows, first])[:, :filled]
        held[:, filled : filled + codes.shape[1]] = codes
        page.words[rows, first:last] = self.order.pack(held.unflatten(1, (last - first, BLOCK_TOKENS)))

    def _write_outliers(self, rows: Rows, start: int, encoded: Encoded) -> None:
        assert encoded.outliers is not None and encoded.exact is not None
        if len(encoded.exact) <= FEW:
            self._write_few_outliers(rows, start, encoded)
            return
        row, token, channel = encoded.outliers.nonzero(as_tuple=True)
        sequence = torch.arange(self.batch, device=self.device)[rows][row]
        head, dim = channel // self.head_dim, channel % self.head_dim
        for page, part in self._parts(start, encoded.codes.shape[1]):
            assert page.outliers is not None
            here = (token >= part.start) & (token < part.stop)
            place = token + start - page.start
            lists = (sequence * self.heads + head) * page.blocks + place // BLOCK_TOKENS
            index = place % self.span * self.head_dim + dim
            page.outliers = page.outliers.with_added(lists[here], index[here], encoded.exact[here])
            page.room = None

    def _write_few_outliers(self, rows: Rows, start: int, encoded: Encoded) -> None:
        """The same for a decode step: numbers of the host need no tensor operation each."""
        assert encoded.outliers is not None and encoded.exact is not None
        sequences = list(range(self.batch)) if isinstance(rows, slice) else rows.tolist()
        elements = list(enumerate(encoded.outliers.nonzero().tolist()))
        for page, part in self._parts(start, encoded.codes.shape[1]):
            added = []
            for number, (row, token, channel) in elements:
                if part.start <= token < part.stop:
                    (head, dim), place = divmod(channel, self.head_dim), token + start - page.start
                    stream = (sequences[row] * self.heads + head) * page.blocks + place // BLOCK_TOKENS
                    added.append((stream, place % self.span * self.head_dim + dim, number))
            if added:
                assert page.outliers is not None
                page.outliers, page.room = page.outliers.with_few(sorted(added), encoded.exact), None

    def read(self, page: Page, first: int = 0, blocks: int | None = None) -> Tensor:
        """Dequantized tokens of some blocks of a page, all from `first` on by default, `[B, G, n, D]` float32."""
        last = page.blocks if blocks is None else min(page.blocks, first + blocks)
        codes = self.order.unpack(page.words[:, first:last]).flatten(1, 2)
        scale = zero = None
        if page.scales is not None:
            scale, zero = page.scales[:, first * BLOCK_TOKENS : last * BLOCK_TOKENS].split(1, dim=-1)
        dense = self.quantizer.dense(Encoded(codes, None, None, scale, zero))
        if page.outliers is not None:
            self._put_outliers(page.outliers, first, last, dense)
        return dense.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _put_outliers(self, outliers: OutlierStreams, first: int, last: int, dense: Tensor) -> None:
        """Overwrite elements of `dense`, `[B, n, C]`, which holds the blocks `first`, ..., `last - 1`."""
        lists, index, value = outliers.entries(first, last)
        block, stream = lists % outliers.blocks, lists // outliers.blocks
        token = (stream // self.heads * (last - first) + block - first) * BLOCK_TOKENS
        token += index // self.head_dim % BLOCK_TOKENS
        place = (token * self.heads + stream % self.heads) * self.head_dim + index % self.head_dim
        dense.view(-1)[place] = value.float()

    def truncate(self, lengths: list[int]) -> None:
        """Forget all tokens from `lengths[b]` on of each sequence b."""
        limits = sent(torch.tensor(lengths), self.device)
        for page in self.pages:
            if page.outliers is None or page.end <= min(lengths):
                continue
            if page.outliers.can_shorten:
                page.outliers.shorten(limits - page.start, self.head_dim)
            else:
                page.outliers = page.outliers.before(limits - page.start, self.head_dim)
                page.room = None

    def select(self, sequences: Tensor) -> None:
        """Keep the given sequences `[B']` int64, in this order; one may appear more than once."""
        for page in self.pages:
            page.words = page.words[sequences]
            page.scales = None if page.scales is None else page.scales[sequences]
            page.outliers = None if page.outliers is None else page.outliers.select(sequences)
            page.room = None
        self.batch = len(sequences)

    def tensors(self) -> list[Tensor]:
        """Every tensor that exists per cached token; the quantizer's tables are the model's, not the cache's."""
        held: list[Tensor] = []
        for page in self.pages:
            held += [page.words, *([] if page.scales is None else [page.scales])]
            held += [] if page.outliers is None else page.outliers.tensors()
        return held

    def copied_bytes(self) -> int:
        """Of these what another process of a tensor-parallel model holds, too: the ranges of tokens, but for the first process."""
        if not isinstance(self.quantizer, TokenQuantizer) or self.quantizer.part.number == 0:
            return 0
        return sum(page.scales.nbytes for page in self.pages if page.scales is not None)
