"""Runner of test code: the tests run in one sandbox, the program in another, and calls and results are relayed between them.

The tests hold the expected values, so the program must never share a process with them; the messages are plain data (see
`sandbox/inside/asserts.py`). This module does not parse what the program sends.
"""

import json

from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.code.outcomes import Failure, failure_of
from megatron_aspo.rewards.code.schemas import AssertTest
from megatron_aspo.rewards.sandbox.execution import Execution, run_all
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.sandbox.sandbox import Sandbox

_KINDS = {"failed": kinds.WRONG_ANSWER, "error": kinds.RUNTIME_ERROR, "unsupported": kinds.UNSUPPORTED}


def run_asserts(test: AssertTest, program: Sandbox, pool: SandboxPool, wall_s: float) -> Failure | None:
    """Return why the test code failed or did not run to its end; None if it passed. Only its own process can report that it passed."""
    testing = pool.take()
    try:
        testing.load({"tests": test.source, "prompt": test.prompt, "entry_point": test.entry_point})
        called, tests = program.begin("calls"), testing.begin("asserts")
        relay = Relay(tests, called)
        outcome = run_all([called, tests], tests, wall_s, relay)
    finally:
        testing.kill()
    if relay.verdict is not None:
        verdict = json.loads(relay.verdict)
        return None if verdict["verdict"] == "passed" else Failure(_KINDS[verdict["verdict"]], verdict["text"][:200])
    return relay.program_failure or failure_of(outcome) or Failure(kinds.RUNTIME_ERROR, "the tests ended without a verdict")


class Relay:
    """Relays whole lines between the two processes. A verdict is the last line of the tests."""

    def __init__(self, tests: Execution, called: Execution):
        self._tests, self._called = tests, called
        self.verdict: bytes | None = None
        self.program_failure: Failure | None = None
        self._unanswered = 0

    def __call__(self) -> bool:
        """Relay the available lines; return whether there is a verdict, or the program's process has ended."""
        for line in _take_lines(self._tests.output):
            if line.startswith(b'{"verdict"'):
                self.verdict = line
                return True
            self._called.send(line)
            self._unanswered += 1
        for line in _take_lines(self._called.output):
            self._unanswered -= 1
            if self._unanswered < 0:
                self.program_failure = Failure(kinds.RUNTIME_ERROR, "it wrote to the pipe of its results itself")
                return True
            self._tests.send(line)
        if self._called.ended:
            ended = Failure(kinds.RUNTIME_ERROR, "it ended its process while it was tested")
            self.program_failure = failure_of(self._called.outcome()) or ended
            return True
        return False


def _take_lines(buffer: bytearray) -> list[bytes]:
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).split(b"\n")[:-1]
    del buffer[:end]
    return [line + b"\n" for line in lines]
