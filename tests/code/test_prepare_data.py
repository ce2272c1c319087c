"""From raw files to graded responses: tools/prepare_data.py, megatron-aspo data, megatron-aspo grade."""

import base64
import json
import pickle
import shutil
import zlib

import pytest

from megatron_aspo.cli import main
from tests.dataset_fixtures import COUNT, FIXTURES, asked, save_lines, save_parquet
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import save_byte_tokenizer
from tools.prepare_data import main as prepare

BOXED = """
import re
def boxed(prompt, response, ground_truth, extra):
    found = re.findall(r"boxed{(.*?)}", response)
    return float(bool(found) and found[-1] == ground_truth)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory)
    save_byte_tokenizer(directory)
    return directory


def run_prepare(directory, kind, *words):
    return run_main(prepare, kind, *words, "--to", "made.jsonl", cwd=directory)


@pytest.mark.parametrize("fixture", FIXTURES, ids=[f"{fixture.kind} {fixture.save.__name__}" for fixture in FIXTURES])
def test_thirty_problems_go_from_raw_file_to_graded_responses(tmp_path, model, sandboxed, fixture):
    fixture.save(tmp_path / "raw", fixture.rows)
    any_count = ["--any-count"] if fixture.source == "livecodebench_v5" else []
    done = run_prepare(tmp_path, fixture.kind, "raw", *any_count)
    assert (done.returncode, done.stderr) == (0, "")
    left_out = {"outside the dates": 5} if len(fixture.rows) > COUNT else {}
    assert json.loads(done.stdout) == {"read": len(fixture.rows), "written": COUNT, **left_out}
    rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]

    reward = "code" if fixture.reward == "code" else "my_boxed:boxed"
    (tmp_path / "my_boxed.py").write_text(BOXED)
    shown = run_main(main, "data", "made.jsonl", "--model", model, "--reward", reward, "--json", cwd=tmp_path)
    (part,) = json.loads(shown.stdout)["splits"]["train"]
    assert part["sources"] == [{"name": fixture.source, "prompts": COUNT, "reward": reward}]

    responses = []
    for n, row in enumerate(rows):
        kept = {name: row[name] for name in ("prompt", "ground_truth", "data_source")}
        responses += [kept | {"response": fixture.right(n)}, kept | {"response": fixture.right(n + 2)}]
    save_lines(tmp_path / "responses.jsonl", responses)
    graded = run_main(main, "grade", "responses.jsonl", "--reward", reward, cwd=tmp_path)
    scores = [json.loads(line)["score"] for line in graded.stdout.splitlines()[:-1]]
    assert scores == [1.0, 0.0] * COUNT


def test_a_report_shows_prompts_with_their_special_tokens_and_each_source(tmp_path, model):
    train = [{"prompt": asked(f"Number {n}"), "answer": n, "data_source": "livecodebench_v6" if n % 3 else "math"} for n in range(10)]
    train = [row | {"answer": {"functional": "assert f()"}} for row in train]
    save_parquet(tmp_path / "train.parquet", train)
    save_lines(tmp_path / "held.jsonl", train[3:4])
    words = ["data", "train.parquet", "--held-out", "held.jsonl", "--model", model]
    done = run_main(main, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:9] == [
        "training prompts: 10",
        "  train.parquet: 10",
        lines[2],
        "    data_source livecodebench_v6: 6; reward: code",
        "    data_source math: 4; reward: math",
        "held-out prompts: 1",
        "  held.jsonl: 1",
        lines[7],
        "    data_source math: 1; reward: math",
    ]
    assert lines[2].startswith("    tokens of a prompt: shortest ")
    assert lines[9] == "data: 1 held-out prompts have the text of a training prompt, such as held.jsonl:1 and train.parquet row 4"
    assert done.stdout.count("--- prompt ") == 3 and "<user>Number 0</s><assistant>" in done.stdout
    assert '--- ground truth: {"functional": "assert f()"}' in done.stdout
    recipe = (
        f"model: {model}\ntask: dataset\ndata: {{path: train.parquet, eval_path: held.jsonl, reward: 'a:b', system_prompt: Be brief.}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = run_main(main, "data", "--recipe", "recipe.yaml", "--prompts", "1", "--set", "data.max_prompt_tokens=100", cwd=tmp_path)
    assert "reward: a:b" in done.stdout and "<system>Be brief.</s><user>Number 0" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data"], "there is no data; name files"),
        (["data", "none.jsonl", "--model", "MODEL"], "none.jsonl cannot be read (no such file or directory)"),
        (["data", "train.jsonl"], "name it with --model"),
        (["data", "train.jsonl", "--set", "seed=3"], "seed=3 changes a recipe, and there is none"),
        (["data", "train.jsonl", "--model", "MODEL", "--reward", "code"], "train.jsonl:1: ground_truth is no known form of tests"),
    ],
)
def test_an_impossible_report_is_refused_with_the_reason(tmp_path, model, words, message):
    save_lines(tmp_path / "train.jsonl", [{"prompt": "x", "answer": 1}])
    done = run_main(main, *(str(model) if word == "MODEL" else word for word in words), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gsm8k", {"answer": "It is 7."}, "raw:1: answer does not end with #### and a number"),
        ("gsm8k", {"question": None}, "raw:1: the field question is missing or empty"),
        ("aime24", {"Answer": "1000"}, "raw:1: the answer is '1000', expected a whole number from 0 to 999"),
        ("aime25", {"problem": ""}, "raw:1: the field problem or Problem or question is missing or empty"),
        ("livecodebench_v5", {"contest_date": "soon"}, "raw:1: contest_date is 'soon', expected a date"),
        ("livecodebench_v5", {"private_test_cases": "words"}, "raw:1: ground_truth is a string that is neither JSON nor"),
        (
            "livecodebench_v5",
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
            "raw:1: ground_truth has packed tests that hold the pickle instruction",
        ),
        ("livecodebench_v5", {"question_id": None}, "raw:1: the field question_id is missing or empty"),
        ("archer_code", {"reward_model": {"ground_truth": "{}"}}, "raw row 1: ground_truth is no known form of tests"),
        ("archer_math", {"reward_model": {"ground_truth": [1]}}, "raw row 1: the ground truth is a list"),
    ],
)
def test_a_row_of_another_schema_is_refused_naming_its_line_and_leaves_no_file(tmp_path, kind, change, message):
    fixture = next(fixture for fixture in FIXTURES if fixture.kind == kind)
    fixture.save(tmp_path / "raw", [fixture.rows[0] | change])
    done = run_prepare(tmp_path, kind, "raw", "--any-count")
    assert done.returncode == 2 and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_counts_duplicates_and_existing_files_are_checked(tmp_path):
    fixture = next(fixture for fixture in FIXTURES if fixture.kind == "aime24")
    fixture.save(tmp_path / "raw", fixture.rows[:-1])
    assert "aime24 has 30 problems, here are 29 of 29 rows" in run_prepare(tmp_path, "aime24", "raw").stderr
    assert "id '0' is also that of raw:1" in run_prepare(tmp_path, "aime24", "raw", "./raw").stderr
    assert not (tmp_path / "made.jsonl").exists()
    assert run_prepare(tmp_path, "aime24", "raw", "--any-count").returncode == 0
    assert "made.jsonl exists" in run_prepare(tmp_path, "aime24", "raw", "--any-count").stderr


def test_a_template_replaces_the_message(tmp_path):
    fixture = next(fixture for fixture in FIXTURES if fixture.kind == "gsm8k")
    fixture.save(tmp_path / "raw", fixture.rows)
    (tmp_path / "template").write_text("Q: {question} A:")
    assert run_prepare(tmp_path, "gsm8k", "raw", "--template", "template").returncode == 0
    row = json.loads((tmp_path / "made.jsonl").read_text().splitlines()[3])
    assert row == {"prompt": asked("Q: What is 3 + 7? A:"), "data_source": "gsm8k", "ground_truth": "10"}
    (tmp_path / "made.jsonl").unlink()
    (tmp_path / "template").write_text("{quest}")
    assert "is not of the form that str.format takes" in run_prepare(tmp_path, "gsm8k", "raw", "--template", "template").stderr
    (tmp_path / "template").write_text("Q:")
    assert "the template has no {question}" in run_prepare(tmp_path, "gsm8k", "raw", "--template", "template").stderr


def test_both_ends_of_a_window_are_inclusive(tmp_path):
    fixture = next(fixture for fixture in FIXTURES if fixture.kind == "livecodebench_v5")
    days = ("2024-07-31", "2024-08-01", "2025-02-01", "2025-02-02")
    fixture.save(tmp_path / "raw", [fixture.rows[n] | {"contest_date": f"{day}T23:59:00"} for n, day in enumerate(days)])
    done = run_prepare(tmp_path, "livecodebench_v5", "raw", "--any-count")
    assert json.loads(done.stdout) == {"read": 4, "written": 2, "outside the dates": 2}
    assert [json.loads(line)["contest_date"][:10] for line in (tmp_path / "made.jsonl").read_text().splitlines()] == [*days[1:3]]


def test_a_report_refuses_the_token_that_a_run_refuses(tmp_path, model):
    """The model has the number of rows in config.json, whatever the tokenizer has."""
    small = tmp_path / "small"
    shutil.copytree(model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    save_lines(tmp_path / "train.jsonl", [{"prompt": "words", "answer": 1}])
    done = run_main(main, "data", "train.jsonl", "--model", small, cwd=tmp_path)
    assert done.returncode == 2 and "train.jsonl:1: token" in done.stderr and "the model has 20 rows" in done.stderr
    (small / "config.json").write_text("{}")
    assert "has no readable vocab_size" in run_main(main, "data", "train.jsonl", "--model", small, cwd=tmp_path).stderr
