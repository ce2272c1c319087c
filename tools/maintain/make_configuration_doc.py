#!/usr/bin/env python
"""Write docs/configuration.md, the table of every option, and docs/recipe.schema.json, with which editors complete recipes.

    python tools/maintain/make_configuration_doc.py

Both are read from the fields (types, defaults, bounds, docstrings) and from the signatures of the policy losses. A test
checks that both are current.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.commands.config import recipe_schema  # noqa: E402
from megatron_aspo.common.option_docs import meanings  # noqa: E402
from megatron_aspo.common.options import Choice, Condition, Rule, default_of, option_fields  # noqa: E402
from megatron_aspo.config import Config  # noqa: E402
from megatron_aspo.losses import registry  # noqa: E402
from megatron_aspo.losses.options import AlgorithmOptions  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "docs" / "recipe.schema.json"
HEADER = """# Configuration

<!-- Written by tools/maintain/make_configuration_doc.py; do not edit. -->

Every option of a recipe, with its default, what it means and, at the end of the meaning, which values are valid. A value has the type of
the default: a whole number for `100`, any number for `0.2`, true or false for `false`, a mapping for `{}`, text for a word or "empty". On
the command line an option is `section.name=value`, such as `optimizer.lr=2e-5`. [recipes.md](recipes.md) explains recipes, overrides and
presets.

[recipe.schema.json](recipe.schema.json) says the same to editors, which then complete and check a recipe as it is written; the first line
of each recipe in `examples/recipes` names it. `megatron-aspo config --schema` prints it.

Rules that join several options, such as "`placement=colocated` needs at least as many training ranks as engine devices", are not listed
here. `megatron-aspo plan RECIPE` checks them and starts nothing; every refusal names the rule and the cure.

The page is generated from the fields and the docstrings below them by
`python tools/maintain/make_configuration_doc.py`, and a test checks that it is current.
"""
COLUMNS = "| option | default | meaning |\n|---|---|---|\n"
WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def sections(section: str = "", kind: type = Config) -> Iterator[tuple[str, type, dict[str, FieldInfo]]]:
    """Yield (section, its class, its own fields by name) for the top level, whose section is empty, and for each section in order."""
    fields = option_fields(kind)
    yield section, kind, {name: field for name, field in fields.items() if not is_dataclass(field.annotation)}
    for name, field in fields.items():
        if is_dataclass(field.annotation):
            yield from sections(f"{section}.{name}" if section else name, field.annotation)


def bounds(field: FieldInfo) -> str:
    """Return the rule for an option alone, in a few words; empty when there is none. Choices are listed as "one of …"."""
    rules = []
    for mark in field.metadata:
        if isinstance(mark, Choice):
            rules.append("one of " + ", ".join(f"`{value}`" for value in sorted(mark.values, key=str)))
        elif isinstance(mark, Condition):
            rules = [mark.words.removeprefix("must be ")]
        else:
            rules += [f"{word} {getattr(mark, bound):g}" for bound, word in WORDS.items() if hasattr(mark, bound)]
    if (words := [mark.words for mark in field.metadata if isinstance(mark, Rule) and not mark.bound]) and "[" in words[0]:
        return words[0].removeprefix("must be ")
    return " and ".join(rules)


def shown(value: Any) -> str:
    """Return a default as YAML would write it."""
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return "empty" if value == "" else f"`{value}`"


def meaning_with_rule(meaning: str, rule: str) -> str:
    """Return the meaning of an option with its rule as the last sentence, except for valid words that the meaning already names in code."""
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", meaning))))
    if not rule or (rule.startswith("one of ") and named.issuperset(re.findall(r"`(\w+)`", rule))):
        return meaning
    unbroken = re.sub(r" (?=\d)", "\u00a0", rule)  # a number stays on the line of its "above"
    return f"{meaning} {unbroken[0].upper()}{unbroken[1:]}."


def loss_option_rows() -> Iterator[str]:
    """Yield the rows of the options of the built-in policy losses, which are keys of `algorithm` too, from the signatures of the losses."""
    for name, readers in registry.builtin_options().items():
        shared = registry.shared_defaults()[name]
        others = [f"`{option.default}` (`{loss}`)" for loss, option in readers.items() if option.default != shared]
        option = next(iter(readers.values()))
        rule = bounds(FieldInfo.from_annotation(registry.option_type(option)))
        yield f"| `algorithm.{name}` | {', '.join([shown(shared), *others])} | {meaning_with_rule(registry.option_meaning(name), rule)} |\n"


def page() -> str:
    """Return the whole page."""
    titles = {section: f"`{section}`" if section else "Top level" for section, _, _ in sections()}
    contents = [f"- [{title}](#{section.replace('.', '') or 'top-level'})\n" for section, title in titles.items()]
    parts = [HEADER, "\n", *contents]
    for section, kind, found in sections():
        parts.append(f"\n## {titles[section]}\n\n{COLUMNS}")
        for name, field in found.items():
            key = f"{section}.{name}" if section else name
            meaning = meanings(kind).get(name, "").replace("|", "\\|")
            parts.append(f"| `{key}` | {shown(default_of(kind, name))} | {meaning_with_rule(meaning, bounds(field))} |\n")
        if kind is AlgorithmOptions:
            parts += loss_option_rows()
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(recipe_schema(), encoding="utf-8")
