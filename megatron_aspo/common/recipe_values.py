"""The nested values of a recipe before they have types: read from YAML, with `key.path=value` over them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.strict_yaml import load_recipe_yaml


def read_recipe(recipe: Path) -> dict[str, Any]:
    """Return the values of a recipe. Raises UserError if it cannot be read or is no mapping."""
    try:
        text = recipe.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe {recipe}; examples are in examples/recipes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {recipe} cannot be read: {error}") from error
    try:
        values = load_recipe_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {recipe} must be a mapping of keys to values")
    return values


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values with each `key.path=value` set. Raises UserError for one that is not of that form."""
    result = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"override {override!r} is not of the form key.path=value")
        *sections, key = path.split(".")
        innermost = result
        for section in sections:
            innermost = innermost.setdefault(section, {})
            if not isinstance(innermost, dict):
                raise UserError(f"override {override!r}: {section} is not a section of keys")
        try:
            innermost[key] = yaml.safe_load(text) if text else ""
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"override {override!r}: the value is not valid YAML") from error
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, of key paths."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both nested mappings in one; where both have a value, that of `above`."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping with its nested mappings copied: YAML's anchors share them."""
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}
