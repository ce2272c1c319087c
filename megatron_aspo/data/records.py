"""The records that travel from a prompt to a training batch. Variable length, never padded."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One question, tokenized, with what its reward needs."""

    id: str
    """Stable across runs and epochs, unique within a task."""
    token_ids: tuple[int, ...]
    """The chat template already applied, generation prompt included."""
    text: str
    """The user's words, for rollout dumps and rewards."""
    ground_truth: Any
    """The value that the reward compares with. If the prompt is in a `PromptStore`, it and `extra` are read only to score a response."""
    data_source: str
    """The data set that it comes from; by default the task's name."""
    extra: dict[str, Any] = field(default_factory=dict)
    place: int = 0
    """Where it stands in its data set."""


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, stop) were sampled by the weights of `version`."""

    version: int
    start: int
    stop: int


@dataclass(frozen=True)
class Generation:
    """What an engine returns for one request."""

    token_ids: np.ndarray
    """int32 [response length]; ends with the end-of-sequence token unless cut off."""
    logprobs: np.ndarray
    """float32 [response length]: log-softmax(logits / temperature) of each sampled token."""
    versions: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop` (the model ended) or `length` (cut off at the response limit)."""


@dataclass(frozen=True)
class Sample:
    """One scored response to one prompt."""

    prompt: Prompt
    index: int
    """Which of the group's G responses this is."""
    seed: int
    generation: Generation
    text: str
    """The response, decoded without special tokens."""
    reward: float
    shaped_reward: float
    """With the length penalty: what training sees."""
    reward_details: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    """`timeout` or `crash` where the reward gave no score; else empty."""


@dataclass(frozen=True)
class Group:
    """The G responses to one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> np.ndarray:
        """float64 [G]."""
        return np.array([sample.reward for sample in self.samples], dtype=np.float64)

    @property
    def shaped_rewards(self) -> np.ndarray:
        """float64 [G]."""
        return np.array([sample.shaped_reward for sample in self.samples], dtype=np.float64)
