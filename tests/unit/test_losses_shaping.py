"""The length penalty, and which groups are trained on."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.shaping import is_trained_on, overlong_penalty
from tests.reference import losses as reference
from tests.unit import loss_cases as cases


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (83, 0), (84, 0), (85, -1 / 16), (92, -0.5), (99, -15 / 16), (100, -1), (108, -1.5)]
)
def test_the_penalty_grows_over_the_buffer_to_the_factor(length, penalty):
    for factor in (1.0, 0.25):
        options = AlgorithmOptions(overlong_buffer_tokens=16, overlong_factor=factor)
        assert overlong_penalty(length, 100, options) == pytest.approx(penalty * factor, rel=1e-12)


def test_without_a_buffer_there_is_no_penalty():
    for length in (0, 99, 100, 101):
        assert overlong_penalty(length, 100, AlgorithmOptions(overlong_factor=5.0)) == 0


@cases.few(40)
@given(st.integers(0, 300), st.integers(1, 250), st.integers(1, 60), st.floats(0.1, 3))
def test_the_penalty_is_the_reference(length, longest, buffer, factor):
    options = AlgorithmOptions(overlong_buffer_tokens=buffer, overlong_factor=factor)
    want = reference.overlong_penalty(length, longest, buffer, factor)
    assert overlong_penalty(length, longest, options) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("rewards", "none", "drop", "resample", "drop_zero_or_one"),
    [
        ([0.0, 0.0, 0.0], True, False, False, False),
        ([1.0, 1.0], True, False, False, False),
        ([0.5, 0.5], True, False, False, True),
        ([-1.0, -1.0], True, False, False, True),
        ([2.0, 2.0], True, False, False, True),
        ([0.0, 1.0], True, True, True, True),
        ([1.0, 1.0, 0.0], True, True, True, True),
        ([0.0, -0.25, 0.0], True, True, True, True),
        ([1.0], True, False, False, False),
        ([0.5], True, False, False, True),
    ],
)
def test_groups_without_a_gradient_are_left_out_as_the_filter_says(rewards, none, drop, resample, drop_zero_or_one):
    wanted = {"none": none, "drop": drop, "resample": resample, "drop_zero_or_one": drop_zero_or_one}
    for group_filter, stays in wanted.items():
        assert is_trained_on(np.array(rewards), group_filter) is stays, group_filter
