"""Options that save memory, on a GPU. Not yet run on hardware."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel.pool import Pool
from tests.parallel.test_update import batch
from tests.parallel.workloads import card_memory, offloaded, train_once

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RankSettings:
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", directory, tied=True, vocab_size=64)
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=8, kl_coef=0.01)
    return RankSettings(directory, TrainerOptions(micro_batch_tokens=64), OptimizerOptions(lr=1e-4), algorithm, 1.0, 0, 2, 32)


@pytest.fixture(scope="module")
def pool():
    made = Pool(1)
    yield made
    made.close()


def test_optimizer_state_and_reference_are_offloaded_from_the_gpu(pool, settings):
    trainer = replace(settings.trainer, offload_optimizer=True, offload_reference=True)
    (found,) = pool.run(offloaded, replace(settings, trainer=trainer), batch())
    for name in ("reference", "optimizer"):
        assert found[name]["home again"] and found[name]["left"] == 0 and found[name]["moved"] == 2 * found[name]["tensors"] > 0


@pytest.mark.parametrize(
    ("layer_spec", "lever", "tolerance"),
    [
        ("local", {"recompute": "selective"}, 0.02),
        ("local", {"recompute": "full"}, 0.02),
        ("local", {"offload_optimizer": True, "offload_reference": True}, 0.02),
        ("local", {"gradient_dtype": "bfloat16"}, 0.02),
        ("transformer_engine", {"recompute": "selective"}, 0.02),
        ("transformer_engine", {"recompute": "full"}, 0.02),
        ("transformer_engine", {"fp8": "e4m3"}, 0.2),
        ("transformer_engine", {"fp8": "hybrid"}, 0.2),
    ],
    ids=str,
)
def test_an_update_with_a_memory_option_has_the_gradient_norm_of_float32_without_it(pool, settings, layer_spec, lever, tolerance):
    plain = TrainerOptions(dtype="float32", layer_spec="local", micro_batch_tokens=64)
    ours = TrainerOptions(layer_spec=layer_spec, micro_batch_tokens=64, **lever)
    (expected, _), (report, weights) = (pool.run(train_once, replace(settings, trainer=trainer), batch())[0] for trainer in (plain, ours))
    assert report.gradient_norms == pytest.approx(expected.gradient_norms, rel=tolerance)
    assert all(np.isfinite(tensor).all() for tensor in weights.values())


def test_offloading_frees_memory_on_the_card(pool, settings, tmp_path):
    """Another process on the card can use the memory, not just torch in this one. 60 M parameters: 1 GB."""
    save_tiny("qwen2", tmp_path, tied=True, vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    (found,) = pool.run(card_memory, replace(settings, model_directory=tmp_path), batch())
    assert found["moved"] > 8e8 and found["training"] - found["parked"] >= 0.95 * found["moved"], found
    assert found["back"] == pytest.approx(found["training"], rel=0.1)


@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    "layout", [{"context_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}, {"data_parallel": 2}], ids=str
)
def test_two_gpus_have_the_gradient_norm_of_one(settings, layer_spec, layout):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has no second GPU")
    norms = []
    for ranks, cut in ((1, {}), (2, layout)):
        pool = Pool(ranks)
        try:
            trainer = TrainerOptions(layer_spec=layer_spec, micro_batch_tokens=64, **cut)
            norms.append(pool.run(train_once, replace(settings, trainer=trainer), batch())[-1][0].gradient_norms)
        finally:
            pool.close()
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
