"""The `records/` folder: what one calibration run leaves behind for any number of fits.

    records/manifest.json               what was recorded: model, corpus, windows, dtypes, versions
    records/window-00012.safetensors    layers.{i}.{key|value}.{activation|fisher}, each [S, C], and .moment [G, D, D]

Activations are fp16, Fisher information is bf16 (squared gradients underflow in fp16), and the second moments of a head's
gradients, summed over the window's tokens, are fp32. Windows beyond those of activations hold moments only. Each file is
written under a temporary name and renamed, and carries the manifest's digest and a checksum per tensor, so that
a foreign, truncated or altered file is noticed when its tensor is read. Any process may write any window: no
gather, no lock, and a rerun writes only what is missing.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradients.atomic import atomic_write, remove_leftovers
from gradients.checked import Artefact, CheckedFile, Expected, open_checked, parse_json, write_checked
from gradients.cli import UserError, note
from gradients.manifest import SCHEMA, Manifest, What
from gradients.models import Kind

ROPE_FILE = "rope.safetensors"
_ROPE = Artefact("rotary tables", "kvquant", SCHEMA, "run `python -m gradients` again: complete windows are kept")


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
                    f"records folder {str(folder)!r} belongs to another run ({present.difference(manifest)}); "
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
            content = parse_json(path.read_text(encoding="utf-8"))
            if "schema" not in content:
                raise ValueError("field 'schema' is missing")
            if content["schema"] not in (1, SCHEMA):
                raise UserError(
                    f"records {str(folder)!r} have schema {content['schema']!r:.40}, this version reads {SCHEMA}; record again"
                )
            manifest = Manifest.from_json(content)
        except OSError as error:
            raise UserError(
                f"records {str(folder)!r}: no manifest.json ({error.strerror}); run `python -m gradients --output {folder}` first"
            ) from error
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"records manifest {str(path)!r} is damaged ({error}); delete the folder and record again"
            ) from error
        if manifest.schema == 1:
            note(f"records {str(folder)!r} are of an older version, which did not say of which weights they are")
        return cls(folder, manifest)

    def path(self, window: int) -> Path:
        """The file of window number `window`."""
        return self.folder / f"window-{window:05d}.safetensors"

    def is_complete(self, window: int) -> bool:
        """Whether the window's file is there, whole in length, of this manifest, and holds what it should."""
        try:
            with self._open(window) as file:
                file.require(self.manifest.window_tensors(window))
        except UserError:
            return False
        return True

    def write(self, window: int, tensors: dict[str, Tensor]) -> None:
        """Store one window's tensors, `layers.{i}.{kind}.{activation|fisher|moment}`."""
        stamp = {"manifest": self.manifest.digest, "window": window}
        write_checked(self.path(window), _window_file(self.folder), stamp, tensors)

    def read(self, window: int, layer: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """(activation fp16, Fisher bf16), each `[S, C]`, of one window, layer and kind.

        Raises `UserError` naming the file when it is missing, truncated, altered or of another run.
        """
        return self.read_tensor(window, layer, kind, "activation"), self.read_tensor(window, layer, kind, "fisher")

    def read_tensor(self, window: int, layer: int, kind: Kind, what: What) -> Tensor:
        """One tensor of a window, as `Manifest.window_tensors` has it. Raises what `read` does."""
        name = f"layers.{layer}.{kind}.{what}"
        with self._open(window) as file:
            return file.read(name, self.manifest.window_tensors(window)[name])

    def read_moment(self, layer: int, kind: Kind) -> Tensor:
        """E[g g^T] of each head's gradients g over all windows that hold moments, `[G, D, D]` float64.

        Raises `UserError` when the records hold none, when a window's cannot be used, and when they are not finite.
        """
        windows = self.manifest.moment_windows
        if not windows:
            raise UserError(
                f"records {str(self.folder)!r} hold no moments of gradients, which error feedback (+fb) needs; "
                "record again with this version, or drop +fb"
            )
        heads, dim = self.manifest.fingerprint.heads, self.manifest.fingerprint.head_dim
        total = torch.zeros(heads, dim, dim, dtype=torch.float64)
        for window in range(windows):
            total += self.read_tensor(window, layer, kind, "moment")
        if not total.isfinite().all():
            head = int((~total.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(f"records: layer {layer} {kind} head {head} has moments that are not finite; record again")
        return total / (windows * (self.manifest.seqlen - 1))

    @contextmanager
    def _open(self, window: int) -> Iterator[CheckedFile]:
        """A window's file. Raises `UserError` when it is missing, damaged, or of another run or window."""
        self._require_window(window)
        with open_checked(self.path(window), _window_file(self.folder)) as file:
            if (file.content["manifest"], file.content["window"]) != (self.manifest.digest, window):
                raise file.error("belongs to another run or window")
            if file.has_digest != (self.manifest.schema > 1):
                raise file.error("is of another version than its manifest")
            yield file

    def _require_window(self, window: int) -> None:
        if not self.path(window).exists():
            raise UserError(
                f"records window {str(self.path(window))!r} is missing; run `python -m gradients` again to complete it"
            )

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

    def chosen_layers(self, asked: Sequence[int] | None) -> list[int]:
        """The layers of `--layers`, all without it. Raises `UserError` for one that the records do not hold."""
        held = self.manifest.fingerprint.cached_layers
        if unknown := set(asked or ()) - set(held):
            raise UserError(f"--layers {min(unknown)} is not in the records; they hold {', '.join(map(str, held))}")
        return list(asked or held)

    def write_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Store the rotary tables `[S, R]` of a window's positions, for fits of keys after the rotary embedding."""
        tables = {"cos": cos.contiguous(), "sin": sin.contiguous()}
        write_checked(self.folder / ROPE_FILE, _ROPE, {"run": self.manifest.digest}, tables)

    def read_rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) `[S, R]` float32. Raises `UserError` when they are missing, damaged or of another run."""
        path, wanted = self.folder / ROPE_FILE, Expected((self.manifest.seqlen, -1), torch.float32)
        if self.manifest.schema == 1:  # tables without metadata
            try:
                tables = load_file(path)
                cos, sin = tables["cos"], tables["sin"]
            except (OSError, SafetensorError, KeyError) as error:
                raise _ROPE.error(path, f"cannot be read ({error!r})") from error
        else:
            with open_checked(path, _ROPE) as file:
                if file.content["run"] != self.manifest.digest:
                    raise file.error("belongs to another run")
                cos, sin = file.read("cos", wanted), file.read("sin", wanted)
        for table in (cos, sin):
            if not wanted.fits(table.shape, table.dtype) or table.shape != cos.shape or not table.isfinite().all():
                raise _ROPE.error(path, f"has a table {tuple(table.shape)} {table.dtype} that is none of its windows")
        return cos, sin

    def read_layer(self, layer: int, kind: Kind, skip_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """(activation fp16, Fisher bf16), each `[N, C]`: all windows without their first `skip_tokens` tokens."""
        for window in range(self.manifest.windows):
            self._require_window(window)  # before memory is allocated for all
        first = [part[skip_tokens:] for part in self.read(0, layer, kind)]
        # filled window by window: a list of them and its concatenation would take twice the memory
        both = [part.new_empty(self.manifest.windows, *part.shape) for part in first]
        for window in range(self.manifest.windows):
            parts = first if window == 0 else [part[skip_tokens:] for part in self.read(window, layer, kind)]
            for whole, part in zip(both, parts, strict=True):
                whole[window] = part
        return both[0].flatten(0, 1), both[1].flatten(0, 1)


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Within the block no other command may record into the folder; what killed ones left half written is removed.

    The operating system lets go of the claim when the process ends, however it does. Raises `UserError` when another
    process has it, and when there can be no such folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; give another --output") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"records folder {str(folder)!r} is being recorded by another process; wait for it, or give another --output"
            ) from error
        remove_leftovers(Path(folder))
        yield
    finally:
        os.close(handle)


def _window_file(folder: Path) -> Artefact:
    return Artefact(
        "records window", "kvquant", SCHEMA, f"delete it and run `python -m gradients --output {folder}` again"
    )
