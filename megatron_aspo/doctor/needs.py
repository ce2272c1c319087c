"""The requirements of a run that are checked on every node, and the node's context."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rollout.engine_layout import EngineSizes


@dataclass(frozen=True)
class RunNeeds:
    """The requirements of a run on each node. Without a recipe there is no model and no data."""

    directory: Path
    """Run directory, or the parent of the runs; need not exist."""
    model: str = ""
    """Absolute path of the model, or its hub name; empty without a recipe."""
    data: tuple[str, ...] = ()
    """Absolute paths and `hub:` names of the data."""
    code: CodeOptions | None = None
    """Options of the code reward; None if the run has another. A sandbox that does not start is then a warning, not a failure."""
    engines: EngineSizes = field(default_factory=EngineSizes)
    disk_bytes: int = 0
    """Bytes that the run will write; 0 if unknown."""


@dataclass(frozen=True)
class NodeContext:
    """The node on which checks run: its name, address and relation to Ray."""

    label: str
    """The node's name in the table."""
    address: str = "127.0.0.1"
    """Address on which the node's process groups listen."""
    in_ray: bool = False
    """Whether this process belongs to a Ray cluster, and so has the limits and the environment that Ray was started with."""
    ray_ports: dict[int, str] = field(default_factory=dict)
    """Ports of the node's Ray servers, with their names."""
    reads_data: bool = True
    """Whether the command runs on this node: only the driver reads the data."""
