"""YAML of a recipe: PyYAML's safe loader, which here refuses a key that occurs twice instead of keeping the last one silently."""

import re
from collections.abc import Hashable

import yaml


def load_recipe_yaml(text: str) -> object:
    """Return the plain values of one YAML document. Raises yaml.YAMLError, also for a key that occurs twice in a mapping."""
    return yaml.load(text, _Loader)  # a safe loader: see its base


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
    """YAML reads 1e-6, without a point, as text; here it is a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value
