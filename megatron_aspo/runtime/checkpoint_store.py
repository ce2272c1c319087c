"""The checkpoints of a run, managed by the driver: written while training goes on, kept or removed by rule."""

import contextlib
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aspo.checkpoint.find import find_checkpoints
from megatron_aspo.checkpoint.options import CheckpointOptions
from megatron_aspo.checkpoint.request import SaveRequest
from megatron_aspo.common.atomic import remove_directory

if TYPE_CHECKING:
    from megatron_aspo.runtime.trainers import Trainers


class CheckpointStore:
    def __init__(
        self,
        run_directory: Path,
        options: CheckpointOptions,
        trainers: "Trainers",
        attempt: str,
        config: str,
        accuracy: Callable[[int], float | None],
    ):
        """Manage the checkpoints of a run. accuracy: returns the held-out accuracy after a number of steps, None if not measured."""
        self._run_directory, self._options, self._trainers, self._attempt, self._config = run_directory, options, trainers, attempt, config
        self._accuracy = accuracy
        self._under_way: Path | None = None

    def is_due(self, done: int, last: bool) -> bool:
        """Return whether a checkpoint is due after `done` steps; last: whether these are all."""
        return bool(self._options.every) and (last or done % self._options.every == 0)

    def save(self, done: int, training: dict[str, Any]) -> float:
        """Start a checkpoint of the state after `done` steps; return the seconds until training can go on."""
        target = self._run_directory / "checkpoints" / f"step_{done}"
        self._under_way = target
        return self._trainers.save(SaveRequest(target, self._attempt, training | {"step": done}, self._config, self._options.asynchronous))

    def completed(self, wait: bool = False, timeout_s: float | None = None) -> Path | None:
        """Return the checkpoint that was completed since the last call, if any, after removing those that no rule keeps.

        Raises the error that prevented its completion, and TimeoutError.
        """
        if self._under_way is None:
            return None
        try:
            if not self._trainers.saved(wait, timeout_s):
                return None
        except Exception:
            self._under_way = None
            raise
        path, self._under_way = self._under_way, None
        self._prune()
        return path

    def _prune(self) -> None:
        checkpoints = find_checkpoints(self._run_directory)
        accuracies = {step: self._accuracy(step) for step in checkpoints}
        for step in steps_to_remove(accuracies, self._options):
            remove_directory(checkpoints[step])


def steps_to_remove(accuracies: dict[int, float | None], options: CheckpointOptions) -> list[int]:
    """Return the steps whose checkpoints no rule keeps. accuracies: step → held-out accuracy, None if not measured.

    The newest checkpoint is always kept; of equal accuracies the newer counts as better.
    """
    steps = sorted(accuracies)
    if not options.keep_last:
        return []
    kept = set(steps[-options.keep_last :])
    if options.keep_every:
        kept |= {step for step in steps if step % options.keep_every == 0}
    measured = sorted((accuracy, step) for step, accuracy in accuracies.items() if accuracy is not None)
    if options.keep_best:
        kept |= {step for _, step in measured[-options.keep_best :]}
    return [step for step in steps if step not in kept]


def sweep_unfinished(run_directory: Path) -> None:
    """Remove the unfinished directories of killed processes. A writer that is still alive loses its directory and cannot finish."""
    for path in [*run_directory.glob("checkpoints/*.unfinished-*"), *run_directory.glob("exports/*.unfinished-*")]:
        with contextlib.suppress(FileNotFoundError):
            remove_directory(path)


def set_aside(run_directory: Path, step: int) -> list[Path]:
    """Rename the files of steps after `step`, which will be done again; return the new names of checkpoints and exports."""
    renamed = []
    for folder, first in (("checkpoints", step + 1), ("exports", step + 1), ("evaluations", step + 1), ("rollouts", step)):
        for path in sorted(run_directory.glob(f"{folder}/step_*")):
            match = re.fullmatch(r"step_(\d+)(\.json|\.parquet|)", path.name)
            if match and int(match[1]) >= first:
                numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
                names = (path.with_name(f"{path.name}.superseded{number}") for number in numbers)
                aside = next(name for name in names if not name.exists())
                os.rename(path, aside)
                if folder in ("checkpoints", "exports"):
                    renamed.append(aside)
    return renamed
