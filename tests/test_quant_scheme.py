"""Scheme strings: round trips and refusals."""

import json
from typing import Any

import pytest

from gradients.cli import UserError
from quant.scheme import Scheme


def test_parse_reads_every_part() -> None:
    scheme = Scheme.parse("nuq3-1%", sink_tokens=5)
    assert (scheme.datatype, scheme.bits, scheme.outliers, scheme.sink_tokens) == ("nuq", 3, 0.01, 5)
    assert scheme.levels == 8
    assert Scheme.parse("int4").outliers == 0


def test_defaults_are_the_papers() -> None:
    scheme = Scheme(datatype="nuq", bits=4)
    assert (scheme.key_axis, scheme.value_axis, scheme.key_rope) == ("channel", "token", "pre")
    assert (scheme.weights, scheme.sink_tokens, scheme.q_norm, scheme.outlier_cap) == ("fisher*s^2", 1, False, None)
    assert (scheme.channel_range, scheme.thresholds, scheme.group, scheme.residual_tokens) == (
        "offline",
        "vector",
        None,
        0,
    )


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
        ("kivi", {}, ["'kivi'", "kivi", "BITS"]),
        ("KIVI2", {}, ["'KIVI2'", "atom|flexgen|kivi|turbo|datafree"]),
        ("kivi2.5", {}, ["bits 2.5", "not a whole number"]),
        ("nuq0", {}, ["bits 0", "1-8"]),
        ("nuq9", {}, ["bits 9", "1-8"]),
        ("rdnuq0.5", {}, ["bits 0.5", "1-8"]),
        ("nuq2.5", {}, ["bits 2.5", "not a whole number"]),
        ("nuq3-11%", {}, ["11.00%", "0-10%"]),
        ("nuq3", {"sink_tokens": -1}, ["sink_tokens -1"]),
        ("nuq3", {"outlier_cap": -2}, ["outlier_cap -2"]),
        ("nuq3", {"key_axis": "row"}, ["key_axis", "'row'", "channel, token"]),
        ("nuq3", {"value_axis": "row"}, ["value_axis", "'row'", "channel, token"]),
        ("nuq3", {"weights": "hessian"}, ["weights", "'hessian'", "fisher*s^2, fisher, none"]),
        ("nuq3", {"key_rope": "both"}, ["key_rope", "'both'", "pre, post"]),
        ("nuq3", {"channel_range": "static"}, ["channel_range", "'static'", "offline, online"]),
        ("nuq3", {"thresholds": "layer"}, ["thresholds", "'layer'", "vector, matrix"]),
        ("nuq3", {"group": 1}, ["group 1", "None for one range per vector"]),
        ("nuq3", {"group": 0}, ["group 0", "None for one range per vector"]),
        ("nuq3", {"residual_tokens": -1}, ["residual_tokens -1", "0 for none"]),
        ("lloyd2.5", {}, ["bits 2.5", "lloyd", "not a whole number"]),
        # what does not go together
        ("nuq3-1%", {"thresholds": "matrix", "group": 32}, ["thresholds=matrix", "drop group"]),
        ("nuq3-1%", {"thresholds": "matrix", "channel_range": "online"}, ["thresholds=matrix", "channel_range=online"]),
        ("kivi2", {"thresholds": "matrix"}, ["thresholds=matrix", "drop group and channel_range=online"]),
        ("lloyd3-1%", {}, ["lloyd3-1%", "drop -P%, q_norm and group"]),
        ("turbo3", {"q_norm": True}, ["lloyd3", "drop -P%, q_norm and group"]),
        ("turbo3", {"group": 32}, ["lloyd3", "drop -P%, q_norm and group"]),
        ("rdnuq2.4", {"q_norm": True}, ["rdnuq2.4", "drop q_norm and outlier_cap"]),
        ("rdnuq2.4-1%", {"outlier_cap": 3}, ["rdnuq2.4-1%", "drop q_norm and outlier_cap"]),
        ("rdnuq2.4", {"groups": 32}, ["groups 32", "16 channels, or with g1"]),
        ("rdnuq2.4g2", {}, ["groups 2", "16 channels, or with g1"]),
        ("nuq3", {"groups": 1}, ["groups 1", "other datatypes have none"]),
        # what would have no effect
        ("rdnuq2.4", {"group": 32}, ["group"]),
        ("rdnuq2.4", {"thresholds": "matrix"}, ["thresholds"]),
        ("rdnuq2.4", {"channel_range": "online"}, ["channel_range"]),
        ("rdnuq2.4", {"key_axis": "token"}, ["key_axis"]),
        ("turbo4", {"thresholds": "matrix"}, ["thresholds"]),
        ("turbo4", {"outlier_cap": 1}, ["outlier_cap"]),
        ("datafree4", {"outlier_cap": 1}, ["outlier_cap"]),
        ("int4", {"thresholds": "matrix"}, ["thresholds"]),
    ],
)
def test_refuses_values_out_of_range_and_combinations(name: str, fields: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Scheme.parse(name, **fields)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


FORMS = {
    "nuq3-1%": ({}, "static", "token", False),
    "int4": ({"key_axis": "token", "value_axis": "channel"}, "token", "static", False),
    "rdnuq2.4": ({}, "allocated", "allocated", False),
    "nuq3": ({"key_rope": "post"}, "static", "token", True),
    "nuq4-1%": ({"thresholds": "matrix"}, "static", "token", True),
    "nuq2-1%": ({"channel_range": "online"}, "grouped", "token", True),
    "nf2-1%": ({"channel_range": "online", "key_axis": "token"}, "token", "token", False),
    "int3": ({"group": 32}, "static", "grouped", True),
    "int2": ({"group": 32, "value_axis": "channel"}, "static", "static", False),
    "rdnuq3.4": ({"key_rope": "post"}, "allocated", "allocated", True),
    "lloyd4": ({}, "rotated", "rotated", True),
    "turbo4": ({}, "rotated", "rotated", True),
    "kivi2": ({}, "grouped", "grouped", True),
    "atom4": ({}, "grouped", "grouped", True),
    "flexgen3": ({"key_rope": "pre"}, "grouped", "grouped", True),
    "datafree4": ({}, "grouped", "token", True),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_and_whether_the_packed_cache_can_hold_it(name: str) -> None:
    fields, key, value, simulated_only = FORMS[name]
    scheme = Scheme.parse(name, **fields)
    assert (scheme.form(scheme.key_axis), scheme.form(scheme.value_axis)) == (key, value)
    assert scheme.simulated_only is simulated_only


def test_schemes_written_before_these_fields_still_load() -> None:
    """As files had it (commit eddd2f4) before there were groups, ranges, thresholds and windows to choose."""
    old = (
        '{"bits":3.0,"datatype":"nuq","key_axis":"channel","key_rope":"pre","outlier_cap":null,"outliers":0.01,'
        '"q_norm":false,"sink_tokens":5,"value_axis":"token","weights":"fisher*s^2"}'
    )
    assert Scheme.from_json(json.loads(old), old=True) == Scheme.parse("nuq3-1%", sink_tokens=5)


def test_refuses_unknown_json_fields() -> None:
    with pytest.raises(ValueError, match="'rotation' is unknown"):
        Scheme.from_json(Scheme.parse("nuq3").to_json() | {"rotation": "hadamard"})


@pytest.mark.parametrize("old", [False, True])
def test_requires_every_json_field(old: bool) -> None:
    content = Scheme.parse("nuq3-1%", sink_tokens=5).to_json()
    for name in content:
        rest = {field: value for field, value in content.items() if field != name}
        if name == "groups":  # of which what lacks it has its own: test_quant_grouping.py
            continue
        if old and name in ("channel_range", "group", "thresholds", "residual_tokens", "feedback"):
            continue
        with pytest.raises(ValueError, match=f"field '{name}' is missing"):
            Scheme.from_json(rest, old)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "3"},
        {"bits": True},
        {"bits": 10**400},
        {"sink_tokens": 1 << 64},
        {"sink_tokens": 1.5},
        {"q_norm": 1},
        {"q_norm": None},
        {"group": [1]},
        {"weights": 2},
    ],
    ids=str,
)
def test_requires_json_fields_of_their_type(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"field '{next(iter(change))}' is "):
        Scheme.from_json(Scheme.parse("nuq3").to_json() | change)
