"""Held-out accuracy by hand, and what is kept of an evaluation."""

from dataclasses import replace

import pytest

from megatron_aspo.data.records import Group
from megatron_aspo.evaluation.accuracy import Evaluation, evaluation
from tests.unit.test_batch import group


def scored(number: int, question: str, rewards: list[float]) -> Group:
    """One answer of one token for each reward."""
    one = group(number, [5], [[1] for _ in rewards])
    owner = replace(one.prompt, text=question)
    return Group(owner, tuple(replace(s, prompt=owner, text=f"{question}!", reward=r) for s, r in zip(one.samples, rewards)))


GROUPS = [scored(0, "a", [1, 1, 0, 0]), scored(1, "b", [1, 1, 1, 1]), scored(2, "c", [0, 0, 0, 0])]


def test_the_standard_error_is_over_prompts_however_often_each_is_drawn():
    """Means 1/2, 1, 0: their variance over n − 1 is 1/4, of their mean 1/12."""
    found = evaluation(GROUPS).accuracy
    assert (found.mean, found.prompts, found.draws) == (0.5, 3, 4)
    assert found.standard_error == pytest.approx((1 / 12) ** 0.5, rel=1e-12)
    assert str(found) == "0.500 ± 0.289"


def test_an_evaluation_reads_back_as_it_was_written(tmp_path):
    written = evaluation(GROUPS)
    written.write(tmp_path / "evaluations" / "step_0.json")
    read = Evaluation.read(tmp_path / "evaluations" / "step_0.json")
    assert read == written
    assert [(answer.question, answer.text, answer.reward) for answer in read.answers[2:5]] == [
        ("a", "a!", 0),
        ("a", "a!", 0),
        ("b", "b!", 1),
    ]


def test_evaluations_are_compared_only_where_they_asked_the_same_in_the_same_order():
    first, *others = GROUPS
    asked = evaluation(GROUPS)
    assert asked.same_questions(evaluation([scored(0, "a", [0, 0, 1, 0]), *others]))
    assert not asked.same_questions(evaluation([scored(0, "d", [1, 1, 0, 0]), *others]))
    assert not asked.same_questions(evaluation([*others, first]))
