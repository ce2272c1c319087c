"""Where each element of a Hugging Face tensor lives in Megatron's parameters.

The coordinates of Hugging Face tensors are the common language. A `Piece` says that one box of one Hugging Face tensor lies in one box of
one parameter of this rank; a `Layout` is all pieces of a rank. Import, export and weight transfer are all readings of the same layouts.
Everything here is pure: no process group, no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megatron_aspo.errors import UserError

Box = tuple[tuple[int, int], ...]
"""Half-open [start, stop) of each dimension."""


@dataclass(frozen=True)
class ModelDims:
    """The sizes from which every shape of a model follows."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    """The output projection is the embedding matrix."""
    qkv_bias: bool
    qk_norm: bool = False
    """Query and key heads are normalized, each with one weight of head_dim."""


@dataclass(frozen=True)
class ParallelSizes:
    """How many ways the model is cut. Ranks are numbered tensor fastest, then data, then pipeline (Megatron's default order)."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> "Coordinates":
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside the {self.world} ranks of {self}")
        return Coordinates(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands along each axis."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Piece:
    """Elements `box` of Hugging Face tensor `tensor` are elements `local` of this rank's parameter `parameter`; same shape both."""

    tensor: str
    box: Box
    parameter: str
    local: Box


@dataclass(frozen=True)
class Layout:
    """What one rank holds."""

    pieces: tuple[Piece, ...]
    parameter_shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter of this rank, padding included."""


@dataclass(frozen=True)
class Cut:
    """One run of indices along the cut axis: `start` in the whole tensor, `local` in this rank's parameter, `length` in both."""

    start: int
    local: int
    length: int


def padded_vocab(vocab: int, tensor_parallel: int) -> int:
    """Rows of the embedding in Megatron: the vocabulary rounded up to a multiple of the tensor-parallel size."""
    return math.ceil(vocab / tensor_parallel) * tensor_parallel


def check_divisible(dims: ModelDims, sizes: ParallelSizes) -> None:
    """Raises UserError when the model cannot be cut this way."""
    for what, amount in (("attention heads", dims.heads), ("key-value heads", dims.kv_heads), ("feed-forward channels", dims.ffn)):
        if amount % sizes.tensor:
            good = [n for n in range(1, amount + 1) if all(a % n == 0 for a in (dims.heads, dims.kv_heads, dims.ffn))]
            raise UserError(f"trainer.tensor_parallel={sizes.tensor} does not divide the model's {amount} {what}; choose one of {good}")
    if dims.layers % sizes.pipeline:
        good = [n for n in range(1, dims.layers + 1) if dims.layers % n == 0]
        raise UserError(
            f"trainer.pipeline_parallel={sizes.pipeline} does not divide the model's {dims.layers} layers; choose one of {good}"
        )


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def check_exact_cover(layouts: Iterable[Layout], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise unless the layouts of one model replica hold every element of every Hugging Face tensor, and each in one home only.

    Identical boxes are replicas (norms over tensor-parallel ranks, the two copies of a tied embedding) and count once; boxes that
    overlap without being identical, a hole, or a tensor the table does not know are errors.
    """
    boxes: dict[str, set[Box]] = {name: set() for name in shapes}
    for layout in layouts:
        for piece in layout.pieces:
            if piece.tensor not in boxes:
                raise UserError(f"the weight map places {piece.tensor}, which the model does not have")
            boxes[piece.tensor].add(piece.box)
    for name, shape in shapes.items():
        ordered = sorted(boxes[name])
        covered = sum(volume(box) for box in ordered)
        overlap = any(all(a[0] < b[1] and b[0] < a[1] for a, b in zip(left, right, strict=True)) for left, right in pairwise(ordered))
        if covered != math.prod(shape) or overlap:
            raise UserError(
                f"the weight map covers {covered} elements of {name} {shape}, which has {math.prod(shape)}: "
                "this layout of the model is not supported"
            )


def check_parameters_filled(layout: Layout, padding: dict[str, int]) -> None:
    """Raise unless the pieces fill every parameter of the rank exactly, but for `padding` elements per parameter name."""
    filled = dict.fromkeys(layout.parameter_shapes, 0)
    for piece in layout.pieces:
        filled[piece.parameter] += volume(piece.local)
    for name, shape in layout.parameter_shapes.items():
        expected = math.prod(shape) - padding.get(name, 0)
        if filled[name] != expected:
            raise UserError(f"the weight map fills {filled[name]} of the {expected} elements of Megatron parameter {name}")
