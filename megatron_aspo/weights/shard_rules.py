"""How one dimension of a Hugging Face tensor is sharded over tensor-parallel ranks, and where each shard lies in the rank's parameter.

Megatron fuses query, key and value into one matrix, interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, …]. It fuses the
gate and up projections into one matrix in which each rank holds its share of the gate rows, then its share of the up rows. The other
dimensions stay whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_aspo.weights.layout import ModelDims, padded_vocab

Extent = Callable[[ModelDims], int]
"""The length of a dimension, from the sizes of the model."""


@dataclass(frozen=True)
class IndexRange:
    """`length` consecutive indices of the sharded axis: from `start` on in the whole tensor, from `local` on in this rank's parameter."""

    start: int
    local: int
    length: int


@dataclass(frozen=True)
class ShardRule:
    """How one dimension is sharded."""

    ranges: Callable[[ModelDims, int, int], list[IndexRange]]
    """(dims, number of ranks, this rank) → what this rank holds, in order."""
    local_extent: Callable[[ModelDims, int], int]
    """(dims, number of ranks) → length of each rank's parameter along `axis`."""
    axis: int = 0
    padded: bool = False
    """The parameter may be longer than what it holds."""


def whole(extent: Extent) -> ShardRule:
    """Replicate the dimension on every rank."""
    return ShardRule(lambda d, size, rank: [IndexRange(0, 0, extent(d))], lambda d, size: extent(d))


def even(extent: Extent, axis: int) -> ShardRule:
    """Divide an axis into equal shares, one for each rank."""

    def ranges(d: ModelDims, size: int, rank: int) -> list[IndexRange]:
        length = extent(d) // size
        return [IndexRange(rank * length, 0, length)]

    return ShardRule(ranges, lambda d, size: extent(d) // size, axis)


def vocab_rows(multiple: int | None = None) -> ShardRule:
    """Divide the vocabulary evenly, padded to a multiple of `multiple` (None: of the ranks); the last ranks may hold padding only."""

    def extent(d: ModelDims, size: int) -> int:
        return padded_vocab(d.vocab, multiple or size) // size

    def ranges(d: ModelDims, size: int, rank: int) -> list[IndexRange]:
        rows = extent(d, size)
        length = min(rows, d.vocab - rank * rows)
        return [IndexRange(rank * rows, 0, length)] if length > 0 else []

    return ShardRule(ranges, extent, padded=True)


def qkv_rows(part: str) -> ShardRule:
    """Shard the rows of part `q | k | v` of the fused matrix, which is divided evenly wherever the borders fall.

    With fewer key-value heads than ranks a border may divide a group. No row is held twice; Megatron gathers the group in its forward pass.
    """

    def ranges(d: ModelDims, size: int, rank: int) -> list[IndexRange]:
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
                found.append(IndexRange(group * length + first - begin, first - rank * share, last - first))
        return found

    return ShardRule(ranges, lambda d, size: (d.heads + 2 * d.kv_heads) * d.head_dim // size)


def gate_up_rows(part: str, extent: Extent) -> ShardRule:
    """Shard the rows of part `gate | up` of the fused matrix: each rank holds its share of the gate rows, then its share of the up rows."""

    def ranges(d: ModelDims, size: int, rank: int) -> list[IndexRange]:
        length = extent(d) // size
        return [IndexRange(rank * length, 0 if part == "gate" else length, length)]

    return ShardRule(ranges, lambda d, size: 2 * extent(d) // size)
