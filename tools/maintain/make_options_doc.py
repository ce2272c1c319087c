#!/usr/bin/env python
"""Write docs/options.md, the table of every option, from the options' dataclasses and the docstrings of their fields.

    python tools/maintain/make_options_doc.py

The bounds and the valid words of an option are those that the configuration itself enforces: each option is set to several values that may
be wrong, and the rule is read off the error message. A test checks that the page is current.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.common.errors import UserError  # noqa: E402
from megatron_aspo.config import Config, check  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
HEADER = """# Options

<!-- Written by tools/maintain/make_options_doc.py; do not edit. -->

Every option of a recipe, with its default, what it means and, at the end of the meaning, which values are valid. A value has the type of
the default: a whole number for `100`, any number for `0.2`, true or false for `false`, a mapping for `{}`, text for a word or "empty". On
the command line an option is `section.name=value`, such as `optimizer.lr=2e-5`. [recipes.md](recipes.md) explains recipes, overrides and
presets.

Rules that join several options, such as "`placement=colocated` needs at least as many training ranks as engine devices", are not listed
here. `megatron-aspo plan RECIPE` checks them and starts nothing; every refusal names the rule and the cure.

The page is generated from the docstrings of the fields by
`python tools/maintain/make_options_doc.py`, and a test checks that it is current.
"""
COLUMNS = "| option | default | meaning |\n|---|---|---|\n"
PROBES: dict[type, tuple] = {int: (-1, 0, 3), float: (-1.0, 0.0, 0.001, 2.0), str: ("?",)}
"""Values that an option of a type may refuse."""


def options() -> Iterator[tuple[str, type, list[tuple[Field, Any]]]]:
    """Yield (section, its dataclass, [(field, default)]) for the top level, whose section is empty, and for each section in order."""
    yield from _options("", Config())


def _options(section: str, options: Any) -> Iterator[tuple[str, type, list[tuple[Field, Any]]]]:
    values = [(field, getattr(options, field.name)) for field in fields(options)]
    yield section, type(options), [(field, value) for field, value in values if not is_dataclass(value)]
    for field, value in values:
        if is_dataclass(value):
            yield from _options(f"{section}.{field.name}" if section else field.name, value)


def with_value(options: Any, path: list[str], value: Any) -> Any:
    """Return the options with another value at the path of keys."""
    if not path:
        return value
    return replace(options, **{path[0]: with_value(getattr(options, path[0]), path[1:], value)})


@cache
def docstrings(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for declared, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[declared.target.id] = " ".join(str(below.value.value).split())
    return found


def refusal(section: str, name: str, value: Any) -> str:
    """Return the configuration's error for this value alone, empty when it accepts it."""
    config = Config(model="model", task="dataset")
    try:
        check(with_value(config, [*filter(None, section.split(".")), name], value))
    except UserError as error:
        return str(error)
    return ""


def bounds(section: str, field: Field) -> str:
    """Return the rule for an option alone, in the words of its refusals; empty when there is none.

    Valid words are listed as "one of …".
    """
    key, rules = f"{section}.{field.name}" if section else field.name, []
    for value in PROBES.get(field.type, ()):
        message = refusal(section, field.name, value)
        if not message.startswith(f"{key}={value} "):
            continue  # the rule of another option, or of several
        if found := re.search(r" must (?:be )?(.+?)(?:: |; |, the |$)", message):
            rules.append(found[1].replace("not be negative", "at least 0").replace("greater than", "above"))
        elif found := re.search(r" is not known; (?:valid: (?P<words>[^;]+)|it is (?P<rule>[^;]+))", message):
            rules.append(found["rule"] or "one of " + re.sub(r"\w+", lambda word: f"`{word[0]}`", found["words"]))
    tightest = [rule for rule in dict.fromkeys(rules) if rule not in ("above 0", "at least 0")]
    return "; ".join(tightest if any("at least" in rule for rule in tightest) else dict.fromkeys(rules))


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


def page() -> str:
    """Return the whole page."""
    titles = {section: f"`{section}`" if section else "Top level" for section, _, _ in options()}
    contents = [f"- [{title}](#{section.replace('.', '') or 'top-level'})\n" for section, title in titles.items()]
    parts = [HEADER, "\n", *contents]
    for section, kind, found in options():
        parts.append(f"\n## {titles[section]}\n\n{COLUMNS}")
        for field, default in found:
            key = f"{section}.{field.name}" if section else field.name
            meaning = docstrings(kind).get(field.name, "").replace("|", "\\|")
            parts.append(f"| `{key}` | {shown(default)} | {meaning_with_rule(meaning, bounds(section, field))} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
