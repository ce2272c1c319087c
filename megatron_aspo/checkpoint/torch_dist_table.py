"""Reads the table of a `torch_dist` directory, `.metadata`, with its tensors and the files of their shards, without running its code.

The file is a pickle, which may call anything. This reader allows it to build the records of torch.distributed.checkpoint and nothing else.
"""

import dataclasses
import enum
import importlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.weights.layout import Box

_RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.planner")
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True)
class Shard:
    """One stored box of a tensor."""

    box: Box
    file: Path
    offset: int
    """Bytes before the shard in the file."""
    length: int
    """Bytes of the shard, a tensor as torch.save writes it."""

    def read(self) -> torch.Tensor:
        """Return the shard's tensor. Raises UserError when the file is incomplete or damaged."""
        try:
            with self.file.open("rb", buffering=0) as file:
                window = _Window(file, self.offset, self.length)
                # torch declares IO[bytes], and uses of it only what every raw file has.
                tensor = torch.load(window, map_location="cpu", weights_only=True)  # pyright: ignore[reportArgumentType]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.file} cannot be read ({one_line(error)}); the file is damaged or incomplete, copy it again") from error
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != tuple(stop - start for start, stop in self.box):
            raise UserError(f"{self.file} holds something else at byte {self.offset} than .metadata says; copy the checkpoint again")
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the table with its shards."""

    shape: tuple[int, ...]
    dtype: str
    """torch's name of the element type."""
    shards: tuple[Shard, ...]


def read_table(directory: Path) -> dict[str, StoredTensor]:
    """Return key → tensor for all tensors of the directory. Raises UserError for a table that is damaged or refers to other code."""
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _TableUnpickler(file).load()
        stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if not hasattr(tensor, "chunks"):
                continue  # an object that is not a tensor
            shards = []
            for chunk in tensor.chunks:
                info = stored[key, tuple(chunk.offsets)]
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"{info.relative_path} lies outside the directory")
                if getattr(info, "transform_descriptors", None):
                    raise ValueError(f"{key} is stored with {info.transform_descriptors}")
                box = tuple((start, start + extent) for start, extent in zip(chunk.offsets, chunk.sizes, strict=True))
                shards.append(Shard(box, directory / info.relative_path, info.offset, info.length))
            tensors[key] = StoredTensor(tuple(tensor.size), str(tensor.properties.dtype).removeprefix("torch."), tuple(shards))
        return tensors
    except Exception as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); it is damaged, or of another kind of checkpoint") from error


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file. torch.load reads from it directly into the tensor, without another copy."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _RECORDS:
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and found.__module__ == module and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a table of tensors")
