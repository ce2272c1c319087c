"""Weights from a training rank on a GPU to a worker on the same GPU or another. Not yet run on hardware."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
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

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("colocated", [True, False], ids=["CUDA IPC", "NCCL"])
def test_a_worker_holds_the_tensors_of_the_files(tmp_path, colocated: bool):
    if not colocated and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two ranks on one GPU, and this machine has no second one")
    save_tiny("qwen2", tmp_path, tied=True, num_hidden_layers=2)
    options = TrainerOptions(dtype="float32")
    settings = RankSettings(tmp_path, options, OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32)
    spec = TransferSpec(*read_sizes(tmp_path), settings.sizes, EngineSizes(), "bfloat16", 60_000, colocated)
    versions = [1, 2]
    device = torch.device("cuda", 0 if colocated else 1)
    pool = Pool(1)
    try:
        with reserved_port(HOST) as port, ThreadPoolExecutor(1) as threads, torch.cuda.device(device):
            sending = threads.submit(pool.run, workloads.send_weights, settings, port, spec, versions)
            tensors = received(spec, port, 0, versions, str(device), "gloo" if colocated else "nccl")
            sending.result(120)
    finally:
        pool.close()
    truth = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == truth.keys()
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in truth.items())
