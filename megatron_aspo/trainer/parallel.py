"""The parallel state of one training rank: an object that is passed in. Megatron's globals are set here, and our code never reads them."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.rng import seed_generators
from megatron_aspo.weights.layout import Coordinates, ParallelSizes


@dataclass(frozen=True)
class ParallelState:
    """A rank's coordinates and its process groups."""

    rank: int
    sizes: ParallelSizes
    at: Coordinates
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """The ranks that differ only in their data."""
    cp_group: dist.ProcessGroup | None = None
    """The ranks over which the tokens of a sequence are sharded; None: sequences are whole."""

    @property
    def is_first_stage(self) -> bool:
        return self.at.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pipeline == self.sizes.pipeline - 1


def initialize(rank: int, sizes: ParallelSizes, store: dist.Store, device: Device, timeout_s: float, seed: int) -> ParallelState:
    """Join the process group of all training ranks and set up Megatron's groups. Collective over all ranks.

    store: the rendezvous of the ranks.
    """
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group(device.backend, store=store, rank=rank, world_size=sizes.world, timeout=timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor_size,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    seed_generators(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    megatron: Any = parallel_state  # it declares no types, and those of its globals include what they are before this
    at = sizes.coordinates(rank)
    theirs = Coordinates(
        tensor=megatron.get_tensor_model_parallel_rank(),
        data=megatron.get_data_parallel_rank(),
        pipeline=megatron.get_pipeline_model_parallel_rank(),
        expert=megatron.get_expert_model_parallel_rank(),
        expert_tensor=megatron.get_expert_tensor_parallel_rank(),
        expert_data=megatron.get_expert_data_parallel_rank(),
        context=megatron.get_context_parallel_rank(),
    )
    if asdict(at) != asdict(theirs):
        raise RuntimeError(f"rank {rank}: the weight map expects {at}, Megatron placed it at {theirs}")
    return ParallelState(
        rank=rank,
        sizes=sizes,
        at=at,
        tp_group=megatron.get_tensor_model_parallel_group(),
        dp_group=megatron.get_data_parallel_group(),
        cp_group=megatron.get_context_parallel_group() if sizes.context > 1 else None,
    )


def destroy() -> None:
    """Destroy every group that `initialize` made; another layout can be set up in the same process afterwards.

    Megatron only drops its references. A group's threads end when torch destroys it and nothing refers to it, not even the keys of the
    cache of position embeddings.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
