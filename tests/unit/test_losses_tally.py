"""The figures that a mini-batch leaves: names, sums and counts; and how they add up."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.tally import add_tallies, means
from tests.reference.losses import Response
from tests.unit import loss_cases as cases


def test_figures_written_out():
    """Four counted tokens and one that is not, r = 1/4, 5/4, 1/2, 4 and 1; A = 2, 2, −1, −1 and −1; ε 0.2, c 3, everything low-entropy."""
    old = np.full(5, -3.0)
    logp = old + np.log([0.25, 1.25, 0.5, 4.0, 1.0])
    masks = np.ones(2, bool), np.array([True, True, False])
    rollout = old - np.log([1.0, 4.0, 0.5, 1.0, 9.0])
    ref = logp + np.array([1.0, -1.0, 2.0, 0.0, 5.0])
    arrays = (logp, old, rollout, ref, np.array([1.0, 1.0, 2.0, 2.0, 7.0]))
    responses = [
        Response(*(a[part] for a in arrays), mask=mask, A=A)
        for part, mask, A in ((slice(0, 2), masks[0], 2.0), (slice(2, 5), masks[1], -1.0))
    ]
    options = cases.algorithm(rollout_correction="tis", kl_coef=0.5, kl_estimator="k2", entropy_coef=0.25)
    totals = Totals(tokens=8, responses=3, full_responses=3, max_response_tokens=9)
    loss, tally = cases.objective(cases.as_tokens(responses), options, totals)
    # w = min(4, 3), 1 / 1.2, 0.8, min(4, 3); u = 1, 4 → 2, 0.5, 1; k2 = x² / 2.
    policy = (-2 * 3 * 1 - 2 / 1.2 * 2 + 0.8 * 0.5 + 3 * 1) / 8
    total = policy + (0.5 * (0.5 + 0.5 + 2 + 0) - 0.25 * 6) / 8
    assert loss.item() == pytest.approx(total, rel=1e-12)
    distances = (2, 1 - 1 / 1.2, 0.2, 2)
    expected = {
        "entropy": (6, 4),
        "kl": (3, 4),
        "rollout_correction/weight": (1 + 2 + 0.5 + 1, 4),
        "rollout_correction/share": (1, 4),
        "weight_distance": (sum(distances), 4),
        "hard_mask_share/positive": (1, 2),
        "hard_mask_share/negative": (1, 2),
        "soft_cap_share/positive": (1, 2),
        "soft_cap_share/negative": (1, 2),
        "weight/positive": (3 + 1 / 1.2, 2),
        "weight/negative": (0.8 + 3, 2),
        "weight_distance/positive": (sum(distances[:2]), 2),
        "weight_distance/negative": (sum(distances[2:]), 2),
        "ratio/positive": (1.5, 2),
        "ratio/negative": (4.5, 2),
        "loss": (total, 0.5),
        "policy_loss": (policy, 0.5),
    }
    assert set(tally) == set(expected)
    for name, (figure, count) in expected.items():
        assert tally[name] == (pytest.approx(figure, rel=1e-12), count), name


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_every_figure_is_the_reference(loss):
    responses = cases.one_of_each(4)
    for correction, kl_in, estimator, aggregation in product(
        cases.CORRECTIONS, ("loss", "reward"), ("k1", "k2", "k3"), cases.AGGREGATIONS[:2]
    ):
        options = cases.algorithm(
            policy_loss=loss,
            rollout_correction=correction,
            kl_in=kl_in,
            kl_estimator=estimator,
            kl_coef=0.1,
            entropy_coef=0.01,
            aggregation=aggregation,
        )
        _, tally = cases.objective(cases.as_tokens(responses), options, cases.totals(responses, options))
        cases.assert_tally_is_the_reference(tally, cases.truth(responses, options), with_kl=True, what=f"{correction} {kl_in} {estimator}")


def test_figures_are_plain_numbers_and_sums_run_in_float64():
    """2²⁴ + 1 is no float32: two entropies of which the bonus is the loss."""
    old = np.array([0.0, 0.0])
    responses = [Response(old, old, old, None, np.array([2.0**24, 1.0]), np.ones(2, bool), 0.0)]
    options = cases.algorithm(entropy_coef=1.0)
    loss, tally = cases.objective(cases.as_tokens(responses, torch.float32), options, Totals(1, 1, 1, 2))
    assert tally["entropy"] == (2.0**24 + 1, 2)
    assert loss.item() == -(2.0**24) - 1
    assert all(type(x) is float for figure in tally.values() for x in figure)


def test_tokens_without_an_advantage_have_no_sign():
    responses = [replace(r, A=0.0) for r in cases.one_of_each(5)]
    options = cases.algorithm()
    _, tally = cases.objective(cases.as_tokens(responses), options, cases.totals(responses, options))
    assert all(figure == (0, 0) for name, figure in tally.items() if name.endswith(("/positive", "/negative", "weight_distance")))
    assert tally["entropy"][1] == sum(r.mask.sum() for r in responses)


def test_tallies_add_up_name_by_name():
    one, two = {"a": (1.0, 2.0), "b": (3.0, 4.0)}, {"b": (0.5, 0.25), "c": (7.0, 8.0)}
    assert add_tallies(one, two, {"c": (1.0, 1.0)}) == {"a": (1, 2), "b": (3.5, 4.25), "c": (8, 9)}
    assert add_tallies() == {} and add_tallies({}, one) == one
    assert one == {"a": (1.0, 2.0), "b": (3.0, 4.0)} and two == {"b": (0.5, 0.25), "c": (7.0, 8.0)}


def test_a_figure_is_its_sum_by_its_count_and_absent_where_nothing_counted():
    assert means({"a": (3.0, 4.0), "b": (0.0, 0.0), "c": (-1.0, 0.5), "d": (5.0, 1.0)}) == {"a": 0.75, "c": -2.0, "d": 5.0}
