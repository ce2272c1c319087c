"""Per-token constants computed before the first mini-batch: old and reference log-probabilities, KL in the reward, advantages."""

import numpy as np
import pytest
import torch

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads
from tests.reference.decoder import Decoder, token_logprobs

VOCAB = 64
SCALE = 1.2
TEMPERATURE = 0.8
FILTERED = 3
"""The response without counted tokens."""
LENGTHS = [5, 1, 9, 7, 3, 4]
ENDS = np.concatenate([[0], np.cumsum(LENGTHS)])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Return a model, three groups of two responses, and their float64 log-probabilities under the scaled and the original weights."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory, tied=False, vocab_size=VOCAB)
    random = np.random.default_rng(4)
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (3, 8, 5) for _ in range(2)]
    prompts[1::2] = prompts[::2]
    responses = [random.integers(0, VOCAB, n).tolist() for n in LENGTHS]
    model, reference = Decoder(directory), Decoder(directory)
    with torch.no_grad():
        for weight in model.weights.values():
            weight.mul_(SCALE)
        current, original = (
            np.concatenate([token_logprobs(decoder, p, r, TEMPERATURE)[0].numpy() for p, r in zip(prompts, responses)])
            for decoder in (model, reference)
        )
    tokens = [np.array(p + r) for p, r in zip(prompts, responses)]
    batch = TrainBatch(
        token_ids=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        response_offsets=ENDS,
        mask=np.repeat(np.arange(6) != FILTERED, LENGTHS),
        rollout_logprobs=(current + random.normal(0, 0.1, len(current))).astype(np.float32),
        rewards=np.array([1.0, 0.0, 0.5, 0.25, 0.0, 2.0]),
        groups=np.arange(6) // 2,
        names=tuple(f"sample {i}" for i in range(6)),
    )
    return directory, batch, current, original


def prepare(pools, case, algorithm: AlgorithmOptions, **layout) -> dict:
    trainer = TrainerOptions(dtype="float32", micro_batch_tokens=24, **layout)
    settings = RankSettings(case[0], trainer, OptimizerOptions(), algorithm, TEMPERATURE, 0, 2, 12)
    return pools(settings.sizes.world).run(workloads.prepare, settings, case[1], SCALE)[-1]


def advantage_pairs(rewards: np.ndarray) -> np.ndarray:
    """Return GRPO's advantages for groups of two: the standard deviation of a, b with n − 1 is |a − b| / √2."""
    a, b = rewards[::2], rewards[1::2]
    half = (a - b) / 2 / (np.abs(a - b) / np.sqrt(2) + 1e-6)
    return np.stack([half, -half], axis=1).ravel()


@pytest.mark.parametrize(
    "layout", [{}, {"data_parallel": 2}, {"pipeline_parallel": 2}, {"tensor_parallel": 2, "shared_prompts": True}], ids=str
)
def test_scores_and_advantages_on_every_layout(pools, case, layout):
    _, batch, current, original = case
    ours = prepare(pools, case, AlgorithmOptions(), **layout)
    assert np.abs(ours["old"] - current * batch.mask).max() < 1e-5 and np.abs(current).max() > 1
    assert np.abs(ours["reference"] - original * batch.mask).max() < 1e-5
    assert np.abs(current - original)[batch.mask].max() > 0.1
    assert np.allclose(ours["advantages"], np.repeat(advantage_pairs(batch.rewards), LENGTHS), rtol=1e-6)
    difference = (current - batch.rollout_logprobs)[batch.mask]
    assert ours["mismatch"]["mean"] == pytest.approx(np.abs(difference).mean(), rel=1e-3)
    assert ours["mismatch"]["max"] == pytest.approx(np.abs(difference).max(), rel=1e-3)
    assert ours["mismatch"]["k3"] == pytest.approx((np.exp(difference) - difference - 1).mean(), rel=1e-2)
    assert ours["tally"] == {}


@pytest.mark.parametrize("layout", [{}, {"data_parallel": 2}], ids=str)
@pytest.mark.parametrize(
    ("estimator", "clamp", "estimate"),
    [
        ("k1", 0.0, lambda x: -x),
        ("k2", 0.0, lambda x: x**2 / 2),
        ("k3", 0.0, lambda x: np.exp(x) - x - 1),
        ("k1", 0.05, lambda x: np.clip(-x, -0.05, 0.05)),
    ],
)
def test_a_kl_penalty_in_the_reward_is_summed_over_every_response(pools, case, estimator, clamp, estimate, layout):
    _, batch, current, original = case
    algorithm = AlgorithmOptions(kl_in="reward", kl_coef=0.3, kl_estimator=estimator, kl_value_clamp=clamp)
    ours = prepare(pools, case, algorithm, **layout)
    per_token = estimate(original - current)
    # A filtered response too: its reward is part of its group's statistics.
    penalty = 0.3 * np.array([per_token[a:b].sum() for a, b in zip(ENDS, ENDS[1:])])
    assert np.abs(penalty).min() > 1e-3
    expected = np.repeat(advantage_pairs(batch.rewards - penalty), LENGTHS)
    assert np.allclose(ours["advantages"], expected, rtol=1e-4)
    total, count = ours["tally"]["kl_penalty"]
    assert count == 6 and total == pytest.approx(penalty.sum(), rel=1e-4)


def test_the_mismatch_is_measured_even_where_the_engines_logprobs_are_the_old_ones(pools, case):
    _, batch, current, _ = case
    ours = prepare(pools, case, AlgorithmOptions(old_logprobs="rollout", kl_coef=0.0))
    assert np.array_equal(ours["old"], batch.rollout_logprobs) and ours["reference"] is None
    assert ours["mismatch"]["max"] == pytest.approx(np.abs((current - batch.rollout_logprobs)[batch.mask]).max(), rel=1e-3)


def test_whitened_advantages_weight_each_response_by_its_counted_tokens(pools, case):
    batch = case[1]
    ours = prepare(pools, case, AlgorithmOptions(advantage="reinforce_plus_plus", kl_coef=0.0))
    rewards = np.repeat(batch.rewards, LENGTHS)
    counted = rewards[batch.mask]
    assert np.allclose(ours["advantages"], (rewards - counted.mean()) / (counted.std() + 1e-8), rtol=1e-5)
