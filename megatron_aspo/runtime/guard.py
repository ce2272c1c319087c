"""A process beside the driver that ends the Ray cluster that the driver started, as soon as the driver has ended for any reason.

Ray's own agents notice only after a minute that their driver was killed, and vLLM's engine cores leave shared memory behind. The guard
finds the cluster's processes by a mark in their environment, so it never touches a cluster that the driver only joined, nor other
children of the driver. The driver uses `Guard`; run as a program, this file is the guard process.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_aspo.common.import_path import child_python_path
from megatron_aspo.common.process_tree import mapped_segments, unlink

_MARK = "MEGATRON_ASPO_CLUSTER"
"""Environment variable that every process of the cluster inherits."""
_GRACE_S = 3.0
"""Time that processes have to exit after SIGTERM. With it, nothing is left 5 s after the driver's death."""
_GIVE_UP_S = 10.0
"""Time limit for SIGKILL; a process that survives it is stuck in the kernel."""


class Guard:
    """The guard process, running from creation until `close`. It has its own session, which signals to the driver's group do not reach."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        # A driver may itself belong to another driver's cluster; its guard must still outlive it.
        environment = {key: value for key, value in os.environ.items() if key != _MARK}
        environment["PYTHONPATH"] = child_python_path()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_aspo.runtime.guard", self._mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._input, self._output = self._process.stdin, self._process.stdout

    def require_watching(self) -> None:
        """Wait until the guard is watching. Raises RuntimeError if it did not start."""
        if not self._output.readline():
            raise RuntimeError(f"the process that ends the cluster after its driver ended itself (status {self._process.wait()})")

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes started inside the block, and their descendants, as the cluster's."""
        # Process titles (Ray's agents, vLLM's engine cores) would overwrite the environment that the guard reads.
        with environment_set({_MARK: self._mark, "SPT_NOENV": "1"}):
            yield

    def close(self) -> None:
        """Kill the processes of this run's own Ray cluster that are still alive, and wait until they have ended. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S + _GIVE_UP_S)


@contextmanager
def environment_set(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process inside the block, and restore them afterwards."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return this user's live processes that carry the mark, and their descendants, whatever environment those have."""
    line = f"{_MARK}={mark}".encode()
    found: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                process = psutil.Process(pid)
                found |= {member.pid: member for member in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return list(found.values())


def end_cluster(mark: str) -> None:
    """End every marked process by SIGTERM, then SIGKILL, and unlink the shared memory that they had mapped."""
    processes = marked_processes(mark)
    segments = mapped_segments(processes)
    _signal(processes, signal.SIGTERM)
    psutil.wait_procs(processes, timeout=_GRACE_S)
    deadline = time.monotonic() + _GIVE_UP_S
    # A process that was starting while the list was made appears in the next one.
    while (alive := marked_processes(mark)) and time.monotonic() < deadline:
        _signal(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=0.5)
    unlink(segments)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # gone, or another user's (sudo)
            process.send_signal(number)


def main() -> None:
    """Wait for the driver to close the pipe or to end; arguments: the mark, the driver's process id."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, driver = sys.argv[1], int(sys.argv[2])
    watched = [sys.stdin.fileno()]
    # A process forked by the driver may keep the pipe open after the driver's end.
    with contextlib.suppress(OSError):
        watched.append(os.pidfd_open(driver))
    print("watching", flush=True)
    select.select(watched, [], [])
    end_cluster(mark)


if __name__ == "__main__":
    main()
