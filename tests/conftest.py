"""Shared fixtures: tiny random models of every supported architecture, and one calibration of a tiny Llama.

Nothing here needs a network or a file from outside the repository. Models are built from configs, with weights large
enough that attention is far from uniform; norms and biases are random too, so that leaving one out shows.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton looks when it is first imported

from hypothesis import settings
from interpreter import quicken
from recorders import Recording
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from deployment.cache import PackedCache
from gradients.__main__ import main as record_main
from gradients.fingerprint import Fingerprint
from gradients.fisher import record_window
from gradients.manifest import Manifest
from gradients.models import KINDS, Kind, KVSite, decoder, kv_sites
from gradients.records import Records
from gradients.rope import rope_tables
from quant.artefact import Quantizers
from quant.fit import fit
from quant.scheme import Scheme
from scripts.bench.random_model import byte_tokenizer

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    quicken(pytest.MonkeyPatch())  # never undone

torch.set_num_threads(1)
settings.register_profile("repository", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("repository")


def all_pairs(first: Iterable[Any], second: Iterable[Any], quick: Callable[[Any, Any], bool]) -> list[Any]:
    """The product of two parametrizations; the pairs that are not `quick` are slow tests."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(a, b, marks=marks[quick(a, b)]) for a, b in itertools.product(first, second)]


# head sizes, and the tokens that an index of an outlier tells apart
_SLOW = pytest.mark.slow
SPANS = [(64, 1024), pytest.param(96, 512, marks=_SLOW), pytest.param(128, 512, marks=_SLOW), (256, 256)]

VOCABULARY = 259  # the bytes, and three special tokens
REPOSITORY = Path(__file__).resolve().parent.parent

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

# C = G * D: 24 of llama and mistral, 40 of gemma3 are no multiples of 32
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-yarn-mha": lambda: LlamaConfig(**_SIZES | {"num_key_value_heads": 4, "rope_parameters": dict(_YARN)}),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**_SIZES | {"hidden_size": 64}),
    "phi3-partial": lambda: Phi3Config(**_SIZES | {"hidden_size": 64, "rope_parameters": dict(_PARTIAL_ROPE)}),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES | {"num_hidden_layers": 4},
        head_dim=20,
        query_pre_attn_scalar=20,
        sliding_window=16,
        layer_types=list(_ALTERNATING),
    ),
}


def dynamic_llama() -> PreTrainedConfig:
    """Of a model whose frequencies change with the length of the text, from 64 tokens on."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return LlamaConfig(**_SIZES | {"max_position_embeddings": 64, "rope_parameters": dynamic})


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A frozen float32 model in evaluation mode with random weights, the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and the gains of norms start as constants
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    return model.eval().requires_grad_(False)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of a whole text, read at once without a cache."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], PreTrainedModel]:
    """Build a fresh tiny model by its name in `CONFIGS`, for tests that change it."""
    return lambda name: build_model(CONFIGS[name]())


@pytest.fixture(scope="session", params=list(CONFIGS))
def model(request) -> PreTrainedModel:
    """A tiny model of every supported architecture in turn; leave it as it is."""
    return build_model(CONFIGS[request.param]())


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """The tiny Llama whose folder is `llama_folder`; leave it as it is."""
    return build_model(CONFIGS["llama"]())


@pytest.fixture(scope="session")
def wide() -> PreTrainedModel:
    """A tiny Llama whose heads have 64 channels, as groups and tensor cores want them; leave it as it is."""
    return build_model(LlamaConfig(**_SIZES | {"initializer_range": 0.1}, head_dim=64))


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., Tensor]:
    """Random token ids of any shape, without special tokens: `make_tokens(2, 33, seed=1)`."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    made = byte_tokenizer()
    assert len(made) == VOCABULARY
    return made


@pytest.fixture(scope="session")
def save_model(tokenizer) -> Callable[[PreTrainedModel, Path], Path]:
    """Save a model with the byte tokenizer as a folder that `--model` takes."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(llama, save_model, tmp_path_factory) -> Path:
    """The tiny Llama as a local model folder."""
    return save_model(llama, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A UTF-8 text of 6000 bytes, hence 6000 tokens."""
    draw = random.Random(0)
    words = ["key", "value", "caché", "token", "head", "of", "the", "a", "quantized", "outlier.\n", "naïve"]
    text = " ".join(draw.choice(words) for _ in range(2000)).encode()[:5999].decode(errors="ignore")
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text + "." * (6000 - len(text.encode())), encoding="utf-8")
    return path


RECORD_WINDOWS = 4
RECORD_SEQLEN = 65


@pytest.fixture(scope="session")
def record_arguments(llama_folder, text_file) -> list[str]:
    """What `python -m gradients` is given to make `records`, except --output."""
    sizes = ["--windows", str(RECORD_WINDOWS), "--seqlen", str(RECORD_SEQLEN)]
    return ["--model", str(llama_folder), "--text", str(text_file), "--device", "cpu", *sizes]


@pytest.fixture(scope="session")
def records(record_arguments, tmp_path_factory) -> Records:
    """The calibration of the tiny Llama: 4 windows of 65 tokens, recorded without interruption; read only."""
    folder = tmp_path_factory.mktemp("recorded") / "records"
    record_main([*record_arguments, "--output", str(folder)])
    return Records.open(folder)


@pytest.fixture(scope="session")
def quantizers(records) -> Quantizers:
    """nuq3-1% for the tiny Llama."""
    return fit(records, Scheme.parse("nuq3-1%"))


@pytest.fixture(scope="session")
def quantizers_file(quantizers, tmp_path_factory) -> Path:
    """`quantizers`, saved; read only."""
    path = tmp_path_factory.mktemp("fitted") / "nuq3.safetensors"
    quantizers.save(path)
    return path


CALIBRATION_TOKENS = 193


@pytest.fixture(scope="session")
def record_model(make_tokens, tmp_path_factory) -> Callable[[PreTrainedModel], Records]:
    """Record any model on one window of random tokens, once: `record_model(model)`; read only."""
    done: dict[int, tuple[PreTrainedModel, Records]] = {}  # holds the model too, lest another take its id

    def record(model: PreTrainedModel) -> Records:
        if id(model) not in done:
            manifest = Manifest(
                fingerprint=Fingerprint.of(model.config),
                text="random tokens",
                token_digest="none",
                seqlen=CALIBRATION_TOKENS,
                windows=1,
                moment_windows=1,
                seed=17,
            )
            created = Records.create(tmp_path_factory.mktemp("calibration"), manifest)
            created.write(0, record_window(model, make_tokens(CALIBRATION_TOKENS, seed=17)))
            created.write_rope(*rope_tables(model, CALIBRATION_TOKENS))
            done[id(model)] = model, created
        return done[id(model)][1]

    return record


@pytest.fixture(scope="session")
def fit_model(record_model) -> Callable[..., Quantizers]:
    """Fit any model: `fit_model(model, scheme)`; calibrates on 193 random tokens."""
    return lambda model, scheme: fit(record_model(model), scheme)


@pytest.fixture(scope="session")
def eight_bits(llama, fit_model) -> Quantizers:
    """For the tiny Llama: as good as unquantized for the choice of tokens, and yet packed."""
    return fit_model(llama, Scheme.parse("int8-5%"))


@pytest.fixture(scope="session")
def captured_sites() -> Callable[[PreTrainedModel], Any]:
    """`with captured_sites(model) as seen:` collects what each site hands on, `seen[layer, kind]` = `[B, S, C]`."""

    @contextmanager
    def capture(model: PreTrainedModel) -> Iterator[dict[tuple[int, Kind], Tensor]]:
        seen: dict[tuple[int, Kind], Tensor] = {}

        def watch(site: KVSite) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: Tensor) -> None:
                seen[site.layer, site.kind] = site.read(output).detach().clone()

            return hook

        with ExitStack() as stack:
            for site in kv_sites(model):
                stack.callback(site.module.register_forward_hook(watch(site)).remove)
            yield seen

    return capture


@pytest.fixture(scope="session")
def rewriting_rotated_keys() -> Callable[..., Any]:
    """`with rewriting_rotated_keys(model, change):` hands on `change(layer, key)` after the rotary embedding.

    Keys are `[B, G, S, D]`. It replaces the function that the model's own code applies rotary embeddings with, and so
    knows neither hooks nor attention functions.
    """

    @contextmanager
    def rewriting(model: PreTrainedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        code = sys.modules[type(decoder(model)).__module__]
        layers = itertools.cycle(range(len(decoder(model).layers)))

        def apply(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            query, key = original(*arguments, **options)
            return query, change(next(layers), key)

        original = code.apply_rotary_pos_emb
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(code, "apply_rotary_pos_emb", apply)
            yield

    return rewriting


@pytest.fixture(scope="session")
def hook_count() -> Callable[[PreTrainedModel], int]:
    """Hooks of any kind that a model's modules carry."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return lambda model: sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder, hidden ones included, with its bytes."""

    def take(folder: Path) -> dict[str, bytes]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return take


@pytest.fixture(scope="session")
def make_records(records) -> Callable[..., Records]:
    """Write a records folder of the tiny Llama's shape from given windows.

    `make_records(folder, windows)`, where a window maps (layer, kind) to (activation, fisher), each `[S, C]`.
    """

    def make(folder: Path, windows: list[dict[tuple[int, Kind], tuple[Tensor, Tensor]]]) -> Records:
        seqlen = len(next(iter(windows[0].values()))[0])
        created = Records.create(
            folder, replace(records.manifest, windows=len(windows), moment_windows=0, seqlen=seqlen)
        )
        for number, window in enumerate(windows):
            tensors = {}
            for layer in records.manifest.fingerprint.cached_layers:
                for kind in KINDS:
                    activation, fisher = window[layer, kind]
                    tensors[f"layers.{layer}.{kind}.activation"] = activation.half()
                    tensors[f"layers.{layer}.{kind}.fisher"] = fisher.bfloat16()
            created.write(number, tensors)
        return created

    return make


@pytest.fixture
def recorder(monkeypatch) -> Recording:
    """For `graphed(..., recorder=...)`."""
    monkeypatch.setattr("deployment.step.steps.obstacle", lambda *_: None)
    monkeypatch.setattr("deployment.step.steps.reserve", lambda *_: None)
    return Recording()


@pytest.fixture
def automatic(recorder, monkeypatch) -> Recording:
    """As if models were on a GPU: within `packed_attention` steps are recorded by themselves."""
    made = PackedCache.__init__

    def noted(cache: PackedCache, *arguments: object, **options: object) -> None:
        made(cache, *arguments, **options)  # type: ignore[arg-type]
        recorder.caches.append(cache)

    monkeypatch.setattr(PackedCache, "__init__", noted)
    monkeypatch.setattr("deployment.step.entered.possible", lambda _: True)
    monkeypatch.setattr("deployment.step.automatic.record", recorder)
    return recorder
