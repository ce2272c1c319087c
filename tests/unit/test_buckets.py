import pytest
import torch

from megatron_aspo.weights.buckets import TensorMeta, meta_of, pack, packed_bytes, plan_buckets, unpack

METAS = [
    TensorMeta("a", "float32", (3, 5)),
    TensorMeta("b", "uint8", (7,)),
    TensorMeta("c", "float64", ()),
    TensorMeta("d", "bfloat16", (1, 3)),
    TensorMeta("e", "float32", (0, 4)),
    TensorMeta("f", "int64", (2,)),
]


def test_bytes_are_elements_times_element_size():
    assert [meta.nbytes for meta in METAS] == [60, 7, 8, 6, 0, 16]


def test_every_tensor_comes_back_bit_for_bit_whatever_stands_before_it():
    torch.manual_seed(0)
    tensors = [torch.randint(0, 255, meta.shape).to(getattr(torch, meta.dtype)) for meta in METAS]
    tensors[0] = torch.randn(5, 3).T  # not contiguous
    assert [meta_of(meta.name, tensor) for meta, tensor in zip(METAS, tensors, strict=True)] == METAS
    buffer = pack(tensors)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (packed_bytes(METAS),)
    for meta, tensor, (name, received) in zip(METAS, tensors, unpack(buffer, METAS), strict=True):
        assert (name, received.dtype, received.shape) == (meta.name, tensor.dtype, tensor.shape)
        assert torch.equal(received, tensor)


def test_unpacked_tensors_are_views_of_the_buffer():
    buffer = pack([torch.zeros(3), torch.zeros(2)])
    (_, first), (_, second) = unpack(buffer, [TensorMeta("x", "float32", (3,)), TensorMeta("y", "float32", (2,))])
    buffer.fill_(1)
    assert first.view(torch.uint8).eq(1).all()
    assert second.view(torch.uint8).eq(1).all()


def test_buckets_keep_the_order_and_the_bound():
    metas = [TensorMeta(str(number), "uint8", (size,)) for number, size in enumerate([16, 16, 33, 100, 1, 15, 16])]
    buckets = plan_buckets(metas, 48)
    # Packed sizes: 16 16 48 112 16 16 16.
    assert [[meta.name for meta in bucket] for bucket in buckets] == [["0", "1"], ["2"], ["3"], ["4", "5", "6"]]
    assert [packed_bytes(bucket) for bucket in buckets] == [32, 48, 112, 48]


def test_no_tensors_need_no_bucket():
    assert plan_buckets([], 1) == []


def test_what_cannot_be_planned_or_unpacked_is_refused():
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        plan_buckets(METAS, 0)
    with pytest.raises(ValueError, match="'a' appears twice"):
        plan_buckets([METAS[0], METAS[0]], 100)
    with pytest.raises(ValueError, match="these tensors need uint8"):
        unpack(torch.zeros(8, dtype=torch.uint8), METAS)
    with pytest.raises(ValueError, match="'float99' is not an element type"):
        _ = TensorMeta("x", "float99", (1,)).nbytes
