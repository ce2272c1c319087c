"""The JSON Schema of a recipe: current, named by every recipe of the examples, and of one mind with `load_config`."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_aspo.commands.config import recipe_schema
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.strict_yaml import number_if_one
from megatron_aspo.config import load_config, to_yaml

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "recipe.schema.json"
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
HEAD = {"model": "m", "task": "single_digit_addition"}


def complaints(values: Any) -> list[str]:
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return [error.json_path for error in validator.iter_errors(values)]


def with_numbers(values: Any) -> Any:
    """Return the values as editors read them: 1e-6 is a number in YAML 1.2."""
    if isinstance(values, dict):
        return {key: with_numbers(value) for key, value in values.items()}
    return number_if_one(values)


def test_the_committed_schema_is_current_and_a_schema():
    text = SCHEMA.read_text(encoding="utf-8")
    assert text == recipe_schema(), "run .venv/bin/python tools/maintain/make_configuration_doc.py"
    jsonschema.Draft7Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_examples_names_the_schema_in_its_first_line_and_fits_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert name != first and (path.parent / name).resolve() == SCHEMA
    assert not complaints(with_numbers(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert not complaints(yaml.safe_load(to_yaml(load_config(path))))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "steps", 0),
        ("", "steps", 1.5),
        ("", "placement", "collocated"),
        ("", "modell", "m"),
        ("trainer", "tensor_parallel", 0),
        ("trainer", "fp8", "e5m2"),
        ("trainer", "sequence_parallel", "yes"),
        ("optimizer", "beta1", 1.0),
        ("algorithm", "clip_low", 1.5),
        ("algorithm", "dual_clip_neg", 1.0),
        ("data", "path", 3),
        ("data", "reward_wrong_score", 1.0),
        ("rollout", "sleep_level", 3),
        ("rollout", "temperature", 0.001),
    ],
)
def test_what_the_schema_refuses_load_config_refuses_at_the_same_key(tmp_path, section, key, value):
    values = HEAD | ({section: {key: value}} if section else {key: value})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert complaints(values) in ([f"$.{section}.{key}"], [f"$.{key}"], ["$"])
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "recipe.yaml")
    assert f"{section}.{key}".removeprefix(".") in str(refused.value)


@pytest.mark.parametrize("data", [{"path": "one.jsonl"}, {"path": ["one.jsonl", "two.jsonl"]}, {"weights": [1, 0.5]}], ids=str)
def test_one_entry_of_a_list_may_be_without_brackets(data):
    assert not complaints(HEAD | {"data": data})


def test_words_are_offered_where_others_are_valid_too():
    assert not complaints(HEAD | {"algorithm": {"policy_loss": "my_losses:mine"}, "resume": "runs/a"})
    offered = json.loads(SCHEMA.read_text())["properties"]["algorithm"]["properties"]["policy_loss"]["anyOf"][0]["enum"]
    assert {"aspo", "ppo_clip", "gspo"} <= set(offered)
