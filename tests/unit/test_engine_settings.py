"""What engines are told, and what they cannot be told."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.rollout.engine_layout import CPU_HEAD_SIZES, EngineSizes, check_engine, check_engine_on
from megatron_aspo.rollout.engine_settings import GIB, READABLE, EngineSpec, engine_arguments, environment
from tests.models import save_tiny

SPEC = EngineSpec(
    index=0,
    model="model",
    device="cuda",
    dtype="bfloat16",
    tensor_parallel=2,
    expert_parallel=False,
    max_model_len=64,
    max_running_requests=4,
    kv_cache_gib=1.0,
    threads=2,
    seed=0,
    stop_token_ids=(),
)


def test_the_workers_of_an_engine_share_experts_out_when_asked():
    assert not engine_arguments(SPEC)["enable_expert_parallel"]
    assert engine_arguments(replace(SPEC, expert_parallel=True))["enable_expert_parallel"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_an_engine_that_is_to_be_read_keeps_its_weights_readable(device):
    assert READABLE not in environment(replace(SPEC, device=device))
    assert READABLE in environment(replace(SPEC, device=device, readable=True))


@pytest.mark.parametrize(("free", "others"), [(30, "another engine"), (6, "a training rank")])
def test_an_engine_starts_on_a_gpu_that_it_shares(free: int, others: str):
    """vLLM's own check, on a card of 80 GiB of which others hold most; the cache's size is given and does not hang on it."""
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    arguments = engine_arguments(SPEC)
    cache = CacheConfig(**{name: arguments[name] for name in ("kv_cache_memory_bytes", "gpu_memory_utilization")})
    card = SimpleNamespace(total_memory=80 * GIB, free_memory=free * GIB, device_="cuda:0")
    assert request_memory(card, cache) <= free * GIB
    assert cache.kv_cache_memory_bytes == GIB // 2  # of each of two workers
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        request_memory(card, CacheConfig())
    assert "gpu_memory_utilization" not in engine_arguments(replace(SPEC, device="cpu"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    save_tiny("qwen3_moe", directory)  # 64 channels of an expert
    return read_sizes(directory)[1]


def test_experts_that_no_model_has_cannot_be_shared_out(mixture):
    check_engine(mixture, EngineSizes(2, expert_parallel=True))
    with pytest.raises(UserError, match="expert_parallel=true: this model has no experts"):
        check_engine(replace(mixture, experts=0), EngineSizes(2, expert_parallel=True))


@pytest.mark.parametrize(
    ("device", "sizes", "message"),
    [
        ("cpu", EngineSizes(2), None),
        ("cpu", EngineSizes(2, expert_parallel=True), r"expert_parallel=true: vLLM's CPU kernel"),
        ("cpu", EngineSizes(4), r"tensor_parallel=4 leaves a worker 16 feed-forward channels of an expert; .* a multiple of 32"),
        ("cuda", EngineSizes(4, expert_parallel=True), None),
    ],
)
def test_what_the_kernels_of_a_device_cannot_do_is_refused(mixture, device, sizes, message):
    if message is None:
        check_engine_on(device, mixture, sizes)
    else:
        with pytest.raises(UserError, match=message):
            check_engine_on(device, mixture, sizes)


def test_a_head_size_without_a_cpu_kernel_is_refused(mixture):
    """The sizes are those of the installed vLLM, read from its source: importing it takes 10 s."""
    source = Path(importlib.util.find_spec("vllm").origin).parent / "v1/attention/backends/cpu_attn.py"
    (sizes,) = re.findall(r"def get_supported_head_sizes\(cls\).*\n\s+return (\[[\d, ]+\])", source.read_text())
    assert tuple(json.loads(sizes)) == CPU_HEAD_SIZES
    for device in ("cuda", ""):
        check_engine_on(device, replace(mixture, head_dim=16), EngineSizes())
    with pytest.raises(UserError, match=r"attention heads have 16 channels, for which vLLM has no CPU kernel; .*32, 64"):
        check_engine_on("cpu", replace(mixture, head_dim=16), EngineSizes())


def test_the_engine_reads_the_files_that_the_training_ranks_read():
    arguments = engine_arguments(SPEC)
    assert (arguments["load_format"], arguments["config_format"]) == ("safetensors", "hf")


def test_as_many_requests_may_run_as_the_recipe_says():
    """vLLM wants room for a token of each in every step."""
    assert engine_arguments(replace(SPEC, device="cpu", max_running_requests=5000))["max_num_batched_tokens"] == 5000
