"""What the pool's processes run. Each function is collective: (rank, init_method, …) on every rank of the pool."""

import numpy as np
import torch

from megatron_aspo.data.batch import TrainBatch


def one_step(rank: int, init_method: str, settings, batch: TrainBatch, old: np.ndarray, reference: np.ndarray | None):
    """Gradients and weights (Hugging Face names) and the tally of one optimizer step over the whole batch; rank 0's answer counts."""
    from megatron_aspo.trainer import parallel
    from megatron_aspo.trainer.optimizer import set_learning_rate
    from megatron_aspo.trainer.rank import Scores, TrainerRank

    trainer = TrainerRank(settings, rank, init_method)
    try:
        scored = trainer.score(batch).old
        scores = Scores(torch.from_numpy(old), None if reference is None else torch.from_numpy(reference))
        set_learning_rate(trainer._optimizer, settings.optimizer, step=0)
        tally = trainer.accumulate_gradients(batch, np.arange(batch.samples), scores)
        metas = trainer.tensor_metas("float32")
        gradients = None
        if not settings.trainer.distributed_optimizer:
            gradients = {name: t.numpy() for name, t in trainer.whole_tensors(metas, lambda parameter: parameter.main_grad)}
        _, norm = trainer.apply_gradients()
        weights = {name: t.numpy() for name, t in trainer.whole_tensors(metas)}
        if trainer.parallel.is_last_stage:
            tally = trainer._sum_over_replicas(tally)
        return {
            "logprobs": scored.numpy() if trainer.parallel.is_last_stage else None,
            "gradients": gradients,
            "weights": weights,
            "norm": norm,
            "tally": tally if trainer.parallel.is_last_stage else None,
        }
    finally:
        parallel.destroy()
