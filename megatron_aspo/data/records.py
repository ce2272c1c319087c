"""The records that travel from a prompt to a training batch. Their arrays have variable length and are never padded."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One tokenized question, with the data that its reward needs."""

    id: str
    """Stable across runs and epochs, unique within a task."""
    token_ids: tuple[int, ...]
    """Token ids with the chat template applied, generation prompt included."""
    text: str
    """The user's message, for rollout dumps and rewards."""
    ground_truth: Any
    """The value that the reward compares with. In a `PromptStore`, it and `extra` are loaded lazily, only to score a response."""
    data_source: str
    """The data set it comes from; by default the task's name."""
    extra: dict[str, Any] = field(default_factory=dict)
    position: int = 0
    """Position in its data set."""


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, stop) were sampled by the weights of `version`."""

    version: int
    start: int
    stop: int


@dataclass(frozen=True)
class Generation:
    """An engine's answer to one request."""

    token_ids: np.ndarray
    """int32 [response length]; ends with the end-of-sequence token unless truncated."""
    logprobs: np.ndarray
    """float32 [response length]: log-softmax(logits / temperature) of each sampled token."""
    versions: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop` (the model ended) or `length` (truncated at the response limit)."""


@dataclass(frozen=True)
class Sample:
    """One scored response to one prompt."""

    prompt: Prompt
    index: int
    """Index in the group of G responses."""
    seed: int
    generation: Generation
    text: str
    """The response, decoded without special tokens."""
    reward: float
    shaped_reward: float
    """Reward with the length penalty, as training sees it."""
    reward_details: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    """`timeout` or `crash` if the reward gave no score; else empty."""


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
