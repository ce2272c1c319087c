"""Watchers as processes: each checkpoint is evaluated once, whichever is killed. Their children are quick here and real in tests/e2e."""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_aspo.commands.watch import TRIES, Watcher, candidates, child_command, log_result, run_watch
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_config
from megatron_aspo.observe.trackers import TRACKERS
from tests.unit.test_docs import QUICKSTART
from tests.unit.test_packaging import ROOT

COUNT = 10
EVALUATION = """
import json, os, sys, time
from pathlib import Path
name, out, log, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])

def note(what):
    with open(log, "a") as file:
        file.write(f"{what} {name}\\n")

note("started")
time.sleep(seconds)
out.mkdir(parents=True)
metrics = {"avg@2": {"mean": int(name.removeprefix("step_")) / 100, "low": 0.0, "high": 1.0}}
result = {"problems": 3, "metrics": metrics, "tokens_mean": 5.0, "truncated_share": 0.5, "repetition_share": 0.0}
(out / "unfinished").write_text(json.dumps({"protocol": "p", "model": {"sha256": "m"}, "result": result}))
os.rename(out / "unfinished", out / "result.json")
note("finished")
"""
WATCHER = """
import sys, time
from pathlib import Path
from megatron_aspo.commands.watch import Watcher
directory, seconds = Path(sys.argv[1]), sys.argv[2]
command = lambda candidate, out: [sys.executable, directory / "evaluation.py", candidate.name, out, directory / "log", seconds]
def on_result(step, result):
    with open(directory / "reported", "a") as file:
        file.write(f"{step}\\n")
watcher = Watcher(directory / "run", directory / "out", command, on_result)
while len(list((directory / "out").glob("step_*/result.json"))) < len(list((directory / "run").iterdir())):
    watcher.look()
    time.sleep(0.02)
watcher.look()
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "evaluation.py").write_text(EVALUATION)
    for step in range(1, COUNT + 1):
        make_hugging_face(tmp_path / "run" / f"step_{step}")
    return tmp_path


def make_hugging_face(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")


def start(directory, seconds):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", WATCHER, str(directory), str(seconds)], env=environment, start_new_session=True)


def log(directory, what):
    path = directory / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(int(line.rpartition("_")[2]) for line in lines if line.startswith(what))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def finish(directory, *watchers):
    for watcher in watchers:
        assert watcher.wait(120) == 0
    every = list(range(1, COUNT + 1))
    assert log(directory, "finished") == every
    rows = list(csv.DictReader((directory / "out" / "results.csv").open()))
    assert [int(row["step"]) for row in rows] == every and [float(row["avg@2"]) for row in rows] == [step / 100 for step in every]
    return every


def test_two_watchers_evaluate_each_checkpoint_once(directory):
    every = finish(directory, start(directory, 0.1), start(directory, 0.1))
    assert log(directory, "started") == every
    assert sorted(map(int, (directory / "reported").read_text().split())) == every


def test_the_evaluation_of_a_killed_watcher_finishes_and_the_other_takes_the_rest(directory):
    first, second = start(directory, 0.2), start(directory, 0.2)
    wait_for(lambda: len(log(directory, "started")) >= 3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    every = finish(directory, second)
    assert log(directory, "started") == every and set(map(int, (directory / "reported").read_text().split())) == set(every)


def test_an_evaluation_whose_watcher_was_killed_is_not_started_twice(tmp_path):
    (tmp_path / "evaluation.py").write_text(EVALUATION)
    make_hugging_face(tmp_path / "run" / "step_1")
    first = start(tmp_path, 1.5)
    wait_for(lambda: log(tmp_path, "started"))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert start(tmp_path, 1.5).wait(60) == 0
    assert log(tmp_path, "started") == log(tmp_path, "finished") == [1]
    assert (tmp_path / "reported").read_text() == "1\n"


def test_an_evaluation_that_is_killed_with_its_watcher_is_repeated(directory):
    first, second = start(directory, 0.2), start(directory, 0.2)
    wait_for(lambda: len(log(directory, "started")) >= 3)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    every = finish(directory, second)
    assert sorted(set(log(directory, "started"))) == every and len(log(directory, "started")) <= COUNT + 1


def test_a_checkpoint_that_fails_is_tried_three_times_and_named(tmp_path, capfd):
    make_hugging_face(tmp_path / "run" / "step_4")
    watcher = Watcher(tmp_path / "run", tmp_path / "out", lambda candidate, out: [sys.executable, "-c", "raise SystemExit(7)"], print)
    assert [watcher.look() for _ in range(TRIES + 1)] == [[], [], ["step_4"], ["step_4"]]
    assert capfd.readouterr().out.count("exit status 7") == TRIES
    assert (tmp_path / "out" / "step_4.failures").read_text() == "exit status 7\n" * TRIES


def test_an_evaluation_that_exits_0_without_a_result_has_failed(tmp_path):
    make_hugging_face(tmp_path / "run" / "step_4")
    Watcher(tmp_path / "run", tmp_path / "out", lambda candidate, out: ["true"], print).look()
    assert (tmp_path / "out" / "step_4.failures").read_text() == "exit status 0\n"


STAGE = """
import sys
from pathlib import Path
out, stage = Path(sys.argv[1]), sys.argv[2]
out.mkdir(parents=True, exist_ok=True)
with open(out / "log", "a") as file:
    file.write(stage + "\\n")
if stage == "generate":
    (out / "generated").touch()
else:
    metrics = '{"avg@2": {"mean": 0.5, "low": 0.0, "high": 1.0}}'
    result = '{"problems": 3, "metrics": ' + metrics + ', "tokens_mean": 5.0, "truncated_share": 0.5, "repetition_share": 0.0}'
    (out / "result.json").write_text('{"protocol": "p", "model": {"sha256": "m"}, "result": ' + result + "}")
"""


def test_one_watcher_generates_and_another_grades_without_the_checkpoints(tmp_path):
    for step in (3, 20):
        make_hugging_face(tmp_path / "run" / f"step_{step}")
    reported = []

    def watcher(stage: str, directory: Path) -> Watcher:
        command = lambda candidate, out: [sys.executable, "-c", STAGE, str(out), stage]  # noqa: E731
        return Watcher(directory, tmp_path / "out", command, lambda step, result: reported.append(step), stage)

    graders = watcher("grade", tmp_path / "nowhere")
    assert graders.look() == [] and not [*(tmp_path / "out").glob("step_*/")]  # nothing is generated yet
    generators = watcher("generate", tmp_path / "run")
    assert [generators.look(), generators.look()] == [[], []] and reported == []
    assert [graders.look(), graders.look()] == [[], []] and reported == [3, 20]
    assert generators.look() == []
    assert [(tmp_path / "out" / f"step_{step}" / "log").read_text().split() for step in (3, 20)] == [["generate", "grade"]] * 2


def test_only_complete_checkpoints_are_candidates_each_step_once(tmp_path):
    for name in ("checkpoints/step_2", "checkpoints/step_10"):
        (tmp_path / name / "huggingface").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_12.unfinished-host-1").mkdir()
    make_hugging_face(tmp_path / "exports" / "step_10")
    make_hugging_face(tmp_path / "global_step_30")
    (tmp_path / "global_step_40").mkdir()  # still empty
    make_hugging_face(tmp_path / "step_50")
    (tmp_path / "step_50" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}')
    (tmp_path / "step_50" / "x-1.safetensors").write_bytes(b"")
    found = {candidate.step: str(candidate.path.relative_to(tmp_path)) for candidate in candidates(tmp_path)}
    assert found == {2: "checkpoints/step_2", 10: "exports/step_10", 30: "global_step_30"}
    (tmp_path / "step_50" / "x-2.safetensors").write_bytes(b"")
    assert [candidate.step for candidate in candidates(tmp_path)] == [2, 10, 30, 50]


def parsed(**values):
    defaults = {"protocol": "", "recipe": None, "data": [], "overrides": [], "out": None, "stage": "all", "against": None}
    return argparse.Namespace(**defaults | {"ray_address": "", "accept_count": False, "once": True, "model": ""} | values)


def test_a_child_gets_the_watchers_arguments(tmp_path):
    make_hugging_face(tmp_path / "step_3")
    given = parsed(protocol="aime24", data=["a", "b"], overrides=["samples=4"], accept_count=True)
    words = child_command(given, candidates(tmp_path)[0], tmp_path / "out" / "step_3")
    head = [sys.executable, "-m", "megatron_aspo", "eval", str(tmp_path / "step_3"), "--out", str(tmp_path / "out" / "step_3")]
    assert words == [*head, "--stage", "all", "--protocol", "aime24", "--data", "a", "b", "--set", "samples=4", "--accept-count"]


def test_an_evaluation_is_logged_to_the_trackers_of_the_training_run(tmp_path, monkeypatch):
    logged = []

    class Tracker:
        def __init__(self, run):
            self.run = run

        def log(self, step, metrics):
            logged.append((self.run.name, self.run.directory, self.run.trains, step, metrics))

        def close(self):
            logged.append("closed")

    monkeypatch.setitem(TRACKERS, "ours", Tracker)
    config = load_config(QUICKSTART, ["observe.trackers=[ours]", "name=addition"])
    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    log_result(config, tmp_path, 12, {"protocol": "aime24", "result": {"metrics": {"avg@32": estimate}, "truncated_share": 0.125}})
    metrics = {"val/aime24/avg@32": 0.5, "val/aime24/avg@32/low": 0.25, "val/aime24/avg@32/high": 0.75, "val/aime24/truncated_share": 0.125}
    assert logged == [("addition", tmp_path, False, 12, metrics), "closed"]


def test_mistakes_are_refused_before_the_wait(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        run_watch(parsed(target=str(tmp_path / "none"), protocol="aime24"))
    with pytest.raises(UserError, match="unknown key sample; did you mean samples"):
        run_watch(parsed(target=str(tmp_path), protocol="aime24", overrides=["sample=4"]))
    with pytest.raises(UserError, match="leave --against out"):
        run_watch(parsed(target=str(tmp_path), protocol="aime24", against=tmp_path))


def test_a_directory_without_checkpoints_ends_at_once(tmp_path, capsys):
    assert run_watch(parsed(target=str(tmp_path), protocol="aime24")) == 0
    assert capsys.readouterr().out == f"{tmp_path}/evaluations/aime24/results.csv: 0 evaluations\n"
