"""The driver's view of one reward worker, which is replaced when it is lost: when its process dies or freezes.

A process dies when it is killed, when its machine runs out of memory, or with its node. It is frozen when it does not answer a ping.
Faults of the reward itself affect only the worker's child process (`process.py`).
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.data.store import with_packed_answer
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.process import LOAD_TIMEOUT_S, longest_score_s, reward_name
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rewards.worker import RewardWorker

_START_S = 60.0 + LOAD_TIMEOUT_S
"""Longest time for Ray to start a worker's process and for the worker to load the reward."""
_PING_S = 10.0
"""A worker that does not answer a ping in this time is frozen. An answer takes milliseconds; the margin is for a machine that swaps."""
_CLOSE_S = 5.0
"""Seconds for a worker to kill its child process."""


class RemoteWorker:
    """One reward worker and its replacements. Call `ready` first and `close` last; `close` is thread-safe."""

    def __init__(self, task: str, options: RewardOptions, on_loss: Callable[[str], None]):
        """Start the worker. on_loss: called with one line when a worker is lost."""
        self._task, self._options, self._on_loss = task, options, on_loss
        self._name = reward_name(task, options)
        self._lock = threading.Lock()
        self._closed = False
        self._actor: Any = None
        self._start()

    def ready(self) -> None:
        """Wait until the worker has loaded the reward. Raises UserError as `build_reward` does, and if the worker does not start."""
        try:
            self._wait_until_loaded()
        except _LostError as error:
            raise UserError(f"a worker process of {self._name} {error.reason}; start the run again") from error

    def score(self, prompt: Prompt, response: str) -> RewardResult:
        """Return the result of one response; if the worker is lost, score the response again on a new worker.

        If that is lost too, the result is a failure. Raises UserError if the reward raises an exception or returns no score.
        """
        reasons = []
        for _ in range(2):
            try:
                if self._actor is None:
                    self._start()
                    self._wait_until_loaded()
                return self._answer(prompt, response)
            except _LostError as error:
                self._discard()
                self._on_loss(f"a reward worker {error.reason} on a response to prompt {prompt.id}; a new one takes its place")
                reasons.append(error.reason)
                failure = error.failure
        reason = f"lost two workers: one {reasons[0]} and one {reasons[1]}"
        return RewardResult(self._options.reward_failure_score, reason, {"failed": True}, failure)

    def close(self) -> None:
        """End the worker and its child process; a concurrent call of `score` raises UserError. Idempotent."""
        with self._lock:
            self._closed = True
            actor = self._actor
        if actor is not None:
            ray.wait([actor.close.remote()], timeout=_CLOSE_S)
            ray.kill(actor)

    def _start(self) -> None:
        # No CPU is reserved, because scoring runs beside generation and must never wait for one.
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": environment, "concurrency_groups": {"control": 1}}
        if self._options.reward_resource:
            options["resources"] = {self._options.reward_resource: 1}
        with self._lock:
            if self._closed:
                raise UserError(f"{self._name} was stopped")
            self._actor = ray.remote(**options)(RewardWorker).remote()
            self._loaded = self._actor.load.remote(self._task, self._options, os.getcwd())

    def _wait_until_loaded(self) -> None:
        if not ray.wait([self._loaded], timeout=_START_S)[0]:
            raise _LostError(f"did not start in {_START_S:g} s", "timeout")
        _get(self._loaded)

    def _answer(self, prompt: Prompt, response: str) -> RewardResult:
        """Return the worker's result. Raises _LostError if it dies, freezes, or exceeds the upper bound of its child process."""
        result = self._actor.score.remote(with_packed_answer(prompt), response)
        deadline = time.monotonic() + longest_score_s(self._options)
        while not ray.wait([result], timeout=self._options.reward_timeout_s)[0]:
            if not ray.wait([self._actor.ping.remote()], timeout=_PING_S)[0]:
                raise _LostError(f"froze (no answer in {self._options.reward_timeout_s + _PING_S:g} s)", "timeout")
            if time.monotonic() > deadline:
                raise _LostError(f"gave no result in {longest_score_s(self._options):g} s", "timeout")
        return _get(result)

    def _discard(self) -> None:
        with self._lock:
            actor, self._actor = self._actor, None
        ray.kill(actor)  # works for a frozen process too: its node kills it after a few seconds


class _LostError(Exception):
    """The worker's process is no longer usable."""

    def __init__(self, reason: str, failure: str):
        """reason: what happened to it, as a verb phrase; failure: that of RewardResult."""
        super().__init__(reason)
        self.reason, self.failure = reason, failure


def _get(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayError as error:
        raise _LostError("died (killed, out of memory, or its node was lost)", "crash") from error
