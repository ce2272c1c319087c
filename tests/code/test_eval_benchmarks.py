"""Thirty problems of AIME and of LiveCodeBench, from the raw file to the table, by the documented command against a server.

The server answers every third problem correctly, every third correctly in half of the samples and otherwise with different wrong answers,
and every third wrongly; it identifies a problem by the number in its question.
"""

import csv
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter

import pytest

from megatron_aspo.evaluation.records import read_responses
from tests.dataset_fixtures import COUNT, FIXTURES
from tests.openai_server import serving
from tests.unit.test_packaging import ROOT

pytestmark = pytest.mark.long
FIXTURE = {fixture.kind: fixture for fixture in FIXTURES}


class Answers:
    """The server's replies; counts the requests for each problem."""

    def __init__(self, right):
        self.right, self.asked, self.lock = right, Counter(), threading.Lock()

    def __call__(self, request):
        number = int(re.search(r"(?:Add|What is) (\d+) ", request["messages"][-1]["content"])[1])
        with self.lock:
            self.asked[number] += 1
            count = self.asked[number]
        wrong = number % 3 == 2 or (number % 3 == 1 and count > 2)
        return self.right(number + (100 + 2 * count if number % 3 == 1 else 2) if wrong else number)


def run_eval(directory, *words):
    command = [sys.executable, "-m", "megatron_aspo", "eval", *map(str, words)]
    done = subprocess.run(command, cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    ("protocol", "kind", "more", "verdicts"),
    [
        ("aime24", "aime24", ["majority_at=[4]"], {"right": 60, "wrong": 60}),
        ("archer_lcb_v5", "livecodebench_v5", ["data.code.max_tests=1"], {"passed": 60, "wrong answer": 60}),
    ],
)
def test_raw_rows_become_a_table(tmp_path, sandboxed, protocol, kind, more, verdicts):
    fixture = FIXTURE[kind]
    fixture.save(tmp_path / "raw.jsonl", fixture.rows)
    with serving(Answers(fixture.right)) as server:
        words = [server.url, "--protocol", protocol, "--data", "raw.jsonl", "--out", "out", "--accept-count"]
        options = ["--set", "samples=4", "pass_at=[1,2]", "data.reward_workers=2", *more]
        result, printed = run_eval(tmp_path, *words, *options)
    means = {name: estimate["mean"] for name, estimate in result["metrics"].items()}
    expected = {"avg@4": 1 / 2, "pass@1": 1 / 2, "pass@2": (10 + 10 * 5 / 6) / 30} | ({"maj@4": 20 / 30} if kind == "aime24" else {})
    assert means == pytest.approx(expected, abs=1e-12) and result["problems"] == COUNT
    assert all(estimate["low"] < estimate["mean"] < estimate["high"] for estimate in result["metrics"].values())
    assert result["verdicts"] == verdicts and result["changed"]["samples"] == 4
    rows = list(csv.DictReader((tmp_path / "out" / "problems.csv").open()))
    assert len(rows) == COUNT and [int(row["right"]) for row in rows] == [(4, 2, 0)[n % 3] for n in range(COUNT)]
    responses = [r for path in sorted((tmp_path / "out").glob("parts/*.parquet")) for r in read_responses(path)]
    assert len(responses) == 4 * COUNT and all(r.reason and r.verdict and r.response for r in responses)
    assert "95 % interval over problems" in printed and f"avg@4       {1 / 2:.4f}" in printed
