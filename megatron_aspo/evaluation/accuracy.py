"""Held-out accuracy with its standard error, and the answers behind it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.evaluation.records import EvalResponse, write_responses


@dataclass(frozen=True)
class Accuracy:
    mean: float
    """Mean reward over all draws of all prompts."""
    standard_error: float
    """Computed over prompts, since draws of one prompt are not independent."""
    prompts: int
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Answer:
    """One draw: a response to one prompt, with its reward."""

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


def evaluation(responses: Sequence[EvalResponse]) -> Evaluation:
    """Return the evaluation of graded responses, problem by problem, the same number for each."""
    answers = tuple(Answer(response.prompt, response.response, response.grade[0]) for response in responses)
    return Evaluation(accuracy(responses), answers)


def accuracy(responses: Sequence[EvalResponse]) -> Accuracy:
    """Return the mean score. responses: as for `evaluation`."""
    prompts = responses[-1].position + 1
    means = np.array([response.grade[0] for response in responses], dtype=np.float64).reshape(prompts, -1).mean(axis=1)
    return Accuracy(
        mean=float(means.mean()),
        standard_error=float(means.std(ddof=1) / math.sqrt(prompts)) if prompts > 1 else math.nan,
        prompts=prompts,
        draws=len(responses) // prompts,
    )


def write_evaluation(path: Path, responses: Sequence[EvalResponse]) -> Evaluation:
    """Write `path` (JSON) and, beside it, every response with its token ids (Parquet); return the evaluation."""
    result = evaluation(responses)
    write_responses(path.with_suffix(".parquet"), responses)
    result.write(path)
    return result
