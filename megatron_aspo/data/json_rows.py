"""Rows of JSON files: JSONL, with one object per line, or one array of objects. Files are streamed, one row at a time.

Strict: input that two readers could understand differently is refused, such as a duplicate key, NaN, or half of a surrogate pair.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from megatron_aspo.common.errors import UserError

Fields = dict[str, Any]
_CHUNK = 1 << 20
"""Number of characters of an array read at a time."""
_TORN = 10
"""A row that has merely not been read to its end fails within this many last characters: the longest token that can be torn has 6."""
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_lines(path: Path, wanted: str) -> Iterator[tuple[int, Fields]]:
    """Yield (line number, row) for each line that is not blank. Raises UserError naming file and line for the first invalid one.

    wanted: the fields that a row must have, as errors name them.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip(b"\n")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); expected one JSON object on each line") from error
            yield number, _check_row(row, b"\\u" in line, where, wanted)


def read_array(path: Path, wanted: str) -> Iterator[tuple[int, Fields]]:
    """Yield (row number from 1, row) for each element of the file's array, with at most one of them in memory.

    Raises UserError naming file and row for the first invalid one.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        array, number = _Array(file), 0
        while True:
            where = f"{path} row {number + 1}"
            try:
                if not array.has_next():
                    return
                row, escaped = array.next()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}, or soon after it, is not UTF-8; save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{where}: not valid JSON ({reason}); expected an array of objects, or one object on each line") from error
            number += 1
            yield number, _check_row(row, escaped, where, wanted)


def json_type(value: Any) -> str:
    """Return the name of a value's JSON type, for errors."""
    if value == "":
        return "empty string"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds[type(value)]


class _Array:
    """Incremental reader of a JSON array in a file. Methods raise ValueError or RecursionError for invalid JSON."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._position, self._begun = file, "", 0, False
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)

    def has_next(self) -> bool:
        """Advance to the next element if there is one; else check that nothing follows the array."""
        opening, found = ("[", "no array begins") if not self._begun else (",", "expected a comma or the end of the array")
        mark = self._next_mark()
        if self._begun and mark == "]":
            return self._end()
        if mark != opening:
            raise ValueError(found if mark else "the file ends within the array")
        self._position += 1
        if not self._begun and self._next_mark() == "]":
            return self._end()
        self._begun = True
        return True

    def next(self) -> tuple[Any, bool]:
        """Return the element, and whether its text contains UTF-16 escapes."""
        if not self._next_mark():
            raise ValueError("the file ends within the array")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                break
            except json.JSONDecodeError as error:
                torn = error.pos >= len(self._text) - _TORN or error.msg.startswith("Unterminated string")
                if not torn or not self._read_more():
                    raise
        escaped = self._text.find("\\u", self._position, end) >= 0
        self._position = end
        return value, escaped

    def _end(self) -> bool:
        self._position += 1
        if self._next_mark():
            raise ValueError("something follows the end of the array")
        return False

    def _next_mark(self) -> str:
        """Return the next non-blank character without consuming it; empty at the end of the file."""
        while True:
            self._position = cast(re.Match, _BLANKS.match(self._text, self._position)).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        rest = self._text[self._position :]
        more = self._file.read(max(_CHUNK, len(rest)))  # doubling: a long row is parsed again only a few times
        self._text, self._position = rest + more, 0
        return bool(more)


def _check_row(row: Any, escaped: bool, where: str, wanted: str) -> Fields:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {json_type(row)}, expected an object with {wanted}")
    if escaped:
        _check_surrogates(row, where)
    return row


def _check_surrogates(row: Fields, where: str) -> None:
    """Refuse halves of surrogate pairs in any field: UTF-8 files, such as the rollout dumps, cannot hold them."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {name!a} holds half of a surrogate pair (\\ud800 to \\udfff); write the whole character") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Fields:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in values if keys.count(key) > 1)!a} occurs twice in one object")
    return values
