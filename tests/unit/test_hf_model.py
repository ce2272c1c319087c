"""Invalid model directories are refused before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_model
from megatron_aspo.hf.tensor_files import TensorReader
from tests.models import FAMILIES, save_tiny


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
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "rope_type=dynamic is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    ],
)
def test_a_config_that_the_family_does_not_support_is_refused_by_the_setting(model, changes, message):
    change_config(model, **changes)
    with pytest.raises(UserError, match=message):
        read_model(model)


@pytest.fixture(scope="module")
def saved_configs(tmp_path_factory) -> dict[str, dict]:
    """Return the config of each family, as transformers writes it."""
    configs = {}
    for family in ("llama", "mistral", "qwen3", "qwen3_moe", "mixtral", "seed_oss"):
        directory = tmp_path_factory.mktemp(family)
        save_tiny(family, directory, vocab_size=64)
        configs[family] = json.loads((directory / "config.json").read_text())
    return configs


def read_config(directory: Path, config: dict):
    (directory / "config.json").write_text(json.dumps(config))
    return read_model(directory)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("llama", {"model_type": "mistral"}, "model_type=mistral is not supported for LlamaForCausalLM; expected llama"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported with 4 experts .* expected 2 to 4"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts=0"),
        ("mistral", {"sliding_window": 512}, "sliding_window=512 is not supported for MistralForCausalLM"),
        ("mixtral", {"sliding_window": 512}, "sliding_window=512"),
        ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise=0.01"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias=True"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_a_setting_that_would_change_the_mathematics_is_refused_by_its_name(saved_configs, tmp_path, family, changes, message):
    with pytest.raises(UserError, match=message):
        read_config(tmp_path, saved_configs[family] | changes)


def test_bias_and_dropout_of_seed_oss(saved_configs, tmp_path):
    """Query, key and value have a bias where the config says so; dropout, which its models state, is of pretraining."""
    config = saved_configs["seed_oss"]
    assert config["attention_dropout"] == config["residual_dropout"] == 0.1
    for bias in (True, False):
        described = read_config(tmp_path, config | {"attention_bias": bias})
        assert described.dims.qkv_bias == bias == ("model.layers.0.self_attn.q_proj.bias" in described.tensor_shapes)


def test_experts_are_counted_under_either_name(saved_configs, tmp_path):
    """transformers 5 writes num_local_experts, the models' own configs num_experts."""
    config = saved_configs["qwen3_moe"]
    original = {key: value for key, value in config.items() if key != "num_local_experts"} | {"num_experts": 6}
    assert read_config(tmp_path, config).dims.experts == 4
    assert read_config(tmp_path, original).dims.experts == 6


def test_the_width_of_an_expert_follows_its_family(saved_configs, tmp_path):
    qwen, mixtral = (read_config(tmp_path, saved_configs[family]) for family in ("qwen3_moe", "mixtral"))
    assert (qwen.dims.moe_ffn, mixtral.dims.moe_ffn) == (64, 256)
    assert (qwen.norm_topk_prob, mixtral.norm_topk_prob, mixtral.experts_per_token) == (True, True, 2)
    assert not read_config(tmp_path, saved_configs["qwen3_moe"] | {"norm_topk_prob": False}).norm_topk_prob


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_a_window_as_long_as_the_longest_sequence_means_no_window(saved_configs, tmp_path, family):
    assert read_config(tmp_path, saved_configs[family] | {"sliding_window": 1024}).max_positions == 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_tensors_that_transformers_writes(tmp_path, family):
    save_tiny(family, tmp_path, vocab_size=64)
    assert set(TensorReader(read_model(tmp_path)).dtypes) == set(load_file(tmp_path / "model.safetensors"))


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
    (model / "model.safetensors").rename(model / "one.safetensors")
    save_file({"model.norm.weight": torch.zeros(128)}, model / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight stands in both"):
        TensorReader(read_model(model))


@pytest.fixture
def indexed(model) -> Path:
    """Return the model in one shard, with an index."""
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "shard.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "shard.safetensors")}))
    return model


@pytest.mark.parametrize("name", ["consolidated.safetensors", "optimizer.safetensors", "model-00001-of-00002.safetensors"])
def test_a_file_that_vllm_would_read_with_the_model_is_refused(model, name):
    save_file({"strange": torch.zeros(1)}, model / name)
    with pytest.raises(UserError, match=rf"{name} is no part of the model in model\.safetensors, .* move it out of the directory"):
        TensorReader(read_model(model))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "optimizer.safetensors"])
def test_a_file_that_the_index_does_not_name_is_no_part_of_the_model(indexed, name):
    """Nor for vLLM: in its list of files, and with the given load format, without which it might prefer Mistral's."""
    save_file({"strange": torch.zeros(1)}, indexed / name)
    assert set(TensorReader(read_model(indexed)).dtypes) == set(load_file(indexed / "shard.safetensors"))


def test_a_complete_model_beside_an_index_of_other_files_is_refused(indexed):
    save_file({"model.norm.weight": torch.zeros(128)}, indexed / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not named by model\.safetensors\.index\.json .* remove one of them"):
        TensorReader(read_model(indexed))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["model", "indexed"])
def test_an_adapter_beside_the_model_is_refused_by_its_file(kind, name, request):
    """transformers applies it where peft is installed; vLLM and the training ranks do not."""
    directory = request.getfixturevalue(kind)
    (directory / name).touch()
    with pytest.raises(UserError, match=rf"{name} belongs to a LoRA adapter, .*; merge it into the model, or move its files away"):
        TensorReader(read_model(directory))


def test_a_file_that_the_index_names_must_exist(model):
    names = load_file(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "gone.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"gone\.safetensors is named by .* but missing"):
        TensorReader(read_model(model))


@pytest.mark.parametrize(
    ("family", "tied", "matrices"),
    [
        # Per layer: query and output 128 × 128, key and value 64 × 128, gate, up and down 128 × 256; norms; a head of 512 × 128.
        ("llama", False, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128) + 128 + 512 * 128),
        ("llama", True, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128) + 128 + 512 * 128),
        # Two of four experts of 128 × 64, and a router.
        ("qwen3_moe", False, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 2 * 3 * 128 * 64 + 4 * 128 + 2 * 128 + 2 * 32) + 128 + 512 * 128),
    ],
)
def test_the_cost_of_a_token_pair_is_attention_work_over_work_per_token(tmp_path, family, tied, matrices):
    save_tiny(family, tmp_path, tied=tied)
    assert read_model(tmp_path).pair_cost == pytest.approx(4 * 2 * 4 * 32 / (2 * matrices), rel=1e-12)
