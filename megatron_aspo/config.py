"""One typed configuration: a YAML recipe over the defaults of the rooms' options, `key.path=value` on the command line over that.

Bounds and choices are beside each field, rules within a section beside its options; the rules that span sections are here.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated

import yaml

from megatron_aspo.checkpoint.options import CheckpointOptions, check_checkpoint
from megatron_aspo.common.errors import UserError, require
from megatron_aspo.common.options import Choice, NonNegative, Positive, build, options, suggested
from megatron_aspo.common.recipe_values import flatten, merge, read_recipe, with_overrides
from megatron_aspo.evaluation.options import EvaluationOptions, check_evaluation
from megatron_aspo.losses import registry
from megatron_aspo.losses.check import check_algorithm
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.presets import PRESETS, Values
from megatron_aspo.losses.section import gather_loss_options, lift_loss_options
from megatron_aspo.observe.options import ObserveOptions, check_observe
from megatron_aspo.rewards.options import check_rewards
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions, check_optimizer, check_trainer


@options("")
class Config:
    """Everything a run is made of."""

    name: str = "run"
    """Name of the run; its default directory is `runs/<name>`."""
    preset: Annotated[str, Choice(*PRESETS)] = "paper"
    """`paper`: the defaults. `archer_reference`: what the public code of ASPO's authors does instead; the values that it sets are fixed."""
    run_dir: str = ""
    """Directory that the run writes; empty means `runs/<name>`. It must not exist unless the run is resumed."""
    resume: Annotated[str, suggested("never", "auto")] = "never"
    """`never`; `auto`, which resumes from the newest checkpoint of the run directory, if any; or the path of a checkpoint or a run."""
    model: str = ""
    """A local Hugging Face model directory, a hub name, or a `torch_dist` checkpoint that has a config and tokenizer beside it."""
    task: Annotated[str, suggested("single_digit_addition", "largest_of_three", "dataset")] = ""
    """The source of prompts and rewards: `single_digit_addition | largest_of_three | dataset | reasoning_gym:NAME`."""
    steps: Positive[int] = 100
    """Rollout steps of the run."""
    seed: NonNegative[int] = 0
    """Seed of the prompts' order, of sampling and of mini-batch order."""
    deterministic: bool = False
    """Two runs of the same recipe give the same rollouts, losses and weights bit for bit; engines then get fixed shares of the prompts
    instead of balancing their load."""
    ray_address: str = ""
    """`HOST:PORT` of the Ray cluster to join; empty starts one on this machine."""
    placement: Annotated[str, Choice("split", "colocated")] = "split"
    """`split`: engines have their own devices. `colocated`: engines time-share the devices of the training ranks."""
    transfer_bucket_mib: Positive[int] = 256
    """Upper bound, in MiB, on the whole tensors of one transfer bucket at an engine worker; a larger tensor is a bucket by itself."""
    transfer_verify_every: NonNegative[int] = 0
    """Verify the first and then every N-th weight transfer by SHA-256 at both ends; 0 verifies the first only."""
    data: DataOptions = field(default_factory=DataOptions)
    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    observe: ObserveOptions = field(default_factory=ObserveOptions)

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}").expanduser().absolute()

    @property
    def export_directory(self) -> Path:
        """The final model, in Hugging Face format."""
        return self.directory / "exports" / f"step_{self.steps}"

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response, in tokens."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the checked recipe with the overrides applied. Raises UserError for anything wrong, with the key and the cure.

    Prints a line to standard error if a preset among the overrides replaces values of the recipe.
    """
    written = _lift(read_recipe(recipe))
    values, given = written, {}
    for override in overrides:
        values, given = (_lift(with_overrides(each, [override]), replace=True) for each in (values, given))
    _check_switch(written, given)
    fixed, replaced = _replaced_by_preset(written, given)
    if replaced:
        print(f"megatron-aspo: preset={given['preset']} replaces the recipe's {', '.join(replaced)}", file=sys.stderr)
    values = merge(values, fixed)
    implied = merge(_loss_defaults(values), PRESETS.get(str(values.get("preset", Config.preset)), {}))
    values = merge(implied, values)
    if isinstance(algorithm := values.get("algorithm", {}), dict):
        values["algorithm"] = gather_loss_options(algorithm, implied.get("algorithm", {}))
    config = build(Config, values)
    _check_preset(config)
    check(config, implied)
    return config


def load_optional(recipe: Path | None, overrides: Sequence[str]) -> Config | None:
    """Return the recipe with the overrides applied, or None if none is named. Raises UserError as `load_config`, and for lone overrides."""
    if overrides and not recipe:
        raise UserError(f"{overrides[0]} changes a recipe, and there is none; name it with --recipe")
    return load_config(recipe, overrides) if recipe else None


def to_yaml(config: Config) -> str:
    """Return the resolved configuration; `load_config` of it gives the same one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def check(config: Config, implied: Values | None = None) -> None:
    """Refuse combinations that cannot work or have no effect, with the rule and the cure. implied: values that the recipe did not set."""
    implied = implied or {}
    require(config.model, "model is empty; name a local Hugging Face model directory, a hub name or a torch_dist checkpoint")
    require(config.task, "task is empty; choose one of single_digit_addition, largest_of_three, dataset, reasoning_gym:NAME")
    require(config.resume, "resume is empty; set never, auto, or the path of a checkpoint or a run")
    require(
        not config.ray_address or re.search(r"[^:/]:\d+$", config.ray_address),
        f"ray_address={config.ray_address} is not of the form HOST:PORT; name the head and its port, or leave it out to start Ray here",
    )
    rollout = config.rollout
    check_algorithm(config.algorithm, rollout.responses_per_prompt, rollout.max_response_tokens, implied.get("algorithm"))
    check_trainer(config.trainer)
    check_optimizer(config.optimizer, implied="optimizer" in implied)
    check_evaluation(config.evaluation)
    check_checkpoint(config.checkpoint)
    check_observe(config.observe)
    check_rewards(config.data)
    _check_between_sections(config)


def _check_between_sections(config: Config) -> None:
    algorithm, rollout, checkpoint, evaluation = config.algorithm, config.rollout, config.checkpoint, config.evaluation
    require(
        algorithm.sequence_count == "counted" or algorithm.mini_batch_prompts <= rollout.prompts_per_step,
        f"algorithm.mini_batch_prompts={algorithm.mini_batch_prompts} is more than rollout.prompts_per_step={rollout.prompts_per_step}: no "
        "mini-batch is ever full, but sequence_count=full_mini_batch divides by one; lower it",
    )
    require(
        config.data.reward_wrong_score == 0 or algorithm.group_filter != "drop_zero_or_one",
        f"data.reward_wrong_score={config.data.reward_wrong_score:g}: algorithm.group_filter=drop_zero_or_one drops groups of 0 or of 1 "
        "alone; set algorithm.group_filter=drop",
    )
    require(
        not checkpoint.keep_best or (evaluation.every > 0 and checkpoint.every % evaluation.every == 0),
        f"checkpoint.keep_best={checkpoint.keep_best} needs an accuracy at each checkpoint: set evaluation.every so that it divides "
        f"checkpoint.every={checkpoint.every}",
    )
    require(
        rollout.sleep_level == 2 or config.placement == "colocated",
        f"rollout.sleep_level={rollout.sleep_level} has no effect with placement=split, where engines never sleep; set one of them",
    )


def _check_switch(written: dict, given: dict) -> None:
    """Refuse overrides that change the policy loss or the preset over values that the recipe wrote down for another one.

    The resolved recipe of a run writes every value down: replayed with another loss it would keep the bounds of the old one. The values
    that a preset fixes are none of these when it is the new one: they replace the recipe's.
    """
    written, given = flatten(written), flatten(given)
    for key, default, sets_of in (
        ("algorithm.policy_loss", AlgorithmOptions.policy_loss, _own_defaults),
        ("preset", Config.preset, lambda preset: PRESETS.get(preset, {})),
    ):
        old, new = str(written.get(key, default)), str(given.get(key, written.get(key, default)))
        for name in ((old,) if key == "preset" else (old, new)) if old != new else ():
            for stale in sorted(flatten(sets_of(name)).keys() & written.keys() - given.keys()):
                raise UserError(
                    f"{key}={new} takes the place of {old}, but the recipe sets {stale}={written[stale]}, which goes with {name}; "
                    "set it too, or remove it from the recipe"
                )


def _lift(values: dict, *, replace: bool = False) -> dict:
    """Return the recipe with the options of the policy loss beside the other keys of `algorithm`."""
    algorithm = values.get("algorithm")
    return values | {"algorithm": lift_loss_options(algorithm, replace=replace)} if isinstance(algorithm, dict) else values


def _own_defaults(policy_loss: str) -> Values:
    own = registry.own_defaults(policy_loss)
    return {"algorithm": own} if own else {}


def _replaced_by_preset(written: dict, given: dict) -> tuple[Values, list[str]]:
    """Return the values that a preset among the overrides fixes and the recipe writes otherwise, and `key=value` of what they replace.

    A preset in the recipe itself does not replace what the recipe writes beside it, but refuses it.
    """
    preset = str(given.get("preset", Config.preset))
    if preset == written.get("preset", Config.preset):
        return {}, []
    before, chosen = flatten(written), flatten(given)
    fixed: Values = {}
    replaced = []
    for section, keys in PRESETS.get(preset, {}).items():
        for key, value in keys.items():
            path = f"{section}.{key}"
            if path in before and path not in chosen and before[path] != value:
                fixed.setdefault(section, {})[key] = value
                replaced.append(f"{path}={before[path]}")
    return fixed, replaced


def _loss_defaults(values: dict) -> Values:
    algorithm = values.get("algorithm")
    return _own_defaults(str(algorithm.get("policy_loss"))) if isinstance(algorithm, dict) else {}


def _check_preset(config: Config) -> None:
    require(
        not PRESETS[config.preset] or registry.declaration(config.algorithm.policy_loss).entropy_classes,
        f"preset={config.preset} fixes ε by entropy class, which policy_loss={config.algorithm.policy_loss} does not know; take "
        f"{' or '.join(registry.losses_that_declare('entropy_classes'))}, or set preset=paper",
    )
    for section, keys in PRESETS[config.preset].items():
        for key, fixed in keys.items():
            options = getattr(config, section)
            value = getattr(options, key) if hasattr(options, key) else config.algorithm.policy_loss_options.get(key, fixed)
            require(
                value == fixed, f"preset={config.preset} fixes {section}.{key}={fixed}, not {value}; remove the key, or set preset=paper"
            )
