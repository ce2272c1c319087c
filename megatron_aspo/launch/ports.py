"""The ports of a cluster: fixed numbers, counted from the head's port, the same on every host, all below the ephemeral range."""

from dataclasses import dataclass

from megatron_aspo.common.errors import UserError

SPAN = 1000
"""Number of ports of a cluster: the next one on the same hosts may begin this much higher."""
_FIRST_WORKER = 20


@dataclass(frozen=True)
class PortMap:
    """The ports of Ray's servers."""

    base: int

    def __post_init__(self):
        """Raises UserError when the span does not fit between 1024 and 65535."""
        if not 1024 <= self.base <= 65536 - SPAN:
            raise UserError(f"--port {self.base}: a cluster takes {SPAN} ports from there; choose one between 1024 and {65536 - SPAN}")

    @property
    def on_every_host(self) -> dict[str, int]:
        """The fixed ports of every host: option of `ray start` → port."""
        names = ("node-manager", "object-manager", "runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
        return {f"{name}-port": self.base + 1 + i for i, name in enumerate(names)}

    @property
    def on_the_head(self) -> dict[str, int]:
        """The head's additional ports: option of `ray start` → port."""
        return {"port": self.base, "dashboard-port": self.base + 7, "ray-client-server-port": self.base + 8}

    @property
    def workers(self) -> tuple[int, int]:
        """The first and last port of the worker processes."""
        return self.base + _FIRST_WORKER, self.base + SPAN - 1

    def of(self, head: bool) -> dict[str, int]:
        """Return a host's fixed ports, by option."""
        return (self.on_the_head if head else {}) | self.on_every_host

    def arguments(self, head: bool) -> list[str]:
        """Return the port options of `ray start`."""
        first, last = self.workers
        fixed = [f"--{option}={port}" for option, port in self.of(head).items()]
        return [*fixed, f"--min-worker-port={first}", f"--max-worker-port={last}"]

    def lines(self, dashboard: bool, metrics: bool) -> list[str]:
        """Format the port map, for people who open or close ports."""
        unused = {"dashboard-port": not dashboard, "metrics-export-port": not metrics}
        rows = [("head", option, port) for option, port in self.on_the_head.items()]
        rows += [("all", option, port) for option, port in self.on_every_host.items()]
        first, last = self.workers
        table = [
            f"  {hosts:5}{'gcs-server-port' if option == 'port' else option:28}{port}{' (off)' if unused.get(option) else ''}"
            for hosts, option, port in rows
        ]
        return [*table, f"  {'all':5}{'worker ports':28}{first}-{last}"]
