"""Tensor parallelism: several processes compute every layer together, each with its part of the heads and of the MLP.

    torchrun --nproc-per-node 2 -m deployment.generate --tensor-parallel ...

transformers splits the weights by the architecture's own plan (`tp_plan="auto"`), and sums what the parts make of a token.
Keys and values of a head arise in one process and stay there, and so do its quantizers and its part of the packed cache.
What a token's own range takes, its values in all heads, is gathered (`gathered_heads`).
"""

import argparse
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from gradients.cli import UserError, positive_int
from gradients.processes import process_state

# the same under its newer name, where there is one
_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_KEPT_APART = ("layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj")


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` equal ones, of which every process of a tensor-parallel run has one."""

    number: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing beside it."""
        return self.count == 1

    def of(self, size: int) -> slice:
        """Which of `size` heads, or channels, are its own; `size` is a multiple of `count`."""
        each = size // self.count
        return slice(self.number * each, (self.number + 1) * each)

    def check_heads(self, heads: int, name: str) -> None:
        """Raise `UserError` unless every part has as many whole heads as any other."""
        if heads % self.count:
            fit = [str(count) for count in range(2, heads + 1) if heads % count == 0]
            raise UserError(
                f"--tensor-parallel {self.count}: {heads} {name} do not divide by {self.count} processes; "
                f"start {' or '.join(fit) or '1'}"
            )


WHOLE = Part()


def add_tensor_parallel_argument(parser: argparse.ArgumentParser) -> None:
    """`--tensor-parallel [N]`: None if it is not given, 0 without a number."""
    parser.add_argument(
        "--tensor-parallel",
        type=positive_int,
        nargs="?",
        const=0,
        metavar="N",
        help="the N processes of torchrun compute every layer together, each with its part of the heads",
    )


def own_part(asked: int | None, command: str) -> Part:
    """The part of this process, of as many as `--tensor-parallel` says or, for 0, as were started; all of it for None.

    Raises `UserError` when another number of processes was started.
    """
    if asked is None:
        return WHOLE
    state = process_state()
    if asked == 1 == state.num_processes:
        return WHOLE
    if state.num_processes == 1 or asked not in (0, state.num_processes):
        raise UserError(
            f"--tensor-parallel{f' {asked}' if asked else ''}: {state.num_processes} "
            f"{'process was' if state.num_processes == 1 else 'processes were'} started; "
            f"use torchrun --nproc-per-node {asked or 2} -m {command}"
        )
    return Part(state.process_index, state.num_processes)


def distribution(config: PreTrainedConfig, part: Part) -> dict[str, Any]:
    """What `from_pretrained` is told, for a text decoder's config.

    Raises `UserError` for heads that do not divide, `NotImplementedError` for a plan that leaves heads together.
    """
    plan = config.base_model_tp_plan or {}
    if any(plan.get(name) != "colwise" for name in _KEPT_APART):
        raise NotImplementedError(
            f"--tensor-parallel: transformers' plan for model_type {config.model_type!r} does not split keys and values "
            "by heads; spread its layers instead, by --device-map auto in one process"
        )
    part.check_heads(config.num_key_value_heads, "KV heads")
    part.check_heads(config.num_attention_heads, "query heads")
    return {"distributed_config": DistributedConfig(tp_size=part.count, tp_plan="auto")}


def part_of_config(config: PreTrainedConfig, parts: int) -> PreTrainedConfig:
    """A text decoder's config with the heads and the MLP of one part."""
    own = copy.deepcopy(config)
    own.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(own, name, getattr(config, name) // parts)
    return own


def own_parameters(model: PreTrainedModel, parts: int) -> dict[nn.Parameter, int]:
    """How many numbers of every parameter one of `parts` holds, by the model's own plan."""
    plan = model.tp_plan if parts > 1 else {}
    styles = {name: plan.get(re.sub(r"\d+", "*", name.rpartition(".")[0])) for name, _ in model.named_parameters()}
    return {
        parameter: parameter.numel() // (parts if _is_split(styles[name], name) else 1)
        for name, parameter in model.named_parameters()
    }


def _is_split(style: str | None, name: str) -> bool:
    if style is None or style.startswith("replicated"):
        return False
    # what is added to the sum of all parts is everybody's
    return not (style.startswith("rowwise") and name.endswith("bias"))


def gathered_heads(x: Tensor, part: Part, dim: int) -> Tensor:
    """What all parts have, side by side along `dim`, of the heads or channels `x` that are this process's.

    All processes call it at once, with as much. The device is not waited for.
    """
    own = x.movedim(dim, 0).contiguous()
    whole = own.new_empty(part.count * own.shape[0], *own.shape[1:])
    _gather(whole, own)
    return whole.movedim(0, dim)


def summed(numbers: Sequence[float], part: Part) -> list[float]:
    """Numbers of every process, added up in all of them; exact for integers below 2^53."""
    if part.is_whole:
        return list(numbers)
    both = torch.tensor(numbers, dtype=torch.float64, device=process_state().device)
    torch.distributed.all_reduce(both)
    return both.tolist()
