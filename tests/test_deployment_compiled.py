"""The registered attention step: compiled graphs hold it whole, and run it as often as it is written."""

import copy
import gc
import shutil

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.layer import PackedLayer
from deployment.measure.synthetic import Shape, synthetic_quantizers
from deployment.rope import Rope
from deployment.step.asked import Step
from deployment.step.compiled import attend, registered_step
from gradients.cli import UserError
from quant.scheme import Scheme

SHAPE = Shape(heads=4, kv_heads=2, head_dim=16)
Made = tuple[PackedLayer, Rope]
COMPILERS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]  # the last compiles C++


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def make_layer(scheme: str = "nuq3-5%") -> Made:
    parsed = Scheme.parse(scheme)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=256)
    return PackedLayer(*synthetic_quantizers(parsed, SHAPE), parsed.sink_tokens), Rope(LlamaRotaryEmbedding(config))


def chunk(new: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, new, 16, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


def run(made: Made, backend: str, compiler: str | None, sizes: tuple[int, ...]) -> list[Tensor]:
    layer, rope = made

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            layer.expect(key, value)
        return 2 * attend(Step(layer, rope, query + 1, key, value, 0.25, backend=backend))

    called = attention if compiler is None else torch.compile(attention, backend=compiler, fullgraph=True)
    return [called(*chunk(new, seed)) for seed, new in enumerate(sizes)]


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "eager"), ("torch", "aot_eager"), ("triton", "eager")])
def test_a_compiled_step_equals_a_direct_one(backend: str, compiler: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    sizes = (9, 1, 1, 1) if backend == "torch" else (2, 1)  # the interpreter is slow
    direct, compiled = make_layer(), make_layer()
    for expected, output in zip(
        run(direct, backend, None, sizes), run(compiled, backend, compiler, sizes), strict=True
    ):
        assert torch.equal(output, expected)
    assert compiled[0].lengths == direct[0].lengths == 2 * [sum(sizes)]
    words = [layer.packed["key"].pages[0].words for layer, _ in (direct, compiled)]
    assert torch.equal(*words)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_equal_and_unused_calls_all_run(compiler: str) -> None:
    layer, rope = make_layer()

    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend(Step(layer, rope, query, key, value, 0.25, backend="torch"))
        return attend(Step(layer, rope, query, key, value, 0.25, backend="torch"))

    output = torch.compile(twice, backend=compiler, fullgraph=True)(*chunk(1, seed=0))
    assert layer.lengths == [2, 2]
    assert output.shape == (2, 1, 4, 16)


def test_every_layer_gets_its_own_tokens() -> None:
    """A graph made for one layer must not be taken for another, nor for a copy."""
    first, rope = make_layer()

    def attention(layer: PackedLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(Step(layer, rope, query, key, value, 0.25, backend="torch"))

    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    compiled(first, *chunk(5, seed=0))
    second = copy.deepcopy(first)
    assert second.number != first.number
    for _ in range(2):
        compiled(second, *chunk(1, seed=1))
    compiled(make_layer()[0], *chunk(1, seed=1))
    assert first.lengths == [5, 5] and second.lengths == [7, 7]


def test_a_layer_that_is_gone_is_noticed() -> None:
    layer, rope = make_layer()
    number, effects = layer.number, layer.effects
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="the cache that this compiled step was made for is gone"):
        registered_step(*chunk(1, seed=0), None, effects, number, rope.number, "torch", 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_schema_and_the_shape_are_as_declared(dtype: torch.dtype) -> None:
    layer, rope = make_layer()
    states = [states.to(dtype) for states in chunk(3, seed=0)]
    arguments = (*states, None, layer.effects, layer.number, rope.number, "torch", 0.25)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(registered_step, arguments, test_utils=checks)
    assert layer.lengths[0] >= 3


def test_a_whole_model_compiles_into_one_graph(llama, make_tokens, fit_model) -> None:
    quantizers, tokens = fit_model(llama, Scheme.parse("nuq4-5%")), make_tokens(2, 14)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    logits = []
    for forward in (llama, torch.compile(llama, backend="eager", fullgraph=True)):
        cache = PackedCache(quantizers, llama.config)
        with packed_attention(llama), torch.inference_mode():
            parts = [
                forward(input_ids=tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                for start, end in ((0, 10), (10, 11), (11, 12), (12, 13), (13, 14))
            ]
        assert cache.layers[0].lengths == [11, 14]
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("compiled_part", ["model", "decoder", "layers"])
def test_what_is_refused_is_refused_compiled(compiled_part: str, make_model, make_tokens, fit_model) -> None:
    """A cache of ours outside of the block, and another within: the model would see nothing of the past, or rotate it twice."""
    model, ids = make_model("llama"), make_tokens(1, 14)
    quantizers = fit_model(model, Scheme.parse("nuq4-5%"))
    parts = {"model": [model], "decoder": [model.model], "layers": list(model.model.layers)}[compiled_part]
    for part in parts:
        part.compile(backend="eager")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="needs the model to run within"):
            model(ids, past_key_values=PackedCache(quantizers, model.config))
        with packed_attention(model), pytest.raises(UserError, match="must be a PackedCache, not a DynamicCache"):
            model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_compiled_model_serves_one_cache_after_the_other(limit: int, llama, make_tokens, fit_model) -> None:
    """Each is a graph of its own, up to a limit, beyond which a part of a forward runs compiled and the rest does not."""
    quantizers, ids = fit_model(llama, Scheme.parse("nuq4-5%")), make_tokens(1, 14)
    forward = torch.compile(llama, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=limit):
        for _ in range(2):
            caches = [PackedCache(quantizers, llama.config) for _ in range(2)]
            with packed_attention(llama):
                for part in ids.split((10, 1, 3), dim=1):
                    logits = [
                        called(input_ids=part, past_key_values=cache).logits
                        for called, cache in zip((llama, forward), caches, strict=True)
                    ]
                    assert torch.equal(*logits)


def test_a_graph_may_break_between_cache_and_attention(llama, make_tokens, fit_model, monkeypatch) -> None:
    quantizers, ids = fit_model(llama, Scheme.parse("nuq4-5%")), make_tokens(1, 14)
    monkeypatch.setattr(PackedLayer, "update", torch._dynamo.disable(PackedLayer.update))
    with torch.no_grad(), packed_attention(llama):
        called = [
            forward(input_ids=ids, past_key_values=PackedCache(quantizers, llama.config)).logits
            for forward in (llama, torch.compile(llama, backend="eager"))
        ]
    assert torch.equal(*called)
