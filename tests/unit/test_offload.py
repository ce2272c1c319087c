"""Tensors at home in host memory, on the CPU and on a CPU that passes for a GPU."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.host_blocks import HostBlocks, pinned_bytes
from megatron_aspo.trainer.offload import HostMemory, OffloadedStorage

CPU = Device(torch.device("cpu"), "gloo")


@dataclass(frozen=True)
class RecordingDevice(Device):
    """Takes the paths of CUDA on the CPU, and notes what it is called for and what `watched` tensors occupy then."""

    watched: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    is_cuda = True

    def empty_host(self, nbytes: int) -> torch.Tensor:
        self.calls.append(("empty_host", nbytes))
        return torch.empty(nbytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def release_cached_memory(self) -> None:
        self.calls.append(("release", sum(tensor.untyped_storage().nbytes() for tensor in self.watched)))


@pytest.fixture
def gpu() -> RecordingDevice:
    return RecordingDevice(torch.device("cpu"), "nccl")


def test_offloaded_memory_is_returned_to_the_driver(gpu):
    """Copied and waited for, then freed, then out of torch's cache: in this order nothing is lost and another process gets the memory."""
    kept, scratch = torch.arange(1000.0), torch.ones(500)
    gpu.watched.extend([kept, scratch])
    storage = OffloadedStorage([kept, kept[3:]], [scratch], gpu)
    storage.offload()
    assert gpu.calls == [("empty_host", 256 << 20), "synchronize", ("release", 0)]
    storage.offload()
    assert len(gpu.calls) == 3
    storage.reload()
    assert gpu.calls[3:] == ["synchronize"]
    assert torch.equal(kept, torch.arange(1000.0)) and torch.equal(scratch, torch.zeros(500))


def test_tensors_move_one_by_one_as_they_are_made(gpu):
    """No two of them are on the device at one time."""
    made: list[StorageWeakRef] = []

    def tensors():
        for number in range(4):
            assert all(storage.expired() for storage in made)
            tensor = torch.full((7,), float(number))
            made.append(StorageWeakRef(tensor.untyped_storage()))
            yield tensor

    moved = []
    HostMemory((moved.append(tensor) or tensor for tensor in tensors()), gpu)
    assert [tensor.tolist() for tensor in moved] == [[number] * 7 for number in range(4)]
    assert gpu.calls == [("empty_host", 256 << 20), "synchronize"]


def test_tensors_of_pinned_blocks_keep_their_values_apart(gpu):
    tensors = [torch.arange(5.0).bfloat16(), torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.arange(9)]
    expected = [tensor.clone() for tensor in tensors]
    memory = HostMemory(tensors, gpu)
    with memory:
        for tensor in tensors:
            tensor.add_(1)
    assert all(torch.equal(tensor, before + 1) for tensor, before in zip(tensors, expected, strict=True))
    assert all(tensor.dtype == before.dtype and tensor.shape == before.shape for tensor, before in zip(tensors, expected, strict=True))


def test_pinned_blocks_lose_little_to_powers_of_two():
    """Adam's state of Qwen2.5-1.5B: torch rounds each allocation up, by a quarter of all tensor by tensor."""
    hidden, ffn, vocab, layers = 1536, 8960, 151_936, 28
    layer = [hidden * 2048, 2048, hidden * hidden, 2 * ffn * hidden, ffn * hidden, hidden, hidden]
    sizes = [4 * count for count in [vocab * hidden, *layer * layers] for _ in range(3)]
    by_tensor = sum(1 << (nbytes - 1).bit_length() for nbytes in sizes)
    assert by_tensor > 1.23 * sum(sizes) and pinned_bytes(sizes) < 1.08 * sum(sizes)
    blocks, taken = HostBlocks(), {}
    for nbytes in sizes:
        block, offset = blocks.place(nbytes)
        assert offset % 512 == 0 and offset + nbytes <= blocks.sizes[block] and offset >= taken.get(block, 0)
        taken[block] = offset + nbytes
    assert all(size & (size - 1) == 0 for size in blocks.sizes)


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
