"""Writing a safetensors file one tensor at a time: memory holds a single tensor, and the file's SHA-256 is known when it is closed.

The safetensors library writes only complete files from memory. The format (https://huggingface.co/docs/safetensors): 8 bytes with the
header's length, the header in JSON, the tensors' bytes in the order of their offsets, with no gap.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_aspo.hf.tensor_meta import TensorMeta

_DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
}


_WRITE = 1 << 18
"""Bytes per write: few enough to stay in the cache between the page fault and the copy. A third faster than 4 MB."""


@dataclass(frozen=True)
class FileRecord:
    """The hash and the size of a written file."""

    sha256: str
    nbytes: int


class TensorFileWriter:
    """`write` the tensors of `metas` in order, then `close`. As a context manager it closes without a record on an exception."""

    def __init__(self, path: Path, metas: Sequence[TensorMeta], metadata: dict[str, str] | None = None, *, hashed: bool = True):
        """Create the file. Raises FileExistsError if it exists, ValueError when an offset would be misaligned for its element type."""
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"} | (metadata or {})}
        offset = 0
        for meta in metas:
            stop = offset + meta.nbytes
            if offset % _itemsize(meta):
                raise ValueError(f"{meta.name} ({meta.dtype}) would start at byte {offset}: put wider element types first")
            header[meta.name] = {"dtype": _DTYPE_CODES[meta.dtype], "shape": list(meta.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = iter(metas)
        self._digest = hashlib.sha256() if hashed else None
        self._hashing: Future[None] | None = None
        self._beside = ThreadPoolExecutor(1)
        self._nbytes = 0
        self._file = path.open("xb", buffering=0)
        self._append(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, *parts: torch.Tensor) -> None:
        """Write the next tensor, or its parts from top to bottom. Raises ValueError when it is not the next one in `metas`."""
        meta = next(self._expected, None)
        dtype = "/".join(sorted({str(part.dtype).removeprefix("torch.") for part in parts}))
        shape = tuple(parts[0].shape) if len(parts) == 1 else (sum(len(part) for part in parts), *parts[0].shape[1:])
        if meta is None or (name, dtype, shape) != (meta.name, meta.dtype, tuple(meta.shape)):
            raise ValueError(f"{name} {dtype} {shape} was given where the header says {meta}")
        for part in parts:
            self._append(raw_bytes(part))

    def close(self) -> FileRecord:
        """Hand the file to the disk. Raises ValueError when tensors are missing."""
        missing = next(self._expected, None)
        if missing is not None:
            raise ValueError(f"the file was closed without {missing.name}")
        self.__exit__()  # waits for the hash
        return FileRecord(self._digest.hexdigest() if self._digest else "", self._nbytes)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        self._beside.shutdown()

    def _append(self, data: bytes | memoryview) -> None:
        if self._hashing is not None:
            self._hashing.result()  # at most one piece lags behind
        if self._digest is not None:
            self._hashing = self._beside.submit(self._digest.update, data)
        self._nbytes += len(data)
        view = memoryview(data)
        while view:  # an unbuffered write may be partial
            view = view[self._file.write(view[:_WRITE]) :]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a CPU tensor, in order, as bytes; without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256_of_parts(parts: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the bytes of a tensor that is given in parts from top to bottom."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(raw_bytes(part))
    return digest.hexdigest()


def _itemsize(meta: TensorMeta) -> int:
    return getattr(torch, meta.dtype).itemsize
