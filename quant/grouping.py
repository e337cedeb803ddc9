"""Which channels of a KV head share a width: groups of 16 that need about as much.

The decode kernel reads groups of 16 channels at full speed (deployment/format/groups.py), so a head's channels are permuted: values one by
one, keys by rotary pairs, whose first halves make a group and their second halves the next, each with its own width. Given what every
width would cost every channel, errors and bits at a price together, groups are formed from several sorted orders, and then improved:
each takes the width that is best for it, and any two exchange members until no exchange pays. The best of all is kept.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from gradients.models import Kind
from quant.scheme import GROUP_CHANNELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDS = 20  # of widths and exchanges; a few suffice


def rotary_pairs(dim: int, rotary_half: int) -> Ints:
    """The channels of every rotary pair of a head, `[D / 2, 2]`; of those that do not rotate, too.

    The first `rotary_half` pairs are channels (p, p + rotary_half), the others alike: see deployment/kernels/phase.py.
    """
    pair = np.arange(dim // 2)
    first = np.where(pair < rotary_half, pair, pair + rotary_half)
    return np.stack([first, np.where(pair < rotary_half, pair + rotary_half, pair + len(pair))], axis=1)


def units_of(kind: Kind, heads: int, dim: int, rotary_half: int | None) -> Ints | None:
    """What is grouped: the channels of every unit, `[G, U, m]` of C, m being 2 for the rotary pairs of keys and 1 for values.

    None where groups do not fit, so that each channel has its own width: heads that are no multiple of 32 channels, or keys that rotate in
    some layers otherwise than in others (`rotary_half` None).
    """
    if dim % (2 * GROUP_CHANNELS) or (kind == "key" and rotary_half is None):
        return None
    head = rotary_pairs(dim, rotary_half) if kind == "key" and rotary_half is not None else np.arange(dim)[:, None]
    return head + dim * np.arange(heads)[:, None, None]


def form_groups(costs: Floats, units: Ints) -> Ints:
    """Each head's channels, `[G, D]` of C, 16 to a group, such that a width for each group costs little.

    Args:
        costs: of every width for every channel, `[W, C]`.
        units: as of `units_of`.
    """
    own = costs[:, units]  # [W, G, U, m]
    _, heads, count, parts = own.shape
    if parts == 2:  # a pair of groups has a pair of widths
        own = own[:, None, ..., 0] + own[None, ..., 1]
    own = own.reshape(-1, heads, count).transpose(1, 0, 2)  # [G, O, U]
    best, least = None, np.full(heads, np.inf)
    for key in _sort_keys(costs[:, units]):
        order, cost = _improved(own, key.argsort(axis=1, kind="stable"))
        better = cost < least
        best = order if best is None else np.where(better[:, None], order, best)
        least = np.minimum(cost, least)
    assert best is not None
    grouped = np.take_along_axis(units, best[..., None], 1).reshape(heads, -1, GROUP_CHANNELS, parts)
    return grouped.swapaxes(2, 3).reshape(heads, -1)


def are_groups(places: NDArray[np.integer], head: Ints) -> bool:
    """Whether `places` `[G, D]`, channels of each head, are groups of the units `head` `[U, m]` of a head."""
    grouped = (
        places.reshape(len(places), -1, head.shape[1], GROUP_CHANNELS).swapaxes(2, 3).reshape(len(places), *head.shape)
    )
    first = grouped[..., 0].astype(np.int64).argsort(1, kind="stable")
    return bool((np.take_along_axis(grouped, first[..., None], 1) == head[head[:, 0].argsort()]).all())


def _sort_keys(costs: Floats) -> Iterator[Floats]:
    """Orders to begin with, `[G, U]` numbers each: what narrower widths cost more than wider ones, of all members or of one."""
    for low, high in combinations(range(len(costs)), 2):
        if high - low <= 2:
            need = costs[low] - costs[high]
            yield need.sum(-1)
            if need.shape[-1] == 2:
                yield need[..., 0]
                yield need[..., 1]
                yield need[..., 0] - need[..., 1]


def _improved(costs: Floats, order: Ints) -> tuple[Ints, Floats]:
    """(order `[G, U]` after exchanges between groups, what it costs `[G]`); `costs` `[G, O, U]` are those of the options."""
    heads, _, count = costs.shape
    groups, before = count // GROUP_CHANNELS, np.full(heads, np.inf)
    for _ in range(_ROUNDS):
        sums = np.take_along_axis(costs, order[:, None], 2).reshape(heads, -1, groups, GROUP_CHANNELS).sum(-1)
        option, total = sums.argmin(1), sums.min(1).sum(1)
        if not (total < before).any():
            break
        before = total
        chosen = np.take_along_axis(costs, option[..., None], 1)  # [G, groups, U]
        order = order.reshape(heads, groups, GROUP_CHANNELS).copy()
        for one, other in combinations(range(groups), 2):
            members = np.concatenate([order[:, one], order[:, other]], axis=1)
            gain = np.take_along_axis(chosen[:, one] - chosen[:, other], members, 1)
            sorted_members = np.take_along_axis(members, gain.argsort(axis=1, kind="stable"), 1)
            order[:, one], order[:, other] = np.split(sorted_members, 2, axis=1)
        order = order.reshape(heads, count)
    return order, before
