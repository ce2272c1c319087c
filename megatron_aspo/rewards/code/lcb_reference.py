"""The grader of a user's LiveCodeBench checkout, run inside the sandbox, for comparison with published numbers.

There program, expected outputs and verdict share one process, by its authors' design: a program may print what it finds in its callers.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.outcomes import failure_of
from megatron_aspo.rewards.code.schemas import CallTest, StdinTest, Test
from megatron_aspo.rewards.code.verdict import Verdict
from megatron_aspo.rewards.sandbox.pool import SandboxPool

PACKAGES = ("lcb_runner", "livecodebench")
"""Names of the package: in the authors' repository, and on PyPI (nvidia-livecodebench)."""
_DRIVER = """
import importlib.util, json, os, sys
# Loaded by its path, because the packages around it import modules that a sandbox does not have.
spec = importlib.util.spec_from_file_location("testing_util", {path!r})
sys.modules["testing_util"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
request, out, write = json.loads(sys.stdin.readline()), os.dup(1), os.write
result = module.run_test(request["sample"], test=request["program"], debug=False, timeout={timeout})
results = result[0] if isinstance(result, tuple) else result
write(out, b"\\n" + json.dumps([bool(x == 1) for x in results]).encode())
os._exit(0)
"""


class ReferenceGrader:
    """Grades like `Grader`, by the verdicts of the checkout."""

    def __init__(self, options: CodeOptions):
        """Raises UserError if there is no grader at `options.lcb_reference`, and as `Grader` does."""
        options.check()
        path = Path(options.lcb_reference).absolute()
        files = [path / name / "evaluation" / "testing_util.py" for name in PACKAGES]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise UserError(f"lcb_reference={path} has no lcb_runner/evaluation/testing_util.py; name a LiveCodeBench checkout")
        self._total_s = options.total_s
        self._driver = _DRIVER.format(path=str(file), timeout=max(1, round(options.limits.cpu_s)))
        sandbox = replace(
            options.sandbox,
            modules=sorted({*options.sandbox.modules, "numpy"}),
            paths=[*options.sandbox.paths, str(file)],
        )
        # One process runs all tests.
        self._pool = SandboxPool(sandbox, replace(options.limits, cpu_s=options.total_s, wall_s=options.total_s))

    def grade(self, program: str, tests: list[Test]) -> Verdict:
        """Return the checkout's verdict. Raises SandboxError if no sandbox starts."""
        sample = _sample(tests)
        if sample is None:
            return Verdict(kinds.UNSUPPORTED, "LiveCodeBench's grader has no tests with assertions", None, 0.0)
        started = time.monotonic()
        sandbox = self._pool.take()
        try:
            sandbox.load({"program": self._driver})
            request = json.dumps({"sample": {"input_output": json.dumps(sample)}, "program": program})
            outcome = sandbox.run("stdin", request.encode() + b"\n", self._total_s)
        finally:
            sandbox.kill()
        seconds = time.monotonic() - started
        if failure := failure_of(outcome):
            return Verdict(failure.kind, failure.reason, None, seconds)
        try:
            results = json.loads(outcome.output.rpartition(b"\n")[2])
        except ValueError:
            return Verdict(kinds.RUNTIME_ERROR, "the reference gave no verdict", None, seconds)
        if results and all(results):
            return Verdict(kinds.PASSED, "passed by the reference", None, seconds, len(results))
        return Verdict(kinds.WRONG_ANSWER, "failed by the reference", len(results) - 1 if results else None, seconds, len(results))

    def close(self) -> None:
        """Kill the waiting sandboxes. Idempotent."""
        self._pool.close()

    def __enter__(self) -> "ReferenceGrader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _sample(tests: list[Test]) -> dict[str, Any] | None:
    """Return the tests in the checkout's format; None if they are of another kind."""
    programs = [test for test in tests if isinstance(test, StdinTest)]
    if len(programs) == len(tests):
        return {"inputs": [test.input for test in programs], "outputs": [test.output for test in programs]}
    calls = [test for test in tests if isinstance(test, CallTest)]
    if len(calls) == len(tests) and all(test.function == calls[0].function for test in calls):
        inputs = ["\n".join(map(json.dumps, test.arguments)) for test in calls]
        return {"inputs": inputs, "outputs": [json.dumps(test.expected) for test in calls], "fn_name": calls[0].function}
    return None
