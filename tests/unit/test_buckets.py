import pytest
import torch

from megatron_aspo.hf.tensor_meta import TensorMeta, meta_of, plan_buckets

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


def test_the_meta_of_a_tensor_describes_it():
    for meta in METAS:
        assert meta_of(meta.name, torch.zeros(meta.shape, dtype=getattr(torch, meta.dtype))) == meta


def test_buckets_keep_the_order_and_the_bound():
    metas = [TensorMeta(str(number), "uint8", (size,)) for number, size in enumerate([16, 16, 33, 100, 1, 15, 16])]
    assert [[meta.name for meta in bucket] for bucket in plan_buckets(metas, 48)] == [["0", "1"], ["2"], ["3"], ["4", "5", "6"]]


def test_no_tensors_need_no_bucket():
    assert plan_buckets([], 1) == []


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        plan_buckets(METAS, 0)
    with pytest.raises(ValueError, match="'a' appears twice"):
        plan_buckets([METAS[0], METAS[0]], 100)
    with pytest.raises(ValueError, match="'float99' is not an element type"):
        _ = TensorMeta("x", "float99", (1,)).nbytes
