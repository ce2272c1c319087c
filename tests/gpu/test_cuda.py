"""A training rank on a GPU. `bash tools/test.sh -m gpu` runs it where there is one. Not yet run on hardware."""

import numpy as np
import pytest
import torch

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel.pool import Pool
from tests.parallel.test_update import batch
from tests.parallel.workloads import train_once

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", path, tied=True, vocab_size=64)
    return path


@pytest.fixture(scope="module")
def pool():
    made = Pool(1)
    yield made
    made.close()


@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
def test_an_update_on_cuda_computes_the_logprobs_of_transformers(pool, directory, layer_spec):
    """The reference is transformers' log-probabilities, which the CPU tests compare with float64 PyTorch."""
    from transformers import AutoModelForCausalLM

    given = batch()
    settings = RankSettings(
        directory,
        TrainerOptions(dtype="bfloat16", layer_spec=layer_spec, micro_batch_tokens=64),
        OptimizerOptions(lr=1e-4),
        AlgorithmOptions(epochs=1, mini_batch_prompts=8, kl_coef=0.01),
        temperature=1.0,
        seed=0,
        responses_per_prompt=2,
        max_response_tokens=32,
    )
    ((report, weights),) = pool.run(train_once, settings, given)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    differences = []
    for i in range(given.samples):
        ids = torch.from_numpy(given.token_ids[given.offsets[i] : given.offsets[i + 1]])
        response = int(given.response_offsets[i + 1] - given.response_offsets[i])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)[-response - 1 : -1].gather(1, ids[-response:, None])[:, 0]
        differences.append(logprobs.numpy() - given.rollout_logprobs[given.response_offsets[i] : given.response_offsets[i + 1]])
    expected = float(np.abs(np.concatenate(differences)).mean())
    assert report.mismatch["mean"] == pytest.approx(expected, rel=0.05)
    assert len(report.gradient_norms) == 1 and np.isfinite(report.gradient_norms[0])
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
