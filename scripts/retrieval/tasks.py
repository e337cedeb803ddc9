"""The synthetic tasks of RULER (arXiv 2404.06654), of any length, drawn with a seed.

| task | hidden in the text | asked for |
|---|---|---|
| niah_single | a number of one thing | that number |
| niah_multikey | numbers of four things | one of them |
| niah_multivalue | four numbers of one thing | all of them |
| niah_multiquery | numbers of four things | all of them |
| vt | `VAR B = VAR A` from a number on, four hops | every variable that has the number |
| cwe | a list of words, ten of them often | these ten |
| fwe | coded words, their counts falling as rank^-2 | the three most frequent |

The wording is ours, as are the generated haystacks, and vt and cwe come without RULER's worked example; what is hidden,
asked and scored is RULER's. An answer is searched
for each expected string: `share_found` is its `string_match_all`, any at all its `string_match_part`.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from gradients.cli import UserError
from quant.prompts import Prompter, Sample, largest
from scripts.retrieval.haystack import Haystack

# no adjective ends another and no noun begins another, so that no thing's name occurs in another's
ADJECTIVES = (
    "amber ancient bitter blue brave brief bright broad calm clean clever coarse crimson curious deep distant early empty"
    " famous fancy fierce flat fresh gentle giant glossy golden grand green happy heavy hidden hollow humble idle ivory"
    " jolly keen lazy little lively lonely loud lucky magic misty modest narrow noble orange pale patient plain polite"
    " proud purple quick quiet rapid rare rough royal rusty salty secret shy silent silver simple sleepy slow smooth"
    " solemn spare steady stern strange strict sudden sunny sweet swift tall tender thick tiny tough vivid warm weary wild"
    " wise wooden young zealous"
)
NOUNS = (
    "acorn anchor anvil apricot badger barrel basin beetle bottle bridge bucket button cabin camel candle castle cherry"
    " circle cloud cobra comet copper cradle crystal dagger desert dolphin dragon eagle engine falcon feather fiddle"
    " forest fountain garden glacier goblet hammer harbor helmet hornet island jacket jaguar jungle kettle ladder lantern"
    " lemon lizard magnet meadow mirror mountain needle nickel ocean orchid otter paddle panther parrot pebble pencil"
    " pepper pigeon pillow planet pocket prairie puzzle quarry rabbit raven ribbon river rocket saddle salmon shadow"
    " spider spiral station summit temple thunder tiger timber tower trumpet tunnel turtle valley velvet violin walnut"
    " whistle window zebra"
)

NAMES = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]

PADDING = "Take your time, and look at every single word. "
_NUMBERS = (1_000_000, 9_999_999)
_HOPS = 4
_COMMON, _FREQUENT = 10, 3
_OFTEN_AT = 4096  # tokens from which common words occur 30 times; fewer in shorter prompts
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Quiz:
    """A question of any size: `text(size)` at about `size` characters of filler, the answer's `lead`, what is expected."""

    text: Callable[[int], str]
    lead: str
    expected: tuple[str, ...]

    def sample(self, prompter: Prompter, tokens: int) -> Sample:
        """Prompt and answer in tokens; the answer lists what is expected."""
        return prompter.sample(self.text, self.lead, f" {listed(self.expected)}.", self.expected, tokens)


def listed(words: tuple[str, ...], last: str = ", ") -> str:
    """`a, b, c`, with another word before the `last`."""
    return last.join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def things(draw: random.Random, count: int) -> list[str]:
    """`count` different names, `amber-falcon`. Raises `UserError` beyond what there is."""
    if count > len(NAMES):
        raise UserError(f"{count} different words are needed, there are {len(NAMES)}; lower --lengths")
    return draw.sample(NAMES, count)


def niah(draw: random.Random, keys: int, values: int, queries: int) -> Quiz:
    """`keys` things with `values` numbers each, hidden at random depths; asked for the first `queries` things."""
    names = things(draw, keys)
    numbers = [str(number) for number in draw.sample(range(*_NUMBERS), keys * values)]
    depths = [sorted(draw.random() for _ in range(values)) for _ in names]
    needles = [
        (depth, f"The special number of {name} is {number}.")
        for i, name in enumerate(names)
        for depth, number in zip(depths[i], numbers[i * values :], strict=False)
    ]
    hay, expected, one = Haystack(draw.randrange(1 << 30)), tuple(numbers[: queries * values]), queries * values == 1
    asked = listed(tuple(names[:queries]), " and ")
    what = f"The special {'number' if one else 'numbers'} of {asked} {'is' if one else 'are'}"

    def text(size: int) -> str:
        question = f"What {'is the special number' if one else 'are all special numbers'} of {asked}?"
        return (
            f"Special numbers are hidden in the text below. Remember them.\n\n{hay.hiding(needles, size)}\n\n{question}"
        )

    return Quiz(text, f" {what}", expected)


def variable_tracking(draw: random.Random) -> Quiz:
    """A chain of assignments at random depths, in order."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    number = draw.randint(10_000, 99_999)
    sources = [str(number), *(f"VAR {name}" for name in names)]
    depths = sorted(draw.random() for _ in names)
    needles = [(depth, f"VAR {name} = {source}.") for depth, name, source in zip(depths, names, sources, strict=False)]
    hay = Haystack(draw.randrange(1 << 30))

    def text(size: int) -> str:
        return (
            "Variables are assigned in the text below. Remember which has which value.\n\n"
            f"{hay.hiding(needles, size)}\n\nWhich variables have the value {number}?"
        )

    return Quiz(text, f" The {len(names)} variables with the value {number} are", tuple(names))


def padded(introduction: str, body: str, question: str) -> Callable[[int], str]:
    """A text whose filler is padding of the introduction, for bodies that may not be cut."""
    return lambda size: (
        f"{introduction} {(PADDING * (size // len(PADDING) + 1))[:size].rstrip()}\n\n{body}\n\n{question}"
    )


def common_words(draw: random.Random, count: int, tokens: int) -> Quiz:
    """A numbered list in which ten words occur often, and `count` others seldom."""
    often = max(4, 30 * min(tokens, _OFTEN_AT) // _OFTEN_AT)
    words = things(draw, _COMMON + count)
    common, others = words[:_COMMON], words[_COMMON:]
    entries = common * often + others * max(1, often // 10)
    draw.shuffle(entries)
    body = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    question = f"Which {_COMMON} words are the most common in the list?"
    introduction = f"{_COMMON} words occur far more often than all others in the list below. Remember them."
    expected = tuple(sorted(common, key=entries.index))
    return Quiz(padded(introduction, body, question), f" The {_COMMON} most common words are", expected)


def frequent_words(draw: random.Random, count: int, tokens: int) -> Quiz:
    """`count` coded words in disorder, the word of rank r about r^-2 times as frequent as the first."""
    names: list[str] = []
    entries: list[str] = []
    most = count / sum(rank**-2 for rank in range(1, count + 1)) if count else 0
    while len(entries) < count:
        name = "".join(draw.choices(_SYLLABLES, k=3))
        if name not in names:
            names.append(name)
            entries += [name] * min(max(1, int(most / len(names) ** 2)), count - len(entries))
    draw.shuffle(entries)
    question = f"Which {_FREQUENT} coded words are the most frequent, most frequent first?"
    introduction = "The words below are in code. Remember which occur most."
    lead = f" The {_FREQUENT} most frequent coded words are"
    return Quiz(padded(introduction, " ".join(entries), question), lead, tuple(names[:_FREQUENT]) or ("",))


def counted(task: Callable[[random.Random, int, int], Quiz], least: int) -> Callable[[Prompter, int, int], Sample]:
    """A task of words: as many as `tokens` hold. Raises `UserError` when those are fewer than `least`."""

    def sample(prompter: Prompter, tokens: int, seed: int) -> Sample:
        def quiz(count: int) -> Quiz:
            return task(random.Random(seed), count, tokens)

        def fits(count: int) -> bool:
            one = quiz(count)
            return prompter.count(one.text(0), one.lead) <= tokens

        count = largest(fits, tokens // 8) if fits(0) else 0
        if count < least:
            raise UserError(f"{tokens} tokens hold only {count} words of {least} that the task needs; raise --lengths")
        return quiz(count).sample(prompter, tokens)

    return sample


def hidden(task: Callable[[random.Random], Quiz]) -> Callable[[Prompter, int, int], Sample]:
    """A task of needles: as much hay as `tokens` hold."""
    return lambda prompter, tokens, seed: task(random.Random(seed)).sample(prompter, tokens)


TASKS: dict[str, Callable[[Prompter, int, int], Sample]] = {
    "niah_single": hidden(lambda draw: niah(draw, keys=1, values=1, queries=1)),
    "niah_multikey": hidden(lambda draw: niah(draw, keys=4, values=1, queries=1)),
    "niah_multivalue": hidden(lambda draw: niah(draw, keys=1, values=4, queries=1)),
    "niah_multiquery": hidden(lambda draw: niah(draw, keys=4, values=1, queries=4)),
    "vt": hidden(variable_tracking),
    "cwe": counted(common_words, least=_COMMON),
    "fwe": counted(frequent_words, least=60),  # from here on the first four counts differ
}
