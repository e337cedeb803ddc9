"""Error feedback: a token's codes are chosen with the whole Fisher matrix of its head, channel after channel.

The loss feels a head's error d (D channels of one token's keys or values) as 1/2 d^T F d with F = E[g g^T], g the
gradient of the loss with respect to that vector. The paper (arXiv 2401.18079, section 3.3) keeps the diagonal of F; off
the diagonal it is large, so errors can be made to cancel where the model looks. As GPTQ (arXiv 2210.17323) and LDLQ
(2307.13304) do with weights, each channel's error is handed on to the channels that are yet to be quantized:

    A = F in the head's order, damped      U = the upper Cholesky factor of A^-1, each row divided by its diagonal
    y = x[order]
    for i in 0 .. D-1:
        code[i] = nearest level to y[i]                    (an outlier, chosen by x: y[i] itself, in fp16)
        y[j] -= (y[i] - dequantized(code[i])) * U[i, j]    for all j > i

What is stored, and how it is read, does not change. The arithmetic is float32, every product and every sum rounded on
its own (no fused multiply-add), so that any device finds the same codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from quant.arithmetic import as_stored, denormalise, normalise
from quant.codebook import Codebook

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of y at a time: what a CPU's second cache holds


@cache
def _in_one_launch(device_type: str) -> bool:
    """Whether the loop over channels runs as a kernel of its own."""
    return device_type == "cuda" and find_spec("triton") is not None


@dataclass(frozen=True)
class ChannelBooks:
    """The codebook of every channel: `levels` `[C, L]` and `boundaries` `[C, L - 1]`, float32, padded with infinity to a power of two."""

    levels: Tensor
    boundaries: Tensor

    @classmethod
    def of(cls, codebooks: Sequence[Codebook], which: Tensor) -> "ChannelBooks":
        """Channel c has the codebook number `which[c]`, `which` being `[C]` int64."""
        most = max(2, *(len(codebook.levels) for codebook in codebooks))  # a search needs one boundary at least
        most = 1 << (most - 1).bit_length()
        levels = torch.full((len(codebooks), most), torch.inf, device=which.device)
        boundaries = torch.full((len(codebooks), most - 1), torch.inf, device=which.device)
        for row, codebook in enumerate(codebooks):
            levels[row, : len(codebook.levels)] = codebook.levels
            boundaries[row, : len(codebook.boundaries)] = codebook.boundaries
        return cls(levels[which], boundaries[which])

    @classmethod
    def shared(cls, codebook: Codebook, channels: int) -> "ChannelBooks":
        """All channels have the same."""
        return cls.of([codebook], torch.zeros(channels, dtype=torch.int64, device=codebook.levels.device))


@dataclass(frozen=True)
class Feedback:
    """How errors are handed on.

    `order` `[G, D]` int64 are each head's channels as they are quantized, `matrix` `[G, D, D]` fp16 its U in that order,
    strictly upper triangular.
    """

    order: Tensor
    matrix: Tensor

    def __post_init__(self) -> None:
        heads, dim = self.order.shape
        if self.matrix.shape != (heads, dim, dim) or not self.matrix.isfinite().all() or self.matrix.tril().any():
            raise ValueError(
                f"feedback is not {heads} finite, strictly upper triangular matrices of {dim} x {dim} numbers"
            )
        if not torch.equal(
            self.order.sort(dim=1).values, torch.arange(dim, device=self.order.device).expand(heads, dim)
        ):
            raise ValueError(f"feedback order is no permutation of {dim} channels in every head")

    def to(self, device: torch.device | str) -> "Feedback":
        """The same on a device."""
        return replace(self, order=self.order.to(device), matrix=self.matrix.to(device))

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tensors by the name they have in the artefact."""
        return {"order": self.order.to(torch.uint8), "feedback": self.matrix}

    def encode(
        self, x: Tensor, outliers: Tensor | None, scale: Tensor, zero: Tensor, books: ChannelBooks
    ) -> tuple[Tensor, Tensor]:
        """(codes uint8, targets float32), both `[..., T, C]`, of `x` `[..., T, C]` float32.

        A target is what its channel was asked to be when its turn came: x, and the errors handed on to it.

        Args:
            outliers: mask of the elements kept exactly, `[..., T, C]`; None for none.
            scale, zero: float32, `[C]` or `[..., T, 1]`.
            books: the codebook of every channel.
        """
        tokens = x.reshape(-1, x.shape[-1])
        mask = None if outliers is None else outliers.reshape(tokens.shape)
        tile = max(1, _TILE_ELEMENTS.get(x.device.type, 1 << 18) // x.shape[-1])
        parts = []
        for first in range(0, len(tokens), tile):
            some = slice(first, first + tile)
            s, z = (table if table.ndim == 1 else table.reshape(-1, 1)[some] for table in (scale, zero))
            parts.append(self._encode_tile(tokens[some], None if mask is None else mask[some], s, z, books))
        if not parts:
            return x.to(torch.uint8), x
        codes, targets = (torch.cat(both) if len(both) > 1 else both[0] for both in zip(*parts, strict=True))
        return codes.view(x.shape), targets.view(x.shape)

    def _encode_tile(
        self, x: Tensor, outliers: Tensor | None, scale: Tensor, zero: Tensor, books: ChannelBooks
    ) -> tuple[Tensor, Tensor]:
        """The same for `x` `[N, C]`, scale and zero `[C]` or `[N, 1]`."""
        if _in_one_launch(x.device.type):
            from quant.feedback_kernel import feed_back

            return feed_back(x, outliers, scale, zero, books.levels, books.boundaries, self.order, self.matrix)
        y = self._in_order(x)
        exact = None if outliers is None else self._in_order(outliers)
        scale, zero = self._ranges(scale), self._ranges(zero)
        channel = self._channel
        levels, boundaries = books.levels[channel], books.boundaries[channel].contiguous()  # [D, G, ...]
        handed_on = self.matrix.permute(1, 2, 0)[..., None].float()  # [D, D, G, 1]
        codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
        last = len(y) - 1
        for i, target in enumerate(y):
            s, z = scale[i % len(scale)], zero[i % len(zero)]
            code = torch.searchsorted(boundaries[i], normalise(target, s, z))
            codes[i] = code
            if i == last:
                break
            value = denormalise(levels[i].gather(1, code), s, z)
            if exact is not None:
                value = torch.where(exact[i], as_stored(target).float(), value)
            y[i + 1 :] -= (target - value) * handed_on[i, i + 1 :]
        return self._back(codes), self._back(y)

    @cached_property
    def _channel(self) -> Tensor:
        """Which of the C channels is quantized i-th in each head, `[D, G]`."""
        heads, dim = self.order.shape
        return (self.order + dim * torch.arange(heads, device=self.order.device)[:, None]).T

    def _in_order(self, x: Tensor) -> Tensor:
        """`[N, C]` as `[D, G, N]`, contiguous."""
        return x.T[self._channel]

    def _ranges(self, table: Tensor) -> Tensor:
        """`[C]` as `[D, G, 1]`, or `[N, 1]` as `[1, 1, N]`."""
        return table[self._channel][..., None] if table.ndim == 1 else table.view(1, 1, -1)

    def _back(self, y: Tensor) -> Tensor:
        """Inverse of `_in_order`."""
        x = y.new_empty(y.shape[0] * y.shape[1], y.shape[2])
        x[self._channel.flatten()] = y.flatten(0, 1)
        return x.T.contiguous()
