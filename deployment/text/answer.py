"""One generated answer: streamed, timed, and interruptible by Ctrl-C."""

import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria, TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.finite import require_finite


@dataclass(frozen=True)
class Answer:
    """What was generated, and how long it took."""

    text: str
    prompt_tokens: int  # of the whole text before it
    read_tokens: int  # of these, how many were not in the cache
    new_tokens: int
    prefill_seconds: float  # up to the first token
    decode_seconds: float  # all others


class TimedStreamer(TextStreamer):
    """Prints words as they come (unless told not to) and notes when the first token was there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, quiet: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.quiet = quiet
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called once with the prompt, then once per token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of printable text."""
        if not self.quiet:
            super().on_finalized_text(text, stream_end)


class Finite(LogitsProcessor):
    """Notes NaN among the logits of all tokens of an answer, of which any may be the most likely, without waiting for a GPU."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` as they are."""
        worst = scores.detach().amax()  # NaN if there is any
        self._seen = worst if self._seen is None else torch.maximum(self._seen, worst)
        return scores

    def require(self, model: PreTrainedModel, tokens: Tensor) -> None:
        """Raise `UserError` naming the first layer that is not finite if there was NaN; `tokens` `[B, S]` are the whole text."""
        if self._seen is not None:
            require_finite(self._seen, model, tokens)


class Interruption(StoppingCriteria):
    """Within the block, Ctrl-C ends the answer after the token at hand, and a second one the program.

    The forward at hand is completed, so that all layers of the cache hold the same tokens.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is done, `[B]` bool."""
        return torch.full((len(input_ids),), self.requested, device=input_ids.device)
