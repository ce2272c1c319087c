"""The hosts of a cluster, from a hostfile or from the environment of MPI, Slurm or a Kubernetes job."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_aspo.common.errors import UserError

MPI_HOSTFILE = Path("/etc/mpi/hostfile")
"""The path at which the Kubernetes MPI operator mounts its hostfile."""
_MPI_VARIABLES = ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "I_MPI_HYDRA_HOST_FILE", "HYDRA_HOST_FILE")
_RANK_VARIABLES = (("NODE_RANK", "NNODES"), ("PET_NODE_RANK", "PET_NNODES"), ("JOB_COMPLETION_INDEX", "NNODES"))


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    """Name as ssh takes it: `host`, or `user@host`."""
    slots: int = 0
    """Value of `slots=`; 0 if the line has none."""


@dataclass(frozen=True)
class HostList:
    """The hosts of a cluster and where they are listed."""

    hosts: tuple[Host, ...]
    """The head first. If each node is started by its own call: the head and this node."""
    source: str
    rank: int | None = None
    """This node's number if every node makes the call itself, as the pods of a Kubernetes job do."""
    count: int = 0
    """Number of nodes of the cluster."""


def find_hosts(hostfile: str, environ: Mapping[str, str], mpi_hostfile: Path = MPI_HOSTFILE) -> HostList:
    """Return the hosts of the hostfile if one is named, else those of the environment. Raises UserError if there are none."""
    if hostfile:
        return _host_list(read_hostfile(Path(hostfile)), f"hostfile {hostfile}")
    if nodes := environ.get("SLURM_JOB_NODELIST"):
        return _host_list(
            [Host(name) for name in _slurm_names(nodes)], f"Slurm job {environ.get('SLURM_JOB_ID', '?')}, SLURM_JOB_NODELIST={nodes}"
        )
    for variable in _MPI_VARIABLES:
        if environ.get(variable):
            return _host_list(read_hostfile(Path(environ[variable])), f"MPI, {variable}={environ[variable]}")
    if mpi_hostfile.is_file():
        return _host_list(read_hostfile(mpi_hostfile), f"MPI, {mpi_hostfile}")
    for rank, count in _RANK_VARIABLES:
        if rank in environ and count in environ:
            return _from_rank_variables(rank, count, environ)
    raise UserError(
        "no hosts are given: name a hostfile, or call this in an environment that names them (Slurm: SLURM_JOB_NODELIST; MPI: "
        f"{', '.join(_MPI_VARIABLES)} or {MPI_HOSTFILE}; one call on each node: MASTER_ADDR, NNODES and NODE_RANK)"
    )


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of an MPI hostfile, which has `host`, `host slots=N` or `host:N` on a line and comments after `#`. Slots of repeated
    hosts add up."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read: {error}; name a text file with one host a line") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, _, slots = words[0].partition(":")
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"{path}:{number}: {word!r} is not understood; a line is a host and fields such as slots=8")
            slots = value if key == "slots" else slots
        if slots and not slots.isdigit():
            raise UserError(f"{path}:{number}: slots={slots} is not a whole number")
        # The name becomes an argument of ssh, which takes a leading dash for an option.
        if not re.fullmatch(r"([\w.-]+@)?\w[\w.-]*", name, re.ASCII) or name.startswith("-"):
            raise UserError(f"{path}:{number}: {name!r} is no host name; the first field of a line is host or user@host")
        hosts[name] = Host(name, hosts.get(name, Host(name)).slots + int(slots or 0))
    if not hosts:
        raise UserError(f"hostfile {path} names no host; write one a line, the head first")
    return list(hosts.values())


def choose_hosts(words: str, hosts: Sequence[Host]) -> list[int]:
    """Return the positions that `words` selects: comma-separated names, numbers from 1 or ranges such as 2-4. Raises UserError."""
    names = [host.name for host in hosts]
    chosen: list[int] = []
    for word in filter(None, words.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            first, last = int(match[1]), int(match[2] or match[1])
            if not 1 <= first <= last <= len(hosts):
                raise UserError(
                    f"--resources: there are no hosts {word}; they are numbered from 1 to {len(hosts)} in the order of the hostfile"
                )
            chosen += range(first - 1, last)
        else:
            raise UserError(f"--resources: {word} is none of the hosts {', '.join(names)}; name one, or its number from 1")
    return chosen


def _host_list(hosts: Sequence[Host], source: str) -> HostList:
    return HostList(tuple(hosts), source, count=len(hosts))


def _slurm_names(nodes: str) -> list[str]:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("SLURM_JOB_NODELIST is set, but there is no scontrol on PATH to expand it; add it, or name a hostfile") from error
    if done.returncode or not done.stdout.split():
        raise UserError(
            f"scontrol show hostnames {nodes} failed with status {done.returncode}: {done.stderr.strip()}; name a hostfile instead"
        )
    return done.stdout.split()


def _from_rank_variables(rank: str, count: str, environ: Mapping[str, str]) -> HostList:
    values = {name: environ.get(name, "") for name in (rank, count)}
    if not all(value.isdigit() for value in values.values()) or not int(values[rank]) < int(values[count]):
        raise UserError(f"{rank}={values[rank]} {count}={values[count]} is no node of a number of nodes; expected 0 <= {rank} < {count}")
    head = environ.get("MASTER_ADDR", "")
    number, nodes = int(values[rank]), int(values[count])
    if not head and nodes > 1:
        raise UserError(f"{count}={nodes} but MASTER_ADDR is not set; set it to the name or address of the node whose {rank} is 0")
    this = Host(os.uname().nodename)
    # On the head some operators set MASTER_ADDR=localhost, a name under which the other nodes cannot reach it.
    hosts = (this if head in ("", "localhost") else Host(head),) if number == 0 else (Host(head), this)
    return replace(_host_list(hosts, f"one call on each node, {rank}={number} of {count}={nodes}"), rank=number, count=nodes)
