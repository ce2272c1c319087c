"""The part of one rank in a transfer: the buckets, and the messages that it sends and receives in each.

Pure. Every rank derives its own schedule from the same inputs. One message holds everything that one rank sends another in one bucket.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_aspo.sync.plan import Holdings, Move, RankNodes, fill_buckets, plan_moves
from megatron_aspo.weights.layout import ITEMSIZE, Box, volume


@dataclass(frozen=True)
class Message:
    """Everything that one rank sends another in one bucket, packed move after move without gaps."""

    source: int
    target: int
    moves: tuple[Move, ...]

    @property
    def step(self) -> int:
        """0: sent by a training rank. 1: passed on by a worker."""
        return self.moves[0].step

    @property
    def content(self) -> tuple[tuple[str, Box], ...]:
        """The (tensor, box) pairs in it, regardless of the target."""
        return tuple((move.tensor, move.box) for move in self.moves)

    @property
    def elements(self) -> int:
        return sum(volume(move.box) for move in self.moves)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, and this rank's messages among them."""

    label: str
    """Names the bucket in errors."""
    tensors: tuple[str, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Schedule:
    """The part of rank `rank` in every transfer of a group."""

    def __init__(
        self,
        rank: int,
        source: Holdings,
        target: Holdings,
        nodes: RankNodes,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        bucket_bytes: int,
    ):
        """shapes: shape of every whole tensor, in the order in which they are sent; dtype: the element type in which they travel."""
        self.rank, self.shapes, self.dtype = rank, shapes, dtype
        moves: dict[str, list[Move]] = {}
        for move in plan_moves(rank, list(shapes), source, target, nodes):
            moves.setdefault(move.tensor, []).append(move)
        buckets = fill_buckets(list(shapes), target, lambda tensor: math.prod(shapes[tensor]) * ITEMSIZE[dtype], bucket_bytes)
        self.buckets = tuple(
            self._bucket(f"bucket {number} of {len(buckets)}", tensors, [move for tensor in tensors for move in moves.get(tensor, [])])
            for number, tensors in enumerate(buckets, start=1)
        )

    @property
    def peers(self) -> set[int]:
        """The ranks with which this rank exchanges messages."""
        return {rank for connection in self.connections for rank in connection} - {self.rank}

    def digests(self) -> dict[int, str]:
        """Return, for each peer, the SHA-256 of all messages between it and this rank. The peer must compute the same for this rank."""
        hashes = {peer: hashlib.sha256() for peer in self.peers}
        for bucket in self.buckets:
            for message in sorted((*bucket.sends, *bucket.receives), key=lambda message: (message.step, message.source, message.target)):
                peer = message.target if message.source == self.rank else message.source
                hashes[peer].update(repr((bucket.label, message.step, message.source, message.target, message.content)).encode())
        return {peer: found.hexdigest() for peer, found in hashes.items()}

    @property
    def connections(self) -> set[tuple[int, int]]:
        """The (source, target) ranks of every message that this rank sends or receives."""
        return {(message.source, message.target) for bucket in self.buckets for message in (*bucket.sends, *bucket.receives)}

    def _bucket(self, label: str, tensors: Sequence[str], moves: Sequence[Move]) -> Bucket:
        between: dict[tuple[int, int, int], list[Move]] = {}
        for move in moves:
            between.setdefault((move.step, move.source, move.target), []).append(move)
        messages = [Message(source, target, tuple(parts)) for (_, source, target), parts in sorted(between.items())]
        sends = tuple(message for message in messages if message.source == self.rank)
        return Bucket(label, tuple(tensors), sends, tuple(message for message in messages if message.target == self.rank))


def node_map(hosts: Sequence[str]) -> RankNodes:
    """Return the nodes of ranks that live on these hosts: one node per host, no shared devices."""
    numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return RankNodes(tuple(numbers[host] for host in hosts), {})
