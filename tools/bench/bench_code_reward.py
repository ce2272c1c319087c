"""Measure the code reward against the same tests run bare: .venv/bin/python tools/bench/bench_code_reward.py [--verdicts N]

Two workers grade N responses of 1 to 20 stdin tests each, as two reward workers of a run would. The bare run starts one process of the same
interpreter with the same flags for each test, two at a time, without limits and without comparing outputs. Prints one JSON object:

    {"code_over_subprocess": ratio of verdicts per second, "leaked_processes": …, "leaked_fds": …, "verdicts_per_s": …,
     "bare_verdicts_per_s": …, "grown_mib": memory that a worker gained, "tests_per_verdict": …, "verdicts": …}
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import psutil

from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import StdinTest, Test
from megatron_aspo.rewards.sandbox.interpreter import find_interpreter
from megatron_aspo.rewards.sandbox.launcher import PYTHON_FLAGS

WORKERS = 2
PROGRAMS = (
    "for _ in range(int(input())):\n    print(sum(map(int, input().split())))\n",
    "import sys\nread = sys.stdin.buffer.readline\nfor _ in range(int(read())):\n    a, b = map(int, read().split())\n    print(a + b)\n",
    "import sys\nfrom collections import deque\nlines = deque(sys.stdin)\nlines.popleft()\n"
    "for line in lines:\n    print(sum(map(int, line.split())))\n",
)
Problem = tuple[str, list[Test]]


def make_problems(count: int, seed: int) -> list[Problem]:
    """Return `count` problems, each (program, tests). All programs are correct, except that every fourth fails its last test."""
    chance, problems = random.Random(seed), []
    for number in range(count):
        tests: list[Test] = []
        for _ in range(chance.choice((1, 5, 10, 20))):
            pairs = [(chance.randrange(1000), chance.randrange(1000)) for _ in range(chance.choice((1, 10, 100)))]
            given = f"{len(pairs)}\n" + "".join(f"{a} {b}\n" for a, b in pairs)
            tests.append(StdinTest(given, "\n".join(str(a + b) for a, b in pairs)))
        if number % 4 == 3:
            tests[-1] = StdinTest(tests[-1].input, "wrong")
        problems.append((PROGRAMS[number % len(PROGRAMS)], tests))
    return problems


def grade_share(share: tuple[int, int]) -> dict[str, float]:
    """Grade `count` problems made from `seed` in this process; return the seconds, and the processes, descriptors and memory left over."""
    seed, count = share
    process = psutil.Process()
    problems = make_problems(200, seed)
    with Grader(CodeOptions()) as grader:
        for program, tests in problems[:20]:
            grader.grade(program, tests)
        memory, descriptors, started = process.memory_info().rss, process.num_fds(), time.monotonic()
        for number in range(count):
            program, tests = problems[number % len(problems)]
            verdict = grader.grade(program, tests)
            if verdict.passed is (number % len(problems) % 4 == 3):
                raise SystemExit(f"error: a wrong verdict on problem {number}: {verdict}")
        seconds = time.monotonic() - started
        grown, leaked = process.memory_info().rss - memory, process.num_fds() - descriptors
    return {"seconds": seconds, "grown_mib": grown / 2**20, "fds": leaked, "processes": len(process.children(recursive=True))}


def time_bare(problems: list[Problem]) -> float:
    """Return the seconds that the tests of the problems take as plain processes, two at a time."""
    executable = find_interpreter([]).executable
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        paths = {program: Path(folder, f"{number}.py") for number, program in enumerate(PROGRAMS)}
        for program, path in paths.items():
            path.write_text(program)

        def run(problem: Problem) -> None:
            program, tests = problem
            for test in tests:
                command = [executable, *PYTHON_FLAGS, str(paths[program])]
                subprocess.run(command, input=test.input.encode(), capture_output=True, env=environment, check=True)

        started = time.monotonic()
        with ThreadPoolExecutor(WORKERS) as executor:
            list(executor.map(run, problems))
        return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verdicts", type=int, default=20_000, help="how many responses are graded")
    parser.add_argument("--bare", type=int, default=400, help="how many are run bare")
    options = parser.parse_args()
    each = options.verdicts // WORKERS
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as executor:
        shares = list(executor.map(grade_share, [(worker, each) for worker in range(WORKERS)]))
    ours = each * WORKERS / max(share["seconds"] for share in shares)
    bare_problems = [problem for worker in range(WORKERS) for problem in make_problems(200, worker)][: options.bare]
    bare = len(bare_problems) / time_bare(bare_problems)
    result = {
        "code_over_subprocess": round(ours / bare, 3),
        "leaked_processes": sum(share["processes"] for share in shares),
        "leaked_fds": sum(share["fds"] for share in shares),
        "verdicts_per_s": round(ours, 2),
        "bare_verdicts_per_s": round(bare, 2),
        "grown_mib": round(max(share["grown_mib"] for share in shares), 1),
        "tests_per_verdict": round(sum(len(tests) for _, tests in bare_problems) / len(bare_problems), 2),
        "verdicts": each * WORKERS,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
