"""The device of a training rank. No other file of the trainer distinguishes CPU from CUDA."""

from dataclasses import dataclass

import torch

from megatron_aspo.common.host_memory import keep_freed_memory, release_freed_memory


@dataclass(frozen=True)
class Device:
    """A device with its process-group backend and its memory operations."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend of its process groups."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def empty_host(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] in host memory, pinned on CUDA: copies to and from it are fast and asynchronous."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def synchronize(self) -> None:
        """Return when all work given to the device is done. No-op on the CPU."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def use_deterministic_kernels(self) -> None:
        """Make torch use deterministic kernels and raise RuntimeError for operations that have none.

        On a CPU too: with several threads, the gradient of indexing adds up repeated rows in any order, such as a prompt's last token
        that several responses share.
        """
        torch.use_deterministic_algorithms(True)
        # A check for mistakes, paid for with every allocation. torch adds the attribute when it runs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False

    def release_cached_memory(self) -> None:
        """Return cached free memory to the CUDA driver or the system, so that other processes can use it."""
        if self.is_cuda:
            torch.cuda.empty_cache()
        else:
            release_freed_memory()


def select_device(local_rank: int = 0) -> Device:
    """Return CUDA's `local_rank`-th device where torch sees a GPU, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Device(torch.device("cuda", local_rank), "nccl")
    keep_freed_memory()
    return Device(torch.device("cpu"), "gloo")
