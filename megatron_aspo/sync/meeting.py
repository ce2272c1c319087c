"""The meeting of the ranks of a group, at a key-value store that rank 0 serves.

Here the ranks also compare what both sides must agree on (`terms`), so that a mismatch is named at once instead of ending in a timeout.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist

from megatron_aspo.common.errors import first_line

Names = Callable[[int], str]
"""Rank → its name for errors."""
_POLL_S = 0.02
"""Seconds between two looks at the store while the ranks meet."""
_REFUSAL_GRACE_S = 10.0
"""Upper bound on the time for which rank 0 waits until the others have read why the ranks do not connect."""
_MAX_NAMED = 4
"""Terms that an error names one by one."""


class TransferError(RuntimeError):
    """A transfer between ranks, or connecting for it, failed or timed out; names this rank, its peer and what was being moved."""


def meeting_store(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """Return the key-value store through which the ranks find each other; rank 0 serves it, at `host` only.

    Raises TransferError when rank 0 cannot listen there or does not answer within the timeout.
    """
    timeout = timedelta(seconds=timeout_s)
    title = f"rank {rank} of {world_size}"
    common = {"world_size": world_size, "timeout": timeout, "wait_for_workers": False}
    if rank != 0:
        try:
            return dist.TCPStore(host, port, is_master=False, **common)
        except dist.DistError as error:
            raise TransferError(
                f"{title}: rank 0 did not answer at {host}:{port} within {timeout.total_seconds():g} s: {first_line(error)}"
            ) from error
    # TCPStore on its own listens on every interface; a socket bound beforehand keeps it on the one named by `host`.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise TransferError(f"{title}: cannot listen at {host}:{port}: {error}") from error
        listener.listen()
        undo.pop_all()
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), **common)


class Meeting:
    """The sign-in of all ranks at the store, so that a missing or differing rank is named here and not by a failing connection later."""

    def __init__(self, store: dist.TCPStore, rank: int, world_size: int, timeout_s: float, address: str, names: Names):
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._address, self._names = address, names
        self._title = f"{names(rank)} of {world_size}"

    def hold(self, host: str, terms: Mapping[str, object]) -> list[str]:
        """Sign in and wait for all ranks; return the host of each. Rank 0's terms are those that the others' must equal."""
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._rank == 0:
                self._store.set("terms", json.dumps(terms))
            else:
                self._wait_for({0: "terms"}, deadline)
                self._compare(terms, json.loads(self._store.get("terms")))
            self._store.set(f"here/{self._rank}", host)
            keys = {peer: f"here/{peer}" for peer in range(self._world_size)}
            self._wait_for(keys, deadline)
            return [found.decode() for found in self._store.multi_get(list(keys.values()))]
        except dist.DistError as error:
            raise TransferError(
                f"{self._title}: {self._names(0)} left the group at {self._address} while the ranks were meeting: {first_line(error)}"
            ) from error

    def _wait_for(self, keys: Mapping[int, str], deadline: float) -> None:
        """Wait until each of these ranks has set its key, or some rank has refused the terms."""
        missing = set(keys)
        while missing:
            missing = {peer for peer in missing if not self._store.check([keys[peer]])}
            if self._store.check(["refusal"]):
                self._raise_refusal()
            if missing and time.monotonic() > deadline:
                absent = ", ".join(self._names(peer) for peer in sorted(missing))
                raise TransferError(f"{self._title}: {absent} did not join the group at {self._address} within {self._timeout_s:g} s")
            if missing:
                time.sleep(_POLL_S)

    def _raise_refusal(self) -> None:
        """Raise the reason why some rank refused. Rank 0 serves the store a little longer, so that the others can read it too."""
        reason = self._store.get("refusal").decode()
        self._store.set(f"read/{self._rank}", "")
        unread = set(range(self._world_size)) if self._rank == 0 else set()
        deadline = time.monotonic() + min(_REFUSAL_GRACE_S, self._timeout_s)
        while unread := {peer for peer in unread if not self._store.check([f"read/{peer}"])}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        raise TransferError(reason)

    def _compare(self, own: Mapping[str, object], first: Mapping[str, object]) -> None:
        """Raise TransferError, on all ranks, unless this rank's terms are those of rank 0."""
        own = json.loads(json.dumps(own))
        differing = [
            f"{name} is {first.get(name, 'absent')} there and {own.get(name, 'absent')} here"
            for name in dict.fromkeys((*first, *own))
            if first.get(name, "absent") != own.get(name, "absent")
        ]
        if not differing:
            return
        more = f", and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
        reason = (
            f"{self._names(0)} and {self._title} of the group at {self._address} disagree on the transfer: "
            f"{', '.join(differing[:_MAX_NAMED])}{more}; start both sides from the same recipe, with the same version of megatron_aspo"
        )
        self._store.set("refusal", reason)
        self._raise_refusal()
