"""From graded responses to metrics: computed by hand on a few problems."""

import csv
import io
from dataclasses import replace

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.result import (
    Estimate,
    ProblemResult,
    difference,
    format_difference,
    format_summary,
    group_by_problem,
    problems_csv,
    summarize,
)
from megatron_aspo.evaluation.statistics import interval_of_mean, resample


def responses(position, scores, answers=None, **changes):
    answers = answers or [None] * len(scores)
    one = EvalResponse(
        position, 0, f"p{position}", "math", "?", [1], 0, "a b", [5, 6], 2, "stop", 0.0, "wrong", "different", None, "", "{}"
    )
    return [
        replace(one, index=i, score=score, verdict="right" if score else "wrong", answer=answer, **changes)
        for i, (score, answer) in enumerate(zip(scores, answers))
    ]


def result(position, scores, answers=None, pass_at=(2,), majority_at=(), **changes):
    return ProblemResult.of(responses(position, scores, answers, **changes), pass_at, majority_at)


def test_metrics_of_one_problem_follow_their_definitions():
    one = result(0, [1, 0, 0, 1], ["4", "5", " 5", "4.0"], (1, 2, 4), (1, 3, 4), tokens=7)
    # 6 pairs, of which one is wrong twice. 2 of the 4 triples have two right responses. All four: 2 against 2.
    assert one.metrics == pytest.approx(
        {"avg@4": 0.5, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0, "maj@1": 0.5, "maj@3": 0.5, "maj@4": 0.5}, abs=1e-12
    )
    assert (one.right, one.tokens, one.verdicts) == (2, 7, {"right": 2, "wrong": 2})


def test_right_responses_vote_together_and_silent_ones_not_at_all():
    assert result(0, [1, 1, 0, 0, 0], ["1/2", "0.5", "2", None, "3"], (), (5,)).metrics["maj@5"] == 1.0
    assert result(0, [0, 0], [None, " "], (), (2,)).metrics["maj@2"] == 0.0


def test_a_partial_score_counts_in_the_mean_but_is_not_right():
    one = result(0, [0.5, 1.0], pass_at=(1,))
    assert one.metrics == {"avg@2": 0.75, "pass@1": 0.5}


def test_majority_of_a_reward_without_answers_is_refused():
    with pytest.raises(UserError, match=r"maj@k compares answers, and this reward gives none .*; set majority_at=\[\]"):
        result(0, [1, 0], None, (), (2,))


def test_fewer_samples_than_k_are_an_error():
    with pytest.raises(ValueError, match="at most the 2 responses"):
        result(0, [1, 0], pass_at=(4,))


def test_truncation_and_repetition_are_shares():
    again = " ".join(["the same words again and again"] * 10)
    one = ProblemResult.of(responses(0, [0], finish_reason="length", response=again) + responses(0, [0]), (), ())
    assert one.truncated == 0.5 and one.repetition == pytest.approx(0.5)


def test_responses_are_grouped_by_problem_across_parts():
    parts = [responses(0, [1, 0]) + responses(1, [0, 0]), responses(2, [1, 1])]
    assert [[r.position for r in group] for group in group_by_problem(parts)] == [[0, 0], [1, 1], [2, 2]]


PROBLEMS = [result(n, scores) for n, scores in enumerate([[1, 1], [1, 0], [0, 0], [0, 1]])]


def test_a_summary_has_means_over_problems_with_intervals():
    summary = summarize(PROBLEMS)
    low, high = interval_of_mean([1, 0.5, 0, 0.5], resample(4))
    assert summary["metrics"]["avg@2"] == {"mean": 0.5, "low": low, "high": high}
    assert summary["metrics"]["pass@2"]["mean"] == 0.75 and summary["problems"] == 4
    assert summary["verdicts"] == {"right": 4, "wrong": 4}
    lines = format_summary(summary)
    assert lines[1].startswith(f"avg@2       0.5000  [{low:.4f}, {high:.4f}]") and "0.0 % truncated" in lines[3]


def test_the_difference_is_paired_by_problem_in_any_order():
    other = [result(n, scores) for n, scores in [(3, [0, 0]), (2, [0, 0]), (1, [1, 1]), (0, [1, 1])]]
    changes = difference(PROBLEMS, other)
    assert changes["avg@2"] == vars(Estimate.of([0, -0.5, 0, 0.5])) | {"better": 1, "worse": 1}
    assert changes["pass@2"] == vars(Estimate.of([0, 0, 0, 1])) | {"better": 1, "worse": 0}
    assert format_difference(changes)[0].startswith("avg@2       +0.0000  [")


def test_a_paired_interval_is_narrower_than_the_intervals_of_its_two_sides():
    """Problems differ much, and one side is slightly better on each."""
    before = [replace(PROBLEMS[0], problem=f"p{n}", metrics={"avg@2": n / 50}) for n in range(40)]
    after = [replace(p, metrics={"avg@2": p.metrics["avg@2"] + 0.1}) for p in before]
    change = difference(after, before)["avg@2"]
    assert change["low"] == pytest.approx(0.1) and change["high"] == pytest.approx(0.1) and change["better"] == 40
    alone = summarize(before)["metrics"]["avg@2"]
    assert alone["high"] - alone["low"] > 0.1


def test_evaluations_of_other_problems_or_without_a_common_metric_are_not_compared():
    with pytest.raises(UserError, match="different problems, such as p3"):
        difference(PROBLEMS[:3], PROBLEMS)
    with pytest.raises(UserError, match="no metric in common"):
        difference(PROBLEMS, [ProblemResult.of(responses(n, [1, 1, 1]), (3,), ()) for n in range(4)])


def test_the_table_has_a_row_for_each_problem():
    rows = list(csv.DictReader(io.StringIO(problems_csv(PROBLEMS))))
    assert [(row["problem"], row["avg@2"], row["pass@2"], row["right"]) for row in rows][:2] == [
        ("p0", "1", "1", "2"),
        ("p1", "0.5", "1", "1"),
    ]
    assert rows[1]["verdicts"] == "right 1; wrong 1"
