"""Chunks of a prompt: what lies between attentions is recorded and replayed; on a CPU operators are noted and run again."""

import threading
from typing import Any

import pytest
import torch
from recorders import OperatorPieces, generated

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step.reading import Reading

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="what replaces a CUDA graph where there is none")
CHUNK = 20


@pytest.fixture
def reading(llama, automatic, monkeypatch) -> Any:
    """Within `packed_attention` chunks are recorded: `reading()` is the one of the block that is entered."""
    monkeypatch.setattr("deployment.step.automatic.GraphPieces", OperatorPieces)
    monkeypatch.setattr("deployment.step.reading.obstacle", lambda *_: None)
    return lambda: llama.forward.automatic.reading


def read(model: Any, cache: PackedCache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last token of each chunk."""
    found = []
    for end in range(CHUNK, ids.shape[1] + 1, CHUNK):
        chunk, seen = ids[:, end - CHUNK : end], None if mask is None else mask[:, :end]
        found.append(model(chunk, past_key_values=cache, attention_mask=seen, logits_to_keep=1).logits)
    return torch.cat(found, 1)


@on_cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padding", [0, 7])
def test_chunks_are_read_as_they_were_without_graphs(llama, quantizers, make_tokens, reading, mode, padding) -> None:
    ids = make_tokens(2, 7 * CHUNK)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    plain, first, second = (PackedCache(quantizers, llama.config) for _ in range(3))
    with mode(), packed_attention(llama, "torch", graphs=False):
        expected = read(llama, plain, ids, mask)
    with mode(), packed_attention(llama, "torch"):
        assert torch.equal(read(llama, first, ids, mask), expected)
        own: Reading = reading()
        assert (own.recordings, own.replays) == (1, 4)
        assert torch.equal(read(llama, second, ids, mask), expected)  # the recording is of the model, not of a cache
        assert (own.recordings, own.replays) == (1, 11)
        for cache in (first, second):
            assert [layer.lengths for layer in cache.layers] == [layer.lengths for layer in plain.layers]
            assert not any(layer.announced for layer in cache.layers)
        llama(ids[:, :1], past_key_values=first, attention_mask=torch.cat([mask, mask[:, -1:]], 1))
        assert not own._recorded


@on_cpu
def test_generate_reads_its_prompt_in_recorded_chunks(llama, quantizers, make_tokens, reading) -> None:
    ids, options = make_tokens(2, 7 * CHUNK + 3), {"prefill_chunk_size": CHUNK}
    plain, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    with packed_attention(llama, "torch", graphs=False):
        expected = generated(llama, plain, ids, 5, **options)
    with packed_attention(llama, "torch"):
        own: Reading = reading()
        assert torch.equal(generated(llama, cache, ids, 5, **options), expected)
        assert (own.recordings, own.replays) == (1, 4)


@on_cpu
def test_steps_that_no_graph_holds_are_recorded_in_pieces(llama, quantizers, make_tokens, reading, monkeypatch) -> None:
    """Their codes are unpacked, as the host counts them."""
    monkeypatch.setattr("deployment.step.recording.LONG", 1)
    monkeypatch.setattr("deployment.kernels.decode.host.is_grouped", lambda _: False)
    ids = make_tokens(2, CHUNK)
    plain, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    with packed_attention(llama, "torch", graphs=False):
        expected = generated(llama, plain, ids, 9)
    with packed_attention(llama, "torch"):
        own: Reading = reading()
        assert torch.equal(generated(llama, cache, ids, 9), expected)
        assert (own.recordings, own.replays) == (1, 5)


@on_cpu
def test_a_recording_that_fails_leaves_the_cache_as_it_was(
    llama, quantizers, make_tokens, reading, monkeypatch
) -> None:
    class Failing(OperatorPieces):
        def end(self) -> Any:
            if self.pieces == 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().end()

    monkeypatch.setattr("deployment.step.automatic.GraphPieces", Failing)
    ids = make_tokens(1, 5 * CHUNK)
    plain, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    with torch.no_grad(), packed_attention(llama, "torch", graphs=False):
        expected = read(llama, plain, ids)
    with torch.no_grad(), packed_attention(llama, "torch"):
        assert torch.equal(read(llama, cache, ids), expected)
        assert (reading().recordings, reading().replays) == (0, 0)
        assert all(layer.lengths == layer.stored.tolist() == [5 * CHUNK] for layer in cache.layers)


@on_cpu
def test_what_is_wrong_with_a_replayed_chunk_is_refused(llama, quantizers, make_tokens, reading) -> None:
    ids, cache = make_tokens(1, 6 * CHUNK), PackedCache(quantizers, llama.config)
    with torch.no_grad(), packed_attention(llama, "torch"):
        read(llama, cache, ids[:, : 4 * CHUNK])
        hidden = torch.ones(1, 5 * CHUNK, dtype=torch.int64)
        hidden[0, 9] = 0
        with pytest.raises(ValueError, match="left padding only"):
            llama(ids[:, :CHUNK], past_key_values=cache, attention_mask=hidden, logits_to_keep=1)
        with pytest.raises(ValueError, match="one by one"):
            positions = torch.arange(4 * CHUNK, 5 * CHUNK)[None]
            positions[0, 3] += 1
            llama(ids[:, :CHUNK], past_key_values=cache, position_ids=positions, logits_to_keep=1)
        assert all(layer.lengths == [4 * CHUNK] for layer in cache.layers)
        read(llama, cache, ids[:, 4 * CHUNK :])
        assert reading().replays == 3  # those refused are not counted


@on_cpu
def test_a_model_that_changes_is_recorded_anew(make_model, quantizers, make_tokens, automatic, reading) -> None:
    model, ids = make_model("llama"), make_tokens(1, 4 * CHUNK)
    with torch.no_grad(), packed_attention(model, "torch"):
        own, cache = model.forward.automatic.reading, PackedCache(quantizers, model.config)
        read(model, cache, ids)
        assert (own.recordings, own.replays) == (1, 1)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not read(model, cache, ids[:, :CHUNK]).any()
        assert (own.recordings, own.replays) == (1, 1)


@on_cpu
def test_nothing_is_replayed_while_other_threads_are_within(
    llama, make_model, quantizers, make_tokens, reading
) -> None:
    """A recording is of the model, not of a cache: two threads would read and write the same tensors."""
    ids, cache = make_tokens(1, 6 * CHUNK), PackedCache(quantizers, llama.config)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with packed_attention(make_model("llama"), "torch"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    with torch.no_grad(), packed_attention(llama, "torch"):
        read(llama, cache, ids[:, : 4 * CHUNK])
        assert reading().replays == 1
        thread.start()
        assert inside.wait(60)
        read(llama, cache, ids[:, 4 * CHUNK : 5 * CHUNK])
        assert reading().replays == 1
        done.set()
        thread.join()
        read(llama, cache, ids[:, 5 * CHUNK :])
        assert (reading().recordings, reading().replays) == (1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")
@pytest.mark.parametrize("padding", [0, 7])
def test_on_a_gpu_chunks_are_read_as_they_were_without_graphs(
    make_model, quantizers, make_tokens, padding: int
) -> None:
    model, ids = make_model("llama").to(DEVICE), make_tokens(2, 9 * CHUNK).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    plain, first, second = (PackedCache(quantizers, model.config) for _ in range(3))
    with torch.no_grad(), packed_attention(model, graphs=False):
        expected = read(model, plain, ids, mask)
    with torch.no_grad(), packed_attention(model):
        own: Reading = model.forward.automatic.reading
        for cache in (first, second):
            logits = read(model, cache, ids, mask)
            assert ((logits - expected).norm() / expected.norm()).item() < 1e-2
            assert [layer.stored.tolist() for layer in cache.layers] == [
                layer.stored.tolist() for layer in plain.layers
            ]
        assert (own.recordings, own.replays) == (1, 15)
