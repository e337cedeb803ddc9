"""Validate masks and position ids of every forward, without synchronising with the GPU.

A packed cache knows one pattern: attention is causal, rows are padded on the left, and the tokens of a row are counted one
by one, from any number on. Whatever a mask or position ids say beyond that is refused.

The first packed layer of a cache looks, the others follow it, and refuse to if they hold other tokens than it does. A chunk of
several tokens has its mask read, since how much of it is padding must be known on the host. A single token of rows that all
hold tokens is no padding, so whether mask and positions are as expected need not be known at once: on a CPU they are looked at,
elsewhere the device compares, and the answer is read when it has long been there, at the latest when `packed_attention` ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from deployment.devices import is_capturing
from deployment.format.streams import sent

_ASKED = 16  # steps after which the device's answer is asked for
_LEFT = "a packed cache takes left padding only; pad with tokenizer.padding_side = 'left', and keep masks"
_OTHER = "a packed cache takes causal attention with left padding, no other mask (packed sequences, images, say)"
_HIDDEN = "attention_mask hides other tokens than the left padding"
_COUNTED = "position_ids do not count the tokens of a row one by one"
_unsettled: "WeakSet[Checked]" = WeakSet()


class Counts(Protocol):
    """What is read of a packed layer."""

    slots: int
    lengths: list[int]
    stored: Tensor
    leads: bool


class Checked:
    """What has been checked for the packed layers of one cache."""

    def __init__(self) -> None:
        self._said: tuple[int, list[int], int, list[int]] | None = None  # slots, lengths, new, padding
        self._offsets: Tensor | None = None  # [B] int64, what a row counts its first token as
        self._mask: tuple[list[int], Tensor] | None = None  # [B, at least T] bool of rows so padded
        self._right: Tensor | None = None  # scalar bool on the device: all was as expected
        self._answer = torch.ones((), dtype=torch.bool)  # the same on the host, as far as it has arrived
        self._steps = 0
        self._trusting = False

    @contextmanager
    def trusting(self) -> Iterator[None]:
        """Within the block, steps are taken as they come: what is recorded there is checked when it is repeated."""
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    def padding(
        self,
        layer: Counts,
        mask: Tensor | None,
        positions: Tensor | None,
        new: int,
        absolute: bool = False,
        none: bool = False,
    ) -> list[int]:
        """How many of a chunk's `new` tokens are left padding, for each row.

        Args:
            layer: as it is before the chunk is stored.
            mask: `[B or 1, 1, 1, T + S]` bool or integer, 0 for padding; None if nothing is hidden.
            positions: `[B or 1, S]` int64; None if nobody said.
            absolute: whether positions matter themselves, and not only their differences.
            none: that none may be, so that the mask need not be read: rows that hold tokens are padded no more.

        Raises ValueError for other masks and positions, RuntimeError for layers that hold different tokens.
        """
        if layer.leads:
            self._said = None
            padding = self._checked(layer, mask, positions, new, absolute, none)
            self._said = layer.slots, layer.lengths, new, padding
        elif self._said is None or self._said[:3] != (layer.slots, layer.lengths, new):
            raise RuntimeError(
                "the layers of the cache hold different tokens, since a forward was interrupted; "
                "reset() it and read the text again"
            )
        assert self._said is not None
        return self._said[3]

    def _checked(
        self, layer: Counts, mask: Tensor | None, positions: Tensor | None, new: int, absolute: bool, none: bool
    ) -> list[int]:
        if self._trusting:
            return [0] * len(layer.lengths)
        if layer.slots == 0:
            self._offsets, self._right = None, None
            self._answer = torch.ones((), dtype=torch.bool)
        elif not self._answer.item():
            raise ValueError(f"an earlier step over this cache was wrong: {_HIDDEN}, or {_COUNTED}; reset() it")
        hidden = [layer.slots - length for length in layer.lengths]
        looks = not is_capturing(layer.stored.device)  # what a graph holds is compared with nothing later
        if mask is None:
            padding = [0] * len(hidden)
            if any(hidden):
                raise ValueError("rows of the packed cache began with padding; pass attention_mask with every step")
        else:
            _check_form(mask, len(hidden), layer.slots + new)
            if (new > 1 and not none) or not all(layer.lengths):
                padding = _read_padding(mask, layer, new)
            else:
                padding = [0] * len(hidden)
                if looks:
                    self._note(self._is_expected(mask[:, 0, 0], hidden), _HIDDEN)
        if positions is not None and looks:
            self._note(self._are_counted(layer, positions, padding, absolute), _COUNTED)
        return padding

    def _is_expected(self, mask: Tensor, hidden: list[int]) -> Tensor:
        """Whether `[B or 1, T]`, 0 or 1, hides exactly the first `hidden` tokens of each row; a scalar on the device."""
        if not any(hidden):
            return mask.all()
        tokens = mask.shape[1]
        if self._mask is None or self._mask[0] != hidden or self._mask[1].shape[1] < tokens:
            pads = sent(torch.tensor(hidden), mask.device)
            self._mask = hidden, torch.arange(2 * tokens, device=mask.device) >= pads[:, None]
        return (mask == self._mask[1][:, :tokens]).all()

    def _are_counted(self, layer: Counts, positions: Tensor, padding: list[int], absolute: bool) -> Tensor:
        """Whether a chunk's positions go on from those of the chunks before; a scalar on the device."""
        new, numbers = positions.shape[1], layer.stored[:, None]
        if new > 1:
            numbers = numbers + torch.arange(new, device=numbers.device)
        if any(padding):
            numbers = numbers - torch.tensor(padding, device=numbers.device)[:, None]
        counted = positions - numbers
        if self._offsets is None:
            self._offsets = counted[:, -1]
        elif not all(layer.lengths):  # rows of which only padding was seen
            self._offsets = self._offsets.where(layer.stored > 0, counted[:, -1])
        same = counted == self._offsets[:, None]
        right = (same | (numbers < layer.stored[:, None])).all() if any(padding) else same.all()
        if not absolute:
            return right
        longest = max(length - pad for length, pad in zip(layer.lengths, padding, strict=True)) + new
        return right & (positions.max() == longest - 1)

    def _note(self, right: Tensor, otherwise: str) -> None:
        """Raise ValueError if something is wrong, now or later."""
        if right.device.type == "cpu":
            if not right:
                raise ValueError(f"{otherwise}; a packed cache does not do that")
            return
        self._right = right if self._right is None else self._right & right
        _unsettled.add(self)
        self._steps += 1
        if self._steps % _ASKED == 0 and right.is_cuda:
            if not self._answer.is_pinned():
                self._answer = torch.ones((), dtype=torch.bool, pin_memory=True)
            self._answer.copy_(self._right, non_blocking=True)

    def settle(self) -> None:
        """Wait for the device. Raises ValueError if a step was wrong."""
        right, self._right = self._right, None
        if right is not None and not right.item():
            self._answer = torch.zeros((), dtype=torch.bool)
            raise ValueError(f"a step over a packed cache was wrong: {_HIDDEN}, or {_COUNTED}")

    def select(self, sequences: Tensor) -> None:
        """Keep the given rows, in this order."""
        self._offsets = None if self._offsets is None else self._offsets[sequences.to(self._offsets.device)]


def settle_all() -> None:
    """Let every cache say what it found wrong. Raises ValueError for the first that did."""
    while _unsettled:
        _unsettled.pop().settle()


def _check_form(mask: Tensor, rows: int, tokens: int) -> None:
    if mask.shape[2] != 1 or mask.is_floating_point():
        raise ValueError(_OTHER)
    if mask.shape[0] not in (1, rows) or mask.shape[-1] != tokens:
        raise ValueError(
            f"attention_mask is of {mask.shape[0]} rows and {mask.shape[-1]} tokens, past and chunk of {rows} and {tokens}; "
            "give one for all of them"
        )


def _read_padding(mask: Tensor, layer: Counts, new: int) -> list[int]:
    """How many of a chunk's tokens are padding; waits for the device."""
    visible = mask[:, 0, 0].expand(len(layer.lengths), -1).bool()
    holes = (visible.int().diff(dim=-1) < 0).sum(-1)
    padding: Sequence[int]
    padding, hidden = torch.stack([(~visible).sum(-1), holes]).tolist()
    past = [layer.slots - length for length in layer.lengths]
    if any(hidden) or [min(pads, layer.slots) for pads in padding] != past:
        raise ValueError(_LEFT)
    return [min(max(pads - layer.slots, 0), new) for pads in padding]
