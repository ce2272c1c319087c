"""One sandbox: start it, run a program's executions in it one after another, throw it away."""

import array
import contextlib
import json
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_aspo.rewards.sandbox.launcher import OWN_PROCESSES, Launcher
from megatron_aspo.rewards.sandbox.options import Limits

_START_S = 60.0
"""How long a sandbox may take to start: 0.03 s on an idle machine."""
_WATCH_S = 0.1
"""How often memory is counted where no control group counts it."""
_MAX_FILES = 100_000
"""Files in /tmp where no control group counts the kernel's memory for them, about 1 KiB each."""
_ERROR_BYTES = 4096
_MAIN_STACK_BYTES = 100 << 20
"""Room for deep recursion through C code; the kernel keeps at least 128 MiB free below a main thread's stack."""


class SandboxError(Exception):
    """A sandbox that did not start or was lost through no act of a program: worth a second try."""


@dataclass
class Outcome:
    """How an execution ended."""

    ended: str
    """`exit`; `cpu`, `wall`, `memory` or `output` for the limit that ended it; `lost` if the program ended the sandbox."""
    status: int | None
    """Exit status, minus the signal's number if a signal killed it; None if it had to be stopped with its sandbox."""
    output: bytes
    error: str
    """The end of its standard error, at most 4 KiB."""
    cpu_s: float


class Sandbox:
    """A started sandbox, for one program. It is of no more use after an execution that ended otherwise than by `exit`."""

    def __init__(self, launcher: Launcher, limits: Limits):
        """Return at once; `wait_until_ready` waits. Raises OSError if no process can be started."""
        self._limits = limits
        self._contained = launcher.contained
        self.user = launcher.user
        """The user id that its processes have on this machine; None for our own."""
        self._group = launcher.make_cgroup()
        self._control, theirs = socket.socketpair()
        self._info, info = os.pipe()
        self._first_process = -1
        self._root = ""
        self._received = b""
        try:
            self._process = launcher.start(theirs.fileno(), info, self._group)
        except BaseException:
            self._control.close()
            os.close(self._info)
            if self._group:
                self._group.remove()
            raise
        finally:
            theirs.close()
            os.close(info)

    def wait_until_ready(self) -> None:
        """Raises SandboxError, with what bubblewrap or the interpreter says, if the sandbox does not start."""
        self._control.settimeout(_START_S)
        try:
            data = self._control.recv(64)
        except OSError:
            data = b""
        self._control.settimeout(None)
        if data != b'{"ready": true}\n':
            self._process.kill()
            error = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise SandboxError(error[-1] if error else f"no answer within {_START_S:g} s")
        if self._process.poll() is not None:
            raise SandboxError("it ended while it waited")
        if self._contained:
            number = json.loads(os.read(self._info, 4096))["child-pid"]
            # A handle, not a number that another process may have by the time it is used.
            self._first_process = os.pidfd_open(number)
            self._root = f"/proc/{number}/root"

    def load(self, sources: dict[str, str]) -> None:
        """Hand over the texts that its executions need: `program`, or `prompt`, `tests` and `entry_point`."""
        limits = self._limits
        values = {
            "RLIMIT_AS": limits.memory_mb << 20,
            "RLIMIT_FSIZE": limits.file_mb << 20,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
            "RLIMIT_STACK": _MAIN_STACK_BYTES,
        }
        if self._contained:  # outside, it would count all processes of the user
            values["RLIMIT_NPROC"] = limits.processes + OWN_PROCESSES
        with contextlib.suppress(OSError):  # it has died: the execution will say so
            self._control.sendall(json.dumps({"sources": sources, "limits": values}).encode() + b"\n")

    def begin(self, mode: str) -> "Execution":
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
        """Return what the agent says of the execution that has ended; None if there is nothing whole yet. Raises EOFError if it is dead."""
        try:
            data = self._control.recv(4096)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return json.loads(line)

    def fileno(self) -> int:
        return self._control.fileno()

    @property
    def limits(self) -> Limits:
        return self._limits

    def out_of_memory(self) -> bool:
        return self._group is not None and self._group.out_of_memory()

    def exceeds_memory(self) -> bool:
        """Whether the processes have more memory than they may; never where a control group keeps the limit."""
        if self._group is not None:
            return False
        files = 0
        with contextlib.suppress(OSError):
            usage = os.statvfs(f"{self._root}/tmp")
            files = usage.f_files - usage.f_ffree if self._contained else 0
        return files > _MAX_FILES or resident_bytes(self._process.pid) > self._limits.memory_mb << 20

    def kill(self) -> None:
        """End every process of the sandbox and wait until the kernel has done so. Idempotent."""
        if self._info < 0:
            return
        if self._first_process >= 0:
            # The first process of a PID namespace takes all others with it, and is gone only after them.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first_process, signal.SIGKILL)
            os.close(self._first_process)
        elif not self._contained:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        self._process.stderr.close()
        self._control.close()
        os.close(self._info)
        self._info = -1
        if self._group:
            self._group.remove()


class Execution:
    """One running process of a sandbox, with its three pipes, read and written without blocking."""

    def __init__(self, sandbox: Sandbox, mode: str):
        self.sandbox = sandbox
        self.output = bytearray()
        self.error = bytearray()
        self.report: dict | None = None
        self.lost = False
        self._pending = memoryview(b"")
        self._ends_input = False
        pipes = [os.pipe() for _ in range(3)]
        self._input, self._output, self._error = pipes[0][1], pipes[1][0], pipes[2][0]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        if sandbox.user is not None:
            for descriptor in theirs:  # so that the program may open /dev/stdin, which is this pipe
                os.fchown(descriptor, sandbox.user, -1)
        try:
            sandbox.send_command(mode, theirs)
        except OSError:
            self.lost = True
        for descriptor in theirs:
            os.close(descriptor)
        for descriptor in (self._input, self._output, self._error):
            os.set_blocking(descriptor, False)

    @property
    def ended(self) -> bool:
        return self.lost or (self.report is not None and self._output < 0)

    def send(self, data: bytes) -> None:
        """Add to what is to be written to the process."""
        self._pending = memoryview(bytes(self._pending) + data)

    def end_input(self) -> None:
        """Close its input once everything is written."""
        self._ends_input = True

    def interests(self) -> dict[int, int]:
        """Descriptors to poll, and for what."""
        wanted = {descriptor: select.POLLIN for descriptor in (self._output, self._error) if descriptor >= 0}
        if self.report is None and not self.lost:
            wanted[self.sandbox.fileno()] = select.POLLIN
        if self._input >= 0 and self._pending:
            wanted[self._input] = select.POLLOUT
        return wanted

    def advance(self, ready: set[int]) -> None:
        """Read and write what can be without waiting."""
        if self._input >= 0 and (self._input in ready or not self._pending):
            self._write()
        if self._output in ready:
            self._output = self._read(self._output, self.output)
        if self._error in ready:
            self._error = self._read(self._error, self.error)
            del self.error[:-_ERROR_BYTES]
        if self.report is None and self.sandbox.fileno() in ready:
            try:
                self.report = self.sandbox.read_report()
            except EOFError:
                self.lost = True

    def outcome(self, ended: str = "exit") -> Outcome:
        """How it ended; of an `exit`, say which limit was exceeded where the kernel kept it."""
        report = self.report or {"status": None, "cpu_s": 0.0}
        if self._error in self.interests():
            self._error = self._read(self._error, self.error)
        if ended == "exit":
            if self.sandbox.out_of_memory():
                ended = "memory"
            elif report["status"] == -signal.SIGXCPU or report["cpu_s"] > self.sandbox.limits.cpu_s:
                ended = "cpu"
            elif self.lost:
                ended = "lost"
        error = self.error[-_ERROR_BYTES:].decode(errors="replace")
        return Outcome(ended, report["status"], bytes(self.output), error, report["cpu_s"])

    def close(self) -> None:
        for descriptor in (self._input, self._output, self._error):
            if descriptor >= 0:
                os.close(descriptor)
        self._input = self._output = self._error = -1

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._input, self._pending) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the program does not read its input: its own affair
            self._pending = memoryview(b"")
        if self._ends_input:
            os.close(self._input)
            self._input = -1

    @staticmethod
    def _read(descriptor: int, buffer: bytearray) -> int:
        """Read once; returns the descriptor, or −1 once it is at its end and closed."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return descriptor
        if not data:
            os.close(descriptor)
            return -1
        buffer += data
        return descriptor


def run_all(executions: list[Execution], last: Execution, wall_s: float, react: Callable[[], bool] = lambda: False) -> Outcome:
    """Run executions side by side until `last` has ended, one exceeds a limit, or `react` returns true. Returns the outcome of `last`.

    `react` is called after each piece of input or output; it may move data from one to another.
    """
    deadline = time.monotonic() + wall_s
    watch_at = time.monotonic() + _WATCH_S
    ended = ""
    while not ended:
        poll, owners = select.poll(), {}
        for execution in executions:
            for descriptor, events in execution.interests().items():
                poll.register(descriptor, events)
                owners[descriptor] = execution
        now = time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, min(deadline, watch_at) - now) * 1000)}
        for execution in executions:
            execution.advance(ready)
        if react():
            ended = "stopped"
        elif any(len(execution.output) > execution.sandbox.limits.output_mb << 20 for execution in executions):
            ended = "output"
        elif last.ended:
            ended = "exit"
        elif time.monotonic() > deadline:
            ended = "wall"
        elif time.monotonic() > watch_at:
            watch_at = time.monotonic() + _WATCH_S
            if any(execution.sandbox.exceeds_memory() for execution in executions):
                ended = "memory"
    outcome = last.outcome(ended)
    for execution in executions:
        execution.close()
    return outcome


def resident_bytes(root: int) -> int:
    """Resident memory of the process `root` and its descendants, in bytes; pages that they share count once for each."""
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
