"""The workloads that GPU tests share read device memory through the host."""

import numpy as np
import pytest

from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import checkpoint_workloads, state_workloads, workloads
from tests.parallel.device_workloads import as_on_a_gpu
from tests.parallel.test_update import VOCAB, batch


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RankSettings:
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", directory, tied=True, vocab_size=VOCAB, num_hidden_layers=1)
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=8, kl_coef=0.01)
    trainer = TrainerOptions(dtype="float32", micro_batch_tokens=64)
    return RankSettings(directory, trainer, OptimizerOptions(lr=1e-4), algorithm, 1.0, 0, 3, 12)


def test_no_workload_makes_an_array_of_a_tensor_on_the_device(pools, settings, tmp_path):
    given = batch()
    tokens, samples = len(given.mask), given.samples
    (tmp_path / ATTEMPT).write_text("this one")
    target = tmp_path / "checkpoints" / "step_1"
    calls = {
        workloads.one_step: (given, np.zeros(tokens, np.float32), np.zeros(tokens, np.float32), np.ones(samples)),
        workloads.train_once: (given,),
        workloads.train_and_park: (given, True),
        workloads.prepare: (given, 1.0),
        workloads.offloaded: (given,),
        workloads.logits: ([[1, 2, 3], [4, 5]],),
        state_workloads.interrupted: (given,),
        checkpoint_workloads.save_amid_training: (given, target, "this one", False),
        checkpoint_workloads.load_and_go_on: (given, target),
    }
    for workload, arguments in calls.items():
        pools(1).run(as_on_a_gpu, workload, settings, *arguments)
