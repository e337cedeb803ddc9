"""The recent window of a packed cache: what is simulated is what is packed, however the tokens come and go."""

from typing import Any

import pytest
import torch
from conftest import CONFIGS, build_model
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.benchmark import benchmark
from deployment.cache import PackedCache
from deployment.evaluate import main as evaluate_main
from deployment.format.stretches import stretches
from deployment.generate import main as generate_main
from deployment.layer import PackedLayer
from deployment.measure.filled import fill_with_blocks
from deployment.measure.shapes import LIBRARIES, ModelShape
from deployment.measure.synthetic import Shape, synthetic_quantizers
from deployment.plan import Plan
from deployment.step import native
from deployment.text.saved import load_cache, save_cache
from gradients.cli import UserError
from gradients.models import KINDS
from quant.evaluate import main as simulate_main
from quant.scheme import Scheme
from quant.simulate import simulated


def read(
    model: PreTrainedModel, cache: PackedCache, tokens: Tensor, sizes: list[int] | int, mask: Tensor | None = None
) -> Tensor:
    """Logits `[B, S, V]` of tokens that come in chunks of these sizes."""
    parts, held = [], cache.get_seq_length()
    with torch.inference_mode(), packed_attention(model):
        for part in tokens.split(sizes, dim=1):
            held += part.shape[1]
            seen = None if mask is None else mask[:, :held]
            parts.append(model(input_ids=part, attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def double() -> PreTrainedModel:
    """In float64 no code depends on the order of a sum."""
    return build_model(CONFIGS["llama"]()).double()


CASES = {
    "outliers": ("nuq3-5%", 1, 9, [30, 1, 1, 25, 1, 40]),
    "feedback, many sinks": ("nuq2+fb", 20, 16, [7, 5, 1, 1, 60, 24]),
    "allocated, a window of one token": ("rdnuq2.4+fb", 3, 1, [1, 1, 70, 1, 25]),
    "longer than the text": ("nuq3-5%", 5, 200, [50, 1, 47]),
    "longer than the chunks": ("int4-5%", 0, 50, [20] * 4 + [1] * 18),
    "a window that equals the chunk": ("nuq4", 2, 14, [14] * 7),
}


@pytest.mark.parametrize("name", CASES)
def test_simulated_equals_packed(name: str, double, fit_model, make_tokens) -> None:
    scheme, sinks, window, sizes = CASES[name]
    quantizers = fit_model(double, Scheme.parse(scheme, sink_tokens=sinks, residual_tokens=window))
    tokens = make_tokens(2, 98)
    with torch.inference_mode(), simulated(double, quantizers):
        expected = double(input_ids=tokens, use_cache=False).logits
    got = read(double, PackedCache(quantizers, double.config, exact_chunk=False), tokens, sizes)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()  # tables are in float32
    plain = quantizers.with_exact(residual_tokens=0)
    assert (
        read(double, PackedCache(plain, double.config, exact_chunk=False), tokens, sizes) - expected
    ).abs().max() > 0.1


def test_an_exact_chunk_comes_on_top(double, fit_model, make_tokens) -> None:
    """A single token that sees itself and 8 before it has a window of 9."""
    quantizers, tokens = fit_model(double, Scheme.parse("nuq2-5%", sink_tokens=2)), make_tokens(1, 40)
    with torch.inference_mode(), simulated(double, quantizers.with_exact(residual_tokens=9)):
        expected = double(input_ids=tokens, use_cache=False).logits
    got = read(double, PackedCache(quantizers, double.config, residual_tokens=8), tokens, 1)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("window", [60, 100])
def test_a_window_that_holds_everything_is_the_unquantized_cache(window: int, double, fit_model, make_tokens) -> None:
    quantizers, tokens = fit_model(double, Scheme.parse("nuq2", sink_tokens=0)), make_tokens(2, 60)
    cache = PackedCache(quantizers, double.config, residual_tokens=window)
    expected = double(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(read(double, cache, tokens, [20, 1, 39]), expected, atol=1e-4)


@pytest.mark.parametrize("exact_chunk", [True, False])
def test_left_padded_rows_equal_rows_alone(exact_chunk: bool, double, fit_model, make_tokens) -> None:
    quantizers = fit_model(double, Scheme.parse("nuq3-5%", sink_tokens=4, residual_tokens=12))
    tokens, mask = make_tokens(3, 60), torch.ones(3, 60, dtype=torch.int64)
    mask[0, :25], mask[1, :58] = 0, 0  # chunks of nothing but padding; a row shorter than its sinks
    sizes = [10, 10, 10, 27, 1, 1, 1]
    got = read(double, PackedCache(quantizers, double.config, exact_chunk=exact_chunk), tokens, sizes, mask)
    for row, pad in enumerate((25, 58, 0)):
        left = [max(0, min(size, sum(sizes[: at + 1]) - pad)) for at, size in enumerate(sizes)]
        cache = PackedCache(quantizers, double.config, exact_chunk=exact_chunk)
        alone = read(double, cache, tokens[row : row + 1, pad:], [size for size in left if size])
        assert torch.allclose(got[row, pad:], alone[0], atol=1e-4)


@pytest.mark.parametrize("removed", [1, 5, 12, 13, 30, 59])
def test_a_crop_leaves_codes_where_they_are(removed: int, double, fit_model, make_tokens) -> None:
    """What is left of a window of 12 is a shorter window; what comes back has been quantized."""
    quantizers, tokens = fit_model(double, Scheme.parse("nuq2-5%", sink_tokens=3)), make_tokens(2, 60)
    cropped = PackedCache(quantizers, double.config, residual_tokens=12)
    shorter = PackedCache(quantizers, double.config, residual_tokens=max(0, 12 - removed))
    read(double, cropped, tokens, [30, 29, 1])
    read(double, shorter, tokens[:, : 60 - removed], 60 - removed)
    # a second layer is told other things by chunks of another size
    first, other = cropped.layers[0], shorter.layers[0]
    cropped.crop(-removed)
    assert first.lengths == [60 - removed] * 2 == first.stored.tolist() == other.stored.tolist()
    assert first.coded == [min(48, 60 - removed)] * 2 == other.coded
    held = {}
    for layer in (first, other):
        parts = list(stretches(layer.sinks, layer.packed, 0, layer.coded[0]))
        past = torch.cat([part.key for part in parts], dim=2)[:, :, : layer.past[0]].double()
        recent = (
            []
            if layer.window is None
            else [layer.window.recent["key"][:, :, -min(layer.residual_tokens, layer.lengths[0]) :]]
        )
        held[layer] = torch.cat([past, *recent], dim=2)
    assert torch.allclose(held[first], held[other], atol=1e-5)


def test_tokens_that_came_back_are_not_packed_again(fit_model, make_tokens) -> None:
    """Error feedback would give other codes for what codes say. In one layer keys do not depend on attention."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model, tokens = build_model(config), make_tokens(1, 90)
    quantizers = fit_model(model, Scheme.parse("nuq2-5%+fb", sink_tokens=2, residual_tokens=20))
    straight, cropped = (PackedCache(quantizers, config, capacity=90) for _ in range(2))
    read(model, straight, tokens, [60, 30])
    read(model, cropped, tokens[:, :60], 60)
    cropped.crop(-7)
    cropped.crop(-8)
    read(model, cropped, tokens[:, 45:], [1, 4, 40])
    for kind in KINDS:
        (page,), (expected,) = (cache.layers[0].packed[kind].pages for cache in (cropped, straight))
        assert torch.equal(page.words, expected.words)
        for one, other in zip(page.outliers.entries(), expected.outliers.entries(), strict=True):
            assert torch.equal(one, other)
        pair = [cache.layers[0].window.recent[kind] for cache in (cropped, straight)]
        assert torch.allclose(*pair, atol=1e-5)


def test_rows_are_selected_with_their_windows(double, fit_model, make_tokens) -> None:
    quantizers = fit_model(double, Scheme.parse("nuq3-5%", sink_tokens=2, residual_tokens=10))
    tokens, more = make_tokens(2, 50), make_tokens(2, 3, seed=1)

    def filled() -> PackedCache:
        cache = PackedCache(quantizers, double.config)
        read(double, cache, tokens, [20, 30])
        cache.crop(-4)
        return cache

    expected = read(double, filled(), more, 1)
    for rows, change in (
        ([1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    ):
        cache = filled()
        change(cache)
        assert torch.allclose(read(double, cache, more[rows], 1), expected[rows], atol=1e-5)


@pytest.mark.parametrize("removed", [0, 7])
def test_a_saved_window_is_restored_bit_for_bit(removed: int, llama, fit_model, make_tokens, tmp_path) -> None:
    quantizers = fit_model(llama, Scheme.parse("nuq3-1%", sink_tokens=3))
    tokens, mask = make_tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    mask[0, :75] = 0  # that row is shorter than the window
    cache = PackedCache(quantizers, llama.config, residual_tokens=16)
    read(llama, cache, tokens, [80, 10], mask)
    if removed:
        cache.crop(-removed)
        tokens, mask = tokens[:, :-removed], mask[:, :-removed]
    save_cache(tmp_path / "cache", cache, quantizers, llama, tokens)
    with pytest.raises(UserError, match="residual_tokens=16.*and not nuq3-1% sink_tokens=3"):
        load_cache(tmp_path / "cache", quantizers, llama)
    restored = load_cache(tmp_path / "cache", quantizers.with_exact(residual_tokens=16), llama).restore(
        llama, capacity=120
    )
    for layer, other in zip(cache.layers, restored.layers, strict=True):
        assert layer.coded == other.coded and layer.lengths == other.lengths
        assert all(torch.equal(layer.window.recent[kind], other.window.recent[kind]) for kind in KINDS)
    more = make_tokens(2, 25, seed=2)
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    got, expected = (read(llama, one, more, [1, 24], longer) for one in (restored, cache))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plan_is_what_is_held(dtype: torch.dtype, fit_model, llama, make_tokens) -> None:
    scheme = Scheme.parse("nuq2", sink_tokens=4, residual_tokens=40)
    model, quantizers = build_model(CONFIGS["llama"]()).to(dtype), fit_model(llama, scheme)
    shape = ModelShape.of(model.config)
    for tokens in (20, 44, 45, 200):
        cache = PackedCache(quantizers, model.config, capacity=tokens)
        read(model, cache, make_tokens(1, tokens), tokens)
        assert cache.layers[0].window.recent["key"].dtype == dtype
        assert cache.nbytes() == sum(shape.cache_bytes(scheme, tokens).values())
    assert shape.cache_bytes(scheme, 200)["recent_window"] == 2 * 2 * 41 * 24 * 2
    plan = Plan(shape, scheme, gpu_memory=LIBRARIES + 2**25, prefill_chunk=64)
    assert plan.largest_context() % 64 == 44 and plan.largest_context() > 44


def test_native_attention_sees_the_window(wide, fit_model, make_tokens, monkeypatch) -> None:
    quantizers = fit_model(wide, Scheme.parse("nuq3-1%", sink_tokens=3, residual_tokens=10))
    tokens, mask = make_tokens(2, 100), torch.ones(2, 100, dtype=torch.int64)
    mask[0, :60] = 0
    for exact_chunk in (True, False):
        logits = []
        for switch in ("1", "0"):
            monkeypatch.setenv(native.VARIABLE, switch)
            cache = PackedCache(quantizers, wide.config, exact_chunk=exact_chunk)
            logits.append(read(wide, cache, tokens, [90, 4, 1, 1, 4], mask)[:, 90:])
            assert native.takes(cache.layers[0], torch.zeros(2, 4, 1, 64)) == (switch == "1")
        assert torch.allclose(*logits, atol=1e-3)


def test_commands_take_a_window_and_report_its_bytes(llama_folder, quantizers_file, text_file) -> None:
    common = ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--device", "cpu"]
    windows = [*common, "--text", str(text_file), "--seqlen", "60", "--windows", "1", "--residual-tokens", "10"]
    simulated_row = simulate_main(windows)
    packed_row = evaluate_main([*windows, "--no-exact-chunk", "--prefill-chunk", "17"])
    assert simulated_row is not None and packed_row is not None
    assert simulated_row["scheme"] == packed_row["scheme"] == "nuq3-1% residual_tokens=10"
    assert packed_row["nll"] == pytest.approx(simulated_row["nll"], rel=1e-4)
    sinks = simulate_main([*windows, "--sink-tokens", "60"])
    assert sinks is not None and sinks["scheme"] == "nuq3-1% sink_tokens=60 residual_tokens=10"
    assert sinks["bits_per_element"] == 16 and sinks["nll"] == pytest.approx(sinks["baseline_nll"], abs=0.01)
    wide = simulate_main([*windows[:-1], "20"])
    assert wide is not None and wide["bits_per_element"] > simulated_row["bits_per_element"] > 3.5
    generated: Any = generate_main(
        [*common, "--prompt", "the key", "--max-new-tokens", "9", "--residual-tokens", "100"]
    )
    assert generated["bits_per_element"] > 16  # a window of 100 float32 tokens for 15
    with pytest.raises(UserError, match="--residual-tokens: -1 is negative"):
        generate_main([*common, "--prompt", "the key", "--residual-tokens", "-1"])


def test_a_negative_window_is_refused(llama, quantizers) -> None:
    with pytest.raises(UserError, match="residual_tokens -1 is negative; use 0 for none"):
        PackedCache(quantizers, llama.config, residual_tokens=-1)


@pytest.mark.parametrize("window", [0, 9])
def test_benchmarks_fill_layers_with_windows(window: int) -> None:
    scheme = Scheme.parse("nuq3-1%", residual_tokens=window)
    shape, device = Shape(2, 1, 64), torch.device("cpu")
    layer = PackedLayer(*synthetic_quantizers(scheme, shape), scheme.sink_tokens, 200, residual_tokens=window)
    fill_with_blocks(layer, shape, 2, device, 0)
    assert layer.lengths == [129 + window] == layer.stored.tolist() and layer.coded == [129]
    assert (layer.window is None) == (window == 0)
    assert layer.window is None or layer.window.recent["key"].abs().amax(-1)[0, 0].min() > 0.1
    row = benchmark(shape, scheme, 64, 1, ["append", "decode"], device, 1e9)
    assert (row["bits_per_element"] > 4.5) == (window > 0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["beams", "prompt lookup"])
def test_generation_equals_the_unquantized_cache(options: dict[str, int], llama, fit_model, make_tokens) -> None:
    """With 8 bits the text is the unquantized cache's, as rows are reordered and guesses taken back."""
    quantizers = fit_model(llama, Scheme.parse("int8-5%", sink_tokens=2, residual_tokens=8))
    tokens = make_tokens(1, 6).repeat(1, 4)
    asked = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 2, **options}
    expected = llama.generate(tokens, attention_mask=torch.ones_like(tokens), **asked)
    with packed_attention(llama):
        cache = PackedCache(quantizers, llama.config)
        got = llama.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **asked)
    assert torch.equal(got, expected)
