"""`megatron-aspo config --schema`: the JSON Schema of a recipe, by which editors complete and check one."""

import json

from megatron_aspo.common.option_docs import json_schema
from megatron_aspo.config import Config


def recipe_schema() -> str:
    """Return the JSON Schema of a recipe as text. It holds types, bounds and choices; rules that join options only `plan` checks."""
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Recipe of megatron-aspo"}
    return json.dumps(head | json_schema(Config), indent=1, ensure_ascii=False) + "\n"


def print_schema() -> None:
    print(recipe_schema(), end="")
