"""Hostile programs are contained and get the right verdict, the service goes on, and nothing is left behind."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest
from tests.code.hostile_programs import CALLED, CONTAINED, STOPPED

MARK = f"maspo-mark-{os.getpid()}"
WAITING = 2 * 3
"""Clean sandboxes that the graders of this file keep."""
EARLIER: set[psutil.Process] = set()
"""Processes that other test files left."""
GROUPLESS = ["a fork bomb", "a thread bomb", "a memory bomb", "a memory bomb of many processes", "shared anonymous memory", "all inodes"]


def traces() -> dict[str, object]:
    """Return the traces that a program might leave on the machine."""
    own = psutil.Process()
    groups = [path for parent in Path("/sys/fs/cgroup").glob("*") for path in parent.glob(f"**/megatron_aspo-*-{os.getpid()}-*")]
    segments = Path("/proc/sysvipc/shm").read_text() if Path("/proc/sysvipc/shm").exists() else ""
    marked = [path for folder in ("/tmp", "/dev/shm", "/var/tmp", "/root", "/etc", "/", ".") for path in Path(folder).glob(f"*{MARK}*")]
    # A waiting sandbox consists of bubblewrap twice and its agent.
    return {
        "processes": len(set(own.children(recursive=True)) - EARLIER) <= 3 * WAITING,
        "cgroups": len({path.name for path in groups}) <= WAITING,
        "descriptors": own.num_fds(),
        "segments": segments.count("\n"),
        "marked": marked,
    }


@contextlib.contextmanager
def nothing_left(grader: Grader) -> Iterator[None]:
    """Check that the service goes on after the block and that nothing is left of it."""
    assert grader.grade("print(1)", [StdinTest("", "1")]).passed
    before = traces()
    assert before["processes"] and before["cgroups"] and not before["marked"]
    yield
    assert grader.grade("print(1)", [StdinTest("", "1")]).passed
    after = traces()
    # There are fewer if something that an earlier test had open is closed meanwhile.
    assert after.pop("descriptors") <= before.pop("descriptors")
    assert after == before


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    """A key in the worker's environment, set before the first sandbox starts."""
    EARLIER.update(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_OF_THE_WORKER", "api-key")
        yield


@pytest.mark.parametrize("name", CONTAINED)
def test_a_hostile_program_is_contained(grader, name):
    program = CONTAINED[name].replace("MARK", MARK)
    with nothing_left(grader), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{MARK}")  # the machine's abstract sockets belong to its network namespace
        listener.listen()
        verdict = grader.grade(program, [StdinTest("", "contained")])
        listener.close()
    assert verdict.passed, f"{verdict}: {printed_output(grader, program)}"


def printed_output(grader: Grader, program: str) -> str:
    sandbox = grader._pool.take()
    sandbox.load({"program": program})
    outcome = sandbox.run("stdin", b"", 5.0)
    sandbox.kill()
    return f"{outcome.output.decode()} {outcome.error}"


@pytest.mark.parametrize("name", STOPPED)
def test_a_hostile_program_is_stopped(strict_grader, name):
    check_that_it_stops(strict_grader, name)


@pytest.mark.parametrize("name", GROUPLESS)
def test_a_hostile_program_is_stopped_without_control_groups(groupless_grader, name):
    check_that_it_stops(groupless_grader, name)


def check_that_it_stops(grader: Grader, name: str) -> None:
    program, kinds = STOPPED[name]
    with nothing_left(grader):
        verdict = grader.grade(program, [StdinTest("some input\n", "unreachable")])
    assert verdict.kind in kinds and verdict.test == 0, verdict
    assert verdict.seconds < 8


@pytest.mark.parametrize("name", CALLED)
def test_a_hostile_result_does_no_harm(strict_grader, name):
    program, kinds = CALLED[name]
    with nothing_left(strict_grader):
        verdict = strict_grader.grade(program, [CallTest("f", [], [1])])
        assert not strict_grader.grade(program, [AssertTest("assert f() == [1]\n")]).passed
    assert verdict.kind in kinds, verdict
