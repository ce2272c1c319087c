"""Test code that calls functions of a program in another sandbox. Only plain data and references come from there, so that no object of the
program can make a comparison true, and nothing it does can end this process.
"""

import builtins
import json
import os
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

from plain import NotPlainError, from_json, to_json
from prelude import add_missing_names, collect_names

TYPE_CHECKING = False  # as in typing, whose import takes 10 ms
if TYPE_CHECKING:
    from typing import Any


def run(sources: dict[str, str], replies: Iterator[bytes], requests: int) -> None:
    """Run `sources["tests"]` and write the verdict after the requests, `{"verdict": …, "text": …}`: passed, failed, error or unsupported.

    Tests can use the names that the prompt defines; the function `entry_point` and undefined names are the program's.
    """
    peer = Peer(replies, requests)
    try:
        _run(sources, peer)
        verdict, text = "passed", ""
    except NotPlainError as error:
        verdict, text = "unsupported", f"{error}; tests may pass only plain data to the program"
    except NothingTestedError as error:
        verdict, text = "unsupported", str(error)
    except SystemExit as end:  # raised by the tests themselves, as unittest.main does
        verdict, text = ("passed", "") if not end.code else ("failed", f"the tests exited with status {end.code}")
    except BaseException as error:
        verdict, text = "failed" if isinstance(error, AssertionError) else "error", _describe(error)
    peer.write({"verdict": verdict, "text": text[:500]})


def _run(sources: dict[str, str], peer: "Peer") -> None:
    namespace = sys.modules["__main__"].__dict__
    peer.namespace = namespace
    try:
        prompt = compile(sources["prompt"], "<prompt>", "exec", dont_inherit=True)
    except SyntaxError:  # prose, or the beginning of a function without a body: it defines no helpers
        prompt = None
    if prompt:
        add_missing_names(namespace, prompt)
        exec(prompt, namespace)
    theirs = {sources["entry_point"]} if sources["entry_point"].isidentifier() else set()
    namespace.update((name, Proxy(peer, name)) for name in theirs)
    tests = compile(sources["tests"], "<tests>", "exec", dont_inherit=True)
    supplied = add_missing_names(namespace, tests)
    loaded, stored = set(), set()
    collect_names(tests, loaded, stored)
    theirs |= loaded - stored - namespace.keys() - set(dir(builtins))
    if not theirs:  # `assert add(1, 2) == 3` would test operator.add, whatever the program does
        theirs = {name for name, value in supplied.items() if not isinstance(value, ModuleType)}
        if len(theirs) != 1:
            raise NothingTestedError("which function the tests are about is not clear; give its name as entry_point")
    namespace.update((name, Proxy(peer, name)) for name in theirs)
    exec(tests, namespace)


def _describe(error: BaseException) -> str:
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{type(error).__name__} at line {line} of the tests" + (f": {error}" if str(error) else "")


class NothingTestedError(Exception):
    """The tests would pass, or fail, for every program."""


class Peer:
    """The program's end of the pipes."""

    def __init__(self, replies: Iterable[bytes], requests: int):
        self._replies = iter(replies)
        self._requests = requests
        self.namespace: dict[str, object] = {}

    def write(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._requests, data) :]

    def ask(self, target: str | int, attribute: str, call: bool, args: tuple = (), kwargs: dict | None = None) -> "Any":
        """Return the answer of the program's side: plain data or a Proxy. Raises what it raised, as a class known here."""
        kwargs = {name: to_json(value, _reference) for name, value in (kwargs or {}).items()}
        request = {"target": target, "attribute": attribute, "call": call, "kwargs": kwargs}
        self.write(request | {"args": [to_json(value, _reference) for value in args]})
        reply = json.loads(next(self._replies, b"null"))
        if reply is None:
            os._exit(1)  # the host closed the pipes: the program has ended and has its verdict
        if "raised" in reply:
            raise self._exception(reply["raised"], str(reply["text"]), attribute)
        for position, value in reply.get("changed", ()):
            self._change(args[position], self._received(value))
        return self._received(reply["value"])

    def _received(self, value: object) -> object:
        """Return a reply's value. Raises ValueError if it is malformed: a program must not fake the tests' own fault, `unsupported`."""
        try:
            return from_json(value, self._proxy)
        except NotPlainError as error:
            raise ValueError("the program sent what is not plain data") from error

    def _proxy(self, number: int) -> "Proxy":
        return Proxy(self, int(number))

    @staticmethod
    def _change(old: object, new: object) -> None:
        """Replace the content of `old` by that of `new`. Only for functions that return None: others could fit the tests' data to their
        result."""
        if type(old) is not type(new):
            return
        if isinstance(old, list | bytearray) and isinstance(new, list | bytearray):
            old[:] = new
        elif isinstance(old, dict | set) and isinstance(new, dict | set):
            old.clear()
            old.update(new)

    def _exception(self, names: list[str], text: str, attribute: str) -> Exception:
        for name in names:
            kind = self.namespace.get(name, getattr(builtins, str(name), None))
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                continue
            # Inside a loop of the tests it would end the loop as if it were complete.
            if issubclass(kind, StopIteration | StopAsyncIteration) and attribute != "__next__":
                break
            try:
                return kind(text)
            except Exception:  # a class whose constructor takes other arguments
                continue
        return RuntimeError(f"the program raised {names[0]}: {text}")


def _reference(value: object) -> dict:
    if not isinstance(value, Proxy):
        raise NotPlainError(f"the tests pass a {type(value).__name__}")
    target = object.__getattribute__(value, "_target")
    if not isinstance(target, int):
        raise NotPlainError(f"the tests pass the program's own {target}")
    return {"r": target}


def _ask(proxy: "Proxy", attribute: str, call: bool, args: tuple = (), kwargs: dict | None = None) -> "Any":
    return object.__getattribute__(proxy, "_peer").ask(object.__getattribute__(proxy, "_target"), attribute, call, args, kwargs)


class Proxy:
    """A function, class or object of the program. It equals nothing, not even itself, and has no truth value."""

    __slots__ = ("_peer", "_target")

    def __init__(self, peer: Peer, target: str | int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return _ask(self, "", True, args, kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self, name, False)

    def __iter__(self) -> Iterator:
        iterator = _ask(self, "__iter__", True)
        return iterator if isinstance(iterator, Proxy) else iter(iterator)

    def __next__(self) -> object:
        return _ask(self, "__next__", True)

    def __len__(self) -> int:
        try:
            return _ask(self, "__len__", True)
        except AttributeError:  # list() first requests a length, and continues only after a TypeError
            raise TypeError("an object of the program has no len()") from None

    def __getitem__(self, key: object) -> object:
        return _ask(self, "__getitem__", True, (key,))

    def __setitem__(self, key: object, value: object) -> None:
        _ask(self, "__setitem__", True, (key, value))

    def __delitem__(self, key: object) -> None:
        _ask(self, "__delitem__", True, (key,))

    def __str__(self) -> str:
        return _ask(self, "__str__", True)

    def __repr__(self) -> str:
        return _ask(self, "__repr__", True)

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        raise NotComparableError("an object of the program cannot be compared")

    def __bool__(self) -> bool:
        raise NotComparableError("an object of the program has no truth value here")

    # Without a hash either: a class that defines __eq__ has __hash__ = None.
    __contains__ = None


class NotComparableError(TypeError):
    """The program would decide this comparison."""
