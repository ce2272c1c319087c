"""The last lines of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_aspo.config import Config
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.runtime.summary import print_summary

STEP = {"train/updates": 2, "train/skipped_updates": 0, "train/gradient_norm_max": 0.5, "groups/dropped": 0}
NONE = {"train/updates": 0, "train/skipped_updates": 0, "groups/dropped": 0}


def summary(directory: Path, capsys, steps: list[dict]) -> tuple[dict, str]:
    """Return the last line, and the output before it."""
    metrics = MetricsFile(directory / "metrics.jsonl")
    for number, step in enumerate(steps):
        metrics.write({"step": number} | step)
    run = SimpleNamespace(config=Config(name="run", steps=len(steps) or 1), directory=directory, memory=None, metrics=metrics)
    print_summary(run, None, None, 1.0, 10, directory / "exports")
    metrics.close()
    *before, last = capsys.readouterr().out.splitlines()
    return json.loads(last), " ".join(before)


def test_the_last_line_counts_the_updates_that_were_applied(tmp_path, capsys):
    last, before = summary(tmp_path, capsys, [STEP, NONE | {"groups/dropped": 4}, STEP | {"train/skipped_updates": 1}])
    assert last["updates"] == 3 and "warning" not in before


@pytest.mark.parametrize(
    ("step", "updates", "message"),
    [
        (NONE | {"groups/dropped": 4}, 0, "8 groups were dropped (groups/dropped), as all responses of a group got the same reward"),
        (NONE, 0, "no response was left to train on"),
        (STEP | {"train/skipped_updates": 2}, 0, "all 4 updates were skipped (train/skipped_updates)"),
        (STEP | {"train/gradient_norm_max": 0.0}, 4, "the gradients of all 4 updates were zero"),
    ],
)
def test_a_run_that_learned_nothing_is_warned_about_with_the_likely_cause(tmp_path, capsys, step, updates, message):
    last, before = summary(tmp_path, capsys, [step, step])
    assert last["updates"] == updates and f"warning: nothing was learned in 2 steps: {message}" in before


def test_a_run_with_no_step_to_do_is_not_warned_about(tmp_path, capsys):
    last, before = summary(tmp_path, capsys, [])
    assert last["updates"] == 0 and "warning" not in before
