"""`python -m scripts.bench.sharded`, and the caches of blocks and models of random weights it is run on."""

from pathlib import Path

import pytest
import torch

from deployment.layer import PackedLayer
from deployment.measure.filled import fill_with_blocks
from deployment.measure.synthetic import Shape, make_case, synthetic_quantizers
from deployment.rope import Rope
from deployment.step.append import append_with_kernels
from deployment.step.attend import attend_with_torch
from deployment.step.dispatch import attend
from deployment.step.recount import recount
from gradients.cli import UserError
from gradients.loading import load_model
from gradients.models import KINDS
from quant.results import read_rows
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS
from scripts.bench import random_model
from scripts.bench.random_model import config_of
from scripts.bench.sharded import add_equality, largest, main
from scripts.bench.sharded_decoding import Request, Sharded, rounded_context

SHAPE = Shape(heads=4, kv_heads=2, head_dim=64)
CPU = torch.device("cpu")


def filled(scheme: str, blocks: int, capacity: int, shape: Shape = SHAPE) -> PackedLayer:
    parsed = Scheme.parse(scheme)
    layer = PackedLayer(*synthetic_quantizers(parsed, shape), parsed.sink_tokens, capacity)
    fill_with_blocks(layer, shape, blocks, CPU, seed=3)
    return layer


@pytest.mark.parametrize("scheme", ["nuq3-1%", "nuq2", "rdnuq3.4"])
def test_blocks_repeat_what_was_encoded(scheme: str) -> None:
    layer = filled(
        scheme, 37, capacity=40 * BLOCK_TOKENS
    )  # 16 blocks are a period: indices of outliers span 1024 tokens
    period = max(8, layer.packed["key"].span // BLOCK_TOKENS) * BLOCK_TOKENS
    packed = {kind: layer.packed[kind].read(layer.packed[kind].pages[0], 0, 37) for kind in KINDS}
    drawn = torch.Generator().manual_seed(3)
    for kind in KINDS:
        tokens = torch.randn(1, 2, layer.sink_tokens + period, 64, generator=drawn).half()
        quantizer, dense = layer.packed[kind].quantizer, packed[kind]
        flat = tokens[:, :, layer.sink_tokens :].transpose(1, 2).flatten(2)
        expected = quantizer.decode(quantizer.encode(flat)).unflatten(-1, (2, 64)).transpose(1, 2)
        torch.testing.assert_close(dense[:, :, :period], expected.float())
        for start in range(period, 37 * BLOCK_TOKENS, period):
            part = dense[:, :, start : start + period]
            assert torch.equal(part, dense[:, :, : part.shape[2]])
        torch.testing.assert_close(layer.sinks[kind], tokens[:, :, : layer.sink_tokens])
    assert layer.lengths == [37 * BLOCK_TOKENS + layer.sink_tokens] and layer.stored.tolist() == layer.lengths


def test_kernels_read_and_continue_what_was_filled(monkeypatch) -> None:
    monkeypatch.setenv("KVQUANT_BACKEND", "triton")
    shape = Shape(heads=2, kv_heads=1, head_dim=128)  # 8 blocks are a period
    layer = filled("nuq3-1%", 9, 10 * BLOCK_TOKENS, shape)
    before = [(page, page.outliers) for packed in layer.packed.values() for page in packed.pages]
    rope: Rope = make_case(shape, Scheme.parse("nuq3-1%"), 64, 1, CPU, 0).rope
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(1, 1, 1, 128, generator=generator).half() * 2 for _ in KINDS)
    query = torch.randn(1, 2, 1, 128, generator=generator).half()
    kernels = attend(layer, rope, query, (key, value), [0], 0.1)
    with_torch = attend_with_torch(layer, rope, query, (key, value), [0], 0.1, list(layer.lengths))
    torch.testing.assert_close(kernels.transpose(1, 2).float(), with_torch, rtol=2e-2, atol=2e-3)
    append_with_kernels(layer, key, value, [0])
    recount([layer])
    for kind, states in zip(KINDS, (key, value), strict=True):
        packed = layer.packed[kind]
        stored = packed.read(packed.pages[0], 9, 1)[0, 0, 0]
        torch.testing.assert_close(stored, packed.quantizer.decode(packed.quantizer.encode(states[0, 0]))[0].float())
    assert all(page.outliers.index is outliers.index for page, outliers in before), "streams have moved: no room"


def test_a_split_computes_what_one_device_computes(tmp_path) -> None:
    config = config_of("tiny")
    request = Request(Scheme.parse("nuq3-1%"), rounded_context(Scheme.parse("nuq3-1%"), 300), 6)
    for filled_with in ("synthetic", "prefill"):
        own = Request(**vars(request) | {"filled": filled_with, "prefill_chunk": 128})
        whole = Sharded(config, ["cpu"]).decode(own)
        split = Sharded(config, ["cpu", "disk"], folder=str(tmp_path / filled_with)).decode(own)
        other = Sharded(config, ["cpu"]).decode(Request(**vars(own) | {"seed": 1}))
        assert whole is not None and split is not None and other is not None
        assert whole.tokens == split.tokens != other.tokens
        assert len(set(whole.tokens)) > 1 and len(split.memory) == 2
        assert sum(part["held"] for part in split.memory) == whole.memory[0]["held"]
        assert filled_with == "prefill" or abs(whole.memory[0]["held_off_percent"]) < 1


def test_lack_of_memory_is_an_answer() -> None:
    sharded, scheme = Sharded(config_of("tiny", 1), ["cpu"]), Scheme.parse("nuq2")
    request = Request(scheme, rounded_context(scheme, 100), 3)
    decoded = sharded.decode(request)
    assert decoded is not None
    assert sharded.decode(request, decoded.memory[0]["held"]) is not None
    assert sharded.decode(request, decoded.memory[0]["held"] - 1) is None


@pytest.mark.parametrize(("first", "fits"), [(10**5, 10**5), (10**5, 98_000), (10**5, 70_000), (10**5, 20_000), (3, 2)])
def test_the_search_comes_close(first: int, fits: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= fits

    found = largest(holds, first, 16)
    assert found <= fits and fits - found <= max(1, first // 256) and asked[0] == first
    assert found in asked and len(asked) <= 16 and len(set(asked)) == len(asked)


def options(tmp_path: Path, *more: str) -> list[str]:
    return ["--shape", "tiny", "--layers", "2", "--new-tokens", "4", "--results", str(tmp_path / "rows"), *more]


def test_the_command_compares_with_one_device_and_the_plan(tmp_path) -> None:
    split = ["--devices", "cpu", "disk", "--against-one", "--contexts", "200", "longest", "--device-memory", "197MiB"]
    result = main(options(tmp_path, *split, "--attempts", "2"))
    rows = read_rows(tmp_path / "rows")
    assert [row["world_size"] for row in rows] == [1, 1, 2, 2] and len(result["rows"]) == 4
    for row in rows:
        assert row["filled"] == "synthetic" and row["fits"] and row["tokens_per_second"] > 0
        assert all(abs(part["held_off_percent"]) < 5 and part["held"] <= 5 << 20 for part in row["memory"])
        assert {"commit", "versions", "device", "seconds", "path"} <= row.keys()
    assert rows[2]["tokens_equal_one_device"] is True and rows[2]["context"] == 1 + 256
    assert rows[3]["context"] == rows[3]["planned_context"] > rows[1]["context"]
    rows[2]["tokens"][-1] += 1
    add_equality(rows)
    assert rows[2]["tokens_equal_one_device"] is False


def test_what_does_not_fit_is_a_row(tmp_path) -> None:
    main(options(tmp_path, "--devices", "cpu", "--contexts", "300", "--device-memory", "0.1MB"))
    (row,) = read_rows(tmp_path / "rows")
    assert row["fits"] is False and row["context"] == 1 + 320 and "tokens_per_second" not in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "cuda:97"], "device 'cuda:97' is not there; use cpu, disk, or one of"),
        (["--devices", "cpu", "cpu"], "devices cpu cpu name one of them twice"),
        (["--devices", "disk"], "device disk computes nothing and cannot be the first"),
        (["--contexts", "longest"], "give --device-memory"),
        (["--contexts", "long"], "'long' is not a positive number such as"),
        (["--new-tokens", "2"], "--new-tokens 2: the first 2 are not timed"),
        (["--layers", "5"], "--layers 5 exceeds the 4 of shape 'tiny'; lower it"),
        (["--contexts", "longest", "--device-memory", "1MB"], "not even one block fits"),
        (["--shape", "llama-9b"], "llama-9b"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(["--shape", "tiny", "--devices", "cpu", *arguments])


def test_a_random_model_can_be_loaded(tmp_path) -> None:
    result = random_model.main(["--shape", "tiny", "--layers", "1", "--device", "cpu", "--output", str(tmp_path)])
    loaded = load_model(str(tmp_path))
    assert loaded.model.num_parameters() == result["parameters"]
    assert loaded.tokenizer("é")["input_ids"] and loaded.model.config.num_hidden_layers == 1
    again = random_model.random_model(config_of("tiny", 1), ["cpu"], torch.bfloat16)
    for mine, other in zip(loaded.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other.float())
