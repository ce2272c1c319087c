"""The one list of what a recipe and its model can be refused for before any process is started.

`train` (resumed or not), `plan` and `verify-sync` call `check_run`; what the model's files must be, `convert` checks by the same
`read_model` and `TensorReader.checked`. Not in the list, as only `train` reads them: tokenizer, prompts and the checkpoint to resume from.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_aspo.checkpoint.start_model import find_copy, hugging_face_copy
from megatron_aspo.checkpoint.torch_dist import TorchDistReader
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.model_directory import find_torch_dist, resolve_model
from megatron_aspo.hf.tensor_files import TensorReader, has_weights
from megatron_aspo.rollout.memory import check_cache
from megatron_aspo.rollout.options import check_engines
from megatron_aspo.runtime.placement import check_placement
from megatron_aspo.trainer.settings import RankSettings


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe's model and settings, which can work together."""

    model: HFModel
    """Its directory has no weights where `torch_dist` is set."""
    settings: RankSettings
    reader: TensorReader | TorchDistReader | None
    """None where the model's directory has no weights, and none were required."""
    torch_dist: Path | None = None
    """The directory of tensors, where the model is a `torch_dist` checkpoint."""

    def in_hugging_face_format(self) -> "CheckedRecipe":
        """Return the same with a model that ranks and engines can load: a `torch_dist` checkpoint is converted at its first use."""
        if self.torch_dist is None:
            return self
        directory = hugging_face_copy(self.torch_dist)
        model = replace(self.model, directory=directory)
        return CheckedRecipe(model, replace(self.settings, model_directory=directory), TensorReader.checked(model))


def check_run(config: Config, device: str, *, weights_required: bool = True) -> CheckedRecipe:
    """Check the recipe, the model's config.json and, where the directory has weights, their files.

    device: as `check_recipe`'s. Raises UserError with the rule and the cure.
    """
    model = read_model(resolve_model(config.model))
    settings = rank_settings(config, model.directory)
    check_recipe(config, model, settings, device)
    torch_dist = find_torch_dist(Path(config.model).expanduser())
    if torch_dist is not None:
        torch_dist = torch_dist.resolve()
        find_copy(torch_dist)  # one of another checkpoint is refused by every command
        reader = TorchDistReader(torch_dist, model)
    else:
        reader = TensorReader.checked(model) if weights_required or has_weights(model.directory) else None
    if ":" in config.algorithm.policy_loss:
        from megatron_aspo.losses.find import find_policy_loss

        find_policy_loss(config.algorithm)
    return CheckedRecipe(model, settings, reader, torch_dist)


def check_recipe(config: Config, model: HFModel, settings: RankSettings, device: str) -> None:
    """The part that follows from sizes alone. Raises UserError with the rule and the cure.

    device: `cpu | cuda`, what ranks and engines compute on; empty while that is not known, as before a Ray cluster is joined.
    """
    settings.check_model(model.dims)
    settings.check_device(device)
    check_engines(config.rollout, model.dims, device)
    if config.max_model_len > model.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.max_model_len} is more than the model's "
            f"{model.max_positions} positions; lower one of them"
        )
    check_cache(model, config.rollout, config.max_model_len)
    check_placement(config.placement, settings.sizes.world, config.rollout.sizes)
    if config.placement == "colocated" and config.rollout.resource:
        raise UserError(
            f"rollout.resource={config.rollout.resource} with placement=colocated: engines live where the training ranks do; set "
            "trainer.resource instead, or placement=split"
        )


def expected_device(config: Config) -> str:
    """`cpu | cuda`: what a Ray of our own on this machine will compute on; empty for a cluster to be joined, which is not known yet."""
    if config.ray_address:
        return ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return "cuda" if not hidden and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def rank_settings(config: Config, model_directory: Path) -> RankSettings:
    """Return the settings of the training ranks, the same for all."""
    return RankSettings(
        model_directory,
        config.trainer,
        config.optimizer,
        config.algorithm,
        config.rollout.temperature,
        config.seed,
        config.rollout.responses_per_prompt,
        config.rollout.max_response_tokens,
        config.deterministic,
    )
