"""The digest of a model's weights: equal for one model however it is loaded, and another for others."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from gradients.loading import load_model
from gradients.weights import SAMPLE, _sample, weights_digest


def test_is_that_of_the_checkpoint_however_it_is_loaded(make_model, save_model, tmp_path) -> None:
    model = make_model("llama")
    expected = weights_digest(model)
    assert len(expected) == 16 and weights_digest(make_model("llama")) == expected
    whole = save_model(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards" / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    (tmp_path / "shards" / "tokenizer_config.json").write_bytes((whole / "tokenizer_config.json").read_bytes())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        for dtype in ("float32", "bfloat16"):
            assert load_model(str(tmp_path / folder), dtype, "cpu").weights == expected, (folder, dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_does_not_depend_on_the_dtype_a_half_checkpoint_is_loaded_in(stored: torch.dtype, make_model) -> None:
    model = make_model("llama")
    with torch.no_grad():  # some in and below the range of float16's subnormals
        model.lm_head.weight.mul_(torch.logspace(-9, 0, model.lm_head.weight.shape[1]))
    model = model.to(stored)
    digests = {weights_digest(model)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        digests.add(_as(model, dtype))
    assert len(digests) == 1


def _as(model: PreTrainedModel, dtype: torch.dtype) -> str:
    stored = model.dtype
    values = {name: value.clone() for name, value in model.state_dict().items()}
    digest = weights_digest(model.to(dtype))
    model.to(stored).load_state_dict(values)
    return digest


def test_is_another_for_other_weights(make_model) -> None:
    model, seen = make_model("llama"), set()
    seen.add(weights_digest(model))
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.05)
        seen.add(weights_digest(model))
    assert len(seen) == 4


def test_large_parameters_are_sampled_over_all_rows_and_columns() -> None:
    table = torch.arange(1.0, 512 * 512 + 1).view(512, 512)
    sample = _sample(table).float()
    assert SAMPLE / 2 < len(sample) <= SAMPLE
    chosen = torch.zeros(512 * 512)
    chosen[:: -(-(512 * 512) // SAMPLE) | 1] = 1
    assert chosen.view(512, 512).any(0).all() and chosen.view(512, 512).any(1).all()


def test_offloaded_parameters_count_like_others(make_model, save_model, tmp_path) -> None:
    model = make_model("llama")
    folder = save_model(model, tmp_path / "llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(places))
    loaded = load_model(str(folder), device_map=str(tmp_path / "map.json"))
    assert any(parameter.device.type == "meta" for parameter in loaded.model.parameters())
    assert loaded.weights == weights_digest(model)
    assert any(parameter.device.type == "meta" for parameter in loaded.model.parameters())
