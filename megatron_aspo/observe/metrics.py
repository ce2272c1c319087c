"""`metrics.jsonl`: one flat line of JSON a step, and how a step's figures are named."""

import json
import math
from pathlib import Path
from typing import Any

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
    return metrics


class MetricsFile:
    """Appends lines, each handed to the system whole when `write` returns."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        """One line. Raises ValueError for a figure that is not finite: JSON has no word for it."""
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the figure {name} is {value}")
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
