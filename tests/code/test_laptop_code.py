"""The programming problems of examples/recipes/laptop_code.yaml: right programs pass their tests, wrong ones do not."""

import json
from pathlib import Path

import pytest

from megatron_aspo.rewards.code.compare import value_matches
from megatron_aspo.rewards.code.schemas import CallTest, read_tests
from tests.code.laptop_code_solutions import HELD_OUT, TRAIN

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
SOLUTIONS = {"train": TRAIN, "heldout": HELD_OUT}


def problems(part: str) -> list[tuple[str, list[CallTest], str]]:
    """Return (question, tests, right program) of each row of a file."""
    rows = [json.loads(line) for line in (DATA / f"laptop_code_{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (row["prompt"][-1]["content"], read_tests(row["ground_truth"]), solution)
        for row, solution in zip(rows, SOLUTIONS[part], strict=True)
    ]


PROBLEMS = problems("train") + problems("heldout")
NAMES = [tests[0].function for _, tests, _ in PROBLEMS]


def test_there_are_30_and_20_different_problems_with_at_least_5_tests_each():
    assert (len(TRAIN), len(HELD_OUT)) == (30, 20)
    assert len(set(NAMES)) == len({question for question, _, _ in PROBLEMS}) == 50
    for question, tests, _ in PROBLEMS:
        arguments = [json.dumps(test.arguments) for test in tests]
        assert f"`{tests[0].function}(" in question and len(set(arguments)) == len(tests) >= 5


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_the_right_program_passes_in_the_sandbox(grader, problem):
    _, tests, solution = problem
    verdict = grader.grade(solution, tests)
    assert verdict.passed and verdict.tests_run == len(tests)


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_programs_that_do_not_compute_the_answer_fail_in_the_sandbox(grader, problem):
    _, tests, solution = problem
    head = f"def {tests[0].function}(first, *others):\n    "
    bodies = {
        "None": "pass",
        "its argument": "return first",
        "the answer to the first test": f"return {tests[0].expected!r}",
        "the answer to the last test": f"return {tests[-1].expected!r}",
    }
    programs = {name: head + body for name, body in bodies.items()}
    programs["its name alone"] = tests[0].function  # operator's `add` would pass: programs may use its names without an import
    programs["printing it"] = f"{renamed(solution)}\n\n{head}print(answer(first, *others))"
    passed = [name for name, program in programs.items() if grader.grade(program, tests).passed]
    assert not passed


def test_no_solution_of_a_training_problem_solves_a_held_out_one():
    """Otherwise a held-out problem would be a training problem under another name."""
    known = [function(solution) for solution in TRAIN]
    for (_, tests, solution), name in zip(problems("heldout"), NAMES[30:], strict=True):
        assert solves(function(solution), tests), name
        assert not [TRAIN[number] for number, other in enumerate(known) if solves(other, tests)], name


def renamed(solution: str) -> str:
    """Return the right program with its function renamed to `answer`."""
    return "def answer(" + solution.partition("(")[2]


def function(solution: str):
    """Return the function that a right program defines."""
    scope: dict = {}
    exec(renamed(solution), scope)
    return scope["answer"]


def solves(call, tests: list[CallTest]) -> bool:
    try:
        return all(value_matches(call(*test.arguments), test.expected) for test in tests)
    except (TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError):
        return False
