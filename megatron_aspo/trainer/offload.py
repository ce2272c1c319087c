"""Tensors that live in host memory and come to the device for the time of their use."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.host_blocks import HostBlocks


class HostMemory:
    """The home of some tensors. Each stays the same object: inside a `with` block its values are on the device, where changes to them
    count; outside of it they are in host memory, to be read and written there, and take none of the device's.

    On the CPU the same moves are made within one memory, and save nothing.
    """

    def __init__(self, tensors: Iterable[Tensor], device: Device, *, constant: bool = False):
        """Moves the tensors, none of which may share its memory with another; constant: they never change on the device.

        Each is moved before the next is asked for: tensors that an iterator creates are never on the device together.
        """
        self._device, self._constant = device, constant
        self._tensors: list[Tensor] = []
        # Kept for good: pinning memory, without which copies are slow, takes long.
        self._host: list[Tensor] = []
        room = _HostRoom(device)
        for tensor in tensors:
            self._tensors.append(tensor)
            self._host.append(room.like(tensor))
            self._leave(slice(-1, None), changed=True)
        device.synchronize()

    def __enter__(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host.to(self._device.torch_device, non_blocking=True, copy=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave(slice(None), changed=not self._constant)
        if self._tensors:
            self._device.synchronize()  # else the host could read what has not arrived

    @torch.no_grad()
    def _leave(self, which: slice, changed: bool) -> None:
        for tensor, host in zip(self._tensors[which], self._host[which], strict=True):
            if changed:
                host.copy_(tensor, non_blocking=True)
            tensor.data = host


class Parking:
    """Tensors that leave the device for a while with the memory behind them, views of it and all: meanwhile none of them can be read.

    Unlike `HostMemory` this moves whole memories: of what lies in Megatron's buffers, each tensor stays the view that it is.
    """

    def __init__(self, kept: Iterable[Tensor], scratch: Iterable[Tensor], device: Device):
        """kept: those whose values come back; scratch: those that come back as zeros, as do gradients. Nothing moves yet."""
        self._kept, unkept = _memories(kept), _memories(scratch)
        self._scratch = {place: memory for place, memory in unkept.items() if place not in self._kept}
        self._device = device
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @torch.no_grad()
    def leave(self) -> None:
        """Free their memory on the device, and return it to the driver. Twice is once."""
        if self._away:
            return
        room = _HostRoom(self._device)
        for storage in self._kept.values():
            here = _bytes_of(storage)
            self._away.append((storage, storage.nbytes(), room.like(here).copy_(here, non_blocking=True)))
        self._away += [(storage, storage.nbytes(), None) for storage in self._scratch.values()]
        self._device.synchronize()
        for storage, _, _ in self._away:
            storage.resize_(0)
        # torch would keep it: an engine in another process could not have it.
        self._device.release_cached_memory()

    @torch.no_grad()
    def come_back(self) -> None:
        """Take the memory again and fill it. Twice is once."""
        for storage, nbytes, host in self._away:
            storage.resize_(nbytes)
            here = _bytes_of(storage)
            here.zero_() if host is None else here.copy_(host, non_blocking=True)
        self._device.synchronize()  # before the copies in host memory go
        self._away = []


class _HostRoom:
    """Host memory for copies of tensors: on CUDA a part of a pinned block for each."""

    def __init__(self, device: Device):
        self._device, self._places = device, HostBlocks()
        self._blocks: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """Return an empty contiguous tensor of the same shape and dtype."""
        if not self._device.is_cuda:
            return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        block, offset = self._places.place(tensor.nbytes)
        if block == len(self._blocks):
            self._blocks.append(self._device.empty_host(self._places.sizes[block]))
        return self._blocks[block][offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _memories(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """By address: tensors that share one are in one memory."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
