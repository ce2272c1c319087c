"""The pool's workloads under a GPU's rules: code that works on the CPU by luck alone fails here."""

import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def numpy_needs_host_copies():
    """Let test code make a NumPy array of a tensor only after `cpu()`, as if all other tensors were on a GPU."""
    real_cpu, real_numpy = torch.Tensor.cpu, torch.Tensor.numpy

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copy = real_cpu(tensor).view_as(tensor)
        copy.is_host_copy = True
        return copy

    def numpy(tensor: torch.Tensor):
        if "/tests/" in sys._getframe(1).f_code.co_filename and not hasattr(tensor, "is_host_copy"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return real_numpy(tensor)

    torch.Tensor.cpu, torch.Tensor.numpy = cpu, numpy
    try:
        yield
    finally:
        torch.Tensor.cpu, torch.Tensor.numpy = real_cpu, real_numpy


def as_on_a_gpu(rank: int, meeting: str, workload: Callable, *arguments):
    with numpy_needs_host_copies():
        return workload(rank, meeting, *arguments)


def host_waits(rank: int, meeting: str, settings, batch, samples: list[int]) -> Counter:
    """Count the operations in forward and backward of one micro-batch at which the host would wait for a GPU: `file:function` → times."""
    from tests.parallel.workloads import _trainer

    with _trainer(rank, meeting, settings) as trainer:
        scores = trainer.updater.prepare(batch)[0]
        waits = _Waits()
        with waits, waits.methods():
            trainer.updater.accumulate_gradients(batch, np.array(samples), scores)
        return waits.found


def fp8_copies(rank: int, meeting: str, settings, batch) -> dict[str, tuple[int, int]]:
    """Return how many modules of (the model, the reference) keep a copy of their weights in a step's passes, and after an offload.

    Transformer Engine needs a GPU: here each module that holds a matrix makes such a copy in its forward pass.
    """
    from tests.parallel.workloads import _trainer

    def keep_copy(module, inputs) -> None:
        module._fp8_workspaces["weight"] = module.weight.detach().to(torch.float8_e4m3fn)

    with _trainer(rank, meeting, settings) as trainer:
        models = trainer.model, trainer.reference
        multiplying = [[module for name, module in model.named_modules() if ".linear_" in name] for model in models]
        for module in (*multiplying[0], *multiplying[1]):
            module._fp8_workspaces = {}
            module.register_forward_pre_hook(keep_copy)

        def copies() -> tuple[int, int]:
            return tuple(sum(len(module._fp8_workspaces) for module in modules) for modules in multiplying)

        found = {"modules": tuple(map(len, multiplying))}
        trainer.update(batch, 0)
        found["after a step"] = copies()
        trainer.offload("weights")
        found["parked"] = copies()
        trainer.reload()
        trainer.update(batch, 1)
        found["after another"] = copies()
        return found


class _Waits(TorchDispatchMode):
    """Counts operations whose result the host needs: a number, or a count of elements."""

    _OPERATORS: ClassVar = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal}
    _INDEXED: ClassVar = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
    _METHODS = ("tolist", "cpu", "new_tensor")

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        packet = function.overloadpacket
        by_mask = packet in self._INDEXED and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if packet in self._OPERATORS or by_mask:
            self._count()
        return function(*arguments, **keywords or {})

    @contextmanager
    def methods(self):
        """Count calls that are no dispatched operation on the CPU: reading a tensor, making one from host numbers, synchronizing."""
        real = {name: getattr(torch.Tensor, name) for name in self._METHODS}
        synchronize = torch.cuda.synchronize
        for name, method in real.items():
            setattr(torch.Tensor, name, self._counting(method))
        torch.cuda.synchronize = self._counting(lambda *_: None)
        try:
            yield
        finally:
            torch.cuda.synchronize = synchronize
            for name, method in real.items():
                setattr(torch.Tensor, name, method)

    def _counting(self, function: Callable) -> Callable:
        def call(*arguments, **keywords):
            self._count()
            return function(*arguments, **keywords)

        return call

    def _count(self) -> None:
        """Count it under the nearest function of this project or of Megatron-Core."""
        for frame in reversed(traceback.extract_stack()):
            for package in ("/megatron_aspo/", "/megatron/core/"):
                if package in frame.filename:
                    self.found[f"{frame.filename.rpartition(package)[2]}:{frame.name}"] += 1
                    return
