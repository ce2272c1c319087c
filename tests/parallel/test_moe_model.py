"""Models with experts, and models with few key-value heads, on real processes: logits against transformers, export."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads
from tests.parallel.logits import VOCAB, assert_logits_equal_transformers

pytestmark = pytest.mark.long

MODELS = {
    "qwen3_moe": {},
    "qwen3_moe tied": {"tied": True},
    "qwen3_moe shares of all": {"norm_topk_prob": False},
    "qwen3_moe one of all": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "mixtral": {},
    "mixtral three of five": {"num_local_experts": 5, "num_experts_per_tok": 3},
}


def settings(directory, **layout) -> RankSettings:
    """Tensor parallelism implies sequence parallelism: without it Megatron does not train experts."""
    trainer = TrainerOptions(dtype="float32", sequence_parallel=layout.get("tensor_parallel", 1) > 1, **layout)
    return RankSettings(directory, trainer, OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, save_tiny(request.param.split()[0], directory, vocab_size=VOCAB, **MODELS[request.param])


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_logits_of_a_model_with_experts_equal_transformers(pools, model, tensor_parallel):
    directory, reference = model
    assert_logits_equal_transformers(pools, settings(directory, tensor_parallel=tensor_parallel), reference)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2, "pipeline_parallel": 2}], ids=str)
def test_an_export_holds_exactly_the_loaded_tensors(pools, model, layout, tmp_path):
    directory, _ = model
    chosen = settings(directory, **layout)
    pools(chosen.sizes.world).run(workloads.export, chosen, tmp_path / "export", "float32")
    source, written = load_file(directory / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert set(source) == set(written)
    assert all(torch.equal(source[name], written[name]) for name in source)


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "tensor_parallel"),
    [("qwen3", 4, 1, 1), ("qwen3", 4, 1, 2), ("qwen2", 4, 1, 4), ("llama", 4, 2, 4), ("qwen2", 6, 3, 1), ("qwen2", 6, 3, 3)],
)
def test_logits_are_right_for_every_number_of_key_value_heads(pools, tmp_path, family, heads, kv_heads, tensor_parallel):
    """Also where there are fewer of them than tensor-parallel ranks, so that a shard boundary is inside a group."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 32 * heads}
    reference = save_tiny(family, tmp_path, vocab_size=VOCAB, **{"intermediate_size": 96, "head_dim": 32, **sizes})
    assert_logits_equal_transformers(pools, settings(tmp_path, tensor_parallel=tensor_parallel), reference)
