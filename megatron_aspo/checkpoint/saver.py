"""Saves one training rank's part of a checkpoint, from a copy of its state while training goes on, and restores it.

Every rank writes its files into a directory beside the checkpoint's, and a report. Rank 0 waits for all reports, hashes every Hugging Face
tensor as it is on the disk, writes the manifest and renames the directory. All ranks need the same file system.
"""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from megatron_aspo.checkpoint.manifest import Manifest, write_manifest
from megatron_aspo.checkpoint.megatron_files import MegatronReader, rank_file, slab_key
from megatron_aspo.checkpoint.proof import hash_tensors
from megatron_aspo.checkpoint.request import SaveRequest, read_attempt
from megatron_aspo.common.atomic import disk_errors, publish, sync, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_model
from megatron_aspo.hf.small_files import copy_small_files
from megatron_aspo.hf.tensor_file import TensorFileWriter
from megatron_aspo.hf.tensor_meta import TensorMeta, meta_of
from megatron_aspo.hf.transfer import assemble
from megatron_aspo.trainer.optimizer_state import optimizer_slabs, set_updates, updates
from megatron_aspo.trainer.rng import restore_rng, rng_states

if TYPE_CHECKING:
    from megatron_aspo.trainer.rank import TrainerRank

Tensors = dict[str, torch.Tensor]


class RankSaver:
    def __init__(self, trainer: "TrainerRank"):
        self._trainer = trainer
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        """Host memory of the copy from which an asynchronous checkpoint is written."""
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self) -> None:
        """Allocate the memory of the copy before training begins: touching new memory takes several times longer than copying."""
        self._copy(self._state())

    def save(self, request: SaveRequest) -> float:
        """Start a checkpoint, after the one in progress is done; return the seconds until training can go on."""
        started = time.perf_counter()
        self.finish()
        self._check_file_system(request)
        state = self._state()
        if request.asynchronous:
            state = self._copy(state)
        training = request.training | {
            "updates": updates(self._trainer.optimizer),
            "master": any("master/" in k for k in state["optimizer"]),
        }
        self._writer = threading.Thread(target=self._run, args=(replace(request, training=training), state), daemon=True)
        self._writer.start()
        if not request.asynchronous:
            self.finish()
        return time.perf_counter() - started

    def _check_file_system(self, request: SaveRequest) -> None:
        run_directory, rank = request.target.parent.parent, self._trainer.parallel.rank
        try:
            seen = read_attempt(run_directory) == request.attempt
        except OSError:
            seen = False
        if not seen:
            raise UserError(
                f"training rank {rank} does not see what the driver wrote into {run_directory}: another process has taken over this run, "
                "or the nodes do not share that file system; choose a run_dir that they share"
            )

    def finished(self) -> bool:
        """Return whether nothing is being written. Raises the writer's error, if any."""
        if self._writer is None or self._writer.is_alive():
            return self._writer is None
        return self.finish()

    def finish(self) -> bool:
        """Wait for the writer and return True. Raises the writer's error, if any."""
        if self._writer is not None:
            self._writer.join()
        self._writer, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return True

    def _state(self) -> dict[str, Tensors]:
        """Return section (model, optimizer, rng) → the live tensors of this rank's file."""
        trainer, rank = self._trainer, self._trainer.parallel.rank
        held = trainer.stored_layouts[rank].parameter_shapes if rank in trainer.stored_layouts else {}
        parameters = dict(trainer.model.named_parameters())
        slabs = optimizer_slabs(trainer.model, trainer.optimizer)
        if not trainer.settings.trainer.distributed_optimizer:
            slabs = {name: slab for name, slab in slabs.items() if name in held}  # replicas hold the same
        return {
            "model": {name: parameters[name] for name in held},
            "optimizer": {
                slab_key(kind, name, slab.start, slab.stop): values
                for name, slab in slabs.items()
                for kind, values in (("master", slab.master), ("exp_avg", slab.exp_avg), ("exp_avg_sq", slab.exp_avg_sq))
                if values is not None
            },
            "rng": dict(sorted(rng_states().items(), key=lambda item: -item[1].element_size())),
        }

    @torch.no_grad()
    def _copy(self, state: dict[str, Tensors]) -> dict[str, Tensors]:
        copied: dict[str, Tensors] = {}
        for section, tensors in state.items():
            copied[section] = {}
            for key, tensor in tensors.items():
                if (section, key) not in self._copies:
                    self._copies[section, key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copied[section][key] = self._copies[section, key].copy_(tensor)
        return copied

    def _run(self, request: SaveRequest, state: dict[str, Tensors]) -> None:
        rank = self._trainer.parallel.rank
        try:
            with disk_errors(request.target, "nothing of it was left"):
                report = {"files": _write_rank(request.unfinished, rank, state)}
        except BaseException as error:
            self._error = error
            report = {"error": str(error) if isinstance(error, UserError) else repr(error), "user": isinstance(error, UserError)}
        try:
            with disk_errors(request.target, "nothing of it was left"):
                _report(request.unfinished, rank, report)
                if rank == 0:
                    self._complete(request)
        except BaseException as error:
            self._error = self._error or error
        if rank == 0 and self._error:
            shutil.rmtree(request.unfinished, ignore_errors=True)

    def _complete(self, request: SaveRequest) -> None:
        trainer, directory, dtype = self._trainer, request.unfinished, self._trainer.settings.trainer.dtype
        files = _wait_for_reports(directory, trainer.parallel.sizes.world, trainer.settings.trainer.timeout_s)
        copy_small_files(trainer.hf.directory, directory / "huggingface", dtype, skip=("README.md",))
        (directory / "config.yaml").write_text(request.config, encoding="utf-8")
        manifest = Manifest(trainer.hf.architecture, dtype, trainer.layer_spec, trainer.parallel.sizes, {}, request.training)
        hashes = hash_tensors(MegatronReader(directory, manifest, trainer.hf), trainer.tensor_metas(dtype))
        write_manifest(directory, replace(manifest, tensors=hashes), files)
        if read_attempt(request.target.parent.parent) != request.attempt:
            raise UserError(f"{request.target} was not made: another process has taken over this run")
        publish(directory, request.target)


def restore(trainer: "TrainerRank", directory: Path, manifest: Manifest) -> None:
    """Restore weights, optimizer and, with the layout and kind of device of the checkpoint, random generators.

    Each rank reads only its shard. At another layout the generators start again from the seed: a rank's state has no meaning there.
    """
    model = read_model(directory / "huggingface")
    kind = "master" if manifest.training["master"] else "model"
    layout, parameters = trainer.layout, dict(trainer.model.named_parameters())
    slabs = optimizer_slabs(trainer.model, trainer.optimizer)

    @torch.no_grad()
    def fill(kind: str, targets: Mapping[str, torch.Tensor], whole: bool = False) -> None:
        reader = MegatronReader(directory, manifest, model, kind)
        wanted = {name: target.dtype for name, target in targets.items()}
        for name, values in assemble(layout, reader, wanted):
            targets[name].copy_(values if whole else values.reshape(-1)[slabs[name].start : slabs[name].stop])

    # Weights are read in this run's element type: float32 main weights round to the same values as when they were written.
    fill(kind, parameters, whole=True)
    fill(kind, {name: slab.master for name, slab in slabs.items() if slab.master is not None})
    fill("exp_avg", {name: slab.exp_avg for name, slab in slabs.items()})
    fill("exp_avg_sq", {name: slab.exp_avg_sq for name, slab in slabs.items()})
    set_updates(trainer.optimizer, manifest.training["updates"])
    if manifest.sizes == trainer.parallel.sizes:
        states = load_file(rank_file(directory, "rng", trainer.parallel.rank))
        if states.keys() == rng_states().keys():
            restore_rng(states)


def _write_rank(directory: Path, rank: int, state: dict[str, Tensors]) -> dict[str, str]:
    """Write this rank's files and return relative path → SHA-256."""
    hashes = {}
    for section, tensors in state.items():
        if not tensors:
            continue
        file = rank_file(directory, section, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        metas: list[TensorMeta] = [meta_of(key, tensor) for key, tensor in tensors.items()]
        with TensorFileWriter(file, metas) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor.cpu())
            hashes[str(file.relative_to(directory))] = writer.close().sha256
        sync(file)  # on the node that wrote it
    return hashes


def _report(directory: Path, rank: int, report: dict) -> None:
    reports = directory / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    write_text(reports / f"{rank}.json", json.dumps(report))


def _wait_for_reports(directory: Path, world: int, timeout_s: float) -> dict[str, str]:
    """Wait for all ranks and return relative path → SHA-256 of their files. Raises when a rank failed or does not report in time."""
    files: dict[str, str] = {}
    for rank in range(world):
        path = directory / "reports" / f"{rank}.json"
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(f"training rank {rank} did not write its part of {directory.name} within trainer.timeout_s={timeout_s:g} s")
            time.sleep(0.02)
        report = json.loads(path.read_text(encoding="utf-8"))
        if "error" in report:
            raise (UserError if report["user"] else RuntimeError)(f"training rank {rank}: {report['error']}")
        files |= report["files"]
    shutil.rmtree(directory / "reports")
    return files
