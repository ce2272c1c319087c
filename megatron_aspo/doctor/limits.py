"""Checks of the limits on open files, locked memory and processes."""

import resource
from pathlib import Path

import psutil

from megatron_aspo.doctor.record import Record, failed, ok, warning

_FILES_LEAST, _FILES_GOOD = 1024, 8192
"""Ray 2.60 recommends 8192 open files. With 1024, Ray's servers run out of them with a few tens of worker processes."""
_RAY_RAISES_TO = 65536
"""`ray.init` raises a lower soft limit to the hard limit, at most to this. `ray start` does not."""
_PROCESSES_LEAST, _PROCESSES_GOOD = 512, 4096
"""Processes and threads that must still be available: gloo groups have threads, and so have torch and Ray in every process."""
_INFINIBAND = Path("/sys/class/infiniband")


def check_open_files(in_ray: bool) -> Record:
    """Check the limit of open files.

    in_ray: whether this process inherited the limit that Ray was started with; if not, `ray.init` will start Ray.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "unlimited")
    most = hard if hard != resource.RLIM_INFINITY else _RAY_RAISES_TO
    count = soft if in_ray else max(soft, min(most, _RAY_RAISES_TO))
    detail = f"{count} for each process" + (f" (Ray raises the soft limit of {soft})" if count > soft else "")
    if count >= _FILES_GOOD:
        return ok("open files", detail)
    cure = (
        f"run ulimit -n {_RAY_RAISES_TO} before Ray is started; if that is refused, raise nofile in /etc/security/limits.conf, "
        "LimitNOFILE= in the systemd unit, or docker run --ulimit nofile="
    )
    return (failed if count < _FILES_LEAST else warning)("open files", f"{detail}; Ray recommends {_FILES_GOOD}", cure)


def check_locked_memory() -> Record:
    """Check the limit of locked memory, which only InfiniBand and RoCE cards need: they lock the memory that they read and write."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    amount = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    cards = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    if soft == resource.RLIM_INFINITY or not cards:
        return ok("locked memory", f"{amount}; {len(cards)} InfiniBand or RoCE cards")
    return warning(
        "locked memory",
        f"{amount}, and NCCL locks its buffers for {', '.join(cards)}",
        "run ulimit -l unlimited before Ray is started (memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity in the systemd unit, "
        "docker run --ulimit memlock=-1)",
    )


def check_processes() -> Record:
    """Check the limit of processes, to which threads count. In containers a control group's limit is often the lower one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    room = []
    if soft != resource.RLIM_INFINITY and not _may_exceed():
        room.append((soft - _threads_of_user(), f"the user may have {soft}", "raise it: ulimit -u, or nproc in /etc/security/limits.conf"))
    if (found := cgroup_processes()) is not None:
        used, most = found
        cure = "raise the limit of the container or unit: docker run --pids-limit, TasksMax= of systemd, podPidsLimit of Kubernetes"
        room.append((most - used, f"the control group may have {most}", cure))
    if not room:
        return ok("processes", "no limit")
    free, whose, cure = min(room)
    detail = f"{whose} processes and threads, {max(0, free)} of them are free"
    if free >= _PROCESSES_GOOD:
        return ok("processes", detail)
    return (failed if free < _PROCESSES_LEAST else warning)("processes", detail, cure)


def cgroup_processes(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Return used and allowed processes by the tightest limit of this process's control group and its parents; None without a limit."""
    found = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "pids"):
            continue
        top = root / controllers
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(top):
                break
            limit, used = directory / "pids.max", directory / "pids.current"
            if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
                found.append((int(used.read_text()), int(most)))
    return min(found, key=lambda pair: pair[1] - pair[0], default=None)


def _may_exceed() -> bool:
    """Return whether RLIMIT_NPROC does not apply: the kernel exempts CAP_SYS_RESOURCE (bit 24) and CAP_SYS_ADMIN (21)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & (1 << 24 | 1 << 21))
    return False


def _threads_of_user() -> int:
    user = psutil.Process().uids().real
    total = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        if process.info["uids"] and process.info["uids"].real == user:
            total += process.info["num_threads"] or 1
    return total
