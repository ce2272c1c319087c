"""The layout of tensors in blocks of pinned host memory. It needs no torch: `plan` counts memory with the same function.

torch rounds every pinned allocation up to a power of two. One allocation per tensor would lose up to half of the memory (19 % for Adam's
state of Qwen2.5-1.5B); shared large blocks lose 7 %.
"""

from collections.abc import Iterable

_BLOCK = 256 << 20
"""Bytes of a block. A larger tensor gets a block of the next power of two, whose remainder serves other tensors."""
_ALIGNMENT = 512


class HostBlocks:
    """Assigns offsets in blocks, first fit."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Bytes of each block, powers of two."""
        self._used: list[int] = []

    def place(self, nbytes: int) -> tuple[int, int]:
        """Return the block for the next `nbytes`, a new one if no block has room, and the offset in it."""
        block = next((block for block, used in enumerate(self._used) if used + nbytes <= self.sizes[block]), len(self.sizes))
        if block == len(self.sizes):
            self.sizes.append(max(_BLOCK, 1 << (nbytes - 1).bit_length()))
            self._used.append(0)
        offset = self._used[block]
        self._used[block] = -(-(offset + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return block, offset


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of pinned host memory that tensors of these sizes, in bytes, take."""
    blocks = HostBlocks()
    for nbytes in sizes:
        blocks.place(nbytes)
    return sum(blocks.sizes)
