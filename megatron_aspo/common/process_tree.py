"""The processes below an engine and the shared memory they hold, so that none of either outlives the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHARED = Path("/dev/shm")
_OURS = ("psm_", "vllm", "sem.mp-")
"""Prefixes of the files of Python's shared memory, vLLM and multiprocessing's semaphores."""


@dataclass(frozen=True)
class ProcessId:
    """A process and its creation time, because process ids are reused."""

    pid: int
    created: float


@dataclass(frozen=True)
class Remains:
    """The processes and shared memory that must be gone once an engine is gone."""

    processes: tuple[ProcessId, ...]
    segments: tuple[str, ...]
    """File names in /dev/shm."""


def remains_of(pid: int) -> Remains:
    """Return the descendants of process `pid` (itself excluded) and the shared-memory segments that it and they have mapped now."""
    root = psutil.Process(pid)
    children = root.children(recursive=True)
    return Remains(tuple(ProcessId(child.pid, child.create_time()) for child in children), mapped_segments([root, *children]))


def mapped_segments(processes: Sequence[psutil.Process]) -> tuple[str, ...]:
    """Return the file names in /dev/shm of the shared memory and semaphores that these processes have mapped now, sorted."""
    # Compared by inode: glibc renames a semaphore after mapping it, and the map keeps showing its temporary name.
    mapped: set[int] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        mapped |= {int(line.split()[4]) for line in lines if f" {_SHARED}/" in line}
    return tuple(sorted(file.name for file in _SHARED.iterdir() if file.name.startswith(_OURS) and _inode(file) in mapped))


def sweep(remains: Remains, grace_s: float = 5.0) -> None:
    """Wait up to `grace_s` for the processes to end by themselves, kill those that did not, and unlink the remaining segments."""
    alive = [process for known in remains.processes if (process := _process(known)) is not None]
    _, stubborn = psutil.wait_procs(alive, timeout=grace_s)
    for process in stubborn:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(stubborn, timeout=max(1.0, grace_s))
    unlink(remains.segments)


def sweep_below(pid: int) -> None:
    """Kill the descendants of process `pid`, and unlink the segments that it and they have mapped. A no-op if there is no such process."""
    try:
        remains = remains_of(pid)
    except psutil.NoSuchProcess:
        return
    sweep(remains, grace_s=0.0)


def unlink(segments: Sequence[str]) -> None:
    """Remove these files of /dev/shm, those that still exist."""
    for name in segments:
        (_SHARED / name).unlink(missing_ok=True)


def _inode(file: Path) -> int | None:
    """Return the file's inode, or None when it is gone: other engines start and end at the same time."""
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def _process(known: ProcessId) -> psutil.Process | None:
    try:
        process = psutil.Process(known.pid)
        return process if process.create_time() == known.created else None
    except psutil.NoSuchProcess:
        return None
