"""`ledger.jsonl`: the append-only log of a run, one fsynced line per event.

Events: `start` and `resume` (a process began at a step), `drawn` (prompts taken for a step), `trained` (a step whose update is done, and
which of its draws it trained on), `checkpoint` (a step from which the run can resume). After `resume` at step s, earlier lines about steps
≥ s are void: those steps are done again.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, sync


class Ledger:
    """Appends events. A partial last line of a killed process is truncated."""

    def __init__(self, path: Path):
        whole, torn = _split(path.read_bytes() if path.exists() else b"")
        self._path = path
        with disk_errors(path):
            self._file = path.open("ab", buffering=0)
            if torn:
                self._file.truncate(len(whole))
            sync(path.parent)
        self.lines = whole.count(b"\n")

    def append(self, event: str, **fields: Any) -> None:
        """Append a line; it is on the disk when this returns. Raises UserError if it cannot be written."""
        line = json.dumps({"event": event, **fields}, allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        self.lines += 1

    def close(self) -> None:
        self._file.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the events of a ledger file, one for each line; a last line without its newline is left out."""
    whole, _ = _split(path.read_bytes())
    return [json.loads(line) for line in whole.splitlines()]


def origin(path: Path) -> str:
    """Return the checkpoint from which the last writer started; empty if it started from none."""
    began = [event for event in read_ledger(path) if event["event"] in ("start", "resume")] if path.exists() else []
    return began[-1]["checkpoint"] if began else ""


def made_checkpoints(path: Path) -> bool:
    """Return whether a checkpoint was completed in this run."""
    return path.exists() and any(event["event"] == "checkpoint" for event in read_ledger(path))


def history(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return step → its `trained` event, for the steps that contributed to the current weights."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("start", "resume"):
            steps = {step: trained for step, trained in steps.items() if step < event["step"]}
        elif event["event"] == "trained":
            steps[event["step"]] = event
    return steps


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Return the complete lines, and the bytes after the last of them."""
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]
