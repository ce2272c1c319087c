"""A conversion that cannot be completed ends with status 2 and one line that names the thing and the cure, and leaves no file."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_aspo.cli import main
from tests.unit.hf_shards import Model, read_tensors, write_model, write_tensors

ROOT = Path(__file__).parents[2]
NORM, EMBEDDING, Q = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def hf(tmp_path) -> Path:
    write_model(tmp_path / "hf", Model(), files=2)
    return tmp_path / "hf"


def change_tensors(directory: Path, change) -> None:
    tensors = read_tensors(directory)
    change(tensors)
    write_tensors(directory, tensors, 2)


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def file_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][tensor]


# --- the tensors of a Hugging Face directory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), [f"lacks {NORM}", "1 missing, 0 unknown", "get the model again, or correct config.json"]),
        (lambda t: t.pop(Q), [f"lacks {Q}", "get the model again"]),
        (lambda t: t.update(strange=torch.zeros(2)), ["unknown tensor strange", "0 missing, 1 unknown", "correct config.json"]),
        (lambda t: t.update({NORM: torch.zeros(11).bfloat16()}), [NORM, "has shape (11,); config.json says (12,)", "get it again"]),
        (lambda t: t.update({Q: t[Q].T.contiguous()}), [Q, "has shape (12, 8); config.json says (8, 12)"]),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][None]}), [EMBEDDING, "has shape (1, 19, 12)"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.int8)}), [Q, "element type I8", "F32, BF16, F16", "unquantized"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.float64)}), [Q, "element type F64"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.float8_e4m3fn)}), [Q, "element type F8_E4M3", "unquantized"]),
        (lambda t: t.update({Q: t[Q].float()}), [f"{Q} is float32, the model bfloat16", "choose one element type for all with --dtype"]),
    ],
    ids=["missing", "missing in a layer", "extra", "shape", "transposed", "rank", "int8", "float64", "float8", "mixed"],
)
def test_a_tensor_that_does_not_match_the_config_is_refused_by_name(hf, tmp_path, refused, change, message):
    change_tensors(hf, change)
    for arguments in ([], ["--tensor-parallel", 2], ["--to", "huggingface"]):
        line = refused(hf, tmp_path / "target", *arguments)
        for words in (*message, str(hf)):
            assert words in line


def test_a_chosen_dtype_does_not_turn_integers_into_weights(hf, tmp_path, refused):
    change_tensors(hf, lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.int8)}))
    assert "element type I8" in refused(hf, tmp_path / "target", "--dtype", "float32")


@pytest.mark.parametrize("cut", [0, 7, 100, -1, -24])
def test_a_truncated_file_is_refused_by_name(hf, tmp_path, refused, cut):
    file = file_of(hf, Q)
    file.write_bytes(file.read_bytes()[:cut])
    line = refused(hf, tmp_path / "target")
    assert str(file) in line and "damaged or incomplete, copy it again" in line


def test_a_key_in_two_files_is_refused_with_both(hf, tmp_path, refused):
    tensors = read_tensors(hf)
    other = next(file for file in hf.glob("*.safetensors") if file != file_of(hf, Q))
    save_file({name: t for name, t in tensors.items() if file_of(hf, name) == other} | {Q: tensors[Q]}, other)
    line = refused(hf, tmp_path / "target")
    assert f"{Q} stands in both" in line and file_of(hf, Q).name in line and other.name in line and "keep one of them" in line


def test_an_index_that_names_a_file_without_the_tensor_is_refused_by_the_tensor(hf, tmp_path, refused):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    right = index["weight_map"][Q]
    index["weight_map"][Q] = next(file for file in index["weight_map"].values() if file != right)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused(hf, tmp_path / "target")
    assert Q in line and index["weight_map"][Q] in line and "does not hold it" in line and "get the model again" in line


def test_an_index_that_names_a_file_that_is_missing_is_refused_by_the_file(hf, tmp_path, refused):
    file = file_of(hf, Q)
    file.unlink()
    line = refused(hf, tmp_path / "target")
    assert str(file) in line and "copy it again" in line


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00"])
def test_an_invalid_index_is_refused_by_name(hf, tmp_path, refused, text):
    (hf / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(hf, tmp_path / "target")


def test_a_directory_without_weights_is_refused_with_the_cure(hf, tmp_path, refused):
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    (hf / "pytorch_model.bin").touch()
    assert "no .safetensors file; convert the model to safetensors first" in refused(hf, tmp_path / "target")


@pytest.mark.parametrize(
    "head",
    [
        lambda e: e + 1,
        lambda e: e[:-1].clone(),
        lambda e: e.float() + 1e-3,
        lambda e: torch.zeros(e.shape, dtype=torch.int8),
    ],
    ids=["values", "shape", "element type", "integers"],
)
def test_a_tied_model_whose_head_differs_is_refused_by_name(tmp_path, refused, head):
    tensors = write_model(tmp_path / "hf", Model(tied=True))
    tensors[EMBEDDING] = torch.randn(19, 12).bfloat16()
    save_file(tensors | {"lm_head.weight": head(tensors[EMBEDDING])}, tmp_path / "hf" / "model.safetensors")
    line = refused(tmp_path / "hf", tmp_path / "target")
    assert "lm_head.weight" in line and EMBEDDING in line
    assert "set tie_word_embeddings to false, or remove lm_head.weight" in line


# --- its config ---------------------------------------------------------------------------------------------------------------------------


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | more}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", rope("dynamic"), "rope_type=dynamic is not supported; expected one of default, linear, llama3, yarn"),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic is not supported"),
        ("llama", rope("linear", factor=0.5), "factor=0.5 is not supported with rope_type=linear; expected a number"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported for LlamaForCausalLM; expected silu"),
        ("mixtral", {"hidden_act": "relu"}, "hidden_act=relu is not supported for MixtralForCausalLM; expected silu"),
        ("qwen3_moe", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new is not supported for Qwen3MoeForCausalLM; expected silu"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window=True is not supported"),
        ("mixtral", {"sliding_window": 8}, "sliding_window=8 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("llama", {"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not supported; expected one of"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("llama", {"num_hidden_layers": 3}, "lacks model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "unknown tensor model.layers.1."),
    ],
)
def test_a_setting_that_the_family_does_not_support_is_refused_by_the_setting(tmp_path, refused, family, changes, message):
    write_model(tmp_path / "hf", Model(family))
    change_config(tmp_path / "hf", **changes)
    assert message in refused(tmp_path / "hf", tmp_path / "target")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model_type": "llama"}', '"\\ud800"', "\x00\xff"])
def test_an_invalid_config_is_refused_by_name(hf, tmp_path, refused, text):
    (hf / "config.json").write_bytes(text.encode("latin-1"))
    line = refused(hf, tmp_path / "target")
    assert str(hf) in line and ("config.json" in line or "architecture" in line)


# --- source, target, layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "deep/nowhere"])
def test_a_source_that_is_missing_is_refused(tmp_path, refused, name):
    assert f"{tmp_path / name}: there is no such directory" in refused(tmp_path / name, tmp_path / "target")


def test_a_missing_relative_source_is_not_looked_up_on_the_hub(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such directory" in refused("./nowhere", tmp_path / "target")


def test_a_source_that_is_a_file_or_an_empty_directory_is_refused(tmp_path, refused):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "is a file; name the Hugging Face model directory" in refused(tmp_path / "file", tmp_path / "target")
    assert "has no config.json" in refused(tmp_path / "empty", tmp_path / "target")


def test_an_existing_target_is_refused_and_unchanged(hf, tmp_path, refused):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "theirs").write_text("kept")
    assert f"{tmp_path / 'target'} exists; choose another name, or remove it" in refused(hf, tmp_path / "target")
    assert "exists" in refused(hf, hf)


@pytest.mark.parametrize("path", ["file/target", "/proc/nowhere/target"])
def test_a_target_in_an_unwritable_directory_is_refused(hf, tmp_path, refused, path):
    (tmp_path / "file").touch()
    line = refused(hf, tmp_path / path)
    assert f"{tmp_path / path} could not be written" in line and "choose another place" in line


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("qwen2", ["--tensor-parallel", 3], [" 3 does not divide the model's 4 attention heads", "choose one of [1, 2, 4]"]),
        ("qwen2", ["--pipeline-parallel", 4], [" 4 does not divide the model's 2 layers", "choose one of [1, 2]"]),
        ("qwen2", ["--pipeline-parallel", 2, "--virtual-pipeline", 2], ["does not divide the model's 2 layers", "must be one of [1, 2]"]),
        ("qwen2", ["--virtual-pipeline", 2], ["virtual", "set it to 1"]),
        ("qwen2", ["--expert-parallel", 2], ["the model has no experts", "leave them out"]),
        ("mixtral", ["--expert-parallel", 3], [" 3 does not divide the model's 4 experts", "choose one of [1, 2, 4]"]),
        ("qwen3_moe", ["--expert-tensor-parallel", 3], [" 3 does not divide the 8 feed-forward channels", "choose one of [1, 2, 4, 8]"]),
    ],
)
def test_a_layout_that_cannot_split_the_model_is_refused_with_the_choices(tmp_path, refused, family, arguments, message):
    write_model(tmp_path / "hf", Model(family))
    line = refused(tmp_path / "hf", tmp_path / "target", *arguments)
    for words in message:
        assert words in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "huggingface", "--tensor-parallel", 2], "--tensor-parallel is about a Megatron target"),
        (["--to", "huggingface", "--naming", "local"], "--naming is about a Megatron target"),
        (["--max-shard-gb", 1], "--max-shard-gb 1.0 is about a Hugging Face target"),
        (["--to", "huggingface", "--max-shard-gb", 0], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", -1], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", "nan"], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", "1e-12"], "--max-shard-gb"),
        (["--to", "huggingface", "--verify"], "needs Hugging Face on one side"),
    ],
)
def test_options_that_contradict_each_other_are_refused(hf, tmp_path, refused, arguments, message):
    assert message in refused(hf, tmp_path / "target", *arguments)


def test_an_endless_shard_is_one_file(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(hf), str(tmp_path / "target"), "--to", "huggingface", "--max-shard-gb", "inf"])
    assert exit.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "target" / "model.safetensors").is_file()
