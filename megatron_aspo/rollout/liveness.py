"""Detection of engines that freeze while they generate."""

import time
from collections.abc import Mapping
from typing import Any

import ray

_ASKED_OFTEN = 4
"""Questions in the time that an engine has to answer one."""


class Liveness:
    """Asks engines now and then for their version, which their engine cores answer between two steps."""

    def __init__(self, limit_s: float):
        """limit_s: how long an answer may take."""
        self._limit_s = limit_s
        self._asked: dict[Any, tuple[ray.ObjectRef, float]] = {}
        """Actor → the last question to it, and when it was asked."""

    def frozen(self, actors: Mapping[int, Any]) -> list[int]:
        """Return the keys of those that have owed an answer for longer than the limit; a dead one has answered, it fails by itself."""
        now, found = time.monotonic(), []
        for key, actor in actors.items():
            question, since = self._asked.get(actor, (None, -self._limit_s))
            if now - since < self._limit_s / _ASKED_OFTEN:
                continue
            if question is None or ray.wait([question], timeout=0)[0]:
                self._asked[actor] = actor.version.remote(), now
            elif now - since > self._limit_s:
                found.append(key)
        return found
