"""One layer of a packed cache: sinks, codes and a recent window of keys and values, for every sequence of a batch.

A packed layer stores, for every sequence of the batch, its first tokens in fp16 (attention sinks) and all others as codes,
but for a window of recent ones, if it is given one, which stay as they came (window.py). Padding is never stored: token
number i of a sequence is stored as number i, and i is also its position, so rows of a left-padded batch have lengths of
their own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from deployment.checked import Checked
from deployment.format.layout import PackedTensor
from deployment.format.streams import sent
from deployment.format.stretches import Stretch, dequantized, stretches
from deployment.handles import Numbered
from deployment.kept import ungraphed, writable
from deployment.window import Window
from gradients.cli import UserError
from gradients.models import Kind
from quant.quantizer import Encoded, Quantizer

OUTSIDE = "a PackedCache needs the model to run within `with packed_attention(model):`"
_NEVER_STORED = "tokens of this cache were announced and never stored: a forward was interrupted, or ran outside of packed_attention"


class PackedLayer(Numbered, CacheLayerMixin):
    """The packed cache of one layer.

    `update` only announces the new tokens: the attention function, which is given the layer (entered.py), reads the past and
    then stores them, since it alone knows about padding.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        key: Quantizer,
        value: Quantizer,
        sink_tokens: int,
        capacity: int | None = None,
        exact_chunk: bool = True,
        rotary_half: int | None = None,
        residual_tokens: int = 0,
    ) -> None:
        # nothing of the base class, which would say that there are `keys`, and that they are None
        self.is_initialized = False
        self.quantizers: dict[Kind, Quantizer] = {"key": key, "value": value}
        self.sink_tokens, self.residual_tokens = sink_tokens, residual_tokens
        self.capacity = capacity
        self.exact_chunk = exact_chunk
        self.rotary_half = rotary_half  # half of the channels of a head that rotate, None for all
        self.slots = 0  # tokens seen per row, padding included: what transformers calls the sequence length
        self.lengths: list[int] = []  # tokens stored per row
        self.stored = torch.zeros(0, dtype=torch.int64)  # the same on the device, where the kernels keep count
        self.sinks: dict[Kind, Tensor] = {}  # [B, G, sink_tokens, D] fp16
        self.packed: dict[Kind, PackedTensor] = {}
        self.window: Window | None = None  # as soon as there are tokens, if `residual_tokens` says so
        self.announced = False  # whether a chunk has come that is not stored yet
        self.checked = Checked()  # shared with the other layers of a cache
        self.leads = True  # whether this is their first
        self._read_only = True  # whether a tensor may be one of inference mode, which cannot be written outside of it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values `[B, G, S, D]`, on their device."""
        self.device = key_states.device
        batch, heads, _, dim = key_states.shape
        for kind, quantizer in self.quantizers.items():
            self.sinks[kind] = torch.zeros(batch, heads, self.sink_tokens, dim, dtype=torch.float16, device=self.device)
            self.packed[kind] = PackedTensor(quantizer, batch, heads, dim, self.device, kind, self.rotary_half)
            if self.capacity is not None:
                self.packed[kind].reserve(self.capacity - self.sink_tokens - self.residual_tokens, exactly=True)
        self.window = Window.empty(self.residual_tokens, key_states) if self.residual_tokens else None
        self.lengths = [0] * batch
        self.stored = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.no_padding = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.overflow = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Announce pre-RoPE keys and values, and give them back as they are: the attention function stores them."""
        if not torch.compiler.is_compiling():  # else the operator does it: a compiler would, after all steps
            self.expect(key_states, value_states)
        return key_states, value_states

    def expect(self, key: Tensor, value: Tensor) -> None:
        """Get ready to store a chunk.

        Raises RuntimeError if nobody stored the one before, `UserError` for a batch of another size.
        """
        if self.announced:
            raise RuntimeError(_NEVER_STORED)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if key.shape[0] != len(self.lengths):
            held, rows = len(self.lengths), key.shape[0]
            many = rows % held == 0
            how = f"batch_repeat_interleave({rows // held})" if many else "batch_select_indices(rows)"
            text = "1 row" if held == 1 else f"{held} rows"
            raise UserError(f"the cache holds {text}, the batch has {rows}; call cache.{how} first")
        self._check_capacity(key.shape[2])
        if torch.is_inference_mode_enabled():
            self._read_only = True
        elif self._read_only:
            self._leave_inference_mode()
        self.announced = True

    def withdraw(self) -> None:
        """Nothing of the chunk that was announced will be stored."""
        self.announced = False

    def _leave_inference_mode(self) -> None:
        """Let what was made in `torch.inference_mode()` be written outside of it."""
        self.sinks = {kind: writable(sinks) for kind, sinks in self.sinks.items()}
        self.stored = writable(self.stored)
        if self.window is not None:
            self.window = self.window.of_recent({kind: writable(x) for kind, x in self.window.recent.items()})
        for packed in self.packed.values():
            for page in packed.pages:
                page.words = writable(page.words)
                page.scales = None if page.scales is None else writable(page.scales)
        self._read_only = False

    def _check_capacity(self, new: int) -> None:
        if self.capacity is not None and self.slots + new > self.capacity:
            raise UserError(
                f"the cache has a capacity of {self.capacity} tokens and the request needs {self.slots + new}; "
                "shorten it or give a larger capacity"
            )

    @property
    def past(self) -> list[int]:
        """How many tokens of each row lie before its window, all of them without one."""
        return [max(0, length - self.residual_tokens) for length in self.lengths]

    @property
    def coded(self) -> list[int]:
        """How many tokens of each row sinks and codes hold: the past, and what a crop brought back from there."""
        return self._coded_behind(self.lengths)

    def _coded_behind(self, lengths: Sequence[int]) -> list[int]:
        floors = self.window.floors if self.window is not None else [0] * len(lengths)
        return [max(0, length - self.residual_tokens, low) for length, low in zip(lengths, floors, strict=True)]

    def window_begins(self) -> Tensor:
        """`[B]` int64 on the device: the positions of the windows' first slots, where the past ends; before 0 in short rows."""
        return self.stored - self.residual_tokens if self.residual_tokens else self.stored

    def pads_of(self, padding: Sequence[int]) -> Tensor:
        """`padding` as a tensor on the device; where there is none, nothing is copied."""
        return torch.tensor(padding, device=self.device) if any(padding) else self.no_padding

    def reach(self, new: int) -> tuple[int, int]:
        """(first, number) of the packed tokens among which the next `new` of every row are, be they sinks or not."""
        first = max(0, min(self.coded) - self.sink_tokens)
        last = max(self._coded_behind([length + new for length in self.lengths]))
        return first, max(1, last - self.sink_tokens - first)

    def encode(self, kind: Kind, tokens: Tensor) -> Encoded:
        """What is stored of tokens `[R, n, C]`: the same as the simulation's."""
        return self.packed[kind].quantizer.encode(tokens)

    def stretches(self) -> Iterator[Stretch]:
        """Sinks and codes before the windows, dequantized up to the longest sequence; shorter ones show zeros or waste."""
        return stretches(self.sinks, self.packed, 0, max(self.past, default=0))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens of the past and the chunk, offset 0)."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.slots

    def get_max_length(self) -> int:
        """The capacity, or -1 if it grows without bound."""
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        """Forget everything, keeping quantizers and capacity."""
        self.slots, self.lengths = 0, []
        self.stored = self.stored[:0]
        self.sinks, self.packed, self.window = {}, {}, None
        self.is_initialized = self.announced = False
        self._read_only = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row. Raises ValueError for a positive number.

        Tokens that come back into the recent window have been packed: they stay what their codes say, and only newer
        ones are exact again.
        """
        tokens_to_remove = int(tokens_to_remove)  # prompt lookup gives a tensor, depending on transformers' version
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        slots = max(0, self.slots + tokens_to_remove)
        self.put_back(slots, [max(0, length + tokens_to_remove) for length in self.lengths])

    def put_back(self, slots: int, lengths: list[int], window: Window | None = None) -> None:
        """Hold only the first `lengths[b]` tokens of row b, of `slots` seen. Whatever came after them may be half stored.

        `window` is the one they had, if somebody has kept it; otherwise it is filled up with what codes say.
        """
        if lengths is self.lengths and not self.announced:
            return  # nothing has come since
        if not lengths:
            self.reset()
            return
        if self.window is not None:
            replaced = window is not None and window.recent["key"] is not self.window.recent["key"]
            self.window = window if replaced else self._refilled(lengths)
        self.slots, self.lengths, self.announced, self._read_only = slots, lengths, False, True
        stored = sent(torch.tensor(self.lengths, dtype=torch.int64), self.device)
        if torch.is_inference_mode_enabled() or not self.stored.is_inference():
            self.stored.copy_(stored)  # where it was, since a graph may count there
        else:
            self.stored = stored
        for packed in self.packed.values():
            packed.truncate([held - self.sink_tokens for held in self.coded])

    @ungraphed
    def _refilled(self, lengths: Sequence[int]) -> Window:
        """The window as it is when only the first `lengths[b]` tokens of row b are left."""
        assert self.window is not None
        recent = {kind: states.clone() for kind, states in self.window.recent.items()}
        for row, (before, after) in enumerate(zip(self.lengths, lengths, strict=True)):
            back = min(before - after, self.residual_tokens)  # tokens that come back
            first = after - self.residual_tokens
            for kind, states in dequantized(self.sinks, self.packed, row, first, back).items():
                window = recent[kind][row]
                window[:, 1:] = torch.cat(
                    [states.to(window.dtype), window[:, 1 : 1 + self.residual_tokens - back]], dim=1
                )
        floors = [min(held, length) for held, length in zip(self.coded, lengths, strict=True)]
        return self.window.of_recent(recent, floors)

    def select(self, sequences: Tensor) -> None:
        """Keep the given rows, in this order, repeats allowed."""
        if not self.is_initialized:
            return
        sequences = sequences.to(self.device)
        self.sinks = {kind: sinks[sequences] for kind, sinks in self.sinks.items()}
        for packed in self.packed.values():
            packed.select(sequences)
        self.window = None if self.window is None else self.window.select(sequences)
        self.lengths, self._read_only = [self.lengths[row] for row in sequences.tolist()], True
        self.stored = self.stored[sequences]
        self.no_padding = torch.zeros_like(self.stored)
        if self.leads:
            self.checked.select(sequences)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues row `beam_idx[b]`."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.select(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that an index or a mask selects."""
        self.select(torch.arange(len(self.lengths), device=indices.device)[indices])

    @property
    def keys(self) -> Tensor:
        """What a layer of transformers has. Raises NotImplementedError, as all of the following do."""
        raise NotImplementedError("a packed layer has no keys or values to hand out; stretches() dequantizes them")

    values = keys

    def offload(self) -> None:
        """See `keys`."""
        raise NotImplementedError(
            "a packed layer stays on its device; save_cache (deployment/text/saved.py) stores a cache"
        )

    def prefetch(self) -> None:
        """See `keys`."""
        self.offload()

    def tensors(self) -> list[Tensor]:
        """Every tensor held for cached tokens."""
        recent = () if self.window is None else self.window.recent.values()
        packed = (tensor for packed in self.packed.values() for tensor in packed.tensors())
        return [*self.sinks.values(), *recent, *packed]
