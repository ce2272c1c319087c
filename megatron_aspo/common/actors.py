"""Concurrent calls of Ray actors: their answers and failures, and the check that a cluster is open."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from megatron_aspo.common.errors import UserError

Explain = Callable[[Exception], Exception]
"""Ray's exception → the exception to raise, with the actor's name and message."""


def require_cluster() -> None:
    """Raise UserError if no cluster is open: Ray would start one at the first call, which listens on every interface."""
    if not ray.is_initialized():
        raise UserError("no Ray cluster is open; open one first, by megatron_aspo.runtime.cluster.open_cluster('', logical_cpus)")


@dataclass(frozen=True)
class Pending:
    """One pending call on each of several actors, whose answers the driver can collect later."""

    names: tuple[str, ...]
    """Names of the actors, all different."""
    refs: tuple[ray.ObjectRef, ...]
    explains: tuple[Explain, ...]

    def __add__(self, other: "Pending") -> "Pending":
        return Pending(self.names + other.names, self.refs + other.refs, self.explains + other.explains)

    def result(self, timeout_s: float | None = None) -> list[Any]:
        """Return the actors' answers, in order, once all have answered.

        Raises the first failure at once, without waiting for the others, or TimeoutError naming the actors that did not answer in time.
        """
        answers, failures = self.outcomes(timeout_s, 0.0)
        late = [name for name, failure in failures.items() if isinstance(failure, TimeoutError)]
        if failures and len(late) < len(failures):
            raise next(failure for failure in failures.values() if not isinstance(failure, TimeoutError))
        if late:
            raise TimeoutError(f"{', '.join(late)} did not answer within {timeout_s:g} s")
        return [answers[name] for name in self.names]

    def outcomes(self, timeout_s: float | None, grace_s: float) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Return (name → answer, name → failure), the failures in order of arrival.

        Waits until all have answered, at most `grace_s` after the first failure and `timeout_s` in total. An actor without an answer
        by then has failed with a TimeoutError.
        """
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        position_of = {ref: position for position, ref in enumerate(self.refs)}
        answers: dict[str, Any] = {}
        failures: dict[str, Exception] = {}
        waiting = list(self.refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not done:
                waited = time.monotonic() - started
                silent = [self.names[position_of[ref]] for ref in waiting]
                failures |= {name: TimeoutError(f"{name} did not answer in {waited:.1f} s") for name in silent}
                break
            position = position_of[done[0]]
            try:
                answers[self.names[position]] = ray.get(done[0])
            except (RayActorError, RayTaskError) as error:
                if not failures:
                    within = time.monotonic() + grace_s
                    deadline = within if deadline is None else min(deadline, within)
                failure = self.explains[position](error)
                failure.__cause__ = error
                failures[self.names[position]] = failure
        return answers, failures


@dataclass(frozen=True)
class ActorGroup:
    """Named Ray actors that are called together: one call is one Pending, whose failures name their actors."""

    actors: Sequence[tuple[str, Any]]
    """(name, actor handle); names are all different."""
    explain: Callable[[str, Exception], Exception]
    """(name, Ray's exception) → the exception to raise."""

    def __len__(self) -> int:
        return len(self.actors)

    def __getitem__(self, members: slice) -> "ActorGroup":
        """Return the group of these members."""
        return ActorGroup(self.actors[members], self.explain)

    def call(self, method: str, *arguments: Any) -> Pending:
        """Call the method with the same arguments on every actor."""
        return self.call_each(method, [arguments] * len(self.actors))

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> Pending:
        """Call the method on every actor with the arguments at its position."""
        refs = [getattr(actor, method).remote(*given) for (_, actor), given in zip(self.actors, arguments, strict=True)]
        names = tuple(name for name, _ in self.actors)
        return Pending(names, tuple(refs), tuple(partial(self.explain, name) for name in names))
