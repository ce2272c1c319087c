"""Model directories that are wrong are refused before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aspo.errors import UserError
from megatron_aspo.weights.hf_files import TensorReader
from megatron_aspo.weights.hf_model import read_model
from tests.models import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny("qwen2", directory, tied=False, vocab_size=64)
    return directory


@pytest.fixture
def model(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_box_is_read_as_the_slice_of_the_tensor(model):
    reader = TensorReader(read_model(model))
    name, box = "model.layers.1.self_attn.q_proj.weight", ((3, 9), (0, 5))
    ((got_name, got_box, values),) = reader.read([(name, box)])
    assert (got_name, got_box) == (name, box)
    assert torch.equal(values, load_file(model / "model.safetensors")[name][3:9, 0:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type=yarn is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ],
)
def test_a_config_that_the_family_does_not_support_is_refused_by_the_setting(model, changes, message):
    change_config(model, **changes)
    with pytest.raises(UserError, match=message):
        read_model(model)


def test_a_broken_config_is_refused(model):
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_model(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}), "unknown tensor model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(model, change, message):
    change_tensors(model, change)
    with pytest.raises(UserError, match=message):
        TensorReader(read_model(model))


def test_a_truncated_file_is_refused_by_name(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        TensorReader(read_model(model))


def test_a_directory_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        TensorReader(read_model(model))


def test_a_tensor_in_two_files_is_refused(model):
    save_file({"model.norm.weight": torch.zeros(128)}, model / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight stands in both"):
        TensorReader(read_model(model))


def test_a_file_that_the_index_names_must_exist(model):
    names = load_file(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "gone.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"gone\.safetensors is named by .* but missing"):
        TensorReader(read_model(model))
