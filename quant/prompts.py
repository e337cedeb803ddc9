r"""Prompts of an exact number of tokens, for tests of retrieval: a question, what answers it, and filler until it fits.

A retrieval test is a function from an amount of filler to a text. How many tokens a text has is known only to the
tokenizer, so the amount is searched: bisection over characters, then a look around, because the next character may
add several tokens, none, or take one away. What is compared at one length then differs in nothing but the cache.

The prompt ends with a `lead`, the first words of the answer ("The pass key is"): small models that were never taught to
follow instructions continue a sentence, too. In a chat template the question is the user's turn and the lead begins the
assistant's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.cli import UserError
from gradients.text import bos_token

_REACH = 64  # characters around the right length, for tokenizers to which a character may add two tokens or none


@dataclass(frozen=True)
class Sample:
    """One question as a model reads it.

    Fields:
        prompt: `[S]` int64, special tokens and the answer's lead included.
        answer: `[A]` int64, the tokens of the expected answer.
        expected: what an answer is searched for: numbers, names, words.
    """

    prompt: Tensor
    answer: Tensor
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompter:
    """Brings questions into a model's tokens, as plain text or (`chat`) through the tokenizer's chat template.

    Raises `UserError` when `chat` is asked of a tokenizer without a template.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    bos: bool | None = None  # whether a plain prompt begins with <bos>; None: where the tokenizer adds it by itself

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise UserError("--chat-template: the model's tokenizer has none; leave the option out")
        if self.chat and self.bos is not None:
            raise UserError("--chat-template writes its own <bos>; leave out --bos and --no-bos")

    def render(self, question: str, lead: str) -> str:
        """The whole prompt; `lead` begins with its own space or line end."""
        if not self.chat:
            return question + lead
        turns = [{"role": "user", "content": question}]
        opened = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(opened) + lead.lstrip()

    def tokens(self, rendered: str) -> list[int]:
        """Token ids of a rendered prompt; a template writes its special tokens itself."""
        special = {"add_special_tokens": False} if self.chat or self.bos is not None else {}
        begin = bos_token(self.tokenizer, True) if self.bos else None
        return [*([] if begin is None else [begin]), *self.tokenizer(rendered, verbose=False, **special).input_ids]

    @property
    def begins_with_bos(self) -> bool:
        """Whether prompts do."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return begin is not None and self.tokens(self.render("a", ""))[:1] == [begin]

    def count(self, question: str, lead: str) -> int:
        """Tokens of the rendered prompt."""
        return len(self.tokens(self.render(question, lead)))

    def sample(
        self, question: Callable[[int], str], lead: str, answer: str, expected: tuple[str, ...], tokens: int
    ) -> Sample:
        """The prompt of exactly `tokens` tokens, with `question(size)` at about `size` characters of filler.

        Raises `UserError` when no amount of filler gives that length, or when the answer changes the prompt's tokens.
        """
        rendered = self.render(question(fitting_size(lambda size: self.count(question(size), lead), tokens)), lead)
        prompt, whole = self.tokens(rendered), self.tokens(rendered + answer)
        if whole[: len(prompt)] != prompt:
            raise UserError(
                f"the tokenizer splits a prompt of {tokens} tokens otherwise once an answer follows it; use a tokenizer "
                "that adds nothing at the end"
            )
        return Sample(torch.tensor(prompt), torch.tensor(whole[len(prompt) :]), expected)


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that `fits`, given that 0 does and that what fits does so downwards; looks near `start` first."""
    low, high = 0, max(1, start)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting_size(count: Callable[[int], int], tokens: int) -> int:
    """The characters of filler with which a prompt `count`s exactly `tokens`. Raises `UserError` if there are none."""
    if (shortest := count(0)) > tokens:
        raise UserError(
            f"a prompt without filler has {shortest} tokens, more than the {tokens} asked for; ask for more"
        )
    low = largest(lambda size: count(size) <= tokens, start=tokens)
    around = range(max(0, low - _REACH), low + _REACH)
    for size in sorted(around, key=lambda near: abs(near - low)):
        if count(size) == tokens:
            return size
    raise UserError(f"no prompt has exactly {tokens} tokens with this tokenizer; ask for one more")
