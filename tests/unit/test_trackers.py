"""Trackers get every metric under its step, and a run goes on whatever one of them does. Their output is read back."""

import threading
import time

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_config
from megatron_aspo.observe import trackers
from megatron_aspo.observe.trackers import CHARTS, TRACKERS, TrackedRun, Trackers, check_packages
from tests.unit.test_docs import QUICKSTART, metric_names

STEPS = {
    1: {"reward/mean": 0.25, "train/updates": 2, "note": "text", "seconds/step": float("nan")},
    3: {"reward/mean": 0.5},
    2: {"avg@4": 1},
}


@pytest.fixture
def run(tmp_path):
    return TrackedRun("addition", tmp_path, "arithmetic", {"seed": 3, "rollout": {"engines": 2}})


def log_all(run, *names):
    lines = []
    tracked = Trackers(names, run, lines.append)
    for step, metrics in STEPS.items():
        tracked.log(step, metrics)
    tracked.close()
    return lines


def test_tensorboard_reads_back_every_number_under_its_step(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert log_all(run, "tensorboard") == []
    assert log_all(run, "tensorboard") == []  # a watcher adds to the same directory
    found = accumulator.EventAccumulator(str(run.directory / "tensorboard")).Reload()
    events = {tag: [(event.step, found_value(event)) for event in found.Tensors(tag)] for tag in found.Tags()["tensors"]}
    once = {"reward/mean": [(1, 0.25), (3, 0.5)], "train/updates": [(1, 2.0)], "avg@4": [(2, 1.0)]}
    once["00_overview/reward_mean"] = once["reward/mean"]
    assert {tag: sorted(set(points)) for tag, points in events.items()} == once


def found_value(event):
    (value,) = event.tensor_proto.float_val
    return value


def test_wandb_offline_keeps_run_id_steps_and_recipe(run, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    assert log_all(run, "wandb") == []
    (path,) = run.directory.glob("wandb/offline-run-*/*.wandb")
    history = []
    for data in leveldb_records(path.read_bytes()[7:]):  # after W&B's own header
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            assert (record.run.run_id, record.run.display_name, record.run.project) == ("addition", "addition", "arithmetic")
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history.append({name: float(value) for name, value in items.items() if not name.startswith("_")})
    first = {"global_step": 1, "reward/mean": 0.25, "train/updates": 2, "00_overview/reward_mean": 0.25}
    assert history == [first, {"global_step": 3, "reward/mean": 0.5, "00_overview/reward_mean": 0.5}, {"global_step": 2, "avg@4": 1}]


def leveldb_records(log):
    """Yield the records of a log: blocks of 32 KiB with fragments of (checksum, length, type), the first block 7 bytes shorter."""
    position, record = 0, b""
    while position + 7 <= len(log):
        if (left := 32768 - (position + 7) % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def test_mlflow_has_one_run_to_which_a_watcher_adds(run, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="its package pins an older cachetools than vLLM's set")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert log_all(run, "mlflow") == [] and log_all(run, "mlflow") == []
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("arithmetic").experiment_id])
    assert found.info.run_name == "addition" and found.info.status == "FINISHED"
    points = {(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "reward/mean")}
    assert points == {(1, 0.25), (3, 0.5)} and found.data.metrics["avg_at_4"] == 1


class Bad:
    """Records what it gets, then fails in the way that `how` names."""

    how, seen = "", []
    released = threading.Event()

    def __init__(self, run):
        if self.how == "init":
            raise ConnectionError("no route\nto host")

    def log(self, step, metrics):
        self.seen.append(step)
        if self.how == "log":
            raise SystemExit(3)
        if self.how == "hang":
            self.released.wait()

    def close(self):
        if self.how == "close":
            raise OSError("disk full")


class Good(Bad):
    seen = []  # noqa: RUF012


@pytest.mark.parametrize(
    ("how", "seen", "reason"),
    [("init", [], "ConnectionError: no route"), ("log", [1], "SystemExit: 3"), ("close", [1, 3, 2], "OSError: disk full")],
)
def test_a_failing_tracker_is_reported_once_and_the_others_go_on(run, monkeypatch, how, seen, reason):
    monkeypatch.setitem(TRACKERS, "bad", type("Named", (Bad,), {"how": how, "seen": []}))
    monkeypatch.setitem(TRACKERS, "good", type("Named", (Good,), {"seen": []}))
    (line,) = log_all(run, "bad", "good")
    assert line.startswith("tracker bad failed and is left out (") and reason in line and "\n" not in line
    assert TRACKERS["bad"].seen == seen and TRACKERS["good"].seen == [1, 3, 2]


def test_a_hanging_tracker_delays_no_step_and_the_end_only_by_its_limit(run, monkeypatch):
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.2)
    monkeypatch.setitem(TRACKERS, "bad", type("Named", (Bad,), {"how": "hang", "seen": []}))
    lines, started = [], time.monotonic()
    tracked = Trackers(["bad"], run, lines.append)
    for step in range(1000):
        tracked.log(step, {"reward/mean": 1.0})
    tracked.close()
    assert time.monotonic() - started < 10 and lines == [
        "tracker bad is not done after 0.2 s and is left behind; metrics.jsonl has everything"
    ]
    Bad.released.set()


def test_the_first_charts_are_a_dozen_metrics_that_runs_write():
    assert len(CHARTS) == 12 == len(set(CHARTS)) and set(CHARTS) <= metric_names()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["observe.trackers=[wandbb]"], "observe.trackers has wandbb, which is not known; did you mean wandb?"),
        (["observe.trackers=[wandb,wandb]"], "observe.trackers has wandb twice"),
        (["observe.project=mine"], "observe.project=mine has no effect without wandb or mlflow"),
    ],
)
def test_invalid_trackers_are_refused_at_the_start(overrides, message):
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, overrides)
    assert message in str(error.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(TRACKERS, "absent", type("Absent", (), {"package": "no_such_package"}))
    with pytest.raises(UserError, match=r"whose package no_such_package is not installed; pip install 'megatron_aspo\[trackers\]'"):
        check_packages(["absent"])
