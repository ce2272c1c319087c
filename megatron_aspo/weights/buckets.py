"""Tensors in bounded buckets of bytes.

Sender and receiver hold the same list of `TensorMeta` and derive the same buckets, and the same offsets inside each, from it alone: a
transfer needs no handshake beyond that list. Planning is pure; packing and unpacking touch only the tensors they are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 16
"""Every tensor starts at a multiple of this many bytes, so that a view of any element type is aligned whatever came before it."""


@dataclass(frozen=True)
class TensorMeta:
    """Name, element type and shape of one tensor."""

    name: str
    dtype: str
    """A torch element type without its prefix, such as `float32` or `bfloat16`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without alignment."""
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> torch.dtype:
    """The torch element type called `name`; ValueError when there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not an element type of torch; expected a name such as 'float32' or 'bfloat16'")
    return dtype


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    """The meta of a tensor at hand."""
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def plan_buckets(metas: Sequence[TensorMeta], bucket_bytes: int) -> list[list[TensorMeta]]:
    """Split `metas`, in their order, into consecutive buckets of at most `bucket_bytes` packed bytes each.

    A tensor larger than the bound is a bucket of its own. Raises ValueError for a bound below 1 or a name that appears twice.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    names = [meta.name for meta in metas]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice!r} appears twice in one transfer")
    buckets: list[list[TensorMeta]] = []
    filled = 0
    for meta in metas:
        size = _padded(meta.nbytes)
        if not buckets or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(meta)
        filled += size
    return buckets


def packed_bytes(metas: Sequence[TensorMeta]) -> int:
    """Bytes of the buffer that holds these tensors, alignment included."""
    return sum(_padded(meta.nbytes) for meta in metas)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [packed bytes] holding a copy of every tensor in order, on their device. The padding is zero.

    Raises ValueError when the tensors lie on more than one device.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors of one bucket lie on several devices: {sorted(map(str, devices))}")
    total = sum(_padded(tensor.numel() * tensor.element_size()) for tensor in tensors)
    buffer = torch.zeros(total, dtype=torch.uint8, device=next(iter(devices), torch.device("cpu")))
    offset = 0
    for tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[offset : offset + data.numel()].copy_(data)
        offset += _padded(data.numel())
    return buffer


def unpack(buffer: torch.Tensor, metas: Sequence[TensorMeta]) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) for every meta; each tensor is a view into `buffer`, a uint8 [packed bytes].

    Raises ValueError when the buffer is not exactly the packed size of `metas`.
    """
    expected = packed_bytes(metas)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() != expected:
        raise ValueError(f"the buffer is {buffer.dtype} {list(buffer.shape)}; these tensors need uint8 [{expected}]")
    named = []
    offset = 0
    for meta in metas:
        data = buffer[offset : offset + meta.nbytes]
        named.append((meta.name, data.view(torch_dtype(meta.dtype)).view(meta.shape)))
        offset += _padded(meta.nbytes)
    return named


def _padded(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
