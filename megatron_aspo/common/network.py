"""Addresses, ports and interfaces of this machine."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def machine() -> str:
    """Return a string that is equal for processes in the same PID namespace of one machine and differs for all others, such as those of
    another container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


@contextmanager
def reserved_port(host: str) -> Iterator[int]:
    """Yield a free TCP port of `host`, an address of this machine, that the system gives to no other socket within the block.

    Any process may listen there meanwhile, if its socket has SO_REUSEADDR, as that of `sync.meeting.meeting_store` has.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
        yield held.getsockname()[1]


def interface_of(ip: str) -> str:
    """Return the network interface that carries the IPv4 address `ip`, for GLOO_SOCKET_IFNAME and similar variables.

    Raises ValueError, listing this machine's addresses, when none carries it.
    """
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET:
                found[entry.address] = name
    if ip not in found:
        known = ", ".join(f"{address} ({name})" for address, name in sorted(found.items()))
        raise ValueError(f"no network interface of this machine carries {ip}; it has {known}")
    return found[ip]


def address_towards(host: str) -> str:
    """Return this machine's own address on the route to `host`. Sends nothing: it connects a datagram socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))
        return probe.getsockname()[0]
