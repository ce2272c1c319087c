"""`ledger.jsonl`: what a run did, in order, one fsynced line at a time; it is only ever appended to.

Events: `start` and `resume` (a process began at a step), `drawn` (prompts taken for a step), `trained` (a step whose update is done, and
which of its draws it trained on), `checkpoint` (a step from which the run can go on). After `resume` at step s, what earlier lines say of
steps ≥ s is void: those steps are done again.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, sync


class Ledger:
    """Appends events. The last line of a killed process may be torn: it is cut off."""

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
        """The line is on the disk when this returns. Raises UserError when it cannot be."""
        line = json.dumps({"event": event, **fields}, allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        self.lines += 1

    def close(self) -> None:
        self._file.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Every whole line."""
    whole, _ = _split(path.read_bytes())
    return [json.loads(line) for line in whole.splitlines()]


def origin(path: Path) -> str:
    """The checkpoint from which the process that wrote last began; empty when it began anew."""
    began = [event for event in read_ledger(path) if event["event"] in ("start", "resume")] if path.exists() else []
    return began[-1]["checkpoint"] if began else ""


def made_checkpoints(path: Path) -> bool:
    """Whether a checkpoint became whole in this run."""
    return path.exists() and any(event["event"] == "checkpoint" for event in read_ledger(path))


def history(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Step → its `trained` event, of the steps that are part of the weights as they are now."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("start", "resume"):
            steps = {step: trained for step, trained in steps.items() if step < event["step"]}
        elif event["event"] == "trained":
            steps[event["step"]] = event
    return steps


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Whole lines, and what stands after the last of them."""
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]
