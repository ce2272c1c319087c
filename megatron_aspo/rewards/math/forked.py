"""math-verify in a forked process, for notations that the exact comparison cannot read: sums, integrals, limits and the like.

The process is killed at its limit, whatever blocks it: math-verify's own limits work only in a main thread, and cannot stop one long
operation on integers.

No part of a text is evaluated as code. math-verify's ANTLR grammar alone reads a text; its other reader passes it to SymPy's `parse_expr`,
which evaluates it, and is not used. The grammar passes numbers there too (`sympy.Number("10")`), so in this process `parse_expr` is
replaced by a reader of numbers. If anything still compiles a text, the process ends without a verdict.
"""

import importlib
import os
import pkgutil
import re
import resource
import select
import signal
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

_YES, _NO, _EVALUATED = b"y", b"n", 3
_NUMBER = re.compile(r"\s*[-+]?(\d+|\d+\.\d*|\.\d+)\s*", re.ASCII)
_MEMORY_BYTES = 2 << 30
"""Address space that a comparison may use beyond that of the process."""


@cache
def _library() -> tuple[ModuleType, ModuleType]:
    """Import the modules, and those that SymPy would import on demand: some of these compile code of their own when they load."""
    import latex2sympy2_extended
    import math_verify.grader
    import sympy.parsing.sympy_parser

    for part in ("calculus", "concrete", "functions", "integrals", "series", "sets", "simplify", "solvers"):
        for module in pkgutil.walk_packages([f"{sympy.__path__[0]}/{part}"], f"sympy.{part}."):
            if not {"tests", "benchmarks"} & set(module.name.split(".")):
                importlib.import_module(module.name)
    math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # else it would warn at each start that its own limit is off
    return latex2sympy2_extended, math_verify.grader


def math_verify_equal(answer: str, gold: str, limit_s: float) -> tuple[bool, str]:
    """Return whether math-verify finds two LaTeX formulas equal, in either order, and a reason. Takes little more than limit_s seconds."""
    _library()  # before the fork: importing it takes a second
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _compare_and_exit(answer, gold, writing, limit_s)
    os.close(writing)
    try:
        ready = select.select([reading], [], [], limit_s)[0]
        byte = os.read(reading, 1) if ready else b""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if byte == _YES:
        return True, "equal by math-verify"
    if byte == _NO:
        return False, "different by math-verify"
    if not ready:
        return False, f"math-verify took more than {limit_s:g} s"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _EVALUATED:
        return False, "math-verify would have evaluated the answer as code"
    return False, "math-verify cannot read it"


def _compare_and_exit(answer: str, gold: str, pipe: int, limit_s: float) -> None:
    """Write the verdict and exit, in the forked process, without the parent's clean-up."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 2))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
        sys.modules["sympy.parsing.sympy_parser"].parse_expr = _read_number  # pyright: ignore[reportAttributeAccessIssue]  a module
        sys.addaudithook(_refuse_to_compile)
        parsed = [_parse(text) for text in (answer, gold)]
        equal = any(_verify(*pair) for pair in (parsed, parsed[::-1]))
        os.write(pipe, _YES if equal else _NO)
        os._exit(0)
    except BaseException:
        os._exit(1)


def _refuse_to_compile(event: str, arguments: tuple) -> None:
    """Audit hook that ends the process. Imported modules have a file's name; evaluated texts have a name in angle brackets."""
    if event == "compile" and arguments[0] is not None and str(arguments[1]).startswith("<"):
        os._exit(_EVALUATED)


def _read_number(text: str, *_: object, **__: object) -> object:
    """Replace SymPy's `parse_expr`, for numbers only."""
    import sympy

    if not _NUMBER.fullmatch(text):
        raise ValueError("no number")
    return sympy.Float(text.strip()) if "." in text else sympy.Integer(int(text))


def _parse(text: str) -> object:
    latex, grader = _library()
    return latex.latex2sympy(text, is_real=not grader.should_treat_as_complex(text), convert_degrees=False, normalization_config=None)


def _verify(gold: object, answer: object) -> bool:
    try:
        return bool(_library()[1].verify(gold, answer, timeout_seconds=None))
    except Exception:
        return False
