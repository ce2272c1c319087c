"""A run from `start_ray.sh` to the table of its checkpoints, with an engine, a training rank and the driver killed on the way."""

import json
import os
import subprocess
import sys

import pytest

from tests.hosts import ROOT, why_not

pytestmark = pytest.mark.long


def test_a_run_whose_processes_are_killed_is_trained_evaluated_and_merged_by_the_commands_of_the_manual():
    if reason := why_not():
        pytest.skip(reason)
    command = ["bash", str(ROOT / "tools" / "rehearse.sh"), "--short"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    del result["minutes"]
    assert result == {
        "steps": 4,
        "checkpoints_evaluated": 2,
        "evaluated_twice": 0,
        "kills_survived": 3,
        "same_table": True,
        "wildcard_listeners": 0,
        "left_processes": 0,
    }
