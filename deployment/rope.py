"""Rotary embedding of keys that were cached before it (KVQuant, section 3.2).

Cached keys carry no position, so every read rotates them, at the position they have and with the frequencies
the model's own rotary module uses now (default, linear, dynamic, yarn, longrope, llama3 ...). Types that change
their frequencies with the length of the sequence are told the current length with every call.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deployment.handles import Numbered
from deployment.kept import kept
from gradients.models import decoder_config, kv_shape
from quant.storage import BLOCK_TOKENS

if TYPE_CHECKING:
    from deployment.kernels.phase import Rotary

_MEMO_TABLES = 32  # tables of one stretch each: 32K positions, 16 MB at a head dimension of 64
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_asking = threading.RLock()  # modules and memories are shared by threads that run one model


@dataclass
class Rope(Numbered):
    """The rotary module of a model, for the layers of one type.

    `module` must be called through `forward`: the model's own calls go through hooks that take its effect away.
    `layer_type` is None, or Gemma's `full_attention` or `sliding_attention`.
    """

    module: nn.Module
    layer_type: str | None = None
    _memo: OrderedDict[Hashable, tuple[Tensor, ...]] = field(default_factory=OrderedDict)
    _chunk: tuple[Hashable, tuple[Tensor, ...]] | None = None
    _rotary: dict[tuple[Any, ...], tuple[int | None, "Rotary"]] = field(default_factory=dict)

    @property
    def length_dependent(self) -> bool:
        """Whether frequencies depend on the length of the sequence."""
        return self._type.startswith(_LENGTH_DEPENDENT)

    @property
    def _type(self) -> str:
        rope_type: Any = self.module.rope_type
        return rope_type if isinstance(rope_type, str) else rope_type[self.layer_type]

    def tables(self, positions: Tensor, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin) `[B, S, R]` of positions `[B, S]` in a sequence that has `length` tokens by now.

        R, the rotary dimension, may be less than D; attention scaling (yarn, longrope) is included.
        """
        batch, tokens = positions.shape
        last = positions.new_full((batch, 1), length - 1)
        if self.length_dependent:  # blocks may end beyond the text, which the module must not take for its length
            positions = positions.clamp(max=length - 1)
        # `x` tells the module nothing but device and dtype
        x = torch.empty(0, device=positions.device, dtype=dtype)
        kind = {} if self.layer_type is None else {"layer_type": self.layer_type}
        with _asking if self.length_dependent else nullcontext():
            if self._type.startswith("dynamic"):  # it remembers the longest text; a short one makes it forget
                self.module.forward(x, torch.zeros_like(last), **kind)
            cos, sin = self.module.forward(x, torch.cat([positions, last], dim=1), **kind)
        # with a `device_map` the module answers from its own device, wherever it is asked from
        return cos[:, :tokens].to(positions.device), sin[:, :tokens].to(positions.device)

    def frequencies(self, length: int, device: torch.device) -> tuple[Tensor, float]:
        """(radians per token `[R/2]`, factor on cos and sin) in a sequence that has `length` tokens by now."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        with _asking:
            if self.length_dependent:  # calling it makes the module set them
                self.tables(torch.zeros(1, 1, dtype=torch.int64, device=device), length)
            frequencies = getattr(self.module, f"{prefix}inv_freq")
            # a module may set new ones in place
            frequencies = frequencies.to(device, copy=self.length_dependent)
            return frequencies, float(getattr(self.module, f"{prefix}attention_scaling"))

    def for_kernels(self, length: int, head_dim: int, device: torch.device) -> "Rotary":
        """The embedding as the kernels read it, remembered from layer to layer, on each of the layers' devices."""
        from deployment.kernels.phase import Rotary

        key, current = (head_dim, device), length if self.length_dependent else None
        held = self._rotary.get(key)
        if held is None or held[0] != current:
            frequencies, scaling = self.frequencies(length, device)
            held = self._rotary[key] = current, Rotary.of(frequencies.float(), head_dim, scaling)
        return held[1]

    def range_tables(self, start: int, end: int, length: int, device: torch.device) -> tuple[Tensor, ...]:
        """(cos, sin) `[1, n, R]` float32 of the positions of a stretch, remembered from layer to layer and step to step."""
        return self._remembered(
            (start, end), length, device, lambda: self.tables(torch.arange(start, end, device=device)[None], length)
        )

    def chunk_tables(
        self, positions: tuple[tuple[int, ...], ...], length: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """(cos, sin) `[B, S, R]` float32 of a chunk's positions, negative for padding; remembered for the next layer only."""
        key = (positions, length, device)
        held = self._chunk
        if held is None or held[0] != key:
            held = self._chunk = key, kept(self.tables)(torch.tensor(positions, device=device).clamp(min=0), length)
        return held[1]

    def block_tables(self, start: int, blocks: int, length: int, device: torch.device) -> tuple[Tensor, ...]:
        """Rotation by angle addition: within a block (cos, sin) `[R/2, 64]`, and where blocks begin (cos, sin) `[blocks, R/2]`.

        All float32; those of the blocks are without attention scaling, so that their product has it once. Remembered.
        """

        def made() -> tuple[Tensor, ...]:
            begins = start + BLOCK_TOKENS * torch.arange(blocks, device=device)
            positions = torch.cat([torch.arange(BLOCK_TOKENS, device=device), begins])[None]
            both = [table[0, :, : table.shape[-1] // 2].float() for table in self.tables(positions, length)]
            _, scaling = self.frequencies(length, device)
            within = [table[:BLOCK_TOKENS].T.contiguous() for table in both]
            return *within, *((table[BLOCK_TOKENS:] / scaling).contiguous() for table in both)

        return self._remembered(("blocks", start, blocks), length, device, made)

    def _remembered(
        self, which: Hashable, length: int, device: torch.device, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        key = (which, device, length if self.length_dependent else None)
        with _asking:
            held = self._memo.pop(key, None)
            if held is None:
                held = kept(make)()
            self._memo[key] = held  # at the end: the first one was not used for longest
            if len(self._memo) > _MEMO_TABLES:
                self._memo.popitem(last=False)
        return held


def rotary_half(config: PreTrainedConfig, layer: int) -> int:
    """Half of the channels of a head that rotate in a layer, R/2."""
    text = decoder_config(config)
    parameters = text.rope_parameters
    if any(isinstance(kind, dict) for kind in parameters.values()):  # one for each type of layer
        parameters = parameters[text.layer_types[layer]]
    return int(kv_shape(config)[1] * parameters.get("partial_rotary_factor", 1.0)) // 2
