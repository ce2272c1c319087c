"""Where each element of a Hugging Face tensor lives in Megatron's parameters.

The coordinates of Hugging Face tensors are the common language. A `Piece` says that one box of one Hugging Face tensor lies in one box of
one parameter of this rank; a `Layout` is all pieces of a rank. Import, export and weight transfer are all readings of the same layouts.
Everything here is pure: no process group, no torch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from megatron_aspo.common.errors import UserError

Box = tuple[tuple[int, int], ...]
"""Half-open [start, stop) of each dimension."""

ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""Bytes of an element, by the names that recipes use."""


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
    experts: int = 0
    """Experts of each layer; 0: the feed-forward part is dense."""
    moe_ffn: int = 0
    """Feed-forward channels of one expert."""


@dataclass(frozen=True)
class ParallelSizes:
    """The parallel sizes of the training ranks, numbered tensor fastest, then context, data, pipeline (Megatron's default order).

    The tensor × context × data ranks of a stage are numbered a second time for the experts: expert tensor fastest, then expert, then expert
    data.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual: int = 1
    """Model chunks of each pipeline stage (interleaved schedule)."""
    expert: int = 1
    """Ranks over which the experts of a layer are distributed."""
    expert_tensor: int | None = None
    """Ranks over which each expert is sharded; None: as `tensor`."""
    context: int = 1
    """Ranks over which the tokens of a sequence are divided; they hold the same weights."""

    @property
    def world(self) -> int:
        return self.stage * self.pipeline

    @property
    def stage(self) -> int:
        """The number of ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def expert_tensor_size(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    def coordinates(self, rank: int) -> "Coordinates":
        """Return the coordinates of a rank. Raises ValueError for a rank outside the world."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside the {self.world} ranks of {self}")
        pipeline, inside = divmod(rank, self.stage)
        return Coordinates(
            tensor=inside % self.tensor,
            data=inside // (self.tensor * self.context),
            pipeline=pipeline,
            expert=inside // self.expert_tensor_size % self.expert,
            expert_tensor=inside % self.expert_tensor_size,
            expert_data=inside // (self.expert_tensor_size * self.expert),
            context=inside // self.tensor % self.context,
        )


@dataclass(frozen=True)
class Coordinates:
    """A rank's coordinate on each parallel axis. Expert coordinates are derived, and ignored by ==."""

    tensor: int
    data: int
    pipeline: int
    expert: int = field(default=0, compare=False)
    expert_tensor: int = field(default=0, compare=False)
    expert_data: int = field(default=0, compare=False)
    context: int = 0


@dataclass(frozen=True)
class Piece:
    """Elements `box` of Hugging Face tensor `tensor` are elements `local` of this rank's parameter `parameter`; same shape both."""

    tensor: str
    box: Box
    parameter: str
    local: Box


@dataclass(frozen=True)
class Layout:
    """All pieces of one rank."""

    pieces: tuple[Piece, ...]
    parameter_shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter of this rank, padding included."""
    expert_parameters: frozenset[str] = frozenset()
    """The parameters that belong to experts."""


class LayoutError(UserError):
    """A model cannot be cut this way. Each command writes the sizes as its own options, through `worded`."""

    def __init__(self, rule: str, **sizes: object):
        """rule: the message, with `{name}` where a size by that name is written, such as `{tensor_parallel}`."""
        self._rule, self._sizes = rule, sizes
        super().__init__(self._written(lambda name, value: f"{name}={value}"))

    def worded(self, option: Callable[[str, str], str]) -> UserError:
        """Return the error in the words of a command. option: (name of a size, its value) → text of that option."""
        return UserError(self._written(option))

    def _written(self, option: Callable[[str, str], str]) -> str:
        values = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in self._sizes.items()}
        return self._rule.format(**{name: option(name, value) for name, value in values.items()})


def padded_vocab(vocab: int, tensor_parallel: int) -> int:
    """Return the rows of Megatron's embedding: the vocabulary rounded up to a multiple of the tensor-parallel size."""
    return math.ceil(vocab / tensor_parallel) * tensor_parallel


def check_divisible(dims: ModelDims, sizes: ParallelSizes) -> None:
    """Raise LayoutError when the model cannot be cut this way."""
    _check_tensor(dims, sizes.tensor)
    if sizes.virtual > 1 and sizes.pipeline == 1:
        raise LayoutError(
            "{virtual_pipeline} interleaves pipeline stages, of which there is one; set it to 1", virtual_pipeline=sizes.virtual
        )
    chunks = sizes.pipeline * sizes.virtual
    if dims.layers % chunks:
        if sizes.virtual == 1:
            raise LayoutError(
                f"{{pipeline_parallel}} does not divide the model's {dims.layers} layers; choose one of {_divisors(dims.layers)}",
                pipeline_parallel=sizes.pipeline,
            )
        raise LayoutError(
            f"{{pipeline_parallel}} × {{virtual_pipeline}} does not divide the model's {dims.layers} layers; their product must be one of "
            f"{_divisors(dims.layers)}",
            pipeline_parallel=sizes.pipeline,
            virtual_pipeline=sizes.virtual,
        )
    _check_experts(dims, sizes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_tensor(dims: ModelDims, tensor: int) -> None:
    """Megatron cuts the fused query, key and value evenly, whole groups or parts of one, and assembles a group that is in parts."""
    qkv_rows = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    # What each size asks of the model, and whether it fits.
    rules = [
        (f"{dims.heads} attention heads", lambda n: dims.heads % n == 0),
        (
            f"{dims.kv_heads} key-value heads, nor is it a multiple of them",
            lambda n: dims.kv_heads % n == 0 or n % dims.kv_heads == 0,
        ),
        (f"{qkv_rows} rows of query, key and value", lambda n: qkv_rows % n == 0),
    ]
    if not dims.experts:
        rules.append((f"{dims.ffn} feed-forward channels", lambda n: dims.ffn % n == 0))
    for what, fits in rules:
        if not fits(tensor):
            good = [n for n in range(1, dims.heads + 1) if all(fits(n) for _, fits in rules)]
            raise LayoutError(f"{{tensor_parallel}} does not divide the model's {what}; choose one of {good}", tensor_parallel=tensor)


def _check_experts(dims: ModelDims, sizes: ParallelSizes) -> None:
    if not dims.experts:
        if sizes.expert > 1 or sizes.expert_tensor not in (None, 1, sizes.tensor):
            raise LayoutError(
                "{expert_parallel}, {expert_tensor_parallel}: the model has no experts; leave them out",
                expert_parallel=sizes.expert,
                expert_tensor_parallel=sizes.expert_tensor,
            )
        return
    if dims.experts % sizes.expert:
        raise LayoutError(
            f"{{expert_parallel}} does not divide the model's {dims.experts} experts; choose one of {_divisors(dims.experts)}",
            expert_parallel=sizes.expert,
        )
    ways = sizes.expert_tensor_size
    if dims.moe_ffn % ways:
        raise LayoutError(
            f"{{expert_tensor_parallel}} does not divide the {dims.moe_ffn} feed-forward channels of an expert; choose one of "
            f"{_divisors(dims.moe_ffn)}",
            expert_tensor_parallel=ways,
        )
    if sizes.stage % (ways * sizes.expert):
        raise LayoutError(
            f"{{expert_parallel}} × {{expert_tensor_parallel}} does not divide the {sizes.stage} ranks of a pipeline stage "
            f"(tensor_parallel × context_parallel × data_parallel); their product must be one of {_divisors(sizes.stage)}",
            expert_parallel=sizes.expert,
            expert_tensor_parallel=ways,
        )


def volume(box: Box) -> int:
    """Return the number of elements of a box."""
    return math.prod(stop - start for start, stop in box)


def slices(box: Box) -> tuple[slice, ...]:
    """Return the index that selects a box of an array or tensor, without a copy."""
    return tuple(slice(*edge) for edge in box)


def format_box(box: Box) -> str:
    """Return a box as Python slices, such as [0:4, 0:8]."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def overlap(a: Box, b: Box) -> Box | None:
    """Return the box of the elements that both boxes hold; None if there are none."""
    shared = tuple((max(start, begin), min(stop, end)) for (start, stop), (begin, end) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def stacked(boxes: Iterable[Box], shape: tuple[int, ...]) -> list[Box] | None:
    """Return the boxes from top to bottom if they are bands of whole rows, without a gap from the first row on; else None."""
    bands, row = sorted(boxes), 0
    for (start, stop), *others in bands:
        if start != row or any(edge != (0, extent) for edge, extent in zip(others, shape[1:], strict=True)):
            return None
        row = stop
    return bands


def check_exact_cover(layouts: Iterable[Layout], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError unless the layouts of one model replica hold every element of every Hugging Face tensor, each in one home only.

    Equal boxes are replicas (norms over tensor-parallel ranks, the two copies of a tied embedding) and count once. Boxes that overlap
    without being equal, a gap, or a tensor that the table does not know are errors.
    """
    boxes: dict[str, set[Box]] = {name: set() for name in shapes}
    for layout in layouts:
        for piece in layout.pieces:
            if piece.tensor not in boxes:
                raise UserError(f"the weight map places {piece.tensor}, which the model does not have")
            boxes[piece.tensor].add(piece.box)
    for name, shape in shapes.items():
        missing, repeated = _cover_errors(boxes[name], shape)
        if missing or repeated:
            raise UserError(
                f"the weight map covers {name} {shape} wrongly, {missing} elements not at all and {repeated} more than once or beyond its "
                "edges: this layout of the model is not supported"
            )


def _cover_errors(boxes: set[Box], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the elements that no box holds, and those that several boxes hold or that lie outside `shape`.

    Exact: the edges of all boxes divide the space into cells, each of which a box holds entirely or not at all.
    """
    whole = tuple((0, extent) for extent in shape)
    if boxes == {whole}:
        return 0, 0
    edges = [np.unique([edge for box in [whole, *boxes] for edge in box[axis]]) for axis in range(len(shape))]
    held = np.zeros([len(e) - 1 for e in edges], dtype=np.int64)
    wanted = np.zeros_like(held)

    def cells(box: Box) -> tuple[slice, ...]:
        return tuple(slice(*np.searchsorted(e, edge)) for e, edge in zip(edges, box, strict=True))

    for box in boxes:
        held[cells(box)] += 1
    wanted[cells(whole)] = 1
    volumes = reduce(np.multiply.outer, [np.diff(e) for e in edges])
    return int(volumes[held < wanted].sum()), int(volumes[held > wanted].sum())


def check_parameters_filled(layout: Layout, padding: dict[str, int]) -> None:
    """Raise UserError unless the pieces fill every parameter of the rank exactly, except for `padding` elements per parameter name."""
    filled = dict.fromkeys(layout.parameter_shapes, 0)
    for piece in layout.pieces:
        filled[piece.parameter] += volume(piece.local)
    for name, shape in layout.parameter_shapes.items():
        expected = math.prod(shape) - padding.get(name, 0)
        if filled[name] != expected:
            raise UserError(f"the weight map fills {filled[name]} of the {expected} elements of Megatron parameter {name}")
