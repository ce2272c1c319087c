"""Verifies tensors by hashes of whole tensors and by byte-wise comparison of two readers, without copies.

Each tensor is read in bands of whole rows, as it is stored, so that its bytes are read in order from the mapped file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.tensor_file import raw_bytes, sha256_of_parts
from megatron_aspo.hf.tensor_files import Reader
from megatron_aspo.hf.tensor_meta import TensorMeta
from megatron_aspo.weights.layout import Box, overlap, stacked

_AT_ONCE = 2
"""Tensors processed concurrently, each by one thread; an upper bound on those in memory."""


def in_bands(reader: Reader, metas: Sequence[TensorMeta]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each tensor, in the meta's dtype, as bands from top to bottom."""
    for meta in metas:
        yield meta.name, [_read(reader, meta, box) for box in _bands(reader, meta)]


def hash_tensors(reader: Reader, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Return Hugging Face tensor → SHA-256 of its bytes in the meta's dtype."""

    def digest(meta: TensorMeta) -> str:
        return sha256_of_parts(_read(reader, meta, box) for box in _bands(reader, meta))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip((meta.name for meta in metas), pool.map(digest, metas), strict=True))


def compare(source: Reader, written: Reader, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Return Hugging Face tensor → SHA-256 of `source`, as `hash_tensors` does. Raises UserError when `written` holds other bytes."""

    def digest(meta: TensorMeta) -> str:
        digest, homes = hashlib.sha256(), written.homes(meta.name)
        for band in _bands(source, meta):
            expected = _read(source, meta, band)
            digest.update(raw_bytes(expected))
            for shared in filter(None, (overlap(home, band) for home in homes)):
                inside = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(shared, band, strict=True))
                if not _same(expected[inside], _read(written, meta, shared)):
                    raise UserError(f"{meta.name} reads back differently from what was written: this machine's disk or memory is at fault")
        return digest.hexdigest()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip((meta.name for meta in metas), pool.map(digest, metas), strict=True))


def _bands(reader: Reader, meta: TensorMeta) -> list[Box]:
    return stacked(reader.homes(meta.name), meta.shape) or [tuple((0, extent) for extent in meta.shape)]


def _read(reader: Reader, meta: TensorMeta, box: Box) -> torch.Tensor:
    ((_, _, tensor),) = reader.read([(meta.name, box)])
    return tensor.to(getattr(torch, meta.dtype))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the bytes are equal, comparing eight at a time where aligned, since torch compares element by element."""
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    wide = torch.uint8 if any(t.storage_offset() % 8 or len(t) % 8 for t in (a, b)) else torch.int64
    return torch.equal(a.view(wide), b.view(wide))
