"""The comparison of two evaluations pairs questions, and refuses evaluations that it cannot pair."""

import json

import pytest

from tests.unit.test_packaging import load_tool

TOOL = load_tool("compare_evaluations")


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Run the tool on {step: {question: rewards}}; return its status and the lines it printed."""

    def run(evaluations):
        (tmp_path / "evaluations").mkdir()
        for step, rewards in evaluations.items():
            answers = [{"question": name, "text": "", "reward": value} for name, values in rewards.items() for value in values]
            (tmp_path / "evaluations" / f"step_{step}.json").write_text(json.dumps({"accuracy": {}, "answers": answers}))
        (tmp_path / "evaluations" / "step_99.json.superseded").write_text("{}")
        monkeypatch.setattr("sys.argv", ["compare_evaluations.py", str(tmp_path)])
        return TOOL.main(), capsys.readouterr().out.splitlines()

    return run


def test_questions_are_paired_between_the_first_and_the_last_evaluation(compare):
    first = {"easy?": [1, 1], "hard?": [0, 0]}
    status, lines = compare({0: first, 8: {"easy?": [0, 0], "hard?": [0, 0]}, 10: {"easy?": [1, 1], "hard?": [0, 1]}})
    result = json.loads(lines[-1])
    assert status == 0 and lines[:2] == ["1.00 → 1.00  easy?", "0.00 → 0.50  hard?"]
    assert result["steps"] == [0, 10] and result["questions"] == 2
    assert (result["before"]["mean"], result["after"]["mean"], result["difference"]["mean"]) == (0.5, 0.75, 0.25)
    # Two questions resampled: the mean difference is 0, 0.25 or 0.5.
    assert result["difference"]["interval"] == [0.0, 0.5]


def test_evaluations_of_other_questions_are_refused(compare):
    status, lines = compare({0: {"a?": [1]}, 1: {"b?": [1]}})
    assert status == 2 and "asked different questions" in lines[0]


def test_a_run_with_one_evaluation_is_refused(compare):
    status, lines = compare({0: {"a?": [1]}})
    assert status == 2 and "needs 2 evaluations and has 1" in lines[0]
