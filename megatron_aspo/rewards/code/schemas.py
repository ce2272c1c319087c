"""The tests of a program, read from the ground truth of a row.

| ground truth | tests |
|---|---|
| list of `{input, output, testtype, metadata: {func_name}}` (LiveCodeBench) | stdin/stdout, or calls with one JSON value per line |
| `{"inputs": […], "outputs": […]}` (Archer), with `fn_name` for calls (TACO, APPS) | stdin/stdout, or calls with lists of arguments |
| `{"functional": "…"}` (Archer) | test code with assertions |
| `{"test": "…", "entry_point": "…", "prompt": "…"}` (HumanEval) | test code that defines check(candidate), beside the prompt |
| `{"public_test_cases": …, "private_test_cases": …, "metadata": …}` (fields of LiveCodeBench's rows) | both lists, in this order |

Each may be JSON text, and LiveCodeBench's lists also in its packed form: base64 of zlib of a pickled string of JSON.
"""

import base64
import binascii
import json
import pickletools
import zlib
from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError

MAX_UNPACKED_BYTES = 1 << 30
"""Upper bound on the size of unpacked tests. LiveCodeBench's largest problem has about 0.3 GB."""
_LARGE_PACKED = 1 << 20
"""Characters of packed tests, a multiple of 4, above which the check at the start does not unpack them."""
_PICKLE_HEAD = 64
"""Number of bytes within which a pickled JSON list begins."""
_JSON_STARTS = tuple('[{" \t\r\n')
_STRING_OPCODES = {"PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
"""The opcodes of a pickled string."""
_NOT_READABLE = "ground_truth is a string that is neither JSON nor LiveCodeBench's packed tests; correct the row"


@dataclass(frozen=True)
class StdinTest:
    input: str
    output: str


@dataclass(frozen=True)
class CallTest:
    function: str
    arguments: list[Any]
    expected: Any


@dataclass(frozen=True)
class AssertTest:
    source: str
    prompt: str = ""
    """Code whose definitions the tests may use; empty if there is none."""
    entry_point: str = ""
    """The function that belongs to the program even if the prompt defines it."""


Test = StdinTest | CallTest | AssertTest


def read_tests(ground_truth: Any, prompt: str = "") -> list[Test]:
    """Return the tests of a row's ground truth, in order. `prompt`: that of the row, whose code assertion tests may use.

    Raises UserError naming the fault; the caller adds file and line.
    """
    truth = _parse(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if isinstance(truth, dict) and "private_test_cases" in truth:
        truth = _livecodebench_row(truth)
    tests: list[Test]
    if isinstance(truth, list):
        tests = [_livecodebench_test(test, number) for number, test in enumerate(truth)]
    elif isinstance(truth, dict) and "functional" in truth:
        entry_point = _text(truth, "entry_point") if "entry_point" in truth else ""
        # Without a name to test, a definition in the prompt may be the very stub that the program completes.
        tests = [AssertTest(_text(truth, "functional"), prompt if entry_point else "", entry_point)]
    elif isinstance(truth, dict) and "test" in truth:
        entry_point = _text(truth, "entry_point")
        prompt = _text(truth, "prompt") if "prompt" in truth else prompt
        tests = [AssertTest(f"{_text(truth, 'test')}\ncheck({entry_point})\n", prompt, entry_point)]
    elif isinstance(truth, dict) and "inputs" in truth:
        tests = _archer_tests(truth)
    else:
        raise UserError(
            "ground_truth is no known form of tests; expected a list of {input, output, testtype}, or an object with inputs and outputs, "
            "functional, or test and entry_point"
        )
    if not tests:
        raise UserError("ground_truth has no tests; every program would pass: add some")
    return tests


def check_ground_truth(ground_truth: Any, prompt: str = "") -> None:
    """Raise UserError as `read_tests` does. Reads only the beginning of large packed tests: unpacking LiveCodeBench takes minutes."""
    if isinstance(ground_truth, str) and ground_truth[:1] in _JSON_STARTS:
        ground_truth = _parse(ground_truth)
    if _is_large(ground_truth):
        _check_beginning(ground_truth)
        return
    if isinstance(ground_truth, dict) and _is_large(ground_truth.get("private_test_cases")):
        _check_beginning(ground_truth["private_test_cases"])
        ground_truth = ground_truth | {"private_test_cases": []}
        if ground_truth.get("public_test_cases", []) in ([], "[]", ""):
            return
    read_tests(ground_truth, prompt)


def _is_large(tests: Any) -> bool:
    return isinstance(tests, str) and len(tests) > _LARGE_PACKED and tests[:1] not in _JSON_STARTS


def _check_beginning(packed: str) -> None:
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(packed[:_LARGE_PACKED], validate=True), _PICKLE_HEAD)
    except (ValueError, zlib.error) as error:
        raise UserError(_NOT_READABLE) from error
    if not data.startswith(b"\x80") or b"[" not in data:
        raise UserError(_NOT_READABLE)


def choose_tests(count: int, limit: int) -> list[int]:
    """Return the positions of the tests to run: all, or `limit` of them, evenly spread from the first to the last. Deterministic."""
    if not 0 < limit < count:
        return list(range(count))
    return [0] if limit == 1 else [number * (count - 1) // (limit - 1) for number in range(limit)]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError("ground_truth is JSON that is nested too deeply; correct the row") from error
    except ValueError:
        pass
    try:
        return json.loads(_unpack(text))
    except _NotAStringError as error:
        raise UserError(f"ground_truth has packed tests that {error}; they must be a pickled string: correct the row") from error
    except (ValueError, zlib.error, RecursionError, binascii.Error) as error:
        raise UserError(_NOT_READABLE) from error


class _NotAStringError(Exception):
    """A pickle is anything other than one string; the message says what it holds."""


def _unpack(text: str) -> str:
    inflater = zlib.decompressobj()
    data = inflater.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"packed tests of more than {MAX_UNPACKED_BYTES >> 20} MiB")
    if not inflater.eof:
        raise ValueError("packed tests that are cut off")
    return _pickled_string(data)


def _pickled_string(data: bytes) -> str:
    """Return the pickled string. The pickle is read as a list of instructions and never executed."""
    strings = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _STRING_OPCODES:
            raise _NotAStringError(f"hold the pickle instruction {opcode.name}" + (f" {argument!r:.80}" if argument is not None else ""))
        if isinstance(argument, str):
            strings.append(argument)
    if len(strings) != 1:
        raise _NotAStringError(f"are a pickle of {len(strings)} strings")
    return strings[0]


def _text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"ground_truth has no text {name}; add it")
    return row[name]


def _livecodebench_row(row: dict) -> list[Any]:
    """Return both lists of tests, each test with the row's metadata, which names the function."""
    tests = []
    for name in ("public_test_cases", "private_test_cases"):
        value = row.get(name, [])
        value = _parse(value) if isinstance(value, str) else value
        if not isinstance(value, list):
            raise UserError(f"ground_truth.{name} is no list of tests; correct the row")
        tests += value
    return [test | {"metadata": row.get("metadata", {})} if isinstance(test, dict) else test for test in tests]


def _livecodebench_test(test: Any, number: int) -> Test:
    if not isinstance(test, dict) or not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
        raise UserError(f"test {number} of ground_truth has no texts input and output; add them")
    kind = test.get("testtype", "stdin")
    if kind == "stdin":
        return StdinTest(test["input"], test["output"])
    if kind != "functional":
        raise UserError(f"test {number} of ground_truth has testtype={kind!r}; expected stdin or functional")
    metadata = test.get("metadata", {})
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    except (ValueError, RecursionError) as error:
        raise UserError(f'test {number} of ground_truth has metadata that is not JSON; expected {{"func_name": …}}') from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("func_name"), str):
        raise UserError(f"test {number} of ground_truth is functional and has no metadata.func_name; add it")
    try:
        arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
        return CallTest(metadata["func_name"], arguments, json.loads(test["output"]))
    except (ValueError, RecursionError) as error:
        raise UserError(f"test {number} of ground_truth: input is not one JSON value a line, or output is not JSON ({error})") from error


def _archer_tests(truth: dict) -> list[Test]:
    inputs, outputs = truth.get("inputs"), truth.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise UserError("ground_truth needs lists inputs and outputs of the same length; correct the row")
    function = truth.get("fn_name")
    if function is not None and not isinstance(function, str):
        raise UserError(f"ground_truth has fn_name={function!r}; expected the name of a function")
    if function is None:
        return [StdinTest(_join_lines(given), _join_lines(expected)) for given, expected in zip(inputs, outputs, strict=True)]
    tests: list[Test] = []
    for given, expected in zip(inputs, outputs, strict=True):
        if not isinstance(given, list):
            raise UserError("ground_truth has fn_name, so that each of inputs must be a list of arguments; correct the row")
        tests.append(CallTest(function, given, expected))
    return tests


def _join_lines(text: Any) -> str:
    """Return the text of an input or output; in some rows it is a list of lines, or a number."""
    if text is None or isinstance(text, dict):
        raise UserError(f"ground_truth has {'null' if text is None else 'an object'} among inputs or outputs; expected texts")
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)
