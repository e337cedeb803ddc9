"""What `scripts.bench.generate` measures: decode steps and chunks of one whole model, over one cache after another."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.devices import current
from deployment.measure.filled import filled_cache, synthetic_artefact
from deployment.measure.shapes import ModelShape
from deployment.step.graphed import graphed
from deployment.step.recording import record
from gradients.cli import UserError
from gradients.placement import resolve_device
from quant.results import append_row
from quant.scheme import Scheme
from scripts.bench.fp16_caches import IN_PLACE, attending, full_cache, is_known, stored_bytes
from scripts.bench.random_model import config_of, random_model

_STEPS = (4, 64)  # measured at least and at most
_MEASURED_SECONDS = 2.0  # of each, about
_WARM_STEPS = 3  # the first compiles, the second records
_CHUNKS_EACH, _WARM_CHUNKS = 6, 3  # forwards of a chunk; the first compiles, the third records

Row = dict[str, Any]
Forward = Callable[[Tensor], Tensor]


class Clock(LogitsProcessor):
    """Notes when the host comes to each step's logits, which it does when the step before has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        self.times.append(time.perf_counter())
        return scores


class Benchmark:
    """One model, and everything that is measured of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.deadline = arguments, time.monotonic() + arguments.seconds
        self.device = torch.device(resolve_device(arguments.device))
        self.config = _config(arguments.shape, arguments.layers, max(*arguments.contexts, arguments.prefill_context))
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.config.dtype = dtype
        self.model: PreTrainedModel = random_model(self.config, [str(self.device)], dtype)
        self.weights = sum(parameter.nbytes for parameter in self.model.parameters())
        self.shape = ModelShape.of(self.config)
        self.rows: list[Row] = []

    @property
    def late(self) -> bool:
        """Whether nothing more is to be begun."""
        return time.monotonic() > self.deadline

    def run(self) -> list[Row]:
        """Measure everything there is time for."""
        asked = self.arguments
        for context in asked.contexts:
            for name in asked.caches:
                self._attempt(name, {"op": "decode", "context": context}, self._decode)
        for name in asked.caches if asked.chunks else ():
            self._attempt(name, {"op": "prefill", "context": asked.prefill_context}, self._prefill)
        return self.rows

    def _attempt(self, name: str, row: Row, measure: Callable[[str, Row], None]) -> None:
        """Measure, and write down what prevents it."""
        if self.late:
            print(f"left out   {row['op']} {name} at {row['context']}: no time left", flush=True)
            return
        row = {
            "shape": self.arguments.shape,
            "layers": self.config.num_hidden_layers,
            "cache": name,
            "filled": "synthetic",
            **row,
        }
        reason = None
        try:
            with current(self.device):
                measure(name, row)
        except ImportError:
            reason = "not installed"
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # of a library, say: the others are to be measured all the same
            if isinstance(error, UserError):
                raise
            reason = f"{type(error).__name__}: {_first_line(error)}"
        if reason is not None:
            self._add({**row, "error": reason})
        gc.collect()  # what the exception held
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        append_row(self.arguments.results, row, packages=("torch", "transformers", "triton"))
        result = row.get("error") or f"{row['tokens_per_second']:.1f} tokens/s"
        how = row.get("mode") or f"{row.get('chunk', '')}"
        print(f"{row['op']} {row['cache']} at {row['context']} {how}: {result}", flush=True)

    @contextmanager
    def _full(self, name: str, context: int, spare: int) -> Iterator[Cache]:
        """A full cache with room for `spare` tokens more, and the model attending to it."""
        capacity = context + spare
        with torch.inference_mode(), ExitStack() as stack:
            if is_known(name):
                cache: Cache = full_cache(name, self.config, context, capacity, self.device)
                stack.enter_context(attending(self.model, name))
            else:
                artefact = synthetic_artefact(Scheme.parse(name), self.config)
                cache = filled_cache(artefact, self.config, context, capacity, self.device)
                stack.enter_context(packed_attention(self.model))
            yield cache

    def _decode(self, name: str, row: Row) -> None:
        spare = len(self.arguments.modes) * (_WARM_STEPS + 2 * _STEPS[1])
        with self._full(name, row["context"], spare) as cache:
            held = cache.nbytes() if isinstance(cache, PackedCache) else stored_bytes(cache)
            row |= {"weight_bytes": self.weights, "cache_bytes": held}
            for mode in self.arguments.modes:
                if self.late:
                    break
                if mode == "graph" and is_known(name) and name not in IN_PLACE:
                    continue  # what is copied to another place with every token cannot be replayed
                measured: Row
                try:
                    if mode == "generate":
                        measured = self._timed_generate(cache)
                    else:
                        with self._steps(cache, mode) as forward:
                            measured = self._timed_steps(forward)
                except torch.OutOfMemoryError:
                    measured = {"error": "out of memory"}
                except RuntimeError as error:
                    if mode != "graph":
                        raise
                    measured = {"error": f"not recorded: {_first_line(error)}"}
                self._add({**row, "mode": mode, **measured})

    @contextmanager
    def _steps(self, cache: Cache, mode: str) -> Iterator[Forward]:
        """One step: ids `[1, 1]` to logits `[1, 1, V]`."""

        def forward(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits

        if mode == "eager":
            with packed_attention(self.model, graphs=False) if isinstance(cache, PackedCache) else nullcontext():
                yield forward
        elif self.device.type != "cuda":
            raise RuntimeError(f"graphs are recorded on CUDA devices, not on {self.device}")
        elif isinstance(cache, PackedCache):
            with graphed(self.model, cache) as steps:
                yield forward
            if steps.obstacle is not None:
                raise RuntimeError(steps.obstacle)
        else:
            ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            forward(ids)
            replay, logits = record(lambda: forward(ids))

            def replayed(new: Tensor) -> Tensor:
                ids.copy_(new)
                replay()
                return logits

            yield replayed

    def _timed_steps(self, forward: Forward) -> Row:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._seconds(forward, ids, _WARM_STEPS)
        first = self._seconds(forward, ids, _STEPS[0]) / _STEPS[0]
        steps = min(_STEPS[1], max(_STEPS[0], int(_MEASURED_SECONDS / first)))
        return self._measured(steps, self._seconds(forward, ids, steps) / steps)

    def _measured(self, steps: int, seconds: float) -> Row:
        """Of steps that took so long each."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        measured = {"steps": steps, "ms_per_token": round(1e3 * seconds, 3), "tokens_per_second": round(1 / seconds, 2)}
        return {**measured, "peak_bytes": peak}

    def _timed_generate(self, cache: Cache) -> Row:
        """Of the steps of one call of `generate`, greedy, but for the first: compiling, and recording."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.zeros(1, cache.get_seq_length() + 1, dtype=torch.int64, device=self.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        clock, steps = Clock(), _STEPS[1]
        options["logits_processor"] = LogitsProcessorList([clock])
        self.model.generate(ids, past_key_values=cache, max_new_tokens=_WARM_STEPS + 1 + steps, **options)
        warm, last = clock.times[_WARM_STEPS], clock.times[-1]
        return self._measured(steps, (last - warm) / steps)

    def _seconds(self, forward: Forward, ids: Tensor, steps: int) -> float:
        """Of greedy steps; the device is waited for at the end only."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            ids = forward(ids)[:, -1].argmax(-1, keepdim=True)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _prefill(self, name: str, row: Row) -> None:
        spare = _CHUNKS_EACH * sum(self.arguments.chunks)
        with self._full(name, row["context"], spare) as cache:
            scheme = None if is_known(name) else Scheme.parse(name)
            for chunk in self.arguments.chunks:
                if self.late:
                    break
                held = cache.nbytes() if isinstance(cache, PackedCache) else stored_bytes(cache)
                planned = self.weights + held + self._planned(scheme, cache.get_seq_length(), chunk)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                ids = torch.zeros(1, chunk, dtype=torch.int64, device=self.device)
                times = []
                for _ in range(_CHUNKS_EACH):
                    self._wait()
                    started = time.perf_counter()
                    self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                    self._wait()
                    times.append(time.perf_counter() - started)
                best = min(times[_WARM_CHUNKS:])
                peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
                measured = {"chunk": chunk, "ms": round(1e3 * best, 2), "tokens_per_second": round(chunk / best, 1)}
                self._add({**row, **measured, "peak_bytes": peak, "planned_peak_bytes": planned})

    def _planned(self, scheme: Scheme | None, tokens: int, chunk: int) -> int:
        """Bytes that reading a chunk behind `tokens` takes beside weights and cache, as `deployment.plan` counts them."""
        room = self.config.num_hidden_layers * self.shape.room_bytes(scheme, tokens, chunk)
        return room + self.shape.activation_bytes(scheme, chunk, 1, tokens)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _config(shape: str, layers: int | None, context: int) -> PreTrainedConfig:
    config = config_of(shape, layers)
    config.max_position_embeddings = max(config.max_position_embeddings, 2 * context)
    return config
