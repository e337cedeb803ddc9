"""The methods of others: their fields by name, names that survive a round trip, options that change only what is given."""

import argparse
import ast
import json
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployment.cache import PackedCache
from gradients.cli import UserError
from quant.fit import fit
from quant.options import add_scheme_arguments, scheme_from
from quant.presets import PRESETS
from quant.scheme import Scheme
from quant.simulate import simulated

NAMES = list(PRESETS)
# those of a scheme without a preset are in tests/test_quant_scheme.py
FIELDS = {
    "atom": {"datatype": "int", "key_axis": "token", "value_axis": "token", "group": 128, "key_rope": "post"},
    "flexgen": {"datatype": "int", "key_axis": "token", "value_axis": "token", "group": 64, "key_rope": "post"},
    "kivi": {
        "datatype": "int",
        "key_axis": "channel",
        "value_axis": "token",
        "channel_range": "online",
        "group": 32,
        "key_rope": "post",
        "residual_tokens": 128,
    },
    "turbo": {"datatype": "lloyd", "key_rope": "post"},
    "datafree": {"datatype": "nf", "key_axis": "channel", "channel_range": "online", "outliers": 0.02},
}

options = st.fixed_dictionaries(
    {},
    optional={
        "outliers": st.integers(0, 1000).map(lambda hundredths: float(f"{hundredths / 100:g}") / 100),
        "sink_tokens": st.integers(0, 99),
        "q_norm": st.booleans(),
        "weights": st.sampled_from(["fisher*s^2", "fisher", "none"]),
        "key_axis": st.sampled_from(["channel", "token"]),
        "value_axis": st.sampled_from(["channel", "token"]),
        "channel_range": st.sampled_from(["offline", "online"]),
        "group": st.none() | st.integers(2, 256),
        "key_rope": st.sampled_from(["pre", "post"]),
        "thresholds": st.sampled_from(["vector", "matrix"]),
        "outlier_cap": st.none() | st.integers(0, 99),
        "residual_tokens": st.integers(0, 300),
    },
)


def spoken(description: str) -> Scheme:
    """The scheme that a description describes."""
    name, *departures = description.split(" ")
    fields: dict[str, Any] = {}
    for departure in departures:
        field, value = departure.split("=")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value
    return Scheme.parse(name, **fields)


def parsed(*arguments: str, name: str) -> Scheme:
    """A name with options as a command line has them."""
    parser = argparse.ArgumentParser()
    add_scheme_arguments(parser, named=False)
    return scheme_from(name, parser.parse_args(arguments))


def test_every_preset_is_tested() -> None:
    assert list(FIELDS) == NAMES


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_fields(name: str, bits: int) -> None:
    expected = Scheme(**{"bits": bits, **FIELDS[name]})
    assert Scheme.parse(f"{name}{bits}") == expected
    assert expected.describe() == f"{name}{bits}"
    assert expected.sink_tokens == 1


@pytest.mark.parametrize(
    ("scheme", "description"),
    [
        (Scheme.parse("kivi2", residual_tokens=0), "kivi2 residual_tokens=0"),
        (Scheme.parse("kivi2", group=64), "kivi2 group=64"),
        (Scheme.parse("int2", group=64, key_axis="token", key_rope="post"), "flexgen2"),
        (Scheme.parse("nuq2", key_axis="token", key_rope="post"), "nuq2 key_axis=token key_rope=post"),
        (Scheme.parse("atom4", group=64), "flexgen4"),
        (Scheme.parse("lloyd4"), "lloyd4"),
        (Scheme.parse("turbo4", key_rope="pre"), "lloyd4"),
        (Scheme.parse("lloyd4", key_rope="post"), "turbo4"),
        (Scheme.parse("datafree4", outliers=0.01), "nf4-1% channel_range=online"),
        (Scheme.parse("nf4-2%", channel_range="online"), "datafree4"),
        (Scheme.parse("nf4-2%"), "nf4-2%"),
        (Scheme.parse("rdnuq2.4", key_rope="post"), "rdnuq2.4 key_rope=post"),
        (Scheme.parse("rdnuq2.4", groups=1, outliers=0.04, feedback=True), "rdnuq2.4g1-4%+fb"),
        (Scheme.parse("rdnuq2.4-0.5%", groups=16), "rdnuq2.4-0.5%"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_shortest_description_is_chosen(scheme: Scheme, description: str) -> None:
    assert scheme.describe() == description
    assert spoken(description) == scheme


@settings(max_examples=40)
@given(st.sampled_from([*NAMES, "int", "nf", "nuq", "rdnuq", "lloyd"]), st.integers(1, 8), options)
def test_whatever_is_described_is_understood(name: str, bits: int, fields: dict[str, Any]) -> None:
    try:
        scheme = Scheme.parse(f"{name}{bits}", **fields)
    except UserError:
        assume(False)
    assert spoken(scheme.describe()) == scheme
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


@pytest.mark.parametrize(
    ("name", "share"), [("datafree3", 0.02), ("datafree3-1%", 0.01), ("datafree3-0%", 0.0), ("kivi3-1%", 0.01)]
)
def test_a_share_of_outliers_in_the_name_replaces_the_presets(name: str, share: float) -> None:
    scheme = Scheme.parse(name)
    assert scheme.outliers == share
    assert scheme.channel_range == "online"
    assert spoken(scheme.describe()) == scheme


@pytest.mark.parametrize("name", [*(f"{name}2" for name in NAMES), "nuq3-1%", "rdnuq2.4"])
def test_options_that_are_not_given_change_nothing(name: str) -> None:
    assert parsed(name=name) == Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "arguments", "fields"),
    [
        ("kivi2", ["--group", "64"], {"group": 64}),
        ("kivi2", ["--residual-tokens", "0"], {"residual_tokens": 0}),
        ("kivi2", ["--residual-tokens", "0", "--key-rope", "pre"], {"residual_tokens": 0, "key_rope": "pre"}),
        ("kivi2", ["--sink-tokens", "0"], {"sink_tokens": 0}),
        ("atom4", ["--key-axis", "channel", "--channel-range", "offline"], {"key_axis": "channel"}),
        ("nuq3-1%", ["--thresholds", "matrix"], {"thresholds": "matrix"}),
        ("nuq3-1%", ["--q-norm", "--weights", "none"], {"q_norm": True, "weights": "none"}),
        ("nuq3-1%", ["--no-q-norm", "--outlier-cap", "0"], {"outlier_cap": 0}),
        (
            "datafree4",
            ["--channel-range", "offline", "--value-axis", "channel"],
            FIELDS["datafree"] | {"channel_range": "offline", "value_axis": "channel"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "" if isinstance(value, dict) else value,
)
def test_options_change_what_they_name(name: str, arguments: list[str], fields: dict[str, Any]) -> None:
    assert parsed(*arguments, name=name) == Scheme.parse(name).with_changes(**fields)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--group", "0"],
        ["--group", "many"],
        ["--residual-tokens", "-1"],
        ["--key-rope", "both"],
        ["--channel-range", ""],
    ],
    ids=" ".join,
)
def test_options_of_another_form_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments, name="nuq3")
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_none_looks_at_calibration_data(name: str, records) -> None:
    """All windows or one, the tables are the same."""
    scheme = Scheme.parse(f"{name}3")
    one, other = fit(records, scheme), fit(records.first(1), scheme)
    for layer, sides in one.layers.items():
        for kind, quantizer in sides.items():
            tables = other.layers[layer][kind].tables
            assert all(torch.equal(table, tables[which]) for which, table in quantizer.tables.items())


@pytest.mark.parametrize("name", NAMES)
def test_more_bits_stay_closer_to_the_model(name: str, llama, fit_model, make_tokens) -> None:
    """Groups and windows small enough for 65 tokens."""
    changes = {"kivi": {"group": 8, "residual_tokens": 8}, "atom": {"group": 16}, "flexgen": {"group": 8}}
    ids = make_tokens(1, 65, seed=4)
    distances = []
    with torch.no_grad():
        plain = llama(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for bits in (2, 4):
            with simulated(llama, fit_model(llama, Scheme.parse(f"{name}{bits}", **changes.get(name, {})))):
                quantized = llama(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            distances.append(float((plain.exp() * (plain - quantized)).sum(-1).mean()))
    assert distances[0] > 2 * distances[1] > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4", {"key_rope": "post"}),
        ("nuq4-1%", {"thresholds": "matrix"}),
        ("nuq4", {"group": 8}),
        ("kivi2", {}),
        ("turbo4", {}),
        ("datafree4", {}),
    ],
)
def test_the_packed_cache_refuses_what_it_cannot_hold(name: str, options: dict[str, Any], records, llama) -> None:
    with pytest.raises(UserError, match="exists in simulation only"):
        PackedCache(fit(records, Scheme.parse(name, **options)), llama.config)
