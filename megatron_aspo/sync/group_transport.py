"""Messages that travel as transfers of the process group: between machines, and between devices under NCCL."""

import torch
from torch import Tensor

from megatron_aspo.sync.group import StatelessGroup, Transfer
from megatron_aspo.sync.schedule import Bucket, Message


class GroupTransport:
    """Each message is one transfer, packed and received in buffers of its own."""

    def __init__(self, group: StatelessGroup, dtype: torch.dtype):
        self._group, self._dtype = group, dtype

    def begin_bucket(self, bucket: Bucket) -> None:
        pass

    def allocate(self, message: Message) -> Tensor:
        return torch.empty(message.elements, dtype=self._dtype, device=self._group.device)

    def start_sending(self, message: Message, payload: Tensor, label: str) -> list[Transfer]:
        return [self._group.send(payload, message.target, label)]

    def start_receiving(self, message: Message, label: str) -> "_Incoming":
        payload = self.allocate(message)
        return _Incoming(payload, self._group.receive(payload, message.source, label))

    def lends(self, tensor: Tensor) -> bool:
        return False


class _Incoming:
    def __init__(self, payload: Tensor, transfer: Transfer):
        self._payload, self._transfer = payload, transfer

    def wait(self) -> Tensor:
        self._transfer.wait()
        return self._payload

    def release(self) -> None:
        pass
