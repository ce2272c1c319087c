"""`metrics.jsonl`: one flat line of JSON a step, and how a step's figures are named."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_aspo.checkpoint.atomic import disk_errors, write_text
from megatron_aspo.losses.tally import means
from megatron_aspo.trainer.settings import UpdateReport


def training_metrics(report: UpdateReport) -> dict[str, float]:
    """Flat names for what the training ranks report."""
    norms = report.gradient_norms
    metrics: dict[str, Any] = {f"train/{name}": value for name, value in means(report.tally).items()}
    metrics |= {f"mismatch/{name}": value for name, value in report.mismatch.items()}
    metrics |= {
        "train/updates": len(norms),
        "train/skipped_updates": report.skipped_updates,
        "train/learning_rate": report.learning_rate,
    }
    if norms:
        metrics |= {"train/gradient_norm": sum(norms) / len(norms), "train/gradient_norm_max": max(norms)}
        packing = report.packing
        metrics |= {
            "packing/fill": packing.fill,
            "packing/imbalance": packing.imbalance,
            "packing/lockstep_imbalance": packing.lockstep_imbalance,
        }
    return metrics


class MetricsFile:
    """Appends lines, each on the disk when `write` returns."""

    def __init__(self, path: Path, first_step: int = 0):
        """first_step: the step that is done next. Lines of that step and later ones, left by a process that was killed, are moved to
        `metrics.superseded.jsonl` beside the file.
        """
        self._path = path
        with disk_errors(path):
            if path.exists():
                _set_aside(path, first_step)
            self._file = path.open("ab", buffering=0)

    def write(self, metrics: dict[str, Any]) -> None:
        """One line. Raises ValueError for a figure that is not finite: JSON has no word for it."""
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the figure {name} is {value}")
        line = json.dumps(metrics, allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def last(self) -> dict[str, Any]:
        """The newest line; empty when there is none."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1]) if lines else {}

    def close(self) -> None:
        self._file.close()


def _set_aside(path: Path, first_step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # torn: its step was not done
    kept = [line for line in lines if json.loads(line)["step"] < first_step]
    if superseded := [line for line in lines if line not in kept]:
        with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(superseded)
    write_text(path, "".join(kept))
