"""Options of the sandbox and limits of the programs in it."""

from dataclasses import field
from typing import Annotated

from megatron_aspo.common.options import Choice, Positive, options


@options("data.code.sandbox")
class SandboxOptions:
    kind: Annotated[str, Choice("bubblewrap", "none")] = "bubblewrap"
    """`bubblewrap`, or `none`: programs run as plain processes of the reward worker's user, who must then accept the risk below."""
    accept_risk: bool = False
    """Required by `kind: none`: programs written by a model may then read, change and send away whatever the worker's user may."""
    modules: list[str] = field(default_factory=list)
    """Packages that programs may import beside Python's own, such as `numpy`; each must be installed on the reward's machine."""
    paths: list[str] = field(default_factory=list)
    """Files and directories of this machine that programs may read, at the same paths."""
    pool: Positive[int] = 2
    """Number of clean sandboxes that wait, started ahead of time."""


@options("data.code.limits")
class Limits:
    """Limits of one execution. CPU time, memory and file size are limited for each process of a program; if cgroups can be created, memory
    and processes are also limited for all of them together.
    """

    cpu_s: Positive[float] = 6.0
    """CPU time, in seconds, of the program and the child processes that it waited for."""
    wall_s: Positive[float] = 15.0
    """Wall-clock time, in seconds; larger than `cpu_s`, because machines are shared."""
    memory_mb: Positive[int] = 1024
    """Address space of a process, and all memory of the sandbox with its files, in MiB."""
    processes: Positive[int] = 64
    """Concurrent processes and threads."""
    file_mb: Positive[int] = 16
    """The largest file, and each of the directories /tmp and /dev/shm, in MiB."""
    output_mb: Positive[int] = 16
    """Standard output of one execution, in MiB. Standard error beyond its last 4 KiB is dropped."""
