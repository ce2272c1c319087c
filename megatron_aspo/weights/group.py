"""A process group between trainer and engines, outside torch's global one.

Engines are not ranks of the trainer's world, so the weights travel over a group of their own: rank 0 sends, the engines' workers receive.
Nothing here needs vLLM. Every socket is bound to the address that leads to the other ranks, never to all interfaces.
"""

import contextlib
import socket
import time
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist


class TransferError(RuntimeError):
    """A transfer between ranks failed or outlasted its timeout; names this rank, the peer and what was being moved."""


class StatelessGroup:
    """One rank's end of the group. After a TransferError the group is unusable: close it and connect again."""

    def __init__(self, group: dist.Backend, store: dist.TCPStore, rank: int, world_size: int, timeout_s: float, address: str):
        self._group = group
        self._store = store  # rank 0's store serves the others: it must live as long as the group
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.address = address

    def broadcast(self, tensor: torch.Tensor, root: int = 0, what: str = "a tensor") -> None:
        """Copy `tensor` of rank `root` into `tensor` of every rank, in place; returns when it is there.

        `tensor` is contiguous, with the same shape and element type on all ranks. `what` names it in errors.
        Raises ValueError for a tensor that is not contiguous, TransferError when the peers do not take part within the timeout.
        """
        if not tensor.is_contiguous():
            raise ValueError(f"{what}: only a contiguous tensor can be broadcast, this one has strides {tensor.stride()}")
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        options.timeout = timedelta(seconds=self.timeout_s)
        started = time.monotonic()
        try:
            self._group.broadcast([tensor], options).wait()
            if tensor.is_cuda:  # NCCL's wait orders streams only; the caller reads the bytes next
                torch.cuda.synchronize(tensor.device)
        except RuntimeError as error:
            peer = f"rank {root}" if self.rank != root else f"the {self.world_size - 1} receiving ranks"
            raise TransferError(
                f"rank {self.rank} of {self.world_size}: {what} ({tensor.numel() * tensor.element_size():,} bytes), "
                f"{'from' if self.rank != root else 'to'} {peer} in the group at {self.address}, failed after "
                f"{time.monotonic() - started:.1f} s (timeout {self.timeout_s:g} s): {_first_line(error)}"
            ) from error

    def close(self) -> None:
        """Leave the group and free its sockets."""
        self._group = None
        self._store = None


def stateless_group(host: str, port: int, rank: int, world_size: int, timeout_s: float, backend: str = "gloo") -> StatelessGroup:
    """Join the group that meets at rank 0's `host:port`; returns when all `world_size` ranks are there.

    `host` is an address of rank 0 on the private network (127.0.0.1 on one machine). `backend` is `gloo` (CPU tensors) or `nccl` (CUDA
    tensors on the current device). `timeout_s` bounds the meeting and later each broadcast.
    Raises TransferError naming the ranks that did not come, ValueError for an unknown backend or a rank outside the world.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is not known; expected 'gloo' or 'nccl'")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    timeout = timedelta(seconds=timeout_s)
    address = f"{host}:{port}"
    who = f"rank {rank} of {world_size}"
    store = meeting_store(host, port, rank, world_size, timeout_s)
    _meet(store, rank, world_size, timeout_s, who, address)
    prefixed = dist.PrefixStore("weights", store)
    try:
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            # The default device follows the host name, which may resolve to an address the peers cannot reach, or to all of them.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=_address_towards(host))]
            group = dist.ProcessGroupGloo(prefixed, rank, world_size, options)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = dist.ProcessGroupNCCL(prefixed, rank, world_size, options)
    except RuntimeError as error:
        raise TransferError(
            f"{who}: connecting to the peers of the group at {address} failed (timeout {timeout_s:g} s): {_first_line(error)}"
        ) from error
    return StatelessGroup(group, store, rank, world_size, timeout_s, address)


def free_port(host: str) -> int:
    """A TCP port of `host`, an address of this machine, that nothing listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def interface_of(ip: str) -> str:
    """Name of the network interface that carries the IPv4 address `ip`, for GLOO_SOCKET_IFNAME and its like.

    Raises ValueError listing this machine's addresses when none carries it.
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


def meeting_store(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The key-value store through which the ranks find each other; rank 0 serves it, at `host` only.

    Raises TransferError when rank 0 cannot listen there or does not answer within the timeout.
    """
    timeout = timedelta(seconds=timeout_s)
    who = f"rank {rank} of {world_size}"
    common = {"world_size": world_size, "timeout": timeout, "wait_for_workers": False}
    if rank != 0:
        try:
            return dist.TCPStore(host, port, is_master=False, **common)
        except dist.DistError as error:
            raise TransferError(
                f"{who}: rank 0 did not answer at {host}:{port} within {timeout.total_seconds():g} s: {_first_line(error)}"
            ) from error
    # TCPStore on its own listens on every interface; a socket bound beforehand keeps it on the one named by `host`.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise TransferError(f"{who}: cannot listen at {host}:{port}: {error}") from error
        listener.listen()
        undo.pop_all()
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), **common)


def _meet(store: dist.TCPStore, rank: int, world_size: int, timeout_s: float, who: str, address: str) -> None:
    """Wait until every rank has signed in, so that a missing one is named here and not by a failing connection later."""
    deadline = time.monotonic() + timeout_s
    try:
        store.set(f"here/{rank}", b"1")
        missing = set(range(world_size))
        while missing:
            missing = {peer for peer in missing if not store.check([f"here/{peer}"])}
            if missing and time.monotonic() > deadline:
                raise TransferError(f"{who}: rank(s) {sorted(missing)} did not join the group at {address} within {timeout_s:g} s")
            if missing:
                time.sleep(0.02)
    except dist.DistError as error:
        raise TransferError(f"{who}: rank 0 left the group at {address} while the ranks were meeting: {_first_line(error)}") from error


def _address_towards(host: str) -> str:
    """This machine's own address on the route to `host`. Connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))
        return probe.getsockname()[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
