"""The training ranks as Ray actors, and their handle in the driver."""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayTaskError

from megatron_aspo.checkpoint.request import SaveRequest
from megatron_aspo.common.actors import Pending, require_cluster
from megatron_aspo.common.device_environment import rank_environment
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.network import free_port, interface_of
from megatron_aspo.runtime.nodes import ranks_by_node
from megatron_aspo.sync.meeting import TransferError, meeting_store
from megatron_aspo.trainer.settings import RankSettings, UpdateReport

if TYPE_CHECKING:
    from megatron_aspo.data.batch import TrainBatch
    from megatron_aspo.rollout.transfer_spec import TransferSpec


class TrainerError(RuntimeError):
    """A training rank failed; names the rank and includes its traceback."""


class TrainerActor:
    """One training rank in a separate process. Megatron and torch are imported here, never in the driver."""

    def address(self) -> tuple[str, int]:
        """Return this node's private address, and a free port on it."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

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

    def update(self, batch: "TrainBatch", step: int) -> UpdateReport:
        return self._rank.update(batch, step)

    def connect(self, host: str, port: int, spec: "TransferSpec") -> None:
        self._rank.connect(host, port, spec)

    def publish(self, version: int, verify: bool) -> int:
        return self._rank.publish(version, verify)

    def place(self) -> tuple[str, str]:
        """Return Ray's id of this node, and of this rank's device on it ("" on CPU)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), ",".join(context.get_accelerator_ids().get("GPU", []))

    def offload(self, part: str) -> None:
        self._rank.offload(part)

    def reload(self) -> None:
        self._rank.reload()

    def save(self, request: SaveRequest) -> float:
        return self._saver.save(request)

    def saved(self, wait: bool) -> bool:
        return self._saver.finish() if wait else self._saver.finished()

    def export(self, directory: Path, dtype: str, files: dict[str, str]) -> dict[str, str]:
        from megatron_aspo.checkpoint.hf_export import write_export

        return write_export(directory, self._rank, dtype, files)


@dataclass
class Trainers:
    """All training ranks. Every method is a collective over them; a failing rank ends the call with its error."""

    _actors: list
    described: dict[str, str]

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
        actors = [ray.remote(TrainerActor).options(**options).remote() for _ in range(settings.sizes.world)]
        trainers = cls(actors, {})
        try:
            actors[:] = [actors[process] for process in ranks_by_node(trainers.places(), settings.sizes.tensor)]
            host, port = trainers._get([actors[0].address.remote()])[0]
            common = (host, port, os.getcwd(), checkpoint, reserve)
            chosen = trainers._get([actor.start.remote(settings, rank, *common) for rank, actor in enumerate(actors)])
        except BaseException:
            trainers.close()
            raise
        return replace(trainers, described=chosen[0])

    @property
    def world(self) -> int:
        """The number of training ranks."""
        return len(self._actors)

    def update(self, batch: "TrainBatch", step: int) -> UpdateReport:
        """Train one step; return the metrics of all ranks in one report."""
        shared = ray.put(batch)
        reports = self._get([actor.update.remote(shared, step) for actor in self._actors])
        # Complete on the last pipeline stage, whose last rank is the last of all.
        return reports[-1]

    def address(self, timeout_s: float) -> tuple[str, int]:
        """Return the private address of rank 0's node, and a free port on it."""
        return self._get([self._actors[0].address.remote()], timeout_s)[0]

    def connect(self, host: str, port: int, spec: "TransferSpec") -> Pending:
        """Form the group of the spec with the engine workers, which must be connecting at the same time."""
        return self._pending([actor.connect.remote(host, port, spec) for actor in self._actors])

    def publish(self, version: int, verify: bool) -> Pending:
        """Send the current weights to the engines, which must be receiving; each rank answers with the bytes that it sent."""
        return self._pending([actor.publish.remote(version, verify) for actor in self._actors])

    def places(self) -> list[tuple[str, str]]:
        """Return, for each rank, Ray's id of its node, and of its device on it ("" on CPU)."""
        return self._get([actor.place.remote() for actor in self._actors])

    def offload(self, part: str) -> None:
        """Let every rank free the device memory of its `optimizer` or its `weights`."""
        self._get([actor.offload.remote(part) for actor in self._actors])

    def reload(self) -> None:
        """Undo every `offload`."""
        self._get([actor.reload.remote() for actor in self._actors])

    def save(self, request: SaveRequest) -> float:
        """Start a checkpoint once the current one is done; return the seconds until training can go on."""
        return max(self._get([actor.save.remote(request) for actor in self._actors]))

    def saved(self, wait: bool, timeout_s: float | None = None) -> bool:
        """Whether no checkpoint is being written. Raises the error of a checkpoint that failed, and TimeoutError."""
        return all(self._get([actor.saved.remote(wait) for actor in self._actors], timeout_s))

    def export(self, directory: Path, dtype: str, files: dict[str, str]) -> dict[str, str]:
        """Write the current weights as a Hugging Face directory, with `files` (name → text) in it; return tensor → SHA-256."""
        return self._get([actor.export.remote(directory, dtype, files) for actor in self._actors])[0]

    def close(self) -> None:
        """End every rank."""
        for actor in self._actors:
            ray.kill(actor)

    def _get(self, refs: list, timeout_s: float | None = None) -> list:
        """Return the answers in order. The first failure is raised at once: the other ranks may be waiting for the failed one."""
        return self._pending(refs).result(timeout_s)

    def _pending(self, refs: list) -> Pending:
        names = tuple(f"training rank {rank}" for rank in range(len(refs)))
        return Pending(names, tuple(refs), tuple(partial(_explained, name) for name in names))


def _explained(name: str, error: Exception) -> Exception:
    if not isinstance(error, RayTaskError):
        return TrainerError(f"the process of {name} died: {error}")
    if isinstance(error.cause, UserError):
        return error.cause
    if isinstance(error.cause, TransferError):
        return TrainerError(str(error.cause))
    return TrainerError(f"{name} failed:\n{error}")
