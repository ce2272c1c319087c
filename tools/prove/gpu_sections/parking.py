"""A training rank that offloads its memory for engines: seconds, bandwidth, bytes freed on the card; and weights by CUDA IPC."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from gpu_sections.workload import DEVICE, new_directory, random_qwen, samples, synchronize, taken, training_rank


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    yield "leave and come back, twice", partial(leave_and_come_back, small)
    yield "weights to another process by CUDA IPC", cuda_ipc


def leave_and_come_back(small: bool) -> dict:
    directory = new_directory()
    model = random_qwen(directory, small)
    batch, *_ = samples(model.config.vocab_size, small)
    del model
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    empty, found = taken(), {}
    with training_rank(directory, small) as rank:
        rank.update(batch, 0)
        synchronize()
        full = taken()
        for number in (1, 2):  # pinning takes longer the first time
            start = time.perf_counter()
            rank.offload("optimizer")
            rank.offload("weights")
            synchronize()
            out_s, left = time.perf_counter() - start, taken()
            moved = sum(nbytes for storage in rank._offloaded.values() for _, nbytes, _ in storage._offloaded)
            start = time.perf_counter()
            rank.reload()
            synchronize()
            back_s = time.perf_counter() - start
            found |= {
                f"out_s_{number}": round(out_s, 3),
                f"back_s_{number}": round(back_s, 3),
                f"back_gb_per_s_{number}": round(moved / 1e9 / back_s, 1),
            }
        found |= {"moved_gb": round(moved / 1e9, 3), "freed_gb": round((full - left) / 1e9, 2), "left_gb": round((left - empty) / 1e9, 2)}
        rank.update(batch, 1)
    # The card as a whole, not torch in this process alone, must have the moved bytes free.
    return {"passed": DEVICE == "cpu" or full - left >= 0.95 * moved} | found


def cuda_ipc() -> dict:
    """Open the memory of a training rank in another process from a worker here; every tensor must equal the file's, cast."""
    if DEVICE == "cpu":
        return {"passed": None, "skipped": "no GPU: CUDA IPC needs one"}
    from safetensors.torch import load_file

    from megatron_aspo.common.network import reserved_port
    from megatron_aspo.hf.model import read_sizes
    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.rollout.engine_layout import EngineSizes
    from megatron_aspo.rollout.transfer_spec import TransferSpec
    from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
    from megatron_aspo.trainer.settings import RankSettings
    from tests.models import save_tiny
    from tests.parallel import workloads
    from tests.parallel.pool import Pool
    from tests.parallel.test_weight_transfer import HOST, received

    directory = new_directory()
    save_tiny("qwen2", directory, tied=True, num_hidden_layers=2)
    settings = RankSettings(directory, TrainerOptions(dtype="float32"), OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32)
    spec = TransferSpec(*read_sizes(directory), settings.sizes, EngineSizes(), "bfloat16", 60_000, True)
    pool = Pool(1)
    try:
        with reserved_port(HOST) as port, ThreadPoolExecutor(1) as threads:
            sending = threads.submit(pool.run, workloads.send_weights, settings, port, spec, [1, 2])
            tensors = received(spec, port, 0, [1, 2], "cuda")
            sending.result(120)
    finally:
        pool.close()
    truth = load_file(directory / "model.safetensors")
    wrong = [name for name, tensor in truth.items() if not torch.equal(tensors[name], tensor.bfloat16())]
    return {"passed": not wrong and tensors.keys() == truth.keys(), "tensors": len(truth), "wrong": wrong}
