"""The two ends of a transfer: training ranks send what their schedule lists, engine workers assemble tensors of whole shape.

Buckets are pipelined: a bucket is packed, sent, received and passed on while the ones before it are still being loaded. Senders are at most
two buckets ahead, and a worker's next bucket is in flight while it loads the current one. Elements are cast to the engine's type before
they travel. On one machine a worker loads whole tensors straight from the sender's memory, so that their elements are copied once.

In verified transfers both ends compute the SHA-256 of every box: the sender of what it packed, the worker of what it hands to be loaded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.sync.connection import connect_transports
from megatron_aspo.sync.group import StatelessGroup
from megatron_aspo.sync.messages import ExpectedMessage, Outbox, ReadBox, message_label
from megatron_aspo.sync.schedule import Schedule
from megatron_aspo.weights.layout import Box, Layout, Piece, overlap, slices, volume


class LocalTensors:
    """Boxes of Hugging Face tensors as views of this rank's parameters."""

    def __init__(self, layout: Layout, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self._pieces: dict[str, list[Piece]] = {}
        for piece in layout.pieces:
            self._pieces.setdefault(piece.tensor, []).append(piece)

    def __call__(self, tensor: str, box: Box) -> Tensor:
        """Return a view of the box. Raises KeyError unless one piece holds all of it."""
        for piece in self._pieces.get(tensor, []):
            if overlap(piece.box, box) == box:
                offsets = [own - begin for (own, _), (begin, _) in zip(piece.local, piece.box, strict=True)]
                local = tuple(slice(start + by, stop + by) for (start, stop), by in zip(box, offsets, strict=True))
                return self._parameters[piece.parameter].detach()[local]
        raise KeyError(f"this rank does not hold {tensor} {box}")


class WeightSender:
    """The end of a training rank."""

    def __init__(self, schedule: Schedule, group: StatelessGroup, device: torch.device):
        """Connect with the peers, collectively over the group. Raises TransferError when a peer's plan differs or it does not come."""
        self._schedule, self._group = schedule, group
        self._outbox = Outbox(group, connect_transports(schedule, group, device))

    def send_version(self, read: ReadBox, version: int, verify: bool) -> int:
        """Send this rank's part of `version`; return the bytes of weights.

        On any exception it leaves the group first, so that the ranks that wait for it fail at once instead of after their timeout.
        """
        try:
            sent = sum(self._outbox.post_bucket(bucket, read, version, verify) for bucket in self._schedule.buckets if bucket.sends)
            self._outbox.wait_until_received()
        except BaseException:
            self._outbox.drop()
            self._group.close()
            raise
        return sent


class WeightReceiver:
    """The end of an engine worker. For each version: `begin_version`, then `next_bucket` while there are `buckets_left`."""

    def __init__(self, schedule: Schedule, group: StatelessGroup, device: torch.device):
        """Connect with the peers, collectively over the group. Raises TransferError when a peer's plan differs or it does not come."""
        self._schedule, self._group, self._device = schedule, group, device
        self._dtype = torch_dtype(schedule.dtype)
        self._transports = connect_transports(schedule, group, device)
        self._outbox = Outbox(group, self._transports)
        self.received_bytes = 0
        """Bytes of weights received in all versions so far."""
        self.begin_version(0, False)

    @property
    def tensor_names(self) -> set[str]:
        """The tensors of which this worker receives a part."""
        return {move.tensor for bucket in self._schedule.buckets for message in bucket.receives for move in message.moves}

    def begin_version(self, version: int, verify: bool) -> None:
        """Start a new version."""
        self._version, self._verify = version, verify
        self.digests: list[tuple[str, Box, bytes]] = []
        """(tensor, box, SHA-256) of everything received with this version; empty unless it is verified."""
        self._next = 0
        self._expected: dict[int, list[ExpectedMessage]] = {}

    @property
    def buckets_left(self) -> int:
        """The number of buckets of this version that have not been received."""
        return len(self._schedule.buckets) - self._next

    def is_borrowed(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory of a sender, which reuses it after the bucket."""
        return any(transport.lends(tensor) for transport in set(self._transports.values()))

    @contextmanager
    def next_bucket(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Receive a bucket: every tensor of which this worker holds a part, in its whole shape, NaN outside that part.

        The tensors may be read inside the block only (`is_borrowed`). Raises TransferError when a peer does not send, or when what arrived
        is not what was sent.
        """
        number, self._next = self._next, self._next + 1
        self._expect(number)
        self._expect(number + 1)
        bucket = self._schedule.buckets[number]
        received_elements = Counter()
        for message in bucket.receives:
            for move in message.moves:
                received_elements[move.tensor] += volume(move.box)
        tensors: dict[str, Tensor] = {}
        expected = self._expected.pop(number)
        for step in (0, 1):
            for message in expected:
                if message.message.step == step:
                    self._assemble(message, tensors, received_elements)
            if step == 0:
                self._outbox.post_bucket(bucket, lambda tensor, box: tensors[tensor][slices(box)], self._version, self._verify)
        yield [(name, tensors[name]) for name in bucket.tensors if name in tensors]
        # Release what others sent before waiting for them to release what this worker sent: they do the same.
        for message in expected:
            message.release()
        self._outbox.wait_until_received()

    def _expect(self, number: int) -> None:
        """Start receiving the messages of a bucket."""
        if number < len(self._schedule.buckets) and number not in self._expected:
            bucket = self._schedule.buckets[number]
            self._expected[number] = [
                ExpectedMessage(
                    message, self._group, self._transports[message.source], message_label(bucket, message, self._version), self._verify
                )
                for message in bucket.receives
            ]

    def _assemble(self, expected: ExpectedMessage, tensors: dict[str, Tensor], received_elements: Mapping[str, int]) -> None:
        """Wait for a message and put its boxes into tensors of whole shape."""
        self.received_bytes += expected.message.elements * self._dtype.itemsize
        for (tensor, box), values in expected.wait_for_boxes():
            shape = self._schedule.shapes[tensor]
            if box == tuple((0, extent) for extent in shape):
                tensors[tensor] = values
                continue
            if tensor not in tensors:
                tensors[tensor] = torch.empty(shape, dtype=self._dtype, device=self._device)
                if received_elements[tensor] < tensors[tensor].numel():
                    # Poison: if an engine's loader reads what the plan does not send, NaN comes out.
                    tensors[tensor].fill_(torch.nan)
            tensors[tensor][slices(box)].copy_(values)
        if self._verify:
            self.digests += expected.verify(lambda tensor, box: tensors[tensor][slices(box)])
