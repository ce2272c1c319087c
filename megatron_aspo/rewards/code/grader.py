"""Grader of programs: it runs each test of a problem in a sandbox and compares the results outside."""

import json
import time
from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.code.asserts import run_asserts
from megatron_aspo.rewards.code.compare import outputs_match, value_matches
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.outcomes import Failure, failure_of
from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest, Test, choose_tests
from megatron_aspo.rewards.code.verdict import Verdict
from megatron_aspo.rewards.sandbox.inside.plain import to_json
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.sandbox.sandbox import Sandbox

_RESULT_BYTES = 4 << 20
"""Larger results of calls, by the size of their JSON, are not parsed: parsing takes up to 20 times as much memory."""


@dataclass
class _Run:
    """Progress of a program through its tests."""

    failure: Failure | None = None
    position: int | None = None
    tests_run: int = 0


class Grader:
    """Grades programs in a pool of sandboxes. For one thread; `close` it, or use it as a context manager."""

    def __init__(self, options: CodeOptions):
        """Raises UserError for invalid options, and for what this machine lacks."""
        options.check()
        self._options = options
        self._pool = SandboxPool(options.sandbox, options.limits)

    def grade(self, program: str, tests: list[Test]) -> Verdict:
        """Run the tests in order up to the first failure, each in a separate process. Raises SandboxError if no sandbox starts."""
        started = time.monotonic()
        if len(program.encode("utf-8", "surrogatepass")) > self._options.max_program_kb << 10:
            return Verdict(kinds.RUNTIME_ERROR, f"a program of more than {self._options.max_program_kb} KiB", None, 0.0)
        run = self._run_tests(program, tests, started + self._options.total_s)
        if run.failure and run.failure.lost:
            run = self._run_tests(program, tests, started + self._options.total_s)
        seconds = time.monotonic() - started
        if run.failure:
            return Verdict(run.failure.kind, run.failure.reason, run.position, seconds, run.tests_run)
        return Verdict(kinds.PASSED, f"{run.tests_run} tests passed", None, seconds, run.tests_run)

    def _run_tests(self, program: str, tests: list[Test], deadline: float) -> "_Run":
        """Run the chosen tests in one sandbox until one fails or the deadline (monotonic clock) has passed."""
        run = _Run()
        sandbox = self._pool.take()
        try:
            sandbox.load({"program": program})
            for run.position in choose_tests(len(tests), self._options.max_tests):
                wall_s = min(self._options.limits.wall_s, deadline - time.monotonic())
                if wall_s <= 0:
                    run.failure = Failure(kinds.TIME_LIMIT, f"all tests together took more than {self._options.total_s:g} s")
                    break
                run.failure = self._run(tests[run.position], sandbox, wall_s)
                run.tests_run += 1
                if run.failure:
                    break
        finally:
            sandbox.kill()
        return run

    def _run(self, test: Test, sandbox: Sandbox, wall_s: float) -> Failure | None:
        """Run one test. Return why it failed, or None if it passed."""
        if isinstance(test, StdinTest):
            return _run_stdin(test, sandbox, wall_s)
        if isinstance(test, CallTest):
            return _run_call(test, sandbox, wall_s)
        assert isinstance(test, AssertTest)
        return run_asserts(test, sandbox, self._pool, wall_s)

    def close(self) -> None:
        """Kill the waiting sandboxes. Idempotent."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _run_stdin(test: StdinTest, sandbox: Sandbox, wall_s: float) -> Failure | None:
    outcome = sandbox.run("stdin", test.input.encode("utf-8", "surrogatepass"), wall_s)
    if failure := failure_of(outcome):
        return failure
    if outputs_match(outcome.output.decode("utf-8", "replace"), test.output):
        return None
    return Failure(kinds.WRONG_ANSWER, "standard output differs")


def _run_call(test: CallTest, sandbox: Sandbox, wall_s: float) -> Failure | None:
    try:
        arguments = [to_json(value) for value in test.arguments]
    except RecursionError as error:
        raise UserError(f"ground_truth has arguments of {test.function} that are nested too deeply; correct the row") from error
    request = {"target": None, "attribute": test.function, "call": True, "args": arguments, "kwargs": {}}
    outcome = sandbox.run("calls", json.dumps(request).encode() + b"\n", wall_s)
    if failure := failure_of(outcome):
        return failure
    not_plain = Failure(kinds.WRONG_ANSWER, "the result is not plain data")
    if len(outcome.output) > _RESULT_BYTES:
        return not_plain
    try:
        reply = json.loads(outcome.output)
        if "raised" in reply:
            return Failure(kinds.RUNTIME_ERROR, f"{reply['raised'][0]}: {reply['text']}"[:200])
        matches = "value" in reply and value_matches(reply["value"], test.expected)
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return not_plain
    return None if matches else Failure(kinds.WRONG_ANSWER, f"{test.function} returned another value")
