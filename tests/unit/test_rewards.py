"""Rewards: the last number, and custom functions."""

import json
import sys

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.last_number import last_number
from megatron_aspo.rewards.user import load_reward

MODULE = "tests.unit.user_rewards"


def make_prompt(truth=7, number=1, **extra):
    return Prompt(f"train/{number}", (1, 2), "the words", truth, "dataset", extra)


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


def test_a_custom_reward_gets_the_row_and_returns_details():
    result = load_reward(f"{MODULE}:details")(make_prompt(level=2), "an answer")
    assert (result.score, result.reason) == (0.5, "half")
    assert type(result.score) is float
    assert result.details == {"seen": ["the words", "an answer", 7, {"level": 2}]}


def test_a_custom_reward_cannot_change_the_prompt():
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
        ("time:reward", "time .no file. has no reward"),
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
        ("10**400", "returned a int too large for a float, expected a finite number"),
        ("10**5000", "returned a int too large for a float"),
        ("Fraction(10**400, 3)", "returned a Fraction too large for a float"),
        ("Decimal('1e400')", "returned inf, expected a finite number"),
        ("Decimal('sNaN')", "returned a Decimal that cannot be read .ValueError"),
        ("Hostile(1)", "returned a Hostile that cannot be read .SystemExit: 1."),
        ("{'score': 1, 'reason': Hostile(1)}", "that cannot be read .RuntimeError: no text"),
        ("{'score': 1, 'reason': '\\ud83d'}", "reason has half of a surrogate pair"),
        ("{'score': 1, 'x': np.ones(1)}", "not JSON values .x is a ndarray."),
        ("{'score': 1, 'x': {'y': [0.0, float('nan')]}}", r"x\.y\[1\] is nan"),
        ("{'score': 1, 'x': -np.float32('inf')}", "x is -inf"),
        ("{'score': 1, 'x': 10**5000}", "x is an integer with too many digits"),
        ("{'score': 1, 'x': ['a', 'b\\udc80']}", r"x\[1\] has half of a surrogate pair"),
        ("{'score': 1, 'x': {'b\\udc80': 0}}", "a key of x has half of a surrogate pair"),
        ("{'score': 1, 'x': {1: 0, '1': 0}}", "x has two keys that JSON writes as '1'"),
        ("{'score': 1, True: 0, 'true': 0}", "has two keys that JSON writes as 'true'"),
        ("{'score': 1, 'x': {(1, 2): 0}}", "x has a key that is a tuple"),
        ("{'score': 1, 'x': {1, 2}}", "x is a set"),
        ("{'score': 1, 'x': nested(100_000)}", "x.*is nested more than 100 deep"),
        ("{'score': 1, 'x': endless()}", "x.*is nested more than 100 deep"),
    ],
)
def test_a_value_that_is_no_score_names_the_prompt(value, message):
    with pytest.raises(UserError, match=message) as caught:
        load_reward(f"{MODULE}:returned")(make_prompt(value, number=41), "")
    assert "train/41" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ("np.bool_(True)", 1.0),
        ("{'score': np.bool_(False)}", 0.0),
        ("np.int64(3)", 3.0),
        ("Decimal('0.25')", 0.25),
        ("Fraction(1, 4)", 0.25),
        ("10**30", 1e30),
    ],
)
def test_every_finite_number_is_a_score(value, score):
    result = load_reward(f"{MODULE}:returned")(make_prompt(value), "")
    assert result.score == score and type(result.score) is float


def test_details_round_trip_through_json():
    value = "{'score': 1, 'reason': 3, 'a': np.bool_(True), 'b': (np.int64(2), np.float32(0.5)), 3: {None: [nested(90)]}}"
    result = load_reward(f"{MODULE}:returned")(make_prompt(value), "")
    assert result.reason == "3" and result.details["a"] is True and result.details["b"] == [2, 0.5]
    assert json.loads(json.dumps(result.details, allow_nan=False)) == result.details and list(result.details["3"]) == ["null"]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("SystemExit(0)", "raised SystemExit: 0; a reward must not exit: correct the function"),
        ("KeyboardInterrupt", "raised KeyboardInterrupt; correct the function"),
        ("GeneratorExit", "raised GeneratorExit; correct"),
        ("Own()", "raised Own: its text cannot be shown .RuntimeError.; correct"),
        ("ValueError('x' * 100_000)", "raised ValueError: xxx"),
    ],
)
def test_any_exception_of_a_reward_names_the_prompt_in_one_line(raised, message):
    with pytest.raises(UserError, match=f"user_rewards:raised on prompt train/9 {message}") as caught:
        load_reward(f"{MODULE}:raised")(make_prompt(raised, number=9), "")
    assert len(str(caught.value)) < 1000


def test_a_reward_that_exits_is_refused_with_the_rule():
    with pytest.raises(UserError, match=r"raised SystemExit: None; a reward must not exit"):
        load_reward(f"{MODULE}:quitting")(make_prompt(), "")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(0)", "raised SystemExit: 0"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("def __getattr__(name): raise RuntimeError(name)", "raised RuntimeError: (__path__|f)"),
    ],
)
def test_any_exception_of_a_rewards_module_is_a_user_error(tmp_path, monkeypatch, code, message):
    (tmp_path / "bad_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "bad_module", raising=False)
    with pytest.raises(UserError, match=f"importing bad_module {message}"):
        load_reward("bad_module:f")


def test_an_exception_in_a_custom_reward_names_the_prompt_in_one_line():
    with pytest.raises(UserError, match=r"user_rewards:raising on prompt train/9 raised KeyError: 'two\\nlines'"):
        load_reward(f"{MODULE}:raising")(make_prompt(number=9), "")
