"""Tensors that live in host memory and come to the device for the time of their use."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from megatron_aspo.trainer.device import Device


class HostMemory:
    """The home of some tensors. Each stays the same object: inside a `with` block its values are on the device, where changes to them
    count; outside of it they are in host memory, to be read and written there, and take none of the device's.

    On the CPU the same moves are made within one memory, and save nothing.
    """

    def __init__(self, tensors: Iterable[Tensor], device: Device, *, constant: bool = False):
        """Moves the tensors, none of which may share its memory with another; constant: they never change on the device."""
        self._tensors = list(tensors)
        self._device, self._constant = device, constant
        # Kept for good: pinning memory, without which copies are slow, takes long.
        self._host = [torch.empty_like(tensor, device="cpu", pin_memory=device.is_cuda) for tensor in self._tensors]
        self._leave(changed=True)

    def __enter__(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host.to(self._device.torch_device, non_blocking=True, copy=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave(changed=not self._constant)

    @torch.no_grad()
    def _leave(self, changed: bool) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            if changed:
                host.copy_(tensor, non_blocking=True)
            tensor.data = host
        if self._tensors and self._device.is_cuda:
            torch.cuda.synchronize()  # else the host could read what has not arrived
