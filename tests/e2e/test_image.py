"""The CPU image, built and used as in docker/README.md."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly
BUILD_S = 3600


CAN_BUILD = os.geteuid() == 0 and shutil.which("buildah") and shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(not CAN_BUILD, reason="needs root, buildah and debootstrap")
def test_the_cpu_image_is_built_without_a_daemon_and_its_quickstart_runs():
    command = [sys.executable, "docker/check_image.py", "--steps", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=BUILD_S)
    assert done.returncode == 0, done.stderr[-5000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["smoke"] and figures["quickstart"]["steps"] == 1
    assert not figures["sandbox_by_default"].startswith("ok")
    if figures["real_container"]:
        assert figures["sandbox_allowed"].startswith("ok")
