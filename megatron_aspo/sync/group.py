"""A process group of training ranks and engine workers, apart from torch's global one.

Engines are not ranks of the trainer's world, so weights travel through a group of their own, from rank to rank. Every socket is bound to
the address that leads to the other ranks, never to all interfaces.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from megatron_aspo.common.errors import first_line
from megatron_aspo.common.network import address_towards, machine
from megatron_aspo.sync.meeting import Meeting, Names, TransferError, meeting_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend  # dist.Backend is another class: the name of a backend


class _Connections(NamedTuple):
    """The process groups and the store of a `StatelessGroup`, which its `close` frees together."""

    groups: "tuple[Backend, Backend]"
    """For transfers to higher ranks, and to lower ranks."""
    store: dist.TCPStore
    """Rank 0's store serves the others: it must live as long as the group."""


class Transfer:
    """A tensor in flight to or from another rank. It must be neither touched nor freed before `wait` has returned."""

    def __init__(self, group: "StatelessGroup", work: dist.Work, tensor: torch.Tensor, description: str):
        self._group, self._work, self._tensor, self._description = group, work, tensor, description

    def wait(self) -> None:
        """Wait until a received tensor has arrived, or a sent one may be changed. Raises TransferError after the group's timeout."""
        with self._group.errors_explained(self._description):
            self._work.wait(timedelta(seconds=self._group.timeout_s))
            if self._tensor.is_cuda:  # NCCL's wait orders streams only; the caller reads the bytes next
                torch.cuda.current_stream(self._tensor.device).synchronize()


class StatelessGroup:
    """One rank's end of the group. After a TransferError the group is unusable: close it and connect again."""

    def __init__(
        self,
        groups: "tuple[Backend, Backend]",
        store: dist.TCPStore,
        rank: int,
        hosts: Sequence[str],
        timeout_s: float,
        address: str,
        names: Names,
        device: torch.device,
        connects_lazily: bool,
    ):
        self._connections: _Connections | None = _Connections(groups, store)
        self.rank = rank
        self.name_of = names
        """Rank → its name for errors."""
        self.hosts = tuple(hosts)
        """The host of each rank."""
        self.world_size = len(hosts)
        self.timeout_s = timeout_s
        self.address = address
        self.device = device
        """The device of the tensors that it moves."""
        self.connects_lazily = connects_lazily
        """Whether two ranks connect at their first transfer, in a call that blocks until both have made it."""

    def connect(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Connect the (source, target) pairs of ranks that include this rank. All ranks must call it before any transfer.

        At a pair's first transfer NCCL creates a communicator, for which each rank waits for the other (pytorch#108378). Engines that pass
        weights on to one another start receiving before they send, so each would wait for the other to send. Here every rank takes its
        pairs in the same order: both ranks of the first pair that is left are at it, so no cycle of waiting ranks can form.
        Raises TransferError when a peer does not come.
        """
        if not self.connects_lazily:
            return
        for source, target in sorted(pairs):
            byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
            if source == self.rank:
                self.send(byte, target, "the first connection").wait()
            else:
                self.receive(byte, source, "the first connection").wait()

    def send(self, tensor: torch.Tensor, target: int, what: str, lane: int = 0) -> Transfer:
        """Start sending a contiguous `tensor`; `what` names it in errors. Between two ranks, the tensors of a lane arrive in order.

        NCCL has one lane only.
        """
        description = f"{what} ({tensor.nbytes:,} bytes) to {self.name_of(target)}"
        return self._start("send", target > self.rank, tensor, target, lane, description)

    def receive(self, tensor: torch.Tensor, source: int, what: str, lane: int = 0) -> Transfer:
        """Start receiving into a contiguous `tensor` of as many bytes as were sent."""
        description = f"{what} ({tensor.nbytes:,} bytes) from {self.name_of(source)}"
        return self._start("recv", source < self.rank, tensor, source, lane, description)

    def compare_with_peers(self, what: str, values: Mapping[int, str]) -> None:
        """Compare a value for each peer with the peer's value for this rank. All ranks must call it.

        Raises TransferError, naming both ranks, when two values differ, and when a peer does not come.
        """
        self.set_value(f"{what} of {self.name_of(self.rank)}", json.dumps({str(peer): value for peer, value in values.items()}))
        for peer, own in values.items():
            others = json.loads(self.wait_for_value(f"{what} of {self.name_of(peer)}"))
            if (other := others.get(str(self.rank), "none")) != own:
                raise TransferError(
                    f"{self.name_of(self.rank)} and {self.name_of(peer)} of the group at {self.address} have derived different {what}s for "
                    f"the messages between them: SHA-256 {own[:12]} here, {other[:12]} there; run the same version of megatron_aspo on "
                    "both nodes"
                )

    def set_value(self, key: str, value: str) -> None:
        """Make a value known to all ranks under this key."""
        self._connected().store.set(key, value)

    def wait_for_value(self, key: str) -> str:
        """Return the value that some rank sets under this key. Raises TransferError after the group's timeout."""
        with self.errors_explained(f"waiting for the {key}"):
            return self._connected().store.get(key).decode()

    def close(self) -> None:
        """Leave the group and free its sockets."""
        self._connections = None

    @contextlib.contextmanager
    def errors_explained(self, what: str) -> Iterator[None]:
        """Turn torch's exceptions into a TransferError that names what was being moved."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise TransferError(
                f"{self.name_of(self.rank)} of the group at {self.address}: {what} failed after {time.monotonic() - started:.1f} s "
                f"(timeout {self.timeout_s:g} s): {first_line(error)}"
            ) from error

    def _start(self, operation: str, upward: bool, tensor: torch.Tensor, peer: int, lane: int, description: str) -> Transfer:
        if not tensor.is_contiguous():
            raise ValueError(f"{description}: only a contiguous tensor can be moved, this one has strides {tensor.stride()}")
        with self.errors_explained(description):
            work = getattr(self._connected().groups[not upward], operation)([tensor], peer, lane)
            return Transfer(self, work, tensor, description)

    def _connected(self) -> _Connections:
        """Return the connections; callers keep no reference, which a traceback could hold. Raises RuntimeError after `close`."""
        if self._connections is None:
            raise RuntimeError("this rank has left the group")
        return self._connections


def stateless_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    backend: str = "gloo",
    own_host: str | None = None,
    names: Names = "rank {}".format,
    terms: Mapping[str, object] | None = None,
) -> StatelessGroup:
    """Join the group that meets at rank 0's `host:port`; return once all `world_size` ranks are there.

    host: an address of rank 0 on the private network (127.0.0.1 on one machine). timeout_s: bounds the meeting, and later each transfer.
    backend: `gloo` (CPU tensors) or `nccl` (CUDA tensors on the current device). own_host: what identifies the machine of this rank;
    default: its machine id. names: rank → its name for errors. terms: names and JSON values that must be equal on all ranks.
    Raises TransferError naming the ranks that did not come, or the rank and the terms that differ from rank 0's; ValueError for an unknown
    backend or a rank outside the world.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is not known; expected 'gloo' or 'nccl'")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    timeout = timedelta(seconds=timeout_s)
    address = f"{host}:{port}"
    title = f"{names(rank)} of {world_size}"
    store = meeting_store(host, port, rank, world_size, timeout_s)
    hosts = Meeting(store, rank, world_size, timeout_s, address, names).hold(own_host or machine(), terms or {})
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
    try:
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]  torch's stub misspells it
            options._timeout = timeout
            # The default device follows the host name, which may resolve to an address the peers cannot reach, or to all of them.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(host))]
            both = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)
            groups = both, both
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _watchdog_timeout(timeout)
            # NCCL serialises the operations of two ranks of a communicator: two that send to each other, and receive first, would wait
            # for each other for ever.
            prefixes = ("weights upward", "weights downward")
            upward, downward = (dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, world_size, options) for name in prefixes)
            groups = upward, downward
    except RuntimeError as error:
        raise TransferError(
            f"{title}: connecting to the peers of the group at {address} failed (timeout {timeout_s:g} s): {first_line(error)}"
        ) from error
    return StatelessGroup(groups, store, rank, hosts, timeout_s, address, names, device, connects_lazily=backend == "nccl")


def _watchdog_timeout(timeout: timedelta) -> timedelta:
    """Return the time after which torch's watchdog ends the whole process because of an unfinished NCCL operation.

    It counts from the start of the operation, which may be buckets before anyone waits for it. A wait has to give up first, and raise a
    TransferError that names tensor and peer.
    """
    return 2 * timeout + timedelta(seconds=60)
