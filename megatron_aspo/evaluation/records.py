"""One response of an evaluation, and its row in a Parquet file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_aspo.common.atomic import disk_errors, sync
from megatron_aspo.rewards.result import RewardResult

RIGHT = 1.0
"""A response with at least this score is right."""
SCHEMA = pa.schema(
    [
        ("position", pa.int32()),
        ("index", pa.int32()),
        ("problem", pa.string()),
        ("data_source", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("response", pa.string()),
        ("response_ids", pa.list_(pa.int32())),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("score", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("answer", pa.string()),
        ("failure", pa.string()),
        ("details", pa.string()),
    ]
)


@dataclass(frozen=True)
class EvalResponse:
    """One response to one problem. The fields that grading fills are None until then."""

    position: int
    """Position of the problem in the evaluation, from 0."""
    index: int
    """Index among the problem's n responses."""
    problem: str
    """The prompt's id."""
    data_source: str
    prompt: str
    """The user's words."""
    prompt_ids: list[int] | None
    """Token ids; None where an endpoint tokenized."""
    seed: int
    response: str
    """Decoded without special tokens, up to a stop string."""
    response_ids: list[int] | None
    tokens: int
    """Tokens generated, the end-of-sequence token included."""
    finish_reason: str
    """`stop`, or `length` for a truncated response."""
    score: float | None = None
    verdict: str | None = None
    """A category in a few words, such as `passed` or `time limit`."""
    reason: str | None = None
    answer: str | None = None
    """The answer that was compared, if the reward reports it; it votes in maj@k."""
    failure: str | None = None
    """`timeout` or `crash` if the reward gave no score; else empty."""
    details: str | None = None
    """Further details from the reward, as JSON."""

    @property
    def graded(self) -> bool:
        return self.score is not None

    @property
    def grade(self) -> tuple[float, str]:
        """Score and verdict of a graded response. Raises ValueError for one that is not graded."""
        if self.score is None or self.verdict is None:
            raise ValueError(f"response {self.index} to {self.problem} is not graded")
        return self.score, self.verdict

    @property
    def right(self) -> bool:
        return self.score is not None and self.score >= RIGHT

    def with_result(self, result: RewardResult) -> "EvalResponse":
        """Return the graded response."""
        verdict = result.failure or result.details.get("verdict", result.reason)
        answer = result.details.get("answer")
        return replace(
            self,
            score=result.score,
            verdict=verdict if isinstance(verdict, str) else json.dumps(verdict),
            reason=result.reason,
            answer=None if answer is None else str(answer),
            failure=result.failure,
            details=json.dumps(result.details, ensure_ascii=False),
        )


def write_responses(path: Path, responses: Sequence[EvalResponse]) -> None:
    """Write `path` atomically; it is on the disk when this returns."""
    columns = {name: [getattr(response, name) for response in responses] for name in SCHEMA.names}
    # Another process that took over may write the same path: the last whole file wins.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            parquet.write_table(pa.table(columns, schema=SCHEMA), unfinished, compression="zstd")
            sync(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        sync(path.parent)


def read_responses(path: Path) -> list[EvalResponse]:
    """Return the responses of a file that `write_responses` wrote."""
    return [EvalResponse(**row) for row in parquet.read_table(path, columns=[field.name for field in fields(EvalResponse)]).to_pylist()]
