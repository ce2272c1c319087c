"""Shared by the launcher's tests: its calls on hosts made of namespaces, and what runs there."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import ROOT, Hosts

START_S = 120
STATE = "/tmp/state"
"""Every host has its own /tmp."""
FAST_TO_NOTICE = "-o ServerAliveInterval=1 -o ServerAliveCountMax=2 -o ConnectTimeout=3"


@dataclass(frozen=True)
class Listener:
    """A socket on which a process of a host accepts connections."""

    host: int
    address: str
    port: int
    process: str

    @property
    def open_to_all(self) -> bool:
        return self.address in ("0.0.0.0", "*", "[::", "::")


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "MASTER_", "GLOO_", "NCCL_"))}
    return kept | {"PYTHON": sys.executable} | more


def launcher(hosts: Hosts, tool: str, *options: str, ssh: str = FAST_TO_NOTICE) -> list[str]:
    return ["bash", str(ROOT / "tools" / tool), *options, "--dir", STATE, "--ssh-options", f"{hosts.ssh_options} {ssh}"]


def start(hosts: Hosts, *options: str, hostfile: Path | None = None, **how) -> subprocess.CompletedProcess:
    """Start the cluster from host 1, the head."""
    small = ["--num-cpus", "2", "--object-store-mb", "100", "--timeout", str(START_S)]
    words = launcher(hosts, "start_ray.sh", str(hostfile or hosts.hostfile), *small, *options)
    return hosts.run(1, *words, env=environment(), timeout_s=2 * START_S, **how)


def stop(hosts: Hosts, *options: str, **how) -> subprocess.CompletedProcess:
    return hosts.run(1, *launcher(hosts, "stop_ray.sh", *options), env=environment(), **how)


def nothing_runs(hosts: Hosts, *which: int) -> bool:
    return not any(hosts.processes(host) for host in which)


def names(hosts: Hosts, host: int) -> dict[int, str]:
    """Return process id on this machine → name of its program."""
    found = {}
    for pid in hosts.processes(host):
        try:
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # it ended
            continue
    return found


def listening(hosts: Hosts, host: int) -> list[Listener]:
    lines = hosts.run(host, "ss", "-Hltnp").stdout.splitlines()
    found = []
    for line in lines:
        address, _, port = line.split()[3].rpartition(":")
        process = re.search(r'users:\(\("([^"]+)"', line)
        found.append(
            Listener(host, address.partition("%")[0].removeprefix("[::ffff:").removesuffix("]"), int(port), process[1] if process else "?")
        )
    return found
