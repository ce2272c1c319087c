"""pass@k and maj@k equal the enumeration of every subset; intervals equal an implementation without numpy, and full enumeration."""

import itertools
import random
from fractions import Fraction
from math import comb, prod

import numpy as np
import pytest

from megatron_aspo.evaluation.statistics import interval_of_mean, majority_at_k, pass_at_k, resample


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples):
    for right in range(samples + 1):
        responses = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(responses, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(200, 3, 100), (64, 1, 32), (16, 16, 4), (1000, 999, 1), (200, 0, 7)])
def test_pass_at_k_is_the_published_product(samples, right, k):
    """1 − Π (1 − k/i) over i from n − c + 1 to n, as in the paper's own code, here in fractions."""
    product = 1 - prod((1 - Fraction(k, i) for i in range(samples - right + 1, samples + 1)), start=Fraction(1))
    expected = 1.0 if samples - right < k else float(product)
    assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def majority_by_enumeration(votes, right, k):
    """Enumerate every subset: all most frequent answers share the vote."""
    total = Fraction(0)
    for subset in itertools.combinations(votes, k):
        named = [vote for vote in subset if vote is not None]
        best = [vote for vote in set(named) if named.count(vote) == max(map(named.count, named))]
        total += Fraction(sum(vote in right for vote in best), max(1, len(best)))
    return float(total / comb(len(votes), k))


def test_majority_at_k_is_the_mean_over_every_subset():
    draw = random.Random(4)
    for _ in range(150):
        votes = [draw.choice([None, "a", "b", "c", "d"][: draw.randint(2, 5)]) for _ in range(draw.randint(1, 9))]
        right = draw.choice([{"a"}, {"b"}, {"a", "c"}, set()])
        for k in range(1, len(votes) + 1):
            assert majority_at_k(votes, right, k) == pytest.approx(majority_by_enumeration(votes, right, k), abs=1e-12), (votes, right, k)


def test_majority_of_many_samples_agrees_with_random_draws():
    draw = random.Random(8)
    votes = ["a"] * 13 + ["b"] * 11 + ["c"] * 4 + [None] * 4
    draws = [majority_by_enumeration(draw.sample(votes, 9), {"a"}, 9) for _ in range(20_000)]
    assert majority_at_k(votes, {"a"}, 9) == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / 20_000**0.5)


def test_ties_share_the_vote_and_responses_without_an_answer_do_not_vote():
    assert majority_at_k(["a", "b"], {"a"}, 2) == 0.5
    assert majority_at_k(["a", "b", "c"], {"a", "b"}, 3) == pytest.approx(2 / 3, abs=1e-12)
    assert majority_at_k(["a", None, None], {"a"}, 3) == 1.0
    assert majority_at_k([None, None], {"a"}, 2) == 0.0


@pytest.mark.parametrize("k", [0, 5])
def test_fewer_samples_than_k_are_an_error(k):
    with pytest.raises(ValueError, match="at most the 4 responses"):
        pass_at_k(4, 2, k)
    with pytest.raises(ValueError, match="at most the 4 responses"):
        majority_at_k(["a"] * 4, {"a"}, k)


def interval_by_hand(values, positions, confidence=0.95):
    """Sort the means of the resamples and interpolate between neighbours."""
    means = sorted(float(sum(Fraction(values[position]) for position in row) / len(row)) for row in positions.tolist())

    def quantile(share):
        rank = share * (len(means) - 1)
        below = int(rank)
        return means[below] + (rank - below) * (means[min(below + 1, len(means) - 1)] - means[below])

    return quantile((1 - confidence) / 2), quantile((1 + confidence) / 2)


def test_intervals_and_paired_intervals_equal_an_implementation_by_hand_on_the_same_resamples():
    draw = np.random.default_rng(3)
    before, after = draw.integers(0, 9, 30) / 8, draw.integers(0, 9, 30) / 8
    positions = resample(30, 500, seed=7)
    for values in (before, after, after - before):
        assert interval_of_mean(values, positions) == pytest.approx(interval_by_hand(values, positions), abs=1e-12)
    assert interval_of_mean(before, positions, 0.8) == pytest.approx(interval_by_hand(before, positions, 0.8), abs=1e-12)


def test_resamples_of_five_problems_are_distributed_like_all_3125():
    values = np.array([0.0, 0.25, 0.5, 0.5, 1.0])
    every = np.array([np.mean(chosen) for chosen in itertools.product(values, repeat=5)])
    drawn = values[resample(5, 20_000)].mean(axis=1)
    for level in np.unique(every):
        share = np.mean(every <= level + 1e-9)
        error = (share * (1 - share) / 20_000) ** 0.5
        assert np.mean(drawn <= level + 1e-9) == pytest.approx(share, abs=4.5 * error + 1e-12)
    low, high = interval_of_mean(values, resample(5, 20_000))
    assert (low, high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.05 + 1e-9)  # one step of the means


def test_resamples_are_the_same_in_every_call_and_cover_all_problems():
    positions = resample(7, 1000)
    assert (positions == resample(7, 1000)).all() and (positions != resample(7, 1000, seed=1)).any()
    assert positions.shape == (1000, 7) and set(positions.ravel()) == set(range(7))


def test_the_interval_of_many_problems_is_the_normal_one():
    values = np.random.default_rng(5).normal(0.4, 0.2, 400)
    half = 1.96 * values.std(ddof=1) / 400**0.5
    assert interval_of_mean(values, resample(400)) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)
