"""The plan of an evaluation, made from the command line: its settings, and the record that its output directory must match."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, build, check_rewards, load_config
from megatron_aspo.data.options import DataOptions
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.evaluation.protocols import find_protocol
from megatron_aspo.evaluation.resources import reward_workers
from megatron_aspo.evaluation.target import Target
from megatron_aspo.rewards.service.rules import grading_rules

HELD_OUT = "held_out"
"""Name of the protocol of a recipe's own held-out prompts, as they are evaluated during training."""
RECORD = "evaluation.json"
_NOT_OF_THE_PROTOCOL = ("data.eval_path", "data.reward_workers", "data.reward_resource")
"""Options that say where and how fast, beside those of `engine`."""


@dataclass(frozen=True)
class EvalPlan:
    protocol: str
    settings: EvalSettings
    changed: dict[str, Any]
    """Key path → value of what differs from the protocol of that name."""
    server_rules: dict[str, Any] = field(default_factory=dict)
    """With data.reward=remote and a protocol: the rules by which the server must grade."""


def make_plan(protocol: str, recipe: Config | None, data: Sequence[str], overrides: Sequence[str]) -> EvalPlan:
    """Raises UserError for an unknown protocol or key, and for values that cannot be.

    recipe: whose held-out prompts are asked when no protocol is named. data: files that replace the protocol's.
    """
    if protocol:
        values = find_protocol(protocol).settings()
    elif recipe:
        values = recipe_settings(recipe)
    else:
        values = {}
    if protocol or not recipe:
        values.setdefault("data", {}).setdefault("reward_workers", reward_workers())
    named = build(EvalSettings, values, ())
    files = [f"data.eval_path={json.dumps(list(data))}"] if data else []
    settings = build(EvalSettings, values, [*files, *overrides])
    settings = _with_fewer_samples(settings, named, overrides)
    by_server = named.data.reward if protocol and settings.data.reward == "remote" else ""
    if by_server:
        service = build(EvalSettings, _with_patience(values, settings.data), [*files, *overrides]).data.service
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, service=service))
    settings.check()
    check_rewards(settings.data, by_server)
    before, after = _flat(dataclasses.asdict(named)), _flat(dataclasses.asdict(settings))
    changed = {key: value for key, value in after.items() if value != before.get(key)} if protocol or recipe else {}
    elsewhere = ("engine.", "data.service.") if by_server else ("engine.",)
    where = (*_NOT_OF_THE_PROTOCOL, "data.reward") if by_server else _NOT_OF_THE_PROTOCOL
    kept = {key: value for key, value in changed.items() if not key.startswith(elsewhere) and key not in where}
    rules = grading_rules(dataclasses.replace(settings.data, reward=by_server)) if by_server else {}
    return EvalPlan(protocol or (HELD_OUT if recipe else "own"), settings, kept, rules)


def _with_fewer_samples(settings: EvalSettings, named: EvalSettings, overrides: Sequence[str]) -> EvalSettings:
    """Return the settings with each k of the protocol that is more than the samples lowered to them, if the overrides lower them alone."""
    given = {override.partition("=")[0] for override in overrides}
    lowered = {}
    for name in ("pass_at", "majority_at"):
        if name not in given and settings.samples < named.samples:
            lowered[name] = sorted({min(k, settings.samples) for k in getattr(settings, name)})
    return dataclasses.replace(settings, **lowered)


def _with_patience(values: dict[str, Any], data: DataOptions) -> dict[str, Any]:
    """Return the values with a request to the server that may take as long as grading by them does, unless it may take less than that."""
    longest = max(data.code.total_s, data.math.limit_s)
    spare = (data.reward_timeout_s - longest) / 3
    if spare <= 0:
        return values
    service = {"attempt_s": longest + spare, "give_up_s": longest + 2 * spare}
    return values | {"data": values["data"] | {"service": service}}


def recipe_of(target: Target, recipe: Path | None) -> Config | None:
    """The recipe that is named, else that of the run which the target belongs to, if any."""
    path = recipe or (target.run / "config.yaml" if target.run else None)
    return load_config(path) if path else None


def recipe_settings(config: Config) -> dict[str, Any]:
    """Return the values with which a run of the recipe evaluates its held-out prompts."""
    if not config.evaluation.draws:
        raise UserError(f"the recipe {config.name} has evaluation.draws=0: it evaluates nothing; name a --protocol, or set samples")
    engine = {name: getattr(config.rollout, name) for name in ("engines", "tensor_parallel", "dtype", "max_running_requests")}
    engine |= {name: getattr(config.rollout, name) for name in ("kv_cache_gib", "threads")}
    return {
        "task": config.task,
        "samples": config.evaluation.draws,
        "temperature": config.evaluation.temperature,
        "max_response_tokens": config.rollout.max_response_tokens,
        "pass_at": [config.evaluation.draws],
        "seed": config.seed,
        "deterministic": config.deterministic,
        "data": dataclasses.asdict(config.data),
        "engine": engine,
    }


class EvalRecord:
    """OUT/evaluation.json: what the responses in the directory belong to. A second process that goes on must agree with it."""

    def __init__(self, directory: Path):
        self._path = directory / RECORD

    def read(self) -> dict[str, Any]:
        """Return the record; empty if there is none."""
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def agree(self, values: dict[str, Any], loose: Sequence[str] = ()) -> None:
        """Write the record, or compare with the one that is there.

        loose: key paths below which a process that goes on may differ. Raises UserError naming the first other value that differs.
        """
        written = self.read()
        values = json.loads(json.dumps(values))
        if not written:
            with disk_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            return
        self.compare(values, written | values, loose)

    def compare(self, values: dict[str, Any], keys: dict[str, Any], loose: Sequence[str] = ()) -> None:
        """Compare the record with values. keys: what is compared, by its key paths; loose and errors as for `agree`."""
        before, now = _flat(self.read()), _flat(json.loads(json.dumps(values)))
        for key in sorted(_flat(keys)):
            if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in loose):
                raise UserError(
                    f"{self._path.parent} holds an evaluation with {key}={before.get(key)}, not {now.get(key)}; give the same values to go "
                    "on with it, or another --out"
                )


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, of key paths."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
