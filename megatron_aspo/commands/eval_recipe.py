"""The recipe of an evaluation, and the settings with which its runs evaluate their held-out prompts."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config
from megatron_aspo.evaluation.target import Target


def recipe_of(target: Target, recipe: Path | None) -> Config | None:
    """Return the named recipe, else that of the target's run, if any."""
    path = recipe or (target.run / "config.yaml" if target.run else None)
    return load_config(path) if path else None


def recipe_settings(config: Config) -> dict[str, Any]:
    """Return the values of EvalSettings with which a run of the recipe evaluates. Raises UserError if it evaluates nothing."""
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
