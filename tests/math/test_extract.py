"""Extraction of the answer from a response."""

import time

import pytest

from megatron_aspo.rewards.math.extract import extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The sum is \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{35 cm} and so \\boxed{4}", "4"),
        ("\\boxed{7} and \\boxed{", "7"),
        ("\\boxed{7} and \\boxed{\\frac{1}{", "7"),
        ("\\boxed{\\frac{1}{2}} more}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("\\boxed {5}", "5"),
        ("\\fbox{5}", "5"),
        ("{\\boxed{5}", "5"),
        ("\\boxed{}", ""),
        ("<think>\\boxed{1}</think> It is \\boxed{2}", "2"),
        ("\\boxed{1}</think> It is 2", None),
        ("a</think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>\\boxed{1}", None),
        ("<think>a</think> b <think> \\boxed{1}", None),
        ("It is 42", None),
        ("\\boxed{42", None),
        ("", None),
    ],
)
def test_the_last_complete_box_after_thinking(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("3 + 4 = 7", "7"),
        ("It is -7.", "-7"),
        ("It is 1,234.5 m", "1,234.5"),
        ("It is 3/4.", "3/4"),
        ("so 30%", "30%"),
        ("It costs $5", "$5"),
        ("x2y", None),
        ("It is .5", ".5"),
        ("2 and \\boxed{x}", "x"),
        ("none", None),
        ("5</think> none", None),
    ],
)
def test_the_last_number_is_used_if_there_is_no_box(response, answer):
    assert extract_answer(response, "boxed_or_number") == answer


def test_the_rule_number_ignores_boxes():
    assert extract_answer("\\boxed{3} of 4", "number") == "4"


@pytest.mark.parametrize("rule", ["boxed", "boxed_or_number"])
def test_a_long_response_takes_linear_time(rule):
    for text in ("{" * 10**6, "\\boxed{" * 10**5, "1," * 10**6, "9" * 10**6, "<think>" * 10**5, "}" * 10**6, "\\" * 10**6):
        began = time.process_time()
        extract_answer(text, rule)
        assert time.process_time() - began < 2
