"""Workloads that the pool's processes run for the tests of the optimizer's state. Collective, as in workloads.py."""

from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from megatron_aspo.data.batch import TrainBatch
from tests.parallel.workloads import _trainer, array


def interrupted(rank: int, meeting: str, settings, batch: TrainBatch) -> dict:
    """Take two rollout steps in three ways: uninterrupted; with the state read before and between; stopped and restored in a new group."""
    from megatron_aspo.trainer.optimizer_state import updates
    from megatron_aspo.trainer.rng import rng_states

    with _trainer(rank, meeting, settings) as trainer:
        for step in (0, 1):
            trainer.update(batch, step)
        straight = snapshot(trainer)

    with _trainer(rank, f"{meeting}.read", settings) as trainer:
        first = snapshot(trainer)
        assert updates(trainer.optimizer) == 0
        with gradients_of_every_update(trainer) as gradients:
            report = trainer.update(batch, step=0)
        draw()
        kept, kept_rng = snapshot(trainer), rng_states()
        trainer.update(batch, step=1)
        read = snapshot(trainer)
        expected_draws = draw()

    with _trainer(rank, f"{meeting}.restored", settings) as trainer:
        torch.manual_seed(5)
        restore(trainer, kept, kept_rng)
        reread = snapshot(trainer)
        trainer.update(batch, step=1)
        restored = snapshot(trainer)
        draws = draw()

    return {
        "first": arrays(first),
        "kept": arrays(kept),
        "gradients": gradients,
        "learning_rate": report.learning_rate,
        "moved": unequal(straight, kept),
        "by reading": unequal(straight, read),
        "by copying": unequal(kept, reread),
        "by restoring": unequal(straight, restored),
        "draws": draws == expected_draws,
    }


def snapshot(trainer) -> dict:
    """Return copies of everything that the next update depends on."""
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs, updates

    slabs = optimizer_slabs(trainer.model, trainer.optimizer)
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
        "ranges": {name: (slab.start, slab.stop) for name, slab in slabs.items()},
        "master": {name: slab.master.clone() for name, slab in slabs.items() if slab.master is not None},
        "exp_avg": {name: slab.exp_avg.clone() for name, slab in slabs.items()},
        "exp_avg_sq": {name: slab.exp_avg_sq.clone() for name, slab in slabs.items()},
        "updates": updates(trainer.optimizer),
    }


@torch.no_grad()
def restore(trainer, kept: dict, rng: dict) -> None:
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs, set_updates
    from megatron_aspo.trainer.rng import restore_rng

    for name, parameter in trainer.model.named_parameters():
        parameter.copy_(kept["weights"][name])
    for name, slab in optimizer_slabs(trainer.model, trainer.optimizer).items():
        if slab.master is not None:
            slab.master.copy_(kept["master"][name])
        slab.exp_avg.copy_(kept["exp_avg"][name])
        slab.exp_avg_sq.copy_(kept["exp_avg_sq"][name])
    set_updates(trainer.optimizer, kept["updates"])
    restore_rng(rng)


def unequal(left: dict, right: dict) -> list[str]:
    """Return the names of the entries that differ in any bit."""
    kinds = ("weights", "master", "exp_avg", "exp_avg_sq")
    pairs = {f"{kind} {name}": (left[kind][name], right[kind][name]) for kind in kinds for name in left[kind]}
    different = [name for name, (a, b) in pairs.items() if not torch.equal(a, b)]
    return different + [what for what in ("ranges", "updates") if left[what] != right[what]]


@contextmanager
def gradients_of_every_update(trainer):
    """Return a list that each update extends by {parameter: float64 gradient before clipping}, of at least this rank's own shard."""
    seen: list[dict[str, np.ndarray]] = []
    apply = trainer.updater.apply_gradients

    def recording():
        seen.append({name: array(parameter.main_grad.double()).ravel() for name, parameter in trainer.model.named_parameters()})
        return apply()

    trainer.updater.apply_gradients = recording
    yield seen
    trainer.updater.apply_gradients = apply


def mixed_dtypes(rank: int, meeting: str, distributed: bool) -> list[tuple[str, int, int, bool]]:
    """Return the slabs of a module with parameters of two dtypes in one group: name, range, whether the main weight is the parameter's."""
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_aspo.trainer import parallel
    from megatron_aspo.trainer.device import select_device
    from megatron_aspo.trainer.optimizer import build_optimizer, wrap_model
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs
    from megatron_aspo.trainer.options import OptimizerOptions
    from megatron_aspo.weights.layout import ParallelSizes

    parallel.initialize(rank, ParallelSizes(data=2), dist.FileStore(meeting, 2), select_device(), timeout_s=60, seed=0)
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.matrix = torch.nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    module.full = torch.nn.Parameter(torch.randn(5, 7))
    module.small = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16))
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16)
    wrapped = wrap_model(module, config, distributed)
    slabs = optimizer_slabs(module, build_optimizer([wrapped], config, OptimizerOptions(), torch.bfloat16, distributed))
    result = []
    for name, slab in slabs.items():
        parameter = module.get_parameter(name).detach()
        own = parameter.float().ravel()[slab.start : slab.stop]
        correct = (slab.master is None) if parameter.dtype == torch.float32 else torch.equal(slab.master, own)
        result.append((name, slab.start, slab.stop, correct and slab.exp_avg.shape == slab.exp_avg_sq.shape == own.shape))
    parallel.destroy()
    return result


def draw() -> list[float]:
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(3).tolist()
    return [*tracked, *torch.rand(3).tolist(), np.random.rand()]


def arrays(kept: dict) -> dict:
    """Return arrays that can be sent between processes; parameters flattened."""
    return {
        kind: {name: array(tensor.double()).ravel() for name, tensor in value.items()}
        if kind in ("weights", "master", "exp_avg", "exp_avg_sq")
        else value
        for kind, value in kept.items()
    }
