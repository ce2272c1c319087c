"""Hostile programs: contained, with the right verdict, the service goes on, and nothing is left behind."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest
from megatron_aspo.rewards.sandbox import cgroup
from megatron_aspo.rewards.sandbox.options import Limits
from tests.code.hostile_programs import CALLED, CONTAINED, STOPPED

MARK = f"maspo-mark-{os.getpid()}"
WAITING = 2
"""Clean sandboxes that a grader keeps."""


def traces() -> dict[str, object]:
    """What a program might leave on the machine."""
    own = psutil.Process()
    groups = [path for parent in Path("/sys/fs/cgroup").glob("*") for path in parent.glob(f"**/megatron_aspo-{os.getpid()}-*")]
    segments = Path("/proc/sysvipc/shm").read_text() if Path("/proc/sysvipc/shm").exists() else ""
    marked = [path for folder in ("/tmp", "/dev/shm", "/var/tmp", "/root", "/etc", "/", ".") for path in Path(folder).glob(f"*{MARK}*")]
    # A sandbox that waits has bubblewrap twice and its agent.
    return {
        "processes": len(own.children(recursive=True)) <= 3 * WAITING,
        "cgroups": len({path.name for path in groups}) <= WAITING,
        "descriptors": own.num_fds(),
        "segments": segments.count("\n"),
        "marked": marked,
    }


@pytest.fixture
def nothing_left(strict_grader):
    assert strict_grader.grade("print(1)", [StdinTest("", "1")]).passed
    before = traces()
    yield
    assert strict_grader.grade("print(1)", [StdinTest("", "1")]).passed, "the service goes on"
    assert traces() == before
    assert before["processes"] and before["cgroups"] and not before["marked"]


@pytest.mark.parametrize("name", CONTAINED)
def test_it_is_contained(strict_grader, nothing_left, monkeypatch, name):
    monkeypatch.setenv("SECRET_OF_THE_WORKER", "api-key")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{MARK}")  # the machine's abstract sockets belong to its network namespace
        listener.listen()
        verdict = strict_grader.grade(CONTAINED[name].replace("MARK", MARK), [StdinTest("", "contained")])
    if not verdict.passed:
        probe = strict_grader._pool.take()
        probe.load({"program": CONTAINED[name].replace("MARK", MARK)})
        outcome = probe.run("stdin", b"", 5.0)
        probe.kill()
        pytest.fail(f"{verdict}: {outcome.output.decode()} {outcome.error}")


@pytest.mark.parametrize("name", STOPPED)
def test_it_is_stopped(strict_grader, nothing_left, name):
    program, kinds = STOPPED[name]
    verdict = strict_grader.grade(program, [StdinTest("some input\n", "unreachable")])
    assert verdict.kind in kinds and verdict.test == 0, verdict
    assert verdict.seconds < 8


@pytest.mark.parametrize("name", ["a fork bomb", "a thread bomb", "a memory bomb", "a memory bomb of many processes", "shared anonymous memory", "all inodes"])
def test_it_is_stopped_where_there_are_no_control_groups(sandboxed, monkeypatch, name):
    monkeypatch.setattr(cgroup, "find_parents", lambda: [])
    program, kinds = STOPPED[name]
    with Grader(CodeOptions(limits=Limits(cpu_s=1, wall_s=2.5, memory_mb=256, processes=16))) as grader:
        verdict = grader.grade(program, [StdinTest("", "unreachable")])
        assert verdict.kind in kinds and verdict.seconds < 8, verdict
        assert grader.grade("print(1)", [StdinTest("", "1")]).passed


@pytest.mark.parametrize("name", CALLED)
def test_its_result_does_no_harm(strict_grader, nothing_left, name):
    program, kinds = CALLED[name]
    verdict = strict_grader.grade(program, [CallTest("f", [], [1])])
    assert verdict.kind in kinds, verdict
    assert not strict_grader.grade(program, [AssertTest("assert f() == [1]\n")]).passed
