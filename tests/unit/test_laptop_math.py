"""examples/recipes/laptop_math.yaml: it can be planned, and the answers to its problems are right."""

import json
import math
import re
from fractions import Fraction

import pytest

from megatron_aspo.config import load_config
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.named import build_rewards
from megatron_aspo.runtime.plan import make_plan
from tests.models import save_tiny
from tests.unit.test_packaging import ROOT
from tools.maintain.make_laptop_math import SIZES, TASKS, make


def rows(part: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"examples/data/laptop_math_{part}.jsonl").read_text().splitlines()]


def computed(task: str, question: str) -> Fraction:
    """Return the answer, computed from the numbers of the question."""
    if task == "chain_sum":
        left, sign, right = re.search(r"(\d+) ([+-]) (\d+) =", question).groups()
        return Fraction(int(left) + int(sign + right))
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    return Fraction(math.gcd(*numbers)) if task == "gcd" else Fraction(*numbers)


@pytest.fixture
def config(monkeypatch, tmp_path):
    save_tiny("llama", tmp_path / "model")
    monkeypatch.chdir(ROOT)
    return load_config(ROOT / "examples/recipes/laptop_math.yaml", [f"model={tmp_path}/model"])


def test_it_plans_for_two_cores(config):
    assert len(make_plan(config, "cpu").ranks) == 1
    assert config.rollout.prompts_per_step % config.algorithm.mini_batch_prompts == 0


def test_right_answers_score_one_and_wrong_ones_do_not(config):
    reward = build_rewards(config.data)
    for part, count in SIZES.items():
        assert len(rows(part)) == count * len(TASKS)
        for row in rows(part):
            prompt = Prompt("p", (), row["prompt"][-1]["content"], row["ground_truth"], row["data_source"])
            answer = computed(row["data_source"], prompt.text)
            assert reward(prompt, f"\\boxed{{{answer}}}").score == 1.0
            assert reward(prompt, f"so it is {answer}").score == 1.0
            assert reward(prompt, f"\\boxed{{{answer + 1}}}").score == 0.0
            assert reward(prompt, "I do not know").score == 0.0


def test_the_files_are_current_and_share_no_question():
    assert make() == {part: rows(part) for part in SIZES}
    questions = [row["prompt"][-1]["content"] for part in SIZES for row in rows(part)]
    assert len(set(questions)) == len(questions)
