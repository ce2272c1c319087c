"""Memory shared by processes of one machine, freed with the last process that uses it, however that process ends.

On a CPU it is an anonymous file; on a GPU an allocation opened through CUDA IPC, which has not run on hardware yet.
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
"""Position in what `reduce_tensor` returns for a CUDA tensor from which on it describes the memory."""


class Segment:
    """Memory of this process that other processes of the same user may open."""

    def __init__(self, nbytes: int, what: str, device: torch.device):
        """Allocate it. Raises UserError, naming `what` it is for, when the device has no room."""
        self._file = -1
        self.bytes = self._on_gpu(nbytes, what, device) if device.type == "cuda" else self._on_host(nbytes, what)
        """uint8 [nbytes]."""

    def share(self) -> str:
        """Return a handle for `open_segment` (file path, or CUDA IPC handle), valid for one process."""
        if self._file >= 0:
            return f"/proc/{os.getpid()}/fd/{self._file}"
        # torch counts the users of the memory, one for each handle.
        handle = reduce_tensor(self.bytes)[1][_HANDLE:]
        return json.dumps([part.hex() if isinstance(part, bytes) else part for part in handle])

    def close(self) -> None:
        """Refuse further processes; those that have opened it keep it. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def _on_host(self, nbytes: int, what: str) -> torch.Tensor:
        """Allocate all pages now rather than when they are touched."""
        # The kernel would end processes to make room.
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
                f"{what}: {nbytes:,} bytes of shared memory cannot be allocated: {error.strerror}; lower transfer_bucket_mib"
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


def open_segment(handle: str, device: torch.device) -> torch.Tensor:
    """Return uint8 [bytes of the segment], shared with the process that created it. Raises OSError.

    handle: from `Segment.share`; device: of the same kind as the segment's.
    """
    if device.type == "cuda":
        return _open_on_gpu(handle, device)
    file = os.open(handle, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)
    finally:
        os.close(file)


def _open_on_gpu(handle: str, device: torch.device) -> torch.Tensor:
    memory = [bytes.fromhex(part) if isinstance(part, str) else part for part in json.loads(handle)]
    nbytes = memory[1]
    # The sender's device number means nothing here, where other devices may be visible.
    of_tensor = torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index
    return rebuild_cuda_tensor(*of_tensor, *memory)
