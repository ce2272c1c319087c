"""Read the options and the declaration of a policy loss from its source, without importing it.

Importing a loss imports torch, which takes seconds; `--help` and `plan` need neither. A test compares what is read here with what
`inspect` finds in the imported function.
"""

import ast
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_aspo.losses.declaration import Declaration

ROOT, ROOT_PACKAGE = Path(__file__).parents[2], "megatron_aspo"
"""Directory of this package's source, however it was installed, and the package's name."""
REQUIRED = object()
"""Default of an option that has none."""


@dataclass(frozen=True)
class LossOption:
    default: Any
    """REQUIRED where the signature gives none."""
    annotation: str
    """As written in the signature; empty without one."""
    meaning: str
    """From the `Args:` of the docstring; empty if it does not mention the option."""


@dataclass(frozen=True)
class LossSignature:
    options: dict[str, LossOption]
    """Options by name, in the order of the signature."""
    declaration: Declaration | None
    """None if the function is not marked by `declares`."""
    documentation: str
    """The docstring without its `Args:`, dedented."""


def read_signature(path: str) -> LossSignature | None:
    """Return the signature of the function at `package.module:function`.

    Return None where the source does not tell: no such file on the Python path or in the working directory, no plain `def` at the top of
    the module, another decorator than `declares`, a default or declaration that is not a literal, or `**options`.
    """
    module, _, function = path.partition(":")
    relative = Path(*module.split("."))
    for directory in [ROOT] if relative.parts[0] == ROOT_PACKAGE else [*sys.path, os.getcwd()]:
        for file in (Path(directory) / relative.with_suffix(".py"), Path(directory) / relative / "__init__.py"):
            if file.is_file():
                return _read(file, function, file.stat().st_mtime_ns)
    return None


@lru_cache
def _read(file: Path, name: str, modified: int) -> LossSignature | None:
    try:
        module = ast.parse(file.read_text(encoding="utf-8"))
        found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
        return _signature(found[-1]) if found else None
    except (OSError, SyntaxError, TypeError, ValueError):  # the last two: a default or declaration that is not a literal, or not known
        return None


def _signature(function: ast.FunctionDef) -> LossSignature | None:
    arguments = function.args
    declared = [d for d in function.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "declares"]
    positional = [*arguments.posonlyargs, *arguments.args]
    if arguments.kwarg or arguments.vararg or not positional or len(declared) < len(function.decorator_list):
        return None
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    named = list(zip([*positional, *arguments.kwonlyargs], defaults, strict=True))[1:]
    text, _, args = (ast.get_docstring(function) or "").partition("\nArgs:\n")
    meanings = _meanings(args)
    return LossSignature(
        options={
            argument.arg: LossOption(
                default=REQUIRED if default is None else ast.literal_eval(default),
                annotation=ast.unparse(argument.annotation) if argument.annotation else "",
                meaning=meanings.get(argument.arg, ""),
            )
            for argument, default in named
        },
        declaration=Declaration(**{str(word.arg): ast.literal_eval(word.value) for word in declared[0].keywords}) if declared else None,
        documentation=text.strip(),
    )


def _meanings(args: str) -> dict[str, str]:
    """Return the meaning of each option from the lines under `Args:`, of the form `    name: meaning`, continued with more indentation."""
    meanings: dict[str, str] = {}
    for line in args.splitlines():
        name, colon, meaning = line.strip().partition(": ")
        if colon and name.isidentifier() and not line.startswith(" " * 5):
            meanings[name] = meaning
        elif meanings:
            meanings[next(reversed(meanings))] += f" {line.strip()}"
    return meanings
