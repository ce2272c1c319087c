"""Scoring in processes of its own, so that a user's reward code never runs in the driver."""

import os
import sys
from collections.abc import Sequence

import ray
from ray.exceptions import RayActorError, RayTaskError

from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.records import Prompt
from megatron_aspo.data.tasks import build_reward
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.result import RewardResult


class RewardWorker:
    """Scores responses; one Ray actor. Call `load` before `score`."""

    def load(self, task: str, options: DataOptions, working_directory: str) -> None:
        """Builds the task's reward in this process; modules of the driver's working directory are found as in the driver.

        Not in the constructor: Ray turns what that raises into a dead actor, and the UserError would be lost in the text of another error.
        """
        if working_directory not in sys.path:
            sys.path.append(working_directory)
        self._reward = build_reward(task, options)

    def score(self, batch: Sequence[tuple[Prompt, str]]) -> list[RewardResult]:
        return [self._reward(prompt, response) for prompt, response in batch]


class RewardPool:
    """`workers` reward workers that share each batch evenly. Needs an initialised Ray. Use it as a context manager, or call `close`."""

    def __init__(self, task: str, options: DataOptions, workers: int = 1):
        """Starts the workers and loads the reward in each. Raises UserError as `build_reward` does."""
        # No CPU is reserved: scoring runs in the gaps between generation and training, and must never wait for a place.
        actor = ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(RewardWorker)
        self._workers = [actor.remote() for _ in range(workers)]
        self._what = f"data.reward={options.reward}" if options.reward else f"the reward of task={task}"
        try:
            self._get([worker.load.remote(task, options, os.getcwd()) for worker in self._workers])
        except BaseException:
            self.close()
            raise

    def score(self, batch: Sequence[tuple[Prompt, str]]) -> list[RewardResult]:
        """The results of (prompt, response) pairs, in their order. Raises UserError if the user's reward fails or ends its process."""
        share, rest = divmod(len(batch), len(self._workers))
        pending, start = [], 0
        for number, worker in enumerate(self._workers):
            stop = start + share + (number < rest)
            if stop > start:
                pending.append(worker.score.remote(batch[start:stop]))
            start = stop
        return [result for part in self._get(pending) for result in part]

    def close(self) -> None:
        """Ends the workers; the pool is of no use afterwards."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _get(self, pending: list[ray.ObjectRef]) -> list:
        try:
            return ray.get(pending)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise UserError(f"{self._what} ended its worker process; a reward must not exit or crash: correct the function") from error
