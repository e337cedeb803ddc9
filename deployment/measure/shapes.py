"""What a model's shape says about memory: parameters, cached bytes, the activations of a forward. No weight is read.

Activations are an upper estimate of what a forward takes through the kernels, beside weights and cache: the largest moment of one layer, in bytes,
for n = B S rows, widths h of the model and I of its MLP, 2 bytes a number:

    stream       2 n (2 h + H D + 2 C)      residual, normalised input, queries, keys, values
    MLP          2 n (2 h + 3 I)            residual, normalised input, gate, up, their product
    attention    4 B C (t + S + 64)         keys and values, unpacked: t tokens of the past, all or 9/8 of 2^16 or of those of 256 MiB (scratch.py)
                 + 16 n H D                 queries, rotated; up to four parts, and what they are merged to
    storing      10 n C                     codes and what they stand for, if that is more
    logits       6 B V                      of the last token, as 16 and as 32 bits
    libraries    3 2^26                     workspaces of cuBLAS, 32 MiB for each stream, one of which records, and of cuDNN
    together     max(MLP, stream + attention, logits) + libraries
    of a chunk   libraries + max(MLP, stream, logits) + attention + 4 n (H D + C)      what is recorded keeps its memory (step/reading.py)

Stock attention (fp16) keeps no scores: 4 n H D. Where a scheme has outliers, kernels keep room for more of them in every layer
(format/room.py): a 32nd of those held, and all that a chunk may have, or 64 tokens, which a CUDA graph of decode steps relies on. Not
counted: the CUDA context (half a GiB), fragmentation, the copies of an fp16 cache that grows, what torch takes where kernels do not run.
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from deployment.format.room import GRAPH_TOKENS, ROOM_SHARE
from deployment.kernels.scratch import FEW, LONG, MOST_TOKENS, room_of, stretch_tokens
from gradients.cli import UserError
from gradients.models import KINDS, SITES, Kind, attend_fully, cached_layers, decoder, decoder_config, kv_shape
from gradients.parallel import Part, distribution, own_parameters, part_of_config
from quant.artefact import axis_of
from quant.outliers import outliers_per_end
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, OUTLIER_BITS, OUTLIER_LIST_BITS, exact_size, packed_size

_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
LIBRARIES = 3 << 26  # so that no peak measured on an H100 lies above what is planned
SHAPES = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-30b": (6656, 17920, 60, 52, 52, 32000, 2048),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000, 2048),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, 8192),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000, 32768),  # its second version: the first has a sliding window
}


def _is_read(scheme: Scheme) -> bool:
    """Whether decode.cu reads the codes, as far as a scheme says: groups of 5 or 6 bits come with more than 3.5 on average."""
    return scheme.bits <= (3.5 if scheme.allocated else 4) and scheme.groups > 1 and scheme.key_axis == "channel"


def named_config(name: str) -> PreTrainedConfig:
    """The config of one of the paper's models. Raises `UserError` for another name."""
    if name not in SHAPES:
        raise UserError(f"shape {name!r} is unknown; use one of {', '.join(SHAPES)}, or --model for any other")
    sizes = dict(zip(_FIELDS, SHAPES[name], strict=True))
    return MistralConfig(**sizes, sliding_window=None) if name.startswith("mistral") else LlamaConfig(**sizes)


def shape_config(name: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`, or of a model. Raises what `load_config` does."""
    return named_config(name) if name in SHAPES else load_config(name)


def load_config(name: str, full_attention: bool = False) -> PreTrainedConfig:
    """The config of a hub id or a local folder; `full_attention` treats sliding-window layers as fully attending.

    Raises `UserError` for a missing model, `NotImplementedError` for an unsupported architecture.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the config of model {name!r}: {reason}; give a hub id that is reachable, a local folder, "
            f"or a shape: {', '.join(SHAPES)}"
        ) from error
    text_config = decoder_config(config)
    if text_config.model_type not in SITES:
        raise NotImplementedError(
            f"model_type {text_config.model_type!r} of {name!r} is not supported (supported: {', '.join(SITES)})"
        )
    if full_attention:
        attend_fully(text_config)
    return config


@dataclass(frozen=True)
class ModelShape:
    """What decides how much memory a model takes."""

    config: PreTrainedConfig  # of the text decoder
    cached: frozenset[int]  # the layers whose whole past is cached
    layers: tuple[int, ...]  # parameters of every decoder layer
    embedding: int  # parameters before the layers
    head: int  # parameters after them; tied ones count once
    parts: int = 1  # of a tensor-parallel model, of which the above is one: the config's heads are a part's, too

    @classmethod
    def of(cls, config: PreTrainedConfig, parts: int = 1) -> "ModelShape":
        """The shape of a config, or of one of the `parts` that processes compute in parallel (gradients/parallel.py).

        Raises `UserError` when no layer caches its whole past, and as `distribution` does.
        """
        cached, text = frozenset(cached_layers(config)), decoder_config(config)
        if parts > 1:
            distribution(text, Part(0, parts))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        own = own_parameters(model, parts)
        layers = tuple(sum(own[p] for p in layer.parameters()) for layer in decoder(model).layers)
        embedding = own[model.get_input_embeddings().weight]
        head = sum(own.values()) - embedding - sum(layers)
        return cls(text if parts == 1 else part_of_config(text, parts), cached, layers, embedding, head, parts)

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.embedding + sum(self.layers) + self.head

    @property
    def window(self) -> int:
        """Tokens that the other layers keep, 0 if there are none."""
        return 0 if len(self.cached) == len(self.layers) else self.config.sliding_window

    def activation_bytes(self, scheme: Scheme | None, new: int, batch: int = 1, context: int = MOST_TOKENS) -> int:
        """Upper estimate for a forward of `new` tokens of each of `batch` sequences, behind at most `context`, see above."""
        config, (heads, head_dim), rows = self.config, kv_shape(self.config), batch * new
        channels, query_heads = heads * head_dim, config.num_attention_heads
        stream = 2 * rows * (2 * config.hidden_size + query_heads * head_dim + 2 * channels)
        mlp = 2 * rows * (2 * config.hidden_size + 3 * config.intermediate_size)
        attention = 4 * rows * query_heads * head_dim
        logits = 6 * batch * config.vocab_size
        if scheme is None:
            return LIBRARIES + max(mlp, stream + attention, logits)
        if new * query_heads // heads <= FEW and (context * channels < LONG or _is_read(scheme)):
            return LIBRARIES + max(mlp, stream + 5 * attention, logits)
        stretch = stretch_tokens(2 * batch * channels)
        unpacked = (
            4
            * batch
            * channels
            * max(room_of(stretch, past, new, batch) for past in (context, min(context, 9 * stretch // 8)))
        )
        storing = 10 * rows * channels
        kept = attention + 4 * rows * channels
        return LIBRARIES + max(mlp, stream, logits) + max(unpacked + 4 * attention, storing) + kept

    def weight_bytes(self, bits: float) -> int:
        """Bytes of all weights at a given number of bits per parameter."""
        return sum(self.pieces(None, 0, bits))

    def window_bytes(self, tokens: int) -> int:
        """Bytes that a sliding-window layer keeps of one sequence, in transformers' own 16-bit cache."""
        heads, head_dim = kv_shape(self.config)
        return len(KINDS) * exact_size(min(tokens, self.window), heads * head_dim).bits // 8

    def pieces(
        self, scheme: Scheme | None, tokens: int, weight_bits: float, batch: int = 1, room: int | None = None
    ) -> list[int]:
        """Bytes of the embedding, of each layer with what it caches of `batch` sequences, and of the head.

        With `room`, tokens of a chunk, what kernels keep free for outliers is counted, too.
        """
        cached = sum(self.cache_bytes(scheme, tokens).values()) // len(self.cached)
        cached += 0 if room is None else self.room_bytes(scheme, tokens, room)
        window = self.window_bytes(tokens)
        past = [0, *(cached if layer in self.cached else window for layer in range(len(self.layers))), 0]
        parameters = [self.embedding, *self.layers, self.head]
        return [round(p * weight_bits / 8) + batch * held for p, held in zip(parameters, past, strict=True)]

    def cache_bytes(self, scheme: Scheme | None, tokens: int, share: float | None = None) -> dict[str, int]:
        """One sequence's bytes by what they are for, in all layers that cache their whole past; `scheme` None is fp16.

        `share` of the elements of a channel-wise axis are outliers; None: as many as the scheme aims at. With rdnuq,
        codes and outliers have one budget, so `keys` and `values` hold both.
        """
        heads, head_dim = kv_shape(self.config)
        exact = exact_size(tokens, heads * head_dim).bits
        bits = {"keys": exact, "values": exact}
        if scheme is not None:
            packed = max(0, tokens - scheme.exact_tokens)
            keys, values = (_packed_bits(scheme, kind, heads, head_dim, packed, share, self.parts) for kind in KINDS)
            bits = {"keys": keys.pop("codes"), "values": values.pop("codes")}
            bits |= {part: size + values[part] for part, size in keys.items()}
            bits["sink_tokens"] = len(KINDS) * exact_size(scheme.sink_tokens, heads * head_dim).bits
            recent = scheme.residual_tokens + 1 if scheme.residual_tokens else 0  # one that leaves (window.py)
            bits["recent_window"] = len(KINDS) * exact_size(recent, heads * head_dim).bits
        return {part: size * len(self.cached) // 8 for part, size in bits.items()}

    def room_bytes(self, scheme: Scheme | None, tokens: int, new: int) -> int:
        """What kernels keep free for outliers of one sequence in one layer that is read in chunks of `new` tokens."""
        if scheme is None or not scheme.outliers:
            return 0
        (heads, dim), entries = kv_shape(self.config), 0.0
        for kind in KINDS:
            if scheme.form(axis_of(scheme, kind)) == "token":
                most = min(dim, 2 * outliers_per_end(self.parts * heads * dim, scheme.outliers))
                held = 2 * outliers_per_end(self.parts * heads * dim, scheme.outliers) / self.parts
            else:
                most, held = dim, heads * dim * scheme.outliers
            entries += max(GRAPH_TOKENS, new) * heads * most + tokens * held / ROOM_SHARE
        return OUTLIER_BITS * round(entries) // 8

    def bytes_per_token(self, scheme: Scheme | None) -> dict[str, float]:
        """What one more token adds to `cache_bytes`, averaged over a million."""
        long = 1 << 20
        shorter, longer = (self.cache_bytes(scheme, tokens) for tokens in (long, 2 * long))
        each = {part: (longer[part] - size) / long for part, size in shorter.items()}
        return {**each, "cache": sum(each.values())}


def _packed_bits(
    scheme: Scheme, kind: Kind, heads: int, head_dim: int, tokens: int, share: float | None, parts: int = 1
) -> dict[str, int]:
    """Bits of the packed keys or values of one sequence in one layer, of one of `parts` that have `heads` each."""
    channels, lists = heads * head_dim, bool(scheme.outliers)
    per_token = scheme.form(axis_of(scheme, kind)) == "token"
    code_bits = scheme.bits * channels
    if scheme.allocated and lists:  # the budget pays for everything, so the ends of lists come off
        code_bits -= heads * OUTLIER_LIST_BITS / BLOCK_TOKENS
    outliers: float = 2 * outliers_per_end(parts * channels, scheme.outliers) / parts
    if scheme.allocated:
        outliers = 0
    elif not per_token:
        outliers = min(
            channels * (scheme.outliers if share is None else share),
            channels if scheme.outlier_cap is None else scheme.outlier_cap,
        )

    def size(code_bits: int = 0, outliers: int = 0, lists: bool = False, scales: bool = False) -> int:
        return packed_size(tokens, heads, channels, code_bits, outliers, lists, scales).bits

    return {
        "codes": size(code_bits=round(code_bits)),
        "scales": size(scales=per_token),
        "outliers": size(outliers=round(tokens * outliers), lists=lists) - size(lists=lists),
        "list_ends": size(lists=lists),
    }
