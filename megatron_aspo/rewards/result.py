"""The result of scoring one response."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_aspo.data.records import Prompt


@dataclass(frozen=True)
class RewardResult:
    score: float
    """A finite number."""
    reason: str
    """A few words for the reader of a rollout dump."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further JSON values for the rollout dump."""
    failure: str = ""
    """`timeout`, `crash` or `error` if the reward gave no score and `score` is `data.reward_failure_score`; else empty."""


Reward = Callable[[Prompt, str], RewardResult]
"""(prompt, response) → result; the response is decoded without special tokens."""
