"""Limits on all processes of a sandbox together, if this process may create control groups; versions 1 and 2."""

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

_NAME = "megatron_aspo-"
_REMOVE_S = 2.0
"""Seconds for the kernel to empty a group whose processes were killed."""
_numbers = itertools.count()


class Cgroup:
    """A new control group in each of `parents`. Raises OSError if it cannot be created."""

    def __init__(self, parents: list[Path], memory_bytes: int, processes: int):
        name = f"{_own_prefix()}{os.getpid()}-{next(_numbers)}"
        self.paths: list[Path] = []
        try:
            for parent in parents:
                (parent / name).mkdir()
                self.paths.append(parent / name)
            self._set({"memory.limit_in_bytes": memory_bytes, "memory.max": memory_bytes, "pids.max": processes})
            # Version 1 counts swap separately, if at all.
            with contextlib.suppress(OSError):
                self._set({"memory.memsw.limit_in_bytes": memory_bytes, "memory.swap.max": 0})
        except BaseException:
            self.remove()
            raise

    def _set(self, values: dict[str, int]) -> None:
        for path in self.paths:
            for name, value in values.items():
                if (path / name).exists():
                    (path / name).write_text(str(value))

    def prefix(self) -> list[str]:
        """Return the prefix of a command line that makes it run in the group."""
        files = [str(path / "cgroup.procs") for path in self.paths]
        return ["sh", "-ec", f'for i in {" ".join(files)}; do echo $$ > $i; done; exec "$@"', "sh"]

    def out_of_memory(self) -> bool:
        """Return whether the kernel killed a process of the group because its memory ran out."""
        for path in self.paths:
            for name in ("memory.oom_control", "memory.events"):
                with contextlib.suppress(OSError):
                    words = (path / name).read_text().split()
                    counts = dict(zip(words[::2], words[1::2], strict=False))
                    return counts.get("oom_kill", "0") != "0"
        return False

    def remove(self) -> None:
        """Remove the group, whose processes must have been killed."""
        for path in self.paths:
            _remove(path)


def _own_prefix() -> str:
    """Return the name prefix of groups created in this PID namespace; process ids in names mean nothing in other namespaces."""
    return f"{_NAME}{os.stat('/proc/self/ns/pid').st_ino}-"


def _remove(path: Path) -> None:
    deadline = time.monotonic() + _REMOVE_S
    while time.monotonic() < deadline:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:  # not yet empty
            time.sleep(0.002)


def find_parents() -> list[Path]:
    """Return directories in which this process can create groups that limit memory and processes, found by trial; empty if there are
    none."""
    for parents in _candidates():
        try:
            group = Cgroup(parents, 64 << 20, 64)
        except OSError:
            continue
        limited = {name for path in group.paths for name in ("memory.limit_in_bytes", "memory.max", "pids.max") if (path / name).exists()}
        group.remove()
        if len(limited) == 2:
            _remove_stale(parents)
            return parents
    return []


def _candidates(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[list[Path]]:
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    version1 = {controller: path for _, controllers, path in lines for controller in controllers.split(",") if controller}
    found = []
    if "memory" in version1 and "pids" in version1:
        found.append([root / name / version1[name].lstrip("/") for name in ("memory", "pids")])
    for _, controllers, path in lines:
        if not controllers:
            # In version 2 no group has both processes and limited children: try our own group, or, in a delegated tree, its parent.
            group = root / path.lstrip("/")
            found += [[group], [group.parent]] if path != "/" else [[group]]
    return found


def _remove_stale(parents: list[Path]) -> None:
    """Remove the groups of dead workers, and kill the processes in them: a sandbox may survive if its worker is killed during the start.

    Considers only groups of this PID namespace: a container and its host may share a parent, and neither sees the other's workers.
    """
    prefix = _own_prefix()
    for parent in parents:
        for path in parent.glob(f"{prefix}*"):
            owner = path.name.removeprefix(prefix).partition("-")[0]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    for process in map(int, (path / "cgroup.procs").read_text().split()):
                        if process > 0:  # 0 is a process that is not visible here; os.kill would take it for our own process group
                            os.kill(process, signal.SIGKILL)
                _remove(path)
