"""Memory that processes of one machine share, gone with the last process that uses it, however that one ends.

On a CPU an anonymous file; on a GPU an allocation opened through CUDA IPC, which is not yet run on hardware.
"""

import json
import mmap
import os
from collections.abc import Mapping

import psutil
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megatron_aspo.common.errors import UserError

_HANDLE = 7
"""Place in what `reduce_tensor` gives of a CUDA tensor from which on it names the memory."""


class Segment:
    """Memory of this process that others of the same user may open."""

    def __init__(self, nbytes: int, what: str, device: torch.device):
        """Raises UserError, naming `what` it is for, when the device has no room."""
        self._file = -1
        self.bytes = self._on_gpu(nbytes, what, device) if device.type == "cuda" else self._on_host(nbytes, what)
        """uint8 [nbytes]."""

    def share(self) -> str:
        """A word with which one other process can open it."""
        if self._file >= 0:
            return f"/proc/{os.getpid()}/fd/{self._file}"
        # torch keeps count of the users of the memory: one for each of these.
        handle = reduce_tensor(self.bytes)[1][_HANDLE:]
        return json.dumps([part.hex() if isinstance(part, bytes) else part for part in handle])

    def close(self) -> None:
        """Let nobody open it any more; who has it open keeps it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def _on_host(self, nbytes: int, what: str) -> torch.Tensor:
        """Taken from the machine at once, not when touched."""
        # The kernel itself would end processes to make room.
        if nbytes > (room := psutil.virtual_memory().available):
            raise UserError(
                f"{what}: {nbytes:,} bytes of shared memory are needed, the machine has {room:,} left; lower transfer_bucket_mib, or give "
                "it more memory"
            )
        self._file = os.memfd_create("megatron_aspo", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            raise UserError(
                f"{what}: {nbytes:,} bytes of shared memory cannot be had: {error.strerror}; lower transfer_bucket_mib"
            ) from error
        return torch.frombuffer(mmap.mmap(self._file, nbytes), dtype=torch.uint8)

    def _on_gpu(self, nbytes: int, what: str, device: torch.device) -> torch.Tensor:
        if setting := unshareable_allocator(os.environ):
            raise UserError(
                f"{what}: with {setting} in the environment, memory of {device} cannot be opened by another process everywhere; leave that "
                "setting out, or set placement=split"
            )
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            room, _ = torch.cuda.mem_get_info(device)
            raise UserError(
                f"{what}: {nbytes:,} bytes on {device} are needed, {room:,} are left; lower transfer_bucket_mib or rollout.kv_cache_gib"
            ) from error


def unshareable_allocator(environment: Mapping[str, str]) -> str:
    """Return the variable and setting that make torch allocate GPU memory which CUDA IPC cannot share, or "".

    What cudaMallocAsync allocates has no IPC handle. Expandable segments pass file descriptors instead, through a system call that
    containers commonly forbid.
    """
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        for setting in environment.get(variable, "").split(","):
            name, _, value = (part.strip().lower() for part in setting.partition(":"))
            if (name, value) in (("backend", "cudamallocasync"), ("expandable_segments", "true")):
                return f"{variable}={setting.strip()}"
    return ""


def open_segment(word: str, device: torch.device) -> torch.Tensor:
    """uint8 [bytes of the segment], shared with the process that made it; seen from `device`, of the same kind. Raises OSError."""
    if device.type == "cuda":
        return _opened_on_gpu(word, device)
    file = os.open(word, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)
    finally:
        os.close(file)


def _opened_on_gpu(word: str, device: torch.device) -> torch.Tensor:
    handle = [bytes.fromhex(part) if isinstance(part, str) else part for part in json.loads(word)]
    nbytes = handle[1]
    # The sender's number of its device means nothing here, where other devices may be visible.
    of_tensor = torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index
    return rebuild_cuda_tensor(*of_tensor, *handle)
