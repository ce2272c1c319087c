"""KL estimates, entropy classes, rollout correction and token weights on their own."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from megatron_aspo.losses.aggregation import Totals, token_weights
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.terms import kl_estimate, low_entropy_tokens, quantile, rollout_correction
from tests.reference import losses as reference
from tests.unit import loss_cases as cases

ALL = torch.ones(9, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clamp", [0.0, 0.5, 10.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_and_its_gradient_are_the_reference(estimator, clamp, dtype):
    x = np.array([-30.0, -20.5, -3.0, -0.75, -1e-3, 0.0, 1e-3, 0.25, 2.6, 2.7, 5.0, 19.0, 20.5, 40.0])
    logp = np.random.default_rng(0).normal(-2, 1, len(x)).astype(np.float32).astype(np.float64)
    ref = (logp + x).astype(np.float32).astype(np.float64)
    given = torch.from_numpy(logp).to(dtype).requires_grad_()
    value = kl_estimate(given, torch.from_numpy(ref).to(dtype), estimator, clamp)
    value.sum().backward()
    relative = 1e-12 if dtype == torch.float64 else 2e-6
    want, gradient = reference.kl(logp, ref, estimator, clamp)
    cases.assert_close(value.detach(), want, relative * np.maximum(1, np.abs(want)), estimator)
    cases.assert_close(given.grad, gradient, relative * np.maximum(1, np.abs(gradient)), estimator)
    assert value.dtype == dtype


def test_kl_is_not_bounded_unless_asked():
    logp, ref = torch.tensor([-9.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(np.exp(8) - 9, rel=1e-12)


def test_k3_keeps_its_digits_where_the_policies_are_close():
    """x²/2 + x³/6 + …, of which the first term is 12 digits under e^x."""
    x = np.array([1e-6, -1e-6, 1e-4])
    logp = torch.zeros(3, dtype=torch.float64)
    series = x**2 / 2 + x**3 / 6 + x**4 / 24
    assert kl_estimate(logp, logp + torch.from_numpy(x), "k3").numpy() == pytest.approx(series, rel=1e-9, abs=0)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(KeyError, match="k4"):
        kl_estimate(ALL.double(), ALL.double(), "k4")


def test_quantile_interpolates_linearly_between_sorted_values():
    values = torch.tensor([30.0, 10.0, 20.0])
    assert [quantile(values, q) for q in (0.0, 0.25, 0.5, 0.8, 1.0)] == pytest.approx([10, 15, 20, 26, 30], rel=1e-15)
    assert type(quantile(values, 0.5)) is float
    assert quantile(torch.tensor([7.0]), 0.8) == 7
    assert quantile(torch.zeros(0), 0.8) == -np.inf


def test_quantile_is_taken_in_float64():
    """Half-way between neighbours in float32 there is no float32."""
    low, high = 1.0, 1.0 + 2.0**-23
    assert quantile(torch.tensor([low, high], dtype=torch.float32), 0.5) == 1 + 2.0**-24


def test_quantile_of_entropies_with_a_gradient_is_a_number_without_one():
    with cases.warnings_are_errors():
        assert quantile(torch.tensor([1.0, 2.0], requires_grad=True), 0.5) == 1.5


def test_low_entropy_is_decided_within_each_response_by_its_counted_tokens():
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 60.0, 70.0, 9.0, 0.5])
    mask = torch.tensor([True] * 7 + [False, True])
    # 0.8-quantiles: of 1 … 5 it is 4.2, of 60 and 70 it is 68; the third response counts one of its two tokens.
    low = low_entropy_tokens(entropy, mask, [0, 5, 7, 9], 0.8)
    assert low.dtype == torch.bool and low.tolist() == [True, True, True, True, False, True, False, False, True]


def test_low_entropy_is_decided_by_the_threshold_where_one_is_given():
    entropy = torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0])
    assert low_entropy_tokens(entropy, ALL[:5], [0, 2, 5], 0.8, 2.0).tolist() == [True, True, False, True, True]
    assert low_entropy_tokens(entropy, ALL[:5], [0, 2, 5], 0.8, 0.0).tolist() == [False, False, False, True, True]
    assert low_entropy_tokens(entropy, ~ALL[:5], [0, 2, 5], 0.8).tolist() == [False] * 5


def test_low_entropy_is_compared_in_float64():
    """The threshold 1 + 2⁻²⁴ is 1 in float32, and under the next entropy."""
    entropy = torch.tensor([1.0, 1.0 + 2.0**-23], dtype=torch.float32)
    assert low_entropy_tokens(entropy, ALL[:2], [0, 2], 0.5).tolist() == [True, False]
    assert low_entropy_tokens(entropy, ALL[:2], [0, 2], 0.8, 1.0 - 2.0**-30).tolist() == [False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cap", [1.3, 2.0])
@pytest.mark.parametrize("name", ["none", "tis", "mask"])
def test_rollout_correction_is_the_reference(name, cap, dtype):
    difference = torch.tensor([-300.0, -20.5, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 20.5, 300.0], dtype=dtype)
    old = torch.full((11,), -1.5, dtype=dtype)
    rollout = old - difference
    factor, outside = rollout_correction(old, rollout, name, cap)
    options = AlgorithmOptions(rollout_correction=name, rollout_correction_cap=cap)
    want, beyond = reference.correction(old.double().numpy(), rollout.double().numpy(), options)
    cases.assert_close(factor, want, (1e-12 if dtype == torch.float64 else 2e-6) * np.maximum(1, want), name)
    assert outside.tolist() == beyond.tolist() and (factor.dtype, outside.dtype) == (dtype, torch.bool)


def test_truncated_importance_sampling_bounds_the_log_ratio_to_20():
    for difference, at in ((19.5, 19.5), (20.5, 20.0), (-20.5, -20.0), (-300.0, -20.0)):
        factor, _ = rollout_correction(torch.tensor([difference]).double(), torch.zeros(1).double(), "tis", 1e12)
        assert factor.item() == pytest.approx(np.exp(at), rel=1e-12)


@pytest.mark.parametrize("count", ["counted", "full_mini_batch"])
@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@cases.few(15)
@given(lengths=st.lists(st.integers(0, 6), max_size=6), seed=st.integers(0, 1000))
def test_token_weights_are_the_reference(aggregation, count, lengths, seed):
    random = np.random.default_rng(seed)
    masks = [random.random(n) < 0.7 for n in lengths]
    counted = [int(m.sum()) for m in masks]
    # There are other micro-batches.
    totals = Totals(tokens=sum(counted) + 3, responses=sum(n > 0 for n in counted) + 1, full_responses=12, max_response_tokens=7)
    options = AlgorithmOptions(aggregation=aggregation, sequence_count=count)
    joined = torch.from_numpy(np.concatenate([np.zeros(0, bool), *masks]))
    weights = token_weights(joined, np.cumsum([0, *lengths]).tolist(), options, totals)
    responses = 12 if count == "full_mini_batch" else totals.responses
    want = []
    for mask, n in zip(masks, counted):
        weight = reference.token_weight(n, options, totals.tokens, responses, 7) if n else 0.0
        want += [weight * counts for counts in mask]
    assert weights.dtype == torch.float64 and weights.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [("token_mean", 1.0), ("seq_mean_token_mean", 1.0), ("seq_mean_token_sum", 1.0), ("seq_mean_token_sum_norm", 1 / 5)],
)
def test_one_token_alone_has_all_the_weight(aggregation, weight):
    options = AlgorithmOptions(aggregation=aggregation)
    assert token_weights(torch.tensor([False, True]), [0, 2], options, Totals(1, 1, 9, 5)).tolist() == [0, weight]


@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
def test_nothing_that_counts_weighs_nothing(aggregation):
    totals = Totals(tokens=0, responses=0, full_responses=4, max_response_tokens=5)
    for count in ("counted", "full_mini_batch"):
        options = AlgorithmOptions(aggregation=aggregation, sequence_count=count)
        assert token_weights(torch.zeros(3, dtype=torch.bool), [0, 1, 3], options, totals).tolist() == [0, 0, 0]
        assert token_weights(torch.zeros(0, dtype=torch.bool), [0], options, totals).dtype == torch.float64


def test_totals_have_no_entropy_threshold_unless_given():
    assert Totals(1, 2, 3, 4).entropy_threshold is None


def test_a_threshold_between_two_neighbouring_float32_entropies_parts_them():
    """At 0.8 of the way it would be the upper one, rounded to float32."""
    lower = np.float32(1.5)
    entropy = torch.tensor([lower, np.nextafter(lower, np.float32(2))])
    assert low_entropy_tokens(entropy, torch.ones(2, dtype=torch.bool), [0, 2], 0.8).tolist() == [True, False]
