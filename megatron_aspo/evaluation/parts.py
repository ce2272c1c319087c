"""The responses of an evaluation on disk: one Parquet file per part, written atomically, first without grades and then with them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet

from megatron_aspo.evaluation.records import EvalResponse, read_responses, write_responses
from megatron_aspo.evaluation.sampling import Part, parts_of


class PartStore:
    """Files `directory`/part_00000.parquet and so on; pandas and pyarrow read the directory as one table."""

    def __init__(self, directory: Path, problems: int, part_problems: int):
        self._directory = directory
        self._parts = parts_of(problems, part_problems)

    def write(self, part: Part) -> None:
        """Write the part's responses to its file, replacing an earlier one."""
        write_responses(self._path(part.number), part.responses)

    def missing(self) -> list[Part]:
        """Return the parts that are not generated yet."""
        return [Part(part.number, part.start, part.stop) for part in self._parts if not self._path(part.number).exists()]

    def ungraded(self) -> Iterator[Part]:
        """Yield the parts of the evaluation (blocks of problems) that are generated but not graded, with their responses.

        Each is read from its file when it is yielded, so that only one is in memory.
        """
        for part in self._parts:
            path = self._path(part.number)
            if path.exists() and parquet.read_table(path, columns=["score"]).column("score").null_count:
                yield Part(part.number, part.start, part.stop, read_responses(path))

    def responses(self) -> Iterator[list[EvalResponse]]:
        """Yield the responses of each part that is generated, in the order of the problems."""
        for part in self._parts:
            if (path := self._path(part.number)).exists():
                yield read_responses(path)

    def _path(self, number: int) -> Path:
        return self._directory / f"part_{number:05d}.parquet"
