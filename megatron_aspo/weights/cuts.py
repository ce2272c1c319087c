"""How one dimension of a Hugging Face tensor is spread over tensor-parallel ranks, and where it lands in each rank's parameter.

Megatron fuses query, key and value into one matrix, interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, …]; gate and up
projections into one, each rank holding its share of the gate rows, then its share of the up rows. The other dimensions stay whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_aspo.weights.layout import ModelDims, padded_vocab

Extent = Callable[[ModelDims], int]


@dataclass(frozen=True)
class Run:
    """One run of indices along the cut axis: `start` in the whole tensor, `local` in this rank's parameter, `length` in both."""

    start: int
    local: int
    length: int


@dataclass(frozen=True)
class Cut:
    """The cut of one dimension."""

    runs: Callable[[ModelDims, int, int], list[Run]]
    """(dims, ranks, this rank) → what this rank holds, in order."""
    local_extent: Callable[[ModelDims, int], int]
    """(dims, ranks) → length of each rank's parameter along `axis`."""
    axis: int = 0
    padded: bool = False
    """The parameters may be longer than what they hold."""


def whole(extent: Extent) -> Cut:
    """Every rank holds all of it."""
    return Cut(lambda d, size, rank: [Run(0, 0, extent(d))], lambda d, size: extent(d))


def even(extent: Extent, axis: int) -> Cut:
    """Each rank holds one share, all of one length."""

    def runs(d: ModelDims, size: int, rank: int) -> list[Run]:
        length = extent(d) // size
        return [Run(rank * length, 0, length)]

    return Cut(runs, lambda d, size: extent(d) // size, axis)


def vocab_rows(multiple: int | None = None) -> Cut:
    """Even shares of the vocabulary, padded to a multiple of `multiple` (None: of the ranks); the last ranks may hold padding only."""

    def extent(d: ModelDims, size: int) -> int:
        return padded_vocab(d.vocab, multiple or size) // size

    def runs(d: ModelDims, size: int, rank: int) -> list[Run]:
        rows = extent(d, size)
        length = min(rows, d.vocab - rank * rows)
        return [Run(rank * rows, 0, length)] if length > 0 else []

    return Cut(runs, extent, padded=True)


def qkv_rows(part: str) -> Cut:
    """`q | k | v`: its rows of the fused matrix, which is cut evenly wherever the cut falls.

    With fewer key-value heads than ranks a cut goes through a group; no row is held twice, and Megatron gathers the group as it runs.
    """

    def runs(d: ModelDims, size: int, rank: int) -> list[Run]:
        per_group = d.heads // d.kv_heads
        group_rows = (per_group + 2) * d.head_dim
        offset, length = {
            "q": (0, per_group * d.head_dim),
            "k": (per_group * d.head_dim, d.head_dim),
            "v": ((per_group + 1) * d.head_dim, d.head_dim),
        }[part]
        share = d.kv_heads * group_rows // size
        found = []
        for group in range(d.kv_heads):
            begin = group * group_rows + offset
            first, last = max(begin, rank * share), min(begin + length, (rank + 1) * share)
            if first < last:
                found.append(Run(group * length + first - begin, first - rank * share, last - first))
        return found

    return Cut(runs, lambda d, size: (d.heads + 2 * d.kv_heads) * d.head_dim // size)


def gate_up_rows(part: str, extent: Extent) -> Cut:
    """`gate | up`: this rank's share of the gate rows comes first, then its share of the up rows."""

    def runs(d: ModelDims, size: int, rank: int) -> list[Run]:
        length = extent(d) // size
        return [Run(rank * length, 0 if part == "gate" else length, length)]

    return Cut(runs, lambda d, size: 2 * extent(d) // size)
