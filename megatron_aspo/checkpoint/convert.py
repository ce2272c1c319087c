"""Conversion between Hugging Face directories and Megatron checkpoints, at any layout: all of the model, proved, or nothing.

Every element is accounted for before the first byte is written; what was written is read back and each Hugging Face tensor's SHA-256
compared with the source's before the directory gets its name. Memory holds one tensor of each side at a time.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_aspo.checkpoint.atomic import new_directory, sync_files
from megatron_aspo.checkpoint.hf_writer import SHARD_BYTES, write_weights
from megatron_aspo.checkpoint.manifest import Manifest, is_checkpoint, read_manifest, write_manifest
from megatron_aspo.checkpoint.megatron_files import MegatronReader, rank_file
from megatron_aspo.checkpoint.small_files import copy_small_files, stated_dtype
from megatron_aspo.checkpoint.tensor_file import TensorFileWriter, raw_bytes
from megatron_aspo.data.model_directory import resolve_model
from megatron_aspo.errors import UserError
from megatron_aspo.weights.buckets import TensorMeta
from megatron_aspo.weights.families import replica_layouts
from megatron_aspo.weights.hf_files import DTYPES, Reader, TensorReader
from megatron_aspo.weights.hf_model import HFModel, read_model
from megatron_aspo.weights.layout import ParallelSizes, check_divisible
from megatron_aspo.weights.transfer import assemble

Verify = Callable[[Path, Path, torch.dtype], None]
"""(a Hugging Face directory, a Megatron checkpoint, the element type of both) → raises UserError when their logits differ."""


@dataclass(frozen=True)
class Source:
    """A model to convert, accounted for."""

    directory: Path
    megatron: bool
    """A checkpoint of ours, rather than a Hugging Face directory."""
    model: HFModel
    reader: Reader
    dtype: str
    """Element type of its tensors."""
    hashes: dict[str, str]
    """Tensor → SHA-256, where the source states them."""


def open_source(path: str | Path, dtype: str | None = None) -> Source:
    """Check a model directory, hub name or checkpoint as a whole; dtype: what the tensors are to become, None to keep theirs.

    Raises UserError naming what is missing, unknown, damaged, of another shape or element type, and what the family does not support.
    """
    asked, path = path, Path(path).expanduser()
    if is_checkpoint(path):
        manifest = read_manifest(path)
        model = read_model(path / "huggingface")
        return Source(path, True, model, MegatronReader(path, manifest, model), manifest.dtype, manifest.tensors)
    model = read_model(resolve_model(asked))  # as given: a Path drops the "./" that tells a directory from a name on the hub
    reader = TensorReader(model)
    reader.check_head()
    stated = stated_dtype(model.directory) or next(iter(reader.dtypes.values()))
    for name, stored in reader.dtypes.items():
        if stored != stated and dtype is None:
            raise UserError(f"{model.directory}: {name} is {stored}, the model {stated}; choose one element type for all with --dtype")
    return Source(model.directory, False, model, reader, stated, {})


def convert(
    source: Source,
    target: Path,
    *,
    to_megatron: bool,
    sizes: ParallelSizes,
    naming: str = "local",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: Verify | None = None,
) -> None:
    """Write `source` to the new directory `target`. sizes, naming: of a Megatron target; shard_bytes: of a Hugging Face target."""
    chosen, dtype = dtype, dtype or source.dtype
    if dtype not in DTYPES.values():
        raise UserError(f"--dtype {dtype} is not known; expected one of {', '.join(DTYPES.values())}")
    if to_megatron:
        check_divisible(source.model.dims, sizes)
    with new_directory(target) as directory:
        copy_small_files(source.model.directory, directory / "huggingface" if to_megatron else directory, chosen)
        if to_megatron:
            _write_megatron(source, directory, sizes, naming, dtype)
        else:
            _write_hugging_face(source, directory, dtype, shard_bytes)
        if verify is not None:
            verify(*((source.directory, directory) if to_megatron else (directory, source.directory)), getattr(torch, dtype))


def _write_hugging_face(source: Source, directory: Path, dtype: str, shard_bytes: int) -> None:
    metas = [TensorMeta(name, dtype, shape) for name, shape in source.model.tensor_shapes.items()]
    write_weights(directory, metas, lambda shard: _whole(source.reader, shard), shard_bytes)
    with ThreadPoolExecutor(1) as beside:  # the disk works while the processor proves
        synced = beside.submit(sync_files, directory)
        _prove(source, TensorReader(read_model(directory)), metas)
        synced.result()


def _write_megatron(source: Source, directory: Path, sizes: ParallelSizes, naming: str, dtype: str) -> None:
    model = source.model
    metas = [TensorMeta(name, dtype, shape) for name, shape in model.tensor_shapes.items()]
    (directory / "model").mkdir()
    files = {}
    for rank, layout in replica_layouts(model.architecture, model.dims, sizes, naming).items():
        file = rank_file(directory, "model", rank)
        shapes = layout.parameter_shapes
        with TensorFileWriter(file, [TensorMeta(name, dtype, shape) for name, shape in shapes.items()]) as writer:
            for name, parameter in assemble(layout, source.reader, dict.fromkeys(shapes, getattr(torch, dtype))):
                writer.write(name, parameter)
            files[str(file.relative_to(directory))] = writer.close().sha256
    manifest = Manifest(model.architecture, dtype, naming, sizes, {})
    with ThreadPoolExecutor(1) as beside:
        synced = beside.submit(sync_files, directory)
        hashes = _prove(source, MegatronReader(directory, manifest, model), metas)
        synced.result()
    write_manifest(directory, replace(manifest, tensors=hashes), files)


def hash_tensors(reader: Reader, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Hugging Face tensor → SHA-256 of its bytes in the meta's dtype."""
    return _hash(_whole(reader, metas))


def _hash(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Two tensors are hashed while the next one is read."""
    digests: dict[str, Future[str]] = {}
    waiting: deque[Future[str]] = deque()
    with ThreadPoolExecutor(2) as beside:
        for name, tensor in tensors:
            if len(waiting) == 2:
                waiting.popleft().result()  # memory holds two tensors that wait, at most
            digests[name] = beside.submit(lambda tensor: hashlib.sha256(raw_bytes(tensor)).hexdigest(), tensor)
            waiting.append(digests[name])
        return {name: digest.result() for name, digest in digests.items()}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the bytes are; eight at a time where they are aligned, since torch compares element by element."""
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    wide = torch.uint8 if any(t.storage_offset() % 8 or len(t) % 8 for t in (a, b)) else torch.int64
    return torch.equal(a.view(wide), b.view(wide))


def _whole(reader: Reader, metas: Sequence[TensorMeta]) -> Iterator[tuple[str, torch.Tensor]]:
    for meta in metas:
        for name, _, tensor in reader.read([(meta.name, tuple((0, n) for n in meta.shape))]):
            yield name, tensor.to(getattr(torch, meta.dtype))


def _prove(source: Source, written: Reader, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Compare what was written with the source, byte by byte, and with the hashes that the source states; returns tensor → SHA-256."""

    def compared() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _whole(source.reader, metas):
            for _, box, found in written.read([(name, box) for box in written.homes(name)]):
                if not _same(tensor[tuple(slice(*edge) for edge in box)], found):
                    raise UserError(f"{name} reads back differently from what was written: this machine's disk or memory is at fault")
            yield name, tensor

    hashes = _hash(compared())
    if source.hashes.keys() - hashes.keys() or (source.megatron and hashes.keys() - source.hashes.keys()):
        raise UserError(f"{source.directory}: the manifest lists other tensors than a {source.model.architecture} has; it was changed")
    if metas[0].dtype == source.dtype:
        for name, digest in source.hashes.items():
            if hashes[name] != digest:
                raise UserError(f"{source.directory}: {name} is not the tensor that the manifest states; the checkpoint cannot be trusted")
    return hashes
