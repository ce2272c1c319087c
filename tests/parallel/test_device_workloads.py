"""Whether workloads and the training step would work on a GPU, as far as a CPU can tell."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import checkpoint_workloads, state_workloads, workloads
from tests.parallel.device_workloads import as_on_a_gpu, fp8_copies, host_waits
from tests.parallel.test_update import VOCAB, batch

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RankSettings:
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", directory, tied=True, vocab_size=VOCAB, num_hidden_layers=1)
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=8, kl_coef=0.01)
    trainer = TrainerOptions(dtype="float32", micro_batch_tokens=64)
    return RankSettings(directory, trainer, OptimizerOptions(lr=1e-4), algorithm, 1.0, 0, 3, 12)


def test_no_workload_makes_a_numpy_array_of_a_device_tensor(pools, settings, tmp_path):
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
        checkpoint_workloads.load_and_continue: (given, target),
    }
    for workload, arguments in calls.items():
        pools(1).run(as_on_a_gpu, workload, settings, *arguments)


@pytest.mark.parametrize("offloaded", [False, True], ids=["reference on the device", "reference in host memory"])
def test_fp8_copies_are_offloaded_with_the_weights(pools, settings, offloaded):
    moved = replace(settings, trainer=replace(settings.trainer, offload_reference=offloaded))
    [found] = pools(1).run(fp8_copies, moved, batch())
    model, reference = found["modules"]
    assert model == reference == 4  # of one layer: QKV, the attention output, and two of feed-forward
    assert found["after a step"] == found["after another"] == (model, 0 if offloaded else reference)
    assert found["parked"] == (0, 0)


WAITS = {
    "losses/objective.py:_check_finite": 1,  # a number that is not finite is named before it spreads
    "losses/objective.py:__call__": 1,  # the number of counted tokens
    "losses/objective.py:_tally": 1,  # all metrics at once
    "rerun_state_machine.py:validate_result": 2,  # once per mini-batch: neither NaN nor infinity in a bucket of gradients
}
"""Functions in which a mini-batch of one micro-batch makes the host wait for the device → times."""


@pytest.mark.parametrize(
    "trainer", [{}, {"shared_prompts": True}, {"context_parallel": 2}, {"context_parallel": 2, "shared_prompts": True}], ids=str
)
def test_the_host_waits_of_a_micro_batch_do_not_depend_on_its_segments_and_layers(pools, tmp_path, trainer):
    given, found = batch(), {}
    for layers in (1, 3):
        save_tiny("qwen3", tmp_path / str(layers), tied=True, vocab_size=VOCAB, num_hidden_layers=layers)
        options = TrainerOptions(dtype="bfloat16", micro_batch_tokens=10_000, **trainer)
        algorithm = AlgorithmOptions(kl_coef=0.0, entropy_coef=0.01)
        settings = RankSettings(tmp_path / str(layers), options, OptimizerOptions(), algorithm, 1.0, 0, 3, 12)
        for samples in (3, given.samples):
            results = pools(settings.sizes.world).run(host_waits, settings, given, list(range(samples)))
            found[layers, samples] = results[0]
    assert all(counts == found[1, 3] for counts in found.values()), found
    assert found[1, 3] == WAITS
