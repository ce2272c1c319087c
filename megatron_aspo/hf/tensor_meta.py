"""Names, types and shapes of tensors, and their division into buckets of bounded size, such as the files of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorMeta:
    """Name, element type and shape of one tensor."""

    name: str
    dtype: str
    """A torch element type without its prefix, such as `float32` or `bfloat16`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch element type called `name`. Raises ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not an element type of torch; expected a name such as 'float32' or 'bfloat16'")
    return dtype


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Return the meta of a tensor."""
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def plan_buckets(metas: Sequence[TensorMeta], bucket_bytes: int) -> list[list[TensorMeta]]:
    """Divide `metas`, in order, into consecutive buckets of at most `bucket_bytes` each.

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
        size = meta.nbytes
        if not buckets or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(meta)
        filled += size
    return buckets
