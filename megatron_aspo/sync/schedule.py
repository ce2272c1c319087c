"""One rank's part of a transfer: which buckets there are, and in each which messages it sends and receives.

Pure. Every rank derives it for itself from the same `TransferSpec` and from where the ranks live; one message holds all that goes from one
rank to another in one bucket.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_aspo.sync.plan import Move, Where, in_buckets, moves_of
from megatron_aspo.weights.families import tensor_shapes
from megatron_aspo.weights.holdings import EngineHoldings, EngineSizes, TrainingHoldings
from megatron_aspo.weights.layout import Box, ModelDims, ParallelSizes, volume


@dataclass(frozen=True)
class TransferSpec:
    """What both sides of a transfer have to agree on."""

    architecture: str
    dims: ModelDims
    training: ParallelSizes
    engines: EngineSizes
    dtype: str
    """Of the engines, in which weights travel."""
    bucket_bytes: int
    """At most so many bytes of whole tensors are on their way into an engine's worker at one time, and as many come next."""
    colocated: bool = False
    """Ranks share devices, which NCCL refuses: the group is gloo's. On a machine weights lie in memory of the device then (CUDA IPC), and
    between machines they travel through the hosts' memory."""

    @property
    def world(self) -> int:
        """Ranks of the group: the training ranks first, then the workers, engine by engine."""
        return self.training.world + self.engines.world

    def name(self, rank: int) -> str:
        """What a rank of the group is called in errors."""
        if rank < self.training.world:
            return f"training rank {rank}"
        engine, worker = divmod(rank - self.training.world, self.engines.tensor)
        return f"engine {engine}" + (f" worker {worker}" if self.engines.tensor > 1 else "")

    def as_dict(self) -> dict[str, Any]:
        """Numbers and words only, for `from_dict` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "TransferSpec":
        rooms = {"dims": ModelDims, "training": ParallelSizes, "engines": EngineSizes}
        return cls(**{key: rooms[key](**value) if key in rooms else value for key, value in known.items()})


@dataclass(frozen=True)
class Message:
    """All that one rank sends another in one bucket, move after move without gaps."""

    source: int
    target: int
    moves: tuple[Move, ...]

    @property
    def step(self) -> int:
        """0 from a training rank, 1 passed on by a worker."""
        return self.moves[0].step

    @property
    def content(self) -> tuple[tuple[str, Box], ...]:
        """What is in it, whoever gets it."""
        return tuple((move.tensor, move.box) for move in self.moves)

    @property
    def elements(self) -> int:
        return sum(volume(move.box) for move in self.moves)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, and this rank's messages among them."""

    label: str
    """Names it in errors."""
    tensors: tuple[str, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Schedule:
    """The part of rank `rank` in every transfer of a group."""

    def __init__(self, spec: TransferSpec, rank: int, where: Where):
        """Raises UserError when the engines cannot cut the model as the spec says."""
        self.spec, self.rank = spec, rank
        self.shapes = tensor_shapes(spec.architecture, spec.dims)
        source = TrainingHoldings(spec.architecture, spec.dims, spec.training)
        target = EngineHoldings(spec.architecture, spec.dims, spec.engines)
        order = source.in_turns()
        by_tensor: dict[str, list[Move]] = {}
        for move in moves_of(rank, order, source, target, where):
            by_tensor.setdefault(move.tensor, []).append(move)
        runs = self._in_buckets(order, target)
        self.buckets = tuple(
            self._bucket(f"bucket {number} of {len(runs)}", tensors, [move for tensor in tensors for move in by_tensor.get(tensor, [])])
            for number, tensors in enumerate(runs, start=1)
        )

    @property
    def routes(self) -> set[tuple[int, int]]:
        """(source, target) of every message that this rank sends or receives."""
        return {(message.source, message.target) for bucket in self.buckets for message in (*bucket.sends, *bucket.receives)}

    def _in_buckets(self, order: Sequence[str], target: EngineHoldings) -> list[list[str]]:
        from megatron_aspo.hf.tensor_meta import torch_dtype  # torch stays out of the driver, which knows the spec

        itemsize = torch_dtype(self.spec.dtype).itemsize
        return in_buckets(order, target, lambda tensor: math.prod(self.shapes[tensor]) * itemsize, self.spec.bucket_bytes)

    def _bucket(self, label: str, tensors: Sequence[str], moves: Sequence[Move]) -> Bucket:
        between: dict[tuple[int, int, int], list[Move]] = {}
        for move in moves:
            between.setdefault((move.step, move.source, move.target), []).append(move)
        messages = [Message(source, target, tuple(parts)) for (_, source, target), parts in sorted(between.items())]
        sends = tuple(message for message in messages if message.source == self.rank)
        return Bucket(label, tuple(tensors), sends, tuple(message for message in messages if message.target == self.rank))


def where_of(places: Sequence[str]) -> Where:
    """One node per place."""
    known = {place: node for node, place in enumerate(dict.fromkeys(places))}
    return Where(tuple(known[place] for place in places), {})
