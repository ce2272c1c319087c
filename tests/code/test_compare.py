"""The rules for comparing outputs and results."""

import time

import pytest

from megatron_aspo.rewards.code.compare import outputs_match, value_matches
from megatron_aspo.rewards.sandbox.inside.plain import to_json


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("6", "6.0", True),
        ("6\n", "6", True),
        ("\n\n 1  2 \n3\n\n", "1 2\n3", True),
        ("1 2\n3", "1 2 3", False),
        ("1\n\n2", "1\n2", False),
        ("1e3", "1000", True),
        ("0.30000000000000004", "0.3", False),
        ("YES", "yes", False),
        ("YES 6.0", "YES 6", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("infinity", "inf", False),
        ("1_000", "1000", False),
        ("١", "1", False),
        ("007", "7", True),
        ("-0", "0", True),
        ("1e999999999", "1", False),
        ("", "", True),
        ("", "1", False),
        ("1.", "1", True),
        (".5", "0.50", True),
    ],
)
def test_outputs_are_lines_of_text_or_of_decimals(output, expected, same):
    assert outputs_match(output, expected) is same


@pytest.mark.parametrize("output", ["1" * 100_000 + "x", "1." + "1" * 100_000 + "x", "1" * 100_000 + "e" + "1" * 100_000, "1x " * 50_000])
def test_hostile_output_is_refused_in_linear_time(output):
    started = time.monotonic()
    assert not outputs_match(output, "1 " * len(output.split()))
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        ([1, 2], [1, 2], True),
        ((1, (2,)), [1, [2]], True),
        ({1, 2}, [1, 2], False),
        ([1, 2], [1, 2, 3], False),
        (True, True, True),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (0, None, False),
        ("a", "a", True),
        (b"a", "a", False),
        (0.1 + 0.2, 0.3, True),
        (1e-10, 0.0, True),
        (1.000001, 1.0, False),
        (2, 2.0, True),
        (2.0, 2, True),
        (2.0000000000001, 2, False),
        (float(10**18), 10**18 + 1, False),
        (10**40, 10**40, True),
        (float("nan"), 1.0, False),
        (float("inf"), 1e308, False),
        ({"a": (1,)}, {"a": [1]}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({1: 2}, {"1": 2}, False),
        ({}, {}, True),
        ([], {}, False),
        ({}, [], False),
        (1j, 1, False),
    ],
)
def test_results_are_compared_by_type_and_value(value, expected, same):
    assert value_matches(to_json(value), expected) is same


@pytest.mark.parametrize("value", [{"r": 0}, {"q": 1}, {}, {"d": [["a", 1], ["a", 1]]}, {"d": [[["x"], 1]]}, {"t": 5}, {"d": 3}])
def test_values_that_the_agent_never_sends_do_not_match(value):
    assert not any(value_matches(value, expected) for expected in (None, True, 0, 1, 1.0, "", "a", [], [1], {"a": 1}, {"a": 1, "b": 1}))
