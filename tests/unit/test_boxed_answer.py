"""The example of a reward for mathematics: which answers count as right."""

import time

import pytest

from examples.rewards.boxed_answer import last_boxed, score


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("The sum is \\boxed{42}.", "42", True),
        ("First \\boxed{1}, no: \\boxed{ 42 }", "42", True),
        ("\\boxed{1,024}", "1024", True),
        ("\\boxed{1024.0}", 1024, True),
        ("\\boxed{$0.5$}", "1/2", True),
        ("\\boxed{-7}", "-7", True),
        ("\\boxed{073}", "73", True),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
        ("\\boxed{x + 1}", "x+1", True),
        ("\\boxed{1,2}", "12", False),
        ("\\boxed{41}", "42", False),
        ("\\boxed{1/0}", "0", False),
        ("\\boxed{1+x}", "x+1", False),
        ("42", "42", False),
        ("\\boxed{42", "42", False),
        ("", "42", False),
    ],
)
def test_only_the_last_box_with_the_same_text_or_number_is_right(response, truth, right):
    given = score("What is it?", response, truth, {})
    assert given["score"] == float(right) and given["reason"]


def test_nested_braces_belong_to_the_answer():
    assert last_boxed("\\boxed{\\sqrt{\\frac{1}{2}}} and more}") == "\\sqrt{\\frac{1}{2}}"


def test_a_number_of_a_million_digits_costs_no_time():
    began = time.monotonic()
    assert score("", "\\boxed{" + "9" * 1_000_000 + "}", "9", {})["score"] == 0
    assert score("", "\\boxed{1e999999999}", "9", {})["score"] == 0
    assert time.monotonic() - began < 2
