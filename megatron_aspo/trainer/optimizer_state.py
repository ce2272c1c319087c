"""The state of a Megatron optimizer, parameter by parameter: Adam's moments, the count of updates, the float32 main weights.

Megatron's own state dicts follow its buffers, so one layout cannot load what another saved. Here every tensor is identified by its
parameter's name and its range in that parameter, and is live: copying into it restores it. Nothing here is collective.

The optimizers' attributes read here are public, and the same in megatron-core 0.16.1 and 0.19.2. `DistributedOptimizer` identifies a
parameter's shard by an index (`model_param_group_index_map`) that is wrong where one group mixes float32 and bfloat16 parameters: its
parallel lists of parameters and shards are read instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor


@dataclass(frozen=True)
class Slab:
    """This rank's shard of the optimizer state of one parameter: elements [start, stop) of the parameter's flattened local tensor.

    All tensors are float32 [stop - start].
    """

    start: int
    stop: int
    master: Tensor | None
    """The main weight; None where the model parameter's own memory is the main weight (float32 training)."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


def optimizer_slabs(model: torch.nn.Module, optimizer: MegatronOptimizer) -> dict[str, Slab]:
    """Return parameter name → slab. model: the module inside Megatron's wrapper, whose `named_parameters()` gives the names.

    Creates zero Adam state where no step has been taken yet. With the distributed optimizer, parameters without a shard on this rank are
    absent. Raises ValueError when the optimizer holds a parameter that is not the model's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    slabs = {}
    for part in _parts(optimizer):
        _create_all_state(part.optimizer)
        for parameter, main, start in _main_weights(part):
            if parameter not in names:
                raise ValueError(f"the optimizer holds a parameter of shape {list(parameter.shape)} that is none of the model's")
            state = part.optimizer.state[main]
            slabs[names[parameter]] = Slab(
                start=start,
                stop=start + main.numel(),
                master=None if _shares_memory(parameter, main, start) else main.detach().view(-1),
                exp_avg=state["exp_avg"].view(-1),
                exp_avg_sq=state["exp_avg_sq"].view(-1),
            )
    return slabs


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield the tensors that only the optimizer reads: moments, and main weights that are not the model's own memory.

    Moments are created lazily, parameter by parameter, so that a consumer may move each away before the next exists.
    """
    for part in _parts(optimizer):
        groups = {parameter: group for group in part.optimizer.param_groups for parameter in group["params"]}
        for parameter, main, start in _main_weights(part):
            state = _create_state(part.optimizer, groups[main], main)
            yield state["exp_avg"]
            yield state["exp_avg_sq"]
            if not _shares_memory(parameter, main, start):
                yield main


def updates(optimizer: MegatronOptimizer) -> int:
    """Return the number of Adam steps taken; 0 on a rank that holds no state. Raises ValueError when parameters disagree."""
    counts = set()
    for part in _parts(optimizer):
        adam = part.optimizer
        for group in adam.param_groups:
            if _counts_by_parameter(adam):
                counts |= {int(adam.state.get(parameter, {}).get("step", 0)) for parameter in group["params"]}
            elif group["params"]:  # a fused Adam does not count steps of an empty group
                counts.add(int(group.get("step", 0)))
    if len(counts) > 1:
        raise ValueError(f"the optimizer's parameters have taken different numbers of updates: {sorted(counts)}")
    return counts.pop() if counts else 0


def set_updates(optimizer: MegatronOptimizer, count: int) -> None:
    """Set the count of Adam steps, from which the bias correction goes on: the next step is number `count` + 1."""
    for part in _parts(optimizer):
        adam = part.optimizer
        _create_all_state(adam)
        for group in adam.param_groups:
            holders = [adam.state[parameter] for parameter in group["params"]] if _counts_by_parameter(adam) else [group]
            for holder in holders:
                if isinstance(holder.get("step"), Tensor):
                    holder["step"].fill_(count)
                else:
                    holder["step"] = count


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield the optimizers that hold state: the members of a chain, without the stubs that Megatron makes where nothing is trained."""
    # Their base class does not declare `is_stub_optimizer`, which all of them have.
    members: list[Any] = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in members:
        if not part.is_stub_optimizer:
            yield part


def _main_weights(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
    """Yield each model parameter, the tensor that Adam updates for it, and that tensor's offset in the flattened parameter."""
    if isinstance(part, DistributedOptimizer):
        for groups, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for parameter, main in _pairs(groups, shards):
                buffer, dtypes, bucket = part.model_param_gbuf_map[parameter]
                yield parameter, main, part.gbuf_ranges[buffer][dtypes][bucket]["param_map"][parameter]["param"].start
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for parameter, main in _pairs(part.float16_groups, part.fp32_from_float16_groups):
            yield parameter, main, 0
        for parameter, main in _pairs(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups):
            yield parameter, main, 0
    elif isinstance(part, FP32Optimizer):
        for parameter in part.get_parameters():
            yield parameter, parameter, 0
    else:
        raise TypeError(f"the state of {type(part).__name__} cannot be read: its main weights are not known here")


def _shares_memory(parameter: torch.nn.Parameter, main: Tensor, start: int) -> bool:
    return main.data_ptr() == parameter.detach().view(-1)[start:].data_ptr()


def _pairs(parameters: list[list], mains: list[list]) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    for parameter_group, main_group in zip(parameters, mains, strict=True):
        yield from zip(parameter_group, main_group, strict=True)


def _counts_by_parameter(adam: torch.optim.Optimizer) -> bool:
    """Return whether updates are counted per parameter, as in torch; fused Adams (Transformer Engine, apex) count per group."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)


def _create_all_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            _create_state(adam, group, parameter)


def _create_state(adam: torch.optim.Optimizer, group: dict, parameter: Tensor) -> dict:
    """Return a parameter's state, with the entries that Adam would create at its first step.

    Megatron's `init_state_fn` leaves out the count, without which torch's Adam fails.
    """
    state = adam.state[parameter]
    if not state:
        if _counts_by_parameter(adam):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return state
