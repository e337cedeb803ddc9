"""`model.generate` on a packed cache, and the cache methods that transformers calls."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.cli import UserError
from quant.scheme import Scheme
from quant.simulate import simulated

NEW = 12


def generate(model: PreTrainedModel, tokens: Tensor, cache: PackedCache | None, **options: object) -> Tensor:
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    options = {"attention_mask": torch.ones_like(tokens), **defaults, **options}
    if cache is None:
        return model.generate(tokens, **options)
    with packed_attention(model):
        return model.generate(tokens, past_key_values=cache, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "chunked prefill", "two beams returned"],
)
def test_generation_equals_the_unquantized_cache(llama, make_tokens, eight_bits, options: dict[str, object]) -> None:
    tokens = make_tokens(2, 40)
    cache = PackedCache(eight_bits, llama.config)
    assert torch.equal(generate(llama, tokens, cache, **options), generate(llama, tokens, None, **options))
    assert cache.get_seq_length() == 40 + NEW - 1


def test_left_padded_batch_equals_rows_alone(llama, make_tokens, eight_bits) -> None:
    tokens = make_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, :25] = 0
    together = generate(llama, tokens, PackedCache(eight_bits, llama.config), attention_mask=mask, prefill_chunk_size=9)
    alone = generate(llama, tokens[:1, 25:], PackedCache(eight_bits, llama.config))
    assert torch.equal(together[0, -NEW:], alone[0, -NEW:])


def test_cropping_takes_tokens_back(llama, make_tokens, eight_bits) -> None:
    tokens = make_tokens(1, 90)
    with packed_attention(llama):
        cache = PackedCache(eight_bits, llama.config)
        llama(input_ids=tokens, past_key_values=cache)
        cache.crop(0)
        cache.crop(-50)
        assert cache.get_seq_length() == 40
        cropped = llama(input_ids=tokens[:, :3], past_key_values=cache).logits
        straight = PackedCache(eight_bits, llama.config)
        llama(input_ids=tokens[:, :40], past_key_values=straight)
        expected = llama(input_ids=tokens[:, :3], past_key_values=straight).logits
    assert torch.allclose(cropped, expected, atol=1e-4)
    assert cache.nbytes() == straight.nbytes()
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_cropping_into_the_sinks(llama, make_tokens, fit_model) -> None:
    quantizers = fit_model(llama, Scheme.parse("nuq3-5%", sink_tokens=5))
    with packed_attention(llama):
        cache = PackedCache(quantizers, llama.config)
        llama(input_ids=make_tokens(1, 30), past_key_values=cache)
        cache.crop(-27)
        tokens = make_tokens(1, 20, seed=3)
        cropped = llama(input_ids=tokens, past_key_values=cache).logits
        straight = PackedCache(quantizers, llama.config)
        llama(input_ids=make_tokens(1, 30)[:, :3], past_key_values=straight)
        expected = llama(input_ids=tokens, past_key_values=straight).logits
    assert torch.allclose(cropped, expected, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_repeated_selected_and_reordered_rows_go_on_as_themselves(llama, make_tokens, eight_bits, padded: bool) -> None:
    tokens = make_tokens(2, 80)
    mask = torch.ones_like(tokens)
    mask[0, : 70 * padded] = 0

    def filled() -> PackedCache:
        cache = PackedCache(eight_bits, llama.config)
        llama(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        return cache

    def next_logits(cache: PackedCache, rows: list[int]) -> Tensor:
        longer = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
        return llama(input_ids=tokens[rows, :1], attention_mask=longer, past_key_values=cache).logits

    with packed_attention(llama):
        expected = next_logits(filled(), [0, 1])
        for operation, rows in (
            (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
            (lambda c: c.batch_select_indices(torch.tensor([True, False])), [0]),
        ):
            cache = filled()
            operation(cache)
            assert torch.allclose(next_logits(cache, rows), expected[rows], atol=1e-4)


def test_reset_cache_starts_anew(llama, make_tokens, eight_bits) -> None:
    cache = PackedCache(eight_bits, llama.config)
    first = generate(llama, make_tokens(1, 20), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    assert torch.equal(generate(llama, make_tokens(1, 20), cache), first)


def test_capacity_is_reserved_once_and_kept(llama, make_tokens, eight_bits) -> None:
    cache = PackedCache(eight_bits, llama.config, capacity=32)
    with packed_attention(llama):
        llama(input_ids=make_tokens(1, 30), past_key_values=cache)
        words = cache.layers[0].packed["key"].pages[0].words
        llama(input_ids=make_tokens(1, 2), past_key_values=cache)
        assert cache.layers[0].packed["key"].pages[0].words is words and cache.get_max_length() == 32
        with pytest.raises(UserError, match=r"capacity of 32 tokens.*needs 33.*shorten"):
            llama(input_ids=make_tokens(1, 1), past_key_values=cache)


def test_nothing_but_the_counted_tensors_grows_with_the_context(llama, make_tokens, eight_bits) -> None:
    """No tensor of full precision as long as the context hides anywhere in the cache."""

    def reachable(thing: object, depth: int = 0) -> list[Tensor]:
        if isinstance(thing, Tensor):
            return [thing]
        if isinstance(thing, dict):
            thing = list(thing.values())
        if isinstance(thing, (list, tuple)):
            return [tensor for item in thing for tensor in reachable(item, depth + 1)]
        return reachable(vars(thing), depth + 1) if hasattr(thing, "__dict__") and depth < 12 else []

    def hidden(tokens: int) -> int:
        cache = PackedCache(eight_bits, llama.config)
        with packed_attention(llama):
            llama(input_ids=make_tokens(1, tokens), past_key_values=cache)
        counted = {id(tensor) for tensor in cache.tensors()}
        assert cache.nbytes() == sum(tensor.nbytes for tensor in cache.tensors())
        return sum(tensor.nbytes for tensor in reachable(cache) if id(tensor) not in counted)

    assert hidden(20) == hidden(400) > 0


@pytest.mark.parametrize("axes", [("token", "token"), ("channel", "channel"), ("token", "channel")])
def test_every_axis_can_be_packed(llama, make_tokens, fit_model, axes: tuple[str, str]) -> None:
    quantizers = fit_model(llama, Scheme.parse("nuq4-5%", key_axis=axes[0], value_axis=axes[1]))
    tokens = make_tokens(2, 100)
    with simulated(llama, quantizers):
        expected = llama(input_ids=tokens, use_cache=False).logits
    with packed_attention(llama):
        cache = PackedCache(quantizers, llama.config, exact_chunk=False)
        parts = [llama(input_ids=part, past_key_values=cache).logits for part in tokens.split(30, dim=1)]
    error = (torch.cat(parts, dim=1) - expected).abs().amax(-1)
    assert error.median() < 2e-4


def test_a_cache_grows_out_of_a_first_page_of_any_size(llama, make_tokens, eight_bits) -> None:
    """A page of 10 blocks is dequantized in parts of 8 and 2, also when a further page follows."""
    tokens = make_tokens(1, 700)
    with packed_attention(llama):
        caches = [PackedCache(eight_bits, llama.config), PackedCache(eight_bits, llama.config, capacity=700)]
        first, second = (
            [llama(input_ids=part, past_key_values=cache).logits for part in tokens.split([600, 90, 10], dim=1)][-1]
            for cache in caches
        )
    assert [len(cache.layers[0].packed["key"].pages) for cache in caches] == [2, 1]
    assert torch.allclose(first, second, atol=1e-3)
