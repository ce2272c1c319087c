"""Comparison of a program's results with expected ones. It runs no code of the program, whose data have only builtin types here.

Standard output is compared as in LiveCodeBench: both texts are stripped and split into lines, and each line is stripped; there must be
equally many lines, each equal as text or as numbers: the same count of decimal numbers with equal values, so that "6.0" is "6" and "1e3"
is "1000". There is no tolerance: "0.30000000000000004" is not "0.3".

Results of calls are compared with a JSON value, in some respects more strictly and in others less than in LiveCodeBench, which uses
Python's ==:
- an array is a list or a tuple, at any depth; an object is a dict with the same string keys;
- true and false are only bools, never 1 and 0; null is None; a string is a str;
- an integer is an int, or a float of exactly that value; a number written with a point or exponent is an int or a float within 1e-9,
  absolute or relative. NaN and infinities, which JSON lacks, never match.
"""

import math
import re
from decimal import Decimal
from typing import Any

TOLERANCE = 1e-9
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
"""No two repetitions can match the same digits: otherwise a long line of digits, which a program may print, takes quadratic time to
reject."""


def outputs_match(output: str, expected: str) -> bool:
    """Return whether standard output matches, by the first rule of this module."""
    lines, expected_lines = output.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(expected_lines) and all(map(_lines_match, lines, expected_lines))


def _lines_match(line: str, expected: str) -> bool:
    line, expected = line.strip(), expected.strip()
    if line == expected:
        return True
    numbers, expected_numbers = line.split(), expected.split()
    return len(numbers) == len(expected_numbers) and all(map(_numbers_match, numbers, expected_numbers))


def _numbers_match(number: str, expected: str) -> bool:
    return bool(_DECIMAL.fullmatch(expected) and _DECIMAL.fullmatch(number)) and Decimal(number) == Decimal(expected)


def value_matches(value: Any, expected: Any) -> bool:
    """Return whether the result of a call, as `plain.to_json` writes it, matches a JSON value, by the second rule of this module."""
    if isinstance(value, dict):
        value = _untagged(value)
    if expected is None or isinstance(expected, bool | str):
        return type(value) is type(expected) and value == expected
    if isinstance(expected, int):
        return type(value) in (int, float) and value == expected
    if isinstance(expected, float):
        return type(value) in (int, float) and math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(value_matches, value, expected))
    if not isinstance(value, _Object) or not all(isinstance(key, str) for key, _ in value.pairs):
        return False
    if not len(dict(value.pairs)) == len(value.pairs) == len(expected):
        return False
    return all(key in expected and value_matches(element, expected[key]) for key, element in value.pairs)


class _Object:
    """A dict's items, not yet in a dict: keys are hashed only once they are known to be strings, whose hashes are unpredictable."""

    def __init__(self, pairs: list):
        self.pairs = pairs


def _untagged(value: dict) -> Any:
    """Return a tuple's list, a large integer, or a dict's items; values without a JSON counterpart become the type `object`."""
    tag, content = next(iter(value.items()), ("", None))
    if tag == "t" and isinstance(content, list):
        return content
    if tag == "i" and isinstance(content, str):
        return int(content, 16)
    if tag == "d" and isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        return _Object(content)
    return object
