"""The example reward for mathematics: which answers count as right."""

import json
import time
from pathlib import Path

import pytest

from examples.rewards.boxed_answer import last_boxed, score
from megatron_aspo import cli
from tests.in_process import run_main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("The sum is \\boxed{42}.", "42", True),
        ("First \\boxed{1}, no: \\boxed{ 42 }", "42", True),
        ("\\boxed{1,024}", "1024", True),
        ("\\boxed{1024.0}", 1024, True),
        ("\\boxed{$0.5$}", "1/2", True),
        ("\\boxed{-7}", "-7", True),
        ("\\boxed{073}", "73", True),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
        ("\\boxed{x + 1}", "x+1", True),
        ("\\boxed{1,2}", "12", False),
        ("\\boxed{41}", "42", False),
        ("\\boxed{1/0}", "0", False),
        ("\\boxed{1+x}", "x+1", False),
        ("42", "42", False),
        ("\\boxed{42", "42", False),
        ("", "42", False),
    ],
)
def test_only_the_last_box_with_the_same_text_or_number_is_right(response, truth, right):
    given = score("What is it?", response, truth, {})
    assert given["score"] == float(right) and given["reason"]


def test_nested_braces_belong_to_the_answer():
    assert last_boxed("\\boxed{\\sqrt{\\frac{1}{2}}} and more}") == "\\sqrt{\\frac{1}{2}}"


def test_a_number_of_a_million_digits_costs_no_time():
    began = time.monotonic()
    assert score("", "\\boxed{" + "9" * 1_000_000 + "}", "9", {})["score"] == 0
    assert score("", "\\boxed{1e999999999}", "9", {})["score"] == 0
    assert time.monotonic() - began < 2


def test_the_example_grades_a_file_of_responses(tmp_path):
    rows = [{"response": f"\\boxed{{{answer}}}", "ground_truth": "1/2", "data_source": "mine"} for answer in ("0.5", "2")]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_main(cli.main, "grade", str(tmp_path / "responses.jsonl"), "--reward", "examples.rewards.boxed_answer:score", cwd=ROOT)
    first, second, summary = map(json.loads, done.stdout.splitlines())
    assert (first["score"], second["score"], summary["summary"]["mean_score"]) == (1.0, 0.0, 0.5)
