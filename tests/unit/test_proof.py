"""The proof finds a difference in a single element, at any layout of the written model."""

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.proof import compare, hash_tensors, in_bands
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.tensor_file import raw_bytes
from megatron_aspo.hf.tensor_meta import meta_of
from megatron_aspo.weights.layout import ParallelSizes
from tests.unit.hf_shards import Model, read_tensors, write_model, write_tensors

CHANGED = ["model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.k_proj.bias"]
LAYOUTS = {"hugging_face": None, "tp2": ParallelSizes(tensor=2), "pp2": ParallelSizes(pipeline=2)}


def convert_and_open(source: Path, target: Path, sizes: ParallelSizes | None):
    """Return the reader of a model written at a layout."""
    if sizes is None:
        return open_source(source).reader
    convert(open_source(source), target, to="megatron", sizes=sizes)
    return open_source(target).reader


@pytest.mark.parametrize("a", LAYOUTS)
@pytest.mark.parametrize("b", LAYOUTS)
@pytest.mark.parametrize(
    "changed", [None, "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.k_proj.bias"]
)
def test_one_element_that_differs_is_found_and_named(tmp_path, a, b, changed):
    tensors = write_model(tmp_path / "a", Model())
    write_model(tmp_path / "b", Model())
    others = {name: tensor.clone() for name, tensor in read_tensors(tmp_path / "a").items()}
    if changed:
        last = others[changed].reshape(-1).view(torch.int16)
        last[-1] ^= 1
    write_tensors(tmp_path / "b", others, 1)
    metas = [meta_of(name, tensor) for name, tensor in tensors.items()]
    source = convert_and_open(tmp_path / "a", tmp_path / "at_a", LAYOUTS[a])
    written = convert_and_open(tmp_path / "b", tmp_path / "at_b", LAYOUTS[b])
    if changed:
        with pytest.raises(UserError, match=f"{changed} reads back differently"):
            compare(source, written, metas)
    else:
        truth = {name: hashlib.sha256(raw_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
        assert compare(source, written, metas) == hash_tensors(source, metas) == hash_tensors(written, metas) == truth
        assert all(raw_bytes(torch.cat(bands)) == raw_bytes(tensors[name]) for name, bands in in_bands(written, metas))
