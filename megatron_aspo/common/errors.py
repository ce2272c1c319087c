"""The exceptions whose message is all that the user needs, and parts of error messages."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can cure: configuration, data, model or environment.

    The message is one line that names the thing, what was expected, and the cure. The command line prints it without a traceback and exits
    with status 2.
    """


class ProcessError(RuntimeError):
    """A process of the run died or failed. The message names it, with what it said.

    The command line prints it without the driver's own traceback, which would hide it, and exits with status 1: another try may succeed.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(wrong: str, valid: Iterable[str], prefix: str = "") -> str:
    """Return the hint for a mistyped name: the closest valid one, or all of them."""
    close = difflib.get_close_matches(wrong, list(valid), cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else f"valid: {', '.join(prefix + name for name in sorted(valid))}"


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
