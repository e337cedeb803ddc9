"""Attention over packed segments with masks made on the device, which alone need know how long sequences are.

For what is captured in a graph, and for queries that are anywhere: slower than prefill.py, of any shape. So that few queries fill a GPU, the tokens
are attended to in pieces, as if they were so many sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployment.kernels.library import HIDDEN, Part, attend_masked, merged
from deployment.kernels.packed import DenseSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.plain import rotated
from deployment.kernels.unpacking import unpack
from quant.storage import BLOCK_TOKENS

_PIECE = 512  # tokens


@dataclass(frozen=True)
class Asked:
    """Queries `[B, H, S, D]` fp16 or fp32, rotated and scaled, and what they attend to; D may be more than the segments have.

    `positions` `[B, S]` int64 are negative for queries that see nothing, which get zeros.
    """

    query: Tensor
    positions: Tensor
    segments: Sequence[Segment]
    rotary: Rotary
    kv_heads: int


def attend_masked_segments(asked: Asked, most: int, longest: int | None) -> Tensor:
    """Causal attention over stretches of at most so many tokens; the longest sequence has `longest`, if the host knows.

    Returns `[B, H, S, D]` in float32 or the queries' dtype.
    """
    total: Part | None = None
    for stretch in _stretches(asked.segments, most, longest):
        key, value = _plain(stretch, asked)
        part = _attend(asked.query, key, value, _seen(stretch, key.shape[1], asked.positions))
        total = part if total is None else merged(total, part)
    return torch.zeros_like(asked.query) if total is None else total[0]


Some = tuple[Segment, int, int]  # tokens of a segment: from which on, and how many


def _stretches(segments: Sequence[Segment], most: int, longest: int | None) -> list[list[Some]]:
    """Up to so many packed tokens each; all plain ones are behind the last of them, so that they cost no launches of their own."""
    stretches: list[list[Some]] = []
    plain: list[Some] = []
    for segment in segments:
        there = segment.tokens
        if isinstance(segment, DenseSegment):
            plain += [(segment, 0, there)] if there else []
            continue
        if longest is not None:
            there = min(there, longest - segment.start)
        stretches += [[(segment, first, min(most, there - first))] for first in range(0, there, most)]
    if plain:
        stretches[-1:] = [(stretches[-1] if stretches else []) + plain]
    return stretches


def _room(tokens: int) -> int:
    """Whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def _plain(stretch: list[Some], asked: Asked) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values `[B, n, G, D]` of tokens, each segment's in whole blocks, finite to the last; n is whole pieces, or less than one."""
    room = sum(_room(tokens) for _, _, tokens in stretch)
    room = -(-room // _PIECE) * _PIECE if room > _PIECE else room
    query, rotary, at = asked.query, asked.rotary, 0
    key, value = query.new_zeros(2, len(query), room, asked.kv_heads, query.shape[-1])
    for segment, first, tokens in stretch:
        if isinstance(segment, DenseSegment):
            rotated(segment.key, _places(segment, first, tokens), rotary, key[:, at : at + tokens])
            value[:, at : at + tokens, :, : segment.value.shape[-1]] = segment.value.transpose(1, 2)
        else:
            unpack(segment, rotary, first // BLOCK_TOKENS, _room(tokens) // BLOCK_TOKENS, 0, key, value, at)
        at += _room(tokens)
    return key, value


def _places(segment: Segment, first: int, tokens: int) -> Tensor:
    """Positions of tokens, `[B, tokens]`."""
    return segment.origins[:, None] + torch.arange(
        segment.start + first, segment.start + first + tokens, device=segment.origins.device
    )


def _seen(stretch: list[Some], room: int, positions: Tensor) -> Tensor:
    """Which tokens queries see, `[B, S, room]` bool."""
    parts = []
    for segment, first, tokens in stretch:
        places = _places(segment, first, tokens)
        there = places >= 0
        if segment.limits is not None:
            there &= places < segment.limits[:, None]
        seen = there[:, None, :] & (places[:, None, :] <= positions[..., None])
        parts.append(torch.nn.functional.pad(seen, (0, _room(tokens) - tokens)))
    seen = torch.cat(parts, -1)
    return torch.nn.functional.pad(seen, (0, room - seen.shape[-1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Part:
    """Attention over tokens of which `seen` `[B, S, n]` are."""
    (batch, heads, new, dim), (tokens, kv_heads) = query.shape, key.shape[1:3]
    piece = min(_PIECE, tokens)
    pieces, rows = tokens // piece, heads // kv_heads * new
    bias = query.new_zeros(seen.shape).masked_fill_(~seen, 2 * HIDDEN)
    bias = bias.unflatten(2, (pieces, piece)).transpose(1, 2).flatten(0, 1)  # [B * pieces, S, piece]
    bias = bias[:, None].expand(-1, heads // kv_heads, -1, -1).flatten(1, 2)[:, None]
    folded = query.reshape(batch, 1, kv_heads, rows, dim).expand(-1, pieces, -1, -1, -1).flatten(0, 1)
    key, value = (x.view(batch * pieces, piece, kv_heads, dim).transpose(1, 2) for x in (key, value))
    output, lse = (x.unflatten(0, (batch, pieces)) for x in attend_masked(folded, key, value, bias))
    lse = lse.masked_fill(lse < HIDDEN, -torch.inf)
    total = lse.logsumexp(1)
    weights = (lse - total[:, None]).exp().nan_to_num(0.0)  # all -inf: nothing is seen
    output = (output.float() * weights[..., None]).sum(1)
    return output.view(batch, heads, new, dim), total.view(batch, heads, new)
