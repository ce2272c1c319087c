"""Names that programs use without importing them: LeetCode and LiveCodeBench prepend these imports to every program."""

import builtins
import importlib
import opcode
import sys
from types import CodeType

MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools", "functools"),
    *("operator", "io", "sys", "json", "typing"),
)
"""Their public names come first, a later module's over an earlier one's, then the modules themselves; builtins are never replaced."""


def add_missing_names(namespace: dict[str, object], code: CodeType) -> dict[str, object]:
    """Add the undefined names that `code` uses and MODULES has to `namespace`; return them. Imports nothing if there are none."""
    loaded, stored = set(), set()
    collect_names(code, loaded, stored)
    missing = loaded - stored - namespace.keys() - set(dir(builtins))
    if not missing:
        return {}
    added = {name: value for name, value in _prelude().items() if name in missing}
    namespace.update(added)
    return added


def _prelude() -> dict[str, object]:
    modules = {name: importlib.import_module(name) for name in MODULES}
    names: dict[str, object] = {}
    for module in modules.values():
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        names.update((name, getattr(module, name)) for name in public)
    return {**names, **modules}


def collect_names(code: CodeType, loaded: set[str], stored: set[str]) -> None:
    """Collect the global names that the code object and those inside it read (`loaded`) and assign (`stored`)."""
    names = {opcode.opmap[name]: name for name in ("LOAD_NAME", "LOAD_GLOBAL", "STORE_NAME", "STORE_GLOBAL")}
    extension, instructions = 0, code.co_code
    for offset in range(0, len(instructions), 2):
        operation, argument = instructions[offset], instructions[offset + 1] | extension << 8
        extension = argument if operation == opcode.EXTENDED_ARG else 0
        if operation in names:
            # From Python 3.11 on, the lowest bit of LOAD_GLOBAL is a flag.
            position = argument >> 1 if names[operation] == "LOAD_GLOBAL" and sys.version_info >= (3, 11) else argument
            (loaded if names[operation].startswith("LOAD") else stored).add(code.co_names[position])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            collect_names(constant, loaded, stored)
