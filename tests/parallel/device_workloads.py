"""The pool's workloads as a GPU would have them: what works on the CPU by luck alone fails here."""

import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch


@contextmanager
def arrays_of_host_copies_only():
    """Code of the tests gets a NumPy array of a tensor only after `cpu()`, as if all other tensors were on a GPU."""
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
    with arrays_of_host_copies_only():
        return workload(rank, meeting, *arguments)
