"""The safetensors writer: the safetensors library reads the given tensors, and nothing else can be written."""

import hashlib
import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from megatron_aspo.hf.tensor_file import TensorFileWriter, raw_bytes
from megatron_aspo.hf.tensor_meta import TensorMeta, meta_of
from tests.unit.hf_shards import assert_same, random_bits, read_tensors

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
"""Widest first where their order matters: every tensor starts at a multiple of its element size."""

METAS = [TensorMeta("a", "float32", (2, 3)), TensorMeta("b", "bfloat16", (4,))]
A, B = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    with TensorFileWriter(path, [meta_of(name, tensor) for name, tensor in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.close()


@settings(max_examples=150, deadline=None)
@given(
    asked=st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=8),
    metadata=st.none() | st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_the_safetensors_library_reads_the_given_tensors_and_the_hash_is_the_files(asked, metadata, seed):
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(asked.items(), key=lambda item: -item[1][0].itemsize)
    tensors = {name: random_bits(shape, dtype, generator) for name, (dtype, shape) in ordered}
    with tempfile.TemporaryDirectory() as room:
        file = Path(room, "t.safetensors")
        record = write(file, tensors, metadata)
        content = file.read_bytes()
        assert (record.sha256, record.nbytes) == (hashlib.sha256(content).hexdigest(), len(content))
        assert_same(read_tensors(Path(room)), tensors)
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"} | (metadata or {})
        assert int.from_bytes(content[:8], "little") % 8 == 0, "the tensors' bytes are not aligned"


def test_views_that_are_not_contiguous_are_written_in_row_major_order(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"turned": base.T, "columns": base[:, 1::2], "rows": base[::3], "expanded": torch.ones(1).expand(5), "grad": base + 0}
    tensors["grad"].requires_grad_()
    write(tmp_path / "t.safetensors", tensors)
    assert_same(read_tensors(tmp_path), {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def test_a_tensor_may_be_given_in_parts_from_top_to_bottom(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    with TensorFileWriter(tmp_path / "t.safetensors", [meta_of("whole", whole)]) as writer:
        writer.write("whole", whole[:1], whole[1:5], whole[5:])
        record = writer.close()
    assert_same(read_tensors(tmp_path), {"whole": whole})
    assert record.sha256 == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("parts", [(A[:1], A[:1], A[:1]), (A[:1],), (A[:1], A[1:].bfloat16())], ids=["more", "fewer", "dtype"])
def test_parts_that_are_not_the_tensor_announced_are_refused(tmp_path, parts):
    with TensorFileWriter(tmp_path / "t", METAS) as writer, pytest.raises(ValueError, match=r"^a .* was given where the header says"):
        writer.write("a", *parts)


def test_raw_bytes_of_a_contiguous_tensor_are_a_view():
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    view = raw_bytes(tensor)
    tensor[1] = 1.0
    assert bytes(view) == b"\x00\x00\x80\x3f\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "given",
    [
        [("b", B)],
        [("a", A.bfloat16())],
        [("a", A.T)],
        [("a", A.reshape(-1))],
        [("c", A)],
        [("a", A), ("a", A)],
        [("a", A), ("b", B), ("b", B)],
    ],
    ids=["order", "dtype", "transposed", "shape", "unknown", "twice", "beyond the end"],
)
def test_a_tensor_that_is_not_the_next_one_announced_is_refused_by_name(tmp_path, given):
    *right, (name, tensor) = given
    with TensorFileWriter(tmp_path / "t", METAS) as writer:
        for earlier in right:
            writer.write(*earlier)
        with pytest.raises(ValueError, match=f"^{name} .* was given where the header says"):
            writer.write(name, tensor)


@pytest.mark.parametrize("count", [0, 1])
def test_closing_without_all_tensors_is_refused_by_the_first_that_is_missing(tmp_path, count):
    with TensorFileWriter(tmp_path / "t", METAS) as writer:
        for name, tensor in [("a", A), ("b", B)][:count]:
            writer.write(name, tensor)
        with pytest.raises(ValueError, match=f"closed without {'ab'[count]}"):
            writer.close()


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "t").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "t", METAS)
    assert (tmp_path / "t").read_bytes() == b"kept"


def test_an_order_that_would_misalign_a_wider_element_type_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"wide \(float32\) would start at byte 2: put wider element types first"):
        TensorFileWriter(tmp_path / "t", [TensorMeta("narrow", "bfloat16", (1,)), TensorMeta("wide", "float32", (1,))])
    assert not (tmp_path / "t").exists()


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(bytes(memoryview(data)[:5]))

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Slow(path, mode.replace("b", "")))
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.arange(4).bfloat16()}
    record = write(tmp_path / "t.safetensors", tensors)
    monkeypatch.undo()
    assert_same(read_tensors(tmp_path), tensors)
    assert record.sha256 == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()


def test_leaving_early_closes_the_file(tmp_path):
    with pytest.raises(RuntimeError), TensorFileWriter(tmp_path / "t", METAS) as writer:
        raise RuntimeError
    with pytest.raises((ValueError, RuntimeError), match=r"closed file|after shutdown"):
        writer.write("a", A)


def test_the_header_is_json_with_offsets_that_leave_no_gap(tmp_path):
    write(tmp_path / "t", {"a": A, "b": B})
    content = (tmp_path / "t").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    assert len(content) == 8 + length + 32
