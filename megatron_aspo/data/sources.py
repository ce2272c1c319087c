"""Rows from the locations that a recipe names: `data.path` and `data.eval_path`, and files of responses.

| location | rows |
|---|---|
| a file | JSONL, one JSON array, or Parquet: detected from its first bytes, whatever its name |
| a directory | a Hugging Face data set in it |
| `hub:OWNER/NAME` or `hub:OWNER/NAME:SUBSET` | a data set of the Hugging Face hub |

Directories and hub names take `@SPLIT` at their end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.arrow_rows import read_dataset, read_parquet
from megatron_aspo.data.json_rows import read_array, read_lines

HUB = "hub:"
_UNREADABLE = {
    b"\x1f\x8b": "a gzip file; unpack it (gunzip)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it (unzstd)",
    b"BZh": "a bzip2 file; unpack it (bunzip2)",
    b"\xfd7zXZ": "an xz file; unpack it (unxz)",
    b"PK\x03\x04": "a zip file; unpack it",
    b"ARROW1": "an Arrow file; write its rows as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; name the directory that save_to_disk made, or write its rows as Parquet",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""First bytes of files that can be mistaken for data files by their name."""


@dataclass(frozen=True)
class Row:
    where: str
    """File and line, or file and row number, for errors."""
    number: int
    """Line number in JSONL, else row number; from 1."""
    fields: dict[str, Any]


def read_rows(location: str, wanted: str) -> Iterator[Row]:
    """Yield the rows of a location in order, with one in memory at a time.

    wanted: the fields that a row must have, as errors name them. Raises UserError, naming file and row, for unreadable input.
    """
    path = Path(location).expanduser()
    if not location:
        raise UserError("one of the locations of data is empty; name a file, or remove it")
    if location.startswith(HUB):
        name, split = _without_split(location.removeprefix(HUB))
        name, _, subset = name.partition(":")
        yield from _rows(read_dataset(name, subset, split), f"{location} row ")
    elif path.is_file():
        yield from _read_file(path, wanted)
    elif path.is_dir() or Path(_without_split(location)[0]).expanduser().is_dir():
        name, split = (location, "") if path.is_dir() else _without_split(location)
        yield from _rows(read_dataset(name, "", split), f"{location} row ")
    else:
        reason = "neither a file nor a directory" if path.exists() else "no such file or directory"
        raise UserError(
            f"{location} cannot be read ({reason}); name a file, a directory, or hub:OWNER/NAME for a data set of the Hugging Face hub"
        )


def short_name(location: str) -> str:
    """Return the location's last part without suffix, for ids and reports."""
    name, _ = _without_split(location)
    return Path(name.removeprefix(HUB).partition(":")[0]).stem


def _without_split(location: str) -> tuple[str, str]:
    name, _, split = location.rpartition("@")
    return (name, split) if name else (split, "")


def _read_file(path: Path, wanted: str) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file that can be") from error
    for start, kind in _UNREADABLE.items():
        if head.startswith(start):
            raise UserError(f"{path} is {kind}")
    if head.startswith(b"PAR1"):
        yield from _rows(read_parquet(path), f"{path} row ")
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _rows(read_array(path, wanted), f"{path} row ")
    else:
        yield from _rows(read_lines(path, wanted), f"{path}:")


def _rows(numbered: Iterator[tuple[int, dict[str, Any]]], before: str) -> Iterator[Row]:
    for number, fields in numbered:
        yield Row(f"{before}{number}", number, fields)
