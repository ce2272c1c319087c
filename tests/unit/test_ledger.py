"""The ledger: append-only, whole lines, and their meaning once a run was resumed."""

import os

import pytest

from megatron_aspo.runtime.ledger import Ledger, history, read_ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_lines_come_back_in_order_across_processes(path):
    for process in range(3):
        ledger = Ledger(path)
        assert ledger.lines == process
        ledger.append("drawn", step=process, first=4 * process, count=4)
        assert ledger.lines == process + 1
        ledger.close()
    assert [event["step"] for event in read_ledger(path)] == [0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"event": "tra', b'{"event": "trained", "step": 1}'])
def test_a_line_that_a_kill_truncated_is_removed(path, torn):
    ledger = Ledger(path)
    ledger.append("start", step=0)
    ledger.close()
    with path.open("ab") as file:
        file.write(torn)
    assert [event["event"] for event in read_ledger(path)] == ["start"]
    ledger = Ledger(path)
    ledger.append("resume", step=0)
    ledger.close()
    assert [event["event"] for event in read_ledger(path)] == ["start", "resume"]


def test_repeated_steps_count_once():
    def trained(step: int, mark: str) -> dict:
        return {"event": "trained", "step": step, "mark": mark}

    events = [
        {"event": "start", "step": 0},
        trained(0, "a"),
        trained(1, "a"),
        trained(2, "a"),
        {"event": "checkpoint", "name": "step_2"},
        {"event": "resume", "step": 2},
        trained(2, "b"),
        trained(3, "b"),
        {"event": "resume", "step": 3},
        trained(3, "c"),
    ]
    assert {step: event["mark"] for step, event in history(events).items()} == {0: "a", 1: "a", 2: "b", 3: "c"}
    assert history([*events, {"event": "start", "step": 0}]) == {}


def test_a_line_is_on_the_disk_when_it_is_appended(path, monkeypatch):
    ledger = Ledger(path)
    on_disk = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), on_disk.append(os.fstat(number).st_size)))
    for step in range(2):
        ledger.append("drawn", step=step)
        assert on_disk and on_disk[-1] == path.stat().st_size
    ledger.close()
