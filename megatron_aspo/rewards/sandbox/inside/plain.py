"""Plain data as JSON, the only thing that crosses a sandbox's border. Standard library only: the sandbox's interpreter imports it too.

Plain: None, bool, int, float, complex, str, bytes, bytearray, and lists, tuples, sets, frozensets and dicts of plain data. None, bool, str,
small int, finite float and list are the same in JSON; the others are objects with one key:

    {"i": "0x…"} int   {"f": "nan"} float   {"c": [re, im]} complex   {"b": hex} bytes   {"y": hex} bytearray
    {"t": […]} tuple   {"s": […]} set   {"z": […]} frozenset   {"d": [[key, value], …]} dict   {"r": n} reference number n
"""

import math
from collections.abc import Callable

TYPE_CHECKING = False  # as in typing, whose import takes 10 ms
if TYPE_CHECKING:
    from typing import Any

SMALL_INT = 1 << 63


class NotPlainError(TypeError):
    """A value is not plain data."""


def refuse(value: object) -> object:
    """Raise NotPlainError for `value`."""
    raise NotPlainError(f"a {type(value).__name__} is not plain data")


def to_json(value: object, refer: Callable[[object], object] = refuse) -> object:
    """Return the JSON value of `value`. `refer` gets values that are not plain and returns their JSON value, or raises.

    Subclasses of plain types, such as Counter and IntEnum, are sent as their base type; numpy's arrays and scalars as lists and numbers.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int(value)
        return number if -SMALL_INT <= number < SMALL_INT else {"i": hex(number)}
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {"f": repr(number)}
    if isinstance(value, list):
        return [to_json(element, refer) for element in value]
    if isinstance(value, dict):
        return {"d": [[to_json(key, refer), to_json(element, refer)] for key, element in value.items()]}
    for kind, tag in ((tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            return {tag: [to_json(element, refer) for element in value]}
    if isinstance(value, complex):
        return {"c": [to_json(value.real), to_json(value.imag)]}
    for kind, tag in ((bytes, "b"), (bytearray, "y")):
        if isinstance(value, kind):
            return {tag: value.hex()}
    if type(value).__module__.partition(".")[0] == "numpy" and (tolist := getattr(value, "tolist", None)):
        return to_json(tolist(), refer)
    return refer(value)


def from_json(value: object, resolve: Callable[[int], object] = refuse) -> "Any":
    """Invert `to_json`; `resolve` returns the object of a reference number. Raises ValueError or TypeError for malformed values."""
    if isinstance(value, list):
        return [from_json(element, resolve) for element in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return float(content)
    if tag == "c":
        return complex(from_json(content[0]), from_json(content[1]))
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "y":
        return bytearray.fromhex(content)
    if tag == "r":
        return resolve(content)
    elements = [from_json(element, resolve) for element in content]
    return {"t": tuple, "s": set, "z": frozenset, "d": dict}[tag](elements)
