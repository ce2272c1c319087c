"""The user's own LiveCodeBench grader inside the sandbox, and a public one's verdicts on 60 correct programs.

lcb_verdicts.json holds the verdicts of nvidia-livecodebench 26.3 (PyPI), obtained through `lcb_reference`. To check it against a checkout, unpack
the wheel and set LCB_CHECKOUT to its directory.
"""

import json
import os
from pathlib import Path

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.lcb_reference import ReferenceGrader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest
from tests.code.correct_programs import OTHER, PAIRS, PAIRS_INPUT, PAIRS_OUTPUT

RECORDED = json.loads((Path(__file__).parent / "lcb_verdicts.json").read_text())
PROGRAMS = {name: (program, PAIRS_INPUT, PAIRS_OUTPUT) for name, program in PAIRS.items()} | OTHER
STUB = """
import json
import numpy
def run_test(sample, test=None, debug=False, timeout=6):
    tests = json.loads(sample["input_output"])
    print("noise")
    results = [test == expected for expected in tests["outputs"]]
    return [x if x else -2 for x in results], {"fn": tests.get("fn_name")}
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout whose grader passes the program that equals its own expected output."""
    folder = tmp_path / "lcb_runner" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "testing_util.py").write_text(STUB)
    return tmp_path


def test_the_verdicts_of_a_checkout_are_returned(checkout, sandboxed):
    with ReferenceGrader(CodeOptions(lcb_reference=str(checkout))) as grader:
        assert grader.grade("x", [StdinTest("", "x")]).passed
        verdict = grader.grade("x", [StdinTest("", "x"), StdinTest("", "y")])
        assert (verdict.kind, verdict.test, verdict.tests_run) == ("wrong answer", 1, 2)
        assert grader.grade('"x"', [CallTest("f", [1], "x")]).passed
        assert grader.grade("x", [AssertTest("assert True")]).kind == "unsupported test"


def test_a_directory_without_a_grader_is_refused(tmp_path):
    with pytest.raises(UserError, match="no lcb_runner/evaluation"):
        ReferenceGrader(CodeOptions(lcb_reference=str(tmp_path)))


def test_programs_that_the_public_grader_passes_pass_and_half_of_those_it_fails_are_correct(sandboxed):
    assert len(RECORDED) == 60 and set(RECORDED) <= set(PROGRAMS)
    assert 25 <= sum(RECORDED.values()) <= 40  # all 60 are correct
    with Grader(CodeOptions()) as grader:
        for name in RECORDED:
            program, given, expected = PROGRAMS[name]
            assert grader.grade(program, [StdinTest(given, expected)]).passed, name


@pytest.mark.skipif("LCB_CHECKOUT" not in os.environ, reason="set LCB_CHECKOUT to compare with a checkout's own grader")
def test_the_recorded_verdicts_are_those_of_the_checkout():
    with ReferenceGrader(CodeOptions(lcb_reference=os.environ["LCB_CHECKOUT"])) as grader:
        for name, passes in RECORDED.items():
            program, given, expected = PROGRAMS[name]
            assert grader.grade(program, [StdinTest(given, expected)]).passed is passes, name
