"""Scheme strings: round trips and refusals."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradients.cli import UserError
from quant.scheme import Scheme

shares = st.integers(0, 1000).map(lambda hundredths: f"{hundredths / 100:g}")
names = st.builds(
    lambda datatype, bits, share: f"{datatype}{bits}" + (f"-{share}%" if share != "0" else ""),
    st.sampled_from(["int", "nf", "nuq"]),
    st.integers(1, 8),
    shares,
)
options = st.fixed_dictionaries(
    {},
    optional={
        "sink_tokens": st.integers(0, 99),
        "q_norm": st.booleans(),
        "weights": st.sampled_from(["fisher*s^2", "fisher", "none"]),
        "key_axis": st.sampled_from(["channel", "token"]),
        "value_axis": st.sampled_from(["channel", "token"]),
        "outlier_cap": st.none() | st.integers(0, 99),
    },
)


@given(names)
def test_parse_and_str_are_inverse(name: str) -> None:
    assert str(Scheme.parse(name)) == name


@given(names, options)
def test_json_round_trip(name: str, fields: dict[str, Any]) -> None:
    scheme = Scheme.parse(name, **fields)
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_parse_reads_every_part() -> None:
    scheme = Scheme.parse("nuq3-1%", sink_tokens=5)
    assert (scheme.datatype, scheme.bits, scheme.outliers, scheme.sink_tokens) == ("nuq", 3, 0.01, 5)
    assert scheme.levels == 8
    assert Scheme.parse("int4").outliers == 0


def test_defaults_are_the_papers() -> None:
    scheme = Scheme(datatype="nuq", bits=4)
    assert (scheme.key_axis, scheme.value_axis, scheme.key_rope) == ("channel", "token", "pre")
    assert (scheme.weights, scheme.sink_tokens, scheme.q_norm, scheme.outlier_cap) == ("fisher*s^2", 1, False, None)


def test_describe_names_departures_only() -> None:
    assert Scheme.parse("nf4-0.5%").describe() == "nf4-0.5%"
    assert Scheme.parse("nuq2-1%", sink_tokens=5, q_norm=True).describe() == "nuq2-1% sink_tokens=5 q_norm=True"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nuq",
        "3",
        "nuq3-",
        "nuq3-1",
        "nuq3-%",
        "NUQ3",
        " nuq3",
        "nuq3 ",
        "nuq3-1%-2%",
        "nuq-3",
        "nuq3--1%",
        "nuq3\n",
    ],
)
def test_refuses_names_of_another_form(name: str) -> None:
    with pytest.raises(UserError) as caught:
        Scheme.parse(name)
    assert repr(name) in str(caught.value)
    assert "nuq3-1%" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "fragments"),
    [
        ("fp4", {}, ["datatype", "'fp'", "int, nf, nuq"]),
        ("nuq0", {}, ["bits 0", "1-8"]),
        ("nuq9", {}, ["bits 9", "1-8"]),
        ("nuq3-11%", {}, ["11.00%", "0-10%"]),
        ("nuq3", {"sink_tokens": -1}, ["sink_tokens -1"]),
        ("nuq3", {"outlier_cap": -2}, ["outlier_cap -2"]),
        ("nuq3", {"key_axis": "row"}, ["key_axis", "'row'", "channel, token"]),
        ("nuq3", {"value_axis": "row"}, ["value_axis", "'row'", "channel, token"]),
        ("nuq3", {"weights": "hessian"}, ["weights", "'hessian'", "fisher*s^2, fisher, none"]),
        ("nuq3", {"key_rope": "both"}, ["key_rope", "'both'", "pre, post"]),
    ],
)
def test_refuses_values_out_of_range(name: str, fields: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Scheme.parse(name, **fields)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_refuses_unknown_json_fields() -> None:
    with pytest.raises(UserError, match="'rotation' is unknown"):
        Scheme.from_json(Scheme.parse("nuq3").to_json() | {"rotation": "hadamard"})


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Scheme.parse("nuq3").bits = 4  # type: ignore[misc]
