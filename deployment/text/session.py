"""A session: a growing text and its packed cache.

    session = Session(loaded, quantizers)
    session.open()
    answer = session.answer(tokens, max_new_tokens=128)     # reads tokens, generates
    answer = session.answer([*session.tokens, *more], 128)  # reads only `more` and the answer's last token

The token ids are what is kept, not the text: whatever the next text shares with them from the start on is not read
again, and where it departs (a chat template may render an old answer differently) the cache is cropped.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.text.answer import Answer, Finite, Interruption, TimedStreamer
from deployment.text.saved import Messages, SavedCache, save_cache
from gradients.cli import UserError
from gradients.loading import LoadedModel
from gradients.models import decoder_config
from gradients.positions import usable_positions
from gradients.progress import progress
from quant.artefact import Quantizers


class Session:
    """One text, `tokens`, of which the cache holds a prefix: usually all but the last token, which no one has read yet.

    Args:
        prefill_chunk: tokens per forward while reading.
        saved: where to begin; None begins with an empty text.
        quiet: whether not to print answers as they come.
        graphs: whether decode steps on CUDA are recorded and replayed (automatic.py).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        quantizers: Quantizers,
        prefill_chunk: int = 1024,
        saved: SavedCache | None = None,
        quiet: bool = False,
        graphs: bool = True,
    ) -> None:
        self.loaded, self.quantizers, self.prefill_chunk, self.quiet = loaded, quantizers, prefill_chunk, quiet
        self.graphs = graphs
        self.tokens: list[int] = []
        self.read_tokens = 0
        self.read_seconds = self.open_seconds = 0.0
        self.capacity: int | None = None
        self._saved = saved
        if saved is not None:
            if len(saved.tokens) != 1:
                raise UserError(f"cache {saved.name!r} holds {len(saved.tokens)} texts; continue it in a program")
            self.tokens = saved.tokens[0].tolist()

    def open(self, capacity: int | None = None, exact_chunk: bool = True) -> None:
        """Make the cache, or restore the saved one; the arguments are those of `PackedCache`."""
        started = time.perf_counter()
        self.capacity, self._exact_chunk = capacity, exact_chunk
        if self._saved is None:
            self._empty()
        else:
            self.cache = self._saved.restore(self.loaded.model, capacity, exact_chunk)
            self._saved = None
        self.open_seconds = time.perf_counter() - started

    def _empty(self) -> None:
        self.cache = PackedCache(self.quantizers, self.loaded.model.config, self.capacity, self._exact_chunk)

    def reset(self) -> None:
        """Forget the text."""
        self._empty()
        self.tokens = []

    def check_room(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise `UserError` for a request beyond the capacity or the model's positions."""
        needed = prompt_tokens + max_new_tokens
        positions = usable_positions(decoder_config(self.loaded.model.config))
        for limit, name in ((positions, "the model's positions"), (self.capacity or needed, "the --capacity")):
            if needed > limit:
                raise UserError(
                    f"prompt of {prompt_tokens} tokens and {max_new_tokens} new ones need {needed}, {name} are {limit}; "
                    "shorten the prompt or lower --max-new-tokens"
                )

    def become(self, tokens: list[int]) -> None:
        """From now on the text is `tokens`; the cache keeps what it shares with the old one, but not the last token.

        Raises `UserError` for tokens that the model does not know.
        """
        self.loaded.check_tokens(torch.tensor(tokens))
        cached = self.cache.get_seq_length()
        pairs = zip(tokens[:-1], self.tokens[:cached], strict=False)
        kept = next((place for place, (new, old) in enumerate(pairs) if new != old), min(len(tokens) - 1, cached))
        if kept < cached:
            try:
                self.cache.crop(kept - cached)
            except RuntimeError:  # a sliding window has forgotten what it would need: read everything again
                self._empty()
        self.tokens = list(tokens)

    def _unread(self) -> torch.Tensor:
        return torch.tensor([self.tokens[self.cache.get_seq_length() :]], device=self.loaded.device)

    def read(self, tokens: list[int]) -> None:
        """Make `tokens` the text and read all but the last one, which an answer begins with."""
        self.check_room(len(tokens), 0)
        self.become(tokens)
        started, unread = time.perf_counter(), self._unread()[:, :-1]
        self.read_tokens += unread.shape[1]
        bar = progress(total=unread.shape[1], desc="reading", unit="tok", disable=unread.shape[1] <= self.prefill_chunk)
        finite = Finite()
        with (
            torch.inference_mode(),
            self._finite(finite, torch.tensor([tokens])),
            packed_attention(self.loaded.model),
            bar,
        ):
            for part in unread.split(self.prefill_chunk, dim=1) if unread.shape[1] else ():
                finite(part, self.loaded.model(input_ids=part, past_key_values=self.cache, logits_to_keep=1).logits)
                bar.update(part.shape[1])
        self.read_seconds += time.perf_counter() - started

    @contextmanager
    def _finite(self, finite: Finite, text: torch.Tensor) -> Iterator[None]:
        """Raise `UserError` after the block if `finite` has seen NaN, be it that sampling could not go on."""
        try:
            yield
        except RuntimeError:
            finite.require(self.loaded.model, text.to(self.loaded.device))
            raise
        finite.require(self.loaded.model, text.to(self.loaded.device))

    def answer(
        self, tokens: list[int], max_new_tokens: int, interruption: Interruption | None = None, **sampling: Any
    ) -> Answer:
        """Make `tokens` the text and continue it; `sampling` goes to `model.generate`.

        Raises `UserError` for a request beyond the capacity or the model's positions, the text then stays as it was, and for logits
        that are NaN.
        After a beam search the cache holds a row per beam and cannot be continued.
        """
        self.check_room(len(tokens), max_new_tokens)
        self.become(tokens)
        loaded, ids = self.loaded, torch.tensor([tokens], device=self.loaded.device)
        read = len(tokens) - self.cache.get_seq_length()
        self.read_tokens += read
        streamer = TimedStreamer(loaded.tokenizer, self.quiet)
        beams = sampling.get("num_beams", 1)
        if beams > 1:
            self.cache.batch_repeat_interleave(beams)
        started, finite = time.perf_counter(), Finite()
        with torch.inference_mode(), self._finite(finite, ids), packed_attention(loaded.model, graphs=self.graphs):
            output = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                max_new_tokens=max_new_tokens,
                prefill_chunk_size=self.prefill_chunk,
                streamer=streamer if beams == 1 else None,
                logits_processor=[finite],
                stopping_criteria=None if interruption is None else [interruption],
                pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
                **sampling,
            )
        ended = time.perf_counter()
        self.tokens = output[0].tolist()
        text = loaded.tokenizer.decode(self.tokens[len(tokens) :], skip_special_tokens=True)
        if beams > 1 and not self.quiet:
            print(text)
        first, last = (streamer.times[1], streamer.times[-1]) if beams == 1 else (started, ended)
        return Answer(text, len(tokens), read, output.shape[1] - len(tokens), first - started, last - first)

    def save(self, path: str | Path, messages: Messages | None = None) -> None:
        """Write text and cache to a file that `load_cache` reads."""
        tokens = torch.tensor([self.tokens])
        save_cache(path, self.cache, self.quantizers, self.loaded.model, tokens, messages)
