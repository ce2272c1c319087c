"""Import of custom functions, named in a configuration as `package.module:function`, and of this package in child processes."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError

_MISSING = object()
_LONGEST_MESSAGE = 600
"""Maximum number of characters of an exception that are shown."""


def child_python_path() -> str:
    """Return PYTHONPATH for a child process, with the directory of this package first."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))))


def load_function(path: str, key: str, allow_async: bool = False) -> Callable:
    """Return the function at `path`; modules in the working directory are found too. `key` names the setting in errors.

    Raises UserError if it cannot be imported, is not a function, or is async although `allow_async` is false.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise UserError(f"{key}={path} is not of the form package.module:function")
    # Appended, so that a file in the working directory never hides an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, _MISSING)
    except BaseException as error:  # the module's own code may raise anything, and may call sys.exit()
        raise UserError(f"{key}={path}: importing {module_name} raised {one_line(error)}; correct the path or the module") from error
    if function is _MISSING:
        file = getattr(module, "__file__", None) or "no file"
        raise UserError(f"{key}={path}: {module_name} ({file}) has no {function_name}; correct the name")
    if not callable(function):
        raise UserError(f"{key}={path} is a {type(function).__name__}, expected a function")
    if inspect.iscoroutinefunction(function) and not allow_async:
        raise UserError(f"{key}={path} is an async function, expected a plain one; drop the async")
    return function


def check_call(function: Callable, path: str, key: str, signature: str, /, *arguments: Any, **options: Any) -> None:
    """Raise UserError unless `function` accepts these arguments; `signature` describes the expected call in words."""
    try:
        inspect.signature(function).bind(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}={path} cannot be called as {signature} ({error}); change its parameters") from error


def one_line(error: BaseException) -> str:
    """Return an exception's type and text on one line, truncated; never raises, whatever its `__str__` does."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as other:
        text = f"its text cannot be shown ({type(other).__name__})"
    return " ".join((f"{name}: {text}" if text else name).split())[:_LONGEST_MESSAGE]
