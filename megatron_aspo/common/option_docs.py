"""The meaning of options, read from the docstrings below their fields, and the JSON Schema of a class of options."""

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from megatron_aspo.common.options import default_of, option_fields


@cache
def meanings(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a class of options and of its bases, on one line, by the field's name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for declared, below in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                continue
            if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
                found[declared.target.id] = " ".join(str(below.value.value).split())
    return found


def json_schema(kind: type) -> dict[str, Any]:
    """Return the JSON Schema of a class of options: types, bounds, choices, defaults and meanings, sections in their place."""
    schema = TypeAdapter(kind).json_schema()
    return _described(kind, schema, schema.get("$defs", {}))


def _described(kind: type, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    properties = {}
    for name, field in option_fields(kind).items():
        meaning = {"description": meanings(kind)[name]} if name in meanings(kind) else {}
        section: Any = field.annotation
        if isinstance(section, type) and is_dataclass(section):
            properties[name] = meaning | _described(section, definitions[section.__name__], definitions)
            continue
        value = {key: part for key, part in schema["properties"][name].items() if key not in ("title", "default")}
        if value.get("type") == "array":  # one entry may be without brackets
            value = {"anyOf": [value, value["items"]]}
        if "anyOf" in value:
            value.pop("type", None)
        properties[name] = meaning | value | {"default": default_of(kind, name)}
    return {"type": "object", "properties": properties, "additionalProperties": False}
