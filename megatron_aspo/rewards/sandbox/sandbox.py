"""One sandbox: start it, run a program's executions one after another, kill it."""

import array
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile

import psutil

from megatron_aspo.rewards.sandbox.execution import Execution, Outcome, run_all
from megatron_aspo.rewards.sandbox.launcher import OWN_PROCESSES, Launcher
from megatron_aspo.rewards.sandbox.options import Limits

_START_S = 60.0
"""Seconds for a sandbox to start, which takes 0.03 s on an idle machine."""
_END_S = 10.0
"""Seconds for a sandbox's first process to begin, and to end once killed: milliseconds on an idle machine."""
_KILL_ROUNDS = 10
"""Number of searches for the descendants of a program without a sandbox, which may start more while they are being killed."""
_REPORT_BYTES = 4096
_MAX_FILES = 100_000
"""Maximum files in /tmp if no control group counts the kernel's memory for them, about 1 KiB each."""
_MAIN_STACK_BYTES = 100 << 20
"""Stack for deep recursion through C code; the kernel keeps at least 128 MiB free below a main thread's stack."""


class SandboxError(Exception):
    """A sandbox did not start, or was lost through no fault of a program; a retry may succeed."""


class Sandbox:
    """A started sandbox, for one program. It cannot be used after an execution that ended in any other way than `exit`."""

    def __init__(self, launcher: Launcher, limits: Limits):
        """Start the processes without waiting; `wait_until_ready` waits. Raises OSError if no process can be started."""
        self._limits = limits
        self._contained = launcher.contained
        self._counts_processes = launcher.counts_processes
        self.user = launcher.user
        """User id of its processes on this machine; None if it is this process's."""
        self._group = launcher.make_cgroup()
        self._control, theirs = socket.socketpair()
        self._info, info = os.pipe()
        self._ended = False
        self._first_process = -1
        self._root = ""
        self._directory = "" if self._contained else tempfile.mkdtemp(prefix="megatron_aspo-")
        self._received = b""
        try:
            self._process = launcher.start(theirs.fileno(), info, self._group, self._directory)
            assert self._process.stderr is not None  # Launcher.start makes it a pipe
            self._errors = self._process.stderr
        except BaseException:
            self._control.close()
            os.close(self._info)
            self._remove_traces()
            raise
        finally:
            theirs.close()
            os.close(info)

    def wait_until_ready(self) -> None:
        """Wait until the agent is ready. Raises SandboxError, with the error of bubblewrap or the interpreter, if it does not start."""
        self._control.settimeout(_START_S)
        try:
            data = self._control.recv(64)
        except OSError:
            data = b""
        self._control.settimeout(None)
        if data != b'{"ready": true}\n':
            self._end_processes()
            # Without blocking, because a surviving process may hold the pipe open forever.
            os.set_blocking(self._errors.fileno(), False)
            error = (self._errors.read() or b"").decode(errors="replace").strip().splitlines()
            raise SandboxError(error[-1] if error else f"no answer within {_START_S:g} s")
        if self._process.poll() is not None:
            raise SandboxError("it ended while it waited")
        self._find_first_process()

    def _find_first_process(self) -> None:
        """Wait until bubblewrap reports the sandbox's first process, or has failed."""
        if not self._contained or self._first_process >= 0:
            return
        poll = select.poll()
        poll.register(self._info, select.POLLIN)
        if poll.poll(_END_S * 1000) and (found := re.search(rb'"child-pid": (\d+)', os.read(self._info, 4096))):
            number = int(found[1])
            with contextlib.suppress(ProcessLookupError):
                # A handle, because another process may have the number by the time it is used.
                self._first_process = os.pidfd_open(number)
                self._root = f"/proc/{number}/root"

    def load(self, sources: dict[str, str]) -> None:
        """Send the sources that its executions need: `program`, or `prompt`, `tests` and `entry_point`."""
        limits = self._limits
        values = {
            "RLIMIT_AS": limits.memory_mb << 20,
            "RLIMIT_FSIZE": limits.file_mb << 20,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
            "RLIMIT_STACK": _MAIN_STACK_BYTES,
        }
        if self._counts_processes:
            values["RLIMIT_NPROC"] = limits.processes + OWN_PROCESSES
        with contextlib.suppress(OSError):  # it has died: the execution will report that
            self._control.sendall(json.dumps({"sources": sources, "limits": values}).encode() + b"\n")

    def begin(self, mode: str) -> Execution:
        """Start an execution; `inside/agent.py` lists the modes."""
        return Execution(self, mode)

    def run(self, mode: str, data: bytes, wall_s: float) -> Outcome:
        """Run one execution that reads `data`, for at most `wall_s` seconds."""
        execution = self.begin(mode)
        execution.send(data)
        execution.end_input()
        return run_all([execution], execution, wall_s)

    def send_command(self, mode: str, descriptors: list[int]) -> None:
        command = json.dumps({"mode": mode, "cpu_s": math.ceil(self._limits.cpu_s)}).encode() + b"\n"
        self._control.sendmsg([command], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])

    def read_report(self) -> dict | None:
        """Return the agent's report on the execution that has ended; None if it is incomplete so far.

        Raises EOFError if the agent is dead or taken over: it sends one short line, and nothing else.
        """
        try:
            data = self._control.recv(_REPORT_BYTES)
        except OSError:
            data = b""
        self._received += data
        if not data or len(self._received) > _REPORT_BYTES:
            raise EOFError
        line, newline, self._received = self._received.partition(b"\n")
        if not newline:
            self._received = line
            return None
        return parse_report(line)

    def fileno(self) -> int:
        return self._control.fileno()

    @property
    def limits(self) -> Limits:
        return self._limits

    def out_of_memory(self) -> bool:
        return self._group is not None and self._group.out_of_memory()

    def exceeds_memory(self) -> bool:
        """Return whether the processes exceed their memory; always False if a control group enforces the limit."""
        if self._group is not None:
            return False
        files = 0
        with contextlib.suppress(OSError):
            usage = os.statvfs(f"{self._root}/tmp")
            files = usage.f_files - usage.f_ffree if self._contained else 0
        return files > _MAX_FILES or resident_bytes(self._process.pid) > self._limits.memory_mb << 20

    def kill(self) -> None:
        """Kill every process of the sandbox and wait until the kernel has ended them. Idempotent."""
        if self._info < 0:
            return
        self._end_processes()
        self._errors.close()
        self._control.close()
        os.close(self._info)
        self._info = -1
        self._remove_traces()

    def _end_processes(self) -> None:
        """Kill every process and wait for its end. Idempotent."""
        if self._ended:
            return
        self._ended = True
        # Not bubblewrap's outer process first: if it is killed during the start, the inner one waits forever.
        self._find_first_process()
        if self._first_process >= 0:
            # Killing the first process of a PID namespace kills all others, and it ends only after them.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first_process, signal.SIGKILL)
            os.close(self._first_process)
            self._first_process = -1
            # The outer process reaps the inner one and ends. If it were killed first, a zombie would be left to a process 1 that may not
            # reap it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        elif not self._contained:
            kill_descendants(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _remove_traces(self) -> None:
        if self._group:
            self._group.remove()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)


def parse_report(line: bytes) -> dict:
    """Return `{"status": …, "cpu_s": …}`. Raises EOFError for anything else, because a program may have taken over the agent."""
    try:
        report = json.loads(line)
        status, cpu_s = report["status"], report["cpu_s"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise EOFError from error
    if type(status) is int and -64 <= status <= 255 and type(cpu_s) is float and 0 <= cpu_s < math.inf:
        return {"status": status, "cpu_s": cpu_s}
    raise EOFError


def kill_descendants(root: int) -> None:
    """Kill the descendants of the process `root`, an unreaped child of this process, including those in other sessions."""
    for _ in range(_KILL_ROUNDS):
        try:
            family = [process for process in psutil.Process(root).children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            continue
        if not family:
            return
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def resident_bytes(root: int) -> int:
    """Return the resident memory of the process `root` and its descendants, in bytes; shared pages count once for each process."""
    total, todo = 0, [root]
    while todo:
        process = todo.pop()
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{process}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{task}/children") as file:
                    todo += map(int, file.read().split())
    return total
