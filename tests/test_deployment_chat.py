"""Texts that grow on one cache: conversations, plain text, and files continued from later."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.generate import main as generate_main
from deployment.text.answer import TimedStreamer
from deployment.text.chat import Chat, PlainText, typed_lines
from deployment.text.saved import load_cache
from deployment.text.session import Session
from gradients.cli import UserError
from gradients.loading import LoadedModel
from quant.scheme import Scheme

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] OLD }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NEW = 10


@pytest.fixture
def talker(llama, tokenizer) -> LoadedModel:
    """The tiny Llama with a chat template."""
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = TEMPLATE.replace(" OLD ", " ")
    return LoadedModel("tiny", llama, own)


@pytest.fixture(scope="module")
def chat_folder(llama, llama_folder, tmp_path_factory) -> Path:
    """The tiny Llama's folder with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-talker"
    llama.save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(llama_folder)
    own.chat_template = TEMPLATE.replace(" OLD ", " ")
    own.save_pretrained(folder)
    return folder


def plainly(model: PreTrainedModel, tokens: list[int], new: int = NEW) -> list[int]:
    """What the unquantized model says to a text that it reads at once."""
    ids = torch.tensor([tokens])
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=2)[0].tolist()


@pytest.mark.parametrize("change", [" ", " | upper "], ids=["template keeps answers", "template changes answers"])
def test_turns_equal_the_whole_conversation_at_once(talker, eight_bits, change: str) -> None:
    talker.tokenizer.chat_template = TEMPLATE.replace(" OLD ", change)
    session, chat = Session(talker, eight_bits, prefill_chunk=7, quiet=True), Chat(talker, system="be brief")
    session.open()
    read = 0
    for number, said in enumerate(["what is a key", "and a value?", "thanks"]):
        tokens = chat.tokens_of(session.tokens, said)
        given = session.answer(tokens, NEW)
        assert session.tokens == plainly(talker.model, tokens)
        assert session.cache.get_seq_length() == len(session.tokens) - 1
        chat.answered(said, given.text)
        read += given.read_tokens
        if number:  # the conversation before is not read again
            assert given.read_tokens < len(tokens) - 40
    assert read == session.read_tokens
    assert [message["role"] for message in chat.messages or []] == ["system"] + 3 * ["user", "assistant"]


def test_cropping_costs_no_more_than_what_differs(talker, eight_bits) -> None:
    session = Session(talker, eight_bits, quiet=True)
    session.open()
    tokens = talker.tokenizer("the key of the value of the token").input_ids
    session.answer(tokens, NEW)
    other = [*tokens[:20], 70, 71, 72]
    assert session.answer(other, NEW).read_tokens == 3
    assert session.tokens == plainly(talker.model, other)
    again = session.answer(other, NEW)  # nothing is new: the last token alone is read
    assert again.read_tokens == 1 and session.tokens == plainly(talker.model, other)


def test_a_sliding_window_that_has_forgotten_is_read_again(make_model, tokenizer, fit_model, make_tokens) -> None:
    model = make_model("gemma3")
    session = Session(LoadedModel("tiny", model, tokenizer), fit_model(model, Scheme.parse("int8-5%")), quiet=True)
    session.open()
    tokens = make_tokens(1, 60)[0].tolist()
    session.answer(tokens, NEW)
    changed = [*tokens[:30], 70, *tokens[31:]]
    assert session.answer(changed, NEW).read_tokens == 60
    assert session.tokens == plainly(model, changed)


def test_plain_text_is_continued(talker) -> None:
    text, ids = PlainText(talker), lambda words: talker.tokenizer(words).input_ids
    assert text.tokens_of([], "a key") == text.opening([], "a key") == ids("a key")
    assert text.opening(ids("a key"), " is") == ids("a key is")
    assert text.opening(ids("a key"), "a key is") == ids("a key is")  # begins with it
    assert text.tokens_of(ids("a key"), "a key is") == ids("a keya key is")  # was typed, not given as the whole
    ended = [*ids("a key"), talker.tokenizer.eos_token_id]
    assert text.tokens_of(ended, "") == ids("a key")


@pytest.fixture
def arguments(chat_folder, quantizers_file) -> list[str]:
    model = ["--model", str(chat_folder), "--quantizers", str(quantizers_file), "--device", "cpu"]
    return [*model, "--max-new-tokens", "12", "--prefill-chunk", "16"]


def test_a_document_is_read_once_and_continues_to_the_same_tokens(arguments, tmp_path) -> None:
    document, cache = "of the key of the head " * 10, str(tmp_path / "book.cache")
    first = generate_main([*arguments, "--prompt", document, "--save-cache", cache])
    loaded = generate_main([*arguments, "--load-cache", cache])
    assert loaded["text"] == first["text"] and loaded["new_tokens"] == first["new_tokens"]
    assert (first["read_tokens"], loaded["read_tokens"]) == (230, 1)
    for key in ("prompt_tokens", "tokens", "cache_bytes", "fp16_bytes"):
        assert loaded[key] == first[key]

    read = generate_main([*arguments, "--prompt", document, "--save-cache", cache, "--max-new-tokens", "0"])
    assert read["new_tokens"] == 0 and read["tokens"] == 229
    asked = generate_main([*arguments, "--load-cache", cache, "--prompt", "and a value"])
    whole = generate_main([*arguments, "--load-cache", cache, "--prompt", document + "and a value"])
    assert asked["read_tokens"] == whole["read_tokens"] == 12
    assert asked["text"] == whole["text"] and asked["prompt_tokens"] == 241
    beams = ["--load-cache", cache, "--beams", "2"]
    assert generate_main([*arguments, *beams])["text"] == generate_main([*arguments, *beams])["text"]


def test_an_unbroken_run_and_one_in_two_parts_store_the_same_bits(talker, quantizers, make_tokens, tmp_path) -> None:
    tokens = make_tokens(1, 150)[0].tolist()
    unbroken = Session(talker, quantizers, prefill_chunk=32, quiet=True)
    unbroken.open(capacity=200)
    unbroken.read(tokens)
    unbroken.save(tmp_path / "cache")
    unbroken.answer(tokens, 40)
    saved = load_cache(tmp_path / "cache", quantizers, talker.model)
    continued = Session(talker, quantizers, prefill_chunk=32, saved=saved, quiet=True)
    continued.open(capacity=200)
    assert continued.tokens == tokens and continued.cache.get_seq_length() == 149
    continued.answer(tokens, 40)
    assert continued.tokens == unbroken.tokens
    pairs = zip(continued.cache.tensors(), unbroken.cache.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def interactive(monkeypatch: pytest.MonkeyPatch, arguments: list[str], lines: list[str]) -> dict:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return generate_main([*arguments, "--interactive"])


def test_a_conversation_at_the_terminal(arguments, monkeypatch, capsys, tmp_path) -> None:
    file, talk = str(tmp_path / "talk.cache"), [*arguments, "--chat"]
    both = interactive(monkeypatch, talk, ["a key", "", "a value", f"/save {file}", "/hello", "/exit", "never read"])
    printed = capsys.readouterr()
    assert both["turns"] == 2 and both["new_tokens"] == 24
    assert "command '/hello' is unknown" in printed.err and "tokens in" in printed.err
    third = interactive(monkeypatch, talk, ["a key", "a value", "a token"])
    later = generate_main([*talk, "--load-cache", file, "--prompt", "a token", "--save-cache", file])
    assert third["turns"] == 3 and later["prompt_tokens"] == third["prompt_tokens"]
    assert later["read_tokens"] < later["prompt_tokens"] / 2
    anew = interactive(monkeypatch, [*talk, "--load-cache", file], ["/reset", "a key"])
    first = generate_main([*talk, "--prompt", "a key"])
    assert anew["text"] == first["text"] and anew["prompt_tokens"] == first["prompt_tokens"] == len("[user]a key") + 12
    assert interactive(monkeypatch, talk, [])["turns"] == 0


def test_plain_text_at_the_terminal(arguments, monkeypatch) -> None:
    result = interactive(monkeypatch, [*arguments, "--prompt", "the key"], [" of", ""])
    assert result["turns"] == 3 and result["prompt_tokens"] == len("the key") + 12 + len(" of") + 12


def test_a_line_that_is_no_text_does_not_end_the_conversation(arguments, monkeypatch, capsys) -> None:
    bytes_typed = io.BytesIO(b"caf\xe9\nhello\n/exit\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(bytes_typed, encoding="utf-8"))
    result = generate_main([*arguments, "--interactive"])
    assert result["turns"] == 1
    assert "error: the line is no text in the encoding of this process" in capsys.readouterr().err


def test_a_turn_beyond_the_positions_does_not_end_the_conversation(arguments, monkeypatch, capsys) -> None:
    result = interactive(monkeypatch, [*arguments, "--chat"], ["a key", "value " * 90, "a head"])
    assert "model's positions are 512" in capsys.readouterr().err
    assert result["turns"] == 2 and result["prompt_tokens"] < 100


def test_ctrl_c_ends_the_answer_and_not_the_chat(arguments, monkeypatch, capsys) -> None:
    before, put = signal.getsignal(signal.SIGINT), TimedStreamer.put

    def put_and_press(self: TimedStreamer, value: Tensor) -> None:
        put(self, value)
        if len(self.times) == 4 and len(pressed) == 0:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    pressed: list[int] = []
    monkeypatch.setattr(TimedStreamer, "put", put_and_press)
    result = interactive(monkeypatch, [*arguments, "--chat"], ["a key", "a value"])
    assert result["turns"] == 2 and 3 + 12 <= result["new_tokens"] <= 4 + 12
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to answer"),
        (["--chat", "--load-cache", "x"], "nothing to answer"),
        (["--interactive", "--beams", "2"], "--beams 2 leaves no cache"),
        (["--system", "be brief", "--prompt", "key"], "--system begins a conversation"),
        (["--chat", "--system", "be brief", "--prompt", "key", "--load-cache", "x"], "--system begins a conversation"),
        (["--prompt", "key", "--max-new-tokens", "0"], "--max-new-tokens 0 only reads"),
        (["--prompt", "key", "--load-cache", "no-such-cache"], "'no-such-cache' cannot be read"),
        (["--prompt", "k", "--save-cache", "unwritten"], "is empty: nothing was read yet"),
    ],
)
def test_bad_requests_are_refused_and_write_nothing(arguments, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_main([*arguments, *options])
    assert not Path("unwritten").exists()


def test_a_chat_needs_a_template_and_a_conversation(arguments, llama_folder, talker, tmp_path) -> None:
    with pytest.raises(UserError, match="no chat template; drop --chat"):
        generate_main(["--model", str(llama_folder), *arguments[2:], "--chat", "--prompt", "key"])
    cache = str(tmp_path / "plain.cache")
    generate_main([*arguments, "--prompt", "of the key", "--save-cache", cache, "--max-new-tokens", "0"])
    with pytest.raises(UserError, match="plain text and no conversation; drop --chat"):
        generate_main([*arguments, "--chat", "--prompt", "key", "--load-cache", cache])
    talker.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match="refuses this conversation: no such role"):
        Chat(talker).tokens_of([], "key")


def test_a_closed_stdin_is_said(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="reads lines from stdin, which is closed"):
        next(typed_lines())
