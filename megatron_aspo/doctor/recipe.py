"""The requirements of a recipe on each node, and whether ranks and engines fit onto the devices."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_aspo.config import Config
from megatron_aspo.data.sources import HUB
from megatron_aspo.doctor.files import cached_model
from megatron_aspo.doctor.needs import RunNeeds
from megatron_aspo.doctor.record import Record, failed, ok, warning
from megatron_aspo.rewards.choice import RewardChoice

_CHECKPOINT_BYTES = 16
"""Bytes of a parameter in a checkpoint: main weight and two moments in float32, and the exported weight in float32."""


@dataclass(frozen=True)
class NodeCapacity:
    """The resources that Ray can hand out on one node."""

    devices: int
    """GPUs; logical CPUs where the cluster has no GPU."""
    resources: Mapping[str, float]


def run_needs(config: Config) -> RunNeeds:
    """Return the requirements of a run on each node. Relative paths are resolved against this process's working directory."""
    local = Path(config.model).expanduser()
    is_path = local.exists() or config.model.startswith((".", "/", "~"))
    return RunNeeds(
        config.directory,
        str(local.absolute()) if is_path else config.model,
        tuple(_absolute(location) for location in (*config.data.path, *config.data.eval_path)),
        config.data.code if "code" in RewardChoice(config.data).names else None,
        config.rollout.sizes,
        _disk_bytes(config, local) if is_path else 0,
    )


def check_placement(config: Config, device: str, nodes: list[NodeCapacity]) -> Record:
    """Check the recipe against its model as a run does, then whether enough devices exist.

    device: `cpu | cuda`; empty for that of this machine. nodes: those of the Ray cluster; empty to check this machine without one, its
    memory included.
    Raises UserError with the rule and the cure for an invalid recipe.
    """
    from megatron_aspo.runtime.checks import check_run, expected_device
    from megatron_aspo.runtime.plan import Plan, check_room

    if not Path(config.model).expanduser().exists() and not config.model.startswith((".", "/", "~")):
        cached = cached_model(config.model)
        if cached is None:
            cure = f"fetch it (hf download {config.model}), and run the doctor again"
            return warning("placement", f"not checked: {config.model} is not in the cache of the Hugging Face hub", cure)
        config = replace(config, model=str(cached))
    device = device or expected_device(config)
    checked = check_run(config, device)
    ranks, rollout = checked.settings.sizes.world, config.rollout
    if not nodes:
        if device == "cpu":
            check_room(Plan(config, checked.model, checked.settings, device))
        return ok("placement", f"training ranks: {ranks}, engines: {rollout.engines}, on this machine ({device})")
    return check_fit(ranks, rollout.engines, rollout.tensor_parallel if device == "cuda" else 1, config, device, nodes)


def check_fit(ranks: int, engines: int, per_engine: int, config: Config, device: str, nodes: list[NodeCapacity]) -> Record:
    """Check that `ranks` single devices and `engines` of `per_engine` devices, each on one node, are available together."""
    kind = "GPUs" if device == "cuda" else "logical CPUs"
    shared = config.placement == "colocated" and device == "cuda"
    total = sum(node.devices for node in nodes)
    most = sum(node.devices // per_engine for node in nodes)
    needed = ranks + (0 if shared else engines * per_engine)
    detail = f"training ranks: {ranks}, engines: {engines} × {per_engine}; they need {needed} of {total} {kind} on {len(nodes)} nodes"
    if engines > most:
        return failed(
            "placement",
            f"{detail}; an engine lives on one node, and there is room for {most}",
            "lower rollout.engines or rollout.tensor_parallel, or add nodes",
        )
    if needed > total:
        cure = "lower trainer.data_parallel or rollout.engines, or start Ray with more"
        return failed("placement", detail, cure)
    if (name := config.data.reward_resource) and sum(node.resources.get(name, 0) for node in nodes) < config.data.reward_workers:
        return failed(
            "placement",
            f"{config.data.reward_workers} reward workers need the resource {name}, of which the cluster has less",
            f"""start nodes with more (ray start --resources='{{"{name}": N}}'), or lower data.reward_workers""",
        )
    return ok("placement", detail)


def _absolute(location: str) -> str:
    return location if location.startswith(HUB) else os.path.abspath(Path(location).expanduser())


def _disk_bytes(config: Config, model: Path) -> int:
    """Estimate the bytes that the run writes: its checkpoints, one more during a save, the final model. 0 if the model is unreadable."""
    from megatron_aspo.common.errors import UserError
    from megatron_aspo.hf.model import read_model
    from megatron_aspo.hf.model_directory import resolve_model

    try:
        parameters = sum(math.prod(shape) for shape in read_model(resolve_model(model)).tensor_shapes.values())
    except UserError:
        return 0  # reported by the checks of the model and the placement
    options = config.checkpoint
    kept = 0
    if options.every:
        made = math.ceil(config.steps / options.every)
        kept = min(made, options.keep_last + options.keep_best) if options.keep_last else made
    return parameters * (_CHECKPOINT_BYTES * (kept + bool(kept)) + 4)
