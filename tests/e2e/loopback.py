"""Checks on which interfaces processes listen."""

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

import psutil


def assert_only_loopback(processes: Iterable[psutil.Process]) -> None:
    """Assert that every listening socket of the processes is on the loopback interface, and that there is at least one."""
    listening = []
    for process in processes:
        try:
            listening += [(process.name(), c.laddr.ip) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:  # it ended in between
            continue
    assert listening
    open_to_others = [(name, address) for name, address in listening if not _is_loopback(address)]
    assert not open_to_others


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback
