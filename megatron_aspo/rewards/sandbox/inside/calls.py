"""A program as a module whose functions are called from outside: one request per line on one pipe, one reply per line on another.

A request is `{"target": …, "attribute": …, "call": …, "args": […], "kwargs": {…}}`: the target is a global name, a reference number, or
null for the function under test, which is a method of a new `Solution()` if there is one, else global. A reply is `{"value": …}`, with
`"changed": [[position, value], …]` if a call that returned None changed its arguments, or `{"raised": [names of the exception's classes],
"text": …}`.
"""

import json
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from plain import from_json, to_json
from prelude import add_missing_names

TYPE_CHECKING = False  # as in typing, whose import takes 10 ms
if TYPE_CHECKING:
    from typing import Any


def serve(source: str, requests: Iterable[bytes], results: int) -> None:
    """Load the program, then answer until `requests` ends. An exception during loading, or an exit, ends the process."""
    answer = Answers(*_load(source))
    for line in requests:
        reply = json.dumps(answer(json.loads(line))).encode() + b"\n"
        while reply:
            reply = reply[os.write(results, reply) :]


def _load(source: str) -> tuple[ModuleType, dict[str, object]]:
    module = ModuleType("solution")
    module.__file__ = sys.argv[0]
    sys.modules["solution"] = module
    code = compile(source, module.__file__, "exec", dont_inherit=True)
    supplied = add_missing_names(module.__dict__, code)
    exec(code, module.__dict__)
    return module, supplied


class Answers:
    """Executes requests and keeps the objects to which it has given out references.

    supplied: names that the program did not define. They are not part of its answer: `print(add(1, 2))` defines no function `add`.
    """

    def __init__(self, module: ModuleType, supplied: dict[str, object]):
        self._module, self._supplied = module, supplied
        self._objects: list[Any] = []

    def __call__(self, request: dict) -> dict:
        try:
            return self._answer(request)
        except Exception as error:
            try:
                text = str(error)[:500]
            except Exception:
                text = ""
            return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}

    def _answer(self, request: dict) -> dict:
        target, attribute = request["target"], request["attribute"]
        if target is None:
            found = self._entry(attribute)
        else:
            found = self._objects[target] if isinstance(target, int) else self._global(target)
            found = getattr(found, attribute) if attribute else found
        if not request["call"]:
            return {"value": to_json(found, self._refer)}
        before = request["args"]
        args = [from_json(value, self._objects.__getitem__) for value in before]
        kwargs = {name: from_json(value, self._objects.__getitem__) for name, value in request["kwargs"].items()}
        value = found(*args, **kwargs)
        reply = {"value": to_json(value, self._refer)}
        if value is None:
            after = [to_json(value, self._refer) for value in args]
            reply["changed"] = [[position, value] for position, value in enumerate(after) if value != before[position]]
        return reply

    def _entry(self, name: str) -> "Any":
        solution = getattr(self._module, "Solution", None)
        return getattr(solution(), name) if solution is not None and hasattr(solution, name) else self._global(name)

    def _global(self, name: str) -> "Any":
        if name not in self._module.__dict__ or (name in self._supplied and self._module.__dict__[name] is self._supplied[name]):
            raise NameError(f"name {name!r} is not defined")
        return self._module.__dict__[name]

    def _refer(self, value: object) -> dict:
        self._objects.append(value)
        return {"r": len(self._objects) - 1}
