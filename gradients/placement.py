"""Device placement: a model on one device, or its layers over several, by accelerate's `device_map`.

A map names modules and devices, `{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, ...}`; a device is
an accelerator's number, `cpu`, a torch device, or `disk`, from where weights are fetched for every forward. accelerate
moves hidden states from device to device. A layer's keys and values arise where it computes, and its cache stays there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.processes import process_state

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_OFF_ACCELERATORS = ("cpu", "disk")

DeviceMap = str | dict[str, int | str]


@dataclass(frozen=True)
class Placement:
    """What `from_pretrained` is told, and whether everything is computed on the CPU."""

    device_map: DeviceMap
    on_cpu: bool

    @classmethod
    def of(cls, device: str, device_map: str | None) -> "Placement":
        """From `--device` and `--device-map`. Raises `UserError` for unknown devices and for two contradicting answers."""
        if device_map is None:
            device = resolve_device(device)
            return cls("auto" if device == "auto" else {"": device}, device == "cpu")
        if device != "auto":
            raise UserError(f"--device {device} and --device-map {device_map} contradict each other; give one of them")
        if (processes := process_state().num_processes) > 1:
            raise UserError(
                f"--device-map {device_map} spreads a model that each of {processes} processes has its own device for; "
                "drop it, or start one process"
            )
        if device_map in STRATEGIES:
            return cls(device_map, not torch.accelerator.is_available())
        places = read_device_map(device_map)
        return cls(places, all(place in _OFF_ACCELERATORS for place in places.values()))


def read_device_map(path: str) -> dict[str, int | str]:
    """The map in a JSON file. Raises `UserError` when it is none, or names a device that is not there."""
    try:
        places = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"--device-map {path!r} cannot be read ({error}); use {', '.join(STRATEGIES)}, or a JSON file"
        ) from error
    if not isinstance(places, dict) or not places:
        raise UserError(f'--device-map {path!r} is no JSON object; write {{"model.layers.0": 0, ...}}')
    for module, place in places.items():
        if not exists(place):
            raise UserError(
                f"--device-map {path!r}: device {place!r} of {module!r} is not there; use cpu, disk, "
                f"or one of {torch.accelerator.device_count()} accelerators, counted from 0"
            )
    return places


def exists(place: Any) -> bool:
    """Whether a map may name this device on this machine."""
    count = torch.accelerator.device_count()
    if isinstance(place, int) and not isinstance(place, bool):
        return 0 <= place < count
    if not isinstance(place, str):
        return False
    if place in _OFF_ACCELERATORS:
        return True
    try:
        device = torch.device(place)
    except RuntimeError:
        return False
    return device.type not in ("cpu", "meta") and (device.index or 0) < count


def resolve_device(device: str) -> str:
    """`auto` becomes `cpu` without an accelerator, this process's own device under `accelerate launch`."""
    if device != "auto":
        try:
            on_cpu = torch.device(device).type == "cpu"
        except RuntimeError as error:
            raise UserError(f"device {device!r} is unknown; use auto, cpu, or a device such as cuda:1") from error
        if not on_cpu and not exists(device):
            raise UserError(
                f"device {device!r} is not there; use auto, cpu, or one of {torch.accelerator.device_count()} accelerators"
            )
        return device
    state = process_state()
    if state.num_processes > 1:
        return state.device.type if state.device.type == "cpu" else str(state.device)
    return "auto" if torch.accelerator.is_available() else "cpu"


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: where the embedding computes."""
    return module_device(model.get_input_embeddings())


def module_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when its weights are fetched for every forward and are nowhere in between."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = module._hf_hook
    return torch.device(hook.execution_device)
