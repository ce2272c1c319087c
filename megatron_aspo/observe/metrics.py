"""`metrics.jsonl`: one flat line of JSON per step, and the names of a step's metrics."""

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.losses.tally import means
from megatron_aspo.trainer.settings import UpdateReport


def training_metrics(report: UpdateReport) -> dict[str, float]:
    """Return the training ranks' report as flat metrics."""
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
    """Appends lines; each is on disk when `write` returns."""

    def __init__(self, path: Path, first_step: int = 0):
        """first_step: the next step. Lines of that step and later ones, left by a killed process, are moved to
        `metrics.superseded.jsonl` beside the file.
        """
        self._path = path
        with disk_errors(path):
            if path.exists():
                _set_aside(path, first_step)
            self._file = path.open("ab", buffering=0)

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line. Raises ValueError for a metric that is not finite, which JSON cannot express."""
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the figure {name} is {value}")
        line = json.dumps(metrics, allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def last(self) -> dict[str, Any]:
        """Return the newest line, or an empty mapping when there is none."""
        return next(reversed(read_metrics(self._path)), {})

    def all(self) -> list[dict[str, Any]]:
        """Return every line, including those of earlier processes of the run."""
        return read_metrics(self._path)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, or none when the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count_updates(steps: Sequence[dict[str, Any]]) -> int:
    """Return the number of optimizer updates in these lines, without updates skipped for a gradient that was not finite."""
    return sum(step["train/updates"] - step["train/skipped_updates"] for step in steps)


def untrained_warning(steps: Sequence[dict[str, Any]]) -> str:
    """Return why the model is unchanged, and the cure, if no update changed it; else an empty string, also for no steps."""
    updates, skipped = count_updates(steps), sum(step["train/skipped_updates"] for step in steps)
    if not steps or (any(step.get("train/gradient_norm_max", 0) > 0 for step in steps) and updates):
        return ""
    dropped = sum(step["groups/dropped"] for step in steps)
    alike = (
        "look at the rewards in rollouts/, and take a reward that tells responses apart, prompts that the model solves now and then, or a "
        "larger rollout.responses_per_prompt"
    )
    if updates:
        cause = f"the gradients of all {updates} updates were zero, as when every response of a prompt gets the same reward; {alike}"
    elif skipped:
        cause = f"all {skipped} updates were skipped (train/skipped_updates), as their gradients were not finite; lower optimizer.lr"
    elif dropped:
        cause = f"{dropped} groups were dropped (groups/dropped), as all responses of a group got the same reward; {alike}"
    else:
        cause = "no response was left to train on; raise rollout.max_response_tokens, or set algorithm.overlong_filter=false"
    return f"warning: nothing was learned in {len(steps)} steps: {cause}"


def _set_aside(path: Path, first_step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # torn: its step did not finish
    kept = [line for line in lines if json.loads(line)["step"] < first_step]
    if superseded := [line for line in lines if line not in kept]:
        with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(superseded)
    write_text(path, "".join(kept))
