"""Memory that processes of one machine share: anonymous, so that it is gone with the last process that uses it, however that one ends."""

import mmap
import os

import psutil
import torch

from megatron_aspo.errors import UserError


class Segment:
    """Memory of this process that others of the same user may open by its path. It is taken from the machine at once, not when touched."""

    def __init__(self, nbytes: int, what: str):
        """Raises UserError, naming `what` it is for, when the machine has no room."""
        self._file = -1
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
        self.bytes = torch.frombuffer(mmap.mmap(self._file, nbytes), dtype=torch.uint8)
        """uint8 [nbytes]."""
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Let nobody open it any more; who has it open keeps it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close


def open_segment(path: str) -> torch.Tensor:
    """uint8 [bytes of the segment], shared with the process that made it. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)
    finally:
        os.close(file)
