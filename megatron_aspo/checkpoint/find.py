"""The checkpoints of a run directory, by step."""

import contextlib
import re
from pathlib import Path

_NAME = re.compile(r"step_(\d+)")


def find_checkpoints(run_directory: Path) -> dict[int, Path]:
    """Return step → directory of the checkpoints of a run, oldest first. Whether they are whole is not checked."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in (run_directory / "checkpoints").iterdir():
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items()))
