"""From real training ranks to the tensors that engines' workers receive: exactly the values of the model's files, cast once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from megatron_aspo.common.network import reserved_port
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import WeightReceiver
from megatron_aspo.sync.group import stateless_group
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads

pytestmark = pytest.mark.long

HOST = "127.0.0.1"


def received(
    spec: TransferSpec, port: int, worker: int, versions: list[int], device: str = "cpu", backend: str = "gloo"
) -> dict[str, torch.Tensor]:
    """Return the tensors of this worker, on this device, after the last version."""
    rank = spec.training.world + worker
    group = stateless_group(HOST, port, rank, spec.world, 150.0, backend, names=spec.rank_name, terms=spec.terms())
    schedule = spec.schedule(rank, group.hosts)
    assert len(schedule.buckets) > 3
    receiver = WeightReceiver(schedule, group, torch.device(device))
    for version in versions:
        receiver.begin_version(version, verify=True)
        tensors = {}
        for _ in schedule.buckets:
            with receiver.next_bucket() as given:
                tensors |= {name: tensor.to("cpu", copy=True) for name, tensor in given}
    return tensors


DENSE = [
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, EngineSizes()),
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, EngineSizes(engines=2)),
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, EngineSizes(tensor=2)),
    ({"pipeline_parallel": 2, "data_parallel": 2}, EngineSizes(tensor=4)),
]
MOE = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1}
MIXED = [
    (MOE, EngineSizes(tensor=2)),
    ({"expert_parallel": 2, "data_parallel": 2}, EngineSizes(tensor=2, expert_parallel=True, engines=2)),
]


@pytest.mark.parametrize(
    ("family", "layout", "engines"), [("qwen2", *case) for case in DENSE] + [("qwen3_moe", *case) for case in MIXED], ids=str
)
def test_the_workers_together_hold_the_tensors_of_the_files(pools, tmp_path, family: str, layout: dict[str, int], engines: EngineSizes):
    save_tiny(family, tmp_path, tied=family == "qwen2", num_hidden_layers=2)
    settings = RankSettings(
        tmp_path, TrainerOptions(dtype="float32", **layout), OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32
    )
    spec = TransferSpec(*read_sizes(tmp_path), settings.sizes, engines, "bfloat16", 60_000)
    versions = [1, 2]
    with reserved_port(HOST) as port, ThreadPoolExecutor(1 + engines.world) as threads:
        sending = threads.submit(pools(spec.training.world).run, workloads.send_weights, settings, port, spec, versions)
        jobs = [threads.submit(received, spec, port, worker, versions) for worker in range(engines.world)]
        sent = sending.result(240)
        workers = [job.result(240) for job in jobs]

    truth = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    given = 0
    for engine in range(engines.engines):
        covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in truth.items()}
        for tensors in workers[engine * engines.tensor : (engine + 1) * engines.tensor]:
            for name, tensor in tensors.items():
                here = ~tensor.isnan()
                assert torch.equal(tensor[here].view(torch.int16), truth[name][here].view(torch.int16))
                covered[name] |= here
                given += int(here.sum())
        assert all(bool(here.all()) for here in covered.values())
    # Each element of a worker was sent to it once, by some rank; all workers are on one node, and none forwards anything.
    assert [sum(rank[version] for rank in sent) for version in (0, 1)] == [2 * given] * 2
