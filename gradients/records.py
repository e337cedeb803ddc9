"""The `records/` folder: what one calibration run leaves behind for any number of fits.

    records/manifest.json               what was recorded: model, corpus, windows, dtypes, versions
    records/window-00012.safetensors    layers.{i}.{key|value}.{activation|fisher}, each [S, C], and .moment [G, D, D]

Activations are fp16, Fisher information is bf16 (squared gradients underflow in fp16), and the second moments of a head's
gradients, summed over the window's tokens, are fp32. Windows beyond those of activations may hold moments only. Each window file is
written under a temporary name and renamed, and carries the manifest's digest and a checksum per tensor, so that
a foreign, truncated or altered file is noticed when its tensor is read. Any process may write any window: no
gather, no lock, and a rerun writes only what is missing.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradients.atomic import atomic_write
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint, canonical_json
from gradients.models import Kind

SCHEMA = 2
_WITHOUT_MOMENTS = 1  # the schema before, which still opens
ROPE_FILE = "rope.safetensors"
ACTIVATION_DTYPE = torch.float16
FISHER_DTYPE = torch.bfloat16
MOMENT_DTYPE = torch.float32
What = Literal["activation", "fisher", "moment"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a records folder holds; two runs may share a folder exactly when their digests agree."""

    fingerprint: Fingerprint
    text: str
    token_digest: str
    seqlen: int
    windows: int
    seed: int
    moment_windows: int = 0  # windows that hold moments, those of `windows` included; 0 in records of schema 1
    model: str = ""
    model_dtype: str = ""
    versions: dict[str, str] | None = None
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Hash of everything that decides a window's content; not of the numbers of windows, which may grow."""
        decisive = [
            self.schema,
            self.fingerprint.to_json(),
            self.token_digest,
            self.seqlen,
            self.seed,
            self.model_dtype,
        ]
        return hashlib.sha256(canonical_json(decisive).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "fingerprint": self.fingerprint.to_json(), "digest": self.digest}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """Inverse of `to_json`; raises KeyError or TypeError for other content."""
        fields = {name: value for name, value in content.items() if name != "digest"}
        return cls(**{**fields, "fingerprint": Fingerprint.from_json(content["fingerprint"])})


@dataclass(frozen=True)
class Records:
    """An opened records folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> "Records":
        """Open `folder` for writing the windows of `manifest`, keeping what an earlier equal run completed.

        Raises `UserError` when the folder holds records of another model, corpus or setting.
        """
        folder = Path(folder)
        if (folder / "manifest.json").exists():
            present = cls.open(folder).manifest
            if present.digest != manifest.digest:
                raise UserError(
                    f"records folder {str(folder)!r} belongs to another run ({_manifest_difference(present, manifest)}); "
                    "give another --output or delete the folder"
                )
            most = {
                name: max(getattr(manifest, name), getattr(present, name)) for name in ("windows", "moment_windows")
            }
            manifest = replace(manifest, **most)
        with atomic_write(folder / "manifest.json") as path:
            path.write_text(json.dumps(manifest.to_json(), indent=2) + "\n")
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> "Records":
        """Open an existing folder. Raises `UserError` when it is missing or its manifest cannot be used."""
        folder = Path(folder)
        path = folder / "manifest.json"
        try:
            content = json.loads(path.read_text())
            schema = content["schema"]
        except OSError as error:
            raise UserError(
                f"records {str(folder)!r}: no manifest.json ({error.strerror}); run `python -m gradients --output {folder}` first"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"records manifest {str(path)!r} is damaged ({error}); delete the folder and record again"
            ) from error
        if schema not in (SCHEMA, _WITHOUT_MOMENTS):
            raise UserError(f"records {str(folder)!r} have schema {schema}, this version reads {SCHEMA}; record again")
        try:
            return cls(folder, Manifest.from_json(content))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"records manifest {str(path)!r} is damaged ({error}); delete the folder and record again"
            ) from error

    def path(self, window: int) -> Path:
        """The file of window number `window`."""
        return self.folder / f"window-{window:05d}.safetensors"

    def is_complete(self, window: int) -> bool:
        """Whether the window's file is there, whole in length, of this manifest, and holds what it should."""
        try:
            with safe_open(self.path(window), framework="pt") as file:
                held = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118  (not a mapping)
                return _read_stamp(file)["manifest"] == self.manifest.digest and (
                    window >= self.manifest.windows or "activation" in held
                )
        except (OSError, SafetensorError, KeyError, ValueError):
            return False

    def write(self, window: int, tensors: dict[str, Tensor]) -> None:
        """Store one window's tensors, `layers.{i}.{kind}.{activation|fisher|moment}`."""
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        stamp = {"manifest": self.manifest.digest, "window": window, "checksums": checksums}
        with atomic_write(self.path(window)) as path:
            # one metadata key only: with several, their order in the file is not deterministic
            save_file(tensors, path, metadata={"kvquant": canonical_json(stamp)})

    def read(self, window: int, layer: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """(activation fp16, Fisher bf16), each `[S, C]`, of one window, layer and kind.

        Raises `UserError` naming the file when it is missing, truncated, altered or of another run.
        """
        activation, fisher = self._read(window, layer, kind, "activation", "fisher")
        return activation, fisher

    def read_moment(self, layer: int, kind: Kind) -> Tensor:
        """E[g g^T] of each head's gradients g over all windows that hold moments, `[G, D, D]` float64.

        Raises `UserError` when the records hold none, when a window's cannot be used, and when they are not finite.
        """
        manifest = self.manifest
        if not manifest.moment_windows:
            raise UserError(
                f"records {str(self.folder)!r} hold no moments of gradients, which error feedback (+fb) needs; "
                "record again with this version, or drop +fb"
            )
        total = sum(self._read(window, layer, kind, "moment")[0].double() for window in range(manifest.moment_windows))
        assert isinstance(total, Tensor)
        if not total.isfinite().all():
            head = int((~total.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(f"records: layer {layer} {kind} head {head} has moments that are not finite; record again")
        return total / (manifest.moment_windows * (manifest.seqlen - 1))

    def _read(self, window: int, layer: int, kind: Kind, *what: What) -> list[Tensor]:
        path = self.path(window)
        names = [f"layers.{layer}.{kind}.{one}" for one in what]
        remedy = f"delete it and run `python -m gradients --output {self.folder}` again"
        try:
            with safe_open(path, framework="pt") as file:
                stamp = _read_stamp(file)
                tensors = [file.get_tensor(name) for name in names]
        except FileNotFoundError as error:
            raise UserError(
                f"records window {str(path)!r} is missing; run `python -m gradients` again to complete it"
            ) from error
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"records window {str(path)!r} is truncated or damaged ({error}); {remedy}") from error
        if stamp["manifest"] != self.manifest.digest or stamp["window"] != window:
            raise UserError(f"records window {str(path)!r} belongs to another run or window; {remedy}")
        for name, tensor in zip(names, tensors, strict=True):
            if checksum(tensor) != stamp["checksums"].get(name):
                raise UserError(
                    f"records window {str(path)!r}: tensor {name} was altered after it was written; {remedy}"
                )
        return tensors

    def first(self, windows: int | None) -> "Records":
        """The same records as if only the first `windows` had been made (None: all).

        Raises `UserError` when there are fewer.
        """
        if windows is None:
            return self
        if windows > self.manifest.windows:
            raise UserError(
                f"{windows} calibration windows are asked for, records {str(self.folder)!r} hold {self.manifest.windows}; "
                "record more, or ask for fewer"
            )
        moments = min(windows, self.manifest.moment_windows)
        return replace(self, manifest=replace(self.manifest, windows=windows, moment_windows=moments))

    def write_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Store the rotary tables `[S, R]` of a window's positions, for fits of keys after the rotary embedding."""
        with atomic_write(self.folder / ROPE_FILE) as path:
            save_file({"cos": cos.contiguous(), "sin": sin.contiguous()}, path)

    def read_rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) `[S, R]` float32. Raises `UserError` when they are missing or damaged."""
        try:
            with safe_open(self.folder / ROPE_FILE, framework="pt") as file:
                cos, sin = file.get_tensor("cos"), file.get_tensor("sin")
            if cos.shape != sin.shape or len(cos) != self.manifest.seqlen:
                raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} for {self.manifest.seqlen} tokens")
            return cos, sin
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"records {str(self.folder)!r} lack a readable {ROPE_FILE} ({error}); run `python -m gradients` again: "
                "complete windows are kept"
            ) from error

    def read_layer(self, layer: int, kind: Kind, skip_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """(activation fp16, Fisher bf16), each `[N, C]`: all windows without their first `skip_tokens` tokens."""
        first = [part[skip_tokens:] for part in self.read(0, layer, kind)]
        # filled window by window: a list of them and its concatenation would take twice the memory
        both = [part.new_empty(self.manifest.windows, *part.shape) for part in first]
        for window in range(self.manifest.windows):
            parts = first if window == 0 else [part[skip_tokens:] for part in self.read(window, layer, kind)]
            for whole, part in zip(both, parts, strict=True):
                whole[window] = part
        return both[0].flatten(0, 1), both[1].flatten(0, 1)


def checksum(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    raw = tensor.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()


def _read_stamp(file: Any) -> dict[str, Any]:
    stamp = json.loads(file.metadata()["kvquant"])
    return {key: stamp[key] for key in ("manifest", "window", "checksums")}


def _manifest_difference(present: Manifest, wanted: Manifest) -> str:
    for name in ("schema", "text", "token_digest", "seqlen", "seed", "model_dtype"):
        if getattr(present, name) != getattr(wanted, name):
            return f"{name} {getattr(present, name)!r} there, {getattr(wanted, name)!r} asked for"
    return f"model: {present.fingerprint.difference(wanted.fingerprint)}"
