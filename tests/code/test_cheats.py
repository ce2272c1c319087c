"""Programs that solve nothing fail, whatever they try."""

import pytest

from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest
from tests.code.cheats import ASSERT_TESTS, ASSERTS, CALLS, OTHER_ASSERTS, SECRET, STDIN


@pytest.mark.parametrize("name", STDIN)
def test_a_cheat_cannot_print_the_unknown_output(grader, name):
    tests = [StdinTest("", SECRET), StdinTest("", SECRET + "-later")]
    verdict = grader.grade(STDIN[name], tests)
    assert not verdict.passed and verdict.test == 0, verdict
    assert SECRET not in verdict.reason


@pytest.mark.parametrize("name", CALLS)
def test_a_cheat_cannot_return_the_unknown_result(grader, name):
    verdict = grader.grade(CALLS[name], [CallTest("f", [1], 42)])
    assert not verdict.passed, verdict
    assert "42" not in verdict.reason


@pytest.mark.parametrize("name", ASSERTS)
def test_a_cheat_cannot_pass_assertions(grader, name):
    verdict = grader.grade(ASSERTS[name], [AssertTest(ASSERT_TESTS)])
    assert not verdict.passed and verdict.kind != "unsupported test", verdict


@pytest.mark.parametrize("name", OTHER_ASSERTS)
def test_a_cheat_cannot_pass_other_assertions(grader, name):
    program, tests = OTHER_ASSERTS[name]
    verdict = grader.grade(program, [AssertTest(tests)])
    assert not verdict.passed, verdict


def test_a_solution_passes_the_same_tests(grader):
    program = "def f(x):\n    return x + 41\n"
    assert grader.grade(program, [CallTest("f", [1], 42)]).passed
    assert grader.grade(program, [AssertTest(ASSERT_TESTS)]).passed
    assert grader.grade(f"print('{SECRET}')", [StdinTest("", SECRET)]).passed


@pytest.mark.parametrize("program", ["print(add(5, 5))", "try:\n    add\nexcept NameError:\n    pass\n"])
def test_a_library_function_that_the_program_only_uses_is_not_its_answer(grader, program):
    """`add` is a name of Python's library that programs may use without an import."""
    assert not grader.grade(program, [CallTest("add", [1, 2], 3)]).passed
    assert not grader.grade(program, [AssertTest("assert add(1, 2) == 3")]).passed
    assert not grader.grade(program, [AssertTest("assert math.isclose(add(1, 2), 3)")]).passed
    imported = "from operator import add\n" + program
    assert grader.grade(imported, [CallTest("add", [1, 2], 3)]).passed
    assert grader.grade(imported, [AssertTest("assert math.isclose(add(1, 2), 3)")]).passed


@pytest.mark.parametrize("tests", ["assert isclose(add(1, 2), 3)", "assert 1 + 1 == 2"])
def test_assertions_on_no_function_of_the_program_are_unsupported_rather_than_passed(grader, tests):
    verdict = grader.grade("from operator import add\nfrom math import isclose\n", [AssertTest(tests)])
    assert verdict.kind == "unsupported test" and "entry_point" in verdict.reason, verdict
    assert grader.grade("from operator import add", [AssertTest(tests, entry_point="add")]).passed


def test_a_later_tests_input_is_not_available_to_an_earlier_one(grader):
    program = "import gc, os\nseen = ' '.join(repr(o)[:1000] for o in gc.get_objects()) + ' '.join(os.environ) + open(__file__).read()\n"
    program += "print(input() if 'tupni-dnoces'[::-1] not in seen else 'seen')\n"
    assert grader.grade(program, [StdinTest("first", "first"), StdinTest("second-input", "second-input")]).passed


def test_a_process_left_by_an_earlier_test_does_not_see_the_next(grader):
    program = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    time.sleep(5)
    os._exit(0)
def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
print(input(), sum(alive(pid) for pid in os.listdir("/proc") if pid.isdigit()))
sys.stdout.flush()
os._exit(0)
"""
    # bubblewrap, the agent, the program and its child; one that was killed may be there a little longer as a zombie
    verdict = grader.grade(program, [StdinTest(str(number), f"{number} 4") for number in range(3)])
    assert verdict.passed and verdict.seconds < 5, verdict
