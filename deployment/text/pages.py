"""Merge all pages of a packed tensor into one without spare capacity, for a file, and rebuild a page from it.

Pages are how a cache grows without copying; a file needs none of it. What a block stores does not depend on the page it
lies in, so words and scales are joined, and only the outliers' lists get other numbers. A file counts an outlier's index
within its block, token % 64 * D + channel, whatever a page in memory does.
"""

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.format.streams import OutlierStreams
from quant.storage import BLOCK_TOKENS


def one_page(packed: PackedTensor, blocks: int) -> dict[str, Tensor]:
    """What all pages store of the first `blocks` blocks, as one page without room."""
    tokens = blocks * BLOCK_TOKENS
    empty = torch.zeros(packed.batch, 0, packed.order.words, dtype=torch.int32, device=packed.device)
    tensors = {"words": torch.cat([empty, *(page.words for page in packed.pages)], dim=1)[:, :blocks]}
    scales = [page.scales for page in packed.pages if page.scales is not None]
    if scales:
        tensors["scales"] = torch.cat(scales, dim=1)[:, :tokens]
    pages = [(page, page.outliers) for page in packed.pages if page.outliers is not None and page.start < tokens]
    if not pages:
        return tensors
    lists, index, value = [], [], []
    for page, outliers in pages:
        number, *entries = outliers.entries()
        lists.append(number // page.blocks * blocks + page.start // BLOCK_TOKENS + number % page.blocks)
        index.append(entries[0] % (BLOCK_TOKENS * packed.head_dim))
        value.append(entries[1])
    # a list lies within one page, so a stable sort keeps the order within it
    merged, order = torch.cat(lists).sort(stable=True)
    counts = merged.bincount(minlength=packed.batch * packed.heads * blocks)
    ends = counts.cumsum(0).view(packed.batch, packed.heads, blocks).int()
    return tensors | {"index": torch.cat(index)[order].short(), "value": torch.cat(value)[order], "ends": ends}


def pages_of(packed: PackedTensor, parts: dict[str, Tensor], room: int) -> list[Page]:
    """One page of the tensors of a file, as long as an unbroken run would have made it for `room` tokens."""
    held = parts["words"].shape[1]
    packed.reserve(max(room, held * BLOCK_TOKENS), exactly=True)
    if not held:  # all of a short text may be sinks and recent window
        return packed.pages
    page = packed.pages[0]
    page.words[:, :held] = parts["words"].to(packed.device)
    if page.scales is not None:
        page.scales[:, : held * BLOCK_TOKENS] = parts["scales"].to(packed.device)
    if page.outliers is not None:
        index, value, ends = (parts[name].to(packed.device) for name in ("index", "value", "ends"))
        if ends.shape != (packed.batch, packed.heads, held) or index.shape != value.shape:
            raise ValueError(f"outliers {tuple(index.shape)}, {tuple(value.shape)}, {tuple(ends.shape)}")
        streams = OutlierStreams(index, value, torch.cat([ends, _last(ends, page.blocks - held)], dim=-1))
        lists, within, _ = streams.entries()
        span = packed.span  # the tokens that a page's indices tell apart
        streams.index = (within + lists % page.blocks * BLOCK_TOKENS % span * packed.head_dim).short()
        page.outliers = streams
    return [page]


def _last(ends: Tensor, blocks: int) -> Tensor:
    """The ends of `blocks` empty blocks after those that there are."""
    last = ends[..., -1:] if ends.shape[-1] else ends.new_zeros(*ends.shape[:2], 1)
    return last.expand(-1, -1, blocks)
