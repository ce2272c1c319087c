"""The plan of a run: groups of ranks, memory, bytes of a weight sync, tokens of a step.

Nothing is started: everything follows from the recipe and the model's config.json. The model's weights are checked if they are present.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import psutil

from megatron_aspo.checkpoint.start_model import find_copy
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, to_yaml
from megatron_aspo.hf.model import HFModel
from megatron_aspo.rollout.engine_layout import EngineHoldings
from megatron_aspo.rollout.memory import WorkerMemory, cached_tokens, worker_memory
from megatron_aspo.runtime.checks import check_run, expected_device
from megatron_aspo.runtime.nodes import NodeShare, shares_of_nodes
from megatron_aspo.runtime.start import directory_exists, find_start
from megatron_aspo.sync.plan import RankNodes, count_least_traffic, fill_buckets
from megatron_aspo.trainer.memory import Load, RankMemory, rank_memory
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.families import layout
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import ITEMSIZE

_AXES = ("tensor", "context", "data", "pipeline", "expert")
_GROUPS_SHOWN = 4
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """A valid recipe with the numbers that follow from it."""

    config: Config
    model: HFModel
    settings: RankSettings
    device: str
    nodes: tuple[NodeShare, ...] = ()
    """The ranks and engines of each node; empty for one node."""
    notes: tuple[str, ...] = ()
    """Notes: how `train` would treat an existing run directory, and what could not be checked."""

    @property
    def groups(self) -> dict[str, list[list[int]]]:
        """For each axis of more than one rank, the groups of ranks that communicate along it."""
        sizes, found = self.settings.sizes, {}
        for axis in _AXES:
            if getattr(sizes, axis) == 1:
                continue
            groups: dict[tuple, list[int]] = {}
            for rank in range(sizes.world):
                at = vars(sizes.coordinates(rank))
                along = {axis} if axis != "expert" else {"tensor", "data", "context", "expert"}
                fixed = ("pipeline", "expert_tensor", "expert_data") if axis == "expert" else ("tensor", "context", "data", "pipeline")
                groups.setdefault(tuple(at[name] for name in fixed if name not in along), []).append(rank)
            found[axis] = list(groups.values())
        return found

    @cached_property
    def load(self) -> Load:
        """The load of one replica in a mini-batch whose samples all have the maximum length."""
        config, longest = self.config, self.config.max_model_len
        prompts = min(config.algorithm.mini_batch_prompts, config.rollout.prompts_per_step)
        tokens = math.ceil(prompts * config.rollout.responses_per_prompt / self.settings.sizes.data) * longest
        room = min(tokens, max(config.trainer.micro_batch_tokens, longest))
        return Load(room, math.ceil(tokens / room))

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """The memory of one rank of each pipeline stage; the other ranks of a stage hold the same."""
        sizes, checkpoint = self.settings.sizes, self.config.checkpoint
        asynchronous = bool(checkpoint.every) and checkpoint.asynchronous
        found = []
        for stage in range(sizes.pipeline):
            at = sizes.coordinates(stage * sizes.stage)
            held = layout(self.model.architecture, self.model.dims, sizes, at)
            found.append(rank_memory(self.model, held, self.settings, at, self.load, self.device == "cuda", asynchronous))
        return found

    @cached_property
    def worker(self) -> WorkerMemory:
        config = self.config
        return worker_memory(self.model, config.rollout, config.transfer_bucket_mib << 20, self.device == "cpu", config.max_model_len)

    @property
    def devices(self) -> int:
        """GPUs of all ranks and engines; on a CPU, processes."""
        ranks, workers = self.settings.sizes.world, self.config.rollout.sizes.world
        return ranks if self.config.placement == "colocated" else ranks + workers

    @cached_property
    def sync(self) -> tuple[int, int]:
        """The bytes of one weight sync, the minimum over all plans, which ours attains on one node, and the number of buckets."""
        model, sizes = self.model, self.config.rollout.sizes
        source = TrainingHoldings(model.architecture, model.dims, self.settings.sizes)
        target = EngineHoldings(model.architecture, model.dims, sizes)
        itemsize, order = ITEMSIZE[self.config.rollout.dtype], source.in_turns()
        moved = count_least_traffic(order, source, target, RankNodes((0,) * (source.world + target.world), {})) * itemsize
        nbytes = {name: math.prod(shape) * itemsize for name, shape in model.tensor_shapes.items()}
        return moved, len(fill_buckets(order, target, nbytes.__getitem__, self.config.transfer_bucket_mib << 20))

    @property
    def needs(self) -> int:
        """Bytes of memory for a run that is entirely on this machine, without what the programs themselves take."""
        sizes, rollout = self.settings.sizes, self.config.rollout
        return sum(rank.total for rank in self.ranks) * sizes.stage + self.worker.total * rollout.sizes.world


def make_plan(config: Config, device: str = "", nodes: int = 1) -> Plan:
    """Return the plan of a recipe. Raises UserError, with the rule and the cure, if the recipe cannot work.

    device: `cpu | cuda`; empty: this machine's. nodes: number of nodes with equally many devices.
    """
    notes = [_directory_note(config)]
    device = device or expected_device(replace(config, ray_address=""))
    checked = check_run(config, device, weights_required=False)
    if checked.reader is None:
        notes.append(f"{checked.model.directory} holds no weights: only its config.json was checked")
    if checked.torch_dist and not find_copy(checked.torch_dist):
        notes.append(f"train will first write a Hugging Face copy of {checked.torch_dist} into it, for engines and ranks")
    sizes, colocated = checked.settings.sizes, config.placement == "colocated"
    shares = shares_of_nodes(nodes, sizes.world, sizes.tensor, config.rollout.sizes, colocated) if nodes > 1 else []
    plan = Plan(config, checked.model, checked.settings, device, tuple(shares), tuple(filter(None, notes)))
    if device == "cpu" and not config.ray_address and nodes == 1:
        check_room(plan)
    return plan


def _directory_note(config: Config) -> str:
    """Return how `train` would treat the run directory, if it exists. Raises UserError if there is nothing to resume from."""
    exists = directory_exists(config)
    if config.resume == "never":
        refused = (
            f"run directory {config.directory} exists: train will refuse it; choose another name or run_dir, remove it, or set resume=auto"
        )
        return refused if exists else ""
    start = find_start(config, damage=False)
    return f"train will go on after step {start.step} from {start.checkpoint}" if start.checkpoint else ""


def check_room(plan: Plan) -> None:
    """Raise UserError if training ranks and engines, all on this machine, need more memory than it has."""
    room = psutil.virtual_memory().total
    if plan.needs > room:
        raise UserError(
            f"training ranks and engines need {plan.needs / GB:.1f} GB on this machine, which has {room / GB:.1f}; lower "
            "trainer.micro_batch_tokens or rollout.kv_cache_gib, set trainer.recompute=full, or take a smaller model"
        )


def format_plan(plan: Plan) -> Iterator[str]:
    """Yield the lines that are printed."""
    config, settings, sizes = plan.config, plan.settings, plan.settings.sizes
    yield "configuration"
    yield from ("  " + line for line in to_yaml(config).splitlines())
    kind = "GPUs" if plan.device == "cuda" else f"processes on {len(os.sched_getaffinity(0))} cores"
    yield ""
    yield f"placement ({config.placement}): {plan.devices} {kind}"
    yield f"  training ranks   {sizes.world}: {settings.layout}"
    for axis, groups in plan.groups.items():
        yield f"    {axis:<14} {_format_groups(groups)}"
    yield f"  engines          {config.rollout.engines} × {config.rollout.tensor_parallel}"
    for number, share in enumerate(plan.nodes):
        ranks = f"ranks {share.ranks.start} to {share.ranks.stop - 1}" if share.ranks else "no ranks"
        yield f"  node {number:<11} {ranks}, " + (f"engines {_format_range(share.engines)}" if share.engines else "no engines")
    yield ""
    yield f"memory in GB, besides what the programs take themselves; micro-batches of {plan.load.tokens:,} tokens"
    names = [field.name for field in fields(RankMemory)]
    for stage, memory in enumerate(plan.ranks):
        label = f"rank of stage {stage}" if sizes.pipeline > 1 else "training rank"
        yield f"  {label:<16} {_format_gb((name, getattr(memory, name)) for name in names)}, together {memory.total / GB:.2f}"
    parts = [(field.name, getattr(plan.worker, field.name)) for field in fields(WorkerMemory)]
    yield f"  engine worker    {_format_gb(parts)}, together {plan.worker.total / GB:.2f}"
    cached, wanted = cached_tokens(plan.model, config.rollout), config.rollout.max_running_requests * config.max_model_len
    yield f"  key-value cache  {cached:,} tokens: {cached // config.max_model_len:,} requests at full length, of "
    yield f"                   {config.rollout.max_running_requests} that may run ({min(1.0, cached / wanted):.0%} of what they could want)"
    moved, buckets = plan.sync
    yield ""
    yield f"weight sync        {moved / GB:.3f} GB in {buckets} buckets"
    samples = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    updates = config.algorithm.epochs * math.ceil(config.rollout.prompts_per_step / config.algorithm.mini_batch_prompts)
    yield f"a step             {samples:,} responses, at most {samples * config.max_model_len:,} tokens, in {updates} updates"
    if plan.notes:
        yield ""
        yield from (f"note: {note}" for note in plan.notes)


def plan_as_json(plan: Plan) -> dict:
    """Return the plan's numbers as JSON values, in bytes."""
    moved, buckets = plan.sync
    samples = plan.config.rollout.prompts_per_step * plan.config.rollout.responses_per_prompt
    return {
        "device": plan.device,
        "run_directory_exists": directory_exists(plan.config),
        "notes": list(plan.notes),
        "devices": plan.devices,
        "groups": plan.groups,
        "nodes": [{"ranks": [*share.ranks], "engines": [*share.engines]} for share in plan.nodes],
        "ranks": [vars(memory) | {"total": memory.total} for memory in plan.ranks],
        "engine_worker": vars(plan.worker) | {"total": plan.worker.total},
        "kv_cache_tokens": cached_tokens(plan.model, plan.config.rollout),
        "sync_bytes": moved,
        "sync_buckets": buckets,
        "tokens_per_step": samples * plan.config.max_model_len,
    }


def _format_gb(parts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {value / GB:.2f}" for name, value in parts if value)


def _format_range(found: tuple[int, ...]) -> str:
    first, last = found[0], found[-1]
    return f"{first} to {last}" if first < last else str(first)


def _format_groups(groups: list[list[int]]) -> str:
    shown = " ".join("[" + " ".join(map(str, group)) + "]" for group in groups[:_GROUPS_SHOWN])
    return f"{len(groups)} × {len(groups[0])}: {shown}" + (" …" if len(groups) > _GROUPS_SHOWN else "")
