"""The math reward on rows, mixtures of rewards, and rewards for the form of a response."""

import json
from types import SimpleNamespace

import pytest

from megatron_aspo.cli import main
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import check, load_config
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.records import Prompt
from megatron_aspo.observe.health import reward_parts
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.math.reward import MathReward, check_ground_truth
from megatron_aspo.rewards.named import build_rewards
from megatron_aspo.tasks.dataset import DatasetTask
from megatron_aspo.tasks.options import DataOptions
from tests.in_process import run_main
from tests.tokenizers import byte_tokenizer

REPEATED = "one two three one two three"


def row(truth="7", source="gsm8k"):
    return Prompt("train/1", (1, 2), "What is 3 + 4?", truth, source)


@pytest.mark.parametrize(
    ("response", "truth", "score", "verdict"),
    [
        ("\\boxed{7}", "7", 1.0, "right"),
        ("\\boxed{7}", 7, 1.0, "right"),
        ("\\boxed{7.0}", 7.0, 1.0, "right"),
        ("\\boxed{7}", "\\boxed{7}", 1.0, "right"),
        ("\\boxed{7}", ["6", "7"], 1.0, "right"),
        ("\\boxed{8}", ["6", "7"], -1.0, "wrong"),
        ("7", "7", -1.0, "no answer"),
    ],
)
def test_a_right_answer_scores_one_and_any_other_the_configured_score(response, truth, score, verdict):
    result = MathReward(MathOptions(), wrong_score=-1.0)(row(truth), response)
    assert (result.score, result.details["verdict"]) == (score, verdict)
    assert result.reason and str(truth) not in result.reason
    json.dumps(result.details, allow_nan=False)


def test_an_answer_with_broken_text_or_of_a_megabyte_is_wrong():
    for answer in ("\ud800", "\x00", "9" * 10**6, "\N{PILE OF POO}"):
        result = MathReward(MathOptions())(row(), f"\\boxed{{{answer}}}")
        assert result.score == 0 and len(result.details["answer"]) <= 200
        json.dumps(result.details).encode()


@pytest.mark.parametrize(
    "truth", ["1/2", "\\frac{1}{2}", "\\text{Yes}", "x+1", 5, 0.5, "\\sum_{k=1}^n k", ["1", "2"], "[1,2)", "10%", "5 cm"]
)
def test_a_readable_ground_truth_is_accepted(truth):
    check_ground_truth(truth)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("", "ground_truth '' is empty; correct the row, or leave it out"),
        ("$$", "is no answer that can be read"),
        ("\\frac{1}{", "ground_truth '\\\\frac{1}{' is no answer that can be read"),
        ("\\sum_{k", "is no answer that can be read"),
        ("1 +", "is no answer that can be read"),
        (None, "ground_truth is a NoneType, expected an answer as text or number, or a list of them"),
        (True, "ground_truth is a bool"),
        (float("nan"), "ground_truth is a float"),
        ([], "ground_truth is an empty list"),
        (["1", {}], "ground_truth is a dict"),
    ],
)
def test_a_ground_truth_that_no_answer_can_equal_is_refused(truth, message):
    with pytest.raises(UserError) as error:
        check_ground_truth(truth)
    assert message in str(error.value)


MIXED = {"gsm8k": {"math": 1.0, "format": 0.25, "repetition": 0.5}, "*": "examples.rewards.boxed_answer:score"}


@pytest.mark.parametrize(
    ("source", "response", "score", "parts"),
    [
        ("gsm8k", "<think>a</think> \\boxed{7}", 1.25, {"math": 1.0, "format": 1.0, "repetition": 0.0}),
        ("gsm8k", "\\boxed{7}", 1.0, {"math": 1.0, "format": 0.0, "repetition": 0.0}),
        ("gsm8k", f"<think> {REPEATED} </think> x", 0.25 - 0.5 * 2 / 8, {"math": 0.0, "format": 1.0, "repetition": -2 / 8}),
        ("other", "\\boxed{7}", 1.0, {"examples.rewards.boxed_answer:score": 1.0}),
    ],
)
def test_a_mixture_is_the_weighted_sum_of_its_parts(source, response, score, parts):
    reward = build_rewards(DataOptions(rewards=MIXED, repetition_ngram=2))
    result = reward(row(source=source), response)
    assert result.score == pytest.approx(score) and result.details["parts"] == pytest.approx(parts)
    assert all(f"{name}: " in result.reason for name in parts)


@pytest.mark.parametrize(
    ("tags", "response", "right"),
    [
        (["think"], "<think>a</think>b", True),
        (["think"], "a</think>b", True),
        (["think"], "<think>a</think>", False),
        (["think"], "<think></think>b", False),
        (["think"], "b<think>a</think>b", False),
        (["think"], "<think>a</think>b<think>c</think>", False),
        (["think"], "<think>a", False),
        (["think", "answer"], "<think>a</think> <answer>b</answer>", True),
        (["think", "answer"], "<answer>b</answer><think>a</think>", False),
        (["think", "answer"], "<think>a</think> b", False),
        (["answer"], "<answer>b</answer>", True),
    ],
)
def test_the_format_reward_requires_each_tag_once_and_in_order(tags, response, right):
    reward = build_rewards(DataOptions(reward="format", format_tags=tags))
    assert reward(row(), response).score == float(right)


@pytest.mark.parametrize(
    ("response", "n", "score"),
    [("a b c d", 2, 0.0), ("a b a b", 2, -1 / 3), ("A a a", 1, -2 / 3), ("a a a a", 2, -2 / 3), ("a", 2, 0.0), ("", 1, 0.0)],
)
def test_the_repetition_reward_is_minus_the_share_of_repeated_sequences(response, n, score):
    assert build_rewards(DataOptions(reward="repetition", repetition_ngram=n))(row(), response).score == pytest.approx(score)


@pytest.mark.parametrize(
    ("source", "parts"),
    [("openai/gsm8k", {"math": 1.0}), ("MATH-500", {"math": 1.0}), ("aime24", {"math": 1.0}), ("livecodebench_v5", {"code": 1.0})],
)
def test_by_source_chooses_the_reward_that_the_name_of_the_source_implies(source, parts):
    assert RewardChoice(DataOptions(reward="by_source")).parts(source) == parts


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({"reward": "by_source"}, "poems", "data_source='poems' names no reward"),
        ({"rewards": {"gsm8k": "math"}}, "gsm8", "has no reward in data.rewards; did you mean data_source='gsm8k'?"),
        ({"reward": "math", "rewards": {"*": "math"}}, "", "data.reward=math and data.rewards both choose the reward; remove one"),
        ({"reward": "maths"}, "", "data.reward: maths is no reward; did you mean math?"),
        ({"rewards": {"*": {"maths": 1}}}, "", "data.rewards.*: maths is no reward; did you mean math?"),
        ({"rewards": {"*": {}}}, "", "data.rewards.*={} must be the name of a reward, or a mapping of names to weights"),
        ({"rewards": {"*": {"math": 0}}}, "", "data.rewards.*.math=0 is no weight; give a finite number that is not 0"),
        ({"rewards": {"*": {"math": True}}}, "", "data.rewards.*.math=True is no weight"),
    ],
)
def test_an_invalid_choice_is_refused_by_name(options, source, message):
    with pytest.raises(UserError) as error:
        RewardChoice(DataOptions(**options)).parts(source)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.reward=math", "data.math.limit_s=60"], "data.reward_timeout_s=60 must be above data.math.limit_s=60"),
        (["data.reward=code", "data.math.limit_s=6"], "data.math.limit_s has no effect with data.reward=code; set data.reward=math"),
        (["data.reward=math", "data.math.extract=all"], "data.math.extract=all is not known"),
        (["data.reward=math", "data.format_tags=[a]"], "data.format_tags=['a'] has no effect without the reward format"),
        (["data.reward=a:b", "data.reward_wrong_score=-1"], "data.reward_wrong_score=-1.0 has no effect without the reward code or math"),
        (["data.reward=math", "data.reward_wrong_score=1"], "data.reward_wrong_score=1.0 must be below 1, that of a right response"),
        (["data.reward=math", "data.reward_wrong_score=-1", "algorithm.group_filter=drop_zero_or_one"], "set algorithm.group_filter=drop"),
        (["data.reward=math", "data.reward_on_error=go"], "data.reward_on_error=go is not known; valid: score, stop"),
        (["data.reward=math", "data.reward_memory_gib=-1"], "data.reward_memory_gib=-1.0 must not be negative"),
    ],
)
def test_an_invalid_configuration_is_refused(tmp_path, overrides, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ntask: dataset\n")
    with pytest.raises(UserError) as error:
        check(load_config(recipe, overrides))
    assert message in str(error.value)


def test_an_ungradable_row_is_refused_at_the_start_with_file_and_line(tmp_path):
    tokenizer = byte_tokenizer()
    for bad, message in (("\\frac{1}{", "is no answer that can be read"), ("", "is empty"), ([], "is an empty list")):
        rows = [{"prompt": "a", "ground_truth": "1/2"}, {"prompt": "b", "ground_truth": bad}]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = DataOptions(path=[str(tmp_path / "train.jsonl")], reward="math")
        with pytest.raises(UserError) as error:
            DatasetTask(options, PromptEncoder(tokenizer, len(tokenizer), options), 0)
        assert "train.jsonl:2: " in str(error.value) and message in str(error.value)
    options = DataOptions(path=[str(tmp_path / "train.jsonl")], rewards={"poems": "math"})
    with pytest.raises(UserError, match=r"train.jsonl:1: data_source='dataset' has no reward in data.rewards"):
        DatasetTask(options, PromptEncoder(tokenizer, len(tokenizer), options), 0)


def test_grade_uses_the_reward_that_the_source_implies(tmp_path):
    rows = [{"response": f"\\boxed{{{answer}}}", "ground_truth": "1/2", "data_source": "openai/gsm8k"} for answer in ("2/4", "2")]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_main(main, "grade", "responses.jsonl", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["verdict"] for line in lines[:2]] == ["right", "wrong"] and lines[2]["summary"]["mean_score"] == 0.5


def test_the_mean_of_each_part_is_taken_over_the_responses_that_have_it():
    details = ({"parts": {"math": 1.0, "format": 0.0}}, {"parts": {"math": 0.0}}, {"parts": "mine"}, {"parts": {"math": "text"}}, {})
    samples = [SimpleNamespace(reward_details=one) for one in details]
    assert reward_parts(samples) == {"reward/part/math": 0.5, "reward/part/format": 0.0}
