"""What the driver asks of every training rank for a checkpoint; plain values that travel between processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPT = "attempt"
"""File in the run directory with the name of the process that owns it now."""


@dataclass(frozen=True)
class SaveRequest:
    """What the driver asks of every rank."""

    target: Path
    attempt: str
    """Of the process that asks: what a killed one left behind must not take the place of what its successor writes."""
    training: dict[str, Any]
    """`Manifest.training`, but for what the ranks know."""
    config: str
    """The resolved recipe."""
    asynchronous: bool

    @property
    def unfinished(self) -> Path:
        return self.target.with_name(f"{self.target.name}.unfinished-{self.attempt}")


def read_attempt(run_directory: Path) -> str:
    return (run_directory / ATTEMPT).read_text(encoding="utf-8")
