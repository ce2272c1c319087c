"""Converts between Hugging Face directories, our Megatron checkpoints at any layout, and Megatron-Core's `torch_dist`: the whole model,
verified, or nothing.

Every element is accounted for before the first byte is written. The written files are read back, and each Hugging Face tensor's SHA-256 is
compared with the source's, before the directory gets its name. Memory holds one tensor of each side at a time.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_aspo.checkpoint.manifest import Manifest, is_checkpoint, open_manifest, write_manifest
from megatron_aspo.checkpoint.megatron_files import MegatronReader, rank_file
from megatron_aspo.checkpoint.proof import compare, in_bands
from megatron_aspo.checkpoint.torch_dist import HASHES, TorchDistReader, read_hashes, write_torch_dist
from megatron_aspo.common.atomic import new_directory, sync_files
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.model_directory import find_torch_dist, resolve_model
from megatron_aspo.hf.small_files import copy_small_files, stated_dtype
from megatron_aspo.hf.tensor_file import TensorFileWriter
from megatron_aspo.hf.tensor_files import DTYPES, Reader, TensorReader
from megatron_aspo.hf.tensor_meta import TensorMeta, torch_dtype
from megatron_aspo.hf.transfer import in_parts
from megatron_aspo.hf.writer import SHARD_BYTES, write_weights
from megatron_aspo.weights.families import replica_layouts
from megatron_aspo.weights.layout import ParallelSizes, check_divisible

FORMATS = ("huggingface", "megatron", "torch_dist")
"""Formats that can be converted into each other: a Hugging Face directory, our checkpoint, Megatron-Core's distributed checkpoint."""


@dataclass(frozen=True)
class Source:
    """A checked model to convert."""

    directory: Path
    format: str
    """One of FORMATS."""
    model: HFModel
    reader: Reader
    dtype: str
    """Element type of its tensors."""
    hashes: dict[str, str]
    """Tensor → SHA-256, if the source states them."""
    check_files: Callable[[], None] = lambda: None
    """Waits for the concurrent check of the source's files; raises UserError naming a damaged one."""


Verify = Callable[[Path, Source, torch.dtype], None]
"""Takes a Hugging Face directory, a source of another format and the dtype of both; raises UserError when their logits differ."""


def open_source(path: str | Path, dtype: str | None = None, config_from: str | Path | None = None) -> Source:
    """Check and open a model directory, hub name or checkpoint. dtype: element type of the target; None keeps the source's.

    config_from: model directory or hub name whose config and tokenizer describe a `torch_dist` checkpoint; None: those beside its tensors.
    Raises UserError naming a tensor or file that is missing, unknown, damaged, of another shape or element type, or a setting that the
    family does not support.
    """
    asked, path = path, Path(path).expanduser()
    if (torch_dist := find_torch_dist(path)) is not None:
        return _open_torch_dist(torch_dist, dtype, config_from)
    if config_from is not None:
        raise UserError(f"--config-from is about a torch_dist source, but {asked} is none; leave it out")
    if is_checkpoint(path):
        manifest, check_files = open_manifest(path)
        with _damage_first(check_files):
            model = read_model(path / "huggingface")
            reader = MegatronReader(path, manifest, model)
        return Source(path, "megatron", model, reader, manifest.dtype, manifest.tensors, check_files)
    model = read_model(resolve_model(asked))  # as given: a Path drops the "./" that tells a directory from a name on the hub
    reader = TensorReader.checked(model)
    stated = stated_dtype(model.directory) or next(iter(reader.dtypes.values()))
    _check_one_dtype(model.directory, reader, stated, dtype)
    return Source(model.directory, "huggingface", model, reader, stated, {})


def _open_torch_dist(directory: Path, dtype: str | None, config_from: str | Path | None) -> Source:
    beside = directory / "huggingface"
    if config_from is None and not beside.is_dir():
        raise UserError(f"{directory} has no config and tokenizer; name a model directory or hub name that has them with --config-from")
    model = read_model(beside if config_from is None else resolve_model(config_from))
    reader = TorchDistReader(directory, model)
    stored = next(iter(reader.dtypes.values()))
    _check_one_dtype(directory, reader, stored, dtype)
    return Source(directory, "torch_dist", model, reader, stored, read_hashes(directory))


def _check_one_dtype(directory: Path, reader: TensorReader | TorchDistReader, stated: str, chosen: str | None) -> None:
    for name, stored in reader.dtypes.items():
        if stored != stated and chosen is None:
            raise UserError(f"{directory}: {name} is {stored}, the model {stated}; choose one element type for all with --dtype")


def convert(
    source: Source,
    target: Path,
    *,
    to: str,
    sizes: ParallelSizes = ParallelSizes(),  # noqa: B008 (frozen)
    naming: str = "local",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: Verify | None = None,
) -> None:
    """Write `source` to the new directory `target`, in the format `to`.

    sizes: for `megatron`; naming: for `megatron` and `torch_dist`; shard_bytes: for `huggingface`.
    """
    chosen, dtype = dtype, dtype or source.dtype
    if dtype not in DTYPES.values():
        raise UserError(f"--dtype {dtype} is not known; expected one of {', '.join(DTYPES.values())}")
    if to == "megatron":
        check_divisible(source.model.dims, sizes)
    # torch_dist keeps the small files beside its tensors
    small = {"huggingface": ".", "megatron": "huggingface", "torch_dist": "release/huggingface"}[to]
    with new_directory(target) as directory, _damage_first(source.check_files):
        if to == "torch_dist":
            _write_torch_dist(source, directory, naming, dtype)
        copy_small_files(source.model.directory, directory / small, chosen)
        if to == "megatron":
            _write_megatron(source, directory, sizes, naming, dtype)
        elif to == "huggingface":
            _write_hugging_face(source, directory, dtype, shard_bytes)
        if verify is not None:
            pair = (directory, source) if to == "huggingface" else (source.directory, open_source(directory))
            verify(*pair, torch_dtype(dtype))
        source.check_files()


@contextmanager
def _damage_first(check_files: Callable[[], None]) -> Iterator[None]:
    """Report damaged files instead of the errors that they cause."""
    try:
        yield
    except Exception:
        check_files()
        raise


def _write_hugging_face(source: Source, directory: Path, dtype: str, shard_bytes: int) -> None:
    metas = [TensorMeta(name, dtype, shape) for name, shape in source.model.tensor_shapes.items()]
    write_weights(directory, metas, lambda shard: in_bands(source.reader, shard), shard_bytes)
    with ThreadPoolExecutor(1) as beside:  # the disk syncs while the processor verifies
        synced = beside.submit(sync_files, directory)
        _verify_written(source, TensorReader(read_model(directory)), metas)
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
            for name, parts in in_parts(layout, source.reader, dict.fromkeys(shapes, torch_dtype(dtype))):
                writer.write(name, *parts)
            files[str(file.relative_to(directory))] = writer.close().sha256
    manifest = Manifest(model.architecture, dtype, naming, sizes, {})
    with ThreadPoolExecutor(1) as beside:
        synced = beside.submit(sync_files, directory)
        hashes = _verify_written(source, MegatronReader(directory, manifest, model), metas)
        synced.result()
    write_manifest(directory, replace(manifest, tensors=hashes), files)


def _write_torch_dist(source: Source, directory: Path, naming: str, dtype: str) -> None:
    model = source.model
    metas = [TensorMeta(name, dtype, shape) for name, shape in model.tensor_shapes.items()]
    written = write_torch_dist(directory, model, source.reader, dtype, naming)
    with ThreadPoolExecutor(1) as beside:
        synced = beside.submit(sync_files, directory)
        hashes = _verify_written(source, TorchDistReader(written, model), metas)
        synced.result()
    (written / HASHES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def _verify_written(source: Source, written: Reader, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Check that the written tensors equal the source's byte by byte, and the source's its hashes; return tensor → SHA-256."""
    hashes = compare(source.reader, written, metas)
    if source.hashes.keys() - hashes.keys() or (source.hashes and hashes.keys() - source.hashes.keys()):
        raise UserError(f"{source.directory}: the manifest lists other tensors than a {source.model.architecture} has; it was changed")
    if metas[0].dtype == source.dtype:
        for name, digest in source.hashes.items():
            if hashes[name] != digest:
                raise UserError(f"{source.directory}: {name} is not the tensor that the manifest states; the checkpoint cannot be trusted")
    return hashes
