"""Held-out accuracy with its standard error, and the answers that it stands on."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aspo.checkpoint.atomic import disk_errors, write_text
from megatron_aspo.data.records import Group


@dataclass(frozen=True)
class Accuracy:
    mean: float
    """Mean reward over all draws of all prompts."""
    standard_error: float
    """Over prompts: draws of one prompt are not independent questions."""
    prompts: int
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Answer:
    """One draw."""

    question: str
    text: str
    reward: float


@dataclass(frozen=True)
class Evaluation:
    accuracy: Accuracy
    answers: tuple[Answer, ...]
    """Prompt by prompt, draw by draw."""

    def same_questions(self, other: "Evaluation") -> bool:
        return [answer.question for answer in self.answers] == [answer.question for answer in other.answers]

    def write(self, path: Path) -> None:
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(Accuracy(**values["accuracy"]), tuple(Answer(**answer) for answer in values["answers"]))


def evaluation(groups: Sequence[Group]) -> Evaluation:
    """Of scored groups, which all have the same number of draws."""
    answers = tuple(Answer(sample.prompt.text, sample.text, sample.reward) for group in groups for sample in group.samples)
    return Evaluation(accuracy(groups), answers)


def accuracy(groups: Sequence[Group]) -> Accuracy:
    """Of the groups' rewards; every group has the same number of draws, and there are at least 2 groups."""
    means = np.array([group.rewards.mean() for group in groups])
    return Accuracy(
        mean=float(means.mean()),
        standard_error=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan,
        prompts=len(groups),
        draws=len(groups[0].samples),
    )
