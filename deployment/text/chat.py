"""Turns of a conversation, or of plain text, on one packed cache.

A `Dialogue` says which token ids the text consists of after the user has said something; the session reads what of them it
has not read yet. `Chat` renders the conversation with the tokenizer's chat template, `PlainText` appends what was typed.
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from deployment.text.answer import Answer, Interruption
from deployment.text.saved import Messages
from deployment.text.session import Session
from gradients.cli import UserError, require_text
from gradients.loading import LoadedModel

COMMANDS = "/exit ends, /reset forgets everything said, /save FILE stores the cache"


class Dialogue(Protocol):
    """What is said next as token ids; `messages` is the conversation, None for plain text."""

    messages: Messages | None

    def opening(self, tokens: list[int], text: str) -> list[int]: ...  # noqa: D102
    def tokens_of(self, tokens: list[int], text: str) -> list[int]: ...  # noqa: D102
    def answered(self, text: str, answer: str) -> None: ...  # noqa: D102
    def reset(self) -> None: ...  # noqa: D102


class PlainText:
    """The text goes on with whatever is typed, token for token as it stands."""

    messages: Messages | None = None

    def __init__(self, loaded: LoadedModel) -> None:
        self.tokenizer = loaded.tokenizer
        ends = loaded.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def opening(self, tokens: list[int], text: str) -> list[int]:
        """A prompt continues the text `tokens`, or is a longer one that begins with it."""
        whole = self.tokenizer(text).input_ids
        if whole[: len(tokens)] == tokens or text.startswith(self.tokenizer.decode(tokens, skip_special_tokens=True)):
            return whole
        return self.tokens_of(tokens, text)

    def tokens_of(self, tokens: list[int], text: str) -> list[int]:
        """The text, without the end that the model may have set, and what is typed."""
        if not tokens:
            return self.tokenizer(text).input_ids
        if tokens[-1] in self.ends:
            tokens = tokens[:-1]
        return tokens + (self.tokenizer(text, add_special_tokens=False).input_ids if text else [])

    def answered(self, text: str, answer: str) -> None:
        """Nothing to remember: the tokens say it all."""

    def reset(self) -> None:
        """Nothing to forget."""


class Chat:
    """A conversation as the tokenizer's chat template renders it.

    Args:
        system: instructions before the first message.
        messages: a conversation to continue.

    Raises `UserError` without a chat template.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None, messages: Messages | None = None) -> None:
        self.tokenizer = loaded.tokenizer
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {loaded.name!r} has no chat template; drop --chat, or give an instruct model"
            )
        self._start: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages: Messages | None = list(messages or self._start)

    def opening(self, tokens: list[int], text: str) -> list[int]:
        """A prompt is a message like any other."""
        return self.tokens_of(tokens, text)

    def tokens_of(self, tokens: list[int], text: str) -> list[int]:
        """The whole conversation up to where the model is to answer `text`."""
        messages = [*(self.messages or []), {"role": "user", "content": text}]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise UserError(f"the chat template refuses this conversation: {error}; try without --system") from error
        return list(rendered["input_ids"])

    def answered(self, text: str, answer: str) -> None:
        """Remember a turn."""
        self.messages = [*(self.messages or []), _message("user", text), _message("assistant", answer)]

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages = list(self._start)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def typed_lines() -> Iterator[str]:
    """Lines of stdin without their ends; asks for them where someone sits at a terminal. Raises `UserError` if it is closed."""
    if sys.stdin is None:
        raise UserError("--interactive reads lines from stdin, which is closed; leave it open, or give --prompt alone")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, and the next awaited
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        yield line.rstrip("\r\n")


def converse(
    session: Session,
    dialogue: Dialogue,
    lines: Iterable[str],
    answer: Callable[[list[int], Interruption], Answer],
) -> list[Answer]:
    """Answer line after line until they end or say `/exit`. What is wrong with a line is said on stderr, and the next awaited."""
    answers: list[Answer] = []
    for line in lines:
        if line.strip() == "/exit":
            break
        try:
            require_text(line, "the line")
            if line.startswith("/"):
                _obey(line, session, dialogue)
            elif line.strip() or dialogue.messages is None:
                answers.append(turn(session, dialogue, line, dialogue.tokens_of(session.tokens, line), answer))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    return answers


def turn(
    session: Session,
    dialogue: Dialogue,
    text: str,
    tokens: list[int],
    answer: Callable[[list[int], Interruption], Answer],
) -> Answer:
    """One answer, which Ctrl-C ends. Raises `UserError` if there is nothing to continue yet."""
    if not tokens:
        raise UserError(f"the text {text!r} is empty; type something")
    with Interruption() as interruption:
        given = answer(tokens, interruption)
    dialogue.answered(text, given.text)
    return given


def _obey(line: str, session: Session, dialogue: Dialogue) -> None:
    name, _, argument = line.strip().partition(" ")
    if name == "/reset" and not argument:
        session.reset()
        dialogue.reset()
    elif name == "/save" and argument:
        session.save(argument.strip(), dialogue.messages)
        print(f"{len(session.tokens)} tokens in {argument.strip()}", file=sys.stderr)
    else:
        raise UserError(f"command {line.strip()!r} is unknown; {COMMANDS}")
