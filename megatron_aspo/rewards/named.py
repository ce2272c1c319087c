"""Rewards by name, and a row's reward as the weighted sum of several."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.rewards.code import schemas
from megatron_aspo.rewards.code.reward import CodeReward
from megatron_aspo.rewards.math import reward as math
from megatron_aspo.rewards.math.reward import MathReward
from megatron_aspo.rewards.result import Reward, RewardResult
from megatron_aspo.rewards.service.client import RemoteReward
from megatron_aspo.rewards.shape import FormatReward, RepetitionReward
from megatron_aspo.rewards.user import load_reward

if TYPE_CHECKING:
    from megatron_aspo.rewards.options import RewardOptions

GroundTruthCheck = Callable[[Any, str], None]
"""(ground truth, prompt) → None; raises UserError for a row that cannot be graded."""
CHECKS: dict[str, GroundTruthCheck] = {"code": schemas.check_ground_truth, "math": math.check_ground_truth}


def build_rewards(options: "RewardOptions") -> Reward:
    """Return the reward that the options choose. Raises UserError if it cannot be loaded."""
    choice = RewardChoice(options)
    return build_named(choice.single, options) if choice.single else MixedReward(choice, options)


def build_named(name: str, options: "RewardOptions") -> Reward:
    """Return one reward. Raises UserError for options that do not fit it, and for missing prerequisites on this machine."""
    if name == "code":
        return CodeReward(options.code, options.reward_wrong_score)
    if name == "math":
        return MathReward(options.math, options.reward_wrong_score)
    if name == "format":
        return FormatReward(options.format_tags)
    if name == "repetition":
        return RepetitionReward(options.repetition_ngram)
    if name == "remote":
        return RemoteReward(options.service, options.reward_wrong_score)
    return load_reward(name)


class MixedReward:
    """A `Reward`: the weighted sum of a row's rewards. The unweighted scores are in the details, as `parts`."""

    def __init__(self, choice: RewardChoice, options: "RewardOptions"):
        self._choice = choice
        self._rewards = {name: build_named(name, options) for name in sorted(choice.names)}

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response. Raises UserError as its parts do."""
        weights = self._choice.parts(prompt.data_source)
        results = {name: self._rewards[name](prompt, response) for name in weights}
        details: dict[str, Any] = {}
        for result in results.values():
            details = result.details | details  # the first reward's value wins if two have the same key
        details["parts"] = {name: result.score for name, result in results.items()}
        score = sum(weight * results[name].score for name, weight in weights.items())
        return RewardResult(score, "; ".join(f"{name}: {result.reason}" for name, result in results.items()), details)
