"""One typed configuration: a YAML recipe over the defaults of the rooms' options, `key.path=value` on the command line over that."""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import get_args, get_origin

import yaml

from megatron_aspo.checkpoint.options import CheckpointOptions
from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.common.strict_yaml import load_recipe_yaml, number_if_one
from megatron_aspo.data.options import DataOptions
from megatron_aspo.evaluation.options import EvaluationOptions
from megatron_aspo.losses.check import check_algorithm, reads_entropy_classes
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.presets import LOSS_DEFAULTS, PRESETS, Values
from megatron_aspo.observe.options import ObserveOptions
from megatron_aspo.observe.trackers import check_names
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions

_TYPE_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "a mapping of names to values",
    list[str]: "a list of texts",
    list[float]: "a list of finite numbers",
    list[int]: "a list of whole numbers",
}


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    name: str = "run"
    """Name of the run; its default directory is `runs/<name>`."""
    preset: str = "paper"
    """`paper`: the defaults. `archer_reference`: what the public code of ASPO's authors does instead; the values that it sets are fixed."""
    run_dir: str = ""
    """Directory that the run writes; empty means `runs/<name>`. It must not exist unless the run is resumed."""
    resume: str = "never"
    """`never`; `auto`, which resumes from the newest checkpoint of the run directory, if any; or the path of a checkpoint or a run."""
    model: str = ""
    """A local Hugging Face model directory, a hub name, or a `torch_dist` checkpoint that has a config and tokenizer beside it."""
    task: str = ""
    """The source of prompts and rewards: `single_digit_addition | largest_of_three | dataset | reasoning_gym:NAME`."""
    steps: int = 100
    """Rollout steps of the run."""
    seed: int = 0
    """Seed of the prompts' order, of sampling and of mini-batch order."""
    deterministic: bool = False
    """Two runs of the same recipe give the same rollouts, losses and weights bit for bit; engines then get fixed shares of the prompts
    instead of balancing their load."""
    ray_address: str = ""
    """`HOST:PORT` of the Ray cluster to join; empty starts one on this machine."""
    placement: str = "split"
    """`split`: engines have their own devices. `colocated`: engines time-share the devices of the training ranks."""
    transfer_bucket_mib: int = 256
    """Upper bound, in MiB, on the whole tensors of one transfer bucket at an engine worker; a larger tensor is a bucket by itself."""
    transfer_verify_every: int = 0
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


def load_config(recipe: Path, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> Config:
    """The recipe with the overrides applied, checked. Raises UserError for anything wrong, with the key and the nearest valid one.

    say: called with one line if a preset among the overrides replaces values of the recipe.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe {recipe}; examples stand in examples/recipes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {recipe} cannot be read: {error}") from error
    try:
        values = load_recipe_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {recipe} must be a mapping of keys to values")
    written, given = values, {}
    values = copy.deepcopy(written)
    for override in overrides:
        _apply(values, override)
        _apply(given, override)
    preset = str(values.get("preset", "paper"))
    _require(preset in PRESETS, f"preset={preset} is not known; {nearest(preset, PRESETS)}")
    _check_switch(written, given)
    if replaced := _replace_by_preset(preset, values, written, given):
        say(f"preset={preset} replaces the recipe's {', '.join(replaced)}")
    implied = _over(_loss_defaults(values), PRESETS[preset])
    config = _build(Config, _over(implied, values), "")
    _check_preset(config)
    check(config, implied)
    return config


def build(kind: type, values: dict, overrides: Sequence[str]):
    """Return the dataclass `kind` with the values, and `key.path=value` over them, over its defaults. Raises UserError as `load_config`."""
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override)
    return _build(kind, values, "")


def load_optional(recipe: Path | None, overrides: Sequence[str]) -> Config | None:
    """Return the recipe with the overrides applied, or None if none is named. Raises UserError as `load_config`, and for lone overrides."""
    if overrides and not recipe:
        raise UserError(f"{overrides[0]} changes a recipe, and there is none; name it with --recipe")
    return load_config(recipe, overrides) if recipe else None


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` of it gives the same one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _check_switch(written: dict, given: dict) -> None:
    """Refuse overrides that change the policy loss or the preset over values that the recipe wrote down for another one.

    The resolved recipe of a run writes every value down: replayed with another loss it would keep the bounds of the old one. The values
    that a preset fixes are none of these when it is the new one: they replace the recipe's.
    """
    written, given = _flat(written), _flat(given)
    for key, default, sets in (
        ("algorithm.policy_loss", AlgorithmOptions().policy_loss, LOSS_DEFAULTS),
        ("preset", Config.preset, PRESETS),
    ):
        old, new = str(written.get(key, default)), str(given.get(key, written.get(key, default)))
        for name in ((old,) if key == "preset" else (old, new)) if old != new else ():
            for stale in sorted(_flat(sets.get(name, {})).keys() & written.keys() - given.keys()):
                raise UserError(
                    f"{key}={new} takes the place of {old}, but the recipe sets {stale}={written[stale]}, which goes with {name}; "
                    "set it too, or remove it from the recipe"
                )


def _replace_by_preset(preset: str, values: dict, written: dict, given: dict) -> list[str]:
    """Put the values that a preset fixes into `values`, if the overrides name the preset and not these values.

    A preset in the recipe itself does not replace what the recipe writes beside it, but refuses it. Returns `key=value` of each that was
    replaced.
    """
    if given.get("preset", written.get("preset")) == written.get("preset", Config.preset):
        return []
    before, chosen, replaced = _flat(written), _flat(given), []
    for section, keys in PRESETS[preset].items():
        for key, fixed in keys.items():
            path = f"{section}.{key}"
            if path in before and path not in chosen and before[path] != fixed:
                values[section][key] = fixed
                replaced.append(f"{path}={before[path]}")
    return replaced


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested mappings as one, of key paths."""
    result = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _loss_defaults(values: dict) -> Values:
    algorithm = values.get("algorithm")
    return LOSS_DEFAULTS.get(str(algorithm.get("policy_loss")), {}) if isinstance(algorithm, dict) else {}


def _over(below: dict, above: dict) -> dict:
    """Both nested mappings in one; where both have a value, that of `above`."""
    result = dict(below)
    for key, value in above.items():
        result[key] = _over(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def _check_preset(config: Config) -> None:
    _require(
        not PRESETS[config.preset] or reads_entropy_classes(config.algorithm),
        f"preset={config.preset} fixes ε by entropy class, which policy_loss={config.algorithm.policy_loss} does not know; take aspo or "
        "archer, or set preset=paper",
    )
    for section, keys in PRESETS[config.preset].items():
        for key, fixed in keys.items():
            value = getattr(getattr(config, section), key)
            _require(
                value == fixed, f"preset={config.preset} fixes {section}.{key}={fixed}, not {value}; remove the key, or set preset=paper"
            )


def check(config: Config, implied: Values | None = None) -> None:
    """Refuse values and combinations that cannot work, with the rule and the cure. implied: what was not set by the recipe itself."""
    _require(bool(config.model), "model is empty; name a local Hugging Face model directory, a hub name or a torch_dist checkpoint")
    _require(bool(config.task), "task is empty; choose one of single_digit_addition, largest_of_three, dataset, reasoning_gym:NAME")
    _require(
        not config.ray_address or re.search(r"[^:/]:\d+$", config.ray_address) is not None,
        f"ray_address={config.ray_address} is not of the form HOST:PORT; name the head and its port, or leave it out to start Ray here",
    )
    for key, value, choices in (
        ("trainer.dtype", config.trainer.dtype, ("float32", "bfloat16")),
        ("trainer.layer_spec", config.trainer.layer_spec, ("auto", "local", "transformer_engine")),
        ("rollout.dtype", config.rollout.dtype, ("float32", "bfloat16")),
        ("placement", config.placement, ("split", "colocated")),
    ):
        _require(value in choices, f"{key}={value} is not known; {nearest(value, choices)}")
    for section, names in (
        (config, ("steps", "transfer_bucket_mib")),
        (config.data, ("reward_workers", "reward_timeout_s", "max_prompt_tokens", "held_out_prompts")),
        (
            config.trainer,
            (
                "tensor_parallel",
                "pipeline_parallel",
                "data_parallel",
                "virtual_pipeline",
                "context_parallel",
                "expert_parallel",
                "micro_batch_tokens",
                "logprob_chunk_tokens",
                "timeout_s",
            ),
        ),
        (config.optimizer, ("lr", "eps")),
        (
            config.rollout,
            (
                "engines",
                "tensor_parallel",
                "prompts_per_step",
                "responses_per_prompt",
                "max_response_tokens",
                "temperature",
                "max_running_requests",
                "kv_cache_gib",
                "start_timeout_s",
                "answer_timeout_s",
            ),
        ),
    ):
        for name in names:
            _require(getattr(section, name) > 0, f"{_path(config, section)}{name}={getattr(section, name)} must be greater than 0")
    for section, names in (
        (config, ("seed", "transfer_verify_every")),
        (config.trainer, ("threads", "expert_tensor_parallel")),
        (config.optimizer, ("warmup_steps", "weight_decay", "clip_grad")),
        (config.rollout, ("threads",)),
        (config.evaluation, ("draws", "every", "temperature")),
        (config.checkpoint, ("every", "keep_last", "keep_every", "keep_best")),
    ):
        for name in names:
            _require(getattr(section, name) >= 0, f"{_path(config, section)}{name}={getattr(section, name)} must not be negative")
    for name in ("beta1", "beta2"):
        value = getattr(config.optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}={value} must be in [0, 1)")
    for key, value in (("rollout.temperature", config.rollout.temperature), ("evaluation.temperature", config.evaluation.temperature)):
        # vLLM would raise it to 0.01 by itself, and engine and trainer would differ.
        greedy = key.startswith("evaluation")
        rule = "0 (greedy) or at least 0.01" if greedy else "at least 0.01"
        _require(value >= 0.01 or (value == 0 and greedy), f"{key}={value} must be {rule}")
    check_algorithm(
        config.algorithm, config.rollout.responses_per_prompt, config.rollout.max_response_tokens, (implied or {}).get("algorithm")
    )
    _require(
        not config.evaluation.every or config.evaluation.draws > 0,
        f"evaluation.every={config.evaluation.every} evaluates while training, but evaluation.draws=0 draws nothing; set both or neither",
    )
    _check_checkpoints(config)
    check_names(config.observe.trackers)
    _require(
        config.observe.project == ObserveOptions.project or bool({"wandb", "mlflow"} & set(config.observe.trackers)),
        f"observe.project={config.observe.project} has no effect without wandb or mlflow in observe.trackers; add one, or remove it",
    )
    check_rewards(config.data)
    _require(
        config.data.reward_wrong_score == 0 or config.algorithm.group_filter != "drop_zero_or_one",
        f"data.reward_wrong_score={config.data.reward_wrong_score:g}: algorithm.group_filter=drop_zero_or_one drops groups of 0 or of 1 "
        "alone; set algorithm.group_filter=drop",
    )
    _require(
        not config.optimizer.warmup_from_zero or config.optimizer.warmup_steps > 0,
        "optimizer.warmup_from_zero=true has no effect but a first step without learning when optimizer.warmup_steps=0; set one of them",
    )
    _require(
        not config.optimizer.decay_one_dimensional or config.optimizer.weight_decay > 0 or "optimizer" in (implied or {}),
        "optimizer.decay_one_dimensional=true has no effect with optimizer.weight_decay=0; set one of them",
    )
    _require(
        config.algorithm.sequence_count == "counted" or config.algorithm.mini_batch_prompts <= config.rollout.prompts_per_step,
        f"algorithm.mini_batch_prompts={config.algorithm.mini_batch_prompts} is more than rollout.prompts_per_step="
        f"{config.rollout.prompts_per_step}: no mini-batch is ever full, but sequence_count=full_mini_batch divides by one; lower it",
    )
    _require(
        not config.trainer.distributed_optimizer or config.trainer.data_parallel * config.trainer.context_parallel > 1,
        "trainer.distributed_optimizer=true shards over data-parallel and context-parallel ranks; set trainer.data_parallel above 1 or "
        "leave it false",
    )
    _require(
        not config.trainer.sequence_parallel or config.trainer.tensor_parallel > 1,
        "trainer.sequence_parallel=true spreads tokens over tensor-parallel ranks; set trainer.tensor_parallel above 1 or leave it false",
    )
    _require(config.rollout.sleep_level in (1, 2), f"rollout.sleep_level={config.rollout.sleep_level} is not known; it is 1 or 2")
    _require(
        config.rollout.sleep_level == 2 or config.placement == "colocated",
        f"rollout.sleep_level={config.rollout.sleep_level} has no effect with placement=split, where engines never sleep; set one of them",
    )
    _require(
        config.trainer.virtual_pipeline == 1 or config.trainer.pipeline_parallel > 1,
        f"trainer.virtual_pipeline={config.trainer.virtual_pipeline} interleaves pipeline stages, of which there is one; set it to 1, or "
        "trainer.pipeline_parallel above 1",
    )


def _check_checkpoints(config: Config) -> None:
    _require(bool(config.resume), "resume is empty; set never, auto, or the path of a checkpoint or a run")
    options, defaults = config.checkpoint, CheckpointOptions()
    for name in ("asynchronous", "keep_last", "keep_every", "keep_best"):
        value = getattr(options, name)
        _require(
            options.every > 0 or value == getattr(defaults, name),
            f"checkpoint.{name}={value} has no effect with checkpoint.every=0, which makes no checkpoints; set checkpoint.every",
        )
    for name in ("keep_every", "keep_best"):
        _require(
            options.keep_last > 0 or not getattr(options, name),
            f"checkpoint.{name}={getattr(options, name)} has no effect with checkpoint.keep_last=0, which keeps all; set one of them",
        )
    _require(
        not options.keep_every or options.keep_every % options.every == 0,
        f"checkpoint.keep_every={options.keep_every} is not a multiple of checkpoint.every={options.every}: set it to one",
    )
    _require(
        not options.keep_best or (config.evaluation.every > 0 and options.every % config.evaluation.every == 0),
        f"checkpoint.keep_best={options.keep_best} needs an accuracy at each checkpoint: set evaluation.every so that it divides "
        f"checkpoint.every={options.every}",
    )


def check_rewards(data: DataOptions, server_reward: str = "") -> None:
    """Refuse options of rewards that cannot work or have no effect.

    server_reward: the reward that the server of `data.reward=remote` must use; its options are then rules for the server.
    """
    names = RewardChoice(data).names | {server_reward} - {""}
    for name, options, limit_s, what in (
        ("code", data.code, data.code.total_s, "total_s"),
        ("math", data.math, data.math.limit_s, "limit_s"),
        ("remote", data.service, data.service.give_up_s, "give_up_s"),
    ):
        section = "service" if name == "remote" else name
        changed = next((f.name for f in fields(options) if getattr(options, f.name) != getattr(type(options)(), f.name)), "")
        if name not in names:
            _require(
                not changed, f"data.{section}.{changed} has no effect with data.reward={data.reward or 'empty'}; set data.reward={name}"
            )
            continue
        options.check(f"data.{section}.")
        _require(
            data.reward_timeout_s > limit_s,
            f"data.reward_timeout_s={data.reward_timeout_s:g} must be above data.{section}.{what}={limit_s:g}, after which grading ends by "
            "itself; raise it",
        )
    for key, users in (
        ("format_tags", {"format"}),
        ("repetition_ngram", {"repetition"}),
        ("reward_wrong_score", {"code", "math", "remote"}),
    ):
        value = getattr(data, key)
        _require(
            bool(names & users) or value == getattr(DataOptions(), key),
            f"data.{key}={value} has no effect without the reward {' or '.join(sorted(users))}; choose it in data.rewards",
        )
    _require(data.reward_wrong_score < 1, f"data.reward_wrong_score={data.reward_wrong_score:g} must be below 1, that of a right response")
    choices = ("stop", "score")
    _require(
        data.reward_on_error in choices,
        f"data.reward_on_error={data.reward_on_error} is not known; {nearest(data.reward_on_error, choices)}",
    )
    _require(data.reward_memory_gib >= 0, f"data.reward_memory_gib={data.reward_memory_gib:g} must not be negative; set 0 for no limit")


def _path(config: Config, section: object) -> str:
    return next((f"{f.name}." for f in fields(config) if getattr(config, f.name) is section), "")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _apply(values: dict, override: str) -> None:
    """Set one `key.path=value` in the nested mapping."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r} is not of the form key.path=value")
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {section} is not a section of keys")
    try:
        values[key] = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error


def _build(kind: type, given: dict, prefix: str):
    """The dataclass `kind` with the given values over its defaults. Every value must have the field's type; floats also take integers."""
    known = {f.name: f.type for f in fields(kind)}
    values = {}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"unknown key {prefix}{key}; {nearest(str(key), known, prefix)}")
        wanted = known[key]
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} is a section of keys, not the value {value!r}")
            values[key] = _build(wanted, value, f"{prefix}{key}.")
        else:
            values[key] = _typed(value, wanted, f"{prefix}{key}")
    return kind(**values)


def _typed(value: object, wanted: type, key: str) -> object:
    """Return the value as the type of a field. Raises UserError if it is none."""
    wrong = UserError(f"{key}={value!r} is not {_TYPE_NAMES.get(wanted) or _TYPE_NAMES[get_origin(wanted)]}")
    if get_origin(wanted) is list:
        (entry,) = get_args(wanted)
        entries = value if isinstance(value, list) else [value] if value != "" else []  # one entry may stand without brackets
        try:
            return [_typed(element, entry, key) for element in entries]
        except UserError:
            raise wrong from None
    if get_origin(wanted) is dict and type(value) is dict:
        _require(all(isinstance(name, str) for name in value), f"{key}={value!r} has a name that is not text")
        return {name: number_if_one(entry) for name, entry in value.items()}
    if wanted is str and type(value) is date:  # YAML reads 2024-08-01 as one
        value = value.isoformat()
    if wanted is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not wanted or (wanted is float and not math.isfinite(value)):
        raise wrong
    return value
