"""Decode steps that are recorded once and replayed: on a CPU with a recorder that runs the step again, as it was then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache, PackedLayer
from deployment.generate import main as generate_main
from deployment.graphed import Recorder, Steps, graphed
from gradients.cli import UserError
from quant.artefact import Quantizers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="what replaces a CUDA graph where there is none")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, list[PackedCache]]:
    """A recorder of steps of the torch path, and where it finds the cache.

    As with a graph, what the host counts is none of a replay's business, and nothing is stored while recording.
    """
    caches: list[PackedCache] = []
    monkeypatch.setattr("deployment.graphed.obstacle", lambda *_: None)
    monkeypatch.setattr(PackedLayer, "reserve", lambda *_: None)

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        layers = caches[-1].layers
        logits = torch.zeros(len(layers[0].lengths), 1, 259)
        for layer in layers:
            layer.slots += 1

        def replay() -> None:
            before = [(layer.lengths, layer.slots, layer.stored) for layer in layers]
            logits.copy_(run())
            for layer, (lengths, slots, stored) in zip(layers, before, strict=True):
                stored.copy_(layer.stored)
                layer.lengths, layer.slots, layer.stored = lengths, slots, stored

        return replay, logits

    return record, caches


def generated(model: PreTrainedModel, cache: PackedCache, ids: Tensor, new: int, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, eos_token_id=None, pad_token_id=2, **options)


@on_cpu
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("sample", [False, True])
def test_recorded_steps_generate_the_same(
    llama: PreTrainedModel, quantizers: Quantizers, make_tokens: Any, recorder: Any, capacity: int | None, sample: bool
) -> None:
    ids = make_tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"do_sample": sample, "attention_mask": mask}
    plain, cache = (PackedCache(quantizers, llama.config, capacity) for _ in range(2))
    recorder[1].append(cache)
    with packed_attention(llama, "torch"):
        expected = generated(llama, plain, ids, 9, **options)
        with graphed(llama, cache, steps=3, recorder=recorder[0]) as steps:
            assert torch.equal(generated(llama, cache, ids, 9, **options), expected)
    assert steps.replays == 7 and 1 <= steps.recordings <= 3  # the prompt gives a token, and so does the first step
    assert "forward" not in vars(llama)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == other.lengths == layer.stored.tolist() and layer.slots == other.slots == 29


@on_cpu
def test_what_happens_to_the_cache_in_between_is_noticed(
    llama: PreTrainedModel, quantizers: Quantizers, make_tokens: Any, recorder: Any
) -> None:
    ids, more = make_tokens(1, 12), make_tokens(1, 30, seed=1)
    plain, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    recorder[1].append(cache)

    def talk(past: PackedCache, steps: Steps | None) -> list[Tensor]:
        answers = [generated(llama, past, ids, 5)]
        past.crop(-2)
        seen = 0 if steps is None else steps.recordings
        answers.append(generated(llama, past, torch.cat([answers[0][:, :-3], more[:, :1]], dim=1), 4))
        assert steps is None or steps.recordings > seen
        answers.append(generated(llama, past, torch.cat([answers[1], more], dim=1), 4))
        return answers

    with torch.inference_mode(), packed_attention(llama, "torch"):
        expected = talk(plain, None)
        with graphed(llama, cache, recorder=recorder[0]) as steps:
            answers = talk(cache, steps)
    assert all(torch.equal(answer, other) for answer, other in zip(answers, expected, strict=True))


@on_cpu
def test_a_failed_recording_leaves_everything_as_it_was(
    llama: PreTrainedModel, quantizers: Quantizers, make_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployment.graphed.obstacle", lambda *_: None)
    ids, plain, cache = make_tokens(1, 12), *(PackedCache(quantizers, llama.config) for _ in range(2))
    with packed_attention(llama):
        expected = generated(llama, plain, ids, 4)

        def fails(_run: Callable[[], Tensor]) -> Any:
            for layer in cache.layers:
                layer.lengths, layer.slots, layer._handed_on = [layer.lengths[0] + 1], layer.slots + 1, True
            raise RuntimeError("not permitted\nwhile recording")

        with (
            graphed(llama, cache, recorder=fails),
            pytest.warns(UserWarning, match=r"recording failed \(not permitted\)"),
        ):
            assert torch.equal(generated(llama, cache, ids, 4), expected)
    assert cache.layers[0].lengths == plain.layers[0].lengths


@on_cpu
def test_where_nothing_can_be_recorded_it_is_said(
    llama_folder: Any, quantizers_file: Any, llama: PreTrainedModel, quantizers: Quantizers
) -> None:
    arguments = ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--device", "cpu"]
    arguments += ["--prompt", "The cache is", "--max-new-tokens", "5"]
    expected = generate_main(arguments)
    with pytest.warns(UserWarning, match="without a CUDA graph: the model is on cpu"):
        assert generate_main([*arguments, "--cuda-graph"])["text"] == expected["text"]
    with pytest.raises(UserError, match="--beams 2 reorders"):
        generate_main([*arguments, "--cuda-graph", "--beams", "2"])
    with pytest.raises(UserError, match="steps=0"), graphed(llama, PackedCache(quantizers, llama.config), steps=0):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")
@pytest.mark.parametrize("sample", [False, True])
def test_on_a_gpu_graphs_generate_the_same(
    make_model: Any, quantizers: Quantizers, make_tokens: Any, sample: bool
) -> None:
    model, ids = make_model("llama").to(DEVICE), make_tokens(2, 60).to(DEVICE)
    plain, cache = (PackedCache(quantizers, model.config) for _ in range(2))
    with packed_attention(model):
        expected = generated(model, plain, ids, 40, do_sample=sample)
        with graphed(model, cache, steps=8) as steps:
            text = generated(model, cache, ids, 40, do_sample=sample)
    assert steps.obstacle is None and steps.replays == 38
    assert (text == expected).float().mean() > 0.9  # sums in another order may change a close choice, and all after it
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == other.lengths == layer.stored.tolist()
