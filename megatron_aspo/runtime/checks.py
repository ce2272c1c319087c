"""What a recipe and its model come to, and can be refused for, before any process is started."""

from pathlib import Path

from megatron_aspo.config import Config
from megatron_aspo.errors import UserError
from megatron_aspo.rollout.memory import check_cache
from megatron_aspo.runtime.placement import check_places
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.hf_model import HFModel
from megatron_aspo.weights.holdings import check_engine


def check_recipe(config: Config, model: HFModel, settings: RankSettings) -> None:
    """Raises UserError with the rule and the cure."""
    settings.check_model(model.dims)
    check_engine(model.dims, config.rollout.sizes)
    if config.max_model_len > model.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.max_model_len} is more than the model's "
            f"{model.max_positions} positions; lower one of them"
        )
    check_cache(model, config.rollout, config.max_model_len)
    check_places(config.placement, settings.sizes.world, config.rollout.sizes)


def rank_settings(config: Config, model_directory: Path) -> RankSettings:
    """What every training rank of a run is told."""
    return RankSettings(
        model_directory,
        config.trainer,
        config.optimizer,
        config.algorithm,
        config.rollout.temperature,
        config.seed,
        config.rollout.responses_per_prompt,
        config.rollout.max_response_tokens,
    )
