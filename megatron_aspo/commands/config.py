"""`megatron-aspo config --schema`: the JSON Schema of a recipe, by which editors complete and check one."""

import json
from typing import Any

from pydantic import TypeAdapter

from megatron_aspo.common.option_docs import json_schema
from megatron_aspo.config import Config
from megatron_aspo.losses import registry


def recipe_schema() -> str:
    """Return the JSON Schema of a recipe as text. It holds types, bounds and choices; rules that join options only `plan` checks."""
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Recipe of megatron-aspo"}
    schema = json_schema(Config)
    schema["properties"]["algorithm"]["properties"] |= _loss_options()
    return json.dumps(head | schema, indent=1, ensure_ascii=False) + "\n"


def _loss_options() -> dict[str, Any]:
    """Return the schema of each option of the built-in losses, as a key of `algorithm`. Its default depends on the loss."""
    return {
        name: {"description": registry.option_meaning(name)} | TypeAdapter(registry.option_type(option)).json_schema()
        for name, readers in registry.builtin_options().items()
        for option in [next(iter(readers.values()))]
    }


def print_schema() -> None:
    print(recipe_schema(), end="")
