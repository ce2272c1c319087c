"""Gradients of one mini-batch do not depend on its splitting: every policy loss on real processes against float64, by DP and budget."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.section import algorithm_options
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads
from tests.reference import losses
from tests.reference.decoder import Decoder, token_logprobs
from tests.unit.loss_cases import by_name

pytestmark = pytest.mark.long

VOCAB = 97
LENGTHS = [5, 17, 1, 9, 22, 2, 12, 7]
RESPONSES_PER_PROMPT, MINI_BATCH_PROMPTS, MAX_TOKENS = 2, 5, 24
ALGORITHMS = {
    "aspo": {"rollout_correction": "tis", "kl_coef": 0.05},
    "ppo_clip": {"aggregation": "seq_mean_token_sum_norm", "rollout_correction": "mask", "kl_coef": 0.05, "kl_estimator": "k2"},
    "archer": {"aggregation": "seq_mean_token_mean", "kl_coef": 0.05, "high_entropy_kl_coef": 0.01},
    "gspo": {"aggregation": "seq_mean_token_mean", "clip_low": 0.3, "clip_high": 0.3, "kl_coef": 0.0},
    "cispo": {"aggregation": "seq_mean_token_sum", "clip_low": 1.0, "entropy_coef": 0.02, "kl_coef": 0.0},
    "reinforce": {"kl_coef": 0.05},
    "no_is": {"kl_coef": 0.05},
    "aspo, quantile over the mini-batch": {"entropy_quantile_scope": "mini_batch", "kl_coef": 0.05},
    "archer, quantile over the mini-batch": {"entropy_quantile_scope": "mini_batch", "kl_coef": 0.05},
    "aspo, archer's reference": {
        "aggregation": "seq_mean_token_mean",
        "sequence_count": "full_mini_batch",
        "kl_value_clamp": 10.0,
        "kl_coef": 0.05,
    },
}


def options(name: str) -> AlgorithmOptions:
    return algorithm_options(policy_loss=name.split(",")[0], mini_batch_prompts=MINI_BATCH_PROMPTS, **ALGORITHMS[name])


@dataclass(frozen=True)
class Case:
    directory: object
    prompts: list
    responses: list
    advantages: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    batch: TrainBatch


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """Return off-policy samples. One response is not counted, nor are some tokens of others."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", directory, tied=True, vocab_size=VOCAB)
    random = np.random.default_rng(5)
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (6, 25, 3, 11) for _ in range(2)]
    prompts[1::2] = prompts[::2]
    responses = [random.integers(0, VOCAB, n).tolist() for n in LENGTHS]
    decoder = Decoder(directory)
    with torch.no_grad():
        current = np.concatenate([token_logprobs(decoder, p, r)[0].numpy() for p, r in zip(prompts, responses)])
    old, rollout, reference = ((current + random.normal(0, spread, current.shape)).astype(np.float32) for spread in (0.9, 0.7, 0.3))
    ends = np.concatenate([[0], np.cumsum(LENGTHS)])
    mask = np.ones(ends[-1], bool)
    mask[ends[3] : ends[4]] = False
    mask[[ends[1] + 4, ends[4], ends[5] - 1]] = False
    # Far from the reference, beyond the value clamp.
    reference[ends[4] + 1 : ends[4] + 4] += 3
    tokens = [np.array(p + r) for p, r in zip(prompts, responses)]
    batch = TrainBatch(
        token_ids=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        response_offsets=ends,
        mask=mask,
        rollout_logprobs=rollout,
        rewards=np.zeros(len(tokens)),
        groups=np.arange(len(tokens)) // 2,
        names=tuple(f"sample {i}" for i in range(len(tokens))),
    )
    advantages = np.array([1.3, -0.7, 0.4, -1.1, 0.9, -0.2, 0.6, -1.6]).astype(np.float32)
    return Case(directory, prompts, responses, advantages, old, reference, batch)


_truths: dict[str, tuple[float, dict]] = {}


def truth(case: Case, name: str) -> tuple[float, dict]:
    """Return the loss and its gradient for every weight: the losses' derivatives by hand, the model's by autograd."""
    if name not in _truths:
        decoder = Decoder(case.directory)
        pairs = [token_logprobs(decoder, p, r) for p, r in zip(case.prompts, case.responses)]
        ends = case.batch.response_offsets
        parts = [slice(a, b) for a, b in zip(ends, ends[1:])]
        responses = [
            losses.Response(
                logp=logprob.detach().numpy(),
                old=case.old[part].astype(np.float64),
                rollout=case.batch.rollout_logprobs[part].astype(np.float64),
                ref=case.reference[part].astype(np.float64) if options(name).has_kl else None,
                entropy=entropy.detach().numpy(),
                mask=case.batch.mask[part],
                A=float(advantage),
            )
            for (logprob, entropy), part, advantage in zip(pairs, parts, case.advantages)
        ]
        result = losses.mini_batch(responses, by_name(options(name)), MINI_BATCH_PROMPTS * RESPONSES_PER_PROMPT, MAX_TOKENS)
        outputs = [torch.cat(column) for column in zip(*pairs)]
        upstream = [torch.from_numpy(result.logp_gradient), torch.from_numpy(result.entropy_gradient)]
        torch.autograd.backward(outputs, upstream)
        _truths[name] = result.loss, {n: weight.grad.numpy() for n, weight in decoder.weights.items()}
    return _truths[name]


@pytest.mark.parametrize("budget", [10_000, 60, 1])
@pytest.mark.parametrize("data_parallel", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_does_not_depend_on_how_the_mini_batch_is_split(pools, case, name, data_parallel, budget):
    trainer = TrainerOptions(dtype="float32", data_parallel=data_parallel, micro_batch_tokens=budget)
    settings = RankSettings(
        case.directory, trainer, OptimizerOptions(), options(name), 1.0, 0, RESPONSES_PER_PROMPT, max_response_tokens=MAX_TOKENS
    )
    reference = case.reference if options(name).has_kl else None
    results = pools(data_parallel).run(workloads.one_step, settings, case.batch, case.old, reference, case.advantages)
    loss, gradients = truth(case, name)
    total, part = results[-1]["tally"]["loss"]
    assert part == pytest.approx(1, abs=1e-12) and total == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert set(results[0]["gradients"]) == set(gradients)
    error = max(np.abs(results[0]["gradients"][n] - true).max() / np.abs(true).max() for n, true in gradients.items())
    assert error <= 1e-5
