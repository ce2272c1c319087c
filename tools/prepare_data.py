"""Writes prompts for data sets that have none, or have them in another layout: python tools/prepare_data.py KIND LOCATION… --to FILE.jsonl

    python tools/prepare_data.py gsm8k hub:openai/gsm8k:main@train --to data/gsm8k_train.jsonl
    python tools/prepare_data.py livecodebench_v5 test.jsonl test2.jsonl test3.jsonl test4.jsonl test5.jsonl --to data/lcb_v5.jsonl

KIND: archer_code and archer_math (the training data of Archer2.0, in its script's layout or as published), deepscaler, gsm8k,
livecodebench_v5 and livecodebench_v6 (the windows of Archer's evaluation), livecodebench (all problems), aime24, aime25. LOCATION: as in
data.path, files of any of its formats or hub:OWNER/NAME. LiveCodeBench's private tests stay packed.

Nothing is left out silently: the last line is a JSON object with the rows read, written, and left out by reason. Another number of problems
than the evaluation of that name has is refused, unless --any-count is given.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_aspo.checkpoint.atomic import disk_errors
from megatron_aspo.data.layouts import understand
from megatron_aspo.data.sources import Row, read_rows
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.code.schemas import check_ground_truth

MATH = "{question}\n\nReason step by step, and put the final answer within \\boxed{{}}."
STDIN = (
    "Write a Python program that solves this problem. It reads standard input and writes standard output. Think first; then give the whole "
    "program in one ```python block.\n\n{question}"
)
CALLS = (
    "Solve this problem in Python. Think first; then give the whole code in one ```python block, which begins as this one does.\n\n"
    "{question}\n\n```python\n{starter_code}\n```"
)


class NotWantedError(Exception):
    """The row is left out on purpose; the text is the reason that is counted."""


@dataclass(frozen=True)
class Kind:
    make: Callable[["Kind", Row, str], dict[str, Any]]
    source: str = ""
    """data_source of the rows."""
    count: int = 0
    """Number of problems in the evaluation of that name; 0 if any number is right."""
    first: str = ""
    last: str = ""
    """Dates of the problems that are wanted, both inclusive; empty for all."""


def from_archer(kind: Kind, row: Row, template: str) -> dict[str, Any]:
    problem = understand(row, kind.source)
    if kind.source == "code":
        try:
            check_ground_truth(problem.ground_truth, problem.text)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
    elif not isinstance(problem.ground_truth, str | int | float):
        raise UserError(f"{row.where}: the ground truth is a {type(problem.ground_truth).__name__}, expected the answer as text or number")
    messages = problem.messages or [{"role": "user", "content": problem.text}]
    return {"prompt": messages, "ground_truth": problem.ground_truth, "data_source": problem.data_source} | (
        {"id": problem.known_as} if problem.known_as else {}
    )


def from_math(kind: Kind, row: Row, template: str) -> dict[str, Any]:
    question, answer = _field(row, "problem", "Problem", "question"), _field(row, "answer", "Answer")
    if kind.source.startswith("aime"):
        answer = _aime_answer(answer, row)
    name = next((str(row.fields[key]) for key in ("id", "ID") if isinstance(row.fields.get(key), str | int)), "")
    return _asked(kind, template or MATH, question, "") | {"ground_truth": str(answer)} | ({"id": name} if name else {})


def from_gsm8k(kind: Kind, row: Row, template: str) -> dict[str, Any]:
    question, answer = _field(row, "question"), _field(row, "answer")
    found = re.fullmatch(r".*####\s*(-?[\d,]+(?:\.\d+)?)\s*", str(answer), re.DOTALL)
    if not found:
        raise UserError(f"{row.where}: answer does not end with #### and a number; expected GSM8K's answers")
    return _asked(kind, template or MATH, question, "") | {"ground_truth": found[1].replace(",", "")}


def from_livecodebench(kind: Kind, row: Row, template: str) -> dict[str, Any]:
    question, day = _field(row, "question_content"), str(_field(row, "contest_date"))[:10]
    try:
        held = date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"{row.where}: contest_date is {day!r}, expected a date such as 2024-08-03") from error
    if (kind.first and held < date.fromisoformat(kind.first)) or (kind.last and held > date.fromisoformat(kind.last)):
        raise NotWantedError("outside the dates")
    starter = row.fields.get("starter_code") or ""
    tests = {name: _field(row, name) for name in ("public_test_cases", "private_test_cases")} | {"metadata": row.fields.get("metadata", {})}
    try:
        check_ground_truth(tests)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    kept = {name: row.fields[name] for name in ("contest_date", "difficulty", "platform", "question_title") if name in row.fields}
    asked = _asked(kind, template or (CALLS if starter else STDIN), question, starter)
    return asked | {"id": str(_field(row, "question_id")), "ground_truth": tests} | kept


KINDS = {
    "archer_code": Kind(from_archer, "code"),
    "archer_math": Kind(from_archer, "math"),
    "deepscaler": Kind(from_math, "math"),
    "gsm8k": Kind(from_gsm8k, "gsm8k"),
    "aime24": Kind(from_math, "aime2024", 30),
    "aime25": Kind(from_math, "aime2025", 30),
    "livecodebench": Kind(from_livecodebench, "livecodebench"),
    "livecodebench_v5": Kind(from_livecodebench, "livecodebench_v5", 279, "2024-08-01", "2025-02-01"),
    "livecodebench_v6": Kind(from_livecodebench, "livecodebench_v6", 131, "2025-02-01", "2025-05-01"),
}


def _field(row: Row, *names: str) -> Any:
    for name in names:
        if row.fields.get(name) not in (None, ""):
            return row.fields[name]
    raise UserError(f"{row.where}: the field {' or '.join(names)} is missing or empty; is this the data set that was named?")


def _aime_answer(answer: Any, row: Row) -> str:
    text = str(answer).strip()
    if not re.fullmatch(r"\d{1,3}", text):
        raise UserError(f"{row.where}: the answer is {text!r}, expected a whole number from 0 to 999, as all of AIME's are")
    return str(int(text))


def _asked(kind: Kind, template: str, question: str, starter: str) -> dict[str, Any]:
    content = template.format(question=question.strip(), starter_code=starter.strip("\n"))
    return {"prompt": [{"role": "user", "content": content}], "data_source": kind.source}


def prepare(kind: Kind, locations: list[str], template: str, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the rows to write, counting in `counts` those read and those left out."""
    places: dict[str, str] = {}
    for location in locations:
        for row in read_rows(location, "the fields of the named data set"):
            counts["read"] += 1
            try:
                made = kind.make(kind, row, template)
            except NotWantedError as reason:
                counts[str(reason)] = counts.get(str(reason), 0) + 1
                continue
            if name := made.get("id"):
                if name in places:
                    raise UserError(f"{row.where}: id {name!r} is also that of {places[name]}; name each file once")
                places[name] = row.where
            counts["written"] += 1
            yield made


def write(target: Path, rows: Iterator[dict[str, Any]], check: Callable[[], None]) -> None:
    """Write all rows, or nothing. check: called when all are written, before the file gets its name."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            check()
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("locations", nargs="+", metavar="LOCATION")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--template", type=Path, help="file with the user's message: {question}, and {starter_code} of LiveCodeBench")
    parser.add_argument("--any-count", action="store_true", help="accept another number of problems than the evaluation of that name has")
    options = parser.parse_args()
    kind, counts = KINDS[options.kind], {"read": 0, "written": 0}

    def check_count() -> None:
        if not counts["written"]:
            raise UserError(f"none of {counts['read']} rows is wanted; is this the data set that was named?")
        if kind.count and counts["written"] != kind.count and not options.any_count:
            raise UserError(
                f"{options.kind} has {kind.count} problems, here are {counts['written']} of {counts['read']} rows; name all of its files, "
                "or give --any-count"
            )

    try:
        if options.to.exists():
            raise UserError(f"{options.to} exists; remove it, or choose another name")
        template = options.template.read_text(encoding="utf-8") if options.template else ""
        if template:
            _check_template(template)
        write(options.to, prepare(kind, options.locations, template, counts), check_count)
    except (UserError, OSError) as error:
        parser.exit(2, f"prepare_data: error: {error}\n")
    print(json.dumps(counts))


def _check_template(template: str) -> None:
    try:
        filled = template.format(question="\x00", starter_code="")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"the template is not of the form that str.format takes ({error!r}); double the braces that are text") from error
    if "\x00" not in filled:
        raise UserError("the template has no {question}; add it")


if __name__ == "__main__":
    main()
