"""The Ray cluster of a run: started on this machine, or joined."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.runtime.guard import Guard, environment_set
from megatron_aspo.runtime.machine import check_machine

_OBJECT_STORE_BYTES = 512 << 20
"""Object store of a Ray that we start: batches of tokens pass through it, weights never do."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray, to be closed after everything that uses it."""

    ours: bool
    """Whether this process started the cluster and so must end it."""
    cores: int
    """CPU cores of the smallest node, shared by the processes of one role on it."""
    device: str
    """`cpu | cuda`: device of trainers and engines."""
    slots: int
    """Number of those devices that Ray can assign; on CPU, logical CPUs."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """All resources that Ray can assign, custom ones included, with their amounts."""
    guard: Guard | None = None
    """Ends the processes of a Ray that we started if this process dies first."""

    def close(self) -> None:
        """Disconnect; a Ray that we started ends with every process that it started."""
        ray.shutdown()
        if self.guard is not None:
            self.guard.close()


def open_cluster(address: str, logical_cpus: int, engines: EngineSizes | None = None) -> Cluster:
    """Join the cluster at `address`, or start one here with room for `logical_cpus` reservations.

    On CPU a process reserves one logical CPU, whatever its threads: trainers and engines of a synchronous run alternate on the cores. A
    Ray that is started here listens on loopback only, has no dashboard, and ends with this process for any reason. engines: sizes of the
    engines that will run, for which this machine's shared memory is checked.
    Raises UserError when the cluster cannot be reached, or when this machine lacks what Ray or the engines need.
    """
    if ray.is_initialized():
        raise UserError("this process is connected to a Ray cluster already; disconnect it first (Cluster.close or ray.shutdown)")
    # The first failure of several calls is raised, and Ray would print the tracebacks of the others.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    guard = None
    if not address:
        check_machine(engines or EngineSizes())
        guard = Guard()
    try:
        with _own_signal_handlers():
            cores = _start(logical_cpus, guard) if guard else _join(address)
    except BaseException as error:
        ray.shutdown()
        if guard:
            guard.close()
        if not isinstance(error, (OSError, RuntimeError, ValueError, RayError)):
            raise
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray did not start on this machine"
        raise UserError(f"{where}: {one_line(error)}") from error
    resources = ray.cluster_resources()
    gpus, cpus = (int(resources.get(kind, 0)) for kind in ("GPU", "CPU"))
    device = "cuda" if gpus else "cpu"
    return Cluster(ours=not address, cores=max(1, cores), device=device, slots=gpus or cpus, resources=resources, guard=guard)


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this processor has bfloat16 instructions; without them bfloat16 takes four times as long as float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))


def _join(address: str) -> int:
    """Join the cluster and return the cores of its smallest node."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        # Ray itself tries for minutes before it reports that nothing listens.
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return int(min(node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))


def _start(logical_cpus: int, guard: Guard) -> int:
    """Start Ray and return the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    with _loopback_only(), guard.marking():
        ray.init(
            address="local",  # never a running cluster, or one that the environment names
            num_cpus=max(cores, logical_cpus),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    guard.require_watching()
    if not ip_address(address := ray.util.get_node_ip_address()).is_loopback:
        raise RuntimeError(f"Ray {ray.__version__} listens on {address}, which others can reach, although it was to use loopback only")
    return cores


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make the processes that Ray starts inside the block listen on loopback only.

    Ray 2.60 listens on every interface unless an environment variable forbids a cluster. Each process reads it once, when it imports Ray;
    since this process may have imported Ray earlier, the constant that it read is replaced as well.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment_set({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore our signal handlers: Ray 2.60 replaces that of SIGTERM by one that exits at once; ours ends the run in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
