"""The committed configs of real models match the published models, and can be planned."""

import math
from pathlib import Path

import pytest
import yaml

from megatron_aspo.config import load_config
from megatron_aspo.hf.model import read_model
from megatron_aspo.runtime.plan import make_plan
from tests.unit.test_plan_command import RECIPE

MODELS = Path(__file__).parents[2] / "examples" / "models"
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "seed-oss-36b": 36_151_104_512,
}
"""Number of parameters in the safetensors summaries of the model cards."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_committed_config_is_planned_with_the_published_number_of_parameters(model, tmp_path):
    described = read_model(MODELS / model)
    assert sum(map(math.prod, described.tensor_shapes.values())) == PUBLISHED[model]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model": str(MODELS / model)}))
    stages = make_plan(load_config(tmp_path / "recipe.yaml", ["trainer.pipeline_parallel=2"]), "cuda").ranks
    # Two bytes per parameter; in a tied model the last stage holds a second copy of the embedding.
    embedding = math.prod(described.tensor_shapes["model.embed_tokens.weight"]) if described.dims.tied else 0
    assert sum(stage.weights for stage in stages) == 2 * (PUBLISHED[model] + embedding)
