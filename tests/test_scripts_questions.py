"""Questions of the needle and RULER tests: exact lengths, always the same, with answers that the text holds."""

import random
import re
from collections import Counter
from itertools import permutations, product

import pytest

from gradients.cli import UserError
from quant.prompts import Prompter
from scripts.retrieval import needle, tasks
from scripts.retrieval.haystack import Haystack
from scripts.retrieval.needle import NeedleTask
from scripts.retrieval.tasks import NAMES, TASKS

LONG = {"cwe": 6500, "fwe": 900, "niah_multiquery": 900}  # what a byte for a token makes of these


@pytest.fixture
def prompter(tokenizer) -> Prompter:
    return Prompter(tokenizer)


# haystacks


def test_a_haystack_is_endless_and_always_the_same() -> None:
    hay = Haystack(3)
    text = hay.text(5000)
    assert hay.text(100) == text[:100] and Haystack(3).text(20_000).startswith(text) and len(text) == 5000
    assert Haystack(4).text(100) != text[:100]
    sentences = text.split(". ")[:-1]
    assert len(set(sentences)) == len(sentences) and all(sentence[0].isupper() for sentence in sentences)
    assert Haystack(source="One. Two.").text(25) == "One. Two.\n\nOne. Two.\n\nOne"
    with pytest.raises(UserError, match="--text holds no whole sentence"):
        Haystack(source="no end")


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_needles_lie_between_sentences_at_their_depth(depth: float) -> None:
    hay, size = Haystack(1), 3000
    text = hay.hiding([(depth, "Here it is.")], size)
    before, after = text.split("Here it is. ")
    assert before + after == hay.text(size)
    assert len(before) / size == pytest.approx(depth, abs=60 / size)
    assert not before or before.endswith(". ")
    many = hay.hiding([(1.0, "Last."), (0.0, "First."), (0.5, "B."), (0.5, "C.")], size)
    assert many.startswith("First. ") and "B. C. " in many and many.index("C. ") < many.index("Last. ")


# questions


@pytest.mark.parametrize(("tokens", "depth"), list(product([400, 511, 2000], [0, 0.5, 1])))
def test_needle_questions_have_their_length_and_one_needle(tokens: int, depth: float, prompter) -> None:
    task = NeedleTask(tokens=tokens, depth=depth, seed=5)
    sample = task.sample(prompter)
    assert len(sample.prompt) == tokens
    text = prompter.tokenizer.decode(sample.prompt)
    hidden = needle.NEEDLE.format_map(task.words)
    assert text.count(hidden) == 1 and text.endswith(needle.LEAD.format_map(task.words))
    answer = prompter.tokenizer.decode(sample.answer)
    assert hidden.endswith(answer) and all(answer.count(word) == 1 for word in sample.expected)
    hay = text.removeprefix(needle.INTRODUCTION).split(needle.QUESTION.format_map(task.words))[0]
    start, size = hay.index(hidden), len(hay) - len(hidden) - 1
    assert start / size == pytest.approx(depth, abs=120 / size)
    # no word of the answer can be had from anything but the needle
    assert not any(word in hay.replace(hidden, "") for word in sample.expected)


def test_a_needle_in_a_text_of_ones_own(prompter) -> None:
    source = "All work and no play. " * 3
    text = prompter.tokenizer.decode(NeedleTask(tokens=600, depth=0.5, seed=0, source=source).sample(prompter).prompt)
    assert text.count("no play") > 10


@pytest.mark.parametrize("task", TASKS)
def test_ruler_questions_have_their_length_and_hold_their_answers(task: str, prompter) -> None:
    least = LONG.get(task, 600)
    for tokens, seed in product((least, least + 1, 3 * least), (0, 1)):
        sample = TASKS[task](prompter, tokens, seed)
        assert len(sample.prompt) == tokens
        assert sample.prompt.equal(TASKS[task](prompter, tokens, seed).prompt)
        text, answer = (prompter.tokenizer.decode(part) for part in (sample.prompt, sample.answer))
        assert all(one in text for one in sample.expected)
        assert answer == " " + ", ".join(sample.expected) + "."
        assert not any(one in other for one, other in permutations(sample.expected, 2))
    assert not sample.prompt.equal(TASKS[task](prompter, tokens, 7).prompt)


def text_of(task: str, prompter: Prompter, tokens: int = 3000) -> tuple[str, tuple[str, ...]]:
    sample = TASKS[task](prompter, tokens, 2)
    return prompter.tokenizer.decode(sample.prompt), sample.expected


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_numbers_that_are_asked_for_are_stated(task: str, keys: int, values: int, asked: int, prompter) -> None:
    text, expected = text_of(task, prompter)
    stated = re.findall(r"The special number of (\S+) is (\d{7})\.", text)
    assert len(stated) == keys * values and len({name for name, _ in stated}) == keys
    question = text.split("\n\n")[-1]
    names = [name for name in re.findall(r"[a-z]+-[a-z]+", question.split("?")[0])]
    assert len(names) == asked
    assert list(expected) == [number for name in names for key, number in stated if key == name]


def test_a_chain_of_variables_leads_to_the_number(prompter) -> None:
    text, expected = text_of("vt", prompter)
    value: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
        value[name] = value.get(source, source)
    number = re.search(r"have the value (\d{5})\?", text)[1]  # type: ignore[index]
    assert tuple(value) == expected and set(value.values()) == {number} and len(value) == 5


def test_common_words_are_the_most_common(prompter) -> None:
    for tokens in (6500, 12_000):
        text, expected = text_of("cwe", prompter, tokens)
        counts = Counter(re.findall(r"\d+\. (\S+)", text))
        common = counts.most_common(10)
        assert {word for word, _ in common} == set(expected)
        assert min(count for _, count in common) >= 3 * counts.most_common(11)[10][1]
    assert common[0][1] == 30 and counts.most_common(11)[10][1] == 3


def test_frequent_words_are_the_most_frequent(prompter) -> None:
    text, expected = text_of("fwe", prompter)
    counts = Counter(text.split("\n\n")[1].split())
    assert [word for word, _ in counts.most_common(3)] == list(expected)
    first, second, third, fourth = (count for _, count in counts.most_common(4))
    assert first > second > third > fourth and first / second == pytest.approx(4, rel=0.1)


def test_no_name_hides_in_another() -> None:
    adjectives, nouns = tasks.ADJECTIVES.split(), tasks.NOUNS.split()
    assert not any(one.endswith(other) for one, other in permutations(adjectives, 2))
    assert not any(one.startswith(other) for one, other in permutations(nouns, 2))
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(UserError, match="lower --lengths"):
        tasks.things(random.Random(0), len(NAMES) + 1)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_for_the_task(task: str, prompter) -> None:
    with pytest.raises(UserError, match="more than the 100 asked for|raise --lengths"):
        TASKS[task](prompter, 100, 0)
