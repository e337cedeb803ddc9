"""A packed cache in a file: bit for bit what it was, and refused wherever it does not belong."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.format.groups import GroupOrder
from deployment.format.order import ChannelOrder, uniform_order
from deployment.layer import PackedLayer
from deployment.text.pages import one_page
from deployment.text.saved import load_cache, quantizers_digest, save_cache
from gradients.checked import bytes_checksum, canonical_json, checksum, digest_of
from gradients.cli import UserError
from gradients.models import KINDS
from quant.artefact import load_quantizers
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS

SCHEMES = ["nuq3-1%", "nuq2", "int4-5%", "rdnuq2.4", "rdnuq2.4g1-4%", "nuq2-1%+fb"]


def fill(model: PreTrainedModel, cache: PackedCache, tokens: Tensor, chunk: int = 50, padding: int = 0) -> None:
    """Read tokens chunk by chunk; the first row begins with `padding`."""
    held = cache.get_seq_length()
    mask = torch.ones(len(tokens), held + tokens.shape[1], dtype=torch.int64)
    mask[0, :padding] = 0
    with packed_attention(model):
        for end in range(chunk, tokens.shape[1] + chunk, chunk):
            part = tokens[:, end - chunk : end]
            model(input_ids=part, attention_mask=mask[:, : held + end], past_key_values=cache)


def stored(cache: PackedCache) -> dict[str, Tensor]:
    """Every tensor of the cache, its pages joined."""
    found = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            blocks = -(-max(0, max(layer.lengths) - layer.sink_tokens) // BLOCK_TOKENS)
            for kind in KINDS:
                parts = {"sinks": layer.sinks[kind], **one_page(layer.packed[kind], blocks)}
                found |= {f"{number}.{kind}.{name}": part for name, part in parts.items()}
        else:
            found |= {f"{number}.key": layer.keys, f"{number}.value": layer.values}
    return found


def assert_same(one: PackedCache, other: PackedCache) -> None:
    first, second = stored(one), stored(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        if isinstance(mine, PackedLayer):
            assert mine.lengths == theirs.lengths and torch.equal(mine.stored, theirs.stored)
            keys = [torch.cat([part.key for part in side.stretches()], dim=2) for side in (mine, theirs)]
            assert torch.equal(*keys)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    shape: str, scheme: str, llama, wide, make_tokens, fit_model, tmp_path
) -> None:
    model = llama if shape == "narrow" else wide
    quantizers = fit_model(model, Scheme.parse(scheme))
    cache, tokens = PackedCache(quantizers, model.config), make_tokens(2, 130)
    fill(model, cache, tokens, padding=70)
    layer = cache.layers[0]
    assert isinstance(layer.packed["key"].order, ChannelOrder if shape == "narrow" or "g1" in scheme else GroupOrder)
    save_cache(tmp_path / "cache", cache, quantizers, model, tokens)

    saved = load_cache(tmp_path / "cache", quantizers, model)
    assert torch.equal(saved.tokens, tokens) and saved.lengths == [60, 130] and saved.messages is None
    assert saved.attention_mask.sum(-1).tolist() == [60, 130] and saved.attention_mask[0, 69:71].tolist() == [0, 1]
    restored = saved.restore(model)
    assert_same(cache, restored)

    more = make_tokens(2, 90, seed=3)
    mask = torch.cat([saved.attention_mask, torch.ones_like(more)], dim=1)
    with packed_attention(model):
        expected, got = (
            model(input_ids=more, attention_mask=mask, past_key_values=which).logits for which in (cache, restored)
        )
    assert torch.allclose(got, expected, atol=1e-5)
    assert [layer.lengths for layer in restored.layers] == [[150, 220]] * 2


def test_many_pages_and_kernels_room_become_one_page_without_room(llama, make_tokens, fit_model, tmp_path) -> None:
    quantizers, tokens = fit_model(llama, Scheme.parse("nuq3-5%")), make_tokens(1, 500)
    cache = PackedCache(quantizers, llama.config)
    for layer in cache.layers:  # pages of 2 blocks each
        layer.lazy_initialization(*[torch.empty(1, 2, 0, 12)] * 2)
    straight = PackedCache(quantizers, llama.config, capacity=500)
    for length in range(100, 501, 100):
        for packed in (packed for layer in cache.layers for packed in layer.packed.values()):
            packed.reserve(length, exactly=True)
        for either in (cache, straight):
            fill(llama, either, tokens[:, length - 100 : length])
    pages = cache.layers[0].packed["key"].pages
    assert len(pages) > 3
    for page in pages:
        page.outliers = page.outliers.with_room(7)
    save_cache(tmp_path / "cache", cache, quantizers, llama, tokens)
    held = load_file(tmp_path / "cache")
    page = straight.layers[0].packed["key"].pages[0]
    assert held["layers.0.key.words"].shape == page.words.shape
    assert held["layers.0.key.index"].shape == page.outliers.index.shape
    restored = load_cache(tmp_path / "cache", quantizers, llama).restore(llama, capacity=500)
    assert_same(cache, restored)
    assert len(restored.layers[0].packed["key"].pages) == 1 and restored.get_max_length() == 500
    pairs = zip(restored.layers[0].tensors(), straight.layers[0].tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)  # further layers saw sums in another order


@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize("tokens", [2, 6, 7], ids=["within the sinks", "one packed", "all packed"])
def test_texts_shorter_than_a_block_are_restored(
    tokens: int, capacity: int | None, llama, make_tokens, fit_model, tmp_path
) -> None:
    quantizers = fit_model(llama, Scheme.parse("nuq3-5%", sink_tokens=5))
    cache, text = PackedCache(quantizers, llama.config), make_tokens(1, tokens)
    fill(llama, cache, text)
    save_cache(tmp_path / "cache", cache, quantizers, llama, text)
    restored = load_cache(tmp_path / "cache", quantizers, llama).restore(llama, capacity)
    assert [layer.lengths for layer in restored.layers] == [[tokens]] * 2
    if capacity is None:
        assert_same(cache, restored)
    more = make_tokens(1, 20, seed=2)
    fill(llama, cache, more)
    fill(llama, restored, more)
    assert_same(cache, restored)


def test_sliding_windows_are_saved_as_they_are(make_model, make_tokens, fit_model, tmp_path) -> None:
    model = make_model("gemma3")
    quantizers, tokens = fit_model(model, Scheme.parse("nuq3-5%")), make_tokens(1, 60)
    cache = PackedCache(quantizers, model.config)
    fill(model, cache, tokens)
    save_cache(tmp_path / "cache", cache, quantizers, model, tokens)
    restored = load_cache(tmp_path / "cache", quantizers, model).restore(model)
    assert_same(cache, restored)
    more = make_tokens(1, 9, seed=2)
    with packed_attention(model):
        expected, got = (model(input_ids=more, past_key_values=which) for which in (cache, restored))
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("capacity", [None, pytest.param(140, marks=pytest.mark.slow)])
def test_kernels_go_on_with_a_loaded_cache(capacity: int | None, wide, make_tokens, fit_model, tmp_path) -> None:
    quantizers, tokens = fit_model(wide, Scheme.parse("nuq3-5%")), make_tokens(1, 128)
    cache, more = PackedCache(quantizers, wide.config), make_tokens(1, 4, seed=2)
    fill(wide, cache, tokens)
    save_cache(tmp_path / "cache", cache, quantizers, wide, tokens)
    saved = load_cache(tmp_path / "cache", quantizers, wide)
    logits = {}
    for backend in ("torch", "triton"):  # the second token begins the third block
        restored = saved.restore(wide, capacity)
        with packed_attention(wide, backend), torch.inference_mode():
            parts = [wide(input_ids=part, past_key_values=restored).logits for part in more.split(1, dim=1)]
        assert [layer.stored.tolist() for layer in restored.layers] == [[132]] * 2
        logits[backend] = torch.cat(parts, dim=1)
    assert torch.allclose(logits["triton"], logits["torch"], atol=2e-3)


@pytest.fixture
def saved_file(llama, quantizers, make_tokens, tmp_path) -> Path:
    cache, tokens = PackedCache(quantizers, llama.config), make_tokens(1, 80)
    fill(llama, cache, tokens)
    save_cache(tmp_path / "cache", cache, quantizers, llama, tokens)
    return tmp_path / "cache"


def rewrite(path: Path, change: Callable[[dict, dict[str, Tensor]], object], sealed: bool = False) -> None:
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["kvquant_cache"])
    tensors = load_file(path)
    change(content, tensors)
    if sealed:
        content["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        content["digest"] = digest_of(content)
    save_file(tensors, path, metadata={"kvquant_cache": canonical_json(content)})


def flip(_content: dict, tensors: dict[str, Tensor]) -> None:
    tensors["layers.1.value.words"][0, 0, 0] ^= 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "was altered.*tensor layers.1.value.words is another"),
        (lambda content, _: content.pop("slots"), "was altered"),
        (lambda _, tensors: tensors.pop("layers.0.key.ends"), "layers.0.key.ends"),
    ],
    ids=["altered", "metadata", "tensor missing"],
)
def test_a_file_that_is_not_whole_is_refused(
    damage: Callable[[dict, dict[str, Tensor]], object], message: str, saved_file, quantizers, llama
) -> None:
    """Of the ways that all kinds of checked files share (test_quant_artefact.py), one each."""
    rewrite(saved_file, damage)
    with pytest.raises(UserError, match=message) as error:
        load_cache(saved_file, quantizers, llama)
    assert repr(str(saved_file)) in str(error.value) and "--save-cache" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, _: content.update(slots=0), "slots 0 of 80"),
        (lambda content, _: content.update(slots=10**9), "slots 1000000000 of 80"),
        (lambda content, _: content.update(slots=True), "slots True"),
        (lambda content, _: content.update(slots=79), "rows of"),
        (lambda content, _: content.update(messages="hello"), "messages 'hello'"),
        (lambda content, _: content.update(messages=[{"role": 1}]), "messages"),
        (lambda content, _: content.update(weights=None), "weights None"),
        (lambda _, t: t.update({"layers.0.key.words": t["layers.0.key.words"].float()}), "dtype float32"),
        (lambda _, t: t.update({"layers.0.key.words": t["layers.0.key.words"].to(torch.uint32)}), "dtype U32"),
        (lambda _, t: t.update({"layers.0.key.sinks": t["layers.0.key.sinks"].float()}), "dtype float32"),
        (lambda _, t: t.pop("lengths"), "lacks tensor lengths"),
    ],
)
def test_what_cannot_be_is_refused_though_the_digest_is_right(
    change: Callable[[dict, dict[str, Tensor]], object], message: str, saved_file, quantizers, llama
) -> None:
    rewrite(saved_file, change, sealed=True)
    with pytest.raises(UserError, match=message):
        load_cache(saved_file, quantizers, llama)


def test_a_cache_of_other_weights_is_refused(saved_file, quantizers, make_model) -> None:
    other = make_model("llama")
    assert load_cache(saved_file, quantizers, other).slots == 80
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.1)
    with pytest.raises(UserError, match="made with another model: other weights, digest .* give --model that one"):
        load_cache(saved_file, quantizers, other)


def test_a_cache_of_the_version_before_is_refused(saved_file, quantizers, llama) -> None:
    def as_schema_1(content: dict, tensors: dict[str, Tensor]) -> None:
        content |= {"schema": 1, "checksums": {name: bytes_checksum(tensor) for name, tensor in tensors.items()}}
        for name in ("digest", "weights"):
            del content[name]

    rewrite(saved_file, as_schema_1)
    with pytest.raises(UserError, match="older version, whose codes lie in another order; read the text again"):
        load_cache(saved_file, quantizers, llama)


def test_tensors_that_do_not_fit_are_refused(saved_file, quantizers, llama) -> None:
    saved = load_cache(saved_file, quantizers, llama)
    for name, tensor in (("layers.1.key.words", torch.zeros(1, 2, 3)), ("layers.1.key.ends", torch.zeros(1, 2, 5))):
        with pytest.raises(UserError, match="layer 1 is damaged"):
            replace(saved, tensors=saved.tensors | {name: tensor.int()}).restore(llama)


def test_other_quantizers_and_models_are_refused(
    saved_file, quantizers, quantizers_file, llama, fit_model, make_model
) -> None:
    for other in (fit_model(llama, Scheme.parse("nuq4-1%")), fit_model(llama, Scheme.parse("nuq3-1%"))):
        with pytest.raises(UserError, match=r"other quantizers, nuq3-1% \(.*give --quantizers the file"):
            load_cache(saved_file, other, llama)
    with pytest.raises(UserError, match="another model: architecture"):
        load_cache(saved_file, quantizers, make_model("qwen2"))
    again = load_quantizers(quantizers_file)  # the same numbers by another way
    assert quantizers_digest(again) == quantizers_digest(quantizers)
    assert load_cache(saved_file, again, llama).slots == 80


def test_an_empty_cache_and_one_without_quantizers_cannot_be_saved(llama, quantizers, make_tokens, tmp_path) -> None:
    tokens = make_tokens(1, 8)
    with pytest.raises(UserError, match="is empty"):
        save_cache(tmp_path / "cache", PackedCache(quantizers, llama.config), quantizers, llama, tokens)
    native = PackedCache(None, llama.config)
    fill(llama, native, tokens)
    with pytest.raises(UserError, match="layer 0 is a DynamicLayer"):
        save_cache(tmp_path / "cache", native, quantizers, llama, tokens)
    assert not (tmp_path / "cache").exists()


def test_what_could_not_be_loaded_as_it_is_cannot_be_saved(llama, quantizers, make_tokens, fit_model, tmp_path) -> None:
    tokens, cache = make_tokens(1, 40), PackedCache(quantizers, llama.config)
    fill(llama, cache, tokens)
    path = tmp_path / "cache"
    for text in (tokens[:, :20], tokens.repeat(2, 1), tokens[0], tokens.float()):
        with pytest.raises(UserError, match="holds 1 x 40 tokens, the text is"):
            save_cache(path, cache, quantizers, llama, text)
    others = (fit_model(llama, Scheme.parse("nf3-1%")), quantizers.with_exact(sink_tokens=5))
    for other in others:
        with pytest.raises(UserError, match=r"packed with other quantizers \(nuq3-1%.*, 1 sinks\) than those given"):
            save_cache(path, cache, other, llama, tokens)
    cache.crop(-40)
    with pytest.raises(UserError, match="is empty"):
        save_cache(path, cache, quantizers, llama, tokens)
    assert not path.exists()


def test_orders_are_those_of_the_schema() -> None:
    """If this fails, codes lie elsewhere in their words than in files already written: raise SCHEMA in saved.py."""
    codes = torch.arange(BLOCK_TOKENS * 128).view(1, BLOCK_TOKENS, 128) * 2654435761 >> 7
    words = [
        uniform_order(bits, 2, 64, kind, 32, torch.device("cpu")).pack((codes % 2**bits).to(torch.uint8))
        for bits in (2, 3, 4)
        for kind in KINDS
    ]
    widths = torch.tensor([[4, 0, 3, 1], [2, 6, 5, 2]])
    words += [GroupOrder(widths, torch.stack([torch.arange(64)] * 2), "value").pack((codes % 2).to(torch.uint8))]
    words += [ChannelOrder(torch.full((128,), bits)).pack((codes % 2**bits).to(torch.uint8)) for bits in range(1, 7)]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in words)).hexdigest()
    assert digest.startswith("f2676e579cdabf17")


def test_what_is_exact_is_restored_in_the_dtype_of_the_model(make_model, fit_model, make_tokens, tmp_path) -> None:
    """Layers with sliding windows, and recent windows: a model in bfloat16 goes on where one in float32 was."""
    model = make_model("gemma3")
    quantizers = fit_model(model, Scheme.parse("nuq3-1%", residual_tokens=12))
    cache, tokens = PackedCache(quantizers, model.config), make_tokens(1, 70)
    fill(model, cache, tokens)
    save_cache(tmp_path / "cache", cache, quantizers, model, tokens)
    model.to(torch.bfloat16)
    restored = load_cache(tmp_path / "cache", quantizers, model).restore(model)
    fill(model, restored, make_tokens(1, 20, seed=1), chunk=1)
    exact = [
        x
        for layer in restored.layers
        for x in (layer.window.recent.values() if hasattr(layer, "window") else [layer.keys])
    ]
    assert {x.dtype for x in exact} == {torch.bfloat16}
