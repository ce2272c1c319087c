"""The training ranks as Ray actors, and their handle in the driver."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from megatron_aspo.checkpoint.request import SaveRequest
from megatron_aspo.common.actors import ActorGroup, Pending, require_cluster
from megatron_aspo.common.device_environment import rank_environment
from megatron_aspo.common.errors import ProcessError, UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.common.network import interface_of, reserved_port
from megatron_aspo.runtime.nodes import ranks_by_node
from megatron_aspo.sync.meeting import TransferError, meeting_store
from megatron_aspo.trainer.settings import RankSettings, UpdateReport

if TYPE_CHECKING:
    from megatron_aspo.data.batch import TrainBatch
    from megatron_aspo.rollout.transfer_spec import TransferSpec


class TrainerError(ProcessError):
    """A training rank failed; names the rank and includes its traceback."""


class TrainerActor:
    """One training rank in a separate process. Megatron and torch are imported here, never in the driver."""

    def __init__(self) -> None:
        self._port = ExitStack()

    def address(self) -> tuple[str, int]:
        """Return this node's private address, and a port on it that is reserved until the next call."""
        self._port.close()
        host = ray.util.get_node_ip_address()
        return host, self._port.enter_context(reserved_port(host))

    def start(
        self, settings: RankSettings, rank: int, host: str, port: int, working_directory: str, checkpoint: Path | None, reserve: bool
    ) -> dict[str, str]:
        """Build the rank; the ranks meet at rank 0's `host:port`. Modules of the driver's working directory can be imported.

        checkpoint: a complete one, from which its state is loaded. reserve: allocate the memory for asynchronous checkpoints. Returns what
        was chosen.
        """
        if working_directory not in sys.path:
            sys.path.append(working_directory)
        interface, sizes = interface_of(ray.util.get_node_ip_address()), settings.sizes
        os.environ.update(rank_environment(interface, sizes.tensor, sizes.context, settings.deterministic, os.environ))
        from megatron_aspo.checkpoint.manifest import load_manifest
        from megatron_aspo.checkpoint.saver import RankSaver, restore
        from megatron_aspo.trainer.rank import TrainerRank

        store = meeting_store(host, port, rank, settings.sizes.world, settings.trainer.timeout_s)
        self._rank = TrainerRank(settings, rank, store)
        self._saver = RankSaver(self._rank)
        if checkpoint is not None:
            restore(self._rank, checkpoint, load_manifest(checkpoint))
        if reserve:
            self._saver.reserve()
        return self._rank.describe()

    def location(self) -> tuple[str, str]:
        """Return Ray's id of this node, and of this rank's device on it ("" on CPU)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), ",".join(context.get_accelerator_ids().get("GPU", []))

    def rank(self, method: str, *arguments: Any) -> Any:
        """Call a method of the TrainerRank."""
        return getattr(self._rank, method)(*arguments)

    def saver(self, method: str, *arguments: Any) -> Any:
        """Call a method of the RankSaver."""
        return getattr(self._saver, method)(*arguments)

    def export(self, directory: Path, dtype: str, files: dict[str, str]) -> dict[str, str]:
        from megatron_aspo.checkpoint.hf_export import write_export

        return write_export(directory, self._rank, dtype, files)


@dataclass(frozen=True)
class Trainers:
    """All training ranks. Every method is a collective over them; the first failing rank ends the call with its error."""

    _group: ActorGroup
    described: dict[str, str]
    """Rank 0's choices (`TrainerRank.describe`)."""

    @classmethod
    def start(cls, settings: RankSettings, device: str, threads: int, checkpoint: Path | None, reserve: bool) -> "Trainers":
        """Create and start every rank, from the model or from a checkpoint; reserve: as `TrainerActor.start`'s.

        Raises UserError when the model or the layout is wrong; then none is left running.
        """
        require_cluster()
        options = {
            "num_cpus": 1,  # a token: see Cluster
            "num_gpus": 1 if device == "cuda" else 0,
            "resources": {settings.trainer.resource: 1} if settings.trainer.resource else {},
            # Ray would set OMP_NUM_THREADS from num_cpus.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[2])}},
        }
        trainers = cls(_group([ray.remote(TrainerActor).options(**options).remote() for _ in range(settings.sizes.world)]), {})
        try:
            processes = [actor for _, actor in trainers._group.actors]
            trainers = cls(_group([processes[n] for n in ranks_by_node(trainers.locations(), settings.sizes.tensor)]), {})
            common = (*trainers.address(), os.getcwd(), checkpoint, reserve)
            described = trainers._group.call_each("start", [(settings, rank, *common) for rank in range(trainers.world)]).result()
        except BaseException:
            trainers.close()
            raise
        return replace(trainers, described=described[0])

    @property
    def world(self) -> int:
        """The number of training ranks."""
        return len(self._group)

    def update(self, batch: "TrainBatch", step: int) -> UpdateReport:
        """Train one step; return the metrics of all ranks in one report."""
        # Complete on the last pipeline stage, whose last rank is the last of all.
        return self._group.call("rank", "update", ray.put(batch), step).result()[-1]

    def address(self, timeout_s: float | None = None) -> tuple[str, int]:
        """Return the private address of rank 0's node, and a port on it that is reserved until the next call."""
        return self._group[:1].call("address").result(timeout_s)[0]

    def connect(self, host: str, port: int, spec: "TransferSpec") -> Pending:
        """Form the group of the spec with the engine workers, which must be connecting at the same time."""
        return self._group.call("rank", "connect", host, port, spec)

    def publish(self, version: int, verify: bool) -> Pending:
        """Send the current weights to the engines, which must be receiving; each rank answers with the bytes that it sent."""
        return self._group.call("rank", "publish", version, verify)

    def locations(self) -> list[tuple[str, str]]:
        """Return, for each rank, Ray's id of its node, and of its device on it ("" on CPU)."""
        return self._group.call("location").result()

    def offload(self, part: str) -> None:
        """Let every rank free the device memory of its `optimizer` or its `weights`."""
        self._group.call("rank", "offload", part).result()

    def reload(self) -> None:
        """Undo every `offload`."""
        self._group.call("rank", "reload").result()

    def save(self, request: SaveRequest) -> float:
        """Start a checkpoint once the current one is done; return the seconds until training can go on."""
        return max(self._group.call("saver", "save", request).result())

    def saved(self, wait: bool, timeout_s: float | None = None) -> bool:
        """Whether no checkpoint is being written. Raises the error of a checkpoint that failed, and TimeoutError."""
        return all(self._group.call("saver", "finish" if wait else "finished").result(timeout_s))

    def export(self, directory: Path, dtype: str, files: dict[str, str]) -> dict[str, str]:
        """Write the current weights as a Hugging Face directory, with `files` (name → text) in it; return tensor → SHA-256."""
        return self._group.call("export", directory, dtype, files).result()[0]

    def close(self) -> None:
        """End every rank."""
        for _, actor in self._group.actors:
            ray.kill(actor)


def _group(actors: list) -> ActorGroup:
    return ActorGroup([(f"training rank {rank}", actor) for rank, actor in enumerate(actors)], _explained)


def _explained(name: str, error: Exception) -> Exception:
    if not isinstance(error, RayTaskError):
        return TrainerError(f"the process of {name} died: {one_line(error)}")
    if isinstance(error.cause, UserError):
        return error.cause
    if isinstance(error.cause, TransferError):
        return TrainerError(str(error.cause))
    return TrainerError(f"{name} failed:\n{error}")
