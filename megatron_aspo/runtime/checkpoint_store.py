"""The checkpoints of a run, from the driver's side: made while training goes on, kept or removed by rule."""

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
        """accuracy: held-out accuracy after so many steps, None where none was measured."""
        self._run_directory, self._options, self._trainers, self._attempt, self._config = run_directory, options, trainers, attempt, config
        self._accuracy = accuracy
        self._under_way: Path | None = None

    def is_due(self, done: int, last: bool) -> bool:
        """Whether a checkpoint is made after `done` steps; last: no more follow."""
        return bool(self._options.every) and (last or done % self._options.every == 0)

    def save(self, done: int, training: dict[str, Any]) -> float:
        """Start a checkpoint of what `done` steps made; returns the seconds until training can go on."""
        target = self._run_directory / "checkpoints" / f"step_{done}"
        self._under_way = target
        return self._trainers.save(SaveRequest(target, self._attempt, training | {"step": done}, self._config, self._options.asynchronous))

    def completed(self, wait: bool = False, timeout_s: float | None = None) -> Path | None:
        """The checkpoint that has become whole since the last call, if any; then the ones that the rules do not keep are removed.

        Raises what kept it from becoming whole, and TimeoutError.
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
        for step in to_remove(accuracies, self._options):
            remove_directory(checkpoints[step])


def to_remove(accuracies: dict[int, float | None], options: CheckpointOptions) -> list[int]:
    """The steps whose checkpoints no rule keeps. accuracies: step → held-out accuracy there, None where none was measured.

    The newest one always stays, and of equal accuracies the newer.
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
    """Remove what killed processes left: a writer that is still alive then finds its directory gone, and cannot finish."""
    for path in [*run_directory.glob("checkpoints/*.unfinished-*"), *run_directory.glob("exports/*.unfinished-*")]:
        with contextlib.suppress(FileNotFoundError):
            remove_directory(path)


def set_aside(run_directory: Path, step: int) -> list[Path]:
    """What steps after `step` made is renamed, as those steps will be done again; returns the new names of checkpoints and exports."""
    renamed = []
    for room, first in (("checkpoints", step + 1), ("exports", step + 1), ("evaluations", step + 1), ("rollouts", step)):
        for path in sorted(run_directory.glob(f"{room}/step_*")):
            match = re.fullmatch(r"step_(\d+)(\.json|\.parquet|)", path.name)
            if match and int(match[1]) >= first:
                numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
                names = (path.with_name(f"{path.name}.superseded{number}") for number in numbers)
                aside = next(name for name in names if not name.exists())
                os.rename(path, aside)
                if room in ("checkpoints", "exports"):
                    renamed.append(aside)
    return renamed
