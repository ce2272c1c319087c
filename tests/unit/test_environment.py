"""The environment of training ranks and engines when CUDA, NCCL and vLLM start."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import ray
import torch

from megatron_aspo.common.device_environment import engine_environment, rank_environment
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_model
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.rollout import engine as engines
from megatron_aspo.runtime import trainers
from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.layout import ParallelSizes
from tests.models import save_tiny
from tests.unit.test_engine_settings import SPEC

INTERFACES = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth1"}
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "^NVLS"}


def test_both_sides_listen_on_the_private_network_and_configure_nccl_memory_alike():
    rank, engine = rank_environment("eth1", 1, 1, False, {}), engine_environment("eth1", {})
    assert rank == INTERFACES | {"NCCL_CUMEM_ENABLE": "0"}
    assert engine == {"NCCL_SOCKET_IFNAME": "eth1", "NCCL_CUMEM_ENABLE": "0"}
    given = {"NCCL_CUMEM_ENABLE": "1", "NCCL_SOCKET_IFNAME": "eth0"}  # set for the whole cluster: both sides keep it
    assert rank_environment("eth1", 1, 1, False, given) == INTERFACES
    assert engine_environment("eth1", given) == {"NCCL_SOCKET_IFNAME": "eth1"}


@pytest.mark.parametrize(("tensor", "context", "wanted"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_kernels_start_in_order_if_megatron_overlaps_communication(tensor, context, wanted):
    assert (rank_environment("lo", tensor, context, False, {}).get("CUDA_DEVICE_MAX_CONNECTIONS") == "1") == wanted
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_environment("lo", tensor, context, False, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})


def test_a_deterministic_rank_overrides_settings_that_would_change_its_results():
    given = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    assert rank_environment("lo", 1, 1, True, given).items() >= DETERMINISTIC.items()
    assert not rank_environment("lo", 1, 1, False, {}).keys() & DETERMINISTIC.keys()


class StoppedError(Exception):
    pass


def _stop(seen: dict) -> None:
    seen.update(os.environ)
    raise StoppedError


@pytest.fixture
def on_loopback(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_CUMEM_ENABLE", *DETERMINISTIC):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)


def test_a_rank_has_its_environment_before_it_joins_the_others(on_loopback, monkeypatch):
    seen = {}
    monkeypatch.setattr(trainers, "meeting_store", lambda *_: _stop(seen))
    settings = RankSettings("", TrainerOptions(), OptimizerOptions(), AlgorithmOptions(), 1.0, 0, 2, 8, deterministic=True)
    with pytest.raises(StoppedError):
        trainers.TrainerActor().start(settings, 0, "127.0.0.1", 1, os.getcwd(), None, False)
    assert seen.items() >= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_CUMEM_ENABLE": "0", **DETERMINISTIC}.items()


def test_an_engine_has_its_environment_before_vllm_starts(on_loopback, monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    seen = {}

    class AsyncLLM:
        @staticmethod
        def from_engine_args(arguments):
            _stop(seen)

    modules = {"vllm": {}, "vllm.engine.arg_utils": {"AsyncEngineArgs": dict}, "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM}}
    for name in ("vllm.engine", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engines, "OutputTail", lambda: type("Tail", (), {"cause": lambda self: ""})())
    with pytest.raises(UserError, match="engine 0 did not start: StoppedError"):
        asyncio.run(engines.Engine(replace(SPEC, model=str(tmp_path))).start())
    assert seen.items() >= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_CUMEM_ENABLE": "0"}.items()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deterministic_kernels_are_chosen_on_every_device_and_megatrons_on_a_gpu(kind, tmp_path):
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()
    from megatron_aspo.trainer.model import transformer_config
    from megatron_aspo.trainer.parallel import ParallelState

    save_tiny("qwen2", tmp_path)
    device, sizes = Device(torch.device(kind), ""), ParallelSizes()
    state = ParallelState(0, sizes, sizes.coordinates(0), None, None)
    config = transformer_config(read_model(tmp_path), state, device, torch.bfloat16, "local", deterministic=True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        device.use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert config.deterministic_mode == (kind == "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


GRADIENTS = """
import torch
from megatron_aspo.trainer.device import Device

torch.set_num_threads(4)
if {deterministic}:
    Device(torch.device("cpu"), "gloo").use_deterministic_kernels()
hidden, output_gradient = torch.randn(400, 576), torch.randn(212, 576)
rows = torch.cat([torch.full((12,), 50), torch.arange(100, 300)])[torch.randperm(212)]
gradients = set()
for _ in range(100):
    leaf = hidden.clone().requires_grad_()
    leaf[rows].backward(output_gradient)
    gradients.add(leaf.grad.numpy().tobytes())
print(len(gradients))
"""


def test_a_gradient_of_repeated_rows_is_reproducible_on_several_threads():
    """As that of a prompt's last token, which several responses share. Without deterministic kernels hardly two of them are equal."""
    script = GRADIENTS.format(deterministic=True)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
