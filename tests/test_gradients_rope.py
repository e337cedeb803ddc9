"""The rotary embedding from outside: the model's own function, and what rotating does to keys and their Fisher."""

import itertools

import pytest
import torch
from conftest import gaussian
from torch import Tensor
from transformers import PreTrainedModel

from gradients.models import cached_layers, decoder, kv_shape
from gradients.rope import rope_tables, rotate, rotate_squares

TOKENS = 33


def by_heads(x: Tensor, model: PreTrainedModel) -> Tensor:
    """`[B, S, C]` as `[B, G, S, D]`."""
    return x.unflatten(-1, kv_shape(model.config)).transpose(1, 2)


@pytest.fixture
def keys(model, captured_sites, rewriting_rotated_keys, make_tokens) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys `[B, G, S, D]` of two rows before and after the model's own rotary embedding, by layer."""
    after: dict[int, Tensor] = {}

    def watch(layer: int, key: Tensor) -> Tensor:
        after[layer] = key.clone()
        return key

    with captured_sites(model) as seen, rewriting_rotated_keys(model, watch), torch.no_grad():
        model(input_ids=make_tokens(2, TOKENS), use_cache=False)
    return {layer: by_heads(seen[layer, "key"], model) for layer in cached_layers(model.config)}, after


def test_rotating_is_what_the_model_does(model, keys) -> None:
    before, after = keys
    cos, sin = rope_tables(model, TOKENS)
    assert len(after) == len(decoder(model).layers)
    for layer, key in before.items():
        turned = rotate(key, cos[None], sin[None])
        assert torch.allclose(turned, after[layer], rtol=1e-5, atol=1e-5), layer
        assert not torch.allclose(key, after[layer], atol=0.1)


def test_gemmas_tables_are_those_of_the_layers_that_are_cached(make_model) -> None:
    """Its sliding layers turn with another base frequency."""
    model = make_model("gemma3")
    positions = torch.arange(TOKENS)[None]
    full, sliding = (
        decoder(model).rotary_emb(torch.empty(0), positions, layer_type=kind)[0][0]
        for kind in ("full_attention", "sliding_attention")
    )
    cos, _ = rope_tables(model, TOKENS)
    assert torch.equal(cos, full)
    assert not torch.allclose(cos, sliding, atol=0.1)


def test_pairs_turn_by_hand() -> None:
    """Channels 0 and 2, 1 and 3 are pairs; the last channel is beyond the rotary dimension."""
    angle = torch.tensor([0.3, 1.1])
    cos, sin = angle.cos().repeat(2)[None, None], angle.sin().repeat(2)[None, None]
    x = torch.tensor([1.0, 2.0, -3.0, 0.5, 7.0])
    turned = rotate(x[None, None, None], cos, sin)[0, 0, 0]
    whirl = torch.polar(torch.ones(2), angle) * torch.complex(x[:2], x[2:4])
    assert torch.allclose(turned, torch.cat([whirl.real, whirl.imag, x[4:]]), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-yarn-mha", "phi3-partial", "gemma3"])
def test_rotated_squares_are_the_expectation(name: str, make_model) -> None:
    """If both signs of each half of a pair are equally likely, the mean over all four is exact.

    Gradients meet the inverse of what keys meet: attention scaling divides them.
    """
    model = make_model(name)
    cos, sin = (table[None] for table in rope_tables(model, TOKENS))
    half = cos.shape[-1] // 2
    scaling = cos.square() + sin.square()
    x = gaussian(2, 3, TOKENS, kv_shape(model.config)[1])
    squares = []
    for one, other in itertools.product([1.0, -1.0], repeat=2):
        signed = x.clone()
        signed[..., :half] *= one
        signed[..., half : 2 * half] *= other
        squares.append(rotate(signed, cos / scaling, sin / scaling).square())
    expected = torch.stack(squares).mean(0)
    turned = rotate_squares(x.square(), cos, sin)
    assert torch.allclose(turned, expected, rtol=1e-4, atol=1e-5)
    assert (turned >= 0).all()
    assert not torch.allclose(turned, squares[0], atol=0.1)  # a single draw is not its mean
