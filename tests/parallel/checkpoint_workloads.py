"""Workloads that the pool's processes run for the checkpoint tests. Collective, as in workloads.py."""

import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_aspo.data.batch import TrainBatch
from tests.parallel.workloads import _trainer, arrays

KINDS = ("weights", "master", "exp_avg", "exp_avg_sq")


def save_amid_training(rank: int, meeting: str, settings, batch: TrainBatch, target: Path, attempt: str, asynchronous: bool) -> dict:
    """Take a step, begin a checkpoint, and take another step before it is complete; return rank 0's state at each of the two steps."""
    from megatron_aspo.checkpoint import saver as savers
    from megatron_aspo.checkpoint.request import SaveRequest

    updated, write = threading.Event(), savers._write_rank

    def write_late(*arguments):
        # Otherwise the tiny model would be on the disk before the next step changes anything.
        updated.wait()
        return write(*arguments)

    with _trainer(rank, meeting, settings) as trainer:
        saver = savers.RankSaver(trainer)
        trainer.update(batch, step=0)
        saved = gathered(trainer)
        savers._write_rank = write_late if asynchronous else write
        try:
            saver.save(SaveRequest(target, attempt, {"step": 1}, "name: test\n", asynchronous))
            trainer.update(batch, step=1)
            updated.set()
            saver.finish()
        finally:
            savers._write_rank = write
        return {"saved": saved, "after": gathered(trainer)}


def load_and_continue(rank: int, meeting: str, settings, batch: TrainBatch, checkpoint: Path) -> dict:
    from megatron_aspo.checkpoint.manifest import load_manifest
    from megatron_aspo.checkpoint.saver import restore
    from megatron_aspo.trainer.optimizer_state import updates

    with _trainer(rank, meeting, settings) as trainer:
        restore(trainer, checkpoint, load_manifest(checkpoint))
        loaded, count = gathered(trainer), updates(trainer.optimizer)
        trainer.update(batch, step=1)
        return {"loaded": loaded, "after": gathered(trainer), "updates": count}


def gathered(trainer) -> dict[str, dict[str, np.ndarray]]:
    """Return kind → Hugging Face name → whole float32 tensor, assembled by live collectives; on rank 0."""
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs

    slabs = optimizer_slabs(trainer.model, trainer.optimizer)
    metas = trainer.tensor_metas("float32")
    result = {"weights": arrays(trainer.whole_tensors(metas))}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for kind in KINDS[1:]:
        whole = {}
        for name, parameter in trainer.model.named_parameters():
            flat = torch.zeros(parameter.numel(), device=parameter.device)
            if name in slabs:
                slab = slabs[name]
                values = getattr(slab, kind)
                flat[slab.start : slab.stop] = parameter.detach().reshape(-1)[slab.start : slab.stop] if values is None else values
            if trainer.settings.trainer.distributed_optimizer:
                dist.all_reduce(flat, group=_replicas(name in trainer.layout.expert_parameters))
            whole[name] = flat.view(parameter.shape)
        result[kind] = arrays(trainer.whole_tensors(metas, lambda p, whole=whole: whole[names[id(p)]]))
    return result


def _replicas(expert: bool) -> dist.ProcessGroup:
    """Return the ranks that hold the same parameter, and with the distributed optimizer share its state."""
    from megatron.core import parallel_state

    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def save_and_fail(rank: int, meeting: str, settings, target: Path, attempt: str) -> str:
    """Make a checkpoint that must fail; return the reason that this rank gives."""
    from megatron_aspo.checkpoint.request import SaveRequest
    from megatron_aspo.checkpoint.saver import RankSaver
    from megatron_aspo.common.errors import UserError

    with _trainer(rank, meeting, settings) as trainer:
        saver = RankSaver(trainer)
        try:
            saver.save(SaveRequest(target, attempt, {"step": 1}, "", asynchronous=True))
            saver.finish()
        except UserError as error:
            return str(error)
        return ""


def save_while_another_takes_over(rank: int, meeting: str, settings, target: Path, attempt: str, successor: str) -> str:
    """Make a checkpoint whose run is taken over once all ranks have written their files; return the reason that this rank gives."""
    from megatron_aspo.checkpoint import saver as savers
    from megatron_aspo.checkpoint.request import ATTEMPT

    write = savers._write_rank

    def write_and_lose(directory: Path, *arguments) -> dict[str, str]:
        hashes = write(directory, *arguments)
        if rank == 0:
            while not (directory / "reports" / "1.json").exists():
                time.sleep(0.01)
            (target.parents[1] / ATTEMPT).write_text(successor)
        return hashes

    savers._write_rank = write_and_lose
    try:
        return save_and_fail(rank, meeting, settings, target, attempt)
    finally:
        savers._write_rank = write
