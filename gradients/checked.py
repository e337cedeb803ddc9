"""Safetensors files that say what they are: records windows, quantizers and saved caches.

Such a file holds tensors and, as its metadata, one JSON object: what the artefact's module wrote into it, a checksum of
every tensor (name, dtype, shape and bytes), and a digest of this whole object, checksums included. So one digest covers
everything, and single tensors can be read and checked without the others. A file is opened only when its digest is
right, and a tensor handed out only when it is of the dtype and shape that its reader expects, and has its checksum.

Files written before there were digests have none: whatever they say is believed, except that tensors are still checked
against what is expected, and against the checksums of their bytes where they have such.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradients.atomic import atomic_write
from gradients.cli import UserError

# fmt: off
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8,
}
# fmt: on


class Expected(NamedTuple):
    """What a tensor has to be; -1 in the shape stands for any size."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        """Whether a tensor of this shape and dtype is meant."""
        sizes = zip(self.shape, shape, strict=False)
        return dtype is self.dtype and len(shape) == len(self.shape) and all(a in (-1, b) for a, b in sizes)


@dataclass(frozen=True)
class Artefact:
    """A kind of file: what it is called, the key of its metadata, its schema, and the remedy if one cannot be used.

    Schema 1 stands for files without a digest, read as far as they go.
    """

    noun: str
    key: str
    schema: int
    remedy: str

    def error(self, path: str | Path, what: object) -> UserError:
        """The error that says in one line what is wrong with a file."""
        return UserError(f"{self.noun} {str(path)!r} {what}; {self.remedy}")


def canonical_json(content: Any) -> str:
    """JSON with sorted keys and no spaces, fit for hashing."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, however deeply it is nested."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def digest_of(content: Mapping[str, Any]) -> str:
    """Hash of a JSON object, its own field `digest` left out."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.blake2b(canonical_json(rest).encode(), digest_size=16).hexdigest()


def checksum(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes."""
    return _hash(tensor, f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ")


def bytes_checksum(tensor: Tensor) -> str:
    """Hash of a tensor's bytes alone, as files without a digest have it."""
    return _hash(tensor, "")


def _hash(tensor: Tensor, head: str) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    hashed = hashlib.blake2b(head.encode(), digest_size=16)
    hashed.update(raw.data)
    return hashed.hexdigest()


def write_checked(path: str | Path, kind: Artefact, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` (contiguous, on the CPU) and the JSON object `content` atomically; equal ones make equal files."""
    sealed = {
        **content,
        "schema": kind.schema,
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    sealed["digest"] = digest_of(sealed)
    with atomic_write(path) as temporary:
        # one metadata key only: with several, their order in the file is not deterministic
        save_file(tensors, temporary, metadata={kind.key: canonical_json(sealed)})


def require_own_place(path: str | Path, kind: Artefact) -> None:
    """Raise `UserError` where no file of this kind may be written: over a folder, a device, or a file of any other kind.

    To be asked before any work is done for the file; what is there already may be the model or the text that it comes from.
    """
    path = Path(path)
    named = f"cannot write {kind.noun} {str(path)!r}"
    if not path.name or path.is_dir():
        raise UserError(f"{named}: that is a folder; give the name of a file")
    place = next(each for each in path.absolute().parents if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{named}: {str(place)!r} is no folder that takes files; give another place")
    if path.exists() and not _is_of(path, kind):
        raise UserError(f"{named}: another file is there; give another name, or remove it first")


def _is_of(path: Path, kind: Artefact) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return kind.key in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True)
class CheckedFile:
    """An open file whose metadata are what was written."""

    path: Path
    kind: Artefact
    content: dict[str, Any]
    file: Any

    @property
    def has_digest(self) -> bool:
        """Whether it is of a version that wrote digests."""
        return "digest" in self.content

    def error(self, what: object) -> UserError:
        """The error that says in one line what is wrong with this file."""
        return self.kind.error(self.path, what)

    def check(self) -> None:
        """Raise `UserError` unless the metadata are of a schema that is known, and have their digest."""
        schema = self.content.get("schema", 1)
        if schema not in (1, self.kind.schema):
            raise self.error(f"has schema {schema!r:.40}, this version reads {self.kind.schema}")
        if self.has_digest != (schema != 1) or (self.has_digest and self.content["digest"] != digest_of(self.content)):
            raise self.error("was altered after it was written: its metadata do not have their digest")

    def names(self) -> list[str]:
        """The tensors it holds."""
        return list(self.file.keys())

    def require(self, expected: Mapping[str, Expected]) -> None:
        """Raise `UserError` unless exactly these tensors are there, each of its dtype and shape; none is read."""
        present = self.names()
        for name, wanted in expected.items():
            if name not in present:
                raise self.error(f"lacks tensor {name}")
            self._require(name, wanted)
        for name in present:
            if name not in expected:
                raise self.error(f"holds tensor {name}, which it should not")

    def is_of(self, name: str, wanted: Expected) -> bool:
        """Whether a tensor has this dtype and shape."""
        header = self.file.get_slice(name)
        return wanted.fits(tuple(header.get_shape()), _DTYPES.get(header.get_dtype()))

    def _require(self, name: str, wanted: Expected) -> None:
        header = self.file.get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if not wanted.fits(shape, _DTYPES.get(dtype)):
            raise self.error(
                f"has tensor {name} of shape {shape} and dtype {str(_DTYPES.get(dtype, dtype)).removeprefix('torch.')}, "
                f"expected {wanted.shape} {str(wanted.dtype).removeprefix('torch.')}"
            )

    def read(self, name: str, wanted: Expected) -> Tensor:
        """A tensor. Raises `UserError` when it is missing, of another dtype or shape, or altered."""
        if name not in self.names():
            raise self.error(f"lacks tensor {name}")
        self._require(name, wanted)
        tensor: Tensor = self.file.get_tensor(name)
        sums = self.content.get("checksums")
        if sums is None and not self.has_digest:
            return tensor
        taken = checksum(tensor) if self.has_digest else bytes_checksum(tensor)
        if not isinstance(sums, dict) or sums.get(name) != taken:
            raise self.error(f"was altered after it was written: tensor {name} is another")
        return tensor


@contextmanager
def open_checked(path: str | Path, kind: Artefact) -> Iterator[CheckedFile]:
    """Open a file that `write_checked` wrote, or a version before it.

    Raises `UserError` when it is missing, not safetensors (a pickle, say), truncated, of another kind, or altered, and
    within the block whenever what is read cannot be used (ValueError, KeyError, TypeError).
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind.key not in metadata:
                raise kind.error(path, "lacks our metadata: some other safetensors file")
            opened = CheckedFile(Path(path), kind, parse_json(metadata[kind.key]), file)
            opened.check()
            yield opened
    except UserError:
        raise
    except OSError as error:
        raise kind.error(path, f"cannot be read ({error})") from error
    except SafetensorError as error:
        raise kind.error(path, f"is not a complete safetensors file ({error}); pickles are never loaded") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise kind.error(path, f"is damaged ({error!r})") from error
