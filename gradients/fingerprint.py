"""What must agree between the model that was recorded, the one evaluated and the one deployed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from gradients.checked import canonical_json
from gradients.fields import from_fields
from gradients.models import cached_layers, decoder_config, kv_shape

# what decides a model's keys and values besides its weights; everything else in a config may differ
# between versions of transformers or between machines
_HASHED_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window",
    "query_pre_attn_scalar", "partial_rotary_factor",
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """What must agree between the model that was recorded, the one evaluated and the one deployed."""

    architecture: str
    layers: int
    cached_layers: tuple[int, ...]
    heads: int  # G
    head_dim: int  # D
    rope: str  # canonical JSON of the RoPE parameters
    config_hash: str

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Fingerprint":
        """The fingerprint of a model's config; weights and dtype do not enter."""
        config = decoder_config(config)
        heads, head_dim = kv_shape(config)
        content = {key: getattr(config, key, None) for key in _HASHED_CONFIG_KEYS}
        return cls(
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            cached_layers=tuple(cached_layers(config)),
            heads=heads,
            head_dim=head_dim,
            rope=canonical_json(dict(config.rope_parameters)),
            config_hash=hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16],
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Fingerprint":
        """Inverse of `to_json`. Raises ValueError for other content."""
        return from_fields(cls, content)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "cached_layers": list(self.cached_layers)}

    @property
    def rotary_half(self) -> int | None:
        """Half of the channels of a head that rotate; None if layers of different types differ in it."""
        parameters = json.loads(self.rope)
        kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
        halves = {int(self.head_dim * kind.get("partial_rotary_factor", 1.0)) // 2 for kind in kinds}
        return halves.pop() if len(halves) == 1 else None

    def difference(self, other: "Fingerprint") -> str:
        """The first field in which the two differ, with both values, or an empty string."""
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} against {theirs!r}"
        return ""
