"""Tensors at home in host memory, on a device of the CPU's own."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.offload import HostMemory

CPU = Device(torch.device("cpu"), "gloo")


@pytest.mark.parametrize("constant", [False, True])
def test_tensors_are_elsewhere_in_use_and_nowhere_else_after_it(constant):
    tensor = torch.tensor([[0.0, 1, 2], [3, 4, 5]])
    before = StorageWeakRef(tensor.untyped_storage())
    memory = HostMemory([tensor], CPU, constant=constant)
    home = tensor.data_ptr()
    assert before.expired() and torch.equal(tensor, torch.arange(6.0).view(2, 3))
    for _ in range(2):
        with memory:
            used = StorageWeakRef(tensor.untyped_storage())
            assert tensor.data_ptr() != home and torch.equal(tensor, torch.arange(6.0).view(2, 3))
        assert used.expired() and tensor.data_ptr() == home and torch.equal(tensor, torch.arange(6.0).view(2, 3))


def test_changes_count_in_both_places():
    tensor = torch.zeros(4)
    memory = HostMemory([tensor], CPU)
    tensor.add_(1)
    with memory:
        assert tensor.tolist() == [1] * 4
        tensor.mul_(3)
    assert tensor.tolist() == [3] * 4
    view = tensor.view(2, 2)
    view[0, 0] = 7
    with memory:
        assert tensor.tolist() == [7, 3, 3, 3]


def test_constant_tensors_are_not_copied_back():
    tensor = torch.zeros(2)
    memory = HostMemory([tensor], CPU, constant=True)
    with memory:
        tensor.add_(1)
    assert tensor.tolist() == [0, 0]


def test_they_come_home_from_a_use_that_fails():
    tensor = torch.zeros(2)
    memory = HostMemory([tensor], CPU)
    home = tensor.data_ptr()
    with pytest.raises(RuntimeError, match="stopped"), memory:
        tensor.add_(1)
        raise RuntimeError("stopped")
    assert tensor.data_ptr() == home and tensor.tolist() == [1, 1]
