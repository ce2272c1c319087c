"""A whole update (scores, epochs × mini-batches) at different layouts and packings."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_aspo.data.batch import TrainBatch, make_train_batch
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads

pytestmark = pytest.mark.long

VOCAB = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", path, tied=True, vocab_size=VOCAB)
    return path


def batch(groups: int = 5) -> TrainBatch:
    random = np.random.default_rng(3)
    prompts = [random.integers(0, VOCAB, random.integers(2, 12)) for _ in range(groups) for _ in range(3)]
    prompts = [prompts[i - i % 3] for i in range(3 * groups)]
    responses = [random.integers(0, VOCAB, random.integers(1, 12)) for _ in prompts]

    def offsets(lengths):
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    responses_end = offsets([len(r) for r in responses])
    return TrainBatch(
        token_ids=np.concatenate([np.concatenate(pair) for pair in zip(prompts, responses)]),
        offsets=offsets([len(p) + len(r) for p, r in zip(prompts, responses)]),
        response_offsets=responses_end,
        mask=np.ones(responses_end[-1], bool),
        rollout_logprobs=np.full(responses_end[-1], -3.0, np.float32),
        rewards=random.normal(size=len(prompts)),
        groups=np.repeat(np.arange(groups), 3),
        names=tuple(f"sample {i}" for i in range(len(prompts))),
    )


def update(pools, directory, given: TrainBatch, dtype="float32", algorithm=None, step=0, **trainer):
    settings = RankSettings(
        directory,
        TrainerOptions(dtype=dtype, **trainer),
        OptimizerOptions(lr=3e-3, warmup_steps=1, eps=1e-3),
        AlgorithmOptions(epochs=2, mini_batch_prompts=2, kl_coef=0.01, **(algorithm or {})),
        temperature=0.9,
        seed=0,
        responses_per_prompt=3,
        max_response_tokens=12,
    )
    results = pools(settings.sizes.world).run(workloads.train_once, settings, given, step)
    return results[-1][0], results[0][1]


@pytest.mark.parametrize(
    "trainer",
    [
        {"micro_batch_tokens": 30},
        {"micro_batch_tokens": 1},  # every sample alone; ranks may have an empty micro-batch
        {"micro_batch_tokens": 30, "shared_prompts": True},
        {"data_parallel": 2, "micro_batch_tokens": 20},
        {"data_parallel": 2, "micro_batch_tokens": 1},
        {"data_parallel": 2, "distributed_optimizer": True, "shared_prompts": True},
        {"pipeline_parallel": 2, "micro_batch_tokens": 20},
        {"tensor_parallel": 2, "data_parallel": 2, "micro_batch_tokens": 40},
    ],
    ids=str,
)
def test_six_off_policy_updates_do_not_depend_on_layout_or_packing(pools, directory, trainer):
    """The tolerance is float32 rounding carried through six Adam steps."""
    given = batch()
    expected_report, expected = update(pools, directory, given, micro_batch_tokens=10_000)
    report, weights = update(pools, directory, given, **trainer)
    assert len(report.gradient_norms) == 6 and np.allclose(report.gradient_norms, expected_report.gradient_norms, rtol=1e-4)
    assert max(np.abs(weights[name] - expected[name]).max() for name in expected) < 2e-5
    for name, (total, count) in expected_report.tally.items():
        assert report.tally[name][1] == count
        assert report.tally[name][0] == pytest.approx(total, rel=1e-3, abs=2e-2), name
    # Off-policy: later mini-batches have r ≠ 1.
    assert report.tally["weight_distance"][0] / report.tally["weight_distance"][1] > 1e-3
    assert report.mismatch["mean"] == pytest.approx(expected_report.mismatch["mean"], rel=1e-5)
    if not trainer.get("shared_prompts"):
        assert report.packing.tokens == report.tokens == 2 * int(given.lengths.sum())
    if trainer == {"micro_batch_tokens": 1}:
        assert report.packing.room == 2 * given.samples, "a micro-batch for each sample, in each of two epochs"
    if "data_parallel" not in trainer:
        assert report.packing.imbalance == report.packing.lockstep_imbalance == 1


def test_every_step_has_its_own_order_of_mini_batches_and_repeats_it(pools, directory):
    first, second, again = (update(pools, directory, batch(), step=step)[0].gradient_norms for step in (0, 1, 1))
    assert len(first) == len(second) == 6
    assert not np.allclose(first, second, rtol=1e-2) and np.allclose(second, again, rtol=1e-5)


def test_bfloat16_follows_float32(pools, directory):
    given = batch()
    full_report, full = update(pools, directory, given, micro_batch_tokens=64)
    report, weights = update(pools, directory, given, dtype="bfloat16", micro_batch_tokens=64)
    assert np.allclose(report.gradient_norms, full_report.gradient_norms, rtol=0.1)
    for name in full:
        # bfloat16 keeps 8 bits: half a unit in the last place, and a few Adam steps bounded by the learning rate.
        assert np.abs(weights[name] - full[name]).max() <= np.abs(full[name]).max() / 256 + 6 * 3e-3


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum"])
def test_filtered_responses_have_no_effect(pools, directory, aggregation):
    """Compare a step with uncounted responses, among them a whole mini-batch, with the same step without these responses."""
    given = batch(6)
    algorithm = {"advantage": "reinforce_plus_plus", "aggregation": aggregation, "batch_order": "data_index"}
    out = np.array([1, 6, 7, 8, 9, 10, 11, 17])  # groups 2 and 3 are a mini-batch
    mask = np.repeat(~np.isin(np.arange(given.samples), out), np.diff(given.response_offsets))
    masked_report, masked = update(pools, directory, replace(given, mask=mask), micro_batch_tokens=40, algorithm=algorithm)
    kept = np.setdiff1d(np.arange(given.samples), out)

    def rows(values, offsets):
        return np.concatenate([values[offsets[i] : offsets[i + 1]] for i in kept])

    def ends(offsets):
        return np.concatenate([[0], np.cumsum(np.diff(offsets)[kept])])

    without = TrainBatch(
        token_ids=rows(given.token_ids, given.offsets),
        offsets=ends(given.offsets),
        response_offsets=ends(given.response_offsets),
        mask=rows(given.mask, given.response_offsets),
        rollout_logprobs=rows(given.rollout_logprobs, given.response_offsets),
        rewards=given.rewards[kept],
        groups=np.unique(given.groups[kept], return_inverse=True)[1],
        names=tuple(given.names[i] for i in kept),
    )
    report, weights = update(pools, directory, without, micro_batch_tokens=40, algorithm=algorithm)
    assert len(masked_report.gradient_norms) == len(report.gradient_norms) == 4 and masked_report.tokens == report.tokens
    assert np.allclose(masked_report.gradient_norms, report.gradient_norms, rtol=1e-5)
    assert max(np.abs(masked[name] - weights[name]).max() for name in weights) < 1e-6


def test_a_step_whose_groups_were_all_dropped_changes_nothing(pools, directory):
    report, weights = update(pools, directory, make_train_batch([], "shuffled", 1, overlong_filter=False))
    assert report.gradient_norms == [] and report.tally == {} and report.mismatch == {}
    assert all(np.array_equal(weights[name], tensor) for name, tensor in load_file(directory / "model.safetensors").items())
