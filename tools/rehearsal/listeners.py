"""Find sockets of hosts that accept connections from anywhere, while a rehearsal runs."""

import threading

from tests.e2e.launching import listening
from tests.hosts import Hosts

RAYS_PORTS = range(6379, 7379)
"""Ports of the launcher's map: Ray's own servers listen on all interfaces, and cannot be told otherwise."""
_EVERY_S = 5.0


class WildcardListeners:
    """Collects the listeners that are open to all and are not Ray's own. A context manager: entering begins to look."""

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.found: set[str] = set()
        """Host, process and port of each."""
        self.looks = 0
        """Number of times that all hosts were inspected."""
        self._failure: Exception | None = None

    def __enter__(self) -> "WildcardListeners":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        if self._failure is not None:
            raise RuntimeError("the sockets of the hosts could not be listed to the end") from self._failure

    def _watch(self) -> None:
        try:
            while not self._done.wait(_EVERY_S):
                for host in self._hosts.numbers:
                    open_to_all = [listener for listener in listening(self._hosts, host) if listener.open_to_all]
                    self.found |= {f"host {host}: {one.process}, port {one.port}" for one in open_to_all if one.port not in RAYS_PORTS}
                self.looks += 1
        except Exception as error:
            self._failure = error
