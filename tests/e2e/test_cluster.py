"""A cluster that Python code opens itself: it listens on loopback only, and ends soon after its driver is killed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.runtime.machine import _RAY_SOCKET, _SOCKET_PATH_BYTES
from megatron_aspo.tasks.options import DataOptions
from tests.e2e.loopback import assert_only_loopback

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
DRIVER = """
import subprocess, sys, time
import ray  # before ours: Ray reads its settings at import, without our changes
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.runtime.cluster import open_cluster

# Unrelated to the cluster. Its output would stay open if the driver failed, and a reader would wait for it.
other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
for again in (True, False):
    cluster = open_cluster("", 2)
    rewards = RewardPool("single_digit_addition", DataOptions(), workers=2)
    rewards.ready()
    if again:
        rewards.close()
        cluster.close()
    print(other.pid, flush=True)
    sys.stdin.readline()
time.sleep(600)
"""
GONE_S = 10


def start_driver(directory: Path) -> subprocess.Popen:
    """Start it under the longest TMPDIR that is accepted, which proves the limit: Ray starts there."""
    padding = _SOCKET_PATH_BYTES - len(_RAY_SOCKET.format(pid=2**22)) - 1
    temporary = Path(f"{directory}/".ljust(padding, "x"))
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    return subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def family_of(driver: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


@pytest.fixture
def short():
    """Return a directory with a short path."""
    directory = Path(f"/tmp/t{os.getpid()}")
    directory.mkdir()
    yield directory
    subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_it_listens_on_loopback_and_ends_with_its_driver_and_ends_nothing_else(short):
    """First the cluster is closed; then, opened again, it ends with the driver."""
    driver = start_driver(short)
    other = psutil.Process(int(driver.stdout.readline()))
    try:
        assert family_of(driver) == [other]
        driver.stdin.write("\n")
        driver.stdin.flush()
        driver.stdout.readline()
        family = [process for process in family_of(driver) if process != other]
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
        assert_only_loopback([psutil.Process(driver.pid), *family])
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(family, timeout=GONE_S)
        assert not alive and other.is_running()
    finally:
        driver.kill()
        other.kill()


def test_a_driver_that_is_killed_while_ray_starts_leaves_nothing(short):
    driver = start_driver(short)
    deadline = time.monotonic() + 60
    while not any(process.name() == "raylet" for process in family_of(driver)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    *family, other = sorted(family_of(driver), key=lambda process: process.name() == "sleep")
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    assert not alive and other.is_running()
    other.kill()


def test_without_an_open_cluster_ray_is_not_started_implicitly():
    """Ray would listen on every interface."""
    ask = "from megatron_aspo.common.actors import require_cluster; require_cluster()"
    result = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert "open one first, by megatron_aspo.runtime.cluster.open_cluster" in result.stderr


def test_one_process_opens_one_cluster(ray_cluster):
    from megatron_aspo.runtime.cluster import open_cluster

    with pytest.raises(UserError, match="connected to a Ray cluster already; disconnect it first"):
        open_cluster("", 2)
    with RewardPool("single_digit_addition", DataOptions()):  # and the first one continues
        pass


def test_ray_is_started_in_one_place():
    """Every other place would need care for loopback and for the processes of a killed driver."""
    calls = [
        file
        for room in ("megatron_aspo", "tools", "tests")
        for file in (ROOT / room).rglob("*.py")
        if re.search(r"\bray\.init\(", file.read_text())
    ]
    # The benchmark of the start measures a bare Ray, on loopback too, beside ours.
    assert [str(file.relative_to(ROOT)) for file in calls] == ["megatron_aspo/runtime/cluster.py", "tools/bench/bench_start.py"]
