"""The plan of an evaluation, made from the command line: its settings, and the record that its output directory must match."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import build
from megatron_aspo.common.recipe_values import flatten, with_overrides
from megatron_aspo.evaluation.options import EvalSettings, check_settings
from megatron_aspo.evaluation.protocols import find_protocol
from megatron_aspo.evaluation.resources import reward_workers
from megatron_aspo.rewards.service.rules import grading_rules
from megatron_aspo.tasks.options import DataOptions

HELD_OUT = "held_out"
"""Name of the protocol of a recipe's own held-out prompts, as they are evaluated during training."""
RECORD = "evaluation.json"
_NOT_OF_THE_PROTOCOL = ("data.eval_path", "data.reward_workers", "data.reward_resource")
"""Options, beside those of `engine`, that affect location and speed but not results."""


@dataclass(frozen=True)
class EvalPlan:
    protocol: str
    settings: EvalSettings
    changed: dict[str, Any]
    """Key path → value of the settings that differ from the protocol of that name."""
    server_rules: dict[str, Any] = field(default_factory=dict)
    """With data.reward=remote and a protocol: the rules by which the server must grade."""


def make_plan(protocol: str, recipe: dict[str, Any] | None, data: Sequence[str], overrides: Sequence[str]) -> EvalPlan:
    """Raises UserError for an unknown protocol or key, and for values that cannot be.

    recipe: settings of a recipe's own evaluations, for when no protocol is named. data: files that replace the protocol's.
    """
    values = find_protocol(protocol).settings() if protocol else recipe or {}
    if protocol or not recipe:
        values.setdefault("data", {}).setdefault("reward_workers", reward_workers())
    named = build(EvalSettings, values)
    files = [f"data.eval_path={json.dumps(list(data))}"] if data else []
    settings = _with_fewer_samples(build(EvalSettings, with_overrides(values, [*files, *overrides])), named, overrides)
    by_server = named.data.reward if protocol and settings.data.reward == "remote" else ""
    if by_server:
        service = build(EvalSettings, with_overrides(_with_patience(values, settings.data), [*files, *overrides])).data.service
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, service=service))
    check_settings(settings, by_server)
    before, after = flatten(dataclasses.asdict(named)), flatten(dataclasses.asdict(settings))
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


class EvalRecord:
    """OUT/evaluation.json, which describes the evaluation in the directory. A process that continues it must have the same values."""

    def __init__(self, directory: Path):
        self._path = directory / RECORD

    def read(self) -> dict[str, Any]:
        """Return the record; empty if there is none."""
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def agree(self, values: dict[str, Any], loose: Sequence[str] = ()) -> None:
        """Write the record, or compare with an existing one.

        loose: key paths below which a continuing process may differ. Raises UserError naming the first other value that differs.
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
        """Compare the record with `values` at the key paths of `keys`; loose and errors as for `agree`."""
        before, now = flatten(self.read()), flatten(json.loads(json.dumps(values)))
        for key in sorted(flatten(keys)):
            if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in loose):
                raise UserError(
                    f"{self._path.parent} holds an evaluation with {key}={before.get(key)}, not {now.get(key)}; give the same values to go "
                    "on with it, or another --out"
                )
