"""The driver's request for a checkpoint to every training rank; plain values that are sent between processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPT = "attempt"
"""File in the run directory with the name of its current owner process."""


@dataclass(frozen=True)
class SaveRequest:
    """A request to every rank to write its part of a checkpoint."""

    target: Path
    attempt: str
    """Name of the requesting process: files of a killed process must not replace those of its successor."""
    training: dict[str, Any]
    """`Manifest.training`, without the entries that the ranks add."""
    config: str
    """The resolved recipe."""
    asynchronous: bool

    @property
    def unfinished(self) -> Path:
        return self.target.with_name(f"{self.target.name}.unfinished-{self.attempt}")


def read_attempt(run_directory: Path) -> str:
    return (run_directory / ATTEMPT).read_text(encoding="utf-8")
