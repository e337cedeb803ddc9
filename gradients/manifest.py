"""The manifest of a records folder: what was recorded, and what every window's file must hold."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from gradients.checked import Expected, canonical_json, digest_of
from gradients.fields import from_fields
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS

SCHEMA = 2  # 1 knew neither weights nor bos, and had no digest of the manifest and of a window's dtypes and shapes; it had no moments either
ACTIVATION_DTYPE = torch.float16
FISHER_DTYPE = torch.bfloat16
MOMENT_DTYPE = torch.float32
What = Literal["activation", "fisher", "moment"]
_SINCE_SCHEMA_2 = ("weights", "bos", "moment_windows")
_MAX_WINDOWS = 100_000  # five digits in a file's name


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
    weights: str = ""  # digest of the model's weights (weights.py); empty where it is not known
    bos: bool = False  # whether every window begins with the tokenizer's <bos>
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.seqlen < 1 or not 1 <= self.windows <= _MAX_WINDOWS or not 0 <= self.moment_windows <= _MAX_WINDOWS:
            raise ValueError(
                f"{self.windows} windows of {self.seqlen} tokens, {self.moment_windows} of moments, are not possible"
            )

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
            *([self.weights, self.bos] if self.schema > 1 else []),
        ]
        return hashlib.sha256(canonical_json(decisive).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `run` is what windows carry, `digest` covers everything."""
        content = {**asdict(self), "fingerprint": self.fingerprint.to_json()}
        if self.schema == 1:
            return {name: value for name, value in content.items() if name not in _SINCE_SCHEMA_2} | {
                "digest": self.digest
            }
        content["run"] = self.digest
        return {**content, "digest": digest_of(content)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """Inverse of `to_json`; raises ValueError for other content, and for content that was altered."""
        old = content.get("schema") == 1
        fields = {name: value for name, value in content.items() if name not in ("digest", "run")}
        made = from_fields(cls, fields, _SINCE_SCHEMA_2 if old else ())
        if content.get("digest" if old else "run") != made.digest or (
            not old and content.get("digest") != digest_of(content)
        ):
            raise ValueError("it was altered after it was written")
        return made

    def window_tensors(self, window: int) -> dict[str, Expected]:
        """The tensors of the file of window number `window`."""
        heads, dim = self.fingerprint.heads, self.fingerprint.head_dim
        kinds: dict[What, Expected] = {}
        if window < self.windows:
            kinds["activation"] = Expected((self.seqlen, heads * dim), ACTIVATION_DTYPE)
            kinds["fisher"] = Expected((self.seqlen, heads * dim), FISHER_DTYPE)
        if window < self.moment_windows:
            kinds["moment"] = Expected((heads, dim, dim), MOMENT_DTYPE)
        return {
            f"layers.{layer}.{kind}.{what}": expected
            for layer in self.fingerprint.cached_layers
            for kind in KINDS
            for what, expected in kinds.items()
        }

    def difference(self, wanted: "Manifest") -> str:
        """In what a run that is `wanted` is another, for an error message."""
        if self.schema != wanted.schema:
            return f"it was recorded by an older version, schema {self.schema} and not {wanted.schema}"
        for name in ("text", "token_digest", "seqlen", "seed", "model_dtype", "bos"):
            if getattr(self, name) != getattr(wanted, name):
                return f"{name} {getattr(self, name)!r} there, {getattr(wanted, name)!r} asked for"
        if difference := self.fingerprint.difference(wanted.fingerprint):
            return f"model: {difference}"
        return (
            f"other weights: digest {self.weights or 'unknown'} there, {wanted.weights or 'unknown'} of the model given"
        )
