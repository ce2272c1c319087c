"""megatron-aspo grade: rows in, scores out, errors with file and line."""

import gzip
import json
import signal

import pytest

from megatron_aspo.cli import main
from megatron_aspo.commands.grade import read_responses
from megatron_aspo.common.errors import UserError

PROGRAM = "Here:\n```python\nprint(int(input()) + 1)\n```"
TESTS = [{"input": "1\n", "output": "2\n", "testtype": "stdin", "metadata": {}}]
RECIPE = "task: dataset\nmodel: nowhere\ndata: {path: train.jsonl, reward: code, code: {limits: {cpu_s: 2, wall_s: 10}}}\n"


@pytest.fixture
def grade(tmp_path, capsys, monkeypatch):
    """Run the command on rows, or on the text of a file. Return the status, the objects it printed, and its error."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps handling interrupts
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments: str):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(SystemExit) as end:
            main(["grade", "in.jsonl", *arguments])
        captured = capsys.readouterr()
        return end.value.code, [json.loads(line) for line in captured.out.splitlines()], captured.err.strip()

    return run


def test_code_and_numbers_by_their_data_source(grade, sandboxed):
    rows = [
        {"response": PROGRAM, "ground_truth": TESTS, "data_source": "livecodebench_v5"},
        {
            "response": PROGRAM.replace("+ 1", "+ 2"),
            "ground_truth": json.dumps(TESTS),
            "data_source": "code",
            "prompt": "Add one.",
            "extra": {"a": 1},
        },
        {"response": "no code", "ground_truth": TESTS, "data_source": "code", "prompt": [{"role": "user", "content": "Add one."}]},
        {"response": "It is 7.", "ground_truth": 7, "data_source": "single_digit_addition"},
    ]
    status, lines, error = grade(rows)
    assert (status, error) == (0, "")
    assert [(line["score"], line["verdict"]) for line in lines[:-1]] == [
        (1.0, "passed"),
        (0.0, "wrong answer"),
        (0.0, "no code"),
        (1.0, "right"),
    ]
    assert all(set(line) == {"score", "verdict", "reason", "seconds"} for line in lines[:-1])
    summary = lines[-1]["summary"]
    assert (summary["responses"], summary["mean_score"]) == (4, 0.5)
    assert summary["verdicts"] == {"passed": 1, "wrong answer": 1, "no code": 1, "right": 1}


def test_grade_uses_the_reward_of_a_recipe(grade, sandboxed, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [{"response": PROGRAM, "ground_truth": TESTS, "data_source": "anything"}]
    status, lines, error = grade(rows, "data.code.max_tests=1", "--recipe", "recipe.yaml")
    assert (status, error, lines[0]["verdict"]) == (0, "", "passed")


def test_grade_uses_a_custom_reward(grade, tmp_path):
    (tmp_path / "my_graded_reward.py").write_text(
        "def f(prompt, response, truth, extra):\n    return {'score': extra['x'], 'reason': prompt}\n"
    )
    rows = [{"response": "", "ground_truth": None, "data_source": "mine", "prompt": "p", "extra": {"x": 0.25}}]
    status, lines, error = grade(rows, "--reward", "my_graded_reward:f")
    assert (status, error) == (0, "")
    assert (lines[0]["score"], lines[0]["reason"]) == (0.25, "p")


def test_a_reward_that_hangs_or_crashes_fails_one_response(grade, tmp_path):
    (tmp_path / "my_stuck_reward.py").write_text(
        "import os, time\ndef f(prompt, response, truth, extra):\n    if response == 'hang':\n        time.sleep(600)\n"
        "    if response == 'crash':\n        os._exit(3)\n    return {'score': 1, 'verdict': ['odd', {}]}\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "task: dataset\nmodel: nowhere\ndata: {path: train.jsonl, reward: 'my_stuck_reward:f', reward_timeout_s: 1, reward_failure_score: -1}\n"
    )
    rows = [{"response": text, "ground_truth": None, "data_source": "mine"} for text in ("a", "hang", "crash", "b")]
    status, lines, error = grade(rows, "--recipe", "recipe.yaml")
    assert (status, error) == (0, "")
    assert [(line["score"], line["verdict"]) for line in lines[:-1]] == [
        (1.0, '["odd", {}]'),
        (-1.0, "timeout"),
        (-1.0, "crash"),
        (1.0, '["odd", {}]'),
    ]
    assert lines[-1]["summary"]["verdicts"] == {'["odd", {}]': 2, "timeout": 1, "crash": 1}


def test_files_are_read_as_in_a_run(tmp_path):
    path = tmp_path / "in.jsonl"
    row = json.dumps({"response": "It is 7.", "ground_truth": 7, "data_source": "single_digit_addition"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row)
    assert [row.response for _, row in read_responses(path)] == ["It is 7."]
    for content, message in (
        (gzip.compress(row), "gunzip"),
        (row[:14] + b"\xff" + row[14:], "in.jsonl:1: byte 15 of the line is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_responses(path))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("not JSON\n", (), "in.jsonl:1: not valid JSON"),
        ("\n[1]\n", (), "in.jsonl row 1: a JSON number"),
        ('{"response": "x", "ground_truth": 1}\n', (), "in.jsonl:1: the field data_source is missing"),
        ('{"response": 1, "ground_truth": 1, "data_source": "code"}\n', (), "in.jsonl:1: response is a int"),
        ('{"response": "x", "ground_truth": 1, "data_source": "other"}\n', (), "in.jsonl:1: data_source='other' names no reward"),
        ('{"response": "x", "ground_truth": 1, "data_source": "other"}\n', ("--reward", "nothing"), "--reward nothing is unknown"),
        ('{"response": "x", "ground_truth": 1, "data_source": "other"}\n', ("a=b",), "a=b changes a recipe"),
        (
            '{"response": "x", "ground_truth": 1, "data_source": "code", "prompt": [{"role": "user", "content": null}]}\n',
            (),
            "in.jsonl:1: the content of the last message is a NoneType",
        ),
    ],
)
def test_an_error_is_one_line_with_file_and_line_number(grade, text, arguments, message):
    status, _, error = grade(text, *arguments)
    assert status == 2 and len(error.splitlines()) == 1
    assert message in error


def test_a_faulty_ground_truth_is_named_with_file_and_line(grade, sandboxed):
    status, lines, error = grade([{"response": PROGRAM, "ground_truth": [], "data_source": "code"}])
    assert (status, lines) == (2, [])
    assert "in.jsonl:1: data.reward=code on prompt 1: ground_truth has no tests" in error
