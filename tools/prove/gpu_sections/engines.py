"""An engine without a Ray cluster: log-probabilities against transformers' in float32, sleep and wake, weights from a training rank."""

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from gpu_sections.workload import DEVICE, new_directory

ONE_CASE_PER_PROCESS = True
"""On a CPU an engine forks its core, which a process that has computed with several threads must not do."""
PROMPT = tuple(range(3, 60))
TOKENS = 24


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    if importlib.util.find_spec("vllm") is None:
        yield "engine", lambda: {"passed": None, "skipped": "vLLM is not installed"}
        return
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 0.3)):
        yield f"{dtype}: generate, sleep, wake, new weights", partial(engine, dtype, bound)


def engine(dtype: str, bound: float) -> dict:
    """Run one engine through all calls of a run; errors are the largest differences of a sampled token's log-probability."""
    _stand_in_for_ray()
    from megatron_aspo.rollout.engine_settings import EngineSpec, environment
    from tests.models import save_tiny

    first, second = new_directory(), new_directory()
    models = [save_tiny("qwen2", path, tied=True, vocab_size=512, seed=seed).eval() for seed, path in enumerate((first, second))]
    spec = EngineSpec(0, str(first), DEVICE, dtype, 1, False, 256, 8, 0.25, 1, 0, ())
    os.environ.update(environment(spec))
    return asyncio.run(_generate_sleep_wake_update(spec, second, models, dtype, bound))


async def _generate_sleep_wake_update(spec, other, models, dtype: str, bound: float) -> dict:
    from megatron_aspo.rollout.engine import Engine, Request

    running = Engine(spec)
    info = await running.start()
    found: dict = {"start_s": round(info.seconds, 1), "vllm": info.vllm_version}

    async def error(name: str, model) -> None:
        generation = await running.generate(Request(name, PROMPT, 1, TOKENS, 1.0))
        ids = torch.tensor([[*PROMPT, *generation.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0]
        found[f"error_{name}"] = float(np.abs(logprobs.numpy() - generation.logprobs).max())

    try:
        await error("started", models[0])
        await running.sleep(1)
        await running.wake()
        await error("woken", models[0])
        await _receive(running, other, dtype)
        await error("new_weights", models[1])
    finally:
        await running.shutdown()
    return {"passed": all(value <= bound for key, value in found.items() if key.startswith("error_"))} | found


async def _receive(running, directory, dtype: str) -> None:
    """Update the engine to the weights in `directory`, from a training rank in another process."""
    from megatron_aspo.common.network import reserved_port
    from megatron_aspo.hf.model import read_sizes
    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.rollout.engine_layout import EngineSizes
    from megatron_aspo.rollout.transfer_spec import TransferSpec
    from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
    from megatron_aspo.trainer.settings import RankSettings
    from tests.parallel import workloads
    from tests.parallel.pool import Pool
    from tests.parallel.test_weight_transfer import HOST

    settings = RankSettings(directory, TrainerOptions(dtype="float32"), OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32)
    # On one card both sides share it, as colocated ones do: NCCL refuses two ranks on a GPU.
    spec = TransferSpec(*read_sizes(directory), settings.sizes, EngineSizes(), dtype, 1 << 20, True)
    pool = Pool(1)
    try:
        with reserved_port(HOST) as port, ThreadPoolExecutor(1) as threads:
            sending = threads.submit(pool.run, workloads.send_weights, settings, port, spec, [1])
            await running.connect(HOST, port, spec, 120.0, False)
            await running.receive_weights(1, True)
            await asyncio.wrap_future(sending)
    finally:
        pool.close()


def _stand_in_for_ray() -> None:
    """Answer the two questions that an engine asks Ray: from a stand-in where Ray is not installed, else without a cluster."""
    context = SimpleNamespace(get_node_id=lambda: "this node")
    stand_in = ModuleType("ray")
    stand_in.is_initialized = lambda: False
    stand_in.get_runtime_context = lambda: context
    stand_in.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    sys.modules["ray"] = stand_in
