"""The boxes that vLLM's own loaders put into each worker, against the rules that plan transfers: real vLLM models, real process groups.

Every element of a checkpoint has a unique number; the numbers in a worker's parameters after loading show which elements it took.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_aspo.hf.model import read_sizes
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.weights.families import tensor_shapes
from tests.models import FAMILIES, save_tiny

pytestmark = pytest.mark.long

# 4 divides neither the vocabulary (290 rows, padded to 320) nor the experts. With 2 key-value heads, each of 4 workers holds one of two
# copies.
SIZES = {"vocab_size": 290, "hidden_size": 64, "num_hidden_layers": 1}


def first_ids(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of each tensor's first element; 0 means none."""
    starts = np.cumsum([1] + [int(np.prod(shape)) for shape in shapes.values()])
    assert starts[-1] < 2**24  # float32 counts no further
    return dict(zip(shapes, starts.tolist(), strict=False))


def save_numbered(family: str, directory: Path, **overrides) -> None:
    save_tiny(family, directory, **{**SIZES, **overrides})
    shapes = tensor_shapes(*read_sizes(directory))
    ids = first_ids(shapes)
    tensors = {name: (torch.arange(np.prod(shape)) + ids[name]).reshape(shape).float() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def loaded(rank: int, meeting: str, directory: str, world: int, expert_parallel: bool) -> list[int]:
    """Return the numbers in the parameters of vLLM's model on this worker."""
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_DIST_IDENT": Path(meeting).parent.name,
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    arguments = EngineArgs(
        model=directory,
        dtype="float32",
        tensor_parallel_size=world,
        enable_expert_parallel=expert_parallel,
        distributed_executor_backend="mp",
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    before = torch.get_default_dtype()
    try:
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(world, rank, f"file://{meeting}", rank, "gloo")
            initialize_model_parallel(world)
            torch.set_default_dtype(torch.float32)
            model = initialize_model(config)
            for parameter in model.parameters():
                parameter.data.zero_()
            model.load_weights(safetensors_weights_iterator([f"{directory}/model.safetensors"], use_tqdm_on_load=False))
            found = {int(i) for parameter in model.parameters() for i in parameter.data.unique().tolist()}
            torch.distributed.barrier()  # a worker that leaves early closes connections that a slow one is still making
    finally:
        torch.set_default_dtype(before)
        cleanup_dist_env_and_memory()
    return sorted(found - {0})


CASES = [
    *((family, world, False, {"tie_word_embeddings": family == "qwen3"}) for family in FAMILIES for world in (2, 4)),
    ("qwen3_moe", 2, True, {"num_experts": 4}),
    ("qwen3_moe", 4, True, {"num_experts": 6}),
    ("mixtral", 4, True, {"num_local_experts": 4}),
]


@pytest.mark.parametrize(("family", "world", "expert_parallel", "overrides"), CASES)
def test_workers_hold_the_boxes_that_the_plan_sends_them(pools, tmp_path, family, world, expert_parallel, overrides):
    tied = overrides.pop("tie_word_embeddings", False)
    save_numbered(family, tmp_path, tied=tied, **overrides)
    found = pools(world).run(loaded, str(tmp_path), world, expert_parallel)
    architecture, dims = read_sizes(tmp_path)
    shapes = tensor_shapes(architecture, dims)
    ids = first_ids(shapes)
    holdings = EngineHoldings(architecture, dims, EngineSizes(world, expert_parallel))
    for rank in range(world):
        planned = set()
        for name, shape in shapes.items():
            whole = np.arange(np.prod(shape)).reshape(shape) + ids[name]
            held = holdings.of(name)
            for box, ranks in zip(held.boxes, held.ranks, strict=True):
                if rank in ranks:
                    planned |= set(whole[tuple(slice(*edge) for edge in box)].ravel().tolist())
        assert found[rank] == sorted(planned)
