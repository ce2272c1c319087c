"""Tensors that are kept in host memory and moved to the device while they are used."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.host_blocks import HostBlocks


class HostMemory:
    """Keeps some tensors in host memory. Inside a `with` block their values are on the device, and changes to them count; outside of it
    they are read and written in host memory and take none of the device's. Each stays the same tensor object.

    On the CPU the same copies are made within one memory, and save nothing.
    """

    def __init__(self, tensors: Iterable[Tensor], device: Device, *, constant: bool = False):
        """Move the tensors, which must not share memory with each other. constant: they never change on the device.

        Each is moved before the next is taken from the iterable: tensors that an iterator creates are never on the device together.
        """
        self._device, self._constant = device, constant
        self._tensors: list[Tensor] = []
        # Kept for good: copies are slow without pinned memory, and pinning takes long.
        self._host: list[Tensor] = []
        allocator = _HostAllocator(device)
        for tensor in tensors:
            self._tensors.append(tensor)
            self._host.append(allocator.empty_like(tensor))
            self._offload(slice(-1, None), changed=True)
        device.synchronize()

    def __enter__(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host.to(self._device.torch_device, non_blocking=True, copy=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._offload(slice(None), changed=not self._constant)
        if self._tensors:
            self._device.synchronize()  # else the host could read values that have not arrived

    @torch.no_grad()
    def _offload(self, which: slice, changed: bool) -> None:
        for tensor, host in zip(self._tensors[which], self._host[which], strict=True):
            if changed:
                host.copy_(tensor, non_blocking=True)
            tensor.data = host


class OffloadedStorage:
    """Storages that leave the device for a while. Meanwhile no tensor in them, views included, can be read.

    Unlike `HostMemory` this moves whole storages, so tensors in Megatron's buffers remain views of them.
    """

    def __init__(self, kept: Iterable[Tensor], scratch: Iterable[Tensor], device: Device):
        """kept: tensors whose values are restored; scratch: tensors that are zero afterwards, such as gradients. Nothing moves yet."""
        self._kept, unkept = _storages(kept), _storages(scratch)
        self._scratch = {address: storage for address, storage in unkept.items() if address not in self._kept}
        self._device = device
        self._offloaded: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @torch.no_grad()
    def offload(self) -> None:
        """Free the device memory and return it to the driver. Idempotent."""
        if self._offloaded:
            return
        allocator = _HostAllocator(self._device)
        for storage in self._kept.values():
            here = _bytes_of(storage)
            self._offloaded.append((storage, storage.nbytes(), allocator.empty_like(here).copy_(here, non_blocking=True)))
        self._offloaded += [(storage, storage.nbytes(), None) for storage in self._scratch.values()]
        self._device.synchronize()
        for storage, _, _ in self._offloaded:
            storage.resize_(0)
        # torch would cache it, and an engine in another process could not use it.
        self._device.release_cached_memory()

    @torch.no_grad()
    def reload(self) -> None:
        """Allocate the device memory again and fill it. Idempotent."""
        for storage, nbytes, host in self._offloaded:
            storage.resize_(nbytes)
            here = _bytes_of(storage)
            here.zero_() if host is None else here.copy_(host, non_blocking=True)
        self._device.synchronize()  # before the host copies are freed
        self._offloaded = []


class _HostAllocator:
    """Allocates host memory for copies of tensors: on CUDA, ranges of pinned blocks."""

    def __init__(self, device: Device):
        self._device, self._layout = device, HostBlocks()
        self._blocks: list[Tensor] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an empty contiguous tensor of the same shape and dtype."""
        if not self._device.is_cuda:
            return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        block, offset = self._layout.place(tensor.nbytes)
        if block == len(self._blocks):
            self._blocks.append(self._device.empty_host(self._layout.sizes[block]))
        return self._blocks[block][offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return address → storage; tensors that share an address share a storage."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
