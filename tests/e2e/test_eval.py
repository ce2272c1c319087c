"""megatron-aspo eval with real engines: it reproduces training's evaluations, however often it is killed, in one run or by stages."""

import csv
import json
import signal

import pyarrow.parquet as parquet
import pytest

from megatron_aspo.evaluation.records import read_responses
from tests.e2e.workplace import RUN_S, STEPS, start_command, wait_for

pytestmark = pytest.mark.long
ONE_BY_ONE = ["--set", "part_problems=1"]


def run_eval(workplace, *words):
    process = start_command(workplace, "eval", *words)
    out, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def responses(out):
    return [response for path in sorted(out.glob("parts/part_*.parquet")) for response in read_responses(path)]


@pytest.fixture(scope="module")
def checkpoint(whole):
    return str(whole / "checkpoints" / f"step_{STEPS}")


@pytest.fixture(scope="module")
def undisturbed(workplace, checkpoint):
    """Return an evaluation in parts of one problem."""
    out = workplace / "undisturbed"
    return run_eval(workplace, checkpoint, "--out", str(out), *ONE_BY_ONE), responses(out)


def test_a_saved_checkpoint_gives_every_token_and_score_that_the_live_engines_gave(workplace, whole, checkpoint):
    """Trained by off-policy updates, deterministic, float32, two engines: the run's last evaluation against its checkpoint's."""
    result = run_eval(workplace, checkpoint, "--out", str(workplace / "saved"))
    live, saved = read_responses(whole / "evaluations" / f"step_{STEPS}.parquet"), responses(workplace / "saved")
    assert len(live) == 8 and len({tuple(response.response_ids) for response in live}) > 4
    assert saved == live
    before = read_responses(whole / "evaluations" / "step_0.parquet")
    assert [r.seed for r in before] == [r.seed for r in live] and [r.response_ids for r in before] != [r.response_ids for r in live]
    recorded = json.loads((whole / "evaluations" / f"step_{STEPS}.json").read_text())["accuracy"]["mean"]
    assert result["metrics"]["avg@2"]["mean"] == pytest.approx(recorded, abs=1e-12)
    assert not (workplace / "saved" / "model").exists()


def test_an_evaluation_that_is_killed_and_graded_by_another_process_equals_the_undisturbed_one(workplace, checkpoint, undisturbed):
    out = workplace / "killed"
    words = ["eval", checkpoint, "--out", str(out), *ONE_BY_ONE, "--stage", "generate"]
    process = start_command(workplace, *words)
    wait_for(process, lambda: list(out.glob("parts/part_*.parquet")))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=RUN_S)
    grade = start_command(workplace, "eval", checkpoint, "--out", str(out), *ONE_BY_ONE, "--stage", "grade")
    assert "parts of" in grade.communicate(timeout=RUN_S)[1] and grade.returncode == 1
    written = {path.name: path.read_bytes() for path in out.glob("parts/part_*.parquet")}
    assert 0 < len(written) < 4
    process = start_command(workplace, *words)
    _, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error
    assert all((out / "parts" / name).read_bytes() == content for name, content in written.items())
    assert parquet.read_table(out / "parts").column("score").null_count == 8 - 2 * len(written)
    result = run_eval(workplace, checkpoint, "--out", str(out), *ONE_BY_ONE, "--stage", "grade")
    assert responses(out) == undisturbed[1]
    assert {**result, "out": ""} == {**undisturbed[0], "out": ""}


def test_a_comparison_of_two_evaluations_is_paired_and_needs_no_engine(workplace, checkpoint, undisturbed):
    out = str(workplace / "undisturbed")
    again = run_eval(workplace, checkpoint, "--out", out, *ONE_BY_ONE, "--against", out)
    assert again["difference"]["avg@2"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "better": 0, "worse": 0}


@pytest.mark.nightly
def test_a_watcher_evaluates_existing_checkpoints_as_the_command_does(workplace, checkpoint, undisturbed):
    watched = workplace / "watched"
    watched.mkdir()
    (watched / f"step_{STEPS}").symlink_to(checkpoint)
    words = ["eval", str(watched), "--watch", "--once", "--recipe", "recipe.yaml", *ONE_BY_ONE]
    process = start_command(workplace, *words)
    out, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0 and out.splitlines()[-1].endswith("results.csv: 1 evaluations"), error
    assert responses(watched / "evaluations" / "held_out" / f"step_{STEPS}") == undisturbed[1]
    (row,) = csv.DictReader((watched / "evaluations" / "held_out" / "results.csv").open())
    assert float(row["avg@2"]) == undisturbed[0]["metrics"]["avg@2"]["mean"] and row["step"] == str(STEPS)


@pytest.mark.nightly
def test_watchers_that_generate_and_grade_separately_give_the_results_of_one(workplace, checkpoint, undisturbed):
    """The grader sees only the evaluations: the checkpoint is gone by then."""
    watched, out = workplace / "apart", workplace / "apart_evaluations"
    watched.mkdir()
    (watched / f"step_{STEPS}").symlink_to(checkpoint)
    words = ["eval", str(watched), "--watch", "--once", "--recipe", "recipe.yaml", "--out", str(out), *ONE_BY_ONE]
    generating = start_command(workplace, *words, "--stage", "generate")
    output, error = generating.communicate(timeout=RUN_S)
    assert generating.returncode == 0 and output.splitlines()[-1] == f"{out}: 1 generated", error
    (watched / f"step_{STEPS}").unlink()
    watched.rmdir()
    grading = start_command(workplace, *words, "--stage", "grade")
    output, error = grading.communicate(timeout=RUN_S)
    assert grading.returncode == 0 and output.splitlines()[-1].endswith("results.csv: 1 evaluations"), error
    assert responses(out / f"step_{STEPS}") == undisturbed[1]
