"""Where the training ranks compute: the one place that tells CPU from CUDA."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A kind of device and what goes with it."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend of its process groups."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"


def select_device(local_rank: int = 0) -> Device:
    """CUDA where torch sees a GPU (this process's `local_rank`-th), the CPU otherwise."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Device(torch.device("cuda", local_rank), "nccl")
    return Device(torch.device("cpu"), "gloo")
