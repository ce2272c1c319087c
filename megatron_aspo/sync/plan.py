"""The transfer plan: which rank sends which elements of which tensor to which rank, so that every target gets each of its elements once.

Every rank derives the plan by itself from the holdings of both sides and the nodes of their ranks: it is pure, and the same everywhere.
Sources are numbered first, then targets.

- The boxes of both sides are intersected. Where a source's box meets a target's, the shared box must travel: for all tensors of that kind,
  from the sources that hold it to the targets that need it.
- A target that shares its device with such a source copies the box there, and nothing is sent.
- On a node with sources of its own, these send to the targets of that node. To any other node a shared box is sent once: to one of its
  targets, which passes it on to the others.
- The rows of a shared box, times the nodes (or targets) that they are sent to, are divided into as many parts as there are sources, equal
  up to one row, so that replicated sources share the sending evenly. Targets that pass rows on share that in the same way.

Example: the 8 rows of a norm are replicated on training ranks 0 and 1, which live on node 0; ranks 2 and 3 are workers on node 1 and need
all 8 rows. One copy crosses: rank 0 sends rows 0–3 to rank 2, rank 1 sends rows 4–7 to rank 3. Then ranks 2 and 3 exchange their halves.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from megatron_aspo.weights.holdings import BoxOwners, Ranks
from megatron_aspo.weights.layout import Box, overlap, volume


class Holdings(Protocol):
    """One side of a transfer: what each of its ranks holds or needs."""

    world: int

    def of(self, tensor: str) -> BoxOwners:
        """Return the boxes of a tensor and the ranks of this side that hold each."""
        ...


@dataclass(frozen=True)
class RankNodes:
    """The node of every rank, and the targets that share a device with a source."""

    node_of: tuple[int, ...]
    """Node of each rank, sources first, then targets."""
    device_of: dict[int, int]
    """Target → the source with which it shares a device, for those that share one."""


@dataclass(frozen=True, eq=False)
class SharedBox:
    """A box of each of several tensors of one kind that the same sources hold and the same targets need."""

    tensors: tuple[str, ...]
    box: Box
    sources: Ranks
    targets: Ranks
    """Numbered after the sources."""

    @property
    def rows_each(self) -> int:
        """The rows of the box in one tensor."""
        return self.box[0][1] - self.box[0][0]

    @property
    def rows(self) -> int:
        """The rows of the box in all tensors."""
        return self.rows_each * len(self.tensors)

    @property
    def row_elements(self) -> int:
        return volume(self.box) // self.rows_each


@dataclass(frozen=True)
class Route:
    """Rows [start, stop) of a shared box, counted through its tensors, from one rank to another, which may pass them on within its node."""

    shared: SharedBox
    start: int
    stop: int
    source: int
    target: int
    onward: Ranks = ()
    """Targets to which `target` passes the rows on."""

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.shared.row_elements


@dataclass(frozen=True)
class Move:
    """One box of one tensor from one rank to another. `step`: 0 from a source, 1 passed on by a target."""

    tensor: str
    box: Box
    source: int
    target: int
    step: int


def find_shared_boxes(tensors: Sequence[str], source: Holdings, target: Holdings, of_rank: int | None = None) -> list[SharedBox]:
    """Return every shared box of the two sides; with `of_rank`, only those in which that rank takes part. Tensors keep their order."""
    kinds: dict[tuple[BoxOwners, BoxOwners], list[str]] = {}
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
                        found.append(SharedBox(tuple(names), shared, senders, receivers))
    return found


def choose_routes(shared: SharedBox, nodes: RankNodes) -> Iterator[Route]:
    """Yield the routes of the rows of one shared box. A route within a target's own device costs no transfer."""
    by_node = {
        node: tuple(ranks)
        for node, ranks in groupby(sorted(shared.targets, key=lambda r: (nodes.node_of[r], r)), nodes.node_of.__getitem__)
    }
    remote = []
    for node, targets in by_node.items():
        near = [rank for rank in shared.sources if nodes.node_of[rank] == node]
        if not near:
            remote.append(targets)
            continue
        on_device = [rank for rank in targets if nodes.device_of.get(rank) in near]
        for rank in on_device:
            yield Route(shared, 0, shared.rows, nodes.device_of[rank], rank)
        others = [rank for rank in targets if rank not in on_device]
        for copy, start, stop, index in _divide_copies(shared.rows, len(others), len(near)):
            yield Route(shared, start, stop, near[index], others[copy])
    for copy, start, stop, index in _divide_copies(shared.rows, len(remote), len(shared.sources)):
        targets = remote[copy]
        # Each target of the node receives an equal part of the rows first.
        for first, _ in enumerate(targets):
            begin, end = (
                max(start, _part_start(first, shared.rows, len(targets))),
                min(stop, _part_start(first + 1, shared.rows, len(targets))),
            )
            if begin < end:
                onward = targets[:first] + targets[first + 1 :]
                yield Route(shared, begin, end, shared.sources[index], targets[first], onward)


def _part_start(part: int, rows: int, parts: int) -> int:
    """Return the first row of a part when `rows` are divided into equal parts, up to one row."""
    return part * rows // parts


def _divide_copies(rows: int, copies: int, parts: int) -> Iterator[tuple[int, int, int, int]]:
    """Divide `copies` × `rows`, one copy after another, into equal parts; yield (copy, first row, row after the last, part)."""
    for part in range(parts):
        position, end = _part_start(part, rows * copies, parts), _part_start(part + 1, rows * copies, parts)
        while position < end:
            copy, row = divmod(position, rows)
            stop = min(rows, row + end - position)
            yield copy, row, stop, part
            position += stop - row


def boxes_on_route(route: Route) -> Iterator[tuple[str, Box]]:
    """Yield the (tensor, box) pairs that the rows of a route consist of."""
    shared = route.shared
    (top, _), *others = shared.box
    for number in range(route.start // shared.rows_each, -(-route.stop // shared.rows_each)):
        before = number * shared.rows_each
        start, stop = max(route.start - before, 0), min(route.stop - before, shared.rows_each)
        yield shared.tensors[number], ((top + start, top + stop), *others)


def plan_moves(rank: int, tensors: Sequence[str], source: Holdings, target: Holdings, nodes: RankNodes) -> list[Move]:
    """Return every move in which this rank sends or receives, copies within a device (`RankNodes.device_of`) included.

    Both ends list a move in the same order: by tensor, then step, then box, then the other end.
    """
    position = {tensor: number for number, tensor in enumerate(tensors)}
    found = []
    for shared in find_shared_boxes(tensors, source, target, of_rank=rank):
        for route in choose_routes(shared, nodes):
            if rank not in (route.source, route.target, *route.onward):
                continue
            for tensor, box in boxes_on_route(route):
                if rank in (route.source, route.target):
                    found.append(Move(tensor, box, route.source, route.target, 0))
                if rank in (route.target, *route.onward):
                    found += [Move(tensor, box, route.target, other, 1) for other in route.onward if rank in (route.target, other)]
    return sorted(found, key=lambda move: (position[move.tensor], move.step, move.box, move.source, move.target))


def fill_buckets(tensors: Sequence[str], target: Holdings, nbytes: Callable[[str], int], bucket_bytes: int) -> list[list[str]]:
    """Divide the tensors, in their order, into buckets of which no target takes more than `bucket_bytes`, or into single tensors.

    A tensor counts with its whole size (`nbytes`) on every target that needs a part of it: vLLM's loaders take tensors of whole shape.
    Raises ValueError for a bound below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    holders: dict[BoxOwners, np.ndarray] = {}
    buckets: list[list[str]] = []
    loads = np.zeros(target.world, np.int64)
    for tensor in tensors:
        owners = target.of(tensor)
        if owners not in holders:
            holders[owners] = np.array(sorted({rank for ranks in owners.ranks for rank in ranks}))
        loads[holders[owners]] += nbytes(tensor)
        if not buckets or loads.max() > bucket_bytes:
            buckets.append([])
            loads[:] = 0
            loads[holders[owners]] = nbytes(tensor)
        buckets[-1].append(tensor)
    return buckets


@dataclass(frozen=True)
class Traffic:
    """Elements that each rank sends and receives, int64 [ranks], and how many of them cross between nodes."""

    sent: np.ndarray
    received: np.ndarray
    sent_between_nodes: np.ndarray
    received_between_nodes: np.ndarray


def count_traffic(tensors: Sequence[str], source: Holdings, target: Holdings, nodes: RankNodes) -> Traffic:
    """Add up a whole plan, route by route. Copies within a device do not count."""
    result = Traffic(*(np.zeros(source.world + target.world, np.int64) for _ in range(4)))

    def count(sender: int, receiver: int, elements: int) -> None:
        result.sent[sender] += elements
        result.received[receiver] += elements
        if nodes.node_of[sender] != nodes.node_of[receiver]:
            result.sent_between_nodes[sender] += elements
            result.received_between_nodes[receiver] += elements

    for shared in find_shared_boxes(tensors, source, target):
        for route in choose_routes(shared, nodes):
            if nodes.device_of.get(route.target) != route.source:
                count(route.source, route.target, route.elements)
            for other in route.onward:
                count(route.target, other, route.elements)
    return result


def count_least_traffic(tensors: Sequence[str], source: Holdings, target: Holdings, nodes: RankNodes) -> int:
    """Return the elements that any plan must move: what targets need and do not have on their device already."""
    kinds = Counter((source.of(tensor), target.of(tensor)) for tensor in tensors)
    total = 0
    for (sources, targets), count in kinds.items():
        for needed, wanting in zip(targets.boxes, targets.ranks, strict=True):
            total += count * volume(needed) * len(wanting)
            neighbours = [nodes.device_of[source.world + rank] for rank in wanting if source.world + rank in nodes.device_of]
            for box, holders in zip(sources.boxes, sources.ranks, strict=True):
                shared = overlap(box, needed) if neighbours else None
                if shared is not None:
                    total -= count * volume(shared) * sum(rank in holders for rank in neighbours)
    return total
