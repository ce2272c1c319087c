"""Scoring on the cluster: each response goes to the next free reward worker."""

import contextlib
import queue
import threading
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import ray

from megatron_aspo.common.actors import require_cluster
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.process import reward_name
from megatron_aspo.rewards.remote import RemoteWorker
from megatron_aspo.rewards.result import RewardResult

_MAX_FAILURES_IN_A_ROW = 20
"""Consecutive timeouts and crashes without a score between them that end the run, or the responses of two groups if these are more, since
one bad prompt can make every response to it hang. At the default limit and with one worker, 20 take 20 minutes."""
_JOIN_S = 5.0
"""Seconds for a thread to notice that its worker has ended."""


@dataclass(frozen=True, eq=False)
class _Job:
    prompt: Prompt
    response: str
    result: "Future[RewardResult]" = field(default_factory=Future)


class RewardPool:
    """`workers` reward workers, each fed one response at a time by a thread of the driver.

    Needs an initialised Ray. Call `ready` first and `close` last, or use it as a context manager, which calls both.
    """

    def __init__(self, task: str, options: RewardOptions, workers: int = 1, group_size: int = 1):
        """Start the workers, which load the reward in the background. group_size: responses to a prompt.

        Raises UserError if the cluster has too little of the resource `data.reward_resource`.
        """
        require_cluster()
        _check_resource(options.reward_resource, workers)
        self.name = reward_name(task, options)
        """Name of the reward in errors."""
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unfinished: set[_Job] = set()
        self._error: Exception | None = None
        self._failures_in_a_row, self._most_in_a_row = 0, max(_MAX_FAILURES_IN_A_ROW, 2 * group_size)
        self._losses: list[str] = []
        self._threads: list[threading.Thread] = []
        self._workers = [RemoteWorker(task, options, self._note_loss) for _ in range(workers)]

    def ready(self) -> None:
        """Wait until every worker has loaded the reward. Raises UserError as `build_reward` does, and if a worker does not start."""
        for worker in self._workers:
            worker.ready()
        self._threads = [threading.Thread(target=self._feed, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: Prompt, response: str) -> "Future[RewardResult]":
        """Queue a response for scoring and return its future. Scoring starts in the order of submission; until then it can be cancelled.

        All futures, and every later call, raise UserError as soon as the reward raises an exception or returns no score for any response,
        and after too many consecutive failures.
        """
        job = _Job(prompt, response)
        with self._lock:
            if self._error:
                raise self._error
            self._unfinished.add(job)
        self._waiting.put(job)
        return job.result

    def take_losses(self) -> list[str]:
        """Return one line for each worker that was lost and replaced since the last call."""
        with self._lock:
            losses, self._losses = self._losses, []
        return losses

    def close(self) -> None:
        """End the workers and their child processes; the pool cannot be used afterwards. Idempotent."""
        self._stop(UserError(f"{self.name} was stopped"))
        for worker in self._workers:
            worker.close()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)

    def __enter__(self) -> "RewardPool":
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _feed(self, worker: RemoteWorker) -> None:
        """Score responses on this worker, one after the other, until the pool is closed or the reward fails."""
        while job := self._waiting.get():
            with self._lock:
                if self._error:
                    return
                if not job.result.set_running_or_notify_cancel():
                    self._unfinished.discard(job)
                    continue
            try:
                self._finish(job, worker.score(job.prompt, job.response))
            except Exception as error:
                self._stop(error)
                return

    def _finish(self, job: _Job, result: RewardResult) -> None:
        """Set the job's result. Raises UserError after too many consecutive failures."""
        with self._lock:
            if self._error:
                return
            self._failures_in_a_row = self._failures_in_a_row + 1 if result.failure else 0
            if self._failures_in_a_row == self._most_in_a_row:
                raise UserError(
                    f"{self.name} failed on {self._most_in_a_row} responses in a row: on the last it {result.reason}; correct it, or raise "
                    "data.reward_timeout_s"
                )
            self._unfinished.discard(job)
            job.result.set_result(result)

    def _stop(self, error: Exception) -> None:
        """Set the error as the outcome of every unfinished response. The first error counts."""
        with self._lock:
            if self._error is None:
                self._error = error
            unfinished, self._unfinished = self._unfinished, set()
            for job in unfinished:
                with contextlib.suppress(InvalidStateError):  # cancelled
                    job.result.set_exception(self._error)

    def _note_loss(self, line: str) -> None:
        with self._lock:
            self._losses.append(line)


def _check_resource(name: str, workers: int) -> None:
    """Refuse a demand that Ray could never satisfy, for which it would wait forever."""
    available = ray.cluster_resources().get(name, 0)
    if name and available < workers:
        raise UserError(
            f"data.reward_workers={workers} take 1 each of data.reward_resource={name}, of which the Ray cluster has {available:g}; "
            f"""start its nodes with more (ray start --resources='{{"{name}": N}}'), or lower data.reward_workers"""
        )
