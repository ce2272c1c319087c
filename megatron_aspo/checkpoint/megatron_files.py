"""Boxes of Hugging Face tensors read from a checkpoint of ours, at whatever layout it was written."""

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


def rank_file(directory: Path, room: str, rank: int) -> Path:
    """The file of one rank; room: `model | optimizer | rng`."""
    return directory / room / f"rank_{rank:05d}.safetensors"


def slab_key(kind: str, parameter: str, start: int, stop: int) -> str:
    """Name, in an optimizer file, of elements [start, stop) of a flattened parameter."""
    return f"{kind}/{parameter}[{start}:{stop}]"


@functools.cache
def first_copy(sizes: ParallelSizes, rank: int, expert: bool) -> int:
    """The rank of the first replica that holds what `rank` holds, of the experts' parameters or of all others."""

    def place(rank: int) -> tuple:
        at = sizes.coordinates(rank)
        return (at.pipeline, at.expert, at.expert_tensor) if expert else (at.pipeline, at.tensor)

    return next(other for other in range(sizes.world) if place(other) == place(rank))


@dataclass(frozen=True)
class _Run:
    """Elements [start, stop) of a flattened parameter, and the tensor that holds them."""

    start: int
    stop: int
    handle: safe_open
    key: str


class LayoutReader(ABC):
    """`read` as `TensorReader` has it, of Hugging Face tensors that lie in the parameters of some ranks."""

    def __init__(self, layouts: dict[int, Layout]):
        """layouts: rank → what it holds; together the whole model."""
        self._layouts = layouts
        self._homes: dict[str, dict[Box, tuple[int, Piece]]] = {}
        for rank, layout in layouts.items():
            for piece in layout.pieces:
                self._homes.setdefault(piece.tensor, {}).setdefault(piece.box, (rank, piece))

    @abstractmethod
    def _local(self, rank: int, parameter: str, box: Box) -> torch.Tensor:
        """A box of one parameter."""

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        for name, box in wanted:
            yield name, box, self._box(name, box)

    def homes(self, name: str) -> list[Box]:
        """The boxes in which a tensor is stored; together they are the tensor."""
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
        if found != volume(box):
            raise RuntimeError(f"{found} of the {volume(box)} elements of {name} {box} were found")
        return result


class MegatronReader(LayoutReader):
    """A checkpoint of ours. One reader for each kind of tensor: `model`, or one of OPTIMIZER_KINDS."""

    def __init__(self, directory: Path, manifest: Manifest, model: HFModel, kind: str = "model"):
        """Reads the headers of all files; raises UserError unless they hold exactly what the manifest's layout says."""
        super().__init__(replica_layouts(model.architecture, model.dims, manifest.sizes, manifest.naming))
        self.dtypes = dict.fromkeys(model.tensor_shapes, manifest.dtype if kind == "model" else "float32")
        """Element type of each tensor, as torch names it."""
        self._kind = kind
        runs = _model_runs(directory, self._layouts) if kind == "model" else _optimizer_runs(directory, manifest.sizes, self._layouts, kind)
        self._runs = {home: sorted(found, key=lambda run: run.start) for home, found in runs.items()}
        self._check_cover(directory)

    def _check_cover(self, directory: Path) -> None:
        for rank, layout in self._layouts.items():
            for parameter, shape in layout.parameter_shapes.items():
                edges = [0]
                for run in self._runs.get((rank, parameter), []):
                    edges.append(run.stop if run.start == edges[-1] else -1)
                if edges[-1] != torch.Size(shape).numel():
                    raise UserError(f"{directory} does not hold {self._kind} of {parameter} {shape} of rank {rank} exactly once")

    def _local(self, rank: int, parameter: str, box: Box) -> torch.Tensor:
        """A box of one parameter: whole rows are read, then columns are taken."""
        shape = self._layouts[rank].parameter_shapes[parameter]
        runs = self._runs[rank, parameter]
        if self._kind == "model":
            return runs[0].handle.get_slice(runs[0].key)[tuple(slice(*edge) for edge in box)]
        row = torch.Size(shape[1:]).numel()
        first, last = box[0][0] * row, box[0][1] * row
        parts = [
            run.handle.get_slice(run.key)[max(first, run.start) - run.start : min(last, run.stop) - run.start]
            for run in runs
            if run.start < last and run.stop > first
        ]
        rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, *shape[1:])
        return rows[(slice(None), *(slice(*edge) for edge in box[1:]))]


_Runs = dict[tuple[int, str], list[_Run]]


def _model_runs(directory: Path, layouts: dict[int, Layout]) -> _Runs:
    runs: _Runs = {}
    for rank, layout in layouts.items():
        handle = open_tensors(rank_file(directory, "model", rank))
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        if shapes != layout.parameter_shapes:
            wrong = sorted({key for key, _ in set(shapes.items()) ^ set(layout.parameter_shapes.items())})
            raise UserError(f"{rank_file(directory, 'model', rank)}: {wrong[0]} is not as the layout in the manifest says")
        runs |= {(rank, key): [_Run(0, torch.Size(shape).numel(), handle, key)] for key, shape in shapes.items()}
    return runs


def _optimizer_runs(directory: Path, sizes: ParallelSizes, layouts: dict[int, Layout], kind: str) -> _Runs:
    experts = frozenset().union(*(layout.expert_parameters for layout in layouts.values()))
    runs: _Runs = {}
    for rank in range(sizes.world):
        file = rank_file(directory, "optimizer", rank)
        if not file.exists():
            continue  # a replica's rank without a share
        handle = open_tensors(file)
        for key in handle.keys():  # noqa: SIM118
            match = _KEY.fullmatch(key)
            if match is None:
                raise UserError(f"{file} has the unknown tensor {key}")
            if match[1] == kind:
                home = first_copy(sizes, rank, expert=match[2] in experts), match[2]
                runs.setdefault(home, []).append(_Run(int(match[3]), int(match[4]), handle, key))
    return runs
