"""Haystacks: text of any length to hide sentences in, from a file or generated, so that nothing needs a download.

Generated sentences tell who did what where and when, drawn from short lists: millions of different ones, unlike the
repeated filler of the passkey test, and none that a needle could be mistaken for.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from gradients.cli import UserError

_WHO = (
    "the baker|an old sailor|my neighbour|the new teacher|a quiet child|the mayor|her cousin|the gardener|two students"
    "|the night guard|a tired nurse|the librarian|our landlord|the violinist|a young farmer|the postman|his aunt"
)
_DID = (
    "repaired|painted|sold|borrowed|forgot|described|moved|cleaned|found|photographed|measured|hid|returned|admired"
    "|dropped|carried|bought"
)
_WHAT = (
    "a wooden chair|the long ladder|two empty boxes|an umbrella|the kitchen clock|a bicycle|some letters|the garden gate"
    "|a pair of boots|the blue curtain|an unfinished map|a basket of apples|the radio|a stack of newspapers|the lamp"
)
_WHERE = (
    "behind the station|near the bridge|in the cellar|on the hill|at the market|beside the church|under the stairs"
    "|in a small hotel|by the river|across the square|in the attic|outside the theatre|next to the well|on the ferry"
)
_WHEN = (
    "on Monday|before breakfast|last winter|after the storm|in the afternoon|two years ago|at midnight|during the fair"
    "|while it rained|in early spring|without a word|once again|for the third time|when nobody was there"
)
_PARTS = [part.split("|") for part in (_WHO, _DID, _WHAT, _WHERE, _WHEN)]
_SENTENCE_END = re.compile(r"[.!?]\s+")


@dataclass(frozen=True)
class Haystack:
    """Endless text: `source` repeated, or sentences generated from `seed` without one.

    Raises `UserError` for a source of no sentences.
    """

    seed: int = 0
    source: str | None = None

    def __post_init__(self) -> None:
        if self.source is not None and not _SENTENCE_END.search(self.source):
            raise UserError("--text holds no whole sentence to hide anything between; give a longer text")

    @cached_property
    def _grown(self) -> list[str]:
        """What there is so far, in one piece."""
        return [""]

    def text(self, size: int) -> str:
        """The first `size` characters; the last sentence may be cut."""
        if len(self._grown[0]) < size:
            self._grown[0] = self._generate(2 * size)
        return self._grown[0][:size]

    def _generate(self, size: int) -> str:
        """At least `size` characters, of which a longer text is a continuation."""
        if self.source is not None:
            return (self.source.strip() + "\n\n") * (size // len(self.source.strip()) + 1)
        draw, sentences, length = random.Random(self.seed), [], 0
        while length < size:
            sentence = " ".join(draw.choice(part) for part in _PARTS) + ". "
            sentences.append(sentence[0].upper() + sentence[1:])
            length += len(sentence)
        return "".join(sentences)

    def hiding(self, needles: Iterable[tuple[float, str]], size: int) -> str:
        """`size` characters with sentences at depths from 0 to 1, each at the end of the sentence nearest to its depth.

        Needles of one depth keep their order.
        """
        text = self.text(size)
        ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
        pieces, start = [], 0
        for depth, needle in sorted(needles, key=lambda one: one[0]):
            place = min(ends, key=lambda end: abs(end - depth * size))
            pieces += [text[start:place], needle, " "]
            start = place
        return "".join([*pieces, text[start:]])
