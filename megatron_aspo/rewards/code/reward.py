"""The reward of programming tasks: 1.0 if the program in the response passes all tests of its row, else `wrong_score`."""

import weakref

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.code.extract import BLOCKS
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.lcb_reference import ReferenceGrader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import Test, read_tests
from megatron_aspo.rewards.code.verdict import Verdict
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rewards.sandbox.sandbox import SandboxError


class CodeReward:
    """A `Reward` that owns a grader: create one per process, and call it for one response at a time.

    `close` it; otherwise its waiting sandboxes end when it is garbage-collected, or with the process.
    """

    def __init__(self, options: CodeOptions, wrong_score: float = 0.0):
        """Raises UserError as `Grader` does."""
        self._wrong_score = wrong_score
        self._grader = ReferenceGrader(options) if options.lcb_reference else Grader(options)
        self._extract = BLOCKS[options.block]
        self._finalizer = weakref.finalize(self, self._grader.close)

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response. Raises UserError, naming the prompt, for a ground truth without runnable tests, and if no sandbox starts."""
        what = f"data.reward=code on prompt {prompt.id}"
        try:
            tests = read_tests(prompt.ground_truth, prompt.text)
            verdict = self._grade(response, tests)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        except SandboxError as error:
            raise UserError(
                f"{what}: no code sandbox starts ({error}); free memory or processes, or lower data.reward_workers or data.code.limits"
            ) from error
        if verdict.kind == kinds.UNSUPPORTED:  # not the response's fault, which must not be punished
            raise UserError(f"{what}: test {verdict.test or 0} cannot run here: {verdict.reason}; remove the row, or correct its test")
        details = {"verdict": verdict.kind, "test": verdict.test, "tests_run": verdict.tests_run, "seconds": round(verdict.seconds, 4)}
        return RewardResult(1.0 if verdict.passed else self._wrong_score, verdict.reason, details)

    def _grade(self, response: str, tests: list[Test]) -> Verdict:
        code = self._extract(response)
        return Verdict(kinds.NO_CODE, "no complete code block", None, 0.0) if code is None else self._grader.grade(code, tests)

    def close(self) -> None:
        """Kill the waiting sandboxes. Idempotent."""
        self._finalizer()
