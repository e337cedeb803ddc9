"""Passkey retrieval: a five-digit number hidden in repetitive text, asked for at the end (arXiv 2305.16300).

The prompt is a task description, garbage, `The pass key is 60494. Remember it. 60494 is the pass key.`, garbage again, and
`What is the pass key? The pass key is`. Garbage is cut in mid-word, as in the original test, until the prompt has exactly
the tokens that were asked for (`quant/prompts.py`).

The key counts as retrieved when greedy decoding begins with it (`quant/answers.py`): a key followed by a further digit
does, another way of writing it (`60,494`) does not.
"""

import random
from dataclasses import dataclass

from quant.prompts import Prompter, Sample

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
LEAD = " The pass key is"


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
        """The prompt with a given number of characters of garbage."""
        before = round(self.depth * garbage)
        endless = GARBAGE * (garbage // len(GARBAGE) + 1)
        information = INFORMATION.format(key=self.key)
        return "\n".join([DESCRIPTION, endless[:before], information, endless[: garbage - before], QUESTION])

    def sample(self, prompter: Prompter) -> Sample:
        """Prompt and answer in tokens. Raises `UserError` when no amount of garbage gives the length wanted."""
        return prompter.sample(self.text, LEAD, f" {self.key}", (str(self.key),), self.tokens)


def passkey_tasks(tokens: int, samples: int, seed: int = 0) -> list[PasskeyTask]:
    """Tasks of one length: depths in the middles of `samples` equal parts, a pass key of its own for each."""
    return [PasskeyTask(tokens=tokens, depth=(i + 0.5) / samples, seed=seed + i) for i in range(samples)]
