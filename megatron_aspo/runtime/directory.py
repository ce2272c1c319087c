"""The third step of a run: creating its directory, or rolling it back to the step from which the run resumes."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, to_yaml
from megatron_aspo.evaluation.accuracy import Evaluation
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.observe.progress import Progress
from megatron_aspo.observe.trackers import TrackedRun, Trackers
from megatron_aspo.runtime.checkpoint_store import CheckpointStore, set_aside, sweep_unfinished
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.start import Ownership, Start, directory_exists
from megatron_aspo.runtime.trainers import Trainers


@dataclass(frozen=True)
class RunFiles:
    """The open files of a run directory, and the trackers."""

    metrics: MetricsFile
    ledger: Ledger
    checkpoints: CheckpointStore
    trackers: Trackers


def own_existing_directory(config: Config, at_the_end: ExitStack) -> Ownership | None:
    """Own a run directory that is to be resumed and remove the unfinished files of killed processes; return None if there is none.

    at_the_end: releases the directory; it is closed when no process of the run can write any more.
    """
    if config.resume == "never" or not directory_exists(config) or not (config.directory / ATTEMPT).is_file():
        return None
    owner = _own(config.directory, at_the_end)
    sweep_unfinished(config.directory)
    return owner


@contextmanager
def open_directory(
    config: Config, start: Start, owner: Ownership | None, trainers: Trainers, progress: Progress, at_the_end: ExitStack
) -> Iterator[RunFiles]:
    """Create the run directory, or roll it back to the step from which the run starts, and open its files.

    owner: the value that `own_existing_directory` returned. A UserError, also of the caller, removes a new directory without a completed
    step: the error is one that only the first responses show, such as a failing reward, and the corrected run may use the name.
    """
    directory = config.directory
    if not start.in_place:
        _make_run_directory(directory)
    try:
        with ExitStack() as stack:
            owner = owner or _own(directory, at_the_end)
            ledger = stack.enter_context(contextlib.closing(Ledger(directory / "ledger.jsonl")))
            check_ledger(ledger, start, directory)
            _prepare_directory(directory, start, config, progress)
            metrics = stack.enter_context(contextlib.closing(MetricsFile(directory / "metrics.jsonl", start.step)))
            began = {"attempt": owner.attempt, "checkpoint": str(start.checkpoint or "")}
            ledger.append("resume" if start.checkpoint else "start", step=start.step, **began)
            tracked = TrackedRun(config.name, directory, config.observe.project, asdict(config))
            trackers = stack.enter_context(contextlib.closing(Trackers(config.observe.trackers, tracked, progress.log)))
            checkpoints = CheckpointStore(
                directory, config.checkpoint, trainers, owner.attempt, to_yaml(config), lambda done: _accuracy(directory, done)
            )
            yield RunFiles(metrics, ledger, checkpoints, trackers)
    except UserError:
        if not start.in_place and not _has_steps(directory):
            shutil.rmtree(directory)
        raise


def _own(directory: Path, at_the_end: ExitStack) -> Ownership:
    owner = at_the_end.enter_context(contextlib.closing(Ownership(directory)))
    at_the_end.callback(sweep_unfinished, directory)
    return owner


def _make_run_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"run directory {directory} exists; choose another name or run_dir, or remove it") from error
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be made: {error.strerror}; choose another run_dir") from error


def _prepare_directory(directory: Path, start: Start, config: Config, progress: Progress) -> None:
    """Write the resolved recipe to config.yaml. On resume, rename what an earlier process wrote after the step resumed from."""
    with disk_errors(directory / "config.yaml"):
        write_text(directory / "config.yaml", to_yaml(config))
    if start.in_place:
        for aside in set_aside(directory, start.step):
            progress.log(f"the steps after {start.step} are done again: what they made is now {aside}")
        begin = f"going on after step {start.step} from {start.checkpoint}" if start.checkpoint else "no checkpoint yet: starting at step 1"
        progress.log(begin)


def _accuracy(directory: Path, done: int) -> float | None:
    path = directory / "evaluations" / f"step_{done}.json"
    return Evaluation.read(path).accuracy.mean if path.exists() else None


def check_ledger(ledger: Ledger, start: Start, directory: Path) -> None:
    """Raise UserError for a ledger with fewer lines than it had at the run's own checkpoint."""
    checkpoint = start.checkpoint
    if checkpoint is None or checkpoint.parent.parent != directory:
        return
    if ledger.lines < (lines := start.training["ledger_lines"]):
        raise UserError(
            f"ledger.jsonl has {ledger.lines} lines, at {checkpoint.name} it had {lines}: it was changed since; put it back, or go "
            f"on under another name with --resume {checkpoint}"
        )


def _has_steps(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0
