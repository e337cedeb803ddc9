"""The recent window of a packed layer: its last tokens as they came, which are packed when they leave it.

    recent  :: [B, G, N + 1, D]  pre-RoPE keys or values in the model's dtype; the last N tokens of a row are its window

A row of T tokens holds the first T - N of them as sinks and codes, and the others here, its last one at the end; what lies before
the first token of a shorter row is never seen. A chunk of S tokens is attended and stored by way of `joined`, the N + S tokens of
window and chunk: its first S are those that leave. The slot in front is what a recorded decode step needs for that: it shifts
`recent` in place, attends to all N + 1, and packs the first.

Tokens that a crop brings back have left their exact selves behind: the window holds what their codes say. Their codes stay where
they are, `floors[b]` of row b's tokens, and are not made anew when these tokens leave again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradients.models import KINDS, Kind


@dataclass(frozen=True)
class Window:
    """Never changed in place, but for `recent` by recorded steps; `floor` are the `floors` on the device, `[B]` int64."""

    recent: Mapping[Kind, Tensor]
    floors: list[int]
    floor: Tensor

    @classmethod
    def empty(cls, tokens: int, like: Tensor) -> "Window":
        """For rows of keys or values `like`, `[B, G, S, D]`, that hold nothing yet."""
        batch, heads, _, dim = like.shape
        recent = {kind: like.new_zeros(batch, heads, tokens + 1, dim) for kind in KINDS}
        return cls(recent, [0] * batch, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def of_recent(self, recent: Mapping[Kind, Tensor], floors: list[int] | None = None) -> "Window":
        """With other tokens, and other floors if they are given."""
        if floors is None:
            return replace(self, recent=recent)
        return Window(recent, floors, torch.tensor(floors, device=self.floor.device))

    def joined(self, kind: Kind, chunk: Tensor) -> Tensor:
        """The window and a chunk `[B, G, S, D]`, `[B, G, N + S, D]`."""
        recent = self.recent[kind]
        return torch.cat([recent[:, :, 1:], chunk.to(recent.dtype)], dim=2)

    def after(self, joined: Mapping[Kind, Tensor]) -> "Window":
        """The window behind `joined`, on its own memory."""
        recent = {}
        for kind, states in joined.items():
            slots = self.recent[kind].shape[2]
            own = states if states.shape[2] == slots else states[:, :, -slots:].clone()
            recent[kind] = own.contiguous().detach()
        return replace(self, recent=recent)

    def select(self, sequences: Tensor) -> "Window":
        """The rows of `sequences` `[B']` int64, in this order, repeats allowed."""
        recent = {kind: states[sequences] for kind, states in self.recent.items()}
        floors = [self.floors[row] for row in sequences.tolist()]
        return Window(recent, floors, self.floor[sequences])
