"""Options of the observe room."""

from dataclasses import field

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import first_changed, options
from megatron_aspo.observe.trackers import check_names


@options("observe")
class ObserveOptions:
    trackers: list[str] = field(default_factory=list)
    """Where metrics go beside `metrics.jsonl`: any of `tensorboard`, `wandb` and `mlflow`. One that fails is reported once and left out."""
    project: str = "megatron_aspo"
    """Project in W&B, experiment in MLflow."""


def check_observe(observe: ObserveOptions) -> None:
    """Raise UserError for a tracker that is none of ours, and for a project that none would use."""
    check_names(observe.trackers)
    require(
        not first_changed(observe, ("project",)) or {"wandb", "mlflow"} & set(observe.trackers),
        f"observe.project={observe.project} has no effect without wandb or mlflow in observe.trackers; add one, or remove it",
    )
