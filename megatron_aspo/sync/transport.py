"""The protocol of a transport: how messages travel between this rank and some of its peers.

There are two implementations: `GroupTransport`, messages of the process group, and `SharedMemoryTransport`, memory that both ends map.
`connection.py` chooses one for each peer; packing, ordering and verification do not know which.
"""

from typing import Protocol

from torch import Tensor

from megatron_aspo.sync.group import Transfer
from megatron_aspo.sync.schedule import Bucket, Message


class IncomingMessage(Protocol):
    """A message that this rank expects."""

    def wait(self) -> Tensor:
        """Return its elements [message.elements] once they are there. Raises TransferError."""
        ...

    def release(self) -> None:
        """Let the sender reuse the memory of the elements; nobody may read them afterwards. Raises TransferError."""
        ...


class Transport(Protocol):
    """Carries messages to and from some peers."""

    def begin_bucket(self, bucket: Bucket) -> None:
        """Prepare to send the messages of the next bucket. Every message of the last bucket but one has been received by now."""
        ...

    def allocate(self, message: Message) -> Tensor:
        """Return memory for the elements of a message to be packed into [message.elements]; several peers may be sent the same memory."""
        ...

    def start_sending(self, message: Message, payload: Tensor, label: str) -> list[Transfer]:
        """Start sending packed elements; when the returned transfers are done, the memory may be reused. label: names it in errors."""
        ...

    def start_receiving(self, message: Message, label: str) -> IncomingMessage:
        """Start receiving a message."""
        ...

    def lends(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory of a sender, which reuses it after `IncomingMessage.release`."""
        ...
