"""Held-out accuracy computed by hand, and the record of an evaluation."""

import pytest

from megatron_aspo.evaluation.accuracy import Evaluation, evaluation, write_evaluation
from megatron_aspo.evaluation.records import EvalResponse, read_responses


def scored(position: int, question: str, rewards: list[float]) -> list[EvalResponse]:
    """Return one answer of one token for each reward."""
    return [
        EvalResponse(position, index, f"p{position}", "words", question, [5], index, f"{question}!", [1], 1, "stop", reward, "r", "r")
        for index, reward in enumerate(rewards)
    ]


GROUPS = [scored(0, "a", [1, 1, 0, 0]), scored(1, "b", [1, 1, 1, 1]), scored(2, "c", [0, 0, 0, 0])]
ALL = [response for group in GROUPS for response in group]


def test_the_standard_error_is_over_prompts_not_draws():
    """Means 1/2, 1, 0: their variance over n − 1 is 1/4, that of their mean 1/12."""
    found = evaluation(ALL).accuracy
    assert (found.mean, found.prompts, found.draws) == (0.5, 3, 4)
    assert found.standard_error == pytest.approx((1 / 12) ** 0.5, rel=1e-12)
    assert str(found) == "0.500 ± 0.289"


def test_a_written_evaluation_is_read_back_unchanged(tmp_path):
    written = write_evaluation(tmp_path / "evaluations" / "step_0.json", ALL)
    read = Evaluation.read(tmp_path / "evaluations" / "step_0.json")
    assert read == written == evaluation(ALL)
    assert read_responses(tmp_path / "evaluations" / "step_0.parquet") == ALL
    assert [(answer.question, answer.text, answer.reward) for answer in read.answers[2:5]] == [
        ("a", "a!", 0),
        ("a", "a!", 0),
        ("b", "b!", 1),
    ]


def test_evaluations_are_compared_only_with_the_same_questions_in_the_same_order():
    asked = evaluation(ALL)
    assert asked.same_questions(evaluation([*scored(0, "a", [0, 0, 1, 0]), *ALL[4:]]))
    assert not asked.same_questions(evaluation([*scored(0, "d", [1, 1, 0, 0]), *ALL[4:]]))
    assert not asked.same_questions(evaluation([*scored(0, "b", [1, 1, 1, 1]), *scored(1, "a", [1, 1, 0, 0]), *ALL[8:]]))
