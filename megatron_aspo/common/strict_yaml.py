"""YAML of a recipe, read by PyYAML's safe loader, which here refuses a duplicate key instead of silently keeping the last one."""

import re
from collections.abc import Hashable

import yaml


def load_recipe_yaml(text: str) -> object:
    """Return the plain values of one YAML document. Raises yaml.YAMLError, also for a duplicate key in a mapping."""
    return yaml.load(text, _Loader)  # safe: _Loader derives from SafeLoader


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} occurs twice, in lines {lines[key.value]} and {key.start_mark.line + 1}; keep one")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def number_if_one(value: object) -> object:
    """Return a float for text such as "1e-6", which YAML reads as a string because it has no point; return other values unchanged."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value
