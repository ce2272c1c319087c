"""A process group between trainer and engines, outside torch's global one.

Engines are not ranks of the trainer's world, so the weights travel over a group of their own, from rank to rank. Nothing here needs vLLM.
Every socket is bound to the address that leads to the other ranks, never to all interfaces.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_aspo.common.network import address_towards, machine

Names = Callable[[int], str]
"""What a rank is called."""


class TransferError(RuntimeError):
    """A transfer between ranks failed or outlasted its timeout; names this rank, the peer and what was being moved."""


class Transfer:
    """A tensor on its way to or from another rank. It must not be touched, nor freed, before `wait` has returned."""

    def __init__(self, group: "StatelessGroup", work: dist.Work, tensor: torch.Tensor, description: str):
        self._group, self._work, self._tensor, self._description = group, work, tensor, description

    def wait(self) -> None:
        """Returns when a received tensor is there, or a sent one may be changed. Raises TransferError after the group's timeout."""
        with self._group.explained(self._description):
            self._work.wait(timedelta(seconds=self._group.timeout_s))
            if self._tensor.is_cuda:  # NCCL's wait orders streams only; the caller reads the bytes next
                torch.cuda.current_stream(self._tensor.device).synchronize()


class StatelessGroup:
    """One rank's end of the group. After a TransferError the group is unusable: close it and connect again."""

    def __init__(
        self,
        groups: tuple[dist.Backend, dist.Backend],
        store: dist.TCPStore,
        rank: int,
        places: Sequence[str],
        timeout_s: float,
        address: str,
        names: Names,
        device: torch.device,
        connects_lazily: bool,
    ):
        self._groups = groups  # for what goes to higher ranks, and to lower ones
        self._store = store  # rank 0's store serves the others: it must live as long as the group
        self.rank = rank
        self.name_of = names
        """What a rank is called in errors."""
        self.places = tuple(places)
        """Where each rank lives."""
        self.world_size = len(places)
        self.timeout_s = timeout_s
        self.address = address
        self.device = device
        """Where tensors that it moves lie."""
        self.connects_lazily = connects_lazily
        """Whether two ranks connect at their first transfer, in a call that returns only when both have made it."""

    def connect(self, routes: Iterable[tuple[int, int]]) -> None:
        """Connect the (source, target) pairs of `routes`, in each of which this rank is one. All ranks must call it before any transfer.

        At a pair's first transfer NCCL makes a communicator, for which either rank waits for the other (pytorch#108378). Engines that pass
        weights on to one another begin to receive before they send, so each would wait for the other to send. Here every rank takes its
        routes in the same order: both ranks of the first route that is left are at it, and no circle of waiting ranks can form.
        Raises TransferError when a peer does not come.
        """
        if not self.connects_lazily:
            return
        for source, target in sorted(routes):
            byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
            if source == self.rank:
                self.send(byte, target, "the first connection").wait()
            else:
                self.receive(byte, source, "the first connection").wait()

    def send(self, tensor: torch.Tensor, target: int, what: str, lane: int = 0) -> Transfer:
        """Start sending a contiguous `tensor`; `what` names it in errors. Between two ranks, those of one lane arrive as they were sent.

        NCCL has one lane only.
        """
        description = f"{what} ({tensor.nbytes:,} bytes) to {self.name_of(target)}"
        return self._start("send", target > self.rank, tensor, target, lane, description)

    def receive(self, tensor: torch.Tensor, source: int, what: str, lane: int = 0) -> Transfer:
        """Start receiving into a contiguous `tensor`, which has as many bytes as were sent."""
        description = f"{what} ({tensor.nbytes:,} bytes) from {self.name_of(source)}"
        return self._start("recv", source < self.rank, tensor, source, lane, description)

    def note(self, key: str, value: str) -> None:
        """Leave a word for all ranks."""
        self._store.set(key, value)

    def noted(self, key: str) -> str:
        """The word that some rank leaves under this key; waits for it. Raises TransferError after the group's timeout."""
        with self.explained(f"waiting for {key}"):
            self._refuse_if_left()
            return self._store.get(key).decode()

    def close(self) -> None:
        """Leave the group and free its sockets."""
        self._groups = self._store = None

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what torch raises into a TransferError that says what was being moved."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise TransferError(
                f"{self.name_of(self.rank)} of the group at {self.address}: {what} failed after {time.monotonic() - started:.1f} s "
                f"(timeout {self.timeout_s:g} s): {_first_line(error)}"
            ) from error

    def _start(self, operation: str, upward: bool, tensor: torch.Tensor, peer: int, lane: int, description: str) -> Transfer:
        if not tensor.is_contiguous():
            raise ValueError(f"{description}: only a contiguous tensor can be moved, this one has strides {tensor.stride()}")
        with self.explained(description):
            self._refuse_if_left()
            return Transfer(self, getattr(self._groups[not upward], operation)([tensor], peer, lane), tensor, description)

    def _refuse_if_left(self) -> None:
        if self._groups is None:
            raise RuntimeError("this rank has left the group")


def stateless_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    backend: str = "gloo",
    place: str | None = None,
    names: Names = "rank {}".format,
) -> StatelessGroup:
    """Join the group that meets at rank 0's `host:port`; returns when all `world_size` ranks are there.

    `host` is an address of rank 0 on the private network (127.0.0.1 on one machine). `backend` is `gloo` (CPU tensors) or `nccl` (CUDA
    tensors on the current device). `timeout_s` bounds the meeting and later each transfer. `place` says where this rank lives, by default
    on which machine; `names` what a rank is called in errors.
    Raises TransferError naming the ranks that did not come, ValueError for an unknown backend or a rank outside the world.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is not known; expected 'gloo' or 'nccl'")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    timeout = timedelta(seconds=timeout_s)
    address = f"{host}:{port}"
    who = f"{names(rank)} of {world_size}"
    store = meeting_store(host, port, rank, world_size, timeout_s)
    places = _meet(store, rank, world_size, timeout_s, who, address, place or machine(), names)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
    try:
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            # The default device follows the host name, which may resolve to an address the peers cannot reach, or to all of them.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(host))]
            groups = (dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options),) * 2
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _watchdog_timeout(timeout)
            # NCCL does one after the other what two ranks of a communicator do: two that send each other something, and receive first,
            # would wait for each other for ever.
            prefixes = ("weights upward", "weights downward")
            groups = tuple(dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, world_size, options) for name in prefixes)
    except RuntimeError as error:
        raise TransferError(
            f"{who}: connecting to the peers of the group at {address} failed (timeout {timeout_s:g} s): {_first_line(error)}"
        ) from error
    return StatelessGroup(groups, store, rank, places, timeout_s, address, names, device, connects_lazily=backend == "nccl")


def _watchdog_timeout(timeout: timedelta) -> timedelta:
    """After how long torch's watchdog ends the whole process for an NCCL operation that is not done.

    Both count from when the operation was begun, which may be buckets before anyone waits for it. A wait has to give up first, and raise a
    TransferError that names tensor and peer.
    """
    return 2 * timeout + timedelta(seconds=60)


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


def _meet(
    store: dist.TCPStore, rank: int, world_size: int, timeout_s: float, who: str, address: str, place: str, names: Names
) -> list[str]:
    """Wait until every rank has signed in, so that a missing one is named here and not by a failing connection later; all their places."""
    deadline = time.monotonic() + timeout_s
    try:
        store.set(f"here/{rank}", place)
        missing = set(range(world_size))
        while missing:
            missing = {peer for peer in missing if not store.check([f"here/{peer}"])}
            if missing and time.monotonic() > deadline:
                absent = ", ".join(names(peer) for peer in sorted(missing))
                raise TransferError(f"{who}: {absent} did not join the group at {address} within {timeout_s:g} s")
            if missing:
                time.sleep(0.02)
        return [found.decode() for found in store.multi_get([f"here/{peer}" for peer in range(world_size)])]
    except dist.DistError as error:
        raise TransferError(f"{who}: {names(0)} left the group at {address} while the ranks were meeting: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
