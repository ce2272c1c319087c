"""Kills of a rehearsal: an engine, a training rank and the driver, each once, each when the run has come so far.

Every wait is for something that the run writes: lines of metrics.jsonl, or of its output.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Hosts
from tools.rehearsal.commands import HEAD

WAIT_S = 900.0
"""Longest wait for a run to come so far, or to have recovered; a busy machine takes several times what an idle one does."""


@dataclass(frozen=True)
class Fault:
    """One kill."""

    what: str
    program: bytes
    """In the name or command line of the process to kill."""
    after_steps: int
    """Steps that the run has written before."""
    recovered: str
    """Text in the run's output, once more than before, when it has recovered."""


def faults(steps: int, checkpoint_every: int) -> list[Fault]:
    """Return the kills for a run of so many steps: the deaths that end it come when there is a step to do again since a checkpoint."""
    rank = checkpoint_every + 1
    return [
        Fault("engine", b"EngineCore", 1, "started again: "),
        Fault("training rank", b"ray::TrainerActor", rank, "launch.sh: the run ended with status"),
        Fault("driver", b"megatron-aspo train", max(rank + 1, steps - 1), "launch.sh: the run ended with status"),
    ]


def strike(fault: Fault, hosts: Hosts, run: Path, output: Path, alive: Callable[[], bool]) -> None:
    """Wait for the moment, kill the process, and wait until the run has recovered. Raises RuntimeError if any of it does not come."""
    pids: list[int] = []

    def moment() -> bool:
        pids[:] = [pid for pid in hosts.processes(HEAD) if fault.program in command_line(pid)]
        return bool(pids) and steps_done(run) >= fault.after_steps

    wait_until(moment, alive, f"{fault.after_steps} steps before the kill of the {fault.what}")
    before = output.read_text().count(fault.recovered)
    os.kill(pids[0], signal.SIGKILL)
    print(f"--- killed: {fault.what}, after {steps_done(run)} steps", flush=True)
    wait_until(lambda: output.read_text().count(fault.recovered) > before, alive, f"the run's recovery from the kill of the {fault.what}")


def steps_done(run: Path) -> int:
    """Return the steps in the run's metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def command_line(pid: int) -> bytes:
    """Return the name of a process and the words of its command, which an engine core has from the actor that forked it.

    Empty if the process has ended.
    """
    try:
        return b" ".join(Path(f"/proc/{pid}/{file}").read_bytes().replace(b"\0", b" ") for file in ("comm", "cmdline"))
    except OSError:
        return b""


def wait_until(condition: Callable[[], object], alive: Callable[[], bool], what: str) -> None:
    """Return when the condition holds. Raises RuntimeError when `alive` no longer does, or after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if not alive():
            raise RuntimeError(f"a process ended before {what}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {WAIT_S:g} s in vain for {what}")
        time.sleep(0.2)
