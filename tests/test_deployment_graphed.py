"""Decode steps that are recorded once and replayed: on a CPU with a recorder that runs the step again, as it was then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorders import generated
from torch import Tensor

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.generate import main as generate_main
from deployment.step.graphed import _STEPS, graphed
from deployment.step.steps import Steps
from deployment.text.session import Session
from gradients.cli import UserError
from gradients.loading import LoadedModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="what replaces a CUDA graph where there is none")


@on_cpu
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize(("sample", "window"), [(False, 0), (True, 0), (False, 6), (True, 24)])
def test_recorded_steps_generate_the_same(
    llama, quantizers, make_tokens, recorder, capacity: int | None, sample: bool, window: int
) -> None:
    ids = make_tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"do_sample": sample, "attention_mask": mask}
    plain, cache = (PackedCache(quantizers, llama.config, capacity, residual_tokens=window) for _ in range(2))
    recorder.caches.append(cache)
    with packed_attention(llama, "torch"):
        expected = generated(llama, plain, ids, 9, **options)
        with graphed(llama, cache, steps=3, recorder=recorder) as steps:
            assert torch.equal(generated(llama, cache, ids, 9, **options), expected)
            other = PackedCache(quantizers, llama.config, capacity, residual_tokens=window)  # is not recorded
            assert torch.equal(generated(llama, other, ids, 9, **options), expected)
    assert steps.replays == 7 and 1 <= steps.recordings <= 3  # the prompt gives a token, and so does the first step
    assert "forward" not in vars(llama)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == other.lengths == layer.stored.tolist() and layer.slots == other.slots == 29


@on_cpu
@pytest.mark.parametrize("window", [0, 5])
def test_what_happens_to_the_cache_in_between_is_noticed(llama, quantizers, make_tokens, recorder, window: int) -> None:
    ids, more = make_tokens(1, 12), make_tokens(1, 30, seed=1)
    plain, cache = (PackedCache(quantizers, llama.config, residual_tokens=window) for _ in range(2))
    recorder.caches.append(cache)

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
        with graphed(llama, cache, recorder=recorder) as steps:
            answers = talk(cache, steps)
    assert all(torch.equal(answer, other) for answer, other in zip(answers, expected, strict=True))


@on_cpu
def test_a_conversation_with_recorded_steps_says_the_same(llama, tokenizer, quantizers, automatic, monkeypatch) -> None:
    """Turn after turn on one cache, recorded anew in each; more tokens than there is room for at once; a text that departs."""
    monkeypatch.setattr("deployment.step.automatic.GRAPH_TOKENS", 7)
    loaded = LoadedModel("tiny", llama, tokenizer)
    said = []
    for graphs in (False, True):
        session = Session(loaded, quantizers, prefill_chunk=8, quiet=True, graphs=graphs)
        session.open()
        text = tokenizer("the key and the value").input_ids
        for more in ("a token of", "the head"):
            session.answer(text, 40, do_sample=False)
            text = [*session.tokens[:-3], *tokenizer(more).input_ids]  # not all of the answer is kept
        said.append(session.tokens)
        # the torch path moves what it stores, so every 7 of a turn's 37 steps are recorded anew
        assert (automatic.recordings, automatic.replays) == ((2 * 6, 2 * 37) if graphs else (0, 0))
    assert said[0] == said[1]


@on_cpu
def test_a_failed_recording_leaves_everything_as_it_was(llama, quantizers, make_tokens, monkeypatch) -> None:
    monkeypatch.setattr("deployment.step.steps.obstacle", lambda *_: None)
    ids, plain, cache = make_tokens(1, 12), *(PackedCache(quantizers, llama.config) for _ in range(2))
    with packed_attention(llama):
        expected = generated(llama, plain, ids, 4)

        def fails(_run: Callable[[], Tensor]) -> Any:
            for layer in cache.layers:
                layer.lengths, layer.slots, layer.announced = [layer.lengths[0] + 1], layer.slots + 1, True
            raise RuntimeError("not permitted\nwhile recording")

        with (
            graphed(llama, cache, recorder=fails),
            pytest.warns(UserWarning, match=r"recording failed \(not permitted\)"),
        ):
            assert torch.equal(generated(llama, cache, ids, 4), expected)
    assert cache.layers[0].lengths == plain.layers[0].lengths


@on_cpu
def test_where_nothing_can_be_recorded_it_is_said(llama_folder, quantizers_file, llama, quantizers) -> None:
    arguments = ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--device", "cpu"]
    arguments += ["--prompt", "The cache is", "--max-new-tokens", "5"]
    expected = generate_main(arguments)
    assert generate_main([*arguments, "--no-cuda-graph"])["text"] == expected["text"]
    ids, cache = torch.tensor([[5, 6, 7]]), PackedCache(quantizers, llama.config)
    with (
        packed_attention(llama),
        graphed(llama, cache),
        pytest.warns(UserWarning, match="without a CUDA graph: the model is on cpu"),
    ):
        generated(llama, cache, ids, 4)
    with pytest.raises(UserError, match="steps=0"), graphed(llama, PackedCache(quantizers, llama.config), steps=0):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("case", ["greedy", "sampled", "left padding", "300 tokens", "cropped", "prompt lookup"])
def test_on_a_gpu_graphs_generate_the_same(make_model, quantizers, make_tokens, case: str, window: int) -> None:
    model, ids = make_model("llama").to(DEVICE), make_tokens(1 if case == "prompt lookup" else 2, 60).to(DEVICE)
    new = 300 if case == "300 tokens" else 40
    options: dict[str, Any] = {"do_sample": case == "sampled", "attention_mask": torch.ones_like(ids)}
    if case == "left padding":
        options["attention_mask"][0, :9] = 0
    if case == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 2

    def text_of(past: PackedCache) -> Tensor:
        text = generated(model, past, ids, new, **options)
        if case != "cropped":
            return text
        past.crop(-7)
        shorter = text[:, :-6]
        return generated(model, past, shorter, 9, **options | {"attention_mask": torch.ones_like(shorter)})

    plain, cache = (PackedCache(quantizers, model.config, residual_tokens=window) for _ in range(2))
    with packed_attention(model, graphs=False):
        expected = text_of(plain)
        with graphed(model, cache, steps=_STEPS if new > _STEPS else 8) as steps:
            text = text_of(cache)
    assert steps.obstacle is None and steps.replays >= (1 if case == "prompt lookup" else new - 2)
    assert (text == expected).float().mean() > 0.9  # sums in another order may change a close choice, and all after it
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == other.lengths == layer.stored.tolist()
