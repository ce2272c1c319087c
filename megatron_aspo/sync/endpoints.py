"""The two ends of a transfer: training ranks send what the schedule says, the workers of engines put whole-shaped tensors together.

A bucket is packed, sent, received and passed on while the ones before it are still being loaded: senders are two buckets ahead at the most,
and what a worker receives next is on its way while it loads. What a tensor's elements are cast to, they are cast to before they travel.
On one machine a worker loads whole tensors right out of the sender's memory: their elements are copied once.

Verified, both ends take the SHA-256 of every box: the sender of what it packed, the worker of what it hands on to be loaded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.sync.group import StatelessGroup
from megatron_aspo.sync.messages import Arrival, Outbox, Read, label_of, view
from megatron_aspo.sync.schedule import Schedule
from megatron_aspo.weights.layout import Box, Layout, Piece, overlap, volume


class LocalTensors:
    """Boxes of Hugging Face tensors as views of this rank's parameters."""

    def __init__(self, layout: Layout, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self._pieces: dict[str, list[Piece]] = {}
        for piece in layout.pieces:
            self._pieces.setdefault(piece.tensor, []).append(piece)

    def __call__(self, tensor: str, box: Box) -> Tensor:
        """Raises KeyError unless one piece holds the whole box."""
        for piece in self._pieces.get(tensor, []):
            if overlap(piece.box, box) == box:
                offsets = [own - begin for (own, _), (begin, _) in zip(piece.local, piece.box, strict=True)]
                local = tuple(slice(start + by, stop + by) for (start, stop), by in zip(box, offsets, strict=True))
                return self._parameters[piece.parameter].detach()[local]
        raise KeyError(f"this rank does not hold {tensor} {box}")


class WeightSender:
    """A training rank's end."""

    def __init__(self, schedule: Schedule, group: StatelessGroup, device: torch.device):
        self._schedule, self._group = schedule, group
        group.connect(schedule.routes)
        self._outbox = Outbox(schedule, group, device)

    def send(self, read: Read, version: int, verify: bool) -> int:
        """Send this rank's part of `version`; returns the bytes of weights.

        Whatever it raises, it has left the group then: the ranks that wait for this one fail too, at once and not after their timeout.
        """
        try:
            sent = sum(self._outbox.send(bucket, read, version, verify) for bucket in self._schedule.buckets if bucket.sends)
            self._outbox.finish()
        except BaseException:
            self._outbox.drop()
            self._group.close()
            raise
        return sent


class WeightReceiver:
    """A worker's end. For each version: `begin`, then `bucket` as long as any are `left`."""

    def __init__(self, schedule: Schedule, group: StatelessGroup, device: torch.device):
        self._schedule, self._group, self._device = schedule, group, device
        self._dtype = torch_dtype(schedule.spec.dtype)
        group.connect(schedule.routes)
        self._outbox = Outbox(schedule, group, device)
        self._segments: dict[int, Tensor] = {}
        self.received_bytes = 0
        """Of weights, in all versions so far."""
        self.begin(0, False)

    @property
    def tensors(self) -> set[str]:
        """Those of which this worker gets a part."""
        return {move.tensor for bucket in self._schedule.buckets for message in bucket.receives for move in message.moves}

    def begin(self, version: int, verify: bool) -> None:
        """A new version comes."""
        self._version, self._verify = version, verify
        self.digests: list[tuple[str, Box, bytes]] = []
        """(tensor, box, SHA-256) of all that came with this version; empty unless it is verified."""
        self._next = 0
        self._expected: dict[int, list[Arrival]] = {}

    @property
    def left(self) -> int:
        """Buckets of this version that are still to come."""
        return len(self._schedule.buckets) - self._next

    def borrowed(self, tensor: Tensor) -> bool:
        """Whether it lies in memory of a sender, which writes something else there once the bucket is left."""
        return tensor.untyped_storage().data_ptr() in {segment.untyped_storage().data_ptr() for segment in self._segments.values()}

    @contextmanager
    def bucket(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The next one: every tensor of which this worker has a part, in its whole shape, NaN where the worker has no part.

        They are to be read inside the block only (`borrowed`). Raises TransferError when a peer does not send, or when what came is not
        what was sent.
        """
        number, self._next = self._next, self._next + 1
        self._expect(number)
        self._expect(number + 1)
        bucket = self._schedule.buckets[number]
        given = Counter()
        for message in bucket.receives:
            for move in message.moves:
                given[move.tensor] += volume(move.box)
        tensors: dict[str, Tensor] = {}
        arrivals = self._expected.pop(number)
        for step in (0, 1):
            for arrival in arrivals:
                if arrival.message.step == step:
                    self._take(arrival, tensors, given)
            if step == 0:
                self._outbox.send(bucket, lambda tensor, box: view(tensors[tensor], box), self._version, self._verify)
        yield [(name, tensors[name]) for name in bucket.tensors if name in tensors]
        # First let go of what others sent, then wait for them to let go: they do the same.
        for arrival in arrivals:
            arrival.release()
        self._outbox.finish()

    def _expect(self, number: int) -> None:
        """Let the messages of a bucket come in."""
        if number < len(self._schedule.buckets) and number not in self._expected:
            bucket = self._schedule.buckets[number]
            self._expected[number] = [
                Arrival(m, self._group, label_of(bucket, m, self._version), self._dtype, self._device, self._verify, self._segments)
                for m in bucket.receives
            ]

    def _take(self, arrival: Arrival, tensors: dict[str, Tensor], given: Mapping[str, int]) -> None:
        """Put a message's boxes where they belong."""
        self.received_bytes += arrival.message.elements * self._dtype.itemsize
        for (tensor, box), values in arrival.boxes():
            shape = self._schedule.shapes[tensor]
            if box == tuple((0, extent) for extent in shape):
                tensors[tensor] = values
                continue
            if tensor not in tensors:
                tensors[tensor] = torch.empty(shape, dtype=self._dtype, device=self._device)
                if given[tensor] < tensors[tensor].numel():
                    # Poison: should an engine's loader read what the plan says it does not, no number comes out.
                    tensors[tensor].fill_(torch.nan)
            view(tensors[tensor], box).copy_(values)
        if self._verify:
            self.digests += arrival.verify(lambda tensor, box: view(tensors[tensor], box))
