"""`quantizers.safetensors`: equality after loading, refusals, and writes that fail half way."""

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gradients.checked
from gradients.checked import checksum, digest_of
from gradients.cli import UserError
from quant.artefact import Quantizers, load_quantizers
from quant.fit import fit
from quant.presets import PRESETS
from quant.scheme import Form, Scheme

SCHEMES = [
    Scheme.parse("int4"),
    Scheme.parse("nf3-1%"),
    Scheme.parse("nuq2-1%", q_norm=True, sink_tokens=5),
    Scheme.parse("nuq3-0.5%", key_axis="token", value_axis="channel", outlier_cap=3, weights="fisher"),
    Scheme.parse("nuq3-2%", key_rope="post"),
    Scheme.parse("nuq3-2%", thresholds="matrix"),
    Scheme.parse("int3-2%", thresholds="matrix", key_axis="token"),
    Scheme.parse("nuq2-10%", channel_range="online", value_axis="channel"),
    Scheme.parse("nf3", group=8),
    Scheme.parse("rdnuq2.4"),
    Scheme.parse("nuq2-1%+fb"),
    Scheme.parse("rdnuq2.4+fb"),
    Scheme.parse("lloyd2"),
    *(Scheme.parse(f"{preset}3") for preset in PRESETS),
]


def assert_same(one: Quantizers, other: Quantizers) -> None:
    assert (one.scheme, one.fingerprint, one.records_digest) == (other.scheme, other.fingerprint, other.records_digest)
    assert one.layers.keys() == other.layers.keys()
    for layer, sides in one.layers.items():
        assert sides.keys() == other.layers[layer].keys()
        for kind, quantizer in sides.items():
            twin = other.layers[layer][kind]
            assert type(twin) is type(quantizer)
            assert twin.scheme == quantizer.scheme
            assert twin.tables.keys() == quantizer.tables.keys()
            for name, table in quantizer.tables.items():
                assert torch.equal(twin.tables[name], table), (layer, kind, name)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """Copy an artefact with `change` applied to its tensors and metadata, and the digest that belongs to it."""
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        content = json.loads(file.metadata()["kvquant"])
    change(tensors, content)
    if content.get("digest"):
        content["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        content["digest"] = digest_of(content)
    save_file(tensors, target, metadata={"kvquant": json.dumps(content)})
    return target


def as_schema_1(_tensors: object, content: dict[str, Any]) -> None:
    """What the metadata were before there were digests."""
    content["schema"] = 1
    for name in ("digest", "checksums", "weights", "bos"):
        del content[name]


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_load_gives_back_what_was_saved(scheme: Scheme, records, tmp_path) -> None:
    fitted = fit(records, scheme)
    fitted.save(tmp_path / "q.safetensors")
    loaded = load_quantizers(tmp_path / "q.safetensors")
    assert_same(loaded, fitted)
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)) * 2
    for layer, sides in fitted.layers.items():
        for kind, quantizer in sides.items():
            twin = loaded.layers[layer][kind]
            decoded = quantizer.decode(quantizer.encode(x))
            assert torch.equal(twin.decode(twin.encode(x)), decoded), (layer, kind)
            assert not torch.equal(decoded, x)


def test_the_list_above_has_every_form() -> None:
    forms = {scheme.form(axis) for scheme in SCHEMES for axis in (scheme.key_axis, scheme.value_axis)}
    assert forms == set(get_args(Form))


@pytest.mark.parametrize(
    ("scheme", "key", "value"),
    [
        (Scheme.parse("turbo2"), {"rotation"}, {"rotation"}),
        (Scheme.parse("kivi2"), set(), set()),
        (Scheme.parse("datafree2"), set(), set()),
        (Scheme.parse("nuq2-1%", thresholds="matrix"), {"scale", "zero"}, {"thresholds"}),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else "",
)
def test_what_is_stored_beside_the_codebook(scheme: Scheme, key: set[str], value: set[str], records, tmp_path) -> None:
    fit(records, scheme).save(tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {
        f"layers.{layer}.{kind}.{name}"
        for layer in (0, 1)
        for kind, more in (("key", key), ("value", value))
        for name in more | {"levels", "boundaries"}
    }


@pytest.mark.parametrize(
    ("scheme", "name", "shape"),
    [
        pytest.param(Scheme.parse("turbo2"), "layers.1.key.rotation", (24, 24), id="rotation of all channels"),
        pytest.param(
            Scheme.parse("nuq2-1%", thresholds="matrix"), "layers.0.value.thresholds", (24, 2), id="thresholds"
        ),
        pytest.param(Scheme.parse("kivi2"), "layers.0.key.levels", (8,), id="levels of groups"),
    ],
)
def test_tables_of_another_shape_are_refused(
    scheme: Scheme, name: str, shape: tuple[int, ...], records, tmp_path
) -> None:
    fit(records, scheme).save(tmp_path / "good.safetensors")
    path = rewrite(
        tmp_path / "good.safetensors", tmp_path / "q.safetensors", lambda t, _m: t.update({name: torch.zeros(shape)})
    )
    with pytest.raises(UserError) as caught:
        load_quantizers(path)
    assert f"tensor {name} of shape {shape}" in str(caught.value) and "fit them again" in str(caught.value)
    path = rewrite(tmp_path / "good.safetensors", path, lambda t, _m: t.pop(name))
    with pytest.raises(UserError, match=f"lacks tensor {name}; fit them again"):
        load_quantizers(path)


def test_a_file_written_before_these_fields_loads_with_a_note(quantizers, quantizers_file, tmp_path, capsys) -> None:
    """As files were before there were groups, ranges, thresholds and windows to choose, and digests."""

    def without(_tensors: object, content: dict[str, Any]) -> None:
        as_schema_1(_tensors, content)
        for field in ("channel_range", "group", "thresholds", "residual_tokens"):
            del content["scheme"][field]

    loaded = load_quantizers(rewrite(quantizers_file, tmp_path / "q.safetensors", without))
    assert_same(loaded, quantizers)
    assert (loaded.weights, loaded.bos) == ("", None)
    assert "q.safetensors' is of an older version" in capsys.readouterr().err
    load_quantizers(quantizers_file)
    assert capsys.readouterr().err == ""


def test_layers_and_sides_may_depart_from_the_scheme(records, tmp_path) -> None:
    three, two, four = (fit(records, Scheme.parse(name)) for name in ("nuq3-1%", "nuq2", "int4-2%"))
    mixed = Quantizers(
        scheme=three.scheme,
        fingerprint=three.fingerprint,
        records_digest=three.records_digest,
        layers={
            0: {"key": four.layers[0]["key"], "value": three.layers[0]["value"]},
            1: {"key": three.layers[1]["key"], "value": two.layers[1]["value"]},
        },
    )
    mixed.save(tmp_path / "q.safetensors")
    loaded = load_quantizers(tmp_path / "q.safetensors")
    assert_same(loaded, mixed)
    assert str(loaded.layers[0]["key"].scheme) == "int4-2%"
    assert str(loaded.layers[1]["value"].scheme) == "nuq2"


def test_equal_quantizers_make_equal_files(quantizers, quantizers_file, tmp_path) -> None:
    quantizers.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == quantizers_file.read_bytes()


def test_the_file_is_named_tensors_and_one_json_object(quantizers, quantizers_file) -> None:
    with safe_open(quantizers_file, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    key, value = ["levels", "boundaries", "scale", "zero"], ["levels", "boundaries"]
    assert names == {f"layers.{i}.key.{name}" for i in (0, 1) for name in key} | {
        f"layers.{i}.value.{name}" for i in (0, 1) for name in value
    }
    content = json.loads(metadata["kvquant"])
    assert content["schema"] == 2
    assert content["scheme"] == quantizers.scheme.to_json()
    assert content["records"] == quantizers.records_digest
    assert content["fingerprint"]["architecture"] == "llama"
    assert set(content["versions"]) >= {"torch", "transformers"}


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_never_unpickled(form: str, tmp_path) -> None:
    witness, path = tmp_path / "unpickled", tmp_path / "quantizers.pickle"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(witness)))
    else:
        torch.save(Payload(witness), path)
    with pytest.raises(UserError) as caught:
        load_quantizers(path)
    assert not witness.exists()
    assert str(path) in str(caught.value)
    assert "pickles are never loaded" in str(caught.value)
    assert "python -m quant.fit" in str(caught.value)
    # the payload is a real one
    if form == "pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False).close()
    assert witness.exists()


def test_a_file_of_something_else_or_none_is_refused(tmp_path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, message in (
        ("none.safetensors", r"none.safetensors' cannot be read .*`python -m quant.fit`"),
        (".", "python -m quant.fit"),
        ("model.safetensors", r"model.safetensors' lacks our metadata"),
    ):
        with pytest.raises(UserError, match=message):
            load_quantizers(tmp_path / name)


def _spoil(tensors: dict[str, torch.Tensor], name: str, index: int, value: float) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name][index] = value


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "other schema": (lambda _t, m: m.update(schema=99), "schema 99, this version reads 2; fit them again"),
    "no schema": (lambda _t, m: m.pop("schema"), "was altered"),
    "missing tensor": (lambda t, _m: t.pop("layers.1.key.zero"), "lacks tensor layers.1.key.zero; fit them again"),
    "missing layer": (
        lambda t, _m: [t.pop(n) for n in list(t) if n.startswith("layers.1.")],
        "lacks tensor layers.1.key",
    ),
    "wrong shape": (lambda t, _m: t.update({"layers.0.key.scale": torch.ones(7)}), "layers.0.key.scale of shape (7,)"),
    "wrong dtype": (
        lambda t, _m: t.update({"layers.0.key.scale": torch.ones(24).half()}),
        "dtype float16, expected (24,) float32",
    ),
    "NaN": (lambda t, _m: _spoil(t, "layers.0.key.zero", 3, float("nan")), "layers.0.key.zero"),
    "other bits": (lambda _t, m: m["scheme"].update(bits=2), "levels of shape (8,)"),
    "unknown field": (lambda _t, m: m["scheme"].update(rotation="hadamard"), "'rotation' is unknown"),
    "levels not ascending": (lambda t, _m: _spoil(t, "layers.0.value.levels", 0, 9.0), "q.safetensors"),
    "no scheme": (lambda _t, m: m.pop("scheme"), "q.safetensors"),
    "a table too many": (lambda t, _m: t.update({"layers.0.value.scale": torch.ones(24)}), "which it should not"),
    "a field left out": (lambda _t, m: m["scheme"].pop("outliers"), "field 'outliers' is missing"),
    "a field of another type": (lambda _t, m: m["scheme"].update(sink_tokens="1"), "field 'sink_tokens' is '1'"),
    "fingerprint of another form": (lambda _t, m: m.update(fingerprint={"layers": 2}), "q.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_another_form_is_refused(damage: str, quantizers_file, tmp_path) -> None:
    change, fragment = DAMAGES[damage]
    path = rewrite(quantizers_file, tmp_path / "q.safetensors", change)
    with pytest.raises(UserError) as caught:
        load_quantizers(path)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "content", ['{"scheme":' + "[" * 100_000, "[" * 100_000 + "]" * 100_000], ids=["in a field", "alone"]
)
def test_json_nested_deeply_is_one_line(content: str, tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "q.safetensors", metadata={"kvquant": content})
    with pytest.raises(UserError, match="q.safetensors' is damaged"):
        load_quantizers(tmp_path / "q.safetensors")


def test_check_model_names_the_difference(quantizers, llama, make_model) -> None:
    quantizers.check_model(llama.config)
    with pytest.raises(UserError, match="fitted for another model: architecture 'llama' against 'qwen2'"):
        quantizers.check_model(make_model("qwen2").config)
    with pytest.raises(UserError, match="heads 2 against 4"):
        quantizers.check_model(make_model("llama-yarn-mha").config)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (OSError(errno.EDQUOT, "Quota exceeded"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug"), RuntimeError),
    ],
    ids=["disk full", "over quota", "interrupted", "a bug"],
)
def test_a_write_that_fails_half_way_leaves_what_was_there(
    failure: BaseException, raised: type[BaseException], quantizers, snapshot, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "q.safetensors"
    quantizers.save(path)
    before = snapshot(tmp_path)

    def half(_tensors: object, target: Path, **_options: object) -> None:
        Path(target).write_bytes(b"half an artef")
        raise failure

    monkeypatch.setattr(gradients.checked, "save_file", half)
    with pytest.raises(raised):
        quantizers.save(path)
    assert snapshot(tmp_path) == before


def test_an_earlier_artefact_is_replaced_in_one_step(quantizers, tmp_path) -> None:
    """A reader that has the old file open keeps it whole: the new one takes its name, not its bytes."""
    path = tmp_path / "q.safetensors"
    quantizers.with_exact(sink_tokens=3).save(path)
    earlier = path.read_bytes()
    with open(path, "rb") as reader:
        quantizers.save(path)
        assert reader.read() == earlier
    assert load_quantizers(path).scheme == quantizers.scheme


def test_saving_makes_missing_folders(quantizers, tmp_path) -> None:
    quantizers.save(tmp_path / "new" / "folder" / "q.safetensors")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["q.safetensors"]


@pytest.mark.parametrize("place", ["a folder", "below a file"])
def test_a_place_that_cannot_be_written_is_refused(place: str, quantizers, tmp_path) -> None:
    (tmp_path / "file").write_text("earlier")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" if place == "a folder" else tmp_path / "file" / "q.safetensors"
    with pytest.raises(UserError, match="cannot write"):
        quantizers.save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "earlier"
