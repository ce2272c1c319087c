"""Options of the observe room."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ObserveOptions:
    trackers: list[str] = field(default_factory=list)
    """Where metrics go beside `metrics.jsonl`: any of `tensorboard`, `wandb` and `mlflow`. One that fails is reported once and left out."""
    project: str = "megatron_aspo"
    """Project in W&B, experiment in MLflow."""
