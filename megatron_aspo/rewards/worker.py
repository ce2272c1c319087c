"""Scoring on the cluster: a pool of Ray actors, each with a child process in which the reward runs. It never runs in the driver."""

import os
import time
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.exceptions import RayActorError, RayTaskError

from megatron_aspo.connection import require_cluster
from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.process import RewardProcess, reward_name
from megatron_aspo.rewards.result import RewardResult

_REPORT_S = 1.0
"""How often a worker sends the results that it has."""
_CLOSE_S = 5.0
"""How long a worker may take to kill its child process."""
_MAX_FAILURES_IN_A_ROW = 20
"""Timeouts and crashes with no score between them that end the run, or the responses of two groups if these are more: one bad prompt can
make every response to it hang. At the default limit and with one worker 20 take 20 minutes."""


class RewardWorker:
    """Scores responses; one Ray actor. Call `load` before `score`, and `close` last, at any time."""

    def load(self, task: str, options: DataOptions, working_directory: str) -> None:
        """Start the child process and load the task's reward in it. Raises UserError.

        Not in the constructor: Ray turns what that raises into a dead actor, and the UserError would be lost in the text of another error.
        """
        self._process = RewardProcess(task, options, working_directory)
        self._process.start()

    def score(self, batch: Sequence[tuple[Prompt, str]]) -> Iterator[list[RewardResult]]:
        """Yield the results in order, in parts: one each second, and one after each failure."""
        part, due = [], time.monotonic() + _REPORT_S
        for result in self._process.score(batch):
            part.append(result)
            if result.failure or time.monotonic() > due:
                yield part
                part, due = [], time.monotonic() + _REPORT_S
        yield part

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Kill the child process, whatever it is doing."""
        if process := getattr(self, "_process", None):
            process.close()


class RewardPool:
    """`workers` reward workers that share each batch evenly. Needs an initialised Ray. Use it as a context manager, or call `close`."""

    def __init__(self, task: str, options: DataOptions, workers: int = 1, group_size: int = 1):
        """Start the workers and load the reward in each. group_size: responses to a prompt. Raises UserError as `build_reward` does."""
        require_cluster()
        # No CPU is reserved: scoring runs in the gaps between generation and training, and must never wait for a place.
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        actor = ray.remote(num_cpus=0, runtime_env=environment, concurrency_groups={"control": 1})(RewardWorker)
        self._workers = [actor.remote() for _ in range(workers)]
        self._failures_in_a_row, self._most_in_a_row = 0, max(_MAX_FAILURES_IN_A_ROW, 2 * group_size)
        self.name = reward_name(task, options)
        """How messages name the reward."""
        try:
            self._get([worker.load.remote(task, options, os.getcwd()) for worker in self._workers])
        except BaseException:
            self.close()
            raise

    def score(
        self, batch: Sequence[tuple[Prompt, str]], on_failure: Callable[[int, RewardResult], None] = lambda position, result: None
    ) -> list[RewardResult]:
        """Return the results of (prompt, response) pairs, in their order; each worker scores one contiguous share of them.

        on_failure: called with position and result, as soon as it is known, for a response on which the reward timed out or crashed.
        Raises UserError if the reward raises an exception or returns no score, and after too many failures without a score between them.
        """
        results: list[RewardResult | None] = [None] * len(batch)
        # Fixed shares: which process scores a response does not depend on how long others took.
        bounds = [-(-len(batch) * i // len(self._workers)) for i in range(len(self._workers) + 1)]
        shares = zip(self._workers, bounds[:-1], bounds[1:], strict=True)
        positions = {worker.score.remote(batch[start:stop]): start for worker, start, stop in shares if stop > start}
        while positions:
            (stream,), _ = ray.wait(list(positions), num_returns=1)
            try:
                part = self._get(next(stream))
            except StopIteration:
                del positions[stream]
                continue
            for position, result in enumerate(part, positions[stream]):
                results[position] = result
                if result.failure:
                    on_failure(position, result)
                self._stop_if_broken(result)
            positions[stream] += len(part)
        return results

    def close(self) -> None:
        """End the workers and their child processes; the pool is of no use afterwards. Idempotent."""
        if ends := [worker.close.remote() for worker in self._workers]:
            ray.wait(ends, num_returns=len(ends), timeout=_CLOSE_S)
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stop_if_broken(self, result: RewardResult) -> None:
        self._failures_in_a_row = self._failures_in_a_row + 1 if result.failure else 0
        if self._failures_in_a_row == self._most_in_a_row:
            raise UserError(
                f"{self.name} failed on {self._most_in_a_row} responses in a row: on the last it {result.reason}; correct it, or raise "
                "data.reward_timeout_s"
            )

    def _get(self, pending: ray.ObjectRef | list[ray.ObjectRef]) -> list:
        try:
            return ray.get(pending)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise UserError(f"a worker process of {self.name} was killed, or its machine was lost; start the run again") from error
