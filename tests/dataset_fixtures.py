"""Thirty problems in the schema of each dataset that tools/prepare_data.py knows, with a right and a wrong response to each.

The problems are invented and so simple that they need no model: sums for mathematics, one-line programs for code.
"""

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

COUNT = 30


@dataclass(frozen=True)
class Fixture:
    kind: str
    """KIND of tools/prepare_data.py."""
    rows: list[dict[str, Any]]
    save: Callable[[Path, list[dict[str, Any]]], None]
    right: Callable[[int], str]
    """A right response to problem n."""
    source: str
    """data_source of the prepared rows."""
    reward: str


def save_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


def packed(tests: list[dict[str, Any]]) -> str:
    """Return the tests packed as LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def boxed(n: int) -> str:
    return f"{n} + 7 is seven more than {n}: \\boxed{{{n + 7}}}"


def program(n: int) -> str:
    return f"<think>\nadd\n</think>\n```python\nprint(int(input()) + {n})\n```"


def solution(n: int) -> str:
    return f"```python\nclass Solution:\n    def add(self, a: int) -> int:\n        return a + {n}\n```" if n % 2 else program(n)


def _stdin(n: int) -> dict[str, Any]:
    return {"inputs": ["1\n", "20\n"], "outputs": [f"{n + 1}\n", f"{n + 20}\n"]}


def _verl(n: int, source: str, question: str, truth: str) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": asked(question),
        "ability": source,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": n, "split": "train"},
    }


def _livecodebench(n: int) -> dict[str, Any]:
    """Odd problems require a method, even ones a program; five are outside the dates of version 5."""
    kind = "functional" if n % 2 else "stdin"
    tests = [{"input": str(a) if n % 2 else f"{a}\n", "output": str(a + n), "testtype": kind} for a in (1, 20, -3)]
    return {
        "question_title": f"Add {n}",
        "question_content": f"Add {n} to a number.",
        "platform": "leetcode" if n % 2 else "atcoder",
        "question_id": f"abc{n}",
        "contest_id": "abc",
        "contest_date": f"2024-{9 + n // 10:02d}-{1 + n % 28:02d}T00:00:00" if n < COUNT else "2023-05-01T00:00:00",
        "starter_code": "class Solution:\n    def add(self, a: int) -> int:\n        " if n % 2 else "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed(tests[1:]),
        "metadata": json.dumps({"func_name": "add"} if n % 2 else {}),
    }


def _aime(n: int, names: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(names, (n, f"What is {n} + 7?", f"{n + 7:03d}" if n % 2 else n + 7), strict=True))


NUMBERS = range(COUNT)
FIXTURES = [
    Fixture("archer_code", [_verl(n, "code", f"Add {n}.", json.dumps(_stdin(n))) for n in NUMBERS], save_array, program, "code", "code"),
    Fixture(
        "archer_code",
        [{"prompt": f"Add {n}.", "ground_truth": json.dumps(_stdin(n)), "ability": "code"} for n in NUMBERS],
        save_parquet,
        program,
        "code",
        "code",
    ),
    Fixture("archer_math", [_verl(n, "math", f"What is {n} + 7?", str(n + 7)) for n in NUMBERS], save_parquet, boxed, "math", "boxed"),
    Fixture(
        "deepscaler",
        [{"problem": f"What is {n} + 7?", "answer": str(n + 7), "solution": "Add."} for n in NUMBERS],
        save_array,
        boxed,
        "math",
        "boxed",
    ),
    Fixture(
        "gsm8k",
        [{"question": f"What is {n} + 7?", "answer": f"It is <<{n}+7={n + 7}>>{n + 7}.\n#### {n + 7}"} for n in NUMBERS],
        save_lines,
        boxed,
        "gsm8k",
        "boxed",
    ),
    Fixture("livecodebench_v5", [_livecodebench(n) for n in range(COUNT + 5)], save_lines, solution, "livecodebench_v5", "code"),
    Fixture("aime24", [_aime(n, ("ID", "Problem", "Answer")) for n in NUMBERS], save_lines, boxed, "aime2024", "boxed"),
    Fixture("aime25", [_aime(n, ("id", "problem", "answer")) for n in NUMBERS], save_lines, boxed, "aime2025", "boxed"),
]
