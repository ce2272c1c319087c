"""The reward of programming tasks: 1.0 if the program in the response passes all tests of its row, else 0.0."""

import weakref

from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.code.extract import extract_code
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.lcb_reference import ReferenceGrader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import read_tests
from megatron_aspo.rewards.code.verdict import Verdict
from megatron_aspo.rewards.result import RewardResult


class CodeReward:
    """A `Reward` that owns a grader: make one per process, and call it for one response at a time.

    `close` it; else its waiting sandboxes end with it, or with the process.
    """

    def __init__(self, options: CodeOptions):
        """Raises UserError as `Grader` does."""
        self._grader = ReferenceGrader(options) if options.lcb_reference else Grader(options)
        self._finalizer = weakref.finalize(self, self._grader.close)

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """Raises UserError for a ground truth that has no tests, and SandboxError if no sandbox starts."""
        tests = read_tests(prompt.ground_truth, prompt.text)
        code = extract_code(response)
        verdict = self._grader.grade(code, tests) if code is not None else Verdict(kinds.NO_CODE, "no complete code block", None, 0.0)
        details = {"verdict": verdict.kind, "test": verdict.test, "tests_run": verdict.tests_run, "seconds": round(verdict.seconds, 4)}
        return RewardResult(float(verdict.passed), verdict.reason, details)

    def close(self) -> None:
        """Kill the waiting sandboxes. Idempotent."""
        self._finalizer()
