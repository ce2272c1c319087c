"""Rewards: the last number, and functions of the user's own."""

import sys

import pytest

from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.last_number import last_number
from megatron_aspo.rewards.user import load_reward

MODULE = "tests.unit.user_rewards"


def make_prompt(truth=7, number=1, **extra):
    return Prompt(f"train/{number}", (1, 2), "the words", truth, "jsonl", extra)


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        ("7", 1.0, "right"),
        (" 7.\n", 1.0, "right"),
        ("3 + 4 = 7", 1.0, "right"),
        ("10-7", 1.0, "right"),
        ("7 or 8", 0.0, "another number"),
        ("-7", 0.0, "another number"),
        ("= -7", 0.0, "another number"),
        ("07", 0.0, "another number"),
        ("17", 0.0, "another number"),
        ("7.5", 0.0, "another number"),
        ("5.7", 0.0, "another number"),
        ("٧", 0.0, "no number"),
        ("seven", 0.0, "no number"),
        ("", 0.0, "no number"),
    ],
)
def test_the_last_number_counts(response, score, reason):
    result = last_number(response, 7)
    assert (result.score, result.reason) == (score, reason)


def test_a_users_reward_sees_the_row_and_gives_details():
    result = load_reward(f"{MODULE}:details")(make_prompt(level=2), "an answer")
    assert (result.score, result.reason) == (0.5, "half")
    assert type(result.score) is float
    assert result.details == {"seen": ["the words", "an answer", 7, {"level": 2}]}


def test_a_users_reward_cannot_change_the_prompt():
    reward, prompt = load_reward(f"{MODULE}:greedy"), make_prompt()
    assert [reward(prompt, "").score for _ in range(3)] == [1.0, 1.0, 1.0]
    assert prompt.extra == {}


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_reward_here.py").write_text("def f(prompt, response, truth, extra):\n    return 2\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hides an installed module')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_reward("my_reward_here:f")(make_prompt(), "").score == 2.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "not of the form package.module:function"),
        (":f", "not of the form"),
        ("no_such_module_at_all:f", "importing no_such_module_at_all raised ModuleNotFoundError"),
        (f"{MODULE}:missing", "has no missing"),
        (f"{MODULE}:not_a_function", "is a int, expected a function"),
        (f"{MODULE}:three", "cannot be called as .prompt, response, ground_truth, extra.*too many positional"),
        (f"{MODULE}:waiting", "async"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_when_loaded(path, message):
    with pytest.raises(UserError, match=message):
        load_reward(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("float('nan')", "returned nan, expected a finite number"),
        ("{'score': -float('inf')}", "returned -inf, expected a finite"),
        ("None", "returned a NoneType, expected a number"),
        ("'1.0'", "returned a str"),
        ("np.ones(1)", "returned a ndarray"),
        ("{'reward': 1}", "dict without score .keys: reward"),
        ("{'score': 1, 'x': np.ones(1)}", "not JSON values"),
    ],
)
def test_a_value_that_is_no_score_names_the_prompt(value, message):
    with pytest.raises(UserError, match=message) as caught:
        load_reward(f"{MODULE}:returned")(make_prompt(value, number=41), "")
    assert "train/41" in str(caught.value)


def test_an_exception_in_a_users_reward_names_the_prompt_in_one_line():
    with pytest.raises(UserError, match=r"user_rewards:raising on prompt train/9 raised KeyError: 'two\\nlines'"):
        load_reward(f"{MODULE}:raising")(make_prompt(number=9), "")
