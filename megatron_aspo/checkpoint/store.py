"""The checkpoints of a run, from the driver's side: made while training goes on, kept or removed by rule, found again."""

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aspo.checkpoint.atomic import remove_directory
from megatron_aspo.checkpoint.manifest import load_manifest
from megatron_aspo.checkpoint.options import CheckpointOptions
from megatron_aspo.checkpoint.request import SaveRequest

if TYPE_CHECKING:
    from megatron_aspo.runtime.trainers import Trainers

_NAME = re.compile(r"step_(\d+)")


def find_checkpoints(run_directory: Path) -> dict[int, Path]:
    """Step → directory of the checkpoints of a run, oldest first; whether they are whole is not looked at."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in (run_directory / "checkpoints").iterdir():
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


class CheckpointStore:
    def __init__(self, run_directory: Path, options: CheckpointOptions, trainers: "Trainers", attempt: str, config: str):
        self._run_directory, self._options, self._trainers, self._attempt, self._config = run_directory, options, trainers, attempt, config
        self._under_way: Path | None = None

    def is_due(self, done: int, last: bool) -> bool:
        """Whether a checkpoint is made after `done` steps; last: no more follow."""
        return bool(self._options.every) and (last or done % self._options.every == 0)

    def save(self, done: int, training: dict[str, Any]) -> float:
        """Start a checkpoint of what `done` steps made; returns the seconds until training can go on."""
        target = self._run_directory / "checkpoints" / f"step_{done}"
        self._under_way = target
        return self._trainers.save(SaveRequest(target, self._attempt, training | {"step": done}, self._config, self._options.asynchronous))

    def completed(self, wait: bool = False) -> Path | None:
        """The checkpoint that has become whole since the last call, if any; then the ones that the rules do not keep are removed.

        Raises what kept it from becoming whole.
        """
        if self._under_way is None or not self._trainers.saved(wait):
            return None
        path, self._under_way = self._under_way, None
        self._prune()
        return path

    def _prune(self) -> None:
        checkpoints = find_checkpoints(self._run_directory)
        accuracies = {step: _accuracy(path) for step, path in checkpoints.items()}
        for step in to_remove(accuracies, self._options):
            remove_directory(checkpoints[step])


def _accuracy(checkpoint: Path) -> float | None:
    try:
        return load_manifest(checkpoint).training["accuracy"]
    except (OSError, ValueError, KeyError):  # damaged since: resuming from it is what refuses it
        return None


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
    with contextlib.suppress(FileNotFoundError):
        for path in sorted((run_directory / "checkpoints").glob("*.unfinished-*")):
            if path.name.endswith("-removed"):
                remove_directory(path)
                continue
            doomed = path.with_name(f"{path.name}-removed")
            os.rename(path, doomed)
            remove_directory(doomed)


def set_aside(run_directory: Path, step: int) -> list[Path]:
    """Checkpoints and exports of steps after `step` are renamed, as those steps will be done again; returns their new names."""
    renamed = []
    for path in [*run_directory.glob("checkpoints/step_*"), *run_directory.glob("exports/step_*")]:
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) > step:
            aside = path.with_name(f"{path.name}.superseded")
            if aside.exists():
                remove_directory(aside)
            os.rename(path, aside)
            renamed.append(aside)
    return renamed
