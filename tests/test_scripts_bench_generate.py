"""`python -m scripts.bench.generate` on a tiny model, and the caches it fills."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from deployment.attention import packed_attention
from deployment.layer import PackedLayer
from deployment.measure.filled import filled_cache, synthetic_artefact
from gradients.cli import UserError
from quant.results import read_rows
from quant.scheme import Scheme
from scripts.bench.fp16_caches import attending, full_cache, stored_bytes
from scripts.bench.generate import MODES, main
from scripts.bench.random_model import random_model
from scripts.checks.small_steps import relative_error

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    dtype=torch.float32,
)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return random_model(CONFIG, ["cpu"], torch.float32)


def test_everything_asked_for_becomes_a_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scripts.bench.whole_model._STEPS", (1, 2))
    results = tmp_path / "rows.jsonl"
    arguments = ["--shape", "tiny", "--contexts", "70", "--caches", "fp16", "nuq3-1%", "hqq4", "--device", "cpu"]
    rows = main([*arguments, "--chunks", "8", "--prefill-context", "70", "--results", str(results)])["rows"]
    kinds = [(row["op"], row["cache"], row.get("mode") or row.get("chunk")) for row in rows]
    steps = [("decode", cache, mode) for cache in ("fp16", "nuq3-1%") for mode in MODES]
    prefill = [("prefill", cache, 8) for cache in ("fp16", "nuq3-1%")]
    assert [kind for kind in kinds if kind[1] != "hqq4"] == [*steps, *prefill]
    eager = {row["cache"]: row for row in rows if row.get("mode") == "eager" and "error" not in row}
    assert sum("tokens_per_second" in row for row in rows if row.get("mode") == "generate") == 2
    assert all(row["tokens_per_second"] > 0 and row["filled"] == "synthetic" for row in eager.values())
    assert eager["nuq3-1%"]["cache_bytes"] < eager["fp16"]["cache_bytes"]  # float32, and room
    assert all("graphs are recorded on CUDA" in row["error"] for row in rows if row.get("mode") == "graph")
    assert len(read_rows(results)) == len(rows) and read_rows(results)[0]["commit"]


def test_what_does_not_fit_is_a_row(monkeypatch, capsys) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 137 GiB")

    monkeypatch.setattr("scripts.bench.whole_model.full_cache", full)
    arguments = ["--shape", "tiny", "--contexts", "70", "--caches", "fp16", "fp16-static", "--device", "cpu"]
    rows = main([*arguments, "--chunks"])["rows"]
    assert [(row["cache"], row["error"]) for row in rows] == [
        ("fp16", "out of memory"),
        ("fp16-static", "out of memory"),
    ]
    assert main([*arguments, "--seconds", "-1"])["rows"] == []
    assert "left out   decode fp16-static at 70: no time left" in capsys.readouterr().out
    with pytest.raises(UserError, match="'nuq' is none of fp16, fp16-dynamic"):
        main(["--caches", "nuq"])


@pytest.mark.parametrize("scheme", ["nuq3-2%", "nuq2", "rdnuq2.4"])
def test_every_layer_is_full(scheme: str) -> None:
    cache = filled_cache(synthetic_artefact(Scheme.parse(scheme), CONFIG), CONFIG, 150, 200, CPU)
    assert cache.get_seq_length() == 150
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer) and layer.lengths == [150] == layer.stored.tolist()
        for packed in layer.packed.values():
            (page,) = packed.pages
            held = packed.read(page, 0, 3)[0, :, :149]
            assert min(float(part.std()) for part in held.split(32, dim=1)) > 0.7
            if page.outliers is not None:
                share = float(page.outliers.counts().sum()) / (149 * 32)
                assert page.outliers.index.numel() == int(page.outliers.counts().sum())  # no room
                assert layer.packed["key"] is not packed or share == pytest.approx(0.02, rel=0.4)


def test_a_filled_cache_is_decoded_from(tiny) -> None:
    cache = filled_cache(synthetic_artefact(Scheme.parse("nuq3-1%"), CONFIG), CONFIG, 100, 110, CPU)
    with torch.inference_mode(), packed_attention(tiny):
        logits = tiny(input_ids=torch.tensor([[3]]), past_key_values=cache).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 101


@pytest.mark.parametrize("name", ["fp16", "fp16-static"])
@pytest.mark.parametrize("new", [1, 5])
def test_full_caches_attend_as_the_dynamic_one(tiny, name: str, new: int) -> None:
    ids = torch.randint(50, (1, new), generator=torch.Generator().manual_seed(1))
    logits = []
    for each in ("fp16-dynamic", name):
        cache = full_cache(each, CONFIG, 40, 50, CPU)
        with torch.inference_mode(), attending(tiny, each):
            logits.append(tiny(input_ids=ids, past_key_values=cache).logits)
    assert relative_error(logits[1], logits[0]) < 1e-4
    assert tiny.config._attn_implementation == "sdpa"


def test_bytes_are_counted_once() -> None:
    cache = DynamicCache(config=CONFIG)
    one = torch.zeros(1, 2, 10, 16)
    for layer in cache.layers:
        layer.update(one, one)
    assert stored_bytes(full_cache("fp16", CONFIG, 40, 50, CPU)) == 2 * 2 * 2 * 50 * 16 * 4
    assert stored_bytes(cache) == 2 * 2 * one.nbytes
