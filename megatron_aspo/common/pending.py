"""Calls under way on several actors at once, and who of them failed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

Explain = Callable[[Exception], Exception]
"""What Ray raised → what to raise of it, with the actor's name and its own words."""


@dataclass(frozen=True)
class Pending:
    """One call each on some actors, so that the driver can do something else meanwhile."""

    names: tuple[str, ...]
    """Of the actors; every one another."""
    refs: tuple[ray.ObjectRef, ...]
    explains: tuple[Explain, ...]

    def __add__(self, other: "Pending") -> "Pending":
        return Pending(self.names + other.names, self.refs + other.refs, self.explains + other.explains)

    def result(self, timeout_s: float | None = None) -> list[Any]:
        """Each actor's answer, in their order, as soon as all have answered.

        Raises the first failure at once, without waiting for the others, and TimeoutError naming those that did not answer in time.
        """
        answers, failures = self.outcomes(timeout_s, 0.0)
        late = [name for name, failure in failures.items() if isinstance(failure, TimeoutError)]
        if failures and len(late) < len(failures):
            raise next(failure for failure in failures.values() if not isinstance(failure, TimeoutError))
        if late:
            raise TimeoutError(f"{', '.join(late)} did not answer within {timeout_s:g} s")
        return [answers[name] for name in self.names]

    def outcomes(self, timeout_s: float | None, grace_s: float) -> tuple[dict[str, Any], dict[str, Exception]]:
        """(name → answer, name → failure), the failures in the order in which they came.

        Waits until all have answered; after the first failure `grace_s` more, and never longer than `timeout_s`. Who has not answered by
        then has failed with a TimeoutError.
        """
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        place = {ref: number for number, ref in enumerate(self.refs)}
        answers: dict[str, Any] = {}
        failures: dict[str, Exception] = {}
        waiting = list(self.refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not done:
                waited = time.monotonic() - started
                failures |= {
                    self.names[place[ref]]: TimeoutError(f"{self.names[place[ref]]} did not answer in {waited:.1f} s") for ref in waiting
                }
                break
            number = place[done[0]]
            try:
                answers[self.names[number]] = ray.get(done[0])
            except (RayActorError, RayTaskError) as error:
                if not failures:
                    within = time.monotonic() + grace_s
                    deadline = within if deadline is None else min(deadline, within)
                failure = self.explains[number](error)
                failure.__cause__ = error
                failures[self.names[number]] = failure
        return answers, failures
