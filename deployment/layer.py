"""One layer of a packed cache: sinks, codes and a recent window of keys and values, for every sequence of a batch.

A packed layer stores, for every sequence of the batch, its first tokens in fp16 (attention sinks) and all others as codes,
but for a window of recent ones, if it is given one, which stay as they came (window.py). Padding is never stored: token
number i of a sequence is stored as number i, and i is also its position, so rows of a left-padded batch have lengths of
their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from deployment.checked import Checked
from deployment.devices import is_capturing
from deployment.format import layout
from deployment.format.layout import PackedTensor, Rows
from deployment.format.room import LOST
from deployment.format.streams import sent
from deployment.handles import Numbered
from deployment.kept import ungraphed, writable
from deployment.window import Window
from gradients.cli import UserError
from gradients.models import KINDS, Kind
from quant.quantizer import Encoded, Quantizer, as_stored
from quant.storage import BLOCK_TOKENS

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

    @ungraphed
    def joined(
        self, key: Tensor, value: Tensor, padding: Sequence[int], with_kernels: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The window and a chunk of keys and values `[B, G, S, D]` behind it: `[B, G, N + S, D]`, the last of each row at the end.

        While a CUDA graph is captured the window itself has moved on then: to be called once for every chunk.
        """
        if self.window is None:
            return key, value
        chunk: dict[Kind, Tensor] = {"key": key, "value": value}
        if min(self.lengths) < self.sink_tokens:
            token = (self.stored - self.pads_of(padding))[:, None] + torch.arange(key.shape[2], device=self.device)
            sinks = (token < self.sink_tokens)[:, None, :, None]
            chunk = {kind: as_stored(x).to(x.dtype).where(sinks, x) for kind, x in chunk.items()}
        if not with_kernels or key.shape[2] > 1:
            return self.window.joined("key", chunk["key"]), self.window.joined("value", chunk["value"])
        from deployment.kernels.window import shift

        recent = [self.window.recent[kind] for kind in KINDS]
        moved = recent if is_capturing(self.device) else [torch.empty_like(x) for x in recent]
        shift(recent, [chunk[kind].to(recent[0].dtype) for kind in KINDS], moved)
        return moved[0], moved[1]

    @ungraphed
    def append(
        self, key: Tensor, value: Tensor, padding: Sequence[int], joined: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Store a chunk `[B, G, S, D]` of which row b's first `padding[b]` tokens are left padding.

        `joined` is what `joined` has returned for it, if it was asked.
        """
        self.announced = False
        new, joined = key.shape[2], self.joined(key, value, padding) if joined is None else joined
        for kind, states in zip(KINDS, joined, strict=True):
            tokens = states[:, :, :new].transpose(1, 2).flatten(2)  # [B, S, C]: all that leave the window
            for rows, held, skipped in self._aligned_rows(padding, new):
                self._append_rows(kind, rows, held, tokens[rows, skipped:])
        self._keep(joined)
        self._count(new, padding)
        self.stored = torch.tensor(self.lengths, device=self.device)

    def append_with_kernels(
        self,
        key: Tensor,
        value: Tensor,
        padding: Sequence[int],
        pads: Tensor,
        joined: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The same on the device, `pads` `[B]` int64 being `padding` there. The device is not waited for.

        Raises RuntimeError if outliers of earlier tokens were lost, which takes a graph replayed too often.
        """
        from deployment.kernels.append import Side, append

        self.announced = False
        new, capturing = key.shape[2], is_capturing(self.device)
        joined = self.joined(key, value, padding, with_kernels=True) if joined is None else joined
        where = self._stretch(new)
        sides = []
        for kind, states in zip(KINDS, joined, strict=True):
            packed = self.packed[kind]
            pages = packed.pages_of(where[0]) if capturing else packed.make_room(*where, new, self.overflow)
            sides.append(Side(packed, states[:, :, :new], self.sinks[kind], pages))
        append(sides, *self._leaving(new, padding, pads), self.overflow)
        if not capturing:
            for packed in self.packed.values():
                packed.used_room(*where, new, self.overflow)
        self.stored += new - pads if any(padding) else new
        self._keep(joined)
        self._count(new, padding)

    def _leaving(self, new: int, padding: Sequence[int], pads: Tensor) -> tuple[Tensor, Tensor]:
        """`[B]` int64 twice: what sinks and codes hold, and how many of the next `new` tokens to leave are none or there already."""
        if self.window is None:
            return self.stored, pads
        begins = self.window_begins()
        if self.coded == [length - self.residual_tokens for length in self.lengths] and not any(padding):
            return begins, self.no_padding  # and so it will be for as long as tokens are only added
        held = torch.maximum(begins, self.window.floor)
        return held, (held - begins + pads).clamp(max=new)

    def _keep(self, joined: tuple[Tensor, Tensor]) -> None:
        """Let the window be the last tokens of these."""
        if self.window is None:
            return
        window = self.window.after(dict(zip(KINDS, joined, strict=True)))
        if is_capturing(self.device):
            for kind, recent in window.recent.items():
                if recent.data_ptr() != self.window.recent[kind].data_ptr():
                    self.window.recent[kind].copy_(recent)
        else:
            self.window = window

    def _stretch(self, new: int) -> tuple[int, int]:
        """(first, number) of the packed tokens among which the next `new` of every row are, be they sinks or not."""
        first = max(0, min(self.coded) - self.sink_tokens)
        last = max(self._coded_behind([length + new for length in self.lengths]))
        return first, max(1, last - self.sink_tokens - first)

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
            if longest > self.sink_tokens + self.residual_tokens + packed.tokens_reserved:
                raise RuntimeError(f"a graph was replayed to {longest} tokens; reserve more before capturing it")
            packed.recount(counts)
        self.slots += longest - max(self.lengths, default=0)
        self.lengths = lengths

    def _aligned_rows(self, padding: Sequence[int], new: int) -> Iterator[tuple[Rows, int, int]]:
        """Groups of rows, (rows, tokens that sinks and codes hold, how many of the next `new` to leave are none or there already).

        All rows are one group, but for left-padded batches.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (length, held, pad) in enumerate(zip(self.lengths, self.coded, padding, strict=True)):
            skipped = min(held - (length - self.residual_tokens) + pad, new)
            groups.setdefault((held, skipped), []).append(row)
        for (held, skipped), rows in groups.items():
            yield (slice(None) if len(groups) == 1 else torch.tensor(rows, device=self.device)), held, skipped

    def _append_rows(self, kind: Kind, rows: Rows, length: int, tokens: Tensor) -> None:
        """Store tokens `[R, n, C]` of rows of whose tokens sinks and codes hold `length`."""
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

    def stretches(self, begin: int = 0, end: int | None = None) -> Iterator[Stretch]:
        """Sinks and codes, dequantized some blocks at a time: what holds tokens `begin`, ..., `end` - 1, or all before the windows.

        They go up to the longest sequence; shorter ones show zeros or waste.
        """
        longest = max(self.past, default=0) if end is None else end
        if begin < (sinks := min(self.sink_tokens, longest)):
            key, value = (self.sinks[kind][:, :, :sinks].float() for kind in KINDS)
            yield Stretch(0, sinks, key, value)
        for pages in zip(self.packed["key"].pages, self.packed["value"].pages, strict=True):
            needed = min(-(-(longest - self.sink_tokens - pages[0].start) // BLOCK_TOKENS), pages[0].blocks)
            unneeded = max(0, begin - self.sink_tokens - pages[0].start) // BLOCK_TOKENS
            for first in range(unneeded, needed, layout.STRETCH_BLOCKS):
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
            for kind, states in self._dequantized(row, first, back).items():
                window = recent[kind][row]
                window[:, 1:] = torch.cat(
                    [states.to(window.dtype), window[:, 1 : 1 + self.residual_tokens - back]], dim=1
                )
        floors = [min(held, length) for held, length in zip(self.coded, lengths, strict=True)]
        return self.window.of_recent(recent, floors)

    def _dequantized(self, row: int, first: int, tokens: int) -> dict[Kind, Tensor]:
        """What sinks and codes say of a row's tokens `first`, ..., keys and values `[G, tokens, D]`; zeros before token 0."""
        heads, _, dim = self.sinks["key"].shape[1:]
        begin, end = max(0, first), max(0, first + tokens)
        empty = torch.zeros(heads, tokens - (end - begin), dim, device=self.device)
        parts: dict[Kind, list[Tensor]] = {"key": [empty], "value": [empty]}
        for stretch in self.stretches(begin, end) if begin < end else ():
            inside = slice(max(0, begin - stretch.start), max(0, end - stretch.start))
            parts["key"].append(stretch.key[row, :, inside])
            parts["value"].append(stretch.value[row, :, inside])
        return {kind: torch.cat(states, dim=1) for kind, states in parts.items()}

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
