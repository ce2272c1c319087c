"""How the messages of a transfer get from one rank to another.

Between machines a message is one transfer of the group, and between devices of NCCL's. Else, on one machine, it is packed into memory that
the receiver shares (`segment.py`) and the group carries two words: where it lies, and that it has been read. Verified, the SHA-256 of each
of its boxes follows it.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.sync.group import StatelessGroup, Transfer, TransferError
from megatron_aspo.sync.schedule import Bucket, Message, Schedule
from megatron_aspo.sync.segment import Segment, open_segment
from megatron_aspo.weights.layout import Box, volume

_BUCKETS_AHEAD = 2
_DIGEST_BYTES = hashlib.sha256().digest_size
_DIGESTS, _READ = 1, 2
"""Lanes of the group, beside the messages' own, 0."""
_ALIGNMENT = 64
"""Bytes of which a message's place in shared memory is a multiple."""

Read = Callable[[str, Box], Tensor]
"""(tensor, box) → its values, of any dtype."""


@dataclass(frozen=True)
class _Packed:
    """A message's elements, and where they lie in the shared memory, if they do: int64 [1], on its way to whoever reads them."""

    payload: Tensor
    place: Tensor


class Outbox:
    """Packs and sends one rank's messages, bucket after bucket."""

    def __init__(self, schedule: Schedule, group: StatelessGroup, device: torch.device):
        self._group = group
        self._dtype = torch_dtype(schedule.spec.dtype)
        self._under_way: deque[list[Transfer]] = deque()
        self._at_the_top = True
        # Of two buckets that are under way one lies at the bottom of the memory, the next at its top.
        sizes = [self._shared_bytes(bucket) for bucket in schedule.buckets if bucket.sends]
        self._room = max(map(sum, pairwise([*sizes, 0])), default=0)
        self._segment: Segment | None = None
        if self._room:
            self._segment = Segment(self._room, f"{group.name_of(group.rank)}, sending weights", device)
            for target in {message.target for bucket in schedule.buckets for message in bucket.sends if _is_shared(group, message)}:
                group.note(_segment_key(group.rank, target), self._segment.share())

    def send(self, bucket: Bucket, read: Read, version: int, verify: bool) -> int:
        """Start sending this rank's messages of a bucket; waits for those of the last but one. Returns the bytes of weights."""
        if len(self._under_way) == _BUCKETS_AHEAD:
            _wait(self._under_way.popleft())
        self._at_the_top = not self._at_the_top
        place = self._room - self._shared_bytes(bucket) if self._at_the_top else 0
        # What goes to several workers is packed once.
        packed: dict[tuple, _Packed] = {}
        transfers: list[Transfer] = []
        sent = 0
        for message in bucket.sends:
            label = label_of(bucket, message, version)
            shared = _is_shared(self._group, message)
            key = (message.content, shared)
            if key not in packed:
                payload = self._payload(message, place if shared else None)
                for (tensor, box), values in _boxes(message, payload):
                    values.copy_(read(tensor, box))
                if shared:
                    _settle(payload)
                packed[key] = _Packed(payload, torch.tensor([place]))
                place += shared * _aligned(payload.nbytes)
            payload = packed[key].payload
            if shared:
                transfers.append(self._group.send(packed[key].place, message.target, label))
                transfers.append(self._group.receive(torch.empty(1, dtype=torch.uint8), message.target, f"the reading of {label}", _READ))
            else:
                transfers.append(self._group.send(payload, message.target, label))
            if verify:
                digests = b"".join(digest(values) for _, values in _boxes(message, payload))
                stacked = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, _DIGEST_BYTES).to(self._group.device)
                transfers.append(self._group.send(stacked, message.target, f"digests of {label}", _DIGESTS))
            sent += payload.nbytes
        self._under_way.append(transfers)
        return sent

    def finish(self) -> None:
        """Wait until all has been sent, and read where it lies in shared memory."""
        while self._under_way:
            _wait(self._under_way.popleft())

    def drop(self) -> None:
        """Forget what is under way: it keeps the group's connections open."""
        self._under_way.clear()

    def _payload(self, message: Message, place: int | None) -> Tensor:
        if place is None:
            return torch.empty(message.elements, dtype=self._dtype, device=self._group.device)
        return _at(self._segment.bytes, place, message, self._dtype)

    def _shared_bytes(self, bucket: Bucket) -> int:
        """Room that the shared messages of a bucket take."""
        shared = {message.content: message for message in bucket.sends if _is_shared(self._group, message)}
        return sum(_aligned(message.elements * self._dtype.itemsize) for message in shared.values())


class Arrival:
    """A message that is expected or has come."""

    def __init__(
        self,
        message: Message,
        group: StatelessGroup,
        label: str,
        dtype: torch.dtype,
        device: torch.device,
        verify: bool,
        segments: dict[int, Tensor],
    ):
        self.message = message
        self.shared = _is_shared(group, message)
        """Whether the boxes lie in memory of the sender, which is released later on."""
        self._group, self._label, self._dtype, self._device, self._segments = group, label, dtype, device, segments
        if self.shared:
            self._payload = torch.empty(1, dtype=torch.int64)
        else:
            self._payload = torch.empty(message.elements, dtype=dtype, device=group.device)
        self._transfers = [group.receive(self._payload, message.source, label)]
        if verify:
            self._digests = torch.empty(len(message.moves), _DIGEST_BYTES, dtype=torch.uint8, device=group.device)
            self._transfers.append(group.receive(self._digests, message.source, f"digests of {label}", _DIGESTS))

    def boxes(self) -> Sequence[tuple[tuple[str, Box], Tensor]]:
        """Waits for it."""
        _wait(self._transfers)
        if not self.shared:
            return _boxes(self.message, self._payload)
        source = self.message.source
        if source not in self._segments:
            self._segments[source] = self._open(source)
        return _boxes(self.message, _at(self._segments[source], int(self._payload), self.message, self._dtype))

    def release(self) -> None:
        """The sender may write something else where the boxes are."""
        if self.shared:
            _settle(self._segments[self.message.source])
            self._group.send(torch.ones(1, dtype=torch.uint8), self.message.source, f"the reading of {self._label}", _READ).wait()

    def _open(self, source: int) -> Tensor:
        word = self._group.noted(_segment_key(source, self._group.rank))
        try:
            return open_segment(word, self._device)
        except (OSError, RuntimeError) as error:  # of the system, and of CUDA
            raise TransferError(
                f"{self._group.name_of(self._group.rank)} cannot open the memory of {self._group.name_of(source)} ({word}): {error}; both "
                "must run on one machine as the same user"
            ) from error

    def verify(self, read: Read) -> list[tuple[str, Box, bytes]]:
        """(tensor, box, SHA-256) of what `read` gives. Raises TransferError unless it is what the sender took the digests of."""
        found = [(tensor, box, digest(read(tensor, box))) for tensor, box in self.message.content]
        for (tensor, box, own), sent in zip(found, self._digests.cpu(), strict=True):
            if own != bytes(sent.tolist()):
                here, there = self._group.name_of(self._group.rank), self._group.name_of(self.message.source)
                raise TransferError(
                    f"{here} received {tensor} {written(box)} otherwise than {there} sent it ({self._label}): the SHA-256 of the two ends "
                    "differ; the memory or the network of one of them is at fault"
                )
        return found


def _is_shared(group: StatelessGroup, message: Message) -> bool:
    """Whether the two ends share memory."""
    return group.device.type == "cpu" and group.places[message.source] == group.places[message.target]


def _segment_key(source: int, target: int) -> str:
    return f"memory of rank {source} for rank {target}"


def _settle(memory: Tensor) -> None:
    """Return when what was begun with it is done: other processes know nothing of this one's streams."""
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def _at(memory: Tensor, place: int, message: Message, dtype: torch.dtype) -> Tensor:
    """A message's payload in shared memory."""
    return memory[place : place + message.elements * dtype.itemsize].view(dtype)


def _aligned(nbytes: int) -> int:
    return (nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _boxes(message: Message, payload: Tensor) -> list[tuple[tuple[str, Box], Tensor]]:
    """The boxes of a message as views of its payload."""
    parts = payload.split([volume(box) for _, box in message.content])
    return [(key, part.view([stop - start for start, stop in key[1]])) for key, part in zip(message.content, parts, strict=True)]


def label_of(bucket: Bucket, message: Message, version: int) -> str:
    """What a message is called in errors."""
    first, last = message.moves[0].tensor, message.moves[-1].tensor
    tensors = first if first == last else f"{first} … {last}"
    return f"{bucket.label} of version {version}, step {message.step}: {tensors}"


def digest(values: Tensor) -> bytes:
    """SHA-256 of the elements in their order."""
    return hashlib.sha256(values.contiguous().view(torch.uint8).cpu().numpy()).digest()


def view(tensor: Tensor, box: Box) -> Tensor:
    """A box of a tensor, without a copy."""
    return tensor[tuple(slice(*edge) for edge in box)]


def _wait(transfers: Sequence[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()


def written(box: Box) -> str:
    """As slices."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
