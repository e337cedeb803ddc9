"""What `packed_attention` changes about a model, once however often it is entered, and how it is undone.

- a hook on the rotary module replaces its output by cos = 1, sin = 0, so that the model hands pre-RoPE keys to the cache and
  pre-RoPE queries to the attention function;
- attention modules are told how to rotate, and by a hook which packed layer is theirs; the decoder attends through our function, other parts of the model as before;
- a hook on every forward keeps the cache whole if it fails, refuses caches that are not ours, and gives one to a forward that has none;
- a tensor-parallel model's processes add up a step's parts by a kernel (summed.py);
- on CUDA, decode steps of its forward are recorded in a CUDA graph and replayed (automatic.py);
- `prepare_inputs_for_generation` keeps the cache: Phi-3's drops it where its frequencies change, which keys that are
  rotated when they are read need not care about.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from deployment.cache import PackedCache
from deployment.checked import settle_all
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.asked import Backend
from deployment.step.automatic import Automatic, possible, replaying
from deployment.step.interrupted import Forwards
from deployment.step.same_attention import refuse_other_attention
from deployment.step.summed import summed_at_once
from deployment.step.unrotated import unrotated
from gradients.attention import PREFIX, attending_through
from gradients.cli import UserError
from gradients.models import decoder, kv_sites
from gradients.replaced import replaced

NAME = PREFIX
CONTEXT = "kvquant_context"
_BEFORE_THE_CACHE = 3  # arguments of a forward: ids, mask, positions


@dataclass(frozen=True)
class Context:
    """What the attention function must know of its module; a plain object, so that it is no submodule."""

    rope: Rope
    backend: Backend | None


@dataclass
class _Entry:
    """How a model was changed, and by how many blocks that have not ended."""

    backend: Backend | None
    blocks: int = 0
    undo: ExitStack = field(default_factory=ExitStack)
    forwards: Forwards = field(default_factory=Forwards)
    automatic: Automatic | None = None


_lock = threading.RLock()
_entries: "WeakKeyDictionary[nn.Module, _Entry]" = WeakKeyDictionary()
_threads: list[int] = []  # those within blocks, once for each


@contextmanager
def packed_attention(model: PreTrainedModel, backend: Backend | None = None, graphs: bool = True) -> Iterator[None]:
    """Within the block, `model` attends through the packed layers of any `PackedCache` it is given.

    Blocks may be nested, overlap, and be entered by several threads; the model is as it was when the last one ends.
    `backend` overrides the environment's choice between kernels and torch (dispatch.py). With `graphs`, decode steps
    on CUDA are recorded once and replayed (automatic.py), unless another block that has not ended wants none.

    Raises `NotImplementedError` for an unsupported architecture, `UserError` if another block that has not ended has another
    backend, and ValueError at the end if the device has found a mask or positions that are not supported (checked.py).
    """
    thread = threading.get_ident()
    with _lock:
        entry = _enter(model, backend, graphs)
        _threads.append(thread)
    try:
        yield
    except BaseException:
        _leave(model, entry, graphs, thread, failed=True)
        raise
    _leave(model, entry, graphs, thread, failed=False)


def _enter(model: PreTrainedModel, backend: Backend | None, graphs: bool) -> _Entry:
    part = decoder(model)
    entry = _entries.get(part)
    if entry is None:
        entry = _Entry(backend)
        with ExitStack() as undo:
            _change(model, entry, undo)
            entry.undo = undo.pop_all()
        _entries[part] = entry
    elif entry.backend != backend:
        raise UserError(
            f"the model attends with backend {entry.backend or 'auto'} already, {backend or 'auto'} is asked for; "
            "leave the block it was given in first"
        )
    entry.blocks += 1
    if entry.automatic is not None:
        entry.automatic.stopped += not graphs
    return entry


def _is_alone() -> bool:
    """Whether no thread but one is within a block."""
    return len(set(_threads)) == 1


def _leave(model: PreTrainedModel, entry: _Entry, graphs: bool, thread: int, failed: bool) -> None:
    with _lock:
        entry.blocks -= 1
        _threads.remove(thread)
        if entry.automatic is not None:
            entry.automatic.stopped -= not graphs
        if entry.blocks == 0:
            del _entries[decoder(model)]
            entry.undo.close()
            if failed:
                entry.forwards.put_back_all()
    if not failed:
        settle_all()


def _change(model: PreTrainedModel, entry: _Entry, undo: ExitStack) -> None:
    """Change a model, and say to `undo` how it is undone."""
    kv_sites(model)  # refuses an architecture whose attention nobody has looked at
    part = decoder(model)
    rotary, modules = part.rotary_emb, [layer.self_attn for layer in part.layers]
    by_type: dict[str | None, Rope] = {}
    ropes = {}
    for number, module in enumerate(modules):
        layer_type = module.layer_type if isinstance(rotary.rope_type, dict) else None
        ropes[number] = by_type.setdefault(layer_type, Rope(rotary, layer_type))
    undo.enter_context(_frequencies_kept(rotary))
    refuse_other_attention(model, ropes)
    undo.enter_context(attending_through(model, NAME))
    undo.callback(rotary.register_forward_hook(_no_rotation).remove)
    undo.enter_context(summed_at_once(model))
    for number, module in enumerate(modules):
        setattr(module, CONTEXT, Context(ropes[number], entry.backend))
        undo.callback(delattr, module, CONTEXT)
        undo.callback(module.register_forward_pre_hook(_with_layer, with_kwargs=True).remove)
    if possible(model):
        entry.automatic = Automatic(model, entry.backend, ready=_is_alone)
        undo.enter_context(replaying(model, entry.automatic))
    for watched in {id(one): one for one in (model, part)}.values():  # both may be called
        begin, end = _watching(watched, entry, given_to=model if watched is model else None)
        undo.callback(watched.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(watched.register_forward_hook(end, with_kwargs=True, always_call=True).remove)
    own = getattr(type(model), "prepare_inputs_for_generation", None)
    if own is not None and own is not GenerationMixin.prepare_inputs_for_generation:
        undo.enter_context(_keeping_the_cache(model))


def _no_rotation(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return unrotated(*output)


def _with_layer(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Name the packed layer of an attention module among the arguments that it hands on to the attention function."""
    cache = _cache_of(arguments, options)
    layer = cache.layers[module.layer_idx] if isinstance(cache, PackedCache) else None
    return (arguments, {**options, "packed_layer": layer}) if isinstance(layer, PackedLayer) else None


@contextmanager
def _frequencies_kept(rotary: nn.Module) -> Iterator[None]:
    """Give a rotary module back what it remembers of the texts before the block, if it remembers any."""
    buffers, others = (
        dict(rotary._buffers),
        {name: x for name, x in vars(rotary).items() if name.endswith("_seq_len_cached")},
    )
    try:
        yield
    finally:
        if any(vars(rotary)[name] is not x for name, x in others.items()):
            rotary._buffers.update(buffers)
            vars(rotary).update(others)


def _watching(
    module: nn.Module, entry: _Entry, given_to: PreTrainedModel | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is called before and after every forward of a module, also after one that fails.

    `given_to` is the module as a model to which somebody gives a cache, or none, and another kind is refused; None if a module around
    this one may have made it. A compiler takes into its graph that such a cache is refused, and that ours is within the block; what its
    layers hold they check alone.
    """
    forwards, automatic = entry.forwards, entry.automatic

    def begin(
        _module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache, changed = _cache_of(arguments, options), None
        if cache is None and given_to is not None and _makes_a_cache(given_to, arguments, options):
            cache = PackedCache(None, given_to.config)
            changed = arguments, {**options, "past_key_values": cache}
        if isinstance(cache, PackedCache) and torch.compiler.is_compiling():
            cache.in_forward = True
        elif isinstance(cache, PackedCache):
            outermost = forwards.begin(cache, module)
            if outermost and automatic is not None and given_to is None:
                automatic.settle(cache)  # the model's own forward, which sees to that, is not called
        elif cache is not None and given_to is not None:
            raise UserError(
                f"within packed_attention a cache must be a PackedCache, not a {type(cache).__name__}: it would hold keys "
                "without their rotary embedding; PackedCache(None, model.config) is one without quantization"
            )
        return changed

    def end(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        cache = _cache_of(arguments, options)
        if isinstance(cache, PackedCache) and torch.compiler.is_compiling():
            cache.in_forward = False
        elif isinstance(cache, PackedCache):
            forwards.end(cache, module, failed=output is None)
        elif cache is None and isinstance(output, ModelOutput) and "past_key_values" in output:
            return replace(output, past_key_values=None)  # it holds keys without their rotary embedding
        return None

    return begin, end


def _makes_a_cache(model: PreTrainedModel, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a model that is given no cache would make one, which classifier-free guidance goes on with.

    Ours quantizes nothing either, but cannot be taken out of the block, where its keys would be without their rotary embedding.
    """
    asked = options.get("use_cache")
    by_position = len(arguments) > _BEFORE_THE_CACHE  # and so None
    return not by_position and bool(decoder(model).config.use_cache if asked is None else asked)


def _cache_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Cache | None:
    """The cache among a forward's arguments."""
    return next((given for given in (*options.values(), *arguments) if isinstance(given, Cache)), None)


@contextmanager
def _keeping_the_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, inputs for a forward of `generate` keep a packed cache that the model's own code would drop."""
    own = model.prepare_inputs_for_generation

    @functools.wraps(own)
    def prepare(*arguments: Any, **options: Any) -> dict[str, Any]:
        inputs = own(*arguments, **options)
        cache = options.get("past_key_values")
        if isinstance(cache, PackedCache) and inputs.get("past_key_values") is not cache:
            return GenerationMixin.prepare_inputs_for_generation(model, *arguments, **options)
        return inputs

    with replaced(model, "prepare_inputs_for_generation", prepare):
        yield
