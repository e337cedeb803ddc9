"""A transformers `Cache` whose full-attention layers are packed.

    cache = PackedCache(load_quantizers("nuq3.safetensors"), model.config)
    with packed_attention(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=100)

A packed layer stores, for every sequence of the batch, its first tokens in fp16 (attention sinks) and all others
as codes. Padding is never stored: token number i of a sequence is stored as number i, and i is also its position,
so rows of a left-padded batch have lengths of their own. Sliding-window layers keep transformers' native layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from deployment import layout
from deployment.checked import Checked
from deployment.devices import is_capturing
from deployment.kept import ungraphed, writable
from deployment.layout import PackedTensor, Rows
from deployment.numbered import Numbered
from deployment.room import LOST
from deployment.rope import rotary_half
from deployment.streams import sent
from gradients.cli import UserError
from gradients.models import KINDS, Kind, cached_layers, decoder_config
from quant.artefact import Quantizers
from quant.quantizer import Encoded, Quantizer, as_stored
from quant.storage import BLOCK_TOKENS, FP16_BITS, StoredSize

OUTSIDE = "a PackedCache needs the model to run within `with packed_attention(model):`"
_NEVER_STORED = "tokens of this cache were announced and never stored: a forward was interrupted, or ran outside of packed_attention"


@dataclass(frozen=True)
class Stretch:
    """Stored tokens `start`, ..., `end - 1` of every sequence, dequantized: `[B, G, end - start, D]` float32."""

    start: int
    end: int
    key: Tensor
    value: Tensor


class PackedLayer(Numbered, CacheLayerMixin):
    """The packed cache of one layer.

    `update` only hands the new tokens on, with itself attached to the keys: the attention function reads the past,
    and then calls `append`, since it alone knows about padding.
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
    ) -> None:
        # nothing of the base class, which would say that there are `keys`, and that they are None
        self.is_initialized = False
        self.quantizers: dict[Kind, Quantizer] = {"key": key, "value": value}
        self.sink_tokens = sink_tokens
        self.capacity = capacity
        self.exact_chunk = exact_chunk
        self.rotary_half = rotary_half  # half of the channels of a head that rotate, None for all
        self.slots = 0  # tokens seen per row, padding included: what transformers calls the sequence length
        self.lengths: list[int] = []  # tokens stored per row
        self.stored = torch.zeros(0, dtype=torch.int64)  # the same on the device, where the kernels keep count
        self.sinks: dict[Kind, Tensor] = {}  # [B, G, sink_tokens, D] fp16
        self.packed: dict[Kind, PackedTensor] = {}
        self._handed_on = False
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
                self.packed[kind].reserve(self.capacity - self.sink_tokens, exactly=True)
        self.lengths = [0] * batch
        self.stored = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.no_padding = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.overflow = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand the pre-RoPE keys and the values on to the attention function, which stores them."""
        if not torch.compiler.is_compiling():  # else the operator does it: a compiler would, after all steps
            self.expect(key_states, value_states)
        key_states.packed_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def expect(self, key: Tensor, value: Tensor) -> None:
        """Get ready to store a chunk.

        Raises RuntimeError if nobody stored the one before, `UserError` for a batch of another size.
        """
        if self._handed_on:
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
        self._handed_on = True

    def withdraw(self) -> None:
        """Nothing of the chunk that was announced will be stored."""
        self._handed_on = False

    def _leave_inference_mode(self) -> None:
        """Let what was made in `torch.inference_mode()` be written outside of it."""
        self.sinks = {kind: writable(sinks) for kind, sinks in self.sinks.items()}
        self.stored = writable(self.stored)
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

    @ungraphed
    def append(self, key: Tensor, value: Tensor, padding: Sequence[int]) -> None:
        """Store a chunk `[B, G, S, D]` of which row b's first `padding[b]` tokens are left padding."""
        self._handed_on = False
        new = key.shape[2]
        for kind, states in zip(KINDS, (key, value), strict=True):
            tokens = states.transpose(1, 2).flatten(2)  # [B, S, C]
            for rows, length, pad in self._aligned_rows(padding):
                self._append_rows(kind, rows, length, tokens[rows, pad:])
        self._count(new, padding)
        self.stored = torch.tensor(self.lengths, device=self.device)

    def append_with_kernels(self, key: Tensor, value: Tensor, padding: Sequence[int], pads: Tensor) -> None:
        """The same on the device, `pads` `[B]` int64 being `padding` there. The device is not waited for.

        Raises RuntimeError if outliers of earlier tokens were lost, which takes a graph replayed too often.
        """
        from deployment.kernels.append import Side, append

        self._handed_on = False
        new, capturing = key.shape[2], is_capturing(self.device)
        where = self._stretch(new)
        sides = []
        for kind, states in zip(KINDS, (key, value), strict=True):
            packed = self.packed[kind]
            pages = packed.pages_of(where[0]) if capturing else packed.make_room(*where, new, self.overflow)
            sides.append(Side(packed, states, self.sinks[kind], pages))
        append(sides, self.stored, pads, self.overflow)
        if not capturing:
            for packed in self.packed.values():
                packed.used_room(*where, new, self.overflow)
        self.stored += new - pads if any(padding) else new
        self._count(new, padding)

    def _stretch(self, new: int) -> tuple[int, int]:
        """(first, number) of the packed tokens among which the next `new` of every row are, be they sinks or not."""
        first = max(0, min(self.lengths) - self.sink_tokens)
        return first, max(1, max(self.lengths) + new - self.sink_tokens - first)

    def _count(self, new: int, padding: Sequence[int]) -> None:
        self.lengths = [length + new - pad for length, pad in zip(self.lengths, padding, strict=True)]
        self.slots += new

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more per row, so that a captured graph of the kernels can store them, and no more.

        Room for outliers is for the worst case, all elements of these tokens. After replays call `recount`.
        """
        for packed in self.packed.values():
            packed.make_room(*self._stretch(tokens), tokens, self.overflow)
            packed.fix()

    def recount(self) -> None:
        """`recount` of this layer."""
        recount([self])

    def _take_over(self, lengths: list[int], overflow: int, counts: Iterator[Tensor]) -> None:
        if overflow:
            raise RuntimeError(LOST)
        longest = max(lengths, default=0)
        for packed in self.packed.values():
            if longest > self.sink_tokens + packed.tokens_reserved:
                raise RuntimeError(f"a graph was replayed to {longest} tokens; reserve more before capturing it")
            packed.recount(counts)
        self.slots += longest - max(self.lengths, default=0)
        self.lengths = lengths

    def _aligned_rows(self, padding: Sequence[int]) -> Iterator[tuple[Rows, int, int]]:
        """Groups of rows that are equally long and equally padded: all of them, but for left-padded batches."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, group in enumerate(zip(self.lengths, padding, strict=True)):
            groups.setdefault(group, []).append(row)
        for (length, pad), rows in groups.items():
            yield (slice(None) if len(groups) == 1 else torch.tensor(rows, device=self.device)), length, pad

    def _append_rows(self, kind: Kind, rows: Rows, length: int, tokens: Tensor) -> None:
        """Store tokens `[R, n, C]` of rows that hold `length` tokens each."""
        sinks = min(max(self.sink_tokens - length, 0), tokens.shape[1])
        if sinks:
            exact = as_stored(tokens[:, :sinks]).unflatten(-1, (-1, self.sinks[kind].shape[-1])).transpose(1, 2)
            self.sinks[kind][rows, :, length : length + sinks] = exact
        if tokens.shape[1] > sinks:
            start = length + sinks - self.sink_tokens
            self.packed[kind].write(rows, start, self.encode(kind, tokens[:, sinks:]))

    def encode(self, kind: Kind, tokens: Tensor) -> Encoded:
        """What is stored of tokens `[R, n, C]`: the same as the simulation's."""
        return self.packed[kind].quantizer.encode(tokens)

    def stretches(self) -> Iterator[Stretch]:
        """Everything stored, dequantized some blocks at a time, up to the longest sequence; shorter ones show zeros or waste."""
        longest = max(self.lengths, default=0)
        if sinks := min(self.sink_tokens, longest):
            key, value = (self.sinks[kind][:, :, :sinks].float() for kind in KINDS)
            yield Stretch(0, sinks, key, value)
        for pages in zip(self.packed["key"].pages, self.packed["value"].pages, strict=True):
            needed = min(-(-(longest - self.sink_tokens - pages[0].start) // BLOCK_TOKENS), pages[0].blocks)
            for first in range(0, needed, layout.STRETCH_BLOCKS):
                blocks = min(layout.STRETCH_BLOCKS, needed - first)
                start = self.sink_tokens + pages[0].start + first * BLOCK_TOKENS
                key = self.packed["key"].read(pages[0], first, blocks)
                value = self.packed["value"].read(pages[1], first, blocks)
                yield Stretch(start, start + blocks * BLOCK_TOKENS, key, value)

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
        self.sinks, self.packed = {}, {}
        self.is_initialized = self._handed_on = False
        self._read_only = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row. Raises ValueError for a positive number."""
        tokens_to_remove = int(tokens_to_remove)  # prompt lookup gives a tensor, depending on transformers' version
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        slots = max(0, self.slots + tokens_to_remove)
        self.put_back(slots, [max(0, length + tokens_to_remove) for length in self.lengths])

    def put_back(self, slots: int, lengths: list[int]) -> None:
        """Hold only the first `lengths[b]` tokens of row b, of `slots` seen. Whatever came after them may be half stored."""
        if lengths is self.lengths and not self._handed_on:
            return  # nothing has come since
        if not lengths:
            self.reset()
            return
        self.slots, self.lengths, self._handed_on, self._read_only = slots, lengths, False, True
        stored = sent(torch.tensor(self.lengths, dtype=torch.int64), self.device)
        if torch.is_inference_mode_enabled() or not self.stored.is_inference():
            self.stored.copy_(stored)  # where it was, since a graph may count there
        else:
            self.stored = stored
        for packed in self.packed.values():
            packed.truncate([length - self.sink_tokens for length in self.lengths])

    def select(self, sequences: Tensor) -> None:
        """Keep the given rows, in this order, repeats allowed."""
        if not self.is_initialized:
            return
        sequences = sequences.to(self.device)
        self.sinks = {kind: sinks[sequences] for kind, sinks in self.sinks.items()}
        for packed in self.packed.values():
            packed.select(sequences)
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
        raise NotImplementedError("a packed layer stays on its device; save_cache (deployment/saved.py) stores a cache")

    def prefetch(self) -> None:
        """See `keys`."""
        self.offload()

    def tensors(self) -> list[Tensor]:
        """Every tensor held for cached tokens."""
        return [*self.sinks.values(), *(tensor for packed in self.packed.values() for tensor in packed.tensors())]


def recount(layers: Sequence[PackedLayer]) -> None:
    """Take over what one device has counted of layers; waits for it once.

    Raises RuntimeError if tokens or outliers found no room.
    """
    counted = [
        [layer.stored, layer.overflow.long(), *chain.from_iterable(packed.counts() for packed in layer.packed.values())]
        for layer in layers
    ]
    numbers = list(chain.from_iterable(counted))
    on_host = iter(torch.cat(numbers).cpu().split([len(number) for number in numbers]))
    for layer in layers:
        lengths, overflow = next(on_host).tolist(), int(next(on_host))
        layer._take_over(lengths, overflow, on_host)


class PackedCache(Cache):
    """A packed cache for one batch of sequences.

    Args:
        quantizers: as `load_quantizers` returns them; None keeps every layer native (quantization off).
        config: the model's.
        capacity: tokens per row, padding included, to reserve at once; None grows as needed.
        exact_chunk: attend the current chunk in full precision, and only the past packed; if False also the chunk
            is attended as stored, and any size of chunk then gives the simulation's result.

    Raises `UserError` when the quantizers belong to another model, or their scheme exists in simulation only.
    """

    def __init__(
        self,
        quantizers: Quantizers | None,
        config: PreTrainedConfig,
        capacity: int | None = None,
        exact_chunk: bool = True,
    ) -> None:
        layers = DynamicCache(config=decoder_config(config)).layers
        if quantizers is not None:
            quantizers.check_model(config)
            quantizers.check_packable()
            for layer in cached_layers(config):
                sides = quantizers.layers[layer]
                layers[layer] = PackedLayer(
                    sides["key"],
                    sides["value"],
                    quantizers.scheme.sink_tokens,
                    capacity,
                    exact_chunk,
                    rotary_half(config, layer),
                )
        packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
        for layer in packed:
            layer.checked, layer.leads = packed[0].checked, layer is packed[0]
        self.in_forward = False  # whether a model within `packed_attention` is running over it
        super().__init__(layers=layers)

    @property
    def max_batch_size(self) -> int:
        """Raises NotImplementedError."""
        raise NotImplementedError("a packed cache is for no fixed number of rows; they may be added and dropped")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a layer's new tokens on. Raises RuntimeError outside of `packed_attention`."""
        if not torch.compiler.is_compiling() and not self.in_forward:
            raise RuntimeError(OUTSIDE)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor held for cached tokens, native layers included."""
        held: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                held += layer.tensors()
            elif layer.is_initialized:
                held += [layer.keys, layer.values]
        return held

    def nbytes(self) -> int:
        """Bytes of all these tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def fp16_nbytes(self) -> int:
        """Bytes the same tokens would take in fp16; padding, which a stock cache stores too, is not counted."""
        native = [layer for layer in self.layers if not isinstance(layer, PackedLayer) and layer.is_initialized]
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in native)
        return (elements + self.packed_size().elements) * FP16_BITS // 8

    def packed_size(self) -> StoredSize:
        """What the packed layers alone take: the size that a scheme decides, and a simulation reports."""
        bits = elements = 0
        for layer in self.layers:
            if isinstance(layer, PackedLayer) and layer.is_initialized:
                bits += 8 * sum(tensor.nbytes for tensor in layer.tensors())
                elements += 2 * sum(layer.lengths) * layer.packed["key"].heads * layer.packed["key"].head_dim
        return StoredSize(bits, elements)
