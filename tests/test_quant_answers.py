"""Replies: prompts of exact length through templates too, NLL, greedy answers that equal generation, all ways agreeing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.cli import UserError
from quant.answers import Reply, _checked, _draft, agreed, reply_cached, reply_simulated, share_found
from quant.artefact import Quantizers
from quant.passkey import PasskeyTask, passkey_tasks
from quant.prompts import Prompter, Sample, fitting_size, largest
from quant.scheme import Scheme
from quant.simulate import simulated
from quant.storage import StoredSize

NEW = 12


def passkey(tokenizer: PreTrainedTokenizerFast, tokens: int = 300, seed: int = 0) -> Sample:
    return PasskeyTask(tokens=tokens, depth=0.5, seed=seed).sample(Prompter(tokenizer))


def generated(model: PreTrainedModel, prompt: Tensor, count: int, **kwargs: Any) -> Tensor:
    """What `model.generate` gives, up to the end of text."""
    output = model.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=2,
        **kwargs,
    )
    said = output[0, len(prompt) :].tolist()
    return torch.tensor(said[: said.index(1)] if 1 in said else said)


def spoiled(answer: Tensor) -> list[Tensor]:
    """The answer with one token changed, at each place in turn."""
    return [torch.where(torch.arange(len(answer)) == i, (answer + 1) % 259, answer) for i in range(len(answer))]


def simulated_greedy(model: PreTrainedModel, quantizers: Quantizers, prompt: Tensor, count: int) -> Tensor:
    """The simulation has no cache, so plain decoding runs the whole text for every token."""
    found = torch.empty(0, dtype=torch.int64)
    with torch.no_grad(), simulated(model, quantizers):
        while len(found) < count and 1 not in found:
            tokens = torch.cat([prompt, found])[None]
            found = torch.cat([found, model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()[None]])
    return found[found != 1]


def test_unquantized_replies_equal_generation(model, tokenizer) -> None:
    """A random model finds no passkey, but what it does say is found, and nothing else."""
    prompt = passkey(tokenizer).prompt
    found = generated(model, prompt, NEW)
    for answer in (found, *spoiled(found)[:3]):
        reply = reply_cached(model, Sample(prompt, answer), DynamicCache(config=model.config), 77, len(found))
        assert reply.greedy.tolist() == found.tolist()
        assert reply.exact == torch.equal(answer, found)


def test_simulated_replies_equal_uncached_greedy_decoding(llama, tokenizer, quantizers) -> None:
    for seed in range(3):
        prompt = passkey(tokenizer, 260 + seed, seed).prompt
        found = simulated_greedy(llama, quantizers, prompt, NEW)
        for answer in (found, found[:2], *spoiled(found)):
            reply = reply_simulated(llama, Sample(prompt, answer), quantizers, NEW)
            assert reply.greedy.tolist() == (answer if reply.exact else found).tolist()
            assert reply.exact == torch.equal(answer, found[: len(answer)])


def test_one_draft_is_enough(llama, tokenizer, quantizers, monkeypatch) -> None:
    """Drafted tokens are quantized, too: a scheme whose ranges do not depend on the text is drafted right at once.

    The whole text is read once, and the draft is what a check would leave of it.
    """
    drafts, read = [], []
    monkeypatch.setattr("quant.answers._draft", lambda *a: drafts.append(_draft(*a)) or drafts[-1])
    prompt = passkey(tokenizer).prompt
    hook = llama.model.embed_tokens.register_forward_hook(
        lambda _module, inputs, _output: read.append(len(inputs[0][0]))
    )
    reply = reply_simulated(llama, Sample(prompt, torch.tensor([7, 7])), quantizers, 40)
    hook.remove()
    assert len(drafts) == 1 and len(reply.greedy) > 5
    assert read == [len(prompt) + 1] + [1] * (len(drafts[0]) - 1)
    assert _checked(llama, quantizers, prompt, drafts[0]).tolist() == drafts[0].tolist()
    assert drafts[0].tolist()[: len(reply.greedy)] == reply.greedy.tolist()


@pytest.mark.parametrize(
    "scheme",
    [*map(Scheme.parse, ["kivi2", "turbo3", "int3"]), Scheme.parse("int2", residual_tokens=5)],
    ids=lambda scheme: scheme.describe(),
)
def test_any_scheme_speaks(scheme: Scheme, llama, tokenizer, fit_model) -> None:
    """Those that quantize keys after the rotary embedding, or keep a window exact, by drafts that may be wrong."""
    fitted, prompt = fit_model(llama, scheme), passkey(tokenizer).prompt
    found = simulated_greedy(llama, fitted, prompt, NEW)
    assert reply_simulated(llama, Sample(prompt, torch.tensor([7])), fitted, NEW).greedy.tolist() == found.tolist()


@pytest.mark.parametrize("mode", ["simulated", "packed"])
def test_models_with_sliding_windows_speak(mode: str, make_model, tokenizer, fit_model) -> None:
    model = make_model("gemma3")
    fitted, prompt = fit_model(model, Scheme.parse("nuq3-1%")), passkey(tokenizer).prompt
    found = simulated_greedy(model, fitted, prompt, NEW)
    sample = Sample(prompt, torch.tensor([7, 7]))
    if mode == "simulated":
        assert reply_simulated(model, sample, fitted, NEW).greedy.tolist() == found.tolist()
        return
    with packed_attention(model):
        cache = PackedCache(fitted, model.config, exact_chunk=False)
        assert reply_cached(model, sample, cache, 50, NEW).greedy.tolist() == found.tolist()


@pytest.mark.parametrize("first", [1, 2, 5])
def test_nothing_is_said_beyond_the_expected_answer(first: int, llama, tokenizer, quantizers) -> None:
    prompt = passkey(tokenizer).prompt
    plain, quantized = generated(llama, prompt, NEW)[:first], simulated_greedy(llama, quantizers, prompt, first)
    assert len(plain) == len(quantized) == first
    cache = DynamicCache(config=llama.config)
    assert reply_cached(llama, Sample(prompt, plain), cache, 100, NEW).greedy.tolist() == plain.tolist()
    assert cache.get_seq_length() == len(prompt) + first - 1
    assert reply_simulated(llama, Sample(prompt, quantized), quantizers, NEW).greedy.tolist() == quantized.tolist()


def test_a_wrong_draft_is_mended(llama, tokenizer, fit_model, monkeypatch) -> None:
    """Drafts that are always wrong cost time, never a token, where the ranges depend on the text."""
    quantizers = fit_model(llama, Scheme.parse("kivi2"))
    monkeypatch.setattr("quant.answers._draft", lambda *a: torch.cat([a[3], torch.full((NEW - len(a[3]),), 7)]))
    prompt = passkey(tokenizer).prompt
    found = simulated_greedy(llama, quantizers, prompt, NEW)
    assert 7 not in found
    reply = reply_simulated(llama, Sample(prompt, torch.tensor([7, 7])), quantizers, NEW)
    assert reply.greedy.tolist() == found.tolist()


def test_nll_is_of_the_whole_answer(llama, tokenizer) -> None:
    sample = passkey(tokenizer)
    tokens = torch.cat([sample.prompt, sample.answer])[None]
    with torch.no_grad():
        log_p = llama(input_ids=tokens).logits[0].log_softmax(-1)
    by_hand = -sum(float(log_p[299 + i, token]) for i, token in enumerate(sample.answer.tolist()))
    for spoken in (0, 3, 20):
        reply = reply_cached(llama, sample, DynamicCache(config=llama.config), 1000, spoken)
        assert reply.nll == pytest.approx(by_hand, rel=1e-5) and len(reply.greedy) <= spoken
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    right = Reply.of(logits, torch.tensor([0, 1]), StoredSize())
    assert right.exact and right.nll == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())
    assert not Reply.of(logits, torch.tensor([0, 2]), StoredSize()).exact


@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize("exact_chunk", [True, False])
def test_packed_replies_equal_generation_from_the_packed_cache(
    chunk: int, exact_chunk: bool, llama, tokenizer, quantizers
) -> None:
    prompt = passkey(tokenizer, seed=1).prompt
    with torch.inference_mode(), packed_attention(llama):
        cache = PackedCache(quantizers, llama.config, exact_chunk=exact_chunk)
        found = generated(llama, prompt, 5, past_key_values=cache, prefill_chunk_size=chunk)
        for answer in (found, *spoiled(found)):
            cache = PackedCache(quantizers, llama.config, exact_chunk=exact_chunk)
            reply = reply_cached(llama, Sample(prompt, answer), cache, chunk, len(found))
            assert reply.greedy.tolist() == found.tolist()
            assert reply.exact == torch.equal(answer, found)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_packed_without_exact_chunk_equals_simulated(chunk: int, llama, tokenizer, quantizers) -> None:
    for task in passkey_tasks(290, 2):
        sample = task.sample(Prompter(tokenizer))
        cache = PackedCache(quantizers, llama.config, exact_chunk=False)
        with packed_attention(llama):
            packed = reply_cached(llama, sample, cache, chunk, 0)
        expected = reply_simulated(llama, sample, quantizers)
        assert packed.nll == pytest.approx(expected.nll, rel=1e-3) and packed.exact == expected.exact


@pytest.mark.parametrize(
    ("proposed", "picks", "kept"),
    [([1, 2, 3], [1, 2, 3], [1, 2, 3]), ([1, 2, 3], [1, 4, 3], [1, 4]), ([1, 2, 3], [4, 2, 3], [4])],
)
def test_tokens_agreed_on(proposed: list[int], picks: list[int], kept: list[int]) -> None:
    assert agreed(torch.tensor(proposed), torch.tensor(picks)).tolist() == kept


def test_share_found() -> None:
    assert share_found(("Figs", "windy", "harbour"), "eat figs, on a WINDY day") == pytest.approx(2 / 3)
    assert share_found(("12",), "") == 0


def test_the_search_for_a_length() -> None:
    assert [largest(lambda n: n <= 37, start) for start in (0, 1, 37, 38, 500)] == [37] * 5
    assert fitting_size(lambda size: 10 + size // 4, 20) in range(40, 44)
    with pytest.raises(UserError, match="a prompt without filler has 10 tokens, more than the 9 asked for"):
        fitting_size(lambda size: 10 + size, 9)
    with pytest.raises(UserError, match="no prompt has exactly 21 tokens"):
        fitting_size(lambda size: 10 + 2 * size, 21)


def test_a_chat_template_is_part_of_the_length(tokenizer) -> None:
    with pytest.raises(UserError, match="--chat-template.* has none"):
        Prompter(tokenizer, chat=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tokenizer, "chat_template", "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}A:", raising=False
        )
        sample = PasskeyTask(tokens=300, depth=0.5, seed=0).sample(Prompter(tokenizer, chat=True))
        assert len(sample.prompt) == 300 and sample.prompt.tolist().count(0) == 1
        text = tokenizer.decode(sample.prompt)
        assert text.startswith("<s>[There is") and text.endswith("What is the pass key?]A:The pass key is")
        assert tokenizer.decode(sample.answer).startswith(" ")
