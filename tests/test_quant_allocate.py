"""Rate-distortion allocation: the best choice under a budget, and the quantizer it leaves behind."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import quant.compensate as compensate
from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.models import KINDS
from quant.allocate import SHARES, WIDTHS, ChannelHistograms, Options, allocate, bind, price
from quant.codebook import Codebook
from quant.fit import fit
from quant.mixed import MixedQuantizer
from quant.quantizer import code_bits
from quant.scheme import Scheme
from quant.simulate import simulated

CHANNELS = 12
WITH_OUTLIERS = Scheme.parse("rdnuq2.5g1-4%")


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """(activation, Fisher) `[2000, C]`: channels whose scale, offset and importance differ a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, CHANNELS)
    x = torch.randn(2000, CHANNELS, generator=generator) * scale + torch.linspace(-3, 3, CHANNELS)
    return x.half(), (torch.rand(2000, CHANNELS, generator=generator) * scale.flip(0)).bfloat16()


def brute_force(errors: np.ndarray, bits: np.ndarray, budget: float) -> float:
    """The least total error of any choice within the budget."""
    options, channels = errors.shape
    within = [
        sum(errors[o, c] for c, o in enumerate(choice))
        for choice in product(range(options), repeat=channels)
        if sum(bits[o, c] for c, o in enumerate(choice)) <= budget * channels + 1e-9
    ]
    return min(within)


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_at_the_bits_it_spends(seed: int) -> None:
    draw = np.random.default_rng(seed)
    errors = np.sort(draw.random((4, 5)), axis=0)[::-1].copy()
    bits = np.repeat(np.arange(4.0)[:, None], 5, axis=1)
    options = [Options(errors[:, None, :2], bits[:, None, :2]), Options(errors[:, None, 2:], bits[:, None, 2:])]
    chosen = np.concatenate(allocate(options, budget=1.6))
    spent = bits[chosen, np.arange(5)].mean()
    assert spent <= 1.6
    assert errors[chosen, np.arange(5)].sum() == pytest.approx(brute_force(errors, bits, spent))


def test_more_budget_never_costs_more_error(data) -> None:
    options = price(ChannelHistograms.of(*data), WITH_OUTLIERS)
    grid = options.error.reshape(-1, CHANNELS)
    totals = [grid[allocate([options], budget)[0], np.arange(CHANNELS)].sum() for budget in (1, 1.5, 2, 3, 4, 5)]
    assert totals == sorted(totals, reverse=True) and totals[0] > 10 * totals[-1]


@pytest.mark.parametrize(("width", "share"), [(2, 0.0), (3, 0.01), (4, 0.04), (0, 0.02)])
def test_prices_are_what_quantizing_costs(data, width: int, share: float) -> None:
    """The histogram's error and bits against the error and the outliers of the quantizer itself."""
    activation, fisher = data
    histograms = ChannelHistograms.of(activation, fisher, bins=4096)
    at = WIDTHS.index(width) * len(SHARES) + SHARES.index(share)
    quantizer = bind(histograms, np.full(CHANNELS, at), WITH_OUTLIERS)
    x = activation.float()
    encoded = quantizer.encode(x)
    error = ((quantizer.decode(encoded) - x).square() * fisher.float()).sum(0).double().numpy()
    scale, zero = histograms.ranges(share)
    expected, outliers = histograms.errors(quantizer.codebooks[width], scale, zero)
    assert encoded.outliers is not None
    # an element may lie in a bin whose middle is on the other side of a boundary
    assert np.allclose(encoded.outliers.sum(0).numpy(), outliers, atol=4)
    assert np.allclose(error, expected, rtol=0.02)


def make_mixed(widths: list[int]) -> MixedQuantizer:
    used = {
        width: Codebook.from_levels(torch.linspace(-0.9, 0.9, 2**width) if width else torch.zeros(1))
        for width in set(widths)
    }
    ones = torch.ones(len(widths))
    return MixedQuantizer(WITH_OUTLIERS, used, torch.tensor(widths, dtype=torch.uint8), 2 * ones, ones)


def test_each_channel_is_quantized_at_its_width() -> None:
    quantizer = make_mixed([0, 1, 3, 8])
    x = torch.linspace(-1, 3, 400)[:, None].expand(-1, 4)
    decoded = quantizer.decode(quantizer.encode(x))
    assert [len(decoded[:, c].unique()) for c in range(4)] == [1, 2, 8, 256]
    assert code_bits(quantizer, 4) == 12


def test_what_lies_outside_the_range_is_exact() -> None:
    quantizer = make_mixed([0, 2])
    x = torch.tensor([[-7.0, 9.0], [1.0, 1.0]])
    encoded = quantizer.encode(x)
    assert encoded.outliers is not None and encoded.outliers.tolist() == [[True, True], [False, False]]
    assert torch.equal(quantizer.decode(encoded)[0], x[0])


@pytest.fixture(scope="module")
def allocated(records) -> MixedQuantizer:
    """Fitted to the tiny Llama."""
    return fit(records, Scheme.parse("rdnuq2.5-4%"))  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "sampled"), [("rdnuq2.4+fb", True), ("rdnuq2.4", True), ("rdnuq2.4-4%", False)])
def test_all_tokens_are_counted_only_where_outliers_are_chosen(
    name: str, sampled: bool, records, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    of = ChannelHistograms.of

    def counting(activation: Tensor, fisher: Tensor) -> ChannelHistograms:
        counted.append(len(activation))
        return of(activation, fisher)

    monkeypatch.setattr(ChannelHistograms, "of", counting)
    monkeypatch.setattr(compensate, "_TOKENS", 16)
    fit(records, Scheme.parse(name))
    tokens = len(records.read_layer(0, "key", skip_tokens=1)[0])
    assert tokens >= 64 and set(counted) <= (set(range(16, 32)) | {tokens} if sampled else {tokens})
    assert (counted[0] < 32) is sampled and (counted[-1] < 32) is sampled  # for the prices, and for what is chosen


def test_the_budget_is_kept_on_the_calibration_text(allocated, records) -> None:
    bits = elements = 0
    for layer, sides in allocated.layers.items():
        for kind, quantizer in sides.items():
            x = records.read_layer(layer, kind, skip_tokens=1)[0].float()
            encoded = quantizer.encode(x)
            bits += len(x) * code_bits(quantizer, x.shape[1]) + 32 * encoded.outlier_count
            elements += x.numel()
    # ends of lists: 32 bits for 64 tokens of a head of 12 channels; quantiles are those of bins, not of elements
    assert bits / elements + 32 / (64 * 12) == pytest.approx(2.5, abs=0.08)


@pytest.mark.parametrize("chunk", [1, 40, 150])
def test_deployed_equals_simulated(llama, allocated, make_tokens, chunk: int) -> None:
    tokens = make_tokens(2, 150)
    with simulated(llama, allocated) as usage:
        expected = llama(input_ids=tokens, use_cache=False).logits
    cache = PackedCache(allocated, llama.config, capacity=150, exact_chunk=False)
    with packed_attention(llama):
        parts = [llama(input_ids=part, past_key_values=cache).logits for part in tokens.split(chunk, dim=1)]
    error = (torch.cat(parts, dim=1) - expected).abs().amax(-1)
    assert error.median() < 2e-4 and (error < 0.02).float().mean() > 0.9
    assert cache.nbytes() * 8 == pytest.approx(usage.size.bits, rel=1e-3)


def test_allocation_loses_less_than_uniform_bits(records, allocated) -> None:
    def error(quantizers) -> float:
        total = 0.0
        for layer, sides in quantizers.layers.items():
            for kind, quantizer in sides.items():
                x, fisher = (t.float() for t in records.read_layer(layer, kind, skip_tokens=1))
                total += float(((quantizer.decode(quantizer.encode(x)) - x).square() * fisher).sum())
        return total

    assert error(allocated) < 0.8 * error(fit(records, Scheme.parse("nuq2-1%")))


def test_a_budget_that_is_not_spent_is_said(records, make_records, tmp_path, capsys) -> None:
    """Records without gradients price every width at nothing, and 8 bits are more than a channel takes."""
    fit(records, Scheme.parse("rdnuq2.4+fb"))
    assert "note" not in capsys.readouterr().err
    silent = {}
    for layer in records.manifest.fingerprint.cached_layers:
        for kind in KINDS:
            activation, fisher = records.read(0, layer, kind)
            silent[layer, kind] = activation, fisher * 0
    for held, name in ((make_records(tmp_path, [silent]), "rdnuq2.4"), (records, "rdnuq8")):
        quantizers = fit(held, Scheme.parse(name))
        bits = torch.cat([q.widths.float() for sides in quantizers.layers.values() for q in sides.values()]).mean()
        assert f"note: {name} has codes of {bits:.2f} bits on average" in capsys.readouterr().err
