"""A reward worker: a Ray actor with a child process in which the reward runs, so that it never runs in the driver."""

import ray

from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.process import RewardProcess
from megatron_aspo.rewards.result import RewardResult


class RewardWorker:
    """Scores responses, one at a time. Call `load` before `score`; `close` may be called at any time, and comes last."""

    def load(self, task: str, options: RewardOptions, working_directory: str) -> None:
        """Start the child process and load the task's reward in it. Raises UserError.

        The constructor does not do this, because Ray turns its exceptions into a dead actor and would bury the UserError in another error.
        """
        self._process = RewardProcess(task, options, working_directory)
        self._process.start()

    def score(self, prompt: Prompt, response: str) -> RewardResult:
        """Return the result of one response. Raises UserError if the reward raises an exception or returns no score."""
        (result,) = self._process.score([(prompt, response)])
        return result

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Return at once, whatever the reward is doing: a worker that does not answer is frozen."""

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Kill the child process, whatever it is doing."""
        if process := getattr(self, "_process", None):
            process.close()
