"""Mistakes that `megatron-aspo eval` refuses before anything starts, and its report on stored responses."""

import fcntl
import json
from dataclasses import asdict, replace

import pytest

from megatron_aspo.cli import main
from megatron_aspo.common.options import build
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.evaluation.plan import EvalRecord
from megatron_aspo.evaluation.records import EvalResponse, write_responses
from tests.dataset_fixtures import asked, save_lines
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import save_byte_tokenizer

REWARD = "def score(prompt, response, ground_truth, extra):\n    return 1.0\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture
def directory(tmp_path, model):
    """Return a user's directory with a model, three problems and a reward."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    save_lines(tmp_path / "data.jsonl", [{"prompt": asked(f"{n}?"), "ground_truth": n, "id": f"q{n}"} for n in range(3)])
    return tmp_path


SMALL = ["--set", "samples=2", "temperature=1", "pass_at=[2]", "max_response_tokens=8", "data.max_prompt_tokens=64"]
OWN = ["--data", "data.jsonl", *SMALL, "data.reward=my_rewards:score"]


def run_eval(directory, *words):
    return run_main(main, "eval", *words, cwd=directory)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", *OWN], "an evaluation needs a directory to write; name it with --out"),
        (["model", "--out", "o", "--once", *OWN], "--once is about --watch; add that, or leave it out"),
        (["model", "--out", "o", "--protocol", "aime24", "--recipe", "r.yaml"], "both say what is asked; give one of the two"),
        (["model", "--out", "o", "--stage", "grade", *OWN], "has no responses to grade; generate them first with --stage generate"),
        (["model", "--out", "o", "--protocol", "archer_lcb_v6", *SMALL], "there are no problems; name their files with --data"),
        (["model", "--out", "o", "--data", "data.jsonl", *SMALL], "nothing says how responses are graded; set data.reward"),
        (["model", "--out", "o", "--data", "data.jsonl"], "is more than the 1024 positions of"),
        (["model", "--out", "o", "--protocol", "aime24", *SMALL, "majority_at=[32]"], "k=32 needs that many samples and there are 2"),
        (["model", "--out", "o", *OWN, "problems=30"], "this evaluation has 30 problems, here are 3 (3 rows read); name all files"),
        (["model", "--out", "o", *OWN, "data.chat_template_kwargs={x: 1}"], "data.chat_template_kwargs.x"),
        (["none", "--out", "o", *OWN], "model=none"),
        (["model", "--out", "o", *SMALL, "task=no_such_task"], "task=no_such_task is unknown"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(directory, words, message):
    done = run_eval(directory, *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_directory_in_use_is_refused(directory):
    (directory / "o").mkdir()
    with (directory / "o" / "grade.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run_eval(directory, "model", "--out", "o", *OWN)
    assert done.returncode == 2 and "is in use by another evaluation" in done.stderr


def make_evaluation(out, right, failure="", **changes):
    """Make a complete evaluation. right: for each problem, which samples are right."""
    values = {"samples": 2, "temperature": 1.0, "pass_at": [2], "max_response_tokens": 8, "part_problems": 2}
    settings = replace(build(EvalSettings, values), **changes)
    record = {"protocol": "own", "changed": {}, "settings": asdict(settings), "model": {"sha256": "m"}, "data": {"problems": len(right)}}
    EvalRecord(out).agree(record)
    one = EvalResponse(0, 0, "", "dataset", "?", [1], 0, "text", [5], 1, "stop")
    rows = [
        replace(
            one, position=n, index=i, problem=f"eval/q{n}", score=float(score), verdict="told", reason="", failure=failure, details="{}"
        )
        for n, scores in enumerate(right)
        for i, score in enumerate(scores)
    ]
    for number, start in enumerate(range(0, len(right), 2)):
        write_responses(out / "parts" / f"part_{number:05d}.parquet", [row for row in rows if start <= row.position < start + 2])


def report(out, against=None):
    """Report as the command does once everything is graded."""
    from megatron_aspo.evaluation import report as module
    from megatron_aspo.evaluation.plan import EvalPlan

    settings = build(EvalSettings, EvalRecord(out).read()["settings"])
    return module.report(out, EvalPlan("own", settings, {}), against)


def test_a_report_has_metrics_table_and_paired_difference(tmp_path, capsys):
    make_evaluation(tmp_path / "before", [(0, 0), (1, 0), (0, 0)])
    make_evaluation(tmp_path / "after", [(0, 1), (1, 1), (0, 0)])
    result = report(tmp_path / "after", tmp_path / "before")
    assert result["result"]["metrics"]["avg@2"]["mean"] == 0.5
    assert json.loads((tmp_path / "after" / "result.json").read_text()) == result
    assert len((tmp_path / "after" / "problems.csv").read_text().splitlines()) == 4
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["difference"]["avg@2"]["mean"] == pytest.approx(1 / 3) and line["difference"]["avg@2"]["better"] == 2
    assert line["difference"]["pass@2"]["mean"] == pytest.approx(1 / 3)


def test_a_report_is_refused_while_responses_are_missing_or_when_the_reward_failed_on_all(tmp_path):
    from megatron_aspo.common.errors import UserError

    make_evaluation(tmp_path / "o", [(0, 0), (1, 0), (0, 0)])
    (tmp_path / "o" / "parts" / "part_00001.parquet").unlink()
    with pytest.raises(UserError, match="is not complete; run it again with the same values"):
        report(tmp_path / "o")
    make_evaluation(tmp_path / "failed", [(0, 0), (0, 0)], failure="timeout")
    with pytest.raises(UserError, match="the reward timed out or crashed on all of 4 responses"):
        report(tmp_path / "failed")
    make_evaluation(tmp_path / "whole", [(0, 0), (1, 0)])
    with pytest.raises(UserError, match="is no evaluation's directory"):
        report(tmp_path / "whole", tmp_path / "none")
