"""Messages in memory that sender and receiver share, on one machine: shared memory of a CPU, or a GPU's memory through CUDA IPC.

The sender packs into a segment that the receiver maps, so that elements are copied once. The process group carries two small transfers for
each message: its offset in the segment, and the acknowledgement that it has been read.
"""

from collections.abc import Collection
from itertools import pairwise

import torch
from torch import Tensor

from megatron_aspo.sync.group import StatelessGroup, Transfer, TransferError
from megatron_aspo.sync.schedule import Bucket, Message, Schedule
from megatron_aspo.sync.segment import Segment, open_segment

_ACKNOWLEDGEMENT = 2
"""Lane of the group for acknowledgements; offsets use lane 0, digests lane 1."""
_ALIGNMENT = 64
"""Offsets are multiples of this many bytes."""


class SharedMemoryTransport:
    """Packs into one segment of this rank, and maps the segments of the ranks that send to it.

    Two buckets may be in flight: one lies at the bottom of the segment, the next at its top, alternately.
    """

    def __init__(self, schedule: Schedule, group: StatelessGroup, peers: Collection[int], dtype: torch.dtype, device: torch.device):
        """peers: the ranks with which memory is shared; device: where it lies. Raises UserError when there is no room for the segment."""
        self._group, self._peers, self._dtype, self._device = group, peers, dtype, device
        sizes = [self._packed_bytes(bucket) for bucket in schedule.buckets if bucket.sends]
        self._nbytes = max(map(sum, pairwise([*sizes, 0])), default=0)
        self._next_at_top = True
        self._offset = 0
        """Offset of the next message in the segment."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        """The segment's bytes; none if this rank shares no message."""
        self._mapped: dict[int, Tensor] = {}
        """Source → its segment, opened lazily."""
        if self._nbytes:
            self._segment = Segment(self._nbytes, f"{group.name_of(group.rank)}, sending weights", device)
            self._memory = self._segment.bytes
            for target in {message.target for bucket in schedule.buckets for message in bucket.sends if message.target in peers}:
                group.set_value(_handle_key(group.rank, target), self._segment.share())

    def begin_bucket(self, bucket: Bucket) -> None:
        self._next_at_top = not self._next_at_top
        self._offset = self._nbytes - self._packed_bytes(bucket) if self._next_at_top else 0

    def allocate(self, message: Message) -> Tensor:
        payload = self._at(self._memory, self._offset, message)
        self._offset += _aligned(payload.nbytes)
        return payload

    def start_sending(self, message: Message, payload: Tensor, label: str) -> list[Transfer]:
        _synchronize(payload)
        offset = torch.tensor([payload.data_ptr() - self._memory.data_ptr()])
        acknowledgement = torch.empty(1, dtype=torch.uint8)
        return [
            self._group.send(offset, message.target, label),
            self._group.receive(acknowledgement, message.target, f"the acknowledgement of {label}", _ACKNOWLEDGEMENT),
        ]

    def start_receiving(self, message: Message, label: str) -> "_Incoming":
        return _Incoming(self, message, label, self._group)

    def lends(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {memory.untyped_storage().data_ptr() for memory in self._mapped.values()}

    def _packed_bytes(self, bucket: Bucket) -> int:
        """Return the bytes that the messages of a bucket take in the segment. What goes to several targets is packed once."""
        messages = {message.content: message for message in bucket.sends if message.target in self._peers}
        return sum(_aligned(message.elements * self._dtype.itemsize) for message in messages.values())

    def _at(self, memory: Tensor, offset: int, message: Message) -> Tensor:
        return memory[offset : offset + message.elements * self._dtype.itemsize].view(self._dtype)

    def read(self, message: Message, offset: int) -> Tensor:
        """Return the elements of a message in the segment of its sender. Raises TransferError."""
        return self._at(self.mapped(message.source), offset, message)

    def mapped(self, source: int) -> Tensor:
        """Return the segment of another rank, mapped once. Raises TransferError."""
        if source not in self._mapped:
            handle = self._group.wait_for_value(_handle_key(source, self._group.rank))
            try:
                self._mapped[source] = open_segment(handle, self._device)
            except (OSError, RuntimeError) as error:  # from the system, and from CUDA
                raise TransferError(
                    f"{self._group.name_of(self._group.rank)} cannot open the memory of {self._group.name_of(source)} ({handle}): {error}; "
                    "both must run on one machine as the same user"
                ) from error
        return self._mapped[source]


class _Incoming:
    def __init__(self, transport: SharedMemoryTransport, message: Message, label: str, group: StatelessGroup):
        self._transport, self._message, self._label, self._group = transport, message, label, group
        self._offset = torch.empty(1, dtype=torch.int64)
        self._transfer = group.receive(self._offset, message.source, label)

    def wait(self) -> Tensor:
        self._transfer.wait()
        return self._transport.read(self._message, int(self._offset))

    def release(self) -> None:
        _synchronize(self._transport.mapped(self._message.source))
        label = f"the acknowledgement of {self._label}"
        self._group.send(torch.ones(1, dtype=torch.uint8), self._message.source, label, _ACKNOWLEDGEMENT).wait()


def _handle_key(source: int, target: int) -> str:
    return f"memory of rank {source} for rank {target}"


def _synchronize(memory: Tensor) -> None:
    """Return when all work on the memory is done: other processes know nothing of this one's CUDA streams."""
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def _aligned(nbytes: int) -> int:
    return (nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
