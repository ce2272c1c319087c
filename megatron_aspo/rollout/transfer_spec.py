"""The specification of a weight transfer from training ranks to engine workers, from which every rank of either side derives its schedule.

Pure: no vLLM, no torch, no process group.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_aspo import __version__
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.sync.schedule import Schedule, node_map
from megatron_aspo.weights.families import tensor_shapes
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import ModelDims, ParallelSizes


@dataclass(frozen=True)
class TransferSpec:
    """The record on which both sides of a transfer must agree."""

    architecture: str
    dims: ModelDims
    training: ParallelSizes
    engines: EngineSizes
    dtype: str
    """Element type of the engines' weights, in which weights travel."""
    bucket_bytes: int
    """Upper bound on the bytes of whole tensors that are on their way to one worker at a time; as many may follow behind them."""
    colocated: bool = False
    """Training ranks and workers share devices, which NCCL refuses: the group uses gloo. Weights then travel through memory of the device
    within a machine (CUDA IPC), and through host memory between machines."""

    @property
    def world(self) -> int:
        """The number of ranks of the group: training ranks come first, then workers, engine by engine."""
        return self.training.world + self.engines.world

    def rank_name(self, rank: int) -> str:
        """Return the name of a rank of the group for errors."""
        if rank < self.training.world:
            return f"training rank {rank}"
        engine, worker = divmod(rank - self.training.world, self.engines.tensor)
        return f"engine {engine}" + (f" worker {worker}" if self.engines.tensor > 1 else "")

    def schedule(self, rank: int, hosts: Sequence[str]) -> Schedule:
        """Return the part of one rank in every transfer; hosts: the host of each rank of the group.

        Raises UserError when the engines cannot shard the model this way.
        """
        source = TrainingHoldings(self.architecture, self.dims, self.training)
        target = EngineHoldings(self.architecture, self.dims, self.engines)
        shapes = tensor_shapes(self.architecture, self.dims)
        return Schedule(
            rank, source, target, node_map(hosts), {name: shapes[name] for name in source.in_turns()}, self.dtype, self.bucket_bytes
        )

    def terms(self) -> dict[str, Any]:
        """Return what both sides compare when they connect: every field by its dotted name, and the version of this package."""
        nested = {
            f"{key}.{name}": field for key, value in self.as_dict().items() if isinstance(value, dict) for name, field in value.items()
        }
        flat = {key: value for key, value in self.as_dict().items() if not isinstance(value, dict)}
        return {"megatron_aspo": __version__} | flat | nested

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings and dicts only, for `from_dict` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransferSpec":
        """Invert `as_dict`."""
        records = {"dims": ModelDims, "training": ParallelSizes, "engines": EngineSizes}
        return cls(**{key: records[key](**value) if key in records else value for key, value in values.items()})
