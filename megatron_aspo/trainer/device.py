"""Where the training ranks compute: the one place that tells CPU from CUDA."""

from dataclasses import dataclass

import torch

from megatron_aspo.common.host_memory import keep_freed_memory, release_freed_memory


@dataclass(frozen=True)
class Device:
    """A kind of device and what goes with it."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend of its process groups."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def empty_host(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] in host memory, pinned on CUDA: copies to and from it are fast and need not be waited for."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def synchronize(self) -> None:
        """Return when all work given to the device is done; on the CPU it is when it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def use_deterministic_kernels(self) -> None:
        """From here on torch takes deterministic kernels, and raises RuntimeError for operations that have none. The CPU's are."""
        if self.is_cuda:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a check for mistakes, paid for with every allocation
            torch.backends.cudnn.benchmark = False

    def release_cached_memory(self) -> None:
        """Return freed memory, which is kept for later, to the CUDA driver or the system: other processes can have it."""
        if self.is_cuda:
            torch.cuda.empty_cache()
        else:
            release_freed_memory()


def select_device(local_rank: int = 0) -> Device:
    """CUDA where torch sees a GPU (this process's `local_rank`-th), the CPU otherwise."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Device(torch.device("cuda", local_rank), "nccl")
    keep_freed_memory()
    return Device(torch.device("cpu"), "gloo")
