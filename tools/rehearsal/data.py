"""Raw files of the rehearsal in the layouts of the public data sets, made from the small tasks of examples/data.

`write_livecodebench` writes rows as LiveCodeBench publishes them: starter code in a class, tests as JSON text, private tests packed.
`write_archer_math` writes rows as the training script of Archer2.0 reads them, for AIME's too, which its evaluation files bring like that.
"""

import base64
import json
import pickle
import random
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAPTOP = ROOT / "examples" / "data"
_PUBLIC_TESTS = 2
_SEED = 33


Tasks = list[dict[str, Any]]
"""Rows in the layout of examples/data."""


def laptop_code(test_problems: int) -> tuple[Tasks, Tasks]:
    """Return tasks to train on, and test problems.

    The test problems are the tasks of laptop_code_heldout.jsonl; a seeded draw from laptop_code_train.jsonl fills them up, and the rest of
    that is trained on.
    """
    known, held_out = (_read(LAPTOP / f"laptop_code_{part}.jsonl") for part in ("train", "heldout"))
    random.Random(_SEED).shuffle(known)
    missing = max(0, test_problems - len(held_out))
    return known[missing:], [*held_out, *known[:missing]][:test_problems]


def write_livecodebench(directory: Path, train: Tasks, test: Tasks) -> None:
    """Write `raw/train.jsonl` and `raw/test.jsonl` below `directory`.

    The contest dates of the test problems lie in the window of Archer2.0's LiveCodeBench v5.
    """
    for name, tasks, day in (("train", train, "2023-09-02"), ("test", test, "2024-09-07")):
        _write(directory / "raw" / f"{name}.jsonl", "".join(json.dumps(_livecodebench(task, day)) + "\n" for task in tasks))


def write_archer_math(directory: Path, test_problems: int) -> None:
    """Write `raw/train.json` and `test/aime24.json` below `directory`, each a JSON array; prompts show the form of an answer."""
    for name, part in (("raw/train", "train"), ("test/aime24", "heldout")):
        tasks = _read(LAPTOP / f"laptop_math_{part}.jsonl")
        rows = [_archer(task, number) for number, task in enumerate(tasks if part == "train" else tasks[:test_problems])]
        _write(directory / f"{name}.json", json.dumps(rows))


def _archer(task: dict[str, Any], number: int) -> dict[str, Any]:
    answer = {"ground_truth": task["ground_truth"], "style": "rule"}
    return {"data_source": "math", "prompt": task["prompt"], "ability": "math", "reward_model": answer, "extra_info": {"index": number}}


def _livecodebench(task: dict[str, Any], day: str) -> dict[str, Any]:
    """Return the row for one task of examples/data."""
    truth, question = task["ground_truth"], task["prompt"][-1]["content"]
    name, arguments = truth["fn_name"], question.split("`")[1].split("(")[1].rstrip(")")
    tests = [
        {"input": "\n".join(map(json.dumps, given)), "output": json.dumps(expected), "testtype": "functional"}
        for given, expected in zip(truth["inputs"], truth["outputs"], strict=True)
    ]
    private = zlib.compress(pickle.dumps(json.dumps(tests[_PUBLIC_TESTS:])))
    return {
        "question_title": name,
        "question_content": question,
        "platform": "leetcode",
        "question_id": task["id"],
        "contest_id": "laptop",
        "contest_date": f"{day}T00:00:00",
        "starter_code": f"class Solution:\n    def {name}(self, {arguments}):\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:_PUBLIC_TESTS]),
        "private_test_cases": base64.b64encode(private).decode(),
        "metadata": json.dumps({"func_name": name}),
    }


def _read(path: Path) -> Tasks:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
