"""Distributed checkpoints of Megatron-Core: it loads our conversions at other layouts, and its checkpoints are converted back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.hf.model import HFModel, read_model
from tests.models import save_tiny
from tests.parallel import core_workloads
from tests.parallel.logits import VOCAB

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
PP2_EP2 = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
PADDED = 144
"""Rows of Megatron's embedding, more than the model has."""


def described(model: HFModel) -> tuple[dict, dict]:
    """Return the arguments of Megatron-Core's TransformerConfig and GPTModel."""
    dims = model.dims
    config = {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "ffn_hidden_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "layernorm_epsilon": model.norm_eps,
        "add_qkv_bias": dims.qkv_bias,
        "qk_layernorm": dims.qk_norm,
    }
    if dims.experts:
        config |= {"num_moe_experts": dims.experts, "moe_ffn_hidden_size": dims.moe_ffn, "moe_router_topk": model.experts_per_token}
        config |= {"moe_router_load_balancing_type": "none"}
    arguments = {
        "vocab_size": PADDED,
        "max_sequence_length": model.max_positions,
        "rotary_base": model.rope_theta,
        "share_embeddings_and_output_weights": dims.tied,
    }
    return config, arguments


def transformers_logits(reference) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(
    ("family", "tied", "sizes"),
    [
        ("qwen2", True, TP2_PP2),
        pytest.param("llama", False, TP2_PP2, marks=pytest.mark.nightly),  # the attention of the one, the output matrix of the other
        ("qwen3_moe", False, PP2_EP2),
    ],
    ids=str,
)
def test_megatron_core_loads_a_conversion_at_another_layout_and_computes_the_same(pools, tmp_path, family, tied, sizes):
    reference = save_tiny(family, tmp_path / "hf", tied=tied, vocab_size=VOCAB)
    convert(open_source(tmp_path / "hf"), tmp_path / "torch_dist", to="torch_dist")
    assert (tmp_path / "torch_dist" / "latest_checkpointed_iteration.txt").read_text() == "release"
    words = described(read_model(tmp_path / "hf"))
    (*_, found) = pools(4).run(core_workloads.logits, sizes, *words, TOKENS, str(tmp_path / "torch_dist" / "release"), None)
    assert np.abs(found[:, :VOCAB] - transformers_logits(reference)).max() <= 1e-5


@pytest.mark.parametrize(("family", "tied", "sizes"), [("qwen2", True, TP2_PP2), ("mixtral", False, PP2_EP2)], ids=str)
def test_a_checkpoint_of_megatron_core_becomes_a_transformers_model(pools, tmp_path, family, tied, sizes):
    """Megatron's random weights, in the directory of an iteration, without config and tokenizer."""
    save_tiny(family, tmp_path / "config", tied=tied, vocab_size=VOCAB)
    directory = tmp_path / "run" / "iter_0000012"
    directory.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12")
    words = described(read_model(tmp_path / "config"))
    (*_, expected) = pools(4).run(core_workloads.logits, sizes, *words, TOKENS, None, str(directory))
    convert(open_source(tmp_path / "run", config_from=tmp_path / "config"), tmp_path / "hf", to="huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert np.abs(expected[:, :VOCAB] - transformers_logits(model)).max() <= 1e-5
    # Not the weights of the directory that provided the config.
    assert not torch.equal(*(load_file(tmp_path / name / "model.safetensors")["model.norm.weight"] for name in ("hf", "config")))


def test_megatrons_own_loader_reads_the_arguments(tmp_path):
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()
    from megatron.core import dist_checkpointing

    save_tiny("qwen3_moe", tmp_path / "hf", vocab_size=VOCAB)
    convert(open_source(tmp_path / "hf"), tmp_path / "torch_dist", to="torch_dist")
    arguments = dist_checkpointing.load_common_state_dict(str(tmp_path / "torch_dist" / "release"))["args"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (arguments.num_layers, arguments.hidden_size, arguments.num_query_groups) == (2, 128, 2)
    assert (arguments.num_experts, arguments.moe_router_topk, arguments.qk_layernorm) == (4, 2, True)
    assert arguments.kv_channels == config["head_dim"] and arguments.rotary_base == config["rope_parameters"]["rope_theta"]
