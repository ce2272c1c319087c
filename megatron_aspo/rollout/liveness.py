"""Detection of engines that freeze while they generate."""

import time
from collections.abc import Mapping
from typing import Any

import ray

_QUESTIONS_PER_LIMIT = 4
"""Questions asked within the time in which an engine must answer one."""


class Liveness:
    """Periodically asks engines for their version, which their engine cores answer between two steps."""

    def __init__(self, limit_s: float):
        """limit_s: upper bound on the time for an answer."""
        self._limit_s = limit_s
        self._asked: dict[Any, tuple[ray.ObjectRef, float]] = {}
        """Actor → the last question to it, and its time."""

    def frozen(self, actors: Mapping[int, Any]) -> list[int]:
        """Return the keys of engines whose answer is overdue. A dead engine counts as having answered: its calls fail anyway."""
        now, found = time.monotonic(), []
        for key, actor in actors.items():
            question, since = self._asked.get(actor, (None, -self._limit_s))
            if now - since < self._limit_s / _QUESTIONS_PER_LIMIT:
                continue
            if question is None or ray.wait([question], timeout=0)[0]:
                self._asked[actor] = actor.version.remote(), now
            elif now - since > self._limit_s:
                found.append(key)
        return found
