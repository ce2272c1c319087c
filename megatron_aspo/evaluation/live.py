"""Evaluation during training, by the run's engines, with the results that `megatron-aspo eval` gives for a checkpoint of the same step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.evaluation.options import PART_PROBLEMS
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.sampling import Evaluator, Part, Responder, Sampling, parts_of

if TYPE_CHECKING:
    from megatron_aspo.rewards.pool import RewardPool

_MAX_NAMED = 3
"""Number of responses with a failed reward that are reported one by one; the rest are counted."""


def evaluate_live(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    responder: Responder,
    rewards: "RewardPool",
    deterministic: bool,
    phase: Callable[[str], None],
    log: Callable[[str], None],
) -> list[EvalResponse]:
    """Return the graded responses, problem by problem.

    log: prints a line, for responses on which the reward fails and for lost reward workers. Raises UserError if the reward fails on every
    response.
    """
    parts: dict[int, list[EvalResponse]] = {}

    def collect(part: Part) -> None:
        parts[part.number] = part.responses

    Evaluator(prompts, sampling, responder, rewards, collect, phase).run(parts_of(len(prompts), PART_PROBLEMS), deterministic)
    responses = [response for _, part in sorted(parts.items()) for response in part]
    for line in rewards.take_losses():
        log(line)
    report_failures(responses, rewards.name, log)
    return responses


def report_failures(responses: Sequence[EvalResponse], reward: str, log: Callable[[str], None]) -> None:
    """Report the first responses on which the reward failed, and count the rest. Raises UserError if it failed on all."""
    failed = [response for response in responses if response.failure]
    if failed and len(failed) == len(responses):
        raise UserError(
            f"{reward} failed on all of {len(responses)} responses: on the last it {failed[-1].reason}; correct it, or raise "
            "data.reward_timeout_s"
        )
    for response in failed[:_MAX_NAMED]:
        where = f"prompt {response.problem}, response {response.index}"
        log(f"{where}: {reward} {response.reason}; its reward is {response.score:g} (data.reward_failure_score)")
    if len(failed) > _MAX_NAMED:
        log(f"{reward} failed on {len(failed)} of {len(responses)} responses; their reward is {failed[0].score:g}")
