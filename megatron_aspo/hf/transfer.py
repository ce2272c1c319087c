"""Moving weights between files and training ranks by their layouts: loading, and gathering whole tensors on one rank."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_aspo.hf.tensor_files import Reader
from megatron_aspo.hf.tensor_meta import TensorMeta
from megatron_aspo.weights.layout import Box, Layout, Piece, slices, stacked, volume


@torch.no_grad()
def in_parts(layout: Layout, reader: Reader, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield the parameters named by `dtypes`, one at a time, each as its parts from top to bottom, cast to its element type.

    The parts are the reader's own CPU tensors, without a copy, unless pieces lie side by side. Padding is zero.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        pieces.setdefault(piece.parameter, []).append(piece)
    for name, dtype in dtypes.items():
        homes = {(piece.tensor, piece.box): piece.local for piece in pieces.get(name, [])}
        shape = layout.parameter_shapes[name]
        bands = {box: key for key, box in homes.items()}
        order = stacked(bands, shape)
        if order is None:
            parameter = torch.zeros(shape, dtype=dtype)
            for tensor, box, values in reader.read(list(homes)):
                parameter[slices(homes[tensor, box])].copy_(values)
            yield name, [parameter]
            continue
        parts = [values.to(dtype) for box in order for _, _, values in reader.read([bands[box]])]
        padding = shape[0] - sum(len(part) for part in parts)
        yield name, parts + [torch.zeros((padding, *shape[1:]), dtype=dtype)] * bool(padding)


def assemble(layout: Layout, reader: Reader, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the same as `in_parts`, each parameter as one tensor."""
    for name, parts in in_parts(layout, reader, dtypes):
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def load(layout: Layout, parameters: Mapping[str, torch.Tensor], reader: Reader) -> None:
    """Fill this rank's parameters, cast to each parameter's dtype."""
    check_parameters(layout, parameters)
    for name, values in assemble(layout, reader, {name: parameter.dtype for name, parameter in parameters.items()}):
        parameters[name].copy_(values)


def check_parameters(layout: Layout, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError unless the model's parameters are exactly the layout's, by name and shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != layout.parameter_shapes:
        differing = sorted(set(shapes.items()) ^ set(layout.parameter_shapes.items()))
        raise RuntimeError(f"the model's parameters differ from the weight map: {differing[:6]}")


class Gather:
    """Gathers whole Hugging Face tensors on rank 0 from the ranks of the first data-parallel replica.

    Every rank that takes part builds it from the same layouts, so that all ranks derive the same sends without a coordinator. Each element
    is sent once: the lowest rank sends a replicated box. Rank 0 must be part of the replica.
    """

    def __init__(
        self, layouts: Mapping[int, Layout], rank: int, parameters: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None
    ):
        self._rank = rank
        self._parameters = parameters
        self._group = group
        self._sources: dict[str, dict[int, list[Piece]]] = {}
        seen: set[tuple[str, Box]] = set()
        for source in sorted(layouts):
            for piece in layouts[source].pieces:
                if (piece.tensor, piece.box) not in seen:
                    seen.add((piece.tensor, piece.box))
                    self._sources.setdefault(piece.tensor, {}).setdefault(source, []).append(piece)

    @torch.no_grad()
    def whole(self, metas: Sequence[TensorMeta]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, whole tensor in the meta's dtype) on rank 0, nothing elsewhere. Collective over the replica."""
        for meta in metas:
            dtype = getattr(torch, meta.dtype)
            whole = None
            for source, pieces in self._sources[meta.name].items():
                if self._rank == source:
                    values = torch.cat([self._parameters[p.parameter][slices(p.local)].reshape(-1) for p in pieces]).to(dtype)
                    if source != 0:
                        dist.send(values, dst=0, group=self._group)
                        continue
                elif self._rank == 0:
                    device = next(iter(self._parameters.values())).device
                    values = torch.empty(sum(volume(p.box) for p in pieces), dtype=dtype, device=device)
                    dist.recv(values, src=source, group=self._group)
                else:
                    continue
                if whole is None:
                    whole = torch.empty(meta.shape, dtype=dtype, device=values.device)
                for piece, part in zip(pieces, values.split([volume(p.box) for p in pieces]), strict=True):
                    target = whole[slices(piece.box)]
                    target.copy_(part.view(target.shape))
            if whole is not None:
                yield meta.name, whole
