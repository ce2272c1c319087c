"""Reads boxes of Hugging Face tensors from a Megatron checkpoint written at any layout."""

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_aspo.checkpoint.manifest import Manifest
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import HFModel
from megatron_aspo.hf.tensor_files import open_tensors
from megatron_aspo.weights.families import replica_layouts
from megatron_aspo.weights.layout import Box, Layout, ParallelSizes, Piece, overlap, volume

OPTIMIZER_KINDS = ("master", "exp_avg", "exp_avg_sq")
_KEY = re.compile(rf"({'|'.join(OPTIMIZER_KINDS)})/(.+)\[(\d+):(\d+)\]")


def rank_file(directory: Path, section: str, rank: int) -> Path:
    """Return the path of one rank's file; section: `model | optimizer | rng`."""
    return directory / section / f"rank_{rank:05d}.safetensors"


def slab_key(kind: str, parameter: str, start: int, stop: int) -> str:
    """Return the name, in an optimizer file, of elements [start, stop) of a flattened parameter."""
    return f"{kind}/{parameter}[{start}:{stop}]"


@functools.cache
def first_copy(sizes: ParallelSizes, rank: int, expert: bool) -> int:
    """Return the first rank that holds the same shard as `rank`, of the experts' parameters or of all others."""

    def shard(rank: int) -> tuple:
        at = sizes.coordinates(rank)
        return (at.pipeline, at.expert, at.expert_tensor) if expert else (at.pipeline, at.tensor)

    return next(other for other in range(sizes.world) if shard(other) == shard(rank))


@dataclass(frozen=True)
class _StoredRange:
    """Elements [start, stop) of a flattened parameter, and the stored tensor that holds them."""

    start: int
    stop: int
    handle: safe_open
    key: str


class LayoutReader(ABC):
    """Reads Hugging Face tensors, as `TensorReader` does, from the parameters of ranks."""

    def __init__(self, layouts: dict[int, Layout]):
        """Store the layouts: rank → what it holds; together they hold the whole model."""
        self._layouts = layouts
        self._homes: dict[str, dict[Box, tuple[int, Piece]]] = {}
        for rank, layout in layouts.items():
            for piece in layout.pieces:
                self._homes.setdefault(piece.tensor, {}).setdefault(piece.box, (rank, piece))

    @abstractmethod
    def _local(self, rank: int, parameter: str, box: Box) -> torch.Tensor:
        """Return a box of one parameter."""

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        for name, box in wanted:
            yield name, box, self._box(name, box)

    def homes(self, name: str) -> list[Box]:
        """Return the boxes in which a tensor is stored; together they are the tensor."""
        return list(self._homes[name])

    def _box(self, name: str, box: Box) -> torch.Tensor:
        result, found = None, 0
        for home, (rank, piece) in self._homes[name].items():
            if (shared := overlap(home, box)) is None:
                continue
            local = tuple(
                (start - edge[0] + inside[0], stop - edge[0] + inside[0])
                for (start, stop), edge, inside in zip(shared, home, piece.local, strict=True)
            )
            values = self._local(rank, piece.parameter, local)
            found += volume(shared)
            if shared == box:
                return values
            if result is None:
                result = torch.empty([stop - start for start, stop in box], dtype=values.dtype)
            result[tuple(slice(s - b[0], e - b[0]) for (s, e), b in zip(shared, box, strict=True))] = values
        if result is None or found != volume(box):
            raise RuntimeError(f"{found} of the {volume(box)} elements of {name} {box} were found")
        return result


class MegatronReader(LayoutReader):
    """Reads one kind of tensor, `model` or one of OPTIMIZER_KINDS, from a Megatron checkpoint."""

    def __init__(self, directory: Path, manifest: Manifest, model: HFModel, kind: str = "model"):
        """Read the headers of all files. Raises UserError unless they hold exactly what the manifest's layout says."""
        super().__init__(replica_layouts(model.architecture, model.dims, manifest.sizes, manifest.naming))
        self.dtypes = dict.fromkeys(model.tensor_shapes, manifest.dtype if kind == "model" else "float32")
        """Element type of each tensor, as torch names it."""
        self._kind = kind
        if kind == "model":
            ranges = _model_ranges(directory, self._layouts)
        else:
            ranges = _optimizer_ranges(directory, manifest.sizes, self._layouts, kind)
        self._ranges = {home: sorted(found, key=lambda stored: stored.start) for home, found in ranges.items()}
        self._check_cover(directory)

    def _check_cover(self, directory: Path) -> None:
        for rank, layout in self._layouts.items():
            for parameter, shape in layout.parameter_shapes.items():
                edges = [0]
                for stored in self._ranges.get((rank, parameter), []):
                    edges.append(stored.stop if stored.start == edges[-1] else -1)
                if edges[-1] != torch.Size(shape).numel():
                    raise UserError(f"{directory} does not hold {self._kind} of {parameter} {shape} of rank {rank} exactly once")

    def _local(self, rank: int, parameter: str, box: Box) -> torch.Tensor:
        """Return a box of one parameter: optimizer state is read by whole rows, from which columns are taken."""
        shape = self._layouts[rank].parameter_shapes[parameter]
        ranges = self._ranges[rank, parameter]
        if self._kind == "model":
            return ranges[0].handle.get_slice(ranges[0].key)[tuple(slice(*edge) for edge in box)]
        row = torch.Size(shape[1:]).numel()
        first, last = box[0][0] * row, box[0][1] * row
        parts = [
            stored.handle.get_slice(stored.key)[max(first, stored.start) - stored.start : min(last, stored.stop) - stored.start]
            for stored in ranges
            if stored.start < last and stored.stop > first
        ]
        rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, *shape[1:])
        return rows[(slice(None), *(slice(*edge) for edge in box[1:]))]


_StoredRanges = dict[tuple[int, str], list[_StoredRange]]


def _model_ranges(directory: Path, layouts: dict[int, Layout]) -> _StoredRanges:
    ranges: _StoredRanges = {}
    for rank, layout in layouts.items():
        handle = open_tensors(rank_file(directory, "model", rank))
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        if shapes != layout.parameter_shapes:
            wrong = sorted({key for key, _ in set(shapes.items()) ^ set(layout.parameter_shapes.items())})
            raise UserError(f"{rank_file(directory, 'model', rank)}: {wrong[0]} is not as the layout in the manifest says")
        ranges |= {(rank, key): [_StoredRange(0, torch.Size(shape).numel(), handle, key)] for key, shape in shapes.items()}
    return ranges


def _optimizer_ranges(directory: Path, sizes: ParallelSizes, layouts: dict[int, Layout], kind: str) -> _StoredRanges:
    experts = frozenset().union(*(layout.expert_parameters for layout in layouts.values()))
    ranges: _StoredRanges = {}
    for rank in range(sizes.world):
        file = rank_file(directory, "optimizer", rank)
        if not file.exists():
            continue  # a rank of a further replica holds no shard
        handle = open_tensors(file)
        for key in handle.keys():  # noqa: SIM118
            match = _KEY.fullmatch(key)
            if match is None:
                raise UserError(f"{file} has the unknown tensor {key}")
            if match[1] == kind:
                home = first_copy(sizes, rank, expert=match[2] in experts), match[2]
                ranges.setdefault(home, []).append(_StoredRange(int(match[3]), int(match[4]), handle, key))
    return ranges
