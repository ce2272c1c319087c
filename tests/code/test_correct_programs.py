"""Correct programs of every kind pass: those that public graders reject, and others."""

import pytest

from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest
from tests.code.correct_programs import OTHER, PAIRS, PAIRS_INPUT, PAIRS_OUTPUT


@pytest.mark.parametrize("name", PAIRS)
def test_a_correct_program_passes(run, name):
    verdict = run(PAIRS[name], PAIRS_INPUT, PAIRS_OUTPUT)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", OTHER)
def test_another_correct_program_passes(run, name):
    program, given, expected = OTHER[name]
    if expected is None:
        kinds = [run(program, given, " ".join(order)).kind for order in ("bcd", "bdc", "cbd", "cdb", "dbc", "dcb")]
        assert kinds.count("passed") == 1, kinds
        return
    verdict = run(program, given, expected)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("class Solution:\n    def f(self, a: List[int], k: int) -> int:\n        return sum(a) * k\n", [[1, 2, 3], 2], 12),
        ("def f(a):\n    return tuple(zip(a, a))\n", [[1, 2]], [[1, 1], [2, 2]]),
        ("def f():\n    return 0.1 + 0.2\n", [], 0.3),
        ("def f():\n    return 4 / 2\n", [], 2),
        ("def f():\n    return {'a': (1, None), 'b': True}\n", [], {"a": [1, None], "b": True}),
        ("from collections import Counter\ndef f(s):\n    return Counter(s)\n", ["aab"], {"a": 2, "b": 1}),
        ("def f(s):\n    print('to stdout', s)\n    return s\n", ["\U0001f600\x00\n"], "\U0001f600\x00\n"),
        ("def f(n):\n    return 7 ** n\n", [4000], 7**4000),
        ("from enum import IntEnum\nclass E(IntEnum):\n    A = 1\ndef f():\n    return [E.A]\n", [], [1]),
        ("import sys\nif __name__ == '__main__':\n    sys.exit(1)\nf = lambda x: x[::-1]\n", ["abc"], "cba"),
        (
            "class Solution:\n    memo = {}\n    def __init__(self):\n        self.n = 1\n    def f(self, a):\n        return self.n + a\n",
            [1],
            2,
        ),
    ],
)
def test_a_correct_function_passes(grader, program, arguments, expected):
    verdict = grader.grade(program, [CallTest("f", arguments, expected)])
    assert verdict.passed, verdict


ASSERTS = {
    "plain functions": ("def f(x):\n    return x + 1\n", "assert f(1) == 2\nassert f(x=-1) == 0\n"),
    "a method of Solution, through check": (
        "class Solution:\n    def two(self, nums: List[int]) -> List[int]:\n        return nums[:2]\n",
        "def check(candidate):\n    assert candidate(nums=[1, 2, 3]) == [1, 2]\ncheck(Solution().two)\n",
    ),
    "objects that keep a state": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n"
        "    def pop(self):\n        return self.items.pop()\n    def __len__(self):\n        return len(self.items)\n",
        "s = Stack()\ns.push(1)\ns.push('a')\nassert len(s) == 2 and s.items == [1, 'a']\nassert s.pop() == 'a'\n",
    ),
    "an argument changed in place": ("def f(a):\n    a.sort()\n", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]\n"),
    "a generator": ("def f(n):\n    yield from range(n)\n", "assert list(f(3)) == [0, 1, 2]\n"),
    "an exception that is expected": (
        "class Bad(ValueError):\n    pass\ndef f(x):\n    raise Bad('no')\n",
        "try:\n    f(1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'\n",
    ),
    "sets, tuples and dicts with any keys": (
        "def f(x):\n    return {(1, 2): {3}, None: frozenset([x])}\n",
        "assert f(b'x') == {(1, 2): {3}, None: frozenset([b'x'])}\n",
    ),
    "infinities and complex numbers": (
        "def f(x):\n    return (x, -x, 1j)\n",
        "assert f(float('inf')) == (float('inf'), float('-inf'), 1j)\n",
    ),
    "a large argument": ("def f(a):\n    return a[::-1]\n", "a = list(range(200000))\nassert f(a) == a[::-1]\n"),
    "unittest": (
        "def f(x):\n    return x * 2\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 4)\nunittest.main()\n",
    ),
}


@pytest.mark.parametrize("name", ASSERTS)
def test_assertions_on_a_correct_program_hold(grader, name):
    program, tests = ASSERTS[name]
    verdict = grader.grade(program, [AssertTest(tests)])
    assert verdict.passed, verdict


def test_helpers_of_the_prompt_are_there_and_are_the_prompts_own(grader):
    prompt = "def double(x):\n    return 2 * x\n\ndef f(x):\n    '''Halve.'''\n"
    tests = "def check(candidate):\n    assert candidate(double(3)) == 3\ncheck(f)\n"
    assert grader.grade("def f(x):\n    return x // 2\n", [AssertTest(tests, prompt, "f")]).passed
    cheat = "double = lambda x: 0\ndef f(x):\n    return 3\n"
    assert (
        grader.grade(cheat, [AssertTest(tests.replace("(3)) == 3", "(3)) == 3 and candidate(double(4)) == 4"), prompt, "f")]).kind
        == "wrong answer"
    )


def test_tests_run_in_order_up_to_the_first_failure(grader):
    tests = [StdinTest(str(number), str(number)) for number in range(5)]
    verdict = grader.grade("x = int(input())\nprint(x if x != 3 else 0)\n", tests)
    assert (verdict.kind, verdict.test, verdict.tests_run) == ("wrong answer", 3, 4)
    assert verdict.seconds > 0
