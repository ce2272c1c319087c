"""Shared GPU memory, as far as a machine without a GPU can tell."""

import pytest
import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.sync.segment import Segment, unshareable_allocator


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ""),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:False"}, ""),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ""),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}, "PYTORCH_ALLOC_CONF=expandable_segments: True"),
    ],
)
def test_allocators_that_cuda_ipc_cannot_share_are_found(environment, found):
    assert unshareable_allocator(environment) == found


def test_such_an_allocator_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(UserError, match=r"sending weights: with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True .* set placement=split"):
        Segment(1 << 20, "training rank 0, sending weights", torch.device("cuda"))
