"""A model spread over devices computes what it computes on one, and its packed cache with it.

Without a second GPU the other place is the disk, from where accelerate fetches a module's weights for its forward. What two
GPUs alone could show is tested piece by piece: where tables come from, what is remembered, which device is current.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import deployment.step.attend
from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.generate import main as generate_main
from deployment.rope import Rope
from deployment.step.asked import Step
from deployment.text.saved import load_cache, save_cache
from gradients.cli import UserError
from gradients.fisher import record_window
from gradients.loading import LoadedModel, load_model
from gradients.models import decoder
from gradients.placement import Placement, read_device_map
from gradients.rope import rope_tables
from quant.artefact import Quantizers
from quant.evaluate import evaluate

SPLIT = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def map_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "split.json"
    path.write_text(json.dumps(SPLIT))
    return path


@pytest.fixture(scope="module")
def sharded(llama_folder, map_file) -> LoadedModel:
    """The tiny Llama, its first layer in memory and its second on disk."""
    return load_model(str(llama_folder), device_map=str(map_file))


def generated(model: PreTrainedModel, quantizers: Quantizers, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tokens after a left-padded batch that is read in chunks, and everything in the cache."""
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    cache = PackedCache(quantizers, model.config)
    with torch.inference_mode(), packed_attention(model):
        output = model.generate(
            tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=6,
            prefill_chunk_size=32,
            do_sample=False,
        )
    return output, cache.tensors()


def test_the_model_is_really_split(sharded) -> None:
    places = [next(layer.parameters()).device.type for layer in decoder(sharded.model).layers]
    assert places == ["cpu", "meta"]
    assert sharded.model.get_input_embeddings().weight.device.type == "meta"
    assert sharded.device == torch.device("cpu") and sharded.model.dtype == torch.float32


def test_sharded_generation_equals_unsharded(sharded, llama, quantizers, make_tokens) -> None:
    tokens = make_tokens(2, 70, seed=3)
    whole, whole_cache = generated(llama, quantizers, tokens)
    split, split_cache = generated(sharded.model, quantizers, tokens)
    assert torch.equal(split, whole) and whole.shape[1] > 70
    assert len(split_cache) == len(whole_cache)
    assert all(torch.equal(mine, other) for mine, other in zip(split_cache, whole_cache, strict=True))


def test_recording_and_simulation_are_the_same(sharded, llama, quantizers, make_tokens) -> None:
    window = make_tokens(33, seed=4)
    split, whole = record_window(sharded.model, window), record_window(llama, window)
    assert split.keys() == whole.keys() and all(torch.equal(split[name], whole[name]) for name in whole)
    assert all(
        torch.equal(*tables) for tables in zip(rope_tables(sharded.model, 9), rope_tables(llama, 9), strict=True)
    )
    results = [evaluate(model, window[None], quantizers) for model in (sharded.model, llama)]
    for result in results:
        del result["tokens_per_second"]
    assert results[0] == results[1]


def test_a_saved_cache_returns_to_where_its_layers_compute(sharded, llama, quantizers, make_tokens, tmp_path) -> None:
    tokens, cache = make_tokens(1, 40), PackedCache(quantizers, llama.config)
    with torch.inference_mode(), packed_attention(llama):
        llama(input_ids=tokens, past_key_values=cache)
    save_cache(tmp_path / "cache", cache, quantizers, llama, tokens)
    logits = []
    for model in (sharded.model, llama):
        restored = load_cache(tmp_path / "cache", quantizers, model).restore(model)
        with torch.inference_mode(), packed_attention(model):
            logits.append(model(input_ids=tokens[:, :1], past_key_values=restored).logits)
    # weights fetched from a file are aligned otherwise, and a product with one row then adds up in another order
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_the_command_takes_a_map(llama_folder, quantizers_file, map_file) -> None:
    arguments = ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--prompt", "of the key of"]
    arguments += ["--max-new-tokens", "5"]
    split = generate_main([*arguments, "--device-map", str(map_file)])
    assert split["text"] == generate_main([*arguments, "--device", "cpu"])["text"]


def test_tables_come_to_where_they_are_asked_for(llama) -> None:
    """accelerate's hook lets the rotary module answer from its own device."""
    rotary = decoder(llama).rotary_emb

    class Elsewhere(nn.Module):
        rope_type = rotary.rope_type

        def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return (torch.zeros(*positions.shape, 12, device="cpu"),) * 2

    cos, sin = Rope(Elsewhere()).tables(torch.zeros(1, 3, dtype=torch.int64, device="meta"), 3)
    assert (cos.device.type, sin.device.type, cos.shape) == ("meta", "meta", (1, 3, 12))


def test_every_device_keeps_its_rotary_tables(llama) -> None:
    """Else each would make its own anew whenever a step comes round to it, and graphs would lose theirs."""
    rope = Rope(decoder(llama).rotary_emb)
    first = rope.for_kernels(5, 12, torch.device("cpu"))
    assert rope.for_kernels(6, 12, torch.device("meta")).turn.device.type == "meta"
    assert rope.for_kernels(7, 12, torch.device("cpu")) is first


def test_kernels_run_with_the_layers_device_current(llama, quantizers, make_tokens, monkeypatch) -> None:
    inside: list[torch.device] = []
    attended: list[list[torch.device]] = []

    @contextmanager
    def watched(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def attend(step: Step, _padding: object) -> Tensor:
        attended.append(list(inside))
        step.layer.withdraw()
        step.layer.slots += step.query.shape[2]  # as if it were stored
        return step.query.transpose(1, 2)

    monkeypatch.setattr(deployment.step.attend, "current", watched)
    monkeypatch.setattr(deployment.step.attend, "attend_and_store", attend)
    with torch.inference_mode(), packed_attention(llama, "triton"):
        llama(input_ids=make_tokens(1, 2), past_key_values=PackedCache(quantizers, llama.config))
    assert attended == [[torch.device("cpu")]] * 2


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_maps_name_accelerators_that_are_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    places = {"model.embed_tokens": 0, "model.layers.0": "cuda:1", "model.layers": 1, "model.norm": "cpu"}
    assert read_device_map(write(tmp_path / "good.json", places)) == places
    for place in (2, -1, "cuda:2", "meta", "elsewhere", True, None, 1.0):
        with pytest.raises(UserError, match="of 'lm_head' is not there; use cpu, disk, or one of 2 accelerators"):
            read_device_map(write(tmp_path / "bad.json", places | {"lm_head": place}))


def test_a_split_over_accelerators_keeps_the_checkpoints_dtype(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    places = {"model.layers.0": 0, "": "cpu"}
    assert Placement.of("auto", write(tmp_path / "map.json", places)) == Placement(places, on_cpu=False)
    assert Placement.of("auto", write(tmp_path / "map.json", SPLIT)) == Placement(dict(SPLIT), on_cpu=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is no JSON object"),
        ({}, "is no JSON object"),
        ({"model.layers.0": "cpu", "model.layers.1": "disk"}, "does not give any device for .*model.norm.weight"),
    ],
)
def test_maps_that_do_not_fit_the_model_are_refused(llama_folder, tmp_path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(str(llama_folder), device_map=write(tmp_path / "map.json", content))


def test_contradicting_and_unreadable_maps_are_refused(llama_folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="--device cpu and --device-map auto contradict each other"):
        load_model(str(llama_folder), device="cpu", device_map="auto")
    with pytest.raises(UserError, match="'evenly' cannot be read .* use auto, balanced"):
        load_model(str(llama_folder), device_map="evenly")
    (tmp_path / "map.json").write_text("{")
    with pytest.raises(UserError, match=r"map.json' cannot be read"):
        load_model(str(llama_folder), device_map=str(tmp_path / "map.json"))
