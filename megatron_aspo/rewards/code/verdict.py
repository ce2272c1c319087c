"""The verdict on a program."""

from dataclasses import dataclass

PASSED = "passed"
WRONG_ANSWER = "wrong answer"
RUNTIME_ERROR = "runtime error"
TIME_LIMIT = "time limit"
MEMORY_LIMIT = "memory limit"
OUTPUT_LIMIT = "output limit"
NO_CODE = "no code"
UNSUPPORTED = "unsupported test"


@dataclass(frozen=True)
class Verdict:
    kind: str
    """One of the constants above. All but `passed` and `unsupported test` are the program's failure; the latter is the test's."""
    reason: str
    """A short explanation for a reader: it may quote the program's output or error, never an expected value."""
    test: int | None
    """Position in the problem's list, from 0, of the test that decided; None if none ran or all passed."""
    seconds: float
    """Wall-clock time."""
    tests_run: int = 0

    @property
    def passed(self) -> bool:
        return self.kind == PASSED
