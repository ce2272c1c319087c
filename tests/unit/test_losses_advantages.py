"""Advantages by name, from rewards; groups may stand in any order."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_aspo.losses.advantages import ADVANTAGES, advantages
from megatron_aspo.losses.options import AlgorithmOptions
from tests.reference import losses as reference
from tests.unit import loss_cases as cases

REWARDS = np.array([0.0, 5.0, 1.0, 7.0, 1.0, 0.0])
GROUPS = np.array([3, 0, 3, 0, 3, 3])
COUNTED = np.array([4, 1, 2, 3, 0, 5])


def of(name: str, rewards=REWARDS, groups=GROUPS, counted=COUNTED, **options) -> list[float]:
    result = advantages(np.asarray(rewards), np.asarray(groups), np.asarray(counted), AlgorithmOptions(advantage=name, **options))
    assert result.dtype == np.float64 and result.shape == np.shape(rewards)
    return result.tolist()


def test_grpo_is_the_standard_score_within_the_group_with_n_minus_1():
    s3, s0 = np.sqrt(1 / 3) + 1e-6, np.sqrt(2) + 1e-6
    assert of("grpo") == pytest.approx([-0.5 / s3, -1 / s0, 0.5 / s3, 1 / s0, 0.5 / s3, -0.5 / s3], rel=1e-12)


def test_grpo_without_std_is_the_deviation_from_the_group_mean():
    assert of("grpo", advantage_std=False) == pytest.approx([-0.5, -1, 0.5, 1, 0.5, -0.5], rel=1e-12)


def test_rloo_is_the_deviation_from_the_mean_of_the_others():
    assert of("rloo") == pytest.approx([-2 / 3, -2, 2 / 3, 2, 2 / 3, -2 / 3], rel=1e-12)


def test_reinforce_plus_plus_is_whitened_over_the_counted_tokens():
    mean = (4 * 0 + 1 * 5 + 2 * 1 + 3 * 7 + 0 * 1 + 5 * 0) / 15
    std = np.sqrt((9 * mean**2 + (5 - mean) ** 2 + 2 * (1 - mean) ** 2 + 3 * (7 - mean) ** 2) / 15)
    assert of("reinforce_plus_plus") == pytest.approx([(R - mean) / (std + 1e-8) for R in REWARDS], rel=1e-12)


def test_reinforce_plus_plus_can_take_the_group_mean_off_first():
    """Of all responses of the group alike, however many of their tokens count."""
    R = [-0.5, -1, 0.5, 1, 0.5, -0.5]
    mean = (-0.5 * 4 - 1 * 1 + 0.5 * 2 + 1 * 3 + 0 - 0.5 * 5) / 15
    std = np.sqrt(sum(n * (r - mean) ** 2 for n, r in zip(COUNTED, R)) / 15)
    assert of("reinforce_plus_plus", subtract_group_mean=True) == pytest.approx([(r - mean) / (std + 1e-8) for r in R], rel=1e-12)


def test_without_a_counted_token_nothing_is_taken_off():
    """Nothing is trained on; the numbers must only be finite: (R − the first R) / (0 + 1e-8)."""
    assert of("reinforce_plus_plus", [1.0, -2.0], [0, 0], [0, 0]) == pytest.approx([0, -3e8], rel=1e-12)
    assert of("reinforce_plus_plus", [], [], []) == of("grpo", [], [], []) == of("rloo", [], [], []) == []


def test_one_counted_token_is_its_own_mean():
    assert of("reinforce_plus_plus", [1.0, 3.0], [0, 0], [1, 0]) == pytest.approx([0, 2e8], rel=1e-12)
    assert of("reinforce_plus_plus", [1.0, 3.0], [0, 0], [0, 1]) == pytest.approx([-2e8, 0], rel=1e-12)


def test_a_group_of_one_is_its_own_mean():
    assert of("reinforce_plus_plus", [0.7], [0], [3], subtract_group_mean=True) == [0]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_rewards_that_are_all_equal_have_no_advantage(name, reward, size):
    groups, counted = np.arange(size) % 1, np.arange(size) + 1
    for option in ("advantage_std", "subtract_group_mean"):
        for value in (True, False):
            result = of(name, np.full(size, reward), groups, counted, **{option: value})
            assert result == [0] * size


def test_a_group_of_two_is_plus_and_minus_the_same():
    a = 0.5 / (np.sqrt(0.5) + 1e-6)
    assert of("grpo", [0.0, 1.0], [7, 7], [3, 5]) == pytest.approx([-a, a], rel=1e-12)
    assert of("rloo", [0.0, 1.0], [7, 7], [3, 5]) == [-1, 1]
    assert of("reinforce_plus_plus", [0.0, 1.0], [7, 7], [4, 4]) == pytest.approx([-1, 1], rel=1e-7)


def test_rewards_in_float32_or_integers_are_reckoned_with_in_float64():
    for dtype in (np.float32, np.int64):
        rewards = np.array([0, 1, 1], dtype)
        assert of("grpo", rewards, [0] * 3, [1] * 3) == pytest.approx(reference.grpo([0.0, 1.0, 1.0], True), rel=1e-12)


@cases.few(40)
@given(
    groups=st.lists(st.tuples(st.integers(2, 5), st.booleans()), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_advantages_are_the_reference_for_interleaved_groups(groups, seed, flags):
    random = np.random.default_rng(seed)
    numbers = random.permutation(np.repeat(random.permutation(50)[: len(groups)], [size for size, _ in groups]))
    rewards = np.where(random.random(len(numbers)) < 0.5, random.integers(0, 2, len(numbers)), random.normal(0, 2, len(numbers)))
    for number, (_, equal) in zip(np.unique(numbers), groups):
        if equal:
            rewards[numbers == number] = 1.0
    counted = random.integers(0, 9, len(numbers))
    counted[0] = max(1, counted[0])
    std, subtract = flags
    want = reference.reinforce_plus_plus(rewards, numbers, counted, subtract)
    assert of("reinforce_plus_plus", rewards, numbers, counted, subtract_group_mean=subtract) == pytest.approx(want, rel=1e-9, abs=1e-9)
    for name, one_group in (("grpo", lambda r: reference.grpo(r, std)), ("rloo", reference.rloo)):
        got = np.array(of(name, rewards, numbers, counted, advantage_std=std))
        for number in np.unique(numbers):
            here = numbers == number
            assert got[here].tolist() == pytest.approx(one_group(rewards[here].tolist()), rel=1e-12, abs=1e-9)
