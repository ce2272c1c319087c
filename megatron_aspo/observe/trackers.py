"""Trackers by name: TensorBoard, W&B and MLflow, beside `metrics.jsonl`, which every run writes.

A tracker is a convenience: each runs in a thread of its own, so that a slow server delays no step, and one that fails is reported once and
dropped. To add one: write a class with the constructor and the methods of `Tracker`, and put it into `TRACKERS`.
"""

import importlib.util
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_aspo.common.atomic import write_text
from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.common.import_path import one_line

_CLOSE_S = 30.0
"""Seconds that the end of a run waits for a tracker."""
CHARTS = (
    "reward/mean",
    "evaluation/accuracy",
    "groups/solved_by_all",
    "groups/solved_by_none",
    "response/length_mean",
    "response/cut_off_share",
    "train/entropy",
    "train/gradient_norm",
    "train/skipped_updates",
    "mismatch/k3",
    "tokens/generated_per_s",
    "seconds/step",
)
"""Metrics repeated below `00_overview/`, which trackers list first, since they sort charts by name."""


@dataclass(frozen=True)
class TrackedRun:
    """Data about a run for its trackers. Every process that names the same run adds to it."""

    name: str
    directory: Path
    project: str
    recipe: dict[str, Any]
    """The resolved recipe, as nested mappings."""
    trains: bool = True
    """Whether this process trains it; a watcher only adds evaluations, and does not end it."""


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics after `step` steps. Steps may come in any order. May raise anything."""
        ...

    def close(self) -> None:
        """Send what is left. May raise anything."""
        ...


class TensorBoard:
    """Event files in the run's directory `tensorboard/`."""

    package = "tensorboard"

    def __init__(self, run: TrackedRun):
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.directory / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """W&B; name and id of the run are the run's name. WANDB_MODE=offline writes files to the run's directory, for `wandb sync`."""

    package = "wandb"

    def __init__(self, run: TrackedRun):
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=60)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=re.sub(r"[/\\#?%:]", "-", run.name),
            resume="allow",
            dir=str(run.directory),
            config=run.recipe,
            settings=settings,
        )
        self._run.define_metric("global_step")
        # A separate step metric, because evaluations of older checkpoints arrive later.
        self._run.define_metric("*", step_metric="global_step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"global_step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A tracker that logs metrics to the MLflow server at the address in MLFLOW_TRACKING_URI.

    MLflow's id of the run is saved as `mlflow_run_id` in the run directory, so that a resumed run logs to the same page.
    """

    package = "mlflow"

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  optional

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError("MLFLOW_TRACKING_URI is not set; set it to the address of the tracking server")
        self._client, self._trains = MlflowClient(tracking_uri=uri), run.trains
        known = run.directory / "mlflow_run_id"
        if known.exists():
            self._id = known.read_text(encoding="utf-8").strip()
            return
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        write_text(known, self._id + "\n")
        self._client.log_dict(self._id, run.recipe, "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]  optional

        now = int(time.time() * 1000)
        # MLflow's names have no @.
        self._client.log_batch(self._id, [Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        if self._trains:
            self._client.set_terminated(self._id)


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or named twice."""
    for position, name in enumerate(names):
        if name not in TRACKERS:
            raise UserError(f"observe.trackers has {name}, which is not known; {nearest(name, TRACKERS)}")
        if name in names[:position]:
            raise UserError(f"observe.trackers has {name} twice; remove one")


def check_packages(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed here."""
    for name in names:
        if importlib.util.find_spec(package := TRACKERS[name].package) is None:
            raise UserError(f"observe.trackers has {name}, whose package {package} is not installed; pip install 'megatron_aspo[trackers]'")


class Trackers:
    """The trackers of a run. No method raises or blocks, except that `close` waits at most 30 s."""

    def __init__(self, names: Sequence[str], run: TrackedRun, log: Callable[[str], None]):
        """log: prints a line; called once for each tracker that fails."""
        self._threads = [_TrackerThread(name, run, log) for name in names]

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers among the metrics, after `step` steps of training."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
        numbers |= {f"00_overview/{name.replace('/', '_')}": numbers[name] for name in CHARTS if name in numbers}
        for thread in self._threads:
            thread.entries.put((step, numbers))

    def close(self) -> None:
        """Wait until everything is sent; a tracker that takes too long is left behind. Idempotent."""
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.entries.put(None)
        for thread in self._threads:
            thread.join_until(deadline)
        self._threads = []


class _TrackerThread:
    """Feeds one tracker from a queue, until it fails."""

    def __init__(self, name: str, run: TrackedRun, log: Callable[[str], None]):
        self.entries: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._name, self._run, self._log = name, run, log
        self._thread = threading.Thread(target=self._feed, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def join_until(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._log(f"tracker {self._name} is not done after {_CLOSE_S:g} s and is left behind; metrics.jsonl has everything")

    def _feed(self) -> None:
        try:
            tracker: Tracker = TRACKERS[self._name](self._run)
            while entry := self.entries.get():
                tracker.log(*entry)
            tracker.close()
        except BaseException as error:  # whatever a tracker does, the run goes on
            self._log(f"tracker {self._name} failed and is left out ({one_line(error)}); metrics.jsonl has everything")
