"""Sinks and codes of one layer, dequantized some blocks at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from gradients.models import KINDS, Kind
from quant.storage import BLOCK_TOKENS

STRETCH_BLOCKS = 16  # of what is dequantized at once: a CPU's second cache should hold it


@dataclass(frozen=True)
class Stretch:
    """Stored tokens `start`, ..., `end - 1` of every sequence, dequantized: `[B, G, end - start, D]` float32."""

    start: int
    end: int
    key: Tensor
    value: Tensor


def stretches(
    sinks: Mapping[Kind, Tensor], packed: Mapping[Kind, PackedTensor], begin: int, end: int
) -> Iterator[Stretch]:
    """What holds tokens `begin`, ..., `end` - 1: sinks `[B, G, N, D]`, and the codes of those after them.

    Shorter sequences show zeros or waste.
    """
    first_coded = sinks["key"].shape[2]
    if begin < (exact := min(first_coded, end)):
        key, value = (sinks[kind][:, :, :exact].float() for kind in KINDS)
        yield Stretch(0, exact, key, value)
    for pages in zip(packed["key"].pages, packed["value"].pages, strict=True):
        page_start = first_coded + pages[0].start
        needed = min(-(-(end - page_start) // BLOCK_TOKENS), pages[0].blocks)
        unneeded = max(0, begin - page_start) // BLOCK_TOKENS
        for first in range(unneeded, needed, STRETCH_BLOCKS):
            blocks = min(STRETCH_BLOCKS, needed - first)
            start = page_start + first * BLOCK_TOKENS
            key = packed["key"].read(pages[0], first, blocks)
            value = packed["value"].read(pages[1], first, blocks)
            yield Stretch(start, start + blocks * BLOCK_TOKENS, key, value)


def dequantized(
    sinks: Mapping[Kind, Tensor], packed: Mapping[Kind, PackedTensor], row: int, first: int, tokens: int
) -> dict[Kind, Tensor]:
    """A row's tokens `first`, ..., keys and values `[G, tokens, D]` float32; zeros before token 0."""
    heads, _, dim = sinks["key"].shape[1:]
    begin, end = max(0, first), max(0, first + tokens)
    empty = torch.zeros(heads, tokens - (end - begin), dim, device=sinks["key"].device)
    parts: dict[Kind, list[Tensor]] = {"key": [empty], "value": [empty]}
    for stretch in stretches(sinks, packed, begin, end) if begin < end else ():
        inside = slice(max(0, begin - stretch.start), max(0, end - stretch.start))
        parts["key"].append(stretch.key[row, :, inside])
        parts["value"].append(stretch.value[row, :, inside])
    return {kind: torch.cat(states, dim=1) for kind, states in parts.items()}
