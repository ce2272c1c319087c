"""`metrics.jsonl`: a line is on disk once it is written, and holds only finite numbers."""

import math
import os

import pytest

from megatron_aspo.observe.metrics import MetricsFile, read_metrics


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_by_name_and_writes_nothing(tmp_path, value):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 0, "reward/mean": 0.5})
    with pytest.raises(ValueError, match=f"train/loss is {value}"):
        file.write({"step": 1, "train/loss": value})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.5}]


def test_a_written_line_is_on_disk(tmp_path, monkeypatch):
    on_disk = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), on_disk.append(os.fstat(number).st_size)))
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(2):
        file.write({"step": step})
        assert on_disk and on_disk[-1] == path.stat().st_size
    file.close()
