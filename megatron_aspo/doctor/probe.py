"""Ray actors on the checked nodes."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from megatron_aspo.doctor.needs import NodeContext, RunNeeds
from megatron_aspo.doctor.node import check_node
from megatron_aspo.doctor.record import Record
from megatron_aspo.doctor.redact import redact

if TYPE_CHECKING:
    from megatron_aspo.doctor.link import LinkSpeed


class NodeProbe:
    """Runs the checks of its node. Imports neither torch nor CUDA."""

    def ready(self) -> int:
        """Return the process id."""
        return os.getpid()

    def check(self, needs: RunNeeds, context: NodeContext, limit_s: float, hide: bool) -> list[Record]:
        """Run every check of `doctor/node.py` on this node, each for at most `limit_s` seconds; return their records.

        hide: replace values of secret environment variables, and user names, in the records.
        """
        return [redact(record) if hide else record for record in check_node(needs, context, limit_s)]

    def now(self) -> float:
        return time.time()

    def sees(self, file: Path) -> bool:
        return file.exists()


class LinkEnd:
    """One end of trial connections to other nodes."""

    def __init__(self) -> None:
        self._port = ExitStack()

    def ready(self) -> int:
        """Import torch and choose the interface, as a training rank does; return the process id."""
        from megatron_aspo.common.device_environment import rank_environment
        from megatron_aspo.common.network import interface_of

        os.environ.update(rank_environment(interface_of(ray.util.get_node_ip_address()), 1, 1, False, os.environ))
        import megatron_aspo.doctor.link  # noqa: F401

        return os.getpid()

    def meeting_point(self) -> tuple[str, int]:
        """Return this node's address, and a port on it that is reserved until the next call."""
        from megatron_aspo.common.network import reserved_port

        self._port.close()
        host = ray.util.get_node_ip_address()
        return host, self._port.enter_context(reserved_port(host))

    def measure(
        self, host: str, port: int, rank: int, names: tuple[str, str], seconds: float, timeout_s: float, backend: str
    ) -> "LinkSpeed":
        """Call `measure_link` on this node."""
        from megatron_aspo.doctor.link import measure_link

        return measure_link(host, port, rank, names, seconds, timeout_s, backend)
