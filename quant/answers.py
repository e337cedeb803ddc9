"""What a model answers at the end of a long prompt: the NLL of the expected answer, and what it says by itself.

**Teacher forcing.** Greedy decoding picks the most likely token given the prompt and what it has picked so far. By
induction it gives the expected answer exactly if and only if each of its tokens is the most likely one given the prompt
and the *true* tokens before it: up to the first wrong pick both have read the same. So one forward without a cache over
prompt and answer tells whether the answer is found, within `simulated(model, quantizers)` too. The same logits give its
NLL, which still grades models that are too small or too damaged to hit.

**Greedy decoding in simulation.** The simulation takes each sequence in one piece, so a token at a time would cost a
forward over the whole text each. Instead, tokens are drafted from a cache of simulated keys and values. Where each token
is quantized by itself, as in every scheme that can be packed, that cache holds just what the forward over the whole text
would, and the draft is the answer. Where ranges change with the sequence, or tokens leave a recent window, it is checked by one simulated forward over
prompt and draft: by the induction above, everything up to the first difference is what greedy decoding gives, and so is
the pick at that difference. There the next draft begins; hardly ever is there one.

**With a cache** the prompt is read once and its cache doubled: one row is fed the expected answer, the other what it picks.

Either way nothing is decoded beyond an answer that is the expected one to the last token: its score is settled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from gradients.finite import require_finite
from gradients.placement import input_device
from gradients.precision import widened
from quant.artefact import Quantizers
from quant.prompts import Sample
from quant.simulate import simulated
from quant.storage import StoredSize


@dataclass(frozen=True)
class Reply:
    """What came of one sample."""

    exact: bool  # greedy decoding begins with the expected answer
    nll: float  # nats, of the whole expected answer
    size: StoredSize = field(default_factory=StoredSize)  # of the cache; empty without quantizers
    greedy: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # what the model says

    @classmethod
    def of(cls, logits: Tensor, answer: Tensor, size: StoredSize, greedy: Tensor | None = None) -> "Reply":
        """Score an `answer` `[A]` by the logits `[A, V]` that precede its tokens."""
        answer = answer.to(logits.device)
        nll = torch.nn.functional.cross_entropy(widened(logits), answer, reduction="sum")
        said = {} if greedy is None else {"greedy": greedy.cpu()}
        return cls(bool((logits.argmax(-1) == answer).all()), float(nll), size, **said)


def share_found(expected: tuple[str, ...], text: str) -> float:
    """The share of the `expected` strings that occur in a text, whatever their case (RULER's `string_match_all`)."""
    return sum(one.lower() in text.lower() for one in expected) / len(expected)


@torch.inference_mode()
def reply_simulated(model: PreTrainedModel, sample: Sample, quantizers: Quantizers, new_tokens: int = 0) -> Reply:
    """The reply of the model quantized in simulation, with `new_tokens` greedy tokens. Raises `UserError` for NaN."""
    device = input_device(model)
    prompt, answer = sample.prompt.to(device), sample.answer.to(device)
    tokens = torch.cat([prompt, answer[:-1]])[None]
    cache = DynamicCache()  # of whole layers, also where the model has windows: its masks see to them
    with simulated(model, quantizers) as usage:
        kept = {"use_cache": True, "past_key_values": cache} if new_tokens else {"use_cache": False}
        logits = model(input_ids=tokens, logits_to_keep=len(answer), **kept).logits[0]
    require_finite(logits, model, tokens)
    greedy = agreed(answer, logits.argmax(-1)) if new_tokens else None
    while greedy is not None and not _said(model, greedy, answer, new_tokens):
        with _drafting(model, quantizers):
            drafted = _draft(model, cache, prompt, greedy, new_tokens)
        greedy = drafted if _token_by_token(quantizers) else _checked(model, quantizers, prompt, drafted)
    return Reply.of(logits, answer, usage.size, None if greedy is None else _cut(model, greedy[:new_tokens]))


def _token_by_token(quantizers: Quantizers) -> bool:
    """Whether what is stored of a token depends on no other, and never changes, so that a draft cannot be wrong."""
    return not quantizers.scheme.residual_tokens and not any(
        one.scheme.simulated_only for sides in quantizers.layers.values() for one in sides.values()
    )


def _checked(model: PreTrainedModel, quantizers: Quantizers, prompt: Tensor, drafted: Tensor) -> Tensor:
    """The `drafted` tokens as far as one simulated forward over the whole text picks them, and its first other pick."""
    tokens = torch.cat([prompt, drafted[:-1]])[None]
    with simulated(model, quantizers):
        picks = model(input_ids=tokens, use_cache=False, logits_to_keep=len(drafted)).logits[0].argmax(-1)
    return agreed(drafted, picks)


def agreed(proposed: Tensor, picks: Tensor) -> Tensor:
    """`proposed` `[N]` up to the first token that differs from the `picks` `[N]` at its place, and that pick."""
    differ = (proposed != picks).nonzero()
    return proposed if not len(differ) else picks[: int(differ[0]) + 1]


def _drafting(model: PreTrainedModel, quantizers: Quantizers) -> AbstractContextManager[object]:
    """Within the block, single tokens are quantized as they would be in the middle of a text, where that is possible.

    Keys quantized after the rotary embedding and residual windows need the whole text: their drafts stay exact.
    """
    scheme = quantizers.scheme
    if scheme.key_rope == "post" or scheme.residual_tokens:
        return nullcontext()
    sinks_apart = replace(quantizers, scheme=replace(scheme, sink_tokens=0))  # which are at the start
    return simulated(model, sinks_apart, whole=False)


def _draft(model: PreTrainedModel, cache: DynamicCache, prompt: Tensor, greedy: Tensor, new_tokens: int) -> Tensor:
    """`greedy` continued from the cache, which holds the prompt and at least all of `greedy` but its last token."""
    cache.crop(len(prompt) + len(greedy) - 1 - cache.get_seq_length())
    tokens = list(greedy.split(1))
    while len(tokens) < new_tokens and not _ended(model, tokens[-1]):
        tokens.append(model(input_ids=tokens[-1][None], past_key_values=cache).logits[0, -1].argmax()[None])
    return torch.cat(tokens)


@torch.inference_mode()
def reply_cached(
    model: PreTrainedModel,
    sample: Sample,
    cache: Cache,
    chunk: int,
    new_tokens: int = 0,
    measure: Callable[[], StoredSize] = StoredSize,
) -> Reply:
    """The reply by way of any `cache`, an empty one: the prompt `chunk` tokens at a time, the rest token by token.

    `measure` tells the cache's size at the end. Raises `UserError` for NaN.
    """
    device = input_device(model)
    prompt, answer = sample.prompt.to(device), sample.answer.to(device)
    for part in prompt.split(chunk):
        logits = model(input_ids=part[None], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    if new_tokens:
        cache.batch_repeat_interleave(2)
    forced, greedy = [logits[0]], [logits[-1].argmax()]
    while len(forced) < len(answer) or not _said(model, torch.stack(greedy), answer, new_tokens):
        fed = [answer[min(len(forced), len(answer)) - 1], *([greedy[-1]] if new_tokens else [])]
        logits = model(input_ids=torch.stack(fed)[:, None], past_key_values=cache).logits[:, -1]
        forced.append(logits[0])
        greedy.append(logits[-1].argmax())
    expected = torch.stack(forced[: len(answer)])
    require_finite(expected, model, torch.cat([prompt, answer])[None])
    said = _cut(model, torch.stack(greedy[:new_tokens])) if new_tokens else None
    return Reply.of(expected, answer, measure(), said)


def _said(model: PreTrainedModel, greedy: Tensor, answer: Tensor, new_tokens: int) -> bool:
    """Whether nothing is left to say: all tokens, an end of text, or the expected answer, which cannot be unsaid."""
    return len(greedy) >= new_tokens or torch.equal(greedy, answer) or _ended(model, greedy)


def _ends(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Where `tokens` are ends of text, by the model's generation settings."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return torch.isin(tokens, torch.tensor(ends if ends is not None else [], device=tokens.device, dtype=tokens.dtype))


def _ended(model: PreTrainedModel, tokens: Tensor) -> bool:
    return bool(_ends(model, tokens).any())


def _cut(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The tokens before the first end of text."""
    ends = _ends(model, tokens).nonzero()
    return tokens if not len(ends) else tokens[: int(ends[0])]
