"""Rows of Parquet files and of Hugging Face data sets, which are columns of Apache Arrow types."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.data.json_rows import Fields

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_BATCH_BYTES = 16 << 20
"""Rows are decoded in batches of about this size: a row of LiveCodeBench can be 100 MB, a row of mathematics is 500 bytes."""
_MAX_BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[tuple[int, Fields]]:
    """Yield (row number from 1, row). A null in a column makes the row lack that field.

    Raises UserError naming file and column for a type without a JSON counterpart, and for a damaged file.
    """
    import pyarrow.parquet as parquet

    # Without these options Arrow reads ahead all pages of the file into memory.
    with _reading(str(path), "a Parquet file"), parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        _check_columns(file.schema_arrow, str(path))
        size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups))
        rows = _batch_rows(size, file.metadata.num_rows)
        number = 0
        for batch in file.iter_batches(batch_size=rows):
            for fields in cast("pa.Table", batch).to_pylist():
                number += 1
                yield number, _without_nulls(fields)


def read_dataset(name: str, subset: str, split: str) -> Iterator[tuple[int, Fields]]:
    """Yield (row number from 1, row) of a directory, or of a data set on the Hugging Face hub, through the `datasets` library.

    A directory is one that `save_to_disk` wrote, or anything else that `load_dataset` understands. subset and split: empty if there is
    only one. Raises UserError for a missing one, naming the splits that exist.
    """
    data = _load(name, subset, split)
    _check_columns(data.features.arrow_schema, name)
    rows = _batch_rows(data.data.nbytes, data.num_rows)
    with _reading(name, "a data set"):
        number = 0
        for batch in data.with_format("arrow").iter(batch_size=rows):
            for fields in cast("pa.Table", batch).to_pylist():
                number += 1
                yield number, _without_nulls(fields)


def _load(name: str, subset: str, split: str) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} is read by the package datasets, which is not installed; pip install datasets") from error
    datasets.disable_progress_bars()
    directory = Path(name).expanduser()
    try:
        if any((directory / file).is_file() for file in ("state.json", "dataset_dict.json")):
            if subset:
                raise UserError(f"{name} has no subset {subset}: save_to_disk wrote it, which knows none; remove it")
            loaded = datasets.load_from_disk(str(directory))
        else:
            loaded = datasets.load_dataset(str(directory) if directory.is_dir() else name, subset or None)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many kinds, including network errors
        raise UserError(
            f"{name} cannot be loaded as a Hugging Face data set ({one_line(error)}); correct the name, or its files"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        if split:
            raise UserError(f"{name} has no splits, and so no @{split}; remove it")
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        missing = f"no split {split}" if split else "several splits"
        raise UserError(f"{name} has {missing}; name one of {', '.join(f'@{key}' for key in loaded)} at its end")
    return loaded[split]


def _batch_rows(size: int, rows: int) -> int:
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _without_nulls(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if value is not None}


def _check_columns(schema: "pa.Schema", where: str) -> None:
    for field in schema:
        _check_type(field.type, field.name, where)


def _check_type(kind: "pa.DataType", name: str, where: str) -> None:
    from pyarrow import types

    if types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_type(kind.field(number).type, f"{name}.{kind.field(number).name}", where)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _check_type(kind.value_type, f"{name}[]", where)
    elif types.is_dictionary(kind):
        _check_type(kind.value_type, name, where)
    elif not any(
        check(kind)
        for check in (
            types.is_null,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
        )
    ):
        raise UserError(f"{where}: column {name} has the type {kind}, which JSON does not have; write it as text, or leave it out")


@contextlib.contextmanager
def _reading(where: str, what: str) -> Iterator[None]:
    """Name the source in Arrow's errors; release the memory that Arrow's allocator keeps, 0.4 GB after 2 GB of rows."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read as {what} ({one_line(error)}); it is damaged or incomplete: write it again") from error
    finally:
        pa.default_memory_pool().release_unused()
