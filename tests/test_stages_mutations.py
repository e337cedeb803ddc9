"""Files that were changed in any one way: refused with one line, or what they say is what was written.

Four kinds of files are mutated: records windows, manifests, quantizers and saved caches. A second property mutates their
metadata and gives them the digest that belongs to it, as another version of this program might: then nothing but a
`UserError` may come of it.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.text.saved import read_cache, save_cache
from gradients.checked import digest_of
from gradients.cli import UserError
from gradients.models import KINDS
from gradients.records import Records
from quant.artefact import Quantizers, load_quantizers
from quant.fit import fit
from quant.scheme import Scheme

pytestmark = pytest.mark.usefixtures("quiet")
FEW = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "F8_E4M3", "X9"]
JSON = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 3), st.just(10**9), st.just(10**400), st.floats(), st.text(max_size=4)),
    *(st.just([]), st.just({}), st.just([[1]]), st.just({"a": {}})),
)


@dataclass(frozen=True)
class Subject:
    """A file, and how all of it is read."""

    path: Path
    original: bytes
    read: Callable[[], Any]

    def put(self, content: bytes) -> None:
        """Another file in its place; tensors that were read keep the bytes of the one before."""
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(content)

    def __repr__(self) -> str:
        return self.path.name


def flat(quantizers: Quantizers) -> dict[str, Any]:
    tables = {
        (layer, kind, name): table.clone()
        for layer, sides in quantizers.layers.items()
        for kind, one in sides.items()
        for name, table in one.tables.items()
    }
    schemes = {(layer, kind): one.scheme for layer, s in quantizers.layers.items() for kind, one in s.items()}
    said = (quantizers.scheme, schemes, quantizers.fingerprint, quantizers.records_digest, quantizers.weights)
    return {"said": (*said, quantizers.bos), **tables}


def window_of(opened: Records) -> dict[str, Any]:
    layers = opened.manifest.fingerprint.cached_layers
    parts = {(layer, kind): opened.read(1, layer, kind) for layer in layers for kind in KINDS}
    return {f"{place} {number}": pair[number] for place, pair in parts.items() for number in (0, 1)}


def same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.fixture
def quiet(capsys) -> Iterator[None]:
    """Notes of thousands of files are not looked at."""
    yield
    capsys.readouterr()


@pytest.fixture(params=["window", "manifest", "quantizers", "rdnuq", "cache"])
def subject(request, records, llama, quantizers, make_tokens, tmp_path) -> Subject:
    if request.param in ("window", "manifest"):
        for file in records.folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        opened = Records.open(tmp_path)
        if request.param == "window":
            path = opened.path(1)
            read: Callable[[], Any] = lambda: window_of(opened)  # noqa: E731
        else:
            path = tmp_path / "manifest.json"
            read = lambda: {"manifest": Records.open(tmp_path).manifest}  # noqa: E731
    elif request.param == "cache":
        path, cache, tokens = tmp_path / "cache", PackedCache(quantizers, llama.config), make_tokens(1, 80)
        with torch.inference_mode(), packed_attention(llama):
            llama(input_ids=tokens, past_key_values=cache)
        messages = [{"role": "user", "content": "hello"}]
        save_cache(path, cache, quantizers, llama, tokens, messages)

        def read() -> Any:
            saved = read_cache(path, quantizers)
            saved.check_model(llama)
            saved.restore(llama)
            return {"said": (saved.lengths, saved.slots, saved.messages), "tokens": saved.tokens} | saved.tensors
    else:
        path = tmp_path / "q.safetensors"
        (quantizers if request.param == "quantizers" else fit(records, Scheme.parse("rdnuq2.4"))).save(path)
        read = lambda: flat(load_quantizers(path))  # noqa: E731
    return Subject(path, path.read_bytes(), read)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document but its root."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def altered(draw: st.DataObject, document: Any) -> Any:
    """A JSON document with one value dropped, or replaced by anything, or with a field too many."""
    document = copy.deepcopy(document)
    *way, last = draw.draw(st.sampled_from(list(places(document))), label="place")
    owner = document
    for key in way:
        owner = owner[key]
    action = draw.draw(st.sampled_from(["drop", "replace", "add"]), label="action")
    if action == "drop":
        del owner[last]
    elif action == "replace":
        owner[last] = draw.draw(JSON, label="value")
    elif isinstance(owner, dict):
        owner["another"] = draw.draw(JSON, label="value")
    return document


def mutated(draw: st.DataObject, content: bytes) -> bytes:
    """A safetensors file with one thing changed."""
    header, data = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    [key] = header["__metadata__"]
    one, other = draw.draw(st.permutations(names))[:2]
    action = draw.draw(st.sampled_from(["dtype", "shape", "exchange", "rename", "header", "metadata", "bytes", "cut"]))
    if action == "dtype":
        header[one]["dtype"] = draw.draw(st.sampled_from(DTYPES))
    elif action == "shape":
        header[one]["shape"] = draw.draw(st.sampled_from([header[one]["shape"][::-1], [-1], [], [2**40], [1, 24], "x"]))
    elif action == "exchange":
        header[one], header[other] = header[other], header[one]
    elif action == "rename":
        header[one + "x"] = header.pop(one)
    elif action == "header":
        header = altered(draw, header)
    elif action == "metadata":
        header["__metadata__"][key] = json.dumps(altered(draw, json.loads(header["__metadata__"][key])))
    elif action == "cut":
        size = draw.draw(st.integers(0, len(content) - 1))
        return content[:size] if draw.draw(st.booleans()) else content + bytes(size % 9 + 1)
    else:
        place = draw.draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([content[place] ^ draw.draw(st.integers(1, 255))]) + content[place + 1 :]
    return with_header(header, data)


@given(draw=st.data())
@FEW
def test_a_changed_file_is_refused_or_says_what_was_written(subject, draw: st.DataObject) -> None:
    subject.put(subject.original)
    expected = subject.read()
    if subject.path.suffix == ".json":
        changed = json.dumps(altered(draw, json.loads(subject.original))).encode()
    else:
        changed = mutated(draw, subject.original)
    subject.put(changed)
    try:
        found = subject.read()
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert same(found, expected)


@given(draw=st.data())
@FEW
def test_metadata_that_cannot_be_are_refused_though_their_digest_is_right(subject, draw: st.DataObject) -> None:
    if subject.path.suffix == ".json":
        changed = altered(draw, json.loads(subject.original))
        if isinstance(changed, dict):
            changed["digest"] = digest_of(changed)
        subject.put(json.dumps(changed).encode())
    else:
        header, data = header_of(subject.original)
        [key] = header["__metadata__"]
        content = altered(draw, json.loads(header["__metadata__"][key]))
        content["digest"] = digest_of(content)
        header["__metadata__"][key] = json.dumps(content)
        subject.put(with_header(header, data))
    try:
        subject.read()
    except UserError as error:
        assert len(str(error)) < 2000
