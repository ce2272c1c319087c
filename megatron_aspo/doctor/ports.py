"""Check of TCP ports: those of Ray, and the ephemeral ones, which the kernel assigns at random."""

from collections.abc import Mapping
from pathlib import Path

import psutil

from megatron_aspo.doctor.record import Record, ok, warning

HEAD_PORT = 6379
WORKER_PORTS = range(10002, 20000)
"""Default ports of Ray's workers, changed by `ray start --min-worker-port --max-worker-port`."""
_RAY = ("gcs_server", "raylet", "ray::", "ray-")
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def check_ports(ray_ports: Mapping[int, str], wanted: tuple[int, ...] = (HEAD_PORT,), ephemeral: Path = _EPHEMERAL) -> Record:
    """Check Ray's TCP ports against the ephemeral range and other programs.

    ray_ports: those of this node's Ray servers, with their names; empty before Ray is started. wanted: those that Ray would then take.

    A Ray server on a port of the ephemeral range cannot restart there once another process has been assigned that port.
    """
    first, last = map(int, ephemeral.read_text().split())
    taken = find_listeners()
    detail = f"ephemeral range {first}–{last}"
    if first < WORKER_PORTS.stop:
        return warning(
            "ports",
            f"{detail} overlaps the ports {WORKER_PORTS.start}–{WORKER_PORTS.stop - 1} of Ray's workers",
            f"sysctl net.ipv4.ip_local_port_range='32768 60999', or ray start --min-worker-port --max-worker-port below {first}",
        )
    if risky := [f"{name} on {port}" for port, name in sorted(ray_ports.items()) if first <= port <= last]:
        return warning(
            "ports",
            f"{detail} holds ports of Ray's servers: {', '.join(risky)}",
            f"give ray start fixed ports below {first}: --port --node-manager-port --object-manager-port --metrics-export-port "
            "--runtime-env-agent-port --dashboard-agent-grpc-port --dashboard-agent-listen-port",
        )
    for port in wanted if not ray_ports else ():
        if port in taken and not is_ray(taken[port]):
            owner = f"by {taken[port]}" if taken[port] else "by a process of another user"
            return warning(
                "ports", f"port {port} of a Ray head is taken {owner}", f"end it, or start the head on another: --port={port + 1}"
            )
    others = sum(port in WORKER_PORTS and not is_ray(name) for port, name in taken.items())
    if others > len(WORKER_PORTS) // 2:
        cure = "find out what listens there (ss -ltnp), or give Ray's workers other ports"
        return warning("ports", f"{others} of the {len(WORKER_PORTS)} ports of Ray's workers are taken by others", cure)
    findings = [f"{port} {'taken by Ray' if port in taken else 'free'}" for port in wanted if not ray_ports]
    findings += [f"{name} {port}" for port, name in sorted(ray_ports.items())]
    return ok("ports", ", ".join([*findings, detail]))


def find_listeners() -> dict[int, str]:
    """Return the TCP ports on which a process listens, with its name, which is empty if this user may not see it."""
    names: dict[int, str] = {}
    found: dict[int, str] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        pid, port, name = connection.pid, connection.laddr.port, ""
        if pid is not None:
            if pid not in names:
                try:
                    names[pid] = psutil.Process(pid).name()
                except psutil.Error:
                    names[pid] = ""
            name = names[pid]
        found[port] = name or found.get(port, "")
    return found


def is_ray(name: str) -> bool:
    return name.startswith(_RAY)
