"""Who sends which elements of which tensor to whom, so that every destination gets each of its elements once.

A plan is derived from the holdings of both sides and from where their ranks live, by every rank for itself: it is pure and the same
everywhere. Ranks are numbered through: sources first, destinations after them.

- Boxes of the two sides are intersected. Where a source's box meets a destination's, the shared box is a strand: all tensors of that kind,
  the sources that hold it, the destinations that need it.
- A destination that shares its device with a source of the strand copies there, and nothing is sent.
- On a node with sources of its own, they send to the destinations of that node. To any other node a strand crosses once: to one of its
  destinations, which passes it on to the rest.
- The rows of a strand times the nodes (or destinations) that it goes to are cut into as many equal parts as there are sources, one row more
  or less; replicated sources share the sending so. Those who pass on share in the same way.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from megatron_aspo.weights.holdings import Held, Ranks
from megatron_aspo.weights.layout import Box, overlap, volume


class Holdings(Protocol):
    """One side of a transfer."""

    world: int

    def of(self, tensor: str) -> Held:
        """Who holds which boxes of it."""


@dataclass(frozen=True)
class Where:
    """Where the ranks live."""

    nodes: tuple[int, ...]
    """Of every rank, destinations after sources."""
    device_of: dict[int, int]
    """Destination → the source with which it shares a device, for those that share one."""


@dataclass(frozen=True, eq=False)
class Strand:
    """The same box of tensors of one kind, from the same sources to the same destinations."""

    tensors: tuple[str, ...]
    box: Box
    sources: Ranks
    targets: Ranks
    """Numbered after the sources."""

    @property
    def rows_each(self) -> int:
        return self.box[0][1] - self.box[0][0]

    @property
    def rows(self) -> int:
        return self.rows_each * len(self.tensors)

    @property
    def row_elements(self) -> int:
        return volume(self.box) // self.rows_each


@dataclass(frozen=True)
class Hop:
    """Rows [start, stop) of a strand, counted through its tensors, from one rank to another and on to others of that node."""

    strand: Strand
    start: int
    stop: int
    source: int
    target: int
    onward: Ranks = ()
    """To whom the target passes the rows on."""

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.strand.row_elements


@dataclass(frozen=True)
class Move:
    """One box of one tensor from one rank to another. `step`: 0 from a source, 1 passed on by a destination."""

    tensor: str
    box: Box
    source: int
    target: int
    step: int


def strands(tensors: Sequence[str], source: Holdings, target: Holdings, of_rank: int | None = None) -> list[Strand]:
    """All that go from one side to the other; with `of_rank`, those in which that rank takes part. Tensors keep their order."""
    kinds: dict[tuple[Held, Held], list[str]] = {}
    for tensor in tensors:
        kinds.setdefault((source.of(tensor), target.of(tensor)), []).append(tensor)
    found = []
    for (sources, targets), names in kinds.items():
        for needed, wanting in zip(targets.boxes, targets.ranks, strict=True):
            receivers = tuple(source.world + rank for rank in wanting)
            for box, senders in zip(sources.boxes, sources.ranks, strict=True):
                if of_rank is None or of_rank in senders or of_rank in receivers:
                    shared = overlap(box, needed)
                    if shared is not None:
                        found.append(Strand(tuple(names), shared, senders, receivers))
    return found


def hops(strand: Strand, where: Where) -> Iterator[Hop]:
    """How the rows of one strand travel. A hop from a destination's own device names that source; it costs no transfer."""
    by_node = {
        node: tuple(ranks) for node, ranks in groupby(sorted(strand.targets, key=lambda r: (where.nodes[r], r)), where.nodes.__getitem__)
    }
    away = []
    for node, targets in by_node.items():
        near = [rank for rank in strand.sources if where.nodes[rank] == node]
        if not near:
            away.append(targets)
            continue
        held = [rank for rank in targets if where.device_of.get(rank) in near]
        for rank in held:
            yield Hop(strand, 0, strand.rows, where.device_of[rank], rank)
        needy = [rank for rank in targets if rank not in held]
        for copy, start, stop, index in _shares(strand.rows, len(needy), len(near)):
            yield Hop(strand, start, stop, near[index], needy[copy])
    for copy, start, stop, index in _shares(strand.rows, len(away), len(strand.sources)):
        targets = away[copy]
        # Each destination of the node is first for an equal part of the rows.
        for first, _ in enumerate(targets):
            begin, end = (max(start, _border(first, strand.rows, len(targets))), min(stop, _border(first + 1, strand.rows, len(targets))))
            if begin < end:
                onward = targets[:first] + targets[first + 1 :]
                yield Hop(strand, begin, end, strand.sources[index], targets[first], onward)


def _border(part: int, rows: int, parts: int) -> int:
    return part * rows // parts


def _shares(rows: int, copies: int, parts: int) -> Iterator[tuple[int, int, int, int]]:
    """(copy, first row, row after the last, part) of `copies` × `rows`, one copy after another, cut into equal parts."""
    for part in range(parts):
        position, end = _border(part, rows * copies, parts), _border(part + 1, rows * copies, parts)
        while position < end:
            copy, row = divmod(position, rows)
            stop = min(rows, row + end - position)
            yield copy, row, stop, part
            position += stop - row


def boxes(hop: Hop) -> Iterator[tuple[str, Box]]:
    """The tensors and boxes that its rows are."""
    strand = hop.strand
    (top, _), *others = strand.box
    for number in range(hop.start // strand.rows_each, -(-hop.stop // strand.rows_each)):
        before = number * strand.rows_each
        start, stop = max(hop.start - before, 0), min(hop.stop - before, strand.rows_each)
        yield strand.tensors[number], ((top + start, top + stop), *others)


def moves_of(rank: int, tensors: Sequence[str], source: Holdings, target: Holdings, where: Where) -> list[Move]:
    """Every transfer in which this rank sends or receives, copies on its own device included (`source` and `target` then share it).

    Both ends of a transfer find it in the same order: by step, then tensor, then box, then the other end.
    """
    place = {tensor: number for number, tensor in enumerate(tensors)}
    found = []
    for strand in strands(tensors, source, target, of_rank=rank):
        for hop in hops(strand, where):
            if rank not in (hop.source, hop.target, *hop.onward):
                continue
            for tensor, box in boxes(hop):
                if rank in (hop.source, hop.target):
                    found.append(Move(tensor, box, hop.source, hop.target, 0))
                if rank in (hop.target, *hop.onward):
                    found += [Move(tensor, box, hop.target, other, 1) for other in hop.onward if rank in (hop.target, other)]
    return sorted(found, key=lambda move: (place[move.tensor], move.step, move.box, move.source, move.target))


def in_buckets(tensors: Sequence[str], target: Holdings, nbytes: Callable[[str], int], bucket_bytes: int) -> list[list[str]]:
    """The tensors in their order, in runs of which no destination takes more than `bucket_bytes`, or a single tensor.

    What counts is a tensor's whole size (`nbytes`) wherever a part of it is needed: vLLM's loaders are given tensors of whole shape.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    holders: dict[Held, np.ndarray] = {}
    found: list[list[str]] = []
    loads = np.zeros(target.world, np.int64)
    for tensor in tensors:
        held = target.of(tensor)
        if held not in holders:
            holders[held] = np.array(sorted({rank for ranks in held.ranks for rank in ranks}))
        loads[holders[held]] += nbytes(tensor)
        if not found or loads.max() > bucket_bytes:
            found.append([])
            loads[:] = 0
            loads[holders[held]] = nbytes(tensor)
        found[-1].append(tensor)
    return found


@dataclass(frozen=True)
class Traffic:
    """Elements that each rank sends and receives, and how many of them cross from node to node."""

    sent: np.ndarray
    received: np.ndarray
    sent_away: np.ndarray
    received_from_away: np.ndarray


def traffic(tensors: Sequence[str], source: Holdings, target: Holdings, where: Where) -> Traffic:
    """Of a whole plan, added up hop by hop; copies on a device are not traffic."""
    result = Traffic(*(np.zeros(source.world + target.world, np.int64) for _ in range(4)))

    def count(sender: int, receiver: int, elements: int) -> None:
        result.sent[sender] += elements
        result.received[receiver] += elements
        if where.nodes[sender] != where.nodes[receiver]:
            result.sent_away[sender] += elements
            result.received_from_away[receiver] += elements

    for strand in strands(tensors, source, target):
        for hop in hops(strand, where):
            if where.device_of.get(hop.target) != hop.source:
                count(hop.source, hop.target, hop.elements)
            for other in hop.onward:
                count(hop.target, other, hop.elements)
    return result


def least_traffic(tensors: Sequence[str], source: Holdings, target: Holdings, where: Where) -> int:
    """Elements that every plan has to move: what destinations need and do not have on their device already."""
    kinds = Counter((source.of(tensor), target.of(tensor)) for tensor in tensors)
    total = 0
    for (sources, targets), count in kinds.items():
        for needed, wanting in zip(targets.boxes, targets.ranks, strict=True):
            total += count * volume(needed) * len(wanting)
            neighbours = [where.device_of[source.world + rank] for rank in wanting if source.world + rank in where.device_of]
            for box, holders in zip(sources.boxes, sources.ranks, strict=True):
                shared = overlap(box, needed) if neighbours else None
                if shared is not None:
                    total -= count * volume(shared) * sum(rank in holders for rank in neighbours)
    return total
