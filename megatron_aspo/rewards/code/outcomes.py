"""Reasons for which an execution in a sandbox counts as failed."""

import signal
from dataclasses import dataclass

from megatron_aspo.rewards.code import verdict as kinds
from megatron_aspo.rewards.sandbox.execution import Outcome


@dataclass(frozen=True)
class Failure:
    kind: str
    """One of the kinds of a `Verdict`."""
    reason: str
    lost: bool = False
    """Whether its sandbox ended, through the program or the machine, which a second try distinguishes."""


_LIMITS = {
    "cpu": Failure(kinds.TIME_LIMIT, "it took more CPU time than it may"),
    "wall": Failure(kinds.TIME_LIMIT, "it took more time than it may"),
    "memory": Failure(kinds.MEMORY_LIMIT, "it took more memory than it may"),
    "output": Failure(kinds.OUTPUT_LIMIT, "it wrote more output than it may"),
    "lost": Failure(kinds.RUNTIME_ERROR, "it ended its sandbox", lost=True),
}


def failure_of(outcome: Outcome) -> Failure | None:
    """Return the failure that an outcome means; None if the program ended by itself with status 0."""
    if outcome.ended in _LIMITS:
        return _LIMITS[outcome.ended]
    if outcome.status == 0:
        return None
    if outcome.status is not None and outcome.status < 0:
        return Failure(kinds.RUNTIME_ERROR, f"killed by {signal.Signals(-outcome.status).name}")
    last = (outcome.error.strip().splitlines() or [""])[-1][:200]
    kind = kinds.MEMORY_LIMIT if last.startswith("MemoryError") else kinds.RUNTIME_ERROR
    return Failure(kind, last or f"exit status {outcome.status}")
