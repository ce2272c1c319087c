"""The Ray cluster of a run: one of our own on this machine, or one to join."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from megatron_aspo.errors import UserError

_OBJECT_STORE_BYTES = 512 << 20
"""Of a Ray of our own: batches of tokens pass through it, weights never do."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray. Close it last."""

    ours: bool
    """Whether this process started it, and so has to end it."""
    cores: int
    """CPU cores of the smallest node, to be shared by the processes of one role on it."""
    device: str
    """`cpu | cuda`: what trainers and engines compute on."""
    slots: int
    """How many of those devices Ray can hand out; on CPU, logical CPUs."""

    def close(self) -> None:
        """Disconnect; a Ray of our own ends, with every process it started."""
        children = psutil.Process().children(recursive=True) if self.ours else []
        ray.shutdown()
        _end(children)


def open_cluster(address: str, logical_cpus: int) -> Cluster:
    """Join the cluster at `address`, or start one here with room for `logical_cpus` reservations.

    On CPU a process reserves one logical CPU, whatever its threads: trainers and engines of a synchronous run take turns on the cores. A
    Ray of our own listens on loopback only and has no dashboard.
    Raises UserError when the cluster cannot be reached.
    """
    try:
        with _own_signal_handlers():
            cores = _join(address) if address else _start(logical_cpus)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray did not start on this machine"
        raise UserError(f"{where}: {str(error).strip().splitlines()[0]}") from error
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    return Cluster(ours=not address, cores=max(1, cores), device="cuda" if gpus else "cpu", slots=gpus or cpus)


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor has instructions for it; without them it takes four times as long as float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))


def _join(address: str) -> int:
    """Returns the cores of the smallest node."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        # Ray itself tries for minutes before it says that nobody listens.
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    ray.init(address=address, log_to_driver=False, logging_level="error")
    return int(min(node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))


def _start(logical_cpus: int) -> int:
    """Returns the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    ray.init(
        address="local",  # never one that happens to run here, or that the environment names
        num_cpus=max(cores, logical_cpus),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="error",
    )
    return cores


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray 2.60 replaces the handler of SIGTERM by one that ends the process at once; ours ends the run in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: list[psutil.Process]) -> None:
    """Kill what is left of our own Ray: a worker in the middle of a computation does not hear a polite request."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
