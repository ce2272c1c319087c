"""Options of the sandbox and limits of what runs in it."""

from dataclasses import field
from typing import Annotated

from megatron_aspo.common.options import Choice, Positive, options


@options("data.code.sandbox")
class SandboxOptions:
    kind: Annotated[str, Choice("bubblewrap", "none")] = "bubblewrap"
    """`bubblewrap`, or `none`: programs run as plain processes of the reward worker's user, who must then accept the risk below."""
    accept_risk: bool = False
    """Needed by `kind: none`: programs that a model wrote may then read, change and send away whatever the worker's user may."""
    modules: list[str] = field(default_factory=list)
    """Packages that programs may import beside Python's own, such as `numpy`; each must be installed where the reward runs."""
    paths: list[str] = field(default_factory=list)
    """Files and directories of this machine that programs may read, at the same paths."""
    pool: Positive[int] = 2
    """Clean sandboxes that wait, started before they are needed."""


@options("data.code.limits")
class Limits:
    """Limits of one execution. Each process of a program has the limits on CPU time, memory and file size for itself; where cgroups can be
    made, memory and processes are also limited for all of them together.
    """

    cpu_s: Positive[float] = 6.0
    """CPU time, in seconds, of the program with the child processes that it waited for."""
    wall_s: Positive[float] = 15.0
    """Time on the clock, in seconds; larger than `cpu_s`, since machines are shared."""
    memory_mb: Positive[int] = 1024
    """Address space of a process, and all memory of the sandbox with its files, in MiB."""
    processes: Positive[int] = 64
    """Processes and threads at the same time."""
    file_mb: Positive[int] = 16
    """The largest file, and each of the directories /tmp and /dev/shm, in MiB."""
    output_mb: Positive[int] = 16
    """Standard output of one execution, in MiB. Standard error beyond its last 4 KiB is dropped."""
