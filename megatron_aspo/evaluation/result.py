"""Computes metrics with intervals, a row per problem, and the paired difference of two evaluations from graded responses."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_aspo.common.errors import UserError
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.repetition import repeated_ngrams
from megatron_aspo.evaluation.statistics import interval_of_mean, majority_at_k, pass_at_k, resample

SameAnswer = Callable[[str, str], bool]
RIGHT_ANSWER = ("right",)
"""The vote of every right response: all agree with the ground truth, however they write it."""


def same_text(answer: str, other: str) -> bool:
    """Return whether two answers differ at most in whitespace."""
    return "".join(answer.split()) == "".join(other.split())


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the estimate from one value per problem."""
        array = np.array(values, dtype=np.float64)
        return cls(float(array.mean()), *interval_of_mean(array, resample(len(array))))

    def __str__(self) -> str:
        return f"{self.mean:.4f}  [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class ProblemResult:
    """Metrics of one problem over its n responses."""

    problem: str
    data_source: str
    metrics: dict[str, float]
    """avg@n, each pass@k and each maj@k."""
    right: int
    """Responses with a score of at least 1."""
    failed: int
    """Responses on which the reward timed out or crashed."""
    tokens: float
    """Mean length of a response."""
    truncated: float
    """Share of responses that reached the limit on tokens."""
    repetition: float
    """Share of 20-grams of words that occur more than once, mean over responses."""
    verdicts: dict[str, int]

    @classmethod
    def of(
        cls, responses: Sequence[EvalResponse], pass_at: Sequence[int], majority_at: Sequence[int], same: SameAnswer = same_text
    ) -> "ProblemResult":
        """Return the metrics of one problem's graded responses.

        same: as for `votes`. Raises UserError for maj@k with a reward that reports no answers.
        """
        n, right = len(responses), sum(response.right for response in responses)
        grades = [response.grade for response in responses]
        metrics = {f"avg@{n}": float(np.mean([score for score, _ in grades]))}
        metrics |= {f"pass@{k}": pass_at_k(n, right, k) for k in pass_at}
        if majority_at:
            voted = votes(responses, same)
            metrics |= {f"maj@{k}": majority_at_k(voted, {RIGHT_ANSWER}, k) for k in majority_at}
        return cls(
            problem=responses[0].problem,
            data_source=responses[0].data_source,
            metrics=metrics,
            right=right,
            failed=sum(bool(response.failure) for response in responses),
            tokens=float(np.mean([response.tokens for response in responses])),
            truncated=float(np.mean([response.finish_reason == "length" for response in responses])),
            repetition=float(np.mean([repeated_ngrams(response.response)[0] for response in responses])),
            verdicts=dict(Counter(verdict for _, verdict in grades)),
        )


def votes(responses: Sequence[EvalResponse], same: SameAnswer = same_text) -> list[Hashable | None]:
    """Return each response's vote in maj@k: right responses vote for the ground truth, others for their answer.

    same: whether two wrong answers are equal. A wrong response without an answer does not vote. Raises UserError if no response has one.
    """
    if any(response.right and response.answer is None for response in responses):
        raise UserError("maj@k compares answers, and this reward gives none (a detail named answer); set majority_at=[]")
    found: list[str] = []

    def vote(response: EvalResponse) -> Hashable | None:
        if response.right:
            return RIGHT_ANSWER
        if response.answer is None or not response.answer.strip():
            return None
        for answer in found:
            if same(response.answer, answer):
                return answer
        found.append(response.answer)
        return response.answer

    return [vote(response) for response in responses]


def group_by_problem(parts: Iterable[Sequence[EvalResponse]]) -> Iterable[list[EvalResponse]]:
    """Yield the responses to each problem. parts: responses in the order of the problems; no problem spans two parts."""
    for part in parts:
        group: list[EvalResponse] = []
        for response in part:
            if group and response.position != group[0].position:
                yield group
                group = []
            group.append(response)
        if group:
            yield group


def summarize(problems: Sequence[ProblemResult]) -> dict[str, Any]:
    """Return the metrics over all problems as JSON values: problem metrics with their intervals, and means of the other fields."""
    verdicts = sum((Counter(problem.verdicts) for problem in problems), Counter())
    return {
        "problems": len(problems),
        "metrics": {name: vars(Estimate.of([problem.metrics[name] for problem in problems])) for name in problems[0].metrics},
        "tokens_mean": float(np.mean([problem.tokens for problem in problems])),
        "truncated_share": float(np.mean([problem.truncated for problem in problems])),
        "repetition_share": float(np.mean([problem.repetition for problem in problems])),
        "verdicts": dict(verdicts.most_common()),
    }


def difference(ours: Sequence[ProblemResult], theirs: Sequence[ProblemResult]) -> dict[str, Any]:
    """Return the mean of ours − theirs over problems for each common metric, with the interval of the paired differences.

    Raises UserError unless both have the same problems and a metric in common.
    """
    other = {problem.problem: problem for problem in theirs}
    if other.keys() != {problem.problem for problem in ours}:
        missing = sorted(other.keys() ^ {problem.problem for problem in ours})
        raise UserError(f"the two evaluations have different problems, such as {missing[0]}; compare evaluations of one data set")
    names = [name for name in ours[0].metrics if name in theirs[0].metrics]
    if not names:
        raise UserError(
            f"the evaluations have no metric in common ({', '.join(ours[0].metrics)}; {', '.join(theirs[0].metrics)}); sample alike"
        )
    result = {}
    for name in names:
        changes = [problem.metrics[name] - other[problem.problem].metrics[name] for problem in ours]
        counts = {"better": sum(change > 0 for change in changes), "worse": sum(change < 0 for change in changes)}
        result[name] = vars(Estimate.of(changes)) | counts
    return result


def problems_csv(problems: Sequence[ProblemResult]) -> str:
    """Return a table with a row for each problem."""
    text = io.StringIO()
    names = list(problems[0].metrics)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["problem", "data_source", *names, "right", "tokens", "truncated", "repetition", "verdicts"])
    for p in problems:
        metrics = [f"{p.metrics[name]:.6g}" for name in names]
        counted = "; ".join(f"{name} {count}" for name, count in p.verdicts.items())
        writer.writerow(
            [p.problem, p.data_source, *metrics, p.right, f"{p.tokens:.1f}", f"{p.truncated:.4f}", f"{p.repetition:.4f}", counted]
        )
    return text.getvalue()


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Return the lines of the printed table."""
    lines = [f"problems    {summary['problems']}"]
    lines += [f"{name:<11} {Estimate(**estimate)}  95 % interval over problems" for name, estimate in summary["metrics"].items()]
    lines.append(
        f"responses   {summary['tokens_mean']:.1f} tokens on average, {100 * summary['truncated_share']:.1f} % truncated, "
        f"{100 * summary['repetition_share']:.1f} % of 20-grams repeated"
    )
    lines.append("verdicts    " + ", ".join(f"{verdict} {count}" for verdict, count in list(summary["verdicts"].items())[:8]))
    return lines


def format_difference(changes: dict[str, Any]) -> list[str]:
    return [
        f"{name:<11} {change['mean']:+.4f}  [{change['low']:+.4f}, {change['high']:+.4f}]  paired 95 % interval; "
        f"{change['better']} problems better, {change['worse']} worse"
        for name, change in changes.items()
    ]
