"""Attention over thousands of stored tokens whose numbers are like those of real models, against float64.

Channels of keys differ in size by orders of magnitude and lie far from zero, values have heavy tails, positions are large and
rotated with the frequencies of Llama. Chunks are stored and attended as a model would do it: prefill, then single tokens.
The reference dequantizes with the quantizers themselves and takes one softmax. What is left to err is float32.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import deployment.step.attend
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step import native
from deployment.step.append import append
from deployment.step.asked import Step
from deployment.step.attend import attend_step
from deployment.step.reference import Segment, attend_torch
from gradients.rope import rotate
from quant.codebook import nf_codebook
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme

HEADS, QUERY_HEADS, DIM = 2, 6, 64
STORED, CHUNKS = 2500, (300, 17, 1, 1, 1)
SINKS, SCALING = 1, DIM**-0.5


def heavy_tailed(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, G, n, D]`: Student's t, a few channels huge and off centre."""
    generator = torch.Generator().manual_seed(seed)

    def tails(*shape: int) -> Tensor:
        normal = torch.randn(*shape, generator=generator)
        return normal / torch.randn(4, *shape, generator=generator).square().mean(0).sqrt()

    channels = torch.Generator().manual_seed(0)  # the same for all tokens
    size = torch.randn(HEADS, 1, DIM, generator=channels).exp()
    offset = torch.randn(HEADS, 1, DIM, generator=channels) * 4 * size
    return tails(1, HEADS, tokens, DIM) * size + offset, tails(1, HEADS, tokens, DIM)


def quantizers(bits: int, states: tuple[Tensor, Tensor]) -> tuple[Quantizer, Quantizer]:
    """Such that 2 % of the elements are outliers."""
    scheme, book = Scheme(datatype="nf", bits=bits, outliers=0.02), nf_codebook(2**bits)
    keys = states[0].transpose(1, 2).flatten(2)[0]
    low, high = keys.quantile(torch.tensor([0.01, 0.99]), dim=0)
    return ChannelQuantizer(scheme, book, (high - low) / 2, (high + low) / 2), TokenQuantizer(scheme, book)


@pytest.fixture
def rope() -> Rope:
    return Rope(LlamaRotaryEmbedding(LlamaConfig(head_dim=DIM)))


def as_attended(quantizer: Quantizer, states: Tensor, exact_from: int) -> Tensor:
    """What attention should see: sinks in fp16, then tokens as stored, from `exact_from` on as they are; `[1, G, n, D]`."""
    tokens = states.transpose(1, 2).flatten(2)
    stored = quantizer.decode(quantizer.encode(tokens[:, SINKS:exact_from]))
    seen = torch.cat([tokens[:, :SINKS].half().float(), stored, tokens[:, exact_from:]], dim=1)
    return seen.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def reference(rope: Rope, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention of the last tokens in float64."""
    new, total = query.shape[2], key.shape[2]
    cos, sin = (table.double() for table in rope.tables(torch.arange(total)[None], total))
    query = rotate(query.double(), cos[:, -new:], sin[:, -new:])
    key, value = rotate(key.double(), cos, sin), value.double()
    expanded = (x.repeat_interleave(QUERY_HEADS // HEADS, dim=1) for x in (key, value))
    visible = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    return torch.nn.functional.scaled_dot_product_attention(query, *expanded, attn_mask=visible, scale=SCALING)


def chunks(rope: Rope, bits: int, exact_chunk: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """(attention's output, the reference's) of every chunk after the first tokens."""
    states = heavy_tailed(STORED + sum(CHUNKS), seed=1)
    sides = quantizers(bits, states)
    layer, stored = PackedLayer(*sides, sink_tokens=SINKS, exact_chunk=exact_chunk), STORED
    first = [x[:, :, :STORED] for x in states]
    layer.update(*first)
    append(layer, *first, [0])
    generator = torch.Generator().manual_seed(2)
    for new in CHUNKS:
        query = torch.randn(1, QUERY_HEADS, new, DIM, generator=generator)
        key, value = (x[:, :, stored : stored + new] for x in states)
        layer.update(key, value)
        output = attend_step(Step(layer, rope, query, key, value, SCALING, backend="torch")).transpose(1, 2)
        end, exact_from = stored + new, stored if exact_chunk else stored + new
        seen = [as_attended(side, x[:, :, :end], exact_from) for side, x in zip(sides, states, strict=True)]
        yield output, reference(rope, query, *seen)
        stored = end


@pytest.mark.parametrize("natively", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("exact_chunk", [False, True])
def test_long_inputs_are_attended_as_dequantized(
    monkeypatch, rope, bits: int, exact_chunk: bool, natively: bool
) -> None:
    if natively and native._library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv(native.VARIABLE, "1" if natively else "0")
    # angles of the blocks' first tokens are rounded to float32, as the model's own are, but not to the same
    limit = 1e-4 if natively else 4e-6
    for output, expected in chunks(rope, bits, exact_chunk):
        assert (output - expected).norm() < limit * expected.norm()


def test_stored_keys_are_rotated_to_the_last_bit(monkeypatch, rope) -> None:
    """Rounding otherwise (a fused multiply-add, say) is no error, but flips codes of later layers, and moves the loss of a
    short text by a thousandth: then nobody can tell it from one.
    """
    seen: list[Segment] = []

    def watched(query: Tensor, segments: Iterable[Segment], scaling: float) -> Tensor:
        seen[:] = list(segments)
        return attend_torch(query, seen, scaling)

    monkeypatch.setenv(native.VARIABLE, "0")
    monkeypatch.setattr(deployment.step.attend, "attend_torch", watched)
    states = heavy_tailed(STORED + sum(CHUNKS), seed=1)
    sides, stored = quantizers(4, states), STORED
    for new, _ in zip(CHUNKS, chunks(rope, 4, exact_chunk=False), strict=True):
        stored += new
        tables = rope.tables(torch.arange(stored)[None], stored)
        key, value = (as_attended(side, x[:, :, :stored], stored) for side, x in zip(sides, states, strict=True))
        assert torch.equal(torch.cat([segment.key for segment in seen], dim=2)[:, :, :stored], rotate(key, *tables))
        assert torch.equal(torch.cat([segment.value for segment in seen], dim=2)[:, :, :stored], value)
