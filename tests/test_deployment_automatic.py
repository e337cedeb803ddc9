"""Decode steps within `packed_attention` that are recorded and replayed without being asked for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorders import generated
from torch import Tensor, nn

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step.automatic import possible
from deployment.step.graphed import graphed
from deployment.step.recording import Assumed, obstacle, record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="what replaces a CUDA graph where there is none")
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "left padding": {},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
NEW = 14


@pytest.fixture
def step(llama, quantizers, make_tokens, automatic) -> Iterator[Any]:
    """Within `packed_attention`: a step of two rows that hold a prompt, with any arguments; `step.cache` is their cache."""
    cache, ids = PackedCache(quantizers, llama.config), make_tokens(2, 12)

    def forward(**options: Any) -> Any:
        return llama(input_ids=ids[:, :1], past_key_values=cache, **options)

    forward.cache, forward.ids = cache, ids  # type: ignore[attr-defined]
    with packed_attention(llama, "torch"), torch.no_grad():
        llama(ids, past_key_values=cache)
        yield forward


@on_cpu
@pytest.mark.parametrize("mode", MODES)
def test_generate_says_the_same(llama, quantizers, make_tokens, automatic, mode: str) -> None:
    ids = make_tokens(1, 6).repeat(1, 4) if mode == "prompt lookup" else make_tokens(2, 21)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False} | MODES[mode]
    if mode == "left padding":
        options["attention_mask"][0, :3] = 0
    plain, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    for past in (plain, cache):
        past.batch_repeat_interleave(options.get("num_beams", 1))
    before = dict(vars(llama))
    with packed_attention(llama, "torch", graphs=False):
        expected = generated(llama, plain, ids, NEW, **options)
    assert automatic.replays == automatic.recordings == 0
    with packed_attention(llama, "torch"):
        assert torch.equal(generated(llama, cache, ids, NEW, **options), expected)
    assert vars(llama).keys() == before.keys()
    if mode == "beams":
        assert automatic.recordings == 0
    elif mode != "prompt lookup":  # the prompt gives the first token, and two steps come before the recording
        assert (automatic.recordings, automatic.replays) == (1, NEW - 3)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == other.lengths == layer.stored.tolist() and layer.slots == other.slots


@on_cpu
def test_a_crop_ends_recordings_over_a_window_though_memory_is_where_it_was(
    llama, quantizers, make_tokens, automatic, monkeypatch
) -> None:
    """What a graph does not know: tokens that came back into the window are packed already."""
    monkeypatch.setattr("deployment.step.steps.Steps._places_now", lambda _: [])  # freed, and given out again
    ids, cache = make_tokens(1, 30), PackedCache(quantizers, llama.config, residual_tokens=6)
    with packed_attention(llama, "torch"), torch.no_grad():
        llama(ids, past_key_values=cache)
        for _ in range(6):
            llama(ids[:, :1], past_key_values=cache)
        assert (automatic.recordings, automatic.replays) == (1, 4)
        cache.crop(-2)
        llama(ids[:, :1], past_key_values=cache)
        assert automatic.replays == 4


@on_cpu
def test_the_third_step_is_recorded_and_what_it_returns_is_the_callers_own(step, automatic) -> None:
    outputs, counts = [], []
    for _ in range(5):
        outputs.append(step().logits)
        counts.append((automatic.recordings, automatic.replays))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 2), (1, 3)]
    assert outputs[2].data_ptr() != outputs[3].data_ptr() and not torch.equal(outputs[2], outputs[3])
    assert step.cache.get_seq_length() == 17


@on_cpu
def test_nested_blocks_may_want_no_graphs(llama, step, automatic) -> None:
    for _ in range(4):
        step()
    with packed_attention(llama, "torch", graphs=False):
        for _ in range(4):
            step()
    assert (automatic.recordings, automatic.replays) == (1, 2)
    for _ in range(5):  # a recording that has not paid makes two steps four
        step()
    assert (automatic.recordings, automatic.replays) == (2, 3)


@on_cpu
@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"return_dict": False},
        {"logits_to_keep": torch.tensor([0])},
        {"labels": torch.zeros(2, 1, dtype=torch.int64)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_recording_cannot_give_runs_as_it_is(step, automatic, options: dict[str, Any]) -> None:
    for _ in range(3):
        step()
    output = step(**options)
    assert automatic.replays == 1
    if "output_hidden_states" in options:
        assert len(output.hidden_states) == 3
    if "labels" in options:
        assert output.loss is not None
    for _ in range(5):  # and the recording has ended
        step()
    assert (automatic.recordings, automatic.replays) == (2, 2)


@on_cpu
def test_what_the_config_asks_for_is_not_left_out(llama, step, automatic, monkeypatch) -> None:
    for _ in range(3):
        step()
    monkeypatch.setattr(llama.config, "output_hidden_states", True)
    assert len(step().hidden_states) == 3
    assert automatic.replays == 1


@on_cpu
def test_gradients_are_not_lost(make_model, quantizers, make_tokens, automatic) -> None:
    model, ids = make_model("llama").requires_grad_(True), make_tokens(1, 8)
    with packed_attention(model, "torch"):
        cache = PackedCache(quantizers, model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for _ in range(4):
            assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
    assert automatic.recordings == 0


@on_cpu
@pytest.mark.parametrize("change", ["weights", "parameter", "hook", "training"])
def test_a_model_that_changes_is_recorded_anew(make_model, quantizers, make_tokens, automatic, change: str) -> None:
    model, ids = make_model("llama"), make_tokens(1, 8)
    with packed_attention(model, "torch"), torch.no_grad():
        cache = PackedCache(quantizers, model.config)
        model(ids, past_key_values=cache)
        for _ in range(4):
            model(ids[:, :1], past_key_values=cache)
        assert (automatic.recordings, automatic.replays) == (1, 2)
        if change == "weights":
            model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
        if change == "parameter":
            model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
        if change == "hook":
            model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 0)
        if change == "training":
            model.train()
        logits = model(ids[:, :1], past_key_values=cache).logits
        # some of it is found out behind a replay, which is taken back
        assert automatic.replays == 2 + (change in ("parameter", "hook"))
        assert change == "training" or not logits.any()
        assert all(layer.lengths == layer.stored.tolist() == [layer.slots] == [13] for layer in cache.layers)


@on_cpu
def test_recordings_that_do_not_pay_become_rare(llama, step, automatic) -> None:
    """Three steps and a chunk, over and over: without patience every round would be recorded."""
    chunk = step.ids[:, :1].expand(-1, 17)
    for _ in range(10):
        for _ in range(3):
            step()
        llama(chunk, past_key_values=step.cache)
    assert automatic.recordings == 1
    for _ in range(30):  # until they last again
        step()
    assert automatic.recordings == 2
    llama(chunk, past_key_values=step.cache)
    for _ in range(3):
        step()
    assert automatic.recordings == 3


@on_cpu
def test_steps_of_several_tokens_have_recordings_of_their_own_and_may_be_cropped(
    llama, quantizers, step, automatic, monkeypatch
) -> None:
    """What is stored must stay where it is, as the kernels leave it and the torch path does not."""
    monkeypatch.setattr("deployment.step.steps.Steps._places_now", lambda _: [])
    plain = PackedCache(quantizers, llama.config)
    automatic.caches.append(step.cache)
    with packed_attention(llama, "torch", graphs=False):
        llama(step.ids, past_key_values=plain)

    def read(new: int, drop: int) -> tuple[int, int]:
        before, ids = (automatic.recordings, automatic.replays), step.ids[:, :new]
        logits = llama(ids, past_key_values=step.cache, logits_to_keep=new - 1).logits
        expected = llama.forward.automatic.eager(ids, past_key_values=plain, logits_to_keep=new - 1).logits
        assert logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-4)
        for cache in (step.cache, plain):
            cache.crop(-drop)
        return automatic.recordings - before[0], automatic.replays - before[1]

    plain.in_forward = True  # what the forward's hooks, which are not called, would say
    steps = [(1, 0), (3, 2), (3, 0), (1, 0), (3, 3), (1, 0), (3, 1), (1, 1), (3, 0)]
    taken = [read(*one) for one in steps]
    assert taken == [(0, 0)] * 4 + [(1, 1)] * 2 + [(0, 1)] * 3
    read(3, 10)  # more than has come since
    assert read(1, 0) == (0, 0)


@on_cpu
@pytest.mark.parametrize("event", ["crop", "select", "decoder", "graphed"])
def test_what_happens_in_between_ends_a_recording(llama, step, automatic, event: str) -> None:
    for _ in range(4):
        step()
    cache, taken = step.cache, []
    if event == "crop":
        cache.crop(-2)
    if event == "select":
        cache.reorder_cache(torch.tensor([1, 0]))
    if event == "decoder":
        llama.model(step.ids[:, :1], past_key_values=cache)
        assert llama.forward.automatic.steps_of(cache)._recorded == {}  # settled before, not after
    if event == "graphed":
        with graphed(llama, cache, recorder=lambda run: taken.append(run) or automatic(run)):
            for _ in range(3):
                step()
        assert len(taken) == 1
    before = automatic.replays
    step()
    assert automatic.replays == before
    lengths = [layer.lengths for layer in cache.layers]
    assert all(length == layer.stored.tolist() for length, layer in zip(lengths, cache.layers, strict=True))


@on_cpu
def test_nothing_is_recorded_while_other_threads_are_within(make_model, step, automatic) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with packed_attention(make_model("llama"), "torch"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    for _ in range(5):
        step()
    assert automatic.recordings == 0
    done.set()
    thread.join()
    step()
    assert (automatic.recordings, automatic.replays) == (1, 1)


@on_cpu
def test_an_interrupted_replay_leaves_the_cache_as_it_was(llama, step, automatic) -> None:
    """The device may have stored the token already."""
    for _ in range(4):
        step()
    layers = step.cache.layers
    before = layers[0].lengths

    def interrupted() -> None:
        for layer in layers:
            layer.stored.add_(1)
        raise KeyboardInterrupt

    recorded = llama.forward.automatic.steps_of(step.cache)._recorded
    recorded[1] = replace(recorded[1], replay=interrupted)
    with pytest.raises(KeyboardInterrupt):
        step()
    with pytest.raises(RuntimeError, match=r"was interrupted; it holds the 16 tokens"):
        step()
    assert [layer.lengths for layer in layers] == [before] * 2
    assert [layer.stored.tolist() for layer in layers] == [before] * 2
    step()
    assert layers[1].stored.tolist() == [17, 17]


@on_cpu
def test_where_there_is_no_gpu_the_forward_is_the_models_own(llama, quantizers) -> None:
    assert not possible(llama)
    with packed_attention(llama):
        assert "forward" not in vars(llama)
    assert "on cpu" in str(obstacle(llama, PackedCache(quantizers, llama.config)))


def test_adapters_and_hooks_are_in_the_way(make_model, quantizers, monkeypatch) -> None:
    model = make_model("llama").to(DEVICE)
    cache = PackedCache(quantizers, model.config)
    on_gpu = torch.device("cuda")
    if DEVICE.type == "cpu":
        monkeypatch.setattr("deployment.step.recording.input_device", lambda _: on_gpu)
        monkeypatch.setattr(type(model), "parameters", lambda _: iter([SimpleNamespace(device=on_gpu)]))
        monkeypatch.setattr("deployment.step.recording.runs_kernels", lambda *_: True)
    assert obstacle(model, cache) is None
    with packed_attention(model):  # its own hooks are not
        assert obstacle(model, cache) is None
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert "hooks" in str(obstacle(model, cache))
    handle.remove()
    adapted = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.lm_head = adapted(48, 259)
    assert "adapters" in str(obstacle(model, cache))


def test_what_is_assumed_of_a_model_is_noticed_when_it_changes(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    changes: list[Callable[[], object]] = [
        lambda: model[0].register_forward_pre_hook(lambda *_: None),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(2, 2))),
        lambda: setattr(model[1], "running_mean", torch.ones(2)),
        model.train,
    ]
    for change in changes:
        assumed = Assumed(model)
        assert assumed.holds
        change()
        assert not assumed.holds
    assumed = Assumed(model)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    assert not assumed.holds
    monkeypatch.undo()
    model[0].weight.data.zero_()  # in place is nothing to a graph
    assert assumed.holds


@on_cpu
@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_that_fails_leaves_torch_as_it_was(monkeypatch, fails: bool) -> None:
    calls: list[Any] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        calls.append(capture_error_mode)
        yield
        calls.append("end")

    generator = SimpleNamespace(clone_state=lambda: "fresh", graphsafe_set_state=calls.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    output = torch.zeros(1)

    def run() -> Tensor:
        calls.append("run")
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return output

    if fails:
        with pytest.raises(RuntimeError, match="not permitted"):
            record(run)
        assert calls == ["relaxed", "run", "stream", "fresh"]
    else:
        replay, result = record(run)
        replay()
        assert calls == ["relaxed", "run", "end", "replay"] and result is output


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_generate_says_the_same(make_model, quantizers, make_tokens, mode: str, monkeypatch) -> None:
    recordings = []

    def noted(run: Callable[[], Tensor]) -> Any:
        recordings.append(run)
        return record(run)

    monkeypatch.setattr("deployment.step.automatic.record", noted)
    model = make_model("llama").to(DEVICE)
    ids = (make_tokens(1, 6).repeat(1, 4) if mode == "prompt lookup" else make_tokens(2, 60)).to(DEVICE)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False} | MODES[mode]
    if mode == "left padding":
        options["attention_mask"][0, :9] = 0
    plain, cache = (PackedCache(quantizers, model.config) for _ in range(2))
    with packed_attention(model, graphs=False):
        expected = generated(model, plain, ids, 100, **options)
    assert not recordings
    with packed_attention(model):
        text = generated(model, cache, ids, 100, **options)
    assert bool(recordings) == (mode != "beams") or mode == "prompt lookup"
    assert (text == expected).float().mean() > 0.9  # sums in another order may change a close choice, and all after it
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.lengths == layer.stored.tolist() and layer.slots == other.slots


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")
def test_on_a_gpu_a_failed_recording_costs_only_speed(make_model, quantizers, make_tokens) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum() > -1e30)

    model, ids = make_model("llama").to(DEVICE), make_tokens(2, 30).to(DEVICE)
    plain, cache = (PackedCache(quantizers, model.config) for _ in range(2))
    model.model.norm = nn.Sequential(model.model.norm, Waits())
    with packed_attention(model, graphs=False):
        expected = generated(model, plain, ids, 20, do_sample=True)
    with packed_attention(model), pytest.warns(UserWarning, match="recording failed"):
        text = generated(model, cache, ids, 20, do_sample=True)
    assert (text == expected).float().mean() > 0.9
    torch.randn(4, device=DEVICE)
