"""Packing, sending, expecting and verifying the messages of a transfer, whichever transport carries them.

In verified transfers the SHA-256 of each box of a message follows it through the process group.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_aspo.sync.group import StatelessGroup, Transfer, TransferError
from megatron_aspo.sync.schedule import Bucket, Message
from megatron_aspo.sync.transport import Transport
from megatron_aspo.weights.layout import Box, format_box, volume

_BUCKETS_AHEAD = 2
_DIGEST_BYTES = hashlib.sha256().digest_size
_DIGESTS = 1
"""Lane of the group for digests; the transports' own lanes are 0 and 2."""

ReadBox = Callable[[str, Box], Tensor]
"""(tensor, box) → its values, of any dtype."""


class Outbox:
    """Packs and sends one rank's messages, bucket after bucket, at most two buckets ahead of the receivers."""

    def __init__(self, group: StatelessGroup, transports: Mapping[int, Transport]):
        """transports: one for each peer."""
        self._group, self._transports = group, transports
        self._in_flight: deque[list[Transfer]] = deque()
        """The transfers of each of the last buckets."""

    def post_bucket(self, bucket: Bucket, read: ReadBox, version: int, verify: bool) -> int:
        """Start sending this rank's messages of a bucket, once those of the last but one have arrived; return the bytes of weights."""
        if len(self._in_flight) == _BUCKETS_AHEAD:
            _wait_for_all(self._in_flight.popleft())
        for transport in set(self._transports.values()):
            transport.begin_bucket(bucket)
        # What goes to several workers is packed once.
        packed: dict[tuple[tuple[tuple[str, Box], ...], Transport], Tensor] = {}
        transfers: list[Transfer] = []
        sent = 0
        for message in bucket.sends:
            label, transport = message_label(bucket, message, version), self._transports[message.target]
            payload = packed.get((message.content, transport))
            if payload is None:
                payload = packed[message.content, transport] = transport.allocate(message)
                for (tensor, box), values in boxes_in(message, payload):
                    values.copy_(read(tensor, box))
            transfers += transport.start_sending(message, payload, label)
            if verify:
                transfers.append(self._send_digests(message, payload, label))
            sent += payload.nbytes
        self._in_flight.append(transfers)
        return sent

    def wait_until_received(self) -> None:
        """Wait until everything has arrived, and been read if it lies in shared memory. Raises TransferError."""
        while self._in_flight:
            _wait_for_all(self._in_flight.popleft())

    def drop(self) -> None:
        """Forget what is in flight: it keeps the group's connections open."""
        self._in_flight.clear()

    def _send_digests(self, message: Message, payload: Tensor, label: str) -> Transfer:
        digests = b"".join(sha256_of(values) for _, values in boxes_in(message, payload))
        stacked = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, _DIGEST_BYTES).to(self._group.device)
        return self._group.send(stacked, message.target, f"digests of {label}", _DIGESTS)


class ExpectedMessage:
    """A message that is expected or has arrived."""

    def __init__(self, message: Message, group: StatelessGroup, transport: Transport, label: str, verify: bool):
        self.message = message
        self._group, self._label = group, label
        self._incoming = transport.start_receiving(message, label)
        self._transfer: Transfer | None = None
        if verify:
            self._digests = torch.empty(len(message.moves), _DIGEST_BYTES, dtype=torch.uint8, device=group.device)
            self._transfer = group.receive(self._digests, message.source, f"digests of {label}", _DIGESTS)

    def wait_for_boxes(self) -> list[tuple[tuple[str, Box], Tensor]]:
        """Wait for the message; return its boxes as views of the memory in which it arrived. Raises TransferError."""
        payload = self._incoming.wait()
        if self._transfer is not None:
            self._transfer.wait()
        return boxes_in(self.message, payload)

    def release(self) -> None:
        """Let the sender reuse the memory of the boxes."""
        self._incoming.release()

    def verify(self, read: ReadBox) -> list[tuple[str, Box, bytes]]:
        """Return (tensor, box, SHA-256) of what `read` returns. Raises TransferError if the sender's digest of any box differs."""
        found = [(tensor, box, sha256_of(read(tensor, box))) for tensor, box in self.message.content]
        for (tensor, box, own), sent in zip(found, self._digests.cpu(), strict=True):
            if own != bytes(sent.tolist()):
                here, there = self._group.name_of(self._group.rank), self._group.name_of(self.message.source)
                raise TransferError(
                    f"{here} received {tensor} {format_box(box)} otherwise than {there} sent it ({self._label}): the SHA-256 of the two "
                    "ends differ; the memory or the network of one of them is at fault"
                )
        return found


def boxes_in(message: Message, payload: Tensor) -> list[tuple[tuple[str, Box], Tensor]]:
    """Return the boxes of a message as views of its payload."""
    parts = payload.split([volume(box) for _, box in message.content])
    return [(key, part.view([stop - start for start, stop in key[1]])) for key, part in zip(message.content, parts, strict=True)]


def message_label(bucket: Bucket, message: Message, version: int) -> str:
    """Return the name of a message for errors."""
    first, last = message.moves[0].tensor, message.moves[-1].tensor
    tensors = first if first == last else f"{first} … {last}"
    return f"{bucket.label} of version {version}, step {message.step}: {tensors}"


def sha256_of(values: Tensor) -> bytes:
    """Return the SHA-256 of the elements in their order."""
    return hashlib.sha256(values.contiguous().view(torch.uint8).cpu().numpy().data).digest()


def _wait_for_all(transfers: Sequence[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()
