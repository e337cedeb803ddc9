"""Groups of 16 channels that share a width: how they are formed, priced, stored, and read."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import kernels_on_cpu
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_kernels_attention import run_case
from torch import Tensor

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.format.groups import GroupOrder
from deployment.format.layout import PackedTensor
from deployment.format.order import ChannelOrder
from deployment.kernels.decode import host
from deployment.measure.shapes import ModelShape
from gradients.checked import open_checked, write_checked
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from quant import grouping
from quant.allocate import Options, allocate, choices, form_all_groups
from quant.artefact import FILE, Quantizers, load_quantizers
from quant.grouping import are_groups, form_groups, rotary_pairs, units_of
from quant.mixed import MixedQuantizer
from quant.quantizer import code_bits
from quant.scheme import Scheme
from quant.simulate import simulated

KINDS = ("key", "value")


def random_costs(seed: int, channels: int, widths: int = 4) -> np.ndarray:
    """Errors that fall with the width at rates of their own, and bits at a price."""
    draw = np.random.default_rng(seed)
    size, rate = np.exp(3 * draw.normal(size=channels)), draw.uniform(2, 8, channels)
    return size * rate ** -np.arange(widths)[:, None] + 0.3 * np.arange(widths)[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_groups_hold_every_channel_once_and_pairs_together(kind: str, dim: int) -> None:
    for half in (dim // 2, dim // 4, 8):
        units = units_of(kind, 2, dim, half)  # type: ignore[arg-type]
        places = form_groups(random_costs(0, 2 * dim), units)
        assert np.array_equal(np.sort(places, axis=1), np.arange(2 * dim).reshape(2, dim))
        assert are_groups(places % dim, units[0])
        if kind == "key":
            partner = dict(rotary_pairs(dim, half).tolist())
            first, second = (places % dim).reshape(2, -1, 2, 16).swapaxes(0, 2)[:2].reshape(2, -1)
            assert [partner[channel] for channel in first] == second.tolist()


@pytest.mark.parametrize(("kind", "dim", "half"), [("value", 48, 24), ("key", 24, 12), ("key", 64, None)])
def test_where_groups_do_not_fit_channels_have_their_own_widths(kind: Any, dim: int, half: int | None) -> None:
    assert units_of(kind, 2, dim, half) is None


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_hardly_dearer_than_the_best(kind: str, monkeypatch) -> None:
    """Groups of 2 units, of which every partition can be tried."""
    monkeypatch.setattr(grouping, "GROUP_CHANNELS", 2)
    units = rotary_pairs(12, 6)[None] if kind == "key" else np.arange(6)[None, :, None]

    def total(costs: np.ndarray, order: Sequence[int]) -> float:
        return float(costs[:, units[0][list(order)].reshape(3, 2, -1)].sum(2).min(0).sum())

    draws = [random_costs(seed, units.size) for seed in range(8)]
    best = sum(min(total(costs, order) for order in permutations(range(6))) for costs in draws)
    groups = [form_groups(costs, units).reshape(-1, 2) for costs in draws]
    found = sum(costs[:, group].sum(-1).min(0).sum() for costs, group in zip(draws, groups, strict=True))
    assert found <= 1.005 * best
    assert sum(total(costs, range(6)) for costs in draws) > 1.02 * best


def test_allocation_to_groups_keeps_the_budget_and_beats_one_width() -> None:
    sides = [(kind, random_costs(seed, 128, 5) - 0.3 * np.arange(5)[:, None]) for seed in range(4) for kind in KINDS]
    bits = np.broadcast_to(np.arange(5.0)[:, None, None], (5, 1, 128))
    options = [Options(error[:, None], bits) for _, error in sides]
    places = form_all_groups(options, 2.0, [units_of(kind, 2, 64, 32) for kind, _ in sides])  # type: ignore[arg-type]
    chosen = allocate(options, 2.0, places)
    assert 2.0 - 5 * 16 / (8 * 128) <= np.concatenate(chosen).mean() <= 2.0
    for choice, own in zip(chosen, places, strict=True):
        assert own is not None
        widths = choice[own].reshape(-1, 16)
        assert (widths == widths[:, :1]).all()

    def error(choices: Sequence[np.ndarray]) -> float:
        each = zip(options, choices, strict=True)
        return sum(one.error[choice, 0, np.arange(128)].sum() for one, choice in each)

    natural = allocate(options, 2.0, [np.arange(128).reshape(2, 64)] * 8)
    assert error(allocate(options, 2.0)) < error(chosen) < 0.5 * error(natural)
    assert error(chosen) < 0.2 * error([np.full(128, 2)] * 8)


@pytest.mark.parametrize(
    ("name", "widest"),
    [
        ("rdnuq2.4", 4),
        ("rdnuq3.5", 4),
        ("rdnuq3.6", 6),
        ("rdnuq4.4", 6),
        ("rdnuq4.4-4%", 4),
        ("rdnuq4.4-0.5%", 6),
        ("rdnuq2g1", 6),
    ],
)
def test_groups_are_as_wide_as_the_kernel_reads_where_the_budget_allows_it(name: str, widest: int) -> None:
    widths, shares = choices(Scheme.parse(name))
    assert widths == tuple(range(widest + 1))
    assert max(shares) <= (Scheme.parse(name).outliers or 0.08)


@pytest.fixture(scope="module", params=["rdnuq2.5", "rdnuq2.5+fb", "rdnuq2.5-4%", "rdnuq2.5-0.5%+fb"])
def fitted(request, wide, fit_model) -> Quantizers:
    return fit_model(wide, Scheme.parse(request.param))


def test_what_is_fitted_is_grouped_and_within_the_budget(fitted) -> None:
    bits = 0
    for sides in fitted.layers.values():
        for kind, quantizer in sides.items():
            assert isinstance(quantizer, MixedQuantizer) and quantizer.places is not None
            assert are_groups(quantizer.places.numpy(), units_of(kind, 2, 64, 32)[0])
            bits += code_bits(quantizer, 128)
    # two layers of eight groups a side: what a group more or less makes
    assert 2.5 - 0.35 <= bits / (4 * 128) <= 2.5 + 1e-9


def test_saved_and_loaded_is_the_same(fitted, tmp_path) -> None:
    fitted.save(tmp_path / "q.safetensors")
    loaded = load_quantizers(tmp_path / "q.safetensors")
    assert loaded.scheme == fitted.scheme
    for layer, sides in fitted.layers.items():
        for kind, quantizer in sides.items():
            tables = loaded.layers[layer][kind].tables
            assert tables.keys() == quantizer.tables.keys() >= {"places"}
            assert all(torch.equal(table, tables[name]) for name, table in quantizer.tables.items())


def swapped(table: Tensor, one: int, other: int) -> Tensor:
    changed = table.clone()
    changed[0, one], changed[0, other] = table[0, other], table[0, one]
    return changed


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ("key", lambda places: torch.cat([places[:, :1], places[:, :1], places[:, 2:]], dim=1), "no permutation"),
        ("key", lambda places: swapped(places, 0, 1), "no permutation"),  # two channels leave their partners
        ("value", lambda places: places + 1, "no permutation"),
        ("value", lambda places: places.flip(1).roll(8, 1), "differ in width"),
    ],
)
def test_another_permutation_is_refused(wide, fit_model, tmp_path, place: str, change: Any, said: str) -> None:
    """Even if the file is otherwise in order: rewritten with its digest."""
    fit_model(wide, Scheme.parse("rdnuq2.5")).save(tmp_path / "good.safetensors")
    tensors = load_file(tmp_path / "good.safetensors")
    with open_checked(tmp_path / "good.safetensors", FILE) as file:
        content = {name: value for name, value in file.content.items() if name not in ("schema", "digest", "tensors")}
    name = f"layers.1.{place}.places"
    tensors[name] = change(tensors[name])
    write_checked(tmp_path / "bad.safetensors", FILE, content, tensors)
    with pytest.raises(UserError, match=rf"{name}.*{said}"):
        load_quantizers(tmp_path / "bad.safetensors")


def test_rdnuq_of_before_groups_loads_as_widths_of_channels(wide, fit_model, tmp_path) -> None:
    """Such a file has no `groups` in its scheme, says nothing of outliers, and has no places."""
    fit_model(wide, Scheme.parse("rdnuq2.5g1-4%")).save(tmp_path / "now.safetensors")
    tensors = load_file(tmp_path / "now.safetensors")
    assert not any(name.endswith("places") for name in tensors)
    with open_checked(tmp_path / "now.safetensors", FILE) as file:
        content = {name: value for name, value in file.content.items() if name not in ("schema", "digest", "tensors")}
    content["scheme"] = {name: value for name, value in content["scheme"].items() if name != "groups"} | {
        "outliers": 0.0
    }
    write_checked(tmp_path / "before.safetensors", FILE, content, tensors)
    now, before = (load_quantizers(tmp_path / f"{name}.safetensors") for name in ("now", "before"))
    assert before.scheme == now.scheme == Scheme.parse("rdnuq2.5", groups=1, outliers=0.04)
    x = torch.randn(40, 128)
    for kind in KINDS:
        one, other = (one.layers[1][kind] for one in (now, before))  # type: ignore[index]
        assert torch.equal(one.decode(one.encode(x)), other.decode(other.encode(x)))


@pytest.mark.parametrize("chunk", [40, 1])
def test_packed_is_simulated(wide, fitted, make_tokens, chunk: int) -> None:
    ids = make_tokens(1, 120, seed=3)
    with simulated(wide, fitted) as usage:
        expected = wide(input_ids=ids, use_cache=False).logits
    cache = PackedCache(fitted, wide.config, capacity=120, exact_chunk=False)
    with packed_attention(wide):
        parts = [wide(input_ids=part, past_key_values=cache).logits for part in ids.split(chunk, 1)]
    assert all(isinstance(layer.packed[kind].order, GroupOrder) for layer in cache.layers for kind in KINDS)
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-3 * expected.abs().max()
    if not fitted.scheme.outliers:  # the last block is counted whole by both
        assert usage.size.bits == 8 * cache.nbytes()
        planned = sum(ModelShape.of(wide.config).cache_bytes(fitted.scheme, 120).values())
        assert planned == pytest.approx(cache.nbytes(), rel=0.15) and planned >= cache.nbytes()


@pytest.mark.skipif(not kernels_on_cpu.has_compiler(), reason="no C++ compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel itself runs")
def test_the_decode_kernel_reads_groups(wide, fit_model, make_tokens) -> None:
    """A step by decode.cu, as host C++, gives what the torch path gives."""
    for name in ("rdnuq2.5", "rdnuq2.5-4%"):
        layer = fit_model(wide, Scheme.parse(name)).layers[1]
        taken: list[bool] = []

        def attend(*arguments: Any) -> Tensor:
            query, _, segments, rotary, _, kv_heads = arguments
            taken.append(host.fits(query, segments, rotary, kv_heads))  # noqa: B023
            return kernels_on_cpu.attend(*arguments)

        assert run_case(lengths=(150, 70), given=(layer["key"], layer["value"]), attend=attend) < 2e-3
        assert taken == [True]


@pytest.mark.parametrize("new", [1, 9])
def test_the_general_kernels_read_groups(wide, fit_model, new: int) -> None:
    """With widths that decode.cu has no words for, too."""
    layer = fit_model(wide, Scheme.parse("rdnuq4.5")).layers[1]
    assert run_case(lengths=(70,), new=new, given=(layer["key"], layer["value"])) < 2e-3


def test_keys_that_rotate_otherwise_are_stored_by_channel(wide, fit_model) -> None:
    key = fit_model(wide, Scheme.parse("rdnuq2.5")).layers[1]["key"]
    orders = [PackedTensor(key, 1, 2, 64, torch.device("cpu"), "key", half).order for half in (32, 16)]
    assert isinstance(orders[0], GroupOrder) and isinstance(orders[1], ChannelOrder)


def test_partly_rotated_heads_are_grouped_in_their_pairs(wide) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    half = replace(Fingerprint.of(wide.config), rope=str(rope).replace("'", '"')).rotary_half
    assert half == 16
    places = form_groups(random_costs(1, 128), units_of("key", 2, 64, half))  # type: ignore[arg-type]
    assert are_groups(places % 64, rotary_pairs(64, 16)) and not are_groups(places % 64, rotary_pairs(64, 32))
