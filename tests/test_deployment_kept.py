"""A cache is filled under one of torch's modes and used under another."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from deployment.attention import packed_attention
from deployment.cache import PackedCache

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": nullcontext,
}


PAIRS = [(first, then, "torch") for first in MODES for then in MODES]


INTERPRETED = pytest.param("inference", "grad", "triton", marks=pytest.mark.slow)


@pytest.mark.parametrize(("first", "then", "backend"), [*PAIRS, INTERPRETED])
def test_modes_may_change_between_steps(
    make_model, quantizers, make_tokens, first: str, then: str, backend: str
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    model = make_model("llama").requires_grad_(first == "grad" or then == "grad")
    new = 40 if backend == "torch" else 3  # the interpreter is slow
    ids, cache, plain = make_tokens(1, new), *(PackedCache(quantizers, model.config) for _ in range(2))
    with packed_attention(model, backend):
        with MODES[first]():
            model(ids[:, :-2], past_key_values=cache)
        with MODES[then]():
            got = [model(ids[:, at, None], past_key_values=cache).logits for at in (-2, -1)]
            cache.crop(-1)
            got.append(model(ids[:, -1:], past_key_values=cache).logits)
            cache.batch_repeat_interleave(2)
        with torch.no_grad():
            parts = (ids[:, :-2], ids[:, -2:-1], ids[:, -1:])
            expected = [model(part, past_key_values=plain).logits for part in parts][1:]
    assert all(torch.equal(a.detach(), b) for a, b in zip(got[:2], expected, strict=True))
    assert torch.equal(got[2], got[1])
    held = [*cache.tensors(), *(layer.stored for layer in cache.layers)]
    assert not any(tensor.requires_grad for tensor in held)
    assert copy.deepcopy(cache).get_seq_length() == new
