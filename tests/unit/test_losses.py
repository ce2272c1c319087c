"""Policy losses and their surroundings against float64 references and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.losses import names
from megatron_aspo.losses.advantages import ADVANTAGES, grpo
from megatron_aspo.losses.objective import ObjectiveTokens, objective
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import POLICY_LOSSES, PolicyTokens, aspo
from megatron_aspo.losses.tally import add_tallies
from megatron_aspo.losses.terms import k3, low_entropy_tokens
from tests.reference import objectives

OPTIONS = AlgorithmOptions()


def tokens(ratio, advantage, low_entropy=True) -> PolicyTokens:
    old = torch.full((1,), -1.0, dtype=torch.float64)
    logprobs = (old + float(np.log(ratio))).requires_grad_()
    return PolicyTokens(logprobs, old, torch.full((1,), float(advantage), dtype=torch.float64), torch.tensor([low_entropy]))


def gradient(name: str, given: PolicyTokens) -> float:
    POLICY_LOSSES[name](given, OPTIONS).loss.sum().backward()
    return float(given.logprobs.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low_entropy", "expected"),
    [
        (1.1, 2.0, True, -2.0 / 1.1),  # inverted weight
        (0.5, 2.0, True, -2.0 / 0.5),  # a lagging token gets the larger update
        (0.2, 2.0, True, -2.0 * 3.0),  # 1/r = 5 capped at c_pos, gradient kept
        (1.3, 2.0, True, 0.0),  # hard mask, ε = 0.2
        (1.3, 2.0, False, -2.0 / 1.3),  # ε = 0.4 of a high-entropy token
        (1.5, 2.0, False, 0.0),
        (1.1, -2.0, True, 2.0 * 1.1),
        (5.0, -2.0, True, 2.0 * 3.0),  # capped at c_neg, gradient kept
        (0.7, -2.0, True, 0.0),
        (0.7, -2.0, False, 2.0 * 0.7),
        (1.7, 0.0, True, 0.0),
    ],
)
def test_aspo_gradient_is_minus_advantage_times_weight(ratio, advantage, low_entropy, expected):
    assert gradient("aspo", tokens(ratio, advantage, low_entropy)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.1, 2.0, -2.2), (1.3, 2.0, 0.0), (0.5, 2.0, -1.0), (0.7, -2.0, 0.0), (2.5, -2.0, 5.0), (3.5, -2.0, 0.0)],
)
def test_ppo_clip_gradient(ratio, advantage, expected):
    assert gradient("ppo_clip", tokens(ratio, advantage)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["aspo", "ppo_clip"])
def test_random_tokens_agree_with_the_reference(name):
    random = np.random.default_rng(1)
    for advantage in (1.7, -0.6):
        old = torch.from_numpy(random.normal(-2, 1, 500))
        current = (old + torch.from_numpy(random.normal(0, 1, 500))).requires_grad_()
        low = torch.from_numpy(random.random(500) < 0.8)
        truth = getattr(objectives, name)(current, old, advantage, low)
        expected = torch.autograd.grad(truth.sum(), current)[0]
        term = POLICY_LOSSES[name](PolicyTokens(current, old, torch.full_like(old, advantage), low), OPTIONS)
        assert torch.allclose(torch.autograd.grad(term.loss.sum(), current)[0], expected, rtol=1e-12, atol=0)
        assert torch.equal(term.masked, expected == 0) or name == "ppo_clip"


def test_log_ratios_beyond_20_do_not_overflow():
    given = PolicyTokens(
        torch.tensor([0.0, -300.0], requires_grad=True), torch.tensor([-300.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=bool)
    )
    term = aspo(given, OPTIONS)
    assert torch.isfinite(term.loss).all() and term.weight.tolist() == [3.0, 3.0] and term.capped.all()


def test_low_entropy_is_decided_within_each_response_by_its_counted_tokens():
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 60.0, 70.0, 9.0, 0.5])
    mask = torch.tensor([True] * 7 + [False, True])
    # Response 0: 0.8-quantile of 1…5 is 4.2. Response 1: of 60, 70 it is 68. Response 2 counts one of its two tokens.
    result = low_entropy_tokens(entropy, mask, [0, 5, 7, 9], 0.8)
    assert result.tolist() == [True, True, True, True, False, True, False, False, True]


def test_k3_is_the_closed_form_and_its_gradient():
    logprob = torch.tensor([-1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.1], dtype=torch.float64)
    value = k3(logprob, reference)
    x = (reference - logprob).detach().numpy()
    assert np.allclose(value.detach().numpy(), np.exp(x) - x - 1, rtol=1e-12)
    value.sum().backward()
    assert np.allclose(logprob.grad.numpy(), 1 - np.exp(x), rtol=1e-12)


def test_grpo_advantage_is_the_standard_score_with_n_minus_1():
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert np.allclose(grpo(rewards), (rewards - 0.6) / (np.sqrt(0.3) + 1e-6), rtol=1e-12)
    assert np.array_equal(grpo(np.ones(4)), np.zeros(4))
    with pytest.raises(ValueError, match="at least 2"):
        grpo(np.ones(1))


def batch(responses: int = 6, seed: int = 0) -> ObjectiveTokens:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, responses)
    n = int(lengths.sum())
    old = torch.from_numpy(random.normal(-2, 1, n))
    return ObjectiveTokens(
        logprobs=(old + torch.from_numpy(random.normal(0, 0.5, n))).requires_grad_(),
        entropy=torch.from_numpy(random.random(n)),
        old_logprobs=old,
        ref_logprobs=old + 0.1,
        advantages=torch.from_numpy(np.repeat(random.normal(0, 1, responses), lengths)),
        mask=torch.from_numpy(random.random(n) < 0.8),
        offsets=[0, *np.cumsum(lengths).tolist()],
        names=tuple(f"sample {i}" for i in range(responses)),
    )


def part(whole: ObjectiveTokens, first: int, last: int) -> ObjectiveTokens:
    cut = slice(whole.offsets[first], whole.offsets[last])
    tensors = {n: getattr(whole, n)[cut] for n in ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "advantages", "mask")}
    return ObjectiveTokens(**tensors, offsets=[o - cut.start for o in whole.offsets[first : last + 1]], names=whole.names[first:last])


@pytest.mark.parametrize("edges", [[0, 6], [0, 1, 6], [0, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_the_gradient_does_not_depend_on_how_the_mini_batch_is_cut(edges):
    options = AlgorithmOptions(kl_coef=0.1, entropy_coef=0.01)
    whole = batch()
    counted = int(whole.mask.sum())
    reference = whole.logprobs.detach().clone().requires_grad_()
    # Written out: the plain mean over counted tokens.
    low = torch.cat([objectives.low_entropy(whole.entropy[a:b][whole.mask[a:b]]) for a, b in zip(whole.offsets, whole.offsets[1:])])
    flags = torch.zeros_like(whole.mask)
    flags[whole.mask] = low
    per_token = torch.stack(
        [objectives.aspo(reference[i], whole.old_logprobs[i], float(whole.advantages[i]), flags[i]) for i in range(len(reference))]
    )
    per_token = per_token + 0.1 * objectives.k3(reference, whole.ref_logprobs)
    (per_token[whole.mask].sum() / counted).backward()
    losses = [objective(part(whole, a, b), options, counted) for a, b in zip(edges, edges[1:])]
    sum(loss for loss, _ in losses).backward()
    assert torch.allclose(whole.logprobs.grad, reference.grad, rtol=1e-12, atol=1e-16)
    total, count = add_tallies(*[tally for _, tally in losses])["loss"]
    expected = (per_token - 0.01 * whole.entropy)[whole.mask].mean()
    assert count == counted and total / count == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("what", ["logprobs", "old_logprobs", "ref_logprobs", "advantages", "entropy"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_non_finite_counted_input_names_the_sample(what, value):
    whole = batch()
    at = whole.offsets[2]
    values = getattr(whole, what).detach().clone()
    values[at] = value
    mask = whole.mask.clone()
    mask[at] = True
    spoiled = ObjectiveTokens(**{**whole.__dict__, what: values, "mask": mask})
    with pytest.raises(FloatingPointError, match=r"sample 2: .*response token 0"):
        objective(spoiled, OPTIONS, 1)
    mask[at] = False
    loss, _ = objective(ObjectiveTokens(**{**spoiled.__dict__, "mask": mask}), OPTIONS, 1)
    assert torch.isfinite(loss)


def test_an_empty_micro_batch_contributes_nothing_and_has_a_gradient():
    empty = part(batch(), 0, 0)
    loss, tally = objective(empty, OPTIONS, 5)
    loss.backward()
    assert float(loss.detach()) == 0 and tally == {}


def test_health_figures_separate_the_signs():
    random = np.random.default_rng(2)
    n = 400
    old = torch.from_numpy(random.normal(-2, 1, n))
    current = (old + torch.from_numpy(random.normal(0, 0.8, n))).requires_grad_()
    advantages = torch.from_numpy(np.where(np.arange(n) % 2, 1.0, -1.0))
    mask = torch.ones(n, dtype=torch.bool)
    given = ObjectiveTokens(current, torch.zeros(n).double(), old, None, advantages, mask, [0, n], ("s",))
    _, tally = objective(given, AlgorithmOptions(kl_coef=0.0), n)
    r = (current.detach() - old).exp().numpy()
    positive = np.arange(n) % 2 == 1
    # All entropies are equal, so every token is low-entropy and ε is 0.2.
    assert tally["hard_mask_share/positive"] == ((r[positive] > 1.2).sum(), 200)
    assert tally["hard_mask_share/negative"] == ((r[~positive] < 0.8).sum(), 200)
    assert tally["soft_cap_share/positive"][0] == (1 / r[positive] > 3).sum()
    assert tally["soft_cap_share/negative"][0] == (r[~positive] > 3).sum()
    weights = np.minimum(np.where(positive, 1 / np.minimum(r, 1.2), np.maximum(r, 0.8)), 3)
    assert tally["weight/positive"][0] == pytest.approx(weights[positive].sum(), rel=1e-12)
    assert tally["weight_distance"][0] == pytest.approx(np.abs(weights - 1).sum(), rel=1e-12)


def test_names_that_a_configuration_may_use_are_the_tables_keys():
    assert set(names.POLICY_LOSS_NAMES) == set(POLICY_LOSSES)
    assert set(names.ADVANTAGE_NAMES) == set(ADVANTAGES)


def test_staleness_is_counted_by_token():
    from megatron_aspo.data.records import VersionSpan
    from megatron_aspo.observe.health import staleness
    from tests.unit.test_batch import group

    one = group(0, [5], [[1, 2, 3], [4]])
    spans = (VersionSpan(2, 0, 1), VersionSpan(5, 1, 3)), (VersionSpan(4, 0, 1),)
    samples = tuple(replace(s, generation=replace(s.generation, versions=v)) for s, v in zip(one.samples, spans))
    assert staleness([replace(one, samples=samples)], 5) == (3 + 0 + 0 + 1) / 4
