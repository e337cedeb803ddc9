"""Passkey retrieval: a five-digit number hidden in repetitive text, asked for at the end (arXiv 2305.16300).

The prompt is a task description, garbage, `The pass key is 60494. Remember it. 60494 is the pass key.`, garbage again, and
`What is the pass key? The pass key is`. Garbage is cut in mid-word, as in the original test, until the prompt has exactly
the tokens that were asked for.

**Scoring by teacher forcing.** Greedy decoding picks the most likely token given the prompt and what it has picked so
far. By induction it gives the pass key exactly if and only if every token of the pass key is the most likely one given the
prompt and the *true* tokens before it: up to the first wrong pick both have read the same. So one forward without a cache
over prompt and answer scores a sample exactly, within `simulated(model, quantizers)` too, where generation could not run.
A key followed by a further digit counts as retrieved, another way of writing it (`60,494`) does not.

The same logits give the NLL of the answer, which still grades models that are too small or too damaged to hit.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.cli import UserError
from gradients.finite import require_finite
from gradients.models import LoadedModel, decoder_config
from quant.artefact import Quantizers
from quant.simulate import simulated
from quant.storage import StoredSize

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

_REACH = 64  # characters around the right length, for tokenizers to which a character may add two tokens or none


@dataclass(frozen=True)
class PasskeySample:
    """A prompt `[S]` and the tokens `[A]` of the only right answer to it, int64."""

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True, kw_only=True)
class PasskeyTask:
    """One question.

    Fields:
        tokens: length of the prompt, special tokens included, the answer not.
        depth: share of the garbage that precedes the pass key, 0 to 1.
        seed: of the pass key.
    """

    tokens: int
    depth: float
    seed: int

    @property
    def key(self) -> int:
        """The number to find, always of five digits."""
        return random.Random(self.seed).randint(10_000, 99_999)

    def text(self, garbage: int) -> str:
        """The prompt with so many characters of garbage."""
        before = round(self.depth * garbage)
        endless = GARBAGE * (garbage // len(GARBAGE) + 1)
        information = INFORMATION.format(key=self.key)
        return "\n".join([DESCRIPTION, endless[:before], information, endless[: garbage - before], QUESTION])

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> PasskeySample:
        """Prompt and answer in tokens. Raises `UserError` when no amount of garbage gives the length wanted."""
        text = self.text(self._fitting_garbage(lambda garbage: len(_tokens(tokenizer, self.text(garbage)))))
        prompt = _tokens(tokenizer, text)
        whole = _tokens(tokenizer, f"{text} {self.key}")
        if whole[: len(prompt)] != prompt:
            raise UserError(
                f"the tokenizer splits a prompt of {self.tokens} tokens otherwise once an answer follows it; use a tokenizer "
                "that adds nothing at the end"
            )
        return PasskeySample(torch.tensor(prompt), torch.tensor(whole[len(prompt) :]))

    def _fitting_garbage(self, count: Callable[[int], int]) -> int:
        """Characters of garbage with which the prompt `count`s exactly `tokens`: bisection, then a look around."""
        shortest = count(0)
        if shortest > self.tokens:
            raise UserError(
                f"a passkey prompt without garbage has {shortest} tokens, more than the {self.tokens} asked for"
            )
        low, high = 0, len(GARBAGE)
        while count(high) <= self.tokens:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= self.tokens else (low, middle)
        around = range(max(0, low - _REACH), low + _REACH)
        for garbage in sorted(around, key=lambda near: abs(near - low)):
            if count(garbage) == self.tokens:
                return garbage
        raise UserError(f"no passkey prompt has exactly {self.tokens} tokens with this tokenizer; ask for one more")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False).input_ids


def passkey_tasks(tokens: int, samples: int, seed: int = 0) -> list[PasskeyTask]:
    """Tasks of one length: depths in the middles of `samples` equal parts, a pass key of its own for each."""
    return [PasskeyTask(tokens=tokens, depth=(i + 0.5) / samples, seed=seed + i) for i in range(samples)]


def passkey_samples(loaded: LoadedModel, tasks: Sequence[PasskeyTask]) -> list[PasskeySample]:
    """The tasks in the model's tokens. Raises `UserError` when one does not fit into its positions."""
    positions = decoder_config(loaded.model.config).max_position_embeddings
    samples = [task.sample(loaded.tokenizer) for task in tasks]
    for sample in samples:
        needed = len(sample.prompt) + len(sample.answer)
        if needed > positions:
            raise UserError(
                f"a passkey prompt of {len(sample.prompt)} tokens and its answer need {needed} positions, model "
                f"{loaded.name!r} has {positions}; ask for a shorter one"
            )
    return samples


@dataclass(frozen=True)
class PasskeyScore:
    """What came of one sample."""

    retrieved: bool
    nll: float  # nats, of the whole answer
    size: StoredSize  # of the cache; empty without quantizers

    @classmethod
    def of(cls, logits: Tensor, answer: Tensor, size: StoredSize) -> "PasskeyScore":
        """Score an `answer` `[A]` by the logits `[A, V]` that precede its tokens."""
        answer = answer.to(logits.device)
        nll = torch.nn.functional.cross_entropy(logits.float(), answer, reduction="sum")
        return cls(bool((logits.argmax(-1) == answer).all()), float(nll), size)


@torch.inference_mode()
def score_simulated(model: PreTrainedModel, sample: PasskeySample, quantizers: Quantizers | None) -> PasskeyScore:
    """One forward over prompt and answer, quantized in simulation, or as the model is. Raises `UserError` for NaN."""
    tokens = torch.cat([sample.prompt, sample.answer[:-1]])[None].to(model.get_input_embeddings().weight.device)
    with nullcontext() if quantizers is None else simulated(model, quantizers) as usage:
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=len(sample.answer)).logits
    require_finite(logits, model, tokens)
    return PasskeyScore.of(logits[0], sample.answer, StoredSize() if usage is None else usage.size)


def summarise(
    tasks: Sequence[PasskeyTask], scores: Sequence[PasskeyScore], model: PreTrainedModel, quantizers: Quantizers | None
) -> dict[str, Any]:
    """Means over the samples of one length, as reported."""
    size = sum((score.size for score in scores), StoredSize())
    return {
        "scheme": quantizers.scheme.describe() if quantizers else "unquantized",
        "context": tasks[0].tokens,
        "samples": len(tasks),
        "retrieved": sum(score.retrieved for score in scores) / len(scores),
        "answer_nll": sum(score.nll for score in scores) / len(scores),
        "bits_per_element": size.bits_per_element if quantizers else float(torch.finfo(model.dtype).bits),
        "missed_depths": [task.depth for task, score in zip(tasks, scores, strict=True) if not score.retrieved],
    }
