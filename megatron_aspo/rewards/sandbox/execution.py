"""One execution in a sandbox: a process, its three pipes, and the limits that are enforced from outside."""

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_aspo.rewards.sandbox.sandbox import Sandbox

_WATCH_S = 0.1
"""Seconds between measurements of memory if no control group limits it."""
_ERROR_BYTES = 4096
_WRITE_BYTES = 1 << 16
"""Upper bound on the bytes of one write to a pipe."""


@dataclass
class Outcome:
    """The way in which an execution ended."""

    ended: str
    """`exit`; `cpu`, `wall`, `memory` or `output` for the limit that ended it; `lost` if the program ended the sandbox."""
    status: int | None
    """Exit status, or minus the signal's number if a signal killed it; None if it was stopped together with its sandbox."""
    output: bytes
    error: str
    """The end of its standard error, at most 4 KiB."""
    cpu_s: float


class Execution:
    """One running process of a sandbox, with its three pipes, which are read and written without blocking."""

    def __init__(self, sandbox: "Sandbox", mode: str):
        self.sandbox = sandbox
        self.output = bytearray()
        self.error = bytearray()
        self.report: dict | None = None
        self.lost = False
        self._pending = bytearray()
        self._ends_input = False
        pipes = [os.pipe() for _ in range(3)]
        self._input, self._output, self._error = pipes[0][1], pipes[1][0], pipes[2][0]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        if sandbox.user is not None:
            for descriptor in theirs:  # lets the program open /dev/stdin, which is this pipe
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
        """Queue data for the process's input."""
        self._pending += data

    def end_input(self) -> None:
        """Close the process's input once all queued data is written."""
        self._ends_input = True

    def interests(self) -> dict[int, int]:
        """Return the descriptors to poll, with their events."""
        wanted = {descriptor: select.POLLIN for descriptor in (self._output, self._error) if descriptor >= 0}
        if self.report is None and not self.lost:
            wanted[self.sandbox.fileno()] = select.POLLIN
        if self._input >= 0 and self._pending:
            wanted[self._input] = select.POLLOUT
        return wanted

    def advance(self, ready: set[int]) -> None:
        """Read and write whatever is possible without blocking."""
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
        """Return the outcome; for `exit`, determine which limit the kernel enforced, if any."""
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
                del self._pending[: os.write(self._input, self._pending[:_WRITE_BYTES])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the program does not read its input, which it may do
            self._pending.clear()
        if self._ends_input:
            os.close(self._input)
            self._input = -1

    @staticmethod
    def _read(descriptor: int, buffer: bytearray) -> int:
        """Read once; return the descriptor, or −1 after closing it at its end."""
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
    """Run executions concurrently until `last` has ended, one exceeds a limit, or `react` returns true. Return the outcome of `last`.

    `react` is called after each piece of input or output; it may move data between executions.
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
